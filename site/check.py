"""What is wrong with a built site: `python site/check.py _docs` reads every page, without a browser.

Links and anchors lead somewhere, pictures have a text, headings nest, nothing is fetched from the network, and no page
with its pictures is larger than 3 MB.
"""
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGEST = 3_000_000


class Page(HTMLParser):
    "What the checks need of a page."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.files, self.silent, self.headings = set(), [], set(), [], []
        self.article = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        got = dict(attrs)
        if "id" in got: self.ids.add(got["id"])
        if tag == "article": self.article = True
        if tag == "a" and got.get("href"): self.links.append(got["href"])
        if tag in ("img", "script", "iframe", "source") and got.get("src"): self.files.add(got["src"])
        if tag == "link" and got.get("rel") in ("stylesheet", "icon"): self.files.add(got["href"])
        # a picture without meaning says so: alt="" with role="presentation"
        if tag == "img" and not got.get("alt", "").strip() and got.get("role") != "presentation":
            self.silent.append(got.get("src", "")[:60])
        if self.article and len(tag) == 2 and tag[0] == "h" and tag[1].isdigit(): self.headings.append(int(tag[1]))

    def handle_endtag(self, tag):
        if tag == "article": self.article = False


def target(page, link):
    "The file and the anchor that a link of a page leads to; no file for the network and for data in the page."
    parts = urlsplit(link)
    if parts.scheme or parts.netloc: return None, ""
    path = (page.parent / unquote(parts.path)).resolve() if parts.path else page.resolve()
    return path, unquote(parts.fragment)


def nesting(headings):
    "What is wrong with the levels of the headings of a page."
    if headings.count(1) != 1: yield f"{headings.count(1)} titles"
    for a, b in zip(headings, headings[1:]):
        if b > a + 1: yield f"a heading of level {b} under one of level {a}"


def problems(docs):
    "Everything that is wrong, one line each: `page: what`."
    paths = sorted(p for p in Path(docs).rglob("*.html") if "_static" not in p.relative_to(docs).parts)
    pages = {p.resolve(): Page(p) for p in paths}
    for path, page in pages.items():
        said = lambda what: f"{path.relative_to(Path(docs).resolve())}: {what}"
        for link in page.links:
            file, anchor = target(path, link)
            if file is not None and not file.exists(): yield said(f"the link {link} leads nowhere")
            elif anchor and file in pages and anchor not in pages[file].ids: yield said(f"no anchor for {link}")
        size = path.stat().st_size
        for link in page.files:
            file, _ = target(path, link)
            if file is None and not link.startswith("data:"): yield said(f"needs the network for {link}")
            elif file is not None and not file.exists(): yield said(f"no file {link}")
            elif file is not None and "_static" not in file.parts: size += file.stat().st_size
        if size > LARGEST: yield said(f"{size / 1e6:.1f} MB with its pictures, 3 at most")
        for picture in page.silent: yield said(f"the picture {picture} has no text (alt)")
        # the title of the search page is written by its script
        for what in nesting(page.headings) if path.name != "search.html" else (): yield said(what)


if __name__ == "__main__":
    found = list(problems(Path(sys.argv[1])))
    sys.exit("\n".join(found) or None)
