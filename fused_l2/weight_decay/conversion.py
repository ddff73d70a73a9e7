"""``weight_decay`` of an optimizer <-> lambda of a loss, normalized decay, and the time over which weights are averaged."""

from __future__ import annotations

import math
from typing import Any, Literal

from .._warnings import warn

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

    ``decay_rule="fully_decoupled"`` multiplies weight_decay by lr / max_lr and not by lr: there pass max_lr times this value.

    Args:
        lam: lambda of that loss, 0 or more.
        n: number of training examples; for a loss that is a mean over tokens, of tokens.
        reduction: ``"mean"`` or ``"sum"``: how the loss puts its data terms together.

    Example::

        >>> fused_l2.weight_decay.from_lambda(5.0, n=50_000)
        0.0001

    Raises:
        ValueError, TypeError: if ``lam`` is negative or not finite, ``n`` is no positive whole number, or ``reduction`` is
            unknown.

    Warns where ``lam`` is larger than ``n``: they may have been exchanged.
    """
    strength, divisor = checked(lam, "lam"), _divisor(n, reduction)
    if reduction == "mean" and strength > divisor:
        warn(
            f"fused_l2: from_lambda got lam={lam}, which is larger than n={n}, the number of training examples: a step would "
            f"take more than lr times each weight. Were they exchanged? The call is from_lambda(lam, n)."
        )
    return strength / divisor


def to_lambda(weight_decay: float, n: int, reduction: Reduction = "mean") -> float:
    """The lambda that a ``weight_decay`` stands for, the inverse of :func:`from_lambda`.

    Args:
        weight_decay: of an optimizer, 0 or more.
        n: number of training examples.
        reduction: ``"mean"`` or ``"sum"``: how the loss puts its data terms together.

    Example::

        >>> fused_l2.weight_decay.to_lambda(0.0001, n=50_000)
        5.0

    Raises:
        ValueError, TypeError: if ``weight_decay`` is negative or not finite, ``n`` is no positive whole number, or
            ``reduction`` is unknown.
    """
    return checked(weight_decay, "weight_decay") * _divisor(n, reduction)


def from_normalized(weight_decay_norm: float, batch_size: float, n: float, epochs: float) -> float:
    """The decay per step that a normalized decay means for one length of training: norm * sqrt(batch_size / (n * epochs)).

    Loshchilov & Hutter (2019, appendix B.1) found that the best decay per step falls with the root of the number of steps, so
    that a normalized one carries over between budgets. Their decay is not multiplied by lr: it is the ``weight_decay`` of
    ``decay_rule="fully_decoupled"``. With the plain rule divide it by the largest lr of the schedule.

    Args:
        weight_decay_norm: the normalized decay, 0 or more.
        batch_size: examples in a mini-batch, of all processes together.
        n: number of training examples.
        epochs: how often the training goes through them.

    Example::

        >>> fused_l2.weight_decay.from_normalized(0.05, batch_size=128, n=51_200, epochs=100)
        0.00025

    Raises:
        ValueError: if ``weight_decay_norm`` is negative or not finite, or another argument is not positive and finite.
    """
    return checked(weight_decay_norm, "weight_decay_norm") * _per_root_step(batch_size, n, epochs)


def to_normalized(weight_decay: float, batch_size: float, n: float, epochs: float) -> float:
    """The normalized decay that a decay per step stands for, the inverse of :func:`from_normalized`.

    Args:
        weight_decay: of ``decay_rule="fully_decoupled"``, 0 or more; of the plain rule times the largest lr.
        batch_size: examples in a mini-batch, of all processes together.
        n: number of training examples.
        epochs: how often the training goes through them.

    Example::

        >>> fused_l2.weight_decay.to_normalized(0.00025, batch_size=128, n=51_200, epochs=100)
        0.05

    Raises:
        ValueError: if ``weight_decay`` is negative or not finite, or another argument is not positive and finite.
    """
    return checked(weight_decay, "weight_decay") / _per_root_step(batch_size, n, epochs)


def timescale(lr: float, weight_decay: float, batch_size: float | None = None, n: float | None = None) -> float:
    """Over how many steps the weights of AdamW are an average of their updates: 1 / (lr * weight_decay).

    w <- (1 - lr * weight_decay) * w - lr * u makes w an exponential moving average of -u / weight_decay. Wang & Aitchison
    (2024, "How to set AdamW's weight decay as you scale model and dataset size") found that its best timescale is about the
    same number of *epochs*, whatever the sizes of model and data set. With ``batch_size`` and ``n``, the number of training
    examples, that is what is returned.

    Args:
        lr: learning rate of AdamW; of a schedule usually its largest.
        weight_decay: of AdamW.
        batch_size: examples in a mini-batch, of all processes together; with ``n``, or not at all.
        n: number of training examples; with ``batch_size``, or not at all.

    Example::

        >>> fused_l2.weight_decay.timescale(0.001, 0.1)
        10000.0
        >>> fused_l2.weight_decay.timescale(0.001, 0.1, batch_size=100, n=50_000)
        20.0

    Raises:
        ValueError: if an argument is not positive and finite, or only one of ``batch_size`` and ``n`` is given.
    """
    return 1 / (_positive(lr, "lr") * _positive(weight_decay, "weight_decay")) / _steps_per_epoch(batch_size, n)


def from_timescale(timescale: float, lr: float, batch_size: float | None = None, n: float | None = None) -> float:
    """The ``weight_decay`` of AdamW for a timescale in steps or, with ``batch_size`` and ``n``, in epochs: the inverse of
    :func:`timescale`.

    Args:
        timescale: over how many steps, or epochs, the weights are an average.
        lr: learning rate of AdamW; of a schedule usually its largest.
        batch_size: examples in a mini-batch, of all processes together; with ``n``, or not at all.
        n: number of training examples; with ``batch_size``, or not at all.

    Example::

        >>> fused_l2.weight_decay.from_timescale(10_000, lr=0.001)
        0.1
        >>> fused_l2.weight_decay.from_timescale(20, lr=0.001, batch_size=100, n=50_000)
        0.1

    Raises:
        ValueError: if an argument is not positive and finite, or only one of ``batch_size`` and ``n`` is given.
    """
    return 1 / (_positive(timescale, "timescale") * _steps_per_epoch(batch_size, n) * _positive(lr, "lr"))


def _per_root_step(batch_size: float, n: float, epochs: float) -> float:
    steps = _steps_per_epoch(batch_size, n) * _positive(epochs, "epochs")
    return 1 / math.sqrt(steps)


def _steps_per_epoch(batch_size: float | None, n: float | None) -> float:
    """1 without both."""
    if batch_size is None and n is None:
        return 1.0
    if batch_size is None or n is None:
        raise ValueError(f"pass both batch_size and n for epochs, or neither for steps; got batch_size={batch_size}, n={n}")
    return _positive(n, "n") / _positive(batch_size, "batch_size")


def _positive(value: float, argument: str) -> float:
    result = _number(value, argument)
    if not (math.isfinite(result) and result > 0):
        raise ValueError(f"{argument} must be a finite number > 0, got {value}")
    return result


def checked(value: float, argument: str) -> float:
    result = _number(value, argument)
    if not (math.isfinite(result) and result >= 0):
        raise ValueError(f"{argument} must be a finite number >= 0, got {value}")
    return result


def _number(value: Any, argument: str) -> float:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{argument} must be a number, got {value!r} of type {type(value).__name__}")
    return float(value)


def _divisor(n: int, reduction: str) -> float:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', as the loss reduces its data terms, got {reduction!r}")
    count = _number(n, "n, the number of training examples,")
    if not (math.isfinite(count) and count >= 1 and count == int(count)):
        raise ValueError(
            f"n, the number of training examples, must be a whole number >= 1, got {n}: were lambda and n exchanged?"
        )
    return count if reduction == "mean" else 1.0
