"""SGD with momentum, L2 regularization or decoupled weight decay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .decay import make_decay
from .optimizer import FusedOptimizer
from .parameters.low_precision import make_low_precision
from .step.hyperparameters import at_least_zero, number
from .tables import coefficients
from .tables.control import make_clipping
from .tables.modes import RANDOM
from .tables.tensor_table import Flag, Rule

_read: Callable[[dict[str, Any]], tuple[Any, ...]] = itemgetter(
    "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"
)

_REMEDY = "Pass decoupled_weight_decay=True."


class SGD(FusedOptimizer):
    r"""``torch.optim.SGD`` in one pass over memory.

    With gradient g of the data term, per element, in float32 (float64 for float64 tensors)::

        d = g + weight_decay * w                          # L2 regularization, if weight_decay != 0
        b = momentum * b + (1 - dampening) * d            # b = d on the tensor's first step; no momentum: b = d
        w = w - lr * (d + momentum * b if nesterov else b)

    ``weight_decay`` is the coefficient of w in the gradient. For the loss mean(data) + (lambda / 2n) * sum(w^2) over n
    training examples that is lambda / n (see :func:`fused_l2.weight_decay.from_lambda`). Without momentum the step is
    w <- (1 - lr * weight_decay) * w - lr * g: here L2 regularization *is* weight decay. With ``decoupled_weight_decay=True``
    (SGDW, Loshchilov & Hutter 2019) the shrink w <- (1 - lr * weight_decay) * w stays outside of the momentum too.

    Args:
        params: parameters, named parameters or param groups, as for ``torch.optim.SGD``.
        lr: learning rate; a float, or a tensor with one element. A step captured into a CUDA graph follows lr and weight_decay
            that are tensors on the device, and keeps numbers.
        momentum, dampening, weight_decay, nesterov, maximize: as for ``torch.optim.SGD``.
        foreach, fused: accepted for compatibility, without effect: every step is fused.
        differentiable: must be False.
        decoupled_weight_decay: shrink the weights instead of adding the penalty's gradient. An attribute of the optimizer,
            not a param-group key.
        max_grad_norm: clip the gradients to this norm within the step, over all param groups, as
            ``torch.nn.utils.clip_grad_norm_`` before it would, without rewriting them. See :attr:`grad_norm`.
        norm_type: 2 or inf.
        error_if_nonfinite, skip_if_nonfinite: raise (waits for the device), or leave the step out, if that norm is inf or NaN.
            See :attr:`step_was_skipped`.
        amp_scaling: let ``torch.amp.GradScaler.step`` leave unscaling, and skipping after an overflow, to the step itself: one
            pass less over the gradients, and no wait for the device.
        decay_rule: ``"plain"``, the above; ``"corrected"`` (SGDC, Defazio 2025): lr / max_lr * weight_decay in place of
            weight_decay; ``"fully_decoupled"`` (Loshchilov & Hutter 2019, the schedule without the step size; decoupled only):
            w <- (1 - lr / max_lr * weight_decay) * w. One for all param groups, those added later too; or a sequence with one
            per group, and "plain" for groups added later. See :class:`AdamW`.
        max_lr: the largest lr of the schedule, for those rules; None: each group's lr when it was added.
        cautious: decoupled only. Shrink only weights that the update moves towards 0 (Chen et al. 2025): with u the update,
            w - lr * u, decay where u * w >= 0.
        statistics: add up norms, the penalty and more during the step. See :attr:`statistics`.
        low_precision: what is kept of the float32 value of 16-bit parameters, in which the step is computed. With bfloat16
            parameters, ``"round"`` loses most of the weight decay, see docs/low-precision.md.

            * ``"round"``: the nearest 16-bit number, as torch's fused step; a warning tells where the decay cannot survive.
            * ``"remainder"``: all of it, as the bfloat16 parameter and a 16-bit remainder beside it (2 bytes a parameter).
            * ``"master"``: all of it, in a float32 state (4 bytes a parameter).
            * ``"kahan"``: what rounding left out, as a bfloat16 compensation (2 bytes a parameter).
            * ``"stochastic"``: one of the two neighbours at random, with the right mean (nothing).

            With any of the last four, new moments and momentum are float32.
        state_dtype: ``torch.float32`` or ``torch.bfloat16``: the dtype of moments and momentum. None: the parameter's own.
        seed: of the random bits of ``"stochastic"`` and ``"kahan"``, which are a hash of it, the step, the parameter and the
            element: the same on every device.

    Raises:
        ValueError, TypeError: if a hyperparameter is out of its range or not a number.
    """

    _rule = Rule.SGD
    _options = ("_decoupled", *FusedOptimizer._options)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        skip_if_nonfinite: bool = False,
        amp_scaling: bool = False,
        decay_rule: str | Sequence[str] = "plain",
        max_lr: float | None = None,
        cautious: bool = False,
        statistics: bool = False,
        low_precision: str = "round",
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self._clipping = make_clipping(max_grad_norm, norm_type, error_if_nonfinite, skip_if_nonfinite)
        self._step_supports_amp_scaling = bool(amp_scaling)
        self._statistics = bool(statistics)
        self._low_precision = make_low_precision(low_precision, state_dtype, seed)
        self._decay = make_decay(decay_rule, max_lr, cautious)
        self._decoupled = decoupled_weight_decay
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        self._checked_numbers(_read(defaults), None)
        super().__init__(params, defaults)

    @property
    def decoupled_weight_decay(self) -> bool:
        """Whether the decay shrinks the weights outside of the momentum, for all param groups."""
        return self._decoupled

    @decoupled_weight_decay.setter
    def decoupled_weight_decay(self, decoupled: bool) -> None:
        self._set_option("_decoupled", decoupled)

    @staticmethod
    def _read_hyperparameters(group: dict[str, Any]) -> tuple[Any, ...]:
        return _read(group)

    def _checked_numbers(self, values: tuple[Any, ...], group: int | None) -> tuple[float, ...]:
        where = "" if group is None else f" of param group {group}"
        lr, momentum, dampening, weight_decay, nesterov, _ = values
        checked = (
            at_least_zero(lr, "learning rate", where, " (to ascend, pass maximize=True)"),
            at_least_zero(momentum, "momentum value", where),
            number(dampening, "dampening", where),
            at_least_zero(weight_decay, "weight_decay value", where),
            *self._decay_numbers(group, self._decoupled, _REMEDY),
        )
        if nesterov and (checked[1] <= 0 or checked[2] != 0):
            raise ValueError(
                f"Nesterov momentum requires a momentum and zero dampening{where}, got momentum={momentum}, "
                f"dampening={dampening}"
            )
        return checked

    def _flags(self, values: tuple[Any, ...]) -> int:
        _, momentum, _, _, nesterov, maximize = values
        flags = int(Flag.DECOUPLED) if self._decoupled else 0
        if self._decay.cautious:
            flags |= Flag.CAUTIOUS
        if momentum != 0:
            flags |= Flag.MOMENTUM
        if nesterov:
            flags |= Flag.NESTEROV
        if maximize:
            flags |= Flag.MAXIMIZE
        return flags

    def _counts_on_device(self) -> bool:
        return bool(self._low_precision.mode & RANDOM)  # whose bits depend on the count, which replays of a graph need

    @staticmethod
    def _state_names(flags: int) -> tuple[str, ...]:
        return ("momentum_buffer",) if flags & Flag.MOMENTUM else ()

    @staticmethod
    def _coefficient_row(numbers: tuple[float, ...], flags: int, step: float) -> tuple[float, ...]:
        lr, momentum, dampening, weight_decay, max_lr, decay_rule = numbers
        return coefficients.sgd(lr, momentum, dampening, weight_decay, bool(flags & Flag.DECOUPLED), max_lr, decay_rule)
