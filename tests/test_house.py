"""The house is in order: what is generated is in step, what is committed is small, and the README tells the truth."""
import ast, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
import render

NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
STUDIES = [p for p in NOTEBOOKS if "studies" in p.parts and not p.name.startswith("_")]
MODULES = [p for p in sorted((ROOT / "hapnb").glob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]
HOW = "run `make prepare` and commit the result"
short = lambda p: p.relative_to(ROOT).as_posix()


def read(path): return json.loads(path.read_text(encoding="utf-8"))
def source(cell): return "".join(cell["source"])
def code_cells(path): return [c for c in read(path)["cells"] if c["cell_type"] == "code"]


# notebooks

@pytest.mark.parametrize("path", NOTEBOOKS, ids=short)
def test_notebook_is_tidy(path):
    nb = read(path)
    ids = [c.get("id") for c in nb["cells"]]
    assert path.stat().st_size <= 300_000, f"{path.stat().st_size // 1000} kB, 300 at most: smaller figures"
    assert None not in ids and len(set(ids)) == len(ids), "each cell needs an id of its own"
    for c in code_cells(path):
        assert sum(1 for line in source(c).splitlines() if line.strip()) <= 40, f"cell {c['id']} has more than 40 lines"


@pytest.mark.parametrize("path", STUDIES, ids=short)
def test_study_has_one_parameters_cell(path):
    tagged = [c for c in read(path)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "papermill needs exactly one cell tagged `parameters`"
    targets = [getattr(node, "target", None) for node in ast.parse(source(tagged[0])).body]
    names = {t.id for t in targets if isinstance(t, ast.Name)}
    assert {"profile", "dataset", "data_dir", "seeds", "device", "store", "out"} <= names


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what nbdev reads and writes, in which it can do no harm."
    to = tmp_path_factory.mktemp("copy") / "project"
    to.mkdir()
    for folder in ("nbs", "hapnb"):
        left_out = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "assets")
        shutil.copytree(ROOT / folder, to / folder, ignore=left_out)
    for f in ("settings.ini", "setup.py", "README.md"):
        if (ROOT / f).exists(): shutil.copy(ROOT / f, to / f)
    return to


def differing(copy, folder, ending):
    "Names of files that differ between the project and its copy."
    found = [(r, p) for r in (ROOT, copy) for p in (r / folder).rglob(f"*{ending}")]
    files = {p.relative_to(r).as_posix() for r, p in found if ".ipynb_checkpoints" not in p.parts}
    text = lambda r, f: (r / f).read_bytes() if (r / f).exists() else None
    return sorted(f for f in files if text(ROOT, f) != text(copy, f))


def run(*command, cwd=ROOT, **args):
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, **args)


def nbdev(command, cwd): run(Path(sys.executable).with_name(command), cwd=cwd, check=True)


def test_export_is_in_step(copy):
    nbdev("nbdev_export", copy)
    assert not differing(copy, "hapnb", ".py"), HOW


def test_notebooks_are_clean(copy):
    nbdev("nbdev_clean", copy)
    assert not differing(copy, "nbs", ".ipynb"), HOW


# package

def is_patch(node):
    "Whether a function is a method that `@patch` adds to a class."
    names = [getattr(d, "id", getattr(getattr(d, "func", None), "id", None)) for d in node.decorator_list]
    return "patch" in names


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_everything_public_is_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the notebook needs a `> summary` under its title"
    defined = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    assert [n.name for n in defined if not is_patch(n) and not ast.get_docstring(n)] == []


def numbers():
    "The stem of the notebook that makes each module; helpers and schemas come before all others."
    found = {}
    for nb in NOTEBOOKS:
        for c in code_cells(nb):
            if m := re.match(r"\s*#\|\s*default_exp (\w+)", source(c)): found[m[1]] = nb.stem
    return {module: ("0" if stem[:2] in ("90", "91") else "1") + stem for module, stem in found.items()}


