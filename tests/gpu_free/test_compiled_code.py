"""What the compiler makes of the kernels, for GPUs that need not be there: widths, arithmetic, what is compiled in.

test_machine_code.py has what the assembler makes of that."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")

import triton

from fused_l2.kernels import launch
from fused_l2.tables.tensor_table import Flag, Rule

from . import aot
from .test_kernel_bits import SIGNATURES

ADAMW = int(Flag.DECOUPLED)
NESTEROV = int(Flag.MOMENTUM | Flag.NESTEROV)


def elements_per_thread(param: torch.dtype, state: torch.dtype) -> int:
    return 16 // max(param.itemsize, state.itemsize)


def compile_signature(arch: int | str, signature: tuple[Rule, int, torch.dtype, torch.dtype]) -> Any:
    """With gradients of the parameter's dtype."""
    rule, flags, param, state = signature
    return aot.compile_for(arch, rule, flags, param, param, state)


@pytest.mark.sweep(9)
@pytest.mark.parametrize("signature", SIGNATURES, ids=str)
def test_no_kernel_spills_and_each_access_is_as_wide_as_can_be(signature):
    """Every dtype signature on sm_90, where the widest dtype of a bucket is accessed 128 bits at a time."""
    rule, flags, param, state = signature
    compiled = compile_signature(90, signature)
    registers, local_bytes, shared_bytes = aot.resources(compiled)
    assert local_bytes == shared_bytes == 0
    assert registers <= 96
    bits = {d: 8 * d.itemsize * elements_per_thread(param, state) for d in (param, state)}
    ptx = compiled.asm["ptx"]
    wide = re.findall(r"(?:ld|st)\.global\.v(\d)\.b(\d+)", ptx)
    states = 0 if rule is Rule.SGD and not flags & Flag.MOMENTUM else 1
    expected = {bits[param]} | ({bits[state]} if states else set())
    expected.discard(32)
    assert {int(n) * int(width) for n, width in wide} == expected


@pytest.mark.sweep(9)
@pytest.mark.parametrize("signature", SIGNATURES, ids=str)
def test_every_operation_is_ieee(signature):
    """No approximate division or root, no flush to zero, no product that may be fused: each says how it rounds."""
    ptx = compile_signature(90, signature).asm["ptx"]
    floating = [
        o for o in re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.]+)", ptx, re.MULTILINE) if re.search(r"\.(f32|f64|bf16|f16)", o)
    ]
    arithmetic = [o for o in floating if o.split(".")[0] in ("add", "sub", "mul", "fma", "div", "sqrt", "rcp", "rsqrt", "mad")]
    assert arithmetic
    assert not [o for o in arithmetic if ".rn" not in o]
    assert not [o for o in floating if "approx" in o or "ftz" in o or "full" in o]


@pytest.mark.parametrize("signature", [s for s in SIGNATURES if s[1] in (ADAMW, NESTEROV)], ids=str)
def test_amd_gpus_compile_too(signature):
    """Compiled, not run: nobody has measured or tested this on an AMD GPU."""
    code = compile_signature("gfx942", signature).asm["amdgcn"]
    assert "v_fma" in code
    assert "scratch_store" not in code


def test_T37_hyperparameters_are_not_compiled_in():
    """One kernel whatever lr, betas, eps and decay: they are read from the coefficient rows at run time."""
    ptx = aot.compile_for(90, Rule.ADAM, ADAMW).asm["ptx"]
    constants = set(re.findall(r"\b0f[0-9A-F]{8}\b", ptx))
    assert constants <= {"0f00000000", "0f3F000000", "0fBF800000"}  # 0; torch.lerp's 0.5 and 1 - beta1 - 1


def test_T38_nothing_is_autotuned():
    assert type(launch.fused_l2_step) is triton.JITFunction
