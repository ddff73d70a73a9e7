"""Param groups and optimizers as well-known projects make them, on small models with the parts and names of theirs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from doctor.examining import Gpt


class BasicBlock(nn.Module):
    """torchvision's."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = BasicBlock(8, 8)
        self.layer2 = BasicBlock(8, 16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v)


class Layer(nn.Module):
    """A block of a vision transformer, with layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ls1 = nn.Parameter(1e-4 * torch.ones(width))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1 * self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """timm's names, and what it says of itself."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, stride=4)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 5, width))
        self.blocks = nn.ModuleList([Layer(width) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "dist_token"}

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Recipe:
    """A model, its optimizers, a batch, and the questions that an expert would ask."""

    def __init__(self, model: nn.Module, optimizers: Any, inputs: Tensor, asked: set[str], **told: Any) -> None:
        self.model, self.inputs, self.asked, self.told = model, inputs, asked, told
        self.optimizers = optimizers if isinstance(optimizers, list) else [optimizers]


IMAGES, TOKENS = torch.randn(2, 3, 8, 8), torch.arange(16).view(2, 8)
ALL_DECAYED = {"decayed-bias", "decayed-norm"}
DECAYED_NORMS = {"decayed-norm"}


def pytorch_examples_imagenet() -> Recipe:
    """pytorch/examples, imagenet/main.py."""
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
    assert scheduler.get_last_lr() == [0.1]
    return Recipe(model, optimizer, IMAGES, ALL_DECAYED, n=1_281_167, batch_size=256, steps=450_000)


def torchvision_reference_resnet() -> Recipe:
    """pytorch/vision, references/classification with --norm-weight-decay 0.0 --bias-weight-decay unset, nesterov, ema."""
    model = ResNet()
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)]
    other = [p for m in model.modules() if not isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)]
    groups = [{"params": other, "weight_decay": 2e-5}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.9, weight_decay=2e-5, nesterov=True)
    return Recipe(model, optimizer, IMAGES, {"decayed-bias"}, n=1_281_167, batch_size=1024, steps=750_600)


def torchvision_reference_vit() -> Recipe:
    """pytorch/vision, ViT-B/16: AdamW, --transformer-embedding-decay 0, --norm-weight-decay 0, --bias-weight-decay 0."""
    model = ViT()
    keys = {"cls_token": 0.0, "pos_embed": 0.0, "bias": 0.0, "norm": 0.0, "ls1": 0.0}
    groups: dict[str, list[Any]] = {"other": [], **{key: [] for key in keys}}
    for name, p in model.named_parameters():
        groups[next((key for key in keys if key in name), "other")].append(p)
    made = [{"params": ps, "weight_decay": keys.get(key, 0.3)} for key, ps in groups.items() if ps]
    return Recipe(model, torch.optim.AdamW(made, lr=3e-3, weight_decay=0.3), IMAGES, set(), n=1_281_167, batch_size=4096)


def kuangliu_cifar() -> Recipe:
    """kuangliu/pytorch-cifar, main.py."""
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
    return Recipe(model, optimizer, IMAGES, ALL_DECAYED, n=50_000, batch_size=128, steps=78_200)


