"""Buckets: the tensors of a step that share an update rule with its flags and a dtype signature; and parts: the buckets of one
device, which are refreshed and launched together.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..engines import cpu, cuda
from ..parameters.entry import Entry, needs_copy
from ..statistics import Record
from ..tables import coefficients
from ..tables.control import FACTOR, Clipping, Control, Prologue, on_host
from ..tables.tensor_table import (
    COEFFICIENTS,
    GRAD,
    NUMEL,
    STATISTICS,
    STEP,
    WIDTH,
    Flag,
    RowFlag,
    Rule,
    TensorTable,
    address_of,
    norm_chunk,
    statistics_chunk,
)
from .device_tables import DeviceTable, Measurer, Rows
from .watch import Watch, gradient_guard, make_watch

_data_ptr = Tensor.data_ptr


class Bucket:
    """Entries that one kernel steps, and their coefficient rows, one per (param group, step count). With ``on_device`` the
    device computes those, one per entry: it counts the steps, and may have some of the hyperparameters."""

    def __init__(self, rule: Rule, entries: list[Entry], factor: array[float], on_device: bool = False) -> None:
        self.flags = entries[0].flags
        self.dtypes = entries[0].local.dtype, entries[0].grad.dtype, entries[0].state_dtype
        self.has_first_steps = any(e.first_step for e in entries)
        self.on_device: Rows | None = None
        if on_device:
            position = {group: i for i, group in enumerate(sorted({e.group for e in entries}))}
            self.groups = list(position)
            counters = [0 if e.counter is None else e.counter.data_ptr() for e in entries]
            self.on_device = Rows([position[e.group] for e in entries], counters)
        numbers: dict[tuple[int, float], int] = {}
        rows = []
        for i, e in enumerate(entries):
            counter = None if on_device else e.counter
            key = (i if on_device else e.group, 0.0 if counter is None else float(counter))
            states = [t.data_ptr() for t in e.states]
            kept = e.kept
            rows.append(
                (
                    e.local.data_ptr(),
                    0,  # the gradient: set each step
                    *states,
                    *[0] * (3 - len(states)),
                    0 if counter is None else counter.data_ptr(),
                    e.local.numel(),
                    numbers.setdefault(key, len(numbers)),
                    int(RowFlag.FIRST_STEP) if e.first_step else 0,
                    0 if kept is None else kept.data_ptr(),
                    e.key - (e.key >> 63 << 64),  # as a signed number
                )
            )
        if on_device:
            self.table = TensorTable(rows, 0)
        else:
            self.groups = [group for group, _ in numbers]
            self.table = TensorTable(rows, len(numbers))
            self.table.steps[:] = array("d", [step for _, step in numbers])
        self.row = self.table.bucket_row(rule, self.flags, *self.dtypes, factor)

    def set_coefficients(self, row_of: Callable[..., tuple[float, ...]], numbers: Sequence[tuple[float, ...]]) -> None:
        """Compute the coefficient rows of the coming step."""
        if self.on_device is not None:
            return
        scalars, steps = self.table.scalars, self.table.steps
        for i, group in enumerate(self.groups):
            row = row_of(numbers[group], self.flags, steps[i] + 1)
            start = coefficients.WIDTH * i
            scalars[start : start + len(row)] = array("d", row)
            scalars[start + coefficients.STEP_COUNT] = steps[i] + 1

    def stepped(self) -> None:
        """A step was made: what the next one expects to find."""
        steps = self.table.steps
        for i in range(len(steps)):
            steps[i] += 1
        if self.has_first_steps:
            self.table.clear_first_steps()
            self.has_first_steps = False


class Part:
    """The entries of a plan that one device steps, with an engine of ours. Where something is measured, ``ranks`` are those of
    each entry."""

    record: Record | None = None  # with statistics

    def __init__(self, rule: Rule, entries: list[Entry], on_device: bool = False) -> None:
        self._library = cpu.library()
        by_signature: dict[tuple[Any, ...], list[int]] = {}
        for i, e in enumerate(entries):
            by_signature.setdefault((e.flags, e.local.dtype, e.grad.dtype, e.state_dtype), []).append(i)
        self._factor = array("d", [1.0])  # what gradients are multiplied by where a bucket is SCALED
        self.buckets = [Bucket(rule, [entries[i] for i in at], self._factor, on_device) for at in by_signature.values()]
        # Which gradients belong to which bucket, in the order of its rows; not needed where there is one bucket.
        self._positions = list(by_signature.values()) if len(self.buckets) > 1 else []
        self._order = [i for at in by_signature.values() for i in at]
        self._bucket_rows = array("q", [value for b in self.buckets for value in b.row])
        self._address, self._count = address_of(self._bucket_rows), len(self.buckets)

        self.ranks = entries[0].ranks
        self._params = [e.param for e in entries]
        self._locals = [e.local for e in entries]
        grads = [e.grad for e in entries]
        self._copied = [i for i, (p, g) in enumerate(zip(self._locals, grads, strict=True)) if needs_copy(p, g)]
        self._guard = gradient_guard(grads)
        tensors = [t for e in entries for t in (e.local, *e.states, e.kept) if t is not None]
        self._counters = [e.counter for e in entries if e.counter is not None]
        self._watch: Watch = make_watch(self._library, tensors, self._counters)
        self._grads: Sequence[Tensor] = ()  # alive until the step is done, whatever other threads do
        self._copies: list[Tensor] = []

    def refresh(self, grads: Sequence[Tensor]) -> bool:
        """Take this step's gradients. False if they or any other tensor are not what the tables were made for."""
        self._grads = grads
        try:
            addresses = array("q", list(map(_data_ptr, grads)))  # from an iterator it would grow step by step
        except (TypeError, RuntimeError):  # None: a gradient that was there is gone. Or one without memory, a sparse one.
            return False
        if not self._guard(grads):
            return False
        if self._copied:
            with torch.no_grad():
                self._copies = [torch.empty_like(self._locals[i], dtype=grads[i].dtype).copy_(grads[i]) for i in self._copied]
            for i, copy in zip(self._copied, self._copies, strict=True):
                addresses[i] = copy.data_ptr()
        if not self._positions:
            self.buckets[0].table.set_grads(addresses)
        for bucket, positions in zip(self.buckets, self._positions, strict=False):
            bucket.table.set_grads(array("q", [addresses[i] for i in positions]))
        return self._watch.holds() and self._rows_hold()

    def _rows_hold(self) -> bool:
        """Whether all tensors have memory, and step counters stand where the coefficients were computed for."""
        if self._library is not None:
            return bool(self._library.check(self._address, self._count) == 0)
        counters = iter(self._counters)
        for bucket in self.buckets:
            rows, steps = bucket.table.rows, bucket.table.steps
            for row in range(0, len(rows), WIDTH):
                if rows[row + NUMEL] and not rows[row + GRAD]:
                    return False
                if rows[row + STEP] and float(next(counters)) != steps[rows[row + COEFFICIENTS]]:
                    return False
        return True

    def set_numbers(self, numbers: Sequence[tuple[float, ...]], sources: Sequence[Sequence[int]]) -> None:
        """The hyperparameters of all groups and their addresses, where the device computes coefficients."""

    def measure(self, largest: bool) -> Tensor:
        """The sum of squares of all gradients, or the largest absolute value: 0-dim, float64, on the part's device."""
        raise NotImplementedError

    def control(self, prologue: Prologue, dtype: torch.dtype) -> Tensor | Control:
        """What is decided about the step where there is no other part. ``dtype``: the norm's."""
        raise NotImplementedError

    def use(self, control: Tensor | Control) -> None:
        """Do the coming step as ``control`` says. A part on the host is not launched if that is not at all."""
        raise NotImplementedError

    def measure_skipped(self) -> None:
        """Make the statistics of a step that is left out."""
        raise NotImplementedError

    def launch(self) -> None:
        """Step all entries, on the gradients of the last :meth:`refresh`."""
        if self._step():
            for bucket in self.buckets:
                bucket.stepped()
        increment_version(self._params)  # autograd then sees the write, as after torch's own step
        self._grads, self._copies = (), []

    def _step(self) -> bool:
        """False if the step was not made but recorded."""
        raise NotImplementedError


