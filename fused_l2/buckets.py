"""The plan of a step: which tensors step together, where they are, and what makes the plan out of date.

A *bucket* holds the tensors that share an update rule with its flags and a dtype signature. Building a plan checks every
tensor and changes nothing until all have passed. Afterwards a step only re-reads what may have changed: the gradients (new
tensors each step), the hyperparameters, and whether everything else is still what and where it was.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate, compress, groupby, repeat
from operator import is_, is_not, not_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import coefficients, engines
from .engines import cpu, torch_ops
from .entries import Entry, check_grad, make_entry, needs_copy
from .state import OptimizerState, ParamState
from .tensor_table import RowFlag, Rule, TensorTable, address_of
from .watch import Watch, gradient_guard, make_watch

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

_data_ptr = Tensor.data_ptr


class CpuBucket:
    """Entries that one kernel of the C++ library steps, and their coefficient rows, one per (param group, step count)."""

    def __init__(self, rule: Rule, entries: list[Entry]) -> None:
        self._flags = entries[0].flags
        self.has_first_steps = any(e.first_step for e in entries)
        numbers: dict[tuple[int, float], int] = {}
        rows = []
        for e in entries:
            counter = e.counter
            key = (e.group, 0.0 if counter is None else float(counter))
            states = [t.data_ptr() for t in e.states]
            rows.append(
                (
                    e.param.data_ptr(),
                    0,  # the gradient: set each step
                    *states,
                    *[0] * (3 - len(states)),
                    0 if counter is None else counter.data_ptr(),
                    e.param.numel(),
                    numbers.setdefault(key, len(numbers)),
                    int(RowFlag.FIRST_STEP) if e.first_step else 0,
                )
            )
        self._groups = [group for group, _ in numbers]
        self.table = TensorTable(rows, len(numbers))
        self.table.steps[:] = array("d", [step for _, step in numbers])
        self.row = self.table.bucket_row(rule, self._flags, entries[0].param.dtype, entries[0].state_dtype)

    def set_coefficients(self, row_of: Callable[..., tuple[float, ...]], numbers: Sequence[tuple[float, ...]]) -> None:
        """Compute the coefficient rows of the coming step."""
        scalars, steps = self.table.scalars, self.table.steps
        for i, group in enumerate(self._groups):
            row = row_of(numbers[group], self._flags, steps[i] + 1)
            start = coefficients.WIDTH * i
            scalars[start : start + len(row)] = array("d", row)

    def stepped(self) -> None:
        """A step was made: what the next one expects to find."""
        steps = self.table.steps
        for i in range(len(steps)):
            steps[i] += 1
        if self.has_first_steps:
            self.table.clear_first_steps()
            self.has_first_steps = False


class CpuPart:
    """The entries of a plan that the C++ library steps, in one call."""

    def __init__(self, library: cpu.Library, rule: Rule, entries: list[Entry]) -> None:
        self._library = library
        by_signature: dict[tuple[Any, ...], list[int]] = {}
        for i, e in enumerate(entries):
            by_signature.setdefault((e.flags, e.param.dtype, e.state_dtype), []).append(i)
        self.buckets = [CpuBucket(rule, [entries[i] for i in at]) for at in by_signature.values()]
        # Which gradients belong to which bucket, in the order of its rows; not needed where there is one bucket.
        self._positions = list(by_signature.values()) if len(self.buckets) > 1 else []
        self._bucket_rows = array("q", [value for b in self.buckets for value in b.row])
        self._address, self._count = address_of(self._bucket_rows), len(self.buckets)

        self._params = [e.param for e in entries]
        grads = [_grad_of(e) for e in entries]
        self._copied = [i for i, (p, g) in enumerate(zip(self._params, grads, strict=True)) if needs_copy(p, g)]
        self._guard = gradient_guard(grads)
        tensors = [t for e in entries for t in (e.param, *e.states)]
        counters = [e.counter for e in entries if e.counter is not None]
        self._watch: Watch = make_watch(library, tensors, counters)
        self._grads: Sequence[Tensor] = ()  # alive until the step is done, whatever other threads do
        self._copies: list[Tensor] = []

    def refresh(self, grads: Sequence[Tensor]) -> bool:
        """Take this step's gradients. False if they or any other tensor are not what the tables were made for."""
        self._grads = grads
        try:
            addresses = array("q", list(map(_data_ptr, grads)))  # from an iterator it would grow step by step
        except (TypeError, RuntimeError):  # None: a gradient that was there is gone. Or one without memory, a sparse one.
            return False
        if not self._guard(grads):
            return False
        if self._copied:
            with torch.no_grad():
                self._copies = [torch.empty_like(self._params[i]).copy_(grads[i]) for i in self._copied]
            for i, copy in zip(self._copied, self._copies, strict=True):
                addresses[i] = copy.data_ptr()
        if not self._positions:
            self.buckets[0].table.set_grads(addresses)
        for bucket, positions in zip(self.buckets, self._positions, strict=False):
            bucket.table.set_grads(array("q", [addresses[i] for i in positions]))
        return self._watch.holds() and self._library.check(self._address, self._count) == 0

    def launch(self) -> None:
        self._library.step(self._address, self._count)
        for bucket in self.buckets:
            bucket.stepped()
        increment_version(self._params)  # autograd then sees the write, as after torch's own step
        self._grads, self._copies = (), []


