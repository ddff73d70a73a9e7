"""lambda of a loss <-> ``weight_decay`` of an optimizer."""

from __future__ import annotations

import math
from typing import Literal

Reduction = Literal["mean", "sum"]


def from_lambda(lam: float, n: int, reduction: Reduction = "mean") -> float:
    """The ``weight_decay`` that trains with L2 regularization of strength ``lam``.

    ==========  ==================================================  ================
    reduction   loss over the n training examples                   weight_decay
    ==========  ==================================================  ================
    ``"mean"``  (1/n) sum of data terms + (lam / 2n) sum of w^2     ``lam / n``
    ``"sum"``   sum of data terms + (lam / 2) sum of w^2            ``lam``
    ==========  ==================================================  ================

    ``n`` is the size of the training set, not of a mini-batch: a mini-batch of m averages the data term over m, the penalty
    stays over n. With ``"sum"`` the data term of a mini-batch of m is the sum over it times n / m.

    Example::

        >>> fused_l2.weight_decay.from_lambda(5.0, n=50_000)
        0.0001

    Raises:
        ValueError: if ``lam`` is negative or not finite, ``n`` is not positive, or ``reduction`` is unknown.
    """
    return _checked(lam, "lam") / _divisor(n, reduction)


def to_lambda(weight_decay: float, n: int, reduction: Reduction = "mean") -> float:
    """The lambda that a ``weight_decay`` stands for, the inverse of :func:`from_lambda`.

    Example::

        >>> fused_l2.weight_decay.to_lambda(0.0001, n=50_000)
        5.0

    Raises:
        ValueError: if ``weight_decay`` is negative or not finite, ``n`` is not positive, or ``reduction`` is unknown.
    """
    return _checked(weight_decay, "weight_decay") * _divisor(n, reduction)


def _checked(value: float, argument: str) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{argument} must be a finite number >= 0, got {value}")
    return float(value)


def _divisor(n: int, reduction: str) -> float:
    if not (math.isfinite(n) and n > 0):
        raise ValueError(f"n, the number of training examples, must be positive, got {n}")
    if reduction == "mean":
        return float(n)
    if reduction == "sum":
        return 1.0
    raise ValueError(f"reduction must be 'mean' or 'sum', as the loss reduces its data terms, got {reduction!r}")
