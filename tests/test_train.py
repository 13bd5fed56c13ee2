"Training: keys, read-back, kill -9 and resume, warm-up, groups, two processes, faults."
import json, math, multiprocessing, os, pickle, random, resource, signal, socket, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import hapnb.batches as B
import hapnb.config as C
import hapnb.helpers as H
import hapnb.models as M
import hapnb.runs as R
import hapnb.train as T
from hapnb.helpers import LOSSES
from hapnb.core import EmbeddingLoss
from hapnb.train import Diverged, Trainer
from hapnb.runs import Result, run
from hapnb.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
TOY = RunConfig(dataset="toy", trunk="toy", image_size=32, embed_dim=16, batch_size=24, epochs=4, lr=0.01, ks=(1, 2))
PIECES = TOY.replace(loss="HISTLoss", loss_args={"hidden": 8, "tau": 8.0}, sampler="random", sampler_args={}, batch_size=32, norm="after", init="kaiming",
                     normalise=False, epochs=5, warmup_epochs=1, weight_decay=1e-4, schedule="step", schedule_args={"size": 2, "gamma": 0.5},
                     groups={"loss.distributions": {"lr": 0.1}, "loss.hgnn": {"lr": 1e-3}})  # HIST: a loss of two pieces
FILES = ("metrics.json", "weights.safetensors", "embeddings.safetensors")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HAPNB_CACHE", str(tmp_path_factory.getbasetemp() / "features"))


def toy_run(cfg, store, **kw): return run(cfg, store, device="cpu", progress=False, workers=0, **kw)
def contents(result): return [(result.path / f).read_bytes() for f in FILES]


def child(work, *args, out=None, **env):
    "Run `work(*args)` in a forked process (importing torch again would take seconds) with one thread; prints go to `out`."
    def body():
        torch.set_num_threads(1)
        os.environ.update({k: str(v) for k, v in env.items()})
        if out is not None: sys.stdout = open(out, "a", buffering=1)
        work(*args)
    p = multiprocessing.get_context("fork").Process(target=body)
    p.start()
    return p


def ended(*ps):
    for p in ps: p.join(100)
    assert [p.exitcode for p in ps] == [0] * len(ps)


def slowly(cfg, store, pipe=None, seconds=0.01):
    "A run that takes its time and tells of every step."
    step = Trainer.step
    def slow(self, *args):
        if pipe is not None: os.write(pipe, b".")
        time.sleep(seconds)
        step(self, *args)
    Trainer.step = slow
    run(cfg, store, device="cpu", workers=0, save_every=0)


# ---- RunConfig

def test_config_round_trip():
    cfg = TOY.replace(groups={"loss": {"lr": 10}}, schedule="multistep", schedule_args={"milestones": [2, 3]}, clip_norm=1, levels=[0, 1])
    assert RunConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == cfg and hash(pickle.loads(pickle.dumps(cfg))) == hash(cfg)
    d = cfg.to_dict()
    d["groups"]["loss"]["lr"] = 3  # a copy
    assert cfg.groups["loss"]["lr"] == 10
    with pytest.raises(TypeError): cfg.groups["loss"]["lr"] = 3
    with pytest.raises(AttributeError): cfg.lr = 3


