"""Pictures hold what they were given, and say clearly what they cannot draw."""
import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from PIL import Image

from hapnb import plots

LEVELS = ["concept", "subgroup", "group"]


@pytest.fixture
def space():
    "Embeddings and 3-level labels of 48 items in 12 classes."
    fine = torch.arange(12).repeat(4)
    g = torch.Generator().manual_seed(0)
    return torch.randn(48, 8, generator=g), torch.stack([fine, fine // 2, fine // 4], 1)


def rows(seeds=3):
    models = enumerate(["a", "b"])
    return [dict(loss=l, seed=s, batch_size=b, AP=.2 + .1 * i + .01 * s) for i, l in models for s in range(seeds)
            for b in (16, 32)]


def test_top_k_against_a_plain_loop(space):
    emb, labels = space
    idx, shared = plots.top_k(emb, labels, range(48), k=5)
    for q in range(48):
        scores = [(-float(torch.cosine_similarity(emb[q], emb[j], dim=0)), j) for j in range(48) if j != q]
        assert idx[q].tolist() == [j for _, j in sorted(scores)[:5]]
        assert shared[q].tolist() == [int((labels[q] == labels[j]).sum()) for j in idx[q]]


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e37, 1e-200, 1e200])
def test_top_k_does_not_depend_on_lengths(space, scale):
    emb, labels = space
    found, _ = plots.top_k(emb.double() * scale, labels, [0, 7], 5)
    assert torch.equal(found, plots.top_k(emb, labels, [0, 7], 5)[0])


def test_top_k_keeps_duplicates_and_drops_the_query():
    emb = torch.ones(4, 3)
    idx, _ = plots.top_k(emb, torch.arange(4), [2, 3], k=3)
    assert idx.tolist() == [[0, 1, 3], [0, 1, 2]]


@pytest.mark.parametrize("queries", [[48], [-1]])
def test_top_k_names_a_query_that_does_not_exist(space, queries):
    with pytest.raises(ValueError, match="outside 0..47"): plots.top_k(*space, queries)


def test_panel_draws_every_image_once_per_model(space):
    images = [Image.new("RGB", (20, 10 + i), (i, 0, 0)) for i in range(48)]
    found = {n: plots.top_k(*space, [0, 5], k=4) for n in ("one", "two", "three")}
    idx, shared = ({n: f[i] for n, f in found.items()} for i in (0, 1))
    fig = plots.retrieval_panel(images, [0, 5], idx, shared, LEVELS)
    ax = fig.axes[0]
    marks = [t.get_text() for t in ax.texts if t.get_text().isdigit()]
    assert len(ax.images) == 2 + 2 * 3 * 4
    assert marks == [str(int(v)) for b in range(2) for n in found for v in shared[n][b]]
    assert len(fig.legends[0].get_texts()) == 4


def test_panel_of_an_unequal_model_is_refused(space):
    idx, sh = plots.top_k(*space, [0, 5], k=4)
    with pytest.raises(ValueError, match="'two'"):
        plots.retrieval_panel([], [0, 5], {"one": idx, "two": idx[:, :3]}, {"one": sh, "two": sh}, LEVELS)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_maps_repeat(space, method):
    def points():
        ax = plots.embedding_map(*space, method=method).axes[0]
        return np.concatenate([c.get_offsets() for c in ax.collections])
    assert points().shape == (48, 2)
    assert np.array_equal(points(), points())


def test_map_leaves_unknown_classes_out(space):
    emb, labels = space
    labels = labels.clone()
    labels[:4] = -1
    fig = plots.embedding_map(emb, labels)
    assert sum(len(c.get_offsets()) for c in fig.axes[0].collections) == 44


def test_figures_and_tables_have_one_interval():
    from hapnb import statistics
    values = [.31, .335, .32, .36]
    for level in (.9, .95): assert plots.interval(values, level) == statistics.interval(values, level)[:2]
    with pytest.raises(ValueError, match="between 0 and 1"): plots.interval(values, 95)


