"""Each lesson as slides: `python site/slides.py` writes `_slides/NAME.html`, which need no network.

A heading begins a slide, and what does not fit continues below it: arrow keys right and left go from topic to topic,
down and up within one. A code cell appears with its output when the key is pressed. The tag `slide-skip` leaves a cell
out, `slide-new` begins a slide. Cells that only import are left out.
"""
import argparse, base64, copy, mimetypes, re, shutil
from pathlib import Path

import convert
import vendor
from nbformat import NotebookNode

# a slide of 720 pixels, less its margins
HEIGHT = 640


def height(cell):
    "About how many pixels a cell takes on a slide."
    lines = cell.source.count("\n") + 1
    if cell.cell_type == "markdown":
        pictures = len(re.findall(r"!\[|<img|<svg", cell.source))
        rows = sum(1 + len(line) // 95 for line in cell.source.splitlines() if line.strip())
        return 38 * rows + 380 * pictures
    total = 24 * lines + 20
    for out in cell.outputs:
        data = out.get("data", {})
        if any(kind.startswith("image/") for kind in data): total += 380
        elif "text/html" in data or "text/markdown" in data: total += 30 * (1 + len(re.findall(r"<tr|\n", str(data))))
        else: total += 24 * (1 + str(data.get("text/plain", out.get("text", ""))).count("\n"))
    return total


def kind(cell, filled):
    "The slide type of a cell on a slide that is filled so far, in the words of nbconvert."
    tags = cell.metadata.get("tags", [])
    if "slide-skip" in tags or cell.cell_type == "raw": return "skip"
    if cell.cell_type == "code" and convert.imports_only(cell.source) and not cell.outputs: return "skip"
    if cell.cell_type == "markdown" and re.match(r"##? ", cell.source) or "slide-new" in tags: return "slide"
    if filled and (re.match(r"### ", cell.source) or filled + height(cell) > HEIGHT): return "subslide"
    return "fragment" if cell.cell_type == "code" else "-"


def typed(cells):
    "Give every cell its slide type."
    filled = 0
    for cell in cells:
        what = kind(cell, filled)
        cell.metadata["slideshow"] = {"slide_type": what}
        if what != "skip": filled = height(cell) + (0 if what in ("slide", "subslide") else filled)
    return cells


def lesson(site, page):
    "The cells of a lesson as slides show them."
    nb, cells = copy.deepcopy(site.notebooks[page]), []
    for cell, following in zip(nb.cells, [*nb.cells[1:], None]):
        if cell.cell_type == "markdown":
            # nbconvert embeds pictures that Markdown shows, but not those of HTML
            link = lambda m: f"{m[1]}({site.outside(m[2], page)})"
            cell.source = re.sub(r"((?<!!)\[[^\]]*\])\(([^)\s]+)\)", link, cell.source)
            cell.source = re.sub(r'<img\b[^>]*?\bsrc="([^":]+)"', lambda m: embedded(m, site.root / page), cell.source)
            cells += parts(cell)
        elif cell.cell_type == "code" and (kept := site.code(cell)):
            site.describe(kept, cells, following)
            cells.append(kept)
    nb.cells = typed(cells)
    return nb


def embedded(tag, page):
    "The beginning of an HTML picture, with its file inside."
    path = page.parent / tag[1]
    data = base64.b64encode(path.read_bytes()).decode()
    return tag[0].replace(tag[1], f"data:{mimetypes.guess_type(path)[0]};base64,{data}")


def parts(cell):
    "A text cell cut before each of its headings, so that every heading begins a slide."
    texts = [t.strip() for t in re.split(r"\n(?=##+ )", cell.source) if t.strip()]
    return [NotebookNode(cell | {"source": t, "id": f"{cell.id}-{n}", "metadata": NotebookNode(cell.metadata)})
            for n, t in enumerate(texts)]


def exporter():
    "nbconvert's exporter of slides with our template."
    from nbconvert import SlidesExporter
    return SlidesExporter(extra_template_basedirs=[str(Path(__file__).resolve().parent / "templates")],
                          template_name="slides", reveal_url_prefix="assets", reveal_theme="white", embed_images=True)


def write(site, to):
    "Write the slides of every lesson and what they load; returns their paths."
    lessons, made = site.in_folder("nbs/course"), []
    if not lessons: return made
    (to / "assets").mkdir(parents=True, exist_ok=True)
    shutil.copytree(vendor.fetch("reveal.js"), to / "assets", dirs_exist_ok=True)
    shutil.copy(vendor.fetch("mathjax") / "es5" / "tex-svg.js", to / "assets")
    # the fonts of the theme are left out: those of the system do
    theme = to / "assets" / "dist" / "theme" / "white.css"
    theme.write_text(re.sub(r"^@import .*$", "", theme.read_text(encoding="utf-8"), flags=re.M), encoding="utf-8")
    slides = exporter()
    for page in lessons:
        nb = lesson(site, page)
        nb.metadata["title"] = convert.head(site.notebooks[page])[0]
        path = to / f"{Path(page).stem}.html"
        resources = {"metadata": {"path": str((site.root / page).parent), "name": path.stem}}
        path.write_text(slides.from_notebook_node(nb, resources)[0], encoding="utf-8")
        made.append(path)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=convert.ROOT / "_slides", type=Path, help="folder of the slides")
    args = parser.parse_args()
    made = write(convert.Site(None, only=["nbs/course/"]), args.out)
    print("\n".join(map(str, made)) if made else "There are no lessons in nbs/course yet.")
