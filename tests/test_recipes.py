"Recipes: published values as typed here from their sources, valid configs, losses that build, and small rehearsals of the training."
import json

import pandas as pd
import pytest
import torch
from torch import nn

import hapnb.train as T
from hapnb import cli
from hapnb.models import test_transform as final_transform, train_transform
from hapnb.recipes import RECIPES, SOURCES, recipe, recipes_table
from hapnb.train import RunConfig, build_trainer, load_splits, make_accelerator, make_loss_for, thaw

# optimiser, lr, distributions, hypergraph network, weight decay, step, epochs after warm-up, tau, alpha, lambda_s
VALUES = {
    "hist/cub-resnet50": ("adam", 1.2e-4, 1e-1, 5 * 1.2e-4, 5e-5, 5, 40, 32, 1.1, 1), "hist/cars-resnet50": ("adam", 1e-4, 1e-1, 10 * 1e-4, 1e-4, 10, 50, 32, 0.9, 1),
    "hist/sop-resnet50": ("adam", 1e-4, 1e-2, 10 * 1e-4, 1e-4, 10, 60, 16, 2, 1), "hist/cub-bninception": ("adam", 1.2e-4, 1e-1, 6e-4, 5e-5, 5, 40, 16, 1.0, 1),
    "hist/cars-bninception": ("adam", 1e-4, 1e-1, 1e-3, 1e-4, 10, 50, 24, 0.9, 1), "hist/sop-bninception": ("adam", 1e-4, 1e-2, 1e-3, 1e-4, 10, 60, 16, 1.6, 1),
    "rehist/cub-resnet50-tuned": ("adam", 1.2e-4, 1e-1, 6e-4, 5e-5, 5, 40, 24, 1.15, 1), "rehist/cars-resnet50-tuned": ("adam", 1e-4, 1e-1, 1e-3, 1e-4, 10, 50, 32, 0.9, 0.8),
    "rehist/sop-resnet50-tuned": ("adam", 1e-4, 1e-2, 1e-3, 1e-4, 10, 60, 20, 2.1, 0.5), "rehist/cub-bninception-tuned": ("adamw", 1e-4, 5e-2, 5e-4, 1e-4, 5, 60, 20, 0.95, 1.2),
    "rehist/cars-bninception-tuned": ("adamw", 1e-4, 1e-1, 5e-4, 5e-5, 10, 60, 22, 0.9, 1.5), "rehist/sop-bninception-tuned": ("adamw", 1e-4, 1e-2, 1e-3, 1e-4, 10, 60, 12, 1.55, 1.5)}
TOY = dict(dataset="toy", trunk="toy", image_size=32, embed_dim=16, ks=(1, 2), loss_args={"hidden": 16})


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch): monkeypatch.setenv("HAPNB_CACHE", str(tmp_path_factory.getbasetemp() / "features"))


@pytest.fixture
def call(capsys):
    def call(*argv):
        status = cli.main([str(a) for a in argv])
        return (status, *capsys.readouterr())
    return call


# ---- the values

def test_all_are_here(): assert set(RECIPES) == set(VALUES) | {"hist/emoji"}


@pytest.mark.parametrize("name", VALUES)
def test_published_values(name):
    c = recipe(name).config()
    lr = {k: g["lr"] for k, g in c.groups.items()}
    assert set(lr) == {"trunk", "head", "loss.distributions", "loss.hgnn"} and lr["trunk"] == lr["head"] == c.lr
    found = (c.optimizer, c.lr, lr["loss.distributions"], lr["loss.hgnn"], c.weight_decay, c.schedule_args["size"], c.epochs - c.warmup_epochs,
             *(c.loss_args[k] for k in ("tau", "alpha", "lambda_s")))
    assert found[0] == VALUES[name][0] and found[1:] == pytest.approx(VALUES[name][1:], rel=1e-12)
    data, trunk = name.split("/")[1].removesuffix("-tuned").split("-")
    assert (c.dataset, c.trunk, c.pretrained) == (data, {"resnet50": "resnet50", "bninception": "bn_inception"}[trunk], True)
    assert (c.pooling, c.norm, c.init, c.normalise, c.embed_dim, c.image_size) == ("avg+max", "after", "kaiming", False, 512, 224)
    assert (c.loss, c.loss_args["hidden"], c.loss_args["layers"], c.sampler, c.batch_size) == ("HISTLoss", 512, 2, "random", 32)
    assert (c.warmup_epochs, c.schedule, c.schedule_args["gamma"], c.eval_every) == (1, "step", 0.5, 1)
    assert (c.ks, c.freeze) == (((1, 10, 100, 1000), "none") if data == "sop" else ((1, 2, 4, 8, 16, 32), "bn"))
    assert data == "sop" or c.bn_affine is False
    assert c.trunk_args.get("bn_momentum") == (0.9 if trunk == "bninception" else None)


