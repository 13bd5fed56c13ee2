"""hapnb.external: losses and miners of pytorch-metric-learning follow our contract and say what they cannot do.

Every class of the installed version is tried once; the contract is held by one loss of each kind."""
import copy
import math
import pickle
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pytorch_metric_learning")

from hapnb import external
from hapnb.external import PMLLoss, pml_loss, pml_miner
from hapnb.helpers import LOSSES
from hapnb.losses import SmoothAPLoss, make_loss
from test_metrics import Far, TwoDevices

pytestmark = pytest.mark.filterwarnings("ignore:pml/SmoothAPLoss", "ignore:Values of Tp or Tn")
EVERY = list(external._classes("losses"))
REFUSED = {"BaseLossWrapper", "BaseMetricLossFunction", "CrossBatchMemory", "GenericPairLoss", "ManifoldLoss",
           "MultipleLosses",
           "SelfSupervisedLoss", "VICRegLoss"}
# one of each kind: pairs, triplets, a softmax with weights, one without references and miners, one that keeps a
# histogram, one that needs
# arguments, one that ranks
NAMES = ["ContrastiveLoss", "TripletMarginLoss", "ArcFaceLoss", "P2SGradLoss", "DynamicSoftMarginLoss",
         "RankedListLoss", "SmoothAPLoss"]
