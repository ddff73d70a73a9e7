"""Hyperparameters: as numbers, and as tensors on a CUDA device. A step reads those there, and the host does not wait for them.

The values of such tensors are looked at once, when one is first seen, to check them and to decide the shape of the computation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import engines


class DeviceValues:
    """The tensors among the hyperparameters of an optimizer that are on a CUDA device, and their values when first seen."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, float]] = {}

    def read(self, values: Sequence[Any], again: bool = False) -> tuple[Any, ...]:
        """Hyperparameters with values in place of such tensors. Waits for the device where one is new, or with ``again``."""
        return tuple(self.read(v, again) if isinstance(v, (tuple, list)) else self._value(v, again) for v in values)

    def _value(self, value: Any, again: bool) -> Any:
        if not is_on_device(value):
            return value
        if id(value) not in self._seen or again:
            self._seen[id(value)] = value, float(value)
        return self._seen[id(value)][1]

    def keep(self, groups: Iterable[Sequence[Any]]) -> None:
        """Forget the tensors that are not among these values."""
        current = {id(v) for values in groups for v in _flat(tuple(values))}
        self._seen = {key: seen for key, seen in self._seen.items() if key in current}

    def knows(self, values: tuple[Any, ...]) -> bool:
        """Whether :meth:`read` would not wait."""
        return all(id(v) in self._seen for v in _flat(values) if is_on_device(v))


def is_on_device(value: Any) -> bool:
    """Whether a hyperparameter is one number on a CUDA device."""
    return isinstance(value, Tensor) and value.numel() == 1 and engines.device_of(value).type == "cuda"


def sources(values: tuple[Any, ...], argument_of: str) -> list[int]:
    """Where each hyperparameter is on its device, in order: its address, with the lowest bit set for float64; 0 for numbers.

    Raises:
        TypeError: if one is of another dtype than float32 and float64.
    """
    found = []
    for value in _flat(values):
        if not is_on_device(value):
            found.append(0)
            continue
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"hyperparameters{argument_of} that are CUDA tensors must be float32 or float64, got {value.dtype}: {value!r}. "
                f"Convert it with .float()."
            )
        found.append(value.data_ptr() | (value.dtype is torch.float64))
    return found


def _flat(values: tuple[Any, ...]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(tuple(value))
        else:
            yield value


_LARGEST = (2 - 2.0**-23) * 2.0**127  # of float32


def number(value: Any, argument: str, where: str = "") -> float:
    """A hyperparameter as a float.

    Raises:
        TypeError: if it is not a number or a tensor of one element.
        ValueError: if it is NaN, infinite or beyond float32, in which a step computes, or a tensor of several elements.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {argument}{where} must be 1-element, got shape {tuple(value.shape)}")
    elif isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{argument}{where} must be a number, got {value!r} of type {type(value).__name__}")
    result = float(value)
    if not abs(result) <= _LARGEST:
        raise ValueError(f"Invalid {argument}{where}: {value}; expected a finite number of float32's range")
    return result


def at_least_zero(value: Any, argument: str, where: str = "", advice: str = "") -> float:
    """A hyperparameter as a float that is 0 or more, else ValueError."""
    result = number(value, argument, where)
    if result < 0:
        raise ValueError(f"Invalid {argument}{where}: {value}; expected a number >= 0{advice}")
    return result
