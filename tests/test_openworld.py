"""Open-world rounds: the parts, what is selected, the state on disk, and that labels of the pool never leak."""
import functools, json, os, shutil, subprocess, sys, warnings
from collections import Counter
from pathlib import Path

import layouts_hier
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import hapnb.features
import hapnb.train as T
from hapnb import emoji, openworld as ow, openworld_recipes as recipes, openworld_report as report, selection, study
from hapnb import batches, build, runs
from hapnb.bundled import read_bundled
from hapnb.clustering import clustering_scores
from hapnb.config import RunConfig, load_splits, thaw
from hapnb.datasets import deal_open_world
from hapnb.data import load
from hapnb.hilander import HiLanderConfig

TOY = dict(dataset="toy", dataset_args={"hues": 24}, trunk="toy", image_size=32, epochs=10, batch_size=24, embed_dim=16,
           loss="SmoothAPLoss", lr=1e-2, sampler_args={"m": 2}, ks=(1, 2))
SMALL = dict(hidden=16, edge_hidden=8, epochs=30, lr=6e-3, k=(4,), levels=(2,))
CFG = ow.OpenWorldConfig(base=TOY, hilander=SMALL, decode=dict(k=4, tau=.5), select=dict(threshold=.1), rounds=3)


def quiet(cfg, store, **args): return ow.run_rounds(cfg, store, device="cpu", progress=False, workers=0, **args)


@pytest.fixture(scope="module")
def result(tmp_path_factory): return quiet(CFG, tmp_path_factory.mktemp("store"))


# ---- parts

def test_the_bundled_cut_is_the_general_rule():
    frame = read_bundled("emoji")[0].drop_columns(["image"]).to_pandas()
    assert emoji.open_world_parts(frame) == frame.open_world.tolist()
    fit = frame[frame.split == "fit"].sample(frac=1, random_state=0)
    # whatever the order
    assert deal_open_world(fit.concept.tolist(), fit.subgroup.tolist(), fit.source.tolist()) == fit.open_world.tolist()


def test_parts_of_the_bundled_images():
    for split, n in (("val", 1074), ("test", 6320)):
        parts = ow.load_parts(ow.OpenWorldConfig(base=ow.BASE | dict(split=split)))
        meta = parts.whole.meta.open_world.to_numpy()
        assert (len(parts.labelled), len(parts.pool), int(parts.known.sum()), len(parts.test)) == (1162, 4172, 601, n)
        assert set(meta[parts.labelled]) == {"labelled"}
        assert (parts.known == (meta[parts.pool] == "unlabelled known")).all()
        assert parts.left_out == (1074 if split == "test" else 0)


def test_a_rule_for_any_dataset():
    parts = ow.load_parts(CFG)
    y = parts.whole.labels[:, 0].numpy()
    assert len(parts.labelled) + len(parts.pool) == len(parts.whole) and len(set(y[parts.labelled])) == 12
    assert set(np.bincount(y[parts.labelled])) - {0} == {5}  # three fifths of 8, rounded up
    more = ow.load_parts(CFG.replace(split=dict(known=.5, labelled=1.)))
    assert len(set(y[more.labelled])) == 18 and set(np.bincount(y[more.labelled])) == {0, 8} and not more.known.any()
    assert not np.array_equal(ow.load_parts(CFG.replace(split=dict(salt="another"))).labelled, parts.labelled)


def inat(root, **changes):
    "An iNaturalist tree with lists: labelled are 3 of 4 images of the first 4 training species."
    layouts_hier.make_inat(root)
    names = sorted((root / "Inat_dataset_splits/Inaturalist_train_set1.txt").read_text().split())
    species = sorted({n.split("/")[2] for n in names})
    by = {s: [n for n in names if n.split("/")[2] == s] for s in species}
    lists = dict(labelled=[n for s in species[:4] for n in by[s][:3]])
    lists["unlabelled"] = [n for n in names if n not in lists["labelled"]]
    for k, v in lists.items(): (root / f"{k}.txt").write_text("\n".join(v) + "\n")
    base = TOY | dict(dataset="inat-base", dataset_args={"counts": False}, data_dir=str(root), batch_size=8, **changes)
    return CFG.replace(base=base, split=dict(labelled="labelled.txt", unlabelled="unlabelled.txt")), lists


def test_label_lists(tmp_path):
    cfg, lists = inat(tmp_path)
    parts = ow.load_parts(cfg)
    paths = np.array(ow.image_paths(parts.whole))
    assert sorted(paths[parts.labelled]) == sorted(lists["labelled"])
    assert sorted(paths[parts.pool]) == sorted(lists["unlabelled"])
    assert parts.known.sum() == 4
    alone = ow.load_parts(cfg.replace(split=dict(labelled="labelled.txt")))  # the rest is the pool
    assert np.array_equal(alone.pool, parts.pool)
    assert cfg.key() == cfg.replace(split=dict(labelled=str(tmp_path / "labelled.txt"))).key()  # contents count
    part = ow.load_parts(cfg.replace(base={**cfg.to_dict()["base"], "split": "val",
                                           "dataset_args": {"counts": False, "val": 2}}))
    assert 0 < len(part.pool) < len(parts.pool) and part.left_out == 0


@pytest.mark.parametrize("spoil, message", [
    (lambda l: l["labelled"].append("train_val2018/Aves/1/none.jpg"),
     r"labelled.txt, line 13: 'train_val2018/Aves/1/none.jpg' is not among the training images"),
    (lambda l: l["labelled"].insert(2, l["labelled"][0]),
     r"labelled.txt, line 3: '.*' is there twice, first in line 1"),
    (lambda l: l["unlabelled"].insert(1, l["labelled"][4]),
     r"unlabelled.txt, line 2: '.*' is labelled too \(.*labelled.txt, line 5\)"),
    (lambda l: l["unlabelled"].append(l["test"]), r"unlabelled.txt, line 17: '.*' is an image for testing"),
    (lambda l: l.update(labelled=[]), r"labelled.txt names no image")])
