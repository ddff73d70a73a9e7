"""How 16-bit parameters and their float32 values are made of each other: splitting, and stochastic rounding."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import needs_library

import fused_l2
from fused_l2.parameters import low_precision

each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def same_float(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())


def sampled_halves(count: int) -> torch.Tensor:
    """Upper halves of float32 words: those at the edges, and others."""
    edges = torch.tensor([0, 0x8000, 0x7F7F, 0xFF7F, 0x7F80, 0x7F81, 0x7FFF, 0xFF80, 0xFFFF, 0x0001, 0x007F, 0x0080])
    found = torch.randperm(65536, generator=torch.Generator().manual_seed(0))[:count]
    found[: len(edges)] = edges
    return found


def test_every_bfloat16_and_every_remainder_splits_and_reassembles():
    """All 65,536 upper halves with 64 lower ones, and 128 with all lower ones. T31: NaN stays NaN."""
    few = torch.cat([torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]), torch.randint(0, 65536, (58,))])
    for upper, lower in ((torch.arange(65536), few), (sampled_halves(128), torch.arange(65536))):
        bits = (upper.view(-1, 1) << 16 | lower).flatten()
        w = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
        p, remainder = low_precision.split(w)
        assert bool(same_float(low_precision.join(p, remainder), w).all())
        assert bool((p.isnan() == w.isnan()).all())
        assert bool((torch.signbit(p) == torch.signbit(w)).all())
        assert bool((p.isinf() | ~w.isinf()).all())
        # To nearest: as torch's own rounding but for ties, which go away from zero.
        nearest = w.to(torch.bfloat16)
        differs = (p.view(torch.int16) != nearest.view(torch.int16)) & ~w.isnan()
        assert bool((remainder[differs] == -(2**15)).all())


@needs_library
def test_the_library_reassembles_and_splits_every_remainder_of_4096_parameters():
    """Through steps that change nothing, at lr 0; 268 million words. Pairs that no split makes are left out."""
    remainders = torch.arange(-(2**15), 2**15).to(torch.int16)
    made = fused_l2.SGD([torch.nn.Parameter(torch.zeros(256 * 65536).bfloat16())], lr=0.0, low_precision="remainder")
    p = made.param_groups[0]["params"][0]
    p.grad = torch.zeros_like(p)
    for upper in sampled_halves(4096).split(256):
        halves = torch.where(upper >= 2**15, upper - 2**16, upper).to(torch.int16).view(-1, 1).expand(-1, 65536)
        pairs = remainders.expand(256, -1).clone()
        magnitude = halves & 0x7FFF
        pairs[magnitude == 0] = pairs[magnitude == 0].clamp_min(0)
        pairs[magnitude == 0x7F80] = pairs[magnitude == 0x7F80].clamp_max(0)
        pairs[magnitude > 0x7F80] = 0
        quiet = torch.where(halves < 0, -0x40, 0x7FC0).to(torch.int16)  # 0xFFC0
        given = torch.where(magnitude > 0x7F80, quiet, halves).reshape(-1)  # all NaN of a sign become this one
        p.data.copy_(given.view(torch.bfloat16))
        made.state[p]["param_remainder"] = pairs.view(-1).clone()
        made.step()
        assert torch.equal(p.detach().view(torch.int16), given)
        assert torch.equal(made.state[p]["param_remainder"], pairs.view(-1))


def test_a_remainder_does_not_carry_a_parameter_that_was_written_to_away():
    p = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0]).bfloat16()
    for remainder in (-(2**15), -1, 1, 2**15 - 1):
        joined = low_precision.join(p, torch.full((6,), remainder, dtype=torch.int16))
        assert not joined[:4].isnan().any()
        assert joined[4].isnan()
        assert bool((joined[:2].abs() < 1e-38).all())
        assert abs(joined[5] - 1) <= 2.0**-8


@each_half
def test_stochastic_rounding_takes_a_neighbour_with_the_right_mean(dtype):
    """1e7 draws; the mean of n draws of a neighbour has a standard error of ulp * sqrt(f (1 - f) / n)."""
    n = 1_000_000
    for i, value in enumerate((1 + 2**-12, -3.1415926, 1.5e-5, 2.0**-14 + 2.0**-26, 4e-8, 0.1)):
        w = torch.full((n,), value)
        wide = w[0].double()
        found = {}
        for step in range(10 if i == 0 else 2):
            bits = low_precision.random_bits(low_precision.parameter_key(7, i), step, n)
            rounded = low_precision.round_stochastically(w, dtype, bits).double()
            for neighbour, times in zip(*rounded.unique(return_counts=True), strict=True):
                found[float(neighbour)] = found.get(float(neighbour), 0) + int(times)
        low, high = min(found), max(found)
        assert len(found) == 2
        assert low <= wide <= high
        draws = sum(found.values())
        share, f = found[high] / draws, (float(wide) - low) / (high - low)
        assert abs(share - f) <= 4 * math.sqrt(f * (1 - f) / draws)


def test_random_bits_depend_on_seed_step_parameter_and_element_and_on_nothing_else():
    whole = low_precision.random_bits(low_precision.parameter_key(1, 2), 3, 1000)
    assert torch.equal(whole[300:], low_precision.random_bits(low_precision.parameter_key(1, 2), 3, 700, offset=300))
    for key, step in ((low_precision.parameter_key(0, 2), 3), (low_precision.parameter_key(1, 0), 3)):
        assert float((whole == low_precision.random_bits(key, step, 1000)).double().mean()) < 0.01
    assert low_precision.parameter_key(1 << 40, 2) != low_precision.parameter_key(0, 2)
    assert not torch.equal(whole, low_precision.random_bits(low_precision.parameter_key(1, 2), 4, 1000))
    # Each bit as often as not, whatever the one before: 4 standard errors of 32,000 draws.
    ones = torch.stack([whole >> b & 1 for b in range(32)]).double()
    assert abs(float(ones.mean()) - 0.5) <= 4 * 0.5 / math.sqrt(32_000)
