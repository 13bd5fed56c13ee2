"""Claims: what may be declared, registered and judged, and the page that shows it."""
import json, re, xml.dom.minidom
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from hapnb import budgets, claims, study
from hapnb.claims import (
    Budget, check_claims, declared_claims, interval_picture, judge_claim, Judged, read_preregistration, save_claims,
    write_claims, write_preregistration)
from hapnb.config import RunConfig
from hapnb.helpers import UserError
from hapnb.statistics import paired_test
from runs_kit import TOY

CLAIM = {"id": "b-beats-a", "paper": "P (2020)", "text": "B beats A", "source": "quoted: Section 3", "primary": True,
         "method": "b", "rivals": ["a"], "metric": "H-AP"}
GROUPS = np.arange(60) // 6


def toy(gains, seeds=4, noise=.01, spread=.0):
    "Rows of runs, and the values of their queries: `gains` per method over a common part; `spread` over subgroups."
    rng = np.random.default_rng(0)
    common, kept = rng.uniform(.2, .6, (seeds, 60)), {}
    for m, gain in gains.items():
        by_group = rng.normal(size=10)[GROUPS] * spread
        for s in range(seeds): kept[f"{m}{s}"] = common[s] + gain + by_group + noise * rng.normal(size=60)
    rows = [dict(method=k[:-1], seed=int(k[-1]), key=k, **{"H-AP": v.mean()}) for k, v in kept.items()]
    return pd.DataFrame(rows), lambda key, metric: (kept[key], GROUPS)


def judge(rows, values, change={}, setting="toy", **args):
    claim, = check_claims([{**CLAIM, **change}])
    return judge_claim(claim, rows, "method", values, setting, **args)


def notebook(path, source, tag="claims"):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, metadata={"tags": [tag]})]), path)
    return path


# declarations

@pytest.mark.parametrize("change, message", [
    ({"metric": "gap"}, "claim 'b-beats-a' has no smallest effect of interest, and none was fixed for 'gap'"),
    ({"effect": 0}, "claim 'b-beats-a': 'effect' must be greater than 0"),
    ({"effect": None}, "claim 'b-beats-a': 'effect' must be"), ({"primary": "yes"}, "'primary' must be"),
    ({"source": "somewhere"}, "claim 'b-beats-a': source must begin"), ({"source": "quoted:"}, "source must begin"),
    ({"rivals": []}, "claim 'b-beats-a': rivals is empty"), ({"id": "B beats A"}, "claim 'B beats A': id must"),
    ({"direction": "lower"}, "claim 'b-beats-a': 'direction' must be 'higher', 'no lower' or 'same'"),
    ({"metrics": "AP"}, "no setting 'metrics'. Did you mean 'metric'")])
def test_a_wrong_declaration_is_named(change, message):
    with pytest.raises(UserError, match=re.escape(message)): check_claims([{**CLAIM, **change}])


def test_a_declaration_needs_its_fields_and_a_name_of_its_own():
    for field in set(CLAIM) - {"primary"}:
        with pytest.raises(UserError, match=f"needs '{field}'"):
            check_claims([{k: v for k, v in CLAIM.items() if k != field}])
    with pytest.raises(UserError, match="'b-beats-a' is declared twice"): check_claims([CLAIM, CLAIM])


def test_the_hash_covers_everything_that_is_declared(monkeypatch):
    hash_of = lambda **change: check_claims([{**CLAIM, **change}])[0].hash()
    changes = [dict(id="x"), dict(paper="Q"), dict(text="t"), dict(source="inferred: t"), dict(primary=False),
               dict(method="c"), dict(rivals=["c"]), dict(metric="R@1_level0"), dict(direction="same"),
               dict(effect=.01), dict(over="seeds")]
    found = [hash_of(), *(hash_of(**c) for c in changes)]
    assert len(set(found)) == 12 and hash_of() == hash_of(effect=.005) == hash_of(direction="higher")
    monkeypatch.setitem(claims.smallest_effect.__globals__["SMALLEST_EFFECTS"], "H-AP", .007)
    assert hash_of() != found[0]


# registration

