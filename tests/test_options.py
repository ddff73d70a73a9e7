"""What every optimizer takes beyond torch.optim: signatures, checks, attributes, repr."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest
import torch
from comparing import make_params, set_grads

import fused_l2
from fused_l2.options import Options
from fused_l2.tables.modes import Mode

SIZES = (5, 64, 0, 33)
MODES = [mode.name.lower() for mode in Mode]
KEPT = {mode.name.lower(): mode.state_name for mode in Mode if mode.state_name}


OPTIONS = [field.name for field in dataclasses.fields(Options) if "description" in field.metadata]
# Another value of each, and one that is refused.
VALUES: dict[str, tuple[Any, Any]] = {
    "max_grad_norm": (2.5, -1.0),
    "norm_type": (torch.inf, 3.0),
    "error_if_nonfinite": (True, "no"),
    "skip_if_nonfinite": (True, "false"),
    "amp_scaling": (True, "false"),
    "decay_rule": ("corrected", "sometimes"),
    "max_lr": (0.5, 0.0),
    "cautious": (True, 0.0),
    "statistics": (True, 1),
    "low_precision": ("master", "exact"),
    "state_dtype": (torch.bfloat16, torch.float16),
    "seed": (7, 1.5),
    "norm_process_group": ("replicated", 1.5),
}
every = pytest.mark.parametrize("cls", [fused_l2.SGD, fused_l2.Adam, fused_l2.AdamW], ids=lambda c: c.__name__)


def decoupled(cls: Any) -> dict[str, Any]:
    return {} if cls is fused_l2.AdamW else {"decoupled_weight_decay": True}


def test_these_are_all_options() -> None:
    assert set(OPTIONS) == set(VALUES)


@every
def test_repr_is_torchs_and_then_the_options_that_are_set(cls: Any) -> None:
    params = make_params(SIZES)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
    mine, yours = repr(cls(groups)), repr(getattr(torch.optim, cls.__name__)(groups))
    if cls is fused_l2.Adam:  # a key of its groups that torch shows, too
        assert "decoupled_weight_decay: False" in mine
    assert mine == yours
    optimizer = cls(groups, max_grad_norm=2.5, seed=7, **decoupled(cls))
    text = repr(optimizer)
    groups_of_it, _, options = text.partition("\n\nOptions\n")
    assert groups_of_it.count("Parameter Group") == 2
    expected = ["    max_grad_norm: 2.5", "    seed: 7"]
    if cls is fused_l2.SGD:
        expected.append("    decoupled_weight_decay: True")
    assert options == "\n".join(expected) + "\n)"
    assert all(text.count(name) == 1 for name in ("max_grad_norm", "seed"))
    optimizer.max_grad_norm, optimizer.seed = None, 0
    assert "max_grad_norm" not in repr(optimizer)
    assert "seed" not in repr(optimizer)


@every
def test_repr_of_a_model_whose_layers_are_not_initialized(cls: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LazyLinear(3))
    assert "1 of 2 parameters, 98.5 % of their elements" in repr(cls(model.parameters(), state_dtype="8bit"))
    assert "0 of 0 parameters" in repr(cls(model[1].parameters(), state_dtype="8bit"))


@every
def test_options_is_a_dict_of_all_with_current_values(cls: Any) -> None:
    optimizer = cls(make_params(SIZES), lr=0.1, **decoupled(cls))
    found = optimizer.options
    assert type(found) is dict
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items() if name in OPTIONS}
    extra = {"decoupled_weight_decay": True} if cls is fused_l2.SGD else {}
    assert found == {**defaults, **extra}
    found["seed"] = 5  # a copy
    assert optimizer.options["seed"] == 0
    optimizer.seed, optimizer.cautious = 9, True
    assert optimizer.options == {**defaults, **extra, "seed": 9, "cautious": True}


@every
def test_signature_and_docstring_tell_every_option(cls: Any) -> None:
    parameters = inspect.signature(cls).parameters
    torchs = inspect.signature(getattr(torch.optim, cls.__name__)).parameters
    assert set(torchs) <= set(parameters)
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    for name in OPTIONS:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == defaults[name]
        assert re.search(rf"^ *{name}: \S", cls.__doc__, re.MULTILINE), name
    for name in parameters:
        assert re.search(rf"\b{name}\b", cls.__doc__), name
    assert "OPTIONS" not in cls.__doc__


@every
def test_an_unknown_keyword_is_refused_by_name(cls: Any) -> None:
    with pytest.raises(TypeError, match=rf"{cls.__name__}.*unexpected keyword argument 'max_norm'"):
        cls(make_params(SIZES), max_norm=1.0)


@pytest.mark.sweep(5)
@every
@pytest.mark.parametrize("option", VALUES)
def test_every_option_is_an_attribute_with_the_checks_of_the_constructor(cls: Any, option: str) -> None:
    value, refused = VALUES[option]
    given = decoupled(cls)
    if option in ("error_if_nonfinite", "skip_if_nonfinite"):
        given["max_grad_norm"] = 1.0
    params = make_params(SIZES)
    passed, optimizer = cls(params, **given, **{option: value}), cls(make_params(SIZES), **given)
    default = optimizer.options[option]
    assert default != value
    setattr(optimizer, option, value)
    assert optimizer.options == passed.options
    assert optimizer.options[option] == value
    if option != "statistics":  # that attribute has the figures
        assert getattr(optimizer, option) == getattr(passed, option) == value
    assert hasattr(cls, option)
    set_grads(params, 0)
    passed.step()
    if value is True:
        setattr(optimizer, option, False)
        assert optimizer.options[option] is False
        setattr(optimizer, option, pytest.importorskip("numpy").bool_(True))
        assert optimizer.options[option] is True
    before = optimizer.options
    with pytest.raises((ValueError, TypeError)) as by_constructor:
        cls(params, **given, **{option: refused})
    with pytest.raises((ValueError, TypeError)) as by_attribute:
        setattr(optimizer, option, refused)
    assert type(by_attribute.value) is type(by_constructor.value)
    assert str(by_attribute.value) == str(by_constructor.value)
    assert option in str(by_attribute.value)
    assert optimizer.options == before


@pytest.mark.parametrize("wrong", ["off", "False", 1, 0.0, None, torch.tensor(True)], ids=repr)
@pytest.mark.parametrize("name", [name for name in VALUES if VALUES[name][0] is True] + ["decoupled_weight_decay"])
def test_a_flag_is_true_or_false_and_not_what_has_a_truth(name: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be True or False, got"):
        fused_l2.SGD(make_params(SIZES), **{name: wrong})
    optimizer = fused_l2.SGD(make_params(SIZES))
    before = optimizer.options
    with pytest.raises(TypeError, match=rf"{name} must be True or False, got"):
        setattr(optimizer, name, wrong)
    assert optimizer.options == before


@pytest.mark.parametrize(
    ("cls", "option", "value"),
    [
        (fused_l2.SGD, "cautious", True),
        (fused_l2.SGD, "decay_rule", "fully_decoupled"),
        (fused_l2.Adam, "decay_rule", "corrected"),
        (fused_l2.AdamW, "decay_rule", ["plain", "plain", "plain"]),
        (fused_l2.AdamW, "norm_process_group", ["replicated", "replicated"]),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused_by_the_attribute_too(cls: Any, option: str, value: Any) -> None:
    with pytest.raises(ValueError) as by_constructor:
        cls(make_params(SIZES), weight_decay=0.1, **{option: value})
    optimizer = cls(make_params(SIZES), weight_decay=0.1)
    before = optimizer.options
    with pytest.raises(ValueError) as by_attribute:
        setattr(optimizer, option, value)
    assert str(by_attribute.value) == str(by_constructor.value)
    assert optimizer.options == before
