"""Packed copies: exact pixels, everything kept, and what a kill, a full disk or a flipped bit may not do."""
import errno, io, multiprocessing as mp, os, pickle, signal, warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import hapnb.packed as module
from hapnb.images import BytesStore, FileStore, decode, encode
from hapnb.datasets import RetrievalDataset, fingerprint_of
from hapnb.packed import FORMATS, pack_image, packed, shrink, unpack_image


def picture(seed, width=120, height=90):
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3),
                                             dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(coarse, float)
                            + random.normal(0, 3, (height, width, 1))).clip(0, 255).astype(np.uint8))


def coded(im, form="JPEG", **kw):
    out = io.BytesIO()
    im.save(out, form, **kw)
    return out.getvalue()


SIZES = [(120, 90), (90, 120), (64, 64), (200, 50), (33, 70), (90, 91), (64, 65), (150, 100), (120, 90), (97, 301),
         (120, 90), (99, 98)]


def images(n=12): return [coded(picture(i, *SIZES[i % len(SIZES)]), quality=90) for i in range(n)]


class Counting(BytesStore):
    "Counts what is read; kills its own process, or stops, at the k-th image."
    def __init__(self, data, names, at=None, how=None):
        super().__init__(data, names)
        self.reads, self.at, self.how = [], at, how
    def read(self, i):
        self.reads.append(int(i))
        if self.at is not None and i == self.at: self.how()
        return super().read(i)


def dataset(data=None, of="twelve", **kw):
    data = images() if data is None else data
    labels = [[i // 2, i // 4] for i in range(len(data))]
    store = kw.pop("store", None) or Counting(data, [f"image {i}" for i in range(len(data))])
    return RetrievalDataset(store, labels, [[f"c{i}" for i in range(6)], ["x", "y", "z"]], ("class", "kind"), "toy",
                            "test",
                            fingerprint_of(of=of), meta=pd.DataFrame({"file": [f"f{i}" for i in range(len(labels))]}),
                            **kw)


def pixels(ds): return [np.asarray(ds.image(i)) for i in range(len(ds))]
def same(a, b): return len(a) == len(b) and all(x.shape == y.shape and (x == y).all() for x, y in zip(a, b))
def reference(ds, side):
    return [np.asarray(v2.Resize(side)(im) if min(im.size) > side else im) for im in map(ds.image, range(len(ds)))]
def quiet(*a, **kw): return packed(*a, progress=False, **kw)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch): monkeypatch.setattr(module, "CHUNK", 3)


# --- pixels ---
@pytest.mark.parametrize("form", ["raw", "webp"])
@pytest.mark.parametrize("side", [1, 50, 64, 90])
def test_the_pixels_are_those_of_resize(tmp_path, form, side):
    ds = dataset()
    assert same(pixels(quiet(ds, side, tmp_path, format=form)), reference(ds, side))


@pytest.mark.parametrize("mode", ["bicubic", "nearest"])
def test_other_interpolations(tmp_path, mode):
    ds = dataset()
    assert (np.asarray(quiet(ds, 50, tmp_path, interpolation=mode).image(0))
            == np.asarray(v2.Resize(50, v2.InterpolationMode(mode))(ds.image(0)))).all()


def test_jpeg_is_near_and_smaller(tmp_path):
    ds = dataset()
    got, want = pixels(quiet(ds, 50, tmp_path, format="jpeg")), reference(ds, 50)
    assert [g.shape for g in got] == [w.shape for w in want]
    assert max(np.abs(g.astype(float) - w).mean() for g, w in zip(got, want)) < 4
    assert sum(g.nbytes for g in got) > 3 * next(tmp_path.glob("*.arrow")).stat().st_size


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_a_small_picture_keeps_its_own_bytes(form):
    for im in (picture(0, 64, 80), picture(1, 64, 64)):
        for data in (coded(im), coded(im, "PNG"), encode(im)): assert pack_image(data, 64, form) == (data, *im.size)


def odd_files():
    im = picture(3, 100, 80)
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = im.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(im.size))
    deep = Image.fromarray((np.asarray(im.convert("L")).astype(np.uint16) << 8))
    return {"exif": coded(im, exif=turned), "alpha": coded(alpha, "PNG"), "16 bit": coded(deep, "PNG"),
            "palette": coded(im.quantize(16), "GIF"),
            "grey": coded(im.convert("L")), "cmyk": coded(im.convert("CMYK")), "long": coded(picture(4, 400, 8))}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("side", [40, 500])
