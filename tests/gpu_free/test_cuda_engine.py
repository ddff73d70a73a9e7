"""The CUDA engine on a device made of CPU tensors: what is launched, uploaded and compiled, and when."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparing import CASES, assert_same_bits, assert_unchanged, each, make, make_params, plan_of, set_grads, snapshot, states
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")
pytest.importorskip("numpy")

import fused_l2
from fused_l2 import engines
from fused_l2.engines import cpu, cuda, device_tables
from fused_l2.engines.cuda_part import CudaPart
from fused_l2.parameters.entry import as_counter
from fused_l2.tables.tensor_table import WIDTH, chunk_map

from .fake_cuda import FakeDevice, FakeStream, emulated, nothing, tensors_of

SIZES = (5, 0, 1030, 64)


@pytest.fixture
def device(monkeypatch) -> Iterator[FakeDevice]:
    """Launches are counted, not run."""
    fake = FakeDevice(nothing)
    with fake.in_place(monkeypatch):
        yield fake


@pytest.fixture
def running(monkeypatch) -> Iterator[FakeDevice]:
    """Launches are emulated, when the device is synchronized."""
    fake = FakeDevice(emulated(90))
    with fake.in_place(monkeypatch):
        yield fake


def step(optimizer: Any, params: Any, seed: int = 0) -> None:
    set_grads(params, seed)
    optimizer.step()


def assert_same(name: str, optimizer: Any, params: list[Any], steps: int, *devices: FakeDevice) -> None:
    """Against the same training on the CPU."""
    for device in devices:
        device.active = False
    expected = make_params([p.numel() for p in params])
    other = make(name, expected)
    for i in range(steps):
        step(other, expected, i)
    names = list(other.state[expected[0]])
    assert_same_bits(params, expected, "parameter")
    assert_same_bits(states(optimizer, params, *names), states(other, expected, *names), "state")


# Launches.


@each
@pytest.mark.parametrize("groups", [1, 28, 465])
def test_T40_one_launch_whatever_the_number_of_groups(name, groups, device):
    params = make_params([7] * groups)
    options = CASES[name]
    optimizer = getattr(fused_l2, name)(
        [{"params": [p], "lr": options["lr"] / (i + 1)} for i, p in enumerate(params)], **options
    )
    for i in range(3):
        step(optimizer, params, i)
    assert device.launches == [groups] * 3  # one launch a step; a program for each tensor
    assert len(device.compiled) == 1


def test_one_launch_per_dtype_signature(device):
    params = [*make_params(SIZES), *make_params(SIZES, torch.bfloat16), *make_params(SIZES, torch.float64)]
    step(make("AdamW", params), params)
    assert len(device.launches) == 3


def test_a_step_of_empty_tensors_launches_nothing(device):
    params = make_params((0, 0))
    optimizer = make("AdamW", params)
    step(optimizer, params)
    assert device.launches == device.uploads == []
    assert float(optimizer.state[params[0]]["step"]) == 1


@each
def test_T37_schedules_compile_nothing(name, device):
    params = make_params(SIZES)
    optimizer = make(name, params)
    step(optimizer, params)
    compiled = len(device.compiled)
    for i in range(20):
        group = optimizer.param_groups[0]
        group["lr"], group["weight_decay"] = 0.1 / (i + 1), 0.01 * i
        if name == "AdamW":
            group["betas"] = (0.9 - 0.01 * i, 0.99)
        step(optimizer, params, i)
    assert len(device.compiled) == compiled == 1
    assert len(device.launches) == 21


def test_T39_kernels_are_found_again_by_what_they_compute(device):
    """Not by the identity of objects: another optimizer, or a new plan, compiles nothing."""
    for _ in range(3):
        params = make_params(SIZES)
        optimizer = make("AdamW", params)
        for i in range(2):
            optimizer.drop_plan()
            step(optimizer, params, i)
        del optimizer, params
        gc.collect()
    assert len(device.compiled) == 1


@each
def test_T41_python_work_does_not_grow_with_the_number_of_tensors(name, device):
    """Counted, not timed: what is done for each tensor is done in C. bench/host.py has the times."""
    calls = {}
    for count in (30, 300):
        params = make_params([3] * count)
        optimizer = make(name, params)
        for i in range(2):
            step(optimizer, params, i)
        set_grads(params, 3)
        device.synchronize()
        seen = 0

        def count_call(frame: Any, event: str, argument: Any) -> None:
            nonlocal seen
            seen += event == "call"

        sys.setprofile(count_call)
        optimizer.step()
        sys.setprofile(None)
        calls[count] = seen
    assert 5 < calls[30] == calls[300] < 100, calls


# Uploads.


def test_only_what_changed_is_uploaded(device):
    params = make_params(SIZES)
    optimizer = fused_l2.SGD(params, lr=0.1, momentum=0.9)
    set_grads(params, 0)
    optimizer.step()
    row, grads, table = 6, len(params), WIDTH * len(params)  # a coefficient row is 9 float32, to a multiple of 16 bytes
    assert device.uploads[-1] == row + grads + table
    optimizer.step()  # the buffers hold something now: flags change
    uploads = len(device.uploads)
    for _ in range(5):
        optimizer.step()  # same gradients, same coefficients
    assert len(device.uploads) == uploads
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.step()
    assert device.uploads[uploads:] == [row]
    params[0].grad = params[0].grad.clone()
    optimizer.step()
    assert device.uploads[uploads + 1 :] == [row + grads]


@each
def test_a_buffer_is_not_written_while_its_copy_is_in_flight(name, running):
    """The host runs six steps ahead of the device, with other gradients and other coefficients in each."""
    params = make_params(SIZES)
    optimizer = make(name, params)
    running.accessible = lambda: tensors_of(optimizer)
    kept = []
    for i in range(6):
        step(optimizer, params, i)
        kept.append([p.grad for p in params])
    assert len(running.launches) == 6
    running.synchronize()
    assert_same(name, optimizer, params, 6, running)


def test_buffers_are_used_again_once_the_device_is_done(device):
    params = make_params(SIZES)
    optimizer = make("AdamW", params)
    step(optimizer, params)
    before = device.pinned_buffers
    for i in range(10):
        device.synchronize()
        step(optimizer, params, i)
    assert device.pinned_buffers == before
    for i in range(10):
        step(optimizer, params, i)
    assert before + 9 <= device.pinned_buffers <= before + 10


def test_the_ring_by_itself():
    device = FakeDevice(nothing)
    target = device.memory(4)
    ring = cuda.UploadRing(device, target, 4)
    for value in (1, 2):
        ring.upload(bytes([value] * 16))
    assert len(ring) == 2
    device.synchronize()
    assert target[:2].tolist() == [0x0202020202020202] * 2
    assert target[2:].tolist() == [-1, -1]
    ring.upload(bytes([3] * 8), bytes([4] * 8))
    assert len(ring) == 2
    device.synchronize()
    assert target[:2].tolist() == [0x0303030303030303, 0x0404040404040404]


# Streams and devices.


@each
def test_T34_another_current_device(name, running):
    """The parameters' device is made the current one for the launch, and the former one afterwards."""
    running.is_current = False
    params = make_params(SIZES)
    optimizer = make(name, params)
    running.accessible = lambda: tensors_of(optimizer)
    for i in range(2):
        step(optimizer, params, i)
        running.synchronize()
    assert running.is_current is False
    assert_same(name, optimizer, params, 2, running)


