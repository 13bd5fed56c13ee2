"""Search: kept on disk, resumed after kill -9, shared by workers, on validation images, the same for the same seed."""
import functools, json, math, multiprocessing, os, shutil, signal, time
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
import torch

from hapnb import trials as U
from hapnb.helpers import UserError
from hapnb.losses import SupAPLoss
from hapnb.runs import Result, is_finished, run
from hapnb.config import RunConfig
from hapnb.train import Trainer
from hapnb.search_plots import plot_contour, plot_history, plot_importance, plot_parallel
from hapnb.space import apply_params, axis, axis_from, span
from hapnb.trials import SearchFolder
from hapnb.tune import Search, search

BASE = RunConfig(dataset="toy", trunk="toy", image_size=32, split="val", embed_dim=16, batch_size=24, epochs=3, lr=0.01,
                 ks=(1, 2), metrics=("R@1", "AP"), loss="SupAPLoss", loss_args={"tau": 0.01}, eval_every=1)
SPACE = {"lr": (1e-4, 1.0, "log"), "loss_args.tau": (0.005, 0.2, "log"), "sampler_args.m": [2, 4]}
METRIC = "AP_level0"
FIRST = [{"lr": 0.01, "loss_args.tau": 0.01, "sampler_args.m": 4}]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HAPNB_CACHE", str(tmp_path_factory.getbasetemp() / "features"))


def toy_search(store, trials=6, base=BASE, space=SPACE, name="toy", **kw):
    args = dict(trials=trials, metric=METRIC, store=store, jobs=1, device="cpu", progress=False)
    return search(name, base, space, **{**args, **kw})


def settled(s): return s.trials.drop(columns=["seconds", "attempts"])
def same(a, b): pd.testing.assert_frame_equal(settled(a), settled(b), check_exact=True)
def refuse(*a, **k): raise AssertionError("a finished search must not train")


# ---- the space

@pytest.mark.parametrize("spec", [
    [8, 16, None], ["a", "b"], {"a": {"x": [1, 2]}, "b": None}, (0.5, 1), (1e-4, 1.0, "log"), (1, 6),
    span(2.0, 4.0, step=0.5), span(1, 64, log=True)])
def test_axis_goes_through_json_and_optuna(spec):
    a = axis(spec)
    assert axis_from(json.loads(json.dumps(a.to_dict()))) == a
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(5): assert study.ask({"x": a.distribution()}).params["x"] in a


@pytest.mark.parametrize("bad, why", [
    ([], "at least one"), ([1, 1], "different"), ([1, True], "different"), ([[1]], "needs a name"), ((2, 1), "empty"),
    ((1, 1), "empty"), ((0.0, 1.0, "log"), "logarithm"), ((1, 2, "lin"), "write"), (3, "write"), ("ab", "write"),
    ((1, "2"), "finite"), ((0.0, math.inf), "finite"), ({1: 2}, "names of settings are text"),
    ({"deep": functools.reduce(lambda x, _: [x], range(1000))}, "nested too deeply")])
def test_bad_axis(bad, why):
    with pytest.raises(ValueError, match=why): axis(bad)


def test_paths_with_dots_in_keys():
    base = BASE.replace(groups={"loss.hgnn": {"lr": 1.0}}, loss_args={"relevance": {"kind": "pop"}})
    got = apply_params(base, {"groups.loss.hgnn.lr": 2.0, "groups.head.lr": 3.0,
                              "groups.loss.distributions.means.weight_decay": 4.0, "loss_args.relevance.alpha": 5.0,
                              "transform": {"resize": 40}, "lr": 6})
    assert got.groups == {"loss.hgnn": {"lr": 2.0}, "head": {"lr": 3.0},
                          "loss.distributions.means": {"weight_decay": 4.0}}
    assert got.loss_args == {"relevance": {"kind": "pop", "alpha": 5.0}}
    assert got.lr == 6.0 and got.transform == {"resize": 40}
    assert base.groups == {"loss.hgnn": {"lr": 1.0}}


