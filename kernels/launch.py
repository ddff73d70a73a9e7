"""From a bucket's signature to a compiled kernel, and its launch.

What a kernel is compiled for is the shape of the computation: rule, flags, dtypes. Hyperparameters and sizes are read at run
time, so that a schedule of lr or weight decay compiles nothing. Nothing is autotuned: that would run an in-place update many
times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from ..tables.modes import FLAGS, Mode
from ..tables.tensor_table import Flag, Rule
from .adam import fused_l2_adam
from .coefficients import fused_l2_coefficients
from .control import fused_l2_control
from .norms import fused_l2_measure_grads
from .sgd import fused_l2_sgd
from .write import fused_l2_write

THREADS = 128  # per program. With 256 the compiler spills registers in Adam to reach a higher occupancy.
WORDS = 120  # that one launch of fused_l2_write carries
_ADDRESS = (1 << 40) + 1  # stands for any 64-bit integer, as 17 does for a 32-bit one: no multiple of 16

# Triton's names of dtypes.
DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
}


class Specialization(NamedTuple):
    """What a kernel is compiled from: the function, its compile-time arguments, and the dtype it computes in."""

    function: Any
    constants: dict[str, Any]
    opmath: torch.dtype


def specialization(rule: Rule, flags: int, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> Specialization:
    """The kernel of a bucket. ``state`` is not looked at where the rule has no states."""
    if rule is Rule.SGD:
        function, states = fused_l2_sgd, 1 if flags & Flag.MOMENTUM else 0
    else:
        function, states = fused_l2_adam, 3 if flags & Flag.AMSGRAD else 2
    state = state if states else param
    mode = Mode(flags & FLAGS)
    kept = mode.state_dtype if mode.state_name else param
    # One 128-bit access per thread and tensor of the widest dtype: with two, 16-bit tensors beside 32-bit ones would have
    # their values exchanged between threads.
    per_thread = 16 // max(t.itemsize for t in (param, grad, state, kept))
    constants = {
        "FLAGS": int(flags),
        "STATES": states,
        "PARAM_DTYPE": DTYPES[torch.int16 if mode is Mode.REMAINDER else param],
        "GRAD_DTYPE": DTYPES[grad],
        "STATE_DTYPE": DTYPES[state],
        "KEPT_DTYPE": DTYPES[kept],
        "BLOCK": THREADS * per_thread,
        "TAIL_BLOCK": THREADS,
    }
    return Specialization(function, constants, torch.float64 if param is torch.float64 else torch.float32)


def options(warp_size: int) -> dict[str, Any]:
    """How every kernel is compiled. Without fusion of products and sums: the rules write their fmas out."""
    return {"num_warps": THREADS // warp_size, "enable_fp_fusion": False}


def compiled(function: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """A kernel compiled for the current device and loaded. Arguments are dtypes for pointers, and numbers.

    A kernel's first launch compiles it, so it is compiled and loaded here, while nothing has changed yet. The number 16
    stands for any multiple of it, and the compiler is told.
    """
    warp_size = driver.active.get_current_target().warp_size
    kernel = function.warmup(*arguments, **constants, **options(warp_size), grid=(1,))
    kernel[(1, 1, 1)]  # loads the module
    return kernel


class Kernel:
    """A bucket's kernel, compiled for the current device, loaded and ready.

    Compiled kernels are called directly: Triton's usual way looks at each argument to find the kernel, at four times the host
    time. What is fixed for a bucket is given once; addresses are integers.
    """

    def __init__(self, rule: Rule, flags: int, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> None:
        function, self._constants, self.opmath = specialization(rule, flags, param, grad, state)
        arguments = (torch.int64, torch.int64, torch.int64, self.opmath, 16, torch.float64, torch.float64)
        self._compiled = compiled(function, arguments, self._constants)

    def launcher(
        self, programs: int, chunk_map: int, table: int, chunk: int, partials: int
    ) -> Callable[[int, int, int, int], None]:
        """What launches this many programs on a stream, given the gradients' addresses, coefficient rows and control."""
        run, constants = self._compiled[(programs, 1, 1)], tuple(self._constants.values())

        def launch(stream: int, grads: int, coefficients: int, control: int) -> None:
            run(chunk_map, table, grads, coefficients, chunk, control, partials, *constants, stream=stream)

        return launch


