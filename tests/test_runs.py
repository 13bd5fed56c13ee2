"Runs: read back, kill -9 and resume, damage, faults, protocols."

import json, os, random, resource, signal, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import hapnb.train as T
from hapnb import build, config, runs
from hapnb.helpers import LOSSES, UserError
from hapnb.runs import Result
from hapnb.train import Diverged, Trainer
from runs_kit import (
    cache,
    FILES,
    TOY,
    PIECES,
    WHOLE,
    QUEUE,
    SLOTS,
    toy_run,
    contents,
    child,
    ended,
    slowly,
    dies_after,
    together,
)  # noqa: F401 (a fixture)


def test_a_misspelt_loss_argument_fails_before_the_features(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "features_of", lambda *a, **kw: pytest.fail("features were computed first"))
    with pytest.raises(ValueError, match="'lam'"):
        toy_run(TOY.replace(loss_args={"lamb": 1}), tmp_path)


TAIL = dict(trunk="tf_efficientnet_lite0", pretrained=False, freeze="blocks", freeze_blocks=6, image_size=64, epochs=2,
            eval_every=1)


@pytest.mark.parametrize("loss", ["PairLoss", "HAPPIERLoss"])
def test_blocks_computed_once_are_the_network_on_images(tmp_path, monkeypatch, loss):
    cfg = TOY.replace(**TAIL, loss=loss)
    with monkeypatch.context() as m:
        dies_after(8, m)
        with pytest.raises(KeyboardInterrupt): toy_run(cfg, tmp_path / "a")
    result = toy_run(cfg, tmp_path / "a")
    assert contents(result) == contents(toy_run(cfg, tmp_path / "b"))
    before, after = build.build_net(cfg), result.model()
    changed = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert {n.split(".")[3] for n in changed if ".blocks." in n} == {"6"}
    assert {"trunk.net.conv_head.weight", "head.proj.weight"} <= changed
    assert not any("conv_stem" in n or ".running_" in n for n in changed)
    # the trained network on images gives what was measured on kept maps
    images = build.embed_part(cfg.replace(freeze="bn"), after, result.dataset())
    assert torch.allclose(images, result.embeddings(), atol=1e-5)
    assert torch.equal(build.embed_part(cfg, after, result.dataset()), result.embeddings())


def test_blocks_computed_once_need_blocks(tmp_path):
    with pytest.raises(UserError, match="give freeze_blocks"): TOY.replace(freeze="blocks")
    with pytest.raises(UserError, match="without random crops"): TOY.replace(**TAIL, augment={"flip": 0.0})
    with pytest.raises(UserError, match="toy has not"): toy_run(TOY.replace(freeze="blocks", freeze_blocks=1), tmp_path)
    with pytest.raises(UserError, match="must be 1 to 6"): toy_run(TOY.replace(**TAIL | {"freeze_blocks": 7}), tmp_path)


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
    monkeypatch.setattr(runs, "_make_run", lambda *a: pytest.fail("a finished run was made again"))
    again = toy_run(TOY, tmp_path / "a")
    assert again.metrics == first.metrics and again.config == TOY and again.key == TOY.key()
    assert list(again.history.epoch) == [0, 1, 2, 3] and {
        "loss",
        "lr_head",
        "lr_loss",
        "seconds",
        "mean_cosine",
        "grad_norm",
    } <= set(again.history)
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
    with pytest.raises(ValueError, match="40 images of toy"):
        r.dataset()


def test_training_helps(tmp_path):
    before = toy_run(TOY.replace(epochs=0), tmp_path).metrics["H-AP"]
    assert toy_run(TOY.replace(epochs=12), tmp_path).metrics["H-AP"] > before + 0.03


def test_seed_changes_result(tmp_path):
    assert contents(toy_run(TOY, tmp_path)) != contents(toy_run(TOY.replace(seed=1), tmp_path))


def test_bf16_val_split_levels(tmp_path):
    r = toy_run(
        TOY.replace(
            precision="bf16", split="val", batch_size=12, levels=(1,), loss="SupAPLoss", metrics=("AP_level0",)
        ),
        tmp_path,
    )
    assert list(r.metrics) and r.labels().shape[1] == 1 and 0 < r.metrics["AP_level0"] <= 1


