"""Execute the notebooks whose code, library or data changed, and keep their outputs: `python tools/render.py`.

Notebooks that are named are executed in any case. `--studies STORE` copies the outputs of nbs/studies from the
notebooks that `hapnb reproduce --profile full --store STORE` left there. Each notebook records in its metadata
(`made_from`) the code that its outputs came from, and what that code reads: the library and the data.
`tests/notebook.py` executes a notebook and compares its outputs.
"""
import argparse, ast, base64, hashlib, io, json, os, re, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NBS, LIBRARY = ROOT / "nbs", ROOT / "hapnb"
LIMIT = 300_000  # bytes per notebook
DPI = 80
# what JupyterLab writes when it opens a notebook, with the kernel of tools/lab: then opening changes nothing
METADATA = {
    "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
    "language_info": {"codemirror_mode": {"name": "ipython", "version": 3}, "file_extension": ".py",
                      "mimetype": "text/x-python", "name": "python", "nbconvert_exporter": "python",
                      "pygments_lexer": "ipython3", "version": "3"}}
STALE = "**These outputs are older than the code.** `hapnb reproduce {} --profile full` makes them again."


def notebooks():
    "All notebooks but those that the tests skip too."
    names = lambda p: p.relative_to(NBS).parts
    return [p for p in sorted(NBS.rglob("*.ipynb"))
            if not any(n.startswith(("_", ".")) for n in names(p)) and not (p.parent / ".notest").exists()]


def is_study(path): return path.parent.name == "studies"
def read(path): return nbformat.read(path, 4)
def tags(cell): return cell.metadata.get("tags", [])


def code_cells(nb):
    "The code cells that the author wrote."
    return [c for c in nb.cells if c.cell_type == "code" and "injected-parameters" not in tags(c)]


def tidy(nb):
    "Leave only the metadata that a notebook keeps, so that neither JupyterLab nor nbdev_clean changes it."
    made_from = nb.metadata.get("made_from")
    nb.metadata = METADATA | ({"made_from": made_from} if made_from else {})
    nb.nbformat, nb.nbformat_minor = 4, 5
    for c in nb.cells:
        c.metadata = {k: v for k, v in c.metadata.items() if k in ("tags", "nbgrader")}
        if c.cell_type == "code": c.execution_count = None


def text_of(nb): return nbformat.writes(nb, indent=1, ensure_ascii=False, sort_keys=True).rstrip() + "\n"


def write(nb, path):
    "Write a notebook if it changed."
    text = text_of(nb)
    if text != path.read_text(encoding="utf-8"): path.write_text(text, encoding="utf-8")


# what outputs are made from

def imported(tree, package="hapnb"):
    "Modules of the package that code imports, at its top or inside a function, by statement or by `import_module`."
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module: yield n.module.split(".")[0]
        elif isinstance(n, ast.ImportFrom) and n.level == 1: yield from (a.name for a in n.names)
        elif isinstance(n, ast.ImportFrom) and n.module == package: yield from (a.name for a in n.names)
        elif isinstance(n, ast.ImportFrom) and (n.module or "").startswith(f"{package}."): yield n.module.split(".")[1]
        elif isinstance(n, ast.Import):
            yield from (a.name.split(".")[1] for a in n.names if a.name.startswith(f"{package}."))
        elif isinstance(n, ast.Call) and getattr(n.func, "attr", getattr(n.func, "id", "")) == "import_module":
            for x in n.args[:1]:
                if isinstance(x, ast.Constant) and str(x.value).startswith(f"{package}."): yield x.value.split(".")[1]


def imported_texts(code):
    "The modules of the library that code needs, however indirectly: name -> text."
    found, todo = {}, set(imported(ast.parse(re.sub(r"^\s*[%!].*$", "pass", code, flags=re.M))))
    while todo:
        module = todo.pop()
        if module in found or not (LIBRARY / f"{module}.py").exists(): continue
        found[module] = (LIBRARY / f"{module}.py").read_text(encoding="utf-8")
        todo |= set(imported(ast.parse(found[module])))
    return found


