"""What is decided about all gradients before a step: what they are multiplied by, and whether the step is made at all.

Clipping by the global norm (``max_grad_norm``), the loss scale of a ``torch.amp.GradScaler``, and its verdict.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor


class Prologue(NamedTuple):
    """What precedes one step: whether and how gradients are measured and clipped, and what a GradScaler says.

    With ``measures``, gradients are multiplied by min(max_norm / (norm + 1e-6), 1), as ``torch.nn.utils.clip_grad_norm_``
    does; ``norm`` is the 2-norm, or with ``largest`` the inf-norm, of all gradients seen as one vector. With
    ``skips_nonfinite`` the step is skipped where it is inf or NaN.

    ``grad_scale`` and ``found_inf`` are 0-dim float32 tensors on any device: what the loss was multiplied by, None if the
    gradients were unscaled, and whether there was an inf. The step is skipped where ``found_inf`` is not zero: a GradScaler
    adds it up over devices, so it may be any number.
    """

    measures: bool
    largest: bool = False
    max_norm: float = math.inf
    skips_nonfinite: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Control(NamedTuple):
    """What was decided, where the host computed it. On a device it is a float64 tensor of these numbers.

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
