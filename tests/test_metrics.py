"""hapnb.metrics against the original implementation's values, against brute force in float64, and at its limits."""
import json, math, subprocess, sys, textwrap, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hapnb.core import Relevance, shared_levels
from hapnb import retrieval as R
from hapnb.clustering import nmi
from hapnb.metrics import (Metric, choose_metrics, decomposability_gap, evaluate, make_retrieval, parse_metric,
                           recall_at_k, all_metrics)
from hapnb.protocols import dyml
from hapnb.retrieval import parse_memory

GOLDEN = json.loads((Path(__file__).parent / "golden_metrics.json").read_text())
KS = (1, 2, 4, 8)


def brute(scores, shared, rel, own, ks=KS):
    "Every metric straight from its definition; `own[q]` is the gallery row to remove, or -1."
    L, (Q, N) = shared["L"], scores.shape
    values, skipped = {}, {f"skipped_level{c}": 0 for c in range(L)}
    add = lambda k, v: values.setdefault(k, []).append(v)
    for q in range(Q):
        order = sorted((i for i in range(N) if i != own[q]), key=lambda i: (-scores[q, i], i))
        lv, rl = [int(shared["levels"][q, i]) for i in order], [float(rel[q, i]) for i in order]
        for c in range(L):
            pos = [r for r, l in enumerate(lv, 1) if l >= L - c]
            n = len(pos)
            if not n:
                skipped[f"skipped_level{c}"] += 1
                continue
            for k in ks: add(f"R@{k}_level{c}", float(pos[0] <= k))
            add(f"P@1_level{c}", float(pos[0] == 1))
            add(f"AP_level{c}", sum(i / r for i, r in enumerate(pos, 1)) / n)
            add(f"mAP@R_level{c}", sum(i / r for i, r in enumerate(pos, 1) if r <= n) / n)
            add(f"ASI_level{c}", sum(sum(r <= k for r in pos) / k for k in range(1, n + 1)) / n)
        R, best = sum(l > 0 for l in lv), sorted(lv, reverse=True)
        if not R: continue
        dcg = lambda ls: sum((2**l - 1) / math.log2(1 + r) for r, l in enumerate(ls, 1))
        match = lambda k: sum(min(lv[:k].count(m), best[:k].count(m)) for m in range(1, L + 1))
        add("NDCG", dcg(lv) / dcg(best))
        add("near-miss", next((l / max(L - 1, 1) for l in lv if l < L), 1.))
        add("ASI", sum(match(k) / k for k in range(1, R + 1)) / R)
        hranks = ((a + sum(min(a, b) for b in rl[:k])) / (k + 1) for k, a in enumerate(rl) if a)
        if sum(rl): add("H-AP", sum(hranks) / sum(rl))
    return {k: float(np.mean(v)) for k, v in values.items()} | skipped


def definition(emb, labels, q=None, q_labels=None, own=None, rel=Relevance("pop"), exclude=True):
    labels = labels if labels.ndim == 2 else labels[:, None]
    Q, Y = (emb, labels) if q is None else (q, q_labels if q_labels.ndim == 2 else q_labels[:, None])
    shared = shared_levels(Y, labels)
    scores = F.normalize(Q.double(), dim=1) @ F.normalize(emb.double(), dim=1).T
    scores = scores.numpy().round(12)  # equal in the formula, equal here
    if own is None: own = range(len(emb)) if q is None and exclude else [-1] * len(Q)
    return brute(scores, {"levels": shared.numpy(), "L": labels.shape[1]}, rel(shared, labels.shape[1]).numpy(), own)


def agree(found, expected, eps=1e-9):
    for k, v in expected.items(): assert found[k] == pytest.approx(v, abs=eps), k
    for k in set(found) - set(expected) - {"per_query"}: assert found[k] == 0., f"{k}: no query has a value"


# ---------------------------------------------------------------- the original implementation

