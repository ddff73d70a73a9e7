"""``statistics=True``: figures of the step, against float64, on both engines and in plain PyTorch."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
from typing import Any

import pytest
import torch
from comparing import CASES, assert_same_bits, each, make_params, set_grads
from torch import Tensor

import fused_l2
from fused_l2.engines import cpu

SIZES = (5, 0, 1030, 64, 40_000)
DTYPES = [(torch.float32,), (torch.float64,), (torch.bfloat16, torch.float32), (torch.float16, torch.float64)]
FIGURES = ("grad_norm", "param_norm", "update_norm", "update_ratio", "penalty", "nonfinite_grads")
# Sums are float64 but for the update, a float32 difference: half an ulp of float32 of each, less in the norm.
TOLERANCE = 1e-7


def make(name: str, params: list[Any], **options: Any) -> Any:
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "weight_decay": 0.02}]
    return getattr(fused_l2, name)(groups, **{**CASES[name], "statistics": True, **options})


def expected_of(grads: list[Tensor], before: list[Tensor], after: list[Tensor], decays: list[float]) -> dict[str, float]:
    def norm(tensors: list[Tensor]) -> float:
        return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))

    updates = [b.double() - a.double() for a, b in zip(after, before, strict=True)]
    squares = [float(b.double().square().sum()) for b in before]
    return {
        "grad_norm": norm(grads),
        "param_norm": norm(before),
        "update_norm": norm(updates),
        "update_ratio": norm(updates) / norm(before),
        "penalty": sum(d / 2 * s for d, s in zip(decays, squares, strict=True)),
        "nonfinite_grads": sum(float((~g.isfinite()).sum()) for g in grads),
    }


def kept(params: list[Any]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def decays_of(optimizer: Any) -> list[float]:
    return [float(g["weight_decay"]) for g in optimizer.param_groups for _ in g["params"]]


def check(optimizer: Any, params: list[Any], steps: int = 2, done: Any = lambda: None) -> None:
    for i in range(steps):
        set_grads(params, i)
        before = kept(params)
        optimizer.step()
        done()
        expected = expected_of([p.grad for p in params], before, kept(params), decays_of(optimizer))
        assert optimizer.statistics.as_dict() == pytest.approx(expected, rel=TOLERANCE)


@each
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_figures_are_those_of_float64(name, dtypes, options):
    params = [p for i, d in enumerate(dtypes) for p in make_params(SIZES, d, i)]
    check(make(name, params, **options), params)


@each
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("runner", ["compiled", "interpreted"])
def test_figures_on_the_triton_path(name, dtypes, runner, monkeypatch):
    pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")
    from gpu_free.fake_cuda import FakeDevice, emulated, interpreted_kernel, tensors_of

    device = FakeDevice(emulated(90) if runner == "compiled" else interpreted_kernel)
    device.eager = True
    params = [p for i, d in enumerate(dtypes) for p in make_params((5, 0, 1030, 64), d, i)]
    optimizer = make(name, params, max_grad_norm=0.5)
    device.accessible = lambda: tensors_of(optimizer)
    with device.in_place(monkeypatch):
        check(optimizer, params)
    assert device.launches


@each
@pytest.mark.parametrize("capability", cpu.library().available if cpu.library() else [])
def test_every_instruction_set_measures_the_same(name, capability, monkeypatch):
    library = cpu.library()
    before = library.capability
    library.select(capability)
    try:
        params = [*make_params(SIZES), *make_params(SIZES, torch.bfloat16), *make_params(SIZES, torch.float64)]
        check(make(name, params), params)
    finally:
        library.select(before)


@each
def test_statistics_change_no_bit_of_the_step_and_no_thread_changes_a_bit_of_them(name):
    runs = []
    for statistics, threads in ((False, 2), (True, 2), (True, 1)):
        params = [*make_params(SIZES), *make_params(SIZES, torch.bfloat16)]
        optimizer = make(name, params, statistics=statistics)
        torch.set_num_threads(threads)
        for i in range(3):
            set_grads(params, i)
            optimizer.step()
        torch.set_num_threads(2)
        runs.append((kept(params), optimizer.statistics))
    assert runs[0][1] is None
    assert_same_bits(runs[0][0], runs[1][0])
    for figure in FIGURES:
        assert_same_bits(getattr(runs[1][1], figure), getattr(runs[2][1], figure), figure)


@pytest.mark.parametrize("engine", ["cpp", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_gradients_that_are_not_finite_are_counted(dtype, engine, monkeypatch):
    """A finite float64 gradient of 1e200 makes the sum inf, and is none of them."""
    params = make_params(SIZES, dtype)
    optimizer = make("SGD", params)
    set_grads(params, 0)
    params[0].grad[:2] = torch.tensor([math.nan, -math.inf])
    params[2].grad[1029] = math.inf
    if dtype is torch.float64:
        params[3].grad[5] = 1e200
    if engine == "triton":
        pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")
        from gpu_free.fake_cuda import FakeDevice, emulated, tensors_of

        device = FakeDevice(emulated(90))
        device.eager, device.accessible = True, lambda: tensors_of(optimizer)
        with device.in_place(monkeypatch):
            optimizer.step()
    else:
        optimizer.step()
    by_tensor = optimizer.statistics.by_tensor()
    assert [int(s.nonfinite_grads) for s in by_tensor.values()] == [2, 0, 1, 0, 0]
    assert float(optimizer.statistics.nonfinite_grads) == 3


@pytest.mark.parametrize("engine", ["cpp", "triton"])
@each
def test_a_skipped_step_is_measured_all_the_same(name, engine, monkeypatch, request):
    params = make_params((5, 0, 1030, 64))
    optimizer = make(name, params, amp_scaling=True)
    if engine == "triton":
        pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")
        from gpu_free.fake_cuda import FakeDevice, emulated, tensors_of

        device, stack = FakeDevice(emulated(90)), contextlib.ExitStack()
        device.eager, device.accessible = True, lambda: tensors_of(optimizer)
        request.addfinalizer(stack.close)
        stack.enter_context(device.in_place(monkeypatch))
    for i, found in enumerate((1.0, 0.0, 2.0, 0.0)):
        set_grads(params, i)
        before, grads = kept(params), [p.grad.clone() / 8 for p in params]
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found)
        optimizer.step()
        expected = expected_of(grads, before, kept(params), decays_of(optimizer))
        assert optimizer.statistics.as_dict() == pytest.approx(expected, rel=TOLERANCE)
        assert (expected["update_norm"] == 0) == (found != 0)


def test_by_group_and_by_tensor():
    names = ["a.weight", "a.bias", "b.weight", "b.bias"]
    params = make_params((600, 5, 64, 9))
    named = list(zip(names, params, strict=True))
    optimizer = fused_l2.AdamW(
        [{"params": named[::2], "weight_decay": 0.5}, {"params": named[1::2], "weight_decay": 0.0}], statistics=True
    )
    set_grads(params, 0)
    params[2].grad = None
    before = kept(params)
    optimizer.step()
    made = optimizer.statistics
    assert set(made.by_tensor()) == {"a.weight", "a.bias", "b.bias"}  # one had no gradient
    for name, p, old in zip(names, params, before, strict=True):
        if p.grad is None:
            continue
        decay = 0.5 if "weight" in name else 0.0
        expected = expected_of([p.grad], [old], [p.detach()], [decay])
        assert made.by_tensor()[name].as_dict() == pytest.approx(expected, rel=TOLERANCE)
    decayed, rest = made.by_group()
    assert float(decayed.penalty) == pytest.approx(0.25 * float(before[0].double().square().sum()))
    assert float(rest.penalty) == 0.0
    assert float(rest.param_norm) == pytest.approx(math.hypot(float(before[1].norm()), float(before[3].norm())))
    assert float(made.penalty) == float(decayed.penalty)


def test_what_was_read_stays_and_what_was_not_costs_nothing():
    params = make_params(SIZES)
    optimizer = make("AdamW", params)
    assert optimizer.statistics is None
    set_grads(params, 0)
    optimizer.step()
    first = optimizer.statistics
    figures = first.as_dict()
    set_grads(params, 1)
    optimizer.step()
    assert first.as_dict() == figures
    assert optimizer.statistics.as_dict() != figures
    assert list(figures) == list(FIGURES)
    assert "grad_norm=tensor(" in repr(first)
    assert "rows" not in repr(first)


def test_switching_and_copying():
    params = make_params(SIZES)
    optimizer = make("SGD", params, statistics=False)
    set_grads(params, 0)
    optimizer.step()
    assert optimizer.statistics is None
    optimizer.statistics = True
    optimizer.step()
    assert optimizer.statistics is not None
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert other.options["statistics"]
        assert other.statistics is None
    assert "statistics" not in optimizer.state_dict()["param_groups"][0]
    optimizer.statistics = False
    assert optimizer.statistics is None


def test_tensors_stepped_by_plain_pytorch():
    class Wrapped(Tensor):
        pass

    params = make_params((600, 64))
    optimizer = make("AdamW", params)
    set_grads(params, 0)
    params[0].grad = params[0].grad.as_subclass(Wrapped)
    before = kept(params)
    optimizer.step()
    grads = [p.grad.as_subclass(Tensor) for p in params]
    expected = expected_of(grads, before, kept(params), decays_of(optimizer))
    assert optimizer.statistics.as_dict() == pytest.approx(expected, rel=TOLERANCE)
    assert set(optimizer.statistics.by_tensor()) == {"0.0", "1.0"}


def test_the_penalty_is_that_of_the_weights_the_loss_was_computed_for():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    lam, n = 5.0, 100
    groups = fused_l2.weight_decay.param_groups(model, fused_l2.weight_decay.from_lambda(lam, n))
    optimizer = fused_l2.SGD(groups, lr=0.1, statistics=True)
    model(torch.randn(3, 4)).square().mean().backward()
    before = float(fused_l2.weight_decay.penalty(optimizer, lam, n))
    optimizer.step()
    assert float(optimizer.statistics.penalty) == pytest.approx(before, rel=1e-12)
