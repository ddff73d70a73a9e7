"""The CUDA engine: Triton kernels, one launch per bucket. Here: the device, its kernels, and copies to it.

:mod:`fused_l2.engines.device_tables` has what lies in device memory.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ..tables.tensor_table import Rule

OLDEST_TRITON = (3, 6)
_T = TypeVar("_T")


class Kernel(Protocol):
    """What :class:`fused_l2.kernels.launch.Kernel` is, for where triton may be missing."""

    opmath: torch.dtype
    chunk: int
    name: str

    def launcher(self, programs: int, *fixed: int) -> Callable[..., None]:
        """What launches this many programs on a stream, given the arguments behind the ``fixed`` ones."""


@functools.cache
def _launch() -> Any:
    try:
        from ..kernels import launch  # needs triton
    except ModuleNotFoundError as error:
        package = __package__.rpartition(".")[0]
        if error.name != f"{package}.kernels":
            raise
        raise ImportError(
            f"fused_l2 is imported from {Path(__file__).parents[1]}, a checkout without the GPU kernels inside. Install it "
            f"(pip install -e .), or take it off the path, as its folder is when Python starts there.",
            name=error.name,
        ) from error
    return launch


def compile_ahead(architecture: int | str, kind: str, *signature: Any) -> tuple[str, str]:
    """Compile a kernel for GPUs that need not be there. Returns its name and the architecture's."""
    launch = _launch()
    source = launch.SOURCES[kind](*signature)
    launch.compiled(source, launch.target_of(architecture))
    return launch.name_of(source), f"sm_{architecture}" if isinstance(architecture, int) else architecture


