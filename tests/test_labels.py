"Tables and arrays of labels: what a cell means, which columns are levels, what is refused."
import json, struct

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from hapnb.helpers import UserError
from hapnb.labels import (code_array, code_column, level_columns, looks_like_split, read_embeddings, read_json,
                          read_labels, read_table, split_column, split_name)

NAMES = [[0], [0], [1], [2]]
TWO = [[0, 0], [0, 0], [1, 0], [2, 1]]

# name of the case -> (content of a text file, codes, or words of the error)
TEXT = {
    # cells count as they are written
    "plain": ("fine,coarse\na,x\na,x\nb,x\nc,y\n", TWO),
    "names that pandas takes for gaps": ("fine\nNA\nNA\nNone\nnan\n", NAMES),
    "more of them": ("fine\nNULL\nNULL\nNaN\nnull\n", [[0], [0], [1], [2]]),
    "leading zeros": ("fine\n1\n01\n001\n1\n", [[2], [1], [0], [2]]),
    "numbers": ("fine\n7\n7\n10\n2\n", [[2], [2], [0], [1]]),
    "words for truth": ("fine\nTrue\nTrue\nFalse\ntrue\n", [[1], [1], [0], [2]]),
    "dates": ("fine\n2020-01-02\n2020-01-02\n02.01.2020\n2020-01-03\n", [[1], [1], [0], [2]]),
    "large numbers": ("fine\n12345678901234567890\n12345678901234567890\n12345678901234567891\n1e3\n",
                      [[0], [0], [1], [2]]),
    "blanks around": ("fine, coarse \na ,x\n a,x \n\tb ,x\n c, y\n", TWO),
    "blanks that do not break": ("fine\na\u00a0\na\nb\nc\n", NAMES),
    "composed and decomposed letters": ("fine\ncaf\u00e9\ncafe\u0301\nd\ne\n", NAMES),
    "capitals": ("fine\na\nA\na\nA\n", [[1], [0], [1], [0]]),
    "quotes": ('fine,coarse\n"a","x"\na,x\n"b, too",x\nc,"y"\n', TWO),
    "quotes inside": ('fine\n"5"" disk"\n"5"" disk"\nx\ny\n', NAMES),
    "quoted line break": ('fine\n"a\nb"\n"a\nb"\nc\nd\n', NAMES),
    "quoted blanks": ('fine,coarse\n" a ",x\na,x\nb,x\nc,y\n', TWO),
    "hash sign": ("fine\n#a\n#a\nb\nc\n", NAMES),
    # unknown classes
    "empty cells": ("fine,coarse\na,x\n,x\nb,\n,y\n", [[0, 0], [-1, 0], [1, -1], [-1, 1]]),
    "-1": ("fine\n-1\n0\n0\n-1\n", [[-1], [0], [0], [-1]]),
    "-1 beside names": ("fine\na\n-1\na\nb\n", [[0], [-1], [0], [1]]),
    "-1 beside empty cells": ("fine,coarse\n-1,x\n,x\na,x\na,x\n", [[-1, 0], [-1, 0], [0, 0], [0, 0]]),
    "-1 as a decimal": ("fine\n-1.0\n2.0\n2.0\n3.0\n", [[-1], [0], [0], [1]]),
    "marks without a width": ("fine\na\n\u200ba\nb\ufeff\nc\u200b\n", NAMES),
    "a sign": ("fine\n1\n+1\n2\n3\n", "one number written in two ways"),
    "zeros after the point": ("fine\n1.0\n1.00\n2.0\n3.0\n", "one number written in two ways"),
    "an exponent": ("fine\n1\n1e0\n2\n3\n", "one number written in two ways"),
    "a negative decimal": ("fine\n-2.0\n1.0\n2.0\n3.0\n", "class -2.0"),
    "a minus of typesetters": ("fine\n\u22121\n1\n2\n3\n", "class \u22121"),
    "whole lines in quotes": ('"fine;coarse"\n"a;x"\n"a;x"\n"b;x"\n"c;y"\n', "the whole line stands in quotes"),
    "one split beside levels": ("fine,part\na,test\na,test\nb,test\nc,test\n", "'part' holds names of splits"),
    "true and false beside levels": ("fine,is_test\na,True\na,True\nb,False\nc,False\n", "holds true and false"),
    "images under another name": ("src,fine\n1.jpg,a\n1.jpg,a\n2.jpg,b\n3.jpg,c\n", "holds names of image files"),
    "a blank line in one column": ("fine\na\n\na\nb\n", [[0], [-1], [0], [1]]),
    "blank lines at the end": ("fine\na\na\nb\nc\n\n\n", NAMES),
    "blank lines between rows": ("fine,coarse\na,x\n\na,x\nb,x\n\nc,y\n", TWO),
    # how values are separated, and lines end
    "semicolons": ("fine;coarse\na;x\na;x\nb;x\nc;y\n", TWO),
    "tabs": ("fine\tcoarse\na\tx\na\tx\nb\tx\nc\ty\n", TWO),
    "semicolons and a name with commas": ("fine;coarse, or kind\na;x\na;x\nb;x\nc;y\n", TWO),
    "semicolons in names": ("fine,coarse\na;1,x\na;1,x\nb;2,x\nc;3,y\n", TWO),
    "a mark at the beginning": ("\ufefffine,coarse\na,x\na,x\nb,x\nc,y\n", TWO),
    "lines of Windows": ("fine,coarse\r\na,x\r\na,x\r\nb,x\r\nc,y\r\n", TWO),
    "lines of old Macs": ("fine,coarse\ra,x\ra,x\rb,x\rc,y\r", TWO),
    "no line end at the end": ("fine\na\na\nb\nc", NAMES),
    "a comma after each row": ("fine,coarse,\na,x,\na,x,\nb,x,\nc,y,\n", TWO),
    # columns that are no levels
    "index of pandas": (",fine,coarse\n0,a,x\n1,a,x\n2,b,x\n3,c,y\n", TWO),
    "index of pandas, filtered": (",fine,coarse\n3,a,x\n7,a,x\n9,b,x\n11,c,y\n", TWO),
    "index that was read and written again": ("Unnamed: 0,fine\n0,a\n1,a\n2,b\n3,c\n", NAMES),
    "path first": ("path,fine,coarse\n1.jpg,a,x\n2.jpg,a,x\n3.jpg,b,x\n4.jpg,c,y\n", TWO),
    "file name and split": ("Filename,fine,Split\n1.jpg,a,train\n2.jpg,a,test\n3.jpg,b,test\n4.jpg,c,test\n", NAMES),
    "number of the image": ("id,fine\n1,a\n2,a\n3,b\n4,c\n", NAMES),
    # what is refused
    "a number per row": ("weight,fine,coarse\n3,a,x\n1,a,x\n2,b,x\n5,c,y\n", "'weight' has another value in every row"),
    "decimal numbers": ("fine,score\na,0.5\na,0.5\nb,0.75\nb,0.75\n", "'score' holds decimal numbers"),
    "a split of another name": ("fine,set\na,train\na,test\nb,train\nb,test\n", "'set' holds names of splits"),
    "index with a class twice": (",fine\n0,a\n0,a\n1,b\n2,c\n", "column 1 has no name"),
    "a column without a name": ("fine,\na,x\na,x\nb,x\nc,y\n", "column 2 has no name"),
    "two columns of one name": ("fine,fine\na,x\na,x\nb,x\nc,y\n", "two columns named 'fine'"),
    "no header": ("0\n0\n1\n2\n", "first line must hold the names"),
    "no header, two columns": ("0,5\n0,5\n1,5\n2,6\n", "first line must hold the names"),
    "too few values": ("fine,coarse\na,x\na\nb,x\n", "line 3 has 1 values, and the header has 2"),
    "too many values": ("fine,coarse\na,x\na,x,y\nb,x\n", "line 3 has 3 values"),
    "row names of R": ("fine,coarse\n1,a,x\n2,a,x\n", "line 2 has 3 values"),
    "a decimal comma": ("fine,coarse\na,1,5\na,1,5\n", "line 2 has 3 values"),
    "blanks between values": ("fine coarse\na x\na x\nb x\nc y\n", "separated by blanks"),
    "bars between values": ("fine|coarse\na|x\na|x\nb|x\nc|y\n", r"separated by \|"),
    "commas or semicolons": ("a,b;c\n1,2;3\n1,2;3\n", "may be separated by commas or by semicolons"),
    "a quotation mark that stays open": ('fine,coarse\n"a,x\na,x\n', "is a quotation mark missing"),
    "a quotation mark out of place": ('fine,coarse\n"a"b,x\na,x\n', "is a quotation mark missing"),
    "one number in two ways": ("fine\n1\n1.0\n2\n3\n", "written in two ways"),
    "negative numbers": ("fine\n-2\n-2\n0\n1\n", "class -2; classes are 0 or more"),
    "coarse before fine": ("coarse,fine\nx,a\nx,a\nx,b\ny,c\n", r"give levels=\['fine', 'coarse'\]"),
    "no hierarchy": ("fine,coarse\na,x\na,y\nb,x\nb,x\n", "not a tree"),
    "a class whose parent has gaps": ("fine,coarse\na,x\na,\nb,x\nb,x\n", "not a tree"),
    "no labels": ("path,split\n1.jpg,train\n2.jpg,test\n", "no column for labels"),
    "no content": ("", "it is empty"),
    "blank lines only": ("\n\n \n", "it is empty"),
    "zero bytes": ("fine\na\n\0\0\0", "line 3: holds zero bytes"),
    "a very long cell": ("fine\n" + "a" * 200_000 + "\n", "field larger than field limit"),
}
BYTES = {
    "not UTF-8": (b"fine\nh\xfcbou\nb\n", r"line 2: not UTF-8 text \(byte 0xfc\)"),
    "UTF-16": ("fine\na\n".encode("utf-16"), "UTF-16"),
    "an Excel file": (b"PK\x03\x04\x14\x00\x06\x00\x08\x00\x00\x00!\x00", "zero bytes|not UTF-8"),
}


