"""fused_l2.weight_decay: the conversion, param groups, the penalty, weights that feed a normalization layer."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import nn

import fused_l2
from fused_l2.weight_decay import (
    from_lambda,
    from_normalized,
    from_timescale,
    normalized_weights,
    param_groups,
    penalty,
    timescale,
    to_lambda,
    to_normalized,
)


def test_conversion():
    assert from_lambda(5.0, 50_000) == 1e-4
    assert from_lambda(5.0, 100_000) == from_lambda(5.0, 50_000) / 2  # doubling n at fixed lambda halves weight_decay
    assert from_lambda(0.3, 7, "sum") == 0.3
    for reduction in ("mean", "sum"):
        assert to_lambda(from_lambda(0.3, 1000, reduction), 1000, reduction) == pytest.approx(0.3, rel=1e-15)


@pytest.mark.parametrize("arguments", [(-1, 5), (math.nan, 5), (math.inf, 5), (1, 0), (1, -3), (1, math.nan), (1, 5, "none")])
def test_conversion_refuses(arguments):
    for convert in (from_lambda, to_lambda):
        with pytest.raises(ValueError, match="must be"):
            convert(*arguments)


def test_normalized_decay():
    """Loshchilov & Hutter 2019, B.1: four times the steps, half the decay per step, however they come about."""
    budget = {"batch_size": 128, "n": 50_000, "epochs": 100}
    decay = from_normalized(0.05, **budget)
    assert decay == pytest.approx(0.05 * math.sqrt(128 / (50_000 * 100)), rel=1e-15)
    assert to_normalized(decay, **budget) == pytest.approx(0.05, rel=1e-15)
    for change in ({"batch_size": 32}, {"n": 200_000}, {"epochs": 400}):
        assert from_normalized(0.05, **{**budget, **change}) == pytest.approx(decay / 2, rel=1e-15)
    for name in budget:
        for bad in (0, -1, math.nan, math.inf):
            for convert in (from_normalized, to_normalized):
                with pytest.raises(ValueError, match=f"{name} must be a finite number > 0, got {bad}"):
                    convert(0.05, **{**budget, name: bad})
    with pytest.raises(ValueError, match="weight_decay_norm must be a finite number >= 0, got -1"):
        from_normalized(-1, **budget)


def test_timescale():
    """With gradients of one sign AdamW's weight is where it converges to, but for a share of 1/e, after one timescale."""
    lr, decay = 0.01, 0.5
    steps = timescale(lr, decay)
    assert steps == 200
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = fused_l2.AdamW([p], lr=lr, weight_decay=decay, eps=0.0)
    for _ in range(int(steps)):
        p.grad = torch.ones_like(p)
        optimizer.step()
    # The limit is -1 / decay, and (1 - 1/T)^T = (1 - 1/2T + ...) / e
    assert p.item() == pytest.approx(-1 / decay * (1 - math.exp(-1)), rel=1 / steps)

    assert timescale(lr, decay, batch_size=64, n=6400) == 2  # epochs of 100 steps
    assert from_timescale(200, lr) == pytest.approx(decay, rel=1e-15)
    assert from_timescale(2, lr, batch_size=64, n=6400) == pytest.approx(decay, rel=1e-15)
    for arguments, says in (
        ((0, 0.1), "lr must be a finite number > 0, got 0"),
        ((0.1, 0), "weight_decay must be a finite number > 0, got 0"),
        ((0.1, 0.1, 64), "both batch_size and n"),
        ((0.1, 0.1, -64, 6400), "batch_size must be a finite number > 0, got -64"),
    ):
        with pytest.raises(ValueError, match=says):
            timescale(*arguments)
    with pytest.raises(ValueError, match="timescale must be a finite number > 0, got inf"):
        from_timescale(math.inf, 0.1)


def test_T30_the_coefficient_reaches_torch_unchanged():
    """weight_decay = lambda / n is what multiplies w in the gradient: one plain step from gradient 0."""
    p = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    fused_l2.SGD([p], lr=0.5, weight_decay=from_lambda(4.0, 100)).step()
    assert torch.allclose(p, torch.full((3,), 2.0 - 0.5 * 0.04 * 2.0, dtype=torch.float64), rtol=1e-15)


