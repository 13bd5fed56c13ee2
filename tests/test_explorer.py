"""The retrieval explorer: what the page holds against plain computation, and the page itself in a real browser."""
import base64, json, re, shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import chromium
from hapnb import explorer
from hapnb.cli import main
from hapnb.core import shared_levels
from hapnb.data import load
from hapnb.datasets import RetrievalDataset
from hapnb.explorer import explore, explore_runs, query_values, rank_all, visible
from hapnb.helpers import UserError
from hapnb.images import BytesStore, encode
from runs_kit import TOY, cache, toy_run  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (ROOT / "hapnb/assets/explorer.html").read_text(encoding="utf-8")
EVIL = "</script><img src=x onerror=window.harmed=1>"


def toy_models(n=2, dim=8, dataset=None):
    "The toy test images with made-up embeddings: one direction per class, and noise."
    dataset = dataset or load("toy", "test")
    models = {}
    for i in range(n):
        g = torch.Generator().manual_seed(i)
        z = torch.randn(int(dataset.labels[:, 0].max()) + 1, dim, generator=g)[dataset.labels[:, 0]]
        models["AB"[i]] = z + (1 + i / 2) * torch.randn(z.shape, generator=g)
    return models, dataset


def drawn(n, size=24, seed=0):
    "Encoded images of random pixels, which compress badly."
    r = np.random.default_rng(seed)
    return [encode(Image.fromarray(r.integers(0, 255, (size, size, 3), dtype=np.uint8))) for _ in range(n)]


def made_dataset(labels, names=None, levels=("species", "genus"), store=None, **kw):
    labels = torch.tensor(labels)
    names = names or [[f"{l} {c}" for c in range(int(y.max()) + 1)] for l, y in zip(levels, labels.T)]
    store = store or BytesStore(drawn(len(labels)), [f"{i}.png" for i in range(len(labels))])
    return RetrievalDataset(store, labels, names, levels, "made", "test", **kw)


def unpacked(text, kind): return np.frombuffer(base64.b64decode(text), kind)


# what the page holds

