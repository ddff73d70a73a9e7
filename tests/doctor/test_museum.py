"""Real bugs of public reports, made small: each is found with the right code and parameters, and its fix ends it.

A program returns the model, the optimizer and what else is told to the doctor. Fixes are executed as they are printed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fused_l2
import fused_l2.doctor
from doctor.examining import Gpt, assert_unchanged, backward, block, snapshot, train

Made = tuple[nn.Module, Any, dict[str, Any]]


class Exhibit(NamedTuple):
    code: str
    severity: str
    parameters: set[str] | None  # None: all
    program: Callable[[], Made]


EXHIBITS: list[Any] = []


def exhibit(code: str, severity: str, *parameters: str) -> Any:
    def add(program: Callable[[], Made]) -> Callable[[], Made]:
        found = Exhibit(code, severity, set(parameters) or None, program)
        EXHIBITS.append(pytest.param(found, id=f"{program.__name__}-{code}"))
        return program

    return add


LINEARS = {f"h.{i}.{j}.weight" for i in (0, 1) for j in (1, 3)}
BIASES = {f"h.{i}.{j}.bias" for i in (0, 1) for j in (1, 3)}
NORMS = {"ln_f.weight", "ln_f.bias", *(f"h.{i}.0.{kind}" for i in (0, 1) for kind in ("weight", "bias"))}


@exhibit("decayed-norm", "doubtful", *(n for n in NORMS if n.endswith("weight")))
def names_of_another_library() -> Made:
    """karpathy/minGPT#23: the list of what not to decay has the names of another library's norms."""
    model = Gpt()
    no_decay = ["bias", "LayerNorm.weight"]
    groups = [
        {"params": [p for n, p in model.named_parameters() if not any(d in n for d in no_decay)], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if any(d in n for d in no_decay)], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=3e-4), {}


@exhibit("decay-not-read", "wrong", *BIASES, *NORMS)
def the_key_of_another_optimizer() -> Made:
    """huggingface/transformers#525, namisan/mt-dnn#37: weight_decay_rate was the key of BERT's own optimizer. Biases decay."""
    model = Gpt()
    thin = [n for n, p in model.named_parameters() if p.dim() < 2]
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in thin], "weight_decay_rate": 0.01},
        {"params": [p for n, p in model.named_parameters() if n in thin], "weight_decay_rate": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=5e-5, weight_decay=0.01), {}


@exhibit("decayed-norm", "doubtful", *NORMS)
@exhibit("decayed-bias", "doubtful", *BIASES)
def norms_by_default() -> Made:
    """ServiceNow/Fast-LLM#542: after a refactoring every parameter has the default, which is to be decayed."""
    model = Gpt()
    return model, torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1), {}


@exhibit("decayed-embedding", "note", "wte.weight", "wpe.weight")
def everything_is_decayed() -> Made:
    """Lightning-AI/lit-llama#254: weight decay for all layers, embeddings among them."""
    model = Gpt()
    return model, torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, foreach=False), {}


@exhibit("decayed-embedding", "wrong", "cls_token")
def the_model_is_not_asked() -> Made:
    """graphnet-team/graphnet#713: no_weight_decay() of the model lists cls_token, and nobody calls it."""

    class DeepIce(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
            self.blocks = block()

        def no_weight_decay(self) -> set[str]:
            return {"cls_token"}

    model = DeepIce()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), {}


