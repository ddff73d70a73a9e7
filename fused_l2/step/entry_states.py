"""The states of a plan's entries in ``optimizer.state``: which of them somebody has replaced, and which a step makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..engines.watch import Look
from ..parameters.entry import Entry, InFlight
from ..tables.modes import CODES, EIGHT_BIT_NAMES, STATE_NAMES, Mode
from ..tables.tensor_table import Flag
from .state import OptimizerState, ParamState


class EntryStates:
    """What is known of ``optimizer.state``.

    Dictionaries of ours tell when a state is replaced (:mod:`~fused_l2.step.state`); others are looked through at every step.
    """

    def __init__(self, look: Look, in_flight: InFlight) -> None:
        self._look, self._in_flight = look, in_flight
        self.state: Any = None  # as the last step was given it
        self._changes = -1
        self._has_foreign = False  # dictionaries that do not count changes
        self.uncommitted: dict[int, Entry] = {}  # by slot: those with new state
        self.committed: list[tuple[Entry, list[str]]] = []  # what the step under way has added

    @property
    def are_new(self) -> bool:
        """Whether the coming step makes states."""
        return any(e.active for e in self.uncommitted.values())

    def refresh(self, state: Any, entries: Sequence[Entry | None]) -> set[int] | None:
        """Find those of the entries whose state is not what it was. Tensors that were put in the place of others, as moving
        them to another device and back does, are taken. Returns the slots of those that have to be made anew."""
        if state is not self.state or self._has_foreign or state.changes != self._changes:
            return self._refresh(state, entries)
        if without := self._in_flight.without_state:
            return self._refresh(state, [entries[slot] for slot in without if slot < len(entries)])
        return None

    def _refresh(self, state: Any, entries: Iterable[Entry | None]) -> set[int]:
        self._in_flight.without_state = []
        self.state, self._has_foreign = state, type(state) is not OptimizerState
        self._changes = getattr(state, "changes", 0)
        stale: set[int] = set()
        exchanged: list[tuple[Entry, Any, list[Any]]] = []
        for e in entries:
            if e is None:
                continue
            own = state.get(e.param)
            is_own = type(own) is ParamState
            if own is e.state and (own is None or is_own):
                continue
            self._has_foreign |= own is not None and not is_own
            others = _OTHER_STATES[e.mode, e.flags & _EIGHT_BIT]
            is_mapping = is_own or isinstance(own, Mapping)
            if e.new or e.local is not e.param or not is_mapping or not others.isdisjoint(own):
                stale.add(e.slot)
            else:
                exchanged.append((e, own, [own.get(name) for name in e.names]))
        if exchanged:
            stale |= {e.slot for e in self._look.exchange(exchanged)}
            for e, own, _ in exchanged:
                if type(own) is ParamState and e.state is own:
                    own.watch(e)
        return stale

    def add(self, made: Iterable[Entry]) -> None:
        """These entries were made, perhaps with new state."""
        for e in made:
            if e.new:
                self.uncommitted[e.slot] = e
            else:
                self.uncommitted.pop(e.slot, None)
            if e.state is not None:
                self._watch(e)

    def _watch(self, e: Entry) -> None:
        if type(e.state) is ParamState:
            e.state.watch(e)
        else:
            self._has_foreign = True

    def remove(self, e: Entry) -> None:
        self.uncommitted.pop(e.slot, None)

    def commit(self, state: Any) -> None:
        """Make all new state of parameters with a gradient visible."""
        active: dict[int, list[Entry]] = {}  # by parameter: one that is listed twice has two entries
        for e in self.uncommitted.values():
            if e.active:
                active.setdefault(id(e.param), []).append(e)
        for entries in active.values():
            for e in entries:
                own = state.get(e.param)
                self.committed.append((e, [key for key in e.new if own is None or own.get(key) is None]))
                if own is None:
                    own = state[e.param] = ParamState(e.new)
                elif type(own) is ParamState:
                    own.put(e.new, entries)
                else:
                    own.update(e.new)
                e.state, e.new = own, {}
                self._watch(e)
                del self.uncommitted[e.slot]
        self._changes = getattr(state, "changes", 0)

    def take_back(self, state: Any) -> None:
        """The step was ended: remove the state that it had made and had not begun to change."""
        for e, keys in self.committed:
            own = state.get(e.param)
            if own is None:
                continue
            for key in keys:
                if not e.part.has_changed(e, key):
                    own.pop(key, None)
            if not own:
                del state[e.param]


_EIGHT_BIT = int(Flag.EIGHT_BIT)  # `&` with a member of an enum takes three times as long
# What other modes keep beside a parameter, and states in the other format: what this one must not find.
_OTHER_STATES = {
    (mode, has_codes): frozenset((*STATE_NAMES, *(CODES if has_codes else EIGHT_BIT_NAMES))) - {mode.state_name}
    for mode in Mode
    for has_codes in (0, _EIGHT_BIT)
}
