"""A CUDA device made of CPU tensors, for everything of the engine but the hardware.

    device = FakeDevice(emulated(90))
    with device.in_place(monkeypatch): ...        # CPU tensors are stepped as if they were on it

Work is queued on streams, as on a GPU, and done when :meth:`FakeDevice.synchronize` is called: whatever the host overwrites too
early is seen overwritten. Kernels run in the PTX emulator, in Triton's interpreter, or not at all.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fused_l2.kernels.coefficients import fused_l2_coefficients
from fused_l2.kernels.control import fused_l2_control
from fused_l2.kernels.launch import DTYPES, THREADS, WORDS, specialization
from fused_l2.kernels.norms import fused_l2_measure_grads
from fused_l2.kernels.write import fused_l2_write
from torch import Tensor

from fused_l2 import engines
from fused_l2.engines import cuda
from fused_l2.step import plan
from fused_l2.tables.tensor_table import Rule

from . import aot
from .interpreter import interpreted, repaired
from .ptx_emulator import Emulator

# Rule, flags, dtypes of param, grad and state: what names a kernel.
Signature = tuple[Rule, int, torch.dtype, torch.dtype, torch.dtype]
# Runs a kernel: which one (a Signature, or the kind and options of a kernel for norms), the tensors it may access, how many
# programs, its arguments.
Run = Callable[[Any, Sequence[Tensor], int, Sequence[int]], None]


_COMPILE = {
    "measure": aot.compile_measure,
    "control": aot.compile_control,
    "coefficients": aot.compile_coefficients,
    "write": aot.compile_write,
}


def emulated(arch: int) -> Run:
    """Runs what is compiled for this architecture in the PTX emulator."""

    def run(which: Any, tensors: Sequence[Tensor], programs: int, arguments: Sequence[int]) -> None:
        compile_it = _COMPILE.get(which[0])
        compiled = compile_it(arch, *which[1:]) if compile_it else aot.compile_for(arch, *which)
        emulator = Emulator(compiled.asm["ptx"], compiled.metadata.shared)
        for i, tensor in enumerate(tensors):
            emulator.register(tensor, f"tensor {i} of shape {tuple(tensor.shape)}, {tensor.dtype}")
        emulator.run(programs, arguments)

    return run


def interpreted_kernel(which: Any, tensors: Sequence[Tensor], programs: int, arguments: Sequence[int]) -> None:
    """Runs the source in Triton's interpreter, which takes tensors for pointers and checks nothing."""

    def at(address: int, dtype: torch.dtype) -> Tensor:
        if address == 0:  # not looked at
            return torch.zeros(1, dtype=dtype)
        return torch.frombuffer((ctypes.c_uint8 * 8).from_address(address), dtype=dtype)

    int64, float64 = torch.int64, torch.float64
    kinds: list[Any]
    if which[0] == "measure":
        function, constants = fused_l2_measure_grads, {"LARGEST": which[2], "DTYPE": DTYPES[which[1]]}
        kinds = [int64, int64, int64, float64, None, None]
    elif which[0] == "control":
        function, constants = fused_l2_control, {"LARGEST": which[1], "OPMATH": DTYPES[which[2]]}
        kinds = [float64, float64, None, None, None, None, None]
        arguments = [*arguments[:-1], struct.unpack("<d", struct.pack("<q", arguments[-1]))[0]]
    elif which[0] == "coefficients":
        function, constants = fused_l2_coefficients, {"RULE": int(which[1]), "BUCKET_FLAGS": which[2], "BLOCK": THREADS}
        kinds = [int64, int64, float64, int64, which[3], float64, None]
    elif which[0] == "write":
        function, constants, kinds = fused_l2_write, {}, [int64, None, None]
        arguments = [*arguments[:2], tuple(arguments[2:])]
    else:
        function, constants, opmath = specialization(*which)
        kinds = [int64, int64, int64, opmath, None, float64, float64]
    given = [value if kind is None else at(value, kind) for value, kind in zip(arguments, kinds, strict=True)]
    with repaired():
        interpreted(function)[(programs,)](*given, **constants)


