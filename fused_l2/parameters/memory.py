"""What a tensor's memory is like."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

PLAIN_TYPES: set[type] = {Tensor, torch.nn.Parameter, torch.nn.Buffer}  # of which memory holds the values


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's memory holds its values: no subclass that wraps others, no lazy negation."""
    return has_plain_type(tensor) and not tensor.is_neg()


def has_plain_type(tensor: Tensor) -> bool:
    """Whether a tensor is of torch's own types or of a subclass that changes nothing, not of one that may wrap others."""
    kind = type(tensor)
    return kind in PLAIN_TYPES or _is_plain_type(kind)


def _is_plain_type(kind: type) -> bool:
    """Whether a subclass only adds attributes or methods: all that torch does with it, it does with its memory."""
    function, dispatch = (_function_of(kind, name) for name in ("__torch_function__", "__torch_dispatch__"))
    plain = function in _PLAIN_FUNCTIONS and dispatch is _function_of(Tensor, "__torch_dispatch__")
    if plain:
        PLAIN_TYPES.add(kind)
    return plain


def _function_of(kind: type, name: str) -> Any:
    method = getattr(kind, name)
    return getattr(method, "__func__", method)


_PLAIN_FUNCTIONS = tuple(_function_of(kind, "__torch_function__") for kind in (Tensor, torch.nn.Parameter))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlaps, in any order of dimensions."""
    if tensor.layout is not torch.strided:
        return False
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, as ``expand`` leaves them."""
    return tensor.layout is torch.strided and any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in the same order. The stride of a dimension of size 1 has no effect."""
    if a.stride() == b.stride():
        return True
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True)) or a.numel() == 0


def needs_copy(param: Tensor, grad: Tensor) -> bool:
    """Whether a gradient's memory, read in order, does not pair up with its parameter's."""
    return grad.is_neg() or not same_layout(grad, param)


def has_memory(tensor: Tensor) -> bool:
    """Whether the storage reaches as far as the shape says."""
    if tensor.numel() == 0 or tensor.is_meta or not has_plain_type(tensor):
        return True
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + last + 1) * tensor.element_size()


def why_unreadable(tensor: Tensor, param: Tensor) -> str:
    """Why a gradient or state of this parameter has no values to be read: it was left over from a function transform or a mode.
    Empty if it has."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
        return "it is a tensor of a function transform (torch.func), which has no memory of its own"
    if type(tensor).__name__ == "FakeTensor" and has_plain_type(param):
        return "it is a FakeTensor, which has no values, and the parameter is real"
    return ""


def facts_of(tensor: Tensor) -> tuple[Any, ...]:
    """All by which a tensor is still where and what it was."""
    if not has_plain_type(tensor) or tensor.layout is not torch.strided:
        return id(tensor), type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.layout
    storage = tensor.untyped_storage()
    return (*kind_of(tensor), storage.nbytes(), 0 if tensor._is_zerotensor() else tensor.data_ptr())


def kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """All of that but where it is: what another gradient has to have in common with this one."""
    if tensor.layout is not torch.strided:
        return type(tensor), tensor.dtype, tensor.device, tensor.layout, tensor.shape
    keys = torch._C._dispatch_keys(tensor).raw_repr()  # tell negated, zero, fake and functional tensors from others
    return type(tensor), tensor.dtype, tensor.device, tensor.layout, keys, tensor.shape, tensor.stride()


class Ranges:
    """Where the memory of parameters is, to find those that share some: listed twice, or tied through their storage.

    torch.optim steps such parameters one after the other; within one launch they would race.
    """

    def __init__(self) -> None:
        self._of: dict[int, tuple[int, int, int]] = {}  # by slot: start, stop, slot
        self._sorted: list[tuple[int, int, int]] = []
        self._are_disjoint = True

    def put(self, slot: int, tensor: Tensor) -> None:
        self.remove(slot)
        if tensor.device.type not in ("cpu", "cuda") or type(tensor) not in PLAIN_TYPES or tensor.numel() == 0:
            return
        if tensor.is_contiguous():
            extent = tensor.numel()
        else:
            extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        self._of[slot] = start, start + extent * tensor.element_size(), slot
        self._sorted = []

    def fill(self, slot: int, start: int, size: int) -> None:
        """A tensor fills that much memory."""
        self._of[slot] = start, start + size, slot
        self._sorted = []

    def move(self, slot: int, start: int) -> None:
        """The same tensor begins somewhere else."""
        if (known := self._of.get(slot)) is not None and known[0] != start:
            self._of[slot] = start, start + known[1] - known[0], slot
            self._sorted = []

    def remove(self, slot: int) -> None:
        if self._of.pop(slot, None) is not None:
            self._sorted = []

    @property
    def are_disjoint(self) -> bool:
        """Whether none shares memory with another."""
        if not self._sorted:
            self._sorted = sorted(self._of.values())
            self._are_disjoint = all(a[1] <= b[0] for a, b in pairwise(self._sorted))
        return self._are_disjoint

    def overlapping(self, counts: Callable[[int], bool]) -> set[int]:
        """Of the slots that count, those that share memory with an earlier one. May name one too many, never one too few."""
        if self.are_disjoint:
            return set()
        found: set[int] = set()
        end, owner = 0, -1
        for start, stop, slot in self._sorted:
            if not counts(slot):
                continue
            if start < end:
                found.add(max(slot, owner))
                owner = min(slot, owner)
                end = max(stop, end)
            else:
                end, owner = stop, slot
        return found
