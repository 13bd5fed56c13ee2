"""CUB, Cars, SOP, In-shop on small trees in the official layout: split rules, levels, order, damaged copies."""
import dataclasses, shutil, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.io import savemat

from hapnb import benchmarks
from hapnb.data import load
from hapnb.benchmarks import missing, source_of
from layouts_fine import CARS, CUB, INSHOP, SOP, lines, make_cars, make_cub, make_inshop, make_sop, taxonomy_cub

MAKE = dict(cub=make_cub, cars=make_cars, sop=make_sop, inshop=make_inshop)
NAMES = sorted(MAKE)
finest = lambda ds: [ds.class_names[0][l] for l in ds.labels[:, 0]]
files = lambda ds, root: [Path(ds.store.name(int(j))).relative_to(root).as_posix() for j in ds.index]


def edit(path, change, encoding="utf-8"):
    path.write_bytes(change(path.read_bytes().decode()).encode(encoding))


# ---- what all have in common

def disjoint_splits(name, root):
    "All splits of a dataset and their finest classes, after checking which classes may be in two of them."
    d = {s: load(name, s, root, counts=False) for s in ("train", "fit", "val", "test", "all")}
    classes = {s: set(x.class_names[0]) for s, x in d.items()}
    assert not classes["train"] & classes["test"] and not classes["fit"] & classes["val"]
    assert classes["fit"] | classes["val"] == classes["train"] and classes["train"] | classes["test"] == classes["all"]
    return d, classes


@pytest.mark.parametrize("name", NAMES)
def test_splits(tmp_path, name):
    root = MAKE[name](tmp_path)
    d, classes = disjoint_splits(name, root)
    assert len(classes["val"]) == 1 and len(classes["train"]) == 6  # every sixth
    assert len(d["train"]) + len(d["test"]) == len(d["all"]) and len(d["fit"]) + len(d["val"]) == len(d["train"])
    assert len({x.fingerprint for x in d.values()}) == 5
    for x in d.values():
        x.check()
        for level, names in enumerate(x.class_names):
            assert sorted(set(x.labels[:, level].tolist())) == list(range(len(names)))


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_or_its_parent(tmp_path, name):
    root = MAKE[name](tmp_path)
    assert load(name, "test", tmp_path, counts=False).fingerprint == load(name, "test", str(root),
                                                                          counts=False).fingerprint
    with pytest.raises(FileNotFoundError, match=r"looked for .*Get it from http"):
        load(name, "test", (tmp_path / "empty").mkdir() or tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="does not exist"): load(name, "test", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="data_dir is missing"): load(name, "test")


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_asserted(tmp_path, name, monkeypatch):
    root = MAKE[name](tmp_path)
    with pytest.raises(ValueError, match=r"images, expected [\d,]+; .*expected.*counts=False"): load(name, "test", root)
    ds = {s: load(name, s, root, counts=False) for s in ("train", "test")}
    small = {s: dict(images=len(x), classes=tuple(map(len, x.class_names))) for s, x in ds.items()}
    if name == "inshop":
        small |= {p: dict(images=int((ds["test"].meta.part == p).sum()), classes=(3,)) for p in ("query", "gallery")}
    monkeypatch.setitem(benchmarks.SOURCES, name, dataclasses.replace(source_of(name), counts=small))
    for s in ("train", "fit", "val", "test", "all"): load(name, s, root)  # now they agree
    for part in small:
        wrong = {**small, part: {**small[part], "images": small[part]["images"] + 1}}
        monkeypatch.setitem(benchmarks.SOURCES, name, dataclasses.replace(source_of(name), counts=wrong))
        with pytest.raises(ValueError, match=rf"{name}/{part} has {small[part]['images']} images, expected "
                           rf"{small[part]['images'] + 1}"):
            load(name, "fit", root)