def test_T30_decay_is_rounded_once_with_the_update():
    """In bfloat16, p * (1 - lr * wd) on its own is p for lr * wd < 2^-9. Computed in float32 with the update it counts."""
    lr, wd = 1e-2, 0.1
    p = nn.Parameter(torch.full((1000,), 1.0, dtype=torch.bfloat16))
    alone = p.detach() * torch.tensor(1 - lr * wd, dtype=torch.float32).to(torch.bfloat16)
    assert torch.equal(alone, p.detach())  # the trap
    q = nn.Parameter(p.detach().clone())
    # An update of half an ulp below 1 (2^-9): with the decay of 1e-3 on top it is rounded away from 1.
    for t in (p, q):
        t.grad = torch.full((1000,), 2.0**-9 / lr * 0.9, dtype=torch.bfloat16)
    fused_l2.SGD([p], lr=lr, weight_decay=wd).step()
    fused_l2.SGD([q], lr=lr).step()
    assert (p < q).all()


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.convolution = nn.Conv1d(8, 8, 3)
        self.batch_norm = nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


def names(groups, decayed: bool) -> set[str]:
    return {n for g in groups for n in g["param_names"] if (g["weight_decay"] != 0) is decayed}


def test_param_groups_by_type_and_shape():
    model = Transformer()
    groups = param_groups(model, 0.1, lr=0.01)
    assert names(groups, True) == {
        "position", "attention.in_proj_weight", "attention.out_proj.weight", "convolution.weight",
    }  # fmt: skip
    assert names(groups, False) == {
        "embedding.weight", "norm.weight", "norm.bias", "attention.in_proj_bias", "attention.out_proj.bias",
        "convolution.bias", "batch_norm.weight", "batch_norm.bias", "scale",
    }  # fmt: skip
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in trainable)  # tied weights once
    assert all(g["lr"] == 0.01 for g in groups)
    optimizer = fused_l2.AdamW(groups)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert torch.optim.AdamW(param_groups(model, 0.1)).param_groups[1]["weight_decay"] == 0.0


def test_param_groups_table():
    lines = str(param_groups(Transformer(), 0.1)).splitlines()
    assert lines[0].split() == ["parameter", "shape", "decayed", "why"]
    table = {line.split()[0]: line for line in lines}
    assert "shared with head.weight" in table["embedding.weight"]
    assert "frozen" in table["frozen.weight"]
    assert "normalization (LayerNorm)" in table["norm.bias"]
    assert "8, 8, 3" in table["convolution.weight"]
    assert " yes " in table["convolution.weight"]
    assert lines[-2] == "decayed: 488 parameters in 4 tensors"


def test_param_groups_of_parts_of_a_model_add_up():
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    parts = [param_groups(model[name], 0.1, prefix=name + dot, lr=lr) for name, dot, lr in (("body", ".", 1), ("head", "", 2))]
    together = parts[0] + parts[1]
    assert [rule.name for rule in together.rules] == [name for name, _ in model.named_parameters()]
    assert "head.weight" in str(together)
    assert "decayed: 15 parameters in 2 tensors\nnot decayed: 5 parameters in 2 tensors" in str(together)
    assert [(group["lr"], group["param_names"]) for group in together] == [
        *((1, ["body.weight"]), (1, ["body.bias"]), (2, ["head.weight"]), (2, ["head.bias"]))
    ]
    assert len(fused_l2.SGD(together).param_groups) == 4
    assert type(together + [{"params": []}]) is list  # of which there are no rules
    parts[0] += parts[1]
    assert str(parts[0]) == str(together)


def test_attention_has_linear_layers():
    assert "out_proj.weight  (4, 4)   yes      weight of Linear\n" in str(param_groups(nn.MultiheadAttention(4, 2), 0.1))