def test_damaged_lists(tmp_path, spoil, message):
    cfg, lists = inat(tmp_path)
    lists["test"] = (tmp_path / "Inat_dataset_splits/Inaturalist_test_set1.txt").read_text().split()[0]
    spoil(lists)
    for k in ("labelled", "unlabelled"): (tmp_path / f"{k}.txt").write_text("\n".join(lists[k]) + "\n")
    with pytest.raises(ValueError, match=message): ow.load_parts(cfg)


def test_missing_and_empty(tmp_path):
    cfg, lists = inat(tmp_path)
    with pytest.raises(OSError, match="none.txt"): ow.load_parts(cfg.replace(split=dict(labelled="none.txt")))
    with pytest.raises(ValueError, match="no unlabelled images"):
        ow.load_parts(CFG.replace(split=dict(known=1., labelled=1.)))
    (tmp_path / "unlabelled.txt").write_text("\n".join(lists["unlabelled"][:4]))
    with pytest.raises(ValueError, match=r"pool has 4 images, and 4 neighbours.*decode=\{'k': 3\}"):
        quiet(cfg, tmp_path / "store")
    # before a training, not after
    for few, message in ((lists["labelled"][:3], "there are 1, the largest of 3"),
                         (lists["labelled"][::3], "there are 4, the largest of 1")):
        (tmp_path / "few.txt").write_text("\n".join(few))
        with pytest.raises(ValueError, match=f"needs two classes, one of them with two images; {message}"):
            quiet(cfg.replace(split=dict(labelled="few.txt")), tmp_path / "store")
    assert not (tmp_path / "store").exists()


# ---- features of parts

def test_features_of_parts_are_computed_once(monkeypatch):
    cfg, calls = RunConfig.from_dict(TOY), []
    whole, test = load_splits(cfg)
    real = build._features
    monkeypatch.setattr(build, "_IN_MEMORY", {})
    monkeypatch.setattr(build, "_features", lambda c, d, *a: calls.append(d) or real(c, d, *a))
    part = whole.subset([5, 1, 9, 1], share=True, relabel=True)
    x = build.features_of(cfg, part)
    assert torch.equal(build.features_of(cfg, ow.training_part(whole, [5, 1, 9, 1], torch.tensor([4, 4, 2, 2]))), x)
    assert torch.equal(x, build.features_of(cfg, whole)[[5, 1, 9, 1]])
    assert torch.equal(build.features_of(cfg, part.subset([2])), x[2:3])
    assert calls == [whole]
    build.features_of(cfg, whole.subset([5, 1]))  # a part that was not told to share is a dataset like any other
    assert len(calls) == 2
    assert part.fingerprint == whole.subset([5, 1, 9, 1], relabel=True).fingerprint
    assert cfg.key((part, test)) == cfg.key((whole.subset([5, 1, 9, 1], relabel=True), test))


def test_parts_read_the_packed_copy_of_the_whole(tmp_path, monkeypatch):
    "One copy of the training images and one of the test images for any number of parts; the same pixels as without."
    monkeypatch.setenv("HAPNB_CACHE", str(tmp_path / "cache"))
    base = {**TOY, "freeze": "bn", "epochs": 1, "lr": 1e-4, "packed": 40}
    r = quiet(CFG.replace(base=base, select=dict(mode="all"), rounds=2), tmp_path / "store")
    assert len(list((tmp_path / "cache/packed").glob("*.arrow"))) == 2
    assert r.rounds["images"].is_monotonic_increasing
    assert r.rounds["selected"][0] > 0
    cfg = RunConfig.from_dict(base)
    whole, _ = load_splits(cfg)
    part = ow.training_part(whole, [5, 80, 9, 5], torch.tensor([4, 4, 2, 2]))
    small = batches._pack(cfg, part)
    assert [small.image(i).tobytes() for i in range(4)] == [whole.image(i).tobytes() for i in (5, 80, 9, 5)]
    assert torch.equal(small.labels, part.labels)
    assert small.store.path == batches._pack(cfg, whole).store.path
    assert small.fingerprint not in (part.fingerprint, batches._pack(cfg,
                                                                     whole.subset([5, 80], share=True)).fingerprint)
    assert [small.store.name(int(i)) for i in small.index] == [whole.store.name(int(whole.index[i]))
                                                               for i in (5, 80, 9, 5)]


def test_training_part():
    whole = load("toy", "train")
    part = ow.training_part(whole, [3, 40, 4, 80], torch.tensor([7, 30, 7, 12]), {7: "disc 00"})
    assert part.labels[:, 0].tolist() == [0, 2, 0, 1]
    assert part.class_names == [["disc 00", "class 12", "class 30"]]
    assert part.labels.shape == (4, 1)
    assert [part.image(i).tobytes() for i in range(4)] == [whole.image(i).tobytes() for i in (3, 40, 4, 80)]
    assert part.fingerprint != ow.training_part(whole, [3, 40, 4, 80], torch.tensor([7, 30, 30, 12])).fingerprint
    assert ow.never_drawn(torch.tensor([0, 0, 0, 0, 1, 1, 3]), RunConfig()) == 3
    assert ow.never_drawn(torch.tensor([0, 1]), RunConfig(sampler="balanced")) == 0


# ---- choosing

def test_distance_and_closeness_against_loops():
    g = torch.Generator().manual_seed(0)
    z, known = (F.normalize(torch.randn(n, 5, generator=g, dtype=torch.double), dim=1) for n in (30, 40))
    y, c = torch.randint(0, 6, (40,), generator=g) * 3, torch.randint(-1, 8, (30,), generator=g)
    means = [F.normalize(known[y == k].mean(0), dim=0) for k in y.unique()]
    assert torch.allclose(ow.class_distance(z, known, y, block=7),
                          torch.stack([min((1 - a @ m) / 2 for m in means) for a in z]))
    want = [-1. if c[i] < 0 or (c == c[i]).sum() < 2 else float(z[i] @ F.normalize(sum(z[j] for j in range(30)
        if j != i and c[j] == c[i]), dim=0)) for i in range(30)]
    assert torch.allclose(ow.closeness(z, c), torch.tensor(want))


