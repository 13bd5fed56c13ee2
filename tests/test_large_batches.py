"""Gradient caching against one pass: every loss, random layers, loaders, half precision, whole runs, two processes.

And the cross-batch memory."""
import copy, json, random
from collections import deque

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden_inputs
from hypothesis import given
from hypothesis import strategies as st
from runs_kit import cache, contents, data, make_trainer, Net, slowly, together, TOY, toy_run
from torch import nn

import hapnb.losses
import hapnb.train as T
from hapnb.helpers import LOSSES
from hapnb.large_batches import CrossBatchMemory, gradcache_backward, InSlabs, memory_part, takes_references
from hapnb import runs
from hapnb.batches import FeatureBatches
from hapnb.losses import make_loss, RankLoss
from hapnb.measure import peak_memory, profile_run
from hapnb.config import RunConfig
from hapnb.runs import Result
from hapnb.train import Trainer

OURS = [n for n in LOSSES.names() if LOSSES.get(n).__module__.startswith("hapnb.")]
ALONE = ("HISTLoss",)  # take no reference set


def network(seed=0, *extra):
    "A small convolutional network in float64, its BatchNorm frozen."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), *extra, nn.Flatten(),
                        nn.Linear(54, 8)).double().train()
    net[1].running_mean.normal_(), net[1].running_var.uniform_(0.5, 2)
    net[1].eval()
    return net


