"""A step that something ends: an interrupt, an exception in a hook, a warning that is an error. No later step is wrong for it.

Interrupts at random moments: tests/stress/signals.py.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from comparing import CASES, assert_same_bits, assert_unchanged, each, make_params, set_grads, snapshot
from interrupts import AT, Interrupt, Scenario, Sweep, Tracer

import fused_l2

_NO_NESTEROV = {"dampening": 0.5, "nesterov": False}
# Rule, a letter for each parameter (f: float32, h: bfloat16, e: empty, s: strided, which plain PyTorch steps), what happens
# before the step that is ended, options, and which step that is.
RUNS: dict[str, tuple[str, str, str, dict[str, Any], int]] = {
    "first step of SGD": ("SGD", "ff", "", _NO_NESTEROV, 0),
    "first step of AdamW": ("AdamW", "f", "", {}, 0),
    "first step, plain PyTorch too": ("SGD", "fs", "", _NO_NESTEROV, 0),
    "second step of SGD": ("SGD", "ffffe", "", _NO_NESTEROV, 1),
    "second step of AdamW": ("AdamW", "ffff", "", {}, 1),
    "second step, stochastic": ("AdamW", "hhh", "", {"low_precision": "stochastic"}, 1),
    "second step, kahan": ("SGD", "hfh", "", {"low_precision": "kahan"}, 1),
    "second step, plain PyTorch too": ("AdamW", "fss", "", {}, 1),
    "second step, clipped": ("AdamW", "ff", "", {"max_grad_norm": 0.5}, 1),
    "new learning rate": ("SGD", "ff", "lr", {}, AT),
    "states replaced": ("AdamW", "ff", "states", {}, AT),
    "parameters moved": ("SGD", "ff", "moved", {}, AT),
    "counter set": ("AdamW", "ff", "counter", {}, AT),
    "weights given": ("AdamW", "h", "weights", {"low_precision": "master"}, AT),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_step_that_is_ended_at_any_line_was_made_or_was_not(run: str, exact_sqrt: Any) -> None:
    name, kinds, event, options, at = RUNS[run]
    sweep = Sweep(lambda: Scenario(name, kinds, event, **options), at)
    ended = sum(sweep.end_at(where) for where in sweep.locations())
    assert ended > 50, f"the step was ended at {ended} lines"


@each
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_exception_in_a_hook_ends_nothing_of_the_step(name: str, at: int, when: str, exact_sqrt: Any) -> None:
    sweep = Sweep(lambda: Scenario(name, "fff"), at)
    run = sweep.before()
    versions = run.bits()["versions"]

    def hook(*_: Any) -> None:
        handle.remove()
        raise Interrupt

    register = run.optimizer.register_step_pre_hook if when == "before" else run.optimizer.register_step_post_hook
    handle = register(hook)
    with pytest.raises(Interrupt):
        run.optimizer.step()
    assert [p._version > v for p, v in zip(run.params, versions, strict=True)] == [when == "after"] * 3
    sweep.check(run, versions, when)


@each
def test_a_warning_that_is_an_error_leaves_no_state(name: str) -> None:
    """The warning of decay that rounding loses is given when everything is ready; with -W error it ends the step."""
    options = {**CASES[name], "weight_decay": 1e-4}
    ends = []
    for fails in (False, True):
        params = make_params((5, 33), torch.bfloat16)
        optimizer = getattr(fused_l2, name)(params, **options)
        set_grads(params, 0)
        if fails:
            before = snapshot(optimizer)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(UserWarning, match="weight decay takes"):
                    optimizer.step()
            assert_unchanged(before, optimizer)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        ends.append([t for p in params for t in (p.detach(), *optimizer.state[p].values())])
    assert_same_bits(*ends)


def test_statistics_are_not_those_of_two_steps() -> None:
    """A step that is ended after it was made has written over what the last one's were made of."""
    run = Scenario("AdamW", "ff", statistics=True)
    run.make()
    assert run.optimizer.statistics is not None
    run.prepare()
    tracer = Tracer()
    tracer.run(run.optimizer.step)
    where = next(at for at in tracer.seen if at[1] == "_remember")
    run.prepare()
    with pytest.raises(Interrupt):
        Tracer((where, 1)).run(run.optimizer.step)
    assert run.optimizer.statistics is None
    run.make()
    assert run.optimizer.statistics is not None
