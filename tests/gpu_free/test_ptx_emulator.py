"""The emulator itself: each operation against what it should be, and that it notices what a kernel must not do."""

from __future__ import annotations

import re
import struct
from typing import Any

import pytest
import torch

pytest.importorskip("numpy")
pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")

import numpy as np

from fused_l2.tables import coefficients
from fused_l2.tables.tensor_table import Flag, Rule, chunk_map

from . import aot
from .ptx_emulator import Emulator, InvalidAccess, Kernel, UnknownInstruction


def compute(body: str, *inputs: int, size: int = 4, shared_bytes: int = 0) -> int:
    """Run a few instructions on %rd1, %rd2, ... and return the bits of the 4-byte %r9 or the 8-byte %rd9 they leave."""
    parameters = ",\n".join(f"\t.param .u64 p{i}" for i in range(len(inputs) + 1))
    loads = "\n".join(f"\tld.param.b64 %rd{i}, [p{i}];" for i in range(len(inputs) + 1))
    register = "%r9" if size == 4 else "%rd9"
    ptx = (
        f".visible .entry test(\n{parameters}\n)\n.reqntid 1\n{{\n{loads}\n{body}\n"
        f"\tst.global.b{8 * size} [%rd0], {register};\n\tret;\n\n}}"
    )
    out = torch.zeros(1, dtype=torch.int64)
    emulator = Emulator(ptx, shared_bytes)
    emulator.register(out, "out")
    emulator.run(1, [out.data_ptr(), *inputs])
    return int(out.item()) & ((1 << 8 * size) - 1)


def f32(x: float) -> int:
    return int.from_bytes(struct.pack("<f", x), "little")


def f64(x: float) -> int:
    return int.from_bytes(struct.pack("<d", x), "little")


def test_float32_operations_round_to_nearest():
    r = np.random.default_rng(0).standard_normal(3).astype("f4")
    a, b, c = (float(x) for x in r)
    load = f"mov.b32 %r1, 0f{f32(a):08X};\nmov.b32 %r2, 0f{f32(b):08X};\nmov.b32 %r3, 0f{f32(c):08X};\n"
    x, y = np.float32(a), np.float32(b)
    for instruction, expected in (
        ("add.rn.f32 %r9, %r1, %r2;", x + y),
        ("sub.rn.f32 %r9, %r1, %r2;", x - y),
        ("mul.rn.f32 %r9, %r1, %r2;", x * y),
        ("div.rn.f32 %r9, %r1, %r2;", x / y),
        ("sqrt.rn.f32 %r9, 0f40490FDB;", np.sqrt(np.float32(np.pi))),
        ("neg.f32 %r9, %r1;", -x),
    ):
        assert compute(load + instruction) == f32(float(expected)), instruction


def test_fma_rounds_once():
    a = 1 + 2**-23  # a*a - 1 needs 47 bits
    expected = a * a - (1 + 2**-22)  # exact in float64
    body = f"mov.b32 %r1, 0f{f32(a):08X};\nmov.b32 %r2, 0f{f32(-(1 + 2**-22)):08X};\nfma.rn.f32 %r9, %r1, %r1, %r2;"
    assert expected == 2.0**-46
    assert compute(body) == f32(expected)
    b = 1 + 2**-52
    body = f"mov.b64 %rd1, 0d{f64(b):016X};\nmov.b64 %rd2, 0d{f64(-(1 + 2**-51)):016X};\nfma.rn.f64 %rd9, %rd1, %rd1, %rd2;"
    assert compute(body, size=8) == f64(2.0**-104)


def test_pairs_of_float32():
    pair = f"mov.b32 %r1, 0f{f32(1.5):08X};\nmov.b32 %r2, 0f{f32(-2.0):08X};\nmov.b64 %rd1, {{%r1, %r2}};\n"
    both = compute(pair + "add.rn.f32x2 %rd9, %rd1, %rd1;", size=8)
    assert both == f32(3.0) | f32(-4.0) << 32
    assert compute(pair + "mov.b64 {%r8, %r9}, %rd1;") == f32(-2.0)


def test_comparisons_of_pairs():
    """1 and NaN against 1 and 2, the first one in the lower half, which belongs to the first predicate."""
    for type_, one, two, nan in (("f16x2", 0x3C00, 0x4000, 0x7E00), ("bf16x2", 0x3F80, 0x4000, 0x7FC0)):
        pairs = f"mov.b32 %r1, {nan << 16 | one};\nmov.b32 %r2, {two << 16 | one};\n"
        for comparison, expected in (("ge", 1), ("neu", 2), ("nan", 2), ("lt", 0)):
            body = f"setp.{comparison}.{type_} %p1|%p2, %r1, %r2;\nselp.b32 %r3, 1, 0, %p1;\nselp.b32 %r4, 2, 0, %p2;\n"
            assert compute(pairs + body + "or.b32 %r9, %r3, %r4;") == expected, (type_, comparison)


