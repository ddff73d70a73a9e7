"""What is known of an optimizer: how it decays, where it rounds, which implementation makes its steps.

Only torch.optim's classes and ours are known; of others, what their attributes and param groups say. None means: not known.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..optimizer import FusedOptimizer
from ..tables.coefficients import DecayRule

COUPLED, DECOUPLED = "coupled", "decoupled"
OURS, FUSED, FOREACH, LOOP = "fused_l2", "fused", "foreach", "for-loop"

_COUPLED = ("SGD", "ASGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Adam")
_DECOUPLED = ("AdamW", "Adafactor", "Muon")
_ADAPTIVE = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "Adafactor")


def number(value: Any) -> float | None:
    """A hyperparameter as a float; None if it has none, as on the meta device."""
    if isinstance(value, Tensor) and (value.is_meta or value.numel() != 1):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def known_class(optimizer: Any) -> str | None:
    """The name of the class of torch.optim, or of ours, that makes the steps of this optimizer."""
    kind: Any = type(optimizer)
    return _known_class(kind)


@cache
def _known_class(kind: type) -> str | None:
    for base in kind.__mro__:
        if issubclass(base, FusedOptimizer) and base.__module__.startswith("fused_l2."):
            return base.__name__
        if base is not Optimizer and base.__module__.split(".")[:2] == ["torch", "optim"]:
            # A subclass with a step of its own may do anything.
            same = inspect.unwrap(kind.step) is inspect.unwrap(base.step)  # type: ignore[attr-defined]
            return base.__name__ if same else None
    return None


def is_ours(optimizer: Any) -> bool:
    return isinstance(optimizer, FusedOptimizer)


def is_adaptive(optimizer: Any, group: Mapping[str, Any]) -> bool:
    """Whether updates are divided by the size of gradients: their size is that of lr."""
    name = known_class(optimizer)
    return name in _ADAPTIVE if name is not None else "betas" in group or "beta1" in group


def decay_kind(optimizer: Any, group: Mapping[str, Any]) -> str | None:
    """Coupled decay is added to the gradient, decoupled decay shrinks the weights."""
    if "decoupled_weight_decay" in group:
        return DECOUPLED if group["decoupled_weight_decay"] else COUPLED
    name = known_class(optimizer)
    if name in _DECOUPLED:
        return DECOUPLED
    if name in _COUPLED:
        own = getattr(optimizer, "decoupled_weight_decay", False) if is_ours(optimizer) else False
        return DECOUPLED if own else COUPLED
    mode = getattr(optimizer, "adam_w_mode", None)  # apex, Transformer Engine, DeepSpeed
    if isinstance(mode, (bool, int)):
        return DECOUPLED if mode else COUPLED
    return None


RENAMED = "weight_decay_rate"  # what BERT's first optimizers called it


def decay_key(optimizer: Any, group: Mapping[str, Any]) -> str:
    """The key of a group that holds its decay. The classes that are known read weight_decay and nothing else; of others, the
    one that is there."""
    if known_class(optimizer) is None and RENAMED in group and "weight_decay" not in group:
        return RENAMED
    return "weight_decay"


def decay_rate(optimizer: Any, index: int, group: Mapping[str, Any], lr: float | None) -> float | None:
    """By which share each step shrinks a weight in the long run, at this lr; None where that is not one number.

    Coupled decay through a momentum arrives 1 / (1 - momentum) times; Adam's is divided by sqrt(v), other for each weight.
    """
    decay = number(group.get(decay_key(optimizer, group)))
    if lr is None or decay is None or decay == 0:
        return None
    if is_ours(optimizer):
        rule = optimizer._stepper.options.decay_rule_of(index)
        peak = optimizer._stepper.options.max_lr or optimizer._stepper.initial_lrs.get(index, lr)
        if rule is DecayRule.FULLY_DECOUPLED:
            return decay * (lr / peak if peak else 0.0)
        if rule is DecayRule.CORRECTED:
            decay *= lr / peak if peak else 0.0
    kind, name = decay_kind(optimizer, group), known_class(optimizer)
    if kind == DECOUPLED:
        return lr * decay
    if kind == COUPLED and name == "SGD":
        momentum, dampening = number(group.get("momentum", 0)) or 0.0, number(group.get("dampening", 0)) or 0.0
        through = (1 - dampening) / (1 - momentum) if 0 < momentum < 1 else 1.0
        return lr * decay * through
    return None


def implementation(optimizer: Any, group: Mapping[str, Any]) -> str | None:
    """Which of torch.optim's implementations steps this group; ours is one of its own."""
    if is_ours(optimizer):
        return OURS
    if known_class(optimizer) is None:
        return None
    if group.get("fused"):
        return FUSED
    if group.get("foreach"):
        return FOREACH
    if group.get("foreach") is None and group.get("fused") is None:
        devices = {p.device.type for p in group["params"] if isinstance(p, Tensor)}
        if devices and devices <= {"cuda", "xpu"}:
            return FOREACH
    return LOOP


def keeps_float32(optimizer: Any, group: Mapping[str, Any]) -> bool | None:
    """Whether the float32 value of 16-bit parameters is kept, or rounded with the right mean."""
    if is_ours(optimizer):
        return bool(optimizer.low_precision != "round")
    if any(isinstance(getattr(optimizer, name, None), list) for name in ("fp32_from_fp16_groups", "param_groups_master")):
        return True
    return False if known_class(optimizer) is not None else None


def moments_dtype(optimizer: Any, param_dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype that moments not made yet will have."""
    if is_ours(optimizer):
        if optimizer.state_dtype is not None:
            return optimizer.state_dtype  # type: ignore[no-any-return]
        return torch.float32 if optimizer.low_precision != "round" and param_dtype != torch.float64 else param_dtype
    return param_dtype if known_class(optimizer) is not None else None
