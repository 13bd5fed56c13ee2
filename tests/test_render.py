"""Stored outputs: clean, small, the same twice, compared with allowance, in step with the code; and JupyterLab."""
import base64, io, json, shutil, subprocess, sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
import render

NOTEBOOKS = render.notebooks()
code = nbformat.v4.new_code_cell


def stored(path, *cells, **metadata):
    "Write a notebook of these code cells."
    nb = nbformat.v4.new_notebook(cells=[code(c) if isinstance(c, str) else c for c in cells], metadata=metadata)
    nbformat.write(nb, path)
    return path


# comparing

@pytest.mark.parametrize("a, b", [
    ("0.8333", "0.8331"), ("H-AP 0.12", "H-AP 0.13"), ("largest difference 3.1e-08", "largest difference 9e-09"),
    ("12 runs, 1,234 images", "12 runs,  1,234 images"), ("| a | 0.5 |\n|---|---|", "| a | 0.501 |\n|---|-----|"),
    ("tensor([-0.0000, 1.0000])", "tensor([0.0001, 0.9999])"), ("loss .162", "loss .163"), ("nan", "nan")])
def test_what_another_processor_prints_is_accepted(a, b): assert render.agree(a, b)


@pytest.mark.parametrize("a, b", [
    ("12 runs", "13 runs"), ("0.83", "0.87"), ("1,234", "1,235"), ("1e-3", "3e-3"), ("H-AP 0.5", "AP 0.5"),
    ("-0.5", "0.5"), ("0.5 0.5", "0.5"), ("nan", "0.5"), ("R@1", "R@2"), ("1.0e-08", "5.0e-05"), ("", "0.5")])
def test_other_results_are_not_accepted(a, b): assert not render.agree(a, b)


def differing(path, *texts):
    "What `differences` says when the cells of a notebook print these texts."
    outputs = [[dict(output_type="stream", name="stdout", text=t)] if t else [] for t in texts]
    return list(render.differences(path, {c.id: o for c, o in zip(render.read(path).cells, outputs)}))


def test_stored_texts_are_compared_except_of_cells_that_vary(tmp_path):
    prints = lambda text: [nbformat.v4.new_output("stream", name="stdout", text=text)]
    cells = code("a", outputs=prints("loss 0.50")), code("b", outputs=prints("3 s"), metadata=dict(tags=["varies"]))
    path = stored(tmp_path / "a.ipynb", *cells, made_from={"code": ""})
    assert not differing(path, "loss 0.51", "9 s")
    assert "now: loss 0.70" in differing(path, "loss 0.70", "3 s")[0]
    assert "now []" in differing(path, "", "3 s")[0]
    assert not differing(stored(tmp_path / "new.ipynb", "a"), "loss 0.5"), "it has no outputs yet"


# executing

CELLS = """
import warnings, sys, tempfile, pandas as pd, matplotlib.pyplot as plt
from IPython.display import display
===
print("first", object(), tempfile.mkdtemp())
display(pd.DataFrame({"a": [1.5]}))
print("a bar: 1%\\ra bar: 100%")
warnings.warn("noise")
sys.stderr.write("more noise")
pd.Series([1])
===
fig, ax = plt.subplots()
ax.set(title="Recall", xlabel="k")
ax.plot([1, 2])
fig
===
import time
print(time.time())
===
4;
""".strip().split("\n===\n")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    "A notebook that was executed twice, and its bytes after each time."
    path = stored(tmp_path_factory.mktemp("render") / "a.ipynb", *CELLS)
    nb = render.read(path)
    nb.cells[3].metadata["tags"] = ["varies"]
    render.write(nb, path)
    texts = []
    for _ in range(2):
        assert render.execute(path) is None
        texts.append(path.read_bytes())
    return path, texts


def test_executing_twice_gives_the_same_bytes(rendered): assert rendered[1][0] == rendered[1][1]


