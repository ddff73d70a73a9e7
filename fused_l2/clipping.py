"""Clipping gradients by their global norm, within the step: what ``max_grad_norm`` asks for."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clipping:
    """As ``torch.nn.utils.clip_grad_norm_`` has it: gradients are multiplied by min(max_norm / (norm + 1e-6), 1).

    ``norm`` is the ``norm_type``-norm (2 or inf) of all gradients of the optimizer, seen as one vector.
    """

    max_norm: float
    norm_type: float = 2.0
    error_if_nonfinite: bool = False
    skip_if_nonfinite: bool = False

    @property
    def largest(self) -> bool:
        return self.norm_type == math.inf

    @property
    def reads_norm(self) -> bool:
        """Whether the host has to know the norm before the step."""
        return self.error_if_nonfinite or self.skip_if_nonfinite


def make_clipping(max_norm: Any, norm_type: Any, error_if_nonfinite: bool, skip_if_nonfinite: bool) -> Clipping | None:
    """The clipping those arguments ask for, None if ``max_norm`` is None.

    Raises:
        ValueError, TypeError: if an argument is out of its range or not a number.
    """
    if error_if_nonfinite and skip_if_nonfinite:
        raise ValueError("error_if_nonfinite and skip_if_nonfinite exclude each other: choose one")
    try:
        norm_type = float(norm_type)
    except (TypeError, ValueError):
        raise TypeError(f"norm_type must be 2 or inf, got {norm_type!r}") from None
    if norm_type not in (2.0, math.inf):
        raise ValueError(f"norm_type must be 2 or inf, got {norm_type}. For others, call torch.nn.utils.clip_grad_norm_")
    if max_norm is None:
        if error_if_nonfinite or skip_if_nonfinite:
            raise ValueError("error_if_nonfinite and skip_if_nonfinite need max_grad_norm, too: inf measures and never clips")
        return None
    if isinstance(max_norm, (str, bytes)) or not hasattr(max_norm, "__float__"):
        raise TypeError(f"max_grad_norm must be a number, got {max_norm!r} of type {type(max_norm).__name__}")
    limit = float(max_norm)
    if not limit >= 0:
        raise ValueError(f"Invalid max_grad_norm: {max_norm}; expected a number >= 0, or None")
    return Clipping(limit, norm_type, bool(error_if_nonfinite), bool(skip_if_nonfinite))


# [factor, norm]: a float64 tensor on a device, or two floats.
Control = Tensor | tuple[float, float]


def on_host(measured: float, clipping: Clipping, dtype: torch.dtype) -> tuple[float, float]:
    """Factor and norm of a sum of squares (or of the largest value), each operation rounded to ``dtype``.

    The operations are clip_grad_norm_'s own, as in kernels/norms.py. Computing one of them in float64 and rounding the result
    is the same as computing it in float32 (Figueroa 1995).
    """

    def rounded(x: float) -> float:
        return ctypes.c_float(x).value if dtype is torch.float32 else x

    norm = rounded(measured if clipping.largest else math.sqrt(measured))
    factor = rounded(rounded(1 / rounded(norm + rounded(1e-6))) * rounded(clipping.max_norm))
    return (1.0 if factor > 1 else factor), norm


def combined(measured: Sequence[Tensor], clipping: Clipping, dtype: torch.dtype) -> Control:
    """The same of several sums, 0-dim and float64, on one or several devices; on the device of the first one."""
    first = measured[0].device
    together = torch.stack([m.to(first, non_blocking=True) for m in measured])
    total = together.max() if clipping.largest else together.sum()
    if first.type == "cpu":
        return on_host(float(total), clipping, dtype)
    norm = (total if clipping.largest else total.sqrt()).to(dtype)
    factor = ((norm + 1e-6).reciprocal() * clipping.max_norm).clamp(max=1.0)
    return torch.stack([factor, norm]).double()
