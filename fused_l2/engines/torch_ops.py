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


def _sgd(
    flags: int,
    numbers: tuple[float, ...],
    params: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor]],
    first_step: bool,
) -> None:
    lr, momentum, dampening, weight_decay, max_lr, decay_rule = numbers
    decoupled = bool(flags & Flag.DECOUPLED)
    weight_decay, decay = coefficients.decay(lr, weight_decay, decoupled, max_lr, decay_rule)
    cautious = bool(flags & Flag.CAUTIOUS) and weight_decay != 0
    if decoupled:
        if not cautious:
            _shrink(params, decay)
        weight_decay = 0.0
    own = states[0] if states else []
    buffers: list[Tensor | None] = [None] * len(params) if first_step or not own else [*own]
    nesterov = bool(flags & Flag.NESTEROV)
    # At lr -1, what starts from -0 ends as the update: -0 + x is x, whatever its sign.
    stepped = [torch.full_like(p, -0.0) for p in params] if cautious else params
    sgd(
        stepped,
        grads,
        buffers,
        # foreach with nesterov and no weight decay adds the momentum to the gradient itself.
        foreach=False if nesterov else None,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=-1.0 if cautious else lr,
        dampening=dampening,
        nesterov=nesterov,
        maximize=bool(flags & Flag.MAXIMIZE),
    )
    if first_step:
        for buffer, made in zip(own, buffers, strict=False):
            assert made is not None
            buffer.copy_(made)
    if cautious:
        _shrink_where_agreeing(params, stepped, decay)
        for param, update in zip(params, stepped, strict=True):
            param.add_(update, alpha=-lr)


def _adam(
    flags: int,
    numbers: tuple[float, ...],
    capturable: bool,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor]],
    counters: list[Tensor],
) -> None:
    lr, beta1, beta2, eps, weight_decay, max_lr, decay_rule = numbers
    decoupled = bool(flags & Flag.DECOUPLED)
    weight_decay, decay = coefficients.decay(lr, weight_decay, decoupled, max_lr, decay_rule)
    cautious = bool(flags & Flag.CAUTIOUS) and weight_decay != 0
    if decoupled and (cautious or decay_rule != coefficients.DecayRule.PLAIN):  # plain is torch's own
        if not cautious:
            _shrink(params, decay)
        weight_decay = 0.0
    stepped = [torch.full_like(p, -0.0) for p in params] if cautious else params  # they end as minus lr * update
    adam(
        stepped,
        grads,
        states[0],
        states[1],
        states[2] if len(states) > 2 else [],
        counters,
        capturable=capturable,
        decoupled_weight_decay=decoupled,
        amsgrad=bool(flags & Flag.AMSGRAD),
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=bool(flags & Flag.MAXIMIZE),
    )
    if cautious:
        _shrink_where_agreeing(params, states[0], decay)
        for param, delta in zip(params, stepped, strict=True):
            param.add_(delta)


def _shrink(params: list[Tensor], decay: float) -> None:
    if decay != 1:
        for param in params:
            param.mul_(decay)


def _shrink_where_agreeing(params: list[Tensor], updates: list[Tensor], decay: float) -> None:
    """Multiply by ``decay`` where parameter and update, or what has its sign, do not differ in sign."""
    for param, update in zip(params, updates, strict=True):
        agree = (update >= 0) & (param >= 0) | (update <= 0) & (param <= 0)
        param.copy_(torch.where(agree, param * decay, param))
