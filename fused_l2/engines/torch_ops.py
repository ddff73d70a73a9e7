"""The plain-PyTorch engine: torch.optim's own functions, for tensors no other engine takes.

float32 and float64 tensors go to ``torch.optim.sgd.sgd`` and ``torch.optim.adam.adam`` as they are. 16-bit tensors
are widened to float32, stepped, and rounded once, as the other engines do, or as ``low_precision`` says; torch's own loop would
round after every operation and lose the weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from ..parameters.low_precision import narrowed, random_bits, widened
from ..tables import coefficients
from ..tables.modes import FLAGS, RANDOM, Mode
from ..tables.tensor_table import Flag, Rule


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
    kept: Sequence[Tensor | None] = (),
    keys: Sequence[int] = (),
) -> None:
    """Step parameters of one param group in place, with their states and counters. Gradients are left as they are.

    ``factor``: what gradients are multiplied by first, on any device. ``kept``: what is kept beside each parameter, and
    ``keys`` of random bits, where ``flags`` say a low-precision mode.

    ``states`` holds one sequence per kind of state: all momentum buffers, or all exp_avg, all exp_avg_sq, ...
    """
    mode = Mode(flags & FLAGS)
    kept = kept or [None] * len(params)
    wide_params = [widened(mode, p, k) for p, k in zip(params, kept, strict=True)]
    wide_grads = [_widened(t) for t in grads]
    if factor is not None:
        wide_grads = [g * (factor.to(g.device, g.dtype) if isinstance(factor, Tensor) else factor) for g in wide_grads]
    wide_states = [[_widened(t) for t in kind] for kind in states]
    if rule is Rule.SGD:
        _sgd(flags, numbers, wide_params, wide_grads, wide_states, first_step)
    else:
        _adam(flags, numbers, capturable, wide_params, wide_grads, wide_states, list(counters))
    if rule is Rule.SGD and flags & RANDOM:
        torch._foreach_add_(list(counters), 1.0)
    for kind, wide in zip(states, wide_states, strict=True):
        for narrow, stepped in zip(kind, wide, strict=True):
            if narrow is not stepped:
                narrow.copy_(stepped)
    for i, (param, stepped) in enumerate(zip(params, wide_params, strict=True)):
        if param is stepped:
            continue
        bits = _random_bits(param, keys[i], counters[i]) if flags & RANDOM else None
        rounded, left = narrowed(mode, stepped, param.dtype, bits)
        param.copy_(rounded)
        if left is not None:
            own = kept[i]
            assert own is not None
            own.copy_(left)


def _random_bits(param: Tensor, key: int, counter: Tensor) -> Tensor:
    """Those of each element, which are numbered in the order of memory; ``key`` as in a tensor's row."""
    order = sorted(range(param.dim()), key=param.stride, reverse=True)
    shape = [param.shape[i] for i in order]
    bits = random_bits(key & 0xFFFFFFFF, int(counter), param.numel(), key >> 32).to(param.device).view(shape)
    return bits.permute([order.index(i) for i in range(param.dim())])


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
