"""On a GPU, against the CPU engine and against torch.optim's own CUDA kernels. `pytest -m gpu` runs these alone."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import (
    ADAM_VARIANTS,
    AWKWARD_SIZES,
    CASES,
    SGD_VARIANTS,
    assert_same_bits,
    each,
    label,
    make,
    make_params,
    on_gpu,
    plan_of,
    set_grads,
    states,
)
from test_eight_bits import same_codes
from torch import Tensor

import fused_l2
from fused_l2.engines import cuda
from fused_l2.engines.cuda_part import CudaPart

DEVICE = "cuda"
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
pytestmark = on_gpu

SIZES = (*AWKWARD_SIZES, 1024, 1025, 8192, 100_003, 0)
FP32_EPS = torch.finfo(torch.float32).eps
VARIANTS = [
    *(("SGD", v) for v in SGD_VARIANTS),
    *(("SGD", {"momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True}),),
    *(("Adam", v) for v in ADAM_VARIANTS),
    *(("AdamW", v) for v in ADAM_VARIANTS),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def moved(params: list[Any], misaligned: bool = False) -> list[torch.nn.Parameter]:
    """Copies on the device, on request as views that start one element behind an aligned address."""
    copies = []
    for p in params:
        memory = torch.empty(p.numel() + 1, dtype=p.dtype, device=DEVICE)
        view = memory[1:] if misaligned else memory[:-1]
        copies.append(torch.nn.Parameter(view.view_as(p).copy_(p.detach())))
    return copies


def give(to: list[Any], grads_of: list[Any]) -> None:
    for p, q in zip(to, grads_of, strict=True):
        p.grad = None if q.grad is None else q.grad.to(p.device)


def back(tensors: list[Any]) -> list[Tensor]:
    return [t.detach().cpu() for t in tensors]


def assert_same_state(a: Any, on_device: list[Any], b: Any, on_cpu: list[Any]) -> None:
    names = list(b.state[on_cpu[0]])
    assert_same_bits(back(on_device), back(on_cpu), "parameter")
    assert_same_bits(back(states(a, on_device, *names)), back(states(b, on_cpu, *names)), "state")


def steps_on_device(optimizer: Any) -> bool:
    """Whether our kernels step everything, not torch's functions."""
    return all(isinstance(part, CudaPart) for part in plan_of(optimizer).parts)