@pytest.mark.parametrize("change, why", [
    (dict(space={}), "empty"),
    (dict(space=[("lr", (0.1, 1.0))]), "not a dictionary"),
    (dict(space={"rl": (0.1, 1.0)}), "Did you mean 'lr'"),
    (dict(space={"lr": (1.0, 0.1)}), "'lr': the range"),
    (dict(space={"lr": ("1e-4", 0.1)}), "write 1.0e-4"),
    (dict(space={"lr": ["0.1", "0.2"]}), "'lr' at '0.1'"),
    (dict(space={"split": ["val"]}), "not a setting"),
    (dict(space={"seed": [0, 1]}), "not a setting"),
    (dict(space={"lr": (-1.0, 1.0)}), "'lr' at -1.0"),
    (dict(space={"loss_args.tua": (0.1, 1.0)}), "tua"),
    (dict(space={"groups.heat.lr": (0.1, 1.0)}), "'head'"),
    (dict(space={"groups.loss.hgnn.lr": (0.1, 1.0)}), "no piece 'hgnn'"),
    (dict(space={"loss": ["SupAPLos"]}), "SupAPLoss"),
    (dict(space={"loss_args": {"a": {}}, "loss_args.tau": (0.1, 1.0)}), "lies in the other"),
    (dict(base=BASE.replace(split="test")), "must not see the test images"),
    (dict(metric="AP_level7"), "unknown metric 'AP_level7'"),
    (dict(metric="H-AP"), "unknown metric"),
    (dict(trials=0), "trials must be a whole number, 1 or more"),
    (dict(trials="6"), "trials must be a whole number"),
    (dict(random=-1), "random must be a whole number, 0 or more"),
    (dict(jobs=-2), "jobs must be"),
    (dict(name="a/b"), "folder's name"),
    (dict(sampler="tep"), "'tpe'"),
    (dict(pruner="medium"), "'median'"),
    (dict(pruner_args={"n_warmup_step": 1}), "Did you mean 'n_warmup_steps'"),
    (dict(pruner_args={"n_warmup_steps": "1"}), "n_warmup_steps"),
    (dict(pruner="percentile", pruner_args={"percentile": 101.0}), "pruner_args of percentile"),
    (dict(first=[{"lr": 0.1}]), "each setting"),
    (dict(first=[3]), "each setting"),
    (dict(first=[{"lr": 2.0, "loss_args.tau": 0.01, "sampler_args.m": 2}]), "outside the space"),
])
def test_wrong_use_is_found_before_the_first_trial(tmp_path, monkeypatch, change, why):
    monkeypatch.setattr(U, "run", refuse)
    with pytest.raises(ValueError, match=why): toy_search(tmp_path, **change)


# ---- the hook of run

def test_on_epoch_ends_a_run_that_goes_on_later(tmp_path):
    cfg, rows = BASE.replace(epochs=4), []
    def stop(row):
        rows.append(row)
        if row["epoch"] == 1: raise TimeoutError
    with pytest.raises(TimeoutError): run(cfg, tmp_path / "a", "cpu", progress=False, on_epoch=stop)
    folder = tmp_path / "a" / cfg.key()
    assert not is_finished(folder) and (folder / "state.pt").exists() and len(pd.read_csv(folder / "history.csv")) == 2
    assert [r["epoch"] for r in rows] == [0, 1] and all(0 <= r[METRIC] <= 1 for r in rows)
    seen = []
    a = run(cfg, tmp_path / "a", "cpu", progress=False, on_epoch=lambda r: seen.append(r["epoch"]))
    b = run(cfg, tmp_path / "b", "cpu", progress=False)
    assert seen == [0, 1, 2, 3]
    for f in ("metrics.json", "weights.safetensors", "embeddings.safetensors"):
        assert (a.path / f).read_bytes() == (b.path / f).read_bytes()
    # read back: there is no epoch to tell of
    run(cfg, tmp_path / "a", "cpu", progress=False, on_epoch=refuse)


def test_on_epoch_cannot_spoil_a_run(tmp_path):
    def meddle(row):
        row["loss"] = None
        torch.manual_seed(1)
    a = run(BASE, tmp_path / "a", "cpu", progress=False, on_epoch=meddle)
    b = run(BASE, tmp_path / "b", "cpu", progress=False)
    assert (a.path / "weights.safetensors").read_bytes() == (b.path / "weights.safetensors").read_bytes()
    assert a.history["loss"].tolist() == b.history["loss"].tolist()


# ---- a search

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    os.environ["HAPNB_CACHE"] = str(tmp_path_factory.getbasetemp() / "features")
    return toy_search(tmp_path_factory.mktemp("finished"), trials=14, first=FIRST)


