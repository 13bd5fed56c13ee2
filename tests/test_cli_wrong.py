"""Wrong command lines: each gets the right exit status, words that help, no traceback, and nothing is trained.

A row is a command line and words of its answer. Rows of `WRONG` are wrong use (status 2), rows of `FAILED` are
requests that make sense and cannot be done (status 1). `{name}` stands for a file of the fixture `world`.
"""
import json, re, shlex, shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hapnb.cli import main
from toy_study import STUDY, write_study

TRAIN = ("train --dataset toy --trunk toy --image-size 32 --embed-dim 8 --batch-size 24 --epochs 1 --device cpu "
         "--workers 0 --store {store}")
TOY = "features --trunk toy --image-size 32 --dataset toy --device cpu --out {new}.parquet"
CLUSTER = "cluster {test} --device cpu"
EVALUATE = "evaluate {good} --device cpu"
ROUNDS = "openworld --dry-run --dataset toy --device cpu --store {store}"

WRONG = [
    # ---- the command line itself
    ("", "a command is required"),
    ("reprodce", "Did you mean 'reproduce'"),
    ("Train", "Did you mean 'train'"),
    ("--verzion", "unknown command"),
    ("train --los x", "Did you mean '--loss'"),
    ("train --epoch 3", "Did you mean '--epochs'"),
    ("train extra", "does not take 'extra'"),
    ("train --epochs", "expected one argument"),
    ("reproduce --profil quick", "Did you mean '--profile'"),
    ("doctor --datset cub", "Did you mean '--dataset'"),
    ("evaluate a b", "does not take 'b'"),
    ("features", "--out"),
    ("cluster", "required: file"),
    ("train --dry-run=yes", "ignored explicit argument"),

    # ---- reproduce and studies
    ("reproduce wroks", "Did you mean 'works'"),
    ("reproduce 77", "unknown study '77'"),
    ("reproduce --profile quik", "Did you mean 'quick'"),
    ("reproduce --profile ''", "unknown profile ''"),
    ("reproduce --dataset emojy", "Did you mean 'emoji'"),
    ("reproduce --dataset folder", "data_dir is missing"),
    ("reproduce --dataset folder --data-dir nbs", "--dataset folder: "),
    ("reproduce --data-dir /nowhere", "no such file or folder"),
    ("reproduce --device gpu", "unknown device"),
    ("reproduce --device meta", "device 'meta'"),
    ("reproduce --engine ray", "not available yet"),
    ("reproduce --engine locl", "Did you mean 'local'"),
    ("reproduce --seeds 0", "'0' is not a whole number from 1"),
    ("reproduce --seeds -1", "'-1' is not a whole number"),
    ("reproduce --seeds 1000000", "from 1 to 1,000"),
    ("reproduce --jobs two", "'two' is not a whole number"),
    ("reproduce --jobs 100000", "from 1 to 4,096"),
    ("reproduce --jobs 2.5", "'2.5' is not a whole number"),
    ("reproduce --store ''", "give the name of a folder"),
    ("studies --store ' '", "give the name of a folder"),

    # ---- train: names and places
    ("train --loss HAPIERLoss", "Did you mean 'HAPPIERLoss'"),
    ("train --loss ''", "unknown loss"),
    ("train --loss pml/TripletMarginLos", "Did you mean 'TripletMarginLoss'"),
    ("train --sampler m_per_clas", "Did you mean 'm_per_class'"),
    ("train --dataset soop --dry-run", "Did you mean 'sop'"),
    ("train --dataset sop", "data_dir is missing"),
    ("train --dataset sop --data-dir nowhere", "no such file or folder"),
    ("train --dataset table --data-dir settings.ini", "settings.ini"),
    ("train --recipe happier/sopp", "Did you mean 'happier/sop'"),
    ("train --list --recipe hapier", "hapier"),
    ("train --device gpu", "unknown device"),
    ("train --device cuda:99", "cuda"),
    ("train --dry-run --dataset toy --device gpu", "unknown device"),
    ("train --workers -1", "'-1' is not a whole number from 0"),
    ("train --workers 100000", "from 0 to 1,024"),
    ("train --store ''", "give the name of a folder"),
    (f"{TRAIN} --trunk resnet35", "unknown trunk"),
    (f"{TRAIN} --pretrained nowhere.pt", "nowhere.pt"),

    # ---- train: numbers and words
    ("train --epochs ten", "'ten' is not a whole number"),
    ("train --epochs 1.5", "'1.5' is not a whole number"),
    ("train --epochs -1", "0 or more"),
    ("train --epochs NaN", "'NaN' is not a whole number"),
    ("train --lr fast", "'fast' is not a number"),
    ("train --lr NaN", "lr"),
    ("train --lr Infinity", "lr"),
    ("train --lr -0.1", "lr"),
    ("train --lr true", "'true' is not a number"),
    ("train --batch-size 1", "2 or more"),
    ("train --batch_size 1", "2 or more"),
    ("train --batch-size '[24]'", "'[24]' is not a whole number"),
    ("train --bn-affine maybe", "'maybe' is not true or false"),
    ("train --embed-dim 0", "1 or more"),
    ("train --embed-dim 10000000000", "embed_dim"),
    ("train --image-size 1000000", "image_size"),
    ("train --image-size 0", "1 or more"),
    ("train --seed -1", "0 or more"),
    ("train --seed 1e400", "'1e400' is not a whole number"),
    ("train --epochs " + "9" * 5000, "is not a whole number"),
    ("train --split tets", "Did you mean 'test'"),
    ("train --freeze all", "freeze"),
    ("train --precision fp8", "precision"),
    ("train --optimizer adm", "Did you mean 'adam'"),
    ("train --schedule cosin", "Did you mean 'cosine'"),
    ("train --decode half", "decode"),
    ("train --clip-norm 0", "clip_norm"),
    ("train --weight-decay -1", "weight_decay"),
    ("train --miner Easy", "pml/"),
    ("train --relevance pip", "Did you mean 'pop'"),
    ("train --packed 0", "packed"),
    ("train --packed-format jpeg200 --packed 64", "jpeg"),
    ("train --packed-format webp", "packed"),
    ("train --freeze-blocks 2", "freeze_blocks"),
    (f"{TRAIN} --pooling av", "Did you mean 'avg'"),
    (f"{TRAIN} --norm layer", "layernorm"),
    (f"{TRAIN} --init white", "Did you mean 'whitening'"),
    (f"{TRAIN} --init whitening --embed-dim none", "projection"),
    (f"{TRAIN} --batch-size 1000", "batch_size=1000"),
    (f"{TRAIN} --batch-size 1000 --dry-run", "batch_size=1000"),
    (f"{TRAIN} --levels 7", "level 7 does not exist"),
    (f"{TRAIN} --levels hue", "level"),

    # ---- train: dictionaries
    ("train --loss-args tau=1", "is not JSON"),
    ("train --loss-args '[1]'", "is not a JSON object"),
    ("train --loss-args 3", "is not a JSON object"),
    ("train --loss-args '{\"tau\": 1, \"tau\": 2}'", "a name is there twice"),
    ("train --loss-args '{\"tau\": NaN}'", "NaN is not a number in JSON"),
    ("train --loss-args '{\"tau\": Infinity}'", "Infinity is not a number in JSON"),
    ("train --loss-args {deep}", "nested too deeply"),
    ("train --trunk-args {deep}", "nested too deeply"),
    ("train --dataset-args {deep}", "nested too deeply"),
    ("train --schedule-args {list}", "nested too deeply"),
    ("train --ks {list}", "nested too deeply"),
    ("train --relevance {deep}", "nested too deeply"),
    (f"{TRAIN} --loss-args '{{\"tua\": 1}}'", "'tua'"),
    (f"{TRAIN} --loss SupAPLoss --loss-args '{{\"tau\": \"x\"}}'", "tau"),
    (f"{TRAIN} --loss SupAPLoss --loss-args '{{\"tau\": 0}}'", "tau"),
    (f"{TRAIN} --loss SupAPLoss --loss-args '{{\"level\": 9}}'", "level 9 does not exist"),
    (f"{TRAIN} --loss SupAPLoss --loss-args '{{\"tau\": [1]}}'", "tau"),
    (f"{TRAIN} --sampler-args '{{\"mm\": 4}}'", "'mm'"),
    (f"{TRAIN} --sampler-args '{{\"m\": \"4\"}}'", "m"),
    (f"{TRAIN} --sampler-args '{{\"m\": 0}}'", "m"),
    (f"{TRAIN} --dataset-args '{{\"hue\": 4}}'", "Did you mean 'hues'"),
    (f"{TRAIN} --dataset-args '{{\"hues\": \"many\"}}'", "hues"),
    (f"{TRAIN} --transform '{{\"crop\": 3}}'", "crop"),
    (f"{TRAIN} --freeze none --augment '{{\"flip_p\": 1}}'", "flip_p"),
    (f"{TRAIN} --augment '{{\"flip\": 0.5}}'", "augment has no effect"),
    (f"{TRAIN} --trunk-args '{{\"dropout\": 1}}'", "dropout"),
    (f"{TRAIN} --schedule-args '{{\"total\": \"x\"}}'", "total"),
    (f"{TRAIN} --schedule-args '{{\"totl\": 3}}'", "Did you mean 'total'"),
    (f"{TRAIN} --schedule multistep --schedule-args '{{\"milestones\": 3}}'", "milestones"),
    (f"{TRAIN} --schedule step", "size"),
    (f"{TRAIN} --schedule step --schedule-args '{{\"size\": 0}}'", "size"),
    (f"{TRAIN} --optimizer-args '{{\"beta\": 1}}'", "Did you mean 'betas'"),
    (f"{TRAIN} --optimizer-args '{{\"betas\": 1}}'", "betas"),
    (f"{TRAIN} --optimizer sgd --optimizer-args '{{\"betas\": [0.9, 0.9]}}'", "betas"),
    (f"{TRAIN} --groups '{{\"hed\": {{\"lr\": 1}}}}'", "Did you mean 'head'"),
    (f"{TRAIN} --groups '{{\"head\": {{\"rl\": 1}}}}'", "'rl'"),
    (f"{TRAIN} --groups '{{\"head\": {{\"lr\": \"x\"}}}}'", "lr"),
    (f"{TRAIN} --groups '{{\"head\": {{\"lr\": -1}}}}'", "lr"),
    (f"{TRAIN} --groups '{{\"head\": 3}}'", "head"),
    (f"{TRAIN} --groups '{{\"loss.none\": {{\"lr\": 1}}}}'", "loss"),
    (f"{TRAIN} --memory '{{\"sise\": 100}}'", "Did you mean 'size'"),
    (f"{TRAIN} --memory '{{\"size\": 3}}'", "memory"),
    (f"{TRAIN} --memory '{{\"size\": \"trian\"}}'", "Did you mean 'train'"),
    (f"{TRAIN} --memory '{{\"size\": 1000000000000000}}'", "memory"),
    (f"{TRAIN} --memory '{{\"weight\": 1}}'", "size"),
    (f"{TRAIN} --miner-args '{{\"margin\": 1}}'", "miner"),
    (f"{TRAIN} --ks 0", "k"),
    (f"{TRAIN} --ks one", "ks"),
    (f"{TRAIN} --ks 1,100000", "100000"),
    (f"{TRAIN} --metrics R@1,mAPP", "mAPP"),
    (f"{TRAIN} --eval-levels 5", "level"),
    (f"{TRAIN} --relevance '{{\"kind\": \"map\", \"weights\": [1, 2, 3]}}'", "weights"),
    (f"{TRAIN} --relevance '{{\"kind\": \"pop\", \"alpa\": 1}}'", "alpa"),
    (f"{TRAIN} --protocol '{{\"kind\": \"random\"}}'", "random"),
    (f"{TRAIN} --protocol '{{\"kind\": \"random-gallery\", \"repeat\": 3}}'", "repeat"),
    (f"{TRAIN} --protocol '{{\"kind\": \"query-gallery\"}}'", "query"),
    (f"{TRAIN} --protocol '{{\"repeats\": 3}}'", "kind"),

    # ---- evaluate
    ("evaluate", "either a file of embeddings or --run KEY"),
    ("evaluate {good} --run abc", "either a file"),
    ("evaluate --run abc --labels {labels}", "--labels is for a file"),
    ("evaluate --run abc --levels fine", "--levels is for a file"),
    ("evaluate --run abc --store empty", "0 finished runs"),
    ("evaluate --run '' --store {store}", "give the key of a finished run"),
    ("evaluate --run / --store {store}", "give the key of a finished run"),
    ("evaluate --run .. --store {store}", "give the key of a finished run"),
    ("evaluate --run '*' --store {store}", "give the key of a finished run"),
    ("evaluate none.npz", "none.npz"),
    ("evaluate nbs", "nbs"),
    ("evaluate settings.ini", "unknown kind of file"),
    ("evaluate {damaged}", "cannot be read"),
    ("evaluate {no_labels}", "has no labels"),
    ("evaluate {no_embeddings}", "embeddings"),
    ("evaluate {short}", "2 embeddings"),
    ("evaluate {objects}", "cannot be read"),
    ("evaluate {nan}", "NaN"),
    ("evaluate {tree}", "tree"),
    ("evaluate {complex}", "real numbers"),
    ("evaluate {scalar}", "shape"),
    ("evaluate {dates}", "labels"),
    ("evaluate {no_labels} --labels none.csv", "none.csv"),
    ("evaluate {no_labels} --labels {good_table} --levels fien", "Did you mean 'fine'"),
    (f"{EVALUATE} --ks a", "whole numbers with commas"),
    (f"{EVALUATE} --ks 0", "whole numbers with commas"),
    (f"{EVALUATE} --ks 1,,2", "whole numbers with commas"),
    (f"{EVALUATE} --ks ²", "whole numbers with commas"),
    (f"{EVALUATE} --relevance pip", "Did you mean 'pop'"),
    (f"{EVALUATE} --relevance '{{'", "is not JSON"),
    (f"{EVALUATE} --relevance '{{\"kind\": \"pop\", \"alpha\": \"x\"}}'", "alpha"),
    (f"{EVALUATE} --relevance {{deep}}", "nested too deeply"),
    ("evaluate {good} --device meta", "device 'meta'"),
    ("evaluate --run {key} --store {store} --device gpu", "unknown device"),
    ("evaluate --run {key} --store {store} --relevance '{\"kind\": \"map\", \"weights\": [1]}'", "weights"),

    # ---- features
    ("features --out {new}.parquet", "either --run KEY or --trunk"),
    ("features --trunk toy --run a --out {new}.parquet", "either --run"),
    ("features --run '' --out {new}.parquet --store {store}", "give the key of a finished run"),
    ("features --run abc --out {new}.parquet", "0 finished runs"),
    ("features --run {key} --store {store} --pooling avg --out {new}.parquet", "--pooling is for --trunk"),
    ("features --trunk toy --dataset toy --out {new}.csv", "ends in .parquet"),
    (f"{TOY} --trunk resnet35", "unknown trunk"),
    (f"{TOY} --dataset toi", "Did you mean 'toy'"),
    (f"{TOY} --split tets", "Did you mean 'test'"),
    (f"{TOY} --levels hues", "Did you mean 'hue'"),
    (f"{TOY} --image-size 0", "'0' is not a whole number from 1"),
    (f"{TOY} --image-size 1000000", "from 1 to 8,192"),
    (f"{TOY} --pooling mean", "pooling"),
    (f"{TOY} --device meta", "device 'meta'"),
    (f"{TOY} --dataset folder --data-dir nowhere", "no such file or folder"),

    # ---- cluster
    ("cluster none.parquet", "no such file of features"),
    ("cluster settings.ini", "settings.ini"),
    (f"{CLUSTER} --method kmean", "Did you mean 'kmeans'"),
    (f"{CLUSTER} --method kmeans", "give --clusters N, or --train LABELLED.parquet"),
    (f"{CLUSTER} --method kmeans --clusters 999", "choose 1 to 144"),
    (f"{CLUSTER} --method kmeans --clusters 0", "'0' is not a whole number"),
    (f"{CLUSTER} --method hilander", "give --train LABELLED.parquet"),
    (f"{CLUSTER} --clusters 5", "by itself"),
    (f"{CLUSTER} --tau 0.5", "--tau is for hilander"),
    (f"{CLUSTER} --tau 0", "--tau is for hilander"),
    (f"{CLUSTER} --tau 2", "from 0 to 1"),
    (f"{CLUSTER} --tau nan", "from 0 to 1"),
    (f"{CLUSTER} --k 0", "'0' is not a whole number"),
    (f"{CLUSTER} --seed -1", "'-1' is not a whole number"),
    (f"{CLUSTER} --method kmeans --clusters 3 --model x", "--model is for hilander"),
    (f"{CLUSTER} --model nowhere", "nowhere"),
    (f"{CLUSTER} --model a --train b", "either --train or --model"),
    (f"{CLUSTER} --model a --epochs 3", "goes with --train"),
    (f"{CLUSTER} --train other.parquet", "other.parquet"),
    (f"{CLUSTER} --train {{other}}", "5 dimensions"),
    (f"{CLUSTER} --train {{bare}} --method agglomerative", "has no labels to learn from"),
    (f"{CLUSTER} --train {{train}} --method kmeans --clusters 3", "and --clusters is given"),
    (f"{CLUSTER} --train {{train}} --method agglomerative --args '{{\"threshold\": 0.1}}'", "and threshold is given"),
    (f"{CLUSTER} --level hu", "Did you mean 'hue'"),
    (f"{CLUSTER} --args tau=1", "is not JSON"),
    (f"{CLUSTER} --args '[1]'", "is not a JSON object"),
    (f"{CLUSTER} --args {{deep}}", "nested too deeply"),
    (f"{CLUSTER} --args '{{\"min_size\": 3}}'", "Did you mean 'min_cluster_size'"),
    (f"{CLUSTER} --args '{{\"min_cluster_size\": \"x\"}}'", "min_cluster_size"),
    (f"{CLUSTER} --args '{{\"min_cluster_size\": 0}}'", "min_cluster_size"),
    (f"{CLUSTER} --out c.txt", "ends in .parquet or .csv"),
    ("cluster {test} --device gpu", "unknown device"),

    # ---- openworld
    (f"{ROUNDS} --set clusterer=kmean", "Did you mean 'kmeans'"),
    (f"{ROUNDS} --set base.los=x", "Did you mean 'loss'"),
    (f"{ROUNDS} --set round=3", "Did you mean 'rounds'"),
    (f"{ROUNDS} --set rounds", "write KEY=VALUE"),
    (f"{ROUNDS} --set =3", "write KEY=VALUE"),
    (f"{ROUNDS} --set a..b=3", "write KEY=VALUE"),
    (f"{ROUNDS} --set rounds.x=1", "not a dictionary"),
    (f"{ROUNDS} --set rounds=two", "rounds"),
    (f"{ROUNDS} --set rounds=-1", "rounds"),
    (f"{ROUNDS} --set decode.tau=x", "tau"),
    (f"{ROUNDS} --set decode={{list}}", "nested too deeply"),
    (f"{ROUNDS} --set 'select=[1]'", "select"),
    (f"{ROUNDS} --set 'select={{\"mode\": \"al\"}}'", "'all'"),
    (f"{ROUNDS} --set 'split={{\"labelled\": \"no.txt\", \"unlabelled\": \"u.txt\"}}'", "no.txt"),
    (f"{ROUNDS} --recipe pss/inatt", "Did you mean 'pss/inat'"),
    (f"{ROUNDS} --rounds 0", "'0' is not a whole number from 1"),
    (f"{ROUNDS} --dataset emojy", "Did you mean 'emoji'"),
    (f"{ROUNDS} --data-dir nowhere", "no such file or folder"),
    (f"{ROUNDS} --device gpu", "unknown device"),

    # ---- doctor
    ("doctor --dataset cubb", "Did you mean 'cub'"),
    ("doctor --data-dir nbs", "give --dataset NAME too"),
    ("doctor --dataset-args '{\"size\": \"large\"}'", "give --dataset NAME too"),
    ("doctor --dataset vehicleid --dataset-args '{\"size\"'", "is not JSON"),
    ("doctor --dataset vehicleid --dataset-args '[1]'", "is not a JSON object"),
    ("doctor --dataset sop --data-dir nowhere", "no such file or folder"),
]

