"""How weight decay is applied beyond L2 and decoupled: what ``decay_rule``, ``max_lr`` and ``cautious`` ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .coefficients import DecayRule

_NAMES = {rule.name.lower(): rule for rule in DecayRule}


@dataclass(frozen=True)
class DecayOptions:
    """``rules`` is one rule for all param groups, or one for each; ``max_lr`` None stands for each group's own first lr."""

    rules: DecayRule | tuple[DecayRule, ...] = DecayRule.PLAIN
    max_lr: float | None = None
    cautious: bool = False

    def rule_of(self, group: int) -> DecayRule:
        if isinstance(self.rules, DecayRule):
            return self.rules
        return self.rules[group] if group < len(self.rules) else DecayRule.PLAIN

    def names(self) -> str | list[str]:
        if isinstance(self.rules, DecayRule):
            return self.rules.name.lower()
        return [rule.name.lower() for rule in self.rules]


def make_decay_options(decay_rule: Any, max_lr: Any, cautious: bool) -> DecayOptions:
    """The options those arguments ask for.

    Raises:
        ValueError, TypeError: if an argument is none of what it may be.
    """
    if isinstance(decay_rule, str):
        rules: Any = _rule(decay_rule)
    elif isinstance(decay_rule, Sequence):
        rules = tuple(map(_rule, decay_rule))
    else:
        raise TypeError(
            f"decay_rule must be one of {', '.join(_NAMES)}, or a list with one for each param group, got {decay_rule!r}"
        )
    if max_lr is not None:
        if isinstance(max_lr, (str, bytes)) or not hasattr(max_lr, "__float__"):
            raise TypeError(f"max_lr must be a number, got {max_lr!r} of type {type(max_lr).__name__}")
        max_lr = float(max_lr)
        if not (math.isfinite(max_lr) and max_lr > 0):
            raise ValueError(f"Invalid max_lr: {max_lr}; expected the largest lr of the schedule, > 0, or None")
    return DecayOptions(rules, max_lr, bool(cautious))


def _rule(name: Any) -> DecayRule:
    if name not in _NAMES:
        raise ValueError(f"decay_rule must be one of {', '.join(_NAMES)}, got {name!r}")
    return _NAMES[name]
