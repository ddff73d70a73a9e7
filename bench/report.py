"""``--plot FOLDER``: what a run measured as one self-contained page, and its pictures as PNG files.

Colours are Okabe and Ito's, which stay apart for colour-blind readers, and each line and bar has a marker or hatch of its own.
In the page the pictures are SVG whose text and axes take the page's colour, so that they are readable in both themes.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import churn, clip, limit, memory, precision, statistics, step, train

INK = "#123456"  # stands for the page's text colour until the SVG is written
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS, HATCHES = "osD^vP", ("", "//", "..", "xx", "\\\\", "--")
LINES = ("fused_l2", "torch fused", "memory floor", "copy", "triad")
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
    """The page and one PNG per picture. Returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {topic: [r for r in rs if "failed" not in r] for topic, rs in found["results"].items()}
    figures = []
    for name, (topic, title, draw) in FIGURES.items():
        if not results.get(topic):
            continue
        if topic == "precision" and name not in {r["kind"] for r in results[topic]}:  # its pictures have the names of its kinds
            continue
        figure = _drawn(draw, results[topic])
        figure.savefig(folder / f"{name}.png", dpi=150, facecolor="white")
        figures.append((topic, title, _svg(figure)))
        plt.close(figure)
    page = folder / "report.html"
    page.write_text(_page(found, results, figures))
    return page


def _drawn(draw: Callable[[Any], Any], results: Any) -> Any:
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    parameters = {**dict.fromkeys(ink, INK), "svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif"}
    with plt.rc_context(parameters):
        return draw(results)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _bandwidth(results: list[dict[str, Any]]) -> Any:
    optimizers = list(dict.fromkeys(r["optimizer"] for r in results))
    figure, axes = plt.subplots(
        1, len(optimizers), figsize=(5 * len(optimizers), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, optimizer in zip(axes[0], optimizers, strict=True):
        of = [r for r in results if r["optimizer"] == optimizer]
        for who, colour, marker in zip(LINES, PALETTE, MARKERS, strict=False):
            points = [(r["bytes"] / 2**20, r["rows"][who]["GB/s"]) for r in of if who in r["rows"]]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=who)
        axis.set(xscale="log", yscale="log", xlabel="MB moved by a step (read and written)", title=optimizer)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("GB/s")
    axes[0][0].legend(frameon=False)
    return figure


def _ratios(results: list[dict[str, Any]]) -> Any:
    optimizers = list(dict.fromkeys(r["optimizer"] for r in results))
    most = max(sum(r["optimizer"] == o for r in results) for o in optimizers)
    figure, axes = plt.subplots(
        1, len(optimizers), figsize=(5.5 * len(optimizers), 1.4 + 0.42 * most), squeeze=False, layout="constrained"
    )
    for axis, optimizer in zip(axes[0], optimizers, strict=True):
        of = [r for r in results if r["optimizer"] == optimizer][::-1]
        for offset, (label, colour, hatch) in enumerate(zip(("torch fused", "fastest other"), PALETTE, HATCHES, strict=False)):
            drawn = [(y, _against(r, label)) for y, r in enumerate(of)]
            drawn = [(y, taken) for y, taken in drawn if taken is not None]
            middles = [taken[1] for _, taken in drawn]
            errors = [[t[1] - t[0] for _, t in drawn], [t[2] - t[1] for _, t in drawn]]
            places = [y + 0.2 - 0.4 * offset for y, _ in drawn]
            axis.barh(
                places, middles, 0.38, xerr=errors, color=colour, hatch=hatch, edgecolor="white", ecolor=INK,
                capsize=2, label=f"against {label}",
            )  # fmt: skip
            for place, middle, taken in zip(places, middles, drawn, strict=True):
                axis.text(max(taken[1][2], middle) * 1.04, place, f"{middle:.2f}", va="center", fontsize=8)
        axis.axvline(1, color=INK, linewidth=1)
        axis.set(xscale="log", title=optimizer, xlabel="times as long as fused_l2")
        axis.set_yticks(range(len(of)), [r["case"] for r in of])
        low, high = axis.get_xlim()
        axis.set_xlim(min(low, 0.7), high * 1.6)
        ticks = [t for t in (0.5, 1, 2, 5, 10, 20) if min(low, 0.7) <= t <= high * 1.6]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncol=2)
    return figure


def _against(result: dict[str, Any], label: str) -> Any:
    """Our ratio to torch fused, or to the fastest other provider, with its quartiles."""
    if label != "torch fused":
        peer = step.best_peer(result)
        return result["rows"][peer[0]]["ours_to_this"] if peer else None
    return result["rows"][label]["ours_to_this"] if label in result["rows"] else None


