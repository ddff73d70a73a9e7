"""Executes compiled kernels on the CPU: an emulator for the part of PTX that Triton makes of this package's kernels.

PTX is the last form of a kernel before it becomes machine code, and the assembler between the two does not change results. So
what runs here is what the compiler made of the source, with its masks, vector accesses and conversions, to the bit. Every
access to global memory is checked: it has to lie inside of one registered tensor, at a multiple of its width. What is missing
is time and whatever happens between programs or threads that run at once.

    emulator = Emulator(ptx)
    emulator.register(tensor, "name")             # global memory: CPU tensors, at their own addresses
    emulator.run(programs, [address, ..., 1024])  # arguments in order, as integers

How it works. A *lane* is one thread of one program, and all lanes of a batch of programs advance together: a register is a
numpy array with one element per lane, holding raw bits as unsigned integers. Where branches separate lanes, those that stand at
the earliest instruction go first, until they meet the others again. An instruction that is not known here raises
UnknownInstruction: that is a gap of this file, and no fault of the kernel.

The instructions are those of the PTX ISA (docs.nvidia.com/cuda/parallel-thread-execution).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fused_l2 import reference

Bits = np.ndarray  # one element per lane: the raw content of a register
LANES_PER_BATCH = 1 << 15


class UnknownInstruction(NotImplementedError):
    """A compiler made something of a kernel that this emulator has not learned yet."""


class InvalidAccess(AssertionError):
    """A kernel accessed memory it must not access."""


class _Known(dict[Any, Any]):
    """What is known by name; the name of anything else is part of an unknown instruction."""

    def __missing__(self, name: Any) -> Any:
        raise NotImplementedError(f"{name!r} is unknown")


_TYPES: dict[str, Any] = _Known({
    **{f"{kind}{8 * n}": np.dtype(f"{'i' if kind == 's' else 'u'}{n}") for n in (1, 2, 4, 8) for kind in "bus"},
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
})  # fmt: skip
_SIZES = _Known(
    {**{name: dtype.itemsize for name, dtype in _TYPES.items()}, "bf16": 2, "f32x2": 8, "bf16x2": 4, "f16x2": 4, "pred": 1}
)
_REGISTER = re.compile(r"%(?:p|b|f|fd|r|rd|rs)\d+")  # what a kernel declares; others are the hardware's


class Instruction(NamedTuple):
    text: str
    guard: tuple[str, bool] | None  # predicate register, and the value it has to have
    name: str  # "fma" of fma.rn.f32
    suffixes: list[str]  # ["rn", "f32"]
    operands: list[str]


class Kernel:
    """The entry function of a PTX module."""

    def __init__(self, ptx: str) -> None:
        text = re.sub(r"//[^\n]*", "", ptx)
        entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{(.*?)\n\}", text, re.DOTALL)
        if entry is None:
            raise ValueError("no .entry function in this PTX")
        self.name, parameters, directives, body = entry.groups()
        isa, target = (re.search(rf"^\.{word}\s+(\S+)", text, re.MULTILINE) for word in ("version", "target"))
        self.compiled_by = "PTX " + " for ".join(found.group(1).strip(",") for found in (isa, target) if found)
        threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", directives)
        self.threads = int(threads.group(1)) if threads else 1
        # Name and type of each parameter; pointers are declared with more words between the two.
        self.parameters = [(p.split()[-1], p.split()[1].lstrip(".")) for p in parameters.split(",") if p.strip()]
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for statement in re.split(r"[;\n]", body):
            self._add(statement.strip())

    def _add(self, statement: str) -> None:
        if not statement or statement.startswith("."):
            return
        if label := re.match(r"^([$\w]+):$", statement):
            self.labels[label.group(1)] = len(self.instructions)
            return
        parts = re.match(r"^(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement)
        if parts is None:
            raise self.unknown(statement)
        negated, predicate, opcode, rest = parts.groups()
        operands = [o.strip() for o in re.split(r",(?![^{]*\})", rest)] if rest else []
        name, *suffixes = opcode.replace("shared::cta", "shared").split(".")  # the same: the program's own
        guard = (predicate, negated != "!") if predicate else None
        self.instructions.append(Instruction(statement, guard, name, suffixes, operands))

    def unknown(self, statement: str, reason: Exception | None = None) -> UnknownInstruction:
        why = f" ({reason})" if reason and str(reason) != statement else ""
        return UnknownInstruction(
            f"kernel {self.name}, {self.compiled_by}, triton {importlib.metadata.version('triton')}: "
            f"this emulator does not know `{statement}`{why}. Teach it to, in {__file__}"
        )


# The launches of a test are of a few kernels, each of them many times.
_parsed = functools.lru_cache(maxsize=8)(Kernel)


@functools.cache
def _address_space(size: int) -> np.ndarray:
    """This process's memory as one array of integers of this size; its element i lies at address i * size."""
    page = 4096
    everything = (ctypes.c_uint8 * ((1 << 47) - page)).from_address(page)
    return np.frombuffer(everything, dtype=f"u{size}")


