"""What must hold for every loss on every input.

That is: identities, bounds, invariances, gradients, blocks, number types, corners and bad input.

The inputs are random trees of labels (one to four levels, unknown and unequal classes, single images) and embeddings in
which exact ties are frequent. Every registered loss takes part; `build` makes any of them for a given input."""
import inspect
import math
import re
from dataclasses import dataclass, replace
from unittest import mock

import brute
import numpy as np
import pytest
import torch
from conftest import examples
from hypothesis import assume, given
from hypothesis import strategies as st

from hapnb import losses
from hapnb.helpers import LOSSES
from hapnb.core import EmbeddingLoss, Relevance, shared_levels
from hapnb.losses import (BlackBoxAPLoss, FastAPLoss, HAPLoss, PairLoss, RankLoss, SmoothAPLoss, SmoothHAPLoss,
                          SmoothRecallLoss, SoftBinAPLoss, SupAPLoss,
                          SupNDCGLoss, SupRecallLoss, make_loss)
from hapnb.metrics import evaluate
from hapnb.ranking import Leaky, Part, Sigmoid, Step, Sup, rank_score
from test_losses import DOORS

# other test files register losses of their own
ALL = [n for n in LOSSES.names() if LOSSES.get(n).__module__.startswith("hapnb.")]
every = pytest.mark.parametrize("name", ALL)


# ---------------------------------------------------------------- random inputs

@dataclass
class Data:
    """Embeddings and labels, with or without a reference set; `exact`: all similarities are exact, so ties are ties in
    any order of sums."""
    emb: torch.Tensor
    labels: torch.Tensor
    table: torch.Tensor # labels of every class [C, L], row c for finest class c
    similarity: str
    exact: bool
    ref: torch.Tensor = None
    ref_labels: torch.Tensor = None

    @property
    def refs(self): return {} if self.ref is None else dict(ref_emb=self.ref, ref_labels=self.ref_labels)

    def scores(self):
        unit = (lambda x: torch.nn.functional.normalize(x, dim=1)) if self.similarity == "cosine" else lambda x: x
        return unit(self.emb) @ unit(self.emb if self.ref is None else self.ref).T

    def shared(self): return shared_levels(self.labels, self.labels if self.ref is None else self.ref_labels)


