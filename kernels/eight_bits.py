"""8-bit states: codes and a scale for each group of elements, and the float32 values that a step works on.

``fused_l2/reference.py`` is the definition; tests compare the two bit by bit. Elements are given as [groups, GROUP], so that a
group is a row. Constants are moved to where a group has them once: ((u + r) >> 20) - base is (u + r - (base << 20)) >> 20.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .low_precision import float_of


@triton.jit
def decode_signed(codes, scales):
    code = codes.to(tl.int32)
    base = ((scales.to(tl.int32) * 8 - 121) << 20)[:, None]
    u = tl.where((code & 127) == 0, 0, ((code & 127) << 20) + base)
    return (u | ((code & 128) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def decode_positive(codes, scales):
    code = codes.to(tl.int32)
    base = ((scales.to(tl.int32) * 8 - 248) << 20)[:, None]
    return tl.where(code == 0, 0, (code << 20) + base).to(tl.float32, bitcast=True)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def scales_of(magnitudes):
    """The exponent of each group's largest magnitude, one more where its mantissa is above 1.75; int32 [groups]."""
    largest = tl.reduce(magnitudes, 1, larger).to(tl.uint32)
    return tl.minimum(tl.maximum(((largest + 0x1FFFFF) >> 23).to(tl.int32), 32), 255)


@triton.jit
def encode_signed(x, random):
    """Codes and scales, both uint8."""
    u = x.to(tl.int32, bitcast=True)
    magnitude = u & 0x7FFFFFFF
    scales = scales_of(magnitude)
    r = ((random << 4) & 0xFF000).to(tl.int32) | 0x800
    # 128 more than the code: so is the exponent of a sum with 2, and the sign takes the place of the 128.
    offset = ((249 - scales * 8) << 20)[:, None]
    above = (magnitude + r + offset) >> 20
    inverse = float_of((270 - scales) << 23)[:, None]
    shifted = tl.fma(tl.abs(x), inverse, 2.0).to(tl.uint32, bitcast=True)
    below = ((shifted + (r << 3).to(tl.uint32)) >> 23).to(tl.int32)
    code = tl.minimum(tl.maximum(above, below), 255)
    return ((code & 127) | ((u >> 24) & 128)).to(tl.uint8), scales.to(tl.uint8)


@triton.jit
def encode_positive(x, random):
    """Codes and scales, both uint8."""
    u = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scales = scales_of(u)
    r = ((random >> 12) & 0xFFFF0).to(tl.int32) | 8
    offset = ((248 - scales * 8) << 20)[:, None]
    above = (u + r + offset) >> 20
    code = tl.minimum(tl.maximum(above, tl.minimum(u, 1)), 255)
    return code.to(tl.uint8), scales.to(tl.uint8)
