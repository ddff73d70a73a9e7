"""``python -m bench.tables``: writes the tables of README and of two pages of docs from the results they name.

A table stands between ``<!-- table TOPIC FILE -->`` and ``<!-- end -->``. No figure in it is typed by hand; a test compares.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from . import predictions, step
from .cases import CASES, COLD, GPU_CASES
from .churn import SITUATIONS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / "performance.md", ROOT / "docs" / "low-precision.md", ROOT / "README.md"]
MARKED = re.compile(r"(<!-- table (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
WHAT = {of.name: of.what for of in (*CASES, *COLD, *SITUATIONS)}


def _spread(quartiles: Any) -> str:
    low, median, high = quartiles
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def _by_case(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for r in results:
        if "failed" not in r:
            found.setdefault(r["case"], {})[r["optimizer"]] = r
    return found


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


HEADLINE = ("resnet50", "gpt2-small", "lora", "tiny-1000-cold", "tiny-1000", "one-25m-bf16")


def headline(results: list[dict[str, Any]]) -> str:
    """What AdamW's users gain: torch's default and its fused step, each divided by ours."""
    of = _by_case(results)
    rows = []
    for case in HEADLINE:
        others = of[case]["AdamW"]["rows"]
        rows.append([WHAT[case], *(f"{others[name]['ours_to_this'][1]:.1f}" for name in ("torch for-loop", "torch fused"))])
    return _markdown(["AdamW: time of torch.optim / ours", "default (for-loop)", "`fused=True`"], rows)


def fused(results: list[dict[str, Any]]) -> str:
    """Our ratio to torch fused, with quartiles."""
    rows = []
    for case, of in _by_case(results).items():
        cells = [WHAT[case]]
        for optimizer in ("AdamW", "SGD"):
            ratio = of[optimizer]["rows"]["fused_l2"]["ratio_to_torch_fused"] if optimizer in of else None
            cells.append(_spread(ratio) if ratio else "-")
        rows.append(cells)
    return _markdown(["case", "AdamW", "SGD, momentum"], rows)


def peer(results: list[dict[str, Any]]) -> str:
    """Our ratio to the fastest other provider, whoever that is, and the noise floor."""
    rows = []
    for case, of in _by_case(results).items():
        cells = [WHAT[case]]
        for optimizer in ("AdamW", "SGD"):
            best = step.best_peer(of[optimizer]) if optimizer in of else None
            noise = f", noise {100 * of[optimizer]['noise floor']:.1f} %" if best else ""
            cells.append(f"{best[1]:.2f} ({best[0]}{noise})" if best else "-")
        rows.append(cells)
    return _markdown(["case", "AdamW", "SGD, momentum"], rows)


def floor(results: list[dict[str, Any]]) -> str:
    """The memory floor's time as a share of ours and of torch fused's."""
    rows = []
    for case, of in _by_case(results).items():
        cells = [WHAT[case]]
        for optimizer in ("AdamW", "SGD"):
            for who in ("fused_l2", "torch fused"):
                row = of.get(optimizer, {}).get("rows", {}).get(who)
                share = row["ratio_to_memory_floor"] if row else None
                cells.append(f"{100 * share[1]:.0f} %" if share else "-")
        rows.append(cells)
    return _markdown(["case", "AdamW: floor / ours", "torch fused", "SGD: floor / ours", "torch fused"], rows)


def providers(results: list[dict[str, Any]]) -> str:
    """AdamW: the time of every provider in times of ours."""
    of_adamw = [r for r in results if r.get("optimizer") == "AdamW" and "failed" not in r]
    names = list(dict.fromkeys(name for r in of_adamw for name in r["rows"] if name not in step.NOT_PEERS))
    rows = []
    for r in of_adamw:
        cells = (f"{r['rows'][n]['ours_to_this'][1]:.2f}" if n in r["rows"] else "-" for n in names)
        rows.append([WHAT[r["case"]], *cells])
    return _markdown(["AdamW: time / ours", *names], rows)


def clip(results: list[dict[str, Any]]) -> str:
    rows = [
        [WHAT[case], *(_spread(of[o]["ratio"]) if o in of else "-" for o in ("AdamW", "SGD"))]
        for case, of in _by_case(results).items()
    ]
    return _markdown(["clip + step, torch / ours", "AdamW", "SGD, momentum"], rows)


def statistics(results: list[dict[str, Any]]) -> str:
    rows = [
        [WHAT[case], *(_spread(of[o]["cost"]) if o in of else "-" for o in ("AdamW", "SGD"))]
        for case, of in _by_case(results).items()
    ]
    return _markdown(["time with / time without", "AdamW", "SGD, momentum"], rows)


def churn(results: list[dict[str, Any]]) -> str:
    """The time of others in times of ours, and how we stand to the fastest of them."""
    taken = [r for r in results if "failed" not in r]
    names = list(dict.fromkeys(name for r in taken for name in r["rows"] if name not in step.NOT_PEERS))
    rows = []
    for r in taken:
        best = step.best_peer(r)
        ratios = (_spread(r["rows"][name]["ours_to_this"]) if name in r["rows"] else "-" for name in names)
        ours = f"{1e6 * r['rows']['fused_l2']['seconds'][1]:.0f}"
        stands = f"{step.standing(r)} {best[0]}" if best else "-"
        rows.append([WHAT[r["case"]], ours, *ratios, f"{100 * r['noise floor']:.1f} %", stands])
    others = [f"{name} / ours" for name in names]
    return _markdown(["AdamW, one thread", "ours, us", *others, "noise", "ours is"], rows)


def train(results: list[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        for name, row in r["rows"].items():
            if name in ("none", "fused_l2 again"):
                continue
            share = f"{100 * row['share of the step'][1]:.0f} %"
            rows.append([f"{r['optimizer']}, {r['case']}", name, share, _spread(row["ours_to_this"])])
    return _markdown(["training", "optimizer", "its share of the time", "training step / with ours"], rows)


def memory(results: list[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        for name, row in r["rows"].items():
            figures = (row["parameter and gradient"], row["states"], row["temporary"], row["moved"])
            cells = ("-" if figure is None else f"{figure:.0f}" for figure in figures)
            rows.append([f"{r['optimizer']}, {r['dtype']}", name, *cells])
    return _markdown(["bytes per parameter", "optimizer", "parameter, gradient", "states", "temporary", "moved"], rows)


def host(results: list[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        times = (f"{taken[1]:.0f}" for taken in r["microseconds"].values())
        ratio = _spread(r["ratio, torch's kernel left out"])
        rows.append([r["device"], str(r["tensors"]), str(r["groups"]), *times, ratio])
    columns = ["device", "tensors", "groups", "ours, us", "torch fused, us", "its kernel, us", "ratio without the kernel"]
    return _markdown(columns, rows)


def dtensor(results: list[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        times = (f"{taken[1]:.0f}" for taken in r["microseconds"].values())
        ratios = (_spread(r[key]) for key in ("to plain tensors", "torch foreach to ours", "torch fused to ours"))
        rows.append([str(r["tensors"]), *times, *ratios])
    columns = ["tensors", "DTensors, us", "plain, us", "torch foreach, us", "torch fused, us"]
    return _markdown([*columns, "DTensors / plain", "torch foreach / ours", "torch fused / ours"], rows)


def decay(results: list[dict[str, Any]]) -> str:
    """The share of weight decay that arrived at the end."""
    of = [r for r in results if r.get("kind") == "decay"]
    columns = ["AdamW, bfloat16", *(f"lr {r['lr']:g}, {'normal gradients' if r['noise'] else 'gradients of 0'}" for r in of)]
    names = [name for name in of[0]["shares"] if name != "float32"]
    return _markdown(columns, [[name, *(f"{100 * r['shares'][name][-1]:.1f} %" for r in of)] for name in names])


def moments(results: list[dict[str, Any]]) -> str:
    """The share of the decay of second moments that arrived."""
    of = [r for r in results if r.get("kind") == "moments"]
    resting = ["all" if r["share"] == 1 else f"one of {1 / r['share']:g}" for r in of]
    columns = [
        "AdamW's second moments",
        *(f"beta2 {r['beta2']:g}, {which} at rest" for r, which in zip(of, resting, strict=True)),
    ]
    return _markdown(columns, [[name, *(f"{100 * r['arrived'][name]:.1f} %" for r in of)] for name in of[0]["arrived"]])


def training(results: list[dict[str, Any]]) -> str:
    """How far a training in bfloat16 is from the one in float32."""
    r = next(r for r in results if r.get("kind") == "training")
    rows = []
    for name, curve in r["losses"].items():
        figures = (sum(curve[-50:]) / 50, r["largest difference"][name], r["norm, of float32's"][name])
        rows.append([name, *(f"{x:.3f}" for x in figures)])
    columns = ["AdamW", "loss, mean of the last 50 steps", "largest difference to float32", "norm of w, of float32's"]
    return _markdown(columns, rows)


def seeds(results: list[dict[str, Any]]) -> str:
    """What 8 bits do to trainings: the smallest and the largest over the seeds, differences to float32 of the same seed, and
    the mean of |w| with its standard error."""
    rows = []
    for r in (r for r in results if r.get("kind") == "seeds"):
        exact = r["rows"]["float32"]
        for name, row in r["rows"].items():
            apart = [a - b for a, b in zip(row["loss"], exact["loss"], strict=True)]
            norms = [a / b for a, b in zip(row["norm"], exact["norm"], strict=True)]
            loss, apart, of_norms, update = (
                f"{min(v):.3f} to {max(v):.3f}" for v in (row["loss"], apart, norms, row["update"])
            )
            error = stdev(norms) / math.sqrt(len(norms))
            average = f"{mean(norms):.3f} ± {error:.3f}"
            rows.append([f"{r['model']}, {len(norms)} seeds: {name}", loss, apart, of_norms, average, update])
    columns = ["AdamW", "loss, mean of the last 50 steps", "minus float32's", "norm of w, of float32's",
               "mean of that ± its standard error", "largest update, in lr"]  # fmt: skip
    return _markdown(columns, rows)


def eight_bit_peers(results: list[dict[str, Any]]) -> str:
    """The time of other 8-bit steps on a CPU, in times of ours."""
    others = next(r for r in results if r.get("kind") == "speed")["others"]
    names = list(dict.fromkeys(name for case in others.values() for name in case))
    rows = [
        [name, *(f"{1e3 * case[name]['seconds'][1]:.1f} ms, {_spread(case[name]['ours_to_this'])}" for case in others.values())]
        for name in names
    ]
    return _markdown(["AdamW, 8-bit states, float32 parameters: time / ours", *others], rows)


def speed(results: list[dict[str, Any]]) -> str:
    """What the modes hold, move and take, from memory and in the caches."""
    r = next(r for r in results if r.get("kind") == "speed")
    rows = [
        [name, f"{row['parameter, gradient']} + {row['states']:.3g}", f"{row['moved']:.3g}", f"{1e3 * row['seconds'][1]:.1f}",
         f"{row['GB/s']:.0f}", _spread(row["GB/s, of float32's"]), f"{1e9 * row['in caches']['seconds'][1]:.2f}",
         _spread(row["in caches"]["of float32"])]
        for name, row in r["rows"].items()
    ]  # fmt: skip
    columns = ["AdamW, 25M", "bytes a parameter: it and its gradient + states", "moved", "ms", "GB/s", "GB/s, of float32's",
               "in caches, ns an element", "that time / float32's"]  # fmt: skip
    return _markdown(columns, rows)


def _gpu_rows(results: list[dict[str, Any]], optimizer: str) -> list[dict[str, Any]]:
    plain = {case.name for case in GPU_CASES}
    return [r for r in results if r["optimizer"] == optimizer and r["case"] in plain]


def _foreach(result: dict[str, Any]) -> float:
    """The time of torch's default on a GPU, in times of ours."""
    return float(result["rows"]["torch foreach"]["wall"][1] / result["rows"]["fused_l2"]["wall"][1])


