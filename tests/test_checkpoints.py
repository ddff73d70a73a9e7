"""Checkpoints of whole trainings: killed and resumed, and float32 weights in files of their own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import assert_same_bits
from torch import nn

import fused_l2

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "AdamW": ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "max_grad_norm": 1.0, "decay_rule": "corrected"}),
    "stochastic": ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "low_precision": "stochastic"}),
    "remainder": ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "low_precision": "remainder"}),
}
STEPS = 500


def make(kind: str) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    name, options = OPTIMIZERS[kind]
    if "low_precision" in options:
        model = model.bfloat16()
    groups = fused_l2.weight_decay.param_groups(model, options["weight_decay"])
    optimizer = getattr(fused_l2, name)(groups, **options)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def train(folder: Path, kind: str) -> None:
    """Train to the end, from the last checkpoint if there is one, and write one every few steps."""
    model, optimizer, scheduler = make(kind)
    file, first = folder / "checkpoint.pt", 0
    if file.exists():
        found = torch.load(file, weights_only=True)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        scheduler.load_state_dict(found["scheduler"])
        first = found["step"]
        (folder / "resumed").write_text(str(first))
    for step in range(first, STEPS):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()
        if step % 7 == 0:
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            torch.save({"step": step + 1, **{k: v.state_dict() for k, v in parts.items()}}, folder / "new.pt")
            os.replace(folder / "new.pt", file)
    torch.save(model.state_dict(), folder / "end.pt")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_run_killed_at_a_random_moment_and_resumed_ends_in_the_same_bits(tmp_path: Path) -> None:
    # All kinds in one process each time, since it is torch that takes long to start.
    kinds = list(OPTIMIZERS)
    for kind in kinds:
        for run in ("whole", "killed"):
            (tmp_path / run / kind).mkdir(parents=True)
        train(tmp_path / "whole" / kind, kind)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    killed, seed = 0, random.randrange(1 << 32)
    moments = random.Random(seed)
    for attempt in range(4):
        run = subprocess.Popen([sys.executable, __file__, str(tmp_path / "killed"), *kinds], env=environment)
        if attempt < 2:
            # It may be killed once the first checkpoint is there: while it trains, while it writes, ...
            waiting = [k for k in kinds if not (tmp_path / "killed" / k / "end.pt").exists()]
            while waiting and not (tmp_path / "killed" / waiting[0] / "checkpoint.pt").exists() and run.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.3))
            run.send_signal(signal.SIGKILL)
        killed += run.wait() == -signal.SIGKILL
        if run.returncode == 0:
            break
    assert run.returncode == 0
    assert killed, f"seed {seed}: it was never killed in time"
    assert any((tmp_path / "killed" / kind / "resumed").exists() for kind in kinds), f"seed {seed}"
    for kind in kinds:
        ends = [torch.load(tmp_path / run / kind / "end.pt", weights_only=True) for run in ("whole", "killed")]
        assert_same_bits(list(ends[0].values()), list(ends[1].values()))


class Tied(nn.Module):
    """Two names for one parameter, a buffer, a frozen parameter, and one that no optimizer knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head, self.free = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.Linear(4, 4)
        self.head.weight = self.embedding.weight
        self.free.bias.requires_grad_(False)
        self.register_buffer("scale", torch.ones(3))

    def step_with(self, optimizer: Any, steps: int) -> None:
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            for p in (self.head.weight, self.free.weight):
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step()


@pytest.mark.parametrize("mode", ["round", "master", "remainder", "kahan", "stochastic"])
def test_float32_weights_go_to_safetensors_and_come_back(mode: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    model = Tied().bfloat16()
    # In another order than the model's.
    optimizer = fused_l2.AdamW([model.free.weight, model.embedding.weight], lr=0.01, low_precision=mode)
    model.step_with(optimizer, 5)
    weights = fused_l2.master_state_dict(model, optimizer)
    assert list(weights) == list(model.state_dict())
    assert weights["free.weight"].dtype is weights["head.weight"].dtype is torch.float32
    assert weights["free.bias"].dtype is torch.bfloat16
    assert_same_bits([weights["free.weight"], weights["head.weight"]], optimizer.master_params())
    for name, value in model.state_dict().items():
        if weights[name].dtype is torch.float32:
            assert float((weights[name] - value.float()).abs().max()) <= 2**-8 * float(value.abs().max())  # its rounding
    safetensors.save_file(weights, tmp_path / "model.safetensors")

    other = Tied().bfloat16()
    again = fused_l2.AdamW([other.free.weight, other.embedding.weight], lr=0.01, low_precision=mode)
    fused_l2.load_master_state_dict(other, again, safetensors.load_file(tmp_path / "model.safetensors"))
    assert other.head.weight is other.embedding.weight
    if mode in ("master", "remainder"):
        assert_same_bits(again.master_params(), optimizer.master_params())
    assert_same_bits(list(other.state_dict().values()), list(model.state_dict().values()))


def test_weights_of_another_model_change_nothing() -> None:
    model = Tied()
    optimizer = fused_l2.SGD([model.head.weight], lr=0.1)
    weights = fused_l2.master_state_dict(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    with pytest.raises(RuntimeError, match="'scale'"):
        fused_l2.load_master_state_dict(model, optimizer, {k: v for k, v in zeros.items() if k != "scale"})
    with pytest.raises(RuntimeError, match=r"'free.weight' has shape \(4, 5\), in the model \(4, 4\)"):
        fused_l2.load_master_state_dict(model, optimizer, {**zeros, "free.weight": torch.zeros(4, 5)})
    with pytest.raises(TypeError, match=r"takes an optimizer of fused_l2, got torch\.optim\.sgd\.SGD"):
        fused_l2.master_state_dict(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert_same_bits(list(model.parameters()), before)


if __name__ == "__main__":
    for kind in sys.argv[2:]:
        train(Path(sys.argv[1]) / kind, kind)


def test_weights_that_cannot_be_read_are_refused_before_anything_changes() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = fused_l2.AdamW(params)
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    for bad in (torch.ones(3, device="meta"), torch.ones(3).to_sparse(), torch.ones(3, dtype=torch.int64), freed):
        with pytest.raises(ValueError, match="load_master_params: tensor 1 has"):
            optimizer.load_master_params([torch.ones(3), bad])
    model = torch.nn.Linear(2, 1)
    optimizer = fused_l2.AdamW(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    for bad_value, said in ((torch.ones(1, device="meta"), "'bias' is on the meta device"), (5, "'bias' is 5, not a tensor")):
        with pytest.raises(RuntimeError, match=said):
            fused_l2.load_master_state_dict(model, optimizer, {"weight": torch.ones(1, 2), "bias": bad_value})  # type: ignore[dict-item]
    assert_same_bits(list(model.parameters()), before)
    assert all(p.eq(0).all() for p in params)
