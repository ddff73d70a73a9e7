"""``python -m bench clip``: clipping by the global norm and a step, against clip_grad_norm_ and torch's fused step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import fused_l2

from . import timing
from .cases import OPTIMIZERS, Case
from .topic import Job, Options, spread, ungrouped_float32

# The ratios that the project holds itself to.
GATES = {"AdamW": {"gpt2-small": 1.3, "tiny-1000": 10}, "SGD": {"gpt2-small": 1.4, "tiny-1000": 10}}

VISITS = 2


def jobs(options: Options) -> Iterator[Job]:
    return ungrouped_float32(options, measure)


def measure(case: Case, name: str, seconds: float, so_far: dict[str, timing.Samples]) -> dict[str, Any]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in case.shapes]
    for p in params:
        p.grad = torch.randn(p.shape)
    settings = OPTIMIZERS[name]
    clipped = getattr(fused_l2, name)(params, **settings, max_grad_norm=1.0)
    theirs = getattr(torch.optim, name)(params, **settings, fused=True)
    for optimizer in (clipped, theirs):
        optimizer.step()
    for p in params:  # one set of states, so that neither has the caches to itself
        for key, value in clipped.state[p].items():
            if key != "step":
                theirs.state[p][key] = value
    clipped.step()

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        theirs.step()

    clip_and_step()
    norm = float(clipped.grad_norm)
    contestants = {"fused_l2": clipped.step, "torch": clip_and_step, "fused_l2 again": clipped.step}
    samples = timing.joined(so_far, timing.interleave(contestants, seconds, fewest=timing.FEWEST_OF_A_VISIT))
    return {
        "case": case.name,
        "optimizer": name,
        "first norm": norm,
        "seconds": {who: sample.quartiles() for who, sample in samples.items()},
        "ratio": timing.quartiles(timing.ratios(samples["fused_l2"], samples["torch"])),
        "noise floor": timing.uncertainty(samples, "fused_l2", "fused_l2 again", "torch"),
        "kept": len(samples["fused_l2"].kept),
    }


def show(result: dict[str, Any]) -> str:
    ratio, quartiles = spread(result["ratio"])
    ours, theirs = (1e6 * result["seconds"][who][1] for who in ("fused_l2", "torch"))
    gate = GATES[result["optimizer"]].get(result["case"])
    verdict = "" if gate is None else f"gate {gate}: {'met' if result['ratio'][1] >= gate else 'MISSED'}"
    return (
        f"{result['optimizer']:6} {result['case']:12} ours {ours:10.1f} us, torch {theirs:10.1f} us, "
        f"ratio {ratio} ({quartiles}), noise floor {100 * result['noise floor']:.1f} %  {verdict}"
    )