@pytest.mark.parametrize("protocol", [{}, {"kind": "disjoint"}, {"kind": "query-gallery"}])
def test_ranks_are_those_of_a_loop(protocol):
    r = np.random.default_rng(0)
    fine = r.integers(0, 9, 60)
    # corners of a cube: exact products, many of them equal, which are ordered by index
    y, z = torch.tensor(np.stack([fine, fine // 3], 1)), torch.tensor(r.choice([-1., 1.], (60, 4)))
    meta = pd.DataFrame(dict(author=r.integers(0, 5, 60).astype(str), part=r.choice(["query", "gallery"], 60)))
    asks, see = visible(protocol, meta, 60)
    ids, cosines, first = rank_all(z, y, asks, see, 60)
    assert len(asks) == (60 if protocol.get("kind") != "query-gallery" else (meta["part"] == "query").sum())
    for row, q in enumerate(asks.tolist()):
        may = [i for i in range(60) if i != q]
        if protocol.get("kind") == "disjoint": may = [i for i in may if meta["author"][i] != meta["author"][q]]
        if protocol.get("kind") == "query-gallery": may = [i for i in may if meta["part"][i] == "gallery"]
        want = sorted(may, key=lambda i: (-float(z[q] @ z[i]), i))
        assert ids[row, :len(may)].tolist() == want and (ids[row, len(may):] == -1).all()
        for l in (0, 1):
            hits = [n for n, i in enumerate(want, 1) if y[i, l] == y[q, l]]
            assert int(first[row, l]) == (hits[0] if hits else 0)


def test_values_on_the_page_are_those_of_the_data():
    models, dataset = toy_models()
    page = explore(models, dataset, queries=20)
    d = page.data
    assert (d["listed"], d["ranked"], len(d["names"])) == (20, len(dataset), len(dataset))
    names, rows = [m["name"] for m in d["metrics"]], [dataset.store.names.index(n) for n in d["names"]]
    rows = [dataset.index.tolist().index(r) for r in rows]
    labels = unpacked(d["labels"], "<i4").reshape(-1, 2)
    assert (labels == dataset.labels[rows].numpy()).all()
    for run, (name, z) in zip(d["runs"], models.items()):
        values = unpacked(run["values"], "<f4").reshape(len(rows), -1)
        known = query_values(z, dataset)
        for text, key in (("H-AP", "H-AP"), ("AP, hue", "AP_level0"), ("R@1, shape", "R@1_level1")):
            assert np.array_equal(values[:, names.index(text)], known[key][rows])
        first = values[:, names.index("first same hue")]
        assert ((first == 1) == (known["R@1_level0"][rows] == 1)).all()
        ids = unpacked(run["ids"], "<i4").reshape(len(rows), -1)
        scores = unpacked(run["scores"], "<i2").reshape(ids.shape) / 10000
        unit = torch.nn.functional.normalize(z, dim=1)[rows]
        assert np.allclose(scores, (unit @ unit.T).gather(1, torch.from_numpy(ids.astype(np.int64))), atol=1e-4)
        assert (np.diff(scores, axis=1) <= 0).all()


def test_a_thousand_queries_fit_in_15_megabytes(monkeypatch):
    dataset = load("emoji", "test")
    r, N = np.random.default_rng(0), len(dataset)
    values = {n: {m: r.random(N).astype("f4") for m in ("H-AP", "AP_level0", "AP_level1")} for n in "ab"}
    # the size does not depend on who is where
    def anyhow(emb, labels, rows, see, k): return torch.randint(N, (N, k)), torch.rand(N, k), torch.randint(N, (N, 3))
    monkeypatch.setattr(explorer, "rank_all", anyhow)
    page = explore({n: torch.randn(len(dataset), 8) for n in "ab"}, dataset, 1000, values)
    text = page.html()
    assert len(text.encode()) <= 15e6 and len(page.data["pictures"]) == len(dataset) and page.data["missing"] == 0
    assert page.data["listed"] == 1000 and "1,000 of 6,320 queries" in page.data["notes"][0]


def test_images_become_smaller_until_the_page_is_small_enough(monkeypatch):
    monkeypatch.setattr(explorer, "_MOST", 300_000)
    dataset = made_dataset([[i // 2, i // 6] for i in range(120)], store=BytesStore(drawn(120, 128), range(120)))
    assert len(explore({"a": torch.randn(120, 4)}, dataset).html()) < 300_000


def test_a_large_gallery_keeps_queries_and_their_results_only(monkeypatch):
    monkeypatch.setattr(explorer, "_HOLDS", 60)
    dataset = made_dataset([[i // 2, i // 6] for i in range(120)])
    d = explore({"a": torch.randn(120, 4)}, dataset, queries=5).data
    assert (d["listed"], d["ranked"]) == (5, 5) and d["k"] < 30 and len(d["names"]) <= 60
    assert unpacked(d["runs"][0]["ids"], "<i4").min() >= 0


def test_the_page_is_one_file_and_its_script_sets_text_only():
    page = explore(*toy_models()).html()
    assert re.findall(r"https?:|url\(|@import|<link|srcset|fetch\(|XMLHttp|import\(", page) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", TEMPLATE) == []
    assert "default-src 'none'" in page


@pytest.mark.parametrize("name", [EVIL, '"><b onclick=1>', "<!--<script>", "\u2028\ud800", "/*DATA*/"])
def test_names_cannot_leave_the_block_of_data(name):
    dataset = made_dataset([[0, 0], [0, 0], [1, 0]], [[name, "b"], [name]], (name, "genus"),
                           BytesStore(drawn(3), [name, "b", "c"]))
    page = explore({name: torch.eye(3)}, dataset).html()
    assert page.count("</script>") == 2
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    assert not set("<>&") & set(block)
    d = json.loads(block)
    assert d["classes"][0][0] == d["levels"][0] == d["names"][0] == d["runs"][0]["name"] == name


def test_unreadable_images_are_counted_and_unknown_classes_have_no_metric():
    store = BytesStore([*drawn(4), b"", b"no image"], [f"{i}.png" for i in range(6)])
    page = explore({"a": torch.randn(6, 3)}, made_dataset([[-1]] * 6, [[]], ("class",), store))
    assert page.data["missing"] == 2 and [p is None for p in page.data["pictures"]] == [False] * 4 + [True] * 2
    assert "2 of 6 images could not be read" in page.data["notes"][-1] and not page.data["labelled"]
    assert [m["kind"] for m in page.data["metrics"]] == ["cosine"]
    assert base64.b64decode(page._repr_png_()[0])[:4] == b"\x89PNG"


def test_absolute_paths_do_not_tell_where_the_home_folder_is(tmp_path):
    for i in range(4):
        at = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(drawn(1, seed=i)[0])
    dataset = load("folder", "all", tmp_path / "photos")
    page = explore({"a": torch.randn(4, 3)}, dataset)
    assert sorted(page.data["names"]) == ["a/0.png", "a/2.png", "b/1.png", "b/3.png"]
    assert str(tmp_path) not in page.html()


@pytest.mark.parametrize("models, words", [
    ({}, "one model or two, got 0"), ({"a": torch.ones(3, 2)}, "3 rows for"),
    ({"a": torch.full((30, 2), torch.nan)}, "NaN")])
def test_embeddings_that_do_not_fit_are_named(models, words):
    with pytest.raises(ValueError, match=words): explore(models, made_dataset([[i // 2, i // 6] for i in range(30)]))


# runs, folders and the command

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Folders of images, two classes of a genus each."
    root = tmp_path_factory.mktemp("photos") / "here"
    for i, picture in enumerate(drawn(48, 16)):
        at = root / f"genus {i % 8 // 2}" / f"species {i % 8}" / f"{i}.webp"
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(picture)
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory, photos):
    "A store with runs: two on the toy images, one on photos that have moved, and one that did not end."
    store = tmp_path_factory.mktemp("world") / "store"
    short = TOY.replace(epochs=1)
    names = dict(a=toy_run(short, store), b=toy_run(short.replace(loss="NormSoftmaxLoss"), store),
                 c=toy_run(short.replace(seed=1), store), val=toy_run(short.replace(split="val"), store))
    kept = photos.with_name("before")
    shutil.copytree(photos, kept)
    names["moved"] = toy_run(short.replace(dataset="folder", data_dir=str(kept), batch_size=8), store)
    kept.rename(photos.with_name("after"))
    (store / "0f0f0f0f0f0f0f0f").mkdir()
    (store / "0f0f0f0f0f0f0f0f/config.json").write_text("{}")
    return {"store": store, **names}


@pytest.fixture
def call(world, tmp_path, monkeypatch, capsys):
    "Call `hapnb view`; {a} and so on are keys of runs."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()

    def view(*argv):
        keys = {k: getattr(v, "key", v) for k, v in world.items()}
        line = [str(a).format(**keys, tmp=tmp_path) for a in argv]
        status = main(["view", *line, "--store", str(world["store"]), "--device", "cpu"])
        return status, *capsys.readouterr()
    return view


def data_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', Path(path).read_text(encoding="utf-8"), re.S)[1])


def test_two_runs_by_the_command(call, tmp_path, world):
    status, out, err = call("--run", "{a}", "--run2", "{b}", "--out", "two.html", "--queries", "30")
    assert (status, err) == (0, "") and "two.html" in out and "30 of" in out
    d = data_of("two.html")
    assert [r["name"] for r in d["runs"]] == [TOY.loss, "NormSoftmaxLoss"] and world["a"].key in d["runs"][0]["about"]
    status, _, _ = call("--run", "{a}", "--run2", "{c}")
    assert status == 0 and [r["name"] for r in data_of("explorer.html")["runs"]] == [
        f"{TOY.loss} ({world[k].key[:6]})" for k in "ac"]


def test_stored_values_of_runs_are_those_of_claims(world):
    page, kept = explore_runs(world["a"]), world["a"].per_query()
    rows = [world["a"].dataset().index.tolist().index(i) for i in
            [world["a"].dataset().store.names.index(n) for n in page.data["names"]]]
    values = unpacked(page.data["runs"][0]["values"], "<f4").reshape(len(rows), -1)
    assert np.array_equal(values[:, 0], kept["H-AP"][rows], equal_nan=True)


def test_images_that_have_moved_are_grey_until_it_is_said_where_they_are(call, world, photos):
    status, out, _ = call("--run", "{moved}")
    n = len(world["moved"].labels())
    assert status == 0 and f"{n} of {n} images could not be read" in out and "cannot be loaded" in out
    assert set(data_of("explorer.html")["pictures"]) == {None}
    status, out, _ = call("--run", "{moved}", "--data-dir", photos.with_name("after"))
    assert status == 0 and data_of("explorer.html")["missing"] == 0
    assert data_of("explorer.html")["classes"][0][0].startswith("genus")
    status, _, err = call("--run", "{moved}", "--data-dir", "empty")
    assert status == 2 and "which are not in" in err


def test_own_images_with_and_without_classes(call, photos, tmp_path):
    status, out, _ = call("--dataset", "folder", "--data-dir", photos, "--trunk", "toy")
    d = data_of("explorer.html")
    assert status == 0 and d["listed"] == 48 and d["labelled"] and len(d["classes"][1]) == 4
    for p in photos.rglob("*.webp"): shutil.copy(p, tmp_path / "empty")
    status, out, _ = call("--dataset", "folder", "--data-dir", "empty", "--trunk", "toy", "--out", "flat.html")
    d = data_of("flat.html")
    assert status == 0 and d["listed"] == 48 and not d["labelled"] and d["title"] == "toy on empty, all images"


@pytest.mark.parametrize("line, words", [
    ("", "give --run KEY, or --dataset NAME"),
    ("--run2 {a}", "--run2 is compared with --run"),
    ("--run zzzz", "0 finished runs"),
    ("--run {a} --run2 zzzz", "begin with 'zzzz'"),
    ("--run {a} --run2 {a}", "given twice"),
    ("--run 0f0f", "did not end (training diverged, or was stopped)"),
    ("--run {a} --dataset emoji", "was evaluated on toy, not on emoji"),
    ("--run {a} --dataset emojy", "Did you mean 'emoji'"),
    ("--run {a} --run2 {moved}", "only on the same images"),
    ("--run {a} --run2 {val}", "only on the same images"),
    ("--run {a} --trunk toy", "--trunk is without a run"),
    ("--run {a} --split all", "--split is without a run"),
    ("--run {a} --data-dir nowhere", "no such file or folder"),
    ("--run {a} --out page.txt", "ends in .html"),
    ("--run {a} --queries 0", "'0' is not a whole number"),
    ("--dataset folder", "data_dir is missing"),
    ("--dataset folder --data-dir empty", "found none"),
    ("--dataset toy --split tset --trunk toy", "Did you mean 'test'"),
    ("--dataset toy --trunk tyo", "unknown trunk"),
])
def test_wrong_command_lines_say_what_to_do(call, line, words):
    status, out, err = call(*line.split())
    assert status == 2 and words in err and "Traceback" not in err, err
    assert not list(Path().glob("*.html"))


def test_runs_of_different_protocols_are_not_compared(world, monkeypatch):
    monkeypatch.setitem(world["b"].environment["data"], "protocol", {"kind": "disjoint"})
    with pytest.raises(UserError, match="retrieve from different galleries"): explore_runs(world["a"], world["b"])


def test_the_notebook_shows_a_frame_or_a_picture(monkeypatch):
    page = explore(*toy_models(), queries=5)
    for name in explorer._FRONT_ENDS: monkeypatch.delenv(name, raising=False)
    assert page._repr_html_() is None and page._repr_png_()[1]["alt"].startswith("Three queries")
    monkeypatch.setenv("VSCODE_PID", "1")
    assert page._repr_png_() is None and 'sandbox="allow-scripts"' in page._repr_html_()


# the page in a browser

@pytest.fixture(scope="module")
def browser():
    if chromium.FOUND is None: pytest.skip(chromium.WHY_NOT)
    opened = chromium.Browser()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "A page of two models on the toy images, and the page's data."
    page = explore(*toy_models())
    return page.save(tmp_path_factory.mktemp("page") / "two.html"), page


ROWS = "[...document.querySelectorAll('#list [data-row]')].map(b => +b.dataset.row)"
NAME = "document.querySelector('#name').textContent"
PICK = "(id, v) => { const e = document.getElementById(id); e.value = v; e.dispatchEvent(new Event('input')); }"
FLAWS = """(() => {
  const flaws = [], seen = e => e.offsetParent !== null && getComputedStyle(e).visibility === "visible";
  for (const i of document.querySelectorAll("img, [role=img]"))
    if (!(i.alt || i.ariaLabel)) flaws.push("no alt: " + i.outerHTML.slice(0, 80));
  let level = 0;
  for (const h of document.querySelectorAll("h1, h2, h3, h4")) {
    if (seen(h) && +h.tagName[1] > level + 1) flaws.push("heading jumps: " + h.textContent);
    if (seen(h)) level = +h.tagName[1];
  }
  if (document.querySelectorAll("h1").length !== 1) flaws.push("not one h1");
  for (const e of document.querySelectorAll("button, input, select"))
    if (seen(e) && !(e.textContent.trim() || e.labels?.length || e.ariaLabel)) flaws.push("no name: " + e.id);
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = {}, rgb = text => known[text] ??= (canvas.clearRect(0, 0, 1, 1), canvas.fillStyle = text,
    canvas.fillRect(0, 0, 1, 1), [...canvas.getImageData(0, 0, 1, 1).data]);
  const light = c => [.2126, .7152, .0722].reduce((sum, w, i) => { const v = c[i] / 255;
    return sum + w * (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); }, 0);
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c[3] > 200) return c; } return [255, 255, 255]; };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !seen(e) || e.closest(":disabled, script, noscript, option")) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) flaws.push(`contrast ${ratio.toFixed(1)}: ${e.textContent.slice(0, 40)}`);
  }
  if (document.documentElement.scrollWidth > innerWidth) flaws.push("wider than the window");
  return [...new Set(flaws)];
})()"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_works_by_clicks(browser, two, width, dark):
    path, page = two
    browser.errors.clear()
    browser.open(path, width, 844, dark)
    assert browser.js(FLAWS) == []
    white = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", white)[:3])) < 200) == dark
    # a click on the second result makes it the query, and Back returns
    first = browser.js(NAME)
    assert browser.js("document.querySelector('#runs .tiles').children.length") == 10
    to = unpacked(page.data["runs"][0]["ids"], "<i4").reshape(-1, page.data["k"])[browser.js(ROWS)[0], 1]
    browser.js("document.querySelectorAll('.tile')[1].click()")
    labels = unpacked(page.data["labels"], "<i4").reshape(-1, 2)
    assert browser.js(NAME) == page.data["classes"][0][labels[to, 0]] and browser.js("location.hash") == f"#query={to}"
    browser.js("document.getElementById('back').click()")
    assert browser.js(NAME) == first and browser.js("document.getElementById('back').disabled")
    browser.js("(e => { e.value = 30; e.dispatchEvent(new Event('input')); })(document.querySelector('[type=range]'))")
    assert browser.js("document.querySelectorAll('.tile').length") == 2 * min(30, page.data["k"])
    assert browser.js(FLAWS) == [] and browser.errors == []


def test_the_list_is_in_the_order_of_plain_computation(browser, two):
    path, page = two
    M = len(page.data["metrics"])
    tables = [unpacked(r["values"], "<f4").astype(float).reshape(-1, M) for r in page.data["runs"]]
    browser.open(path)
    for m in range(M):
        for of, values in (("difference", tables[1] - tables[0]), ("0", tables[0]), ("1", tables[1])):
            for order in (1, -1):
                v = values[:page.data["listed"], m]
                key = np.where(np.isnan(v), np.inf, order * v)
                wanted = {"metric": m, "of": of, "order": order}
                browser.js(";".join(f"({PICK})('{id}', '{value}')" for id, value in wanted.items()))
                got = browser.js(ROWS)
                assert got == np.argsort(key, kind="stable")[:len(got)].tolist() and len(got) == min(100, len(v))
    while browser.js("!!document.querySelector('.more')"): browser.js("document.querySelector('.more').click()")
    assert sorted(browser.js(ROWS)) == list(range(page.data["listed"]))


def test_filters_leave_the_queries_that_were_asked_for(browser, two):
    path, page = two
    labels = unpacked(page.data["labels"], "<i4").reshape(-1, 2)
    names = [page.data["classes"][1][c] for c in labels[:, 1]]
    browser.open(path)
    browser.js(f"({PICK})('level', '1')")
    browser.js(f"({PICK})('text', '{names[3][:4].upper()}')")
    want = [i for i in range(page.data["listed"]) if names[3][:4] in names[i]]
    assert f"{len(want)} of" in browser.js("document.getElementById('count').textContent")
    browser.js(f"({PICK})('text', '')")
    ids = unpacked(page.data["runs"][0]["ids"], "<i4").reshape(-1, page.data["k"])
    shared = [int((labels[i] == labels[ids[i, 0]]).sum()) for i in range(page.data["listed"])]
    for n in (0, 1, 2):
        browser.js(f"({PICK})('first', '{n}')")
        assert browser.js("state.rows.length") == shared.count(n)
    browser.js(f"({PICK})('text', 'no such class')")
    assert browser.js(ROWS) == [] and browser.errors == []


def test_keys_walk_along_the_list_and_the_results(browser, two):
    browser.open(two[0])
    rows = browser.js(ROWS)
    query = "+document.querySelector('[data-row][aria-current=true]')?.dataset.row"
    for key, row in (("ArrowDown", rows[1]), ("ArrowDown", rows[2]), ("ArrowUp", rows[1])):
        browser.press(key)
        assert browser.js(query) == row
    browser.press("Backspace")
    assert browser.js(query) == rows[2]
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"): browser.press(key)
    to = browser.js("state.query * D.k + 1")
    browser.press("Enter")
    assert browser.js(f"state.query === D.runs[0].ids[{to}]")
    browser.press("/")
    assert browser.js("document.activeElement.id") == "text"
    browser.press("x")
    assert browser.js("document.getElementById('text').value") == "x"
    browser.press("Escape")
    browser.press("?")
    assert browser.js("document.getElementById('help').open") and browser.errors == []


def test_hostile_names_are_text(browser, tmp_path):
    dataset = made_dataset([[0, 0], [0, 0], [1, 0]], [[EVIL, "b"], [EVIL]], (EVIL, "genus"),
                           BytesStore([*drawn(2), b"gone"], [EVIL, "b", "c"]))
    browser.errors.clear()
    browser.open(explore({EVIL: torch.eye(3)}, dataset).save(tmp_path / "evil.html"), fragment="#query=0")
    assert browser.js(NAME) == EVIL and browser.js("window.harmed") is None
    assert browser.js("document.querySelectorAll('[onerror]').length") == 0 and browser.js(FLAWS) == []
    assert browser.errors == [] and browser.js("document.querySelectorAll('.gone').length") >= 1


def test_images_without_classes_and_a_frame_of_a_notebook_work(browser, tmp_path):
    page = explore({"a": torch.randn(6, 3)}, made_dataset([[-1]] * 6, [[]], ("class",)))
    browser.errors.clear()
    browser.open(page.save(tmp_path / "flat.html"))
    assert browser.js(FLAWS) == [] and browser.js("document.querySelectorAll('.mark').length") == 0
    (tmp_path / "frame.html").write_text(f"<!doctype html><title>a notebook</title>{page.frame()}")
    browser.open(tmp_path / "frame.html")
    # the frame may not be read from outside; its messages would reach us
    assert browser.js("document.querySelector('iframe').contentDocument") is None
    assert browser.errors == []