def pytorch_examples_mnist() -> Recipe:
    """pytorch/examples, mnist/main.py."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    return Recipe(model, optimizer, IMAGES, set(), n=60_000, batch_size=64)


def nanogpt() -> Recipe:
    """karpathy/nanoGPT, model.py: configure_optimizers; matrices and embeddings are decayed, the head is tied."""
    model = Gpt(tied=True)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in params.values() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return Recipe(model, torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True), TOKENS, set(), steps=600_000)


def mingpt() -> Recipe:
    """karpathy/minGPT, model.py: by module type; embeddings and norms are left out."""
    model = Gpt()
    decay, no_decay = set(), set()
    for module_name, m in model.named_modules():
        for name, _ in m.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            (decay if name == "weight" and isinstance(m, nn.Linear) else no_decay).add(full)
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[n] for n in sorted(decay)], "weight_decay": 0.1},
        {"params": [named[n] for n in sorted(no_decay)], "weight_decay": 0.0},
    ]
    return Recipe(model, torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95)), TOKENS, set())


def hugging_face_names() -> Recipe:
    """huggingface/transformers, examples without a Trainer (run_glue_no_trainer.py), with the names of BERT."""

    class Bert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word_embeddings = nn.Embedding(32, 16)
            self.dense = nn.Linear(16, 16)
            self.LayerNorm = nn.LayerNorm(16)
            self.classifier = nn.Linear(16, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.word_embeddings(tokens)
            return self.classifier(self.LayerNorm(self.dense(x) + x))

    model = Bert()
    no_decay = ["bias", "LayerNorm.weight"]
    groups = [
        {"params": [p for n, p in model.named_parameters() if not any(nd in n for nd in no_decay)], "weight_decay": 0.01},
        {"params": [p for n, p in model.named_parameters() if any(nd in n for nd in no_decay)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100 if step < 100 else 1.0)  # warm-up from 0
    return Recipe(model, optimizer, TOKENS, set(), n=67_349, batch_size=32, steps=6_315)


def detr() -> Recipe:
    """facebookresearch/detr, main.py: another lr for the backbone, whose batch norms are frozen buffers."""
    model = nn.ModuleDict({"backbone": nn.Conv2d(3, 8, 3, bias=False), "transformer": Layer(8), "class_embed": nn.Linear(8, 4)})
    groups = [
        {"params": [p for n, p in model.named_parameters() if "backbone" not in n and p.requires_grad]},
        {"params": [p for n, p in model.named_parameters() if "backbone" in n and p.requires_grad], "lr": 1e-5},
    ]

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            x = model["backbone"](x).flatten(2).mT
            return model["class_embed"](model["transformer"](x))

    whole = Whole()
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4)
    return Recipe(whole, optimizer, IMAGES, ALL_DECAYED, n=118_287, batch_size=64, steps=554_000)


def timm_layer_decay() -> Recipe:
    """huggingface/pytorch-image-models: param_groups_layer_decay of a ViT, written out."""
    model = ViT()
    skip = model.no_weight_decay()
    groups: dict[str, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        no_decay = p.ndim == 1 or name in skip
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else 3 if name.startswith(("norm", "head")) else 0
        made = groups.setdefault(
            f"layer_{layer}_{'no_decay' if no_decay else 'decay'}",
            {"lr_scale": 0.75 ** (3 - layer), "weight_decay": 0.0 if no_decay else 0.05, "params": []},
        )
        made["params"].append(p)
    return Recipe(model, torch.optim.AdamW(list(groups.values()), lr=1e-3), IMAGES, set(), n=1_281_167, batch_size=1024)


def mae_pretraining() -> Recipe:
    """facebookresearch/mae, main_pretrain.py: timm's param_groups_weight_decay, position tables are not trained."""
    model = ViT()
    model.pos_embed.requires_grad_(False)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if p.ndim <= 1 or n.endswith(".bias")], "weight_decay": 0.0},
        {
            "params": [p for n, p in trained if p.ndim > 1 and not n.endswith(".bias") and n != "cls_token"],
            "weight_decay": 0.05,
        },
        {"params": [model.cls_token], "weight_decay": 0.0},
    ]
    return Recipe(model, torch.optim.AdamW(groups, lr=1.5e-4, betas=(0.9, 0.95)), IMAGES, set(), n=1_281_167, batch_size=4096)


def swin() -> Recipe:
    """microsoft/Swin-Transformer, optimizer.py: set_weight_decay with the model's skip lists."""

    class Window(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn(9, 2))
            self.qkv = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.qkv(x) + self.relative_position_bias_table.sum()

    model = nn.Sequential(nn.Embedding(32, 16), nn.LayerNorm(16), Window(), nn.LayerNorm(16), nn.Linear(16, 4))
    keywords = {"relative_position_bias_table"}
    has, no = [], []
    for name, p in model.named_parameters():
        no_decay = len(p.shape) == 1 or name.endswith(".bias") or any(k in name for k in keywords)
        (no if no_decay else has).append(p)
    groups = [{"params": has}, {"params": no, "weight_decay": 0.0}]
    return Recipe(model, torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05), TOKENS, set(), n=1_281_167, batch_size=1024)


