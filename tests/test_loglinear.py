"""The log-linear way of the rank engine against the direct way, on scores that were made to break it."""
import math
import warnings

import numpy as np
import pytest
import torch
from hapnb import loglinear
from hapnb.core import level_counts
from hapnb.losses import make_loss
from hapnb.ranking import Leaky, Part, Sigmoid, Step, Sup, rank_score

# the direct way without kernels
pytestmark = pytest.mark.usefixtures("blocks")

SURROGATES = {"Step": Step(), "Sigmoid": Sigmoid(), "Sigmoid, wide": Sigmoid(.3), "Sup": Sup(),
              "Sup, strict": Sup(strict=True), "Sup, iNat": Sup(offset=1., start=0.),
              "Sup, continuous": Sup(offset=None),
              "Sup, wide": Sup(tau=.05, rho=3.), "Sup, straight": Sup(delta=None, offset=.5, tau=.02),
              "Sup, far": Sup(delta=.5), "Leaky": Leaky(), "Leaky, capped at once": Leaky(gamma=1.),
              "Leaky, flat": Leaky(beta=0., leak=3.)}


def sums(f, scores, shared, levels, method, weight):
    "A weighted sum over positives of sums of f over lower levels, and its derivatives: any error of a sum shows."
    def combine(a, found, rows):
        w = weight[rows, None].to(found[0].dtype)
        return w * found[0], [w.expand_as(found[0])]
    leaf = scores.clone().requires_grad_()
    total = rank_score(leaf, shared, levels, lambda a: [Part(0, a - 1, f)], combine, method=method)
    grad, = torch.autograd.grad(total.sum(), leaf) if f.smooth else (torch.zeros_like(leaf),)
    return total.detach(), grad


def agree(f, scores, shared, levels=2, rel=None):
    "Both ways give the same sums and gradients; the scale is that of each row."
    rel = rel or (2e-10 if scores.dtype == torch.float64 else 5e-6)
    weight = torch.linspace(.5, 2, len(scores), dtype=torch.float64)
    value, grad = sums(f, scores, shared, levels, "loglinear", weight)
    want, slope = sums(f, scores, shared, levels, "direct", weight)
    assert value.isfinite().all() and grad.isfinite().all()
    torch.testing.assert_close(value, want, rtol=rel, atol=rel)
    off = (grad - slope).abs().amax(1)
    assert (off <= rel * slope.abs().amax(1).clamp(min=1.)).all(), (off, slope.abs().amax(1))


def levels_of(shape, levels=2, seed=0):
    return torch.randint(-1, levels + 1, shape, generator=torch.Generator().manual_seed(seed))


def hostile(kind, dtype, f):
    "Rows of scores on which something can go wrong."
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(3, 41, generator=g, dtype=torch.float64)
    one = torch.ones(3, 41, dtype=torch.float64)
    delta = getattr(f, "delta", None) or .05
    rows = {"all equal": .3 * one,
            "two clusters": torch.where(noise > 0, .8, -.1) * one,
            "two clusters, blurred": torch.where(noise > 0, .8, -.1) + 1e-3 * noise.roll(1, 1),
            "multiples of delta": delta * torch.randint(-2, 3, (3, 41), generator=g),
            "narrow": .2 + 1e-3 * noise, "wide": (.2 * noise).clamp(-1, 1),
            "one far away": .01 * noise - .9 * (noise > 2),
            "zeros of both signs": torch.where(noise > 0, 0., -0.) * one,
            "one ulp apart": torch.where(noise > 0, torch.nextafter(.5 * one, one), .5)}
    if kind != "one ulp beside delta": return rows[kind].to(dtype)
    base, low = torch.zeros(3, 41, dtype=dtype), torch.tensor(-1., dtype=dtype)
    edge = torch.tensor(delta, dtype=dtype)
    base[:, 1::4], base[:, 2::4] = edge, torch.nextafter(edge, edge + 1)
    base[:, 3::4] = torch.nextafter(edge, low)
    return base


