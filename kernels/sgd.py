"""SGD: one launch for all tensors of a bucket."""

from __future__ import annotations

import triton
import triton.language as tl

from .multi_tensor import step_chunk
from .update_rules import sgd


@triton.jit
def fused_l2_sgd(
    chunk_map,
    table,
    grads,
    coefficients,
    CHUNK,
    control,
    partials,
    FLAGS: tl.constexpr,
    STATES: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    KEPT_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
):
    step_chunk(
        sgd, chunk_map, table, grads, coefficients, CHUNK, control, partials,
        FLAGS, STATES, PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, KEPT_DTYPE, BLOCK, TAIL_BLOCK,
    )  # fmt: skip