def store_of(s): return s.path.parents[1]


def test_every_trial_is_a_run_of_the_store(finished):
    t = finished.trials
    assert t["trial"].tolist() == list(range(14)) and t.loc[0, list(SPACE)].to_dict() == FIRST[0]
    assert set(t["state"]) == {"complete", "pruned"} and t["key"].nunique() == 14
    for row in t.to_dict("records"):
        cfg = apply_params(BASE, {k: row[k] for k in SPACE})
        assert cfg.key() == row["key"] and cfg.split == "val"
        folder = store_of(finished) / row["key"]
        assert is_finished(folder) == (row["state"] == "complete")
        if row["state"] == "complete": assert Result(folder).metrics[METRIC] == row["value"] and row["epochs"] == 3
        else: assert row["epochs"] < 3 and row["value"] == pd.read_csv(folder / "history.csv")[METRIC].iloc[-1]


def test_pruning_follows_the_median_rule(finished):
    "From the histories: a trial ends when its best score so far lies below the median of the complete ones before."
    history = lambda key: pd.read_csv(store_of(finished) / key / "history.csv")[METRIC].tolist()
    curves = {t["trial"]: history(t["key"]) for t in finished.trials.to_dict("records")}
    states = finished.trials["state"].tolist()
    for n, curve in curves.items():
        before = [curves[i] for i in range(n) if states[i] == "complete"]
        low = lambda e: max(curve[:e + 1]) < np.median([c[e] for c in before])
        below = [e for e in range(2) if e < len(curve) and len(before) >= 5 and low(e)]
        assert (states[n] == "pruned") == bool(below) and (not below or len(curve) == below[0] + 1)


def test_best(finished):
    done = finished.trials[finished.trials["state"] == "complete"]
    assert finished.best_trial["value"] == done["value"].max()
    assert finished.best.key() == finished.best_trial["key"]
    assert isinstance(finished.best_params["sampler_args.m"], int)


def test_at_edge(finished):
    for k, low, high in (("lr", 1e-4, 1.0), ("loss_args.tau", 0.005, 0.2)):
        u = math.log(finished.best_params[k] / low) / math.log(high / low)
        assert finished.at_edge.get(k) == (low if u < 0.1 else high if u > 0.9 else None)
    assert Search(finished.path, 1).at_edge == {}  # the base's settings lie well inside


def test_second_call_reads_back(finished, monkeypatch):
    monkeypatch.setattr(U, "run", refuse)
    began = time.perf_counter()
    again = toy_search(store_of(finished), trials=14, first=FIRST)
    assert time.perf_counter() - began < 5
    pd.testing.assert_frame_equal(again.trials, finished.trials, check_exact=True)
    fewer = toy_search(store_of(finished), trials=5, first=FIRST)
    pd.testing.assert_frame_equal(fewer.trials, finished.trials[:5], check_exact=True)


def test_same_seed_same_trials_however_they_are_cut(finished, tmp_path):
    "One worker: a function of the seed, whether done at once or in three calls."
    for n in (3, 11, 14): parts = toy_search(tmp_path, trials=n, first=FIRST)
    same(parts, finished)
    other = toy_search(tmp_path / "other", trials=4, first=FIRST, seed=1)
    assert other.trials["lr"][1:].tolist() != finished.trials["lr"][1:4].tolist()


def test_a_lost_journal_costs_no_training(finished, tmp_path, monkeypatch):
    "Without the journal, but with the runs: the same search again, and complete trials are read back."
    shutil.copytree(store_of(finished), tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "searches")
    trained, real = [], U.run
    def watched(cfg, store, *a, **k):
        if not is_finished(Path(store) / cfg.key()): trained.append(cfg.key())
        return real(cfg, store, *a, **k)
    monkeypatch.setattr(U, "run", watched)
    same(toy_search(tmp_path / "runs", trials=14, first=FIRST), finished)
    assert set(trained) == set(finished.trials.loc[finished.trials["state"] == "pruned", "key"])


