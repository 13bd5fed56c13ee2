"""The API reference: one page per module, read from its source without importing it.

Signatures come from the syntax tree, the text of each parameter from the comment behind it (docments), and the place in
the notebooks from the marks that nbdev leaves in the exported file.
"""
import ast, io, re, tokenize
from dataclasses import dataclass, field
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Item:
    "A class, function, method or constant: where it is, and what its page says."
    kind: str
    name: str
    node: ast.AST
    cell: str = ""
    methods: list = field(default_factory=list)


@dataclass
class Module:
    "A module of the package, as its source describes it."
    name: str
    doc: str
    notebook: str
    comments: dict
    items: list


def comments_of(text):
    "What each line says behind its code: `{line: comment}`."
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = [(t.start[0], t.string.lstrip("# ").strip()) for t in tokens
             if t.type == tokenize.COMMENT and t.line[:t.start[1]].strip()]
    return {line: text for line, text in found if text and not text.startswith("noqa")}


def decorators(node):
    "Names of what decorates a definition, without arguments."
    return {ast.unparse(getattr(d, "func", d)).rsplit(".", 1)[-1] for d in node.decorator_list}


def is_public(name): return not name.startswith("_")


def method_items(node, cell):
    "Public methods and properties that a class body defines."
    return [Item("property" if decorators(n) & {"property", "cached_property"} else "method", n.name, n, cell)
            for n in node.body if isinstance(n, FUNCTIONS) and is_public(n.name) and ast.get_docstring(n)]


def read(path):
    "Read a module: its public names in the order of the notebook, patched methods with their class."
    text = Path(path).read_text(encoding="utf-8")
    tree = ast.parse(text)
    marks = [(n, m[1]) for n, line in enumerate(text.splitlines(), 1) if (m := re.match(r"# %% \S+ #(\w+)$", line))]
    notebook = re.search(r"File to edit: \.\./(\S+\.ipynb)", text)
    items = {}
    for node in tree.body:
        cell = next((c for n, c in reversed(marks) if n < node.lineno), "")
        for item in items_of(node, cell):
            owner, _, name = item.name.rpartition(".")
            if owner in items:
                item.name = name
                items[owner].methods.append(item)
            else: items[item.name] = item
    doc = (ast.get_docstring(tree) or "").strip()
    return Module(Path(path).stem, doc, notebook[1] if notebook else "", comments_of(text), list(items.values()))


def items_of(node, cell):
    "What a statement at the top of a module defines, if it is public."
    if isinstance(node, ast.ClassDef) and is_public(node.name):
        yield Item("class", node.name, node, cell, method_items(node, cell))
    elif isinstance(node, FUNCTIONS) and is_public(node.name):
        owner = node.args.args[0].annotation if "patch" in decorators(node) and node.args.args else None
        kind = "property" if owner and "as_prop" in ast.unparse(node.decorator_list[0]) else "method"
        for name in re.split(r"\s*\|\s*", ast.unparse(owner)) if owner else [None]:
            if name is None: yield Item("function", node.name, node, cell)
            elif is_public(name): yield Item(kind, f"{name}.{node.name}", node, cell)
    elif isinstance(node, ast.Assign):
        for t in node.targets:
            if isinstance(t, ast.Name) and t.id.isupper() and is_public(t.id): yield Item("data", t.id, node, cell)


