"""One line of Python that mends something, for a script with ``model``, ``optimizer``, ``torch`` and ``fused_l2``."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .. import rules
from ..subject import Group, Subject

DECAY_GROUPS = "fused_l2.weight_decay.param_groups(model, weight_decay={})"


def constructor(subject: Subject, parameters: str, which: int = 0, kind: str | None = None, **changed: Any) -> str:
    """Make the optimizer again with other parameters, or of another class, with the arguments it has."""
    optimizer = subject.optimizers[which]
    known = rules.known_class(optimizer)
    package = "fused_l2" if rules.is_ours(optimizer) else "torch.optim"
    name = kind or (f"{package}.{known}" if known else "type(optimizer)")
    arguments = {**arguments_of(optimizer), **changed}
    if parameters.startswith("fused_l2.weight_decay.param_groups"):
        arguments.pop("weight_decay", None)
    if name.startswith("fused_l2."):
        arguments = {k: v for k, v in arguments.items() if k not in ("foreach", "fused")}
    if name in ("torch.optim.AdamW", "fused_l2.AdamW"):
        arguments.pop("decoupled_weight_decay", None)
    text = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f"optimizer = {name}({parameters}{text})"


def arguments_of(optimizer: Any) -> dict[str, Any]:
    """The arguments that are not their class's defaults, lr always."""
    try:
        known = inspect.signature(type(optimizer).__init__).parameters
    except (TypeError, ValueError):
        known = {}  # type: ignore[assignment]
    found = {}
    for key, value in getattr(optimizer, "defaults", {}).items():
        if key in known and (key == "lr" or value != known[key].default) and isinstance(value, (int, float, tuple, bool)):
            found[key] = value
    if rules.is_ours(optimizer):
        found |= {k: v for k, v in optimizer._stepper.options.changed().items() if not isinstance(v, torch.dtype)}
    return found


def ours(subject: Subject, which: int = 0, **options: Any) -> str:
    """The same param groups in the class of ours that does the same."""
    known = rules.known_class(subject.optimizers[which])
    name = known if known in ("SGD", "Adam", "AdamW") else "AdamW"
    text = "".join(f", {key}={value!r}" for key, value in options.items())
    if rules.is_ours(subject.optimizers[which]):
        return "; ".join(f"optimizer.{key} = {value!r}" for key, value in options.items())
    return f"optimizer = fused_l2.{name}(optimizer.param_groups{text})"


def set_decay(groups: list[Group], value: str) -> str:
    return "; ".join(group.code(group.decay_key, value) for group in groups)


def set_of(names: tuple[str, ...]) -> str:
    return "{" + ", ".join(f'"{name}"' for name in names) + "}"