def gpu(results: list[dict[str, Any]]) -> str:
    """Steps on a GPU: ours beside torch's, the copy's bandwidth, and what was predicted."""
    rows = []
    for r in _gpu_rows(results, "AdamW"):
        ours, foreach = r["rows"]["fused_l2"], _foreach(r)
        sgd = next((s for s in _gpu_rows(results, "SGD") if s["case"] == r["case"]), None)
        of_sgd = f"{sgd['rows']['fused_l2']['wall ratio to torch fused'][1]:.2f}" if sgd else "-"
        bound = f"{100 * ours['share of copy']:.0f} %" if ours["share of copy"] > 0.6 else "the host's time"
        predicted = predictions.STEPS.get(("AdamW", r["case"], "fused_l2"))
        span = f"{predicted.h100[0]:g} to {predicted.h100[1]:g}" if predicted else "-"
        rows.append(
            [r["what"], f"{1e3 * ours['wall'][1]:.3g}", span, f"{ours['wall ratio to torch fused'][1]:.2f}", f"{foreach:.1f}",
             bound, of_sgd]
        )  # fmt: skip
    columns = ["AdamW", "ours, ms", "predicted", "`fused=True` / ours", "default (foreach) / ours", "of a copy's bandwidth"]
    return _markdown([*columns, "SGD: `fused=True` / ours"], rows)


