"""Every refusal of a step: what is wrong with which tensor, and what to do. Nothing is changed here.

``name`` gives the parameter's name for messages; it is only asked for when there is something to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor

from ..tables.modes import CODES, EIGHT_BIT, EIGHT_BIT_NAMES, HALVES, STATE_NAMES, Mode
from ..tables.tensor_table import DTYPES
from .memory import has_memory, is_expanded, why_unreadable
from .shards import is_dtensor, local, why_refused

Name = Callable[[], str]

KNOWN = ("step", "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def given(params: Any) -> Any:
    """What an optimizer's constructor was given as parameters. What a slip of the pen made of it is refused, and named."""
    kind = type(params).__name__
    if isinstance(params, torch.nn.Module):
        raise TypeError(f"params is a module ({kind}). Pass its parameters: model.parameters()")
    if callable(params) and not hasattr(params, "__iter__"):
        raise TypeError(f"params is a {kind}. Call it: model.parameters()")
    if isinstance(params, Mapping) and any(isinstance(key, str) for key in params):
        raise TypeError(
            f"params is of type {kind}. Pass model.parameters(), or a list of param groups: [{{'params': ..., 'lr': ...}}]"
        )
    if isinstance(params, (str, bytes)) or not (hasattr(params, "__iter__") or hasattr(params, "__getitem__")):
        raise TypeError(f"params must be parameters, named parameters or param groups, got {params!r}. Pass model.parameters()")
    if isinstance(params, Iterator):
        params = list(params)
    if isinstance(params, Sized) and not isinstance(params, Tensor) and len(params) == 0:
        raise ValueError(
            "optimizer got an empty parameter list. The model has no parameters, none that requires a gradient, or "
            "model.parameters() was used up by a loop before: call it again."
        )
    return params


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(group: Mapping[str, Any], group_index: int, position: int) -> str:
    """How error messages call a parameter: its name if the group knows it, its place, shape and dtype."""
    param: Tensor = group["params"][position]
    names = group.get("param_names") or ()
    name = f" {names[position]!r}" if position < len(names) else ""
    return f"parameter {position} of group {group_index}{name} (shape {tuple(param.shape)}, {dtype_name(param.dtype)})"


def check_param(param: Any, name: Name) -> None:
    if param.dtype not in DTYPES:
        known = ", ".join(dtype_name(d) for d in DTYPES)
        raise RuntimeError(
            f"{name()}: fused_l2 steps parameters of dtype {known}. Convert this one, or step it with torch.optim."
        )
    if is_expanded(param):
        raise RuntimeError(
            f"{name()}: it is an expanded tensor, whose elements share memory. Optimize the tensor it was made from."
        )
    if param.is_inference():  # torch counts no changes of it, in that mode or outside
        raise RuntimeError(
            f"{name()}: it was made in inference mode, and fused_l2 steps no such tensor. Clone it outside of that mode."
        )
    if is_dtensor(param) and any(placement.is_partial() for placement in param.placements):
        raise RuntimeError(
            f"{name()}: its placements are {param.placements}, so that every process holds a summand of it. Redistribute it to "
            f"Shard and Replicate, and make the optimizer of that."
        )
    if not has_memory(local(param)):
        raise RuntimeError(
            f"{name()}: its storage holds fewer elements than its shape says, as after untyped_storage().resize_(0). "
            f"Restore the storage before step()."
        )


