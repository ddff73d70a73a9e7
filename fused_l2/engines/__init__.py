"""Who computes a step: the one place that looks at a tensor's device.

* :mod:`fused_l2.engines.cpu`: the C++ library, for CPU tensors.
* :mod:`fused_l2.engines.cuda`: Triton kernels, for CUDA tensors.
* :mod:`fused_l2.engines.torch_ops`: plain PyTorch, for everything else.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tables.tensor_table import DTYPES, Rule
from . import cpu, cuda

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
        cpu            C++ (avx512)    available: baseline, avx2, avx512; 2 threads of torch's pool
        cuda           Triton (3.6.0)  1 device
        other devices  plain PyTorch   there is no engine for them
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
    others = Capability("other devices", "plain PyTorch", "there is no engine for them")
    return Capabilities((on_cpu, _on_cuda(), others))


def _on_cuda() -> Capability:
    if not torch.cuda.is_available():
        return Capability("cuda", "none", "this torch finds no CUDA device")
    if reason := cuda.why_unavailable():
        return Capability("cuda", "plain PyTorch", reason)
    count = torch.cuda.device_count()
    reason = f"{count} device{'s' * (count != 1)}"
    # Asking for names would initialize CUDA, and processes forked later could not use it.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        reason = ", ".join(dict.fromkeys(torch.cuda.get_device_name(i) for i in range(count)))
    return Capability("cuda", f"Triton ({cuda.triton_version()})", reason)


# At import, so that a wrong FUSED_L2_CPU_CAPABILITY is told there and not in the middle of a run.
cpu.library()


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor is stepped: the device it is on."""
    return tensor.device


def has_engine(param: Tensor, rule: Rule, flags: int, grad_dtype: torch.dtype, state_dtype: torch.dtype) -> bool:
    """Whether an engine of ours steps this parameter, rather than plain PyTorch.

    They take strided tensors of a dtype in ``DTYPES`` that fill their memory without gaps, in any order of dimensions. That
    a whole device lacks an engine is told once per process.
    """
    if not (is_plain(param) and param.dtype in DTYPES and is_dense(param)):
        return False
    device = device_of(param)
    if device.type == "cpu":
        if cpu.library() is None:
            _warn_once(f"fused_l2 steps CPU tensors with plain PyTorch operations: {cpu.why_unavailable()}")
        return cpu.library() is not None
    if device.type == "cuda":
        kernel, reason = cuda.find_kernel(device, rule, flags, param.dtype, grad_dtype, state_dtype)
        if kernel is None:
            _warn_once(f"fused_l2 steps tensors on {device} with plain PyTorch operations: {reason}")
        return kernel is not None
    _warn_once(
        f"fused_l2 steps {device.type} tensors with plain PyTorch operations: the results are right, the speed is that of "
        f"torch.optim's functions. Engines of its own are for CPU and CUDA tensors."
    )
    return False


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