@pytest.mark.parametrize("bad, message", [
    (dict(batchsize=3), "batch_size"), (dict(lr="1e-4"), "1.0e-4"), (dict(epochs=True), "must be int"), (dict(epochs=1.5), "must be int"),
    (dict(loss_args=3), "must be dict"), (dict(freeze="trunks"), "'trunk'"), (dict(split="tests"), "'test'"), (dict(precision="bf17"), "'bf16'"),
    (dict(schedule="cosin"), "'cosine'"), (dict(schedule="step"), "schedule_args"), (dict(optimizer="adm"), "'adam'"),
    (dict(groups={"heads": {}}), "'head'"), (dict(groups={"head": {"lrs": 1}}), "'lr'"), (dict(groups={"head": {"lr": "x"}}), "must be a number"),
    (dict(batch_size=1), "2 or more"), (dict(lr=-1), "0.0 or more"), (dict(clip_norm=0), "above 0"), (dict(lr=math.nan), "finite"),
    (dict(memory={"sizes": 9}), "'size'"), (dict(memory={"weight": 1}), "needs 'size'"), (dict(memory={"size": "all"}), "'train'"), (dict(memory={"size": 256}), "no more than the batch"),
    (dict(memory={"size": 999.5}), "memory: size"), (dict(memory={"size": True}), "memory: size"), (dict(memory={"size": 999, "weight": 0}), "greater than 0"), (dict(memory={"size": 999, "start_epoch": -1}), "start_epoch"),
    (dict(memory={"size": 999, "unique": 1}), "valid boolean"), (dict(memory=9), "must be dict"), (dict(miner="TripletMarginMiner"), "'pml/NAME'"), (dict(miner_args={"a": 1}), "miner is None"),
    (dict(freeze_blocks=2), "freeze='trunk'"), (dict(freeze="bn", freeze_blocks=-1), "0 or more"), (dict(packed=0), "1 or more"), (dict(packed=64, decode="shrink"), "small already"), (dict(packed_format="jpeg"), "packed is None: give packed=256"), (dict(packed=64, packed_format="jpg"), "Did you mean 'jpeg'"), (dict(packed=64, packed_format="jpeg101"), "jpeg1 to jpeg100"), (dict(decode="shrunk"), "'shrink'"),
    (dict(init="whitening", embed_dim=None), "start of the projection"), (dict(protocol={"repeats": 3}), "needs a 'kind'"),
    (dict(loss_args={"f": print}), "plain value"), (dict(augment={"flip": 0}), "freeze"), (dict(relevance="pot"), "'pop'"), (dict(seed=-1), "0 or more"),
])
def test_config_errors(bad, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")): RunConfig.from_dict(bad)


def test_key_is_stable_and_sensitive(tmp_path):
    assert TOY.key() == RunConfig.from_dict(TOY.to_dict()).key() == TOY.replace(data_dir=str(tmp_path)).key()
    code = f"from hapnb.train import RunConfig; print(RunConfig.from_dict({TOY.to_dict()!r}).key())"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == TOY.key()
    changes = [dict(seed=1), dict(lr=0.02), dict(loss="SupAPLoss"), dict(loss_args={"lam": 0.2}), dict(sampler_args={"m": 2}), dict(split="val"),
               dict(epochs=5), dict(precision="bf16"), dict(dataset_args={"size": 16}), dict(groups={"head": {"lr": 1}}), dict(ks=[1]),
               dict(relevance={"kind": "pop", "alpha": 2.0}), dict(levels=[0]), dict(eval_every=1), dict(norm=None), dict(embed_dim=8)]
    keys = [TOY.key()] + [TOY.replace(**c).key() for c in changes]
    assert len(set(keys)) == len(keys)


OLD_KEYS = [  # as they were before memory, miner, freeze_blocks, packed, decode and protocol came
    ({}, "99e9672fd2cf12ca"), (dict(seed=3), "e658e14befc85c1a"), (dict(freeze="bn", warmup_epochs=1, augment={"flip": 0.5}, eval_every=1), "c3e16c7d1f7f520e"),
    (dict(micro_batch=8, freeze="bn"), "65397fbea2678b73"), (dict(levels=[1], relevance={"kind": "map"}, metrics=["AP_level0"]), "2e7345ab8b0f803c"),
    (dict(loss="HISTLoss", loss_args={"hidden": 8, "tau": 8.0}, sampler="random", sampler_args={}, norm="after", init="kaiming", normalise=False, groups={"loss.distributions": {"lr": 0.1}}), "9bcf5286713facca"),
    (dict(split="val", precision="bf16", schedule="step", schedule_args={"size": 2}), "fcbead9cc0dadbdd")]


def test_fields_that_came_later_leave_old_keys_alone():
    parts = (SimpleNamespace(fingerprint="a"), SimpleNamespace(fingerprint="b"))
    for change, key in OLD_KEYS: assert TOY.replace(**change).key(parts) == key
    assert RunConfig().key(parts) == "b9a62cafd4ac5374"
    whole = TOY.replace(freeze="bn")
    added = [dict(memory={"size": "train"}), dict(memory={"size": 99}), dict(memory={"size": 99, "weight": 2.0}), dict(miner="pml/TripletMarginMiner"), dict(miner="pml/TripletMarginMiner", miner_args={"margin": 1}),
             dict(freeze_blocks=1), dict(packed=64), dict(packed=64, packed_format="jpeg"), dict(packed=64, packed_format="jpeg80"), dict(decode="shrink"), dict(protocol={"kind": "leave-one-out"})]
    assert {k for c in added for k in c} | {"micro_batch"} == set(C._ADDED)
    assert len({whole.replace(**c).key(parts) for c in [{}, *added]}) == 1 + len(added)
    for c in added: assert RunConfig.from_dict(json.loads(json.dumps(whole.replace(**c).to_dict()))) == whole.replace(**c)


def test_weights_file_is_in_the_key_by_content(tmp_path):
    a, b, c = (tmp_path / n for n in "abc")
    a.write_bytes(b"1"), b.write_bytes(b"1"), c.write_bytes(b"2")
    assert TOY.replace(pretrained=str(a)).key() == TOY.replace(pretrained=str(b)).key() != TOY.replace(pretrained=str(c)).key()


# ---- run

def test_features_follow_the_content_of_a_weights_file(tmp_path):
    "In one process: other weights under the same name are other features, not those in memory."
    from safetensors.torch import save_file
    from hapnb.models import make_trunk
    state, path = make_trunk("timm/resnet18", pretrained=False).net.state_dict(), tmp_path / "w.safetensors"
    cfg = TOY.replace(trunk="timm/resnet18", pretrained=str(path), dataset_args={"hues": 2, "each": 2}, sampler="random", sampler_args={}, batch_size=6)
    ds = C.load_splits(cfg)[0]
    found = []
    for scale in (1., 2.):
        save_file({k: v * scale if k == "conv1.weight" else v for k, v in state.items()}, path)
        found.append(R.features_of(cfg, ds))
        assert R.features_of(cfg, ds, progress=True) is found[-1]
    assert not torch.equal(*found)
    result = toy_run(cfg, tmp_path / "runs")
    result.model()
    save_file(state, path)
    with pytest.raises(ValueError, match="was made with other weights"): result.model()


def test_a_damaged_result_is_named(tmp_path):
    path = toy_run(TOY, tmp_path).path
    (path / "metrics.json").write_text("")
    with pytest.raises(ValueError, match="metrics.json is damaged .*delete the folder"): toy_run(TOY, tmp_path)


def test_an_image_more_is_seen_in_the_same_process(tmp_path):
    from PIL import Image
    for i, kind in enumerate(("a/x", "a/y", "b/x", "b/y", "a/z", "b/z")):
        (tmp_path / kind).mkdir(parents=True)
        for j in range(2): Image.new("RGB", (4, 4), (40 * i, 99, 99 * j)).save(tmp_path / kind / f"{j}.png")
    cfg = TOY.replace(dataset="folder", data_dir=str(tmp_path))
    key = cfg.key()
    assert cfg.key() == key and C.load_splits(cfg)[0] is C.load_splits(cfg)[0]
    for kind in ("a/x", "a/y"): Image.new("RGB", (4, 4)).save(tmp_path / kind / "2.png")
    assert cfg.key() != key


def test_a_misspelt_loss_argument_fails_before_the_features(tmp_path, monkeypatch):
    monkeypatch.setattr(R, "features_of", lambda *a, **kw: pytest.fail("features were computed first"))
    with pytest.raises(ValueError, match="'lam'"): toy_run(TOY.replace(loss_args={"lamb": 1}), tmp_path)


def test_the_folder_of_features(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HAPNB_CACHE", "~/kept")
    assert H.cache_folder() == tmp_path / "kept"


def test_force_trains_again(tmp_path, monkeypatch):
    done = lambda: (toy_run(TOY, tmp_path).path / "metrics.json").stat().st_mtime_ns
    first, weights = done(), toy_run(TOY, tmp_path).weights()["head.proj.weight"]
    monkeypatch.setenv("HAPNB_FORCE", str(time.time() + 0.01))
    time.sleep(0.05)
    second = done()
    assert first != second and done() == second
    assert torch.equal(toy_run(TOY, tmp_path).weights()["head.proj.weight"], weights)


def test_read_back_and_same_again(tmp_path, monkeypatch):
    first = toy_run(TOY, tmp_path / "a")
    assert contents(first) == contents(toy_run(TOY, tmp_path / "b"))
    monkeypatch.setattr(R, "_make_run", lambda *a: pytest.fail("a finished run was made again"))
    again = toy_run(TOY, tmp_path / "a")
    assert again.metrics == first.metrics and again.config == TOY and again.key == TOY.key()
    assert list(again.history.epoch) == [0, 1, 2, 3] and {"loss", "lr_head", "lr_loss", "seconds", "spread", "grad_norm"} <= set(again.history)
    assert again.labels().shape == (len(again.embeddings()), 2) and again.environment["torch"] in torch.__version__
    assert torch.equal(again.labels(), again.dataset().labels)


def test_random_state_of_the_caller_is_left_alone(tmp_path):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    toy_run(TOY.replace(epochs=1), tmp_path)
    assert torch.equal(torch.rand(3), want)


def test_own_data_and_data_that_changed(tmp_path):
    from hapnb.data import load
    train, test = load("toy", "train"), load("toy", "test").subset(range(40))
    r = toy_run(TOY, tmp_path, data=(train, test))
    assert r.key != TOY.key() and len(r.embeddings()) == 40
    with pytest.raises(ValueError, match="40 images of toy"): r.dataset()


def test_training_helps(tmp_path):
    before = toy_run(TOY.replace(epochs=0), tmp_path).metrics["H-AP"]
    assert toy_run(TOY.replace(epochs=12), tmp_path).metrics["H-AP"] > before + 0.03


def test_seed_changes_result(tmp_path):
    assert contents(toy_run(TOY, tmp_path)) != contents(toy_run(TOY.replace(seed=1), tmp_path))


WHOLE = TOY.replace(freeze="none", epochs=2, warmup_epochs=1, eval_every=1, loss="NormSoftmaxLoss", groups={"loss": {"lr": 0.1}})


def test_workers_do_not_change_the_result(tmp_path):
    a = run(WHOLE, tmp_path / "a", device="cpu", progress=False, workers=0)
    b = run(WHOLE, tmp_path / "b", device="cpu", progress=False, workers=2)
    assert contents(a) == contents(b)
    assert a.history["H-AP"].iloc[-1] == pytest.approx(a.metrics["H-AP"])


def test_bf16_val_split_levels(tmp_path):
    r = toy_run(TOY.replace(precision="bf16", split="val", batch_size=12, levels=(1, ), loss="SupAPLoss", metrics=("AP_level0",)), tmp_path)
    assert list(r.metrics) and r.labels().shape[1] == 1 and 0 < r.metrics["AP_level0"] <= 1


QUEUE = TOY.replace(loss="SupAPLoss", memory={"size": 60})
SLOTS = WHOLE.replace(freeze="bn", loss="ROADMAPLoss", groups={}, memory={"size": "train", "start_epoch": 1, "weight": 0.5})


@pytest.mark.parametrize("cfg", [TOY.replace(epochs=12), WHOLE.replace(epochs=3), QUEUE.replace(epochs=8)], ids=["frozen", "whole", "memory"])
def test_kill_9_at_random_moments(tmp_path, cfg):
    want = contents(toy_run(cfg, tmp_path / "whole"))
    rng, out = random.Random(0), tmp_path / "out.txt"
    for _ in range(5):
        read, write = os.pipe()
        p = child(slowly, cfg, tmp_path / "killed", write, out=out)
        os.close(write)
        for _ in range(rng.randint(1, 12)): os.read(read, 1)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        os.close(read)
    again = toy_run(cfg, tmp_path / "killed")
    assert contents(again) == want
    assert out.read_text().count("going on") >= 2
    assert not [f for f in again.path.iterdir() if f.suffix in (".part", ".pt")]


def test_killed_while_writing_results(tmp_path, monkeypatch):
    want = contents(toy_run(TOY, tmp_path / "whole"))
    write = R.write_atomic
    for stop in ("weights.safetensors", "embeddings.safetensors", "history.csv", "environment.json", "metrics.json"):
        def fails(path, data):
            if Path(path).name == stop: raise OSError(28, "No space left on device")
            return write(path, data)
        monkeypatch.setattr(R, "write_atomic", fails)
        with pytest.raises(OSError, match="No space left"): toy_run(TOY, tmp_path / "full")
        assert not R.is_finished(tmp_path / "full" / TOY.key())
    monkeypatch.setattr(R, "write_atomic", write)
    assert contents(toy_run(TOY, tmp_path / "full")) == want


def test_damaged_checkpoint_starts_again(tmp_path, capsys):
    want = contents(toy_run(TOY, tmp_path / "whole"))
    path = tmp_path / "bad" / TOY.key()
    path.mkdir(parents=True)
    (path / "state.pt").write_bytes(b"not a checkpoint")
    assert contents(toy_run(TOY, tmp_path / "bad")) == want
    assert "cannot be used" in capsys.readouterr().out


def _tell(cfg, store):
    make = R._make_run
    def told(*args): print("making"); make(*args)
    R._make_run = told
    slowly(cfg, store, seconds=0.1)


def test_two_processes_ask_for_the_same_run(tmp_path):
    ended(*[child(_tell, TOY, tmp_path / "runs", out=tmp_path / f"{i}.txt") for i in range(2)])
    out = "".join((tmp_path / f"{i}.txt").read_text() for i in range(2))
    assert out.count("making") == 1 and out.count("waiting") == 1


def _die(*args): os.kill(os.getpid(), signal.SIGKILL)


def test_lock_of_a_dead_process_is_free(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(Trainer, "step", _die)
        p = child(toy_run, TOY, tmp_path)
    p.join()
    assert p.exitcode == -signal.SIGKILL and (tmp_path / TOY.key() / "owner.json").exists()
    toy_run(TOY, tmp_path)


# ---- faults

@LOSSES.register()
class NaNAfterLoss(EmbeddingLoss):
    "NormSoftmax's place, and NaN from call `after` on."
    def __init__(self, after=3): super().__init__(); self.after, self.calls = after, 0
    def values(self, batch):
        self.calls += 1
        v = (batch.emb @ batch.emb.T).square().mean(1) * (math.nan if self.calls > self.after else 1)
        return v, torch.ones_like(v)


def test_nan_stops_and_keeps(tmp_path):
    cfg = TOY.replace(loss="NaNAfterLoss", loss_args={"after": 8})
    with pytest.raises(Diverged, match=r"loss is nan at epoch \d, step \d") as e: toy_run(cfg, tmp_path, save_every=0)
    path = tmp_path / cfg.key()
    assert str(path) in str(e.value) and not R.is_finished(path)
    assert len(pd.read_csv(path / "history.csv")) >= 1
    state = T.load_state(path / "state.pt")
    assert all(v.isfinite().all() for v in state["net"].values() if v.is_floating_point())


@pytest.mark.parametrize("change, message", [
    (dict(loss="HAPIERLoss"), "HAPPIERLoss"), (dict(loss_args={"lamb": 1}), "'lam'"), (dict(sampler="m_per_clas"), "m_per_class"),
    (dict(sampler_args={"mm": 1}), "'m'"), (dict(trunk="toi"), "toy"), (dict(dataset="toi"), "toy"), (dict(pooling="avgs"), "avg"),
    (dict(optimizer_args={"beta": 1}), "optimizer_args"), (dict(levels=[5]), "level 5"), (dict(batch_size=20000), "batch_size"),
    (dict(metrics=["H-APP"]), "H-AP"),
])
def test_unknown_names(tmp_path, change, message):
    with pytest.raises(ValueError, match=message): toy_run(TOY.replace(**change), tmp_path)


def test_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*config.json"): toy_run(TOY, tmp_path / "file")


def _in_little_room(store, out):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    try: toy_run(TOY, store, save_every=0)
    except OSError as e: out.write_text(str(e))


def test_full_disk(tmp_path):
    "A limit on file size stands for a full disk: the error is clear, and with room the run is finished."
    toy_run(TOY.replace(epochs=0), tmp_path)  # features are there
    ended(child(_in_little_room, tmp_path, tmp_path / "error.txt"))
    assert "cannot write" in (text := (tmp_path / "error.txt").read_text()) and "state.pt" in text
    toy_run(TOY, tmp_path)


# ---- Trainer

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
    def forward(self, x): return self.head(self.trunk(x).relu())


def make_trainer(loss="NormSoftmaxLoss", **kw):
    from hapnb.losses import make_loss
    torch.manual_seed(1)
    return Trainer(Net(), make_loss(loss, num_classes=4, embedding_size=3), **kw)


def data(n=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g), (torch.arange(n) % 4)[:, None]


class Once:
    "The same batch, `steps` times an epoch."
    def __init__(self, steps=3): self.steps = steps
    def epoch(self, e, start=0):
        for i in range(start, self.steps): yield data()


def test_warm_up_moves_only_new_parameters():
    t = make_trainer(epochs=2, warmup_epochs=2, weight_decay=0.1, optimizer="sgd", lr=0.1, optimizer_args={"momentum": 0.9})
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
        "head": (1.0, 0.0, None), "loss": (2.0, 0.1, None), "loss.a": (3.0, 0.1, None), "loss.a.x": (3.0, 0.1, 0.5)}
    assert [p is q for p, q in zip(found["loss.a.x"]["params"], part.a.x.parameters())] == [True, True]
    assert [len(found[n]["params"]) for n in ("loss", "loss.a", "loss.a.x")] == [1, 2, 2]
    same = {g["name"]: g["lr"] for g in T.param_groups(dict(loss=part), 1.0, groups=dict(reversed(groups.items())))}
    assert same == {n: found[n]["lr"] for n in same} and len(same) == 3  # the order in which they are named does not matter


@pytest.mark.parametrize("groups, message", [
    ({"loss.hgn": {"lr": 1.0}}, "loss has no piece 'hgn'.*Did you mean 'hgnn'"), ({"loss.": {}}, "loss has no piece ''"), ({"loss.hgnn.norms": {}, "loss.x": {}}, "no piece 'x'"),
    ({"lose.hgnn": {}}, "unknown part 'lose.hgnn'"), ({"loss.hgnn": {"lrs": 1}}, "unknown setting 'lrs'.*'lr'"), ({"loss.hgnn": {"lr": "1e-3"}}, "must be a number"),
    ({"head.norm": {}}, "head has no piece 'norm'.*Known: proj"), ({"trunk.net": {}}, "trunk has no piece 'net'.*Known: none"), ({"loss.distributions.means": {}}, "no piece 'distributions.means'")])
def test_bad_pieces(tmp_path, groups, message):
    with pytest.raises(ValueError, match=message): toy_run(PIECES.replace(groups=groups), tmp_path)
    assert not list(tmp_path.rglob("metrics.json"))


def test_a_misspelt_piece_fails_before_the_features(tmp_path, monkeypatch):
    monkeypatch.setattr(R, "features_of", lambda *a, **k: pytest.fail("features were computed first"))
    with pytest.raises(ValueError, match="hgnn"): toy_run(PIECES.replace(groups={"loss.hgn": {}}), tmp_path)


@pytest.mark.parametrize("freeze", ["trunk", "bn"])
def test_pieces_of_hist_learn_at_their_own_rates(tmp_path, freeze):
    result = toy_run(PIECES.replace(freeze=freeze), tmp_path)
    h = pd.read_csv(result.path / "history.csv")
    fall = [1, 1, 1, 0.5, 0.5]  # an epoch of warm-up, then halved every two epochs
    assert h["lr_loss.distributions"].tolist() == pytest.approx([0.1 * f for f in fall])
    assert h["lr_loss.hgnn"].tolist() == pytest.approx([1e-3 * f for f in fall])
    assert h.lr_head.tolist() == pytest.approx([0.01 * f for f in fall])
    assert "lr_loss" not in h and ("lr_trunk" in h) == (freeze == "bn")
    assert h.loss.iloc[-1] < h.loss.iloc[0] and {"distribution", "hypergraph"} <= set(h)


def test_a_rate_of_a_piece_reaches_only_that_piece(tmp_path):
    "With a rate of zero a piece stays where it started, and the others do not."
    cfg = PIECES.replace(weight_decay=0.0, epochs=2)
    start = {k: v.clone() for k, v in R.build_trainer(cfg, C.load_splits(cfg)[0], T.make_accelerator("cpu"))[0].loss.named_parameters()}
    for piece in ("distributions", "hgnn"):
        other = {"distributions": "hgnn", "hgnn": "distributions"}[piece]
        found = toy_run(cfg.replace(groups={f"loss.{piece}": {"lr": 0.0}, f"loss.{other}": {"lr": 0.1}}), tmp_path).weights()
        still = {k for k, v in start.items() if torch.equal(found[f"loss.{k}"], v)}
        assert still == {k for k in start if k.startswith(piece + ".")}


def test_pieces_are_in_the_key(tmp_path):
    data = C.load_splits(PIECES)
    swap = {"loss.hgnn": {"lr": 1e-3}, "loss.distributions": {"lr": 0.1}}
    other = {"loss.hgnn": {"lr": 2e-3}, "loss.distributions": {"lr": 0.1}}
    assert PIECES.key(data) == PIECES.replace(groups=swap).key(data) == RunConfig.from_dict(json.loads(json.dumps(PIECES.to_dict()))).key(data)
    assert len({PIECES.replace(groups=g).key(data) for g in (swap, other, {"loss": {"lr": 0.1}}, {"loss.hgnn": {"lr": 1e-3}})}) == 4


def dies_after(steps, monkeypatch):
    "Let a training be interrupted after so many steps."
    step, left = Trainer.step, [steps]
    def dies(self, *args):
        left[0] -= 1
        if left[0] < 0: raise KeyboardInterrupt
        step(self, *args)
    monkeypatch.setattr(Trainer, "step", dies)


def test_pieces_resume_to_the_last_bit(tmp_path, monkeypatch):
    cfg = PIECES.replace(freeze="bn", augment={"flip": 0.5})
    whole = toy_run(cfg, tmp_path / "whole")
    step = Trainer.step
    dies_after(13, monkeypatch)
    with pytest.raises(KeyboardInterrupt): toy_run(cfg, tmp_path / "cut", save_every=0)
    assert T.load_state(next((tmp_path / "cut").rglob("state.pt")))["epoch"] > cfg.warmup_epochs
    monkeypatch.setattr(Trainer, "step", step)
    again = toy_run(cfg, tmp_path / "cut")
    assert contents(again) == contents(whole)
    columns = [c for c in pd.read_csv(whole.path / "history.csv") if c != "seconds"]
    assert pd.read_csv(again.path / "history.csv")[columns].equals(pd.read_csv(whole.path / "history.csv")[columns])


def test_a_step_is_the_plain_step():
    "The guards, accelerate and the fused kernel change nothing."
    a, b = make_trainer(lr=0.01), make_trainer(lr=0.01)
    plain = torch.optim.Adam(b.params, lr=0.01, fused=False, foreach=False)
    a.begin_epoch()
    for _ in range(3):
        a.step(*data())
        b.loss(b.net(data()[0]), data()[1]).backward()
        plain.step(), plain.zero_grad()
    for p, q in zip(a.params, b.params): torch.testing.assert_close(p, q)


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


# ---- several processes

class Halves:
    "Two batches of 11: not a multiple of two processes."
    def set_epoch(self, e): pass
    def __iter__(self): return iter([[*range(0, 11)], [*range(11, 22)]])


def _train(loss, out):
    acc = T.make_accelerator("cpu")
    t = make_trainer(loss, accelerator=acc, epochs=2, lr=0.01, optimizer="sgd").fit(B.FeatureBatches(*data(22), Halves()))
    history = [{k: v for k, v in r.items() if k != "seconds"} for r in t.history]
    if acc.is_main_process: T.save_state(out, dict(net=t.net.state_dict(), loss=t.loss.state_dict(), history=history))
    acc.wait_for_everyone()


def together(work, *args, n=2):
    "Start n processes that know of each other, as torchrun does."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n)
    ended(*[child(work, *args, RANK=r, LOCAL_RANK=r, **env) for r in range(n)])


@pytest.mark.parametrize("loss", ["NormSoftmaxLoss", "SmoothAPLoss"])
def test_two_processes_train_as_one(tmp_path, loss):
    _train(loss, tmp_path / "one.pt")
    together(_train, loss, tmp_path / "two.pt")
    a, b = T.load_state(tmp_path / "one.pt"), T.load_state(tmp_path / "two.pt")
    for part in ("net", "loss"):
        for k in a[part]: torch.testing.assert_close(a[part][k], b[part][k], rtol=1e-5, atol=1e-6)
    for r, s in zip(a["history"], b["history"]): assert r == pytest.approx(s, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("broken", [True, False])
def test_gathered_gradient_needs_its_factor(tmp_path, monkeypatch, broken):
    "Without the factor of section 4, two processes would take half steps: the comparison above sees it."
    if broken: monkeypatch.setattr(T._Gather, "backward", staticmethod(lambda ctx, g: g[ctx.own]))
    _train("SmoothAPLoss", tmp_path / "one.pt")
    together(_train, "SmoothAPLoss", tmp_path / "two.pt")
    a, b = T.load_state(tmp_path / "one.pt"), T.load_state(tmp_path / "two.pt")
    norms = [torch.tensor([r["grad_norm"] for r in x["history"]]) for x in (a, b)]
    assert torch.allclose(*norms, rtol=1e-4) != broken


@pytest.mark.parametrize("cfg", [TOY, TOY.replace(pooling="gem"), WHOLE, QUEUE.replace(optimizer="sgd"), SLOTS.replace(micro_batch=4)], ids=["frozen", "gem", "whole", "queue", "slots"])
def test_run_with_two_processes(tmp_path, cfg):
    cfg = cfg.replace(freeze="bn") if cfg.freeze == "none" else cfg  # batch statistics would be each process's own
    one = toy_run(cfg, tmp_path / "one")
    together(toy_run, cfg, tmp_path / "two")
    two = Result(tmp_path / "two" / cfg.key())
    assert two.environment["processes"] == 2
    torch.testing.assert_close(one.embeddings(), two.embeddings(), rtol=1e-3, atol=1e-4)
    assert two.metrics == pytest.approx(one.metrics, abs=1e-2)


def _remember(memory, micro_batch, out):
    acc = T.make_accelerator("cpu")
    t = make_trainer("SmoothAPLoss", accelerator=acc, epochs=3, lr=0.01, optimizer="sgd", memory=memory, micro_batch=micro_batch).fit(B.FeatureBatches(*data(22), Halves()))
    T.save_state(f"{out}{acc.process_index}", dict(net=t.net.state_dict(), memory=t.memory.state_dict(), history=[{k: v for k, v in r.items() if k != "seconds"} for r in t.history]))
    acc.wait_for_everyone()


@pytest.mark.parametrize("memory", [dict(size=15), dict(size=22, unique=True, start_epoch=1, weight=2.)], ids=["queue", "slots"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_every_process_holds_the_same_memory(tmp_path, memory, micro_batch):
    _remember(memory, None, tmp_path / "one")
    together(_remember, memory, micro_batch, tmp_path / "two")
    one, first, second = (T.load_state(tmp_path / n) for n in ("one0", "two0", "two1"))
    for k, v in first["memory"].items(): assert torch.equal(v, second["memory"][k])
    for part in ("net", "memory"):
        for k in one[part]: torch.testing.assert_close(one[part][k], first[part][k], rtol=1e-5, atol=1e-6)
    for r, s in zip(one["history"], first["history"]): assert r == pytest.approx(s, rel=1e-4, abs=1e-6)


# ---- a memory of embeddings

class Rows:
    "Batches of given rows, each epoch the same."
    def __init__(self, *rows): self.given = rows
    def set_epoch(self, e): pass
    def __iter__(self): return iter([list(r) for r in self.given])


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("loss", ["SupAPLoss", "ROADMAPLoss", "HAPPIERLoss"])
def test_training_with_a_memory_is_the_papers_two_terms(loss, unique):
    "Against a loop of its own: a dict of image numbers or a list, filled before it is asked; the softmax of HAPPIER counts once."
    from hapnb.losses import SumLoss, make_loss
    x, y = data(24)
    batches = [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 0, 1], [4, 8, 12, 16, 5, 9]]
    memory = dict(size=24, unique=True, weight=0.5, start_epoch=1) if unique else dict(size=10, weight=0.5, start_epoch=1)
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
                term = ranked(z, y[rows], ref_emb=torch.stack([e for e, _ in there]), ref_labels=torch.stack([l for _, l in there]))
                memory_terms[-1].append(term.item())
                value = value + 0.5 * term
            opt.zero_grad()
            value.backward()
            opt.step()
    for p, q in zip([*t.net.parameters(), *t.loss.parameters()], [*net.parameters(), *own.parameters()]): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert "memory" not in t.history[0]
    for r, want in zip(t.history[1:], memory_terms[1:]): assert r["memory"] == pytest.approx(np.mean(want), rel=1e-4)
    assert len(t.memory) == len(kept) and not t.memory.emb.requires_grad


@pytest.mark.parametrize("cfg", [QUEUE, SLOTS, SLOTS.replace(micro_batch=5, epochs=3)], ids=["queue", "slots", "two-pass"])
@pytest.mark.parametrize("stop", [1, 7, 9])
def test_a_memory_resumes_to_the_last_bit(tmp_path, monkeypatch, cfg, stop):
    whole = toy_run(cfg, tmp_path / "whole")
    step = Trainer.step
    dies_after(stop, monkeypatch)
    with pytest.raises(KeyboardInterrupt): toy_run(cfg, tmp_path / "cut", save_every=0)
    state = T.load_state(next((tmp_path / "cut").rglob("state.pt")))["memory"]
    assert len(state["emb"]) == (60 if cfg == QUEUE else 144) and int(state["count"]) > 0
    monkeypatch.setattr(Trainer, "step", step)
    assert contents(toy_run(cfg, tmp_path / "cut")) == contents(whole)


def test_without_its_memory_a_run_goes_on_differently(tmp_path, monkeypatch):
    "The test above would see a memory that is not in the checkpoint."
    monkeypatch.setattr(T.CrossBatchMemory, "load_state_dict", lambda *a: None)
    with pytest.raises(AssertionError): test_a_memory_resumes_to_the_last_bit(tmp_path, monkeypatch, QUEUE, 7)


@pytest.mark.parametrize("change, message", [
    (dict(loss="NormSoftmaxLoss"), "NormSoftmaxLoss does not look at references"), (dict(loss="NaNAfterLoss"), "NaNAfterLoss does not look at references"),
    (dict(memory={"size": 100, "unique": True}), "100 slots are too few for 144 training images"), (dict(loss="pml/ArcFaceLoss"), "compares a batch with itself only")])
def test_memory_that_makes_no_sense(tmp_path, change, message):
    if "pml/" in change.get("loss", ""): pytest.importorskip("pytorch_metric_learning")
    with pytest.raises(ValueError, match=message): toy_run(QUEUE.replace(**change), tmp_path)


def test_the_memory_changes_the_run_and_is_in_the_history(tmp_path):
    none, queue = toy_run(QUEUE.replace(memory={}), tmp_path), toy_run(QUEUE, tmp_path)
    assert "memory" in queue.history and "memory" not in none.history and contents(none) != contents(queue)
    assert toy_run(QUEUE.replace(micro_batch=5), tmp_path).history.loss.tolist() == pytest.approx(queue.history.loss.tolist(), rel=1e-3)


@pytest.mark.parametrize("kw, message", [(dict(micro_batch=0), "1 or more"), (dict(micro_batch=2.5), "whole"), (dict(memory={"size": "train"}), "does not know the training set"), (dict(memory={"sise": 3}), "'size'")])
def test_trainer_arguments(kw, message):
    with pytest.raises(ValueError, match=message): make_trainer(**kw)


def test_slots_need_to_know_the_rows():
    t = make_trainer("SmoothAPLoss", memory=dict(size=16, unique=True))
    with pytest.raises(ValueError, match="needs keys"): t.step(*data())


# ---- miners

TRIPLET = TOY.replace(loss="pml/TripletMarginLoss", miner="pml/TripletMarginMiner", miner_args={"margin": 0.3, "type_of_triplets": "semihard"}, epochs=2)


def test_a_miner_chooses_for_the_loss(tmp_path):
    miners, losses = pytest.importorskip("pytorch_metric_learning.miners"), pytest.importorskip("pytorch_metric_learning.losses")
    cfg = TRIPLET.replace(optimizer="sgd", lr=0.5, schedule="constant", epochs=1)
    t, batches = R.build_trainer(cfg, C.load_splits(cfg)[0], T.make_accelerator("cpu"))
    own, _ = R.build_trainer(cfg, C.load_splits(cfg)[0], T.make_accelerator("cpu"))
    t.fit(batches)
    miner, loss = miners.TripletMarginMiner(margin=0.3, type_of_triplets="semihard"), losses.TripletMarginLoss()
    opt = torch.optim.SGD(own.net.parameters(), lr=0.5)
    for x, y in batches.epoch(0):
        z = own.net(x)
        opt.zero_grad()
        loss(z, y[:, 0], miner(z, y[:, 0])).backward()
        opt.step()
    torch.testing.assert_close(t.net.head.proj.weight, own.net.head.proj.weight, rtol=1e-4, atol=1e-6)
    plain = toy_run(TRIPLET.replace(miner=None, miner_args={}), tmp_path)
    assert contents(toy_run(TRIPLET, tmp_path)) != contents(plain)


def test_a_miner_with_a_memory_and_two_passes(tmp_path):
    pytest.importorskip("pytorch_metric_learning")
    one = toy_run(TRIPLET.replace(memory={"size": "train"}), tmp_path)
    two = toy_run(TRIPLET.replace(memory={"size": "train"}, micro_batch=7), tmp_path)
    assert one.history.memory.tolist() == pytest.approx(two.history.memory.tolist(), rel=1e-3) and (one.history.memory > 0).all()


@pytest.mark.parametrize("change, message", [
    (dict(loss="SupAPLoss"), "SupAPLoss compares all images of a batch"), (dict(miner="pml/MultiSimilartyMiner"), "MultiSimilarityMiner"), (dict(miner_args={"margn": 1}), "'margin'"),
    (dict(loss="pml/P2SGradLoss"), "P2SGradLoss does not take the pairs of pml/TripletMarginMiner"), (dict(loss="pml/TripletMarginLos"), "TripletMarginLoss")])
def test_miners_that_do_not_fit(tmp_path, monkeypatch, change, message):
    pytest.importorskip("pytorch_metric_learning")
    monkeypatch.setattr(R, "features_of", lambda *a, **k: pytest.fail("features were computed first"))
    with pytest.raises(ValueError, match=message): toy_run(TRIPLET.replace(**change), tmp_path)


@pytest.mark.parametrize("asked, level", [({}, 1), ({"level": 0}, 0)])
def test_a_miner_looks_at_the_level_of_the_loss(asked, level):
    pytest.importorskip("pytorch_metric_learning")
    cfg = TRIPLET.replace(loss_args={"level": 1}, miner_args={"margin": 9., **asked})
    y = torch.tensor([[0, 0], [1, 0], [2, 1], [3, 1]])  # alone at level 0, pairs at level 1
    found = R._make_miner(cfg)(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), y)
    assert R._make_miner(cfg).level == level and (len(found[0]) > 0) == (level == 1)


def test_a_miner_that_cannot_work_with_a_memory_is_named_at_once(tmp_path, monkeypatch):
    pytest.importorskip("pytorch_metric_learning")
    monkeypatch.setattr(R, "features_of", lambda *a, **k: pytest.fail("features were computed first"))
    cfg = TRIPLET.replace(miner="pml/BatchEasyHardMiner", miner_args={})
    with pytest.raises(ValueError, match="the image's own copy"): toy_run(cfg.replace(memory={"size": "train", "start_epoch": 1}), tmp_path)
    with pytest.raises(pytest.fail.Exception): toy_run(cfg, tmp_path)  # without a memory it is good


def test_embeddings_that_break_are_named_with_a_miner_too():
    pytest.importorskip("pytorch_metric_learning")
    from hapnb.external import pml_loss, pml_miner
    t = Trainer(Net(), pml_loss("TripletMarginLoss"), miner=pml_miner("TripletMarginMiner"))
    with torch.no_grad(): next(t.net.parameters()).fill_(math.nan)
    t.begin_epoch()
    with pytest.raises(Diverged, match="epoch 0, step 0"): t.step(*data())


def test_nothing_is_loaded_where_nothing_is_shared(monkeypatch):
    monkeypatch.setattr(R, "load_splits", lambda cfg: pytest.fail("the dataset was read"))
    R.prepare(TOY.replace(freeze="bn"), "cpu", progress=False)


# ---- protocols

def with_parts(protocol):
    "The toy test images, every third one a query."
    from hapnb.data import load
    test = load("toy", "test")
    test.meta = test.meta.assign(part=["query" if i % 3 == 0 else "gallery" for i in range(len(test))])
    test.protocol = protocol
    return load("toy", "train"), test


def test_leave_one_out_is_what_it_was(tmp_path):
    from hapnb.metrics import evaluate
    for protocol in ({}, {"kind": "leave-one-out"}):
        r = toy_run(TOY.replace(protocol=protocol), tmp_path)
        assert r.metrics == {k: v for k, v in evaluate(r.embeddings(), r.labels(), ks=(1, 2)).items()}


def test_the_datasets_protocol_is_followed(tmp_path):
    from hapnb.metrics import evaluate
    parts = with_parts({"kind": "query-gallery"})
    r = toy_run(TOY.replace(eval_every=2), tmp_path, data=parts)
    z, y, q = r.embeddings(), r.labels(), torch.arange(len(parts[1])) % 3 == 0
    want = evaluate(z[~q], y[~q], z[q], y[q], ks=(1, 2))
    assert r.metrics == pytest.approx(want) and r.history["H-AP"].iloc[-1] == pytest.approx(want["H-AP"])
    other = toy_run(TOY.replace(protocol={"kind": "leave-one-out"}), tmp_path, data=parts)  # the config's word counts
    assert other.metrics == pytest.approx(evaluate(other.embeddings(), other.labels(), ks=(1, 2)))
    repeated = toy_run(TOY.replace(protocol={"kind": "random-gallery", "repeats": 3, "seed": 1}), tmp_path)
    assert "R@1_level0_std" in repeated.metrics


def test_protocol_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'part' is 'test' in row 0"): toy_run(TOY.replace(protocol={"kind": "query-gallery"}), tmp_path)
    with pytest.raises(ValueError, match="levels=None"): toy_run(TOY.replace(levels=(0,), protocol={"kind": "dyml"}), tmp_path)
    monkeypatch.setattr(R, "features_of", lambda *a, **k: pytest.fail("features were computed first"))
    with pytest.raises(ValueError, match="'query-gallery'"): toy_run(TOY.replace(protocol={"kind": "query-galery"}), tmp_path)


# ---- images: decoded small, packed

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Four classes of JPEGs of 300 x 400 pixels."
    from PIL import Image
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for c, name in enumerate(("a/x", "a/y", "b/x", "b/y")):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            small = Image.fromarray((rng.random((6, 8, 3)) * 160 + 20 * c).astype(np.uint8))
            small.resize((400, 300), Image.BICUBIC).save(folder / name / f"{i}.jpg", quality=95)
    return RunConfig(dataset="folder", data_dir=str(folder), trunk="toy", freeze="bn", image_size=32, transform={"crop_pct": 0.8}, augment={"resize": 50}, embed_dim=8,
                     batch_size=8, epochs=1, loss="SmoothAPLoss", lr=0.01, ks=(1,))


def spied(monkeypatch):
    "What `image` of a dataset was asked for."
    from hapnb.datasets import RetrievalDataset
    asked, image = [], RetrievalDataset.image
    def spy(self, i, *args, **kw):
        asked.append(kw.get("at_least", args[0] if args else None))
        out = image(self, i, *args, **kw)
        sizes.append(min(out.size))
        return out
    sizes = []
    monkeypatch.setattr(RetrievalDataset, "image", spy)
    return asked, sizes


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_decoded_no_larger_than_needed(tmp_path, monkeypatch, photos, workers):
    full = run(photos, tmp_path, device="cpu", progress=False, workers=workers)
    if not workers: asked, sizes = spied(monkeypatch)  # worker processes would not tell
    small = run(photos.replace(decode="shrink"), tmp_path, device="cpu", progress=False, workers=workers)
    if not workers: assert set(asked) == {50, 40} and set(sizes) == {75}  # train and test; a quarter of 300
    assert full.key != small.key and not torch.equal(full.embeddings(), small.embeddings())
    assert float((full.embeddings() * small.embeddings()).sum(1).min()) > 0.99


def test_features_of_small_images_have_a_place_of_their_own(tmp_path, monkeypatch, photos):
    cfg = photos.replace(freeze="trunk", augment={})
    test = C.load_splits(cfg)[1]
    full = R.features_of(cfg, test)
    asked, _ = spied(monkeypatch)
    small = R.features_of(cfg.replace(decode="shrink"), test)
    assert set(asked) == {40} and not torch.equal(full, small)
    torch.testing.assert_close(full, small, atol=0.1, rtol=0.1)
    R._IN_MEMORY.clear()
    assert torch.equal(R.features_of(cfg, test), full)  # from disk
    assert len(asked) == len(test)


def test_a_shrunk_dataset_survives_pickling(photos):
    ds = B._Shrunk(C.load_splits(photos)[1], 40)
    again = pickle.loads(pickle.dumps(ds))
    assert again.fingerprint == ds.fingerprint != ds.dataset.fingerprint and len(again) == len(ds) and again.image(0).size == (100, 75)
    with pytest.raises(AttributeError): again.nothing


class Packed:
    "What a packed dataset must be for training: the same rows, smaller images."
    made = []
    def __init__(self, dataset, side): self.dataset, self.side, self.fingerprint = dataset, side, f"{dataset.fingerprint} packed {side}"
    def __len__(self): return len(self.dataset)
    def __getattr__(self, name): return getattr(self.__dict__["dataset"], name)
    def image(self, i):
        im = self.dataset.image(i)
        scale = self.side / min(im.size)
        return im.resize([round(s * scale) for s in im.size])


def test_training_reads_a_packed_copy(tmp_path, monkeypatch, photos):
    calls = []
    def packed(dataset, side, folder=None, progress=True, format="raw"):
        calls.append((dataset.split, side))
        return Packed(dataset, side)
    monkeypatch.setitem(sys.modules, "hapnb.packed", SimpleNamespace(packed=packed))
    asked, sizes = spied(monkeypatch)
    small = toy_run(photos.replace(packed=60), tmp_path)
    assert set(calls) == {("train", 60), ("test", 60)} and set(asked) == {None}
    full = toy_run(photos, tmp_path)
    assert float((full.embeddings() * small.embeddings()).sum(1).min()) > 0.99 and not torch.equal(full.embeddings(), small.embeddings())
    assert small.dataset().fingerprint == full.dataset().fingerprint  # where the images came from
    frozen = photos.replace(packed=60, freeze="trunk", augment={})
    calls.clear()
    R.prepare(frozen, "cpu", progress=False)
    assert {s for s, _ in calls} == {"train", "test"}
    with pytest.raises(ValueError, match="packed=45 keeps fewer pixels than the 50"): toy_run(photos.replace(packed=45), tmp_path)


def test_two_processes_pack_once(tmp_path, photos, monkeypatch):
    "Both ask for the copy before they meet: packing may take longer than a process waits for the others."
    monkeypatch.setenv("HAPNB_CACHE", str(tmp_path / "cache"))
    import hapnb.packed as P
    make, pack, wait = P._make, R._pack, R.make_accelerator
    def noted(kind, f):
        def g(*args, **kw):
            (tmp_path / f"{kind}.{os.environ['RANK']}.{time.monotonic_ns()}").touch()
            return f(*args, **kw)
        return g
    def accelerator(*args):
        a = wait(*args)
        a.wait_for_everyone = noted("meets", a.wait_for_everyone)
        return a
    for module, name, kind, f in ((P, "_make", "made", make), (R, "_pack", "asks", pack), (R, "make_accelerator", None, None)):
        monkeypatch.setattr(module, name, accelerator if f is None else noted(kind, f))
    together(toy_run, photos.replace(packed=60), tmp_path / "two")
    order = lambda kind, rank: sorted(int(p.name.split(".")[2]) for p in tmp_path.glob(f"{kind}.{rank}.*"))
    assert sum(len(order("made", r)) for r in (0, 1)) == 2  # train and test, each by one process
    for r in (0, 1): assert order("asks", r)[1] < order("meets", r)[0]


def test_needed_side_of_the_library_transforms():
    from hapnb.models import test_transform as testing, train_transform as training
    trunk = M.toy_trunk()
    assert B.needed_side(testing(trunk, 32, 0.8)) == 40 and B.needed_side(testing(trunk, 32, 0.8, square=True)) == 40 and B.needed_side(training(trunk, 32, resize=50)) == 50
    transform = training(trunk, 32, (0.25, 1.), (0.5, 2.))
    side = B.needed_side(transform)
    torch.manual_seed(0)
    boxes = [transform.transforms[0].make_params([torch.zeros(3, side, side)]) for _ in range(300)]
    assert side == 91 and min(min(b["height"], b["width"]) for b in boxes) >= 31  # rounding of a box to whole pixels


# ---- blocks that stand still, whitening

def test_first_blocks_stand_still(tmp_path):
    cfg = TOY.replace(trunk="timm/resnet18", pretrained=False, freeze="bn", freeze_blocks=2, epochs=1, batch_size=16, loss="SmoothAPLoss", dataset_args={"hues": 4, "each": 4})
    start = {k: v.clone() for k, v in R.build_trunk(cfg).state_dict().items()}
    after = {k.removeprefix("trunk."): v for k, v in toy_run(cfg, tmp_path).weights().items() if k.startswith("trunk.")}
    moved = {k for k in start if not torch.equal(start[k], after[k])}
    assert moved and all("layer3" in k or "layer4" in k for k in moved)
    moved_all = toy_run(cfg.replace(freeze_blocks=0), tmp_path).weights()
    assert any(not torch.equal(moved_all[f"trunk.{k}"], start[k]) for k in start if "layer1" in k)
    with pytest.raises(ValueError, match="freeze_blocks=9"): toy_run(cfg.replace(freeze_blocks=9), tmp_path)


@pytest.mark.parametrize("freeze", ["trunk", "bn"])
def test_whitening_makes_the_start_white(tmp_path, monkeypatch, freeze):
    cfg = TOY.replace(init="whitening", norm=None, embed_dim=4, freeze=freeze, epochs=0, normalise=False, loss="HISTLoss", loss_args={"hidden": 4})
    train = C.load_splits(cfg)[0]
    t, batches = R.build_trainer(cfg, train, T.make_accelerator("cpu"))
    x = R.features_of(TOY, train)
    z = t.net.head.proj(t.net.head.norm(x))
    torch.testing.assert_close(torch.cov(z.T), torch.eye(4), atol=2e-2, rtol=0)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    assert t.net.head.proj.weight.requires_grad
    assert contents(toy_run(cfg, tmp_path / "a")) == contents(toy_run(cfg, tmp_path / "b"))
    result = toy_run(cfg, tmp_path / "a")
    torch.testing.assert_close(result.model().head.proj.weight, t.net.head.proj.weight.detach())


def test_whitening_looks_at_some_images_only():
    assert R._some_rows(7).tolist() == list(range(7))
    many = R._some_rows(20000)
    assert len(many) == 5000 and bool((many.diff() > 0).all()) and torch.equal(many, R._some_rows(20000))


def test_checkpoints_of_a_large_network_leave_time_to_train(tmp_path, monkeypatch):
    "A checkpoint that takes 10 s is written every 200 s, not every 30."
    now, saved = [0.], []
    monkeypatch.setattr(R.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(R, "save_state", lambda *a: (saved.append(now[0]), now.__setitem__(0, now[0] + 10.)))
    trainer = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=True), state_dict=dict)
    clock = R._Clock(trainer, tmp_path, TOY, None, 30., False)
    while now[0] < 500: now[0] += 1; clock.after_step(trainer)
    assert saved == [30., 240., 450.]
    saved.clear(); clock = R._Clock(trainer, tmp_path, TOY, None, 0, False)
    for _ in range(3): clock.after_step(trainer)
    assert len(saved) == 3  # 0: after each step


def test_a_trained_network_needs_nothing_but_its_run(tmp_path):
    "The ImageNet weights that it started from may be gone, and the network too."
    cfg = TOY.replace(freeze="bn", pretrained=str(tmp_path / "trunk.pth"), epochs=1)
    torch.save(R.build_net(cfg.replace(pretrained=False)).trunk.net.state_dict(), tmp_path / "trunk.pth")
    result = toy_run(cfg, tmp_path / "runs")
    (tmp_path / "trunk.pth").unlink()
    from hapnb.models import test_transform as plain
    net, part = result.model(), result.dataset()
    torch.testing.assert_close(R.embed(net, part, plain(net, 32)), result.embeddings(), rtol=0, atol=1e-6)


def test_links_that_lead_round_in_the_data_folder(tmp_path):
    "Two links to the folder itself would be followed for ever, each within the other; a change is seen all the same."
    (tmp_path / "data/sub").mkdir(parents=True)
    for name in "ab": (tmp_path / "data" / name).symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data/table.csv").write_text("x")
    for p in (tmp_path / "data/sub", tmp_path / "data"): os.utime(p, ns=(5, 5))
    assert C._changed(tmp_path / "data") == 5 and C._changed(tmp_path / "data/table.csv") == os.stat(tmp_path / "data/table.csv").st_mtime_ns
    os.utime(tmp_path / "data/sub", ns=(9, 9))
    assert C._changed(tmp_path / "data") == 9
