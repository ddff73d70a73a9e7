"""``statistics=True``: figures of the step, against float64, on both engines and in plain PyTorch."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest
import torch
from comparing import CASES, assert_same_bits, each, make_params, set_grads
from torch import Tensor

import fused_l2
from fused_l2 import reference
from fused_l2.engines import cpu
from fused_l2.statistics import Decay, totals_of
from fused_l2.tables.tensor_table import Flag

SIZES = (5, 0, 1030, 64, 40_000)
DTYPES = [(torch.float32,), (torch.float64,), (torch.bfloat16, torch.float32), (torch.float16, torch.float64)]
DECAY_FIGURES = ("decay_asked", "decay_arrived", "decay_share")
FIGURES = ("grad_norm", "param_norm", "update_norm", "update_ratio", "penalty", "nonfinite_grads", *DECAY_FIGURES)
# Sums are float64 but for the update, a float32 difference: half an ulp of float32 of each, less in the norm.
TOLERANCE = 1e-7


def make(name: str, params: list[Any], **options: Any) -> Any:
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "weight_decay": 0.02}]
    return getattr(fused_l2, name)(groups, **{**CASES[name], "statistics": True, **options})


def expected_of(
    grads: list[Tensor],
    before: list[Tensor],
    after: list[Tensor],
    decays: list[float],
    rates: list[float],
    exact: list[Tensor] | None = None,
) -> dict[str, float]:
    """``exact``: the new weights before rounding, where ``after`` are rounded; None if the step was skipped."""

    def norm(tensors: list[Tensor]) -> float:
        return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))

    updates = [b.double() - a.double() for a, b in zip(after, before, strict=True)]
    squares = [float(b.double().square().sum()) for b in before]
    asked = [r * s * (exact is not None) for r, s in zip(rates, squares, strict=True)]
    returned = [
        float((b.double() * (a.double() - e.double())).sum()) if r else 0.0
        for b, a, e, r in zip(before, after, exact or after, rates, strict=True)
    ]
    arrived = sum(asked) - sum(returned)
    return {
        "grad_norm": norm(grads),
        "param_norm": norm(before),
        "update_norm": norm(updates),
        "update_ratio": norm(updates) / norm(before),
        "penalty": sum(d / 2 * s for d, s in zip(decays, squares, strict=True)),
        "nonfinite_grads": sum(float((~g.isfinite()).sum()) for g in grads),
        "decay_asked": sum(asked),
        "decay_arrived": arrived,
        "decay_share": arrived / sum(asked) if sum(asked) else math.nan,
    }


def kept(params: list[Any]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def decays_of(optimizer: Any) -> list[float]:
    return [float(g["weight_decay"]) for g in optimizer.param_groups for _ in g["params"]]


def rates_of(optimizer: Any) -> list[float]:
    """lr * weight_decay, and in SGD what a momentum makes of it."""
    through = [1 / (1 - g["momentum"]) if "momentum" in g else 1.0 for g in optimizer.param_groups]
    return [g["lr"] * g["weight_decay"] * t for g, t in zip(optimizer.param_groups, through, strict=True) for _ in g["params"]]


def exact_of(optimizer: Any, before: list[Tensor], states: list[dict[str, Tensor]]) -> list[Tensor]:
    """The new weights in the dtype that steps are computed in, by the definition of the rules."""
    stepper, found = optimizer._stepper, []
    places = [(i, g, p) for i, g in enumerate(optimizer.param_groups) for p in g["params"]]
    for (i, group, p), old, state in zip(places, before, states, strict=True):
        wide = torch.float64 if p.dtype is torch.float64 else torch.float32
        values = stepper.rule.Values._make(stepper.rule.read(group))
        numbers, flags = (
            stepper.rule.numbers(values, stepper.options, i, group["lr"]),
            stepper.rule.flags(values, stepper.options),
        )
        row = stepper.rule.row(numbers, flags, float(state.get("step", 0.0)) + 1)
        factor = 1.0
        if optimizer.grad_norm is not None:
            factor = ((optimizer.grad_norm + 1e-6).reciprocal() * stepper.options.max_grad_norm).clamp(max=1.0)
        grad = p.grad.as_subclass(Tensor).to(wide) * factor
        names = stepper.rule.state_names(flags)
        own = [state[name].to(wide) if name in state else torch.zeros_like(grad) for name in names]
        if "momentum" in group:
            found.append(reference.sgd(old.to(wide), grad, own, row, flags, not state)[0])
        else:
            found.append(reference.adam(old.to(wide), grad, own, row, flags)[0])
    return found


def states_of(optimizer: Any, params: list[Any]) -> list[dict[str, Tensor]]:
    return [{k: v.clone() for k, v in optimizer.state.get(p, {}).items()} for p in params]


def check(optimizer: Any, params: list[Any], steps: int = 2, done: Any = lambda: None) -> None:
    for i in range(steps):
        set_grads(params, i)
        before, states = kept(params), states_of(optimizer, params)
        optimizer.step()
        done()
        exact = exact_of(optimizer, before, states)
        grads = [p.grad.as_subclass(Tensor) for p in params]
        expected = expected_of(grads, before, kept(params), decays_of(optimizer), rates_of(optimizer), exact)
        assert optimizer.statistics.as_dict() == pytest.approx(expected, rel=TOLERANCE)


@each
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_figures_are_those_of_float64(name, dtypes, options):
    params = [p for i, d in enumerate(dtypes) for p in make_params(SIZES, d, i)]
    check(make(name, params, **options), params)


@pytest.mark.sweep(5)
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
        exact = kept(params) if found == 0 else None
        expected = expected_of(grads, before, kept(params), decays_of(optimizer), rates_of(optimizer), exact)
        assert optimizer.statistics.as_dict() == pytest.approx(expected, rel=TOLERANCE, nan_ok=True)
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
        expected = expected_of([p.grad], [old], [p.detach()], [decay], [1e-3 * decay], [p.detach()])
        assert made.by_tensor()[name].as_dict() == pytest.approx(expected, rel=TOLERANCE, nan_ok=True)
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
    assert repr(first) == f"Statistics({', '.join(f'{name}={value:.6g}' for name, value in figures.items())})"


def test_a_repr_does_not_wait_for_a_device():
    """Of tensors on "meta", which have no values that could be read."""
    params = make_params(SIZES)
    optimizer = make("AdamW", params)
    set_grads(params, 0)
    optimizer.step()
    elsewhere = dataclasses.replace(
        optimizer.statistics, **{name: getattr(optimizer.statistics, name).to("meta") for name in FIGURES}
    )
    assert repr(elsewhere) == "Statistics(on meta; print() reads it)"


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


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_stepped_by_plain_pytorch(name, dtype):
    class Wrapped(Tensor):
        pass

    params = make_params((600, 64), dtype)
    optimizer = make(name, params)
    set_grads(params, 0)
    params[0].grad = params[0].grad.as_subclass(Wrapped)
    before = kept(params)
    optimizer.step()
    grads = [p.grad.as_subclass(Tensor) for p in params]
    exact = exact_of(optimizer, before, [{}, {}])
    expected = expected_of(grads, before, kept(params), decays_of(optimizer), rates_of(optimizer), exact)
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


def one(name: str, dtype: torch.dtype = torch.bfloat16, zero: bool = True, **options: Any) -> tuple[Any, Tensor]:
    """An optimizer of one tensor after a step, without gradients unless said otherwise, and the tensor before it."""
    (p,) = make_params((4000,), dtype)
    set_grads([p], 0)
    if zero:
        p.grad.zero_()
    optimizer = getattr(fused_l2, name)([p], **{"lr": 0.01, "weight_decay": 0.1, "statistics": True, **options})
    before = p.detach().double().clone()
    optimizer.step()
    return optimizer, before


@pytest.mark.parametrize("decay", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_without_gradients_what_arrives_is_what_weights_lost(name, decay):
    """float32 computes 1 - rate to 2^-25 and each product to 2^-24 of w: the asked to 2^-23 / rate of it. Half a unit in the
    last place is 2^-9 to 2^-8 of a weight, so that of a rate of 0.003 some arrives, and nothing of 0.001."""
    optimizer, before = one(name, weight_decay=decay)
    made, after = optimizer.statistics, optimizer.param_groups[0]["params"][0].detach().double()
    rate = 0.01 * decay
    assert float(made.decay_asked) == pytest.approx(rate * float(before.square().sum()), rel=1e-12)
    lost = float((before * (before - after)).sum())
    assert float(made.decay_arrived) == pytest.approx(lost, abs=2**-23 / rate * float(made.decay_asked))
    assert float(made.decay_share) == pytest.approx(float(made.decay_arrived / made.decay_asked))
    assert (lost == 0) == (decay == 0.1)


@pytest.mark.parametrize(
    ("mode", "within"), [("master", 0.0), ("remainder", 0.0), ("remainder8", 2e-3), ("kahan", 2e-3), ("stochastic", 0.3)]
)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_modes_that_keep_what_rounding_leaves_out_lose_no_decay(name, mode, within):
    """A rate of 1e-3 of 4000 weights, 63 in the root: kahan and remainder8 round the 16th bit at random, 2^-16 / 1e-3 / 63,
    stochastic the 8th, which is 6 percent and is allowed five times."""
    optimizer, _ = one(name, zero=False, low_precision=mode)
    assert float(optimizer.statistics.decay_share) == pytest.approx(1, abs=within)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_wide_weights_all_decay_arrives(dtype):
    optimizer, _ = one("AdamW", dtype, zero=False)
    assert float(optimizer.statistics.decay_share) == 1


@pytest.mark.parametrize(
    ("name", "options", "rate"),
    [
        ("SGD", {}, 1e-3),
        ("SGD", {"momentum": 0.9}, 1e-2),
        ("SGD", {"momentum": 0.9, "dampening": 0.5}, 5e-3),
        ("SGD", {"momentum": 0.9, "decoupled_weight_decay": True}, 1e-3),
        ("SGD", {"momentum": 0.9, "decay_rule": "corrected", "max_lr": 0.04}, 2.5e-3),
        ("SGD", {"momentum": 1.0}, math.nan),
        ("Adam", {}, math.nan),
        ("Adam", {"weight_decay": 0.0}, 0.0),
        ("Adam", {"decoupled_weight_decay": True}, 1e-3),
        ("AdamW", {"cautious": True}, math.nan),
        ("AdamW", {"cautious": True, "weight_decay": 0.0}, 0.0),
        ("AdamW", {"decay_rule": "fully_decoupled", "max_lr": 0.04}, 2.5e-2),
        ("AdamW", {"decay_rule": "corrected", "max_lr": 0.04}, 2.5e-4),
    ],
    ids=str,
)
def test_what_is_asked_of_each_rule_of_decay(name, options, rate):
    optimizer, before = one(name, torch.float32, **options)
    made = optimizer.statistics
    expected = rate * float(before.square().sum())
    for found in (made.decay_asked, made.decay_arrived):
        assert float(found) == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert float(made.decay_share) == pytest.approx(1.0 if rate > 0 else math.nan, nan_ok=True)
    (group,) = made.by_group()
    assert str(group.as_dict()) == str(made.as_dict())


def test_l2_through_a_momentum_takes_in_the_end_what_is_asked():
    """The buffer holds weight_decay * w / (1 - momentum) when 1 / (1 - momentum) steps are long gone."""
    (p,) = make_params((100,), torch.float64)
    optimizer = fused_l2.SGD([p], lr=1e-4, momentum=0.9, dampening=0.2, weight_decay=0.1, statistics=True)
    for _ in range(300):
        p.grad = torch.zeros_like(p)
        before = p.detach().clone()
        optimizer.step()
    lost = float((before * (before - p.detach())).sum())
    assert lost == pytest.approx(
        float(optimizer.statistics.decay_arrived), rel=0.002
    )  # w shrinks by 8e-5 a step, ten steps long


def test_groups_without_decay_do_not_count():
    """What rounding does to them is no decay given back."""
    params = make_params((1000, 1000), torch.bfloat16)
    optimizer = fused_l2.AdamW([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}], lr=0.01, statistics=True)
    set_grads(params, 0)
    optimizer.step()
    decayed, rest = optimizer.statistics.by_group()
    whole = optimizer.statistics
    assert float(whole.decay_arrived) == float(decayed.decay_arrived) != float(decayed.decay_asked)
    assert float(whole.decay_asked) == float(decayed.decay_asked) > 0
    assert float(rest.decay_asked) == float(rest.decay_arrived) == 0
    assert math.isnan(float(rest.decay_share))


def test_hyperparameters_that_are_tensors():
    """On a device nobody waits for them: the rate is a tensor, and the decay of a group is 0 there without the host knowing."""
    rule = fused_l2.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-2)._stepper.rule
    numbers = rule.numbers(
        rule.Values(1e-2, 0.9, 0.0, 0.1, False, False), fused_l2.SGD(make_params((1,)))._stepper.options, 0, 1e-2
    )
    wide = numbers._replace(
        **{k: torch.tensor(getattr(numbers, k), dtype=torch.float64) for k in ("lr", "momentum", "weight_decay")}
    )
    flags = int(Flag.MOMENTUM)
    assert float(rule.decay_rate(wide, flags)) == pytest.approx(rule.decay_rate(numbers, flags)) == pytest.approx(0.01)
    rows = torch.tensor([[0.0, 8.0, 0.0, 0.0, 8.0, 0.5], [0.0, 2.0, 0.0, 0.0, 2.0, 0.25]], dtype=torch.float64)
    given = [[Decay(0.1, 0.5), Decay(0.0, 0.0)], [Decay(0.1, torch.tensor(0.5)), Decay(0.0, torch.tensor(0.0))]]
    for decays in given:
        assert totals_of(rows, [0, 1], decays)[6:].tolist() == pytest.approx([0.4, 4.0, 3.5])
