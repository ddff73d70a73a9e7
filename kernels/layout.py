"""The layout of ``fused_l2.tables`` as compile-time constants, which is what a kernel can read."""

from __future__ import annotations

import triton.language as tl

from ..tables import coefficients, control
from ..tables import tensor_table as table
from ..tables.tensor_table import Flag, RowFlag, Rule

PARAM = tl.constexpr(table.PARAM)  # gradients have an array of their own
STATE0, STATE1, STATE2 = tl.constexpr(table.STATE0), tl.constexpr(table.STATE1), tl.constexpr(table.STATE2)
NUMEL, COEFFICIENTS, FLAGS = tl.constexpr(table.NUMEL), tl.constexpr(table.COEFFICIENTS), tl.constexpr(table.FLAGS)
KEPT, KEY = tl.constexpr(table.KEPT), tl.constexpr(table.KEY)
WIDTH, LANES = tl.constexpr(table.WIDTH), tl.constexpr(table.LANES)
COEFFICIENT_WIDTH, NUMBERS = tl.constexpr(coefficients.WIDTH), tl.constexpr(coefficients.NUMBERS)
STEP_COUNT = tl.constexpr(coefficients.STEP_COUNT)
FACTOR, SKIP = tl.constexpr(control.FACTOR), tl.constexpr(control.SKIP)
NORM, INV_SCALE = tl.constexpr(control.NORM), tl.constexpr(control.INV_SCALE)

ADAM = tl.constexpr(int(Rule.ADAM))
FULLY_DECOUPLED = tl.constexpr(int(coefficients.DecayRule.FULLY_DECOUPLED))
CORRECTED = tl.constexpr(int(coefficients.DecayRule.CORRECTED))

MOMENTUM, NESTEROV = tl.constexpr(int(Flag.MOMENTUM)), tl.constexpr(int(Flag.NESTEROV))
MAXIMIZE, DECOUPLED = tl.constexpr(int(Flag.MAXIMIZE)), tl.constexpr(int(Flag.DECOUPLED))
AMSGRAD, SCALED = tl.constexpr(int(Flag.AMSGRAD)), tl.constexpr(int(Flag.SCALED))
CAUTIOUS, STATISTICS = tl.constexpr(int(Flag.CAUTIOUS)), tl.constexpr(int(Flag.STATISTICS))
MASTER, REMAINDER = tl.constexpr(int(Flag.MASTER)), tl.constexpr(int(Flag.REMAINDER))
KAHAN, STOCHASTIC = tl.constexpr(int(Flag.KAHAN)), tl.constexpr(int(Flag.STOCHASTIC))
FIGURES = tl.constexpr(len(table.STATISTICS))
FIRST_STEP = tl.constexpr(int(RowFlag.FIRST_STEP))
