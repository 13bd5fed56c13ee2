"""What lies on a disk may be damaged. Every row damages a file of a finished run, a checkpoint or a cache of features.

Reading must give the numbers that were written or an error that names the file, and asking again must give the same
numbers as before: never other numbers, never an error that blames hapnb.
"""

import json, shutil, warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import hapnb.batches as B
from hapnb import runs
from hapnb.helpers import Damaged
from hapnb.models import toy_trunk
from hapnb.runs import _FILES, Result
from hapnb.train import Trainer
from runs_kit import cache, contents, TOY, toy_run  # noqa: F401 (a fixture)

CFG = TOY.replace(epochs=1, loss="SupAPLoss")


def flip(where):  # a fraction of the file
    def damage(path):
        data = bytearray(path.read_bytes())
        data[min(int(where * len(data)), len(data) - 1)] ^= 1
        path.write_bytes(bytes(data))

    return damage


def write(data):
    return lambda path: path.write_bytes(data)


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


# "other" is the same file of another run, "neighbour" another file of the same run
DAMAGE = {
    "first byte": flip(0),
    "a byte at a third": flip(0.33),
    "a byte at two thirds": flip(0.67),
    "last byte": flip(1),
    "half": cut(0.5),
    "one byte less": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "empty": write(b""),
    "one byte more": lambda p: p.write_bytes(p.read_bytes() + b"\n"),
    "an empty object": write(b"{}"),
    "a list": write(b"[]"),
    "a number": write(b"7"),
    "deep JSON": write(b"[" * 100_000),
    "no UTF-8": write(b"\xff\xfe\x00"),
    "other": None,
    "neighbour": None,
    "missing": lambda p: p.unlink(),
}
# kinds after which the run is really made again; the others stop at the decision to do so
AGAIN = ("a byte at a third", "empty", "deep JSON", "other", "missing")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    "Two finished runs of different seeds."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("HAPNB_CACHE", str(tmp_path_factory.getbasetemp() / "features"))
        folder = tmp_path_factory.mktemp("runs")
        return toy_run(CFG, folder), toy_run(CFG.replace(seed=1), folder)


def read_all(path):
    "Everything that a result holds, as bytes or text."
    r = Result(path)
    tensors = [*r.weights().items(), ("e", r.embeddings()), ("l", r.labels())]
    arrays = [(k, v.numpy().tobytes()) for k, v in tensors] + [(k, v.tobytes()) for k, v in r.per_query().items()]
    return (r.metrics, r.config, r.environment, r.history.to_csv(), arrays)


