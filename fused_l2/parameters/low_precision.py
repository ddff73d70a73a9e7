"""16-bit parameters whose small updates survive: what is kept beside them, and how it is rounded.

A bfloat16 number has 8 significant bits: ``w * (1 - lr * weight_decay)`` rounds back to w where lr * weight_decay < 2^-9, so
that weight decay silently does nothing. Each :class:`Mode` computes a step in float32 and says what is stored of the result.
This module is the definition in PyTorch; ``csrc/low_precision_kernels.h`` and ``kernels/low_precision.py`` have the same
formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tables.coefficients import RANDOM_STEPS
from ..tables.modes import EIGHT_BIT, HALVES, STATE_NAMES, Mode
from .eight_bits import fits
from .shards import is_dtensor, like, local


@dataclass(frozen=True)
class LowPrecision:
    """The options of an optimizer that concern dtypes."""

    mode: Mode = Mode.ROUND
    state_dtype: torch.dtype | str | None = None  # "8bit": codes with scales
    seed: int = 0

    def mode_of(self, param: Tensor) -> Mode:
        return self.mode if param.dtype in HALVES else Mode.ROUND

    @property
    def is_random(self) -> bool:
        """Whether something is rounded at random, which takes step counts."""
        return self.mode.is_random or self.state_dtype == EIGHT_BIT

    def kept_of(self, param: Tensor, state: Mapping[str, Any]) -> tuple[Mode, Any]:
        """A parameter's mode and what its state holds of it; of one that has no 16 bits any more, the mode it had."""
        mode = self.mode_of(param)
        if param.dtype not in HALVES:
            mode = next((m for m in Mode if m.state_name in state), mode)
        return mode, state.get(mode.state_name) if mode.state_name else None

    def has_codes(self, param: Tensor) -> bool:
        """Whether moments and momentum of this parameter are 8-bit codes."""
        return self.state_dtype == EIGHT_BIT and fits(param)

    def state_dtype_of(self, param: Tensor) -> torch.dtype | None:
        """The dtype that moments and momentum of this parameter have to have; None: any, the parameter's if new. Of 8-bit ones
        that in which they are stepped, and in which those of parameters that they do not fit are kept."""
        if param.dtype is torch.float64:
            return None
        if isinstance(self.state_dtype, str):
            return torch.float32
        if self.state_dtype is None and self.mode_of(param) is not Mode.ROUND:
            return torch.float32
        return self.state_dtype


# Random bits: a hash of where they are used, so that no result depends on who computes it, in which order.

_MASK = 0xFFFFFFFF


def _mix(x: Any) -> Any:
    """A bijection of 32-bit words without visible structure (Wellons 2018, "lowbias32"); of ints, or of int64 tensors."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & _MASK
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def parameter_key(seed: int, position: int) -> int:
    """What tells the random bits of one parameter from those of another; ``position``: among all of the optimizer's."""
    return int(_mix(_mix(_mix(seed & _MASK) ^ (seed >> 32 & _MASK)) ^ position & _MASK))


def random_bits(key: int, step: int, numel: int, offset: int = 0) -> Tensor:
    """32 random bits for each element of a parameter at the step with this count, as int64.

    Elements count from ``offset``, modulo 2^32, in the order of memory; steps modulo ``RANDOM_STEPS``. A mixed Weyl sequence
    (Steele, Lea and Flood 2014, "SplitMix"), which starts anew at a mixed place at each step.
    """
    step_key = _mix(key ^ _mix(step % RANDOM_STEPS))
    element = torch.arange(offset, offset + numel, dtype=torch.int64, device="cpu") & _MASK
    bits: Tensor = _mix((element * 0x9E3779B9 + step_key) & _MASK)  # of a product only the lower half counts
    return bits


# float32 and 16 bits of it.


def _bits(x: Tensor) -> Tensor:
    """The bits of a float32 tensor as unsigned numbers."""
    return x.contiguous().view(torch.int32).to(torch.int64) & _MASK


def _float(bits: Tensor) -> Tensor:
    return _signed(bits, 32).to(torch.int32).view(torch.float32)


def _signed(x: Tensor, width: int) -> Tensor:
    return torch.where(x >= 1 << (width - 1), x - (1 << width), x)


def _bfloat16(bits: Tensor) -> Tensor:
    return _signed(bits, 16).to(torch.int16).view(torch.bfloat16)


