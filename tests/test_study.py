"""Studies: grids, statistics against scipy, the pool and its failures, tables, claims, and the notebook driver's faults."""
import io, json, os, signal, subprocess, sys, time, zlib
from pathlib import Path

import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from hypothesis import given, strategies as st
from scipy import stats

from hapnb import grids, measure, study, tables, workers as pool
from hapnb.helpers import write_atomic, write_manifest
from hapnb.tables import Claim, claim_better, make_table, made_by, save_claims, save_figure, save_table, write_claims
from hapnb.grids import Grid, RunError, grid, read_run, run_grid
from hapnb.study import (
    StudyFailed, WrongUse, begin, check_parameters, find_studies, pick_studies, profile_settings, run_study)
from hapnb.statistics import holm, interval, paired_test, summarise
from toy_study import PARAMETERS, Toy, toy_gpu, toy_look, toy_run, write_study

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"A": {"loss": "a"}, "B": {"loss": "b", "args": {"x": 1}}}


def toy_rows(groups, **more):
    return pd.DataFrame([dict(method=m, seed=s, score=v, **more) for m, vs in groups.items() for s, v in enumerate(vs)])


# grids

def test_grid_is_the_product_with_labels_and_seeds_innermost():
    g = grid(Toy(), seeds=2, method=METHODS, batch_size=[8, 16])
    assert [(l["method"], c.batch_size, c.seed) for c, l in zip(g, g.labels)] == [(m, b, s) for m in "AB" for b in (8, 16) for s in (0, 1)]
    assert grid(Toy(), seeds=[7])[0].seed == 7


def test_grids_join_and_select():
    g = grid(Toy(), seeds=1, method={"A": {}}) + grid(Toy(), seeds=1, method={"C": {"batch_size": 4}})
    assert [l["method"] for l in g.labels] == ["A", "C"] and g.where(method="C")[0].batch_size == 4
    g += [Toy(seed=9)]
    assert len(g.labels) == len(g) == 3 and not Grid()


@pytest.mark.parametrize("axes, text", [({"bach_size": [1]}, "Did you mean 'batch_size'"), ({"batch_size": 3}, "must be a list"),
                                        ({"m": {"x": {"los": "a"}}}, "Did you mean 'loss'"), ({"loss": "ab"}, "must be a list")])
def test_wrong_axes(axes, text):
    with pytest.raises(ValueError, match=text): grid(Toy(), **axes)


def test_a_dotted_name_changes_one_entry_and_not_the_base():
    base = Toy(args={"x": 1, "y": 2})
    assert grid(base, 1, t={"z": {"args.x": 5}})[0].args == {"x": 5, "y": 2} and base.args == {"x": 1, "y": 2}


# statistics

@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.sampled_from([0.9, 0.95, 0.99]))
def test_interval_is_scipys(x, level):
    i = interval(x, level)
    low, high = stats.t.interval(level, len(x) - 1, np.mean(x), stats.sem(x)) if np.ptp(x) > 0 else (x[0], x[0])
    np.testing.assert_allclose([i.mean - i.half, i.mean + i.half], [low, high], atol=1e-9)


def test_interval_of_few_and_bad_values():
    assert np.isnan(interval([3.0]).half) and interval([3.0]).mean == 3.0 and interval([]).n == 0
    assert "no interval" in str(interval([3.0]))
    with pytest.raises(ValueError, match=r"values \[1\] of 2"): interval([1, np.nan])


def test_holm_by_hand_and_monotone():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, np.nan]), [0.03, 0.06, 0.06, np.nan])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1.0, 1.0])


@given(st.integers(2, 8), st.integers(0, 1000))
def test_paired_test_is_scipys(n, seed):
    r = np.random.default_rng(seed)
    g = {m: r.normal(size=n) for m in "abc"}
    t = paired_test(toy_rows(g).sample(frac=1, random_state=seed), "score", "method", "a").set_index("group")
    p = {m: stats.ttest_rel(g[m], g["a"]) for m in "bc"}
    np.testing.assert_allclose([t.p[m] for m in "bc"], [p[m].pvalue for m in "bc"], rtol=1e-9)
    ci = p["b"].confidence_interval()
    np.testing.assert_allclose([t.low["b"], t.high["b"]], ci, rtol=1e-9)
    np.testing.assert_allclose(t.p_holm[list("bc")], holm([p[m].pvalue for m in "bc"]), rtol=1e-9)


def test_paired_test_uses_common_seeds_and_says_what_is_wrong():
    rows = toy_rows({"a": [1., 2., 3.], "b": [2., 3.5]})
    assert paired_test(rows, "score", "method", "a").n[0] == 2
    assert paired_test(rows[rows.seed == 0], "score", "method", "a").verdict[0] == "one seed: not tested"
    with pytest.raises(ValueError, match="Did you mean 'score'"): paired_test(rows, "scor", "method", "a")
    with pytest.raises(ValueError, match="unknown baseline"): paired_test(rows, "score", "method", "z")
    with pytest.raises(ValueError, match="something else varies"): paired_test(pd.concat([rows, rows]), "score", "method", "a")
    with pytest.raises(ValueError, match="share no seed"): paired_test(rows[(rows.method == "a") == (rows.seed == 0)], "score", "method", "a")