KINDS = ["all equal", "two clusters", "two clusters, blurred", "multiples of delta", "narrow", "wide", "one far away",
         "zeros of both signs", "one ulp apart", "one ulp beside delta"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SURROGATES)
def test_hostile_scores(name, kind, dtype):
    f = SURROGATES[name]
    scores = hostile(kind, dtype, f)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agree(f, scores, levels_of(scores.shape))


@pytest.mark.parametrize("tau", [1e-4, 1e-3, .004, .01, .1, 1.])
@pytest.mark.parametrize("width", [1e-3, 1., 10., 1e3])
@pytest.mark.parametrize("kind", [Sigmoid, Sup])
def test_every_width_of_the_sigmoid_and_of_the_scores(kind, width, tau):
    "Where the bound cannot hold, the direct way serves; either way nothing overflows."
    scores = torch.rand(4, 60, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * width
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agree(kind(tau), scores, levels_of(scores.shape))


def test_it_serves_the_usual_settings():
    "Cosines of any embeddings with the papers' constants must not fall back."
    scores = torch.linspace(-1, 1, 50).repeat(2, 1)
    for dtype in (torch.float32, torch.float64):
        counts = level_counts(levels_of((2, 50)), 2)
        for f in (Sigmoid(), Sup(), Sup(offset=1., start=0.), Leaky(), Step()):
            assert loglinear.choose(scores.to(dtype), counts, 2, lambda a: [Part(0, a - 1, f)], "loglinear") == [1, 2]


def test_a_narrow_sigmoid_falls_back_and_says_so():
    scores, shared = torch.rand(4, 60), levels_of((4, 60))
    with pytest.warns(UserWarning, match="too narrow.*direct way"):
        agree(Sup(tau=1e-4), scores, shared)


def test_a_surrogate_of_your_own_is_summed_directly():
    "A subclass may be another function, so it is not taken apart either."
    class Half(Sigmoid):
        def __call__(self, x): return super().__call__(x) / 2
        def sums(self, sj, sk, scratch=None):
            total, saved = super().sums(sj, sk, scratch)
            return total / 2, saved
        def derivative(self, saved, scratch=None): return super().derivative(saved, scratch) / 2
    scores, shared = torch.rand(4, 60, dtype=torch.float64), levels_of((4, 60))
    agree(Half(), scores, shared)
    weight = torch.ones(4)
    whole, half = (sums(f, scores, shared, 2, "loglinear", weight) for f in (Sigmoid(), Half()))
    for w, h in zip(whole, half): torch.testing.assert_close(h, w / 2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 5), (2, 700)])
@pytest.mark.parametrize("name", ["Sup", "Sigmoid", "Leaky"])
def test_sizes(name, shape):
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    agree(SURROGATES[name], scores, levels_of(shape))


@pytest.mark.parametrize("shared", [
    pytest.param(lambda l: torch.full_like(l, 0), id="no positive"),
    pytest.param(lambda l: torch.full_like(l, 2), id="only positives"),
    pytest.param(lambda l: torch.full_like(l, -1), id="nothing in the set"),
    pytest.param(lambda l: torch.zeros_like(l).index_fill(1, torch.tensor(7), 2), id="one positive"),
    pytest.param(lambda l: l.to(torch.int8), id="small integers")])
