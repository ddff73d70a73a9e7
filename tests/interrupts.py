"""Steps that are ended at some moment, and what has to hold afterwards: whatever ends a step, and when, what follows is what
follows a step that was made, or one that was not.

Parameters that the C++ library steps change in one call, so a step that was ended was made as a whole or not at all. Those
that plain PyTorch steps may be half stepped, as in torch.optim; what follows is then what torch.optim makes of the same
parameters and states.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from comparing import CASES, assert_same_bits, differing
from torch import Tensor, nn

import fused_l2

OURS = str(Path(fused_l2.__file__).parent) + "/"


class Interrupt(BaseException):
    """What ends a step: not an Exception, as KeyboardInterrupt is not."""


Location = tuple[str, str, int, str]  # file, function, line or instruction, event


class Tracer:
    """Counts the lines that a call runs through in our code, or raises at one of them. With ``opcodes`` also the instructions
    of which lines are made."""

    def __init__(
        self, at: tuple[Location, int] | None = None, error: type[BaseException] = Interrupt, opcodes: bool = False
    ) -> None:
        self.seen: dict[Location, int] = {}  # how often
        self.has_raised = False
        self._at, self._error, self._opcodes = at, error, opcodes

    def _call(self, frame: Any, event: str, _: Any) -> Any:
        # What is raised in a finalizer goes nowhere.
        if not frame.f_code.co_filename.startswith(OURS) or frame.f_code.co_name == "__del__":
            return None
        frame.f_trace_opcodes = self._opcodes
        return self._line

    def _line(self, frame: Any, event: str, _: Any) -> Any:
        # A generator that is thrown away returns, too, and what is raised there goes nowhere.
        if event in ("line", "opcode") or (event == "return" and not frame.f_code.co_flags & inspect.CO_GENERATOR):
            number = frame.f_lasti if event == "opcode" else frame.f_lineno
            here = frame.f_code.co_filename[len(OURS) :], frame.f_code.co_name, number, event
            count = self.seen[here] = self.seen.get(here, 0) + 1
            if self._at == (here, count):
                self.has_raised = True
                raise self._error(f"at {here}")
        return self._line

    def run(self, call: Callable[[], Any]) -> None:
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            call()
        finally:
            sys.settrace(before)


class Scenario:
    """A short training run. ``before(step)`` sets gradients and changes what the run changes before this step."""

    def __init__(self, name: str, kinds: str, event: str = "", **options: Any) -> None:
        """``kinds``: a letter for each parameter, see ``make_param``. ``event``: what happens before step ``AT``."""
        self.event, self.native = event, "s" not in kinds
        self.params = [make_param(kind, i) for i, kind in enumerate(kinds)]
        groups = [{"params": self.params[::2]}, {"params": self.params[1::2], "lr": 0.02}]
        self.optimizer = getattr(fused_l2, name)([g for g in groups if g["params"]], **{**CASES[name], **options})
        self.step = 0

    def prepare(self) -> None:
        generator = torch.Generator().manual_seed(self.step)
        for i, p in enumerate(self.params):
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            if self.step % 2 == 1 and i == 3:
                p.grad = None
        if self.step == AT and self.event:
            EVENTS[self.event](self)
        self.step += 1

    def make(self) -> None:
        self.prepare()
        self.optimizer.step()

    def bits(self) -> dict[str, Any]:
        """All that a step changes."""
        states = [dict(self.optimizer.state.get(p, {})) for p in self.params]
        return {
            "params": [p.detach().clone() for p in self.params],
            "states": [{k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()} for own in states],
            "versions": [p._version for p in self.params],
        }


AT = 2  # the step before which a scenario's event happens


def make_param(kind: str, number: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(100 + number)
    values = torch.randn(4, 6, generator=generator)
    if kind == "s":  # strided: stepped by plain PyTorch
        return nn.Parameter(values[:, ::2])
    if kind == "h":
        return nn.Parameter(values.bfloat16())
    if kind == "e":
        return nn.Parameter(values[:0])
    if kind in "wv":  # rows that 8-bit states fit
        wide = torch.randn(3, 64, generator=generator)
        return nn.Parameter(wide if kind == "w" else wide.bfloat16())
    return nn.Parameter(values)


def _new_lr(run: Scenario) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] *= 0.5
        group["weight_decay"] = 0.05


def _new_shape_of_computation(run: Scenario) -> None:
    for group in run.optimizer.param_groups:
        group["maximize"] = True


def _states_replaced(run: Scenario) -> None:
    for p in run.params[:2]:
        for key, value in run.optimizer.state[p].items():
            run.optimizer.state[p][key] = value.clone()


def _states_cleared(run: Scenario) -> None:
    run.optimizer.state.clear()


def _loaded(run: Scenario) -> None:
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


def _moved(run: Scenario) -> None:
    for p in run.params[:2]:
        p.data = p.data.clone()


def _counter_set(run: Scenario) -> None:
    for p in run.params[:2]:
        if "step" in run.optimizer.state[p]:
            run.optimizer.state[p]["step"].fill_(7.0)


def _weights_given(run: Scenario) -> None:
    """Before a first step of these weights: they wait for it."""
    run.optimizer.state.clear()
    generator = torch.Generator().manual_seed(5)
    params = [p for group in run.optimizer.param_groups for p in group["params"]]
    run.optimizer.load_master_params([torch.randn(p.shape, generator=generator) for p in params])


EVENTS: dict[str, Callable[[Scenario], None]] = {
    "lr": _new_lr,
    "maximize": _new_shape_of_computation,
    "states": _states_replaced,
    "cleared": _states_cleared,
    "loaded": _loaded,
    "moved": _moved,
    "counter": _counter_set,
    "weights": _weights_given,
}


def are_equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether parameters and states have the same bits."""
    if any(differing(x, y) for x, y in zip(a["params"], b["params"], strict=True)):
        return False
    for x, y in zip(a["states"], b["states"], strict=True):
        if x.keys() != y.keys():
            return False
        for key, value in x.items():
            if isinstance(value, Tensor) and (value.dtype is not y[key].dtype or differing(value, y[key])):
                return False
    return True


