"""``python -m bench.clip``: clipping and a step, against torch's clip_grad_norm_ (foreach) and fused step, on this CPU."""

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

# The ratios that the project holds itself to.
GATES = {"AdamW": {"gpt2-small": 1.3, "tiny-1000": 10}, "SGD": {"gpt2-small": 1.4, "tiny-1000": 10}}


def measure(case: Case, name: str, seconds: float) -> dict[str, Any]:
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
    samples = timing.interleave({"fused_l2": clipped.step, "torch": clip_and_step}, seconds)
    return {
        "case": case.name,
        "optimizer": name,
        "first norm": norm,
        "seconds": {who: sample.quartiles() for who, sample in samples.items()},
        "ratio": timing.quartiles(timing.ratios(samples["fused_l2"], samples["torch"])),
        "kept": len(samples["fused_l2"].kept),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.clip", description=__doc__)
    parser.add_argument("--seconds", type=float, default=12, help="time for each case and optimizer (default 12)")
    parser.add_argument("--case", action="append", help="only this case (repeatable)")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    options = parser.parse_args(arguments)
    chosen = [c for c in CASES if c.dtype is torch.float32 and (not options.case or c.name in options.case)]
    results = []
    for name in OPTIMIZERS:
        for case in chosen:
            result = measure(case, name, options.seconds)
            results.append(result)
            low, ratio, high = result["ratio"]
            ours, theirs = (1e6 * result["seconds"][who][1] for who in ("fused_l2", "torch"))
            gate = GATES[name].get(case.name)
            verdict = "" if gate is None else f"gate {gate}: {'met' if ratio >= gate else 'MISSED'}"
            print(
                f"{name:6} {case.name:12} {ours:10.1f} us {theirs:10.1f} us {ratio:7.2f} ({low:.2f} to {high:.2f})  {verdict}"
            )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