def points(rng, n, dim, kind):
    "Multiples of 1/4 (products and their sums are exact), or normal with every other row a copy, or plainly normal."
    if kind == "lattice":
        x = rng.integers(-4, 5, (n, dim)) / 4
        x[~x.any(1)] = 1.
        return x
    x = rng.standard_normal((n, dim))
    if kind == "copies": x[1::2] = x[rng.integers(0, (n + 1) // 2, n // 2) * 2]
    return x


def fine_classes(rng, n, C, sizes):
    if sizes == "distinct": return np.arange(n) % C
    if sizes == "one": return np.zeros(n, int)
    if sizes == "unequal": return (rng.zipf(1.6, n) - 1) % C
    return rng.integers(0, C, n)


@st.composite
def data(draw, least=1, most=40, kinds=("lattice", "copies", "normal"), refs=None, similarity=None, unknown=True,
         levels=None):
    n, L, kind = draw(st.integers(least, most)), levels or draw(st.integers(1, 4)), draw(st.sampled_from(kinds))
    m = draw(st.integers(1, most)) if (draw(st.booleans()) if refs is None else refs) else 0
    sizes, C = draw(st.sampled_from(("unequal", "even", "distinct", "one"))), draw(st.integers(1, max(n, m)))
    dim = draw(st.integers(1, 3) if kind == "lattice" else st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    table = [np.arange(C)]
    for _ in range(L - 1):
        table.append(rng.integers(0, rng.integers(1, table[-1].max() + 2), table[-1].max() + 1)[table[-1]])
    table = np.stack(table, 1)
    def side(k):
        labels = table[fine_classes(rng, k, C, sizes)]
        for i in np.flatnonzero(rng.random(k) < .2) if hide else []: labels[i, :rng.integers(1, L + 1)] = -1
        return torch.tensor(points(rng, k, dim, kind)), torch.tensor(labels)
    hide = unknown and draw(st.booleans())
    similarity = similarity or ("dot" if kind == "lattice" else draw(st.sampled_from(("cosine", "dot"))))
    return Data(*side(n), torch.tensor(table), similarity, kind == "lattice" and similarity == "dot",
                *(side(m) if m else ()))


def takes(name): return inspect.signature(LOSSES.get(name).__init__).parameters


def build(name, d, dtype=torch.float64, **k):
    """The loss `name` for the classes, dimensions and similarity of `d`; arguments that it does not have are left out;
    no noise."""
    k = dict(similarity=d.similarity, **k)
    if "noise" in takes(name): k.setdefault("margin", 0.)
    if "share" in takes(name): k.setdefault("share", .5)
    if "proxy_labels" in takes(name): k.setdefault("margins", (.3,) * d.labels.shape[1])
    if "hidden" in takes(name): k.setdefault("hidden", 64)
    torch.manual_seed(0)
    return make_loss(name, num_classes=len(d.table), embedding_size=d.emb.shape[1], proxy_labels=d.table,
                     **{a: v for a, v in k.items() if a in takes(name)}).to(dtype)


def run(loss, d, dtype=None):
    "The value, and the gradients of embeddings, references (if any) and parameters; a missing gradient is zero."
    def leaf(x): return None if x is None else (x if dtype is None else x.to(dtype)).clone().requires_grad_()
    q, r = leaf(d.emb), leaf(d.ref)
    value = loss(q, d.labels, ref_emb=r, ref_labels=d.ref_labels)
    leaves = [x for x in (q, r, *loss.parameters()) if x is not None]
    grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
    return value.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads)]


def flat_norms(loss, d):
    """Does a BatchNorm in `loss` see a feature without variance (say, nodes of one class)? It makes 0 of it, a kink of
    the LeakyReLU that follows."""
    least = [1.]
    hooks = [x.register_forward_pre_hook(lambda _, args: least.append(float(args[0].detach().var(0).min())))
             for x in loss.modules()
             if isinstance(x, torch.nn.BatchNorm1d)]
    if hooks: loss(d.emb, d.labels, **d.refs)
    for h in hooks: h.remove()
    return min(least) < 1e-10


JUMPS = (0., .02, .05)  # of the surrogates, as differences of scores; .02 is where the H-rank step reaches one
# margins, and the nodes of both histograms, as scores
KINKS = (.5, .6, .9, *(1 - .2 * np.arange(11)), *np.linspace(-1, 1, 20))


def gap(d):
    "The smallest distance of a score, or of a difference of two scores of a query, to a jump or a kink of any loss."
    s = d.scores().double().numpy()
    off = ~np.eye(s.shape[1], dtype=bool)
    near = [np.abs(s[:, :, None] - s[:, None, :] - j)[:, off].min(initial=1.) for j in JUMPS]
    # 1, whatever happens
    own = np.eye(*s.shape, dtype=bool) if d.ref is None and d.similarity == "cosine" else np.zeros(s.shape, bool)
    return min(*near, *(np.abs(s - k)[~own].min(initial=1.) for k in KINKS))


def same(a, b, rtol=1e-9, atol=1e-11): torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---------------------------------------------------------------- identities

CONSTANTS = {"official": {}, "iNaturalist": dict(start=0., offset=1.), "continuous": dict(offset=None),
             "straight": dict(delta=None, offset=1.),
             "wide": dict(tau=.1, rho=10., delta=.2, offset=None)}
constants = st.sampled_from(list(CONSTANTS.values()))
flat_relevances = st.sampled_from([Relevance(), Relevance("pop", 0.), Relevance("pop", 3.), Relevance("map"),
                                   Relevance("map", weights=(.3,))])


@examples(60)
@given(d=data(levels=1), sup=constants, rel=flat_relevances, hrank=st.booleans())
def test_hap_loss_of_flat_labels_is_supap(d, sup, rel, hrank):
    """Values and gradients, for any constants and relevance; no item is more relevant than another, so the smoothed
    H-rank changes nothing."""
    k = dict(similarity=d.similarity, reduction="none")
    a, da = run(HAPLoss(relevance=rel, with_hrank=hrank, **sup, **k), d)
    b, db = run(SupAPLoss(**sup, **k), d)
    same(a, b), [same(x, y) for x, y in zip(da, db)]
    (a, da), (b, db) = (run(loss, d) for loss in (SmoothHAPLoss(relevance=rel, **k), SmoothAPLoss(**k)))
    same(a, b), [same(x, y) for x, y in zip(da, db)]


@examples(40)
@given(d=data(least=2, levels=1), rel=flat_relevances)
def test_hap_metric_of_flat_labels_is_ap(d, rel):
    got = evaluate(d.emb, d.labels, relevance=rel, metrics=["AP", "H-AP"], per_query=True)["per_query"]
    np.testing.assert_allclose(got["H-AP"], got["AP_level0"], rtol=0, atol=1e-12)  # NaN at the same places too


def level_weights(L, seed):
    "Weights w_1..w_L, coarsest first, some of them 0."
    w = np.random.default_rng(seed).integers(0, 4, L) / 8
    return tuple(w if w.any() else w + 1)


def mean_over_levels(values, there, w):
    """The mean of the level values [Q, L] (column 0 finest) with weights `w` (coarsest first) over the levels where a
    query has a positive."""
    w = torch.tensor(w, dtype=torch.float64).flip(0) * there
    return (torch.where(there, values, 0.) * w).sum(1) / w.sum(1)


@examples(60)
@given(d=data(), seed=st.integers(0, 999))
def test_map_hap_metric_is_the_weighted_mean_of_level_aps(d, seed):
    "With queries that are no part of the gallery the identity is exact, query by query."
    if d.ref is None: d = replace(d, ref=d.emb, ref_labels=d.labels)
    L = d.labels.shape[1]
    w = level_weights(L, seed)
    m = evaluate(d.ref, d.ref_labels, d.emb.clone(), d.labels, relevance=Relevance("map", weights=w),
                 metrics=["AP", "H-AP"], per_query=True, exclude_self=False)["per_query"]
    level = torch.tensor(np.stack([m[f"AP_level{l}"] for l in range(L)], 1))
    want, got = mean_over_levels(level, ~level.isnan(), w), torch.tensor(m["H-AP"])
    there = ~want.isnan()  # some level with a weight has a positive
    same(got[there], want[there], 0, 1e-12)


@examples(60)
@given(d=data(), seed=st.integers(0, 999))
def test_map_hap_loss_is_the_weighted_mean_of_level_losses(d, seed):
    """With the exact step: H-AP of AP, and both of brute force. With sigmoids everywhere: Smooth-HAP of Smooth-AP,
    gradients as well."""
    L, k = d.labels.shape[1], dict(similarity=d.similarity, reduction="none")
    w = level_weights(L, seed)
    there = torch.stack([(d.shared() >= L - l).any(1) for l in range(L)], 1)
    def check(whole, single):
        values, grads = zip(*(run(single(l), d) for l in range(L)))
        want, got = mean_over_levels(torch.stack(values, 1), there, w), run(whole, d)
        ok = ~want.isnan()
        same(got[0][ok], want[ok]), (not got[0][~ok].any()) or pytest.fail("a query that does not count has a value")
        return values
    def exact(loss):
        loss.f = Step()
        return loss
    values = check(exact(HAPLoss(relevance=Relevance("map", weights=w), **k)), lambda l: exact(SupAPLoss(level=l, **k)))
    s = d.scores().tolist()
    hand, _ = brute.hap(s, (d.shared() >= L).long().tolist(), (d.shared() >= L).double().tolist(),
                        lambda x: (float(x >= 0), 0.))
    if d.exact: assert values[0].tolist() == pytest.approx([v or 0. for v in hand], rel=1e-9, abs=1e-12)
    check(SmoothHAPLoss(relevance=Relevance("map", weights=w), **k), lambda l: SmoothAPLoss(level=l, **k))
    lowest = there[:, [l for l in range(L) if w[L - 1 - l]]].any(1)
    # every level has a positive for every query: the gradients are the same mean
    if there[lowest].all() and lowest.any():
        g = [run(SmoothAPLoss(level=l, similarity=d.similarity), d)[1] for l in range(L)]
        for i, got in enumerate(run(SmoothHAPLoss(relevance=Relevance("map", weights=w), similarity=d.similarity),
                                    d)[1]):
            if lowest.all(): same(got, sum(w[L - 1 - l] * g[l][i] for l in range(L)) / sum(w), 1e-8, 1e-10)


# ---------------------------------------------------------------- bounds

def says_unit_interval(name):
    "Does the docstring say that the value lies in 0..1, itself or by its 'contracts as'?"
    doc = LOSSES.get(name).__doc__
    other = re.search(r"contracts\s+as\s+`(\w+)`", doc)
    return bool(re.search(r"0\.\.1|\[0, 1\]", doc)) or bool(other) and says_unit_interval(other[1])

UNIT = [n for n in ALL if says_unit_interval(n)]


def test_the_losses_that_promise_the_unit_interval():
    assert {"SmoothAPLoss", "SupAPLoss", "HAPLoss", "SmoothHAPLoss", "SupRecallLoss", "SupNDCGLoss", "SmoothNDCGLoss",
            "FastAPLoss", "SoftBinAPLoss"} <= set(UNIT)


def level_ties(d):
    "Do two positives of different levels of some query have the same score, up to rounding?"
    s, l = d.scores(), d.shared()
    pair = (s[:, :, None] - s[:, None, :]).abs() < 1e-9
    return bool((pair & (l[:, :, None] > l[:, None, :]) & (l[:, None, :] > 0)).any())


relevances = st.sampled_from([Relevance(), Relevance("pop", .2), Relevance("pop", 3.), Relevance("map")])


@pytest.mark.parametrize("name", UNIT)
@examples(40)
@given(d=data(), sup=constants, tau=st.sampled_from((.01, .1, 1.)), T=st.sampled_from((.1, .5, 1.)), rel=relevances,
       bins=st.integers(2, 30))
def test_losses_lie_in_the_unit_interval(name, d, sup, tau, T, rel, bins):
    """Each query's value. H-AP may fall below 0 where positives of two levels tie, or nearly tie and start is 0, but
    never below -1."""
    loss = build(name, d, reduction="none", temperature=T, relevance=rel, num_bins=bins,
                 **{"tau": tau, **(sup if "start" in takes(name) else {})})
    value, grads = run(loss, d)
    least = -1. if name == "HAPLoss" and (sup.get("start", .5) < .5 or level_ties(d)) else 0.
    assert least - 1e-12 <= value.min() and value.max() <= 1 + 1e-12
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("rel, levels", [("pop", 2), ("map", 3)])
def test_hap_loss_of_tied_levels_can_be_negative(rel, levels):
    """A coarse item at a tie counts 1 in the hierarchical rank, but only 1/2 in the rank; worth more than half of a
    fine one, it wins."""
    fine = [[0] * levels] * (1 if rel == "pop" else 10)
    coarse = [[1] + [0] * (levels - 1)]
    y = torch.tensor(fine + coarse)
    y = torch.cat([y, y[:1]]) if rel == "pop" else y
    emb = torch.ones(len(y), 2, dtype=torch.float64)
    value = HAPLoss(relevance=rel, reduction="none")(emb, y)
    hand = brute.hap([[1.] * len(y)] * len(y), shared_levels(y).tolist(),
                     Relevance(rel)(shared_levels(y), levels).tolist(), brute.sup_step)[0]
    assert value.tolist() == pytest.approx(hand) and min(hand) < -.01


def test_smooth_recall_of_tied_positives_can_be_negative():
    "Twelve tied positives have smooth rank 6.5 each, so more than eight of them are within the first eight."
    emb, y = torch.ones(12, 2, dtype=torch.float64), torch.zeros(12, dtype=torch.long)
    assert SmoothRecallLoss(ks=8)(emb, y).item() == pytest.approx(1 - 12 / (1 + math.exp(-1.5)) / 8)
    assert SmoothRecallLoss(ks=8)(emb, y) < 0
    assert 0 <= SupRecallLoss(ks=8)(emb, y) <= 1


def perfect(d):
    """Replace the embeddings: the similarity of two images is the share of levels that they share, plus a little that
    breaks ties."""
    def place(labels, first):
        L = labels.shape[1]
        x = torch.zeros(len(labels), L, 200, dtype=torch.float64)
        # an unknown class is like no other
        labels = torch.where(labels < 0, first + torch.arange(len(labels))[:, None], labels)
        x.scatter_(2, labels[:, :, None], L**-.5)
        return x.flatten(1)
    parts = [(d.labels, 80)] + ([(d.ref_labels, 130)] if d.ref is not None else [])
    emb = [place(*p) for p in parts]
    g = torch.Generator().manual_seed(0)
    def shaken(x): return x + 1e-3 * torch.randn(x.shape, generator=g, dtype=torch.float64)
    new = shaken(emb[0])
    refs = {} if d.ref is None else dict(ref=shaken(emb[1]))
    return replace(d, emb=new, similarity="cosine", exact=False, **refs)


# the smooth losses at their limit; more ks than images
SHARP = {"tau": 1e-12, "temperature": 1e-3, "ks": (50, 60), "num_bins": 2000, "eps": 0.}
PERFECT = [n for n in ALL if issubclass(LOSSES.get(n), (RankLoss, FastAPLoss, SoftBinAPLoss, BlackBoxAPLoss))]


@pytest.mark.parametrize("name", PERFECT)
@examples(15)
@given(d=data())
def test_perfect_ranking_gives_zero(name, d):
    """H-AP: as far as closer levels are worth more to a query ('map': always; 'pop' may value a rare coarse item above
    a common fine one)."""
    d = perfect(d)
    for rel in (Relevance("map"), Relevance()):
        value, _ = run(build(name, d, reduction="none", relevance=rel, **SHARP), d)
        if "relevance" in takes(name) and rel.kind == "pop":
            shared = d.shared()
            table = [{int(l): float(r) for l, r in zip(*row) if l > 0}
                     for row in zip(shared, rel(shared, d.labels.shape[1]))]
            value = value[[sorted(t.values()) == [t[l] for l in sorted(t)] for t in table]]
        assert (value.abs() <= (1e-2 if "num_bins" in takes(name) else 1e-6)).all(), value


@pytest.mark.parametrize("name", PERFECT)
def test_well_separated_classes_give_nearly_zero(name):
    "With the default constants: four classes of five images at right angles."
    emb, y = torch.eye(4, dtype=torch.float64).repeat_interleave(5, 0), torch.arange(4).repeat_interleave(5)
    emb = emb + 1e-4 * torch.randn(emb.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = build(name, Data(emb, y[:, None], torch.arange(4)[:, None], "cosine", False))(emb, y)
    # a soft cut counts what stands exactly at k half; five smooth ranks of tied positives all lie in the middle, 3,
    # where NDCG pays less
    assert -1e-12 <= value <= (.35 if "Recall" in name else .16 if name == "SmoothNDCGLoss" else 2e-3)


TIE = 1e-13


class HalfStep(Step):
    """The step with 1/2 at zero: a tie is half above. Copies may differ in the last bit of their scores; they are ties
    too."""
    def sums(self, sj, sk, scratch=None):
        return ((sj - sk > TIE).to(sj.dtype) + .5 * ((sj - sk).abs() <= TIE)).sum(-1), None


STRICT = [dict(), dict(offset=None), dict(delta=None, offset=1.), dict(start=1., offset=None),
          dict(start=.5, offset=1., rho=0.),
          dict(tau=1., rho=5., delta=.5, offset=None)]
BOUNDS = (SupAPLoss, HAPLoss, SupRecallLoss, SupNDCGLoss)


@pytest.mark.parametrize("cls", BOUNDS)
@examples(60)
@given(d=data(), sup=st.sampled_from(STRICT))
def test_strict_constants_bound_the_step_loss_from_above(cls, d, sup):
    """H^- is at least the step for all x but 0 where start is 1/2 or more and the value above delta 1 or more.

    At 0 it is 1/2: with ties it bounds the loss that counts a tie with a lower level half; without, the true loss."""
    loss, half, true = (cls(**sup, similarity=d.similarity, reduction="none") for _ in range(3))
    half.f, true.f = HalfStep(), Step()
    bound, half, true = (run(x, d)[0] for x in (loss, half, true))
    assert (bound >= half - 1e-9).all()
    s, l = d.scores(), d.shared()
    tied = (((s[:, :, None] - s[:, None, :]).abs() <= TIE) & (l[:, :, None] > l[:, None, :])).flatten(1).any(1)
    assert (bound >= true - 1e-12)[~tied].all()


@pytest.mark.parametrize("cls", BOUNDS)
@examples(40)
@given(d=data(), sup=st.sampled_from(STRICT))
def test_strict_bounds_the_true_loss_at_ties_too(cls, d, sup):
    loss, true = (cls(**sup, similarity=d.similarity, reduction="none", strict=True) for _ in range(2))
    true.f = Step()
    bound, true = (run(x, d)[0] for x in (loss, true))
    assert (bound >= true - 1e-12).all()


def exactly(loss):
    loss.f = Step()
    return loss


@pytest.mark.parametrize("sup", CONSTANTS.values(), ids=CONSTANTS)
@pytest.mark.parametrize("cls", [SupAPLoss, HAPLoss])
def test_at_ties_the_official_surrogate_is_no_upper_bound(cls, sup):
    """One positive and one negative with the same score: the surrogate's AP is 2/3, the true one 1/2. No choice of
    constants changes that, only strict=True does."""
    q, ref = torch.ones(1, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    y = dict(ref_labels=torch.tensor([0, 1]))
    assert cls(**sup)(q, [0], ref_emb=ref, **y).item() == pytest.approx(1 - 2 / 3)
    assert exactly(cls(**sup))(q, [0], ref_emb=ref, **y).item() == pytest.approx(1 - 1 / 2)


def test_with_start_0_the_surrogate_is_no_upper_bound_near_ties():
    "The constants for iNaturalist: a negative that is .001 above counts sigmoid(.1), the official default 1 more half."
    q, ref, y = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[.5], [.501]],
                                                                    dtype=torch.float64), torch.tensor([0, 1])
    def value(loss): return loss(q, [0], ref_emb=ref, ref_labels=y).item()
    s = 1 / (1 + math.exp(-.1))
    inat, released = value(SupAPLoss(start=0., offset=1., similarity="dot")), value(SupAPLoss(similarity="dot"))
    true = value(exactly(SupAPLoss(similarity="dot")))
    assert (inat, released, true) == pytest.approx((1 - 1 / (1 + s), 1 - 1 / (1.5 + s), 1 / 2))
    assert inat < true < released


# ---------------------------------------------------------------- invariances

def check_same(loss_a, a, loss_b, b, rows=None, back=None):
    """Values and gradients of two inputs agree; `rows`: where each query of `a` stands in `b`; `back`: takes b's
    gradients to a's."""
    (va, ga), (vb, gb) = run(loss_a, a), run(loss_b, b)
    if va.ndim and rows is not None: vb = vb[rows]
    same(va, vb, 1e-8, 1e-10)
    if flat_norms(loss_a, a): return
    for x, y in zip(ga, back(gb) if back else gb):
        same(x, y, 1e-7, 1e-8 * max(1., float(x.abs().max()) if x.numel() else 1.))


@every
@examples(16)
@given(d=data(kinds=("lattice", "lattice", "normal")), seed=st.integers(0, 999))
def test_order_of_the_batch_does_not_matter(name, d, seed):
    if not d.exact: assume(gap(d) > 1e-9)
    g = torch.Generator().manual_seed(seed)
    p, r = torch.randperm(len(d.emb), generator=g), None if d.ref is None else torch.randperm(len(d.ref), generator=g)
    moved = replace(d, emb=d.emb[p], labels=d.labels[p],
                    **({} if r is None else dict(ref=d.ref[r], ref_labels=d.ref_labels[r])))
    def back(grads):
        return [grads[0][p.argsort()], *([] if r is None else [grads[1][r.argsort()]]), *grads[1 if r is None else 2:]]
    # HMLC's official form takes the first image of each class
    loss = build(name, d, reduction="none", one_per_class=False)
    check_same(loss, d, loss, moved, p.argsort(), back)


@every
@examples(16)
@given(d=data(), seed=st.integers(0, 999))
def test_names_of_classes_do_not_matter(name, d, seed):
    """Any injective renaming of each level; learned vectors follow their classes, which must stay 0..C-1 where they are
    counted."""
    rng, C = np.random.default_rng(seed), len(d.table)
    learned = "num_classes" in takes(name)
    new = [torch.tensor(rng.permutation(C) if learned and l == 0 else rng.choice(10**6, C, replace=False))
           for l in range(d.labels.shape[1])]
    def rename(y):
        return None if y is None else torch.stack([torch.where(c >= 0, n[c.clamp(min=0)], -1) for c,
                                                   n in zip(y.T, new)], 1)
    other = replace(d, labels=rename(d.labels), ref_labels=rename(d.ref_labels), table=rename(d.table))
    a, b = build(name, d, reduction="none"), build(name, other, reduction="none")
    b.load_state_dict({k: v for k, v in a.state_dict().items() if k != "proxy_labels"}, strict=False)
    if not learned: return check_same(a, d, b, other)
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters()):
            if p.shape[0] == C: q[new[0]] = p
    k = 1 if d.ref is None else 2
    check_same(a, d, b, other, back=lambda g: [*g[:k], *(x[new[0]] if x.shape[0] == C else x for x in g[k:])])


