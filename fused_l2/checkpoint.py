"""The float32 weights of a model whose parameters have 16 bits, to write them to a file and to read them from one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .optimizer import FusedOptimizer, check_is_ours


def master_state_dict(model: nn.Module, optimizer: FusedOptimizer) -> dict[str, Tensor]:
    """``model.state_dict()`` with the float32 value of every parameter that the optimizer steps.

    Of 16-bit parameters that is what ``low_precision`` keeps: all of it with ``"master"`` and ``"remainder"``, 24 bits with
    ``"remainder8"``, the sum with the compensation with ``"kahan"``, and the 16-bit value itself with ``"round"`` and
    ``"stochastic"``. Everything else is as in ``model.state_dict()``. Tensors are contiguous
    and share no memory, as ``safetensors.torch.save_file`` wants them; DTensors stay DTensors.

    Args:
        model: the module whose names the dict has.
        optimizer: one of fused_l2, which steps the model's parameters.

    Raises:
        TypeError: if it is not an optimizer of fused_l2.
    """
    names = _names(model, optimizer)
    found = {}
    for name, value in model.state_dict().items():
        found[name] = value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
    for param, weights in zip(_params(optimizer), optimizer.master_params(), strict=True):
        for i, name in enumerate(names.get(param, ())):
            if name in found:
                found[name] = weights.contiguous() if i == 0 else weights.clone(memory_format=torch.contiguous_format)
    return found


def load_master_state_dict(model: nn.Module, optimizer: FusedOptimizer, state_dict: Mapping[str, Tensor]) -> None:
    """Set a model's weights, and what ``low_precision`` keeps beside them, to a state dict of float32 ones: the inverse of
    :func:`master_state_dict`.

    Args:
        model: the module whose weights are set.
        optimizer: one of fused_l2, which steps the model's parameters.
        state_dict: tensors by the names of ``model.state_dict()``, all of them and no others.

    Raises:
        TypeError: if it is not an optimizer of fused_l2, or the state dict no dict.
        RuntimeError: from ``model.load_state_dict``, if names or shapes are not the model's; nothing has changed then.
    """
    names = _names(model, optimizer)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"load_master_state_dict needs a dict of names and tensors, got {type(state_dict).__name__}")
    own = model.state_dict()
    if missing := sorted(set(own) ^ set(state_dict)):
        raise RuntimeError(
            f"load_master_state_dict: {missing[0]!r} (and {len(missing) - 1} others) is in only one of the model and the state "
            f"dict. Load a state dict of this model."
        )
    for name, value in own.items():
        if not isinstance(value, Tensor):
            continue
        given = state_dict[name]
        if not isinstance(given, Tensor):
            raise RuntimeError(f"load_master_state_dict: {name!r} is {given!r:.80}, not a tensor")
        if value.shape != given.shape:
            raise RuntimeError(
                f"load_master_state_dict: {name!r} has shape {tuple(given.shape)}, in the model {tuple(value.shape)}"
            )
        if given.is_meta and not value.is_meta:
            raise RuntimeError(f"load_master_state_dict: {name!r} is on the meta device, and has no values")
    weights = [state_dict[names[p][0]] if p in names and names[p][0] in own else p.detach() for p in _params(optimizer)]
    optimizer._check_weights(weights)
    model.load_state_dict(state_dict)
    optimizer.load_master_params(weights)


def _params(optimizer: FusedOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _names(model: nn.Module, optimizer: FusedOptimizer) -> dict[Tensor, list[str]]:
    """All names of each parameter: tied ones have several."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    check_is_ours(optimizer, "a function of master weights")
    found: dict[Tensor, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        found.setdefault(param, []).append(name)
    return found
