"Plans: as many steps, parameters and bytes as a real run has; published counts where there are no images."
import pytest
import torch

import hapnb.cost as C
import hapnb.plan as P
from hapnb.benchmarks import source_of
from hapnb.cost import LiveBytes, activation_bytes, batch_that_fits, optimizer_bytes, saved_bytes
from hapnb.plan import class_table, plan, published, steps_from_counts
from hapnb.recipes import RECIPES, recipe
from hapnb.samplers import make_sampler
from hapnb.config import RunConfig, load_splits
from hapnb.build import build_net, build_trainer, read_data
from hapnb.runs import run
from hapnb.train import make_accelerator

TOY = RunConfig(dataset="toy", trunk="toy", freeze="bn", image_size=32, batch_size=24, embed_dim=16, epochs=3,
                ks=(1, 2))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HAPNB_CACHE", str(tmp_path_factory.getbasetemp() / "features"))


def state_bytes(opt): return sum(t.nbytes for s in opt.state.values() for t in s.values() if torch.is_tensor(t))


# ---- against real runs

@pytest.mark.parametrize("changes", [
    {}, {"freeze": "none"}, {"bn_affine": False}, {"freeze": "trunk"}, {"loss": "SmoothAPLoss"},
    {"loss": "HISTLoss", "loss_args": {"hidden": 8}, "sampler": "random", "sampler_args": {}},
    {"optimizer": "sgd", "optimizer_args": {"momentum": 0.9}}, {"optimizer": "sgd"},
    {"optimizer": "adamw", "groups": {"head": {"lr": 1e-2}, "loss": {"lr": 1.0}}},
    {"sampler": "hierarchical", "sampler_args": {"m": 4, "batches_per_pair": 2}}, {"micro_batch": 8},
    {"loss": "ROADMAPLoss", "memory": {"size": "train"}}, {"levels": (0,)}, {"split": "val", "batch_size": 12},
    {"trunk": "tf_efficientnet_lite0", "freeze": "blocks", "freeze_blocks": 6, "pretrained": False}])
def test_as_a_real_run(changes, tmp_path):
    cfg = TOY.replace(**{"epochs": 2, **changes})
    p, steps = plan(cfg, device="cpu", probe=1), []
    trainer, batches = build_trainer(cfg, read_data(cfg), make_accelerator("cpu"))
    trainer.fit(batches, after_step=lambda t: steps.append(1))
    assert p.steps == len(steps) and p.exact and p.source == "data"
    assert p.memory["optimiser"][0] == state_bytes(trainer.opt)
    assert p.memory["gradients"][0] == sum(q.nbytes for q in trainer.params)
    assert sum(v["trained"] for v in p.parameters.values()) == sum(q.numel() for q in trainer.params)
    assert p.parameters["loss"]["all"] == sum(q.numel() for q in trainer.loss.parameters())
    assert p.parameters["head"]["all"] == sum(q.numel() for q in trainer.net.head.parameters())
    assert p.memory["weights"][0] == sum(t.nbytes for m in (trainer.net, trainer.loss)
                                         for t in (*m.parameters(), *m.buffers()))
    if cfg.memory:
        held = trainer.memory
        assert p.memory["memory of embeddings"][0] == held.emb.nbytes + held.labels.nbytes
    assert p.seconds_total > 0 and all(v > 0 for v in p.seconds.values())


def test_groups_are_those_of_a_run():
    cfg = TOY.replace(loss="HISTLoss", loss_args={"hidden": 8},
                      groups={"loss.hgnn": {"lr": 1.0}, "head": {"weight_decay": 0.1}})
    data = load_splits(cfg)
    real = build_trainer(cfg, read_data(cfg, data), make_accelerator("cpu"))[0]
    mine = C._parts(cfg, data[0].labels, make_accelerator("cpu"))[0]
    show = lambda t: [(g["name"], g["lr"], g["weight_decay"], sum(p.numel() for p in g["params"]))
                      for g in t.opt.param_groups]
    assert show(real) == show(mine) and type(real.opt) is type(mine.opt)


def test_the_whole_memory_of_a_step():
    "Everything that is alive in a real step, against the sum of the plan."
    cfg = TOY.replace(freeze="none", batch_size=72, image_size=64)
    p = plan(cfg, device="cpu", probe=0)
    trainer, batches = build_trainer(cfg, read_data(cfg), make_accelerator("cpu"))
    trainer.begin_epoch()
    x, labels, _ = next(batches.epoch(0))
    with LiveBytes() as live: trainer.step(x, labels)
    planned = p.total_bytes - p.memory["weights"][0]  # they were there before, and so were the images
    assert planned == pytest.approx(live.peak + x.nbytes, rel=0.25)


def test_a_run_takes_about_so_long(tmp_path):
    "Only the order of magnitude: other programs run too."
    p = plan(TOY, device="cpu")
    result = run(TOY, tmp_path, device="cpu", progress=False, workers=0)
    assert 0.05 < (p.steps * (p.seconds_step + p.seconds["load"] * TOY.batch_size)) / result.history.seconds.sum() < 20