def check_grad(param: Tensor, grad: Tensor, local_grad: Callable[[], Tensor], name: Name) -> None:
    """Refuse a gradient that cannot be applied. ``local_grad`` gives the part of it that belongs to this process."""
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{name()}: fused_l2 does not support sparse gradients (layout {grad.layout}). Use nn.Embedding(sparse=False), "
            f"or give this parameter to torch.optim.SparseAdam or torch.optim.SGD."
        )
    if grad.shape != param.shape:
        raise RuntimeError(
            f"{name()}: its gradient has shape {tuple(grad.shape)}. Gradients must have the parameter's shape: was the "
            f"parameter or its gradient replaced through .data since backward()?"
        )
    if grad.device != param.device:
        raise RuntimeError(
            f"{name()}: it is on {param.device}, its gradient on {grad.device}. Move the model before backward(), or set "
            f"its gradients to None."
        )
    if reason := why_refused(grad, param):
        raise RuntimeError(f"{name()}: its gradient cannot be applied to it: {reason}. Distribute both in the same way.")
    if not may_be_mixed(grad.dtype, param.dtype):
        raise RuntimeError(
            f"{name()}: its gradient has dtype {dtype_name(grad.dtype)}. Convert the gradient to the parameter's dtype before "
            f"step()."
        )
    if reason := why_unreadable(grad, param):
        raise RuntimeError(f"{name()}: its gradient cannot be applied to it: {reason}. Set the gradient to None.")
    if not grad._is_zerotensor() and not has_memory(local_grad()):
        raise RuntimeError(
            f"{name()}: its gradient's storage holds fewer elements than its shape says. Set the gradient to None or restore "
            f"it."
        )


def may_be_mixed(grad: torch.dtype, param: torch.dtype) -> bool:
    """The dtypes that are computed with in float32 may be mixed."""
    return grad is param or {grad, param} <= {torch.float32, *HALVES}