def parameters(node, bound):
    "`(name with stars, annotation, default, last line)` of each parameter; the first of a bound method is left out."
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    found = [(x.arg, x, d) for x, d in zip(plain, defaults)][bound:]
    if a.vararg: found.append((f"*{a.vararg.arg}", a.vararg, None))
    elif a.kwonlyargs: found.append(("*", None, None))
    found += [(x.arg, x, d) for x, d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: found.append((f"**{a.kwarg.arg}", a.kwarg, None))
    return [(name, getattr(x, "annotation", None), d, (d or x or node).end_lineno) for name, x, d in found]


def fields(node):
    "The parameters of a dataclass or schema: its annotated names."
    return [(n.target.id, n.annotation, n.value, n.end_lineno) for n in node.body
            if isinstance(n, ast.AnnAssign) and is_public(n.target.id) and "ClassVar" not in ast.unparse(n.annotation)]


def constructor(node, classes):
    "The parameters of a class: its own or inherited `__init__`, or its fields, with the node that they belong to."
    init = next((n for n in node.body if isinstance(n, FUNCTIONS) and n.name == "__init__"), None)
    if init: return parameters(init, 1)
    if fields(node): return fields(node)
    bases = [classes.get(ast.unparse(b).rsplit(".", 1)[-1]) for b in node.bases]
    return next((constructor(b, classes) for b in bases if b is not None), [])


def shown(value): return ast.unparse(value) if value is not None else ""


def signature(params):
    "Parameters as Python writes them, without annotations: those are in the list below it."
    return ", ".join(name + (f"={shown(default)}" if default is not None else "") for name, _, default, _ in params)


def params_list(params, comments):
    "A field list with type and comment of each parameter; a comment belongs to the last parameter on its line."
    last = {line: name for name, _, _, line in params}
    lines = []
    for name, annotation, _, line in params:
        said = comments.get(line, "") if last[line] == name else ""
        kind = f" (`{shown(annotation)}`)" if annotation is not None else ""
        escaped = name.replace("*", "\\*")
        if name != "*" and (said or kind): lines.append(f":param {escaped}:{kind} {said}".rstrip())
    return lines


def returned(node, comments):
    "A field list with what a function returns."
    if getattr(node, "returns", None) is None: return []
    line = node.returns.end_lineno
    return [f":returns: `{shown(node.returns)}` {comments.get(line, '')}".rstrip()]


def escaped(text):
    "A docstring or comment as Markdown: what looks like a tag of HTML is none."
    return re.sub(r"`[^`]*`|<(?=[A-Za-z/!])", lambda m: "\\<" if m[0] == "<" else m[0], text)


class Pages:
    "Writes the pages of all modules."
    def __init__(self, modules, source, prose, notebooks):
        "`prose` makes links in Markdown; modules are linked to those `notebooks` that the site has."
        self.source, self.prose, self.notebooks = source, prose, notebooks
        self.classes = {i.name: i.node for m in modules for i in m.items if i.kind == "class"}

    def links(self, module, item):
        "Where the source and the notebook define it."
        span = f"L{item.node.lineno}-L{item.node.end_lineno}"
        found = [f"[source]({self.source}/hapnb/{module.name}.py#{span})"]
        if item.cell and module.notebook in self.notebooks:
            found.append(f"{{ref}}`notebook <{module.name}-{item.cell}>`")
        return "{.links}\n" + " · ".join(found)

    def described(self, module, item):
        "The parameters of an item, and the lines that describe it."
        node, comments = item.node, module.comments
        if item.kind == "data":
            value = shown(node.value)
            return [], [*[f":value: {value}"] * (len(value) < 60), "", escaped(comments.get(node.lineno, ""))]
        doc = ["", self.prose(escaped(ast.get_docstring(node) or ""), f"api/{module.name}.md"), ""]
        if item.kind == "property": return [], doc
        if item.kind == "class": params = constructor(node, self.classes)
        else: params = parameters(node, item.kind == "method" and "staticmethod" not in decorators(node))
        # an inherited constructor may have its comments in another module
        if item.kind == "class" and not all(node.lineno <= p[-1] <= node.end_lineno for p in params): comments = {}
        listed = [self.prose(escaped(line), f"api/{module.name}.md") for line in params_list(params, comments)]
        return params, [*doc, *listed, *map(escaped, returned(node, comments))]

    def entry(self, module, item, owner=None):
        "The directive of one item, with its methods inside."
        params, lines = self.described(module, item)
        fence = "`" * (4 if owner else 5)
        head = item.name if item.kind in ("data", "property") else f"{item.name}({signature(params)})"
        lines.insert(0, f"{fence}{{py:{item.kind}}} {owner.name + '.' if owner else ''}{head}")
        if not owner or owner.cell != item.cell: lines += ["", self.links(module, item)]
        for m in item.methods: lines += ["", self.entry(module, m, item)]
        return "\n".join([*lines, fence])

    def page(self, module):
        "The page of a module, as MyST."
        at, known = f"api/{module.name}.md", module.notebook in self.notebooks
        about = f"The notebook [{Path(module.notebook).stem}](../{module.notebook}) makes it and explains it."
        text = [f"> {self.prose(escaped(module.doc), at)}" if module.doc else "", about if known else "",
                f"```{{py:module}} hapnb.{module.name}\n```"]
        return "\n\n".join([f"# hapnb.{module.name}", *text, *(self.entry(module, i) for i in module.items), ""])


def public_names(modules):
    "Full name of every public class, function and constant; of one that two modules have, the first."
    found = {}
    for m in modules:
        for i in m.items:
            if "." not in i.name: found.setdefault(i.name, f"hapnb.{m.name}.{i.name}")
    return found
