"""The table: for every tensor what its group, its dtype and its values make of learning rate and decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..engines import sums_of_squares
from ..parameters.shards import local
from ..weight_decay import to_lambda
from . import rules
from .normalized import normalized
from .precision import Rounding
from .subject import Subject, Weight


@dataclass(frozen=True)
class Layer:
    """A row. None: not known, or without meaning here."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None
    group: int
    lr: float | None
    weight_decay: float | None
    lam: float | None  # weight_decay * n
    lr_wd: float | None  # what a step takes of each weight, in the long run
    half_life: float | None  # in steps: ln 2 / lr_wd
    half_life_epochs: float | None
    norm: float | None  # |w|; of this rank's shard
    equilibrium: float | None  # the |w| at which decay and noise hold each other, for weights before a normalization layer
    effective_lr: float | None  # lr / |w|^2, for weights before a normalization layer
    arrives: float | None  # the share of the decay that will arrive in this dtype
    arrived: float | None  # the share that did at the last step, with statistics=True; one draw, with noise
    penalty: float | None  # weight_decay / 2 * |w|^2
    optimizer: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The fields, shape as a list: for JSON."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "shape": list(self.shape)}


@torch.no_grad()
def layers(
    subject: Subject, rounded: Mapping[Weight, Rounding | None], measured: Mapping[Weight, tuple[float, float]], read: bool
) -> list[Layer]:
    before_norm = {id(w) for w, _ in normalized(subject)}
    squares = _squares(subject.weights) if read else {}
    rows = []
    for weight in subject.weights:
        group, lr = weight.group, weight.group.lr
        rate, square = group.rate, squares.get(id(weight))
        normal = id(weight) in before_norm
        half_life = math.log(2) / rate if rate else None
        per_epoch, rounding = subject.steps_per_epoch, rounded.get(weight)
        lam = to_lambda(group.weight_decay, subject.n) if subject.n and group.weight_decay else None
        rows.append(
            Layer(
                weight.name, weight.shape, str(weight.dtype).removeprefix("torch.") if weight.dtype else None, group.index, lr,
                group.weight_decay, lam, rate,
                half_life, half_life / per_epoch if half_life and per_epoch else None,
                math.sqrt(square) if square is not None else None,
                _equilibrium(weight, square) if normal and rate else None,
                lr / square if normal and lr is not None and square else None,
                rounding.decay if rounding is not None and group.decays else None,
                measured[weight][1] / measured[weight][0] if weight in measured else None,
                group.weight_decay / 2 * square if group.weight_decay is not None and square is not None else None, group.which,
            )
        )  # fmt: skip
    return rows


def _squares(weights: list[Weight]) -> dict[int, float]:
    """Sum of w^2 of every tensor that can be read: one pass over memory, and no communication, so of this rank's shards."""
    found: dict[int, float] = {}
    chosen, tensors = [], []
    for weight in weights:
        here: Any = local(weight.param) if weight.param is not None else None
        if type(here) not in (Tensor, torch.nn.Parameter) or here.is_meta or not here.is_floating_point():
            continue
        if here.layout is not torch.strided or here.untyped_storage().nbytes() < here.numel() * here.element_size():
            continue
        chosen.append(weight)
        tensors.append(here.detach())
    for weight, total in zip(chosen, sums_of_squares(tensors), strict=True):
        found[id(weight)] = total
    return found


def _equilibrium(weight: Weight, square: float | None) -> float | None:
    """Where the shrink of decay and the growth by orthogonal steps cancel, at this lr.

    Of Adam's updates a training adds up like steps of size 1 an element: |w|^2 = lr / (2 * weight_decay) * elements. SGD's are
    gradients, which grow as 1 / |w|: |w|^4 = lr / (2 * weight_decay * (1 - momentum)) * (|g| |w|)^2, from .grad.
    """
    group = weight.group
    lr, decay = group.lr, group.weight_decay
    if not lr or not decay:
        return None
    if rules.is_adaptive(group.optimizer, group.settings):
        return math.sqrt(lr / (2 * decay) * weight.numel) if group.kind == rules.DECOUPLED else None
    grad = weight.param.grad if weight.param is not None else None
    if rules.known_class(group.optimizer) != "SGD" or grad is None or not square or type(local(grad)) is not Tensor:
        return None
    momentum = rules.number(group.settings.get("momentum", 0)) or 0.0
    if grad.is_sparse or grad.is_meta or not 0 <= momentum < 1:
        return None
    steepness = sums_of_squares([local(grad)])[0] * square
    return float((lr / (2 * decay * (1 - momentum)) * steepness) ** 0.25)