def gpu_headline(results: list[dict[str, Any]]) -> str:
    """What AdamW's users gain on a GPU."""
    rows = []
    for r in _gpu_rows(results, "AdamW"):
        if r["case"] != "one-1b":
            ours = r["rows"]["fused_l2"]
            others = (_foreach(r), ours["wall ratio to torch fused"][1])
            rows.append([r["what"], *(f"{ratio:.1f}" for ratio in others)])
    return _markdown(["AdamW: time of torch.optim / ours", "default (foreach)", "`fused=True`"], rows)


def gpu_around(results: list[dict[str, Any]]) -> str:
    """Clipping within the step and before it, and statistics."""
    rows = []
    for r in results:
        if r["case"].endswith(", around"):
            of, ours = r["rows"], r["rows"]["fused_l2"]["wall"][1]
            clipped = of["fused_l2, clipped"]["wall ratio to torch fused"][1]
            cost = of["fused_l2, statistics"]["wall"][1] / ours
            rows.append([f"{r['optimizer']}, {r['what']}", f"{clipped:.2f}", f"{cost:.2f}"])
    return _markdown(["step", "`clip_grad_norm_` and `fused=True` / `max_grad_norm`", "with statistics / without"], rows)


def gpu_bytes(results: list[dict[str, Any]]) -> str:
    """AdamW of bfloat16 parameters in few bytes, ours and others'."""
    rows = []
    for r in results:
        if r["case"].startswith("few-bytes"):
            for name, row in r["rows"].items():
                if name != "copy":
                    held = f"{row['bytes a parameter']:.2f}"
                    rows.append([r["what"].removesuffix(", in few bytes"), name, held, f"{1e3 * row['wall'][1]:.2f}"])
    return _markdown(["bfloat16 parameters", "AdamW", "bytes a parameter, its gradient left out", "ms"], rows)


