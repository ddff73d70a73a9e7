"""What SGD and Adam are to a step: which keys of a param group they read, the numbers, flags and states that follow from them,
and the coefficient row of a step count. No tensor is touched here."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..options import Options, flag
from ..tables import coefficients
from ..tables.coefficients import AdamNumbers, DecayRule, SgdNumbers
from ..tables.modes import EIGHT_BIT
from ..tables.tensor_table import Flag, Rule
from .hyperparameters import at_least_zero, number, sources

_DECOUPLED = int(Flag.DECOUPLED)  # arithmetic with members of an enumeration is slow


class SgdValues(NamedTuple):
    """What SGD reads of a param group, as it stands there: numbers or tensors."""

    lr: Any
    momentum: Any
    dampening: Any
    weight_decay: Any
    nesterov: Any
    maximize: Any


class AdamValues(NamedTuple):
    """What Adam reads of a param group, as it stands there: numbers or tensors."""

    lr: Any
    betas: Any
    eps: Any
    weight_decay: Any
    amsgrad: Any
    maximize: Any
    decoupled_weight_decay: Any


class UpdateRule(ABC):
    """One update rule. ``read(group)`` gives a tuple of the group's values, in the order of ``Values``."""

    rule: ClassVar[Rule]
    counts: ClassVar[bool]  # whether coefficients depend on the step count
    Values: ClassVar[type[Any]]
    own_keys: ClassVar[tuple[str, ...]]  # of a param group; one without them was written by another optimizer

    def __init__(self) -> None:
        self.read = itemgetter(*self.Values._fields)

    @abstractmethod
    def numbers(self, values: Any, options: Options, group: int | None, initial_lr: float) -> Any:
        """Those values as floats. ``group``: the param group's index, None for an optimizer's defaults. ``initial_lr``: the
        group's lr when it was added.

        Raises:
            TypeError, ValueError: if one is invalid; the message names argument and group.
        """

    @abstractmethod
    def check_start(self, values: Any, group: int | None) -> None:
        """Refuse values that a group cannot start with, and a schedule may come to.

        Raises:
            ValueError: what is wrong with them together.
        """

    @abstractmethod
    def sources(self, values: Any, group: int) -> list[int]:
        """For each of the ``numbers``, where it is on its device instead: see ``hyperparameters.sources``."""

    @abstractmethod
    def flags(self, values: Any, options: Options) -> int:
        """The shape of the computation that those values and options ask for, as bits of ``Flag``."""

    @abstractmethod
    def state_names(self, flags: int) -> tuple[str, ...]:
        """The state tensors of a parameter's shape that the rule reads and writes."""

    @abstractmethod
    def may_start_at_zero(self, name: str) -> bool:
        """Whether this state may be missing beside others, and is zero then."""

    @abstractmethod
    def row(self, numbers: Any, flags: int, step: float) -> tuple[float, ...]:
        """The coefficient row (``coefficients.py``) of a group at this step count."""

    @abstractmethod
    def counts_on_device(self, options: Options, groups: list[dict[str, Any]]) -> bool:
        """Whether step counts of CUDA tensors are on their device."""

    def decay_rate(self, numbers: Any, flags: int) -> Any:
        """The share of each weight that the decay alone takes per step, of numbers or of tensors; NaN where there is none.

        L2 in SGD's gradient goes through the momentum, and arrives (1 - dampening) / (1 - momentum) times in the end; in
        Adam's it is divided by sqrt(v), other for each weight. With ``cautious`` the gradients say which weights decay.
        """
        if not isinstance(numbers.weight_decay, Tensor) and numbers.weight_decay == 0:
            return 0.0
        decoupled = bool(flags & Flag.DECOUPLED)
        if flags & Flag.CAUTIOUS or (self.rule is Rule.ADAM and not decoupled):
            return math.nan
        rate = coefficients.decay_rate(numbers.lr, numbers.max_lr, numbers.decay_rule) * numbers.weight_decay
        if decoupled or not flags & Flag.MOMENTUM:
            return rate
        if not isinstance(numbers.momentum, Tensor) and numbers.momentum >= 1:
            return math.nan  # there is no end
        return rate * (1 - numbers.dampening) / (1 - numbers.momentum)

    def decay_share(self, numbers: Any, flags: int) -> float:
        """The share of each weight that the decay takes per step; 0 where it passes through Adam's moments."""
        weight_decay, decay, *_ = self.row(numbers, flags, 1.0)
        if flags & Flag.DECOUPLED:
            return 1 - decay
        return 0.0 if self.rule is Rule.ADAM else float(numbers.lr * weight_decay)


