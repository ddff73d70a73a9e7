"""``python -m bench.pictures``: draws the pictures of docs/pictures anew, from the files of bench/results that PICTURES names.

``--plot FOLDER`` writes the same pictures of what it measured. A test compares those of the docs with their files.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgba

from . import look, theory
from .look import INK, MARKERS, PALETTE, WIDTH

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "pictures"
# The pictures of the docs, and their files. Those of theory.py have none.
PICTURES = {
    "ratios": "2026-11-26-intel-xeon-2cores.json",
    **dict.fromkeys(("decay", "moments", "training"), "2026-11-26-intel-xeon-2cores-precision.json"),
}
LINES = ("fused_l2", "torch fused", "memory floor", "copy", "triad")


def bandwidth(results: list[dict[str, Any]]) -> Any:
    optimizers = list(dict.fromkeys(r["optimizer"] for r in results))
    figure, axes = plt.subplots(len(optimizers), 1, figsize=(WIDTH, 3 * len(optimizers)), sharex=True, squeeze=False)
    for axis, optimizer in zip(axes.flat, optimizers, strict=True):
        of = [r for r in results if r["optimizer"] == optimizer]
        for who, colour, marker in zip(LINES, PALETTE, MARKERS, strict=False):
            points = [(r["bytes"] / 2**20, r["rows"][who]["GB/s"]) for r in of if who in r["rows"]]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=who)
        _logarithmic(axis)
        axis.set(ylabel="GB/s", title=optimizer)
    axis.set_xlabel("MB moved by a step (read and written)")
    axes[0][0].legend()
    return figure


def _logarithmic(axis: Any) -> None:
    axis.set(xscale="log", yscale="log")
    for which in (axis.xaxis, axis.yaxis):
        which.set_major_formatter("{x:g}")  # matplotlib's own has small exponents
    axis.minorticks_off()
    axis.grid()


def ratios(results: list[dict[str, Any]]) -> Any:
    """Two bars for each case and optimizer, from 1 to torch's default and, over it, to torch fused, with quartiles."""
    optimizers = list(dict.fromkeys(r["optimizer"] for r in results))
    cases = {r["case"]: r["what"] for r in reversed(results)}
    places = {case: y for y, case in enumerate(reversed(list(dict.fromkeys(r["case"] for r in results))))}
    figure, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.42 * len(cases)))
    height, missing, handles = 0.8 / len(optimizers), [], []
    for i, optimizer in enumerate(optimizers):
        inside = {"hatch": "/////"} if i else {"facecolor": to_rgba(PALETTE[i], 0.6)}
        styles = {
            "torch for-loop": {"edgecolor": PALETTE[i], "facecolor": "none"},
            "torch fused": {"edgecolor": PALETTE[i], "facecolor": "none", **inside},
        }
        handles += [
            plt.Rectangle((0, 0), 1, 1, **styles[who], label=f"{optimizer}, {label}")
            for who, label in (("torch fused", "fused=True"), ("torch for-loop", "default"))
        ]
        for r in (r for r in results if r["optimizer"] == optimizer):
            y = places[r["case"]] + 0.4 - height * (i + 0.5)
            taken = {who: against(r, who) for who in styles}
            for who, ratio in taken.items():
                if ratio:
                    axis.barh(y, ratio[1] - 1, 0.8 * height, left=1, **styles[who])
                    axis.hlines(y, ratio[0], ratio[2], INK, linewidth=1)
                elif who in r["not measured"]:
                    missing.append(f"No bar for {optimizer}, {r['what']}: {r['not measured'][who]}.")
            shown = [f"{ratio[1]:.{1 if ratio[1] >= 2 else 2}f}" for ratio in reversed(taken.values()) if ratio]
            right = max([1.0, *(ratio[2] for ratio in taken.values() if ratio)])
            axis.annotate(" · ".join(shown), (right, y), (4, 0), textcoords="offset points", va="center_baseline")
    axis.axvline(1, color=INK, linewidth=1)
    axis.set(xscale="log", xlabel="times as long as fused_l2", ylim=(-0.6, len(cases) - 0.4))
    low, high = axis.get_xlim()
    axis.set_xlim(low, high * 2.8)
    ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= t <= high * 2.8]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    labels = [(y - 0.4 * (k - (len(parts) - 1) / 2), part) for case, y in places.items()
              for parts in [cases[case].split(", ")] for k, part in enumerate(parts)]  # fmt: skip
    axis.set_yticks([y for y, _ in labels], [part for _, part in labels])
    axis.tick_params(axis="y", length=0)
    figure.legend(handles=handles, loc="outside upper left", ncol=len(optimizers))
    if missing:
        notes = "\n".join(textwrap.fill(note, 58) for note in missing)
        figure.supxlabel(notes, x=0.01, ha="left", fontsize=10)
    return figure


