"""The scalars an update rule needs this step, computed in float64; an engine rounds them once to the dtype it computes in.

The expressions are torch.optim's own (its for-loop implementation), so that the scalars have its bits.
"""

from __future__ import annotations

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


def sgd(lr: float, momentum: float, dampening: float, weight_decay: float, decoupled: bool) -> tuple[float, ...]:
    """The coefficient row of SGD.

    ``decay`` is 1 - lr * weight_decay where the decay is decoupled, else 1.
    """
    decay = 1 - lr * weight_decay if decoupled and weight_decay != 0 else 1.0
    return (weight_decay, decay, momentum, 1 - dampening, -lr)


def adam(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool, step: float
) -> tuple[float, ...]:
    """The coefficient row of Adam and AdamW at step count ``step``, the first step being 1.

    ``bias_correction2_sqrt`` is sqrt(1 - beta2^t), ``neg_step_size`` is -lr / (1 - beta1^t).
    """
    decay = 1 - lr * weight_decay if decoupled and weight_decay != 0 else 1.0
    bias_correction1 = 1 - beta1**step
    bias_correction2 = 1 - beta2**step
    step_size = lr / bias_correction1
    return (weight_decay, decay, 1 - beta1, beta2, 1 - beta2, bias_correction2**0.5, eps, -step_size)
