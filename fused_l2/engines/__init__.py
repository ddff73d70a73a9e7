"""Who computes a step: the one place that looks at a tensor's device.

* :mod:`fused_l2.engines.cpu`: the C++ library, for CPU tensors.
* :mod:`fused_l2.engines.torch_ops`: plain PyTorch, for everything else.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tensor_table import DTYPES
from . import cpu

_PLAIN_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_warned: set[str] = set()


@dataclass(frozen=True)
class Capability:
    """Which engine serves a device, and why."""

    device: str
    engine: str
    reason: str


@dataclass(frozen=True)
class Capabilities:
    """What :func:`capabilities` returns; prints as a table."""

    devices: tuple[Capability, ...]

    def __getitem__(self, device: str) -> Capability:
        for capability in self.devices:
            if capability.device == device:
                return capability
        return self.devices[-1]

    def __str__(self) -> str:
        widths = [max(len(getattr(c, field)) for c in self.devices) for field in ("device", "engine")]
        return "\n".join(f"{c.device:{widths[0]}}  {c.engine:{widths[1]}}  {c.reason}" for c in self.devices)


def capabilities() -> Capabilities:
    """Which engine and instruction set serve which device, and why.

    Example::

        >>> print(fused_l2.capabilities())  # doctest: +SKIP
        cpu            C++ (avx512)   available: baseline, avx2, avx512; 2 threads of torch's pool
        other devices  plain PyTorch  their own engine is not part of this version
    """
    library, why_not = cpu.library(), cpu.why_unavailable()
    if library is None:
        on_cpu = Capability("cpu", "plain PyTorch", why_not)
    else:
        forced = f", forced by {cpu.CAPABILITY_VARIABLE}" if library.forced else ""
        available = f"available: {', '.join(library.available)}{forced}"
        threads = library.thread_count() if library.has_threads else 1
        pool = f"{threads} thread{'s' * (threads != 1)} of torch's pool"
        if not library.has_threads:
            pool = "one thread, because this torch lacks torch_parallel_for (torch >= 2.10 has it)"
        on_cpu = Capability("cpu", f"C++ ({library.capability})", f"{available}; {pool}")
    others = Capability("other devices", "plain PyTorch", "their own engine is not part of this version")
    return Capabilities((on_cpu, others))


# At import, so that a wrong FUSED_L2_CPU_CAPABILITY is told there and not in the middle of a run.
cpu.library()


def takes_cpu_engine(param: Tensor) -> bool:
    """Whether the C++ library steps this parameter.

    It takes strided CPU tensors of a dtype in ``DTYPES`` that fill their memory without gaps, in any order of dimensions.
    That a whole device, or every tensor for lack of the library, takes plain PyTorch is told once per process.
    """
    if param.device.type != "cpu":
        device = param.device.type
        _warn_once(
            f"fused_l2 steps {device} tensors with plain PyTorch operations in this version: the results are right, "
            f"the speed is that of torch.optim's functions. Its own engine is for CPU tensors."
        )
        return False
    if cpu.library() is None:
        _warn_once(f"fused_l2 steps CPU tensors with plain PyTorch operations: {cpu.why_unavailable()}")
        return False
    return is_plain(param) and param.dtype in DTYPES and is_dense(param)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's memory holds its values: no subclass that wraps others, no lazy negation."""
    return has_plain_type(tensor) and not tensor.is_neg()


def has_plain_type(tensor: Tensor) -> bool:
    """Whether a tensor is of torch's own types, not of a subclass that may wrap others."""
    return type(tensor) in _PLAIN_TYPES


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlaps, in any order of dimensions."""
    if tensor.layout is not torch.strided:
        return False
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)
