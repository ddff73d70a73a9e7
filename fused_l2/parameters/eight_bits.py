"""8-bit states of a parameter: which parameters have them, how codes and scales lie in memory, and float32 values of them.

:mod:`fused_l2.reference` defines codes and scales. Codes have the parameter's shape and lie in memory as it does. A scale is
shared by the GROUP elements that lie in a row, none of which crosses a slice of dimension 0: so a shard of dimension 0 holds
whole groups, and the scales, of shape [shape[0], elements of a slice / GROUP], are cut at the same rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..tables.modes import CODES, SCALES
from ..tables.tensor_table import GROUP
from .memory import is_dense
from .shards import is_dtensor, like, local

LEAST = 4096  # elements; of smaller tensors there is nothing to save


def fits(param: Tensor) -> bool:
    """Whether this parameter's states are 8-bit codes where those are asked for; the same in all processes that share it.

    That is so for a floating-point tensor of at least 4096 elements whose slices along dimension 0 fill their memory one after
    the other and have a multiple of 32 elements. A DTensor may be cut along dimension 0; along dimension 1 if it has two, into
    multiples of 32.
    """
    if param.dim() < 2 or param.numel() < LEAST or not param.is_floating_point() or param.dtype is torch.float64:
        return False
    if param.numel() // param.shape[0] % GROUP:
        return False
    if is_dtensor(param) and not _is_cut_between_groups(param):
        return False
    here = local(param)
    return is_dense(here) and (here.shape[0] <= 1 or here.numel() == 0 or here.stride(0) == here.numel() // here.shape[0])


def _is_cut_between_groups(param: Any) -> bool:
    parts = 1
    for i, placement in enumerate(param.placements):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None or placement.is_partial() or dim > 1 or (dim == 1 and (param.dim() != 2 or parts > 1)):
            return False
        if dim == 1:
            parts = param.device_mesh.size(i)
    return -(-param.shape[-1] // parts) % GROUP == 0 if parts > 1 else True


def scale_shape(param: Tensor) -> tuple[int, int]:
    """The shape of the scales of a parameter's codes."""
    return param.shape[0], math.prod(param.shape[1:]) // GROUP


def empty_state(param: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of zeros."""
    codes = torch.zeros_like(local(param), dtype=torch.uint8)
    return wrapped(param, codes, codes.new_zeros(codes.numel() // GROUP))


def wrapped(param: Any, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a parameter's shard, as the tensors of its state."""
    shape = scale_shape(local(param))
    scales = scales.view(shape)
    if not is_dtensor(param):
        return codes, scales
    return like(param, codes), like(param, scales, scale_shape(param))


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory: a view."""
    return tensor.as_strided((tensor.numel(),), (1,))


def arranged(values: Tensor, param: Tensor) -> Tensor:
    """Float32 values that lie in memory as a dense parameter does, whose groups are of what lies in a row."""
    if values.dtype is torch.float32 and values.stride() == param.stride():
        return values
    return torch.empty_like(param, dtype=torch.float32).copy_(values)


def encode(name: str, values: Tensor, random: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales, [groups], of a dense float32 tensor, the state ``name``. ``random``: 32 bits for each element in the
    order of memory, or None to round to nearest."""
    of = reference.encode_positive if name == "exp_avg_sq" else reference.encode_signed
    codes = torch.empty_like(values, dtype=torch.uint8)
    scales = codes.new_empty(values.numel() // GROUP)
    for here in _blocks(scales.numel()):
        bits = None if random is None else _groups(random)[here]
        _groups(codes)[here], scales[here] = of(_groups(values)[here], bits)
    return codes, scales


def decode(name: str, codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 values of dense codes and their scales; they lie in memory as the codes do."""
    of = reference.decode_positive if name == "exp_avg_sq" else reference.decode_signed
    values, flat = torch.empty_like(codes, dtype=torch.float32), scales.flatten()
    for here in _blocks(flat.numel()):
        _groups(values)[here] = of(_groups(codes)[here], flat[here])
    return values


def _groups(tensor: Tensor) -> Tensor:
    return in_memory_order(tensor).view(-1, GROUP) if tensor.numel() else tensor.reshape(0, GROUP)


def _blocks(groups: int) -> list[slice]:
    """So many at a time that what is made on the way takes some megabytes."""
    return [slice(begin, min(begin + 8192, groups)) for begin in range(0, groups, 8192)]


def to_codes(param: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state with codes and scales instead of its moments and momentum, rounded to nearest."""
    found = {}
    for key, value in state.items():
        if key not in CODES or not isinstance(value, Tensor):
            found[key] = value
            continue
        codes, scales = encode(key, arranged(local(value), local(param)), None)
        found[CODES[key]], found[SCALES[key]] = wrapped(param, codes, scales)
    return found


def to_float32(param: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state with float32 moments and momentum instead of codes and scales: exactly what they stand for."""
    found = {key: value for key, value in state.items() if key not in SCALES.values()}
    for name, key in CODES.items():
        codes = found.pop(key, None)
        if codes is not None:
            values = decode(name, local(codes), local(state[SCALES[name]]))
            found[name] = like(param, values) if is_dtensor(param) else values
    return found
