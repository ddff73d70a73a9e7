"""Sums in an order that is written down, and largest values."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def larger(a, b):
    """The larger one of two numbers that are not negative, NaN if there is one."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def plus(a, b):
    return a + b


@triton.jit
def pairwise(sums, LARGEST: tl.constexpr):
    """Neighbours combined in pairs until one is left: a tensor of one element.

    Each pair is a reduction of its own, which threads share out: after ``tl.split`` each of them would add up all of the lanes.
    """
    size: tl.constexpr = sums.shape[0]
    if size > 1:
        pairs = tl.reshape(sums, (size // 2, 2))
        return pairwise(tl.reduce(pairs, 1, larger if LARGEST else plus), LARGEST)
    else:
        return sums
