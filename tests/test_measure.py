"""Timings are paired and counted right; memory is exact. No test depends on how fast this machine is."""
import gc, sys
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from hapnb import measure
from hapnb.config import RunConfig

TIMES = [("a", 0, 1.), ("b", 0, 10.), ("a", 1, 4.), ("b", 1, 20.), ("a", 2, 2.), ("a", 3, 3.), ("b", 3, 3.)]
TIMES = pd.DataFrame(TIMES, columns=["name", "round", "seconds"])


def fake_clock(monkeypatch, costs):
    "Make `time.perf_counter` advance by what the called function costs; give the functions and the order of the calls."
    clock, calls = [0.], []
    def work(name):
        calls.append(name)
        clock[0] += costs[name]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    # a collection of all that the tests have imported takes half a second
    monkeypatch.setattr(measure.gc, "collect", lambda: None)
    return {n: (lambda n=n: work(n)) for n in costs}, calls


def test_time_pairs_runs_rounds_in_random_but_repeatable_order(monkeypatch):
    costs = dict(a=.5, b=.25, c=2.)
    functions, calls = fake_clock(monkeypatch, costs)
    t = measure.time_pairs(functions, repeats=6, warmup=2, seed=1)
    assert calls[:6] == list("abcabc") and len(t) == 18, "warm-up calls are made and not counted"
    orders = ["".join(p.sort_values("place")["name"]) for _, p in t.groupby("round")]
    assert calls[6:] == list("".join(orders)) and {"".join(sorted(o)) for o in orders} == {"abc"}
    assert len(set(orders)) > 1
    assert {n: set(p["seconds"]) for n, p in t.groupby("name")} == {n: {c} for n, c in costs.items()}
    again = measure.time_pairs(fake_clock(monkeypatch, costs)[0], repeats=6, warmup=2, seed=1)
    pd.testing.assert_frame_equal(t, again)


def test_there_must_be_something_to_time():
    for functions, repeats in (({}, 3), ({"a": print}, 0)):
        with pytest.raises(ValueError, match="nothing to time"): measure.time_pairs(functions, repeats)


def test_a_function_drops_out_when_its_budget_is_used_up(monkeypatch):
    functions, _ = fake_clock(monkeypatch, dict(quick=.1, slow=4.))
    rounds = lambda **args: measure.time_pairs(functions, repeats=8, **args)["name"].value_counts().to_dict()
    assert rounds(budget=9., least=2) == dict(quick=8, slow=3)
    assert rounds(budget=1., least=5) == dict(quick=8, slow=5)


def test_the_garbage_collector_is_back_after_an_error():
    def fails(): raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"): measure.time_pairs(dict(fails=fails), warmup=0)
    assert gc.isenabled()


def test_compare_times_takes_ratios_within_rounds():
    t = measure.compare_times(TIMES, "a")
    assert t.loc["b"].to_dict() == dict(median=10., low=3., high=20., ratio=5., ratio_low=1., ratio_high=10., n=3)
    assert t.loc["a", ["ratio", "ratio_low", "ratio_high"]].tolist() == [1., 1., 1.] and t.loc["a", "n"] == 4
    plain = measure.compare_times(TIMES)
    assert list(plain) == ["median", "low", "high", "n"] and list(plain.index) == ["a", "b"]
    one = pd.DataFrame([("alpha", 0, 1.)], columns=["name", "round", "seconds"])
    with pytest.raises(ValueError, match="Did you mean 'alpha'"): measure.compare_times(one, "alhpa")


@pytest.mark.parametrize("n", [1000, 300_000])
def test_peak_memory_is_exact(n):
    # what was there before does not count
    held = torch.ones(n)
    def f():
        a = held * 2
        # two at once
        b = a + a
        del a
        c = b.sum()
        return b[:10].clone(), c
    assert 8 * n <= measure.peak_memory(f) < 8 * n + 200
    assert measure.peak_memory(lambda: None) == 0
    leaf = torch.ones(n, requires_grad=True)
    # the square, then the gradient: filled (as a view) and multiplied by 2
    def backward(): torch.autograd.grad(leaf.square().sum(), leaf)
    assert 4 * n <= measure.peak_memory(backward) <= 12 * n + 200


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")
def test_peak_resident_sees_the_peak_and_forgets_the_past():
    # 320 MB that are gone before
    big = np.ones(40_000_000)
    del big
    def f():
        x = np.ones(20_000_000)
        del x
    for _ in range(2): assert 155e6 < measure.peak_resident(f) < 180e6
    assert measure.peak_resident(lambda: None) < 5e6


def test_peak_resident_elsewhere_calls_the_function_and_tells_nothing(monkeypatch):
    def refuse(self, *args): raise PermissionError(self)
    monkeypatch.setattr(Path, "write_text", refuse)
    calls = []
    assert measure.peak_resident(lambda: calls.append(1)) is None and calls == [1]


def test_a_busy_machine_is_named(monkeypatch):
    for busy, end in ((10.4, "used 10 % of the processor."),
                      (50., "used 50 % of the processor: too much for timings that mean something.")):
        monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: busy)
        assert measure.others_load().endswith(end)


def test_the_pieces_of_a_step_add_up(tmp_path):
    toy = RunConfig(dataset="toy", trunk="toy", image_size=32, embed_dim=16, batch_size=24, loss="SupAPLoss")
    t = measure.profile_run(toy, steps=8, device="cpu", path=tmp_path / "t.csv").set_index("part")
    pieces = t.drop(index="whole step")
    assert list(pieces.index) == ["pick rows", "head, forward", "loss, forward", "loss, backward", "head, backward",
                                  "optimiser", "bookkeeping"]
    assert (pieces.ms >= 0).all() and t.share["whole step"] == 1
    assert pieces.ms.sum() >= t.ms["whole step"] - 1e-9
    assert len(pd.read_csv(tmp_path / "t.csv")) == len(t)
    for change, hint in ((dict(micro_batch=8), "micro_batch=None"), (dict(memory={"size": 48}), "memory={}")):
        with pytest.raises(ValueError, match=hint): measure.profile_run(toy.replace(**change), device="cpu")
