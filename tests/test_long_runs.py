"""1000 steps leave live objects and resident memory where they were after 10 (T39, T42; for DTensors see tests/distributed)."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_l2

TENSORS = 60


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
        ("AdamW", {"weight_decay": 0.1}),
        ("AdamW", {"max_grad_norm": 1.0, "statistics": True, "skip_if_nonfinite": True}),
        ("AdamW", {"low_precision": "kahan", "amp_scaling": True}),
    ],
    ids=["SGD", "AdamW", "clipped-measured", "kahan-scaled"],
)
def test_1000_steps_leave_nothing_behind(name: str, options: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if "low_precision" in options else torch.float32
    params = [torch.nn.Parameter(torch.randn(5 + i, dtype=torch.float32).to(dtype)) for i in range(TENSORS)]
    optimizer = getattr(fused_l2, name)([{"params": params[::2]}, {"params": params[1::2], "lr": 0.01}], lr=0.1, **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    scaler = torch.amp.GradScaler("cpu", enabled=optimizer.amp_scaling)
    found = []
    for step in range(1, 1001):
        loss = torch.stack([p.float().square().sum() for p in params]).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        if step in (10, 1000):
            gc.collect()
            found.append((len(gc.get_objects()), resident()))
    (objects, memory), (objects_now, memory_now) = found
    assert objects_now - objects <= 10
    # A pointer left behind for each tensor in each step would be half a megabyte.
    assert memory_now - memory <= 400_000
