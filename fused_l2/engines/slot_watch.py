"""Objects whose attribute is to stay the object that it was: the shards of DTensors.

A *slot* here is CPython's (``__slots__``): a place in the memory of an object.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import sys
from collections.abc import Sequence
from operator import is_
from typing import Any, ClassVar

from ..tables.tensor_table import int64_array
from .cpu import Library


class SlotWatch:
    """Tells whether an attribute of each of these objects still is the object it was.

    A DTensor's shard is such an attribute, in a slot (``__slots__``). Reading it touches the shard's Python object, which
    nothing else in a step does: a cache miss for each tensor. The library looks at the slot alone.
    """

    def __init__(self, library: Library | None, owners: Sequence[Any], slot: str) -> None:
        self._owners, self._slot = owners, slot
        self._values = [getattr(owner, slot) for owner in owners]
        self._library = library
        kinds: list[Any] = [type(owner) for owner in owners]
        offsets = [slot_offset(kind, slot) for kind in kinds]
        if library is None or None in offsets:
            self._library = None
            return
        self._addresses = int64_array([id(owner) + (offset or 0) for owner, offset in zip(owners, offsets, strict=True)])
        self._expected = int64_array([id(value) for value in self._values])

    def holds(self) -> bool:
        if self._library is not None:
            return bool(self._library.words_hold(self._addresses, self._expected, len(self._owners)))
        return all(map(is_, [getattr(owner, self._slot) for owner in self._owners], self._values))


class _Member(ctypes.Structure):
    """CPython's PyMemberDef, as far as it matters here."""

    _fields_: ClassVar = [("name", ctypes.c_char_p), ("type", ctypes.c_int), ("offset", ctypes.c_ssize_t)]


@functools.cache
def slot_offset(of: Any, slot: str) -> int | None:
    """Where in the memory of an object a slot is, or None if there is no telling."""
    descriptor = getattr(of, slot, None)
    if sys.implementation.name != "cpython" or not inspect.ismemberdescriptor(descriptor):
        return None
    try:
        # A member descriptor is {object head, type, name, qualified name, member*}; the head is what object() consists of.
        pointer = ctypes.c_void_p.from_address(id(descriptor) + object.__basicsize__ + 3 * ctypes.sizeof(ctypes.c_void_p))
        member = _Member.from_address(pointer.value or 0)
        if member.name != slot.encode():
            return None
        return int(member.offset)
    except Exception:  # not public API: whatever goes wrong, the plain way remains
        return None