def images(n=30, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, dtype=torch.float64,
                       generator=g), torch.stack([torch.arange(n) // 3, torch.arange(n) // 9], 1)


def build(name, labels, width=8):
    fine, first = np.unique(labels[:, 0].numpy(), return_index=True)
    torch.manual_seed(3)
    # without its random numbers
    fixed = dict(share=.5) if name == "SiMixLoss" else {}
    return make_loss(name, num_classes=len(fine), embedding_size=width,
                     proxy_labels=labels[torch.from_numpy(first)], **fixed).double()


def grads(modules, step, seed=5):
    "The value of `step()`, and all gradients that it leaves."
    for m in modules: m.zero_grad()
    torch.manual_seed(seed)
    value = step()
    return float(value), [p.grad.clone() for m in modules for p in m.parameters() if p.grad is not None]


def one_pass(net, loss, x, labels, pieces=None):
    value = loss(net(x) if pieces is None else torch.cat([net(c) for c in x.split(pieces)]), labels)
    value.backward()
    return value.detach()


def same(a, b, tol=1e-9):
    assert a[0] == pytest.approx(b[0], rel=tol)
    assert len(a[1]) == len(b[1]) > 0
    for g, h in zip(a[1], b[1]): assert float((g - h).abs().max()) <= tol * max(float(g.abs().max()), 1e-6)
    assert any(float(g.abs().max()) > 0 for g in a[1])


# ---- the gradient

@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_every_loss(name, size):
    net, (x, labels) = network(), images()
    loss = build(name, labels)
    state = copy.deepcopy(loss.state_dict())  # a loss may have running statistics
    want = grads([net, loss], lambda: one_pass(net, loss, x, labels))
    loss.load_state_dict(state)
    got = grads([net, loss], lambda: gradcache_backward(net, loss, x, labels, size)[0])
    same(want, got)


@pytest.mark.parametrize("name", OURS)
def test_every_loss_on_the_golden_inputs(name):
    "Unit vectors with ties and clusters, through a linear map that leaves them as they are; micro-batches cut classes."
    emb, labels = golden_inputs(min(GOLDEN["cases"], key=lambda c: c["B"] * c["D"]))
    net = nn.Linear(emb.shape[1], emb.shape[1], bias=False).double()
    nn.init.eye_(net.weight)
    loss = build(name, labels, emb.shape[1])
    state = copy.deepcopy(loss.state_dict())
    want = grads([net, loss], lambda: one_pass(net, loss, emb, labels))
    loss.load_state_dict(state)
    same(want, grads([net, loss], lambda: gradcache_backward(net, loss, emb, labels, 5)[0]))


@pytest.mark.parametrize("name", ["ContrastiveLoss", "MultiSimilarityLoss", "ProxyAnchorLoss", "SupConLoss"])
def test_losses_of_pytorch_metric_learning(name):
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    net, (x, labels) = network(), images()
    torch.manual_seed(0)
    loss = (pml.ProxyAnchorLoss(10, 8) if name == "ProxyAnchorLoss" else getattr(pml, name)()).double()
    for p in loss.parameters(): nn.init.normal_(p)
    want = grads([net, loss], lambda: one_pass(net, loss, x, labels[:, 0]))
    same(want, grads([net, loss], lambda: gradcache_backward(net, loss, x, labels[:, 0], 7)[0]))


def test_references_are_passed_on():
    net, (x, labels) = network(), images()
    loss, ref = build("SupAPLoss", labels), torch.randn(20, 8, dtype=torch.float64)
    def plain():
        v = loss(net(x), labels, ref_emb=ref, ref_labels=labels[:20])
        v.backward()
        return v.detach()
    same(grads([net], plain), grads([net], lambda: gradcache_backward(net, loss, x, labels, 7, ref, labels[:20])[0]))


def test_gradients_add_up_and_frozen_parts_have_none():
    net, (x, labels) = network(), images()
    net[0].requires_grad_(False)
    loss = build("HAPPIERLoss", labels)
    modes = [m.training for m in net.modules()]
    _, once = grads([net, loss], lambda: one_pass(net, loss, x, labels))
    def twice():
        gradcache_backward(net, loss, x, labels, 7)
        return gradcache_backward(net, loss, x, labels, 11)[0]
    _, got = grads([net, loss], twice)
    for g, h in zip(once, got): torch.testing.assert_close(2 * g, h, rtol=1e-9, atol=1e-12)
    assert net[0].weight.grad is None and [m.training for m in net.modules()] == modes


def test_activations_of_one_micro_batch_only():
    net, (x, labels) = network(), images()
    rows = []
    net[0].register_forward_hook(lambda m, i, o: rows.append((len(o), o.requires_grad)))
    gradcache_backward(net, make_loss("SmoothAPLoss"), x, labels, 8)
    assert rows == [(8, False)] * 3 + [(6, False)] + [(8, True)] * 3 + [(6, True)]


def test_only_the_loss_learns():
    net, (x, labels) = network().requires_grad_(False), images()
    loss = build("NormSoftmaxLoss", labels)
    same(grads([net, loss], lambda: one_pass(net, loss, x, labels)),
         grads([net, loss], lambda: gradcache_backward(net, loss, x, labels, 7)[0]))


def test_the_input_may_learn():
    net, (x, labels) = network(), images()
    loss, x = build("SmoothAPLoss", labels), x.requires_grad_()
    want = torch.autograd.grad(loss(net(x), labels), x)[0]
    gradcache_backward(net.requires_grad_(False), loss, x, labels, 7)
    torch.testing.assert_close(x.grad, want, rtol=1e-9, atol=1e-12)


# ---- random layers, loaders

@pytest.mark.parametrize("name", ["SupAPLoss", "HAPPIERLoss", "BlackBoxAPLoss"])
def test_dropout_and_drop_path(name):
    from timm.layers import DropPath
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.drop = nn.Conv2d(6, 6, 1), DropPath(0.3)
        # Python's random numbers too
        def forward(self, x): return x + self.drop(self.conv(x)) * random.random()
    net, (x, labels) = network(0, nn.Dropout(0.3), Residual().double()), images()
    loss, after = build(name, labels), []
    def then(value):
        after.append((torch.rand(2).tolist(), random.random()))
        return value
    random.seed(0)
    want = grads([net, loss], lambda: then(one_pass(net, loss, x, labels, 7)))
    random.seed(0)
    same(want, grads([net, loss], lambda: then(gradcache_backward(net, loss, x, labels, 7)[0])))
    assert after[0] == after[1]  # what comes after draws the same numbers
    torch.manual_seed(6)
    assert grads([net, loss], lambda: one_pass(net, loss, x, labels, 7), seed=6)[0] != want[0]


class Views(torch.utils.data.Dataset):
    "Images with random noise: an augmentation."
    def __init__(self, x): self.x = x
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i] + 0.1 * torch.randn(3, 8, 8, dtype=torch.float64)


def test_a_loader_is_read_twice_and_gives_the_same():
    net, (x, labels) = network(0, nn.Dropout(0.2)), images()
    loss, loader = build("SupAPLoss", labels), torch.utils.data.DataLoader(Views(x), batch_size=7)
    def once():
        v = loss(torch.cat([net(c) for c in loader]), labels)
        v.backward()
        return v.detach()
    same(grads([net], once), grads([net], lambda: gradcache_backward(net, loss, loader, labels)[0]))
    same(grads([net], lambda: one_pass(net, loss, x, labels, 7)),
         grads([net], lambda: gradcache_backward(net, loss, x.split(7), labels)[0]))


class Unlike:
    "Micro-batches that are others the second time."
    def __init__(self, first, second): self.each = deque([first, second])
    def __iter__(self): return iter(self.each.popleft())


def test_inputs_that_differ_are_noticed():
    net, (x, labels) = network(), images()
    c, loss = list(x.split(10)), make_loss("SmoothAPLoss")
    for second, message in ((c[:2], "got 2 micro-batches, the first 3"), (c + c[:1], "more than the 3"),
                            (c[::-1], "passes disagree"),
                            ([c[0], c[1], c[2][:9]], r"micro-batch 2 gave embeddings \(9, 8\) in the second pass")):
        with pytest.raises(RuntimeError, match=message): gradcache_backward(net, loss, Unlike(c, second), labels)


@pytest.mark.parametrize("x, size, message", [
    (torch.zeros(4, 3, 8, 8), None, "micro_batch .* got None"), (torch.zeros(4, 3, 8, 8), 0, "1 or more, got 0"),
    (torch.zeros(4, 3, 8, 8), 1.5, "whole number"),
    (iter([]), None, "read only once"), ([], None, "batch is empty"),
    ([torch.zeros(2, 3, 8, 8)], 2, "leave micro_batch out"), (3, None, "tensor or micro-batches, got int"),
])
def test_bad_inputs(x, size, message):
    with pytest.raises(ValueError, match=message):
        gradcache_backward(network().float(), make_loss("SmoothAPLoss"), x, [0, 0, 1, 1], size)


def test_other_errors():
    net, (x, labels) = network(), images()
    sap = make_loss("SmoothAPLoss")
    with pytest.raises(ValueError, match=r"embeddings, \[rows, D\]"):
        gradcache_backward(nn.Conv2d(3, 3, 1).double(), sap, x, labels, 7)
    with pytest.raises(ValueError, match="one number, got .30,."):
        gradcache_backward(net, make_loss("SmoothAPLoss", reduction="none"), x, labels, 7)
    with pytest.raises(ValueError, match="29 labels"): gradcache_backward(net, sap, x, labels[:29], 7)
    with pytest.raises(ValueError, match="row.s. 11 of 30"):
        gradcache_backward(net, sap, x.index_fill(0, torch.tensor([11]), torch.nan), labels, 7)
    with pytest.raises(ValueError, match="'warn'"): gradcache_backward(net, sap, x, labels, 7, batch_norm="wran")
    with pytest.raises(RuntimeError, match="nothing requires"), torch.no_grad():
        gradcache_backward(net, sap, x, labels, 7)
    frozen = copy.deepcopy(net).requires_grad_(False)
    with pytest.raises(RuntimeError, match="nothing requires"): gradcache_backward(frozen, sap, x, labels, 7)
    with pytest.raises(RuntimeError, match="nothing requires"):
        gradcache_backward(lambda c: frozen(c), sap, x, labels, 7)
    assert all(p.grad is None for p in net.parameters())


# ---- BatchNorm

@pytest.mark.parametrize("norm",
                         [nn.BatchNorm2d(6), nn.BatchNorm2d(6, track_running_stats=False).eval(), nn.SyncBatchNorm(6)])
def test_batch_statistics_are_refused(norm):
    net, (x, labels) = network(0, norm.double()), images()
    with pytest.raises(ValueError, match=r"1 BatchNorm layer.*first: 3.*\.eval\(\)"):
        gradcache_backward(net, make_loss("SmoothAPLoss"), x, labels, 7)
    assert all(p.grad is None for p in net.parameters())


def test_batch_statistics_with_a_warning():
    "The gradient is that of micro-batches with statistics of their own; running statistics move once."
    net, (x, labels) = network(), images()
    net[1].train()
    twin, loss = copy.deepcopy(net), build("SupAPLoss", labels)
    want = grads([twin], lambda: one_pass(twin, loss, x, labels, 10))
    with pytest.warns(UserWarning, match="statistics of the batch"):
        got = grads([net], lambda: gradcache_backward(net, loss, x, labels, 10, batch_norm="warn")[0])
    same(want, got)
    for a, b in zip(net.buffers(), twin.buffers()): torch.testing.assert_close(a, b)
    whole = grads([twin], lambda: one_pass(twin, loss, x, labels))
    # the reason why it is refused
    assert float((whole[1][0] - got[1][0]).abs().max()) > 1e-3 * float(whole[1][0].abs().max())


# ---- half precision

def test_autocast():
    net, (x, labels) = network().float(), images()
    x, loss = x.float(), build("HAPPIERLoss", images()[1]).float()
    def plain():
        with torch.autocast("cpu", torch.bfloat16): v = loss(torch.cat([net(c) for c in x.split(7)]), labels)
        v.backward()
        return v.detach()
    def two():
        with torch.autocast("cpu", torch.bfloat16): return gradcache_backward(net, loss, x, labels, 7)[0]
    want, got = grads([net, loss], plain), grads([net, loss], two)
    same(want, got, 0.01)  # bf16 gradients add up in another order
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32} and len(got[1]) == 7


