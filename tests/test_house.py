"""The house is in order: what is generated is in step, what is committed is small, and the README tells the truth."""
import ast, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
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
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    for c in code_cells(path):
        assert sum(1 for line in source(c).splitlines() if line.strip()) <= 40, f"cell {c['id']} has more than 40 lines"
    if any(re.match(r"\s*#\|\s*default_exp", source(c)) for c in code_cells(path)):
        assert not any(c["outputs"] for c in code_cells(path)), "library notebooks are committed without outputs"


@pytest.mark.parametrize("path", STUDIES, ids=short)
def test_study_has_one_parameters_cell(path):
    tagged = [c for c in read(path)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "papermill needs exactly one cell tagged `parameters`"
    names = {t.id for node in ast.parse(source(tagged[0])).body for t in [getattr(node, "target", None)] if isinstance(t, ast.Name)}
    assert {"profile", "dataset", "data_dir", "seeds", "device", "store", "out"} <= names


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what nbdev reads and writes, in which it can do no harm."
    to = tmp_path_factory.mktemp("copy") / "project"
    to.mkdir()
    for folder in ("nbs", "hapnb"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "assets"))
    for f in ("settings.ini", "setup.py", "README.md"):
        if (ROOT / f).exists(): shutil.copy(ROOT / f, to / f)
    return to


def differing(copy, folder, ending):
    "Names of files that differ between the project and its copy."
    files = {p.relative_to(r).as_posix() for r in (ROOT, copy) for p in (r / folder).rglob(f"*{ending}") if ".ipynb_checkpoints" not in p.parts}
    text = lambda r, f: (r / f).read_bytes() if (r / f).exists() else None
    return sorted(f for f in files if text(ROOT, f) != text(copy, f))


def nbdev(command, cwd): subprocess.run([str(Path(sys.executable).with_name(command))], cwd=cwd, check=True, capture_output=True, text=True)


def test_export_is_in_step(copy):
    nbdev("nbdev_export", copy)
    assert not differing(copy, "hapnb", ".py"), HOW


def test_notebooks_are_clean(copy):
    nbdev("nbdev_clean", copy)
    assert not differing(copy, "nbs", ".ipynb"), HOW


# package

@pytest.mark.parametrize("path", MODULES, ids=short)
def test_everything_public_is_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the notebook needs a `> summary` under its title"
    method = lambda n: any(getattr(d, "id", getattr(getattr(d, "func", None), "id", None)) == "patch" for d in n.decorator_list)
    public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_") and not method(n)]
    assert [n.name for n in public if not ast.get_docstring(n)] == []


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_a_module_imports_earlier_notebooks_only(path):
    number = {}
    for nb in NOTEBOOKS:
        for c in code_cells(nb):
            if m := re.match(r"\s*#\|\s*default_exp (\w+)", source(c)): number[m[1]] = nb.name
    tree = ast.parse(path.read_text(encoding="utf-8"))
    siblings = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module]  # late imports too
    siblings += [a.name.split(".")[1] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names if a.name.startswith("hapnb.")]
    assert [s for s in siblings if not number[s] < number[path.stem]] == []


def test_requirements_can_be_read():
    config = (ROOT / "settings.ini").read_text(encoding="utf-8")
    for key in ("requirements", "dev_requirements"):
        for r in re.search(rf"^{key} = (.+)$", config, flags=re.M)[1].split(): Requirement(r.replace("_and_", " and ").replace("_or_", " or "))
    assert "allowed_cell_metadata_keys = tags" in config, "nbdev_clean would delete papermill's tags"


def test_package_data_is_shipped(tmp_path):
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    shipped = (tmp_path / "hapnb.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines()
    assets = [short(p) for p in (ROOT / "hapnb" / "assets").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert any(a.endswith(".parquet") for a in assets), "the bundled images are missing from hapnb/assets"
    assert set(assets) <= set(shipped)
    assert {"settings.ini", "LICENSE", "CITATION.cff", "README.md"} <= set(shipped)


# papers and paths

def test_citation():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    config = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert cff["cff-version"] and cff["license"] == "Apache-2.0"
    assert cff["version"] == re.search(r"^version = (.+)$", config, flags=re.M)[1]
    assert len(cff["references"]) >= 6
    for r in cff["references"]: assert r["title"] and r["year"] and all(a["family-names"] for a in r["authors"])


def test_no_path_of_one_machine():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True) if shutil.which("git") else None
    files = [ROOT / f for f in listed.stdout.splitlines()] if listed and listed.returncode == 0 else NOTEBOOKS + MODULES
    pattern = re.compile(r"(?<![\w./])/(?:work|farm|root|home|Users|tmp/bash_jobs)/[\w./-]+")
    text = [p for p in files if p.is_file() and (p.suffix in (".py", ".ipynb", ".md", ".ini", ".cff", ".csv", ".json", ".svg", ".tex") or p.name in ("Makefile", "run"))]
    found = {short(p): m[0] for p in text if (m := pattern.search(p.read_text(encoding="utf-8")))}
    assert found == {}


# README

def readme(): return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_in_step():
    run = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_readme_links_exist():
    links = re.findall(r"\]\(([^)\s]+)\)", readme())
    assert [t for t in links if not re.match(r"[a-z]+:|#", t) and not (ROOT / t.split("#")[0]).exists()] == []


def test_readme_shows_the_table_that_the_study_wrote():
    tables = sorted((ROOT / "figures" / "10_benchmark").glob("*.md"))
    assert tables, "no table in figures/10_benchmark: run `make reproduce PROFILE=full STUDY=10_benchmark`"
    text = readme()
    assert any(all(line.strip() in text for line in t.read_text(encoding="utf-8").splitlines() if line.startswith("|")) for t in tables), HOW


def test_readme_snippets_run(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", readme(), flags=re.M | re.S)
    assert blocks, "the README shows no Python"
    run = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
