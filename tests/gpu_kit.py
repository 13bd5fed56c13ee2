"""What the tests marked `gpu` and tools/gpu_check.py share: losses, batches, differences of a device from the CPU."""
import inspect, os, warnings

import torch
import torch.nn.functional as F
from hapnb.core import check_labels
from hapnb.helpers import LOSSES
from hapnb.losses import make_loss
from hapnb.metrics import evaluate
from hapnb.ranking import Leaky, Sigmoid, Step, Sup

# a rehearsal without a GPU: HAPNB_GPU_DEVICE=cpu pytest tests/test_gpu.py
DEVICE = os.environ.get("HAPNB_GPU_DEVICE", "cuda")
NAMES = [n for n in LOSSES.names() if LOSSES.get(n).__module__.startswith("hapnb.")]
SURROGATES = [Step(), Sigmoid(), Sup(), Sup(delta=None), Sup(offset=None, strict=True), Sup(start=0., offset=1.),
              Leaky()]
# of values and gradients, relative
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


def takes(name): return inspect.signature(LOSSES.get(name)).parameters


def methods(name):
    "Ways in which a loss can be computed, None for the only one."
    return ("direct", "loglinear") if "method" in takes(name) else (None,)


def build(name, dim, classes, levels=2, **args):
    "A loss for `classes` finest classes, two per parent at each level; arguments that it does not know are left out."
    table = torch.stack([torch.arange(classes) // 2**l for l in range(levels)], 1)
    known = dict(num_classes=classes, embedding_size=dim, proxy_labels=table, margins=(.3,) * levels, share=.5, **args)
    torch.manual_seed(0)
    return make_loss(name, **{k: v for k, v in known.items() if k in takes(name) and v is not None})


def images(B, dim=16, seed=0, dtype=torch.float32):
    "Unit embeddings [B, dim] around class centres, and labels [B, 2]: 4 images per class, half of B per super-class."
    fine = torch.arange(B) // 4
    labels = torch.stack([fine, (fine > fine[-1] // 2).long()], 1)
    random = torch.Generator().manual_seed(seed)
    centres, noise = (torch.randn(n, dim, generator=random, dtype=torch.float64) for n in (B, B))
    coarse = torch.randn(2, dim, generator=random, dtype=torch.float64)
    x = .55 * centres[labels[:, 0]] + .45 * coarse[labels[:, 1]] + .7 * noise
    return F.normalize(x, dim=1).to(dtype), labels


def lattice(B, dim=4, dtype=torch.float32):
    "Embeddings whose scores are multiples of 1/1024 and exact: no device sees a tie where another does not."
    x = torch.randint(-12, 13, (B, dim), generator=torch.Generator().manual_seed(1)).to(dtype) / 32
    labels = torch.stack([torch.arange(B) // 4, torch.arange(B) // 8], 1)
    return x, check_labels(labels)


def step(loss, emb, labels):
    "The value and the gradient by the embeddings."
    emb = emb.detach().clone().requires_grad_()
    value = loss(emb, labels)
    value.backward()
    return value.detach(), emb.grad


def far(mine, theirs):
    "The largest difference, relative to the largest value."
    mine, theirs = mine.detach().double().cpu(), theirs.detach().double().cpu()
    if not mine.isfinite().all(): return float("inf")
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-2)) if mine.numel() else 0.


def loss_errors(name, method, dtype, device, B=48):
    "How far value and gradient of a loss on a device are from those on the CPU."
    exact = "similarity" in takes(name) and name != "BlackBoxAPLoss"
    emb, labels = lattice(B, dtype=dtype) if exact else images(B, dtype=dtype)
    # without its random numbers
    args = dict(similarity="dot" if exact else None, method=method, hidden=32, noise=torch.zeros_like)
    loss = build(name, emb.shape[1], B // 4, **args).to(dtype).eval()
    with warnings.catch_warnings():
        # the method must be used that was asked for
        for text in (".*the direct way is used", ".*plain PyTorch is used"): warnings.filterwarnings("error", text)
        want = step(loss, emb, labels)
        got = step(loss.to(device), emb.to(device), labels.to(device))
    return tuple(far(a, b) for a, b in zip(got, want))


def metric_error(dtype, device, N=600):
    "The largest difference of a metric on a device from the CPU, and how many metrics there are."
    emb, labels = images(N, dtype=dtype)
    want = evaluate(emb, labels)
    got = evaluate(emb.to(device), labels.to(device), device=device)
    return max(abs(got[k] - want[k]) for k in want), len(want)


def kernel_inputs(dtype, Q, W, P, device, seed=0):
    "Scores of items and positives and outer derivatives, with ties and with empty slots."
    random = torch.Generator().manual_seed(seed)
    s = torch.randint(-900, 900, (Q, W), generator=random).to(dtype) / 1024
    k, outer = s[:, torch.randint(W, (P,), generator=random)], torch.rand(Q, P, generator=random, dtype=dtype)
    s[Q // 2:, W - W // 8:] = -2.**100
    k = torch.where(k < -1, 0., k)
    k[Q // 2:, P - P // 4:], outer[Q // 2:, P - P // 4:] = 0, 0
    return [t.contiguous().to(device) for t in (s, k, outer)]
