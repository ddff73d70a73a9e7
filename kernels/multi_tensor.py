"""One launch over many tensors: from a row of the tensor table to typed pointers, and the loops over a chunk.

A program works on one *chunk*, up to CHUNK elements of one tensor. The chunk map tells it which: the tensor's row in the low 32
bits of a word, the number of the chunk within the tensor in the high ones.

Accesses are 128 bits wide where the compiler can see that addresses and bounds allow it, and silently 32 bits otherwise. It
sees it here because the vector loop ends at a multiple of 8 elements, because CHUNK is specialized as a multiple of 16, and
because pointers from the table carry a hint. A misaligned tensor has an empty vector loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import (
    COEFFICIENT_WIDTH,
    COEFFICIENTS,
    FACTOR,
    FIRST_STEP,
    FLAGS,
    NUMEL,
    PARAM,
    SCALED,
    SKIP,
    STATE0,
    STATE1,
    STATE2,
    WIDTH,
)


@triton.jit
def step_chunk(
    rule: tl.constexpr,
    chunk_map,  # int64 [programs]
    table,  # int64 [tensors][WIDTH]
    grads,  # int64 [tensors]: addresses
    coefficients,  # opmath [coefficient rows][COEFFICIENT_WIDTH]
    CHUNK,  # a multiple of 16
    control,  # float64 [3]: factor, skip, norm; looked at with SCALED
    BUCKET_FLAGS: tl.constexpr,
    STATES: tl.constexpr,  # how many state tensors the rule has
    PARAM_DTYPE: tl.constexpr,  # of parameters and gradients
    STATE_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
):
    """Apply ``rule`` to this program's chunk."""
    word = tl.load(chunk_map + tl.program_id(0))
    tensor = word & 0xFFFFFFFF
    row = table + tensor * WIDTH
    begin = (word >> 32) * CHUNK  # 64-bit: a tensor may have more than 2^31 elements
    param = tl.load(row + PARAM)
    grad = tl.load(grads + tensor)
    addresses = param | grad
    state0 = param
    state1 = param
    state2 = param
    if STATES > 0:
        state0 = tl.load(row + STATE0)
        addresses |= state0
    if STATES > 1:
        state1 = tl.load(row + STATE1)
        addresses |= state1
    if STATES > 2:
        state2 = tl.load(row + STATE2)
        addresses |= state2
    pointers = (
        typed_pointer(param, PARAM_DTYPE) + begin,
        typed_pointer(grad, PARAM_DTYPE) + begin,
        typed_pointer(state0, STATE_DTYPE) + begin,
        typed_pointer(state1, STATE_DTYPE) + begin,
        typed_pointer(state2, STATE_DTYPE) + begin,
    )
    scalars = coefficient_row(coefficients + tl.load(row + COEFFICIENTS) * COEFFICIENT_WIDTH)
    first_step = (tl.load(row + FLAGS) & FIRST_STEP) != 0
    count = tl.minimum(tl.load(row + NUMEL) - begin, CHUNK).to(tl.int32)
    factor = 1.0
    if BUCKET_FLAGS & SCALED:
        factor = tl.load(control + FACTOR).to(scalars[0].dtype)
        count = tl.where(tl.load(control + SKIP) == 0, count, 0)
    in_vectors = tl.where((addresses & 15) == 0, count // 8 * 8, 0)
    step_range(rule, pointers, scalars, factor, first_step, 0, in_vectors, BUCKET_FLAGS, STATES, BLOCK)
    step_range(rule, pointers, scalars, factor, first_step, in_vectors, count, BUCKET_FLAGS, STATES, TAIL_BLOCK)


@triton.jit
def step_range(
    rule: tl.constexpr,
    pointers,
    scalars,
    factor,
    first_step,
    begin,
    end,
    BUCKET_FLAGS: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Apply ``rule`` to the elements from ``begin`` to ``end``, a block at a time."""
    param_at, grad_at, state0_at, state1_at, state2_at = pointers
    OPMATH: tl.constexpr = scalars[0].dtype
    lanes = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        at = start + lanes
        inside = at < end
        param = tl.load(param_at + at, mask=inside).to(OPMATH)
        grad = tl.load(grad_at + at, mask=inside).to(OPMATH)
        if BUCKET_FLAGS & SCALED:
            grad = grad * factor
        state0 = param
        state1 = param
        state2 = param
        if STATES > 0:
            state0 = tl.load(state0_at + at, mask=inside).to(OPMATH)
        if STATES > 1:
            state1 = tl.load(state1_at + at, mask=inside).to(OPMATH)
        if STATES > 2:
            state2 = tl.load(state2_at + at, mask=inside).to(OPMATH)
        param, state0, state1, state2 = rule(param, grad, state0, state1, state2, scalars, first_step, BUCKET_FLAGS)
        tl.store(param_at + at, param.to(param_at.dtype.element_ty), mask=inside)
        if STATES > 0:
            tl.store(state0_at + at, state0.to(state0_at.dtype.element_ty), mask=inside)
        if STATES > 1:
            tl.store(state1_at + at, state1.to(state1_at.dtype.element_ty), mask=inside)
        if STATES > 2:
            tl.store(state2_at + at, state2.to(state2_at.dtype.element_ty), mask=inside)


@triton.jit
def typed_pointer(address, DTYPE: tl.constexpr):
    """A pointer with the hint that it is 16-byte aligned. Where it is not, only single elements are accessed."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def coefficient_row(at):
    return (
        tl.load(at),
        tl.load(at + 1),
        tl.load(at + 2),
        tl.load(at + 3),
        tl.load(at + 4),
        tl.load(at + 5),
        tl.load(at + 6),
        tl.load(at + 7),
    )