@pytest.mark.parametrize("what", odd_files())
def test_odd_files(what, form, side):
    data = odd_files()[what]
    want = np.asarray(shrink(decode(data), side), float)
    got = unpack_image(*pack_image(data, side, form), form)
    assert got.mode == "RGB" and np.asarray(got).shape == want.shape
    assert np.abs(np.asarray(got) - want).max() == 0 or (form == "jpeg" and side == 40
                                                         and np.abs(np.asarray(got) - want).mean() < 6)


@pytest.mark.parametrize("form", FORMATS)
def test_a_store_of_pil_images(form):
    for im in (picture(5), picture(5).convert("L")):
        got = unpack_image(*pack_image(im, 200, form), form)
        assert (np.asarray(got) == np.asarray(im.convert("RGB"))).all()


# --- the dataset ---
def test_everything_else_is_kept(tmp_path):
    flip = v2.Compose([v2.ToImage()])
    ds = dataset(transform=flip, protocol={"kind": "query-gallery"}, gaps=True)
    pk = quiet(ds, 50, tmp_path)
    assert torch.equal(pk.labels, ds.labels) and pk.meta.equals(ds.meta) and pk.protocol == ds.protocol
    assert pk.gaps is True
    assert (pk.class_names, pk.level_names, pk.name, pk.split,
            pk.transform) == (ds.class_names, ds.level_names, ds.name, ds.split, flip)
    x, y, i = pk[7]
    assert x.shape[-2:] == (50, 75) and y.tolist() == [3, 1] and i == 7
    assert pk.bad_images() == [] and pk.store.name(4) == "image 4"


def test_the_fingerprint_is_of_source_side_and_form(tmp_path):
    base = dict(dataset=dataset(), side=50, format="raw", interpolation="bilinear")
    others = [base, {**base, "dataset": dataset(of="other")}, {**base, "side": 51}, {**base, "format": "webp"},
              {**base, "interpolation": "bicubic"}]
    keys = [quiet(folder=tmp_path, **o).fingerprint for o in others]
    assert len({*keys, base["dataset"].fingerprint}) == len(others) + 1
    assert len(list(tmp_path.glob("*.arrow"))) == len(others)
    elsewhere = quiet(folder=tmp_path / "elsewhere", **base)
    assert quiet(folder=tmp_path, **base).fingerprint == keys[0] == elsewhere.fingerprint


def test_subsets_and_repeated_rows(tmp_path):
    rows = [5, 3, 5, 0, 11]
    ds = dataset().subset(rows)
    pk = quiet(ds, 50, tmp_path)
    assert same(pixels(pk), reference(ds, 50)) and pk.labels.tolist() == ds.labels.tolist()
    assert len(pk.store) == 4  # image 5 once
    assert same(pixels(pk.subset([4, 1])), [pixels(pk)[4], pixels(pk)[1]])


def test_packing_twice_reads_nothing(tmp_path):
    ds = dataset()
    first = quiet(ds, 50, tmp_path)
    stamp, ds.store.reads = first.store.path.stat().st_mtime_ns, []
    again = quiet(ds, 50, tmp_path)
    assert ds.store.reads == [] and again.store.path.stat().st_mtime_ns == stamp and same(pixels(again), pixels(first))


def test_a_packed_copy_of_a_packed_copy(tmp_path):
    ds = quiet(dataset(), 60, tmp_path)
    assert same(pixels(quiet(ds, 30, tmp_path)), reference(ds, 30))


