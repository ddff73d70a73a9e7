"""Dictionaries for an optimizer's state that tell when an entry was replaced.

A plan (``buckets.py``) holds addresses of state tensors. Code outside the optimizer replaces such tensors freely (offloading
to another device and back, sharding, hand-written restores), and nothing in a plain dict would tell. These dictionaries
count every replacement in one number for the whole process: a plan compares it each step, at no cost per tensor.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any


class Revision:
    """How often any state entry of any optimizer was set or removed."""

    count = 0


def _counting(base: type, name: str) -> Callable[..., Any]:
    change = getattr(base, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        Revision.count += 1
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
        Revision.count += 1

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (), None, None, iter(self.items()))

    def copy(self) -> OptimizerState:
        return type(self)(self)

    __copy__ = copy


for _name in _CHANGES:
    setattr(ParamState, _name, _counting(dict, _name))
    setattr(OptimizerState, _name, _counting(defaultdict, _name))
