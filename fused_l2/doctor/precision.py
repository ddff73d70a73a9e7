"""What rounding leaves of an update and of the decay in it, from the weights as they are.

A step computes w + u - d in float32, u being the update and d = rate * w the decay, and stores the nearest 16-bit number. What
is stored falls by d in the mean only if u is noise that reaches across the gap to the next number. With u normal around 0 the
mean follows from the neighbours of each weight, and from what updates remember (``memory.py``); no random number is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..parameters.shards import local
from ..tables.modes import HALVES
from . import rules
from .memory import WIDE, remembered_fall
from .subject import Subject, Weight

# Elements that are looked at: of one tensor (a share of so many has a standard error of at most 0.2 %), of all tensors, and of
# one among many (0.8 %; a finding weighs all of them). In runs: what lies between is not read.
SAMPLE, BUDGET, FEWEST, RUN = 1 << 16, 1 << 22, 1 << 12, 1 << 8
_GOLDEN = (math.sqrt(5) - 1) / 2
_NEIGHBOURS = 6  # on each side; noise as wide as 1.5 gaps rarely reaches further, and wider noise loses nothing
_DIGITS = {torch.bfloat16: 7, torch.float16: 10}


@dataclass(frozen=True)
class Rounding:
    """What arrives of a tensor's decay and updates. None: not known."""

    decay: float | None  # the share of the decay that the stored weights follow, in the mean over the elements
    updates: float | None  # the share of elements that an update of the usual size changes
    sampled: bool  # from some of the elements


EXACT = Rounding(1.0, 1.0, False)


