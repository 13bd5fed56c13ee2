"""hapnb.protocols: every protocol against loops over Python lists, its rules for odd cases, its errors, its memory."""
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import hapnb.protocols as protocols
from hapnb.protocols import dyml
from hapnb.metrics import evaluate
from hapnb.protocols import PROTOCOLS, evaluate_protocol, random_gallery
from test_metrics import Far, TwoDevices


# the opinion that the library is compared with: loops, and nothing of hapnb

def ranked(scores, q, gallery):
    "Gallery rows by decreasing score for query row q, ties by row; the query itself is out."
    return sorted((i for i in gallery if i != q), key=lambda i: (-scores[q][i], i))


def per_query(scores, classes, queries, gallery, ks=(1, 2, 4, 8)):
    "Mean AP, ASI and R@k over the queries that have a positive, and how many have none."
    values, skipped = {}, 0
    for q in queries:
        hits = [classes[i] == classes[q] != -1 for i in ranked(scores, q, gallery)]
        at = [r for r, h in enumerate(hits, 1) if h]
        if not at:
            skipped += 1
            continue
        values.setdefault("AP", []).append(sum(i / r for i, r in enumerate(at, 1)) / len(at))
        values.setdefault("ASI", []).append(sum(sum(r <= k for r in at) / k for k in range(1, len(at) + 1)) / len(at))
        for k in ks: values.setdefault(f"R@{k}", []).append(float(at[0] <= k))
    return {m: sum(v) / len(v) for m, v in values.items()}, skipped


def scored(x): return (F.normalize(x.double(), dim=1) @ F.normalize(x.double(), dim=1).T).numpy().round(12).tolist()


def close(found, expected):
    for k, v in expected.items(): assert found[k] == pytest.approx(v, abs=1e-9), k