def test_a_setting_whose_runs_all_failed_is_not_tested_and_the_others_are_kept():
    rows = toy_rows({"a": [1., 2., 3.], "b": [np.nan] * 3, "c": [2., np.nan, 4.]})
    t = paired_test(rows, "score", "method", "a").set_index("group")
    assert t.n.to_dict() == {"b": 0, "c": 2} and t.verdict["b"] == "failed: not tested" and t.difference["c"] == 1
    assert paired_test(rows, "score", "method", "b").verdict.tolist() == ["failed: not tested"] * 2
    judge = lambda *pair: claim_better("P", "x", "score", rows, "score", "method", *pair)
    for pair in (("a", "b"), ("b", "a")): assert (judge(*pair).verdict, judge(*pair).value) == ("not tested here", "method b: 3 of 3 runs failed")
    assert judge("c", "a").value.endswith("(2 seeds); method c: 1 of 3 runs failed")
    with pytest.raises(ValueError, match="unknown setting of column 'method': 'z'"): judge("z", "a")


def test_equal_scores_are_not_a_difference():
    t = paired_test(toy_rows({"a": [1., 2.], "b": [1., 2.], "c": [2., 3.]}), "score", "method", "a")
    assert list(t.p) == [1.0, 0.0] and list(t.verdict) == ["not distinguishable", "better"]


def test_summarise_counts_failures():
    s = summarise(toy_rows({"b": [1., np.nan, 3.], "a": [np.nan]}), "method", "score")
    assert s["method"].tolist() == ["b", "a"] and s["n"].tolist() == [2, 0] and s["failed"].tolist() == [1, 1] and s["mean"][0] == 2


# runs

def tries(store): return {p.name: len(list(p.glob("try-*"))) for p in Path(store).iterdir() if p.is_dir()}


def started(p):
    "Whether `run_grid` started this process: a worker, or the server that workers are forked from."
    try: return any(w in " ".join(p.cmdline()) for w in ("spawn_main", "forkserver"))
    except psutil.Error: return False


def workers():
    "Workers of this process; the server stays, and has no children when they are gone."
    found = [c for c in psutil.Process().children(recursive=True) if started(c)]
    return [c for c in found if "spawn_main" in " ".join(c.cmdline()) or c.ppid() != os.getpid()]


def test_pool_runs_once_one_thread_each_and_reads_back(tmp_path, monkeypatch):
    g = grid(Toy(), seeds=2, method=METHODS)
    rows = run_grid(g + g, store=tmp_path, jobs=2, device="cpu", runner=toy_run, progress=False)
    assert rows["method"].tolist() == list("AABB") * 2 and set(rows["threads"]) == {1} and os.getpid() not in set(rows["pid"])
    assert set(tries(tmp_path).values()) == {1}
    assert list(rows.columns[:3]) == ["method", "loss", "args"] and rows["error"].eq("").all()
    monkeypatch.setattr(pool, "ProcessPoolExecutor", None)  # a second call must start nothing
    again = run_grid(g + g, store=tmp_path, jobs=2, device="cpu", runner=toy_run)
    pd.testing.assert_frame_equal(rows, again)


def test_workers_see_the_environment_and_the_modules_of_their_parent(tmp_path, monkeypatch):
    import hapnb
    for n, word in enumerate(("one", "three")):  # the server was started before, with neither
        monkeypatch.setenv("HAPNB_SEEN", word)
        rows = run_grid(grid(Toy(args={"x": n}), seeds=2), store=tmp_path, jobs=2, device="cpu", runner=toy_look, progress=False)
        assert rows["seen"].eq(len(word)).all() and rows["threads"].eq(1).all() and rows["code"].eq(zlib.crc32(hapnb.__file__.encode())).all()
        forked = pool._worker_context(torch.device("cpu")).get_start_method() == "forkserver"
        assert rows["prepared"].eq(int(forked)).all() and (not forked or rows["server_threads"].eq(1).all()), "a worker began from nothing, or a process with threads was forked"


@pytest.mark.skipif(sys.platform != "linux" or sys.version_info < (3, 11), reason="workers start from nothing")
def test_workers_are_not_forked_from_an_old_server(tmp_path, monkeypatch):
    def method(device="cpu"): return pool._worker_context(torch.device(device)).get_start_method()
    monkeypatch.setattr(pool, "_SERVER", {})
    assert (method(), method("cuda"), method()) == ("forkserver", "spawn", "forkserver")
    monkeypatch.setenv("HAPNB_SEEN", "read when it is needed")
    assert method() == "forkserver"
    with monkeypatch.context() as m:
        m.setenv("HF_HOME", str(tmp_path))
        assert method() == "spawn", "a library reads the variable while it is imported"
    assert method() == "forkserver"
    file = Path(pool.__file__)
    seen = file.stat()
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1000))
    try:
        assert method() == "spawn", "the library was edited"
        rows = run_grid(grid(Toy(args={"x": 7}), seeds=1), store=tmp_path, jobs=1, device="cpu", runner=toy_look, progress=False)
        assert rows["prepared"].eq(0).all() and rows["seen"].eq(22).all() and rows["threads"].eq(1).all()
    finally: os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))


@pytest.mark.skipif(sys.platform != "linux" or sys.version_info < (3, 11), reason="workers start from nothing")
@pytest.mark.parametrize("error", [EOFError, ConnectionRefusedError])
def test_a_server_that_died_costs_time_only(tmp_path, monkeypatch, error):
    submit, methods = pool.ProcessPoolExecutor.submit, []
    def first_fails(self, *args):
        methods.append(self._mp_context.get_start_method())
        if len(methods) == 1: raise error
        return submit(self, *args)
    monkeypatch.setattr(pool, "_SERVER", {})
    monkeypatch.setattr(pool.ProcessPoolExecutor, "submit", first_fails)
    rows = run_grid(grid(Toy(), seeds=2), store=tmp_path, jobs=1, device="cpu", runner=toy_run, progress=False)
    assert rows["H-AP"].tolist() == [0.3, 0.31] and methods == ["forkserver", "spawn", "spawn"] and set(tries(tmp_path).values()) == {1}


