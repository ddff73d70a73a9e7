"""The step, one launch over many tensors: from a row of the tensor table to typed pointers, and the loops over a chunk.

A program works on one *chunk*, up to CHUNK elements of one tensor. The chunk map tells it which: the tensor's row in the low 32
bits of a word, the number of the chunk within the tensor in the high ones.

Accesses are 128 bits wide where the compiler can see that addresses and bounds allow it, and silently 32 bits otherwise. It
sees it here because the vector loop ends at a multiple of 8 elements, because CHUNK is specialized as a multiple of 16, and
because pointers from the table carry a hint. A misaligned tensor has an empty vector loop: the other one takes all of it, two
elements a thread, so that enough of them are under way.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..tables.tensor_table import Rule
from .eight_bits import decode_positive, decode_signed, encode_positive, encode_signed
from .layout import (
    ADAM,
    COEFFICIENT_WIDTH,
    COEFFICIENTS,
    EIGHT_BIT,
    FACTOR,
    FIGURES,
    FIRST_STEP,
    FLAGS,
    GROUP,
    KAHAN,
    KEEPS,
    KEPT,
    KEY,
    MASTER,
    NUMEL,
    PARAM,
    RANDOM,
    REMAINDER,
    REMAINDER8,
    SCALE0,
    SCALE1,
    SCALED,
    SKIP,
    STATE0,
    STATE1,
    STATE2,
    STATISTICS,
    STEP_COUNT,
    STOCHASTIC,
    WIDTH,
)
from .low_precision import compensation, random_bits, rounded_stochastically, split, split24, step_key, widened
from .sums import pairwise
from .update_rules import adam, sgd


def _name(specialization: Any) -> str:
    """What profilers show: fused_l2_sgd or fused_l2_adam."""
    return f"fused_l2_{Rule(specialization.constants['RULE']).name.lower()}"


@triton.jit(repr=_name)
def fused_l2_step(
    chunk_map,  # int64 [programs]
    table,  # int64 [tensors][WIDTH]
    CHUNK,  # a multiple of 16
    partials,  # float64 [programs][FIGURES]; written with STATISTICS
    grads,  # int64 [tensors]: addresses
    coefficients,  # opmath [coefficient rows][COEFFICIENT_WIDTH]
    control,  # float64: factor, skip, ...; looked at with SCALED
    RULE: tl.constexpr,
    BUCKET_FLAGS: tl.constexpr,
    STATES: tl.constexpr,  # how many state tensors the rule has
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    KEPT_DTYPE: tl.constexpr,  # of what a low-precision flag keeps beside the parameter
    BLOCK: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
):
    """Apply the rule to this program's chunk."""
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
    kept = param
    if BUCKET_FLAGS & KEEPS:
        kept = tl.load(row + KEPT)
        addresses |= kept
    pointers = (
        typed_pointer(param, PARAM_DTYPE) + begin,
        typed_pointer(grad, GRAD_DTYPE) + begin,
        typed_pointer(state0, STATE_DTYPE) + begin,
        typed_pointer(state1, STATE_DTYPE) + begin,
        typed_pointer(state2, STATE_DTYPE) + begin,
        typed_pointer(kept, KEPT_DTYPE) + begin,
    )
    # Where tensors are misaligned, the gradients of a bucket's views above all, and for what is left of the others.
    single_elements = (
        bare_pointer(param, begin, PARAM_DTYPE),
        bare_pointer(grad, begin, GRAD_DTYPE),
        bare_pointer(state0, begin, STATE_DTYPE),
        bare_pointer(state1, begin, STATE_DTYPE),
        bare_pointer(state2, begin, STATE_DTYPE),
        bare_pointer(kept, begin, KEPT_DTYPE),
    )
    scales = (param, param)
    if BUCKET_FLAGS & EIGHT_BIT:
        scale0 = tl.load(row + SCALE0).to(tl.pointer_type(tl.uint8)) + begin // GROUP
        scale1 = scale0
        if STATES > 1:
            scale1 = tl.load(row + SCALE1).to(tl.pointer_type(tl.uint8)) + begin // GROUP
        scales = (scale0, scale1)
    coefficients_at = coefficients + tl.load(row + COEFFICIENTS) * COEFFICIENT_WIDTH
    scalars = coefficient_row(coefficients_at)
    random = (tl.program_id(0).to(tl.uint32), tl.program_id(0).to(tl.uint32))
    if BUCKET_FLAGS & RANDOM:
        word = tl.load(row + KEY)
        random = (step_key(word, tl.load(coefficients_at + STEP_COUNT)), ((word >> 32) + begin).to(tl.uint32))
    first_step = (tl.load(row + FLAGS) & FIRST_STEP) != 0
    count = tl.minimum(tl.load(row + NUMEL) - begin, CHUNK).to(tl.int32)
    factor = 1.0
    is_made = True
    if BUCKET_FLAGS & SCALED:
        factor = tl.load(control + FACTOR).to(scalars[0].dtype)
        is_made = tl.load(control + SKIP) == 0
        if not BUCKET_FLAGS & STATISTICS:
            count = tl.where(is_made, count, 0)
    in_vectors = tl.where((addresses & 15) == 0, count // 8 * 8, 0)
    a = step_range(
        pointers, scales, scalars, random, factor, is_made, first_step, 0, in_vectors, RULE, BUCKET_FLAGS, STATES, BLOCK
    )
    b = step_range(
        single_elements,
        scales,
        scalars,
        random,
        factor,
        is_made,
        first_step,
        in_vectors,
        count,
        RULE,
        BUCKET_FLAGS,
        STATES,
        TAIL_BLOCK,
    )
    if BUCKET_FLAGS & STATISTICS:
        out = partials + tl.program_id(0) * FIGURES
        at = tl.arange(0, 1)
        tl.store(out + at, a[0] + b[0])
        tl.store(out + 1 + at, a[1] + b[1])
        tl.store(out + 2 + at, a[2] + b[2])
        stepped = a[1] + b[1]
        if BUCKET_FLAGS & SCALED:
            stepped = tl.where(is_made, stepped, 0.0)
        tl.store(out + 4 + at, stepped)
        tl.store(out + 5 + at, a[3] + b[3])
        # Gradients are looked at once more only if their sum is not finite. Of float64 ones finite ones overflow, too.
        tl.debug_barrier()
        total = tl.load(out)
        suspects = tl.where(total - total == 0, 0, count)
        tl.store(out + 3 + at, count_nonfinite(single_elements[1], suspects, TAIL_BLOCK))


@triton.jit
def step_range(
    pointers,
    scales,  # of 8-bit states
    scalars,
    random,  # key and first element; looked at with RANDOM
    factor,
    is_made,
    first_step,
    begin,
    end,
    RULE: tl.constexpr,
    BUCKET_FLAGS: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Apply the rule to the elements from ``begin`` to ``end``, a block at a time. With STATISTICS a step that is not made is
    measured all the same; returned are the sums of the squares of gradients, parameters before the step, and updates, and of
    the products of parameters before the step with what rounding to 16 bits added."""
    param_at, grad_at, state0_at, state1_at, state2_at, kept_at = pointers
    random_key, first_element = random
    OPMATH: tl.constexpr = scalars[0].dtype
    # With a master or a remainder nothing is rounded away.
    IS_HALF: tl.constexpr = param_at.dtype.element_ty.primitive_bitwidth == 16
    ROUNDS: tl.constexpr = IS_HALF and BUCKET_FLAGS & STATISTICS and not BUCKET_FLAGS & (MASTER | REMAINDER)
    scale0_at, scale1_at = scales
    if BUCKET_FLAGS & EIGHT_BIT:
        # A group is a row, which the threads of a warp share. Where a loop ends, groups do.
        rows = tl.arange(0, BLOCK // GROUP)
        lanes = rows[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    else:
        lanes = tl.arange(0, BLOCK)
    if BUCKET_FLAGS & STATISTICS:
        grads = tl.full(lanes.shape, 0.0, tl.float64)
        params = tl.full(lanes.shape, 0.0, tl.float64)
        updates = tl.full(lanes.shape, 0.0, tl.float64)
    if ROUNDS:
        returned = tl.full(lanes.shape, 0.0, tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + lanes
        inside = at < end
        written = inside
        raw = tl.load(param_at + at, mask=inside)
        kept = raw
        if BUCKET_FLAGS & KEEPS:
            kept = tl.load(kept_at + at, mask=inside)
        param = raw
        if BUCKET_FLAGS & KEEPS:
            param = widened(raw, kept, BUCKET_FLAGS)
        param = param.to(OPMATH)
        grad = tl.load(grad_at + at, mask=inside).to(OPMATH)
        if BUCKET_FLAGS & STATISTICS:
            before = param
            grads += square(grad, inside)
            params += square(param, inside)
            if BUCKET_FLAGS & SCALED:
                written = at < tl.where(is_made, end, 0)
        if BUCKET_FLAGS & SCALED:
            grad = grad * factor
        state0 = param
        state1 = param
        state2 = param
        if BUCKET_FLAGS & EIGHT_BIT:
            group = start // GROUP + rows
            is_group = group < end // GROUP
            codes = tl.load(state0_at + at, mask=inside, other=0)
            state0 = decode_signed(codes, tl.load(scale0_at + group, mask=is_group, other=0))
            if STATES > 1:
                codes = tl.load(state1_at + at, mask=inside, other=0)
                state1 = decode_positive(codes, tl.load(scale1_at + group, mask=is_group, other=0))
        elif STATES > 0:
            state0 = tl.load(state0_at + at, mask=inside).to(OPMATH)
        if STATES > 1 and not BUCKET_FLAGS & EIGHT_BIT:
            state1 = tl.load(state1_at + at, mask=inside).to(OPMATH)
        if STATES > 2:
            state2 = tl.load(state2_at + at, mask=inside).to(OPMATH)
        if RULE == ADAM:
            param, state0, state1, state2 = adam(param, grad, state0, state1, state2, scalars, first_step, BUCKET_FLAGS)
        else:
            param, state0, state1, state2 = sgd(param, grad, state0, state1, state2, scalars, first_step, BUCKET_FLAGS)
        if BUCKET_FLAGS & RANDOM:
            bits = random_bits(first_element + at.to(tl.uint32), random_key)
        if BUCKET_FLAGS & REMAINDER:
            stored, kept = split(param)
        elif BUCKET_FLAGS & REMAINDER8:
            stored, kept = split24(param, bits)
        elif BUCKET_FLAGS & STOCHASTIC:
            stored = rounded_stochastically(param, bits, param_at.dtype.element_ty)
        else:
            stored = param.to(param_at.dtype.element_ty)
        if BUCKET_FLAGS & MASTER:
            kept = param
        if BUCKET_FLAGS & KAHAN:
            kept = compensation(param, stored, bits)
        tl.store(param_at + at, stored, mask=written)
        if BUCKET_FLAGS & KEEPS:
            tl.store(kept_at + at, kept, mask=written)
        if BUCKET_FLAGS & STATISTICS:
            after = stored
            if BUCKET_FLAGS & KEEPS:
                after = widened(stored, kept, BUCKET_FLAGS)
            updates += square(after.to(OPMATH) - before, written)
            if ROUNDS:
                added = tl.where(written, after.to(OPMATH) - param, 0.0).to(tl.float64)
                returned += tl.where(written, before, 0.0).to(tl.float64) * added
        if BUCKET_FLAGS & EIGHT_BIT:
            is_written = is_group
            if BUCKET_FLAGS & STATISTICS and BUCKET_FLAGS & SCALED:
                is_written = group < tl.where(is_made, end, 0) // GROUP
            codes, scale = encode_signed(state0, bits)
            tl.store(state0_at + at, codes, mask=written)
            tl.store(scale0_at + group, scale, mask=is_written)
            if STATES > 1:
                codes, scale = encode_positive(state1, bits)
                tl.store(state1_at + at, codes, mask=written)
                tl.store(scale1_at + group, scale, mask=is_written)
        elif STATES > 0:
            tl.store(state0_at + at, state0.to(state0_at.dtype.element_ty), mask=written)
        if STATES > 1 and not BUCKET_FLAGS & EIGHT_BIT:
            tl.store(state1_at + at, state1.to(state1_at.dtype.element_ty), mask=written)
        if STATES > 2:
            tl.store(state2_at + at, state2.to(state2_at.dtype.element_ty), mask=written)
    if ROUNDS:
        return summed(grads), summed(params), summed(updates), summed(returned)
    elif BUCKET_FLAGS & STATISTICS:
        return summed(grads), summed(params), summed(updates), 0.0
    else:
        return 0.0, 0.0, 0.0, 0.0


@triton.jit
def summed(sums):
    return pairwise(tl.reshape(sums, (sums.numel,)), False)


@triton.jit
def square(x, inside):
    wide = tl.where(inside, x, 0.0).to(tl.float64)
    return wide * wide


@triton.jit
def count_nonfinite(grad_at, count, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    found = tl.full((BLOCK,), 0.0, tl.float64)
    for start in range(0, count, BLOCK):
        grad = tl.load(grad_at + start + lanes, mask=start + lanes < count, other=0.0).to(tl.float64)
        found += tl.where(grad - grad == 0, 0.0, 1.0)
    return pairwise(found, False)


@triton.jit
def typed_pointer(address, DTYPE: tl.constexpr):
    """A pointer with the hint that it is 16-byte aligned."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def bare_pointer(address, begin, DTYPE: tl.constexpr):
    """A pointer to element ``begin`` of which the compiler knows nothing: threads take elements by turns, one at a time.

    The sum is one of integers: triton 3.6 takes two pointers made of one integer for the same, and forgets the hint."""
    return (address + begin * (DTYPE.primitive_bitwidth // 8)).to(tl.pointer_type(DTYPE))


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
