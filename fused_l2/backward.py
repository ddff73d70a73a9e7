"""A step within the backward pass: each parameter as soon as its gradient is there, which is then freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backward_pass import BackwardPass
from .ddp import average_of, averaged_params
from .optimizer import FusedOptimizer, check_is_ours
from .options import Options
from .step.stepper import Stepper


class StepInBackward:
    """What :func:`step_in_backward` returns. ``remove()`` ends it."""

    def __init__(self, optimizer: FusedOptimizer, ddp: Any, gradients_are_final: bool) -> None:
        self._optimizer = optimizer  # lives as long as this does
        self._pass = BackwardPass(gradients_are_final)
        self._handles: list[Any] = []
        self._single: list[_SingleStep] = []
        averaged = {} if ddp is None else {id(param): param for param in averaged_params(ddp)}
        hooked: list[tuple[Tensor, _SingleStep]] = []
        number = 0
        for index, group in enumerate(optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                known = self._pass.hooked | self._pass.averaged
                if param.requires_grad and id(param) not in known:
                    single = _SingleStep(optimizer, index, position, number, self._pass)
                    self._single.append(single)
                    hooked.append((param, single))
                    (self._pass.averaged if id(param) in averaged else self._pass.hooked).add(id(param))
                number += 1
        # Whatever is refused is refused before anything is registered.
        self._pass.check_ranks(optimizer)
        if ddp is not None:
            if not self._pass.averaged:
                raise ValueError("step_in_backward: none of the parameters of ddp is a parameter of this optimizer")
            average, theirs = average_of(ddp), [pair for pair in hooked if id(pair[0]) in self._pass.averaged]
            average.use([param for param, _ in theirs], [single.step_with for _, single in theirs])
            self._handles.append(_Handle(lambda: average.remove(self._pass.averaged)))
        self._handles += [
            param.register_post_accumulate_grad_hook(_hook(weakref.ref(single)))  # type: ignore[no-untyped-call]
            for param, single in hooked
            if id(param) in self._pass.hooked
        ]
        self._handles.append(optimizer.register_step_pre_hook(self._pass.begin_step))
        self._handles.append(optimizer.register_step_post_hook(self._pass.end_step))
        # Hooks of a parameter are nothing that the collector looks through, so they hold nothing: the optimizer does.
        optimizer._stepper.singles.append(self._single)

    def remove(self) -> None:
        """From now on ``optimizer.step()`` steps all parameters again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._single.clear()


class _Handle:
    """Something that can be taken back, as torch's handles of hooks can."""

    def __init__(self, remove: Callable[[], None]) -> None:
        self.remove = remove


def _hook(single: weakref.ref[_SingleStep]) -> Callable[[Tensor], None]:
    def step(param: Tensor) -> None:
        if (found := single()) is None:  # nobody uses the optimizer any more
            return
        version = param._version
        try:
            found.step(param)
            param.grad = None
        except BaseException:
            if param._version != version:  # Stepped, and then ended: its gradient must not be used again.
                param.grad = None
            raise

    return step


class _SingleStep:
    """Steps one parameter, with a Stepper of its own on the optimizer's state, groups and options as they are by then."""

    def __init__(self, optimizer: FusedOptimizer, index: int, position: int, number: int, of: BackwardPass) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._index, self._position, self._pass = index, position, of
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

    def step_with(self, param: Tensor, gradient: Tensor) -> None:
        """Step the parameter with this gradient, whatever is in ``param.grad``, and stays there."""
        own, param.grad = param.grad, gradient
        try:
            self.step(param)
        finally:
            param.grad = own

    def step(self, param: Tensor) -> None:
        """Step the parameter with its gradient."""
        optimizer = self._optimizer()
        if optimizer is None or not self._finds(param, optimizer.param_groups, optimizer._stepper):
            return
        self._pass.check(param, optimizer)
        stepper, whole = self._stepper, optimizer._stepper
        if whole.options is not self._options:  # somebody has set one, or moved the group
            _refuse_what_needs_all_gradients(whole.options)
            stepper.set_options(whole.options.for_group(self._index))
            self._options = whole.options
        if param.device.type == "cpu" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # FSDP2 offloads gradients in the current stream, which torch < 2.13 does not wait for.
            torch.cuda.current_stream().synchronize()
        stepper.initial_lrs = {0: whole.initial_lrs.get(self._index, 0.0)}
        stepper.waiting, stepper.warned = whole.waiting, whole.warned
        group = optimizer.param_groups[self._index]
        own = {**group, "params": [param]}
        if "param_names" in group:
            own["param_names"] = group["param_names"][self._position : self._position + 1]
        stepper.step([own], optimizer.state)
        self._pass.done(param)


def step_in_backward(optimizer: FusedOptimizer, *, ddp: Any = None, gradients_are_final: bool = False) -> StepInBackward:
    """Step every parameter of this optimizer within ``backward()``, as soon as its gradient is complete, and free the gradient.

    The training loop stays as it is, ``optimizer.step()`` included: it finds no gradients, runs its hooks, and tells that the
    next backward pass may begin. Schedulers, state dicts and param groups are those of ``optimizer``, and the bits are those of
    ordinary steps. Parameters that do not require a gradient now, or are added later, are stepped by ``optimizer.step()``.
    It ends with ``remove()``, or when neither the optimizer nor what this returns is used any more.

    Args:
        optimizer: one of fused_l2.
        ddp: the ``DistributedDataParallel`` model that averages the gradients; its parameters are stepped when their bucket has
            been averaged, through its communication hook. FSDP2 (``fully_shard``) needs nothing.
        gradients_are_final: say that each rank uses its own gradients as they arrive, where that cannot be seen. Nothing
            averages them later (``ddp``'s are averaged), no GradScaler has scaled them, and with reentrant checkpoints each
            weight is used at one place.

    Raises:
        TypeError: if it is not an optimizer of fused_l2, or ``ddp`` is no DistributedDataParallel model.
        ValueError: if the optimizer does what needs all gradients at once (``max_grad_norm``, ``amp_scaling``,
            ``statistics``), or steps in the backward pass already; if there are several ranks and it has plain tensors that
            are not ``ddp``'s; if ``ddp`` cannot say in time which parameters have a gradient, or has a communication hook.
            From ``backward()``, before anything is stepped, if that comes later, or if the first one finds a GradScaler or
            reentrant checkpoints in use.
        RuntimeError: from ``backward()``, if a parameter gets a second gradient before ``optimizer.step()``; from
            ``optimizer.step()``, if a GradScaler calls it, or if ``ddp`` has not averaged a gradient.
    """
    check_is_ours(optimizer, "step_in_backward")
    _refuse_what_needs_all_gradients(optimizer._stepper.options)
    if any(optimizer._stepper.singles):
        raise ValueError("step_in_backward: this optimizer steps in the backward pass already; remove() what it returned first")
    return StepInBackward(optimizer, ddp, gradients_are_final)


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