def test_dates_are_kept_and_dropped_claims_stay_visible(tmp_path):
    file, nb = tmp_path / "figures" / "preregistration.md", tmp_path / "10_x.ipynb"
    second = {**CLAIM, "id": "second", "text": "with a | bar"}
    def write(day, *declared):
        write_preregistration([notebook(nb, f"CLAIMS = {list(declared)!r}")], file, day)
        return sorted(date for date, _ in read_preregistration(file).values())
    assert read_preregistration(file) == {}
    assert write("2026-01-01", CLAIM) == ["2026-01-01"]
    assert write("2026-01-02", CLAIM, second) == ["2026-01-01", "2026-01-02"]
    before = file.read_text()
    assert write("2026-01-09", CLAIM, second) == ["2026-01-01", "2026-01-02"] and file.read_text() == before
    assert write("2026-01-03", {**CLAIM, "rivals": ["a", "c"]}, second) == ["2026-01-02", "2026-01-03"]
    dropped = file.read_text().split("dropped since")[1]
    assert "2026-01-01" in dropped and "b higher than a |" in dropped
    # a claim that was dropped and comes back is new, and what was dropped stays in the list
    assert write("2026-01-10", CLAIM, second) == ["2026-01-02", "2026-01-10"]
    dropped = file.read_text().split("dropped since")[1]
    assert dropped.count("`b-beats-a`") == 2 and dropped.count("2026-01-01") == 1


@pytest.mark.parametrize("source", ["CLAIMS = [{'id': name}]", "CLAIMS = [dict(id='x')]", "CLAIMS", "x = ", ""])
def test_claims_that_must_be_computed_cannot_be_registered(tmp_path, source):
    with pytest.raises(UserError, match="must be one plain list"):
        declared_claims(notebook(tmp_path / "x.ipynb", source))


def test_a_notebook_without_claims_declares_none(tmp_path):
    assert declared_claims(notebook(tmp_path / "x.ipynb", "CLAIMS = 1", tag="parameters")) == []


def test_a_paper_has_eight_primary_claims_at_most_and_a_name_is_used_once(tmp_path):
    nbs = [notebook(tmp_path / f"{i}.ipynb", f"CLAIMS = {[{**CLAIM, 'id': f'c{i}'}]!r}") for i in range(9)]
    write_preregistration(nbs[:8], tmp_path / "p.md")
    with pytest.raises(UserError, match=r"P \(2020\) has 9 primary claims, 8 at most"):
        write_preregistration(nbs, tmp_path / "p.md")
    twice = notebook(tmp_path / "twice.ipynb", f"CLAIMS = {[{**CLAIM, 'id': 'c0'}]!r}")
    with pytest.raises(UserError, match="'c0' is declared twice"):
        write_preregistration([nbs[0], twice], tmp_path / "p.md")


# judgement

def test_directions_and_rivals():
    rows, values = toy({"a": 0, "b": .02, "c": .021, "d": 0})
    assert judge(rows, values).verdict == "supported"
    assert judge(rows, values, {"method": "a", "rivals": ["b"]}).verdict == "contradicted"
    assert judge(rows, values, {"method": "d", "effect": .01}).verdict == "negligible"
    assert judge(rows, values, {"method": "d", "effect": .01, "direction": "same"}).verdict == "supported"
    assert judge(rows, values, {"method": "d", "effect": .01, "direction": "no lower"}).verdict == "supported"
    j = judge(rows, values, {"rivals": ["a", "d", "c"]})
    assert j.verdict in ("undecided", "contradicted") and j.hardest()["rival"] == "c"
    assert "against c, the hardest of 3" in j.value() and len(j.contrasts) == 3


def test_seeds_alone_may_be_sure_where_test_classes_are_not():
    rows, values = toy({"a": 0, "b": .006}, noise=.001, spread=.03)
    rows["H-AP"] = [.5 + .006 * (m == "b") + .0001 * s * (m == "b") for m, s in zip(rows.method, rows.seed)]
    sure, j = judge(rows, values, {"over": "seeds"}), judge(rows, values)
    assert (sure.verdict, j.verdict) == ("supported", "undecided")
    test, c = paired_test(rows, "H-AP", "method", "a").iloc[0], j.contrasts[0]
    assert (c["seed_low"], c["seed_high"]) == pytest.approx((test.low, test.high))
    assert (sure.contrasts[0]["low"], sure.contrasts[0]["groups"]) == (pytest.approx(test.low), 0)
    assert c["high"] - c["low"] > 3 * (test.high - test.low) and (c["seeds"], c["groups"]) == (4, 10)