@pytest.mark.parametrize(
    "cfg", [TOY.replace(epochs=12), WHOLE.replace(epochs=3), QUEUE.replace(epochs=8)], ids=["frozen", "whole", "memory"]
)
def test_kill_9_at_random_moments(tmp_path, cfg):
    want = contents(toy_run(cfg, tmp_path / "whole"))
    rng, out = random.Random(0), tmp_path / "out.txt"
    for _ in range(5):
        read, write = os.pipe()
        p = child(slowly, cfg, tmp_path / "killed", write, out=out)
        os.close(write)
        for _ in range(rng.randint(1, 12)):
            os.read(read, 1)
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
    write = runs.write_atomic
    for stop in (*FILES, "history.csv", "environment.json", "per_query.safetensors"):

        def fails(path, data):
            if Path(path).name == stop:
                raise OSError(28, "No space left on device")
            return write(path, data)

        monkeypatch.setattr(runs, "write_atomic", fails)
        with pytest.raises(OSError, match="No space left"):
            toy_run(TOY, tmp_path / "full")
        assert not runs.is_finished(tmp_path / "full" / TOY.key())
    monkeypatch.setattr(runs, "write_atomic", write)
    assert contents(toy_run(TOY, tmp_path / "full")) == want


def _tell(cfg, store):
    make = runs._make_run

    def told(*args):
        print("making")
        make(*args)

    runs._make_run = told
    slowly(cfg, store, seconds=0.1)


def test_two_processes_ask_for_the_same_run(tmp_path):
    ended(*[child(_tell, TOY, tmp_path / "runs", out=tmp_path / f"{i}.txt") for i in range(2)])
    out = "".join((tmp_path / f"{i}.txt").read_text() for i in range(2))
    assert out.count("making") == 1 and out.count("waiting") == 1


