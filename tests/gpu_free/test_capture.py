"""Steps captured into a CUDA graph and replayed, on a device made of CPU tensors: what a replay reads, and what it follows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparing import CASES, assert_same_bits, assert_unchanged, each, make_params, plan_of, set_grads, snapshot, states

pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")
pytest.importorskip("numpy")

import fused_l2
from fused_l2.engines.device_tables import ROWS
from fused_l2.tables import coefficients
from fused_l2.tables.tensor_table import Flag, Rule

from . import aot
from .fake_cuda import FakeDevice, emulated, interpreted_kernel, nothing, tensors_of
from .ptx_emulator import Emulator

SIZES = (5, 0, 1030, 64)


@pytest.fixture
def device(monkeypatch) -> Iterator[FakeDevice]:
    fake = FakeDevice(emulated(90))
    with fake.in_place(monkeypatch):
        yield fake


def capturable(name: str, params: list[Any], **options: Any) -> Any:
    options = {**CASES[name], **options}
    if name == "AdamW":
        options["capturable"] = True
    for key in ("lr", "weight_decay"):
        options[key] = torch.tensor(options[key], dtype=torch.float64)  # "on the device", as every tensor here
    return getattr(fused_l2, name)(params, **options)


def cosine(step: int, steps: int) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * step / steps)


def train(device: FakeDevice, name: str, steps: int, captured: bool, **options: Any) -> tuple[list[Any], Any, list[Any]]:
    """One eager step, then ``steps`` under a schedule of lr, weight decay and betas, each with gradients of its own in the same
    memory."""
    params = make_params(SIZES)
    optimizer = capturable(name, params, **options)
    device.accessible = lambda: tensors_of(optimizer)
    group = optimizer.param_groups[0]
    if name == "AdamW":
        group["betas"] = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.999)
    set_grads(params, 0)
    optimizer.step()
    device.synchronize()
    set_grads(params, 1)  # new tensors: those of the graph
    norms = []
    if captured:
        with device.capture():
            optimizer.step()
    peak = float(group["lr"]), float(group["weight_decay"])
    for i in range(steps):
        for tensor, top in zip((group["lr"], group["weight_decay"]), peak, strict=True):
            tensor.fill_(top * cosine(i, steps))
        if name == "AdamW":
            group["betas"][0].fill_(0.9 - 0.3 * i / steps)
        grads = torch.Generator().manual_seed(i)
        for p in params:
            p.grad.copy_(torch.randn(p.shape, generator=grads))
        if captured:
            device.replay()
        else:
            optimizer.step()
        device.synchronize()
        norms.append(None if optimizer.grad_norm is None else float(optimizer.grad_norm))
    return params, optimizer, norms


@each
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"max_grad_norm": 0.5, "skip_if_nonfinite": True}], ids=str)
def test_T35_replays_follow_lr_weight_decay_betas_and_the_step_count(name, options, device):
    steps = 6
    params, optimizer, norms = train(device, name, steps, captured=True, **options)
    expected, other, other_norms = train(device, name, steps, captured=False, **options)
    assert_same_bits(params, expected, "parameter")
    keys = list(other.state[expected[0]])
    assert_same_bits(states(optimizer, params, *keys), states(other, expected, *keys), "state")
    assert norms == other_norms
    if name == "AdamW":
        assert float(optimizer.state[params[0]]["step"]) == steps + 1


@each
def test_the_same_training_with_the_host_s_numbers(name, device, monkeypatch):
    """Coefficient rows from the device are those from the host."""
    params, optimizer, _ = train(device, name, 20, captured=True)
    device.active = False
    expected = make_params(SIZES)
    other = getattr(fused_l2, name)(expected, **CASES[name])
    group = other.param_groups[0]
    if name == "AdamW":
        group["betas"] = 0.9, float(torch.tensor(0.999))
    peak = group["lr"], group["weight_decay"]
    set_grads(expected, 0)
    other.step()
    for i in range(20):
        group["lr"], group["weight_decay"] = (top * cosine(i, 20) for top in peak)
        if name == "AdamW":
            group["betas"] = 0.9 - 0.3 * i / 20, group["betas"][1]
        grads = torch.Generator().manual_seed(i)
        for q in expected:
            q.grad = torch.randn(q.shape, generator=grads)
        other.step()
    assert_same_bits(params, expected, "parameter")
    keys = list(other.state[expected[0]])
    assert_same_bits(states(optimizer, params, *keys), states(other, expected, *keys), "state")


@each
def test_T36_eager_steps_between_replays_do_not_disturb_the_graph(name, device):
    """A graph's gradients stay its own, whatever the host has uploaded since; nothing is copied while capturing."""
    params = make_params(SIZES)
    optimizer = capturable(name, params)
    device.accessible = lambda: [*tensors_of(optimizer), *held]
    held: list[torch.Tensor] = []
    expected = make_params(SIZES)
    other = capturable(name, expected)
    set_grads(params, 0)
    optimizer.step()
    device.synchronize()
    set_grads(params, 1)
    uploads, buffers = len(device.uploads), device.pinned_buffers
    with device.capture():
        optimizer.step()
    assert (len(device.uploads), device.pinned_buffers) == (uploads, buffers)
    held += [p.grad for p in params]
    for seed, replays in ((2, False), (1, True), (3, False), (1, True), (1, True)):
        if replays:
            device.replay()
        else:
            set_grads(params, seed)
            optimizer.step()
        device.synchronize()
    device.accessible = lambda: tensors_of(other)
    for seed in (0, 2, 1, 3, 1, 1):
        set_grads(expected, seed)
        other.step()
        device.synchronize()
    assert_same_bits(params, expected)


