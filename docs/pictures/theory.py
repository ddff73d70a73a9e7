"""Draws effective-lr.svg and shrinkage.svg beside this file: ``python docs/pictures/theory.py`` (needs the extra ``demo``)."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import fused_l2
from fused_l2.weight_decay import normalized_weights, param_groups

HERE = Path(__file__).parent
GREY = "#808080"  # readable on white and on black
plt.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "fused_l2", "font.size": 11, "savefig.transparent": True,
    "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True,
})  # fmt: skip


def effective_lr(weight_decay: float, epochs: int = 40) -> list[float]:
    """lr / |w|^2 of the weight before a BatchNorm, after each epoch."""
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


def draw_effective_lr() -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    for weight_decay, colour in ((0.0, "#d55e00"), (1e-3, "#0072b2"), (1e-2, "#009e73")):
        axes.plot(range(1, 41), effective_lr(weight_decay), color=colour, label=f"weight_decay = {weight_decay:g}")
    axes.set(xlabel="epoch", ylabel="effective learning rate, lr / |w|²", yscale="log")
    axes.legend()
    figure.savefig(HERE / "effective-lr.svg", metadata={"Date": None})


def draw_shrinkage() -> None:
    h, best = torch.tensor([1.0, 0.1]), torch.tensor([2.0, 2.0])
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4))
    grid = torch.linspace(-0.4, 3.6, 161)
    loss = h[0] / 2 * (grid - best[0])[None, :] ** 2 + h[1] / 2 * (grid - best[1])[:, None] ** 2
    left.contour(grid, grid, loss, levels=[0.02, 0.08, 0.2, 0.4, 0.8, 1.4], colors=GREY, linewidths=0.7)
    strengths = torch.logspace(-3, 1.5, 200)
    path = h / (h + strengths[:, None]) * best
    left.plot(path[:, 0], path[:, 1], color="#0072b2")
    for strength in (0.01, 0.1, 1.0):
        w = h / (h + strength) * best
        left.plot(*w.tolist(), "o", color="#0072b2", markersize=4)
        left.annotate(f"λ/n = {strength:g}", w.tolist(), textcoords="offset points", xytext=(-58, 6), fontsize=9)
    left.plot(*best.tolist(), "x", color="#d55e00")
    left.plot(0, 0, "+", color=GREY)
    left.set(xlabel="steep direction, h = 1", ylabel="flat direction, h = 0.1", aspect="equal")
    for value, colour in ((1.0, "#d55e00"), (0.1, "#009e73")):
        right.plot(strengths, value / (value + strengths), color=colour, label=f"h = {value:g}")
    right.set(xscale="log", xlabel="λ/n", ylabel="h / (h + λ/n)")
    right.legend()
    figure.savefig(HERE / "shrinkage.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw_effective_lr()
    draw_shrinkage()