def outcome(path, wanted):
    "The codes are those wanted, or the error names the file and what is wrong."
    if not isinstance(wanted, str):
        assert read_labels(path)[0].tolist() == wanted
        return
    with pytest.raises(UserError, match=wanted) as e: read_labels(path)
    assert path.name in str(e.value) and len(str(e.value)) < 600


@pytest.mark.parametrize("case", TEXT)
def test_a_table_of_labels_is_right_or_refused(tmp_path, case):
    content, wanted = TEXT[case]
    path = tmp_path / "labels.csv"
    path.write_bytes(content.encode())
    outcome(path, wanted)


@pytest.mark.parametrize("case", BYTES)
def test_bytes_that_are_no_table_are_refused(tmp_path, case):
    content, wanted = BYTES[case]
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    outcome(path, wanted)


PARQUET = {
    "text": (dict(fine=["a", "a", "b", "c"], coarse=["x", "x", "x", "y"]), TWO),
    "numbers": (dict(fine=[7, 7, 10, 2]), [[1], [1], [2], [0]]),
    "numbers with gaps": (dict(fine=pa.array([7, None, -1, 2], pa.int16())), [[1], [-1], [-1], [0]]),
    "unsigned numbers with gaps": (dict(fine=pa.array([7, None, 2 ** 64 - 1, 2], pa.uint64())), [[1], [-1], [2], [0]]),
    "whole floats with gaps": (dict(fine=[3., None, 3., 5.]), [[0], [-1], [0], [1]]),
    "categories": (dict(fine=pa.array(["a", None, "b", "a"]).dictionary_encode()), [[0], [-1], [1], [0]]),
    "categories of numbers": (dict(fine=pa.array([30, 5, None, 30]).dictionary_encode()), [[1], [0], [-1], [1]]),
    "long text": (dict(fine=pa.array(["a", "a", "b", "c"], pa.large_string())), NAMES),
    "blanks and empty text": (dict(fine=["a ", "a", "", " "]), [[0], [0], [-1], [-1]]),
    "names that pandas takes for gaps": (dict(fine=["NA", "NA", "None", "nan"]), NAMES),
    "truth values": (dict(fine=[True, True, False, True]), [[1], [1], [0], [1]]),
    "index of pandas": (dict(fine=["a", "a", "b", "c"], __index_level_0__=[5, 6, 7, 8]), NAMES),
    "fractions": (dict(fine=[1., 1.5, 2., 2.]), "row 1 holds 1.5"),
    "infinite": (dict(fine=[1., float("inf"), 2., 2.]), "row 1 holds inf"),
    "negative": (dict(fine=[1, -5, 2, 2]), "row 1 holds -5"),
    "lists": (dict(fine=[[0, 1], [0], [1], [1]]), "row 0 holds a (list|ndarray)"),
    "records": (dict(fine=[dict(a=1)] * 4), "row 0 holds a dict"),
    "bytes": (dict(fine=[b"a", b"a", b"b", b"b"]), r"row 0 holds .*\(bytes\)"),
    "times": (dict(fine=pd.to_datetime(["2020-01-01"] * 2 + ["2021-01-01"] * 2)), r"row 0 holds .*Timestamp"),
}


