"""Weights that stand right before a normalization layer, by the order in which modules are registered. Nothing is run.

:func:`fused_l2.weight_decay.normalized_weights` traces the model and proves it. Here a layer counts whose next module in an
``nn.Sequential`` is a norm, or, in other modules, a batch or instance norm of the layer's width, which a residual seldom
comes between.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .subject import Subject, Weight

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def normalized(subject: Subject) -> list[tuple[Weight, str]]:
    """Each such weight with the name of the norm."""
    pairs = dict(_pairs(subject))
    found = []
    for weight in subject.weights:
        if len(weight.uses) == 1 and (norm := pairs.get(id(weight.uses[0][1]))) and weight.name.endswith("weight"):
            found.append((weight, norm))
    return found


def _pairs(subject: Subject) -> Iterator[tuple[int, str]]:
    for _, root in subject.roots:
        for prefix, module in root.named_modules():
            in_order = isinstance(module, nn.Sequential)
            children = [(name, child) for name, child in module._modules.items() if child is not None]
            for (_, layer), (name, norm) in itertools.pairwise(children):
                if isinstance(layer, _LAYERS) and _follows(layer, norm, in_order):
                    yield id(layer), f"{prefix}.{name}" if prefix else name


def _follows(layer: nn.Module, norm: nn.Module, in_order: bool) -> bool:
    width = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
    if isinstance(norm, _NormBase):
        return norm.num_features == width
    # Other norms do not take away a bias of the layer, and with it the scale matters.
    return in_order and isinstance(norm, _NORMS) and getattr(layer, "bias", None) is None