def test_nothing_random_is_left_behind():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    plan(TOY, device="cpu", probe=1)
    assert torch.equal(before, torch.get_rng_state())


# ---- measuring

@pytest.mark.parametrize("trunk, freeze", [("toy", "none"), ("resnet34", "bn"), ("deit_small", "none")])
def test_activations_from_shapes_are_those_of_a_forward_pass(trunk, freeze):
    side = 224 if trunk == "deit_small" else 64
    net = build_net(TOY.replace(trunk=trunk, pretrained=False, freeze=freeze, image_size=side)).train()
    shape = (3, 3, side, side)
    # without values the head takes the path for rows of any length, which keeps the embeddings once less
    apart = activation_bytes(net, shape) - saved_bytes(net, torch.randn(*shape))
    assert abs(apart) <= 4 * shape[0] * net.head.out_features
    assert activation_bytes(net, shape) > 1000
    assert all(p.grad is None and type(p) is torch.nn.Parameter for p in net.parameters())  # the network is untouched


def test_activations_of_a_batch_that_would_fill_any_memory():
    net = build_net(TOY.replace(trunk="resnet34", pretrained=False)).train()
    one, many = (activation_bytes(net, (n, 3, 224, 224)) for n in (1, 100_000))
    assert 1e12 < many == pytest.approx(100_000 * one, rel=1e-3)


def test_frozen_blocks_save_memory():
    small, full = (plan(TOY.replace(trunk="resnet34", pretrained=False, freeze_blocks=n), device="cpu", probe=0)
                   for n in (2, 0))
    assert small.memory["activations"][0] < 0.7 * full.memory["activations"][0]
    assert small.parameters["trunk"]["trained"] < full.parameters["trunk"]["trained"]


def test_live_bytes_sees_the_backward_pass():
    w = torch.randn(500, 500, requires_grad=True)
    w.grad = torch.zeros_like(w)
    with LiveBytes() as live: (w * 2).exp().sum().backward()
    assert 2e6 <= live.peak <= 5e6 and live.now < 1e4  # exp(2w) and the gradients on the way