@pytest.mark.parametrize("case", PARQUET)
def test_a_parquet_table_of_labels_is_right_or_refused(tmp_path, case):
    columns, wanted = PARQUET[case]
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    outcome(tmp_path / "labels.parquet", wanted)


def test_a_damaged_parquet_table_is_refused(tmp_path):
    pq.write_table(pa.table(dict(fine=["a"] * 1000)), tmp_path / "t.parquet")
    data = (tmp_path / "t.parquet").read_bytes()
    for bad in (b"", data[:20], data[:-9], b"fine\na\n", data[:8] + bytes(20) + data[28:]):
        (tmp_path / "t.parquet").write_bytes(bad)
        outcome(tmp_path / "t.parquet", "cannot be read as a parquet table")


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], ["fine", "fine "]), tmp_path / "t.parquet")
    outcome(tmp_path / "t.parquet", "two columns named 'fine'")


def test_files_that_are_not_there_or_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="looked for a table"): read_table(tmp_path / "t.csv")
    with pytest.raises(UserError, match="unknown kind of file"): read_labels(tmp_path / "t.xlsx")
    with pytest.raises(FileNotFoundError, match="no such file"): read_labels(tmp_path / "t.npy")


# ---- columns and arrays

@pytest.mark.parametrize("values, wanted", [
    ([1, "1"], r"row 0 holds '1' \(int\)"), (["a", 1.5], r"row 1 holds '1.5' \(float\)"), ([1 + 2j], "complex numbers"),
    ([("a", "b")], r"\(tuple\)"), ([{"a": 1}], "holds a dict")])
