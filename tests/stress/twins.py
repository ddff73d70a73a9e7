"""Runs a program twice, with an optimizer of ours and with the one it has to equal, and compares every bit after each step.

The other one is torch.optim's for-loop where ours has no option of its own and tensors are float32 or float64, with a
correctly rounded torch.sqrt (MKL's is an ulp off); else the optimizers of reference_optimizer.py. What is refused by both is
no difference; what only one of them refuses is.
"""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.amp import GradScaler

import fused_l2
from fused_l2.engines import cpu
from fused_l2.parameters import eight_bits
from fused_l2.tables.modes import CODES, EIGHT_BIT, SCALES

from . import reference_optimizer
from .programs import Program

LIBRARY = cpu.library()


class Difference(AssertionError):
    """Where the two optimizers part."""


def difference(program: Program) -> str | None:
    """Where the optimizers part, its kind in front of a colon; None if they do not."""
    threads = torch.get_num_threads()
    capability = LIBRARY.capability if LIBRARY else None
    exact_sqrt = mock.patch.object(torch.Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.detach().numpy())))
    try:
        with warnings.catch_warnings(), exact_sqrt:
            warnings.simplefilter("ignore")
            _run(program)
    except Difference as found:
        return str(found)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(threads)
        if LIBRARY:
            LIBRARY.select(capability)
    return None


def _run(program: Program) -> None:
    ours, theirs = World(program, ours=True), World(program, ours=False)
    for number, (name, given) in enumerate(program.events):
        if name == "exchange checkpoints":
            if not program.options:
                _exchange(ours, theirs)
            continue
        raised = []
        for world in (ours, theirs):
            try:
                getattr(world, name.replace(" ", "_"))(given)
                raised.append(None)
            except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
                raised.append(error)
        where = f"event {number}, {name} {given}"
        if (raised[0] is None) != (raised[1] is None):
            raise Difference(f"refused by one: {where}: ours raised {raised[0]!r}, the other {raised[1]!r}")
        if raised[0] is not None and name == "step":
            return  # torch steps what comes before what it refuses
        if name == "step":
            _compare(ours, theirs, where)


def _exchange(ours: World, theirs: World) -> None:
    ours_saved, theirs_saved = copy.deepcopy(ours.optimizer.state_dict()), copy.deepcopy(theirs.optimizer.state_dict())
    ours.optimizer.load_state_dict(theirs_saved)
    theirs.optimizer.load_state_dict(ours_saved)


def _compare(ours: World, theirs: World, where: str) -> None:
    for i, (p, q) in enumerate(zip(ours.params, theirs.params, strict=True)):
        what = f"{where}: parameter {i} of shape {tuple(p.shape)}, {p.dtype}"
        _same(p, q, what)
        mine, other = (
            {k: v for k, v in world.optimizer.state.get(t, {}).items() if v is not None}
            for world, t in ((ours, p), (theirs, q))
        )
        if mine.keys() != other.keys():
            raise Difference(f"states: {what}: {sorted(mine)}, of the other {sorted(other)}")
        mine, other = _with_values_of_codes(mine), _with_values_of_codes(other)
        for key in mine:
            _same(mine[key], other[key], f"{what}: {key}")
        if p.grad is not None:
            _same(p.grad, q.grad, f"{what}: gradient")


