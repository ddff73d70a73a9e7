"""No false alarm: recipes as their projects write them have nothing wrong, and of doubtful things what experts would ask."""

from __future__ import annotations

from typing import Any

import pytest

import fused_l2
import fused_l2.doctor
from doctor.examining import assert_unchanged, backward, snapshot
from doctor.recipes import RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.__name__)
def test_only_what_an_expert_would_ask(recipe: Any):
    made = recipe()
    for step in range(2):
        for optimizer in made.optimizers:
            optimizer.zero_grad()
        backward(made.model, made.inputs)
        before = [snapshot(o, made.model) for o in made.optimizers]
        report = fused_l2.doctor.examine(made.optimizers, made.model, **made.told)
        for optimizer, seen in zip(made.optimizers, before, strict=True):
            assert_unchanged(seen, snapshot(optimizer, made.model))
        assert report.codes("wrong") == set(), str(report)
        assert report.codes("doubtful") == made.asked, str(report)
        assert not report.unknown
        if step == 0:
            for optimizer in made.optimizers:
                optimizer.step()


def test_at_least_twenty():
    assert len(RECIPES) >= 20
