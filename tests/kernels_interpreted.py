"""The Triton kernel against plain PyTorch in Triton's interpreter; `test_kernels.py` runs this file in a process.

By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels_interpreted.py
"""
import pytest
import torch
from hapnb import kernels
from hapnb.helpers import KERNELS
from hapnb.kernels import available, pull, sums
from hapnb.ranking import HUGE, Leaky, Sigmoid, Step, Sup
from test_ranking import LABELS, by_loss, make_loss, rows, step

F32, F64 = torch.float32, torch.float64
SMOOTH = [Sigmoid(), Sigmoid(.1), Leaky(), Leaky(3., 1.2, 0.), Sup(), Sup(delta=None), Sup(offset=None),
          Sup(strict=True), Sup(start=0., offset=1.), Sup(delta=None, offset=None, strict=True), Sup(tau=1e-3, rho=7.)]


def problem(dtype, Q=2, W=37, P=5, empty=4, seed=0):
    "Scores on a grid of 1/64 (so that ties abound), empty slots on the right, outer derivatives."
    g = torch.Generator().manual_seed(seed)
    s = torch.randint(-30, 30, (Q, W), generator=g).to(dtype) / 64
    k = torch.randint(-30, 30, (Q, P), generator=g).to(dtype) / 64
    outer = torch.randn(Q, P, generator=g, dtype=F64).to(dtype)
    if empty and W > empty and P > 1: s[0, W - empty:], k[0, P - 1:], outer[0, P - 1:] = -HUGE, 0, 0
    return s, k, outer


def plain(f, s, k, outer): return kernels._plain_sums(f, s, k), *kernels._plain_pull(f, s, k, outer)


def results(f, s, k, outer): return sums(f, s, k), *pull(f, s, k, outer)


def agree(f, s, k, outer, eps):
    for got, want in zip(results(f, s, k, outer), plain(f, s, k, outer)):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert (got - want).abs().max() <= eps * want.abs().max().clamp(min=1e-3), f


@pytest.mark.parametrize("dtype, eps", [(F32, 3e-6), (F64, 1e-14)], ids=["float32", "float64"])
@pytest.mark.parametrize("f", SMOOTH, ids=repr)
def test_values_and_gradients_are_those_of_pytorch(f, dtype, eps):
    assert available("cpu")
    agree(f, *problem(dtype), eps)


@pytest.mark.parametrize("Q, W, P", [(1, 1, 1), (3, 5, 1), (1, 2, 130), (2, 131, 129), (1, 2100, 2), (1, 3, 3000)])
def test_sizes_that_no_tile_divides(Q, W, P):
    s, k, outer = problem(F64, Q, W, P)
    agree(Sup(), s, k, outer, 1e-13)
    assert torch.equal(sums(Step(), s, k), (s[:, None] >= k[:, :, None]).sum(-1).double())


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("f", [Sup(strict=True), Sup(delta=.07, start=1.), Leaky(25., .5, 10.)], ids=repr)
def test_comparisons_at_the_jumps_and_one_ulp_beside(f, dtype):
    "Ties, differences of exactly delta, of 0.02, where `Leaky` stops rising, and beyond; jumps exceed the tolerance."
    one = torch.tensor([[.011], [.3], [.77], [-.5]], dtype=dtype)
    far = torch.tensor([0., getattr(f, "delta", 0.), .02, .024], dtype=dtype)
    for sign in (1, -1):
        edge = one + sign * far
        many = torch.cat([edge, edge.nextafter(edge + 1), edge.nextafter(edge - 1)], 1)
        # one item and many positives, or one positive and many items: each pair has a result of its own
        s, k = (one, many) if sign < 0 else (many, one)
        got, want = (g(f, s, k, torch.ones_like(k)) for g in (results, plain))
        for mine, theirs in zip(got, want): assert ((mine - theirs).abs() <= 1e-5 * (1 + theirs.abs())).all()
        assert torch.equal(sums(Step(), s, k), (s[:, None] >= k[:, :, None]).sum(-1).to(dtype))


@pytest.mark.parametrize("f", [Step(), *SMOOTH], ids=repr)
def test_empty_slots_add_exactly_nothing(f):
    s, k, outer = problem(F32, empty=0)
    wide = torch.cat([s, torch.full((2, 70), -HUGE)], 1)
    assert torch.equal(sums(f, wide[:, :37], k), sums(f, s, k))
    torch.testing.assert_close(sums(f, wide, k), sums(f, s, k), rtol=1e-6, atol=0)
    if not f.smooth: return
    (ds, dk), (ds_wide, dk_wide) = pull(f, s, k, outer), pull(f, wide, k, outer)
    assert not ds_wide[:, 37:].any()
    torch.testing.assert_close(ds_wide[:, :37], ds, rtol=0, atol=0)
    torch.testing.assert_close(dk_wide, dk, rtol=1e-5, atol=1e-5 * dk.abs().max().item())


@pytest.mark.parametrize("f", [Sigmoid(1e-12), Sup(tau=1e-12, rho=1.)], ids=repr)
def test_scaled_scores_may_overflow(f):
    "Empty slots are -infinity after scaling in float32; the sigmoid is then a step."
    s, k, outer = problem(F32)
    assert torch.isinf(s.mul(f.scale)).any()
    for a, b in zip(results(f, s, k, outer), plain(f, s, k, outer)): torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


@pytest.mark.parametrize("f", [Step(), Sigmoid(), Sup(), Leaky()], ids=repr)
def test_a_score_that_is_no_number_is_not_hidden(f):
    s, k, outer = problem(F64)
    s[1, 3] = torch.nan
    found = sums(f, s, k)
    assert found[1].isnan().all() and not found[0].isnan().any()


def test_long_sums_in_float32_lose_no_digits(monkeypatch):
    monkeypatch.setattr(kernels, "_tile", lambda A, B: (1, 4))
    s, k = torch.full((1, 2000), .01, dtype=F64), torch.zeros(1, 1, dtype=F64)
    exact = kernels._plain_sums(Sigmoid(), s.float().double(), k)
    assert abs(sums(Sigmoid(), s.float(), k.float()) / exact - 1) < 2e-7


def test_two_calls_give_the_same_bits():
    given = problem(F32, 1, 300, 140)
    assert all(map(torch.equal, results(Sup(), *given), results(Sup(), *given)))


def test_no_positive_no_item_no_query():
    for Q, W, P in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
        s, k, outer = problem(F32, Q, W, P)
        assert [tuple(t.shape) for t in results(Sup(), s, k, outer)] == [(Q, P), (Q, W), (Q, P)]
        assert not sums(Sup(), s, k).any()


@by_loss
@pytest.mark.parametrize("labels", ["few", "unknown"])
def test_losses_give_the_same_with_the_kernel_as_with_blocks(name, args, labels, monkeypatch):
    loss, emb, labels = make_loss(name, **args), rows(12), LABELS[labels][::4] // 2
    value, grad = step(loss, emb, labels)
    calls = []
    monkeypatch.setitem(KERNELS._items, "cpu", KERNELS.get("cuda"))
    monkeypatch.setattr(kernels, "_launch", lambda *a, launch=kernels._launch, **k: calls.append(1) or launch(*a, **k))
    found, slope = step(loss, emb, labels)
    assert calls
    torch.testing.assert_close(found, value, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(slope, grad, rtol=1e-10, atol=1e-11 * grad.abs().max().item())
