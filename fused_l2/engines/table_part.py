"""What the parts have in common whose engines read tensor tables: the C++ library's and the Triton kernels'."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..parameters.entry import Entry
from ..tables.tensor_table import COEFFICIENTS, GRAD, WIDTH, Rule, address_of
from . import cpu
from .bucket import Bucket, RowOf
from .part import Part

_slot = attrgetter("slot")


class TablePart(Part):
    """A part whose engine reads tensor tables."""

    buckets: Sequence[Bucket] = ()  # those with active rows, in the order of their first one

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

    def unexpected_counts(self) -> list[Entry]:
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
