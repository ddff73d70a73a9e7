"""The value of the L2 penalty that weight decay stands for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..engines import sums_of_squares
from ..parameters.ranks import Ranks, Sharing
from .conversion import Reduction, from_lambda


@torch.no_grad()
def penalty(
    groups: Optimizer | Iterable[dict[str, Any]],
    lam: float | None = None,
    n: int | None = None,
    reduction: Reduction = "mean",
) -> float:
    """The L2 penalty over the decayed parameters: those of groups whose ``weight_decay`` is not 0.

    With ``lam`` and ``n`` the value is (lam / 2n) * sum(w^2), or (lam / 2) * sum(w^2) with ``reduction="sum"``: what the loss
    of :func:`from_lambda` adds to its data term. Without them it is sum over groups of (weight_decay / 2) * sum(w^2), the
    same number if each group's ``weight_decay`` is lam / n. SGD and Adam minimize it with the data term; decoupled decay, as
    AdamW's, minimizes no such sum.

    One pass over the weights. On a CPU the sum is made in float64 in a fixed order: the same bits for any number of threads.
    Shards of DTensors are summed over their meshes, and an optimizer's parameters over its ``norm_process_group``, so that all
    ranks have to call this.

    Args:
        groups: an optimizer, or param groups as passed to one (each with its ``weight_decay``).
        lam: lambda of the loss; with ``n``, or not at all.
        n: number of training examples; with ``lam``, or not at all.
        reduction: ``"mean"`` or ``"sum"``: how the loss puts its data terms together. Only with ``lam`` and ``n``.

    Returns:
        The penalty as a float (on other devices than the CPU this waits for the device).

    Raises:
        RuntimeError: if an optimizer's parameters are seen to be parts, and its ``norm_process_group`` says nothing.
        TypeError: if ``groups`` is neither.
        ValueError: if only one of ``lam`` and ``n`` is given, a group has no ``weight_decay``, or a value is out of its range.
    """
    if (lam is None) != (n is None):
        raise ValueError("penalty needs both lam and n, or neither: then each group's own weight_decay counts")
    if not isinstance(groups, Optimizer) and not isinstance(groups, Iterable):
        raise TypeError(f"penalty needs an optimizer, or param groups as given to one, got {type(groups).__name__}")
    coefficient = None if lam is None or n is None else from_lambda(lam, n, reduction)
    decayed: list[Tensor] = []
    weights: list[float] = []
    of_group: list[int] = []
    seen: set[int] = set()
    for index, group in enumerate(groups.param_groups if isinstance(groups, Optimizer) else groups):
        if not isinstance(group, dict) or "weight_decay" not in group:
            raise ValueError(f"group {index} has no 'weight_decay': pass an optimizer, or param groups as given to one")
        own = float(group["weight_decay"])
        if own == 0:
            continue
        params = group["params"]
        for entry in [params] if isinstance(params, Tensor) else params:
            param: Tensor = entry[1] if isinstance(entry, tuple) else entry
            if id(param) not in seen:
                seen.add(id(param))
                decayed.append(param)
                weights.append(own if coefficient is None else coefficient)
                of_group.append(index)
    sums = sums_of_squares([param.detach() for param in decayed])
    penalties = [0.5 * w * s for w, s in zip(weights, sums, strict=True)]
    stepper = getattr(groups, "_stepper", None)  # of an optimizer of ours, which may know who has other parts
    if stepper is None:
        return math.fsum(penalties)
    said = [stepper.options.process_group_of(i) for i in range(len(groups.param_groups))]  # type: ignore[union-attr]
    sharing = Sharing(decayed, of_group, said, "penalty")
    for slot, reason in sharing.refusals.items():
        raise RuntimeError(f"a parameter of shape {tuple(decayed[slot].shape)} in group {of_group[slot]}: {reason}")
    here: dict[Ranks, list[float]] = {ranks: [] for ranks in ((), *sharing.beyonds)}
    for beyond, value in zip(sharing.beyond, penalties, strict=True):
        here[beyond].append(value)
    return float(sharing.reduced({r: torch.tensor([math.fsum(v)], dtype=torch.float64, device="cpu") for r, v in here.items()}))
