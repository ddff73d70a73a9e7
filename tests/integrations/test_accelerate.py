"""Hugging Face Accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

accelerate = pytest.importorskip("accelerate", reason="pip install '.[accelerate]'")
from comparing import assert_same_bits
from integrations.training import OPTIONS, batches, check, each, groups_of, make_model
from torch import Tensor, nn

import fused_l2


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def prepared(cls: Any, name: str, **options: Any) -> tuple[Any, nn.Module, Any, Any]:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
    model = make_model()
    optimizer = cls(groups_of(model, name), **OPTIONS[name])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def run(accelerator: Any, model: nn.Module, optimizer: Any, scheduler: Any, steps: range) -> None:
    for x, y in [batches(12)[i] for i in steps]:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@each
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accumulation_clipping_and_mixed_precision(name: str, precision: str, exact_sqrt: None) -> None:
    def train(cls: Any) -> list[Tensor]:
        parts = prepared(cls, name, mixed_precision=precision)
        run(*parts, range(12))
        return list(parts[1].parameters())

    check(train, name)


@each
def test_saved_and_resumed(name: str, tmp_path: Path) -> None:
    whole = prepared(getattr(fused_l2, name), name)
    run(*whole, range(12))
    first = prepared(getattr(fused_l2, name), name)
    run(*first, range(6))
    first[0].save_state(str(tmp_path / "state"))
    again = prepared(getattr(fused_l2, name), name)
    again[0].load_state(str(tmp_path / "state"))
    run(*again, range(6, 12))
    assert_same_bits(list(again[1].parameters()), list(whole[1].parameters()))
