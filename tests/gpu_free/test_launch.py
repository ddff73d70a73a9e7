"""The product's own launches through Triton, into a libcuda that only counts."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from comparing import assert_same_bits, each, make, make_params, plan_of, set_grads

pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")
pytest.importorskip("numpy")

import triton
from triton.backends.compiler import GPUTarget

import fused_l2
from fused_l2.kernels import launch
from fused_l2.tables.tensor_table import Flag, Rule

from . import aot
from .fake_cuda import tensors_of
from .ptx_emulator import Emulator
from .stub_driver import CONTROL, MEASURE, STEP, StubDevice, arguments_of, stub_driver, why_unavailable

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())
SIZES = (5, 0, 1030, 64)


@pytest.fixture
def stub(monkeypatch) -> Iterator[Any]:
    with stub_driver() as library, StubDevice().in_place(monkeypatch):
        yield library


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that Triton is asked for from now on."""
    asked: list[str] = []
    real = triton.compile
    monkeypatch.setattr(triton, "compile", lambda source, **rest: (asked.append(source.name), real(source, **rest))[1])
    return asked


def test_every_step_is_one_launch(stub):
    params = make_params([3] * 50)
    optimizer = fused_l2.AdamW([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)])
    set_grads(params, 0)
    optimizer.step()
    before = stub.stub_launches()
    for _ in range(10):
        optimizer.step()
    assert stub.stub_launches() == before + 10


@each
def test_T37_a_schedule_compiles_and_loads_nothing(name, stub, monkeypatch):
    """Counted at Triton's compiler and at the driver's module loader."""
    compiled = compilations(monkeypatch)
    params = make_params(SIZES)
    optimizer = make(name, params)
    set_grads(params, 0)
    optimizer.step()
    modules, first = stub.stub_modules(), len(compiled)
    assert modules >= 1
    assert compiled.count("fused_l2_step") == 1  # or what counts here does not see compilations
    for i in range(20):
        group = optimizer.param_groups[0]
        group["lr"], group["weight_decay"] = 1e-3 * i, 0.01 * i
        if name == "AdamW":
            group["betas"] = (0.9 - 0.01 * i, 0.999)
        set_grads(params, i)
        optimizer.step()
    assert stub.stub_modules() == modules
    assert len(compiled) == first


def test_hooks_and_modes_of_triton_do_not_matter(stub, monkeypatch):
    """A hook that keeps Triton from compiling, as profilers of compilation have, and compilation in the background."""
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **given: True)
    params = make_params(SIZES)
    optimizer = make("AdamW", params)
    set_grads(params, 0)
    with ThreadPoolExecutor(1) as executor, triton.AsyncCompileMode(executor):
        optimizer.step()
        before = stub.stub_launches()
        optimizer.step()
    assert stub.stub_launches() == before + 1


def test_an_interpreting_triton_is_named():
    """TRITON_INTERPRET=1 makes another kind of function of every kernel."""
    source = launch.step(Rule.SGD, 0, *[torch.float32] * 3)._replace(function=object())
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        launch.compiled(source, GPUTarget("cuda", 90, 32))


def test_an_architecture_that_triton_does_not_know_is_named():
    source = launch.step(Rule.SGD, 0, *[torch.float32] * 3)
    with pytest.raises(launch.Refused, match=r"triton [\d.]+ does not compile fused_l2_step for sm_999: PTXAS error"):
        launch.compiled(source, GPUTarget("cuda", 999, 32))


def test_what_reaches_the_driver_steps_the_tensors(stub):
    """Programs, threads, stream and arguments as the driver sees them, handed to the emulator, are a right step."""
    params, expected = make_params(SIZES), make_params(SIZES)
    optimizer = make("AdamW", params)
    set_grads(params, 0)
    optimizer.step()
    device = plan_of(optimizer).parts[0]._device
    device.on = 0
    (launch,) = arguments_of(stub, optimizer.step, STEP)
    programs, threads, stream, arguments = launch
    assert (programs, threads, stream) == (4, 256, 0)  # 1 + 0 + 2 + 1 chunks of 1024
    assert arguments[2] == 1024
    device.synchronize()  # the uploads; the launches went into the stub
    emulator = Emulator(aot.compile_for(90, Rule.ADAM, int(Flag.DECOUPLED)).asm["ptx"])
    for tensor in (*device.memories, *tensors_of(optimizer)):
        emulator.register(tensor, "tensor")
    emulator.run(programs, arguments)  # the second step: the first never happened, so moments are zero before it

    device.active = False
    other = make("AdamW", expected)
    for q in expected:
        other.state[q] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(q), "exp_avg_sq": torch.zeros_like(q)}
    set_grads(expected, 0)
    other.step()
    assert_same_bits(params, expected)


def test_launches_go_to_the_current_stream(stub):
    params = make_params(SIZES)
    optimizer = make("SGD", params)
    set_grads(params, 0)
    optimizer.step()
    device = plan_of(optimizer).parts[0]._device
    device.streams.append(type(device.streams[0])())
    device.on = 1
    (launch,) = arguments_of(stub, optimizer.step, STEP)
    assert launch[2] == 1


def test_a_clipped_step_is_three_launches(stub):
    """Measure, make the factor, step; the second reads what the first wrote, the third what the second did."""
    params = make_params(SIZES)
    optimizer = fused_l2.AdamW(params, max_grad_norm=0.3)
    set_grads(params, 0)
    optimizer.step()
    measure, control, step = arguments_of(stub, optimizer.step, MEASURE, CONTROL, STEP)
    assert measure[0] == 3  # one chunk for each tensor that is not empty
    assert (control[0], step[0]) == (1, 4)
    _, table, partials, *sizes, grads = measure[3]
    assert sizes == [16384, 0]
    assert (table, grads) == (step[3][1], step[3][4])
    assert control[3] == (partials, step[3][6], 0, 0, 3, 0, 0.3)
