"""Has a tensor moved or changed its kind since we looked? Asked of every tensor at every step, so it has to be cheap.

torch has fast accessors for this, but they are not public Python API: tensor handles for its stable C ABI
(``torch._C._aoti``) and dynamo's tensor guards. Each is used only where it exists and passes a check of its own; the plain
Python way, slower by a microsecond a tensor, is the definition of both.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..tables.tensor_table import int64_array
from .cpu import Library


class Watch:
    """Tells whether ``tensors`` still have the address, storage, shape, strides and dtype they had, and ``memory`` theirs."""

    def __init__(self, tensors: Sequence[Tensor], memory: Sequence[Tensor]) -> None:
        self._tensors = [*tensors, *memory]
        self._facts = [self._facts_of(t) for t in self._tensors]

    @staticmethod
    def _facts_of(t: Tensor) -> tuple[Any, ...]:
        return t.data_ptr(), t.untyped_storage().nbytes(), t.shape, t.stride(), t.dtype, t.device

    def holds(self) -> bool:
        return [self._facts_of(t) for t in self._tensors] == self._facts


class NativeWatch(Watch):
    """The same through the C++ library and torch's stable C ABI: some nanoseconds a tensor."""

    def __init__(self, library: Library, tensors: Sequence[Tensor], memory: Sequence[Tensor]) -> None:
        self._library = library
        watched = [*((t, False) for t in tensors), *((t, True) for t in memory)]
        self._count = len(watched)
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([t for t, _ in watched])
        # The capsules own nothing: the handles they hold are ours to release.
        self._handles = int64_array([_capsule_pointer()(capsule, None) for capsule in capsules])
        self._watches = (ctypes.c_int64 * max(sum(5 + 2 * t.dim() for t, _ in watched), 1))()
        self._address = ctypes.addressof(self._watches)
        end, self._valid = self._address, True
        for handle, (_, memory_only) in zip(self._handles, watched, strict=True):
            length = library.make_watch(handle, memory_only, end)
            self._valid &= length > 0
            end += 8 * length

    def holds(self) -> bool:
        return self._valid and bool(self._library.watches_hold(self._address, self._count))

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self._library.release(self._handles, self._count)


@functools.cache
def _capsule_pointer() -> Callable[[Any, None], int]:
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.argtypes, get_pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    return get_pointer


def make_watch(library: Library | None, tensors: Sequence[Tensor], memory: Sequence[Tensor]) -> Watch:
    """A watch over these tensors as they are now; of those in ``memory`` only address and storage matter."""
    if library is not None and library.has_tensors and _native_watch_works(library):
        return NativeWatch(library, tensors, memory)
    return Watch(tensors, memory)


@functools.cache
def _native_watch_works(library: Library) -> bool:
    """Whether the accessors of this torch tell apart what has to be told apart."""
    try:
        moved, reshaped, still = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)
        watches = [NativeWatch(library, [t], [still]) for t in (moved, reshaped, still)]
        if not all(watch.holds() for watch in watches):
            return False
        moved.data = moved.data.clone()
        reshaped.data = reshaped.data.view(3, 2)
        return [watch.holds() for watch in watches] == [False, False, True]
    except Exception:  # not public API: whatever goes wrong, the plain way remains
        return False


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


Guard = Callable[[Sequence[Tensor]], bool]


def python_guard(tensors: Sequence[Tensor]) -> Guard:
    """Tells of other tensors, one for one, whether they have the kind, shape and strides of these."""

    def facts(t: Tensor) -> tuple[Any, ...]:
        return type(t), t.dtype, t.device, t.layout, t.is_neg(), t.requires_grad, t.shape, t.stride()

    expected = [facts(t) for t in tensors]

    def guard(others: Sequence[Tensor]) -> bool:
        return len(others) == len(expected) and [facts(t) for t in others] == expected

    return guard


def _dynamo_guard(tensors: Sequence[Tensor]) -> Guard:
    from torch._C._dynamo.guards import TensorGuards  # type: ignore[import-not-found, unused-ignore]

    count = len(tensors)
    check = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check

    def guard(others: Sequence[Tensor]) -> bool:
        return len(others) == count and bool(check(*others))

    return guard


@functools.cache
def _dynamo_guard_works() -> bool:
    """Whether this torch has dynamo's guards and they tell apart what has to be told apart."""
    same, known = torch.zeros(2, 3), torch.zeros(2, 3)
    different = (
        torch.zeros(3, 2),
        torch.zeros(3, 2).t(),
        torch.zeros(1, 3).expand(2, 3),
        torch.zeros(2, 3, dtype=torch.bfloat16),
        torch.zeros(2, 3, device="meta"),
        torch.zeros(2, 3).to_sparse(),
        torch._neg_view(torch.zeros(2, 3)),
        torch.nn.Parameter(torch.zeros(2, 3)),
    )
    try:
        guard = _dynamo_guard([known])
        return guard([same]) and not any(guard([t]) for t in different) and not guard([])
    except Exception:  # not public API: whatever goes wrong, the plain way remains
        return False


def gradient_guard(tensors: Sequence[Tensor]) -> Guard:
    """Tells whether the gradients of a later step have the kind, shape and strides of these, one for one."""
    if not tensors:
        return lambda others: not others
    return _dynamo_guard(tensors) if _dynamo_guard_works() else python_guard(tensors)
