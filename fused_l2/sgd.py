"""SGD with momentum, L2 regularization or decoupled weight decay."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import FusedOptimizer
from .options import OptionArguments, Options, flag, with_options
from .step import rules


@with_options
class SGD(FusedOptimizer):
    r"""``torch.optim.SGD`` in one pass over memory.

    With gradient g of the data term, per element, in float32 (float64 for float64 tensors)::

        d = g + weight_decay * w                # L2 regularization
        b = momentum * b + (1 - dampening) * d  # b = d first, and without momentum
        w = w - lr * (d + momentum * b if nesterov else b)

    ``weight_decay`` is the coefficient of w in the gradient. For the loss mean(data) + (lambda / 2n) * sum(w^2) over n
    training examples that is lambda / n (see :func:`fused_l2.weight_decay.from_lambda`). Without momentum the step is
    w <- (1 - lr * weight_decay) * w - lr * g: here L2 regularization *is* weight decay. With ``decoupled_weight_decay=True``
    (SGDW, Loshchilov & Hutter 2019) the shrink w <- (1 - lr * weight_decay) * w stays outside of the momentum too.

    Args:
        params: parameters, named parameters or param groups, as for ``torch.optim.SGD``.
        lr: learning rate; a float, or a tensor with one element. A step captured into a CUDA graph follows lr, momentum,
            dampening and weight_decay that are tensors on the device, and keeps numbers.
        momentum: share of the momentum buffer b that stays from step to step, 0 for none; a float, or a tensor with one
            element.
        dampening: the gradient enters the momentum buffer times 1 - dampening; a float, or a tensor with one element.
        weight_decay: coefficient of w in the gradient, lambda / n; a float, or a tensor with one element.
        nesterov: look ahead along the momentum buffer.
        maximize: ascend: the gradient's sign is turned.
        foreach: accepted for compatibility, without effect.
        differentiable: must be False.
        fused: accepted for compatibility, without effect: every step is fused.
        decoupled_weight_decay: shrink the weights instead of adding the penalty's gradient. An attribute of the optimizer,
            not a param-group key.
        OPTIONS

    Raises:
        ValueError, TypeError: if a hyperparameter is out of its range or not a number.
    """

    _rule = rules.SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float | Tensor = 0,
        dampening: float | Tensor = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[OptionArguments],
    ) -> None:
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
        decoupled = flag(decoupled_weight_decay, "decoupled_weight_decay")
        super().__init__(params, defaults, Options.of(type(self).__name__, dict(options), decoupled))

    @property
    def decoupled_weight_decay(self) -> bool:
        """Whether the decay shrinks the weights outside of the momentum, for all param groups."""
        return bool(self._stepper.options.decoupled_weight_decay)

    @decoupled_weight_decay.setter
    def decoupled_weight_decay(self, decoupled: bool) -> None:
        self._set_option("decoupled_weight_decay", decoupled)