def split(w: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as bfloat16 and an int16 remainder: with magnitudes as integers, |w| = |p| * 2^16 + remainder.

    p is w rounded to nearest, ties away from zero, for a remainder of +2^15 would not fit. A NaN becomes the quiet one of its
    sign, which has no remainder: added to the bits it could make a zero of it.
    """
    sign, magnitude = _sign_and_magnitude(w)
    upper = (magnitude + 0x8000) >> 16
    return _bfloat16(sign | upper), (magnitude - (upper << 16)).to(torch.int16)


def _sign_and_magnitude(w: Tensor) -> tuple[Tensor, Tensor]:
    """Of float32: the sign where bfloat16 has it, and all other bits."""
    u = _bits(w)
    magnitude = u & 0x7FFFFFFF
    return u >> 16 & 0x8000, torch.where(magnitude > 0x7F800000, 0x7FC00000, magnitude)


def join(p: Tensor, remainder: Tensor) -> Tensor:
    """The float32 tensor that was :func:`split`.

    A parameter that was written to since keeps its new value, up to half a unit in its last place: what is left of the old
    remainder does not carry it past zero or infinity.
    """
    u = p.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
    magnitude = (u & 0x7FFF) << 16
    joined = (magnitude + remainder.to(torch.int64)).clamp(min=0)
    return _float((u & 0x8000) << 16 | torch.minimum(joined, magnitude.clamp(min=0x7F800000)))  # NaN stays NaN


def split24(w: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as bfloat16 and an int8 remainder: |w|, rounded at random to a neighbour of 24 bits, is
    |p| * 2^16 + remainder * 2^8.

    p is that neighbour rounded to nearest, ties away from zero; NaN as in :func:`split`. ``bits``: 32 random ones for each
    element, of which the lowest 8 are used. The largest finite numbers may become infinite.
    """
    sign, magnitude = _sign_and_magnitude(w)
    rounded = (magnitude + (bits & 255)) >> 8
    upper = (rounded + 0x80) >> 8
    return _bfloat16(sign | upper), (rounded - (upper << 8)).to(torch.int8)


def join24(p: Tensor, remainder: Tensor) -> Tensor:
    """The 24-bit numbers of :func:`split24`, as float32."""
    return join(p, remainder.to(torch.int32) << 8)


def master_or_param(master: Tensor, p: Tensor) -> Tensor:
    """The float32 value of a parameter with a master: the master, unless the parameter is not its rounding.

    Then it was written to since, and is what counts.
    """
    return torch.where(master.to(p.dtype).view(torch.int16) == p.view(torch.int16), master, p.float())


def compensated(p: Tensor, compensation: Tensor) -> Tensor:
    """The float32 value of a parameter with a compensation: their sum, unless the parameter was written to since.

    That is taken to be so if the compensation is larger than half a unit in the parameter's last place can be.
    """
    wide, c = p.float(), compensation.float()
    relative, least = (2.0**-8, 2.0**-134) if p.dtype is torch.bfloat16 else (2.0**-11, 2.0**-25)
    return torch.where(c.abs() <= (wide.abs() * relative).clamp_min(least), wide + c, wide)


def compensation(w: Tensor, p: Tensor, bits: Tensor) -> Tensor:
    """What rounding w to p left out, as bfloat16; 0 where that is not finite.

    Rounded stochastically: to nearest, an eighth bit of the compensation would swallow what is smaller than 2^-17 of w, as p
    swallows what is smaller than 2^-9.
    """
    left = w - p.float()
    return round_stochastically(torch.where(left.isfinite(), left, 0.0), torch.bfloat16, bits)


def round_stochastically(w: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """One of the two 16-bit neighbours of each element, with the mean w: random bits are added below the last place, and what
    is below it is cut off. ``bits``: 32 for each element, of which the upper ones are used."""
    u = _bits(w)
    sign, magnitude = u >> 16 & 0x8000, u & 0x7FFFFFFF
    nan = magnitude > 0x7F800000
    if dtype is torch.bfloat16:
        return _bfloat16(torch.where(nan, u >> 16 | 0x40, (u + (bits >> 16)) >> 16))
    normal = (magnitude - (112 << 23) + (bits >> 19)) >> 13
    # Below 2^-14 the last place is 2^-24 throughout.
    units = _float(torch.where(magnitude < 0x38800000, magnitude, 0)) * 2.0**24
    whole = units.to(torch.int32).float()
    upwards = (bits >> 8).to(torch.float32) * 2.0**-24 < units - whole
    below = whole.to(torch.int64) + upwards
    rounded = torch.where(magnitude < 0x38800000, below, normal)
    rounded = torch.where(magnitude >= 0x47800000, 0x7C00, rounded)
    return _signed(torch.where(nan, sign | 0x7E00, sign | rounded), 16).to(torch.int16).view(torch.float16)


def kept_anew(mode: Mode, param: Tensor) -> Tensor:
    """What a mode keeps beside a parameter of which nothing more is known than its 16 bits."""
    if mode is Mode.MASTER:
        return torch.empty_like(param, dtype=torch.float32).copy_(param.detach())
    return torch.zeros_like(param, dtype=mode.state_dtype)


def widened(mode: Mode, p: Tensor, kept: Tensor | None) -> Tensor:
    """The float32 value of a parameter, from it and what its mode keeps beside it."""
    if kept is None:
        return p.float() if p.dtype in HALVES else p
    if p.dtype not in HALVES or (mode in (Mode.REMAINDER, Mode.REMAINDER8) and p.dtype is not torch.bfloat16):
        return _of_converted(mode, p, kept)
    if mode is Mode.MASTER:
        return master_or_param(kept, p)
    if mode is Mode.REMAINDER8:
        return join24(p, kept)
    return join(p, kept) if mode is Mode.REMAINDER else compensated(p, kept)


def _of_converted(mode: Mode, p: Tensor, kept: Tensor) -> Tensor:
    """The value of a parameter that was brought to another dtype after what is kept was kept: elements that have not been
    written to since are still 16-bit numbers."""
    is_float16 = mode in (Mode.MASTER, Mode.KAHAN) and not bool((p.bfloat16().to(p.dtype) == p).all())
    before = p.half() if is_float16 else p.bfloat16()
    wide = torch.float64 if p.dtype is torch.float64 else torch.float32
    return torch.where(before.to(p.dtype) == p, widened(mode, before, kept).to(wide), p.to(wide))


def narrowed(mode: Mode, w: Tensor, dtype: torch.dtype, bits: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A parameter and what its mode keeps beside it, from the float32 value. ``bits``: for the random modes."""
    if mode is Mode.REMAINDER:
        return split(w)
    if mode is Mode.REMAINDER8:
        assert bits is not None
        return split24(w, bits)
    if mode is Mode.STOCHASTIC:
        assert bits is not None
        return round_stochastically(w, dtype, bits), None
    p = w.to(dtype)
    if mode is Mode.MASTER:
        return p, w
    if mode is Mode.KAHAN:
        assert bits is not None
        return p, compensation(w, p, bits)
    return p, None


# Remainders in a state dict: no collective communication knows int16, neither NCCL's nor gloo's, and casting every state to its
# parameter's dtype, as torch.optim does, would ruin it. So they travel as the bfloat16 numbers of the same bits.


def transferable(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as a state dict has it."""
    return {
        key: _reinterpreted(value, torch.int16, torch.bfloat16) if key in STATE_NAMES else value for key, value in state.items()
    }


def with_kept_dtype(key: str, value: Tensor) -> Tensor:
    """What a mode keeps beside a parameter, from a state dict."""
    return _reinterpreted(value, torch.bfloat16, torch.int16) if key == Mode.REMAINDER.state_name else value


def _reinterpreted(value: Any, dtype: torch.dtype, other: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or value.dtype is not dtype:
        return value
    return like(value, local(value).view(other)) if is_dtensor(value) else value.view(other)


def lost_decay(param: Tensor, share: float, where: str) -> str | None:
    """A warning if decay by this share of each weight per step changes no value of the parameter's dtype."""
    bits = {torch.bfloat16: 8, torch.float16: 11}[param.dtype]
    if not 0 < share < 2.0 ** -(bits + 1):
        return None
    name = str(param.dtype).removeprefix("torch.")
    return (
        f"fused_l2: weight decay takes {share:.2g} of each weight per step{where}, and no {name} number changes by less than "
        f"2^-{bits + 1} = {2.0 ** -(bits + 1):.2g} of it: rounded to {name}, weight decay does little or nothing. Keep what "
        f"rounding leaves out with low_precision='remainder' (bfloat16), 'master' or 'kahan', or round with the right mean "
        f"with low_precision='stochastic'; low_precision='round' is what you have."
    )