def test_a_graph_outlives_the_plan_it_was_captured_with(device):
    params = make_params(SIZES)
    optimizer = capturable("AdamW", params)
    device.accessible = lambda: tensors_of(optimizer)
    set_grads(params, 0)
    optimizer.step()
    device.synchronize()
    with device.capture():
        optimizer.step()
    (part,) = plan_of(optimizer).parts
    ((tables, *_),) = optimizer._stepper._captured
    assert tables == part._tables
    optimizer.drop_plan()
    del part
    params[0].grad = None  # another plan, and rows of its own
    optimizer.step()
    (part,) = plan_of(optimizer).parts
    assert tables
    assert not set(tables.values()) & set(part._tables.values())


def test_no_table_that_a_graph_reads_is_changed(device):
    """One bucket changes and then the other: the second one's table is still the graph's."""
    a, b = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = fused_l2.SGD([a, b], lr=0.5)  # a number: the host computes the coefficients
    device.accessible = lambda: tensors_of(optimizer)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    device.synchronize()
    with device.capture(), pytest.warns(UserWarning, match="every replay will use 0.5"):
        optimizer.step()
    (part,) = plan_of(optimizer).parts
    captured = set(part._tables.values())
    assert len(captured) == 2
    a.grad = None
    optimizer.step()
    b.data = b.data.clone()
    optimizer.step()
    device.synchronize()
    assert not captured & set(part._tables.values())


def changed(device, change, drop) -> torch.Tensor:
    """The parameter `b` after two steps, with a change between them. With ``drop`` by a plan that is made after it."""
    a, b, c = (torch.nn.Parameter(torch.ones(4)) for _ in range(3))
    optimizer = fused_l2.AdamW([{"params": [b, c], "lr": 0.001}, {"params": [a], "lr": 1.0}], capturable=True)
    device.accessible = lambda: tensors_of(optimizer)
    for p in (a, b, c):
        p.grad = torch.ones(4)
    optimizer.step()
    device.synchronize()
    change(optimizer, a, c)
    if drop:
        optimizer.drop_plan()
    optimizer.step()
    device.synchronize()
    return b.detach()


def state_gone(optimizer, a, c) -> None:
    a.grad = None
    optimizer.state.pop(a)


