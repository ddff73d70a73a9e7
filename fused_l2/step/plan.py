"""The plan of a step: which engine steps which tensors, where they are, and what makes the plan out of date.

Building a plan checks every tensor and changes nothing until all have passed. Afterwards a step only re-reads what may have
changed: the gradients (new tensors each step), the hyperparameters, and whether everything else is still what and where it was.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from itertools import accumulate, compress, groupby, repeat
from operator import is_, is_not, not_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import engines
from ..engines import cpu, cuda, torch_ops
from ..engines.part import CudaPart, Part, make_part
from ..engines.watch import SlotWatch
from ..parameters.entry import Entry, check_grad, make_entry
from ..parameters.low_precision import lost_decay
from ..parameters.shards import Shards, gradients_of, is_dtensor, sum_over
from ..statistics import Recorded, row_of
from ..tables.control import FACTOR, Control, Prologue, combined, total
from ..tables.modes import HALVES, RANDOM, STATE_NAMES, Mode
from ..tables.tensor_table import Flag, Rule
from .hyperparameters import DeviceValues, is_on_device, sources
from .state import OptimizerState, ParamState

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer


class Plan:
    """Everything one optimizer's step needs, prepared."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._rule, self._row_of = optimizer._rule, optimizer._coefficient_row
        self._read = optimizer._read_hyperparameters
        groups = optimizer.param_groups
        if _has_cuda_gradients(groups) and cuda.is_capturing():  # before anything is compiled or read, which it does not allow
            raise RuntimeError(_capture_refused("there is nothing prepared. " + _FIRST_STEP))
        self._hyperparameters = [self._read(group) for group in groups]
        self._device_values, self._host_needs_values = DeviceValues(), False
        read = [self._device_values.read(v) for v in self._hyperparameters]
        self._sources = [sources(v, f" of param group {i}") for i, v in enumerate(self._hyperparameters)]
        self._numbers = [optimizer._checked_numbers(v, i) for i, v in enumerate(read)]
        self._has_sources = any(map(any, self._sources))
        # Where the host cannot know whether a step was made, or what with, the device counts and computes.
        self._on_device = optimizer._counts_on_device() or self._has_sources
        self._scaled = optimizer._has_prologue()
        self._around = (Flag.SCALED if self._scaled else 0) | (Flag.STATISTICS if optimizer._statistics else 0)
        self._flags = [optimizer._flags(v) | self._around for v in read]
        self._dynamic = [_may_change_in_place(v) for v in self._hyperparameters]
        self._coefficients_due = True

        self._params: list[Tensor] = [p for group in groups for p in group["params"]]
        self._ends = list(accumulate(len(group["params"]) for group in groups))
        self._active = [p.grad is not None for p in self._params]
        self._all_active = all(self._active)
        entries = self._entries = self._make_entries(optimizer)

        self._counts = self._rule is Rule.ADAM or any(e.flags & RANDOM for e in entries)
        devices = [engines.device_of(e.local) if _has_engine(e, self._rule) else None for e in entries]
        for i in _overlapping([e.local for e in entries]):
            devices[i] = None  # steps after the tensor whose memory it shares
        self._others = [e for e, device in zip(entries, devices, strict=True) if device is None]
        # Other devices first: they work while the CPU does.
        self._parts: list[tuple[Part, list[bool]]] = []
        self._ranks = list(dict.fromkeys(e.ranks for e in entries))  # in an order that is the same in all processes
        places = [(device, e.ranks if self._around else ()) for e, device in zip(entries, devices, strict=True)]
        distinct = dict.fromkeys((device, ranks) for device, ranks in places if device is not None)
        for place in sorted(distinct, key=lambda place: (place[0].type == "cpu", str(place[0]))):
            belongs = [p == place for p in places]
            part = make_part(place[0], self._rule, list(compress(entries, belongs)), self._on_device)
            self._parts.append((part, belongs))
        watch = functools.partial(SlotWatch, cpu.library())
        cut = any(is_dtensor(e.param) for e in entries)
        self._shards = Shards([e.param for e in entries], optimizer._gradients, watch) if cut else None
        dtypes = {e.param.dtype for e in entries}
        self.norm_dtype = torch.float64 if dtypes == {torch.float64} else torch.float32
        self._cuda_parts = [part for part, _ in self._parts if isinstance(part, CudaPart)]
        for part in self._cuda_parts:
            if self._scaled:
                part.prepare(optimizer._clipping, self.norm_dtype)
        self._host_steps = bool(self._others) or len(self._cuda_parts) < len(self._parts)
        self._host_needs_values = self._has_sources and self._host_steps
        self._others_factor: Tensor | float | None = None
        self._others_rows: list[Tensor] = []
        in_order = [e for _, belongs in self._parts for e in compress(entries, belongs)] + self._others
        self._measured_entries = [e.group for e in in_order], [e.label for e in in_order]
        self._measured_ranks = [e.ranks for e in in_order]
        self._is_committed = False

    @property
    def host_must_know(self) -> bool:
        """Whether the host has to know if the step is made: it steps some tensors itself, or has to create states."""
        return self._host_steps or (not self._is_committed and any(e.new_state for e in self._entries))

    def _refuse_capture(self, optimizer: FusedOptimizer) -> None:
        if not (self._cuda_parts and cuda.is_capturing()):
            return
        groups = optimizer.param_groups
        if self._rule is Rule.ADAM and not all(g.get("capturable", False) for g in groups):
            raise RuntimeError(_capture_refused("its steps are counted on the host. Pass capturable=True."))
        if self._host_steps:
            raise RuntimeError(_capture_refused("some of its tensors are stepped by the host or by plain PyTorch."))
        if optimizer._clipping is not None and optimizer._clipping.error_if_nonfinite:
            raise RuntimeError(_capture_refused("error_if_nonfinite waits for the norm. Pass skip_if_nonfinite=True instead."))
        if not all(map(self._device_values.knows, map(self._read, groups))):
            raise RuntimeError(_capture_refused("a hyperparameter is a tensor that no step has seen yet. " + _FIRST_STEP))
        for i, group in enumerate(groups):
            if not is_on_device(group["lr"]):
                warnings.warn(
                    f"fused_l2: a step is being captured into a CUDA graph with the lr of param group {i} as a number: every "
                    f"replay will use {float(group['lr'])}. To follow a schedule, make it a tensor on the device, "
                    f"lr=torch.tensor({float(group['lr'])}, device='cuda').",
                    stacklevel=2,
                )
                break

    def _keep_captured(self, optimizer: FusedOptimizer) -> None:
        """A graph that is captured now will read this plan's memory whenever it is replayed."""
        if self._cuda_parts and cuda.is_capturing() and self not in optimizer._captured:
            optimizer._captured.append(self)

    def _make_entries(self, optimizer: FusedOptimizer) -> list[Entry]:
        entries: list[Entry] = []
        known: dict[int, Entry] = {}
        low_precision = optimizer._low_precision
        for index, group in enumerate(optimizer.param_groups):
            start = low_precision.first + self._ends[index] - len(group["params"])
            flags = self._flags[index]
            for position, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                state = optimizer.state.get(param, {})
                names, counts = optimizer._state_names(flags), self._rule is Rule.ADAM
                capturable = bool(group.get("capturable", False))
                on_device = capturable or (self._on_device and engines.device_of(param).type == "cuda")
                number = start + position
                entry = make_entry(
                    group, index, position, flags, state, names, counts, on_device, low_precision, number, optimizer._gradients
                )
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
            (e.param, e.state, [(key, e.get(key)) for key in (*e.state_names, *_KEYS) if e.get(key) is not None])
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
        self._refuse_capture(optimizer)
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

        grads: list[Any] = [p.grad for p in params] if self._shards is None else gradients_of(params)
        if not self._all_active:
            if any(map(is_not, compress(grads, map(not_, self._active)), repeat(None))):
                return False
            grads = list(compress(grads, self._active))
        if self._shards is not None:
            localized = self._shards.localized(grads)
            if localized is None:
                return False
            grads = localized
        for e in self._others:
            if e.param.grad is None:
                return False
            check_grad(e.param, e.name, e.gradients)
        if len(self._parts) == 1 and not self._others:
            return self._parts[0][0].refresh(grads)
        return all(part.refresh(list(compress(grads, belongs))) for part, belongs in self._parts)

    def _adopt(self, optimizer: FusedOptimizer, changed: list[tuple[int, tuple[Any, ...]]]) -> bool:
        """Take over hyperparameters that changed. False if they change the shape of the computation."""
        checked = []
        for i, values in changed:
            read = self._device_values.read(values, again=self._host_needs_values) if self._has_sources else values
            where = sources(values, f" of param group {i}")
            if (any(where) and not self._has_sources) or optimizer._flags(read) | self._around != self._flags[i]:
                return False
            checked.append((i, values, optimizer._checked_numbers(read, i), where))
        for i, values, numbers, where in checked:
            self._hyperparameters[i] = values
            self._dynamic[i] = _may_change_in_place(values)
            self._coefficients_due |= numbers != self._numbers[i] or where != self._sources[i]
            self._numbers[i], self._sources[i] = numbers, where
        return True

    def _finds_its_state(self) -> bool:
        return all(
            not known or (self._state.get(param) is state and all(state.get(key) is value for key, value in known))
            for param, state, known in self._known_state
        )

    def prepare(self) -> None:
        """Compute what the coming step multiplies with."""
        if self._coefficients_due:
            for part, _ in self._parts:
                part.set_numbers(self._numbers, self._sources)
                for bucket in part.buckets:
                    bucket.set_coefficients(self._row_of, self._numbers)
            self._coefficients_due = False

    @torch.no_grad()
    def decide(self, prologue: Prologue) -> Tensor | Control:
        """What precedes the step: the factor of all gradients, whether the step is skipped, and the norm."""
        if len(self._parts) == 1 and not self._others and not self._parts[0][0].ranks:
            return self._parts[0][0].control(prologue, self.norm_dtype)
        measured = []
        for ranks in self._ranks if prologue.clipping is not None else ():
            here = [part.measure(prologue.largest) for part, _ in self._parts if part.ranks == ranks]
            here += [_measured(e.grad, prologue.largest) for e in self._others if e.ranks == ranks]
            measured += [sum_over(total(here, prologue.largest), ranks, prologue.largest)] if ranks else here
        nothing = torch.zeros((), dtype=torch.float64, device=self._entries[0].local.device if self._entries else "cpu")
        return combined(measured or [nothing], prologue, self.norm_dtype)

    def read(self, control: Tensor | Control) -> Control:
        """The control as numbers. Waits for the device."""
        if isinstance(control, Control):
            return control
        return self._cuda_parts[0].read(control) if self._cuda_parts else Control(*control.tolist())

    def use(self, control: Tensor | Control) -> None:
        """Make the coming step as this says."""
        for part, _ in self._parts:
            part.use(control)
        self._others_factor = control[FACTOR]

    def measure_skipped(self) -> None:
        """Make the statistics of a step that is left out."""
        for part, _ in self._parts:
            part.measure_skipped()
        self._others_rows = [row_of(e.grad, e.weights(), e.weights()) for e in self._others]

    def recorded(self, weight_decays: list[float | Tensor], inv_scale: float | Tensor) -> Recorded:
        """What the last step left of its tensors."""
        records = [part.record for part, _ in self._parts if part.record is not None]
        recorded = Recorded(records, self._others_rows, *self._measured_entries, weight_decays, inv_scale)
        if not any(self._ranks):
            return recorded
        # Now, because somebody may ask for them in one process only.
        rows = recorded.rows()
        for ranks in filter(None, self._ranks):
            at = [i for i, r in enumerate(self._measured_ranks) if r == ranks]
            rows[at] = sum_over(rows[at], ranks)
        return recorded._replace(records=[], others=rows.unbind())

    def lost_decay(self) -> str | None:
        """A warning, if rounding will leave nothing of the weight decay of some parameter."""
        for e in self._entries:
            if e.mode is not Mode.ROUND or e.local.dtype not in HALVES:
                continue
            flags = self._flags[e.group]
            if self._rule is Rule.ADAM and not flags & Flag.DECOUPLED:
                continue  # it passes through the moments, and is as large as the update
            row = self._row_of(self._numbers[e.group], flags, 1.0)
            lr = self._numbers[e.group][0]
            share = 1 - row[1] if flags & Flag.DECOUPLED else lr * row[0]
            if message := lost_decay(e.local, share, f" (lr {lr:g}, param group {e.group})"):
                return message
        return None

    def launch(self, optimizer: FusedOptimizer) -> None:
        """Step every tensor of the plan."""
        befores = [e.weights().clone() for e in self._others] if self._around & Flag.STATISTICS else []
        for part, _ in self._parts:
            part.launch()
        # SGD's depend on the step count for random bits only, and what the device computes the host need not.
        self._coefficients_due |= self._counts and (self._host_steps or not self._on_device)
        self._keep_captured(optimizer)
        if self._others:
            self._launch_others(optimizer)
        self._others_rows = [row_of(e.grad, b, e.weights()) for e, b in zip(self._others, befores, strict=False)]

    @torch.no_grad()
    def _launch_others(self, optimizer: FusedOptimizer) -> None:
        # In their order, and neighbours that share a param group in one call.
        for (group, first_step, mode), found in groupby(self._others, key=lambda e: (e.group, e.first_step, e.mode)):
            entries = list(found)
            torch_ops.step(
                self._rule,
                self._flags[group] | mode,
                self._numbers[group],
                entries[0].counter is not None and entries[0].counter.device.type != "cpu",
                [e.local for e in entries],
                [e.grad for e in entries],
                list(zip(*(e.states for e in entries), strict=True)),
                [e.counter for e in entries if e.counter is not None],
                first_step,
                self._others_factor,
                [e.kept for e in entries],
                [e.key for e in entries],
            )
            for e in entries:
                e.first_step = False
        increment_version([e.param for e in self._others if e.local is not e.param])


_KEYS = ("step", *STATE_NAMES)
_FIRST_STEP = "Make one step() before, with the same parameters having gradients."


def _capture_refused(reason: str) -> str:
    return f"fused_l2: this step() cannot be captured into a CUDA graph: {reason}"


def _has_cuda_gradients(groups: Sequence[dict[str, Any]]) -> bool:
    return any(p.grad is not None and engines.device_of(p).type == "cuda" for g in groups for p in g["params"])


def _measured(grad: Tensor, largest: bool) -> Tensor:
    wide = grad.detach().double()
    if largest:
        return wide.abs().max() if wide.numel() else wide.sum()
    return wide.square().sum()


def _has_engine(entry: Entry, rule: Rule) -> bool:
    grad = entry.grad
    if not engines.has_plain_type(grad) or grad._is_zerotensor():
        return False
    states = [*entry.states, *([] if entry.kept is None else [entry.kept])]
    if len({t.dtype for t in entry.states}) > 1 or not all(map(engines.is_plain, states)):
        return False
    return engines.has_engine(entry.local, rule, entry.flags, grad.dtype, entry.state_dtype)


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
