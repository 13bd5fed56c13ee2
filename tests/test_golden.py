"""Every loss and metric against values computed with the official code, in float64, to 1e-6.

Where the official code has a trap, the comment beside the case says which side the library takes."""
import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden_inputs
from hapnb.core import Relevance
from hapnb.losses import (CalibrationLoss, CSLLoss, HAPLoss, HAPPIERLoss, NormSoftmaxLoss, PairLoss, ROADMAPLoss,
                          SmoothAPLoss, SmoothHAPLoss,
                          SmoothNDCGLoss, SmoothRecallLoss, SupAPLoss, SupNDCGLoss, SupRecallLoss)

CASES = {c["id"]: c for c in GOLDEN["cases"]}
NAMES = sorted(CASES["random_B32_D16_m4_c2_s0"]["losses"])
close = dict(rel=1e-6, abs=1e-9)


RECALL = {"suprank.SupRecallLoss": SupRecallLoss, "suprank.SmoothRecallLoss": SmoothRecallLoss}
TREES = {"suprank.SupNDCGLoss": SupNDCGLoss, "suprank.SmoothNDCGLoss": SmoothNDCGLoss,
         "suprank.SmoothHAPLoss": SmoothHAPLoss}


def surrogate(p): return {k: p[k] for k in ("tau", "rho", "delta", "offset", "start") if k in p}


def proxies(loss, seed):
    loss.weight.data = torch.tensor(np.random.RandomState(seed).standard_normal(tuple(loss.weight.shape)))
    return loss


def build(name, p, case, labels, similarity):
    "The library's loss for a golden name, and the number of label levels it is given."
    kind = name.split(":")[0]
    # The query stays in its own retrieval set, as in the official code; only the comparison with itself is left out.
    if kind in ("brown.SmoothAP", "roadmap.SmoothAP"):
        return SmoothAPLoss(tau=p.get("tau", p.get("anneal")), similarity=similarity), 1
    # delta=None is one straight line from zero, whose value there is the official offset argument.
    # offset=None is the value that makes the curve continuous at delta. The default, 1.44, jumps there, as published.
    if kind == "roadmap.SupAP": return SupAPLoss(**surrogate(p), similarity=similarity), 1
    if kind == "suprank.SupAPLoss":
        return SupAPLoss(**surrogate(p), level=p["hierarchy_level"], similarity=similarity), 2
    if kind.endswith("RecallLoss"):
        return RECALL[kind](ks=p["at_k"], temperature=p["temp"], **surrogate(p), similarity=similarity), 1
    if kind in TREES: return TREES[kind](**surrogate(p), similarity=similarity), p["levels"]
    # The official code averages over non-zero pairs, the paper over all: average="nonzero" is the default.
    if kind == "roadmap.CalibrationLoss":
        return CalibrationLoss(p["pos_margin"], p["neg_margin"], similarity=similarity), 1
    # The query is left out by index. The official code leaves out whatever is more similar than 1 - 1e-5; here the
    # same.
    if kind == "roadmap.PairLoss": return PairLoss(p["margin"], similarity=similarity), 1
    # Levels, not relevances, say who is "less relevant"; pop divides by L where the code divides by L - 1 (H-AP ignores
    # scale).
    if kind == "happier.HAPLoss":
        rel = Relevance("pop",
                        p["alpha"]) if p["relevance_type"] == "pop" else Relevance("map", weights=tuple(p["alpha"]))
        return HAPLoss(**surrogate(p), relevance=rel, with_hrank=p["with_hrank"], beta=p["beta"], gamma=p["gamma"],
                       leak=p["leak"],
                       similarity=similarity), p["levels"]
    if kind == "happier.ClusterLoss":
        l = p["hierarchy_level"]
        loss = NormSoftmaxLoss(p["num_classes"], case["D"], p["temperature"], level=l, similarity=similarity)
        return proxies(loss, 1000 + 100 * l + case["seed"]), 3
    assert kind == "happier.CSLLoss", name
    levels = len(p["margins"])
    table = labels[::case["m"], :levels]
    return proxies(CSLLoss(table, case["D"], p["margins"], p["scale"], similarity=similarity),
                   2000 + case["seed"]), levels


def value_and_grad(loss, emb, labels):
    emb = emb.clone().requires_grad_()
    value = loss(emb, labels)
    grad, = torch.autograd.grad(value, emb)
    return value.item(), grad


