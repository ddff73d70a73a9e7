"""Parts: one engine's share of a step. A part steps the entries of one place (a device, and the ranks that share them where
something is measured). This is the face that all engines have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..parameters.entry import Entry
from ..statistics import PartialSums
from ..tables.control import Control, Prologue
from .bucket import RowOf


class Part(ABC):
    """One engine's share of a plan. It is changed with add() to deactivate(), brought up to date with settle(), and then steps
    its active entries, on the gradients whose addresses stand in its rows."""

    sums: PartialSums | None = None  # with statistics
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

    def unexpected_counts(self) -> list[Entry]:
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
