"""``python -m bench.host``: the host's time for a step of CUDA tensors, on a machine without a GPU.

Ours goes the whole way of a step, through Triton's own launcher, into a stub of libcuda; tensors are CPU tensors that stand for
CUDA ones (tests/gpu_free). torch.optim.AdamW(fused=True) steps CPU tensors of one element: what its `step()` does on the host
for CUDA tensors, `_init_group`, grouping by device and dtype, and dispatch, it does for these, too. Missing on our side are a
pinned copy's and an event's driver calls; missing on torch's side are its launches, one for every few hundred tensors. Included
on torch's side is the arithmetic of its CPU kernel on one element per tensor, given apart as "kernel".
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_l2

from . import timing
from .run import machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from gpu_free.stub_driver import StubDevice, stub_driver, why_unavailable

ROUNDS, CALLS = 21, 20


def make(module: Any, tensors: int, groups: int, **options: Any) -> Any:
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.zeros(1)
    dealt = [params[i::groups] for i in range(groups)]
    return module.AdamW([{"params": ps, "lr": 1e-3 * (i + 1)} for i, ps in enumerate(dealt)], **options)


def torch_kernel(optimizer: Any) -> Callable[[], None]:
    """Only the call that computes, of all of torch's step."""
    calls = []
    for group in optimizer.param_groups:
        ps = group["params"]
        states = [[optimizer.state[p][key] for p in ps] for key in ("exp_avg", "exp_avg_sq")]
        steps = [optimizer.state[p]["step"] for p in ps]
        calls.append(([p.detach() for p in ps], [p.grad for p in ps], *states, [], steps))

    def run() -> None:
        for lists in calls:
            torch._fused_adamw_(
                *lists, lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False
            )

    return run


def fresh_grads(optimizer: Any) -> None:
    """As after zero_grad(set_to_none=True) and backward: new tensors, at other addresses."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros(1)


def sample(call: Callable[[], Any], before: Callable[[], Any]) -> float:
    seconds = 0.0
    for _ in range(CALLS):
        before()
        start = time.perf_counter()
        call()
        seconds += time.perf_counter() - start
    return seconds / CALLS


def measure(tensors: int, groups: int, device: StubDevice) -> dict[str, Any]:
    ours, theirs = make(fused_l2, tensors, groups), make(torch.optim, tensors, groups, fused=True)
    theirs.step()

    def before_ours() -> None:
        device.synchronize()
        device.memories.clear()
        device.launches.clear()
        fresh_grads(ours)

    contestants = {
        "fused_l2": (ours.step, before_ours),
        "torch fused": (theirs.step, lambda: fresh_grads(theirs)),
        "torch fused, kernel": (torch_kernel(theirs), lambda: None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS + 1):
        for name, (call, before) in contestants.items():
            seconds[name].append(sample(call, before))
    seconds = {name: taken[1:] for name, taken in seconds.items()}  # the first round warms up
    without = zip(seconds["fused_l2"], seconds["torch fused"], seconds["torch fused, kernel"], strict=True)
    ratios = [(theirs - kernel) / ours for ours, theirs, kernel in without]
    return {
        "tensors": tensors,
        "groups": groups,
        "microseconds": {name: [1e6 * s for s in timing.quartiles(taken)] for name, taken in seconds.items()},
        "ratio, torch's kernel left out": timing.quartiles(ratios),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    options = parser.parse_args(arguments)
    if reason := why_unavailable():
        print(reason, file=sys.stderr)
        return 1
    results = []
    columns = ("tensors", 8), ("groups", 8), ("fused_l2 us", 14), ("torch fused us", 16), ("its kernel us", 15), ("ratio", 8)
    print("".join(f"{title:>{width}}" for title, width in (*columns, ("quartiles", 14))))
    device = StubDevice()
    with stub_driver(), device.in_place(pytest.MonkeyPatch()):
        for tensors, groups in ((1, 1), (30, 1), (300, 1), (300, 28), (465, 465), (1000, 1)):
            result = measure(tensors, groups, device)
            results.append(result)
            low, ratio, high = result["ratio, torch's kernel left out"]
            cells = [tensors, groups, *(f"{taken[1]:.1f}" for taken in result["microseconds"].values()), f"{ratio:.2f}"]
            row = "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, columns, strict=True))
            print(f"{row}  {low:.2f} .. {high:.2f}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
