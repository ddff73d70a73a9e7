"""torch's contracts around a step, shared by SGD, Adam and AdamW: hooks, state dicts, pickling, param groups."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from .options import OptionAttributes, Options
from .parameters import checks
from .parameters.entry import scalar_dtype
from .parameters.low_precision import narrowed, transferable, widened, with_kept_dtype
from .parameters.shards import is_dtensor, like, local, why_refused
from .statistics import Statistics
from .step import scaler
from .step.hyperparameters import number
from .step.rules import UpdateRule
from .step.state import OptimizerState
from .step.stepper import Stepper
from .tables.modes import HALVES, STATE_NAMES, Mode

_T = TypeVar("_T")
_is_compiling = torch.compiler.is_compiling
# Not None while dynamo looks at every frame that is called: compiled functions call back into Python at graph breaks.
_dynamo_callback: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)
_profiler_enabled = torch._C._autograd._profiler_enabled

_NOT_DIFFERENTIABLE = (
    "differentiable=True is not supported: a fused step writes parameters in place, outside of autograd. "
    "Use torch.optim for steps that are differentiated through."
)


class FusedOptimizer(OptionAttributes, Optimizer):
    """Base of the fused optimizers. A subclass says which update rule it is; a :class:`Stepper` makes its steps.

    Nothing is changed before every check of every tensor has passed: an error leaves parameters, states and step counters as
    they were.
    """

    _rule: ClassVar[UpdateRule]
    _stepper: Stepper  # options and results; wrappers that copy __dict__ share it

    def __init__(self, params: ParamsT, defaults: dict[str, Any], options: Options) -> None:
        if defaults["differentiable"]:
            raise ValueError(_NOT_DIFFERENTIABLE)
        if defaults["fused"] and defaults["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")  # torch's own words
        self._rule.numbers(self._values(defaults), options, None, 0.0)
        self._stepper = Stepper(self._rule, options)
        super().__init__(params, defaults)
        options.check_groups(len(self.param_groups))
        self.state = OptimizerState()

    def _values(self, group: dict[str, Any]) -> Any:
        return self._rule.Values._make(self._rule.read(group))

    # The step.

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss; optional.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: if a gradient or a state tensor cannot be used (sparse, of another shape, device or dtype, ...).
            ValueError, TypeError: if a hyperparameter is out of its range or not a number.
        """
        # Arguments go on as they came: hooks see them.
        if _is_compiling() or _dynamo_callback() is not None:
            return self._untraced_step(*args, **kwargs)
        if _profiler_enabled() or _has_step_hooks(self):
            return self._observed_step(*args, **kwargs)
        return self._step(*args, **kwargs)

    def _step(self, closure: Callable[[], _T] | None = None) -> _T | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepper = self._stepper
        if stepper.options.amp_scaling:  # a GradScaler writes these into the optimizer
            given = self.__dict__
            stepper.step(self.param_groups, self.state, given.get("grad_scale"), given.get("found_inf"))
        else:
            stepper.step(self.param_groups, self.state)
        return loss

    step.__signature__ = inspect.signature(_step)  # type: ignore[attr-defined]
    # Optimizer.__init__ wraps a step() that is not marked; ours calls the wrapper only if a profiler or a hook is active.
    step.hooked = True  # type: ignore[attr-defined]

    _observed_step = Optimizer.profile_hook_step(_step)
    # Within a compiled function the step stands between two graphs: there is nothing in it to trace.
    _untraced_step = torch._disable_dynamo(_observed_step)  # type: ignore[attr-defined]

    def drop_plan(self) -> None:
        """Forget what was prepared for the next step; it will be prepared again. Frees references to states."""
        self._stepper.drop_plan()

    # Options and results.

    @property
    def options(self) -> dict[str, Any]:
        """All options beyond torch.optim's arguments, by name, to be logged. They are set as attributes."""
        return self._stepper.options.as_dict()

    def _get_option(self, name: str) -> Any:
        value = getattr(self._stepper.options, name)
        if name == "decay_rule" and not isinstance(value, str):
            return tuple(self._stepper.options.decay_rule_of(i).name.lower() for i in range(len(self.param_groups)))
        return value

    def _set_option(self, name: str, value: Any) -> None:
        stepper = self._stepper
        options = stepper.options.replaced(name, value)
        options.check_groups(len(self.param_groups))
        for i, group in enumerate(self.param_groups):
            self._rule.numbers(self._values(group), options, i, stepper.initial_lrs.get(i, 0.0))
        if name == "low_precision":
            self._check_modes(options)
        weights = self.master_params() if name == "low_precision" else None
        if weights is not None and (kept := stepper.options.precision.mode.state_name):
            for p in self._all_params():
                for state in (self.state.get(p), stepper.waiting.get(p)):
                    if state is not None:
                        state.pop(kept, None)
        stepper.set_options(options)
        if weights is not None:
            self.load_master_params(weights)

    def _check_modes(self, options: Options) -> None:
        """Refuse a mode that one of the parameters cannot have."""
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                name = functools.partial(checks.describe, group, index, position)
                checks.check_mode(param, options.precision.mode_of(param), {}, name)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch's name: where it is True, a GradScaler leaves unscaling and skipping to step(). With step_in_backward there is
        nothing that it could do, and step() says so."""
        stepper = self._stepper
        if stepper.options.amp_scaling:
            stepper.tell_scaler = scaler.asking()
        return stepper.options.amp_scaling or any(stepper.singles)

    @property
    def statistics(self) -> Statistics | None:
        """Figures of the last step, see :class:`fused_l2.Statistics`; None without ``statistics=True`` or before a step.

        They are put together when this is read, into new tensors, without waiting for the device. Setting it to True or False
        switches them on and off.
        """
        return self._stepper.statistics

    @statistics.setter
    def statistics(self, wanted: bool) -> None:
        self._set_option("statistics", wanted)
        self._stepper.forget_statistics()

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients in the last step, before they were clipped, as ``torch.nn.utils.clip_grad_norm_`` returns
        it: a 0-dim tensor on the parameters' device; reading it does not synchronize until you call ``.item()``. None without
        ``max_grad_norm``."""
        return self._stepper.grad_norm

    @property
    def step_was_skipped(self) -> Tensor:
        """Whether the last step was skipped, by ``skip_if_nonfinite`` or by a GradScaler with ``amp_scaling``: a 0-dim bool
        tensor on the parameters' device; ``if optimizer.step_was_skipped:`` waits for the device."""
        return self._stepper.was_skipped

    def __repr__(self) -> str:
        changed = self._stepper.options.changed()
        text = super().__repr__()
        if not changed:
            return text
        lines = "".join(f"    {name}: {value}\n" for name, value in changed.items())
        return f"{text[:-1].rstrip()}\n\nOptions\n{lines})"

    # Float32 weights of 16-bit parameters.

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def master_params(self) -> list[Tensor]:
        """A copy of every parameter, in the order of the param groups: of 16-bit ones the float32 value that the optimizer
        steps, which is all of it with ``low_precision="master"`` and ``"remainder"``."""
        found = []
        precision, waiting = self._stepper.options.precision, self._stepper.waiting
        for p in self._all_params():
            mode = precision.mode_of(p)
            kept = None
            if mode.state_name:
                kept = (self.state.get(p) or waiting.get(p) or {}).get(mode.state_name)
            wide = widened(mode, local(p).detach(), local(kept))
            wide = wide.clone() if wide.dtype is p.dtype else wide
            found.append(like(p, wide) if is_dtensor(p) else wide)
        return found

    @torch.no_grad()
    def load_master_params(self, weights: Sequence[Tensor]) -> None:
        """Set every parameter to these weights, in the order of the param groups, and what is kept beside 16-bit ones to what
        their dtype cannot hold: the inverse of :meth:`master_params`, or a float32 model's weights after it was cast.

        Raises:
            ValueError: if there are more or fewer, or one has another shape than its parameter; nothing has changed then.
        """
        params = self._all_params()
        if len(weights) != len(params):
            raise ValueError(f"load_master_params got {len(weights)} tensors for {len(params)} parameters")
        for i, (p, w) in enumerate(zip(params, weights, strict=True)):
            if w.shape != p.shape:
                raise ValueError(f"load_master_params: tensor {i} has shape {tuple(w.shape)}, its parameter {tuple(p.shape)}")
            if reason := why_refused(w, p):
                raise ValueError(f"load_master_params: tensor {i} cannot be used: {reason}. Distribute it as its parameter is")
        precision = self._stepper.options.precision
        for p, w in zip(params, weights, strict=True):
            mode = precision.mode_of(p)
            if mode.state_name is None:
                p.copy_(w)
                continue
            wide = torch.empty_like(p, dtype=torch.float32).copy_(w)
            # Random bits of one half: a compensation is then rounded to nearest.
            nearest = torch.full_like(local(p), 1 << 31, dtype=torch.int64)
            value, kept = narrowed(mode, local(wide), p.dtype, nearest)
            p.copy_(like(p, value) if is_dtensor(p) else value)
            # A state is made whole: before the first step there is none, and this waits for it.
            state = self.state[p] if p in self.state else self._stepper.waiting.setdefault(p, {})
            state[mode.state_name] = like(p, kept) if is_dtensor(p) and kept is not None else kept
        self.drop_plan()

    # torch's contracts.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as ``torch.optim.Optimizer.add_param_group`` does, after checking its hyperparameters."""
        index = len(self.param_groups)
        initial_lrs = self._stepper.initial_lrs
        try:
            if isinstance(param_group, dict):
                group = {**self.defaults, **param_group}
                initial_lrs[index] = number(group["lr"], "learning rate", f" of param group {index}")
                self._rule.numbers(self._values(group), self._stepper.options, index, initial_lrs[index])
                if param_group.get("differentiable"):
                    raise ValueError(_NOT_DIFFERENTIABLE)
            super().add_param_group(param_group)
        except BaseException:
            initial_lrs.pop(index, None)
            raise

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def state_dict(self) -> dict[str, Any]:
        """torch.optim's state dict: plain dicts, torch's keys. ``torch.optim`` loads it, and this class loads torch's."""
        convert = self.register_state_dict_post_hook(_packed, prepend=True)
        try:
            return super().state_dict()
        finally:
            convert.remove()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch.optim.

        As torch does, with these differences. Float32 states of 16-bit parameters stay float32, and what ``low_precision``
        keeps beside them stays as it is (torch casts every state to its parameter's dtype). With ``state_dtype`` moments and
        momentum have that dtype at once. Tensors are copied, so that two optimizers loaded from one dict do not step one state.

        Raises:
            ValueError: if the param groups are not those of this optimizer, or the state was kept by another
                ``low_precision``; nothing has changed then.
        """
        loaded: dict[str, Any] = {}
        capture = self.register_load_state_dict_pre_hook(lambda _, given: self._take_given(given, loaded))
        restore = self.register_load_state_dict_post_hook(lambda _: self._own_state(loaded), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            capture.remove()
            restore.remove()

    def _take_given(self, given: dict[str, Any], loaded: dict[str, Any]) -> None:
        """What is about to be loaded, after the pre-hooks of others, checked."""
        loaded.update(given)
        groups, own = given["param_groups"], self.param_groups
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in own]:
            return  # torch refuses it in its own words
        for i, p in zip((i for g in groups for i in g["params"]), self._all_params(), strict=True):
            mode = self._stepper.options.precision.mode_of(p)
            state = given["state"].get(i) or {}
            for other in STATE_NAMES:
                if other != mode.state_name and other in state:
                    of = next(m for m in Mode if m.state_name == other).name.lower()
                    raise ValueError(
                        f"The state of parameter {i} holds {other!r}, which low_precision={of!r} has kept, and this optimizer "
                        f"has low_precision={mode.name.lower()!r}. To change over, make it with the former, load, and set "
                        f"optimizer.low_precision; to give up what is kept, delete {other!r} from the states."
                    )

    @torch.no_grad()
    def _own_state(self, loaded: dict[str, Any]) -> None:
        """After torch has cast and copied: the dtypes that torch does not keep, and memory of our own."""
        precision, waiting = self._stepper.options.precision, self._stepper.waiting
        waiting.clear()
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        for i, param in zip(ids, self._all_params(), strict=True):
            given = loaded["state"].get(i)
            if not isinstance(given, Mapping) or param not in self.state:
                continue
            state = self.state[param]
            wanted = precision.state_dtype_of(param)
            for key, before in given.items():
                value = state[key]
                if not isinstance(value, Tensor) or not isinstance(before, Tensor):
                    continue
                is_moment = key != "step" and key not in STATE_NAMES
                if is_moment and wanted is not None and before.is_floating_point() and before.shape == param.shape:
                    if value.dtype is not wanted or _same_memory(value, before):
                        state[key] = before.to(device=value.device, dtype=wanted, copy=True)
                elif key in STATE_NAMES or (is_moment and before.dtype is torch.float32 and value.dtype in HALVES):
                    state[key] = with_kept_dtype(key, before.to(device=value.device, copy=True))
                elif _same_memory(value, before):
                    state[key] = value.clone()
            if state and all(key in STATE_NAMES for key in state):  # set before a first step
                waiting[param] = dict(state)
                del self.state[param]

    def __getstate__(self) -> dict[str, Any]:
        stepper = self._stepper
        return {
            **super().__getstate__(),
            "_options": stepper.options,
            "_initial_lrs": dict(stepper.initial_lrs),
            "_waiting": {param: dict(state) for param, state in stepper.waiting.items()},
            "_has_warned": stepper.has_warned,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        given = dict(state)
        if "_options" in given:  # a copy, or from a pickle; load_state_dict comes here, too
            stepper = self._stepper = Stepper(self._rule, given.pop("_options"))
            stepper.initial_lrs = given.pop("_initial_lrs")
            stepper.waiting = given.pop("_waiting")
            stepper.has_warned = given.pop("_has_warned")
        super().__setstate__(given)
        if type(self.state) is not OptimizerState:
            self.state = OptimizerState(self.state)
        for own in self.state.values():
            # Checkpoints of old versions of torch have numbers.
            if isinstance(own, dict) and isinstance(own.get("step"), (int, float)):
                own["step"] = torch.tensor(float(own["step"]), dtype=scalar_dtype(), device="cpu")
        self.drop_plan()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)


def _packed(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict as others know it: plain dicts, and remainders in a dtype that can be sent. What waits for a first step
    is among the states."""
    states = dict(state_dict["state"])
    waiting = optimizer._stepper.waiting
    if waiting:
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, param in zip(ids, optimizer._all_params(), strict=True):
            if param in waiting and i not in states:
                states[i] = waiting[param]
    state_dict["state"] = {k: transferable(v) if isinstance(v, dict) else v for k, v in states.items()}
    return state_dict


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and bool(local(a).data_ptr() == local(b).data_ptr())


def _has_step_hooks(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )
