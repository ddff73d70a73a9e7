"""A step within the backward pass: each parameter as soon as its gradient is there, which is then freed."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

from torch import Tensor

from .optimizer import FusedOptimizer


class StepInBackward:
    """What :func:`step_in_backward` returns. ``remove()`` ends it."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._stepped: set[int] = set()  # since the last optimizer.step()
        self._handles: list[Any] = [optimizer.register_step_post_hook(lambda *_: self._stepped.clear())]
        number = 0
        for index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                if param.requires_grad:
                    single = _single(optimizer, index, param, number)
                    hook = self._hook(single, group)
                    self._handles.append(param.register_post_accumulate_grad_hook(hook))
                number += 1

    def _hook(self, single: FusedOptimizer, group: dict[str, Any]) -> Any:
        optimizer = self._optimizer
        own: dict[str, Any] = {
            key: single.param_groups[0][key] for key in ("params", "param_names") if key in single.param_groups[0]
        }

        def step(param: Tensor) -> None:
            if id(param) in self._stepped:
                raise RuntimeError(
                    "fused_l2: with step_in_backward a parameter got a second gradient before optimizer.step() was called. "
                    "Gradients cannot be accumulated over several backward passes, because each is used and freed at once. "
                    "Call optimizer.step() after every backward(); to accumulate, remove() what step_in_backward returned."
                )
            single.param_groups[0] = {**group, **own}  # schedulers write to the optimizer's
            single.state = optimizer.state
            single._told_of_lost_decay = optimizer._told_of_lost_decay
            single.step()
            optimizer._told_of_lost_decay = single._told_of_lost_decay
            self._stepped.add(id(param))
            param.grad = None

        return step

    def remove(self) -> None:
        """From now on ``optimizer.step()`` steps all parameters again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def step_in_backward(optimizer: FusedOptimizer) -> StepInBackward:
    """Step every parameter of this optimizer within ``backward()``, as soon as its gradient is complete, and free the gradient.

    The training loop stays as it is, ``optimizer.step()`` included: it finds no gradients, runs its hooks, and tells that the
    next backward pass may begin. Schedulers, state dicts and param groups are those of ``optimizer``, and the bits are those of
    ordinary steps. Parameters that do not require a gradient now, or are added later, are stepped by ``optimizer.step()``.

    Raises:
        TypeError: if it is not an optimizer of fused_l2.
        ValueError: if the optimizer does what needs all gradients at once: ``max_grad_norm``, ``amp_scaling``, ``statistics``.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"step_in_backward takes an optimizer of fused_l2, got {type(optimizer).__name__}")
    reasons = {
        "max_grad_norm": (optimizer.max_grad_norm is not None, "the norm of all gradients is known when the last one is there"),
        "amp_scaling": (optimizer.amp_scaling, "a GradScaler looks at all gradients before it decides on a step"),
        "statistics": (optimizer._statistics, "they are of all gradients together"),
    }
    for argument, (is_on, reason) in reasons.items():
        if is_on:
            raise ValueError(
                f"step_in_backward cannot be used with {argument}: {reason}. Switch it off, or step after backward()"
            )
    return StepInBackward(optimizer)


def _single(optimizer: FusedOptimizer, index: int, param: Tensor, number: int) -> FusedOptimizer:
    """An optimizer of one parameter that shares the state of ``optimizer``, and its options as they are now."""
    single: FusedOptimizer = object.__new__(type(optimizer))
    single.__dict__.update(optimizer.__dict__)
    single.__dict__.pop("step", None)  # schedulers put a wrapper there, which would step the whole optimizer
    single.param_groups = [{**optimizer.param_groups[index], "params": [param]}]
    if "param_names" in single.param_groups[0]:
        position = next(i for i, p in enumerate(optimizer.param_groups[index]["params"]) if p is param)
        single.param_groups[0]["param_names"] = [single.param_groups[0]["param_names"][position]]
    single._plan, single._captured = None, []
    single._optimizer_step_pre_hooks, single._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    single._decay = replace(optimizer._decay, rule=optimizer._decay.rule_of(index))
    single._initial_lrs = {0: optimizer._initial_lrs[index]} if index in optimizer._initial_lrs else {}
    single._low_precision = replace(optimizer._low_precision, first=number)
    return single
