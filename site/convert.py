"""Turn the project into what Sphinx reads: `Site(to).convert()` writes its pages, in the folders of the project.

Notebooks lose what only nbdev needs, links go to pages of the site or to the repository, names in backticks go to the
API reference, and every picture has a text. Pages that no file holds are made here: parts of the book, API, figures.
"""
import ast, base64, configparser, copy, html, json, posixpath, re, shutil
from pathlib import Path

import api
import nbformat

ROOT = Path(__file__).resolve().parents[1]
# The book in the order of the field. A notebook that is not listed follows the one before it in `nbs/`.
PARTS = {
    "words": ("Words and labels", "What the field calls things: labels, levels, relevance, and how labels are read.",
              "00_core 17_labels"),
    "ranking": ("Ranking and metrics", "How good is a ranking, and how can a network be trained for it?",
                "15_metrics 14_retrieval 01_ranking 28_protocols"),
    "losses": ("Losses", "From pairs and proxies to average precision and hypergraphs.",
               "02_pairs 02b_proxies 02c_contrast 10_losses 03_surrogates 03b_moving 04_hypergraph 11_added "
               "12_external"),
    "data": ("Data", "Images with labels: the bundled ones, your own, the benchmarks, and what goes into a batch.",
             "18_datasets 20_data 21_emoji 21b_fonts 20a_twins 22_samplers 23_benchmarks 23a_photos 24_hierarchies "
             "24a_landmarks"),
    "training": ("Training", "From twelve lines to runs that can be trusted, and to a search over their settings.",
                 "25_models 29_trunks 30_train 31_batches 26_large_batches 32_config 33_build 33_runs 35_recipes "
                 "38_space 38b_trials 38c_tune"),
    "openworld": ("Open world", "Images without labels: find their classes, and learn from them.",
                  "45_features 46_clustering 47_knn_graphs 47b_edge_network 48_hilander 49_selection 50_openworld "
                  "51_openworld_report 52_openworld_recipes"),
    "evidence": ("Studies and evidence", "How sure are we of a number? Intervals, tests, claims, tables and pictures.",
                 "39_statistics 40_plots 40b_curves 41_search_plots 43_explorer 61_tables 61b_claims 61c_budgets "
                 "62_study"),
    "engineers": ("For engineers", "What makes it fast, safe and easy to run. You need none of it to follow the rest.",
                  "01b_loglinear 01c_kernels 01d_compiled 16_images 19_files 20b_bundled 24b_weights 27_packed "
                  "34_measure 36_cost 36_plan 37_workers 37b_grids 60_driver 63_options 64_doctor 65_commands "
                  "66_discover 67_cli 90_helpers 91_schemas")}
PROSE = ("CONTRIBUTING.md", "CHANGELOG.md", "figures/claims.md", "figures/preregistration.md")
# what a code cell says with `#|`, and the tag that myst-nb knows for it
TAGS = {"echo: false": "remove-input", "output: false": "remove-output", "include: false": "remove-cell",
        "code-fold: true": "hide-input"}
