"""What is measured over all parts of a step, and over all processes that share its parameters: what is decided before the step
(the norm, the factor of all gradients, whether it is skipped), and its statistics after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engines import cuda
from ..engines.cuda_part import CudaPart
from ..engines.part import Part
from ..engines.torch_ops import TorchPart, combined, total
from ..options import Options
from ..parameters.entry import Entry
from ..parameters.ranks import Ranks, Sharing
from ..statistics import Decay, FinishedSums, LazyStatistics, PartialSums, chosen_rows, rows_of, totals_of
from ..tables.control import Control, Prologue
from . import captures
from .groups import Groups, GroupValues, ParamGroups
from .hyperparameters import is_on_device
from .rules import UpdateRule


class Measuring:
    """Measures the steps of one plan, if the options ask for it."""

    _sharing: Sharing

    def __init__(self, rule: UpdateRule, options: Options, known: ParamGroups) -> None:
        self._rule, self._options, self._known = rule, options, known
        self._order_of: list[Part] | None = None  # what the three below are of
        self._slots: list[int] = []
        self._groups: list[int] = []
        self._names: list[str] = []
        self._cuda_parts: list[CudaPart] = []
        self.norm_dtype = torch.float32

    def assign_slots(self, groups: Groups) -> None:
        """Parameters were added, removed or exchanged.

        Raises:
            RuntimeError: if this process cannot know which others share one of them.
        """
        options, known = self._options, self._known
        self._order_of = None
        said = [options.process_group_of(i) for i in range(len(groups))]
        self._sharing = Sharing(known.params, known.group_of, said, options.asks)
        for slot in self._sharing.refusals:
            if known.params[slot].requires_grad or known.params[slot].grad is not None:
                self._refuse(groups, slot)

    def ranks_of(self, groups: Groups, slot: int) -> Ranks:
        """The process groups over which a parameter is summed that is about to be stepped."""
        if slot in self._sharing.refusals:  # it required no gradient before
            self._refuse(groups, slot)
        return self._sharing.ranks[slot]

    def _refuse(self, groups: Groups, slot: int) -> None:
        raise RuntimeError(f"{self._known.namer(groups, slot)()}: {self._sharing.refusals[slot]}")

    def prepare(self, parts: Sequence[Part], entries: Sequence[Entry | None]) -> None:
        """Other parts are stepped than before. ``entries``: all of the plan."""
        dtypes = {e.param.dtype for e in entries if e is not None and e.active}
        self.norm_dtype = torch.float64 if dtypes == {torch.float64} else torch.float32
        self._cuda_parts = [part for part in parts if isinstance(part, CudaPart)]
        if self._options.decides:
            for part in self._cuda_parts:
                part.prepare_to_measure(self._options.is_largest, self._options.clips, self.norm_dtype)

    @property
    def is_shared(self) -> bool:
        """Whether other processes have a say in what is measured."""
        return self._sharing.is_any

    # Before a step.

    @torch.no_grad()
    def decide(self, parts: Sequence[Part], prologue: Prologue) -> Tensor | Control:
        """What precedes the step: the factor of all gradients, whether the step is skipped, and the norm."""
        if self._cuda_parts and self._options.amp_scaling and cuda.is_capturing():
            captures.refuse_scales(prologue)
        sharing = self._sharing
        if len(parts) == 1 and not sharing.is_any:
            return parts[0].control(prologue, self.norm_dtype)
        measured: dict[Ranks, list[Tensor]] = {ranks: [] for ranks in sharing.all}
        for part in parts if prologue.measures else ():
            if isinstance(part, TorchPart):
                for ranks, own in measured.items():
                    own += part.measure_of(ranks, prologue.largest)
            else:
                measured[part.ranks] += part.measure(prologue.largest)
        device = self._cuda_parts[0].entries()[0].local.device if self._cuda_parts else torch.device("cpu")
        nothing = torch.zeros((), dtype=torch.float64, device=device)  # no gradient here, but elsewhere
        if not sharing.is_any:
            return combined(measured[()] or [nothing], prologue, self.norm_dtype)
        here = {ranks: total(own, prologue.largest) if own else nothing for ranks, own in measured.items()}
        whole, found_inf = sharing.agreed(here, prologue.found_inf, prologue.largest)
        if found_inf is not None and prologue.found_inf is not None:
            prologue.found_inf.copy_(found_inf.reshape(prologue.found_inf.shape))
        return combined([whole], prologue, self.norm_dtype)

    # After a step.

    def statistics(self, parts: list[Part], groups: Groups, inv_scale: float | Tensor) -> LazyStatistics:
        """What the step left of its tensors. ``parts``: a list that is another one when other tensors are stepped."""
        if self._order_of is not parts:
            self._order_of, self._slots = parts, [e.slot for part in parts for e in part.entries()]
            self._groups, self._names = self._described(groups, self._slots)
        partial_sums: list[PartialSums] = [part.sums for part in parts if part.sums is not None]
        decays = [self._decay_of(group) for group in self._known.known]
        if not self.is_shared:
            return LazyStatistics(partial_sums, self._groups, self._names, decays, inv_scale)
        # Now, because somebody may ask for them in one process only.
        slots, rows = self._rows_over_ranks(self._slots, rows_of(partial_sums))
        of_group, names = self._described(groups, slots)
        whole, are_parts = self._totals_over_ranks(slots, rows, decays)
        return LazyStatistics([FinishedSums(rows)], of_group, names, decays, inv_scale, whole, are_parts)

    @torch.no_grad()
    def _decay_of(self, group: GroupValues) -> Decay:
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

    def _described(self, groups: Groups, slots: list[int]) -> tuple[list[int], list[str]]:
        """The param groups of these parameters, and what statistics call them. No two have one name."""
        places = [(i, position) for i, group in enumerate(groups) for position in range(len(group["params"]))]
        given = [groups[i].get("param_names") or () for i in range(len(groups))]
        names = [str(given[i][position]) if position < len(given[i]) else f"{i}.{position}" for i, position in places]
        counts = Counter(names)
        unique = [names[s] if counts[names[s]] == 1 else f"{names[s]} ({'.'.join(map(str, places[s]))})" for s in slots]
        return [places[s][0] for s in slots], unique

    @torch.no_grad()
    def _rows_over_ranks(self, slots: list[int], rows: Tensor) -> tuple[list[int], Tensor]:
        """Sums over the meshes of DTensors, whether they have a gradient here or not; other tensors as they are."""
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
        beyonds = [sharing.beyond[slot] for slot in slots]
        if not any(sharing.beyonds):
            return None, [False] * len(slots)
        terms = {}
        for ranks in sharing.beyonds:
            members = [i for i, beyond in enumerate(beyonds) if beyond == ranks]
            if ranks:
                groups = [self._known.group_of[slots[i]] for i in members]
                terms[ranks] = totals_of(torch.cat(chosen_rows(rows, members)), groups, decays)
        nothing = torch.zeros_like(next(iter(terms.values())))
        return sharing.reduced({(): nothing, **terms}), list(map(bool, beyonds))