def gpu_modes(results: list[dict[str, Any]]) -> str:
    r = next(r for r in results if r["case"] == "modes")
    rows = [
        [f'`"{mode}"`{and_more and "," + and_more}', f"{1e3 * row['wall'][1]:.2f}", f"{row['GB/s']:.0f}",
         f"{100 * row['share of copy']:.0f} %"]
        for name, row in r["rows"].items()
        if name != "copy"
        for mode, _, and_more in [name.partition(",")]
    ]  # fmt: skip
    return _markdown(["`low_precision`, one matrix of 2^28", "ms", "GB/s", "of a copy's bandwidth"], rows)


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "headline": ("step", headline), "fused": ("step", fused), "peer": ("step", peer), "floor": ("step", floor),
    "providers": ("step", providers),
    "clip": ("clip", clip), "statistics": ("statistics", statistics), "churn": ("churn", churn), "train": ("train", train),
    "memory": ("memory", memory),
    "host": ("host", host), "dtensor": ("dtensor", dtensor),
    "decay": ("precision", decay), "moments": ("precision", moments),
    "training": ("precision", training), "seeds": ("precision", seeds), "speed": ("precision", speed),
    "eight_bit_peers": ("precision", eight_bit_peers),
    "gpu": ("", gpu), "gpu_headline": ("", gpu_headline),
    "gpu_around": ("", gpu_around), "gpu_bytes": ("", gpu_bytes), "gpu_modes": ("", gpu_modes),
}  # fmt: skip


def rewritten(page: str) -> str:
    """The page with each marked table made anew from its file in bench/results."""

    def table(match: re.Match[str]) -> str:
        topic, make = TABLES[match[2]]
        found = json.loads((ROOT / "bench" / "results" / match[3]).read_text())
        results = found["results"]  # those of bench.gpu_report have no topics
        return match[1] + make(results[topic] if topic else results) + match[4]

    return MARKED.sub(table, page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rewritten(path.read_text()))
