"Batches and features: workers, small and packed images, what a cache is made of."

import os, pickle, sys, time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hapnb.batches as B
from hapnb import build, config, runs
from hapnb.config import RunConfig
from hapnb.helpers import cache_folder
from hapnb.models import toy_trunk
from hapnb.runs import run
from runs_kit import cache, TOY, WHOLE, toy_run, contents, together  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Four classes of JPEGs of 300 x 400 pixels."
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for c, name in enumerate(("a/x", "a/y", "b/x", "b/y")):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            small = Image.fromarray((rng.random((6, 8, 3)) * 160 + 20 * c).astype(np.uint8))
            small.resize((400, 300), Image.BICUBIC).save(folder / name / f"{i}.jpg", quality=95)
    return RunConfig(
        dataset="folder",
        data_dir=str(folder),
        trunk="toy",
        freeze="bn",
        image_size=32,
        transform={"crop_pct": 0.8},
        augment={"resize": 50},
        embed_dim=8,
        batch_size=8,
        epochs=1,
        loss="SmoothAPLoss",
        lr=0.01,
        ks=(1,),
    )


def spied(monkeypatch):
    "What `image` of a dataset was asked for."
    from hapnb.datasets import RetrievalDataset

    asked, image = [], RetrievalDataset.image

    def spy(self, i, *args, **kw):
        asked.append(self.at_least)
        out = image(self, i, *args, **kw)
        sizes.append(min(out.size))
        return out

    sizes = []
    monkeypatch.setattr(RetrievalDataset, "image", spy)
    return asked, sizes


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_decoded_no_larger_than_needed(tmp_path, monkeypatch, photos, workers):
    full = run(photos, tmp_path, device="cpu", progress=False, workers=workers)
    if not workers:
        asked, sizes = spied(monkeypatch)  # worker processes would not tell
    small = run(photos.replace(decode="shrink"), tmp_path, device="cpu", progress=False, workers=workers)
    if not workers:
        assert set(asked) == {50, 40} and set(sizes) == {75}  # train and test; a quarter of 300
    assert full.key != small.key and not torch.equal(full.embeddings(), small.embeddings())
    assert float((full.embeddings() * small.embeddings()).sum(1).min()) > 0.99


def test_features_of_small_images_have_a_place_of_their_own(tmp_path, monkeypatch, photos):
    cfg = photos.replace(freeze="trunk", augment={})
    test = config.load_splits(cfg)[1]
    full = build.features_of(cfg, test)
    asked, _ = spied(monkeypatch)
    small = build.features_of(cfg.replace(decode="shrink"), test)
    assert set(asked) == {40} and not torch.equal(full, small)
    torch.testing.assert_close(full, small, atol=0.1, rtol=0.1)
    build._IN_MEMORY.clear()
    assert torch.equal(build.features_of(cfg, test), full)  # from disk
    assert len(asked) == len(test)


def test_a_shrunk_dataset_survives_pickling(photos):
    whole = config.load_splits(photos)[1]
    ds = whole.shrunk(40)
    again = pickle.loads(pickle.dumps(ds))
    assert again.fingerprint == ds.fingerprint != whole.fingerprint
    assert len(again) == len(ds) and again.image(0).size == (100, 75) != whole.image(0).size
    with pytest.raises(AttributeError):
        again.nothing


class Packed:
    "What a packed dataset must be for training: the same rows, smaller images."

    made = []

    def __init__(self, dataset, side):
        self.dataset, self.side, self.fingerprint = dataset, side, f"{dataset.fingerprint} packed {side}"

    def __len__(self):
        return len(self.dataset)

    def __getattr__(self, name):
        return getattr(self.__dict__["dataset"], name)

    def image(self, i):
        im = self.dataset.image(i)
        scale = self.side / min(im.size)
        return im.resize([round(s * scale) for s in im.size])


def test_training_reads_a_packed_copy(tmp_path, monkeypatch, photos):
    calls = []

    def packed(dataset, side, folder=None, progress=True, format="raw"):
        calls.append((dataset.split, side))
        return Packed(dataset, side)

    monkeypatch.setitem(sys.modules, "hapnb.packed", SimpleNamespace(packed=packed))
    asked, sizes = spied(monkeypatch)
    small = toy_run(photos.replace(packed=60), tmp_path)
    assert set(calls) == {("train", 60), ("test", 60)} and set(asked) == {None}
    full = toy_run(photos, tmp_path)
    assert float((full.embeddings() * small.embeddings()).sum(1).min()) > 0.99 and not torch.equal(
        full.embeddings(), small.embeddings()
    )
    assert small.dataset().fingerprint == full.dataset().fingerprint  # where the images came from
    frozen = photos.replace(packed=60, freeze="trunk", augment={})
    calls.clear()
    build.prepare(frozen, "cpu", progress=False)
    assert {s for s, _ in calls} == {"train", "test"}
    with pytest.raises(ValueError, match="packed=45 keeps fewer pixels than the 50"):
        toy_run(photos.replace(packed=45), tmp_path)


