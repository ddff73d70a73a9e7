"""Figures of a step, added up by the step itself as it goes over the tensors: norms, penalty, gradients that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import _html
from .tables.tensor_table import STATISTICS

GRADS, PARAMS, UPDATES, NONFINITE, STEPPED, RETURNED = range(len(STATISTICS))
PENALTY, ASKED, ARRIVED = range(len(STATISTICS), len(STATISTICS) + 3)  # behind the sums, where there are totals


class Decay(NamedTuple):
    """Of a param group, at one step."""

    weight_decay: float | Tensor
    rate: float | Tensor  # which share of each weight a step takes: UpdateRule.decay_rate


class TensorSums(NamedTuple):
    """What a step added up over each of its tensors."""

    rows: Tensor  # float64 [tensors][STATISTICS]
    groups: Sequence[int]
    names: Sequence[str]
    decays: Sequence[Decay]  # of each param group
    inv_scale: float | Tensor  # what gradients are multiplied by to undo a loss scale
    whole: Tensor | None = None  # float64: such sums, and totals behind them, of tensors that several processes have parts of,
    parts: Sequence[bool] = ()  # which are these: their rows are of the parts in this process


@dataclass(frozen=True)
class Statistics:
    """Figures of one step, as 0-dim float64 tensors on the parameters' device. Making them waits for no device.

    Norms are 2-norms over all parameters that had a gradient. Gradients are those given, without a GradScaler's scale and
    before clipping. Weights are those before the step, for which the loss was computed; the update is weights after minus
    before, as stored, and zero for a skipped step.

    How much of the weight decay arrives, as it lowers sum w^2 / 2. Decay alone, in exact arithmetic, takes ``r * w`` of a
    weight at a step: ``decay_asked`` is the sum of ``w * (r * w)``. The step goes from w to an exact value u and stores s:
    rounding to 16 bits gives back the sum of ``w * (s - u)``, and ``decay_arrived`` is what is left of the asked. Both are in
    squares of the weights' unit, so that those of several steps add up: a share of many steps is the ratio of two sums, and
    that of one step is one draw of it, with noise where few weights are rounded. It may be below 0 or above 1. Of float32
    and float64 parameters, and of 16-bit ones whose mode keeps what rounding leaves out, all arrives.

    ``r`` is lr * weight_decay, with decoupled decay as ``decay_rule`` says. L2 in SGD's gradient goes through the momentum:
    r = lr * weight_decay * (1 - dampening) / (1 - momentum), which it is after the first 1 / (1 - momentum) steps. Where decay
    has no rate the three figures are NaN: L2 in Adam's gradient is divided by sqrt(v), and with ``cautious`` the gradients
    say which weights decay. Param groups without decay do not count.
    """

    grad_norm: Tensor
    param_norm: Tensor
    update_norm: Tensor
    update_ratio: Tensor  # update_norm / param_norm
    penalty: Tensor  # sum over param groups of weight_decay / 2 * sum w^2; of SGD and Adam lambda / 2n * sum w^2
    nonfinite_grads: Tensor  # how many elements of gradients are inf or NaN
    decay_asked: Tensor  # sum of r * w^2; 0 for a skipped step
    decay_arrived: Tensor  # decay_asked - sum of w * (stored - exact)
    decay_share: Tensor  # decay_arrived / decay_asked; NaN where nothing was asked
    _sums: TensorSums = field(compare=False)

    def as_dict(self) -> dict[str, float]:
        """The figures as numbers, for a logger. Waits for the device."""
        named = [f.name for f in fields(self) if not f.name.startswith("_")]
        return dict(zip(named, torch.stack([getattr(self, name) for name in named]).tolist(), strict=True))

    def __str__(self) -> str:
        """For ``print``: a line for each figure. Waits for the device."""
        shown = self._shown()
        width = max(len(name) for name, _ in shown)
        return "\n".join(f"{name:{width}}  {value}" for name, value in shown)

    def __repr__(self) -> str:
        """The figures in one line, if they are on the CPU. Elsewhere the device alone: debuggers ask for this, and should not
        wait for it."""
        device = self.grad_norm.device
        if device.type != "cpu":
            return f"Statistics(on {device}; print() reads it)"
        return f"Statistics({', '.join(f'{name}={value}' for name, value in self._shown())})"

    def _repr_html_(self) -> str:
        """In a notebook: the figures as a table. Waits for the device."""
        return _html.table(("figure", "value"), self._shown())

    def _shown(self) -> list[tuple[str, str]]:
        return [(name, f"{value:.6g}") for name, value in self.as_dict().items()]

    def by_group(self) -> list[Statistics]:
        """The same figures of each param group. If ``norm_process_group`` says that other processes have other parts, here and
        in :meth:`by_tensor` they are of what this process has."""
        groups = range(len(self._sums.decays))
        return [self._of([i for i, g in enumerate(self._sums.groups) if g == group]) for group in groups]

    def by_tensor(self) -> dict[str, Statistics]:
        """The same figures of each tensor that had a gradient, by its name in the param group's ``param_names``, or else by the
        numbers of group and position: ``"0.3"``. A name that several have is followed by those: ``"weight (0.3)"``."""
        return {name: self._of([i]) for i, name in enumerate(self._sums.names)}

    def _of(self, tensors: list[int]) -> Statistics:
        m = self._sums._replace(whole=None, parts=())
        chosen = torch.cat(chosen_rows(m.rows, tensors))
        return make_statistics(
            m._replace(rows=chosen, groups=[m.groups[i] for i in tensors], names=[m.names[i] for i in tensors])
        )


def make_statistics(given: TensorSums) -> Statistics:
    """The figures of all tensors together."""
    rows, groups = given.rows, given.groups
    if given.whole is not None:
        own = [i for i, is_part in enumerate(given.parts) if not is_part]
        rows, groups = torch.cat(chosen_rows(rows, own)), [groups[i] for i in own]
    totals = totals_of(rows, groups, given.decays)
    if given.whole is not None:
        totals = totals + given.whole.to(totals.device)
    grad_norm, param_norm, update_norm = (totals[i].sqrt() for i in (GRADS, PARAMS, UPDATES))
    inv_scale = _beside(given.inv_scale, rows)
    return Statistics(
        grad_norm=grad_norm * inv_scale,
        param_norm=param_norm,
        update_norm=update_norm,
        update_ratio=update_norm / param_norm,
        penalty=totals[PENALTY].clone(),
        nonfinite_grads=totals[NONFINITE].clone(),
        decay_asked=totals[ASKED].clone(),
        decay_arrived=totals[ARRIVED].clone(),
        decay_share=totals[ARRIVED] / totals[ASKED],
        _sums=given,
    )


def totals_of(rows: Tensor, groups: Sequence[int], decays: Sequence[Decay]) -> Tensor:
    """The sums over these rows, and after them PENALTY, ASKED, ARRIVED. ``groups``: the param group of each row."""
    penalty = asked = arrived = torch.zeros((), dtype=torch.float64, device=rows.device)
    for group in sorted(set(groups)):
        members = [i for i, g in enumerate(groups) if g == group]
        weight_decay, rate = (_beside(number, rows) for number in decays[group])
        for part in chosen_rows(rows, members):
            penalty = penalty + part[:, PARAMS].sum() * (weight_decay / 2)
            if not isinstance(rate, Tensor) and rate == 0:
                continue
            here = part[:, STEPPED].sum() * rate
            returned = part[:, RETURNED].sum()
            asked = asked + here
            arrived = arrived + here - (torch.where(rate == 0, 0.0, returned) if isinstance(rate, Tensor) else returned)
    return torch.cat([rows.sum(0), torch.stack([penalty, asked, arrived])])


def chosen_rows(rows: Tensor, members: list[int]) -> list[Tensor]:
    """These rows, stretch by stretch: a list as an index would be copied to the device, which waits for it."""
    if not members:
        return [rows[:0]]
    ends = [i + 1 for i, (m, n) in enumerate(pairwise(members)) if n != m + 1]
    return [rows[members[i] : members[j - 1] + 1] for i, j in zip([0, *ends], [*ends, len(members)], strict=True)]


def _beside(number: float | Tensor, rows: Tensor) -> float | Tensor:
    """A number as a float64 to compute with on the rows' device."""
    if not isinstance(number, Tensor):
        return number
    return float(number) if number.device.type == "cpu" else number.to(rows.device, torch.float64)