def test_a_read_only_folder_can_be_used(tmp_path, monkeypatch):
    ds = dataset()
    want = pixels(quiet(ds, 50, tmp_path))
    monkeypatch.setattr(module, "_under_lock", lambda *a: pytest.fail("nothing has to be written"))
    assert same(pixels(quiet(ds, 50, tmp_path)), want)


def test_files_on_disk_and_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HAPNB_CACHE", str(tmp_path / "cache"))
    paths = [tmp_path / f"{i}.jpg" for i in range(12)]
    for p, data in zip(paths, images()): p.write_bytes(data)
    ds = dataset(store=FileStore(paths))
    assert same(pixels(quiet(ds, 50)), reference(ds, 50))
    assert [p.suffix for p in sorted((tmp_path / "cache/packed").iterdir()) if p.suffix != ".lock"] == [".arrow"]


@pytest.mark.parametrize("args, word",
                         [(dict(side=0), "side"), (dict(side=2.5), "side"), (dict(side=True), "side"),
                          (dict(side=9, format="jpg"), "'jpeg'"),
                                        (dict(side=9, interpolation="bilinaer"), "'bilinear'")])
def test_wrong_arguments(tmp_path, args, word):
    with pytest.raises(ValueError, match=word): quiet(dataset(), folder=tmp_path, **args)
    assert not list(tmp_path.iterdir())


def test_no_images_and_no_fingerprint(tmp_path):
    with pytest.raises(ValueError, match="no images"): quiet(dataset().subset([]), 50, tmp_path)
    ds = dataset()
    ds.fingerprint = ""
    with pytest.raises(ValueError, match="fingerprint"): quiet(ds, 50, tmp_path)


# --- loaders ---
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers(tmp_path, workers):
    ds = dataset(transform=v2.Compose([v2.Resize((20, 20)), v2.ToImage()]))
    pk = quiet(ds, 50, tmp_path)
    pk.image(0)  # mapped before the fork
    x = torch.cat([b[0] for b in torch.utils.data.DataLoader(pk, 5, num_workers=workers)])
    assert torch.equal(x, torch.stack([pk[i][0] for i in range(12)]))


def test_what_travels_to_a_worker_is_small(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(12)]
    for p, data in zip(paths, images()): p.write_bytes(data)
    pk = quiet(dataset(store=FileStore(paths)), 90, tmp_path)
    want = pixels(pk)
    sent = pickle.dumps(pk)
    assert len(sent) < 20_000 < pk.store.path.stat().st_size and same(pixels(pickle.loads(sent)), want)


def test_a_fork_maps_the_file_anew(tmp_path):
    pk = quiet(dataset(), 50, tmp_path)
    pk.image(0)
    owner = pk.store._map[0]
    def child(q):
        pk.image(1)
        q.put((pk.store._map[0], os.getpid()))
    q = mp.get_context("fork").SimpleQueue()
    p = mp.get_context("fork").Process(target=child, args=(q,))
    p.start()
    mapped, own = q.get()
    p.join()
    assert mapped == own != owner


# --- transforms ---
def test_training_transforms_that_resize_first_see_the_same(tmp_path):
    from hapnb.models import TrunkInfo, train_transform
    ds = dataset()
    pk = quiet(ds, 50, tmp_path)
    for args in (dict(resize=50), dict(resize=50, flip=0, scale=(.5, 1.))):
        t = train_transform("resnet50", 32, **args)
        for i in range(len(ds)):
            if min(ds.image(i).size) < 50: continue
            torch.manual_seed(i)
            a = t(ds.image(i))
            torch.manual_seed(i)
            b = t(pk.image(i))
            assert torch.equal(a, b)