def test_user_rules_win_and_names_win_over_types():
    model = Transformer()
    groups = param_groups(model, 0.1, no_decay=["position", nn.Conv1d], decay=["*.bias", nn.Embedding])
    assert "position" in names(groups, False)
    assert "convolution.weight" in names(groups, False)
    assert {"convolution.bias", "norm.bias", "embedding.weight"} <= names(groups, True)
    assert "no_decay='position'" in str(groups)
    with pytest.raises(ValueError, match="'positon' matches no parameter"):
        param_groups(model, 0.1, no_decay="positon")
    with pytest.raises(ValueError, match="position is matched by both"):
        param_groups(model, 0.1, no_decay="position", decay="pos*")
    with pytest.raises(TypeError, match="module types"):
        param_groups(model, 0.1, no_decay=[3])
    with pytest.raises(TypeError, match=r"nn\.Module"):
        param_groups(model.parameters(), 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_penalty(dtype, threads):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n).to(dtype)) for n in (1, 100, 0, 70_001, 33)]
    free = nn.Parameter(torch.randn(50).to(dtype))
    groups = [{"params": params, "weight_decay": 0.2}, {"params": [free], "weight_decay": 0.0}]
    square = sum(float(p.detach().double().square().sum()) for p in params)
    assert penalty(groups, lam=3.0, n=60) == pytest.approx(3.0 / (2 * 60) * square, rel=1e-14)
    assert penalty(groups, 3.0, 60, reduction="sum") == pytest.approx(1.5 * square, rel=1e-14)
    assert penalty(fused_l2.SGD(groups, lr=0.1)) == pytest.approx(0.1 * square, rel=1e-14)
    assert penalty(torch.optim.SGD(groups, lr=0.1)) == penalty(groups)


def test_penalty_is_the_same_bits_for_any_thread_count_and_instruction_set(capability):
    torch.manual_seed(0)
    groups = [{"params": [nn.Parameter(torch.randn(300_007))], "weight_decay": 1.0}]
    results = set()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.add(penalty(groups))
    finally:
        torch.set_num_threads(before)
    assert len(results) == 1
    fused_l2.engines.cpu.library().select(fused_l2.engines.cpu.library().available[0])
    assert results == {penalty(groups)}


def test_T33_penalty_of_weights_whose_squares_overflow_float32():
    p = nn.Parameter(torch.full((10,), 1e30))
    assert penalty([{"params": [p], "weight_decay": 2.0}]) == pytest.approx(1e61, rel=1e-6)


def test_penalty_counts_a_tied_weight_once_and_takes_views_and_names():
    p = nn.Parameter(torch.randn(6, 4).t())
    strided = nn.Parameter(torch.randn(6, 4)[:, ::2])
    groups = [{"params": [("a", p), ("b", strided)], "weight_decay": 2.0}, {"params": p, "weight_decay": 2.0}]
    expected = float(p.detach().double().square().sum() + strided.detach().double().square().sum())
    assert penalty(groups) == pytest.approx(expected, rel=1e-14)


def test_penalty_refuses():
    groups = [{"params": [nn.Parameter(torch.ones(1))], "weight_decay": 1.0}]
    with pytest.raises(ValueError, match="both lam and n"):
        penalty(groups, lam=1.0)
    freed = nn.Parameter(torch.ones(3))
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"tensor 0 of shape \(3,\): its storage"):
        penalty([{"params": [freed], "weight_decay": 1.0}])
    with pytest.raises(ValueError, match="group 0 has no 'weight_decay'"):
        penalty([{"params": []}])


def test_normalized_weights_lists_only_weights_whose_scale_is_removed():
    """Each listed weight may be tripled without changing the output of its norm; each left out may not."""
    torch.manual_seed(0)
    convolution = lambda bias=True: nn.Conv2d(4, 4, 3, padding=1, bias=bias)  # noqa: E731
    shared = convolution(bias=False)
    model = nn.Sequential(
        convolution(), nn.BatchNorm2d(4), convolution(), nn.GroupNorm(1, 4), convolution(bias=False), nn.GroupNorm(1, 4),
        convolution(), nn.LocalResponseNorm(2), shared, nn.BatchNorm2d(4), shared, nn.ReLU(),
    )  # fmt: skip
    optimizer = fused_l2.SGD(param_groups(model, 0.01), lr=0.2)
    assert [w.name for w in normalized_weights(model, optimizer)] == ["0.weight", "4.weight"]
    x = torch.randn(8, 4, 6, 6)
    for layer, removed in ((0, True), (2, False), (4, True), (6, False)):
        pair = model[layer : layer + 2]
        before = pair(x)
        with torch.no_grad():
            model[layer].weight.mul_(3)
        # GroupNorm and BatchNorm add an eps of 1e-5 to variances of order 0.1 to 1
        assert torch.allclose(pair(x), before, atol=1e-3) is removed


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        if x.sum() > 1e9:
            raise AssertionError
        return self.linear(self.norm(self.convolution(x)).mean((2, 3)))


