"""The scalars an update rule needs this step, computed in float64; an engine rounds them once to the dtype it computes in.

The expressions are torch.optim's own (its for-loop implementation), so that the scalars have its bits.
"""

from __future__ import annotations

import functools
from enum import IntEnum
from typing import NamedTuple

# The columns of a coefficient row. csrc/table.h names the same columns in the same order.
SGD = ("weight_decay", "decay", "momentum", "one_minus_dampening", "neg_lr")
ADAM = (
    "weight_decay",
    "decay",
    "one_minus_beta1",
    "beta2",
    "one_minus_beta2",
    "bias_correction2_sqrt",
    "eps",
    "neg_step_size",
)
STEP_COUNT = max(len(SGD), len(ADAM))  # where a row has the step's count, for random bits
# There it is modulo this: devices have rows in float32, which tells larger counts no more apart.
RANDOM_STEPS = 1 << 24
WIDTH = STEP_COUNT + 1  # float64 numbers from one row to the next
NUMBERS = 8  # room for the hyperparameters of a group that rows are made of: Adam has 7


class SgdNumbers(NamedTuple):
    """The hyperparameters of a param group that SGD's rows are made of. Devices have them in the same order."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    max_lr: float = 1.0  # not looked at by the plain rule of decay
    decay_rule: float = 0.0


class AdamNumbers(NamedTuple):
    """The hyperparameters of a param group that Adam's rows are made of. Devices have them in the same order."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_lr: float = 1.0
    decay_rule: float = 0.0


class DecayRule(IntEnum):
    """What multiplies ``weight_decay``."""

    PLAIN = 0
    FULLY_DECOUPLED = 1
    CORRECTED = 2


_FULLY_DECOUPLED, _CORRECTED = float(DecayRule.FULLY_DECOUPLED), float(DecayRule.CORRECTED)


def decay_rate(lr: float, max_lr: float, decay_rule: float) -> float:
    """Decoupled decay shrinks a weight by ``decay_rate * weight_decay`` per step. PLAIN does not look at ``max_lr``."""
    if decay_rule == _FULLY_DECOUPLED:
        return lr / max_lr
    if decay_rule == _CORRECTED:
        return lr * (lr / max_lr)
    return lr


def decay(numbers: SgdNumbers | AdamNumbers, decoupled: bool) -> tuple[float, float]:
    """The first two columns: the coefficient of w in the gradient, and what multiplies w.

    Where the decay is decoupled the first is only a switch, not 0 if there is any, and the second is
    1 - decay_rate * weight_decay; otherwise the second is 1.
    """
    lr, weight_decay, rule = numbers.lr, numbers.weight_decay, numbers.decay_rule
    if weight_decay == 0:
        return weight_decay, 1.0
    if decoupled:
        return weight_decay, 1 - (decay_rate(lr, numbers.max_lr, rule) if rule else lr) * weight_decay
    if rule == _CORRECTED:
        weight_decay = lr / numbers.max_lr * weight_decay  # the step multiplies by the other lr
    return weight_decay, 1.0


def sgd(numbers: SgdNumbers, decoupled: bool) -> tuple[float, ...]:
    """The coefficient row of SGD."""
    return (*decay(numbers, decoupled), numbers.momentum, 1 - numbers.dampening, -numbers.lr)


def adam(numbers: AdamNumbers, decoupled: bool, step: float) -> tuple[float, ...]:
    """The coefficient row of Adam and AdamW at step count ``step``, the first step being 1.

    ``bias_correction2_sqrt`` is sqrt(1 - beta2^t), ``neg_step_size`` is -lr / (1 - beta1^t).
    """
    beta1, beta2 = numbers.beta1, numbers.beta2
    bias_correction1, bias_correction2_sqrt = bias_corrections(beta1, beta2, step)
    step_size = numbers.lr / bias_correction1
    return (*decay(numbers, decoupled), 1 - beta1, beta2, 1 - beta2, bias_correction2_sqrt, numbers.eps, -step_size)


# Where gradients come and go, tensors of many step counts ask for the same powers in step after step.
@functools.lru_cache(maxsize=128)
def bias_corrections(beta1: float, beta2: float, step: float) -> tuple[float, float]:
    """1 - beta1^t, and sqrt(1 - beta2^t)."""
    return 1 - beta1**step, (1 - beta2**step) ** 0.5