FAILED = [
    ("train --dataset toy --store settings.ini", "cannot write"),
    ("reproduce works --store settings.ini", "cannot write"),
    (f"{TOY} --out settings.ini/f.parquet", "cannot write"),
    (f"{CLUSTER} --out settings.ini/f.csv", "cannot write"),
    ("doctor --dataset folder", None),
    ("evaluate --run {flipped_metrics} --store {store}", "metrics.json"),
    ("evaluate --run {flipped_embeddings} --store {store} --ks 1", "embeddings.safetensors"),
    ("evaluate --run {flipped_config} --store {store} --ks 1", "config.json"),
    ("features --run {flipped_weights} --store {store} --split all --out {new}.parquet --device cpu", "weights"),
]


def flip(path):
    "Change one bit in the middle of a file."
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damaged_runs(store, key):
    "Copies of a finished run, each with one bit of one file flipped; names as the table calls them."
    names = dict(metrics="metrics.json", embeddings="embeddings.safetensors", config="config.json",
                 weights="weights.safetensors")
    for i, name in enumerate(names.values()):
        shutil.copytree(store / key, store / f"dead{i}")
        flip(store / f"dead{i}" / name)
    return {f"flipped_{n}": f"dead{i}" for i, n in enumerate(names)}


def files_of_embeddings(folder):
    "Files that `evaluate` reads or refuses."
    x, y = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32), np.arange(12) // 2
    made = dict(good=dict(embeddings=x, labels=y), no_labels=dict(embeddings=x), no_embeddings=dict(labels=y),
                short=dict(embeddings=x[:2], labels=y[:1]), nan=dict(embeddings=x * np.nan, labels=y),
                objects=dict(embeddings=x, labels=np.array([{}] * 12, object)),
                tree=dict(embeddings=x[:3], labels=[[0, 0], [0, 1], [1, 1]]),
                complex=dict(embeddings=x + 1j, labels=y), scalar=dict(embeddings=np.float32(1), labels=y),
                dates=dict(embeddings=x, labels=y.astype("datetime64[D]")))
    for name, arrays in made.items(): np.savez(folder / f"{name}.npz", **{k: np.asarray(v) for k, v in arrays.items()})
    (folder / "damaged.npz").write_bytes((folder / "good.npz").read_bytes()[:100])
    pd.DataFrame(dict(fine=y, coarse=y // 2)).to_csv(folder / "good_table.csv", index=False)
    return {p.stem: p for p in folder.iterdir()}


def tables_of_features(folder):
    "Files that `cluster` reads or refuses."
    from hapnb.features import FeatureTable, write_features
    for split in ("train", "test"):
        assert main(["features", "--trunk", "toy", "--image-size", "32", "--dataset", "toy", "--split", split,
                     "--out", str(folder / f"{split}.parquet"), "--device", "cpu"]) == 0
    dims = pd.read_parquet(folder / "test.parquet").embedding[0].size
    write_features(FeatureTable(torch.eye(5), torch.arange(5)), folder / "other.parquet")
    write_features(FeatureTable(torch.randn(9, dims)), folder / "bare.parquet")
    return {p.stem: p for p in folder.glob("*.parquet")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A project with a study, a store with a finished run and damaged copies, and files; name -> what stands for it."
    root = tmp_path_factory.mktemp("world")
    write_study(root / "nbs/studies/10_works.ipynb", STUDY, ["1"])
    (root / "settings.ini").write_text("")
    store, arrays, tables = (root / n for n in ("store", "arrays", "tables"))
    arrays.mkdir()
    assert main(shlex.split(TRAIN.format(store=store))) == 0
    key = next(store.glob("*/metrics.json")).parent.name
    names = {**files_of_embeddings(arrays), **tables_of_features(tables), **damaged_runs(store, key)}
    deep = '{"a":' * 100_000
    return dict(names, root=root, store=store, key=key, new=root / "new", labels=arrays / "good_table.csv", deep=deep,
                list="[" * 100_000)


@pytest.fixture
def ask(world, monkeypatch, capsys):
    "Call the command in the project: (status, output, errors); fails where anything is trained."
    def no_training(*args, **kw): raise AssertionError("a step was trained")
    monkeypatch.setattr(torch.optim.Adam, "step", no_training)
    monkeypatch.setattr(torch.optim.SGD, "step", no_training)
    monkeypatch.chdir(world["root"])
    monkeypatch.delenv("HAPNB_FORCE", raising=False)
    def run(line):
        words = [re.sub(r"\{(\w+)\}", lambda m: str(world.get(m[1], m[0])), w) for w in shlex.split(line)]
        return main(words), *capsys.readouterr()
    return run


def name_of(value): return value[:60] if isinstance(value, str) else None


@pytest.mark.parametrize("line, words", WRONG, ids=name_of)
def test_wrong_use_is_status_2_and_one_line_that_helps(ask, world, line, words):
    status, out, err = ask(line)
    assert status == 2, (status, err[-600:])
    assert words in err and err.startswith("hapnb: ") and len(err.strip().splitlines()) == 1, err[-600:]
    assert "Traceback" not in err and "bug in hapnb" not in err and "epoch" not in out and len(err) < 2500
    assert not list(world["root"].glob("new*")) and not list(world["store"].glob("*/state*"))


@pytest.mark.parametrize("line, words", FAILED, ids=name_of)
def test_what_cannot_be_done_is_status_1_and_says_why(ask, line, words):
    status, out, err = ask(line)
    assert status == 1, (status, err[-600:])
    assert (words or "") in err and "Traceback" not in err and "bug in hapnb" not in err and "epoch" not in out


def test_at_least_150_wrong_command_lines_are_tried():
    lines = [line for line, _ in WRONG + FAILED]
    assert len(set(lines)) == len(lines) >= 150
