"""The plain-PyTorch engine: torch.optim's own functions, for tensors no other engine takes.

float32 and float64 tensors go to ``torch.optim.sgd.sgd`` and ``torch.optim.adam.adam`` as they are. 16-bit tensors
are widened to float32, stepped, and rounded once, as the other engines do; torch's own loop would round after every
operation and lose the weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from ..tensor_table import Flag, Rule


def step(
    rule: Rule,
    flags: int,
    numbers: tuple[float, ...],
    group: dict[str, Any],
    param: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    counter: Tensor | None,
    first_step: bool,
) -> None:
    """Step one parameter in place: ``param``, its ``states`` and its ``counter``. ``grad`` is left as it is."""
    wide = [_widened(t) for t in (param, grad, *states)]
    wide_param, wide_grad, *wide_states = wide
    if rule is Rule.SGD:
        _sgd(flags, numbers, wide_param, wide_grad, wide_states, first_step)
    else:
        assert counter is not None
        _adam(flags, numbers, group, wide_param, wide_grad, wide_states, counter)
    for narrow, stepped in zip((param, *states), (wide_param, *wide_states), strict=True):
        if narrow is not stepped:
            narrow.copy_(stepped)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _sgd(flags: int, numbers: tuple[float, ...], param: Tensor, grad: Tensor, states: list[Tensor], first_step: bool) -> None:
    lr, momentum, dampening, weight_decay = numbers
    if flags & Flag.DECOUPLED and weight_decay != 0:
        param.mul_(1 - lr * weight_decay)
        weight_decay = 0.0
    buffers: list[Tensor | None] = [None] if first_step or not states else [states[0]]
    nesterov = bool(flags & Flag.NESTEROV)
    sgd(
        [param],
        [grad],
        buffers,
        # foreach with nesterov and no weight decay adds the momentum to the gradient itself.
        foreach=False if nesterov else None,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=dampening,
        nesterov=nesterov,
        maximize=bool(flags & Flag.MAXIMIZE),
    )
    if first_step and states and buffers[0] is not None:
        states[0].copy_(buffers[0])


def _adam(
    flags: int,
    numbers: tuple[float, ...],
    group: dict[str, Any],
    param: Tensor,
    grad: Tensor,
    states: list[Tensor],
    counter: Tensor,
) -> None:
    lr, beta1, beta2, eps, weight_decay = numbers
    adam(
        [param],
        [grad],
        [states[0]],
        [states[1]],
        states[2:],
        [counter],
        capturable=bool(group.get("capturable", False)),
        decoupled_weight_decay=bool(flags & Flag.DECOUPLED),
        amsgrad=bool(flags & Flag.AMSGRAD),
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=bool(flags & Flag.MAXIMIZE),
    )
