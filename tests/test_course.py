"""The course: lessons keep their limits, checks name mistakes, students' notebooks are in step, nbgrader grades."""
import copy, importlib, json, os, re, shutil, subprocess, sys, time
from pathlib import Path

import papermill
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
import course as tool
from hapnb import course, course_widgets
from hapnb.course_images import lesson_images, lesson_rows
from hapnb.data import load

SOURCES = sorted((ROOT / "nbs" / "course" / "source").glob("[0-9]*.ipynb"))
for path in sorted((ROOT / "hapnb").glob("lesson[0-9]*.py")): importlib.import_module(f"hapnb.{path.stem}")
EXERCISES = list(course.EXERCISES.values())
MISTAKES = [(ex, message) for ex in EXERCISES for message in ex.mistakes]
name = lambda x: x.stem if isinstance(x, Path) else getattr(x, "id", None)


def read(path): return json.loads(path.read_text(encoding="utf-8"))
def code_cells(nb): return [c for c in nb["cells"] if c["cell_type"] == "code"]
def prose(nb): return "\n".join(tool.source(c) for c in nb["cells"] if c["cell_type"] == "markdown")


# exercises

@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ex", EXERCISES, ids=name)
def test_the_reference_solution_is_right(ex, seed): assert course.diagnose(ex, ex.solution, seed) == ""


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("ex, message", MISTAKES, ids=lambda x: name(x) or x[:40])
def test_each_mistake_is_named(ex, message, seed):
    assert message in course.diagnose(ex, ex.mistakes[message], seed)


@pytest.mark.parametrize("ex", EXERCISES, ids=name)
def test_each_exercise_has_hints(ex): assert len(ex.hints) >= 2 and len(ex.mistakes) >= 3


def prints(x, y): print(x @ y.T)
def never_ends(x, y):
    while True: pass
def leaves(x, y): raise SystemExit("bye")
def spoils(queries, gallery):
    queries /= queries.norm(dim=1, keepdim=True)
    return queries @ (gallery / gallery.norm(dim=1, keepdim=True)).T
def one_query_only(x, y): return torch.cosine_similarity(x[:1], y)[None]
def in_a_loop(x, y): return torch.stack([torch.cosine_similarity(row[None], y) for row in x])


@pytest.mark.parametrize("answer, message", [
    (None, "type is NoneType"), (..., "no `cosine` in this notebook"), (lambda x, y: None, "returns None"),
    (prints, "prints its result"), (leaves, "SystemExit: bye"), (lambda x: x, "takes 1 positional argument"),
    (lambda x, y: "cosine", "type str"), (spoils, "changes its arguments"),
    (one_query_only, "right for one query, but wrong for three queries: wrong shape: got [1, 5], expected [3, 5]"),
    (lambda x, y: -torch.cosine_similarity(x[:, None], y[None], dim=2), "sign is wrong"),
    (lambda x, y: torch.cosine_similarity(x[:, None], y[None], dim=2).T, "transposed"),
    (in_a_loop, "uses a loop (`x`)"), (lambda x, y: x.sum(1)[:, None] * torch.nan * y.sum(1), "NaN")])
def test_what_check_says_about_a_bad_answer(answer, message):
    report = course.check("1.1", answer)
    assert not report and message in report.text, report.text


def test_an_answer_that_never_ends_is_stopped():
    start = time.monotonic()
    assert "did not end in time" in course.diagnose(course.find_exercise("1.1"), never_ends, limit=.3)
    assert time.monotonic() - start < 20


def test_hints_come_one_after_the_other():
    hints = [course.hint("2.2").text for _ in range(4)]
    assert [h.split(" for")[0] for h in hints] == ["Hint 1 of 3", "Hint 2 of 3", "Hint 3 of 3", "Hint 3 of 3"]


# notebooks

@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_lesson_has_what_a_lesson_needs(path):
    nb, text = read(path), prose(read(path))
    for c in code_cells(nb):
        lines = [line for line in tool.source(c).splitlines() if line.strip() and not line.strip().startswith("###")]
        assert len(lines) <= 10, f"cell {c['id']} has {len(lines)} lines"
        for out in c["outputs"]:
            if "image/png" in out.get("data", {}): assert out["metadata"]["image/png"]["alt"], "a picture without text"
    assert [c for c in code_cells(nb) if c["metadata"].get("tags") == ["parameters"]] == code_cells(nb)[:1]
    assert all(alt for alt in re.findall(r"!\[(.*?)\]\(", text))
    marks = "## Before you start", "**3. ", "## Recap", "## More to try", "## Further reading"
    assert [m for m in marks if m not in text] == []
    assert not any("#| export" in tool.source(c) for c in code_cells(nb))
    asked = re.findall(r"### Exercise ([\d.]+)", text)
    checked = re.findall(r'^check\("([\d.]+)"\)', "\n".join(map(tool.source, code_cells(nb))), flags=re.M)
    assert len(asked) >= 3 and asked == checked == [ex.id for ex in EXERCISES if int(ex.id[0]) == int(path.stem[:2])]


