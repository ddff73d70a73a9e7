"""Adam with coupled weight decay, and AdamW, with decoupled weight decay."""

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
from .tables.coefficients import DecayRule
from .tables.control import make_clipping
from .tables.tensor_table import Flag, Rule

_read: Callable[[dict[str, Any]], tuple[Any, ...]] = itemgetter(
    "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"
)

_REMEDY = "Use AdamW, or pass decoupled_weight_decay=True."


class Adam(FusedOptimizer):
    r"""``torch.optim.Adam`` in one pass over memory (Kingma & Ba 2015).

    With gradient g, per element, in float32 (float64 for float64 tensors), t counting this tensor's steps::

        g = g + weight_decay * w                          # coupled, if weight_decay != 0
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2                 # amsgrad: the largest v so far takes its place below
        w = w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    With ``weight_decay > 0`` this is what torch.optim.Adam does, and rarely what is wanted: the penalty's gradient passes
    through both moments, so that sqrt(v) divides it. Weights with large gradients are then decayed *less*, and the strength
    of the decay hardly depends on ``weight_decay`` where the penalty dominates. :class:`AdamW` decays all weights at one
    rate (Loshchilov & Hutter 2019).

    Args:
        params: parameters, named parameters or param groups, as for ``torch.optim.Adam``.
        lr: learning rate; a float, or a tensor with one element.
        betas, eps, weight_decay, amsgrad, maximize: as for ``torch.optim.Adam``. ``weight_decay`` is the coefficient of w
            in the gradient: lambda / n, see :func:`fused_l2.weight_decay.from_lambda`.
        capturable: count the steps of CUDA tensors on the device, so that ``step()`` can be captured into a CUDA graph. Replays
            follow lr, betas, eps and weight_decay that are tensors on the device, and keep numbers. No effect on CPU tensors.
        foreach, fused: accepted for compatibility, without effect: every step is fused.
        differentiable: must be False.
        decoupled_weight_decay: w <- (1 - lr * weight_decay) * w instead of the line marked "coupled", which is AdamW.
        max_grad_norm: clip the gradients to this norm within the step, over all param groups, as
            ``torch.nn.utils.clip_grad_norm_`` before it would, without rewriting them. See :attr:`grad_norm`.
        norm_type: 2 or inf.
        error_if_nonfinite, skip_if_nonfinite: raise (waits for the device), or leave the step out, if that norm is inf or NaN.
            See :attr:`step_was_skipped`.
        amp_scaling: let ``torch.amp.GradScaler.step`` leave unscaling, and skipping after an overflow, to the step itself: one
            pass less over the gradients, and no wait for the device.
        decay_rule, max_lr, cautious: see :class:`AdamW`; with decoupled decay only.
        statistics: add up norms, the penalty and more during the step. See :attr:`statistics`.
        low_precision, state_dtype, seed: 16-bit parameters whose decay survives. See :class:`SGD`.

    Raises:
        ValueError, TypeError: if a hyperparameter is out of its range or not a number.
    """

    _rule = Rule.ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
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
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        self._checked_numbers(_read(defaults), None)
        super().__init__(params, defaults)

    @staticmethod
    def _read_hyperparameters(group: dict[str, Any]) -> tuple[Any, ...]:
        return _read(group)

    def _checked_numbers(self, values: tuple[Any, ...], group: int | None) -> tuple[float, ...]:
        where = "" if group is None else f" of param group {group}"
        lr, betas, eps, weight_decay, _, _, decoupled = values
        if isinstance(betas, (str, bytes)) or not hasattr(betas, "__len__") or len(betas) != 2:
            raise TypeError(f"betas must be a pair of numbers{where}, got {betas!r}")
        beta1, beta2 = (number(beta, f"beta parameter at index {i}", where) for i, beta in enumerate(betas))
        for i, beta in enumerate((beta1, beta2)):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}{where}: {beta}; expected 0 <= beta < 1")
        if group is not None and not decoupled and self._decay.rule_of(group) is DecayRule.CORRECTED:
            raise ValueError(
                f"decay_rule='corrected' needs decoupled weight decay, which param group {group} does not have: sqrt(v) "
                f"divides coupled decay, so no coefficient gives it the rate that the rule is about. {_REMEDY}"
            )
        return (
            at_least_zero(lr, "learning rate", where, " (to ascend, pass maximize=True)"),
            beta1,
            beta2,
            at_least_zero(eps, "epsilon value", where),
            at_least_zero(weight_decay, "weight_decay value", where),
            *self._decay_numbers(group, decoupled, _REMEDY),
        )

    def _counts_on_device(self) -> bool:
        skips = self._step_supports_amp_scaling or (self._clipping is not None and self._clipping.skip_if_nonfinite)
        return skips or any(group.get("capturable", False) for group in self.param_groups)

    def _flags(self, values: tuple[Any, ...]) -> int:
        *_, amsgrad, maximize, decoupled = values
        flags = int(Flag.DECOUPLED) if decoupled else 0
        if self._decay.cautious:
            flags |= Flag.CAUTIOUS
        if amsgrad:
            flags |= Flag.AMSGRAD
        if maximize:
            flags |= Flag.MAXIMIZE
        return flags

    @staticmethod
    def _state_names(flags: int) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if flags & Flag.AMSGRAD else ("exp_avg", "exp_avg_sq")

    @staticmethod
    def _coefficient_row(numbers: tuple[float, ...], flags: int, step: float) -> tuple[float, ...]:
        lr, beta1, beta2, eps, weight_decay, max_lr, decay_rule = numbers
        decoupled = bool(flags & Flag.DECOUPLED)
        return coefficients.adam(lr, beta1, beta2, eps, weight_decay, decoupled, step, max_lr, decay_rule)


