"""HISTLoss against loops written from its formulas and values of the official code, and its parts against their claims:
distances, propagation, memory, bad input."""
import copy
import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden_inputs
from hapnb.hypergraph import (HGNN, ClassDistributions, HISTLoss, HypergraphConv, class_distances, hyperedges,
                              log_incidence, normalised,
                              oversmoothing, propagate)
from hapnb.losses import make_loss
from torch.utils.weak import WeakIdKeyDictionary

CASES = {c["id"]: c for c in GOLDEN["cases"]}
DISTANCES = ("mahalanobis", "euclidean", "cosine", "manhattan")
close = dict(rel=1e-6, abs=1e-9)


# --- the official code


def golden_loss(case, p, **args):
    "The loss of a golden case, with parameters drawn as the recipe says."
    C, D, hidden = p["nb_classes"], case["D"], p["hidden"]
    loss = HISTLoss(C, D, hidden=hidden, tau=p["tau"], alpha=p["alpha"], lambda_s=p["lambda_s"], **args).double()
    r = np.random.RandomState(3000 + case["seed"])
    draw = lambda *shape: r.standard_normal(shape)
    state = {"distributions.means": draw(C, D), "distributions.log_vars": .5 * draw(C, D),
             "hgnn.convs.0.theta.weight": draw(hidden, D) / np.sqrt(D), "hgnn.convs.0.theta.bias": .1 * draw(hidden),
             "hgnn.norms.0.weight": 1 + .1 * draw(hidden), "hgnn.norms.0.bias": .1 * draw(hidden),
             "hgnn.norms.0.running_mean": .1 * draw(hidden), "hgnn.norms.0.running_var": np.exp(.1 * draw(hidden)),
             "hgnn.norms.0.num_batches_tracked": np.array(0),
             "hgnn.convs.1.theta.weight": draw(C, hidden) / np.sqrt(hidden), "hgnn.convs.1.theta.bias": .1 * draw(C)}
    loss.load_state_dict({k: torch.as_tensor(v) for k, v in state.items()})  # strict: these names and no others
    return loss.train(p["bn"] == "train")


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_golden(case, mode, drop):
    """In float64 nothing underflows in these cases, so the safe default and the official rule agree with the official
    values."""
    case, want = CASES[case], CASES[case]["hist"][f"hist.HIST:bn_{mode}"]
    emb, labels = golden_inputs(case)
    loss, leaf = golden_loss(case, want["params"], drop_underflow=drop), emb.clone().requires_grad_()
    H, classes = loss.incidence(emb, labels)
    assert H.sum().item() == pytest.approx(want["H_sum"], **close)
    assert H[0].tolist() == pytest.approx(want["H_first_row"], **close)
    assert classes.tolist() == labels[:, 0].unique().tolist()
    value = loss(leaf, labels)
    assert value.item() == pytest.approx(want["value"], **close)
    assert loss.terms["distribution"] == pytest.approx(want["dist_loss"], **close)
    assert loss.terms["hypergraph"] == pytest.approx(want["ce_loss"], **close)
    value.backward()
    assert leaf.grad.norm().item() == pytest.approx(want["grad_norm"], **close)
    assert leaf.grad.ravel()[:5].tolist() == pytest.approx(want["grad_head"], **close)
    along = leaf.grad - (leaf.grad * emb).sum(1, keepdim=True) * emb
    assert along.norm().item() == pytest.approx(want["grad_tangent_norm"], **close)
    assert along.ravel()[:5].tolist() == pytest.approx(want["grad_tangent_head"], **close)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_golden_in_float32(mode):
    case = CASES["random_B32_D16_m4_c2_s0"]
    want, (emb, labels) = case["hist"][f"hist.HIST:bn_{mode}"], golden_inputs(case)
    leaf = emb.float().requires_grad_()
    value = golden_loss(case, want["params"]).float()(leaf, labels)
    value.backward()
    assert value.item() == pytest.approx(want["value"], rel=1e-4)
    assert leaf.grad.norm().item() == pytest.approx(want["grad_norm"], rel=1e-4)


