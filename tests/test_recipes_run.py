"""Every recipe trains two steps (one in the warm-up, one after it) and is evaluated, on small sets in their layouts.

Network, loss, sampler, optimiser, transforms, memory and protocol are those of the recipe. What is smaller: images,
batch, epochs; weights are random and precision is full, because the CPU has no float16. Variants that change only the
loss run on the toy trunk."""
import itertools, json

import layouts_fine, layouts_hier, layouts_photos
import pandas as pd
import pytest
import torch
from layouts_hier import glued, jpeg, put

import hapnb.train as T
from hapnb.recipes import RECIPES, recipe
from hapnb.build import build_trainer, embed_part, evaluate_run, read_data
from hapnb.config import load_splits, thaw
from hapnb.train import make_accelerator

SIZE = 32  # side of the crops
BATCH = {"hierarchical": 16, "m_per_class": 8, "random": 8}
NAMES = [n for n in RECIPES if not n.endswith("/emoji")]
# they differ from a recipe with the real trunk in loss, constants or memory only
SMALL = ("-f", "-csl", "-nsm", "-smoothap", "-fastap", "-softbin", "-blackbox", "-xbm", "-tuned")


def bigger_dyml(root, kind):
    "DyML with test sets of 24 and more images: R@20 has something to leave out."
    layouts_hier.make_dyml(root, kind)
    if kind == "product":
        rows = [(f"{i}.jpg", i // 16, i // 8, i // 4) for i in range(32)]
        for i, (name, *_) in enumerate(rows): put(root / "mini-bmk_all_in_one" / "imgs" / name, jpeg([2, i]))
        put(root / "mini-bmk_all_in_one" / "label.csv", glued(("fname", "coarse_id", "middle_id", "fine_id"), rows))
        return root
    for b, level in enumerate(("fine", "middle", "coarse")):
        gallery = [(f"{i}.jpg", 10 * b + i // 4) for i in range(24)]
        asked = [(f"{i}.jpg", gallery[g][1]) for i, g in enumerate(range(0, 24, 3))]
        for i, (name, _) in enumerate(gallery): put(root / f"bmk_{level}" / "gallery" / name, jpeg([3 + b, i]))
        for i, g in enumerate(range(0, 24, 3)): put(root / f"bmk_{level}" / "query" / f"{i}.jpg", jpeg([3 + b, g]))
        put(root / f"bmk_{level}" / "gallery.csv", glued(("fname", "labels"), gallery))
        put(root / f"bmk_{level}" / "query.csv", glued(("fname", "labels"), asked))
    return root


MAKE = {"cub": lambda d: layouts_fine.make_cub(d, 4), "cars": lambda d: layouts_fine.make_cars(d, per_class=4),
        "sop": lambda d: layouts_fine.make_sop(d, 4), "inshop": layouts_fine.make_inshop,
        "inat-base": layouts_hier.make_inat, "inat-full": layouts_hier.make_inat,
        "vehicleid": layouts_hier.make_vehicleid, "gldv2": layouts_hier.make_gldv2,
        "cifar100": layouts_photos.make_cifar100, "fgvc-aircraft": layouts_photos.make_aircraft,
        **{f"dyml-{k}": lambda d, k=k: bigger_dyml(d, k) for k in ("vehicle", "animal", "product")}}


def grown(tmp_path_factory, make):
    "Function (dataset) -> folder of its small tree, made when first asked for."
    made = {}
    def tree(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            made[name] = make[name](root) or root
        return str(made[name])
    return tree


@pytest.fixture(scope="session")
def trees(tmp_path_factory): return grown(tmp_path_factory, MAKE)


class OneStep:
    "The first batch of each epoch."
    def __init__(self, batches): self.batches = batches
    def __getattr__(self, name): return getattr(self.batches, name)
    def epoch(self, e, start=0): return itertools.islice(self.batches.epoch(e, start), 1)


def shortened(name, trees, **changes):
    "The config of a recipe, at a size for one core."
    r = recipe(name)
    c = r.config()
    side = {"resize": round(c.augment["resize"] * SIZE / c.image_size)} if "resize" in c.augment else {}
    trunk = dict(trunk="toy") if name.endswith(SMALL) else dict(trunk_args=thaw(c.trunk_args))
    return r.config(data_dir=trees(c.dataset), dataset_args={"counts": False}, pretrained=False, image_size=SIZE,
                    augment=side, batch_size=2 * c.sampler_args["m"] * 2 if c.sampler == "hierarchical"
                    else BATCH[c.sampler],
                    precision="no", epochs=2, warmup_epochs=min(c.warmup_epochs, 1),
                    ks=[k for k in c.ks if k <= 20 and c.dataset.startswith("dyml") or k <= 4], **trunk, **changes)


WANTED = {"hist": ("R@1_level0", "mAP@R_level0"), "rehist": ("R@1_level0", "mAP@R_level0"),
          "happier": ("R@1_level0", "AP_level0", "AP_level1", "H-AP", "ASI", "NDCG"),
          "roadmap": ("R@1_level0", "mAP@R_level0"), "smoothap": ("R@1_level0",), "pss": ("R@1_level0",),
          "suprank": ("mAP@100",), "network": ("R@1_level0", "AP_level0", "AP_level1", "H-AP")}


def wanted(name):
    system, rest = name.split("/")
    if rest.startswith("dyml"):
        return ("mAP", "ASI", "R@1", "R@10", "R@20", *(f"{m}_level{l}" for m in ("AP", "ASI", "R@1") for l in range(3)))
    return WANTED[system]


def weights(trainer):
    "Copies of what can learn, by part."
    parts = {"trunk": trainer.net.trunk, "head": trainer.net.head, "loss": trainer.loss}
    return {k: [p.detach().clone() for p in m.parameters() if p.requires_grad] for k, m in parts.items()}


def moved(old, new): return {k for k in old if any(not torch.equal(p, q) for p, q in zip(old[k], new[k]))}


@pytest.mark.filterwarnings("ignore:.*images vary in.*directions only")  # whitening to 2,048 dimensions with 40 images
@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name, trees):
    cfg = shortened(name, trees)
    train, test = load_splits(cfg)
    accelerator = make_accelerator("cpu")
    trainer, batches = build_trainer(cfg, read_data(cfg), accelerator)
    seen = [weights(trainer)]
    trainer.fit(OneStep(batches), after_epoch=lambda trainer, row: seen.append(weights(trainer)))
    learns = {k for k, v in seen[0].items() if v}
    assert learns >= {"trunk"} | ({"head"} if cfg.embed_dim
                                  else set()) | ({"loss"} if name.endswith(("-csl", "-nsm"))
                                                 or name.startswith(("hist", "rehist", "happier", "suprank", "network"))
                                                 else set())
    assert moved(seen[0], seen[1]) == (learns - {"trunk"} if cfg.warmup_epochs else learns)
    assert moved(seen[1], seen[2]) == learns
    history = pd.DataFrame(trainer.history)
    assert len(history) == 2 and (history.grad_norm > 0).all() and history.loss.map(abs).max() < 1e3
    assert ("memory" in history) == bool(cfg.memory)
    z = embed_part(cfg, trainer.net, test)
    assert z.shape == (len(test), trainer.net.head.out_features)
    metrics = evaluate_run(cfg, read_data(cfg), z)
    assert set(wanted(name)) <= set(metrics) and all(0 <= metrics[k] <= 1 for k in wanted(name))
    levels = {k.rpartition("_level")[2] for k in metrics if "_level" in k}
    if cfg.eval_levels: assert levels == {"0"} and "H-AP" not in metrics
    if name == "happier/inat-full": assert levels == set("0123456")


def test_landmarks_train_with_levels_and_are_tested_on_the_whole_index(trees):
    "mAP@100 is the official one: no image of the index is left out, although some have no hierarchical label."
    cfg = shortened("suprank/gldv2", trees)
    train, test = load_splits(cfg)
    z = torch.randn(len(test), 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    plain = load_splits(cfg.replace(dataset_args={**cfg.dataset_args, "levels": ()}))[1]
    assert train.labels.shape[1] == test.labels.shape[1] == 3 and (test.meta.part == "gallery").sum() == 18
    assert (test.labels == -1).any() and (train.labels >= 0).all()
    found = [evaluate_run(cfg, read_data(cfg, (train, part)), z)["mAP@100"] for part in (test, plain)]
    assert found[0] == found[1]


@pytest.mark.parametrize("name",
                         ["happier/dyml-vehicle-f", "happier/sop-csl", "roadmap/inat-resnet50-xbm",
                          "roadmap/inshop-resnet50-smoothap"])
def test_a_whole_run(name, trees, tmp_path):
    "All batches of two epochs, and what is written."
    changes = {"sampler_args": {"batches_per_pair": 1}} if recipe(name).fields["sampler"] == "hierarchical" else {}
    cfg = shortened(name, trees, **changes)
    result = T.run(cfg, tmp_path, device="cpu", progress=False, workers=0)
    assert json.loads((result.path / "metrics.json").read_text()) == result.metrics
    assert set(wanted(name)) <= set(result.metrics)
    assert len(result.history) == 2
    assert T.RunConfig.from_dict(json.loads((result.path / "config.json").read_text())) == cfg
    assert T.run(cfg, tmp_path, device="cpu", progress=False).key == result.key


def test_bf16_trains_too(trees):
    "Mixed precision on the CPU, in place of float16."
    cfg = shortened("happier/sop-f", trees).replace(precision="bf16")
    losses = []
    for c in (cfg, cfg.replace(precision="no")):
        trainer, batches = build_trainer(c, read_data(c), make_accelerator("cpu", c.precision))
        trainer.fit(OneStep(batches))
        losses.append(trainer.history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-2) and losses[0] != losses[1]


def test_every_dataset_is_used(): assert {recipe(n).fields["dataset"] for n in NAMES} == set(MAKE)
