"The hierarchical benchmarks, read from small trees in the official layouts and from damaged copies of them."
import json, os

import numpy as np
import pandas as pd
import pytest
import torch

from layouts_hier import (
    INAT_TEST, SPECIES, glued, image_id, jpeg, make_dyml, make_gldv2, make_inat, make_vehicleid, put)

from hapnb import hierarchies as H, landmarks as L
from hapnb.core import check_labels
from hapnb.benchmarks import SOURCES, missing
from hapnb.data import load
from hapnb.protocols import evaluate_protocol

MAKE = {"inat-base": make_inat, "inat-full": make_inat, "vehicleid": make_vehicleid, "gldv2": make_gldv2,
        **{f"dyml-{k}": (lambda root, k=k: make_dyml(root, k)) for k in ("vehicle", "animal", "product")}}
ALL, DYML = sorted(MAKE), ["dyml-animal", "dyml-vehicle"]


@pytest.fixture(scope="module", params=ALL)
def either(request, tmp_path_factory):
    "Every dataset in turn: its name and an undamaged tree."
    return request.param, MAKE[request.param](tmp_path_factory.mktemp("tree") / "data")


def get(name, split, root, **kw): return load(name, split, root, **{"counts": False, **kw})
def names(ds, level=0): return [ds.class_names[level][i] if i >= 0 else None for i in ds.labels[:, level].tolist()]
def files(ds): return [ds.store.name(int(i)) for i in ds.index]
def edit(path, change): path.write_bytes(change(path.read_bytes()))


# ---- what all of them share

def test_splits(either):
    "fit and val are the two halves of train by class; no class of train is in test; labels are 0..C-1 and a tree."
    name, root = either
    train, fit, val, test = (get(name, s, root, **({"val": 3} if s != "test" else {}))
                             for s in ("train", "fit", "val", "test"))
    assert sorted(files(fit) + files(val)) == sorted(files(train)) and not set(files(train)) & set(files(test))
    assert not set(fit.class_names[0]) & set(val.class_names[0])
    assert len(val.class_names[0]) == len(train.class_names[0]) // 3
    # the others number them apart
    if not name.startswith(("dyml", "gldv2")): assert not set(train.class_names[0]) & set(test.class_names[0])
    for ds in (train, fit, val):
        check_labels(ds.labels)
        assert not ds.protocol and ds.level_names == test.level_names
        for level, known in enumerate(ds.class_names):
            assert sorted(set(ds.labels[:, level].tolist())) == list(range(len(known)))
    assert len({d.fingerprint for d in (train, fit, val, test)}) == 4


def test_images_decode_and_order_is_official(either):
    name, root = either
    for split in ("train", "test"):
        ds = get(name, split, root)
        assert ds.check() is ds and ds.image(0).size == (24, 24) and len(set(files(ds))) == len(ds)
        again = get(name, split, root)
        assert again.fingerprint == ds.fingerprint and files(again) == files(ds)
        assert torch.equal(again.labels, ds.labels)


def test_counts_are_the_published_ones(either):
    "A small copy is refused with both numbers, and the message says how to use it all the same."
    name, root = either
    with pytest.raises(ValueError, match=r"expected [\d,]+.*counts=False"): load(name, "train", root)


def test_source(either):
    name, root = either
    source = SOURCES[name]
    assert source.url.startswith("http") and source.title in str(source) and source.paper and source.terms
    assert source.size
    assert get(name, "train", root.parent if root.name in source.folders else root)
    for a in source.archives: assert a["url"].endswith(a["name"]) and len(a.get("md5", "0" * 32)) == 32


def test_the_folder_above_will_do(either, tmp_path):
    name, root = either
    for folder in SOURCES[name].folders: os.symlink(root, tmp_path / folder)
    assert len(get(name, "train", tmp_path)) == len(get(name, "train", root))


def test_wrong_folder(either, tmp_path):
    name, _ = either
    with pytest.raises(FileNotFoundError, match="does not exist"): get(name, "test", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="(?s)missing.*is empty.*Get it from http"): get(name, "test", tmp_path)
    with pytest.raises(ValueError, match="data_dir is missing"): get(name, "test", None)


def test_unknown_split_and_argument(either):
    name, root = either
    with pytest.raises(ValueError, match="Did you mean 'train'"): get(name, "trian", root)
    with pytest.raises(ValueError, match="Did you mean 'counts'"): load(name, "train", root, count=False)


def test_missing_says_nothing_where_all_is_there(either, tmp_path):
    name, root = either
    assert missing(name, root, counts=False) == []
    said = missing(name, root)
    assert said and "expected" in said[0] and any(SOURCES[name].url in s for s in said)
    assert any("missing" in s for s in missing(name, tmp_path))


# ---- damage

LISTS = {"inat-base": ["Inat_dataset_splits/Inaturalist_train_set1.txt",
                       "Inat_dataset_splits/Inaturalist_test_set1.txt"],
         "inat-full": ["Inat_dataset_splits/Inaturalist_train_set1.txt",
                       "Inat_dataset_splits/Inaturalist_test_set1.txt", "train2018.json"],
         "dyml-vehicle": ["train/label.csv", "bmk_fine/query.csv", "bmk_middle/gallery.csv"],
         "dyml-animal": ["train/label.csv", "bmk_coarse/query.csv"],
         "dyml-product": ["train/label.csv", "mini-bmk_all_in_one/label.csv"],
         "vehicleid": ["train_test_split/train_list.txt", "train_test_split/test_list_800.txt"],
         "gldv2": ["train_clean.csv", "train_label_to_hierarchical.csv", "index.csv", "index_image_to_landmark.csv",
                   "index_label_to_hierarchical.csv", "retrieval_solution_v2.1.csv"]}
