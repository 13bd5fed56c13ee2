"""Write the students' notebooks `nbs/course/*.ipynb` from the sources in `nbs/course/source`, which hold the solutions.

`python tools/course.py` writes them, and nbgrader's metadata into both. `--check` only says what is out of step.
`--nbgrader FOLDER` sets up a folder in which nbgrader's commands work; the page `nbs/course/README.md` shows how.
"""
import argparse, copy, json, re, shutil, sys
from pathlib import Path

COURSE = Path(__file__).resolve().parents[1] / "nbs" / "course"
# what a student finds in the place of a solution: not an error, so that an unsolved exercise does not stop the notebook
STUB = "# Your code here\n..."
CONFIG = f"""c = get_config()
c.CourseDirectory.course_id = "hapnb"
c.ClearSolutions.code_stub = {{"python": {STUB!r}}}
c.ExecutePreprocessor.timeout = 120
"""


def source(cell): return "".join(cell["source"])


def write(nb, path, check=False):
    "Write a notebook as nbdev does; with `check`, only say whether that would change the file."
    text = json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    changed = not path.exists() or path.read_text(encoding="utf-8") != text
    if changed and not check: path.write_text(text, encoding="utf-8")
    return changed


def kind(cell):
    "What a cell is to nbgrader: `answer` (holds a solution), `check` (tests one), or nothing."
    if cell["cell_type"] != "code": return ""
    if "BEGIN SOLUTION" in source(cell): return "answer"
    return "check" if "BEGIN HIDDEN TESTS" in source(cell) else ""


def stamped(nb):
    "The notebook with nbgrader's metadata: an answer belongs to the check that follows it."
    nb, waiting = copy.deepcopy(nb), []
    for cell in nb["cells"]:
        cell["metadata"].pop("nbgrader", None)
        role = kind(cell)
        common = dict(schema_version=3, task=False, grade=role == "check", locked=role == "check",
                      solution=role == "answer")
        if role == "answer": waiting.append((cell, common))
        elif role == "check":
            # nbgrader allows no dots
            number = re.search(r'grade\("([\d.]+)"', source(cell))[1].replace(".", "-")
            cell["metadata"]["nbgrader"] = dict(common, grade_id=f"check-{number}", points=1)
            for i, (answer, own) in enumerate(waiting):
                answer["metadata"]["nbgrader"] = dict(own, grade_id=f"answer-{number}" + ("-bcdefg"[i] if i else ""))
            waiting = []
    assert not waiting, "a solution needs a check cell (with hidden tests) after it"
    return nb


def without(text, what, instead=""):
    "The text without its regions BEGIN `what` to END `what`; `instead` is indented as the region was."
    lines, inside = [], False
    for line in text.split("\n"):
        if f"BEGIN {what}" in line:
            indent = line[:len(line) - len(line.lstrip())]
            lines += [indent + new for new in instead.split("\n")] if instead else []
            inside = True
        elif f"END {what}" in line: inside = False
        elif not inside: lines.append(line)
    return "\n".join(lines)


def one_up(nb):
    "The notebook as it must be in the folder above its own: links begin one folder higher."
    nb = copy.deepcopy(nb)
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown": cell["source"] = source(cell).replace("](../", "](").splitlines(True)
    return nb


def for_students(nb):
    "The notebook without solutions, hidden tests, and the outputs of both."
    nb = one_up(nb)
    nb["metadata"].pop("made_from", None)
    for cell in nb["cells"]:
        if not kind(cell): continue
        text = without(without(source(cell), "SOLUTION", STUB), "HIDDEN TESTS")
        cell.update(source=text.splitlines(True), outputs=[], execution_count=None)
    return nb


def build(check=False):
    "Bring all notebooks of the course in step; returns the names of those that were not."
    changed = []
    for path in sorted((COURSE / "source").glob("[0-9]*.ipynb")):
        nb = stamped(json.loads(path.read_text(encoding="utf-8")))
        if write(nb, path, check): changed.append(f"source/{path.name}")
        if write(for_students(nb), COURSE / path.name, check): changed.append(path.name)
    return changed


def set_up_nbgrader(folder):
    "Write nbgrader's folder: its configuration, and each lesson as an assignment."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nbgrader_config.py").write_text(CONFIG, encoding="utf-8")
    for path in sorted((COURSE / "source").glob("[0-9]*.ipynb")):
        to = folder / "source" / path.stem
        shutil.copytree(COURSE / "img", to / "img", dirs_exist_ok=True)
        write(one_up(json.loads(path.read_text(encoding="utf-8"))), to / path.name)
    print(f"{folder} is ready: cd {folder}, then nbgrader generate_assignment 01_search")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if something is out of step")
    parser.add_argument("--nbgrader", type=Path, metavar="FOLDER", help="set up a folder for nbgrader")
    args = parser.parse_args()
    changed = build(args.check)
    if args.check and changed: sys.exit(f"out of step: {', '.join(changed)}. Run `make course` and commit the result.")
    if args.nbgrader: set_up_nbgrader(args.nbgrader)
