"""Kernels compiled ahead of time: for a GPU that need not be there, and what the assembler made of them."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_l2.kernels.launch import SOURCES, options
from fused_l2.tables.tensor_table import Rule

_POINTERS = {torch.int64: "*i64", torch.float32: "*fp32", torch.float64: "*fp64"}


def compile_for(
    arch: int | str,
    rule: Rule,
    flags: int,
    param: torch.dtype = torch.float32,
    grad: torch.dtype = torch.float32,
    state: torch.dtype = torch.float32,
) -> Any:
    """The kernel that steps a bucket."""
    return compile_kernel(arch, "step", rule, flags, param, grad, state)


@functools.cache
def compile_kernel(arch: int | str, kind: str, *signature: Any) -> Any:
    """A kernel, compiled as ``fused_l2.kernels.launch.Kernel`` compiles it, for an NVIDIA architecture by number (90: sm_90) or
    an AMD one by name."""
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    function, arguments, constants, _ = SOURCES[kind](*signature)
    types = [_type_of(argument) for argument in arguments] + ["constexpr"] * len(constants)
    values = {(len(arguments) + i,): value for i, value in enumerate(constants.values())}
    # What the runtime finds out by looking at the arguments: addresses and chunk sizes are multiples of 16.
    hints = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(arguments) if is_multiple_of_16(argument)}
    assert function.arg_names[len(arguments) :] == list(constants)
    source = ASTSource(function, dict(zip(function.arg_names, types, strict=True)), values, hints)
    return triton.compile(source, target=target, options=options(target.warp_size))


def _type_of(argument: Any) -> Any:
    """Triton's name for the type of what stands for an argument."""
    if isinstance(argument, torch.dtype):
        return _POINTERS[argument]
    if isinstance(argument, tuple):
        return tuple(map(_type_of, argument))
    if isinstance(argument, float):
        return "fp64"
    return "i32" if argument < 1 << 31 else "i64"


def is_multiple_of_16(argument: Any) -> bool:
    """Whether the compiler is told that an argument is one, given what stands for it."""
    return isinstance(argument, torch.dtype) or (isinstance(argument, int) and argument % 16 == 0)


@dataclass
class MachineCode:
    """What the assembler made of a kernel."""

    registers: int
    local_bytes: int  # spilled registers
    shared_bytes: int
    instructions: list[tuple[int, str, str]]  # address, opcode, operands

    def widths(self) -> Counter[str]:
        """Loads and stores of global memory in the vector loop, by opcode."""
        return Counter(o for _, o, _ in self.vector_loop() if o.startswith(("LDG", "STG")))

    def vector_loop(self) -> list[tuple[int, str, str]]:
        """The loop with the widest accesses, without the branches for denormals, overflow and the like in divisions and
        square roots, which ordinary numbers do not take."""
        best: list[tuple[int, str, str]] = []
        position = {address: i for i, (address, _, _) in enumerate(self.instructions)}
        for i, (address, opcode, operands) in enumerate(self.instructions):
            target = _branch_target(opcode, operands)
            if target is not None and target < address:
                loop = self.instructions[position[target] : i + 1]
                if _widest(loop) > _widest(best):
                    best = loop
        return _ordinary_path(best)


def _branch_target(opcode: str, operands: str) -> int | None:
    found = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
    return int(found.group(1), 16) if found else None


def _widest(loop: list[tuple[int, str, str]]) -> int:
    sizes = [int(found.group(1)) for _, o, _ in loop if (found := re.search(r"LDG\.E\.(64|128)", o))]
    return max(sizes, default=32 if any(o.startswith("LDG") for _, o, _ in loop) else 0)


def _ordinary_path(loop: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    path, skip_to = [], 0
    for i, (address, opcode, operands) in enumerate(loop):
        if address < skip_to:
            continue
        path.append((address, opcode, operands))
        target = _branch_target(opcode, operands)
        if target is not None and target > address:
            skipped = [o for a, o, _ in loop[i + 1 :] if a < target]
            if any(o.startswith("CALL") for o in skipped):
                skip_to = target
    return path


def machine_code(compiled: Any) -> MachineCode:
    """Disassemble, with the tools that come with triton."""
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", re.MULTILINE)
    listing = _cuobjdump("-sass", compiled.asm["cubin"])
    instructions = [(int(a, 16), opcode, operands.strip()) for a, opcode, operands in pattern.findall(listing)]
    return MachineCode(*resources(compiled), instructions)


def resources(compiled: Any) -> tuple[int, int, int]:
    """How many registers a thread has, and bytes of local and shared memory."""
    usage = _cuobjdump("-res-usage", compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, shared, local = map(int, found.groups())
    return registers, stack + local, shared


def _cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