def _decay(options: Options, group: int | None, decoupled: bool, initial_lr: float, remedy: str) -> tuple[float, float]:
    """``max_lr`` and the rule of decay of a param group."""
    if group is None:
        return 1.0, float(DecayRule.PLAIN)
    rule = options.decay_rule_of(group)
    if not decoupled:
        if options.cautious:
            raise ValueError(
                f"cautious=True needs decoupled weight decay, which param group {group} does not have: where the decay is part "
                f"of the gradient it has no direction of its own to compare. {remedy}"
            )
        if rule is DecayRule.FULLY_DECOUPLED:
            raise ValueError(
                f"decay_rule='fully_decoupled' needs decoupled weight decay, which param group {group} does not have: a decay "
                f"that is part of the gradient is multiplied by lr. {remedy}"
            )
    if rule is DecayRule.PLAIN:
        return 1.0, float(rule)
    if options.max_lr is not None:
        return options.max_lr, float(rule)
    if not (math.isfinite(initial_lr) and initial_lr > 0):
        raise ValueError(
            f"decay_rule={rule.name.lower()!r} relates lr to its peak, for which the lr that param group {group} was added "
            f"with ({initial_lr}) cannot stand; pass max_lr=, the largest lr of the schedule"
        )
    return initial_lr, float(rule)


# What is left of an lr by the rounding of a schedule that ends at 0: torch's LinearLR gets there by products, 2e-16 of the
# largest lr beside it, which nobody knows any more. torch.optim steps with it, and so do we.
_ROUNDING = 1e-12


def _learning_rate(value: Any, group: int | None) -> float:
    lr = number(value, "learning rate", where := _where(group))
    if lr < 0 and (group is None or lr < -_ROUNDING):
        raise ValueError(f"Invalid learning rate{where}: {value}; expected a number >= 0 (to ascend, pass maximize=True)")
    return lr


def _where(group: int | None) -> str:
    return "" if group is None else f" of param group {group}"


class _Sgd(UpdateRule):
    rule, counts, Values = Rule.SGD, False, SgdValues
    own_keys = ("momentum", "dampening")
    _remedy = "Pass decoupled_weight_decay=True."

    def numbers(self, values: SgdValues, options: Options, group: int | None, initial_lr: float) -> SgdNumbers:
        where = _where(group)
        lr = _learning_rate(values.lr, group)
        momentum = at_least_zero(values.momentum, "momentum value", where)
        dampening = number(values.dampening, "dampening", where)
        weight_decay = at_least_zero(values.weight_decay, "weight_decay value", where)
        decay = _decay(options, group, bool(options.decoupled_weight_decay), initial_lr, self._remedy)
        flag(values.maximize, "maximize", where, of_torch=True)
        flag(values.nesterov, "nesterov", where, of_torch=True)
        return SgdNumbers(lr, momentum, dampening, weight_decay, *decay)

    def check_start(self, values: SgdValues, group: int | None) -> None:
        if values.nesterov and (float(values.momentum) <= 0 or float(values.dampening) != 0):
            raise ValueError(
                f"Nesterov momentum requires a momentum and zero dampening{_where(group)}, got momentum={values.momentum}, "
                f"dampening={values.dampening}"
            )

    def sources(self, values: SgdValues, group: int) -> list[int]:
        where = _where(group)
        return sources((values.lr, values.momentum, values.dampening, values.weight_decay), where)

    def flags(self, values: SgdValues, options: Options) -> int:
        flags = options.flags | (Flag.DECOUPLED if options.decoupled_weight_decay else 0)
        if values.momentum != 0:
            flags |= Flag.MOMENTUM | (Flag.NESTEROV if values.nesterov else 0)
        if values.maximize:
            flags |= Flag.MAXIMIZE
        return flags

    def state_names(self, flags: int) -> tuple[str, ...]:
        return ("momentum_buffer",) if flags & Flag.MOMENTUM else ()

    def may_start_at_zero(self, name: str) -> bool:
        return True  # torch.optim.SGD's first step with a momentum makes the buffer

    def row(self, numbers: SgdNumbers, flags: int, step: float) -> tuple[float, ...]:
        return coefficients.sgd(numbers, bool(flags & _DECOUPLED))

    def counts_on_device(self, options: Options, groups: list[dict[str, Any]]) -> bool:
        return options.precision.is_random  # whose bits depend on the count, which replays of a graph need


