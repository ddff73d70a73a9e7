"""Dictionaries for an optimizer's state that tell when an entry was replaced.

A plan (``buckets.py``) holds state tensors and their addresses. Code outside the optimizer replaces such tensors freely
(offloading to another device and back, sharding, hand-written restores), and nothing in a plain dict would tell. Any change of
these dictionaries drops every plan there is: the next step makes a new one, and the replaced tensor's memory is free at once.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class HasPlan(Protocol):
    """An optimizer, as far as this module knows one."""

    def drop_plan(self) -> None: ...


_planned: weakref.WeakSet[Any] = weakref.WeakSet()


def tell_of_changes(optimizer: HasPlan) -> None:
    """From now on until its next change, a change of any state drops this optimizer's plan."""
    _planned.add(optimizer)


def state_changed() -> None:
    """Some state entry was set or removed. Entries are made once per parameter, so this is rare."""
    while _planned:
        try:
            optimizer = _planned.pop()
        except KeyError:  # the last one has just been collected, or taken by another thread
            return
        optimizer.drop_plan()


def _telling(base: type, name: str) -> Callable[..., Any]:
    change = getattr(base, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        state_changed()
        return change(self, *args, **kwargs)

    return functools.update_wrapper(method, change)


_CHANGES = ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update")


class ParamState(dict[str, Any]):
    """The state of one parameter: ``step``, ``momentum_buffer``, ..."""


class OptimizerState(defaultdict[Any, Any]):
    """The state of all parameters, ``optimizer.state``."""

    def __init__(self, entries: Mapping[Any, Any] | None = None) -> None:
        # Plain dicts are converted. Anything else is some library's own: it is kept, and looked through at every step.
        converted = {k: ParamState(v) if type(v) is dict else v for k, v in (entries or {}).items()}
        super().__init__(ParamState, converted)
        state_changed()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (), None, None, iter(self.items()))

    def copy(self) -> OptimizerState:
        return type(self)(self)

    __copy__ = copy


for _name in _CHANGES:
    setattr(ParamState, _name, _telling(dict, _name))
    setattr(OptimizerState, _name, _telling(defaultdict, _name))
