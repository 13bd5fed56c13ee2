"""FastAP, SoftBin-AP and BlackBox-AP: against values of the official code, against loops written from the formulas,
against bad input, and where they will be used."""
import copy
import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from brute import dots, mean, shared, to_embeddings
from conftest import GOLDEN, examples, golden_inputs
from hapnb.helpers import LOSSES
from hapnb.surrogates import BlackBoxAPLoss, FastAPLoss, SoftBinAPLoss
from hypothesis import given
from hypothesis import strategies as st

CASES = {c["id"]: c for c in GOLDEN["cases"]}
NAMES = sorted(next(iter(CASES.values()))["surrogates"])
MAKE = {"FastAPLoss": FastAPLoss, "SoftBinAPLoss": SoftBinAPLoss,
        "BlackBoxAPLoss": lambda **k: BlackBoxAPLoss(margin=0., **k)}
close = dict(rel=1e-6, abs=1e-9)


# the official code

def official(name, case, **k):
    if "FastAP" in name: return FastAPLoss(**k)
    if "SoftBin" in name: return SoftBinAPLoss(**k)
    if "margin=0" in name: return BlackBoxAPLoss(margin=0., **k)
    noise = torch.tensor(np.random.RandomState(4000 + case["seed"]).standard_normal((case["B"], case["B"])))
    return BlackBoxAPLoss(noise=lambda scores: noise, **k)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_golden(case, name, similarity):
    case, want = CASES[case], CASES[case]["surrogates"][name]
    emb, labels = golden_inputs(case)
    leaf = emb.clone().requires_grad_()
    value = official(name, case, similarity=similarity)(leaf, labels)
    assert value.item() == pytest.approx(want["value"], rel=1e-9, abs=1e-12)
    grad, = torch.autograd.grad(value, leaf)
    tangent = grad - (grad * emb).sum(1, keepdim=True) * emb
    # FastAP always normalises, so its gradient is the tangent one. SoftBin-AP has the query on a corner: only the
    # tangent part means
    # something. BlackBox-AP with "dot" gives the whole gradient as well.
    checks = [(tangent, "grad_tangent")] + [(grad, "grad")] * ("BlackBox" in name and similarity == "dot")
    for g, part in checks:
        assert g.norm().item() == pytest.approx(want[part + "_norm"], **close)
        assert g.ravel()[:5].tolist() == pytest.approx(want[part + "_head"], **close)


def test_golden_noise_by_the_generator(monkeypatch):
    "Without a noise function the loss asks torch.randn_like, as the official code does."
    case = next(iter(CASES.values()))
    emb, labels = golden_inputs(case)
    def noise(t): return torch.tensor(np.random.RandomState(4000 + case["seed"]).standard_normal(tuple(t.shape)))
    monkeypatch.setattr(torch, "randn_like", noise)
    assert BlackBoxAPLoss()(emb, labels).item() == pytest.approx(case["surrogates"]["roadmap.BlackBoxAP"]["value"],
                                                                 rel=1e-9)


# brute force

def histograms(scores, positive, nodes):
    width = 2 / (nodes - 1)
    hp, hn = [0.] * nodes, [0.] * nodes
    for s, p in zip(scores, positive):
        for j in range(nodes): (hp if p else hn)[j] += max(0., 1 - abs(min(max(s, -1.), 1.) - (1 - j * width)) / width)
    return hp, hn


def histogram_ap(scores, positive, nodes):
    """1 - AP of one query and its derivatives by the scores.

    AP = sum_j h+_j H+_j / H_j / N+, by the chain rule over the bins."""
    n, width = sum(positive), 2 / (nodes - 1)
    if n == 0: return None, [0.] * len(scores)
    hp, hn = histograms(scores, positive, nodes)
    H = [sum(hp[:j + 1]) + sum(hn[:j + 1]) for j in range(nodes)]
    P = [sum(hp[:j + 1]) for j in range(nodes)]
    ap = sum(hp[j] * P[j] / H[j] for j in range(nodes) if hp[j] > 0) / n
    def by_bin(i, p):
        later = [j for j in range(i, nodes) if hp[j] > 0]
        if p: return (P[i] / H[i] if H[i] > 0 else 0.) + sum(hp[j] * (H[j] - P[j]) / H[j] ** 2 for j in later)
        return -sum(hp[j] * P[j] / H[j] ** 2 for j in later)
    slopes = []
    for s, p in zip(scores, positive):
        g = 0.
        for j in range(nodes):
            d = s - (1 - j * width)
            if abs(s) < 1 and abs(d) < width: g -= by_bin(j, p) * -math.copysign(1 / width, d) / n
        slopes.append(g)
    return 1 - ap, slopes


