"""The bundled glyphs: split by family, no near twin across it, levels, licences, the file, and how it is built."""
import hashlib, io, json, os, shutil, tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.font_manager import findfont

from hapnb import bundled, fonts
from hapnb.bundled import ASSETS, Package, read_bundled
from hapnb.core import check_labels
from hapnb.data import load
from hapnb.datasets import split_classes
from hapnb.fonts import CHARACTERS, build, draw_face, read_family, read_list

SPLITS = ("train", "fit", "val", "test", "all")


@pytest.fixture(scope="module")
def parts(): return {s: load("fonts", s) for s in SPLITS}


@pytest.fixture(scope="module")
def table(): return read_bundled("fonts")[0].drop_columns(["image"]).to_pandas()


@pytest.fixture(scope="module")
def pixels(): return load("fonts", "all").pixels()


# ---- what is in the file

def test_the_split_is_by_family_and_follows_from_names(parts, table):
    families = {s: set(d.class_names[1]) for s, d in parts.items()}
    assert not families["train"] & families["test"] and not families["fit"] & families["val"]
    assert families["fit"] | families["val"] == families["train"]
    assert (table.groupby("family").split.nunique() == 1).all()
    known = table[["family", "category"]].drop_duplicates()
    again = split_classes(known.family.sample(frac=1, random_state=0), known.category.sample(frac=1, random_state=0))
    assert again == dict(zip(table.family, table.split))
    for d in parts.values(): assert len(d.class_names[2]) == 5, "each part has all categories"


def test_levels_nest(parts, table):
    for fine, coarse in (("face", "family"), ("family", "category")):
        assert (table.groupby(fine)[coarse].nunique() == 1).all()
    assert (table.face == table.family + " " + table.weight + " " + table["style"]).all()
    for d in parts.values():
        check_labels(d.labels)
        assert d.level_names == ("face", "family", "category")
    assert not table.duplicated(["face", "character"]).any() and set(table.character) == set(CHARACTERS)
    assert table.groupby("face").size().min() >= 28


def test_no_near_twin_across_the_split(table, pixels):
    "Exact distances of all pairs of one character: at least 2 grey levels between test and training."
    x = pixels[..., 0].reshape(len(pixels), -1).astype(np.int16)
    test = (table.split == "test").to_numpy()
    for c in CHARACTERS:
        own = (table.character == c).to_numpy()
        train = x[own & ~test]
        assert min(np.abs(train - q).mean(1).min() for q in x[own & test]) >= 2, c


def test_no_family_repeats_the_design_of_another(table, pixels):
    "The four twins of the list are out, and no other pair is as close, whatever the order."
    assert not {"Carlito", "Fira Mono", "Heebo", "Noto Sans"} & set(table.family)
    faces = table.face.unique()
    shared = [c for c, n in table.character.value_counts().items() if n == len(faces)]
    assert len(shared) >= 15
    rows = table.reset_index().pivot(index="face", columns="character", values="index").loc[faces, shared]
    glyphs = pixels[..., 0][rows.to_numpy().astype(int)]
    families = dict(zip(table.face, table.family))
    assert fonts.twin_families([families[f] for f in faces], glyphs) == {}


def test_licences_and_sources(table):
    assert set(table.licence) == {"OFL-1.1", "Apache-2.0"}
    for column in ("licence", "author", "url", "package"): assert (table[column].str.len() > 5).all()
    listed = {f"{name} {package.version}" for name, package in read_list().items()}
    assert set(table.package) <= listed and len(listed - set(table.package)) == 4
    text = (ASSETS / "FONTS_ATTRIBUTION.md").read_text(encoding="utf-8")
    for (family, package, licence), n in table.groupby(["family", "package", "licence"]).size().items():
        assert f"[{family}](" in text and f"| {licence} | `{package}` | {n:,} |" in text


def test_the_file_agrees_with_its_checksum_and_its_card(pixels, table):
    data = (ASSETS / "fonts.parquet").read_bytes()
    sha = hashlib.sha256(data).hexdigest()
    assert (ASSETS / "fonts.sha256").read_text() == f"{sha}  fonts.parquet\n" and len(data) < 8e6
    card = (ASSETS / "FONTS_DATA_CARD.md").read_text(encoding="utf-8")
    assert sha in card and hashlib.sha256(pixels).hexdigest() in card
    assert f"{len(table):,} images" in card and f"{table.face.nunique()} faces of {table.family.nunique()}" in card


