"Recipes: published values as typed here from their sources, valid configs, losses that build, small rehearsals."
import json, re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

import hapnb.train as T
from hapnb import cli, study
from hapnb.models import test_transform as final_transform, train_transform
import hapnb.recipes as R
from hapnb.recipes import RECIPES, SOURCES, base_for, recipe, recipes_table
from hapnb.config import RunConfig, load_splits, thaw
from hapnb.build import build_net, build_trainer, make_loss_for, read_data
from hapnb.train import make_accelerator

# optimiser, lr, distributions, hypergraph network, weight decay, step, epochs after warm-up, tau, alpha, lambda_s
VALUES = {
    "hist/cub-resnet50": ("adam", 1.2e-4, 1e-1, 5 * 1.2e-4, 5e-5, 5, 40, 32, 1.1, 1),
    "hist/cars-resnet50": ("adam", 1e-4, 1e-1, 10 * 1e-4, 1e-4, 10, 50, 32, 0.9, 1),
    "hist/sop-resnet50": ("adam", 1e-4, 1e-2, 10 * 1e-4, 1e-4, 10, 60, 16, 2, 1),
    "hist/cub-bninception": ("adam", 1.2e-4, 1e-1, 6e-4, 5e-5, 5, 40, 16, 1.0, 1),
    "hist/cars-bninception": ("adam", 1e-4, 1e-1, 1e-3, 1e-4, 10, 50, 24, 0.9, 1),
    "hist/sop-bninception": ("adam", 1e-4, 1e-2, 1e-3, 1e-4, 10, 60, 16, 1.6, 1),
    "rehist/cub-resnet50-tuned": ("adam", 1.2e-4, 1e-1, 6e-4, 5e-5, 5, 40, 24, 1.15, 1),
    "rehist/cars-resnet50-tuned": ("adam", 1e-4, 1e-1, 1e-3, 1e-4, 10, 50, 32, 0.9, 0.8),
    "rehist/sop-resnet50-tuned": ("adam", 1e-4, 1e-2, 1e-3, 1e-4, 10, 60, 20, 2.1, 0.5),
    "rehist/cub-bninception-tuned": ("adamw", 1e-4, 5e-2, 5e-4, 1e-4, 5, 60, 20, 0.95, 1.2),
    "rehist/cars-bninception-tuned": ("adamw", 1e-4, 1e-1, 5e-4, 5e-5, 10, 60, 22, 0.9, 1.5),
    "rehist/sop-bninception-tuned": ("adamw", 1e-4, 1e-2, 1e-3, 1e-4, 10, 60, 12, 1.55, 1.5)}
HIST = [n for n in RECIPES if n.startswith(("hist/", "rehist/"))]
TOY = dict(dataset="toy", trunk="toy", image_size=32, embed_dim=16, ks=(1, 2), loss_args={"hidden": 16})


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HAPNB_CACHE", str(tmp_path_factory.getbasetemp() / "features"))


@pytest.fixture
def call(capsys):
    def call(*argv):
        status = cli.main([str(a) for a in argv])
        return (status, *capsys.readouterr())
    return call


# ---- the values

def test_all_are_here():
    assert set(HIST) == set(VALUES) | {"hist/emoji"}
    roadmap = {f"roadmap/{n}" for n in ROADMAP} | {f"roadmap/{n}-{b}" for n in ROADMAP if n.endswith("resnet50")
                                                   for b in ("smoothap", "fastap", "softbin", "blackbox")}
    roadmap |= {f"roadmap/{n}-xbm" for n in ROADMAP
                if "inshop" not in n} | {f"roadmap/{d}-resnet50-pair-xbm" for d in ("cub", "sop", "inat")}
    happier = {f"happier/{d}{v}" for d in HAPPIER for v in ("", "-f", "-csl", "-nsm")}
    others = {"pss/inat", "pss/inat-vit", "smoothap/inat", "smoothap/vehicleid", "smoothap/sop",
              "suprank/gldv2", "network/cifar100", "network/fgvc-aircraft"}
    others |= {f"{s}/emoji" for s in ("happier", "roadmap", "smoothap")}
    assert set(RECIPES) == set(HIST) | roadmap | happier | others


# keys of schema 2, with the fingerprints "a" and "b" for the two parts of the data: runs in a store must be found again
KEYS = {
    "hist/cub-resnet50": "714a0d983332a00c",
    "hist/cars-resnet50": "3ba9789b3f03cf6b",
    "hist/sop-resnet50": "184ad0db0ad067d1",
    "hist/cub-bninception": "9d3219cc1c2c25c4",
    "hist/cars-bninception": "b9fb892e6b5ac272",
    "hist/sop-bninception": "c9c75a3f8801ee23",
    "rehist/cub-resnet50-tuned": "f20c0fab8d701baf",
    "rehist/cars-resnet50-tuned": "604b16fd5ca7518c",
    "rehist/sop-resnet50-tuned": "2f439b2b71d1c642",
    "rehist/cub-bninception-tuned": "f4233b9cb438e01e",
    "rehist/cars-bninception-tuned": "a6ccb8df398701e9",
    "rehist/sop-bninception-tuned": "cd4d199c3e8d51d4",
    "hist/emoji": "f8eff9f651d41694",
}


def test_keys_of_hist_are_what_they_were():
    data = SimpleNamespace(fingerprint="a"), SimpleNamespace(fingerprint="b")
    assert {n: recipe(n).config().key(data) for n in HIST} == KEYS


