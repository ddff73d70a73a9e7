"""DTensors: the shard of each that lies in this process.

A step is made on local shards, without DTensor's dispatch, which costs the host tens of microseconds for each operation on each
tensor. That is right only where parameter, gradient and state are sharded alike. A gradient that is not, above all one of which
every process holds a summand (``Partial``), is redistributed first.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor. There are none unless somebody has imported the module, which takes a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """The memory of a tensor in this process: a DTensor's shard, without copying it, and other tensors themselves."""
    return _waited(tensor._local_tensor) if is_dtensor(tensor) else tensor


def _waited(tensor: Any) -> Tensor:
    """What an asynchronous collective leaves is a wrapper around memory that may still be written to."""
    found: Tensor = tensor if type(tensor) is Tensor or not hasattr(tensor, "wait") else tensor.wait()
    return found


def like(dtensor: Any, shard: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
    """This shard as a DTensor that is sharded as another one; of its shape, or of this one and contiguous."""
    kind = type(dtensor)
    size, stride = (dtensor.shape, dtensor.stride()) if shape is None else (torch.Size(shape), (shape[1], 1))
    made: Tensor = kind.from_local(shard, dtensor.device_mesh, dtensor.placements, run_check=False, shape=size, stride=stride)
    return made


def matches(tensor: Any, param: Any) -> bool:
    """Whether two tensors are sharded alike."""
    return _sharded_alike(tensor._spec, param._spec)


def _sharded_alike(a: Any, b: Any) -> bool:
    if a.placements != b.placements or a.mesh != b.mesh:
        return False
    # In torch >= 2.11, several dimensions of a mesh may cut one dimension of a tensor in any order.
    return len(a.placements) == 1 or getattr(a, "shard_order", None) == getattr(b, "shard_order", None)


def redistributed(tensor: Any, param: Any) -> Any:
    """A tensor sharded as the parameter is. Communicates: all ranks have to do it."""
    return tensor.redistribute(param.device_mesh, param.placements)


def why_refused(tensor: Any, param: Any) -> str:
    """Why a gradient or a state cannot be brought to its parameter's placements; or nothing."""
    if is_dtensor(tensor) != is_dtensor(param):
        return "it is a DTensor, and the parameter is not" if is_dtensor(tensor) else "it is no DTensor, as the parameter is"
    if is_dtensor(tensor) and tensor._spec.mesh != param._spec.mesh:
        return f"it is on the mesh {tensor._spec.mesh}, and the parameter on {param._spec.mesh}"
    return ""


def cut_dimensions(param: Any) -> list[int]:
    """The dimensions of a parameter's mesh over which it is sharded; none if this process is not in the mesh."""
    if not is_dtensor(param) or param.device_mesh.get_coordinate() is None:
        return []
    mesh = param.device_mesh
    return [i for i, placement in enumerate(param.placements) if not placement.is_replicate() and mesh.size(i) > 1]


def first_element(param: Any) -> int:
    """The number of a shard's first element, for random bits: in the whole tensor where it is cut along its first dimension
    only, otherwise such that no two shards share numbers. Replicas have the same one."""
    if not cut_dimensions(param):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = param.device_mesh, param.placements
    shape, offset = compute_local_shape_and_global_offset(param.shape, mesh, placements)
    if all(type(p).__name__ in ("Shard", "Replicate") for p in placements) and shape[1:] == param.shape[1:]:
        return int(offset[0] * param.numel() // max(param.shape[0], 1))
    number, pieces = 0, [1] * param.dim()
    for i, placement in enumerate(placements):
        if not placement.is_replicate():
            number = number * mesh.size(i) + mesh.get_local_rank(i)
            pieces[placement.dim] *= mesh.size(i)
    largest = math.prod(-(-n // k) for n, k in zip(param.shape, pieces, strict=True))
    return int(number * largest)


def gradients_of(params: Sequence[Any]) -> list[Any]:
    """The gradients of parameters some of which are DTensors. Looking for a ``__torch_function__`` that DTensors do not have
    would take as long again."""
    with torch._C.DisableTorchFunctionSubclass():
        return [p.grad for p in params]


class LocalGradients:
    """The local shards of gradients. One that is not sharded as its parameter is redistributed, once per step: that is
    communication, which all ranks have to do equally often, whatever becomes of their plans."""

    def __init__(self) -> None:
        self._redistributed: dict[Any, Tensor] = {}

    def of(self, param: Any) -> Tensor:
        """The part of ``param.grad`` that belongs to the parameter's shard."""
        grad = param.grad
        if not is_dtensor(grad):
            return grad  # type: ignore[no-any-return]
        if matches(grad, param):
            return _waited(grad._local_tensor)
        if grad not in self._redistributed:
            with torch.no_grad():
                self._redistributed[grad] = local(redistributed(grad, param))
        return self._redistributed[grad]

    def clear(self) -> None:
        """The step is over."""
        self._redistributed.clear()


class Shards:
    """The DTensors among an optimizer's parameters, by slot."""

    def __init__(self, params: Sequence[Any], gradients: LocalGradients) -> None:
        self._at = [i for i, p in enumerate(params) if is_dtensor(p)]
        self._all = len(self._at) == len(params)
        self._params = [params[i] for i in self._at]
        self._specs: list[Any] = [None] * len(self._at)  # of gradients that were seen to be sharded as their parameters
        self._gradients = gradients

    def __bool__(self) -> bool:
        return bool(self._at)

    def localize(self, grads: list[Any]) -> None:
        """Put local shards of gradients in the place of DTensors; leave everything else as it is."""
        chosen = grads if self._all else [grads[i] for i in self._at]
        try:
            specs = [g._spec for g in chosen]
            shards = [g._local_tensor for g in chosen]
        except AttributeError:  # None, or a plain tensor
            specs = [getattr(g, "_spec", None) for g in chosen]
            shards = [g if spec is None else g._local_tensor for g, spec in zip(chosen, specs, strict=True)]
        if specs != self._specs:  # with FSDP2 they are the same objects at every step, which is seen without comparing them
            for i, (spec, known) in enumerate(zip(specs, self._specs, strict=True)):
                if spec is not None and spec is not known and (known is None or not _sharded_alike(spec, known)):
                    if why_refused(chosen[i], self._params[i]):
                        continue  # the checks say so
                    shards[i] = self._gradients.of(self._params[i])
                    self._specs[i] = spec if shards[i] is chosen[i]._local_tensor else None
        if self._all:
            grads[:] = shards
            return
        for i, shard in zip(self._at, shards, strict=True):
            grads[i] = shard