def test_images_are_grey_whole_and_centred(pixels):
    assert pixels.shape[1:] == (64, 64, 3) and (pixels == pixels[..., :1]).all()
    x = pixels[..., 0]
    # two rows at each side are white, and the middle of the ink is the middle of the image
    assert min(x[:, :2].min(), x[:, -2:].min(), x[:, :, :2].min(), x[:, :, -2:].min()) == 255
    ink = x < 250
    assert ink.any((1, 2)).all()
    for axis in (1, 2):
        along = ink.any(axis)
        middle = (along.argmax(1) + 63 - along[:, ::-1].argmax(1)) / 2
        assert np.abs(middle - 31.5).max() <= 1


def test_open_world():
    fit, labelled, pool = (load("fonts", s) for s in ("fit", "labelled", "unlabelled"))
    assert len(labelled) + len(pool) == len(fit)
    known, asked = set(labelled.class_names[0]), set(pool.class_names[0])
    assert known & asked and asked - known and labelled.labels[:, 0].bincount().min() >= 18


def test_a_damaged_file_and_a_wrong_split_are_named(tmp_path):
    for name in ("fonts.parquet", "fonts.sha256"): shutil.copy(ASSETS / name, tmp_path)
    with open(tmp_path / "fonts.parquet", "r+b") as f: f.truncate(100_000)
    with pytest.raises(OSError, match=r"fonts\.parquet is damaged.*100000 bytes.*hapnb\.fonts\.build"):
        load("fonts", data_dir=tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'test'"): load("fonts", "tests")


# ---- how it is built, from made-up packages with fonts that come with matplotlib

NAMES = {"DejaVu Sans": "sans-serif", "DejaVu Serif": "serif", "STIXGeneral": "serif"}


def pack(path, family, category, faces, licence="OFL-1.1"):
    "Write a tarball as Fontsource does and give its SHA-256; `faces`: (weight, style) -> bytes of a font."
    name = path.name.split("-", 1)[1].rsplit("-", 1)[0]
    meta = dict(id=name, family=family, category=category, weights=sorted({w for w, _ in faces}),
                styles=sorted({s for _, s in faces}),
                license=dict(type=licence, attribution=f"Copyright A  {name}-Bold.ttf: Copyright A"))
    files = {"metadata.json": json.dumps(meta).encode()}
    files |= {f"files/{name}-latin-{w}-{s}.woff": data for (w, s), data in faces.items()}
    with tarfile.open(path, "w:gz") as tar:
        for file, raw in files.items():
            info = tarfile.TarInfo(f"package/{file}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def tiny(tmp_path):
    "Three families and one that repeats the first under another name."
    cache, packages = tmp_path / "cache", {}
    cache.mkdir()
    for family, category in (*NAMES.items(), ("Other Name", "display")):
        data = Path(findfont(family if family in NAMES else "DejaVu Sans")).read_bytes()
        name = family.lower().replace(" ", "")
        sha = pack(cache / f"fontsource-{name}-1.0.0.tgz", family, category, {(400, "normal"): data})
        packages[f"@fontsource/{name}"] = Package("1.0.0", sha)
    return cache, packages


def test_build_is_the_same_to_the_byte_and_drops_twins(tiny, tmp_path):
    cache, packages = tiny
    for out in ("a", "b"): (tmp_path / out).mkdir()
    shas = [build(tmp_path / out, cache, 32, packages) for out in ("a", "b")]
    assert shas[0] == shas[1]
    names = ["FONTS_ATTRIBUTION.md", "FONTS_DATA_CARD.md", "fonts.parquet", "fonts.sha256"]
    assert sorted(os.listdir(tmp_path / "a")) == names
    for name in names: assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    ds = load("fonts", "all", data_dir=tmp_path / "a")
    assert sorted(ds.class_names[1]) == sorted(NAMES) and ds.image(0).size == (32, 32)
    assert "- Other Name repeats DejaVu Sans (0.0 grey levels)" in (tmp_path / "a" / names[1]).read_text()
    assert "| Copyright A | OFL-1.1 | `@fontsource/dejavusans 1.0.0` |" in (tmp_path / "a" / names[0]).read_text()


def test_the_list_decides_which_twin_stays(tiny, tmp_path):
    cache, packages = tiny
    tmp_path.joinpath("a").mkdir()
    build(tmp_path / "a", cache, 32, dict(reversed(packages.items())))
    assert "Other Name" in load("fonts", "all", data_dir=tmp_path / "a").class_names[1]


@pytest.mark.parametrize("changes, message", [
    (dict(licence="UFL-1.0"), "the licence 'UFL-1.0'; taken are OFL-1.1, Apache-2.0"),
    (dict(category="slab"), "the category 'slab'"),
    (dict(faces={(300, "normal"): b""}), "no face of weight 200, 400, 700 or 900")])
def test_a_family_that_may_not_be_taken_is_named(tmp_path, changes, message):
    args = dict(family="Toy", category="serif", faces={(400, "normal"): b""}) | changes
    pack(tmp_path / "fontsource-toy-1.0.0.tgz", **args)
    with pytest.raises(ValueError, match=f"Toy has .*{message}"):
        read_family(tmp_path / "fontsource-toy-1.0.0.tgz")


GOOD = f"@fontsource/lora,5.3.0,{'a' * 64}\n"


@pytest.mark.parametrize("text, message", [
    ("name,version,sha256\n" + GOOD, "the columns must be package,version,sha256"),
    ("package,version,sha256\n" + GOOD + GOOD, "line 2: @fontsource/lora is listed twice"),
    ("package,version,sha256\n@fontsource/lora,5.3.0,abc\n", "line 2: 'abc' is not a SHA-256")])
def test_a_wrong_list_is_named(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=message): read_list(tmp_path / "list.csv")


def test_a_changed_package_is_refused(tiny, tmp_path):
    cache, packages = tiny
    (cache / "fontsource-dejavusans-1.0.0.tgz").write_bytes(b"not what was published")
    with pytest.raises(OSError, match="delete it and fetch it again"): build(tmp_path / "out", cache, 32, packages)
    assert not (tmp_path / "out").exists()


def test_without_npm_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="install Node.js"): build(tmp_path / "out", tmp_path / "cache")


# two of the smallest packages
SMALL = ("@fontsource/poiret-one", "@fontsource/share-tech-mono")


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed: only rebuilding needs it")
@pytest.mark.parametrize("name", SMALL)
def test_a_family_is_drawn_as_it_was(name, tmp_path, table, pixels):
    "A published package gives the bundled images again: the same bytes with the same FreeType, nearly so with another."
    cache = Path(os.environ.get("HAPNB_CACHE") or tmp_path) / "npm"
    try: meta, faces = read_family(bundled.fetch_package(name, read_list()[name], cache))
    except RuntimeError as e: pytest.skip(f"the npm registry cannot be reached: {e}")
    for (weight, style), data in faces.items():
        rows = np.flatnonzero(table.face == f"{meta['family']} {weight} {style}")
        drawn = draw_face(data)
        assert len(rows) >= 28
        for row in rows:
            difference = np.abs(drawn[table.character[row]].astype(int) - pixels[row, ..., 0]).mean()
            assert difference == 0 if not bundled.other_versions(fonts.BUILT_WITH) else difference < 2


@pytest.mark.skipif(not os.environ.get("HAPNB_REBUILD"), reason="fetches 158 MB from npm: set HAPNB_REBUILD=1 for it")
def test_rebuild_of_the_bundled_file(tmp_path):
    if shutil.which("npm") is None: pytest.skip("npm is not installed")
    sha = build(tmp_path, os.environ.get("HAPNB_NPM_CACHE"))
    if bundled.other_versions(fonts.BUILT_WITH):
        again, before = read_bundled("fonts", tmp_path)[0], read_bundled("fonts")[0]
        assert bundled.pixel_sha256(again) == bundled.pixel_sha256(before)
    else: assert sha == read_bundled("fonts")[1]
