"""torch's contracts around a step, shared by SGD, Adam and AdamW: hooks, state dicts, pickling, param groups."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from . import state_dicts
from ._warnings import is_of_a_library, warn
from .options import NAMES, OptionAttributes, Options, check_torchs_flags, did_you_mean, why_unused
from .parameters import checks, eight_bits
from .parameters.entry import scalar_dtype
from .parameters.low_precision import widened
from .parameters.memory import has_memory
from .parameters.shards import is_dtensor, like, local, why_refused
from .statistics import Statistics
from .step import scaler
from .step.hyperparameters import number
from .step.rules import UpdateRule
from .step.state import OptimizerState
from .step.stepper import Stepper
from .switching import Undo, change_modes, change_states, split_weight, write
from .tables.modes import EIGHT_BIT, STATE_NAMES

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
        check_torchs_flags(defaults, "")
        if defaults["differentiable"]:
            raise ValueError(_NOT_DIFFERENTIABLE)
        if defaults["fused"] and defaults["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")  # torch's own words
        self._rule.numbers(self._values(defaults), options, None, 0.0)
        self._rule.check_start(self._values(defaults), None)
        self._stepper = Stepper(self._rule, options)
        super().__init__(checks.given(params), defaults)
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
            if not callable(closure):
                raise TypeError(f"step takes a closure that returns the loss, or nothing, got {type(closure).__name__}")
            with torch.enable_grad():
                loss = closure()
        stepper = self._stepper
        with stepper.lock:
            if stepper.options.amp_scaling:  # a GradScaler writes these into the optimizer
                given = self.__dict__
                stepper.step(self.param_groups, self.state, given.get("grad_scale"), given.get("found_inf"))
            else:
                stepper.step(self.param_groups, self.state)
        return loss

    step.__signature__ = inspect.signature(_step)  # type: ignore[attr-defined]
    # Optimizer.__init__ wraps a step() that is not marked; ours calls the wrapper only if a profiler or a hook is active.
    step.hooked = True  # type: ignore[attr-defined]

    _hooked_step = Optimizer.profile_hook_step(_step)

    def _observed_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.__dict__.get("_is_observed"):  # this is super().step()
            return self._step(*args, **kwargs)
        return self._hooked_step(*args, **kwargs)

    @staticmethod
    def profile_hook_step(func: Callable[..., _T]) -> Callable[..., _T]:
        """With this Optimizer.__init__ wraps the step() of a subclass: the hooks are called there, and not once more within."""

        @functools.wraps(func)
        def observed(self: Any, *args: Any, **kwargs: Any) -> _T:
            before = self.__dict__.get("_is_observed", False)
            self.__dict__["_is_observed"] = True
            try:
                return func(self, *args, **kwargs)
            finally:
                self.__dict__["_is_observed"] = before

        return Optimizer.profile_hook_step(observed)

    # Within a compiled function the step stands between two graphs: there is nothing in it to trace.
    _untraced_step = torch._disable_dynamo(_observed_step)  # type: ignore[attr-defined]

    def drop_plan(self) -> None:
        """Forget what was prepared for the next step; it will be prepared again. Frees references to states."""
        self._stepper.drop_plan()

    # Options and results.

    @property
    def options(self) -> dict[str, Any]:
        """All options beyond torch.optim's arguments, by name, to be logged. They are set as attributes."""
        self._stepper.arrange(self.param_groups)
        return self._stepper.options.as_dict()

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in self.__dict__ and not hasattr(type(self), name):
            hint = did_you_mean(name, NAMES)
            if hint:
                raise AttributeError(f"{type(self).__name__} has no option {name!r}{hint}")
            if name in self.__dict__.get("defaults", ()):
                warn(
                    f"fused_l2: setting optimizer.{name} changes no step: hyperparameters are keys of the param groups, "
                    f"optimizer.param_groups[i][{name!r}]",
                )
            elif name not in _OF_SCALERS and _looks_like_a_setting(value) and _is_of_a_user(self, sys._getframe(1)):
                warn(
                    f"fused_l2: setting optimizer.{name} changes no step: {type(self).__name__} has no such option (there are "
                    f"{', '.join(NAMES)}), and hyperparameters are keys of the param groups, optimizer.param_groups[i]['lr']. "
                    f"Begin the name of an attribute of your own with an underscore"
                )
        super().__setattr__(name, value)

    def _get_option(self, name: str) -> Any:
        self._stepper.arrange(self.param_groups)
        value = getattr(self._stepper.options, name)
        if name == "decay_rule" and not isinstance(value, str):
            return tuple(self._stepper.options.decay_rule_of(i).name.lower() for i in range(len(self.param_groups)))
        return value

    @torch.inference_mode(False)  # or states that it makes could not be stepped
    def _set_option(self, name: str, value: Any) -> None:
        if getattr(self, "_stepper", None) is None:  # a wrapper may get it from what it wraps
            raise AttributeError(
                f"{type(self).__name__} sets {name!r}, an option of fused_l2, before super().__init__(). Pass it there, or set "
                f"it afterwards; an attribute of your own needs another name"
            )
        stepper = self._stepper
        with stepper.lock:
            stepper.arrange(self.param_groups)
            options = stepper.options.replaced(name, value)
            options.check_groups(len(self.param_groups))
            for i, group in enumerate(self.param_groups):
                self._rule.numbers(self._values(group), options, i, stepper.initial_lrs.get(i, 0.0))
            if name == "low_precision":
                self._check_modes(options)
            before, params = stepper.options, self._all_params()
            with Undo() as undo:
                undo.before(lambda: stepper.set_options(before))
                if name == "low_precision":
                    change_modes(params, self.state, stepper.waiting, before.precision, options.precision, undo)
                if name == "state_dtype":
                    change_states(params, self.state, before.precision, options.precision, undo)
                stepper.set_options(options)

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
        self._stepper.arrange(self.param_groups)
        changed = self._stepper.options.changed()
        text = super().__repr__()
        if not changed:
            return text
        if changed.get("state_dtype") == EIGHT_BIT:
            params = [p for p in self._all_params() if not is_lazy(p)]  # of which nothing is known yet
            chosen = [p for p in params if eight_bits.fits(p)]
            share = 100 * sum(p.numel() for p in chosen) / max(sum(p.numel() for p in params), 1)
            changed["state_dtype"] = (
                f"{EIGHT_BIT} ({len(chosen)} of {len(params)} parameters, {share:.1f} % of their elements; the others keep "
                f"float32 states)"
            )
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
            mode, kept = precision.kept_of(p, self.state.get(p) or waiting.get(p) or {})
            wide = widened(mode, local(p).detach(), local(kept))
            wide = wide.clone() if wide.dtype is p.dtype else wide
            found.append(like(p, wide) if is_dtensor(p) else wide)
        return found

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_master_params(self, weights: Sequence[Tensor]) -> None:
        """Set every parameter to these weights, in the order of the param groups, and what is kept beside 16-bit ones to what
        their dtype cannot hold. It is the inverse of :meth:`master_params`, and takes a float32 model's weights after that
        was cast.

        Args:
            weights: a tensor for each parameter, of its shape and any floating-point dtype.

        Raises:
            ValueError: if there are more or fewer, or one has another shape than its parameter; nothing has changed then.
            TypeError: if it is no sequence of tensors.
        """
        params = self._all_params()
        if not isinstance(weights, Sequence) or not all(isinstance(w, Tensor) for w in weights):
            raise TypeError(f"load_master_params needs a list of tensors, got {type(weights).__name__}")
        if len(weights) != len(params):
            raise ValueError(f"load_master_params got {len(weights)} tensors for {len(params)} parameters")
        self._check_weights(weights)
        precision = self._stepper.options.precision
        with self._stepper.lock:
            for p, w in zip(params, weights, strict=True):
                mode = precision.mode_of(p)
                if mode.state_name is None:
                    p.copy_(w)
                    for state in (self.state.get(p), self._stepper.waiting.get(p)):
                        for key in STATE_NAMES if state else ():  # of the 16 bits that it had
                            state.pop(key, None)  # type: ignore[union-attr]
                    continue
                value, kept = split_weight(mode, p, local(torch.empty_like(p, dtype=torch.float32).copy_(w)))
                write(p, value)
                # A state is made whole: before the first step there is none, and this waits for it.
                state = self.state[p] if p in self.state else self._stepper.waiting.setdefault(p, {})
                state[mode.state_name] = like(p, kept) if is_dtensor(p) and kept is not None else kept
            self.drop_plan()

    def _check_weights(self, weights: Sequence[Tensor]) -> None:
        for i, (p, w) in enumerate(zip(self._all_params(), weights, strict=True)):
            if w.shape != p.shape:
                raise ValueError(f"load_master_params: tensor {i} has shape {tuple(w.shape)}, its parameter {tuple(p.shape)}")
            if not w.is_floating_point():
                raise ValueError(f"load_master_params: tensor {i} has dtype {w.dtype}, which is no floating-point dtype")
            if w.layout is not torch.strided or (w.is_meta and not p.is_meta) or not has_memory(local(w)):
                raise ValueError(f"load_master_params: tensor {i} has no values to be read (layout {w.layout}, on {w.device})")
            if not has_memory(local(p)):
                raise ValueError(f"load_master_params: the storage of parameter {i} was freed. Restore it first")
            if reason := why_refused(w, p):
                raise ValueError(f"load_master_params: tensor {i} cannot be used: {reason}. Distribute it as its parameter is")

    # torch's contracts.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as ``torch.optim.Optimizer.add_param_group`` does, after checking its hyperparameters.

        Args:
            param_group: a dict with ``"params"`` and any hyperparameters; the others are the optimizer's defaults.
        """
        index = len(self.param_groups)
        self._stepper.arrange(self.param_groups)
        initial_lrs = self._stepper.initial_lrs
        try:
            if isinstance(param_group, dict):
                if "params" not in param_group:
                    raise KeyError(
                        f"param group {index} has no 'params', only {', '.join(map(repr, param_group)) or 'nothing'}"
                    )
                group = {**self.defaults, **param_group}
                initial_lrs[index] = number(group["lr"], "learning rate", f" of param group {index}")
                self._rule.numbers(self._values(group), self._stepper.options, index, initial_lrs[index])
                self._rule.check_start(self._values(group), index)
                check_torchs_flags(param_group, f" of param group {index}")
                if param_group.get("differentiable"):
                    raise ValueError(_NOT_DIFFERENTIABLE)
            super().add_param_group(param_group)
            self._stepper.arrange(self.param_groups)
            for key in param_group:
                if reason := why_unused(key, self.defaults, self._stepper.options):
                    warn(f"fused_l2: param group {index} has the key {key!r}, which changes no step{reason}")
        except BaseException:
            if len(self.param_groups) == index:  # else it was added, and something came in between afterwards
                initial_lrs.pop(index, None)
            raise

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def state_dict(self) -> dict[str, Any]:
        """torch.optim's state dict: plain dicts, torch's keys. This class loads torch's, and ``torch.optim`` loads this one.

        Of 8-bit states it loads :meth:`float32_state_dict`; what ``low_precision`` keeps beside 16-bit weights it ignores."""
        with self._stepper.lock:
            convert = self.register_state_dict_post_hook(state_dicts.packed, prepend=True)
            try:
                return super().state_dict()
            finally:
                convert.remove()

    def float32_state_dict(self) -> dict[str, Any]:
        """:meth:`state_dict` with float32 moments and momentum under torch's keys in place of the codes and scales of
        ``state_dtype="8bit"``: exactly the values that a step works on. ``torch.optim`` loads it, and so does any optimizer of
        this package that has the same ``low_precision``, one with 8-bit states without a change."""
        found = self.state_dict()
        ids = [i for group in found["param_groups"] for i in group["params"]]
        params = dict(zip(ids, self._all_params(), strict=True))
        with torch.no_grad():
            found["state"] = {i: state_dicts.converted(params[i], state, False) for i, state in found["state"].items()}
        return found

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch.optim.

        As torch does, with these differences. Float32 states of 16-bit parameters stay float32, and what ``low_precision``
        keeps beside them stays as it is (torch casts every state to its parameter's dtype). With ``state_dtype`` moments and
        momentum have that dtype at once; with ``"8bit"`` float32 ones are rounded to nearest. Tensors are
        copied, so that two optimizers loaded from one dict do not step one state.

        Args:
            state_dict: what ``state_dict()`` of such an optimizer returned.

        Raises:
            ValueError, TypeError: if param groups or states are not those of this optimizer's parameters, are damaged, or were
                kept by another ``low_precision`` or with ``state_dtype="8bit"``; the message names what it is, and nothing has
                changed then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"load_state_dict needs a dict, got {type(state_dict).__name__}")
        loaded: dict[str, Any] = {}
        with self._stepper.lock:
            capture = self.register_load_state_dict_pre_hook(lambda _, given: self._take_given(given, loaded))
            restore = self.register_load_state_dict_post_hook(lambda _: self._own(loaded), prepend=True)
            before, waiting = {key: self.__dict__[key] for key in ("state", "param_groups")}, dict(self._stepper.waiting)
            try:
                super().load_state_dict(state_dict)
            except BaseException:
                # Ended on its way, by an interrupt as well: torch has put new states there, cast to their parameters' dtypes.
                self.__dict__.update(before)
                self._stepper.waiting.clear()
                self._stepper.waiting.update(waiting)
                self.drop_plan()
                raise
            finally:
                capture.remove()
                restore.remove()

    def _take_given(self, given: dict[str, Any], loaded: dict[str, Any]) -> None:
        """What is about to be loaded, after the pre-hooks of others, checked."""
        self._stepper.arrange(self.param_groups)
        state_dicts.check(given, self._stepper, self.param_groups, self._completed)
        loaded.update(given)

    def _own(self, loaded: dict[str, Any]) -> None:
        state_dicts.own(loaded, self._stepper, self.param_groups, self.state)

    def _completed(self, group: dict[str, Any]) -> dict[str, Any]:
        """A param group with the keys that it lacks, as in checkpoints of old versions of torch."""
        return {**self.defaults, **group}

    def __getstate__(self) -> dict[str, Any]:
        stepper = self._stepper
        stepper.arrange(self.param_groups)
        return {
            **super().__getstate__(),
            "_options": stepper.options,
            "_initial_lrs": dict(stepper.initial_lrs),
            "_waiting": {param: dict(state) for param, state in stepper.waiting.items()},
            "_warned": set(stepper.warned),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        given = dict(state)
        if "_options" in given:  # a copy, or from a pickle; load_state_dict comes here, too
            stepper = self._stepper = Stepper(self._rule, given.pop("_options"))
            stepper.initial_lrs = given.pop("_initial_lrs")
            stepper.waiting = given.pop("_waiting")
            stepper.warned = given.pop("_warned")
        super().__setstate__(given)
        if type(self.state) is not OptimizerState:
            self.state = OptimizerState(self.state)
        for own in self.state.values():
            # Checkpoints of old versions of torch have numbers.
            if isinstance(own, dict) and isinstance(own.get("step"), (int, float)):
                own["step"] = torch.tensor(float(own["step"]), dtype=scalar_dtype(), device="cpu")
        self.drop_plan()
        self._stepper.arrange(self.param_groups)
        for group in self.param_groups:
            group.update(self._completed(group))


_OF_SCALERS = ("grad_scale", "found_inf")


def _looks_like_a_setting(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, list, tuple, Tensor, torch.dtype))


def _is_of_a_user(optimizer: Any, setter: FrameType) -> bool:
    """Whether an attribute is set by a user: a subclass has some of its own, and so has a library on what it was given."""
    return type(optimizer).__module__.startswith("fused_l2.") and not is_of_a_library(setter)


def _has_step_hooks(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def check_is_ours(optimizer: Any, caller: str) -> None:
    if not isinstance(optimizer, FusedOptimizer):
        kind = type(optimizer)
        raise TypeError(
            f"{caller} takes an optimizer of fused_l2, got {kind.__module__}.{kind.__qualname__}. Make it with fused_l2.SGD, "
            f"Adam or AdamW"
        )