def test_published_counts():
    c = {n: source_of(n).counts for n in NAMES}
    assert (c["cub"]["train"]["images"], c["cub"]["test"]["images"]) == (5864, 5924) and 5864 + 5924 == 11788
    assert (c["cars"]["train"]["images"], c["cars"]["test"]["images"]) == (8054, 8131) and 8054 + 8131 == 8144 + 8041
    assert c["sop"] == {"train": dict(images=59551, classes=(11318, 12)),
                        "test": dict(images=60502, classes=(11316, 12))}
    n = {part: numbers["images"] for part, numbers in c["inshop"].items()}
    assert n["query"] + n["gallery"] == n["test"] == 52712 - n["train"]
    for n in NAMES:
        s = source_of(n)
        assert s.url.startswith("https://") and s.terms and s.size and s.paper and s.title in str(s)
        assert s.layout.strip() in str(s)


@pytest.mark.parametrize("name", NAMES)
def test_missing_says_it_in_sentences(tmp_path, name):
    root = MAKE[name](tmp_path)
    assert missing(name, root, counts=False) == []
    assert any("expected" in s for s in missing(name, root))
    assert any(source_of(name).url in s for s in missing(name, root))
    said = missing(name, tmp_path / "nowhere")
    assert len(said) == 1 and "does not exist" in said[0] or "get it from" in said[1]


@pytest.mark.parametrize("name", NAMES)
def test_missing_and_broken_images(tmp_path, name):
    root = MAKE[name](tmp_path)
    ds = load(name, "test", root, counts=False)
    path = Path(ds.store.name(int(ds.index[1])))
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(OSError, match=rf"{path.name}.*1 of {len(ds)} images look bad"): ds.image(1)
    assert [b[0] for b in ds.bad_images()] == [1]
    path.write_text("<html>404</html>")
    with pytest.raises(OSError, match="not an image"): ds.image(1)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of \d+ images of {name} are missing below(?s:.*){path.name}"):
        load(name, "train", root, counts=False)
    shutil.rmtree(path.parent)
    with pytest.raises(FileNotFoundError, match="are missing|is missing"): load(name, "train", root, counts=False)


@pytest.mark.parametrize("name", NAMES)
def test_shrunken_images_are_other_data(tmp_path, name):
    root = MAKE[name](tmp_path)
    before = load(name, "test", root, counts=False)
    path = Path(before.store.name(0))
    before.image(0).resize((8, 8)).save(path, "JPEG")
    assert load(name, "test", root, counts=False).fingerprint != before.fingerprint


TEXT = dict(cub=["images.txt", "image_class_labels.txt", "classes.txt"], sop=["Ebay_train.txt", "Ebay_test.txt"],
            inshop=["list_eval_partition.txt"])
TABLES = [(n, f) for n in TEXT for f in TEXT[n]]


@pytest.mark.parametrize("name, file", TABLES)
def test_label_files_from_windows(tmp_path, name, file):
    "Windows line ends, a byte-order mark, blanks and tabs, an empty line at the end: all the same data."
    root = MAKE[name](tmp_path)
    before = load(name, "test", root, counts=False)
    edit(root / file, lambda t: "\ufeff" + t.replace("\n", "\r\n").replace(" ", "  \t") + "\r\n  \r\n")
    after = load(name, "test", root, counts=False)
    assert after.fingerprint == before.fingerprint and after.class_names == before.class_names
    assert after.meta.equals(before.meta)


