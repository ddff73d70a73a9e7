"""What single steps within a backward pass must know of each other, and what none of them can know alone.

A step in the backward pass uses a gradient before anybody else has seen it. Here is looked for what would still have changed
it: other ranks, a GradScaler, a second part of the same gradient.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .parameters import checks
from .parameters.shards import is_dtensor

_FINAL = "If this gradient is to be used as it is, on each rank its own, pass gradients_are_final=True."


def world_size() -> int:
    """How many ranks there are; 1 without torch.distributed."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def name_of(param: Tensor, groups: list[dict[str, Any]]) -> str:
    """How messages call a parameter of these groups."""
    for index, group in enumerate(groups):
        for position, p in enumerate(group["params"]):
            if p is param:
                return checks.describe(group, index, position)
    return f"a parameter of shape {tuple(param.shape)}"


class BackwardPass:
    """The time between two calls of ``optimizer.step()``.

    ``hooked``: the parameters (by id) that are stepped when autograd, or FSDP2, has left their gradient. ``averaged``: those
    that are stepped when a DistributedDataParallel model has averaged it.
    """

    def __init__(self, gradients_are_final: bool) -> None:
        self.gradients_are_final = gradients_are_final
        self.hooked: set[int] = set()
        self.averaged: set[int] = set()
        self._stepped: set[int] = set()
        self._has_looked = gradients_are_final  # for what is in use
        self._world = 1  # for which the parameters were checked

    def begin_step(self, optimizer: Any, *_: Any) -> None:
        """``optimizer.step()`` was called. A GradScaler that called it believes that it still has something to say."""
        own = optimizer.__dict__
        if "found_inf" in own or "grad_scale" in own:
            own.pop("found_inf", None)
            own.pop("grad_scale", None)  # or later steps without a scaler would be refused, too
            raise RuntimeError(
                "fused_l2: a GradScaler steps an optimizer that steps in the backward pass: its gradients have been used, as "
                "the scaler has scaled them. Train in bfloat16 without a scaler, or step after backward(): remove() what "
                "step_in_backward returned. Weights that were stepped with scaled gradients have to be loaded anew."
            )
        for group in optimizer.param_groups if self.averaged else ():
            for param in group["params"]:
                if id(param) in self.averaged and param.grad is not None:  # of a pass that averages, none is left
                    raise RuntimeError(
                        f"fused_l2: {name_of(param, optimizer.param_groups)} has a gradient that the DistributedDataParallel "
                        f"model has not averaged: after no_sync(), or because it was not part of the loss. Call "
                        f"optimizer.step() only after a backward pass that averages."
                    )

    def end_step(self, *_: Any) -> None:
        """``optimizer.step()`` is over: the next pass may begin."""
        self._stepped.clear()

    # Other ranks.

    def check_ranks(self, optimizer: Any) -> None:
        """ValueError if there are ranks that would have to be asked for a part of some gradient."""
        self._world = world_size()
        for group in optimizer.param_groups:
            for param in group["params"]:
                if id(param) not in self.hooked:
                    continue
                if getattr(param, "_fsdp_flattened", False):
                    raise ValueError(
                        f"step_in_backward: {name_of(param, optimizer.param_groups)} belongs to FSDP1 "
                        f"(FullyShardedDataParallel), which reduces a gradient when it would have been used. Use FSDP2 "
                        f"(fully_shard), or step after backward()."
                    )
                if self._world > 1 and not is_dtensor(param) and not self.gradients_are_final:
                    raise ValueError(
                        f"step_in_backward: {name_of(param, optimizer.param_groups)} is a plain tensor, and there are "
                        f"{self._world} ranks. Its gradient would be used as this rank computes it, before anything averages "
                        f"it, and the ranks would train apart. For a DistributedDataParallel model pass ddp=model. {_FINAL}"
                    )

    def _check_mesh(self, param: Any, optimizer: Any) -> None:
        """A gradient that comes from autograd, without FSDP2, is that of the ranks of its mesh."""
        if self.gradients_are_final or not is_dtensor(param) or param.device_mesh.size() >= self._world:
            return
        node = torch._C._current_autograd_node()
        if node is not None and node.name().endswith("AccumulateGrad"):
            raise ValueError(
                f"step_in_backward: {name_of(param, optimizer.param_groups)} is on a mesh of {param.device_mesh.size()} of "
                f"{self._world} ranks, and FSDP2 does not reduce its gradient. The others would train apart, if they have the "
                f"same parameter. {_FINAL}"
            )

    # One parameter.

    def check(self, param: Tensor, optimizer: Any) -> None:
        """Refuse a gradient that is not, or not yet, what the parameter is to be stepped with."""
        if id(param) in self._stepped:
            raise self._second_gradient(param, optimizer)
        if id(param) in self.hooked:
            if self._world != (world := world_size()):
                self.check_ranks(optimizer)
            if world > 1:
                self._check_mesh(param, optimizer)
        if not self._has_looked:
            _refuse_what_is_in_use()
            self._has_looked = True

    def done(self, param: Tensor) -> None:
        """The parameter was stepped."""
        self._stepped.add(id(param))

    def _second_gradient(self, param: Tensor, optimizer: Any) -> RuntimeError:
        return RuntimeError(
            f"fused_l2: {name_of(param, optimizer.param_groups)} got a second gradient before optimizer.step() was called, "
            f"when step_in_backward had used and freed the first. Gradients cannot be accumulated: neither over several "
            f"backward passes, nor of two losses with a backward() each, nor of a weight used at several places (tied weights, "
            f"a layer called twice) within reentrant checkpoints. Add the losses up, call optimizer.step() after "
            f"every backward(), also after one that was interrupted, and pass use_reentrant=False to checkpoints. Or "
            f"remove() what step_in_backward returned, and step after backward()."
        )


def _refuse_what_is_in_use() -> None:
    """Refuse GradScalers that have scaled something, and reentrant checkpoints to go back through. Nobody keeps lists of them:
    Python's collector knows which objects there are, and takes tenths of a second to tell."""
    scalers = set(_kinds_of(torch.amp.GradScaler))
    # Those of DeepSpeed, Megatron and fairscale are called as torch's are.
    checkpoints = {kind for kind in _kinds_of(BackwardCFunction) if "Checkpoint" in kind.__name__}
    found = gc.get_referrers(*scalers, *checkpoints)
    for scaler in found:
        if type(scaler) in scalers and scaler.is_enabled() and scaler._scale is not None:
            raise ValueError(
                f"step_in_backward: a GradScaler is in use, with scale {scaler.get_scale():g}. Gradients would be used as it "
                f"has scaled them, and before it can look for overflows. Train in bfloat16 without a scaler, or step after "
                f"backward(). If it scales the losses of other models only, pass gradients_are_final=True."
            )
    if any(type(o) in checkpoints for o in found):
        raise ValueError(
            "step_in_backward: reentrant checkpoints are in use. Each is a backward pass of its own, so that a weight used at "
            "several places (tied weights, a layer called twice) gets its gradient in parts, and would be stepped with the "
            "first. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint. If every weight is used at one place only, "
            "pass gradients_are_final=True."
        )


def _kinds_of(base: type) -> list[type]:
    kinds = [base]
    for kind in kinds:
        kinds += type.__subclasses__(kind)
    return kinds