def group_gone(optimizer, a, c) -> None:
    c.grad = None
    del optimizer.param_groups[1]


def gradient_gone(optimizer, a, c) -> None:
    c.grad = None


@pytest.mark.parametrize("change", [state_gone, group_gone, gradient_gone])
def test_steps_counted_on_the_device_bear_what_goes(device, change):
    """A tensor without a gradient has no counter in the device's tables, and its group may have gone with it."""
    assert_same_bits(changed(device, change, False), changed(device, change, True))


def test_a_capture_after_a_skipped_first_step_is_refused(device):
    """The states are still to be made, which the host decides when it knows that the step is not skipped."""
    p = torch.nn.Parameter(torch.ones(4))
    options = {"capturable": True, "max_grad_norm": 1.0, "skip_if_nonfinite": True}
    optimizer = fused_l2.AdamW([p], lr=torch.tensor(0.1), **options)
    device.accessible = lambda: tensors_of(optimizer)
    p.grad = torch.full((4,), float("inf"))
    optimizer.step()
    device.synchronize()
    p.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="states are still to be made"), device.capture():
        optimizer.step()


@pytest.mark.parametrize("groups", [1, 28, 465])
def test_a_graph_of_many_groups_has_few_launches(groups, monkeypatch):
    """What the host would upload travels in the arguments of launches, each of which every replay makes again."""
    device = FakeDevice(nothing)
    with device.in_place(monkeypatch):
        params = make_params([3] * groups)
        settings = [{"params": [p], "lr": torch.tensor(0.1 * (i + 1))} for i, p in enumerate(params)]
        optimizer = fused_l2.AdamW(settings, capturable=True)
        set_grads(params, 0)
        optimizer.step()
        device.synchronize()
        with device.capture():
            optimizer.step()
    writes = len(device.graph) - 2  # without the coefficient rows' and the step's
    print(f"{groups} groups: {writes} launches that write tables")
    assert 1 <= writes <= (18 if groups == 465 else 5)


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_a_scale_on_the_host_is_refused(name, monkeypatch):
    """A replay would copy from its memory again, whatever is there by then."""
    on_host = torch.tensor(1.0 if name == "grad_scale" else 0.0)
    device = FakeDevice(emulated(90))
    with device.in_place(monkeypatch, lambda t: t is not on_host):
        params = make_params(SIZES)
        optimizer = fused_l2.SGD(params, lr=torch.tensor(0.1), amp_scaling=True)
        device.accessible = lambda: tensors_of(optimizer)
        set_grads(params, 0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
        optimizer.step()
        device.synchronize()
        before = snapshot(optimizer)
        setattr(optimizer, name, on_host)
        with device.capture(), pytest.raises(RuntimeError, match=f"{name} is on the CPU"):
            optimizer.step()
        assert device.graph == []
        assert_unchanged(before, optimizer)


def test_an_equal_tensor_in_the_place_of_an_lr_is_followed(device):
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = fused_l2.AdamW([p], lr=0.5, capturable=True)
    device.accessible = lambda: tensors_of(optimizer)
    p.grad = torch.ones(4)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    for _ in range(2):
        optimizer.step()
    device.synchronize()
    with device.capture():
        optimizer.step()


def test_float_hyperparameters_are_kept_by_a_graph_with_a_warning_for_lr(device):
    params = make_params(SIZES)
    optimizer = fused_l2.AdamW(params, lr=0.25, capturable=True)
    device.accessible = lambda: tensors_of(optimizer)
    set_grads(params, 0)
    optimizer.step()
    device.synchronize()
    with device.capture(), pytest.warns(UserWarning, match=r"lr of param group 0 as a number: every replay will use 0\.25"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "Pass capturable=True"),
        ({"capturable": True, "max_grad_norm": 1.0, "error_if_nonfinite": True}, "skip_if_nonfinite=True instead"),
    ],
    ids=str,
)
def test_what_cannot_be_captured_is_refused_before_anything_changes(options, reason, device):
    params = make_params(SIZES)
    optimizer = fused_l2.AdamW(params, **options)
    device.accessible = lambda: tensors_of(optimizer)
    set_grads(params, 0)
    optimizer.step()
    device.synchronize()
    before = snapshot(optimizer)
    with device.capture(), pytest.raises(RuntimeError, match=reason):
        optimizer.step()
    assert device.graph == []
    assert_unchanged(before, optimizer)
    optimizer.step()


