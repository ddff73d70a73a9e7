"""What is decided about all gradients before a step: what they are multiplied by, and whether the step is made at all.

Clipping by the global norm (``max_grad_norm``), the loss scale of a ``torch.amp.GradScaler``, and its verdict.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Prologue(NamedTuple):
    """What precedes one step: which clipping, and what a GradScaler says, 0-dim float32 tensors on any device.

    ``grad_scale`` is what the loss was multiplied by, None if the gradients were unscaled. The step is left out where
    ``found_inf`` is not zero: a GradScaler adds it up over devices, so it may be any number.
    """

    clipping: Clipping | None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @property
    def max_norm(self) -> float:
        return math.inf if self.clipping is None else self.clipping.max_norm

    @property
    def largest(self) -> bool:
        return self.clipping is not None and self.clipping.largest

    @property
    def skips_nonfinite(self) -> bool:
        return self.clipping is not None and self.clipping.skip_if_nonfinite

    @property
    def may_skip(self) -> bool:
        return self.found_inf is not None or self.skips_nonfinite


class Control(NamedTuple):
    """What came of it, where the host computed it. On a device it is a float64 tensor of these.

    Gradients are multiplied by ``factor``; nothing may change if ``skip`` is not 0; ``norm`` is of the unscaled gradients,
    which are ``inv_scale`` times the given ones.
    """

    factor: float
    skip: float
    norm: float
    inv_scale: float


FACTOR, SKIP, NORM, INV_SCALE = range(len(Control._fields))


def on_host(measured: float, prologue: Prologue, dtype: torch.dtype) -> Control:
    """The control of a sum of squares (or of the largest value); factor and norm are rounded to ``dtype``.

    The operations are those of GradScaler.unscale_ and clip_grad_norm_, as in kernels/control.py. Computing one of them in
    float64 and rounding the result is the same as computing it in float32 (Figueroa 1995).
    """

    def rounded(x: float) -> float:
        return ctypes.c_float(x).value if dtype is torch.float32 else x

    inv_scale, skip = 1.0, False
    if prologue.grad_scale is not None:
        scale = float(prologue.grad_scale)
        inv_scale = ctypes.c_float(1 / scale if scale else math.inf).value
    norm = rounded((measured if prologue.largest else math.sqrt(measured)) * inv_scale)
    shifted = rounded(norm + rounded(1e-6))
    factor = rounded(rounded(1 / shifted) * rounded(prologue.max_norm))
    if prologue.found_inf is not None:
        skip = float(prologue.found_inf) != 0
    if prologue.skips_nonfinite:
        skip |= not math.isfinite(norm)
    return Control((1.0 if factor > 1 else factor) * inv_scale, float(skip), norm, inv_scale)


def total(measured: Sequence[Tensor], largest: bool) -> Tensor:
    """Several sums (or largest values) as one, on the device of the first one."""
    together = torch.stack([m.to(measured[0].device, non_blocking=True) for m in measured])
    return together.max() if largest else together.sum()


def combined(measured: Sequence[Tensor], prologue: Prologue, dtype: torch.dtype) -> Tensor | Control:
    """The same of several sums, 0-dim and float64, on one or several devices; on the device of the first one."""
    whole = total(measured, prologue.largest)
    first = whole.device
    if first.type == "cpu":
        return on_host(float(whole), prologue, dtype)

    def here(t: Tensor) -> Tensor:
        return t.detach().reshape(()).to(device=first, dtype=torch.float32, non_blocking=True)

    norm = whole if prologue.largest else whole.sqrt()
    inv_scale = torch.ones((), dtype=torch.float64, device=first)
    if prologue.grad_scale is not None:
        inv_scale = here(prologue.grad_scale).double().reciprocal().float().double()
        norm = norm * inv_scale
    norm = norm.to(dtype)
    factor = ((norm + 1e-6).reciprocal() * prologue.max_norm).clamp(max=1.0).double() * inv_scale
    skip = torch.zeros((), dtype=torch.bool, device=first)
    if prologue.found_inf is not None:
        skip = here(prologue.found_inf) != 0
    if prologue.skips_nonfinite:
        skip = skip | ~norm.isfinite()
    return torch.stack([factor, skip.double(), norm.double(), inv_scale])
