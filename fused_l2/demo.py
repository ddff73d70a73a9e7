"""``python -m fused_l2.demo``: what L2 regularization does to a small network on real data, and what weight decay is.

Trains a Linear-ReLU-Linear network on 100 of scikit-learn's handwritten digits, few enough to overfit, and tests it on 1297
others. First SGD with L2 regularization over a range of lambda; then AdamW against Adam, whose coupled decay is something
else; at last the same runs with torch.optim, and the largest difference between the trained parameters.

Needs ``pip install fused_l2[demo]`` (scikit-learn, matplotlib, tqdm).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_l2
from fused_l2.weight_decay import from_lambda, param_groups, penalty

N = 100  # training images
TEST_FROM = 500  # images of a shuffled order from which on they are test images
EPOCHS, BATCH, WIDTH = 150, 50, 64
SGD_LAMBDAS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
ADAM_LAMBDAS = (0.0, 1.0, 10.0, 100.0, 300.0)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "AdamW": {"lr": 3e-3},
    "Adam": {"lr": 3e-3},
}


@dataclass(frozen=True)
class Run:
    """One trained network."""

    train_accuracy: float
    test_accuracy: float
    norm: float  # |w| over the decayed parameters
    penalty: float  # lambda/2n * sum(w^2)
    params: list[Tensor]


def train(images: Tensor, labels: Tensor, optimizers: Any, name: str, lam: float, seed: int, epochs: int) -> Run:
    """Train one network with ``optimizers.<name>`` (``fused_l2`` or ``torch.optim``) and this lambda."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train_set, test_set = order[:N], order[TEST_FROM:]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(images.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    groups = param_groups(model, weight_decay=from_lambda(lam, N))  # leaves the biases out
    optimizer = getattr(optimizers, name)(groups, **OPTIMIZERS[name])
    for _ in range(epochs):
        for batch in torch.randperm(N, generator=generator).split(BATCH):  # type: ignore[no-untyped-call]
            chosen = train_set[batch]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def accuracy(indices: Tensor) -> float:
        return float((model(images[indices]).argmax(1) == labels[indices]).float().mean())

    with torch.no_grad():
        weights = [m.weight for m in model if isinstance(m, nn.Linear)]
        norm = float(sum(w.square().sum() for w in weights)) ** 0.5
        paid = penalty([{"params": weights, "weight_decay": 1.0}], lam, N)
        return Run(accuracy(train_set), accuracy(test_set), norm, paid, [p.detach().clone() for p in model.parameters()])


def table(name: str, runs: dict[float, list[Run]]) -> str:
    lines = [
        f"{name}: mean over {len(next(iter(runs.values())))} seeds",
        f"{'lambda':>8}{'weight_decay':>14}{'train acc':>11}{'test acc':>10}{'+-':>7}{'|w|':>8}{'penalty':>10}",
    ]
    for lam, found in runs.items():
        test = [r.test_accuracy for r in found]
        error = statistics.stdev(test) / len(test) ** 0.5 if len(test) > 1 else 0.0
        columns = zip(*((r.train_accuracy, r.norm, r.penalty) for r in found), strict=True)
        means = [statistics.mean(values) for values in columns]
        lines.append(
            f"{lam:>8g}{from_lambda(lam, N):>14g}{means[0]:>11.3f}{statistics.mean(test):>10.4f}{error:>7.4f}"
            f"{means[1]:>8.2f}{means[2]:>10.4f}"
        )
    return "\n".join(lines)


def largest_difference(ours: dict[float, list[Run]], theirs: dict[float, list[Run]]) -> tuple[float, int, int]:
    """The largest absolute difference of a parameter, how many differ in a bit, and of how many."""
    largest, differing, total = 0.0, 0, 0
    for lam, runs in ours.items():
        for a, b in zip(runs, theirs[lam], strict=True):
            for x, y in zip(a.params, b.params, strict=True):
                largest = max(largest, float((x - y).abs().max()))
                differing += int((x != y).sum())
                total += x.numel()
    return largest, differing, total


