"""torch.amp.GradScaler with ``amp_scaling=True``: skipped steps never happened, and unscaling is exact.

Scales are powers of two, as GradScaler keeps them, so the scaled run has to end in the bits of an unscaled one without the
steps that overflowed.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from comparing import assert_same_bits, each, make, make_params
from torch.amp import GradScaler

import fused_l2

SIZES = (5, 0, 600, 64)


@pytest.fixture
def engine(request, monkeypatch):
    """Where parameters are stepped: by the C++ library, or by emulated Triton kernels."""
    if request.param == "cpp":
        yield lambda optimizers: None
        return
    pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")
    from gpu_free.fake_cuda import FakeDevice, emulated, tensors_of

    device = FakeDevice(emulated(90))
    device.eager = True  # the scaler's own operations are

    def watched(optimizers: list[Any]) -> FakeDevice:
        owned = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
        place.update(owned)
        device.accessible = lambda: [t for o in optimizers for t in tensors_of(o)]
        return device

    place: set[int] = set()
    with device.in_place(monkeypatch, lambda t: id(t) in place):
        yield watched


both_engines = pytest.mark.parametrize("engine", ["cpp", "triton"], indirect=True)


def gradient(params: list[Any], step: int, overflows: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    found = [torch.randn(p.shape, generator=generator) for p in params]
    if overflows:
        found[2][7] = math.inf
    return found


def backward(scaler: GradScaler, params: list[Any], grads: list[torch.Tensor]) -> None:
    for p in params:
        p.grad = None
    loss = sum((p * g).sum() for p, g in zip(params, grads, strict=True))
    scaler.scale(loss).backward()


SEQUENCES = {
    "no overflow, the scale grows": (),
    "overflow on the first step": (0,),
    "overflow on the first two and later": (0, 1, 4),
    "overflow later": (3,),
}


@pytest.mark.sweep(5)
@both_engines
@each
@pytest.mark.parametrize("overflows", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("clip", [None, "max_grad_norm", "unscale_ and torch's"])
def test_T02_a_scaled_run_is_the_unscaled_run_without_the_skipped_steps(name, overflows, clip, engine):
    """T02: an overflow on step 1 leaves neither states nor first-step flags behind."""
    options = {"max_grad_norm": 0.5} if clip == "max_grad_norm" else {}
    params, expected = make_params(SIZES), make_params(SIZES)
    ours, plain = make(name, params, amp_scaling=True, **options), make(name, expected, **options)
    device = engine([ours])
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = set()
    for i in range(6):
        grads = gradient(params, i, i in overflows)
        scales.add(scaler.get_scale())
        backward(scaler, params, grads)
        if clip == "unscale_ and torch's":
            scaler.unscale_(ours)
            torch.nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(ours)
        scaler.update()
        assert bool(ours.step_was_skipped) == (i in overflows)
        if i in overflows:
            continue
        for q, g in zip(expected, grads, strict=True):
            q.grad = g.clone()
        if clip == "unscale_ and torch's":
            torch.nn.utils.clip_grad_norm_(expected, 0.5)
        plain.step()
        if clip == "max_grad_norm":
            assert_same_bits(ours.grad_norm, plain.grad_norm, "norm")
    assert len(scales) > 1
    if device is not None:
        waits = 1 + next(i for i in range(6) if i not in overflows)
        assert len(device.launches) == 6 - (waits - 1)
        assert device.waits == waits  # only while there is no state yet
    assert_same_bits(params, expected, "parameter")
    for p, q in zip(params, expected, strict=True):
        assert ours.state[p].keys() == plain.state[q].keys()
        for key in plain.state[q]:
            assert_same_bits(ours.state[p][key], plain.state[q][key], key)


@both_engines
@each
def test_a_skipped_first_step_leaves_no_state(name, engine):
    params = make_params(SIZES)
    ours = make(name, params, amp_scaling=True)
    engine([ours])
    scaler = GradScaler("cpu", init_scale=4.0)
    backward(scaler, params, gradient(params, 0, True))
    values = [p.detach().clone() for p in params]
    scaler.step(ours)
    assert not ours.state_dict()["state"]
    assert_same_bits([p.detach() for p in params], values)


@both_engines
@each
def test_T05_any_found_inf_but_zero_skips(name, engine):
    """GradScaler adds found_inf up over devices."""
    params = make_params(SIZES)
    ours = make(name, params, amp_scaling=True)
    engine([ours])
    scaler = GradScaler("cpu", enabled=False)
    backward(scaler, params, gradient(params, 0, False))
    ours.step()
    for found in (1.0, 2.0, 8.0, math.nan):
        kept = [p.detach().clone() for p in params], copy.deepcopy(ours.state_dict()["state"])
        ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor(found)
        ours.step()
        assert ours.step_was_skipped
        assert_same_bits([p.detach() for p in params], kept[0])
        for old, new in zip(kept[1].values(), ours.state_dict()["state"].values(), strict=True):
            assert_same_bits([old[k] for k in old], [new[k] for k in old])
    ours.found_inf = torch.tensor(0.0)
    ours.step()
    assert not ours.step_was_skipped
    assert not torch.equal(params[0].detach(), kept[0][0])


@both_engines
@each
@pytest.mark.parametrize("overflows", [False, True])
def test_T28_unscaled_gradients_are_not_unscaled_again_and_still_skipped(name, overflows, engine):
    params, expected = make_params(SIZES), make_params(SIZES)
    ours, plain = make(name, params, amp_scaling=True), make(name, expected)
    engine([ours])
    scaler = GradScaler("cpu", init_scale=2.0**10)
    grads = gradient(params, 0, overflows)
    backward(scaler, params, grads)
    scaler.unscale_(ours)
    scaler.step(ours)
    if not overflows:
        for q, g in zip(expected, grads, strict=True):
            q.grad = g
        plain.step()
    assert_same_bits(params, expected)


@both_engines
@each
def test_two_optimizers_on_one_scaler(name, engine):
    """One overflows, the other steps."""
    groups = make_params(SIZES), make_params(SIZES)
    expected = make_params(SIZES), make_params(SIZES)
    ours = [make(name, list(g), amp_scaling=True) for g in groups]
    plain = [make(name, list(g)) for g in expected]
    engine(ours)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for i in range(4):
        for which in range(2):
            overflows = i == 1 + which
            grads = gradient(list(groups[which]), 10 * i + which, overflows)
            backward(scaler, list(groups[which]), grads)
            scaler.step(ours[which])
            if not overflows:
                for q, g in zip(expected[which], grads, strict=True):
                    q.grad = g
                plain[which].step()
        scaler.update()
    for which in range(2):
        assert_same_bits(list(groups[which]), list(expected[which]))


@each
@pytest.mark.parametrize("scale", [3.0, 1e4, 0.1])
def test_other_scales_multiply_by_the_reciprocal_as_unscale_does(name, scale):
    """Gradients are multiplied by float32(1 / scale): the bits of GradScaler.unscale_ and a step."""
    params, expected = make_params(SIZES), make_params(SIZES)
    ours, plain = make(name, params, amp_scaling=True), make(name, expected)
    for optimizer, tensors in ((ours, params), (plain, expected)):
        scaler = GradScaler("cpu", init_scale=scale)
        backward(scaler, tensors, gradient(tensors, 0, False))
        scaler.step(optimizer)  # the plain one is unscaled by the scaler
    assert_same_bits(params, expected)


@each
def test_T29_amp_scaling_is_off_unless_asked_for(name):
    """Lightning and accelerate look at this attribute, and do less for an optimizer that has it."""
    params = make_params(SIZES)
    optimizer = make(name, params)
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    scaler = GradScaler("cpu", init_scale=4.0)
    backward(scaler, params, gradient(params, 0, True))
    assert scaler.step(optimizer) is None
    assert not optimizer.state_dict()["state"]
    optimizer.amp_scaling = True
    assert optimizer._step_supports_amp_scaling
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert other.amp_scaling
    assert "amp_scaling" not in optimizer.state_dict()["param_groups"][0]


def test_scaled_float16_gradients_are_unscaled_in_float32():
    """A gradient of 2^-26 is no float16; scaled by 2^10 it is, and the step sees 2^-26."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))
    optimizer = fused_l2.SGD([p], lr=2.0**20, amp_scaling=True)
    p.grad = torch.full((3,), 2.0**-16, dtype=torch.float16)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**10), torch.tensor(0.0)
    optimizer.step()
    assert p.tolist() == [-(2.0**-6)] * 3


def test_plain_pytorch_tensors_are_unscaled_and_skipped_too():
    class Wrapped(torch.Tensor):
        pass

    p = torch.nn.Parameter(torch.ones(4))
    optimizer = fused_l2.SGD([p], lr=0.5, amp_scaling=True)
    for found, expected in ((1.0, 1.0), (0.0, 0.5)):
        p.grad = torch.full((4,), 8.0).as_subclass(Wrapped)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found)
        optimizer.step()
        assert p.tolist() == [expected] * 4


def test_both_verdicts_of_a_nonfinite_norm_leave_an_overflow_to_the_scaler():
    params = make_params(SIZES)
    optimizer = fused_l2.AdamW(params, max_grad_norm=1.0, error_if_nonfinite=True, amp_scaling=True)
    scaler = GradScaler("cpu", init_scale=4.0)
    backward(scaler, params, gradient(params, 0, True))
    scaler.step(optimizer)  # no error: overflows are what the scaler is for
    assert optimizer.step_was_skipped
