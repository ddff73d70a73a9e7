"""State dicts: torch.optim's, what of them is refused, and what torch does not keep of them.

A state dict comes from a file or from another process, and may be damaged. Whatever is wrong with it is told before anything of
the optimizer has changed, and named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._warnings import warn
from .options import check_torchs_flags
from .parameters import checks, eight_bits
from .parameters.entry import scalar_dtype
from .parameters.low_precision import LowPrecision, kept_anew, transferable, with_kept_dtype
from .parameters.memory import has_memory
from .parameters.shards import is_dtensor, local, matches, redistributed, why_refused
from .step.hyperparameters import number
from .step.state import KEYS
from .step.stepper import Stepper
from .tables.modes import CODES, EIGHT_BIT, EIGHT_BIT_NAMES, HALVES, SCALES, STATE_NAMES, Mode
from .tables.tensor_table import GROUP

_MOMENTS = KEYS - {"step"}
Groups = list[dict[str, Any]]
Namer = Callable[[], str]


def packed(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict as others know it: plain dicts, and remainders in a dtype that can be sent. What waits for a first step
    is among the states."""
    states = dict(state_dict["state"])
    if waiting := optimizer._stepper.waiting:
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            for i, param in zip(saved["params"], group["params"], strict=True):
                if waiting.get(param) and i not in states:
                    states[i] = _unstepped(param, waiting[param], optimizer._stepper, group)
    state_dict["state"] = {k: transferable(v) if isinstance(v, dict) else v for k, v in states.items()}
    return state_dict


@torch.no_grad()
def _unstepped(param: Tensor, kept: dict[str, Any], stepper: Stepper, group: dict[str, Any]) -> dict[str, Any]:
    """What waits for a first step, as a state before that step: torch.optim's Adam loads no state without a counter, and steps
    none without moments. Its SGD makes the momentum at the first step, which zeros would change."""
    rule, precision = stepper.rule, stepper.options.precision
    if not rule.counts:
        return kept
    names = rule.state_names(rule.flags(rule.Values._make(rule.read(group)), stepper.options))
    dtype = precision.state_dtype_of(param) or param.dtype
    moments = {name: torch.zeros_like(param, dtype=dtype) for name in names}
    step = torch.tensor(0.0, dtype=scalar_dtype(), device="cpu")
    return {"step": step, **converted(param, moments, precision.has_codes(param)), **kept}


