"""The Triton kernels against the C++ library and the reference, by bits: interpreted from source, and compiled and emulated."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from comparing import assert_same_bits, set_grads, states
from torch import Tensor

pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")
pytest.importorskip("numpy")

import fused_l2
from fused_l2 import reference
from fused_l2.tables import coefficients
from fused_l2.tables.tensor_table import Flag, Rule

from .fake_cuda import FakeDevice, emulated, interpreted_kernel, step_side_by_side, tensors_of

DECAYS = (0, Flag.DECOUPLED, Flag.DECOUPLED | Flag.CAUTIOUS)
SGD_FLAGS = [
    momentum | maximize | decoupled
    for momentum, maximize, decoupled in itertools.product(
        (0, Flag.MOMENTUM, Flag.MOMENTUM | Flag.NESTEROV), (0, Flag.MAXIMIZE), DECAYS
    )
]
ADAM_FLAGS = [sum(f) for f in itertools.product(DECAYS, (0, Flag.MAXIMIZE), (0, Flag.AMSGRAD))]
RULES = [*((Rule.SGD, int(f)) for f in SGD_FLAGS), *((Rule.ADAM, int(f)) for f in ADAM_FLAGS)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
SIGNATURES = [
    (rule, flags, *dtypes)
    for (rule, flags), dtypes in itertools.product(RULES, DTYPES)
    if rule is Rule.ADAM or flags & Flag.MOMENTUM or dtypes[0] is dtypes[1]  # without a state its dtype does not matter
]
each_signature = pytest.mark.parametrize(
    "signature", SIGNATURES, ids=[f"{s[0].name}-{s[1]}-{s[2]}-{s[3]}".replace("torch.", "") for s in SIGNATURES]
)

# Empty first, in the middle and last (T10); below, at and beyond vectors, blocks and the smallest chunk of 1024.
SIZES = (0, 1, 2, 3, 4, 7, 8, 9, 0, 31, 127, 128, 129, 1000, 1023, 1024, 1025, 2049, 3072, 0)
FEW_SIZES = (0, 1, 7, 9, 0, 130, 1025, 0)  # for the interpreter, which is slow
STEPS = 3
# NaN, infinities, a zero with a sign, a denormal, what under- and overflows in some dtype.
SPECIAL = (float("nan"), float("inf"), float("-inf"), -0.0, 1e-42, 1e-30, 3e38)
ZEROS = (0.0, -0.0, 0.0, -0.0)  # of gradients and of parameters: every pair of signs


def padded(values: Tensor, offset: int) -> Tensor:
    """These values in poisoned memory, ``offset`` elements behind a multiple of 16 bytes."""
    lanes = 16 // values.element_size()
    memory = torch.full((values.numel() + 3 * lanes,), torch.nan, dtype=values.dtype)
    start = (-memory.data_ptr() // values.element_size()) % lanes + offset
    memory[start : start + values.numel()] = values
    return memory[start : start + values.numel()]


def poison_is_intact(view: Tensor) -> bool:
    memory = view.detach().new_empty(0).set_(view.untyped_storage())
    start = view.storage_offset()
    return bool(memory[:start].isnan().all() and memory[start + view.numel() :].isnan().all())


def make_params(sizes: tuple[int, ...], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    # Every third one misaligned, by one or by three elements; empty ones have nothing to align.
    offsets = [(0, 1, 3)[i % 3] for i in range(len(sizes))]
    values = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    for v in values:
        if v.numel() >= len(ZEROS):
            v[: len(ZEROS)] = torch.tensor((0.0, 0.0, -0.0, -0.0))
    return [torch.nn.Parameter(padded(v, o)) for v, o in zip(values, offsets, strict=True)]


def make_optimizer(rule: Rule, flags: int, params: list[Any], state_dtype: torch.dtype) -> Any:
    """Three groups that share a launch whatever their hyperparameters: with decay, without, with a lerp from the far end."""
    maximize, decoupled = bool(flags & Flag.MAXIMIZE), bool(flags & Flag.DECOUPLED)
    groups: list[dict[str, Any]] = [{"params": params[i::3]} for i in range(3)]
    if rule is Rule.SGD:
        momentum = 0.9 if flags & Flag.MOMENTUM else 0.0
        nesterov = bool(flags & Flag.NESTEROV)
        dampening = 0.0 if nesterov else 0.3
        groups[1] |= {"weight_decay": 0.0, "lr": 0.05}
        groups[2] |= {"momentum": momentum / 2, "dampening": dampening / 2}
        optimizer: Any = fused_l2.SGD(
            groups, lr=0.1, momentum=momentum, dampening=dampening if momentum else 0.0, weight_decay=0.1, nesterov=nesterov,
            maximize=maximize, decoupled_weight_decay=decoupled, cautious=bool(flags & Flag.CAUTIOUS),
        )  # fmt: skip
        names = ["momentum_buffer"] if momentum else []
    else:
        groups[1] |= {"weight_decay": 0.0, "eps": 1e-3}
        groups[2] |= {"betas": (0.3, 0.9)}  # 1 - beta1 >= 0.5
        optimizer = fused_l2.Adam(
            groups, lr=0.01, weight_decay=0.1, amsgrad=bool(flags & Flag.AMSGRAD), maximize=maximize,
            decoupled_weight_decay=decoupled, cautious=bool(flags & Flag.CAUTIOUS),
        )  # fmt: skip
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if flags & Flag.AMSGRAD else [])]
    if state_dtype is not params[0].dtype:  # as after loading float32 states
        for p in params:
            optimizer.state[p] = {name: torch.zeros_like(p, dtype=state_dtype) for name in names}
            if rule is Rule.ADAM:
                optimizer.state[p]["step"] = torch.tensor(0.0)
    return optimizer


def give_grads(params: list[Any], step: int) -> None:
    """New gradients, misaligned and poisoned as their parameters. One tensor joins a step later than the others.

    In the second step some gradients are no ordinary numbers, so that moments are that in the third.
    """
    set_grads(params, step)
    for i, p in enumerate(params):
        if p.numel() >= len(ZEROS):
            p.grad[: len(ZEROS)] = torch.tensor(ZEROS)
        if step == 1 and p.numel() > len(SPECIAL):
            p.grad[-len(SPECIAL) :] = torch.tensor(SPECIAL, dtype=torch.float64).to(p.dtype)
        p.grad = padded(p.grad, (0, 1, 3)[i % 3])
    if step == 0:
        params[5].grad = None


def state_names(optimizer: Any, p: Tensor) -> list[str]:
    return [name for name in optimizer.state[p] if name != "step"]


def check(run: Any, sizes: tuple[int, ...], monkeypatch: Any, signature: tuple[Any, ...]) -> int:
    """Step side by side on the fake device and on the CPU. Returns how many words were compared."""
    rule, flags, param_dtype, state_dtype = signature
    ours, theirs = make_params(sizes, param_dtype), make_params(sizes, param_dtype)
    optimizer = make_optimizer(rule, flags, ours, state_dtype)
    on_cpu = make_optimizer(rule, flags, theirs, state_dtype)
    device = step_side_by_side(run, monkeypatch, (optimizer, ours), (on_cpu, theirs), give_grads, STEPS)
    assert len(device.launches) == STEPS  # all groups, whatever the step counts
    words = 0
    for mine, other in zip(ours, theirs, strict=True):
        names = state_names(on_cpu, other)
        a = [mine.detach(), *states(optimizer, [mine], *names)]
        b = [other.detach(), *states(on_cpu, [other], *names)]
        assert_same_bits(a, b, f"{signature}, size {mine.numel()}:")
        words += sum(t.numel() for t in a)
        assert poison_is_intact(mine)
        assert mine.grad is None or poison_is_intact(mine.grad)
    return words


@pytest.mark.sweep(9)
@each_signature
def test_T10_T24_compiled_kernels_have_the_bits_of_the_library(signature, monkeypatch):
    words = check(emulated(90), SIZES, monkeypatch, signature)
    assert words * len(SIGNATURES) > 500_000


@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_other_architectures(arch, dtypes, monkeypatch):
    for rule, flags in ((Rule.ADAM, Flag.DECOUPLED | Flag.AMSGRAD), (Rule.SGD, Flag.MOMENTUM | Flag.NESTEROV)):
        check(emulated(arch), SIZES, monkeypatch, (rule, int(flags), *dtypes))


@pytest.mark.sweep(9)
@each_signature
def test_the_source_has_the_bits_of_the_library(signature, monkeypatch):
    check(interpreted_kernel, FEW_SIZES, monkeypatch, signature)


@pytest.mark.parametrize("misaligned", ["param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_T24_one_misaligned_tensor_of_a_row_is_enough(misaligned, monkeypatch):
    """Accessed 128 bits at a time it would be a misaligned access, which the emulator refuses."""
    states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    values = {name: padded(torch.rand(1029), int(name == misaligned)) for name in ("param", "grad", *states)}
    p = torch.nn.Parameter(values["param"])
    p.grad = values["grad"]
    optimizer = fused_l2.AdamW([p], amsgrad=True)
    optimizer.state[p] = {"step": torch.tensor(3.0), **{name: values[name] for name in states}}
    device = FakeDevice(emulated(90))
    device.accessible = lambda: tensors_of(optimizer)
    with device.in_place(monkeypatch):
        optimizer.step()
    device.synchronize()
    assert device.launches
    assert all(map(poison_is_intact, values.values()))


@pytest.mark.parametrize("run", [emulated(90), interpreted_kernel], ids=["compiled", "interpreted"])
def test_T23_offsets_beyond_2_to_the_31_elements(run):
    """The last chunk of a tensor of 2^33 + 1029 elements, of which only this chunk exists."""
    first, count, chunk = 2**33, 1024 + 5, 1024
    tensors = [padded(torch.rand(count), 0) for _ in range(4)]
    row = coefficients.adam(coefficients.AdamNumbers(0.1, 0.9, 0.999, 1e-8, 0.1), True, 1)
    param, (exp_avg, exp_avg_sq) = reference.adam(tensors[0], tensors[1], tensors[2:], row, Flag.DECOUPLED)
    param_at, grad_at, *states_at = (t.data_ptr() - 4 * first for t in tensors)
    table, grads = torch.tensor([[param_at, 0, *states_at, 0, 0, first + count, 0, 0, 0, 0, 0, 0]]), torch.tensor([grad_at])
    words = torch.tensor([number << 32 for number in (first // chunk, first // chunk + 1)])
    scalars = torch.tensor(row)
    which = ("step", Rule.ADAM, int(Flag.DECOUPLED), torch.float32, torch.float32, torch.float32)
    arguments = (words.data_ptr(), table.data_ptr(), chunk, 0, grads.data_ptr(), scalars.data_ptr(), 0)
    run(which, [*tensors, table, grads, words, scalars], len(words), arguments)
    assert_same_bits([tensors[0], *tensors[2:]], [param, exp_avg, exp_avg_sq])
    assert all(map(poison_is_intact, tensors))
