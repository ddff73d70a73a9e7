"""python -m fused_l2: what a bug report needs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fused_l2
from fused_l2.__main__ import main
from fused_l2.engines import cpu


def test_it_prints_versions_and_engines():
    printed = subprocess.run([sys.executable, "-m", "fused_l2"], capture_output=True, text=True, check=True).stdout
    for expected in (fused_l2.__version__, torch.__version__, "Python", "library", str(fused_l2.capabilities())):
        assert expected in printed


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        main(arguments)
    printed = capsys.readouterr()
    return printed.out + printed.err


def test_help_names_the_commands(capsys):
    printed = said(capsys, "--help")
    assert "usage: python -m fused_l2 [-h] [--version] command ..." in printed
    for name, what in (("warmup", "compile ahead"), ("doctor", "say what")):
        assert f"{name} " in printed
        assert what in printed
    assert said(capsys, "warmup", "--help").startswith("usage: python -m fused_l2 warmup ")
    assert said(capsys, "doctor", "--help").startswith("usage: python -m fused_l2 doctor ")


def test_version(capsys):
    assert said(capsys, "--version") == f"fused_l2 {fused_l2.__version__}\n"


def test_a_command_that_there_is_not(capsys):
    assert "argument command: invalid choice: 'docter'" in said(capsys, "docter")


def test_without_the_library_the_reason_is_given_once(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "_load", lambda: (None, "the library is missing"))
    assert main([]) == 0
    assert capsys.readouterr().out.count("the library is missing") == 1
