"""The driver of study notebooks: what is checked before and after papermill, dead kernels, finding studies."""
import json
from pathlib import Path

import pytest

from hapnb import driver
from hapnb.driver import (
    check_parameters, find_studies, pick_studies, run_study, study_context, study_state, StudyFailed,
    unfinished_cell)
from hapnb.helpers import UserError
from toy_study import PARAMETERS, STUDY, write_study


# a study begins as a new Python, or as a fork of a server where there is one
WAYS = pytest.mark.parametrize("way", [lambda: None, study_context], ids=["new", "forked"])


@WAYS
def test_runs_with_types_and_keeps_the_notebook(tmp_path, capfd, way):
    cells = ["print(seeds, lr * 10, flag, store)", "import os; print(os.getcwd())", ""]
    nb, lines = write_study(tmp_path / "a {b}/10_x.ipynb", cells=cells), []
    given = {"lr": "1e-4", "flag": "true", "seeds": "3"}
    done = run_study(nb, tmp_path / "store", given, say=lines.append, context=way())
    assert lines == ["3 0.001 True runs", str(nb.parent)], "nothing but the study's own output"
    assert done == tmp_path / "store/notebooks/10_x.ipynb" and unfinished_cell(done) is None
    assert "TCP without encryption" not in "".join(capfd.readouterr())


# before

@pytest.mark.parametrize("given, text", [
    ({"sedes": 1}, "Did you mean 'seeds'"), ({"seeds": 1.5}, "must be int"), ({"seeds": True}, "must be int"),
    ({"seeds": "007x"}, "must be int"), ({"lr": "fast"}, "must be float"), ({"lr": None}, "must be float"),
    ({"lr": "nan"}, "must be float"), ({"flag": "maybe"}, "must be bool"), ({"store": 7}, "must be str")])
def test_wrong_parameters_are_found_before_anything_runs(tmp_path, given, text):
    with pytest.raises(UserError, match=text): run_study(write_study(tmp_path / "x.ipynb"), tmp_path, given)
    assert not (tmp_path / "notebooks").exists()


@pytest.mark.parametrize("source, tags, text", [
    (None, (), "0 cells tagged"), (PARAMETERS, (), "allowed_cell_metadata_keys"),
    ("a=1; b=2", ("parameters",), "one `name: type"), ("import os", ("parameters",), "one `name: type"),
    ("x: str|None = None", ("parameters",), "cannot read this annotation"), ("x: int", ("parameters",), "plain value"),
    ("x = 1 + n", ("parameters",), "plain value"), ("%matplotlib inline", ("parameters",), "no %magic")])
def test_cells_that_papermill_would_misread(tmp_path, source, tags, text):
    nb = write_study(tmp_path / "x.ipynb", source, tags=tags)
    with pytest.raises(UserError, match=text): check_parameters(nb, {})


def test_two_tags_and_broken_files(tmp_path):
    nb = json.loads(write_study(tmp_path / "x.ipynb").read_text())
    nb["cells"].append({**nb["cells"][1], "id": "again"})
    (tmp_path / "x.ipynb").write_text(json.dumps(nb))
    with pytest.raises(UserError, match="2 cells tagged"): check_parameters(tmp_path / "x.ipynb", {})
    (tmp_path / "y.ipynb").write_text("{")
    with pytest.raises(UserError, match="not a readable notebook"): check_parameters(tmp_path / "y.ipynb", {})
    with pytest.raises(UserError, match="there is no notebook"): check_parameters(tmp_path / "z.ipynb", {})


def test_lists_come_as_text_but_not_nested_without_end(tmp_path):
    nb = write_study(tmp_path / "x.ipynb", "d: list = [1]  # a list")
    assert check_parameters(nb, {"d": "[1, 2]"}) == {"d": [1, 2]}
    with pytest.raises(UserError, match="must be list"): check_parameters(nb, {"d": "[" * 100_000})


def test_plain_and_annotated_parameters_agree_with_papermill(tmp_path):
    import papermill
    lines = ["a = 1  # plain", "b: float = 2  # annotated", "", "# a comment", "c: str = 'x;y#z'  # with signs",
             "d: list = [1]"]
    nb = write_study(tmp_path / "x.ipynb", "\n".join(lines))
    assert set(papermill.inspect_notebook(str(nb))) == set(driver.declared_parameters(nb)) == set("abcd")


# after