@pytest.mark.parametrize("name", [n for n in ALL if "similarity" in takes(n)])
@examples(16)
@given(d=data(kinds=("lattice", "normal")), seed=st.integers(0, 999))
def test_rotation_of_the_embeddings_does_not_matter(name, d, seed):
    """Any orthogonal matrix away from ties; with exact ties, turns by right angles and mirrors, which keep them.
    Learned vectors turn too."""
    rng, D = np.random.default_rng(seed), d.emb.shape[1]
    turn = torch.tensor(np.eye(D)[rng.permutation(D)] * rng.choice((-1., 1.), D)
                        if d.exact else np.linalg.qr(rng.standard_normal((D, D)))[0])
    if not d.exact: assume(gap(d) > 1e-9)
    other = replace(d, emb=d.emb @ turn, ref=None if d.ref is None else d.ref @ turn)
    a, b = build(name, d, reduction="none"), build(name, other, reduction="none")
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters()): q.copy_(p @ turn if p.ndim == 2 else p)
    check_same(a, d, b, other, back=lambda g: [x @ turn.T if x.ndim == 2 else x for x in g])


@pytest.mark.parametrize("name", [n for n in ALL if "similarity" in takes(n)])
@examples(12)
@given(d=data(similarity="cosine"), seed=st.integers(0, 999))
def test_length_of_each_embedding_does_not_matter_for_cosine(name, d, seed):
    "Powers of two, so that not even a rounding changes and every tie stays; gradients shrink as the embeddings grow."
    rng = np.random.default_rng(seed)
    by, rby = (torch.tensor(2. ** rng.integers(-20, 21, (n, 1)))
               for n in (len(d.emb), 0 if d.ref is None else len(d.ref)))
    loss = build(name, d, reduction="none")
    other = replace(d, emb=d.emb * by, ref=None if d.ref is None else d.ref * rby)
    check_same(loss, d, loss, other,
               back=lambda g: [g[0] * by, *([] if d.ref is None else [g[1] * rby]), *g[1 if d.ref is None else 2:]])


