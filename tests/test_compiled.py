"""Loops that numba compiles against blocks of plain PyTorch: hostile scores, sizes, threads, forks and absence."""
import os
import subprocess
import sys
import warnings

import pytest
import torch
from hapnb import compiled
from hapnb.helpers import KERNELS
from hapnb.losses import make_loss
from hapnb.ranking import Leaky, Sigmoid, Step, Sup, without_kernels
from test_loglinear import KINDS, SURROGATES, hostile, levels_of, sums
from test_ranking import LABELS, by_loss, rows, step

pytestmark = pytest.mark.skipif(not compiled.available("cpu"), reason="numba is not installed")
F32, F64 = torch.float32, torch.float64


def both(f, scores, shared, levels=2):
    "Weighted sums of f and their derivatives by the loops, and by blocks."
    weight = torch.linspace(.5, 2, len(scores), dtype=F64)
    found = sums(f, scores, shared, levels, "direct", weight)
    with without_kernels(): return found, sums(f, scores, shared, levels, "direct", weight)


def agree(f, scores, shared, levels=2, rel=None):
    "The scale of derivatives is that of each row."
    (value, grad), (want, slope) = both(f, scores, shared, levels)
    rel = rel or (1e-13 if scores.dtype == F64 else 3e-6)
    torch.testing.assert_close(value, want, rtol=rel, atol=rel)
    off = (grad - slope).abs().amax(1)
    assert (off <= rel * slope.abs().amax(1).clamp(min=1.)).all(), (off, slope.abs().amax(1))


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SURROGATES)
def test_values_and_gradients_are_those_of_blocks(name, kind, dtype):
    f = SURROGATES[name]
    scores = hostile(kind, dtype, f)
    agree(f, scores, levels_of(scores.shape))


@pytest.mark.parametrize("f", [Sup(strict=True), Sup(delta=.07, start=1.), Leaky(25., .5, 10.)], ids=repr)
@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
def test_comparisons_at_the_jumps_and_one_ulp_beside(f, dtype):
    "Ties, differences of exactly delta, of 0.02, where `Leaky` stops rising, and beyond; jumps exceed the tolerance."
    far = torch.tensor([0., getattr(f, "delta", 0.), .02, .024], dtype=dtype)
    for one in (.011, .3, .77, -.5):
        edge = one + torch.cat([far, -far])
        # one positive and one item per row: each pair has a result of its own
        items = torch.cat([edge, edge.nextafter(edge + 1), edge.nextafter(edge - 1)])
        scores = torch.stack([torch.full_like(items, one), items], 1)
        shared = torch.tensor([[1, 0]]).expand(len(items), -1).contiguous()
        (value, grad), (want, slope) = both(f, scores, shared, 1)
        assert ((value - want).abs() <= 1e-5 * (1 + want.abs())).all()
        assert ((grad - slope).abs() <= 1e-5 * (1 + slope.abs())).all()
        assert torch.equal(*(v[0] for v in both(Step(), scores, shared, 1)))


@pytest.mark.parametrize("Q, N, levels", [(1, 1, 1), (1, 2, 3), (3, 5, 1), (2, 2049, 1), (1, 5000, 7), (70, 33, 2)])
def test_any_size(Q, N, levels):
    scores = torch.randn(Q, N, dtype=F64, generator=torch.Generator().manual_seed(N)) * .2
    agree(Sup(), scores, levels_of((Q, N), levels), levels, 1e-12)


def test_levels_of_any_integers_and_scores_in_any_order_of_memory():
    scores, shared = torch.randn(9, 40, dtype=F64), levels_of((9, 40))
    for kind in (torch.int8, torch.int32, torch.int64): agree(Sup(), scores, shared.to(kind))
    agree(Sup(), scores.T.contiguous().T, shared.T.contiguous().T)


def test_long_rows_lose_no_digits():
    "One after the other, the terms would lose 3e-5."
    scores = torch.full((1, 50_001), .01, dtype=F64)
    scores[0, 0], shared = 0., torch.zeros(1, 50_001, dtype=torch.long)
    shared[0, 0] = 1
    one = torch.ones(1, dtype=F64)
    exact, found = (sums(Sigmoid(), s, shared, 1, "direct", one)[0] for s in (scores.float().double(), scores.float()))
    assert abs(found / exact - 1) < 5e-6


def test_a_score_that_is_no_number_is_not_hidden():
    scores, shared = torch.randn(3, 20), levels_of((3, 20)).clamp(min=0)
    scores[1, 3], shared[:, 0] = torch.nan, 1
    shared[1, 3] = 0
    for f in (Step(), Sigmoid(), Sup(), Leaky()):
        value, _ = sums(f, scores, shared, 2, "direct", torch.ones(3))
        assert value[1].isnan() and value[[0, 2]].isfinite().all()


def test_queries_without_positives_and_no_query_at_all():
    scores, shared = torch.randn(4, 10), torch.zeros(4, 10, dtype=torch.long)
    value, grad = sums(Sup(), scores, shared, 2, "direct", torch.ones(4))
    assert not value.any() and not grad.any()
    shared[2, 5] = 1
    value, grad = sums(Sup(), scores, shared, 2, "direct", torch.ones(4))
    assert value[2] and not value[[0, 1, 3]].any() and grad[2].any() and not grad[[0, 1, 3]].any()
    assert sums(Sup(), scores[:0], shared[:0], 2, "direct", torch.ones(0))[0].shape == (0,)


def test_the_number_of_threads_changes_no_bit():
    scores, shared = torch.randn(256, 512) * .2, levels_of((256, 512))
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(sums(Sup(), scores, shared, 2, "direct", torch.ones(256)))
    finally: torch.set_num_threads(before)
    for other in found[1:]: assert all(map(torch.equal, found[0], other))


@by_loss
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-11), (F32, 1e-4)], ids=["float64", "float32"])
def test_losses_give_what_blocks_give(name, args, labels, dtype, tolerance, monkeypatch):
    loss, emb, calls = make_loss(name, method="direct", **args), rows(48, dtype), []
    monkeypatch.setattr(compiled, "_one_slab", lambda *a, do=compiled._one_slab: calls.append(1) or do(*a))
    found, slope = step(loss, emb, LABELS[labels])
    assert calls
    with without_kernels(): value, grad = step(loss, emb, LABELS[labels])
    torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slope, grad, rtol=tolerance, atol=tolerance * grad.abs().max().item())


def test_a_fork_can_use_the_loops_that_its_parent_used():
    "Threads do not survive a fork, and libraries that keep some hang or abort there."
    code = """
import os, torch
from hapnb.losses import SupAPLoss
torch.set_num_threads(2)
emb, labels = torch.randn(512, 8), torch.arange(512) // 128
want = SupAPLoss()(emb, labels)
torch.set_num_threads(1)
pid = os.fork()
if not pid:
    # PyTorch's own threads would not survive either
    os._exit(0 if torch.allclose(SupAPLoss()(emb, labels), want) else 3)
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
