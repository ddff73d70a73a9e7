"""Kernels compiled ahead are those that a first step asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from comparing import make_params, set_grads

pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")
pytest.importorskip("numpy")

import fused_l2
from fused_l2.__main__ import warm
from fused_l2.warmup import kernels_of

from .fake_cuda import FakeDevice, nothing

BF16 = torch.bfloat16
# Common ways to set an optimizer up, and how many kernels a first step of each compiles.
SETUPS: list[tuple[str, dict[str, Any], tuple[torch.dtype, ...], int]] = [
    ("AdamW", {}, (torch.float32,), 1),
    ("SGD", {"momentum": 0.9}, (torch.float32,), 2),
    ("SGD", {}, (torch.float64,), 2),
    ("AdamW", {"max_grad_norm": 1.0}, (torch.float32,), 3),
    ("AdamW", {"max_grad_norm": 1.0}, (torch.float64,), 3),
    ("AdamW", {"max_grad_norm": 1.0, "norm_type": float("inf"), "statistics": True}, (BF16, torch.float32), 5),
    ("AdamW", {"amp_scaling": True}, (torch.float32,), 4),
    ("AdamW", {"low_precision": "kahan", "state_dtype": torch.float32}, (BF16,), 1),
    ("AdamW", {"low_precision": "stochastic", "capturable": True}, (BF16,), 3),
    ("SGD", {"low_precision": "remainder", "momentum": 0.9}, (BF16, torch.float32), 3),
    ("Adam", {"capturable": True, "amsgrad": True, "max_grad_norm": 1.0}, (torch.float32,), 5),
    ("AdamW", {"max_grad_norm": 1.0, "skip_if_nonfinite": True}, (torch.float16,), 5),
]


@pytest.mark.parametrize(("name", "options", "dtypes", "count"), SETUPS, ids=lambda x: str(x).replace("torch.", ""))
def test_what_is_compiled_ahead_is_what_a_first_step_asks_for(name, options, dtypes, count, monkeypatch):
    params = [p for d in dtypes for p in make_params((5, 64), d)]
    groups = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}]
    optimizer = getattr(fused_l2, name)(groups, **{"lr": 0.1, **options})
    ahead = kernels_of(optimizer)
    assert not optimizer.state
    asked: list[tuple[Any, ...]] = []
    device = FakeDevice(nothing)
    device.eager = True
    compile = device.compile
    monkeypatch.setattr(device, "compile", lambda *which: (asked.append(which), compile(*which))[1])
    with device.in_place(monkeypatch):
        set_grads(params, 0)
        optimizer.step()
    assert set(ahead) == set(asked)
    assert len(ahead) == len(set(ahead)) == count
    assert kernels_of(optimizer) == ahead  # with states and gradients, too


def test_many_groups_write_their_tables_in_large_launches():
    params = make_params([3] * 465)
    optimizer = fused_l2.AdamW([{"params": [p]} for p in params], capturable=True)
    assert ("write", 480) in kernels_of(optimizer)


def test_warmup_compiles_for_gpus_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    params = [torch.nn.Parameter(torch.empty(3, device="meta"))]
    done = fused_l2.warmup(fused_l2.AdamW(params), 90, "gfx942")
    assert [(w.kernel, w.architecture) for w in done] == [("fused_l2_adam", "sm_90"), ("fused_l2_adam", "gfx942")]
    assert list(tmp_path.rglob("*.cubin"))
    assert list(tmp_path.rglob("*.hsaco"))


def test_the_command(capsys):
    told = warm(["SGD", "momentum=0.9", "low_precision=master", "--dtype", "bfloat16", "--arch", "90", "max_grad_norm=1.0"])
    assert [line.split()[:2] for line in told] == [
        ["sm_90", name] for name in ("fused_l2_sgd", "fused_l2_write", "fused_l2_measure_grads", "fused_l2_control")
    ]
    for bad, message in (
        (["AdamW", "--arch", "90", "momentum=0.9"], "momentum"),
        (["AdamW", "--arch", "90", "lr"], "name=value"),
        (["AdamW", "--arch", "90", "--dtype", "float31"], "no dtype of this name"),
        (["AdamW", "--arch", "999"], "does not compile fused_l2_step for sm_999"),
    ):
        with pytest.raises(SystemExit):
            warm(bad)
        assert message in capsys.readouterr().err


def test_what_warmup_refuses():
    p = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(TypeError, match=r"takes an optimizer of fused_l2, got torch\.optim\.adamw\.AdamW"):
        fused_l2.warmup(torch.optim.AdamW([p]), 90)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a number as 90 or a name as 'gfx942', got 9\.0"):
        fused_l2.warmup(fused_l2.AdamW([p]), 9.0)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="Name the architectures to compile for"):
            fused_l2.warmup(fused_l2.AdamW([p]))


def test_processes_that_begin_together_compile_once(tmp_path):
    """As the ranks of a node do. The second one finds what the first one made."""
    code = textwrap.dedent(
        """
        import json, pathlib, sys, time, torch, fused_l2, triton
        hits = []
        triton.knobs.compilation.listener = lambda **given: hits.append(given["cache_hit"])
        optimizer = fused_l2.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, max_grad_norm=1.0)
        folder = pathlib.Path(sys.argv[1])
        (folder / sys.argv[2]).touch()
        while len(list(folder.glob("ready*"))) < 2:
            time.sleep(0.01)
        fused_l2.warmup(optimizer, 90)
        print(json.dumps(hits))
        """
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen([*command, f"ready{i}"], stdout=subprocess.PIPE, text=True, env=environment) for i in range(2)]
    hits = [json.loads(process.communicate()[0]) for process in running]
    assert [len(h) for h in hits] == [4, 4]
    assert [sum(not h for h in of_kernel) for of_kernel in zip(*hits, strict=True)] == [1, 1, 1, 1]
