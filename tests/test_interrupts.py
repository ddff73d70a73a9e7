"""A step that something ends: an interrupt, an exception in a hook, a warning that is an error. No later step is wrong for it.

Interrupts at random moments: tests/stress/signals.py.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import CASES, assert_same_bits, assert_unchanged, differing, each, make_params, set_grads, snapshot
from interrupts import AT, Interrupt, Scenario, Sweep, Tracer, are_equal

import fused_l2

_NO_NESTEROV = {"dampening": 0.5, "nesterov": False}
# Rule, a letter for each parameter (f: float32, h: bfloat16, e: empty, s: strided, which plain PyTorch steps, w and v: float32
# and bfloat16 in rows of 64), what happens before the step that is ended, options, and which step that is.
RUNS: dict[str, tuple[str, str, str, dict[str, Any], int]] = {
    "first step of SGD": ("SGD", "ff", "", _NO_NESTEROV, 0),
    "first step of AdamW": ("AdamW", "f", "", {}, 0),
    "first step, plain PyTorch too": ("SGD", "fs", "", _NO_NESTEROV, 0),
    "second step of SGD": ("SGD", "ffffe", "", _NO_NESTEROV, 1),
    "second step of AdamW": ("AdamW", "ffff", "", {}, 1),
    "second step, stochastic": ("AdamW", "hhh", "", {"low_precision": "stochastic"}, 1),
    "second step, kahan": ("SGD", "hfh", "", {"low_precision": "kahan"}, 1),
    "first step, 8 bits": ("AdamW", "wfw", "", {"state_dtype": "8bit"}, 0),
    "second step, 8 bits": ("SGD", "vwh", "", {"low_precision": "remainder8", "state_dtype": "8bit"}, 1),
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


@pytest.mark.parametrize(
    "options", [{"state_dtype": torch.float32}, {"low_precision": "master"}, {"low_precision": "remainder"}]
)
def test_a_load_that_is_ended_at_any_line_was_made_or_was_not(options: Any) -> None:
    """torch puts new states there first, cast to the parameters' dtype."""

    def prepared() -> tuple[Scenario, dict[str, Any]]:
        run, other = (Scenario("AdamW", "hh", **options) for _ in range(2))
        for _ in range(3):
            other.make()
        run.make()
        return run, other.optimizer.state_dict()

    def then(run: Scenario) -> dict[str, Any]:
        run.prepare()
        run.optimizer.step()
        return run.bits()

    run, given = prepared()
    left_out = then(run)
    run, given = prepared()
    tracer = Tracer()
    tracer.run(functools.partial(run.optimizer.load_state_dict, given))
    made = then(run)
    ended = 0
    for where, count in tracer.seen.items():
        run, given = prepared()
        with contextlib.suppress(Interrupt):
            Tracer((where, count)).run(functools.partial(run.optimizer.load_state_dict, given))
        ended += 1
        found = then(run)
        assert are_equal(found, left_out) or are_equal(found, made), where
    assert ended > 50


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt of a finalizer goes nowhere
@each
def test_a_backward_pass_that_is_ended_at_any_line_uses_no_gradient_twice(name: str) -> None:
    def prepared() -> tuple[list[torch.nn.Parameter], Any, Any]:
        params = make_params((4, 5))
        optimizer = getattr(fused_l2, name)(params, **CASES[name])
        handle = fused_l2.step_in_backward(optimizer)
        backward(params)
        optimizer.step()
        return params, optimizer, handle

    def backward(params: list[torch.nn.Parameter]) -> None:
        torch.stack([(p * (i + 1)).sum() for i, p in enumerate(params)]).sum().backward()

    params, optimizer, _handle = prepared()
    tracer = Tracer(opcodes=True)
    tracer.run(functools.partial(backward, params))
    ended = 0
    for where in [(at, count) for at, count in tracer.seen.items() if at[0] in ("backward.py", "step/stepper.py")]:
        params, optimizer, _handle = prepared()
        before = [p.detach().clone() for p in params]
        once = Tracer(where, opcodes=True)
        with contextlib.suppress(Interrupt):
            once.run(functools.partial(backward, params))
        if not once.has_raised:
            continue
        ended += 1
        then = [p.detach().clone() for p in params]
        optimizer.step()
        for p, was, now in zip(params, before, then, strict=True):
            assert torch.equal(was, now) or torch.equal(now, p), where
    assert ended > (50 if sys.version_info < (3, 12) else 25)  # later Pythons tell of fewer instructions


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