def rank(scores, k): return sum(t >= scores[k] for t in scores)


def blackbox(rows, positives, lam=4., eps=1e-5):
    "1 - AP of each query, and N (rank(s + lam g) - rank(s)) / lam, g the derivative of the mean by the ranks over N."
    queries = sum(any(p) for p in positives)
    values, slopes = [], []
    for s, p in zip(rows, positives):
        if not any(p):
            values.append(None)
            slopes.append([0.] * len(s))
            continue
        N, n, ap, g = len(s), sum(p) + eps, 0., [0.] * len(s)
        for k in range(N):
            if not p[k]: continue
            within, r = sum(t >= s[k] for t, q in zip(s, p) if q), rank(s, k)
            ap += within / r / n
            g[k] = (within / N) / (r / N) ** 2 / n / queries
        moved = [a + lam * b for a, b in zip(s, g)]
        values.append(1 - ap)
        slopes.append([queries * (rank(moved, k) - rank(s, k)) / N / lam for k in range(N)])
    return values, slopes


def by_hand(name, scores, positive, square, arg):
    if name == "BlackBoxAPLoss": return blackbox(scores, positive, *arg)
    values, slopes, nodes = [], [], arg + 1 if name == "FastAPLoss" else arg
    for q, (s, p) in enumerate(zip(scores, positive)):
        own = q if square and name == "FastAPLoss" else None
        v, g = histogram_ap([x for k, x in enumerate(s) if k != own], [x for k, x in enumerate(p) if k != own], nodes)
        values.append(v)
        slopes.append(g if own is None else g[:own] + [0.] + g[own:])
    return values, slopes