def test_failed_runs_count_against_a_claim():
    rows, values = toy({"a": 0, "b": .02})
    rows.loc[rows.key == "b3", "H-AP"] = np.nan
    j = judge(rows, values)
    assert (j.verdict, j.p, j.note) == ("undecided", 1., "b: 1 of 4 runs failed") and j.contrasts[0]["seeds"] == 3
    assert judge(rows, values, {"method": "a", "rivals": ["b"]}).verdict == "contradicted"
    rows.loc[rows.method == "b", "H-AP"] = np.nan
    j = judge(rows, values)
    assert (j.verdict, j.value(), j.p) == ("not testable here", "b: 4 of 4 runs failed", None)


def test_numbers_are_named_with_their_column():
    rows, values = toy({"a": 0, "b": .02})
    rows["tau"] = rows["method"].map({"a": 8, "b": 32})
    claim, = check_claims([{**CLAIM, "method": 32, "rivals": [8]}])
    j = judge_claim(claim, rows, "tau", values, "toy")
    assert j.verdict == "supported" and j.contrasts[0]["rival"] == "tau 8"


@pytest.mark.parametrize("budgets, message", [
    ({"b": Budget(30, {}, {})}, r"claim 'b-beats-a' compares unequal numbers of trials \(b 30, a 0\)"),
    ({"b": Budget(30, {}, {}), "a": Budget(12, {}, {})}, r"unequal numbers of trials \(b 30, a 12\)"),
    ({m: Budget(3, {"lr": .1}, {"lr": [.1, .2, .3]}) for m in "ab"},
     "claim 'b-beats-a': the search for b ended at the edge"),
    ({"a": Budget(30, {"lr": .0998}, {"lr": (.001, .1)}), "b": Budget(30, {"lr": .01}, {"lr": (.001, .1)})},
     r"the search for a ended at the edge of its grid \(lr = 0.0998, tried 0.001 to 0.1\)")])
def test_unequal_chances_are_refused_with_the_name_of_the_claim(budgets, message):
    with pytest.raises(UserError, match=message): judge(*toy({"a": 0, "b": 1}), budgets=budgets)


def test_equal_chances_are_accepted():
    inside = Budget(5, {"lr": .2, "kind": "z", "alone": 1.}, {"lr": [.1, .2, .3], "kind": list("xyz"), "alone": [1.]})
    assert judge(*toy({"a": 0, "b": 1}), budgets={"a": inside, "b": inside}).verdict == "supported"
    # a claim that is not testable has no comparison to refuse
    j = judge(*toy({"a": 0, "b": 1}), budgets={"a": inside}, why_not="the search ended at an edge")
    assert (j.verdict, j.value()) == ("not testable here", "the search ended at an edge")


def test_runs_that_do_not_belong_together_are_named():
    rows, values = toy({"a": 0, "b": 1})
    with pytest.raises(UserError, match="b-beats-a.*measured on different images"):
        judge(rows, lambda key, metric: (values(key, metric)[0], GROUPS + (key == "b0")))
    # other images for another seed of both methods: allowed for splits, whose groups have names
    with pytest.raises(UserError, match="b-beats-a.*measured on different images"):
        judge(rows, lambda key, metric: (values(key, metric)[0], GROUPS + key.endswith("0")))
    names = np.array([f"group {g}" for g in GROUPS])
    def split(key, metric):
        keep = slice(int(key.endswith("0")), None)
        return values(key, metric)[0][keep], names[keep]
    assert judge(rows, split).contrasts[0]["groups"] == len(set(GROUPS))
    with pytest.raises(UserError, match="claim 'b-beats-a', b against a: query 0 .* has a value in some runs"):
        gap = lambda key: np.where(np.arange(60) < (key == "b0"), np.nan, 0)
        judge(rows, lambda key, metric: (values(key, metric)[0] + gap(key), GROUPS))
    with pytest.raises(UserError, match="claim 'b-beats-a': method b has two runs with one seed"):
        judge(pd.concat([rows, rows[rows.key == "b0"]]), values)
    with pytest.raises(UserError, match="in claim 'b-beats-a': 'c'"): judge(rows, values, {"rivals": ["c"]})


