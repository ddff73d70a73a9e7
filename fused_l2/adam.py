"""Adam with coupled weight decay, and AdamW, with decoupled weight decay."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import FusedOptimizer
from .options import OptionArguments, Options, with_options
from .step import rules


@with_options
class Adam(FusedOptimizer):
    r"""``torch.optim.Adam`` in one pass over memory (Kingma & Ba 2015).

    With gradient g, per element, in float32 (float64 for float64 tensors), t counting this tensor's steps::

        g = g + weight_decay * w              # coupled decay
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2     # with amsgrad, its largest until now
        w = w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    With ``weight_decay > 0`` this is what torch.optim.Adam does, and rarely what is wanted: the penalty's gradient passes
    through both moments, so that sqrt(v) divides it. Weights with large gradients are then decayed *less*, and the strength
    of the decay hardly depends on ``weight_decay`` where the penalty dominates. :class:`AdamW` decays all weights at one
    rate (Loshchilov & Hutter 2019).

    Args:
        params: parameters, named parameters or param groups, as for ``torch.optim.Adam``.
        lr: learning rate; a float, or a tensor with one element.
        betas: (beta1, beta2), the shares of m and v that stay from step to step; floats, or tensors with one element.
        eps: added to the root, so that a small v divides by no less; a float, or a tensor with one element.
        weight_decay: coefficient of w in the gradient, lambda / n: see :func:`fused_l2.weight_decay.from_lambda`; a float, or a
            tensor with one element.
        amsgrad: divide by the largest v so far.
        foreach: accepted for compatibility, without effect.
        maximize: ascend: the gradient's sign is turned.
        capturable: count the steps of CUDA tensors on the device, so that ``step()`` can be captured into a CUDA graph. Replays
            follow lr, betas, eps and weight_decay that are tensors on the device, and keep numbers. No effect on CPU tensors.
        differentiable: must be False.
        fused: accepted for compatibility, without effect: every step is fused.
        decoupled_weight_decay: w <- (1 - lr * weight_decay) * w instead of the line marked "coupled", which is AdamW.
        OPTIONS

    Raises:
        ValueError, TypeError: if a hyperparameter is out of its range or not a number.
    """

    _rule = rules.ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[OptionArguments],
    ) -> None:
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
        super().__init__(params, defaults, Options.of(type(self).__name__, dict(options)))


@with_options
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
        betas: (beta1, beta2), the shares of m and v that stay from step to step; floats, or tensors with one element.
        eps: added to the root, so that a small v divides by no less; a float, or a tensor with one element.
        weight_decay: each step multiplies w by 1 - lr * weight_decay; a float, or a tensor with one element.
        amsgrad: divide by the largest v so far.
        maximize: ascend: the gradient's sign is turned.
        foreach: accepted for compatibility, without effect.
        capturable: count the steps of CUDA tensors on the device, so that ``step()`` can be captured into a CUDA graph. Replays
            follow lr, betas, eps and weight_decay that are tensors on the device, and keep numbers. No effect on CPU tensors.
        differentiable: must be False.
        fused: accepted for compatibility, without effect: every step is fused.
        OPTIONS

    Raises:
        ValueError, TypeError: if a hyperparameter is out of its range or not a number.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[OptionArguments],
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
            **options,
        )

    def _completed(self, group: dict[str, Any]) -> dict[str, Any]:
        # Also after loading a state dict of Adam.
        return {**super()._completed(group), "decoupled_weight_decay": True}