def _die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def test_lock_of_a_dead_process_is_free(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(Trainer, "step", _die)
        p = child(toy_run, TOY, tmp_path)
    p.join()
    assert p.exitcode == -signal.SIGKILL and not runs.is_finished(tmp_path / TOY.key())
    toy_run(TOY, tmp_path)


def test_nan_stops_and_keeps(tmp_path):
    cfg = TOY.replace(loss="NaNAfterLoss", loss_args={"after": 8})
    with pytest.raises(Diverged, match=r"loss is nan at epoch \d, step \d") as e:
        toy_run(cfg, tmp_path, save_every=0)
    path = tmp_path / cfg.key()
    assert str(path) in str(e.value) and not runs.is_finished(path)
    assert len(pd.read_csv(path / "history.csv")) >= 1
    state = runs.load_state(path / "state.pt")
    assert all(v.isfinite().all() for v in state["net"].values() if v.is_floating_point())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(loss="HAPIERLoss"), "HAPPIERLoss"),
        (dict(loss_args={"lamb": 1}), "'lam'"),
        (dict(sampler="m_per_clas"), "m_per_class"),
        (dict(sampler_args={"mm": 1}), "'m'"),
        (dict(trunk="toi"), "toy"),
        (dict(dataset="toi"), "toy"),
        (dict(pooling="avgs"), "avg"),
        (dict(optimizer_args={"beta": 1}), "optimizer_args"),
        (dict(levels=[5]), "level 5"),
        (dict(batch_size=20000), "batch_size"),
        (dict(metrics=["H-APP"]), "H-AP"),
    ],
)
def test_unknown_names(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        toy_run(TOY.replace(**change), tmp_path)


def test_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*Choose another store"):
        toy_run(TOY, tmp_path / "file")


def _in_little_room(store, out):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    try:
        toy_run(TOY, store, save_every=0)
    except OSError as e:
        out.write_text(str(e))


def test_full_disk(tmp_path):
    "A limit on file size stands for a full disk: the error is clear, and with room the run is finished."
    toy_run(TOY.replace(epochs=0), tmp_path)  # features are there
    ended(child(_in_little_room, tmp_path, tmp_path / "error.txt"))
    assert "cannot write" in (text := (tmp_path / "error.txt").read_text()) and "state.pt" in text
    toy_run(TOY, tmp_path)


@pytest.mark.parametrize(
    "groups, message",
    [
        ({"loss.hgn": {"lr": 1.0}}, "loss has no piece 'hgn'.*Did you mean 'hgnn'"),
        ({"loss.": {}}, "loss has no piece ''"),
        ({"loss.hgnn.norms": {}, "loss.x": {}}, "no piece 'x'"),
        ({"lose.hgnn": {}}, "unknown part 'lose.hgnn'"),
        ({"loss.hgnn": {"lrs": 1}}, "no setting 'lrs'.*'lr'"),
        ({"loss.hgnn": {"lr": "1e-3"}}, "must be a valid number"),
        ({"head.norm": {}}, "head has no piece 'norm'.*Known: proj"),
        ({"trunk.net": {}}, "trunk has no piece 'net'.*Known: none"),
        ({"loss.distributions.means": {}}, "no piece 'distributions.means'"),
    ],
)
def test_bad_pieces(tmp_path, groups, message):
    with pytest.raises(ValueError, match=message):
        toy_run(PIECES.replace(groups=groups), tmp_path)
    assert not list(tmp_path.rglob("metrics.json"))


def test_a_misspelt_piece_fails_before_the_features(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "features_of", lambda *a, **k: pytest.fail("features were computed first"))
    with pytest.raises(ValueError, match="hgnn"):
        toy_run(PIECES.replace(groups={"loss.hgn": {}}), tmp_path)


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
    start = {
        k: v.clone()
        for k, v in build.build_trainer(cfg, build.read_data(cfg), T.make_accelerator("cpu"))[0].loss.named_parameters()
    }
    for piece in ("distributions", "hgnn"):
        other = {"distributions": "hgnn", "hgnn": "distributions"}[piece]
        found = toy_run(
            cfg.replace(groups={f"loss.{piece}": {"lr": 0.0}, f"loss.{other}": {"lr": 0.1}}), tmp_path
        ).weights()
        still = {k for k, v in start.items() if torch.equal(found[f"loss.{k}"], v)}
        assert still == {k for k in start if k.startswith(piece + ".")}


def test_pieces_resume_to_the_last_bit(tmp_path, monkeypatch):
    cfg = PIECES.replace(freeze="bn", augment={"flip": 0.5})
    whole = toy_run(cfg, tmp_path / "whole")
    step = Trainer.step
    dies_after(13, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        toy_run(cfg, tmp_path / "cut", save_every=0)
    assert runs.load_state(next((tmp_path / "cut").rglob("state.pt")))["epoch"] > cfg.warmup_epochs
    monkeypatch.setattr(Trainer, "step", step)
    again = toy_run(cfg, tmp_path / "cut")
    assert contents(again) == contents(whole)
    columns = [c for c in pd.read_csv(whole.path / "history.csv") if c != "seconds"]
    assert pd.read_csv(again.path / "history.csv")[columns].equals(pd.read_csv(whole.path / "history.csv")[columns])


@pytest.mark.parametrize(
    "cfg",
    [TOY, TOY.replace(pooling="gem"), WHOLE, QUEUE.replace(optimizer="sgd"), SLOTS.replace(micro_batch=4),
     TOY.replace(loss="MovingAPLoss")],
    ids=["frozen", "gem", "whole", "queue", "slots", "averages"],
)
def test_run_with_two_processes(tmp_path, cfg):
    cfg = cfg.replace(freeze="bn") if cfg.freeze == "none" else cfg  # batch statistics would be each process's own
    one = toy_run(cfg, tmp_path / "one")
    together(toy_run, cfg, tmp_path / "two")
    two = Result(tmp_path / "two" / cfg.key())
    assert two.environment["processes"] == 2
    torch.testing.assert_close(one.embeddings(), two.embeddings(), rtol=1e-3, atol=1e-4)
    assert two.metrics == pytest.approx(one.metrics, abs=1e-2)


@pytest.mark.parametrize(
    "cfg", [QUEUE, SLOTS, SLOTS.replace(micro_batch=5, epochs=3)], ids=["queue", "slots", "two-pass"]
)
@pytest.mark.parametrize("stop", [1, 7, 9])
def test_a_memory_resumes_to_the_last_bit(tmp_path, monkeypatch, cfg, stop):
    whole = toy_run(cfg, tmp_path / "whole")
    step = Trainer.step
    dies_after(stop, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        toy_run(cfg, tmp_path / "cut", save_every=0)
    state = runs.load_state(next((tmp_path / "cut").rglob("state.pt")))["memory"]
    assert len(state["emb"]) == (60 if cfg == QUEUE else 144) and int(state["count"]) > 0
    monkeypatch.setattr(Trainer, "step", step)
    assert contents(toy_run(cfg, tmp_path / "cut")) == contents(whole)


@pytest.mark.parametrize("change", [
    dict(loss="MovingAPLoss"), dict(loss="AntiCollapseLoss", loss_args={"base": "MovingAPLoss"}),
    dict(loss="SiMixLoss", loss_args={"base": "SupRecallLoss"}), dict(loss="MovingAPLoss", micro_batch=5)],
    ids=["averages", "averages inside", "random mixtures", "two passes"])
def test_a_loss_with_a_state_resumes_to_the_last_bit(tmp_path, monkeypatch, change):
    "Averages are kept for each training image; the mixtures of a step come from the run's own random numbers."
    cfg = TOY.replace(**change)
    whole = toy_run(cfg, tmp_path / "whole")
    step = Trainer.step
    dies_after(7, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        toy_run(cfg, tmp_path / "cut", save_every=0)
    state = runs.load_state(next((tmp_path / "cut").rglob("state.pt")))["loss"]
    averages = [v for k, v in state.items() if k.endswith("mean_all")]
    assert len(averages) == ("SiMix" not in cfg.loss)
    assert all(len(v) == 144 and bool(v.any()) for v in averages)
    monkeypatch.setattr(Trainer, "step", step)
    assert contents(toy_run(cfg, tmp_path / "cut")) == contents(whole)


def test_without_its_averages_a_run_goes_on_differently(tmp_path, monkeypatch):
    "The test above would see averages that are not in the checkpoint."
    cfg = TOY.replace(loss="MovingAPLoss")
    whole = toy_run(cfg, tmp_path / "whole")
    monkeypatch.setattr(LOSSES.get("MovingAPLoss"), "set_rows", lambda self, rows: None)
    assert contents(toy_run(cfg, tmp_path / "other")) != contents(whole)


def test_without_its_memory_a_run_goes_on_differently(tmp_path, monkeypatch):
    "The test above would see a memory that is not in the checkpoint."
    monkeypatch.setattr(T.CrossBatchMemory, "load_state_dict", lambda *a: None)
    with pytest.raises(AssertionError):
        test_a_memory_resumes_to_the_last_bit(tmp_path, monkeypatch, QUEUE, 7)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(loss="NormSoftmaxLoss"), "NormSoftmaxLoss does not look at references"),
        (dict(loss="NaNAfterLoss"), "NaNAfterLoss does not look at references"),
        (dict(memory={"size": 100, "unique": True}), "100 slots are too few for 144 training images"),
        (dict(loss="pml/ArcFaceLoss"), "compares a batch with itself only"),
    ],
)
def test_memory_that_makes_no_sense(tmp_path, change, message):
    if "pml/" in change.get("loss", ""):
        pytest.importorskip("pytorch_metric_learning")
    with pytest.raises(ValueError, match=message):
        toy_run(QUEUE.replace(**change), tmp_path)


def test_the_memory_changes_the_run_and_is_in_the_history(tmp_path):
    none, queue = toy_run(QUEUE.replace(memory={}), tmp_path), toy_run(QUEUE, tmp_path)
    assert "memory" in queue.history and "memory" not in none.history and contents(none) != contents(queue)
    assert toy_run(QUEUE.replace(micro_batch=5), tmp_path).history.loss.tolist() == pytest.approx(
        queue.history.loss.tolist(), rel=1e-3
    )


TRIPLET = TOY.replace(
    loss="pml/TripletMarginLoss",
    miner="pml/TripletMarginMiner",
    miner_args={"margin": 0.3, "type_of_triplets": "semihard"},
    epochs=2,
)


def test_a_miner_chooses_for_the_loss(tmp_path):
    miners, losses = (
        pytest.importorskip("pytorch_metric_learning.miners"),
        pytest.importorskip("pytorch_metric_learning.losses"),
    )
    cfg = TRIPLET.replace(optimizer="sgd", lr=0.5, schedule="constant", epochs=1)
    t, batches = build.build_trainer(cfg, build.read_data(cfg), T.make_accelerator("cpu"))
    own, _ = build.build_trainer(cfg, build.read_data(cfg), T.make_accelerator("cpu"))
    t.fit(batches)
    miner, loss = miners.TripletMarginMiner(margin=0.3, type_of_triplets="semihard"), losses.TripletMarginLoss()
    opt = torch.optim.SGD(own.net.parameters(), lr=0.5)
    for x, y, _ in batches.epoch(0):
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
    assert (
        one.history.memory.tolist() == pytest.approx(two.history.memory.tolist(), rel=1e-3)
        and (one.history.memory > 0).all()
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(loss="SupAPLoss"), "SupAPLoss compares all images of a batch"),
        (dict(miner="pml/MultiSimilartyMiner"), "MultiSimilarityMiner"),
        (dict(miner_args={"margn": 1}), "'margin'"),
        (dict(loss="pml/P2SGradLoss"), "P2SGradLoss does not take the pairs of pml/TripletMarginMiner"),
        (dict(loss="pml/TripletMarginLos"), "TripletMarginLoss"),
    ],
)
def test_miners_that_do_not_fit(tmp_path, monkeypatch, change, message):
    pytest.importorskip("pytorch_metric_learning")
    monkeypatch.setattr(build, "features_of", lambda *a, **k: pytest.fail("features were computed first"))
    with pytest.raises(ValueError, match=message):
        toy_run(TRIPLET.replace(**change), tmp_path)


