"""What a step leaves of a 16-bit parameter's float32 value: bits of a bucket's flags, and a state beside the parameter."""

from __future__ import annotations

from enum import IntEnum

import torch

from .tensor_table import Flag

HALVES = (torch.bfloat16, torch.float16)


class Mode(IntEnum):
    """What a step leaves of a 16-bit parameter's float32 value. The values are bits of ``Flag``."""

    ROUND = 0  # the nearest 16-bit number
    MASTER = Flag.MASTER  # all of it, in a float32 state; the parameter is its rounding
    REMAINDER = Flag.REMAINDER  # all of it: the parameter's 16 bits and 16 more, in an int16 state
    KAHAN = Flag.KAHAN  # the rounding, and a bfloat16 state with what it left out
    STOCHASTIC = Flag.STOCHASTIC  # one of the two neighbours, at random, so that the mean is right
    REMAINDER8 = Flag.REMAINDER8  # 24 bits: the parameter's and 8 more, in an int8 state, rounded at random to a neighbour

    @property
    def state_name(self) -> str | None:
        """The key of what is kept beside the parameter."""
        return _STATE_NAMES.get(self)

    @property
    def state_dtype(self) -> torch.dtype:
        return {Mode.MASTER: torch.float32, Mode.REMAINDER: torch.int16, Mode.REMAINDER8: torch.int8}.get(self, torch.bfloat16)

    @property
    def is_random(self) -> bool:
        return bool(self & RANDOM)


_STATE_NAMES = {
    Mode.MASTER: "master_param",
    Mode.REMAINDER: "param_remainder",
    Mode.KAHAN: "kahan_comp",
    Mode.REMAINDER8: "param_remainder8",
}
STATE_NAMES = tuple(_STATE_NAMES.values())
FLAGS = sum(Mode)  # the bits that say which
RANDOM = Flag.KAHAN | Flag.STOCHASTIC | Flag.REMAINDER8 | Flag.EIGHT_BIT  # what takes random bits, and so a step count


# 8-bit states: codes of the parameter's shape, and a scale for each group of them.

EIGHT_BIT = "8bit"  # the value of ``state_dtype``
CODES = {name: f"{name}_8bit" for name in ("momentum_buffer", "exp_avg", "exp_avg_sq")}
SCALES = {name: f"{name}_scale" for name in CODES}
EIGHT_BIT_NAMES = (*CODES.values(), *SCALES.values())
