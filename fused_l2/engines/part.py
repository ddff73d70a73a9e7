"""Parts: one engine's share of a step. A part steps the entries of one place (a device, and the ranks that share them where
something is measured), in *buckets* of entries that one kernel steps: same update rule, flags and dtypes."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..parameters.checks import is_count
from ..parameters.entry import Entry
from ..statistics import Record
from ..tables import coefficients
from ..tables.control import Control, Prologue
from ..tables.tensor_table import (
    COEFFICIENTS,
    FLAGS,
    GRAD,
    KEY,
    NUMEL,
    STEP,
    WIDTH,
    RowFlag,
    Rule,
    TensorTable,
    address_of,
)
from . import cpu

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
        self._new: dict[int, Entry] = {}  # by slot: what has no row in the table yet
        self.is_rebuilt = True  # rows are where no kernel has seen them yet
        self.is_changed = True  # rows were changed in place
        # By coefficient row.
        self.groups: list[int] = []
        self._members: list[int] = []
        self._are_wide: list[bool] = []  # whether its step counters are float64
        self._known: dict[tuple[int, float, bool], int] | None = None

    # Entries that come, go and change. Rows are brought up to date by settle(); the look writes the addresses to them.

    def add(self, entry: Entry) -> None:
        entry.bucket, entry.row = self, -1
        self._new[entry.slot] = entry
        self.is_rebuilt = True

    def remove(self, entry: Entry) -> None:
        if entry.row >= 0:
            self.deactivate(entry)
            del self.entries[self._position(entry)]
            self.first_steps.discard(entry)
        else:
            del self._new[entry.slot]
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
        return not (self.entries or self._new)

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
        unexpected() finds those that do not."""
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
                    self._known = None
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
        new, self._new = [*self._new.values()], {}
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
        if self._known is None:
            self._known = {(g, steps[k], self._are_wide[k]): k for k, g in enumerate(self.groups) if self._members[k]}
        k = self._known.get((group, count, is_wide), -1)
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
        self._known[group, count, is_wide] = k
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
        self._known = None
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


class Part(ABC):
    """One engine's share of a plan. It is changed with add() to deactivate(), brought up to date with settle(), and then steps
    its active entries, on the gradients whose addresses stand in its rows."""

    buckets: Sequence[Bucket] = ()  # those with active rows, in the order of their first one
    record: Record | None = None  # with statistics
    on_host = False  # whether the host has to know if a step is made

    def __init__(self, ranks: tuple[Any, ...] = ()) -> None:
        self.ranks = ranks

    @abstractmethod
    def add(self, entry: Entry) -> None:
        """Step this entry, too."""

    @abstractmethod
    def remove(self, entry: Entry) -> None:
        """Step it no longer."""

    @abstractmethod
    def replace(self, old: Entry, new: Entry) -> None:
        """Step an entry of the same slot instead of one."""

    @abstractmethod
    def activate(self, entry: Entry) -> None:
        """It has a gradient."""

    @abstractmethod
    def deactivate(self, entry: Entry) -> None:
        """It has none."""

    def moved(self, entry: Entry) -> None:  # noqa: B027
        """The watch has written new addresses to the entry's row."""

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """Whether it has no entries, active or not."""

    @property
    @abstractmethod
    def first_slot(self) -> int:
        """The slot of its first active entry; -1 if there is none."""

    @abstractmethod
    def entries(self) -> list[Entry]:
        """The active entries, in the order in which they are measured."""

    @abstractmethod
    def settle(self) -> bool:
        """Bring tables up to date after changes. Whether rows are in another place."""

    def take_gradients(self) -> None:  # noqa: B027
        """Make copies of gradients that lie in another order than their parameter."""

    def unexpected(self) -> list[Entry]:
        """Active entries whose step counter is not what the coefficients are computed for."""
        return []

    def recount(self, entry: Entry) -> None:  # noqa: B027
        """Compute its coefficients for the count that is there."""

    def prepare(self, row_of: RowOf, numbers: Sequence[Any], sources: Sequence[Sequence[int]]) -> None:  # noqa: B027
        """Compute what the coming step multiplies with. ``sources``: where numbers are on a device instead."""

    @abstractmethod
    def measure(self, largest: bool) -> list[Tensor]:
        """Sums of squares of all gradients, or largest absolute values: 0-dim, float64, on the part's device. What is added up
        later is a list, because the order of additions decides bits."""

    @abstractmethod
    def control(self, prologue: Prologue, dtype: torch.dtype) -> Tensor | Control:
        """What is decided about the step where there is no other part. ``dtype``: the norm's."""

    @abstractmethod
    def use(self, control: Tensor | Control) -> None:
        """Make the coming step as ``control`` says. A part on the host is not launched if it says not to."""

    @abstractmethod
    def launch(self) -> None:
        """Step all active entries."""

    @abstractmethod
    def measure_skipped(self) -> None:
        """Make the statistics of a step that is skipped."""

    def begin(self) -> None:  # noqa: B027
        """States are about to be made visible for the step under way, which has changed nothing yet."""

    @abstractmethod
    def has_changed(self, entry: Entry, key: str) -> bool:
        """Whether the step under way, which was ended, may have written to this state of the entry. Where it has not, what was
        made for it is taken back."""

    def release(self) -> None:  # noqa: B027
        """The step is over: let go of what belongs to others."""

    def captured(self) -> list[Any] | None:
        """What a CUDA graph that is being captured reads, to be kept alive; None if none is."""
        return None


