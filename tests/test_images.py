"Pictures of every kind come out right, and files that are damaged, foreign or hostile are refused in words."
import io, os, struct, subprocess, sys, time, zlib

import numpy as np
import pytest
import torch
from PIL import Image

from hapnb.data import find_images, load
from hapnb.datasets import RetrievalDataset
from hapnb.images import (
    FORMATS, IMAGE_SUFFIXES, UNREADABLE, BadImage, BytesStore, decode, encode, looks_whole, to_rgb, why_not)

RAMP = np.tile(np.linspace(0, 255, 32).round(), (24, 1)).astype(np.uint8)
SCENE = Image.fromarray(np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 90)], -1))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def written(im, kind="PNG", **options):
    out = io.BytesIO()
    im.save(out, kind, **options)
    return out.getvalue()


def pixels(data): return np.asarray(decode(data)).astype(float)


# ---- what is right

@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"])
def test_every_format_that_is_read_gives_the_picture(kind):
    options = dict(quality=95) if kind in ("JPEG", "AVIF", "WEBP") else {}
    tolerance = 12 if kind in ("JPEG", "GIF", "AVIF", "WEBP") else 0
    assert kind in FORMATS and abs(pixels(written(SCENE, kind, **options)) - np.asarray(SCENE)).mean() <= tolerance


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_every_mode_gives_the_picture(mode, kind):
    if kind == "PNG" and mode in ("PA", "CMYK", "YCbCr"): pytest.skip("PNG has no such mode")
    grey = Image.fromarray(RAMP)
    im = grey.convert("P").convert("PA") if mode == "PA" else grey.convert(mode)
    try: data = written(im, kind)
    except (OSError, ValueError): pytest.skip("this Pillow does not write it")
    assert np.corrcoef(pixels(data)[..., 0].ravel(), RAMP.ravel())[0, 1] > (.5 if mode == "1" else .99)


DEEP = {"uint16, all bits": RAMP.astype(np.uint16) * 257, "uint16, 12 bits": RAMP.astype(np.uint16) * 16,
        "uint16, 8 bits": RAMP.astype(np.uint16), "int32, 8 bits": RAMP.astype(np.int32),
        "int32, 16 bits": RAMP.astype(np.int32) * 257, "float, 0 to 1": RAMP.astype(np.float32) / 255,
        "float, 0 to 255": RAMP.astype(np.float32)}


@pytest.mark.parametrize("name", DEEP)
def test_grey_of_more_than_8_bits_is_neither_black_nor_white(name):
    found = pixels(written(Image.fromarray(DEEP[name]), "TIFF"))
    assert abs(found[..., 0] - RAMP).max() <= 2


def test_sixteen_bits_in_a_png_and_black_stay_what_they_are():
    assert decode(written(Image.fromarray(np.full((4, 4), 78 * 256 + 32, np.uint16)))).getpixel((0, 0)) == (78,) * 3
    for kind in (np.uint16, np.int32, np.float32):
        assert not pixels(written(Image.fromarray(np.zeros((4, 4), kind)), "TIFF")).any()


@pytest.mark.parametrize("values", [[-1000, 3000], [0, 10 ** 6], [0., np.nan], [0., np.inf], [-.5, .5]])
def test_grey_values_without_a_clear_range_are_refused(values):
    x = np.array([values * 2] * 4, np.float32 if isinstance(values[0], float) else np.int32)
    with pytest.raises(BadImage, match="grey values from"): decode(written(Image.fromarray(x), "TIFF"))


def test_transparency_is_put_on_white():
    for im, kind in ((Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG"), (Image.new("LA", (4, 4), (0, 0)), "PNG"),
                     (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "WEBP")):
        options = dict(lossless=True) if kind == "WEBP" else {}
        assert decode(written(im, kind, **options)).getpixel((0, 0)) == (255,) * 3
    for mode in ("P", "L", "RGB"):
        gone = (0, 0, 0) if mode == "RGB" else 0
        assert decode(written(Image.new(mode, (2, 2)), transparency=gone)).getpixel((0, 0)) == (255,) * 3


@pytest.mark.parametrize("turn", range(1, 9))
def test_the_rotation_of_a_camera_is_applied(turn):
    im, exif = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40), Image.Exif()
    exif[0x0112] = turn
    upright = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose,
               6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x.T, 2), 8: np.rot90}[turn](np.asarray(im))
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(pixels(written(im, kind, exif=exif))[..., 0], upright), kind


