"""The profile `paper` of the studies, on small folders in the official layouts.

A study's own cells make its grid, and every run of it trains for two steps (one batch in each of two epochs). For one
dataset of each study the runs are also evaluated and kept, and the rest of the notebook reads them. Images, batch,
backbone, epochs and the number of seeds are smaller than on the real data. Weights are random and precision is full,
because the CPU has no float16.
"""
import itertools, json
from pathlib import Path

import layouts_fine
import matplotlib
import numpy as np
import pytest
from test_recipes_run import MAKE, OneStep, grown

import hapnb.data
from hapnb import build, config, grids, runs, study
from hapnb.batches import ImageBatches
from hapnb.recipes import recipe
from hapnb.train import make_accelerator

ROOT = Path(__file__).resolve().parents[1]
SIZE = 32  # side of the crops
DYML = ("dyml-vehicle", "dyml-animal", "dyml-product")
# study -> datasets; the whole notebook runs with the first of them
STUDIES = {"10_benchmark": ("sop", "inat-base", "inat-full", "cub", "inshop"),
           "40_happier_tables": (DYML[0], "sop", "inat-base", "inat-full", *DYML[1:]),
           "41_happier_ablation": ("sop", "inat-base", "inat-full", *DYML),
           "42_roadmap_tables": ("sop", "cub", "inat-base", "inshop"),
           "43_roadmap_ablation": ("sop", "cub", "inat-base", "inshop"),
           "44_smoothap": ("vehicleid", "inat-base", "sop")}


@pytest.fixture(scope="module")
def trees(tmp_path_factory): return grown(tmp_path_factory, {**MAKE, "sop": sop})


def sop(root):
    "Make a Stanford Online Products with as many classes as the measurements of the studies need."
    kinds = ("bicycle", "chair", "coffee_maker")
    classes = {part: {first + i: kinds[i % 3] for i in range(18)} for part, first in (("train", 1), ("test", 11319))}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(layouts_fine, "SOP", classes)
        return layouts_fine.make_sop(root, 4)


def shortened(cfg):
    "Shrink a run of the profile paper to a size for one core."
    side = {"resize": round(cfg.augment["resize"] * SIZE / cfg.image_size)} if "resize" in cfg.augment else {}
    if cfg.sampler == "hierarchical": batch = 4 * cfg.sampler_args.get("m", 4)
    else: batch = 8 if cfg.batch_size < 128 else 12
    most = 20 if cfg.dataset.startswith("dyml") else 4
    return cfg.replace(trunk="toy", trunk_args={}, pretrained=False, image_size=SIZE, augment={**cfg.augment, **side},
                       batch_size=batch, precision="no", epochs=min(cfg.epochs, 2),
                       warmup_epochs=min(cfg.warmup_epochs, 1), ks=[k for k in cfg.ks if k <= most])


class Enough(Exception): "Raised when the grid has been made and tried."


def two_steps(cfg):
    "Train, and assert that the history has two rows with finite losses and non-zero gradients."
    if not cfg.epochs: return
    trainer, batches = build.build_trainer(cfg, build.read_data(cfg), make_accelerator("cpu"))
    trainer.fit(OneStep(batches))
    assert len(trainer.history) == 2 and all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in trainer.history)


@pytest.fixture
def execute(tmp_path, trees, monkeypatch):
    "Give a function that executes a study's cells with `run` in place of `Study.run`, and returns all grids."
    load = hapnb.data.load
    def without_counts(name, split="test", **args):
        return load(name, split, **(args if name == "emoji" else {"counts": False} | args))
    monkeypatch.setattr(hapnb.data, "load", without_counts)
    config._load_once.cache_clear()

    def go(name, profile, dataset, run, **parameters):
        asked = []
        def noted(self, configs, **args):
            asked.append(configs)
            return run(self, configs, **args)
        monkeypatch.setattr(study.Study, "run", noted)
        notebook = json.loads((ROOT / f"nbs/studies/{name}.ipynb").read_text(encoding="utf-8"))
        given = dict(profile=profile, dataset=dataset, data_dir="" if dataset == "emoji" else trees(dataset),
                     device="cpu", store=str(tmp_path / "runs"), out=str(tmp_path / "out"), jobs=1, **parameters)
        space = {"__name__": "study"}
        with matplotlib.rc_context():
            matplotlib.use("agg")
            for c in notebook["cells"]:
                if c["cell_type"] != "code": continue
                try: exec(compile("".join(c["source"]), f"{name} {c['id']}", "exec"), space)
                except Enough: break
                if "parameters" in c["metadata"].get("tags", []): space |= given
            matplotlib.pyplot.close("all")
        return asked
    yield go
    config._load_once.cache_clear()


def the_recipe(name, dataset, trunk="resnet50"):
    "Give the recipe that a study of a dataset starts from."
    if name[:2] in ("40", "41"): return recipe(f"happier/{dataset}").config()
    if name[:2] == "44": return recipe(f"smoothap/{dataset.removesuffix('-base')}").config()
    if name[:2] == "10" and dataset not in ("cub", "inshop"): return recipe(f"happier/{dataset}").config()
    return recipe(f"roadmap/{dataset.removesuffix('-base')}-{trunk}").config()


