"""What training loops put around step(): closures, hooks, schedulers, profilers, scalers, compiled functions."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_same_bits, make_params, set_grads
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fused_l2

OPTIMIZERS = ["SGD", "Adam", "AdamW"]
each = pytest.mark.parametrize("name", OPTIMIZERS)


def make(name, params, **options):
    return getattr(fused_l2, name)(params, **({"lr": 0.1} | ({"momentum": 0.9} if name == "SGD" else {}) | options))


@each
def test_closure(name):
    params, expected = make_params((5,)), make_params((5,))
    a, b = make(name, params), make(name, expected)

    def closure():
        assert torch.is_grad_enabled()
        a.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = a.step(closure)
    (expected[0] ** 2).sum().backward()
    assert b.step() is None
    assert loss.item() == pytest.approx((make_params((5,))[0] ** 2).sum().item())
    assert_same_bits(params, expected)


@each
def test_hooks_run_as_torchs_do(name):
    params = make_params((5,))
    set_grads(params, 0)
    optimizer, calls = make(name, params), []
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("post")),
        register_optimizer_step_pre_hook(lambda o, args, kwargs: calls.append("global pre")),
    ]
    optimizer.step()
    assert calls == ["global pre", "pre", "post"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert calls == ["global pre", "pre", "post"]


@each
def test_a_subclass_may_wrap_step(name):
    class Wrapped(getattr(fused_l2, name)):
        def step(self, closure=None):
            self.seen = True
            return super().step(closure)

    params, expected = make_params((5,)), make_params((5,))
    for ps, cls in ((params, Wrapped), (expected, getattr(fused_l2, name))):
        set_grads(ps, 0)
        cls(ps, lr=0.1).step()
    assert_same_bits(params, expected)


@each
def test_the_profiler_sees_the_step(name):
    params = make_params((5,))
    set_grads(params, 0)
    optimizer = make(name, params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        optimizer.step()
    assert f"Optimizer.step#{name}.step" in {event.name for event in profile.events()}


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=12),  # cycles momentum or betas, too
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@each
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_T37_schedulers(name, scheduler, exact_sqrt):
    params, expected = make_params((5, 40)), make_params((5, 40))
    a = make(name, params, weight_decay=0.1)
    b = getattr(torch.optim, name)(
        expected, **({"lr": 0.1, "weight_decay": 0.1} | ({"momentum": 0.9} if name == "SGD" else {}))
    )
    schedules = [SCHEDULERS[scheduler](o) for o in (a, b)]
    for step in range(10):
        for optimizer, ps, schedule in ((a, params, schedules[0]), (b, expected, schedules[1])):
            set_grads(ps, step)
            optimizer.step()
            schedule.step(1.0) if scheduler == "ReduceLROnPlateau" else schedule.step()
    assert_same_bits(params, expected)
    assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"]


@each
def test_T02_T05_T28_T29_grad_scaler(name):
    """Scale, overflow on step 1, overflow later, unscale_ and clip: the steps that happen are those of an unscaled run."""
    params, expected = make_params((6,)), make_params((6,))
    a, b = make(name, params), make(name, expected)
    assert not getattr(a, "_step_supports_amp_scaling", False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(8):
        overflow = step in (0, 4)
        grad = torch.randn(6, generator=torch.Generator().manual_seed(step))
        scale = scaler.scale(torch.tensor(1.0)).item()
        params[0].grad = torch.full((6,), float("inf")) if overflow else grad * scale
        if step % 3 == 1:
            scaler.unscale_(a)
            nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(a)
        scaler.update()
        if overflow:
            if step == 0:
                assert len(a.state) == 0
            continue
        expected[0].grad = grad
        if step % 3 == 1:
            nn.utils.clip_grad_norm_(expected, 1.0)
        b.step()
    assert_same_bits(params, expected)  # scales are powers of two
    assert params[0].isfinite().all()


@each
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_train_function_steps_as_an_eager_one(name):
    def train(compiled: bool):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = make(name, model.parameters(), weight_decay=0.1)
        x = torch.randn(16, 4)

        def step():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()

        step = torch.compile(step, backend="eager") if compiled else step
        for _ in range(4):
            step()
        return [p.detach() for p in model.parameters()]

    assert_same_bits(train(True), train(False))
    torch._dynamo.reset()


@each
def test_foreach_and_fused_flags_change_nothing(name):
    results = []
    for flags in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}):
        params = make_params((5,))
        optimizer = make(name, params, **flags)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        results.append(params)
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_named_parameters_and_repr():
    model = nn.Linear(3, 2)
    optimizer = fused_l2.AdamW(model.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert "AdamW" in repr(optimizer)
    assert "lr: 0.1" in repr(optimizer)


def test_inference_mode_and_no_grad_around_step():
    results = []
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        params = make_params((5,))
        optimizer = make("AdamW", params)
        for step in range(3):
            set_grads(params, step)
            with context():
                optimizer.step()
        results.append(params)
    for other in results[1:]:
        assert_same_bits(other, results[0])
