"RunConfig: round trip, checks, keys."

import json, math, os, pickle, subprocess, sys
from types import SimpleNamespace

import pytest

from hapnb import config
from hapnb.config import RunConfig
from runs_kit import cache, ROOT, TOY, PIECES  # noqa: F401 (a fixture)


def test_config_round_trip():
    cfg = TOY.replace(
        groups={"loss": {"lr": 10}},
        schedule="multistep",
        schedule_args={"milestones": [2, 3]},
        clip_norm=1,
        levels=[0, 1],
    )
    assert RunConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == cfg and hash(pickle.loads(pickle.dumps(cfg))) == hash(cfg)
    d = cfg.to_dict()
    d["groups"]["loss"]["lr"] = 3  # a copy
    assert cfg.groups["loss"]["lr"] == 10
    with pytest.raises(TypeError):
        cfg.groups["loss"]["lr"] = 3
    with pytest.raises(AttributeError):
        cfg.lr = 3


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(batchsize=3), "batch_size"),
        (dict(lr="1e-4"), "1.0e-4"),
        (dict(epochs=True), "must be int"),
        (dict(epochs=1.5), "must be int"),
        (dict(loss_args=3), "must be dict"),
        (dict(freeze="trunks"), "'trunk'"),
        (dict(split="tests"), "'test'"),
        (dict(precision="bf17"), "'bf16'"),
        (dict(schedule="cosin"), "'cosine'"),
        (dict(schedule="step"), "schedule_args"),
        (dict(optimizer="adm"), "'adam'"),
        (dict(groups={"heads": {}}), "'head'"),
        (dict(groups={"head": {"lrs": 1}}), "'lr'"),
        (dict(groups={"head": {"lr": "x"}}), "must be a valid number"),
        (dict(batch_size=1), "2 or more"),
        (dict(lr=-1), "0.0 or more"),
        (dict(clip_norm=0), "above 0"),
        (dict(lr=math.nan), "finite"),
        (dict(memory={"sizes": 9}), "'size'"),
        (dict(memory={"weight": 1}), "needs 'size'"),
        (dict(memory={"size": "all"}), "'train'"),
        (dict(memory={"size": 256}), "no more than the batch"),
        (dict(memory={"size": 999.5}), "memory: size"),
        (dict(memory={"size": True}), "memory: size"),
        (dict(memory={"size": 999, "weight": 0}), "greater than 0"),
        (dict(memory={"size": 999, "start_epoch": -1}), "start_epoch"),
        (dict(memory={"size": 999, "unique": 1}), "valid boolean"),
        (dict(memory=9), "must be dict"),
        (dict(miner="TripletMarginMiner"), "'pml/NAME'"),
        (dict(miner_args={"a": 1}), "miner is None"),
        (dict(freeze_blocks=2), "freeze='trunk'"),
        (dict(freeze="bn", freeze_blocks=-1), "0 or more"),
        (dict(packed=0), "1 or more"),
        (dict(packed=64, decode="shrink"), "small already"),
        (dict(packed_format="jpeg"), "packed is None: give packed=256"),
        (dict(packed=64, packed_format="jpg"), "Did you mean 'jpeg'"),
        (dict(packed=64, packed_format="jpeg101"), "jpeg1 to jpeg100"),
        (dict(decode="shrunk"), "'shrink'"),
        (dict(init="whitening", embed_dim=None), "start of the projection"),
        (dict(protocol={"repeats": 3}), "needs a 'kind'"),
        (dict(loss_args={"f": print}), "plain value"),
        (dict(augment={"flip": 0}), "freeze"),
        (dict(relevance="pot"), "'pop'"),
        (dict(seed=-1), "0 or more"),
    ],
)
def test_config_errors(bad, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        RunConfig.from_dict(bad)


def test_key_is_stable_and_sensitive(tmp_path):
    assert TOY.key() == RunConfig.from_dict(TOY.to_dict()).key() == TOY.replace(data_dir=str(tmp_path)).key()
    code = f"from hapnb.train import RunConfig; print(RunConfig.from_dict({TOY.to_dict()!r}).key())"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip()
        == TOY.key()
    )
    changes = [
        dict(seed=1),
        dict(lr=0.02),
        dict(loss="SupAPLoss"),
        dict(loss_args={"lam": 0.2}),
        dict(sampler_args={"m": 2}),
        dict(split="val"),
        dict(epochs=5),
        dict(precision="bf16"),
        dict(dataset_args={"size": 16}),
        dict(groups={"head": {"lr": 1}}),
        dict(ks=[1]),
        dict(relevance={"kind": "pop", "alpha": 2.0}),
        dict(levels=[0]),
        dict(eval_every=1),
        dict(norm=None),
        dict(embed_dim=8),
    ]
    keys = [TOY.key()] + [TOY.replace(**c).key() for c in changes]
    assert len(set(keys)) == len(keys)