@pytest.mark.parametrize("case", CASES)
def test_inputs_follow_the_recipe(case):
    case = CASES[case]
    emb, labels = golden_inputs(case)
    assert emb.sum().item() == pytest.approx(case["check"]["emb_sum"], abs=1e-9)
    assert emb.ravel()[:5].tolist() == pytest.approx(case["check"]["emb_first5"], abs=1e-11)
    assert labels[-1].tolist() == case["check"]["labels_last_row"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_loss(case, name):
    case, want = CASES[case], CASES[case]["losses"][name]
    emb, labels = golden_inputs(case)
    for similarity in ("dot", "cosine"):
        loss, levels = build(name, want["params"], case, labels, similarity)
        value, grad = value_and_grad(loss, emb, labels[:, :levels])
        assert value == pytest.approx(want["value"], **close), similarity
        # dot leaves the embeddings as they are; cosine normalises them, and only the gradient along the sphere remains.
        # The official calibration loss always normalises, so its gradients are those of cosine.
        if similarity == "dot" and "Calibration" in name: continue
        part = "grad_tangent" if similarity == "cosine" else "grad"
        assert grad.norm().item() == pytest.approx(want[part + "_norm"], **close), similarity
        assert grad.ravel()[:5].tolist() == pytest.approx(want[part + "_head"], **close), similarity


@pytest.mark.parametrize("case", CASES)
def test_labels_of_one_level_may_be_a_vector(case):
    case = CASES[case]
    emb, labels = golden_inputs(case)
    assert SupAPLoss()(emb, labels[:, 0]).item() == pytest.approx(case["losses"]["roadmap.SupAP"]["value"], **close)


@pytest.mark.parametrize("case", CASES)
def test_sums(case):
    """ROADMAP adds its two terms with weight 1 each (the code; the paper halves both); HAPPIER is (1 - lambda) H-AP +
    lambda NSM."""
    case = CASES[case]
    emb, labels = golden_inputs(case)
    want = {k: v["value"] for k, v in case["losses"].items()}
    sup, cal = want["roadmap.SupAP"], want["roadmap.CalibrationLoss"]
    hap, nsm = want["happier.HAPLoss:default:L2:pop:alpha=1"], want["happier.ClusterLoss:level0"]
    assert ROADMAPLoss()(emb, labels).item() == pytest.approx(sup + cal, **close)
    assert ROADMAPLoss(weight=(0.9, 0.1))(emb, labels).item() == pytest.approx(0.9 * sup + 0.1 * cal, **close)
    for lam in (0.1, 0.5):
        loss = HAPPIERLoss(int(labels[-1, 0]) + 1, case["D"], lam=lam)
        weight, = (p for n, p in loss.named_parameters() if n.endswith("weight"))
        weight.data = torch.tensor(np.random.RandomState(1000 + case["seed"]).standard_normal(tuple(weight.shape)))
        assert loss(emb, labels[:, :2]).item() == pytest.approx((1 - lam) * hap + lam * nsm, **close)


# Batch of 32 equal embeddings, 4 per class, classes paired twice: the official H-AP loss prefers collapse to random
# embeddings.
# We keep its formula (ties with a less relevant item count one half) and so the same values.
def test_collapse_is_valued_as_published():
    fine = torch.arange(32) // 4
    labels, emb = torch.stack([fine, fine // 2, fine // 4], 1), torch.ones(32, 4, dtype=torch.float64) / 2
    assert HAPLoss()(emb, labels[:, :2]).item() == pytest.approx(0.644444444, abs=1e-6)
    assert HAPLoss()(emb, labels).item() == pytest.approx(0.5, abs=1e-6)
    assert SupAPLoss()(emb, labels).item() == pytest.approx(0.778, abs=1e-3)
    assert SmoothAPLoss()(emb, labels).item() == pytest.approx(0.849, abs=1e-3)


def test_six_vectors_on_a_circle():
    angle = torch.tensor([0, 10, 50, 45, 100, 110], dtype=torch.float64).deg2rad()
    emb, labels = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([0, 0, 0, 1, 1, 1])
    for loss, want in ((SmoothAPLoss(), 0.185706), (SupAPLoss(offset=None), 0.351831), (SupAPLoss(), 0.350772),
                       (SupAPLoss(start=0., offset=1.), 0.341215), (CalibrationLoss(), 0.490054),
                       (CalibrationLoss(average="all"), 0.284189)):
        assert loss(emb, labels).item() == pytest.approx(want, abs=1e-6), loss


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_metrics(case, levels):
    "The query is removed by index, where the official code drops the first neighbour; without duplicates they agree."
    from hapnb.metrics import evaluate
    case, want = CASES[case], CASES[case]["metrics"][f"happier:L{levels}"]
    emb, labels = golden_inputs(case)
    got = evaluate(emb, labels[:, :levels], ks=(1, 2, 4, 10))
    names = {"H-AP_multi": "H-AP", "ASI_multi": "ASI", "NDCG_multi": "NDCG"}
    for k, v in want["values"].items():
        if not k.startswith("AP#"): assert got[names.get(k, k)] == pytest.approx(v, **close), k
    for other in want["H-AP_other_relevances"]:
        a = other["alpha"]
        rel = Relevance("pop", a) if other["relevance_type"] == "pop" else Relevance("map", weights=tuple(a))
        assert evaluate(emb, labels[:, :levels],
                        relevance=rel)["H-AP"] == pytest.approx(other["H-AP_multi"], **close), rel