def _with_values_of_codes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With float32 values beside the scales: a NaN has several codes, as it has several bit patterns."""
    found = dict(state)
    for name, key in CODES.items():
        if key in state:
            found[key] = eight_bits.decode(name, state[key], state[SCALES[name]])
    return found


def _same(a: Tensor, b: Tensor, what: str) -> None:
    if a.shape != b.shape or a.dtype != b.dtype:
        raise Difference(
            f"dtype or shape: {what}: {a.dtype} of shape {tuple(a.shape)}, of the other {b.dtype} of shape {tuple(b.shape)}"
        )
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = a.detach().contiguous(), b.detach().contiguous()
    bits = (a.view(integer) != b.view(integer)) & ~(a.isnan() & b.isnan())
    if bits.any():
        index = tuple(int(x) for x in bits.nonzero()[0])
        raise Difference(
            f"bits: {what}: {int(bits.sum())} of {a.numel()} differ, at {index} {a[index]!r}, of the other {b[index]!r}"
        )


def _laid_out(value: Tensor, layout: str) -> Tensor:
    """The same values elsewhere, as ``layout`` says."""
    if layout == "transposed" and value.dim() > 1:
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "gaps":
        return torch.stack([value, value], -1)[..., 0]
    if layout == "offset":
        return torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
    return value.clone(memory_format=torch.contiguous_format)


class World:
    """An optimizer, its parameters, and what happens to them: one method for each kind of event."""

    def __init__(self, program: Program, ours: bool) -> None:
        self.program, self.ours = program, ours
        options = dict(program.options)
        groups = [self._group(g) for g in program.groups]
        common = {"lr": 0.1}
        if ours:
            if options.get("state_dtype", EIGHT_BIT) != EIGHT_BIT:
                options["state_dtype"] = getattr(torch, options["state_dtype"])
            made: Any = getattr(fused_l2, program.optimizer)(groups, **common, **options)
        elif options:
            made = getattr(reference_optimizer, program.optimizer)(groups, **common)
            made.options = options
        else:
            made = getattr(torch.optim, program.optimizer)(groups, **common, foreach=False)
        self.optimizer = made
        self.saved: Any = None
        self.scaler = GradScaler("cpu", init_scale=2.0**4, growth_interval=2) if options.get("amp_scaling") else None
        if self.scaler:
            self.scaler.scale(torch.zeros(()))  # makes its tensors

    @staticmethod
    def _group(group: dict[str, Any]) -> dict[str, Any]:
        params = []
        for p in group["params"]:
            generator = torch.Generator().manual_seed(p["seed"])
            value = torch.randn(p["shape"], generator=generator).to(getattr(torch, p["dtype"]))
            params.append(torch.nn.Parameter(_laid_out(value, p["layout"])))
        return {"params": params, **group["settings"]}

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _chosen(self, given: dict[str, Any]) -> Tensor | None:
        params = self.params
        return params[given["of"] % len(params)] if params else None

    def _chosen_group(self, given: dict[str, Any]) -> dict[str, Any]:
        groups = self.optimizer.param_groups
        return groups[given["of"] % len(groups)]

    # A step.

    def step(self, given: dict[str, Any]) -> None:
        def closure() -> float:
            self._give_grads(given)
            return 1.5

        if self.scaler:
            self._give_grads(given, float(self.scaler.get_scale()))
            if any(p.grad is not None for p in self.params):
                self.scaler.step(self.optimizer)
                self.scaler.update()
            for p in self.params:  # unscaled in place by one, in the step by the other
                p.grad = None
        elif given["closure"]:
            if self.optimizer.step(closure) != 1.5:
                raise Difference("loss: the closure's was not returned")
        else:
            self._give_grads(given)
            self.optimizer.step()

    def _give_grads(self, given: dict[str, Any], scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(given["seed"])
        for p, kind in zip(self.params, itertools.cycle(given["grads"])):
            value = torch.randn(p.shape, generator=generator)
            value = (value * 10 ** (2 * torch.rand(p.shape, generator=generator) - 1)).to(p.dtype)
            if given["special"] and p.numel():
                value.view(-1)[0] = {"inf": torch.inf, "nan": torch.nan, "tiny": 1e-42}[given["special"]]
            value *= scale
            if kind == "kept" and p.grad is not None:
                continue
            if kind == "in place" and p.grad is not None:
                p.grad.copy_(value)
            elif kind == "zero":
                p.grad = torch.zeros_like(p)
            else:
                p.grad = None if kind == "none" else _laid_out(value, "gaps" if kind == "gaps" else "dense")

    # Between steps.

    def lr(self, given: dict[str, Any]) -> None:
        self._chosen_group(given)["lr"] = given["value"]

    def tensor_lr(self, given: dict[str, Any]) -> None:
        """In float64: of a float32 one torch's Adam computes with float32 scalars (docs/same-bits.md)."""
        self._chosen_group(given)["lr"] = torch.tensor(given["value"], dtype=torch.float64)

    def weight_decay(self, given: dict[str, Any]) -> None:
        self._chosen_group(given)["weight_decay"] = given["value"]

    def rule(self, given: dict[str, Any]) -> None:
        group = self._chosen_group(given)
        if not (given["key"] in ("momentum", "dampening") and group["nesterov"]):  # checked in a constructor, by torch
            group[given["key"]] = given["value"]

    def new_data(self, given: dict[str, Any]) -> None:
        if (p := self._chosen(given)) is not None:
            p.data = _laid_out(p.data, given["layout"])

    def written_data(self, given: dict[str, Any]) -> None:
        if (p := self._chosen(given)) is not None:
            p.data.mul_(0.5)

    def new_states(self, given: dict[str, Any]) -> None:
        p = self._chosen(given)
        state = self.optimizer.state.get(p, {})
        for key, value in list(state.items()):
            state[key] = value.clone() if isinstance(value, Tensor) else value

    def new_state_dict(self, given: dict[str, Any]) -> None:
        p = self._chosen(given)
        if p in self.optimizer.state:
            self.optimizer.state[p] = dict(self.optimizer.state[p])

    def no_state(self, given: dict[str, Any]) -> None:
        self.optimizer.state.pop(self._chosen(given), None)

    def counter(self, given: dict[str, Any]) -> None:
        state = self.optimizer.state.get(self._chosen(given), {})
        if "step" in state:
            state["step"].fill_(float(given["value"]))

    def save(self, given: dict[str, Any]) -> None:
        self.saved = copy.deepcopy(self.optimizer.state_dict())

    def load(self, given: dict[str, Any]) -> None:
        if self.saved is not None:
            if not self.ours and not self._has_shapes_of_saved():
                raise ValueError("states of other shapes than the parameters', which ours refuses when it loads them")
            self.optimizer.load_state_dict(copy.deepcopy(self.saved))  # torch steps the very tensors it was given

    def _has_shapes_of_saved(self) -> bool:
        groups, saved = self.optimizer.param_groups, self.saved["param_groups"]
        pairs = [pair for a, b in zip(groups, saved, strict=False) for pair in zip(a["params"], b["params"], strict=False)]
        states = self.saved["state"]
        return all(
            value.shape == param.shape
            for param, index in pairs
            for key, value in states.get(index, {}).items()
            if key not in ("step", *SCALES.values()) and value is not None
        )

    def pickle(self, given: dict[str, Any]) -> None:
        """Through a file. What is left are the copies: of the optimizer, its parameters and their gradients."""
        grads = [p.grad for p in self.params]
        file = io.BytesIO()
        torch.save(self.optimizer, file)
        file.seek(0)
        self._adopt(torch.load(file, weights_only=False), grads)

    def copy(self, given: dict[str, Any]) -> None:
        self._adopt(copy.deepcopy(self.optimizer), [p.grad for p in self.params])

    def _adopt(self, optimizer: Any, grads: list[Any]) -> None:
        if not self.ours and self.program.options:
            optimizer.options = self.optimizer.options
        self.optimizer = optimizer
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = None if grad is None else grad.clone()

    def add_group(self, given: dict[str, Any]) -> None:
        if len(self.optimizer.param_groups) < 6:
            self.optimizer.add_param_group(self._group(given["group"]))

    def remove_group(self, given: dict[str, Any]) -> None:
        if len(self.optimizer.param_groups) > 1:
            group = self.optimizer.param_groups.pop(given["of"] % len(self.optimizer.param_groups))
            for p in group["params"]:
                self.optimizer.state.pop(p, None)

    def move(self, given: dict[str, Any]) -> None:
        groups = self.optimizer.param_groups
        source, target = self._chosen_group(given), groups[given["to"] % len(groups)]
        # torch's amsgrad has no state to begin with where it was off before; ours begins with zeros.
        if source is not target and len(source["params"]) > 1 and source.get("amsgrad") == target.get("amsgrad"):
            target["params"].append(source["params"].pop())

    def freeze(self, given: dict[str, Any]) -> None:
        if (p := self._chosen(given)) is not None:
            p.requires_grad_(not p.requires_grad)

    def swap(self, given: dict[str, Any]) -> None:
        """As Module.to does it with torch.__future__.set_swap_module_params_on_conversion."""
        if (p := self._chosen(given)) is not None and p.requires_grad:
            grad, p.grad = p.grad, None
            torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().clone()))
            p.grad = grad

    def threads(self, given: dict[str, Any]) -> None:
        torch.set_num_threads(given["value"])

    def capability(self, given: dict[str, Any]) -> None:
        if LIBRARY:
            LIBRARY.select(LIBRARY.available[given["value"] % len(LIBRARY.available)])

    def zero_grad(self, given: dict[str, Any]) -> None:
        self.optimizer.zero_grad(set_to_none=bool(given["of"] % 2))

    def hook(self, given: dict[str, Any]) -> None:
        """Halves the gradients of the next step."""
        if self.scaler:  # which does not call step() of torch's where a step is skipped, and ours runs its hooks then
            return
        if self.scaler:  # which does not call step() of torch's where a step is skipped, and ours runs its hooks then
            return

        done = []

        def halve(optimizer: Any, args: Any, kwargs: Any) -> None:
            for p in [] if done else self.params:
                if p.grad is not None:
                    p.grad.mul_(0.5)
            done.append(True)

        self.optimizer.register_step_pre_hook(halve)

    def option(self, given: dict[str, Any]) -> None:
        key, value = given["key"], given["value"]
        if self.ours:
            setattr(self.optimizer, key, value)
        elif self.program.options:
            self.optimizer.options = {**self.optimizer.options, key: value}
