"""The profile `paper` of the studies, on small trees in the official layouts.

A study's own cells make its grid, and every run of it trains two steps (one batch of each of two epochs). For one dataset of each study the runs are
also evaluated and kept, and the rest of the notebook reads them. Smaller than on the real data: images, batch, trunk, epochs, the number of seeds.
Weights are random and precision is full, because the CPU has no float16."""
import itertools, json
from pathlib import Path

import layouts_fine
import matplotlib
import numpy as np
import pytest
from test_recipes_run import MAKE, OneStep, grown

import hapnb.data, hapnb.study as study, hapnb.train as T
from hapnb.recipes import recipe

ROOT = Path(__file__).resolve().parents[1]
SIZE = 32  # side of the crops
STUDIES = {"10_benchmark": ("sop", "inat-base", "inat-full", "cub", "inshop"), "40_happier_tables": ("dyml-vehicle", "sop", "inat-base", "inat-full", "dyml-animal", "dyml-product"),
           "41_happier_ablation": ("sop", "inat-base", "inat-full", "dyml-vehicle", "dyml-animal", "dyml-product"), "42_roadmap_tables": ("sop", "cub", "inat-base", "inshop"),
           "43_roadmap_ablation": ("sop", "cub", "inat-base", "inshop"), "44_smoothap": ("vehicleid", "inat-base", "sop")}  # the first is tried as a whole


@pytest.fixture(scope="module")
def trees(tmp_path_factory): return grown(tmp_path_factory, {**MAKE, "sop": sop})


def sop(root):
    "Stanford Online Products with as many classes as the measurements of the studies ask for."
    kinds = ("bicycle", "chair", "coffee_maker")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(layouts_fine, "SOP", {"train": {i + 1: kinds[i % 3] for i in range(18)}, "test": {11319 + i: kinds[i % 3] for i in range(18)}})
        return layouts_fine.make_sop(root, 4)


def shortened(cfg):
    "A run of the profile paper, at a size for one core."
    m = cfg.sampler_args.get("m", 4)
    side = {"resize": round(cfg.augment["resize"] * SIZE / cfg.image_size)} if "resize" in cfg.augment else {}
    return cfg.replace(trunk="toy", trunk_args={}, pretrained=False, image_size=SIZE, augment={**cfg.augment, **side}, batch_size=4 * m if cfg.sampler == "hierarchical" else 8 if cfg.batch_size < 128 else 12,
                       precision="no", epochs=min(cfg.epochs, 2), warmup_epochs=min(cfg.warmup_epochs, 1), ks=[k for k in cfg.ks if k <= 4 or cfg.dataset.startswith("dyml") and k <= 20])


class Enough(Exception): "The grid has been made, and tried."


def two_steps(cfg):
    "Train; the history has two rows with finite losses, and something learns."
    if not cfg.epochs: return
    trainer, batches = T.build_trainer(cfg, T.load_splits(cfg)[0], T.make_accelerator("cpu"))
    trainer.fit(OneStep(batches))
    assert len(trainer.history) == 2 and all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in trainer.history)