@pytest.mark.parametrize("name", VALUES)
def test_published_values(name):
    c = recipe(name).config()
    lr = {k: g["lr"] for k, g in c.groups.items()}
    assert set(lr) == {"trunk", "head", "loss.distributions", "loss.hgnn"} and lr["trunk"] == lr["head"] == c.lr
    found = (c.optimizer, c.lr, lr["loss.distributions"], lr["loss.hgnn"], c.weight_decay, c.schedule_args["size"],
             c.epochs - c.warmup_epochs,
             *(c.loss_args[k] for k in ("tau", "alpha", "lambda_s")))
    assert found[0] == VALUES[name][0] and found[1:] == pytest.approx(VALUES[name][1:], rel=1e-12)
    data, trunk = name.split("/")[1].removesuffix("-tuned").split("-")
    assert (c.dataset, c.pretrained) == (data, True)
    assert c.trunk == {"resnet50": "resnet50", "bninception": "bn_inception"}[trunk]
    assert (c.pooling, c.norm, c.init, c.normalise) == ("avg+max", "after", "kaiming", False)
    assert (c.embed_dim, c.image_size, c.sampler, c.batch_size) == (512, 224, "random", 32)
    assert (c.loss, c.loss_args["hidden"], c.loss_args["layers"]) == ("HISTLoss", 512, 2)
    assert (c.warmup_epochs, c.schedule, c.schedule_args["gamma"], c.eval_every) == (1, "step", 0.5, 1)
    assert (c.ks, c.freeze) == (((1, 10, 100, 1000), "none") if data == "sop" else ((1, 2, 4, 8, 16, 32), "bn"))
    assert data == "sop" or c.bn_affine is False
    assert c.trunk_args.get("bn_momentum") == (0.9 if trunk == "bninception" else None)


def leaves(v, path=""):
    return {p for k, x in v.items() for p in leaves(x, f"{path}/{k}")} if isinstance(v, dict) and v else {path[1:]}


def test_every_value_has_a_source():
    for name, r in RECIPES.items():
        assert leaves(r.fields) == set(r.sources) and set(r.sources.values()) <= set(SOURCES), name
        assert set(r.fields) <= set(RunConfig().to_dict()), name


def test_what_is_unknown_is_marked():
    for name, r in ((n, RECIPES[n]) for n in HIST):
        ours = {p for p, s in r.sources.items() if s == "our choice"}
        if name.startswith("hist/") and name.endswith("bninception"):
            assert ours == {"optimizer", "lr", "weight_decay", "epochs",
                            "schedule_args/size"} | {f"groups/{g}/lr"
                                                     for g in ("trunk", "head", "loss.distributions", "loss.hgnn")}
            assert "Unknown for BN-Inception" in r.notes
        elif name != "hist/emoji": assert not ours
    assert all("0.9 in Table 2 and as 1.0 in Table 8" in RECIPES[n].notes
               for n in ("hist/cars-bninception", "rehist/cars-bninception-tuned"))
    assert "illegible" in RECIPES["rehist/cars-resnet50-tuned"].notes
    assert "lambda_s out" in RECIPES["rehist/sop-resnet50-tuned"].notes
    assert all("on the test images" in r.notes for n, r in RECIPES.items() if n in VALUES)
    assert all(("bn_affine=True" in r.notes) == (r.fields.get("freeze") == "bn") for r in map(RECIPES.get, HIST))


@pytest.mark.parametrize("name", HIST)
def test_the_loss_builds(name):
    cfg = recipe(name).config()
    loss = make_loss_for(cfg, torch.arange(100)[:, None], cfg.embed_dim)
    emb = nn.functional.layer_norm(torch.randn(32, cfg.embed_dim, generator=torch.Generator().manual_seed(0)),
                                   (cfg.embed_dim,)).requires_grad_()
    loss(emb, torch.arange(32)[:, None] // 2).backward()
    assert emb.grad.abs().max() > 0 and all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())
    groups = T.param_groups(dict(loss=loss), cfg.lr, cfg.weight_decay, thaw(cfg.groups))
    assert {g["name"] for g in groups} == {"loss.distributions", "loss.hgnn"}
    assert {g["weight_decay"] for g in groups} == {cfg.weight_decay}


@pytest.mark.parametrize("name", VALUES)
def test_transforms_are_those_of_the_loader(name):
    cfg = recipe(name).config()
    train = train_transform(cfg.trunk, cfg.image_size, **thaw(cfg.augment))
    test = final_transform(cfg.trunk, cfg.image_size, **thaw(cfg.transform))
    from torchvision.transforms import v2
    crop, flip = train.transforms[:2]
    plain = v2.RandomResizedCrop(224)
    assert type(crop) is type(plain)
    assert all(tuple(getattr(crop, k)) == tuple(getattr(plain, k)) for k in ("size", "scale", "ratio"))
    assert crop.interpolation == v2.InterpolationMode(plain.interpolation) == v2.InterpolationMode.BILINEAR
    assert crop.antialias == plain.antialias
    assert isinstance(flip, v2.RandomHorizontalFlip) and flip.p == 0.5
    assert [type(t) for t in test.transforms[:2]] == [v2.Resize, v2.CenterCrop]
    assert (list(test.transforms[0].size), tuple(test.transforms[1].size)) == ([256], (224, 224))


# ---- HAPPIER, ROADMAP, Smooth-AP, SupRank: values typed once more

