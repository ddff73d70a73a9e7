"""Weights whose scale a normalization layer removes: there, decay is a learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.optimizer import Optimizer

from .. import _html
from ..engines import sums_of_squares

_HEADER = ("weight", "feeds", "|w|", "lr", "weight_decay", "lr/|w|^2")


@dataclass(frozen=True)
class NormalizedWeight:
    """A decayed weight that feeds a normalization layer. ``effective_lr`` is ``lr / |w|^2``."""

    name: str
    normalization: str
    norm: float
    lr: float
    weight_decay: float

    @property
    def effective_lr(self) -> float:
        return self.lr / self.norm**2 if self.norm > 0 else math.inf


class NormalizedWeights(list[NormalizedWeight]):
    """What :func:`normalized_weights` returns: a list that shows itself as a table."""

    def __repr__(self) -> str:
        if not self:
            return "no decayed weight feeds a normalization layer"
        rows = [_HEADER, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def _repr_html_(self) -> str:
        return _html.table(_HEADER, self._rows()) if self else f"<p>{self}</p>"

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (w.name, w.normalization, f"{w.norm:.4g}", f"{w.lr:.4g}", f"{w.weight_decay:.4g}", f"{w.effective_lr:.4g}")
            for w in self
        ]


@torch.no_grad()
def normalized_weights(
    model: nn.Module, optimizer: Optimizer, example_inputs: tuple[Any, ...] | None = None
) -> NormalizedWeights:
    """The decayed weights of linear and convolution layers whose output goes straight into a normalization layer.

    Listed are the weights whose scale the normalization removes: all uses of the weight must feed such a layer, and a bias is
    allowed only before batch and instance norms, which subtract it. The function then does not depend on the weight's scale:
    f(c * w) = f(w) for c > 0. The gradient is orthogonal to w and proportional to ``1 / |w|``, so a step turns w by an angle
    that depends on ``lr / |w|^2``. Decaying w does not regularize the function: it keeps ``|w|`` small and thereby the
    *effective learning rate* ``lr / |w|^2`` large
    (van Laarhoven 2017, "L2 Regularization versus Batch and Weight Normalization").

    Args:
        model: traced with ``torch.fx``, or run once on ``example_inputs`` where that is given.
        optimizer: tells the learning rate and the weight decay of each weight.
        example_inputs: positional arguments for ``model``. For models that torch.fx cannot trace. The run happens in eval
            mode and without gradients; a use of the layer's output besides the normalization is then not noticed.

    Raises:
        TypeError: if ``model`` is no module, or ``optimizer`` no optimizer.
        ValueError: if torch.fx cannot trace the model and there are no ``example_inputs``.
    """
    if not isinstance(model, nn.Module) or not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"normalized_weights needs a model and its optimizer, got {type(model).__name__} and {type(optimizer).__name__}"
        )
    feeds = _run(model, example_inputs) if example_inputs is not None else _trace(model)
    settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for param in module.parameters(recurse=False):
            users.setdefault(id(param), []).append(name)
    found = NormalizedWeights()
    for layer, normalization in feeds.items():
        module = model.get_submodule(layer)
        weight = getattr(module, "weight", None)
        group = settings.get(id(weight))
        if not isinstance(weight, Tensor) or group is None or float(group["weight_decay"]) == 0:
            continue
        if not all(_removes_scale(model, user, feeds) for user in users[id(weight)]):
            continue
        norm = math.sqrt(sums_of_squares([weight.detach()])[0])
        name = f"{layer}.weight"
        found.append(NormalizedWeight(name, normalization, norm, float(group["lr"]), float(group["weight_decay"])))
    return found


def _removes_scale(model: nn.Module, layer: str, feeds: dict[str, str]) -> bool:
    """Whether what follows this layer does not depend on the scale of its weight."""
    if layer not in feeds:
        return False
    has_bias = getattr(model.get_submodule(layer), "bias", None) is not None
    return not has_bias or isinstance(model.get_submodule(feeds[layer]), _SUBTRACTS_BIAS)


_SUBTRACTS_BIAS = (_NormBase,)  # batch and instance norms: a statistic per channel, and the bias is one per channel
_NORMALIZES = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _is_norm(module: nn.Module) -> bool:
    kind = type(module).__name__
    return isinstance(module, _NORMALIZES) or kind.endswith(("LayerNorm", "RMSNorm", "GroupNorm"))


def _trace(model: nn.Module) -> dict[str, str]:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return _is_norm(module) or super().is_leaf_module(module, name)

    try:
        graph = Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"torch.fx cannot trace this model ({error}). Pass example_inputs=(x, ...): the model is then run once instead."
        ) from error
    modules = dict(model.named_modules())
    feeds: dict[str, str] = {}
    elsewhere = set()
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], _LAYERS):
            continue
        users = list(node.users)
        if len(users) == 1 and users[0].op == "call_module" and _is_norm(modules[users[0].target]):
            feeds[str(node.target)] = str(users[0].target)
        else:
            elsewhere.add(str(node.target))
    return {layer: norm for layer, norm in feeds.items() if layer not in elsewhere}


def _run(model: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, str]:
    made: dict[int, tuple[Tensor, str]] = {}  # holds the outputs, so that no id is used twice
    feeds: dict[str, str] = {}

    def made_by(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            made[id(output)] = (output, name)

        return hook

    def taken_by(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and id(inputs[0]) in made:
                feeds[made[id(inputs[0])][1]] = name

        return hook

    hooks = []
    was_training = {m: m.training for m in model.modules()}
    try:
        for name, module in model.named_modules():
            if isinstance(module, _LAYERS):
                hooks.append(module.register_forward_hook(made_by(name)))
            elif _is_norm(module):
                hooks.append(module.register_forward_pre_hook(taken_by(name)))
        model.eval()
        model(*example_inputs)
    finally:
        for handle in hooks:
            handle.remove()
        for module, training in was_training.items():
            module.training = training
    return feeds