@each
def test_other_gradients_than_before_are_refused_with_the_remedy(name, device):
    params = make_params(SIZES)
    optimizer = capturable(name, params)
    device.accessible = lambda: tensors_of(optimizer)
    set_grads(params, 0)
    optimizer.step()
    device.synchronize()
    params[0].grad = None
    with device.capture(), pytest.raises(RuntimeError, match=r"Make one step\(\) before"):
        optimizer.step()
    with device.capture():
        optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
        set_grads(params, 1)
        with pytest.raises(RuntimeError, match=r"no step has seen yet|nothing prepared"):
            optimizer.step()


@each
def test_hyperparameters_on_the_device_are_looked_at_once(name, device):
    """Without capture, too: the host reads a tensor when it first sees it, to check it, and never again."""
    params = make_params(SIZES)
    optimizer = capturable(name, params)
    set_grads(params, 0)
    optimizer.step()
    optimizer.step()

    class Unreadable(torch.Tensor):
        def __float__(self) -> float:
            raise AssertionError("the host waited for the device")

    for key in ("lr", "weight_decay"):
        optimizer.param_groups[0][key].__class__ = Unreadable
    for i in range(3):
        set_grads(params, i)
        optimizer.step()


def test_hyperparameters_of_16_bits_are_refused(device):
    params = make_params(SIZES)
    optimizer = fused_l2.SGD(params, lr=torch.tensor(0.1, dtype=torch.bfloat16))
    set_grads(params, 0)
    with pytest.raises(TypeError, match=r"of param group 0 that are CUDA tensors must be float32 or float64"):
        optimizer.step()


# The rows themselves.