def against(result: dict[str, Any], who: str) -> Any:
    """Another's time in times of ours, with its quartiles."""
    return result["rows"][who]["ours_to_this"] if who in result["rows"] else None


def host(results: list[dict[str, Any]]) -> Any:
    devices = list(dict.fromkeys(r["device"] for r in results))
    figure, axes = plt.subplots(len(devices), 1, figsize=(WIDTH, 3 * len(devices)), sharex=True, squeeze=False)
    for axis, device in zip(axes.flat, devices, strict=True):
        for who, colour, marker in zip(("fused_l2", "torch fused"), PALETTE, MARKERS, strict=False):
            for groups, style in (("one group", "-"), ("a group per tensor", ":")):
                of = [r for r in results if r["device"] == device]
                of = [r for r in of if (r["groups"] == 1) == (groups == "one group") and r["groups"] in (1, r["tensors"])]
                points = [(r["tensors"], r["microseconds"][who][1]) for r in of]
                if points:
                    xs, ys = zip(*points, strict=True)
                    axis.plot(xs, ys, style, color=colour, marker=marker, markersize=5, label=f"{who}, {groups}")
        _logarithmic(axis)
        axis.set(ylabel="microseconds", title=f"{device}: host time of a step")
    axis.set_xlabel("tensors")
    axes[0][0].legend()
    return figure


def alike(curves: dict[str, list[float]], tolerance: float) -> list[list[str]]:
    """The names, those together whose curves nowhere differ by more from the first's. They share a colour."""
    groups: list[list[str]] = []
    for name, curve in curves.items():
        for group in groups:
            if all(abs(a - b) <= tolerance for a, b in zip(curve, curves[group[0]], strict=True)):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def together(names: list[str]) -> str:
    """The names in the legend: what several begin with stands once."""
    shown, before = [], ""
    for name in names:
        first, _, rest = name.partition(" ")
        shown.append(rest if rest and first == before else name)
        before = first
    return textwrap.fill(", ".join(shown), 50)


def _panels(of: list[dict[str, Any]], row: str, column: str, height: float) -> tuple[Any, list[Any]]:
    """A panel for each result, by two of its keys; and the panels that stand leftmost and lowest."""
    rows, columns = (list(dict.fromkeys(r[key] for r in of)) for key in (row, column))
    shape = (len(rows), len(columns))
    figure, axes = plt.subplots(*shape, figsize=(WIDTH, height), sharex="row", sharey=True, squeeze=False)
    return figure, [axes[rows.index(r[row])][columns.index(r[column])] for r in of]


def _curves(axes: list[Any], groups: list[list[str]], drawn: list[tuple[Any, dict[str, Any]]]) -> None:
    for axis, (xs, curves) in zip(axes, drawn, strict=True):
        for i, group in enumerate(groups):
            for name in group[::-1]:
                look.line(axis, i, xs, curves[name], together(group) if name == group[0] else None)
        axis.grid()