def test_distances_to_many_classes_need_little_memory():
    from torch.utils._python_dispatch import TorchDispatchMode
    class Largest(TorchDispatchMode):
        most = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            if torch.is_tensor(out): self.most = max(self.most, out.numel())
            return out
    z = F.normalize(torch.randn(1500, 2, generator=torch.Generator().manual_seed(0)), dim=1)
    known = torch.eye(2).repeat(2 ** 14, 1)
    with Largest() as seen: far = ow.class_distance(z, known, torch.arange(2 ** 15))
    assert torch.allclose(far, (1 - z.amax(1)) / 2, atol=1e-6) and seen.most <= 2 ** 25  # not 1,500 x 32,768


def test_selection_by_hand():
    c, d = torch.tensor([0, 0, 1, 1, 2, -1, 0]), torch.tensor([.9, .8, .7, .2, .95, 1., .1])
    pick = lambda far=None, **s: ow.select_samples(c, d, far, s)[1].tolist()
    assert pick(threshold=.5) == [0, 0, 1, -1, 2, -1, -1]
    assert pick(threshold=.8) == [0, -1, -1, -1, 2, -1, -1]  # above, not at
    assert pick(threshold=.5, smallest=2) == [0, 0, -1, -1, -1, -1, -1]
    assert pick(mode="all") == [0, 0, 1, 1, 2, -1, 0] and pick(mode="all", smallest=3) == [0, 0, -1, -1, -1, -1, 0]
    assert pick(share=3 / 7) == [0, -1, -1, -1, 2, -1, -1]  # noise is among the three surest, and is not taken
    assert pick(torch.tensor([.1, .2, .3, .9, .15, 1, 1]), threshold=.5, distance=.15) == [-1, 0, 1, -1, -1, -1, -1]
    again = lambda rows: torch.tensor([5, 5, 6, 6])[:len(rows)]
    assert ow.select_samples(c, d, None, dict(mode="recluster", threshold=.5), again)[1].tolist() == [5, 5, 6, -1, 6,
        -1, -1]
    assert pick(threshold=2.) == [-1] * 7
    with pytest.raises(ValueError, match="give distance=class_distance"): pick(threshold=.5, distance=.1)
    with pytest.raises(ValueError, match="needs again="): pick(threshold=.5, mode="recluster")


@pytest.mark.parametrize("select, message", [(dict(treshold=.5), "Did you mean 'threshold'"),
                                             (dict(mode="desity", threshold=.5),
                                              "must be 'density', 'recluster' or 'all'"),
                                             ({"mode": "density"}, "needs a threshold of density or a share"),
                                             (dict(threshold=.5, share=.5), "one of the two"),
                                             (dict(mode="all", threshold=.5), "belong to mode 'density'"),
                                             (dict(share=0), "'share' must be greater than 0"),
                                             (dict(threshold=.5, smallest=0), "smallest"),
                                             (dict(threshold=float("nan")), "NaN|nan|finite")])
def test_bad_selections(select, message):
    with pytest.raises(ValueError, match=message): CFG.replace(select=select)


@pytest.mark.parametrize("changes, message", [
    (dict(clusterer="kmean"), "Did you mean 'kmeans'"), (dict(rounds=0), "'rounds' must be"),
    (dict(pool_labels="truth"), "must be 'predicted' or 'true'"),
    (dict(base={**TOY, "seed": 3}), "OpenWorldConfig.seed"),
    (dict(finetune={"split": "val"}), "belongs to base"), (dict(finetune={"weigth_decay": 1.}),
                                                           "Did you mean 'weight_decay'"),
                                                           (dict(base={**TOY, "levels": (0, 1)}), "levels=None"),
                                                           (dict(hilander={"hiden": 3}), "Did you mean 'hidden'"),
                                                           (dict(hilander={"attention": "no"}),
                                                            "'attention' must be a valid boolean"),
    (dict(split={"label": "x"}), "Did you mean 'labelled'"), (dict(split={"unlabelled": "x"}),
                                                              "needs a list of labelled"),
                                                              (dict(split={"labelled": "x", "known": .5}),
                                                               "one or the other"),
                                                               (dict(decode={"kk": 3}), "Did you mean 'k'"),
    (dict(decode={"tau": 7}), "'tau' must be less than or equal to 1"),
    (dict(decode={"distance": "probs"}), "must be 'prob' or 'sim'"),
    (dict(clusterer="hdbscan", cluster_args={"min_size": 3}), "Did you mean 'min_cluster_size'"),
    (dict(clusterer="hdbscan", cluster_args={"clusters": 3}), "cluster_args: hdbscan finds the number"),
    (dict(clusterer="hdbscan", cluster_args={"min_cluster_size": 1}), "cluster_args: 'min_cluster_size' must be"),
    (dict(clusterer="kmeans", cluster_args={"clusters": 0}), "1 or more"),
    (dict(clusterer="kmeans", cluster_args={"clusters": 9, "points_per_cluster": 2}), "cluster_args: .*either"),
    (dict(clusterer="kmeans", cluster_args={"init": "rnd"}), "cluster_args: 'init' must be"),
    (dict(base=3), "must be a valid dictionary")])
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message): CFG.replace(**changes)