# --- brute force: one image and one class at a time, the dense G, BatchNorm by its formula


def unit(v): return v / (v * v).sum().sqrt()


def distance_by_hand(x, mean, log_var, kind):
    x, mean = unit(x), unit(mean)
    if kind == "mahalanobis": return ((x - mean) ** 2 / log_var.clamp(0, 6).exp()).sum()
    if kind == "euclidean": return ((x - mean) ** 2).sum()
    if kind == "cosine": return 1 - (x * mean).sum()
    return (x - mean).abs().sum()


def cross_entropy_by_hand(row, target):
    top = max(v.item() for v in row)
    return top + sum((v - top).exp() for v in row).log() - row[target]


def dense_g(H):
    De, Dv = H.sum(0), H.sum(1)
    return torch.diag(Dv ** -.5) @ H @ torch.diag(1 / De) @ H.T @ torch.diag(Dv ** -.5)


def by_hand(loss, emb, target):
    "Mean over known images of -log softmax(-tau d) and of the network's cross-entropy."
    means, log_vars = loss.distributions.means, loss.distributions.log_vars
    d = [[distance_by_hand(x, m, v, loss.distributions.distance) for m, v in zip(means, log_vars)] for x in emb]
    present = sorted({t for t in target if t >= 0})
    def member(i, t, c): return torch.ones_like(d[i][c]) if t == c else (-loss.alpha * d[i][c]).exp()
    H = torch.stack([torch.stack([member(i, t, c) for c in present]) for i, t in enumerate(target)])
    G, x = dense_g(H), emb
    for i, conv in enumerate(loss.hgnn.convs):
        x = G @ (x @ conv.theta.weight.T + conv.theta.bias)
        if i + 1 == len(loss.hgnn.convs): break
        bn = loss.hgnn.norms[i]
        m, s = (x.mean(0), ((x - x.mean(0)) ** 2).mean(0)) if loss.training else (bn.running_mean, bn.running_var)
        x = (x - m) / (s + bn.eps).sqrt() * bn.weight + bn.bias
        x = torch.where(x > 0, x, .1 * x)
    known = [i for i, t in enumerate(target) if t >= 0]
    own = sum(cross_entropy_by_hand([-loss.tau * v for v in d[i]], target[i]) for i in known) / len(known)
    mixed = sum(cross_entropy_by_hand(x[i], target[i]) for i in known) / len(known)
    return own + loss.lambda_s * mixed


def problem(C=5, D=4, n=9, seed=0, **args):
    "A loss in float64 with log-variances on both sides of 0 and 6, embeddings of all lengths, and labels."
    torch.manual_seed(seed)
    loss = HISTLoss(C, D, hidden=6, **args).double()
    with torch.no_grad():
        loss.distributions.log_vars.normal_(1.5, 4)
        loss.distributions.means.mul_(3)
        for bn in loss.hgnn.norms:
            bn.running_mean.normal_()
            bn.running_var.uniform_(.5, 2)
            bn.weight.normal_(1, .3)
            bn.bias.normal_()
    lengths = torch.linspace(.2, 3, n, dtype=torch.float64)[:, None]
    return loss, torch.randn(n, D, dtype=torch.float64) * lengths, torch.randint(0, C, (n,))


