"""Buckets: the entries of a part that one kernel steps (same rule, flags and dtypes), and their rows in a tensor table."""

from __future__ import annotations

import ctypes
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch

from ..parameters.checks import is_count
from ..parameters.entry import Entry
from ..tables import coefficients
from ..tables.tensor_table import COEFFICIENTS, FLAGS, KEY, NUMEL, STEP, WIDTH, RowFlag, Rule, TensorTable

_slot = attrgetter("slot")
_EMPTY_ROW = bytes(8 * WIDTH)
_EXACT_COUNTS = 2.0**24  # up to here a float32 step counter counts every step; there torch's stands still

Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]  # of parameter, gradient and states
# The coefficient row of a group's numbers at a step count, given the bucket's flags.
RowOf = Callable[[Any, int, float], tuple[float, ...]]


class Bucket:
    """Entries that one kernel steps, in the order of their slots, and their rows in a tensor table.

    A row whose parameter has no gradient is inactive: it has no elements and no counter, so that everything passes over it.
    There is one coefficient row per (param group, step count). With ``on_device`` the device computes those, one per tensor:
    it counts the steps, and may have some of the hyperparameters.
    """

    def __init__(self, rule: Rule, flags: int, dtypes: Dtypes, factor: array[float], on_device: bool) -> None:
        self.rule, self.flags, self.dtypes, self.on_device = rule, flags, dtypes, on_device
        self._factor = factor
        self.entries: list[Entry] = []
        self.table = TensorTable()
        self.active = 0  # how many rows are
        self.first_steps: set[Entry] = set()
        self._without_row: dict[int, Entry] = {}  # by slot: what has no row in the table yet
        self.is_rebuilt = True  # rows are where no kernel has seen them yet
        self.is_changed = True  # rows were changed in place
        # By coefficient row.
        self.groups: list[int] = []
        self._members: list[int] = []
        self._are_wide: list[bool] = []  # whether its step counters are float64
        self._rows_by_count: dict[tuple[int, float, bool], int] | None = None

    # Entries that come, go and change. Rows are brought up to date by settle(); the look writes the addresses to them.

    def add(self, entry: Entry) -> None:
        entry.bucket, entry.row = self, -1
        self._without_row[entry.slot] = entry
        self.is_rebuilt = True

    def remove(self, entry: Entry) -> None:
        if entry.row >= 0:
            self.deactivate(entry)
            del self.entries[self._position(entry)]
            self.first_steps.discard(entry)
        else:
            del self._without_row[entry.slot]
        entry.bucket, entry.row = None, -1
        self.is_rebuilt = True

    def replace(self, old: Entry, new: Entry) -> None:
        """An entry of the same slot and signature, made anew."""
        if old.row < 0:
            self.remove(old)
            return self.add(new)
        self.deactivate(old)
        self.first_steps.discard(old)
        self.entries[self._position(old)] = new  # which is not its row while others come and go
        new.bucket, new.row = self, old.row
        old.bucket, old.row = None, -1
        start = WIDTH * new.row
        self.table.rows[start : start + WIDTH] = array("q", _EMPTY_ROW)
        self._begin([new])

    @property
    def is_empty(self) -> bool:
        return not (self.entries or self._without_row)

    def _position(self, entry: Entry) -> int:
        return bisect_left(self.entries, entry.slot, key=_slot)

    def activate(self, entry: Entry) -> None:
        """The entry has a gradient, and is stepped from now on."""
        entry.active = True
        if entry.row < 0:  # settle() does it
            return
        rows, start = self.table.rows, WIDTH * entry.row
        if rows[start + NUMEL] or rows[start + STEP]:
            self.deactivate(entry)
            entry.active = True
        self._activate([entry])

    def _activate(self, entries: Sequence[Entry]) -> None:
        """The rows of these entries become active. The counters of a group are taken to say what its first one says: Part's
        unexpected_counts() finds those that do not."""
        rows, group, k = self.table.rows, -1, 0
        for e in entries:
            start = WIDTH * e.row
            rows[start + NUMEL] = e.numel
            if not self.on_device:
                counter = e.counter
                is_wide = counter is not None and counter.dtype is torch.float64
                if e.group != group:
                    group, count = e.group, 0.0 if counter is None else float(counter)
                    # What is no count is not expected, and then refused by name.
                    k = self._coefficient_row(group, count if is_count(count) else 0.0, is_wide)
                if counter is not None:
                    rows[start + STEP] = counter.data_ptr() | is_wide  # the lowest bit says float64
                rows[start + COEFFICIENTS] = k
                self._members[k] += 1
            if e.first_step:
                rows[start + FLAGS] = int(RowFlag.FIRST_STEP)
                self.first_steps.add(e)
        self.active += len(entries)
        self.is_changed = True

    def deactivate(self, entry: Entry) -> None:
        """The entry has no gradient, or is about to leave."""
        if entry.row >= 0 and entry.active:
            rows, start = self.table.rows, WIDTH * entry.row
            self.first_steps.discard(entry)  # it has made none
            if not self.on_device:
                k = rows[start + COEFFICIENTS]
                self._members[k] -= 1
                if not self._members[k]:
                    self._rows_by_count = None
            rows[start + NUMEL] = rows[start + STEP] = 0
            self.active -= 1
            self.is_changed = True
        entry.active = False

    def recount(self, entry: Entry) -> None:
        """The entry's step counter was set to something else."""
        self.deactivate(entry)
        self.activate(entry)

    def settle(self) -> None:
        """Bring rows up to date."""
        if not self.is_rebuilt:
            return
        old = self.table.rows.tobytes()
        width = len(_EMPTY_ROW)
        new, self._without_row = [*self._without_row.values()], {}
        self.entries = sorted([*self.entries, *new], key=_slot)
        parts = [_EMPTY_ROW if e.row < 0 else old[width * e.row : width * (e.row + 1)] for e in self.entries]
        self.table.set_rows(b"".join(parts))
        for row, e in enumerate(self.entries):
            e.row = row
            if self.on_device:
                self.table.rows[WIDTH * row + COEFFICIENTS] = row
        self._begin(new)

    def _begin(self, entries: Sequence[Entry]) -> None:
        """These entries have an empty row."""
        for e in entries:
            if e.key:
                self.table.rows[WIDTH * e.row + KEY] = e.key - (e.key >> 63 << 64)  # as a signed number
            if self.on_device:
                self.table.rows[WIDTH * e.row + COEFFICIENTS] = e.row
        self._activate([e for e in entries if e.active])

    def _coefficient_row(self, group: int, count: float, is_wide: bool) -> int:
        steps = self.table.steps
        if self._rows_by_count is None:
            self._rows_by_count = {(g, steps[k], self._are_wide[k]): k for k, g in enumerate(self.groups) if self._members[k]}
        k = self._rows_by_count.get((group, count, is_wide), -1)
        if k >= 0:
            return k
        for k, members in enumerate(self._members):
            if not members:
                self.groups[k], self._are_wide[k] = group, is_wide
                break
        else:
            k = len(self.groups)
            self.groups.append(group)
            self._members.append(0)
            self._are_wide.append(is_wide)
            self.table.reserve(k + 1)
        self.table.steps[k] = count
        self._rows_by_count[group, count, is_wide] = k
        return k

    def _next_count(self, k: int) -> float:
        """What the step counters of a coefficient row hold after the coming step."""
        count: float = self.table.steps[k]
        if count < _EXACT_COUNTS or self._are_wide[k]:
            return count + 1
        return ctypes.c_float(count + 1).value

    # Steps.

    def set_coefficients(self, row_of: RowOf, numbers: Sequence[Any]) -> None:
        """Compute the coefficient rows of the coming step."""
        if self.on_device:
            return
        flags, members = self.flags, self._members
        unused = (0.0,) * coefficients.STEP_COUNT
        scalars: list[float] = []
        for k, group in enumerate(self.groups):
            step = self._next_count(k)
            row = row_of(numbers[group], flags, step) if members[k] else unused
            scalars += row
            scalars += unused[len(row) :]
            scalars.append(step % coefficients.RANDOM_STEPS)
        self.table.scalars[: len(scalars)] = array("d", scalars)

    def stepped(self) -> None:
        """A step was made: what the next one expects to find."""
        steps = self.table.steps
        for k in range(len(self.groups)):
            steps[k] = self._next_count(k)
        self._rows_by_count = None
        if self.first_steps:
            for e in self.first_steps:
                self.table.rows[WIDTH * e.row + FLAGS] = 0
                e.first_step = False
            self.first_steps.clear()
            self.is_changed = True

    @property
    def first_slot(self) -> int:
        return next(e.slot for e in self.entries if e.active)

    def active_entries(self) -> list[Entry]:
        return [e for e in self.entries if e.active] if self.active < len(self.entries) else self.entries

    def words(self) -> tuple[int, ...]:
        """What stands for the bucket in a list of buckets."""
        return self.table.bucket_row(self.rule, self.flags, *self.dtypes, self._factor)
