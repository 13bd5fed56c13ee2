"Trainer: warm-up, groups, two processes, memories, faults."

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import hapnb.batches as B
import hapnb.train as T
from hapnb import runs
from hapnb.train import Diverged, Trainer
from runs_kit import cache, Net, make_trainer, data, Once, together  # noqa: F401 (a fixture)


def test_warm_up_moves_only_new_parameters():
    t = make_trainer(
        epochs=2, warmup_epochs=2, weight_decay=0.1, optimizer="sgd", lr=0.1, optimizer_args={"momentum": 0.9}
    )
    old = {k: v.clone() for k, v in [*t.net.named_parameters(), ("proxies", t.loss.weight)]}
    t.fit(Once())
    assert torch.equal(t.net.trunk.weight, old["trunk.weight"]) and torch.equal(t.net.trunk.bias, old["trunk.bias"])
    assert not torch.equal(t.net.head.weight, old["head.weight"]) and not torch.equal(t.loss.weight, old["proxies"])
    t.epochs, t.warmup_epochs = 3, 2
    t.fit(Once())
    assert not torch.equal(t.net.trunk.weight, old["trunk.weight"])


def test_groups_learn_at_their_own_rates():
    groups = {"trunk": {"lr": 0.0}, "head": {"lr": 0.01}, "loss": {"lr": 10.0, "min_lr": 0.1}}
    t = make_trainer(epochs=4, warmup_epochs=1, groups=groups, schedule="cosine")
    old = t.net.trunk.weight.clone()
    t.fit(Once())
    h = pd.DataFrame(t.history)
    assert torch.equal(old, t.net.trunk.weight)
    assert h.lr_head.tolist() == pytest.approx([0.01 * (1 + math.cos(math.pi * k / 3)) / 2 for k in (0, 0, 1, 2)])
    assert h.lr_loss.tolist() == pytest.approx([0.1 + 9.9 * (1 + math.cos(math.pi * k / 3)) / 2 for k in (0, 0, 1, 2)])


def test_pieces_inherit_from_their_part_and_own_each_parameter_once():
    part = nn.ModuleDict(dict(a=nn.ModuleDict(dict(x=nn.Linear(2, 2), y=nn.Linear(2, 2))), b=nn.Linear(2, 2)))
    part.b.weight.requires_grad_(False)
    groups = {"loss.a.x": {"min_lr": 0.5}, "loss.a": {"lr": 3.0}, "loss": {"lr": 2.0, "weight_decay": 0.1}}
    found = {g["name"]: g for g in T.param_groups(dict(head=nn.Linear(2, 2), loss=part), 1.0, groups=groups)}
    assert {n: (g["lr"], g["weight_decay"], g["min_lr"]) for n, g in found.items()} == {
        "head": (1.0, 0.0, None),
        "loss": (2.0, 0.1, None),
        "loss.a": (3.0, 0.1, None),
        "loss.a.x": (3.0, 0.1, 0.5),
    }
    assert [p is q for p, q in zip(found["loss.a.x"]["params"], part.a.x.parameters())] == [True, True]
    assert [len(found[n]["params"]) for n in ("loss", "loss.a", "loss.a.x")] == [1, 2, 2]
    same = {g["name"]: g["lr"] for g in T.param_groups(dict(loss=part), 1.0, groups=dict(reversed(groups.items())))}
    assert (
        same == {n: found[n]["lr"] for n in same} and len(same) == 3
    )  # the order in which they are named does not matter


def test_a_step_is_the_plain_step():
    "The guards, accelerate and the fused kernel change nothing."
    a, b = make_trainer(lr=0.01), make_trainer(lr=0.01)
    plain = torch.optim.Adam(b.params, lr=0.01, fused=False, foreach=False)
    a.begin_epoch()
    for _ in range(3):
        a.step(*data())
        b.loss(b.net(data()[0]), data()[1]).backward()
        plain.step(), plain.zero_grad()
    for p, q in zip(a.params, b.params):
        torch.testing.assert_close(p, q)