class MeasureKernel:
    """The kernel that measures gradients of one dtype: the sum of their squares, or the largest."""

    def __init__(self, dtype: torch.dtype, largest: bool) -> None:
        self._constants = {"LARGEST": largest, "DTYPE": DTYPES[dtype]}
        arguments = (torch.int64, torch.int64, torch.int64, torch.float64, 16, 17)
        self._compiled = compiled(fused_l2_measure_grads, arguments, self._constants)

    def launcher(
        self, programs: int, chunk_map: int, table: int, partials: int, chunk: int, first: int
    ) -> Callable[[int, int], None]:
        """What launches this many programs on a stream, given the gradients' addresses. They write one float64 each, from
        ``partials[first]`` on."""
        run, constants = self._compiled[(programs, 1, 1)], tuple(self._constants.values())

        def launch(stream: int, grads: int) -> None:
            run(chunk_map, table, grads, partials, chunk, first, *constants, stream=stream)

        return launch


class ControlKernel:
    """The kernel that decides about a step. ``opmath`` is the dtype of factor and norm."""

    def __init__(self, largest: bool, opmath: torch.dtype) -> None:
        self._constants = {"LARGEST": largest, "OPMATH": DTYPES[opmath]}
        arguments = (torch.float64, torch.float64, _ADDRESS, _ADDRESS, 17, 17, 1.5)
        self._compiled = compiled(fused_l2_control, arguments, self._constants)

    def launcher(self, partials: int) -> Callable[[int, int, int, int, int, bool, float], None]:
        """What makes a control of this many partial results, on a stream."""
        run, constants = self._compiled[(1, 1, 1)], tuple(self._constants.values())

        def launch(
            stream: int, control: int, grad_scale: int, found_inf: int, count: int, skips_nonfinite: bool, max_norm: float
        ) -> None:
            run(
                partials, control, grad_scale, found_inf, count, int(skips_nonfinite), max_norm, *constants, stream=stream
            )  # fmt: skip

        return launch


class CoefficientsKernel:
    """The kernel that computes a bucket's coefficient rows, one per tensor, and counts its steps."""

    def __init__(self, rule: Rule, flags: int, opmath: torch.dtype) -> None:
        self._constants = {"RULE": int(rule), "BUCKET_FLAGS": int(flags), "BLOCK": THREADS}
        int64, float64 = torch.int64, torch.float64
        arguments = (int64, int64, float64, int64, opmath, float64, 17)
        self._compiled = compiled(fused_l2_coefficients, arguments, self._constants)

    def launcher(self, groups: int, counters: int, coefficients: int, count: int) -> Callable[[int, int, int, int], None]:
        """What does so for this many tensors on a stream, given hyperparameters, their sources, and the control."""
        run, constants = self._compiled[(-(-count // THREADS), 1, 1)], tuple(self._constants.values())

        def launch(stream: int, numbers: int, sources: int, control: int) -> None:
            run(groups, counters, numbers, sources, coefficients, control, count, *constants, stream=stream)

        return launch


class WriteKernel:
    """The kernel whose arguments are what it writes."""

    def __init__(self) -> None:
        self._compiled = compiled(fused_l2_write, (torch.int64, 17, (_ADDRESS,) * WORDS), {})

    def write(self, stream: int, target: int, words: Sequence[int]) -> None:
        """Write these int64 to memory from ``target`` on, a multiple of 16."""
        run = self._compiled[(1, 1, 1)]
        for begin in range(0, len(words), WORDS):
            part = tuple(words[begin : begin + WORDS])
            run(target + 8 * begin, len(part), part + (0,) * (WORDS - len(part)), stream=stream)


def current_stream(device: int) -> int:
    """The current stream of a device, as an integer."""
    return int(driver.active.get_current_stream(device))


def version() -> str:
    return str(triton.__version__)
