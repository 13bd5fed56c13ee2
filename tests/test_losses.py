"""Every loss against brute force (`brute.py`), against bad input, and where it will be used.

That is: reductions, reference sets, autocast, fake tensors, cross-batch memory."""
import copy
import inspect
import math
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from brute import (calibration, dots, hap, hinge_means, hmlc, hmlc_levels, hrank_step, mean, moving_ap, ndcg_worth,
                   of_rank, pair, pnp, pnp_cost, pop, recall_worth, shared, smooth_ap, smooth_hap, smooth_step,
                   sup_ap, sup_step, to_embeddings, weighted)
from hapnb.helpers import LOSSES
from hapnb.core import Relevance
from hapnb.added import AntiCollapseLoss, coding_rate, SiMixLoss
from hapnb.losses import (AMSoftmaxLoss, CalibrationLoss, CrossEntropyLoss, CSLLoss, HAPLoss, HAPPIERLoss, HMLCLoss,
                          MovingAPLoss, NormSoftmaxLoss, PairLoss, PNPLoss,
                          ProxyAnchorLoss, ROADMAPLoss, SmoothAPLoss, SmoothHAPLoss, SmoothNDCGLoss, SmoothRecallLoss,
                          SupAPLoss, SupNDCGLoss, SupRecallLoss,
                          make_loss)
from hapnb.ranking import without_kernels
from conftest import examples
from hypothesis import assume, example, given
from hypothesis import strategies as st

SUP = dict(tau=.01, rho=100., delta=.05, offset=1.44, start=.5)


def relevance(levels, depth, rel):
    return [pop(row, depth, rel.alpha)
            if rel.kind == "pop" else weighted(row, rel.weights or [1 / depth] * depth) for row in levels]


class Problem:
    "Queries, references (None: the queries themselves), labels, and their scores and shared levels by brute force."
    def __init__(self, q, ql, r=None, rl=None, cosine=False):
        self.q, self.r = np.asarray(q), None if r is None else np.asarray(r)
        self.cosine, self.square = cosine, r is None
        self.ql, self.rl, self.depth = ql, ql if r is None else rl, len(ql[0])
        self.scores, self.shared = dots(self.q, self.q if r is None else self.r, cosine), shared(self.ql, self.rl)

    def __repr__(self):
        r = None if self.r is None else self.r.tolist()
        return f"Problem({self.q.tolist()}, {self.ql}, {r}, {self.rl}, cosine={self.cosine})"

    def positive(self, level):
        return shared([x[level:level + 1] for x in self.ql], [x[level:level + 1] for x in self.rl])
    def skip(self, q, k): return self.square and q == k

    def gap(self):
        "The smallest distance of a difference of scores to a jump of the surrogates (exact ties are no danger)."
        gap = 1.
        for s in self.scores:
            d = np.subtract.outer(s, s).ravel()
            for jump in (0., SUP["delta"]): gap = min([gap, *(x for x in np.abs(d - jump) if x > 0)])
        return min([gap, *(abs(x - m) for s in self.scores for x in s for m in (.5, .6, .9) if x != m)])


# Each row: how to build the loss, and its values and gradients by brute force.
def hap_by_hand(p, rel=Relevance(), hstep=None, **kw):
    return hap(p.scores, p.shared, relevance(p.shared, p.depth, rel), lambda x: sup_step(x, **{**SUP, **kw}), hstep)
def always(p): return [True] * len(p.ql)
def sigmoid_step(x): return smooth_step(x, .01)

RANK = {
    "SmoothAP": (lambda **k: SmoothAPLoss(**k), lambda p: smooth_ap(p.scores, p.positive(0))),
    "SmoothAP, tau 0.1": (lambda **k: SmoothAPLoss(tau=.1, **k), lambda p: smooth_ap(p.scores, p.positive(0), .1)),
    "SmoothAP, coarsest": (lambda depth, **k: SmoothAPLoss(level=depth - 1, **k),
                           lambda p: smooth_ap(p.scores, p.positive(p.depth - 1))),
    "SupAP": (lambda **k: SupAPLoss(**k), lambda p: sup_ap(p.scores, p.positive(0))),
    "SupAP, iNat": (lambda **k: SupAPLoss(start=0., offset=1., **k),
                    lambda p: sup_ap(p.scores, p.positive(0), start=0., offset=1.)),
    "SupAP, continuous": (lambda **k: SupAPLoss(offset=None, **k),
                          lambda p: sup_ap(p.scores, p.positive(0), offset=None)),
    "SupAP, straight": (lambda **k: SupAPLoss(delta=None, offset=.5, **k),
                        lambda p: sup_ap(p.scores, p.positive(0), delta=None, offset=.5)),
    "SupAP, coarsest": (lambda depth, **k: SupAPLoss(level=depth - 1, **k),
                        lambda p: sup_ap(p.scores, p.positive(p.depth - 1))),
    "HAP": (lambda **k: HAPLoss(**k), lambda p: hap_by_hand(p)),
    "HAP, alpha 2": (lambda **k: HAPLoss(relevance=Relevance("pop", 2.), **k),
                     lambda p: hap_by_hand(p, Relevance("pop", 2.))),
    "HAP, alpha 0": (lambda **k: HAPLoss(relevance=Relevance("pop", 0.), **k),
                     lambda p: hap_by_hand(p, Relevance("pop", 0.))),
    "HAP, map": (lambda **k: HAPLoss(relevance=Relevance("map"), **k), lambda p: hap_by_hand(p, Relevance("map"))),
    "HAP, H-rank": (lambda **k: HAPLoss(with_hrank=True, **k), lambda p: hap_by_hand(p, hstep=hrank_step)),
    "HAP, H-rank, other constants": (lambda **k: HAPLoss(with_hrank=True, beta=10., gamma=.2, leak=3., start=0.,
                                                         offset=1., **k),
                                     lambda p: hap_by_hand(p, hstep=lambda x: hrank_step(x, 10., .2, 3.), start=0.,
                                                           offset=1.)),
    "SmoothHAP": (lambda **k: SmoothHAPLoss(**k),
                  lambda p: smooth_hap(p.scores, p.shared, relevance(p.shared, p.depth, Relevance()))),
    "SmoothHAP, map": (lambda **k: SmoothHAPLoss(.1, "map", **k),
                       lambda p: smooth_hap(p.scores, p.shared, relevance(p.shared, p.depth, Relevance("map")), .1)),
    "SupRecall": (lambda **k: SupRecallLoss(**k),
                  lambda p: of_rank(p.scores, p.positive(0), lambda x: sup_step(x, **SUP), recall_worth())),
    "SupRecall, 3, T 0.5, coarsest": (lambda depth, **k: SupRecallLoss(3, .5, level=depth - 1, **k),
                                      lambda p: of_rank(p.scores, p.positive(p.depth - 1), lambda x: sup_step(x, **SUP),
                                                        recall_worth((3,), .5))),
    "SmoothRecall": (lambda **k: SmoothRecallLoss(**k),
                     lambda p: of_rank(p.scores, p.positive(0), sigmoid_step, recall_worth(), sigmoid_step)),
    "SupNDCG": (lambda **k: SupNDCGLoss(**k),
                lambda p: of_rank(p.scores, p.shared, lambda x: sup_step(x, **SUP), ndcg_worth)),
    "SmoothNDCG": (lambda **k: SmoothNDCGLoss(**k),
                   lambda p: of_rank(p.scores, p.shared, sigmoid_step, ndcg_worth, sigmoid_step)),
}
RANK |= {f"PNP, {v}": (lambda v=v, **k: PNPLoss(v, **k), lambda p, v=v: pnp(p.scores, p.positive(0), pnp_cost(v)))
         for v in ("O", "Iu", "Ib", "Ds", "Dq")}