@pytest.fixture
def execute(tmp_path, trees, monkeypatch):
    "Execute a study's cells: function (study, profile, dataset, what to do with the first grid, **parameters) -> all grids."
    load = hapnb.data.load
    monkeypatch.setattr(hapnb.data, "load", lambda name, split="test", **args: load(name, split, **(args if name == "emoji" else {"counts": False} | args)))
    T._load_once.cache_clear()

    def go(name, profile, dataset, run, **parameters):
        grids = []
        def noted(self, configs, **args): grids.append(configs); return run(self, configs, **args)
        monkeypatch.setattr(study.Study, "run", noted)
        cells = [c for c in json.loads((ROOT / f"nbs/studies/{name}.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        space = {"__name__": "study"}
        with matplotlib.rc_context():
            matplotlib.use("agg")
            for c in cells:
                try: exec(compile("".join(c["source"]), f"{name} {c['id']}", "exec"), space)
                except Enough: break
                if "parameters" in c["metadata"].get("tags", []):
                    space |= dict(profile=profile, dataset=dataset, data_dir="" if dataset == "emoji" else trees(dataset), device="cpu", store=str(tmp_path / "runs"), out=str(tmp_path / "out"), jobs=1, **parameters)
            matplotlib.pyplot.close("all")
        return grids
    yield go
    T._load_once.cache_clear()


def the_recipe(name, dataset, trunk="resnet50"):
    "The recipe that a study of a dataset stands on."
    if name[:2] in ("40", "41"): return recipe(f"happier/{dataset}").config()
    if name[:2] == "44": return recipe(f"smoothap/{dataset.removesuffix('-base')}").config()
    if name[:2] == "10" and dataset not in ("cub", "inshop"): return recipe(f"happier/{dataset}").config()
    return recipe(f"roadmap/{dataset.removesuffix('-base')}-{trunk}").config()


CASES = [(n, d, "resnet50") for n, ds in STUDIES.items() for d in ds] + [("42_roadmap_tables", d, "deit") for d in ("cub", "sop", "inat-base")]


@pytest.mark.parametrize("name, dataset, trunk", CASES)
def test_every_run_of_the_grid_trains(execute, name, dataset, trunk):
    def run(self, configs, **args):
        small = {}
        for c in configs: small.setdefault(shortened(c), c)
        for c in small: two_steps(c)
        raise Enough
    [grid] = execute(name, "paper", dataset, run, seeds=1, **({"trunk": trunk} if trunk != "resnet50" else {}))
    wanted = the_recipe(name, dataset, trunk)
    for field in ("dataset", "trunk", "pretrained", "freeze", "image_size", "optimizer", "lr", "weight_decay", "schedule", "precision", "augment", "transform"):
        assert {getattr(c, field) for c in grid} == {getattr(wanted, field)}, field
    assert {c.epochs for c in grid} <= {0, wanted.epochs} and wanted.batch_size in {c.batch_size for c in grid} and len(set(grid)) > 5


@pytest.mark.parametrize("name", STUDIES)
def test_the_whole_notebook(execute, name, tmp_path, monkeypatch):
    "All cells, with results of two steps for each run."
    epoch = T.ImageBatches.epoch
    monkeypatch.setattr(T.ImageBatches, "epoch", lambda self, e, start=0: itertools.islice(epoch(self, e, start), 1))
    monkeypatch.setattr(study, "_do", lambda todo, names, store, *_: {k: study._work(c, store, "cpu", lambda *a, **kw: T.run(*a, **kw, workers=0)) for k, c in todo.items()})
    def run(self, configs, **args):
        rows = study.run_grid(study.Grid([shortened(c) for c in configs], configs.labels), **{"store": self.store, "device": "cpu", **args})
        assert not (rows["error"] != "").any(), rows["error"][rows["error"] != ""].iloc[0]
        sizes = [c.batch_size for c in configs]
        return rows.assign(batch_size=sizes) if len(set(sizes)) > 1 else rows
    execute(name, "paper", STUDIES[name][0], run, seeds=1)
    claims = json.loads((tmp_path / "out/claims.json").read_text())
    assert {c["verdict"] for c in claims if "one seed" in c["value"]} == {"not tested here"} and not any("failed" in c["value"] for c in claims)
    assert all("profile paper" in c["measured"] for c in claims if "one seed" in c["value"])
    assert "profile paper" in (tmp_path / "out/main.md").read_text() and len(list((tmp_path / "out").glob("*.png"))) >= 3


@pytest.mark.parametrize("name", ["10_benchmark", "43_roadmap_ablation"])
def test_without_a_gpu_the_reason_is_told(execute, name, monkeypatch):
    "All runs stop at once, and so does the study, with their words."
    monkeypatch.setattr(study, "_do", lambda todo, names, store, *_: {k: study._work(c, store, "cpu", None) for k, c in todo.items()})
    def run(self, configs, **args): return study.run_grid(configs, **{"store": self.store, "device": "cpu", **args})
    with pytest.raises(study.RunError, match="^all [0-9]+ runs failed(.|\n)*precision='fp16' needs a GPU"): execute(name, "paper", "sop", run, seeds=1)


def test_the_benchmark_shares_its_runs(execute):
    "What the comparisons of HAPPIER and of ROADMAP have too, by the same name, is the same run."
    def run(self, configs, **args): raise Enough
    found = {n: execute(n, "quick", "emoji", run)[0] for n in ("10_benchmark", "40_happier_tables", "42_roadmap_tables")}
    named = {n: {(l["loss"], c.seed): c for l, c in zip(g.labels, g)} for n, g in found.items()}
    mine, others = named["10_benchmark"], named["40_happier_tables"] | named["42_roadmap_tables"]
    assert len(mine) == 14 * 3 + 1 and set(mine) <= set(others)
    for key, cfg in mine.items(): assert cfg == others[key], key
    search = [set(execute(n, "full", "emoji", run)[0]) for n in ("10_benchmark", "42_roadmap_tables")]  # of learning rates
    assert len(search[0]) == 5 * 7 and search[0] < search[1] and {c.split for c in search[0]} == {"val"}


def test_supap_of_inaturalist_has_the_constants_of_inaturalist(execute):
    "In the comparison with ROADMAP, SupAP alone is ROADMAP without its calibration and nothing else."
    def run(self, configs, **args): raise Enough
    for dataset, wanted in (("inat-base", (0., 1.)), ("cub", (0.5, 1.44))):
        [grid] = execute("42_roadmap_tables", "paper", dataset, run, seeds=1)
        found = {l["loss"]: c for l, c in zip(grid.labels, grid)}
        assert {n: (found[n].loss_args["start"], found[n].loss_args["offset"]) for n in ("SupAP", "ROADMAP")} == {"SupAP": wanted, "ROADMAP": wanted}
        assert set(found["ROADMAP"].loss_args) - set(found["SupAP"].loss_args) == {"weight", "pos_margin", "neg_margin", "average"} and found["Triplet"].loss_args == {}