@pytest.mark.parametrize("name", [*_FILES, "manifest.json"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_result_is_never_believed(stores, tmp_path, name, kind):
    good, other = stores
    path = tmp_path / good.key
    shutil.copytree(good.path, path)
    if kind == "other":
        shutil.copy(other.path / name, path / name)
    elif kind == "neighbour":
        shutil.copy(path / _FILES[_FILES.index(name) - 1 if name in _FILES else 0], path / name)
    else:
        DAMAGE[kind](path / name)
    try:
        assert read_all(path) == read_all(good.path)
    except (Damaged, FileNotFoundError) as e:
        assert str(path) in str(e) and (name in str(e) or "manifest.json" in str(e))
    # what `run` will do; one byte of white space at the end of a manifest says the same
    why = runs._why_again(path)
    if why is None:
        assert name == "manifest.json" and kind.startswith("one byte")
        return
    # without its manifest or its metrics a folder is an unfinished run, which needs no warning
    assert name in why or "manifest" in why or kind == "missing"
    if kind not in AGAIN:
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert contents(toy_run(CFG, tmp_path)) == contents(good)
    assert [str(w.message) for w in told if w.category is RuntimeWarning] == [why] * bool(why)
    assert read_all(path)[0] == good.metrics


def test_the_folder_of_another_run_is_not_taken_for_this_one(stores, tmp_path):
    good, other = stores
    shutil.copytree(other.path, tmp_path / good.key)
    with pytest.warns(RuntimeWarning, match=f"belongs to run {other.key}"):
        assert contents(toy_run(CFG, tmp_path)) == contents(good)


# ---- checkpoints


def interrupted(cfg, store, steps=4):
    "A run that was stopped after some steps; the path of its checkpoint."
    step, left = Trainer.step, [steps]

    def stops(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        step(self, *args)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Trainer, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            toy_run(cfg, store, save_every=0)
    return next((store / cfg.key()).glob("state.pt"))


def repacked(change, sign=True):
    "A checkpoint with other values: unsigned (the old checksum), or with a checksum that fits."

    def damage(path):
        head, _, kept = path.read_bytes().partition(b"\n")
        state = runs.load_state(path)
        change(state)
        runs.save_state(path, state, **{k: v for k, v in json.loads(head).items() if k != "sha256"})
        if not sign:
            path.write_bytes(head + b"\n" + path.read_bytes().partition(b"\n")[2])

    return damage


def plain(path):
    "As an older version wrote it: no first line."
    path.write_bytes(path.read_bytes().partition(b"\n")[2])


STATE = (
    {k: v for k, v in DAMAGE.items() if v is not None and k not in ("missing", "one byte more")}
    | {f"a bit at {w:.2f}": flip(w) for w in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9, 0.95, 0.99)}
    | {
        "epoch 99": repacked(lambda s: s.update(epoch=99), False),
        "no history": repacked(lambda s: s.update(history=[]), False),
        "no steps": repacked(lambda s: s.update(done=0), False),
        "no optimiser": repacked(lambda s: s.update(opt={}), False),
        "weights of zero": repacked(lambda s: [v.zero_() for v in s["net"].values()], False),
        "without a first line": plain,
        "no net": repacked(lambda s: s.pop("net")),
        "a net of another width": repacked(lambda s: s.update(net={k: v[:3] for k, v in s["net"].items()})),
        "epoch is text": repacked(lambda s: s.update(opt="x")),
        "no sums": repacked(lambda s: s.pop("sums")),
        "a random state of another length": repacked(lambda s: s.update(rng=torch.zeros(7, dtype=torch.uint8))),
    }
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    "A whole run, and the folder of the same run stopped in its second epoch."
    cfg = CFG.replace(epochs=2)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("HAPNB_CACHE", str(tmp_path_factory.getbasetemp() / "features"))
        folder = tmp_path_factory.mktemp("stopped")
        return (
            cfg,
            toy_run(cfg, folder / "whole"),
            interrupted(cfg, folder / "cut", 8),
            interrupted(cfg.replace(seed=1), folder / "other"),
        )


@pytest.mark.parametrize("kind", [*STATE, "whole", "other run"])
def test_a_damaged_checkpoint_starts_again(stopped, tmp_path, kind):
    cfg, whole, state, other = stopped
    path = tmp_path / cfg.key()
    shutil.copytree(state.parent, path)
    if kind == "other run":
        shutil.copy(other, path / "state.pt")
    elif kind != "whole":
        STATE[kind](path / "state.pt")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert contents(toy_run(cfg, tmp_path)) == contents(whole)
    assert any("state.pt" in str(w.message) for w in told) == (kind != "whole")


# ---- features


class Few:
    "What features need of a dataset."

    name, split, fingerprint = "few", "all", "abc"

    def __len__(self):
        return 20

    def image(self, i):
        from PIL import Image

        return Image.new("RGB", (32, 32), (12 * i, 255 - 12 * i, 99))


def features(folder):
    return B.cached_features(toy_trunk(), Few(), image_size=32, cache_dir=folder, progress=False)


def tensor(change):
    "A cache file that can be read, with other content."

    def damage(path):
        save_file(change(load_file(path)["features"]), path)

    return damage


def noted(change):
    "A note with other content."

    def damage(path):
        note = json.loads(path.read_text())
        path.write_text(json.dumps(change(note)))

    return damage


CACHE = {k: v for k, v in DAMAGE.items() if v is not None} | {
    "integers": tensor(lambda x: {"features": x.long()}),
    "half precision": tensor(lambda x: {"features": x.half()}),
    "fewer rows": tensor(lambda x: {"features": x[:-1].clone()}),
    "another name": tensor(lambda x: {"x": x}),
    "no rows": tensor(lambda x: {"features": x[:0].clone()}),
    "a vector": tensor(lambda x: {"features": x[:, 0].clone()}),
    "other values": tensor(lambda x: {"features": x + 1}),
}
NOTE = {k: v for k, v in DAMAGE.items() if v is not None} | {
    "no recipe": noted(lambda n: {"files": n["files"]}),
    "no files": noted(lambda n: {"recipe": n["recipe"]}),
    "files is a list": noted(lambda n: n | {"files": []}),
    "files is text": noted(lambda n: n | {"files": "x"}),
    "another recipe": noted(lambda n: n | {"recipe": {"trunk": "toy"}}),
    "a hash of none": noted(lambda n: n | {"files": {"": None}}),
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    "Features in one file, and the parts of a computation that was killed."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(B, "CHUNK", 6)
        m.setattr(B.shutil, "rmtree", lambda *a, **k: None)
        folder = tmp_path_factory.mktemp("cache")
        return features(folder), folder


@pytest.mark.parametrize("which", ["whole", "part"])
@pytest.mark.parametrize("kind", [*[("data", k) for k in CACHE], *[("note", k) for k in NOTE]], ids=" ".join)
def test_a_damaged_cache_is_made_again(caches, tmp_path, monkeypatch, which, kind):
    monkeypatch.setattr(B, "CHUNK", 6)
    want, folder = caches
    shutil.copytree(folder, tmp_path / "c")
    whole = next((tmp_path / "c").glob("*.safetensors"))
    file = whole
    if which == "part":
        file = whole.with_suffix(".parts") / "00001.safetensors"
        whole.unlink()
    part, name = kind
    damage, target = (CACHE[name], file) if part == "data" else (NOTE[name], file.with_name(file.name + ".json"))
    damage(target)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert torch.equal(features(tmp_path / "c"), want)
    if name != "missing" and kind != ("note", "one byte more"):
        assert any(target.name in str(w.message) or file.name in str(w.message) for w in told)


def test_there_are_enough_rows():
    assert len(DAMAGE) * (len(_FILES) + 1) + len(STATE) + 2 * (len(CACHE) + len(NOTE)) >= 200
