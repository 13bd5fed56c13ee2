"""The rank engine: kernels plugged into it, blocks of every size, and inputs at the edges."""
import pytest
import torch
import torch.nn.functional as F
from hapnb import ranking
from hapnb.core import Batch, unit_rows
from hapnb.helpers import KERNELS
from hapnb.losses import make_loss
from hapnb.ranking import HUGE, Leaky, Sigmoid, Step, Sup

# kernels that are installed would take the place of blocks
pytestmark = pytest.mark.usefixtures("blocks")

HALF = torch.arange(48) // 24
LABELS = {"few": torch.stack([torch.arange(48) // 4, HALF], 1),
          "unequal": torch.stack([torch.arange(48).float().sqrt().long(), torch.zeros(48, dtype=torch.long)], 1),
          "half": torch.stack([torch.arange(48) // 16, torch.zeros(48, dtype=torch.long)], 1),
          "unknown": torch.stack([(torch.arange(48) // 4).where(torch.arange(48) % 5 > 0, torch.tensor(-1)), HALF], 1)}
LOSSES = [("SmoothAPLoss", {}), ("SupAPLoss", {}), ("SupAPLoss", dict(strict=True)), ("SupAPLoss", dict(delta=None)),
          ("SupAPLoss", dict(start=0., offset=1.)), ("SupAPLoss", dict(offset=None)), ("HAPLoss", {}),
          ("HAPLoss", dict(with_hrank=True)), ("SmoothHAPLoss", {}), ("SupRecallLoss", {}), ("SupNDCGLoss", {}),
          ("PNPLoss", {})]
by_loss = pytest.mark.parametrize("name,args", LOSSES, ids=[f"{n}-{'-'.join(a)}".strip("-") for n, a in LOSSES])


def curve(f, x):
    "A surrogate at `x`, in its own units, by its formula."
    if isinstance(f, Step): return (x >= 0).to(x.dtype)
    if isinstance(f, Sigmoid): return torch.sigmoid(x)
    if isinstance(f, Leaky): return f(x)
    delta, start, jump, rho, _ = f.pieces
    small = torch.sigmoid(x) + start * (x > 0) + 0.5 * f.strict * (x == 0)
    edge = torch.sigmoid(torch.tensor(delta, dtype=x.dtype))
    return torch.where(x > delta, edge + start + jump + rho * (x - delta), small)


class Plain:
    "What a kernel must compute, on all differences at once."
    calls, surrogates = 0, {Step, Sigmoid, Sup, Leaky}

    @staticmethod
    def available(scores): return True

    @staticmethod
    def differences(f, s, k):
        scale = getattr(f, "scale", 1.)
        return (s * scale)[:, None, :] - (k * scale)[:, :, None], (s > -HUGE / 2)[:, None, :]

    @classmethod
    def sums(cls, f, s, k):
        cls.calls += 1
        x, live = cls.differences(f, s, k)
        return torch.where(live, curve(f, x), 0.).sum(-1)

    @classmethod
    def pull(cls, f, s, k, outer):
        x, live = cls.differences(f, s, k)
        x = x.requires_grad_()
        with torch.enable_grad(): inner, = torch.autograd.grad(curve(f, x).sum(), x)
        d = outer[:, :, None] * torch.where(live, inner * f.scale, 0.)
        return d.sum(1), -d.sum(2)


def rows(n, dtype=torch.float64, seed=0):
    return F.normalize(torch.randn(n, 6, dtype=dtype, generator=torch.Generator().manual_seed(seed)), dim=1)


def step(loss, emb, labels, **refs):
    "Value and gradient."
    emb = emb.clone().requires_grad_()
    value = loss(emb, labels, **refs)
    return value.detach(), *torch.autograd.grad(value, emb)


@pytest.fixture
def plugged(monkeypatch):
    "The plain kernel in use on the CPU."
    monkeypatch.setitem(KERNELS._items, "cpu", Plain)
    monkeypatch.setattr(Plain, "calls", 0)


@by_loss
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_a_kernel_gives_what_the_blocks_give(name, args, labels, dtype, tolerance, request):
    loss, emb = make_loss(name, **args), rows(48, dtype)
    value, grad = step(loss, emb, LABELS[labels])
    request.getfixturevalue("plugged")
    found, slope = step(loss, emb, LABELS[labels])
    assert Plain.calls
    assert torch.allclose(found, value, rtol=tolerance, atol=tolerance)
    assert torch.allclose(slope, grad, rtol=tolerance, atol=tolerance * grad.abs().max())


def test_a_kernel_serves_references_and_values_without_gradient(plugged):
    loss, emb, refs = make_loss("SupAPLoss"), rows(10), rows(30, seed=1)
    labels, ref_labels = torch.arange(10) // 2, torch.arange(30) // 6
    value, _ = step(loss, emb, labels, ref_emb=refs, ref_labels=ref_labels)
    assert Plain.calls and torch.equal(loss(emb, labels, ref_emb=refs, ref_labels=ref_labels), value)


def test_blocks_are_used_where_a_kernel_is_not_available_or_does_not_know_the_surrogate(plugged, monkeypatch):
    class Wider(Sigmoid):
        "A surrogate of the user."
    loss, labels = make_loss("SmoothAPLoss"), LABELS["few"]
    loss.f = Wider(.1)
    step(loss, rows(48), labels)
    monkeypatch.setattr(Plain, "available", lambda scores: False)
    step(make_loss("SupAPLoss"), rows(48), labels)
    assert Plain.calls == 0


@by_loss
@pytest.mark.parametrize("labels", LABELS)
def test_blocks_of_any_size_give_the_same(name, args, labels, monkeypatch):
    loss, emb = make_loss(name, **args), rows(48)
    value, grad = step(loss, emb, LABELS[labels])
    for block in (1, 100, 5000):
        monkeypatch.setattr(ranking, "_block_size", lambda device: block)
        found, slope = step(loss, emb, LABELS[labels])
        assert torch.allclose(found, value, rtol=1e-12)
        assert torch.allclose(slope, grad, rtol=1e-10, atol=1e-12 * grad.abs().max())


@by_loss
def test_a_graph_that_is_kept_gives_the_same_gradient_again(name, args):
    emb = rows(48).requires_grad_()
    value = make_loss(name, **args)(emb, LABELS["unknown"])
    weights = torch.tensor([1., 3.], dtype=value.dtype)
    first, second = (torch.autograd.grad(value, emb, w, retain_graph=True)[0] for w in weights)
    assert torch.allclose(3 * first, second, rtol=1e-12, atol=0)
    batched = torch.autograd.grad(value, emb, weights, is_grads_batched=True)[0]
    assert torch.allclose(batched, torch.stack([first, second]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tau", [1e-12, 1e-6, .01, 1.])
@pytest.mark.parametrize("name", ["SmoothAPLoss", "SupAPLoss", "HAPLoss"])
def test_empty_slots_add_nothing_for_any_width(name, tau):
    # most queries have few positives, one class has many: slots stay empty
    labels = torch.stack([(torch.arange(24) - 8).clamp(min=0), torch.arange(24) // 12], 1)
    for dtype in (torch.float32, torch.float64):
        whole, grad = step(make_loss(name, tau=tau, reduction="mean"), rows(24, dtype), labels)
        assert torch.isfinite(whole) and torch.isfinite(grad).all()
        each = make_loss(name, tau=tau, reduction="none")(rows(24, dtype), labels)
        alone = [make_loss(name, tau=tau)(rows(24, dtype)[i:i + 1], labels[i:i + 1], ref_emb=rows(24, dtype),
                                          ref_labels=labels) for i in range(24)]
        assert torch.allclose(each, torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_unit_rows_have_the_gradient_of_normalize():
    for x in (torch.randn(5, 7, dtype=torch.float64), 1e-3 * torch.ones(1, 1, dtype=torch.float64)):
        g = torch.randn_like(x)
        ours, theirs = (torch.autograd.grad(f(leaf := x.clone().requires_grad_()), leaf, g)[0]
                        for f in (unit_rows, lambda x: F.normalize(x, dim=1)))
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(unit_rows, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("B", [5, 256, 600])
def test_similarities_of_a_set_with_itself_have_the_gradient_of_the_product(B):
    x, g = rows(B).requires_grad_(), torch.randn(B, B, dtype=torch.float64)
    ours, = torch.autograd.grad(Batch(x, None, x, None, True).scores(), x, g)
    theirs, = torch.autograd.grad(x @ x.T, x, g)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
