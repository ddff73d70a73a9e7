"""timm: its registry of optimizers, layer decay, schedulers that multiply by ``lr_scale``."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from typing import Any, ClassVar

import pytest
import torch
from comparing import assert_same_bits
from integrations.training import OPTIONS, batches, check, each, make_model
from torch import Tensor, nn

import fused_l2


class _Anything(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(types.ModuleType):
    __path__: ClassVar[list[str]] = []
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (nn.Module,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for every module of torchvision, with a class for every name."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_timm() -> tuple[Any, Any]:
    """timm.optim and timm.scheduler. They import timm's models, and those torchvision, of which PyPI has no build that a torch
    without CUDA can load. Where it cannot be loaded, a stand-in takes its place: no model of timm's is used here."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("pip install '.[timm]'", allow_module_level=True)
    finder = _Finder()
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.insert(0, finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import timm.optim
            import timm.scheduler
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
            for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
                del sys.modules[name]
    return timm.optim, timm.scheduler


optim, scheduler = import_timm()


class Layered(nn.Module):
    """What layer decay looks at: which layer a parameter belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = make_model()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"blocks": r"^blocks\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        return {"blocks.0.bias"}

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def make(cls: Any, name: str, model: nn.Module) -> Any:
    info = optim.OptimInfo(
        name=f"tested{cls.__name__.lower()}", opt_class=cls, has_momentum=name == "SGD", has_eps=name != "SGD"
    )
    optim._optim_factory.default_registry.register(info)
    options = {k: v for k, v in OPTIONS[name].items() if k in ("lr", "weight_decay", "momentum")}
    optimizer = optim.create_optimizer_v2(model, opt=info.name, layer_decay=0.5, **options)
    assert type(optimizer) is cls
    return optimizer


def run(model: nn.Module, optimizer: Any, first: int = 0) -> None:
    schedule = scheduler.CosineLRScheduler(optimizer, t_initial=8, warmup_t=2, warmup_lr_init=0.01)
    for step, (x, y) in list(enumerate(batches(8)))[first:]:
        schedule.step(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


@each
def test_layer_decay_and_a_schedule(name: str, exact_sqrt: None) -> None:
    def train(cls: Any) -> list[Tensor]:
        model = Layered()
        optimizer = make(cls, name, model)
        scales = [group["lr_scale"] for group in optimizer.param_groups]
        assert len(set(scales)) > 1
        run(model, optimizer)
        assert [group["lr_scale"] for group in optimizer.param_groups] == scales  # not ours, and still there
        assert len({group["lr"] for group in optimizer.param_groups}) > 1
        return list(model.parameters())

    check(train, name)


@each
def test_state_dicts_keep_lr_scale(name: str) -> None:
    model, other = Layered(), Layered()
    optimizer, loaded = (make(getattr(fused_l2, name), name, m) for m in (model, other))
    run(model, optimizer)
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    assert [g["lr_scale"] for g in loaded.param_groups] == [g["lr_scale"] for g in optimizer.param_groups]
    for m, o in ((model, optimizer), (other, loaded)):
        run(m, o, first=4)
    assert_same_bits(list(model.parameters()), list(other.parameters()))
    assert torch.equal(model.blocks[0].weight, other.blocks[0].weight)
