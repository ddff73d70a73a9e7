"""What ``decay_rule``, ``max_lr`` and ``cautious`` ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .tables.coefficients import DecayRule

_NAMES = {rule.name.lower(): rule for rule in DecayRule}
_EXPECTED = "'plain', 'fully_decoupled' or 'corrected'"


@dataclass(frozen=True)
class Decay:
    """The options of decay. ``rule`` holds one rule per param group, those after the last one being plain."""

    rule: DecayRule | tuple[DecayRule, ...] = DecayRule.PLAIN
    max_lr: float | None = None
    cautious: bool = False

    def rule_of(self, group: int) -> DecayRule:
        if isinstance(self.rule, DecayRule):
            return self.rule
        return self.rule[group] if group < len(self.rule) else DecayRule.PLAIN

    def check_count(self, groups: int) -> None:
        """ValueError if there is not one rule per param group."""
        if not isinstance(self.rule, DecayRule) and len(self.rule) != groups:
            raise ValueError(
                f"decay_rule has {len(self.rule)} rules for {groups} param groups; pass one per group, or one string for all"
            )

    def check(self, group: int, decoupled: bool, remedy: str) -> None:
        """ValueError if this param group's decay is coupled and cannot be. ``remedy``: how to decouple it, or do without."""
        if decoupled:
            return
        rule = self.rule_of(group)
        if self.cautious:
            raise ValueError(
                f"cautious=True needs decoupled weight decay, which param group {group} does not have: where the decay is part "
                f"of the gradient it has no direction of its own to compare. {remedy}"
            )
        if rule is DecayRule.FULLY_DECOUPLED:
            raise ValueError(
                f"decay_rule='fully_decoupled' needs decoupled weight decay, which param group {group} does not have: a decay "
                f"that is part of the gradient is multiplied by lr. {remedy}"
            )


def make_decay(rule: Any, max_lr: Any, cautious: Any) -> Decay:
    """The decay those arguments ask for.

    Raises:
        ValueError, TypeError: if an argument is out of its range, no known rule or not a number.
    """
    rules = _rule(rule) if isinstance(rule, str) else _rules(rule)
    if max_lr is None:
        return Decay(rules, None, bool(cautious))
    if isinstance(max_lr, (str, bytes)) or not hasattr(max_lr, "__float__"):
        raise TypeError(f"max_lr must be a number, got {max_lr!r} of type {type(max_lr).__name__}")
    peak = float(max_lr)
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"Invalid max_lr: {max_lr}; expected a finite number > 0, or None for each group's initial lr")
    return Decay(rules, peak, bool(cautious))


def _rules(rules: Any) -> tuple[DecayRule, ...]:
    if not isinstance(rules, Sequence) or isinstance(rules, (bytes, bytearray)):
        raise TypeError(f"decay_rule must be {_EXPECTED}, or a sequence with one of them per param group, got {rules!r}")
    return tuple(_rule(rule) for rule in rules)


def _rule(rule: Any) -> DecayRule:
    if not isinstance(rule, str) or rule not in _NAMES:
        raise ValueError(f"Invalid decay_rule: {rule!r}; expected {_EXPECTED}")
    return _NAMES[rule]
