"""``python -m bench train``: whole training steps, with each optimizer and with none: what share a step has of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import timing
from .cases import OPTIMIZERS
from .providers import PROVIDERS
from .topic import Job, Options, spread


class Block(torch.nn.Module):
    """A transformer block, pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(width) for _ in range(2)])
        self.attention = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


def mlp(device: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Digits of 28 x 28, two hidden layers of 512, batches of 64: 0.67M parameters."""
    model = torch.nn.Sequential(
        torch.nn.Linear(784, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10)
    )
    return model.to(device), torch.randn(64, 784, device=device), torch.randint(10, (64,), device=device)


def transformer(device: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Characters, four blocks of width 256, batches of 8 x 64: 3.3M parameters."""
    model = torch.nn.Sequential(
        torch.nn.Embedding(256, 256), *[Block(256, 4) for _ in range(4)], torch.nn.LayerNorm(256), torch.nn.Linear(256, 256)
    )
    return model.to(device), torch.randint(256, (8, 64), device=device), torch.randint(256, (8 * 64,), device=device)


MODELS = {"mlp": mlp, "transformer": transformer}

VISITS = 2


def jobs(options: Options) -> Iterator[Job]:
    for optimizer in options.optimizers:
        for name in MODELS:
            if not options.cases or name in options.cases:
                yield Job(f"{optimizer} {name}", lambda so_far, n=name, o=optimizer: measure(n, o, options, so_far))


def measure(name: str, optimizer: str, options: Options, so_far: dict[str, timing.Samples]) -> dict[str, Any]:
    contestants: dict[str, Callable[[], Any]] = {}
    absent = {}
    for provider in ["none", *dict.fromkeys(["fused_l2", *options.providers])]:
        torch.manual_seed(0)
        model, x, y = MODELS[name](options.device)
        parameters = sum(p.numel() for p in model.parameters())
        made = None
        if provider != "none":
            try:
                reason = PROVIDERS[provider].why_not(optimizer, options.device, torch.float32, len(list(model.parameters())))
                made = reason or PROVIDERS[provider].make(optimizer, list(model.parameters()), OPTIMIZERS[optimizer])
            except ImportError:
                continue
            if reason is not None:
                absent[provider] = reason
                continue
        contestants[provider] = _train_step(model, x, y, made)
    contestants["fused_l2 again"] = contestants["fused_l2"]
    samples = timing.joined(so_far, timing.interleave(contestants, options.seconds, fewest=timing.FEWEST_OF_A_VISIT))
    rows = {}
    for who, sample in samples.items():
        without = timing.ratios(sample, samples["none"])  # the share of the time that is left without an optimizer
        rows[who] = {
            "seconds": sample.quartiles(),
            "share of the step": timing.quartiles([1 - ratio for ratio in without]),
            "ours_to_this": timing.quartiles(timing.ratios(samples["fused_l2"], sample)),
        }
    return {
        "case": name, "what": MODELS[name].__doc__, "optimizer": optimizer, "parameters": parameters, "rows": rows,
        "noise floor": timing.uncertainty(samples, "fused_l2", "fused_l2 again", "none"), "not measured": absent,
    }  # fmt: skip


def _train_step(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, optimizer: Any) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(x).flatten(0, -2), y).backward()
        if optimizer is not None:
            optimizer.step()

    return step


def show(result: dict[str, Any]) -> str:
    lines = [
        f"{result['optimizer']}, {result['case']} ({result['parameters']:,} parameters), whole training steps, "
        f"noise floor {100 * result['noise floor']:.1f} %",
        f"  {'':18}{'time, us':>12}{'optimizer, %':>14}{'time / ours':>13}{'quartiles':>15}",
    ]
    for name, row in result["rows"].items():
        ratio, quartiles = spread(row["ours_to_this"])
        share = 100 * row["share of the step"][1]
        lines.append(f"  {name:18}{1e6 * row['seconds'][1]:>12.1f}{share:>14.1f}{ratio:>13}{quartiles:>15}")
    return "\n".join(lines)