class CpuPart(Part):
    """Stepped by the C++ library, all buckets in one call."""

    def __init__(self, rule: Rule, entries: list[Entry]) -> None:
        super().__init__(rule, entries)
        elements = sum(e.local.numel() for e in entries)
        self._chunk, self._statistics_chunk = norm_chunk(elements), statistics_chunk(elements)
        self._statistics = bool(entries[0].flags & Flag.STATISTICS)
        if self._statistics:
            chunks = [-(-n // self._statistics_chunk) for b in self.buckets for n in b.table.numels()]
            self._partials = torch.zeros(sum(chunks), len(STATISTICS), dtype=torch.float64, device="cpu")
            self.record = Record([self._partials], chunks, self._order)

    def _measured(self, largest: bool) -> float:
        assert self._library is not None
        return float(self._library.measure_grads(self._address, self._count, self._chunk, largest))

    def measure(self, largest: bool) -> Tensor:
        return torch.tensor(self._measured(largest), dtype=torch.float64, device="cpu")

    def control(self, prologue: Prologue, dtype: torch.dtype) -> Tensor | Control:
        return on_host(self._measured(prologue.largest) if prologue.clipping else 0.0, prologue, dtype)

    def use(self, control: Tensor | Control) -> None:
        self._factor[0] = float(control[FACTOR])

    def _step(self) -> bool:
        assert self._library is not None  # else plain PyTorch steps CPU tensors
        if self._statistics:
            self._step_measured(skip=False)
        else:
            self._library.step(self._address, self._count)
        return True

    def _step_measured(self, skip: bool) -> None:
        assert self._library is not None
        self._library.step_measured(self._address, self._count, self._statistics_chunk, skip, self._partials.data_ptr())

    def measure_skipped(self) -> None:
        self._step_measured(skip=True)


class CudaPart(Part):
    """Stepped by Triton kernels, one launch per bucket."""

    def __init__(self, rule: Rule, entries: list[Entry], device: torch.device, on_device: bool) -> None:
        super().__init__(rule, entries, on_device)
        self._device = cuda.device(device)
        self._tables = []
        for bucket in self.buckets:
            kernel, reason = cuda.find_kernel(device, rule, bucket.flags, *bucket.dtypes)
            assert kernel is not None, reason  # else plain PyTorch steps these tensors
            self._tables.append(DeviceTable(self._device, kernel, bucket.table, rule, bucket.flags, bucket.on_device))
        self._numbers: list[list[tuple[Sequence[float], Sequence[int]]]] = [[] for _ in self.buckets]
        self._measurer: Measurer | None = None
        self._control: Tensor | None = None
        self._is_uploaded = False
        if entries[0].flags & Flag.STATISTICS:
            chunks = [n for table in self._tables for n in table.chunks_of]
            self.record = Record([table.partials for table in self._tables], chunks, self._order)

    def prepare(self, clipping: Clipping | None, dtype: torch.dtype) -> None:
        """Compile what precedes a step, which cannot be done while a stream is captured."""
        dtypes = [bucket.dtypes[1] for bucket in self.buckets]  # of gradients
        self._measurer = Measurer(self._device, self._tables, [b.table for b in self.buckets], dtypes)
        self._measurer.prepare(clipping is not None and clipping.largest, clipping is not None, dtype)

    def refresh(self, grads: Sequence[Tensor]) -> bool:
        self._is_uploaded = False
        return super().refresh(grads)

    def set_numbers(self, numbers: Sequence[tuple[float, ...]], sources: Sequence[Sequence[int]]) -> None:
        for i, bucket in enumerate(self.buckets):
            self._numbers[i] = [(_row(numbers[g]), _row(sources[g])) for g in bucket.groups if bucket.on_device is not None]

    def launch(self) -> None:
        had_first_steps = any(bucket.has_first_steps for bucket in self.buckets)
        super().launch()
        if had_first_steps:  # now, because the next step may be captured, and a capture uploads no table
            self._is_uploaded = False
            with self._device.current():
                self._upload()

    def measure_skipped(self) -> None:
        self._launch_tables()  # the control says that nothing is to be changed

    def _upload(self) -> int:
        stream = self._device.stream()
        if not self._is_uploaded:
            for table, numbers in zip(self._tables, self._numbers, strict=True):
                table.upload(stream, numbers)
            self._is_uploaded = True
        return stream

    def measure(self, largest: bool) -> Tensor:
        assert self._measurer is not None
        with self._device.current():
            return self._measurer.measure(self._upload(), largest)

    def control(self, prologue: Prologue, dtype: torch.dtype) -> Tensor | Control:
        assert self._measurer is not None
        with self._device.current():
            return self._measurer.control(self._upload(), prologue, dtype)

    def read(self, control: Tensor) -> Control:
        """Waits for the device."""
        return Control(*self._device.read(control))

    def use(self, control: Tensor | Control) -> None:
        if not isinstance(control, Tensor):
            control = torch.tensor(control, dtype=torch.float64, device="cpu")
        self._control = control.to(self._locals[0].device, non_blocking=True)

    def _launch_tables(self) -> None:
        control = 0 if self._control is None else self._control.data_ptr()
        with self._device.current():
            stream = self._upload()
            for table in self._tables:
                table.step(stream, control)
        self._control = None

    def _step(self) -> bool:
        self._launch_tables()
        if self._device.is_capturing():
            return False
        if self._library is not None:
            self._library.count(self._address, self._count)
        elif self._counters and self.buckets[0].on_device is None:
            torch._foreach_add_(self._counters, 1.0)
        return True


def _row(values: Sequence[Any]) -> list[Any]:
    return [*values, *[0] * (coefficients.NUMBERS - len(values))]


def make_part(device: torch.device, rule: Rule, entries: list[Entry], on_device: bool) -> Part:
    """The part of a plan on this device."""
    return CpuPart(rule, entries) if device.type == "cpu" else CudaPart(rule, entries, device, on_device)
