"""The update rules in plain PyTorch: the definition that every engine has to match bit by bit.

Each rule takes tensors of one dtype and the coefficient row of ``coefficients.py`` and returns new tensors. Everything is
computed in float32 (float64 for float64 tensors) with every product and every :func:`fma` rounded once; 16-bit tensors are
widened first and rounded once at the end. Slow and simple: for tests and for reading.

Source of the arithmetic: the for-loop implementations of torch.optim (``_single_tensor_sgd``, ``_single_tensor_adam``), in
which ``add(alpha=)``, ``lerp`` and ``addcmul`` contract one product each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tables.tensor_table import GROUP, Flag


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c with a single rounding, for float32 and float64 tensors away from over- and underflow of float64.

    The product is split exactly into a sum (Dekker), the additions keep their errors (Knuth), and the last but one result is
    rounded to odd, which makes the last rounding the only one that counts (Boldo & Melquiond 2008).
    """
    if a.dtype is torch.float32:
        product, low = a.double() * b.double(), None  # exact: 48 bits
        total, error = _two_sum(product, c.double())
    else:
        product, low = _two_product(a, b)
        upper, carried = _two_sum(c, low)
        total, rest = _two_sum(product, upper)
        error = _round_to_odd(*_two_sum(rest, carried))
        exact = total + error
        # Where everything is zero, or not finite, the plain operations are right, signs included.
        return torch.where(torch.isfinite(exact) & (exact != 0), exact, a * b + c)
    exact = _round_to_odd(total, error)
    return torch.where(torch.isfinite(exact), exact, total).to(a.dtype)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        scaled = x * 134217729.0  # 2^27 + 1
        high = scaled - (scaled - x)
        return high, x - high

    product = a * b
    (a1, a2), (b1, b2) = split(a), split(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def _round_to_odd(total: Tensor, error: Tensor) -> Tensor:
    """total + error, exactly known, rounded to the neighbour whose last bit is odd unless it is representable."""
    bits = total.contiguous().view(torch.int64)
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & (bits % 2 == 0) & torch.isfinite(total)
    return torch.where(inexact, bits + towards, bits).view(torch.float64)


def sgd(
    param: Tensor, grad: Tensor, states: Sequence[Tensor], row: Sequence[float], flags: int, first_step: bool
) -> tuple[Tensor, list[Tensor]]:
    """SGD. ``row`` is ``coefficients.sgd(...)``, ``states`` is [momentum_buffer] or []. Returns param and states."""
    p, g, *wide_states = _widened(param, grad, *states)
    weight_decay, decay, momentum, one_minus_dampening, neg_lr = (_scalar(x, p) for x in row)
    d = -g if flags & Flag.MAXIMIZE else g
    if row[0] != 0 and not flags & Flag.DECOUPLED:
        d = fma(p, weight_decay, d)
    update, new_states = d, []
    if flags & Flag.MOMENTUM:
        buffer = d if first_step else fma(d, one_minus_dampening, wide_states[0] * momentum)
        update = fma(buffer, momentum, d) if flags & Flag.NESTEROV else buffer
        new_states = [buffer]
    p = _decayed(p, decay, update, flags)
    return _narrowed(fma(update, neg_lr, p), param), [_narrowed(new, old) for new, old in zip(new_states, states, strict=True)]


def adam(
    param: Tensor, grad: Tensor, states: Sequence[Tensor], row: Sequence[float], flags: int
) -> tuple[Tensor, list[Tensor]]:
    """Adam and AdamW. ``row`` is ``coefficients.adam(...)``, ``states`` is [exp_avg, exp_avg_sq] and, with amsgrad,
    max_exp_avg_sq. Returns param and states."""
    p, g, m, v, *largest = _widened(param, grad, *states)
    weight_decay, decay, one_minus_beta1, beta2, one_minus_beta2, bias_correction2_sqrt, eps, neg_step_size = (
        _scalar(x, p) for x in row
    )
    if flags & Flag.MAXIMIZE:
        g = -g
    if row[0] != 0 and not flags & Flag.DECOUPLED:
        g = fma(p, weight_decay, g)
    nearer_to_old = bool((one_minus_beta1 < 0.5).all())  # torch.lerp starts from the nearer end
    m = fma(one_minus_beta1, g - m, m) if nearer_to_old else fma(one_minus_beta1 - 1, g - m, g)
    v = fma(one_minus_beta2 * g, g, v * beta2)
    new_states = [m, v]
    if flags & Flag.AMSGRAD:
        new_states.append(torch.maximum(largest[0], v))
    p = _decayed(p, decay, m, flags)
    denominator = sqrt(new_states[-1]) / bias_correction2_sqrt + eps
    p = p + (neg_step_size * m) / denominator
    return _narrowed(p, param), [_narrowed(new, old) for new, old in zip(new_states, states, strict=True)]


# 8-bit states. GROUP elements that lie in a row share a byte b, their scale: the float32 exponent field of the largest
# magnitude, one more where its mantissa is above 1.75. Codes stand for float32 numbers with 3 bits of mantissa in a window of
# exponents that ends at 1.75 * 2^(b-127), and for 0; integers say all of it. Rounding is at random, to a neighbour, with the
# right mean. Decoded and encoded again, values are what they were, whatever the random bits. Nothing is special about what is
# not finite: the group's b is 255, its infinities and NaN stay that (an infinity of a signed state becomes NaN), and the others
# in it are lost.

NEAREST = 0x80000  # in place of 20 random bits


def scales_of(x: Tensor) -> Tensor:
    """The scale of each group: of [groups, GROUP] float32 values, [groups] uint8."""
    largest = (_bits(x) & 0x7FFFFFFF).amax(1)
    return ((largest + 0x1FFFFF) >> 23).clamp(32, 255).to(torch.uint8)


def encode_signed(x: Tensor, random: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a momentum or a first moment: a sign and one of 127 magnitudes over 15.9 binades, or 0.

    Below number 1, which is 2^(b-142), a value becomes that or 0. x: float32 [groups, GROUP]. ``random``: 32 bits for each
    element, as int64, of which bits 8 to 15 are used; None rounds to nearest.
    """
    scale = scales_of(x)
    base = _group_base(scale, 121)
    u = _bits(x)
    magnitude = u & 0x7FFFFFFF
    r = torch.full_like(u, NEAREST) if random is None else (random & 0xFF00) << 4 | 0x800
    above = ((magnitude + r) >> 20) - base
    # 1 + |x| * 2^(142-b) in units of 2^-23. The product is exact or too small to matter, so this is one fma.
    inverse = _float((269 - scale.long()) << 23)[:, None]
    below = (_bits(_float(magnitude) * inverse + 1.0) - 0x3F800000 + (r << 3)) >> 23
    return (torch.maximum(above, below).clamp(max=127) | u >> 24 & 128).to(torch.uint8), scale


def decode_signed(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values of :func:`encode_signed`."""
    c = codes.long() & 127
    u = torch.where(c == 0, 0, (c + _group_base(scale, 121)) << 20)
    return _float(u | (codes.long() & 128) << 24)


def encode_positive(x: Tensor, random: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a second moment: one of 254 numbers over 31.75 binades, and 0 for nothing but 0.

    A moment that vanished beside a first one that did not would make updates of thousands of lr. As :func:`encode_signed`; of
    the random bits the upper 16 are used: fewer lose the decay at beta2 0.9999.
    """
    scale = scales_of(x)
    u = _bits(x) & 0x7FFFFFFF
    r = NEAREST if random is None else (random >> 16) << 4 | 8
    above = ((u + r) >> 20) - _group_base(scale, 248)
    return torch.maximum(above, u.clamp(max=1)).clamp(max=255).to(torch.uint8), scale


def decode_positive(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values of :func:`encode_positive`."""
    c = codes.long()
    return _float(torch.where(c == 0, 0, (c + _group_base(scale, 248)) << 20))


def _group_base(scale: Tensor, below: int) -> Tensor:
    return (8 * scale.long() - below)[:, None].expand(-1, GROUP)


def _bits(x: Tensor) -> Tensor:
    """The bits of a float32 tensor as unsigned numbers, int64."""
    return x.contiguous().view(torch.int32).long() & 0xFFFFFFFF


def _float(bits: Tensor) -> Tensor:
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def _decayed(p: Tensor, decay: Tensor, update: Tensor, flags: int) -> Tensor:
    """Decoupled decay (``decay`` is 1 where there is none); cautious: where ``update``, to be subtracted, has p's sign."""
    if not flags & Flag.DECOUPLED:
        return p
    agree = ((update >= 0) & (p >= 0)) | ((update <= 0) & (p <= 0))
    return torch.where(agree, p * decay, p) if flags & Flag.CAUTIOUS else p * decay


def sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root, which torch.sqrt is not on every CPU (it calls MKL's vector mathematics).

    One correction of torch's result: with s within an ulp, the residual x - s^2 is exact under fma and tells which
    neighbour is nearest.
    """
    if x.dtype is torch.float32:
        # 53 bits are more than twice 24, so the second rounding is harmless, and so is an error of an ulp in the first.
        return torch.sqrt(x.double()).float()
    s = torch.sqrt(x)
    best, best_residual = s, None
    for candidate in (s, torch.nextafter(s, torch.zeros_like(s)), torch.nextafter(s, torch.full_like(s, torch.inf))):
        # |c - sqrt(x)| = |c^2 - x| / (c + sqrt(x)), and the denominators agree to 2^-52
        residual = fma(candidate, candidate, -x).abs()
        if best_residual is None:
            best_residual = residual
            continue
        better = residual < best_residual
        best, best_residual = torch.where(better, candidate, best), torch.where(better, residual, best_residual)
    return torch.where((x > 0) & torch.isfinite(x), best, s)


def _widened(*tensors: Tensor) -> list[Tensor]:
    return [t if t.dtype in (torch.float32, torch.float64) else t.float() for t in tensors]


def _narrowed(new: Tensor, like: Tensor) -> Tensor:
    return new.to(like.dtype)


def _scalar(value: float, like: Tensor) -> Tensor:
    """A coefficient, rounded once to the dtype computed in, in the shape of a tensor."""
    return torch.full_like(like, value)