def test_conversions():
    rounded = {1.0: 0x3F80, 1 + 2**-8: 0x3F80, 1 + 3 * 2**-8: 0x3F82, float("nan"): 0x7FFF, float("inf"): 0x7F80}
    for value, bits in rounded.items():  # ties to even
        body = f"mov.b32 %r1, 0f{f32(value):08X};\ncvt.rn.bf16.f32 %rs1, %r1;\ncvt.f32.bf16 %r9, %rs1;"
        assert compute(body) == bits << 16
        body = f"mov.b32 %r1, 0f{f32(value):08X};\nmov.b32 %r2, 0f40000000;\ncvt.rn.bf16x2.f32 %r9, %r2, %r1;"
        assert compute(body) == 0x4000 << 16 | bits  # the first operand is the upper half
    half = f"mov.b32 %r1, 0f{f32(65520.0):08X};\ncvt.rn.f16.f32 %rs1, %r1;\ncvt.f32.f16 %r9, %rs1;"
    assert compute(half) == f32(float("inf"))
    assert compute("cvt.u32.u64 %r9, %rd1;", (5 << 32) + 7) == 7
    assert compute("mov.b32 %r1, 0x01000003;\ncvt.rn.f32.u32 %r9, %r1;") == f32(2.0**24 + 4)  # ties to even


def test_bytes_are_permuted():
    words = "mov.b32 %r1, 0x33221100;\nmov.b32 %r2, 0x77665544;\n"
    for selector, expected in (
        ("0x5410U", 0x55441100),
        ("0x7632U", 0x77663322),
        ("0x0246U", 0x00224466),
        ("0xB8E1U", 0x00000011),
        ("0x9F3AU", 0x00003300),
    ):
        assert compute(words + f"prmt.b32 %r9, %r1, %r2, {selector};") == expected
    negative = "mov.b32 %r1, 0x80;\nmov.b32 %r2, 0;\n"  # 8 asks for the sign of a byte
    assert compute(negative + "prmt.b32 %r9, %r1, %r2, 0x8880U;") == 0xFFFFFF80
    with pytest.raises(NotImplementedError):
        compute(words + "prmt.b32.f4e %r9, %r1, %r2, 1;")


def test_integers():
    for instruction, expected in (
        ("mad.lo.s64 %rd9, %rd1, 72, %rd2;", 1007 * 72 + 9),
        ("mul.lo.s64 %rd9, %rd1, %rd2;", 1007 * 9),
        ("add.s64 %rd9, %rd1, -8;", 999),
        ("sub.s64 %rd9, %rd1, %rd2;", 998),
        ("and.b64 %rd9, %rd1, 255;", 1007 & 255),
        ("or.b64 %rd9, %rd1, %rd2;", 1007 | 9),
        ("xor.b64 %rd9, %rd1, %rd2;", 1007 ^ 9),
        ("shl.b64 %rd9, %rd1, 3;", 1007 << 3),
        ("shr.s64 %rd9, %rd1, 3;", 1007 >> 3),
        ("min.s64 %rd9, %rd1, %rd2;", 9),
        ("bfe.u64 %rd9, %rd1, 3, 4;", 1007 >> 3 & 15),
    ):
        assert compute(instruction, 1007, 9, size=8) == expected, instruction
    assert compute("cvt.u32.u64 %r1, %rd1;\nmul.wide.s32 %rd9, %r1, 4;", -3 & 0xFFFFFFFF, size=8) == -12 & (2**64 - 1)
    assert compute("mad.wide.u32 %rd9, 3, 8, %rd1;", 100, size=8) == 124
    assert compute("cvt.u32.u64 %r1, %rd1;\nshr.u32 %r9, %r1, 29;", 0x80000000) == 4


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [("eq", "010"), ("ne", "100"), ("neu", "101"), ("lt", "100"), ("le", "110"), ("gt", "000"), ("ge", "010"), ("nan", "001")],
)
def test_comparisons_of_1_with_2_and_1_and_nan(comparison, expected):
    got = ""
    for other in (2.0, 1.0, float("nan")):
        body = f"setp.{comparison}.f32 %p1, 0f3F800000, 0f{f32(other):08X};\nselp.b32 %r9, 1, 0, %p1;"
        got += str(compute(body))
    assert got == expected


def test_min_and_max_of_a_number_and_nan_are_the_number():
    load = f"mov.b32 %r1, 0f{f32(float('nan')):08X};\nmov.b32 %r2, 0f{f32(2.0):08X};\n"
    assert compute(load + "min.f32 %r9, %r1, %r2;") == f32(2.0)
    assert compute(load + "min.NaN.f32 %r9, %r1, %r2;") & 0x7F800000 == 0x7F800000


