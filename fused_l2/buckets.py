"""Buckets: the tensors of a step that share an update rule with its flags and a dtype signature; and parts: the buckets of one
device, which are refreshed and launched together.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import coefficients
from .clipping import Clipping, Control, on_host
from .engines import cpu, cuda
from .entries import Entry, needs_copy
from .tensor_table import COEFFICIENTS, GRAD, NUMEL, STEP, WIDTH, RowFlag, Rule, TensorTable, address_of, norm_chunk
from .watch import Watch, gradient_guard, make_watch

_data_ptr = Tensor.data_ptr


class Bucket:
    """Entries that one kernel steps, and their coefficient rows, one per (param group, step count)."""

    def __init__(self, rule: Rule, entries: list[Entry], factor: array[float]) -> None:
        self.flags = entries[0].flags
        self.dtypes = entries[0].param.dtype, entries[0].state_dtype
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
        self.row = self.table.bucket_row(rule, self.flags, *self.dtypes, factor)

    def set_coefficients(self, row_of: Callable[..., tuple[float, ...]], numbers: Sequence[tuple[float, ...]]) -> None:
        """Compute the coefficient rows of the coming step."""
        scalars, steps = self.table.scalars, self.table.steps
        for i, group in enumerate(self._groups):
            row = row_of(numbers[group], self.flags, steps[i] + 1)
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


class Part:
    """The entries of a plan that one device steps, with an engine of ours."""

    def __init__(self, rule: Rule, entries: list[Entry]) -> None:
        self._library = cpu.library()
        by_signature: dict[tuple[Any, ...], list[int]] = {}
        for i, e in enumerate(entries):
            by_signature.setdefault((e.flags, e.param.dtype, e.state_dtype), []).append(i)
        self._factor = array("d", [1.0])  # what gradients are multiplied by where a bucket is SCALED
        self.buckets = [Bucket(rule, [entries[i] for i in at], self._factor) for at in by_signature.values()]
        # Which gradients belong to which bucket, in the order of its rows; not needed where there is one bucket.
        self._positions = list(by_signature.values()) if len(self.buckets) > 1 else []
        self._bucket_rows = array("q", [value for b in self.buckets for value in b.row])
        self._address, self._count = address_of(self._bucket_rows), len(self.buckets)

        self._params = [e.param for e in entries]
        grads = [e.grad for e in entries]
        self._copied = [i for i, (p, g) in enumerate(zip(self._params, grads, strict=True)) if needs_copy(p, g)]
        self._guard = gradient_guard(grads)
        tensors = [t for e in entries for t in (e.param, *e.states)]
        self._counters = [e.counter for e in entries if e.counter is not None]
        self._watch: Watch = make_watch(self._library, tensors, self._counters)
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
        return self._watch.holds() and self._rows_hold()

    def _rows_hold(self) -> bool:
        """Whether all tensors have memory, and step counters stand where the coefficients were computed for."""
        if self._library is not None:
            return bool(self._library.check(self._address, self._count) == 0)
        counters = iter(self._counters)
        for bucket in self.buckets:
            rows, steps = bucket.table.rows, bucket.table.steps
            for row in range(0, len(rows), WIDTH):
                if rows[row + NUMEL] and not rows[row + GRAD]:
                    return False
                if rows[row + STEP] and float(next(counters)) != steps[rows[row + COEFFICIENTS]]:
                    return False
        return True

    def measure(self, clipping: Clipping) -> Tensor:
        """The sum of squares of all gradients, or the largest absolute value: 0-dim, float64, on the part's device."""
        raise NotImplementedError

    def clip(self, clipping: Clipping, dtype: torch.dtype) -> Control:
        """Factor and norm where there is no other part. ``dtype``: the norm's, which both are rounded to."""
        raise NotImplementedError

    def scale_by(self, control: Control) -> None:
        """Multiply gradients by the first element of ``control`` in the coming step."""
        raise NotImplementedError

    def launch(self) -> None:
        """Step all entries, on the gradients of the last :meth:`refresh`."""
        self._step()
        for bucket in self.buckets:
            bucket.stepped()
        increment_version(self._params)  # autograd then sees the write, as after torch's own step
        self._grads, self._copies = (), []

    def _step(self) -> None:
        raise NotImplementedError


class CpuPart(Part):
    """Stepped by the C++ library, all buckets in one call."""

    def __init__(self, rule: Rule, entries: list[Entry]) -> None:
        super().__init__(rule, entries)
        self._chunk = norm_chunk(sum(e.param.numel() for e in entries))

    def _measured(self, clipping: Clipping) -> float:
        assert self._library is not None
        return float(self._library.measure_grads(self._address, self._count, self._chunk, clipping.largest))

    def measure(self, clipping: Clipping) -> Tensor:
        return torch.tensor(self._measured(clipping), dtype=torch.float64, device="cpu")

    def clip(self, clipping: Clipping, dtype: torch.dtype) -> Control:
        return on_host(self._measured(clipping), clipping, dtype)

    def scale_by(self, control: Control) -> None:
        self._factor[0] = float(control[0])

    def _step(self) -> None:
        assert self._library is not None  # else plain PyTorch steps CPU tensors
        self._library.step(self._address, self._count)


class CudaPart(Part):
    """Stepped by Triton kernels, one launch per bucket."""

    def __init__(self, rule: Rule, entries: list[Entry], device: torch.device) -> None:
        super().__init__(rule, entries)
        self._device = cuda.device(device)
        self._tables = []
        for bucket in self.buckets:
            kernel, reason = cuda.find_kernel(device, rule, bucket.flags, *bucket.dtypes)
            assert kernel is not None, reason  # else plain PyTorch steps these tensors
            self._tables.append(cuda.DeviceTable(self._device, kernel, bucket.table))
        self._clippers: dict[bool, cuda.Clipper] = {}
        self._control: Tensor | None = None

    def _clipper(self, clipping: Clipping) -> cuda.Clipper:
        if clipping.largest not in self._clippers:
            hosts, dtypes = [b.table for b in self.buckets], [b.dtypes[0] for b in self.buckets]
            self._clippers[clipping.largest] = cuda.Clipper(self._device, self._tables, hosts, dtypes, clipping.largest)
        return self._clippers[clipping.largest]

    def _upload(self) -> int:
        stream = self._device.stream()
        for table in self._tables:
            table.upload(stream)
        return stream

    def measure(self, clipping: Clipping) -> Tensor:
        clipper = self._clipper(clipping)
        with self._device.current():
            return clipper.measure(self._upload())

    def clip(self, clipping: Clipping, dtype: torch.dtype) -> Control:
        clipper = self._clipper(clipping)
        with self._device.current():
            return clipper.clip(self._upload(), clipping.max_norm, dtype)

    def scale_by(self, control: Control) -> None:
        if not isinstance(control, Tensor):
            control = torch.tensor(control, dtype=torch.float64, device="cpu")
        self._control = control.to(self._params[0].device, non_blocking=True)

    def _step(self) -> None:
        control = 0 if self._control is None else self._control.data_ptr()
        with self._device.current():
            stream = self._upload()
            for table in self._tables:
                table.step(stream, control)
        self._control = None
        if self._library is not None:
            self._library.count(self._address, self._count)
        elif self._counters:
            torch._foreach_add_(self._counters, 1.0)


def make_part(device: torch.device, rule: Rule, entries: list[Entry]) -> Part:
    """The part of a plan on this device."""
    return CpuPart(rule, entries) if device.type == "cpu" else CudaPart(rule, entries, device)