def test_dots_show_mean_and_interval():
    fig = plots.metric_dots(rows(), ["AP"])
    mean, half = plots.interval([20., 20., 21., 21., 22., 22.])
    line = fig.axes[0].containers[0]
    assert line[0].get_xdata()[0] == pytest.approx(mean)
    low, high = line[2][0].get_segments()[0][:, 0]
    assert (high - low) / 2 == pytest.approx(half)


def test_a_single_run_is_hollow_and_has_no_interval():
    box = plots.metric_dots(rows(1)[::2], ["AP"]).axes[0].containers[0]
    assert box[0].get_markerfacecolor() == "white" and box[2] == ()


def test_each_metric_has_a_panel_of_its_own_and_each_variant_a_colour():
    more = [{**r, "H-AP": 2 * r["AP"], "rate": v} for r in rows() for v in ("published", "tuned")]
    fig = plots.metric_dots(more, ["AP", "H-AP"], variant="rate")
    left, right = fig.axes
    assert [ax.get_title() for ax in fig.axes] == ["AP", "H-AP"] and left.get_xlim() != right.get_xlim()
    assert len({c[0].get_color() for c in left.containers}) == 2 and len(left.containers) == 4
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["published", "tuned"]


def test_a_map_of_differences_frames_the_reference():
    more = [{**r, "H-AP": 1 - r["AP"]} for r in rows()]
    ax = plots.difference_map(more, ["AP", "H-AP"]).axes[0]
    names = [t.get_text() for t in ax.get_yticklabels()]
    # b is best in AP, a in H-AP
    assert [names[round(p.get_y())] for p in ax.patches] == ["b", "a"]
    assert [t.get_text() for t in ax.texts][:2] == ["21.0\n-10.0", "79.0\n+0.0"]


def test_curve_has_one_line_per_model_and_log2_ticks():
    fig = plots.curve(pd.DataFrame(rows()), "batch_size", "AP", log2=True)
    ax = fig.axes[0]
    assert len(ax.lines) == 2 and [t.get_text() for t in ax.get_xticklabels()] == ["16", "32"]
    assert ax.lines[0].get_ydata() == pytest.approx([21, 21])


def test_loss_shape_breaks_the_line_at_a_jump():
    fig = plots.loss_shape({"step": lambda x: (x > 0).double()}, spans=(.1,))
    y = fig.axes[0].lines[1].get_ydata()
    assert np.isnan(y).sum() == 1


def test_history_from_a_file(tmp_path):
    pd.DataFrame({"epoch": [1, 2], "loss": [1., .5], "val/H-AP": [np.nan, .3]}).to_csv(tmp_path / "h.csv", index=False)
    fig = plots.training_curves({"run": tmp_path / "h.csv"})
    assert [a.get_ylabel() for a in fig.axes] == ["loss", "score (%)"]
    assert fig.axes[1].lines[0].get_ydata() == pytest.approx([30.])


def test_histogram_has_area_one_per_level(space):
    ax = plots.score_histogram(*space, LEVELS).axes[0]
    areas = [float((p.get_data().values * np.diff(p.get_data().edges)).sum()) for p in ax.patches]
    assert areas == pytest.approx([1.] * 4)


def test_figures_are_closed_and_saved_alike(space, tmp_path):
    before = plt.get_fignums()
    figs = [plots.score_histogram(*space) for _ in range(2)]
    assert all(isinstance(f, Figure) for f in figs) and plt.get_fignums() == before
    one, two = (plots.save(f, tmp_path / n, "h", ("png", "svg")) for n, f in zip("ab", figs))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    assert "date" not in one[1].read_text().lower().split("<g", 1)[0]


@pytest.mark.parametrize("call, message", [
    (lambda e, l: plots.embedding_map(e[:3], l), "labels have 48 rows"),
    (lambda e, l: plots.embedding_map(e / 0, l), "NaN or infinite values in row"),
    (lambda e, l: plots.score_histogram({"m": e[:3]}, l), "'m'"),
    (lambda e, l: plots.score_histogram(e * 0, l), "all zero"),
    (lambda e, l: plots.top_k(e * 0, l, [0], 3), "all zero"),
    (lambda e, l: plots.score_histogram(e, l, ["one"]), "1 level names for 3 levels"),
    (lambda e, l: plots.metric_dots([], ["AP"]), "no column"),
    (lambda e, l: plots.curve(rows(), "batch", "AP"), "no column 'batch'"),
    (lambda e, l: plots.loss_shape({}), "at least one"),
    (lambda e, l: plots.training_curves([dict(epoch=1)]), "nothing to draw"),
    (lambda e, l: plots.retrieval_panel([], [], {}, {}, LEVELS), "at least one model"),
])
def test_clear_errors(space, call, message):
    with pytest.raises(ValueError, match=message): call(*space)