def check_state(
    param: Any,
    key: str,
    value: Any,
    name: Name,
    dtype: torch.dtype | None = None,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Refuse a state tensor that does not belong to its parameter. ``shape``: None for the parameter's."""

    def remedy() -> str:
        return f"Load a checkpoint of this model, or delete the entry: optimizer.state[param].pop({key!r})."

    if not isinstance(value, Tensor):
        raise RuntimeError(f"{name()}: its state {key!r} is {value!r}, not a tensor. {remedy()}")
    if value.shape != (param.shape if shape is None else shape):
        expected = "" if shape is None else f", not {tuple(shape)}: a scale for each 32 elements"
        raise RuntimeError(f"{name()}: its state {key!r} has shape {tuple(value.shape)}{expected}. {remedy()}")
    if value.layout is not torch.strided:
        raise RuntimeError(f"{name()}: its state {key!r} is sparse (layout {value.layout}). {remedy()}")
    if reason := why_unreadable(value, param):
        raise RuntimeError(f"{name()}: its state {key!r} cannot be used: {reason}. {remedy()}")
    if value._is_zerotensor():
        raise RuntimeError(f"{name()}: its state {key!r} is a tensor of zeros without memory. Set a clone of it.")
    if value.is_inference():
        raise RuntimeError(
            f"{name()}: its state {key!r} was made in inference mode, and torch allows no change of it. Clone it outside of "
            f"that mode, or delete the entry: optimizer.state[param].pop({key!r})."
        )
    if value.device != param.device:
        raise RuntimeError(
            f"{name()}: it is on {param.device}, its state {key!r} on {value.device}. Move the state to the parameter's "
            f"device, as optimizer.load_state_dict does."
        )
    if not is_state_dtype(value.dtype, param.dtype, dtype):
        how = remedy()
        if dtype is None and value.is_floating_point() and param.dtype is torch.float64:  # the model was converted
            how = "Bring the states along: optimizer.load_state_dict(optimizer.state_dict())."
        raise RuntimeError(f"{name()}: its state {key!r} has dtype {dtype_name(value.dtype)}. {how}")
    if reason := why_refused(value, param):
        raise RuntimeError(
            f"{name()}: its state {key!r} cannot be used: {reason}. Load states with set_optimizer_state_dict of "
            f"torch.distributed.checkpoint.state_dict, which shards them as the parameters are."
        )
    if not has_memory(local(value)):
        raise RuntimeError(f"{name()}: the storage of its state {key!r} was freed. Restore it before step().")


def is_state_dtype(dtype: torch.dtype, param: torch.dtype, only: torch.dtype | None = None) -> bool:
    if only is not None:
        return dtype is only
    return dtype in DTYPES and (dtype is torch.float64) == (param is torch.float64)


def why_not_whole(state: Mapping[str, Any], missing: list[str], name: Name) -> str:
    """What is wrong with a state that was made, but lacks some of its entries, or is another optimizer's: to start those at
    zero beside the others would make the first updates hundreds of times too large. Empty if nothing is."""
    if not missing:
        return ""
    found = [key for key in (*KNOWN, *EIGHT_BIT_NAMES) if state.get(key) is not None]
    known = (*KNOWN, *EIGHT_BIT_NAMES, *STATE_NAMES)
    foreign = [key for key, value in state.items() if key not in known and isinstance(value, Tensor) and value.dim()]
    if not found and not foreign:
        return ""
    return f"{name()}: its state has {', '.join(map(repr, [*found, *foreign]))}, but no {missing[0]!r}"


def check_counter(value: Tensor, name: Name) -> None:
    if not has_memory(value):
        raise RuntimeError(f"{name()}: the storage of its state 'step' was freed. Restore it before step().")
    count = float(value)
    if not is_count(count):
        raise RuntimeError(f"{name()}: its state 'step' is {count:g}. Set it to the number of steps made.")


def is_count(steps: float) -> bool:
    """Whether this many steps can have been made."""
    return 0 <= steps < math.inf


def refuse_counter(value: Any, name: Name) -> RuntimeError:
    return RuntimeError(f"{name()}: its state 'step' is {value!r}, not a number.")


def check_mode(param: Tensor, mode: Mode, state: Mapping[str, Any], name: Name) -> None:
    """Refuse a low-precision mode that this parameter cannot have, or the traces of another one."""
    if mode in (Mode.REMAINDER, Mode.REMAINDER8) and param.dtype is not torch.bfloat16:
        whole, bits = ("float32", 16) if mode is Mode.REMAINDER else ("24 bits of float32", 8)
        raise RuntimeError(
            f"{name()}: low_precision={mode.name.lower()!r} completes bfloat16 to {whole}, which {bits} bits beside "
            f"{dtype_name(param.dtype)} cannot. Use low_precision='master'."
        )
    for other in STATE_NAMES:
        if other != mode.state_name and other in state:
            of = next(m for m in Mode if m.state_name == other).name.lower()
            if param.dtype not in HALVES:
                raise RuntimeError(
                    f"{name()}: its state holds {other!r}, which low_precision={of!r} has kept of a 16-bit parameter, and this "
                    f"one is {dtype_name(param.dtype)} now. Set optimizer.low_precision = {of!r} again: what is kept goes into "
                    f"the weights of such parameters."
                )
            raise RuntimeError(
                f"{name()}: its state holds {other!r}, which low_precision={of!r} has kept, and this optimizer has "
                f"low_precision={mode.name.lower()!r}. To change over, make it with the former and set "
                f"optimizer.low_precision; to give up what is kept, delete the entry: optimizer.state[param].pop({other!r})."
            )


def check_format(param: Tensor, has_codes: bool, state_dtype: Any, state: Mapping[str, Any], name: Name) -> None:
    """Refuse moments and momentum in another format than this parameter's: 8-bit codes, or not."""
    if has_codes:
        for key in CODES:
            if state.get(key) is not None:
                raise RuntimeError(
                    f"{name()}: its state holds {key!r}, and this optimizer has state_dtype='8bit'. Set such states with "
                    f"optimizer.load_state_dict, which rounds them to 8 bits; to start anew: optimizer.state[param].clear()."
                )
        return
    for key in EIGHT_BIT_NAMES:
        if state.get(key) is not None:
            reason = f"this optimizer has state_dtype={state_dtype}"
            if state_dtype == EIGHT_BIT:
                reason = "this parameter's states are float32 in its shape, layout and placements"
            raise RuntimeError(
                f"{name()}: its state holds {key!r}, which state_dtype='8bit' has kept, and {reason}. Load what "
                f"float32_state_dict() of that optimizer returns."
            )


def refuse_order(key: str, name: Name) -> RuntimeError:
    return RuntimeError(
        f"{name()}: its state {key!r} lies in memory in another order than the parameter, and its scales are those of elements "
        f"that lie in a row. Bring the parameter to the memory format that it had, or load float32_state_dict()."
    )