def leaves(v, path=""):
    return {p for k, x in v.items() for p in leaves(x, f"{path}/{k}")} if isinstance(v, dict) and v else {path[1:]}


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_has_a_source(name):
    r = RECIPES[name]
    assert leaves(r.fields) == set(r.sources) and set(r.sources.values()) <= set(SOURCES)
    assert set(r.fields) <= set(RunConfig().to_dict())
    assert json.loads(json.dumps(r.fields)) == thaw(T.freeze_value(r.fields))  # plain values


def test_what_is_unknown_is_marked():
    for name, r in RECIPES.items():
        ours = {p for p, s in r.sources.items() if s == "our choice"}
        if name.startswith("hist/") and name.endswith("bninception"):
            assert ours == {"optimizer", "lr", "weight_decay", "epochs", "schedule_args/size"} | {f"groups/{g}/lr" for g in ("trunk", "head", "loss.distributions", "loss.hgnn")}
            assert "Unknown for BN-Inception" in r.notes
        elif name != "hist/emoji": assert not ours
    assert all("0.9 in Table 2 and as 1.0 in Table 8" in RECIPES[n].notes for n in ("hist/cars-bninception", "rehist/cars-bninception-tuned"))
    assert "illegible" in RECIPES["rehist/cars-resnet50-tuned"].notes and "lambda_s out" in RECIPES["rehist/sop-resnet50-tuned"].notes
    assert all("on the test images" in r.notes for n, r in RECIPES.items() if n in VALUES)
    assert all(("bn_affine=True" in r.notes) == (r.fields.get("freeze") == "bn") for r in RECIPES.values())


@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_builds(name):
    cfg = recipe(name).config()
    loss = make_loss_for(cfg, torch.arange(100)[:, None], cfg.embed_dim)
    emb = nn.functional.layer_norm(torch.randn(32, cfg.embed_dim, generator=torch.Generator().manual_seed(0)), (cfg.embed_dim,)).requires_grad_()
    loss(emb, torch.arange(32)[:, None] // 2).backward()
    assert emb.grad.abs().max() > 0 and all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())
    groups = T.param_groups(dict(loss=loss), cfg.lr, cfg.weight_decay, thaw(cfg.groups))
    assert {g["name"] for g in groups} == {"loss.distributions", "loss.hgnn"} and {g["weight_decay"] for g in groups} == {cfg.weight_decay}


@pytest.mark.parametrize("name", VALUES)
def test_transforms_are_those_of_the_loader(name):
    cfg = recipe(name).config()
    train, test = train_transform(cfg.trunk, cfg.image_size, **thaw(cfg.augment)), final_transform(cfg.trunk, cfg.image_size, **thaw(cfg.transform))
    from torchvision.transforms import v2
    crop, flip = train.transforms[:2]
    plain = v2.RandomResizedCrop(224)
    assert type(crop) is type(plain) and all(tuple(getattr(crop, k)) == tuple(getattr(plain, k)) for k in ("size", "scale", "ratio"))
    assert crop.interpolation == v2.InterpolationMode(plain.interpolation) == v2.InterpolationMode.BILINEAR and crop.antialias == plain.antialias
    assert isinstance(flip, v2.RandomHorizontalFlip) and flip.p == 0.5
    assert [type(t) for t in test.transforms[:2]] == [v2.Resize, v2.CenterCrop] and (list(test.transforms[0].size), tuple(test.transforms[1].size)) == ([256], (224, 224))


