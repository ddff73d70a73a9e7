"""Which part of a step steps which entry.

An entry belongs to the part of its device, and of the ranks that share it where something is measured. What no engine of ours
takes belongs to plain PyTorch, and so does a parameter that shares memory with an earlier one: in one launch they would race.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import engines
from ..engines.part import Part
from ..engines.watch import Look
from ..options import Options
from ..parameters.entry import Entry
from ..parameters.memory import Ranges
from ..parameters.ranks import Ranks
from .rules import UpdateRule

_CPU = torch.device("cpu")
_Place = tuple[torch.device, Ranks]


class Placement:
    """The parts of a plan. Entries are added, removed, activated, ...; then :meth:`settle` brings the parts up to date."""

    def __init__(self, rule: UpdateRule, options: Options, look: Look) -> None:
        self._rule, self._options, self._look = rule, options, look
        self._by_place: dict[_Place | None, Part] = {}  # None: plain PyTorch
        self._ranges = Ranges()
        self._ranges_changed = False
        self._overlapping: set[int] = set()  # slots of parameters that share memory with an earlier one
        self.touched: dict[Part, None] = {}  # parts that have to be settled
        self._others_step = False  # whether other entries are stepped than before, or elsewhere
        self._rewritten: list[Entry] = []  # entries whose rows are new, or became active or not

    # Changes.

    def truncate(self, count: int) -> None:
        """There are so many slots."""
        self._overlapping = {slot for slot in self._overlapping if slot < count}

    def remove(self, e: Entry) -> None:
        """The entry is none any more."""
        if e.part is not None:
            e.part.remove(e)
            self.touched[e.part] = None
            e.part = None
        self._ranges.remove(e.slot)
        self._ranges_changed = self._others_step = True

    def move(self, entries: Sequence[Entry], params: Sequence[Entry]) -> None:
        """Some tensors of these entries are somewhere else: of ``params`` the parameters."""
        for e in entries:
            self.touched[e.part] = None
            e.part.moved(e)
        for e in params:
            self._ranges.move(e.slot, self._look.start_of(e))
            self._ranges_changed = True

    def activate(self, came: Sequence[Entry], gone: Sequence[Entry]) -> None:
        """Some entries have a gradient again, and others have none any more."""
        for e in came:
            self.touched[e.part] = None
            e.part.activate(e)
        for e in gone:
            self.touched[e.part] = None
            e.part.deactivate(e)
        if came or gone:
            self._rewritten += (*came, *gone)
            self._others_step = True

    def recount(self, e: Entry) -> None:
        """The entry's step counter was set to something else."""
        self.touched[e.part] = None
        e.part.recount(e)
        self._others_step = True

    def add(self, made: Sequence[Entry], entries: list[Entry | None], on_device: bool) -> bool:
        """Step these entries, some of which take the place of others of their slots in ``entries``; and step elsewhere what
        shares memory with another one, or no longer does. ``on_device``: whether a device counts steps.

        Returns whether there are rows that no look has written a gradient's address to."""
        for e in made:
            if e.is_plain:  # which is looked at, and dense
                self._ranges.fill(e.slot, self._look.start_of(e), e.numel * e.local.itemsize)
            else:
                self._ranges.put(e.slot, e.local)
        # Of tensors that share memory only active ones count.
        if not (made or self._ranges_changed or (self._rewritten and not self._ranges.are_disjoint)):
            return False
        new = {e.slot for e in made}

        def counts(slot: int) -> bool:
            e = entries[slot]
            return slot in new or (e is not None and e.active)

        overlapping = self._ranges.overlapping(counts)
        moving = (overlapping ^ self._overlapping) - new
        self._overlapping, self._ranges_changed = overlapping, False
        placed = [*made, *filter(None, map(entries.__getitem__, moving))]
        for e in placed:
            part, old = self._part_of(e, on_device), entries[e.slot]
            if old is not None and old.part is part:
                part.replace(old, e)
            else:
                active = e.active
                if old is not None and old.part is not None:
                    old.part.remove(old)
                    self.touched[old.part] = None
                e.active = active  # it may be the same entry
                part.add(e)
            entries[e.slot], e.part = e, part
            self.touched[part] = None
            self._rewritten.append(e)
            self._others_step = True
        return bool(placed)

    def _part_of(self, e: Entry, on_device: bool) -> Part:
        place: _Place | None = None
        if e.slot not in self._overlapping:
            if e.is_plain:
                place = _CPU, e.ranks
            elif engines.has_engine(e, self._rule.rule):
                place = engines.device_of(e.local), e.ranks
        part = self._by_place.get(place)
        if part is None:
            device, ranks = place or (None, ())
            part = engines.make_part(device, self._rule.rule, ranks, self._options.flags, on_device)
            self._by_place[place] = part
        return part

    def settle(self, entries: Sequence[Entry | None]) -> list[Part] | None:
        """Bring the parts that changed up to date. Returns those that have something to step, in the order in which they do it;
        None if they are what they were."""
        rebuilt = {part for part in self.touched if part.settle()}
        rewritten, others_step = self._rewritten, self._others_step
        self.touched, self._rewritten, self._others_step = {}, [], False
        if not others_step:
            return None
        elsewhere = [e for e in entries if e is not None and e.part in rebuilt] if rebuilt else []
        self._look.placed([*elsewhere, *(e for e in rewritten if e.part not in rebuilt)])
        live = {place: part for place, part in self._by_place.items() if part.first_slot >= 0}
        self._by_place = {place: part for place, part in self._by_place.items() if not part.is_empty}
        # Other devices first, because they work while the CPU does; plain PyTorch last.
        order = sorted(
            (place for place in live if place is not None),
            key=lambda place: (place[0].type == "cpu", str(place[0]), live[place].first_slot),
        )
        return [live[place] for place in (*order, *([None] if None in live else []))]
