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
    transformers = pytest.importorskip("transformers", reason="pip install '.[transformers]'")
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


ADAPTERS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "LoRA": ("LoraConfig", {"r": 4, "target_modules": ["c_attn"]}, set()),
    "LoRA of embeddings": ("LoraConfig", {"r": 4, "target_modules": ["c_attn", "wte"]}, set()),
    "LoRA, bias=all": ("LoraConfig", {"r": 4, "target_modules": ["c_attn"], "bias": "all"}, {"decayed-bias", "decayed-norm"}),
    "DoRA": ("LoraConfig", {"r": 4, "target_modules": ["c_attn"], "use_dora": True}, set()),
    "IA3": ("IA3Config", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}, set()),
    "VeRA": ("VeraConfig", {"r": 4, "target_modules": ["c_attn"]}, set()),
    "prompt tuning": ("PromptTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}, set()),
    "prefix tuning": ("PrefixTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}, set()),
}


@pytest.mark.parametrize("given", ["model.parameters()", "what is trained"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_of_peft(adapter: str, given: str) -> None:
    """With all of the model's parameters, as many scripts have it, the frozen ones are noted."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    config, options, asked = ADAPTERS[adapter]
    options = options if "task_type" in options else {**options, "fan_in_fan_out": True}
    model = peft.get_peft_model(hugging_face("GPT-2"), getattr(peft, config)(**options))
    params = [p for p in model.parameters() if p.requires_grad or given == "model.parameters()"]
    optimizer = torch.optim.AdamW(params, lr=3e-4)
    for _ in range(2):
        report = fused_l2.doctor.examine(optimizer, model)
        assert report.codes("wrong") == set(), str(report)
        assert report.codes("doubtful") == asked, str(report)
        assert ("frozen-parameter" in report.codes("note")) == (given == "model.parameters()")
        assert not report.unknown
        tokens = torch.randint(0, 32, (2, 8))
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "ours"])
def test_lora_plus_of_peft(ours: bool) -> None:
    """Four param groups, two of which are empty here."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = peft.get_peft_model(hugging_face("BERT"), config)
    from peft.optimizers import create_loraplus_optimizer

    kind = fused_l2.AdamW if ours else torch.optim.AdamW
    optimizer = create_loraplus_optimizer(
        model=model, optimizer_cls=kind, lr=5e-5, loraplus_lr_ratio=16, loraplus_weight_decay=0.01
    )
    report = fused_l2.doctor.examine(optimizer, model, n=67_349, batch_size=8, steps=10_000)
    assert report.codes("wrong") == report.codes("doubtful") == set(), str(report)


def diffusers_model(kind: str) -> Any:
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")
    small = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    if kind == "unconditional":
        down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
        return diffusers.UNet2DModel(in_channels=3, out_channels=3, down_block_types=down, up_block_types=up, **small)
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return diffusers.UNet2DConditionModel(cross_attention_dim=8, down_block_types=down, up_block_types=up, **small)


@pytest.mark.parametrize("kind", ["unconditional", "text to image", "text to image, LoRA"])
def test_unets_of_diffusers(kind: str) -> None:
    """As train_unconditional.py, train_text_to_image.py and train_text_to_image_lora.py have them: AdamW on all parameters,
    whose decayed norms and biases an expert would ask about, or on the adapters; an average beside it that nobody steps."""
    model = diffusers_model(kind)
    from diffusers.training_utils import EMAModel

    asked = {"decayed-norm", "decayed-bias"}
    if kind.endswith("LoRA"):
        peft = pytest.importorskip("peft", reason="pip install peft")
        model.requires_grad_(False)
        model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_k", "to_q"]))
        asked = set()
    decay = 1e-6 if kind == "unconditional" else 1e-2
    trained = [p for p in model.parameters() if p.requires_grad]
    average = EMAModel(trained, decay=0.9999)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.95, 0.999), weight_decay=decay)
    for _ in range(2):
        report = fused_l2.doctor.examine(optimizer, model, n=8_189, batch_size=16, steps=51_200)
        assert report.codes("wrong") == set(), str(report)
        assert report.codes("doubtful") == asked, str(report)
        image = torch.randn(2, 3 if kind == "unconditional" else 4, 8, 8)
        text = () if kind == "unconditional" else (torch.randn(2, 3, 8),)
        model(image, torch.tensor([1, 2]), *text).sample.square().mean().backward()
        optimizer.step()
        average.step(trained)


def test_a_callback_of_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="pip install '.[lightning]'")
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
    accelerate = pytest.importorskip("accelerate", reason="pip install '.[accelerate]'")
    model = nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    report = fused_l2.doctor.examine(optimizer, model)
    assert report.title == "torch.AdamW"
    assert report.codes("wrong") == report.codes("doubtful") == set(), str(report)
