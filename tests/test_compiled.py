"""Loops that numba compiles against plain PyTorch: the cases of the Triton kernel, threads, forks and absence."""
import os
import subprocess
import sys
import warnings

import kernels_interpreted as cases
import pytest
import torch
from hapnb import compiled
from hapnb.helpers import KERNELS
from hapnb.losses import make_loss
from hapnb.ranking import HUGE, Leaky, Sigmoid, Step, Sup
from kernels_interpreted import (F32, F64, agree, plain, problem,  # noqa: F401: these are collected here
                                 test_a_score_that_is_no_number_is_not_hidden,
                                 test_comparisons_at_the_jumps_and_one_ulp_beside, test_empty_slots_add_exactly_nothing,
                                 test_no_positive_no_item_no_query, test_scaled_scores_may_overflow,
                                 test_sizes_that_no_tile_divides, test_two_calls_give_the_same_bits,
                                 test_values_and_gradients_are_those_of_pytorch)
from test_ranking import LABELS, by_loss, rows, step

pytestmark = pytest.mark.skipif(not compiled.available("cpu"), reason="numba is not installed")


@pytest.fixture(autouse=True)
def _loops(monkeypatch):
    for name in ("available", "sums", "pull"): monkeypatch.setattr(cases, name, getattr(compiled, name))


@pytest.mark.parametrize("W", [2047, 2048, 2049, 50_000])
def test_long_rows_are_cut_into_pieces_and_lose_no_digits(W):
    s, k, outer = problem(F64, 1, W, 3)
    agree(Sup(), s, k, outer, 1e-13)
    s, k = torch.full((1, W), .01, dtype=F64), torch.zeros(1, 1, dtype=F64)
    exact = cases.kernels._plain_sums(Sigmoid(), s.float().double(), k)
    # one after the other they would lose 3e-5
    assert abs(compiled.sums(Sigmoid(), s.float(), k.float()) / exact - 1) < 5e-6


@pytest.mark.parametrize("f", [Step(), Sigmoid(), Sup(strict=True), Leaky()], ids=repr)
def test_slots_that_are_not_filled_are_left_out(f):
    "Their sums can be divided by, their outer derivatives are not read, and the others do not change."
    s, k, outer = problem(F32, Q=4, P=6, empty=0)
    filled = torch.tensor([0, 1, 5, 6])
    there = torch.arange(6) < filled[:, None]
    found = compiled.sums(f, s, k.where(there, torch.nan), filled)
    assert torch.equal(found[there], compiled.sums(f, s, k)[there]) and (found[~there] == 1).all()
    if not f.smooth: return
    ds, dk = compiled.pull(f, s, k.where(there, torch.nan), outer.where(there, torch.nan), filled)
    want, slope = compiled.pull(f, s, k, outer.where(there, 0.))
    torch.testing.assert_close(ds, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(dk[there], slope[there]) and not dk[~there].any()


def test_the_number_of_threads_changes_no_bit():
    s, k, outer = problem(F32, 64, 512, 256)
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append((compiled.sums(Sup(), s, k), *compiled.pull(Sup(), s, k, outer)))
    finally: torch.set_num_threads(before)
    for other in found[1:]: assert all(map(torch.equal, found[0], other))


def test_what_is_not_contiguous_is_read_right():
    s, k, outer = problem(F64, 5, 37, 7, empty=0)
    given = [t.T.contiguous().T for t in (s, k, outer)]
    assert not given[0].is_contiguous()
    mine = compiled.sums(Leaky(), *given[:2]), *compiled.pull(Leaky(), *given)
    for a, b in zip(mine, plain(Leaky(), s, k, outer)): torch.testing.assert_close(a, b)


@by_loss
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-11), (F32, 1e-4)])
def test_losses_give_what_blocks_give(name, args, labels, dtype, tolerance, request, monkeypatch):
    loss, emb, calls = make_loss(name, method="direct", **args), rows(48, dtype), []
    monkeypatch.setattr(compiled, "_share", lambda *a, share=compiled._share: calls.append(1) or share(*a))
    found, slope = step(loss, emb, LABELS[labels])
    assert calls
    request.getfixturevalue("blocks")
    value, grad = step(loss, emb, LABELS[labels])
    torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slope, grad, rtol=tolerance, atol=tolerance * grad.abs().max().item())


def test_a_fork_can_use_the_loops_that_its_parent_used():
    "Threads do not survive a fork, and libraries that keep some hang or abort there."
    code = """
import os, torch
from hapnb import compiled
from hapnb.ranking import Sup
torch.set_num_threads(2)
s = torch.randn(64, 512)
want = compiled.sums(Sup(), s, s)
pid = os.fork()
if not pid: os._exit(0 if torch.equal(compiled.sums(Sup(), s, s), want) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_numba_switched_off_leaves_blocks():
    code = "from hapnb import compiled; assert not compiled.available('cpu')"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, check=True, timeout=120)


def test_numba_that_fails_is_told_once(monkeypatch):
    def broken(*args): raise ImportError("Numba needs NumPy 2.1 or less")
    monkeypatch.setattr(compiled, "_sum_loop", broken)
    compiled._works.cache_clear()
    try:
        with pytest.warns(UserWarning, match="plain PyTorch is used instead: ImportError: Numba needs NumPy"):
            assert not compiled.available("cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not KERNELS.get("cpu").available(torch.zeros(1))
    finally: compiled._works.cache_clear()


def test_losses_import_no_compiler():
    code = "import sys, hapnb.losses; assert not {'numba', 'llvmlite', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