@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[f"{n}-{label(o)}" for n, o in VARIANTS])
def test_same_bits_as_the_cpu_engine(name, options, dtype, misaligned):
    on_cpu = make_params(SIZES, dtype)
    on_device = moved(on_cpu, misaligned)
    optimizers = []
    for params in (on_device, on_cpu):
        groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.02, "weight_decay": 0.0}]
        optimizers.append(getattr(fused_l2, name)(groups, lr=0.01, **options))
    for i in range(3):
        set_grads(on_cpu, i)
        on_cpu[3].grad = None if i == 0 else on_cpu[3].grad  # joins a step later
        give(on_device, on_cpu)
        for optimizer in optimizers:
            optimizer.step()
    assert steps_on_device(optimizers[0])
    assert_same_state(optimizers[0], on_device, optimizers[1], on_cpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@each
def test_float32_states_and_clipping_have_the_bits_of_the_cpu_engine(name, dtype, max_grad_norm, norm_type):
    on_cpu = [*make_params(SIZES, dtype), *make_params((1000, 70_001))]
    on_device = moved(on_cpu)
    optimizers = [make_clipped(name, params, max_grad_norm, norm_type) for params in (on_device, on_cpu)]
    for i in range(3):
        set_grads(on_cpu, i)
        give(on_device, on_cpu)
        for optimizer in optimizers:
            optimizer.step()
    assert steps_on_device(optimizers[0])
    assert_same_state(optimizers[0], on_device, optimizers[1], on_cpu)
    if max_grad_norm is not None:
        assert_same_bits(optimizers[0].grad_norm.cpu(), optimizers[1].grad_norm)


def make_clipped(name: str, params: list[Any], max_grad_norm: float | None, norm_type: float) -> Any:
    """Float32 states whatever the parameter's dtype, as after loading them."""
    optimizer = getattr(fused_l2, name)(params, **CASES[name], max_grad_norm=max_grad_norm, norm_type=norm_type)
    names = ["momentum_buffer"] if name == "SGD" else ["exp_avg", "exp_avg_sq"]
    for p in params:
        optimizer.state[p] = {key: torch.zeros_like(p, dtype=torch.float32) for key in names}
        if name == "AdamW":
            optimizer.state[p]["step"] = torch.tensor(0.0)
    return optimizer


@pytest.mark.parametrize("mode", ["remainder", "remainder8", "master", "kahan", "stochastic"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@each
def test_low_precision_modes_have_the_bits_of_the_cpu_engine(name, mode, state_dtype):
    on_cpu = [*make_params(SIZES, torch.bfloat16), *make_params((70_001,))]
    on_device = moved(on_cpu)
    optimizers = [
        getattr(fused_l2, name)(params, **CASES[name], low_precision=mode, state_dtype=state_dtype, seed=4)
        for params in (on_device, on_cpu)
    ]
    for i in range(3):
        set_grads(on_cpu, i)
        give(on_device, on_cpu)
        for optimizer in optimizers:
            optimizer.step()
    assert steps_on_device(optimizers[0])
    assert_same_bits(back(on_device), back(on_cpu), "parameter")
    assert_same_bits(back(optimizers[0].master_params()), optimizers[1].master_params(), "float32 value")


@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "statistics": True, "skip_if_nonfinite": True}], ids=label)
@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        (torch.float32, "round"),
        (torch.float16, "stochastic"),
        *((torch.bfloat16, m) for m in ("round", "remainder", "remainder8", "master", "kahan", "stochastic")),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_8bit_states_have_the_bits_of_the_cpu_engine(name, dtype, mode, options, misaligned):
    """Blocks that are full and not, several chunks, a tensor that keeps float32, none of the elements of one; NaN once."""
    shapes = ((64, 64), (33, 128), (7,), (1, 4128), (67, 96), (2, 70_016), (0, 64))
    on_cpu = make_params(shapes, dtype)
    on_device = moved(on_cpu, misaligned)
    settings = CASES["SGD" if name == "SGD" else "AdamW"]
    optimizers = [
        getattr(fused_l2, name)(params, **settings, **options, low_precision=mode, state_dtype="8bit", seed=4)
        for params in (on_device, on_cpu)
    ]
    for i in range(4):
        set_grads(on_cpu, i)
        if i == 2:
            on_cpu[0].grad[0, 0] = float("nan")  # with skip_if_nonfinite no step is made
        give(on_device, on_cpu)
        for optimizer in optimizers:
            optimizer.step()
    assert steps_on_device(optimizers[0])
    assert_same_bits(back(on_device), back(on_cpu), "parameter")
    for p, q in zip(on_device, on_cpu, strict=True):
        mine, others = optimizers[0].state[p], optimizers[1].state[q]
        assert mine.keys() == others.keys()
        for key in mine:
            if key.endswith("_8bit"):
                same_codes(key.removesuffix("_8bit"), {k: v.cpu() for k, v in mine.items()}, others)
            elif not key.startswith("remainder"):  # of a NaN it may be another one
                assert_same_bits(back([mine[key]]), back([others[key]]), key)
    assert_same_bits(back(optimizers[0].master_params()), optimizers[1].master_params(), "float32 value")
    exported = [list(o.float32_state_dict()["state"].values()) for o in optimizers]
    for mine, others in zip(*exported, strict=True):
        for key in set(mine) - {"remainder", "remainder8"}:
            assert_same_bits(back([mine[key]]), back([others[key]]), f"float32 {key}")


@each
def test_same_bits_as_the_cpu_engine_after_1000_steps(name):
    on_cpu = make_params((1000, 3, 65))
    on_device = moved(on_cpu)
    optimizers = make(name, on_device), make(name, on_cpu)
    for i in range(1000):
        set_grads(on_cpu, i)
        give(on_device, on_cpu)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.999
    assert_same_state(optimizers[0], on_device, optimizers[1], on_cpu)