@st.composite
def sets(draw, classes=4, levels=1):
    "A few rows, all different or with many exact ties (axes, whose scores are exact), and labels that form a tree."
    n = draw(st.integers(6, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    axes = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    x = axes[rng.integers(0, 6, n)] if draw(st.booleans()) else torch.tensor(rng.standard_normal((n, 3)))
    fine = rng.integers(-1, classes, n)
    return x, torch.tensor(np.stack([np.where(fine < 0, -1, fine // 2**l) for l in range(levels)], 1)), rng


@settings(max_examples=25)
@given(sets(), st.integers(2, 4))
def test_disjoint_hides_images_with_the_same_value(data, authors):
    x, labels, rng = data
    of = rng.permutation(np.arange(len(x)) % authors)
    classes, scores, values, skipped = labels[:, 0].tolist(), scored(x), {}, 0
    for q in range(len(x)):
        found, without = per_query(scores, classes, [q], np.flatnonzero(of != of[q]).tolist(), ks=(1, 2))
        skipped += without
        for m, v in found.items(): values.setdefault(m, []).append(v)
    if skipped == len(x):
        with pytest.raises(ValueError, match="nothing can be measured"):
            evaluate_protocol(x, labels, {"maker": of}, {"kind": "disjoint", "column": "maker"}, ks=(1, 2))
        return
    found = evaluate_protocol(x, labels, {"maker": of}, {"kind": "disjoint", "column": "maker"}, ks=(1, 2),
                              per_query=True)
    close(found, {f"{m}_level0": sum(v) / len(v) for m, v in values.items()} | {"skipped_level0": skipped})
    assert all(v.shape == (len(x),) and np.isnan(v).sum() >= skipped for v in found["per_query"].values())


@settings(max_examples=25)
@given(sets(levels=2))
def test_leave_one_out_is_evaluate(data):
    x, y, _ = data
    want = evaluate(x, y)
    assert evaluate_protocol(x, y) == evaluate_protocol(x, y, None, {}) == want
    assert evaluate_protocol(x, y, {"a": 1}, "leave-one-out") == want


@settings(max_examples=25)
@given(sets())
def test_query_gallery(data):
    x, y, rng = data
    part = np.where(rng.random(len(x)) < .4, "query", "gallery")
    part[:2] = "query", "gallery"
    y[:2] = 0  # at least one query has a positive
    q, g = (np.flatnonzero(part == p).tolist() for p in ("query", "gallery"))
    expected, skipped = per_query(scored(x), y[:, 0].tolist(), q, g)
    found = evaluate_protocol(x, y, pd.DataFrame(dict(part=part)), {"kind": "query-gallery"})
    close(found, {f"{m}_level0": v for m, v in expected.items()} | {"skipped_level0": skipped})


@settings(max_examples=25)
@given(sets())
def test_dyml_three_benchmarks(data):
    x, y, rng = data
    x, y = x.repeat(3, 1), y[:, 0].repeat(3).numpy()
    name, asked = np.repeat(["fine", "middle", "coarse"], len(x) // 3), rng.random(len(x)) < .5
    order = rng.permutation(len(x))  # benchmarks need not follow each other
    name[order[:3]], asked[order[:6]], y[order[:6]] = ["fine", "middle", "coarse"], True, 3
    for i, b in enumerate(("fine", "middle", "coarse")): name[order[3 + i]] = b
    labels = np.where(name[:, None] == np.array(["fine", "middle", "coarse"]), y[:, None], -1)
    expected = {}
    for l, b in enumerate(("fine", "middle", "coarse")):
        rows = np.flatnonzero(name == b)
        values, skipped = per_query(scored(x), y.tolist(), [i for i in rows if asked[i]], rows.tolist(), (1, 10, 20))
        expected |= {f"{m}_level{l}": v for m, v in values.items()} | {f"skipped_level{l}": skipped}
    means = {("mAP" if m == "AP" else m): sum(expected[f"{m}_level{l}"] for l in range(3)) / 3
             for m in ("AP", "ASI", "R@1", "R@10", "R@20")}
    found = evaluate_protocol(x, labels, dict(benchmark=name, query=asked), {"kind": "dyml"})
    assert set(found) == set(expected | means)
    close(found, expected | means)


@settings(max_examples=25)
@given(sets(classes=8, levels=3))
def test_dyml_one_gallery(data):
    x, y, _ = data
    y[:2] = 0
    found, expected = evaluate_protocol(x, y, protocol="dyml"), {}
    for l in range(3):
        values, skipped = per_query(scored(x), y[:, l].tolist(), range(len(x)), range(len(x)), (1, 10, 20))
        expected |= {f"{m}_level{l}": v for m, v in values.items()} | {f"skipped_level{l}": skipped}
    close(found, expected | {"mAP": np.mean([expected[f"AP_level{l}"] for l in range(3)]),
                             "ASI": np.mean([expected[f"ASI_level{l}"] for l in range(3)])})
    assert not any(k in found for k in ("H-AP", "NDCG"))


def test_dyml_agrees_with_the_function_of_the_metrics():
    torch.manual_seed(0)
    x, fine = torch.randn(90, 8), torch.arange(90) // 3
    y = torch.stack([fine, fine // 2, fine // 6], 1)
    found = evaluate_protocol(x, y, protocol="dyml", ks=(1, 2, 4, 8))  # other ks are added to the published ones
    assert {k: found[k] for k in dyml(x, y)} == dyml(x, y)
    assert found["R@4"] == pytest.approx(np.mean([found[f"R@4_level{l}"] for l in range(3)]))


def test_dyml_chosen_levels_metrics_and_queries():
    torch.manual_seed(0)
    x, y = torch.randn(30, 4), torch.full((30, 3), -1)
    for l in range(3): y[10 * l:10 * l + 10, l] = torch.arange(10) // 2
    meta = dict(benchmark=np.repeat(["fine", "middle", "coarse"], 10), query=np.arange(30) % 2 == 0)
    whole = evaluate_protocol(x, y, meta, "dyml", per_query=True)
    two = evaluate_protocol(x, y, meta, "dyml", levels=[0, 2])
    assert two["mAP"] == pytest.approx((whole["AP_level0"] + whole["AP_level2"]) / 2) and "AP_level1" not in two
    names = {f"{m}_level{l}" for m in ("R@1", "skipped") for l in range(3)}
    assert evaluate_protocol(x, y, meta, "dyml", metrics="R@1").keys() == {"R@1"} | names
    only = evaluate_protocol(x, y, meta, "dyml", metrics=("AP_level1", "R@1"))
    assert only["AP_level1"] == whole["AP_level1"] and "mAP" not in only and only["R@1"] == whole["R@1"]
    # 9 can be found, so k = 9
    assert whole["R@20"] == whole["R@10"] == 1. and whole["per_query"]["R@20_level2"].tolist() == [1.] * 5
    assert whole["per_query"]["AP_level1"].mean() == pytest.approx(whole["AP_level1"])


# random gallery

@settings(max_examples=40)
@given(st.lists(st.integers(-1, 5), min_size=1, max_size=30), st.integers(0, 99), st.integers(0, 9))
def test_draws(classes, seed, draw):
    gallery, query = random_gallery(torch.tensor(classes), seed, draw)
    known = [i for i, c in enumerate(classes) if c >= 0]
    assert sorted([*gallery.tolist(), *query.tolist()]) == known
    assert sorted(classes[i] for i in gallery) == sorted({classes[i] for i in known})
    again = random_gallery(torch.tensor(classes), seed, draw)
    assert gallery.tolist() == again[0].tolist() == sorted(gallery.tolist())
    assert query.tolist() == sorted(query.tolist())


def test_draws_are_even_and_differ():
    y = torch.tensor([0] * 4 + [1] * 2 + [2] + [-1])
    drawn = np.bincount(np.concatenate([random_gallery(y, 3, t)[0] for t in range(4000)]), minlength=8) / 4000
    assert drawn == pytest.approx([.25] * 4 + [.5] * 2 + [1., 0.], abs=.035)
    assert len({tuple(random_gallery(y, s, t)[0].tolist()) for s in range(5) for t in range(5)}) > 4


@settings(max_examples=25)
@given(sets(classes=5))
def test_random_gallery(data):
    x, y, _ = data
    y[:2] = 0
    classes, rows = y[:, 0].tolist(), []
    for t in range(3):
        g, q = (r.tolist() for r in random_gallery(y[:, 0], 7, t))
        rows.append(per_query(scored(x), classes, q, g)[0])
        assert per_query(scored(x), classes, q, g)[1] == 0  # each query has its positive
    found = evaluate_protocol(x, y, protocol={"kind": "random-gallery", "repeats": 3, "seed": 7})
    for m in ("AP", "R@1", "R@4"):
        close(found, {f"{m}_level0": np.mean([r[m] for r in rows]),
                      f"{m}_level0_std": np.std([r[m] for r in rows], ddof=1)})
    assert found["skipped_level0"] == sum(c == -1 or classes.count(c) == 1 for c in classes)


def test_random_gallery_seeds_and_single_draw():
    torch.manual_seed(0)
    x, y = torch.randn(60, 4), torch.arange(60) // 3
    run = lambda **f: evaluate_protocol(x, y, protocol={"kind": "random-gallery", **f}, ks=(1, 5), metrics="R@k")
    assert run() == run(seed=0, repeats=10) != run(seed=1)
    assert set(run(repeats=1)) == {"R@1_level0", "R@5_level0", "skipped_level0"}  # one draw has no spread
    assert run()["R@1_level0_std"] > 0


def test_random_gallery_reads_coarser_levels_too():
    torch.manual_seed(0)
    fine = torch.arange(60) // 3
    found = evaluate_protocol(torch.randn(60, 4), torch.stack([fine, fine // 4], 1),
                              protocol={"kind": "random-gallery", "repeats": 2})
    assert found["R@1_level1"] > found["R@1_level0"] and {"H-AP", "H-AP_std", "skipped_level1"} <= set(found)


# landmarks

def landmarks(n, queries, rng, most=6):
    part = np.array(["gallery"] * n)
    part[rng.choice(n, queries, replace=False)] = "query"
    ids = [f"{i:04x}" for i in rng.permutation(n)]
    gallery = [ids[i] for i in np.flatnonzero(part == "gallery")]
    matches = [" ".join(rng.permutation(gallery)[:rng.integers(0, most)]) if p == "query" else "" for p in part]
    usage = [rng.choice(["Public", "Private", "Ignored"]) if p == "query" else np.nan for p in part]
    first = int(np.flatnonzero(part == "query")[0])
    matches[first], usage[first] = gallery[0], "Public"
    return pd.DataFrame(dict(id=ids, part=part, matches=matches, usage=usage))


def landmarks_by_hand(x, meta, k):
    scores, row = scored(x), {i: n for n, i in enumerate(meta.id)}
    gallery, values = [n for n, p in enumerate(meta.part) if p == "gallery"], {}
    for q in [n for n, p in enumerate(meta.part) if p == "query"]:
        wanted = {row[m] for m in meta.matches[q].split()}
        if not wanted or meta.usage[q] == "Ignored": continue
        total = found = 0
        for r, i in enumerate(ranked(scores, q, gallery)[:k], 1):
            if i in wanted: found, total = found + 1, total + (found + 1) / r
        values[q] = total / min(len(wanted), k)
    return values


@settings(max_examples=25)
@given(sets(), st.sampled_from([1, 2, 5, 100]), st.sampled_from([torch.float32, torch.float64]))
def test_landmarks(data, k, dtype):
    x, _, rng = data
    meta = landmarks(len(x), len(x) // 2, rng)
    values = landmarks_by_hand(x, meta, k)
    parts = {f"_{p.lower()}": [v for q, v in values.items() if meta.usage[q] == p]
             for p in ("Public", "Private")} | {"": list(values.values())}
    found = evaluate_protocol(x.to(dtype), torch.full((len(x),), -1), meta, {"kind": "landmarks", "k": k},
                              per_query=True)
    per = found.pop("per_query")[f"mAP@{k}"]
    assert set(found) == {f"mAP@{k}{p}" for p, v in parts.items() if v} | {"skipped_level0"}
    close(found, {f"mAP@{k}{p}": sum(v) / len(v) for p, v in parts.items() if v})
    queries = [n for n, p in enumerate(meta.part) if p == "query"]
    assert found["skipped_level0"] == len(queries) - len(values)
    assert [q for q, v in zip(queries, per) if v == v] == list(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_landmarks_larger_than_a_tile(dtype):
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.standard_normal((1200, 16)), dtype=dtype)
    meta = landmarks(1200, 400, rng, 200)
    values = landmarks_by_hand(x, meta, 100)
    big = evaluate_protocol(x, torch.zeros(1200, dtype=torch.long), meta, {"kind": "landmarks", "k": 100})
    assert big["mAP@100"] == pytest.approx(sum(values.values()) / len(values),
                                           abs=1e-6 if dtype == torch.float32 else 1e-12)
    assert big == evaluate_protocol(x, torch.zeros(1200, dtype=torch.long), meta, "landmarks", max_memory="3MB")
    with pytest.raises(ValueError, match="too small"):
        evaluate_protocol(x, torch.zeros(1200, dtype=torch.long), meta, "landmarks", max_memory="50kB")


def test_landmarks_reads_no_labels():
    "Images of a landmark without coarser labels have -1 there, which is no tree, and changes nothing."
    meta = pd.DataFrame(INDEX)
    gaps = torch.stack([Y, torch.where(Y % 2 == 0, Y // 2, -1)], 1)
    with pytest.raises(ValueError, match="not a tree"): evaluate_protocol(X, gaps)
    assert evaluate_protocol(X, gaps, meta, "landmarks") == evaluate_protocol(X, Y, meta, "landmarks")
    with pytest.raises(ValueError, match="-1 means unknown"): evaluate_protocol(X, gaps - 1, meta, "landmarks")


def test_landmarks_twice_listed_counts_once_and_no_usage():
    x, meta = torch.eye(3), dict(id=["q", "a", "b"], part=["query", "gallery", "gallery"], matches=["b b", "", ""])
    assert evaluate_protocol(x, [0, 0, 0], meta, "landmarks") == {"mAP@100": .5, "skipped_level0": 0}
    assert evaluate_protocol(x, [0, 0, 0], meta | {"matches": ["b", None, None]}, "landmarks")["mAP@100"] == .5


# memory, devices, forms of input

def test_memory_limit_changes_nothing_and_counts_copies():
    torch.manual_seed(0)
    x, y = torch.randn(600, 64), torch.arange(600) // 3
    part = dict(part=np.array(["query", "gallery", "gallery"] * 200))
    whole = evaluate_protocol(x, y, part, "query-gallery")
    assert whole == evaluate_protocol(x, y, part, "query-gallery", max_memory="1MB")
    with pytest.raises(ValueError, match="queries and gallery alone take 1MB"):
        evaluate_protocol(x, y, part, "query-gallery", max_memory="100kB")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind",
                         ["leave-one-out", "query-gallery", "dyml", "random-gallery", "landmarks", "dyml, three"])
def test_every_tensor_stays_on_its_device(kind, dtype):
    "Embeddings on a GPU, labels and meta where they were: the values are those of the CPU."
    rng = np.random.default_rng(0)
    x, fine = torch.tensor(rng.standard_normal((90, 6)), dtype=dtype), torch.arange(90) // 6
    meta = landmarks(90, 30, rng)
    if "three" in kind: meta = meta.assign(benchmark=["fine", "middle", "coarse"] * 30, query=rng.random(90) < .5)
    args = torch.stack([fine, fine // 2, fine // 4], 1), meta, kind.split(",")[0]
    here = evaluate_protocol(x, *args)
    with TwoDevices(): there = evaluate_protocol(Far(x), *args)
    assert here == pytest.approx(there, abs=1e-12)


def test_views_where_rows_follow():
    x = torch.randn(10, 3)
    view, copy = protocols._take(x, torch.arange(2, 7)), protocols._take(x, torch.tensor([1, 3]))
    assert view.data_ptr() == x[2:].data_ptr() and torch.equal(view, x[2:7]) and torch.equal(copy, x[[1, 3]])
    assert protocols._memory({"max_memory": 1000}, x, view, copy)["max_memory"] == 1000 - 24


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_arrays_and_frames(dtype):
    torch.manual_seed(0)
    x, y, part = torch.randn(60, 4).to(dtype), torch.arange(60) // 6, ["query", "gallery"] * 30
    found = evaluate_protocol(x, y, {"part": part}, "query-gallery")
    frame = pd.DataFrame({"part": pd.Categorical(part)}, index=range(5, 65))  # the order of rows, not their names
    assert found == evaluate_protocol(x.float() if dtype != torch.float64 else x, y.numpy(), frame, "query-gallery")
    assert all(math.isfinite(v) for v in found.values())


def test_another_protocol_can_be_added():
    @PROTOCOLS.register("halves")
    def halves(emb, labels, meta, args, first=2): return {"value": float(len(emb) / first)}
    try:
        assert evaluate_protocol(torch.ones(4, 2), torch.zeros(4, dtype=torch.long),
                                 protocol={"kind": "halves", "first": 4}) == {"value": 1.}
    finally: del PROTOCOLS._items["halves"]


# errors

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) // 3
PART = ["query", "gallery", "gallery"] * 4
BENCH = dict(benchmark=np.repeat(["fine", "middle", "coarse"], 4), query=[True] * 12)
THREE = torch.stack([torch.arange(12) // 2] * 3, 1)
INDEX = dict(id=list("abcdefghijkl"), part=PART, matches=["b", "", ""] * 4)


def nan(i, x=X):
    x = x.clone()
    x[i] = torch.nan
    return x


@pytest.mark.parametrize("args, message", [
    ((nan(5), Y), r"row\(s\) 5 of 12"),
    ((nan(5), Y, {"part": PART}, "query-gallery"), r"row\(s\) 5 of 12"),
    ((nan(11), THREE, BENCH, "dyml"), r"row\(s\) 11 of 12"),
    ((nan(11), Y, INDEX, "landmarks"), r"row\(s\) 11 of 12"),
    ((nan(11), Y, None, "random-gallery"), r"row\(s\) 11 of 12"),
    ((X, Y[:5]), "12 embeddings but 5 labels"),
    ((X, THREE[:5], BENCH, "dyml"), "12 embeddings but 5 labels"),
    ((X, Y[:5], INDEX, "landmarks"), "12 embeddings but 5 labels"),
    ((X, Y, None, "query-gallery"), "reads the column 'part' of meta, which is not there. meta is empty"),
    ((X, Y, {"parts": PART}, "query-gallery"), "Did you mean 'parts'"),
    ((X, Y, {"part": PART[:4]}, "query-gallery"), "meta has 4 rows of 'part', but there are 12"),
    ((X, Y, {"part": [*PART[:11], "Gallery"]}, "query-gallery"), "'Gallery' in row 11. Did you mean 'gallery'"),
    ((X, Y, {"part": [*PART[:11], None]}, "query-gallery"), "'part' is missing in row 11"),
    ((X, Y, {"part": pd.array([*PART[:11], pd.NA])}, "query-gallery"), "'part' is missing in row 11"),
    ((X, Y, {"part": ["query"] * 12}, "query-gallery"), "no row of meta has part 'gallery'"),
    ((X, Y, {"part": ["gallery"] * 12}, "query-gallery"), "no row of meta has part 'query'"),
    ((X, torch.arange(12), {"part": PART}, "query-gallery"), "no query of 4 has a positive at level 0"),
    ((X, THREE, BENCH | {"benchmark": ["fien"] * 12}, "dyml"), "Did you mean 'fine'"),
    ((X, THREE, {"benchmark": BENCH["benchmark"]}, "dyml"), "the column 'query'"),
    ((X, THREE, BENCH | {"query": ["yes"] * 12}, "dyml"), "'query' is 'yes' in row 0"),
    ((X, THREE, BENCH | {"query": [True] * 4 + [False] * 4 + [True] * 4}, "dyml"),
     "benchmark 'middle' has 4 images and no query"),
    ((X, THREE, BENCH | {"benchmark": ["fine"] * 12}, "dyml"), "no row of meta belongs to benchmark 'middle'"),
    ((X, torch.arange(36).view(12, 3), BENCH, "dyml"), "benchmark 'fine': no query of 4 has a positive"),
    ((X, torch.arange(36).view(12, 3), None, "dyml"), "no query of 12 has a positive"),
    ((X, Y, BENCH, "dyml"), r"need labels \[N, 3\]"),
    ((X, THREE[:, :2], BENCH, "dyml"), "need labels of 3 levels, got 2"),
    ((X, torch.arange(12), None, "random-gallery"), "no class of the finest level has two images"),
    ((X, torch.full((12,), -1), None, "random-gallery"), "no class of the finest level has two images"),
    ((X, Y, None, {"kind": "random-gallery", "repeats": 0}), "'repeats' must be greater than or equal to 1"),
    ((X, Y, None, {"kind": "random-gallery", "seed": -1}), "seed must be"),
    ((X, Y, None, {"kind": "random-gallery", "sed": 1}), "Did you mean 'seed'"),
    ((X, Y, None, {"kind": "random-galery"}), "Did you mean 'random-gallery'"),
    ((X, Y, None, {"repeats": 1}), "has no 'kind'"),
    ((X, Y, INDEX | {"matches": ["b", "", ""] * 3 + ["zz", "", ""]}, "landmarks"),
     "query 'j' .row 9. matches 'zz', which is not in the gallery .1 such"),
    ((X, Y, INDEX | {"matches": ["a", "", ""] * 4}, "landmarks"), "matches 'a', which is not in the gallery"),
    ((X, Y, INDEX | {"matches": [""] * 12}, "landmarks"), "no query of 4 has a relevant image"),
    ((X, Y, INDEX | {"usage": ["Ignored"] * 12}, "landmarks"), "no query of 4 has a relevant image"),
    ((X, Y, INDEX | {"usage": ["public"] * 12}, "landmarks"), "Did you mean 'Public'"),
    ((X, Y, INDEX | {"id": list("abbdefghijkl")}, "landmarks"), "the id 'b' of gallery row 2 occurs twice"),
    ((X, Y, INDEX | {"matches": [None] * 12}, "landmarks"), "'matches' is missing in row 0"),
    ((X, Y, {"part": PART}, "landmarks"), "the column 'id'"),
    ((X, Y, INDEX, {"kind": "landmarks", "k": 0}), "'k' must be greater"),
])
def test_bad_input(args, message):
    with pytest.raises(ValueError, match=message): evaluate_protocol(*args)


@pytest.mark.parametrize("kw, message", [
    (dict(level=[0]), "Did you mean 'levels'"), (dict(query_embeddings=X), "up to the protocol"),
    (dict(ks=(13,)), "larger than the gallery"),
    (dict(protocol="random-gallery", per_query=True), "leave per_query out"),
    (dict(protocol="random-gallery", ks=(5,)), "larger than the gallery"),
    (dict(labels=THREE, protocol="dyml", meta=BENCH, metrics=("H-AP",)), "H-AP needs all levels"),
    (dict(protocol="dyml", ks=(50,)), "larger than the gallery"),
    (dict(labels=THREE, protocol="dyml", meta=BENCH, levels=[3]), "level 3 was asked for"),
])
def test_bad_arguments(kw, message):
    with pytest.raises(ValueError, match=message): evaluate_protocol(X, **{"labels": Y, **kw})