def test_a_column_of_mixed_or_foreign_values_is_refused(values, wanted):
    with pytest.raises(UserError, match=wanted): code_column(values, "t.csv, column 'fine'")


@pytest.mark.parametrize("values", [["b", None, "a"], pd.Series(["b", np.nan, "a"]), pd.Categorical(["b", None, "a"]),
                                    pd.Series(["b", pd.NA, "a"], dtype="string"), np.array(["b", "-1", "a"])])
def test_all_kinds_of_text_columns_give_the_same_codes(values):
    codes, names = code_column(values)
    assert codes.tolist() == [1, -1, 0] and names == ["a", "b"]


@pytest.mark.parametrize("values", [np.array([9, -1, 2], ">i8"), np.array([9, np.nan, 2]), [9, -1, 2],
                                    pd.Series([9, None, 2], dtype="Int16"), np.array([9, -1, 2], np.float16)])
def test_all_kinds_of_numeric_columns_give_the_same_codes(values):
    codes, names = code_column(values)
    assert codes.tolist() == [1, -1, 0] and names == ["2", "9"]


@pytest.mark.parametrize("labels, wanted", [
    (np.array([3, 3, -1], ">i4"), [[3], [3], [-1]]), (np.array([3., np.nan, 5.]), [[3], [-1], [5]]),
    (torch.tensor([[3, 0], [4, 0]]), [[3, 0], [4, 0]]), (torch.tensor([1., 2.]).bfloat16(), [[1], [2]]),
    (np.array([True, False]), [[1], [0]]), (np.array(["b", "", "a"]), [[1], [-1], [0]]),
    (np.array([b"b", b"b"]), [[0], [0]]), (np.arange(6)[::-2], [[5], [3], [1]]),
    (np.array([2 ** 64 - 1, 0], np.uint64), [[1], [0]])])
def test_arrays_of_labels(labels, wanted):
    assert code_array(labels)[0].tolist() == wanted


@pytest.mark.parametrize("labels, wanted", [
    (np.array(3), "shape"), (np.zeros((2, 2, 2), int), "shape"), (np.zeros((3, 0), int), "shape"),
    (np.array(["2020-01-01"], "M8[D]"), "whole numbers or names"), (np.array([1j]), "whole numbers or names"),
    (np.array([1.5]), "row 0 holds 1.5"), (np.array([-3]), "row 0 holds -3"),
    (np.array([b"a", b"caf\xe9"]), "b'caf.*not UTF-8"),
    (np.array([1, 2 ** 24], np.float32), "row 1 holds 16777216.0.*below 1.67772e.07 where"),
    (torch.tensor([1001, 1002]).bfloat16(), "bfloat16 does not tell numbers from 256"),
    (torch.tensor([4001, 4002]).half(), "float16 does not tell numbers from 2048")])
