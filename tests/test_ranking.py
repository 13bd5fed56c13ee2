"""The rank engine: kernels plugged into it, blocks of every size, and inputs at the edges."""
import pytest
import torch
import torch.nn.functional as F
from hapnb.helpers import KERNELS
from hapnb.losses import make_loss
from hapnb.ranking import HUGE, Leaky, Sigmoid, Step, Sup

HALF = torch.arange(48) // 24
LABELS = {"few": torch.stack([torch.arange(48) // 4, HALF], 1),
          "unequal": torch.stack([torch.arange(48).float().sqrt().long(), torch.zeros(48, dtype=torch.long)], 1),
          "half": torch.stack([torch.arange(48) // 16, torch.zeros(48, dtype=torch.long)], 1),
          "unknown": torch.stack([(torch.arange(48) // 4).where(torch.arange(48) % 5 > 0, torch.tensor(-1)), HALF], 1)}
LOSSES = [("SmoothAPLoss", {}), ("SupAPLoss", {}), ("SupAPLoss", dict(strict=True)), ("SupAPLoss", dict(delta=None)),
          ("SupAPLoss", dict(start=0., offset=1.)), ("SupAPLoss", dict(offset=None)), ("HAPLoss", {}),
          ("HAPLoss", dict(with_hrank=True)), ("SmoothHAPLoss", {}), ("SupRecallLoss", {}), ("SupNDCGLoss", {})]
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
    calls = 0

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