@pytest.mark.parametrize("name, file", TABLES)
def test_damaged_label_files(tmp_path, name, file):
    root = MAKE[name](tmp_path)
    good, load_it = (root / file).read_bytes(), lambda: load(name, "test", root, counts=False)
    rows = good.decode().split("\n")
    def damaged(text, says, error=ValueError):
        (root / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(error, match=says): load_it()
    damaged("\n".join([*rows[:5], rows[5].rsplit(" ", 1)[0], *rows[6:]]), rf"{file}, line 6: \d values, expected \d")
    damaged("\n".join([*rows[:5], rows[5] + " more", *rows[6:]]), rf"{file}, line 6: \d values, expected \d")
    damaged(good[:len(good) // 2 + 3].replace(b"\n\n", b"\n"), rf"{file}|are missing")  # cut in the middle
    damaged("", "has no rows|promises|no column")
    damaged(good[:40] + b"\x00" * 30 + good[40:], rf"{file}.*zero bytes")
    damaged(good.replace(b"1", b"\xff", 1), rf"{file}, line \d: not UTF-8 text \(byte 0xff\)")
    damaged(good.decode().encode("utf-16"), rf"{file}, line 1: not UTF-8")
    (root / file).unlink()
    with pytest.raises(FileNotFoundError, match=file): load_it()
    (root / file).write_bytes(good)
    load_it()


def test_first_line_short_and_only_line_long(tmp_path):
    "A first line that is short must not decide what is short."
    lines(tmp_path / "a.txt", ["1 2", "1 2 3", "4 5 6"])
    with pytest.raises(ValueError, match="line 1: 2 values, expected 3"):
        benchmarks.read_rows(tmp_path / "a.txt", ["a", "b", "c"])
    lines(tmp_path / "a.txt", ["1 2 3 4", "1 2 3"])
    with pytest.raises(ValueError, match="line 1: 4 values"): benchmarks.read_rows(tmp_path / "a.txt", ["a", "b", "c"])
    lines(tmp_path / "a.txt", ['"1 2" 3', "NA null 007"])
    assert benchmarks.read_rows(tmp_path / "a.txt", ["a", "b", "c"]).values.tolist() == [['"1', '2"', "3"],
                                                                                         ["NA", "null", "007"]]


# ---- CUB

def test_cub_rules(tmp_path):
    root = make_cub(tmp_path)
    train, test = (load("cub", s, root, counts=False) for s in ("train", "test"))
    assert train.class_names[0] == [n for i, n in CUB.items() if i <= 100]
    assert test.class_names[0] == [n for i, n in CUB.items() if i > 100]
    assert train.level_names == ("species",)
    assert train.meta.image_id.tolist() == [str(i) for i in range(1, 19)]  # official order
    assert files(test, root)[0] == "images/101.White_Pelican/White_Pelican_0001_10100.jpg"
    assert train.image(1).mode == "RGB"  # some of the originals are grey
    assert train.protocol == test.protocol == {}


def test_cub_is_joined_by_number(tmp_path):
    root = make_cub(tmp_path)
    before = load("cub", "all", root, counts=False)
    for f in ("image_class_labels.txt", "classes.txt"):
        edit(root / f, lambda t: "\n".join(reversed(t.strip().split("\n"))) + "\n")
    after = load("cub", "all", root, counts=False)
    assert finest(before) == finest(after) and before.fingerprint == after.fingerprint
    for path, name in zip(files(after, root), finest(after)): assert path.split("/")[1] == name


def test_cub_damaged_numbers(tmp_path):
    root, get = make_cub(tmp_path), lambda: load("cub", "test", tmp_path, counts=False)
    labels = (root / "image_class_labels.txt").read_text()
    for text, says in ((labels.replace("5 1\n", "", 1) if "5 1\n" in labels else labels.replace("5 2\n", "", 1),
                        r"image_class_labels.txt has no row for 5 \(1 are missing\)"),
                       (labels + "3 1\n", "3 stands there twice"), (labels.replace("3 1\n", "3 999\n", 1),
                                                                    "classes.txt has no row for 999"),
                       (labels.replace("3 1\n", "3 one\n", 1), "'one' in column 'class_id' is not a whole number"),
                       (labels.replace("3 1\n", "3 1.5\n", 1), "'1.5'")):
        assert text != labels
        (root / "image_class_labels.txt").write_text(text)
        with pytest.raises(ValueError, match=says): get()


@pytest.mark.parametrize("by", ["id", "name"])
def test_cub_taxonomy(tmp_path, by):
    root, table = make_cub(tmp_path), taxonomy_cub(tmp_path / "taxonomy.csv", by)
    train, test = (load("cub", s, root, counts=False, taxonomy=table) for s in ("train", "test"))
    assert train.level_names == ("species", "family", "order")
    assert test.class_names[2] == ["Passeriformes", "Pelecaniformes"]
    assert [len(c) for c in train.class_names] == [6, 5, 4]
    at = train.class_names[0].index("002.Laysan_Albatross")
    row = train.labels[train.labels[:, 0] == at][0]
    assert (train.class_names[1][row[1]], train.class_names[2][row[2]]) == ("albatrosses", "Procellariiformes")
    assert test.fingerprint != load("cub", "test", root, counts=False).fingerprint


def test_damaged_taxonomy(tmp_path):
    root, table = make_cub(tmp_path), tmp_path / "t.csv"
    good = Path(taxonomy_cub(tmp_path / "good.csv")).read_text()
    for text, says in ((good.replace("2,albatrosses,Procellariiformes\n", ""), "has no row for 2"),
                       (good + "1,x,y\n", "1 stands there twice"), (good.replace("class,", "id,"),
                                                                    "first line must be class"),
                       (good.replace("family,order", "species,order"), "column 'species' exists already"),
                       (good.replace("50,grebes,Podicipediformes", "50,grebes"), "Expected 3 columns"),
                       (good.replace("2,albatrosses,Procellariiformes", "2,albatrosses,Passeriformes"), "not a tree")):
        assert text != good
        table.write_text(text)
        with pytest.raises(ValueError, match=says): load("cub", "all", root, counts=False, taxonomy=table)
    with pytest.raises(FileNotFoundError, match="nothing.csv"):
        load("cub", "all", root, counts=False, taxonomy=tmp_path / "nothing.csv")


# ---- Cars

@pytest.mark.parametrize("devkit", [False, True])
def test_cars_rules(tmp_path, devkit):
    root = make_cars(tmp_path, devkit)
    train, test = (load("cars", s, root, counts=False) for s in ("train", "test"))
    assert set(train.class_names[0]) == {n for i, n in CARS.items() if i <= 98}
    assert set(test.class_names[0]) == {n for i, n in CARS.items() if i >= 99}
    assert train.level_names == ("model",) and train.meta.class_id.max() == 98 and test.meta.class_id.min() == 99
    train.check(), test.check()
    assert load("cars", "test", tmp_path, counts=False).fingerprint == test.fingerprint


def test_cars_devkit_keeps_two_folders_apart(tmp_path):
    "cars_train/00001.jpg and cars_test/00001.jpg are two cars; both folders have classes of either side."
    root = make_cars(tmp_path, devkit=True)
    ds = load("cars", "all", root, counts=False)
    paths = files(ds, root)
    assert len(set(paths)) == len(ds) == 27
    assert {p.split("/")[1] for p in paths if "test" in p} < {p.split("/")[1] for p in paths if "train" in p}
    assert {p.split("/")[0] for p, n in zip(paths, finest(ds)) if n == CARS[196]} == {"cars_train", "cars_test"}
    assert paths == sorted(paths, key=lambda p: (p.startswith("cars_test"), p))  # train's rows first
    (root / "cars_test_annos_withlabels.mat").rename(root / "devkit" / "cars_test_annos_withlabels.mat")
    assert load("cars", "all", root, counts=False).fingerprint == ds.fingerprint
    (root / "devkit" / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(FileNotFoundError, match="lacks cars_test_annos_withlabels.mat, the classes of the test images"):
        load("cars", "train", root, counts=False)


def test_cars_both_editions_agree_on_names(tmp_path):
    a, b = make_cars(tmp_path / "a"), make_cars(tmp_path / "b", devkit=True)
    assert load("cars", "train", a, counts=False).class_names == load("cars", "train", b, counts=False).class_names


def test_cars_taxonomy(tmp_path):
    root = make_cars(tmp_path)
    lines(tmp_path / "types.csv", ["class,type"] + [f"{i},{n.split()[-2]}" for i, n in CARS.items()])
    train = load("cars", "train", root, counts=False, taxonomy=tmp_path / "types.csv")
    assert train.level_names == ("model", "type") and train.class_names[1] == ["Cab", "SUV", "Sedan", "Van"]


def test_damaged_cars(tmp_path):
    root = make_cars(tmp_path)
    file, get = root / "cars_annos.mat", lambda: load("cars", "test", root, counts=False)
    good = file.read_bytes()
    for bad in (b"", b"<html>404</html>", good[:200], good[:len(good) // 2], good[:500] + b"\xff" * 200 + good[700:]):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="cars_annos.mat is not a MATLAB file that can be read"): get()
    savemat(file, dict(annotation=[1]))
    with pytest.raises(ValueError, match="no variable 'annotations'. Did you mean 'annotation'"): get()
    savemat(file, dict(annotations=np.zeros((1, 2), dtype=[("fname", object), ("class", object)]),
                       class_names=np.array([["a"]], dtype=object)))
    with pytest.raises(ValueError, match="no field 'relative_im_path', but fname, class"): get()
    file.unlink()
    with pytest.raises(FileNotFoundError, match="cars_annos.mat"): get()


def test_cars_class_without_a_name(tmp_path):
    root = make_cars(tmp_path)
    from scipy.io import loadmat
    found = loadmat(root / "cars_annos.mat")
    savemat(root / "cars_annos.mat", dict(annotations=found["annotations"], class_names=found["class_names"][:, :100]))
    with pytest.raises(ValueError, match="class_names has no row for 196"): load("cars", "all", root, counts=False)


# ---- SOP

def test_sop_rules(tmp_path):
    root = make_sop(tmp_path)
    train, test = (load("sop", s, root, counts=False) for s in ("train", "test"))
    assert train.class_names == [[str(c) for c in SOP["train"]], ["bicycle", "chair", "coffee_maker"]]
    assert train.level_names == ("product", "kind")
    assert test.class_names == [["11319", "11320", "11321"], ["bicycle", "chair"]]
    assert test.meta.image_id.tolist() == [str(i) for i in range(19, 28)]
    assert files(test, root)[0] == "bicycle_final/111000011319_0.JPG"


def test_sop_numbers_sort_as_numbers(tmp_path):
    root = make_sop(tmp_path)
    edit(root / "Ebay_test.txt", lambda t: t.replace(" 11319 ", " 100000 "))
    assert load("sop", "test", root, counts=False).class_names[0] == ["11320", "11321", "100000"]


def test_damaged_sop(tmp_path):
    root = make_sop(tmp_path)
    good = (root / "Ebay_test.txt").read_text()
    for text, says in ((good.replace("super_class_id", "super_id"), "no column 'super_class_id'. Did you mean "
                        "'super_id'"), (good.replace("19 11319 1 ", "19 11319 3 "), "do not agree"),
                       (good.replace(" 11319 ", " x "), "'x' in column"),
                       (good.replace("19 11319 1 bicycle", "19 11319 3 chair", 1), "are missing")):
        assert text != good
        (root / "Ebay_test.txt").write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=says): load("sop", "test", root, counts=False)


def test_sop_product_of_two_kinds(tmp_path):
    root = make_sop(tmp_path)
    edit(root / "Ebay_test.txt", lambda t: t.replace(" 11320 ", " 11319 "))  # a bicycle that is a chair
    with pytest.raises(ValueError, match="product, kind of sop are not a tree"): load("sop", "test", root, counts=False)


# ---- In-shop

@pytest.mark.parametrize("folders", [False, True])
def test_inshop_rules(tmp_path, folders):
    root = make_inshop(tmp_path, folders)
    train, test = (load("inshop", s, root, counts=False) for s in ("train", "test"))
    assert train.level_names == ("item", "category", "gender")
    assert set(train.class_names[0]) == {f"id_{i:08d}" for _, i, p in INSHOP if p[0] == "train"}
    assert set(test.class_names[0]) == {"id_00000001", "id_00000081", "id_00000083"}
    assert test.class_names[1:] == [["MEN/Shirts_Polos", "WOMEN/Blouses_Shirts", "WOMEN/Denim"], ["MEN", "WOMEN"]]
    assert test.protocol == {"kind": "query-gallery"} and train.protocol == {}
    assert load("inshop", "all", root, counts=False).protocol == {}
    assert test.meta.part.tolist() == [p for _, _, parts in INSHOP if parts[0] != "train" for p in parts]
    assert set(train.meta.part) == {"fit", "val"}
    assert test.subset([0, 2]).protocol == test.protocol
    assert test.subset([0, 2]).meta.part.tolist() == ["query", "gallery"]
    train.check(), test.check()


def test_inshop_denim_is_two_categories(tmp_path):
    ds = load("inshop", "all", make_inshop(tmp_path), counts=False)
    assert {"MEN/Denim", "WOMEN/Denim"} <= set(ds.class_names[1])


def test_inshop_rows_in_any_order(tmp_path):
    root = make_inshop(tmp_path)
    edit(root / "list_eval_partition.txt", lambda t: "\n".join((r := t.strip().split("\n"))[:2] + r[:1:-1]) + "\n")
    test = load("inshop", "test", root, counts=False)
    assert test.meta.part.tolist() == [p for _, _, parts in reversed(INSHOP) if parts[0] != "train"
                                       for p in reversed(parts)]


def test_inshop_item_in_two_categories(tmp_path):
    root = make_inshop(tmp_path)
    new = "img/WOMEN/Skirts/id_00000081/09_1_front.jpg"
    (root / new).parent.mkdir(parents=True)
    shutil.copy(root / "img/WOMEN/Denim/id_00000081/01_1_front.jpg", root / new)
    edit(root / "list_eval_partition.txt", lambda t: f"{int(t.split()[0]) + 1}\n" + t.split("\n", 1)[1]
         + f"{new} id_00000081 gallery\n")
    with pytest.warns(UserWarning, match="1 images lie in another category"):
        test = load("inshop", "test", root, counts=False)
    assert "WOMEN/Skirts" not in test.class_names[1] and finest(test)[-1] == "id_00000081"


def test_damaged_inshop(tmp_path):
    root = make_inshop(tmp_path)
    good = (root / "list_eval_partition.txt").read_text()
    rows = good.split("\n")
    for text, says in (("\n".join(rows[:8] + rows[9:]), "promises '22' rows, there are 21"),
                       (good.replace(" query", " probe", 1), "unknown evaluation status 'probe'"),
                       (good.replace("item_id ", "item ", 1), "no column 'item_id'"),
                       (good.replace("img/MEN/Denim/id", "pictures/id", 1), "is not img/gender/category/item/image"),
                       ("\n".join(rows[1:]), "no column 'image_name'|values, expected")):
        assert text != good
        (root / "list_eval_partition.txt").write_text(text)
        with pytest.raises(ValueError, match=says): load("inshop", "test", root, counts=False)


# ---- fetching

def test_fetch_by_hand_or_by_itself(tmp_path, monkeypatch):
    for name in ("cars", "inshop"):
        with pytest.raises(ValueError, match="has to be fetched by hand: http"): benchmarks.fetch(name, tmp_path)
    asked = []
    def fake(url, path, sha256, md5, progress):
        asked.append((url, md5))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.make_archive(str(tmp_path / "x"), "gztar", tmp_path / "made")
        return Path(shutil.copy(tmp_path / "x.tar.gz", path))
    monkeypatch.setattr(benchmarks, "download", fake)
    make_cub(tmp_path / "made")
    benchmarks.fetch("cub", tmp_path / "got", progress=False)
    assert asked == [("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                      "97eceeb196236b17998738112f37df78")]
    assert missing("cub", tmp_path / "got", counts=False) == []


def test_fetch_leaves_tables_alone_and_says_what_is_left(tmp_path, monkeypatch, capsys):
    "The tables of Google Landmarks are no archives; its images are not fetched."
    monkeypatch.setattr(benchmarks, "download", lambda url, path, sha256, md5,
                        progress: path.parent.mkdir(parents=True, exist_ok=True) or path.write_text("id\n") and path)
    benchmarks.fetch("gldv2", tmp_path / "gldv2", progress=False)
    assert {p.name for p in (tmp_path / "gldv2").iterdir()} == {a["name"] for a in source_of("gldv2").archives}
    said = capsys.readouterr().out
    assert "not all of Google Landmarks v2" in said
    assert "train | images/train, index | images/index, test | images/test are missing" in said


def test_a_deleted_archive_is_not_fetched_again(tmp_path, monkeypatch):
    "120 GB of archive may go once it is unpacked; lost images come back only when asked for."
    asked = []
    def fake(url, path, sha256, md5, progress):
        asked.append(url)
        return path if path.is_file() else Path(shutil.copy(tmp_path / "x.tar.gz", path))
    monkeypatch.setattr(benchmarks, "download", fake)
    make_cub(tmp_path / "made")
    shutil.make_archive(str(tmp_path / "x"), "gztar", tmp_path / "made")
    (got := tmp_path / "got").mkdir()
    benchmarks.fetch("cub", got, progress=False)
    (got / "CUB_200_2011.tgz").unlink()
    benchmarks.fetch("cub", got, progress=False)
    assert len(asked) == 1
    next(got.glob("CUB_200_2011/images/*/*.jpg")).unlink()
    with pytest.raises(FileNotFoundError, match=r"Unpack the archive again: hapnb.data.fetch\('cub', DIR, "
                       r"again=True\)\."):
        load("cub", "train", got, counts=False)
    benchmarks.fetch("cub", got, progress=False, again=True)
    assert len(asked) == 2 and missing("cub", got, counts=False) == []


@pytest.mark.parametrize("name, how", [("cars", False), ("sop", True)])
def test_the_way_to_unpack_again_is_named_where_there_is_one(tmp_path, name, how):
    root = MAKE[name](tmp_path)
    for p in root.rglob("*.[jJ][pP][gG]"): p.unlink()
    with pytest.raises(FileNotFoundError) as e: load(name, "train", root, counts=False)
    assert ("hapnb.data.fetch" in str(e.value)) == how


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_beside_the_data_does_not_matter(tmp_path, name):
    "A folder that was on a Mac, with its archive still there, read-only and reached through a link."
    root = MAKE[name](tmp_path / "disk")
    before = load(name, "all", root, counts=False)
    for p in [root, *(p for p in root.rglob("*") if p.is_dir())]:
        (p / ".DS_Store").write_bytes(b"\0\0\0\1Bud1"), (p / "Thumbs.db").write_bytes(b"x")
    for p in [p for p in root.rglob("*") if p.is_file()]: (p.parent / f"._{p.name}").write_bytes(b"\0\5\26\7")
    (root / "all.tar.gz").write_bytes(b"half an archive"), (tmp_path / "home").mkdir()
    (tmp_path / "home" / "data").symlink_to(root.parent, target_is_directory=True)
    for p in root.rglob("*"): p.chmod(0o555 if p.is_dir() else 0o444)
    root.chmod(0o555)
    try: after = load(name, "all", tmp_path / "home" / "data", counts=False)
    finally:
        for p in [root, *root.rglob("*")]: p.chmod(0o755)
    assert after.check() and (len(after), after.fingerprint) == (len(before), before.fingerprint)
    assert torch.equal(after.labels, before.labels)


def test_find_root(tmp_path):
    (tmp_path / "given" / "inside").mkdir(parents=True)
    (tmp_path / "given" / "inside" / "b.txt").write_text("x")
    benchmarks.add_source(benchmarks.Source("found", "Found", "p", "https://example.org", "1 MB", "unknown", "l",
                                            ("a.txt | b.txt",), folders=("inside",)))
    try:
        for place, needs in (("given", "a.txt | b.txt"), ("given/inside", "b.txt")):
            assert benchmarks.find_root(tmp_path / place, (needs,), "found") == tmp_path / "given" / "inside"
        with pytest.raises(FileNotFoundError, match=r"c.txt is missing; .*inside holds b.txt. Get it from "
                           r"https://example.org \(1 MB\)"):
            benchmarks.find_root(tmp_path / "given", ("b.txt", "c.txt"), "found")
        with pytest.raises(FileNotFoundError, match="is a file"):
            benchmarks.find_root(tmp_path / "given/inside/b.txt", ("b.txt",), "found")
    finally: del benchmarks.SOURCES["found"]


def test_read_commas(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes('\ufeffpath, fine_id , note\r\n a.jpg, 007,"x, y"\r\nb.jpg,NA,\r\n'.encode())
    assert benchmarks.read_commas(path, ["fine_id", "path", "note"]).values.tolist() == [["007", "a.jpg", "x, y"],
                                                                                         ["NA", "b.jpg", ""]]
    path.write_text("a,b\n1,2\n3\n")
    with pytest.raises(ValueError, match=r"t\.csv: .*Expected 2 columns, got 1.*Fetch the file again"):
        benchmarks.read_commas(path, ["a"])
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'bb'. Did you mean 'b'"): benchmarks.read_commas(path, ["bb"])
    assert benchmarks.read_commas(path, ["x", "y"], header=False).x.tolist() == ["a", "1"]
    path.write_text("")
    with pytest.raises(ValueError, match="has no rows"): benchmarks.read_commas(path, ["a"])
