"""The course as a static book: Sphinx reads the notebooks where they are, with the outputs that are stored in them.

`make site` builds it into build/site; nothing is executed and a reader needs no network.  What is computed for it (the
cheat sheet's tables, the programmes, the results) comes from tools/site.py and tools/editions.py.
"""

import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import site  # noqa: E402

project = "LLM quantization"
copyright = "its authors, Apache-2.0"
extensions = ["myst_nb", "sphinxcontrib.bibtex", "sphinx-mathjax-offline"]
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/*.ipynb", "data/results/README.md"]
exclude_patterns = [".*", "build", "qtutor", "tests", "tools", "test-artifacts", "**/.ipynb_checkpoints"]

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
myst_heading_slug_func = f"{site.anchor.__module__}.{site.anchor.__name__}"  # JupyterLab's: a link serves both
myst_links_external_new_tab = False
bibtex_bibfiles = ["references.bib"]
smartquotes = False
bibtex_default_style = "plain"
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

html_theme = "sphinx_book_theme"
html_title = "LLM quantization, from first cell to last"
html_static_path = ["_static"]
html_css_files = ["course.css"]
html_js_files = ["course.js"]
html_last_updated_fmt = ""
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the sidebar has a search field already
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def glossary_terms() -> list[tuple[re.Pattern, str]]:
    """(pattern, term) for each entry of the glossary, the longest first: "block scaling" before "block"."""
    text = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    terms = re.findall(r"^(\S.*)\n(?=    \S|: )", text, re.M)
    words = {t: f"{re.escape(t)}|{re.escape(t[0].upper() + t[1:])}" for t in sorted(terms, key=len, reverse=True)}
    return [(re.compile(rf"(?<![\w-])(?:{forms})s?(?![\w-])"), term) for term, forms in words.items()]


def describe_and_link(app, doctree) -> None:
    """A notebook's pictures get their texts; in its prose the first use of a glossary term leads to its entry."""
    docname = app.env.current_document.docname
    if not docname.startswith("notebooks/"):
        return
    pictures = [node for node in doctree.findall(nodes.image) if shown_by_a_cell(node)]
    for node, text in zip(pictures, site.alternative_texts(docname.removeprefix("notebooks/")), strict=True):
        node["alt"] = text
    unlinked, apart = glossary_terms(), (nodes.reference, nodes.title, nodes.literal, nodes.math, addnodes.pending_xref)
    for paragraph in list(doctree.findall(nodes.paragraph)):
        if shown_by_a_cell(paragraph):
            continue  # what a cell printed is not ours to link
        for pattern, term in list(unlinked):
            for text in list(paragraph.findall(nodes.Text)):
                match = pattern.search(text)
                if not match or any(isinstance(node, apart) for node in ancestors(text)):
                    continue
                link = addnodes.pending_xref("", nodes.inline("", match[0]), refdomain="std", reftype="term",
                                             reftarget=term, refexplicit=True, refdoc=docname)  # fmt: skip
                parts = [nodes.Text(text[: match.start()]), link, nodes.Text(text[match.end() :])]
                text.parent.replace(text, parts)
                unlinked.remove((pattern, term))
                break


def ancestors(node):
    """The nodes around a node, from the inside out."""
    while node := node.parent:
        yield node


def shown_by_a_cell(node) -> bool:
    """Whether a node is an output of a cell."""
    return any("cell_output" in around.get("classes", ()) for around in ancestors(node))


def setup(app):
    app.connect("source-read", lambda app, name, content: content.__setitem__(0, site.prepared(name, content[0])))
    app.connect("doctree-read", describe_and_link)