def test_outputs_are_clean(rendered):
    setup, prints, figure, varies, quiet = (c.outputs for c in render.read(rendered[0]).cells)
    assert not setup and not quiet and varies
    assert [next(iter(o.get("data", {"text": 0}))) for o in prints] == ["text", "text/html", "text", "text/plain"]
    assert prints[0].text == "first <object object> tmp\n" and prints[2].text == "a bar: 100%\n"
    # returned and drawn at the end of the cell: one picture
    assert [list(o.data) for o in figure] == [["image/png"]]
    assert figure[0].metadata["image/png"]["alt"] == "Recall; x: k"
    picture = base64.b64decode(figure[0].data["image/png"])
    assert Image.open(io.BytesIO(picture)).mode == "P" and b"atplotlib" not in picture


def noise(size, n=1):
    "A cell with pictures that cannot be compressed."
    cell = code("draw()")
    for seed in range(n):
        file = io.BytesIO()
        pixels = np.random.RandomState(seed).randint(0, 256, (size, size, 3)).astype("uint8")
        Image.fromarray(pixels).save(file, "PNG", dpi=(160, 160))
        data = {"image/png": base64.b64encode(file.getvalue()).decode()}
        cell.outputs.append(nbformat.v4.new_output("display_data", data))
    return cell


def test_large_pictures_shrink():
    nb = nbformat.v4.new_notebook(cells=[noise(1400)])
    render.keep(nb, {nb.cells[0].id: nb.cells[0].outputs}, "a")
    assert len(render.text_of(nb)) <= render.LIMIT
    assert Image.open(io.BytesIO(render.decoded(nb.cells[0].outputs[0]))).width > 300


def test_a_notebook_that_stays_too_large_is_refused():
    nb = nbformat.v4.new_notebook(cells=[code("1"), noise(1600, 8)])
    with pytest.raises(SystemExit, match=f"^a.ipynb: more than 300 kB.*{nb.cells[1].id}: 'draw"):
        render.keep(nb, {nb.cells[1].id: nb.cells[1].outputs}, "a.ipynb")


def test_a_path_of_this_machine_is_refused():
    nb = nbformat.v4.new_notebook(cells=[code("where()")])
    out = nbformat.v4.new_output("stream", name="stdout", text="in " + "/".join(["", "home", "ann", "x"]))
    with pytest.raises(SystemExit, match=nb.cells[0].id): render.keep(nb, {nb.cells[0].id: [out]}, "a.ipynb")


def test_a_notebook_that_fails_is_named_and_stays(tmp_path):
    path = stored(tmp_path / "bad.ipynb", "1 / 0")
    before = path.read_bytes()
    assert "bad.ipynb failed" in (said := render.execute(path)) and "ZeroDivisionError" in said
    assert path.read_bytes() == before


# what outputs are made from

def test_a_change_of_code_library_or_data_asks_for_new_outputs(tmp_path, monkeypatch):
    library, nbs = tmp_path / "hapnb", tmp_path / "nbs"
    (library / "assets/recipes").mkdir(parents=True)
    nbs.mkdir()
    files = {library / "a.py": "from .b import x", library / "b.py": "FOLDER = 'assets/recipes'", library / "c.py": "",
             library / "assets/recipes/r.json": "{}", nbs / "t.md": "", library / "assets/pictures.csv": ""}
    for file, text in files.items(): file.write_text(text)
    monkeypatch.setattr(render, "LIBRARY", library)
    path = stored(nbs / "n.ipynb", "%matplotlib inline\nfrom hapnb.a import x", "open(\"../nbs/t.md\")")
    state = lambda: render.made_from(path, render.read(path))["inputs"]
    changed = {}
    for file in files:
        before = state()
        file.write_text(file.read_text() + "\n1")
        changed[file.name] = state() != before
    assert changed == {"a.py": True, "b.py": True, "c.py": False, "r.json": True, "t.md": True, "pictures.csv": True}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_outputs_are_in_step_with_the_code(path):
    nb = render.read(path)
    if render.is_study(path):
        notice = render.STALE.format(path.stem) in str(render.code_cells(nb)[0].outputs)
        assert notice == render.is_stale(nb), "run `make render`: it says in the notebook that the outputs are older"
    elif "made_from" in nb.metadata:
        assert nb.metadata.made_from.code == render.made_from(path, nb)["code"], f"make render ARGS={path}"
    else: assert not any(c.outputs for c in render.code_cells(nb)), f"make render ARGS={path}"


