"""``python -m bench dtensor``: the host's time for a step of DTensors against that of plain tensors, and torch's on DTensors.

One process, a mesh of one, tensors of one element: what remains is Python and dispatch. Gradients are new tensors in each step,
with their parameters' specification, as FSDP2 makes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fused_l2

from . import timing
from .host import sample
from .topic import Job, Options, spread

ROUNDS = 21
SIZES = (30, 300, 1000)
MOST, LEAST = 1.5, 5.0  # times plain tensors; times faster than torch


def jobs(options: Options) -> Iterator[Job]:
    for tensors in SIZES:
        yield Job(f"{tensors} DTensors", lambda _, n=tensors: measure(n))


@contextlib.contextmanager
def one_process() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def make(module: Any, tensors: int, mesh: Any, **options: Any) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A step, and what precedes it: new gradients."""
    plain = [torch.zeros(1) for _ in range(tensors)]
    params = [torch.nn.Parameter(distribute_tensor(t, mesh, [Shard(0)]) if mesh else t) for t in plain]
    optimizer = module.AdamW(params, **options)

    def fresh_grads() -> None:
        for p in params:
            p.grad = DTensor(torch.zeros(1), p._spec, requires_grad=False) if mesh else torch.zeros(1)

    fresh_grads()
    optimizer.step()
    return optimizer.step, fresh_grads


def measure(tensors: int) -> dict[str, Any]:
    with one_process() as mesh:
        contestants = {
            "DTensors": make(fused_l2, tensors, mesh),
            "plain tensors": make(fused_l2, tensors, None),
            "torch foreach, DTensors": make(torch.optim, tensors, mesh, foreach=True),
            "torch fused, DTensors": make(torch.optim, tensors, mesh, fused=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(ROUNDS + 1):
            for name, (call, before) in contestants.items():
                seconds[name].append(sample(call, before, 20 if "torch" not in name else 1))
    seconds = {name: taken[1:] for name, taken in seconds.items()}  # the first round warms up

    def ratio(of: str, to: str) -> Any:
        return timing.quartiles([a / b for a, b in zip(seconds[of], seconds[to], strict=True)])

    return {
        "tensors": tensors,
        "microseconds": {name: [1e6 * s for s in timing.quartiles(taken)] for name, taken in seconds.items()},
        "to plain tensors": ratio("DTensors", "plain tensors"),
        "torch foreach to ours": ratio("torch foreach, DTensors", "DTensors"),
        "torch fused to ours": ratio("torch fused, DTensors", "DTensors"),
    }


def show(result: dict[str, Any]) -> str:
    times = ", ".join(f"{who} {taken[1]:.0f} us" for who, taken in result["microseconds"].items())
    plain, foreach, fused = (result[key] for key in ("to plain tensors", "torch foreach to ours", "torch fused to ours"))
    met = plain[1] <= MOST and min(foreach[1], fused[1]) >= LEAST
    return (
        f"{result['tensors']:5} tensors: {times}; DTensors take {' ('.join(spread(plain))}) times as long as plain ones, "
        f"torch's AdamW {foreach[1]:.0f} (foreach), {fused[1]:.0f} (fused) times as long; limits {MOST}, {LEAST}: "
        f"{'met' if met else 'MISSED'}"
    )