@pytest.mark.skipif(TORCH < (2, 11), reason="torch's fused SGD computed in float64 before 2.11")
@pytest.mark.parametrize("options", SGD_VARIANTS, ids=label)
def test_sgd_has_the_bits_of_torch_fused(options):
    """Except where torch's own binary differs from its source: maximize and momentum without weight decay."""
    if options["maximize"] and options["momentum"] and not options["weight_decay"]:
        pytest.skip("torch's fused kernel contracts momentum * buffer - (1 - dampening) * grad another way")
    params = moved(make_params(SIZES))
    others = moved(params)
    ours = fused_l2.SGD(params, lr=0.01, **options)
    theirs = torch.optim.SGD(others, lr=0.01, fused=True, **options)
    for i in range(10):
        set_grads_on_device(params, i)
        give(others, params)
        ours.step()
        theirs.step()
    assert_same_bits(back(params), back(others))


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are compiled from now on."""
    import triton

    compiled: list[str] = []
    real = triton.compile
    monkeypatch.setattr(triton, "compile", lambda source, **rest: (compiled.append(source.name), real(source, **rest))[1])
    return compiled


def set_grads_on_device(params: list[Any], seed: int) -> None:
    like = [torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in params]
    set_grads(like, seed)
    give(params, like)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("which", ["fused", "foreach"])
def test_one_adamw_step_is_within_the_bound_of_torch(which, amsgrad):
    """From one state, with lr = 0.01, weight decay 0.1 and the usual betas, at each of twenty steps.

    torch's fused kernel and foreach compute the same formula in another order, and fused takes beta^t from a float32 pow.
    Each difference is a few roundings (eps = 2^-23) of a term, so with t the step, s = lr * m_hat / (sqrt(v_hat) + eps):

    * exp_avg: 4 eps of |m| + |g|; exp_avg_sq: 4 eps of v + g^2 (1 - beta is rounded at the scale of beta, not of 1 - beta)
    * s, relatively: 16 eps + what the two above contribute + 2 eps / (1 - beta1^t) + eps / (1 - beta2^t) for the pow
    * param: two roundings at its own scale and half an eps for 1 - lr * wd, which fused does not round, and s.
    """
    lr, beta1, beta2, weight_decay = 0.01, 0.9, 0.999, 0.1
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "amsgrad": amsgrad}
    p = moved(make_params([100_003]))[0]
    ours = fused_l2.AdamW([p], **options)
    for t in range(1, 21):
        set_grads_on_device([p], t)
        q = torch.nn.Parameter(p.detach().clone())
        theirs = torch.optim.AdamW([q], fused=which == "fused", foreach=which == "foreach", **options)
        if t > 1:
            saved = copy.deepcopy(ours.state_dict())  # torch takes tensors over as they are
            saved["param_groups"][0].update(fused=which == "fused", foreach=which == "foreach")
            theirs.load_state_dict(saved)
        q.grad = p.grad.clone()
        theirs.step()
        ours.step()
        mine, other = ours.state[p], theirs.state[q]
        g, m, v = (x.double().abs() for x in (p.grad, mine["exp_avg"], mine["exp_avg_sq"]))
        old_m, old_v = ((m + 0.1 * g) / beta1, v / beta2)
        off_m, off_v = 4 * FP32_EPS * (old_m + g), 4 * FP32_EPS * (old_v + g * g)
        assert bool(((mine["exp_avg"] - other["exp_avg"]).double().abs() <= off_m).all())
        assert bool(((mine["exp_avg_sq"] - other["exp_avg_sq"]).double().abs() <= off_v).all())
        second = mine["max_exp_avg_sq"].double() if amsgrad else v
        bias1, bias2 = 1 - beta1**t, 1 - beta2**t
        update = lr * m / bias1 / ((second / bias2).sqrt() + 1e-8)
        relative = FP32_EPS * (16 + 2 / bias1 + 1 / bias2) + off_v / (2 * second.clamp_min(1e-30))
        off_update = update * relative + lr * off_m / bias1 / ((second / bias2).sqrt() + 1e-8)
        bound = off_update + 2.5 * FP32_EPS * (p.detach().double().abs() + update)
        assert bool(((p.detach() - q.detach()).double().abs() <= bound).all()), f"step {t}"


def test_adamw_is_not_farther_from_float64_than_torch():
    """Than foreach, which decays by the float32 number nearest to 1 - lr * wd as the for-loop and ours do. Fused subtracts
    lr * wd * p instead, which rounds a smaller number: over hundreds of steps on weights that hardly move it is nearer."""
    which = "foreach"
    start = make_params([10_000])[0].detach()
    runs: dict[str, Tensor] = {}
    for name, module, dtype, options in (
        ("truth", torch.optim, torch.float64, {}),
        ("torch", torch.optim, torch.float32, {which: True}),
        ("ours", fused_l2, torch.float32, {}),
    ):
        p = torch.nn.Parameter(start.to(DEVICE, dtype, copy=True))
        optimizer = module.AdamW([p], lr=0.01, weight_decay=0.1, **options)
        generator = torch.Generator().manual_seed(0)
        for _ in range(300):
            p.grad = torch.randn(p.shape, generator=generator).to(DEVICE, dtype)
            optimizer.step()
        runs[name] = p.detach().double()
    error = {name: float((runs[name] - runs["truth"]).abs().mean()) for name in ("ours", "torch")}
    print(error)
    assert error["ours"] <= 1.1 * error["torch"]  # 10 % for chance: both are sums of 300 roundings in 10,000 elements


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # "is a prototype feature"
@each
def test_a_step_never_waits_for_the_device(name):
    params = moved(make_params(SIZES))
    optimizer = make(name, params)
    set_grads_on_device(params, 0)
    optimizer.step()
    grads = [[torch.randn_like(p) for p in params] for _ in range(5)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for new in grads:
            for p, g in zip(params, new, strict=True):
                p.grad = g
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.step()
        optimizer.drop_plan()
        optimizer.step()  # nor does making a plan
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each
def test_the_host_may_run_far_ahead(name):
    """Fifty steps queued behind a long wait on the device: every upload arrives with its own step's content."""
    on_cpu = make_params((1000, 65, 3))
    on_device = moved(on_cpu)
    optimizers = make(name, on_device), make(name, on_cpu)
    grads = []
    for i in range(51):
        set_grads(on_cpu, i)
        grads.append([p.grad for p in on_cpu])
    uploaded = [[g.to(DEVICE) for g in of_step] for of_step in grads]
    for params, optimizer, all_grads in ((on_device, optimizers[0], uploaded), (on_cpu, optimizers[1], grads)):
        for i, of_step in enumerate(all_grads):
            if i == 1 and params is on_device:
                torch.cuda.synchronize()
                torch.cuda._sleep(2_000_000_000)  # about a second
            for p, g in zip(params, of_step, strict=True):
                p.grad = g
            optimizer.param_groups[0]["lr"] *= 0.99
            optimizer.step()
        if params is on_device:
            assert len(next(iter(plan_of(optimizer).parts[0]._tables.values()))._ring) > 10  # it did run ahead
    assert_same_state(optimizers[0], on_device, optimizers[1], on_cpu)