def test_lanes_part_at_branches_and_meet_again():
    """Thread t adds 1 to its number t times and then doubles it."""
    ptx = """
.visible .entry loop(.param .u64 out)
.reqntid 8
{
	ld.param.b64 %rd1, [out];
	mov.u32 %r1, %tid.x;
	mov.b32 %r2, %r1;
	mov.b32 %r3, 0;
$L_head:
	setp.ge.s32 %p1, %r3, %r1;
	@%p1 bra $L_done;
	add.s32 %r2, %r2, 1;
	add.s32 %r3, %r3, 1;
	bra.uni $L_head;
$L_done:
	add.s32 %r2, %r2, %r2;
	mul.wide.s32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	st.global.b32 [%rd3], %r2;
	ret;
}
"""
    out = torch.zeros(8, dtype=torch.int32)
    emulator = Emulator(ptx)
    emulator.register(out, "out")
    emulator.run(1, [out.data_ptr()])
    assert out.tolist() == [4 * t for t in range(8)]


def shuffled(instruction: str, lanes: str = "") -> list[int]:
    """What %r9 of each of 64 threads is after an instruction, where %r1 was ten times the thread's number."""
    ptx = f"""
.visible .entry shuffled(.param .u64 out)
.reqntid 64
{{
	ld.param.b64 %rd1, [out];
	mov.u32 %r1, %tid.x;
	mul.wide.s32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	and.b32 %r2, %r1, 1;
	mul.lo.s32 %r3, %r1, 10;
	mov.b32 %r9, 7;
	setp.eq.s32 %p1, %r2, 0;
	{lanes}{instruction}
	st.global.b32 [%rd3], %r9;
	ret;
}}
"""
    out = torch.zeros(64, dtype=torch.int32)
    emulator = Emulator(ptx)
    emulator.register(out, "out")
    emulator.run(1, [out.data_ptr()])
    values: list[int] = out.tolist()
    return values


