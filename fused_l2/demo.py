"""``python -m fused_l2.demo``: what L2 regularization does to a small network on real data, and what weight decay is.

Trains a network of one hidden layer on scikit-learn's handwritten digits, a fifth of the training labels made wrong, so that
there is something not to learn. Lambda is chosen on validation images and reported on test images, for two sizes of the
training set, and for AdamW. Then: penalty against ``weight_decay``, Adam, BatchNorm, bfloat16, the bits of torch.optim, and the
speed.

In a checkout, ``pip install '.[demo]'`` brings what it needs (scikit-learn, matplotlib, tqdm).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_l2
from fused_l2.weight_decay import from_lambda, param_groups, penalty

SIZES = (100, 400)  # training images
VALIDATE_FROM, TEST_FROM = 400, 800  # of the images in a shuffled order
WRONG = 0.2  # share of training labels that are replaced by random ones
EPOCHS, WIDTH = 100, 64
SGD_LAMBDAS = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)
ADAMW_LAMBDAS = (0.0, 30.0, 100.0, 300.0, 1000.0)
ADAM_LAMBDAS = (0.0, 1.0, 10.0, 30.0, 100.0)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "AdamW": {"lr": 3e-3},
    "Adam": {"lr": 3e-3},
}
NOTES = {
    "AdamW": "AdamW minimizes no loss with this penalty: its decay is no gradient. Its lambda is n * weight_decay, no more.",
    "Adam": "Adam and AdamW at one lambda: a warning, not a race. The number means another thing in each; tune them apart.",
}
# The optimizers of AdamW in bfloat16: whose, and with which options.
BFLOAT16: dict[str, tuple[Any, dict[str, Any]]] = {
    "torch default": (torch.optim, {}),
    "torch fused=True": (torch.optim, {"fused": True}),
    "fused_l2": (fused_l2, {}),
    "fused_l2, low_precision='remainder'": (fused_l2, {"low_precision": "remainder"}),
}


@dataclass(frozen=True)
class Digits:
    """The images that one seed trains on, chooses lambda with, and tests on."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(images: Tensor, labels: Tensor, n: int, seed: int) -> Digits:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)

    def part(of: Tensor) -> tuple[Tensor, Tensor]:
        return images[of], labels[of].clone()

    train = part(order[:n])
    drawn = torch.randint(0, 10, (n,), generator=generator)
    wrong = torch.rand(n, generator=generator) < WRONG
    train[1][wrong] = drawn[wrong]
    return Digits(train, part(order[VALIDATE_FROM:TEST_FROM]), part(order[TEST_FROM:]))


@dataclass(frozen=True)
class Run:
    """One trained network. Accuracies are of the labels as they are given: a fifth of the training labels is wrong."""

    train: float
    validation: float
    test: float
    norm: float  # |w| over the decayed parameters
    penalty: float  # lambda/2n * sum(w^2)
    params: list[Tensor]


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def train(data: Digits, optimizers: Any, name: str, lam: float, seed: int, epochs: int = EPOCHS, **options: Any) -> Run:
    """Train one network with ``optimizers.<name>`` (``fused_l2`` or ``torch.optim``) and this lambda."""
    images, labels = data.train
    n = len(images)
    model = network(seed)
    groups = param_groups(model, weight_decay=from_lambda(lam, n))  # leaves the biases out
    optimizer = getattr(optimizers, name)(groups, **OPTIMIZERS[name], **options)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(n, generator=generator).split(n // 2):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def accuracy(part: tuple[Tensor, Tensor]) -> float:
        return float((model(part[0]).argmax(1) == part[1]).float().mean())

    with torch.no_grad():
        weights = [m.weight for m in model if isinstance(m, nn.Linear)]
        norm = float(sum(w.square().sum() for w in weights)) ** 0.5
        paid = penalty([{"params": weights, "weight_decay": 1.0}], lam, n)
        params = [p.detach().clone() for p in model.parameters()]
        return Run(accuracy(data.train), accuracy(data.validation), accuracy(data.test), norm, paid, params)


Runs = dict[float, list[Run]]  # by lambda, one for each seed


def mean_and_error(runs: Sequence[Run], field: str) -> tuple[float, float]:
    """The mean over seeds and its standard error, which is NaN of one seed."""
    values = [getattr(r, field) for r in runs]
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def chosen(runs: Runs) -> float:
    """The lambda with the best mean accuracy on the validation images."""
    return max(runs, key=lambda lam: mean_and_error(runs[lam], "validation")[0])


def spread(error: float) -> str:
    return "-" if math.isnan(error) else f"{error:.3f}"


def with_error(runs: Sequence[Run], field: str) -> str:
    """The mean, and its error if there are several seeds."""
    mean, error = mean_and_error(runs, field)
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} +- {error:.3f}"