@pytest.mark.parametrize("change, why", [
    (dict(space={**SPACE, "lr": (1e-4, 2.0, "log")}), "space.lr.high is 1.0 there and 2.0 here"),
    (dict(base=BASE.replace(embed_dim=8)), "base.embed_dim is 16 there and 8 here"),
    (dict(base=BASE.replace(dataset_args={"each": 6})), "data"),
    (dict(metric="R@1_level0"), "metric"),
    (dict(seed=1), "seed is 0 there and 1 here"),
    (dict(pruner=None), "pruner"),
    (dict(first=[]), "first"),
    (dict(sampler="random"), "sampler")])
def test_another_search_under_the_name_is_refused(finished, change, why):
    with pytest.raises(UserError, match=f"another search: .*{why}.*name of its own"):
        toy_search(store_of(finished), **{**dict(trials=14, first=FIRST), **change})


def test_where_data_lie_is_no_difference(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(U, "run", refuse)
    same(toy_search(store_of(finished), trials=14, first=FIRST, base=BASE.replace(data_dir=str(tmp_path))), finished)


# ---- faults

def test_an_even_start(tmp_path):
    "The first ten trials by TPE have one value in each tenth of each range."
    s = toy_search(tmp_path, 10, pruner=None)
    tenth = lambda k, low, high: sorted(int(10 * math.log(v / low) / math.log(high / low)) for v in s.trials[k])
    assert tenth("lr", 1e-4, 1.0) == tenth("loss_args.tau", 0.005, 0.2) == list(range(10))
    assert s.trials["sampler_args.m"].tolist().count(2) == 5
    assert toy_search(tmp_path, 3, name="other", random=2).trials["lr"].tolist()[2] not in s.trials["lr"].tolist()


def test_percentile_is_milder_than_the_median(tmp_path, finished):
    s = toy_search(tmp_path, trials=14, first=FIRST, pruner="percentile", pruner_args={"percentile": 99.0})
    assert (s.trials["state"] == "pruned").sum() < (finished.trials["state"] == "pruned").sum()


def poisoned(store, **kw): return toy_search(store, 8, **{**dict(sampler="random", pruner=None), **kw})

@pytest.fixture
def poison(monkeypatch):
    "SupAP with a large tau gives NaN from its fifth step on."
    real = SupAPLoss.forward
    def forward(self, *a, **k):
        self.calls = getattr(self, "calls", 0) + 1
        value = real(self, *a, **k)
        return value * math.nan if self.f.tau > 0.03 and self.calls >= 5 else value
    monkeypatch.setattr(SupAPLoss, "forward", forward)


def test_diverged_trials_are_failures_with_a_reason(tmp_path, monkeypatch, poison):
    s = poisoned(tmp_path)
    failed, good = s.trials[s.trials["state"] == "failed"], s.trials[s.trials["state"] == "complete"]
    assert len(failed) and len(good) and len(failed) + len(good) == 8
    assert (failed["loss_args.tau"] > 0.03).all() and (good["loss_args.tau"] <= 0.03).all()
    assert failed["error"].str.startswith("Diverged: loss is nan at epoch").all() and failed["value"].isna().all()
    assert s.best_trial["state"] == "complete" and s.best_trial["value"] == good["value"].max()
    monkeypatch.setattr(U, "run", refuse)  # a diverged trial is not tried again
    same(poisoned(tmp_path), s)


def test_the_search_keeps_away_from_where_runs_fail(tmp_path, poison):
    space = {"loss_args.tau": (0.005, 0.2, "log"), "lr": (1e-3, 1e-1, "log")}
    s = toy_search(tmp_path, 30, pruner=None, sampler="tpe", space=space)
    fails = (s.trials["state"] == "failed").to_numpy()
    assert fails[:10].sum() >= 3 and fails[-10:].sum() < fails[:10].sum()


def test_nothing_good_at_all(tmp_path):
    s = toy_search(tmp_path, 2, BASE.replace(loss="HAPPIERLoss", loss_args={}), {"lr": (1e37, 3e38)})
    assert set(s.trials["state"]) == {"failed"}
    with pytest.raises(ValueError, match="no trial of 2.*first failure"): s.best
    s._repr_markdown_(), plot_history(s)


def test_a_full_disk_ends_the_search_and_the_trial_is_repeated(tmp_path, monkeypatch):
    real, calls = U.run, []
    def full(*a, **k):
        calls.append(1)
        if len(calls) == 3: raise OSError(28, "No space left on device")
        return real(*a, **k)
    monkeypatch.setattr(U, "run", full)
    with pytest.raises(OSError, match="No space left"): toy_search(tmp_path / "a")
    assert Search(tmp_path / "a/searches/toy", 6).trials["state"].tolist() == ["complete"] * 2 + ["open"] * 4
    s = toy_search(tmp_path / "a")
    assert s.trials["attempts"].tolist() == [1, 1, 2, 1, 1, 1]
    same(s, toy_search(tmp_path / "b"))


def test_damaged_files(tmp_path):
    folder = toy_search(tmp_path, 3).path
    journal, asked = folder / "journal.jsonl", folder / "search.json"
    whole, text = journal.read_bytes(), asked.read_text()
    journal.write_bytes(whole + b'{"op_code": 5, "wor')  # killed while it wrote
    assert len(toy_search(tmp_path, 4).trials) == 4
    lines = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:4], b"\x00\x00\x00\n", *lines[4:]]))
    with pytest.raises(ValueError, match="journal.jsonl, line 5, cannot be read.*Delete the folder"):
        toy_search(tmp_path, 3)
    journal.write_bytes(whole)
    asked.write_text(text[:40])
    with pytest.raises(ValueError, match="search.json is damaged"): toy_search(tmp_path, 3)
    asked.unlink()
    with pytest.raises(ValueError, match="without its search.json"): toy_search(tmp_path, 3)
    with pytest.raises(FileNotFoundError, match="holds no search"): Search(folder)


