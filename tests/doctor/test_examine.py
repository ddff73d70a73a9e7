"""fused_l2.doctor.examine: what it takes, what it returns, what it leaves alone."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import fused_l2
import fused_l2.doctor
from doctor.examining import Gpt, assert_unchanged, backward, block, snapshot, train
from fused_l2.doctor.findings import wrapped_code
from fused_l2.weight_decay import penalty, to_lambda


@pytest.mark.parametrize("package", [torch.optim, fused_l2], ids=["torch", "ours"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_changes(package, name, dtype):
    model = Gpt().to(dtype)
    optimizer = getattr(package, name)(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(2):
        backward(model)
        before = snapshot(optimizer, model)
        report = fused_l2.doctor.examine(optimizer, model, n=1000, lam=0.1, steps=10, batch_size=10)
        str(report), report.as_dict(), report._repr_html_()
        fused_l2.doctor.examine(optimizer)
        assert_unchanged(before, snapshot(optimizer, model))
        optimizer.step()


def test_without_a_model_modules_are_found():
    model = Gpt()
    report = fused_l2.doctor.examine(torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    assert [row.name for row in report.layers] == [name for name, _ in model.named_parameters()]
    assert "decayed-bias" in report.codes()


def test_without_a_model_layers_that_were_replaced_are_found():
    model = block()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    layers = [i for i, module in enumerate(model) if isinstance(module, nn.Linear)]
    model[layers[-1]] = nn.Linear(model[layers[-1]].in_features, 7)
    found = [f for f in fused_l2.doctor.examine(optimizer).findings if f.code == "foreign-parameter"]
    assert [f.severity for f in found] == ["wrong"]
    assert len(found[0].parameters) == 2


def test_without_a_model_a_tensor_trained_by_itself_is_no_replaced_one():
    model, prompt = block(), nn.Parameter(torch.randn(3, 4))
    optimizer = torch.optim.AdamW([prompt, *model[-1].parameters()], weight_decay=0.1)  # and the rest is not frozen
    assert "foreign-parameter" not in fused_l2.doctor.examine(optimizer).codes()


def test_tensors_without_a_module_have_positions():
    p = torch.randn(3, 3, requires_grad=True)
    report = fused_l2.doctor.examine(torch.optim.SGD([p], lr=0.1, weight_decay=0.1))
    assert [row.name for row in report.layers] == ["0.0"]
    assert any("No live module owns" in text for text in report.unknown)
    assert report.codes() == set()


def test_names_in_param_groups():
    p = torch.randn(3, 3, requires_grad=True)
    report = fused_l2.doctor.examine(torch.optim.SGD([("a.weight", p)], lr=0.1))
    assert [row.name for row in report.layers] == ["a.weight"]


def test_the_row_of_a_tensor():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    (row,) = fused_l2.doctor.examine(optimizer, model, n=1000, batch_size=10).layers
    w = model[0].weight.detach()
    assert (row.name, row.shape, row.dtype, row.group) == ("0.weight", (3, 4), "float32", 0)
    assert row.lam == to_lambda(0.1, 1000) == 100
    assert row.lr_wd == pytest.approx(1e-3)
    assert row.half_life == pytest.approx(math.log(2) / 1e-3)
    assert row.half_life_epochs == pytest.approx(row.half_life / 100)
    assert row.norm == pytest.approx(float(w.norm()))
    assert row.penalty == pytest.approx(penalty(optimizer))
    assert row.arrives == pytest.approx(1, abs=0.01)
    assert row.equilibrium is row.effective_lr is None


def test_momentum_multiplies_coupled_decay():
    """w_t / w_0 of SGD with momentum and gradients of 0 falls at lr * wd / (1 - momentum)."""
    model = nn.Linear(4, 4, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)
    (row,) = fused_l2.doctor.examine(optimizer, model).layers
    before = model.weight.detach().clone()
    for _ in range(round(row.half_life)):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    # Half of it, but for the 10 steps that the momentum takes to build up, of 693.
    assert float((model.weight.detach() / before).mean()) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_equilibrium_of_a_normalized_weight(rule):
    """Trained on noise for many half-lives, |w| comes to rest where the table says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16, bias=False), nn.BatchNorm1d(16, affine=False))
    settings = {"SGD": {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.002}, "AdamW": {"lr": 0.01, "weight_decay": 1.0}}[rule]
    optimizer = getattr(torch.optim, rule)(model.parameters(), **settings)
    norms, rests = [], []
    for step in range(700):
        optimizer.zero_grad()
        (model(torch.randn(64, 32)) * torch.randn(64, 16)).mean().backward()
        if step > 400 and step % 30 == 0:
            (row,) = fused_l2.doctor.examine(optimizer, model).layers
            norms.append(row.norm)
            rests.append(row.equilibrium)
            assert row.effective_lr == pytest.approx(settings["lr"] / row.norm**2)
        optimizer.step()
    # A gradient without signal is what the law assumes; that its size fluctuates from step to step moves the root by percents.
    assert sum(norms) / len(norms) == pytest.approx(sum(rests) / len(rests), rel=0.15)


def test_meta_tensors_and_many_of_them():
    """1,000 tensors and 1e9 parameters: nothing is read, and no tensor is looked at twice by anything quadratic."""
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(1000)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        report = fused_l2.doctor.examine(optimizer, model, steps=100)
    finally:
        sys.setprofile(None)
    assert len(report.layers) == 2000
    assert all(row.norm is None and row.arrives is None for row in report.layers)
    assert calls < 2000 * 700  # a quadratic look would be millions; the live objects of a whole test run count, too