class Sweep:
    """Ends step ``at`` of a scenario at one location after another."""

    def __init__(self, make: Callable[[], Scenario], at: int, error: type[BaseException] = Interrupt) -> None:
        self.make, self.at, self.error = make, at, error
        self.made = [self._twin(True, more) for more in range(3)]  # after the step, and after one and two more
        self.left_out = [self._twin(False, more) for more in range(3)]

    def before(self) -> Scenario:
        """A run whose next call is the step that is ended."""
        run = self.make()
        for _ in range(self.at):
            run.make()
        run.prepare()
        return run

    def _twin(self, is_made: bool, more: int) -> dict[str, Any]:
        run = self.before()
        if is_made:
            run.optimizer.step()
        for _ in range(more):
            run.make()
        return run.bits()

    def locations(self, all_of_them: bool = False) -> Iterator[tuple[Location, int]]:
        """The lines that the step runs through: each one's last time, or every time."""
        tracer = Tracer()
        tracer.run(self.before().optimizer.step)
        for where, count in tracer.seen.items():
            yield from ((where, k) for k in (range(1, count + 1) if all_of_them else (count,)))

    def end_at(self, where: tuple[Location, int]) -> bool:
        """End the step there and check what follows. False if the step did not come there."""
        run = self.before()
        versions = run.bits()["versions"]
        tracer = Tracer(where, self.error)
        with contextlib.suppress(self.error):
            tracer.run(run.optimizer.step)
        if not tracer.has_raised:
            return False
        self.check(run, versions, str(where))
        return True

    def check(self, run: Scenario, versions: list[int], where: str) -> None:
        now = run.bits()
        changed = [i for i, (x, y) in enumerate(zip(now["params"], self.left_out[0]["params"], strict=True)) if differing(x, y)]
        for i in changed:
            assert now["versions"][i] > versions[i], f"{where}: parameter {i} changed, and autograd does not know"
        if not run.native:
            return self._check_against_torch(run, where)
        twin = next((t for t in (self.left_out, self.made) if are_equal(now, t[0])), None)
        assert twin is not None, f"{where}: the step was half made"
        for more in (1, 2):
            run.make()
            assert are_equal(run.bits(), twin[more]), f"{where}: {more} steps later"

    @staticmethod
    def _check_against_torch(run: Scenario, where: str) -> None:
        """What follows is what torch.optim makes of parameters and states as they are now."""
        ours = run.optimizer
        theirs_params = [nn.Parameter(_alike(p.detach())) for p in run.params]
        of = dict(zip(run.params, theirs_params, strict=True))
        groups = [{**g, "params": [of[p] for p in g["params"]]} for g in ours.param_groups]
        theirs = getattr(torch.optim, type(ours).__name__)(groups)
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
        for more in (1, 2):
            run.make()
            for p, q in of.items():
                q.grad = None if p.grad is None else p.grad.clone()
            theirs.step()
            for i, (p, q) in enumerate(of.items()):
                assert_same_bits(p, q, f"{where}, {more} steps later, parameter {i}:")
                for key, value in theirs.state.get(q, {}).items():
                    if isinstance(value, Tensor):
                        assert_same_bits(ours.state[p][key], value, f"{where}, {more} steps later, {key} of {i}:")


def _alike(values: Tensor) -> Tensor:
    """A copy with the same strides."""
    copied = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype)
    return copied.copy_(values)
