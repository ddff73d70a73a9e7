"""``python -m bench``: how fast a step is, next to torch.optim and the memory floor, on this machine."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import fused_l2

from . import limit, providers, timing
from .cases import CASES, OPTIMIZERS, STREAMS, Case

# The ratios to torch fused that the project holds itself to.
GATES = {
    "AdamW": {
        "one-25m": 1.12, "gpt2-small": 1.12, "resnet50": 1.25, "tiny-1000": 15, "mlp-40": 2.5, "one-64k": 4.5, "one-1m": 1.6,
        "one-25m-bf16": 1.6,
    },
    "SGD": {
        "one-25m": 1.08, "gpt2-small": 1.07, "resnet50": 1.12, "tiny-1000": 12, "mlp-40": 1.8, "one-64k": 5, "one-1m": 1.3,
    },
}  # fmt: skip


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0] if models else cpu
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "engine": fused_l2.capabilities()["cpu"].engine,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fused_l2": fused_l2.__version__,
    }


def measure(case: Case, optimizer: str, budget: float) -> dict[str, Any]:
    """One row per provider: seconds, ratio to torch fused, GB/s, share of the memory floor."""
    contest = providers.Contest(case, optimizer, OPTIMIZERS[optimizer])
    contestants = contest.steps()
    floor = limit.stream_step(contest.optimizers["fused_l2"])
    if floor is not None:
        contestants["memory floor"] = floor
    numel = sum(math.prod(shape) for shape in case.shapes)
    contestants["copy"] = limit.copy_step(numel, case.dtype)
    samples = timing.interleave(contestants, budget)
    size = torch.empty((), dtype=case.dtype).element_size()
    rows = {}
    for name, sample in samples.items():
        low, median, high = sample.quartiles()
        moved = numel * size * (2 if name == "copy" else sum(STREAMS[optimizer]))
        rows[name] = {
            "seconds": [low, median, high],
            "ratio_to_torch_fused": timing.quartiles(timing.ratios(sample, samples["torch fused"])),
            "ratio_to_memory_floor": timing.quartiles(timing.ratios(sample, samples["memory floor"])) if floor else None,
            "GB/s": moved / median * 1e-9,
            "kept": len(sample.kept),
            "rounds": len(sample.seconds),
        }
    return {"case": case.name, "optimizer": optimizer, "parameters": numel, "tensors": len(case.shapes), "rows": rows}


def show(result: dict[str, Any], verdicts: dict[str, str]) -> None:
    gate = GATES[result["optimizer"]].get(result["case"])
    print(f"\n{result['optimizer']}, {result['case']}: {result['parameters']:,} parameters in {result['tensors']} tensors")
    print(f"  {'':16}{'check':9}{'time':>12}{'quartiles':>24}{'x torch fused':>15}{'quartiles':>15}{'GB/s':>8}{'% floor':>9}")
    for name, row in result["rows"].items():
        low, median, high = (s * 1e6 for s in row["seconds"])
        if name == "copy":
            print(f"  {name:16}{'':9}{median:>10.1f}us{f'{low:.1f} .. {high:.1f}':>24}{'':30}{row['GB/s']:>8.1f}")
            continue
        q1, ratio, q3 = row["ratio_to_torch_fused"]
        floor = row["ratio_to_memory_floor"]
        share = f"{100 * floor[1]:.0f}" if floor else "-"
        times, spread = f"{low:.1f} .. {high:.1f}", f"{q1:.2f} .. {q3:.2f}"
        verdict = f"gate {gate}: {'met' if ratio >= gate else 'MISSED'}" if name == "fused_l2" and gate else ""
        print(
            f"  {name:16}{verdicts.get(name, ''):9}{median:>10.1f}us{times:>24}{ratio:>15.2f}{spread:>15}"
            f"{row['GB/s']:>8.1f}{share:>9}  {verdict}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--case", action="append", choices=[c.name for c in CASES], help="only this case (repeatable)")
    parser.add_argument("--optimizer", action="append", choices=list(OPTIMIZERS), help="only this optimizer (repeatable)")
    parser.add_argument("--seconds", type=float, default=12, help="time for each case and optimizer (default 12)")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    options = parser.parse_args(arguments)

    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print("ratios: seconds of torch fused / seconds of the row, median over rounds; above 1 the row is faster")
    chosen = [c for c in CASES if not options.case or c.name in options.case]
    results = []
    try:
        for optimizer in options.optimizer or OPTIMIZERS:
            for case in chosen:
                if case.dtype is torch.bfloat16 and optimizer == "SGD":
                    continue  # torch fused SGD leaves most bfloat16 parameters as they were (pytorch issue 191763)
                verdicts = providers.correct(optimizer, OPTIMIZERS[optimizer], case.dtype)
                results.append({**measure(case, optimizer, options.seconds), "correct": verdicts})
                show(results[-1], verdicts)
    except KeyboardInterrupt:
        print("\nstopped; what was measured is kept", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n")
        print(f"\nwritten to {options.json}")
    return 0