# ---------------------------------------------------------------- gradients

VARIANTS = {n: {} for n in ALL} | {
    "SupAPLoss, continuous": dict(offset=None), "SupAPLoss, iNaturalist": dict(start=0., offset=1.),
    "SupAPLoss, straight": dict(delta=None, offset=.5),
    "HAPLoss, H-rank": dict(with_hrank=True), "HAPLoss, map": dict(relevance="map"),
    "HAPLoss, map, H-rank": dict(relevance="map", with_hrank=True),
    "HAPLoss, iNaturalist": dict(start=0., offset=1.), "SmoothHAPLoss, map": dict(relevance="map"),
    "SupRecallLoss, one k": dict(ks=2, temperature=.5),
    "CalibrationLoss, all": dict(average="all"), "AMSoftmaxLoss, plain": dict(plain=True),
    "HAPPIERLoss, H-rank": dict(with_hrank=True, lam=.5)}
SLOPED = [n for n in VARIANTS if not n.startswith("BlackBox")]  # whose gradient is no derivative: see below


@pytest.mark.parametrize("name", SLOPED)
@examples(10)
@given(d=data(most=10, kinds=("normal",)), seed=st.integers(0, 999))
def test_gradients_are_finite_differences(name, d, seed):
    """Central differences in float64 along random directions, for embeddings, references and parameters, at least 1e-5
    away from every kink."""
    h = 1e-6
    assume(gap(d) > 1e-5)
    loss, g = build(name.split(",")[0], d, **VARIANTS[name]), torch.Generator().manual_seed(seed)
    assume(not flat_norms(loss, d))
    _, grads = run(loss, d)
    for at in range(len(grads)):
        v = torch.randn(grads[at].shape, generator=g, dtype=torch.float64)
        v = v / v.norm()
        def shifted(t):
            moved = d
            if at == 0: moved = replace(d, emb=d.emb + t * v)
            elif at == 1 and d.ref is not None: moved = replace(d, ref=d.ref + t * v)
            if moved is not d: return loss(moved.emb, d.labels, **moved.refs).item()
            p = [*loss.parameters()][at - (1 if d.ref is None else 2)]
            with torch.no_grad():
                old = p.clone()
                p.add_(t * v)
            value = loss(d.emb, d.labels, **d.refs).item()
            with torch.no_grad(): p.copy_(old)
            return value
        found = (shifted(h) - shifted(-h)) / (2 * h)
        assert found == pytest.approx(float((grads[at] * v).sum()), rel=1e-5,
                                      abs=2e-6 * max(1., float(grads[at].norm()))), f"leaf {at}"