# failed runs and surfaces

def crosses(ax): return [l for l in ax.lines if l.get_marker() == "x"]


def test_a_failed_setting_is_crossed_and_the_others_are_kept():
    def failed(r): return r["batch_size"] == 16 and (r["loss"] == "b" or r["seed"] == 2)
    broken = [{**r, "AP": np.nan} if failed(r) else r for r in rows()]
    ax = plots.curve(broken, "batch_size", "AP", log2=True).axes[0]
    assert [list(l.get_xdata()) for l in crosses(ax)] == [[16], [16]]
    assert [t.get_text() for t in ax.texts] == ["1 of 3 failed", "failed"]
    a, b = [l.get_ydata() for l in ax.lines if l.get_marker() != "x"]
    assert list(a) == pytest.approx([20.5, 21]) and np.isnan(b[0]) and b[1] == pytest.approx(31)
    lowest = ax.transData.transform((16, 20.5))[1]
    heights = [ax.transAxes.transform((0, l.get_ydata()[0]))[1] for l in crosses(ax)]
    assert max(heights) < lowest, "a cross hides a value"


def test_nothing_is_crossed_without_failures():
    ax = plots.curve(rows(), "batch_size", "AP").axes[0]
    assert crosses(ax) == [] and len(ax.texts) == 0


def square(bad=()):
    def ap(t, w, s): return np.nan if (t, w, s) in bad else .1 * t + .01 * w + .001 * s
    return [dict(tau=t, weight=w, seed=s, AP=ap(t, w, s)) for t in (1, 2) for w in (0, 3) for s in range(3)]


def cell_texts(ax): return {tuple(np.floor(t.get_position()).astype(int)): t.get_text() for t in ax.texts}


def test_surface_writes_mean_and_interval_into_each_cell():
    ax = plots.surface(square(), "tau", "weight", "AP", xlabel="tau (no unit)").axes[0]
    mean, half = plots.interval([10., 10.1, 10.2])
    text = cell_texts(ax)
    assert text[0, 0] == f"{mean:.1f}\n± {half:.1f}" and text[1, 1].startswith("23.1") and len(text) == 4
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "3"] and ax.get_ylim() == (0, 2)
    assert np.asarray(ax.collections[0].get_array()).ravel() == pytest.approx([10.1, 20.1, 13.1, 23.1])


def test_surface_says_what_failed_and_what_was_not_run():
    bad = {(1, 0, s) for s in range(3)} | {(2, 3, 1)}
    known = [r for r in square(bad) if (r["tau"], r["weight"]) != (2, 0)]
    ax = plots.surface(known, "tau", "weight", "AP").axes[0]
    text = cell_texts(ax)
    assert text[0, 0] == "failed" and text[1, 0] == "not run" and text[1, 1].endswith("1 of 3 failed")
    assert sorted((int(l.get_xdata()[0]), int(l.get_ydata()[0])) for l in crosses(ax)) == [(0, 0), (1, 1)]


def test_published_surface_has_a_scale_of_its_own():
    given = pd.DataFrame([dict(tau=t, weight=3, AP=60. + t) for t in (4, 8, 16)])
    fig = plots.surface(square(), "tau", "weight", "AP", given, label="AP (%)")
    ours, theirs = fig.axes[:2]
    assert [a.get_title() for a in (ours, theirs)] == ["measured here", "published"]
    assert [t.get_text() for t in theirs.texts] == ["64.0", "68.0", "76.0"]
    assert theirs.collections[0].norm.vmin == 64 and ours.collections[0].norm.vmax < 24
    assert [a.get_ylabel() for a in fig.axes[2:]] == ["AP (%)"] * 2