def check(given: Any, stepper: Stepper, groups: Groups, completed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Refuse a state dict that these param groups cannot go on from. ``completed`` gives a group the keys that it lacks.

    Raises:
        ValueError, TypeError: naming what is wrong.
    """
    states, saved = _parts(given)
    sizes, own = [len(g["params"]) for g in saved], [len(g["params"]) for g in groups]
    if len(sizes) != len(own):
        raise _refused(
            f"it has {len(sizes)} param groups, this optimizer {len(own)}: a different number of parameter groups",
            "Make the optimizer with as many groups as were saved, of the same parameters in the same order",
        )
    for i, (size, expected) in enumerate(zip(sizes, own, strict=True)):
        if size != expected:
            raise _refused(
                f"its param group {i} has {size} parameters, this optimizer's {expected}: a parameter group that doesn't match "
                f"the size of optimizer's group",
                "Make the optimizer with the groups that were saved, of the same parameters in the same order",
            )
    owner: dict[Any, Tensor] = {}
    for i, (group, saved_group) in enumerate(zip(groups, saved, strict=True)):
        if missing := [key for key in stepper.rule.own_keys if key not in saved_group]:
            raise _refused(f"its param group {i} has no {missing[0]!r}: it is of another optimizer")
        whole = completed(saved_group)
        check_torchs_flags(whole, f" of param group {i}")
        if whole.get("differentiable"):
            raise _refused(f"its param group {i} has differentiable=True, which is not supported")
        values = stepper.rule.Values._make(stepper.rule.read(whole))
        initial_lr = stepper.initial_lrs.get(i, 0.0) or number(values.lr, "learning rate", f" of param group {i}")
        stepper.rule.numbers(values, stepper.options, i, initial_lr)
        flags = stepper.rule.flags(values, stepper.options)
        for position, (param, key) in enumerate(zip(group["params"], saved_group["params"], strict=True)):
            name = functools.partial(checks.describe, group, i, position)
            if not isinstance(key, Hashable):
                raise _refused(f"the index of {name()} is {key!r}")
            if owner.setdefault(key, param) is not param:
                raise _refused(f"{name()} has the index {key!r} of another parameter, so that both would step one state")
            state = states.get(key)
            if state is None:
                continue
            if not isinstance(state, Mapping):
                raise _refused(f"{name()}: its state is {state!r:.80}, not a dict")
            _check_state(state, param, stepper, flags, name)
    for key, state in states.items():
        if key not in owner:
            _refuse_key(key, state, owner)


def _was_made(state: Mapping[str, Any]) -> bool:
    return any(value is not None for value in state.values())


def _refuse_key(key: Any, state: Any, owner: Mapping[Any, Tensor]) -> None:
    """A key of none of the parameters. torch copies what is of no parameter; moments are of one, and would be lost."""
    if isinstance(key, int):
        raise _refused(f"it has a state of parameter {key}, which is in none of its param groups")
    if isinstance(key, str) and key.isdecimal() and int(key) in owner:
        raise _refused(f"it has the state of parameter {key} under the string {key!r}", "Make the keys of 'state' numbers")
    if isinstance(state, Mapping) and not _MOMENTS.isdisjoint(state):
        raise _refused(
            f"it has a state under {_named(key)}, which is no parameter of its param groups",
            "Make the keys of 'state' the numbers in the 'params' of its param groups, as state_dict() does",
        )


def _named(key: Any) -> str:
    return f"a tensor of shape {tuple(key.shape)}" if isinstance(key, Tensor) else f"the {type(key).__name__} {key!r:.80}"


def _refused(reason: str, remedy: str = "Load a state dict of this model's optimizer") -> ValueError:
    return ValueError(f"load_state_dict: {reason}; nothing was loaded. {remedy}")


def _parts(given: Any) -> tuple[Mapping[Any, Any], list[dict[str, Any]]]:
    for key, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if not isinstance(given, Mapping) or key not in given:
            raise _refused(f"there is no {key!r} in it")
        if not isinstance(given[key], kind):
            raise _refused(f"its {key!r} is {given[key]!r:.80}")
    for i, group in enumerate(given["param_groups"]):
        if not isinstance(group, dict) or not isinstance(group.get("params"), (list, tuple)):
            raise _refused(f"its param group {i} is {group!r:.80}, not a dict with a list of 'params'")
    return given["state"], given["param_groups"]


def _check_state(state: Mapping[str, Any], param: Tensor, stepper: Stepper, flags: int, name: Namer) -> None:
    rule, mode = stepper.rule, stepper.options.precision.mode_of(param)
    for other in STATE_NAMES:
        if other != mode.state_name and other in state:
            of = next(m for m in Mode if m.state_name == other).name.lower()
            if param.dtype not in HALVES:
                raise _refused(
                    f"{name()}: its state holds {other!r}, which low_precision={of!r} has kept of a 16-bit parameter",
                    f"To change over, load it while the parameters have 16 bits, convert them, and set "
                    f"optimizer.low_precision = {of!r} again; to give up what is kept, delete {other!r} from the states",
                )
            raise _refused(
                f"{name()}: its state holds {other!r}, which low_precision={of!r} has kept, and this optimizer "
                f"has low_precision={mode.name.lower()!r}",
                f"To change over, make it with the former, load, and set optimizer.low_precision; to give up what is kept, "
                f"delete {other!r} from the states",
            )
    state_dtype = stepper.options.state_dtype
    for key in EIGHT_BIT_NAMES:
        if key in state and state_dtype != EIGHT_BIT:
            raise _refused(
                f"{name()}: its state holds {key!r}, which state_dtype='8bit' has kept, and this optimizer has "
                f"state_dtype={state_dtype}",
                "To change over, make it with state_dtype='8bit', load, and set optimizer.state_dtype; or save "
                "float32_state_dict(), whose moments are float32",
            )
    names = rule.state_names(flags)
    missing = []
    for key in names:
        pair = [CODES[key], SCALES[key]] if key in CODES else []
        if any(k in state for k in pair):
            missing += [k for k in pair if state.get(k) is None]
        elif state.get(key) is None and not rule.may_start_at_zero(key):
            missing.append(key)
    if rule.counts and state.get("step") is None:
        missing.append("step")
    if reason := checks.why_not_whole(state, missing, name):
        raise _refused(
            reason, "Load a whole checkpoint of this optimizer, or start this parameter anew: delete its state from the dict"
        )
    for key, value in state.items():
        if key in checks.KNOWN and key != "step" and value is not None:
            _check_tensor(key, value, param, name)
            if value.is_complex() or not value.is_floating_point():
                raise _refused(f"{name()}: its state {key!r} has dtype {value.dtype}")
            # NaN is no damage: a gradient may have brought it, and what an optimizer saves, it loads.
            if key.endswith("_sq") and value.numel() and not value.is_meta and bool((local(value) < 0).any()):
                raise _refused(f"{name()}: its state {key!r} has negative elements, and is an average of squares")
        elif key in EIGHT_BIT_NAMES:
            _check_codes(key, value, param, name)
        elif key == mode.state_name:
            _check_tensor(key, value, param, name)
            assert mode.state_dtype is not None
            if value.dtype not in {mode.state_dtype, torch.bfloat16 if mode is Mode.REMAINDER else mode.state_dtype}:
                raise _refused(f"{name()}: its state {key!r} has dtype {value.dtype}, expected {mode.state_dtype}")
    if state.get("step") is not None:
        _check_counter(state["step"], name)


def _check_tensor(key: str, value: Any, param: Tensor, name: Namer) -> None:
    if not isinstance(value, Tensor):
        raise _refused(f"{name()}: its state {key!r} is {value!r:.80}, not a tensor")
    if value.shape != param.shape:
        raise _refused(f"{name()}: its state {key!r} has shape {tuple(value.shape)}")
    _check_values(key, value, param, name)


def _check_values(key: str, value: Tensor, param: Tensor, name: Namer) -> None:
    if value.layout is not torch.strided:
        raise _refused(f"{name()}: its state {key!r} is sparse (layout {value.layout})")
    if value.is_meta and not param.is_meta:
        raise _refused(f"{name()}: its state {key!r} is on the meta device, and has no values")
    if is_dtensor(param) and (reason := why_refused(value, param)):
        raise _refused(
            f"{name()}: its state {key!r} cannot be used: {reason}. set_optimizer_state_dict of "
            f"torch.distributed.checkpoint.state_dict shards states as the parameters are"
        )
    if not has_memory(local(value)):
        raise _refused(f"{name()}: the storage of its state {key!r} holds fewer elements than its shape says")


def _check_codes(key: str, value: Any, param: Tensor, name: Namer) -> None:
    if key in CODES.values():
        _check_tensor(key, value, param, name)
    else:
        shape = eight_bits.scale_shape(param) if param.dim() else ()
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else value
            raise _refused(f"{name()}: its state {key!r} is {found!r:.80}, not a scale for each {GROUP} elements, {shape}")
        _check_values(key, value, param, name)
    if value.dtype is not torch.uint8:
        raise _refused(f"{name()}: its state {key!r} has dtype {value.dtype}, expected uint8")


def _check_counter(value: Any, name: Namer) -> None:
    if isinstance(value, Tensor):
        # Before anything of it is read, or printed.
        if value.is_meta or value.layout is not torch.strided or not has_memory(local(value)):
            raise _refused(f"{name()}: its state 'step' is a tensor without a value: {value.layout}, on {value.device}")
        if value.numel() != 1 or value.is_complex():
            raise _refused(f"{name()}: its state 'step' has shape {tuple(value.shape)} and dtype {value.dtype}")
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        steps = float(value)
    except (TypeError, ValueError):
        raise _refused(f"{name()}: its state 'step' is {value!r:.80}, not a number") from None
    if not checks.is_count(steps):
        raise _refused(f"{name()}: its state 'step' is {steps:g}, not a number of steps")


@torch.no_grad()
def own(loaded: Mapping[str, Any], stepper: Stepper, groups: Groups, states: dict[Any, Any]) -> None:
    """After torch has cast and copied: the dtypes that torch does not keep, and memory of our own."""
    rule, waiting = stepper.rule, stepper.waiting
    waiting.clear()
    owned: set[Tensor] = set()
    lacking: dict[str, str] = {}  # of the entries that are kept beside weights: the first parameter whose state has none
    keeping: set[str] = set()
    for index, (group, saved) in enumerate(zip(groups, loaded["param_groups"], strict=True)):
        has_states = rule.counts or rule.state_names(rule.flags(rule.Values._make(rule.read(group)), stepper.options))
        for position, (i, param) in enumerate(zip(saved["params"], group["params"], strict=True)):
            given = loaded["state"].get(i)
            if isinstance(given, Mapping) and param in states and param not in owned:
                owned.add(param)  # one that is listed twice has one state
                if beside := stepper.options.precision.mode_of(param).state_name:
                    if beside in given:
                        keeping.add(beside)
                    elif _was_made(given):
                        lacking.setdefault(beside, checks.describe(group, index, position))
                _own_state(given, param, states, stepper.options.precision)
                # Set before a first step. Of a rule without states it is all that a step leaves.
                if has_states and states[param] and all(key in STATE_NAMES for key in states[param]):
                    waiting[param] = dict(states.pop(param))
    for key in keeping.intersection(lacking):
        warn(
            f"fused_l2: load_state_dict: the state of {lacking[key]} has no {key!r}, which those of other parameters have. It "
            f"goes on from its 16-bit weight"
        )


def _own_state(given: Mapping[str, Any], param: Tensor, states: dict[Any, Any], precision: LowPrecision) -> None:
    state, wanted, mode = states[param], precision.state_dtype_of(param), precision.mode_of(param)
    for key, before in given.items():
        value = state[key]
        if not isinstance(value, Tensor) or not isinstance(before, Tensor):
            continue
        if key in EIGHT_BIT_NAMES:
            state[key] = before.to(device=value.device, copy=True)
            continue
        is_moment = key != "step" and key not in STATE_NAMES
        if is_moment and wanted is not None and before.is_floating_point() and before.shape == param.shape:
            if value.dtype is not wanted or _same_memory(value, before):
                state[key] = before.to(device=value.device, dtype=wanted, copy=True)
        elif key in STATE_NAMES or (is_moment and before.dtype is torch.float32 and value.dtype in HALVES):
            state[key] = with_kept_dtype(key, before.to(device=value.device, copy=True))
        elif key == "step" and before.dtype is torch.float64 and value.dtype is torch.float32:
            state[key] = before.to(device=value.device, copy=True)
        elif _same_memory(value, before):
            state[key] = value.clone()
    # Of a checkpoint of torch.optim. At once, and not as each parameter is stepped: what is saved has it for all.
    if mode.state_name and mode.state_name not in state and _was_made(state) and has_memory(local(param)):
        state[mode.state_name] = kept_anew(mode, param)
    if precision.state_dtype == EIGHT_BIT:
        states[param] = converted(param, state, precision.has_codes(param))


def converted(param: Tensor, state: Any, has_codes: bool) -> Any:
    """A parameter's state with moments and momentum in 8 bits, or in float32; the same if they are."""
    if not isinstance(state, dict):
        return state
    if not has_codes:
        return state if state.keys().isdisjoint(CODES.values()) else type(state)(eight_bits.to_float32(param, state))
    if state.keys().isdisjoint(CODES):
        return state
    here = {
        key: redistributed(value, param) if key in CODES and is_dtensor(param) and not matches(value, param) else value
        for key, value in state.items()
    }
    return type(state)(eight_bits.to_codes(param, here))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and bool(local(a).data_ptr() == local(b).data_ptr())
