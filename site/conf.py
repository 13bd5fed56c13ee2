"""Sphinx configuration of the site. `site/build.py` makes the pages that it reads."""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import convert
import vendor

config = convert.settings()
project, author, copyright = config["title"], config["author"], config["copyright"]
html_title, release = config["title"], config["version"]
extensions = ["myst_nb", "sphinx.ext.mathjax"]
exclude_patterns = ["_made"]

nb_execution_mode = "off"
nb_code_prompt_show, nb_code_prompt_hide = "Imports", "Imports"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "deflist", "dollarmath", "fieldlist", "html_image"]
myst_heading_anchors = 4

html_theme = "furo"
html_static_path = ["static", str(vendor.fetch("mathjax") / "es5")]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"priority": 900})]
mathjax_path = "tex-svg.js"
html_show_sourcelink = html_copy_source = False
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"


def setup(app):
    "Add what `convert` has made for the scripts of the site."
    app.config.html_static_path.append(str(Path(app.srcdir) / "_made"))