# ---- rehearsals

def by_torch(cfg):
    "Learning rates of each epoch from torch's own StepLR, which is not stepped after the epochs of warm-up."
    params = {k: nn.Parameter(torch.zeros(1)) for k in cfg.groups}
    opt = torch.optim.SGD([dict(params=[p], lr=cfg.groups[k]["lr"]) for k, p in params.items()], lr=1.0)
    plan, out = torch.optim.lr_scheduler.StepLR(opt, cfg.schedule_args["size"], cfg.schedule_args["gamma"]), []
    for e in range(cfg.epochs):
        out.append({f"lr_{k}": g["lr"] for k, g in zip(params, opt.param_groups)})
        opt.step()
        if e >= cfg.warmup_epochs: plan.step()
    return pd.DataFrame(out)


@pytest.mark.parametrize("name", VALUES)
def test_rehearsal(name):
    """Warm-up moves what is new and leaves the trunk's weights; then all moves. BatchNorm: nothing of it moves on CUB and Cars, all of it on SOP."""
    cfg = recipe(name).config(**TOY, epochs=4, schedule_args={"size": 2})
    trainer, batches = build_trainer(cfg, load_splits(cfg)[0], make_accelerator("cpu"))
    norm = next(m for m in trainer.net.trunk.modules() if isinstance(m, nn.BatchNorm2d))
    parts = {"trunk": [p for p in trainer.net.trunk.parameters() if p is not norm.weight and p is not norm.bias], "norm": [norm.weight, norm.bias],
             "running": [norm.running_mean, norm.running_var], "head": [*trainer.net.head.parameters()],
             "means": [trainer.loss.distributions.means], "log_vars": [trainer.loss.distributions.log_vars], "hgnn": [*trainer.loss.hgnn.parameters()]}
    kept, moved = {k: [p.detach().clone() for p in ps] for k, ps in parts.items()}, []
    def look(trainer, row):
        moved.append({k for k, ps in parts.items() if not all(torch.equal(p, q) for p, q in zip(ps, kept[k]))})
        kept.update({k: [p.detach().clone() for p in ps] for k, ps in parts.items()})
    trainer.fit(batches, after_epoch=look)
    new = {"head", "means", "log_vars", "hgnn"}
    first, later = ({"running"}, {"running", "norm", "trunk"}) if cfg.freeze == "none" else (set(), {"trunk"})
    assert moved == [new | first] + [new | later] * 3
    history, want = pd.DataFrame(trainer.history), by_torch(cfg)
    for c in want: assert history[c].tolist() == pytest.approx(want[c].tolist(), rel=1e-12), c
    assert "lr_loss" not in history and history.loss.iloc[-1] < history.loss.iloc[0]


@pytest.mark.parametrize("name", ["hist/cub-resnet50", "hist/sop-bninception", "rehist/cub-bninception-tuned"])
def test_a_whole_run(name, tmp_path):
    cfg = recipe(name).config(**TOY, epochs=2)
    result = T.run(cfg, tmp_path, device="cpu", progress=False, workers=0)
    history = pd.read_csv(result.path / "history.csv")
    assert {"R@1_level0", "mAP@R_level0", "distribution", "hypergraph", "lr_loss.hgnn"} <= set(history) and len(history) == 2
    assert 0 < result.metrics["R@1_level0"] <= result.metrics["R@2_level0"] <= 1 and "H-AP" not in result.metrics