# optimiser; rate of trunk, last layer, proxies; weight decay; lowest rate; epochs, warm-up; trunk, ImageNet, BatchNorm;
# start, offset, lambda; sampler and its arguments; resize first, square
ALONE, PAIRS5 = ("m_per_class", {"m": 4}), ("hierarchical", {"m": 4, "batches_per_pair": 5})
HAPPIER = {
    "sop": ("adam", 5e-5, 1e-4, 10., 1e-4, 0., 100, 5, "resnet50", True, "bn", 0.5, 1.44, 0.1, PAIRS5, 256, True),
    "inat-base": ("adam", 1e-5, 2e-5, 2e-5, 4e-4, 1e-6, 100, 5, "resnet50", True, "bn", 0., 1., 0.1, ALONE, None,
                  False),
    "inat-full": ("adam", 1e-5, 2e-5, 2e-5, 4e-4, 1e-6, 100, 5, "resnet50", True, "bn", 0., 1., 0.1, ALONE, None,
                  False),
    "dyml-vehicle": ("sgd", 0.1, 0.1, 0.1, 1e-4, 1e-6, 100, 0, "resnet34", False, "none", 0.5, 1.44, 0.1, ALONE, None,
                     False),
    "dyml-animal": ("sgd", 0.1, 0.1, 0.1, 1e-4, 1e-6, 100, 0, "resnet34", False, "none", 0.5, 1.44, 0.5, ALONE, None,
                    False),
    "dyml-product": ("sgd", 0.01, 0.02, 0.02, 1e-4, 1e-5, 20, 5, "resnet34", True, "bn", 0.5, 1.44, 0.1, ALONE, None,
                     False)}


def rate(c, part): return c.groups.get(part, {}).get("lr", c.lr)


@pytest.mark.parametrize("data", HAPPIER)
def test_happier(data):
    c = recipe(f"happier/{data}").config()
    found = (c.optimizer, c.lr, rate(c, "head"), rate(c, "loss"), c.weight_decay, c.schedule_args["min_lr"], c.epochs,
             c.warmup_epochs, c.trunk, c.pretrained, c.freeze,
             c.loss_args["start"], c.loss_args["offset"], c.loss_args["lam"], (c.sampler, thaw(c.sampler_args)),
             c.augment.get("resize"), c.transform.get("square", False))
    assert found == HAPPIER[data]
    assert (c.dataset, c.loss, c.loss_args["tau"], c.loss_args["rho"], c.loss_args["delta"],
            c.loss_args["relevance"]) == (data, "HAPPIERLoss", 0.01, 100, 0.05, {"kind": "pop", "alpha": 1.0})
    assert (c.schedule, c.schedule_args["total"], c.batch_size, c.embed_dim, c.pooling, c.norm, c.normalise, c.seed,
            c.eval_every) == ("cosine", c.epochs, 256, 512, "avg", "layernorm", True, 0, 20)
    assert (c.image_size, c.augment["scale"], c.augment["ratio"], c.augment["flip"], c.precision, c.bn_affine,
            c.loss_args["with_hrank"]) == (224, (0.16, 1), (0.75, 1.33), 0.5, "fp16", True, False)
    assert c.groups.get("loss", {}).get("weight_decay") == (0 if data == "sop" else None)
    assert c.groups.get("loss", {}).get("min_lr") == (0.1 if data == "sop" else None)
    assert c.optimizer_args == ({"momentum": 0.9, "nesterov": True} if c.optimizer == "sgd" else {})
    assert c.ks == ((1, 10, 20) if data.startswith("dyml") else (1,))


@pytest.mark.parametrize("data", HAPPIER)
def test_variants_of_happier(data):
    base, f, csl, nsm = (recipe(f"happier/{data}{v}").config() for v in ("", "-f", "-csl", "-nsm"))
    assert f == base.replace(loss_args={**base.loss_args, "lam": 0.5, "with_hrank": data == "sop"})
    margins = {"sop": (0.25, 0.45), "inat-base": (0.25, 0.45),
               "inat-full": (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75)}.get(data, (0.25, 0.35, 0.45))
    assert csl.replace(loss="x", loss_args={},
                       groups={}) == base.replace(loss="x", loss_args={},
                                                  groups={}) == nsm.replace(loss="x", loss_args={}, groups={})
    assert (csl.loss, csl.loss_args) == ("CSLLoss", {"margins": margins, "scale": 32.})
    assert (nsm.loss, nsm.loss_args) == ("NormSoftmaxLoss", {"temperature": 0.05, "level": 0})
    assert nsm.groups == base.groups
    assert {k: rate(csl, k) for k in ("trunk", "head", "loss")} == {k: rate(base, k) for k in ("trunk", "head", "loss")}
    assert "min_lr" not in csl.groups.get("loss", {})


