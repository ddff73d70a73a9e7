"""One parameter of a step: its gradient and state, checked. Nothing is changed here; errors name the tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tables.modes import HALVES, STATE_NAMES, Mode
from ..tables.tensor_table import DTYPES
from .low_precision import LowPrecision, parameter_key, widened
from .shards import LocalGradients, Ranks, first_element, is_dtensor, local, matches, ranks_of, redistributed, why_refused


@dataclass(eq=False)
class Entry:
    """A parameter that has a gradient, with the state its update rule needs.

    ``param`` and the state may be DTensors. What is stepped is the memory of theirs in this process: ``local``, ``grad``,
    ``states`` and ``kept``, plain tensors that are cut up alike. ``ranks``: of the processes that hold parts of the parameter.

    ``state`` is the parameter's entry in ``optimizer.state`` (empty if there is none yet), ``new_state`` what the step adds
    to it or replaces in it once every parameter has passed its checks.
    """

    param: Tensor
    local: Tensor
    ranks: Ranks
    gradients: LocalGradients
    name: str  # in messages
    label: str  # in statistics
    group: int
    flags: int
    state: dict[str, Any]
    new_state: dict[str, Any]
    state_names: tuple[str, ...]
    first_step: bool
    mode: Mode
    key: int  # of the parameter's random bits

    @property
    def grad(self) -> Tensor:
        return self.gradients.of(self.param)

    def get(self, key: str) -> Any:
        return self.new_state.get(key, self.state.get(key))

    @property
    def states(self) -> list[Tensor]:
        return [local(self.get(name)) for name in self.state_names]

    @property
    def kept(self) -> Tensor | None:
        """What is kept beside a 16-bit parameter."""
        name = self.mode.state_name
        return local(self.get(name)) if name else None

    def weights(self) -> Tensor:
        """The parameter's value, in float32 if it is a 16-bit one."""
        return widened(self.mode, self.local.detach(), self.kept)

    @property
    def counter(self) -> Tensor | None:
        counter: Tensor | None = self.get("step")
        return counter

    @property
    def state_dtype(self) -> torch.dtype:
        return self.states[0].dtype if self.state_names else self.param.dtype


def describe(group: dict[str, Any], group_index: int, position: int) -> str:
    """How error messages call a parameter: its name if the group knows it, its place, shape and dtype."""
    param: Tensor = group["params"][position]
    names = group.get("param_names")
    name = f" {names[position]!r}" if names else ""
    return f"parameter {position} of group {group_index}{name} (shape {tuple(param.shape)}, {_name(param.dtype)})"


def make_entry(
    group: dict[str, Any],
    group_index: int,
    position: int,
    flags: int,
    state: dict[str, Any],
    state_names: tuple[str, ...],
    counts_steps: bool,
    on_device: bool,
    low_precision: LowPrecision,
    number: int,
    gradients: LocalGradients,
) -> Entry:
    """Check a parameter that has a gradient, its gradient and its state, and prepare the state it lacks.

    ``number``: which of the optimizer's parameters it is.

    Raises:
        RuntimeError: if the step cannot be made; the message names the parameter, what is wrong and what to do.
    """
    param: Tensor = group["params"][position]
    name = describe(group, group_index, position)
    check_param(param, name)
    check_grad(param, name, gradients)

    new_state: dict[str, Any] = {}
    first_step = False
    mode, wanted = low_precision.mode_of(param), low_precision.state_dtype_of(param)
    for key in state_names:
        value = state.get(key)
        if value is None:
            new_state[key] = torch.zeros_like(param, dtype=wanted or param.dtype, memory_format=torch.preserve_format)
            first_step = True
        else:
            value = _check_state(param, key, value, name)
            if not same_layout(local(value), local(param)) or wanted not in (None, value.dtype):
                value = torch.empty_like(param, dtype=wanted or value.dtype).copy_(value)
            if value is not state[key]:
                new_state[key] = value
    _prepare_kept(param, mode, state, new_state, name)
    if counts_steps or mode.is_random:
        counter = as_counter(state.get("step"), param, on_device, name)
        if "step" in state and type(counter) is Tensor and counter.device.type == "cpu" and math.isnan(float(counter)):
            raise RuntimeError(f"{name}: its state 'step' is NaN. Set it to the number of steps made.")
        if counter is not state.get("step"):
            new_state["step"] = counter
    names = group.get("param_names")
    label = str(names[position]) if names else f"{group_index}.{position}"
    flags |= mode
    random_key = 0
    if mode.is_random:
        random_key = parameter_key(low_precision.seed, number) | (first_element(param) & 0xFFFFFFFF) << 32
    return Entry(
        param,
        local(param),
        ranks_of(param),
        gradients,
        name,
        label,
        group_index,
        flags,
        state,
        new_state,
        state_names,
        first_step,
        mode,
        random_key,
    )