def test_clip_norm():
    t = make_trainer(clip_norm=1e-4, optimizer="sgd", lr=1.0)
    old = [p.detach().clone() for p in t.params]
    t.begin_epoch()
    t.step(*data())
    moved = math.sqrt(sum(float((p.detach() - o).square().sum()) for p, o in zip(t.params, old)))
    assert moved == pytest.approx(1e-4, rel=1e-3)
    assert t.sums["grad_norm"] > 1e-3  # the norm before clipping is what is noted


def test_bf16_keeps_float32_weights():
    t = make_trainer(accelerator=T.make_accelerator("cpu", "bf16"))
    t.begin_epoch()
    t.step(*data())
    assert {p.dtype for p in t.params} == {torch.float32}


class Halves:
    "Two batches of 11: not a multiple of two processes."

    def set_epoch(self, e):
        pass

    def __iter__(self):
        return iter([[*range(0, 11)], [*range(11, 22)]])


def _train(loss, out):
    acc = T.make_accelerator("cpu")
    t = make_trainer(loss, accelerator=acc, epochs=2, lr=0.01, optimizer="sgd").fit(
        B.FeatureBatches(*data(22), Halves())
    )
    history = [{k: v for k, v in r.items() if k != "seconds"} for r in t.history]
    if acc.is_main_process:
        runs.save_state(out, dict(net=t.net.state_dict(), loss=t.loss.state_dict(), history=history))
    acc.wait_for_everyone()