def test_random_crops_keep_their_distribution():
    crop, full = v2.RandomResizedCrop(224, (.16, 1.)), Image.new("RGB", (500, 375))
    small = shrink(full, 256)
    def boxes(im, seeds):
        out = []
        for s in seeds:
            torch.manual_seed(s)
            p = crop.make_params([im])
            out.append([p[k] / min(im.size) for k in ("top", "left", "height", "width")])
        return np.array(out)
    a, b = boxes(full, range(800)), boxes(small, range(800))
    assert (np.abs(a - b)[:, 2:].max(1) < 1 / 256).mean() > .99  # the same size for the same draw, up to rounding
    other = boxes(small, range(5000, 5800))
    for column in range(4):  # and as a distribution, also from other draws: Kolmogorov-Smirnov at 0.1 %
        for x, y in ((a, b), (a, other)):
            grid = np.sort(np.r_[x[:, column], y[:, column]]) + 2e-3  # pixels are coarser than the draws
            far = np.abs(np.searchsorted(np.sort(x[:, column]),
                                         grid) - np.searchsorted(np.sort(y[:, column]), grid)).max() / len(x)
            assert far < 1.95 * (2 / 800) ** .5 + .01


# --- interruptions ---
def make_until(folder, at, how):
    quiet(dataset(store=Counting(images(), [f"image {i}" for i in range(12)], at, how)), 50, folder, workers=1)


