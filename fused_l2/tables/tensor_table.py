"""The memory layout that Python and the kernels share: tensor rows, buckets, flags.

Each name stands here once and in ``csrc/table.h`` once; :func:`layout` spells this side out and the C++ library is
refused when its own spelling differs.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from enum import IntEnum

import torch

from . import coefficients

# One tensor of a step: int64 columns, addresses as integers. state0..2 are momentum_buffer, or exp_avg, exp_avg_sq and
# max_exp_avg_sq; `coefficients` is the number of the tensor's coefficient row; `kept` is what a low-precision flag keeps
# beside the parameter; `key`, for random bits: the parameter's key in the low 32 bits, the number of its first element in the
# high ones; scale0 and scale1 belong to 8-bit states: a byte for each GROUP elements.
COLUMNS = (
    "param", "grad", "state0", "state1", "state2", "step", "numel", "coefficients", "flags", "kept", "key", "scale0", "scale1",
)  # fmt: skip
PARAM, GRAD, STATE0, STATE1, STATE2, STEP, NUMEL, COEFFICIENTS, FLAGS, KEPT, KEY, SCALE0, SCALE1 = range(len(COLUMNS))
WIDTH = len(COLUMNS)

BUCKET = ("rule", "flags", "param_dtype", "grad_dtype", "state_dtype", "rows", "table", "coefficients", "steps", "factor")

# What a step with Flag.STATISTICS leaves of each chunk: sums of g^2, of w^2 before the step, of the update^2; how many
# gradients are not finite; the second sum again, 0 for a step that was not made; and how much of the step rounding to 16 bits
# gave back, the sum of w * (stored - exact), w before the step.
STATISTICS = ("grads", "params", "updates", "nonfinite", "stepped", "returned")

# Sums over a chunk are made in this many lanes: csrc/sums.h says how, and why.
LANES = 512

# How many elements of an 8-bit state share a scale.
GROUP = 32

# Dtypes by their number in the table.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Rule(IntEnum):
    """The update rule of a bucket."""

    SGD = 0
    ADAM = 1


class Flag(IntEnum):
    """Bits for the shape of a bucket's computation: what a kernel is compiled for rather than told at run time."""

    MOMENTUM = 1
    NESTEROV = 2
    MAXIMIZE = 4
    DECOUPLED = 8
    AMSGRAD = 16
    SCALED = 32  # gradients are multiplied by a factor as they are loaded
    CAUTIOUS = 64  # decoupled decay only where it and the update go the same way
    STATISTICS = 128  # chunks are measured as they are stepped
    # What is left of the float32 value of a 16-bit parameter (low_precision.py); one of them at most.
    MASTER = 256
    REMAINDER = 512
    KAHAN = 1024
    STOCHASTIC = 2048
    REMAINDER8 = 4096
    EIGHT_BIT = 8192  # states are 8-bit codes, with a scale for each group of elements (reference.py)


class RowFlag(IntEnum):
    """Bits for what is particular to one tensor."""

    FIRST_STEP = 1  # its momentum buffer holds nothing yet


def layout() -> str:
    """This side's spelling of the layout, to be compared with ``fused_l2_layout()`` of the library."""
    parts = (
        ("columns", COLUMNS),
        ("bucket", BUCKET),
        ("sgd", coefficients.SGD),
        ("adam", coefficients.ADAM),
        ("rules", [rule.name.lower() for rule in Rule]),
        ("dtypes", [str(dtype).removeprefix("torch.") for dtype in DTYPES]),
        ("flags", [flag.name.lower() for flag in Flag]),
        ("row_flags", [flag.name.lower() for flag in RowFlag]),
        ("statistics", STATISTICS),
        ("step_count", [str(coefficients.STEP_COUNT)]),
        ("width", [str(coefficients.WIDTH)]),
        ("group", [str(GROUP)]),
    )
    return "".join(f"{word} " for title, names in parts for word in (title, *names))


class TensorTable:
    """The rows of one bucket, and what its coefficient rows hold.

    ``rows`` holds one int64 row per tensor, ``scalars`` one float64 row per coefficient row, ``steps`` the step count each
    coefficient row expects to find in its tensors' counters. ``address`` is that of the rows.
    """

    def __init__(self) -> None:
        self.rows = array("q")
        self.address = 0
        self.scalars = array("d", bytes(8 * coefficients.WIDTH))
        self.steps = array("d", bytes(8))

    @property
    def count(self) -> int:
        return len(self.rows) // WIDTH

    def set_rows(self, rows: bytes) -> None:
        """Hold these rows, in memory of their own, instead of the ones before."""
        self.rows = array("q", rows)
        self.address = address_of(self.rows)

    def reserve(self, coefficient_rows: int) -> None:
        """Have room for so many coefficient rows. Keeps what is in the rows that there are."""
        missing = coefficient_rows - len(self.steps)
        if missing > 0:
            more = max(missing, len(self.steps))  # doubled, so that growing one by one moves the memory rarely
            self.scalars.frombytes(bytes(8 * coefficients.WIDTH * more))
            self.steps.frombytes(bytes(8 * more))

    def static_rows(self) -> bytes:
        """The rows without the gradients' addresses."""
        rows = array("q", self.rows)
        memoryview(rows)[GRAD::WIDTH] = array("q", bytes(8 * self.count))
        return rows.tobytes()

    def numels(self) -> list[int]:
        """The number of elements of each tensor, 0 for those without a gradient."""
        return self.rows[NUMEL::WIDTH].tolist()

    def bucket_row(
        self, rule: Rule, flags: int, param: torch.dtype, grad: torch.dtype, state: torch.dtype, factor: array[float]
    ) -> tuple[int, ...]:
        """The row that stands for this table in a list of buckets. ``factor`` holds what gradients are multiplied by."""
        return (
            rule,
            flags,
            DTYPES[param],
            DTYPES[grad],
            DTYPES[state],
            self.count,
            address_of(self.rows),
            address_of(self.scalars),
            address_of(self.steps),
            address_of(factor),
        )


def chunk_map(numels: Sequence[int], chunk: int) -> array[int]:
    """Which chunk of which tensor each program of a launch works on: the tensor's row in the low 32 bits of a word, the number
    of the chunk within the tensor in the high ones. Empty tensors have no chunks."""
    words = array("q")
    for row, n in enumerate(numels):
        words.extend(range(row, row + (-(-n // chunk) << 32), 1 << 32))
    return words


def norm_chunk(elements: int) -> int:
    """How many elements make one partial sum of a norm over this many: it defines the order of the sum.

    Not more than 16384 partial sums, but for those of tensors smaller than a chunk.
    """
    chunk = 16384
    while elements > chunk << 14:
        chunk *= 2
    return chunk


def statistics_chunk(elements: int) -> int:
    """How many elements the CPU engine measures together, over this many: long runs where there is enough for all threads."""
    return 65536 if elements >= 1 << 22 else 16384


def address_of(values: array[int] | array[float]) -> int:
    """The address of an array's first element."""
    return values.buffer_info()[0]


def int64_array(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """A C array of these integers."""
    return (ctypes.c_int64 * len(values))(*values)
