"""The documentation site: `make docs` builds it into site/ and fails on a warning."""

from __future__ import annotations

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

from fused_l2 import __version__

project = "fused_l2"
author = "the authors of fused_l2"
project_copyright = f"2026, {author}"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # links to headings are those of a Markdown page anywhere
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"fused_l2 {__version__}"
autodoc_typehints = "none"  # in signatures of so many arguments they would hide the names
autodoc_default_options = {"member-order": "bysource"}
nitpicky = False


def open_files(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Links to tests and sources open them: Sphinx would have them downloaded."""
    for link in list(doctree.findall(addnodes.download_reference)):
        if "filename" in link:
            folder = "../" * page.count("/") + "_downloads/"
            link.replace_self(nodes.reference("", "", *link.children, refuri=folder + link["filename"], internal=True))


def setup(app: Sphinx) -> None:
    app.connect("doctree-resolved", open_files)