@pytest.mark.parametrize("asked, level", [({}, 1), ({"level": 0}, 0)])
def test_a_miner_looks_at_the_level_of_the_loss(asked, level):
    pytest.importorskip("pytorch_metric_learning")
    cfg = TRIPLET.replace(loss_args={"level": 1}, miner_args={"margin": 9.0, **asked})
    y = torch.tensor([[0, 0], [1, 0], [2, 1], [3, 1]])  # alone at level 0, pairs at level 1
    found = build._make_miner(cfg)(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), y)
    assert build._make_miner(cfg).level == level and (len(found[0]) > 0) == (level == 1)


def test_a_miner_that_cannot_work_with_a_memory_is_named_at_once(tmp_path, monkeypatch):
    pytest.importorskip("pytorch_metric_learning")
    monkeypatch.setattr(build, "features_of", lambda *a, **k: pytest.fail("features were computed first"))
    cfg = TRIPLET.replace(miner="pml/BatchEasyHardMiner", miner_args={})
    with pytest.raises(ValueError, match="the image's own copy"):
        toy_run(cfg.replace(memory={"size": "train", "start_epoch": 1}), tmp_path)
    with pytest.raises(pytest.fail.Exception):
        toy_run(cfg, tmp_path)  # without a memory it is good


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
    # other queries in each draw: no value belongs to an image
    assert repeated.per_query() == {}