RANK["PNP, other constants, coarsest"] = (
    lambda depth, **k: PNPLoss("Dq", 1.5, tau=.1, level=depth - 1, **k),
    lambda p: pnp(p.scores, p.positive(p.depth - 1), pnp_cost("Dq", 1.5), .1))
PAIRS = {
    "Calibration": (lambda **k: CalibrationLoss(**k),
                    lambda p: calibration(p.scores, p.positive(0), p.skip, always(p))),
    "Calibration, all": (lambda **k: CalibrationLoss(average="all", **k),
                         lambda p: calibration(p.scores, p.positive(0), p.skip, always(p), average="all")),
    "Calibration, coarsest": (lambda depth, **k: CalibrationLoss(.8, .3, level=depth - 1, **k),
                              lambda p: calibration(p.scores, p.positive(p.depth - 1), p.skip, always(p), .8, .3)),
    "Pair": (lambda **k: PairLoss(**k), lambda p: pair(p.scores, p.positive(0), p.skip, always(p))),
    "Pair, margin 0.1": (lambda **k: PairLoss(margin=.1, **k),
                         lambda p: pair(p.scores, p.positive(0), p.skip, always(p), .1)),
}


def add(a, b, wa=1., wb=1.): return wa * a[0] + wb * b[0], wa * a[1] + wb * b[1]

SUMS = {
    "ROADMAP": (lambda **k: ROADMAPLoss(**k), lambda p: add(mean(*RANK["SupAP"][1](p)), PAIRS["Calibration"][1](p))),
    "ROADMAP, half": (lambda **k: ROADMAPLoss(weight=(.5, .5), **k),
                      lambda p: add(mean(*RANK["SupAP"][1](p)), PAIRS["Calibration"][1](p), .5, .5)),
}


def hmlc_by_hand(p, temperature=.07, one_per_class=True, constraint=True):
    "HMLC by loops; beside two equal levels the last bit decides which one counts."
    levels = hmlc_levels(p.scores, p.ql, p.rl, p.skip, temperature, one_per_class)
    there = [v for v, _ in filter(None, levels)]
    if constraint and any(abs(a - b) < 1e-6 for i, a in enumerate(there) for b in there[:i]): assume(False)
    return hmlc(levels, p.scores, constraint)


OTHERS = {
    "HMLC": (lambda **k: HMLCLoss(**k), hmlc_by_hand),
    "HMLC, paper": (lambda **k: HMLCLoss(.5, False, False, **k), lambda p: hmlc_by_hand(p, .5, False, False)),
    "MovingAP": (lambda **k: MovingAPLoss(**k), lambda p: mean(*moving_ap(p.scores, p.positive(0), p.skip))),
    "MovingAP, margin 0.3, coarsest": (
        lambda depth, **k: MovingAPLoss(margin=.3, level=depth - 1, **k),
        lambda p: mean(*moving_ap(p.scores, p.positive(p.depth - 1), p.skip, .3))),
}
ALL = {**RANK, **PAIRS, **SUMS, **OTHERS}


def make(build, depth, **k):
    return build(depth=depth, **k) if "depth" in build.__code__.co_varnames else build(**k)


def compare(name, p, dtype=torch.float64, rel=1e-9):
    "The loss against its loop; rank losses also in blocks and in the log-linear way."
    build, by_hand = ALL[name]
    want = by_hand(p)
    want, slopes = mean(*want) if name in RANK else want
    gradients = to_embeddings(slopes, p.q, p.r, p.cosine)
    for way in ("kernels", "blocks", "loglinear") if name in RANK else (None,):
        how = {"method": way} if way == "loglinear" else {}
        loss = make(build, p.depth, similarity="cosine" if p.cosine else "dot", **how)
        with without_kernels() if way == "blocks" else nullcontext():
            compare_one(loss, f"{name}, {way}", p, want, gradients, dtype, rel)


def compare_one(loss, name, p, want, gradients, dtype, rel):
    q = torch.tensor(p.q, dtype=dtype, requires_grad=True)
    r = None if p.square else torch.tensor(p.r, dtype=dtype, requires_grad=True)
    got = loss(q, torch.tensor(p.ql), ref_emb=r, ref_labels=None if p.square else torch.tensor(p.rl))
    assert got.ndim == 0 and got.dtype == dtype
    assert got.item() == pytest.approx(want, rel=rel, abs=rel * 1e-2), f"{name}: value"
    got.backward()
    for leaf, grad in zip((q, r), gradients):
        if leaf is None: continue
        error = np.abs(leaf.grad.numpy() - grad).max()
        largest = np.abs(grad).max()
        # an image's pair with itself cancels: in the log-linear way up to the rounding of 1 / (4 tau) = 25, over a norm
        floor = 0.5 if getattr(loss, "method", "") == "loglinear" else 1e-2
        assert error <= rel * max(largest, floor), f"{name}: gradient off by {error}, largest {largest}"


@st.composite
def trees(draw, depth, most):
    "A function that draws label rows of one tree: parents[l][c] is the class at level l + 1 of class c."
    width = [draw(st.integers(1, 6))]
    parents = []
    for _ in range(depth - 1):
        width.append(draw(st.integers(1, width[-1])))
        parents.append(draw(st.lists(st.integers(0, width[-1] - 1), min_size=width[-2], max_size=width[-2])))
    unknown = draw(st.booleans())
    def rows(n):
        out = []
        for _ in range(n):
            row = [draw(st.integers(0, width[0] - 1))]
            for up in parents: row.append(up[row[-1]])
            hide = draw(st.integers(0, depth)) if unknown and draw(st.integers(0, 3)) == 0 else 0
            out.append([-1] * hide + row[hide:])
        return out
    return rows


@st.composite
def problems(draw, most=24):
    depth = draw(st.integers(1, 3))
    rows = draw(trees(depth, most))
    grid, rectangular = draw(st.booleans()), draw(st.booleans())
    dim, seed = draw(st.integers(1 if grid else 2, 5)), draw(st.integers(0, 2 ** 31 - 1))
    rng = np.random.RandomState(seed)
    def points(n):
        # Multiples of 1/32: their products are exact in float32 and float64, so ties are true ties in both.
        if grid: return rng.randint(-12, 13, (n, dim)) / 32 * draw(st.sampled_from([1, 2]))
        return rng.standard_normal((n, dim)) * np.exp(rng.standard_normal((n, 1)))
    n = draw(st.integers(1, 12 if rectangular else most))
    q, ql = points(n), rows(n)
    if not rectangular: return Problem(q, ql, cosine=not grid)
    m = draw(st.integers(1, most))
    return Problem(q, ql, points(m), rows(m), cosine=not grid)