def _host(results: list[dict[str, Any]]) -> Any:
    devices = list(dict.fromkeys(r["device"] for r in results))
    figure, axes = plt.subplots(
        1, len(devices), figsize=(5 * len(devices), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, device in zip(axes[0], devices, strict=True):
        for who, colour, marker in zip(("fused_l2", "torch fused"), PALETTE, MARKERS, strict=False):
            for groups, style in (("one group", "-"), ("a group per tensor", ":")):
                of = [r for r in results if r["device"] == device]
                of = [r for r in of if (r["groups"] == 1) == (groups == "one group") and r["groups"] in (1, r["tensors"])]
                points = [(r["tensors"], r["microseconds"][who][1]) for r in of]
                if points:
                    xs, ys = zip(*points, strict=True)
                    axis.plot(xs, ys, style, color=colour, marker=marker, markersize=5, label=f"{who}, {groups}")
        axis.set(xscale="log", yscale="log", xlabel="tensors", title=f"{device}: host time of a step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("microseconds")
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


STYLES = ("-", "--", ":", "-.")


def _line(axis: Any, i: int, xs: Any, ys: Any, label: str) -> None:
    colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
    style = STYLES[i // len(PALETTE)]
    axis.plot(xs, ys, style, color=colour, marker=marker, markersize=4, markevery=(i % 4, 4), linewidth=1.2, label=label)


def _decay(results: list[dict[str, Any]]) -> Any:
    of = [r for r in results if r["kind"] == "decay"]
    rows = max(1, math.ceil(len(of) / 2))
    figure, axes = plt.subplots(rows, 2, figsize=(10, 3.4 * rows), sharey=True, squeeze=False, layout="constrained")
    for axis, r in zip(axes.flat, of, strict=False):
        for i, (name, shares) in enumerate((n, s) for n, s in r["shares"].items() if n != "float32"):
            _line(axis, i, r["steps"], [100 * share for share in shares], name)
        gradients = "normal gradients" if r["noise"] else "gradients of 0"
        axis.set(title=f"lr {r['lr']:g}, {gradients}", xlabel="steps", ylim=(-5, 130))
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("% of the decay in float32")
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncol=5, fontsize=8)
    return figure


def _moments(results: list[dict[str, Any]]) -> Any:
    of = [r for r in results if r["kind"] == "moments"]
    rows = max(1, math.ceil(len(of) / 2))
    figure, axes = plt.subplots(rows, 2, figsize=(10, 3.6 * rows), sharey=True, squeeze=False, layout="constrained")
    for axis, r in zip(axes.flat, of, strict=False):
        for i, (name, curve) in enumerate(r["left"].items()):
            _line(axis, i, r["steps"], curve, name)
        title = f"beta2 {r['beta2']:g}, {100 * r['share']:g} % of the elements at rest"
        axis.set(title=title, xlabel="steps without gradients", yscale="log")
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("v, of what it was (geometric mean)")
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


def _training(results: list[dict[str, Any]]) -> Any:
    r = next(r for r in results if r["kind"] == "training")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    means = {n: [sum(curve[k : k + 25]) / 25 for k in range(0, len(curve), 25)] for n, curve in r["losses"].items()}
    steps = [25 * (k + 1) for k in range(len(means["float32"]))]
    for i, (name, curve) in enumerate(means.items()):
        _line(left, i, steps, curve, name)
        _line(middle, i, steps, [a - b for a, b in zip(curve, means["float32"], strict=True)], name)
        norms = [a / b for a, b in zip(r["norms"][name], r["norms"]["float32"], strict=True)]
        _line(right, i, steps, norms, name)
    for axis, title in ((left, "loss"), (middle, "loss, minus float32's"), (right, "|w|, of float32's")):
        axis.set(title=title, xlabel="steps")
        axis.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    return figure


# File name: the topic it is drawn from, its caption, what draws it.
FIGURES: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "bandwidth": ("limit", "Bandwidth of steps, from the caches to memory (one float32 tensor)", _bandwidth),
    "ratios": (
        "step",
        "One optimizer step: the time of others in times of ours, with quartiles (right of 1 ours is faster)",
        _ratios,
    ),
    "host": ("host", "The host's time for a step of AdamW (cuda: into a stub of the driver, without a GPU)", _host),
    "decay": ("precision", "bfloat16: share of the weight decay that arrived (AdamW, weight_decay 0.1)", _decay),
    "moments": ("precision", "Second moments without gradients, by the format they are kept in", _moments),
    "training": ("precision", "A transformer in bfloat16, against the same in float32 (AdamW, mean of 25 steps)", _training),
}
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
            f"{_against(r, 'torch fused')[1]:.2f}" if _against(r, "torch fused") else "-",
            f"{peer[1]:.2f} ({peer[0]})" if peer else "-",
        ]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table>{head}</tr>" + "".join(rows) + "</table>"


def _losses(results: list[dict[str, Any]]) -> str:
    """The sentence a reader looks for first: where something else is faster, or as fast within the noise."""
    lost, tied = [], []
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
    if not results:
        return ""
    said = [f"Slower than the fastest other in: {', '.join(lost)}." if lost else "Slower than no other in any case."]
    said += [f"As fast within the noise floor in: {', '.join(tied)}."] if tied else []
    return f"<p>{html.escape(' '.join(said))}</p>"
