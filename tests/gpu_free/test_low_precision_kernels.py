"""The Triton kernels of low-precision modes and of mixed dtypes against the C++ library, by bits, compiled and interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import assert_same_bits, make, set_grad

pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")
pytest.importorskip("numpy")

from fused_l2.tables.modes import Mode
from fused_l2.tables.tensor_table import Flag, Rule

from . import aot
from .fake_cuda import emulated, interpreted_kernel, step_side_by_side
from .test_kernel_bits import FEW_SIZES, SIZES, give_grads, make_params, poison_is_intact

MODES = ["master", "remainder", "kahan", "stochastic", "remainder8"]
HALVES = [torch.bfloat16, torch.float16]
# Modes with what they complete; gradients and states of another dtype than the parameter's.
SIGNATURES = [
    *((mode, p, p, s) for mode in MODES for p in HALVES for s in (torch.float32, torch.bfloat16)),
    *(("round", p, g, s) for p, g, s in (
        (torch.float32, torch.bfloat16, torch.float32), (torch.float32, torch.float16, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.bfloat16),
    )),
    ("remainder", torch.bfloat16, torch.float32, torch.float32),
]  # fmt: skip
SIGNATURES = [s for s in SIGNATURES if not (s[0].startswith("remainder") and s[1] is torch.float16)]
each_signature = pytest.mark.parametrize(
    "signature", SIGNATURES, ids=lambda s: "-".join(str(x).removeprefix("torch.") for x in s)
)
each_rule = pytest.mark.parametrize("name", ["SGD", "AdamW"])


def build(name: str, params: list[Any], signature: tuple[Any, ...], **options: Any) -> Any:
    mode, _, _, state = signature
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.05}]
    return make(name, groups, low_precision=mode, state_dtype=state, seed=11, **options)


def check(run: Any, sizes: tuple[int, ...], monkeypatch: Any, name: str, signature: tuple[Any, ...], **options: Any) -> None:
    _, param_dtype, grad_dtype, _ = signature
    ours, theirs = make_params(sizes, param_dtype), make_params(sizes, param_dtype)
    optimizer, on_cpu = build(name, ours, signature, **options), build(name, theirs, signature, **options)

    def give(params: list[Any], step: int) -> None:
        give_grads(params, step)
        for p in params:
            if p.grad is not None:
                set_grad(p, p.grad.to(grad_dtype))

    step_side_by_side(run, monkeypatch, (optimizer, ours), (on_cpu, theirs), give)
    for mine, other in zip(ours, theirs, strict=True):
        assert_same_bits(mine.detach(), other.detach(), f"{signature}, size {mine.numel()}: parameter")
        assert optimizer.state[mine].keys() == on_cpu.state[other].keys()
        for key, value in optimizer.state[mine].items():
            assert_same_bits(value, on_cpu.state[other][key], f"{signature}, size {mine.numel()}: {key}")
        assert poison_is_intact(mine)


@pytest.mark.sweep(5)
@each_rule
@each_signature
def test_compiled_kernels_have_the_bits_of_the_library(name, signature, monkeypatch):
    check(emulated(90), SIZES, monkeypatch, name, signature)


@pytest.mark.sweep(5)
@each_rule
@each_signature
def test_the_source_has_the_bits_of_the_library(name, signature, monkeypatch):
    check(interpreted_kernel, FEW_SIZES, monkeypatch, name, signature)


@pytest.mark.parametrize("mode", MODES)
def test_with_statistics_and_clipping(mode, monkeypatch):
    signature = (mode, torch.bfloat16, torch.bfloat16, torch.float32)
    check(emulated(90), SIZES, monkeypatch, "AdamW", signature, statistics=True, max_grad_norm=1.0)


@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("mode", MODES)
def test_other_architectures(mode, arch, monkeypatch):
    check(emulated(arch), SIZES, monkeypatch, "AdamW", (mode, torch.bfloat16, torch.bfloat16, torch.float32))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_spills_and_wide_accesses(mode, arch, capsys):
    """float32 moments 128 bits at a time, 16-bit tensors 64: four elements a thread."""
    flags = int(Flag.DECOUPLED | Mode[mode.upper()])
    code = aot.machine_code(aot.compile_for(arch, Rule.ADAM, flags, torch.bfloat16, torch.bfloat16, torch.float32))
    widths = code.widths()
    with capsys.disabled():
        per_element = len(code.vector_loop()) / 4
        print(f"\nAdamW {mode} sm_{arch}: {code.registers} registers, {per_element:.1f} instructions an element")
    kept = {"master": ".128", "remainder": ".64", "kahan": ".64", "remainder8": ""}.get(mode)  # an int8 each: one word
    expected = {"LDG.E.128": 2, "STG.E.128": 2, "LDG.E.64": 2, "STG.E.64": 1}
    if kept is not None:
        for access in ("LDG.E", "STG.E"):
            expected[access + kept] = expected.get(access + kept, 0) + 1
    assert widths == expected
    assert code.local_bytes == code.shared_bytes == 0
    assert code.registers <= 96