def compare(loss, emb, labels, rtol=1e-9):
    leaves = [emb.requires_grad_(), *loss.parameters()]
    got, want = loss(emb, labels), by_hand(loss, emb, labels.tolist())
    assert got.item() == pytest.approx(want.item(), rel=rtol)
    for a, b in zip(torch.autograd.grad(got, leaves, allow_unused=True),
                    torch.autograd.grad(want, leaves, allow_unused=True)):
        assert (a is None) == (b is None)
        if a is not None: torch.testing.assert_close(a, b, rtol=rtol, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layers", range(1, 7))
@pytest.mark.parametrize("distance", DISTANCES)
def test_value_and_gradients(distance, layers, training):
    loss, emb, labels = problem(distance=distance, layers=layers, seed=layers, tau=4., alpha=.7, lambda_s=.6)
    compare(loss.train(training), emb, labels)


@pytest.mark.parametrize("alpha", [0., -.5, -3., .9, 20.])
@pytest.mark.parametrize("C", [3, 40])
def test_any_alpha_and_more_or_fewer_classes_than_images(alpha, C):
    loss, emb, labels = problem(C=C, alpha=alpha, tau=2.)
    labels[[1, 4]] = -1  # nodes without a class
    compare(loss, emb, labels)


def test_with_blocks_of_classes(monkeypatch):
    "The whole loss does not change when the distances go block by block."
    monkeypatch.setattr("hapnb.hypergraph._block_size", lambda *a: 2)
    for distance in DISTANCES: compare(*problem(distance=distance, tau=4.))


def test_labels_of_a_level():
    loss, emb, labels = problem()
    tree = torch.stack([torch.arange(9), labels], 1)
    coarse = copy.deepcopy(loss)
    coarse.level = 1
    assert coarse(emb, tree).item() == loss(emb, labels).item()
    with pytest.raises(ValueError, match="level 1"): HISTLoss(5, 4, level=1)(emb, labels)


def test_one_value_an_image():
    loss, emb, labels = problem(layers=3)
    labels[2] = -1
    loss.reduction = "none"
    each = loss(emb, labels)
    loss.reduction = "mean"
    assert each.shape == (9,) and each[2] == 0
    assert loss(emb, labels).item() == pytest.approx(each.sum().item() / 8, rel=1e-12) == loss.terms["loss"]
    assert loss.terms["loss"] == pytest.approx(loss.terms["distribution"] + loss.terms["hypergraph"], rel=1e-12)


# --- the toy of three images and three classes


TOY = dict(x=[[1, 0], [0, 1], [.6, .8]], y=[0, 1, 1], mu=[[1, 0], [0, 1], [-1, 0]],
           v=[[0, 0], [math.log(2), 0], [-3, 7]])


def toy(**args):
    loss = HISTLoss(3, 2, hidden=4, **args).double()
    loss.distributions.means.data = torch.tensor(TOY["mu"], dtype=torch.float64)
    loss.distributions.log_vars.data = torch.tensor(TOY["v"], dtype=torch.float64)
    return loss, torch.tensor(TOY["x"], dtype=torch.float64), torch.tensor(TOY["y"])


def test_toy():
    loss, x, y = toy(tau=2.)
    d = loss.distributions(x)
    torch.testing.assert_close(d, torch.tensor([[0, 1.5, 4], [2, 0, 1.0025], [.8, .22, 2.5616]], dtype=torch.float64),
                               rtol=0, atol=5e-5)
    loss(x, y)
    assert loss.terms["distribution"] == pytest.approx(.156987, abs=5e-7)
    H, classes = loss.incidence(x, y)
    torch.testing.assert_close(H, torch.tensor([[1, .2592], [.1653, 1], [.4868, 1]], dtype=torch.float64), rtol=0,
                               atol=5e-5)
    B = normalised(H.log(), torch.ones(2, dtype=torch.bool))
    G = torch.tensor([[.5043, .1773, .2992], [.1773, .3940, .3733], [.2992, .3733, .3942]], dtype=torch.float64)
    torch.testing.assert_close(B @ B.T, G, rtol=0, atol=5e-5)


# --- distances


@pytest.mark.parametrize("size", [1, 3, 7, None])
@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_and_finite_differences(distance, size):
    g = torch.Generator().manual_seed(1)
    x, m, v = (torch.randn(n, 5, generator=g, dtype=torch.float64) * s for n, s in ((4, 2), (7, .3), (7, 4)))
    got = class_distances(x, m, v, distance, size)
    want = [[distance_by_hand(a, b, c, distance).item() for b, c in zip(m, v)] for a in x]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-14)
    leaves = [t.requires_grad_() for t in (x, m, v)]
    assert torch.autograd.gradcheck(lambda *a: class_distances(*a, distance, size), leaves, eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("needs",
                         [(True, False, False), (False, True, False), (False, False, True), (False, True, True)])
@pytest.mark.parametrize("distance", DISTANCES)
def test_blocks_give_only_the_gradients_that_are_wanted(distance, needs):
    g = torch.Generator().manual_seed(2)
    base = [torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (4, 7, 7)]
    found = []
    for size in (3, 7):
        leaves = [t.clone().requires_grad_(n) for t, n in zip(base, needs)]
        d = class_distances(*leaves, distance, size)
        if d.requires_grad: d.square().sum().backward()
        found.append([t.grad for t in leaves])
    for a, b in zip(*found):
        if b is None: assert a is None or not a.any()
        else: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [0., 1e-6, 1e-4, 1e-2, 1.])