@pytest.mark.parametrize("loss", ["ROADMAPLoss", "PairLoss", "SmoothAPLoss"])
def test_against_a_memory_it_is_a_line(loss):
    "Two small batches against the memory predict the whole batch, measured."
    trainer = C._parts(TOY.replace(loss=loss), labels := class_table((400, 12)), make_accelerator("cpu"))[0]
    batch = labels[torch.arange(96) // 4]
    guess, _ = C._against_memory(trainer, batch, labels, 4000, 0)
    torch.manual_seed(0)
    assert guess == pytest.approx(C._peak(C._loss_step(trainer, batch, C._full_memory(trainer, labels, 4000))), rel=0.1)


def test_what_ran_before_does_not_count():
    "The rank engine keeps memory between calls: a probe finds the same peak after a large loss as after a small one."
    trainer = C._parts(TOY.replace(loss="ROADMAPLoss"), labels := class_table((400, 12)), make_accelerator("cpu"))[0]
    peaks = []
    for n in (8, 384):
        C._loss_step(trainer, labels[torch.arange(n) // 4])()
        torch.manual_seed(0)
        peaks.append(C._peak(C._loss_step(trainer, labels[torch.arange(192) // 4])))
    assert peaks[0] == peaks[1]


def test_a_full_gpu(monkeypatch):
    def f(b):
        if b > 5: raise torch.OutOfMemoryError("CUDA out of memory")
    assert batch_that_fits(f, 100, torch.device("cpu")) == 4
    monkeypatch.setattr(P, "_capacity", lambda device: 1000)
    p = plan(TOY, device="cpu", probe=0)
    assert any("micro_batch" in n for n in p.notes) and "note: cpu has 1.0 kB" in str(p)
    monkeypatch.setattr(C, "batch_that_fits", lambda *a, **k: 0)
    with pytest.raises(RuntimeError, match="not even 2 images"): plan(TOY, device="cpu")


# ---- without images

@pytest.mark.parametrize("sampler, args",
                         [("random", {}), ("balanced", {"m": 4}), ("balanced", {"m": 4, "batches": 7}),
                          ("m_per_class", {"m": 4}), ("hierarchical", {"m": 2}),
                          ("hierarchical", {"m": 2, "super_level": 1, "batches_per_pair": 3})])
def test_steps_from_counts(sampler, args):
    cfg = TOY.replace(sampler=sampler, sampler_args=args)
    train = load_splits(cfg)[0]
    steps, exact = steps_from_counts(cfg, dict(train=dict(images=len(train), classes=(18, 3))))
    real = len(make_sampler(sampler, train.labels, cfg.batch_size, **args))
    assert (steps == real if exact else steps >= real) and exact == (sampler != "m_per_class")


def test_what_counts_do_not_decide():
    c = TOY.replace(sampler="hierarchical", sampler_args={"m": 4, "super_level": 1})
    assert steps_from_counts(c, dict(train=dict(images=100, classes=(18,))))[0] is None
    assert steps_from_counts(c.replace(sampler_args={"m": 4, "small": "skip"}),
                             dict(train=dict(images=100, classes=(18, 3))))[0] is None
    assert steps_from_counts(TOY, {})[0] is None


@pytest.mark.parametrize("name, images, classes, test, steps", [
    ("happier/sop", 59_551, (11_318, 12), 60_502, 330), ("roadmap/sop-resnet50", 59_551, (11_318, 12), 60_502, 660),
    ("hist/cub-resnet50", 5_864, (100,), 5_924, 183), ("happier/inat-base", 325_846, (5_690, 13), None, 1_272),
    ("smoothap/vehicleid", 113_346, (13_164,), 6_493, 295), ("hist/cars-resnet50", 8_054, (98,), 8_131, 251)])
def test_published_counts_decide(name, images, classes, test, steps):
    cfg = recipe(name).config(trunk="toy", pretrained=False, image_size=32, augment={}, embed_dim=16)
    p = plan(cfg, device="cpu", probe=0)
    assert p.source == "published" and p.counts["train"] == dict(images=images, classes=classes)
    assert p.counts.get("test", {}).get("images") == test
    assert p.steps_epoch == steps and p.steps == steps * cfg.epochs and p.exact == (cfg.sampler != "m_per_class")
    assert "cannot be loaded, so published counts are used" in str(p) and ("at most" in str(p)) == (not p.exact)


@pytest.mark.parametrize("name", [n for n in RECIPES if not n.endswith("/emoji")])
def test_every_recipe_has_a_plan(name):
    # the classes of these sets are dealt by their names, which are known once the data is there
    ours = name.startswith("network/")
    # a toy has no blocks
    p = plan(recipe(name).config(trunk="toy", trunk_args={}, freeze_blocks=0, pretrained=False, image_size=32,
                                 augment={}, embed_dim=16), device="cpu", probe=0)
    assert p.source == ("unknown" if ours else "published") and p._repr_markdown_()
    if ours: assert "number of steps is not known" in str(p)
    else: assert "loss" in p.parameters and p.memory["loss"][0] > 0


def test_a_real_trunk_without_images():
    p = plan(recipe("hist/cub-resnet50").config(batch_size=4, image_size=64), device="cpu", probe=1)
    assert p.parameters["trunk"] == dict(all=23_508_032, trained=23_454_912)
    assert p.parameters["head"]["all"] == 1_049_088
    assert p.seconds_total > 0 and p.evaluations == 42 and "42 times" in str(p) and "reading, decoding" in str(p)


def test_neither_images_nor_counts():
    p = plan(TOY.replace(dataset="folder"), device="cpu", probe=1)
    assert (p.source, p.steps, p.seconds_total) == ("unknown", None, None) and "loss" not in p.parameters
    assert "number of steps is not known" in str(p) and "data_dir is missing" in str(p)
    assert "not known without the classes" in str(p)


def test_published_sees_the_split_and_the_levels():
    assert published(RunConfig(dataset="sop", levels=(1,)))["train"]["classes"] == (12,)
    large = published(RunConfig(dataset="vehicleid", dataset_args={"size": "large"}))["test"]["images"]
    assert large == source_of("vehicleid").counts["test large"]["images"]
    assert published(RunConfig(dataset="sop", split="val")) == {} and published(RunConfig(dataset="emoji")) == {}


def test_fp16_on_a_cpu_is_said():
    p = plan(TOY.replace(precision="fp16"), device="cpu", probe=1)
    assert any("needs a GPU" in n for n in p.notes) and "in bf16" in p.memory["activations"][1]
    assert "weights in 2 bytes" in p.memory
    assert p.memory["activations"][0] < plan(TOY, device="cpu", probe=0).memory["activations"][0]


@pytest.mark.parametrize("changes, text",
                         [({"dataset": "soop"}, "Did you mean 'sop'"), ({"loss_args": {"tua": 1}}, "tua"),
                          ({"loss": "HAPIERLoss"}, "HAPPIERLoss"), ({"batch_size": 1000}, "batch_size=1000"),
                                           ({"trunk": "resnet5O"}, "resnet50"),
                          ({"freeze": "none", "micro_batch": 4}, "BatchNorm"),
                          ({"groups": {"loss.hgn": {"lr": 1.0}}}, "hgn"), ({"levels": (5,)}, "level 5")])
def test_what_a_run_refuses(changes, text):
    with pytest.raises(ValueError, match=text): plan(TOY.replace(**changes), device="cpu", probe=0)


def test_markdown_has_the_settings():
    text = plan(TOY, device="cpu", probe=0)._repr_markdown_()
    assert "| batch_size | `24` |" in text and "| seed |" not in text and "\n- activations:" in text
    assert "time: not measured" in text