@examples(60)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 12), lam=st.sampled_from((.1, 4., 50.)))
def test_blackbox_is_flat_and_its_gradient_pushes_the_right_way(seed, n, lam):
    """The value does not move with the scores; the gradient lifts positives, sinks negatives, and moves as much up as
    down."""
    rng = np.random.default_rng(seed)
    ref = torch.tensor(rng.standard_normal((n, 1)), requires_grad=True)
    y, q = torch.tensor(rng.integers(0, 2, n)), torch.ones(1, 1, dtype=torch.float64)
    loss = BlackBoxAPLoss(lam, margin=0., similarity="dot")
    value = loss(q, [0], ref_emb=ref, ref_labels=y)
    value.backward()
    near = np.diff(np.sort(ref.detach()[:, 0])).min(initial=1.)
    moved = loss(q, [0], ref_emb=ref.detach() + near / 3 * torch.tensor(rng.choice((-1., 1.), (n, 1))), ref_labels=y)
    assert moved == value
    g = ref.grad[:, 0]
    assert (g[y == 0] <= 0).all() and (g[y == 1] >= 0).all() and abs(g.sum()) < 1e-12


# ---------------------------------------------------------------- the engine

SURROGATES = [Step(), Sigmoid(.01), Sigmoid(.3), Sup(), Sup(start=0., offset=1.), Sup(offset=None),
              Sup(delta=None, offset=.5), Sup(.2, 3., .4, None, .5),
              Leaky(), Leaky(2., .1, 3.), Leaky(25., 1.5, 0.)]