PAIRS10 = ("hierarchical", {"m": 4, "batches_per_pair": 10})
PAIRS4 = ("hierarchical", {"m": 8, "batches_per_pair": 4, "super_level": 1})
RM_ALL, NONE = (1., 1.), ("constant", {})
STEPS, LATE = (("multistep", {"milestones": at, "gamma": 0.3}) for at in ((30, 70), (25, 50)))
# optimiser, rate, last layer, weight decay, schedule, epochs, batch, sampler, crop, resize first, square, pooling,
# norm, offset, start, ks
ROADMAP = {
    "cub-resnet50": ("adam", 1e-6, 1e-6, 4e-4, NONE, 200, 128, ALONE, 256, None, False, "max", "layernorm", 1.44, 0.5,
                     (1, 2, 4, 8)),
    "cub-deit": ("adamw", 1e-6, 1e-6, 5e-4, NONE, 150, 128, ALONE, 224, None, False, "avg", None, 1.44, 0.5,
                 (1, 2, 4, 8)),
    "sop-resnet50": ("adam", 1e-5, 2e-5, 1e-4, STEPS, 100, 128, PAIRS10, 256, 288, True, "avg", None, 1.44, 0.5,
                     (1, 10, 100, 1000)),
    "sop-deit": ("adamw", 1e-5, 1e-5, 5e-4, LATE, 75, 128, PAIRS10, 224, 256, True, "avg", None, 1.44, 0.5,
                 (1, 10, 100, 1000)),
    "inat-resnet50": ("adam", 1e-5, 2e-5, 4e-4, STEPS, 90, 384, ALONE, 224, None, False, "avg", None, 1., 0.,
                      (1, 4, 16, 32)),
    "inat-deit": ("adamw", 1e-5, 1e-5, 5e-4, STEPS, 90, 384, ALONE, 224, None, False, "avg", None, 1., 0.,
                  (1, 4, 16, 32)),
    "inshop-resnet50": ("adam", 1e-5, 2e-5, 1e-4, NONE, 100, 128, PAIRS4, 256, None, True, "avg", None, 1.44, 0.5,
                        (1, 10, 20, 30))}


@pytest.mark.parametrize("name", ROADMAP)
def test_roadmap(name):
    c = recipe(f"roadmap/{name}").config()
    found = (c.optimizer, c.lr, rate(c, "head"), c.weight_decay, (c.schedule, dict(c.schedule_args)), c.epochs,
             c.batch_size, (c.sampler, thaw(c.sampler_args)), c.image_size, c.augment.get("resize"),
             c.transform.get("square", False), c.pooling, c.norm, c.loss_args["offset"], c.loss_args["start"], c.ks)
    assert found == ROADMAP[name]
    data, trunk = name.split("-")
    assert c.dataset == {"inat": "inat-base"}.get(data, data)
    assert (c.trunk, c.embed_dim,
            c.freeze) == (("resnet50", 512, "bn") if trunk == "resnet50" else ("deit_small", None, "none"))
    assert c.pretrained is True and c.bn_affine
    assert (c.loss, c.loss_args["weight"], c.loss_args["pos_margin"], c.loss_args["neg_margin"],
            c.loss_args["average"]) == ("ROADMAPLoss", RM_ALL, 0.9, 0.6, "nonzero")
    assert (c.seed, c.warmup_epochs, c.eval_every, c.eval_levels, c.metrics, c.precision,
            c.memory) == (333, 0, 5, (0,), ("R@k", "mAP@R"), "fp16", {})
    assert c.augment["scale"] == (0.16, 1) and c.augment["ratio"] == (0.75, 1.33)
    assert c.image_size / c.transform["crop_pct"] == pytest.approx(c.image_size + 32)
    assert {p for p, s in RECIPES[f"roadmap/{name}"].sources.items()
            if s == "our choice"} == {"inat-deit": {"batch_size", "epochs", "seed"},
                                      "inshop-resnet50": {"epochs", "seed"}}.get(name, set())


@pytest.mark.parametrize("suffix, loss, args",
                         [("smoothap", "SmoothAPLoss", {"tau": 0.01}), ("fastap", "FastAPLoss", {"num_bins": 10}),
                          ("softbin", "SoftBinAPLoss", {"num_bins": 20}),
                          ("blackbox", "BlackBoxAPLoss", {"lambda_val": 4., "margin": 0.02})])
def test_baselines_of_roadmap(suffix, loss, args):
    for name in (n for n in ROADMAP if n.endswith("resnet50")):
        base = recipe(f"roadmap/{name}").config()
        assert recipe(f"roadmap/{name}-{suffix}").config() == base.replace(loss=loss, loss_args=args)


def test_memory_of_roadmap():
    for name in (n for n in ROADMAP if "inshop" not in n):
        base, xbm = recipe(f"roadmap/{name}").config(), recipe(f"roadmap/{name}-xbm").config()
        size = 60_000 if "inat" in name else "train"
        assert xbm == base.replace(memory={"size": size, "unique": size == "train", "start_epoch": 0, "weight": 1.})
        if name.endswith("resnet50"):
            pair = xbm.replace(loss="PairLoss", loss_args={"margin": 0.5})
            assert recipe(f"roadmap/{name}-pair-xbm").config() == pair


def test_smoothap():
    # dataset, epochs, milestones, ks
    for name, *want in (("inat", "inat-base", 90, (40, 70), (1, 4, 16, 32)),
                        ("vehicleid", "vehicleid", 400, (200, 300), (1, 5)),
                        ("sop", "sop", 90, (40, 70), (1, 10, 100, 1000))):
        c = recipe(f"smoothap/{name}").config()
        assert [c.dataset, c.epochs, c.schedule_args["milestones"], c.ks] == want
        assert (c.trunk, c.freeze, c.bn_affine, c.pooling, c.norm, c.embed_dim, c.loss,
                c.loss_args) == ("resnet50", "bn", True, "avg", None, 512, "SmoothAPLoss", {"tau": 0.01})
        assert (c.optimizer, c.lr, rate(c, "head"), c.weight_decay, c.schedule, c.schedule_args["gamma"], c.batch_size,
                c.sampler, c.sampler_args) == ("adam", 1e-5, 1e-5, 4e-4, "multistep", 0.3, 384, "m_per_class", {"m": 4})
        assert (c.image_size, c.augment["scale"], c.augment["flip"], c.seed, c.precision, c.eval_every,
                c.warmup_epochs) == (224, (0.08, 1), 0.5, 1, "no", 1, 0)
    assert recipe("smoothap/vehicleid").config().protocol == {"kind": "leave-one-out"}
    assert recipe("smoothap/vehicleid").fields["dataset_args"] == {"size": "small"}
    sop = RECIPES["smoothap/sop"]
    ours = {"lr", "groups", "epochs", "batch_size", "weight_decay", "optimizer", "schedule", "schedule_args",
            "embed_dim"}
    assert "never published" in sop.notes
    assert {s for p, s in sop.sources.items() if p.split("/")[0] in ours} == {"our choice"}