class TablePart(Part):
    """A part whose engine reads tensor tables."""

    def __init__(self, rule: Rule, ranks: tuple[Any, ...], on_device: bool = False) -> None:
        super().__init__(ranks)
        self._rule, self._on_device = rule, on_device
        self._library = cpu.library()
        self._factor = array("d", [1.0])  # what gradients are multiplied by where a bucket is SCALED
        self._by_signature: dict[tuple[Any, ...], Bucket] = {}
        self._bucket_words = array("q")
        self._params: list[Tensor] = []  # of active entries
        self._address, self._count = 0, 0
        self._is_changed = True  # which entries are active, or where rows are
        self._copying: dict[int, Entry] = {}  # by slot: those whose gradient is copied
        self._copies: list[Tensor] = []

    def _bucket_of(self, entry: Entry) -> Bucket:
        signature = entry.flags, entry.param.dtype, entry.grad_dtype, entry.state_dtype
        bucket = self._by_signature.get(signature)
        if bucket is None:
            bucket = Bucket(self._rule, entry.flags, signature[1:], self._factor, self._on_device)
            self._by_signature[signature] = bucket
        return bucket

    def add(self, entry: Entry) -> None:
        self._bucket_of(entry).add(entry)
        self._note(entry)

    def remove(self, entry: Entry) -> None:
        bucket = entry.bucket
        bucket.remove(entry)
        self._copying.pop(entry.slot, None)
        if bucket.is_empty:
            self._by_signature = {k: b for k, b in self._by_signature.items() if b is not bucket}
        self._is_changed = True

    def replace(self, old: Entry, new: Entry) -> None:
        if self._bucket_of(new) is not old.bucket:
            self.remove(old)
            return self.add(new)
        old.bucket.replace(old, new)
        self._note(new)

    def _note(self, entry: Entry) -> None:
        if entry.copies:
            self._copying[entry.slot] = entry
        else:
            self._copying.pop(entry.slot, None)
        self._is_changed = True

    def activate(self, entry: Entry) -> None:
        entry.bucket.activate(entry)
        self._is_changed = True

    def deactivate(self, entry: Entry) -> None:
        entry.bucket.deactivate(entry)
        self._is_changed = True

    def moved(self, entry: Entry) -> None:
        entry.bucket.is_changed = True

    @property
    def is_empty(self) -> bool:
        return not self._by_signature

    @property
    def first_slot(self) -> int:
        return self.buckets[0].first_slot if self.buckets else -1

    def entries(self) -> list[Entry]:
        return sorted((e for bucket in self.buckets for e in bucket.active_entries()), key=_slot)

    def settle(self) -> bool:
        if not self._is_changed:
            return False
        self._is_changed = False
        are_rebuilt = False
        for bucket in self._by_signature.values():
            if bucket.is_rebuilt:
                bucket.settle()
                are_rebuilt = True
        live = [b for b in self._by_signature.values() if b.active]
        self.buckets = sorted(live, key=lambda b: b.first_slot) if len(live) > 1 else live
        self._params = [e.param for b in self.buckets for e in b.active_entries()]
        self._resettled()
        self._bucket_words = array("q", [word for b in self.buckets for word in b.words()])
        self._address, self._count = address_of(self._bucket_words), len(self.buckets)
        for bucket in self._by_signature.values():
            bucket.is_rebuilt = False
        return are_rebuilt

    def _resettled(self) -> None:
        """Other rows are active than before, or rows are in another place."""

    def take_gradients(self) -> None:
        if not self._copying:
            return
        with torch.no_grad():
            for e in self._copying.values():
                if e.active:
                    grad = e.grad
                    copy = torch.empty_like(e.local, dtype=grad.dtype).copy_(grad)
                    self._copies.append(copy)
                    e.bucket.table.rows[WIDTH * e.row + GRAD] = copy.data_ptr()

    def unexpected(self) -> list[Entry]:
        if self._on_device:
            return []
        if self._library is not None:
            if not self._library.unexpected_counts(self._address, self._count, None):
                return []
            words = array("q", bytes(8 * sum(len(b.entries) for b in self.buckets)))
            found = self._library.unexpected_counts(self._address, self._count, address_of(words))
            rows = [e for bucket in self.buckets for e in bucket.entries]
            return [rows[i] for i in words[:found]]
        return [
            e
            for bucket in self.buckets
            for e in bucket.active_entries()
            if e.counter is not None and float(e.counter) != bucket.table.steps[bucket.table.rows[WIDTH * e.row + COEFFICIENTS]]
        ]

    def recount(self, entry: Entry) -> None:
        entry.bucket.recount(entry)
        self._is_changed = True

    def prepare(self, row_of: RowOf, numbers: Sequence[Any], sources: Sequence[Sequence[int]]) -> None:
        for bucket in self.buckets:
            bucket.set_coefficients(row_of, numbers)

    def launch(self) -> None:
        """Step all active entries."""
        # Autograd sees the write, as after torch's own step; before it, so that no interrupt comes in between.
        increment_version(self._params)
        if self._step():
            for bucket in self.buckets:
                bucket.stepped()

    @abstractmethod
    def _step(self) -> bool:
        """False if the step was not made but recorded."""

    def release(self) -> None:
        self._copies = []