# a study

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A study with two methods on the toy images, two seeds, and its rows."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("HAPNB_CACHE", str(tmp_path_factory.getbasetemp() / "features"))
        s = study.begin("10_toy", profile="smoke", dataset="toy", store=str(tmp_path_factory.mktemp("store")))
        base = s.config(**{k: getattr(TOY, k) for k in ("trunk", "image_size", "embed_dim", "batch_size", "ks", "lr")})
        methods = {"a": {"loss": "SmoothAPLoss"}, "b": {"loss": "SupAPLoss"}}
        return s, s.run(s.grid(base, method=methods), jobs=1, device="cpu", progress=False)


def registered(monkeypatch, *declared):
    known = {c.hash(): ("2026-01-31", c.id) for c in check_claims(declared)}
    monkeypatch.setattr(study, "read_preregistration", lambda: known)


def test_a_study_fails_if_a_claim_was_not_registered_or_was_changed(finished, monkeypatch):
    s, _ = finished
    registered(monkeypatch, CLAIM)
    s.declare([CLAIM])
    for changed in ({"id": "other"}, {"rivals": ["a", "c"]}, {"effect": .01}, {"source": "inferred: by us"}):
        with pytest.raises(UserError, match=f"claim '{changed.get('id', 'b-beats-a')}' is not registered"):
            s.declare([{**CLAIM, **changed}])
    with pytest.raises(UserError, match="has no smallest effect of interest"): s.declare([{**CLAIM, "metric": "gap"}])


def test_a_study_judges_its_claims_from_the_values_of_its_runs(finished, monkeypatch):
    s, rows = finished
    second = {**CLAIM, "id": "against-c", "rivals": ["c"], "primary": False}
    registered(monkeypatch, CLAIM, second)
    s.declare([CLAIM, second])
    with pytest.raises(UserError, match="Did you mean 'b-beats-a'"): s.judge("b-beat-a", rows, "method")
    edge = {m: Budget(3, {"lr": .1}, {"lr": [.01, .03, .1]}) for m in "ab"}
    for budgets, message in ((edge, "claim 'b-beats-a': the search for b ended at the edge"),
                             ({"b": edge["b"]}, "claim 'b-beats-a' compares unequal numbers of trials"),
                             ({"B": edge["b"]}, "in claim 'b-beats-a': 'B'")):
        with pytest.raises(UserError, match=message): s.judge("b-beats-a", rows, "method", budgets=budgets)
    j = s.judge("b-beats-a", rows, "method", "toy network")
    with pytest.raises(UserError, match="claim 'against-c' was declared and not judged"): s.verdicts()
    assert s.judge("against-c", rows, "method").note == "the profile smoke has no run of method c"
    assert (j.registered, j.setting) == ("2026-01-31", "toy, toy network, profile smoke")
    c, by_method = j.contrasts[0], rows.groupby("method")["H-AP"].mean()
    assert c["difference"] == pytest.approx(by_method["b"] - by_method["a"], abs=1e-6) and c["groups"] > 2
    assert s.verdicts()["verdict"].tolist() == [j.verdict, "not testable here"]
    saved = pd.read_csv(s.out / "verdicts.csv")
    assert saved["keys"][0].split() == rows.sort_values(["method", "seed"], ascending=[False, True])["key"].tolist()
    assert {"seed_low", "seed_high", "hash", "effect"} <= set(saved) and len(saved) == 1
    # judged again: one entry, not two
    s.judge("b-beats-a", rows, "method", "toy network")
    kept = json.loads((s.out / "claims.json").read_text())
    assert [k["hash"] for k in kept] == [s.claims[0].hash, j.hash]
    page = (s.out.parent / "claims.md").read_text()
    assert "## P (2020)" in page and "## Appendix: further claims" in page


# equal budgets: what the search of tuned settings hands to a claim

FIRST = "emoji, Lite0"


def write_found(path, trials={"a": 30, "b": 30}, setting=FIRST, **chosen):
    "A file of chosen points for the methods `a` and `b`, as the study of equal searches writes it."
    found = []
    for m, n in trials.items():
        point = {"lr": .01, "epochs": 10} | chosen.get(m, {})
        ends = {"lr": [1e-4, 1.], "epochs": [4, 40]}
        found += [dict(setting=setting, method=m, objective=o, trials=n, chosen=json.dumps(point),
                       tried=json.dumps(ends), search=budgets.search_id(m, setting, n)) for o in budgets.OBJECTIVES]
    budgets.write_points(pd.DataFrame(found), path)


