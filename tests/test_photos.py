"""CIFAR-100 and FGVC-Aircraft on small trees in the official layout: splits, levels, downloads, damaged copies."""
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from hapnb import photos
from hapnb.benchmarks import missing, source_of
from hapnb.config import RunConfig
from hapnb.core import check_labels
from hapnb.data import load
from hapnb.datasets import split_classes
from hapnb.plan import plan
from layouts_photos import AIRCRAFT, SUPERS, cifar_names, cifar_part, make_aircraft, make_cifar100, save
from test_benchmarks import disjoint_splits

MAKE = {"cifar100": make_cifar100, "fgvc-aircraft": make_aircraft}
NAMES = sorted(MAKE)
CLASS = {"cifar100": "CIFAR100", "fgvc-aircraft": "FGVCAircraft"}
PARENT = {"cifar100": {c: p for p, own in SUPERS.items() for c in own},
          "fgvc-aircraft": {v: family for v, (family, _) in AIRCRAFT.items()}}


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    "Downloads that were asked for; none reaches the network."
    found = []
    def fake(name):
        def download(root, download=False):
            found.append((name, Path(root), download))
            MAKE[name](root)
        return download
    for name, cls in CLASS.items(): monkeypatch.setattr(torchvision.datasets, cls, fake(name))
    return found


# ---- what both have in common

@pytest.mark.parametrize("name", NAMES)
def test_classes_are_dealt_within_each_parent_by_hashes_of_names(tmp_path, name):
    root = MAKE[name](tmp_path)
    d, classes = disjoint_splits(name, root)
    assert len(d["train"]) + len(d["test"]) == len(d["all"]) and classes["all"] == set(PARENT[name])
    side = split_classes(list(PARENT[name]), list(PARENT[name].values()))
    assert {c for c, s in side.items() if s == "test"} == classes["test"]
    for parent in set(PARENT[name].values()):
        own = [c for c, p in PARENT[name].items() if p == parent]
        assert abs(len(own) - 2 * len(classes["test"] & set(own))) <= 1
    assert len({x.fingerprint for x in d.values()}) == 5
    # both official parts are on both sides
    assert all(x.meta.official.nunique() == 2 for x in d.values())
    for x in d.values():
        check_labels(x.labels)
        x.check()


@pytest.mark.parametrize("name", NAMES)
def test_a_download_starts_only_where_it_is_wanted(tmp_path, name, asked):
    new, empty, other = tmp_path / "new", tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for folder in (new, empty):
        with pytest.raises(FileNotFoundError, match="download=True"): load(name, "all", folder, download=False)
    with pytest.raises(FileNotFoundError, match="notes.txt.*Get it from http.*download=True"): load(name, "all", other)
    with pytest.raises(ValueError, match="data_dir is missing"): load(name, "all")
    assert asked == []
    for folder in (new, empty): load(name, "all", folder, counts=False)
    load(name, "all", other, counts=False, download=True)
    assert asked == [(name, folder, True) for folder in (new, empty, other)]
    # what is there is not fetched again, whatever is asked
    for folder in (new, empty, other): load(name, "all", folder, counts=False, download=True)
    assert len(asked) == 3 and (other / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("File not found or corrupted."), EOFError("cut")])
@pytest.mark.parametrize("name", NAMES)
def test_a_failed_download_says_what_to_do(tmp_path, name, error, monkeypatch):
    def fails(root, download): raise error
    monkeypatch.setattr(torchvision.datasets, CLASS[name], fails)
    archive = source_of(name).archives[0]
    with pytest.raises(OSError, match=f"{archive['url']}.*{error}.*{archive['name']}.*download=True.*by hand"):
        load(name, "train", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_looking_for_what_is_missing_downloads_nothing(tmp_path, name, asked):
    found = missing(name, tmp_path)
    assert asked == [] and "is empty" in found[0]
    MAKE[name](tmp_path)
    assert missing(name, tmp_path, counts=False) == []
    assert "images, expected" in missing(name, tmp_path)[0]


def test_a_plan_downloads_nothing(tmp_path, asked):
    made = plan(RunConfig(dataset="cifar100", data_dir=str(tmp_path), trunk="toy", image_size=32), device="cpu")
    assert asked == [] and "is empty" in made.why


@pytest.mark.parametrize("name", NAMES)
def test_addresses_and_sums_are_those_of_torchvision(name, monkeypatch):
    monkeypatch.undo()
    cls, archive = getattr(torchvision.datasets, CLASS[name]), source_of(name).archives[0]
    assert archive["url"] == (cls.url if name == "cifar100" else cls._URL)
    if name == "cifar100": assert (archive["name"], archive["md5"]) == (cls.filename, cls.tgz_md5)


def test_published_counts():
    assert source_of("cifar100").counts == {"all": dict(images=60_000, classes=(100, 20))}
    assert source_of("fgvc-aircraft").counts == {"all": dict(images=10_000, classes=(100, 70, 30))}
    for name in NAMES: assert "images, classes 100" in str(source_of(name))


# ---- CIFAR-100

def test_cifar_pixels_are_those_that_torchvision_reads(tmp_path):
    root = make_cifar100(tmp_path)
    ds = load("cifar100", "all", root, counts=False)
    raw = pickle.loads((root / "train").read_bytes())
    want = raw["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    for i in (0, 7, len(want) - 1):
        assert np.array_equal(np.asarray(ds.image(i)), want[i])
        fine = cifar_names()[raw["fine_labels"][i]]
        assert [n[l] for n, l in zip(ds.class_names, ds.labels[i])] == [fine, PARENT["cifar100"][fine]]
        assert ds.store.name(i) == f"train/{raw['filenames'][i]}"
    assert ds.pixels().shape == (len(ds), 32, 32, 3)


class Harmful:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), "w")


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    root = make_cifar100(tmp_path)
    save(root / "train", dict(cifar_part(4, 0), extra=Harmful(tmp_path / "written")))
    with pytest.raises(ValueError, match=r"train is not a file of CIFAR-100.*no file of images needs"):
        load("cifar100", "train", root, counts=False)
    assert not (tmp_path / "written").exists()