@st.composite
def problems(draw):
    "Queries, references or None, labels [.., 2] with unequal class sizes and unknown classes."
    Q, N, D, C = draw(st.integers(1, 14)), draw(st.integers(1, 14)), draw(st.integers(2, 5)), draw(st.integers(1, 6))
    r = np.random.RandomState(draw(st.integers(0, 2 ** 31 - 1)))
    def side(n):
        fine = r.randint(0, C, n)
        rows = np.stack([fine, fine // 2], 1)
        rows[r.rand(n) < draw(st.sampled_from((0., .3))), 0] = -1
        return r.standard_normal((n, D)), rows.tolist()
    return side(Q) + (side(N) if draw(st.booleans()) else (None, None))


def compare(name, problem, arg, cosine=True, level=0, dtype=torch.float64, rel=1e-9):
    q, ql, r, rl = problem
    if not cosine: q, r = q * .4, r if r is None else r * .4  # some scores beyond one, most within
    keys = ("num_bins",) if name != "BlackBoxAPLoss" else ("lambda_val", "eps")
    loss = MAKE[name](**dict(zip(keys, np.atleast_1d(arg).tolist())), level=level,
                      similarity="cosine" if cosine else "dot")
    a = torch.tensor(q, dtype=dtype, requires_grad=True)
    b = None if r is None else torch.tensor(r, dtype=dtype, requires_grad=True)
    got = loss(a, torch.tensor(ql), ref_emb=b, ref_labels=None if r is None else torch.tensor(rl))
    got.backward()
    scores = dots(q, q if r is None else r, cosine)
    positive = shared([x[level:level + 1] for x in ql], [x[level:level + 1] for x in (ql if r is None else rl)])
    want, slopes = mean(*by_hand(name, scores, positive, r is None, arg))
    assert got.dtype == dtype and got.item() == pytest.approx(want, rel=rel, abs=rel * 1e-2)
    for leaf, grad in zip((a, b), to_embeddings(slopes, q, r, cosine)):
        if leaf is not None:
            assert np.abs(leaf.grad.numpy() - grad).max() <= rel * max(np.abs(grad).max(), 1e-2), "gradient"


ARGS = {"FastAPLoss": (1, 2, 10), "SoftBinAPLoss": (2, 3, 20), "BlackBoxAPLoss": ((4., 1e-5), (.5, 0.), (50., 1e-5))}
each = pytest.mark.parametrize("name", MAKE)


@each
@given(problem=problems(), which=st.integers(0, 2), cosine=st.booleans(), level=st.integers(0, 1))
@examples(60)
def test_brute_force(name, problem, which, cosine, level): compare(name, problem, ARGS[name][which], cosine, level)


@pytest.mark.parametrize("name", ["FastAPLoss", "SoftBinAPLoss"])
@pytest.mark.parametrize("seed", range(5))
def test_brute_force_float32(name, seed):
    r = np.random.RandomState(seed)
    q = r.standard_normal((20, 8)).astype("float32").astype("float64")
    compare(name, (q, (r.randint(0, 5, (20, 1))).tolist(), None, None), ARGS[name][2], dtype=torch.float32, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_fastap_is_that_of_pytorch_metric_learning(seed):
    from pytorch_metric_learning.losses import FastAPLoss as Theirs
    g = torch.Generator().manual_seed(seed)
    emb, y = torch.randn(30, 6, generator=g, dtype=torch.float64), torch.randint(0, 9, (30,), generator=g)
    for bins in (3, 10, 25):
        a, b = emb.clone().requires_grad_(), emb.clone().requires_grad_()
        ours, theirs = FastAPLoss(bins)(a, y), Theirs(num_bins=bins)(b, y)
        ours.backward()
        theirs.backward()
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
        assert torch.allclose(a.grad, b.grad, rtol=1e-8, atol=1e-12)


# properties

def batch(n=12, seed=0, dtype=torch.float64, classes=4):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=dtype), torch.arange(n) % classes


@each
def test_order_of_the_batch_does_not_matter(name):
    "With exact arithmetic (eighths), so that duplicates tie exactly wherever they stand."
    emb, y = batch()
    emb = torch.cat([emb, emb[:5]]).mul(4).round() / 8
    y = torch.cat([y, (y[:5] + 1) % 4])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    a, b = emb.clone().requires_grad_(), emb[order].clone().requires_grad_()
    one, two = MAKE[name](similarity="dot")(a, y), MAKE[name](similarity="dot")(b, y[order])
    one.backward()
    two.backward()
    assert one.item() == pytest.approx(two.item(), rel=1e-9)
    assert a.grad.any() and torch.allclose(a.grad[order], b.grad, atol=1e-10)


def test_ties_get_the_worst_rank():
    loss = BlackBoxAPLoss(margin=0., eps=0., similarity="dot")
    one = torch.ones(1, 1, dtype=torch.float64)
    for labels in ([0, 1], [1, 0]):
        assert loss(one, torch.tensor([0]), ref_emb=one.expand(2, 1),
                    ref_labels=torch.tensor(labels)).item() == pytest.approx(.5)


@each
@pytest.mark.parametrize("value", [1., 0.7])
def test_all_embeddings_equal(name, value):
    emb = torch.full((8, 3), value, dtype=torch.float64, requires_grad=True)
    loss = MAKE[name]()(emb, torch.arange(8) // 4)
    loss.backward()
    assert loss.item() == pytest.approx(1 - (3 / 7 if name == "FastAPLoss" else 4 / 8), rel=1e-5)
    assert emb.grad.isfinite().all()


@each
def test_perfect_ranking(name):
    emb, y = torch.eye(3, dtype=torch.float64).repeat_interleave(4, 0), torch.arange(12) // 4
    assert MAKE[name]()(emb, y).item() == pytest.approx(0., abs=1e-5)


@each
def test_who_counts(name):
    "A single image, an unknown label, references without a match: never NaN, left out of the mean, zero gradient."
    emb, y = batch(6)
    y = torch.tensor([0, 0, 1, -1, 0, -1])
    leaf = emb.clone().requires_grad_()
    each = MAKE[name](reduction="none")(leaf, y)
    counts = torch.tensor([1, 1, name != "FastAPLoss", 0, 1, 0], dtype=torch.bool)  # FastAP leaves the query out
    assert each.shape == (6,) and (each[~counts] == 0).all()
    assert MAKE[name]()(emb, y).item() == pytest.approx((each.sum() / counts.sum()).item())
    each.sum().backward()
    assert leaf.grad.isfinite().all()
    for labels in (torch.full((6,), -1), torch.full((6,), 7)):
        leaf = emb.clone().requires_grad_()
        value = MAKE[name]()(leaf, y.clamp(min=0), ref_emb=emb.clone(), ref_labels=labels)
        value.backward()
        assert value.item() == 0 and not leaf.grad.any()


@each
def test_batch_of_one(name):
    leaf = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    value = MAKE[name]()(leaf, torch.tensor([3]))
    value.backward()
    assert value.item() == pytest.approx(0., abs=1.1e-5)
    assert torch.allclose(leaf.grad, torch.zeros(1, 4, dtype=torch.float64), atol=1e-12)
    with pytest.raises(ValueError, match="empty"): MAKE[name]()(torch.ones(0, 4), torch.zeros(0, dtype=torch.long))


@each
def test_same_set_by_identity_not_by_shape(name):
    (emb, y), (ref, ry) = batch(), batch(12, 1)
    loss = MAKE[name]()
    assert loss(emb, y, ref_emb=emb, ref_labels=y).item() == loss(emb, y).item()
    assert loss(emb, y, ref_emb=ref, ref_labels=ry).item() != loss(emb, y).item()


@each
def test_levels(name):
    emb, y = batch()
    tree = torch.stack([y, y // 2], 1)
    assert MAKE[name](level=1)(emb, tree).item() == pytest.approx(MAKE[name]()(emb, y // 2).item())
    with pytest.raises(ValueError, match="level 2"): MAKE[name](level=2)(emb, tree)


@each
def test_mean_of_none_is_the_mean(name):
    emb, y = batch()
    y[3] = -1
    a, b = emb.clone().requires_grad_(), emb.clone().requires_grad_()
    one, each = MAKE[name]()(a, y), MAKE[name](reduction="none")(b, y)
    counts = 11
    one.backward()
    (each.sum() / counts).backward()
    assert one.item() == pytest.approx((each.sum() / counts).item()) and torch.allclose(a.grad, b.grad, atol=1e-14)


@each
@pytest.mark.parametrize("factor", [.5, 65536.])
def test_a_factor_on_the_loss_is_one_on_the_gradient(name, factor):
    """A gradient scaler, or a weight in a sum, must not change the direction (in the official BlackBox-AP it multiplies
    lambda)."""
    emb, y = batch()
    a, b = emb.clone().requires_grad_(), emb.clone().requires_grad_()
    MAKE[name]()(a, y).backward()
    (factor * MAKE[name]()(b, y)).backward()
    assert a.grad.any() and torch.allclose(a.grad * factor, b.grad, rtol=1e-9)


@each
def test_autocast_computes_in_float32(name):
    emb, y = batch(dtype=torch.bfloat16)
    emb.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16): value = MAKE[name]()(emb, y)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(MAKE[name]()(emb.float(), y).item(), rel=1e-5)
    value.backward()
    assert emb.grad.dtype == torch.bfloat16 and emb.grad.isfinite().all()


@pytest.mark.parametrize("where", ["cuda", "cpu"])
@pytest.mark.parametrize("name", [*MAKE, "noise"])
def test_fake_tensors(name, where):
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(where):
        loss = BlackBoxAPLoss() if name == "noise" else MAKE[name]()
        emb, y = torch.randn(8, 4, requires_grad=True), torch.zeros(8, 2, dtype=torch.long)
        for ref in ({}, dict(ref_emb=torch.randn(5, 4), ref_labels=torch.zeros(5, 2, dtype=torch.long))):
            value = loss(emb, y, **ref)
            assert value.shape == () and value.device.type == where
            if where == "cpu": value.backward()


@each
def test_cross_batch_memory(name):
    "The query's own copy in the memory is left out of its retrieval set."
    from pytorch_metric_learning.losses import CrossBatchMemory
    class Memory(CrossBatchMemory):
        @classmethod
        def check_loss_support(cls, loss_name): pass
    queue = Memory(MAKE[name](similarity="dot"), 4, memory_size=20)
    for step in range(4):
        emb, y = batch(8, step)
        leaf = (emb / emb.norm(dim=1, keepdim=True)).requires_grad_()
        value = queue(leaf, y)
        value.backward()
        assert leaf.grad.isfinite().all()
        own, full = queue.curr_batch_idx.tolist(), 20 if queue.has_been_filled else queue.queue_idx
        scores = dots(leaf.detach().numpy(), queue.embedding_memory[:full].numpy())
        positive = shared(y[:, None].tolist(), queue.label_memory[:full, None].tolist())
        rest, same = ([[v for k, v in enumerate(row) if k != own[q]] for q, row in enumerate(x)]
                      for x in (scores, positive))
        arg = {"FastAPLoss": 10, "SoftBinAPLoss": 20, "BlackBoxAPLoss": (4., 1e-5)}[name]
        want, _ = mean(*by_hand(name, rest, same, False, arg))
        assert value.item() == pytest.approx(want, rel=1e-6)


@each
def test_copied_pickled_and_found(name):
    loss, (emb, y) = MAKE[name](), batch()
    loss(emb.clone().requires_grad_(), y)
    assert LOSSES.get(name) is type(loss) and loss.terms["loss"] == pytest.approx(loss(emb, y).item())
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin(emb, y).item() == loss(emb, y).item() and repr(twin) == repr(loss)


def test_noise():
    emb, y = batch()
    loss = BlackBoxAPLoss(margin=.5)
    def seeded(s):
        torch.manual_seed(s)
        return loss(emb, y).item()
    assert seeded(1) == seeded(1) != seeded(2)
    assert seeded(1) > BlackBoxAPLoss(margin=0.)(emb, y).item()
    flipped = BlackBoxAPLoss(margin=.5, noise=lambda s: -torch.ones_like(s))
    # only its size counts
    assert flipped(emb, y).item() == BlackBoxAPLoss(margin=.5, noise=torch.ones_like)(emb, y).item()


@pytest.mark.parametrize("make, message", [
    (lambda: FastAPLoss(0), "num_bins must be a whole number, 1 or more, got 0"),
    (lambda: FastAPLoss(2.5), "whole number"),
    (lambda: SoftBinAPLoss(1), "2 or more"), (lambda: SoftBinAPLoss(True), "whole number"),
    (lambda: BlackBoxAPLoss(0.), "lambda_val must be above 0"), (lambda: BlackBoxAPLoss(math.nan), "lambda_val"),
    (lambda: BlackBoxAPLoss(margin=-1.), "margin must be 0 or more"),
    (lambda: BlackBoxAPLoss(eps=-1.), "eps must be 0 or more"),
    (lambda: BlackBoxAPLoss(noise=lambda s: s[:1])(*batch()), r"noise gave shape \(1, 12\)"),
    (lambda: FastAPLoss(similarity="cosin"), "cosine"),
    (lambda: SoftBinAPLoss()(*batch(), indices_tuple=(0, 0, 0)), "miners"),
    (lambda: FastAPLoss()(torch.zeros(2, 3), torch.tensor([0, 0])), "no direction")])
def test_errors(make, message):
    with pytest.raises(ValueError, match=message): make()


MEMORY = """
import json, resource, sys, torch
from hapnb.surrogates import *
torch.set_num_threads(1)
n = 2048
z, y = torch.randn(n, 16, requires_grad=True), torch.arange(n) // 4
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
made = {"FastAPLoss": FastAPLoss(200), "SoftBinAPLoss": SoftBinAPLoss(200), "BlackBoxAPLoss": BlackBoxAPLoss()}
made[sys.argv[1]](z, y).backward()
print(json.dumps(peak() - before))
"""


@each
def test_memory_is_that_of_a_few_score_matrices(name):
    "A score matrix of this batch is 16 MB; an array of query x reference x bin would be 3.3 GB."
    run = subprocess.run([sys.executable, "-c", MEMORY, name], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) < 400
