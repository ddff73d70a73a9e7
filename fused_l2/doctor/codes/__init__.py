"""The checks, one small file for each theme."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..findings import Finding
from ..subject import Subject
from . import groups, membership, speed, states, strength

CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    membership.foreign, membership.not_optimized, membership.twice, membership.tied, membership.frozen,
    states.of_another_model, states.frozen_second_moment, states.learning_rate_zero,
    groups.undecayed, groups.decayed,
    strength.not_read, strength.not_divided, strength.too_strong, strength.coupled, strength.without_effect,
    strength.before_normalization,
    speed.known_broken, speed.many_launches, speed.slow,
)  # fmt: skip