@pytest.mark.parametrize("name", ALL)
@examples(25)
@given(p=problems())
def test_value_and_gradient(name, p):
    "float64 to 1e-9 and float32 to 1e-4, on trees with ties, unknown labels, and square or rectangular sets."
    gap = p.gap()
    assume(gap > 1e-9)  # beside a jump, the last bit of a product decides, here and there
    compare(name, p)
    if gap > 1e-5: compare(name, p, torch.float32, 1e-4)


@pytest.mark.parametrize("name", ALL)
def test_larger_batch(name):
    "Many positives a query, unequal classes, three levels."
    rng = np.random.RandomState(3)
    fine = np.sort(rng.randint(0, 7, 60))
    labels = np.stack([fine, fine // 2, fine // 4], 1)
    compare(name, Problem(rng.standard_normal((60, 8)), labels.tolist(), cosine=True))
    queries, refs = rng.standard_normal((20, 8)), rng.standard_normal((60, 8))
    compare(name, Problem(queries, labels[::3].tolist(), refs, labels.tolist(), cosine=True))


@pytest.mark.parametrize("name", ALL)
@examples(12)
@given(p=problems(most=12))
def test_one_value_a_query(name, p):
    "The mean of the values is the loss if every query counts; a query that does not count has value 0."
    build, by_hand = ALL[name]
    q, ql = torch.tensor(p.q), torch.tensor(p.ql)
    ref = {} if p.square else dict(ref_emb=torch.tensor(p.r), ref_labels=torch.tensor(p.rl))
    args = dict(similarity="cosine" if p.cosine else "dot")
    each, whole = (make(build, p.depth, reduction=r, **args)(q, ql, **ref) for r in ("none", "mean"))
    assert each.shape == (len(p.q),) and each.isfinite().all()
    if name in RANK:
        values, _ = by_hand(p)
        counts = [v is not None for v in values]
        assume(p.gap() > 1e-9)
        assert each.tolist() == pytest.approx([v or 0. for v in values], rel=1e-9, abs=1e-11)
        assert whole.item() == pytest.approx(each.sum().item() / max(1, sum(counts)), rel=1e-9, abs=1e-11)
    elif name in PAIRS or name in SUMS and p.square and min(map(min, p.ql)) >= 0:
        assert whole.item() == pytest.approx(each.mean().item(), rel=1e-9, abs=1e-11)


# --- proxy losses: a plain loop with torch scalars, so that autograd gives the gradients


def softmax_by_hand(logits, target):
    "Mean of -log softmax over rows whose target is known; logits are lists of torch scalars."
    rows = [torch.stack(l).exp().sum().log() - l[t] for l, t in zip(logits, target) if t >= 0]
    return sum(rows) / len(rows)


def unit(x): return x / (x * x).sum().sqrt()
def cosines(emb, weight): return [[(unit(z) * unit(w)).sum() for w in weight] for z in emb]


def proxy_by_hand(name, loss, emb, labels):
    weight, y = loss.weight, labels[:, 0].tolist()
    s = cosines(emb, weight)
    if name == "NormSoftmax": return softmax_by_hand([[v / .05 for v in row] for row in s], y)
    if name == "AMSoftmax":
        return softmax_by_hand([[30 * (v - .3 * (c == t)) for c, v in enumerate(row)] for row, t in zip(s, y)], y)
    if name in ("CrossEntropy", "AMSoftmax, plain"):
        lin = [[(unit(z) * w).sum() + b for w, b in zip(weight, loss.bias)] for z in emb]
        if name == "CrossEntropy": return softmax_by_hand(lin, y)
        return softmax_by_hand([[30 * (v - .3 * (c == t)) for c, v in enumerate(row)] for row, t in zip(lin, y)], y)
    if name.startswith("ProxyAnchor"):
        pulled, pushed = [], []
        for c in range(len(weight)):
            own, others = [s[i][c] for i,
                           t in enumerate(y) if t == c], [s[i][c] for i, t in enumerate(y) if t >= 0 and t != c]
            if own: pulled.append((1 + sum((-loss.scale * (v - loss.margin)).exp() for v in own)).log())
            if others: pushed.append((1 + sum((loss.scale * (v + loss.margin)).exp() for v in others)).log())
        return sum(pulled) / len(pulled) + sum(pushed) / len(weight)
    table, total, known = loss.proxy_labels.tolist(), 0., [i for i, t in enumerate(y) if t >= 0]
    for i in known:
        for l, m in enumerate((.25, .45)):
            others = [(32 * s[i][c]).exp() for c in range(len(table)) if table[c][l] != labels[i, l]]
            if others: total = total + (1 + math.exp(32 * m) * (-32 * s[i][y[i]]).exp() * sum(others)).log()
    return total / len(known)


PROXY = {
    "NormSoftmax": lambda C, D, table, **k: NormSoftmaxLoss(C, D, **k), "AMSoftmax": lambda C, D, table,
    **k: AMSoftmaxLoss(C, D, **k),
    "AMSoftmax, plain": lambda C, D, table, **k: AMSoftmaxLoss(C, D, plain=True, **k),
    "CrossEntropy": lambda C, D, table, **k: CrossEntropyLoss(C, D, **k), "CSL": lambda C, D, table,
    **k: CSLLoss(table, D, **k),
    "ProxyAnchor": lambda C, D, table, **k: ProxyAnchorLoss(C, D, **k), "ProxyAnchor, other constants": lambda C, D,
    table, **k: ProxyAnchorLoss(C, D, .3, 8., **k),
}


def proxy_problem(seed=0, C=5, D=4, n=9):
    g = torch.Generator().manual_seed(seed)
    table = torch.stack([torch.arange(C), torch.arange(C) // 2], 1)
    labels = table[torch.randint(0, C, (n,), generator=g)]
    return torch.randn(n, D, generator=g, dtype=torch.float64), labels, table


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PROXY)
def test_proxy_losses(name, seed):
    emb, labels, table = proxy_problem(seed)
    if seed == 1: labels[2] = -1                       # unknown: does not count
    if seed == 2: labels, table[:, 1] = labels * torch.tensor([1, 0]), 0   # one coarse class: no rival there
    torch.manual_seed(seed)
    loss = PROXY[name](5, 4, table).double()
    emb.requires_grad_()
    leaves = [emb, *loss.parameters()]
    got, want = loss(emb, labels), proxy_by_hand(name, loss, emb, labels)
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    small = PROXY[name](5, 4, table)
    small.load_state_dict(loss.state_dict())
    assert small(emb.float(), labels).item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("name", PROXY)
def test_proxies_do_not_care_about_references(name):
    emb, labels, table = proxy_problem()
    loss = PROXY[name](5, 4, table)
    assert loss(emb, labels, ref_emb=emb[:3] * 2, ref_labels=labels[:3]).item() == loss(emb, labels).item()


def test_proxies_start_small():
    w = NormSoftmaxLoss(200, 16).weight
    assert w.shape == (200, 16) and w.abs().max() <= .25 and w.abs().max() > .24 and w.dtype == torch.float32


@pytest.mark.parametrize("name", PROXY)
def test_labels_without_proxy_are_named(name):
    emb, labels, table = proxy_problem()
    labels = labels.clone()
    labels[3], labels[7] = torch.tensor([11, 40]), torch.tensor([12, 41])
    with pytest.raises(ValueError, match=r"3, 7"): PROXY[name](5, 4, table)(emb, labels)
    with pytest.raises(ValueError, match="dimensions"): PROXY[name](5, 6, table)(emb, table[:1].expand(9, 2))


@pytest.mark.parametrize("level", [0, 1])
def test_proxy_anchor_shares_add_up(level):
    """Each image's value, unknown images included: non-negative, 0 for the unknown, and with the mean's value and
    gradients."""
    emb, labels, _ = proxy_problem(4)
    labels = torch.where((torch.arange(9) % 4 == 1)[:, None], -1, labels)
    loss = ProxyAnchorLoss(5, 4, level=level).double()
    emb.requires_grad_()
    leaves = [emb, loss.weight]
    mean = loss(emb, labels)
    want = torch.autograd.grad(mean, leaves)
    loss.reduction = "none"
    each = loss(emb, labels)
    known = labels[:, level] >= 0
    assert (each >= 0).all() and not each[~known].any()
    assert each[known].mean().item() == pytest.approx(mean.item(), rel=1e-12)
    for a, b in zip(torch.autograd.grad(each[known].mean(), leaves), want):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    # of the values for "none", too
    assert loss.terms["positive"] + loss.terms["negative"] == pytest.approx(mean.item(), rel=1e-12)


@pytest.mark.parametrize("margin, scale, n, C", [(.1, 32., 40, 6), (.1, 32., 8, 30), (0., 4., 20, 5), (.5, 64., 1, 3)])
def test_proxy_anchor_agrees_with_pytorch_metric_learning(margin, scale, n, C):
    "Value and gradients, in float64, with more classes than images and the other way round."
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    g = torch.Generator().manual_seed(n)
    emb, labels = torch.randn(n, 7, generator=g, dtype=torch.float64,
                              requires_grad=True), torch.randint(0, C, (n,), generator=g)
    theirs, ours = pml.ProxyAnchorLoss(C, 7, margin, scale).double(), ProxyAnchorLoss(C, 7, margin, scale).double()
    ours.weight.data = theirs.proxies.data.clone()
    a, b = ours(emb, labels), theirs(emb, labels)
    assert a.item() == pytest.approx(b.item(), rel=1e-9)
    for x, y in zip(torch.autograd.grad(a, [emb, ours.weight]), torch.autograd.grad(b, [emb, theirs.proxies])):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-11)


def test_anchors_start_as_published():
    torch.manual_seed(0)
    assert ProxyAnchorLoss(800, 64).weight.std().item() == pytest.approx((2 / 800) ** .5, rel=.02)


@pytest.mark.parametrize("lam", [0., .1, .5, 1.])
def test_happier(lam):
    rng = np.random.RandomState(5)
    p = Problem(rng.standard_normal((12, 4)), [[f, f // 2] for f in rng.randint(0, 5, 12).tolist()], cosine=True)
    torch.manual_seed(0)
    loss = HAPPIERLoss(5, 4, lam=lam).double()
    weight, = loss.parameters()
    emb = torch.tensor(p.q, requires_grad=True)
    got = loss(emb, torch.tensor(p.ql))
    h, slopes = mean(*hap_by_hand(p))
    twin = NormSoftmaxLoss(5, 4).double()
    twin.weight = weight
    nsm = proxy_by_hand("NormSoftmax", twin, emb, torch.tensor(p.ql))
    assert got.item() == pytest.approx((1 - lam) * h + lam * nsm.item(), rel=1e-9)
    want = (1 - lam) * to_embeddings(slopes, p.q, cosine=True)[0] + lam * torch.autograd.grad(nsm, emb)[0].numpy()
    got.backward()
    np.testing.assert_allclose(emb.grad.numpy(), want, rtol=1e-8, atol=1e-10)


# --- every loss, everywhere: built by name with the depth, classes and dimensions of a batch

NAMES = ["SmoothAPLoss", "SupAPLoss", "HAPLoss", "CalibrationLoss", "ROADMAPLoss", "HAPPIERLoss", "PairLoss",
         "NormSoftmaxLoss",
         "AMSoftmaxLoss", "CrossEntropyLoss", "CSLLoss", "SmoothHAPLoss", "SupRecallLoss", "SmoothRecallLoss",
         "SupNDCGLoss", "SmoothNDCGLoss", "HISTLoss", "ProxyAnchorLoss", "PNPLoss", "HMLCLoss", "MovingAPLoss",
         "SiMixLoss", "AntiCollapseLoss"]
PROXIES = {"HAPPIERLoss", "NormSoftmaxLoss", "AMSoftmaxLoss", "CrossEntropyLoss", "CSLLoss", "HISTLoss",
           "ProxyAnchorLoss", "AntiCollapseLoss"}
# without its random numbers
FIXED = {"SiMixLoss": dict(share=.5)}
# these take `similarity`; HIST measures directions and gives its network the embeddings as they come
LENGTHS = [n for n in NAMES if n != "HISTLoss"]
TREE = torch.stack([torch.arange(6), torch.arange(6) // 2], 1)


def by_name(name, table=TREE, **k):
    torch.manual_seed(0)
    return make_loss(name, num_classes=6, embedding_size=4, proxy_labels=table, **FIXED.get(name, {}), **k)


def batch(n=12, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=dtype), TREE[torch.arange(n) % 6]


def test_all_are_registered():
    for name in NAMES: assert LOSSES.get(name).__name__ == name
    with pytest.raises(ValueError, match="HAPPIERLoss"): make_loss("HAPIERLoss")


BAD = {
    "lengths": (lambda e, y: (e, y[:-1]), "12.*11"),
    "NaN": (lambda e, y: (torch.where(torch.arange(12)[:, None] == 5, math.nan, e), y), r"\b5\b"),
    "infinite": (lambda e, y: (torch.where(torch.arange(12)[:, None] >= 10, math.inf, e), y), "10, 11"),
    "zero row": (lambda e, y: (e * (torch.arange(12)[:, None] != 7), y), r"\b7\b"),
    "integers": (lambda e, y: (e.long(), y), "float"),
    "not a matrix": (lambda e, y: (e[0], y[:1]), "shape"),
    "not a tree": (lambda e, y: (e, y + torch.tensor([0, 1]) * (torch.arange(12) == 6)[:, None]),
                   r"tree.*0 and 6|tree.*6 and 0"),
    "float labels": (lambda e, y: (e, y.float()), "integer"),
    "negative labels": (lambda e, y: (e, y - 2), "-1"),
    "empty": (lambda e, y: (e[:0], y[:0]), "empty"),
    "cube of labels": (lambda e, y: (e, y[:, :, None]), "shape"),
}


# All losses share one door (see test_every_loss_has_the_same_door in test_properties): a rank loss, a loss that
# normalises its
# input itself, and a sum with proxies stand for the others.
DOORS = ["SupAPLoss", "HISTLoss", "HAPPIERLoss"]


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("name", DOORS)
def test_bad_input(name, fault):
    spoil, message = BAD[fault]
    with pytest.raises(ValueError, match=message): by_name(name)(*spoil(*batch()))


@pytest.mark.parametrize("name", LENGTHS)
def test_zero_rows_are_fine_for_dot(name):
    emb, y = batch()
    emb[7] = 0
    emb.requires_grad_()
    loss = by_name(name, similarity="dot")(emb, y)
    loss.backward()
    assert loss.isfinite() and emb.grad.isfinite().all()


@pytest.mark.parametrize("name", DOORS)
def test_bad_references(name):
    (emb, y), (ref, ry) = batch(), batch(12, 1)
    loss = by_name(name)
    for args, message in ((dict(ref_emb=ref), "ref_labels"), (dict(ref_labels=ry), "ref_emb"),
                          (dict(ref_emb=ref[:, :3], ref_labels=ry), "dimensions"),
                          (dict(ref_emb=ref, ref_labels=ry[:-1]), "12.*11"),
                          (dict(ref_emb=ref, ref_labels=ry[:, :1]), "levels"),
                          (dict(ref_emb=ref[:0], ref_labels=ry[:0]), "empty"),
                          (dict(ref_emb=ref * math.nan, ref_labels=ry), "ref_emb"),
                          (dict(ref_emb=ref, ref_labels=ry + torch.tensor([0, 1])), "tree")):
        with pytest.raises(ValueError, match=message): loss(emb, y, **args)


@pytest.mark.parametrize("name", DOORS)
def test_mined_pairs_are_an_error(name):
    emb, y = batch()
    i = torch.arange(3)
    for tup in ((i, i + 6, i + 1), (i, i + 6, i, i + 1)):
        with pytest.raises(ValueError, match="indices_tuple|miner"): by_name(name)(emb, y, tup)
        with pytest.raises(ValueError, match="indices_tuple|miner"):
            by_name(name)(emb, y, tup, ref_emb=emb + 1, ref_labels=y)


@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments(name):
    for k, message in ((dict(similarity="cosin"), "cosine" if name in LENGTHS else "no argument"),
                       (dict(reduction="sum"), "mean")):
        with pytest.raises(ValueError, match=message): by_name(name, **k)
    # these use all levels
    if name not in ("HAPLoss", "HAPPIERLoss", "CSLLoss", "SmoothHAPLoss", "SupNDCGLoss", "SmoothNDCGLoss", "HMLCLoss"):
        with pytest.raises(ValueError, match="level"): by_name(name, level=2)(*batch())


# arguments that hold several numbers: what stands beside the bad one
PAIRED = {"ks": (1,), "weight": (1.,), "margins": (.25,)}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "1e-2", True], ids=str)
@pytest.mark.parametrize("name", [*NAMES, "FastAPLoss", "SoftBinAPLoss", "BlackBoxAPLoss"])
def test_numbers_must_be_finite(name, bad):
    "Every argument that is a number says so, by its own name, when it is given NaN, infinity, text or a truth value."
    taken = inspect.signature(LOSSES.get(name).__init__).parameters
    def number(p): return isinstance(p.default, (int, float)) and not isinstance(p.default, bool)
    single = [k for k, p in taken.items() if number(p) or k == "drop_equal"]
    for k in single + [k for k in PAIRED if k in taken]:
        value = (*PAIRED[k], bad) if k in PAIRED else bad
        with pytest.raises(ValueError, match={"weight": "weight of calibration"}.get(k, k) + " must be .*got"):
            by_name(name, **{k: value})


@pytest.mark.parametrize("name",
                         ["NormSoftmaxLoss", "AMSoftmaxLoss", "CrossEntropyLoss", "HAPPIERLoss", "ProxyAnchorLoss"])
@pytest.mark.parametrize("bad", [0, -1, 2.5, math.nan, "6"], ids=str)
def test_sizes_must_be_whole(name, bad):
    for k in ("num_classes", "embedding_size"):
        with pytest.raises(ValueError, match=f"{k} must be a whole number, 1 or more"):
            make_loss(name, **{"num_classes": 6, "embedding_size": 4, k: bad})


@pytest.mark.parametrize("make", [lambda v: Relevance("pop", v), lambda v: Relevance("map", weights=(1., v))])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1., "1"], ids=str)
def test_relevance_must_be_finite(make, bad):
    with pytest.raises(ValueError, match="0 or more and finite"): make(bad)


CORNERS = {
    "batch of one": lambda: (*batch(1),), "all one class": lambda: (batch()[0], torch.zeros(12, 2).long()),
    "no positive": lambda: (batch(6)[0], TREE[:6]), "all unknown": lambda: (batch()[0], torch.full((12, 2), -1)),
    "all equal": lambda: (torch.ones(12, 4), batch()[1]),
    "opposite": lambda: (torch.ones(12, 4) * (torch.arange(12) % 2 * 2 - 1)[:, None], batch()[1]),
    "some unknown": lambda: (batch()[0],
                             torch.where((torch.arange(12) % 3 == 0)[:, None] & torch.tensor([True, False]), -1,
                                         batch()[1])),
    "long": lambda: (batch()[0] * 1e10, batch()[1]), "short": lambda: (batch()[0] * 1e-10, batch()[1]),
}


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("name", NAMES)
def test_corners_are_defined(name, corner):
    emb, y = CORNERS[corner]()
    for reduction in ("mean", "none"):
        leaf = emb.clone().requires_grad_()
        value = by_name(name, reduction=reduction)(leaf, y)
        assert value.isfinite().all() and value.shape == (() if reduction == "mean" else (len(emb),))
        value.sum().backward()
        assert leaf.grad.isfinite().all()
        if corner in ("all unknown",) and name not in ("CalibrationLoss", "PairLoss", "ROADMAPLoss"):
            assert not value.any()
    ref = batch(5, 9)[0]
    none = by_name(name)(emb, y, ref_emb=ref, ref_labels=torch.full((5, y.shape[1]), -1))
    assert none.isfinite()


@pytest.mark.parametrize("name", ["SmoothAPLoss", "SupAPLoss", "HAPLoss"])
def test_queries_without_positive_do_not_count(name):
    """With a reference set, a query that no reference is relevant to leaves the mean; with the batch alone it finds
    itself first."""
    (emb, y), (ref, ry) = batch(4), batch(12, 1)
    ry, keep = TREE[torch.arange(12) % 2], y[:, 1] == 0
    loss = by_name(name)
    assert loss(emb, y, ref_emb=ref,
                ref_labels=ry).item() == pytest.approx(loss(emb[keep], y[keep], ref_emb=ref, ref_labels=ry).item(),
                                                       rel=1e-6)
    assert loss(emb[~keep], y[~keep], ref_emb=ref, ref_labels=ry).item() == 0
    assert loss(emb[:1], y[:1]).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_batch_does_not_matter(name):
    emb, y = batch(dtype=torch.float64)
    order = torch.tensor([7, 0, 11, 3, 9, 1, 8, 2, 10, 5, 4, 6])
    # the first image of each class goes up a level, as in the official implementation
    k = dict(one_per_class=False) if name == "HMLCLoss" else {}
    loss = by_name(name, reduction="none", **k).double()
    torch.testing.assert_close(loss(emb, y)[order], loss(emb[order], y[order]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LENGTHS)
def test_embeddings_length_does_not_matter_for_cosine(name):
    emb, y = batch(dtype=torch.float64)
    loss = by_name(name).double()
    scale = torch.linspace(.1, 10, 12, dtype=torch.float64)[:, None]
    assert loss(emb * scale, y).item() == pytest.approx(loss(emb, y).item(), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_same_set_by_identity_not_by_shape(name):
    "References of the batch's own shape are another set; the batch itself, given as its references, is the batch."
    (emb, y), (ref, ry) = batch(dtype=torch.float64), batch(12, 1, torch.float64)
    loss = by_name(name).double()
    assert loss(emb, y, ref_emb=emb, ref_labels=y).item() == loss(emb, y).item()
    if name not in PROXIES - {"HAPPIERLoss"}:
        assert loss(emb, y, ref_emb=ref, ref_labels=ry).item() != loss(emb, y).item()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_computes_in_float32(name):
    emb, y = batch(dtype=torch.bfloat16)
    emb.requires_grad_()
    loss = by_name(name)
    with torch.autocast("cpu", dtype=torch.bfloat16): value = loss(emb, y)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(emb.float(), y).item(), rel=1e-5)
    value.backward()
    assert emb.grad.dtype == torch.bfloat16 and emb.grad.isfinite().all()


@pytest.mark.parametrize("where", ["cuda", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors(name, where):
    "Shapes and devices work out on a GPU that is not there, square and rectangular; backward too where torch lets us."
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(where):
        loss = by_name(name, TREE.to(where))
        emb, y = torch.randn(8, 4, requires_grad=True), torch.zeros(8, 2, dtype=torch.long)
        for ref in ({}, dict(ref_emb=torch.randn(5, 4), ref_labels=torch.zeros(5, 2, dtype=torch.long))):
            value = loss(emb, y, **ref)
            assert value.shape == () and value.device.type == where
            if where == "cpu": value.backward()


def test_no_loss_is_forgotten():
    "Every registered loss runs on fake CUDA tensors and in autocast, here or in test_surrogates."
    from hapnb.helpers import LOSSES
    from test_surrogates import MAKE
    assert {n for n in LOSSES.names() if LOSSES.get(n).__module__.startswith("hapnb.")} == {*NAMES, *MAKE}


@pytest.mark.parametrize("name", NAMES)
def test_terms_are_floats(name):
    loss = by_name(name)
    value = loss(*batch())
    assert loss.terms["loss"] == pytest.approx(value.item())
    assert all(type(v) is float and math.isfinite(v) for v in loss.terms.values())


@pytest.mark.parametrize("name", NAMES)
def test_copied_and_pickled(name):
    loss, (emb, y) = by_name(name), batch()
    loss(emb.clone().requires_grad_(), y)  # the terms of a used loss must not hold on to its graph
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin(emb, y).item() == loss(emb, y).item() and repr(twin) == repr(loss)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_references_alone(name):
    (emb, y), (ref, ry) = batch(), batch(12, 1)
    ref.requires_grad_()
    value = by_name(name)(emb, y, ref_emb=ref, ref_labels=ry)
    if name in PROXIES - {"HAPPIERLoss"}: return
    value.backward()
    assert ref.grad.isfinite().all() and ref.grad.any()


def test_input_that_is_no_tensor_is_named():
    for emb in ([[1., 2.]], np.ones((1, 2), "float32")):
        with pytest.raises(ValueError, match="torch tensor"): SupAPLoss()(emb, [0])
    with pytest.raises(ValueError, match="miners"):
        SupAPLoss()(torch.ones(2, 2), [0, 1], ([0], [1], [0], [1]), ref_emb=torch.ones(2, 2), ref_labels=[0, 1])


def test_the_parts_of_a_sum_say_the_similarity_they_use():
    for loss in (ROADMAPLoss(similarity="dot"), HAPPIERLoss(3, 4, similarity="dot")): assert "cosine" not in repr(loss)


def test_weightless_items_are_no_positives():
    "With map weights (0, 1), an item that shares the group only is worth nothing."
    # the positive comes last
    ref, ry = torch.tensor([[1., 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]), torch.tensor([[1, 0], [2, 0], [3, 1]])
    for make in (HAPLoss, SmoothHAPLoss):
        each = make(relevance=Relevance("map", weights=(0, 1)),
                    reduction="none")(torch.ones(2, 4), torch.tensor([[0, 0], [1, 0]]), ref_emb=ref, ref_labels=ry)
        assert each[0] == 0 and each[1] > 0
        assert make(relevance=Relevance("map", weights=(0, 1)))(torch.ones(2, 4), torch.tensor([[0, 0], [1, 0]]),
                                                                ref_emb=ref, ref_labels=ry) == each[1]


@pytest.mark.parametrize("name", NAMES)
def test_state_and_steps(name):
    "State dicts load, and a few steps of gradient descent make the loss smaller."
    emb, y = batch()
    loss, twin = by_name(name), by_name(name)
    twin.load_state_dict(loss.state_dict())
    leaf = emb.clone().requires_grad_()
    assert twin(leaf, y).item() == loss(leaf, y).item()
    opt = torch.optim.Adam([leaf, *loss.parameters()], lr=.02)
    first = loss(leaf, y).item()
    for _ in range(30):
        opt.zero_grad()
        loss(leaf, y).backward()
        opt.step()
    assert loss(leaf, y).item() < first


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    "Remember the most elements that any result had."
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t): self.largest = max(self.largest, t.numel())
        return out


# SiMix adds an image for each of the 65,280 pairs of a class
@pytest.mark.parametrize("name", [n for n in NAMES if n != "SiMixLoss"])
def test_no_cube_is_built(name):
    "512 queries with 256 positives each and 512 references: a cube would have 67 million elements."
    g = torch.Generator().manual_seed(0)
    emb, y = torch.randn(512, 4, generator=g, requires_grad=True), TREE[[0, 2]].repeat(256, 1)
    with LargestTensor() as mode: by_name(name)(emb, y).backward()
    assert mode.largest <= 16 * 512 * 512


# --- pytorch-metric-learning's cross-batch memory


def memory(name, size, **k):
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    class Memory(pml.CrossBatchMemory):  # the original accepts the library's own losses by their class names
        @classmethod
        def check_loss_support(cls, loss_name): pass
    return Memory(by_name(name, **dict(similarity="dot") if name in LENGTHS else {}).double(), 4, memory_size=size, **k)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "CSLLoss"])  # its memory keeps one label an image
def test_cross_batch_memory(name):
    "The queue fills, then wraps; each query's own copy in the memory is left out of its retrieval set."
    queue = memory(name, 20)
    for step in range(4):
        emb, y = batch(8, step, torch.float64)
        leaf = (emb / emb.norm(dim=1, keepdim=True)).requires_grad_()
        value = queue(leaf, y[:, 0])
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all()
        own = queue.curr_batch_idx.tolist()
        full = 20 if queue.has_been_filled else queue.queue_idx
        p = Problem(leaf.detach().numpy(), y[:, :1].tolist(), queue.embedding_memory[:full].numpy(),
                    queue.label_memory[:full, None].tolist())
        if name == "PairLoss": want, _ = pair(p.scores, p.positive(0), lambda q, k: own[q] == k, always(p))
        elif name == "CalibrationLoss":
            want, _ = calibration(p.scores, p.positive(0), lambda q, k: own[q] == k, always(p))
        elif name in ("SmoothAPLoss", "SupAPLoss", "HAPLoss"):
            rest = [[v for k, v in enumerate(row) if k != own[q]] for q, row in enumerate(p.scores)]
            same = [[v for k, v in enumerate(row) if k != own[q]] for q, row in enumerate(p.positive(0))]
            want, _ = mean(*(smooth_ap if name == "SmoothAPLoss" else sup_ap)(rest, same))
        else: continue
        assert value.item() == pytest.approx(want, rel=1e-9, abs=1e-12), f"step {step}"


def test_cross_batch_memory_with_a_miner_is_an_error():
    pml = pytest.importorskip("pytorch_metric_learning.miners")
    queue = memory("SupAPLoss", 20, miner=pml.TripletMarginMiner(margin=.1))
    emb, y = batch(8, 0, torch.float64)
    with pytest.raises(ValueError, match="miner"): queue(emb, y[:, 0])


# --- what this library decided where an official code and its paper differ


def test_query_is_left_out_by_index_so_duplicates_count():
    twins, y = torch.tensor([[1., 0.], [1., 0.], [.6, .8]], dtype=torch.float64) * 1.1, torch.tensor([0, 0, 0])
    ours, theirs = (PairLoss(similarity="dot", drop_equal=d, reduction="none")(twins, y) for d in (None, 1e-5))
    assert (theirs - ours)[:2].tolist() == pytest.approx([.21, .21])
    assert theirs[2].item() == pytest.approx(ours[2].item())
    unit = twins / 1.1
    # 0.6 is not above the margin; the twins are fine
    assert CalibrationLoss()(unit, torch.tensor([0, 0, 1])).item() == pytest.approx(0)


@example(p=Problem([[1., 0.], [1., 0.]], [[0], [1]]))
@given(p=problems(most=8))
@examples(20)
def test_hierarchical_loss_of_one_level_is_supap(p):
    one = Problem(p.q, [x[:1] for x in p.ql], p.r, [x[:1] for x in p.rl], p.cosine)
    assume(one.gap() > 1e-9)
    a, b = (mean(*RANK[n][1](one))[0] for n in ("SupAP", "HAP"))
    assert a == pytest.approx(b, rel=1e-9, abs=1e-12)  # the brute force agrees with itself
    args = dict(similarity="cosine" if p.cosine else "dot")
    ref = {} if p.square else dict(ref_emb=torch.tensor(p.r), ref_labels=torch.tensor(one.rl))
    values = [loss(torch.tensor(p.q), torch.tensor(one.ql), **ref).item()
              for loss in (SupAPLoss(**args), HAPLoss(**args))]
    assert values[0] == pytest.approx(values[1], rel=1e-9, abs=1e-12) == a


def test_training_after_inference_mode():
    """Memory that the engine keeps between calls must not come from inference mode, where tensors cannot be written to
    later."""
    import threading
    def work(out):  # a thread of its own has kept nothing yet
        x = torch.randn(24, 8, requires_grad=True)
        with torch.inference_mode(): HAPLoss()(x, torch.arange(24) // 4)
        HAPLoss()(x, torch.arange(24) // 4).backward()
        out.append(x.grad.abs().sum())
    found = []
    thread = threading.Thread(target=work, args=(found,))
    thread.start(), thread.join()
    assert found and found[0] > 0


# --- moving averages, virtual images, coding rates


@pytest.mark.parametrize("gamma", [.3, 1.])
@pytest.mark.parametrize("seed", range(3))
def test_averages_move_by_gamma_for_each_image(seed, gamma):
    "Three batches of 12 of 30 images: values, gradients, averages by loops; images without a positive keep theirs."
    rng = np.random.RandomState(seed)
    loss, means = MovingAPLoss(30, gamma).double(), {}
    for step in range(3):
        rows, fine = rng.permutation(30)[:12], rng.randint(-1, 5, 12)
        p = Problem(rng.standard_normal((12, 4)), fine[:, None].tolist(), cosine=True)
        found = hinge_means(p.scores, p.positive(0), p.skip)
        now = [None if f is None else [v for v, _ in f] for f in found]
        old = [means.get(r, n) for r, n in zip(rows, now)]
        values, slopes = moving_ap(p.scores, p.positive(0), p.skip, 1., gamma, old)
        # an image's first batch is its own past, whose derivative counts in full
        whole = moving_ap(p.scores, p.positive(0), p.skip)[1]
        slopes = [s if r in means else w for r, s, w in zip(rows, slopes, whole)]
        want, slopes = mean(values, slopes)
        emb = torch.tensor(p.q, requires_grad=True)
        loss.set_rows(torch.tensor(rows))
        value = loss(emb, torch.tensor(fine))
        value.backward()
        assert value.item() == pytest.approx(want, rel=1e-9)
        np.testing.assert_allclose(emb.grad.numpy(), to_embeddings(slopes, p.q, cosine=True)[0], rtol=1e-8, atol=1e-10)
        for r, o, n in zip(rows, old, now):
            if n is not None: means[r] = [(1 - gamma) * a + gamma * b for a, b in zip(o, n)]
        for r in range(30):
            every = loss.mean_all[r].item()
            assert [every - loss.mean_neg[r].item(), every] == pytest.approx(means.get(r, [0., 0.]), rel=1e-9)


def test_averages_move_in_training_only_and_for_one_call():
    (emb, y), loss = batch(), MovingAPLoss(12)
    loss(emb, y)
    assert not loss.mean_all.any()
    loss.eval().set_rows(torch.arange(12))
    loss(emb, y)
    assert not loss.mean_all.any()
    loss.train().set_rows(torch.arange(12))
    loss(emb, y)
    kept = loss.mean_all.clone()
    loss(emb * torch.arange(1, 13)[:, None] + 1, y)
    assert kept.all() and torch.equal(loss.mean_all, kept)


@pytest.mark.parametrize("base, args", [("SmoothRecallLoss", {}), ("SupRecallLoss", dict(ks=(1, 3))), ("HAPLoss", {}),
                                        ("SmoothAPLoss", dict(tau=.1))])
@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("share", [.5, .2, None])
def test_virtual_images_are_images_of_a_larger_batch(base, args, level, share):
    "Value and gradient of the base on a batch to which the mixtures were added by a loop; -1 has none."
    rng = np.random.RandomState(4)
    fine = torch.tensor(rng.randint(-1, 4, 10))
    y = torch.stack([fine, torch.where(fine < 0, 0, fine // 2)], 1)
    emb = torch.tensor(rng.standard_normal((10, 5)), requires_grad=True)
    pairs = [(i, j) for i in range(10) for j in range(i + 1, 10) if y[i, level] == y[j, level] != -1]
    torch.manual_seed(3)
    a = [share if share is not None else x for x in torch.rand(len(pairs), 1)[:, 0].tolist()]
    unit = emb / emb.norm(dim=1, keepdim=True)
    more = torch.stack([*unit, *(b * unit[i] + (1 - b) * unit[j] for b, (i, j) in zip(a, pairs))])
    virtual = torch.stack([torch.where(y[i] == y[j], y[i], -1) for i, j in pairs])
    own = dict(level=level) if base != "HAPLoss" else {}
    want = make_loss(base, similarity="dot", **args, **own)(more, torch.cat([y, virtual]))
    torch.manual_seed(3)
    got = SiMixLoss(base, args, share, level)(emb, y)
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(v, emb, retain_graph=True)[0] for v in (got, want)),
                               rtol=1e-8, atol=1e-10)


def test_references_are_mixed_and_queries_are_not():
    "A virtual reference is left out for a query whose own copy is one of its parents."
    (emb, y), (ref, ry) = batch(4, 0, torch.float64), batch(12, 1, torch.float64)
    mixed = SiMixLoss(share=.5, similarity="dot", reduction="none")
    i, j = torch.tensor([(a, b) for a in range(12) for b in range(a + 1, 12) if ry[a, 0] == ry[b, 0]]).T
    more, labels = torch.cat([ref, (ref[i] + ref[j]) / 2]), torch.cat([ry, ry[i]])
    plain = SmoothRecallLoss(similarity="dot", reduction="none")
    want = plain(emb, y, ref_emb=more, ref_labels=labels)
    torch.testing.assert_close(mixed(emb, y, ref_emb=ref, ref_labels=ry), want)
    kept = (torch.arange(12) != torch.arange(4)[:, None]).nonzero(as_tuple=True)
    got = mixed(emb, y, (*kept, *kept), ref_emb=ref, ref_labels=ry)
    for q in range(4):
        rest = torch.arange(12) != q
        one = mixed(emb[q:q + 1], y[q:q + 1], ref_emb=ref[rest], ref_labels=ry[rest])
        assert got[q].item() == pytest.approx(one.item(), rel=1e-9)


@pytest.mark.parametrize("n, D", [(3, 7), (7, 3), (4, 4)])
def test_coding_rate_by_eigenvalues(n, D):
    x = torch.tensor(np.random.RandomState(0).standard_normal((n, D)), requires_grad=True)
    unit = x / x.norm(dim=1, keepdim=True)
    want = (1 + D / (n * .25) * torch.linalg.eigvalsh(unit.T @ unit).clamp(min=0)).log().sum() / 2
    got = coding_rate(x)
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(v, x, retain_graph=True)[0] for v in (got, want)))
    assert coding_rate(x.expand(n, D)[:1].expand(5, D)).item() == pytest.approx(.5 * math.log(1 + 4 * D))


@pytest.mark.parametrize("base", ["SupAPLoss", "HAPPIERLoss", "CSLLoss", "HISTLoss", "HMLCLoss", "MovingAPLoss"])
@pytest.mark.parametrize("on", ["embeddings", "proxies"])
def test_a_price_for_collapse_is_added_to_any_loss(base, on):
    if on == "proxies" and base not in ("HAPPIERLoss", "CSLLoss"):
        with pytest.raises(ValueError, match=f"{base} has no proxies"): by_name("AntiCollapseLoss", base=base, on=on)
        return
    emb, y = batch()
    loss = by_name("AntiCollapseLoss", base=base, on=on, rate_weight=.7, gamma=.2)
    if base == "HISTLoss": loss.eval()
    plain = loss.base(emb, y)
    rows = emb if on == "embeddings" else next(p for n, p in loss.named_parameters() if n.endswith("weight"))
    want = plain.item() + .7 * math.exp(-.2 * coding_rate(rows).item())
    assert loss(emb, y).item() == pytest.approx(want, rel=1e-6)
    assert loss.terms["base"] + .7 * loss.terms["collapse"] == pytest.approx(want, rel=1e-6)
    assert len([*loss.parameters()]) == len([*loss.base.parameters()])


@pytest.mark.parametrize("variant", ["O", "Iu", "Ib", "Ds", "Dq"])
def test_pnp_agrees_with_pytorch_metric_learning(variant):
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    emb, y = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), torch.arange(24) % 5
    emb.requires_grad_()
    values = PNPLoss(variant)(emb, y), pml.PNPLoss(b=2, alpha=4, variant=variant)(emb, y)
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(v, emb)[0] for v in values), rtol=1e-8, atol=1e-10)


def test_calibration_with_other_margins_is_the_threshold_consistent_margin_loss():
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    emb, y = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), torch.arange(24) % 5
    ours, theirs = CalibrationLoss(.9, .5), pml.ThresholdConsistentMarginLoss()
    assert ours(emb, y).item() == pytest.approx(theirs(emb, y).item(), rel=1e-9)


def test_hmlc_of_one_level_is_the_supervised_contrastive_loss():
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    emb, y = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), torch.arange(24) % 5
    assert HMLCLoss()(emb, y).item() == pytest.approx(2 * pml.SupConLoss(temperature=.07)(emb, y).item(), rel=1e-9)


