"""Makes the entries of a plan: almost all of them with one look at all parameters, others one by one, with every check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from .. import engines
from ..engines.watch import Look
from ..options import Options
from ..parameters.entry import Entry, InFlight, ParamNeeds, make_entry, plain_entry
from ..parameters.shards import LocalGradients
from .entry_states import EntryStates
from .groups import Groups, ParamGroups
from .measuring import Measuring


class EntryMaker:
    """Makes the entries of one plan."""

    def __init__(
        self,
        options: Options,
        known: ParamGroups,
        states: EntryStates,
        look: Look,
        measuring: Measuring | None,
        gradients: LocalGradients,
        waiting: Mapping[Tensor, Mapping[str, Any]],
        first: int,
        in_flight: InFlight,
    ) -> None:
        """``waiting``: states set before the first step, by parameter. ``first``: which of an optimizer's parameters the first
        one is, for random bits."""
        self._options, self._known, self._states, self._look, self._measuring = options, known, states, look, measuring
        self._gradients, self._waiting, self._first, self._in_flight = gradients, waiting, first, in_flight

    def make(self, groups: Groups, stale: Set[int], grads: Sequence[Any]) -> list[Entry]:
        """New entries for those of the stale slots that have a gradient. Nothing is changed.

        Raises:
            RuntimeError: if a parameter, its gradient or its state cannot be used; the message says why, and what to do.
        """
        known, states = self._known, self._states
        state = states.state
        slots = [slot for slot in sorted(stale) if grads[slot] is not None]
        needs = self._needs(slots)
        accepted = self._plain_ones(slots, needs, grads)
        # By parameter: one that is listed twice has two entries and one state, which may be new.
        new = {id(e.param): e.new for e in states.uncommitted.values() if e.slot not in stale}
        new.update((id(e.param), e.new) for e in accepted.values() if e.new)
        made: list[Entry] = []
        for slot in slots:
            e = accepted.get(slot)
            if e is None:
                param, device = known.params[slot], engines.device_of(known.params[slot])
                own = state.get(param)
                e = make_entry(
                    param,
                    param.grad,  # type: ignore[arg-type]
                    slot=slot,
                    number=self._first + slot,
                    group=known.group_of[slot],
                    state=own,
                    pending=new.get(id(param)) or ({} if own else self._waiting.get(param)) or {},
                    needs=needs[slot],
                    gradients=self._gradients,
                    in_flight=self._in_flight,
                    on_device=device.type == "cuda" and (needs[slot].of_group.counts_on_device or bool(known.on_device)),
                    name=known.namer(groups, slot),
                )
                if e.new:
                    new[id(param)] = e.new
            if self._measuring is not None:
                e.ranks = self._measuring.ranks_of(groups, slot)
            made.append(e)
        return made

    def _needs(self, slots: Iterable[int]) -> dict[int, ParamNeeds]:
        known, has_codes = self._known, self._options.precision.has_codes
        needs: dict[tuple[int, torch.dtype, bool], ParamNeeds] = {}
        found = {}
        for slot in slots:
            param, index = known.params[slot], known.group_of[slot]
            key = index, param.dtype, has_codes(param)
            if key not in needs:
                needs[key] = known.known[index].needs.of(param)
            found[slot] = needs[key]
        return found

    def _plain_ones(self, slots: Iterable[int], needs: Mapping[int, ParamNeeds], grads: Sequence[Any]) -> dict[int, Entry]:
        """Entries of plain tensors on the CPU with a state that is whole, or without one; by slot."""
        known, waiting, state = self._known, self._waiting, self._states.state
        twice = {slot for twins in known.listed_twice for slot in twins}
        plain = []
        for slot in slots:
            param, own_needs = known.params[slot], needs[slot]
            if not own_needs.is_plain or not engines.is_on_cpu(param) or slot in twice or (waiting and param in waiting):
                continue
            own, group = state.get(param), known.group_of[slot]
            e = plain_entry(param, grads[slot], slot, group, own, own_needs, self._gradients, self._in_flight)
            if e is not None:
                plain.append(e)
        return self._look.accepted(plain, grads)
