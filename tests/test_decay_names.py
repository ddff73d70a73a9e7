"""Names, modules and parametrizations in weight_decay.param_groups, and names that repeat in statistics."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fused_l2
from fused_l2.weight_decay import from_lambda, param_groups


def decayed(model: nn.Module, **how: Any) -> dict[str, bool]:
    return {rule.name: rule.decayed for rule in param_groups(model, 0.1, **how).rules}


@pytest.mark.parametrize("module", [nn.Embedding(4, 3), nn.LayerNorm((3, 3))])
def test_parametrized_norms_and_embeddings_are_not_decayed(module: nn.Module) -> None:
    parametrizations.weight_norm(module)
    assert not any(decayed(nn.Sequential(module)).values())


def test_a_type_and_a_module_are_rules_for_what_is_parametrized() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    weight = "0.parametrizations.weight.original"
    assert decayed(model) == {"0.bias": False, weight: True, "1.weight": True, "1.bias": False}
    assert not any(decayed(model, no_decay=nn.Linear).values())
    assert decayed(model, no_decay=[model[0]]) == {"0.bias": False, weight: False, "1.weight": True, "1.bias": False}
    assert decayed(model, no_decay=model, decay="1.weight")["1.weight"]  # a name wins over a module, and a module over a type
    with pytest.raises(ValueError, match="this Linear matches no parameter"):
        param_groups(model, 0.1, no_decay=nn.Linear(3, 3))


def test_names_are_those_of_the_whole_with_a_prefix() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    (group, _) = param_groups(model["encoder"], 0.1, prefix="encoder")
    assert group["param_names"] == ["encoder.weight"]
    assert not decayed(model["head"], prefix="head", no_decay="head.*")["head.weight"]


def test_keywords_that_are_nearly_known_are_refused() -> None:
    model = nn.Linear(2, 2)
    for keyword, meant in (("nodecay", "no_decay"), ("no_decays", "no_decay"), ("momentun", "momentum")):
        with pytest.raises(TypeError, match=f"'{keyword}': did you mean '{meant}'"):
            param_groups(model, 0.1, **{keyword: []})
    with pytest.raises(TypeError, match="max_grad_norm is an option of the whole optimizer"):
        param_groups(model, 0.1, max_grad_norm=1.0)
    assert param_groups(model, 0.1, lr=0.1, lr_scale=0.5)[0]["lr_scale"] == 0.5


def test_arguments_of_from_lambda_that_were_exchanged_are_told() -> None:
    with pytest.warns(UserWarning, match=r"lam=50000, which is larger than n=5.*exchanged"):
        from_lambda(50_000, 5)
    with pytest.raises(ValueError, match=r"n, the number of training examples, must be a whole number >= 1, got 0.5"):
        from_lambda(5.0, 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="lam must be a number, got 'a'"):
        from_lambda("a", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"n, the number of training examples, must be a number, got 'mean'"):
        from_lambda(5.0, "mean")  # type: ignore[arg-type]


def test_statistics_lose_no_tensor_where_names_repeat() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    groups = [{"params": [("weight", params[0]), ("bias", params[1])]}, {"params": [("weight", params[2])]}]
    optimizer = fused_l2.SGD(groups, lr=0.1, statistics=True)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.statistics is not None
    assert list(optimizer.statistics.by_tensor()) == ["weight (0.0)", "bias", "weight (1.0)"]


@pytest.mark.parametrize("layer", [nn.Linear(3, 1), nn.Linear(1, 3), nn.Conv1d(1, 1, 5)], ids=str)
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm"])
def test_a_weight_of_one_row_is_one_whatever_computes_it(layer: nn.Module, how: str, new: bool) -> None:
    made = getattr(parametrizations if new else nn.utils, how)(copy.deepcopy(layer))
    held = {
        ("weight_norm", True): "parametrizations.weight.original1",
        ("weight_norm", False): "weight_v",
        ("spectral_norm", True): "parametrizations.weight.original",
        ("spectral_norm", False): "weight_orig",
    }
    found = decayed(made)
    assert [name for name in found if found[name]] == [held[how, new]]  # not the lengths, nor the bias
    assert len(found) == (3 if how == "weight_norm" else 2)


class Layer(nn.Linear):
    """A class of which TorchScript knows the name alone."""


def compiled(model: nn.Module, how: str) -> nn.Module:
    if how == "trace":
        return torch.jit.trace(model, torch.ones(2, 4))
    scripted = torch.jit.script(model)
    if how == "script":
        return scripted
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace", "load"])
def test_modules_of_torchscript_are_judged_as_what_they_were_made_from(how: str) -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.LayerNorm(1), nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    made = compiled(nn.Sequential(model, nn.Sequential(nn.Linear(1, 1))), how)
    assert decayed(made) == decayed(nn.Sequential(model, nn.Sequential(nn.Linear(1, 1))))
    assert sum(decayed(made).values()) == 3
    assert not any(decayed(made, no_decay=nn.Linear).values())
    assert decayed(made, decay=nn.LayerNorm)["0.1.bias"]
    named = type("functional", (nn.Linear,), {})(4, 1)  # torch.nn has something of that name, which is no module
    if how == "trace":
        with pytest.raises(ValueError, match=r"0.weight is the weight of functional"):
            param_groups(compiled(nn.Sequential(named), how), 0.1)
    table = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), Layer(4, 1))
    other = compiled(table, how)
    with pytest.raises(
        ValueError, match=r"2.weight is the weight of Layer, .*Pass the model that was given to torch.jit.script"
    ):
        param_groups(other, 0.1)
    remedies = [decayed(table), decayed(other, decay="2.weight"), decayed(other, decay=Layer, no_decay="*.bias")]
    assert remedies == [{"1.weight": True, "1.bias": False, "2.weight": True, "2.bias": False}] * 3
    if how == "script":
        assert [id(p) for p in table.parameters()] == [id(p) for p in other.parameters()]  # as the message says