def golden_input(case):
    r, n = np.random.RandomState(case["seed"]), case["B"]
    fine = np.arange(n) // case["m"]
    coarse = fine // case["c"]
    if case["kind"] == "random": x = r.standard_normal((n, case["D"]))
    else:
        C, G = r.standard_normal((fine.max() + 1, case["D"])), r.standard_normal((coarse.max() + 1, case["D"]))
        x = C[fine] + .6 * G[coarse] + .8 * r.standard_normal((n, case["D"]))
    x = x / np.sqrt((x**2).sum(1, keepdims=True))
    return torch.from_numpy(x), torch.from_numpy(np.stack([fine, coarse, coarse // 2], 1))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: c["id"])
@pytest.mark.parametrize("L", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden(case, L, dtype):
    emb, labels = golden_input(case)
    emb, labels, ref = emb.to(dtype), labels[:, :L], case["metrics"][f"L{L}"]
    found = evaluate(emb, labels, ks=(1, 2, 4, 10))
    for k, v in ref["values"].items(): assert found[k] == pytest.approx(v, abs=1e-6), k
    for o in ref["other"]:
        rel = Relevance("pop", o["alpha"]) if o["kind"] == "pop" else Relevance("map", weights=o["alpha"])
        assert evaluate(emb, labels, metrics="H-AP", relevance=rel)["H-AP"] == pytest.approx(o["H-AP"], abs=1e-6)


@pytest.mark.parametrize("case", GOLDEN["cases"][:2], ids=lambda c: c["id"])
def test_golden_relevance_up_to_scale(case):
    "The original divides the level by L-1, here by L: H-AP does not notice."
    _, labels = golden_input(case)
    counts = torch.stack([(shared_levels(labels)[0] == l).sum() for l in range(4)])
    table = Relevance("pop").table(counts[None])[0] * 3 / 2
    assert table.tolist() == pytest.approx(case["metrics"]["L3"]["relevance_row0"], abs=1e-9)


def ranking(levels, L):
    "A query and a gallery whose ranking shares these numbers of levels with it."
    angle = torch.linspace(.1, 1.3, len(levels), dtype=torch.float64)
    labels = torch.tensor([[0 if c >= L - l else 1 + i for c in range(L)] for i, l in enumerate(levels)])
    emb, query = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([[1., 0.]]).double()
    return emb, labels, query, torch.zeros(1, L, dtype=torch.long)


@pytest.mark.parametrize("levels,hap,ndcg,asi", [
    ((2,2,1,1,0,0), 1, 1, 1),
    ((2,1,2,1,0,0), .944444, .955034, .875),
    ((2,0,2,1,1,0), .813889, .913121, .729167),
    ((2,2,0,0,1,1), .877778, .967783, .791667),
    ((1,1,2,2,0,0), .805556, .759506, .416667),
    ((0,0,1,1,2,2), .438889, .542607, .208333)])
def test_known_two_levels(levels, hap, ndcg, asi):
    found = evaluate(*ranking(levels, 2))
    assert [found["H-AP"], found["NDCG"], found["ASI"]] == pytest.approx([hap, ndcg, asi], abs=1e-6)


@pytest.mark.parametrize("levels,hap", [((3,2,2,1,1,1,0), 1), ((2,3,1,2,1,1,0), .805556), ((3,3,2,2,1,0), 1),
                                        ((3,2,3,1,2,0), .972222), ((0,1,2,2,3,3), .636111)])
def test_known_three_levels(levels, hap):
    assert evaluate(*ranking(levels, 3))["H-AP"] == pytest.approx(hap, abs=1e-6)


def test_known_ap():
    found = evaluate(*ranking((1, 0, 1, 0, 1), 1))
    assert [found["AP_level0"], found["mAP@R_level0"]] == pytest.approx([.755556, .555556], abs=1e-6)
    assert found["H-AP"] == pytest.approx(found["AP_level0"], abs=1e-12)


# ---------------------------------------------------------------- brute force

@st.composite
def sets(draw, least=2):
    "Embeddings with many exact ties, labels that form a tree (some unknown), one to four levels."
    n, L = draw(st.integers(least, 40)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    parents = [rng.integers(0, draw(st.integers(1, 12)), 40) for _ in range(L - 1)]
    columns = [rng.integers(0, draw(st.integers(1, 15)), n)]
    for p in parents: columns.append(p[columns[-1]])
    labels = np.stack(columns, 1)
    if draw(st.booleans()):  # a row unknown from its finest level up to a random one
        for i in np.flatnonzero(rng.random(n) < .2): labels[i, :rng.integers(1, L + 1)] = -1
    if draw(st.booleans()): emb = rng.integers(-1, 2, (n, 2)) + np.array([0, .5])  # few directions: ties everywhere
    else: emb = rng.standard_normal((n, 5))
    return torch.from_numpy(emb), torch.from_numpy(labels)


relevances = st.sampled_from([Relevance("pop"), Relevance("pop", .2), Relevance("pop", 3.), Relevance("map")])


@settings(max_examples=120, deadline=None)
@given(sets(), relevances)
def test_definition_leave_one_out(data, rel):
    agree(evaluate(*data, relevance=rel), definition(*data, rel=rel))


@settings(max_examples=60, deadline=None)
@given(sets(), sets(least=1), st.booleans(), relevances)
def test_definition_rectangular(gallery, queries, inside, rel):
    (emb, labels), (q, q_labels) = gallery, queries
    L = min(labels.shape[1], q_labels.shape[1])
    if emb.shape[1] != q.shape[1]:
        q = torch.randn(len(q), emb.shape[1], dtype=q.dtype, generator=torch.Generator().manual_seed(0))
    # two random trees do not fit together: queries take the labels of random gallery rows, some of none
    pick = torch.from_numpy(np.random.default_rng(len(q)).integers(0, len(emb), len(q)))
    labels, q_labels = labels[:, :L], labels[pick, :L].clone()
    q_labels[::5] = 999
    own = None
    if inside:
        own = [int(p) if i % 5 else -1 for i, p in enumerate(pick)]
        q = emb[pick]
    found = evaluate(emb, labels, q, q_labels, self_index=own, relevance=rel)
    agree(found, definition(emb, labels, q, q_labels, own, rel))


@settings(max_examples=40, deadline=None)
@given(sets())
def test_float32_ties_and_packed_keys(data):
    "Scores that float32 holds exactly: the fast path must agree with the definition, ties included."
    emb, labels = data
    axis = torch.eye(4)[torch.from_numpy(np.random.default_rng(len(emb)).integers(0, 4, len(emb)))]
    sign = torch.where(torch.arange(len(emb)) % 3 == 0, -1., 1.)[:, None]
    agree(evaluate(axis * sign, labels), definition(axis * sign, labels), 1e-9)


@settings(max_examples=30, deadline=None)
@given(sets(), st.booleans())
def test_self_kept(data, double):
    emb, labels = data
    metrics = ["AP", "R@1", "ASI", "NDCG", "mAP@R", "near-miss"]
    found = evaluate(emb, labels, exclude_self=False, ks=(1,), metrics=metrics)
    wanted = lambda k: k[:2] not in ("R@", "P@", "H-") or k.startswith("R@1_")
    agree(found, {k: v for k, v in definition(emb, labels, exclude=False).items() if wanted(k)})


@settings(max_examples=40, deadline=None)
@given(sets())
def test_flat_hap_is_ap_and_map_is_the_mean(data):
    emb, labels = data
    flat = evaluate(emb, labels[:, 0])
    assert flat["H-AP"] == pytest.approx(flat["AP_level0"], abs=1e-12)
    assert flat["ASI"] == pytest.approx(flat["ASI_level0"], abs=1e-12)
    L = labels.shape[1]
    known = emb[(labels >= 0).all(1)], labels[(labels >= 0).all(1)]
    if len(known[0]) < 3: return
    w = np.arange(1, L + 1) / sum(range(1, L + 1))  # coarsest first
    m = evaluate(*known, relevance=Relevance("map", weights=tuple(w)), per_query=True, metrics=["AP", "H-AP"])
    m = m["per_query"]
    all_levels = ~np.isnan(m["AP_level0"])
    # with the query itself counted in the relevance the identity is exact only for weights corrected by (c-1)/c
    c = shared_levels(known[1])
    for q in np.flatnonzero(all_levels):
        n = np.array([int((c[q] >= t).sum()) for t in range(1, L + 1)])
        v = w * (n - 1) / n
        mean = sum(v[t - 1] * m[f"AP_level{L - t}"][q] for t in range(1, L + 1)) / v.sum()
        assert m["H-AP"][q] == pytest.approx(mean, abs=1e-12)


# ---------------------------------------------------------------- invariances

def tree(n, seed=0, dim=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    fine = torch.randint(0, max(n // 5, 1), (n,), generator=g)
    return torch.randn(n, dim, generator=g, dtype=dtype), torch.stack([fine, fine % 7, fine % 7 % 3], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_limit_changes_no_bit(dtype):
    emb, labels = tree(1500, dtype=dtype)
    emb[::50] = emb[3]
    free = evaluate(emb, labels, per_query=True)
    for names in ("R@k", "AP_level0"):
        some = evaluate(emb, labels, metrics=names)
        assert some == evaluate(emb, labels, metrics=names, max_memory="10MB" if dtype == torch.float64 else "5MB")
        assert all(free[k] == pytest.approx(v, abs=1e-12) for k, v in some.items())
    for limit in ("100MB", "16MB", "14MB" if dtype == torch.float64 else "7MB"):
        tight = evaluate(emb, labels, max_memory=limit, per_query=True)
        each, own = tight.pop("per_query"), free["per_query"]
        for k, v in own.items(): assert np.array_equal(v, each[k], equal_nan=True), (k, limit)
        assert {k: v for k, v in free.items() if k != "per_query"} == tight


@pytest.mark.parametrize("names", [
    "R@k",
    "R@1",
    "P@1",
    "AP",
    ["AP_level0"],
    ["ASI_level1", "R@4_level2"],
    "mAP@R",
    "H-AP",
    "ASI",
    "NDCG",
    "near-miss"])
def test_selection_gives_the_same_values(names):
    emb, labels = tree(300)
    emb[::7] = emb[0]
    full, some = evaluate(emb, labels), evaluate(emb, labels, metrics=names)
    assert some and all(full[k] == pytest.approx(v, abs=1e-12) for k, v in some.items())
    asked = names if isinstance(names, list) else [names]
    wanted = {k for k in full if k in asked or k.split("_level")[0] in asked or ("R@k" in asked and k[:2] == "R@")}
    assert {k for k in some if "skipped" not in k} == wanted


def test_order_scale_and_class_numbers_do_not_matter():
    emb, labels = tree(200, dtype=torch.float64)
    full, p = evaluate(emb, labels), torch.randperm(200, generator=torch.Generator().manual_seed(1))
    renamed = lambda l: torch.randperm(1000, generator=torch.Generator().manual_seed(l))[labels[:, l]]
    new = torch.stack([renamed(l) for l in range(3)], 1)
    agree(evaluate(emb[p] * 7, new[p]), full, 1e-12)


def test_length_of_embeddings_does_not_matter():
    "Not even where their squares leave the range of float32."
    emb, labels = tree(150)
    scale = torch.tensor([1e-30, 1., 1e30])[torch.arange(150) % 3][:, None]
    agree(evaluate(emb * scale, labels), evaluate(emb, labels), 1e-6)
    assert nmi(emb * scale, labels) == pytest.approx(nmi(emb, labels))
    assert nmi(emb.double() * scale.double()**5, labels) == pytest.approx(nmi(emb, labels))


@pytest.mark.parametrize("weights", [(1e308, 1e308), (1e-320, 0), (1e-30, 1e-30)])
def test_weights_beyond_float32_are_refused(weights):
    with pytest.raises(ValueError, match="between 1e-20 and 1e20"): Relevance("map", weights=weights)


def test_per_query_in_the_given_order():
    emb, labels = tree(120, dtype=torch.float64)
    full = evaluate(emb, labels, per_query=True)
    for q in (0, 17, 119):
        one = evaluate(emb, labels, emb[q:q + 1], labels[q:q + 1], self_index=[q])
        for k, v in full["per_query"].items():
            assert (np.isnan(v[q]) and one[k] == 0) or v[q] == pytest.approx(one[k], abs=1e-12), k
    means = {k: np.nanmean(v) for k, v in full["per_query"].items()}
    assert all(means[k] == pytest.approx(full[k], abs=1e-12) for k in means)


def test_perfect_and_single_images():
    labels = torch.stack([torch.arange(24) // 3, torch.arange(24) // 6, torch.arange(24) // 12], 1)
    perfect = torch.cat([F.one_hot(labels[:, l]).double() * 2.**l for l in range(3)], 1)
    for k, v in evaluate(perfect, labels).items(): assert v == (0 if "skipped" in k else pytest.approx(1, abs=1e-12)), k
    alone = evaluate(torch.randn(5, 3), torch.arange(5))
    assert alone["skipped_level0"] == 5 and all(v == 0 for k, v in alone.items() if "skipped" not in k)
    unknown = evaluate(torch.randn(5, 3), torch.full((5,), -1))
    assert unknown["skipped_level0"] == 5


def test_duplicates_are_found_not_dropped():
    "Dropping the first neighbour instead of the query would lose a true neighbour here."
    emb = torch.eye(6).repeat(3, 1)
    m = evaluate(emb, torch.arange(6).repeat(3))
    assert m["AP_level0"] == m["R@1_level0"] == m["H-AP"] == 1
    assert recall_at_k(emb, torch.arange(6).repeat(3))["R@1_level0"] == 1


@pytest.mark.parametrize("n", [5, 33, 100, 257])
def test_identical_rows_tie_by_index(n):
    "All images equal: the order is the gallery's, although the scores come from a blocked matrix product."
    g = torch.Generator().manual_seed(n)
    emb, labels = torch.randn(1, 37, generator=g).expand(n, -1), torch.randint(0, 3, (n,), generator=g)
    found = evaluate(emb, labels, ks=(1,), metrics=["AP", "R@1"])
    expected = []
    for q in range(n):
        pos = [r for r, i in enumerate([i for i in range(n) if i != q], 1) if labels[i] == labels[q]]
        if pos: expected.append((sum(i / r for i, r in enumerate(pos, 1)) / len(pos), pos[0] == 1))
    assert (found["AP_level0"], found["R@1_level0"]) == pytest.approx(tuple(np.mean(expected, 0)), abs=1e-9)
    assert evaluate(emb, labels, metrics="R@1")["R@1_level0"] == found["R@1_level0"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    emb, labels = tree(100)
    agree(evaluate(emb.to(dtype), labels), evaluate(emb.to(dtype).float(), labels), 1e-12)


def test_the_same_values_without_numpy(monkeypatch):
    "What a GPU would run, run here: the same values."
    emb, labels = tree(300)
    emb[::9] = emb[0]
    labels[7] = torch.tensor([-1, -1, 2])
    a, b = evaluate(emb, labels, per_query=True), evaluate(emb, labels, metrics="R@k")
    monkeypatch.setattr(R, "_numpy_here", lambda x: False)
    c, d = evaluate(emb, labels, per_query=True), evaluate(emb, labels, metrics="R@k")
    for k, v in a["per_query"].items(): assert np.allclose(v, c["per_query"][k], atol=1e-12, equal_nan=True), k
    assert b == d


def test_threads_change_nothing():
    emb, labels = tree(700)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = evaluate(emb, labels)
        torch.set_num_threads(2)
        assert evaluate(emb, labels) == pytest.approx(one, abs=1e-6)
    finally: torch.set_num_threads(before)


# ---------------------------------------------------------------- counted, sorted, recall alone, and on a GPU

COUNT = dict.fromkeys((torch.float32, torch.float64), math.inf)
SORT = dict.fromkeys((torch.float32, torch.float64), -1)


def larger(seed, n=None):
    "Up to 400 images in few directions: ties inside and across chunks of 64, some labels unknown, indices mixed."
    rng = np.random.default_rng(seed)
    n = n or int(rng.integers(2, 400))
    fine = rng.integers(0, max(n // rng.integers(1, 40), 1), n)
    labels = np.stack([fine, fine % 9, fine % 3], 1)
    labels[rng.random(n) < .1, 0] = -1
    emb = rng.integers(-1, 2, (n, 3)) + np.array([0, 0, .5]) if seed % 2 else rng.standard_normal((n, 8))
    return torch.from_numpy(emb), torch.from_numpy(labels)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]), st.integers(1, 3), st.booleans())
def test_counting_and_sorting_give_the_same_integers(seed, dtype, least, exclude):
    emb, labels = larger(seed)
    for block in make_retrieval(emb.to(dtype), labels, exclude_self=exclude).blocks(96):
        for x, y in zip(R.ranks_by_count(block, least), R.ranks_by_sort(block, least)):
            assert x.dtype == y.dtype and torch.equal(x, y)


@settings(max_examples=60, deadline=None)
@given(sets(), relevances)
def test_counting_follows_the_definition(data, rel):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(R, "_COUNT", COUNT)
        agree(evaluate(*data, relevance=rel), definition(*data, rel=rel))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_recall_alone_equals_recall_from_lists(seed, dtype, exclude):
    "More than one chunk, ties across chunks, k up to the gallery."
    emb, labels = larger(seed)
    n = len(emb) - exclude
    kw = dict(ks=sorted({1, min(3, n), max(n // 2, 1), n}), exclude_self=exclude, per_query=True)
    emb = emb.to(dtype)
    alone, lists = evaluate(emb, labels, metrics=["R@k", "P@1"], **kw), evaluate(emb, labels, **kw)["per_query"]
    assert len(alone["per_query"]) >= 6
    for k, v in alone["per_query"].items(): assert np.array_equal(v, lists[k], equal_nan=True), k


@settings(max_examples=25, deadline=None)
@given(sets(), st.integers(1, 6))
def test_recall_alone_follows_the_definition(data, k):
    emb, labels = data
    ks = (1, min(k, len(emb) - 1))
    skipped = {m: v for m, v in definition(emb, labels).items() if m[:2] == "sk"}
    recalls = {f"R@{j}_level{c}": recall_by_hand(emb, labels, c, j) for j in ks for c in range(labels.shape[1])}
    known = {m: v for m, v in recalls.items() if v is not None}
    agree(evaluate(emb, labels, ks=ks, metrics="R@k"), skipped | known)


def recall_by_hand(emb, labels, c, k):
    "R@k from scores, a stable sort and nothing else; None where no query has a positive."
    x = F.normalize(emb.double(), dim=1)
    scores, found = (x @ x.T).numpy().round(12), []
    for q in range(len(x)):
        order = sorted((i for i in range(len(x)) if i != q), key=lambda i: (-scores[q, i], i))
        hit = [bool(labels[i, c] == labels[q, c]) and int(labels[q, c]) >= 0 for i in order]
        if any(hit): found.append(any(hit[:k]))
    return float(np.mean(found)) if found else None


@pytest.mark.parametrize("n", [700, 1000])
def test_collapsed_embeddings_are_ordered_by_gallery_index(n, monkeypatch):
    "All rows equal: every score ties with every other, and the gallery index decides alone."
    g = torch.Generator().manual_seed(n)
    emb, fine = torch.randn(1, 24, generator=g).expand(n, -1), torch.randperm(n, generator=g) // 4
    best = []
    for q in range(n):
        i = int(next(j for j in (fine == fine[q]).nonzero()[:, 0] if j != q))
        best.append(i - (i > q) + 1)
    for k in (1, 8, 300):
        recall = evaluate(emb, fine, ks=k, metrics="R@k")[f"R@{k}_level0"]
        assert recall == pytest.approx(np.mean([b <= k for b in best]), abs=1e-12)
    found = []
    for c in (COUNT, SORT):
        monkeypatch.setattr(R, "_COUNT", c)
        found.append(evaluate(emb, fine))
    assert found[0] == found[1]


@pytest.mark.parametrize("classes,metrics,ways", [
    (1000, "AP", {"ranks_by_count"}),
    (1000, None, {"ranks_by_count"}),
    (2, "AP", {"ranks_by_sort"}),
    (1000, "R@k", set())])
def test_few_positives_are_counted_and_many_sorted(classes, metrics, ways, monkeypatch):
    took = set()
    for name in ("ranks_by_count", "ranks_by_sort"):
        def ranked(*args, name=name, old=getattr(R, name)):
            took.add(name)
            return old(*args)
        monkeypatch.setattr(R, name, ranked)
    evaluate(torch.randn(4000, 8), torch.arange(4000) % classes, metrics=metrics)
    assert took == ways


GPU = torch.device("meta")  # stands for a GPU: no build of torch refuses it


class Far(torch.Tensor):
    "A tensor that says it lives on another device; its numbers are in `here`."
    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=GPU)

    def __init__(self, here): self.here = here

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return on_two_devices(func, args, kwargs or {})


class TwoDevices(TorchDispatchMode):
    "Inside, tensors made for or moved to `GPU` are `Far`."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return on_two_devices(func, args, kwargs or {})


def on_two_devices(func, args, kwargs):
    "Run `func` on the CPU with CUDA's rules: only copies, numbers and indices into a far tensor may mix devices."
    name, tensors = str(func), [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    far, near = ([t for t in tensors if isinstance(t, Far) == f] for f in (True, False))
    to, copy = kwargs.get("device"), "copy" in name
    if far and not copy and any(t.ndim for t in near):
        indexing = ("index", "index_put", "index_put_", "_index_put_impl_")
        index = name.split(".")[1] in indexing and isinstance(args[0], Far)
        values = [t for t in args[2:3] if isinstance(t, torch.Tensor) and t.ndim and not isinstance(t, Far)]
        if not index or values: raise RuntimeError(f"{name}: tensors on two devices")
    inner = lambda x: x.here if isinstance(x, Far) else torch.device("cpu") if isinstance(x, torch.device) else x
    out = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    there = to is not None and torch.device(to) == GPU
    if copy: wrap = there if to is not None else isinstance(args[0], Far)
    else: wrap = bool(far) or there
    if not wrap or "_local_scalar_dense" in name: return out
    known = {id(t.here): t for t in far}  # in place: the same tensor again
    return tree_map(lambda x: (known[id(x)] if id(x) in known else Far(x)) if isinstance(x, torch.Tensor) else x, out)


def test_two_devices_are_kept_apart():
    "The test's own tool: it must refuse what CUDA refuses."
    with TwoDevices():
        x, y = Far(torch.arange(4.)), torch.arange(4)
        assert x.device == GPU and (x + 1).device == GPU and x.cpu().device == y.to("cpu").device == torch.device("cpu")
        assert torch.equal(x[y].cpu(), torch.arange(4.)) and torch.zeros(2, device=GPU).device == GPU
        for wrong in (lambda: x + y, lambda: torch.arange(4)[x.long()], lambda: torch.where(y > 0, x, y),
                      lambda: x.gather(0, y)):
            with pytest.raises(RuntimeError, match="two devices"): wrong()
        with pytest.raises(Exception): x.numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metrics", [None, "R@k", "AP_level0"])
@pytest.mark.parametrize("count", [COUNT, SORT], ids=["count", "sort"])
def test_every_tensor_stays_on_its_device(dtype, metrics, count, monkeypatch):
    "Embeddings on a GPU: every step runs there or asks for a copy, and the values are those of the CPU."
    monkeypatch.setattr(R, "_COUNT", count)
    emb, labels = tree(300, dtype=dtype)
    emb[::9] = emb[0]
    labels[7] = torch.tensor([-1, -1, 2])
    inside = dict(self_index=range(50), metrics=metrics)
    here = [evaluate(emb, labels, metrics=metrics), evaluate(emb, labels, emb[:50], labels[:50], **inside)]
    with TwoDevices():
        there = [evaluate(Far(emb), labels, metrics=metrics),
                 evaluate(Far(emb), Far(labels), Far(emb[:50]), labels[:50], **inside)]
    for a, b in zip(here, there): assert a == pytest.approx(b, abs=1e-12)


def test_arrays_and_one_level():
    emb, labels = tree(60)
    assert evaluate(emb.numpy(), labels[:, 0].numpy()) == evaluate(emb, labels[:, :1])
    names = ["R@1_level0", "R@3_level0", "P@1_level0", "AP_level0", "mAP@R_level0", "ASI_level0"]
    over_all = ["H-AP", "ASI", "NDCG", "near-miss", "skipped_level0"]
    assert list(evaluate(emb, labels[:, 0], ks=(1, 3))) == [*names, *over_all]


# ---------------------------------------------------------------- the other three

def test_recall_through_faiss():
    emb, labels = tree(500)
    q, y = tree(80, seed=3)
    assert recall_at_k(emb, labels) == pytest.approx(evaluate(emb, labels, metrics="R@k"), abs=1e-12)
    ours = evaluate(emb, labels, q, y, ks=(1, 20), metrics="R@k")
    assert recall_at_k(emb, labels, q, y, ks=(1, 20)) == pytest.approx(ours, abs=1e-12)


def test_dyml():
    emb, labels = tree(90)
    one = dyml(emb, labels, ks=(1, 5))
    full = evaluate(emb, labels, ks=(1, 5))
    for k in ("ASI", "R@1", "R@5"):
        assert one[k] == pytest.approx(np.mean([full[f"{k}_level{l}"] for l in range(3)]), abs=1e-9)
    assert one["mAP"] == pytest.approx(np.mean([full[f"AP_level{l}"] for l in range(3)]), abs=1e-9)
    rows = torch.arange(0, 90, 4)
    part = lambda y: dict(embeddings=emb, labels=y, query_embeddings=emb[rows], query_labels=y[rows])
    three = [part(labels[:, l]) for l in range(3)]
    with_rows = [dict(b, self_index=rows) for b in three]
    assert dyml(benchmarks=three) == dyml(benchmarks=dict(zip(("fine", "middle", "coarse"), with_rows)))
    with pytest.raises(ValueError, match="benchmark 1: query 0 .* no gallery row"):
        dyml(benchmarks=[three[0], dict(three[1], query_embeddings=emb[rows] + 1), three[2]])
    with pytest.raises(ValueError, match="either"): dyml()


def test_decomposability_gap():
    emb, labels = tree(120)
    batches = torch.arange(120).view(6, 20).tolist()
    g = decomposability_gap(emb, labels, batches, level=1)
    inside = np.mean([evaluate(emb[b], labels[b])["AP_level1"] for b in batches])
    gap = inside - evaluate(emb, labels)["AP_level1"]
    assert (g["batch_ap"], g["gap"]) == pytest.approx((inside, gap), abs=1e-12)
    assert decomposability_gap(emb, labels, [range(120)])["gap"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="no batch"): decomposability_gap(emb, labels, [[3]])


def test_nmi():
    emb, labels = tree(300)
    for backend in ("faiss", "sklearn"):
        a, b = (nmi(emb, labels, level=1, seed=4, backend=backend) for _ in range(2))
        assert a == b and 0 <= a <= 1
    assert nmi(F.one_hot(labels[:, 1]).float(), labels, level=1, backend="sklearn") == pytest.approx(1)
    with pytest.raises(ValueError, match="Did you mean 'faiss'"): nmi(emb, labels, backend="fais")


# ---------------------------------------------------------------- bad input

E, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) // 4


def spoiled(row, value):
    x = E.clone()
    x[row] = value
    return x


@pytest.mark.parametrize("args,kw,words", [
    ((spoiled(3, torch.nan), Y), {}, r"row\(s\) 3"),
    ((spoiled(5, 0.), Y), {}, r"row\(s\) 5"),
    ((E, Y[:5]), {}, "12 embeddings but 5"),
    ((E.long(), Y), {}, "floats"),
    ((E[:, 0], Y), {}, "shape"),
    ((E[:0], Y[:0]), {}, "gallery is empty"),
    ((E[:1], Y[:1]), {}, "gallery is empty"),
    ((E, torch.stack([Y, torch.arange(12)], 1)), {}, "not a tree"),
    ((E, Y), dict(ks=(1, 12)), "k=12 is larger than the gallery"),
    ((E, Y), dict(metrics="R@12"), "k=12 is larger"),
    ((E, Y), dict(ks=(0, 1)), "whole numbers"),
    ((E, Y), dict(ks=(1.5,)), "whole numbers"),
    ((E, Y), dict(ks=(torch.nan,)), "whole numbers"),
    ((E, Y), dict(ks="5"), "whole numbers"),
    ((E, Y), dict(levels=[0.5]), "each of levels"),
    ((E, Y, E, Y), dict(self_index=[.5] * 12), "self_index"),
    ((E, Y), dict(metrics="mAP_R"), "Did you mean 'mAP@R"),
    ((E, Y), dict(metrics=["AP_level3"]), "Did you mean 'AP_level0'"),
    ((E, Y), dict(levels=[1]), "level 1"),
    ((E, Y), dict(max_memory="plenty"), "cannot read"),
    ((E, Y), dict(max_memory=0), "cannot read"),
    ((E, Y), dict(max_memory="1kB"), "too small"),
    ((E, Y), dict(relevance="pup"), "Did you mean 'pop'"),
    ((E, Y, E), {}, "belong together"),
    ((E, Y, E[:, :2], Y), {}, "dimensions"),
    ((E, Y, E, torch.stack([Y, Y], 1)), {}, "level"),
    ((E, Y, E[:0], Y[:0]), {}, "no queries"),
    ((E, Y, E, Y), dict(self_index=[0]), "self_index"),
    ((E, Y), dict(self_index=range(12)), "exclude_self"),
    ((E, Y), dict(device="gpu7"), "device"),
    ((E, Y.float()), {}, "integers"),
    ((E, torch.stack([Y, Y * 0], 1), E, torch.stack([Y, Y], 1)), {}, "together are not a tree")])
def test_bad_input(args, kw, words):
    with pytest.raises(ValueError, match=words): evaluate(*args, **kw)


@pytest.mark.parametrize("labels", [["a"] * 12, np.array(["2020-01-01"] * 12, dtype="datetime64[D]"), np.array(3),
                                    torch.tensor(3), np.array([None] * 12), Y.to(torch.complex64)])
def test_labels_that_are_no_integers_are_refused(labels):
    with pytest.raises(ValueError, match="^labels must"): evaluate(E, labels)


@pytest.mark.parametrize("emb", [[["a", "b"]] * 12, np.full((12, 2), np.datetime64("2020-01-01")), np.array(3.), None,
                                 torch.tensor(3.), np.full((12, 2), None), E.to(torch.complex64), E.to_sparse()])
def test_embeddings_that_are_no_matrix_of_floats_are_refused(emb):
    with pytest.raises(ValueError, match="^embeddings must"): evaluate(emb, Y)


@pytest.mark.parametrize("turned", [lambda x: x.astype(">f4"), lambda x: np.ascontiguousarray(x[::-1])[::-1],
                                    np.asfortranarray, lambda x: x.tolist()])
def test_arrays_of_any_layout_give_the_same_values(turned):
    assert evaluate(turned(E.numpy()), Y) == evaluate(E, Y)


def test_a_query_set_and_exclude_self_contradict_each_other():
    for f in (evaluate, recall_at_k):
        for queries in (E, E.clone(), E[:5]):
            with pytest.raises(ValueError, match="self_index"): f(E, Y, queries, Y[:len(queries)], exclude_self=True)
        with pytest.raises(ValueError, match="self_index.*or leave the query set out"): f(E, Y, E, Y)
        with pytest.raises(ValueError, match="exclude_self must be True or False"): f(E, Y, exclude_self="no")
        assert f(E, Y, E, Y, exclude_self=False)["R@1_level0"] == 1
    with pytest.raises(ValueError, match="self_index keeps queries out"):
        evaluate(E, Y, E, Y, self_index=range(12), exclude_self=False)
    assert evaluate(E, Y, E, Y, self_index=range(12), exclude_self=True) == pytest.approx(evaluate(E, Y), abs=1e-6)


@pytest.mark.parametrize("self_index", [[True] * 12, ["a"] * 12, [1j] * 12, 3, [12] + [0] * 11, [-2] + [0] * 11])
def test_self_index_that_holds_no_rows_is_refused(self_index):
    with pytest.raises(ValueError, match="self_index must hold one gallery row"):
        evaluate(E, Y, E, Y, self_index=self_index)


# ---------------------------------------------------------------- names

def test_names_of_metrics_are_read_and_written():
    for m in all_metrics(range(3), (1, 5, 10)): assert parse_metric(str(m)) == m
    assert Metric("R", 5, 1) == parse_metric("R@5_level1") and str(parse_metric("R@k")) == "R"


@pytest.mark.parametrize("metrics,words", [
    ([], "metrics is empty"), ((), "metrics is empty"), ("", "unknown metric ''"), ("P@2", "unknown metric"),
    (["AP", 5], "unknown metric 5"),
    ("AP_level-1", "unknown metric"), ("H-AP_level0", "is not among"), ("R@k_level2", "is not among"),
    ("NDGC", "Did you mean 'NDCG'"), ("AAP_level0", "Did you mean 'AP_level0'"), ("R@0", "whole numbers")])
def test_metrics_that_do_not_exist_are_refused(metrics, words):
    with pytest.raises(ValueError, match=words): evaluate(E, Y, metrics=metrics)


def test_a_request_for_r_at_k_needs_ks():
    with pytest.raises(ValueError, match="'R@k' is not among"): choose_metrics("R@k", [0], ())


def others(emb, labels):
    "The other public functions, called with the same input."
    part = dict(embeddings=emb, labels=labels, query_embeddings=emb, query_labels=labels)
    return [lambda: recall_at_k(emb, labels), lambda: dyml(emb, labels), lambda: nmi(emb, labels),
            lambda: decomposability_gap(emb, labels, [[0, 1]]), lambda: dyml(benchmarks=[part])]


@pytest.mark.parametrize("emb,labels,words", [
    (spoiled(3, torch.nan), Y, r"NaN or infinite values in row\(s\) 3"),
    (spoiled(4, torch.inf), Y, r"row\(s\) 4"),
    (spoiled(5, 0.), Y, r"row\(s\) 5"),
    (E, Y[:5], "12 .* but 5"),
    (E.long(), Y, "must be floats, got torch.int64"),
    (E[:, 0], Y, "shape"),
    (E[:0], Y[:0], "gallery is empty"),
    (E, Y.float(), "integers"),
    (E, torch.stack([Y, torch.arange(12)], 1), "not a tree|one label column")])
def test_bad_input_elsewhere(emb, labels, words):
    for call in others(emb, labels):
        with pytest.raises(ValueError, match=words): call()


@pytest.mark.parametrize("call,words", [
    (lambda: recall_at_k(E, Y, ks=(1, 12)), "k=12 is larger than the gallery: 11 images"),
    (lambda: recall_at_k(E, Y, E[:, :2], Y), "4 dimensions, query_embeddings 2"),
    (lambda: recall_at_k(E, Y, spoiled(2, torch.nan), Y), r"query_embeddings: NaN .* row\(s\) 2"),
    (lambda: recall_at_k(E[:1], Y[:1]), "gallery is empty"),
    (lambda: recall_at_k(E, Y, E.long(), Y), "query_embeddings must be floats"),
    (lambda: recall_at_k(E, Y, levels=1), "level 1"),
    (lambda: dyml(E, Y, ks=(1, 12)), "k=12 is larger"),
    (lambda: dyml(benchmarks=[]), "benchmarks is empty"),
    (lambda: dyml(E[:1], Y[:1]), "gallery is empty"),
    (lambda: dyml(benchmarks=[dict(embeddings=E, labels=Y, query_embeddings=E[:, :2], query_labels=Y,
                                   self_index=range(12))]), "dimensions"),
    (lambda: dyml(E, Y, ks=0), "whole numbers from 1"),
    (lambda: recall_at_k(E, Y, levels=[]), "levels are empty"),
    (lambda: nmi(E, Y, clusters=2.5), "clusters"),
    (lambda: nmi(E, Y, level=2), "level 2"),
    (lambda: nmi(E, Y, clusters=0), "0 clusters"),
    (lambda: nmi(E, Y, clusters=13), "13 clusters"),
    (lambda: nmi(E, torch.full((12,), -1)), "unknown"),
    (lambda: decomposability_gap(E, Y, [[0, 1]], level=3), "level 3"),
    (lambda: decomposability_gap(E, Y, [[0, 1], [3, 12]]), "row 12, but there are 12"),
    (lambda: decomposability_gap(E, Y, [[-1, 1]]), "row -1"),
    (lambda: evaluate(E, Y, spoiled(2, torch.nan), Y), r"query_embeddings: NaN .* row\(s\) 2"),
    (lambda: evaluate(E, Y, E.int(), Y), "query_embeddings must be floats"),
    (lambda: evaluate(E, Y, ks=(1, 13), exclude_self=False), "12 images can be found"),
    (lambda: evaluate(E, Y, E[:1], Y[:1], ks=13), "k=13")])
def test_bad_input_of_the_others(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_default_ks_on_a_small_gallery():
    m = evaluate(E[:5], Y[:5])
    assert m["R@8_level0"] == m["R@4_level0"] == 1


@pytest.mark.parametrize("text,size", [
    ("2GB", 2 * 10**9),
    ("1.5GiB", 1610612736),
    (10**6, 10**6),
    ("300 mb", 3 * 10**8),
    ("5", 5)])
def test_parse_memory(text, size): assert parse_memory(text) == size


# ---------------------------------------------------------------- memory

@pytest.mark.parametrize("classes,limit,metrics,tied", [
    (4000, 60, None, False),
    (1, 150, None, False),
    (4000, 60, "R@k", True),
    (4000, 60, "AP_level0", True)])
def test_memory_is_bounded(classes, limit, metrics, tied):
    """20,000 x 64 would be 1.6 GB of scores; the process may grow by the limit and a little.

    One class: everything is a positive. Tied: all rows are equal."""
    code = f"""
        import resource, torch
        from hapnb.metrics import evaluate
        torch.set_num_threads(1)
        g = torch.Generator().manual_seed(0)
        fine = torch.arange(20000) % {classes}
        emb, labels = torch.randn(20000, 64, generator=g), torch.stack([fine, fine % 100, fine % 10], 1)
        if {tied}: emb[:] = emb[0].clone()
        q = torch.arange(0, 20000, 160 if {classes} == 1 else 16)
        evaluate(emb[:100], labels[:100])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        evaluate(emb, labels, emb[q], labels[q], self_index=q, max_memory="{limit}MB", metrics={metrics!r})
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000)
    """
    job = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    grown = float(job.stdout)
    assert grown < limit + 15, f"grew by {grown:.0f} MB"


@pytest.mark.parametrize("measure", [evaluate, recall_at_k])
def test_a_copy_of_the_gallery_as_query_set_is_pointed_out(measure):
    x, y = torch.randn(20, 4), torch.arange(20) // 2
    with pytest.warns(RuntimeWarning, match="each query finds itself first"): measure(x, y, x.clone(), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(x, y, x.clone(), y, exclude_self=False)
        measure(x, y, x[:10].clone(), y[:10])
