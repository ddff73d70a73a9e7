"""What is measured: sets of parameter shapes, and the optimizer settings."""

from __future__ import annotations

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

    @property
    def shapes(self) -> list[Shape]:
        return self.make_shapes()


def gpt2_small() -> list[Shape]:
    """Radford et al. 2019, 124M parameters in 148 tensors; the output projection is tied to the token embedding."""
    width, layers, vocabulary, context = 768, 12, 50257, 1024
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


CASES = [
    Case("one-25m", "one tensor of 25M", lambda: [(25 << 20,)]),
    Case("gpt2-small", "GPT-2 small, 124M in 148 tensors", gpt2_small),
    Case("resnet50", "ResNet-50, 25.6M in 161 tensors", resnet50),
    Case("tiny-1000", "1000 tensors of 64 to 1024", tiny_1000),
    Case("mlp-40", "1.0M in 40 tensors", lambda: [(25_000,)] * 40),
    Case("one-64k", "one tensor of 64K", lambda: [(64 << 10,)]),
    Case("one-1m", "one tensor of 1M", lambda: [(1 << 20,)]),
    Case("one-25m-bf16", "one bfloat16 tensor of 25M", lambda: [(25 << 20,)], torch.bfloat16),
]

# lr is small so that thousands of steps on one gradient move the weights little; no figure depends on it.
OPTIMIZERS = {
    "AdamW": {"lr": 1e-6, "weight_decay": 1e-2},
    "SGD": {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4},
}
STREAMS = {"AdamW": (4, 3), "SGD": (3, 2)}  # tensors read and written per parameter