def test_arrays_that_are_no_labels_are_refused(labels, wanted):
    with pytest.raises(UserError, match=wanted): code_array(labels, "e.npz: labels")


# ---- splits

def test_names_of_splits():
    for part, words in dict(train="train Train TRAIN training", val="val valid VALIDATION dev", test="test Testing",
                            fit="fit").items():
        assert {split_name(f" {w} ") for w in words.split()} == {part}
    assert split_name("owl") is None and not looks_like_split("owl") and not looks_like_split("train station")
    assert all(map(looks_like_split, ("test", "Test-Set", "train_images", "query", "val2")))


@pytest.mark.parametrize("values, wanted", [
    (["train", "tets"], "holds 'tets'.*row 1"), (["train", None], "an empty cell.*row 1"),
    ([0, 1], "holds 0, 1"), (["train", "query", ""], "'query', an empty cell")])
def test_words_that_are_no_split_are_refused(values, wanted):
    with pytest.raises(UserError, match=wanted): split_column(values, "t.csv")


@pytest.mark.parametrize("levels, wanted", [
    (["fin"], "no column 'fin'. Did you mean 'fine'"), (3, "must be names of columns"), ([["fine"]], "must be names"),
    (["fine", "fine"], "is there twice"), ([], "no column for labels")])
def test_levels_that_do_not_fit_are_refused(levels, wanted):
    with pytest.raises(UserError, match=wanted): level_columns(pd.DataFrame(dict(fine=["a"])), levels, "t.csv")


def test_levels_that_the_user_names_are_taken(tmp_path):
    (tmp_path / "t.csv").write_text("id,weight,fine\n1,0.5,a\n2,0.7,a\n3,0.9,b\n")
    assert read_labels(tmp_path / "t.csv", ["id", "fine"])[1] == ("id", "fine")
    assert read_labels(tmp_path / "t.csv", "weight")[2] == [["0.5", "0.7", "0.9"]]


# ---- embeddings

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def written(folder, kind, **arrays):
    path = folder / f"e.{kind}"
    if kind == "npz": np.savez(path, **arrays)
    elif kind == "npy": np.save(path, arrays["embeddings"])
    elif kind == "safetensors": save_file({k: torch.from_numpy(v) for k, v in arrays.items()}, path)
    else:
        rest = {"fine_id": arrays["labels"]} if "labels" in arrays else {}
        pd.DataFrame({"embedding": list(arrays["embeddings"]), **rest}).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["npz", "npy", "safetensors", "parquet"])
def test_embeddings_in_all_kinds_of_files_are_the_same(tmp_path, kind):
    (tmp_path / "l.csv").write_text("fine\n3\n3\n-1\n5\n")
    path = written(tmp_path, kind, embeddings=X, labels=np.array([3, 3, -1, 5]))
    found = read_embeddings(path, tmp_path / "l.csv")
    assert torch.equal(found.embeddings, torch.from_numpy(X)) and found.labels.tolist() == [[0], [0], [-1], [1]]
    own = read_embeddings(path).labels
    same = None if own is None else [[a == b and a >= 0 for b in own[:, 0].tolist()] for a in own[:, 0].tolist()]
    assert kind == "npy" and own is None or same[0] == [True, True, False, False] and same[2] == [False] * 4


@pytest.mark.parametrize("x", [X.astype(">f4"), X.astype(np.float64), X[:, ::-1], (X * 10).astype(np.int32),
                               X.astype(np.float16)])
def test_embeddings_of_other_types_become_floats(tmp_path, x):
    assert torch.equal(read_embeddings(written(tmp_path, "npz", embeddings=x)).embeddings,
                       torch.from_numpy(x.astype(np.float32).copy()))


def test_true_and_false_are_no_embeddings_in_any_file(tmp_path):
    save_file({"embeddings": torch.from_numpy(X) > 0}, tmp_path / "e.safetensors")
    with pytest.raises(UserError, match="real numbers"): read_embeddings(tmp_path / "e.safetensors")


def test_two_columns_of_embeddings_are_refused(tmp_path):
    two = pa.table([pa.array(list(X)), pa.array(list(-X))], names=["embedding", "embedding"])
    pq.write_table(two, tmp_path / "e.parquet")
    with pytest.raises(UserError, match="two columns named 'embedding'"): read_embeddings(tmp_path / "e.parquet")