def test_notebooks_have_outputs():
    missing = {p.stem for p in NOTEBOOKS if not render.is_study(p) and "made_from" not in render.read(p).metadata}
    assert not missing, "run `make render`"


# studies

@pytest.fixture
def study(tmp_path):
    "A study, and what papermill left of it in a store."
    (tmp_path / "studies").mkdir()
    (tmp_path / "store/notebooks").mkdir(parents=True)
    path = stored(tmp_path / "studies/7_x.ipynb", "a = 1", "print(a)")
    nb = render.read(path)
    done = dict(papermill={"status": "completed"}, execution={"iopub": "2026"})
    for c in nb.cells: c.metadata = done
    texts = "run 1/2: seed 0\n", f"{tmp_path}/store/x and /somewhere/nbs/a.md\n"
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", name=n, text=t)
                           for n, t in (("stderr", "noise"), *(("stdout", t) for t in texts))]
    nb.cells.insert(1, code("a = 2", metadata=dict(done, tags=["injected-parameters"])))
    nb.metadata["papermill"] = {"input_path": "/somewhere/nbs/studies/7_x.ipynb"}
    nbformat.write(nb, tmp_path / "store/notebooks/7_x-full.ipynb")
    return path, tmp_path / "store"


def test_a_study_takes_its_outputs_from_the_store(study):
    path, store = study
    assert render.take_study(path, store) is None
    nb = render.read(path)
    assert [c.source for c in nb.cells] == ["a = 1", "print(a)"] and not any(c.metadata for c in nb.cells)
    assert nb.cells[1].outputs == [nbformat.v4.new_output("stream", name="stdout", text="x and nbs/a.md\n")]
    assert set(nb.metadata) == {"kernelspec", "language_info", "made_from"}


def test_outputs_of_a_study_that_are_older_than_its_code_are_marked(study):
    path, store = study
    render.take_study(path, store)
    def edit(source):
        nb = render.read(path)
        nb.cells[0].source = source
        render.write(nb, path)
        render.put_in_order(path)
        return "older than the code" in path.read_text()
    assert edit("a = 3") and edit("a = 3") and not edit("a = 1")
    edit("a = 3")
    before = path.read_bytes()
    assert "ran other code" in render.take_study(path, store) and path.read_bytes() == before


# JupyterLab

def test_jupyterlab_saves_what_it_loads(tmp_path):
    from jupyter_server.services.contents.filemanager import FileContentsManager
    manager = FileContentsManager(root_dir=str(tmp_path))
    for path in NOTEBOOKS:
        shutil.copy(path, tmp_path / "n.ipynb")
        model = json.loads(json.dumps(manager.get("n.ipynb"), default=str))
        manager.save(model, "n.ipynb")
        assert (tmp_path / "n.ipynb").read_bytes() == path.read_bytes(), path.name


def test_the_kernel_of_make_lab_is_what_notebooks_say():
    spec = json.loads((ROOT / "tools/lab/kernels/python3/kernel.json").read_text())
    setup = spec["argv"][2].partition("; from ipykernel.kernelapp")[0]
    said = subprocess.run([sys.executable, "-c", f"{setup}; import json; print(json.dumps(K.language_info))"],
                          capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == render.METADATA["language_info"]
    assert {k: spec.get(k, "python3") for k in ("display_name", "language", "name")} == render.METADATA["kernelspec"]
    # JupyterLab writes both into a notebook that it opens, and marks it as changed if they are others
    for path in NOTEBOOKS:
        metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
        assert {k: metadata.get(k) for k in render.METADATA} == render.METADATA, f"{path.name}: run `make render`"