@pytest.fixture
def searched(tmp_path, monkeypatch, finished):
    "A study of the profile full, rows of its methods in two settings, and a function that writes chosen points."
    s, rows = finished
    same = {"loss": "SmoothAPLoss"}
    two = {m: budgets.Method("ranking", same, (.01, .01), dict(budgets._SHARED)) for m in "ab"}
    monkeypatch.setattr(budgets, "METHODS", two)
    monkeypatch.setattr(budgets, "points_file", lambda: tmp_path / "points.csv")
    second = {**CLAIM, "id": "further", "primary": False}
    registered(monkeypatch, CLAIM, second)
    full = study.Study(s.name, "full", "emoji", "", 2, "cpu", 1, s.store, tmp_path / "out", {"freeze": "trunk"})
    full.out.mkdir()
    full.declare([CLAIM, second])
    labels = [dict(setting=x, constants=c) for x in (FIRST, "fonts, Lite0")
              for c in ("published", "tuned for R@1", "tuned for H-AP")]
    every = pd.concat([rows.assign(**l) for l in labels], ignore_index=True)
    compare = study.Study.compare
    def stands_in(self, methods, objectives, splits=None):
        "The rows above instead of runs on five splits."
        if splits is None: return compare(self, methods, objectives)
        wanted = (every.setting == splits) & (every.constants == budgets.tuned_name(objectives[0]))
        return every[every.method.isin(methods) & wanted]
    monkeypatch.setattr(study.Study, "compare", stands_in)
    def points(trials=30, **chosen):
        for x, n in ((FIRST, trials), ("fonts, Lite0", 12)):
            counts = n if isinstance(n, dict) else dict.fromkeys("ab", n)
            write_found(tmp_path / "points.csv", counts, x, **chosen)
    return full, every, points


def test_a_claim_is_judged_with_the_budgets_of_its_metric_in_every_setting(searched):
    s, rows, points = searched
    points()
    found = s.judge_tuned("b-beats-a", rows)
    assert [j.setting for j in found] == ["emoji, frozen tf_efficientnet_lite0, tuned, 2 splits, profile full",
                                          "fonts, frozen tf_efficientnet_lite0, tuned, 2 splits, profile full"]
    # one run per seed: rows of other objectives and published rows take no part
    assert found[0].contrasts[0]["seeds"] == 2
    further, = s.judge_tuned("further", rows)
    assert further.setting == "emoji, frozen tf_efficientnet_lite0, tuned, profile full"


def test_primary_claims_get_a_split_of_the_classes_per_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(budgets, "points_file", lambda: tmp_path / "points.csv")
    monkeypatch.setattr(budgets, "METHODS", {m: budgets.METHODS[m] for m in ("SupAP", "HAPPIER")})
    monkeypatch.setattr(study.Study, "run", lambda self, grid, on_error: grid)
    write_found(tmp_path / "points.csv", {"SupAP": 12}, "fonts, Lite2")
    s = study.Study("10_toy", "full", "emoji", "", 3, "cpu", 1, tmp_path, tmp_path / "out", {"freeze": "trunk"})
    grid = s.compare(["SupAP", "HAPPIER"], ["H-AP"], splits="fonts, Lite2")
    assert [(c.dataset, c.trunk, c.seed, c.dataset_args["deal"]) for c in grid] == [
        ("fonts", "tf_efficientnet_lite2", i, i + 1) for i in range(3)]
    assert {(l["setting"], l["method"], l["constants"]) for l in grid.labels} == {
        ("fonts, Lite2", "SupAP", "tuned for H-AP")}


@pytest.mark.parametrize("change, message", [
    (dict(trials={"a": 12, "b": 30}), r"claim 'b-beats-a' compares unequal numbers of trials \(b 31, a 13\)"),
    (dict(b={"lr": .999}), r"claim 'b-beats-a': the search for b ended at the edge of its grid \(lr = 0.999"),
    (dict(a={"epochs": 40}), r"claim 'b-beats-a': the search for a ended at the edge of its grid \(epochs = 40"),
    (dict(trials={"b": 30}), "claim 'b-beats-a': no tuned point of 'a' in the setting 'emoji, Lite0' for H-AP: search "
                             "with `hapnb reproduce 11_tuned --profile full`")])
def test_a_search_that_was_not_equal_fails_the_study_with_the_claim(searched, change, message):
    s, rows, points = searched
    points(**change)
    with pytest.raises(UserError, match=message): s.judge_tuned("b-beats-a", rows)


