"""What the doctor's tests share: models, a training step, and a look that sees whether anything changed."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import Tensor, nn


def block(width: int = 16) -> nn.Module:
    """A transformer's MLP half: a norm and two linear layers."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Gpt(nn.Module):
    """Embeddings, two blocks and a head, with nanoGPT's names."""

    def __init__(self, tied: bool = False, width: int = 16) -> None:
        super().__init__()
        self.wte = nn.Embedding(32, width)
        self.wpe = nn.Embedding(8, width)
        self.h = nn.ModuleList([block(width) for _ in range(2)])
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, 32, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[-1]))
        for layer in self.h:
            x = x + layer(x)
        return self.lm_head(self.ln_f(x))


def backward(model: nn.Module, inputs: Tensor | None = None) -> None:
    model(torch.randint(32, (2, 8)) if inputs is None else inputs).float().square().mean().backward()


def train(model: nn.Module, optimizer: Any, steps: int = 1, inputs: Tensor | None = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, inputs)
        optimizer.step()


def snapshot(optimizer: Any, model: nn.Module | None) -> list[Any]:
    """Everything that an examination could have changed, bits and versions."""
    tensors: list[Tensor] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            tensors += [p, *([p.grad] if p.grad is not None else [])]
            tensors += [v for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor)]
    if model is not None:
        tensors += [*model.parameters(), *model.buffers()]
    seen: list[Any] = [(id(t), t._version, t.data_ptr() if not t.is_meta else 0, t.requires_grad) for t in tensors]
    seen += [t.detach().clone().view(torch.uint8) for t in tensors if t.dim() and not t.is_meta and t.is_contiguous()]
    seen += [copy.deepcopy({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]
    seen += [sorted(map(id, optimizer.state)), {k: v for k, v in vars(optimizer).items() if isinstance(v, (int, str, float))}]
    if model is not None:
        seen += [[(n, m.training, sorted(vars(m))) for n, m in model.named_modules()], [n for n, _ in model.named_parameters()]]
    return [*seen, torch.random.get_rng_state(), random.getstate(), torch.is_grad_enabled()]


def assert_unchanged(before: list[Any], after: list[Any]) -> None:
    assert len(before) == len(after)
    for b, a in zip(before, after, strict=True):
        assert torch.equal(b, a) if isinstance(b, Tensor) else b == a