@each
def test_T34_side_streams(name):
    on_cpu = make_params(SIZES)
    on_device = moved(on_cpu)
    optimizers = make(name, on_device), make(name, on_cpu)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for i in range(9):
        set_grads(on_cpu, i)
        optimizers[1].step()
        stream = streams[i % 3]
        stream.wait_stream(torch.cuda.current_stream())
        for other in streams:
            stream.wait_stream(other)
        with torch.cuda.stream(stream):
            give(on_device, on_cpu)
            optimizers[0].step()
    torch.cuda.synchronize()
    assert_same_state(optimizers[0], on_device, optimizers[1], on_cpu)


@each
def test_T34_another_current_device(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    on_cpu = make_params(SIZES)
    on_device = [torch.nn.Parameter(p.detach().to("cuda:1")) for p in on_cpu]
    optimizers = make(name, on_device), make(name, on_cpu)
    for i in range(3):
        set_grads(on_cpu, i)
        give(on_device, on_cpu)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.cuda.current_device() == 0
    assert_same_state(optimizers[0], on_device, optimizers[1], on_cpu)


@each
def test_cpu_and_cuda_parameters_in_one_optimizer(name):
    on_cpu = make_params(SIZES)
    mixed = [q if i % 2 else p for i, (p, q) in enumerate(zip(make_params(SIZES), moved(on_cpu), strict=True))]
    optimizers = make(name, mixed), make(name, on_cpu)
    for i in range(3):
        set_grads(on_cpu, i)
        give(mixed, on_cpu)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_state(optimizers[0], mixed, optimizers[1], on_cpu)


def test_T23_a_tensor_of_more_than_2_to_the_31_elements():
    count = 2**31 + 2**20 + 3
    if torch.cuda.mem_get_info()[0] < 3 * 2 * count:
        pytest.skip("needs 13 GB of GPU memory")
    p = torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16, device=DEVICE))
    p.grad = torch.full_like(p, 0.5)
    fused_l2.SGD([p], lr=0.5).step()
    assert bool((p[:1000] == 0.75).all())
    assert bool((p[-(2**21) :] == 0.75).all())
    assert int(sum((part != 0.75).sum() for part in p.detach().split(2**28))) == 0


