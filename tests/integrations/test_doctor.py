"""The doctor in the trainers of others: nothing wrong in what they make by default, and names and groups as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fused_l2
import fused_l2.doctor


def hugging_face(kind: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="pip install 'fused_l2[transformers]'")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "BERT":
        return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=32, **small))
    if kind == "GPT-2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32))
    if kind == "ViT":
        config = transformers.ViTConfig(image_size=8, patch_size=4, **small)
        return transformers.ViTForImageClassification(config)
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["BERT", "GPT-2", "ViT", "T5"])
@pytest.mark.parametrize("ours", [False, True], ids=["torch", "ours"])
def test_the_trainers_default_groups(kind: str, ours: bool, tmp_path: Path) -> None:
    model = hugging_face(kind)
    import transformers

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], weight_decay=0.01, learning_rate=5e-5, optim="adamw_torch"
    )
    given = {"optimizer_cls_and_kwargs": (fused_l2.AdamW, {"lr": 5e-5, "weight_decay": 0.01})} if ours else {}
    trainer = transformers.Trainer(model=model, args=arguments, **given)
    trainer.create_optimizer_and_scheduler(10_000)
    report = fused_l2.doctor.examine(trainer.optimizer, model, n=67_349, batch_size=8, steps=10_000)
    assert report.codes("wrong") == set(), str(report)
    assert report.codes("doubtful") == set(), str(report)


@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.75}], ids=str)
def test_timms_factory(options: dict[str, Any]) -> None:
    from integrations.test_timm import Layered, optim

    model = Layered()
    optimizer = optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, **options)
    report = fused_l2.doctor.examine(optimizer, model)
    assert report.codes("wrong") == report.codes("doubtful") == set(), str(report)


def test_lora_of_peft() -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = peft.get_peft_model(hugging_face("GPT-2"), peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    report = fused_l2.doctor.examine(optimizer, model)
    assert report.codes("wrong") == report.codes("doubtful") == set(), str(report)
    assert "frozen-parameter" in report.codes("note")


def test_a_callback_of_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="pip install 'fused_l2[lightning]'")
    reports = []

    class Doctor(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            reports.append(fused_l2.doctor.examine(trainer.optimizers, module))

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

        def training_step(self, batch: Any, _: int) -> Any:
            return self.layers(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return fused_l2.AdamW(fused_l2.weight_decay.param_groups(self, weight_decay=0.1), lr=1e-3)

    trainer = lightning.Trainer(
        max_steps=1, callbacks=[Doctor()], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(tmp_path), accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(4, 4)))
    (report,) = reports
    assert report.codes("wrong") == report.codes("doubtful") == set(), str(report)
    assert [row.name for row in report.layers] == [
        "layers.0.weight", "layers.2.weight", "layers.0.bias", "layers.2.bias"
    ]  # fmt: skip


def test_accelerates_wrapper() -> None:
    accelerate = pytest.importorskip("accelerate", reason="pip install 'fused_l2[accelerate]'")
    model = nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    report = fused_l2.doctor.examine(optimizer, model)
    assert report.title == "torch.AdamW"
    assert report.codes("wrong") == report.codes("doubtful") == set(), str(report)