def test_config_is_a_plain_value():
    cfg = ow.OpenWorldConfig.from_dict(json.loads(json.dumps(CFG.to_dict())))
    assert cfg == CFG and hash(cfg) == hash(CFG) and cfg.key() == CFG.key()
    keys = {CFG.replace(**c).key() for c in (dict(seed=1), dict(rounds=2), dict(clusterer="kmeans"),
                                             dict(finetune={"lr": .5}), dict(select=dict(threshold=.4)),
                                             dict(split={"salt": "x"}), dict(base={**TOY, "lr": .5}))}
    assert len(keys | {CFG.key()}) == 8
    with pytest.raises(ValueError, match="Did you mean 'rounds'"): ow.OpenWorldConfig.from_dict(dict(round=3))
    assert [CFG.hilander_config(r).seed for r in (0, 1)] == [CFG.replace(rounds=2).hilander_config(r).seed
                                                             for r in (0, 1)]
    assert CFG.hilander_config(0).seed != CFG.hilander_config(1).seed


def test_defaults_that_are_not_in_the_key():
    "An empty dict means the defaults, so other defaults need another SCHEMA, or old results would be read back."
    import hashlib, inspect
    decoding = {p.name: p.default for p in inspect.signature(ow.cluster_hilander).parameters.values()
                if p.name in ("k", "tau", "distance", "max_levels", "early_stop")}
    known = json.dumps([ow.SCHEMA, HiLanderConfig().to_dict(), decoding, ow.SELECT,
                        selection.Select(threshold=0).model_dump() | dict(threshold=None)], sort_keys=True)
    assert hashlib.sha256(known.encode()).hexdigest()[:16] == "180ec45df98f4de4", \
        "defaults have changed: raise hapnb.openworld.SCHEMA, then write the new hash here"


# ---- the rounds

def test_the_loop(result):
    parts, n = ow.load_parts(CFG), None
    before = None
    for r in range(2):
        s = result.selection(r)
        assert s["row"].tolist() == [*parts.labelled, *parts.pool]
        assert (s["mask"] == 1).equals(s["selected"])
        assert ((s["pseudo_label"] < 0) == (s["mask"] == 2)).all()
        assert s["selected"].any()
        assert ((s["density"] > .1) == s["selected"])[s["mask"] > 0].all()
        assert s["cluster"][s["mask"] == 0].eq(-1).all()
        T_classes = s["pseudo_label"][s["mask"] == 0]
        new = s[s["selected"]]
        # ids are shifted, not numbered again
        assert (new["pseudo_label"] - new["cluster"]).unique().tolist() == [T_classes.max() + 1]
        if before is None: assert (s["mask"] == 0).sum() == len(parts.labelled) and T_classes.nunique() == 12
        else:  # what was selected is trained on, under the same class
            assert ((s["mask"] == 0) == (before["mask"] < 2)).all()
            assert (T_classes == before["pseudo_label"][before["mask"] < 2]).all()
        before = s
        row = result.rounds.loc[r]
        z, chosen = result.embeddings(r), s["selected"].to_numpy()
        y = parts.whole.labels[:, 0].numpy()[s["row"].to_numpy()]
        assert row["selected"] == chosen.sum()
        assert row["pool"] == (s["mask"] > 0).sum()
        assert row["selected_total"] == (s["mask"] == 0).sum() - len(parts.labelled) + chosen.sum()
        out = (s["mask"] > 0).to_numpy() & ~np.isin(y, y[:len(parts.labelled)])
        assert row["bcubed_F_out"] == clustering_scores(y[out], s["cluster"][out])["bcubed_F"]
        assert row["points_out"] == out.sum()
        groups = pd.Series(y[chosen]).groupby(s["pseudo_label"][chosen].to_numpy())
        most = sum(np.bincount(g).max() for _, g in groups)
        assert row["selected_precision"] == pytest.approx(most / chosen.sum())
        far = ow.class_distance(z[(s["mask"] > 0).to_numpy(copy=True)], z[(s["mask"] == 0).to_numpy(copy=True)],
                                torch.tensor(T_classes.tolist()))
        assert np.allclose(s["distance"][s["mask"] > 0], far)
    with pytest.raises(ValueError, match="rounds 0, 1 did"): result.selection(2)
    with pytest.raises(ValueError, match="rounds 0 to 2"): result.selection(3)
    with pytest.raises(ValueError, match="round 2 of .* embedded nothing"): result.embeddings(2)


def test_metrics_are_flat(result):
    m, rows = result.metrics, result.rounds
    for r in range(3):
        assert m[f"R@1_level0_round{r}"] == rows["R@1_level0"][r] == result.training(r).metrics["R@1_level0"]
        assert m[f"H-AP_round{r}"] == rows["H-AP"][r]
    assert {"selected_round1", "selected_precision_round1", "pairwise_F_in_round1", "bcubed_F_out_round1",
            "bcubed_F_labelled_round0", "NMI_all_round0", "V_selected_round1"} <= set(m)
    assert "selected_round2" not in m
    assert m["H-AP"] == m["H-AP_round2"] and all(isinstance(v, (int, float)) for v in m.values())
    assert rows["classes"].is_monotonic_increasing
    assert rows["pseudo_classes"][0] == 0
    assert rows["images"][1] == rows["images"][0] + rows["selected"][0]
    assert "| round |" in result._repr_markdown_() and result.key in repr(result)


def test_read_back_and_round_zero_is_shared(result, tmp_path):
    store = result.path.parent
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()}
    assert quiet(CFG, store).metrics == result.metrics
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()} == before
    one = quiet(CFG.replace(rounds=1), store)  # supervised only
    assert one.rounds["run"][0] == result.rounds["run"][0]
    assert len(one.rounds) == 1
    assert one.metrics["H-AP"] == result.metrics["H-AP_round0"]
    with pytest.raises(ValueError, match="no round did"): one.selection(0)
    with pytest.raises(FileNotFoundError, match="no finished run"): ow.OpenWorldResult(tmp_path)


def test_where_it_was_made_is_kept(result):
    assert {"torch", "commit", "device", "threads"} <= set(result.environment)
    assert result.environment["device"] == "cpu"
    assert result.environment["data"]["images"] == 288
    assert result.training(0).environment["torch"] in study.made_by("smoke", "toy", store=result.path.parent,
                                                                    keys=[result.key])