def test_pss():
    "As Smooth-AP on iNaturalist, with 128 dimensions and 400 epochs; or a ViT-B/16 of DINO whose last block learns."
    for name in ("pss/inat", "pss/inat-vit"):
        c = recipe(name).config()
        assert (c.dataset, c.epochs, c.schedule, c.schedule_args, c.batch_size, c.sampler_args,
                c.ks) == ("inat-base", 400, "multistep", {"milestones": (40, 70), "gamma": 0.3}, 384, {"m": 4},
                          (1, 4, 16, 32))
        assert (c.loss, c.loss_args, c.optimizer, c.lr, c.weight_decay,
                c.eval_every) == ("SmoothAPLoss", {"tau": 0.01}, "adam", 1e-5, 4e-4, 10)
    assert (c.trunk, c.trunk_args, c.embed_dim, c.freeze, c.freeze_blocks,
            c.groups) == ("vit_base_dino", {"drop_path_rate": 0.1}, None, "none", 11, {})
    c = recipe("pss/inat").config()
    assert (c.trunk, c.embed_dim, c.freeze, rate(c, "head")) == ("resnet50", 128, "bn", 1e-5)


def test_landmarks():
    c = recipe("suprank/gldv2").config()
    assert (c.trunk, c.pooling, c.norm, c.init) == ("resnet101", "gem", "l2", "whitening")
    assert (c.embed_dim, c.freeze) == (2048, "bn")
    assert (c.optimizer, c.lr, c.groups, c.weight_decay, c.schedule, c.schedule_args, c.batch_size,
            c.sampler_args) == ("adam", 1e-4, {}, 1e-4, "cosine", {"total": 100, "min_lr": 0.}, 256, {"m": 4})
    assert (c.loss, c.loss_args["lam"], c.loss_args["offset"], c.loss_args["start"],
            c.protocol) == ("HAPPIERLoss", 0.1, 1.44, 0.5, {"kind": "landmarks", "k": 100})


@pytest.mark.parametrize("name", [n for n in RECIPES if not n.endswith("/emoji") and n not in HIST])
def test_transforms_are_those_of_torchvision(name):
    "The transforms of the files, written with torchvision's classes and their defaults."
    from torchvision.transforms import v2
    c = recipe(name).config()
    system, data = name.split("/")[0], c.dataset
    big = {"cub": 256, "sop": 256, "inshop": 256}.get(data, 224) if system == "roadmap" and "resnet50" in name else 224
    ours = {} if system in ("smoothap", "pss") else dict(scale=(0.16, 1), ratio=(0.75, 1.33))
    crop = v2.RandomResizedCrop(big, **ours)
    first = [v2.Resize(big + 32)] if data == "sop" and system != "smoothap" else []
    square = data in ("sop", "inshop") and system != "smoothap"
    side = (big + 32, big + 32) if square else (224, 224) if system == "suprank" else big + 32
    train = train_transform(c.trunk, c.image_size, **thaw(c.augment))
    test = final_transform(c.trunk, c.image_size, **thaw(c.transform))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    def plain(steps):
        return [(type(t), [tuple(getattr(t, k, ())) for k in ("size", "scale", "ratio")],
                 v2.InterpolationMode(getattr(t, "interpolation", "nearest")), getattr(t, "antialias", None),
                 getattr(t, "p", None)) for t in steps]
    for found, want in ((train.transforms, [*first, crop, v2.RandomHorizontalFlip(0.5)]),
                        (test.transforms, [v2.Resize(side), v2.CenterCrop(big)])):
        assert plain(found[:len(want)]) == plain(want)
        assert tuple(found[-1].mean) == mean and tuple(found[-1].std) == std


@pytest.mark.parametrize("name",
                         ["happier/sop", "happier/inat-full", "happier/dyml-vehicle", "happier/dyml-product",
                          "roadmap/sop-resnet50", "roadmap/sop-deit", "smoothap/vehicleid", "suprank/gldv2"])
def test_rates_are_those_of_torch(name):
    "Rates of every part in every epoch, from torch's own schedulers, not stepped in the epochs of warm-up."
    c = recipe(name).config()
    own = {k: dict(c.groups.get(k, {})) for k in ("trunk", "head", "loss")}
    for part, v in own.items():
        lr, low = v.get("lr", c.lr), v.get("min_lr", c.schedule_args.get("min_lr"))
        opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        schedulers = torch.optim.lr_scheduler
        # cosines are made for all epochs, as in the files
        if c.schedule == "cosine": plan = schedulers.CosineAnnealingLR(opt, c.epochs, low)
        else: plan = schedulers.MultiStepLR(opt, c.schedule_args["milestones"], c.schedule_args["gamma"])
        for e in range(c.epochs):
            found = T.schedule_lr(dict(base_lr=lr, min_lr=v.get("min_lr")), c.schedule, max(e - c.warmup_epochs, 0),
                                  c.epochs - c.warmup_epochs, thaw(c.schedule_args))
            assert found == pytest.approx(opt.param_groups[0]["lr"], rel=1e-9, abs=1e-12), (part, e)
            opt.step()
            if e >= c.warmup_epochs: plan.step()