def test_the_students_notebooks_are_in_step():
    assert tool.build(check=True) == [], "run `make course` and commit the result"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_an_unsolved_exercise_is_no_error(path):
    nb, space, reports = read(tool.COURSE / path.name), {}, []
    exec("import torch\nimport torch.nn.functional as F\nfrom hapnb.course import check", space)
    for c in code_cells(nb):
        text = tool.source(c)
        assert "SOLUTION" not in text and "HIDDEN" not in text and "grade(\"" not in text
        if "nbgrader" not in c["metadata"]: continue
        assert not c["outputs"]
        if text.startswith("check("): reports.append(eval(text, space))
        else: exec(text, space)
    assert len(reports) >= 3 and not any(reports)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A lecturer's folder: 60 images of 12 classes in 3 groups."
    to, ds = tmp_path_factory.mktemp("lecturer") / "images", load("emoji", "val")
    for g in range(3):
        y = ds.labels[ds.labels[:, 2] == g][:, 0].unique().tolist()[:4]
        for c in y:
            (to / f"group {g}" / f"class {c}").mkdir(parents=True)
            for i in (ds.labels[:, 0] == c).nonzero()[:5, 0].tolist():
                ds.image(i).save(to / f"group {g}" / f"class {c}" / f"{i}.png")
    return to


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_lecturer_can_swap_the_images(path, folder, tmp_path):
    given = dict(parameters={"images": str(folder)}, cwd=path.parent, kernel_name="python3", progress_bar=False)
    done = papermill.execute_notebook(path, tmp_path / "done.ipynb", **given)
    times = [c.metadata.papermill.duration for c in done.cells if c.cell_type == "code"]
    # the first cells import PyTorch and read the images
    assert max(times[3:]) < 10 and sum(times[3:]) < 150


# images and widgets

def test_the_features_are_those_of_the_images():
    from hapnb.batches import cached_features
    _, test = lesson_images()
    rows = list(range(0, len(test), 200))
    whole = load("emoji", "test")
    few = whole.subset(lesson_rows(whole.labels)[rows])
    x = cached_features("tf_efficientnet_lite0", few, cache_dir=None, progress=False)
    a, b = (torch.nn.functional.normalize(z, dim=1) for z in (x, test.features[rows]))
    # 256 of 1,280 directions: nearly the same cosines
    assert float(torch.corrcoef(torch.stack([(a @ a.T).flatten(), (b @ b.T).flatten()]))[0, 1]) > .97


def test_a_live_widget_redraws_when_a_control_moves():
    pytest.importorskip("ipywidgets")
    seen = []
    picture = lambda values: seen.append(copy.deepcopy(values)) or course_widgets.Picture(b"", "none")
    controls = dict(k=(1, 8), order=course_widgets.Reorder(3))
    box = course_widgets._live(picture, controls, dict(k=2, order=[2, 0, 1]))
    slider, (at, up, down) = box.children[0], box.children[1].children
    slider.value = 5
    up.click()
    down.click()
    at.value = 3
    down.click()
    assert [(s["k"], s["order"]) for s in seen] == [
        (2, [2, 0, 1]), (5, [2, 0, 1]), (5, [0, 2, 1]), (5, [2, 0, 1])], "the last click has nowhere to go"


# nbgrader

def nbgrader(*args, cwd):
    done = subprocess.run([sys.executable, "-m", "nbgrader", *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    "A folder for nbgrader; lesson 2 without the cells that no exercise needs, since it is executed three times."
    pytest.importorskip("nbgrader", reason="pip install hapnb[course]")
    folder = tmp_path_factory.mktemp("grading")
    tool.set_up_nbgrader(folder)
    path = folder / "source" / "02_ranking" / "02_ranking.ipynb"
    nb = read(path)
    needed = lambda c: "nbgrader" in c["metadata"] or "hapnb.course import" in tool.source(c)
    nb["cells"] = [c for c in nb["cells"] if needed(c)]
    path.write_text(json.dumps(nb), encoding="utf-8")
    return folder


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nbgrader_makes_the_same_notebooks(path, graded):
    nbgrader("generate_assignment", path.stem, "--force", cwd=graded)
    sources = lambda nb: {c["id"]: tool.source(c) for c in code_cells(nb)}
    released, ours = sources(read(graded / "release" / path.stem / path.name)), sources(read(tool.COURSE / path.name))
    assert released and released == {id: ours[id] for id in released}


def test_nbgrader_validates_and_grades(graded):
    lesson = "02_ranking"
    nbgrader("generate_assignment", lesson, "--force", cwd=graded)
    source = graded / "source" / lesson / f"{lesson}.ipynb"
    assert "Success" in nbgrader("validate", source, cwd=graded)
    for student, path in {"solved": source, "unsolved": graded / "release" / lesson / f"{lesson}.ipynb"}.items():
        to = graded / "submitted" / student / lesson
        to.mkdir(parents=True)
        shutil.copy(path, to / f"{lesson}.ipynb")
    nbgrader("autograde", lesson, cwd=graded)
    from nbgrader.api import Gradebook
    with Gradebook(f"sqlite:///{graded}/gradebook.db") as book:
        scores = {s.student.id: s.score for s in book.assignment_submissions(lesson)}
    assert scores == {"solved": 4, "unsolved": 0}