def test_one_process_only(tmp_path, result, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process.*without a launcher"): quiet(CFG, tmp_path)
    assert not list(tmp_path.iterdir())
    assert quiet(CFG, result.path.parent).metrics == result.metrics  # a finished run is read by all


def contents(result):
    "Every file of a run's folder, locks left out."
    files = (p for p in sorted(result.path.rglob("*")) if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(result.path).as_posix(): p.read_bytes() for p in files}


STAGES = ("training.json", "embeddings.safetensors", "hilander", "clusters.parquet", "selection.parquet",
          "metrics.json")

@pytest.mark.parametrize("when", [f"{w} round_{r}/{s}" for r, w in ((0, "before"), (1, "after")) for s in STAGES])
def test_a_run_that_is_stopped_at_any_stage_ends_with_the_same_bytes(result, tmp_path, monkeypatch, when):
    moment, name = when.split()
    def stopping(real, at):
        def f(*args):
            hit = str(args[at]).endswith(name)
            if hit and moment == "before": raise KeyboardInterrupt
            out = real(*args)
            if hit: raise KeyboardInterrupt
            return out
        return f
    monkeypatch.setattr(ow, "_stage", stopping(ow._stage, 1))
    monkeypatch.setattr(ow, "_write_json", stopping(ow._write_json, 0))
    with pytest.raises(KeyboardInterrupt): quiet(CFG, tmp_path)
    monkeypatch.undo()
    assert contents(quiet(CFG, tmp_path)) == contents(result)


@pytest.mark.parametrize("what", ["step", "epoch"])
def test_a_run_that_is_stopped_within_a_training_ends_with_the_same_bytes(result, tmp_path, monkeypatch, what):
    "In the middle of a training, and of Hi-LANDER's."
    import hapnb.hilander as H
    owner, name = (T.Trainer, "step") if what == "step" else (H._Training, "run_epoch")
    real, calls = getattr(owner, name), []
    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 20: raise KeyboardInterrupt
        return real(self, *args)
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt): quiet(CFG, tmp_path)
    monkeypatch.undo()
    assert contents(quiet(CFG, tmp_path)) == contents(result)


KILLER = """
import functools, os, signal, sys, traceback
import accelerate, faiss, pyarrow.parquet, timm, torch  # what a run imports on its way, here once for all
import hapnb.models, hapnb.protocols, hapnb.samplers, test_openworld as t
from hapnb import openworld as ow
store, *points = sys.argv[1:]
torch.set_num_threads(1)

def killed(moment, name, real=os.replace):
    "Run until a file gets its name, and be killed before or after that."
    def replace(a, b):
        if (hit := str(b).endswith(name)) and moment == "before": os.kill(os.getpid(), signal.SIGKILL)
        real(a, b)
        if hit: os.kill(os.getpid(), signal.SIGKILL)
    os.replace = replace
    if "state" in name:  # a checkpoint at each step and epoch
        ow.run, ow.train_hilander = (functools.partial(f, save_every=0) for f in (ow.run, ow.train_hilander))
    t.quiet(t.CFG, store)

for point in points:
    if not (pid := os.fork()):  # nothing was computed yet in this process, so a fork is safe, and it has all modules
        try: killed(*point.split())
        except BaseException: traceback.print_exc()
        os._exit(1)
    print(point, "killed" if os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL else "missed", flush=True)
"""

@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has neither fork nor SIGKILL")
def test_killed_again_and_again(result, tmp_path):
    "SIGKILL within trainings and around renames, one after the other in one store; then the same bytes, nothing else."
    points = ["after state.pt", "before weights.safetensors", "after round_0/training.json",
              "before round_0/embeddings.safetensors", "after .state", "before round_0/hilander",
              "after round_0/hilander",
              "after round_0/clusters.parquet", "before round_0/selection.parquet", "after round_1/training.json",
              "before round_1/hilander", "after round_2/metrics.json", f"before {result.key}/metrics.json"]
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    out = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path), *points], capture_output=True, text=True,
                         env=env)
    assert out.stdout.splitlines() == [f"{p} killed" for p in points], out.stderr[-2000:]
    assert list(tmp_path.rglob(".*.part"))  # of the last one
    assert contents(quiet(CFG, tmp_path)) == contents(result) and not list(tmp_path.rglob(".*.part"))
    for name in ("weights.safetensors", "embeddings.safetensors", "metrics.json"):
        mine, whole = ({p.parent.name: p.read_bytes() for p in s.glob(f"*/{name}")}
                       for s in (tmp_path, result.path.parent))
        assert len(mine) >= 3 and mine.items() <= whole.items()


def test_stages_that_runs_share_are_copied(result, tmp_path, monkeypatch):
    "Another threshold, tau or Hi-LANDER: unchanged stages are those of the first run, with the bytes of a run alone."
    one, made = tmp_path / "one", []
    shutil.copytree(result.path.parent, one)
    def counted(real): return functools.wraps(real)(lambda *a, **k: made.append(real.__name__) or real(*a, **k))
    for name in ("extract_features", "train_hilander", "cluster_hilander"):
        monkeypatch.setattr(ow, name, counted(getattr(ow, name)))
    first = CFG.replace(rounds=1, last_selection=True)
    others = dict(threshold=(first.replace(select=dict(threshold=.3)), {}),
                  tau=(first.replace(decode=dict(k=4, tau=.7)), dict(cluster_hilander=2)),
                  hilander=(first.replace(hilander=SMALL | dict(epochs=31)),
                            dict(train_hilander=1, cluster_hilander=2)),
                  embedding=(first.replace(base=TOY | dict(epochs=9)),
                             dict(extract_features=1, train_hilander=1, cluster_hilander=2)))
    for name, (cfg, work) in others.items():
        made.clear()
        r = quiet(cfg, one)
        assert Counter(made) == work, name
        assert contents(r) == contents(quiet(cfg, tmp_path / name))
    for model in one.glob("*/round_0/hilander/hilander.safetensors"):
        model.write_bytes(model.read_bytes()[:-20])  # a copy of something damaged is not used
    made.clear()
    r = quiet(first.replace(decode=dict(k=4, tau=.6)), one)
    assert Counter(made) == dict(train_hilander=1, cluster_hilander=2)
    assert contents(r) == contents(quiet(r.config, tmp_path / "alone"))


