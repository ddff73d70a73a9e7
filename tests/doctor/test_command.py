"""python -m fused_l2 doctor: scripts and checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fused_l2
from doctor.examining import Gpt, train
from fused_l2.__main__ import main

SCRIPT = """
import sys
import warnings
import torch

warnings.simplefilter("ignore")  # that a parameter is listed twice

model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD([model.weight, model.weight, model.bias], lr=0.1, weight_decay=0.1)
for step in range(3):
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    print("step", step, __name__, sys.argv[1:])
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "train.py"
    file.write_text(SCRIPT)
    return file


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys: Any) -> Any:
    """The command, in this process."""

    def call(*arguments: Any) -> Done:
        argv, path, modules = list(sys.argv), list(sys.path), sys.modules["__main__"]
        status = main(["doctor", *map(str, arguments)])
        assert (sys.argv, sys.path, sys.modules["__main__"]) == (argv, path, modules)
        return Done(status, *capsys.readouterr())

    return call


def test_a_script_runs_unchanged_and_is_reported_at_its_end(script, run):
    done = run("--steps", 3, script, "--lr", 1, "-x")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [f"step {i} __main__ ['--lr', '1', '-x']" for i in range(3)]
    assert [line for line in lines if line.startswith("torch.SGD #1, before step")] == [
        f"torch.SGD #1, before step {step}: 1 wrong, 1 doubtful, 0 notes" for step in (1, 3)
    ]


def test_strict_and_exit(script, tmp_path, run):
    done = run("--strict", "--exit", "--json", tmp_path / "report.json", script)
    assert done.returncode == 1
    assert "step 0" not in done.stdout
    (report,) = json.loads((tmp_path / "report.json").read_text())
    assert {f["code"] for f in report["findings"]} == {"optimized-twice", "decayed-bias"}


def test_what_a_script_raises_comes_after_the_report(tmp_path, run, capsys):
    file = tmp_path / "train.py"
    file.write_text(SCRIPT + "\nraise RuntimeError('of the script')")
    with pytest.raises(RuntimeError, match="of the script"):
        run(file)
    assert "torch.SGD #1" in capsys.readouterr().out
    file.write_text("import sys; sys.exit(3)")
    with pytest.raises(SystemExit, match="3"):
        run(file)
    assert "no optimizer made a step" in capsys.readouterr().out


def test_a_module_and_a_missing_script(script, run):
    command = [sys.executable, "-W", "ignore", "-m", "fused_l2", "doctor", "-m", "train", "--lr", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parent)
    assert done.returncode == 0, done.stderr
    assert "step 0 __main__ ['--lr', '1']" in done.stdout
    assert "optimized-twice" in done.stdout
    done = run("nowhere.py")
    assert done.returncode == 2
    assert "no such script: nowhere.py" in done.stderr


def checkpoint(path: Path, name: str = "AdamW", dtype: torch.dtype = torch.float32) -> Path:
    model = Gpt().to(dtype)
    optimizer = getattr(torch.optim, name)(model.named_parameters(), lr=1e-3, weight_decay=0.1)
    train(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}, path)
    return path


def test_a_checkpoint(tmp_path, capsys):
    assert main(["doctor", str(checkpoint(tmp_path / "a.pt", "Adam", torch.bfloat16))]) == 0
    printed = capsys.readouterr().out
    assert "a.pt['optimizer']: " in printed
    assert "coupled-adam" in printed
    assert "frozen-second-moment" in printed
    assert "wte.weight" in printed
    assert "not known: A state dict says neither which class wrote it" in printed


def test_ours_and_torchs_write_the_same(tmp_path, capsys):
    model = Gpt()
    optimizer = fused_l2.AdamW(model.parameters(), weight_decay=0.1)
    train(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "b.pt")
    assert main(["doctor", "--strict", str(tmp_path / "b.pt")]) == 0
    assert "b.pt: 0 wrong, 0 doubtful" in capsys.readouterr().out


def test_a_checkpoint_of_8_bit_states_has_shapes(tmp_path, capsys):
    model = torch.nn.Linear(128, 64).bfloat16()
    optimizer = fused_l2.AdamW(model.named_parameters(), state_dtype="8bit", low_precision="remainder8")
    train(model, optimizer, inputs=torch.randn(4, 128).bfloat16())
    torch.save(optimizer.state_dict(), tmp_path / "b.pt")
    assert main(["doctor", str(tmp_path / "b.pt")]) == 0
    printed = capsys.readouterr().out
    assert "weight     (64, 128)" in printed
    assert "rates those of decay_rule='plain'" in " ".join(printed.split())


def test_a_damaged_checkpoint_is_named(tmp_path, capsys):
    state = torch.load(checkpoint(tmp_path / "a.pt"), weights_only=True)
    state["optimizer"]["state"][0]["exp_avg_sq"] = torch.zeros(3)
    torch.save(state, tmp_path / "c.pt")
    assert main(["doctor", "--strict", str(tmp_path / "c.pt")]) == 1
    printed = capsys.readouterr().out
    assert "state-of-another-model" in printed
    assert "wte.weight has shape (32, 16), its exp_avg_sq (3,)" in printed


class Trap:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    trace = tmp_path / "was executed"
    torch.save({"optimizer": Trap(trace)}, tmp_path / "d.pt")
    assert main(["doctor", str(tmp_path / "d.pt")]) == 2
    assert "could execute code" in capsys.readouterr().err
    assert not trace.exists()
    torch.load(tmp_path / "d.pt", weights_only=False)  # the trap works
    assert trace.exists()
    torch.save({"model": {}}, tmp_path / "e.pt")
    assert main(["doctor", str(tmp_path / "e.pt")]) == 2
    assert "holds no optimizer's state dict" in capsys.readouterr().err


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "doctor" in capsys.readouterr().out
