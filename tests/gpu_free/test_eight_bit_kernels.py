"""The Triton kernels of 8-bit states against the C++ library, by bits, compiled and interpreted."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from comparing import assert_same_bits, set_grad

pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")
pytest.importorskip("numpy")

from test_eight_bits import CASES, MODES, VARIANTS, draw, same_codes

import fused_l2
from fused_l2.tables.tensor_table import Flag, Rule

from . import aot
from .fake_cuda import emulated, interpreted_kernel, step_side_by_side
from .test_kernel_bits import SPECIAL, padded, poison_is_intact

# Elements in one chunk and in several; blocks that are full and not; a tensor that keeps float32 between the others.
SHAPES = ((64, 64), (33,), (67, 96), (1, 4128), (33, 2, 64))
FEW_SHAPES = ((33, 128), (7,), (1, 4128))
SIGNATURES = [*((p, p, m) for p in MODES for m in MODES[p]), (torch.bfloat16, torch.float32, "remainder8")]
each_rule = pytest.mark.parametrize("rule", ["SGD", "Adam"])


def build(rule: str, shapes: Any, param: torch.dtype, mode: str, **options: Any) -> tuple[list[Any], Any]:
    params = []
    for i, shape in enumerate(shapes):  # every third one misaligned
        value = draw(shape, i, special=False).to(param)
        params.append(torch.nn.Parameter(padded(value.flatten(), (0, 1, 3)[i % 3]).view(shape)))
    settings = {**CASES["SGD" if rule == "SGD" else "AdamW"], **options}
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.05}]
    return params, getattr(fused_l2, rule)(groups, **settings, low_precision=mode, state_dtype="8bit", seed=11)


def give(params: list[Any], step: int, dtype: torch.dtype) -> None:
    for i, p in enumerate(params):
        grad = draw(p.shape, 100 * step + i, special=False).to(dtype)
        if step == 1 and p.numel() > 100:
            grad.view(-1)[40 : 40 + len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
        set_grad(p, padded(grad.flatten(), (0, 1, 3)[i % 3]).view(p.shape))


def check(run: Any, shapes: Any, monkeypatch: Any, rule: str, signature: tuple[Any, ...], **options: Any) -> None:
    param, grad, mode = signature
    ours, optimizer = build(rule, shapes, param, mode, **options)
    theirs, on_cpu = build(rule, shapes, param, mode, **options)
    step_side_by_side(run, monkeypatch, (optimizer, ours), (on_cpu, theirs), partial(give, dtype=grad))
    for mine, other in zip(ours, theirs, strict=True):
        where = f"{signature}, shape {tuple(mine.shape)}: "
        assert_same_bits(mine.detach(), other.detach(), where + "parameter")
        a, b = optimizer.state[mine], on_cpu.state[other]
        assert a.keys() == b.keys()
        for key in a:
            if key.endswith("_8bit"):
                same_codes(key.removesuffix("_8bit"), a, b)
            else:
                assert_same_bits(a[key], b[key], where + key)
        assert poison_is_intact(mine)


@pytest.mark.sweep(5)
@each_rule
@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda s: "-".join(str(x).removeprefix("torch.") for x in s))
def test_compiled_kernels_have_the_bits_of_the_library(rule, signature, monkeypatch):
    check(emulated(90), SHAPES, monkeypatch, rule, signature)


@pytest.mark.sweep(5)
@each_rule
@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda s: "-".join(str(x).removeprefix("torch.") for x in s))
def test_the_source_has_the_bits_of_the_library(rule, signature, monkeypatch):
    check(interpreted_kernel, FEW_SHAPES, monkeypatch, rule, signature)


@pytest.mark.sweep(5)
@pytest.mark.parametrize(("rule", "variant"), [(r, v) for r in VARIANTS for v in VARIANTS[r] if v], ids=str)
@pytest.mark.parametrize("run", [emulated(90), interpreted_kernel], ids=["compiled", "interpreted"])
def test_every_flag(run, rule, variant, monkeypatch):
    shapes = FEW_SHAPES if run is interpreted_kernel else SHAPES
    check(run, shapes, monkeypatch, rule, (torch.bfloat16, torch.bfloat16, "remainder8"), **variant)


@each_rule
def test_with_statistics_clipping_and_skipping(rule, monkeypatch):
    options = {"statistics": True, "max_grad_norm": 1.0, "skip_if_nonfinite": True}
    check(emulated(90), FEW_SHAPES, monkeypatch, rule, (torch.bfloat16, torch.bfloat16, "remainder8"), **options)


@each_rule
@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures(arch, rule, monkeypatch):
    for signature in ((torch.bfloat16, torch.bfloat16, "remainder8"), (torch.float32, torch.float32, "round")):
        check(emulated(arch), SHAPES, monkeypatch, rule, signature)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16], ids=str)
def test_no_spills_and_wide_accesses(param, arch, capsys):
    """bfloat16: eight elements a thread, 128 bits; float32: four, 128 bits, and a word of codes."""
    half = param is torch.bfloat16
    flags = int(Flag.DECOUPLED | Flag.EIGHT_BIT | (Flag.REMAINDER8 if half else 0))
    code = aot.machine_code(aot.compile_for(arch, Rule.ADAM, flags, param, param, torch.float32))
    widths = code.widths()
    per_element = len(code.vector_loop()) / (8 if half else 4)
    with capsys.disabled():
        print(f"\nAdamW 8bit {param} sm_{arch}: {code.registers} registers, {per_element:.1f} instructions an element")
    codes = ".64" if half else ""
    kept = int(half)
    assert widths == {
        "LDG.E.128": 2, "STG.E.128": 1, f"LDG.E{codes}": 2 + kept, f"STG.E{codes}": 2 + kept, "LDG.E.U8": 2, "STG.E.U8": 2,
    }  # fmt: skip
    assert code.local_bytes == 0
    assert code.registers <= 128