CASES = [(n, f) for n in ALL for f in LISTS[n]]
IMAGE = {"inat-base": "train_val2018", "inat-full": "train_val2018", "vehicleid": "image", "gldv2": "index",
         "dyml-product": "train", "dyml-vehicle": "bmk_middle", "dyml-animal": "bmk_fine/query"}


def both(name, root):
    "Load train and test; the first error wins."
    return [get(name, s, root) for s in ("train", "test")]


@pytest.mark.parametrize("name, file", CASES)
def test_missing_list(name, file, tmp_path):
    root = MAKE[name](tmp_path / "data")
    (root / file).unlink()
    with pytest.raises(FileNotFoundError, match=file.rsplit("/", 1)[-1].replace(".", r"\.")): both(name, root)


@pytest.mark.parametrize("name, file", CASES)
def test_wrong_encoding(name, file, tmp_path):
    root = MAKE[name](tmp_path / "data")
    edit(root / file, lambda b: b[:len(b) // 2] + b"\xe9\xff" + b[len(b) // 2:])
    with pytest.raises(ValueError, match=r"line \d+: not UTF-8"): both(name, root)


# one column: no row can be short
@pytest.mark.parametrize("name, file", [c for c in CASES if not c[1].endswith(("index.csv", "json"))])
def test_short_row(name, file, tmp_path):
    "The last line lost its end: two lists are recognised by the form of a path, the others by the number of values."
    root, cut = MAKE[name](tmp_path / "data"), {".txt": b" ", ".csv": b","}[file[-4:]] if "inat" not in name else b"/"
    edit(root / file, lambda b: b.rstrip().rpartition(cut)[0] if name != "gldv2" else b.rstrip().rpartition(b"\n")[0]
         + b"\nabc\n")
    with pytest.raises(ValueError, match=r"(?i)(line|image|row) #?\d+"): both(name, root)


@pytest.mark.parametrize("name, file", CASES)
def test_empty_list(name, file, tmp_path):
    root = MAKE[name](tmp_path / "data")
    (root / file).write_bytes(b"")
    with pytest.raises(ValueError, match=file.rsplit("/", 1)[-1].replace(".", r"\.")): both(name, root)


@pytest.mark.parametrize("name", ALL)
def test_missing_image(name, tmp_path):
    root = MAKE[name](tmp_path / "data")
    gone = sorted((root / IMAGE[name]).rglob("*.jpg"))[:2]
    for p in gone: p.unlink()
    with pytest.raises(FileNotFoundError, match="(?s)1 of|2 of.*missing") as e: both(name, root)
    assert gone[0].name in str(e.value)


@pytest.mark.parametrize("name", ALL)
def test_undecodable_image(name, tmp_path):
    "Half a JPEG is found by `check` and by `image`, each naming the file."
    root = MAKE[name](tmp_path / "data")
    ds = get(name, "train", root)
    bad = files(ds)[3]
    edit(root / os.path.relpath(bad, root), lambda b: b[:len(b) // 2])
    with pytest.raises(OSError, match="1 of .* images") as e: get(name, "train", root).check()
    assert bad in str(e.value)
    with pytest.raises(OSError, match="looks? bad"): ds.image(3)


@pytest.mark.parametrize("name", ALL)
def test_a_changed_label_changes_the_fingerprint(name, tmp_path):
    root = MAKE[name](tmp_path / "data")
    before = get(name, "train", root).fingerprint
    file, old, new = {"inat-base": (None, "train_val2018/Fungi/1005", "train_val2018/Fungi/1077"),
                      "inat-full": ("train2018.json", '"Quercus"', '"Fagus"'),
                      "vehicleid": ("train_test_split/train_list.txt", "0000001 0\n", "0000001 1\n"),
                      "gldv2": ("train_label_to_hierarchical.csv", ",church,",
                                ",chapel,")}.get(name, ("train/label.csv", ", 115\n", ", 114\n"))
    if file: edit(root / file, lambda b: b.replace(old.encode(), new.encode()))
    else:
        (root / old).rename(root / new)
        edit(root / LISTS[name][0], lambda b: b.replace(old.encode(), new.encode()))
    assert get(name, "train", root).fingerprint != before


# ---- iNaturalist

@pytest.fixture(scope="module")
def inat(tmp_path_factory): return make_inat(tmp_path_factory.mktemp("inat") / "Inaturalist")


def test_inat_base(inat):
    for split, here in (("train", [i for i in range(12) if i not in INAT_TEST]), ("test", INAT_TEST)):
        ds = get("inat-base", split, inat)
        assert ds.level_names == ("species", "supercategory")
        assert ds.class_names == [[str(995 + i) for i in here], sorted({SPECIES[i][0] for i in here})]
        listed = (inat / f"Inat_dataset_splits/Inaturalist_{split}_set1.txt").read_text().split()
        assert files(ds) == [f"{inat}/{p}" for p in listed]
        assert list(zip(names(ds), names(ds, 1))) == [tuple(p.split("/")[2:0:-1]) for p in listed]
    every = get("inat-base", "all", inat)
    # 995 before 1000
    assert len(every) == 48 and every.class_names[0] == sorted((str(995 + i) for i in range(12)), key=int)


def test_inat_full(inat):
    ds = get("inat-full", "all", inat)
    assert ds.level_names == ("species", "genus", "family", "order", "class", "phylum", "kingdom")
    for path, row in zip(files(ds), zip(*(names(ds, l) for l in range(7)))):
        _, kingdom, phylum, clas, order, family, genus = SPECIES[int(path.split("/")[-2]) - 995]
        assert row == (path.split("/")[-2], f"Oenanthe ({family})" if genus == "Oenanthe" else genus, family, order,
                       clas, phylum, kingdom)
    assert "Oenanthe (Apiaceae)" in ds.class_names[1] and "Oenanthe (Muscicapidae)" in ds.class_names[1]
    base = get("inat-base", "all", inat)
    assert torch.equal(base.labels[:, 0], ds.labels[:, 0])


def test_inat_val_is_the_same_at_both_hierarchies(inat):
    assert files(get("inat-base", "val", inat)) == files(get("inat-full", "val", inat))


def test_inat_lists_in_the_folder_itself(tmp_path):
    root = make_inat(tmp_path / "data", splits=".")
    assert len(get("inat-base", "train", root)) == 28


def test_inat_published_names_count_before_homonyms_are_told_apart(inat, monkeypatch):
    published = SOURCES["inat-full"].counts
    full = get("inat-full", "train", inat)
    raw = [len({SPECIES[i][-l] for i in range(12) if i not in INAT_TEST}) for l in range(1, 7)]
    wanted = dict(images=28, classes=(7, *raw))
    monkeypatch.setitem(published, "train", wanted)
    assert len(full.class_names[1]) == raw[0] + 1  # two genera share a name
    load("inat-full", "train", inat)
    monkeypatch.setitem(published, "train", wanted | dict(classes=(7, raw[0] + 1, *raw[1:])))
    with pytest.raises(ValueError, match="classes at level 1"): load("inat-full", "train", inat)


def test_inat_taxonomy_from_categories(tmp_path, monkeypatch):
    root = make_inat(tmp_path / "data")
    found = json.loads((root / "train2018.json").read_text())["categories"]
    monkeypatch.setitem(SOURCES["inat-full"].counts, "train", dict(images=28, classes=(7, 99, 99, 99, 99, 99, 99)))
    with pytest.raises(ValueError, match="classes at level 1"): load("inat-full", "train", root)
    (root / "train2018.json").unlink()
    (root / "categories.json").write_text(json.dumps(found))
    assert len(load("inat-full", "train", root)) == 28  # published are the numbers of the invented names only
    assert [len(c) for c in get("inat-full", "all", root).class_names] == [12, 9, 9, 7, 4, 4, 3]


def test_inat_unknown_species(tmp_path):
    root = make_inat(tmp_path / "data")
    edit(root / "train2018.json", lambda b: b.replace(b'"id": 999,', b'"id": 7,'))
    with pytest.raises(ValueError, match="species 999 of .* has no taxonomy: 4 of"): get("inat-full", "train", root)
    edit(root / "train2018.json", lambda b: b.replace(b'"genus": "Parus"', b'"gender": "Parus"'))
    with pytest.raises(ValueError, match="category 2 has no 'genus'"): get("inat-full", "train", root)


def test_inat_cut_json(tmp_path):
    root = make_inat(tmp_path / "data")
    edit(root / "train2018.json", lambda b: b[:-300])
    with pytest.raises(ValueError, match="train2018.json is not whole JSON"): get("inat-full", "train", root)


@pytest.mark.parametrize("change, message", [
    (lambda t: t + t.split("\n")[0] + "\n", "more than once"),
    (lambda t: t.replace("/995/", "/nine/", 1), r"image \d+: .*nine"),
    (lambda t: t.replace("train_val2018/Aves/995/", "995/", 1), r"image \d+: .*is not train_val2018"),
    (lambda t: "/" + t, "image 1: "),
])
def test_inat_bad_lines(tmp_path, change, message):
    root = make_inat(tmp_path / "data")
    file = root / "Inat_dataset_splits/Inaturalist_train_set1.txt"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=message): get("inat-base", "train", root)


def test_inat_windows_line_ends_and_mark(tmp_path):
    root = make_inat(tmp_path / "data")
    before = get("inat-base", "train", root)
    edit(root / "Inat_dataset_splits/Inaturalist_train_set1.txt", lambda b: b"\xef\xbb\xbf" + b.replace(b"\n", b"\r\n"))
    after = get("inat-base", "train", root)
    assert files(after) == files(before) and after.fingerprint == before.fingerprint


def test_inat_species_on_both_sides(tmp_path):
    root = make_inat(tmp_path / "data")
    lists = [root / f"Inat_dataset_splits/Inaturalist_{p}_set1.txt" for p in ("train", "test")]
    first, *rest = lists[0].read_text().splitlines()
    lists[0].write_text("\n".join(rest) + "\n")
    lists[1].write_text(lists[1].read_text() + first + "\n")
    with pytest.raises(ValueError, match=f"species {first.split('/')[2]} is in the training and in the test list"):
        get("inat-base", "all", root)


# ---- DyML

@pytest.fixture(scope="module", params=["vehicle", "animal"])
def three(request, tmp_path_factory):
    return f"dyml-{request.param}", make_dyml(tmp_path_factory.mktemp("dyml") / f"dyml_{request.param}", request.param)


def test_dyml_train_keeps_the_row_that_is_stuck_to_the_header(three):
    name, root = three
    ds = get(name, "train", root)
    assert (root / "train/label.csv").read_text().startswith("fname, coarse_id, middle_id, fine_id0.jpg, 0, 0, "
                                                             "100\n1.jpg, ")
    assert files(ds) == [f"{root}/train/imgs/{i}.jpg" for i in range(64)]
    assert ds.level_names == ("fine", "middle", "coarse")
    assert ds.labels.tolist() == [[i // 4, i // 8, i // 16] for i in range(64)]
    assert ds.class_names[0] == [str(100 + i) for i in range(16)]
    assert files(get(name, "train", root, first_row=False)) == files(ds)[1:]


def test_dyml_pandas_sees_what_the_official_loader_names(three):
    "The column names that HAPPIER's loader uses exist in our file, so the layout is the official one."
    name, root = three
    table = pd.read_csv(root / "train/label.csv")
    assert {"fname", " fine_id0.jpg", " middle_id", " coarse_id"} <= set(table.columns)
    assert " labels0.jpg" in pd.read_csv(root / "bmk_fine/gallery.csv").columns
    ours = get(name, "train", root, first_row=False)
    assert [[int(n) for n in (names(ours)[i], names(ours, 1)[i], names(ours, 2)[i])]
            for i in range(len(ours))] == table[[" fine_id0.jpg", " middle_id", " coarse_id"]].to_numpy().tolist()


def test_dyml_three_benchmarks(three):
    name, root = three
    ds = get(name, "test", root)
    assert ds.protocol == {"kind": "dyml"}
    assert ds.meta.benchmark.tolist() == ["fine"] * 20 + ["middle"] * 20 + ["coarse"] * 18
    assert files(ds) == [f"{root}/bmk_{b}/gallery/{i}.jpg" for b, n in (("fine", 20), ("middle", 20), ("coarse", 18))
                         for i in range(n)]
    for level, (b, each) in enumerate((("fine", 4), ("middle", 5), ("coarse", 9))):
        rows = np.flatnonzero(ds.meta.benchmark == b)
        assert [int(n) for n in np.array(names(ds, level))[rows]] == [10 * level + i // each for i in range(len(rows))]
        assert (ds.labels[rows][:, [l for l in range(3) if l != level]] == -1).all()
        # found although numbered anew
        assert ds.meta["query"][rows].tolist() == [i % each < 2 for i in range(len(rows))]
    assert ds.counts().classes.tolist() == [5, 4, 2] and ds.subset([0, 30, 50]).protocol == ds.protocol


def test_dyml_evaluates(three):
    "A perfect embedding gets 1 at each level, and the averages are those of the three."
    name, root = three
    ds = get(name, "test", root)
    own = np.unique(ds.labels.numpy(), axis=0, return_inverse=True)[1]
    perfect = torch.nn.functional.one_hot(torch.as_tensor(own)).double()
    found = evaluate_protocol(perfect, ds.labels, ds.meta, ds.protocol)
    assert all(found[k] == pytest.approx(1) for k in ("mAP", "ASI", "R@1", "AP_level0", "AP_level1", "AP_level2"))
    noise = torch.randn(len(ds), 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    found = evaluate_protocol(noise, ds.labels, ds.meta, ds.protocol)
    assert found["mAP"] == pytest.approx(np.mean([found[f"AP_level{l}"] for l in range(3)])) and found["mAP"] < 0.9


def test_dyml_first_row_false_is_the_published_test_set(three):
    "Each list loses its first row; a query whose gallery row is lost cannot be asked any more."
    name, root = three
    ds, whole = get(name, "test", root, first_row=False), get(name, "test", root)
    lost = [0, 20, 40]
    assert files(ds) == [f for i, f in enumerate(files(whole)) if i not in lost]
    asked = {b: set(whole.meta.index[(whole.meta.benchmark == b) & whole.meta["query"]])
             for b in ("fine", "middle", "coarse")}
    first = [16 + 1, 20 + 15 + 1, 40 + 9 + 1]  # query/0.jpg is the last of the gallery rows that are asked
    assert all(f in asked[b] for f, b in zip(first, asked))
    left = [i for b, f, l in zip(asked, first, lost) for i in sorted(asked[b] - {f, l})]
    assert [files(whole)[i] for i in left] == [f for f, q in zip(files(ds), ds.meta["query"]) if q]


@pytest.mark.parametrize("name", DYML)
def test_dyml_match_by_name(name, tmp_path):
    "Where names are the same in both folders, both ways agree; where they are not, the labels give it away."
    root = make_dyml(tmp_path / "data", name[5:])
    with pytest.raises(ValueError, match="as a query and .* in the gallery"): get(name, "test", root, match="name")
    for b in ("fine", "middle", "coarse"):
        gallery = H.read_dyml(root / f"bmk_{b}/gallery.csv", ["labels"])
        asked = gallery.iloc[[3, 0, 7, 5]]
        for f in asked.fname: put(root / f"bmk_{b}/query/{f}", (root / f"bmk_{b}/gallery/{f}").read_bytes())
        put(root / f"bmk_{b}/query.csv", glued(("fname", "labels"), asked.values.tolist()))
    one, two = (get(name, "test", root, match=m) for m in ("content", "name"))
    assert one.meta.equals(two.meta) and one.meta["query"].sum() == 12 and one.fingerprint == two.fingerprint
    with pytest.raises(ValueError, match="Did you mean 'name'"): get(name, "test", root, match="names")


@pytest.mark.parametrize("name", DYML)
def test_dyml_query_outside_the_gallery(name, tmp_path):
    root = make_dyml(tmp_path / "data", name[5:])
    put(root / "bmk_coarse/query/1.jpg", jpeg([99]))
    with pytest.raises(ValueError, match="bmk_coarse: 1 of 4 queries are not in the gallery, such as query/1.jpg"):
        get(name, "test", root)


def test_dyml_duplicates_in_the_gallery(tmp_path):
    "Two equal images asked for twice are two queries, not one."
    wanted, among = [], []
    for i, seed in enumerate((1, 2, 1)): among.append(str(put(tmp_path / f"g{i}.jpg", jpeg([seed]))))
    for i, seed in enumerate((1, 1, 2, 3)): wanted.append(str(put(tmp_path / f"q{i}.jpg", jpeg([seed]))))
    assert H._same_files(wanted, among).tolist() == [0, 2, 1, -1]


def test_dyml_product(tmp_path):
    root = make_dyml(tmp_path / "dyml_product", "product")
    ds = get("dyml-product", "test", root)
    assert ds.protocol == {"kind": "dyml"} and ds.labels.tolist() == [[i // 3, i // 6, i // 12] for i in range(24)]
    assert "benchmark" not in ds.meta
    found = evaluate_protocol(torch.nn.functional.one_hot(ds.labels[:, 0]).double(), ds.labels, ds.meta, ds.protocol)
    assert found["R@1"] == 1 and found["mAP"] == pytest.approx(np.mean([found[f"AP_level{l}"] for l in range(3)]))
    assert found["AP_level2"] < 1


@pytest.mark.parametrize("name", [n for n in ALL if n.startswith("dyml") or n == "gldv2"])
def test_no_split_all_where_labels_are_numbered_apart(name, tmp_path):
    with pytest.raises(ValueError, match="has no split 'all'"): get(name, "all", MAKE[name](tmp_path / "data"))


@pytest.mark.parametrize("text, wanted", [
    ("fname, coarse_id, middle_id, fine_id0.jpg, 3, 12, 145\n1.jpg, 3, 12, 146\n",
     [["0.jpg", 145, 12, 3], ["1.jpg", 146, 12, 3]]),
    ("fname, coarse_id, middle_id, fine_id\n0.jpg, 3, 12, 145\n", [["0.jpg", 145, 12, 3]]),  # a header as it should be
    ("fname,fine_id,middle_id,coarse_id\r\n0.jpg,145,12,3\r\n\r\n", [["0.jpg", 145, 12, 3]]),  # another order
    ("fname, fine_id, middle_id, coarse_idsub/0.jpg, 145, 12, 3", [["sub/0.jpg", 145, 12,
                                                                    3]]),  # one row, no line break at all
])
def test_dyml_headers(tmp_path, text, wanted):
    put(tmp_path / "label.csv", text)
    assert H.read_dyml(tmp_path / "label.csv", ["fine_id", "middle_id", "coarse_id"]).values.tolist() == wanted


@pytest.mark.parametrize("text, message", [
    ("fname, labels0.jpg, 3\n1.jpg\n", "line 2: expected 2 values"), ("fname, labels0.jpg, 3\n1.jpg, 3, 4\n",
                                                                      "line 2: expected 2 values"),
    ("fname, labels0.jpg\n1.jpg, 3\n", "line 1: expected 2 values"), ("fname, labels0.jpg, 3\n1.jpg, x\n",
                                                                      "line 2: labels is 'x', not a number"),
    ("fname, labels\n1.jpg, \n", "line 2"), ("name, labels0.jpg, 3\n", "line 1: expected the columns fname, labels"),
    ("fname, labels\n", "has no rows"), ("", "line 1"), ("fname, labels0.jpg, 1.5\n", "line 1: labels is '1.5'"),
])
def test_dyml_bad_rows(tmp_path, text, message):
    put(tmp_path / "query.csv", text)
    with pytest.raises(ValueError, match=message): H.read_dyml(tmp_path / "query.csv", ["labels"])


def test_dyml_labels_that_are_no_tree(tmp_path):
    root = make_dyml(tmp_path / "data")
    edit(root / "train/label.csv", lambda b: b.replace(b"1.jpg, 0, 0, 100", b"1.jpg, 3, 7, 100"))
    with pytest.raises(ValueError, match="not a tree"): get("dyml-vehicle", "train", root)


# ---- VehicleID

@pytest.fixture(scope="module")
def cars(tmp_path_factory): return make_vehicleid(tmp_path_factory.mktemp("cars") / "VehicleID_V1.0")


@pytest.mark.parametrize("size, vehicles", [("small", 4), ("medium", 6), ("large", 8)])
def test_vehicleid_test_lists(cars, size, vehicles):
    ds = get("vehicleid", "test", cars, size=size)
    assert ds.class_names == [[str(v) for v in range(14, 14 + vehicles)]] and ds.level_names == ("vehicle",)
    assert ds.protocol == {"kind": "random-gallery", "repeats": 10, "seed": 0}
    n = dict(small=800, medium=1600, large=2400)[size]
    listed = (cars / f"train_test_split/test_list_{n}.txt").read_text().split()
    assert files(ds) == [f"{cars}/image/{n}.jpg" for n in listed[::2]] and names(ds) == listed[1::2]
    found = evaluate_protocol(torch.nn.functional.one_hot(ds.labels[:, 0]).double(), ds.labels, ds.meta, ds.protocol,
                              ks=(1, 2))
    assert found["R@1_level0"] == 1 and found["R@1_level0_std"] == 0


def test_vehicleid_numbers_without_zeros(tmp_path):
    root = make_vehicleid(tmp_path / "data")
    before = get("vehicleid", "train", root)
    edit(root / "train_test_split/train_list.txt", lambda b: b.replace(b"\n000000", b"\n").replace(b"\n00000", b"\n"))
    assert files(get("vehicleid", "train", root)) == files(before)


def test_vehicleid_second_level(cars, tmp_path):
    "Vehicles without a model get a class of their own."
    ds = get("vehicleid", "train", cars, coarse="model")
    assert ds.level_names == ("vehicle", "model")
    for v, m in zip(names(ds), names(ds, 1)):
        assert m == (str(int(v) // 4) if int(v) % 5 else f"unknown model of vehicle {v}")
    assert get("vehicleid", "test", cars, coarse="color", size="large").level_names[1] == "color"
    with pytest.raises(ValueError, match="Did you mean 'model'"): get("vehicleid", "train", cars, coarse="modell")
    with pytest.raises(FileNotFoundError, match="model_attr.txt.*leave `coarse` out"):
        get("vehicleid", "train", make_vehicleid(tmp_path / "bare", attributes=False), coarse="model")


def test_vehicleid_published_counts(cars, monkeypatch):
    assert {k: (v["images"], *v["classes"]) for k, v in SOURCES["vehicleid"].counts.items()} == {
        "train": (113346, 13164), "test small": (6493, 800), "test medium": (13377, 1600), "test large": (19777, 2400)}
    with pytest.raises(ValueError, match="vehicleid/test large has .* expected 19,777; 8 classes at level 0, "
                       "expected 2,400"):
        load("vehicleid", "test", cars, size="large")
    monkeypatch.setitem(SOURCES["vehicleid"].counts, "test small", dict(images=14, classes=(4,)))
    assert len(load("vehicleid", "test", cars)) == 14


@pytest.mark.parametrize("line, message", [(b"0000003\n", "1 values|row 15: vehicle is ''"),
                                           (b"0000003 4 5\n", "3 values"), (b"car3 4\n", "image is 'car3'"),
                                           (b"0000003 red\n", "vehicle is 'red'")])
def test_vehicleid_bad_lines(tmp_path, line, message):
    root = make_vehicleid(tmp_path / "data")
    edit(root / "train_test_split/test_list_800.txt", lambda b: b + line)
    with pytest.raises(ValueError, match=message): get("vehicleid", "test", root)


def test_vehicleid_lists_that_overlap(tmp_path):
    root = make_vehicleid(tmp_path / "data")
    edit(root / "train_test_split/test_list_800.txt", lambda b: b + b"0000001 0\n")
    with pytest.raises(ValueError, match="vehicle 0 is in train_list.txt and in test_list_800.txt"):
        get("vehicleid", "all", root)


# ---- Google Landmarks

@pytest.fixture(scope="module")
def gld(tmp_path_factory): return make_gldv2(tmp_path_factory.mktemp("gld") / "gldv2")


def test_gldv2_train(gld):
    "The clean list in its order, without landmarks that have no hierarchical label."
    ds = get("gldv2", "train", gld)
    assert ds.level_names == ("landmark", "hierarchical_label", "natural_or_human_made")
    assert [len(c) for c in ds.class_names] == [10, 3, 2]
    marks = [1000 + 7 * n for n in range(12) if n not in (4, 9)]
    assert list(dict.fromkeys(names(ds))) == [str(m) for m in marks]
    clean = dict(line.split(",") for line in (gld / "train_clean.csv").read_text().splitlines()[1:])
    assert ds.meta.id.tolist() == [i for m in marks for i in clean[str(m)].split()]
    assert all(f == f"{gld}/train/{i[0]}/{i[1]}/{i[2]}/{i}.jpg" for f, i in zip(files(ds), ds.meta.id))
    kinds = ["church", "lake", "bridge", "bridge"]
    assert [names(ds, 1)[i] for i in range(len(ds))] == [kinds[(int(n) - 1000) // 7 % 4] for n in names(ds)]


def test_gldv2_other_trains(gld):
    whole = get("gldv2", "train", gld, levels=())
    assert len(whole) == 48 and whole.level_names == ("landmark",) and len(whole.class_names[0]) == 12
    noisy = get("gldv2", "train", gld, levels=(), clean=False)
    assert len(noisy) == 52 and noisy.meta.id.tolist() == [image_id("train", i) for i in range(52)]
    deep = get("gldv2", "train", gld, levels=("supercategory", "hierarchical_label", "natural_or_human_made"))
    assert [len(c) for c in deep.class_names] == [10, 4, 3, 2]
    with pytest.raises(ValueError, match="Did you mean 'supercategory'"):
        get("gldv2", "train", gld, levels=("supercategories",))


def test_gldv2_test(gld):
    ds = get("gldv2", "test", gld, labelled=True)
    q, g = ds.meta[ds.meta.part == "query"], ds.meta[ds.meta.part == "gallery"]
    t, x = (lambda i: image_id("test", i)), (lambda i: image_id("index", i))
    assert ds.protocol == {"kind": "landmarks", "k": 100} and ds.meta.part.tolist() == ["query"] * 4 + ["gallery"] * 15
    assert q.id.tolist() == [t(0), t(1), t(3), t(6)]
    assert q.usage.tolist() == ["Public", "Private", "Private", "Public"]  # 2, 5, 7 are ignored; 4 shows landmark 34
    assert q.matches.tolist() == [f"{x(0)} {x(6)} {x(12)}", f"{x(1)} {x(7)}", x(2), f"{x(3)} {x(9)} {x(15)}"]
    assert set(g.matches) == {""}
    assert names(ds)[:4] == ["3", "5", "8", "13"]
    assert names(ds)[4:] == [str([3, 5, 8, 13, 21][i % 6]) for i in range(18) if i % 6 < 5]
    assert files(ds)[0].startswith(f"{gld}/test/") and files(ds)[4].startswith(f"{gld}/index/")


def test_gldv2_levels_leave_the_official_benchmark_whole(gld):
    "One run trains with three levels and is tested on all of the index: what has no label is -1 above the landmark."
    ds, plain = get("gldv2", "test", gld), get("gldv2", "test", gld, levels=())
    assert files(ds) == files(plain) and ds.meta.equals(plain.meta) and len(ds) == 5 + 18
    assert ds.level_names == get("gldv2", "train", gld).level_names
    unknown = torch.tensor([n == "34" for n in names(ds)])  # the landmark without a hierarchical label
    assert unknown.sum() == 1 + 3 and (ds.labels[unknown][:, 1:] == -1).all() and (ds.labels[~unknown] >= 0).all()
    z = torch.randn(len(ds), 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    found = evaluate_protocol(z, ds.labels, ds.meta, ds.protocol)
    assert found == evaluate_protocol(z, plain.labels, plain.meta, plain.protocol) and 0 < found["mAP@100"] < 1
    some = get("gldv2", "test", gld, labelled=True)
    kept = torch.tensor([f in set(files(some)) for f in files(ds)])
    assert evaluate_protocol(z[kept], some.labels, some.meta, some.protocol)["mAP@100"] != found["mAP@100"]
    assert get("gldv2", "test", gld, levels=(), labelled=True).fingerprint == plain.fingerprint


def test_gldv2_usage_ignored(gld, tmp_path):
    "The solution as it is published: images None, Usage Ignored. Nothing of an ignored row counts."
    rows = [line.split(",") for line in (gld / "retrieval_solution_v2.1.csv").read_text().splitlines()[1:]]
    assert [(r[1], r[2]) for r in rows if r[0] in {image_id("test", i) for i in (2, 5, 7)}] == [("None", "Ignored")] * 3
    root = make_gldv2(tmp_path / "data")
    before = get("gldv2", "test", root).meta.id.tolist()
    edit(root / "retrieval_solution_v2.1.csv",
         lambda b: b.replace(b"None,Ignored", f"{image_id('index', 4)},Ignored".encode()))
    assert get("gldv2", "test", root).meta.id.tolist() == before
    every = get("gldv2", "test", root, ignored=True).meta
    assert every.usage.value_counts().to_dict() == {"": 18, "Ignored": 3, "Public": 3, "Private": 2}
    assert set(every.matches[every.usage == "Ignored"]) == {""}


def test_gldv2_whole_benchmark(gld):
    "Without levels nothing is left out of the index; the ignored test images come only when asked for."
    ds = get("gldv2", "test", gld, levels=())
    assert ds.meta.part.value_counts().to_dict() == {"gallery": 18, "query": 5}
    all_of = get("gldv2", "test", gld, levels=(), ignored=True)
    assert (all_of.meta.part == "query").sum() == 8 and names(all_of)[2] is None and all_of.meta.matches[2] == ""
    # ties go to the first of the index, which are the relevant ones
    perfect = torch.nn.functional.one_hot(ds.labels[:, 0]).double()
    assert evaluate_protocol(perfect, ds.labels, ds.meta, ds.protocol)["mAP@100"] == pytest.approx(1)
    assert evaluate_protocol(perfect.roll(1, 0), ds.labels, ds.meta, ds.protocol)["mAP@100"] < 0.9


def test_gldv2_images_below_images(tmp_path):
    root = make_gldv2(tmp_path / "data")
    (root / "images").mkdir()
    for part in ("train", "index", "test"): (root / part).rename(root / "images" / part)
    assert get("gldv2", "test", root).check() and get("gldv2", "train", root).check()


def test_gldv2_train_needs_no_index(tmp_path):
    root = make_gldv2(tmp_path / "data")
    for f in ("index.csv", "retrieval_solution_v2.1.csv", "index_image_to_landmark.csv",
              "index_label_to_hierarchical.csv"):
        (root / f).unlink()
    assert len(get("gldv2", "train", root))
    with pytest.raises(FileNotFoundError, match="retrieval_solution_v2.1.csv.*are missing"): get("gldv2", "test", root)


@pytest.mark.parametrize("file, old, new, message", [
    ("train_label_to_hierarchical.csv", b"hierarchical_label", b"hierarchical_labels",
     "no column 'hierarchical_label'.*Did you mean"),
    ("retrieval_solution_v2.1.csv", b"Public", b"public", "Usage is 'public'"),
    ("index_label_to_hierarchical.csv", b"\n5,", b"\n3,", "lists landmark 3 more than once"),
    ("index.csv", b"\n", b"\n../x\n", "image id '../x'"),
])
def test_gldv2_bad_tables(tmp_path, file, old, new, message):
    root = make_gldv2(tmp_path / "data")
    edit(root / file, lambda b: b.replace(old, new))
    with pytest.raises(ValueError, match=message):
        get("gldv2", "test" if "train" not in file else "train", root,
            **({"levels": ()} if file == "index.csv" else {}))


def test_gldv2_files_of_another_release(tmp_path):
    "A solution whose images are not in the index is not silently a benchmark without queries."
    root = make_gldv2(tmp_path / "data")
    edit(root / "retrieval_solution_v2.1.csv", lambda b: b.replace(image_id("index", 0).encode(), b"0" * 16))
    # two of its images are still there
    assert (get("gldv2", "test", root, labelled=True).meta.part == "query").sum() == 4
    assert (get("gldv2", "test", root).meta.part == "query").sum() == 5
    for i in range(18):
        edit(root / "retrieval_solution_v2.1.csv", lambda b: b.replace(image_id("index", i).encode(), b"0" * 16))
    with pytest.raises(ValueError, match="no query of retrieval_solution"): get("gldv2", "test", root)


def test_gldv2_a_relevant_image_that_the_whole_index_lacks(tmp_path, monkeypatch):
    "With the counts checked the index is whole, so a lost relevant image is an error: it would change AP."
    root = make_gldv2(tmp_path / "data")
    monkeypatch.setitem(L._GLD_SIZES, "index.csv", 18)
    assert len(load("gldv2", "test", root)) == 23
    edit(root / "retrieval_solution_v2.1.csv", lambda b: b.replace(image_id("index", 6).encode(), b"0" * 16))
    with pytest.raises(ValueError, match=f"image {'0' * 16}, relevant for {image_id('test', 0)}, is not in index.csv "
                       f".1 in all."):
        load("gldv2", "test", root)
    assert len(get("gldv2", "test", root)) == 23 and len(load("gldv2", "test", root, labelled=True)) == 19


def test_gldv2_published_counts(gld, monkeypatch):
    monkeypatch.setitem(L._GLD_SIZES, "train_clean.csv", 48)
    with pytest.raises(ValueError, match="40 images, expected 970,981; 10 classes at level 0, expected 46,593"):
        load("gldv2", "train", gld)
    assert len(load("gldv2", "train", gld, levels=())) == 48  # the counts of the hierarchical part do not apply
    with pytest.raises(ValueError, match="index.csv has 18 images, expected 761,757"): load("gldv2", "test", gld)


# ---- all datasets

def test_every_dataset_has_a_layout_and_damaged_copies():
    "What the table of the notebook says."
    import hapnb.photos  # noqa: F401: registers its own
    import test_benchmarks as B
    # what torchvision downloads is in test_photos.py
    assert {*MAKE, *B.MAKE, "cifar100", "fgvc-aircraft"} == SOURCES.keys() and not MAKE.keys() & B.MAKE.keys()
    assert LISTS.keys() == IMAGE.keys() == MAKE.keys() and {*B.TEXT, "cars"} == B.MAKE.keys()
    for name, source in SOURCES.items():
        assert source.layout.strip() and source.needs and source.size and source.url.startswith("http"), name


# ---- tables of the real size

def test_large_lists_are_read_in_seconds(tmp_path):
    "120,000 images of a list of iNaturalist's form: reading, numbering and looking for the files."
    import time
    lines = [f"train_val2018/Aves/{i % 2000}/{i:06x}.jpg" for i in range(120_000)]
    for s in range(2000): (tmp_path / "train_val2018/Aves" / str(s)).mkdir(parents=True)
    for part, some in (("train", lines), ("test", ["train_val2018/Aves/9999/0.jpg"])):
        put(tmp_path / f"Inaturalist_{part}_set1.txt", "\n".join(some))
    start = time.process_time()
    with pytest.raises(FileNotFoundError, match="120,000 of 120,000 images"): get("inat-base", "train", tmp_path)
    assert time.process_time() - start < 4  # about half a second on one free core