def flipped(path, at):
    "Change one bit of a file."
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_any_file_of_a_finished_run_is_named_by_its_reader(result, tmp_path):
    shutil.copytree(result.path.parent, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / result.key
    def read_everything():
        r = ow.OpenWorldResult(folder)
        r.config, r.environment, r.rounds
        for n in range(2): r.selection(n), r.embeddings(n), r.training(n)
    read_everything()
    read = [n for n in contents(result) if n.count("/") < 2 and not n.endswith(("training.json", "clusterer.json"))]
    read = [n for n in read if not (folder / n.removesuffix(".json")).exists() or not n.endswith(".json")]
    # a bit of the manifest makes a file look damaged that is whole, and never the other way round
    read.remove("manifest.json")
    assert len(read) == 12  # three files of the run, three metrics, and three files of each round with a selection
    for name in read:
        whole = (folder / name).read_bytes()
        flipped(folder / name, len(whole) // 2)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            read_everything()
        (folder / name).write_bytes(whole)
    (folder / "round_0/clusters.parquet").unlink()
    with pytest.raises(ValueError, match="clusters.parquet is missing: run hapnb.openworld.run_rounds"):
        read_everything()


@pytest.mark.parametrize("name", ["metrics.json", "config.json", "environment.json", "manifest.json",
    "round_0/embeddings.safetensors", "round_0/embeddings.safetensors.json", "round_0/hilander/hilander.safetensors",
    "round_1/clusters.parquet", "round_0/selection.parquet", "round_1/training.json", "round_0/metrics.json"])
def test_damaged_files_of_a_finished_run_are_made_again(result, tmp_path, name):
    shutil.copytree(result.path.parent, tmp_path, dirs_exist_ok=True)
    path = tmp_path / result.key / name
    for spoil in (lambda: flipped(path, 30), lambda: path.write_bytes(path.read_bytes()[:-5]), path.unlink):
        spoil()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert contents(quiet(CFG, tmp_path)) == contents(result)


def test_stages_of_another_dataset_are_made_again(result, tmp_path):
    other = CFG.replace(base={**TOY, "dataset_args": {"hues": 24, "seed": 5}}, rounds=2)
    shutil.copytree(result.path / "round_0", tmp_path / other.key() / "round_0")
    with pytest.warns(RuntimeWarning, match="made from other settings or data"): r = quiet(other, tmp_path)
    assert contents(r) == contents(quiet(other, tmp_path / "alone"))


def test_a_damaged_state_of_a_training_is_not_used(result, tmp_path, monkeypatch):
    import hapnb.hilander as H
    real = H._Training.run_epoch
    def stopped(self):
        if self.epoch == 15: raise KeyboardInterrupt
        return real(self)
    monkeypatch.setattr(H._Training, "run_epoch", stopped)
    monkeypatch.setattr(ow, "train_hilander", functools.partial(ow.train_hilander, save_every=0))
    with pytest.raises(KeyboardInterrupt): quiet(CFG, tmp_path)
    monkeypatch.undo()
    state, = tmp_path.rglob(".hilander-*.state")
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.warns(RuntimeWarning, match="Hi-LANDER starts again"): again = quiet(CFG, tmp_path)
    assert contents(again) == contents(result) and not state.exists()


def test_nothing_above_the_threshold(tmp_path, capsys):
    cfg = CFG.replace(select=dict(threshold=1.5), rounds=4)
    r = ow.run_rounds(cfg, tmp_path, device="cpu", workers=0)
    assert "no image of 228 was selected (mode density, threshold 1.5" in capsys.readouterr().out
    assert r.rounds["stopped"].tolist() == [0, 1, 1, 1]
    assert r.rounds["why"].str.contains("no image of").all()
    assert r.rounds["H-AP"].nunique() == 1
    assert r.metrics["selected_round0"] == 0
    assert r.metrics["H-AP_round3"] == r.metrics["H-AP"]
    assert r.metrics["stopped_round3"] == 1
    assert "selected_precision_round0" not in r.metrics
    assert contents(quiet(cfg, tmp_path)) == contents(r) and not r.selection(0)["selected"].any()


def test_the_pool_runs_out(tmp_path):
    r = quiet(CFG.replace(select=dict(mode="all"), rounds=3), tmp_path)
    assert r.rounds["selected"][0] == 228
    assert r.rounds["why"][1] == "0 images are left in the pool, too few for 4 neighbours each"
    assert r.rounds["stopped"].tolist() == [0, 0, 1]


def test_upper_bound(tmp_path):
    r = quiet(CFG.replace(pool_labels="true"), tmp_path)
    assert r.rounds["images"].tolist() == [288] * 3
    assert r.rounds["classes"][0] == 36
    assert r.rounds["H-AP"].nunique() == 1
    assert r.rounds["stopped"].tolist() == [0, 1, 1]
    assert r.training(0).config == CFG.run_config(0)


@pytest.mark.parametrize("clusterer", ["kmeans", "agglomerative", "hdbscan"])
def test_other_clusterers(clusterer, tmp_path):
    r = quiet(CFG.replace(clusterer=clusterer, rounds=2, select={}), tmp_path)
    s, args = r.selection(0), json.loads((r.path / "round_0/clusterer.json").read_text())
    assert set(args) == {dict(kmeans="points_per_cluster", agglomerative="threshold",
                              hdbscan="min_cluster_size")[clusterer]}
    assert 0 < s["selected"].sum() <= 228
    if clusterer == "kmeans": assert s["selected"].sum() <= 114
    if clusterer == "hdbscan": assert (s["selected"] == (s["cluster"] >= 0)).all()
    z, new = r.embeddings(0), (s["mask"] > 0).to_numpy(copy=True)
    assert np.allclose(s["density"][new], ow.closeness(z[new], torch.tensor(s["cluster"][new].to_numpy().copy())),
                       atol=1e-6)


def test_a_number_of_clusters(tmp_path):
    "More clusters than images are left in a later round: as many as images."
    r = quiet(CFG.replace(clusterer="kmeans", cluster_args={"clusters": 150}, select=dict(share=.5)), tmp_path)
    assert json.loads((r.path / "round_1/clusterer.json").read_text()) == {"clusters": 150}
    assert r.rounds["pool"][1] < 150
    assert r.rounds["clusters_pool"][0] == 150
    assert r.rounds["clusters_pool"][1] == r.rounds["pool"][1]


def test_recluster_and_distance(tmp_path, result):
    again = quiet(CFG.replace(select=dict(mode="recluster", threshold=.1), rounds=2), tmp_path)
    assert again.selection(0)["selected"].equals(result.selection(0)["selected"])  # the same images, other classes
    cut = float(result.selection(0)["distance"].quantile(.5))
    far = quiet(CFG.replace(select=dict(threshold=.1, distance=cut), rounds=2), tmp_path).selection(0)
    near = result.selection(0)
    assert (far["selected"] == (near["selected"] & (near["distance"] > np.float32(cut)))).all()
    assert far["selected"].sum() < near["selected"].sum()


# ---- no leaks

def as_table(folder, shuffle):
    "The toy images as files with a table and lists; with `shuffle` the labels of the pool change places."
    whole, test = load_splits(RunConfig.from_dict(TOY))
    parts, rows = ow.load_parts(CFG), []
    for split, ds in (("train", whole), ("test", test)):
        for i in range(len(ds)):
            name = f"{split}/{i:03d}.png"
            (folder / split).mkdir(parents=True, exist_ok=True)
            ds.image(i).save(folder / name)
            rows.append(dict(path=name, hue=ds.class_names[0][ds.labels[i, 0]], split=split))
    frame = pd.DataFrame(rows)
    pool = parts.pool
    if shuffle: frame.loc[pool, "hue"] = frame.loc[np.random.default_rng(0).permutation(pool), "hue"].to_numpy()
    frame.to_csv(folder / "images.csv", index=False)
    for name, own in (("L", parts.labelled), ("U", pool)):
        (folder / f"{name}.txt").write_text("\n".join(frame["path"][own]) + "\n")
    return CFG.replace(base={**TOY, "dataset": "table", "dataset_args": {}, "data_dir": str(folder / "images.csv")},
                       split=dict(labelled=str(folder / "L.txt"), unlabelled=str(folder / "U.txt")))


@pytest.mark.parametrize("clusterer", ["hilander", "kmeans", "agglomerative", "hdbscan"])
def test_labels_of_the_pool_do_not_leak(tmp_path, clusterer):
    a, b = (as_table(tmp_path / n, s).replace(clusterer=clusterer,
                                              select={} if clusterer != "hilander" else CFG.to_dict()["select"])
                                              for n, s in (("a", False), ("b", True)))
    a, b = (quiet(c, tmp_path / "store") for c in (a, b))
    assert a.key != b.key and a.metrics["bcubed_F_pool_round0"] != b.metrics["bcubed_F_pool_round0"]  # only scores know
    for r in range(2):
        assert a.selection(r)["selected"].any()
        pd.testing.assert_frame_equal(a.selection(r), b.selection(r))
    assert a.metrics["H-AP_round2" if "H-AP_round2" in a.metrics else "AP_level0_round2"] == b.metrics["H-AP_round2"
        if "H-AP_round2" in b.metrics else "AP_level0_round2"]


# ---- odd data

def test_a_pool_that_nobody_can_score(tmp_path, monkeypatch, result):
    "Images without any class (-1) are clustered and selected like others; what cannot be known is not scored."
    parts, cfg = ow.load_parts(CFG), CFG.replace(rounds=2)
    def hidden(rows):
        whole = parts.whole.subset(np.arange(len(parts.whole)))
        whole.labels = whole.labels.clone().index_fill_(0, torch.from_numpy(rows), -1)
        whole.fingerprint = f"hidden {len(rows)}"
        return whole
    (tmp_path / "L.txt").write_text("\n".join(np.array(ow.image_paths(parts.whole))[parts.labelled]))
    cfg = cfg.replace(split=dict(labelled=str(tmp_path / "L.txt")))
    monkeypatch.setattr(selection, "load_splits", lambda c: (hidden(parts.pool), parts.test))
    r = quiet(cfg, tmp_path)
    pd.testing.assert_frame_equal(r.selection(0), result.selection(0))
    assert r.rounds["pool"][0] == len(parts.pool)
    assert {"selected_in", "bcubed_F_labelled"} <= set(r.rounds)
    assert not {"selected_precision", "bcubed_F_pool", "bcubed_F_out"} & set(r.rounds)
    assert r.rounds["selected_out"][0] == r.rounds["selected_in"][0] == 0 < r.rounds["selected"][0]
    assert not len(report.found_classes(r, 0))
    with pytest.raises(ValueError, match="pool_labels='true' needs a class, and 228 have none"):
        quiet(cfg.replace(pool_labels="true"), tmp_path)
    monkeypatch.setattr(selection, "load_splits", lambda c: (hidden(parts.labelled[3:5]), parts.test))
    first = ow.image_paths(parts.whole)[parts.labelled[3]]
    with pytest.raises(ValueError, match=f"labelled image needs a class, and 2 have none, first '{first}'"):
        quiet(cfg, tmp_path)
    monkeypatch.setattr(selection, "load_splits", lambda c: (hidden(parts.pool[:9]), parts.test))
    dealt = ow.load_parts(CFG)  # by the rule, an image without a class is in the pool
    assert set(parts.pool[:9]) <= set(dealt.pool) and len(dealt.pool) + len(dealt.labelled) == len(parts.whole)


def test_nan_features_are_named(tmp_path, monkeypatch):
    real, parts = hapnb.features.embed_part, ow.load_parts(CFG)
    def spoilt(*args, **more):
        z = real(*args, **more).clone()
        z[70] = float("nan")
        return z
    monkeypatch.setattr(hapnb.features, "embed_part", spoilt)
    name = parts.whole.store.name(int(parts.whole.index[np.concatenate([parts.labelled, parts.pool])[70]]))
    with pytest.raises(ValueError, match=f"NaN or infinite, first row 70 \\({name}\\)"): quiet(CFG, tmp_path)


def test_copies_in_the_pool(tmp_path):
    cfg, lists = inat(tmp_path)
    twins = lists["unlabelled"][5:8]
    for t in twins[1:]: (tmp_path / t).write_bytes((tmp_path / twins[0]).read_bytes())
    s = quiet(cfg.replace(rounds=2, select=dict(mode="all")), tmp_path / "store").selection(0).set_index("path")
    assert s.loc[twins, "cluster"].nunique() == 1 and s["selected"].sum() == len(lists["unlabelled"])


# ---- grids, recipes, pictures

def test_a_grid_in_worker_processes(tmp_path, result):
    grid = study.grid(CFG.replace(rounds=2), 2, method={"Hi-LANDER": {}, "supervised": {"rounds": 1},
                                                        "k-means": {"clusterer": "kmeans", "select": {}},
                                                        "all labels": {"pool_labels": "true"}})
    rows = study.run_grid(grid, tmp_path, jobs=2, device="cpu", progress=False, runner=ow.run_rounds)
    assert len(rows) == 8 and rows["H-AP"].notna().all() and rows["selected_round0"].notna().sum() == 4
    mine = rows[(rows["method"] == "Hi-LANDER") & (rows["seed"] == 0)].iloc[0]
    assert mine["H-AP_round1"] == result.metrics["H-AP_round1"]
    assert mine["selected_round0"] == result.metrics["selected_round0"]
    assert (rows["H-AP_round0"][rows["method"] == "supervised"].to_numpy()
            == rows["H-AP_round0"][rows["method"] == "k-means"].to_numpy()).all()


@pytest.mark.parametrize("name", ["pss/inat", "pss/inat-vit"])
def test_recipes_on_a_small_tree(name, tmp_path):
    "Two rounds with the recipe's network, loss, sampler, optimiser and clusterer, on few small images."
    cfg, _ = inat(tmp_path)
    small = dict(data_dir=str(tmp_path), dataset_args={"counts": False}, pretrained=False, image_size=32, batch_size=8,
                 epochs=2, ks=(1, 4), sampler_args={"m": 2}, eval_every=0)
    run = recipes.recipe(name).config(base=small, hilander=dict(epochs=2), decode=dict(k=3), select=dict(threshold=-1.),
                                 rounds=2, split=thaw_split(cfg))
    r = quiet(run, tmp_path / "store")
    first, second = r.training(0).config, r.training(1).config
    assert (first.weight_decay, second.weight_decay, first.freeze_blocks) == (4e-4, 1e-3, 11 if "vit" in name else 0)
    assert r.rounds["selected"][0] == 16
    assert r.rounds["images"].tolist() == [12, 28]
    assert set(r.metrics) >= {"R@1_level0_round1", "pairwise_F_out_round0"}

def thaw_split(cfg): return thaw(cfg.split)


def test_recipes_say_where_values_come_from():
    for name, r in recipes.OPEN_WORLD_RECIPES.items():
        def paths(d, at=""):
            return {p for k, v in d.items() for p in (paths(v, f"{at}{k}/") if isinstance(v, dict) and v
                                                      else {f"{at}{k}"})}
        assert paths(r.fields) == set(r.sources)
        assert set(r.sources.values()) <= set(recipes.SOURCES)
        assert "| select / threshold |" in r._repr_markdown_()
    a, b = (recipes.recipe(n).config() for n in ("pss/inat", "pss/inat-vit"))
    assert (a.rounds, a.finetune, a.decode, a.selection()["threshold"], b.selection()["threshold"]) == (5,
        {"weight_decay": 1e-3}, {"k": 9, "tau": 0.9, "distance": "prob"}, 0.8, 0.65)
    assert a.hilander_config(0).to_dict() | {"seed": 0} == HiLanderConfig.published().to_dict()
    assert a.run_config(1).weight_decay == 1e-3
    assert a.run_config(1).epochs == 400
    with pytest.raises(ValueError, match="Did you mean 'pss/inat'"): recipes.recipe("pss/int")


def test_pictures_of_clusters(result):
    table = report.found_classes(result, 0, unseen=False)
    s, y = result.selection(0), result.parts.whole.labels[:, 0].numpy()
    assert table["size"].sum() == s["selected"].sum()
    assert (table["right"].sum() / table["size"].sum()) == pytest.approx(result.rounds["selected_precision"][0])
    unseen = report.found_classes(result, 0)
    assert not set(unseen["label"]) & set(y[result.parts.labelled])
    good, bad = report.pick_clusters(table, 3, 2, 1)
    assert (table.loc[good, "purity"] == 1).all()
    assert (table.loc[bad, "purity"] < 1).all()
    assert len(good) <= 3
    assert len(bad) <= 2
    fig = report.show_clusters(result, 0, good=2, bad=2, columns=5, title="x")
    assert fig.axes[0].images and len(fig.axes[0].images) <= 20
