"""The plan of a step: which part steps which tensors, where they are, and what changed since the last step.

A plan has an entry for each parameter that ever had a gradient. A step asks which entries changed (gradient there or not,
address, dtype, strides, state, step counter, hyperparameters) and mends those; the cost of a change is that of what changed.
Nothing but the plan is changed before every check of every tensor has passed. A plan in whose making or mending something was
raised is thrown away by its owner, so that nothing half-seen stays.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .. import engines
from ..engines import cuda
from ..engines.cuda_part import CudaPart
from ..engines.part import Part
from ..engines.torch_ops import TorchPart, combined, total
from ..engines.watch import CAME, MOVED, OTHER, STATE_MOVED, SlotWatch, make_look
from ..options import Options
from ..parameters import checks
from ..parameters.entry import Entry, Flight, Kind, Needs, make_entry, plain_entry
from ..parameters.low_precision import lost_decay
from ..parameters.memory import Ranges
from ..parameters.ranks import Ranks, Sharing
from ..parameters.shards import LocalGradients, Shards, gradients_of, is_dtensor, local
from ..statistics import Decay, GivenRows, Record, Recorded, chosen_rows, rows_of, totals_of
from ..tables import coefficients
from ..tables.control import Control, Prologue
from ..tables.modes import CODES, EIGHT_BIT_NAMES, HALVES, STATE_NAMES, Mode
from ..tables.tensor_table import Flag
from .hyperparameters import DeviceValues, is_on_device
from .rules import UpdateRule
from .state import OptimizerState, ParamState

Groups = list[dict[str, Any]]


class _Group:
    """What is known of a param group: the values that were read, and what follows from them."""

    def __init__(self, values: Any, numbers: Any, sources: list[int], needs: Needs) -> None:
        self.values, self.numbers, self.sources, self.needs = values, numbers, sources, needs
        self.may_change_in_place = _may_change_in_place(values)
        self.kind_of_lr, self.kind_of_decay = type(values.lr), type(values.weight_decay)


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
        self._initial_lrs, self._waiting, self._warned, self._first = initial_lrs, waiting, warned, first
        self._read, self._decay_at = rule.read, rule.Values._fields.index("weight_decay")
        self._flight = Flight()
        self._counts = rule.counts or options.precision.is_random
        self._numbers: list[Any] = []
        self._sources: list[list[int]] = []
        self._is_measured = options.decides or options.statistics
        self._device_values, self._rereads_values = DeviceValues(), False
        self._groups: list[_Group] = []
        self._on_device: bool | None = None  # whether a device counts steps and computes coefficients
        self._has_sources = False

        self._params: list[Tensor] = []
        self._ends: list[int] = []
        self._group_of: list[int] = []
        self._entries: list[Entry | None] = []
        self._look = make_look()
        self._sharded, self._is_sharded = Shards([], gradients), False
        self._shard_watch: SlotWatch | None = None
        self._sharing: Sharing | None = None  # where something is measured
        self._listed_twice: list[list[int]] = []  # slots of one parameter, which share its state
        self._ranges = Ranges()
        self._later: set[int] = set()  # slots of parameters that share memory with an earlier one
        self._stale: set[int] = set()  # slots whose entries have to be made anew
        self._touched: dict[Part, None] = {}  # parts that have to be settled
        self._ranges_changed = False
        self._shards_changed = False
        self._state: Any = None
        self._state_changes = -1
        self._has_foreign_state = False  # dictionaries that do not count changes
        self.uncommitted: dict[int, Entry] = {}  # by slot: those with new state

        cuda.forget_failures()
        self._by_place: dict[Any, Part] = {}
        self.parts: list[Part] = []  # those with something to step; other devices first: they work while the CPU does
        self.cuda_parts: list[CudaPart] = []
        self._on_host = False
        self._coefficients_due = True
        self._grads: list[Any] = []  # alive until the step is done, whatever other threads do
        self.norm_dtype = torch.float32
        self._measured: tuple[list[int], list[int], list[str]] | None = None  # slots, groups, names: what is measured
        self.committed: list[tuple[Entry, list[str]]] = []  # what this step added to the state

    def __del__(self) -> None:
        # Entries know where they are stepped, and parts know their entries: let all of it go now, not when the collector comes.
        for e in getattr(self, "_entries", ()):
            if e is not None:
                e.place = e.bucket = None

    # What changed?

    def refresh(self, groups: Groups, state: Any) -> bool:
        """Look at gradients, states and hyperparameters, and mend what changed. False if a new plan has to be made.

        Raises if a hyperparameter or a tensor is invalid.
        """
        self._flight.is_under_way = True
        if self.cuda_parts:
            self._refuse_capture(groups)
        elif not self._groups:
            self._refuse_to_begin_in_a_capture(groups)
        params: list[Tensor] = []
        changed = []
        regrouped, decay = False, self._decay_at
        if len(groups) == len(self._groups):
            for i, (group, known) in enumerate(zip(groups, self._groups, strict=True)):
                params += group["params"]
                values = self._read(group)
                try:
                    # A number equals a tensor of the same value, which is read in another way.
                    differs = (
                        known.may_change_in_place
                        or values != known.values
                        or type(values[0]) is not known.kind_of_lr
                        or type(values[decay]) is not known.kind_of_decay
                    )
                except (RuntimeError, ValueError):  # a tensor or an array of several elements among them: refused below
                    differs = True
                if differs:
                    changed.append(i)
                regrouped |= len(params) != self._ends[i]
        else:
            regrouped = True
        if (regrouped or changed) and self._are_moved(groups):
            return False  # what is known of a group goes with it
        if regrouped:
            changed = [*range(len(groups))]
            params = [p for group in groups for p in group["params"]]
        if changed and not self._adopt(groups, changed):
            return False
        if state is not self._state or self._has_foreign_state or state.changes != self._state_changes:
            self._look_at_states(state, self._entries)
        elif without := self._flight.without_state:
            self._look_at_states(state, [self._entries[slot] for slot in without if slot < len(self._entries)])

        found, grads = self._look_at(params) if not regrouped else (None, [])
        if found is None:
            if self._are_moved(groups):
                return False
            self._list(groups, params)
            found, grads = self._look_at(params)
            assert found is not None
        self._grads = grads
        if found or self._stale or self._touched:
            self._mend(groups, params, found)
        for part in self.parts:
            part.take_gradients()
            if unexpected := part.unexpected():
                self._recount(part, unexpected, groups)
        return True

    def _look_at(self, params: list[Tensor]) -> tuple[list[int] | None, list[Any]]:
        if not self._is_sharded:
            grads: list[Any] = [p.grad for p in params]
        else:
            grads = gradients_of(params)
            if len(params) == len(self._params) and all(map(is_, params, self._params)):
                self._sharded.localize(grads)
            if self._shard_watch is not None and not self._shard_watch.holds():
                self._stale |= {
                    e.slot for e in self._entries if e is not None and is_dtensor(e.param) and local(e.param) is not e.local
                }
        return self._look.changes(params, grads), grads

    def _are_moved(self, groups: Groups) -> bool:
        """Whether groups are not where they were, and something besides their keys is known of each."""
        if not (self._groups and options_by_group(self._options)):
            return False
        if len(groups) < len(self._groups):
            return True
        for begin, end, group in zip([0, *self._ends], self._ends, groups, strict=False):
            if begin < end and next(iter(group["params"]), None) is not self._params[begin]:
                return True
        return False

    def _adopt(self, groups: Groups, changed: Iterable[int]) -> bool:
        """Take over hyperparameters that changed. False if they change who counts steps and computes coefficients."""
        read_again = self._rereads_values
        new: dict[int, _Group] = {}
        for i in changed:
            values = self._rule.Values._make(self._read(groups[i]))
            on_host = self._rule.Values._make(self._device_values.read(values, again=read_again))
            numbers = self._rule.numbers(on_host, self._options, i, self._initial_lrs.get(i, 0.0))
            flags = self._rule.flags(on_host, self._options)
            names = self._rule.state_names(flags)
            needs = Needs(
                flags,
                names,
                frozenset(name for name in names if self._rule.may_start_at_zero(name)),
                self._rule.counts,
                bool(groups[i].get("capturable", False)),
                self._options.precision,
            )
            new[i] = _Group(values, numbers, self._rule.sources(values, i), needs)
        known = {**dict(enumerate(self._groups[: len(groups)])), **new}
        has_sources = any(any(group.sources) for group in known.values())
        on_device = has_sources or self._rule.counts_on_device(self._options, groups)
        if self._on_device not in (None, on_device):
            return False
        self._on_device, self._has_sources = on_device, has_sources
        for i, group in new.items():
            rate = coefficients.rate_of(group.numbers, bool(group.needs.flags & Flag.DECOUPLED))
            if rate > 1 and "excess decay" not in self._warned:
                self._warned.add("excess decay")
                warnings.warn(_EXCESS.format(i, group.numbers.lr, group.numbers.weight_decay, rate), stacklevel=6)
            old = self._groups[i] if i < len(self._groups) else None
            if old is None or old.needs != group.needs:
                self._stale |= {e.slot for e in self._entries if e is not None and e.group == i}
            if old is None or old.numbers != group.numbers or old.sources != group.sources:
                self._coefficients_due = True
        self._groups = [known[i] for i in range(len(groups))]
        self._device_values.keep(group.values for group in self._groups)
        self._numbers = [group.numbers for group in self._groups]
        self._sources = [group.sources for group in self._groups]
        return True

    def _look_at_states(self, state: Any, entries: Iterable[Entry | None]) -> None:
        """Find those of the entries whose state is not what it was. Tensors that were put in the place of others, as moving
        them to another device and back does, are taken; where that is not enough, the entry has to be made anew."""
        self._flight.without_state = []
        self._state, self._has_foreign_state = state, type(state) is not OptimizerState
        self._state_changes = getattr(state, "changes", 0)
        exchanged: list[tuple[Entry, Any, list[Any]]] = []
        for e in entries:
            if e is None:
                continue
            own = state.get(e.param)
            is_own = type(own) is ParamState
            if own is e.state and (own is None or is_own):
                continue
            self._has_foreign_state |= own is not None and not is_own
            others = _OTHER_STATES[e.mode, bool(e.flags & Flag.EIGHT_BIT)]
            if e.new or e.local is not e.param or not isinstance(own, Mapping) or not others.isdisjoint(own):
                self._stale.add(e.slot)
            else:
                exchanged.append((e, own, [own.get(name) for name in e.names]))
        if exchanged:
            self._stale |= {e.slot for e in self._look.exchange(exchanged)}
            for e, own, _ in exchanged:
                if type(own) is ParamState and e.state is own:
                    own.watch(e)

    def _list(self, groups: Groups, params: list[Tensor]) -> None:
        """Parameters were added, removed or exchanged: keep the entries of those that are where they were."""
        group_of = [i for i, group in enumerate(groups) for _ in group["params"]]
        for slot, e in enumerate(self._entries):
            stays = slot < len(params) and params[slot] is self._params[slot] and group_of[slot] == self._group_of[slot]
            if e is not None and not stays:
                self._forget(e)
        self._entries = [*self._entries, *[None] * len(params)][: len(params)]
        self._params, self._group_of = params, group_of
        self._ends = []
        for group in groups:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(group["params"]))
        self._stale = {slot for slot in self._stale if slot < len(params)}
        self._later = {slot for slot in self._later if slot < len(params)}
        slots: dict[int, list[int]] = {}
        for slot, param in enumerate(params):
            slots.setdefault(id(param), []).append(slot)
        self._listed_twice = [twins for twins in slots.values() if len(twins) > 1] if len(slots) < len(params) else []
        self._look.resize(params)
        self._sharded = Shards(params, self._gradients)
        self._is_sharded = bool(self._sharded)
        if self._is_measured:
            options = self._options
            said = [options.process_group_of(i) for i in range(len(groups))]
            sharing = self._sharing = Sharing(params, group_of, said, options.asks)
            for slot in sharing.refusals:
                if params[slot].requires_grad or params[slot].grad is not None:
                    self._refuse_to_measure(groups, slot)

    def _refuse_to_measure(self, groups: Groups, slot: int) -> None:
        assert self._sharing is not None
        raise RuntimeError(f"{self._namer(groups, slot)()}: {self._sharing.refusals[slot]}")

    @property
    def is_shared(self) -> bool:
        """Whether other processes have a say in what is measured."""
        return self._sharing is not None and self._sharing.is_any

    def _forget(self, e: Entry) -> None:
        """The entry is none any more."""
        if e.place is not None:
            e.place.remove(e)
            self._touched[e.place] = None
            e.place = None
        self._coefficients_due = self._ranges_changed = True
        self._shards_changed |= self._is_sharded
        self._entries[e.slot] = None
        self._ranges.remove(e.slot)
        self._look.forget(e.slot)
        self.uncommitted.pop(e.slot, None)

    # Mending.

    def _mend(self, groups: Groups, params: list[Tensor], found: list[int]) -> None:
        if torch.is_inference_mode_enabled():  # a state that is made in it could not be written to outside of it
            with torch.inference_mode(False):
                self._mend_all(groups, params, found)
        else:
            self._mend_all(groups, params, found)

    @torch.no_grad()
    def _mend_all(self, groups: Groups, params: list[Tensor], found: list[int]) -> None:
        for slot, change in zip(found[::2], found[1::2], strict=True):
            if change & OTHER:
                self._stale.add(slot)
        for twins in self._listed_twice:
            if not self._stale.isdisjoint(twins):
                self._stale.update(twins)
        self._refuse_capture_of_changes([*found[::2], *self._stale])
        touched = self._touched
        others_step = bool(touched or self._stale)  # whether other tensors are stepped than before, or elsewhere
        made = self._make_entries(groups)
        placed: list[Entry] = []
        for slot, change in zip(found[::2], found[1::2], strict=True):
            if slot in self._stale:
                continue
            e = self._entries[slot]
            assert e is not None
            touched[e.place] = None
            if change & (MOVED | STATE_MOVED):
                e.place.moved(e)
                if change & MOVED:
                    self._ranges.move(slot, self._look.start_of(e))
                    self._ranges_changed = True
                if not change & CAME:
                    continue
            others_step = True
            if change & CAME:
                e.place.activate(e)
                self._coefficients_due = True
            else:
                e.place.deactivate(e)
            placed.append(e)
        if found:  # of tensors that share memory only active ones count
            self._ranges_changed |= not self._ranges.are_disjoint
        for slot in self._stale - {e.slot for e in made}:
            if (old := self._entries[slot]) is not None:  # it will be made when its gradient comes
                self._forget(old)
        self._stale = set()
        for e in made:
            if e.is_plain:  # which is looked at, and dense
                self._ranges.fill(e.slot, self._look.start_of(e), e.numel * e.local.itemsize)
            else:
                self._look.set(e, self._grads[e.slot])
                self._ranges.put(e.slot, e.local)
        if made or self._ranges_changed:
            new = {e.slot for e in made}
            later = self._ranges.later(lambda slot: slot in new or self._is_active(slot))
            moving = (later ^ self._later) - new
            self._later, self._ranges_changed = later, False
            made += [e for slot in moving if (e := self._entries[slot]) is not None]  # in a new row, which has no gradient yet
            self._place(made, touched)
            placed += made
        if others_step or made:
            self._settle(touched, placed)
        else:
            for part in touched:
                part.settle()
        self._touched = {}
        if made:
            self._coefficients_due = True
            again, self._grads = self._look_at(params)
            if again:
                raise RuntimeError(
                    "fused_l2: tensors changed while step() was looking at them. Is another thread using this optimizer's "
                    "parameters or state?"
                )
            self._shards_changed |= any(is_dtensor(e.param) for e in made)
        if self._shards_changed:
            sharded = [e.param for e in self._entries if e is not None and is_dtensor(e.param)]
            self._shard_watch = SlotWatch(engines.cpu.library(), sharded, "_local_tensor") if sharded else None
            self._shards_changed = False

    def _is_active(self, slot: int) -> bool:
        e = self._entries[slot]
        return e is not None and e.active

    def _make_entries(self, groups: Groups) -> list[Entry]:
        """New entries for stale slots that have a gradient. Nothing is changed."""
        new: dict[int, dict[str, Any]] = {id(e.param): e.new for e in self.uncommitted.values() if e.slot not in self._stale}
        kinds: dict[tuple[int, torch.dtype, bool], Kind] = {}  # by param group, dtype, and whether 8-bit states fit
        has_codes = self._options.precision.has_codes
        slots = [slot for slot in sorted(self._stale) if self._grads[slot] is not None]
        plain: list[Entry] = []
        twice = {slot for twins in self._listed_twice for slot in twins}  # a parameter that is listed twice has one state
        for slot in slots:
            param, index = self._params[slot], self._group_of[slot]
            key = index, param.dtype, has_codes(param)
            kind = kinds.get(key)
            if kind is None:
                kind = kinds[key] = self._groups[index].needs.of(param)
            if not kind.is_plain or not engines.is_on_cpu(param) or slot in twice or (self._waiting and param in self._waiting):
                continue
            state = self._state.get(param)
            e = plain_entry(param, self._grads[slot], slot, index, state, kind, self._gradients, self._flight)
            if e is not None:
                plain.append(e)
        accepted = self._look.accepted(plain, self._grads)
        new.update((id(e.param), e.new) for e in accepted.values() if e.new)
        made: list[Entry] = []
        sharing = self._sharing
        for slot in slots:
            e = accepted.get(slot)
            if e is None:
                param, index = self._params[slot], self._group_of[slot]
                kind, device = kinds[index, param.dtype, has_codes(param)], engines.device_of(param)
                e = make_entry(
                    param,
                    param.grad,  # type: ignore[arg-type]
                    slot=slot,
                    number=self._first + slot,
                    group=index,
                    state=self._state.get(param),
                    pending=new.get(id(param)) or ({} if self._state.get(param) else self._waiting.get(param)) or {},
                    kind=kind,
                    gradients=self._gradients,
                    flight=self._flight,
                    on_device=device.type == "cuda" and (kind.needs.counts_on_device or bool(self._on_device)),
                    name=self._namer(groups, slot),
                )
                if e.new:
                    new[id(param)] = e.new
            if sharing is not None:
                if slot in sharing.refusals:  # it required no gradient before
                    self._refuse_to_measure(groups, slot)
                e.ranks = sharing.ranks[slot]
            made.append(e)
        return made

    def _namer(self, groups: Groups, slot: int) -> checks.Name:
        index = self._group_of[slot]
        position = slot - (self._ends[index] - len(groups[index]["params"]))
        return lambda: checks.describe(groups[index], index, position)

    def _place(self, entries: Iterable[Entry], touched: dict[Part, None]) -> None:
        """Give entries to the parts that step them."""
        for e in entries:
            part = self._part_of(e)
            old = self._entries[e.slot]
            if old is not None and old.place is part:
                part.replace(old, e)
            else:
                active = e.active
                if old is not None and old.place is not None:
                    old.place.remove(old)
                    touched[old.place] = None
                e.active = active  # it may be the same entry
                part.add(e)
            if e.new:
                self.uncommitted[e.slot] = e
            else:
                self.uncommitted.pop(e.slot, None)
            self._entries[e.slot], e.place = e, part
            self._watch_state(e)
            touched[part] = None

    def _part_of(self, e: Entry) -> Part:
        key: tuple[torch.device, Ranks] | None = None
        if e.slot not in self._later:
            if e.is_plain:
                key = _CPU, e.ranks
            elif engines.has_engine(e, self._rule.rule):
                key = engines.device_of(e.local), e.ranks
        part = self._by_place.get(key)
        if part is None:
            flags = self._options.flags
            device, ranks = key or (None, ())
            part = self._by_place[key] = engines.make_part(device, self._rule.rule, ranks, flags, bool(self._on_device))
        return part

    def _settle(self, touched: Iterable[Part], placed: Sequence[Entry] = ()) -> None:
        """Bring the parts that changed up to date. ``placed``: entries whose rows changed."""
        rebuilt = {part for part in touched if part.settle()}
        elsewhere = [e for e in self._entries if e is not None and e.place in rebuilt] if rebuilt else []
        self._look.placed([*elsewhere, *(e for e in placed if e.place not in rebuilt)])
        live = {key: part for key, part in self._by_place.items() if part.first_slot >= 0}
        order = sorted(
            (key for key in live if key is not None),
            key=lambda key: (key[0].type == "cpu", str(key[0]), live[key].first_slot),
        )
        self.parts = [live[key] for key in (*order, *([None] if None in live else []))]
        self._by_place = {key: part for key, part in self._by_place.items() if not part.is_empty}
        self._measured = None
        self.cuda_parts = [part for part in self.parts if isinstance(part, CudaPart)]
        self._on_host = any(part.on_host for part in self.parts)
        self._rereads_values = self._has_sources and self._on_host
        dtypes = {e.param.dtype for e in self._entries if e is not None and e.active}
        self.norm_dtype = torch.float64 if dtypes == {torch.float64} else torch.float32
        if self._options.decides:
            for part in self.cuda_parts:
                part.prepare_to_measure(self._options.is_largest, self._options.clips, self.norm_dtype)

    def _recount(self, part: Part, unexpected: list[Entry], groups: Groups) -> None:
        """Step counters that somebody has set: compute coefficients for what they say."""
        for e in unexpected:
            if e.counter is not None:
                checks.check_counter(e.counter, self._namer(groups, e.slot))
            part.recount(e)
        self._coefficients_due = True
        self._settle([part])

    # The step.

    def prepare(self) -> None:
        """Compute what the coming step multiplies with."""
        if self._coefficients_due:
            for part in self.parts:
                part.prepare(self._rule.row, self._numbers, self._sources)
            self._coefficients_due = False

    @property
    def host_must_know(self) -> bool:
        """Whether the host has to know if the step is made: it steps some tensors itself, or has to create states."""
        return self._on_host or any(e.active for e in self.uncommitted.values())

    @torch.no_grad()
    def decide(self, prologue: Prologue) -> Tensor | Control:
        """What precedes the step: the factor of all gradients, whether the step is skipped, and the norm."""
        if self.cuda_parts and self._options.amp_scaling and cuda.is_capturing():
            self._refuse_capture_of_scales(prologue)
        sharing = self._sharing
        assert sharing is not None
        if len(self.parts) == 1 and not sharing.is_any:
            return self.parts[0].control(prologue, self.norm_dtype)
        measured: dict[Ranks, list[Tensor]] = {ranks: [] for ranks in sharing.all}
        for part in self.parts if prologue.measures else ():
            if isinstance(part, TorchPart):
                for ranks, own in measured.items():
                    own += part.measure_of(ranks, prologue.largest)
            else:
                measured[part.ranks] += part.measure(prologue.largest)
        device = self.cuda_parts[0].entries()[0].local.device if self.cuda_parts else _CPU
        nothing = torch.zeros((), dtype=torch.float64, device=device)  # no gradient here, but elsewhere
        if not sharing.is_any:
            return combined(measured[()] or [nothing], prologue, self.norm_dtype)
        here = {ranks: total(own, prologue.largest) if own else nothing for ranks, own in measured.items()}
        whole, found_inf = sharing.agreed(here, prologue.found_inf, prologue.largest)
        if found_inf is not None and prologue.found_inf is not None:
            prologue.found_inf.copy_(found_inf.reshape(prologue.found_inf.shape))
        return combined([whole], prologue, self.norm_dtype)

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
                self._watch_state(e)
                del self.uncommitted[e.slot]
        self._state_changes = getattr(state, "changes", 0)

    def take_back(self, state: Any) -> None:
        """The step was ended: remove the state that it had made and had not begun to change."""
        for e, keys in self.committed:
            own = state.get(e.param)
            if own is None:
                continue
            for key in keys:
                if not e.place.has_changed(e, key):
                    own.pop(key, None)
            if not own:
                del state[e.param]

    def _watch_state(self, e: Entry) -> None:
        if type(e.state) is ParamState:
            e.state.watch(e)
        elif e.state is not None:
            self._has_foreign_state = True

    def launch(self) -> None:
        """Step every tensor that has a gradient."""
        for part in self.parts:
            part.launch()
        # What the device computes the host need not.
        if self._counts and (self._on_host or not self._on_device):
            self._coefficients_due = True

    def captured(self) -> list[Any]:
        """What a CUDA graph that is being captured reads, to be kept alive."""
        return [kept for part in self.cuda_parts if (kept := part.captured()) is not None]

    def release(self) -> None:
        """The step is over, whatever became of it: let go of the gradients."""
        self._grads, self.committed = [], []
        for part in self.parts:
            part.release()
        self._flight.end()

    def recorded(self, groups: Groups, inv_scale: float | Tensor) -> Recorded:
        """What the last step left of its tensors."""
        if self._measured is None:
            slots = [e.slot for part in self.parts for e in part.entries()]
            self._measured = slots, [self._group_of[slot] for slot in slots], self._labels(groups, slots)
        slots, of_group, names = self._measured
        decays = list(map(self._decay_of, self._groups))
        records: list[Record] = [part.record for part in self.parts if part.record is not None]
        if not self.is_shared:
            return Recorded(records, of_group, names, decays, inv_scale)
        # Now, because somebody may ask for them in one process only.
        slots, rows = self._rows_over_ranks(slots, rows_of(records))
        of_group, names = [self._group_of[slot] for slot in slots], self._labels(groups, slots)
        whole, parts = self._totals_over_ranks(slots, rows, decays)
        return Recorded([GivenRows(rows)], of_group, names, decays, inv_scale, whole, parts)

    @torch.no_grad()
    def _decay_of(self, group: _Group) -> Decay:
        """Of the step that was made. Tensors on a device may be written to before somebody asks, so copies of them."""
        numbers = group.numbers
        if any(group.sources):
            read: dict[str, Any] = {
                name: getattr(group.values, name, None) for name in ("lr", "weight_decay", "momentum", "dampening")
            }
            on_device = {name: value for name, value in read.items() if is_on_device(value)}
            numbers = numbers._replace(
                **{name: value.detach().reshape(()).to(torch.float64, copy=True) for name, value in on_device.items()}
            )
        return Decay(numbers.weight_decay, self._rule.decay_rate(numbers, group.needs.flags))

    @torch.no_grad()
    def _rows_over_ranks(self, slots: list[int], rows: Tensor) -> tuple[list[int], Tensor]:
        """Sums over the meshes of DTensors, whether they have a gradient here or not; other tensors as they are."""
        assert self._sharing is not None
        here = dict(zip(slots, rows.unbind(), strict=True))
        nothing = torch.zeros(rows.shape[1], dtype=rows.dtype, device=rows.device)
        shared: dict[Ranks, list[int]] = {}
        for slot, ranks in enumerate(self._sharing.cut):
            if ranks:
                shared.setdefault(ranks, []).append(slot)
        terms = {ranks: torch.cat([here.get(slot, nothing) for slot in at]) for ranks, at in shared.items()}
        for ranks, summed in self._sharing.reduced_each(terms).items():
            here.update(zip(shared[ranks], summed.view(-1, rows.shape[1]).unbind(), strict=True))
        return list(here), torch.stack(list(here.values())) if here else rows

    @torch.no_grad()
    def _totals_over_ranks(self, slots: list[int], rows: Tensor, decays: Sequence[Decay]) -> tuple[Tensor | None, list[bool]]:
        """The totals of what other processes have other parts of, and which tensors those are. There may be other param groups
        there, so that totals of theirs are made there."""
        sharing = self._sharing
        assert sharing is not None
        beyonds = [sharing.beyond[slot] for slot in slots]
        if not any(sharing.beyonds):
            return None, [False] * len(slots)
        terms = {}
        for ranks in sharing.beyonds:
            members = [i for i, beyond in enumerate(beyonds) if beyond == ranks]
            if ranks:
                groups = [self._group_of[slots[i]] for i in members]
                terms[ranks] = totals_of(torch.cat(chosen_rows(rows, members)), groups, decays)
        nothing = torch.zeros_like(next(iter(terms.values())))
        return sharing.reduced({(): nothing, **terms}), list(map(bool, beyonds))

    def _labels(self, groups: Groups, slots: list[int]) -> list[str]:
        """What statistics call these parameters. No two have one name."""
        places = [(i, position) for i, group in enumerate(groups) for position in range(len(group["params"]))]
        given = [groups[i].get("param_names") or () for i in range(len(groups))]
        names = [str(given[i][position]) if position < len(given[i]) else f"{i}.{position}" for i, position in places]
        counts = Counter(names)
        return [names[s] if counts[names[s]] == 1 else f"{names[s]} ({'.'.join(map(str, places[s]))})" for s in slots]

    def lost_decay(self) -> str | None:
        """A warning, if rounding will leave nothing of the weight decay of some parameter."""
        for e in self.uncommitted.values() or self._entries:
            if e is None or e.mode is not Mode.ROUND or e.local.dtype not in HALVES:
                continue
            numbers = self._groups[e.group].numbers
            share = self._rule.decay_share(numbers, e.flags)
            if message := lost_decay(e.local, share, f" (lr {numbers.lr:g}, param group {e.group})"):
                return message
        return None

    # CUDA graphs.

    def _refuse_capture(self, groups: Groups) -> None:
        if not cuda.is_capturing():
            return
        if self._rule.counts and not all(g.get("capturable", False) for g in groups):
            raise RuntimeError(_capture_refused("its steps are counted on the host. Pass capturable=True."))
        if any(e.active for e in self.uncommitted.values()):
            raise RuntimeError(_capture_refused("its states are still to be made. " + _FIRST_STEP))
        if self._on_host:
            raise RuntimeError(_capture_refused("some of its tensors are stepped by the host or by plain PyTorch."))
        if self._options.raises_if_nonfinite:
            raise RuntimeError(_capture_refused("error_if_nonfinite waits for the norm. Pass skip_if_nonfinite=True instead."))
        if not all(map(self._device_values.knows, map(self._read, groups))):
            raise RuntimeError(_capture_refused("a hyperparameter is a tensor that no step has seen yet. " + _FIRST_STEP))
        for i, group in enumerate(groups):
            if not is_on_device(group["lr"]):
                warnings.warn(
                    f"fused_l2: a step is being captured into a CUDA graph with the lr of param group {i} as a number: every "
                    f"replay will use {float(group['lr'])}. To follow a schedule, make it a tensor on the device, "
                    f"lr=torch.tensor({float(group['lr'])}, device='cuda').",
                    stacklevel=2,
                )
                break

    def _refuse_to_begin_in_a_capture(self, groups: Groups) -> None:
        # Before a hyperparameter is read, which waits for the device.
        on_device = any(p.grad is not None and engines.device_of(p).type == "cuda" for g in groups for p in g["params"])
        if on_device and cuda.is_capturing():
            raise RuntimeError(_capture_refused("there is nothing prepared. " + _FIRST_STEP))

    def _refuse_capture_of_scales(self, prologue: Prologue) -> None:
        # A replay would read a CPU tensor's memory again, whatever is there by then.
        for name in ("grad_scale", "found_inf"):
            given = getattr(prologue, name)
            if given is not None and engines.device_of(given).type != "cuda":
                raise RuntimeError(_capture_refused(f"{name} is on the CPU. Put it on the parameters' device."))

    def _refuse_capture_of_changes(self, slots: Sequence[int]) -> None:
        # Before anything is compiled or read, which a capture does not allow.
        if any(engines.device_of(self._params[slot]).type == "cuda" for slot in slots) and cuda.is_capturing():
            raise RuntimeError(_capture_refused("there is nothing prepared. " + _FIRST_STEP))


# What other modes keep beside a parameter, and states in the other format: what this one must not find.
_OTHER_STATES = {
    (mode, has_codes): frozenset((*STATE_NAMES, *(CODES if has_codes else EIGHT_BIT_NAMES))) - {mode.state_name}
    for mode in Mode
    for has_codes in (False, True)
}
_CPU = torch.device("cpu")
_FIRST_STEP = "Make one step() before, with the same parameters having gradients."


_EXCESS = (
    "fused_l2: param group {} has lr {:g} and weight_decay {:g}: decoupled decay takes {:g} times each weight per step, so "
    "that it changes the sign of all of them. weight_decay is multiplied by lr, and is lambda / n, not lambda: see "
    "fused_l2.weight_decay.from_lambda."
)


def options_by_group(options: Options) -> bool:
    """Whether groups are stepped by something that is known of each besides its keys."""
    if isinstance(options.norm_process_group, tuple):
        return True
    return options.decay_rule != "plain" and (options.max_lr is None or not isinstance(options.decay_rule, str))


def _capture_refused(reason: str) -> str:
    return f"fused_l2: this step() cannot be captured into a CUDA graph: {reason}"


def _may_change_in_place(values: Sequence[Any]) -> bool:
    """Whether a hyperparameter may change in place, as a tensor, an array or a list of betas may."""
    return any(_may_change_in_place(v) if type(v) is tuple else not isinstance(v, (float, int)) for v in values)