def by_hand(f, x):
    "Value and derivative of a surrogate, without the library."
    if isinstance(f, Sigmoid): return brute.smooth_step(x, f.tau)
    if isinstance(f, Sup): return brute.sup_step(x, f.tau, f.rho, f.delta, f.offset, f.start)
    if isinstance(f, Leaky): return brute.hrank_step(x, f.beta, f.gamma, f.leak)
    return float(x >= 0), 0.


@dataclass
class Layout:
    """What the engine is asked for: scores, levels, and for each level which surrogates are summed over which levels,
    and their weights."""
    scores: torch.Tensor
    shared: torch.Tensor
    levels: int
    of: dict # level -> list of (Part, weight, does its derivative count?)
    worth: torch.Tensor # [Q, levels + 1]
    ties: bool # on a kink autograd chooses a derivative

    def parts(self, a): return [p for p, _, _ in self.of[a]]

    def combine(self, a, sums, rows):
        "worth * sin(weighted sum): neither linear nor positive, so that every factor of the chain rule matters."
        u, w = sum(c * s for (_, c, _), s in zip(self.of[a], sums)), self.worth[rows, a, None]
        return w * u.sin(), [w * c * u.cos() if sloped else None for _, c, sloped in self.of[a]]

    def engine(self, block=None):
        s = self.scores.clone().requires_grad_()
        value = rank_score(s, self.shared, self.levels, self.parts, self.combine, block)
        return value.detach(), torch.autograd.grad(value.sum(), s)[0]

    def cube(self):
        s = self.scores.clone().requires_grad_()
        x, total = s[:, None, :] - s[:, :, None], 0.  # [query, positive, other]
        for a in range(1, self.levels + 1):
            sums = [(p.f(x) * ((self.shared >= p.low) & (self.shared <= p.high))[:, None, :]).sum(-1)
                    for p in self.parts(a)]
            sums = [t if sloped else t.detach() for t, (_, _, sloped) in zip(sums, self.of[a])]
            total = total + (self.combine(a, sums, slice(None))[0] * (self.shared == a)).sum(1)
        return total.detach(), torch.autograd.grad(total.sum(), s)[0] if total.requires_grad else torch.zeros_like(s)

    def loops(self):
        values, grads = [], []
        for q, (s, l) in enumerate(zip(self.scores.tolist(), self.shared.tolist())):
            value, g = 0., [0.] * len(s)
            for k in range(len(s)):
                if l[k] < 1: continue
                u, pulls = 0., []
                for p, c, sloped in self.of[l[k]]:
                    for j in range(len(s)):
                        if not p.low <= l[j] <= p.high: continue
                        f, d = by_hand(p.f, s[j] - s[k])
                        u += c * f
                        if sloped: pulls.append((j, c * d))
                w = float(self.worth[q, l[k]])
                value += w * math.sin(u)
                for j, d in pulls:
                    g[j] += w * math.cos(u) * d
                    g[k] -= w * math.cos(u) * d
            values.append(value), grads.append(g)
        return torch.tensor(values, dtype=torch.float64), torch.tensor(grads, dtype=torch.float64)


@st.composite
def layouts(draw, most=12):
    """Random levels (-1: not in the set; no tree is needed), and one to four parts a level, which may overlap, find
    nothing, or go beyond the levels."""
    Q, N, L, lattice = draw(st.integers(1, 8)), draw(st.integers(1, most)), draw(st.integers(1, 4)), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.integers(-4, 5, (Q, N)) / 4 if lattice else rng.standard_normal((Q, N)) * rng.choice((.02, .3))
    if draw(st.booleans()): shared = rng.integers(-1, L + 1, (Q, N))
    else: shared = rng.choice((0, rng.integers(-1, L + 1)), (Q, N), p=(.8, .2))
    def part():
        low = int(rng.integers(0, L + 1))
        f = SURROGATES[rng.integers(len(SURROGATES))]
        return Part(low, int(rng.integers(low, L + 2)), f), float(rng.uniform(-.2, .2)), bool(rng.random() < .8)
    of = {a: [part() for _ in range(rng.integers(1, 5))] for a in range(1, L + 1)}
    return Layout(torch.tensor(scores), torch.tensor(shared), L, of, torch.tensor(rng.uniform(-1, 1, (Q, L + 1))),
                  lattice)


@examples(250)
@given(lay=layouts())
def test_engine_is_the_cube_is_the_loops(lay):
    """Values and gradients; at exact ties the cube's gradient is autograd's, which chooses its own on a kink, so
    there the loops alone decide."""
    got, cube, loops = lay.engine(), lay.cube(), lay.loops()
    for what, a, b, c in zip(("value", "gradient"), got, cube, loops):
        tol = dict(rtol=1e-9, atol=1e-9 * max(1., float(c.abs().max())))
        same(a, c, **tol)
        if what == "value" or not lay.ties: same(b, c, **tol)


def test_a_part_without_levels_sums_nothing():
    "low <= level <= high has no solution where high is below low."
    s, levels = torch.tensor([[.1, .5, .3]], dtype=torch.float64), torch.tensor([[0, 1, 1]])
    def share(a, sums, rows): return 1 / (1 + sums[0] + sums[1]), [-1 / (1 + sums[0] + sums[1])**2] * 2
    one, two = (rank_score(s, levels, 1, lambda a: [Part(0, 0, Sigmoid()), *more], c) for more, c in (
        ([Part(1, 0, Sigmoid())], share), ([], lambda a, sums, rows: (1 / (1 + sums[0]), [-1 / (1 + sums[0])**2]))))
    same(one, two)