def open_clip() -> Recipe:
    """mlfoundations/open_clip, main.py: exclude() by shape and name; a temperature."""

    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = ViT()
            self.logit_scale = nn.Parameter(torch.tensor(2.66))

        def forward(self, x: Tensor) -> Tensor:
            return self.visual(x) * self.logit_scale.exp()

    model = Clip()
    named = list(model.named_parameters())
    exclude = lambda n, p: p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n  # noqa: E731
    tokens = [p for n, p in named if n.endswith(("cls_token", "pos_embed"))]
    held = set(map(id, tokens))
    groups = [
        {"params": [*tokens, *(p for n, p in named if exclude(n, p))], "weight_decay": 0.0},
        {"params": [p for n, p in named if not exclude(n, p) and id(p) not in held], "weight_decay": 0.2},
    ]
    return Recipe(model, torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6), IMAGES, set(), batch_size=32_768)


def yolov5() -> Recipe:
    """ultralytics/yolov5, smart_optimizer: weights with decay, norm weights and biases without."""
    model = ResNet()
    g: tuple[list[Any], list[Any], list[Any]] = [], [], []
    norms = tuple(v for k, v in nn.__dict__.items() if "Norm" in k)
    for v in model.modules():
        for name, p in v.named_parameters(recurse=False):
            if name == "bias":
                g[2].append(p)
            elif name == "weight" and isinstance(v, norms):
                g[1].append(p)
            else:
                g[0].append(p)
    optimizer = torch.optim.SGD(g[2], lr=0.01, momentum=0.937, nesterov=True)
    optimizer.add_param_group({"params": g[0], "weight_decay": 5e-4})
    optimizer.add_param_group({"params": g[1], "weight_decay": 0.0})
    return Recipe(model, optimizer, IMAGES, set(), n=118_287, batch_size=64)


