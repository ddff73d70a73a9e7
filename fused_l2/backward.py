"""A step within the backward pass: each parameter as soon as its gradient is there, which is then freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .optimizer import FusedOptimizer
from .options import Options
from .step.stepper import Stepper


class StepInBackward:
    """What :func:`step_in_backward` returns. ``remove()`` ends it."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer  # lives as long as this does
        stepped: set[int] = set()  # since the last optimizer.step()
        self._handles: list[Any] = [optimizer.register_step_post_hook(lambda *_: stepped.clear())]
        self._single: list[_SingleStep] = []
        number, seen = 0, set()
        for index, group in enumerate(optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                if param.requires_grad and id(param) not in seen:
                    seen.add(id(param))
                    single = _SingleStep(optimizer, index, position, number, stepped)
                    self._single.append(single)
                    self._handles.append(param.register_post_accumulate_grad_hook(_hook(weakref.ref(single))))
                number += 1
        # Hooks of a parameter are nothing that the collector looks through, so they hold nothing: the optimizer does.
        optimizer._stepper.singles.append(self._single)

    def remove(self) -> None:
        """From now on ``optimizer.step()`` steps all parameters again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._single.clear()


def _hook(single: weakref.ref[_SingleStep]) -> Callable[[Tensor], None]:
    def step(param: Tensor) -> None:
        if (found := single()) is not None:  # else nobody uses the optimizer any more
            found.step(param)

    return step


class _SingleStep:
    """Steps one parameter, with a Stepper of its own on the optimizer's state, groups and options as they are by then."""

    def __init__(self, optimizer: FusedOptimizer, index: int, position: int, number: int, stepped: set[int]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._index, self._position, self._stepped = index, position, stepped
        options = optimizer._stepper.options
        self._options: Options | None = options
        self._stepper = Stepper(optimizer._rule, options.for_group(index), first=number)

    def _finds(self, param: Tensor, groups: list[dict[str, Any]], whole: Stepper) -> bool:
        """Whether the optimizer has the parameter, perhaps in another group than before."""
        try:
            if groups[self._index]["params"][self._position] is param:
                return True
        except IndexError:
            pass
        for index, group in enumerate(groups):
            for position, p in enumerate(group["params"]):
                if p is param:
                    whole.arrange(groups)
                    self._index, self._position, self._options = index, position, None
                    return True
        return False

    def drop_plan(self) -> None:
        self._stepper.drop_plan()

    def step(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or not self._finds(param, optimizer.param_groups, optimizer._stepper):
            return
        if id(param) in self._stepped:
            raise RuntimeError(
                "fused_l2: with step_in_backward a parameter got a second gradient before optimizer.step() was called. "
                "Gradients cannot be accumulated over several backward passes, because each is used and freed at once. "
                "Call optimizer.step() after every backward(); to accumulate, remove() what step_in_backward returned."
            )
        stepper, whole = self._stepper, optimizer._stepper
        if whole.options is not self._options:  # somebody has set one, or moved the group
            _refuse_what_needs_all_gradients(whole.options)
            stepper.set_options(whole.options.for_group(self._index))
            self._options = whole.options
        stepper.initial_lrs = {0: whole.initial_lrs.get(self._index, 0.0)}
        stepper.waiting, stepper.warned = whole.waiting, whole.warned
        group = optimizer.param_groups[self._index]
        own = {**group, "params": [param]}
        if "param_names" in group:
            own["param_names"] = group["param_names"][self._position : self._position + 1]
        stepper.step([own], optimizer.state)
        self._stepped.add(id(param))
        param.grad = None


def step_in_backward(optimizer: FusedOptimizer) -> StepInBackward:
    """Step every parameter of this optimizer within ``backward()``, as soon as its gradient is complete, and free the gradient.

    The training loop stays as it is, ``optimizer.step()`` included: it finds no gradients, runs its hooks, and tells that the
    next backward pass may begin. Schedulers, state dicts and param groups are those of ``optimizer``, and the bits are those of
    ordinary steps. Parameters that do not require a gradient now, or are added later, are stepped by ``optimizer.step()``.
    It ends with ``remove()``, or when neither the optimizer nor what this returns is used any more.

    Raises:
        TypeError: if it is not an optimizer of fused_l2.
        ValueError: if the optimizer does what needs all gradients at once: ``max_grad_norm``, ``amp_scaling``, ``statistics``;
            from ``backward()`` if one of them is set later.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"step_in_backward takes an optimizer of fused_l2, got {type(optimizer).__name__}")
    _refuse_what_needs_all_gradients(optimizer._stepper.options)
    return StepInBackward(optimizer)


def _refuse_what_needs_all_gradients(options: Options) -> None:
    reasons = {
        "max_grad_norm": (options.clips, "the norm of all gradients is known when the last one is there"),
        "amp_scaling": (options.amp_scaling, "a GradScaler looks at all gradients before it decides on a step"),
        "statistics": (options.statistics, "they are of all gradients together"),
    }
    for argument, (is_on, reason) in reasons.items():
        if is_on:
            raise ValueError(
                f"step_in_backward cannot be used with {argument}: {reason}. Switch it off, or step after backward()"
            )