@pytest.mark.parametrize("f", [Step(), Sigmoid(.1), Sup(), Leaky()], ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_engine_sums_half_precision_in_float32(dtype, f):
    g = torch.Generator().manual_seed(0)
    s, shared = torch.rand(6, 40, generator=g).to(dtype), torch.randint(-1, 2, (6, 40), generator=g)
    def share(a, sums, rows): return 1 / (1 + sums[0]), [-1 / (1 + sums[0])**2]
    def run(x):
        x = x.clone().requires_grad_()
        value = rank_score(x, shared, 1, lambda a: [Part(0, 0, f)], share)
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]
    (value, grad), (want, truth) = run(s), run(s.float())
    assert value.dtype == torch.float32 and torch.equal(value, want) and torch.equal(grad, truth.to(dtype))


@examples(150)
@given(lay=layouts(most=40), block=st.one_of(st.integers(1, 64), st.integers(65, 5000), st.just(2**40)))
def test_blocked_is_unblocked(lay, block):
    "For any block size, to 1e-12."
    for a, b in zip(lay.engine(block), lay.engine(2**62)): same(a, b, 0, 1e-12 * max(1., float(b.abs().max())))


@pytest.mark.parametrize("name", [n for n in ALL if issubclass(LOSSES.get(n), RankLoss)])
@examples(12)
@given(d=data(), block=st.integers(1, 2000))
def test_blocked_is_unblocked_for_every_rank_loss(name, d, block):
    def blocked(size):
        with mock.patch.object(losses, "rank_score", lambda *a,
                               **k: rank_score(*a, **k, block=size)): return run(build(name, d, reduction="none"), d)
    (a, ga), (b, gb) = blocked(block), blocked(2**62)
    same(a, b, 0, 1e-12)
    for x, y in zip(ga, gb): same(x, y, 0, 1e-12 * max(1., float(y.abs().max())))


QUERY_LOSSES = RankLoss, FastAPLoss, SoftBinAPLoss, BlackBoxAPLoss, PairLoss
BY_QUERY = [n for n in ALL if issubclass(LOSSES.get(n), QUERY_LOSSES)]


@pytest.mark.parametrize("name", BY_QUERY)
@examples(12)
@given(d=data(most=14, refs=True), seed=st.integers(0, 999))
def test_pairs_left_out_are_not_there(name, d, seed):
    """A memory's pairs may leave out one reference a query, its own copy; the query then has the value and gradients
    that it has without it."""
    if not d.exact: assume(gap(d) > 1e-9)
    rng = np.random.default_rng(seed)
    own = torch.tensor([int(rng.integers(-1, len(d.ref))) for _ in d.emb])  # -1: no copy in the memory
    kept = torch.arange(len(d.ref)) != own[:, None]
    assume(kept.any(1).all())
    positive = (d.labels[:, None, 0] == d.ref_labels[None, :, 0]) & kept
    pairs = (*positive.nonzero(as_tuple=True), *(kept & ~positive).nonzero(as_tuple=True))
    q, r, loss = d.emb.clone().requires_grad_(), d.ref.clone().requires_grad_(), build(name, d, reduction="none")
    value = loss(q, d.labels, pairs, ref_emb=r, ref_labels=d.ref_labels)
    gq, gr = torch.autograd.grad(value.sum(), (q, r), allow_unused=True)
    total = torch.zeros_like(r)
    for i in range(len(q)):
        one, (g1, g2) = run(loss,
                            replace(d, emb=d.emb[i:i + 1], labels=d.labels[i:i + 1], ref=d.ref[kept[i]],
                                    ref_labels=d.ref_labels[kept[i]]))
        same(value.detach()[i], one[0])
        # the gradient of BlackBox-AP is that of the mean, and so depends on the number of queries
        if name == "BlackBoxAPLoss": continue
        same(gq[i], g1[0], 1e-8, 1e-9)
        total[kept[i]] += g2
    if name != "BlackBoxAPLoss": same(gr, total, 1e-8, 1e-8)


# ---------------------------------------------------------------- number types

