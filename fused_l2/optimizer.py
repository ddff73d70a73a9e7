"""The pipeline of ``step()`` and torch's contracts around it, shared by SGD, Adam and AdamW."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from .decay import Decay, make_decay
from .parameters.low_precision import LowPrecision, make_low_precision, narrowed, transferable, widened, with_kept_dtype
from .parameters.shards import LocalGradients, is_dtensor, like, local, why_refused
from .statistics import Recorded, Statistics
from .step.hyperparameters import number
from .step.plan import Plan
from .step.state import OptimizerState, tell_of_changes
from .tables.coefficients import DecayRule
from .tables.control import INV_SCALE, NORM, SKIP, Clipping, Control, Prologue, make_clipping
from .tables.modes import HALVES, STATE_NAMES
from .tables.tensor_table import Rule

_T = TypeVar("_T")
_is_compiling = torch.compiler.is_compiling
# Not None while dynamo looks at every frame that is called: compiled functions call back into Python at graph breaks.
_dynamo_callback: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)
_profiler_enabled = torch._C._autograd._profiler_enabled

_NOT_DIFFERENTIABLE = (
    "differentiable=True is not supported: a fused step writes parameters in place, outside of autograd. "
    "Use torch.optim for steps that are differentiated through."
)


class FusedOptimizer(Optimizer):
    """Base of the fused optimizers: gathers what a step needs, checks it, and hands it to an engine.

    A subclass says which hyperparameters, flags, states and coefficients its update rule has; it contains no arithmetic on
    tensors. Nothing is changed before every check of every tensor has passed: an error leaves parameters, states and step
    counters as they were.
    """

    _rule: ClassVar[Rule]
    # Attributes of ours that are no param-group keys; they travel with pickle and deepcopy.
    _options: ClassVar[tuple[str, ...]] = (
        "_clipping",
        "_step_supports_amp_scaling",
        "_decay",
        "_initial_lrs",
        "_statistics",
        "_low_precision",
    )
    _plan: Plan | None = None
    _clipping: Clipping | None = None
    _step_supports_amp_scaling = False  # torch's name: where it is set, GradScaler leaves unscaling and skipping to step()
    _decay = Decay()
    _initial_lrs: dict[int, float]  # by param group: its lr when it was added
    _statistics = False
    _recorded: Recorded | None = None  # what the last step's statistics are made of
    _control: Tensor | Control | None = None  # of the last step
    _norm_dtype = torch.float32
    _low_precision = LowPrecision()
    _told_of_lost_decay = False

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if defaults["differentiable"]:
            raise ValueError(_NOT_DIFFERENTIABLE)
        if defaults["fused"] and defaults["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")  # torch's own words
        self._initial_lrs = {}
        super().__init__(params, defaults)
        self._decay.check_count(len(self.param_groups))
        self.state = OptimizerState()
        self._captured: list[Plan] = []  # what CUDA graphs read
        self._gradients = LocalGradients()

    # What a subclass provides.

    @staticmethod
    def _read_hyperparameters(group: dict[str, Any]) -> tuple[Any, ...]:
        """The group's values that a step depends on, as they are."""
        raise NotImplementedError

    def _checked_numbers(self, values: tuple[Any, ...], group: int) -> tuple[float, ...]:
        """Those values as floats, for the coefficients. Raises TypeError or ValueError if one is invalid."""
        raise NotImplementedError

    def _flags(self, values: tuple[Any, ...]) -> int:
        """The shape of the computation that those values ask for, as bits of ``Flag``."""
        raise NotImplementedError

    @staticmethod
    def _state_names(flags: int) -> tuple[str, ...]:
        """The state tensors of a parameter's shape that the rule reads and writes."""
        raise NotImplementedError

    @staticmethod
    def _coefficient_row(numbers: tuple[float, ...], flags: int, step: float) -> tuple[float, ...]:
        """The coefficient row (``coefficients.py``) of a group at this step count."""
        raise NotImplementedError

    # The step.

    def step(self, closure: Callable[[], _T] | None = None) -> _T | None:  # type: ignore[override]
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss; optional.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: if a gradient or a state tensor cannot be used (sparse, of another shape, device or dtype, ...).
            ValueError, TypeError: if a hyperparameter is out of its range or not a number.
        """
        if _is_compiling() or _dynamo_callback() is not None:
            return self._untraced_step(closure)
        if _profiler_enabled() or _has_step_hooks(self):
            return self._observed_step(closure)
        return self._step(closure)

    # Optimizer.__init__ wraps a step() that is not marked; ours calls the same wrapper when there is someone to see it.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], _T] | None = None) -> _T | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._step_gradients()
        finally:
            self._gradients.clear()
        return loss

    def _step_gradients(self) -> None:
        plan = self._plan
        if plan is None or not plan.refresh(self):
            plan = self._make_plan()
        plan.prepare()
        if not self._has_prologue() or self._decide(plan):
            if plan is not self._plan:
                self._adopt(plan)
            plan.launch(self)
        elif self._statistics:
            plan.measure_skipped()
        if self._statistics:
            self._remember(plan)

    _observed_step = Optimizer.profile_hook_step(_step)
    # Within a compiled function the step stands between two graphs: there is nothing in it to trace.
    _untraced_step = torch._disable_dynamo(_observed_step)  # type: ignore[attr-defined]

    @torch.no_grad()
    def _make_plan(self) -> Plan:
        self.drop_plan()  # a plan that failed to be made leaves none behind
        plan = Plan(self)
        if not plan.refresh(self):
            raise RuntimeError(
                "fused_l2: tensors changed while step() was looking at them. Is another thread using this optimizer's "
                "parameters or state?"
            )
        return plan

    def _adopt(self, plan: Plan) -> None:
        plan.commit(self)
        self._plan = plan
        if not self._told_of_lost_decay and (message := plan.lost_decay()):
            self._told_of_lost_decay = True
            warnings.warn(message, stacklevel=6)
        tell_of_changes(self)

    def _remember(self, plan: Plan) -> None:
        inv_scale = 1.0 if self._control is None or not self._has_prologue() else self._control[INV_SCALE]
        decays = [group["weight_decay"] for group in self.param_groups]
        # A tensor may be written to before somebody asks.
        self._recorded = plan.recorded([d.detach().clone() if isinstance(d, Tensor) else d for d in decays], inv_scale)

    @property
    def statistics(self) -> Statistics | None:
        """Figures of the last step, see :class:`fused_l2.Statistics`; None without ``statistics=True`` or before a step.

        They are put together when this is read, into new tensors, without waiting for the device. Setting it to True or False
        switches them on and off.
        """
        return None if self._recorded is None else self._recorded.statistics()

    @statistics.setter
    def statistics(self, wanted: bool) -> None:
        self._statistics, self._recorded = bool(wanted), None
        self.drop_plan()

    def _has_prologue(self) -> bool:
        return self._clipping is not None or self._step_supports_amp_scaling

    def _counts_on_device(self) -> bool:
        """Whether step counts of CUDA tensors are on their device."""
        return False

    def _decide(self, plan: Plan) -> bool:
        """Measure this step's gradients and ask the GradScaler. False if the host knows that the step is to be left out."""
        scaler = self.__dict__ if self._step_supports_amp_scaling else {}
        clipping = self._clipping
        prologue = Prologue(clipping, scaler.get("grad_scale"), scaler.get("found_inf"))
        control = self._control = plan.decide(prologue)
        self._norm_dtype = plan.norm_dtype
        raises = clipping is not None and clipping.error_if_nonfinite
        if raises or plan.host_must_know or isinstance(control, Control):
            known = plan.read(control)
            if known.skip:
                plan.use(control)
                return False
            if clipping is not None and raises and not math.isfinite(known.norm):
                raise RuntimeError(
                    f"The total norm of order {clipping.norm_type} of the gradients is {known.norm}, so they cannot be "
                    f"clipped; nothing was changed. To leave such steps out, pass skip_if_nonfinite=True instead of "
                    f"error_if_nonfinite=True; to multiply by the factor that comes of it anyway, neither."
                )
        plan.use(control)
        return True

    @property
    def max_grad_norm(self) -> float | None:
        """What the norm of all gradients is clipped to within each step; None: not clipped."""
        return None if self._clipping is None else self._clipping.max_norm

    @max_grad_norm.setter
    def max_grad_norm(self, limit: float | None) -> None:
        old = self._clipping or Clipping(math.inf)
        nonfinite = (old.error_if_nonfinite, old.skip_if_nonfinite) if limit is not None else (False, False)
        self._clipping = make_clipping(limit, old.norm_type, *nonfinite)
        self.drop_plan()

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients in the last step, before they were clipped, as ``torch.nn.utils.clip_grad_norm_`` returns
        it: a 0-dim tensor on the parameters' device, which nobody has waited for. None without ``max_grad_norm``."""
        if self._control is None or self._clipping is None:
            return None
        norm = self._control[NORM]
        return (
            norm.to(self._norm_dtype) if isinstance(norm, Tensor) else torch.tensor(norm, dtype=self._norm_dtype, device="cpu")
        )

    @property
    def step_was_skipped(self) -> Tensor:
        """Whether the last step was left out, by ``skip_if_nonfinite`` or by a GradScaler with ``amp_scaling``: a 0-dim bool
        tensor on the parameters' device, which nobody has waited for; ``if optimizer.step_was_skipped:`` does."""
        skip = 0.0 if self._control is None else self._control[SKIP]
        return skip != 0 if isinstance(skip, Tensor) else torch.tensor(skip != 0, device="cpu")

    @property
    def amp_scaling(self) -> bool:
        """Whether ``step()`` itself unscales gradients and leaves steps out as a ``torch.amp.GradScaler`` says."""
        return self._step_supports_amp_scaling

    @amp_scaling.setter
    def amp_scaling(self, supported: bool) -> None:
        self._step_supports_amp_scaling = bool(supported)
        self.drop_plan()

    @property
    def decay_rule(self) -> str | tuple[str, ...]:
        """What multiplies ``weight_decay``: ``"plain"``, ``"fully_decoupled"`` or ``"corrected"``, or one of them per param
        group."""
        rule = self._decay.rule
        if isinstance(rule, DecayRule):
            return rule.name.lower()
        return tuple(self._decay.rule_of(i).name.lower() for i in range(len(self.param_groups)))

    @decay_rule.setter
    def decay_rule(self, rule: str | Sequence[str]) -> None:
        decay = make_decay(rule, self._decay.max_lr, self._decay.cautious)
        decay.check_count(len(self.param_groups))
        self._set_option("_decay", decay)

    @property
    def max_lr(self) -> float | None:
        """The peak of the learning rate, which rules other than plain relate it to; None: each group's lr when it was added."""
        return self._decay.max_lr

    @max_lr.setter
    def max_lr(self, max_lr: float | None) -> None:
        new = make_decay("plain", max_lr, False)
        self._set_option("_decay", replace(self._decay, max_lr=new.max_lr))

    @property
    def cautious(self) -> bool:
        """Whether only weights that the update moves towards 0 are decayed."""
        return self._decay.cautious

    @cautious.setter
    def cautious(self, cautious: bool) -> None:
        self._set_option("_decay", replace(self._decay, cautious=bool(cautious)))

    @property
    def low_precision(self) -> str:
        """What is kept of a 16-bit parameter's float32 value: ``"round"``, ``"master"``, ``"remainder"``, ``"kahan"`` or
        ``"stochastic"``. Setting it carries :meth:`master_params` over."""
        return self._low_precision.mode.name.lower()

    @low_precision.setter
    def low_precision(self, mode: str) -> None:
        new = make_low_precision(mode, self._low_precision.state_dtype, self._low_precision.seed)
        weights = self.master_params()
        for p in self._all_params():
            if (name := self._low_precision.mode.state_name) and p in self.state:
                self.state[p].pop(name, None)
        self._low_precision = new
        self.load_master_params(weights)

    @property
    def state_dtype(self) -> torch.dtype | None:
        """The dtype of moments and momentum; None: each parameter's own, or float32 with a ``low_precision`` other
        than ``"round"``."""
        return self._low_precision.state_dtype

    @state_dtype.setter
    def state_dtype(self, dtype: torch.dtype | None) -> None:
        self._low_precision = make_low_precision(self.low_precision, dtype, self._low_precision.seed)
        self.drop_plan()

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def master_params(self) -> list[Tensor]:
        """A copy of every parameter, in the order of the param groups: of 16-bit ones the float32 value that the optimizer
        steps, which is all of it with ``low_precision="master"`` and ``"remainder"``."""
        found = []
        for p in self._all_params():
            mode = self._low_precision.mode_of(p)
            kept = self.state.get(p, {}).get(mode.state_name) if mode.state_name else None
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
        for p, w in zip(params, weights, strict=True):
            mode = self._low_precision.mode_of(p)
            if mode.state_name is None:
                p.copy_(w)
                continue
            wide = torch.empty_like(p, dtype=torch.float32).copy_(w)
            nearest = torch.full_like(local(p), 1 << 31, dtype=torch.int64)  # random bits with which rounding is to nearest
            value, kept = narrowed(mode, local(wide), p.dtype, nearest)
            p.copy_(like(p, value) if is_dtensor(p) else value)
            self.state[p][mode.state_name] = like(p, kept) if is_dtensor(p) and kept is not None else kept
        self.drop_plan()

    def _set_option(self, name: str, value: Any) -> None:
        """Set an attribute that the checks of hyperparameters look at; leave it as it was if they refuse it."""
        before = getattr(self, name)
        setattr(self, name, value)
        try:
            for i, group in enumerate(self.param_groups):
                self._checked_numbers(self._read_hyperparameters(group), i)
        except Exception:
            setattr(self, name, before)
            raise
        self.drop_plan()

    def _decay_numbers(self, group: int | None, decoupled: bool, remedy: str) -> tuple[float, float]:
        """``max_lr`` (1 where it is not looked at) and the rule of decay of a param group. None: of no group in particular."""
        if group is None:
            return 1.0, float(DecayRule.PLAIN)
        self._decay.check(group, decoupled, remedy)
        rule = self._decay.rule_of(group)
        if rule is DecayRule.PLAIN:
            return 1.0, float(rule)
        if self._decay.max_lr is not None:
            return self._decay.max_lr, float(rule)
        initial = self._initial_lrs.get(group, 0.0)
        if not (math.isfinite(initial) and initial > 0):
            raise ValueError(
                f"decay_rule={rule.name.lower()!r} relates lr to its peak, for which the lr that param group {group} was added "
                f"with ({initial}) cannot stand; pass max_lr=, the largest lr of the schedule"
            )
        return initial, float(rule)

    def drop_plan(self) -> None:
        """Forget what was prepared for the next step; it will be prepared again. Frees references to states."""
        self._plan = None

    # torch's contracts.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as ``torch.optim.Optimizer.add_param_group`` does, after checking its hyperparameters."""
        index = len(self.param_groups)
        try:
            if isinstance(param_group, dict):
                group = {**self.defaults, **param_group}
                self._initial_lrs[index] = number(group["lr"], "learning rate", f" of param group {index}")
                self._checked_numbers(self._read_hyperparameters(group), index)
                if param_group.get("differentiable"):
                    raise ValueError(_NOT_DIFFERENTIABLE)
            super().add_param_group(param_group)
        except Exception:
            self._initial_lrs.pop(index, None)
            raise
        self.drop_plan()

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's state dict: plain dicts, torch's keys. ``torch.optim`` loads it, and this class loads torch's."""
        packed = super().state_dict()
        packed["state"] = {k: transferable(v) if isinstance(v, dict) else v for k, v in packed["state"].items()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch.optim.

        As torch does, with two differences. Float32 states of 16-bit parameters stay float32, and what ``low_precision``
        keeps beside them stays as it is (torch casts every state to its parameter's dtype). Tensors are copied, so that two
        optimizers loaded from one dict do not step one state.
        """
        loaded: dict[str, Any] = {}
        capture = self.register_load_state_dict_pre_hook(lambda _, given: loaded.update(given))
        restore = self.register_load_state_dict_post_hook(lambda _: self._own_state(loaded), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            capture.remove()
            restore.remove()

    @torch.no_grad()
    def _own_state(self, loaded: dict[str, Any]) -> None:
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, param in zip(ids, params, strict=True):
            for key, given in loaded["state"].get(i, {}).items():
                value = self.state[param][key]
                if not isinstance(value, Tensor) or not isinstance(given, Tensor):
                    continue
                narrowed_by_torch = given.dtype is torch.float32 and value.dtype in HALVES
                if key != "step" and (narrowed_by_torch or key in STATE_NAMES):
                    self.state[param][key] = with_kept_dtype(key, given.to(device=value.device, copy=True))
                elif value.device == given.device and local(value).data_ptr() == local(given).data_ptr():
                    self.state[param][key] = value.clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._options}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if type(self.state) is not OptimizerState:
            self.state = OptimizerState(self.state)
        self.__dict__.setdefault("_captured", [])
        self._gradients = LocalGradients()
        self.drop_plan()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)


def _has_step_hooks(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )
