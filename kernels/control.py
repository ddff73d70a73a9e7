"""What precedes a step on the device: the norm's end, the factor of all gradients, and whether the step is made.

``fused_l2/tables/control.py`` has the same operations for the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import FACTOR, INV_SCALE, LANES, NORM, SKIP
from .sums import larger, pairwise
from .update_rules import divide


@triton.jit
def fused_l2_control(
    partials,  # float64 [COUNT]: what fused_l2_measure_grads left
    control,  # float64: factor, skip, norm, inv_scale
    grad_scale,  # address of a float32, or 0
    found_inf,  # address of a float32, or 0
    COUNT,
    skips_nonfinite,  # 1: a norm that is not finite skips the step
    max_norm: tl.float64,
    LARGEST: tl.constexpr,
    OPMATH: tl.constexpr,
):
    """factor = min(max_norm / (norm + 1e-6), 1) / grad_scale, in the operations of clip_grad_norm_ and GradScaler.unscale_."""
    lanes = tl.arange(0, LANES)
    sums = tl.full((LANES,), 0.0, tl.float64)
    for start in range(0, COUNT, LANES):
        at = start + lanes
        value = tl.load(partials + at, mask=at < COUNT, other=0.0)
        sums = larger(sums, value) if LARGEST else sums + value
    measured = pairwise(sums, LARGEST)
    if not LARGEST:
        measured = tl.sqrt(measured)

    at = tl.arange(0, 1)
    scale = tl.load(grad_scale.to(tl.int64).to(tl.pointer_type(tl.float32)) + at, mask=at < (grad_scale != 0), other=1.0)
    inv_scale = (1.0 / scale.to(tl.float64)).to(tl.float32).to(tl.float64)
    overflowed = tl.load(found_inf.to(tl.int64).to(tl.pointer_type(tl.float32)) + at, mask=at < (found_inf != 0), other=0.0)

    norm = (measured * inv_scale).to(OPMATH)
    limit = tl.full((1,), max_norm, tl.float64).to(OPMATH)
    factor = divide(tl.full((1,), 1.0, OPMATH), norm + 1e-6) * limit
    factor = tl.where(factor > 1, 1.0, factor)  # NaN stays NaN
    is_finite = norm - norm == 0
    skip = (overflowed != 0) | ((skips_nonfinite != 0) & (is_finite == 0))
    tl.store(control + FACTOR + at, factor.to(tl.float64) * inv_scale)
    tl.store(control + SKIP + at, skip.to(tl.float64))
    tl.store(control + NORM + at, norm.to(tl.float64))
    tl.store(control + INV_SCALE + at, inv_scale)