def plot(results: dict[str, dict[float, list[Run]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blue, orange, green = "#0072B2", "#D55E00", "#009E73"
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")

    def curve(axis: Any, name: str, field: str, **style: Any) -> None:
        runs = results[name]
        axis.plot(list(runs), [statistics.mean(getattr(r, field) for r in found) for found in runs.values()], **style)

    curve(axes[0], "SGD", "train_accuracy", color=orange, marker="s", label="training images")
    curve(axes[0], "SGD", "test_accuracy", color=blue, marker="o", label="test images")
    axes[0].set(title="SGD with L2 regularization", ylabel="accuracy", ylim=(0.86, 1.005))  # too large a lambda ends below
    curve(axes[1], "SGD", "norm", color=blue, marker="o", label="SGD")
    curve(axes[1], "AdamW", "norm", color=green, marker="^", label="AdamW")
    curve(axes[1], "Adam", "norm", color=orange, marker="s", label="Adam (coupled)")
    axes[1].set(title="Size of the weights", ylabel="|w|", ylim=(0, None))
    curve(axes[2], "AdamW", "test_accuracy", color=green, marker="^", label="AdamW")
    curve(axes[2], "Adam", "test_accuracy", color=orange, marker="s", label="Adam (coupled)")
    axes[2].set(title="The same lambda, coupled and decoupled", ylabel="test accuracy", ylim=(0, 1.01))
    for axis in axes:
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set_xlim(left=-0.02)
        axis.set_xlabel(f"lambda  (weight_decay = lambda / {N})")
        axis.grid(alpha=0.3)
        axis.legend(loc="center left")
    figure.savefig(path, dpi=120)


def run(seeds: int = 10, epochs: int = EPOCHS, out: Path = Path("demo_results")) -> dict[str, dict[float, list[Run]]]:
    """Train everything, print the tables, write the plot; returns the runs by optimizer and lambda."""
    from sklearn.datasets import load_digits
    from tqdm import tqdm

    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    print(f"{fused_l2.capabilities()}\n")
    print(f"handwritten digits: {N} training images, {len(images) - TEST_FROM} test images, 64-{WIDTH}-10 network\n")

    lambdas: dict[str, Sequence[float]] = {"SGD": SGD_LAMBDAS, "AdamW": ADAM_LAMBDAS, "Adam": ADAM_LAMBDAS}
    results: dict[str, dict[float, list[Run]]] = {name: {lam: [] for lam in lambdas[name]} for name in lambdas}
    torch_results: dict[str, dict[float, list[Run]]] = {name: {lam: [] for lam in lambdas[name]} for name in lambdas}
    jobs = [(name, lam, seed) for name in lambdas for lam in lambdas[name] for seed in range(seeds)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is too small to be worth waking a second thread
    try:
        with tqdm(jobs, unit="network") as progress:
            for name, lam, seed in progress:
                progress.set_description(f"{name}, lambda {lam:g}")
                results[name][lam].append(train(images, labels, fused_l2, name, lam, seed, epochs))
                if seed == 0:
                    torch_results[name][lam].append(train(images, labels, torch.optim, name, lam, seed, epochs))
    finally:
        torch.set_num_threads(threads)

    for name in results:
        print(f"\n{table(name, results[name])}")
    means = {lam: statistics.mean(r.test_accuracy for r in runs) for lam, runs in results["SGD"].items()}
    best = max(means, key=lambda lam: means[lam])
    print(f"\nSGD tests best at lambda = {best:g}: {means[best]:.4f}, against {means[0.0]:.4f} without regularization.")
    print(f"At lambda = {best:g}, weight_decay is {from_lambda(best, N):g} for n = {N}", end=" ")
    print(f"and {from_lambda(best, 2 * N):g} for n = {2 * N}: lambda / n.")
    print("\nThe same runs (seed 0) with torch.optim:")
    for name in results:
        first = {lam: runs[:1] for lam, runs in results[name].items()}
        largest, differing, total = largest_difference(first, torch_results[name])
        print(f"  {name:6} largest difference of a parameter {largest:.3g}; {differing:,} of {total:,} differ in a bit")
    x = torch.rand(100_000)
    wrong = float((x.sqrt() != x.double().sqrt().float()).float().mean())
    if wrong:
        print(f"  (torch.sqrt is an ulp off for {wrong:.1%} of numbers on this CPU, ours is not: hence Adam's difference)")
    out.mkdir(parents=True, exist_ok=True)
    plot(results, out / "weight_decay.png")
    print(f"\ncurves: {out / 'weight_decay.png'}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fused_l2.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=10, help="networks per optimizer and lambda (default 10)")
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for the plot")
    options = parser.parse_args()
    run(seeds=options.seeds, out=options.out)


if __name__ == "__main__":
    main()
