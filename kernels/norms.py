"""The norm of all gradients, up to one partial sum per chunk, which ``fused_l2_control`` adds up in one program.

No atomics: every addition has its place in an order that csrc/sums.h writes down, so the C++ library gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import LANES, NUMEL, WIDTH
from .multi_tensor import typed_pointer
from .sums import larger, pairwise


@triton.jit
def fused_l2_measure_grads(
    chunk_map,  # int64 [.]
    table,  # int64 [tensors][WIDTH]
    partials,  # float64 [.]
    CHUNK,  # a multiple of LANES
    FIRST,  # the first program's position in chunk_map and partials
    grads,  # int64 [tensors]
    LARGEST: tl.constexpr,  # the largest |g|, else the sum of g^2
    DTYPE: tl.constexpr,
):
    position = FIRST + tl.program_id(0)
    word = tl.load(chunk_map + position)
    tensor = word & 0xFFFFFFFF
    begin = (word >> 32) * CHUNK
    address = tl.load(grads + tensor)
    grad = typed_pointer(address, DTYPE) + begin
    count = tl.minimum(tl.load(table + tensor * WIDTH + NUMEL) - begin, CHUNK).to(tl.int32)
    whole = tl.where((address & 15) == 0, count // (4 * LANES) * (4 * LANES), 0)

    lanes = tl.arange(0, LANES)
    sums = tl.full((LANES,), 0.0, tl.float64)
    # Four loads under way before the first value is used. Every element is added in its lane, in order, here and below.
    for start in range(0, whole, 4 * LANES):
        at = grad + start + lanes
        a = tl.load(at)
        b = tl.load(at + LANES)
        c = tl.load(at + 2 * LANES)
        d = tl.load(at + 3 * LANES)
        sums = accumulate(sums, a, LARGEST)
        sums = accumulate(sums, b, LARGEST)
        sums = accumulate(sums, c, LARGEST)
        sums = accumulate(sums, d, LARGEST)
    for start in range(whole, count, LANES):
        at = start + lanes
        sums = accumulate(sums, tl.load(grad + at, mask=at < count, other=0.0), LARGEST)
    tl.store(partials + position + tl.arange(0, 1), pairwise(sums, LARGEST))


@triton.jit
def accumulate(sums, grad, LARGEST: tl.constexpr):
    value = grad.to(tl.float64)
    if LARGEST:
        return larger(sums, tl.abs(value))
    else:
        return sums + value * value
