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
from triton.runtime import driver

from ..tables.modes import FLAGS, Mode
from ..tables.tensor_table import Flag, Rule
from .coefficients import fused_l2_coefficients
from .control import fused_l2_control
from .multi_tensor import fused_l2_step
from .norms import fused_l2_measure_grads
from .write import fused_l2_write

THREADS = 128  # per program. With 256 the compiler spills registers in Adam to reach a higher occupancy.

# Triton's names of dtypes.
DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
}

# What stands for an argument: its dtype for a pointer, and one of these for a number. Of multiples of 16 the compiler is told.
MULTIPLE_OF_16, INT32, INT64, FLOAT64 = 16, 17, (1 << 40) + 1, 1.5


class Source(NamedTuple):
    """What a kernel is compiled from: the function, what stands for its arguments, its compile-time arguments, and the dtype it
    computes in."""

    function: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    opmath: torch.dtype


def step(rule: Rule, flags: int, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> Source:
    """Steps a bucket. ``state`` is not looked at where the rule has no states."""
    states = 2 + bool(flags & Flag.AMSGRAD) if rule is Rule.ADAM else int(bool(flags & Flag.MOMENTUM))
    state = state if states else param
    mode = Mode(flags & FLAGS)
    kept = mode.state_dtype if mode.state_name else param
    # One 128-bit access per thread and tensor of the widest dtype: with two, 16-bit tensors beside 32-bit ones would have
    # their values exchanged between threads.
    per_thread = 16 // max(t.itemsize for t in (param, grad, state, kept))
    constants = {
        "RULE": int(rule),
        "BUCKET_FLAGS": int(flags),
        "STATES": states,
        "PARAM_DTYPE": DTYPES[torch.int16 if mode is Mode.REMAINDER else param],
        "GRAD_DTYPE": DTYPES[grad],
        "STATE_DTYPE": DTYPES[state],
        "KEPT_DTYPE": DTYPES[kept],
        "BLOCK": THREADS * per_thread,
        "TAIL_BLOCK": 2 * THREADS,  # single elements: with one for a thread, 16-bit ones would leave memory waiting
    }
    opmath = torch.float64 if param is torch.float64 else torch.float32
    arguments = (torch.int64, torch.int64, MULTIPLE_OF_16, torch.float64, torch.int64, opmath, torch.float64)
    return Source(fused_l2_step, arguments, constants, opmath)


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


def options(warp_size: int) -> dict[str, Any]:
    """How every kernel is compiled. Without fusion of products and sums: the rules write their fmas out."""
    return {"num_warps": THREADS // warp_size, "enable_fp_fusion": False}


class Kernel:
    """A kernel compiled for the current device, loaded and ready: its first launch would do that, in the middle of a step.

    Compiled kernels are called directly: Triton's usual way looks at each argument to find the kernel, at four times the host
    time. Addresses are integers.
    """

    def __init__(self, source: Source) -> None:
        function, arguments, constants, self.opmath = source
        warp_size = driver.active.get_current_target().warp_size
        self.compiled = function.warmup(*arguments, **constants, **options(warp_size), grid=(1,))
        self.compiled[(1, 1, 1)]  # loads the module
        self._constants = tuple(constants.values())

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
