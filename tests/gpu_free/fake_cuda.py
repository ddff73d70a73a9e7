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
from torch import Tensor

from fused_l2 import engines
from fused_l2.engines import cuda
from fused_l2.engines.cuda_part import CudaPart
from fused_l2.kernels.launch import SOURCES, is_multiple_of_16

from . import aot
from .interpreter import interpreted, repaired
from .ptx_emulator import Emulator

# What names a kernel: its kind, and the arguments of the function of that name in fused_l2.kernels.launch.
Which = tuple[Any, ...]
# Runs a kernel: which one, the tensors it may access, how many programs, its arguments as integers.
Run = Callable[[Which, Sequence[Tensor], int, Sequence[int]], None]


def emulated(arch: int) -> Run:
    """Runs what is compiled for this architecture in the PTX emulator."""

    def run(which: Which, tensors: Sequence[Tensor], programs: int, arguments: Sequence[int]) -> None:
        compiled = aot.compile_kernel(arch, *which)
        emulator = Emulator(compiled.asm["ptx"], compiled.metadata.shared)
        for i, tensor in enumerate(tensors):
            emulator.register(tensor, f"tensor {i} of shape {tuple(tensor.shape)}, {tensor.dtype}")
        emulator.run(programs, arguments)

    return run


def interpreted_kernel(which: Which, tensors: Sequence[Tensor], programs: int, arguments: Sequence[int]) -> None:
    """Runs the source in Triton's interpreter, which takes tensors for pointers and checks nothing."""
    source = SOURCES[which[0]](*which[1:])
    left = iter(arguments)

    def given(kind: Any) -> Any:
        if isinstance(kind, tuple):
            return tuple(map(given, kind))
        value = next(left)
        if isinstance(kind, float):
            return struct.unpack("<d", struct.pack("<q", value))[0]
        if not isinstance(kind, torch.dtype):
            return value
        if value == 0:  # not looked at
            return torch.zeros(1, dtype=kind)
        return torch.frombuffer((ctypes.c_uint8 * 8).from_address(value), dtype=kind)

    values = given(source.arguments)
    assert next(left, None) is None
    with repaired():
        interpreted(source.function)[(programs,)](*values, **source.constants)


def nothing(which: Which, tensors: Sequence[Tensor], programs: int, arguments: Sequence[int]) -> None:
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
    """Stands for ``fused_l2.kernels.launch.Kernel``."""

    def __init__(self, device: FakeDevice, *which: Any) -> None:
        self._device, self._which = device, which
        self._source = SOURCES[which[0]](*which[1:])
        self.opmath, self.chunk = self._source.opmath, self._source.chunk

    def launcher(self, programs: int, *fixed: int) -> Callable[..., None]:
        assert programs > 0
        device, which, kinds = self._device, self._which, self._source.arguments

        def launch(stream: int, *given: Any) -> None:
            arguments: list[int] = []
            for kind, value in zip(kinds, (*fixed, *given), strict=True):
                assert not is_multiple_of_16(kind) or value % 16 == 0, "the compiler is told so"
                arguments += _integers(kind, value)
            assert device.is_current, "launched while another device was the current one"
            assert stream == device.stream()
            if which[0] == "step":
                device.launches.append(programs)
            tensors = [*device.memories, *device.accessible(), *device.new_states, *device.copies()]
            device.enqueue(lambda: device.run(which, tensors, programs, arguments))

        return launch


def _integers(kind: Any, value: Any) -> Sequence[int]:
    """An argument as the emulator takes it: tuples one by one, floats by their bits."""
    if isinstance(kind, tuple):
        assert len(value) == len(kind)
        return list(value)
    assert isinstance(value, float if isinstance(kind, float) else int)
    return [struct.unpack("<q", struct.pack("<d", value))[0] if isinstance(kind, float) else value]


class FakeDevice(cuda.Device):
    """Stands for ``fused_l2.engines.cuda.Device``. Keeps a log: ``uploads``; of steps, ``launches`` and ``compiled``."""

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
        self.compiled: list[Which] = []
        self.pinned_buffers = 0
        self.waits = 0  # how often the host waited for the device
        self.told: list[int] = []  # streams the allocator was told of
        self.told_of: set[tuple[int, int]] = set()  # with the addresses of what they use
        self.memories: list[Tensor] = []
        self.new_states: list[Tensor] = []
        self.parts: list[CudaPart] = []
        self.accessible: Callable[[], Sequence[Tensor]] = lambda: ()

    @contextmanager
    def in_place(self, monkeypatch: pytest.MonkeyPatch, where: Callable[[Tensor], bool] = lambda t: True) -> Iterator[None]:
        """CPU tensors for which ``where`` holds are stepped as if they were on this device."""
        real, is_on_cpu = engines.device_of, engines.is_on_cpu
        with monkeypatch.context() as patch:
            patch.setattr(engines, "device_of", lambda t: self.device if self.active and where(t) else real(t))
            patch.setattr(engines, "is_on_cpu", lambda t: is_on_cpu(t) and not (self.active and where(t)))
            others = cuda.device
            patch.setattr(cuda, "device", lambda of: self if of == self.device else others(of))
            patch.setattr(cuda, "is_capturing", lambda: self.capturing)
            patch.setattr(cuda, "_kernels", {})
            settled = CudaPart._resettled

            def watched(part: CudaPart) -> None:
                # A skipped first step is measured, with states that nobody else ever sees.
                self.new_states = [t for b in part.buckets for e in b.entries for t in e.new.values()]
                if part not in self.parts:
                    self.parts.append(part)
                settled(part)

            patch.setattr(CudaPart, "_resettled", watched)
            yield

    def copies(self) -> list[Tensor]:
        """What parts made of gradients and of controls from elsewhere."""
        controls = [part._control for part in self.parts if part._control is not None]
        return [*controls, *(copy for part in self.parts for copy in part._copies)]

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

    def compile(self, kind: str, *signature: Any) -> Any:
        assert not self.capturing, "compiling and loading is not allowed while a stream is captured"
        if kind == "step":
            self.compiled.append(signature)
        return self.kernel(kind, *signature)

    def kernel(self, kind: str, *signature: Any) -> Any:
        return FakeKernel(self, kind, *signature)

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
        self.told_of.add((self.on, memory.data_ptr()))

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


def step_side_by_side(
    run: Run,
    monkeypatch: Any,
    ours: tuple[Any, list[Any]],
    on_cpu: tuple[Any, list[Any]],
    give: Callable[[list[Any], int], None],
    steps: int = 3,
) -> FakeDevice:
    """Step an optimizer on a fake device and its twin on the CPU; ``give(params, step)`` sets the gradients of both."""
    optimizer, params = ours
    device = FakeDevice(run)
    device.accessible = lambda: tensors_of(optimizer)
    for step in range(steps):
        give(params, step)
        give(on_cpu[1], step)
        with device.in_place(monkeypatch):
            optimizer.step()
        device.synchronize()
        on_cpu[0].step()
    assert device.launches
    return device


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
    return found