def test_surface_of_one_run_and_of_equal_values():
    one = [dict(tau=t, weight=0, seed=0, AP=.5) for t in (1, 2)]
    ax = plots.surface(one, "tau", "weight", "AP").axes[0]
    assert [t.get_text() for t in ax.texts] == ["50.0", "50.0"]


def test_surface_refuses_mixed_rows():
    for given, x, message in ((square() * 2, "tau", "tau 1, weight 0 and seed 0: something else varies"),
                              (square(), "lambda", "no column 'lambda'")):
        with pytest.raises(ValueError, match=message): plots.surface(given, x, "weight", "AP")


# names are text

NAMES = ["$10 to $20", "_other", r"x $\frac$ y", "a"]


def named_rows(column="loss"):
    return [{"seed": s, "x": x, column: n, "AP": .1 * i + .01 * s + .1 * x} for i, n in enumerate(NAMES)
            for s in range(2) for x in (1, 2)]


def panel(e, l):
    idx, shared = plots.top_k(e, l, [0], k=2)
    return plots.retrieval_panel([Image.new("RGB", (8, 8))] * 48, [0], dict.fromkeys(NAMES, idx),
                                 dict.fromkeys(NAMES, shared), NAMES[:3])


def history(): return [{"epoch": i, "loss $a$ and $b$": 1. / i} for i in (1, 2)]


def one(**fields): return [{"loss": "a", **fields}]


@pytest.mark.parametrize("draw, in_legend", [
    pytest.param(panel, (), id="panel"),
    pytest.param(lambda e, l: plots.embedding_map(e, torch.arange(48) // 12, names=NAMES), NAMES, id="map of classes"),
    pytest.param(lambda e, l: plots.embedding_map(dict.fromkeys(NAMES, e), l), (), id="maps of models"),
    pytest.param(lambda e, l: plots.metric_dots(named_rows(), ["AP"]), (), id="dots"),
    pytest.param(lambda e, l: plots.metric_dots([{**r, "b": 1} for r in named_rows()], ["AP"], "b", variant="loss"),
                 NAMES, id="dots of variants"),
    pytest.param(lambda e, l: plots.difference_map(named_rows(), ["AP"]), (), id="differences"),
    pytest.param(lambda e, l: plots.metric_dots(one(**{"$a$ $": .5}), ["$a$ $"]), (), id="dots of metrics"),
    pytest.param(lambda e, l: plots.curve(named_rows(), "x", "AP"), NAMES, id="curve"),
    pytest.param(lambda e, l: plots.curve(one(**{"$a$": 1, "$b$": .5}), "$a$", "$b$"), (), id="curve of columns"),
    pytest.param(lambda e, l: plots.surface(named_rows("y"), "x", "y", "AP"), (), id="surface"),
    pytest.param(lambda e, l: plots.loss_shape(dict.fromkeys(NAMES, torch.sigmoid)), NAMES, id="loss shape"),
    pytest.param(lambda e, l: plots.training_curves(dict.fromkeys(NAMES, history())), (), id="training"),
    pytest.param(lambda e, l: plots.score_histogram(dict.fromkeys(NAMES, e), l, NAMES[:3]), (), id="scores"),
])
def test_names_are_text_and_none_leaves_the_legend(space, draw, in_legend):
    fig = draw(*space)
    fig.savefig(io.BytesIO())  # a formula that cannot be read would raise here
    texts = [t for t in fig.findobj(Text) if t.get_visible()]
    assert not [t for t in texts if t.get_parse_math() and "$" in t.get_text() and "s_j" not in t.get_text()]
    assert any("$" in t.get_text() for t in texts)
    legends = [t.get_text() for l in fig.findobj(Legend) for t in l.get_texts()]
    assert set(in_legend) <= set(legends) and "x" not in legends


def test_captions_of_the_caller_may_hold_formulas():
    ax = plots.curve(rows(), "batch_size", "AP", xlabel=r"$\tau$", ylabel="$y$").axes[0]
    assert ax.xaxis.label.get_parse_math() and ax.yaxis.label.get_parse_math()
