"""What each kernel is compiled from, and its launch.

A kernel is compiled for the shape of the computation: rule, flags, dtypes. Hyperparameters and sizes are read at run time, so
that a schedule of lr or weight decay compiles nothing. Nothing is autotuned: that would run an in-place update many times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError
from triton.runtime import driver

from ..tables.modes import FLAGS, Mode
from ..tables.tensor_table import Flag, Rule
from .coefficients import fused_l2_coefficients
from .control import fused_l2_control
from .multi_tensor import fused_l2_step
from .norms import fused_l2_measure_grads
from .turns import alone
from .write import fused_l2_write

# Threads of a program, and the most elements that a program of a step takes. Measured on an H100 (docs/design.md): a step is
# fastest in programs of two blocks of 256 threads, or of 128 where all is of 16 bits. Those with statistics end in sums, which
# fewer and longer programs make rarer; those of 8-bit states are bound by instructions, and have many registers.
THREADS = 128
STEP_THREADS, EIGHT_BIT_THREADS = 256, 64
STATISTICS_CHUNK, EIGHT_BIT_CHUNK = 8192, 4096

# Triton's names of dtypes.
DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}

_POINTERS = {torch.int64: "*i64", torch.float32: "*fp32", torch.float64: "*fp64"}

# What stands for an argument: its dtype for a pointer, and one of these for a number. Of multiples of 16 the compiler is told.
MULTIPLE_OF_16, INT32, INT64, FLOAT64 = 16, 17, (1 << 40) + 1, 1.5


class Source(NamedTuple):
    """What a kernel is compiled from: the function, what stands for its arguments, its compile-time arguments, the dtype it
    computes in, the threads of a program, the most elements that a program of a step takes, and the most registers of a thread
    on NVIDIA's GPUs, where the compiler is to be told."""

    function: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    opmath: torch.dtype
    threads: int = THREADS
    chunk: int = 0
    registers: int | None = None


