"""The part of a plan that the C++ library steps, all buckets in one call."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor

from ..parameters.entry import Entry
from ..statistics import PartialSums
from ..tables.control import FACTOR, Control, Prologue, on_host
from ..tables.tensor_table import STATISTICS, Flag, Rule, address_of, norm_chunk, statistics_chunk
from .cpu import failure
from .table_part import TablePart


class CpuPart(TablePart):
    """CPU tensors, and the C++ library."""

    on_host = True

    def __init__(self, rule: Rule, ranks: tuple[Any, ...], flags: int) -> None:
        super().__init__(rule, ranks)
        self._statistics = bool(flags & Flag.STATISTICS)
        self._measures = bool(flags & (Flag.STATISTICS | Flag.SCALED))
        # Written by the library: an interrupt comes before a call or after it, and nothing else tells which.
        self._begun = array("q", [0])
        self._begun_at = address_of(self._begun)

    def _resettled(self) -> None:
        if not self._measures:
            return
        entries = [e for bucket in self.buckets for e in bucket.active_entries()]
        elements = sum(e.numel for e in entries)
        self._chunk, self._statistics_chunk = norm_chunk(elements), statistics_chunk(elements)
        if self._statistics:
            chunks = [-(-e.numel // self._statistics_chunk) for e in entries]
            self._partials = torch.zeros(sum(chunks), len(STATISTICS), dtype=torch.float64, device="cpu")
            self.sums = PartialSums([self._partials], chunks, [e.slot for e in entries])

    def _measured(self, largest: bool) -> float:
        assert self._library is not None
        found = array("d", [0.0])
        if status := self._library.measure_grads(self._address, self._count, self._chunk, largest, address_of(found)):
            raise failure(status)
        return found[0]

    def measure(self, largest: bool) -> list[Tensor]:
        return [torch.tensor(self._measured(largest), dtype=torch.float64, device="cpu")]

    def control(self, prologue: Prologue, dtype: torch.dtype) -> Tensor | Control:
        return on_host(self._measured(prologue.largest) if prologue.measures else 0.0, prologue, dtype)

    def use(self, control: Tensor | Control) -> None:
        self._factor[0] = float(control[FACTOR])

    def has_changed(self, entry: Entry, key: str) -> bool:
        return bool(self._begun[0])

    def begin(self) -> None:
        self._begun[0] = 0

    def _step(self) -> bool:
        assert self._library is not None  # else plain PyTorch steps CPU tensors
        if self._statistics:
            self._step_measured(skip=False)
        elif status := self._library.step(self._address, self._count, self._begun_at):
            raise failure(status)
        return True

    def _step_measured(self, skip: bool) -> None:
        assert self._library is not None
        partials = self._partials.data_ptr()
        if status := self._library.step_measured(
            self._address, self._count, self._statistics_chunk, skip, partials, self._begun_at
        ):
            raise failure(status)

    def measure_skipped(self) -> None:
        self._step_measured(skip=True)