def test_failures_and_dead_workers_are_rows(tmp_path, monkeypatch):
    g = grid(Toy(), seeds=3, loss=["a", "bad", "dies"])
    rows = run_grid(g, store=tmp_path, jobs=2, device="cpu", runner=toy_run, progress=False, on_error="keep")
    failed = rows[rows["H-AP"].isna()]
    assert failed[["loss", "seed"]].values.tolist() == [["bad", 1], ["dies", 1]]
    assert "ValueError: loss is NaN at epoch 3" in failed.error.iloc[0] and "died twice" in failed.error.iloc[1]
    monkeypatch.setattr(grids, "is_local", lambda cfg, runner: True)  # here: a fresh process costs seconds
    with pytest.raises(RunError, match="1 of 6 runs failed(.|\n)*loss bad, seed 1: ValueError") as e:
        run_grid(g.where(loss="a") + g.where(loss="bad"), store=tmp_path, device="cpu", runner=toy_run, progress=False)
    assert len(e.value.rows) == 6
    for on_error in ("raise", "keep"):  # nothing to go on with
        with pytest.raises(RunError, match="^all 1 runs failed(.|\n)*loss is NaN") as e:
            run_grid([c for c in g.where(loss="bad") if c.seed == 1], store=tmp_path, device="cpu", runner=toy_run, progress=False, on_error=on_error)
    assert not workers(), "a worker is left"


