"""What the CUDA engine keeps in device memory, and the launches that read it.

A step uploads what changed in one asynchronous copy and launches one kernel per bucket, all on the device's current stream.
The host never waits for the device. While a stream is being captured into a CUDA graph nothing is copied from the host: what a
copy would bring travels as the arguments of a kernel, into memory of the graph's own.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..tables import coefficients
from ..tables.control import Control, Prologue
from ..tables.tensor_table import GRAD, STATISTICS, WIDTH, Flag, Rule, TensorTable, chunk_map, norm_chunk
from .cuda import Device, Kernel, UploadRing, compiled

ROWS = 128  # coefficient rows that one program computes
# How many words one launch carries as its arguments: almost the 4 KB that every driver takes. A kernel of so many takes seconds
# to compile, so what a few launches of the smaller one can do is left to that.
WORDS, FEW_WORDS = 480, 120


class Rows(NamedTuple):
    """For a bucket whose coefficient rows are computed on the device: which of the bucket's groups each tensor is in, and the
    address of its step counter, or 0."""

    groups: Sequence[int]
    counters: Sequence[int]


# The hyperparameters of a bucket's groups: values, and where they are on the device instead (see kernels/coefficients.py).
Numbers = Sequence[tuple[Sequence[float], Sequence[int]]]


class Sections(NamedTuple):
    """Where the sections of a bucket's memory begin, in bytes. What changes comes first, and what changes most often first of
    all; from ``groups`` to ``rows`` they are empty where the host computes the coefficient rows."""

    head: int  # coefficient rows of the host's, or hyperparameters and their sources
    grads: int  # the gradients' addresses
    table: int
    groups: int
    counters: int
    rows: int  # coefficient rows of the device's
    chunk_map: int
    end: int


class DeviceTable:
    """A bucket's tables on the device, and the kernel that steps it. With ``rows``, coefficient rows are computed there, one
    per tensor; otherwise the host uploads its own, one per (param group, step count).

    ``numels`` are the tensors' sizes, whether they have a gradient or not: the programs of one that has none find no elements
    in its row, so that gradients may come and go.
    """

    def __init__(
        self,
        device: Device,
        kernel: Kernel,
        table: TensorTable,
        numels: Sequence[int],
        rule: Rule,
        flags: int,
        rows: Rows | None = None,
    ) -> None:
        self._device, self._table = device, table
        self.coefficient_rows = len(table.steps)
        self._typecode = "d" if kernel.opmath is torch.float64 else "f"
        self._groups = 0 if rows is None else max(rows.groups) + 1
        chunk = _chunk_size(sum(numels), device.multiprocessors, kernel.chunk)
        chunks = chunk_map(numels, chunk)
        self.chunks_of = [-(-n // chunk) for n in numels]
        with device.current():
            self._streams = {device.stream()}
            self._at = at = self._place(kernel.opmath.itemsize, chunks, rows)
            # What a step with statistics leaves of each chunk. Of their own memory: they are looked at when this table is gone.
            measured = len(chunks) if flags & Flag.STATISTICS else 0
            self.partials = device.memory(measured * len(STATISTICS), torch.float64).view(-1, len(STATISTICS))
        self.table_address = at.table
        self._head, self._grads = at.head, at.grads  # of the coming step
        self._sent: list[bytes] = [b"", b"", b""]
        self._captured: list[Tensor] = []
        self._launch: Callable[[int, int, int, int], None] | None = None
        if chunks:
            self._launch = kernel.launcher(len(chunks), at.chunk_map, at.table, chunk, self.partials.data_ptr())
        self._compute: Callable[[int, int, int, int], None] | None = None
        if rows is not None:
            compute = compiled(device, "coefficients", rule, flags, kernel.opmath, ROWS)
            self._compute = compute.launcher(-(-table.count // ROWS), at.groups, at.counters, at.rows, table.count)
        # For a capture, within which nothing can be compiled. Adam with steps counted on the host cannot be captured.
        self._write: Callable[[int, int, int, tuple[int, ...]], None] | None = None
        self._words = words_of_a_launch(at.grads - at.head, table.count)
        if rows is not None or rule is Rule.SGD:
            self._write = compiled(device, "write", self._words).launcher(1)

    def _place(self, itemsize: int, chunks: array[int], rows: Rows | None) -> Sections:
        """Make the memory and write what does not change. Returns addresses."""
        table, row_bytes = self._table, coefficients.WIDTH * itemsize
        if rows is None:
            head = row_bytes * len(table.steps)
            fixed = [b"", b"", b""]
        else:
            head = 16 * coefficients.NUMBERS * self._groups
            fixed = [array("q", rows.groups).tobytes(), array("q", rows.counters).tobytes(), bytes(row_bytes * table.count)]
        fixed = [_filled(part) for part in (*fixed, chunks.tobytes())]
        changing = [_padded(size) for size in (head, 8 * table.count, 8 * len(table.rows))]
        offsets = Sections(*accumulate((*changing, *map(len, fixed)), initial=0))
        self._memory = self._device.memory(offsets.end // 8)
        self._ring = UploadRing(self._device, self._memory, offsets.groups // 8)
        self._device.send(self._memory[offsets.groups // 8 :], array("q", b"".join(fixed)))
        address = self._memory.data_ptr()
        return Sections(*(address + offset for offset in offsets))

    def upload(self, stream: int, numbers: Numbers, static_rows: bytes) -> None:
        """Make what changed known to the device, on its current stream; the device must be the current one."""
        if self._launch is None and self._compute is None:  # nothing but empty tensors
            return
        if stream not in self._streams:
            for memory in (self._memory, self.partials):
                if memory.numel():
                    self._device.used_by_current_stream(memory)
            self._streams.add(stream)
        if self._compute is not None:
            head = b"".join(array("d", values).tobytes() for values, _ in numbers)
            head += b"".join(array("q", sources).tobytes() for _, sources in numbers)
        else:
            head = array(self._typecode, self._table.scalars).tobytes()
        grads = self._table.rows[GRAD::WIDTH].tobytes()
        if self._device.is_capturing():
            self._upload_captured(stream, _filled(head), grads)
            return
        self._head, self._grads = self._at.head, self._at.grads
        parts = [_filled(head), _filled(grads), _filled(static_rows)]
        for last in (2, 1, 0):
            if parts[last] != self._sent[last]:
                self._ring.upload(*parts[: last + 1])
                break
        self._sent = parts

    def _upload_captured(self, stream: int, head: bytes, grads: bytes) -> None:
        assert self._write is not None  # else the capture was refused
        words = array("q", head + _filled(grads))
        memory = self._device.memory(len(words))
        self._captured.append(memory)
        for begin in range(0, len(words), self._words):
            part = words[begin : begin + self._words]
            self._write(stream, memory.data_ptr() + 8 * begin, len(part), (*part, *[0] * (self._words - len(part))))
        self._head, self._grads = memory.data_ptr(), memory.data_ptr() + len(head)

    @property
    def grads_address(self) -> int:
        return self._grads

    def step(self, stream: int, control: int) -> None:
        """Launch, after :meth:`upload`. ``control`` is the address of a control, or 0."""
        coefficients_at = self._head
        if self._compute is not None:
            sources = self._head + 8 * coefficients.NUMBERS * self._groups
            self._compute(stream, self._head, sources, control)
            coefficients_at = self._at.rows
        if self._launch is not None:
            self._launch(stream, self._grads, coefficients_at, control)


class Measurer:
    """Measures all gradients of a device's buckets, and decides about the step on the device: the host does not wait."""

    def __init__(
        self, device: Device, tables: Sequence[DeviceTable], hosts: Sequence[TensorTable], dtypes: Sequence[torch.dtype]
    ) -> None:
        self._device, self._tables, self._dtypes = device, tables, dtypes
        numels = [host.numels() for host in hosts]
        self._chunk = norm_chunk(sum(map(sum, numels)))
        self._chunk_maps = [chunk_map(n, self._chunk) for n in numels]
        self._count = sum(map(len, self._chunk_maps))
        with device.current():
            self._maps = device.memory(max(self._count, 1))
            self._partials = device.memory(max(self._count, 1), torch.float64)
            self._streams = {device.stream()}
            device.send(self._maps, array("q", [word for words in self._chunk_maps for word in words]))
        self._measures: dict[bool, list[tuple[DeviceTable, Callable[[int, int], None]]]] = {}
        self._controls: dict[tuple[bool, torch.dtype], Callable[[int, int, int, int, int, int, float], None]] = {}

    def prepare(self, largest: bool, measures: bool, dtype: torch.dtype) -> None:
        """Compile and load what :meth:`control` will launch."""
        if measures and largest not in self._measures:
            self._measures[largest], first = [], 0
            for table, words, of in zip(self._tables, self._chunk_maps, self._dtypes, strict=True):
                if words:
                    kernel = compiled(self._device, "measure", of, largest)
                    at, out = self._maps.data_ptr(), self._partials.data_ptr()
                    launch = kernel.launcher(len(words), at, table.table_address, out, self._chunk, first)
                    self._measures[largest].append((table, launch))
                    first += len(words)
        if (largest, dtype) not in self._controls:
            kernel = compiled(self._device, "control", largest, dtype)
            self._controls[largest, dtype] = kernel.launcher(1, self._partials.data_ptr())

    def control(self, stream: int, prologue: Prologue, dtype: torch.dtype) -> Tensor:
        """A new control, written when the stream gets there. The tables must have been uploaded."""
        measures = prologue.measures
        self.prepare(prologue.largest, measures, dtype)
        if measures:
            self._measure(stream, prologue.largest)
        control = self._device.memory(len(Control._fields), torch.float64)
        given = [self._scalar(t) for t in (prologue.grad_scale, prologue.found_inf)]
        scale, found_inf = (0 if t is None else t.data_ptr() for t in given)
        count = self._count if measures else 0
        launch = self._controls[prologue.largest, dtype]
        launch(stream, control.data_ptr(), scale, found_inf, count, int(prologue.skips_nonfinite), prologue.max_norm)
        return control

    def _scalar(self, given: Tensor | None) -> Tensor | None:
        return None if given is None else self._device.scalar(given)

    def measure(self, stream: int, largest: bool) -> Tensor:
        """The sum of squares, or the largest value, for adding up over devices."""
        self.prepare(largest, True, torch.float32)
        self._measure(stream, largest)
        if self._count == 0:
            return torch.zeros((), dtype=torch.float64, device=self._partials.device)
        return self._partials.max() if largest else self._partials.sum()

    def _measure(self, stream: int, largest: bool) -> None:
        if stream not in self._streams:
            for memory in (self._maps, self._partials):
                self._device.used_by_current_stream(memory)
            self._streams.add(stream)
        for table, launch in self._measures[largest]:
            launch(stream, table.grads_address)


def words_of_a_launch(head: int, tensors: int) -> int:
    """How many words a launch carries when a capture writes ``head`` bytes and an address for each tensor."""
    return WORDS if head // 8 + tensors > 4 * FEW_WORDS else FEW_WORDS


def _chunk_size(elements: int, multiprocessors: int, most: int) -> int:
    """How many elements a program steps: a power of two that gives each multiprocessor some programs to choose from, and not
    more than ``most`` unless the chunk map would have more than four megabytes."""
    chunk = 1024
    while chunk < most and elements > 2 * chunk * 16 * multiprocessors:
        chunk *= 2
    while elements > chunk << 19:
        chunk *= 2
    return chunk


def _padded(size: int) -> int:
    """Kernels are told that what they are given is aligned to 16 bytes."""
    return -(-size // 16) * 16


def _filled(part: bytes) -> bytes:
    return part + bytes(_padded(len(part)) - len(part))
