"""Steps that cannot be captured into a CUDA graph, refused before anything is compiled, read or changed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .. import engines
from .._warnings import warn
from ..engines import cuda
from ..options import Options
from ..tables.control import Prologue
from .groups import Groups, ParamGroups
from .hyperparameters import is_on_device
from .rules import UpdateRule

_FIRST_STEP = "Make one step() before, with the same parameters having gradients."


def refuse_capture(
    groups: Groups, known: ParamGroups, rule: UpdateRule, options: Options, *, has_new_states: bool, on_host: bool
) -> None:
    """Refuse to capture a step that a replay could not repeat. ``has_new_states``: the step makes states. ``on_host``: the
    host steps some of its tensors."""
    if rule.counts and not all(g.get("capturable", False) for g in groups):
        raise _refused("its steps are counted on the host. Pass capturable=True.")
    if has_new_states:
        raise _refused("its states are still to be made. " + _FIRST_STEP)
    if on_host:
        raise _refused("some of its tensors are stepped by the host or by plain PyTorch.")
    if options.raises_if_nonfinite:
        raise _refused("error_if_nonfinite waits for the norm. Pass skip_if_nonfinite=True instead.")
    if not known.have_known_values(groups):
        raise _refused("a hyperparameter is a tensor that no step has seen yet. " + _FIRST_STEP)
    for i, group in enumerate(groups):
        if not is_on_device(group["lr"]):
            warn(
                f"fused_l2: a step is being captured into a CUDA graph with the lr of param group {i} as a number: every "
                f"replay will use {float(group['lr'])}. To follow a schedule, make it a tensor on the device, "
                f"lr=torch.tensor({float(group['lr'])}, device='cuda')."
            )
            break


def refuse_to_begin(groups: Groups) -> None:
    """Refuse a first step. To be called before a hyperparameter is read, which waits for the device."""
    refuse_changes([p for g in groups for p in g["params"] if p.grad is not None])


def refuse_changes(params: Iterable[Tensor]) -> None:
    """Refuse to mend what is known of these parameters, which compiles and reads."""
    if any(engines.device_of(param).type == "cuda" for param in params) and cuda.is_capturing():
        raise _refused("there is nothing prepared. " + _FIRST_STEP)


def refuse_scales(prologue: Prologue) -> None:
    """Refuse what a GradScaler says in CPU tensors: a replay would read their memory again, whatever is there by then."""
    for name in ("grad_scale", "found_inf"):
        given = getattr(prologue, name)
        if given is not None and engines.device_of(given).type != "cuda":
            raise _refused(f"{name} is on the CPU. Put it on the parameters' device.")


def _refused(reason: str) -> RuntimeError:
    return RuntimeError(f"fused_l2: this step() cannot be captured into a CUDA graph: {reason}")