def data_files(path, code, texts):
    "Committed files that are read: those beside the library, and those that the notebook names as \"../X\"."
    said = [t for t in texts if "assets" in t]
    beside = [p for p in sorted((LIBRARY / "assets").rglob("*")) if p.is_file() and said
              and (p.parent.name == "assets" or any(f"assets/{p.parent.name}" in t for t in said))]
    return beside + [p for name in re.findall(r'"(\.\./[^"]+)"', code) if (p := path.parent / name).is_file()]


def digest(*parts):
    "Sixteen hexadecimal digits."
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def made_from(path, nb):
    "Hashes of a notebook's code, and of all that its outputs depend on."
    cells = [c.source for c in code_cells(nb)]
    code = "\n".join(cells)
    texts = imported_texts(code)
    data = [hashlib.sha256(p.read_bytes()).hexdigest() for p in data_files(path, code, [code, *texts.values()])]
    return {"code": digest(cells), "inputs": digest(cells, sorted(texts.items()), data)}


# clean outputs

RICH = "image/png", "image/jpeg", "image/svg+xml", "text/html", "text/markdown", "text/latex", "text/plain"
PROGRESS = re.compile(r"^(?:run \d+/\d+|running): .*\n?", re.M)


def hide(text, folders=()):
    "Remove addresses in memory, what a progress bar overwrote, and paths of this machine."
    text = re.sub(r" at 0x[0-9a-fA-F]+\b", "", text)
    text = re.sub(r"[^\n]*\r(?!\n)", "", text)
    for folder in (*folders, ROOT): text = text.replace(f"{folder}/", "").replace(str(folder), ".")
    text = re.sub(rf"{tempfile.gettempdir()}/tmp\w+", "tmp", text)
    return re.sub(rf"(?<![\w.]){re.escape(str(Path.home()))}(?=/\w)", "~", text)


def compact(png, colours=256, scale=1.):
    "A PNG of at most DPI and few colours; without metadata."
    from PIL import Image
    image = Image.open(io.BytesIO(png))
    scale *= min(1, DPI / image.info.get("dpi", (DPI,))[0])
    if image.mode not in ("RGB", "P", "L"):
        # figures are opaque
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    if scale < .99: image = image.resize([round(n * scale) for n in image.size], Image.Resampling.LANCZOS)
    image = image.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def decoded(out): return base64.b64decode(out["data"]["image/png"])
def encoded(png): return base64.b64encode(png).decode()


def clean(outputs, folders=(), progress=False, alt="", heading=""):
    "Outputs as they are stored: the richest form of each, no errors' stream, each picture once, nothing that varies."
    kept = []
    for out in outputs:
        if out["output_type"] == "stream" and out["name"] == "stdout":
            text = hide("".join(out["text"]), folders)
            if progress: text = PROGRESS.sub("", text)
            if kept and kept[-1]["output_type"] == "stream": kept[-1]["text"] += text
            elif text: kept.append(nbformat.v4.new_output("stream", name="stdout", text=text))
        form = next((f for f in RICH if f in out.get("data", {})), None)
        if form is None: continue
        value, metadata = "".join(out["data"][form]), {}
        if form.startswith("text"): value = hide(value, folders)
        else: metadata = {form: {"alt": alt or out["metadata"].get(form, {}).get("alt") or f"Figure: {heading}"}}
        one = nbformat.v4.new_output(out["output_type"], {form: value}, metadata=metadata)
        if form.startswith("text") or not any(k.get("data") == one.data for k in kept): kept.append(one)
    return kept