# how far a gradient may be off, of the largest
TYPES = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@every
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@examples(8)
@given(d=data(most=14))
def test_short_floats_stay_finite_and_close(name, dtype, d):
    """Against float64 on the same numbers: values to 1e-4, gradients to the rounding of their type; with ties
    everywhere and in autocast, finite."""
    d = replace(d, emb=d.emb.to(dtype).double(), ref=None if d.ref is None else d.ref.to(dtype).double())
    wide, short = build(name, d), build(name, d, torch.float32)
    short.load_state_dict(wide.state_dict())
    (value, grads), (want, truth) = run(short, d, dtype), run(wide, d)
    assert value.dtype == torch.float32 and value.isfinite() and all(g.isfinite().all() for g in grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert short(d.emb.to(dtype), d.labels,
                     **replace(d, ref=None if d.ref is None else d.ref.to(dtype)).refs) == value
    if not d.exact and gap(d) < 1e-5: return  # beside a jump the last bit decides
    assert value.item() == pytest.approx(want.item(), rel=1e-4, abs=1e-5)
    # ranks after a shift; items on a kink
    if name == "BlackBoxAPLoss" or (d.exact and "num_bins" in takes(name)) or flat_norms(wide, d): return
    for x, g, t in zip([x for x in (d.emb, d.ref, *wide.parameters()) if x is not None], grads, truth):
        # normalising short vectors enlarges the roundings of gradients
        shortest = min(1., float(x.detach().norm(dim=1).min())) if x.ndim == 2 else 1.
        assert (g.double() - t).abs().max() <= TYPES[dtype] * float(t.abs().max()) + 1e-4 / shortest


# ---------------------------------------------------------------- corners

def corner(n, labels, emb):
    g = torch.Generator().manual_seed(n)
    x = {"equal": torch.full((n, 3), .7), "opposite": torch.full((n, 3), .7) * (1 - 2 * (torch.arange(n) % 2))[:, None],
         "random": torch.randn(n, 3, generator=g)}[emb]
    y = {"one class": torch.zeros(n, 2), "all distinct": torch.stack([torch.arange(n), torch.zeros(n)], 1),
         "unknown": torch.full((n, 2), -1.),
         "half unknown": torch.where(torch.arange(n)[:, None] % 2 == 0, torch.tensor([0., 0.]),
                                     torch.tensor([-1., 0.]))}[labels].long()
    return Data(x, y, torch.stack([torch.arange(max(n, 2)), torch.zeros(max(n, 2)).long()], 1), "cosine", False)


@every
@pytest.mark.parametrize("labels", ["one class", "all distinct", "unknown", "half unknown"])
def test_corners_are_finite(name, labels):
    "One, two and nine images; all embeddings equal, opposite or random; against themselves, one reference, and two."
    for n in (1, 2, 9):
        for emb in ("equal", "opposite", "random"):
            d = corner(n, labels, emb)
            for m, reduction in ((0, "mean"), (0, "none"), (1, "mean"), (2, "none")):
                e = replace(d, ref=corner(m, "one class", emb).emb,
                            ref_labels=corner(m, "one class", emb).labels) if m else d
                value, grads = run(build(name, e, torch.float32, reduction=reduction), e)
                assert value.isfinite().all() and all(g.isfinite().all() for g in grads), (n, emb, m)
                assert value.shape == (() if reduction == "mean" or "reduction" not in takes(name) else (n,))


@pytest.mark.parametrize("name", [n for n in ALL if issubclass(LOSSES.get(n), RankLoss)])
def test_one_class_or_the_query_alone_is_perfect(name):
    "Rank losses have nothing to improve where all images are of one class, or where the query finds itself alone."
    # tied positives share a rank, so a cut beyond them all
    if "Recall" in name or "NDCG" in name: k = dict(ks=(50,), temperature=1e-3)
    else: k = {}
    for n in (1, 2, 9):
        one = corner(n, "one class", "random")
        alone = replace(one, labels=torch.arange(n)[:, None].expand(n, 2), emb=torch.eye(n))
        for d in (one, alone):
            if "NDCG" in name:
                random = torch.randn(n, 3, generator=torch.Generator().manual_seed(1)).double()
                d = replace(d, emb=random if d is one else d.emb.double())
            value = build(name, d, tau=1e-9, reduction="none", **k)(d.emb.double(), d.labels)
            assert value.abs().max() < 1e-6


# ---------------------------------------------------------------- bad input

TREE = torch.stack([torch.arange(6), torch.arange(6) // 2], 1)


def batch(n=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g), TREE[torch.arange(n) % 6]


def by_name(name, **k):
    e, y = batch()
    return build(name, Data(e, y, TREE, "cosine", False), torch.float32, **k)


def bad(x, row, value):
    x = x.clone()
    x[row] = value
    return x


# Each fault: arguments of the call made from (emb, labels, references, their labels), and what the message must say.
FAULTS = {
    "one dimension": (lambda e, y, r, z: (e[:, 0], y), r"shape \[N, D\].*\(12,\)"),
    "three dimensions": (lambda e, y, r, z: (e[None], y), r"shape \[N, D\]"),
    "no number type": (lambda e, y, r, z: (e > 0, y), "floats, got torch.bool"),
    "complex embeddings": (lambda e, y, r, z: (e.to(torch.complex64), y), "floats, got torch.complex64"),
    "more labels": (lambda e, y, r, z: (e[:-2], y), "10 embeddings but 12 labels"),
    "no labels": (lambda e, y, r, z: (e, y[:0]), "12 embeddings but 0 labels"),
    "labels without a level": (lambda e, y, r, z: (e, y[:, :0]), "labels must have shape"),
    "bool labels": (lambda e, y, r, z: (e, y > 0), "labels must be integers, got torch.bool"),
    "half labels": (lambda e, y, r, z: (e, y.half()), "labels must be integers"),
    "complex labels": (lambda e, y, r, z: (e, y.to(torch.complex64)), "labels must be integers"),
    "minus infinity": (lambda e, y, r, z: (bad(e, 4, -math.inf), y), r"row\(s\) 4 of 12"),
    "one NaN": (lambda e, y, r, z: (bad(e, (9, 2), math.nan), y), r"row\(s\) 9 of 12"),
    "NaN reference": (lambda e, y, r, z: (e, y, None, bad(r, 3, math.nan), z), r"ref_emb: NaN.*row\(s\) 3 of 8"),
    "infinite references": (lambda e, y, r, z: (e, y, None, bad(r, slice(2, 4), math.inf), z),
                            r"ref_emb.*row\(s\) 2, 3 of 8"),
    "integer references": (lambda e, y, r, z: (e, y, None, r.long(), z), "ref_emb must be floats"),
    "reference vector": (lambda e, y, r, z: (e, y, None, r[0], z[:1]), r"ref_emb must have shape \[N, D\]"),
    "reference cube": (lambda e, y, r, z: (e, y, None, r[None], z), r"ref_emb must have shape \[N, D\]"),
    "references of another dimension": (lambda e, y, r, z: (e, y, None, r[:, :2], z), "4 dimensions, ref_emb 2"),
    "references of other levels": (lambda e, y, r, z: (e, y, None, r, z[:, 0]), "2 levels, ref_labels 1"),
    "references of other length": (lambda e, y, r, z: (e, y, None, r, z[:5]), "8 ref_emb but 5 ref_labels"),
    "no references": (lambda e, y, r, z: (e, y, None, r[:0], z[:0]), "reference set .* is empty"),
    "float reference labels": (lambda e, y, r, z: (e, y, None, r, z.double()), "ref_labels must be integers"),
    "reference labels below -1": (lambda e, y, r, z: (e, y, None, r, bad(z, 5, -3)), "ref_labels: row 5.*-3"),
    "references that are no tree": (lambda e, y, r, z: (e, y, None, r, bad(z, (6, 1), 2)),
                                    "ref_labels are not a tree: rows 0 and 6"),
    "references of another tree": (lambda e, y, r, z: (e, y, None, r, z + torch.tensor([0, 3])),
                                   "together are not a tree"),
    "references without labels": (lambda e, y, r, z: (e, y, None, r), "belong together"),
    "zero reference": (lambda e, y, r, z: (e, y, None, bad(r, 7, 0.), z), r"ref_emb: row\(s\) 7 of 8 are all zero"),
}


def test_every_loss_has_the_same_door():
    "Input is checked in one method of the base class, so the faults below are tried on one loss of each kind only."
    for name in ALL:
        cls = LOSSES.get(name)
        assert cls.forward is EmbeddingLoss.forward and cls.prepare is EmbeddingLoss.prepare, name


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input(name, fault):
    spoil, message = FAULTS[fault]
    if fault == "zero reference" and "similarity" not in takes(name): pytest.skip("this loss has no similarity")
    with pytest.raises(ValueError, match=message): by_name(name)(*spoil(*batch(), *batch(8, 1)))
