"""Wrong settings are refused before anything is computed, with words that say what is wrong.

Each row: what is changed in a good configuration, what the message must say, and the stage that must find it:
"config" when the configuration is made, "names" when a run or its plan starts, "data" when the labels are known.
No stage computes features or trains.
"""

import pytest

from hapnb import build
from hapnb.config import check_names
from runs_kit import cache, TOY  # noqa: F401 (a fixture)

DEEP = {}
for _ in range(30):
    DEEP = {"a": DEEP}
WHOLE = dict(freeze="bn", epochs=1)
QG, LM = {"kind": "query-gallery"}, {"kind": "landmarks"}

ROWS = [
    # single values
    (dict(epochs="3"), "must be int", "config"),
    (dict(epochs=-1), "0 or more", "config"),
    (dict(epochs=10**9), "1000000 at most", "config"),
    (dict(batch_size=1), "2 or more", "config"),
    (dict(batch_size=10**10), "1000000 at most", "config"),
    (dict(batch_size=24.0), "must be int", "config"),
    (dict(lr="1e-3"), "write 1.0e-4", "config"),
    (dict(lr=-0.1), "0.0 or more", "config"),
    (dict(lr=float("nan")), "cannot hold", "config"),
    (dict(lr=True), "must be float", "config"),
    (dict(lr=10**400), "must be float", "config"),
    (dict(weight_decay=-1), "0.0 or more", "config"),
    (dict(weight_decay=float("inf")), "cannot hold", "config"),
    (dict(clip_norm=0), "above 0", "config"),
    (dict(clip_norm=-3.0), "above 0", "config"),
    (dict(seed=-1), "0 or more", "config"),
    (dict(seed=2**64), "at most", "config"),
    (dict(seed="one"), "must be int", "config"),
    (dict(embed_dim=0), "1 or more", "config"),
    (dict(embed_dim=10**10), "65536 at most", "config"),
    (dict(image_size=0), "1 or more", "config"),
    (dict(image_size=10**6), "8192 at most", "config"),
    (dict(freeze_blocks=2), "freeze='trunk'", "config"),
    (dict(freeze="bn", freeze_blocks=-1), "0 or more", "config"),
    (dict(warmup_epochs=1.5), "must be int", "config"),
    (dict(epochs=2, warmup_epochs=3), "longer than the training of 2 epochs", "config"),
    (dict(eval_every=-1), "0 or more", "config"),
    (dict(micro_batch=0), "1 or more", "config"),
    (dict(packed=10**6), "8192 at most", "config"),
    (dict(packed=64, decode="shrink"), "small already", "config"),
    (dict(packed_format="jpeg"), "give packed=256", "config"),
    (dict(packed=64, packed_format="jpg"), "Did you mean 'jpeg'", "config"),
    # names with few choices
    (dict(freeze="trunks"), "Did you mean 'trunk'", "config"),
    (dict(split="tests"), "Did you mean 'test'", "config"),
    (dict(precision="bf17"), "Did you mean 'bf16'", "config"),
    (dict(pooling="average"), "Known: avg", "config"),
    (dict(norm="layer"), "Did you mean 'layernorm'", "config"),
    (dict(init="whiten"), "Did you mean 'whitening'", "config"),
    (dict(decode="shrunk"), "Did you mean 'shrink'", "config"),
    (dict(optimizer="adm"), "Did you mean 'adam'", "config"),
    (dict(schedule="cosin"), "Did you mean 'cosine'", "config"),
    # dictionaries that are none, or too deep
    (dict(loss_args=[1]), "must be dict", "config"),
    (dict(transform="small"), "must be dict", "config"),
    (dict(loss_args=DEEP), "nested too deeply", "config"),
    (dict(schedule_args=DEEP), "nested too deeply", "config"),
    (dict(protocol=DEEP), "nested too deeply", "config"),
    (dict(loss_args={1: 2}), "names of settings are text", "config"),
    (dict(loss_args={"tau": print}), "plain value", "config"),
    # schedules
    (dict(schedule="step"), "needs 'size'", "config"),
    (dict(schedule="step", schedule_args={"size": 0}), "greater than or equal to 1", "config"),
    (dict(schedule="step", schedule_args={"size": 2.5}), "valid integer", "config"),
    (dict(schedule="step", schedule_args={"size": 2, "gama": 0.1}), "Did you mean 'gamma'", "config"),
    (dict(schedule="step", schedule_args={"size": 2, "gamma": "half"}), "valid number", "config"),
    (dict(schedule="step", schedule_args={"size": 2, "gamma": 0}), "greater than 0", "config"),
    (dict(schedule="multistep", schedule_args={"milestones": 3}), "valid tuple", "config"),
    (dict(schedule="multistep", schedule_args={"milestones": ["2"]}), "valid integer", "config"),
    (dict(schedule="multistep", schedule_args={"milestones": [-1]}), "greater than or equal to 1", "config"),
    (dict(schedule="multistep"), "needs 'milestones'", "config"),
    (dict(schedule="constant", schedule_args={"size": 2}), "It takes: none", "config"),
    (dict(schedule_args={"total": "x"}), "valid integer", "config"),
    (dict(schedule_args={"total": 0}), "greater than or equal to 1", "config"),
    (dict(schedule_args={"min_lr": -1e-3}), "greater than or equal to 0", "config"),
    # optimisers and groups
    (dict(optimizer_args={"beta": 0.9}), "Did you mean 'betas'", "config"),
    (dict(optimizer_args={"betas": [0.9]}), "betas", "config"),
    (dict(optimizer_args={"betas": [0.9, 1.5]}), "betas must lie in", "config"),
    (dict(optimizer_args={"eps": -1}), "greater than or equal to 0", "config"),
    (dict(optimizer_args={"lr": 1}), "no setting 'lr'", "config"),
    (dict(optimizer="sgd", optimizer_args={"momentum": "much"}), "valid number", "config"),
    (dict(optimizer="sgd", optimizer_args={"momentum": -0.9}), "greater than or equal to 0", "config"),
    (dict(optimizer="sgd", optimizer_args={"nesterov": True}), "nesterov needs a momentum", "config"),
    (dict(optimizer="sgd", optimizer_args={"betas": [0.9, 0.99]}), "no setting 'betas'", "config"),
    (dict(groups={"heads": {}}), "Did you mean 'head'", "config"),
    (dict(groups={"head": {"lrs": 1}}), "Did you mean 'lr'", "config"),
    (dict(groups={"head": {"lr": -1}}), "greater than or equal to 0", "config"),
    (dict(groups={"head": {"lr": "1e-3"}}), "write 1.0e-4", "config"),
    (dict(groups={"head": {"weight_decay": -1e-4}}), "greater than or equal to 0", "config"),
    (dict(groups={"loss": {"min_lr": -1}}), "greater than or equal to 0", "config"),
    (dict(groups={"head": 3}), "must be a dictionary", "config"),
    (dict(groups={"loss.proxies": {"lr": 1}}), "no piece 'proxies'", "data"),
    # memory and miner
    (dict(memory={"sizes": 60}), "Did you mean 'size'", "config"),
    (dict(memory={"size": 24}), "no more than the batch", "config"),
    (dict(memory={"size": 60.5}), "memory", "config"),
    (dict(memory={"size": 60, "weight": 0}), "greater than 0", "config"),
    (dict(memory={"size": 60, "weight": -2}), "greater than 0", "config"),
    (dict(memory={"size": 60, "start_epoch": -1}), "start_epoch", "config"),
    (dict(memory={"size": 60, "unique": 1}), "valid boolean", "config"),
    (dict(memory={"size": "all"}), "'train'", "config"),
    (dict(loss="SupAPLoss", memory={"size": 10**15}), "GB", "data"),
    (dict(memory={"size": 60, "unique": True}, loss="SupAPLoss"), "too few for 144", "data"),
    (dict(memory={"size": 60}, loss="NormSoftmaxLoss"), "does not look at references", "data"),
    (dict(miner="TripletMarginMiner"), "pml/NAME", "config"),
    (dict(miner_args={"margin": 1}), "miner is None", "config"),
    # images
    (dict(transform={"crop": 3}), "Did you mean 'crop_pct'", "config"),
    (dict(transform={"crop_pct": 0}), "greater than 0", "config"),
    (dict(transform={"crop_pct": 1.5}), "less than or equal to 1", "config"),
    (dict(transform={"crop_pct": "all"}), "valid number", "config"),
    (dict(transform={"resize": 0}), "greater than or equal to 1", "config"),
    (dict(transform={"resize": 10**7}), "less than or equal to 8192", "config"),
    (dict(transform={"resize": 40, "crop_pct": 0.9}), "not both", "config"),
    (dict(transform={"square": "yes"}), "valid boolean", "config"),
    (dict(transform={"interpolation": "bilinea"}), "Did you mean 'bilinear'", "config"),
    (dict(transform={"resize": 16}), "less than the crop of 32", "config"),
    (dict(augment={"flip": 0}), "freeze='trunk'", "config"),
    (dict(WHOLE, augment={"flip_p": 1}), "Did you mean 'flip'", "config"),
    (dict(WHOLE, augment={"flip": 2}), "less than or equal to 1", "config"),
    (dict(WHOLE, augment={"scale": [0, 1]}), "scale must rise", "config"),
    (dict(WHOLE, augment={"scale": [0.8, 0.2]}), "scale must rise", "config"),
    (dict(WHOLE, augment={"ratio": [-1, 1]}), "ratio must be above 0", "config"),
    (dict(WHOLE, augment={"ratio": 1}), "valid tuple", "config"),
    (dict(WHOLE, augment={"resize": 0}), "greater than or equal to 1", "config"),
    (dict(WHOLE, augment={"square": True}), "give resize too", "config"),
    # losses, samplers, trunks, datasets
    (dict(loss="HAPIERLoss"), "Did you mean 'HAPPIERLoss'", "names"),
    (dict(loss_args={"lamb": 1}), "Did you mean 'lam'", "names"),
    (dict(loss_args={"tau": "0.01"}), "write 1.0e-4", "names"),
    (dict(loss_args={"tau": [1]}), "valid number", "names"),
    (dict(loss_args={"with_hrank": 1}), "valid boolean", "names"),
    (dict(loss_args={"num_classes": 3}), "no setting 'num_classes'", "names"),
    (dict(loss_args={"tau": 0}), "tau must be above 0", "data"),
    (dict(loss_args={"lam": -1}), "lam", "data"),
    (dict(loss_args={"relevance": "pot"}), "Did you mean 'pop'", "data"),
    (dict(loss="SupAPLoss", loss_args={"level": 2}), "level 2 does not exist", "data"),
    (dict(loss="HISTLoss", loss_args={"hidden": 0}), "hidden", "data"),
    (dict(loss="HISTLoss", loss_args={"hidden": 10**13}), "memory", "data"),
    (dict(loss="HISTLoss", loss_args={"hidden": 10**6, "layers": 3}), "GB of memory", "data"),
    (dict(WHOLE, image_size=8192, batch_size=10**6), "GB of memory", "data"),
    (dict(loss="HISTLoss", loss_args={"layers": 1.5}), "valid integer", "names"),
    (dict(sampler="m_per_clas"), "Did you mean 'm_per_class'", "names"),
    (dict(sampler_args={"mm": 1}), "Did you mean 'm'", "names"),
    (dict(sampler_args={"m": "4"}), "'m' must be", "names"),
    (dict(sampler_args={"m": 0}), "m", "names data"),
    (dict(sampler_args={"m": 5}), "m=5", "data"),
    (dict(sampler_args={"level": 7}), "level", "data"),
    (dict(batch_size=20000), "batch_size", "data"),
    (dict(sampler="hierarchical", sampler_args={"m": 4, "small": "shorts"}), "short", "names data"),
    (dict(trunk="toi"), "toy", "names"),
    (dict(trunk="resnet5O"), "Did you mean 'resnet50'", "names"),
    (dict(trunk_args={"dropout": 1}), "toy takes: none", "names"),
    (dict(trunk="timm/resnet18", pretrained=False, trunk_args={"dropout": 1}), "no setting 'dropout'", "names"),
    (dict(dataset="toi"), "toy", "names"),
    (dict(dataset_args={"hue": 3}), "Did you mean 'hues'", "names"),
    (dict(dataset_args={"hues": "3"}), "valid integer", "names"),
    (dict(levels=[5]), "level 5", "data"),
    (dict(levels=[0, 0]), "twice", "config"),
    (dict(levels=["fine"]), "whole numbers", "config"),
    (dict(levels=[]), "empty list", "config"),
    # evaluation
    (dict(ks=[0]), "1 or more", "config"),
    (dict(ks=[1.5]), "whole numbers", "config"),
    (dict(ks=["1"]), "whole numbers", "config"),
    (dict(ks=[1, 1]), "twice", "config"),
    (dict(ks=[1, 1000]), "k=1000 is larger than the gallery", "data"),
    (dict(metrics=[]), "None for all", "config"),
    (dict(metrics=[1]), "metrics must be names", "config"),
    (dict(metrics=["R@1", "mAPP"]), "unknown metric 'mAPP'", "data"),
    (dict(metrics=["R@900"]), "larger than the gallery", "data"),
    (dict(metrics=["AP_level7"]), "AP_level7", "data"),
    (dict(eval_levels=[5]), "level 5", "data"),
    (dict(eval_levels=[-1]), "0 or more", "config"),
    (dict(relevance="pot"), "Did you mean 'pop'", "config"),
    (dict(relevance={"kinds": "map"}), "Did you mean 'kind'", "config"),
    (dict(relevance={"alpha": "much"}), "relevance", "config"),
    (dict(relevance={"alpha": -1}), "alpha", "config"),
    (dict(relevance={"kind": "map", "weights": 3}), "weights", "config"),
    (dict(relevance={"kind": "map", "weights": [-1, 2]}), "weights", "config"),
    (dict(relevance={"kind": "pop", "weights": [1, 2]}), "belong to kind 'map'", "config"),
    (dict(relevance={"kind": "map", "weights": [1, 2, 3]}), "3 weights for 2 levels", "data"),
    (dict(protocol={"repeats": 3}), "needs a 'kind'", "config"),
    (dict(protocol={"kind": "query-galery"}), "query-gallery", "names"),
    (dict(protocol=QG), "part", "data"),
    (dict(protocol={"kind": "random-gallery", "repeat": 3}), "Did you mean 'repeats'", "names"),
    (dict(protocol={"kind": "random-gallery", "repeats": "3"}), "repeats", "names"),
    (dict(protocol={"kind": "random-gallery", "repeats": 0}), "repeats", "names data"),
    (dict(protocol={"kind": "random-gallery"}, ks=[1, 30]), "larger than the gallery", "data"),
    (dict(protocol=LM), "part", "data"),
    (dict(protocol=dict(LM, k=0)), "k", "names data"),
    (dict(protocol={"kind": "dyml"}, levels=[0]), "levels=None", "data"),
]


def found_at(change):
    "The stage that refuses a change, and its words."
    try:
        cfg = TOY.replace(**change)
    except ValueError as e:
        return "config", str(e)
    try:
        check_names(cfg)
    except ValueError as e:
        return "names", str(e)
    try:
        build.check_run(cfg, build.read_data(cfg))
    except ValueError as e:
        return "data", str(e)
    return None, "accepted"


@pytest.mark.parametrize(
    "change, words, stage", ROWS, ids=[" ".join(map(str, r[0])) + f"-{i}" for i, r in enumerate(ROWS)]
)
def test_a_wrong_setting_is_refused_before_training(change, words, stage, monkeypatch):
    monkeypatch.setattr(build, "_features", lambda *a: pytest.fail("features were computed first"))
    at, said = found_at(change)
    assert at in stage.split() and words in said


def test_there_are_enough_rows():
    assert len(ROWS) >= 150