def moco() -> Recipe:
    """facebookresearch/moco: all of model.parameters(), half of which is a momentum encoder without gradients."""

    class Moco(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder_q, self.encoder_k = ResNet(), ResNet()
            self.encoder_k.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder_q(x) * self.encoder_k(x)

    model = Moco()
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    return Recipe(model, optimizer, IMAGES, ALL_DECAYED, n=1_281_167, batch_size=256)


def dcgan() -> Recipe:
    """pytorch/examples, dcgan/main.py: two models, two Adams without decay."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1))
            self.discriminator = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(288, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.discriminator(self.generator(x))

    model = Both()
    optimizers = [
        torch.optim.Adam(part.parameters(), lr=2e-4, betas=(0.5, 0.999)) for part in (model.generator, model.discriminator)
    ]
    return Recipe(model, optimizers, IMAGES, set())


def lora() -> Recipe:
    """microsoft/LoRA, by hand: the model is frozen, pairs of small matrices are trained; all given to AdamW."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(16, 16)
            self.base.requires_grad_(False)
            self.lora_A = nn.Linear(16, 4, bias=False)
            self.lora_B = nn.Linear(4, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.lora_B(self.lora_A(x))

    model = nn.Sequential(nn.Embedding(32, 16).requires_grad_(False), Adapted(), Adapted())
    return Recipe(model, torch.optim.AdamW(model.parameters(), lr=3e-4), TOKENS, set())


def diffusers_unet() -> Recipe:
    """huggingface/diffusers, train_unconditional.py: AdamW on all of model.parameters(), weight_decay 1e-6."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8),
        nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    return Recipe(model, optimizer, IMAGES, ALL_DECAYED, n=8_189, batch_size=16, steps=51_200)


def muon_and_adamw() -> Recipe:
    """KellerJordan/modded-nanogpt: Muon for hidden matrices, Adam for embeddings, head and vectors."""
    model = Gpt()
    hidden = [p for n, p in model.named_parameters() if p.ndim >= 2 and n.startswith("h.")]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or not n.startswith("h.")]
    optimizers = [
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.01),
        torch.optim.Adam(rest, lr=3e-4, betas=(0.8, 0.95), eps=1e-10, fused=True),
    ]
    return Recipe(model, optimizers, TOKENS, set())


def makemore() -> Recipe:
    """karpathy/makemore: AdamW on everything, weight_decay 0.01."""
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01, betas=(0.9, 0.99), eps=1e-8)
    return Recipe(model, optimizer, TOKENS, ALL_DECAYED)


def t5_adafactor() -> Recipe:
    """T5 with Adafactor, no decay; embeddings and head tied."""
    model = Gpt(tied=True)
    return Recipe(model, torch.optim.Adafactor(model.parameters(), lr=1e-3, weight_decay=0.0), TOKENS, set())


def vae() -> Recipe:
    """pytorch/examples, vae/main.py."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.ReLU(), nn.Linear(20, 192))
    return Recipe(model, torch.optim.Adam(model.parameters(), lr=1e-3), IMAGES, set())


def word_language_model() -> Recipe:
    """salesforce/awd-lstm-lm: SGD with weight_decay 1.2e-6 on model and criterion, embeddings tied to the decoder."""

    class Lstm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Embedding(32, 16)
            self.rnn = nn.LSTM(16, 16)
            self.decoder = nn.Linear(16, 32)
            self.decoder.weight = self.encoder.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.decoder(self.rnn(self.encoder(tokens))[0])

    model = Lstm()
    return Recipe(model, torch.optim.SGD(model.parameters(), lr=30, weight_decay=1.2e-6), TOKENS, {"decayed-bias"})


def gaussian_splatting() -> Recipe:
    """graphdeco-inria/gaussian-splatting: tensors of their own in groups with their own lr, the default lr is 0."""

    class Splats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.xyz = nn.Parameter(torch.randn(10, 3))
            self.opacity = nn.Parameter(torch.randn(10, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (self.xyz * self.opacity).sum() * x

    model = Splats()
    groups = [
        {"params": [model.xyz], "lr": 1.6e-4, "name": "xyz"},
        {"params": [model.opacity], "lr": 0.05, "name": "opacity"},
    ]
    return Recipe(model, torch.optim.Adam(groups, lr=0.0, eps=1e-15), IMAGES, set())


def linear_probe() -> Recipe:
    """A frozen backbone, whose head alone is given to SGD, as facebookresearch/moco main_lincls.py."""
    model = ResNet()
    for name, p in model.named_parameters():
        if not name.startswith("fc."):
            p.requires_grad = False
    head = [p for p in model.parameters() if p.requires_grad]
    return Recipe(model, torch.optim.SGD(head, 30.0, momentum=0.9, weight_decay=0.0), IMAGES, set())


def fine_tuning_with_an_average() -> Recipe:
    """torch.optim.swa_utils: the average is a copy of the model that nobody is to step."""
    model = Gpt()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.ndim >= 2], lr=1e-4, weight_decay=0.1)
    optimizer.add_param_group({"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0})
    recipe = Recipe(model, optimizer, TOKENS, set())
    recipe.average = torch.optim.swa_utils.AveragedModel(model)  # type: ignore[attr-defined]
    return recipe


RECIPES = [
    pytorch_examples_imagenet, torchvision_reference_resnet, torchvision_reference_vit, kuangliu_cifar, pytorch_examples_mnist,
    nanogpt, mingpt, hugging_face_names, detr, timm_layer_decay, mae_pretraining, swin, open_clip, yolov5, moco, dcgan, lora,
    diffusers_unet, muon_and_adamw, makemore, t5_adafactor, vae, word_language_model, gaussian_splatting, linear_probe,
    fine_tuning_with_an_average,
]  # fmt: skip
