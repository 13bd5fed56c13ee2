"""Build the site: `python site/build.py` writes `_docs/index.html`, which needs no network and no server to be read.

`--only PATTERN ...` builds the pages whose path holds one of the patterns, and the pages that list them.
"""
import argparse, resource, shutil, sys
from pathlib import Path

import check
import convert
import vendor

HERE = Path(__file__).resolve().parent


def build(to, work, only=None):
    "Convert the notebooks, run Sphinx (a warning is an error) and check the pages; returns what is wrong."
    from sphinx.cmd.build import main as sphinx
    vendor.fetch("mathjax")
    convert.Site(work / "pages", only=only).convert()
    # myst-nb puts the pictures of notebooks beside the folder that it writes to, so that is not `to`
    options = ["-q", "-W", "--keep-going", "-c", str(HERE), "-d", str(work / "doctrees")]
    if sphinx([*options, str(work / "pages"), str(work / "html")]): return ["Sphinx has warnings"]
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(work / "html", to, ignore=shutil.ignore_patterns(".*", "objects.inv"))
    return list(check.problems(to))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=convert.ROOT / "_docs", type=Path, help="folder of the site")
    parser.add_argument("--work", default=convert.ROOT / "_proc", type=Path, help="what is kept from build to build")
    parser.add_argument("--only", nargs="+", help="build only pages whose path holds one of these patterns")
    args = parser.parse_args()
    found = build(args.out, args.work, args.only)
    used = resource.getrusage(resource.RUSAGE_SELF)
    size = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(f"{args.out / 'index.html'}: {len(list(args.out.rglob('*.html')))} pages, {size / 1e6:.0f} MB, "
          f"{used.ru_utime + used.ru_stime:.0f} CPU seconds")
    sys.exit("\n".join(found) or None)