@pytest.mark.parametrize("distance", ["mahalanobis", "euclidean", "cosine"])
def test_products_lose_no_more_than_rounding(distance, scale):
    """float32 in 512 dimensions against the expanded formula in float64: absolute error below 1e-6, never negative,
    gradients too."""
    g = torch.Generator().manual_seed(3)
    m, v = torch.randn(64, 512, generator=g), torch.randn(64, 512, generator=g)
    x = (F.normalize(m, dim=1) + scale * F.normalize(torch.randn(64, 512, generator=g), dim=1)).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    got = class_distances(x, m, v, distance)
    assert got.min() >= 0
    a, b = F.normalize(exact_x, dim=1), F.normalize(m.double(), dim=1)
    w = (-F.relu6(v.double())).exp() if distance == "mahalanobis" else torch.ones_like(b)
    want = 1 - a @ b.T if distance == "cosine" else ((a[:, None] - b) ** 2 * w).sum(2)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    got.diagonal().sum().backward()
    want.diagonal().sum().backward()
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=0, atol=1e-6)


def test_unknown_distance():
    x, m = torch.randn(2, 5), torch.randn(3, 5)
    for call in (lambda: class_distances(x, m, m, "euclid"), lambda: ClassDistributions(3, 5, "euclid")):
        with pytest.raises(ValueError, match="unknown distance 'euclid'. Did you mean 'euclidean'.*Known: mahalanobis"):
            call()


def test_class_distributions_start():
    torch.manual_seed(0)
    made = ClassDistributions(800, 64)
    for p in made.parameters():
        assert p.shape == (800, 64) and p.std().item() == pytest.approx((2 / 800) ** .5, rel=.02)
        assert abs(p.mean().item()) < 1e-3


# --- hypergraph and propagation


@pytest.mark.parametrize("C", [4, 9, 10, 50])
def test_hyperedges_are_the_classes_present(C):
    g = torch.Generator().manual_seed(C)
    for n in (1, 2, 9):
        for _ in range(20):
            target = torch.randint(-1, min(C, 5), (n,), generator=g).clamp(max=C - 1)
            classes, present = hyperedges(target, C)
            assert classes.shape == present.shape == (min(n, C),)
            assert classes[present].tolist() == sorted({t for t in target.tolist() if t >= 0})
            assert 0 <= classes.min() and classes.max() < C


@pytest.mark.parametrize("alpha", [-2., 0., .9, 5.])
def test_propagation_is_the_dense_one(alpha):
    g = torch.Generator().manual_seed(0)
    target, d = torch.tensor([0, 0, 3, 5, 5, 5, 1]), 4 * torch.rand(7, 6, generator=g, dtype=torch.float64)
    for C in (6, 60):
        classes, present = hyperedges(target, C)
        log_h = log_incidence(d[:, classes], target, classes, alpha)
        B, G = normalised(log_h, present), dense_g(log_h[:, present].exp())
        torch.testing.assert_close(B @ B.T, G, rtol=1e-12, atol=1e-14)
        x = torch.randn(7, 3, generator=g, dtype=torch.float64)
        torch.testing.assert_close(propagate(x, B), G @ x, rtol=1e-12, atol=1e-14)
        values = torch.linalg.eigvalsh(G)
        assert values.max().item() == pytest.approx(1) and values.min() > -1e-12


