"""From a bucket's signature to a compiled kernel, and its launch.

What a kernel is compiled for is the shape of the computation: rule, flags, dtypes. Hyperparameters and sizes are read at run
time, so that a schedule of lr or weight decay compiles nothing. Nothing is autotuned: that would run an in-place update many
times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from ..tensor_table import Flag, Rule
from .adam import fused_l2_adam
from .sgd import fused_l2_sgd

THREADS = 128  # per program. With 256 the compiler spills registers in Adam to reach a higher occupancy.

_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Specialization(NamedTuple):
    """What a kernel is compiled from: the function, its compile-time arguments, and the dtype it computes in."""

    function: Any
    constants: dict[str, Any]
    opmath: torch.dtype


def specialization(rule: Rule, flags: int, param: torch.dtype, state: torch.dtype) -> Specialization:
    """The kernel of a bucket. ``state`` is not looked at where the rule has no states."""
    if rule is Rule.SGD:
        function, states = fused_l2_sgd, 1 if flags & Flag.MOMENTUM else 0
    else:
        function, states = fused_l2_adam, 3 if flags & Flag.AMSGRAD else 2
    state = state if states else param
    # One 128-bit access per thread and tensor of the widest dtype: with two, 16-bit tensors beside 32-bit ones would have
    # their values exchanged between threads.
    per_thread = 16 // max(param.itemsize, state.itemsize)
    constants = {
        "FLAGS": int(flags),
        "STATES": states,
        "PARAM_DTYPE": _DTYPES[param],
        "STATE_DTYPE": _DTYPES[state],
        "BLOCK": THREADS * per_thread,
        "TAIL_BLOCK": THREADS,
    }
    return Specialization(function, constants, torch.float64 if param is torch.float64 else torch.float32)


def options(warp_size: int) -> dict[str, Any]:
    """How every kernel is compiled. Without fusion of products and sums: the rules write their fmas out."""
    return {"num_warps": THREADS // warp_size, "enable_fp_fusion": False}


class Kernel:
    """A kernel compiled for the current device, loaded and ready."""

    def __init__(self, rule: Rule, flags: int, param: torch.dtype, state: torch.dtype) -> None:
        function, self._constants, self.opmath = specialization(rule, flags, param, state)
        # The first launch of a kernel costs seconds, so it is compiled and loaded here, while nothing has changed yet.
        # 16 stands for any chunk size: all are multiples of it, and the compiler is told.
        self._compiled = function.warmup(
            torch.int64,
            torch.int64,
            self.opmath,
            16,
            **self._constants,
            **options(driver.active.get_current_target().warp_size),
            grid=(1,),
        )
        self._compiled[(1, 1, 1)]  # loads the module

    def launcher(self, programs: int, chunk_map: int, table: int, coefficients: int, chunk: int) -> Callable[[int], None]:
        """What launches this many programs with these arguments (addresses as integers) on a stream, given as an integer.

        The compiled kernel is called directly: Triton's usual way looks at each argument to find the kernel, at four times
        the host time.
        """
        run = self._compiled[(programs, 1, 1)]
        arguments = (chunk_map, table, coefficients, chunk, *self._constants.values())

        def launch(stream: int) -> None:
            run(*arguments, stream=stream)

        return launch


def current_stream(device: int) -> int:
    """The current stream of a device, as an integer."""
    return int(driver.active.get_current_stream(device))


def version() -> str:
    return str(triton.__version__)