@torch.no_grad()
def rounding(weight: Weight, among: int = 1) -> Rounding | None:
    """What arrives, at the group's lr; None if nothing is known or can be read. ``among``: how many tensors are looked at."""
    optimizer, settings = weight.group.optimizer, weight.group.settings
    param = weight.param
    if param is None or param.is_meta or weight.dtype is None or not weight.dtype.is_floating_point or not weight.numel:
        return None
    if weight.dtype is torch.float64:
        return EXACT
    if weight.dtype in HALVES and rules.keeps_float32(optimizer, settings):
        return EXACT
    here = local(param)
    if not here.numel() or here.untyped_storage().nbytes() == 0:
        return None
    take = _Sample(here, max(FEWEST, min(SAMPLE, BUDGET // among)))
    w = take(here).float().abs().double()
    w = w[w.isfinite()] if not bool(w.isfinite().all()) else w
    group, lr = weight.group, weight.group.lr
    # What Adam's sqrt(v) makes of coupled decay is another rate for each weight.
    asks = group.decays and (group.kind == rules.DECOUPLED or (group.kind and not rules.is_adaptive(optimizer, settings)))
    rate = group.lr * group.weight_decay if asks and group.lr and group.weight_decay and float(w.sum()) else 0.0
    if weight.dtype is torch.float32:
        return Rounding(
            _float32_share(w, rate) if rate and group.kind == rules.DECOUPLED else 1.0 if rate else None, 1.0, take.sampled
        )
    if weight.dtype not in HALVES or rules.keeps_float32(optimizer, settings) is None:
        return None
    size = update_size(weight, take)
    if size is None or lr is None or len(w) != take.count:
        return Rounding(None, None, take.sampled)
    separate = group.kind == rules.DECOUPLED and group.how in (rules.LOOP, rules.FOREACH)
    share = None
    if rate:
        share = decay_share(w, rate, size, weight.dtype, separate)
        start, own = _start(w, rate, weight.dtype, separate)
        share += remembered_fall(w, start, size, own, _DIGITS[weight.dtype], _memory(weight)) / float(rate * w.sum())
    half_gap = (_neighbour(w, weight.dtype, 1) - w) / 2
    # An update of Adam's is about lr where gradients agree, and three times that at most for a moment.
    reach = torch.full_like(w, lr) if rules.is_adaptive(optimizer, settings) else size.expand_as(w)
    moved = float((reach >= half_gap).double().mean())
    return Rounding(share, moved, take.sampled)


def measured(subject: Subject) -> dict[Weight, tuple[float, float]]:
    """What the last step asked of each tensor as decay, and what of it arrived, where ``statistics=True`` was measuring it."""
    found = {}
    by_tensor = {
        id(o): statistics.by_tensor()
        for o in subject.optimizers
        if rules.is_ours(o) and (statistics := o.statistics) is not None
    }
    for weight in subject.weights:
        figures = by_tensor.get(id(weight.group.optimizer))
        if not figures:
            continue
        names, place = weight.group.settings.get("param_names") or (), f"{weight.group.index}.{weight.position}"
        name = names[weight.position] if weight.position < len(names) else place
        one = figures.get(name) or figures.get(f"{name} ({place})")
        if one is not None and float(one.decay_asked) > 0:
            found[weight] = float(one.decay_asked), float(one.decay_arrived)
    return found


class _Sample:
    """Takes the same elements of tensors of one shape, whatever their strides: runs of neighbours, spread over the tensor."""

    def __init__(self, tensor: Tensor, size: int) -> None:
        self._shape = tensor.shape
        runs = tensor.numel() // RUN
        self.sampled = tensor.numel() > size
        if self.sampled:
            # One in each of equal parts, where the golden ratio puts it: rows of any length are met at all of their places.
            part = torch.arange(size // RUN, dtype=torch.float64, device="cpu")
            self._runs = ((part + (part * _GOLDEN).frac()) * (runs / len(part))).long().to(tensor.device)
        self.count = len(self._runs) * RUN if self.sampled else tensor.numel()

    def __call__(self, tensor: Any) -> Any:
        """None if the shape is another one."""
        tensor = local(tensor).detach()
        if tensor.shape != self._shape:
            return None
        if not self.sampled:
            return tensor.reshape(-1)
        if tensor.is_contiguous():
            return tensor.view(-1)[: tensor.numel() // RUN * RUN].view(-1, RUN)[self._runs].view(-1)
        at = self._runs[:, None] * RUN + torch.arange(RUN, device=tensor.device)
        return tensor[torch.unravel_index(at.view(-1), self._shape)]


def update_size(weight: Weight, take: Any) -> Tensor | None:
    """The standard deviation of each element's updates, as noise around 0; one number where that is all there is."""
    group, state, settings = weight.group, weight.state, weight.group.settings
    lr = group.lr
    if lr is None:
        return None
    betas = settings.get("betas")
    if rules.is_adaptive(group.optimizer, settings) and betas is not None and len(betas) == 2:
        beta1, beta2 = rules.number(betas[0]), rules.number(betas[1])
        if beta1 is None or beta2 is None:
            return None
        # A mean over noise g: m^2 is (1 - beta1) / (1 + beta1) of g^2, which v is the mean of.
        size = lr * math.sqrt((1 - beta1) / (1 + beta1))
        first, second, count = state.get("exp_avg"), state.get("exp_avg_sq"), rules.number(state.get("step"))
        if not (isinstance(first, Tensor) and isinstance(second, Tensor) and count):
            return torch.tensor([size], dtype=torch.float64, device=local(weight.param).device)
        m, v = take(first), take(second)
        if m is None or v is None:
            return None
        m, v = m.double() / (1 - beta1**count), v.double() / (1 - beta2**count)
        moves = (v > 0) & (m != 0)
        if not bool(moves.any()):
            return torch.zeros_like(v)
        # As large as updates are now. v should be the mean of g^2 and need not be: in 16 bits it freezes. How far it still
        # tells the elements' gradients apart, m tells: the power of v that m^2 goes with.
        power = _slope(v[moves].log(), m[moves].square().log())
        squares = v**power * (m[moves].square().mean() / (v[moves] ** power).mean())
        return torch.where(v > 0, lr * squares.sqrt() / (v.sqrt() + (rules.number(settings.get("eps")) or 0.0)), 0.0)
    source = state.get("momentum_buffer")
    if not isinstance(source, Tensor):
        source = weight.param.grad if weight.param is not None else None
    if not isinstance(source, Tensor) or (values := take(source)) is None or rules.known_class(group.optimizer) != "SGD":
        return None
    spread: Tensor = (lr * values.double().square().mean().sqrt()).reshape(1)
    return spread


def _slope(x: Tensor, y: Tensor) -> float:
    """Of the line through these points, between 0 and 1; 1 where x is one value."""
    x = x - x.mean()
    spread = float(x.square().sum())
    return min(1.0, max(0.0, float((x * y).sum()) / spread)) if spread > 1e-9 * len(x) else 1.0


def decay_share(w: Tensor, rate: float, size: Tensor, dtype: torch.dtype, separate: bool = False) -> float:
    """Which part of ``rate * w`` the stored weights fall by in the mean.

    ``w``: magnitudes, float64, numbers of ``dtype``. ``size``: the standard deviation of the updates. ``separate``: the decay
    is rounded before the update is added, as torch's for-loop and foreach do.
    """
    asked = (rate * w).sum()
    if not asked:
        return 1.0
    start, own = _start(w, rate, dtype, separate)
    decay = own * w
    offsets = torch.arange(-_NEIGHBOURS, _NEIGHBOURS + 1, device=w.device)[:, None]
    numbers = _neighbour(start, dtype, offsets)
    gaps = numbers[1:] - numbers[:-1]
    gap = gaps[_NEIGHBOURS]
    # How far an update has to go, down or up, to cross the middle between two numbers.
    edges = (numbers[1:] + numbers[:-1]) / 2 - start + decay
    edges[:_NEIGHBOURS].neg_()
    crossed = gaps * _beyond(edges / size.clamp_min(1e-300))
    fall = crossed[:_NEIGHBOURS].sum(0) - crossed[_NEIGHBOURS:].sum(0)
    fall = torch.where((size > WIDE * gap) | (decay > 4 * gap), decay, fall) + (w - start)
    return float(fall.sum() / asked)


def _start(w: Tensor, rate: float, dtype: torch.dtype, separate: bool) -> tuple[Tensor, float]:
    """What updates are added to, and the share of decay that is rounded together with them."""
    return ((w.float() * (1 - rate)).to(dtype).double(), 0.0) if separate else (w, rate)


def _memory(weight: Weight) -> float:
    """How much of one update is in the next: the part of the momentum that stays."""
    settings = weight.group.settings
    betas = settings.get("betas")
    kept = betas[0] if betas is not None and len(betas) == 2 else settings.get("momentum", 0.0)
    return min(max(rules.number(kept) or 0.0, 0.0), 0.999)


def _float32_share(w: Tensor, rate: float) -> float:
    asked = float((rate * w).sum())
    kept = (w.float() * torch.tensor(1 - rate, dtype=torch.float32, device=w.device)).double()
    return float((w - kept).sum()) / asked if asked else 1.0


def _beyond(z: Tensor) -> Tensor:
    """How often a normal variable is larger."""
    return 0.5 * torch.erfc(z * math.sqrt(0.5))


def _neighbour(w: Tensor, dtype: torch.dtype, steps: int | Tensor) -> Tensor:
    """The number of a 16-bit dtype so many steps above a magnitude of it; beyond 0 negative ones."""
    bits = w.to(dtype).view(torch.int16).to(torch.int32) + steps
    value = bits.abs().to(torch.int16).view(dtype).double()
    return torch.where(bits < 0, -value, value)