def fit(nb, name):
    "Draw the largest figures with fewer colours and points until the notebook is small enough."
    size = lambda outputs: len(json.dumps(outputs, ensure_ascii=False).encode())
    small = lambda: len(text_of(nb).encode()) <= LIMIT
    pictures = [o for c in code_cells(nb) for o in c.outputs if "image/png" in o.get("data", {})]
    for colours, scale in ((128, 1), (64, 1), (64, .75), (32, .75), (32, .5)):
        for out in sorted(pictures, key=size, reverse=True):
            if small(): return
            out["data"]["image/png"] = encoded(compact(decoded(out), colours, scale))
    if small(): return
    largest = max(code_cells(nb), key=lambda c: size(c.outputs))
    sys.exit(f"{name}: more than {LIMIT // 1000} kB with its outputs; the largest, {size(largest.outputs) // 1000} kB, "
             f"are those of cell {largest.id}: {largest.source[:80]!r}")


def headings(nb):
    "The heading above each cell, by id: what a picture without a title of its own is called."
    found, last = {}, ""
    for c in nb.cells:
        if c.cell_type == "markdown": last = ([last] + re.findall(r"^#+ +(.+)$", c.source, re.M))[-1]
        found[c.id] = last
    return found


def keep(nb, outputs, name, **options):
    "Put cleaned outputs, by cell id, into a notebook. Those of cells tagged `varies` stay if all others stay."
    above, before = headings(nb), {c.id: c.outputs for c in code_cells(nb)}
    for c in code_cells(nb):
        said = re.search(r"^#\| *fig-alt: *(.+)$", c.source, re.M)
        c.outputs = clean(outputs.get(c.id, []), alt=said[1] if said else "", heading=above[c.id], **options)
        for out in c.outputs:
            if "image/png" in out.get("data", {}): out["data"]["image/png"] = encoded(compact(decoded(out)))
        found = re.search(r"(?<![\w.:/~<])/(?:home|root|Users|tmp|var)/[\w./-]+", json.dumps(c.outputs))
        if found: sys.exit(f"{name}, cell {c.id}: its output has the path of one machine, {found[0]}")
    fit(nb, name)
    same = all(c.outputs == before[c.id] for c in code_cells(nb) if "varies" not in tags(c))
    for c in code_cells(nb):
        if same and "varies" in tags(c) and before[c.id]: c.outputs = before[c.id]


# compare

NUMBER = re.compile(r"((?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?)")


def close(a, b):
    """Whether two printed numbers agree. Whole numbers: exactly.

    Other processors add in another order. In float32 this changes the seventh digit of a sum, and 20 steps of training
    make it the third digit of a metric. So 1% is allowed, or one unit of the last digit, or 1e-6 where a
    difference of equal values is shown.
    """
    if not re.search(r"[.e]", a + b): return a == b
    x, y = (float(n.replace(",", "")) for n in (a, b))
    unit = max(10. ** (int((n.partition("e")[2]) or 0) - len(n.partition("e")[0].partition(".")[2])) for n in (a, b))
    return abs(x - y) <= max(.01 * max(abs(x), abs(y)), 1.01 * unit, 1e-6)


def agree(stored, now):
    "Whether two texts agree but for the width of columns and what `close` allows."
    (a, b), gaps = (NUMBER.split(t) for t in (stored, now)), re.compile(r"[\s\-=─]+")
    plain = lambda words: [gaps.sub("", w) for w in words[::2]]
    return len(a) == len(b) and plain(a) == plain(b) and all(map(close, a[1::2], b[1::2]))


def shown(outputs):
    "What is compared of outputs: texts, and that there is a picture."
    for out in outputs:
        data = out.get("data", {"stream": out.get("text", "")})
        for form, value in data.items(): yield form, "" if form.startswith("image") else "".join(value)


