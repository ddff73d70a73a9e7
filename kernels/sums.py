"""Sums in an order that is written down, and largest values."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def larger(a, b):
    """The larger one of two numbers that are not negative, NaN if there is one."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def pairwise(sums, LARGEST: tl.constexpr):
    """Neighbours combined in pairs until one is left: a tensor of one element. Halves would take four times the registers."""
    size: tl.constexpr = sums.shape[0]
    if size > 1:
        left, right = tl.split(tl.reshape(sums, (size // 2, 2)))
        return pairwise(larger(left, right) if LARGEST else left + right, LARGEST)
    else:
        return sums