class AdamW(Adam):
    r"""``torch.optim.AdamW`` in one pass over memory: Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    As :class:`Adam`, with the decay outside of the moments::

        w = (1 - lr * weight_decay) * w                   # first, if weight_decay != 0
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        w = w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    so that every decayed weight shrinks at the rate lr * weight_decay whatever its gradients. Biases, norm parameters and
    embeddings are usually left out: see :func:`fused_l2.weight_decay.param_groups`.

    Args:
        params: parameters, named parameters or param groups, as for ``torch.optim.AdamW``.
        lr: learning rate; a float, or a tensor with one element.
        betas, eps, weight_decay, amsgrad, maximize: as for ``torch.optim.AdamW``. capturable: see :class:`Adam`.
        foreach, fused: accepted for compatibility, without effect: every step is fused.
        differentiable: must be False.
        max_grad_norm: clip the gradients to this norm within the step, over all param groups, as
            ``torch.nn.utils.clip_grad_norm_`` before it would, without rewriting them. See :attr:`grad_norm`.
        norm_type: 2 or inf.
        error_if_nonfinite, skip_if_nonfinite: raise (waits for the device), or leave the step out, if that norm is inf or NaN.
            See :attr:`step_was_skipped`.
        amp_scaling: let ``torch.amp.GradScaler.step`` leave unscaling, and skipping after an overflow, to the step itself: one
            pass less over the gradients, and no wait for the device.
        decay_rule: what multiplies weight_decay in the first line. The difference shows where a schedule lowers lr.

            * ``"plain"``: lr.
            * ``"fully_decoupled"``: lr / max_lr, the schedule without the step size (Loshchilov & Hutter 2019, whose own decay
              this is): lr and weight_decay can be tuned one at a time.
            * ``"corrected"``: lr * (lr / max_lr) (AdamC; Defazio 2025, "Why Gradients Rapidly Increase Near the End of
              Training"), for weights that feed a normalization layer. Plain decay holds the ratio of their gradient to them
              at a multiple of sqrt(weight_decay / lr), which grows as lr falls; this one at sqrt(weight_decay / max_lr).

            One for all param groups, those added later too; or a sequence with one per group, and "plain" for groups added
            later. An attribute of the optimizer that may be set, not a param-group key: a checkpoint does not hold it.
        max_lr: the largest lr of the schedule. None: each group's lr when it was added, which is right for schedulers that
            multiply it by at most 1. OneCycleLR, and warm-ups that write a lr of their own, need the number. Larger lrs are
            no error.
        cautious: shrink only weights that the update moves towards 0 (Cautious Weight Decay, Chen et al. 2025): with u the
            update, w - lr * u, decay where u * w >= 0.
        statistics: add up norms, the penalty and more during the step. See :attr:`statistics`.
        low_precision, state_dtype, seed: 16-bit parameters whose decay survives. See :class:`SGD`.

    Raises:
        ValueError, TypeError: if a hyperparameter is out of its range or not a number.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
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
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            max_grad_norm=max_grad_norm,
            norm_type=norm_type,
            error_if_nonfinite=error_if_nonfinite,
            skip_if_nonfinite=skip_if_nonfinite,
            amp_scaling=amp_scaling,
            decay_rule=decay_rule,
            max_lr=max_lr,
            cautious=cautious,
            statistics=statistics,
            low_precision=low_precision,
            state_dtype=state_dtype,
            seed=seed,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # also after loading a state dict of Adam