def step(rule: Rule, flags: int, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> Source:
    """Steps a bucket. ``state`` is not looked at where the rule has no states."""
    states = 2 + bool(flags & Flag.AMSGRAD) if rule is Rule.ADAM else int(bool(flags & Flag.MOMENTUM))
    state = torch.uint8 if flags & Flag.EIGHT_BIT else state if states else param
    mode = Mode(flags & FLAGS)
    kept = mode.state_dtype if mode.state_name else param
    # One 128-bit access per thread and tensor of the widest dtype: with two, 16-bit tensors beside 32-bit ones would have
    # their values exchanged between threads.
    per_thread = 16 // max(t.itemsize for t in (param, grad, state, kept))
    if flags & Flag.STATISTICS:
        per_thread = min(per_thread, 4)  # the sums of eight elements take 128 to 250 registers, or memory
    threads = STEP_THREADS if per_thread < 8 else THREADS  # eight elements take more than 64 registers
    chunk = 2 * threads * per_thread
    if flags & Flag.STATISTICS:
        threads, chunk = THREADS, STATISTICS_CHUNK
    registers = None
    if flags & Flag.EIGHT_BIT:
        threads, chunk = EIGHT_BIT_THREADS, EIGHT_BIT_CHUNK
        registers = 128 if per_thread == 8 else None  # triton 3.6 took 140 on sm_80, for nothing
    constants = {
        "RULE": int(rule),
        "BUCKET_FLAGS": int(flags),
        "STATES": states,
        "PARAM_DTYPE": DTYPES[torch.int16 if mode in (Mode.REMAINDER, Mode.REMAINDER8) else param],
        "GRAD_DTYPE": DTYPES[grad],
        "STATE_DTYPE": DTYPES[state],
        "KEPT_DTYPE": DTYPES[kept],
        "BLOCK": threads * per_thread,
        # Single elements: with one for a thread, 16-bit ones would leave memory waiting. As many as in BLOCK would share its
        # numbers of lanes, and exchange them through shared memory.
        "TAIL_BLOCK": 2 * threads if per_thread > 2 else threads,
    }
    opmath = torch.float64 if param is torch.float64 else torch.float32
    arguments = (torch.int64, torch.int64, MULTIPLE_OF_16, torch.float64, torch.int64, opmath, torch.float64)
    return Source(fused_l2_step, arguments, constants, opmath, threads, chunk, registers)


def measure(dtype: torch.dtype, largest: bool) -> Source:
    """Measures gradients of one dtype: the sum of their squares, or the largest. Each program writes one float64."""
    arguments = (torch.int64, torch.int64, torch.float64, MULTIPLE_OF_16, INT32, torch.int64)
    constants = {"LARGEST": largest, "DTYPE": DTYPES[dtype]}
    return Source(fused_l2_measure_grads, arguments, constants, torch.float64)


def control(largest: bool, opmath: torch.dtype) -> Source:
    """Decides about a step, in one program. ``opmath`` is the dtype of factor and norm."""
    arguments = (torch.float64, torch.float64, INT64, INT64, INT32, INT32, FLOAT64)
    return Source(fused_l2_control, arguments, {"LARGEST": largest, "OPMATH": DTYPES[opmath]}, opmath)


def coefficients(rule: Rule, flags: int, opmath: torch.dtype, rows: int) -> Source:
    """Computes a bucket's coefficient rows, one per tensor, and counts its steps; ``rows`` of them in a program."""
    arguments = (torch.int64, torch.int64, opmath, INT32, torch.float64, torch.int64, torch.float64)
    constants = {"RULE": int(rule), "BUCKET_FLAGS": int(flags), "BLOCK": rows}
    return Source(fused_l2_coefficients, arguments, constants, opmath)


def write(words: int) -> Source:
    """Writes its arguments to memory, up to this many int64, in one program."""
    return Source(fused_l2_write, (torch.int64, INT32, (INT64,) * words), {}, torch.int64)


SOURCES: dict[str, Callable[..., Source]] = {
    "step": step,
    "measure": measure,
    "control": control,
    "coefficients": coefficients,
    "write": write,
}


def options(source: Source, target: GPUTarget) -> dict[str, Any]:
    """How every kernel is compiled. Without fusion of products and sums: the rules write their fmas out."""
    most = {"maxnreg": source.registers} if source.registers and target.backend == "cuda" else {}
    return {"num_warps": source.threads // target.warp_size, "enable_fp_fusion": False, **most}


class Refused(RuntimeError):
    """The compiler does not take a kernel: it will not do so the next time either."""


def compiled(source: Source, target: GPUTarget) -> Any:
    """What the compiler makes of a source, or has made of it before: Triton's cache finds it by source, target, options and
    version. The GPU need not be there.

    Not by calling the function: what that gives depends on the process's hooks and modes (jit_cache_hook, AsyncCompileMode).
    """
    function, arguments, constants = source[:3]
    if not isinstance(function, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set, so Triton would run kernels on the host. Unset it before importing triton")
    names = function.arg_names
    types = [_type_of(argument) for argument in arguments] + ["constexpr"] * len(constants)
    values = {(len(arguments) + i,): value for i, value in enumerate(constants.values())}
    assert names[len(arguments) :] == list(constants)
    hints = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(arguments) if is_multiple_of_16(argument)}
    written = ASTSource(function, dict(zip(names, types, strict=True)), values, hints)
    try:
        with alone():
            return triton.compile(written, target=target, options=options(source, target))
    except TritonError as error:
        gpu = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
        raise Refused(f"triton {version()} does not compile {function.__name__} for {gpu}: {error}") from error


def target_of(architecture: int | str) -> GPUTarget:
    """An NVIDIA architecture by number (90: sm_90) or an AMD one by name."""
    return GPUTarget("cuda", architecture, 32) if isinstance(architecture, int) else GPUTarget("hip", architecture, 64)


def name_of(source: Source) -> str:
    """The kernel's name, as profilers show it."""
    rule = source.constants.get("RULE") if source.function is fused_l2_step else None
    return source.function.__name__ if rule is None else f"fused_l2_{Rule(rule).name.lower()}"


def is_multiple_of_16(argument: Any) -> bool:
    """Whether the compiler is told that an argument is one, given what stands for it: addresses and chunk sizes are."""
    return isinstance(argument, torch.dtype) or (isinstance(argument, int) and argument % 16 == 0)


def _type_of(argument: Any) -> Any:
    """Triton's name for the type of what stands for an argument."""
    if isinstance(argument, torch.dtype):
        return _POINTERS[argument]
    if isinstance(argument, tuple):
        return tuple(map(_type_of, argument))
    if isinstance(argument, float):
        return "fp64"
    return "i32" if argument < 1 << 31 else "i64"


class Kernel:
    """A kernel compiled for the current device, loaded and ready: its first launch would do that, in the middle of a step.

    Compiled kernels are called directly: Triton's usual way looks at each argument to find the kernel, at four times the host
    time. Addresses are integers.
    """

    def __init__(self, source: Source) -> None:
        self.opmath, self.chunk, self.name = source.opmath, source.chunk, name_of(source)
        self.compiled = compiled(source, driver.active.get_current_target())
        self.compiled[(1, 1, 1)]  # loads the module
        self._constants = tuple(source.constants.values())

    def launcher(self, programs: int, *fixed: int) -> Callable[..., None]:
        """What launches this many programs on a stream, given the arguments behind the ``fixed`` ones."""
        run, constants = self.compiled[(programs, 1, 1)], self._constants

        def launch(stream: int, *given: Any) -> None:
            run(*fixed, *given, *constants, stream=stream)

        return launch


def current_stream(device: int) -> int:
    """The current stream of a device, as an integer."""
    return int(driver.active.get_current_stream(device))


def version() -> str:
    return str(triton.__version__)