def _prepare_kept(param: Tensor, mode: Mode, state: dict[str, Any], new_state: dict[str, Any], name: str) -> None:
    """Check, or make, what is kept beside a 16-bit parameter."""
    own = mode.state_name
    if mode is Mode.REMAINDER and param.dtype is not torch.bfloat16:
        raise RuntimeError(
            f"{name}: low_precision='remainder' completes bfloat16 to float32, which 16 bits beside {_name(param.dtype)} "
            f"cannot. Use low_precision='master'."
        )
    for other in STATE_NAMES:
        if other != own and other in state:
            of = next(m for m in Mode if m.state_name == other).name.lower()
            raise RuntimeError(
                f"{name}: its state holds {other!r}, which low_precision={of!r} has kept, and this optimizer has "
                f"low_precision={mode.name.lower()!r}. To change over, make it with the former and set "
                f"optimizer.low_precision; to give up what is kept, delete the entry: optimizer.state[param].pop({other!r})."
            )
    if own is None:
        return
    value = state.get(own)
    if value is None:
        if mode is Mode.MASTER:
            new_state[own] = torch.empty_like(param, dtype=torch.float32).copy_(param.detach())
        else:
            new_state[own] = torch.zeros_like(param, dtype=mode.state_dtype, memory_format=torch.preserve_format)
        return
    value = _check_state(param, own, value, name, mode.state_dtype)
    if not same_layout(local(value), local(param)):
        value = torch.empty_like(param, dtype=value.dtype).copy_(value)
    if value is not state[own]:
        new_state[own] = value


def check_param(param: Any, name: str) -> None:
    if param.dtype not in DTYPES:
        known = ", ".join(_name(d) for d in DTYPES)
        raise RuntimeError(
            f"{name}: fused_l2 steps parameters of dtype {known}. Convert this one, or give it to an optimizer of its own."
        )
    if any(n > 1 and s == 0 for n, s in zip(param.shape, param.stride(), strict=True)) and param.layout is torch.strided:
        raise RuntimeError(
            f"{name}: it is an expanded tensor, whose elements share memory. Optimize the tensor it was made from."
        )
    if is_dtensor(param) and any(placement.is_partial() for placement in param.placements):
        raise RuntimeError(
            f"{name}: its placements are {param.placements}, so that every process holds a summand of it. Redistribute it to "
            f"Shard and Replicate, and make the optimizer of that."
        )
    if not has_memory(local(param)):
        raise RuntimeError(
            f"{name}: its storage holds fewer elements than its shape says, as after untyped_storage().resize_(0). "
            f"Restore the storage before step()."
        )


