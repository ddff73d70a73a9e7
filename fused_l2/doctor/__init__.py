"""The doctor: what an optimizer really does to the weights of a model, for any torch optimizer. See docs/doctor.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .codes import CHECKS
from .codes.rounding import lost
from .findings import Finding
from .layers import Layer, layers
from .precision import measured, rounding
from .report import Report
from .subject import Subject, collect, unwrapped

__all__ = ["Finding", "Layer", "Report", "examine"]


@torch.no_grad()
def examine(
    optimizer: Any,
    model: nn.Module | None = None,
    *,
    n: int | None = None,
    lam: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    read_weights: bool = True,
) -> Report:
    """Say what this optimizer will do to these weights, and what looks wrong.

    Reads only: optimizer, model, gradients, states and random numbers stay as they are, nothing is moved or communicated.
    Before the first step or between two, on any device, the meta device and DTensors included (of those, this rank's
    shards).

    Args:
        optimizer: of torch.optim, of fused_l2, or another one that has torch's ``param_groups`` and ``state``; or a list of all
            optimizers of one model.
        model: whose parameters these are. None: the live modules that own them are looked for.
        n: number of training examples: shows lambda = weight_decay * n.
        lam: the lambda that is meant, of the loss mean(data) + (lam / 2n) * sum(w^2).
        steps: how many steps the whole training has.
        batch_size: examples in a step; with ``n`` half-lives are shown in epochs.
        read_weights: False leaves out what needs the values of weights: norms, penalty, and what rounding loses.

    Returns:
        A :class:`Report`: ``print(report)``, ``report.findings``, ``report.layers``, ``report.as_dict()``.

    Raises:
        TypeError: if ``optimizer`` has no param groups, or ``model`` is no module.
        ValueError: if a number is not positive.

    Example::

        >>> nn = torch.nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> sorted(fused_l2.doctor.examine(optimizer, model).codes())
        ['coupled-adam', 'decayed-bias', 'decayed-norm']
    """
    optimizers = [unwrapped(o) for o in (optimizer if isinstance(optimizer, (list, tuple)) else [optimizer])]
    for one in optimizers:
        groups = getattr(one, "param_groups", None)
        if not isinstance(groups, Sequence) or not all(isinstance(g, dict) and "params" in g for g in groups):
            raise TypeError(f"examine needs an optimizer with param_groups, got {type(one).__name__}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    for name, value in {"n": n, "lam": lam, "steps": steps, "batch_size": batch_size}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    subject = collect(optimizers, model)
    subject.n, subject.lam, subject.steps, subject.batch_size = n, lam, steps, batch_size
    return report_on(subject, ", ".join(_title(o) for o in optimizers), read_weights)


def report_on(subject: Subject, title: str, read_weights: bool) -> Report:
    """All checks on these facts."""
    rounded = {w: rounding(w, len(subject.weights)) if read_weights else None for w in subject.weights}
    arrived = measured(subject) if read_weights else {}
    findings = [finding for check in CHECKS for finding in check(subject)]
    findings += lost(subject, rounded, arrived)
    return Report(title, findings, layers(subject, rounded, arrived, read_weights), subject.unknown)


def _title(optimizer: Any) -> str:
    kind = type(optimizer)
    return f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"


def __dir__() -> list[str]:
    return [*__all__]