@pytest.mark.parametrize("cell, text", [("1/0", r"code cell 4 \(failed\): ZeroDivisionError"),
                                        ("import sys; sys.exit(0)", "code cell 4")])
def test_failures_name_notebook_and_cell(tmp_path, cell, text):
    # a kernel that no machine has: ours is used
    nb = write_study(tmp_path / "x.ipynb", cells=["a = 1", cell, "b = 2"], kernel="hapnb-env")
    with pytest.raises(StudyFailed, match=text) as e: run_study(nb, tmp_path / "s", {"seeds": 1}, say=None)
    assert e.value.notebook.exists() and e.value.cell == 4 and str(e.value.notebook) in str(e.value)


@WAYS
def test_a_dead_kernel_is_tried_once_more(tmp_path, way):
    mark = tmp_path / "mark"
    die = (f"import os, pathlib, signal\nm = pathlib.Path({str(mark)!r})\nn = len(m.read_text()) if m.exists() else 0\n"
           "m.write_text('x' * (n + 1))\nif n < seeds: os.kill(os.getpid(), signal.SIGKILL)")
    nb, lines = write_study(tmp_path / "x.ipynb", cells=[die]), []
    run_study(nb, tmp_path, {"seeds": 1}, say=lines.append, context=way())
    assert mark.read_text() == "xx" and "trying once more" in lines[0]
    mark.unlink()
    # a third and a fourth kernel would say no more
    with pytest.raises(StudyFailed, match="died twice"):
        run_study(nb, tmp_path, {"seeds": 9}, say=None, retries=0, context=way())


# which studies there are, and whether one has changed

def test_finding_studies(tmp_path):
    for name in ("20_batch_size", "10_benchmark", "_hidden"): write_study(tmp_path / f"nbs/studies/{name}.ipynb")
    found = find_studies(tmp_path)
    assert [s.name for s in found] == ["10_benchmark", "20_batch_size"]
    assert found[0].minutes == {"smoke": 0.1, "quick": 2.0} and found[0].summary == "Shows that it works."
    for name in ("10", "benchmark", "10_benchmark", "nbs/studies/10_benchmark.ipynb"):
        assert [s.name for s in pick_studies([name], tmp_path)] == ["10_benchmark"]
    assert len(pick_studies((), tmp_path)) == 2
    with pytest.raises(UserError, match="Did you mean 'benchmark'"): pick_studies(["benchmrk"], tmp_path)


def test_studies_on_demand_run_only_when_named(tmp_path):
    write_study(tmp_path / "nbs/studies/10_benchmark.ipynb")
    nb = json.loads(write_study(tmp_path / "nbs/studies/90_speed.ipynb").read_text())
    nb["cells"][0]["source"] = ["# Speed\n", "\n", "> How fast.\n", "\n", "On demand: name it.\n",
                                "Expected time on 2 cores: quick 4 min."]
    (tmp_path / "nbs/studies/90_speed.ipynb").write_text(json.dumps(nb))
    assert [(s.name, s.on_demand) for s in find_studies(tmp_path)] == [("10_benchmark", False), ("90_speed", True)]
    assert [s.name for s in pick_studies((), tmp_path)] == ["10_benchmark"]
    assert [s.name for s in pick_studies(["speed", "10"], tmp_path)] == ["90_speed", "10_benchmark"]


def test_studies_that_measure_the_machine_or_search_for_others_run_on_demand():
    named_only = {"11_tuned", "90_speed", "91_images", "92_cluster_speed"}
    assert {s.name for s in find_studies(Path(__file__).parents[1]) if s.on_demand} == named_only


def test_the_state_of_a_study_tells_what_has_changed(tmp_path, monkeypatch):
    nb = write_study(tmp_path / "x.ipynb", STUDY, ["1 + 1"])
    (tmp_path / "out").mkdir()
    state = lambda **given: study_state(nb, {"dataset": "toy", **given}, tmp_path / "out")
    same = lambda a, b: (a["inputs"] == b["inputs"], a["outputs"] == b["outputs"])
    first = state()
    assert same(first, state()) == (True, True)
    assert same(first, state(seeds=4)) == (False, True)
    (tmp_path / "out/main.md").write_text("a table")
    assert same(first, state()) == (True, False)
    with monkeypatch.context() as m:
        m.setattr(driver, "code_hash", lambda: "new")
        assert same(first, state()) == (False, False)
    write_study(nb, STUDY, ["1 + 2"])
    assert not same(first, state())[0]
