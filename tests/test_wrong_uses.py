"""What a newcomer types instead: each gets an error, or a warning, that says what to type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_l2
from fused_l2 import weight_decay

MODEL = torch.nn.Linear(2, 2)


def optimizer(**arguments: Any) -> fused_l2.AdamW:
    return fused_l2.AdamW(MODEL.parameters(), **arguments)


def step_a_complex_parameter() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    parameter.grad = torch.ones_like(parameter)
    fused_l2.SGD([parameter]).step()


def used_up() -> Any:
    parameters = MODEL.parameters()
    list(parameters)
    return parameters


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (MODEL, TypeError, r"params is a module \(Linear\). Pass its parameters: model.parameters\(\)"),
        (MODEL.parameters, TypeError, r"params is a method. Call it: model.parameters\(\)"),
        (MODEL.state_dict(), TypeError, "params is of type OrderedDict. Pass model.parameters"),
        ({"params": [MODEL.weight]}, TypeError, "params is of type dict. .*a list of param groups"),
        ("weights", TypeError, r"got 'weights'. Pass model.parameters\(\)"),
        (None, TypeError, r"got None. Pass model.parameters\(\)"),
        ([], ValueError, "optimizer got an empty parameter list. .*call it again"),
        (used_up(), ValueError, "optimizer got an empty parameter list. .*used up"),
        (weight_decay.param_groups(torch.nn.ReLU(), 0.1), ValueError, "no parameters"),
        ([{"lr": 1.0}], KeyError, "param group 0 has no 'params', only 'lr'"),
    ],
    ids=["module", "method", "state dict", "group", "string", "None", "empty", "used up", "no parameters", "no params"],
)
@pytest.mark.parametrize("cls", [fused_l2.SGD, fused_l2.AdamW])
def test_what_is_passed_for_parameters(cls: Any, params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cls(params)
    with pytest.raises(error):  # torch.optim refuses each, too, in another text
        getattr(torch.optim, cls.__name__)(params)


def test_all_that_torch_takes_is_taken() -> None:
    weight, bias = MODEL.parameters()
    for params in (
        MODEL.parameters(),
        MODEL.named_parameters(),
        (p for p in (weight, bias)),
        (weight, bias),
        dict.fromkeys((weight, bias)),
        dict.fromkeys((weight, bias)).keys(),
        iter([{"params": [weight]}, {"params": bias}]),
    ):
        assert [p for group in fused_l2.SGD(params).param_groups for p in group["params"]] == [weight, bias]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: optimizer(learning_rate=0.1), TypeError, "'learning_rate': did you mean 'lr'"),
        (lambda: optimizer(wieght_decay=0.1), TypeError, "'wieght_decay': did you mean 'weight_decay'"),
        (lambda: optimizer(momentum=0.9), TypeError, "unexpected keyword argument 'momentum'$"),
        (lambda: optimizer(weight_decay="0.1"), TypeError, "weight_decay value must be a number, got '0.1' of type str"),
        (
            lambda: fused_l2.SGD([{"params": [MODEL.weight], "weight_decay": "0.1"}]).step(),
            TypeError,
            "weight_decay value of param group 0 must be a number, got '0.1' of type str",
        ),
        (
            lambda: fused_l2.SGD([{"params": [MODEL.weight], "lr": torch.ones(2)}]),
            ValueError,
            r"Tensor learning rate of param group 0 must be 1-element, got shape \(2,\)",
        ),
        (
            lambda: fused_l2.Adam([{"params": [MODEL.weight], "betas": 0.9}]),
            TypeError,
            "betas of param group 0 must be a pair of numbers, got 0.9",
        ),
        (step_a_complex_parameter, RuntimeError, "complex64.* or step it with torch.optim"),
        (lambda: optimizer(max_grad_norm=torch.ones(2)), TypeError, "max_grad_norm must be a number"),
        (lambda: optimizer().step(torch.tensor(1.0)), TypeError, "step takes a closure that returns the loss, .*got Tensor"),
        (lambda: optimizer().load_master_params(None), TypeError, "load_master_params needs a list of tensors, got NoneType"),
        (lambda: fused_l2.load_master_state_dict(MODEL, optimizer(), None), TypeError, "needs a dict of names .*got NoneType"),
        (lambda: fused_l2.master_state_dict(None, optimizer()), TypeError, "expected a torch.nn.Module, got NoneType"),
        (lambda: weight_decay.param_groups(MODEL.parameters(), 0.1), TypeError, "needs a torch.nn.Module, got generator"),
        (lambda: weight_decay.param_groups(MODEL, "0.1"), TypeError, "weight_decay must be a number, got '0.1'"),
        (lambda: weight_decay.param_groups(MODEL, 0.1, exclude=["bias"]), TypeError, "pass no_decay=, not exclude="),
        (lambda: weight_decay.param_groups(MODEL, 0.1, without=["bias"]), TypeError, "without is no key of a param group"),
        (lambda: weight_decay.param_groups(MODEL, 0.1, skip_list=["bias"]), TypeError, "pass no_decay=, not skip_list="),
        (lambda: weight_decay.param_groups(MODEL, 0.1, prefix=MODEL), TypeError, "prefix must be the name of a part"),
        (lambda: weight_decay.param_groups(MODEL, -0.1), ValueError, "weight_decay must be a finite number >= 0, got -0.1"),
        (
            lambda: weight_decay.param_groups(MODEL, 0.1, no_decay=[MODEL.bias]),
            TypeError,
            r"no_decay: .*a tensor of shape \(2,\): pass its name",
        ),
        (lambda: weight_decay.param_groups(MODEL, 0.1, no_decay=MODEL.bias), TypeError, "no_decay: .*pass its name"),
        (lambda: weight_decay.param_groups(MODEL, 0.1, decay=None), TypeError, "decay: expected parameter names"),
        (lambda: weight_decay.penalty(MODEL), TypeError, "penalty needs an optimizer, or param groups .*got Linear"),
        (lambda: weight_decay.normalized_weights(MODEL, MODEL), TypeError, "needs a model and its optimizer, got Linear"),
    ],
    ids=range(25),
)
def test_what_is_passed_elsewhere(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("weigth_decay", "'weigth_decay', which changes no step: did you mean 'weight_decay'"),
        ("weightDecay", "did you mean 'weight_decay'"),
        ("low_precision", "option of the whole optimizer: pass it to the constructor"),
    ],
)
def test_keys_of_groups_that_change_nothing(key: str, message: str) -> None:
    with pytest.warns(fused_l2.FusedL2Warning, match=message):
        fused_l2.AdamW([{"params": [MODEL.weight], key: 0.5}])


def test_keys_of_somebody_elses_are_nobodys_business() -> None:
    own = ("name", "lr_scale", "lr_mult", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
    others = ("weight_decay_mult", "wd_mult", "apply_weight_decay", "layer", "decay_mult", "fan_in", "momentum_factor")
    fused_l2.SGD([{"params": [MODEL.weight], **dict.fromkeys((*own, *others), 1.0)}])
    # ZeroRedundancyOptimizer puts into its groups what it passes to the constructor.
    fused_l2.SGD([{"params": [MODEL.weight], "max_grad_norm": 1.0}], max_grad_norm=1.0)
