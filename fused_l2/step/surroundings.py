"""The caller's modes that a step cannot be made in: it leaves them, or it is refused where torch.optim's is.

Other modes change nothing: default device and dtype, because every tensor of ours is made with both; dispatch and function
modes, which see the states that are made and nothing else; deterministic and inference mode, autocast, anomaly detection.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..parameters.memory import PLAIN_TYPES

# None, and 0, almost always.
functorch_level: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

_FAKE = torch._C._TorchDispatchModeKey.FAKE
_DIFFERENTIATES = ("Grad", "Jvp")


def refuse_modes(groups: list[dict[str, Any]]) -> None:
    """Refuse a step where torch.optim's would write to tensors that may not be written to.

    Raises:
        RuntimeError: within ``torch.func.grad``, ``vjp`` or ``jvp``; if a gradient is a tensor of such a transform; if
            parameters are real and ``FakeTensorMode`` is on.
    """
    is_transformed = functorch_level() is not None
    if is_transformed:
        levels = [level.key().name for level in torch._C._functorch.get_interpreter_stack()]
        if any(name in _DIFFERENTIATES for name in levels):
            raise RuntimeError(
                "fused_l2: step() within torch.func.grad, vjp or jvp would change parameters in place that are not arguments "
                "of the function, which these transforms do not allow. Step outside of the function."
            )
    is_fake = bool(dispatch_modes()) and torch._C._get_dispatch_mode(_FAKE) is not None
    for index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if is_fake and type(param) in PLAIN_TYPES:
                raise RuntimeError(
                    f"fused_l2: parameter {position} of group {index} is a real tensor, and FakeTensorMode is on, in which "
                    f"nothing is computed. Make model and optimizer within the mode, or step outside of it."
                )
            if is_transformed and torch._C._functorch.is_functorch_wrapped_tensor(grad):
                raise RuntimeError(
                    f"fused_l2: the gradient of parameter {position} of group {index} belongs to the function transform "
                    f"(torch.func) that step() is called in. Return gradients from the function, and step outside of it."
                )


def outside_transforms() -> AbstractContextManager[Any]:
    """Without the function transforms that are under way: tensors that a step makes are the optimizer's, not theirs."""
    guard: AbstractContextManager[Any] = torch._C._DisableFuncTorch()
    return guard