@pytest.mark.parametrize("make, message", [
    (lambda: PNPLoss("Dp"), "unknown variant 'Dp'.*Did you mean"), (lambda: MovingAPLoss(0), "num_images must be"),
    (lambda: MovingAPLoss(gamma=2), "gamma must be above 0 and at most 1"),
    (lambda: MovingAPLoss(5).set_rows(torch.tensor([0, 5])), "rows 0 to 5 do not fit .* 5 images"),
    (lambda: SiMixLoss("NormSoftmaxLoss"), "needs a rank loss"),
    (lambda: SiMixLoss(share=-.1), "share must lie in 0..1"),
    (lambda: SiMixLoss(base_args=dict(tua=1)), "Did you mean 'tau'"),
    (lambda: SiMixLoss(base_args=dict(similarity="dot")), "give it to SiMixLoss itself"),
    (lambda: AntiCollapseLoss("pml/CircleLoss"), "needs a loss of hapnb"),
    (lambda: AntiCollapseLoss("NormSoftmaxLoss"), "num_classes"),
    (lambda: AntiCollapseLoss("HAPLoss", level=1), "HAPLoss has no level of its own"),
    (lambda: AntiCollapseLoss(on="all"), "unknown on 'all'")])
def test_wrong_arguments_of_the_newer_losses(make, message):
    with pytest.raises(ValueError, match=message): make()