def test_only_the_profile_full_insists_on_tuned_points(searched):
    s, rows, _ = searched
    s.profile = "quick"
    j, = s.judge_tuned("b-beats-a", rows[rows.setting == FIRST])
    assert (j.verdict, j.note[:27]) == ("not testable here", "no tuned point of 'b' in th")


def test_points_of_a_changed_search_do_not_count(searched, monkeypatch, tmp_path):
    s, rows, points = searched
    points()
    assert budgets.has_point("a", FIRST) and budgets.tuned("a", FIRST)[1].trials == 31
    space = {**budgets._SHARED, "lr": (1e-5, 1., "log")}
    wider = budgets.Method("ranking", {"loss": "SmoothAPLoss"}, (.01, .01), space)
    monkeypatch.setitem(budgets.METHODS, "b", wider)
    with pytest.raises(UserError, match="the tuned point of 'b' in the setting 'emoji, Lite0' comes from a search"):
        budgets.tuned("b", FIRST)
    # the next run of one setting keeps what still counts of the others, and says what it drops
    again = pd.read_csv(tmp_path / "points.csv")
    again = again[(again.setting == FIRST) & (again.method == "a")]
    assert budgets.write_points(again, tmp_path / "points.csv") == [("fonts, Lite0", "b")]
    left = pd.read_csv(tmp_path / "points.csv")
    assert set(zip(left.setting, left.method)) == {(FIRST, "a"), ("fonts, Lite0", "a")}


def test_rows_are_tuned_where_there_are_points(searched, monkeypatch):
    s, _, points = searched
    points(trials={"a": 30}, a={"epochs": 7, "lr": .02})
    asked = []
    monkeypatch.setattr(study.Study, "run", lambda self, grid, **args: asked.extend(zip(grid.labels, grid)))
    s.settings["epochs"] = 30
    s.compare(["a", "b"], ["H-AP"])
    first = [(l["method"], l["constants"], c.lr, c.epochs) for l, c in asked if l["setting"] == FIRST and not c.seed]
    assert first == [("a", "published", .01, 30), ("a", "tuned for H-AP", .02, 7), ("b", "published", .01, 30)]
    # the other settings: only methods that were searched there
    assert {(l["setting"], c.dataset, l["method"]) for l, c in asked if l["setting"] != FIRST} == {
        ("fonts, Lite0", "fonts", "a"), ("fonts, Lite0", "fonts", "b")}


# every method that can be searched

@pytest.mark.parametrize("name", budgets.METHODS)
def test_the_ends_of_every_range_are_settings_that_a_run_accepts(name):
    from hapnb.config import check_names
    space = {path: budgets.axis(v) for path, v in budgets.METHODS[name].space.items()}
    middle = {path: a.at(.5) for path, a in space.items()}
    for path, a in space.items():
        for v in a.labels if a.is_choice else (a.low, a.high):
            check_names(RunConfig(**budgets.changes_of(name, {**middle, path: v})))
    check_names(RunConfig(**budgets.published(name, 15)))


def test_a_search_tries_each_axis_evenly_and_always_the_same_points():
    found = budgets.points_of("HAPPIER", 30)
    assert found == budgets.points_of("HAPPIER", 30) and len(found) == 30
    for path, a in ((p, budgets.axis(v)) for p, v in budgets.METHODS["HAPPIER"].space.items()):
        places = np.histogram([a.position(p[path]) for p in found], 5, (0, 1))[0]
        assert places.min() >= 4, path


# the page

@pytest.mark.parametrize("middle, printed", [(.0098, "+0.98"), (.0101, "+1.01"), (.012, "+1.2"), (-.00996, "-0.996"),
                                             (.00003, "+0.003")])
def test_the_printed_middle_tells_whether_it_reaches_the_smallest_effect(middle, printed):
    c = dict(rival="a", difference=middle, low=middle - .03, high=middle + .03, seeds=5, groups=99)
    j = Judged({"effect": .01, "direction": "higher"}, "", "", "", "undecided", 1., (c,))
    assert j.value().startswith(f"{printed} points, 95% interval ")


def entry(name, p, verdict="supported", **more):
    claim, = check_claims([{**CLAIM, "id": name, **{k: v for k, v in more.items() if k in CLAIM}}])
    c = dict(rival="a", difference=.02, low=.01, high=.03, seed_low=0., seed_high=.1, seeds=5, groups=99, keys=["k"])
    return Judged(claim.model_dump(mode="json"), claim.hash(), "2026-01-31", more.get("setting", "toy"), verdict, p,
                  (c,) if p is not None else (), "" if p is not None else "no run")


