"Datasets: splits, loaders, bad input, the bundled images and their recipe."
import hashlib, importlib.util, io, json, os, re, shutil, sys, tarfile

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hapnb import bundled, data, datasets as datasets_module, emoji, twins
from hapnb.bundled import ASSETS, Package, read_bundled
from hapnb.helpers import DATASETS
from hapnb.images import BytesStore, decode, encode
from hapnb.datasets import RetrievalDataset, check_gaps, name_hash, split_classes
from hapnb.data import load
from hapnb.core import check_labels
from hapnb.protocols import evaluate_protocol


@pytest.fixture(scope="module")
def parts(): return {s: load("emoji", s) for s in ("train", "fit", "val", "test", "all")}


@pytest.fixture
def tree(tmp_path):
    "Four species a class, three noisy images each: data/<class>/<species>/<n>.png"
    rng = np.random.default_rng(0)
    for kind in ("bird/owl", "bird/swan", "bird/crow", "bird/duck", "fish/carp", "fish/eel", "fish/pike", "fish/cod"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (24, 24, 3),
                                         dtype=np.uint8)).save(tmp_path / "data" / kind / f"{i}.png")
    return tmp_path / "data"


def classes(ds, level=0): return set(ds.class_names[level])


# ---- the bundled images

def test_emoji_splits_are_disjoint_and_complete(parts):
    assert not classes(parts["train"]) & classes(parts["test"])
    assert not classes(parts["fit"]) & classes(parts["val"])
    assert classes(parts["fit"]) | classes(parts["val"]) == classes(parts["train"])
    assert len(parts["train"]) + len(parts["test"]) == len(parts["all"])
    assert len(parts["fit"]) + len(parts["val"]) == len(parts["train"])


def test_emoji_counts(parts):
    every = parts["all"]
    assert (len(every), len(every.class_names[0]), len(every.class_names[1]),
            len(every.class_names[2])) == (12728, 1905, 98, 9)
    assert abs(len(classes(parts["train"])) - len(classes(parts["test"]))) < 10
    assert 0.15 < len(classes(parts["val"])) / len(classes(parts["train"])) < 0.2
    assert int(every.labels[:, 0].bincount().min()) >= 2
    # a subgroup of one concept, and one of one family
    assert classes(parts["train"], 1) ^ classes(parts["test"], 1) == {"animal-amphibian", "keycap"}
    assert classes(parts["train"], 2) == classes(parts["test"], 2)
    assert classes(parts["train"], 1) == classes(parts["fit"], 1)  # validation takes no subgroup away


def test_emoji_split_follows_from_names_and_families(parts):
    "The split can be computed anew from the table alone, and the committed list of it agrees."
    frame = read_bundled("emoji")[0].drop_columns(["image"]).to_pandas()
    again = twins.deal_families(dict(zip(frame.concept, frame.family)), dict(zip(frame.concept, frame.subgroup)))
    assert again == dict(zip(frame.concept, frame.split))
    listed = pd.read_csv(ASSETS / "emoji_split.csv", keep_default_na=False)
    assert dict(zip(listed.concept, listed.split)) == again
    assert dict(zip(listed.concept, listed.family)) == dict(zip(frame.concept, frame.family))


def test_emoji_has_no_twins_and_no_family_across_the_split(parts):
    frame = read_bundled("emoji")[0].drop_columns(["image"]).to_pandas()
    for fold in (frame.split == "test", frame.split == "val"):
        assert not set(frame.family[fold]) & set(frame.family[~fold])
    # no two drawings are one, and drawings that are close belong to one family
    i, j, d = twins.near_pairs(parts["all"].pixels(), emoji.FAMILY)
    assert len(d) > 100 and d.min() >= emoji.TWIN
    assert (frame.family.to_numpy()[i] == frame.family.to_numpy()[j]).all()
    # what names say: genders of one action, clock faces, keycaps, territories
    concepts = frame.drop_duplicates("concept")
    began = concepts.groupby(concepts.concept.map(emoji.family_name)).split.nunique()
    assert (began == 1).all() and began.index.isin(["clock face", "keycap", "biking", "flag: France"]).sum() == 4


def test_sister_sets_answer_nothing_in_the_designer_disjoint_track(parts):
    "Both sets of one designer carry one author, and the protocol hides an author's images even where all are equal."
    meta = parts["test"].meta
    sets = meta.groupby("author").source.unique().map(sorted).tolist()
    assert sorted(s for s in sets if len(s) > 1) == [["emojione", "emojione-v1"], ["fluent-emoji", "fluent-emoji-flat"],
                                                     ["noto", "noto-v1"]]
    # an embedding that knows the author and the concept of sister sets only: nothing is found once they are hidden
    pair = meta.source.isin(["fluent-emoji", "fluent-emoji-flat"]).to_numpy()
    labels = parts["test"].labels[torch.from_numpy(pair.copy())]
    emb = torch.randn(int(labels.max()) + 1, 8, generator=torch.Generator().manual_seed(0))[labels[:, 0]]
    makers = {"author": meta.author[pair].tolist()}
    assert evaluate_protocol(emb, labels, metrics="R@1")["R@1_level0"] > .9
    with pytest.raises(ValueError, match="no gallery is left"): evaluate_protocol(emb, labels, makers, "disjoint")


