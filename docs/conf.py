"""The documentation site: `make docs` builds it into site/ and fails on a warning."""

from __future__ import annotations

from docutils.nodes import Element
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from fused_l2 import __version__

project = "fused_l2"
author = "the authors of fused_l2"
project_copyright = f"2026, {author}"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx-mathjax-offline", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # links to headings are those of a Markdown page anywhere
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"fused_l2 {__version__}"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 85  # longer ones have a line for each argument
autodoc_default_options = {"member-order": "bysource"}
nitpicky = False


class Translator(HTML5Translator):
    """Links to tests, sources and results open in the browser; Sphinx would have it save them."""

    def visit_download_reference(self, node: Element) -> None:
        super().visit_download_reference(node)
        self.body[-1] = self.body[-1].replace(' download=""', "")


def setup(app: Sphinx) -> None:
    app.set_translator("html", Translator)
