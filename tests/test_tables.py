"""Tables in three formats with marks and provenance, claims and their page, published values."""
import io, json, time
from pathlib import Path

import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from hapnb.helpers import Damaged
from hapnb.tables import (
    _digits, made_by, make_table, published, save_figure, save_table)
from toy_study import toy_rows


@pytest.fixture
def table():
    scores = {"a": [.30, .31, .32], "b_1": [.41, .42, .44], "c|d": [.40, .43, .43], "e": [.2, np.nan, np.nan]}
    rows = toy_rows(scores).assign(loss=lambda r: -r.score)
    return make_table(rows, "method", {"score": "Score %", "loss": "loss"}, published={"a": {"score": 59.4}},
                      caption="A & B", footer="made by x_y")


def marks(table, column="score"): return {r[0]: c.mark for (r, k), c in table.cells.items() if k == column}


def test_table_marks_the_best_and_the_undecided(table):
    # "e" has one seed: not tested
    assert marks(table) == {"a": "", "b_1": "best", "c|d": "tie", "e": ""}
    rows = toy_rows({"a": [.30, .31, .32], "b": [.41, .42, .44], "c": [.40, .43, .43]})
    assert marks(make_table(rows, "method", "score")) == {"a": "", "b": "best", "c": "tie"}
    assert marks(make_table(rows, "method", "score", lower=("score",)))["a"] == "best"


def test_markdown(table):
    text = table.to_markdown()
    assert text == table._repr_markdown_()
    for part in ("| a | 31.0 ± 2.5 |", "c\\|d", "made by x_y", "20.0 (2 failed)", "Score % (published)", "59.4",
                 "not measured here"): assert part in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_csv_reads_back(table):
    frame = pd.read_csv(io.StringIO(table.to_csv()))
    assert frame["score"].tolist() == [31.0, 42.3333, 42.0, 20.0] and frame["score seeds"].tolist() == [3, 3, 3, 1]
    assert frame["score published"][0] == 59.4 and frame["made_by"].eq("made by x_y").all()


def test_latex(table):
    text = table.to_latex()
    for part in (r"b\_1", r"Score \%", r"\caption{A \& B}", r"\textbf{42.3 $\pm$ 3.8}"): assert part in text
    body = [l for l in text.splitlines() if l.endswith(r"\\")]
    assert {l.replace(r"\&", "").count("&") for l in body} == {3} and text.count("{") == text.count("}")


def test_columns_spread_one_metric():
    rows = pd.concat([toy_rows({"a": [.3, .31], "b": [.4, .42]}, batch=b) for b in (16, 64)])
    t = make_table(rows, "method", "score", columns="batch", digits=2)
    assert "| method | batch 16 | batch 64 |" in t.to_markdown() and t.cells[("b",), 64].mark == "best"
    with pytest.raises(ValueError, match="spreads one metric"):
        make_table(rows, "method", ["score", "seed"], columns="batch")


def test_a_table_survives_methods_without_common_seeds():
    scores = [("a", 0, .9), ("a", 1, .8), ("b", 2, .1), ("b", 3, .2), ("c", 0, .5), ("c", 1, .6)]
    cells = make_table(pd.DataFrame(scores, columns=["method", "seed", "score"]), "method", "score").cells
    assert cells[("a",), "score"].mark == "best"
    assert cells[("b",), "score"].n == 2 and cells[("b",), "score"].mark == ""


def test_saving_is_deterministic_and_atomic(tmp_path, table):
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    ax.legend(["x"])
    def save(): return [Path(p).read_bytes() for p in [*save_figure(fig, tmp_path / "new", "f"),
                                                       *save_table(table, tmp_path / "new")]]
    first = save()
    # a date in a file would show after a second
    time.sleep(1.1)
    assert save() == first
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["f.png", "f.svg", "main.csv", "main.md", "main.tex"]
    plt.close(fig)