class _Adam(UpdateRule):
    rule, counts, Values = Rule.ADAM, True, AdamValues
    own_keys = ("betas", "eps")
    _remedy = "Use AdamW, or pass decoupled_weight_decay=True."

    def numbers(self, values: AdamValues, options: Options, group: int | None, initial_lr: float) -> AdamNumbers:
        where = _where(group)
        betas = values.betas
        if isinstance(betas, (str, bytes)) or not hasattr(betas, "__len__") or len(betas) != 2:
            raise TypeError(f"betas{where} must be a pair of numbers, got {betas!r}")
        beta1, beta2 = (number(beta, f"beta parameter at index {i}", where) for i, beta in enumerate(betas))
        for i, beta in enumerate((beta1, beta2)):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}{where}: {beta}; expected 0 <= beta < 1")
        flag(values.maximize, "maximize", where, of_torch=True)
        if flag(values.amsgrad, "amsgrad", where, of_torch=True) and options.state_dtype == EIGHT_BIT:
            raise ValueError(
                f"state_dtype='8bit' and amsgrad=True{where} exclude each other: the largest of moments that are rounded at "
                f"random only grows. Pass amsgrad=False or state_dtype=torch.float32."
            )
        decoupled = flag(values.decoupled_weight_decay, "decoupled_weight_decay", where, of_torch=True)
        if group is not None and not decoupled and options.decay_rule_of(group) is DecayRule.CORRECTED:
            raise ValueError(
                f"decay_rule='corrected' needs decoupled weight decay, which param group {group} does not have: sqrt(v) "
                f"divides coupled decay, so no coefficient gives it the rate that the rule is about. {self._remedy}"
            )
        lr = _learning_rate(values.lr, group)
        eps = at_least_zero(values.eps, "epsilon value", where)
        weight_decay = at_least_zero(values.weight_decay, "weight_decay value", where)
        max_lr, rule = _decay(options, group, decoupled, initial_lr, self._remedy)
        return AdamNumbers(lr, beta1, beta2, eps, weight_decay, max_lr, rule)

    def check_start(self, values: AdamValues, group: int | None) -> None:
        pass  # what is wrong at the start is wrong later

    def sources(self, values: AdamValues, group: int) -> list[int]:
        beta1, beta2 = values.betas
        return sources((values.lr, beta1, beta2, values.eps, values.weight_decay), _where(group))

    def flags(self, values: AdamValues, options: Options) -> int:
        flags = options.flags | (Flag.DECOUPLED if values.decoupled_weight_decay else 0)
        if values.amsgrad:
            flags |= Flag.AMSGRAD
        if values.maximize:
            flags |= Flag.MAXIMIZE
        return flags

    def state_names(self, flags: int) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if flags & Flag.AMSGRAD else ("exp_avg", "exp_avg_sq")

    def may_start_at_zero(self, name: str) -> bool:
        return name == "max_exp_avg_sq"  # amsgrad may be switched on later

    def row(self, numbers: AdamNumbers, flags: int, step: float) -> tuple[float, ...]:
        return coefficients.adam(numbers, bool(flags & _DECOUPLED), step)

    def counts_on_device(self, options: Options, groups: list[dict[str, Any]]) -> bool:
        skips = options.amp_scaling or options.skips_nonfinite
        return skips or any(group.get("capturable", False) for group in groups)


SGD = _Sgd()
ADAM = _Adam()
