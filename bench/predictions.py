"""What was predicted of the GPU kernels before any of them ran, from what the compiler makes of them (docs/performance.md).

The report prints it beside what it measures.
"""

from __future__ import annotations

from typing import NamedTuple


class Predicted(NamedTuple):
    """Milliseconds of one step on the device, lowest and highest, and how many times as long torch takes, by the wall clock."""

    h100: tuple[float, float]
    h200: tuple[float, float]
    ratio: tuple[float, float] | None = None


# An H100 whose copy runs at 3.0 TB/s, an H200 at 4.3. By optimizer, case, and row of the case.
STEPS = {
    ("AdamW", "one-1b", "fused_l2"): Predicted((9.6, 10.1), (6.7, 7.1), (1.00, 1.05)),
    ("SGD", "one-1b", "fused_l2"): Predicted((6.9, 7.2), (4.8, 5.0), (1.00, 1.05)),
    ("AdamW", "llama-7b-8-layers", "fused_l2"): Predicted((18.1, 19.0), (12.6, 13.3), (1.00, 1.05)),
    ("AdamW", "gpt2-small", "fused_l2"): Predicted((1.20, 1.27), (0.84, 0.90), (1.05, 1.2)),
    ("AdamW", "resnet50", "fused_l2"): Predicted((0.25, 0.28), (0.18, 0.21), (1.2, 1.8)),
    ("AdamW", "vit-28-groups", "fused_l2"): Predicted((0.84, 0.90), (0.59, 0.65), (1.1, 1.5)),
    ("AdamW", "465-groups", "fused_l2"): Predicted((0.85, 1.2), (0.85, 1.2), (12, 20)),
    ("AdamW", "tiny-1000", "fused_l2"): Predicted((0.25, 0.5), (0.25, 0.5), (5, 8)),
    ("AdamW", "one-100m-bf16", "fused_l2"): Predicted((0.49, 0.54), (0.35, 0.40), (1.0, 1.1)),
    ("AdamW", "gpt2-small, around", "fused_l2, clipped"): Predicted((1.40, 1.50), (0.98, 1.08), (1.25, 1.4)),
    ("AdamW", "gpt2-small, around", "fused_l2, statistics"): Predicted((1.22, 1.34), (0.87, 0.97)),
    ("AdamW", "modes", "round"): Predicted((2.05, 2.2), (1.45, 1.55)),
    ("AdamW", "modes", "remainder"): Predicted((2.42, 2.57), (1.7, 1.8)),
    ("AdamW", "modes", "master"): Predicted((2.8, 3.0), (2.0, 2.1)),
    ("AdamW", "modes", "kahan"): Predicted((2.45, 2.6), (1.75, 1.85)),
    ("AdamW", "modes", "stochastic"): Predicted((2.1, 2.25), (1.5, 1.6)),
}


def beside(optimizer: str, case: str, row: str, gpu: str, milliseconds: float, ratio: float) -> str:
    """Predicted beside measured, in a line; empty where nothing was predicted."""
    predicted = STEPS.get((optimizer, case, row))
    if predicted is None:
        return ""
    name = "H200" if "H200" in gpu else "H100"
    span = predicted.h200 if name == "H200" else predicted.h100
    words = [
        f"{row}: {name} predicted {span[0]:g} to {span[1]:g} ms, measured {milliseconds:.3g}{_verdict(milliseconds, span)}"
    ]
    if predicted.ratio is not None:
        low, high = predicted.ratio
        words.append(f"ratio predicted {low:g} to {high:g}, measured {ratio:.3g}{_verdict(ratio, predicted.ratio)}")
    if name not in gpu:
        words.append(f"measured on another device ({gpu})")
    return "; ".join(words)


def _verdict(measured: float, span: tuple[float, float]) -> str:
    return " (below)" if measured < span[0] else " (above)" if measured > span[1] else " (as predicted)"