def nothing(which: Any, tensors: Sequence[Tensor], programs: int, arguments: Sequence[int]) -> None:
    """Does not run kernels: for tests of what is launched."""


class FakeStream:
    def __init__(self) -> None:
        self.queue: list[Callable[[], Any]] = []

    def synchronize(self) -> None:
        while self.queue:
            self.queue.pop(0)()


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device, self._happened = device, True

    def record(self) -> None:
        self._happened = False
        self._device.enqueue(self._happen)

    def _happen(self) -> None:
        self._happened = True

    def query(self) -> bool:
        return self._happened


class FakeKernel:
    """Stands for the kernels of ``fused_l2.kernels.launch``."""

    def __init__(self, device: FakeDevice, *which: Any) -> None:
        self._device, self._which = device, which
        self.opmath = None if isinstance(which[0], str) else specialization(*which).opmath

    def launcher(self, *known: int) -> Callable[..., None]:
        kind = self._which[0]

        def step(stream: int, grads: int, coefficients: int, control: int) -> None:
            programs, chunk_map, table, chunk, partials = known
            self._launch(programs, stream, (chunk_map, table, grads, coefficients, chunk, control, partials), 4)

        def measure(stream: int, grads: int) -> None:
            programs, chunk_map, table, partials, chunk, first = known
            self._launch(programs, stream, (chunk_map, table, grads, partials, chunk, first), 4)

        def control(stream: int, out: int, scale: int, found_inf: int, count: int, skips: bool, max_norm: float) -> None:
            bits = struct.unpack("<q", struct.pack("<d", max_norm))[0]
            self._launch(1, stream, (*known, out, scale, found_inf, count, int(skips), bits), 2)

        def coefficients(stream: int, numbers: int, sources: int, control: int) -> None:
            groups, counters, out, count = known
            programs = -(-count // THREADS)
            self._launch(programs, stream, (groups, counters, numbers, sources, out, control, count), 5)

        return {"measure": measure, "control": control, "coefficients": coefficients}.get(kind, step)

    def write(self, stream: int, target: int, words: Sequence[int]) -> None:
        for begin in range(0, len(words), WORDS):
            part = tuple(words[begin : begin + WORDS])
            arguments = (target + 8 * begin, len(part), *part, *(0,) * (WORDS - len(part)))
            self._launch(1, stream, arguments, 1)

    def _launch(self, programs: int, stream: int, arguments: tuple[int, ...], aligned: int) -> None:
        device = self._device
        assert programs > 0
        assert all(value % 16 == 0 for value in arguments[:aligned]), "the compiler is told so"
        assert device.is_current, "launched while another device was the current one"
        assert stream == device.stream()
        if not isinstance(self._which[0], str):
            device.launches.append(programs)
        tensors = [*device.memories, *device.accessible(), *device.new_states]
        device.enqueue(lambda: device.run(self._which, tensors, programs, arguments))


class FakeDevice(cuda.Device):
    """Stands for ``fused_l2.engines.cuda.Device``. Keeps a log: ``launches``, ``uploads`` and ``compiled``."""

    def __init__(self, run: Run, index: int = 0) -> None:
        self.run = run
        self.device = torch.device("cuda", index)
        self.multiprocessors = 1  # more chunks of small tensors
        self.streams = [FakeStream()]
        self.on = 0
        self.active = True  # while it is in place
        self.eager = False  # work is done at once
        self.is_current, self.capturing = True, False
        self.graph: list[Callable[[], Any]] = []  # what was captured last
        self.launches: list[int] = []
        self.uploads: list[int] = []
        self.compiled: list[Signature] = []
        self.pinned_buffers = 0
        self.waits = 0  # how often the host waited for the device
        self.told: list[int] = []  # streams the allocator was told of
        self.memories: list[Tensor] = []
        self.new_states: list[Tensor] = []
        self.accessible: Callable[[], Sequence[Tensor]] = lambda: ()

    @contextmanager
    def in_place(self, monkeypatch: pytest.MonkeyPatch, where: Callable[[Tensor], bool] = lambda t: True) -> Iterator[None]:
        """CPU tensors for which ``where`` holds are stepped as if they were on this device."""
        real = engines.device_of
        with monkeypatch.context() as patch:
            patch.setattr(engines, "device_of", lambda t: self.device if self.active and where(t) else real(t))
            others = cuda.device
            patch.setattr(cuda, "device", lambda of: self if of == self.device else others(of))
            patch.setattr(cuda, "is_capturing", lambda: self.capturing)
            patch.setattr(cuda, "_kernels", {})
            make_part = plan.make_part

            def watched(device: torch.device, rule: Rule, entries: list[Any], on_device: bool) -> Any:
                # A skipped first step is measured, with states that nobody else ever sees.
                self.new_states = [t for e in entries for t in e.new_state.values()]
                return make_part(device, rule, entries, on_device)

            patch.setattr(plan, "make_part", watched)
            yield

    @contextmanager
    def capture(self) -> Iterator[None]:
        """What is launched within is recorded, not done; :meth:`replay` does it."""
        self.capturing, self.graph = True, []
        yield
        self.capturing = False

    def replay(self) -> None:
        for work in self.graph:
            self.enqueue(work)

    def enqueue(self, work: Callable[[], Any]) -> None:
        if self.capturing:
            self.graph.append(work)
            return
        self.streams[self.on].queue.append(work)
        if self.eager:
            self.synchronize()

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.synchronize()

    # What the engine asks for.

    def kernel(self, rule: Rule, flags: int, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> Any:
        self.compiled.append((rule, flags, param, grad, state))
        return self._kernel(rule, flags, param, grad, state)

    def measure_kernel(self, dtype: torch.dtype, largest: bool) -> Any:
        return self._kernel("measure", dtype, largest)

    def control_kernel(self, largest: bool, opmath: torch.dtype) -> Any:
        return self._kernel("control", largest, opmath)

    def coefficients_kernel(self, rule: Rule, flags: int, opmath: torch.dtype) -> Any:
        return self._kernel("coefficients", rule, flags, opmath)

    def write_kernel(self) -> Any:
        return self._kernel("write")

    def _kernel(self, *which: Any) -> FakeKernel:
        assert not self.capturing, "compiling and loading is not allowed while a stream is captured"
        return FakeKernel(self, *which)

    def is_capturing(self) -> bool:
        return self.capturing

    @contextmanager
    def current(self) -> Iterator[None]:
        before, self.is_current = self.is_current, True
        yield
        self.is_current = before

    def stream(self) -> int:
        return self.on

    def memory(self, words: int, dtype: torch.dtype = torch.int64) -> Tensor:
        self.memories.append(torch.full((words,), -1, dtype=dtype))
        return self.memories[-1]

    def used_by_current_stream(self, memory: Tensor) -> None:
        self.told.append(self.on)

    def read(self, tensor: Tensor) -> list[float]:
        assert not self.capturing
        self.waits += 1
        self.synchronize()
        return [1.0, 0.0, 0.0, 1.0] if self.run is nothing else tensor.tolist()

    def scalar(self, value: Tensor) -> Tensor:
        self.memories.append(value.detach().reshape(()).float())
        return self.memories[-1]

    def pinned(self, words: int) -> Tensor:
        assert not self.capturing, "the copy would read this memory at every replay (T36)"
        self.pinned_buffers += 1
        return torch.full((words,), -1, dtype=torch.int64)

    def upload(self, target: Tensor, pinned: Tensor) -> None:
        self.uploads.append(target.numel())
        self.enqueue(functools.partial(target.copy_, pinned))

    def event(self) -> Any:
        return FakeEvent(self)


def tensors_of(optimizer: Any) -> list[Tensor]:
    """Every tensor a step of this optimizer may access."""
    found: list[Tensor] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            found += [p.detach(), *([] if p.grad is None else [p.grad])]
            found += [t for t in state.values() if isinstance(t, Tensor)]
        found += [v for v in group.values() if isinstance(v, Tensor)]
        found += [v for v in group.get("betas", ()) if isinstance(v, Tensor)]
    for part, _ in optimizer._plan._parts if optimizer._plan else ():
        found += part._copies
        control = getattr(part, "_control", None)
        found += [] if control is None else [control]
    return found