def page(tmp_path, *found):
    save_claims(found, tmp_path / "10_x")
    return write_claims(tmp_path).read_text()


def verdict_of(text, name):
    return re.findall(r"\*\*(.+?)\*\*", next(line for line in text.splitlines() if f"claims/{name}.svg" in line))


def test_primary_claims_of_a_paper_are_corrected_together(tmp_path):
    found = [entry("one", .03), entry("two", .04), entry("three", .04, primary=False), entry("four", .03, paper="Q")]
    text = page(tmp_path, *found)
    assert verdict_of(text, "one") == verdict_of(text, "two") == ["undecided"]
    assert verdict_of(text, "three") == verdict_of(text, "four") == ["supported"]
    assert text.index("claims/two.svg") < text.index("further claims") < text.index("claims/three.svg")
    untested = entry("two", None, "not testable here")
    text = page(tmp_path, found[0], untested)
    assert verdict_of(text, "one") == ["supported"] and verdict_of(text, "two") == ["not testable here"]


def test_each_setting_is_a_repetition_with_a_bar_of_its_own(tmp_path):
    found = [entry(n, .03, setting=s) for n in ("one", "two") for s in ("emoji", "fonts")]
    assert verdict_of(page(tmp_path, *found[:1], *found[3:]), "one") == ["supported"]
    text = page(tmp_path, *found)
    assert verdict_of(text, "one") == ["undecided"] * 2 and "**undecided** (fonts)" in text
    assert (tmp_path / "claims" / "one.svg").read_text().count("<circle") == 2


def test_verdicts_that_changed_from_the_first_edition_are_listed(tmp_path):
    rows = ["claim,verdict,found,changed", "one,supported,+2.0 points,more seeds", "two,not supported,-1.0 points,a|b",
            "three,not supported,0 points,x", "four,supported,0 points,not judged again"]
    (tmp_path / "first_edition.csv").write_text("\n".join(rows))
    text = page(tmp_path, entry("one", .01), entry("two", .01, primary=False),
                entry("three", .5, "undecided", primary=False))
    changed = text.split("## What changed from the first edition")[1]
    assert "judged 3 of these claims" in changed and "as before for 2," in changed
    assert "not supported: -1.0 points | **supported**" in changed and "a\\|b" in changed
    assert "| supported: " not in changed and "not judged again" not in changed
    (tmp_path / "first_edition.csv").unlink()
    assert "first edition" not in page(tmp_path, entry("one", .01))


def test_registered_claims_that_wait_and_pictures_of_dropped_ones(tmp_path):
    nb = notebook(tmp_path / "x.ipynb", f"CLAIMS = {[{**CLAIM, 'id': n} for n in ('one', 'two')]!r}")
    write_preregistration([nb], tmp_path / "preregistration.md")
    assert "Registered and not judged yet: `two`." in page(tmp_path, entry("one", .01), entry("three", .01))
    assert "not judged yet" not in page(tmp_path, entry("one", .01), entry("two", .01))
    assert sorted(p.stem for p in (tmp_path / "claims").iterdir()) == ["one", "two"]


def test_pictures_are_svg_with_the_numbers_as_their_title():
    for low, high, arrows in ((.01, .03, 0), (-.06, .01, 1), (.01, .06, 1), (-.09, .09, 2), (.06, .09, 1)):
        j = entry("x", .5)
        j.contrasts[0].update(low=low, high=high, difference=(low + high) / 2)
        svg = interval_picture([j])
        xml.dom.minidom.parseString(svg)
        assert svg.count("Z\"") == arrows and "95% interval" in svg
        numbers = [float(x) for x in re.findall(r'(?:cx="|M|H)(-?[\d.]+)', svg)]
        assert min(numbers) >= 0 and max(numbers) <= 180
    assert "not tested" in interval_picture([entry("x", None, "not testable here")])
    assert "A &amp; B" in interval_picture([entry("x", .5, setting="A & B")])


def test_runs_keep_the_values_that_claims_are_about():
    "The list stands in an earlier notebook than the table; a clustering's F has no values of single queries."
    from hapnb.build import _KEPT
    from hapnb.statistics import SMALLEST_EFFECTS
    assert set(_KEPT) == set(SMALLEST_EFFECTS) - {"F"}
