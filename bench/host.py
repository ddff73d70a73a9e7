"""``python -m bench host``: the host's time for a step of CUDA tensors, on a machine without a GPU.

Ours goes the whole way of a step, through Triton's own launcher, into a stub of libcuda; tensors are CPU tensors that stand for
CUDA ones (tests/gpu_free). torch.optim.AdamW(fused=True) steps CPU tensors of one element: what its `step()` does on the host
for CUDA tensors, `_init_group`, grouping by device and dtype, and dispatch, it does for these, too. Missing on our side are a
pinned copy's and an event's driver calls; missing on torch's side are its launches, one for every few hundred tensors. Included
on torch's side is the arithmetic of its CPU kernel on one element per tensor, given apart as "kernel".

The CPU path is measured, too: a step of tensors of one element is its host's time, and a little more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_l2

from . import timing
from .topic import Job, Options

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from gpu_free.stub_driver import StubDevice, stub_driver, why_unavailable

ROUNDS, CALLS = 21, 20
SIZES = ((1, 1), (30, 1), (300, 1), (300, 28), (465, 465), (1000, 1))  # tensors, groups


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


def sample(call: Callable[[], Any], before: Callable[[], Any], calls: int = CALLS) -> float:
    seconds = 0.0
    for _ in range(calls):
        before()
        start = time.perf_counter()
        call()
        seconds += time.perf_counter() - start
    return seconds / calls


def jobs(options: Options) -> Iterator[Job]:
    for tensors, groups in SIZES:
        yield Job(f"cpu {tensors} tensors {groups} groups", lambda _, t=tensors, g=groups: measure_cpu(t, g))
    if not why_unavailable():  # the reason, or nothing
        for tensors, groups in SIZES:
            yield Job(f"cuda {tensors} tensors {groups} groups", lambda _, t=tensors, g=groups: measure_cuda(t, g))


def measure_cpu(tensors: int, groups: int) -> dict[str, Any]:
    ours, theirs = make(fused_l2, tensors, groups), make(torch.optim, tensors, groups, fused=True)
    return _measure("cpu", tensors, groups, ours, theirs, lambda: fresh_grads(ours))


def measure_cuda(tensors: int, groups: int) -> dict[str, Any]:
    device = StubDevice()
    with stub_driver(), device.in_place(pytest.MonkeyPatch()):
        ours, theirs = make(fused_l2, tensors, groups), make(torch.optim, tensors, groups, fused=True)

        def before_ours() -> None:
            device.synchronize()
            device.memories.clear()
            device.launches.clear()
            fresh_grads(ours)

        return _measure("cuda", tensors, groups, ours, theirs, before_ours)


def _measure(device: str, tensors: int, groups: int, ours: Any, theirs: Any, before_ours: Callable[[], None]) -> dict[str, Any]:
    theirs.step()
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
        "device": device,
        "tensors": tensors,
        "groups": groups,
        "microseconds": {name: [1e6 * s for s in timing.quartiles(taken)] for name, taken in seconds.items()},
        "ratio, torch's kernel left out": timing.quartiles(ratios),
    }


def fitted(results: list[dict[str, Any]], device: str, who: str = "fused_l2") -> dict[str, float] | None:
    """Microseconds of a step = a constant + so much a tensor + so much a group, by least squares on relative errors."""
    taken = [r for r in results if r["device"] == device]
    if len(taken) < 4:
        return None
    rows = torch.tensor([[1.0, r["tensors"], r["groups"]] for r in taken], dtype=torch.float64)
    times = torch.tensor([r["microseconds"][who][1] for r in taken], dtype=torch.float64)
    constant, tensor, group = (
        torch.linalg.lstsq(rows / times[:, None], torch.ones_like(times)[:, None]).solution.flatten().tolist()
    )
    return {"constant": constant, "per tensor": tensor, "per group": group}


def summary(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for device in ("cpu", "cuda"):
        for who in ("fused_l2", "torch fused"):
            if fit := fitted(results, device, who):
                lines.append(
                    f"{device}, {who}: {fit['constant']:.1f} us + {fit['per tensor']:.2f} us a tensor + "
                    f"{fit['per group']:.2f} us a group"
                )
    return lines


def show(result: dict[str, Any]) -> str:
    low, ratio, high = result["ratio, torch's kernel left out"]
    times = ", ".join(f"{who} {taken[1]:.1f} us" for who, taken in result["microseconds"].items())
    return (
        f"{result['device']:5}{result['tensors']:>5} tensors, {result['groups']:>4} groups: {times}; "
        f"ratio without the kernel {ratio:.2f} ({low:.2f} .. {high:.2f})"
    )