def test_values_of_single_queries_are_kept_and_their_means_are_the_metrics(tmp_path):
    parts = with_parts({"kind": "query-gallery"})
    for r, every in ((toy_run(TOY, tmp_path / "a"), True), (toy_run(TOY, tmp_path / "b", data=parts), False)):
        found, query = r.per_query(), torch.arange(len(parts[1])) % 3 == 0
        levels = ("_level0", "_level1")
        assert set(found) == {"H-AP", "near-miss", *(m + l for m in ("R@1", "AP", "mAP@R") for l in levels)}
        for name, v in found.items():
            assert v.dtype == np.float32 and v.shape == (len(r.labels()),)
            assert np.nanmean(v) == pytest.approx(r.metrics[name], abs=1e-6)
            assert every or np.isnan(v[~query.numpy()]).all()


def test_a_run_without_values_of_single_queries_says_how_to_get_them(tmp_path):
    r = toy_run(TOY, tmp_path)
    note = json.loads((r.path / "manifest.json").read_text())
    del note["files"]["per_query.safetensors"]
    (r.path / "manifest.json").write_text(json.dumps(note))
    (r.path / "per_query.safetensors").unlink()
    with pytest.raises(UserError, match="reproduce --force.*per_query=True"):
        toy_run(TOY, tmp_path).per_query()