def test_sets(shared):
    scores = torch.rand(4, 60, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    agree(Sup(), scores, shared(levels_of((4, 60))))


LOSSES = ["SmoothAPLoss", "SupAPLoss", "HAPLoss", "SmoothHAPLoss", "SupRecallLoss", "SmoothRecallLoss", "SupNDCGLoss",
          "SmoothNDCGLoss", "PNPLoss"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_whole_losses(name, dtype):
    "300 images of 7 levels in one class of half of them, with ties and unknown labels; half precision is as float32."
    g = torch.Generator().manual_seed(5)
    fine = torch.randint(0, 128, (300,), generator=g).sort().values
    labels = torch.stack([fine // 2**i for i in range(7)], 1)
    labels[::17, 0] = -1
    emb = torch.randn(300, 8, generator=g).to(dtype)
    emb[5] = emb[4]
    found = []
    for method in ("direct", "loglinear"):
        leaf = emb.clone().requires_grad_()
        loss = make_loss(name, method=method)(leaf, labels)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    rel = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=rel, atol=rel)
    assert (found[1][1] - found[0][1]).abs().max() <= rel * found[0][1].abs().max()


def test_second_derivatives_do_not_depend_on_the_way():
    emb = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    labels = torch.arange(40) // 20
    found = []
    for method in ("direct", "loglinear"):
        leaf = emb.clone().requires_grad_()
        loss = make_loss("SupAPLoss", tau=.1, method=method)(leaf, labels)
        first, = torch.autograd.grad(loss, leaf, create_graph=True)
        found.append(torch.autograd.grad((first ** 2).sum(), leaf)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)


def test_auto_takes_the_cheaper_way():
    "Few positives: all pairs. Half of the batch positive: sorted, from a few hundred images on."
    def chosen(n, positives, levels=1):
        shared = torch.zeros(4, n, dtype=torch.long)
        shared[:, :positives] = 1
        parts = lambda a: [Part(0, 0, Sup()), Part(1, 1, Step())]
        return loglinear.choose(torch.rand(4, n), level_counts(shared, levels), levels, parts, "auto")
    assert chosen(4096, 3) == [] and chosen(64, 32) == []
    assert chosen(4096, 2048) == [1]


def test_memory_is_a_few_numbers_for_each_score():
    "The rows are taken in slabs: 2,000 x 2,000 scores with half of them positive keep far below one row's triples."
    from test_losses import LargestTensor
    scores = torch.rand(500, 2000, generator=torch.Generator().manual_seed(7), requires_grad=True)
    shared = torch.zeros(500, 2000, dtype=torch.int8)
    shared[:, ::2] = 1
    with LargestTensor() as mode:
        rank_score(scores, shared, 1, lambda a: [Part(0, 0, Sup())], lambda a, s, rows: (1 / s[0], [-1 / s[0] ** 2]),
                   method="loglinear").sum().backward()
    assert mode.largest <= 3 * 500 * 2000


@pytest.mark.parametrize("delta", [0., .3, 1., 5., 30.])
@pytest.mark.parametrize("error", [1e-7, 1e-11])
def test_the_tail_keeps_its_bound(delta, error):
    "The exponentials beyond delta, against the sigmoid and its derivative."
    y = np.concatenate([np.linspace(0, 4, 4001), np.linspace(4, 60, 500)])
    e, tail = np.exp(-delta - y), loglinear._tail(delta, error)
    assert len(tail) <= 20
    got = [sum(r**d * c * np.exp(-r * y) for r, c in enumerate(tail, 1)) for d in (0, 1)]
    for found, want in zip(got, (e / (1 + e), e / (1 + e) ** 2)): assert np.abs(found - want).max() <= 1.01 * error


@pytest.mark.parametrize("dtype", loglinear.ACCURACY, ids=str)
def test_the_boxes_keep_their_bound(dtype):
    "Sums of one sigmoid and of its derivative between points of any two boxes, relative to their values."
    a = loglinear.ACCURACY[dtype]
    n = 24
    table = loglinear._table(n, a, torch.float64, "cpu").reshape(a.terms, n, 2, a.terms, n).numpy()
    rng = np.random.default_rng(0)
    source, target = rng.uniform(-1, 1, (2, 60))
    source[:2], target[:2] = (-1, 1), (1, -1)
    u = lambda box, y: -a.width * (box + .5) + a.width / 2 * y
    for i, k in np.ndindex(n, n):
        x = u(i, source) - u(k, target)
        e = np.exp(-np.abs(x))
        for function, want in enumerate((np.where(x > 0, 1, e) / (1 + e), e / (1 + e) ** 2)):
            got = np.einsum("ns,st,nt->n", np.vander(source, a.terms, increasing=True), table[:, i, function, :, k],
                            np.vander(target, a.terms, increasing=True))
            assert (np.abs(got - want) <= a.error * want).all(), (i, k, function)