class Device:
    """One CUDA device: what the engine needs of torch.cuda and Triton. Tests put another in its place."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._compiled: dict[tuple[Any, ...], Kernel] = {}
        self.multiprocessors: int = torch.cuda.get_device_properties(device).multi_processor_count

    def compile(self, kind: Literal["step", "measure", "control", "coefficients", "write"], *signature: Any) -> Kernel:
        """A kernel, compiled and loaded. The ``signature`` is what the function of that name in kernels/launch.py takes. Raises
        whatever the compiler raises."""
        key = kind, *signature
        if key not in self._compiled:
            launch = _launch()
            with self.current():
                self._compiled[key] = launch.Kernel(launch.SOURCES[kind](*signature))
        return self._compiled[key]

    def is_capturing(self) -> bool:
        return is_capturing()

    def current(self) -> AbstractContextManager[Any]:
        """Makes this the current device, if it is not: launches and events go to the current one."""
        if torch.cuda.current_device() == self.device.index:
            return nullcontext()
        return torch.cuda.device(self.device)

    def stream(self) -> int:
        return int(_launch().current_stream(self.device.index))

    def memory(self, words: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(words, dtype=dtype, device=self.device)

    def scalar(self, value: Tensor) -> Tensor:
        """One float32 on this device, of a tensor on any."""
        return value.detach().reshape(()).to(device=self.device, dtype=torch.float32, non_blocking=True)

    def read(self, tensor: Tensor) -> list[float]:
        """The numbers of a tensor on this device. Waits for it."""
        return [float(x) for x in tensor.tolist()]

    def used_by_current_stream(self, memory: Tensor) -> None:
        """Tell the allocator that the current stream uses this memory, too, and has to be done before others get it."""
        memory.record_stream(torch.cuda.current_stream(self.device))

    def pinned(self, words: int) -> Tensor:
        return torch.empty(words, dtype=torch.int64, device="cpu", pin_memory=True)

    def upload(self, target: Tensor, pinned: Tensor) -> None:
        """Copy on the current stream, when it gets there."""
        target.copy_(pinned, non_blocking=True)

    def send(self, target: Tensor, words: array[int]) -> None:
        """Copy these words, once, to the beginning of the target, on the current stream."""
        if words:
            # Of torch's own, which is not used for anything else before the copy is made.
            pinned = self.pinned(len(words))
            pinned.copy_(torch.frombuffer(words, dtype=torch.int64))
            self.upload(target[: len(words)], pinned)

    def sent(self, numbers: Sequence[int]) -> Tensor:
        """These integers, in memory of the device. Nobody waits."""
        memory = self.memory(len(numbers))
        self.send(memory, array("q", numbers))
        return memory

    def event(self) -> Any:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]


class UploadRing:
    """Copies to one piece of device memory from pinned host buffers.

    A copy is made when the stream gets to it. A buffer is therefore written again only after the event behind its copy has
    happened, and where none is free another one is made, so that the host never waits. How many there are depends on how
    many steps the host runs ahead of the device.
    """

    def __init__(self, device: Device, target: Tensor, words: int) -> None:
        self._device, self._target, self._words = device, target, words
        self._in_flight: deque[tuple[Any, Tensor, memoryview]] = deque()

    def __len__(self) -> int:
        return len(self._in_flight)

    def upload(self, *parts: bytes | memoryview) -> None:
        """Copy these bytes, one part behind the other, to the beginning of the target, on the current stream."""
        if self._in_flight and self._in_flight[0][0].query():
            event, pinned, view = self._in_flight.popleft()
        else:
            event, pinned = self._device.event(), self._device.pinned(self._words)
            view = memoryview((ctypes.c_char * (8 * self._words)).from_address(pinned.data_ptr())).cast("B")
        end = 0
        for part in parts:
            begin, end = end, end + len(part)
            view[begin:end] = part
        words = end // 8
        self._device.upload(self._target[:words], pinned[:words])
        event.record()
        self._in_flight.append((event, pinned, view))


def is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def device(of: torch.device) -> Device:
    return Device(of)


TRITON_VARIABLE = "FUSED_L2_TRITON"
_NO_IMPORT = "triton cannot be imported"
_ATTEMPTS = 3


def attempted(make: Callable[[], _T]) -> _T:
    """Do this again if it fails: what compiles and loads may meet a file that another process is writing, or a network disk
    that is away for a moment."""
    for left in reversed(range(_ATTEMPTS)):
        try:
            return make()
        except Exception as error:
            lasting = isinstance(error, ImportError) or type(error).__name__ == "Refused"  # the compiler's own refusal
            if lasting or not left or _is_out_of_memory(error):
                raise
            time.sleep(0.1)
    raise AssertionError


def _is_out_of_memory(error: Exception) -> bool:
    return "out of memory" in str(error).lower()  # says nothing about the next time


def compiled(on: Device, kind: Any, *signature: Any) -> Kernel:
    """A kernel. Raises what the compiler raises where it does so again and again."""
    return attempted(lambda: on.compile(kind, *signature))


_availability: list[str] = []  # what why_unavailable() has found, until it may be otherwise


def why_unavailable() -> str:
    """Why there is no engine for any CUDA device, or nothing. Raises where other processes may have one, see _failed(). An
    import that failed is tried again when :func:`forget_failures` was called: a network disk may be away for a moment."""
    if not _availability:
        _availability.append(_find_triton())
    return _availability[0]


def _find_triton() -> str:
    if os.environ.get(TRITON_VARIABLE) == "0":
        return f"{TRITON_VARIABLE}=0"
    try:
        import triton

        found = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if found < OLDEST_TRITON:
            return f"triton {triton.__version__} is older than 3.6. Update torch, which brings its own triton"
        attempted(_launch)
    except ImportError as error:
        return f"{_NO_IMPORT} ({error}). Install it: pip install 'triton>=3.6'"
    except Exception as error:
        return _failed(_NO_IMPORT, error)
    return ""


def _failed(what: str, error: Exception) -> str:
    """Why plain PyTorch steps the tensors instead.

    Raises:
        RuntimeError: where several processes train together. The others may not have failed, and replicas that are stepped by
            different engines come apart by rounding.
    """
    reason = f"{what}: {type(error).__name__}: {error}"
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"fused_l2, rank {distributed.get_rank()}: {reason}. Other processes may have their kernels, and plain PyTorch in "
            f"this one alone would let replicas come apart; nothing was changed. If it happens in all of them, set "
            f"{TRITON_VARIABLE}=0 in all of them, and plain PyTorch steps CUDA tensors."
        ) from error
    return reason


def triton_version() -> str:
    return str(_launch().version())


Signature = tuple[torch.device, Rule, int, torch.dtype, torch.dtype, torch.dtype]
_kernels: dict[Signature, tuple[Any, str]] = {}
_failures: dict[Signature, tuple[Any, str]] = {}  # which may not happen the next time


def find_kernel(
    of: torch.device, rule: Rule, flags: int, param: torch.dtype, grad: torch.dtype, state: torch.dtype
) -> tuple[Kernel | None, str]:
    """The kernel of a bucket on a device, or None and why there is none. Compiles it if need be, once per process; what failed
    for another reason than the compiler's own refusal is tried again when :func:`forget_failures` was called."""
    signature = (of, rule, flags, param, grad, state)
    found = _kernels.get(signature) or _failures.get(signature)
    return _make_kernel(signature) if found is None else found


def forget_failures() -> None:
    """A new plan: a disk that was full may have room again."""
    _failures.clear()
    if _availability and _availability[0].startswith(_NO_IMPORT):
        _availability.clear()


def _make_kernel(signature: Signature) -> tuple[Kernel | None, str]:
    if reason := why_unavailable():
        return None, reason
    launch, (of, *rest) = _launch(), signature
    found: tuple[Kernel | None, str]
    try:
        found = _kernels[signature] = compiled(device(of), "step", *rest), ""
        return found
    except launch.Refused as error:
        found = _kernels[signature] = None, str(error)
        return found
    except Exception as error:  # Triton needs a C compiler, Python's headers, a writable cache, ...
        if _is_out_of_memory(error):
            raise
        found = _failures[signature] = None, _failed("Triton could not compile or load a kernel", error)
        return found