def check_grad(param: Tensor, name: str, gradients: LocalGradients) -> None:
    """Refuse a gradient that cannot be applied."""
    grad = param.grad
    assert grad is not None
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{name}: fused_l2 does not support sparse gradients (layout {grad.layout}). Use nn.Embedding(sparse=False), "
            f"or give this parameter to torch.optim.SparseAdam or torch.optim.SGD."
        )
    if grad.shape != param.shape:
        raise RuntimeError(
            f"{name}: its gradient has shape {tuple(grad.shape)}. Gradients must have the parameter's shape: was the "
            f"parameter or its gradient replaced through .data since backward()?"
        )
    if grad.device != param.device:
        raise RuntimeError(
            f"{name}: it is on {param.device}, its gradient on {grad.device}. Move the model before backward(), or set "
            f"its gradients to None."
        )
    if reason := why_refused(grad, param):
        raise RuntimeError(f"{name}: its gradient cannot be applied to it: {reason}. Distribute both in the same way.")
    # The dtypes that are computed with in float32 may be mixed.
    if grad.dtype != param.dtype and not {grad.dtype, param.dtype} <= {torch.float32, *HALVES}:
        raise RuntimeError(
            f"{name}: its gradient has dtype {_name(grad.dtype)}. Convert the gradient to the parameter's dtype before step()."
        )
    if not grad._is_zerotensor() and not has_memory(gradients.of(param)):
        raise RuntimeError(
            f"{name}: its gradient's storage holds fewer elements than its shape says. Set the gradient to None or restore it."
        )


def _check_state(param: Any, key: str, value: Any, name: str, dtype: torch.dtype | None = None) -> Any:
    """A state tensor, cut up as its parameter."""
    remedy = f"Load a checkpoint of this model, or delete the entry: optimizer.state[param].pop({key!r})."
    if not isinstance(value, Tensor):
        raise RuntimeError(f"{name}: its state {key!r} is {value!r}, not a tensor. {remedy}")
    if value.shape != param.shape:
        raise RuntimeError(f"{name}: its state {key!r} has shape {tuple(value.shape)}. {remedy}")
    if value.device != param.device:
        raise RuntimeError(
            f"{name}: it is on {param.device}, its state {key!r} on {value.device}. Move the state to the parameter's "
            f"device, as optimizer.load_state_dict does."
        )
    known = value.dtype in DTYPES and (value.dtype is torch.float64) == (param.dtype is torch.float64)
    if not (known if dtype is None else value.dtype is dtype):
        raise RuntimeError(f"{name}: its state {key!r} has dtype {_name(value.dtype)}. {remedy}")
    if reason := why_refused(value, param):
        raise RuntimeError(
            f"{name}: its state {key!r} cannot be used: {reason}. Load states with set_optimizer_state_dict of "
            f"torch.distributed.checkpoint.state_dict, which cuts them up as the parameters are."
        )
    if is_dtensor(param) and not matches(value, param):
        return redistributed(value, param)
    if not has_memory(local(value)):
        raise RuntimeError(f"{name}: the storage of its state {key!r} was freed. Restore it before step().")
    return value


def as_counter(value: Any, param: Tensor, on_device: bool, name: str) -> Tensor:
    """A step counter as torch has it: a 0-dim float32 tensor, on the CPU or (capturable, fused) on the parameter's device.

    Checkpoints hold counters of other kinds, too: Python numbers, tensors of shape (1,), 16-bit ones, ones on another
    device. ``value`` itself is returned where it needs no conversion.
    """
    device = param.device if on_device else torch.device("cpu")
    if value is None:
        return torch.tensor(0.0, dtype=torch.float32, device=device)
    if is_dtensor(value):
        value = value.full_tensor()
    if isinstance(value, Tensor) and value.numel() == 1:
        if value.dim() == 0 and value.dtype is torch.float32 and value.device == device and value.layout is torch.strided:
            return value
        return value.detach().reshape(()).to(device=device, dtype=torch.float32, copy=True)
    try:
        return torch.tensor(float(value), dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise RuntimeError(f"{name}: its state 'step' is {value!r}, not a number.") from None


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in the same order. The stride of a dimension of size 1 has no effect."""
    if a.stride() == b.stride():
        return True
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True)) or a.numel() == 0


def needs_copy(param: Tensor, grad: Tensor) -> bool:
    """Whether a gradient's memory, read in order, does not pair up with its parameter's."""
    return grad.is_neg() or not same_layout(grad, param)


def has_memory(tensor: Tensor) -> bool:
    """Whether the storage reaches as far as the shape says."""
    if tensor.numel() == 0 or tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return True
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + last + 1) * tensor.element_size()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
