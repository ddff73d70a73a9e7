"""The CUDA engine: Triton kernels, one launch per bucket.

The tensor table, the chunk map and the coefficient rows of a bucket lie in one piece of device memory that keeps its address.
A step uploads what changed of them in one asynchronous copy and launches one kernel, both on the current stream of the device.
The host never waits for the device.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import coefficients
from ..tensor_table import Rule, TensorTable, chunk_map, norm_chunk

if TYPE_CHECKING:
    from ..kernels.launch import ClipKernel, Kernel, MeasureKernel

OLDEST_TRITON = (3, 6)
CAPTURING = (
    "fused_l2: step() cannot be captured into a CUDA graph with the host's step counts and hyperparameters: a replay would "
    "repeat this step's. Call step() outside of the graph."
)


class Device:
    """One CUDA device: what the engine needs of torch.cuda and Triton. Tests put another in its place."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.multiprocessors: int = torch.cuda.get_device_properties(device).multi_processor_count

    def kernel(self, rule: Rule, flags: int, param: torch.dtype, state: torch.dtype) -> Kernel:
        """The kernel of a bucket, compiled and loaded. Raises whatever the compiler raises."""
        from ..kernels.launch import Kernel

        with self.current():
            return Kernel(rule, flags, param, state)

    def measure_kernel(self, dtype: torch.dtype, largest: bool) -> MeasureKernel:
        from ..kernels.launch import MeasureKernel

        with self.current():
            return MeasureKernel(dtype, largest)

    def clip_kernel(self, largest: bool, opmath: torch.dtype) -> ClipKernel:
        from ..kernels.launch import ClipKernel

        with self.current():
            return ClipKernel(largest, opmath)

    def current(self) -> AbstractContextManager[Any]:
        """Makes this the current device, if it is not: launches and events go to the current one."""
        if torch.cuda.current_device() == self.device.index:
            return nullcontext()
        return torch.cuda.device(self.device)

    def stream(self) -> int:
        from ..kernels.launch import current_stream

        return int(current_stream(self.device.index))

    def memory(self, words: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(words, dtype=dtype, device=self.device)

    def used_by_current_stream(self, memory: Tensor) -> None:
        """Tell the allocator that the current stream uses this memory, too, and has to be done before others get it."""
        memory.record_stream(torch.cuda.current_stream(self.device))

    def pinned(self, words: int) -> Tensor:
        return torch.empty(words, dtype=torch.int64, device="cpu", pin_memory=True)

    def upload(self, target: Tensor, pinned: Tensor) -> None:
        """Copy on the current stream, when it gets there."""
        target.copy_(pinned, non_blocking=True)

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


class DeviceTable:
    """A bucket's tables on the device, and the kernel that steps it."""

    def __init__(self, device: Device, kernel: Kernel, table: TensorTable) -> None:
        self._device, self._table = device, table
        self._typecode = "d" if kernel.opmath is torch.float64 else "f"
        numels = table.numels()
        chunk = _chunk_size(sum(numels), device.multiprocessors)
        chunks = chunk_map(numels, chunk)

        # Coefficient rows first, which change every step, then the tensor table, then the chunk map, which never changes.
        coefficient_words = coefficients.WIDTH * len(table.steps) * kernel.opmath.itemsize // 8
        changing = coefficient_words + len(table.rows)
        changing += changing % 2  # kernels are told that what they are given is aligned to 16 bytes
        with device.current():
            self._memory = device.memory(changing + len(chunks))
            self._streams = {device.stream()}
            if chunks:
                # Through pinned memory of torch's, which is not reused before the copy is made.
                staged = device.pinned(len(chunks))
                staged.copy_(torch.frombuffer(chunks, dtype=torch.int64))
                device.upload(self._memory[changing:], staged)
        address = self._memory.data_ptr()
        self._ring = UploadRing(device, self._memory, changing)
        self._launch: Callable[[int, int], None] | None = None
        self.table_address = address + 8 * coefficient_words
        if chunks:
            self._launch = kernel.launcher(len(chunks), address + 8 * changing, self.table_address, address, chunk)
        self._scalars = b""  # what was uploaded last
        self._rows = b""

    def upload(self, stream: int) -> None:
        """Upload what changed, on the current stream of the device, which must be the current one."""
        if self._launch is None:  # nothing but empty tensors
            return
        if stream not in self._streams:
            self._device.used_by_current_stream(self._memory)
            self._streams.add(stream)
        scalars, rows = array(self._typecode, self._table.scalars).tobytes(), self._table.rows.tobytes()
        if rows != self._rows:
            self._ring.upload(scalars, rows)
        elif scalars != self._scalars:
            self._ring.upload(scalars)
        self._scalars, self._rows = scalars, rows

    def step(self, stream: int, control: int) -> None:
        """Launch, after :meth:`upload`. ``control`` is the address of what gradients are multiplied by, or 0."""
        if self._launch is not None:
            self._launch(stream, control)


class Clipper:
    """Measures all gradients of a device's buckets, and makes the factor that clips them, without a word to the host."""

    def __init__(
        self,
        device: Device,
        tables: Sequence[DeviceTable],
        hosts: Sequence[TensorTable],
        dtypes: Sequence[torch.dtype],
        largest: bool,
    ) -> None:
        self._device, self._largest = device, largest
        numels = [host.numels() for host in hosts]
        chunk = norm_chunk(sum(map(sum, numels)))
        maps = [chunk_map(n, chunk) for n in numels]
        self._count = sum(map(len, maps))
        with device.current():
            self._maps = device.memory(max(self._count, 1))
            self._partials = device.memory(max(self._count, 1), torch.float64)
            self._streams = {device.stream()}
            if self._count:
                staged = device.pinned(self._count)
                staged.copy_(torch.tensor([word for words in maps for word in words], dtype=torch.int64, device="cpu"))
                device.upload(self._maps, staged)
        self._measure, first = [], 0
        for table, words, dtype in zip(tables, maps, dtypes, strict=True):
            if words:
                at, out = self._maps.data_ptr(), self._partials.data_ptr()
                kernel = device.measure_kernel(dtype, largest)
                self._measure.append(kernel.launcher(len(words), at, table.table_address, out, chunk, first))
                first += len(words)
        self._clip: dict[torch.dtype, Callable[[int, int, float], None]] = {}

    def clip(self, stream: int, max_norm: float, opmath: torch.dtype) -> Tensor:
        """A new tensor [factor, norm], written when the stream gets there. The tables must have been uploaded."""
        if opmath not in self._clip:
            kernel = self._device.clip_kernel(self._largest, opmath)
            self._clip[opmath] = kernel.launcher(self._partials.data_ptr(), self._count)
        self._launch_measures(stream)
        control = self._device.memory(2, torch.float64)
        self._clip[opmath](stream, control.data_ptr(), max_norm)
        return control

    def measure(self, stream: int) -> Tensor:
        """The sum of squares, or the largest value, for adding up over devices."""
        self._launch_measures(stream)
        if self._count == 0:
            return torch.zeros((), dtype=torch.float64, device=self._partials.device)
        return self._partials.max() if self._largest else self._partials.sum()

    def _launch_measures(self, stream: int) -> None:
        if stream not in self._streams:
            for memory in (self._maps, self._partials):
                self._device.used_by_current_stream(memory)
            self._streams.add(stream)
        for measure in self._measure:
            measure(stream)


def _chunk_size(elements: int, multiprocessors: int) -> int:
    """How many elements a program steps: a power of two that gives each multiprocessor some programs to choose from, and not
    more programs than a chunk map of a megabyte holds. By estimate, not by measurement."""
    chunk = 1024
    while chunk < 8192 and elements > 2 * chunk * 16 * multiprocessors:
        chunk *= 2
    while elements > chunk << 17:
        chunk *= 2
    return chunk


def is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def device(of: torch.device) -> Device:
    return Device(of)


@functools.cache
def why_unavailable() -> str:
    """Why there is no engine for any CUDA device, or nothing."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}). Install it: pip install 'triton>=3.6'"
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than 3.6. Update torch, which brings its own triton"
    return ""


def triton_version() -> str:
    from ..kernels.launch import version

    return str(version())


Signature = tuple[torch.device, Rule, int, torch.dtype, torch.dtype]
_kernels: dict[Signature, tuple[Any, str]] = {}


def find_kernel(of: torch.device, rule: Rule, flags: int, param: torch.dtype, state: torch.dtype) -> tuple[Kernel | None, str]:
    """The kernel of a bucket on a device, or None and why there is none. Compiles it if need be, once per process."""
    signature = (of, rule, flags, param, state)
    if signature not in _kernels:
        _kernels[signature] = _make_kernel(*signature)
    return _kernels[signature]


def _make_kernel(of: torch.device, rule: Rule, flags: int, param: torch.dtype, state: torch.dtype) -> tuple[Kernel | None, str]:
    if reason := why_unavailable():
        return None, reason
    try:
        return device(of).kernel(rule, flags, param, state), ""
    except Exception as error:  # Triton needs a C compiler, Python's headers, a writable cache, a GPU it knows, ...
        if "out of memory" in str(error).lower():  # says nothing about the next time
            raise
        return None, f"Triton could not compile or load a kernel: {type(error).__name__}: {error}"