@pytest.mark.parametrize("loss", ["NormSoftmaxLoss", "SmoothAPLoss"])
def test_two_processes_train_as_one(tmp_path, loss):
    _train(loss, tmp_path / "one.pt")
    together(_train, loss, tmp_path / "two.pt")
    a, b = runs.load_state(tmp_path / "one.pt"), runs.load_state(tmp_path / "two.pt")
    for part in ("net", "loss"):
        for k in a[part]:
            torch.testing.assert_close(a[part][k], b[part][k], rtol=1e-5, atol=1e-6)
    for r, s in zip(a["history"], b["history"]):
        assert r == pytest.approx(s, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("broken", [True, False])
def test_gathered_gradient_needs_its_factor(tmp_path, monkeypatch, broken):
    "Without the factor of section 4, two processes would take half steps: the comparison above sees it."
    if broken:
        monkeypatch.setattr(T._Gather, "backward", staticmethod(lambda ctx, g: g[ctx.own]))
    _train("SmoothAPLoss", tmp_path / "one.pt")
    together(_train, "SmoothAPLoss", tmp_path / "two.pt")
    a, b = runs.load_state(tmp_path / "one.pt"), runs.load_state(tmp_path / "two.pt")
    norms = [torch.tensor([r["grad_norm"] for r in x["history"]]) for x in (a, b)]
    assert torch.allclose(*norms, rtol=1e-4) != broken


def _remember(memory, micro_batch, out):
    acc = T.make_accelerator("cpu")
    t = make_trainer(
        "SmoothAPLoss", accelerator=acc, epochs=3, lr=0.01, optimizer="sgd", memory=memory, micro_batch=micro_batch
    ).fit(B.FeatureBatches(*data(22), Halves()))
    runs.save_state(
        f"{out}{acc.process_index}",
        dict(
            net=t.net.state_dict(),
            memory=t.memory.state_dict(),
            history=[{k: v for k, v in r.items() if k != "seconds"} for r in t.history],
        ),
    )
    acc.wait_for_everyone()


@pytest.mark.parametrize(
    "memory", [dict(size=15), dict(size=22, unique=True, start_epoch=1, weight=2.0)], ids=["queue", "slots"]
)
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_every_process_holds_the_same_memory(tmp_path, memory, micro_batch):
    _remember(memory, None, tmp_path / "one")
    together(_remember, memory, micro_batch, tmp_path / "two")
    one, first, second = (runs.load_state(tmp_path / n) for n in ("one0", "two0", "two1"))
    for k, v in first["memory"].items():
        assert torch.equal(v, second["memory"][k])
    for part in ("net", "memory"):
        for k in one[part]:
            torch.testing.assert_close(one[part][k], first[part][k], rtol=1e-5, atol=1e-6)
    for r, s in zip(one["history"], first["history"]):
        assert r == pytest.approx(s, rel=1e-4, abs=1e-6)


class Rows:
    "Batches of given rows, each epoch the same."

    def __init__(self, *rows):
        self.given = rows

    def set_epoch(self, e):
        pass

    def __iter__(self):
        return iter([list(r) for r in self.given])


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("loss", ["SupAPLoss", "ROADMAPLoss", "HAPPIERLoss"])
def test_training_with_a_memory_is_the_papers_two_terms(loss, unique):
    "Against a loop of its own, with a dict of image numbers or a list; the softmax of HAPPIER counts once."
    from hapnb.losses import SumLoss, make_loss

    x, y = data(24)
    batches = [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 0, 1], [4, 8, 12, 16, 5, 9]]
    memory = (
        dict(size=24, unique=True, weight=0.5, start_epoch=1) if unique else dict(size=10, weight=0.5, start_epoch=1)
    )
    t = make_trainer(loss, epochs=3, lr=0.1, optimizer="sgd", memory=memory).fit(B.FeatureBatches(x, y, Rows(*batches)))
    torch.manual_seed(1)
    net, own = Net(), make_loss(loss, num_classes=4, embedding_size=3)
    opt = torch.optim.SGD([*net.parameters(), *own.parameters()], lr=0.1)
    ranked = own if loss != "HAPPIERLoss" else SumLoss({"rank": (own.weights["rank"], own.losses["rank"])})
    kept, memory_terms = {} if unique else [], []
    for epoch in range(3):
        memory_terms.append([])
        for rows in batches:
            z = net(x[rows])
            value = own(z, y[rows])
            new = {r: (z[i].detach(), y[r]) for i, r in enumerate(rows)}
            kept = {**kept, **new} if unique else [*kept, *new.values()][-10:]
            there = list(kept.values()) if unique else kept
            if epoch >= 1:
                term = ranked(
                    z,
                    y[rows],
                    ref_emb=torch.stack([e for e, _ in there]),
                    ref_labels=torch.stack([l for _, l in there]),
                )
                memory_terms[-1].append(term.item())
                value = value + 0.5 * term
            opt.zero_grad()
            value.backward()
            opt.step()
    for p, q in zip([*t.net.parameters(), *t.loss.parameters()], [*net.parameters(), *own.parameters()]):
        # one float32 rounding is multiplied by 1 / tau = 100 in every step
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert "memory" not in t.history[0]
    for r, want in zip(t.history[1:], memory_terms[1:]):
        assert r["memory"] == pytest.approx(np.mean(want), rel=1e-4)
    assert len(t.memory) == len(kept) and not t.memory.emb.requires_grad


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(micro_batch=0), "1 or more"),
        (dict(micro_batch=2.5), "whole"),
        (dict(memory={"size": "train"}), "does not know the training set"),
        (dict(memory={"sise": 3}), "'size'"),
    ],
)
def test_trainer_arguments(kw, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**kw)


def test_slots_need_to_know_the_rows():
    t = make_trainer("SmoothAPLoss", memory=dict(size=16, unique=True))
    with pytest.raises(ValueError, match="needs keys"):
        t.step(*data())


def test_embeddings_that_break_are_named_with_a_miner_too():
    pytest.importorskip("pytorch_metric_learning")
    from hapnb.external import pml_loss, pml_miner

    t = Trainer(Net(), pml_loss("TripletMarginLoss"), miner=pml_miner("TripletMarginMiner"))
    with torch.no_grad():
        next(t.net.parameters()).fill_(math.nan)
    t.begin_epoch()
    with pytest.raises(Diverged, match="epoch 0, step 0"):
        t.step(*data())