def test_the_gradient_of_the_loss_is_not_rounded_in_autocast():
    "The backward of a rectangular product would be cast too."
    torch.manual_seed(0)
    memory, loss, labels = CrossBatchMemory(20), make_loss("SupAPLoss"), torch.arange(16) // 4
    memory.add(torch.randn(20, 8), torch.arange(20) // 5)
    x = torch.randn(16, 8)
    def first(): # the embeddings are float32, so only the loss could lose bits
        y = x.clone().requires_grad_()
        gradcache_backward(lambda c: c, lambda e, l: memory(loss, e, l), y, labels, 5)
        return y.grad
    want = first()
    with torch.autocast("cpu", torch.bfloat16): torch.testing.assert_close(first(), want, rtol=1e-5, atol=1e-7)


def test_grad_scaler():
    net, (x, labels) = network().float(), images()
    x, loss, scaler = x.float(), build("NormSoftmaxLoss", labels).float(), torch.amp.GradScaler("cpu", init_scale=1024.)
    opt = torch.optim.SGD([*net.parameters(), *loss.parameters()], lr=0.)
    want = grads([net, loss], lambda: one_pass(net, loss, x, labels))
    def scaled(): return gradcache_backward(net, loss, x, labels, 7, backward=lambda v: scaler.scale(v).backward())[0]
    _, big = grads([net, loss], scaled)
    assert float(big[0].abs().max()) > 500 * float(want[1][0].abs().max())
    def unscaled():
        value = scaled()
        scaler.unscale_(opt)
        return value
    same(want, grads([net, loss], unscaled), 1e-4)
    same((want[0], [3 * g for g in want[1]]),
         grads([net, loss], lambda: gradcache_backward(net, loss, x, labels, 7, scale=3.)[0]), 1e-4)


# ---- the memory

@given(st.integers(1, 7), st.lists(st.integers(0, 9), max_size=6), st.integers(0, 2),
       st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_memory_is_a_queue(size, pieces, levels, dtype):
    memory, queue, n = CrossBatchMemory(size), deque(maxlen=size), 0
    for k in pieces:
        emb = torch.arange(n, n + k).to(dtype)[:, None].expand(k, 3)
        labels = torch.arange(n, n + k) if not levels else torch.arange(n, n + k)[:, None].expand(k, levels)
        n += k
        memory.add(emb, labels)
        queue.extend(range(n - k, n))
        assert len(memory) == len(queue)
        other = CrossBatchMemory(size)
        other.load_state_dict(memory.state_dict())
        for m in (memory, other, copy.deepcopy(memory)) if n else ():
            e, l = m.get()
            assert e.dtype == dtype and e[:, 0].tolist() == list(queue) and l.shape[1:] == labels.shape[1:]
            assert l.view(len(l), -1)[:, 0].tolist() == list(queue)
    memory.clear()
    assert len(memory) == 0 and bool(memory)
    with pytest.raises(ValueError, match="memory is empty"): memory.get()


def test_memory_goes_on_from_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    rows, labels = torch.randn(20, 4), torch.arange(20)
    whole, first = CrossBatchMemory(6), nn.ModuleDict({"memory": CrossBatchMemory(6)})
    for i in range(0, 20, 5): whole.add(rows[i:i + 5], labels[i:i + 5])
    for i in (0, 5): first["memory"].add(rows[i:i + 5], labels[i:i + 5])
    runs.save_state(tmp_path / "state.pt", first.state_dict())
    again = nn.ModuleDict({"memory": CrossBatchMemory(6)})
    again["memory"].add(torch.randn(2, 4), labels[:2])  # what was there is replaced
    again.load_state_dict(runs.load_state(tmp_path / "state.pt"))
    for i in (10, 15): again["memory"].add(rows[i:i + 5], labels[i:i + 5])
    for a, b in zip(whole.get(), again["memory"].get()): assert torch.equal(a, b)
    # a copy, not the same storage
    assert len(first["memory"]) == 6 and torch.equal(first["memory"].get()[1], labels[4:10])


def test_memory_errors():
    memory = CrossBatchMemory(4)
    for bad in (0, 2.5, True, "4"):
        with pytest.raises(ValueError, match="size must be a whole number"): CrossBatchMemory(bad)
    memory.add(torch.ones(2, 3), [[0, 0], [1, 0]])
    for emb, labels, message in ((torch.ones(1, 2), [[0, 0]], "2 dimensions, the memory's rows 3"),
                                 (torch.ones(1, 3), [0], r"1 level\(s\), the memory's rows 2"),
                                 (torch.full((2, 3), torch.nan), [[0, 0]] * 2, r"row\(s\) 0, 1 of 2"),
                                 (torch.ones(2, 3), [[0, 0]], "2 embeddings but 1 labels"),
                                 (torch.ones(2, 3), [[0, 0], [0, 1]], "not a tree"),
                                 (torch.ones(1, 3).long(), [[0, 0]], "must be floats")):
        with pytest.raises(ValueError, match=message): memory.add(emb, labels)
    assert len(memory) == 2
    with pytest.raises(ValueError, match="Did you mean 'live'"):
        memory.references(torch.ones(1, 3), [[0, 0]], batch="life")
    with pytest.raises(ValueError, match="5"): CrossBatchMemory(5).load_state_dict(memory.state_dict())


def filled(rows=17, size=20, seed=2):
    memory, g = CrossBatchMemory(size), torch.Generator().manual_seed(seed)
    memory.add(torch.randn(rows, 8, dtype=torch.float64, generator=g),
               torch.stack([torch.arange(rows) // 3, torch.arange(rows) // 9], 1))
    return memory


@pytest.mark.parametrize("name", [n for n in OURS if n not in ALONE])
@pytest.mark.parametrize("batch", ["live", "copy"])
def test_the_own_row_is_left_out(name, batch):
    "One query at a time, with references that never held it, is the definition; so are listed pairs."
    memory, labels = filled(), torch.stack([torch.arange(10) // 2, torch.arange(10) // 6], 1)
    emb = torch.randn(10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    loss = build(name, memory.get()[1])
    loss.reduction = "none"
    if name == "BlackBoxAPLoss": loss.margin = 0.  # its noise depends on the shape
    with torch.no_grad():
        got, listed = memory(loss, emb, labels, batch), loss(emb, labels, **memory.references(emb, labels, batch=batch))
    torch.testing.assert_close(got, listed, rtol=1e-12, atol=1e-12)
    # a mean over the pairs (or proxies) of all queries, not of each
    if name in ("CalibrationLoss", "ROADMAPLoss", "ProxyAnchorLoss", "AntiCollapseLoss", "HMLCLoss"): return
    old, old_labels = memory.get()
    for i in range(10):
        rest = torch.arange(10) != i
        alone = loss(emb[i:i + 1], labels[i:i + 1], ref_emb=torch.cat([emb[rest], old]),
                     ref_labels=torch.cat([labels[rest], old_labels]))
        assert float(got[i]) == pytest.approx(float(alone.detach()), abs=1e-9)


def test_live_rows_have_a_gradient_and_copies_have_not():
    memory, loss, labels = filled(), make_loss("PairLoss"), torch.arange(10) // 2
    labels = torch.stack([labels, labels // 3], 1)
    emb = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    refs = {b: memory.references(emb, labels, loss, b)["ref_emb"] for b in ("live", "copy", "none")}
    assert [r.requires_grad for r in refs.values()] == [True, False, False]
    assert [len(r) for r in refs.values()] == [27, 27, 17]
    live, copied = (torch.autograd.grad(memory(loss, emb, labels, b), emb)[0] for b in ("live", "copy"))
    values = [memory(loss, emb, labels, b).item() for b in ("live", "copy")]
    assert not torch.allclose(live, copied) and values[0] == values[1]


@pytest.mark.parametrize("name",
                         [n for n in OURS if n not in ALONE
                          + ("FastAPLoss", "PairLoss", "CalibrationLoss", "BlackBoxAPLoss", "HMLCLoss",
                             "MovingAPLoss")])
def test_own_row_kept_and_nothing_remembered_is_the_batch_alone(name):
    emb, labels = torch.randn(12, 8, dtype=torch.float64,
                              requires_grad=True), torch.stack([torch.arange(12) // 3, torch.arange(12) // 6], 1)
    loss, memory, added = build(name, labels), CrossBatchMemory(12), CrossBatchMemory(12)
    added.add(emb, labels)
    want = loss(emb, labels)
    for m in (memory, added):
        value = m(loss, emb, labels, own=True)
        assert value.item() == want.item()
        torch.testing.assert_close(torch.autograd.grad(value, emb)[0],
                                   torch.autograd.grad(want, emb, retain_graph=True)[0], rtol=1e-12, atol=1e-14)


def test_a_memory_smaller_than_the_batch_is_not_met_twice():
    "It holds the last rows of a batch that was added before it asks."
    emb, labels = torch.randn(12, 8, dtype=torch.float64), torch.arange(12) // 3
    memory, loss = CrossBatchMemory(5), make_loss("SupAPLoss")
    memory.add(emb, labels)
    assert memory(loss, emb, labels).item() == CrossBatchMemory(5)(loss, emb, labels).item()
    with pytest.raises(ValueError, match="the batch is empty"): memory.references(emb[:0], labels[:0])


def test_as_pytorch_metric_learnings_memory():
    "Three batches through its queue and through ours, with its loss."
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    loss, memory = pml.ContrastiveLoss(), CrossBatchMemory(20)
    theirs, g = pml.CrossBatchMemory(pml.ContrastiveLoss(), 8, memory_size=20), torch.Generator().manual_seed(0)
    for step in range(4):
        emb, labels = torch.randn(8, 8, generator=g), torch.randint(0, 5, (8,), generator=g)
        memory.add(emb, labels)  # before the loss, as it does, so that the oldest rows are gone
        assert float(memory(loss, emb, labels, "copy")) == pytest.approx(float(theirs(emb, labels)), rel=1e-5)


def test_pairs_are_not_stored():
    memory = CrossBatchMemory(8192)
    memory.add(torch.zeros(8192, 2).fill_(1.), torch.arange(8192))
    refs = memory.references(torch.ones(4096, 2), torch.arange(4096), make_loss("SmoothAPLoss"))
    assert sum(t.untyped_storage().nbytes() for t in refs["indices_tuple"]) < 1e6 and len(refs["ref_emb"]) == 12288
    kept = torch.zeros(4096, 12288, dtype=torch.bool)
    a, p, b, n = refs["indices_tuple"]
    kept[a, p] = kept[b, n] = True
    assert int((~kept).sum()) == 4096 and not bool(kept.diagonal().any())


@pytest.mark.parametrize("n", [1, 2])
def test_very_small_batches(n):
    memory, loss = filled(), make_loss("SmoothAPLoss")
    emb, labels = torch.randn(n, 8, dtype=torch.float64), torch.zeros(n, 2, dtype=torch.long)
    refs = memory.references(emb, labels, loss)
    assert 0 < float(loss(emb, labels, **refs)) <= 1 and len(refs["ref_emb"]) == 17 + n


def test_two_passes_with_a_memory():
    net, (x, labels) = network(), images()
    memory, loss = filled(), build("SupAPLoss", labels)
    wrapped = lambda e, y: memory(loss, e, y)
    same(grads([net], lambda: one_pass(net, wrapped, x, labels)),
         grads([net], lambda: gradcache_backward(net, wrapped, x, labels, 7)[0]))


# ---- a slot a key

@given(st.integers(1, 7), st.lists(st.lists(st.integers(0, 6), max_size=6), max_size=5), st.booleans())
def test_memory_with_slots_is_a_dict(size, batches, flat):
    memory, want, n = CrossBatchMemory(size, unique=True), {}, 0
    for keys in ([k % size for k in b] for b in batches):
        emb, labels = torch.arange(n, n + len(keys)).float()[:, None].expand(-1, 3), torch.arange(n, n + len(keys))
        memory.add(emb, labels if flat else labels[:, None], keys)
        want |= {k: n + i for i, k in enumerate(keys)}  # the last of a key stays
        n += len(keys)
        assert len(memory) == len(want)
    other = CrossBatchMemory(size, unique=True)
    other.load_state_dict(memory.state_dict())
    for m in (memory, other, copy.deepcopy(memory)) if n else ():
        e, l = m.get()
        assert e[:, 0].tolist() == [want[k] for k in sorted(want)] == l.view(-1).tolist() and len(m) == len(want)
    memory.clear()
    assert len(memory) == 0 and memory.seen is None


def test_slots_of_the_batch_are_no_others():
    g, loss = torch.Generator().manual_seed(0), build("SupAPLoss", images()[1])
    memory = CrossBatchMemory(50, unique=True)
    old, labels = torch.randn(40, 8, dtype=torch.float64, generator=g), torch.arange(40) // 4
    memory.add(old, labels, range(40))
    emb, y, keys = torch.randn(6, 8, dtype=torch.float64,
                               generator=g), labels[[3, 9, 9, 20, 21, 22]], [3, 9, 9, 20, 21, 45]
    kept = [i for i in range(40) if i not in keys]
    for added in (False, True):
        if added: memory.add(emb, y, keys)
        refs = memory.references(emb, y, loss, "copy", own=True, keys=keys)
        assert torch.equal(refs["ref_emb"], torch.cat([emb, old[kept]]))
        assert torch.equal(refs["ref_labels"], torch.cat([y, labels[kept]]))
    assert len(memory.get()[0]) == 41


@pytest.mark.parametrize("call, message", [
    (lambda q, u, e, y: q.add(e, y, [0, 1]), "keys are for a memory with one slot per key"),
    (lambda q, u, e, y: u.add(e, y), "needs keys"),
    (lambda q, u, e, y: u.references(e, y), "needs keys"), (lambda q, u, e, y: u.add(e, y, [0]), "2 whole numbers"),
    (lambda q, u, e, y: u.add(e, y, [0., 1.]), "whole numbers"),
    (lambda q, u, e, y: u.add(e, y, [0, 5]), "0 to 4, got 0 to 5"),
    (lambda q, u, e, y: u.add(e, y, [-1, 2]), "got -1 to 2"),
    (lambda q, u, e, y: u.load_state_dict(q.state_dict()), "other way round"),
    (lambda q, u, e, y: q.load_state_dict(u.state_dict()), "other way round")])
def test_slot_errors(call, message):
    q, u, e, y = CrossBatchMemory(5), CrossBatchMemory(5,
                                                       unique=True), torch.ones(2, 3), torch.zeros(2, dtype=torch.long)
    q.add(e, y), u.add(e, y, [2, 3])
    before = [t.clone() for t in u.get()]
    with pytest.raises(ValueError, match=message): call(q, u, e, y)
    assert all(torch.equal(a, b) for a, b in zip(before, u.get()))


# ---- the loss against the memory

NO_REFS = ("NormSoftmaxLoss", "AMSoftmaxLoss", "CrossEntropyLoss", "ProxyAnchorLoss", "CSLLoss", "HISTLoss",
           "AntiCollapseLoss")


@pytest.mark.parametrize("name", OURS)
def test_who_looks_at_references(name):
    x, labels = torch.randn(30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), images()[1]
    for y in (labels, torch.zeros_like(labels)):  # also where all are of one class
        loss, state = build(name, labels), torch.get_rng_state()
        before = copy.deepcopy(loss.state_dict())
        assert takes_references(loss, x, y) == (name not in NO_REFS)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())
        assert all(p.grad is None for p in loss.parameters())
    if name in NO_REFS:
        with pytest.raises(ValueError, match=f"{name} does not look at references"): memory_part(loss, x, labels)
    elif name == "HAPPIERLoss":
        part = memory_part(loss, x, labels)
        assert list(part.losses) == ["rank"] and part.losses["rank"] is loss.losses["rank"]
        assert part.weights["rank"] == loss.weights["rank"]
    else: assert memory_part(loss, x, labels) is loss


def test_losses_that_refuse_references_say_so():
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    with pytest.raises(ValueError, match="ArcFaceLoss cannot be compared with a memory"):
        memory_part(pml.ArcFaceLoss(10, 8).double(), torch.randn(30, 8, dtype=torch.float64), images()[1][:, 0])


@pytest.mark.parametrize("name", [n for n in OURS if n not in NO_REFS])
@pytest.mark.parametrize("unique", [False, True])
def test_the_term_against_the_memory(name, unique):
    "Straight from the definition: the batch against detached copies of the memory into which it was put."
    g, labels = torch.Generator().manual_seed(0), images()[1]
    old, emb = torch.randn(30, 8, dtype=torch.float64,
                           generator=g), torch.randn(12, 8, dtype=torch.float64, generator=g).requires_grad_()
    keys, memory = torch.arange(12) * 2, CrossBatchMemory(30, unique)
    loss = memory_part(build(name, labels), emb, labels[keys])
    memory.add(old, labels, *([torch.arange(30)] if unique else []))
    memory.add(emb, labels[keys], *([keys] if unique else []))
    torch.manual_seed(4)  # BlackBoxAP draws noise
    got = memory.term(loss, emb, labels[keys], keys if unique else None)
    # the queue lost its oldest 12
    others = [i for i in range(30) if i not in keys.tolist()] if unique else range(12, 30)
    ref, y = torch.cat([emb.detach(), old[others]]), torch.cat([labels[keys], labels[others]])
    torch.manual_seed(4)
    want = loss(emb, labels[keys], ref_emb=ref, ref_labels=y)  # the query meets its copy, as in ROADMAP
    if not getattr(loss, "with_query", True):  # the query is left out of its own batch, as in FastAP
        pairs = torch.ones(12, 30, dtype=torch.bool).fill_diagonal_(False).nonzero(as_tuple=True)
        want = loss(emb, labels[keys], indices_tuple=(*pairs, *pairs), ref_emb=ref, ref_labels=y)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    for a, b in zip(torch.autograd.grad(got, emb), torch.autograd.grad(want, emb)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not memory.get()[0].requires_grad


@pytest.mark.parametrize("name", ["CalibrationLoss", "PairLoss"])
def test_pair_losses_leave_the_own_copy_out(name):
    "As they leave the query out of its own batch; counted as a pair it would lower a mean over all pairs."
    emb = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, memory = torch.arange(12) // 3, CrossBatchMemory(12)
    loss = make_loss(name, **({"average": "all"} if name == "CalibrationLoss" else {"similarity": "dot"}))
    memory.add(emb, labels)
    want = loss(emb, labels).item()
    assert memory.term(loss, emb, labels).item() == pytest.approx(want, rel=1e-12)
    assert loss(emb, labels, ref_emb=emb.clone(), ref_labels=labels).item() != pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("level", [0, 1])
def test_pairs_of_the_losses_own_level(level):
    "The term of a loss of pytorch-metric-learning is that of one column of the labels, with its own copies left out."
    pytest.importorskip("pytorch_metric_learning")
    g, labels = torch.Generator().manual_seed(0), torch.stack([torch.arange(30) // 3, torch.arange(30) // 6], 1)
    emb, memory = torch.randn(30, 8, dtype=torch.float64, generator=g).requires_grad_(), CrossBatchMemory(30)
    memory.add(emb, labels)
    # the last rows of the memory are the batch; the first are not, and are met twice
    for at in (slice(0, 12), slice(18, 30)):
        loss, y = make_loss("pml/ContrastiveLoss", level=level), labels[at, level]
        rest = slice(0, 18) if at.start else slice(0, 30)
        ref, ref_y = torch.cat([emb.detach()[at], emb.detach()[rest]]), torch.cat([y, labels[rest, level]])
        same = y[:, None] == ref_y
        own = torch.eye(12, len(ref), dtype=torch.bool)
        pairs = (*(same & ~own).nonzero(as_tuple=True), *(~same).nonzero(as_tuple=True))
        got, want = memory.term(loss, emb[at], labels[at]), loss.loss(emb[at], y, pairs, ref, ref_y)
        assert got.item() == pytest.approx(want.item(), rel=1e-9)
        for a, b in zip(torch.autograd.grad(got, emb), torch.autograd.grad(want, emb)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_miner_never_gives_the_own_copy():
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    g, labels = torch.Generator().manual_seed(0), torch.arange(12) // 3
    emb, memory, seen = torch.randn(12, 8, generator=g).requires_grad_(), CrossBatchMemory(30), []
    memory.add(torch.randn(18, 8, generator=g), torch.arange(18) // 3), memory.add(emb, labels)
    class Asks(pml.TripletMarginLoss):
        def forward(self, emb, labels, indices_tuple=None, ref_emb=None, ref_labels=None):
            seen.append(indices_tuple)
            return super().forward(emb, labels, indices_tuple, ref_emb, ref_labels)
    for miner in (miners.TripletMarginMiner(margin=9.), miners.MultiSimilarityMiner(epsilon=9.)):
        value = memory.term(Asks(), emb, labels, miner=lambda e, y, ref_emb,
                            ref_labels: miner(e, y, ref_emb, ref_labels))
        assert value.item() > 0 and len(seen[-1][0]) and not bool((seen[-1][0] == seen[-1][1]).any())
        every = miner(emb.detach(), labels,
                      *[memory.references(emb, labels, None, "copy", True)[k] for k in ("ref_emb", "ref_labels")])
        assert bool((every[0] == every[1]).any())  # it would have


def test_a_loader_of_pairs_is_named():
    net, (x, labels) = network(), images()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), 7)
    with pytest.raises(ValueError, match="a list of 2 things.*give the images alone"):
        gradcache_backward(net, build("SupAPLoss", labels), loader, labels)
    class TwoInputs(nn.Module):  # a model that does want pairs
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, pair): return self.net(pair[0])
    one = grads([net], lambda: one_pass(net, build("SupAPLoss", labels), x, labels))
    same(one, grads([net], lambda: gradcache_backward(TwoInputs(), build("SupAPLoss", labels), loader, labels)[0]))
    # the model's own fault stays as it is
    with pytest.raises(TypeError): gradcache_backward(lambda c: c + None, build("SupAPLoss", labels), x, labels, 7)


# ---- RunConfig, Trainer, run

@pytest.mark.parametrize("bad, message",
                         [(0, "must be 1 or more"), (-3, "must be 1 or more"), (2.5, "must be int or None"),
                          (True, "must be int or None"), ("8", "must be int or None")])
def test_micro_batch_is_checked(bad, message):
    with pytest.raises(ValueError, match=f"RunConfig.micro_batch {message}"): TOY.replace(micro_batch=bad)


WHOLE = TOY.replace(freeze="bn", epochs=2, warmup_epochs=1, eval_every=1, clip_norm=0.5, loss="HAPPIERLoss",
                    groups={"loss": {"lr": 0.1}})
CASES = {"frozen": TOY, "whole": WHOLE, "sum": TOY.replace(loss="ROADMAPLoss", optimizer="sgd", lr=0.01),
         "bf16": WHOLE.replace(precision="bf16", optimizer="sgd", lr=0.1)}


def alike(a, b, tol):
    assert list(a.history) == list(b.history)
    for name in a.history:
        if name != "seconds": np.testing.assert_allclose(a.history[name], b.history[name], rtol=tol, atol=tol)
    for k, v in a.weights().items(): torch.testing.assert_close(v, b.weights()[k], rtol=tol, atol=tol)


@pytest.mark.parametrize("name", CASES)
def test_runs_in_one_and_in_two_passes(tmp_path, name):
    "Loss, terms, norms, spread, metrics on the way, and the weights at the end."
    cfg = CASES[name]
    one, two = toy_run(cfg, tmp_path), toy_run(cfg.replace(micro_batch=7), tmp_path)
    assert one.key != two.key and one.path.parent == two.path.parent
    alike(one, two, 0.02 if name == "bf16" else 2e-3)


def test_resumed_in_the_middle(tmp_path, monkeypatch):
    cfg, step, calls = WHOLE.replace(micro_batch=7), Trainer.step, []
    want = contents(toy_run(cfg, tmp_path / "whole"))
    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 9: raise KeyboardInterrupt
        step(self, *args)
    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt): toy_run(cfg, tmp_path / "cut", save_every=0)
    monkeypatch.setattr(Trainer, "step", step)
    assert (tmp_path / "cut" / cfg.key() / "state.pt").exists()
    assert contents(toy_run(cfg, tmp_path / "cut")) == want


def test_batch_norm_that_learns_is_named(tmp_path):
    with pytest.raises(ValueError, match="BatchNorm.*freeze='bn'"):
        toy_run(WHOLE.replace(freeze="none", micro_batch=7), tmp_path)


def scaled_accelerator():
    "fp16's scaler on the CPU, where accelerate has none; the network itself stays in float32."
    acc = T.make_accelerator("cpu")
    acc.scaler, acc.native_amp, acc.state._mixed_precision = torch.amp.GradScaler("cpu", init_scale=1024.), True, "fp16"
    acc.prepare_model = lambda net, **_: net
    return acc


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_the_trainers_scaler_is_used(micro_batch):
    "Gradients are scaled once, and unscaled before they are measured, cut and used; infinite ones are left out."
    how = dict(lr=0.1, optimizer="sgd", clip_norm=0.01)
    plain, t = make_trainer(**how), make_trainer(**how, micro_batch=micro_batch, accelerator=scaled_accelerator())
    scale, seen = t.accelerator.scaler, []
    assert plain.alone and not t.alone
    first = t.params[0].register_hook(lambda g: seen.append(g.norm()))
    for each in (plain, t):
        each.begin_epoch()
        for _ in range(3): each.step(*data())
    first.remove()
    assert t.sums == pytest.approx(plain.sums, rel=1e-4) and max(seen) > 100 * t.sums["grad_norm"] / 3
    for p, q in zip(plain.params, t.params): torch.testing.assert_close(p, q)
    before = [p.detach().clone() for p in t.params]
    broken = t.params[0].register_hook(lambda g: g * float("inf"))
    t.step(*data())
    broken.remove()
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(t.params, before)) and scale.get_scale() == 512
    t.step(*data())
    assert not any(torch.equal(p, q) for p, q in zip(t.params, before))


def test_profile_asks_for_one_pass():
    with pytest.raises(ValueError, match="micro_batch=None"): profile_run(TOY.replace(micro_batch=7), device="cpu")


class Halves:
    "Two batches of 11: 6 and 5 rows for two processes, so 2 and 1 micro-batches of 5."
    def set_epoch(self, e): pass
    def __iter__(self): return iter([[*range(0, 11)], [*range(11, 22)]])


def _train(loss, out, micro_batch):
    acc = T.make_accelerator("cpu")
    t = make_trainer(loss, accelerator=acc, epochs=2, lr=0.01, optimizer="sgd", clip_norm=0.3,
                     micro_batch=micro_batch).fit(FeatureBatches(*data(22), Halves()))
    history = [{k: v for k, v in r.items() if k != "seconds"} for r in t.history]
    if acc.is_main_process:
        runs.save_state(out, dict(net=t.net.state_dict(), loss=t.loss.state_dict(), history=history))
    acc.wait_for_everyone()


@pytest.mark.parametrize("loss", ["NormSoftmaxLoss", "SmoothAPLoss"])
def test_two_processes_in_two_passes(tmp_path, loss):
    _train(loss, tmp_path / "one.pt", None)
    together(_train, loss, tmp_path / "two.pt", 5)
    a, b = runs.load_state(tmp_path / "one.pt"), runs.load_state(tmp_path / "two.pt")
    for part in ("net", "loss"):
        for k in a[part]: torch.testing.assert_close(a[part][k], b[part][k], rtol=1e-5, atol=1e-6)
    for r, s in zip(a["history"], b["history"]): assert r == pytest.approx(s, rel=1e-4, abs=1e-6)


def _count_reductions(out):
    "How often DDP exchanges gradients in a step of three micro-batches."
    acc = T.make_accelerator("cpu")
    t, calls = make_trainer("SmoothAPLoss", accelerator=acc, micro_batch=2), []
    def hook(state, bucket):
        calls.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future
    t.model.register_comm_hook(None, hook)
    t.begin_epoch()
    x, labels = data(12)
    t.step(x[6 * acc.process_index:][:6], labels)
    if acc.is_main_process: out.write_text(json.dumps(calls))
    acc.wait_for_everyone()


def test_gradients_are_exchanged_once_a_step(tmp_path):
    together(_count_reductions, tmp_path / "calls.json")
    calls = json.loads((tmp_path / "calls.json").read_text())
    assert calls and len(calls) == len(set(calls))  # each bucket of parameters once


@pytest.mark.parametrize("cfg", [TOY, WHOLE.replace(eval_every=0)], ids=["frozen", "whole"])
def test_run_with_two_processes_in_two_passes(tmp_path, cfg):
    one = toy_run(cfg, tmp_path / "one")
    together(toy_run, cfg.replace(micro_batch=5), tmp_path / "two")
    two = Result(tmp_path / "two" / cfg.replace(micro_batch=5).key())
    assert two.environment["processes"] == 2
    torch.testing.assert_close(one.embeddings(), two.embeddings(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(one.history.loss, two.history.loss, rtol=1e-3)


@pytest.mark.parametrize("name", [n for n in OURS if issubclass(LOSSES.get(n), RankLoss)])
def test_slabs_of_queries_give_the_loss_of_the_whole_batch(name):
    loss, labels = build(name, images()[1]), images()[1].clone()
    labels[4:8] = -1
    for rows in (1, 7, 30, 64):
        emb = torch.randn(30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
        net = nn.Linear(8, 8).double()
        def step(l):
            value = 3 * l(net(emb), labels)
            value.backward()
            return value.detach()
        want, got = (grads([net], lambda: step(l)) for l in (loss, InSlabs(loss, rows)))
        assert abs(want[0] - got[0]) < 1e-12
        for a, b in zip(want[1], got[1]): assert (a - b).abs().max() <= 1e-11 * a.abs().max()


def test_slabs_hold_a_slab_of_pairs_and_need_no_gradient(blocks):
    labels, emb = torch.arange(1024)[:, None] // torch.tensor([[8, 128]]), torch.randn(1024, 16, requires_grad=True)
    loss = make_loss("HAPLoss")
    whole, slabs = (peak_memory(lambda: l(emb, labels).backward()) for l in (loss, InSlabs(loss, 64)))
    assert whole > 12 * 1024**2 and slabs < whole - 10 * 1024 * 900
    with torch.no_grad(): assert not InSlabs(loss, 64)(emb, labels).requires_grad
    unlabelled = InSlabs(loss, 64)(emb, torch.full((1024, 2), -1))
    assert float(unlabelled) == 0
    unlabelled.backward()
