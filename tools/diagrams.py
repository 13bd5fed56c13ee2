"""Draw the diagrams of the course: `python tools/diagrams.py` writes `nbs/course/img/*.svg`, the same each time."""
import base64, io, sys
from html import escape
from pathlib import Path

from hapnb.course_images import find_image, lesson_images

IMG = Path(__file__).resolve().parents[1] / "nbs" / "course" / "img"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#B34E00", "#00795A", "#555555"


def text(x, y, words, size=14, colour="#222222", anchor="middle", weight="normal"):
    return (f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{escape(words)}</text>')


def box(x, y, w, h, colour=GREY, fill="white", dash=""):
    return (f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" stroke="{colour}" '
            f'stroke-width="2"{f" stroke-dasharray={dash!r}" if dash else ""}/>')


def arrow(x1, y1, x2, y2, colour=GREY):
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="2" marker-end="url(#head)"/>'


def picture(dataset, row, x, y, size=48):
    "One of the bundled images, as it is."
    out = io.BytesIO()
    dataset.image(row).convert("RGB").quantize(64).save(out, format="png", optimize=True)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<image x="{x}" y="{y}" width="{size}" height="{size}" href="data:image/png;base64,{data}"/>'


def svg(title, width, height, *parts):
    "A drawing on white, with a title for those who cannot see it."
    head = ('<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{GREY}"/></marker></defs>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="DejaVu Sans, Verdana, sans-serif"><title>{escape(title)}</title>{head}'
            f'<rect width="{width}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n')


def search(test):
    "From images to vectors to a sorted list."
    rows = [find_image(test, "butterfly", 2), find_image(test, "butterfly"), find_image(test, "banana")]
    numbers, scores = ["0.1  0.9 ...", "0.2  0.8 ...", "0.9  0.0 ..."], ["", "cosine 0.98", "cosine 0.14"]
    names, out = ["query", "gallery", "gallery"], [box(160, 14, 110, 212, BLUE, "#E8F2F9")]
    out += [text(215, 110, "network", 15, BLUE, weight="bold"), text(215, 130, "(frozen)", 13, BLUE)]
    for i, row in enumerate(rows):
        y = 20 + 72 * i
        out += [text(38, y + 32, names[i], 13), picture(test, row, 80, y), arrow(134, y + 26, 156, y + 26)]
        out += [arrow(274, y + 26, 300, y + 26), box(304, y + 8, 118, 34, BLUE), text(363, y + 30, numbers[i], 13)]
        if i: out += [arrow(426, y + 26, 456, y + 26), text(512, y + 30, scores[i], 13)]
    out += [text(363, 236, "embeddings", 13, BLUE), arrow(572, 130, 606, 130), text(668, 50, "ranking", 13)]
    for i, row in enumerate(rows[1:]):
        out += [text(628, 92 + 72 * i, f"{i + 1}.", 14), picture(test, row, 646, 62 + 72 * i)]
    title = "Images go through a network and become vectors; the cosine with the query sorts the gallery."
    return svg(title, 720, 246, *out)


def split(train, test):
    "Training and test share no class."
    trained, unseen = ["pear", "snail", "anchor", "violin"], ["butterfly", "banana", "airplane", "alarm clock"]
    sides = [("training classes", train, trained, BLUE, 10),
             ("test classes: never seen in training", test, unseen, ORANGE, 370)]
    out = []
    for title, ds, names, colour, x in sides:
        out += [box(x, 30, 340, 172, colour), text(x + 170, 20, title, 14, colour, weight="bold")]
        for i, name in enumerate(names):
            for j in range(2): out.append(picture(ds, find_image(ds, name, j + 1), x + 22 + 78 * i, 44 + 58 * j))
            out.append(text(x + 46 + 78 * i, 176, name, 12))
    return svg("Classes are dealt to training or to the test, never to both.", 720, 212, *out)


def metrics():
    "What each metric looks at in the same list."
    levels, look = [2, 0, 1, 2, 0, 1], {2: (BLUE, "white"), 1: ("#E69F00", "black"), 0: ("#DDDDDD", "black")}
    rows = [("R@2", "is there a 2 among the first two?", lambda r, l: r < 2),
            ("AP", "where are the 2s?", lambda r, l: l == 2),
            ("NDCG", "all levels, weighed by their ranks", lambda r, l: True),
            ("H-AP", "all levels, weighed by their relevance", lambda r, l: l > 0)]
    out = [text(178 + 44 * r, 22, str(r + 1), 13, GREY) for r in range(6)] + [text(96, 22, "rank", 13, GREY)]
    for i, (name, what, seen) in enumerate(rows):
        y = 34 + 46 * i
        out += [text(96, y + 24, name, 15, weight="bold"), text(450, y + 24, what, 13, anchor="start")]
        for r, l in enumerate(levels):
            fill, ink = look[l] if seen(r, l) else ("white", "#767676")
            out += [box(160 + 44 * r, y, 36, 36, GREY, fill, "" if seen(r, l) else "4 3")]
            out += [text(178 + 44 * r, y + 24, str(l), 14, ink)]
    return svg("Four metrics look at different parts of the same list of shared levels.", 760, 222, *out)


if __name__ == "__main__":
    train, test = lesson_images()
    IMG.mkdir(exist_ok=True)
    drawn = {"search": search(test), "split": split(train, test), "metrics": metrics()}
    for name, text_ in drawn.items(): (IMG / f"{name}.svg").write_text(text_, encoding="utf-8")
    sys.exit(0)
