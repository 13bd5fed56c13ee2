"""Intervals, paired tests and equivalence, against scipy and against cases worked out by hand."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, strategies as st
from scipy import stats

from hapnb import statistics
from hapnb.statistics import (
    correct_verdicts, crossed_bootstrap, decide, Difference, equivalence, holm, interval, paired_test, seed_difference,
    smallest_effect, summarise)
from toy_study import toy_rows


# intervals and corrections

@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.sampled_from([0.9, 0.95, 0.99]))
def test_interval_is_scipys(x, level):
    i = interval(x, level)
    low, high = stats.t.interval(level, len(x) - 1, np.mean(x), stats.sem(x)) if np.ptp(x) > 0 else (x[0], x[0])
    np.testing.assert_allclose([i.mean - i.half, i.mean + i.half], [low, high], atol=1e-9)


def test_interval_of_few_and_bad_values():
    assert np.isnan(interval([3.0]).half) and interval([3.0]).mean == 3.0 and interval([]).n == 0
    assert "no interval" in str(interval([3.0]))
    with pytest.raises(ValueError, match=r"values \[1\] of 2"): interval([1, np.nan])


def test_holm_by_hand_and_monotone():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, np.nan]), [0.03, 0.06, 0.06, np.nan])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1.0, 1.0])


def test_summarise_counts_failures():
    s = summarise(toy_rows({"b": [1., np.nan, 3.], "a": [np.nan]}), "method", "score")
    assert s["method"].tolist() == ["b", "a"] and s["n"].tolist() == [2, 0] and s["failed"].tolist() == [1, 1]
    assert s["mean"][0] == 2


# paired tests

@given(st.integers(2, 8), st.integers(0, 1000))
def test_paired_test_is_scipys(n, seed):
    r = np.random.default_rng(seed)
    g = {m: r.normal(size=n) for m in "abc"}
    t = paired_test(toy_rows(g).sample(frac=1, random_state=seed), "score", "method", "a").set_index("group")
    p = {m: stats.ttest_rel(g[m], g["a"]) for m in "bc"}
    np.testing.assert_allclose([t.p[m] for m in "bc"], [p[m].pvalue for m in "bc"], rtol=1e-9)
    np.testing.assert_allclose([t.low["b"], t.high["b"]], p["b"].confidence_interval(), rtol=1e-9)
    np.testing.assert_allclose(t.p_holm[list("bc")], holm([p[m].pvalue for m in "bc"]), rtol=1e-9)


def test_paired_test_uses_common_seeds_and_says_what_is_wrong():
    rows = toy_rows({"a": [1., 2., 3.], "b": [2., 3.5]})
    test = lambda rows=rows, metric="score", baseline="a": paired_test(rows, metric, "method", baseline)
    assert test().n[0] == 2
    assert test(rows[rows.seed == 0]).verdict[0] == "one seed: not tested"
    with pytest.raises(ValueError, match="Did you mean 'score'"): test(metric="scor")
    with pytest.raises(ValueError, match="unknown baseline"): test(baseline="z")
    with pytest.raises(ValueError, match="something else varies"): test(pd.concat([rows, rows]))
    with pytest.raises(ValueError, match="share no seed"): test(rows[(rows.method == "a") == (rows.seed == 0)])


def test_a_setting_whose_runs_all_failed_is_not_tested_and_the_others_are_kept():
    rows = toy_rows({"a": [1., 2., 3.], "b": [np.nan] * 3, "c": [2., np.nan, 4.]})
    t = paired_test(rows, "score", "method", "a").set_index("group")
    assert t.n.to_dict() == {"b": 0, "c": 2} and t.verdict["b"] == "failed: not tested" and t.difference["c"] == 1
    assert paired_test(rows, "score", "method", "b").verdict.tolist() == ["failed: not tested"] * 2


def test_equal_scores_are_not_a_difference():
    t = paired_test(toy_rows({"a": [1., 2.], "b": [1., 2.], "c": [2., 3.]}), "score", "method", "a")
    assert list(t.p) == [1.0, 0.0] and list(t.verdict) == ["not distinguishable", "better"]


# equivalence

def settings(groups):
    "Scores in percent of depths; one column `layers`."
    return pd.DataFrame([dict(layers=k, seed=s, score=v / 100) for k, vs in groups.items() for s, v in enumerate(vs)])


def states(groups, **args):
    "States of all depths compared with depth 2."
    return equivalence(settings(groups), "score", "layers", 2, **args).set_index("group").state.to_dict()


@given(st.integers(2, 6), st.integers(0, 1000))
def test_equivalence_is_two_one_sided_tests(n, seed):
    r = np.random.default_rng(seed)
    a, b, margin = r.normal(0, .01, n), r.normal(.003, .01, n), .01
    state = equivalence(settings({2: 100 * a, 3: 100 * b}), "score", "layers", 2, margin=margin).state[1]
    p = lambda edge, side: stats.ttest_1samp(b - a, edge, alternative=side).pvalue
    assert (state == "inside") == (max(p(-margin, "greater"), p(margin, "less")) < .025)
    assert (state == "entirely outside") == (min(p(margin, "greater"), p(-margin, "less")) <= .025)


def test_equivalence_of_hand_made_settings():
    near = {1: [50.1, 51.2, 52.3], 2: [50, 51, 52]}
    assert states(near | {3: [49.9, 51.0, 52.1]}) == {2: "reference", 1: "inside", 3: "inside"}
    assert states(near | {5: [47, 48.1, 48.9]})[5] == "entirely outside"
    scattered = {2: [50, 51, 52], 3: [50.5, 51.9, 52.1]}
    assert (states(scattered)[3], states(scattered, margin=.02)[3]) == ("partly outside", "inside")


def test_a_missing_difference_is_not_an_equivalence():
    rows = {2: [50, 53], 3: [52, 51]}
    assert paired_test(settings(rows), "score", "layers", 2).verdict[0] == "not distinguishable"
    assert states(rows)[3] == "partly outside"


def test_entirely_outside_needs_more_with_more_settings():
    one = {2: [50, 51, 52, 53], 9: [51.4, 52.6, 53.3, 54.7]}
    many = one | {k: one[2] for k in range(3, 9)}
    state = lambda g: equivalence(settings(g), "score", "layers", 2).set_index("group").state[9]
    assert (state(one), state(many)) == ("entirely outside", "partly outside")


def test_failed_runs_count_against_equivalence():
    good = {2: [50, 51, 52], 3: [50.1, 51, 52]}
    assert states(good | {4: [50, np.nan, 52]})[4] == states(good | {4: [np.nan] * 3})[4] == "failed"
    rows = settings({2: [50, np.nan, 52], 3: [50, 51, 52]})
    e = equivalence(rows, "score", "layers", 2)
    assert (e.failed.tolist(), e.n.tolist(), e.state.tolist()) == ([1, 0], [2, 2], ["failed", "inside"])


def test_equivalence_of_one_seed_and_wrong_names():
    assert states({2: [50], 3: [50]})[3] == states({2: [50, 51], 3: [50]})[3] == "not tested"
    rows = {2: [50, 51], 3: [50, 51], 10: [0, 1]}
    assert states(rows, others=[3]) == {2: "reference", 3: "inside"} and states(rows)[10] != "inside"
    for bad in (dict(others=[11]), dict(others=[]), dict(margin=0)):
        with pytest.raises(ValueError): states(rows, **bad)
    rows = settings(rows)
    with pytest.raises(ValueError, match="unknown setting of column 'layers': 4"):
        equivalence(rows, "score", "layers", 4)
    with pytest.raises(ValueError, match="something else varies"):
        equivalence(pd.concat([rows, rows]), "score", "layers", 2)


# crossed bootstrap

def crossed(seeds, groups, sds, rng, size=4):
    "Differences [seeds, groups * size] whose true mean is zero, and their groups; `sds`: of seeds, groups, cells."
    d = sds[0] * rng.normal(size=(seeds, 1)) + sds[1] * rng.normal(size=(1, groups))
    return (d + sds[2] * rng.normal(size=(seeds, groups))).repeat(size, 1), np.arange(groups).repeat(size)


def test_crossed_bootstrap_is_a_plain_loop_over_draws():
    rng = np.random.default_rng(0)
    a, b, of = rng.normal(size=(4, 60)), rng.normal(size=(4, 60)), rng.integers(9, size=60)
    d, names, draws = a - b, np.unique(of), {"seeds": [], "groups": [], "both": []}
    for _ in range(3000):
        rows, chosen = rng.integers(4, size=4), rng.choice(names, len(names))
        columns = np.concatenate([np.flatnonzero(of == g) for g in chosen])
        draws["seeds"].append(d[rows].mean())
        draws["groups"].append(d[:, columns].mean())
        draws["both"].append(d[np.ix_(rows, columns)].mean())
    s, g, both = (np.var(x) for x in draws.values())
    # five percent: the noise of 3,000 draws
    V_s, V_g, V_i = s * 4 / 3, g * 9 / 8, max(both - s - g, 0) * 4 / 3 * 9 / 8
    found = crossed_bootstrap(a, b, of)
    assert found.value == pytest.approx(d.mean()) and (found.seeds, found.groups) == (4, 9)
    assert found.error == pytest.approx(max(V_s + V_g - V_i, V_s, V_g) ** .5, rel=.05)
    assert found == crossed_bootstrap(a, b, of) != crossed_bootstrap(a, b, of, seed=1)
    back = crossed_bootstrap(b, a, of)
    assert (back.value, back.error) == pytest.approx((-found.value, found.error))


def test_crossed_bootstrap_of_a_split_per_seed():
    "Each seed has queries of its own; the groups have names that all seeds share."
    rng = np.random.default_rng(0)
    d, of = crossed(6, 30, (.2, 1., .5), rng, size=4)
    whole = crossed_bootstrap(d, 0 * d, of)
    names = np.array([f"group {g:02d}" for g in of])
    assert crossed_bootstrap(list(d), list(0 * d), [names] * 6) == whole
    halves = [np.sort(rng.permutation(len(of))[:60]) for _ in d]
    parts = [row[h] for row, h in zip(d, halves)]
    found = crossed_bootstrap(parts, [0 * p for p in parts], [names[h] for h in halves], draws=20_000)
    assert found.value == pytest.approx(np.concatenate(parts).mean()) and (found.seeds, found.groups) == (6, 30)
    # a plain loop over draws of both
    draws = []
    for _ in range(3000):
        rows, chosen = rng.integers(6, size=6), np.bincount(rng.integers(30, size=30), minlength=30)
        weight = [chosen[of[halves[s]]] for s in rows]
        draws.append(sum((w * parts[s]).sum() for w, s in zip(weight, rows)) / sum(w.sum() for w in weight))
    cells = statistics._cells(parts, [0 * p for p in parts], [of[h] for h in halves])
    by_both = statistics._draws(*cells, 20_000, 0)[2]
    assert by_both.std() == pytest.approx(np.std(draws), rel=.06)
    with pytest.raises(ValueError, match=r"query 7 \(1 in all\)"):
        holes = [np.where(np.arange(60) == 7, np.nan, p) if i == 2 else p for i, p in enumerate(parts)]
        crossed_bootstrap(holes, [0 * p for p in parts], [names[h] for h in halves])
    with pytest.raises(ValueError, match="each query a group"):
        crossed_bootstrap(parts, [0 * p for p in parts], [names[h] for h in halves][:5])


@pytest.mark.parametrize("sds", [(.1, 1., .5), (1., .3, .3), (.6, .6, .6)])
def test_error_of_the_crossed_bootstrap_is_the_one_that_was_simulated(sds):
    rng, S, G = np.random.default_rng(0), 8, 40
    found = [crossed_bootstrap(d, 0 * d, of, draws=300) for d, of in (crossed(S, G, sds, rng) for _ in range(300))]
    true = sds[0] ** 2 / S + sds[1] ** 2 / G + sds[2] ** 2 / (S * G)
    assert np.mean([f.error ** 2 for f in found]) == pytest.approx(true, rel=.12)
    hits = np.mean([low < 0 < high for low, high in (f.interval() for f in found)])
    assert .91 < hits < .985


def test_one_kind_of_variation_gives_the_interval_of_that_kind():
    rng = np.random.default_rng(0)
    d = rng.normal(size=(5, 1)) + np.zeros((5, 12))
    over_seeds, found = seed_difference(d[:, 0]), crossed_bootstrap(d, 0 * d, np.arange(12), draws=40_000)
    assert found.interval() == pytest.approx(over_seeds.interval(), rel=.02)
    found = crossed_bootstrap(d.T.repeat(2, 1)[:5], np.zeros((5, 10)), np.arange(10), draws=40_000)
    assert found.error == pytest.approx(d[:, 0].repeat(2).std(ddof=1) / 10 ** .5, rel=.02) and found.dof > 8


def test_queries_without_positive_are_left_out_and_other_gaps_are_errors():
    rng = np.random.default_rng(0)
    a, b, of = rng.normal(size=(3, 20)), rng.normal(size=(3, 20)), np.arange(20) // 4
    want = crossed_bootstrap(a[:, 4:], b[:, 4:], of[4:])
    a[:, :4] = b[:, :4] = np.nan
    assert crossed_bootstrap(a, b, of) == want
    for change, message in [
            (lambda a, b: (a[:, 4:], b), "the same queries"), (lambda a, b: (a[:2], b), "same seeds"),
            (lambda a, b: (a[0], b[0]), "the same queries"), (lambda a, b: (a[:1], b[:1]), "number of seeds is 1"),
            (lambda a, b: (np.nan_to_num(a), b), r"query 0 \(4 in all\)"),
            (lambda a, b: (a * np.nan, b * np.nan), "groups of queries is 0"),
            (lambda a, b: (np.where(np.arange(20) == 9, np.inf, a), b), "infinite")]:
        with pytest.raises(ValueError, match=message): crossed_bootstrap(*change(a, b), of)
    with pytest.raises(ValueError, match="groups of queries is 1"): crossed_bootstrap(a, b, 0 * of)
    with pytest.raises(ValueError, match="a group"): crossed_bootstrap(a, b, of[1:])
    with pytest.raises(ValueError, match="number of seeds is 1"): seed_difference([.1])


def test_equal_methods_differ_by_nothing():
    same = crossed_bootstrap(np.ones((3, 4)), np.ones((3, 4)), [0, 0, 1, 1])
    assert same.interval() == (0., 0.) and decide([same], .01) == ("negligible", 0.)
    assert decide([same], .01, "no lower")[0] == decide([same], .01, "same")[0] == "supported"


# verdicts

def points(low, high, dof=200.):
    "A difference whose 95 % interval goes from `low` to `high` points."
    return Difference((low + high) / 200, (high - low) / 200 / stats.t.ppf(.975, dof), dof, 5, 99)


@pytest.mark.parametrize("low, high, higher, no_lower, same", [
    (.4, 1.8, "supported", "supported", "contradicted"),
    (.1, 1.8, "undecided", "supported", "undecided"),
    (.1, .9, "negligible", "supported", "supported"),
    (-.9, .9, "negligible", "supported", "supported"),
    (-.1, 2.9, "undecided", "supported", "undecided"),
    (-1.1, .5, "undecided", "undecided", "undecided"),
    (-1.8, -.1, "undecided", "undecided", "undecided"),
    (-1.8, -.4, "contradicted", "contradicted", "contradicted"),
    (-9., 9., "undecided", "undecided", "undecided")])
def test_verdicts_follow_the_printed_rule(low, high, higher, no_lower, same):
    for direction, want in (("higher", higher), ("no lower", no_lower), ("same", same)):
        verdict, p = decide([points(low, high)], .01, direction)
        assert verdict == want
        # the p value that Holm's correction takes says the same as the interval
        if verdict != "undecided": assert p < .05


@given(st.floats(-3, 3), st.floats(.1, 3), st.sampled_from(["higher", "no lower", "same"]))
def test_p_values_and_intervals_agree(middle, half, direction):
    d = points(middle - half, middle + half)
    low, high = d.interval()
    # a bound that equals an edge is decided by its last digit
    assume(min(abs(bound - edge) for bound in (low, high) for edge in (-.01, 0., .01)) > 1e-9)
    for edge in (-.01, 0., .01):
        assert (d.p_above(edge) < .05) == (low > edge) and (d.p_below(edge) < .05) == (high < edge)
    assert decide([d] * 3, .01, direction)[0] in (decide([d], .01, direction)[0], "undecided")


def test_a_claim_must_hold_against_each_rival():
    good, weak, bad = points(1, 3), points(-.5, 2), points(-3, -1)
    assert decide([good, good], .01)[0] == "supported" and decide([good, weak], .01)[0] == "undecided"
    assert decide([good, weak, bad], .01)[0] == "contradicted"
    # one of many rivals may be ahead by luck
    lucky = points(-2.4, -.05)
    assert decide([lucky], .01)[0] == "contradicted" and decide([good] * 9 + [lucky], .01)[0] == "undecided"


def test_holm_takes_verdicts_back():
    found = [("supported", .04), ("contradicted", .001), ("negligible", .02), ("not testable here", np.nan)]
    assert [v for v, _ in correct_verdicts(found)] == ["supported", "contradicted", "negligible", "not testable here"]
    assert [v for v, _ in correct_verdicts(found + [("undecided", .9)] * 2)] == [
        "undecided", "contradicted", "undecided", "not testable here", "undecided", "undecided"]


@pytest.mark.parametrize("metric, effect", [
    ("R@1", .01), ("R@1_level2", .01), ("AP_level0", .01), ("H-AP", .005), ("mAP@R_level1", .005), ("F", .02),
    ("R@10_level0", None), ("mAP", None), ("gap", None)])
def test_smallest_effects_are_those_that_were_fixed(metric, effect):
    assert smallest_effect(metric) == effect
