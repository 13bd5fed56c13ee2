"""Make README.md from nbs/index.ipynb: `python tools/readme.py` runs the notebook first, `--check` only compares."""
import posixpath, re, sys
from pathlib import Path

from nbconvert import MarkdownExporter
from traitlets.config import Config

from render import execute, read

ROOT = Path(__file__).resolve().parents[1]
INDEX, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"


def readme_cells(nb):
    "Yield the cells that a README shows: hidden ones and directives dropped, only Markdown and text outputs kept."
    for cell in nb.cells:
        directives = re.findall(r"^#\|\s*(.+)$", cell.source, flags=re.M) if cell.cell_type == "code" else []
        if "hide" in directives or "hide" in cell.metadata.get("tags", []): continue
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
            for out in cell.outputs:
                shown = out.get("data", {}).get("text/markdown")
                if shown is not None: out.data = {"text/markdown": shown}
            if "echo: false" in directives: cell.metadata["tags"] = ["remove_input"]
        yield cell


def rebased(text):
    "Turn links that are relative to nbs/ into links relative to the project."
    def fix(m):
        target = m[2]
        outside = re.match(r"[a-z]+:|#|/", target)
        return m[0] if outside else f"{m[1]}{posixpath.normpath(posixpath.join('nbs', target))}{m[3]}"
    parts = re.split(r"(^```.*?^```\n)", text, flags=re.M | re.S)
    return "".join(p if p.startswith("```") else re.sub(r"(\]\()([^)\s]+)(\))", fix, p) for p in parts)


def readme(path=INDEX):
    "Return the README text for the notebook at `path`, as it stands."
    nb = read(path)
    nb.cells = list(readme_cells(nb))
    nb.metadata["language_info"] = {"name": "python"} # names the code blocks
    tags = {"enabled": True, "remove_input_tags": ("remove_input",)}
    text, _ = MarkdownExporter(config=Config(TagRemovePreprocessor=tags)).from_notebook_node(nb)
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip()
    return "<!-- Made from nbs/index.ipynb by tools/readme.py; edit the notebook. -->\n" + rebased(text) + "\n"


def main(check):
    "Write README.md, or with `check` say whether it is in step."
    if not check and (failed := execute(INDEX)): sys.exit(failed)
    text = readme()
    if not check: README.write_text(text, encoding="utf-8")
    elif not README.exists() or README.read_text(encoding="utf-8") != text:
        sys.exit("README.md is not what nbs/index.ipynb gives: run `make prepare`")


if __name__ == "__main__": main("--check" in sys.argv[1:])