def test_provenance_comes_from_finished_runs_and_is_checked(tmp_path):
    from hapnb.config import RunConfig
    from hapnb.runs import run
    cfg = RunConfig(dataset="toy", image_size=32, epochs=1, batch_size=24, embed_dim=8, trunk="toy", loss="SupAPLoss")
    key = run(cfg, tmp_path, "cpu", progress=False).key
    line = made_by("smoke", "toy", 1, "cpu", tmp_path, [key, "not finished"])
    assert "profile smoke; data toy; 1 seeds; commit " in line and "torch 2." in line
    file = tmp_path / key / "environment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "commit": "0" * 40}))
    with pytest.raises(Damaged, match="environment.json"): made_by("smoke", "toy", 1, "cpu", tmp_path, [key])


# digits of an interval

@pytest.mark.parametrize("low, high, margin, printed", [
    (.0003, .0021, 0., "+0.03 to +0.21"), (.00004, .0021, 0., "+0.004 to +0.210"), (.0006, .0021, 0., "+0.1 to +0.2"),
    (-.0003, .0021, 0., "-0.0 to +0.2"), (-.0096, .02, -.01, "-0.96 to +2.00"), (-.0104, .02, -.01, "-1.0 to +2.0"),
    (.0096, .02, .01, "+1.0 to +2.0"), (.0104, .02, .01, "+1.04 to +2.00"), (-.004, -.0003, 0., "-0.40 to -0.03"),
    (-.004, .0003, 0., "-0.4 to +0.0"), (-.03, -.0103, -.01, "-3.00 to -1.03")])
def test_the_printed_interval_tells_the_verdict(low, high, margin, printed):
    "As many decimals as it takes to see on which side of the edge a bound lies, and one where that is enough."
    number = _digits((low, margin), (-high, -min(margin, 0.)))
    assert f"{number(low)} to {number(high)}" == printed


# published results

def test_published_rows_are_facts_with_sources():
    p = published()
    assert len(p) == 344
    assert list(p.columns) == ["paper", "dataset", "backbone", "method", "metric", "value", "source"]
    assert p.notna().all().all() and p["value"].between(0, 100).all() and p["source"].str.len().min() > 10
    assert not p.duplicated(["paper", "dataset", "backbone", "method", "metric"]).any()
    assert not p.map(lambda v: isinstance(v, str) and v != v.strip()).any().any()


@pytest.mark.parametrize("wanted, value", [
    (dict(dataset="CUB-200-2011", backbone="ResNet-50", method="HIST TUNE (Bayesian search)", metric="R@1"), 72.3),
    (dict(dataset="SOP", backbone="BN-Inception", method="HIST RE (reproduced)", metric="NMI"), 89.9),
    (dict(dataset="CARS196", method="HIST, distance Euclidean", metric="R@1"), 87.2),
    (dict(method="HIST embedding 512 hidden 512"), 90.22),
    (dict(method="HIST tau 8 lambda_s 1.5"), 78.63),
    (dict(dataset="SOP", method="HAPPIER_F"), 81.8),
    (dict(dataset="CARS196", backbone="ResNet-50", method="Proxy-Anchor 512-d", metric="R@1"), 87.7),
    (dict(dataset="IMDB (unseen dist.)", metric="NMI"), .953)])
def test_published_values(wanted, value): assert published(**wanted)["value"].tolist() == [value]


def test_published_filters_and_gives_a_copy():
    p = published(dataset=["SOP", "CARS196"], metric="R@1")
    assert set(p["dataset"]) == {"SOP", "CARS196"} and set(p["metric"]) == {"R@1"}
    assert list(p.index) == list(range(len(p)))
    assert published(dataset="SOP", method="HIST tau 8 lambda_s 1.5").empty
    with pytest.raises(ValueError, match="Did you mean 'ResNet-50'"): published(backbone="ResNet50")
    p = published()
    p["value"] = 0.
    assert published()["value"].gt(0).all()
