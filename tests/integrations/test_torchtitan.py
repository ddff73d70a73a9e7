"""What torchtitan asks of an optimizer, without torchtitan: its container makes one optimizer per model part from a class and
keyword arguments, is itself an Optimizer, and saves through torch.distributed.checkpoint with flattened states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from comparing import assert_same_bits
from integrations.training import OPTIONS, batches, check, each, groups_of, make_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

import fused_l2

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Container(Optimizer):
    """Several optimizers that look like one to schedulers, and like one stateful object to checkpoints."""

    def __init__(self, parts: list[nn.Module], cls: Any, name: str) -> None:
        self.parts = parts
        self.optimizers = [cls(groups_of(part, name), **OPTIONS[name]) for part in parts]
        params = [p for part in parts for p in part.parameters()]
        super().__init__(params, OPTIONS[name])  # initializes hooks; its own groups are never stepped

    def __iter__(self) -> Iterator[Any]:
        return iter(self.optimizers)

    def step(self, *args: Any, **kwargs: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.step(*args, **kwargs)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            found |= get_optimizer_state_dict(part, optimizer, options=FLAT)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, state_dict, options=FLAT)


def make_parts() -> list[nn.Module]:
    """Two stages of one model, with names of their own, as pipeline stages have."""
    layers = make_model()
    first, second = nn.ModuleDict({"first": layers[:2]}), nn.ModuleDict({"second": layers[2:]})
    return [first, second]


def run(parts: list[nn.Module], container: Container, steps: range) -> None:
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in container]
    for x, y in [batches(8)[i] for i in steps]:
        container.zero_grad()
        nn.functional.mse_loss(parts[1]["second"](parts[0]["first"](x)), y).backward()
        torch.nn.utils.clip_grad_norm_([p for part in parts for p in part.parameters()], 0.5)
        container.step()
        for scheduler in schedulers:
            scheduler.step()


@each
def test_the_container_trains(name: str, exact_sqrt: None) -> None:
    def train(cls: Any) -> list[Tensor]:
        parts = make_parts()
        run(parts, Container(parts, cls, name), range(8))
        return [p for part in parts for p in part.parameters()]

    check(train, name)


@each
def test_flat_states_are_torchs_and_resume(name: str, tmp_path: Path) -> None:
    parts, again, their_parts = make_parts(), make_parts(), make_parts()
    container, loaded = (Container(p, getattr(fused_l2, name), name) for p in (parts, again))
    their_container = Container(their_parts, getattr(torch.optim, name), name)
    for p, c in ((parts, container), (their_parts, their_container)):
        run(p, c, range(4))
    assert container.state_dict().keys() == their_container.state_dict().keys()

    dcp.save({"optimizer": container}, checkpoint_id=tmp_path / "step-4")
    dcp.load({"optimizer": loaded}, checkpoint_id=tmp_path / "step-4")
    for part, other in zip(parts, again, strict=True):
        other.load_state_dict(part.state_dict())
    for optimizer in (container, loaded):
        for inner in optimizer:
            for group in inner.param_groups:
                group.pop("initial_lr", None)
    for p, c in ((parts, container), (again, loaded)):
        run(p, c, range(4, 8))
    for part, other in zip(parts, again, strict=True):
        assert_same_bits(list(part.parameters()), list(other.parameters()))
