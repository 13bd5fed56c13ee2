"""Feature files lose nothing, others can read them, faults are named; extraction repeats the numbers of a run."""
import json, os, subprocess, sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from hapnb import features
from hapnb.datasets import RetrievalDataset
from hapnb.data import load
from hapnb.features import (FeatureTable, check_same_space, extract_features, read_features,
                            write_features)
from hapnb.config import RunConfig, load_splits
from hapnb.runs import run


def table(n=7, d=3, levels=2, seed=0, **more):
    g = torch.Generator().manual_seed(seed)
    y = torch.stack([torch.arange(n) // (2 ** (l + 1)) for l in range(levels)], 1) if levels else None
    if levels: y[n // 2, 0] = -1
    names = [[f"l{l} c{c}, \"ü\"" for c in range(n)] for l in range(levels)] if levels else None
    return FeatureTable(torch.randn(n, d, generator=g), y, [f"sub folder/{i}.jpg" for i in range(n)],
                        tuple(f"level {l}" for l in range(levels)), names,
                        dict(run="abc", dataset=dict(name="x", split="y")) | more)


def same(a, b):
    assert torch.equal(a.embeddings, b.embeddings) and a.embeddings.dtype == b.embeddings.dtype == torch.float32
    assert (a.labels is None) == (b.labels is None) and (a.labels is None or torch.equal(a.labels, b.labels))
    assert (a.paths, tuple(a.level_names), a.class_names) == (b.paths, tuple(b.level_names), b.class_names)
    assert {**b.about, "normalised": None} == {**a.about, "normalised": None}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 3), st.integers(1, 40))
def test_round_trip_with_any_row_groups(tmp_path, n, d, levels, group):
    old, features._GROUP = features._GROUP, group
    try: path = write_features(table(n, d, levels), tmp_path / "f.parquet")
    finally: features._GROUP = old
    same(table(n, d, levels), read_features(path))
    assert pq.ParquetFile(path).num_row_groups == -(-n // max(group // d, 1))


def test_any_kind_of_number_and_no_class_names(tmp_path):
    t = FeatureTable(torch.eye(3, dtype=torch.float64), np.array([0, 1, -1], np.int32))
    back = read_features(write_features(t, tmp_path / "f.parquet"))
    assert back.class_names is None
    assert back.level_names == ("level0",)
    assert back.paths == ["row 0", "row 1", "row 2"]
    assert back.labels.tolist() == [[0], [1], [-1]]
    assert back.about["normalised"] is True
    assert read_features(write_features(table(), tmp_path / "g.parquet")).about["normalised"] is False
    half = FeatureTable(torch.randn(4, 2).half())
    assert torch.equal(read_features(write_features(half, tmp_path / "h.parquet")).embeddings, half.embeddings)


def test_pandas_and_datasets_read_it(tmp_path, monkeypatch):
    path = write_features(table(50, 4), tmp_path / "f.parquet")
    frame = pd.read_parquet(path)
    assert list(frame) == ["path", "embedding", "level 0_id", "level 0", "level 1_id", "level 1"]
    np.testing.assert_array_equal(np.stack(frame["embedding"]), table(50, 4).embeddings)
    assert frame["level 0"][25] is None or pd.isna(frame["level 0"][25])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    for streaming in (False, True):
        ds = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=streaming,
                                   cache_dir=str(tmp_path / "cache"))
        rows = list(ds)
        assert len(rows) == 50
        assert rows[3]["path"] == "sub folder/3.jpg"
        assert rows[3]["embedding"] == pytest.approx(table(50, 4).embeddings[3].tolist())


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = write_features(table(), tmp_path / "f.parquet")
    before = path.read_bytes()
    def broken(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(features, "_group", broken)
    with pytest.raises(OSError, match="cannot write"): write_features(table(9), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["f.parquet"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write"): write_features(table(), tmp_path / "file/f.parquet")


def written(tmp_path, columns, meta=None):
    data = pa.table(columns)
    pq.write_table(data.replace_schema_metadata(meta) if meta else data, tmp_path / "f.parquet")
    return tmp_path / "f.parquet"


@pytest.mark.parametrize("columns, text", [
    (dict(embedings=[[1.]]), "Did you mean 'embedings'"), (dict(x=[1]), "no column 'embedding'"),
    (dict(embedding=[1., 2.]), "lists of numbers"), (dict(embedding=[["a"]]), "must hold numbers"),
    (dict(embedding=[[1., 2.], [1., 2.], [3.]]), "row 2 has an embedding of 1 numbers"),
    (dict(embedding=[[1.], None]), "row 1 has no embedding"),
    (dict(embedding=[[1.], [float("nan")], [float("inf")]]), "row(s) 1, 2 of 3"),
    (dict(embedding=[[1., None]]), "row(s) 0 of 1"), (dict(embedding=pa.array([], pa.list_(pa.float32()))), "no rows"),
    (dict(embedding=[[1.]], a_id=[-2]), "row 0 holds -2"), (dict(embedding=pa.array([[]], pa.list_(pa.float32()))),
                                                             "no dimensions")])
def test_faults_name_the_file_and_the_row(tmp_path, columns, text):
    path = written(tmp_path, columns)
    with pytest.raises(ValueError) as e: read_features(path)
    assert text in str(e.value) and str(path) in str(e.value)


def test_faults_in_late_rows_are_counted_from_the_start(tmp_path, monkeypatch):
    path = written(tmp_path, dict(embedding=pa.array([[1.]] * 70_000 + [[1., 2.]])))
    with pytest.raises(ValueError, match="row 70000 has an embedding of 2"): read_features(path)


def test_other_files_newer_formats_and_missing_files_are_named(tmp_path):
    (tmp_path / "t.parquet").write_text("path,embedding")
    with pytest.raises(ValueError, match="not a whole parquet file"): read_features(tmp_path / "t.parquet")
    with pytest.raises(FileNotFoundError, match="no such file of features"): read_features(tmp_path / "none.parquet")
    with pytest.raises(FileNotFoundError, match="no such file of features"): read_features(tmp_path)
    with pytest.raises(ValueError, match="newer hapnb"):
        read_features(written(tmp_path, dict(embedding=[[1.]]), {b"hapnb": json.dumps(dict(format=2)).encode()}))


def test_files_of_others_are_read_as_they_mean_it(tmp_path):
    columns = dict(embedding=[[1, 2], [3, 4], [5, 6]], genus_id=[1, 0, 1], genus=["g1", "g0", "g1"])
    t = read_features(written(tmp_path, columns))
    assert (t.level_names, t.labels.tolist(), t.class_names) == (("genus",), [[1], [0], [1]], [["g0", "g1"]])
    assert t.embeddings.tolist() == [[1, 2], [3, 4], [5, 6]]
    path = written(tmp_path, columns | dict(species=["b", "a", None], year=[2001, 2002, 2001]))
    with pytest.raises(ValueError, match="'species' may be one. Say which are"): read_features(path)
    t = read_features(path, ["species", "genus"])
    assert t.labels.tolist() == [[1, 1], [0, 0], [-1, 1]] and t.class_names == [["a", "b"], ["g0", "g1"]]
    with pytest.raises(ValueError, match="Did you mean 'species'"): read_features(path, ["specis"])


def test_keys_of_a_database_are_numbered_anew_and_keep_their_names(tmp_path):
    keys = pa.array([5231190, None, 2**60, 5231190])
    large = written(tmp_path, dict(embedding=[[1.]] * 4, taxon_id=keys, taxon=["tit", None, None, "tit"]))
    t = read_features(large)
    assert (t.level_names, t.labels[:, 0].tolist()) == (("taxon",), [0, -1, 1, 0])
    assert t.class_names == [["tit", str(2**60)]]
    assert read_features(large, "taxon_id").class_names == [["5231190", str(2**60)]]


def test_gaps_in_class_numbers_are_unknown_in_every_kind_of_column(tmp_path):
    for kind in (pa.int64(), pa.int8(), pa.uint32(), pa.float64(), pa.float32()):
        path = written(tmp_path, dict(embedding=[[1.]] * 4, fine_id=pa.array([3, None, 0, 3], kind)))
        t = read_features(path)
        assert (t.level_names, t.labels[:, 0].tolist()) == (("fine",), [1, -1, 0, 1]), kind
        assert t.class_names == [["0", "3"]]


def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path):
    path = write_features(table(40, 4), tmp_path / "f.parquet")
    whole, same_table = path.read_bytes(), read_features(path)
    for at in range(4, len(whole), max(len(whole) // 150, 1)):
        data = bytearray(whole)
        data[at] ^= 1
        path.write_bytes(data)
        try: found = read_features(path)
        except ValueError as e: assert str(path) in str(e)
        else: same(same_table, found)


def saved(path, **arrays):
    if path.suffix == ".npz": np.savez(path, **arrays)
    else:
        from safetensors.torch import save_file
        save_file({k: torch.as_tensor(v) for k, v in arrays.items()}, path)
    return path


def test_arrays_of_others(tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    other = read_features(saved(tmp_path / "a.npz", embeddings=x.astype(">f4"), labels=np.array([2, -1, 0], ">i8")))
    assert np.array_equal(other.embeddings.numpy(), x) and other.labels[:, 0].tolist() == [2, -1, 0]
    named = read_features(saved(tmp_path / "b.npz", embeddings=x, labels=[["b", "u"], ["", "u"], ["a", "v"]]))
    assert named.labels.tolist() == [[1, 0], [-1, 0], [0, 1]] and named.class_names == [["a", "b"], ["u", "v"]]
    half = saved(tmp_path / "c.safetensors", embeddings=torch.tensor(x).bfloat16(), labels=[[0, 0], [1, 0], [2, 1]])
    assert torch.equal(read_features(half).embeddings, torch.tensor(x).bfloat16().float())
    assert read_features(half, [1]).labels.tolist() == [[0], [0], [1]]
    assert read_features(saved(tmp_path / "d.npz", embeddings=x)).labels is None
    path = write_features(table(), tmp_path / "f.parquet")
    same(read_features(path), read_features(path))


@pytest.mark.parametrize("arrays, text", [
    (dict(embedings=[[1.]]), "Did you mean 'embedings'"), (dict(embeddings=[[1j]]), "real numbers"),
    (dict(embeddings=[[1.]], labels=[.5]), "names, or whole numbers"),
    (dict(embeddings=[[1.], [2.]], labels=[0]), "2 embeddings")])
def test_faults_in_arrays_name_the_file(tmp_path, arrays, text):
    path = saved(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=text) as e: read_features(path)
    assert str(path) in str(e.value)


def test_a_column_that_was_taken_away(tmp_path):
    "pyarrow keeps our note when it drops a column, so the note may promise what is not there."
    path = write_features(table(), tmp_path / "f.parquet")
    pq.write_table(pq.read_table(path).drop_columns(["level 0_id"]), tmp_path / "g.parquet")
    with pytest.raises(ValueError, match="g.parquet: column 'level 0_id' is missing"):
        read_features(tmp_path / "g.parquet")
    assert torch.equal(read_features(tmp_path / "g.parquet", "level 1").labels[:, 0], table().labels[:, 1])


def test_tables_of_two_networks_are_not_mixed():
    a = table(run="a")
    for b, text in ((table(d=4), "3 dimensions and F 4"), (table(run="b"), "do not live in one space"),
                    (table(run=None, trunk="t"), "trunk t")):
        with pytest.raises(ValueError, match=text): check_same_space(a, b, ("E", "F"))
    for b in (table(n=9, run="a", dataset=dict(name="other", split="z")), FeatureTable(torch.eye(3))):
        check_same_space(a, b)
    with pytest.raises(ValueError, match="other settings"):
        check_same_space(table(run=None, trunk="t", settings=dict(image_size=64)),
                         table(run=None, trunk="t", settings=dict(image_size=128)))


# extraction

CFG = dict(dataset="toy", trunk="toy", image_size=32, embed_dim=6, batch_size=48, epochs=1, loss="SupAPLoss",
           metrics=("H-AP",))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    store = tmp_path_factory.mktemp("runs")
    return {freeze: run(RunConfig(**CFG, freeze=freeze), store, "cpu", progress=False, workers=0)
            for freeze in ("trunk", "none")}


@pytest.mark.parametrize("freeze", ["trunk", "none"])
def test_extraction_repeats_the_numbers_of_the_run_and_leaves_the_random_state_alone(runs, freeze):
    torch.manual_seed(5)
    state = torch.get_rng_state().clone()
    t = extract_features(runs[freeze], runs[freeze].dataset(), "cpu", workers=0)
    assert torch.equal(t.embeddings, runs[freeze].embeddings()) and torch.equal(t.labels, runs[freeze].labels())
    assert torch.equal(state, torch.get_rng_state())
    assert t.about["run"] == runs[freeze].key
    assert t.about["dataset"]["fingerprint"] == runs[freeze].dataset().fingerprint
    assert t.about["normalised"]
    assert t.about["hapnb"]
    assert t.class_names == [list(c) for c in runs[freeze].dataset().class_names] and len(set(t.paths)) == len(t)


def test_any_split_part_or_dataset_can_be_extracted(runs, tmp_path):
    train = load_splits(RunConfig(**CFG))[0]
    whole = extract_features(str(runs["trunk"].path), train, "cpu", workers=0)
    part = extract_features(runs["trunk"], train.subset(np.arange(10, 20)), "cpu", levels=[1], workers=0)
    torch.testing.assert_close(part.embeddings, whole.embeddings[10:20])
    assert part.paths == whole.paths[10:20] and part.level_names == ("shape",)
    from PIL import Image
    for i, name in enumerate(("a", "a", "b", "b")):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (60 * i, 10, 99)).save(tmp_path / name / f"{i}.png")
    own = extract_features(runs["none"], load("folder", "all", data_dir=tmp_path), "cpu", workers=0)
    assert len(own) == 4 and all(p.endswith(".png") for p in own.paths)


def test_nan_embeddings_are_named(runs, monkeypatch):
    def broken(*a, **k):
        z = torch.ones(len(test), 6)
        z[[3, 8]] = torch.nan
        return z
    test = runs["trunk"].dataset()
    monkeypatch.setattr(features, "embed_part", broken)
    with pytest.raises(ValueError, match="2 of 144 embeddings of toy/test are NaN or infinite, first row 3"):
        extract_features(runs["trunk"], test, "cpu")


def test_wrong_requests_are_refused_with_the_reason(runs):
    ds = runs["trunk"].dataset()
    for args, kw, text in (((None, ds), {}, "either a run"), ((runs["trunk"], ds), dict(trunk="toy"), "either a run"),
                           ((runs["trunk"], ds), dict(pooling="max"), "its own settings"),
                           ((None, ds), dict(trunk="resnet35"), "unknown trunk"),
                           ((None, ds), dict(trunk="toy", imagesize=3), "Did you mean 'image_size'"),
                           ((runs["trunk"], ds), dict(levels=["hu"]), "Did you mean 'hue'"),
                           ((runs["trunk"], ds), dict(levels=[5]), "no level 5"),
                           ((runs["trunk"], ds), dict(device="gpu"), "unknown device")):
        with pytest.raises(ValueError, match=text): extract_features(*args, **kw)


def test_a_million_numbers_are_read_without_a_second_copy(tmp_path):
    path = write_features(FeatureTable(torch.randn(200_000, 64)), tmp_path / "f.parquet")  # 51 MB
    code = ("import resource, sys; from hapnb.features import read_features; import pyarrow.parquet\n"
            "m = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "b = m(); t = read_features(sys.argv[1]); print(len(t), (m() - b) // 1000)")
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True,
                         env=os.environ).stdout.split()
    assert out[0] == "200000" and int(out[1]) < 51 + 130, out