def table(name: str, runs: Runs, n: int) -> str:
    seeds = len(next(iter(runs.values())))
    lines = [
        f"{name}, n = {n}: " + ("one seed" if seeds == 1 else f"mean over {seeds} seeds, +- its standard error"),
        f"{'lambda':>8}{'weight_decay':>14}{'train':>8}{'validation':>12}{'test':>8}{'+-':>7}{'|w|':>8}{'penalty':>10}",
    ]
    for lam, found in runs.items():
        test, error = mean_and_error(found, "test")
        means = [mean_and_error(found, field)[0] for field in ("train", "validation", "norm", "penalty")]
        lines.append(
            f"{lam:>8g}{from_lambda(lam, n):>14g}{means[0]:>8.3f}{means[1]:>12.3f}{test:>8.3f}{spread(error):>7}"
            f"{means[2]:>8.2f}{means[3]:>10.4f}"
        )
    return "\n".join(lines)


def report(name: str, runs: Runs, n: int) -> str:
    """Which lambda validation chooses, and what the test images say of it."""
    best = chosen(runs)
    decay = from_lambda(best, n)
    end = " It is the end of the grid: extend that." if best == max(runs) else ""
    return (
        f"{name}, n = {n}: the validation images choose lambda = {best:g}, weight_decay = lambda / n = {decay:g}.{end}\n"
        f"Test accuracy {with_error(runs[best], 'test')}; without regularization {with_error(runs[0.0], 'test')}."
    )


