"""Kernels compiled ahead of time: for a GPU that need not be there, and what the assembler made of them."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from fused_l2.kernels.launch import SOURCES, compiled, target_of
from fused_l2.tables.tensor_table import Rule


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
    return compiled(SOURCES[kind](*signature), target_of(arch))


class Opcode(NamedTuple):
    """One line of a listing."""

    address: int
    guard: str  # "@!P2", or nothing
    name: str  # "LDG.E.128"
    operands: str

    @property
    def loaded_bytes(self) -> int:
        """Of a thread, from global memory."""
        if not self.name.startswith("LDG"):
            return 0
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        return next((sizes[part] for part in self.name.split(".") if part in sizes), 4)

    def registers(self) -> tuple[list[int], list[int]]:
        """What it writes, by its first register, and what it reads."""
        first, _, rest = self.operands.partition(",")
        target = re.fullmatch(r"R(\d+)", first.strip())
        read = rest if target else self.operands
        return [int(target[1])] if target else [], [int(r) for r in re.findall(r"(?<![A-Z])R(\d+)", read)]


@dataclass
class MachineCode:
    """What the assembler made of a kernel."""

    threads: int  # of a program
    registers: int
    local_bytes: int  # spilled registers
    shared_bytes: int
    opcodes: list[Opcode]

    def count(self, *names: str) -> int:
        """How many there are whose name begins like one of these."""
        return sum(o.name.startswith(names) for o in self.opcodes)

    def widths(self) -> Counter[str]:
        """Loads and stores of global memory in the vector loop, by opcode."""
        return Counter(o.name for o in self.vector_loop() if o.name.startswith(("LDG", "STG")))

    def in_flight(self, loop: Sequence[Opcode] | None = None) -> tuple[int, int, int]:
        """How many loads a thread of the vector loop, or of another one, has under way when it first waits for one, how many
        there are, and the bytes of the former."""
        loop = self.vector_loop() if loop is None else loop
        under_way: dict[int, int] = {}
        for opcode in loop:
            written, read = opcode.registers()
            if under_way.keys() & {*read}:
                break
            if opcode.loaded_bytes:
                under_way[written[0]] = opcode.loaded_bytes
        return len(under_way), sum(o.loaded_bytes > 0 for o in loop), sum(under_way.values())

    def warps(self, most: int) -> int:
        """How many a multiprocessor of 65,536 registers and ``most`` warps holds."""
        of_a_program = -(-self.registers // 8) * 8 * self.threads
        return min(65536 // of_a_program * (self.threads // 32), most)

    def vector_loop(self) -> list[Opcode]:
        """The loop with the widest accesses."""
        return max(self.loops(), key=_widest, default=[])

    def loops(self) -> list[list[Opcode]]:
        """Those that load something, without the branches for denormals, overflow and the like in divisions and square roots,
        which ordinary numbers do not take."""
        position = {o.address: i for i, o in enumerate(self.opcodes)}
        found = []
        for i, opcode in enumerate(self.opcodes):
            target = _branch_target(opcode)
            if target is not None and target < opcode.address:
                loop = self.opcodes[position[target] : i + 1]
                if _widest(loop):
                    found.append(_ordinary_path(loop))
        return found


def _branch_target(opcode: Opcode) -> int | None:
    found = re.search(r"0x([0-9a-f]+)\s*$", opcode.operands) if opcode.name.startswith("BRA") else None
    return int(found.group(1), 16) if found else None


def _widest(loop: list[Opcode]) -> int:
    return max((o.loaded_bytes for o in loop), default=0)


def _ordinary_path(loop: list[Opcode]) -> list[Opcode]:
    path, skip_to = [], 0
    for i, opcode in enumerate(loop):
        if opcode.address < skip_to:
            continue
        path.append(opcode)
        target = _branch_target(opcode)
        if target is not None and target > opcode.address:
            skipped = [o.name for o in loop[i + 1 :] if o.address < target]
            if any(name.startswith("CALL") for name in skipped):
                skip_to = target
    return path


@functools.cache
def count_of(arch: int, kind: str, *signature: Any) -> MachineCode:
    """What the assembler makes of a kernel."""
    return machine_code(compile_kernel(arch, kind, *signature))


def machine_code(kernel: Any) -> MachineCode:
    """Disassemble, with the tools that come with triton."""
    # Listings of sm_120 tell, behind the operands, what an instruction waits for (&req={2}, ?trans1).
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;&?\n]*?)\s*(?:;|&|\?|/\*)", re.MULTILINE)
    listing = _cuobjdump("-sass", kernel.asm["cubin"])
    opcodes = [Opcode(int(a, 16), guard.strip(), name, rest.strip()) for a, guard, name, rest in pattern.findall(listing)]
    return MachineCode(32 * kernel.metadata.num_warps, *resources(kernel), opcodes)


def resources(kernel: Any) -> tuple[int, int, int]:
    """How many registers a thread has, and bytes of local and shared memory."""
    usage = _cuobjdump("-res-usage", kernel.asm["cubin"])
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