def rows_on_device(run: Any, rule: Rule, flags: int, numbers: list[tuple[float, ...]], steps: list[float], opmath: Any) -> Any:
    """A tensor per step count, with the hyperparameters of ``numbers[i % len(numbers)]``."""
    count = len(steps)
    groups = torch.tensor([i % len(numbers) for i in range(count)])
    counters = torch.tensor(steps, dtype=torch.float32)
    addresses = torch.tensor([counters[i].data_ptr() for i in range(count)])
    values = torch.zeros(len(numbers), coefficients.NUMBERS, dtype=torch.float64)
    for i, row in enumerate(numbers):
        values[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    sources = torch.zeros(len(numbers), coefficients.NUMBERS, dtype=torch.int64)
    wide, narrow = torch.tensor([numbers[-1][0]], dtype=torch.float64), torch.tensor([0.25])
    sources[-1, 0] = wide.data_ptr() | 1  # the last group has its lr on the device
    values[-1, 0] = math.nan
    out = torch.full((count, coefficients.WIDTH), math.nan, dtype=opmath)
    control = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    before, behind = [groups, addresses, out], [values, sources, control]
    arguments = [*(t.data_ptr() for t in before), count, *(t.data_ptr() for t in behind)]
    tensors = [*before, *behind, counters, wide, narrow]
    run(("coefficients", rule, flags, opmath, ROWS), tensors, -(-count // ROWS), arguments)
    assert counters.tolist() == [s + 1 for s in steps]
    return out


# lr, betas, eps, weight decay, the largest lr, the decay rule
ADAM = [
    (1e-3, 0.9, 0.999, 1e-8, 0.1, 1.0, 0),
    (0.3, 0.0, 0.9999, 1e-6, 0.0, 1.0, 0),
    (6e-4, 0.9, 0.95, 1e-8, 0.01, 1e-3, 1),
    (7e-4, 0.8, 0.95, 1e-8, 0.01, 1e-3, 2),
]
SGD = [(0.1, 0.9, 0.0, 1e-4, 0.3, 2), (0.3, 0.5, 0.3, 0.0, 1.0, 0)]


def adam_row(numbers: tuple[float, ...], decoupled: bool, step: float) -> tuple[float, ...]:
    """With the step's count."""
    return (*coefficients.adam(coefficients.AdamNumbers(*numbers), decoupled, step), step)


LONG = [*range(600), 999, 1023, 4095, 9999, 99_999, 1_000_000, 2**24 - 2]


@pytest.mark.parametrize("flags", [0, Flag.DECOUPLED, Flag.DECOUPLED | Flag.SCALED])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_rows_from_the_compiled_kernel_are_the_host_s(arch, flags):
    """In float32 bit for bit. In float64 the host's pow is an ulp off at times, and 1 - beta^t magnifies that."""
    steps = [float(s) for s in LONG for _ in ADAM]
    expected = [adam_row(ADAM[i % len(ADAM)], bool(flags & Flag.DECOUPLED), s + 1) for i, s in enumerate(steps)]
    rows = rows_on_device(emulated(arch), Rule.ADAM, int(flags), ADAM, steps, torch.float32)
    assert_same_bits(rows, torch.tensor(expected, dtype=torch.float64).float())
    wide = rows_on_device(emulated(arch), Rule.ADAM, int(flags), ADAM, steps, torch.float64)
    exact = torch.tensor(expected, dtype=torch.float64)
    others = [0, 1, 2, 3, 4, 6, coefficients.STEP_COUNT]
    assert_same_bits(wide[:, others].contiguous(), exact[:, others].contiguous())
    for column, beta in ((5, 0.9999), (7, 0.95)):
        # An ulp of beta^t is at most 2^-53; the correction is at least 1 - beta.
        bound = 2 * 2**-53 / (1 - beta) + 4 * 2**-53
        assert float(((wide[:, column] - exact[:, column]) / exact[:, column]).abs().max()) <= bound


def test_rows_from_the_interpreted_kernel_and_of_sgd():
    steps = [float(s) for s in (0, 1, 2, 10, 1000) for _ in ADAM]
    expected = [adam_row(ADAM[i % len(ADAM)], True, s + 1) for i, s in enumerate(steps)]
    rows = rows_on_device(interpreted_kernel, Rule.ADAM, int(Flag.DECOUPLED), ADAM, steps, torch.float32)
    assert_same_bits(rows, torch.tensor(expected, dtype=torch.float64).float())


@pytest.mark.parametrize("flags", [0, Flag.DECOUPLED])
def test_rows_of_sgd(flags):
    compiled = aot.compile_kernel(90, "coefficients", Rule.SGD, int(flags), torch.float32, ROWS)
    groups, unused = torch.tensor([0, 1, 0]), torch.zeros(3, dtype=torch.int64)
    values = torch.zeros(2, coefficients.NUMBERS, dtype=torch.float64)
    values[:, :6] = torch.tensor(SGD, dtype=torch.float64)
    sources, out = torch.zeros(2, coefficients.NUMBERS, dtype=torch.int64), torch.zeros(3, coefficients.WIDTH)
    momentum = torch.tensor(0.75)
    sources[0, 1] = momentum.data_ptr()
    emulator = Emulator(compiled.asm["ptx"], compiled.metadata.shared)
    before, behind = [groups, unused, out], [values, sources]
    for tensor in (*before, *behind, momentum):
        emulator.register(tensor, "tensor")
    emulator.run(1, [*(t.data_ptr() for t in before), 3, *(t.data_ptr() for t in behind), 0])
    changed = (SGD[0][0], 0.75, *SGD[0][2:])
    expected = [coefficients.sgd(coefficients.SgdNumbers(*numbers), bool(flags)) for numbers in (changed, SGD[1], changed)]
    assert_same_bits(out[:, :5].contiguous(), torch.tensor(expected, dtype=torch.float64).float())
