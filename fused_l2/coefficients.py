"""The scalars an update rule needs this step, computed in float64; an engine rounds them once to the dtype it computes in.

The expressions are torch.optim's own (its for-loop implementation), so that the scalars have its bits.
"""

from __future__ import annotations

from enum import IntEnum

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
WIDTH = 8  # float64 numbers from one row to the next
NUMBERS = 8  # hyperparameters of a group that rows are made of, at most


class DecayRule(IntEnum):
    """How the strength of the decay follows the learning rate."""

    PLAIN = 0
    FULLY_DECOUPLED = 1
    CORRECTED = 2


def decay_rate(lr: float, max_lr: float, rule: int) -> float:
    """What ``weight_decay`` is multiplied by in the decay factor: lr, lr / max_lr, or lr^2 / max_lr."""
    if rule == DecayRule.FULLY_DECOUPLED:
        return lr / max_lr
    return lr * (lr / max_lr) if rule == DecayRule.CORRECTED else lr


def decay_factor(lr: float, weight_decay: float, max_lr: float, rule: int) -> float:
    """What decoupled decay multiplies a weight by: 1 - rate * weight_decay."""
    return 1 - decay_rate(lr, max_lr, rule) * weight_decay if weight_decay != 0 else 1.0


def coupled_decay(lr: float, weight_decay: float, max_lr: float, rule: int) -> float:
    """The coefficient of w in the gradient."""
    return lr / max_lr * weight_decay if rule == DecayRule.CORRECTED else weight_decay


def sgd(
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    decoupled: bool,
    max_lr: float = 1.0,
    rule: int = DecayRule.PLAIN,
) -> tuple[float, ...]:
    """The coefficient row of SGD.

    ``decay`` is 1 - rate * weight_decay where the decay is decoupled, else 1.
    """
    decay = decay_factor(lr, weight_decay, max_lr, rule) if decoupled else 1.0
    return (coupled_decay(lr, weight_decay, max_lr, rule), decay, momentum, 1 - dampening, -lr)


def adam(
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    step: float,
    max_lr: float = 1.0,
    rule: int = DecayRule.PLAIN,
) -> tuple[float, ...]:
    """The coefficient row of Adam and AdamW at step count ``step``, the first step being 1.

    ``bias_correction2_sqrt`` is sqrt(1 - beta2^t), ``neg_step_size`` is -lr / (1 - beta1^t).
    """
    decay = decay_factor(lr, weight_decay, max_lr, rule) if decoupled else 1.0
    bias_correction1 = 1 - beta1**step
    bias_correction2 = 1 - beta2**step
    step_size = lr / bias_correction1
    return (weight_decay, decay, 1 - beta1, beta2, 1 - beta2, bias_correction2**0.5, eps, -step_size)
