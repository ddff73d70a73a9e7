"""The pictures of theory in docs/weight-decay.md. ``python -m bench.pictures`` draws them (needs the extra ``demo``)."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Ellipse

import fused_l2
from fused_l2.weight_decay import normalized_weights, param_groups

from .look import INK, PALETTE, WIDTH


def effective_lr(weight_decay: float, epochs: int = 40) -> list[float]:
    """lr / |w|^2 of the weight before a BatchNorm, after each epoch."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = fused_l2.SGD(param_groups(model, weight_decay), lr=0.1)
    found = []
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        norm = float(model[0].weight.detach().norm())
        found.append(optimizer.param_groups[0]["lr"] / norm**2)
    if weight_decay:
        assert [w.name for w in normalized_weights(model, optimizer)] == ["0.weight"]
    return found


def draw_effective_lr() -> Any:
    """On one thread: the network is so small that more of them only wait, and each number of them has its own last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        curves = {weight_decay: effective_lr(weight_decay) for weight_decay in (0.0, 1e-3, 1e-2)}
    finally:
        torch.set_num_threads(threads)
    figure, axis = plt.subplots(figsize=(WIDTH, 3))
    for (weight_decay, curve), colour in zip(curves.items(), PALETTE, strict=False):
        axis.plot(range(1, 41), curve, color=colour, label=f"weight_decay = {weight_decay:g}")
    axis.set(xlabel="epoch", ylabel="effective learning rate, lr / |w|²", yscale="log")
    ticks = (0.005, 0.006, 0.008, 0.01, 0.015, 0.02)
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.legend()
    return figure


def draw_shrinkage() -> Any:
    h, best = torch.tensor([1.0, 0.1]), torch.tensor([2.0, 2.0])
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.9))
    for loss in (0.02, 0.08, 0.2, 0.4, 0.8, 1.4):
        width, height = (2 * math.sqrt(2 * loss / curvature) for curvature in h.tolist())
        left.add_patch(Ellipse(best.tolist(), width, height, fill=False, edgecolor=INK, linewidth=0.7))
    strengths = torch.logspace(-3, 1.5, 60)
    path = h / (h + strengths[:, None]) * best
    left.plot(path[:, 0], path[:, 1], color=PALETTE[0])
    for strength in (0.01, 0.1, 1.0):
        w = h / (h + strength) * best
        left.plot(*w.tolist(), "o", color=PALETTE[0], markersize=4)
        left.annotate(f"{strength:g}", w.tolist(), textcoords="offset points", xytext=(-8, 5), ha="right")
    left.plot(*best.tolist(), "x", color=PALETTE[1])
    left.plot(0, 0, "+", color=INK)
    left.set(xlabel="steep direction, h = 1", ylabel="flat direction, h = 0.1", title="minima by λ/n", aspect="equal")
    left.set(xlim=(-0.4, 3.6), ylim=(-0.4, 3.6), xticks=range(4), yticks=range(4))
    for value, colour in zip((1.0, 0.1), PALETTE[1:], strict=False):
        right.plot(strengths, value / (value + strengths), color=colour, label=f"h = {value:g}")
    right.set(xscale="log", xlabel="λ/n", title="h / (h + λ/n)")
    right.set_xticks([0.001, 0.1, 10], ["0.001", "0.1", "10"])
    right.minorticks_off()
    right.legend()
    return figure


PICTURES = {"effective-lr": draw_effective_lr, "shrinkage": draw_shrinkage}
