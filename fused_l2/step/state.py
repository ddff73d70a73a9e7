"""Dictionaries for an optimizer's state that tell of the changes that matter to a step.

A plan (``plan.py``) holds state tensors and their addresses. Code outside the optimizer replaces such tensors freely
(offloading to another device and back, sharding, hand-written restores), and nothing in a plain dict would tell. These tell the
plan's entries, so that a step looks at those alone whose state changed. Keys that no step reads are nobody's change.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..parameters.entry import Entry
from ..tables.modes import EIGHT_BIT_NAMES, STATE_NAMES

# The entries of a parameter's state that a step reads.
KEYS = frozenset(("step", "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", *STATE_NAMES, *EIGHT_BIT_NAMES))


class ParamState(dict[str, Any]):
    """The state of one parameter: ``step``, ``momentum_buffer``, ...

    When something that a step reads is replaced or removed, the entries that ``watch`` it let go of its tensors, so that
    their memory is free at once.
    """

    _watchers: tuple[weakref.ref[Entry], ...] = ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return ParamState, (), None, None, iter(self.items())

    def copy(self) -> ParamState:
        return type(self)(self)

    __copy__ = copy

    def watch(self, entry: Entry) -> None:
        """This entry holds tensors of the state."""
        own = weakref.ref(entry)  # the same object each time
        others = [w for w in self._watchers if w is not own and w() is not None] if self._watchers else ()
        self._watchers = (*others, own)

    def put(self, new: dict[str, Any], by: Sequence[Entry]) -> None:
        """Take over what a step made, which the entries ``by`` whom hold already."""
        self._changed(by)
        super().update(new)

    def _changed(self, keep: Sequence[Entry] = ()) -> None:
        staying = []
        for w in self._watchers:
            entry = w()
            if entry is not None and any(entry is k for k in keep):
                staying.append(w)
            elif entry is not None:
                entry.let_go()
        self._watchers = tuple(staying)


class OptimizerState(defaultdict[Any, Any]):
    """The state of all parameters, ``optimizer.state``: a ``ParamState`` for each.

    ``changes`` counts how often a parameter's whole dictionary was added, replaced or removed.

    Can be rebuilt as a defaultdict is, from a factory and a mapping, and as a pytree.
    """

    changes = 0

    def __init__(self, factory: Any = None, entries: Mapping[Any, Any] | Iterable[Any] = ()) -> None:
        if factory is not None and not callable(factory):
            factory, entries = None, factory
        # Plain dicts are converted. Anything else is some library's own: it is kept, and looked through at every step.
        converted = {k: ParamState(v) if type(v) is dict else v for k, v in dict(entries).items()}
        super().__init__(ParamState, converted)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (), None, None, iter(self.items()))

    def copy(self) -> OptimizerState:
        return type(self)(self)

    __copy__ = copy

    def _changed(self, key: Any = None) -> None:
        self.changes += 1
        for state in [self.get(key)] if key is not None else self.values():
            if type(state) is ParamState:
                state._changed()


def _counting_any(base: type, name: str) -> Callable[..., Any]:
    change = getattr(base, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._changed()
        return change(self, *args, **kwargs)

    return functools.update_wrapper(method, change)


def _counting_keys(base: type, name: str, matters: Callable[[Any], bool]) -> Callable[..., Any]:
    change = getattr(base, name)

    def method(self: Any, key: Any, *args: Any) -> Any:
        if matters(key):
            self._changed(*([key] if base is defaultdict else []))
        return change(self, key, *args)

    return functools.update_wrapper(method, change)


def _is_read(key: Any) -> bool:
    return isinstance(key, str) and key in KEYS


def _is_param(key: Any) -> bool:
    return isinstance(key, Tensor)


for _class, _base, _matters in ((ParamState, dict, _is_read), (OptimizerState, defaultdict, _is_param)):
    for _name in ("__setitem__", "__delitem__", "pop", "setdefault"):
        setattr(_class, _name, _counting_keys(_base, _name, _matters))
    for _name in ("__ior__", "clear", "popitem", "update"):
        setattr(_class, _name, _counting_any(_base, _name))


def _register_pytrees() -> None:
    """As a dict and a defaultdict are, so that what walks torch.optim's states walks these."""
    pytree = torch.utils._pytree

    def register(kind: Any) -> None:
        pytree.register_pytree_node(
            kind,
            lambda found: (list(found.values()), list(found)),
            lambda values, keys: kind(zip(keys, values, strict=True)),
            serialized_type_name=f"fused_l2.{kind.__name__}",
            flatten_with_keys_fn=lambda found: ([(pytree.MappingKey(k), v) for k, v in found.items()], list(found)),
        )

    register(ParamState)
    register(OptimizerState)


_register_pytrees()
