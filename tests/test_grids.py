"""Grids of configurations, what `run_grid` does and reads back, failures as rows, damaged stores."""
import os, time

import pandas as pd
import pytest

from hapnb import grids, workers
from hapnb.config import RunConfig
from hapnb.grids import Grid, grid, read_run, run_grid, RunError
from hapnb.helpers import write_atomic, write_manifest
from toy_study import METHODS, Toy, left_workers, toy_run, tries


# grids

def test_grid_is_the_product_with_labels_and_seeds_innermost():
    g = grid(Toy(), seeds=2, method=METHODS, batch_size=[8, 16])
    found = [(l["method"], c.batch_size, c.seed) for c, l in zip(g, g.labels)]
    assert found == [(m, b, s) for m in "AB" for b in (8, 16) for s in (0, 1)]
    assert grid(Toy(), seeds=[7])[0].seed == 7


def test_grids_join_and_select():
    g = grid(Toy(), seeds=1, method={"A": {}}) + grid(Toy(), seeds=1, method={"C": {"batch_size": 4}})
    assert [l["method"] for l in g.labels] == ["A", "C"] and g.where(method="C")[0].batch_size == 4
    g += [Toy(seed=9)]
    assert len(g.labels) == len(g) == 3 and not Grid()


@pytest.mark.parametrize("axes, text", [
    ({"bach_size": [1]}, "Did you mean 'batch_size'"),
    ({"batch_size": 3}, "must be a list"),
    ({"m": {"x": {"los": "a"}}}, "Did you mean 'loss'"),
    ({"loss": "ab"}, "must be a list")])
def test_wrong_axes(axes, text):
    with pytest.raises(ValueError, match=text): grid(Toy(), **axes)


def test_a_dotted_name_changes_one_entry_and_not_the_base():
    base = Toy(args={"x": 1, "y": 2})
    assert grid(base, 1, t={"z": {"args.x": 5}})[0].args == {"x": 5, "y": 2} and base.args == {"x": 1, "y": 2}


# runs

def test_runs_are_done_once_with_one_thread_each_and_read_back(tmp_path, monkeypatch):
    g = grid(Toy(), seeds=2, method=METHODS)
    rows = run_grid(g + g, store=tmp_path, jobs=2, device="cpu", runner=toy_run, progress=False)
    assert rows["method"].tolist() == list("AABB") * 2 and set(rows["threads"]) == {1}
    assert os.getpid() not in set(rows["pid"]) and set(tries(tmp_path).values()) == {1}
    assert list(rows.columns[:3]) == ["method", "loss", "args"] and rows["error"].eq("").all()
    # a second call must start nothing
    monkeypatch.setattr(workers, "ProcessPoolExecutor", None)
    again = run_grid(g + g, store=tmp_path, jobs=2, device="cpu", runner=toy_run)
    pd.testing.assert_frame_equal(rows, again)


def test_failures_and_dead_workers_are_rows(tmp_path, monkeypatch):
    args = dict(store=tmp_path, device="cpu", runner=toy_run, progress=False)
    g = grid(Toy(), seeds=3, loss=["a", "bad", "dies"])
    rows = run_grid(g, jobs=2, on_error="keep", **args)
    failed = rows[rows["H-AP"].isna()]
    assert failed[["loss", "seed"]].values.tolist() == [["bad", 1], ["dies", 1]]
    assert "ValueError: loss is NaN at epoch 3" in failed.error.iloc[0] and "died twice" in failed.error.iloc[1]
    # from here on in this process: a fresh one costs seconds
    monkeypatch.setattr(grids, "is_local", lambda cfg, runner: True)
    with pytest.raises(RunError, match="1 of 6 runs failed(.|\n)*loss bad, seed 1: ValueError") as e:
        run_grid(g.where(loss="a") + g.where(loss="bad"), **args)
    assert len(e.value.rows) == 6
    # nothing to go on with
    for on_error in ("raise", "keep"):
        with pytest.raises(RunError, match="^all 1 runs failed(.|\n)*loss is NaN"):
            run_grid([c for c in g.where(loss="bad") if c.seed == 1], on_error=on_error, **args)
    assert not left_workers(), "a worker is left"


def test_force_forgets_older_results(tmp_path, monkeypatch):
    g = grid(Toy(), seeds=1)
    monkeypatch.setattr(grids, "is_local", lambda cfg, runner: True)
    def run():
        run_grid(g, store=tmp_path, device="cpu", runner=toy_run, progress=False)
        return (tmp_path / g[0].key() / "manifest.json").stat().st_mtime_ns
    first = run()
    monkeypatch.setenv("HAPNB_FORCE", str(time.time() + 0.01))
    time.sleep(0.05)
    second = run()
    assert first != second and run() == second


def test_a_damaged_result_is_not_read(tmp_path):
    (tmp_path / "k").mkdir()
    write_atomic(tmp_path / "k/metrics.json", '{"H-AP": 0.3}')
    assert read_run(tmp_path, "k") is None, "a folder without manifest is not finished"
    write_manifest(tmp_path / "k")
    assert read_run(tmp_path, "k") == {"H-AP": 0.3}
    for damaged in ('{"H-AP": 0.4}', '{"H-AP": 0.', "", "[1]"):
        write_atomic(tmp_path / "k/metrics.json", damaged)
        with pytest.warns(RuntimeWarning, match="metrics.json is damaged"): assert read_run(tmp_path, "k") is None
    for damaged in ("{}", "", "[" * 100_000, '{"files": {"metrics.json": 1}}'):
        write_atomic(tmp_path / "k/manifest.json", damaged)
        with pytest.warns(RuntimeWarning, match="manifest.json"): assert read_run(tmp_path, "k") is None


def test_wrong_stores_and_empty_grids_are_found_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"): run_grid([Toy()], store=tmp_path / "file", device="cpu", runner=toy_run)
    with pytest.raises(ValueError, match="empty"): run_grid([])
    with pytest.raises(ValueError, match="on_error"): run_grid([Toy()], on_error="ignore")


def test_real_runs(tmp_path):
    base = RunConfig(dataset="toy", image_size=32, epochs=1, batch_size=24, embed_dim=8)
    rows = run_grid(grid(base, 1, loss=["SupAPLoss"]), store=tmp_path, jobs=1, device="cpu", progress=False)
    assert 0 < rows["H-AP"][0] <= 1
