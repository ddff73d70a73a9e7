"""A running optimizer gets another ``low_precision`` or ``state_dtype``: all of its parameters do, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import state_dicts
from .parameters.low_precision import LowPrecision, narrowed, widened
from .parameters.shards import is_dtensor, like, local
from .tables.modes import CODES, Mode

State = dict[str, Any]


class Undo:
    """What a ``with`` block changes is put back where it ends early, by an interrupt as well. What was kept beside weights is
    freed only when all of it is done."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], Any]] = []

    def before(self, call: Callable[[], Any]) -> None:
        """Call this if something goes wrong from now on."""
        self._calls.append(call)

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            for call in reversed(self._calls):
                call()


def split_weight(mode: Mode, param: Tensor, wide: Tensor) -> tuple[Tensor, Tensor | None]:
    """A parameter's shard and what its mode keeps beside it, from the float32 weight, rounded to nearest."""
    if mode.state_name is None:
        return wide.to(param.dtype), None
    # Random bits of one half: what is rounded with them is then rounded to nearest.
    nearest = torch.full(wide.shape, 1 << 31 | 1 << 7, dtype=torch.int64, device=wide.device)
    return narrowed(mode, wide, param.dtype, nearest)


@torch.no_grad()
def change_modes(
    params: Iterable[Tensor], states: Mapping[Tensor, Any], waiting: dict[Tensor, State], old: LowPrecision, new: LowPrecision,
    undo: Undo,
) -> None:  # fmt: skip
    """Keep beside each parameter what the new mode keeps. ``waiting``: states of parameters that have not been stepped."""
    for p in dict.fromkeys(params):
        state: State = states[p] if p in states else waiting.get(p, {})
        (before, kept), after = old.kept_of(p, state), new.mode_of(p)
        if before is after:
            continue
        value, beside = split_weight(after, p, widened(before, local(p).detach(), local(kept)))
        undo.before(partial(_put_back, p, local(p).detach().clone(), state, dict(state)))
        write(p, value)
        if before.state_name:
            state.pop(before.state_name, None)
        if after.state_name:
            state[after.state_name] = like(p, beside) if is_dtensor(p) and beside is not None else beside
            if p not in states and p not in waiting:  # a state is made whole, at the first step: this waits for it
                undo.before(partial(waiting.pop, p, None))
                waiting[p] = state


@torch.no_grad()
def change_states(
    params: Iterable[Tensor], states: MutableMapping[Tensor, Any], old: LowPrecision, new: LowPrecision, undo: Undo
) -> None:
    """Bring moments and momentum to 8 bits, from there to float32, or to their parameter's own dtype. A dtype that is asked for
    is brought about by the next step."""
    for p in params:
        state = states.get(p)
        if state is None:
            continue
        undo.before(partial(states.__setitem__, p, state))
        changed = state_dicts.converted(p, state, new.has_codes(p))
        if isinstance(old.state_dtype, torch.dtype) and new.state_dtype is None:
            dtype = new.state_dtype_of(p) or p.dtype
            changed = {**changed, **{key: changed[key].to(dtype) for key in CODES if isinstance(changed.get(key), Tensor)}}
        states[p] = changed


@torch.no_grad()
def write(param: Tensor, shard: Tensor) -> None:
    param.copy_(like(param, shard) if is_dtensor(param) else shard)


def _put_back(param: Tensor, value: Tensor, state: State, entries: Mapping[str, Any]) -> None:
    write(param, value)
    state.clear()
    state.update(entries)
