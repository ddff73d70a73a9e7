"""Makes the steps of one optimizer, or of one parameter of it (``step_in_backward``).

One step: look at what changed and update the plan; compute coefficients; decide about clipping and skipping, if asked
for; make new state visible; launch.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .._warnings import warn
from ..options import Options
from ..parameters.shards import LocalGradients
from ..statistics import LazyStatistics, Statistics
from ..tables.control import INV_SCALE, NORM, SKIP, Control, Prologue
from .groups import Groups
from .plan import Plan
from .rules import UpdateRule
from .surroundings import dispatch_modes, functorch_level, outside_transforms, refuse_modes

_steppers: weakref.WeakSet[Any] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a process that was forked while another thread was in a step: that thread is not there, and would never be done."""
    for stepper in _steppers:
        stepper.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


class Stepper:
    """Options, results and the plan of an optimizer. Wrappers that copy an optimizer's ``__dict__`` share it.

    ``param_groups`` and ``state`` are given to each step, because torch replaces them.
    """

    options: Options
    _decides: bool
    _measures: bool
    _prologue: Prologue

    def __init__(self, rule: UpdateRule, options: Options, first: int = 0) -> None:
        """``first``: which of an optimizer's parameters the first one is, for random bits."""
        self.rule, self._first = rule, first
        self.initial_lrs: dict[int, float] = {}  # by param group: its lr when it was added
        self.waiting: dict[Tensor, dict[str, Any]] = {}  # states set before the first step, by parameter
        self._groups_seen: list[tuple[dict[str, Any], Any]] = []  # with their first parameters
        self.warned: set[str] = set()  # what this optimizer has warned of
        self.singles: list[Any] = []  # what step_in_backward steps with
        # Threads that use one optimizer wait for each other. What comes within a step of the same thread, as a signal handler
        # does, does not wait.
        self.lock = threading.RLock()
        _steppers.add(self)
        self.tell_scaler: Callable[[Tensor], None] | None = None  # takes what was found in all processes
        self._gradients = LocalGradients()
        self._plan: Plan | None = None
        self._drops = 0
        self._captured: list[Any] = []  # what CUDA graphs read
        self._control: Tensor | Control | None = None  # of the last step
        self._norm_dtype = torch.float32
        self._lazy_statistics: LazyStatistics | None = None  # what the last step's statistics are made of
        self.set_options(options)

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of a wrapper that took the optimizer's ``__dict__``: it has a lock and a plan of its own."""
        return {**self.__dict__, "lock": None, "_plan": None, "_captured": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())
        _steppers.add(self)

    def step(
        self,
        groups: Groups,
        state: Any,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        is_outside: bool = False,
    ) -> None:
        """Step every parameter that has a gradient. ``grad_scale`` and ``found_inf`` are what a GradScaler says.
        ``is_outside``: the caller's modes were looked at and left."""
        if not is_outside and (functorch_level() is not None or dispatch_modes()):
            refuse_modes(groups)
            with outside_transforms():
                return self.step(groups, state, grad_scale, found_inf, is_outside=True)
        # While a step is under way there is no plan: whatever ends it early, an interrupt as well, the next one looks anew.
        plan, self._plan = self._plan, None
        drops = self._drops
        try:
            if plan is None or not plan.refresh(groups, state):
                self.arrange(groups)
                drops = self._drops  # what is dropped from now on is the plan that is made here
                plan = self._make_plan(groups, state)
            plan.prepare()
            is_made = not self._decides or self._decide(plan, grad_scale, found_inf)
            if self._measures:
                self._lazy_statistics = None  # what it is made of is about to be written to
            if is_made:
                if plan.uncommitted:
                    self._warn_of_lost_decay(plan)
                    plan.commit(state)
                plan.launch()
                if plan.cuda_parts:
                    self._captured += plan.captured()
            else:
                plan.skip()
            if self._measures:
                self._remember(plan, groups)
            if self.waiting:
                self._forget_waiting(state)
        except BaseException:
            if plan is not None:
                plan.take_back(state)
            raise
        finally:
            if plan is not None:
                plan.release()
            self._gradients.clear()
        if drops == self._drops:
            self._plan = plan

    def _make_plan(self, groups: Groups, state: Any) -> Plan:
        self._gradients.clear()  # an interrupt may have left some
        plan = Plan(self.rule, self.options, self._gradients, self.initial_lrs, self.waiting, self.warned, self._first)
        if not plan.refresh(groups, state):
            raise RuntimeError(
                "fused_l2: tensors changed while step() was looking at them. Is another thread using this optimizer's "
                "parameters or state?"
            )
        return plan

    def _forget_waiting(self, state: Any) -> None:
        """A state that is there counts, and what waited for it no longer."""
        for param in [p for p in self.waiting if state.get(p)]:
            del self.waiting[param]

    def drop_plan(self) -> None:
        """Forget what was prepared for the next step; it will be prepared again."""
        self._set_at_once()
        for single in chain.from_iterable(self.singles):
            single.drop_plan()

    def _set_at_once(self, **attributes: Any) -> None:
        """Set these attributes, and drop the plan that was made for others. It is one call of C, so that an interrupt comes
        before it or after it."""
        plan = self._plan  # lives until all are set: in its finalizer, which is Python, an interrupt might come
        vars(self).update(attributes, _plan=None, _drops=self._drops + 1)
        del plan

    def set_options(self, options: Options) -> None:
        """Make the coming steps with these."""
        limit = math.inf if options.max_grad_norm is None else options.max_grad_norm
        self._set_at_once(
            options=options,
            _decides=options.decides,
            _measures=options.statistics,
            _prologue=Prologue(options.clips, options.is_largest, limit, options.skips_nonfinite),
            _control=self._control if options.decides else None,
        )
        self.drop_plan()  # also those of step_in_backward

    def arrange(self, groups: Groups) -> None:
        """What is known of a param group goes with it, where others were removed or groups changed places.

        A group is known by its dict. One that somebody made anew, as loading does, is known by its first parameter.
        """
        known = self._groups_seen
        if len(known) == len(groups) and all(g is k for g, (k, _) in zip(groups, known, strict=True)):
            return
        now = [(g, next(iter(g["params"]), None)) for g in groups]
        by_dict = {id(k): i for i, (k, _) in enumerate(known)}
        by_first = {id(first): i for i, (_, first) in enumerate(known) if first is not None}
        was = [by_dict.get(id(g), by_first.get(id(first), -1)) for g, first in now]
        for i, position in enumerate(was):  # what nobody knows took the place of what is gone, or is new
            if position < 0 and i not in was:
                was[i] = i
        if was == [*range(len(was))]:
            self._groups_seen = now
            return
        lrs = {i: self.initial_lrs[position] for i, position in enumerate(was) if position in self.initial_lrs}
        options = self.options
        if not isinstance(options.decay_rule, str):
            rules = [options.decay_rule_of(i).name.lower() if i >= 0 else "plain" for i in was]
            options = options.replaced("decay_rule", rules)
        if isinstance(options.norm_process_group, tuple):
            processes = tuple(options.process_group_of(i) if i >= 0 else None for i in was)
            options = options.replaced("norm_process_group", processes)
        self._set_at_once(_groups_seen=now, initial_lrs=lrs, options=options)

    def _warn_of_lost_decay(self, plan: Plan) -> None:
        if "lost decay" not in self.warned and (message := plan.lost_decay()):
            self.warned.add("lost decay")
            warn(message)

    def _decide(self, plan: Plan, grad_scale: Tensor | None, found_inf: Tensor | None) -> bool:
        """Measure this step's gradients and ask the GradScaler. False if the host knows that the step is to be skipped."""
        options, measuring, prologue = self.options, plan.measuring, self._prologue
        assert measuring is not None
        if options.amp_scaling:
            prologue = prologue._replace(grad_scale=grad_scale, found_inf=found_inf)
        control = self._control = measuring.decide(plan.parts, prologue)
        if prologue.found_inf is not None and measuring.is_shared and self.tell_scaler is not None:
            self.tell_scaler(prologue.found_inf)
        self._norm_dtype = measuring.norm_dtype
        raises = options.raises_if_nonfinite
        if raises or plan.host_must_know or isinstance(control, Control):
            known = plan.read(control)
            if known.skip:
                plan.use(control)
                return False
            if raises and not math.isfinite(known.norm):
                raise RuntimeError(
                    f"The total norm of order {options.norm_type} of the gradients is {known.norm}, so they cannot be "
                    f"clipped; nothing was changed. To leave such steps out, pass skip_if_nonfinite=True instead of "
                    f"error_if_nonfinite=True; to multiply by the factor that comes of it anyway, neither."
                )
        plan.use(control)
        return True

    def _remember(self, plan: Plan, groups: Groups) -> None:
        inv_scale = 1.0 if self._control is None or not self._decides else self._control[INV_SCALE]
        assert plan.measuring is not None
        self._lazy_statistics = plan.measuring.statistics(plan.parts, groups, inv_scale)

    # What the last step left.

    @property
    def statistics(self) -> Statistics | None:
        return None if self._lazy_statistics is None else self._lazy_statistics.statistics()

    def forget_statistics(self) -> None:
        self._lazy_statistics = None

    @property
    def grad_norm(self) -> Tensor | None:
        if self._control is None or not self.options.clips:
            return None
        norm = self._control[NORM]
        if isinstance(norm, Tensor):
            return norm.to(self._norm_dtype)
        return torch.tensor(norm, dtype=self._norm_dtype, device="cpu")

    @property
    def was_skipped(self) -> Tensor:
        skip = 0.0 if self._control is None else self._control[SKIP]
        return skip != 0 if isinstance(skip, Tensor) else torch.tensor(skip != 0, device="cpu")
