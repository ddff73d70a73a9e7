"""The plan of a step: which tensors are stepped, where they are, and what changed since the last step.

A plan has an entry for each parameter that ever had a gradient. A step asks which entries changed (gradient there or not,
address, dtype, strides, state, step counter, hyperparameters) and mends those; the cost of a change is that of what changed.
Nothing but the plan is changed before every check of every tensor has passed. A plan in whose making or mending something was
raised is thrown away by its owner, so that nothing half-seen stays.

What there is to know is with others: the param groups (``groups.py``), the states (``entry_states.py``), which part steps what
(``placement.py``), what is measured (``measuring.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..engines import cuda
from ..engines.cuda_part import CudaPart
from ..engines.part import Part
from ..engines.watch import CAME, GONE, MOVED, OTHER, STATE_MOVED, make_look
from ..options import Options
from ..parameters import checks
from ..parameters.entry import Entry, InFlight
from ..parameters.low_precision import lost_decay
from ..parameters.shards import LocalGradients, is_dtensor
from ..tables.control import Control
from ..tables.modes import HALVES, Mode
from . import captures
from .entry_maker import EntryMaker
from .entry_states import EntryStates
from .groups import Groups, ParamGroups
from .measuring import Measuring
from .placement import Placement
from .rules import UpdateRule
from .sharded import ShardedParams


class Plan:
    """What one optimizer's steps need, prepared."""

    def __init__(
        self,
        rule: UpdateRule,
        options: Options,
        gradients: LocalGradients,
        initial_lrs: Mapping[int, float],
        waiting: Mapping[Tensor, Mapping[str, Any]],
        warned: set[str],
        first: int,
    ) -> None:
        self._rule, self._options, self._gradients = rule, options, gradients
        self._in_flight, self._look = InFlight(), make_look()
        self._groups = ParamGroups(rule, options, initial_lrs, warned)
        self._states = EntryStates(self._look, self._in_flight)
        self._placement = Placement(rule, options, self._look)
        self.measuring = Measuring(rule, options, self._groups) if options.decides or options.statistics else None
        self._maker = EntryMaker(
            options, self._groups, self._states, self._look, self.measuring, gradients, waiting, first, self._in_flight
        )
        self._entries: list[Entry | None] = []  # by slot
        self._stale: set[int] = set()  # slots whose entries have to be made anew
        self._sharded: ShardedParams | None = None
        self._shards_changed = False
        self._grads: list[Any] = []  # alive until the step is done, whatever other threads do
        self.uncommitted = self._states.uncommitted  # by slot: entries with new state

        cuda.forget_failures()
        self.parts: list[Part] = []  # those with something to step, in the order in which they do it
        self.cuda_parts: list[CudaPart] = []
        self._on_host = False  # whether the host has to know if a step is made, because it steps some tensors itself
        self._coefficients_due = True
        self._coefficients_vary = False  # whether the host computes others for each step

    def __del__(self) -> None:
        # Entries know where they are stepped, and parts know their entries: let all of it go now, not when the collector comes.
        for e in getattr(self, "_entries", ()):
            if e is not None:
                e.part = e.bucket = None

    # What changed?

    def refresh(self, groups: Groups, state: Any) -> bool:
        """Look at gradients, states and hyperparameters, and mend what changed. False if a new plan has to be made.

        Raises if a hyperparameter or a tensor is invalid.
        """
        self._in_flight.used = []
        known = self._groups
        if self.cuda_parts:
            if cuda.is_capturing():
                has_new, on_host = self._states.are_new, self._on_host
                captures.refuse_capture(groups, known, self._rule, self._options, has_new_states=has_new, on_host=on_host)
        elif not known.known:
            captures.refuse_to_begin(groups)
        params, changed = known.read(groups)
        if changed and not self._take(groups, params, changed):
            return False
        if stale := self._states.refresh(state, self._entries):
            self._stale |= stale

        grads = [p.grad for p in params] if self._sharded is None else self._local_gradients(params)
        found = self._look.changes(params, grads)
        if found is None:
            if known.are_moved(groups):
                return False
            self._assign_slots(groups, params)
            found, grads = self._look_at(params)
        self._grads = grads
        if found or self._stale or self._placement.touched:
            self._mend(groups, found)
        for part in self.parts:
            part.take_gradients()
            if unexpected := part.unexpected_counts():
                self._recount(unexpected, groups)
        return True

    def _look_at(self, params: list[Tensor]) -> tuple[list[int], list[Any]]:
        """What changed of parameters that are those of the plan, and their gradients."""
        grads = [p.grad for p in params] if self._sharded is None else self._local_gradients(params)
        found = self._look.changes(params, grads)
        assert found is not None
        return found, grads

    def _local_gradients(self, params: list[Tensor]) -> list[Any]:
        assert self._sharded is not None
        grads = self._sharded.gradients(params)
        self._stale |= self._sharded.replaced(self._entries)
        return grads

    def _take(self, groups: Groups, params: list[Tensor], changed: Iterable[int]) -> bool:
        """Take over what changed in these param groups. False if a new plan has to be made."""
        known = self._groups
        if known.are_moved(groups):
            return False  # what is known of a group goes with it
        have_other_sizes = known.have_other_sizes(groups)
        if have_other_sizes:
            changed = range(len(groups))
        taken = known.take(groups, changed, again=known.has_sources and self._on_host)
        if taken is None:
            return False
        with_other_needs, has_other_numbers = taken
        if with_other_needs:
            self._stale |= {e.slot for e in self._entries if e is not None and e.group in with_other_needs}
        self._coefficients_due |= has_other_numbers
        if have_other_sizes:
            self._assign_slots(groups, params)
        return True

    def _assign_slots(self, groups: Groups, params: list[Tensor]) -> None:
        """Parameters were added, removed or exchanged: keep the entries of those that are where they were."""
        for slot in self._groups.assign_slots(groups, params):
            if (e := self._entries[slot]) is not None:
                self._forget(e)
        count = len(params)
        self._entries = [*self._entries, *[None] * count][:count]
        self._stale = {slot for slot in self._stale if slot < count}
        self._placement.truncate(count)
        self._look.resize(params)
        self._sharded = ShardedParams(params, self._gradients) or None
        if self._sharded is not None:
            self._sharded.watch(self._entries)
        if self.measuring is not None:
            self.measuring.assign_slots(groups)

    def _forget(self, e: Entry) -> None:
        """The entry is none any more."""
        self._placement.remove(e)
        self._states.remove(e)
        self._look.forget(e.slot)
        self._entries[e.slot] = None
        self._coefficients_due = True
        self._shards_changed |= self._sharded is not None

    # Mending.

    def _mend(self, groups: Groups, found: list[int]) -> None:
        if torch.is_inference_mode_enabled():  # a state that is made in it could not be written to outside of it
            with torch.inference_mode(False):
                self._mend_all(groups, found)
        else:
            self._mend_all(groups, found)

    @torch.no_grad()
    def _mend_all(self, groups: Groups, found: list[int]) -> None:
        """``found``: slots, each followed by what changed."""
        known, placement, entries = self._groups, self._placement, self._entries
        changes = dict(zip(found[::2], found[1::2], strict=True))
        self._stale.update(slot for slot, change in changes.items() if change & OTHER)
        for twins in known.listed_twice:
            if not self._stale.isdisjoint(twins):
                self._stale.update(twins)
        captures.refuse_changes([known.params[slot] for slot in (*changes, *self._stale)])
        made = self._maker.make(groups, self._stale, self._grads)
        moved: list[Entry] = []
        moved_params: list[Entry] = []
        came: list[Entry] = []
        gone: list[Entry] = []
        for slot, change in changes.items():
            if slot in self._stale:
                continue
            e = entries[slot]
            assert e is not None
            if change & (MOVED | STATE_MOVED):
                moved.append(e)
            if change & MOVED:
                moved_params.append(e)
            if change & CAME:
                came.append(e)
            elif change & GONE:
                gone.append(e)
        placement.move(moved, moved_params)
        placement.activate(came, gone)
        self._coefficients_due |= bool(came)
        for slot in self._stale - {e.slot for e in made}:
            if (old := entries[slot]) is not None:  # it will be made when its gradient comes
                self._forget(old)
        self._stale = set()
        for e in made:
            if not e.is_plain:  # else the look was told by what made it
                self._look.set(e, self._grads[e.slot])
        are_new = placement.add(made, entries, bool(known.on_device))
        self._states.add(made)
        self._settle()
        if are_new:
            self._coefficients_due = True
            again, self._grads = self._look_at(known.params)
            if again:
                raise RuntimeError(
                    "fused_l2: tensors changed while step() was looking at them. Is another thread using this optimizer's "
                    "parameters or state?"
                )
            self._shards_changed |= any(is_dtensor(e.param) for e in made)
        if self._shards_changed and self._sharded is not None:
            self._sharded.watch(entries)
            self._shards_changed = False

    def _settle(self) -> None:
        """Have the parts brought up to date."""
        parts = self._placement.settle(self._entries)
        if parts is None:
            return
        self.parts, self.cuda_parts = parts, [part for part in parts if isinstance(part, CudaPart)]
        self._on_host = any(part.on_host for part in parts)
        # What the device computes the host need not.
        counts = self._rule.counts or self._options.precision.is_random
        self._coefficients_vary = counts and (self._on_host or not self._groups.on_device)
        if self.measuring is not None:
            self.measuring.prepare(parts, self._entries)

    def _recount(self, unexpected: list[Entry], groups: Groups) -> None:
        """Step counters that somebody has set: compute coefficients for what they say."""
        for e in unexpected:
            if e.counter is not None:
                checks.check_counter(e.counter, self._groups.namer(groups, e.slot))
            self._placement.recount(e)
        self._coefficients_due = True
        self._settle()

    # The step.

    def prepare(self) -> None:
        """Compute what the coming step multiplies with."""
        if self._coefficients_due:
            for part in self.parts:
                part.prepare(self._rule.row, self._groups.numbers, self._groups.sources)
            self._coefficients_due = False

    @property
    def host_must_know(self) -> bool:
        """Whether the host has to know if the step is made: it steps some tensors itself, or has to create states."""
        return self._on_host or self._states.are_new

    def read(self, control: Tensor | Control) -> Control:
        """The control as numbers. Waits for the device."""
        if isinstance(control, Control):
            return control
        return self.cuda_parts[0].read(control) if self.cuda_parts else Control(*control.tolist())

    def use(self, control: Tensor | Control) -> None:
        """Make the coming step as this says."""
        for part in self.parts:
            part.use(control)

    def skip(self) -> None:
        """The step is not made, but for its statistics."""
        if self._options.statistics:
            for part in self.parts:
                part.measure_skipped()
        # What was converted may be changed before the next step: convert it then.
        self._stale |= {e.slot for e in self.uncommitted.values() if e.state is not None}

    def commit(self, state: Any) -> None:
        """Every check has passed: all of a parameter's new state becomes visible at once."""
        for part in self.parts:
            part.begin()
        self._states.commit(state)

    def take_back(self, state: Any) -> None:
        """The step was ended: remove the state that it had made and had not begun to change."""
        self._states.take_back(state)

    def launch(self) -> None:
        """Step every tensor that has a gradient."""
        for part in self.parts:
            part.launch()
        if self._coefficients_vary:
            self._coefficients_due = True

    def captured(self) -> list[Any]:
        """What a CUDA graph that is being captured reads, to be kept alive."""
        return [read for part in self.cuda_parts if (read := part.captured()) is not None]

    def release(self) -> None:
        """The step is over, whatever became of it: let go of the gradients."""
        self._grads = []
        self._states.committed = []
        for part in self.parts:
            part.release()
        self._in_flight.used = None

    def lost_decay(self) -> str | None:
        """A warning, if rounding will leave nothing of the weight decay of some parameter."""
        for e in self.uncommitted.values() or self._entries:
            if e is None or e.mode is not Mode.ROUND or e.local.dtype not in HALVES:
                continue
            numbers = self._groups.numbers[e.group]
            share = self._rule.decay_share(numbers, e.flags)
            if message := lost_decay(e.local, share, f" (lr {numbers.lr:g}, param group {e.group})"):
                return message
        return None
