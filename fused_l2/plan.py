"""The plan of a step: which engine steps which tensors, where they are, and what makes the plan out of date.

Building a plan checks every tensor and changes nothing until all have passed. Afterwards a step only re-reads what may have
changed: the gradients (new tensors each step), the hyperparameters, and whether everything else is still what and where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, compress, groupby, repeat
from operator import is_, is_not, not_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import engines
from .buckets import Part, make_part
from .clipping import Clipping, Control, combined
from .engines import cuda, torch_ops
from .entries import Entry, check_grad, make_entry
from .state import OptimizerState, ParamState
from .tensor_table import Flag, Rule

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


class Plan:
    """Everything one optimizer's step needs, prepared."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._rule, self._row_of = optimizer._rule, optimizer._coefficient_row
        self._read = optimizer._read_hyperparameters
        groups = optimizer.param_groups
        self._hyperparameters = [self._read(group) for group in groups]
        self._numbers = [optimizer._checked_numbers(v, i) for i, v in enumerate(self._hyperparameters)]
        self._scaled = int(Flag.SCALED) if optimizer._clipping is not None else 0
        self._flags = [optimizer._flags(v) | self._scaled for v in self._hyperparameters]
        self._dynamic = [_may_change_in_place(v) for v in self._hyperparameters]
        self._coefficients_due = True

        self._params: list[Tensor] = [p for group in groups for p in group["params"]]
        self._ends = list(accumulate(len(group["params"]) for group in groups))
        self._active = [p.grad is not None for p in self._params]
        self._all_active = all(self._active)
        # A captured step would be replayed with this step's counts, hyperparameters and addresses. Refused before kernels are
        # compiled, which a capture does not allow either.
        self._refuses_capture = any(
            p.grad is not None and engines.device_of(p).type == "cuda" and not group.get("capturable", False)
            for group in groups
            for p in group["params"]
        )
        self._refuse_capture()
        entries = self._entries = self._make_entries(optimizer)

        devices = [engines.device_of(e.param) if _has_engine(e, self._rule) else None for e in entries]
        for i in _overlapping([e.param for e in entries]):
            devices[i] = None  # steps after the tensor whose memory it shares
        self._others = [e for e, device in zip(entries, devices, strict=True) if device is None]
        # Other devices first: they work while the CPU does.
        self._parts: list[tuple[Part, list[bool]]] = []
        for device in sorted({d for d in devices if d is not None}, key=lambda d: (d.type == "cpu", str(d))):
            belongs = [d == device for d in devices]
            self._parts.append((make_part(device, self._rule, list(compress(entries, belongs))), belongs))
        dtypes = {e.param.dtype for e in entries}
        self.norm_dtype = torch.float64 if dtypes == {torch.float64} else torch.float32
        self._others_factor: Tensor | float | None = None
        self._is_committed = False

    def _refuse_capture(self) -> None:
        if self._refuses_capture and cuda.is_capturing():
            raise RuntimeError(cuda.CAPTURING)

    def _make_entries(self, optimizer: FusedOptimizer) -> list[Entry]:
        entries: list[Entry] = []
        known: dict[int, Entry] = {}
        for index, group in enumerate(optimizer.param_groups):
            flags = self._flags[index]
            for position, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                state = optimizer.state.get(param, {})
                names, counts = optimizer._state_names(flags), self._rule is Rule.ADAM
                entry = make_entry(group, index, position, flags, state, names, counts)
                if id(param) in known:  # listed twice: one state
                    entry.new_state = known[id(param)].new_state
                known.setdefault(id(param), entry)
                entries.append(entry)
        return entries

    def commit(self, optimizer: FusedOptimizer) -> None:
        """Every check has passed: new state becomes visible, and its replacement is watched for."""
        self._is_committed = True
        for e in self._entries:
            if e.new_state:
                e.state = optimizer.state.setdefault(e.param, ParamState())
                for key, value in e.new_state.items():
                    if e.state.get(key) is not value:
                        e.state[key] = value
        self._known_state = [
            (e.param, e.state, [(key, e.get(key)) for key in (*e.state_names, "step") if e.get(key) is not None])
            for e in self._entries
        ]
        self._state = optimizer.state
        # Dictionaries that do not tell of replacements are searched at every step instead.
        self._is_told = type(self._state) is OptimizerState and all(
            type(state) is ParamState for _, state, known in self._known_state if known
        )

    def refresh(self, optimizer: FusedOptimizer) -> bool:
        """Read this step's gradients and hyperparameters. False if the plan no longer fits and has to be made anew.

        Changes nothing but the plan; raises if a hyperparameter or a gradient was set to something invalid.
        """
        self._refuse_capture()
        if self._is_committed and (optimizer.state is not self._state or not (self._is_told or self._finds_its_state())):
            return False
        groups, known = optimizer.param_groups, self._hyperparameters
        if len(groups) != len(known):
            return False
        params: list[Tensor] = []
        changed = []
        for i, group in enumerate(groups):
            params += group["params"]
            if len(params) != self._ends[i]:  # a parameter was added or removed, or moved to a neighbouring group
                return False
            values = self._read(group)
            try:
                differs = self._dynamic[i] or values != known[i]
            except RuntimeError:  # a tensor of several elements among them: refused below
                differs = True
            if differs:
                changed.append((i, values))
        if not all(map(is_, params, self._params)):
            return False
        if changed and not self._adopt(optimizer, changed):
            return False

        grads: list[Any] = [p.grad for p in params]
        if not self._all_active:
            if any(map(is_not, compress(grads, map(not_, self._active)), repeat(None))):
                return False
            grads = list(compress(grads, self._active))
        for e in self._others:
            if e.param.grad is None:
                return False
            check_grad(e.param, e.name)
        if len(self._parts) == 1 and not self._others:
            return self._parts[0][0].refresh(grads)
        return all(part.refresh(list(compress(grads, belongs))) for part, belongs in self._parts)

    def _adopt(self, optimizer: FusedOptimizer, changed: list[tuple[int, tuple[Any, ...]]]) -> bool:
        """Take over hyperparameters that changed. False if they change the shape of the computation."""
        checked = [(i, values, optimizer._checked_numbers(values, i)) for i, values in changed]
        if any(optimizer._flags(values) | self._scaled != self._flags[i] for i, values, _ in checked):
            return False
        for i, values, numbers in checked:
            self._hyperparameters[i] = values
            self._dynamic[i] = _may_change_in_place(values)
            self._coefficients_due |= numbers != self._numbers[i]
            self._numbers[i] = numbers
        return True

    def _finds_its_state(self) -> bool:
        return all(
            not known or (self._state.get(param) is state and all(state.get(key) is value for key, value in known))
            for param, state, known in self._known_state
        )

    @torch.no_grad()
    def clip(self, clipping: Clipping) -> Control:
        """Factor and norm of this step's gradients. The coming step will be scaled by the factor."""
        if len(self._parts) == 1 and not self._others:
            control = self._parts[0][0].clip(clipping, self.norm_dtype)
        else:
            measured = [part.measure(clipping) for part, _ in self._parts]
            measured += [_measured(e.grad, clipping) for e in self._others]
            control = combined(measured or [torch.zeros((), dtype=torch.float64, device="cpu")], clipping, self.norm_dtype)
        for part, _ in self._parts:
            part.scale_by(control)
        self._others_factor = control[0]
        return control

    def launch(self, optimizer: FusedOptimizer) -> None:
        """Step every tensor of the plan."""
        if self._coefficients_due:
            for part, _ in self._parts:
                for bucket in part.buckets:
                    bucket.set_coefficients(self._row_of, self._numbers)
            self._coefficients_due = self._rule is Rule.ADAM  # SGD's do not depend on the step count
        for part, _ in self._parts:
            part.launch()
        if self._others:
            self._launch_others(optimizer)

    @torch.no_grad()
    def _launch_others(self, optimizer: FusedOptimizer) -> None:
        # In their order, and neighbours that share a param group in one call.
        for (group, first_step), found in groupby(self._others, key=lambda e: (e.group, e.first_step)):
            entries = list(found)
            torch_ops.step(
                self._rule,
                self._flags[group],
                self._numbers[group],
                bool(optimizer.param_groups[group].get("capturable", False)),
                [e.param for e in entries],
                [e.grad for e in entries],
                list(zip(*(e.states for e in entries), strict=True)),
                [e.counter for e in entries if e.counter is not None],
                first_step,
                self._others_factor,
            )
            for e in entries:
                e.first_step = False