@pytest.mark.parametrize("which", [".claim.lock", ".journal.lock"])
def test_locked_storage(tmp_path, monkeypatch, which):
    from filelock import FileLock
    toy_search(tmp_path, 2)
    monkeypatch.setattr(U, "_PATIENCE", 0.3)
    with FileLock(tmp_path / "searches/toy" / which):
        with pytest.raises(TimeoutError, match="locked by another process"): toy_search(tmp_path, 3)
    assert len(toy_search(tmp_path, 3).trials) == 3


def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError): toy_search(tmp_path / "file")


def test_force_forgets(tmp_path, monkeypatch):
    first = toy_search(tmp_path, 2)
    before = [(tmp_path / k / "metrics.json").stat().st_mtime_ns for k in first.trials["key"]]
    monkeypatch.setenv("HAPNB_FORCE", str(time.time() + 0.01))
    time.sleep(0.05)
    same(toy_search(tmp_path, 2), first)
    assert all((tmp_path / k / "metrics.json").stat().st_mtime_ns > b for k, b in zip(first.trials["key"], before))


# ---- several processes

def child(store, die=0, pause=0.0, **kw):
    "A search in a forked process (importing torch again would take seconds), killed at a given step of training."
    def body():
        steps, step = [], Trainer.step
        def slow(self, *a):
            steps.append(1)
            if len(steps) == die: os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(pause)
            step(self, *a)
        torch.set_num_threads(1)
        Trainer.step = slow
        assert len(toy_search(store, **kw).trials) == kw["trials"]
    p = multiprocessing.get_context("fork").Process(target=body)
    p.start()
    return p


def ends(*ps):
    for p in ps: p.join(200)
    return sorted(p.exitcode for p in ps)


def test_kill_9_in_the_middle(finished, tmp_path):
    "Killed in a trial, the search ends with as many trials as were asked for, and the same ones."
    assert ends(child(tmp_path, die=20, trials=14, first=FIRST)) == [-signal.SIGKILL]
    left = Search(tmp_path / "searches/toy", 14).trials["state"].tolist()
    assert left.count("running") == 1 and 0 < left.count("complete") < 14
    s = toy_search(tmp_path, trials=14, first=FIRST)
    attempts = s.to_optuna().trials
    assert len(attempts) == 14 and s.trials["attempts"].sum() == 15
    journal = SearchFolder(s.path).study.trials
    assert [t.user_attrs.get("again") for t in journal if t.state.name == "FAIL"] == ["its worker died"]
    same(s, finished)
    assert not list(s.path.glob(".alive-*"))


def test_a_trial_that_kills_its_worker_is_given_up(tmp_path):
    "Three times at the same epoch: recorded as failed, and the search goes on."
    for _ in range(3): assert ends(child(tmp_path, die=2, trials=2)) == [-signal.SIGKILL]
    s = toy_search(tmp_path, 2)
    assert s.trials["state"].tolist() == ["failed", "complete"] and s.trials["attempts"].tolist() == [3, 1]
    assert "died three times" in s.trials.loc[0, "error"]