def test_normalized_weights_of_traceable_and_other_models():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LayerNorm(4))
    optimizer = fused_l2.SGD(param_groups(model, 0.01), lr=0.2)
    (found,) = normalized_weights(model, optimizer)
    weight = model[0].weight.detach().double()
    assert (found.name, found.normalization, found.lr, found.weight_decay) == ("0.weight", "1", 0.2, 0.01)
    assert found.norm == pytest.approx(weight.norm().item(), rel=1e-14)
    assert found.effective_lr == pytest.approx(0.2 / weight.square().sum().item(), rel=1e-12)
    assert "0.weight" in str(normalized_weights(model, optimizer))
    undecayed = fused_l2.SGD(model.parameters(), lr=0.2)
    assert str(normalized_weights(model, undecayed)) == "no decayed weight feeds a normalization layer"

    model = Untraceable().train()
    optimizer = fused_l2.SGD(param_groups(model, 0.01), lr=0.2)
    with pytest.raises(ValueError, match="example_inputs"):
        normalized_weights(model, optimizer)
    statistics = model.norm.running_mean.clone()
    (found,) = normalized_weights(model, optimizer, (torch.randn(2, 3, 5, 5),))
    assert (found.name, found.normalization) == ("convolution.weight", "norm")
    assert model.training
    assert torch.equal(model.norm.running_mean, statistics)


@pytest.mark.parametrize(
    "module", ["weight_decay.conversion", "weight_decay.param_groups", "engines"], ids=lambda m: m.rpartition(".")[2]
)
def test_examples_in_docstrings(module):
    import importlib

    results = doctest.testmod(importlib.import_module(f"fused_l2.{module}"), extraglobs={"fused_l2": fused_l2, "torch": torch})
    assert results.failed == 0
    if module != "engines":
        assert results.attempted > 0


@pytest.mark.parametrize("layer", [nn.Linear(3, 1), nn.Linear(1, 1), nn.Conv1d(1, 1, 5), nn.Bilinear(2, 1, 1)], ids=str)
def test_the_weight_of_a_layer_with_one_output_is_decayed(layer):
    decayed, others = param_groups(layer, weight_decay=0.1)
    assert decayed["param_names"] == ["weight"]
    assert others["param_names"] == ["bias"]


def test_a_module_under_two_names_follows_the_rules_of_both():
    shared = torch.nn.Linear(3, 3)
    model = torch.nn.ModuleDict({
        "encoder": torch.nn.ModuleDict({"proj": shared, "own": torch.nn.Linear(3, 3)}),
        "decoder": torch.nn.ModuleDict({"proj": shared, "own": torch.nn.Linear(3, 3)}),
    })  # fmt: skip
    for rule in ("decoder.*", "decoder.proj.weight"):
        groups = param_groups(model, 0.1, no_decay=rule)
        decayed = [name for group in groups for name in group["param_names"] if group["weight_decay"]]
        assert "encoder.proj.weight" not in decayed
        assert "encoder.own.weight" in decayed
    assert "shared with decoder.proj.weight" in str(param_groups(model, 0.1))
    assert sum(len(group["params"]) for group in param_groups(model, 0.1)) == 6


def test_the_penalty_under_a_default_device_without_values():
    optimizer = fused_l2.SGD([torch.nn.Parameter(torch.ones(3))], weight_decay=2.0)
    with torch.device("meta"):
        assert penalty(optimizer) == 3.0