@each
def test_T37_a_schedule_compiles_nothing(name, monkeypatch):
    monkeypatch.setattr(cuda, "_kernels", {})
    cuda.device(torch.device("cuda", torch.cuda.current_device()))._compiled.clear()
    compiled = compilations(monkeypatch)  # not those that another test may have made before
    params = moved(make_params(SIZES))
    optimizer = make(name, params)
    for i in range(20):
        set_grads_on_device(params, i)
        optimizer.param_groups[0]["lr"] = 1e-3 * (i + 1)
        optimizer.param_groups[0]["weight_decay"] = 0.01 * i
        optimizer.step()
        if i == 0:
            first = len(compiled)
            assert compiled.count("fused_l2_step") == 1  # or what counts here does not see compilations
    assert len(compiled) == first


def test_a_model_trains_and_its_checkpoint_goes_to_torch_and_back():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.LayerNorm(64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).to(
        DEVICE
    )
    x = torch.randn(256, 20, device=DEVICE)
    y = x[:, :1] * 2 - x[:, 1:2]
    optimizer: Any = fused_l2.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for i in range(200):
        if i == 100:
            saved = optimizer.state_dict()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            optimizer.load_state_dict(saved)
        if i == 110:
            saved = optimizer.state_dict()
            optimizer = fused_l2.AdamW(model.parameters(), lr=1e-2)
            optimizer.load_state_dict(saved)
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each
def test_statistics_are_those_of_the_cpu_engine(name, dtype):
    on_cpu = [*make_params(SIZES, dtype), *make_params((1000, 70_001))]
    on_device = moved(on_cpu)
    ours = [getattr(fused_l2, name)(p, **CASES[name], statistics=True, max_grad_norm=0.5) for p in (on_device, on_cpu)]
    for i in range(2):
        set_grads(on_cpu, i)
        give(on_device, on_cpu)
        figures = []
        for optimizer in ours:
            optimizer.step()
            figures.append(optimizer.statistics.as_dict())
        # Float64 sums in another order; the update is a float32 difference whose bits are the same.
        assert figures[0] == pytest.approx(figures[1], rel=1e-12)
    assert_same_state(ours[0], on_device, ours[1], on_cpu)


