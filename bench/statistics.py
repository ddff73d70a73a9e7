"""``python -m bench.statistics``: a step with statistics against the same step without, on this CPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import fused_l2

from . import timing
from .cases import CASES, OPTIMIZERS, Case
from .run import machine

LIMIT = 1.05  # what statistics may cost on sets of tensors that do not fit the caches
MEMORY_BOUND = ("one-25m", "gpt2-small", "resnet50")


def measure(case: Case, name: str, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in case.shapes]
    for p in params:
        p.grad = torch.randn(p.shape)
    plain = getattr(fused_l2, name)(params, **OPTIMIZERS[name])
    plain.step()
    measured = getattr(fused_l2, name)(params, **OPTIMIZERS[name], statistics=True)
    for p in params:  # one set of states, so that neither has the caches to itself
        state = {key: value for key, value in plain.state[p].items() if key != "step"}
        measured.state[p] = state | ({"step": torch.tensor(1.0)} if "step" in plain.state[p] else {})
    for optimizer in (plain, measured):
        optimizer.step()
    samples = timing.interleave({"without": plain.step, "with": measured.step}, seconds)
    return {
        "case": case.name,
        "optimizer": name,
        "seconds": {which: sample.quartiles() for which, sample in samples.items()},
        "cost": timing.quartiles(timing.ratios(samples["without"], samples["with"])),
        "kept": len(samples["with"].kept),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.statistics", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8, help="time for each case and optimizer (default 8)")
    parser.add_argument("--case", action="append", help="only this case (repeatable)")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    options = parser.parse_args(arguments)
    results = []
    for name in OPTIMIZERS:
        for case in CASES:
            if case.dtype is not torch.float32 or (options.case and case.name not in options.case):
                continue
            result = measure(case, name, options.seconds)
            results.append(result)
            low, cost, high = result["cost"]
            verdict = f"limit {LIMIT}: {'met' if cost <= LIMIT else 'MISSED'}" if case.name in MEMORY_BOUND else ""
            microseconds = 1e6 * result["seconds"]["with"][1]
            print(f"{name:6} {case.name:12} {microseconds:10.1f} us {cost:7.3f} ({low:.3f} to {high:.3f})  {verdict}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