def _read_memory(address: np.ndarray, size: int) -> Bits:
    return _address_space(size)[address // size - 4096 // size]


def _write_memory(address: np.ndarray, size: int, values: Bits) -> None:
    _address_space(size)[address // size - 4096 // size] = values


class Emulator:
    """A kernel, the memory it may access, and what happened: ``executed`` instructions, counted once per batch of lanes."""

    def __init__(self, ptx: str, shared_bytes: int = 0) -> None:
        self.kernel = _parsed(ptx)
        self._shared_bytes = shared_bytes  # of each program
        self.executed = 0
        self._buffers: list[tuple[int, int, str]] = []

    def register(self, tensor: torch.Tensor, name: str) -> None:
        """Let the kernel access the memory of this contiguous tensor, and no byte beside it."""
        if tensor.numel():
            start = tensor.data_ptr()
            self._buffers.append((start, start + tensor.numel() * tensor.element_size(), name))

    def run(self, programs: int, arguments: Sequence[int]) -> None:
        """Launch this many programs. Arguments beyond the kernel's own (scratch memory, unused here) are 0."""
        self._buffers.sort()
        self._starts, self._ends = (np.array([b[i] for b in self._buffers], dtype="u8") for i in (0, 1))
        given = [*arguments, *[0] * (len(self.kernel.parameters) - len(arguments))]
        self._arguments = {name: value for (name, _), value in zip(self.kernel.parameters, given, strict=True)}
        batch = max(1, LANES_PER_BATCH // self.kernel.threads)
        with np.errstate(all="ignore"):
            for first in range(0, programs, batch):
                self._run_batch(np.arange(first, min(first + batch, programs), dtype="u4"))

    def _run_batch(self, programs: np.ndarray) -> None:
        threads, end = self.kernel.threads, len(self.kernel.instructions)
        self._lanes = len(programs) * threads
        self._registers: dict[str, Bits] = {
            "%ctaid.x": np.repeat(programs, threads),
            "%tid.x": np.tile(np.arange(threads, dtype="u4"), len(programs)),
        }
        self._shared = np.zeros(len(programs) * self._shared_bytes, "u1")
        self._shared_start = np.repeat(np.arange(len(programs)) * self._shared_bytes, threads)
        self._everyone = np.ones(self._lanes, bool)
        at = np.zeros(self._lanes, dtype=np.int64)  # the next instruction of each lane
        while (here := int(at.min())) < end:
            active = at == here
            waiting = at[~active]
            meeting = int(waiting.min()) if waiting.size else end
            self._active = active if waiting.size else self._everyone
            while here < meeting:
                instruction = self.kernel.instructions[here]
                here += 1
                self.executed += 1
                if instruction.name == "bar":
                    waits = self._active.reshape(-1, threads)
                    if not (waits.any(1) == (waits | (at == end).reshape(-1, threads)).all(1)).all():
                        raise InvalidAccess(f"{self.kernel.name}: a barrier that not all threads of a program reach")
                    continue
                if instruction.name in ("bra", "ret"):
                    taken = self._guarded(instruction)
                    at[self._active] = here
                    at[taken] = end if instruction.name == "ret" else self.kernel.labels[instruction.operands[0]]
                    break
                try:
                    self._execute(instruction)
                except NotImplementedError as reason:
                    raise self.kernel.unknown(instruction.text, reason) from reason
            else:
                at[self._active] = here

    def _guarded(self, instruction: Instruction) -> np.ndarray:
        """The lanes that execute an instruction."""
        if instruction.guard is None:
            return self._active
        name, wanted = instruction.guard
        return self._active & (self._registers[name] == wanted)

    def _execute(self, i: Instruction) -> None:
        lanes = self._guarded(i)
        if i.name in ("ld", "st"):
            _MEMORY[i.suffixes[0], i.name](self, i, lanes)
            return
        if i.name == "mov" and "{" in i.text:
            self._move_parts(i, lanes)
            return
        if i.name == "setp" and i.suffixes[-1].endswith("x2"):
            self._compare_pair(i, lanes)
            return
        if i.name in ("shfl", "redux"):
            self._exchange(i, lanes)
            return
        self._write(i.operands[0], _OPERATIONS[i.name](self, i), lanes)

    # Registers.

    def read(self, operand: str, type_: str) -> Any:
        """An operand's value in each lane, or as a scalar if it is an immediate. bf16 is widened; a pair has two columns."""
        if operand.startswith("%"):
            if operand not in self._registers:  # never written: a lane that reads it must not use it
                if not _REGISTER.fullmatch(operand):
                    raise NotImplementedError(f"{operand!r} is unknown")
                self._registers[operand] = np.zeros(self._lanes, f"u{_SIZES[type_]}" if type_ != "pred" else bool)
            bits = self._registers[operand]
        elif operand.startswith(("0f", "0d")):
            bits = np.array([int(operand[2:], 16)], f"u{4 if operand[1] == 'f' else 8}")
        elif operand == "global_smem":  # where a program's shared memory begins
            bits = np.zeros(1, f"u{_SIZES[type_]}")
        else:
            size = _SIZES[type_]
            bits = np.array([int(operand, 0) & ((1 << 8 * size) - 1)], f"u{size}")
        if type_ == "pred":
            return bits != 0
        if type_ == "bf16":
            return _widened(bits, type_)
        if type_ == "f32x2":
            return bits.view("f4").reshape(-1, 2)
        if bits.itemsize != _SIZES[type_]:
            bits = bits.astype(f"u{_SIZES[type_]}")
        return bits.view(_TYPES[type_])

    def _write(self, register: str, value: np.ndarray, lanes: np.ndarray) -> None:
        value = np.ascontiguousarray(value)
        if value.ndim == 2:
            value = value.view("u8").reshape(-1)
        bits = value if value.dtype == bool else value.view(f"u{value.itemsize}")
        if bits.shape != (self._lanes,):
            bits = np.broadcast_to(bits, self._lanes)
        old = self._registers.get(register)
        if lanes is self._everyone or lanes.all() or old is None or old.dtype != bits.dtype:
            self._registers[register] = bits
        else:
            self._registers[register] = np.where(lanes, bits, old)

    def _move_parts(self, i: Instruction, lanes: np.ndarray) -> None:
        """mov between one register and the registers that hold its parts, lowest first."""
        target, source = i.operands
        size = _SIZES[i.suffixes[-1]]
        if target.startswith("{"):
            names = _names(target)
            parts = (
                np.ascontiguousarray(self.read(source, f"b{8 * size}")).view(f"u{size // len(names)}").reshape(-1, len(names))
            )
            for k, name in enumerate(names):
                self._write(name, parts[:, k], lanes)
        else:
            names = _names(source)
            parts = [np.broadcast_to(self.read(n, f"b{8 * size // len(names)}"), self._lanes) for n in names]
            self._write(target, np.stack(parts, axis=1).view(f"u{size}").reshape(-1), lanes)

    def _exchange(self, i: Instruction, lanes: np.ndarray) -> None:
        """shfl.sync: the value that another lane of the warp has; redux.sync: the largest one in the warp. All lanes must
        be there, and all are asked."""
        target, value, *others, members = i.operands
        here = lanes.reshape(-1, 32)
        if not (here.any(1) == here.all(1)).all():
            raise InvalidAccess(f"{self.kernel.name}: {i.text}: an exchange that not all lanes of a warp reach")
        if i.suffixes[0] != "sync" or (self.read(members, "u32") != 0xFFFFFFFF).any():
            raise NotImplementedError(i.text)
        values = np.broadcast_to(self.read(value, i.suffixes[-1]), self._lanes).reshape(-1, 32)
        if i.name == "redux" and i.suffixes[1:] == ["max", "s32"]:
            self._write(target, np.repeat(values.max(1), 32), lanes)
            return
        if i.name != "shfl" or i.suffixes[2:] != ["b32"] or int(others[1], 0) != 31:
            raise NotImplementedError(i.text)
        asked = np.broadcast_to(self.read(others[0], "b32"), self._lanes).reshape(-1, 32)
        sources = {"bfly": np.arange(32) ^ asked, "idx": asked}.get(i.suffixes[1])
        if sources is None or (sources > 31).any():
            raise NotImplementedError(i.text)
        self._write(target, np.take_along_axis(values, sources.astype(np.int64), axis=1).reshape(-1), lanes)

    def _compare_pair(self, i: Instruction, lanes: np.ndarray) -> None:
        """setp of two 16-bit numbers in one register: the first predicate belongs to the lower half."""
        comparison, type_ = i.suffixes
        halves = [np.ascontiguousarray(self.read(operand, "b32")).view("u2").reshape(-1, 2) for operand in i.operands[1:]]
        for k, name in enumerate(i.operands[0].split("|")):
            a, b = (_widened(np.ascontiguousarray(h[:, k]), type_.removesuffix("x2")) for h in halves)
            self._write(name, _COMPARISONS[comparison](a, b), lanes)

    # Memory.

    def _load_parameter(self, i: Instruction, lanes: np.ndarray) -> None:
        dtype = _TYPES[i.suffixes[-1]]
        value = self._arguments[i.operands[1].strip("[] ")]
        register_size = 8 if i.operands[0].startswith("%rd") else 4
        wide = np.array([value & ((1 << 8 * dtype.itemsize) - 1)], f"u{dtype.itemsize}").view(dtype)
        self._write(i.operands[0], wide.astype(f"{dtype.kind}{max(register_size, dtype.itemsize)}"), lanes)

    def _addresses(self, i: Instruction, operand: str, lanes: np.ndarray, width: int) -> np.ndarray:
        """Where each of these lanes accesses ``width`` bytes, checked."""
        base, offset = re.match(r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()
        address = (self.read(base, "u64") + np.uint64(int(offset or 0) & (2**64 - 1)))[lanes]
        if (misaligned := address % width != 0).any():
            raise InvalidAccess(f"{self.kernel.name}: {i.text}: address {address[misaligned][0]:#x} is no multiple of {width}")
        buffer = np.searchsorted(self._starts, address, side="right").astype(np.int64) - 1
        outside = (buffer < 0) | (address + np.uint64(width) > self._ends[buffer])
        if outside.any():
            start, end, name = self._buffers[max(int(buffer[outside][0]), 0)]
            raise InvalidAccess(
                f"{self.kernel.name}: {i.text}: {width} bytes at {address[outside][0]:#x} are outside of every tensor; "
                f"nearest below: {name!r}, {start:#x} to {end:#x}"
            )
        return address.astype(np.int64)

    def _load(self, i: Instruction, lanes: np.ndarray) -> None:
        names, size = _names(i.operands[0]), _SIZES[i.suffixes[-1]]
        address = self._addresses(i, i.operands[1], lanes, size * len(names))
        for k, name in enumerate(names):
            value = np.zeros(self._lanes, f"u{size}")
            value[lanes] = _read_memory(address + k * size, size)
            self._write(name, value, lanes)

    def _store(self, i: Instruction, lanes: np.ndarray) -> None:
        names, size = _names(i.operands[1]), _SIZES[i.suffixes[-1]]
        address = self._addresses(i, i.operands[0], lanes, size * len(names))
        for k, name in enumerate(names):
            _write_memory(address + k * size, size, np.broadcast_to(self.read(name, f"b{8 * size}"), self._lanes)[lanes])

    def _shared_addresses(self, i: Instruction, operand: str, lanes: np.ndarray, width: int) -> np.ndarray:
        base, offset = re.match(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()
        within = np.broadcast_to(self.read(base, "u32").astype(np.int64) + int(offset or 0), self._lanes)[lanes]
        if (within % width != 0).any() or (within < 0).any() or (within + width > self._shared_bytes).any():
            raise InvalidAccess(f"{self.kernel.name}: {i.text}: outside of the {self._shared_bytes} bytes of shared memory")
        return self._shared_start[lanes] + within

    def _load_shared(self, i: Instruction, lanes: np.ndarray) -> None:
        names, size = _names(i.operands[0]), _SIZES[i.suffixes[-1]]
        address = self._shared_addresses(i, i.operands[1], lanes, size * len(names))
        for k, name in enumerate(names):
            value = np.zeros(self._lanes, f"u{size}")
            value[lanes] = self._shared.view(f"u{size}")[address // size + k]
            self._write(name, value, lanes)

    def _store_shared(self, i: Instruction, lanes: np.ndarray) -> None:
        names, size = _names(i.operands[1]), _SIZES[i.suffixes[-1]]
        address = self._shared_addresses(i, i.operands[0], lanes, size * len(names))
        for k, name in enumerate(names):
            values = np.broadcast_to(self.read(name, f"b{8 * size}"), self._lanes)[lanes]
            self._shared.view(f"u{size}")[address // size + k] = values


def _widened(bits: np.ndarray, type_: str) -> np.ndarray:
    """The numbers that 16 bits stand for."""
    return (bits.astype("u4") << np.uint32(16)).view("f4") if type_ == "bf16" else bits.astype("u2").view("f2")


def _names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{}").split(",")]


_MEMORY: dict[tuple[str, str], Any] = _Known({
    ("param", "ld"): Emulator._load_parameter,
    ("global", "ld"): Emulator._load,
    ("global", "st"): Emulator._store,
    ("shared", "ld"): Emulator._load_shared,
    ("shared", "st"): Emulator._store_shared,
})  # fmt: skip


# Operations: from an instruction's operands to the value of its target.


def _elementwise(operation: Callable[..., Any]) -> Callable[[Emulator, Instruction], Any]:
    def execute(emulator: Emulator, i: Instruction) -> Any:
        types = [i.suffixes[-1]] * (len(i.operands) - 1)
        if i.suffixes[-2:-1] == ["f32"] and types[0] in ("bf16", "f16"):  # add.f32.bf16: only the first operand is narrow
            return operation(
                emulator.read(i.operands[1], types[0]).astype("f4"), *(emulator.read(o, "f32") for o in i.operands[2:])
            )
        return operation(*(emulator.read(o, t) for o, t in zip(i.operands[1:], types, strict=True)))

    return execute


def _rounded(operation: Callable[..., Any]) -> Callable[[Emulator, Instruction], Any]:
    """A floating-point operation that has to say that it rounds to nearest: others flush, approximate or may be fused."""
    execute = _elementwise(operation)

    def checked(emulator: Emulator, i: Instruction) -> Any:
        if any("f" in s for s in i.suffixes) and (i.suffixes[0] != "rn" or "ftz" in i.suffixes or "sat" in i.suffixes):
            raise NotImplementedError(f"{i.text}: not an IEEE operation")
        return execute(emulator, i)

    return checked


def _extreme(emulator: Emulator, i: Instruction) -> Any:
    """Of two floating-point numbers of which one is NaN, min and max are the other one, min.NaN and max.NaN are NaN."""
    propagates = "NaN" in i.suffixes or not i.suffixes[-1].startswith("f")
    operations = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}
    return _elementwise(operations[i.name][propagates])(emulator, i)


def _absolute(emulator: Emulator, i: Instruction) -> Any:
    narrow = {"bf16": ("b16", 0x7FFF), "f16": ("b16", 0x7FFF), "bf16x2": ("b32", 0x7FFF7FFF), "f16x2": ("b32", 0x7FFF7FFF)}
    if i.suffixes[-1] not in narrow:
        return np.abs(emulator.read(i.operands[1], i.suffixes[-1]))
    bits, mask = narrow[i.suffixes[-1]]
    value = emulator.read(i.operands[1], bits)
    return value & value.dtype.type(mask)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    tensors = [torch.from_numpy(np.array(x)) for x in np.broadcast_arrays(a, b, c)]
    return reference.fma(*tensors).numpy()


_WIDER = _Known({"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"})


def _multiply(emulator: Emulator, i: Instruction) -> Any:
    """mul and mad: the low half of integer products, or the whole (wide); products of floating-point numbers."""
    kind, type_ = i.suffixes[0], i.suffixes[-1]
    if kind not in ("lo", "wide"):
        return _rounded(np.multiply)(emulator, i)
    a, b = (emulator.read(o, type_) for o in i.operands[1:3])
    if kind == "wide":
        type_ = _WIDER[type_]
        a, b = a.astype(_TYPES[type_]), b.astype(_TYPES[type_])
    return a * b + emulator.read(i.operands[3], type_) if i.name == "mad" else a * b


_COMPARISONS: dict[str, Callable[..., Any]] = _Known({
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "neu": np.not_equal,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
})  # fmt: skip


def _compare(emulator: Emulator, i: Instruction) -> Any:
    comparison, type_ = i.suffixes
    return _COMPARISONS[comparison](emulator.read(i.operands[1], type_), emulator.read(i.operands[2], type_))


def _select(emulator: Emulator, i: Instruction) -> Any:
    a, b = (emulator.read(o, i.suffixes[-1]) for o in i.operands[1:3])
    return np.where(emulator.read(i.operands[3], "pred"), a, b)


def _permute(emulator: Emulator, i: Instruction) -> Any:
    """prmt: each byte of the result is the byte of {b, a} that a digit of the selector names; with 8 its sign, eight times."""
    a, b = (emulator.read(o, "b32").astype("u8") for o in i.operands[1:3])
    selector, both = int(i.operands[3].rstrip("U"), 16), a | b << np.uint64(32)
    if i.suffixes != ["b32"]:  # modes
        raise NotImplementedError(i.text)
    digits = [selector >> 4 * k & 15 for k in range(4)]
    found = [both >> np.uint64(8 * (d & 7)) & np.uint64(0xFF) for d in digits]
    found = [(byte >> np.uint64(7)) * np.uint64(0xFF) if d & 8 else byte for d, byte in zip(digits, found, strict=True)]
    parts = [byte << np.uint64(8 * k) for k, byte in enumerate(found)]
    return (parts[0] | parts[1] | parts[2] | parts[3]).astype("u4")


def _extract(emulator: Emulator, i: Instruction) -> Any:
    """bfe: so many bits from a position on, of an unsigned number."""
    if i.suffixes[0] not in ("u32", "u64"):
        raise NotImplementedError(i.text)
    value, position, count = emulator.read(i.operands[1], i.suffixes[0]), int(i.operands[2], 0), int(i.operands[3], 0)
    return value >> value.dtype.type(position) & value.dtype.type((1 << count) - 1)


def _shift(operation: Callable[..., Any]) -> Callable[[Emulator, Instruction], Any]:
    def execute(emulator: Emulator, i: Instruction) -> Any:
        value, by = emulator.read(i.operands[1], i.suffixes[-1]), emulator.read(i.operands[2], "u32")
        if (by >= 8 * value.itemsize).any():
            raise NotImplementedError(f"{i.text}: shift by more bits than there are")
        return operation(value, by.astype(value.dtype))

    return execute


def _narrowed(value: np.ndarray, to: str) -> np.ndarray:
    """float32 rounded to nearest even. NaN becomes the one NaN that the hardware writes."""
    if to == "f16":
        return np.where(np.isnan(value), np.uint16(0x7FFF), value.astype("f2").view("u2"))
    bits = value.view("u4").astype("u8")
    rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded.astype("u2"))


def _convert(emulator: Emulator, i: Instruction) -> Any:
    *modifiers, to, source = i.suffixes
    if to in ("bf16x2", "f16x2"):
        high, low = (_narrowed(emulator.read(o, source), to[:-2]) for o in i.operands[1:3])
        return np.stack(np.broadcast_arrays(low, high), axis=1).view("u4").reshape(-1)
    value = emulator.read(i.operands[1], source)
    if (to in ("f32", "f64") and source in ("bf16", "f16")) or (to, source) == ("f64", "f32"):
        return value.astype(_TYPES[to])
    if to in ("bf16", "f16") and source == "f32" and modifiers == ["rn"]:
        return _narrowed(value, to)
    if (to, source, modifiers) == ("f32", "f64", ["rn"]):
        return value.astype("f4")
    if to in ("f32", "f64") and modifiers == ["rn"] and source in ("u32", "s32"):
        return value.astype(_TYPES[to])
    if to == "s32" and source in ("f32", "f64") and modifiers == ["rzi"]:
        return np.trunc(np.clip(np.nan_to_num(value.astype("f8"), nan=0.0), -(2.0**31), 2.0**31 - 1)).astype("i4")
    if to[0] in "us" and source[0] in "us" and not modifiers:
        narrow = value.astype(_TYPES[to])
        # There are no registers of 8 bits: the rest is filled with the sign or with zeros.
        return narrow.astype(f"{narrow.dtype.kind}2") if narrow.dtype.itemsize == 1 else narrow
    raise NotImplementedError(i.text)


_OPERATIONS: dict[str, Callable[[Emulator, Instruction], Any]] = _Known({
    "add": _rounded(np.add),
    "sub": _rounded(np.subtract),
    "mul": _multiply,
    "mad": _multiply,
    "fma": _rounded(_fma),
    "div": _rounded(np.divide),
    "sqrt": _rounded(np.sqrt),
    "neg": _elementwise(np.negative),
    "abs": _absolute,
    "min": _extreme,
    "max": _extreme,
    "mov": _elementwise(lambda a: a),
    "and": _elementwise(np.bitwise_and),
    "or": _elementwise(np.bitwise_or),
    "xor": _elementwise(np.bitwise_xor),
    "not": _elementwise(np.invert),
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "setp": _compare,
    "selp": _select,
    "cvt": _convert,
    "prmt": _permute,
    "bfe": _extract,
})  # fmt: skip
