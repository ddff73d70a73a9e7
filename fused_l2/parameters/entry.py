"""One parameter of a step, with what its update rule needs, checked. Nothing is changed here; errors name the tensor."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tables.modes import CODES, RANDOM, SCALES, Mode
from ..tables.tensor_table import DTYPES, Flag
from . import checks
from .checks import Name
from .eight_bits import empty_state, scale_shape
from .low_precision import LowPrecision, kept_anew, parameter_key, widened
from .memory import has_plain_type, is_dense, is_plain, needs_copy, same_layout, why_unreadable
from .ranks import Ranks
from .shards import LocalGradients, first_element, is_dtensor, local, matches, redistributed

GONE: Any = object()  # stands for a state that changed


class InFlight:
    """What a plan and its entries tell each other: whether a step is under way, during which nothing that it uses may go, and
    which entries let go of their states since the plan looked at them."""

    def __init__(self) -> None:
        self.used: list[Any] | None = None  # what entries let go of while a step uses it; None: no step is under way
        self.without_state: list[int] = []  # slots


class GroupNeeds(NamedTuple):
    """What the parameters of one param group need besides themselves."""

    flags: int
    state_names: tuple[str, ...]
    optional_states: frozenset[str]  # those that may be missing beside others, and are zero then
    counts: bool  # whether there is a step counter
    counts_on_device: bool  # whether it is where a CUDA parameter is
    precision: LowPrecision

    def of(self, param: Tensor) -> ParamNeeds:
        """The same for one parameter, which is a matter of its dtype, and with 8-bit states of its shape and layout."""
        mode, has_codes = self.precision.mode_of(param), bool(self.state_names) and self.precision.has_codes(param)
        flags = int(self.flags | mode | (Flag.EIGHT_BIT if has_codes else 0))
        counts = self.counts or bool(flags & RANDOM)
        kept = (mode.state_name,) if mode.state_name else ()
        states = tuple(CODES[name] for name in self.state_names) if has_codes else self.state_names
        scales = tuple(SCALES[name] for name in self.state_names) if has_codes else ()
        names = (*states, *kept, *scales, *(("step",) if counts else ()))
        wanted = self.precision.state_dtype_of(param)
        is_plain = mode is Mode.ROUND and not has_codes and param.dtype in DTYPES
        return ParamNeeds(self, flags, mode, has_codes, wanted, counts, names, is_plain)


class ParamNeeds(NamedTuple):
    """What a parameter of one param group and dtype needs besides itself."""

    of_group: GroupNeeds
    flags: int
    mode: Mode
    has_codes: bool  # whether states are 8-bit codes
    wanted: torch.dtype | None  # the dtype that moments and momentum have to have, or are stepped in
    counts: bool
    names: tuple[str, ...]  # the entries of the state that are used: states, what is kept, scales, step counter
    is_plain: bool  # whether such a parameter may be a plain entry


class Entry:
    """A parameter that had a gradient, with the state its update rule needs. It lives until one of them is replaced.

    ``states`` are the moments or the momentum; ``kept`` is what ``low_precision`` keeps beside the parameter (master weights, a
    remainder or a compensation); ``scales`` belong to 8-bit states; ``counter`` is the ``step``.

    ``param`` and the state may be DTensors. The step works on their local shards: ``local``, ``states``, ``kept`` and
    ``scales`` are plain tensors that are sharded alike. ``ranks``: where something is measured, the process groups over which
    it is summed.

    ``state`` is the entry in ``optimizer.state`` (None if there is none yet, ``GONE`` if it changed since); ``new`` is
    what the step adds to it or replaces in it once every parameter has passed its checks.
    """

    __slots__ = (
        "__weakref__",
        "active",
        "bucket",
        "copies",
        "counter",
        "first_step",
        "flags",
        "grad_dtype",
        "gradients",
        "group",
        "in_flight",
        "is_plain",
        "is_regular",
        "kept",
        "key",
        "local",
        "mode",
        "names",
        "new",
        "numel",
        "param",
        "part",
        "ranks",
        "record",
        "row",
        "scales",
        "slot",
        "state",
        "state_dtype",
        "states",
    )

    param: Tensor
    local: Tensor
    slot: int  # which of the optimizer's parameters
    group: int
    ranks: Ranks
    gradients: LocalGradients
    flags: int
    mode: Mode
    key: int  # names the parameter's stream of random bits
    state: Any
    new: dict[str, Any]
    names: tuple[str, ...]  # the entries of the state that are used: states, what is kept, scales, step counter
    states: list[Tensor]
    counter: Tensor | None
    kept: Tensor | None
    scales: list[Tensor]  # of 8-bit states
    state_dtype: torch.dtype  # in which states are, or 8-bit ones are stepped
    grad_dtype: torch.dtype
    first_step: bool  # SGD: the momentum buffer holds nothing yet
    copies: bool  # whether the gradient's memory is in another order than the parameter's
    is_plain: bool  # of plain tensors on the CPU, which the watch has accepted
    is_regular: bool  # whether the tensors are such that an engine of ours can step them
    numel: int
    in_flight: InFlight
    # The plan's: what the watch saw, and where the parameter is stepped.
    record: array[int] | None
    active: bool
    part: Any
    bucket: Any
    row: int

    @property
    def grad(self) -> Tensor:
        return self.gradients.of(self.param)

    def weights(self) -> Tensor:
        """The parameter's value, in float32 if it is a 16-bit one."""
        return widened(self.mode, self.local.detach(), self.kept)

    def let_go(self) -> None:
        """The state was changed by somebody: hold none of its tensors any more, once the step that uses them is over."""
        used = self.in_flight.used
        if used is not None:
            used.append((self.states, self.kept, self.scales, self.counter))
        self.state, self.states, self.kept, self.scales, self.counter = GONE, [], None, [], None
        if self.record is not None:
            self.record[0] = -1  # not to be read: it tells of tensors that may be gone
        self.in_flight.without_state.append(self.slot)

    def take(self, state: Any, tensors: Sequence[Tensor]) -> None:
        """Use these tensors of the state, in the order of ``names``."""
        self.state = state
        self.states = list(tensors)
        self.counter = self.states.pop() if self.names[-1:] == ("step",) else None
        if self.flags & Flag.EIGHT_BIT:  # a half of what is left are scales
            half = len(self.states) // 2
            self.scales, self.states = self.states[len(self.states) - half :], self.states[: len(self.states) - half]
        self.kept = self.states.pop() if self.mode is not Mode.ROUND and self.mode.state_name else None

    def watched(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The tensors that have to be where and what they were: of the parameter's shape, scales, and a counter."""
        full = [self.local, *self.states]
        if self.kept is not None:
            full.append(self.kept)
        return full, self.scales, [] if self.counter is None else [self.counter]


_COUNTERS = (torch.float32, torch.float64)


def plain_entry(
    param: Tensor,
    grad: Tensor,
    slot: int,
    group: int,
    state: Any,
    needs: ParamNeeds,
    gradients: LocalGradients,
    in_flight: InFlight,
) -> Entry | None:
    """The entry of a parameter whose state is whole or does not exist yet, as almost all are; None if it takes a closer look.

    Only some dtypes are checked here. Types, shapes, strides, devices and memory are for the watch to check as it records them.
    """
    dtype = param_dtype = param.dtype
    grad_dtype = grad.dtype
    if grad_dtype is not param_dtype and not checks.may_be_mixed(grad_dtype, param_dtype):
        return None
    new: dict[str, Any] = {}
    counter: Any = None
    names = needs.of_group.state_names
    if not state:
        states = [torch.zeros_like(param, dtype=needs.wanted) for _ in names]
        new.update(zip(names, states, strict=True))
        if needs.counts:
            counter = new["step"] = torch.tensor(0.0, dtype=scalar_dtype(), device="cpu")
    elif len(state) != len(needs.names):
        return None
    else:
        try:
            states = [state[key] for key in names]
            if states:
                dtype = states[0].dtype
            if needs.counts:
                counter = state["step"]
                if counter.dtype not in _COUNTERS:
                    return None
        except (KeyError, AttributeError):  # not there, or not a tensor
            return None
    if needs.wanted not in (None, dtype) or (dtype is not param_dtype and not checks.is_state_dtype(dtype, param_dtype)):
        return None
    e = Entry()
    e.in_flight = in_flight
    e.param = e.local = param
    e.slot, e.group, e.gradients, e.mode, e.flags, e.names = slot, group, gradients, needs.mode, needs.flags, needs.names
    e.ranks, e.state, e.new, e.first_step, e.key = (), state, new, bool(new), 0
    e.states, e.kept, e.scales, e.counter, e.state_dtype, e.grad_dtype = states, None, [], counter, dtype, grad_dtype
    e.copies, e.is_plain, e.is_regular, e.numel = False, True, True, param.numel()
    e.active, e.record, e.part, e.bucket, e.row = True, None, None, None, -1
    return e


def make_entry(
    param: Tensor,
    grad: Tensor,
    *,
    slot: int,
    number: int,
    group: int,
    state: Any,
    pending: Mapping[str, Any],
    needs: ParamNeeds,
    gradients: LocalGradients,
    in_flight: InFlight,
    on_device: bool,
    name: Name,
) -> Entry:
    """Check a parameter that has a gradient, its gradient and its state, and prepare the state it lacks.

    ``number`` names its stream of random bits. ``pending`` holds state that waits for a first step. ``on_device``: whether
    steps are counted on the parameter's device.

    Raises:
        RuntimeError: if the step cannot be made; the message names the parameter, what is wrong and what to do.
    """
    mode, wanted, of_group = needs.mode, needs.wanted, needs.of_group
    found: Mapping[str, Any] = {**(state or {}), **pending}
    checks.check_param(param, name)
    checks.check_grad(param, grad, lambda: gradients.of(param), name)
    checks.check_mode(param, mode, found, name)
    if of_group.state_names:
        checks.check_format(param, needs.has_codes, of_group.precision.state_dtype, found, name)
    missing = []
    for key in of_group.state_names:
        entries = (CODES[key], SCALES[key]) if needs.has_codes else (key,)
        absent = [k for k in entries if found.get(k) is None]
        if key not in of_group.optional_states or len(absent) < len(entries):
            missing += absent
    if of_group.counts and found.get("step") is None:
        missing.append("step")
    if reason := checks.why_not_whole(found, missing, name):
        raise RuntimeError(
            f"{reason}. Load a whole checkpoint of this optimizer, or start this parameter anew: "
            f"optimizer.state[param].clear()."
        )

    e = Entry()
    e.in_flight = in_flight
    e.param, e.slot, e.group, e.gradients, e.mode = param, slot, group, gradients, mode
    e.local, e.ranks = local(param), ()
    e.flags, e.names = needs.flags, needs.names
    e.state, e.new, e.first_step = state, dict(pending), False
    e.states, e.scales = [], []
    for key in of_group.state_names:
        if needs.has_codes:
            _take_codes(e, key, found, pending, name)
            continue
        value = found.get(key)
        e.first_step |= value is None or key in pending
        if value is None:
            value = e.new[key] = torch.zeros_like(param, dtype=wanted or param.dtype)
        else:
            value = _usable(e, key, value, wanted, None, name)
        e.states.append(local(value))
    e.kept = _kept(e, found, name)
    e.counter = None
    if needs.counts:
        value = found.get("step")
        counter = as_counter(value, param, on_device, bool(needs.flags & RANDOM), name)
        if not on_device and value is not None:
            checks.check_counter(counter, name)
        if counter is not value:
            e.new["step"] = counter
        e.counter = counter
    e.state_dtype = torch.float32 if needs.has_codes else e.states[0].dtype if e.states else param.dtype
    e.grad_dtype = grad.dtype
    e.numel = e.local.numel()
    e.key = 0
    if needs.flags & RANDOM:
        e.key = parameter_key(of_group.precision.seed, number) | (first_element(param) & 0xFFFFFFFF) << 32
    own = gradients.of(param)
    e.is_plain = False
    e.copies = needs_copy(e.local, own) if own.layout is torch.strided else False
    e.is_regular = (
        has_plain_type(own)
        and not own._is_zerotensor()
        and all(map(is_plain, (e.local, *e.states, *([] if e.kept is None else [e.kept]), *e.scales)))
        and is_dense(e.local)
        and (needs.has_codes or all(s.dtype is e.state_dtype for s in e.states))
    )
    e.active, e.record, e.part, e.bucket, e.row = True, None, None, None, -1
    return e


def _take_codes(e: Entry, key: str, found: Mapping[str, Any], pending: Mapping[str, Any], name: Name) -> None:
    """Codes and scales of a state, made if there are none yet."""
    param, codes, scales = e.param, found.get(CODES[key]), found.get(SCALES[key])
    e.first_step |= codes is None or CODES[key] in pending
    if codes is None or scales is None:
        codes, scales = e.new[CODES[key]], e.new[SCALES[key]] = empty_state(param)
    else:
        checks.check_state(param, SCALES[key], scales, name, torch.uint8, scale_shape(param))
        if is_dtensor(param) and not matches(scales, param):
            scales = e.new[SCALES[key]] = redistributed(scales, param)
        if not local(scales).is_contiguous():
            scales = e.new[SCALES[key]] = scales.contiguous()
        codes = _usable(e, CODES[key], codes, None, torch.uint8, name)
    e.states.append(local(codes))
    e.scales.append(local(scales))


def _usable(e: Entry, key: str, value: Any, wanted: torch.dtype | None, only: torch.dtype | None, name: Name) -> Any:
    """A state tensor as the step can use it: itself, or a copy of another layout, dtype or sharding, which replaces it."""
    param = e.param
    checks.check_state(param, key, value, name, only)
    usable = value
    if is_dtensor(param) and not matches(value, param):
        usable = redistributed(value, param)
    # What is not dense is stepped by plain PyTorch, in any layout.
    reordered = is_dense(e.local) and not same_layout(local(usable), e.local)
    if reordered and only is torch.uint8:
        raise checks.refuse_order(key, name)
    if reordered or wanted not in (None, usable.dtype):
        usable = torch.empty_like(param, dtype=wanted or usable.dtype).copy_(usable)
    if usable is not value:
        e.new[key] = usable
    return usable


def _kept(e: Entry, found: Mapping[str, Any], name: Name) -> Tensor | None:
    """What the mode keeps beside a 16-bit parameter, made if there is none yet."""
    own, param = e.mode.state_name, e.param
    if own is None:
        return None
    value = found.get(own)
    if value is not None:
        value = _usable(e, own, value, None, e.mode.state_dtype, name)
    else:
        value = e.new[own] = kept_anew(e.mode, param)
    kept: Tensor = local(value)
    return kept


def as_counter(value: Any, param: Tensor, on_device: bool, counts_all: bool, name: Name) -> Tensor:
    """A step counter as torch has it: a 0-dim tensor of torch's scalar dtype, on the CPU or (capturable, fused) on the
    parameter's device, where it is float32. With ``counts_all`` it is float64: float32 stands still at 2^24, and random bits of
    one count are the same.

    ``value`` itself is returned if it can be counted in: one float32 (on the CPU also float64) number of any shape.
    Checkpoints hold counters of other kinds, too: Python numbers, 16-bit ones, ones on another device.
    """
    device = param.device if on_device else torch.device("cpu")
    dtype = torch.float64 if counts_all else torch.float32 if on_device else scalar_dtype()
    if value is None:
        value = 0.0
    if is_dtensor(value):
        value = value.full_tensor()
    if isinstance(value, Tensor) and value.numel() == 1:
        dtypes = (dtype,) if on_device or counts_all else _COUNTERS
        is_written = value.dtype in dtypes and value.device == device and value.layout is torch.strided
        if is_written and has_plain_type(value) and not value._is_zerotensor() and not why_unreadable(value, param):
            return value
        if value.is_meta and device.type != "meta":
            raise checks.refuse_counter(value, name)
        if not counts_all:
            dtype = torch.float32
        if value.device.type != "cpu":
            return value.detach().reshape(()).to(device=device, dtype=dtype, copy=True)
    try:
        if not on_device:  # of a constant FakeTensorMode knows the value, which torch.optim reads
            return torch.tensor(float(value), dtype=dtype, device=device)
        # Filled on the device: a copy of four bytes would wait for it, for each parameter.
        return torch.full((), float(value), dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise checks.refuse_counter(value, name) from None


def scalar_dtype() -> torch.dtype:
    """The dtype in which torch.optim counts steps."""
    return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32
