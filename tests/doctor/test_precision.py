"""The predicted share of the decay that arrives in 16 bits, against trainings."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from conftest import ROOT

import fused_l2
import fused_l2.doctor
from fused_l2.doctor import memory, precision

ELEMENTS, DECAY, LR = 1 << 16, 0.1, 3e-4  # as the bench has them
WARM_UP = 50


def share(optimizer: Any) -> float:
    (row,) = fused_l2.doctor.examine(optimizer, torch.nn.ParameterList(optimizer.param_groups[0]["params"])).layers
    assert row.arrives is not None
    return row.arrives


def trained(make: Any, steps: int, noise: float = 1.0) -> tuple[float, float]:
    """What arrived, as ``python -m bench precision`` measures it, and the mean of what was predicted on the way. After a
    warm-up: the first steps of Adam are those of one or a few gradients, as large as lr."""
    generator = torch.Generator().manual_seed(0)
    start = (0.05 * (torch.rand(ELEMENTS // 2, generator=generator) + 0.5)).bfloat16().repeat(2)
    pool = noise * torch.randn(1 << 18, generator=generator).bfloat16()
    p = torch.nn.Parameter(start.clone())
    p.grad = torch.empty_like(p)
    optimizer = make([p])
    group = optimizer.param_groups[0]
    predicted = []
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            start = p.detach().clone()
        if step >= WARM_UP and (step - WARM_UP) % 200 == 100:
            predicted.append(share(optimizer))
        begin = int(torch.randint(0, len(pool) - ELEMENTS, (), generator=generator))
        p.grad[: ELEMENTS // 2] = pool[begin : begin + ELEMENTS // 2]
        p.grad[ELEMENTS // 2 :] = -p.grad[: ELEMENTS // 2]
        optimizer.step()
    asked = -steps * math.log1p(-group["lr"] * group["weight_decay"])
    return math.log(float(start.double().sum() / p.detach().double().sum())) / asked, sum(predicted) / len(predicted)


# Two hundredths are promised. Without momentum the formula is exact for normal updates.
@pytest.mark.parametrize(
    ("make", "within"),
    [
        (lambda ps: fused_l2.AdamW(ps, LR / 4.36, (0.0, 0.999), weight_decay=4.36 * DECAY, state_dtype=torch.float32), 0.01),
        (lambda ps: fused_l2.AdamW(ps, LR, weight_decay=DECAY), 0.02),
        (lambda ps: torch.optim.AdamW(ps, LR, weight_decay=DECAY), 0.02),
        (lambda ps: fused_l2.AdamW(ps, LR / 10, weight_decay=DECAY), 0.01),
    ],
    ids=["no-momentum", "round", "for-loop", "small-lr"],
)
def test_prediction_agrees_with_a_training(make, within):
    measured, predicted = trained(make, 1000)
    assert predicted == pytest.approx(measured, abs=within)


def test_no_noise_no_decay():
    """Gradients of 0, as rows of an embedding that are not hit have them."""
    measured, predicted = trained(lambda ps: fused_l2.AdamW(ps, LR, weight_decay=DECAY), 200, noise=0.0)
    assert measured == 0
    assert predicted == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mode", ["remainder", "master", "kahan", "stochastic"])
def test_exact_modes_lose_nothing(mode):
    """As results of `python -m bench precision` show: 98.8 to 100 %."""
    p = torch.nn.Parameter(torch.randn(100).bfloat16())
    optimizer = fused_l2.AdamW([p], LR, weight_decay=DECAY, low_precision=mode)
    assert share(optimizer) == 1.0
    p.grad = torch.randn(100).bfloat16()
    optimizer.step()
    assert share(optimizer) == 1.0


def test_what_the_bench_has_measured_is_zero_or_whole_where_we_say_so():
    (newest,) = sorted((ROOT / "bench" / "results").glob("*precision.json"))[-1:]
    cases = [c for c in json.loads(newest.read_text())["results"]["precision"] if c.get("kind") == "decay"]
    assert cases
    for case in cases:
        measured = case["shares"]["fused_l2 round"][-1]
        if not case["noise"] or case["lr"] < 1e-4:
            assert abs(measured) < 0.02  # as test_no_noise_no_decay and small-lr predict


def test_memory_of_updates_by_the_definition():
    """sum over k of E[f(u_0) f(u_k)], from 400,000 pairs: a standard error of half a percent."""
    gap, sigma, correlation = 2.4e-4, 7e-5, 0.9
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(400_000, generator=generator, dtype=torch.float64)
    first, total = (u * sigma / gap).round() * gap, 0.0
    for _ in range(80):
        u = correlation * u + math.sqrt(1 - correlation**2) * torch.randn(400_000, generator=generator, dtype=torch.float64)
        total += float((first * (u * sigma / gap).round() * gap).mean())
    assert memory.remembered(gap, sigma, correlation) == pytest.approx(total, rel=0.05)
    assert memory.remembered(sigma / 10, sigma, correlation) == pytest.approx(sigma**2 * correlation / (1 - correlation))


def test_the_fall_of_a_population_that_is_followed_from_its_beginning():
    """Weights spread evenly, and normal updates of correlation 0.9 that know nothing of them: the joint distribution over all
    numbers of bfloat16 and 65 values of an update, 150 steps on. Memory adds 24 percent of the decay to the fall."""
    correlation, rate = 0.9, LR * DECAY
    size = LR * math.sqrt((1 - correlation) / (1 + correlation))
    first, last = (int(torch.tensor(x).bfloat16().view(torch.int16)) for x in (0.005, 0.095))
    numbers = torch.arange(first, last, dtype=torch.int16).view(torch.bfloat16).double()
    edges = (numbers[1:] + numbers[:-1]) / 2
    z = torch.linspace(-4, 4, 65, dtype=torch.float64)
    chances, turn = torch.exp(-z * z / 2), torch.exp(-((z - correlation * z[:, None]) ** 2) / (2 * (1 - correlation**2)))
    chances, turn = chances / chances.sum(), turn / turn.sum(1, keepdim=True)
    aim, half = numbers[:, None] * (1 - rate) + size * z, size * (z[1] - z[0]) / 2
    low, high = torch.searchsorted(edges, aim - half), torch.searchsorted(edges, aim + half)
    upper = torch.where(high > low, (aim + half - edges[(high - 1).clamp_min(0)]) / (2 * half), 0.0).clamp(0, 1)
    moved = numbers[low] * (1 - upper) + numbers[high] * upper - numbers[:, None]
    bounds = torch.cat([numbers[:1], edges, numbers[-1:]]).clamp(0.025, 0.075)
    joint = (bounds[1:] - bounds[:-1])[:, None] * chances
    places = [(at * 65 + torch.arange(65)).reshape(-1) for at in (low, high)]
    for _ in range(150):
        parts = [(joint * part).reshape(-1) for part in (1 - upper, upper)]
        flat = torch.zeros(joint.numel(), dtype=torch.float64)
        joint = flat.index_add_(0, places[0], parts[0]).index_add_(0, places[1], parts[1]).view_as(joint) @ turn
    counts = joint.sum(1)
    asked = rate * float((counts * numbers).sum())
    remembered = -float(((joint - counts[:, None] * chances) * moved).sum()) / asked
    weights = numbers.repeat_interleave((counts / counts.sum() * 1e6).round().long())
    found = memory.remembered_fall(
        weights, weights, torch.tensor([size], dtype=torch.float64), rate, 7, correlation
    ) / (rate * float(weights.sum()))  # fmt: skip
    assert remembered == pytest.approx(0.237, abs=0.005)
    assert found == pytest.approx(remembered, abs=0.005)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_strong_decay_without_noise_is_what_rounding_makes_of_it(dtype):
    w = (0.5 + torch.rand(5000)).to(dtype)
    rate = 0.01
    arrived = (w.double() - (w.float() * (1 - rate)).to(dtype).double()).sum() / (rate * w.double()).sum()
    given = precision.decay_share(w.double(), rate, torch.tensor([0.0], dtype=torch.float64), dtype)
    assert given == pytest.approx(float(arrived), abs=0.005)  # ties go to even numbers, in the mean up and down


def test_float32_below_its_last_place():
    p = torch.nn.Parameter(torch.rand(1000) + 0.5)
    assert share(torch.optim.AdamW([p], lr=1e-4, weight_decay=1e-4)) == 0.0
    assert share(torch.optim.AdamW([p], lr=1e-3, weight_decay=1e-2)) == pytest.approx(1, abs=0.02)


def test_what_statistics_measured_is_shown_beside_the_prediction():
    """Decay of 2^-12 of a weight is lost in bfloat16 where gradients are 0. Names repeat across groups."""
    params = [torch.nn.Parameter(torch.rand(64, 64).bfloat16() + 1) for _ in range(2)]
    groups = [{"params": [(name, p)], "weight_decay": decay} for name, p, decay in zip("ww", params, (DECAY, 0.0), strict=True)]
    optimizer = fused_l2.AdamW(groups, lr=LR, statistics=True)
    for p in params:
        p.grad = torch.zeros_like(p)
    assert fused_l2.doctor.examine(optimizer).layers[0].arrived is None
    optimizer.step()
    report = fused_l2.doctor.examine(optimizer)
    float32 = 2.0**-24 / (LR * DECAY)  # the exact values are rounded to that
    assert [row.arrived for row in report.layers] == [pytest.approx(0, abs=float32), None]
    (finding,) = report.of("decay-lost-in-rounding")
    assert finding.what.endswith("will arrive. At the last step 0 % of it did.")
    assert "arrived" in report.table()
    assert fused_l2.doctor.examine(optimizer, read_weights=False).layers[0].arrived is None


@pytest.mark.parametrize("shape", [(512, 1024), (1 << 19,), (64, 8, 32, 32), (3, 170_001)])
def test_samples_are_the_same_elements_whatever_the_strides(shape):
    """They meet all places of a row, and no part of the tensor is left out."""
    tensor = torch.arange(math.prod(shape)).view(shape)
    found = precision._Sample(tensor, 1 << 16)(tensor)
    assert len(found.unique()) == len(found) == 1 << 16
    assert found.diff().max() < 2 * tensor.numel() / (1 << 8)
    for width in (256, 1024, 2048):
        assert len((found % width).unique()) > 0.9 * width
    strided = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(precision._Sample(tensor, 1 << 16)(strided), found)


def test_many_tensors_are_looked_at_as_long_as_a_few(monkeypatch):
    """What is looked at, since a test of time would depend on the machine. The budget is a small one, for 4 tensors."""
    taken = []
    call = precision._Sample.__call__

    def counted(self: Any, tensor: Any) -> Any:
        found = call(self, tensor)
        taken.append(len(found))
        return found

    monkeypatch.setattr(precision._Sample, "__call__", counted)
    for name, value in (("SAMPLE", 1 << 13), ("BUDGET", 1 << 15), ("FEWEST", 1 << 10)):
        monkeypatch.setattr(precision, name, value)
    params = [torch.nn.Parameter(torch.randn(1 << 14).bfloat16()) for _ in range(40)]
    fused_l2.doctor.examine(torch.optim.AdamW(params, LR, weight_decay=DECAY))
    assert taken == [precision.FEWEST] * 40
    taken.clear()
    fused_l2.doctor.examine(torch.optim.AdamW(params[:10], LR, weight_decay=DECAY))
    assert taken == [precision.BUDGET // 10 // precision.RUN * precision.RUN] * 10
    taken.clear()
    fused_l2.doctor.examine(torch.optim.AdamW(params[:2], LR, weight_decay=DECAY))
    assert taken == [precision.SAMPLE] * 2
