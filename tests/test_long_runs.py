"""1000 steps leave objects and Python's memory where they were after 200 (T39, T42; for DTensors see tests/distributed)."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch

import fused_l2

TENSORS = 60


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
        if step in (200, 1000):
            gc.collect()
            found.append((len(gc.get_objects()), sys.getallocatedblocks()))
    (objects, blocks), (objects_now, blocks_now) = found
    assert objects_now - objects <= 10
    # Python's own blocks: numbers, strings, what tables are made of. One left behind in each step would be 800; caches (the
    # powers of 128 step counts, those of torch and Python) have been filled by then.
    assert blocks_now - blocks <= 400
