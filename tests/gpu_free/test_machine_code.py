"""What the assembler makes of the kernels, for GPUs that need not be there: registers, spills, instructions, and how much a
multiprocessor has under way while it waits for memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")

import triton

from fused_l2.tables.tensor_table import Flag, Rule

from . import aot, counts
from .counts import ARCHITECTURES, COUNTED, Counted

each_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)
each_kernel = pytest.mark.parametrize("kernel", COUNTED, ids=[k.name for k in COUNTED])
NAMED = {k.name: k for k in COUNTED}
# By Little's law: a copy at 3.0 TB/s with 0.7 us of latency has 15.9 KB under way in each of an H100's 132 multiprocessors.
NEEDED_KB = 16
LANES = 512


def code_of(kernel: Counted, arch: int = 90) -> aot.MachineCode:
    return aot.count_of(arch, *kernel.source)


@pytest.mark.sweep(5)
@each_architecture
@each_kernel
def test_nothing_spills_and_memory_is_kept_busy(kernel, arch):
    code = code_of(kernel, arch)
    first, loads, _ = code.in_flight()
    registers, per_element, kilobytes = counts.count(kernel, arch)
    print(f"{kernel.name} sm_{arch}: {registers} registers, {per_element:.1f} instructions an element")
    print(f"{first} of {loads} loads before the first is waited for, {kilobytes} KB in flight")
    assert code.local_bytes == 0
    assert code.shared_bytes <= 2048
    assert kilobytes >= NEEDED_KB
    if "statistics" not in kernel.name and "float32" not in kernel.name:
        assert first == loads


@each_architecture
@pytest.mark.parametrize("name", ["AdamW", "SGD, nesterov", "AdamW, bfloat16 throughout"])
def test_misaligned_tensors_keep_memory_busy_too(name, arch):
    """Element by element, as views of a bucket in which a tensor of ten elements misaligns all that follow."""
    kernel = NAMED[name]
    code, itemsize = code_of(kernel, arch), kernel.source[-1].itemsize
    loops = [loop for loop in code.loops() if {o.loaded_bytes for o in loop} - {0} == {itemsize}]
    kilobytes = [code.warps(counts.WARPS[arch]) * 32 * code.in_flight(loop)[2] / 1024 for loop in loops]
    print(f"{name} sm_{arch}, misaligned: {kilobytes} KB in flight")
    assert max(kilobytes) >= (14 if itemsize == 2 else 30)


@each_architecture
def test_adamw(arch):
    code = code_of(NAMED["AdamW"], arch)
    assert code.widths() == {"LDG.E.128": 4, "STG.E.128": 3}
    assert code.registers <= 64
    assert len(code.vector_loop()) / 4 <= 52


@each_architecture
def test_sgd(arch):
    code = code_of(NAMED["SGD, nesterov"], arch)
    assert code.widths() == {"LDG.E.128": 3, "STG.E.128": 2}
    assert code.registers <= 64
    assert len(code.vector_loop()) / 4 <= 14


@each_architecture
@pytest.mark.parametrize(
    ("dtype", "width", "loads"),
    [(torch.float32, "LDG.E.128", 4), (torch.float64, "LDG.E.128", 8), (torch.bfloat16, "LDG.E.64", 4)],
    ids=str,
)
def test_norms_read_each_gradient_once_with_loads_under_way(dtype, width, loads, arch):
    """Two of float32 and four of the others, or each would wait for the one before."""
    code = aot.count_of(arch, "measure", dtype, False)
    assert code.widths() == {width: loads}
    assert code.in_flight()[0] >= (2 if dtype is torch.float32 else 4)
    assert code.local_bytes == 0
    assert code.registers <= 48


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("kind", ["measure float32", "measure float64", "control"])
@each_architecture
def test_the_lanes_of_a_sum_are_added_up_by_all_threads_together(kind, largest, arch):
    """512 lanes of 128 threads: four in each thread, 32 threads in a warp, four warps. A thread that adds up all of them would
    have 511 additions, or as many comparisons, to make."""
    signature = ("control", largest, torch.float32) if kind == "control" else ("measure", getattr(torch, kind[8:]), largest)
    code = aot.count_of(arch, *signature)
    before_the_end = next(i for i, o in enumerate(code.opcodes) if o.name.startswith("SHFL"))
    end = code.opcodes[before_the_end:]
    additions, comparisons = (sum(o.name.startswith(name) for o in end) for name in ("DADD", "DSETP"))
    print(f"{kind} sm_{arch}: {additions} additions and {comparisons} comparisons of float64 from the first shuffle on")
    assert code.count("DADD") + code.count("DSETP") < LANES // 4
    assert additions <= 40
    assert comparisons <= 80
    assert code.registers <= 48
    assert code.local_bytes == 0


@each_architecture
def test_statistics_end_in_sums_that_are_shared_out(arch):
    """Three sums of 512 lanes, three of 256 and the count of those that are not finite, of which each takes a few additions
    within a thread and about twelve between threads; and those of the loops. 908 where every thread added up all lanes."""
    code = code_of(NAMED["AdamW, statistics"], arch)
    in_loops = 3 * (4 + 2)  # of a thread's elements
    ends = code.count("DADD") - in_loops
    print(f"AdamW, statistics sm_{arch}: {code.registers} registers, {ends} additions of float64 at the ends of seven sums")
    assert ends <= 7 * 20
    assert code.registers <= (88 if arch == 90 and triton.__version__.startswith("3.6") else 96)


@pytest.mark.parametrize(
    ("param", "mode"),
    [
        (torch.float32, 0),
        *((torch.bfloat16, mode) for mode in (0, Flag.MASTER, Flag.REMAINDER, Flag.KAHAN, Flag.STOCHASTIC)),
        *((torch.float16, mode) for mode in (0, Flag.MASTER, Flag.KAHAN, Flag.STOCHASTIC)),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", [Rule.SGD, Rule.ADAM], ids=str)
def test_steps_of_32_bits_and_less_have_no_float64(param, rule, mode):
    """A Python number below 2^-126 makes one of all that it meets in triton 3.6: on many GPUs 64 times slower."""
    base = Flag.DECOUPLED if rule is Rule.ADAM else Flag.MOMENTUM
    ptx = aot.compile_for(90, rule, int(base | mode), param, param, torch.float32).asm["ptx"]
    assert ".f64" not in ptx


def test_the_page_tells_what_is_counted():
    """docs/performance.md has a table for triton 3.6.0 and for the newest; this is the one that is installed."""
    told = counts.of_the_page()
    if told is None:
        pytest.skip("docs/performance.md has no table for this triton")
    assert told == counts.table()


@pytest.mark.parametrize(
    ("rule", "flags", "state"),
    [
        (Rule.ADAM, Flag.DECOUPLED, torch.bfloat16),
        (Rule.SGD, Flag.MOMENTUM, torch.bfloat16),
        (Rule.ADAM, Flag.DECOUPLED | Flag.EIGHT_BIT | Flag.REMAINDER8, torch.float32),
    ],
    ids=["adamw", "sgd", "adamw-8bit"],
)
@pytest.mark.parametrize("arch", [80, 90])
def test_statistics_of_16_bits_spill_nothing(rule, flags, state, arch):
    """With eight elements a thread they took up to 246 registers, or spilled 328 bytes under a limit of 128. A multiprocessor
    holds 12 warps at least with 168."""
    compiled = aot.compile_for(arch, rule, int(flags | Flag.STATISTICS), torch.bfloat16, torch.bfloat16, state)
    code = aot.machine_code(compiled)
    assert code.local_bytes == 0
    assert code.registers <= 168