NO_REFERENCES = {"ArcFaceLoss", "P2SGradLoss", "RankedListLoss", "SmoothAPLoss"}
NO_PAIRS = {"P2SGradLoss", "RankedListLoss"}
MINERS = [n for n in external._classes("miners") if n != "BaseMiner"]
EXTRA = dict(RankedListLoss=dict(margin=.4, Tn=5))
FINE = torch.arange(24) // 4
TREE = torch.stack([FINE, FINE // 2, FINE // 6], 1)


def batch(n=24, seed=0, dtype=torch.float32):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def made(name, **args):
    torch.manual_seed(0)
    return make_loss(f"pml/{name}", num_classes=6, embedding_size=8, proxy_labels=TREE[::4], **EXTRA.get(name, {}),
                     **args)


def value(loss, *args, **kw):
    torch.manual_seed(1)  # some draw triplets
    return float(loss(*args, **kw).detach())


def theirs(name, **args):
    torch.manual_seed(0)
    cls, sizes = external._lookup("losses", name), dict(num_classes=6, embedding_size=8, descriptors_dim=8)
    return cls(**{k: v for k, v in sizes.items() if k in external._parameters(cls)}, **EXTRA.get(name, {}), **args)


@pytest.mark.parametrize("name", EVERY)
def test_every_class_is_refused_or_takes_two_steps(name):
    if name in REFUSED:
        with pytest.raises(ValueError): made(name)
        return
    loss, x = made(name), batch().requires_grad_()
    opt = torch.optim.SGD([x, *loss.parameters()], lr=1e-4)
    before, old = [p.detach().clone() for p in loss.parameters()], x.detach().clone()
    v = loss(x, TREE)
    v.backward()
    opt.step()
    assert v.shape == () and math.isfinite(v.item()) and loss.terms == {"loss": v.item()} and not torch.equal(x, old)
    assert not any(torch.equal(p, b) for p, b in zip(loss.parameters(), before))
    loss(x, TREE).backward()


@pytest.mark.parametrize("name", [n for n in EVERY if n not in REFUSED])
def test_references_are_looked_at_or_refused(name):
    "A loss that takes references has another value with others."
    loss, y = made(name), TREE[:12]
    try: values = [value(copy.deepcopy(loss), batch(), TREE, ref_emb=batch(12, seed), ref_labels=y) for seed in (1, 2)]
    except ValueError as e: assert "compares a batch with itself only" in str(e)
    else: assert values[0] != values[1]


@pytest.mark.parametrize("name", NAMES)
def test_same_value_as_theirs(name):
    for level in range(3):
        assert value(made(name, level=level), batch(),
                     TREE) == pytest.approx(value(theirs(name), batch(), TREE[:, level].contiguous()), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_rows_do_not_matter(name):
    y, keep = TREE.clone(), torch.ones(24, dtype=torch.bool)
    rows = [4, 5, 6, 7] if name == "SmoothAPLoss" else [0, 9]  # theirs wants equally many of each class
    y[rows], keep[rows] = -1, False
    assert value(made(name), batch(), y) == pytest.approx(value(made(name), batch()[keep], y[keep]), rel=1e-6)
    x = batch().requires_grad_()
    nothing = made(name)(x, torch.full((24, 3), -1))
    nothing.backward()
    assert nothing.item() == 0 and not x.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_references_or_an_error(name):
    ref, y = batch(30, 1), TREE[torch.arange(30) % 24]
    if name in NO_REFERENCES:
        with pytest.raises(ValueError, match="compares a batch with itself only"):
            made(name)(batch(), TREE, ref_emb=ref, ref_labels=y)
    else:
        found = value(made(name), batch(), TREE, ref_emb=ref, ref_labels=y)
        assert found == pytest.approx(value(theirs(name), batch(), FINE, None, ref, y[:, 0].contiguous()), rel=1e-6)
        y[3], keep = -1, torch.arange(30) != 3
        assert value(made(name), batch(), TREE, ref_emb=ref,
                     ref_labels=y) == pytest.approx(value(made(name), batch(), TREE, ref_emb=ref[keep],
                                                          ref_labels=y[keep]), rel=1e-6)
    x = batch()
    assert value(made(name), x, TREE, ref_emb=x, ref_labels=TREE) == value(made(name), x, TREE)  # the batch itself


@pytest.mark.parametrize("miner", ["TripletMarginMiner", "MultiSimilarityMiner"])
@pytest.mark.parametrize("name", NAMES)
def test_pairs_of_miners(name, miner):
    torch.manual_seed(0)
    pairs = pml_miner(miner)(batch(), TREE)
    if name in NO_PAIRS:
        with pytest.raises(ValueError, match="indices_tuple is not supported"): made(name)(batch(), TREE, pairs)
    else:
        assert value(made(name), batch(), TREE,
                     pairs) == pytest.approx(value(theirs(name), batch(), FINE, pairs), rel=1e-6)


def test_pairs_that_touch_unknown_rows_are_dropped():
    y = FINE.clone()
    y[0] = -1
    loss, (a, p, n) = made("TripletMarginLoss",
                           margin=1.), torch.tensor([[0, 4, 4, 5, 8], [1, 5, 0, 6, 9], [8, 9, 8, 0, 1]])
    good = torch.tensor([1, 4])
    assert value(loss, batch(), y, (a, p, n)) == pytest.approx(value(loss, batch(), FINE, (a[good], p[good], n[good])))
    wanted = value(loss, batch(), y, (a[[1, 3, 4]], p[[1, 3, 4]], a[[1, 2, 4]], n[[1, 2, 4]]))
    assert value(loss, batch(), y, (a, p, a, n)) == pytest.approx(wanted)


# miners

@pytest.mark.parametrize("name", MINERS)
def test_miners_find_rows_of_what_was_given(name):
    if name == "EmbeddingsAlreadyPackagedAsTriplets": return  # reads no labels
    y, ref, ry = TREE.clone(), batch(30, 1), TREE[torch.arange(30) % 24].clone()
    y[[2, 5]], ry[[0, 7]] = -1, -1
    torch.manual_seed(0)
    for args, other in (((batch(), y), y), ((batch(), y, ref, ry), ry)):
        found = pml_miner(name, level=1)(*args)
        anchors = found[::2] if len(found) == 4 else (found[0], found[0])
        assert (y[anchors[0], 1] == other[found[1], 1]).all() and (y[anchors[0], 1] >= 0).all()
        assert (y[anchors[1], 1] != other[found[-1], 1]).all() and (other[found[-1], 1] >= 0).all()
        assert len(found[1]) + len(found[-1])
        if len(args) == 2: assert (anchors[0] != found[1]).all()
        assert not any(t.requires_grad for t in found)


def test_packed_triplets():
    miner = pml_miner("EmbeddingsAlreadyPackagedAsTriplets")
    assert [t.tolist() for t in miner(batch(6), FINE[:6])] == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match="looks into the batch only"): miner(batch(6), FINE[:6], batch(9), FINE[:9])
    with pytest.raises(ValueError, match="row 1 is of unknown class"):
        miner(batch(6), torch.tensor([0, -1, 1, 0, 0, 1]))


@pytest.mark.parametrize("name", MINERS)
def test_miner_of_half_precision(name):
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16): a = pml_miner(name)(batch(dtype=torch.bfloat16), TREE)
    torch.manual_seed(0)
    assert all(torch.equal(i, j) for i, j in zip(a, pml_miner(name)(batch(dtype=torch.bfloat16).float(), TREE)))


# where they will be used

@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_within_a_hundredth(name):
    loss, x = made(name), F.normalize(batch(), dim=1)
    x16 = x.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16): v = loss(x16, TREE)
    v.backward()
    assert v.dtype == torch.float32 and x16.grad.isfinite().all()
    assert {p.dtype for p in loss.parameters()} <= {torch.float32}
    assert v.item() == pytest.approx(value(made(name), x16.float(), TREE), rel=1e-6)
    if name != "SmoothAPLoss": assert v.item() == pytest.approx(value(made(name), x, TREE), rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_double(name):
    loss, x = made(name).double(), batch(dtype=torch.float64)
    v = loss(x, TREE)
    assert v.dtype == (torch.float32 if name == "SmoothAPLoss" else torch.float64)
    assert all(p.dtype == torch.float64 for p in loss.parameters())
    assert v.item() == pytest.approx(value(made(name), x.float(), TREE), rel=1e-3, abs=1e-5)
    assert made(name).double()(x.float(), TREE).isfinite()  # mixed: the wider type wins


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_stays_on_its_device(name):
    "With values, on two devices that are told apart: everything runs where the embeddings are."
    loss = made(name)
    expected = value(loss, batch(), TREE)
    loss = made(name)
    with torch.no_grad(), TwoDevices():
        for m in loss.modules():
            for table, wrap in ((m._parameters, lambda t: torch.nn.Parameter(t, requires_grad=False)),
                                (m._buffers, lambda t: t)):
                for k, t in [i for i in table.items() if i[1] is not None]: table[k] = wrap(Far(t.detach()))
        torch.manual_seed(1)
        v = loss(Far(batch()), TREE)
    assert isinstance(v, Far) and float(v.here) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_copied_saved_and_printed(name):
    loss = made(name)
    loss(batch().requires_grad_(), TREE)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert value(twin, batch(), TREE) == value(copy.deepcopy(loss), batch(), TREE) and repr(twin) == repr(loss)
    fresh = made(name)
    fresh.load_state_dict(loss.state_dict())
    assert value(fresh, batch(), TREE) == value(loss, batch(), TREE) and "level=0" in repr(loss)


def test_a_loss_that_keeps_a_histogram_resumes():
    a, b = made("DynamicSoftMarginLoss"), made("DynamicSoftMarginLoss")
    for i in range(3): a(batch(seed=i).requires_grad_(), TREE).backward()
    assert list(a.state_dict()) == ["loss.hist_"] and value(a, batch(), TREE) != value(b, batch(), TREE)
    a, b = copy.deepcopy(a), made("DynamicSoftMarginLoss")
    b.load_state_dict(a.state_dict())
    assert value(a, batch(), TREE) == value(b, batch(), TREE)


def test_sizes_go_where_they_are_wanted():
    assert made("ArcFaceLoss").loss.W.shape == (8, 6) and made("P2SGradLoss").loss.weight.shape == (8, 6)
    assert made("CosFaceLoss", margin=.2).loss.margin == .2
    assert not list(made("TripletMarginLoss").parameters())
    beta = dict(made("MarginLoss", learn_beta=True).named_parameters())
    assert list(beta) == ["loss.beta"] and beta["loss.beta"].shape == (6,)
    loss = made("MarginLoss", learn_beta=True)
    loss(batch(), TREE).backward()
    assert loss.loss.beta.grad.any()
    assert pml_loss("MarginLoss", learn_beta=True, nu=.1)(batch(), TREE).shape == ()  # one beta for all


def test_parts_by_name():
    loss = made("TripletMarginLoss", distance={"name": "LpDistance", "p": 1}, reducer="MeanReducer",
                embedding_regularizer="LpRegularizer")
    assert type(loss.loss.distance).__name__ == "LpDistance" and loss.loss.distance.p == 1
    assert math.isfinite(value(loss, batch(), TREE))
    assert type(pml_miner("TripletMarginMiner",
                          distance="CosineSimilarity").miner.distance).__name__ == "CosineSimilarity"


def test_table_of_losses_knows_them():
    assert isinstance(LOSSES.get("pml/ArcFaceLoss")(num_classes=2, embedding_size=3), PMLLoss)
    assert type(make_loss("pml/CircleLoss", level=1).loss).__name__ == "CircleLoss"
    assert LOSSES.get("SmoothAPLoss") is SmoothAPLoss
    assert pickle.loads(pickle.dumps(LOSSES.get("pml/CircleLoss")))().name == "CircleLoss"


def test_smooth_ap_warns_by_measuring(monkeypatch):
    theirs = external._lookup("losses", "SmoothAPLoss")
    x, y = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) // 4
    off = abs(float(theirs()(x, y)) - float(SmoothAPLoss()(x, y)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pml_loss("SmoothAPLoss"), pml_loss("CircleLoss")
    assert [f"off by {off:.3f}" in str(w.message) for w in said] == [True] * (off > 1e-3)
    # a mended version
    monkeypatch.setattr(theirs, "forward", lambda self, x, y: SmoothAPLoss()(x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pml_loss("SmoothAPLoss")


@pytest.mark.parametrize("made, message", [
    (lambda: make_loss("pml/TripletMargin"),
     "unknown loss 'TripletMargin' of pytorch-metric-learning. Did you mean 'TripletMarginLoss'"),
    (lambda: LOSSES.get("pml/nothing"), "unknown loss 'nothing'"),
    (lambda: pml_miner("TripletMargin"), "Did you mean 'TripletMarginMiner'"),
    (lambda: make_loss("pml/TripletMarginLoss", mrgin=1), "has no argument 'mrgin'. Did you mean 'margin'"),
    (lambda: pml_miner("TripletMarginMiner", mrgin=1), "Did you mean 'margin'"),
    (lambda: make_loss("pml/ArcFaceLoss"), "pml/ArcFaceLoss needs num_classes, embedding_size"),
    (lambda: make_loss("pml/CosFaceLoss", num_classes=3), "pml/CosFaceLoss needs embedding_size"),
    (lambda: pml_loss("RankedListLoss", Tn=1), "needs margin"),
    (lambda: pml_loss("GenericPairLoss"), "needs mat_based_loss"),
    (lambda: pml_loss("BaseMetricLossFunction"), "this is a base for others"),
    (lambda: pml_loss("SelfSupervisedLoss"), "made of other losses"),
    (lambda: pml_loss("CrossBatchMemory", embedding_size=8), "CrossBatchMemory"),
    (lambda: pml_loss("MultipleLosses", losses=[]), "made of other losses"),
    (lambda: pml_loss("VICRegLoss"), "labels are not supported"),
    (lambda: pml_loss("ManifoldLoss", embedding_size=8), "labels are not supported"),
    (lambda: pml_loss("CircleLoss", distance="LpDistance"),
     "CircleLoss requires the distance metric to be CosineSimilarity"),
    (lambda: pml_loss("TripletMarginLoss", distance="Cosine"),
     "unknown distance 'Cosine'.*Did you mean 'CosineSimilarity'"),
    (lambda: pml_loss("TripletMarginLoss", distance={"p": 1}), "has no 'name'"),
    (lambda: pml_loss("TripletMarginLoss", reducer={"name": "ThresholdReducer", "lw": 1}),
     "has no argument 'lw'. Did you mean 'low'"),
    (lambda: pml_loss("PNPLoss", variant="X"), "variant=X but must be one of"),
    (lambda: pml_loss("CircleLoss", level=-1), "level must be a whole number"),
    (lambda: pml_miner("BaseMiner")(batch(), FINE), "this is a base for others"),
    (lambda: pml_loss("CircleLoss", level=3)(batch(), TREE),
     "pml/CircleLoss asks for level 3, but the labels have 3 level"),
    (lambda: pml_loss("CircleLoss")(batch(), FINE[:5]), "24 embeddings but 5 labels"),
    (lambda: pml_loss("CircleLoss")(batch(), FINE, ref_emb=batch(3)), "ref_emb and ref_labels belong together"),
    (lambda: pml_loss("CircleLoss")(batch(), FINE, ref_emb=batch(3), ref_labels=FINE[:2]), "3 ref_emb but 2 labels"),
    (lambda: pml_loss("CircleLoss")(batch(), FINE, ref_emb=torch.ones(2, 5), ref_labels=FINE[:2]),
     "8 dimensions, ref_emb 5"),
    (lambda: pml_loss("CircleLoss")(batch() / 0, FINE), "NaN or infinite values in row"),
    (lambda: pml_loss("CircleLoss")(batch() * 1e-30, FINE), "too small or too large"),
    (lambda: pml_loss("CircleLoss")(batch(), FINE, "pairs"), "indices_tuple must be 3 tensors"),
    (lambda: pml_loss("CircleLoss")(batch(0), FINE[:0]), "the batch is empty"),
    (lambda: pml_loss("ArcFaceLoss", 3, 8)(batch(), FINE), "made for 3 classes, but a label at level 0 is 3"),
    (lambda: pml_loss("ArcFaceLoss", 6, 5)(batch(), FINE), "made for embeddings of 5 dimensions, got 8"),
    (lambda: pml_loss("TripletMarginLoss", reducer="DoNothingReducer")(batch(), FINE), "choose another reducer"),
])
def test_bad_input(made, message):
    with pytest.raises(ValueError, match=message): made()


def test_without_the_package(monkeypatch):
    for name in [m for m in sys.modules if m.startswith("pytorch_metric_learning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    for call in (lambda: make_loss("pml/CircleLoss"), lambda: LOSSES.get("pml/CircleLoss"),
                 lambda: pml_miner("HDCMiner")):
        with pytest.raises(ImportError, match="pip install pytorch-metric-learning"): call()
    assert make_loss("SmoothAPLoss") is not None
