"""What is measured: sets of parameter shapes, how they are grouped, and the optimizer settings."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    name: str
    what: str
    make_shapes: Callable[[], list[Shape]]
    dtype: torch.dtype = torch.float32
    groups: Callable[[list[Shape]], list[int]] | None = None  # the param group of each tensor, by number
    cold: bool = False  # sets of tensors in turn, so that each step starts with cold caches
    heavy: bool = False  # only measured when asked for by name

    @property
    def shapes(self) -> list[Shape]:
        return self.make_shapes()


def gpt2(width: int = 768, layers: int = 12) -> list[Shape]:
    """Radford et al. 2019; as it stands GPT-2 small, 124M parameters in 148 tensors, and (1600, 48) is GPT-2 XL, 1.56B in 580.

    The output projection is tied to the token embedding.
    """
    vocabulary, context = 50257, 1024
    norm: list[Shape] = [(width,), (width,)]
    block = norm + [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += norm + [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocabulary, width), (context, width)] + layers * block + norm


def resnet50() -> list[Shape]:
    """He et al. 2016, 25.6M parameters in 161 tensors (a batch norm after every convolution)."""

    def conv(c_in: int, c_out: int, kernel: int) -> list[Shape]:
        return [(c_out, c_in, kernel, kernel), (c_out,), (c_out,)]

    shapes, width = conv(3, 64, 7), 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(width, planes, 1) + conv(planes, planes, 3) + conv(planes, 4 * planes, 1)
            if block == 0:
                shapes += conv(width, 4 * planes, 1)
            width = 4 * planes
    return shapes + [(1000, width), (1000,)]


def tiny_1000() -> list[Shape]:
    generator = random.Random(0)
    return [(generator.randint(64, 1024),) for _ in range(1000)]


def vit_b() -> list[Shape]:
    """Dosovitskiy et al. 2021, ViT-B/16: 86.6M parameters in 152 tensors."""
    width, layers = 768, 12
    norm: list[Shape] = [(width,), (width,)]
    block = norm + [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += norm + [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    stem: list[Shape] = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return stem + layers * block + norm + [(1000, width), (1000,)]


def layer_decay_groups(shapes: list[Shape]) -> list[int]:
    """ViT-B's groups under layer-wise lr decay: (stem, 12 blocks, head) x (decayed, not decayed), 28 in all."""
    layers = [0] * 4 + [1 + i // 12 for i in range(144)] + [13] * 4
    return [2 * layer + (len(shape) == 1) for layer, shape in zip(layers, shapes, strict=True)]


def llama_7b(layers: int = 32) -> list[Shape]:
    """Touvron et al. 2023: 6.74B parameters in 291 tensors with 32 layers; with fewer, what fits a device."""
    width, hidden, vocabulary = 4096, 11008, 32000
    block: list[Shape] = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)] + [(width,)] * 2
    return [(vocabulary, width)] + layers * block + [(width,), (vocabulary, width)]


def llama_7b_that_fits() -> list[Shape]:
    """As many layers as fit: 32 bytes a parameter (parameter, gradient, two states, and as much while providers are set up) in
    two thirds of the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 16 << 30
    layers = 32
    while layers > 1 and 32 * sum(map(math.prod, llama_7b(layers))) > memory * 2 / 3:
        layers -= 1
    return llama_7b(layers)


def lora_llama_7b(rank: int = 8) -> list[Shape]:
    """Hu et al. 2021: adapters A and B on the query and value projections of Llama-7B, 4.2M in 128 tensors."""
    return [(rank, 4096), (4096, rank)] * 2 * 32


def small_transformer_465() -> list[Shape]:
    """465 tensors of a detector's transformer, 384 wide, about 90M parameters, as a trainer that makes one param group per
    tensor has them."""
    cycle: list[Shape] = [(384,), (384,), (1152, 384), (1152,), (384, 384), (384,), (1536, 384), (1536,), (384, 1536), (384,)]
    return list(itertools.islice(itertools.cycle(cycle), 465))


CASES = [
    Case("one-25m", "one tensor of 25M", lambda: [(25 << 20,)]),
    Case("gpt2-small", "GPT-2 small, 124M in 148 tensors", gpt2),
    Case("resnet50", "ResNet-50, 25.6M in 161 tensors", resnet50),
    Case("tiny-1000", "1000 tensors of 64 to 1024", tiny_1000),
    Case("mlp-40", "1.0M in 40 tensors", lambda: [(25_000,)] * 40),
    Case("one-64k", "one tensor of 64K", lambda: [(64 << 10,)]),
    Case("one-1m", "one tensor of 1M", lambda: [(1 << 20,)]),
    Case("one-25m-bf16", "one bfloat16 tensor of 25M", lambda: [(25 << 20,)], torch.bfloat16),
    Case("vit-28-groups", "ViT-B, 86.6M in 28 layer-decay groups", vit_b, groups=layer_decay_groups),
    Case("lora", "LoRA adapters on Llama-7B, 4.2M in 128 tensors", lora_llama_7b),
    Case("gpt2-xl", "GPT-2 XL, 1.56B in 580 tensors", lambda: gpt2(1600, 48), heavy=True),
    Case("llama-7b-part", "Llama-7B, with the layers that fit the memory", llama_7b_that_fits, heavy=True),
]

# The small ones again, with sets of tensors in turn that together are four times the last-level cache.
COLD = [
    dataclasses.replace(case, name=f"{case.name}-cold", what=f"{case.what}, cold caches", cold=True)
    for case in CASES
    if case.name in ("tiny-1000", "one-64k", "one-1m")
]

# On a GPU. The two Llamas: as much as leaves room for torch foreach's temporaries on a device of 80 GB or more.
GPU_CASES = [
    Case("one-1b", "one tensor of 1e9", lambda: [(10**9,)]),
    Case("llama-7b-8-layers", "Llama-7B with 8 of 32 layers, 1.88B in 75 tensors", lambda: llama_7b(8)),
    Case("gpt2-small", "GPT-2 small, 124M in 148 tensors", gpt2),
    Case("resnet50", "ResNet-50, 25.6M in 161 tensors", resnet50),
    Case("vit-28-groups", "ViT-B, 86.6M in 28 layer-decay groups", vit_b, groups=layer_decay_groups),
    Case("465-groups", "465 groups of one tensor", small_transformer_465, groups=lambda shapes: list(range(len(shapes)))),
    Case("tiny-1000", "1000 tensors of 64 to 1024", tiny_1000),
    Case("one-100m-bf16", "one bfloat16 tensor of 1e8", lambda: [(10**8,)], torch.bfloat16),
]

# lr is small so that thousands of steps on one gradient move the weights little; no figure depends on it.
OPTIMIZERS = {
    "AdamW": {"lr": 1e-6, "weight_decay": 1e-2},
    "SGD": {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4},
}
STREAMS = {"AdamW": (4, 3), "SGD": (3, 2)}  # tensors read and written per parameter