class Plan:
    """Everything one optimizer's step needs, prepared."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._rule, self._row_of = optimizer._rule, optimizer._coefficient_row
        self._read = optimizer._read_hyperparameters
        groups = optimizer.param_groups
        self._hyperparameters = [self._read(group) for group in groups]
        self._numbers = [optimizer._checked_numbers(v, i) for i, v in enumerate(self._hyperparameters)]
        self._flags = [optimizer._flags(v) for v in self._hyperparameters]
        self._dynamic = [_may_change_in_place(v) for v in self._hyperparameters]
        self._coefficients_due = True

        self._params: list[Tensor] = [p for group in groups for p in group["params"]]
        self._ends = list(accumulate(len(group["params"]) for group in groups))
        self._active = [p.grad is not None for p in self._params]
        self._all_active = all(self._active)
        entries = self._entries = self._make_entries(optimizer)

        library = cpu.library()
        on_cpu = [_takes_cpu_engine(e) for e in entries]
        for i in _overlapping([e.param for e in entries]):
            on_cpu[i] = False  # steps after the tensor whose memory it shares
        self._on_cpu = on_cpu
        self._cpu: CpuPart | None = None
        if library is not None and any(on_cpu):
            self._cpu = CpuPart(library, self._rule, list(compress(entries, on_cpu)))
        self._others = list(compress(entries, map(not_, on_cpu)))
        self._is_committed = False

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
        if self._cpu is None:
            return True
        return self._cpu.refresh(grads if not self._others else list(compress(grads, self._on_cpu)))

    def _adopt(self, optimizer: FusedOptimizer, changed: list[tuple[int, tuple[Any, ...]]]) -> bool:
        """Take over hyperparameters that changed. False if they change the shape of the computation."""
        checked = [(i, values, optimizer._checked_numbers(values, i)) for i, values in changed]
        if any(optimizer._flags(values) != self._flags[i] for i, values, _ in checked):
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

    def launch(self, optimizer: FusedOptimizer) -> None:
        """Step every tensor of the plan."""
        if self._cpu is not None:
            if self._coefficients_due:
                for bucket in self._cpu.buckets:
                    bucket.set_coefficients(self._row_of, self._numbers)
                self._coefficients_due = self._rule is Rule.ADAM  # SGD's do not depend on the step count
            self._cpu.launch()
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
                [_grad_of(e) for e in entries],
                list(zip(*(e.states for e in entries), strict=True)),
                [e.counter for e in entries if e.counter is not None],
                first_step,
            )
            for e in entries:
                e.first_step = False


def _grad_of(entry: Entry) -> Tensor:
    grad = entry.param.grad
    assert grad is not None
    return grad


def _takes_cpu_engine(entry: Entry) -> bool:
    grad = _grad_of(entry)
    if not engines.takes_cpu_engine(entry.param) or not engines.has_plain_type(grad) or grad._is_zerotensor():
        return False
    states = entry.states
    # The kernels know states of the parameter's dtype, and float32 states of 16-bit parameters.
    dtypes = {t.dtype for t in states}
    return len(dtypes) <= 1 and dtypes <= {entry.param.dtype, torch.float32} and all(map(engines.is_plain, states))


def _may_change_in_place(values: tuple[Any, ...]) -> bool:
    """Whether a hyperparameter may change in place, as a tensor, an array or a list of betas may."""
    return any(_may_change_in_place(v) if type(v) is tuple else not isinstance(v, (float, int)) for v in values)


def _overlapping(params: Sequence[Tensor]) -> list[int]:
    """Which parameters share memory with an earlier one: listed twice, or tied through their storage.

    torch.optim steps them one after the other; within one launch they would race. May name one too many, never one too few.
    """
    ranges = []
    for i, p in enumerate(params):
        if p.device.type == "cpu" and engines.has_plain_type(p) and p.numel() > 0:
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
