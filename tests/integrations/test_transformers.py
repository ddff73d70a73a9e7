"""Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install '.[transformers]'")
pytest.importorskip("accelerate", reason="pip install '.[transformers]'")
from comparing import assert_same_bits
from integrations.training import OPTIONS, check, each
from torch import Tensor

import fused_l2

STEPS = 6


def make_model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def make_trainer(folder: Path, model: Any, **given: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(32, (8,), generator=generator) for _ in range(4 * STEPS)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=STEPS, save_steps=STEPS // 2, per_device_train_batch_size=4,
        report_to=[], disable_tqdm=True, logging_strategy="no", max_grad_norm=0.5, weight_decay=0.5, learning_rate=0.05, seed=3,
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=[{"input_ids": t, "labels": t} for t in tokens], **given
    )


@each
def test_the_trainer_makes_the_param_groups(name: str, tmp_path: Path, exact_sqrt: None) -> None:
    def train(cls: Any) -> list[Tensor]:
        model = make_model()
        trainer = make_trainer(tmp_path / cls.__name__, model, optimizer_cls_and_kwargs=(cls, OPTIONS[name]))
        trainer.train()
        assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.5, 0.0}
        return list(model.parameters())

    check(train, name)


@each
def test_a_made_optimizer_and_scheduler(name: str, tmp_path: Path, exact_sqrt: None) -> None:
    def train(cls: Any) -> list[Tensor]:
        model = make_model()
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        optimizer = cls([{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "lr": 0.01}], **OPTIONS[name])
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        make_trainer(tmp_path / cls.__name__, model, optimizers=(optimizer, scheduler)).train()
        return list(model.parameters())

    check(train, name)


@each
def test_resumed(name: str, tmp_path: Path) -> None:
    given = {"optimizer_cls_and_kwargs": (getattr(fused_l2, name), OPTIONS[name])}
    whole, again = make_model(), make_model()
    make_trainer(tmp_path, whole, **given).train()
    make_trainer(tmp_path, again, **given).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert_same_bits(list(again.parameters()), list(whole.parameters()))
