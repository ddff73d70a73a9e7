"""The part of a plan that Triton kernels step on one CUDA device, one launch per bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..parameters.entry import Entry
from ..statistics import PartialSums
from ..tables import coefficients
from ..tables.control import Control, Prologue
from ..tables.tensor_table import Flag, Rule
from . import cpu, cuda
from .bucket import Bucket, RowOf
from .device_tables import DeviceTable, Measurer, Numbers, Rows
from .table_part import TablePart


class CudaPart(TablePart):
    """CUDA tensors, and Triton kernels."""

    def __init__(self, rule: Rule, ranks: tuple[Any, ...], flags: int, device: torch.device, on_device: bool) -> None:
        super().__init__(rule, ranks, on_device)
        self._of = device
        self._device = cuda.device(device)
        self._statistics, self._scaled = bool(flags & Flag.STATISTICS), bool(flags & Flag.SCALED)
        self._tables: dict[Bucket, DeviceTable] = {}
        self._static_rows: dict[Bucket, bytes] = {}
        self._numbers: dict[Bucket, Numbers] = {}
        self._measurer: Measurer | None = None
        self._prepared: tuple[bool, bool, torch.dtype] | None = None
        self._control: Tensor | None = None
        self._is_uploaded = False
        self._begun: list[Bucket] = []  # what the step under way has launched
        self._in_graphs: set[DeviceTable] = set()  # tables that CUDA graphs read stay as they are

    def moved(self, entry: Entry) -> None:
        super().moved(entry)
        self._is_changed = True

    def _resettled(self) -> None:
        tables = {}
        for bucket in self.buckets:
            table = self._tables.get(bucket)
            stays = table is not None and not bucket.is_rebuilt and table.coefficient_rows == len(bucket.table.steps)
            if not stays or (bucket.is_changed and (self._on_device or table in self._in_graphs)):
                table = self._make_table(bucket)
            assert table is not None
            tables[bucket] = table
            bucket.is_changed |= bucket.is_rebuilt
        self._tables = tables
        self._in_graphs.intersection_update(tables.values())
        self._static_rows = {b: rows for b, rows in self._static_rows.items() if b in tables}
        self._is_uploaded = False
        if self._scaled:
            dtypes = [bucket.dtypes[1] for bucket in self.buckets]  # of gradients
            self._measurer = Measurer(self._device, list(tables.values()), [b.table for b in self.buckets], dtypes)
            if self._prepared is not None:
                self._measurer.prepare(*self._prepared)
        if self._statistics:
            chunks = [n for table in tables.values() for n in table.chunks_of]
            order = [e.slot if e.active else None for bucket in self.buckets for e in bucket.entries]
            partials = [table.partials for table in tables.values()]
            with self._device.current():
                self.sums = PartialSums(partials, chunks, order, self._device.sent, self._device.used_by_current_stream)

    def _make_table(self, bucket: Bucket) -> DeviceTable:
        kernel, reason = cuda.find_kernel(self._of, self._rule, bucket.flags, *bucket.dtypes)
        assert kernel is not None, reason  # else plain PyTorch steps these tensors
        rows = None
        if self._on_device:
            position = {group: i for i, group in enumerate(self._groups_of(bucket))}
            counters = [0 if e.counter is None or not e.active else e.counter.data_ptr() for e in bucket.entries]
            rows = Rows([position[e.group] for e in bucket.entries], counters)
        numels = [e.numel for e in bucket.entries]
        return DeviceTable(self._device, kernel, bucket.table, numels, self._rule, bucket.flags, rows)

    @staticmethod
    def _groups_of(bucket: Bucket) -> list[int]:
        return sorted({e.group for e in bucket.entries})

    def prepare_to_measure(self, largest: bool, measures: bool, dtype: torch.dtype) -> None:
        """Compile what precedes a step, which cannot be done while a stream is captured."""
        if self._prepared != (largest, measures, dtype):
            self._prepared = largest, measures, dtype
            assert self._measurer is not None
            self._measurer.prepare(largest, measures, dtype)

    def prepare(self, row_of: RowOf, numbers: Sequence[Any], sources: Sequence[Sequence[int]]) -> None:
        super().prepare(row_of, numbers, sources)
        self._numbers = {
            bucket: [(_padded(numbers[g]), _padded(sources[g])) for g in self._groups_of(bucket)] if self._on_device else []
            for bucket in self.buckets
        }

    def take_gradients(self) -> None:
        self._is_uploaded = False
        super().take_gradients()

    def launch(self) -> None:
        had_first_steps = any(bucket.first_steps for bucket in self.buckets)
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
            for bucket, table in self._tables.items():
                if bucket.is_changed:
                    self._static_rows[bucket] = bucket.table.static_rows()
                    bucket.is_changed = False
                table.upload(stream, self._numbers[bucket], self._static_rows[bucket])
            self._is_uploaded = True
        return stream

    def measure(self, largest: bool) -> list[Tensor]:
        assert self._measurer is not None
        with self._device.current():
            return [self._measurer.measure(self._upload(), largest)]

    def control(self, prologue: Prologue, dtype: torch.dtype) -> Tensor | Control:
        assert self._measurer is not None
        with self._device.current():
            return self._measurer.control(self._upload(), prologue, dtype)

    def read(self, control: Tensor) -> Control:
        """The control as numbers. Waits for the device."""
        return Control(*self._device.read(control))

    def use(self, control: Tensor | Control) -> None:
        if not isinstance(control, Tensor):
            control = torch.tensor(control, dtype=torch.float64, device="cpu")
        self._control = control.to(self._params[0].device, non_blocking=True)

    def _launch_tables(self) -> None:
        control = 0 if self._control is None else self._control.data_ptr()
        with self._device.current():
            stream = self._upload()
            for bucket, table in self._tables.items():
                self._begun.append(bucket)
                table.step(stream, control)
        self._control = None

    def has_changed(self, entry: Entry, key: str) -> bool:
        return entry.bucket in self._begun

    def _step(self) -> bool:
        is_recorded = self._device.is_capturing()
        try:
            self._launch_tables()
        finally:  # whatever ends this: what was launched is counted
            if not is_recorded:
                self._count_steps()
        return not is_recorded

    def _count_steps(self) -> None:
        if self._library is not None:
            if status := self._library.count(self._address, len(self._begun)):  # buckets are launched in their order
                raise cpu.failure(status)
        elif not self._on_device:
            counters = [e.counter for bucket in self._begun for e in bucket.active_entries() if e.counter is not None]
            if counters:
                torch._foreach_add_(counters, 1.0)

    def release(self) -> None:
        super().release()
        self._control = None
        self._begun = []

    def captured(self) -> list[Any] | None:
        if not self._device.is_capturing():
            return None
        self._in_graphs.update(self._tables.values())
        return [dict(self._tables), self._measurer, self.entries()]


def _padded(values: Sequence[Any]) -> list[Any]:
    return [*values, *[0] * (coefficients.NUMBERS - len(values))]
