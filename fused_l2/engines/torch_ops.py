"""The plain-PyTorch engine: torch.optim's own functions, for tensors no other engine takes.

float32 and float64 tensors go to ``torch.optim.sgd.sgd`` and ``torch.optim.adam.adam`` as they are. 16-bit tensors
are widened to float32, stepped, and rounded once, as the other engines do, or as ``low_precision`` says; torch's own loop would
round after every operation and lose the weight decay.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from ..parameters import eight_bits
from ..parameters.checks import is_count
from ..parameters.entry import Entry
from ..parameters.low_precision import narrowed, random_bits, widened
from ..parameters.memory import has_plain_type
from ..statistics import FinishedSums, returned_of, row_of
from ..tables import coefficients
from ..tables.coefficients import AdamNumbers, SgdNumbers
from ..tables.control import FACTOR, Control, Prologue, on_host
from ..tables.modes import FLAGS, HALVES, RANDOM, Mode
from ..tables.tensor_table import Flag, Rule
from .bucket import RowOf
from .part import Part


class TorchPart(Part):
    """Tensors that no other engine takes, and those that share memory with an earlier one. Stepped last, in the order of their
    slots: torch.optim steps tensors that share memory one after the other."""

    on_host = True

    def __init__(self, rule: Rule, flags: int) -> None:
        super().__init__()
        self._rule = rule
        self._statistics = bool(flags & Flag.STATISTICS)
        self._entries: list[Entry] = []
        self._numbers: Sequence[Any] = ()
        self._factor: Tensor | float | None = None
        self._begun: set[Entry] = set()  # what the step under way has begun to change

    def add(self, entry: Entry) -> None:
        insort(self._entries, entry, key=attrgetter("slot"))

    def remove(self, entry: Entry) -> None:
        self._entries.remove(entry)

    def replace(self, old: Entry, new: Entry) -> None:
        self._entries[self._entries.index(old)] = new

    def activate(self, entry: Entry) -> None:
        entry.active = True

    def deactivate(self, entry: Entry) -> None:
        entry.active = False

    @property
    def is_empty(self) -> bool:
        return not self._entries

    @property
    def first_slot(self) -> int:
        return next((e.slot for e in self._entries if e.active), -1)

    def entries(self) -> list[Entry]:
        return [e for e in self._entries if e.active]

    def settle(self) -> bool:
        return False

    def unexpected_counts(self) -> list[Entry]:
        # Fake ones have no values.
        counters = [(e, e.counter) for e in self.entries() if e.counter is not None and has_plain_type(e.counter)]
        return [e for e, counter in counters if counter.device.type == "cpu" and not is_count(float(counter))]

    def prepare(self, row_of: RowOf, numbers: Sequence[Any], sources: Sequence[Sequence[int]]) -> None:
        self._numbers = numbers

    def measure(self, largest: bool) -> list[Tensor]:
        return [_measured(e.grad, largest) for e in self.entries()]

    def measure_of(self, ranks: tuple[Any, ...], largest: bool) -> list[Tensor]:
        """The same of the entries that these ranks share."""
        return [_measured(e.grad, largest) for e in self.entries() if e.ranks == ranks]

    def control(self, prologue: Prologue, dtype: torch.dtype) -> Tensor | Control:
        return combined(self.measure(prologue.largest) if prologue.measures else [], prologue, dtype)

    def use(self, control: Tensor | Control) -> None:
        self._factor = control[FACTOR]

    def measure_skipped(self) -> None:
        self.sums = FinishedSums(torch.stack([row_of(e.grad, e.weights()) for e in self.entries()]))

    @torch.no_grad()
    def launch(self) -> None:
        entries = self.entries()
        before = {e: e.weights().clone() for e in entries} if self._statistics else {}
        returned: dict[Entry, Tensor] = {}
        increment_version([e.param for e in entries if e.local is not e.param])

        # Neighbours that share a param group are stepped in one call; but not those that may share memory and would not see
        # what the one before them wrote: 16-bit ones, which are widened first, and what foreach steps together.
        def alone(e: Entry) -> int:
            return e.slot if e.local.dtype in HALVES or (e.is_regular and e.local.device.type == "cuda") else -1

        for _, found in groupby(entries, key=lambda e: (e.group, e.flags, e.first_step, e.mode, alone(e))):
            alike = list(found)
            exact = self._step(alike)
            for e, unrounded in zip(alike, exact, strict=True):
                e.first_step = False
                if self._statistics:
                    returned[e] = returned_of(before[e], unrounded, e.weights())
        if self._statistics:
            rows = [row_of(e.grad, before[e], e.weights(), returned[e]) for e in entries]
            self.sums = FinishedSums(torch.stack(rows))

    def _step(self, entries: list[Entry]) -> list[Tensor]:
        """Their new values before rounding to 16 bits."""
        first = entries[0]
        self._begun.update(entries)
        return step(
            self._rule,
            first.flags,
            self._numbers[first.group],
            [e.local for e in entries],
            [e.grad for e in entries],
            list(zip(*(e.states for e in entries), strict=True)),
            [e.counter for e in entries if e.counter is not None],
            first_step=first.first_step,
            factor=self._factor,
            kept=[e.kept for e in entries],
            keys=[e.key for e in entries],
            scales=list(zip(*(e.scales for e in entries), strict=True)),
        )

    def has_changed(self, entry: Entry, key: str) -> bool:
        # A first momentum is made from the gradient, and is none before the whole step is done: torch.optim's is not either.
        return entry in self._begun and not (key == "momentum_buffer" and entry.first_step)

    def release(self) -> None:
        super().release()
        self._factor = None
        self._begun = set()


def _measured(grad: Tensor, largest: bool) -> Tensor:
    wide = grad.detach().double()
    if largest:
        return wide.abs().max() if wide.numel() else wide.sum()
    return wide.square().sum()


def total(measured: Sequence[Tensor], largest: bool) -> Tensor:
    """Several sums (or largest values) as one, on the device of the first one."""
    together = torch.stack([m.to(measured[0].device, non_blocking=True) for m in measured])
    return together.max() if largest else together.sum()


def combined(measured: Sequence[Tensor], prologue: Prologue, dtype: torch.dtype) -> Tensor | Control:
    """What is decided of several sums (or largest values), 0-dim and float64, on one or several devices: on the device of the
    first one. ``tables.control.on_host`` and kernels/control.py have the same operations."""
    whole = total(measured, prologue.largest) if measured else torch.zeros((), dtype=torch.float64, device="cpu")
    first = whole.device
    if first.type == "cpu":
        return on_host(float(whole), prologue, dtype)

    def here(t: Tensor) -> Tensor:
        return t.detach().reshape(()).to(device=first, dtype=torch.float32, non_blocking=True)

    norm = whole if prologue.largest else whole.sqrt()
    inv_scale = torch.ones((), dtype=torch.float64, device=first)
    if prologue.grad_scale is not None:
        inv_scale = here(prologue.grad_scale).double().reciprocal().float().double()
        norm = norm * inv_scale
    norm = norm.to(dtype)
    factor = ((norm + 1e-6).reciprocal() * prologue.max_norm).clamp(max=1.0).double() * inv_scale
    skip = torch.zeros((), dtype=torch.bool, device=first)
    if prologue.found_inf is not None:
        skip = here(prologue.found_inf) != 0
    if prologue.skips_nonfinite:
        skip = skip | ~norm.isfinite()
    return torch.stack([factor, skip.double(), norm.double(), inv_scale])


_STATES = {Rule.SGD: ("momentum_buffer",), Rule.ADAM: ("exp_avg", "exp_avg_sq")}  # those that 8-bit codes may stand for


def step(
    rule: Rule,
    flags: int,
    numbers: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    counters: Sequence[Tensor],
    *,
    first_step: bool,
    factor: Tensor | float | None = None,
    kept: Sequence[Tensor | None] = (),
    keys: Sequence[int] = (),
    scales: Sequence[Sequence[Tensor]] = (),
) -> list[Tensor]:
    """Step parameters of one param group in place, with their states and counters. Gradients are left as they are. Returned
    are the parameters' new values before rounding to 16 bits.

    ``numbers`` are the group's ``SgdNumbers`` or ``AdamNumbers``. ``factor``: what gradients are multiplied by first, on any
    device. ``kept``: what is kept beside each parameter, and ``keys`` of random bits, where ``flags`` say a low-precision mode.
    ``scales``: of 8-bit states, in the order of ``states``.

    ``states`` holds one sequence per kind of state: all momentum buffers, or all exp_avg, all exp_avg_sq, ...
    """
    mode = Mode(flags & FLAGS)
    kept = kept or [None] * len(params)
    wide_params = [widened(mode, p, k) for p, k in zip(params, kept, strict=True)]
    wide_grads = [_widened(t) for t in grads]
    if factor is not None:
        factors = [factor.to(g.device, g.dtype) if isinstance(factor, Tensor) else factor for g in wide_grads]
        # A zero tensor of no dimension times a number has the number's dtype.
        wide_grads = [(g * f).to(g.dtype) for g, f in zip(wide_grads, factors, strict=True)]
    if flags & Flag.EIGHT_BIT:
        named = zip(_STATES[rule], states, scales, strict=True)
        wide_states = [list(map(partial(eight_bits.decode, name), codes, own)) for name, codes, own in named]
    else:
        wide_states = [[_widened(t) for t in kind] for kind in states]
    if rule is Rule.SGD:
        _sgd(flags, numbers, wide_params, wide_grads, wide_states, first_step)
    else:
        _adam(flags, numbers, wide_params, wide_grads, wide_states, list(counters))
    if rule is Rule.SGD and flags & RANDOM:
        torch._foreach_add_(list(counters), 1.0)
    bits = [_random_bits(param, keys[i], counters[i]) if flags & RANDOM else None for i, param in enumerate(params)]
    for k, (kind, wide) in enumerate(zip(states, wide_states, strict=True)):
        for i, (narrow, stepped) in enumerate(zip(kind, wide, strict=True)):
            if flags & Flag.EIGHT_BIT:
                codes, own_scales = eight_bits.encode(_STATES[rule][k], eight_bits.arranged(stepped, params[i]), bits[i])
                narrow.copy_(codes)
                scales[k][i].copy_(own_scales.view_as(scales[k][i]))
            elif narrow is not stepped:
                narrow.copy_(stepped)
    for i, (param, stepped) in enumerate(zip(params, wide_params, strict=True)):
        if param is stepped:
            continue
        rounded, left = narrowed(mode, stepped, param.dtype, bits[i])
        param.copy_(rounded)
        if left is not None:
            beside = kept[i]
            assert beside is not None
            beside.copy_(left)
    return wide_params


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
    numbers: SgdNumbers,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor]],
    first_step: bool,
) -> None:
    n, decoupled = numbers, bool(flags & Flag.DECOUPLED)
    weight_decay, decay = coefficients.decay(n, decoupled)
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
        momentum=n.momentum,
        lr=-1.0 if cautious else n.lr,
        dampening=n.dampening,
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
            param.add_(update, alpha=-n.lr)


def _adam(
    flags: int,
    numbers: AdamNumbers,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor]],
    counters: list[Tensor],
) -> None:
    n, decoupled = numbers, bool(flags & Flag.DECOUPLED)
    weight_decay, decay = coefficients.decay(n, decoupled)
    cautious = bool(flags & Flag.CAUTIOUS) and weight_decay != 0
    if decoupled and (cautious or n.decay_rule != coefficients.DecayRule.PLAIN):  # plain is torch's own
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
        capturable=counters[0].device.type != "cpu",
        decoupled_weight_decay=decoupled,
        amsgrad=bool(flags & Flag.AMSGRAD),
        beta1=n.beta1,
        beta2=n.beta2,
        lr=n.lr,
        weight_decay=weight_decay,
        eps=n.eps,
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
