"""What the scenarios share. A scenario is a function of the number of ranks and of a folder in which runs leave checkpoints for
later ones; what it asserts holds on every rank.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

import fused_l2

# "cuda" in tests/test_gpu_distributed.py. runner.py makes it torch's default device.
DEVICE = os.environ.get("FUSED_L2_TESTED_ON", "cpu")

Scenario = Callable[[int, Path], None]
SCENARIOS: dict[str, Scenario] = {}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "Adam": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
}
# Rows that no number of ranks divides, fewer rows than ranks (empty shards, T46), one element, and a matrix.
SHAPES = ((7, 3), (1, 5), (1,), (16, 8), (3,))


_patience = 0.0


def watch(patience: float) -> None:
    """End this process, after writing where it stands, whenever it makes no progress for so many seconds."""
    global _patience
    _patience = patience
    is_alive()


def is_alive() -> None:
    """There is progress."""
    if _patience:
        faulthandler.dump_traceback_later(_patience, exit=True)


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def mesh_of(world: int) -> DeviceMesh:
    return init_device_mesh(DEVICE, (world,))


def randoms(seed: int, shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same on every rank."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.dtype is torch.int16:  # gloo cannot gather it
        return full(fused_l2.parameters.shards.like(tensor, tensor.to_local().view(torch.bfloat16))).view(torch.int16)
    return tensor.full_tensor()


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    is_alive()
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        x, y = full(x), full(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), i
        assert x.view(torch.uint8).equal(y.view(torch.uint8)) if x.dim() else x.equal(y), f"tensor {i}: {x} is not {y}"


Layout = tuple[DeviceMesh, Sequence[Any]]


def laid_out(tensor: Tensor, layout: Layout | None) -> Tensor:
    """This tensor on a mesh; None: a plain one."""
    return tensor.clone() if layout is None else distribute_tensor(tensor.clone(), *layout)


def against_single_process(
    name: str,
    layouts: Sequence[Layout | None],
    grad_layouts: Sequence[Layout | None] | None = None,
    dtype: torch.dtype = torch.float32,
    steps: int = 4,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    **options: Any,
) -> tuple[Any, Any, list[nn.Parameter], list[nn.Parameter]]:
    """Step tensors that are cut up and whole ones by the same gradients, and compare every bit of parameters and states."""
    whole = [nn.Parameter(t) for t in randoms(0, shapes, dtype)]
    cut = [nn.Parameter(laid_out(t, layout)) for t, layout in zip(randoms(0, shapes, dtype), layouts, strict=True)]
    single, ours = (getattr(fused_l2, name)(ps, **{**OPTIMIZERS[name], **options}) for ps in (whole, cut))
    for step in range(steps):
        for p, q, g, layout in zip(whole, cut, randoms(step + 1, shapes, dtype), grad_layouts or layouts, strict=True):
            p.grad = g
            q.grad = laid_out(g, layout)
        for optimizer in (single, ours):
            optimizer.step()
        same(cut, whole)
    for p, q in zip(whole, cut, strict=True):
        for key, value in single.state[p].items():
            own = ours.state[q][key]
            assert isinstance(own, DTensor) == (isinstance(q, DTensor) and key != "step"), (key, type(own))
            assert not isinstance(own, DTensor) or own.placements == q.placements
            same([own], [value])
    return single, ours, whole, cut


def refused(call: Callable[[], Any], *words: str, error: type[Exception] = RuntimeError) -> None:
    try:
        call()
    except error as raised:
        message = str(raised)
        missing = [word for word in words if word not in message]
        assert not missing, message
        return
    raise AssertionError(f"nothing was raised; expected {words}")