def differences(path, outputs):
    "Yield what differs between the stored outputs of a notebook and new ones, by cell id."
    nb = read(path)
    if "made_from" not in nb.metadata or is_study(path): return
    for c in code_cells(nb):
        if "varies" in tags(c) or c.id not in outputs: continue
        old, new = list(shown(c.outputs)), list(shown(clean(outputs[c.id])))
        if [f for f, _ in old] != [f for f, _ in new]:
            yield f"cell {c.id}: stored {[f for f, _ in old]}, now {[f for f, _ in new]}"
        else: yield from (f"cell {c.id}\nstored: {a}\nnow: {b}" for (_, a), (_, b) in zip(old, new) if not agree(a, b))


# commands

def execute(path):
    "Run a notebook as the tests do, in a process of its own, and keep its outputs; what went wrong, if anything."
    nb, env = read(path), {**os.environ, "MPLBACKEND": "agg", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"): env.setdefault(threads, "1")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outputs.json"
        command = [sys.executable, str(ROOT / "tests/notebook.py"), str(path), "--outputs", str(file)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode: return f"{path.name} failed\n{done.stderr[-4000:]}"
        outputs = json.loads(file.read_text(encoding="utf-8"))
    if read(path) != nb: return f"{path.name} was changed while it ran"
    try: keep(nb, outputs, path.name)
    except SystemExit as e: return str(e)
    nb.metadata.made_from = made_from(path, nb)
    tidy(nb)
    write(nb, path)
    print(f"{path.name}: {path.stat().st_size // 1000} kB", flush=True)


def take_study(path, store):
    "Copy outputs from the executed notebook in `store` if its code is that of the study; else say which cell differs."
    source = Path(store) / "notebooks" / f"{path.stem}-full.ipynb"
    if not source.exists(): return
    nb, done = read(path), read(source)
    ours, theirs = code_cells(nb), code_cells(done)
    differ = [a.id for a, b in zip(ours, theirs) if a.source != b.source]
    if differ or len(ours) != len(theirs):
        return f"{path.stem}: {source} ran other code ({', '.join(differ) or 'more or fewer cells'})"
    if not all(c.metadata.get("papermill", {}).get("status") == "completed" for c in theirs):
        return f"{path.stem}: {source} did not run to its end"
    where = Path(done.metadata.papermill.input_path).parents[2]
    outputs = {a.id: b.outputs for a, b in zip(ours, theirs)}
    keep(nb, outputs, path.name, folders=(Path(store).resolve(), store, where), progress=True)
    nb.metadata.made_from = {"code": digest([c.source for c in ours]), "profile": "full"}
    tidy(nb)
    write(nb, path)
    print(f"{path.name}: {path.stat().st_size // 1000} kB", flush=True)


def put_in_order(path):
    "Tidy a notebook; say above the outputs of a study that they are older than its code, as long as this is so."
    nb = read(path)
    if is_study(path):
        notice = nbformat.v4.new_output("display_data", {"text/markdown": STALE.format(path.stem)})
        first = code_cells(nb)[0]
        first.outputs = [o for o in first.outputs if o != notice]
        if is_stale(nb): first.outputs.insert(0, notice)
    tidy(nb)
    write(nb, path)


def is_stale(nb):
    "Whether the outputs of a study came from other code than it has now."
    return "made_from" in nb.metadata and nb.metadata.made_from.code != digest([c.source for c in code_cells(nb)])


def main():
    "Execute what changed, or what is named; take the outputs of studies from a store."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--studies", metavar="STORE", help="copy outputs of nbs/studies from this store")
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    studies = [p for p in notebooks() if is_study(p)]
    failed = [take_study(p, asked.studies) for p in studies] if asked.studies else []
    for p in notebooks(): put_in_order(p)
    todo = [p.resolve() for p in asked.notebooks]
    if not todo and not asked.studies:
        changed = lambda p: (nb := read(p)).metadata.get("made_from") != made_from(p, nb)
        todo = [p for p in notebooks() if not is_study(p) and changed(p)]
    with ThreadPoolExecutor(asked.jobs) as pool: failed += pool.map(execute, todo)
    if failed := [f for f in failed if f]: sys.exit("\n".join(failed))


if __name__ == "__main__": main()
