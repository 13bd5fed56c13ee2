"""Derivatives of every loss beyond the first gradient, and embeddings of extreme length: each right, or an error that
says why."""
import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from hapnb.core import check_embeddings, check_labels, unit_rows
from hapnb.helpers import LOSSES
from hapnb.hypergraph import DISTANCES, class_distances
from hapnb.losses import PairLoss, SupAPLoss, make_loss

# those of the library: other tests register losses of their own
NAMES = [n for n in LOSSES.names() if LOSSES.get(n).__module__.startswith("hapnb.")]
TREE = torch.stack([torch.arange(8) // 2, torch.arange(8) // 4], 1)
OTHER = TREE.flip(0)


def by_name(name, dtype=torch.float64, **args):
    "A loss for 4 classes in 4 dimensions, smooth enough for finite differences, and without noise."
    known = inspect.signature(LOSSES.get(name).__init__).parameters
    if "tau" in known and name != "HISTLoss": args.setdefault("tau", .3)
    if name == "BlackBoxAPLoss": args["margin"] = 0.
    if name == "SiMixLoss": args |= dict(share=.5, base_args=dict(tau=.3))
    torch.manual_seed(1)
    loss = make_loss(name, num_classes=4, embedding_size=4, proxy_labels=TREE[::2], **args).to(dtype)
    # in training mode BatchNorm keeps running averages, which vmap cannot write to
    return loss.eval()


def points(seed=0): return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(f, x, again=False):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, create_graph=again)[0], x


def numeric(f, x, v, eps=1e-6): return (gradient(f, x + eps * v)[0] - gradient(f, x - eps * v)[0]) / (2 * eps)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_second_derivative_is_that_of_the_gradient(name, reduction):
    loss, x, v = by_name(name, reduction=reduction), points(), points(1)
    weight = torch.arange(1., 9, dtype=torch.float64)
    def f(e): return (loss(e, TREE) * weight).sum() if reduction == "none" else loss(e, TREE)
    g, leaf = gradient(f, x, again=True)
    assert torch.allclose(g, gradient(f, x)[0], rtol=1e-9, atol=1e-12)
    found, = torch.autograd.grad((g * v).sum(), leaf)
    assert torch.allclose(found, numeric(f, x, v), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name",
                         ["SmoothAPLoss", "SupAPLoss", "HAPLoss", "SupRecallLoss", "SmoothNDCGLoss", "ROADMAPLoss",
                          "HISTLoss"])
def test_gradgradcheck_with_references(name):
    loss, refs = by_name(name), points(2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda q, r: loss(q, TREE, ref_emb=r, ref_labels=OTHER),
                                        (points().requires_grad_(), refs))


@pytest.mark.parametrize("distance", [d for d in DISTANCES if d != "manhattan"])
def test_distances_in_blocks_have_second_derivatives(distance):
    leaves = [torch.randn(n, 4, dtype=torch.float64).requires_grad_() for n in (3, 5, 5)]
    assert torch.autograd.gradgradcheck(lambda *a: class_distances(*a, distance, 2), leaves)


TRANSFORMS = {
    "grad": lambda f, x, v: (torch.func.grad(f)(x), gradient(f, x)[0]),
    "jacfwd": lambda f, x, v: (torch.func.jacfwd(f)(x), gradient(f, x)[0]),
    "jacrev": lambda f, x, v: (torch.func.jacrev(f)(x), gradient(f, x)[0]),
    "hessian": lambda f, x, v: ((torch.func.hessian(f)(x) * v).sum((-1, -2)), numeric(f, x, v)),
    "vmap": lambda f, x, v: (torch.vmap(f)(torch.stack([x, v])), torch.stack([f(x), f(v)]).detach()),
    "vmap of grad": lambda f, x,
    v: (torch.vmap(torch.func.grad(f))(torch.stack([x, v])), torch.stack([gradient(f, e)[0] for e in (x, v)])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", NAMES)
def test_torch_func_agrees_with_autograd(name, transform):
    loss = by_name(name)
    with warnings.catch_warnings():
        # of vmap, about speed
        warnings.simplefilter("ignore")
        found, wanted = TRANSFORMS[transform](lambda e: loss(e, TREE), points(), points(1))
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert all(isinstance(v, float) for v in loss.terms.values())


@pytest.mark.parametrize("name", ["CalibrationLoss", "SupAPLoss", "HAPLoss", "NormSoftmaxLoss", "HISTLoss"])
def test_vmap_over_labels(name):
    loss, x, y = by_name(name), torch.stack([points(), points(1)]), torch.stack([TREE, OTHER])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.vmap(loss)(x, y)
    assert torch.allclose(found, torch.stack([loss(*pair) for pair in zip(x, y)]))


@pytest.mark.parametrize("name", ["CalibrationLoss", "SupAPLoss", "HAPLoss"])
def test_batched_jacobian(name):
    loss = by_name(name, reduction="none")
    a, b = (torch.autograd.functional.jacobian(lambda e: loss(e, TREE), points(), vectorize=v) for v in (True, False))
    assert torch.allclose(a, b)


def test_bad_input_is_found_inside_torch_func():
    loss = SupAPLoss()
    with pytest.raises(ValueError, match="row 1, level 0 is -2"):
        torch.func.grad(lambda e: loss(e, [0, -2] * 4))(points())
    with pytest.raises(ValueError, match="NaN"): torch.func.grad(lambda e: loss(e / 0, TREE))(torch.zeros(8, 4))


# --- lengths


SCALES = [1e-37, 1e-30, 1e-12, 1e-4, 1e4, 1e12, 1e30, 1e37]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_value_does_not_depend_on_lengths_under_cosine(name, dtype):
    "Embeddings of length 1e-37 to 1e37 (where the type holds them) have the value of those of length one, also mixed."
    loss, x = by_name(name), points().to(dtype)
    for scale in SCALES:
        mixed = x.double() * torch.tensor([scale, 1.] * 4, dtype=torch.float64)[:, None]
        for e in (x.double() * scale, mixed):
            e = e.to(dtype)
            if not e.isfinite().all() or (e == 0).all(1).any(): continue
            leaf = e.clone().requires_grad_()
            value = loss(leaf, TREE)
            value.backward()
            directions = e.double() / e.double().abs().amax(1, keepdim=True)
            if name == "HISTLoss":
                assert loss.terms["distribution"] == pytest.approx(hist_distribution(loss, directions), rel=1e-4)
            else: assert value.item() == pytest.approx(loss(directions, TREE).item(), rel=1e-4, abs=1e-5)
            if 1e-31 < scale < 1e31 and dtype != torch.float16: assert leaf.grad.isfinite().all()


def hist_distribution(loss, x):
    "HIST's network sees lengths, its distributions do not."
    loss(x, TREE)
    return loss.terms["distribution"]


@pytest.mark.parametrize("scale", SCALES)
def test_products_of_extreme_rows_are_refused_or_right(scale):
    "With similarity='dot' products may over- or underflow: such rows are an error, all others have the float64 value."
    for name in ("SupAPLoss", "PairLoss", "NormSoftmaxLoss"):
        loss, x = by_name(name, similarity="dot"), points() * scale
        try: value = loss(x.float(), TREE)
        except ValueError as e: assert "too small or too large" in str(e)
        else: assert value.item() == pytest.approx(loss(x, TREE).item(), rel=1e-4)
    assert 1e-9 < scale < 1e9 or pytest.raises(ValueError, PairLoss(similarity="dot"), points() * scale, TREE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_without_direction_is_an_error_in_every_type(dtype):
    for row in (torch.zeros(4), torch.full((4,), 1e-45)):
        e = torch.stack([torch.ones(4), row]).to(dtype)
        with pytest.raises(ValueError, match="row\\(s\\) 1 of 2 are all zero"): check_embeddings(e, unit=True)


def test_rows_of_ordinary_length_are_normalised_to_the_same_bits():
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(64, 16, dtype=dtype,
                        generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64, dtype=dtype)[:, None]
        assert torch.equal(unit_rows(x), torch.nn.functional.normalize(x, dim=1))


# --- arguments and labels at the door


WRONG = [("HAPLoss", dict(with_hrank="no"), "True or False"), ("AMSoftmaxLoss", dict(plain="no"), "True or False"),
         ("HISTLoss", dict(drop_underflow="no"), "True or False"), ("SupAPLoss", dict(strict=1), "True or False"),
         ("BlackBoxAPLoss", dict(noise=3), "function"),
         ("NormSoftmaxLoss", dict(num_classes=10**13), "NormSoftmaxLoss: "),
         ("SupRecallLoss", dict(ks=None), "SupRecallLoss"),
         ("HISTLoss", dict(level=-1), "level must be a whole number"),
         ("HAPLoss", dict(relevance={"kind": "map", "weights": 5}), "HAPLoss")]


@pytest.mark.parametrize("name, args, said", WRONG, ids=[f"{n} {list(a)[0]}" for n, a, _ in WRONG])
def test_wrong_arguments_are_named(name, args, said):
    with pytest.raises(ValueError, match=said): make_loss(name, **{**dict(num_classes=4, embedding_size=4), **args})


def test_whole_numbers_may_come_as_floats():
    "JSON and papermill give 4.0 for 4."
    assert make_loss("NormSoftmaxLoss", num_classes=4.0, embedding_size=8.0).weight.shape == (4, 8)
    assert make_loss("SupAPLoss", level=0.0)(points(), TREE).isfinite()


def test_labels_come_from_frames_and_any_array():
    import numpy as np
    import pandas as pd
    frame = pd.DataFrame({"fine": [9, 0, 1], "coarse": [3, 0, 0], "split": list("abb")})
    rows = frame[frame.split == "b"]
    assert check_labels(rows.fine).tolist() == [[0], [1]]
    assert check_labels(rows[["fine", "coarse"]]).tolist() == [[0, 0], [1, 0]]
    for reversed_numbers in (np.arange(3)[::-1], np.arange(3, dtype=">i8")[::-1]):
        assert check_labels(reversed_numbers).tolist() == [[2], [1], [0]]
    for names in (["a", "b"], np.array(["a", "b"]), [1, None], pd.Series([1, None], dtype="Int64"), pd.Series(["a"]),
                  [[0, 1], [2]], "ab"):
        with pytest.raises(ValueError, match="labels must"): check_labels(names)


# --- what importing the losses costs


HEAVY = {"accelerate", "matplotlib", "optuna", "pandas", "PIL", "pyarrow", "pydantic", "pytorch_metric_learning",
         "scipy", "sklearn", "timm", "torchvision"}


def test_importing_the_losses_imports_nothing_of_training():
    "A fresh process imports hapnb.losses; what it holds beyond torch is fastcore and the notebooks before it."
    code = "import torch, sys; a = set(sys.modules); import hapnb.losses; print(*sorted(set(sys.modules) - a))"
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & {m.split(".")[0] for m in new}
    ours = {m.removeprefix("hapnb.") for m in new if m.startswith("hapnb.")}
    assert ours <= {"core", "helpers", "ranking", "pairs", "proxies", "contrast", "surrogates", "moving", "hypergraph",
                    "losses"}
