"""The coefficient rows of a step, computed on the device: for step counts and hyperparameters that the host does not know.

``fused_l2/tables/coefficients.py`` has the same expressions for the host, and the bits agree once they are rounded to float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import (
    ADAM,
    ADAM_BETA1,
    ADAM_BETA2,
    ADAM_DECAY_RULE,
    ADAM_EPS,
    ADAM_LR,
    ADAM_MAX_LR,
    ADAM_WEIGHT_DECAY,
    COEFFICIENT_WIDTH,
    CORRECTED,
    DECOUPLED,
    FULLY_DECOUPLED,
    NUMBERS,
    RANDOM,
    RANDOM_STEPS,
    ROW_BETA2,
    ROW_BIAS_CORRECTION2_SQRT,
    ROW_DECAY,
    ROW_EPS,
    ROW_MOMENTUM,
    ROW_NEG_LR,
    ROW_NEG_STEP_SIZE,
    ROW_ONE_MINUS_BETA1,
    ROW_ONE_MINUS_BETA2,
    ROW_ONE_MINUS_DAMPENING,
    ROW_WEIGHT_DECAY,
    SCALED,
    SGD_DAMPENING,
    SGD_DECAY_RULE,
    SGD_LR,
    SGD_MAX_LR,
    SGD_MOMENTUM,
    SGD_WEIGHT_DECAY,
    SKIP,
    STEP_COUNT,
)
from .sums import larger


@triton.jit
def fused_l2_coefficients(
    groups,  # int64 [COUNT]: the row of `numbers` of each tensor
    counters,  # int64 [COUNT]: addresses of step counters, float32 or (random bits) float64; 0 without a gradient
    coefficients,  # opmath [COUNT][COEFFICIENT_WIDTH]
    COUNT,
    numbers,  # float64 [.][NUMBERS]: hyperparameters
    sources,  # int64 [.][NUMBERS]: where they are on the device instead, or 0. The lowest bit is set if a float64 is there.
    control,  # looked at with SCALED
    RULE: tl.constexpr,
    BUCKET_FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row and one count per tensor. A skipped step counts nothing."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < COUNT
    first = tl.load(groups + tensor, mask=inside, other=0) * NUMBERS
    out = coefficients + tensor * COEFFICIENT_WIDTH
    counts: tl.constexpr = RULE == ADAM or BUCKET_FLAGS & RANDOM
    if counts:
        address = tl.load(counters + tensor, mask=inside, other=0)
        is_made = inside & (address != 0)  # a tensor without a gradient counts nothing
        COUNTER: tl.constexpr = tl.float64 if BUCKET_FLAGS & RANDOM else tl.float32
        counter = address.to(tl.pointer_type(COUNTER))
        steps = tl.load(counter, mask=is_made, other=0.0) + 1  # float32 stands still at 2^24, as torch's does
        count = tl.minimum(steps, 1073741824.0).to(tl.int32)
        put(out, STEP_COUNT, count & (RANDOM_STEPS - 1), inside)
        if BUCKET_FLAGS & SCALED:
            is_made = is_made & (tl.load(control + SKIP) == 0)
        tl.store(counter, steps, mask=is_made)
    if RULE == ADAM:
        lr = number(numbers, sources, first + ADAM_LR, inside)
        beta1 = number(numbers, sources, first + ADAM_BETA1, inside)
        beta2 = number(numbers, sources, first + ADAM_BETA2, inside)
        eps = number(numbers, sources, first + ADAM_EPS, inside)
        weight_decay = number(numbers, sources, first + ADAM_WEIGHT_DECAY, inside)
        bias_correction1 = 1 - power(beta1, count)
        bias_correction2 = 1 - power(beta2, count)
        max_lr = number(numbers, sources, first + ADAM_MAX_LR, inside)
        rule = number(numbers, sources, first + ADAM_DECAY_RULE, inside)
        put(out, ROW_WEIGHT_DECAY, coupled_decay(lr, weight_decay, max_lr, rule, BUCKET_FLAGS), inside)
        put(out, ROW_DECAY, decay_factor(lr, weight_decay, max_lr, rule, BUCKET_FLAGS), inside)
        put(out, ROW_ONE_MINUS_BETA1, 1 - beta1, inside)
        put(out, ROW_BETA2, beta2, inside)
        put(out, ROW_ONE_MINUS_BETA2, 1 - beta2, inside)
        put(out, ROW_BIAS_CORRECTION2_SQRT, tl.sqrt(bias_correction2), inside)
        put(out, ROW_EPS, eps, inside)
        put(out, ROW_NEG_STEP_SIZE, lr / bias_correction1 * -1.0, inside)
    else:
        lr = number(numbers, sources, first + SGD_LR, inside)
        momentum = number(numbers, sources, first + SGD_MOMENTUM, inside)
        dampening = number(numbers, sources, first + SGD_DAMPENING, inside)
        weight_decay = number(numbers, sources, first + SGD_WEIGHT_DECAY, inside)
        max_lr = number(numbers, sources, first + SGD_MAX_LR, inside)
        rule = number(numbers, sources, first + SGD_DECAY_RULE, inside)
        put(out, ROW_WEIGHT_DECAY, coupled_decay(lr, weight_decay, max_lr, rule, BUCKET_FLAGS), inside)
        put(out, ROW_DECAY, decay_factor(lr, weight_decay, max_lr, rule, BUCKET_FLAGS), inside)
        put(out, ROW_MOMENTUM, momentum, inside)
        put(out, ROW_ONE_MINUS_DAMPENING, 1 - dampening, inside)
        put(out, ROW_NEG_LR, lr * -1.0, inside)


@triton.jit
def coupled_decay(lr, weight_decay, max_lr, rule, BUCKET_FLAGS: tl.constexpr):
    if BUCKET_FLAGS & DECOUPLED:
        return weight_decay
    else:
        return tl.where(rule == CORRECTED, lr / max_lr * weight_decay, weight_decay)


@triton.jit
def decay_factor(lr, weight_decay, max_lr, rule, BUCKET_FLAGS: tl.constexpr):
    if BUCKET_FLAGS & DECOUPLED:
        share = lr / max_lr
        rate = tl.where(rule == FULLY_DECOUPLED, share, tl.where(rule == CORRECTED, lr * share, lr))
        return tl.where(weight_decay != 0, 1 - rate * weight_decay, 1.0)
    else:
        return lr * 0 + 1


@triton.jit
def number(numbers, sources, at, inside):
    """A hyperparameter: from its own tensor where it has one."""
    source = tl.load(sources + at, mask=inside, other=0)
    is_wide = (source & 1) != 0
    narrow = tl.load(source.to(tl.pointer_type(tl.float32)), mask=(source != 0) & (is_wide == 0), other=0.0)
    wide = tl.load((source & -2).to(tl.pointer_type(tl.float64)), mask=is_wide, other=0.0)
    held = tl.load(numbers + at, mask=inside, other=0.0)
    return tl.where(source == 0, held, tl.where(is_wide, wide, narrow.to(tl.float64)))


@triton.jit
def put(row, column: tl.constexpr, value, inside):
    tl.store(row + column, value.to(row.dtype.element_ty), mask=inside)


@triton.jit
def power(base, exponent):
    """base^exponent for exponents up to 2^30, by squaring, in pairs of float64 (Dekker 1971): what comes of it is rounded once,
    as by a correctly rounded pow."""
    high = base * 0 + 1
    low = base * 0
    square = base
    square_low = base * 0
    left = tl.reduce(exponent, 0, larger)  # no exponent has more bits
    while left > 0:
        is_odd = (exponent & 1) != 0
        next_high, next_low = product(high, low, square, square_low)
        high = tl.where(is_odd, next_high, high)
        low = tl.where(is_odd, next_low, low)
        square, square_low = product(square, square_low, square, square_low)
        exponent = exponent >> 1
        left = left >> 1
    return high


@triton.jit
def product(a, a_low, b, b_low):
    high = a * b
    low = tl.fma(a, b, high * -1.0) + (a * b_low + a_low * b)
    total = high + low
    return total, low - (total - high)