@pytest.mark.parametrize("widths", [(3, 2), (3, 3), (3, 8)])
def test_both_orders_of_a_convolution(widths):
    torch.manual_seed(0)
    conv, x = HypergraphConv(*widths).double(), torch.randn(5, widths[0], dtype=torch.float64)
    B = normalised(torch.randn(5, 4, dtype=torch.float64), torch.tensor([True, False, True, True]))
    torch.testing.assert_close(conv(x, B), B @ B.T @ (x @ conv.theta.weight.T + conv.theta.bias), rtol=1e-12,
                               atol=1e-14)


@pytest.mark.parametrize("alpha", [-1e4, -100., -40., 0., 100., 1e4])
def test_no_alpha_overflows(alpha):
    "float32 exp(40 * 4) is infinite; the loss and all its gradients are not."
    loss, emb, labels = problem(alpha=alpha)
    loss, emb = loss.float(), emb.detach().float().requires_grad_()
    labels[3] = -1
    value = loss(emb, labels)
    value.backward()
    assert value.isfinite() and emb.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in loss.parameters())


def test_alpha_zero_tells_the_network_nothing():
    loss, emb, labels = problem(alpha=0.)
    scores = loss.node_states(emb, labels, before_norm=True)[1]
    torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=1e-9, atol=1e-12)


# --- underflow


def test_images_whose_probability_underflows():
    "The official rule leaves the worst image out of the mean, with its gradient; log-softmax keeps both."
    loss, _, _ = toy(lambda_s=0.)
    emb, labels = torch.tensor([[-1., 0.], [.8, .6], [0., 1.]]), torch.tensor([0, 0, 1])
    found = {}
    for drop in (False, True):
        loss.drop_underflow = drop
        leaf = emb.clone().requires_grad_()
        value = copy.deepcopy(loss).float()(leaf, labels)
        value.backward()
        found[drop] = value.item(), leaf.grad
    d = loss.distributions(emb.double())
    each = [cross_entropy_by_hand(list(-32 * row), t).item() for row, t in zip(d, labels.tolist())]
    assert each[0] > 104
    assert found[False][0] == pytest.approx(sum(each) / 3, rel=1e-5)
    assert found[True][0] == pytest.approx(sum(each[1:]) / 2, rel=1e-5)
    assert not found[True][1][0].any()
    torch.testing.assert_close(found[True][1][1:], found[False][1][1:] * 3 / 2)
    wide = copy.deepcopy(loss)  # in float64 it does not underflow
    assert wide(emb.double(), labels).item() == pytest.approx(sum(each) / 3, rel=1e-9)


def test_all_images_underflow():
    loss, _, _ = toy(lambda_s=0., drop_underflow=True)
    emb = torch.tensor([[-1., 0.]], requires_grad=True)
    value = loss.float()(emb, torch.tensor([0]))
    value.backward()
    assert value.item() == 0 and not emb.grad.any()


# --- corners and bad input


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_small_batches(layers):
    loss, emb, labels = problem(layers=layers)
    before = {k: t.clone() for k, t in loss.state_dict().items()}
    one = loss(emb[:1], labels[:1])  # BatchNorm takes its running averages, and leaves them
    assert all(torch.equal(t, before[k]) for k, t in loss.state_dict().items())
    assert one.item() == pytest.approx(copy.deepcopy(loss).eval()(emb[:1], labels[:1]).item(), rel=1e-12)
    compare(loss, emb, torch.full((9,), 3))  # a single class
    two, _, _ = problem(C=2, layers=layers)
    compare(two, emb.detach(), labels % 2)  # two classes: the official one-hot has one column
    sole, _, _ = problem(C=1, layers=layers)
    assert sole(emb, labels * 0).item() == pytest.approx(0, abs=1e-12)


