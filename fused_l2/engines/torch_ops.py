"""The plain-PyTorch engine: torch.optim's own functions, for tensors no other engine takes.

float32 and float64 tensors go to ``torch.optim.sgd.sgd`` and ``torch.optim.adam.adam`` as they are. 16-bit tensors
are widened to float32, stepped, and rounded once, as the other engines do; torch's own loop would round after every
operation and lose the weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from .. import coefficients
from ..tensor_table import Flag, Rule


def step(
    rule: Rule,
    flags: int,
    numbers: tuple[float, ...],
    capturable: bool,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    counters: Sequence[Tensor],
    first_step: bool,
    factor: Tensor | float | None = None,
) -> None:
    """Step parameters of one param group in place, with their states and counters. Gradients are left as they are.

    ``factor``: what gradients are multiplied by first, on any device.

    ``states`` holds one sequence per kind of state: all momentum buffers, or all exp_avg, all exp_avg_sq, ...
    """
    kept = [*params, *(t for kind in states for t in kind)]
    wide_params, wide_grads = [_widened(t) for t in params], [_widened(t) for t in grads]
    if factor is not None:
        wide_grads = [g * (factor.to(g.device, g.dtype) if isinstance(factor, Tensor) else factor) for g in wide_grads]
    wide_states = [[_widened(t) for t in kind] for kind in states]
    if rule is Rule.SGD:
        _sgd(flags, numbers, wide_params, wide_grads, wide_states, first_step)
    else:
        _adam(flags, numbers, capturable, wide_params, wide_grads, wide_states, list(counters))
    for narrow, stepped in zip(kept, [*wide_params, *(t for kind in wide_states for t in kind)], strict=True):
        if narrow is not stepped:
            narrow.copy_(stepped)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _decoupled(
    params: list[Tensor], flags: int, lr: float, weight_decay: float, max_lr: float, rule: float
) -> tuple[float, list[Tensor]]:
    """Decay decoupled weights, or keep copies of them to decay cautiously once the update is known."""
    decay = coefficients.decay_factor(lr, weight_decay, max_lr, int(rule)) if flags & Flag.DECOUPLED else 1.0
    if flags & Flag.CAUTIOUS:
        return decay, [param.clone() for param in params]
    if decay != 1:
        for param in params:
            param.mul_(decay)
    return decay, []


def _decay_cautiously(params: list[Tensor], old: list[Tensor], decay: float) -> None:
    for param, before in zip(params, old, strict=False):
        update = before - param
        agree = ((update >= 0) & (before >= 0)) | ((update <= 0) & (before <= 0))
        param.add_(torch.where(agree, before * (decay - 1), torch.zeros_like(before)))


def _sgd(
    flags: int,
    numbers: tuple[float, ...],
    params: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor]],
    first_step: bool,
) -> None:
    lr, momentum, dampening, weight_decay, max_lr, rule = numbers
    decay, old = _decoupled(params, flags, lr, weight_decay, max_lr, rule)
    weight_decay = 0.0 if flags & Flag.DECOUPLED else coefficients.coupled_decay(lr, weight_decay, max_lr, int(rule))
    own = states[0] if states else []
    buffers: list[Tensor | None] = [None] * len(params) if first_step or not own else [*own]
    nesterov = bool(flags & Flag.NESTEROV)
    sgd(
        params,
        grads,
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
    _decay_cautiously(params, old, decay)
    if first_step:
        for buffer, made in zip(own, buffers, strict=False):
            assert made is not None
            buffer.copy_(made)


def _adam(
    flags: int,
    numbers: tuple[float, ...],
    capturable: bool,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor]],
    counters: list[Tensor],
) -> None:
    lr, beta1, beta2, eps, weight_decay, max_lr, rule = numbers
    decay, old = 1.0, list[Tensor]()
    if rule or flags & Flag.CAUTIOUS:  # else torch decays by itself
        decay, old = _decoupled(params, flags, lr, weight_decay, max_lr, rule)
        weight_decay = 0.0
    adam(
        params,
        grads,
        states[0],
        states[1],
        states[2] if len(states) > 2 else [],
        counters,
        capturable=capturable,
        decoupled_weight_decay=bool(flags & Flag.DECOUPLED),
        amsgrad=bool(flags & Flag.AMSGRAD),
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=bool(flags & Flag.MAXIMIZE),
    )
    _decay_cautiously(params, old, decay)
