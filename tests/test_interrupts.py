"""A step that something ends: an interrupt, an exception in a hook, a warning that is an error. No later step is wrong for it."""

from __future__ import annotations

from typing import Any

import pytest
from interrupts import AT, EVENTS, Scenario, Sweep

NATIVE = [
    ("SGD", "fff", {}),
    ("SGD", "ffffe", {"dampening": 0.5, "nesterov": False}),
    ("AdamW", "ffff", {}),
    ("AdamW", "hhh", {"low_precision": "stochastic"}),
    ("SGD", "hfh", {"low_precision": "kahan"}),
]
MIXED: list[Any] = [("SGD", "fsfs", {"dampening": 0.5, "nesterov": False}), ("AdamW", "sfs", {})]


def sweep(name: str, kinds: str, at: int, event: str = "", **options: Any) -> None:
    found = Sweep(lambda: Scenario(name, kinds, event, **options), at)
    ended = sum(found.end_at(where) for where in found.locations())
    assert ended > 50, f"the step was ended at {ended} lines"


@pytest.mark.parametrize("at", [0, 1, AT])
@pytest.mark.parametrize(("name", "kinds", "options"), [*NATIVE, *MIXED], ids=str)
def test_a_step_that_is_ended_at_any_line_was_made_or_was_not(
    name: str, kinds: str, options: dict[str, Any], at: int, exact_sqrt: Any
) -> None:
    sweep(name, kinds, at, **options)
