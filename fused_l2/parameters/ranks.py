"""Processes that decide together: which of them have the other parts of what an optimizer steps, and sums over them.

Each process adds up what its own tensors contribute to a norm, a verdict, or statistics. Such a *term* is then summed over the
process groups over which those tensors are divided, their *ranks*. Which terms and groups there are follows from parameters and
options alone, never from the gradients that are there, so that all processes communicate alike.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .shards import cut_dimensions, is_dtensor

# Process groups over which a term is summed, one after another. None for what every process has whole: replicas count once.
Ranks = tuple[Any, ...]

_Key = tuple[Ranks, Any]  # what a term is still to be summed over; and which one it is, if terms stay apart

REPLICATED, WORLD = "replicated", "world"


def is_process_group(value: Any) -> bool:
    """Whether something names processes: a ProcessGroup or a DeviceMesh."""
    meshes = sys.modules.get("torch.distributed.device_mesh")  # nobody has one without having imported it
    kinds = [getattr(torch.distributed, "ProcessGroup", None), getattr(meshes, "DeviceMesh", None)]
    return isinstance(value, tuple(filter(None, kinds)))


def is_non_member(value: Any) -> bool:
    """Whether something is what ``torch.distributed.new_group`` returns to processes that are not in the group."""
    member = getattr(torch.distributed, "GroupMember", None)
    return member is not None and isinstance(value, int) and value == member.NON_GROUP_MEMBER


def _world_size() -> int:
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _members(group: Any) -> tuple[int, ...]:
    return tuple(torch.distributed.get_process_group_ranks(group))


def _resolved(said: Any) -> Ranks | None:
    """The process groups that ``norm_process_group`` says; None if it says nothing.

    Raises:
        RuntimeError: if there is no group of that name.
    """
    if said is None:
        return None
    if said == REPLICATED or (said == WORLD and _world_size() == 1):
        return ()
    groups: list[Any]
    if said == WORLD:
        groups = [torch.distributed.group.WORLD]
    elif isinstance(said, str):
        from torch.distributed import distributed_c10d

        resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
        try:
            groups = [resolve(said)]
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"fused_l2: norm_process_group={said!r}, and there is no process group of that name. Names are "
                f"'replicated', 'world', and those that group.group_name tells."
            ) from error
    elif isinstance(said, torch.distributed.ProcessGroup):
        groups = [said]
    else:
        groups = [said.get_group(i) for i in range(said.ndim)]
    return tuple(group for group in groups if group.size() > 1)


def ranks_of(param: Any) -> Ranks:
    """The process groups over which a DTensor says that it is sharded, one for each dimension of its mesh that shards it."""
    return tuple(param.device_mesh.get_group(i) for i in cut_dimensions(param))


class Sharing:
    """Which processes share each of an optimizer's parameters: by slot, ``cut`` has the groups over which a DTensor is
    sharded, ``beyond`` those that ``norm_process_group`` adds, ``ranks`` both."""

    def __init__(self, params: Sequence[Any], group_of: Sequence[int], said: Sequence[Any], asks: str) -> None:
        """``said``: norm_process_group of each param group. ``asks``: the option for which this matters, for messages.

        Raises:
            RuntimeError: if one of the groups leads only partly out of a DTensor's mesh, or has no such name.
        """
        self._asks = asks
        self._said = [_resolved(one) for one in said]
        self._is_one_process = _world_size() == 1
        self._same: dict[frozenset[int], Any] = {}  # of several groups of the same processes, one is enough
        nothing: tuple[Ranks, Ranks] = (), ()
        found: dict[Hashable, tuple[Ranks, Ranks]] = {}
        both = []
        for param, index in zip(params, group_of, strict=True):
            if not is_dtensor(param):
                both.append(((), self._said[index] or ()) if self._said[index] else nothing)
                continue
            key = id(param.device_mesh), param.placements, index
            if key not in found:
                found[key] = ranks_of(param), self._leading_out_of(param.device_mesh, self._said[index] or ())
            both.append(found[key])
        groups = [*(g for pair in found.values() for ranks in pair for g in ranks), *(g for r in self._said for g in r or ())]
        for group in sorted(groups, key=lambda group: group.group_name):
            self._same.setdefault(frozenset(_members(group)), group)
        one = {id(group): self._same[frozenset(_members(group))] for group in groups}
        self._names = {group: (_members(group), group.group_name) for group in self._same.values()}
        self.cut = [tuple(one[id(g)] for g in cut) for cut, _ in both]
        self.beyond = [tuple(one[id(g)] for g in beyond) for _, beyond in both]
        self.ranks = [a + b for a, b in zip(self.cut, self.beyond, strict=True)]
        # A process may have no parameter of a group, and yet others wait for it.
        self.beyonds = list(dict.fromkeys([*self.beyond, *(tuple(one[id(g)] for g in said or ()) for said in self._said)]))
        self.all = list(dict.fromkeys([(), *self.ranks, *self.beyonds]))
        self.is_any = any(self.all)
        self.refusals = self._refusals(params, group_of)

    def _leading_out_of(self, mesh: Any, groups: Ranks) -> Ranks:
        """Those of the groups that join a mesh's tensors with others. Within its mesh a DTensor speaks for itself."""
        own = set(mesh.mesh.flatten().tolist())
        out = []
        for group in groups:
            members = set(_members(group))
            if members <= own:
                continue
            if len(members & own) > 1:
                raise RuntimeError(
                    f"fused_l2: norm_process_group has ranks {_shown(members)}, and there are DTensors sharded over ranks "
                    f"{_shown(own)}: it is neither within their mesh nor across it. Pass the group of the other dimension "
                    f"alone, 'replicated' if the other ranks have the same gradients, or a sequence with one per param group."
                )
            out.append(group)
        return tuple(out)

    def _refusals(self, params: Sequence[Any], group_of: Sequence[int]) -> dict[int, str]:
        """By slot: parameters of which this process cannot know which others have parts of them, and what to do."""
        if self._is_one_process:
            return {}
        me = torch.distributed.get_rank()
        own: list[frozenset[int]] = []
        of_mesh: dict[int, frozenset[int]] = {}
        alone = frozenset([me])
        for param in params:
            if is_dtensor(param):
                mesh = param.device_mesh
                if id(mesh) not in of_mesh:
                    of_mesh[id(mesh)] = frozenset(mesh.mesh.flatten().tolist())
                own.append(of_mesh[id(mesh)])
            else:
                own.append(alone)
        here = [members for members in of_mesh.values() if me in members]
        mine = frozenset().union(*here)
        widest = max(here or of_mesh.values(), key=len, default=alone)
        refused = {}
        for slot, (param, index) in enumerate(zip(params, group_of, strict=True)):
            if self._said[index] is not None:
                continue
            members = own[slot]
            if getattr(param, "_fsdp_flattened", False):
                refused[slot] = (
                    f"it is part of what FullyShardedDataParallel has divided, and {self._asks} needs to know over which "
                    f"processes. Pass norm_process_group=model.process_group, or 'replicated' with ShardingStrategy.NO_SHARD."
                )
            elif len(widest) > 1 and members != widest and (me in members or members & mine):
                what = f"is sharded over ranks {_shown(members)}" if len(members) > 1 else "is no DTensor"
                refused[slot] = (
                    f"it {what}, and others of this optimizer are sharded over ranks {_shown(widest)}. Whether those have the "
                    f"same gradient of it, or gradients of other parts, {self._asks} needs to know, or they would not do the "
                    f"same. Pass norm_process_group='replicated' if they have the same, or else the process group that has "
                    f"the parts; or a sequence with one per param group."
                )
        return refused

    # Sums. Processes that share a group have to call these alike: one all-reduce for each group.

    def reduced(self, terms: Mapping[Ranks, Tensor], largest: bool = False) -> Tensor:
        """The sum (or the largest, element by element) of these terms, each over its ranks. All are float64, of one length."""
        joined = self._reduced({(ranks, None): term for ranks, term in terms.items()}, largest)
        return joined[(), None]

    def reduced_each(self, terms: Mapping[Ranks, Tensor]) -> dict[Ranks, Tensor]:
        """Each of these terms, which may differ in length, summed over its ranks."""
        found = self._reduced({(ranks, ranks): term for ranks, term in terms.items()}, False)
        return {which: term for (_, which), term in found.items() if which is not None}

    def agreed(self, measured: Mapping[Ranks, Tensor], found_inf: Tensor | None, largest: bool) -> tuple[Tensor, Tensor | None]:
        """What all processes measured (a sum or the largest, 0-dim float64, by ranks), and what their GradScalers found."""

        def term(own: Tensor) -> Tensor:
            words = [own]
            if largest:
                # Which of a number and a NaN is the larger depends on their order: ranks could come to different results.
                nan = own.isnan()
                words = [own.masked_fill(nan, 0.0), nan.to(own.dtype)]
            if found_inf is not None:
                words.append(found_inf.detach().reshape(()).to(own.device, own.dtype, non_blocking=True))
            return torch.stack(words)

        whole = self.reduced({ranks: term(own) for ranks, own in measured.items()}, largest)
        found = whole[0].masked_fill(whole[1] != 0, math.nan) if largest else whole[0]
        return found, None if found_inf is None else whole[-1]

    def _reduced(self, terms: dict[_Key, Tensor], largest: bool) -> dict[_Key, Tensor]:
        # The order is the same everywhere: the longest way first, so that what all share is summed once and last.
        while waiting := sorted((key for key in terms if key[0]), key=self._order):
            group = waiting[0][0][0]
            chosen = [key for key in waiting if key[0][0] is group]
            given = [terms.pop(key) for key in chosen]
            together = _all_reduced(torch.cat([term.to(given[0].device) for term in given]), group, largest)
            for (ranks, which), term in zip(chosen, torch.split(together, [len(term) for term in given]), strict=True):
                key, known = (ranks[1:], which), terms.get((ranks[1:], which))
                if known is None:
                    terms[key] = term
                else:
                    terms[key] = torch.maximum(known, term.to(known.device)) if largest else known + term.to(known.device)
        return terms

    def _order(self, key: _Key) -> Any:
        ranks, which = key
        return -len(ranks), [self._names[group] for group in ranks], [self._names[group] for group in which or ()]


def _shown(ranks: Collection[int]) -> str:
    found = sorted(ranks)
    return str(found) if len(found) <= 8 else f"[{found[0]}, {found[1]}, ..., {found[-1]}]"


def _all_reduced(values: Tensor, group: Any, largest: bool) -> Tensor:
    dist = torch.distributed
    usable = values
    if values.device.type not in {device.type for device in group._device_types}:
        usable = values.to(group._device_types[0])  # parameters offloaded to the CPU, in a group of GPUs
    dist.all_reduce(usable, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
    return usable.to(values.device)
