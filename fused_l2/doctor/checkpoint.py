"""``python -m fused_l2 doctor checkpoint.pt``: what groups and states of a state dict show. Nothing in it is executed."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tables.modes import CODES, STATE_NAMES
from . import report_on
from .report import Report
from .subject import Subject, Weight, make_group

_LIKE_PARAMETER = ("exp_avg", "momentum_buffer", "exp_avg_sq", *CODES.values(), *STATE_NAMES)


class Saved:
    """Stands for the optimizer of a state dict: groups, and a class that nobody knows."""

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        self.param_groups = [dict(group) for group in state_dict["param_groups"]]
        self.state: dict[Any, Any] = {}
        self.defaults: dict[str, Any] = {}


def examine_checkpoint(path: str | Path, **told: Any) -> list[Report]:
    """A report for every optimizer's state dict in a file that torch.save wrote.

    Raises:
        ValueError: if the file holds none, or more than tensors and plain data, which loading would have to execute.
    """
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain data, and loading it could execute code. Save optimizer.state_dict() by "
            f"itself, or allow the classes you trust with torch.serialization.add_safe_globals."
        ) from error
    found = list(_optimizers(loaded, ""))
    if not found:
        raise ValueError(f"{path} holds no optimizer's state dict: none of its entries has 'state' and 'param_groups'")
    return [_report(f"{path}{where}", state_dict, told) for where, state_dict in found]


def _optimizers(value: Any, where: str, depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        if isinstance(value.get("param_groups"), list) and isinstance(value.get("state"), Mapping):
            yield where, value
        elif depth < 3:
            for key, inner in value.items():
                yield from _optimizers(inner, f"{where}[{key!r}]", depth + 1)
    elif isinstance(value, list) and depth < 3:
        for i, inner in enumerate(value):
            yield from _optimizers(inner, f"{where}[{i}]", depth + 1)


def _report(title: str, state_dict: Mapping[str, Any], told: dict[str, Any]) -> Report:
    saved = Saved(state_dict)
    groups, weights = [], []
    for index, settings in enumerate(saved.param_groups):
        group = make_group(saved, 0, index, settings)
        groups.append(group)
        names = settings.get("param_names")
        for position, key in enumerate(settings["params"]):
            state = state_dict["state"].get(key, {})
            like = next((state[k] for k in _LIKE_PARAMETER if isinstance(state.get(k), Tensor)), None)
            weights.append(
                Weight(
                    str(names[position]) if names else f"{index}.{position}", group, position, None,
                    tuple(like.shape) if like is not None else (), None, None, state,
                )
            )  # fmt: skip
    subject = Subject([saved], groups, weights, None, [], [], [], set())
    for name, value in told.items():
        setattr(subject, name, value)
    subject.unknown.append(
        "A state dict says neither which class wrote it nor what the parameters are: their values, dtypes and modules, and "
        "whether a decay is coupled where no group says so, are not known. Shapes are those of the states, rates those of "
        "decay_rule='plain'."
    )
    if any("decoupled_weight_decay" in g.settings for g in groups):
        subject.unknown.append(f"Groups say that their decay is {' or '.join(sorted({g.kind or '?' for g in groups}))}.")
    return report_on(subject, title, read_weights=False)