KEYS = [  # of schema 2; a change here makes every run again: raise SCHEMA and say so in the change log
    ({}, "bf90497b86af8074"),
    (dict(seed=3), "de578f40045c7abc"),
    (dict(freeze="bn", warmup_epochs=1, augment={"flip": 0.5}, eval_every=1), "1075dc88ca2fc2dd"),
    (dict(micro_batch=8, freeze="bn"), "bd3a508049725d15"),
    (dict(levels=[1], relevance={"kind": "map"}, metrics=["AP_level0"]), "c7c357b5e69a9f9d"),
    (
        dict(loss="HISTLoss", loss_args={"hidden": 8, "tau": 8.0}, groups={"loss.distributions": {"lr": 0.1}}),
        "9491885bf799382c",
    ),
    (dict(split="val", precision="bf16", schedule="step", schedule_args={"size": 2}), "3ba0533174d12390"),
]


@pytest.mark.parametrize("change, key", KEYS)
def test_keys_stay_as_they_are(change, key):
    parts = (SimpleNamespace(fingerprint="a"), SimpleNamespace(fingerprint="b"))
    assert TOY.replace(**change).key(parts) == key


def test_every_field_but_the_place_of_the_data_is_in_the_key():
    parts = (SimpleNamespace(fingerprint="a"), SimpleNamespace(fingerprint="b"))
    whole = TOY.replace(freeze="bn")
    added = [
        dict(memory={"size": "train"}),
        dict(memory={"size": 99}),
        dict(memory={"size": 99, "weight": 2.0}),
        dict(miner="pml/TripletMarginMiner"),
        dict(miner="pml/TripletMarginMiner", miner_args={"margin": 1}),
        dict(freeze_blocks=1),
        dict(packed=64),
        dict(packed=64, packed_format="jpeg"),
        dict(micro_batch=4),
        dict(packed=64, packed_format="jpeg80"),
        dict(decode="shrink"),
        dict(protocol={"kind": "leave-one-out"}),
    ]
    assert len({whole.replace(**c).key(parts) for c in [{}, *added]}) == 1 + len(added)
    assert whole.replace(data_dir="/elsewhere").key(parts) == whole.key(parts)
    for c in added:
        assert RunConfig.from_dict(json.loads(json.dumps(whole.replace(**c).to_dict()))) == whole.replace(**c)


def test_weights_file_is_in_the_key_by_content(tmp_path):
    a, b, c = (tmp_path / n for n in "abc")
    a.write_bytes(b"1"), b.write_bytes(b"1"), c.write_bytes(b"2")
    assert (
        TOY.replace(pretrained=str(a)).key()
        == TOY.replace(pretrained=str(b)).key()
        != TOY.replace(pretrained=str(c)).key()
    )


def test_an_image_more_is_seen_in_the_same_process(tmp_path):
    from PIL import Image

    for i, kind in enumerate(("a/x", "a/y", "b/x", "b/y", "a/z", "b/z")):
        (tmp_path / kind).mkdir(parents=True)
        for j in range(2):
            Image.new("RGB", (4, 4), (40 * i, 99, 99 * j)).save(tmp_path / kind / f"{j}.png")
    cfg = TOY.replace(dataset="folder", data_dir=str(tmp_path))
    key = cfg.key()
    assert cfg.key() == key and config.load_splits(cfg)[0] is config.load_splits(cfg)[0]
    for kind in ("a/x", "a/y"):
        Image.new("RGB", (4, 4)).save(tmp_path / kind / "2.png")
    assert cfg.key() != key


def test_links_that_lead_round_in_the_data_folder(tmp_path):
    "Two links to the folder itself would be followed for ever, each within the other; a change is seen all the same."
    (tmp_path / "data/sub").mkdir(parents=True)
    for name in "ab":
        (tmp_path / "data" / name).symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data/table.csv").write_text("x")
    for p in (tmp_path / "data/sub", tmp_path / "data"):
        os.utime(p, ns=(5, 5))
    assert (
        config._changed(tmp_path / "data") == 5
        and config._changed(tmp_path / "data/table.csv") == os.stat(tmp_path / "data/table.csv").st_mtime_ns
    )
    os.utime(tmp_path / "data/sub", ns=(9, 9))
    assert config._changed(tmp_path / "data") == 9


def test_pieces_are_in_the_key(tmp_path):
    data = config.load_splits(PIECES)
    swap = {"loss.hgnn": {"lr": 1e-3}, "loss.distributions": {"lr": 0.1}}
    other = {"loss.hgnn": {"lr": 2e-3}, "loss.distributions": {"lr": 0.1}}
    assert (
        PIECES.key(data)
        == PIECES.replace(groups=swap).key(data)
        == RunConfig.from_dict(json.loads(json.dumps(PIECES.to_dict()))).key(data)
    )
    assert (
        len(
            {
                PIECES.replace(groups=g).key(data)
                for g in (swap, other, {"loss": {"lr": 0.1}}, {"loss.hgnn": {"lr": 1e-3}})
            }
        )
        == 4
    )