def test_a_killed_run_is_continued(tmp_path):
    p = mp.get_context("fork").Process(target=make_until,
                                       args=(tmp_path, 8, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    p.start()
    p.join()
    assert p.exitcode == -signal.SIGKILL and not list(tmp_path.glob("*.arrow"))
    ds = dataset()
    pk = quiet(ds, 50, tmp_path)
    assert sorted(ds.store.reads) == list(range(6, 12))  # two chunks of three were kept
    assert same(pixels(pk), reference(ds, 50)) and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("how", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_is_continued(tmp_path, how):
    def stop(): raise how
    with pytest.raises(how): make_until(tmp_path, 4, stop)
    ds = dataset()
    pk = quiet(ds, 50, tmp_path)
    assert sorted(ds.store.reads) == list(range(3, 12)) and same(pixels(pk), reference(ds, 50))


def half_made(folder, at=8):
    def stop(): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): make_until(folder, at, stop)
    return next(folder.glob("*.arrow.part"))


def test_a_half_written_chunk_is_cut_off(tmp_path):
    with open(half_made(tmp_path), "ab") as f: f.write(b"half of a chunk")
    ds = dataset()
    pk = quiet(ds, 50, tmp_path)
    assert same(pixels(pk), reference(ds, 50))
    assert pk.store.path.read_bytes() == quiet(dataset(), 50, tmp_path / "at once").store.path.read_bytes()


def cut(path, n): path.write_bytes(path.read_bytes()[:n])


def change(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def other_recipe(path): path.write_bytes(path.read_bytes().replace(b'"side": 50', b'"side": 51'))


@pytest.mark.parametrize("damage, kept", [
    (lambda p: cut(p, -5), 3), (lambda p: cut(p, 100), 0), (lambda p: cut(p, 0), 0), (lambda p: p.unlink(), 0),
    (other_recipe, 0),
    (lambda p: p.write_bytes(p.read_bytes() + b"\xff\xff\xff\xff\x10\0\0\0"), 6),
    (lambda p: change(p, module._index(p)[1][1][0][0, 0]), 3),
    (lambda p: change(p, module._index(p)[1][0][0][0, 0]), 0)])
def test_a_damaged_partial_copy_is_continued_after_its_last_good_batch(tmp_path, damage, kept):
    damage(half_made(tmp_path))
    ds = dataset()
    pk = quiet(ds, 50, tmp_path)
    assert sorted(ds.store.reads) == list(range(kept, 12)) and same(pixels(pk), reference(ds, 50))


def test_a_kill_between_the_last_two_steps(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(module.os, "fsync", lambda f: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): quiet(dataset(), 50, tmp_path)
    ds = dataset()
    pk = quiet(ds, 50, tmp_path)
    assert ds.store.reads == [] and same(pixels(pk), reference(ds, 50))


def test_two_processes_pack_once(tmp_path):
    context, counter = mp.get_context("fork"), mp.get_context("fork").Value("i", 0)
    class Shared(BytesStore):
        def read(self, i):
            with counter.get_lock(): counter.value += 1
            return super().read(i)
    ds = dataset(store=Shared(images(), range(12)))
    both = [context.Process(target=quiet, args=(ds, 50, tmp_path)) for _ in range(2)]
    for p in both: p.start()
    for p in both: p.join()
    assert [p.exitcode for p in both] == [0, 0] and counter.value == 12


# --- sources and disks that fail ---
@pytest.mark.parametrize("data", [b"", b"no image", images(1)[0][:300]])
def test_a_damaged_source_is_named_and_nothing_is_lost(tmp_path, data):
    paths = [tmp_path / f"photo{i}.jpg" for i in range(12)]
    for p, good in zip(paths, images()): p.write_bytes(good)
    paths[7].write_bytes(data)
    ds = dataset(store=FileStore(paths))
    with pytest.raises(OSError, match=r"photo7\.jpg.*6 images are packed already"): quiet(ds, 50, tmp_path / "to")
    paths[7].write_bytes(images()[7])
    paths[0].unlink()  # is not needed any more
    assert quiet(ds, 50, tmp_path / "to").image(7).size == (75, 50)


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    write, calls = module._write, []
    def full(*a):
        calls.append(1)
        if len(calls) == 4: raise OSError(errno.ENOSPC, "No space left on device")
        return write(*a)
    with monkeypatch.context() as m:
        m.setattr(module, "_write", full)
        with pytest.raises(OSError, match="6 of 12 images.*about 0.* MB more.*free.*They are kept.*format='jpeg'") as e:
            quiet(dataset(), 50, tmp_path)
    assert e.value.errno == errno.ENOSPC
    ds = dataset()
    pk = quiet(ds, 50, tmp_path)
    assert sorted(ds.store.reads) == list(range(6, 12)) and same(pixels(pk), reference(ds, 50))


def test_a_copy_that_cannot_fit_stops_at_once(tmp_path, monkeypatch):
    import shutil
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(module.shutil, "disk_usage", lambda p: usage._replace(free=1000))
        ds = dataset()
        with pytest.raises(OSError, match="no room.*3 of 12") as e: quiet(ds, 50, tmp_path)
    assert e.value.errno == errno.ENOSPC and len(ds.store.reads) == 3


def test_a_real_limit_on_the_file(tmp_path):
    import resource
    def child(q):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        try: quiet(dataset(), 50, tmp_path)
        except OSError as e: q.put(str(e))
    q = mp.get_context("fork").SimpleQueue()
    p = mp.get_context("fork").Process(target=child, args=(q,))
    p.start()
    p.join(30)
    assert p.exitcode == 0 and not q.empty() and "no room for a packed copy" in q.get()
    ds = dataset()
    # 12 for the reference; some were kept
    assert same(pixels(quiet(ds, 50, tmp_path)), reference(ds, 50)) and len(ds.store.reads) < 24


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write a packed copy.*another folder"):
        quiet(dataset(), 50, tmp_path / "file" / "below")


# --- finished copies that are damaged ---
@pytest.mark.parametrize("form", FORMATS)
def test_damage_without_a_trace_is_found_when_the_image_is_read(tmp_path, form):
    ds = dataset()
    pk = quiet(ds, 50, tmp_path, format=form)
    want, path = pixels(pk), pk.store.path
    before = path.read_bytes()
    change(path, int(pk.store.rows[5, 0]) + 9)  # in image 5
    again = quiet(ds, 50, tmp_path, format=form)
    for i in (4, 6):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert (np.asarray(again.image(i)) == want[i]).all()
    with pytest.warns(RuntimeWarning, match="image 5.*damaged.*check=True"):
        assert (np.asarray(again.image(5)) == want[5]).all()
    with pytest.warns(RuntimeWarning, match="1 of 12 images"): quiet(ds, 50, tmp_path, format=form, check=True)
    assert path.read_bytes() == before


def test_damaged_images_are_mended_in_their_place(tmp_path):
    ds = dataset()
    pk = quiet(ds, 50, tmp_path)
    path, before = pk.store.path, pk.store.path.read_bytes()
    for i in (0, 11): change(path, int(pk.store.rows[i, 0]))
    ds.store.reads = []
    with pytest.warns(RuntimeWarning, match="2 of 12 images.*made again"): quiet(ds, 50, tmp_path, check=True)
    assert path.read_bytes() == before and sorted(ds.store.reads) == [0, 11]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(pixels(quiet(ds, 50, tmp_path)), reference(ds, 50))


def test_no_damaged_byte_gives_other_pixels(tmp_path):
    "Any byte of the file: right pixels, or a clear error, and never a silent other image."
    ds = dataset()
    pk = quiet(ds, 50, tmp_path)
    want, path = reference(ds, 50), pk.store.path
    before = path.read_bytes()
    places = np.random.default_rng(0).choice(len(before), 40, replace=False)
    # the small columns
    small = [i for rows, end in module._index(path)[1] for i in range(int(rows[-1, :2].sum()), end)]
    for at in [*places, *range(0, 700, 23), *small[::9]]:
        path.write_bytes(before)
        change(path, int(at))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert same(pixels(quiet(ds, 50, tmp_path)), want), at
        for p in tmp_path.glob("*.part"): p.unlink()


def test_a_copy_that_is_too_short(tmp_path):
    ds = dataset()
    path = quiet(ds, 50, tmp_path).store.path
    before = path.read_bytes()
    cut(path, -30)
    ds.store.reads = []
    with pytest.warns(RuntimeWarning, match="too short"): pk = quiet(ds, 50, tmp_path)
    assert path.read_bytes() == before and sorted(ds.store.reads) == [9, 10, 11] and same(pixels(pk), reference(ds, 50))


def test_a_copy_that_is_too_long(tmp_path):
    ds = dataset()
    path = quiet(ds, 50, tmp_path).store.path
    before = path.read_bytes()
    path.write_bytes(before + b"more")
    assert same(pixels(quiet(ds, 50, tmp_path)), reference(ds, 50))


def test_a_repair_that_another_pillow_would_do_otherwise(tmp_path, monkeypatch):
    ds = dataset()
    path = quiet(ds, 50, tmp_path, format="jpeg").store.path
    change(path, int(module._index(path)[1][0][0][0, 0]) + 50)
    def other(data, side, format, interpolation):
        small = shrink(decode(data), side)
        return coded(small, quality=80), *small.size
    monkeypatch.setattr(module, "pack_image", other)
    with pytest.warns(RuntimeWarning, match="other bytes"): pk = quiet(ds, 50, tmp_path, format="jpeg", check=True)
    assert all(pk.store.whole(i) for i in range(12))
    assert pk.store.stored(0) == other(ds.store.read(0), 50, "jpeg", "bilinear")[0]


@pytest.mark.parametrize("damage, said",
                         [(lambda p: p.write_bytes(b"\xff\x00"), "damaged"), (lambda p: p.write_bytes(b""), "damaged"),
                                          (lambda p: change(p, 6), "damaged"), (lambda p: cut(p, 3000), "too short")])
def test_a_damaged_file_is_made_again(tmp_path, damage, said):
    ds = dataset()
    path = quiet(ds, 50, tmp_path).store.path
    damage(path)
    with pytest.warns(RuntimeWarning, match=said): pk = quiet(ds, 50, tmp_path)
    assert same(pixels(pk), reference(ds, 50))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(ds, 50, tmp_path)


def test_a_copy_of_something_else_under_this_name(tmp_path):
    ds, other = dataset(), dataset(images()[::-1], of="reversed")
    path, wrong = quiet(ds, 50, tmp_path).store.path, quiet(other, 50, tmp_path).store.path
    os.replace(wrong, path)
    with pytest.warns(RuntimeWarning, match="stale"): pk = quiet(ds, 50, tmp_path)
    assert same(pixels(pk), reference(ds, 50))


def test_a_copy_that_vanishes_while_in_use(tmp_path):
    pk = quiet(dataset(), 50, tmp_path)
    pk.store.path.unlink()
    with pytest.raises(OSError, match=r"gone.*packed\("): pk.store.read(0)


def test_it_says_what_it_does(tmp_path, capsys):
    packed(dataset(), 50, tmp_path)
    packed(dataset(of="changed"), 50, tmp_path)
    out = capsys.readouterr().out
    assert out.count("packed 12 images: 0.1 MB") == 2 and out.count("was made from other data") == 1
    packed(dataset(), 50, tmp_path)
    assert capsys.readouterr().out == ""


def test_a_run_from_a_packed_copy(tmp_path, monkeypatch):
    from hapnb.config import RunConfig
    from hapnb.runs import run
    monkeypatch.setenv("HAPNB_CACHE", str(tmp_path / "cache"))
    for c, name in enumerate(("a/x", "a/y", "b/x", "b/y")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4): picture(10 * c + i, 160, 120).save(tmp_path / "photos" / name / f"{i}.jpg", quality=95)
    cfg = RunConfig(dataset="folder", data_dir=str(tmp_path / "photos"), trunk="toy", freeze="bn", image_size=32,
                    transform={"crop_pct": 0.8}, augment={"resize": 50},
                    embed_dim=8, batch_size=8, epochs=1, loss="SmoothAPLoss", lr=0.01, ks=(1,))
    results = [run(c, tmp_path / "runs", device="cpu", progress=False, workers=0)
               for c in (cfg, cfg.replace(packed=50))]
    assert len(list((tmp_path / "cache/packed").glob("*.arrow"))) == 2  # train and test
    full, small = (r.embeddings() for r in results)
    # training saw the same pixels, the test transform resizes 50 to 40 instead of 120 to 40
    assert float((full * small).sum(1).min()) > 0.98
    size = lambda: {p.name.split("-")[-2]: sum(q.stat().st_size
                                               for q in p.parent.glob(f"*-50-{p.name.split('-')[-2]}-*.arrow"))
                    for p in (tmp_path / "cache/packed").glob("*.arrow")}
    other = {f: run(cfg.replace(packed=50, packed_format=f), tmp_path / "runs", device="cpu", progress=False,
                    workers=0) for f in ("webp", "jpeg", "jpeg60")}
    assert size()["raw"] > size()["webp"] > size()["jpeg"] > size()["jpeg60"] and set(size()) == {"raw", *other}
    assert (other["webp"].embeddings() == small).all()  # lossless
    near = [float((other[f].embeddings() * small).sum(1).mean()) for f in ("jpeg60", "jpeg")]
    assert 0.9 < near[0] < near[1] < 0.99999
    assert len({r.key for r in (*results, *other.values())}) == 5


@pytest.mark.parametrize("format, read",
                         [("raw", ("raw", 95)), ("webp", ("webp", 95)), ("jpeg", ("jpeg", 95)), ("jpeg1", ("jpeg", 1)),
                          ("jpeg80", ("jpeg", 80)), ("jpeg100", ("jpeg", 100))])
def test_formats_by_name(format, read): assert module.check_format(format) == read


@pytest.mark.parametrize("format", ["jpg", "jpeg0", "jpeg101", "jpeg080", "jpeg-80", "jpeg80.5", "", None, 95, "png"])
def test_unknown_formats(format):
    for f in (module.check_format, lambda f: pack_image(coded(picture(0)), 50, f),
              lambda f: quiet(dataset(), 50, format=f)):
        with pytest.raises(ValueError, match=r"unknown format .*Known: raw, jpeg, webp, and jpeg1 to jpeg100"):
            f(format)


def test_the_quality_is_that_of_the_name(tmp_path):
    ds = dataset()
    for q in (40, 80, 95):
        stored = [bytes(quiet(ds, 50, tmp_path, format=f"jpeg{q}").store.stored(i)) for i in range(len(ds))]
        assert stored == [coded(shrink(im, 50), quality=q) if min(im.size) > 50 else ds.store.read(i) for i,
                          im in enumerate(map(ds.image, range(len(ds))))]