def _measured(grad: Tensor, clipping: Clipping) -> Tensor:
    wide = grad.detach().double()
    if clipping.largest:
        return wide.abs().max() if wide.numel() else wide.sum()
    return wide.square().sum()


def _has_engine(entry: Entry, rule: Rule) -> bool:
    grad, counter = entry.grad, entry.counter
    if not engines.has_plain_type(grad) or grad._is_zerotensor():
        return False
    if counter is not None and counter.device.type != "cpu":  # capturable: torch's functions count on the device
        return False
    states = entry.states
    # The kernels know states of the parameter's dtype, and float32 states of 16-bit parameters.
    dtypes = {t.dtype for t in states}
    if len(dtypes) > 1 or not dtypes <= {entry.param.dtype, torch.float32} or not all(map(engines.is_plain, states)):
        return False
    return engines.has_engine(entry.param, rule, entry.flags, entry.state_dtype)


def _may_change_in_place(values: tuple[Any, ...]) -> bool:
    """Whether a hyperparameter may change in place, as a tensor, an array or a list of betas may."""
    return any(_may_change_in_place(v) if type(v) is tuple else not isinstance(v, (float, int)) for v in values)


def _overlapping(params: Sequence[Tensor]) -> list[int]:
    """Which parameters share memory with an earlier one: listed twice, or tied through their storage.

    torch.optim steps them one after the other; within one launch they would race. May name one too many, never one too few.
    """
    ranges = []
    for i, p in enumerate(params):
        if p.device.type in ("cpu", "cuda") and engines.has_plain_type(p) and p.numel() > 0:
            extent = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
            ranges.append((p.data_ptr(), p.data_ptr() + extent * p.element_size(), i))
    ranges.sort()
    later: list[int] = []
    end, owner = 0, -1
    for start, stop, i in ranges:
        if start < end:
            later.append(max(i, owner))
            owner = min(i, owner)
            end = max(stop, end)
        else:
            end, owner = stop, i
    return later
