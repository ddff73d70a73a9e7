"""The update rules on loaded values, every fma written out.

``fused_l2/reference.py`` states the same formulas in PyTorch and ``csrc/update_rules.h`` in C++; tests compare the three bit by
bit. They count on being compiled without fusion of products and sums (``enable_fp_fusion=False``).

Each rule takes the values of one block, in float32 (float64 for float64 tensors), up to three states, and the coefficient row
of ``fused_l2/tables/coefficients.py``, and returns the new param and states. States a rule does not have pass through.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import AMSGRAD, CAUTIOUS, DECOUPLED, MAXIMIZE, MOMENTUM, NESTEROV


@triton.jit
def sgd(param, grad, buffer, unused1, unused2, row, first_step, FLAGS: tl.constexpr):
    weight_decay, decay, momentum, one_minus_dampening, neg_lr, _5, _6, _7 = row
    grad = gradient(param, grad, weight_decay, FLAGS)
    update = grad
    if FLAGS & MOMENTUM:
        buffer = tl.where(first_step, grad, tl.fma(grad, one_minus_dampening, buffer * momentum))
        update = buffer
        if FLAGS & NESTEROV:
            update = tl.fma(buffer, momentum, grad)
    param = decayed(param, decay, update, FLAGS)
    return tl.fma(update, neg_lr, param), buffer, unused1, unused2


@triton.jit
def adam(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, row, first_step, FLAGS: tl.constexpr):
    weight_decay, decay, one_minus_beta1, beta2, one_minus_beta2, bias_correction2_sqrt, eps, neg_step_size = row
    grad = gradient(param, grad, weight_decay, FLAGS)
    # torch.lerp starts from the nearer end
    from_end = one_minus_beta1 >= 0.5
    weight = tl.where(from_end, one_minus_beta1 - 1, one_minus_beta1)
    exp_avg = tl.fma(weight, grad - exp_avg, tl.where(from_end, grad, exp_avg))
    exp_avg_sq = tl.fma(one_minus_beta2 * grad, grad, exp_avg_sq * beta2)
    second_moment = exp_avg_sq
    if FLAGS & AMSGRAD:
        # The larger one, NaN if either is, as torch.maximum.
        newer = (exp_avg_sq >= max_exp_avg_sq) | (exp_avg_sq != exp_avg_sq)
        max_exp_avg_sq = tl.where(newer, exp_avg_sq, max_exp_avg_sq)
        second_moment = max_exp_avg_sq
    param = decayed(param, decay, exp_avg, FLAGS)
    denominator = divide(square_root(second_moment), bias_correction2_sqrt) + eps
    return param + divide(neg_step_size * exp_avg, denominator), exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def gradient(param, grad, weight_decay, FLAGS: tl.constexpr):
    """What the rules see of a gradient: of what is minimized, with coupled decay."""
    if FLAGS & MAXIMIZE:
        grad = grad * -1.0  # not -grad, which triton 3.6 compiles to 0 - grad: the wrong zero
    if not FLAGS & DECOUPLED:
        grad = tl.where(weight_decay != 0, tl.fma(param, weight_decay, grad), grad)
    return grad


@triton.jit
def decayed(param, decay, update, FLAGS: tl.constexpr):
    """Decoupled decay; ``decay`` is 1 where there is none. ``update`` has the sign of what will be subtracted."""
    if FLAGS & CAUTIOUS:  # a product of the two could underflow
        agree = ((update >= 0) & (param >= 0)) | ((update <= 0) & (param <= 0))
        return tl.where(agree, param * decay, param)
    elif FLAGS & DECOUPLED:
        return param * decay
    else:
        return param


@triton.jit
def divide(x, y):
    """x / y, correctly rounded. Triton's own float32 division is not, its float64 division is."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def square_root(x):
    """The correctly rounded square root. Triton's own is that for float64 only."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)