def test_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options = dict(lossless=True) if kind == "WEBP" else {}
        data = written(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode(data).getpixel((0, 0)) == (255, 0, 0), kind


def test_encode_is_lossless():
    assert np.array_equal(np.asarray(decode(encode(NOISE))), np.asarray(NOISE))


# ---- what is refused

def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
def png(width, height, *chunks, bits=1, colour=0):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


JPEG, PNG_, GIF, WEBP, TIFF, BMP = (written(NOISE, k) for k in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
CUTS = dict(JPEG=JPEG, PNG=PNG_, GIF=GIF, WEBP=WEBP, TIFF=TIFF, BMP=BMP)
MUCH = zlib.compress(bytes(200_000_000))
HOSTILE = {  # name: (bytes, words of the message; "." where only Pillow knows what is wrong)
    "empty": (b"", "empty file"), "zero bytes": (bytes(500), "not an image"), "text": (b"hello", "not an image"),
    "a web page": (b"<html>404</html>", "it is a web page"),
    "a zip archive": (b"PK\x03\x04" + bytes(60), "it is a zip archive"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
    "EPS": (EPS, "it is PostScript"), "EPS with a preview": (b"\xc5\xd0\xd3\xc6" + bytes(60), "it is PostScript"),
    "PDF": (b"%PDF-1.4\n", "it is PDF"), "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is SVG"),
    "SVG with a header": (b"<?xml version='1.0'?><svg/>", "it is SVG"),
    "Photoshop": (b"8BPS\x00\x01" + bytes(60), "it is a Photoshop"),
    "HEIC": (b"\x00\x00\x00\x18ftypheic" + bytes(40), "it is HEIC"),
    **{f"{k}, not read": (written(SCENE, k), "not an image that Pillow can read")
       for k in ("ICO", "TGA", "PCX", "SGI", "DDS", "ICNS")},
    **{f"{n} cut in half": (d[:len(d) // 2], ".") for n, d in CUTS.items()},
    **{f"{n} of 12 bytes": (d[:12], ".") for n, d in CUTS.items()},
    "JPEG without an end": (JPEG[:-300], "truncated"),
    "PNG with a bad checksum": (PNG_[:20] + b"\xff" + PNG_[21:], "."),
    "PNG of no pixels": (png(0, 0), "."), "PNG without data": (png(8, 8), "."),
    "PNG of 2^31 pixels per side": (png(2 ** 31 - 1, 2 ** 31 - 1), "pixels"),
    "PNG of 177 megapixels": (png(13_300, 13_300), "13300 x 13300 pixels, and the limit is"),
    "PNG of 51 megapixels": (png(51_000, 1000), "51000 x 1000 pixels"),
    "PNG with a text bomb": (png(8, 8, chunk(b"zTXt", b"a\0\0" + MUCH)), "."),
    "PNG with a colour bomb": (png(8, 8, chunk(b"iCCP", b"a\0\0" + MUCH)), "."),
    "GIF of 60,000 pixels per side": (b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b";", "."),
    "BMP of 100,000 pixels per side": (BMP[:18] + struct.pack("<ii", 100_000, 100_000) + BMP[26:], "pixels"),
    "BMP of negative width": (BMP[:18] + struct.pack("<ii", -8, 8) + BMP[26:], "."),
    "TIFF that points at itself": (b"II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 256, 4, 1, 8, 8), "."),
    "PPM of 10^9 pixels per side": (b"P6\n1000000000 1000000000\n255\n", "pixels|not an image"),
    "PPM with letters for numbers": (b"P6\nabc def\n255\n", "."),
    "PPM with a maximum of 0": (b"P5\n4 4\n0\n" + bytes(16), "."),
    "JPEG 2000 that is cut": (written(NOISE, "JPEG2000")[:300], "."),
    "AVIF that is cut": (written(NOISE, "AVIF")[:300], "."),
    "WebP of another length": (WEBP[:4] + struct.pack("<I", 2 ** 31) + WEBP[8:40], "."),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_good_image_is_refused_in_words(name):
    data, says = HOSTILE[name]
    began = time.monotonic()
    with pytest.raises(BadImage, match=f"(?i){says}") as e: decode(data)
    assert "object at 0x" not in str(e.value) and 0 < len(str(e.value)) < 300 and time.monotonic() - began < 10


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_flipped_bytes_give_a_picture_or_one_kind_of_error():
    rng = np.random.default_rng(0)
    for data in (JPEG, PNG_, GIF, WEBP, TIFF, BMP):
        for _ in range(40):
            bad = bytearray(data)
            for i in rng.integers(0, min(len(data), 400), 4): bad[i] = rng.integers(0, 256)
            try: assert decode(bytes(bad)).mode == "RGB"
            except BadImage as e: assert str(e)


def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch):
    "An EPS file with another ending would start Ghostscript, which runs what the file says."
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
    (tmp_path / "cat").mkdir()
    for i in range(2): (tmp_path / "cat" / f"{i}.jpg").write_bytes(EPS)
    with pytest.raises(OSError, match="it is PostScript"): load("folder", "all", tmp_path).image(0)
    assert not started


def test_the_limit_on_pixels_is_a_setting(monkeypatch):
    data = written(Image.new("1", (200, 200)))
    monkeypatch.setenv("HAPNB_MAX_PIXELS", "30000")
    with pytest.raises(BadImage, match="200 x 200 pixels, and the limit is 30,000.*HAPNB_MAX_PIXELS"): decode(data)
    monkeypatch.setenv("HAPNB_MAX_PIXELS", "40000")
    assert decode(data).size == (200, 200)
    monkeypatch.setenv("HAPNB_MAX_PIXELS", "many")
    with pytest.raises(UNREADABLE, match="must be a whole number"): decode(data)


def test_words_for_errors_of_the_system():
    assert why_not(FileNotFoundError(2, "No such file")) == "No such file" and why_not(MemoryError()) == "MemoryError"


# ---- truncation, seen without decoding

@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_truncation_is_seen_in_each_format(kind):
    data = written(NOISE, kind)
    one = torch.zeros(1, 1).long()
    good, cut = (RetrievalDataset(BytesStore([d], ["x"]), one, [["a"]], ("c",)) for d in (data, data[:len(data) // 2]))
    assert not good.bad_images() and not good.bad_images(decoding=False)
    assert len(cut.bad_images()) == len(cut.bad_images(decoding=False)) == 1 and not looks_whole(b"")


# ---- decoding at a smaller scale

def photo(size, kind="JPEG", **kw):
    x = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    return written(Image.fromarray(x), kind, **kw)


@pytest.mark.parametrize("size", [(1000, 600), (601, 1203), (64, 64)])
@pytest.mark.parametrize("at_least", [1, 64, 224, 600])
def test_a_jpeg_never_comes_out_too_small(size, at_least):
    full, small = decode(photo(size)), decode(photo(size), at_least)
    assert min(small.size) >= min(at_least, min(size)) and small.width <= size[0]
    # at least halved where that is allowed
    assert small.width < size[0] if min(size) >= 2 * at_least else small.size == size
    want = np.asarray(full.resize(small.size, Image.BOX), dtype=float)
    assert abs(np.asarray(small, dtype=float) - want).mean() < 4


def test_at_least_leaves_other_formats_alone_and_turns_photos():
    assert decode(photo((400, 300), "PNG"), 20).size == (400, 300)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(written(Image.new("RGB", (800, 400), "red"), "JPEG", exif=exif), 100).size == (100, 200)
    assert decode(written(Image.new("L", (800, 400), 9), "JPEG"), 100).getpixel((0, 0)) == (9, 9, 9)


def test_a_shrunk_dataset_leaves_the_whole_one_alone():
    store = BytesStore([photo((800, 400))] * 2, "ab")
    ds = RetrievalDataset(store, torch.tensor([[0], [1]]), [["a", "b"]], ("c",), fingerprint="f")
    assert ds[0][0].size == (800, 400) and ds.image(0, 100).size == (200, 100)
    small = ds.shrunk(100)
    assert small[0][0].size == small.subset([1])[0][0].size == small.image(0).size == (200, 100)
    assert ds[0][0].size == ds.image(0).size == (800, 400) and small.fingerprint != ds.fingerprint


# ---- files by name

def folder(root, names):
    for n in names:
        (root / n).parent.mkdir(parents=True, exist_ok=True)
        (root / n).write_bytes(JPEG)
    return root


def test_all_endings_of_images_are_listed_in_any_letters(tmp_path):
    names = [f"a/{i}{s.upper() if i % 2 else s}" for i, s in enumerate(IMAGE_SUFFIXES)]
    assert find_images(folder(tmp_path, names)) == sorted(names)
    assert {".jfif", ".avif", ".ppm", ".jp2"} <= set(IMAGE_SUFFIXES)


@pytest.mark.parametrize("name, says", [("a/1.heic", "1 .heic"), ("a/1.SVG", "1 .svg"),
                                        ("a/photo", "1 without an ending"), ("a/1.jpg.part", "1 .part")])
def test_files_that_are_left_out_are_named(tmp_path, name, says):
    folder(tmp_path, ["a/0.jpg", "b/0.jpg", name])
    with pytest.warns(UserWarning, match=says) as told: ds = load("folder", "all", tmp_path)
    assert len(ds) == 2 and name in str(told[0].message)


def test_notes_and_hidden_files_are_passed_over_without_a_word(tmp_path, recwarn):
    folder(tmp_path, ["a/0.jpg", "a/.hidden.heic", ".git/x.png", "a/labels.csv", "README.md", "b/0.jpg"])
    assert len(load("folder", "all", tmp_path)) == 2
    assert not [w for w in recwarn if "not read as images" in str(w.message)]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")
@pytest.mark.parametrize("name", [b"caf\xe9/1.jpg", b"a/caf\xe9.jpg"])
def test_a_name_that_is_not_utf8_is_named(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f: f.write(JPEG)
    with pytest.raises(ValueError, match=r"caf\\xe9.*is not UTF-8"): load("folder", "all", tmp_path)


def test_to_rgb_treats_opened_images_alike():
    assert to_rgb(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_deep_grey_images_where_zero_is_white():
    grey = np.tile(np.linspace(0, 65535, 16), (4, 1)).astype(np.uint16)
    out = io.BytesIO()
    Image.fromarray(grey).save(out, "TIFF", tiffinfo={262: 0})
    assert Image.open(io.BytesIO(out.getvalue())).tag_v2[262] == 0
    found = np.asarray(decode(out.getvalue()))[0, :, 0]
    assert found[0] == 255 and found[-1] == 0


@pytest.mark.parametrize("high", [1.0001, 2.5])
def test_floats_a_little_above_one_are_refused(high):
    out = io.BytesIO()
    Image.fromarray(np.linspace(0, high, 16, dtype=np.float32)[None]).save(out, "TIFF")
    with pytest.raises(OSError, match="grey values from 0 to"): decode(out.getvalue())


@pytest.mark.parametrize("top, black", [(255, True), (65535, False)])
def test_bands_of_16_bits_that_would_be_black_are_refused(top, black):
    def number(n): return struct.pack(">I", n)
    def chunk(kind, data): return number(len(data)) + kind + data + number(zlib.crc32(kind + data))
    line = np.repeat(np.linspace(0, top, 16).astype(">u2"), 3).tobytes()
    data = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 1, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" + line)) + chunk(b"IEND", b""))
    if not black: assert np.asarray(decode(data)).max() == 255
    else:
        with pytest.raises(OSError, match="bands of 16 bits"): decode(data)
