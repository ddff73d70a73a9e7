"""Who computes a step.

* :mod:`fused_l2.engines.cpu`: the C++ library, for CPU tensors.
* :mod:`fused_l2.engines.cuda`: Triton kernels, for CUDA tensors.
* :mod:`fused_l2.engines.torch_ops`: plain PyTorch, for everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._warnings import warn
from ..parameters.entry import Entry
from ..parameters.memory import has_memory, has_plain_type, is_dense, is_plain
from ..parameters.ranks import Sharing
from ..parameters.shards import local
from ..tables.tensor_table import DTYPES, Rule
from . import cpu, cuda
from .cpu_part import CpuPart
from .cuda_part import CudaPart
from .part import Part
from .torch_ops import TorchPart

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
    try:
        on_cuda = _on_cuda()
    except Exception as error:  # of torch, of a driver, of triton
        on_cuda = Capability("cuda", "none", f"it cannot be asked: {type(error).__name__}: {error}")
    return Capabilities((on_cpu, on_cuda, others))


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
    try:
        return Capability("cuda", f"Triton ({cuda.triton_version()})", reason)
    except ImportError as error:
        return Capability("cuda", "none", str(error))


# At import, so that a wrong FUSED_L2_CPU_CAPABILITY is told there and not in the middle of a run.
cpu.library()


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor is stepped: the device it is on."""
    return tensor.device


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether that is the CPU, in less time."""
    return tensor.is_cpu


def has_engine(entry: Entry, rule: Rule) -> bool:
    """Whether an engine of ours steps this parameter, rather than plain PyTorch.

    They take strided tensors of a dtype in ``DTYPES`` that fill their memory without gaps, in any order of dimensions. That
    a whole device lacks an engine is told once per process.
    """
    if not (entry.is_regular and entry.local.dtype in DTYPES):
        kind = type(entry.local)
        if not has_plain_type(entry.local) and kind.__module__.partition(".")[0] != "torch":
            _warn_once(
                f"fused_l2 steps tensors of the subclass {kind.__module__}.{kind.__qualname__} with plain PyTorch operations, "
                f"because it has a __torch_function__ or __torch_dispatch__ of its own: the results are right, the speed is "
                f"that of torch.optim's functions."
            )
        return False
    device = device_of(entry.local)
    if device.type == "cpu":
        if cpu.library() is None:
            _warn_once(f"fused_l2 steps CPU tensors with plain PyTorch operations: {cpu.why_unavailable()}")
        return cpu.library() is not None
    if device.type == "cuda":
        kernel, reason = cuda.find_kernel(device, rule, entry.flags, entry.local.dtype, entry.grad_dtype, entry.state_dtype)
        if kernel is None:
            _warn_once(f"fused_l2 steps tensors on {device} with plain PyTorch operations: {reason}")
        return kernel is not None
    _warn_once(
        f"fused_l2 steps {device.type} tensors with plain PyTorch operations: the results are right, the speed is that of "
        f"torch.optim's functions. Engines of its own are for CPU and CUDA tensors."
    )
    return False


def make_part(device: torch.device | None, rule: Rule, ranks: tuple[Any, ...], flags: int, on_device: bool) -> Part:
    """A part for the tensors of this device; None: for those that no engine of ours steps."""
    if device is None:
        return TorchPart(rule, flags)
    return CpuPart(rule, ranks, flags) if device.type == "cpu" else CudaPart(rule, ranks, flags, device, on_device)


def sums_of_squares(tensors: Sequence[Tensor]) -> list[float]:
    """Sum of x^2 per tensor, in float64. RuntimeError if a tensor's storage was freed."""
    sharing = Sharing(tensors, [0] * len(tensors), [None], "")
    tensors = [local(t) for t in tensors]
    for i, t in enumerate(tensors):
        if not has_memory(t):
            raise RuntimeError(
                f"tensor {i} of shape {tuple(t.shape)}: its storage holds fewer elements than its shape says, as after "
                f"untyped_storage().resize_(0). Restore the storage first."
            )
    library = cpu.library()
    sums = [0.0] * len(tensors)
    native = [
        i
        for i, t in enumerate(tensors)
        if library is not None and t.device.type == "cpu" and t.dtype in DTYPES and is_plain(t) and is_dense(t)
    ]
    if library is not None and native:
        chosen = [tensors[i] for i in native]
        for i, total in zip(native, library.sums_of_squares(chosen, [DTYPES[t.dtype] for t in chosen]), strict=True):
            sums[i] = total
    for i in set(range(len(tensors))) - set(native):
        sums[i] = float(tensors[i].double().square().sum())
    at = {ranks: [i for i, r in enumerate(sharing.cut) if r == ranks] for ranks in filter(None, sharing.all)}
    here = {
        ranks: torch.tensor([sums[i] for i in slots], dtype=torch.float64, device=tensors[slots[0]].device)
        for ranks, slots in at.items()
    }
    for ranks, totals in sharing.reduced_each(here).items():
        for i, total in zip(at[ranks], totals.tolist(), strict=True):
            sums[i] = total
    return sums


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warn(message)
