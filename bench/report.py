"""``--plot FOLDER``: what a run measured as one self-contained page, and its pictures as SVG files."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import churn, clip, limit, memory, pictures, precision, statistics, step, train

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --rule: #bbb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #16181c; --rule: #555; } }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid var(--rule); padding: .25rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.3; }
svg { max-width: 100%; height: auto; }
figure { margin: 1.5rem 0; }
"""


def write(found: dict[str, Any], folder: Path) -> Path:
    """The page and a file for each picture. Returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {topic: [r for r in rs if "failed" not in r] for topic, rs in found["results"].items()}
    drawn = pictures.drawn(results)
    for name, svg in drawn.items():
        (folder / f"{name}.svg").write_text(svg)
    page = folder / "report.html"
    page.write_text(_page(found, results, [(*pictures.FIGURES[name][:2], svg) for name, svg in drawn.items()]))
    return page


SHOW = {"limit": limit.show, "step": step.show, "clip": clip.show, "statistics": statistics.show, "train": train.show}
SHOW |= {"memory": memory.show, "churn": churn.show, "precision": precision.show}


def _page(found: dict[str, Any], results: dict[str, Any], figures: list[tuple[str, str, str]]) -> str:
    parts = ["<h1>fused_l2: what this machine measured</h1>", _losses(results.get("step", []) + results.get("churn", []))]
    if found.get("disturbed samples", {}).get("count"):
        share = found["disturbed samples"]["share"]
        parts.insert(1, f"<p><strong>Measured on a busy machine: {share:.0%} of the samples waited for a core.</strong></p>")
    for topic, title, svg in figures:
        parts.append(f"<h2>{topic}</h2><figure>{svg}<figcaption>{html.escape(title)}</figcaption></figure>")
        if topic == "step":
            parts.append(_table(results["step"]))
    parts.append("<h2>Every figure</h2>")
    for topic, taken in results.items():
        show = SHOW.get(topic) or _shown_by(topic)
        text = "\n\n".join(show(result) for result in taken)
        parts.append(f"<details><summary>{topic}</summary><pre>{html.escape(text)}</pre></details>")
    rows = {**found["machine"], **{f"provider {name}": version for name, version in found["providers"].items()}}
    cells = "".join(f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v)[:120])}</td></tr>" for k, v in rows.items())
    parts.append(f"<h2>Machine and versions</h2><table>{cells}</table>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>fused_l2 benchmark</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _shown_by(topic: str) -> Callable[[Any], str]:
    from . import dtensor, host

    return {"host": host, "dtensor": dtensor}[topic].show


def _table(results: list[dict[str, Any]]) -> str:
    head = (
        "<tr><th>case</th><th>us</th><th>GB/s</th><th>% of floor</th><th>torch fused / ours</th><th>fastest other / ours</th>"
    )
    rows = []
    for r in results:
        ours, peer = r["rows"]["fused_l2"], step.best_peer(r)
        floor = ours["ratio_to_memory_floor"]
        cells = [
            f"{r['optimizer']}, {r['what']}" + (" (bfloat16)" if r["dtype"] == "bfloat16" else ""),
            f"{1e6 * ours['seconds'][1]:.1f}",
            f"{ours['GB/s']:.1f}",
            f"{100 * floor[1]:.0f}" if floor else "-",
            f"{pictures.against(r, 'torch fused')[1]:.2f}" if pictures.against(r, "torch fused") else "-",
            f"{peer[1]:.2f} ({peer[0]})" if peer else "-",
        ]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table>{head}</tr>" + "".join(rows) + "</table>"


def _losses(results: list[dict[str, Any]]) -> str:
    """What a reader looks for first: how often something else is faster, or as fast within the noise, and where."""
    lost, tied, faster = [], [], 0
    for r in results:
        peer = step.best_peer(r)
        if peer is None:
            continue
        line = f"{r['optimizer']} {r['case']} ({peer[0]}, {peer[1]:.2f})"
        standing = step.standing(r)
        if standing == "slower than":
            lost.append(line)
        elif standing == "as fast as":
            tied.append(line)
        else:
            faster += 1
    if not (lost or tied or faster):
        return ""
    as_fast = f"as fast within the noise in {len(tied)}"
    said = f"Against the fastest other, fused_l2 is faster in {faster} cases, {as_fast} and slower in {len(lost)}."
    lists = [(label, lines) for label, lines in (("Slower", lost), ("As fast", tied)) if lines]
    return f"<p>{said}</p>" + "".join(
        f"<p>{label}:</p><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>" for label, lines in lists
    )