def backward(module, text):
    "Imports of a module that do not go to smaller numbers."
    number = numbers()
    return sorted({s for s in render.imported(ast.parse(text)) if s in number and not number[s] < number[module]})


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_a_module_imports_earlier_notebooks_only(path):
    assert backward(path.stem, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("line", [
    "from .study import begin", "def f():\n    from hapnb.study import begin", "from hapnb import study",
    "import hapnb.study", "importlib.import_module('hapnb.study')"])
def test_a_planted_backward_import_is_found(line):
    assert backward("train", line) == ["study"]


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_a_module_is_one_idea(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 530, "a module above about 500 lines holds more than one idea: split its notebook"
    summary = ast.get_docstring(ast.parse("\n".join(lines)))
    sentences = re.findall(r"[.?!:;](?= |$)", summary)
    assert len(sentences) >= 2, "the summary says what the module is for, and what it is not for"


HEAVY = ("pandas", "scipy.stats", "timm", "torchvision", "accelerate", "pydantic", "matplotlib", "pyarrow", "papermill",
         "optuna", "sklearn", "triton", "hapnb.train", "hapnb.data", "hapnb.models", "hapnb.runs")


def test_losses_import_nothing_of_training():
    code = "import sys, hapnb.losses; print([m for m in sys.argv[1:] if m in sys.modules])"
    assert run(sys.executable, "-c", code, *HEAVY, check=True).stdout.strip() == "[]"


# code and prose

def long_lines(texts):
    return [f"{len(line)}: {line.strip()[:60]}" for t in texts for line in t.splitlines() if len(line) > 120]


def crowded(text):
    "Lines that hold more than one statement."
    tree, found = ast.parse(text), []
    for n in ast.walk(tree):
        for block in ("body", "orelse", "finalbody"):
            body = getattr(n, block, None)
            if isinstance(body, list): found += [a.lineno for a, b in zip(body, body[1:]) if a.end_lineno == b.lineno]
    return found


def test_crowded_lines_are_found():
    assert crowded("a = 1; b = 2\nif a: b = 1; a = 2\nif a: b = 1\n") == [1, 2]


PYTHON = [p for folder in ("tests", "tools", "site") for p in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", NOTEBOOKS + PYTHON, ids=short)
def test_code_can_be_read(path):
    texts = [source(c) for c in code_cells(path)] if path.suffix == ".ipynb" else [path.read_text(encoding="utf-8")]
    # magics are no Python
    texts = [re.sub(r"^[%!].*$", "pass", t, flags=re.M) for t in texts]
    assert long_lines(texts) == [], "at most 120 characters"
    assert [n for t in texts for n in crowded(t)] == [], "one statement per line"


WORDS = r"\b(?:nobody|somebody|whoever|strangers?|cousins?|by heart|customs|of a piece|released code)\b"
THINGS = "level|image|class|query|batch|second|run|row|seed|method|loss|epoch|step"
ODD = re.compile(rf"{WORDS}|\b(?:one|two|three|four|\d+) \w+ an? (?:{THINGS})\b", re.I)


PAGES = [ROOT / f for f in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


@pytest.mark.parametrize("path", NOTEBOOKS + PAGES, ids=short)
def test_prose_is_plain_english(path):
    text = "\n".join(map(source, read(path)["cells"])) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    assert ODD.findall(text) == []


def test_requirements_can_be_read():
    config = (ROOT / "settings.ini").read_text(encoding="utf-8")
    for key in ("requirements", "dev_requirements"):
        for r in re.search(rf"^{key} = (.+)$", config, flags=re.M)[1].split():
            Requirement(r.replace("_and_", " and ").replace("_or_", " or "))
    assert "allowed_cell_metadata_keys = tags" in config, "nbdev_clean would delete papermill's tags"


def test_package_data_is_shipped(tmp_path):
    run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, check=True)
    shipped = (tmp_path / "hapnb.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines()
    assets = [short(p) for p in (ROOT / "hapnb" / "assets").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert any(a.endswith(".parquet") for a in assets), "the bundled images are missing from hapnb/assets"
    assert set(assets) <= set(shipped)
    assert {"settings.ini", "LICENSE", "CITATION.cff", "README.md"} <= set(shipped)


# claims

def test_claims_are_registered_as_they_are_declared():
    from hapnb.claims import declared_claims, read_preregistration
    declared = {c.hash() for p in STUDIES for c in declared_claims(p)}
    assert set(read_preregistration(ROOT / "figures" / "preregistration.md")) == declared, HOW


def test_the_page_of_claims_is_in_step(tmp_path):
    from hapnb.claims import write_claims
    for p in (ROOT / "figures").glob("*/claims.json"):
        (tmp_path / p.parent.name).mkdir()
        shutil.copy(p, tmp_path / p.parent.name)
    for name in ("preregistration.md", "first_edition.csv"): shutil.copy(ROOT / "figures" / name, tmp_path)
    page = write_claims(tmp_path)
    for p in (page, *(tmp_path / "claims").glob("*.svg")):
        committed = ROOT / "figures" / p.relative_to(tmp_path)
        assert committed.exists() and committed.read_bytes() == p.read_bytes(), HOW


# papers and paths

def test_citation():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    config = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert cff["cff-version"] and cff["license"] == "Apache-2.0"
    assert cff["version"] == re.search(r"^version = (.+)$", config, flags=re.M)[1]
    assert len(cff["references"]) >= 6
    for r in cff["references"]: assert r["title"] and r["year"] and all(a["family-names"] for a in r["authors"])


def test_no_path_of_one_machine():
    listed = run("git", "ls-files", "-co", "--exclude-standard") if shutil.which("git") else None
    files = [ROOT / f for f in listed.stdout.splitlines()] if listed and listed.returncode == 0 else NOTEBOOKS + MODULES
    pattern = re.compile(r"(?<![\w./])/(?:work|farm|root|home|Users|tmp/bash_jobs)/[\w./-]+")
    kinds = (".py", ".ipynb", ".md", ".ini", ".cff", ".csv", ".json", ".svg", ".tex")
    text = [p for p in files if p.is_file() and (p.suffix in kinds or p.name in ("Makefile", "run"))]
    found = {short(p): m[0] for p in text if (m := pattern.search(p.read_text(encoding="utf-8")))}
    assert found == {}


EARLY = """
import importlib, pathlib, hapnb
from hapnb import clustering, data, helpers, losses, models
registries = helpers.LOSSES, helpers.DATASETS, helpers.TRUNKS, helpers.CLUSTERERS
early = [set(r.names()) for r in registries]
for p in pathlib.Path(hapnb.__file__).parent.glob("*.py"): importlib.import_module(f"hapnb.{p.stem}")
print([sorted(set(r.names()) - e) for r, e in zip(registries, early)])
"""


def test_every_registered_name_is_known_before_its_notebook_is_imported():
    found = run(sys.executable, "-c", EARLY, check=True).stdout.strip()
    assert found == "[[], [], [], []]", "add these names to the `late` table of their registry in 90_helpers"


# README

def test_the_table_of_tests_is_complete():
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    files = {p.name for p in (ROOT / "tests").glob("test_*.py")}
    assert set(re.findall(r"`(test_\w+\.py)`", text)) == files


def readme(): return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_in_step():
    done = run(sys.executable, "tools/readme.py", "--check")
    assert done.returncode == 0, done.stderr


def test_readme_links_exist():
    links = re.findall(r"\]\(([^)\s]+)\)", readme())
    assert [t for t in links if not re.match(r"[a-z]+:|#", t) and not (ROOT / t.split("#")[0]).exists()] == []


def test_readme_shows_the_table_that_the_study_wrote():
    tables = sorted((ROOT / "figures" / "10_benchmark").glob("*.md"))
    assert tables, "no table in figures/10_benchmark: run `make reproduce PROFILE=full STUDY=10_benchmark`"
    text = readme()
    rows = [[line.strip() for line in t.read_text(encoding="utf-8").splitlines() if line[:1] == "|"] for t in tables]
    assert any(all(r in text for r in table) for table in rows), HOW


def test_readme_snippets_run(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", readme(), flags=re.M | re.S)
    assert blocks, "the README shows no Python"
    done = run(sys.executable, "-c", "\n".join(blocks), cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
