"""Our warnings: one category, each at the line of the user's program that led to it."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import ROOT

import fused_l2


def lost_decay() -> None:
    p = torch.nn.Parameter(torch.ones(4).bfloat16())
    p.grad = torch.zeros_like(p)
    fused_l2.AdamW([p], lr=3e-4, weight_decay=0.1).step()


def excess_decay() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.zeros_like(p)
    optimizer = fused_l2.AdamW([p], lr=20, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps step() in a frame of torch's
    optimizer.param_groups[0]["lr"] = 20
    optimizer.step()
    schedule.step()


def no_engine() -> None:
    from fused_l2 import engines

    engines._warned.clear()
    p = torch.nn.Parameter(torch.ones(4, device="meta"))
    p.grad = torch.ones(4, device="meta")
    fused_l2.SGD([p], lr=0.1).step()


def exchanged_arguments() -> None:
    fused_l2.weight_decay.from_lambda(50_000, 5)


def hyperparameter_as_attribute() -> None:
    fused_l2.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1).lr = 0.2


@pytest.mark.filterwarnings("default::UserWarning")  # also what the other tests leave out
@pytest.mark.parametrize(
    "give", [lost_decay, excess_decay, no_engine, exchanged_arguments, hyperparameter_as_attribute], ids=lambda f: f.__name__
)
def test_each_is_of_our_category_and_points_at_the_users_line(give: Callable[[], None]) -> None:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        give()
    (warning,) = given
    assert warning.category is fused_l2.FusedL2Warning
    assert str(warning.message).startswith(("fused_l2: ", "fused_l2 steps "))
    lines, first = inspect.getsourcelines(give)
    assert warning.filename == __file__
    assert first < warning.lineno < first + len(lines)


def test_the_category_silences_them_and_makes_them_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=fused_l2.FusedL2Warning)
        exchanged_arguments()
        warnings.filterwarnings("error", category=fused_l2.FusedL2Warning)
        with pytest.raises(fused_l2.FusedL2Warning, match="exchanged"):
            exchanged_arguments()


def test_filters_by_message_and_by_userwarning_hold() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "fused_l2: from_lambda", UserWarning)
        exchanged_arguments()


def test_no_module_warns_past_it() -> None:
    for file in (ROOT / "fused_l2").rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
        past = [n for n in calls if ast.unparse(n.func) in ("warnings.warn", "warnings.warn_explicit")]
        assert not past or file.name == "_warnings.py", f"{file}:{past[0].lineno}"