def test_half_precision_of_brains(tmp_path):
    save_file({"embeddings": torch.from_numpy(X).bfloat16()}, tmp_path / "e.safetensors")
    found = read_embeddings(tmp_path / "e.safetensors").embeddings
    assert torch.equal(found, torch.from_numpy(X).bfloat16().float())


@pytest.mark.parametrize("x, wanted", [
    (X + 1j, "real numbers"), (X[0], r"shape \[N, D\]"), (X[None], r"shape \[N, D\]"), (X[:0], r"shape \[N, D\]"),
    (np.array([["a"]]), "real numbers"), (X > 0, "real numbers"), (X * np.nan, "NaN or infinite"),
    (X.astype(np.float64) * 1e300, "NaN or infinite")])
def test_embeddings_that_are_none_are_refused(tmp_path, x, wanted):
    with pytest.raises(UserError, match=wanted) as e: read_embeddings(written(tmp_path, "npz", embeddings=x))
    assert "e.npz" in str(e.value)


def test_files_of_embeddings_that_cannot_be_read(tmp_path):
    good = written(tmp_path, "npz", embeddings=X, labels=np.array([0, 0, 1, 1]))
    data = good.read_bytes()
    np.savez(tmp_path / "objects.npz", embeddings=np.array([{}, {}], object))
    huge = json.dumps({"embeddings": dict(dtype="F32", shape=[10 ** 12, 4], data_offsets=[0, 16 * 10 ** 12])}).encode()
    files = {"cut.npz": data[:100], "none.npz": b"", "text.npz": b"hello",
             "flip.npz": data[:60] + bytes(40) + data[100:],
             "objects.npz": (tmp_path / "objects.npz").read_bytes(), "cut.npy": b"\x93NUMPY\x01\x00v\x00{'desc",
             "huge.safetensors": struct.pack("<Q", len(huge)) + huge, "deep.safetensors": b"\xff" * 40}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read") as e: read_embeddings(tmp_path / name)
        assert name in str(e.value)


def test_rows_that_do_not_agree(tmp_path):
    path = written(tmp_path, "npz", embeddings=X)
    (tmp_path / "l.csv").write_text("a\nb\nb\nc\n")
    with pytest.raises(UserError, match="3 rows of labels in .*l.csv. Has the table a line with the names"):
        read_embeddings(path, tmp_path / "l.csv")
    np.savez(tmp_path / "other.npz", vectors=X)
    with pytest.raises(UserError, match="has no embeddings.*It has: vectors"): read_embeddings(tmp_path / "other.npz")
    with pytest.raises(UserError, match="embeddings are read from"): read_embeddings(tmp_path / "l.csv")


def test_levels_of_a_parquet_file_of_features(tmp_path):
    frame = pd.DataFrame(dict(path=list("abcd"), embedding=list(X), fine_id=[5, 5, 7, 9], fine=list("aabc")))
    frame.to_parquet(tmp_path / "e.parquet")
    found = read_embeddings(tmp_path / "e.parquet")
    assert found.labels.tolist() == NAMES and found.level_names == ("fine",) and found.paths == list("abcd")
    frame.assign(kind=list("xxxy")).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(UserError, match="'kind' may be one. Say which are"): read_embeddings(tmp_path / "e.parquet")
    assert read_embeddings(tmp_path / "e.parquet", levels=["fine", "kind"]).labels.tolist() == TWO
    frame.drop(columns=["fine", "fine_id"]).to_parquet(tmp_path / "e.parquet")
    assert read_embeddings(tmp_path / "e.parquet").labels is None


@pytest.mark.parametrize("column, wanted", [
    ([[1., 2.], [1.]], "row 1 has an embedding of 1 numbers"), ([[1.], None], "row 1 has no embedding"),
    ([["a"], ["b"]], "must hold numbers"), (["a", "b"], "must hold lists"), ([], "must hold lists|no rows"),
    ([[1.], [float("nan")]], "NaN or infinite")])
def test_columns_that_are_no_embeddings_are_refused(tmp_path, column, wanted):
    pq.write_table(pa.table(dict(embedding=column)), tmp_path / "e.parquet")
    with pytest.raises(UserError, match=wanted): read_embeddings(tmp_path / "e.parquet")


@pytest.mark.parametrize("text, wanted", [("[" * 100_000, "nested too deeply|not whole"), ("{", "not whole JSON"),
                                          ("[" * 100_000 + "]" * 100_000, "nested too deeply")])
def test_json_from_outside_is_refused_in_words(text, wanted):
    with pytest.raises(UserError, match=wanted): read_json(text, "train2018.json")
