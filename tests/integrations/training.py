"""What the integrations share: optimizers by class, a model whose param groups differ, and an optimizer that ignores them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from comparing import assert_same_bits
from torch import Tensor, nn

import fused_l2

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2},
    "AdamW": {"lr": 0.05, "weight_decay": 0.5},
}
each = pytest.mark.parametrize("name", OPTIONS)


def theirs(name: str) -> Any:
    """torch.optim's class in its default implementation, which gives our bits with a correctly rounded sqrt."""
    base = getattr(torch.optim, name)

    class Theirs(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "foreach": False})

    return Theirs


def ignoring_groups(name: str) -> Any:
    """Ours, but every param group is stepped with the hyperparameters of the first."""
    base = getattr(fused_l2, name)

    class IgnoresGroups(base):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            own = [dict(group) for group in self.param_groups]
            first = {k: v for k, v in own[0].items() if k not in ("params", "param_names")}
            for group in self.param_groups:
                group.update(first)
            try:
                return super().step(closure)
            finally:
                for group, values in zip(self.param_groups, own, strict=True):
                    group.update(values)

    return IgnoresGroups


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 2))


def groups_of(model: nn.Module, name: str) -> list[dict[str, Any]]:
    """Matrices are decayed; vectors are not, and have another lr."""
    options = OPTIONS[name]
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": options["weight_decay"]},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0, "lr": options["lr"] / 4},
    ]


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 8, generator=generator), torch.randn(4, 2, generator=generator)) for _ in range(count)]


def check(train: Callable[[Any], Sequence[Tensor]], name: str) -> None:
    """Training with ours gives the bits of torch.optim's; with one that ignores param groups it does not."""
    expected = train(theirs(name))
    assert_same_bits(train(getattr(fused_l2, name)), expected)
    with pytest.raises(AssertionError):
        assert_same_bits(train(ignoring_groups(name)), expected)