CASES = [(n, d, "resnet50") for n, ds in STUDIES.items() for d in ds]
CASES += [("42_roadmap_tables", d, "deit") for d in ("cub", "sop", "inat-base")]


@pytest.mark.parametrize("name, dataset, trunk", CASES)
def test_every_run_of_the_grid_trains(execute, name, dataset, trunk):
    def run(self, configs, **args):
        small = {}
        for c in configs: small.setdefault(shortened(c), c)
        for c in small: two_steps(c)
        raise Enough
    [grid] = execute(name, "paper", dataset, run, seeds=1, **({"trunk": trunk} if trunk != "resnet50" else {}))
    wanted = the_recipe(name, dataset, trunk)
    for field in ("dataset", "trunk", "pretrained", "freeze", "image_size", "optimizer", "lr", "weight_decay",
                  "schedule", "precision", "augment", "transform"):
        assert {getattr(c, field) for c in grid} == {getattr(wanted, field)}, field
    assert {c.epochs for c in grid} <= {0, wanted.epochs}
    assert wanted.batch_size in {c.batch_size for c in grid} and len(set(grid)) > 3


@pytest.mark.parametrize("name", STUDIES)
def test_the_whole_notebook_runs_with_the_profile_paper(execute, name, tmp_path, monkeypatch):
    "All cells, with results of two steps for each run."
    epoch = ImageBatches.epoch
    monkeypatch.setattr(ImageBatches, "epoch", lambda self, e, start=0: itertools.islice(epoch(self, e, start), 1))
    def here(*args, **kwargs): return runs.run(*args, **kwargs, workers=0)
    def one_by_one(todo, names, store, *_): return {k: grids._work(c, store, "cpu", here) for k, c in todo.items()}
    monkeypatch.setattr(grids, "_do", one_by_one)
    def run(self, configs, **args):
        small = grids.Grid([shortened(c) for c in configs], configs.labels)
        rows = grids.run_grid(small, **{"store": self.store, "device": "cpu", **args})
        failed = rows["error"][rows["error"] != ""]
        assert not len(failed), failed.iloc[0]
        sizes = [c.batch_size for c in configs]
        return rows.assign(batch_size=sizes) if len(set(sizes)) > 1 else rows
    execute(name, "paper", STUDIES[name][0], run, seeds=1)
    claims = json.loads((tmp_path / "out/claims.json").read_text())
    # one seed judges nothing
    assert claims and {c["verdict"] for c in claims} == {"not testable here"}
    assert all("profile paper" in c["setting"] for c in claims) and not any("failed" in c["note"] for c in claims)
    assert "profile paper" in (tmp_path / "out/main.md").read_text()
    assert len(list((tmp_path / "out").glob("*.png"))) >= 3


@pytest.mark.parametrize("name", ["10_benchmark", "43_roadmap_ablation"])
def test_without_a_gpu_the_study_stops_and_says_why(execute, name, monkeypatch):
    "All runs stop at once, and so does the study, with the message of a run."
    def one_by_one(todo, names, store, *_): return {k: grids._work(c, store, "cpu", None) for k, c in todo.items()}
    monkeypatch.setattr(grids, "_do", one_by_one)
    def run(self, configs, **args):
        # the small gallery has no thousand images
        small = grids.Grid([c.replace(ks=(1, 2)) for c in configs], getattr(configs, "labels", None))
        return grids.run_grid(small, **{"store": self.store, "device": "cpu", **args})
    with pytest.raises(grids.RunError, match="^all [0-9]+ runs failed(.|\n)*precision='fp16' needs a GPU"):
        execute(name, "paper", "sop", run, seeds=1)


def stop(self, configs, **args):
    "Stand in for `Study.run` where only the grid is wanted."
    raise Enough


def test_the_benchmark_shares_its_runs(execute):
    "Published rows but those of eight losses are, to the last field, runs of the comparison of HAPPIER or of ROADMAP."
    benchmark, *others = (execute(n, "quick", "emoji", stop)[0]
                          for n in ("10_benchmark", "40_happier_tables", "42_roadmap_tables"))
    own = ("NormSoftmax, anti-collapse", "Proxy-Anchor", "HIST", "PNP", "moving AP", "Recall@k", "Recall@k, SiMix",
           "HMLC")
    known = [(l["method"], c) for l, c in zip(benchmark.labels, benchmark) if l["constants"] == "published"]
    shared = {c for name, c in known if name not in own}
    assert (len(known), len(shared)) == (22 * 3, 14 * 3)
    assert shared <= set(others[0]) | set(others[1])


def test_supap_of_inaturalist_has_the_constants_of_inaturalist(execute):
    "In the comparison with ROADMAP, SupAP alone is ROADMAP without its calibration and nothing else."
    for dataset, start, offset in (("inat-base", 0., 1.), ("cub", 0.5, 1.44)):
        [grid] = execute("42_roadmap_tables", "paper", dataset, stop, seeds=1)
        args = {l["method"]: dict(c.loss_args) for l, c in zip(grid.labels, grid)}
        for name in ("SupAP", "ROADMAP"): assert (args[name]["start"], args[name]["offset"]) == (start, offset), name
        assert set(args["ROADMAP"]) - set(args["SupAP"]) == {"weight", "pos_margin", "neg_margin", "average"}
        assert args["Triplet"] == {}