def test_a_list_of_optimizers_and_wrappers():
    model = Gpt()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    first, second = torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW(vectors, weight_decay=0.0)
    assert "not-optimized" not in fused_l2.doctor.examine(first, model).codes()  # the other one is alive
    assert len(fused_l2.doctor.examine([first, second], model).layers) == len(list(model.parameters()))
    del second
    assert "not-optimized" in fused_l2.doctor.examine(first, model).codes()

    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    assert fused_l2.doctor.examine(Wrapper(first), model).title == "torch.SGD"


def test_two_optimizers_step_one_tensor():
    model = nn.Linear(4, 4)
    first, second = (torch.optim.AdamW(model.parameters(), weight_decay=0.0) for _ in range(2))
    assert "optimized-twice" not in fused_l2.doctor.examine(first, model).codes()  # the other one has not stepped
    train(model, second, inputs=torch.randn(2, 4))
    (found,) = fused_l2.doctor.examine(first, model).of("optimized-twice")
    assert found.severity == "doubtful"
    assert set(found.parameters) == {"weight", "bias"}


def test_an_unknown_class_says_what_is_not_known():
    class Lion8bit(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.99)})

        def step(self, closure: Any = None) -> None:
            pass

    model = block()
    report = fused_l2.doctor.examine(Lion8bit(model.parameters()), model)
    assert any("Lion8bit is no class that is known here" in text for text in report.unknown)
    assert "coupled-adam" not in report.codes()
    assert all(row.lr_wd is None and row.arrives in (None, 1.0) for row in report.layers)
    assert "decayed-bias" in report.codes()


@pytest.mark.parametrize("also", [None, 0.3])
def test_the_key_that_berts_optimizer_had(also):
    """Of a class that is not known it is the decay if there is no weight_decay; with both, which is read cannot be known."""

    class BertAdam(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            defaults = {"lr": 1e-4, "weight_decay_rate": 0.1}
            super().__init__(params, defaults if also is None else {**defaults, "weight_decay": also})

        def step(self, closure: Any = None) -> None:
            pass

    model = block()
    report = fused_l2.doctor.examine(BertAdam(model.parameters()), model, n=100)
    assert {row.weight_decay for row in report.layers} == {also or 0.1}
    assert {row.lam for row in report.layers} == {100 * (also or 0.1)}
    assert "decayed-bias" in report.codes()
    assert "decay-not-read" not in report.codes()
    assert any("weight_decay_rate and weight_decay" in text for text in report.unknown) == (also is not None)


def test_a_subclass_with_torchs_step_is_torchs():
    class Mine(torch.optim.AdamW):
        pass

    class Other(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            pass

    model = block()
    assert not fused_l2.doctor.examine(Mine(model.parameters()), model).unknown
    assert fused_l2.doctor.examine(Other(model.parameters()), model).unknown


def test_wrong_arguments():
    model = block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="param_groups, got Sequential"):
        fused_l2.doctor.examine(model)
    with pytest.raises(TypeError, match=r"torch.nn.Module or None, got SGD"):
        fused_l2.doctor.examine(optimizer, optimizer)
    with pytest.raises(ValueError, match="n must be positive, got 0"):
        fused_l2.doctor.examine(optimizer, model, n=0)


def test_the_report_as_text_html_and_data():
    model = block()
    report = fused_l2.doctor.examine(torch.optim.Adam(model.parameters(), weight_decay=0.1), model)
    text = str(report)
    assert text.startswith("torch.Adam: 0 wrong, 3 doubtful, 0 notes\ndoubtful: ")
    for finding in report.findings:
        assert finding.what in " ".join(text.split())
        assert all(len(line) <= 85 for line in str(finding).splitlines())
        copied = re.search(r"^    fix: (.*?)^    see: ", str(finding), re.DOTALL | re.MULTILINE)[1]
        assert ast.dump(ast.parse(copied)) == ast.dump(ast.parse(finding.fix))
    assert json.loads(json.dumps(report.as_dict()))["findings"][0]["code"] == report.findings[0].code
    assert "<td>1.weight</td>" in report._repr_html_()
    assert not report.is_wrong


@pytest.mark.parametrize(
    "code",
    [
        "x = 1",
        "; ".join(
            f'optimizer.param_groups[{i}]["weight_decay"] = fused_l2.weight_decay.from_lambda(5, n=50000)' for i in range(5)
        ),
        "o = torch.optim.Adam(param_groups(model, no_decay=[" + ", ".join(f"'h.{i}, ('" for i in range(40)) + "]), lr=1)",
        'p = {"' + "a" * 100 + '": [x for x in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21)]}',
    ],
)
def test_a_fix_of_several_lines_is_the_code_that_it_was(code):
    lines = wrapped_code("    fix: ", code)
    assert all(len(line) <= 85 for line in lines if "aaaa" not in line)  # no break within a string
    for copied in ("\n".join(lines).removeprefix("    fix: "), "\n".join(line[9:] for line in lines)):
        assert ast.dump(ast.parse(copied)) == ast.dump(ast.parse(code))


def test_tables_stay_short():
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(50)])
    text = str(fused_l2.doctor.examine(torch.optim.SGD(model.parameters(), lr=0.1), model))
    assert "... 60 more: report.table()" in text


def test_the_import_is_lazy():
    look = "print('fused_l2.doctor' in sys.modules)"
    code = f"import sys, fused_l2; {look}; fused_l2.doctor.examine; {look}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_rows_of_ours_follow_the_decay_rule():
    model = nn.Linear(4, 4, bias=False)
    optimizer = fused_l2.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, decay_rule="fully_decoupled")
    (row,) = fused_l2.doctor.examine(optimizer, model).layers
    assert row.lr_wd == pytest.approx(0.1)
    optimizer.param_groups[0]["lr"] = 0.005
    (row,) = fused_l2.doctor.examine(optimizer, model).layers
    assert row.lr_wd == pytest.approx(0.05)