def test_gpus_are_shared_by_any_number_of_workers_and_restarts(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    tasks = {k: (k,) for k in range(9)} | {"dies": ("dies",)}
    found = {}
    # more workers than GPUs, and workers that die twice: each generation begins at the first GPU again
    for o in pool.Workers(toy_gpu, tasks, 3, torch.device("cuda")):
        if o: found[o.key] = o
    assert "died twice" in found.pop("dies").error
    assert {o.value for o in found.values()} <= {"5", "7"} and all(o.error is None for o in found.values()) and len(found) == 9


def test_one_named_gpu_is_the_only_one_that_workers_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    found = [o.value for o in pool.Workers(toy_gpu, {0: (0,), 1: (1,)}, 2, torch.device("cuda:1")) if o]
    assert found == ["7", "7"]


def test_killed_and_started_again(tmp_path, monkeypatch):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    trap = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
    write_atomic(trap / "hapnb/__init__.py", "open('read', 'w')")  # where the command is typed lies another package of that name
    p = subprocess.Popen([sys.executable, str(ROOT / "tests/toy_study.py"), str(tmp_path)], env=env, cwd=trap, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if list(tmp_path.glob("*/try-*")): break
        time.sleep(0.1)
    family = [c for c in psutil.Process(p.pid).children(recursive=True)]
    assert sum(map(started, family)) >= 2
    p.send_signal(signal.SIGKILL)
    p.wait()
    gone, alive = psutil.wait_procs(family, timeout=15)
    assert not [w for w in alive if started(w)], "workers outlive the study that was killed"
    assert not (trap / "read").exists(), "the server of workers imported another package"
    monkeypatch.setattr(grids, "is_local", lambda cfg, runner: True)
    rows = run_grid(grid(Toy(), seeds=4), store=tmp_path, device="cpu", runner=toy_run, progress=False)
    assert rows["H-AP"].tolist() == [0.3 + 0.01 * s for s in range(4)]


def test_force_forgets_older_results(tmp_path, monkeypatch):
    g = grid(Toy(), seeds=1)
    monkeypatch.setattr(grids, "is_local", lambda cfg, runner: True)
    run = lambda: run_grid(g, store=tmp_path, device="cpu", runner=toy_run, progress=False) is not None and (tmp_path / g[0].key() / "manifest.json").stat().st_mtime_ns
    first = run()
    monkeypatch.setenv("HAPNB_FORCE", str(time.time() + 0.01))
    time.sleep(0.05)
    second = run()
    assert first != second and run() == second


def test_damaged_result_and_unwritable_store(tmp_path):
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
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"): run_grid([Toy()], store=tmp_path / "file", device="cpu", runner=toy_run)
    with pytest.raises(ValueError, match="empty"): run_grid([])
    with pytest.raises(ValueError, match="on_error"): run_grid([Toy()], on_error="ignore")


def test_real_runs(tmp_path):
    from hapnb.config import RunConfig
    base = RunConfig(dataset="toy", image_size=32, epochs=1, batch_size=24, embed_dim=8)
    rows = run_grid(grid(base, 1, loss=["SupAPLoss"]), store=tmp_path, jobs=1, device="cpu", progress=False)
    assert 0 < rows["H-AP"][0] <= 1
    line = made_by("smoke", "toy", 1, "cpu", tmp_path, rows["key"])
    assert "profile smoke; data toy; 1 seeds; commit " in line and "torch 2." in line


# tables

@pytest.fixture
def table():
    rows = toy_rows({"a": [.30, .31, .32], "b_1": [.41, .42, .44], "c|d": [.40, .43, .43], "e": [.2, np.nan, np.nan]}).assign(loss=lambda r: -r.score)
    return make_table(rows, "method", {"score": "Score %", "loss": "loss"}, published={"a": {"score": 59.4}}, caption="A & B", footer="made by x_y")


def test_table_marks_the_best_and_the_undecided(table):
    marks = {r[0]: c.mark for (r, column), c in table.cells.items() if column == "score"}
    assert marks == {"a": "", "b_1": "best", "c|d": "tie", "e": ""}  # "e" has one seed: not tested
    rows = toy_rows({"a": [.30, .31, .32], "b": [.41, .42, .44], "c": [.40, .43, .43]})
    marks = {r[0]: c.mark for (r, _), c in make_table(rows, "method", "score").cells.items()}
    assert marks == {"a": "", "b": "best", "c": "tie"}
    marks = {r[0]: c.mark for (r, _), c in make_table(rows, "method", "score", lower=("score",)).cells.items()}
    assert marks["a"] == "best"


def test_markdown(table):
    text = table.to_markdown()
    assert text == table._repr_markdown_() and "| a | 31.0 ± 2.5 |" in text and "c\\|d" in text and "made by x_y" in text
    assert "20.0 (2 failed)" in text and "Score % (published)" in text and "59.4" in text and "not measured here" in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_csv_reads_back(table):
    frame = pd.read_csv(io.StringIO(table.to_csv()))
    assert frame["score"].tolist() == [31.0, 42.3333, 42.0, 20.0] and frame["score seeds"].tolist() == [3, 3, 3, 1]
    assert frame["score published"][0] == 59.4 and frame["made_by"].eq("made by x_y").all()


def test_latex(table):
    text = table.to_latex()
    assert r"b\_1" in text and r"Score \%" in text and r"\caption{A \& B}" in text and r"\textbf{42.3 $\pm$ 3.8}" in text
    body = [l for l in text.splitlines() if l.endswith(r"\\")]
    assert {l.replace(r"\&", "").count("&") for l in body} == {3} and text.count("{") == text.count("}")


def test_columns_spread_one_metric():
    rows = pd.concat([toy_rows({"a": [.3, .31], "b": [.4, .42]}, batch=b) for b in (16, 64)])
    t = make_table(rows, "method", "score", columns="batch", digits=2)
    assert "| method | batch 16 | batch 64 |" in t.to_markdown() and t.cells[("b",), 64].mark == "best"
    with pytest.raises(ValueError, match="spreads one metric"): make_table(rows, "method", ["score", "seed"], columns="batch")


def test_saving_is_deterministic_and_atomic(tmp_path, table):
    fig, ax = plt.subplots()
    ax.plot([1, 2]), ax.legend(["x"])
    files = save_figure(fig, tmp_path / "new", "f") + save_table(table, tmp_path / "new")
    first = [Path(p).read_bytes() for p in files]
    time.sleep(1.1)
    assert first == [Path(p).read_bytes() for p in save_figure(fig, tmp_path / "new", "f") + save_table(table, tmp_path / "new")]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["f.png", "f.svg", "main.csv", "main.md", "main.tex"]
    plt.close(fig)


# claims and profiles

def test_claims(tmp_path):
    rows = toy_rows({"a": [.30, .31, .32], "b": [.41, .42, .44], "c": [.29, .33, .31]})
    good = claim_better("P", "b beats a", "score", rows, "score", "method", "b", "a")
    weak = claim_better("P", "c beats a", "score", rows, "score", "method", "c", "a")
    one = claim_better("P", "b beats a", "score", rows[rows.seed == 0], "score", "method", "b", "a")
    assert [c.verdict for c in (good, weak, one)] == ["supported", "not supported", "not tested here"]
    save_claims([good, weak], tmp_path / "20_x")
    save_claims([one, Claim("Q", "a|b", "m")], tmp_path / "10_y")
    text = write_claims(tmp_path).read_text()
    assert "4 claims: 1 supported, 1 not supported, 2 not tested here" in text and text.index("10_y") < text.index("20_x") and "a\\|b" in text
    with pytest.raises(ValueError, match="Did you mean 'supported'"): Claim("P", "c", "m", verdict="suported")


@pytest.mark.parametrize("low, high, margin, printed, verdict", [
    (.0003, .0021, 0., "+0.03 to +0.21", "supported"), (.00004, .0021, 0., "+0.004 to +0.210", "supported"), (.0006, .0021, 0., "+0.1 to +0.2", "supported"), (-.0003, .0021, 0., "-0.0 to +0.2", "not supported"),
    (-.0096, .02, -.01, "-0.96 to +2.00", "supported"), (-.0104, .02, -.01, "-1.0 to +2.0", "not supported"), (.0096, .02, .01, "+1.0 to +2.0", "not supported"), (.0104, .02, .01, "+1.04 to +2.00", "supported"),
    (-.004, -.0003, 0., "-0.40 to -0.03", "not supported"), (-.004, .0003, 0., "-0.4 to +0.0", "not supported"), (-.03, -.0103, -.01, "-3.00 to -1.03", "not supported")])
def test_the_printed_interval_tells_the_verdict(low, high, margin, printed, verdict):
    "As many decimals as it takes to see on which side of the edge a bound lies, and one where that is enough."
    half = (high - low) / 2  # of four seeds: t(0.975, 3) = 3.1824, so a spread of s gives 3.1824 s / 2
    d = np.array([-1., -1, 1, 1]) * half * 2 / 3.182446305284263 / (4 / 3) ** .5 + (low + high) / 2
    rows = toy_rows({"a": [.5] * 4, "b": (.5 + d).tolist()})
    c = claim_better("P", "b beats a", "score", rows, "score", "method", "b", "a", margin=margin)
    assert f"interval {printed} (4 seeds)" in c.value and c.verdict == verdict
    assert c.value.endswith("; the opposite") == (high < min(margin, 0))


def test_profiles_and_places(tmp_path, monkeypatch):
    assert profile_settings("full", full=dict(epochs=7))["epochs"] == 7 and profile_settings("quick", full=dict(epochs=7))["epochs"] != 7
    for wrong in (lambda: profile_settings("ful"), lambda: profile_settings("full", ful={}), lambda: profile_settings("always")):
        with pytest.raises(ValueError, match="unknown profile"): wrong()
    assert study.figures_dir("full") == ROOT / "figures" and study.figures_dir("quick") == ROOT / "runs/figures/quick"
    assert study.figures_dir("full", "folder", tmp_path) == tmp_path / "figures/full-folder"
    s = begin("10_x", profile="smoke", seeds=4, store=str(tmp_path), dataset="toy")
    assert s.seeds == 4 and s.out.is_dir() and s.config(lr=0.5).lr == 0.5 and s.config().dataset == "toy"
    with pytest.raises(ValueError, match="unknown field"): s.config(learning_rate=1)


# the driver

def test_runs_with_types_and_keeps_the_notebook(tmp_path, capfd):
    nb = write_study(tmp_path / "a {b}/10_x.ipynb", cells=["print(seeds, lr * 10, flag, store)", "import os; print(os.getcwd())", ""])
    lines = []
    done = run_study(nb, tmp_path / "store", {"lr": "1e-4", "flag": "true", "seeds": "3"}, say=lines.append)
    assert lines == ["3 0.001 True runs", str(nb.parent)] and done == tmp_path / "store/notebooks/10_x.ipynb" and done.exists()
    assert "TCP without encryption" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("given, text", [({"sedes": 1}, "Did you mean 'seeds'"), ({"seeds": 1.5}, "must be int"), ({"seeds": True}, "must be int"),
    ({"seeds": "007x"}, "must be int"), ({"lr": "fast"}, "must be float"), ({"flag": "maybe"}, "must be bool"), ({"store": 7}, "must be str"), ({"lr": None}, "must be float")])
def test_wrong_parameters(tmp_path, given, text):
    with pytest.raises(WrongUse, match=text): run_study(write_study(tmp_path / "x.ipynb"), tmp_path, given)


@pytest.mark.parametrize("source, tags, text", [(None, (), "0 cells tagged"), (PARAMETERS, (), "allowed_cell_metadata_keys"), ("a=1; b=2", ("parameters",), "one `name: type"),
    ("x: str|None = None", ("parameters",), "cannot read this annotation"), ("x = 1 + n", ("parameters",), "plain value"), ("import os", ("parameters",), "one `name: type"),
    ("%matplotlib inline", ("parameters",), "no %magic")])
def test_wrong_parameters_cells(tmp_path, source, tags, text):
    with pytest.raises(WrongUse, match=text): run_study(write_study(tmp_path / "x.ipynb", source, tags=tags), tmp_path, {})


def test_two_tags_and_broken_files(tmp_path):
    nb = json.loads(write_study(tmp_path / "x.ipynb").read_text())
    nb["cells"].append({**nb["cells"][1], "id": "again"})
    (tmp_path / "x.ipynb").write_text(json.dumps(nb))
    with pytest.raises(WrongUse, match="2 cells tagged"): check_parameters(tmp_path / "x.ipynb", {})
    (tmp_path / "y.ipynb").write_text("{")
    with pytest.raises(WrongUse, match="not a readable notebook"): check_parameters(tmp_path / "y.ipynb", {})


def test_plain_and_annotated_parameters_agree_with_papermill(tmp_path):
    import papermill
    nb = write_study(tmp_path / "x.ipynb", "a = 1  # plain\nb: float = 2  # annotated\n\n# a comment\nc: str = 'x;y#z'  # with signs\nd: list = [1]  # list")
    assert set(papermill.inspect_notebook(str(nb))) == set(study.declared_parameters(nb)) == set("abcd")
    assert check_parameters(nb, {"a": "7", "d": "[1, 2]"}) == {"a": 7, "d": [1, 2]}


@pytest.mark.parametrize("cell, text", [("1/0", r"code cell 4 \(failed\): ZeroDivisionError"), ("import sys; sys.exit(0)", "code cell 4")])
def test_failures_name_notebook_and_cell(tmp_path, cell, text):
    nb = write_study(tmp_path / "x.ipynb", cells=["a = 1", cell, "b = 2"], kernel="hapnb-env")  # a kernel that nobody has: ours is used
    with pytest.raises(StudyFailed, match=text) as e: run_study(nb, tmp_path / "s", {"seeds": 1}, say=None)
    assert e.value.notebook.exists() and e.value.cell == 4 and str(e.value.notebook) in str(e.value)


def test_a_dead_kernel_is_tried_once_more(tmp_path):
    mark = tmp_path / "mark"
    die = f"import os, pathlib, signal\nm = pathlib.Path({str(mark)!r})\nn = len(m.read_text()) if m.exists() else 0\nm.write_text('x' * (n + 1))\nif n < seeds: os.kill(os.getpid(), signal.SIGKILL)"
    nb, lines = write_study(tmp_path / "x.ipynb", cells=[die]), []
    run_study(nb, tmp_path, {"seeds": 1}, say=lines.append)
    assert mark.read_text() == "xx" and "trying once more" in lines[0]
    mark.unlink()
    with pytest.raises(StudyFailed, match="died twice"): run_study(nb, tmp_path, {"seeds": 9}, say=None)


def test_finding_studies(tmp_path):
    for name in ("20_batch_size", "10_benchmark", "_hidden"): write_study(tmp_path / f"nbs/studies/{name}.ipynb")
    assert [s.name for s in find_studies(tmp_path)] == ["10_benchmark", "20_batch_size"]
    assert find_studies(tmp_path)[0].minutes == {"smoke": 0.1, "quick": 2.0} and find_studies(tmp_path)[0].summary == "Shows that it works."
    for name in ("10", "benchmark", "10_benchmark", "nbs/studies/10_benchmark.ipynb"): assert [s.name for s in pick_studies([name], tmp_path)] == ["10_benchmark"]
    assert len(pick_studies((), tmp_path)) == 2
    with pytest.raises(WrongUse, match="Did you mean 'benchmark'"): pick_studies(["benchmrk"], tmp_path)


def test_once_and_figure_once(tmp_path, monkeypatch):
    s, calls = begin("10_x", profile="smoke", store=str(tmp_path), dataset="toy"), []
    frame = lambda: calls.append("f") or pd.DataFrame({"x": [0.1, 0.2]}, index=[5, 7])
    draw = lambda: calls.append("d") or plt.figure(figsize=(2, 1))
    assert s.once("v", lambda: calls.append("v") or {"a": 0.1}, 1) == s.once("v", None, 1) == {"a": 0.1}
    pd.testing.assert_frame_equal(s.once("f", frame, ["k"]), s.once("f", None, ["k"]))
    first = s.figure_once("map", draw, ["k"]).data
    assert s.figure_once("map", None, ["k"]).data == first and (s.out / "map.svg").exists() and calls == ["v", "f", "d"]
    (s.out / "map.png").unlink()
    s.figure_once("map", None, ["k"])
    assert (s.out / "map.png").exists()
    s.once("f", frame, ["other"])
    monkeypatch.setattr(study, "_code_hash", lambda: "new")
    s.once("f", frame, ["k"])
    assert calls == ["v", "f", "d", "f", "f"]


def test_a_table_survives_methods_without_common_seeds():
    rows = pd.DataFrame([dict(method=m, seed=s, score=v) for m, s, v in [("a", 0, .9), ("a", 1, .8), ("b", 2, .1), ("b", 3, .2), ("c", 0, .5), ("c", 1, .6)]])
    cells = make_table(rows, "method", "score").cells
    assert cells[("a",), "score"].mark == "best" and cells[("b",), "score"].n == 2 and cells[("b",), "score"].mark == ""


# measuring

def fake_clock(monkeypatch, costs):
    "Make `time.perf_counter` advance by what the called function costs; returns the functions and the order of the calls."
    clock, calls = [0.], []
    def work(name):
        calls.append(name)
        clock[0] += costs[name]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    return {n: (lambda n=n: work(n)) for n in costs}, calls


def test_time_pairs_runs_rounds_in_random_but_repeatable_order(monkeypatch):
    functions, calls = fake_clock(monkeypatch, dict(a=.5, b=.25, c=2.))
    t = measure.time_pairs(functions, repeats=6, warmup=2, seed=1)
    assert calls[:6] == list("abcabc") and len(t) == 18, "warm-up calls are made and not counted"
    orders = ["".join(p.sort_values("place")["name"]) for _, p in t.groupby("round")]
    assert calls[6:] == list("".join(orders)) and {"".join(sorted(o)) for o in orders} == {"abc"} and len(set(orders)) > 1
    assert t.set_index("name")["seconds"].groupby(level=0).unique().map(list).to_dict() == dict(a=[.5], b=[.25], c=[2.])
    again = measure.time_pairs(fake_clock(monkeypatch, dict(a=.5, b=.25, c=2.))[0], repeats=6, warmup=2, seed=1)
    pd.testing.assert_frame_equal(t, again)
    with pytest.raises(ValueError, match="nothing to time"): measure.time_pairs({})
    with pytest.raises(ValueError, match="nothing to time"): measure.time_pairs(functions, repeats=0)


def test_time_pairs_drops_who_has_used_the_budget_and_restores_the_collector(monkeypatch):
    import gc
    functions, _ = fake_clock(monkeypatch, dict(quick=.1, slow=4.))
    assert measure.time_pairs(functions, repeats=8, budget=9., least=2)["name"].value_counts().to_dict() == dict(quick=8, slow=3)
    assert measure.time_pairs(functions, repeats=8, budget=1., least=5)["name"].value_counts().to_dict() == dict(quick=8, slow=5)
    def fails(): raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"): measure.time_pairs(dict(fails=fails), warmup=0)
    assert gc.isenabled()


def test_compare_times_takes_ratios_within_rounds():
    rows = [("a", 0, 1.), ("b", 0, 10.), ("a", 1, 4.), ("b", 1, 20.), ("a", 2, 2.), ("a", 3, 3.), ("b", 3, 3.)]
    t = study.compare_times(pd.DataFrame(rows, columns=["name", "round", "seconds"]), "a")
    assert t.loc["b"].to_dict() == dict(median=10., low=3., high=20., ratio=5., ratio_low=1., ratio_high=10., n=3)
    assert t.loc["a", ["ratio", "ratio_low", "ratio_high"]].tolist() == [1., 1., 1.] and t.loc["a", "n"] == 4
    plain = study.compare_times(pd.DataFrame(rows, columns=["name", "round", "seconds"]))
    assert list(plain) == ["median", "low", "high", "n"] and list(plain.index) == ["a", "b"]
    with pytest.raises(ValueError, match="Did you mean 'alpha'"): study.compare_times(pd.DataFrame([("alpha", 0, 1.)], columns=["name", "round", "seconds"]), "alhpa")


@pytest.mark.parametrize("n", [1000, 300_000])
def test_peak_memory_is_exact(n):
    import torch
    held = torch.ones(n)  # what was there before does not count
    def f():
        a = held * 2
        b = a + a  # two at once
        del a
        c = b.sum()
        return b[:10].clone(), c
    assert 8 * n <= study.peak_memory(f) < 8 * n + 200
    leaf = torch.ones(n, requires_grad=True)
    def backward(): torch.autograd.grad(leaf.square().sum(), leaf)  # the square, then the gradient: filled (as a view) and multiplied by 2
    assert 4 * n <= study.peak_memory(backward) <= 12 * n + 200
    assert study.peak_memory(lambda: None) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")
def test_peak_resident_sees_the_peak_and_forgets_the_past():
    big = np.ones(40_000_000)  # 320 MB that are gone before
    del big
    def f():
        x = np.ones(20_000_000)
        del x
    for _ in range(2): assert 155e6 < study.peak_resident(f) < 180e6
    assert study.peak_resident(lambda: None) < 5e6


def test_peak_resident_elsewhere(monkeypatch):
    def refuse(self, *args): raise PermissionError(self)
    monkeypatch.setattr(Path, "write_text", refuse)
    calls = []
    assert study.peak_resident(lambda: calls.append(1)) is None and calls == [1]


def test_measured_frames_are_saved_with_the_machine(tmp_path):
    s = begin("90_x", profile="smoke", store=str(tmp_path), dataset="toy")
    frame = pd.DataFrame({"method": ["cube"], "ms": [123456.7], "ratio": [np.nan], "bytes": [1234567], "met": [False]})
    text = s.measured(frame, "times", "A caption.", ["A note."]).data
    assert "| cube | 123,457 | - | 1,234,567 | no |" in text and "A note.  \n" in text and study.machine() in text and text.startswith("A caption.\n\n| method |")
    assert (s.out / "times.md").read_text() == text
    back = pd.read_csv(s.out / "times.csv")
    assert back["ms"][0] == 123457 and study.machine() in back["made_by"][0] and "profile smoke" in back["made_by"][0]
    assert all(w in study.machine() for w in ("cores", "threads", "torch 2."))


def test_a_study_of_time_starts_no_server_and_says_what_else_ran(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(study, "_worker_context", started.append)
    for alone in (True, False):
        begin("90_x", profile="smoke", store=str(tmp_path), dataset="toy", alone=alone)
        assert len(started) == (not alone)
    for busy, end in ((10.4, "used 10 % of the processor."), (50., "used 50 % of the processor: too much for timings that mean something.")):
        monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: busy)
        assert measure.others_load().endswith(end)


def test_studies_on_demand_run_only_when_named(tmp_path):
    write_study(tmp_path / "nbs/studies/10_benchmark.ipynb")
    nb = json.loads(write_study(tmp_path / "nbs/studies/90_speed.ipynb").read_text())
    nb["cells"][0]["source"] = ["# Speed\n", "\n", "> How fast.\n", "\n", "On demand: name it.\n", "Expected time on 2 cores: quick 4 min."]
    (tmp_path / "nbs/studies/90_speed.ipynb").write_text(json.dumps(nb))
    assert [(s.name, s.on_demand) for s in find_studies(tmp_path)] == [("10_benchmark", False), ("90_speed", True)]
    assert [s.name for s in pick_studies((), tmp_path)] == ["10_benchmark"]
    assert [s.name for s in pick_studies(["speed", "10"], tmp_path)] == ["90_speed", "10_benchmark"]


# equivalence and published results

def settings(groups): return pd.DataFrame([dict(layers=k, seed=s, score=v / 100) for k, vs in groups.items() for s, v in enumerate(vs)])
def alike(rows, **args): return study.claim_equivalent("P", "any depth", "score", rows, "score", "layers", 2, **args)


@given(st.integers(2, 6), st.integers(0, 1000))
def test_equivalence_is_two_one_sided_tests(n, seed):
    r = np.random.default_rng(seed)
    a, b, margin = r.normal(0, .01, n), r.normal(.003, .01, n), .01
    e = study.equivalence(settings({2: 100 * a, 3: 100 * b}), "score", "layers", 2, margin=margin).iloc[1]
    p = [stats.ttest_1samp(b - a, -margin, alternative="greater").pvalue, stats.ttest_1samp(b - a, margin, alternative="less").pvalue]
    assert (e.state == "inside") == (max(p) < .025)
    assert (e.state == "entirely outside") == (stats.ttest_1samp(b - a, margin, alternative="greater").pvalue <= .025 or stats.ttest_1samp(b - a, -margin, alternative="less").pvalue <= .025)


def test_equivalence_of_hand_made_settings():
    c = alike(settings({1: [50.1, 51.2, 52.3], 2: [50, 51, 52], 3: [49.9, 51.0, 52.1]}))
    assert (c.verdict, c.value) == ("supported", "2 of 2 settings inside ±1 points of layers 2; farthest: layers 1, +0.20 points, 95% interval -0.05 to +0.45 (3 seeds)")
    c = alike(settings({1: [50.1, 51.2, 52.3], 2: [50, 51, 52], 5: [47, 48.1, 48.9]}))
    assert c.verdict == "not supported" and c.value.startswith("1 of 2 settings not inside ±1 points of layers 2 (3 seeds): layers 5: -3.00 points, 95% interval -3.25 to -2.75, beyond by 2.25, entirely outside")
    assert "layers 1" not in c.value and "undecided" not in c.value
    c = alike(settings({2: [50, 51, 52], 3: [50.5, 51.9, 52.1]}))
    assert c.verdict == "not supported" and c.value.endswith("undecided: no setting is shown to lie outside")
    assert alike(settings({2: [50, 51, 52], 3: [50.5, 51.9, 52.1]}), margin=.02).verdict == "supported"


def test_a_missing_difference_is_not_an_equivalence():
    rows = settings({2: [50, 53], 3: [52, 51]})
    assert paired_test(rows, "score", "layers", 2).verdict[0] == "not distinguishable" and alike(rows).verdict == "not supported"


def test_entirely_outside_needs_more_with_more_settings():
    one = {2: [50, 51, 52, 53], 9: [51.4, 52.6, 53.3, 54.7]}
    many = one | {k: one[2] for k in range(3, 9)}
    state = lambda g: study.equivalence(settings(g), "score", "layers", 2).set_index("group").state[9]
    assert (state(one), state(many)) == ("entirely outside", "partly outside")


def test_failed_runs_count_against():
    good = {2: [50, 51, 52], 3: [50.1, 51, 52]}
    c = alike(settings(good | {4: [50, np.nan, 52]}))
    assert c.verdict == "not supported" and "layers 4: 1 of 3 runs failed" in c.value
    assert "layers 4: 3 of 3 runs failed" in alike(settings(good | {4: [np.nan] * 3})).value
    c = alike(settings({2: [50, np.nan, 52], 3: [50, 51, 52]}))
    assert c.verdict == "not supported" and "layers 2: 1 of 3 runs failed" in c.value and "(2 seeds)" in c.value
    c = alike(settings({2: [np.nan] * 3, 3: [50, 51, 52]}))
    assert (c.verdict, c.value) == ("not tested here", "layers 2, the reference, has no finished run")


def test_equivalence_of_one_seed_and_wrong_names():
    assert alike(settings({2: [50], 3: [50]})).verdict == "not tested here"
    assert alike(settings({2: [50, 51], 3: [50]})).verdict == "not tested here"
    rows = settings({2: [50, 51], 3: [50, 51], 10: [0, 1]})
    assert alike(rows, others=[3]).verdict == "supported" and alike(rows).verdict == "not supported"
    for bad in (dict(others=[11]), dict(others=[]), dict(margin=0)):
        with pytest.raises(ValueError): alike(rows, **bad)
    with pytest.raises(ValueError, match="unknown setting of column 'layers': 4"): study.equivalence(rows, "score", "layers", 4)
    with pytest.raises(ValueError, match="something else varies"): alike(pd.concat([rows, rows]))


def test_published_rows_are_facts_with_sources():
    p = tables.published()
    assert len(p) == 344 and list(p.columns) == ["paper", "dataset", "backbone", "method", "metric", "value", "source"]
    assert p.notna().all().all() and p["value"].between(0, 100).all() and p["source"].str.len().min() > 10
    assert not p.duplicated(["paper", "dataset", "backbone", "method", "metric"]).any()
    assert not p.map(lambda v: isinstance(v, str) and v != v.strip()).any().any()


@pytest.mark.parametrize("wanted, value", [
    (dict(dataset="CUB-200-2011", backbone="ResNet-50", method="HIST TUNE (Bayesian search)", metric="R@1"), 72.3),
    (dict(dataset="SOP", backbone="BN-Inception", method="HIST RE (reproduced)", metric="NMI"), 89.9),
    (dict(dataset="CARS196", method="HIST, distance Euclidean", metric="R@1"), 87.2),
    (dict(method="HIST embedding 512 hidden 512"), 90.22),
    (dict(method="HIST tau 8 lambda_s 1.5"), 78.63),
    (dict(dataset="SOP", method="HAPPIER_F"), 81.8),
    (dict(dataset="CARS196", backbone="ResNet-50", method="Proxy-Anchor 512-d", metric="R@1"), 87.7),
    (dict(dataset="IMDB (unseen dist.)", metric="NMI"), .953)])
def test_published_values(wanted, value): assert tables.published(**wanted)["value"].tolist() == [value]


def test_published_filters():
    p = tables.published(dataset=["SOP", "CARS196"], metric="R@1")
    assert set(p["dataset"]) == {"SOP", "CARS196"} and set(p["metric"]) == {"R@1"} and list(p.index) == list(range(len(p)))
    assert tables.published(dataset="SOP", method="HIST tau 8 lambda_s 1.5").empty
    with pytest.raises(ValueError, match="Did you mean 'ResNet-50'"): tables.published(backbone="ResNet50")
    p = tables.published()
    p["value"] = 0.  # nobody can spoil the table of the others
    assert tables.published()["value"].gt(0).all()