@pytest.mark.parametrize("name", ["emoji", "fonts"])
def test_other_deals_of_the_bundled_classes(name):
    whole, seen = load(name, "all"), set()
    for deal in (0, 1, 2):
        ds = {s: load(name, s, deal=deal) for s in ("train", "fit", "val", "test")}
        fine = {s: classes(d) for s, d in ds.items()}
        assert not fine["train"] & fine["test"] and fine["fit"] | fine["val"] == fine["train"]
        assert fine["train"] | fine["test"] == classes(whole)
        family = {s: set(d.meta.family) if name == "emoji" else classes(d, 1) for s, d in ds.items()}
        assert not family["train"] & family["test"] and not family["fit"] & family["val"]
        assert abs(len(ds["train"]) - len(ds["test"])) < .12 * len(whole)
        assert .1 < len(fine["val"]) / len(fine["train"]) < .25
        if deal: assert (ds["test"].image(3).tobytes() == whole.image(int(ds["test"].cut[1][3])).tobytes())
        seen.add(ds["test"].fingerprint)
    assert len(seen) == 3 and load(name, "test", deal=1).fingerprint in seen
    # features are computed once for all deals
    assert load(name, "test", deal=1).cut[0].fingerprint == load(name, "fit", deal=2).cut[0].fingerprint
    with pytest.raises(ValueError, match="leave deal=0"): load(name, "labelled", deal=1)
    with pytest.raises(ValueError, match="deal"): load(name, "test", deal=-1)


def test_emoji_faults_found_by_readers_are_out(parts):
    frame = read_bundled("emoji")[0].drop_columns(["image"]).to_pandas()
    assert not set(emoji.LEFT_OUT) & set(zip(frame.source, frame.concept)) and "skin-tone" not in set(frame.subgroup)
    assert set(frame.licence[frame.source == "fxemoji"]) == {"CC-BY-4.0"}


def test_emoji_labels(parts):
    for ds in parts.values():
        check_labels(ds.labels)
        for level, names in enumerate(ds.class_names):
            assert ds.labels[:, level].unique().tolist() == list(range(len(names)))
        assert ds.level_names == ("concept", "subgroup", "group")


def test_emoji_licences(parts):
    meta = parts["all"].meta
    assert set(meta.licence) == {"Apache-2.0", "MIT", "CC-BY-4.0", "CC-BY-SA-4.0"}
    assert not meta[["licence", "author", "url", "source", "icon"]].isna().any().any() and (meta.licence != "").all()
    text = (ASSETS / "ATTRIBUTION.md").read_text()
    for name, n in meta.source.value_counts().items():
        assert f"`@iconify-json/{name}` {emoji.SOURCES[name].version} | {n:,} |" in text


def test_emoji_checksum_card_and_pixels(parts):
    "What the card says of the file is so; no two images of the whole set have the same pixels, and none is blank."
    sha = hashlib.sha256((ASSETS / "emoji.parquet").read_bytes()).hexdigest()
    assert (ASSETS / "emoji.sha256").read_text() == f"{sha}  emoji.parquet\n"
    pixels = parts["all"].pixels()
    assert pixels.shape == (12728, 64, 64, 3) and pixels.dtype == np.uint8
    card = (ASSETS / "DATA_CARD.md").read_text()
    assert sha in card and hashlib.sha256(pixels).hexdigest() in card
    assert len({p.tobytes() for p in pixels}) == len(pixels)
    assert (pixels.reshape(len(pixels), -1).min(1) < 250).all()


def test_emoji_item_and_transform():
    ds = load("emoji", "val", transform=lambda im: torch.from_numpy(np.asarray(im).copy()).permute(2, 0, 1))
    x, y, i = ds[5]
    assert x.shape == (3, 64, 64) and y.shape == (3,) and i == 5
    batch = next(iter(torch.utils.data.DataLoader(ds, 4)))
    assert batch[0].shape == (4, 3, 64, 64) and batch[1].tolist() == ds.labels[:4].tolist()


def test_emoji_open_world():
    fit, labelled, pool = (load("emoji", s) for s in ("fit", "labelled", "unlabelled"))
    assert len(labelled) + len(pool) == len(fit)
    known = classes(labelled)
    assert known & classes(pool) and classes(pool) - known  # both known and unknown concepts in the pool
    unknown = {pool.class_names[0][l] for l, w in zip(pool.labels[:, 0], pool.meta.open_world)
               if w == "unlabelled unknown"}
    assert not unknown & known
    assert not classes(pool) & (classes(load("emoji", "val")) | classes(load("emoji", "test")))


def test_fingerprints_differ_and_repeat(parts):
    prints = {s: d.fingerprint for s, d in parts.items()}
    assert len(set(prints.values())) == len(prints)
    assert load("emoji", "fit").fingerprint == prints["fit"]
    assert parts["fit"].subset([0, 1]).fingerprint != parts["fit"].subset([1, 0]).fingerprint


def test_damaged_parquet(tmp_path):
    for name in ("emoji.parquet", "emoji.sha256"): shutil.copy(ASSETS / name, tmp_path)
    with open(tmp_path / "emoji.parquet", "r+b") as f: f.truncate(100_000)
    with pytest.raises(OSError, match=r"emoji\.parquet is damaged.*100000 bytes.*Install hapnb again"):
        load("emoji", data_dir=tmp_path)
    (tmp_path / "emoji.sha256").unlink()
    with pytest.raises(FileNotFoundError, match="emoji.sha256 is missing"): load("emoji", data_dir=tmp_path)