# What changes param groups or options, in an optimizer of three groups that differ in all that is known of a group besides its
# keys: what is done before, and what is interrupted.
CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "a group was removed": (lambda optimizer: optimizer.param_groups.pop(0), lambda optimizer: optimizer.options),
    "groups have changed places": (lambda optimizer: optimizer.param_groups.reverse(), repr),
    "a group is added": (
        lambda optimizer: setattr(optimizer, "decay_rule", "corrected"),
        lambda optimizer: optimizer.add_param_group({"params": make_params((3,), seed=7), "lr": 0.3}),
    ),
    "clipping is switched on": (lambda optimizer: None, lambda optimizer: setattr(optimizer, "max_grad_norm", 0.01)),
    "statistics are switched on": (lambda optimizer: None, lambda optimizer: setattr(optimizer, "statistics", True)),
    "the rules are replaced": (
        lambda optimizer: None,
        lambda optimizer: setattr(optimizer, "decay_rule", ["fully_decoupled", "plain", "plain"]),
    ),
}
SETTING = ("step/stepper.py", "optimizer.py")  # what sets something; what it calls does not


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt of a finalizer goes nowhere
@pytest.mark.parametrize("change", CHANGES)
def test_groups_and_options_change_as_a_whole_or_not_at_all(change: str) -> None:
    """An interrupt between any two instructions: what an optimizer says of itself and what it does are those of before, or
    those of after, and of no third one."""
    prepare, interrupted = CHANGES[change]

    def before() -> Any:
        groups = [{"params": make_params((2, 4), seed=i), "lr": 0.1 * (i + 1)} for i in range(3)]
        optimizer = fused_l2.AdamW(
            groups,
            weight_decay=0.3,
            decay_rule=["plain", "corrected", "fully_decoupled"],
            norm_process_group=["replicated", None, "world"],
        )
        for step in range(2):
            steps(optimizer, step)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5  # from now on the lr that it was added with matters
        prepare(optimizer)
        return optimizer

    def steps(optimizer: Any, step: int) -> None:
        set_grads([p for group in optimizer.param_groups for p in group["params"]], step)
        optimizer.step()

    def after(optimizer: Any) -> tuple[Any, ...]:
        for step in range(2, 4):
            steps(optimizer, step)
        weights = [p.tolist() for group in optimizer.param_groups for p in group["params"]]
        norm = optimizer.grad_norm
        return optimizer.options, weights, norm if norm is None else norm.item(), optimizer.statistics is None

    def result_of(run: Callable[[Any], None]) -> tuple[Any, ...]:
        optimizer = before()
        run(optimizer)
        return after(optimizer)

    expected = [result_of(lambda optimizer: None), result_of(interrupted)]
    tracer, seen = Tracer(opcodes=True), before()
    tracer.run(lambda: interrupted(seen))
    places = [(at, k) for at, count in tracer.seen.items() if at[0] in SETTING and at[3] == "opcode" for k in {1, count}]
    assert len(places) > (100 if sys.version_info < (3, 12) else 10)  # later Pythons tell of fewer instructions
    for place in places:
        optimizer, tracer = before(), Tracer(place, opcodes=True)
        with contextlib.suppress(Interrupt):
            tracer.run(functools.partial(interrupted, optimizer))
        assert tracer.has_raised
        assert after(optimizer) in expected, place


SWITCHES = {
    "master to remainder": ("low_precision", "master", "remainder", 2),
    "remainder to round": ("low_precision", "remainder", "round", 2),
    "before a first step": ("low_precision", "remainder8", "kahan", 0),
    "to 8 bits": ("state_dtype", None, "8bit", 2),
    "from 8 bits": ("state_dtype", "8bit", torch.float32, 2),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_an_option_that_changes_states_changes_all_of_them_or_none(switch: str) -> None:
    """Ended at any line, the optimizer is what it was or what it was to become: weights to the last bit that rounding left
    out, states, option, and the steps that follow."""
    option, old, new, steps = SWITCHES[switch]

    def made() -> Scenario:
        run = Scenario("AdamW", "h", **{option: old})
        weights = [torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
        run.params = [torch.nn.Parameter(w.bfloat16()) for w in weights]
        run.optimizer = fused_l2.AdamW(run.params, **CASES["AdamW"], **{option: old})
        run.optimizer.load_master_params(weights)
        for _ in range(steps):
            run.make()
        return run

    def after(run: Scenario) -> list[Any]:
        ends = [getattr(run.optimizer, option), run.bits(), run.optimizer.master_params()]
        run.make()
        return [*ends, run.bits(), run.optimizer.master_params()]

    def same(a: Any, b: Any) -> bool:
        return (
            a[0] == b[0]
            and are_equal(a[1], b[1])
            and are_equal(a[3], b[3])
            and not any(map(differing, a[2] + a[4], b[2] + b[4]))
        )

    whole = made()
    tracer = Tracer()
    tracer.run(lambda: setattr(whole.optimizer, option, new))
    untouched, switched = after(made()), after(whole)
    assert not same(untouched, switched)
    ends = []
    for where, count in ((w, k) for w, n in tracer.seen.items() for k in {1, n}):
        run = made()
        ending = Tracer((where, count))
        with contextlib.suppress(Interrupt):
            ending.run(lambda run=run: setattr(run.optimizer, option, new))
        now = after(run)
        assert ending.has_raised
        assert same(now, untouched) or same(now, switched), f"{where}, time {count}"
        ends.append(same(now, switched))
    assert not all(ends), "the first lines change nothing"
