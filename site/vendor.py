"""Fetch the scripts that pages need (formulas, slides) once, through npm: pinned, checked, kept in `site/vendor`."""
import base64, hashlib, shutil, subprocess, sys, tarfile, tempfile
from pathlib import Path

VENDOR = Path(__file__).resolve().parent / "vendor"
# package: version, its checksum as npm publishes it, what is needed of it
PACKAGES = {
    "mathjax": ("3.2.2", "sha512-Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/"
                "O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==", ("es5/tex-svg.js", "LICENSE")),
    "reveal.js": ("5.2.1", "sha512-r7//6mIM5p34hFiDMvYfXgyjXqGRta+/psd9YtytsgRlrpRz"
                  "Fv4RbH76TXd2qD+7ZPZEbpBDhdRhJaFgfQ7zNQ==",
                  ("dist/reveal.js", "dist/reveal.css", "dist/theme/white.css", "plugin/notes/notes.js", "LICENSE"))}
HOW = ("Formulas and slides need scripts that npm fetches once, and there is no npm here. Install it "
       "(`sudo apt install npm`, `brew install node` or `conda install nodejs`), then run the command again; "
       "later it works offline.")


def npm_pack(what, folder):
    "The archive of an npm package, fetched into a folder."
    if not shutil.which("npm"): raise SystemExit(HOW)
    done = subprocess.run(["npm", "pack", what, "--ignore-scripts", "--silent", "--pack-destination", str(folder)],
                          capture_output=True, text=True)
    found = list(Path(folder).glob("*.tgz"))
    if done.returncode or len(found) != 1:
        raise SystemExit(f"npm could not fetch {what}; it needs the network this once. npm says: {done.stderr.strip()}")
    return found[0]


def fetch(name, vendor=VENDOR, pack=npm_pack):
    "The folder of a vendored package; fetched, checked and unpacked if it is not there."
    version, checksum, wanted = PACKAGES[name]
    home = Path(vendor) / f"{name}-{version}"
    if all((home / f).exists() for f in wanted): return home
    with tempfile.TemporaryDirectory() as folder:
        data = pack(f"{name}@{version}", folder).read_bytes()
        found = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
        if found != checksum:
            raise SystemExit(f"{name} {version} from npm has another checksum than site/vendor.py expects: {found}. "
                             "Nothing was unpacked.")
        (Path(folder) / "package.tgz").write_bytes(data)
        with tarfile.open(Path(folder) / "package.tgz") as tar:
            for f in wanted:
                to = home / f
                to.parent.mkdir(parents=True, exist_ok=True)
                to.with_name(to.name + ".part").write_bytes(tar.extractfile(f"package/{f}").read())
                to.with_name(to.name + ".part").replace(to)
    return home


def cached(vendor=VENDOR):
    "Whether all packages are here already."
    return all((Path(vendor) / f"{n}-{v}" / f).exists() for n, (v, _, wanted) in PACKAGES.items() for f in wanted)


if __name__ == "__main__":
    for name in sys.argv[1:] or PACKAGES: print(fetch(name))
