"""16-bit parameters and the float32 value that a step is computed in: how the one is made of the other.

``fused_l2/parameters/low_precision.py`` states the same formulas in PyTorch and ``csrc/low_precision_kernels.h`` in C++; tests
compare the three bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import KAHAN, MASTER, REMAINDER, REMAINDER8


@triton.jit
def mix(x):  # Wellons 2018, "lowbias32"
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def step_key(key, step):
    """Of the random bits of one tensor at one step."""
    return mix(key.to(tl.uint32) ^ mix(step.to(tl.int32).to(tl.uint32)))


@triton.jit
def random_bits(element, key):
    return mix(element * 0x9E3779B9 + key)  # a Weyl sequence


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(u):
    return u.to(tl.float32, bitcast=True)


@triton.jit
def widened(raw, kept, FLAGS: tl.constexpr):
    """The float32 value of a parameter, from it (as int16 with a remainder) and what is kept beside it."""
    if FLAGS & (REMAINDER | REMAINDER8):
        u = raw.to(tl.int32) << 16
        magnitude = u & 0x7FFFFFFF
        # The sum is below 2^31. NaN stays NaN.
        joined = tl.maximum(magnitude + (kept.to(tl.int32) << (8 if FLAGS & REMAINDER8 else 0)), 0)
        joined = tl.minimum(joined, tl.maximum(magnitude, 0x7F800000))
        return ((u ^ magnitude) | joined).to(tl.float32, bitcast=True)
    elif FLAGS & MASTER:
        own = raw.to(tl.float32)
        # As numbers, or both NaN: a zero that changed its sign makes no difference.
        rounded = kept.to(raw.dtype).to(tl.float32)
        return tl.where(rounded.to(tl.int32, bitcast=True) == own.to(tl.int32, bitcast=True), kept, own)
    elif FLAGS & KAHAN:
        own = raw.to(tl.float32)
        c = kept.to(tl.float32)
        if raw.dtype == tl.bfloat16:
            # Of 2^-134 as a number triton 3.6 makes a float64, and of all that it meets.
            smallest = float_of(tl.full((), 0x8000, tl.uint32))
            half_unit = tl.maximum(tl.abs(own) * 0.00390625, smallest)  # 2^-8
        else:
            half_unit = tl.maximum(tl.abs(own) * 0.00048828125, 2.9802322387695312e-08)  # 2^-11, 2^-25
        return tl.where(tl.abs(c) <= half_unit, own + c, own)
    else:
        tl.static_assert(False, "nothing is kept beside the parameter")


@triton.jit
def split(w):
    """The parameter's bits and the remainder, as int16."""
    sign, magnitude = sign_and_magnitude(w)
    upper = (magnitude + 0x8000) >> 16
    return (sign | upper).to(tl.int16), (magnitude - (upper << 16)).to(tl.int16)


@triton.jit
def sign_and_magnitude(w):
    """The sign where bfloat16 has it, and all other bits; of a NaN, quiet after arithmetic, those that have no remainder."""
    u = w.to(tl.int32, bitcast=True)
    return (u >> 16) & 0x8000, tl.minimum(u & 0x7FFFFFFF, 0x7FC00000)


@triton.jit
def split24(w, random):
    """The parameter's bits, as int16, and the remainder, as int8, of |w| rounded to 24 bits at random."""
    sign, magnitude = sign_and_magnitude(w)
    rounded = (magnitude + (random & 255).to(tl.int32)) >> 8  # below 2^31: NaN has no lower bits
    upper = (rounded + 0x80) >> 8
    return (sign | upper).to(tl.int16), (rounded - (upper << 8)).to(tl.int8)


@triton.jit
def rounded_stochastically(w, random, DTYPE: tl.constexpr):
    u = bits_of(w)
    magnitude = u & 0x7FFFFFFF
    is_nan = magnitude > 0x7F800000
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        return tl.where(is_nan, (u >> 16) | 0x40, (u + (random >> 16)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        sign = (u >> 16) & 0x8000
        normal = (magnitude - 939524096 + (random >> 19)) >> 13  # 112 << 23
        small = magnitude < 0x38800000  # below 2^-14 the last place is 2^-24 throughout
        units = float_of(tl.where(small, magnitude, 0)) * 16777216.0
        whole = units.to(tl.int32)
        upwards = (random >> 8).to(tl.int32).to(tl.float32) * 5.960464477539063e-08 < units - whole.to(tl.float32)
        rounded = tl.where(small, (whole + upwards.to(tl.int32)).to(tl.uint32), normal)
        rounded = tl.where(magnitude >= 0x47800000, 0x7C00, rounded)
        rounded = tl.where(is_nan, 0x7E00, rounded)
        return (sign | rounded).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def compensation(w, p, random):
    left = w - p.to(tl.float32)
    left = tl.where(tl.abs(left) <= 3.4028234663852886e38, left, 0.0)
    return rounded_stochastically(left, random, tl.bfloat16)