def test_hugging_face_layout():
    schema = pq.read_schema(ASSETS / "emoji.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names and features["image"] == {"_type": "Image"}
    first = pd.read_parquet(ASSETS / "emoji.parquet").image[0]
    assert Image.open(io.BytesIO(first["bytes"])).size == (64, 64)


# ---- the recipe, on two made-up sets

def pack(path, files):
    "Write a tarball as npm does and give its SHA-256."
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info, raw = tarfile.TarInfo(f"package/{name}"), json.dumps(data).encode()
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "Two icon sets with six concepts, and an emojibase to match."
    labels = ["red apple", "green apple", "pear", "lemon", "kiwi fruit", "cherries"]
    data = [dict(hexcode=f"1F35{i}", label=l, group=4, subgroup=42, order=i) for i, l in enumerate(labels)]
    base = {"en/data.json": data, "meta/groups.json": dict(groups={"4": "food-drink"}, subgroups={"42": "food-fruit"}),
            "meta/unicode-names.json": {}}
    cache, shape = tmp_path / "cache", '<rect x="{0}" y="2" width="8" height="{0}" fill="{1}"/>'
    cache.mkdir()
    body = lambda i, colour: dict(body=shape.format(i + 3, colour))
    coded = {"icons.json": dict(width=16, height=16, icons={f"fruit-{i}": body(i, "teal") for i in range(6)},
                                aliases={"pome": {"parent": "fruit-2"}}),
             "chars.json": {f"1f35{i}-fe0f": f"fruit-{i}" for i in range(6)}}
    named = {"icons.json": dict(width=16, height=20, icons={n: body(i, "brown") for i,
                                                            n in enumerate(["red-apple", "green-apple", "pome", "lemon",
                                                                            "nobody-knows"])}),
             "chars.json": {}}
    source = lambda sha: Package("1.0.0", sha, "MIT", "Somebody", "https://example.org")
    sources = {n: source(pack(cache / f"iconify-json-{n}-1.0.0.tgz", f)) for n,
               f in (("coded", coded), ("named", named))}
    monkeypatch.setattr(emoji, "EMOJIBASE", Package("17.0.0", pack(cache / "emojibase-data-17.0.0.tgz", base),
                                                    "MIT", "x", "y"))
    return cache, sources


def test_build_is_the_same_to_the_byte(tiny, tmp_path):
    pytest.importorskip("resvg_py", reason="resvg-py draws the icons; only rebuilding needs it")
    cache, sources = tiny
    shas = [emoji.build(tmp_path / out, cache, 32, sources) for out in ("a", "b")]
    assert shas[0] == shas[1]
    for name in ("emoji.parquet", "emoji.sha256", "emoji_split.csv", "ATTRIBUTION.md", "DATA_CARD.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    ds = load("emoji", "all", data_dir=tmp_path / "a")
    # two images each; the rest had one
    assert sorted(ds.class_names[0]) == ["green apple", "lemon", "pear", "red apple"]
    assert ds.image(0).size == (32, 32)
    assert "pome" in set(ds.meta.icon)  # an alias of one set named the pear of the other
    assert sorted(os.listdir(tmp_path / "a")) == ["ATTRIBUTION.md", "DATA_CARD.md", "emoji.parquet", "emoji.sha256",
                                                   "emoji_split.csv"]


def test_build_refuses_a_changed_package(tiny, tmp_path):
    cache, sources = tiny
    (cache / "iconify-json-coded-1.0.0.tgz").write_bytes(b"not what was published")
    with pytest.raises(OSError, match="delete it and fetch it again"): emoji.build(tmp_path / "out", cache, 32, sources)
    assert not (tmp_path / "out").exists()


def test_build_without_npm(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="install Node.js"): emoji.build(tmp_path / "out", tmp_path / "cache")


@pytest.mark.skipif(not os.environ.get("HAPNB_REBUILD"), reason="fetches 34 MB from npm and takes a minute: set "
                    "HAPNB_REBUILD=1 to run it")
def test_rebuild_of_the_bundled_file(tmp_path):
    if shutil.which("npm") is None: pytest.skip("npm is not installed")
    pytest.importorskip("resvg_py")
    sha = emoji.build(tmp_path)
    if bundled.other_versions(emoji.BUILT_WITH):
        again, before = read_bundled("emoji", tmp_path)[0], read_bundled("emoji")[0]
        assert bundled.pixel_sha256(again) == bundled.pixel_sha256(before)
    else: assert sha == read_bundled("emoji")[1]


# ---- folders and tables

def test_folder(tree):
    train, test = load("folder", "train", tree), load("folder", "test", tree)
    assert len(train) + len(test) == 24 and not classes(train) & classes(test)
    assert train.class_names[1] == test.class_names[1] == ["bird", "fish"] and train.level_names == ("level0", "level1")
    assert classes(load("folder", "val", tree, val=2)) <= classes(train)


def test_folder_with_its_own_split(tree, tmp_path):
    for part, kinds in (("train", ("bird/owl", "bird/swan", "bird/crow")), ("test", ("fish/eel",))):
        for k in kinds: shutil.copytree(tree / k, tmp_path / "own" / part / k)
    assert classes(load("folder", "test", tmp_path / "own")) == {"fish/eel"}
    assert classes(load("folder", "train", tmp_path / "own")) == {"bird/owl", "bird/swan", "bird/crow"}
    assert len(classes(load("folder", "val", tmp_path / "own", val=3))) == 1
    with pytest.raises(ValueError, match="smaller `val`"): load("folder", "val", tmp_path / "own")


@pytest.mark.parametrize("name", ["val", "Valid", "VALIDATION", "dev"])
def test_folder_split_by_other_names(tree, tmp_path, name):
    for part, k in (("train", "bird/owl"), (name, "bird/swan"), ("test", "fish/eel")):
        shutil.copytree(tree / k, tmp_path / "own" / part / k)
    found = {s: load("folder", s, tmp_path / "own") for s in ("fit", "val", "train", "test")}
    assert {s: classes(d) for s, d in found.items()} == {"fit": {"bird/owl"}, "val": {"bird/swan"},
                                                         "train": {"bird/owl", "bird/swan"}, "test": {"fish/eel"}}
    assert found["test"].level_names == ("level0", "level1")


@pytest.mark.parametrize("train, test", [("Train", "Test"), ("TRAIN", "TEST"), ("training", "testing")])
def test_folders_of_splits_in_other_letters_are_splits(tree, tmp_path, train, test):
    for part, k in ((train, "bird/owl"), (test, "fish/eel")): shutil.copytree(tree / k, tmp_path / "own" / part / k)
    assert classes(load("folder", "test", tmp_path / "own")) == {"fish/eel"}


@pytest.mark.parametrize("names", [("train", "eval"), ("train_images", "test_images"), ("query", "gallery")])
def test_folders_that_may_be_splits_are_named(tree, tmp_path, names):
    for part in names: shutil.copytree(tree / "bird", tmp_path / "own" / part)
    with pytest.raises(ValueError, match="not clear whether they are splits or classes"):
        load("folder", "all", tmp_path / "own")


def test_folder_with_something_beside_its_splits(tree, tmp_path):
    "Taken for classes, train/owl and test/owl would be two, and half of the test images would be trained on."
    for part, k in (("train", "owl"), ("test", "swan"), ("unsorted", "crow")):
        shutil.copytree(tree / "bird" / k, tmp_path / "own" / part / k)
    with pytest.raises(ValueError, match="test and train stand beside 'unsorted'"):
        load("folder", "train", tmp_path / "own")
    shutil.rmtree(tmp_path / "own" / "test")
    assert load("folder", "all", tmp_path / "own").class_names[1] == ["train", "unsorted"]  # a train may be a class


def test_folder_depth(tree):
    Image.new("RGB", (8, 8)).save(tree / "bird" / "lost.png")
    with pytest.raises(ValueError, match=r"same depth.*bird/lost\.png"): load("folder", "all", tree)


def test_wrong_folder(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for folders of images.*does not exist.*holds data/"):
        load("folder", "test", tmp_path / "dta")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"found none; .*empty holds sub/"):
        load("folder", "test", tmp_path / "empty")
    with pytest.raises(ValueError, match="data_dir is missing"): load("folder")


def test_truncated_image_is_named_and_counted(tree):
    bad = [tree / "fish/eel/1.png", tree / "bird/owl/0.png"]
    for p in bad: p.write_bytes(p.read_bytes()[:300])
    ds = load("folder", "all", tree)
    i = [k for k in range(len(ds)) if ds.store.name(ds.index[k]) == str(bad[0])][0]
    with pytest.raises(OSError, match=r"fish/eel/1\.png.*2 of 24 images look bad"): ds.image(i)
    with pytest.raises(OSError, match=r"2 of 24 images .*are bad"): ds.check()
    assert {b[1] for b in ds.bad_images()} == {b[1] for b in ds.bad_images(decoding=False)} == set(map(str, bad))
    bad[0].write_text("<html>404</html>")
    with pytest.raises(OSError, match="not an image that Pillow can read"): ds.image(i)


def test_a_message_does_not_wait_for_a_whole_large_set(tree, monkeypatch):
    "Of a set with 300,000 photographs a thousand are looked at."
    ds, reads = load("folder", "all", tree), []
    monkeypatch.setattr(datasets_module, "_LOOK", 5)
    monkeypatch.setattr(data.FileStore, "read", lambda self, i: reads.append(i) or b"\xff\xd8\xff" + bytes(50) if i % 2
                        else encode(Image.new("RGB", (8, 8))))
    with pytest.raises(OSError, match="cannot read image 7 of folder/all") as e: ds.image(7)
    assert re.search(r"5 of 6 images that were looked at, of 24, look bad", str(e.value)) and len(reads) <= 7
    with pytest.raises(OSError, match="image -1 of"): ds.image(-1)
    assert [b[0] for b in ds.bad_images(rows=[2, 3, 9])] == [3, 9] and len(ds.bad_images()) == 12


def test_file_that_vanished(tree):
    ds = load("folder", "all", tree)
    os.remove(ds.store.name(0))
    with pytest.raises(OSError, match=r"No such file.*1 of 24"): ds.image(0)


def table_of(tree):
    return pd.DataFrame([dict(path=str(p.relative_to(tree)), species=p.parent.name, kind=p.parent.parent.name)
                         for p in sorted(tree.rglob("*.png"))])


@pytest.mark.parametrize("suffix", ["csv", "parquet", "tsv"])
def test_table(tree, suffix):
    frame, path = table_of(tree), tree / f"table.{suffix}"
    frame.to_parquet(path) if suffix == "parquet" else frame.to_csv(path, index=False, sep="\t" if suffix == "tsv"
                                                                    else ",")
    train, test = load("table", "train", path), load("table", "test", path)
    assert len(train) + len(test) == 24 and not classes(train) & classes(test)
    assert train.level_names == ("species", "kind")
    train.check()


def test_table_split_column_and_number_labels(tree):
    frame = table_of(tree)
    frame["species"], frame["split"] = pd.factorize(frame.species)[0] + 5, ["train"] * 12 + ["val"] * 3 + ["test"] * 9
    frame.to_parquet(tree / "t.parquet")
    assert load("table", "all", tree / "t.parquet").class_names[0] == [str(i) for i in range(5, 13)]  # 5 before 10
    assert [len(load("table", s, tree / "t.parquet")) for s in ("fit", "val", "train", "test")] == [12, 3, 15, 9]
    frame["split"] = "more"
    frame.to_parquet(tree / "t.parquet")
    with pytest.raises(ValueError, match=r"'more' \(first in row 0.*use train, val and test"):
        load("table", "all", tree / "t.parquet")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_minus_one_in_a_table_is_an_unknown_class(tree, kind):
    frame, path = table_of(tree), tree / f"t.{kind}"
    frame["species"] = np.where(frame.species == "owl", -1, pd.factorize(frame.species)[0])
    frame.to_parquet(path) if kind == "parquet" else frame.to_csv(path, index=False)
    ds = load("table", "all", path)
    assert (ds.labels[:, 0] == -1).sum() == 3 and "-1" not in ds.class_names[0] and (ds.labels[:, 1] >= 0).all()
    with pytest.raises(ValueError, match="3 rows have no known class at level 'species'"): load("table", "train", path)
    frame = frame.assign(split=["train"] * 12 + ["test"] * 12)
    frame.to_parquet(path) if kind == "parquet" else frame.to_csv(path, index=False)
    assert (load("table", "train", path).labels[:, 0] == -1).sum() == 3


@pytest.mark.parametrize("change, says", [
    (lambda f: f.assign(split=["train"] * 20 + [""] * 4), "an empty cell"),
    (lambda f: f.assign(species=[[0, 1]] * 24), "column 'species': row 0 holds a"),
    (lambda f: f.assign(path=[b"jpeg"] * 24), "column 'path' holds bytes"),
    (lambda f: f.assign(path=range(24)), "column 'path' holds int"),
    (lambda f: f.assign(path=[dict(bytes=None, path="x")] * 24), "column 'path' holds dict"),
    (lambda f: f.assign(weight=np.linspace(0, 1, 24)), "'weight' has another value in every row"),
    (lambda f: f.rename(columns=dict(species="kind")), "two columns named 'kind'")])
def test_columns_of_an_unusual_kind_are_named(tree, change, says):
    frame = change(table_of(tree))
    if frame.columns.duplicated().any(): frame.to_csv(tree / "t.csv", index=False)
    else: frame.to_parquet(tree / "t.parquet")
    with pytest.raises(ValueError, match=says):
        load("table", "all", tree / ("t.csv" if frame.columns.duplicated().any() else "t.parquet"))


@pytest.mark.parametrize("change", [lambda f: f.reset_index(), lambda f: f.assign(Split=pd.Categorical(f.pop("split"))),
                                    lambda f: f.assign(species=f.species.astype("category")),
                                    lambda f: f.assign(split=f.split.str.upper() + " ")])
def test_tables_that_other_programs_write_give_the_same_labels(tree, change):
    frame = table_of(tree).assign(split=["train"] * 12 + ["val"] * 3 + ["test"] * 9)
    frame.to_parquet(tree / "a.parquet")
    change(frame.copy()).to_parquet(tree / "b.parquet")
    a, b = (load("table", "test", tree / f"{n}.parquet") for n in "ab")
    assert a.class_names == b.class_names and a.level_names == b.level_names and torch.equal(a.labels, b.labels)


def test_an_image_that_is_listed_twice_is_named(tree):
    pd.concat([table_of(tree)] * 2).to_csv(tree / "t.csv", index=False)
    with pytest.warns(UserWarning, match="more than once"): load("table", "all", tree / "t.csv")


DEEP = []
for _ in range(100_000): DEEP = [DEEP]


@pytest.mark.parametrize("name, args, says", [
    ("folder", dict(val="6"), "'val' must be"), ("folder", dict(val=-1), "val must be"),
                                              ("folder", dict(vall=3), "Did you mean 'val'"),
    ("table", dict(image=3), "'image' must be"), ("table", dict(levels=3), "levels must be names"),
    ("table", dict(levels=DEEP), "nested too deeply"), ("toy", dict(hues="12"), "'hues' must be"),
    ("toy", dict(each=0), "each must be"), ("toy", dict(size=1.5), "'size' must be"),
    ("huggingface", dict(keep_split="no"), "'keep_split' must be"), ("cub", dict(counts="yes"), "'counts' must be"),
    ("vehicleid", dict(sise="small"), "Did you mean 'size'")])
def test_arguments_of_a_dataset_are_checked(tree, name, args, says):
    table_of(tree).to_csv(tree / "t.csv", index=False)
    with pytest.raises(ValueError, match=says): load(name, "all", tree / "t.csv" if name == "table" else tree, **args)


def test_a_label_put_right_is_other_data(tree):
    "Same images, same classes, same split: two labels exchanged must still give another fingerprint."
    frame, path = table_of(tree).assign(split=["train"] * 12 + ["test"] * 12), tree / "t.csv"
    frame.to_csv(path, index=False)
    before, again = load("table", "test", path), load("table", "test", path)
    frame.loc[[12, 15], "species"] = frame.species[[15, 12]].to_numpy()
    frame.loc[[12, 15], "kind"] = frame.kind[[15, 12]].to_numpy()
    frame.to_csv(path, index=False)
    after = load("table", "test", path)
    assert before.class_names == after.class_names and not torch.equal(before.labels, after.labels)
    assert before.fingerprint == again.fingerprint != after.fingerprint


def test_table_errors(tree):
    frame, path = table_of(tree), tree / "t.csv"
    frame.to_csv(path, index=False)
    with pytest.raises(ValueError, match="no column 'specie'. Did you mean 'species'"):
        load("table", data_dir=path, levels=["specie"])
    with pytest.raises(FileNotFoundError, match="looked for a table"): load("table", data_dir=tree / "nothing.csv")
    frame.assign(species=[None] + list(frame.species[1:])).to_csv(path, index=False)
    with pytest.raises(ValueError, match="row 0 .*no value in column 'species'; 1 rows"): load("table", data_dir=path)
    frame.assign(path=["gone.png", "lost.png"] + list(frame.path[2:])).to_csv(path, index=False)
    with pytest.raises(FileNotFoundError, match=r"(?s)2 of 24 image files.*gone\.png \(missing\)"):
        load("table", data_dir=path)
    frame.assign(species="other").to_csv(path, index=False)
    with pytest.raises(ValueError, match="not a tree"): load("table", data_dir=path)


def test_table_files_that_are_none(tree):
    "The file is named, and the line where there is one; blanks at the end make no other class."
    frame, path = table_of(tree), tree / "t.csv"
    frame.to_csv(path, index=False)
    good = path.read_bytes()
    before = load("table", "all", path)
    for bad, says in ((good.replace(b",owl,", b",h\xfcbou,", 1), r"t\.csv, line 8: not UTF-8 text \(byte 0xfc\)"),
                      (good.replace(b",owl,bird", b",owl,bird,more", 1), r"t\.csv cannot be read as a CSV .*line 8"),
                      (b"path,species\n", "has no rows"),
                      (good.replace(b",owl,", b",\" \",", 1), "no value in column .species.")):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=says): load("table", "all", path)
    path.write_bytes(b"\xef\xbb\xbf" + good.replace(b",owl,", b", owl ,",
                                                    1).replace(b"path,species", b"path, species ").replace(b"\n",
                                                                                                           b"\r\n"))
    after = load("table", "all", path)
    assert (after.class_names, after.level_names) == (before.class_names, before.level_names)
    assert torch.equal(after.labels, before.labels)
    frame.to_parquet(tree / "t.parquet")
    whole = (tree / "t.parquet").read_bytes()
    for bad in (whole[:len(whole) // 2], b"", good):
        (tree / "t.parquet").write_bytes(bad)
        with pytest.raises(ValueError, match=r"t\.parquet cannot be read as a parquet table"):
            load("table", "all", tree / "t.parquet")


def test_table_with_images_inside(parts):
    "The bundled file is itself a table with images inside."
    ds = load("table", "test", ASSETS / "emoji.parquet", image="image", levels=emoji.LEVELS)
    assert len(ds) == len(parts["test"]) and torch.equal(ds.labels, parts["test"].labels)
    assert np.array_equal(np.asarray(ds.image(7)), np.asarray(parts["test"].image(7)))


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown dataset 'emoj'. Did you mean 'emoji'"): load("emoj")
    with pytest.raises(ValueError, match="dataset 'folder' has no setting 'level_name'. Did you mean 'level_names'"):
        load("folder", data_dir=".", level_name=["a"])
    with pytest.raises(ValueError, match="unknown split 'tset'. Did you mean 'test'"): load("emoji", "tset")


# ---- pieces

def test_split_classes_is_stable():
    "Fixed for good: another split would make published numbers incomparable."
    assert name_hash("red apple") == 0xcbff65c69929e836
    names = [f"c{i}" for i in range(60)]
    parts = split_classes(names, [n[-1] for n in names])
    assert pd.Series(parts).value_counts().to_dict() == {"test": 30, "fit": 25, "val": 5}


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="1 images, 2 rows of labels"):
        RetrievalDataset(BytesStore([b""], ["x"]), torch.zeros(2, 1).long(), [["a"]], ("c",))


# ---- stores and scales

def test_a_store_of_pil_images():
    class Store(BytesStore):
        def read(self, i): return Image.new("RGB", (5, 4), "red")
    ds = RetrievalDataset(Store([b"", b""], "ab"), torch.tensor([[0], [1]]), [["a", "b"]], ("c",))
    assert ds.image(1).size == (5, 4) and ds.check() is ds


# ---- protocol, gaps

def test_protocol_is_kept_and_does_not_change_the_data():
    make = lambda **kw: RetrievalDataset(BytesStore([b"1"] * 3, "abc"), torch.tensor([[0], [0], [1]]), [["a", "b"]],
                                         ("c",), fingerprint="f", **kw)
    plain, ds = make(), make(protocol={"kind": "query-gallery"})
    assert plain.protocol == {} and ds.subset([0, 2], relabel=True).protocol == {"kind": "query-gallery"}
    assert ds.fingerprint == plain.fingerprint and ds.subset([0]).fingerprint == plain.subset([0]).fingerprint


def test_gaps():
    labels = torch.tensor([[5, -1, -1], [5, -1, -1], [-1, 2, -1], [-1, 2, -1], [-1, -1, 0], [6, 2, 0]])
    args = (BytesStore([b""] * 6, "abcdef"), labels, [list("abcdefg"), list("xyz"), ["r"]],
            ("fine", "middle", "coarse"))
    with pytest.raises(ValueError, match="not a tree"): RetrievalDataset(*args)
    ds = RetrievalDataset(*args, gaps=True)
    part = ds.subset([1, 2, 5], relabel=True)
    assert part.labels.tolist() == [[0, -1, -1], [-1, 0, -1], [1, 0, 0]]
    assert part.class_names == [["f", "g"], ["z"], ["r"]] and part.gaps
    assert ds.counts().classes.tolist() == [2, 1, 1] and ds.counts().most.tolist() == [2, 3, 2]
    with pytest.raises(ValueError, match="levels 0 and 1 are not a tree"): check_gaps([[0, 1, -1], [0, 2, -1]])
    with pytest.raises(ValueError): check_gaps([[0], [-2]])
    with pytest.raises(ValueError): check_gaps([[0, 1], [-2, 1]])
    assert check_gaps([0, -1]).shape == (2, 1)


# ---- published datasets: what they share

def test_every_name_can_be_found():
    for name in DATASETS.late:
        assert callable(data.find_loader(name))
        if name not in bundled.BUNDLED: assert data.source_of(name).name == name
    with pytest.raises(ValueError, match="no source is known for 'sopp'. Did you mean 'sop'"): data.source_of("sopp")
    with pytest.raises(AttributeError): data.sources_of


# ---- Hugging Face

def hf_images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(24)]


@pytest.fixture
def hf():
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    features = datasets.Features(dict(image=datasets.Image(),
                                      species=datasets.ClassLabel(names=[f"s{i}" for i in range(8)]),
                                      kind=datasets.Value("string")))
    return datasets.Dataset.from_dict(dict(image=hf_images(), species=[i // 3 for i in range(24)],
                                           kind=["bird"] * 12 + ["fish"] * 12), features=features)


def test_huggingface(hf):
    ds = {s: data.from_huggingface(hf, ["species", "kind"], split=s) for s in ("train", "test", "all")}
    assert ds["all"].level_names == ("species", "kind")
    assert ds["all"].class_names == [[f"s{i}" for i in range(8)], ["bird", "fish"]]
    assert not classes(ds["train"]) & classes(ds["test"]) and len(ds["train"]) + len(ds["test"]) == 24
    for i in (0, 7, 11):
        j = int(ds["test"].index[i])
        assert np.array_equal(np.asarray(ds["test"].image(i)), np.asarray(hf_images()[j]))
        assert ds["test"].class_names[0][ds["test"].labels[i, 0]] == f"s{j // 3}"
    ds["all"].check()
    assert data.from_huggingface(hf, "species", split="test").level_names == ("species",)
    assert data.from_huggingface(hf.with_format("torch"), ["species", "kind"]).fingerprint == ds["test"].fingerprint
    assert len(torch.utils.data.DataLoader(ds["test"], 4, collate_fn=list)) == 3


def test_huggingface_fingerprint(hf):
    print_of = lambda d: data.from_huggingface(d, ["species", "kind"], split="all").fingerprint
    assert print_of(hf) == print_of(hf.select(range(24))) != print_of(hf.shuffle(seed=1))
    shuffled = data.from_huggingface(hf.shuffle(seed=1), ["species", "kind"], split="all")
    assert sorted(np.asarray(shuffled.image(i)).tobytes() for i in range(24)) == sorted(np.asarray(im).tobytes()
                                                                                        for im in hf_images())
    other = hf.map(lambda r: {"species": 7 - r["species"], "kind": "fish" if r["kind"] == "bird" else "bird"})
    assert print_of(other) != print_of(hf)


def test_huggingface_parts(hf, tmp_path):
    datasets = pytest.importorskip("datasets")
    dd = datasets.DatasetDict(train=hf.select(range(18)), test=hf.select(range(18, 24)))
    test = data.from_huggingface(dd, ["species", "kind"])
    assert classes(test) == {"s6", "s7"} and np.array_equal(np.asarray(test.image(5)), np.asarray(hf_images()[23]))
    assert len(data.from_huggingface(dd, "species", split="val", val=3)) == 6
    both = data.from_huggingface(dd, ["species", "kind"], keep_split=False)
    assert len(both) == 12 and np.array_equal(np.asarray(both.image(11)), np.asarray(hf_images()[int(both.index[11])]))
    with pytest.raises(ValueError, match="part 'extra' .*keep_split=False"):
        data.from_huggingface(datasets.DatasetDict(train=hf, extra=hf), "species")
    dd.save_to_disk(tmp_path / "saved")
    hf.save_to_disk(tmp_path / "one")
    assert load("huggingface", "test", tmp_path / "saved", levels=["species", "kind"]).fingerprint == test.fingerprint
    assert len(load("huggingface", "test", tmp_path / "one", levels="species")) == 12


@pytest.mark.parametrize("kind", ["paths", "bytes"])
def test_huggingface_other_images(hf, tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    for i, im in enumerate(hf_images()): im.save(tmp_path / f"{i}.png")
    cells = [str(tmp_path / f"{i}.png") if kind == "paths" else (tmp_path / f"{i}.png").read_bytes() for i in range(24)]
    ds = data.from_huggingface(datasets.Dataset.from_dict(dict(photo=cells, label=[i // 3 for i in range(24)])),
                               "label", "photo", "all")
    assert np.array_equal(np.asarray(ds.image(9)), np.asarray(hf_images()[9]))
    assert ds.class_names == [[str(i) for i in range(8)]]
    if kind == "paths":
        os.remove(cells[4])
        with pytest.raises(OSError, match=r"cannot read image 4 .*row 4: No such file"): ds.image(4)


def test_huggingface_errors(hf, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="no column 'specie'. Did you mean 'species'"):
        data.from_huggingface(hf, ["specie"])
    with pytest.raises(ValueError, match="no column 'img' with images.*image"):
        data.from_huggingface(hf, "species", "img")
    gap = datasets.Dataset.from_dict(dict(image=["a", "b"], kind=["x", None]))
    with pytest.raises(ValueError, match=r"row 1 .*no value in column 'kind'; 1 rows"):
        data.from_huggingface(gap, "kind")
    unknown = hf.map(lambda r: {"species": -1 if r["species"] == 2 else r["species"]})
    with pytest.raises(ValueError, match="3 rows have no known class"): data.from_huggingface(unknown, "species")
    everything = data.from_huggingface(unknown, ["species", "kind"], split="all")
    assert everything.labels[6:9].tolist() == [[-1, 0]] * 3 and "s2" not in everything.class_names[0]
    with pytest.raises(FileNotFoundError, match="written by `save_to_disk`"):
        load("huggingface", "test", tmp_path, levels=["species"])
    with pytest.raises(ValueError, match="data_dir is missing"): load("huggingface", levels=["species"])


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load("huggingface", "test", tmp_path, levels=["label"])


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_to_folders(tmp_path):
    "A link to another folder is followed, one that leads back is named."
    for p in ("a/x/1.png", "b/2.png"):
        (tmp_path / p).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / p).write_bytes(b"")
    (tmp_path / "a/more").symlink_to(tmp_path / "b")
    assert data.find_images(tmp_path) == ["a/more/2.png", "a/x/1.png", "b/2.png"]
    for to in (tmp_path, tmp_path / "a"):
        (link := tmp_path / "a/x/back").symlink_to(to)
        with pytest.raises(ValueError, match="back is a link to .*, which holds it"): data.find_images(tmp_path)
        link.unlink()


@pytest.mark.parametrize("names, wanted", [
    (("my_train/a", "my_test/b"), "splits or classes"), (("01_train/a", "02_test/b"), "splits or classes"),
    (("images/train/a", "images/test/b"), "lie below other folders"),
    (("a/Train", "a/Test"), "lie below other folders")])
def test_folders_that_are_probably_splits_are_refused(names, wanted):
    with pytest.raises(ValueError, match=wanted): data.folder_frame([f"{n}/1.jpg" for n in names])


def test_classes_that_are_trains_are_classes():
    frame = data.folder_frame(["freight_train/1.jpg", "steam_train/1.jpg"])
    assert frame.level0.tolist() == ["freight_train", "steam_train"]


def test_a_folder_minus_one_is_unknown_at_every_level():
    assert data.folder_frame(["a/-1/1.jpg", "a/b/1.jpg"]).level0.tolist() == ["-1", "a/b"]


def test_columns_of_a_table_that_contradict_each_other_are_refused(tree):
    frame, path = table_of(tree), tree / "t.csv"
    frame.assign(Split="train", SPLIT="test").to_csv(path, index=False)
    with pytest.raises(ValueError, match="two columns of splits"): load("table", data_dir=path)
    frame.to_csv(path, index=False)
    with pytest.raises(ValueError, match="holds the images"): load("table", data_dir=path, levels=["path"])


@pytest.mark.parametrize("levels, wanted", [(["a", "a"], "each level once"), ("image", "each level once")])
def test_levels_of_hugging_face_that_cannot_be_are_refused(levels, wanted):
    datasets = pytest.importorskip("datasets")
    found = datasets.Dataset.from_dict(dict(image=["x"], a=[0]))
    with pytest.raises(ValueError, match=wanted): data.from_huggingface(found, levels)
    with pytest.raises(ValueError, match="stream"): data.from_huggingface(found.to_iterable_dataset(), "a")


def test_numbers_beyond_64_signed_bits_are_no_unknown_labels():
    with pytest.raises(ValueError, match="2\\*\\*63"): check_labels(np.array([2 ** 64 - 1], np.uint64))
