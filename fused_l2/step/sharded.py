"""The DTensors among an optimizer's parameters, which are stepped as the shards that lie in this process."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

from torch import Tensor

from ..engines import cpu
from ..engines.slot_watch import SlotWatch
from ..parameters.entry import Entry
from ..parameters.shards import LocalGradients, Shards, gradients_of, is_dtensor, local


class ShardedParams:
    """What a step asks of DTensors: the shards of their gradients, and whether their own are still those that were seen."""

    def __init__(self, params: list[Tensor], gradients: LocalGradients) -> None:
        self._params, self._shards = params, Shards(params, gradients)
        self._watch: SlotWatch | None = None

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._shards)

    def gradients(self, params: Sequence[Tensor]) -> list[Any]:
        """The gradients of these parameters, shards in the place of DTensors."""
        grads = gradients_of(params)
        if len(params) == len(self._params) and all(map(is_, params, self._params)):
            self._shards.localize(grads)
        return grads

    def replaced(self, entries: Sequence[Entry | None]) -> set[int]:
        """The slots of entries whose parameter has another shard than they have."""
        if self._watch is None or self._watch.holds():
            return set()
        return {e.slot for e in entries if e is not None and is_dtensor(e.param) and local(e.param) is not e.local}

    def watch(self, entries: Sequence[Entry | None]) -> None:
        """These are all entries now."""
        sharded = [e.param for e in entries if e is not None and is_dtensor(e.param)]
        self._watch = SlotWatch(cpu.library(), sharded, "_local_tensor") if sharded else None
