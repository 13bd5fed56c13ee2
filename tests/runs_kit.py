"What the tests of training and runs share: a toy configuration, child processes, a tiny trainer."

import math, multiprocessing, os, socket, sys, time
from pathlib import Path

import pytest
import torch
from torch import nn

from hapnb.config import RunConfig
from hapnb.core import EmbeddingLoss
from hapnb.helpers import LOSSES
from hapnb.runs import run
from hapnb.train import Trainer


ROOT = Path(__file__).resolve().parents[1]
TOY = RunConfig(dataset="toy", trunk="toy", image_size=32, embed_dim=16, batch_size=24, epochs=4, lr=0.01, ks=(1, 2))
PIECES = TOY.replace(
    loss="HISTLoss",
    loss_args={"hidden": 8, "tau": 8.0},
    sampler="random",
    sampler_args={},
    batch_size=32,
    norm="after",
    init="kaiming",
    normalise=False,
    epochs=5,
    warmup_epochs=1,
    weight_decay=1e-4,
    schedule="step",
    schedule_args={"size": 2, "gamma": 0.5},
    groups={"loss.distributions": {"lr": 0.1}, "loss.hgnn": {"lr": 1e-3}},
)  # HIST: a loss of two pieces
FILES = ("metrics.json", "weights.safetensors", "embeddings.safetensors")
WHOLE = TOY.replace(
    freeze="none", epochs=2, warmup_epochs=1, eval_every=1, loss="NormSoftmaxLoss", groups={"loss": {"lr": 0.1}}
)
QUEUE = TOY.replace(loss="SupAPLoss", memory={"size": 60})
SLOTS = WHOLE.replace(
    freeze="bn", loss="ROADMAPLoss", groups={}, memory={"size": "train", "start_epoch": 1, "weight": 0.5}
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HAPNB_CACHE", str(tmp_path_factory.getbasetemp() / "features"))


def toy_run(cfg, store, **kw):
    return run(cfg, store, device="cpu", progress=False, workers=0, **kw)


def contents(result):
    return [(result.path / f).read_bytes() for f in FILES]


def child(work, *args, out=None, **env):
    "Run `work(*args)` in a forked process (importing torch again takes seconds) with one thread; prints go to `out`."

    def body():
        torch.set_num_threads(1)
        os.environ.update({k: str(v) for k, v in env.items()})
        if out is not None:
            sys.stdout = open(out, "a", buffering=1)
        work(*args)

    p = multiprocessing.get_context("fork").Process(target=body)
    p.start()
    return p


def ended(*ps):
    for p in ps:
        p.join(100)
    assert [p.exitcode for p in ps] == [0] * len(ps)


def slowly(cfg, store, pipe=None, seconds=0.01):
    "A run that takes its time and tells of every step."
    step = Trainer.step

    def slow(self, *args):
        if pipe is not None:
            os.write(pipe, b".")
        time.sleep(seconds)
        step(self, *args)

    Trainer.step = slow
    run(cfg, store, device="cpu", workers=0, save_every=0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.trunk(x).relu())


def make_trainer(loss="NormSoftmaxLoss", **kw):
    from hapnb.losses import make_loss

    torch.manual_seed(1)
    return Trainer(Net(), make_loss(loss, num_classes=4, embedding_size=3), **kw)


def data(n=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g), (torch.arange(n) % 4)[:, None]


class Once:
    "The same batch, `steps` times an epoch."

    def __init__(self, steps=3):
        self.steps = steps

    def epoch(self, e, start=0):
        for i in range(start, self.steps):
            yield data()


def dies_after(steps, monkeypatch):
    "Let a training be interrupted after so many steps."
    step, left = Trainer.step, [steps]

    def dies(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        step(self, *args)

    monkeypatch.setattr(Trainer, "step", dies)


def together(work, *args, n=2):
    "Start n processes that know of each other, as torchrun does."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n)
    ended(*[child(work, *args, RANK=r, LOCAL_RANK=r, **env) for r in range(n)])


@LOSSES.register()
class NaNAfterLoss(EmbeddingLoss):
    "NormSoftmax's place, and NaN from call `after` on."

    def __init__(self, after=3):
        super().__init__()
        self.after, self.calls = after, 0

    def values(self, batch):
        self.calls += 1
        v = (batch.emb @ batch.emb.T).square().mean(1) * (math.nan if self.calls > self.after else 1)
        return v, torch.ones_like(v)
