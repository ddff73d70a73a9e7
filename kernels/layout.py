"""The layout of ``fused_l2.tables`` as compile-time constants, which is what a kernel can read."""

from __future__ import annotations

import triton.language as tl

from ..tables import coefficients, control, modes
from ..tables import tensor_table as table
from ..tables.tensor_table import Flag, RowFlag, Rule

PARAM = tl.constexpr(table.PARAM)  # gradients have an array of their own
STATE0, STATE1, STATE2 = tl.constexpr(table.STATE0), tl.constexpr(table.STATE1), tl.constexpr(table.STATE2)
SCALE0, SCALE1 = tl.constexpr(table.SCALE0), tl.constexpr(table.SCALE1)
NUMEL, COEFFICIENTS, FLAGS = tl.constexpr(table.NUMEL), tl.constexpr(table.COEFFICIENTS), tl.constexpr(table.FLAGS)
KEPT, KEY = tl.constexpr(table.KEPT), tl.constexpr(table.KEY)
WIDTH, LANES, GROUP = tl.constexpr(table.WIDTH), tl.constexpr(table.LANES), tl.constexpr(table.GROUP)
COEFFICIENT_WIDTH, NUMBERS = tl.constexpr(coefficients.WIDTH), tl.constexpr(coefficients.NUMBERS)
STEP_COUNT, RANDOM_STEPS = tl.constexpr(coefficients.STEP_COUNT), tl.constexpr(coefficients.RANDOM_STEPS)
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
REMAINDER8, EIGHT_BIT = tl.constexpr(int(Flag.REMAINDER8)), tl.constexpr(int(Flag.EIGHT_BIT))
KEEPS = tl.constexpr(sum(int(mode) for mode in modes.Mode if mode.state_name))  # something beside the parameter
RANDOM = tl.constexpr(int(modes.RANDOM))
FIGURES = tl.constexpr(len(table.STATISTICS))
FIRST_STEP = tl.constexpr(int(RowFlag.FIRST_STEP))

# Hyperparameters of a group, by their place in `numbers` and `sources`, and what a coefficient row holds.
_SGD, _ADAM = coefficients.SgdNumbers._fields, coefficients.AdamNumbers._fields
SGD_LR, SGD_MOMENTUM = tl.constexpr(_SGD.index("lr")), tl.constexpr(_SGD.index("momentum"))
SGD_DAMPENING, SGD_WEIGHT_DECAY = tl.constexpr(_SGD.index("dampening")), tl.constexpr(_SGD.index("weight_decay"))
SGD_MAX_LR, SGD_DECAY_RULE = tl.constexpr(_SGD.index("max_lr")), tl.constexpr(_SGD.index("decay_rule"))
ADAM_LR, ADAM_EPS = tl.constexpr(_ADAM.index("lr")), tl.constexpr(_ADAM.index("eps"))
ADAM_BETA1, ADAM_BETA2 = tl.constexpr(_ADAM.index("beta1")), tl.constexpr(_ADAM.index("beta2"))
ADAM_WEIGHT_DECAY, ADAM_MAX_LR = tl.constexpr(_ADAM.index("weight_decay")), tl.constexpr(_ADAM.index("max_lr"))
ADAM_DECAY_RULE = tl.constexpr(_ADAM.index("decay_rule"))
ROW_WEIGHT_DECAY = tl.constexpr(coefficients.ADAM.index("weight_decay"))  # the same for SGD, as the next one
ROW_DECAY = tl.constexpr(coefficients.ADAM.index("decay"))
ROW_MOMENTUM = tl.constexpr(coefficients.SGD.index("momentum"))
ROW_ONE_MINUS_DAMPENING = tl.constexpr(coefficients.SGD.index("one_minus_dampening"))
ROW_NEG_LR = tl.constexpr(coefficients.SGD.index("neg_lr"))
ROW_ONE_MINUS_BETA1 = tl.constexpr(coefficients.ADAM.index("one_minus_beta1"))
ROW_BETA2 = tl.constexpr(coefficients.ADAM.index("beta2"))
ROW_ONE_MINUS_BETA2 = tl.constexpr(coefficients.ADAM.index("one_minus_beta2"))
ROW_BIAS_CORRECTION2_SQRT = tl.constexpr(coefficients.ADAM.index("bias_correction2_sqrt"))
ROW_EPS = tl.constexpr(coefficients.ADAM.index("eps"))
ROW_NEG_STEP_SIZE = tl.constexpr(coefficients.ADAM.index("neg_step_size"))