def differing(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[float, int, int]:
    """The largest absolute difference of a parameter, how many differ in a bit, and of how many."""
    pairs = [(x.detach(), y.detach()) for x, y in zip(ours, theirs, strict=True)]
    largest = max(float((x - y).abs().max()) for x, y in pairs)
    return largest, sum(int((x != y).sum()) for x, y in pairs), sum(x.numel() for x, _ in pairs)


def bits(name: str, data: Digits) -> list[str]:
    """How many parameters differ after the same training: ours, torch's default and torch's fused step."""
    ours = train(data, fused_l2, name, 1.0, 0).params
    default = train(data, torch.optim, name, 1.0, 0).params
    fused = train(data, torch.optim, name, 1.0, 0, fused=True).params
    with correctly_rounded_sqrt():
        rounded = train(data, torch.optim, name, 1.0, 0).params
    lines = []
    for what, (largest, count, of) in (
        ("ours, torch default with IEEE's sqrt", differing(ours, rounded)),
        ("ours, torch default", differing(ours, default)),
        ("torch fused, torch default", differing(fused, default)),
    ):
        lines.append(f"  {name:<6}{what:<38}{count:>6,} of {of:,}, largest difference {largest:.2g}")
    return lines


def explicit_penalty(data: Digits, lam: float, steps: int = 200) -> float:
    """Train with the penalty in the loss, and with weight_decay instead; the largest difference of a weight, in float64."""
    images, labels = data.train[0].double(), data.train[1]
    n = len(images)
    by_loss, by_decay = network(0).double(), network(0).double()
    plain = torch.optim.SGD(by_loss.parameters(), lr=0.1)
    decayed = fused_l2.SGD(param_groups(by_decay, from_lambda(lam, n)), lr=0.1)
    for _ in range(steps):
        for model, optimizer in ((by_loss, plain), (by_decay, decayed)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            if model is by_loss:
                loss = loss + lam / (2 * n) * sum(m.weight.square().sum() for m in model if isinstance(m, nn.Linear))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return differing(list(by_loss.parameters()), list(by_decay.parameters()))[0]


def effective_lrs(data: Digits, weight_decay: float, epochs: int = 100) -> list[float]:
    """lr / |w|^2 of the weight before a BatchNorm, after each epoch."""
    torch.manual_seed(0)
    images, labels = data.train
    first = nn.Linear(64, WIDTH)
    model = nn.Sequential(first, nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    optimizer = fused_l2.SGD(param_groups(model, weight_decay), lr=0.1)
    found = []
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(50):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        found.append(0.1 / float(first.weight.detach().square().sum()))
    return found


def bfloat16_decay(name: str, normal: bool, steps: int) -> float:
    """The share of AdamW's weight decay that arrives in bfloat16 weights, with normal gradients or with zeros.

    Each weight has a twin with the gradients' other sign, so that what gradients move leaves the sum of weights where it is.
    """
    optimizers, options = BFLOAT16[name]
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter((0.05 * (torch.rand(4096, generator=generator) + 0.5)).bfloat16().repeat(2))
    before, lr, decay = float(w.detach().double().sum()), 3e-4, 0.1
    optimizer = optimizers.AdamW([w], lr=lr, weight_decay=decay, **options)
    half = torch.zeros(4096)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fused_l2: weight decay takes")  # "round" is told so: it is what is shown
        for _ in range(steps):
            if normal:
                half = torch.randn(4096, generator=generator)
            w.grad = torch.cat([half, -half]).bfloat16()
            optimizer.step()
    return math.log(before / float(w.detach().double().sum())) / (-steps * math.log1p(-lr * decay))


@contextlib.contextmanager
def for_small_networks() -> Iterator[None]:
    """One thread, because the networks are too small to be worth waking a second one. And no word of a lambda above n, of which
    from_lambda warns: AdamW multiplies its decay by a small lr."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fused_l2: from_lambda got lam=")
            yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def correctly_rounded_sqrt() -> Iterator[None]:
    """torch.Tensor.sqrt made as IEEE 754 asks: on x86 torch calls MKL's, which is an ulp off for some numbers."""
    import numpy

    own = torch.Tensor.sqrt
    torch.Tensor.sqrt = lambda x: torch.from_numpy(numpy.sqrt(x.detach().numpy()))  # type: ignore
    try:
        yield
    finally:
        torch.Tensor.sqrt = own  # type: ignore[method-assign]


def times(repeats: int = 30) -> dict[str, float]:
    """Milliseconds of an AdamW step over 300 tensors of 64 to 4096 elements: the median of rounds taken by turns."""
    sizes = [64 * 4 ** (i % 4) for i in range(300)]
    made: dict[str, Any] = {}
    for name, optimizers, options in (
        ("fused_l2", fused_l2, {}),
        ("torch fused=True", torch.optim, {"fused": True}),
        ("torch default", torch.optim, {}),
    ):
        params = [nn.Parameter(torch.zeros(n)) for n in sizes]
        for p in params:
            p.grad = torch.ones_like(p)
        made[name] = optimizers.AdamW(params, lr=1e-3, **options)
    taken: dict[str, list[float]] = {name: [] for name in made}
    for i in range(repeats + 3):
        for name, optimizer in made.items():
            start = time.perf_counter()
            optimizer.step()
            if i >= 3:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(of) for name, of in taken.items()}


def plot(results: dict[tuple[str, int], Runs], rates: dict[float, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blue, orange, green = "#0072B2", "#D55E00", "#009E73"
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")

    def curve(axis: Any, runs: Runs, field: str, **style: Any) -> None:
        found = [mean_and_error(of, field) for of in runs.values()]
        axis.errorbar(list(runs), [mean for mean, _ in found], [error for _, error in found], capsize=3, **style)

    for n, colour in zip(SIZES, (orange, blue), strict=True):
        curve(axes[0], results["SGD", n], "test", color=colour, marker="o", label=f"test, n = {n}")
        curve(axes[0], results["SGD", n], "train", color=colour, marker="s", linestyle=":", label=f"training, n = {n}")
    axes[0].set(title="SGD with L2, a fifth of the labels wrong", ylabel="accuracy")
    for name, colour, marker in (("AdamW", green, "^"), ("Adam", orange, "s")):
        curve(axes[1], results[name, SIZES[0]], "norm", color=colour, marker=marker, label=name)
    axes[1].set(title="Coupled (Adam) and decoupled (AdamW)", ylabel="|w|", ylim=(0, None))
    for axis in axes[:2]:
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set_xlim(left=-0.02)
        axis.set_xlabel("lambda  (weight_decay = lambda / n)")
    for (decay, curve_), colour in zip(rates.items(), (orange, blue, green), strict=True):
        axes[2].plot(range(1, len(curve_) + 1), curve_, color=colour, label=f"weight_decay = {decay:g}")
    axes[2].set(title="Before a BatchNorm", xlabel="epoch", ylabel="effective learning rate, lr / |w|^2", yscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def run(seeds: int = 10, out: Path = Path("demo_results")) -> dict[tuple[str, int], Runs]:
    """Train everything, print the tables, write the plot; returns the runs by optimizer and number of training images."""
    from sklearn.datasets import load_digits
    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)  # now: what is wrong with it need not wait for the training
    loaded = load_digits()
    images, labels = torch.tensor(loaded.data, dtype=torch.float32) / 16, torch.tensor(loaded.target)
    data = {(n, seed): digits(images, labels, n, seed) for n in SIZES for seed in range(seeds)}
    few = SIZES[0]
    print(f"{fused_l2.capabilities()}\n")
    print(f"Handwritten digits, a network 64-{WIDTH}-10, {WRONG:.0%} of the training labels replaced by random ones.")
    print(f"{TEST_FROM - VALIDATE_FROM} validation images choose lambda, {len(images) - TEST_FROM} test images judge it.\n")
    print("What is decayed:")
    print(param_groups(network(0), from_lambda(1.0, few)))

    wanted: list[tuple[str, int, Sequence[float], int]] = [("SGD", n, SGD_LAMBDAS, seeds) for n in SIZES]
    wanted += [("AdamW", few, ADAMW_LAMBDAS, min(seeds, 5)), ("Adam", few, ADAM_LAMBDAS, max(1, seeds // 3))]
    results: dict[tuple[str, int], Runs] = {(name, n): {lam: [] for lam in lambdas} for name, n, lambdas, _ in wanted}
    with for_small_networks():
        jobs = [(name, n, lam, seed) for name, n, lambdas, count in wanted for lam in lambdas for seed in range(count)]
        with tqdm(jobs, unit="network", disable=not sys.stderr.isatty()) as progress:
            for name, n, lam, seed in progress:
                progress.set_description(f"{name}, n = {n}, lambda {lam:g}")
                results[name, n][lam].append(train(data[n, seed], fused_l2, name, lam, seed))
        for (name, n), runs in results.items():
            print(f"\n{table(name, runs, n)}")
            if name in NOTES:
                print(NOTES[name])
        for name, n in [("SGD", n) for n in SIZES] + [("AdamW", few)]:
            print(f"\n{report(name, results[name, n], n)}")
        print("\nThe penalty in the loss against weight_decay, SGD, 200 steps in float64:")
        print(f"  largest difference of a weight {explicit_penalty(data[few, 0], 1.0):.1g}")

        rates = {strength: effective_lrs(data[few, 0], strength) for strength in (0.0, 1e-3, 1e-2)}
        print("\nBefore a BatchNorm decay changes the effective learning rate lr / |w|^2, not the function:")
        for strength, curve in rates.items():
            print(f"  weight_decay {strength:<6g} after the first epoch {curve[0]:.4f}, after the last {curve[-1]:.4f}")

        print("\nAdamW in bfloat16, lr 3e-4, weight_decay 0.1: the share of the decay that arrives with gradients of zero,")
        print("in 1000 steps, and with normal ones, in 8000")
        for name in BFLOAT16:
            zero, normal = bfloat16_decay(name, False, 1000), bfloat16_decay(name, True, 8000)
            print(f"  {name:<36}{zero:>6.0%}{normal:>6.0%}")

        print("\nBits: parameters that differ after the same training (seed 0, lambda 1)")
        for name in OPTIMIZERS:
            print("\n".join(bits(name, data[few, 0])))

    print("\nSpeed here: milliseconds of an AdamW step over 300 tensors of 64 to 4096 elements, median of 30")
    for name, taken in times().items():
        print(f"  {name:<18}{taken:>8.2f}")
    plot(results, rates, out / "weight_decay.png")
    print(f"\ncurves: {out / 'weight_decay.png'}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fused_l2.demo",
        description="Show what L2 regularization does to a small network on real data, and what weight decay is.",
        epilog="Prints what each lambda does, the lambda that validation chooses, and comparisons with torch.optim.\n"
        "Takes under a minute on two cores; with --seeds 1 half of that.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=10, help="networks per lambda (default 10; AdamW at most 5, Adam a third)")
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for the plot (default demo_results)")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        parser.exit(1, f"The demo needs {error.name}. In a checkout: pip install '.[demo]'\n")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out} is no folder, and none can be made there: {error.strerror}")
    run(seeds=options.seeds, out=options.out)


if __name__ == "__main__":
    main()