def change(path, **entries):
    content = pickle.loads(path.read_bytes())
    save(path, {k: v for k, v in {**content, **entries}.items() if v is not None})


@pytest.mark.parametrize("entries, message", [
    (dict(data=None), "has no entry 'data'"),
    (dict(data=np.zeros((60, 3071), np.uint8)), r"uint8 \[60, 3071\], expected uint8 \[N, 3072\]"),
    (dict(data=np.zeros((60, 3072), np.float32)), "the images are float32"),
    (dict(fine_labels=[0]), "60 images, 60 names of files and 1 numbers of class"),
    (dict(coarse_labels=[3] * 60), "3 is not the number of one of 3 names at level 'superclass'"),
    (dict(fine_labels=[-1] * 60), "-1 is not the number of one of 15 names at level 'class'")])
def test_a_damaged_part_of_cifar_is_named(tmp_path, entries, message):
    root = make_cifar100(tmp_path)
    change(root / "train", **entries)
    with pytest.raises(ValueError, match=message): load("cifar100", "train", root, counts=False)


@pytest.mark.parametrize("cut", [0, 10, 1000])
def test_a_file_of_cifar_that_is_cut_short_is_named(tmp_path, cut):
    root = make_cifar100(tmp_path)
    (root / "test").write_bytes((root / "test").read_bytes()[:cut])
    with pytest.raises(ValueError, match="test is not a file of CIFAR-100 that can be read.*Fetch it again"):
        load("cifar100", "train", root, counts=False)


# ---- FGVC-Aircraft

def test_aircraft_labels_and_banner(tmp_path):
    root = make_aircraft(tmp_path)
    ds = load("fgvc-aircraft", "all", root, counts=False)
    assert ds.level_names == ("variant", "family", "manufacturer")
    for i in range(len(ds)):
        variant, family, maker = (n[l] for n, l in zip(ds.class_names, ds.labels[i]))
        assert (family, maker) == AIRCRAFT[variant]
    whole = Image.open(ds.store.name(5)).convert("RGB")
    assert whole.size == (48, 60) and ds.image(5).size == (48, 40)
    assert np.array_equal(np.asarray(ds.image(5)), np.asarray(whole)[:40])


@pytest.mark.parametrize("file, edit, message", [
    ("images_family_test.txt", lambda t: t.split("\n", 1)[1], "images_family_test.txt has no row for"),
    ("images_family_test.txt", lambda t: t + t.split("\n")[0] + "\n", "stands there twice"),
    ("images_variant_trainval.txt", lambda t: t.replace(" ", "", 1), "line 1: .* has no label"),
    ("images_manufacturer_test.txt", lambda t: t.replace("Boeing", "Airbus", 1), "are not a tree")])
def test_a_damaged_list_of_aircraft_is_named(tmp_path, file, edit, message):
    root = make_aircraft(tmp_path)
    path = root / file
    path.write_text(edit(path.read_text()))
    with pytest.raises(ValueError, match=message): load("fgvc-aircraft", "train", root, counts=False)


def test_images_that_are_missing_are_counted(tmp_path):
    root = make_aircraft(tmp_path)
    for path in sorted((root / "images").iterdir())[:3]: path.unlink()
    with pytest.raises(FileNotFoundError, match="3 of 88 images of fgvc-aircraft are missing"):
        load("fgvc-aircraft", "train", root, counts=False)