def decay(results: list[dict[str, Any]]) -> Any:
    of = [r for r in results if r["kind"] == "decay"]
    figure, axes = _panels(of, "lr", "noise", 5.6)
    shares = [{n: [100 * share for share in curve] for n, curve in r["shares"].items() if n != "float32"} for r in of]
    groups = alike({name: [x for s in shares for x in s[name]] for name in shares[0]}, 1)
    _curves(axes, groups, [(r["steps"], s) for r, s in zip(of, shares, strict=True)])
    for axis, r in zip(axes, of, strict=True):
        title = f"lr {r['lr']:g}, " + ("normal gradients" if r["noise"] else "gradients of 0")
        axis.set_title(title, fontsize=9.5)
        axis.set(ylim=(-5, 110), xticks=[0, 4000, 8000], yticks=[0, 50, 100])
    figure.supxlabel("steps", fontsize=10)
    figure.supylabel("% of the decay in float32", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left")
    return figure


def moments(results: list[dict[str, Any]]) -> Any:
    of = [r for r in results if r["kind"] == "moments"]
    figure, axes = _panels(of, "beta2", "share", 5.4)
    groups = alike({name: [x for r in of for x in r["left"][name]] for name in of[0]["left"]}, 0.001)
    _curves(axes, groups, [(r["steps"], r["left"]) for r in of])
    for axis, r in zip(axes, of, strict=True):
        resting = "all" if r["share"] == 1 else f"one of {1 / r['share']:g}"
        axis.set_title(f"beta2 {r['beta2']:g}, {resting} at rest", fontsize=9.5)
        axis.set(yscale="log", xticks=[0, r["steps"][-1] // 2, r["steps"][-1]])
        axis.set_yticks([0.3, 0.4, 0.6, 0.8, 1], ["0.3", "0.4", "0.6", "0.8", "1"])
        axis.minorticks_off()
    figure.supxlabel("steps without gradients", fontsize=10)
    figure.supylabel("v, of what it was (geometric mean)", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncol=2)
    return figure


def training(results: list[dict[str, Any]]) -> Any:
    r = next(r for r in results if r["kind"] == "training")
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 6.6), sharex=True)
    losses = {n: [sum(curve[k : k + 25]) / 25 for k in range(0, len(curve), 25)] for n, curve in r["losses"].items()}
    exact, norm = losses["float32"], r["norms"]["float32"]
    apart = {n: [a - b for a, b in zip(curve, exact, strict=True)] for n, curve in losses.items()}
    norms = {n: [a / b for a, b in zip(curve, norm, strict=True)] for n, curve in r["norms"].items()}
    steps = [25 * (k + 1) for k in range(len(exact))]
    _curves(list(axes), alike({n: apart[n] + norms[n] for n in apart}, 0.005), [(steps, c) for c in (losses, apart, norms)])
    for axis, title in zip(axes, ("loss", "loss, minus float32's", "|w|, of float32's"), strict=True):
        axis.set_title(title)
    axes[-1].set_xlabel("steps")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left")
    return figure


# File name: the topic it is drawn from, its caption, what draws it.
FIGURES: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "bandwidth": ("limit", "Bandwidth of steps, from the caches to memory (one float32 tensor)", bandwidth),
    "ratios": (
        "step",
        "One optimizer step: the time of torch's fused step (filled) and of torch's default (outlined) in times of ours, with "
        "quartiles and both numbers (right of 1 ours is faster)",
        ratios,
    ),
    "host": ("host", "The host's time for a step of AdamW (cuda: into a stub of the driver, without a GPU)", host),
    "decay": (
        "precision",
        "bfloat16: share of the weight decay that arrived (AdamW, weight_decay 0.1); one colour: within 1 % of each other",
        decay,
    ),
    "moments": ("precision", "Second moments without gradients, by the format they are kept in", moments),
    "training": ("precision", "A transformer in bfloat16, against the same in float32 (AdamW, mean of 25 steps)", training),
}


def drawn(results: dict[str, list[dict[str, Any]]], source: str = "") -> dict[str, str]:
    """The SVG of each figure that these results have the data of."""
    found = {}
    for name, (topic, _, draw) in FIGURES.items():
        of = [r for r in results.get(topic, []) if "failed" not in r]
        if topic == "precision":  # its pictures have the names of its kinds
            of = [r for r in of if r["kind"] == name]
        if of:
            found[name] = look.svg(draw, of, source=source)
    return found


def of_files() -> dict[str, str]:
    """The SVG of each picture of the docs that is drawn from a file of results."""
    found = {}
    for file in dict.fromkeys(PICTURES.values()):
        results = json.loads((ROOT / "bench" / "results" / file).read_text())["results"]
        made = drawn(results, f"bench/results/{file}")
        found |= {name: made[name] for name, of in PICTURES.items() if of == file}
    return found


if __name__ == "__main__":
    of_theory = {name: look.svg(draw, source="bench/theory.py") for name, draw in theory.PICTURES.items()}
    for name, picture in (of_files() | of_theory).items():
        (FOLDER / f"{name}.svg").write_text(picture)
