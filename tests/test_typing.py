"""What a type checker and an editor see of the public signatures: the strings that options take."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ROOT

import fused_l2
import fused_l2.doctor
from fused_l2 import options
from fused_l2.optimizer import FusedOptimizer
from fused_l2.tables.coefficients import DecayRule
from fused_l2.tables.modes import EIGHT_BIT, Mode

GOOD = """
import torch
import fused_l2

model = torch.nn.Linear(2, 2)
fused_l2.AdamW(model.parameters(), lr=torch.tensor(0.1), weight_decay=torch.tensor(0.1), norm_process_group="world")
fused_l2.AdamW(model.parameters(), betas=(torch.tensor(0.9), torch.tensor(0.99)), eps=torch.tensor(1e-8))
fused_l2.Adam(model.parameters(), decay_rule=["plain", "corrected"], state_dtype=torch.bfloat16, eps=torch.tensor(1e-8))
fused_l2.SGD(model.parameters(), momentum=torch.tensor(0.9), dampening=torch.tensor(0.1))
fused_l2.SGD(fused_l2.weight_decay.param_groups(model, torch.tensor(0.1)))
fused_l2.SGD(fused_l2.weight_decay.param_groups(model, 0.1), low_precision="remainder8", state_dtype="8bit")
optimizer = fused_l2.AdamW(model.parameters(), decay_rule="corrected", statistics=True)
optimizer.low_precision = "master"
statistics = optimizer.statistics
if statistics is not None:
    figures: dict[str, float] = statistics.as_dict()
"""
BAD = """
import torch
import fused_l2

model = torch.nn.Linear(2, 2)
fused_l2.AdamW(model.parameters(), low_precision="remaindr")
fused_l2.Adam(model.parameters(), decay_rule="sometimes")
fused_l2.Adam(model.parameters(), decay_rule=["plain", "sometimes"])
fused_l2.SGD(model.parameters(), state_dtype="4bit")
fused_l2.SGD(model.parameters(), norm_process_group=1.5)
fused_l2.SGD(model.parameters(), wieght_decay=0.1)
optimizer = fused_l2.AdamW(model.parameters())
optimizer.low_precision = "remaindr"
optimizer.state_dtype = "4bit"
"""


def test_the_strings_are_those_of_the_modes_and_rules() -> None:
    assert set(typing.get_args(options.LowPrecisionName)) == {mode.name.lower() for mode in Mode}
    assert set(typing.get_args(options.DecayRuleName)) == {rule.name.lower() for rule in DecayRule}
    assert typing.Literal[EIGHT_BIT] in typing.get_args(options.StateDtype)


def test_the_signature_shows_the_strings() -> None:
    annotation = inspect.signature(fused_l2.AdamW).parameters["low_precision"].annotation
    assert "remainder8" in typing.get_args(annotation)


def test_mypy_takes_what_is_right_and_finds_each_typo(tmp_path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, str(tmp_path / "good.py"), str(tmp_path / "bad.py")], cwd=ROOT, capture_output=True, text=True
    )
    found = [int(line) for line in re.findall(r"bad\.py:(\d+): error", done.stdout)]
    first = BAD.splitlines().index('fused_l2.AdamW(model.parameters(), low_precision="remaindr")') + 1
    lines = BAD.splitlines()
    expected = [i for i in range(first, len(lines) + 1) if not lines[i - 1].startswith("optimizer = ")]
    assert "good.py" not in done.stdout, done.stdout
    assert sorted(set(found)) == expected, done.stdout


def public_callables() -> dict[str, Callable[..., Any]]:
    """What the reference shows and users call."""
    found: dict[str, Callable[..., Any]] = {}
    for module in (fused_l2, fused_l2.weight_decay, fused_l2.doctor):
        for name in module.__all__:
            thing = getattr(module, name)
            ours = getattr(thing, "__module__", "").startswith("fused_l2")
            if ours and (inspect.isfunction(thing) or (inspect.isclass(thing) and issubclass(thing, torch.optim.Optimizer))):
                found[f"{module.__name__}.{name}"] = thing
    for cls in (FusedOptimizer, fused_l2.Statistics, fused_l2.doctor.Report):
        found |= {f"{cls.__name__}.{n}": f for n, f in vars(cls).items() if inspect.isfunction(f) and not n.startswith("_")}
    return found


@pytest.mark.parametrize("name", public_callables())
def test_each_argument_has_an_entry_of_its_own(name: str) -> None:
    function = public_callables()[name]
    arguments = [a for a in inspect.signature(function).parameters if a != "self"]
    described = re.search(r"^Args:\n((?:    .*\n|\n)*)", f"{inspect.getdoc(function)}\n", re.MULTILINE)
    entries = re.findall(r"^    (\w[^:\n]*):", described[1], re.MULTILINE) if described else []
    assert entries == [a for a in entries if a in arguments]  # in their own words, and one by one
    assert sorted(entries) == sorted(arguments)