def test_nothing_known():
    loss, emb, _ = problem()
    emb.requires_grad_()
    value = loss(emb, torch.full((9,), -1))
    value.backward()
    assert value.item() == 0 and not emb.grad.any() and emb.grad.isfinite().all()
    assert loss.terms == dict(loss=0., distribution=0., hypergraph=0.)


def test_bad_input():
    loss, emb, labels = problem()
    bad = labels.clone()
    bad[2], bad[7] = 5, 11
    for call, message in ((lambda: loss(emb, bad), r"row\(s\) 2, 7 have classes up to 11.*0 to 4"),
                          (lambda: loss(emb, labels.index_fill(0, torch.tensor([3]), -2)), "row 3, level 0 is -2"),
                          (lambda: loss.incidence(emb, bad), r"2, 7"), (lambda: loss.node_states(emb, bad), r"2, 7"),
                          (lambda: loss(torch.where(torch.arange(9)[:, None] == 4, math.nan, emb), labels),
                           r"row\(s\) 4"),
                          (lambda: loss(emb * (torch.arange(9)[:, None] != 6), labels),
                           r"row\(s\) 6 of 9 are all zero"),
                          (lambda: loss(emb[:, :3], labels), "3 dimensions.*4"),
                          (lambda: loss(emb, labels[:5]), "9 embeddings but 5"),
                          (lambda: copy.deepcopy(loss).half()(emb, labels), "float16")):
        with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize("args, message", [
    (dict(distance="manhatan"), "Did you mean 'manhattan'"),
    (dict(distance="l2"), "mahalanobis, euclidean, cosine, manhattan"),
    (dict(layers=0), "layers"), (dict(layers=2.5), "layers"), (dict(layers=True), "layers"), (dict(hidden=0), "hidden"),
    (dict(tau=0), "tau"),
    (dict(tau=math.inf), "tau"), (dict(alpha=math.nan), "alpha"), (dict(lambda_s=-1), "lambda_s"),
    (dict(reduction="sum"), "mean"),
    (dict(similarity="cosine"), "similarity"), (dict(num_classes=0), "num_classes must be a whole number, 1 or more"),
    (dict(embedding_size=2.5), "embedding_size must be a whole number")])
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        make_loss("HISTLoss", **{**dict(num_classes=3, embedding_size=2), **args})


def test_names_of_the_state():
    "What optimiser groups and official weights rely on."
    loss = HISTLoss(7, 4, hidden=6, layers=3)
    assert {k: tuple(p.shape) for k, p in loss.named_parameters()} == {
        "distributions.means": (7, 4), "distributions.log_vars": (7, 4),
        "hgnn.convs.0.theta.weight": (6, 4), "hgnn.convs.0.theta.bias": (6,), "hgnn.convs.1.theta.weight": (6, 6),
        "hgnn.convs.1.theta.bias": (6,),
        "hgnn.convs.2.theta.weight": (7, 6), "hgnn.convs.2.theta.bias": (7,),
        "hgnn.norms.0.weight": (6,), "hgnn.norms.0.bias": (6,), "hgnn.norms.1.weight": (6,), "hgnn.norms.1.bias": (6,)}
    assert isinstance(loss.hgnn.norms[0], torch.nn.BatchNorm1d) and isinstance(loss.hgnn, HGNN)


# --- looking inside


