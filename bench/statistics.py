"""``python -m bench statistics``: a step with statistics against the same step without, on this CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import fused_l2

from . import timing
from .cases import OPTIMIZERS, Case
from .topic import Job, Options, ungrouped_float32

LIMIT = 1.05  # what statistics may cost on sets of tensors that do not fit the caches
MEMORY_BOUND = ("one-25m", "gpt2-small", "resnet50")

VISITS = 2


def jobs(options: Options) -> Iterator[Job]:
    return ungrouped_float32(options, measure)


def measure(case: Case, name: str, seconds: float, so_far: dict[str, timing.Samples]) -> dict[str, Any]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in case.shapes]
    for p in params:
        p.grad = torch.randn(p.shape)
    plain = getattr(fused_l2, name)(params, **OPTIMIZERS[name])
    plain.step()
    measured = getattr(fused_l2, name)(params, **OPTIMIZERS[name], statistics=True)
    measured.step()
    for p in params:  # one set of states, so that neither has the caches to itself; in dicts that are the optimizer's own
        measured.state[p].update({key: value for key, value in plain.state[p].items() if key != "step"})
    for optimizer in (plain, measured):
        optimizer.step()
    contestants = {"without": plain.step, "with": measured.step, "without again": plain.step}
    samples = timing.joined(so_far, timing.interleave(contestants, seconds, fewest=timing.FEWEST_OF_A_VISIT))
    return {
        "case": case.name,
        "optimizer": name,
        "seconds": {which: sample.quartiles() for which, sample in samples.items()},
        "cost": timing.quartiles(timing.ratios(samples["without"], samples["with"])),
        "noise floor": timing.uncertainty(samples, "without", "without again", "with"),
        "kept": len(samples["with"].kept),
    }


def show(result: dict[str, Any]) -> str:
    low, cost, high = result["cost"]
    verdict = f"limit {LIMIT}: {'met' if cost <= LIMIT else 'MISSED'}" if result["case"] in MEMORY_BOUND else ""
    microseconds = 1e6 * result["seconds"]["with"][1]
    return (
        f"{result['optimizer']:6} {result['case']:12} with statistics {microseconds:10.1f} us, "
        f"{cost:.3f} times without ({low:.3f} .. {high:.3f})  {verdict}"
    )