def test_two_searches_share_the_work(tmp_path):
    "Two processes in one folder: no trial is done twice or left out, and both see all results."
    store = tmp_path / "runs"
    assert ends(*[child(store, pause=0.02, trials=10) for _ in range(2)]) == [0, 0]
    journal = SearchFolder(store / "searches/toy").study.trials
    assert len(journal) == 10 and sorted(t.user_attrs["slot"] for t in journal) == list(range(10))
    assert len({t.user_attrs["worker"] for t in journal}) == 2


def test_one_of_two_is_killed(tmp_path):
    "The other takes its trial over."
    two = child(tmp_path, pause=0.05, trials=8), child(tmp_path, pause=0.05, die=12, trials=8)
    assert ends(*two) == [-signal.SIGKILL, 0]
    t = Search(tmp_path / "searches/toy", 8).trials
    assert set(t["state"]) <= {"complete", "pruned"} and len(t) == 8 and t["attempts"].sum() == 9


def test_worker_processes_of_one_search(tmp_path):
    s = toy_search(tmp_path, trials=8, jobs=2)
    assert len(s.trials) == 8 and set(s.trials["state"]) <= {"complete", "pruned"} and (s.trials["attempts"] == 1).all()
    for k in s.complete["key"][:2]: assert Result(tmp_path / k).environment["threads"] == 1
    one = Result(tmp_path / s.complete["key"].iloc[0])
    again = run(one.config, tmp_path / "again", "cpu", progress=False)
    assert again.metrics == one.metrics, "a run is the same in whatever process"


# ---- what comes out

def test_importance_finds_what_matters(tmp_path):
    "The learning rate decides everything, the weight decay of a millionth nothing."
    space = {"lr": (1e-5, 1.0, "log"), "weight_decay": (0.0, 1e-9)}
    s = toy_search(tmp_path, 20, BASE, space, sampler="random", pruner=None)
    for method in ("fanova", "ped-anova"):
        found = s.importance(method, seeds=3)
        assert found["setting"][0] == "lr" and found["mean"].sum() == pytest.approx(1)
        assert (found["low"] <= found["mean"]).all() and (found["mean"] <= found["high"]).all()
    assert s.importance("fanova", seeds=3)["mean"][0] > 0.7


def test_pictures_draw_all_states(tmp_path, finished, poison):
    s = poisoned(tmp_path, pruner="median")
    for fig in (plot_history(s), plot_parallel(s), plot_importance(finished, seeds=2),
                plot_importance(finished, "ped-anova"), plot_contour(finished, [("lr", "sampler_args.m")])):
        assert fig.axes and all(a.get_xlabel() or a.get_ylabel() or a.get_xticklabels() for a in fig.axes)
    with pytest.raises(ValueError, match="Did you mean 'lr'"): plot_contour(finished, [("rl", "sampler_args.m")])
    assert len(finished.to_optuna().trials) == 14


def test_none_and_whole_numbers_stay_what_they_are(tmp_path):
    space = {"clip_norm": [None, 1.0], "embed_dim": (4, 16), "normalise": [True, False]}
    s = toy_search(tmp_path, 6, space=space, pruner=None)
    for t in (s, Search(s.path, 9)):  # with open trials, whose settings are not known yet
        assert set(t.trials["clip_norm"][:6]) == {None, 1.0}
        assert type(t.best_params["embed_dim"]) is int and type(t.best_params["normalise"]) is bool
        assert t.best.key() == t.best_trial["key"] and t.trials["state"].tolist()[6:] == ["open"] * (len(t.trials) - 6)
        plot_parallel(t), plot_contour(t, [("clip_norm", "normalise")]), t._repr_markdown_()


def test_a_loss_in_a_dict_of_choices(tmp_path):
    space = {"loss_args": {"narrow": {"tau": 0.01}, "wide": {"tau": 0.1, "rho": 10.0}}}
    s = toy_search(tmp_path, 4, space=space)
    assert s.best.loss_args in ({"tau": 0.01}, {"tau": 0.1, "rho": 10.0})
    assert set(s.trials["loss_args"]) <= {"narrow", "wide"}
    assert Search(s.path).best == s.best