def test_T34_side_streams(device):
    """Everything goes to the stream that is current at the step; the allocator is told of streams other than the first."""
    device.streams += [FakeStream(), FakeStream()]
    params = make_params(SIZES)
    optimizer = make("AdamW", params)
    step(optimizer, params)
    assert device.told == []
    for stream in (1, 2, 1, 0):
        for s in device.streams:
            s.synchronize()
        device.on = stream
        step(optimizer, params, stream)
        assert [len(s.queue) > 0 for s in device.streams] == [i == stream for i in range(3)]
    assert device.told == [1, 2]


class Copies(TorchDispatchMode):
    """Sees what would wait for a GPU: numbers brought to it from ordinary memory, and numbers read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("lift_fresh", "_to_copy", "_local_scalar_dense", "copy_"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Names of torch's functions and methods that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@each
def test_statistics_are_read_without_waiting_and_on_another_stream(name, running):
    """Of tensors of two dtypes in groups that do not follow each other. The allocator is told who writes and who reads."""
    running.eager = True
    running.streams.append(FakeStream())
    params = [*make_params(SIZES), *make_params(SIZES, torch.float64)]
    groups = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.02}]
    optimizer = getattr(fused_l2, name)(groups, **CASES[name], statistics=True)
    running.accessible = lambda: tensors_of(optimizer)
    step(optimizer, params)
    running.on = 1
    step(optimizer, params, 1)
    partials = {m.data_ptr() for m in running.memories if m.dtype is torch.float64 and m.dim() == 1 and m.numel()}
    assert len(partials) == 2
    assert {(1, at) for at in partials} <= running.told_of
    with Copies() as copies:
        figures = optimizer.statistics
        of_groups, of_tensors = figures.by_group(), figures.by_tensor()
    assert copies.seen == []
    assert len(running.told_of) >= 4  # who reads is told of, too: of the sizes and the order of the rows
    total = sum(float(s.grad_norm) ** 2 for s in of_groups)
    assert (
        float(figures.grad_norm) ** 2
        == pytest.approx(total)
        == pytest.approx(sum(float(p.grad.double().square().sum()) for p in params))
    )
    assert len(of_tensors) == len(params)


@pytest.mark.parametrize("value", [None, 7.0, torch.tensor(7.0), torch.tensor([7], dtype=torch.int64)], ids=str)
def test_step_counters_on_the_device_are_filled_there(value):
    """A copy of four bytes for each parameter, from ordinary memory, waits for the device."""
    param = torch.empty(3, device="meta")  # any device but the CPU
    with Called() as called:
        counter = as_counter(value, param, True, False, lambda: "p")
    assert not {"tensor", "to"} & called.names
    assert (counter.device.type, counter.dtype, counter.shape) == ("meta", torch.float32, ())


@each
def test_several_devices_and_the_cpu_in_one_optimizer(name, monkeypatch):
    devices = [FakeDevice(emulated(90), index=i) for i in range(2)]
    params = make_params((5, 1030, 64, 9, 0, 33))
    place = {id(p): i % 3 for i, p in enumerate(params)}  # cuda:0, cuda:1, the CPU
    with (
        devices[0].in_place(monkeypatch, lambda t: place.get(id(t)) == 0),
        devices[1].in_place(monkeypatch, lambda t: place.get(id(t)) == 1),
    ):
        optimizer = make(name, params)
        for i in range(3):
            for d in devices:
                d.accessible = lambda: tensors_of(optimizer)
            step(optimizer, params, i)
            for d in devices:
                d.synchronize()
        assert [len(d.launches) for d in devices] == [3, 3]
        assert_same(name, optimizer, params, 3, *devices)


def test_a_capturing_stream_is_refused_before_anything_changes(device):
    params = make_params(SIZES)
    optimizer = make("AdamW", params)
    step(optimizer, params)
    before = snapshot(optimizer)
    device.capturing = True
    with pytest.raises(RuntimeError, match="cannot be captured"):
        step(optimizer, params, 1)
    assert_unchanged(before, optimizer)
    device.capturing = False
    step(optimizer, params, 1)


@each
def test_a_first_step_within_a_capture_is_refused_and_harms_nothing(name, device, monkeypatch):
    """Compiling or loading a kernel fails while a stream is captured: that must not be tried, and not be remembered."""
    params = make_params(SIZES)
    optimizer = make(name, params)
    device.capturing = True
    with pytest.raises(RuntimeError, match="cannot be captured"):
        step(optimizer, params)
    assert device.compiled == []
    assert not any(optimizer.state.values())
    device.capturing = False
    step(optimizer, params)
    assert len(device.launches) == 1


def test_being_out_of_memory_while_loading_a_kernel_is_not_remembered(device, monkeypatch):
    params = make_params(SIZES)
    optimizer = make("AdamW", params)
    with monkeypatch.context() as full:

        def fails(*signature: Any) -> Any:
            raise RuntimeError("Triton Error [CUDA]: out of memory")

        full.setattr(device, "compile", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            step(optimizer, params)
    step(optimizer, params)
    assert len(device.launches) == 1


# Gradients that do not pair up with their parameters, tensors no kernel takes.


@each
def test_a_gradient_of_other_strides_goes_through_a_copy(name, running, monkeypatch):
    copies: list[torch.Tensor] = []  # kept here: the engine lets go of them once the launch is queued
    monkeypatch.setattr(CudaPart, "_step", lambda part, real=CudaPart._step: (copies.extend(part._copies), real(part)))
    values = torch.randn(6, 5)
    p, q = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
    ours, theirs = make(name, [p]), make(name, [q])
    running.accessible = lambda: [*tensors_of(ours), *copies]
    for i in range(3):
        transposed = torch.randn(5, 6).t()
        running.active = True
        p.grad = transposed
        ours.step()
        running.synchronize()
        running.active = False
        q.grad = transposed.contiguous()
        theirs.step()
        assert len(copies) == i + 1
    assert_same_bits(p, q)


def test_T23_the_chunk_map_of_a_tensor_beyond_2_to_the_31_elements():
    """test_kernel_bits runs such a chunk."""
    words = chunk_map([3, 2**33 + 1], 1 << 20)
    assert len(words) == 1 + 2**13 + 1
    assert [w & 0xFFFFFFFF for w in words[:2]] == [0, 1]
    assert words[-1] >> 32 == 2**13


@pytest.mark.parametrize("elements", [1, 1000, 10**6, 10**8, 10**10])
@pytest.mark.parametrize("most", [1024, 8192])
def test_chunks_are_multiples_of_16_and_their_map_stays_small(elements, most):
    chunk = device_tables._chunk_size(elements, 132, most)
    assert chunk % 1024 == 0
    assert chunk <= most or elements > most << 19
    assert elements / chunk <= 2**19


# Without triton, a compiler or the library.


def test_without_triton_cuda_tensors_take_pytorch_with_one_warning(device, monkeypatch):
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "triton cannot be imported")
    monkeypatch.setattr(engines, "_warned", set())
    params = make_params(SIZES)
    optimizer = make("AdamW", params)
    with pytest.warns(UserWarning, match="plain PyTorch operations: triton cannot be imported"):
        step(optimizer, params)
    step(optimizer, params, 1)
    assert device.launches == []
    assert float(optimizer.state[params[0]]["step"]) == 2


def test_a_kernel_that_does_not_compile_is_told_once(device, monkeypatch):
    def fails(*signature: Any) -> Any:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(device, "compile", fails)
    monkeypatch.setattr(engines, "_warned", set())
    params = make_params(SIZES)
    optimizer = make("AdamW", params)
    with pytest.warns(UserWarning, match="could not compile or load a kernel: RuntimeError: Failed to find C compiler"):
        step(optimizer, params)
    step(optimizer, params, 1)
    assert float(optimizer.state[params[0]]["step"]) == 2


def test_what_may_not_fail_again_is_tried_again_by_the_next_plan(device, monkeypatch):
    """A disk that was full, which is tried three times within a plan; but not what the compiler itself refuses."""
    from fused_l2.kernels.launch import Refused

    tried = []
    monkeypatch.setattr(engines, "_warned", set())
    for error, again in ((OSError(28, "No space left on device"), True), (Refused("triton 3.6.0 does not compile"), False)):
        monkeypatch.setattr(cuda, "_kernels", {})
        params = make_params(SIZES)
        optimizer = make("AdamW", params)
        with monkeypatch.context() as failing:

            def fails(*signature: Any, error: Exception = error) -> Any:
                tried.append(error)
                raise error

            failing.setattr(device, "compile", fails)
            with pytest.warns(UserWarning, match=r"No space left|does not compile"):
                step(optimizer, params)
        assert tried.count(error) == (3 if again else 1)
        launches = len(device.launches)
        optimizer.drop_plan()
        step(optimizer, params, 1)
        assert len(device.launches) == launches + again


def test_a_checkout_without_kernels_is_no_reason_for_plain_pytorch(device, monkeypatch):
    """As when Python starts in a checkout whose package is not installed: the error says what to do."""
    monkeypatch.setitem(sys.modules, "fused_l2.kernels", None)
    monkeypatch.setitem(sys.modules, "fused_l2.kernels.launch", None)
    monkeypatch.delattr(fused_l2, "kernels", raising=False)
    monkeypatch.setattr(cuda, "_launch", cuda._launch.__wrapped__)
    params = make_params(SIZES)
    optimizer = make("AdamW", params)
    with pytest.raises(ImportError, match=r"a checkout without the GPU kernels inside\. Install it"):
        step(optimizer, params)


@each
def test_without_the_cpp_library_the_checks_are_python(name, running, monkeypatch):
    params = make_params(SIZES)
    optimizer = make(name, params)
    running.accessible = lambda: tensors_of(optimizer)
    with monkeypatch.context() as without:
        without.setattr(cpu, "library", lambda: None)
        for i in range(3):
            step(optimizer, params, i)
            running.synchronize()
        if name == "AdamW":  # a counter set in place is seen by looking at it
            part, counter = plan_of(optimizer).parts[0], optimizer.state[params[0]]["step"]
            counter.fill_(3)
            assert part.unexpected_counts() == []
            counter.fill_(7)
            assert [e.param for e in part.unexpected_counts()] == params[:1]
            counter.fill_(3)
    assert_same(name, optimizer, params, 3, running)


def test_a_triton_that_is_too_old_is_named(monkeypatch):
    import triton

    cuda._availability.clear()
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "triton 3.5.1 is older than 3.6" in cuda.why_unavailable()
    cuda._availability.clear()


def test_parameters_that_share_memory_are_not_stepped_side_by_side(device):
    p = torch.nn.Parameter(torch.zeros(10))
    q = torch.nn.Parameter(p.detach()[5:])
    optimizer = make("AdamW", [p, q])
    step(optimizer, [p, q])
    part = plan_of(optimizer).parts[0]
    assert len(part._params) == 1