WIDGET = ("application/vnd.jupyter.widget-view+json", "application/javascript")
# what saves a table or a figure in a study
SAVES = {"S.figure": "figure", "S.figure_once": "figure", "S.table": "table"}
# what prose may contain in which a link or a name must not be sought
OPAQUE = r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)|\$\$.*?\$\$|!?\[(?:`[^`]*`|[^\]`])*\]\([^)\s]+\)|(?<!`)`[^`\n]+`(?!`)"


def settings(root=ROOT):
    "What settings.ini says of the repository."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def plain(text, length=300):
    "Markdown as one line of plain text, for the text of a picture."
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text.split("\n\n")[0])
    text = " ".join(re.sub(r"[*`>#|\\$]", "", text).split())
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " ..."


def head(nb):
    "Title and summary of a notebook."
    first = nb.cells[0].source if nb.cells else ""
    title = re.search(r"^# (.+)$", first, flags=re.M)
    summary = " ".join(re.findall(r"^> ?(.*)$", first.split("\n\n## ")[0], flags=re.M))
    return title[1].strip() if title else "Untitled", " ".join(summary.split())


class Site:
    "The pages of the site: what exists, how one links to another, and the folder that they are written to."
    def __init__(self, to, root=ROOT, only=None):
        self.root, self.to, self.only = Path(root), to and Path(to), only
        config = settings(self.root)
        self.source = f"{config['git_url']}/blob/{config['branch']}"
        self.notebooks = self.find_notebooks()
        modules = [p for p in sorted((self.root / "hapnb").glob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]
        modules = [api.read(p) for p in modules if self.wanted(f"api/{p.stem}")]
        self.modules = {f"hapnb.{m.name}": m for m in sorted(modules, key=lambda m: m.notebook)}
        self.names = api.public_names(self.modules.values())
        self.stems = {Path(n).stem: n for n in self.notebooks if Path(n).name[0].isdigit()}
        self.pages = {*self.notebooks, "figures/index.md", *PROSE}
        self.written = set()

    def wanted(self, page):
        "Whether a page belongs to this build: all do, unless `only` names some."
        return self.only is None or any(re.search(pattern, page) for pattern in self.only)

    def find_notebooks(self):
        "Notebooks by their path in the project; solutions and drafts are no pages."
        found = sorted((self.root / "nbs").rglob("*.ipynb"))
        names = [p.relative_to(self.root).as_posix() for p in found if not p.name.startswith(("_", "."))]
        skip = re.compile(r"\.ipynb_checkpoints|/source/")
        return {n: nbformat.read(self.root / n, 4) for n in names if not skip.search(n) and self.wanted(n)}

    def in_folder(self, folder): return [n for n in self.notebooks if posixpath.dirname(n) == folder]

    # files

    def write(self, path, text):
        "Write a page; one that has not changed keeps its date, so that Sphinx does not read it again."
        to = self.to / path
        to.parent.mkdir(parents=True, exist_ok=True)
        if not to.exists() or to.read_text(encoding="utf-8") != text: to.write_text(text, encoding="utf-8")
        self.written.add(to)

    def copied(self, path):
        "Copy a picture of the project to where pages find it."
        to = self.to / path
        to.parent.mkdir(parents=True, exist_ok=True)
        if not to.exists() or to.read_bytes() != (self.root / path).read_bytes(): shutil.copy(self.root / path, to)
        self.written.add(to)

    def clean(self):
        "Remove what an earlier build wrote and this one did not."
        for p in self.to.rglob("*"):
            if p.is_file() and p not in self.written: p.unlink()

    # links

    def target(self, link, page):
        "Where a link of a page of the project goes: a page of the site, or the repository."
        path, mark, anchor = link.partition("#")
        if re.match(r"[a-z]+:|#|/", link) or not path: return link
        full = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        if not (self.root / full).exists():
            raise ValueError(f"{page} links to {link}, and there is no {full}: correct the link.")
        if full == "figures": full = "figures/index.md"
        study = f"nbs/studies/{posixpath.basename(full)}.ipynb"
        if full.startswith("figures/") and study in self.notebooks: full = study
        if full not in self.pages: return f"{self.source}/{full}{mark}{anchor}"
        return self.between(page, full) + mark + anchor

    def place(self, page):
        "Where a page of the project is on the site."
        return "index.ipynb" if page == "nbs/index.ipynb" else page

    def between(self, page, other):
        "The way from a page of the site to another file of it."
        return posixpath.relpath(self.place(other), posixpath.dirname(self.place(page)) or ".")

    def picture(self, link, page):
        "Copy the picture that a page shows, and say where it is from that page."
        if re.match(r"[a-z]+:", link): return link
        full = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
        if not (self.root / full).exists(): raise ValueError(f"{page} shows {link}, and there is no {full}.")
        self.copied(full)
        return self.between(page, full)

    def named(self, code, page):
        "A name in backticks as a link to its definition, if it has one."
        name = code.strip("`").removesuffix("()")
        if name in self.stems and self.stems[name] != page:
            return f"[{code}]({self.between(page, self.stems[name])})"
        if name in self.modules: return f"{{py:mod}}`{name}`"
        full = self.names.get(name.removeprefix("hapnb.").rpartition(".")[2])
        # an ordinary word, such as `train`, is a name only where its own notebook speaks
        module = full and self.modules[full.rpartition(".")[0]]
        known = full and (re.search(r"[A-Z_.(]", code) or module.notebook == page)
        return f"{{py:obj}}`{code[1:-1]} <{full}>`" if known else code

    def prose(self, text, page):
        "Markdown of the project as Markdown of the site: links, pictures and names."
        def fix(m):
            whole = m[0]
            if whole.startswith(("[", "!")):
                said, link = re.fullmatch(r"(!?\[.*\])\(([^)\s]+)\)", whole, flags=re.S).groups()
                return f"{said}({(self.picture if whole[0] == '!' else self.target)(link, page)})"
            heading = text[text.rfind("\n", 0, m.start()) + 1:m.start()].startswith("#")
            return whole if whole.startswith(("$", "``", "~")) or heading else self.named(whole, page)
        text = re.sub(OPAQUE, fix, text, flags=re.M | re.S)
        return re.sub(r'(<img\b[^>]*?\bsrc=")([^":]+)(")', lambda m: m[1] + self.picture(m[2], page) + m[3], text)

    # notebooks

    def outside(self, link, page):
        "A link of a page that also leads somewhere from outside the site: to the repository."
        if re.match(r"[a-z]+:|#|/", link): return link
        return f"{self.source}/{posixpath.normpath(posixpath.join(posixpath.dirname(page), link))}"

    def notebook(self, page):
        "A notebook as myst-nb shows it."
        nb = copy.deepcopy(self.notebooks[page])
        cells = []
        for cell, following in zip(nb.cells, [*nb.cells[1:], None]):
            if cell.cell_type == "markdown": cells.append(self.markdown(cell, page))
            elif cell.cell_type == "code" and (kept := self.code(cell)):
                self.describe(kept, cells, following)
                for out in kept.outputs:
                    text = out.get("data", {}).get("text/markdown")
                    if text: out.data["text/markdown"] = self.prose(text, page)
                cells += self.definitions(kept, page) + [kept]
        if page.startswith("nbs/studies/") and not any(c.get("outputs") for c in nb.cells): self.committed(cells, page)
        if cells: cells[0].source += "\n\n" + self.about(page)
        nb.cells = cells
        nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
                       "language_info": {"name": "python"}}
        return nbformat.writes(nb, indent=1)

    def markdown(self, cell, page):
        "A text cell; pictures that it carries become files."
        for name, data in cell.pop("attachments", {}).items():
            kind, content = next(iter(data.items()))
            cell.source = cell.source.replace(f"attachment:{name}", f"data:{kind};base64,{content}")
        cell.source = self.prose(cell.source, page)
        cell.metadata = {}
        return cell

    def code(self, cell):
        "A code cell without nbdev's marks; None if readers are not to see it."
        marks = [m.strip() for m in re.findall(r"^#\|\s*(.+)$", cell.source, flags=re.M)]
        tags = cell.metadata.get("tags", [])
        if {"hide", "site-skip"} & {*marks, *tags}: return None
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
        if not cell.source.strip() and not cell.outputs: return None
        cell.metadata = {"tags": [*tags, *(TAGS[m] for m in marks if m in TAGS)]}
        if not cell.outputs and imports_only(cell.source): cell.metadata["tags"].append("hide-input")
        cell.outputs = [out for out in map(self.output, cell.outputs) if out]
        return cell

    def output(self, out):
        "An output as the site shows it: of a widget, the picture that needs no kernel."
        if "data" not in out: return out
        kept = {kind: value for kind, value in out.data.items() if kind not in WIDGET}
        # beside a widget or a figure, plain text is only its name
        named = len(kept) < len(out.data) or str(kept.get("text/plain")).startswith("<Figure size")
        out.data = kept
        return None if named and set(kept) <= {"text/plain"} else out

    def describe(self, cell, before, following):
        "Give the pictures of a cell a text: the one that they carry, their caption, or the text before them."
        caption = following.source if following is not None and re.match(r"\*{1,2}Figure\b", following.source) else ""
        said = next((p for c in reversed(before) if c.cell_type == "markdown" and not c.metadata.get("made")
                     for p in reversed(re.split(r"\n\s*\n", c.source)) if not re.match(r"[`|#$<!:\-{(]", p)), "")
        stored = [m["alt"] for o in cell.outputs for m in [o.get("metadata", {}), *o.get("metadata", {}).values()]
                  if isinstance(m, dict) and m.get("alt")]
        alt = stored[0] if stored else plain(re.sub(r"\{py:\w+\}`([^`<]*)[^`]*`", r"\1", caption or said))
        alt = alt or "Figure that this cell draws"
        cell.metadata["mystnb"] = {"image": {"alt": alt}}
        for out in cell.outputs:
            for mime in [m for m in out.get("data", {}) if m.startswith("image/")]:
                out.metadata[mime] = {"alt": alt} | out.metadata.get(mime, {})
            text = out.get("data", {}).get("text/html")
            if text: out.data["text/html"] = re.sub(r"<img(?![^>]*\balt=)", f'<img alt="{html.escape(alt)}"', text)

    def definitions(self, cell, page):
        "Before a cell that defines something: a place that the API page links to, and links to there."
        module = next((m for m in self.modules.values() if m.notebook == page), None)
        if not module: return []
        names = [i.name for i in module.items if i.cell == cell.id]
        names += [f"{i.name}.{m.name}" for i in module.items for m in i.methods if m.cell == cell.id != i.cell]
        if not names: return []
        links = " ".join(f"{{py:obj}}`{n} <hapnb.{module.name}.{n}>`" for n in names)
        text = f"({module.name}-{cell.id})=\n```{{container}} defines\n{links}\n```"
        return [nbformat.v4.new_markdown_cell(text, id=f"def-{cell.id}", metadata={"made": True})]

    def about(self, page):
        "What stands under the title of a notebook: where it is, what it makes."
        said = [f"[{page}]({self.source}/{page})"]
        said += [f"makes {{py:mod}}`hapnb.{m.name}`" for m in self.modules.values() if m.notebook == page]
        stem = Path(page).stem
        if page.startswith("nbs/studies/"):
            said += [f"`hapnb reproduce {stem} --profile full`", f"{{ref}}`its figures and data <figures-{stem}>`"]
        return "```{container} about\n" + " · ".join(said) + "\n```"

    # studies

    def committed(self, cells, page):
        "Put the committed tables and figures of a study under the cells that make them, and the others at its end."
        name, last = Path(page).stem, len(cells)
        for (kind, stem), files in self.results(name).items():
            shown = files.get(".md") or files.get(".svg") or files[".png"]
            place = maker(cells[:last], kind, stem)
            if place is not None: cells[place].outputs.append(output_of(shown))
            else: cells.append(alone(shown, name))
        heading = nbformat.v4.new_markdown_cell("## Further tables and figures", id="further")
        if len(cells) > last: cells.insert(last, heading)

    def results(self, study):
        "The committed tables and figures of a study: `{(kind, name): {ending: path}}`."
        found = {}
        for p in sorted((self.root / "figures" / study).glob("*.*")):
            kind = "figure" if p.suffix in (".svg", ".png") else "table"
            found.setdefault((kind, p.stem), {})[p.suffix] = p
        return {key: files for key, files in found.items() if set(files) & {".md", ".svg", ".png"}}

    def figures(self):
        "The map from every figure and table to its notebook, its parameters and its data."
        lines = ["# Figures, and where they come from", "",
                 "> Every table and figure of the studies: the notebook and the section that make it, the parameters "
                 "of the notebook, and the data.", "",
                 "A notebook runs with the values of its cell `parameters`, except for those that are named here. "
                 "`hapnb reproduce STUDY --profile full` makes all figures of a study again."]
        for page in self.in_folder("nbs/studies"): lines += self.figures_of(page)
        return "\n".join(lines) + "\n"

    def figures_of(self, page):
        "The part of the map for one study."
        name, cells = Path(page).stem, self.notebooks[page].cells
        results = self.results(name)
        lines = ["", f"(figures-{name})=", f"## {head(self.notebooks[page])[0]}", ""]
        if not results: return [*lines, f"[{name}](../{page}) has no committed figures yet.", ""]
        lines += ["| figure or table | made in the section | notebook | parameters | data | commit | files |"]
        lines += ["|---|---|---|---|---|---|---|"]
        made = {stem: provenance(files[".md"]) for (kind, stem), files in results.items() if ".md" in files}
        study = made.get("main") or next(filter(None, made.values()), ("", "", ""))
        for (kind, stem), files in results.items():
            links = " ".join(f"[{e[1:]}]({self.source}/figures/{name}/{p.name})" for e, p in files.items())
            place = maker(cells, kind, stem)
            title = section(cells[:place]) if place is not None else ""
            where = f"[{title}](../{page}#{slug(title)})" if title else ""
            values = " | ".join(kind == "table" and made.get(stem) or study)
            lines.append(f"| {kind} {stem} | {where} | [{name}](../{page}) | {values} | {links} |")
        return [*lines, ""]

    # pages that no file holds

    def parts(self):
        "Notebooks of each part of the book."
        listed = {name: part for part, (_, _, names) in PARTS.items() for name in names.split()}
        found, part = {p: [] for p in PARTS}, "words"
        for n in self.in_folder("nbs"):
            if n == "nbs/index.ipynb": continue
            part = listed.get(Path(n).stem, part)
            found[part].append(n)
        order = {name: k for k, name in enumerate(listed)}
        # one that is not listed keeps the place after the one before it
        for names in found.values():
            place, last = {}, -1
            for n in names: place[n] = last = order.get(Path(n).stem, last + .5)
            names.sort(key=place.get)
        return found

    def listing(self, title, text, pages, at):
        "A page that lists notebooks with their summaries."
        to = lambda n: posixpath.relpath(n, posixpath.dirname(at) or ".")
        entries = [(*head(self.notebooks[n]), to(n)) for n in pages]
        lines = [f"# {title}", "", f"> {text}", ""]
        lines += [f"**[{name}]({link})**. {self.prose(summary, at)}\n" for name, summary, link in entries]
        self.write(at, "\n".join([*lines, *toctree([link.removesuffix(".ipynb") for *_, link in entries])]))
        return title, at.removesuffix(".md"), text

    def reference(self):
        "One page for each module, and a page that lists them."
        pages = api.Pages(self.modules.values(), self.source, self.prose, self.notebooks)
        names = sorted(m.name for m in self.modules.values())
        lines = ["# API reference", "", "> Every module with its classes and functions, from the source.", ""]
        for name in names:
            module = self.modules[f"hapnb.{name}"]
            self.write(f"api/{name}.md", pages.page(module))
            lines.append(f"- [hapnb.{name}]({name}.md): {self.prose(module.doc, 'api/index.md')}")
        self.write("api/index.md", "\n".join([*lines, "", *toctree(names)]))
        return "API", "api/index", "every class and function."

    def contents(self):
        "Write the pages that list others; returns `{caption: [(title, page, what it is)]}`."
        found, lessons = {}, self.in_folder("nbs/course")
        if lessons: found["Learn"] = [self.listing("Course", "Lessons in order, with exercises.", lessons, "course.md")]
        found["The book"] = [self.listing(PARTS[part][0], PARTS[part][1], names, f"book/{part}.md")
                             for part, names in self.parts().items() if names]
        studies = self.in_folder("nbs/studies")
        text = "Notebooks with parameters that make the tables and figures."
        found["Results"] = [self.listing("Studies", text, studies, "studies.md")] if studies else []
        self.write("figures/index.md", self.figures())
        found["Results"] += [("Claims", "figures/claims", "Which claims of the papers hold here."),
                             ("Preregistration", "figures/preregistration", "What was claimed before any result."),
                             ("Figures", "figures/index", "From every figure to its notebook, parameters and data.")]
        found["Reference"] = [self.reference(), ("Adding something", "CONTRIBUTING", "Where a loss or a dataset goes."),
                              ("Changes", "CHANGELOG", "What is new.")]
        return found

    def front(self, contents):
        "The front page: the index notebook, then all parts of the site."
        nb = nbformat.reads(self.notebook("nbs/index.ipynb"), 4)
        text = ["## Contents"]
        for caption, entries in contents.items():
            lines = [f"- [{title}]({page}.md). {about}" for title, page, about in entries]
            text += ["", f"### {caption}", "", *lines, ""]
            text += toctree([f"{title} <{page}>" for title, page, _ in entries], f":caption: {caption}")
        nb.cells.append(nbformat.v4.new_markdown_cell("\n".join(text), id="contents"))
        return nbformat.writes(nb, indent=1)

    def convert(self):
        "Write all pages."
        for page in self.notebooks:
            if page != "nbs/index.ipynb": self.write(page, self.notebook(page))
        for page in PROSE: self.write(page, self.prose((self.root / page).read_text(encoding="utf-8"), page))
        self.write("index.ipynb", self.front(self.contents()))
        page = lambda n: self.place(n).removesuffix(".ipynb") + ".html"
        about = {page(n): plain(head(nb)[1], 400) for n, nb in self.notebooks.items()}
        about |= {f"api/{m.name}.html": plain(m.doc, 400) for m in self.modules.values()}
        self.write("_made/summaries.js", f"const SUMMARIES = {json.dumps(about, indent=0)};\n")
        self.clean()


def imports_only(source):
    "Whether a cell does nothing but import; readers can open it."
    try: return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body)
    except SyntaxError: return False


def toctree(entries, *options):
    "A table of contents that only the sidebar shows."
    return ["```{toctree}", ":hidden:", *options, "", *entries, "```", ""]


def names_in(source):
    "`(kind, name)` of the tables and figures that a cell saves; names are regular expressions, f-strings have gaps."
    try: tree = ast.parse(source)
    except SyntaxError: return
    for n in ast.walk(tree):
        kind = isinstance(n, ast.Call) and SAVES.get(ast.unparse(n.func))
        if not kind: continue
        place = {"S.figure": n.args[1:2], "S.figure_once": n.args[:1], "S.table": []}[ast.unparse(n.func)]
        given = [k.value for k in n.keywords if k.arg == "name"] or place or [ast.Constant("main")]
        parts = given[0].values if isinstance(given[0], ast.JoinedStr) else given
        name = "".join(re.escape(str(p.value)) if isinstance(p, ast.Constant) else ".+" for p in parts)
        if name != ".+": yield kind, name


def maker(cells, kind, stem):
    "The place of the cell that saves a table or figure; None if no cell can be told."
    code = [(i, c.source) for i, c in enumerate(cells) if c.cell_type == "code"]
    saved = [i for i, source in code if any(k == kind and re.fullmatch(name, stem) for k, name in names_in(source))]
    # a name may stand elsewhere and be passed on
    named = [i for i, source in code if f'"{stem}"' in source and any(call in source for call in SAVES)]
    return next(iter(saved + named), None)


def alone(path, study):
    "A cell that shows a table or figure without the code that makes it."
    alt = f"{path.stem.replace('_', ' ')}, a figure of the study {study}"
    cell = nbformat.v4.new_code_cell("", id=re.sub(r"\W", "-", f"file-{path.name}")[:60], outputs=[output_of(path)])
    cell.metadata = {"tags": ["remove-input"], "mystnb": {"image": {"alt": alt}}}
    return cell


def slug(title):
    "The anchor that MyST gives to a heading."
    return re.sub(r"[^\w\- ]", "", title.strip().lower().replace(" ", "-"))


def section(cells):
    "The last heading of some cells."
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    return (re.findall(r"^##+ (.+)$", text, flags=re.M) or [""])[-1]


def provenance(path):
    "Parameters, data and commit of a committed table, from its last line; None if it does not say."
    made = re.search(r"^Made by: (.+?)\.?\s*$", path.read_text(encoding="utf-8"), flags=re.M)
    if not made: return None
    said = {word: part for part in made[1].split("; ") for word in part.split()}
    name = lambda word: said.get(word, "").removeprefix(f"{word} ")
    seeds = said.get("seeds") or said.get("seed") or ""
    return f"profile `{name('profile')}`, {seeds}", name("data"), f"`{name('commit')}`"


def output_of(path):
    "A committed table or figure as an output of a notebook."
    if path.suffix == ".md": data = {"text/markdown": path.read_text(encoding="utf-8")}
    elif path.suffix == ".svg": data = {"image/svg+xml": path.read_text(encoding="utf-8")}
    else: data = {"image/png": base64.b64encode(path.read_bytes()).decode()}
    return nbformat.v4.new_output("display_data", data)