@exhibit("undecayed-weight", "wrong", "lm_head.weight", *LINEARS)
@exhibit("decayed-bias", "doubtful", *BIASES)
def swapped_groups() -> Made:
    """facebookresearch/BalancingGroups#6: biases and norms are decayed, and nothing else is."""
    model = Gpt()
    thin = [p for n, p in model.named_parameters() if "bias" in n or "ln_f.weight" in n]
    held = set(map(id, thin))
    groups = [
        {"params": thin, "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if id(p) not in held], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-5), {}


@exhibit("decayed-bias", "doubtful", *BIASES)
def a_name_is_not_a_part_of_a_name() -> Made:
    """namisan/mt-dnn#37: ``n not in no_decay`` compares full names, so that the second group is empty."""
    model = Gpt()
    no_decay = ["bias", "gamma", "beta", "LayerNorm.bias", "LayerNorm.weight"]
    groups = [{"params": [p for n, p in model.named_parameters() if n not in no_decay], "weight_decay": 0.01}]
    return model, torch.optim.AdamW(groups, lr=5e-5), {}


@exhibit("decayed-bias", "doubtful", *BIASES)
def groups_joined_again() -> Made:
    """nvidia-cosmos/cosmos-predict2.5#165: decay and no-decay parameters are told apart, then put into one group."""
    model = Gpt()
    decay = [p for p in model.parameters() if p.dim() >= 2]
    no_decay = [p for p in model.parameters() if p.dim() < 2]
    return model, torch.optim.AdamW(decay + no_decay, lr=1e-4, weight_decay=0.1), {}


@exhibit("undecayed-weight", "doubtful", "1.normal_head.weight")
def a_matrix_named_like_a_norm() -> Made:
    """ultralytics/yolov5#4104 (how names make groups): "norm" in a name is no proof of a normalization layer."""
    model = nn.Sequential(block(), nn.ModuleDict({"normal_head": nn.Linear(16, 4), "head": nn.Linear(16, 4)}))
    left_out = [p for n, p in model.named_parameters() if p.dim() < 2 or "norm" in n]
    held = set(map(id, left_out))
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in held], "weight_decay": 0.1},
        {"params": left_out, "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-3), {}


@exhibit("coupled-adam", "doubtful")
def adam_with_weight_decay() -> Made:
    """pytorch/pytorch#38767: weight_decay of Adam is not the decay that papers mean."""
    model = Gpt()
    return model, torch.optim.Adam(model.parameters(), lr=3e-4, weight_decay=0.1), {}


@exhibit("coupled-adam", "doubtful", *LINEARS, "lm_head.weight")
def adam_where_adamw_was_meant() -> Made:
    """TransformerLensOrg/TransformerLens#81: Adam with groups made for AdamW."""
    model = Gpt()
    return model, torch.optim.Adam(fused_l2.weight_decay.param_groups(model, 0.01), lr=1e-3), {}


@exhibit("foreign-parameter", "wrong", "0.0", "0.16")
@exhibit("not-optimized", "doubtful", "wte.weight", "lm_head.weight")
def embeddings_resized_too_late() -> Made:
    """huggingface/transformers#3532: the optimizer is made, then the embeddings are resized for new tokens."""
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    model.wte, model.lm_head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
    return model, optimizer, {}


@exhibit("foreign-parameter", "wrong")
def wrapped_after_the_optimizer() -> Made:
    """huggingface/accelerate#3209, #3256: FSDP flattens the parameters after the optimizer was made."""

    class Flattened(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.flat = nn.Parameter(torch.cat([p.detach().flatten() for p in inner.parameters()]))

    model = block()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return Flattened(model), optimizer, {}


@exhibit("foreign-parameter", "wrong", "0.2")
def pruned_layers_are_new_layers() -> Made:
    """microsoft/nni#4521: speeding up a pruned model replaces its layers; the optimizer steps the old ones."""
    model = block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    return model, optimizer, {}


@exhibit("not-optimized", "doubtful", "fc.weight", "fc.bias", "crf")
def a_forgotten_append() -> Made:
    """zjunlp/HVPNeT#5: crf and fc get a group of their own, which is never added to the list."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = block()
            self.fc = nn.Linear(16, 4)
            self.crf = nn.Parameter(torch.zeros(4, 4))

    model = Tagger()
    return model, torch.optim.AdamW([{"params": model.bert.parameters(), "lr": 3e-5}], lr=1e-3, weight_decay=0.0), {}


@exhibit("not-optimized", "wrong", "layers[0]", "layers[1]")
def layers_in_a_list() -> Made:
    """pytorch/pytorch#59925, #72580: modules in a plain list are no part of the model."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
            self.head = nn.Linear(4, 2)

    model = Net()
    return model, torch.optim.SGD(model.parameters(), lr=0.1), {}


@exhibit("optimized-twice", "wrong", "weight")
def listed_twice() -> Made:
    """pytorch/pytorch#40967: a parameter twice in one group is stepped twice."""
    model = nn.Linear(4, 4, bias=False)
    with pytest.warns(UserWarning, match="duplicate"):
        return model, torch.optim.SGD([*model.parameters(), model.weight], lr=0.1), {}


@exhibit("tied-in-two-groups", "wrong", "wte.weight", "lm_head.weight")
def assigned_states_untie() -> Made:
    """pytorch/pytorch#188346: load_state_dict(assign=True) makes two parameters of tied weights."""
    model = Gpt(tied=True)
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.wte.weight is not model.lm_head.weight
    assert model.wte.weight.data_ptr() == model.lm_head.weight.data_ptr()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), {}


@exhibit("frozen-parameter", "wrong", "wte.weight")
def frozen_after_backward() -> Made:
    """neuralmagic/sparseml#965: requires_grad=False is set in step(), when gradients are there already."""
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    backward(model)
    model.wte.weight.requires_grad_(False)
    return model, optimizer, {}


@exhibit(
    "frozen-parameter", "note", *(f"backbone.{n}" for n in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"))
)
def frozen_again_on_resuming() -> Made:
    """Lightning-AI/pytorch-lightning#21901: a resumed fine-tuning freezes what it had unfrozen."""
    model = nn.ModuleDict({"backbone": block(), "head": nn.Linear(16, 2)})
    optimizer = torch.optim.AdamW(
        [{"params": model["head"].parameters()}, {"params": model["backbone"].parameters(), "lr": 1e-5}], lr=1e-3
    )
    model["backbone"].requires_grad_(False)
    return model, optimizer, {}


@exhibit("state-of-another-model", "wrong", "0.weight", "1.weight")
def layers_in_another_order() -> Made:
    """Lightning-AI/pytorch-lightning#17025, X-LANCE/text2sql-lgesql#18: states go by position, and the order changed."""
    old = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Linear(8, 3, bias=False))
    before = torch.optim.AdamW(old.parameters())
    train(old, before, inputs=torch.randn(2, 3))
    model = nn.Sequential(nn.Linear(8, 3, bias=False), nn.Linear(3, 8, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(before.state_dict())
    return model, optimizer, {}


@exhibit("learning-rate-zero", "note")
def a_warmup_that_starts_at_zero() -> Made:
    """huggingface/transformers#34754, verl-project/verl#3674: the first step of the schedule has lr 0."""
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
    return model, optimizer, {}


@exhibit("lambda-not-divided", "wrong", "0.weight", "2.weight")
@exhibit("decay-too-strong", "wrong", "0.weight", "2.weight")
def lambda_of_a_textbook() -> Made:
    """MichalDanielDobrzanski/DeepLearningPython#16: lmbda = 5.0 of the book's network, eta 0.5, n = 50,000, as weight_decay."""
    model = nn.Sequential(nn.Linear(16, 8), nn.Sigmoid(), nn.Linear(8, 4))
    groups = fused_l2.weight_decay.param_groups(model, 5.0)
    return model, torch.optim.SGD(groups, lr=0.5), {"lam": 5.0, "n": 50_000, "batch_size": 10}


@exhibit("decay-without-effect", "note", "0.weight", "2.weight")
@exhibit("decay-lost-in-rounding", "note", "0.weight", "2.weight")
def nothing_left_in_float32() -> Made:
    """pytorch/pytorch#64475: lr 1e-4 and weight_decay 1e-4, DETR's, make 1 - lr * weight_decay = 1."""
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    return model, torch.optim.AdamW(fused_l2.weight_decay.param_groups(model, 1e-4), lr=1e-4), {"steps": 500_000}


@exhibit("decay-lost-in-rounding", "wrong", "1.weight", "3.weight")
def decay_in_bfloat16() -> Made:
    """Nerogar/OneTrainer#996: weight decay applied in bfloat16 changes nothing."""
    torch.manual_seed(0)
    model = block(64).bfloat16()
    return model, torch.optim.AdamW(fused_l2.weight_decay.param_groups(model, 0.01), lr=1e-5, fused=True), {}


@exhibit("update-lost-in-rounding", "wrong", "0.weight", "1.weight")
def norms_that_stay_at_one() -> Made:
    """vllm-project/speculators#765: bfloat16 norm weights start at 1.0 and are exactly 1.0 at the end."""
    model = nn.Sequential(nn.RMSNorm(16), nn.RMSNorm(16)).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    train(model, optimizer, 20, torch.randn(4, 16).bfloat16())
    assert all(bool((p == 1).all()) for p in model.parameters())
    return model, optimizer, {}


@exhibit("frozen-second-moment", "wrong")
def moments_of_bfloat16() -> Made:
    """areal-project/AReaL#1292: AdamW's moments have the parameters' dtype, and the loss stays three times as high."""
    model = Gpt().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer)
    return model, optimizer, {}


@exhibit("decay-before-normalization", "note", "0.weight")
def decay_that_is_a_learning_rate() -> Made:
    """clovaai/AdamP#13: before a batch norm, decay is a schedule of the effective learning rate."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    return model, torch.optim.SGD(fused_l2.weight_decay.param_groups(model, 5e-4), lr=0.1, momentum=0.9), {}


@exhibit("many-small-launches", "note")
def a_group_for_every_tensor() -> Made:
    """roboflow/rf-detr#1409: 465 param groups with 28 different settings."""
    model = nn.ModuleList([nn.Linear(4, 4) for _ in range(60)])
    groups = [{"params": [p], "weight_decay": 0.1 * (p.dim() > 1)} for p in model.parameters()]
    return model, torch.optim.AdamW(groups, lr=1e-4), {}


@exhibit("slow-implementation", "note")
def a_python_loop() -> Made:
    """deepmodeling/deepmd-kit#4463: Adam's default implementation on a CPU is a loop over tensors."""
    model = nn.ModuleList([nn.Linear(4, 4) for _ in range(30)])
    return model, torch.optim.Adam(model.parameters(), lr=1e-3), {}


@exhibit("known-broken", "wrong", "weight")
def fused_sgd_that_does_nothing() -> Made:
    """pytorch/pytorch#191763: SGD(fused=True) leaves out whole vectors of 16-bit CPU tensors."""
    from fused_l2.doctor.codes import speed

    if not speed._fused_sgd_skips(torch.bfloat16):
        pytest.skip(f"torch {torch.__version__} is not broken in this way")
    model = nn.Linear(16, 16, bias=False).bfloat16()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, fused=True), {}


def test_twenty_or_more_reports():
    assert len({p.values[0].program for p in EXHIBITS}) >= 20


@pytest.mark.parametrize("shown", EXHIBITS)
def test_found_and_mended(shown: Exhibit):
    model, optimizer, told = shown.program()
    before = snapshot(optimizer, model)
    report = fused_l2.doctor.examine(optimizer, model, **told)
    assert_unchanged(before, snapshot(optimizer, model))
    found = [f for f in report.of(shown.code) if f.severity == shown.severity]
    assert found, str(report)
    if shown.parameters is not None:
        assert {name for f in found for name in f.parameters} == shown.parameters, str(report)
    place = {"model": model, "optimizer": optimizer, "torch": torch, "fused_l2": fused_l2}
    printed = re.search(r"^    fix: (.*?)^    see: ", str(found[0]), re.DOTALL | re.MULTILINE)
    exec(printed[1], place)
    del optimizer
    again = fused_l2.doctor.examine(place["optimizer"], place["model"], **told)
    left = [f for f in again.of(shown.code) if f.severity == shown.severity]
    assert not left, f"{found[0].fix}\n{again}"