@pytest.mark.parametrize("name", [n for n in RECIPES if n not in HIST])
def test_other_losses_build(name):
    cfg = recipe(name).config()
    three = cfg.dataset.startswith("dyml") or cfg.dataset in ("gldv2", "emoji", "fgvc-aircraft")
    depth = 7 if cfg.dataset == "inat-full" else 3 if three else 2
    labels = torch.stack([torch.arange(100) // 2**l for l in range(depth)], 1)
    loss = make_loss_for(cfg, labels, 16)
    g = torch.Generator().manual_seed(0)
    emb = nn.functional.normalize(torch.randn(32, 16, generator=g) * 1.5
                                  + torch.randn(8, 16, generator=g).repeat_interleave(4, 0)).requires_grad_()
    loss(emb, labels[torch.arange(32) // 4]).backward()
    assert emb.grad.abs().max() > 0 and all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())


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
    """Warm-up moves what is new and leaves the trunk's weights; then all moves.

    BatchNorm: nothing of it moves on CUB and Cars, all of it on SOP."""
    cfg = recipe(name).config(**TOY, epochs=4, schedule_args={"size": 2})
    trainer, batches = build_trainer(cfg, read_data(cfg), make_accelerator("cpu"))
    norm = next(m for m in trainer.net.trunk.modules() if isinstance(m, nn.BatchNorm2d))
    parts = {"trunk": [p for p in trainer.net.trunk.parameters() if p is not norm.weight and p is not norm.bias],
             "norm": [norm.weight, norm.bias],
             "running": [norm.running_mean, norm.running_var], "head": [*trainer.net.head.parameters()],
             "means": [trainer.loss.distributions.means], "log_vars": [trainer.loss.distributions.log_vars],
             "hgnn": [*trainer.loss.hgnn.parameters()]}
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
    assert {"R@1_level0", "mAP@R_level0", "distribution", "hypergraph", "lr_loss.hgnn"} <= set(history)
    assert len(history) == 2
    assert 0 < result.metrics["R@1_level0"] <= result.metrics["R@2_level0"] <= 1 and "H-AP" not in result.metrics


def test_the_real_networks_build():
    """Trunk, head and groups of the published networks, with random weights: what is frozen is in no group."""
    for name, frozen in (("hist/cub-resnet50", True), ("hist/sop-bninception", False)):
        cfg = recipe(name).config(pretrained=False)
        net = build_net(cfg)
        groups = T.param_groups(dict(trunk=net.trunk, head=net.head), cfg.lr, cfg.weight_decay,
                                {k: thaw(v) for k, v in cfg.groups.items() if "." not in k})
        norms = [m for m in net.trunk.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        grouped = {id(p) for g in groups for p in g["params"]}
        assert norms
        assert all((id(m.weight) in grouped, id(m.bias) in grouped, m.training) == (not frozen, not frozen, not frozen)
                   for m in norms)
        assert all(m.momentum == (0.1 if frozen else 0.9) for m in norms)
        assert net.head.proj.out_features == 512 and net.head.proj.bias.abs().max() == 0


# ---- Recipe

def test_config_merges_and_drops():
    r = recipe("hist/sop-bninception")
    assert r.config().to_dict() == RunConfig.from_dict(r.fields).to_dict()
    c = r.config(loss_args={"alpha": 1.0}, groups={"head": {"lr": 1.0}}, batch_size=8)
    assert c.loss_args == {**r.fields["loss_args"], "alpha": 1.0}
    assert c.groups == {**r.fields["groups"], "head": {"lr": 1.0}} and c.batch_size == 8
    other = r.config(loss="NormSoftmaxLoss", trunk="resnet50", sampler="balanced", schedule="cosine")
    assert (other.loss_args, other.trunk_args, other.sampler_args, other.schedule_args,
            set(other.groups)) == ({}, {}, {}, {}, {"trunk", "head"})
    assert r.config(loss="HISTLoss", schedule="step") == r.config()  # the same again drops nothing
    assert r.config(sampler="balanced", sampler_args={"m": 2}).sampler_args == {"m": 2}
    assert {k: g["lr"] for k,
            g in r.config(lr=1e-3).groups.items()} == {"trunk": 1e-3, "head": 1e-3, "loss.distributions": 0.01,
                                                       "loss.hgnn": 1e-3}
    assert r.config(freeze="trunk").augment == {}
    assert recipe("hist/emoji").config(lr=0.5, epochs=3).groups == recipe("hist/emoji").fields["groups"]
    for bad, words in ((dict(batchsize=3), "batch_size"), (dict(lr="1e-4"), "must be"),
                       (dict(groups={"los": {}}), "unknown part 'los'")):
        with pytest.raises(ValueError, match=words): r.config(**bad)
    assert recipe("hist/sop-bninception") == r  # nothing leaked into the list


def test_a_recipe_is_a_copy():
    r = recipe("hist/cub-resnet50")
    r.fields["loss_args"]["tau"] = 1.0
    assert recipe("hist/cub-resnet50").fields["loss_args"]["tau"] == 32.0
    with pytest.raises(AttributeError): r.name = "x"


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown recipe 'hist/cub-resnet5'.*Did you mean 'hist/cub-resnet50'"):
        recipe("hist/cub-resnet5")
    with pytest.raises(ValueError, match="no recipe begins with 'x'"): recipes_table("x")
    with pytest.raises(ValueError, match="Did you mean 'happier/sop'"): recipe("happier/sap")


def test_markdown_shows_value_and_source_of_each_path():
    for name in ("hist/cub-resnet50", "happier/sop-csl", "roadmap/inat-deit-xbm"):
        r, text = recipe(name), recipe(name)._repr_markdown_()
        rows = {tuple(w.strip() for w in line.split("|")[1:-1]) for line in text.splitlines() if line.startswith("| ")}
        shown = {(a, s) for a, v, s in rows if v}
        assert {(path.replace("/", " / "), source) for path, source in r.sources.items()} <= shown
        assert r.notes in text and all(SOURCES[s] in text for s in set(r.sources.values()))


@pytest.mark.parametrize("change, message", [
    (lambda d: d.update(recipe={}), "mine.json has no setting 'recipe'. Did you mean 'recipes'"),
    (lambda d: d["recipes"]["mine/a"].update(uses=["hist"]), "Did you mean 'use'"),
    (lambda d: d["recipes"]["mine/a"].update(use=["hist/so"]), "block 'hist/so' is not known. Did you mean 'hist/sop'"),
    (lambda d: d["recipes"]["mine/a"].update(like="hist/sop"), "like 'hist/sop' is not known. Did you mean 'hist/"),
    (lambda d: d["recipes"]["mine/a"].update(set={"HIST readme": {"lr": 1.}}), "Did you mean 'HIST README'"),
    (lambda d: d["recipes"]["mine/a"].update(paper=None), "'paper' must be a valid string"),
    (lambda d: d["recipes"]["mine/a"].pop("paper"), "needs 'paper' or 'like'"),
    (lambda d: d["recipes"].update({"hist/emoji": {"like": "hist/emoji"}}), "there is a recipe 'hist/emoji' already"),
    (lambda d: d.pop("recipes"), "needs 'recipes'")])
def test_a_file_of_recipes_is_checked_when_it_is_read(tmp_path, monkeypatch, change, message):
    for name in ("RECIPES", "SOURCES", "SETTINGS"): monkeypatch.setattr(R, name, dict(getattr(R, name)))
    data = {"recipes": {"mine/a": {"paper": "mine"}}}
    change(data)
    (tmp_path / "mine.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=re.escape(message)): R.read_recipes(tmp_path / "mine.json")


def test_a_file_that_is_no_json_is_named(tmp_path):
    for text in ("{", "[" * 100_000):
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(ValueError, match="mine.json is no JSON file"): R.read_recipes(tmp_path / "mine.json")


def test_table():
    t = recipes_table()
    assert list(t.index) == list(RECIPES) and len(recipes_table("rehist")) == 6
    assert t.loc["hist/sop-resnet50", "freeze"] == "none" and t.loc["rehist/sop-bninception-tuned", "alpha"] == 1.55
    assert t.loc["hist/cub-resnet50", "our choice"] == "" and "lr hgnn" in t.loc["hist/cub-bninception", "our choice"]
    happier, roadmap = recipes_table("happier"), recipes_table("roadmap")
    assert happier.loc["happier/sop", "lr proxies"] == 10 and happier.loc["happier/dyml-vehicle", "lr proxies"] == ""
    assert "alpha" not in happier and "lr hgnn" not in roadmap
    assert roadmap.loc["roadmap/inshop-resnet50", "batches per pair"] == 4
    assert roadmap.loc["roadmap/inat-deit", "our choice"] == "batch, epochs"


def test_epochs_stretch_the_cosine():
    r = recipe("happier/sop")
    assert r.config(epochs=10).schedule_args == {"total": 10, "min_lr": 0.}
    assert r.config(epochs=10, schedule_args={"total": 20}).schedule_args["total"] == 20
    assert r.config(epochs=10, schedule="constant").schedule_args == {}
    assert recipe("roadmap/sop-deit").config(epochs=10).schedule_args["milestones"] == (25, 50)
    assert r.config(lr=1e-3).groups == r.fields["groups"]
    assert r.config(loss="CrossEntropyLoss").groups == {"head": {"lr": 1e-4}}


# ---- where studies start

@pytest.fixture
def begin(tmp_path):
    def begin(profile, dataset="emoji", **special):
        return study.begin("test", profile, dataset, out=str(tmp_path), **special)
    return begin


@pytest.mark.parametrize("system, loss, short, long",
                         [("happier", "HAPPIERLoss", 1e-2, 0.1), ("roadmap", "ROADMAPLoss", 3e-2, 0.1),
                          ("smoothap", "SmoothAPLoss", 3e-2, 0.1)])
def test_base_for_the_bundled_images_is_the_benchmarks(begin, system, loss, short, long):
    "The studies of a system and the benchmark study find each other's runs."
    for profile, lr in (("smoke", short), ("quick", short), ("full", long)):
        S = begin(profile)
        assert base_for(S, system=system) == S.config(loss=loss, lr=lr)
        assert base_for(S, system, lr=0.5, epochs=2) == S.config(loss=loss, lr=0.5, epochs=2)
    S = begin("network")
    assert base_for(S, system=system) == S.config(loss=loss, lr=1e-4, weight_decay=1e-4,
                                                  groups={"trunk": {"lr": 5e-5}, "loss": {"weight_decay": 0.}})


def test_base_for_published_recipes(begin):
    def fields(name): return {k: v for k, v in recipe(name).config().to_dict().items() if k != "data_dir"}
    def found(dataset, *a, **k):
        return {n: v for n, v in base_for(begin("paper", dataset), *a, **k).to_dict().items() if n != "data_dir"}
    assert found("cub") == fields("hist/cub-resnet50")
    assert found("sop", trunk="bninception") == fields("hist/sop-bninception")
    assert found("sop", "happier") == fields("happier/sop")
    assert found("inat-full", "happier", variant="f") == fields("happier/inat-full-f")
    assert found("inat-base", "happier") == fields("happier/inat-base")
    assert found("inat-base", "roadmap", "deit") == fields("roadmap/inat-deit")
    assert found("sop", "roadmap", variant="xbm") == fields("roadmap/sop-resnet50-xbm")
    assert found("vehicleid", "smoothap") == fields("smoothap/vehicleid")
    assert found("sop", "happier", epochs=10)["schedule_args"] == {"total": 10, "min_lr": 0.}
    for system, dataset in (("hist", "emoji"), ("happier", "emoji"), ("happier", "cub"), ("hist", "inat-base")):
        with pytest.raises(ValueError, match=f"unknown recipe '{system}/{dataset}-resnet50'"):
            base_for(begin("paper", dataset), system)


# ---- the command

def test_dry_run(tmp_path, call, monkeypatch):
    monkeypatch.setattr(T, "run", lambda *a, **k: pytest.fail("it trained"))
    store = tmp_path / "runs"
    status, out, _ = call("train", "--recipe", "hist/cub-resnet50", "--dry-run", "--store", store, "--seed", 3,
                          "--loss-args", '{"alpha": 0.5}')
    fields = {line.split(" = ")[0].strip(): line.split(" = ")[1].rsplit("  (", 1) for line in out.splitlines()
              if line.startswith("  ")}
    cfg = RunConfig.from_dict({k: json.loads(v) for k, (v, _) in fields.items()})
    assert status == 0 and cfg == recipe("hist/cub-resnet50").config(seed=3, loss_args={"alpha": 0.5})
    assert (fields["seed"][1], fields["loss_args"][1], fields["epochs"][1],
            fields["precision"][1]) == ("given)", "given)", "recipe)", "default)")
    assert "trunk resnet50: 23,508,032 parameters, 23,454,912 of them learn" in out
    assert "head: 1,049,088 parameters" in out
    assert "data cub: cannot be loaded" in out and not store.exists()


def test_dry_run_counts_steps(call):
    status, out, _ = call("train", "--recipe", "hist/sop-resnet50", "--dry-run", "--dataset", "toy", "--trunk", "toy",
                          "--image-size", 32, "--embed-dim", 8, "--epochs", 3, "--ks", "1,10")
    train, test = load_splits(RunConfig(dataset="toy"))
    assert status == 0 and f"{len(train)} images of {len(train.labels[:, 0].unique())} classes" in out
    assert f"{len(train) // 32} steps per epoch, {3 * (len(train) // 32)} in all" in out
    assert "nothing was trained" in out and "loss HISTLoss" in out
    status, out, _ = call("train", "--dry-run", "--dataset", "toy", "--trunk", "toy", "--image-size", 32,
                          "--batch-size", 24)
    assert status == 0 and "  lr = 0.001  (default)" in out and "6 steps per epoch" in out  # also without a recipe


def test_train_with_a_recipe(tmp_path, call):
    argv = ["--recipe", "hist/cub-resnet50", "--dataset", "toy", "--trunk", "toy", "--image-size", 32, "--embed-dim", 8,
            "--epochs", 2, "--ks", "1,2", "--loss-args", '{"hidden": 8}']
    status, out, _ = call("train", *argv, "--device", "cpu", "--store", tmp_path)
    run = next(p.parent for p in tmp_path.glob("*/metrics.json"))
    want = recipe("hist/cub-resnet50").config(dataset="toy", trunk="toy", image_size=32, embed_dim=8, epochs=2,
                                              ks=[1, 2], loss_args={"hidden": 8})
    assert status == 0 and run.name == want.key()
    assert RunConfig.from_dict(json.loads((run / "config.json").read_text())) == want


@pytest.mark.parametrize("argv, text", [
    (["--recipe", "hist/cub-resnet5"], "Did you mean 'hist/cub-resnet50'"),
    (["--recipe", "hist/cub-resnet50"], "--dataset cub: data_dir is missing: give the folder with CUB-200-2011"),
    (["--recipe", "hist/cub-resnet50", "--dry-run", "--trunk", "resnet5O"], "Did you mean 'resnet50'"),
    (["--recipe", "hist/cub-resnet50", "--batch-size", "1"], "2 or more"),
    (["--recipe", "hist/cub-resnet50", "--dry-run", "--dataset", "toy", "--image-size", "32", "--loss-args",
      '{"tua": 1}'], "tua"),
    (["--recipe", "hist/cub-resnet50", "--dry-run", "--loss", "HISTLos"], "Did you mean 'HISTLoss'"),
    (["--recipe"], "expected one argument"), (["--dry-runs"], "Did you mean '--dry-run'")])
def test_wrong_use(call, argv, text, tmp_path):
    status, _, err = call("train", *argv, "--store", tmp_path)
    assert status == 2 and text in err and "Traceback" not in err


def test_bn_inception_without_its_file(call, tmp_path):
    status, _, err = call("train", "--recipe", "hist/cub-bninception", "--dataset", "toy", "--image-size", 32,
                          "--epochs", 1, "--device", "cpu", "--store", tmp_path, "--ks", "1,2")
    assert status == 2 and "bn_inception-52deb4733.pth" in err and "Traceback" not in err