def test_values_of_other_lanes_of_a_warp():
    for distance in (1, 16):
        assert shuffled(f"shfl.sync.bfly.b32 %r9, %r3, {distance}, 31, -1;") == [10 * (t ^ distance) for t in range(64)]
    assert shuffled("shfl.sync.idx.b32 %r9, %r3, 5, 31, -1;") == [50] * 32 + [370] * 32
    assert shuffled("shfl.sync.idx.b32 %r9, %r3, %r2, 31, 0xffffffff;") == [10 * (t // 32 * 32 + t % 2) for t in range(64)]


def test_the_largest_value_of_a_warp():
    assert shuffled("redux.sync.max.s32 %r9, %r3, -1;") == [310] * 32 + [630] * 32


def test_a_shuffle_that_some_lanes_do_not_reach_is_noticed():
    with pytest.raises(InvalidAccess, match="not all lanes"):
        shuffled("shfl.sync.bfly.b32 %r9, %r3, 1, 31, -1;", "@%p1 ")


@pytest.mark.parametrize(
    "instruction",
    [
        "shfl.sync.bfly.b32 %r9, %r3, 1, 7, -1;",  # within eight lanes
        "shfl.sync.bfly.b32 %r9, %r3, 1, 31, 0xffff;",  # of half a warp
        "shfl.sync.bfly.b32 %r9, %r3, 33, 31, -1;",
        "shfl.sync.down.b32 %r9, %r3, 1, 31, -1;",
        "redux.sync.min.s32 %r9, %r3, -1;",
        "redux.sync.max.s32 %r9, %r3, 0xffff;",
        "shfl.bfly.b32 %r9, %r3, 1, 31;",
    ],
)
def test_other_shuffles_are_refused(instruction):
    with pytest.raises((NotImplementedError, ValueError)):
        shuffled(instruction)


@pytest.mark.parametrize(
    "instruction",
    [
        "sqrt.approx.f32 %r9, %r1;",
        "div.full.f32 %r9, %r1, %r1;",
        "mul.f32 %r9, %r1, %r1;",  # may be fused with an addition
        "fma.rn.ftz.f32 %r9, %r1, %r1, %r1;",
        "ex2.approx.f32 %r9, %r1;",
        "atom.global.add.f32 %r9, [%rd1], %r1;",
        "st.shared::cluster.b32 [%r1], %r1;",
        "ld.local.b32 %r9, [%r1];",
        "cvt.rn.e4m3x2.f32 %r9, %r1, %r1;",
        "setp.ltu.f32 %p1, %r1, %r1;",
        "mov.u32 %r9, %laneid;",
        "mov.u32 %r9, %nctaid.x;",
    ],
)
def test_what_is_not_ieee_or_not_known_is_refused(instruction):
    """By name, with the kernel and the versions, and as no other failure is: a new compiler is told from a wrong kernel."""
    with pytest.raises(UnknownInstruction, match=r"^kernel test, PTX .*, triton \d.*does not know `") as refused:
        compute("mov.b32 %r1, 0f3F800000;\n" + instruction)
    assert instruction.rstrip(";") in str(refused.value)


def test_the_version_that_an_unknown_instruction_came_with_is_named(ptx):
    strange = re.sub(r"\n\s+ret;", "\n\tmov.u32 %r1, %laneid;\n\tret;", ptx)
    with pytest.raises(UnknownInstruction, match=r"^kernel fused_l2_\w+, PTX \d\.\d for sm_90a?, triton \d"):
        Launch(8).run(strange)


def test_shared_memory_of_the_program_has_two_names():
    """Triton 3.8 writes shared::cta for what others write shared for."""
    body = "mov.b32 %r1, 0;\nst.shared::cta.b32 [%r1+4], 77;\nld.shared.b32 %r9, [%r1+4];"
    assert compute(body, shared_bytes=8) == 77


# What a broken kernel would do.


class Launch:
    """One tensor of n elements, ready to be stepped by the compiled AdamW kernel.

    Around it, its gradient and its states lie more elements than a program steps, which belong to no tensor: an access beyond
    one of them cannot fall into another by chance.
    """

    GUARD = 8192

    def __init__(self, n: int, offset: int = 0) -> None:
        memory = torch.ones(4, n + 8 + 2 * self.GUARD)
        self.tensors = []
        for m in memory:
            start = self.GUARD - (m[self.GUARD :].data_ptr() // 4) % 4 + 4 + offset
            self.tensors.append(m[start : start + n])
        param, grad, *states = (t.data_ptr() for t in self.tensors)
        self.row, self.grads = torch.tensor([[param, 0, *states, 0, 0, n, 0, 0]]), torch.tensor([grad])
        scalars = coefficients.adam(coefficients.AdamNumbers(0.1, 0.9, 0.999, 1e-8, 0.1), True, 1)
        self.scalars, self.map = torch.tensor(scalars), torch.tensor(chunk_map([n], 1024))

    def run(self, ptx: str) -> None:
        emulator = Emulator(ptx)
        for name, tensor in zip(("param", "grad", "exp_avg", "exp_avg_sq"), self.tensors, strict=True):
            emulator.register(tensor, name)
        tables = {"map": self.map, "table": self.row, "grads": self.grads, "coefficients": self.scalars}
        for name, tensor in tables.items():
            emulator.register(tensor, name)
        chunk_map, row, grads, scalars = (t.data_ptr() for t in tables.values())
        emulator.run(len(self.map), [chunk_map, row, 1024, 0, grads, scalars, 0])


@pytest.fixture(scope="module")
def ptx() -> str:
    text: Any = aot.compile_for(90, Rule.ADAM, int(Flag.DECOUPLED)).asm["ptx"]
    return str(text)


@pytest.mark.parametrize("n", [1, 7, 8, 1000, 1027])
def test_the_kernel_as_it_is_passes(ptx, n):
    Launch(n).run(ptx)
    Launch(n, offset=1).run(ptx)


@pytest.mark.parametrize("n", [7, 8, 1024, 1027])
def test_numel_plus_one_is_noticed(ptx, n):
    launch = Launch(n)
    launch.row[0, 6] += 1
    launch.map = torch.tensor(chunk_map([n + 1], 1024))
    with pytest.raises(InvalidAccess, match=r"'param'.*|outside of every tensor"):
        launch.run(ptx)


def test_a_wrong_alignment_flag_is_noticed(ptx):
    flagged = re.subn(r"(and\.b64\s+%rd\d+, %rd\d+, )15;", r"\g<1>0;", ptx)
    assert flagged[1] == 1  # the test of the addresses' low bits
    Launch(1000).run(flagged[0])
    with pytest.raises(InvalidAccess, match="no multiple of 16"):
        Launch(1000, offset=1).run(flagged[0])


def test_each_missing_mask_is_noticed(ptx):
    masked = list(re.finditer(r"@%p\d+ (?=(?:ld|st)\.global)", ptx))
    assert len(masked) == 21  # 4 loads and 3 stores in the vector loop, and of each two elements in the other one
    for mask in masked:
        with pytest.raises(InvalidAccess):
            Launch(1024 + 11).run(ptx[: mask.start()] + ptx[mask.end() :])  # a chunk of 8 in vectors and 3 elements


def test_a_row_number_beyond_the_table_is_noticed(ptx):
    launch = Launch(100)
    launch.map[0] = 1
    with pytest.raises(InvalidAccess, match=r"'table'|'grads'"):
        launch.run(ptx)


def test_parameters_and_labels_are_found(ptx):
    kernel = Kernel(ptx)
    assert (kernel.name, kernel.threads) == ("fused_l2_adam", 256)
    assert len(kernel.parameters) >= 4
    assert kernel.labels
