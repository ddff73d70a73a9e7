"""How all pictures look, those of the docs and those of ``--plot``: SVG for light pages, dark pages and telephones.

Axes and text have the colour of the page's text: a picture that is part of a page inherits it, one in a file of its own asks
for the reader's theme. Lines and bars stand out on white and on black; most colours are Okabe and Ito's, which stay apart for
colour-blind readers, and each line has a marker of its own, too. Text is text, in the font of the reader's system, and has 9
pixels or more where a picture is squeezed into a telephone. The same results give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK = "#123456"  # stands for the page's text colour until the SVG is written
LIGHT, DARK = "#656d76", "#8b949e"  # that colour in a file of its own; each can be read on the other's background, too
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#A67C00", INK)
MARKERS, STYLES = "osD^vP", ("-", "--", ":", "-.")
WIDTH = 5.0  # inches, 360 units of the SVG: about as many pixels as a telephone has
# `svg:root` is nothing where the picture is part of a page.
THEMES = (
    f"<style>svg:root {{ color: {LIGHT} }} @media (prefers-color-scheme: dark) {{ svg:root {{ color: {DARK} }} }} "
    "svg { stroke-linejoin: round; stroke-linecap: butt; font-family: system-ui, sans-serif }</style>"
)
PARAMETERS = {
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor"), INK
    ),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize"), 10),
    "legend.fontsize": 10, "legend.frameon": False, "font.family": "sans-serif", "font.sans-serif": "DejaVu Sans",
    "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3, "grid.color": INK, "hatch.linewidth": 1.0,
    "figure.constrained_layout.use": True, "svg.fonttype": "none", "svg.hashsalt": "fused_l2",
}  # fmt: skip


def svg(draw: Callable[..., Any], *given: Any, source: str = "") -> str:
    """The figure that ``draw`` makes of what is given, and where its figures are from."""
    buffer = io.StringIO()
    with plt.rc_context(PARAMETERS):
        figure = draw(*given)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    text = buffer.getvalue()
    text = re.sub(r" font-family: [^;\"]*;?|(?<=px) 'DejaVu Sans'[^;\"]*", "", text[text.index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>", f"<desc>{source}</desc>" if source else "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", THEMES, text, count=1, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"-?\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", tag[0]), text)
    return re.sub(r"[ \n]*\n *", "\n", text.replace(INK, "currentColor"))


def line(axis: Any, i: int, xs: Any, ys: Any, label: str | None = None) -> None:
    """The i-th line of a picture. Without a label, one more of the i-th colour, and without markers."""
    colour, style = PALETTE[i % len(PALETTE)], STYLES[i // len(PALETTE)]
    marker = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4, "markevery": (i % 4, 4)} if label else {}
    axis.plot(xs, ys, style, color=colour, linewidth=1.2, label=label, **marker)