@each
@pytest.mark.parametrize("state_dtype", [None, "8bit"])
def test_stepping_in_the_backward_pass_has_the_bits_of_ordinary_steps(name, state_dtype):
    runs = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(64, 64, device=DEVICE) for _ in range(4)]
        model = torch.nn.Sequential(*layers)
        optimizer = getattr(fused_l2, name)(model.parameters(), **CASES[name], state_dtype=state_dtype, seed=1)
        stepping = fused_l2.step_in_backward(optimizer) if in_backward else None
        for i in range(5):
            generator = torch.Generator(DEVICE).manual_seed(i)
            model(torch.randn(8, 64, device=DEVICE, generator=generator)).square().mean().backward()
            assert stepping is None or all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] *= 0.9
        runs.append([p.detach() for p in model.parameters()])
    assert_same_bits(*runs, "parameter")


@each
def test_warmup_compiles_what_the_first_step_launches(name, monkeypatch):
    optimizer = make(name, moved(make_params(SIZES)))
    assert fused_l2.warmup(optimizer)
    compiled = compilations(monkeypatch)
    set_grads_on_device(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    assert compiled == []


@each
def test_parameters_that_go_to_the_cpu_and_back_between_steps(name):
    on_cpu = make_params(SIZES)
    on_device = moved(on_cpu)
    optimizers = make(name, on_device), make(name, on_cpu)
    for i in range(6):
        set_grads(on_cpu, i)
        optimizers[1].step()
        to = "cpu" if i % 3 == 1 else DEVICE
        for p, q in zip(on_device, on_cpu, strict=True):
            p.grad = None
            p.data = p.data.to(to)
            p.grad = q.grad.to(to)
            held = optimizers[0].state.get(p, {})
            for key, value in held.items():
                if key != "step":
                    held[key] = value.to(to)
        optimizers[0].step()
    assert_same_state(optimizers[0], on_device, optimizers[1], on_cpu)


@each
def test_the_step_bears_gradients_that_come_and_go(name):
    on_cpu = make_params(SIZES)
    on_device = moved(on_cpu)
    optimizers = make(name, on_device), make(name, on_cpu)
    for i in range(12):
        set_grads(on_cpu, i)
        for j, p in enumerate(on_cpu):
            if (i + j) % 3 == 0:
                p.grad = None
        give(on_device, on_cpu)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(back(on_device), back(on_cpu), "parameter")


def test_torch_compiled_training_and_a_grad_scaler():
    """float16 autocast with GradScaler: the scaler's own way and amp_scaling come to the same bits."""
    runs = []
    for amp_scaling in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1)).to(DEVICE)
        optimizer = fused_l2.AdamW(model.parameters(), lr=1e-2, amp_scaling=amp_scaling)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**60, growth_interval=3)  # the first steps overflow
        for i in range(80):
            x = torch.randn(32, 16, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(i))
            with torch.autocast(DEVICE, torch.float16):
                loss = (model(x).float() - x[:, :1]).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        runs.append([p.detach() for p in model.parameters()] + [torch.tensor(scaler.get_scale())])
    assert_same_bits(*runs)


def test_the_doctor_reads_parameters_on_the_device():
    import fused_l2.doctor

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
    reports = []
    for device in ("cpu", DEVICE):
        placed = copy.deepcopy(model).to(device)
        optimizer = torch.optim.AdamW(placed.parameters(), lr=1e-3, weight_decay=0.1)
        report = fused_l2.doctor.examine(optimizer, placed, n=1000, batch_size=10)
        reports.append((report.codes(), [pytest.approx(row.norm, rel=1e-6) for row in report.layers]))
    assert reports[0] == reports[1]


def test_capabilities_name_the_gpu():
    torch.zeros(1, device=DEVICE)
    told = fused_l2.capabilities()["cuda"]
    assert told.engine.startswith("Triton (")
    assert torch.cuda.get_device_name() in told.reason


@pytest.mark.sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    """No access outside of a tensor, no race in shared memory (only sums have some). Our own kernels only. A few minutes."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--kernel-regex", "kns=fused_l2", "--error-exitcode", "9"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or tensors lie side by side in one allocation
    script = [sys.executable, str(Path(__file__).with_name("sanitized.py")), DEVICE]
    done = subprocess.run([*command, *script], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