def test_the_real_networks_build():
    """Trunk, head and groups of the published networks, with random weights: what is frozen is in no group."""
    for name, frozen in (("hist/cub-resnet50", True), ("hist/sop-bninception", False)):
        cfg = recipe(name).config(pretrained=False)
        net = T.build_net(cfg)
        groups = T.param_groups(dict(trunk=net.trunk, head=net.head), cfg.lr, cfg.weight_decay, {k: thaw(v) for k, v in cfg.groups.items() if "." not in k})
        norms = [m for m in net.trunk.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        grouped = {id(p) for g in groups for p in g["params"]}
        assert norms and all((id(m.weight) in grouped, id(m.bias) in grouped, m.training) == (not frozen, not frozen, not frozen) for m in norms)
        assert all(m.momentum == (0.1 if frozen else 0.9) for m in norms)
        assert net.head.proj.out_features == 512 and net.head.proj.bias.abs().max() == 0


# ---- Recipe

def test_config_merges_and_drops():
    r = recipe("hist/sop-bninception")
    assert r.config().to_dict() == RunConfig.from_dict(r.fields).to_dict()
    c = r.config(loss_args={"alpha": 1.0}, groups={"head": {"lr": 1.0}}, batch_size=8)
    assert c.loss_args == {**r.fields["loss_args"], "alpha": 1.0} and c.groups == {**r.fields["groups"], "head": {"lr": 1.0}} and c.batch_size == 8
    other = r.config(loss="NormSoftmaxLoss", trunk="resnet50", sampler="balanced", schedule="cosine")
    assert (other.loss_args, other.trunk_args, other.sampler_args, other.schedule_args, set(other.groups)) == ({}, {}, {}, {}, {"trunk", "head"})
    assert r.config(loss="HISTLoss", schedule="step") == r.config()  # the same again drops nothing
    assert r.config(sampler="balanced", sampler_args={"m": 2}).sampler_args == {"m": 2}
    assert {k: g["lr"] for k, g in r.config(lr=1e-3).groups.items()} == {"trunk": 1e-3, "head": 1e-3, "loss.distributions": 0.01, "loss.hgnn": 1e-3}
    assert r.config(freeze="trunk").augment == {}
    assert recipe("hist/emoji").config(lr=0.5, epochs=3).groups == recipe("hist/emoji").fields["groups"]
    for bad, words in ((dict(batchsize=3), "batch_size"), (dict(lr="1e-4"), "must be"), (dict(groups={"los": {}}), "unknown part 'los'")):
        with pytest.raises(ValueError, match=words): r.config(**bad)
    assert recipe("hist/sop-bninception") == r  # nothing leaked into the list


def test_a_recipe_is_a_copy():
    r = recipe("hist/cub-resnet50")
    r.fields["loss_args"]["tau"] = 1.0
    assert recipe("hist/cub-resnet50").fields["loss_args"]["tau"] == 32.0
    with pytest.raises(AttributeError): r.name = "x"


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown recipe 'hist/cub-resnet5'.*Did you mean 'hist/cub-resnet50'"): recipe("hist/cub-resnet5")
    with pytest.raises(ValueError, match="no recipe begins with 'x'"): recipes_table("x")


@pytest.mark.parametrize("name", RECIPES)
def test_markdown_shows_value_and_source_of_each_path(name):
    r, text = recipe(name), recipe(name)._repr_markdown_()
    rows = {tuple(w.strip() for w in line.split("|")[1:-1]) for line in text.splitlines() if line.startswith("| ")}
    for path, source in r.sources.items(): assert any(a == path.replace("/", " / ") and v and s == source for a, v, s in rows), path
    assert r.notes in text and all(SOURCES[s] in text for s in set(r.sources.values()))


def test_table():
    t = recipes_table()
    assert list(t.index) == list(RECIPES) and len(recipes_table("rehist")) == 6
    assert t.loc["hist/sop-resnet50", "freeze"] == "none" and t.loc["rehist/sop-bninception-tuned", "alpha"] == 1.55
    assert t.loc["hist/cub-resnet50", "our choice"] == "" and "lr hgnn" in t.loc["hist/cub-bninception", "our choice"]


# ---- the command

def test_dry_run(tmp_path, call, monkeypatch):
    monkeypatch.setattr(T, "run", lambda *a, **k: pytest.fail("it trained"))
    store = tmp_path / "runs"
    status, out, _ = call("train", "--recipe", "hist/cub-resnet50", "--dry-run", "--store", store, "--seed", 3, "--loss-args", '{"alpha": 0.5}')
    fields = {line.split(" = ")[0].strip(): line.split(" = ")[1].rsplit("  (", 1) for line in out.splitlines() if line.startswith("  ")}
    cfg = RunConfig.from_dict({k: json.loads(v) for k, (v, _) in fields.items()})
    assert status == 0 and cfg == recipe("hist/cub-resnet50").config(seed=3, loss_args={"alpha": 0.5})
    assert (fields["seed"][1], fields["loss_args"][1], fields["epochs"][1], fields["precision"][1]) == ("given)", "given)", "recipe)", "default)")
    assert "trunk resnet50: 23,508,032 parameters, 23,454,912 of them learn" in out and "head: 1,049,088 parameters" in out
    assert "data cub: cannot be loaded" in out and not store.exists()


def test_dry_run_counts_steps(call):
    status, out, _ = call("train", "--recipe", "hist/sop-resnet50", "--dry-run", "--dataset", "toy", "--trunk", "toy", "--image-size", 32, "--embed-dim", 8, "--epochs", 3)
    train, test = load_splits(RunConfig(dataset="toy"))
    assert status == 0 and f"{len(train)} images of {len(train.labels[:, 0].unique())} classes" in out and f"{len(train) // 32} steps an epoch, {3 * (len(train) // 32)} in all" in out
    assert "nothing was trained" in out and "loss HISTLoss" in out
    status, out, _ = call("train", "--dry-run", "--dataset", "toy", "--trunk", "toy", "--image-size", 32, "--batch-size", 24)
    assert status == 0 and "  lr = 0.001  (default)" in out and "6 steps an epoch" in out  # also without a recipe


def test_train_with_a_recipe(tmp_path, call):
    argv = ["--recipe", "hist/cub-resnet50", "--dataset", "toy", "--trunk", "toy", "--image-size", 32, "--embed-dim", 8, "--epochs", 2, "--ks", "1,2", "--loss-args", '{"hidden": 8}']
    status, out, _ = call("train", *argv, "--device", "cpu", "--store", tmp_path)
    run = next(p.parent for p in tmp_path.glob("*/metrics.json"))
    want = recipe("hist/cub-resnet50").config(dataset="toy", trunk="toy", image_size=32, embed_dim=8, epochs=2, ks=[1, 2], loss_args={"hidden": 8})
    assert status == 0 and run.name == want.key() and RunConfig.from_dict(json.loads((run / "config.json").read_text())) == want


@pytest.mark.parametrize("argv, text", [
    (["--recipe", "hist/cub-resnet5"], "Did you mean 'hist/cub-resnet50'"), (["--recipe", "hist/cub-resnet50"], "unknown dataset 'cub'"),
    (["--recipe", "hist/cub-resnet50", "--dry-run", "--trunk", "resnet5O"], "Did you mean 'resnet50'"), (["--recipe", "hist/cub-resnet50", "--batch-size", "1"], "2 or more"),
    (["--recipe", "hist/cub-resnet50", "--dry-run", "--dataset", "toy", "--image-size", "32", "--loss-args", '{"tua": 1}'], "tua"),
    (["--recipe", "hist/cub-resnet50", "--dry-run", "--loss", "HISTLos"], "Did you mean 'HISTLoss'"), (["--recipe"], "expected one argument"), (["--dry-runs"], "Did you mean '--dry-run'")])
def test_wrong_use(call, argv, text, tmp_path):
    status, _, err = call("train", *argv, "--store", tmp_path)
    assert status == 2 and text in err and "Traceback" not in err


def test_bn_inception_without_its_file(call, tmp_path):
    status, _, err = call("train", "--recipe", "hist/cub-bninception", "--dataset", "toy", "--image-size", 32, "--epochs", 1, "--device", "cpu", "--store", tmp_path)
    assert status == 1 and "bn_inception-52deb4733.pth" in err and "Traceback" not in err