def test_two_processes_pack_once(tmp_path, photos, monkeypatch):
    "Both ask for the copy before they meet: packing may take longer than a process waits for the others."
    monkeypatch.setenv("HAPNB_CACHE", str(tmp_path / "cache"))
    import hapnb.packed as P

    make, pack, wait = P._make, runs._pack, runs.make_accelerator

    def noted(kind, f):
        def g(*args, **kw):
            (tmp_path / f"{kind}.{os.environ['RANK']}.{time.monotonic_ns()}").touch()
            return f(*args, **kw)

        return g

    def accelerator(*args):
        a = wait(*args)
        a.wait_for_everyone = noted("meets", a.wait_for_everyone)
        return a

    for module, name, kind, f in (
        (P, "_make", "made", make),
        (runs, "_pack", "asks", pack),
        (runs, "make_accelerator", None, None),
    ):
        monkeypatch.setattr(module, name, accelerator if f is None else noted(kind, f))
    together(toy_run, photos.replace(packed=60), tmp_path / "two")
    order = lambda kind, rank: sorted(int(p.name.split(".")[2]) for p in tmp_path.glob(f"{kind}.{rank}.*"))
    assert sum(len(order("made", r)) for r in (0, 1)) == 2  # train and test, each by one process
    for r in (0, 1):
        assert order("asks", r)[1] < order("meets", r)[0]


def test_needed_side_of_the_library_transforms():
    from hapnb.models import test_transform as testing, train_transform as training

    trunk = toy_trunk()
    assert (
        B.needed_side(testing(trunk, 32, 0.8)) == 40
        and B.needed_side(testing(trunk, 32, 0.8, square=True)) == 40
        and B.needed_side(training(trunk, 32, resize=50)) == 50
    )
    transform = training(trunk, 32, (0.25, 1.0), (0.5, 2.0))
    side = B.needed_side(transform)
    torch.manual_seed(0)
    boxes = [transform.transforms[0].make_params([torch.zeros(3, side, side)]) for _ in range(300)]
    assert side == 91 and min(min(b["height"], b["width"]) for b in boxes) >= 31  # rounding of a box to whole pixels


def test_workers_do_not_change_the_result(tmp_path):
    a = run(WHOLE, tmp_path / "a", device="cpu", progress=False, workers=0)
    b = run(WHOLE, tmp_path / "b", device="cpu", progress=False, workers=2)
    assert contents(a) == contents(b)
    assert a.history["H-AP"].iloc[-1] == pytest.approx(a.metrics["H-AP"])


def test_features_follow_the_content_of_a_weights_file(tmp_path):
    "In one process: other weights under the same name are other features, not those in memory."
    from safetensors.torch import save_file
    from hapnb.models import make_trunk

    state, path = make_trunk("timm/resnet18", pretrained=False).net.state_dict(), tmp_path / "w.safetensors"
    cfg = TOY.replace(
        trunk="timm/resnet18",
        pretrained=str(path),
        dataset_args={"hues": 2, "each": 2},
        sampler="random",
        sampler_args={},
        batch_size=6,
    )
    ds = config.load_splits(cfg)[0]
    found = []
    for scale in (1.0, 2.0):
        save_file({k: v * scale if k == "conv1.weight" else v for k, v in state.items()}, path)
        found.append(build.features_of(cfg, ds))
        assert build.features_of(cfg, ds, progress=True) is found[-1]
    assert not torch.equal(*found)
    result = toy_run(cfg, tmp_path / "runs")
    result.model()
    save_file(state, path)
    with pytest.raises(ValueError, match="was made with other weights"):
        result.model()


def test_the_folder_of_features(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HAPNB_CACHE", "~/kept")
    assert cache_folder() == tmp_path / "kept"


def test_nothing_is_loaded_where_nothing_is_shared(monkeypatch):
    monkeypatch.setattr(build, "load_splits", lambda cfg: pytest.fail("the dataset was read"))
    build.prepare(TOY.replace(freeze="bn"), "cpu", progress=False)