def _on_host(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


class PartialSums:
    """Where the steps of a part leave what they add up over each chunk. Holds no parameters and no states."""

    def __init__(
        self,
        partials: Sequence[Tensor],
        chunks: Sequence[int],
        slots: Sequence[int | None],
        sent: Callable[[Sequence[int]], Tensor] = _on_host,
        used: Callable[[Tensor], None] = lambda tensor: None,
    ) -> None:
        """``partials``: float64 [chunks][STATISTICS] for each bucket. ``chunks``: how many each tensor has. ``slots``: which of
        the optimizer's parameters each tensor is, None for one without a gradient. ``sent`` brings integers to where the
        partials are; ``used`` is told of what the current stream is about to read."""
        where = [i for slot, i in sorted((slot, i) for i, slot in enumerate(slots) if slot is not None)]
        # Now: to bring them when somebody reads would make the reader wait.
        self._partials, self._chunks, self._order, self._used = partials, sent(chunks), sent(where), used

    def rows(self) -> Tensor:
        """Sums over each tensor that had a gradient, in the order of slots."""
        for tensor in (*self._partials, self._chunks, self._order):
            if tensor.numel():
                self._used(tensor)
        together = torch.cat(list(self._partials))
        return torch.segment_reduce(together, "sum", lengths=self._chunks, axis=0, initial=0.0, unsafe=True)[self._order]


class FinishedSums(PartialSums):
    """Sums over whole tensors, which are there already."""

    def __init__(self, rows: Tensor) -> None:
        self._given = rows

    def rows(self) -> Tensor:
        return self._given


class LazyStatistics(NamedTuple):
    """What the statistics of a step are made of, once somebody asks for them. ``partial_sums`` are those of each part."""

    partial_sums: Sequence[PartialSums]
    groups: Sequence[int]
    names: Sequence[str]
    decays: Sequence[Decay]
    inv_scale: float | Tensor
    whole: Tensor | None = None
    parts: Sequence[bool] = ()

    @torch.no_grad()
    def statistics(self) -> Statistics:
        return make_statistics(TensorSums(rows_of(self.partial_sums), *self[1:]))


@torch.no_grad()
def rows_of(partial_sums: Sequence[PartialSums]) -> Tensor:
    """A row for each tensor, on one device."""
    rows = [partial.rows() for partial in partial_sums]
    rows = rows or [torch.zeros(0, len(STATISTICS), dtype=torch.float64, device="cpu")]
    # To a GPU, if there is one: the way back would wait for it.
    device = next((r.device for r in rows if r.device.type != "cpu"), rows[0].device)
    return torch.cat([r.to(device, non_blocking=device.type != "cpu") for r in rows])


@torch.no_grad()
def row_of(grad: Tensor, before: Tensor, after: Tensor | None = None, returned: Tensor | None = None) -> Tensor:
    """The row of one tensor, in plain PyTorch; without ``after`` of a step that was not made."""
    grads, params = (_wide(t) for t in (grad, before))
    sums = [x.square().sum() for x in (grads, params)]
    nothing = torch.zeros_like(sums[1])
    updates = nothing if after is None else (_wide(after) - params).square().sum()
    stepped = nothing if after is None else sums[1]
    nonfinite = (~grads.isfinite()).sum().double()
    return torch.stack([*sums, updates, nonfinite, stepped, nothing if returned is None else returned]).to(dtype=torch.float64)


def returned_of(before: Tensor, exact: Tensor, after: Tensor) -> Tensor:
    """What rounding gave back of one tensor's step, in plain PyTorch."""
    return (_wide(before) * (_wide(after) - _wide(exact))).sum()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double().reshape(-1)