@pytest.mark.parametrize("training", [True, False])
def test_node_states(training):
    loss, emb, labels = problem(layers=4)
    loss.train(training)
    before = {k: t.clone() for k, t in loss.state_dict().items()}
    after, raw = loss.node_states(emb, labels), loss.node_states(emb, labels, before_norm=True)
    assert all(torch.equal(t, before[k]) for k, t in loss.state_dict().items())
    assert [tuple(s.shape) for s in after] == [(9, 4), (9, 6), (9, 6), (9, 6), (9, 5)]
    assert torch.equal(after[0], emb) and torch.equal(after[-1], raw[-1]) and not any(s.requires_grad for s in after)
    loss(emb, labels)
    assert F.cross_entropy(after[-1], labels).item() == pytest.approx(loss.terms["hypergraph"], rel=1e-12)
    bn = loss.hgnn.norms[1]
    m, s = (raw[2].mean(0),
            raw[2].var(0, unbiased=False)) if training else (before["hgnn.norms.1.running_mean"],
                                                             before["hgnn.norms.1.running_var"])
    want = F.leaky_relu((raw[2] - m) / (s + bn.eps).sqrt() * bn.weight + bn.bias, .1)
    torch.testing.assert_close(after[2], want)


def test_oversmoothing():
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = F.normalize(x, dim=1)
    pairs = [(u[i] * u[j]).sum().item() for i in range(7) for j in range(7) if i != j]
    opposite = torch.cat([x[:1], -x[:1]])
    assert oversmoothing([x, 3 * x[:1].repeat(4, 1), opposite,
                          0 * x]) == pytest.approx([sum(pairs) / len(pairs), 1, -1, 0])
    with pytest.raises(ValueError, match="1 node"): oversmoothing([x, x[:1]])


# --- cost


def expanded(x, means, log_vars):
    "Mahalanobis distances as published, with the N x C x D array."
    x, m, w = F.normalize(x, dim=1)[:, None], F.normalize(means, dim=1)[None], (-F.relu6(log_vars)).exp()[None]
    return ((x - m) ** 2 * w).sum(2)


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    "Bytes of the storages that operations made: alive `now`, the `most` at any time, and the `largest` one."
    def __init__(self, *old):
        super().__init__()
        self.now = self.most = self.largest = 0
        self.seen = WeakIdKeyDictionary({t.untyped_storage(): 0 for t in old})

    def freed(self, size): self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if not torch.is_tensor(t) or (store := t.untyped_storage()) in self.seen: continue
            size = self.seen[store] = store.nbytes()
            self.now += size
            self.most, self.largest = max(self.most, self.now), max(self.largest, size)
            weakref.finalize(store, self.freed, size)
        return out


def peak(f, leaves):
    "Peak bytes of value and gradients; what is there before does not count, the gradients do."
    with Peak(*leaves) as mode: torch.autograd.grad(f(), leaves)
    return mode


def test_the_measure_of_memory():
    x = torch.randn(1000, requires_grad=True)
    mode = peak(lambda: (x * x * x).sum(), [x])
    assert 3 * 4000 <= mode.most <= 6 * 4000 and mode.largest == 4000


def test_memory_at_the_size_of_stanford_online_products():
    """32 images, 11,318 classes, 512 dimensions, in tensors that have shapes only: the published form needs 49 times
    the memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    N, C, D = 32, 11318, 512
    with FakeTensorMode():
        x, labels = torch.randn(N, D, requires_grad=True), torch.zeros(N, dtype=torch.long)
        loss = HISTLoss(C, D)
        means, log_vars = loss.distributions.means, loss.distributions.log_vars
        plain = peak(lambda: expanded(x, means, log_vars).sum(), [x, means, log_vars])
        whole = peak(lambda: loss(x, labels), [x, *loss.parameters()])
        assert plain.largest >= 4 * N * C * D
        assert whole.largest <= 4 * C * D  # the gradient of the means
        beyond = lambda mode, leaves: mode.most - sum(4 * t.numel() for t in leaves)  # the gradients have to be
        assert whole.most * 49 < plain.most, (whole.most, plain.most)
        assert beyond(whole, [x, *loss.parameters()]) * 300 < beyond(plain, [x, means, log_vars])
        for distance in DISTANCES:
            mode = peak(lambda: class_distances(x, means, log_vars, distance).sum(),
                        [x, means] + [log_vars] * (distance == "mahalanobis"))
            assert mode.most * 50 < plain.most, (distance, mode.most, plain.most)
            assert mode.largest <= 4 * C * D, distance