def test_protocol_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'part' is 'test' in row 0"):
        toy_run(TOY.replace(protocol={"kind": "query-gallery"}), tmp_path)
    with pytest.raises(ValueError, match="levels=None"):
        toy_run(TOY.replace(levels=(0,), protocol={"kind": "dyml"}), tmp_path)
    monkeypatch.setattr(build, "features_of", lambda *a, **k: pytest.fail("features were computed first"))
    with pytest.raises(ValueError, match="'query-gallery'"):
        toy_run(TOY.replace(protocol={"kind": "query-galery"}), tmp_path)


def test_first_blocks_stand_still(tmp_path):
    cfg = TOY.replace(
        trunk="timm/resnet18",
        pretrained=False,
        freeze="bn",
        freeze_blocks=2,
        epochs=1,
        batch_size=16,
        loss="SmoothAPLoss",
        dataset_args={"hues": 4, "each": 4},
    )
    start = {k: v.clone() for k, v in build.build_trunk(cfg).state_dict().items()}
    after = {k.removeprefix("trunk."): v for k, v in toy_run(cfg, tmp_path).weights().items() if k.startswith("trunk.")}
    moved = {k for k in start if not torch.equal(start[k], after[k])}
    assert moved and all("layer3" in k or "layer4" in k for k in moved)
    moved_all = toy_run(cfg.replace(freeze_blocks=0), tmp_path).weights()
    assert any(not torch.equal(moved_all[f"trunk.{k}"], start[k]) for k in start if "layer1" in k)
    with pytest.raises(ValueError, match="freeze_blocks=9"):
        toy_run(cfg.replace(freeze_blocks=9), tmp_path)


@pytest.mark.parametrize("freeze", ["trunk", "bn"])
def test_whitening_makes_the_start_white(tmp_path, monkeypatch, freeze):
    cfg = TOY.replace(
        init="whitening",
        norm=None,
        embed_dim=4,
        freeze=freeze,
        epochs=0,
        normalise=False,
        loss="HISTLoss",
        loss_args={"hidden": 4},
    )
    train = config.load_splits(cfg)[0]
    t, batches = build.build_trainer(cfg, build.read_data(cfg), T.make_accelerator("cpu"))
    x = build.features_of(TOY, train)
    z = t.net.head.proj(t.net.head.norm(x))
    torch.testing.assert_close(torch.cov(z.T), torch.eye(4), atol=2e-2, rtol=0)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    assert t.net.head.proj.weight.requires_grad
    assert contents(toy_run(cfg, tmp_path / "a")) == contents(toy_run(cfg, tmp_path / "b"))
    result = toy_run(cfg, tmp_path / "a")
    torch.testing.assert_close(result.model().head.proj.weight, t.net.head.proj.weight.detach())


def test_whitening_looks_at_some_images_only():
    assert build._some_rows(7).tolist() == list(range(7))
    many = build._some_rows(20000)
    assert len(many) == 5000 and bool((many.diff() > 0).all()) and torch.equal(many, build._some_rows(20000))


def test_checkpoints_of_a_large_network_leave_time_to_train(tmp_path, monkeypatch):
    "A checkpoint that takes 10 s is written every 200 s, not every 30."
    now, saved = [0.0], []
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runs, "save_state", lambda *a, **k: (saved.append(now[0]), now.__setitem__(0, now[0] + 10.0)))
    trainer = SimpleNamespace(state_dict=dict)
    keep = runs._Checkpoints(tmp_path, 30.0, True)
    while now[0] < 500:
        now[0] += 1
        keep(trainer)
    assert saved == [30.0, 240.0, 450.0]
    saved.clear()
    keep = runs._Checkpoints(tmp_path, 0, True)
    for _ in range(3):
        keep(trainer)
    # 0: after each step
    assert len(saved) == 3


def test_a_trained_network_needs_nothing_but_its_run(tmp_path):
    "The ImageNet weights that it started from may be gone, and the network too."
    cfg = TOY.replace(freeze="bn", pretrained=str(tmp_path / "trunk.pth"), epochs=1)
    torch.save(build.build_net(cfg.replace(pretrained=False)).trunk.net.state_dict(), tmp_path / "trunk.pth")
    result = toy_run(cfg, tmp_path / "runs")
    (tmp_path / "trunk.pth").unlink()
    from hapnb.models import test_transform as plain

    net, part = result.model(), result.dataset()
    torch.testing.assert_close(build.embed(net, part, plain(net, 32)), result.embeddings(), rtol=0, atol=1e-6)
