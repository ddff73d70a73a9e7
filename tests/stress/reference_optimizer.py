"""Optimizers with our options that compute every tensor by fused_l2/reference.py: slow, and without a plan to be stale."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from fused_l2 import reference
from fused_l2.parameters import eight_bits, low_precision
from fused_l2.tables import coefficients
from fused_l2.tables.modes import CODES, EIGHT_BIT, EIGHT_BIT_NAMES, HALVES, SCALES, STATE_NAMES, Mode
from fused_l2.tables.tensor_table import Flag


class _Reference:
    """What is around the arithmetic, for torch.optim.SGD, Adam and AdamW."""

    options: dict[str, Any]
    param_groups: list[dict[str, Any]]
    state: Any
    scale, found_inf = 1.0, 0.0

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        numbered = enumerate((group, p) for group in self.param_groups for p in group["params"])
        given = [(i, group, p) for i, (group, p) in numbered if p.grad is not None]
        factor, skip = self._control([p.grad for _, _, p in given])
        if not skip:
            with torch.no_grad():
                for i, group, p in given:
                    self._step_one(i, group, p, factor)
        return loss

    def _control(self, grads: list[Tensor]) -> tuple[Tensor | None, bool]:
        limit = self.options.get("max_grad_norm")
        if limit is None:
            return None, False
        values = [x for g in grads for x in g.double().abs().flatten().tolist()]
        if any(not math.isfinite(x) for x in values):
            measured = math.nan if any(math.isnan(x) for x in values) else math.inf
        elif self.options["norm_type"] == math.inf:
            measured = max(values, default=0.0)
        else:
            measured = math.sqrt(math.fsum(x * x for x in values))
        norm = torch.tensor(measured, dtype=torch.float32)
        factor = torch.clamp(limit / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
        return factor, self.options["skip_if_nonfinite"] and not math.isfinite(measured)

    def _step_one(self, position: int, group: dict[str, Any], p: Tensor, factor: Tensor | None) -> None:
        mode = self._mode(p)
        state = self.state[p]
        dtype = self._state_dtype(p, mode)
        names = self._states(group)
        coded = bool(names) and self.options.get("state_dtype") == EIGHT_BIT and eight_bits.fits(p)
        first = names and state.get(CODES[names[0]] if coded else names[0]) is None
        for name in names:
            if coded:
                if first:
                    state[CODES[name]], state[SCALES[name]] = eight_bits.empty_state(p)
            elif state.get(name) is None:
                state[name] = torch.zeros_like(p, dtype=dtype or p.dtype, memory_format=torch.preserve_format)
            elif dtype is not None:
                state[name] = state[name].to(dtype)
        if mode.state_name and mode.state_name not in state:
            state[mode.state_name] = {
                Mode.MASTER: lambda: p.float(),
                Mode.REMAINDER: lambda: torch.zeros_like(p, dtype=torch.int16),
                Mode.REMAINDER8: lambda: torch.zeros_like(p, dtype=torch.int8),
                Mode.KAHAN: lambda: torch.zeros_like(p, dtype=torch.bfloat16),
            }[mode]()
        is_random = mode.is_random or coded
        if self.counts or is_random:
            # Random bits go on where float32 stands still.
            counted = torch.float64 if is_random else torch.float32
            state["step"] = torch.tensor(float(state.get("step", 0.0)) + 1, dtype=counted)
        count = float(state.get("step", 0.0))
        kept = state.get(mode.state_name) if mode.state_name else None
        w = low_precision.widened(mode, p.detach(), kept)
        grad = p.grad.to(w.dtype)
        if factor is not None:
            grad = grad * factor
        states = [eight_bits.decode(n, state[CODES[n]], state[SCALES[n]]) if coded else state[n] for n in names]
        new, new_states = self.rule(w, grad, states, group, count, bool(first))
        bits = None
        if is_random:
            key = low_precision.parameter_key(self.options.get("seed", 0), position)
            bits = low_precision.random_bits(key, int(count), p.numel()).view(p.shape)
        narrow, left = low_precision.narrowed(mode, new, p.dtype, bits)
        p.copy_(narrow)
        for name, value in zip(names, new_states, strict=True):
            if coded:
                codes, scales = eight_bits.encode(name, eight_bits.arranged(value, p), bits)
                state[CODES[name]], state[SCALES[name]] = eight_bits.wrapped(p, codes, scales)
            else:
                state[name].copy_(value)
        if left is not None:
            state[mode.state_name].copy_(left)

    def _mode(self, p: Tensor) -> Mode:
        return Mode[self.options["low_precision"].upper()] if p.dtype in HALVES else Mode.ROUND

    def _state_dtype(self, p: Tensor, mode: Mode) -> torch.dtype | None:
        """The dtype that states must have; None: that which they have, the parameter's if new."""
        wanted = self.options.get("state_dtype")
        if p.dtype is torch.float64:
            return None
        if wanted is None:
            return torch.float32 if mode is not Mode.ROUND else None
        if wanted == EIGHT_BIT:  # where it does not fit
            return torch.float32
        return getattr(torch, wanted)

    def _flags(self, group: dict[str, Any]) -> int:
        flags = Flag.MAXIMIZE if group["maximize"] else 0
        decoupled = group.get("decoupled_weight_decay", self.options.get("decoupled_weight_decay", False))
        flags |= Flag.DECOUPLED if decoupled else 0
        return int(flags | (Flag.CAUTIOUS if self.options.get("cautious") and decoupled else 0))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Without torch's cast of states to the parameter's dtype: ours have that of ``state_dtype`` once they are loaded."""
        given = copy.deepcopy(state_dict)
        super().load_state_dict(state_dict)  # type: ignore[misc]
        flat = [p for group in self.param_groups for p in group["params"]]
        numbers = [i for group in given["param_groups"] for i in group["params"]]
        for number, p in zip(numbers, flat, strict=True):
            mode = self._mode(p)
            for key, value in given["state"].get(number, {}).items():
                wanted = None if key in (*STATE_NAMES, *EIGHT_BIT_NAMES) else self._state_dtype(p, mode)
                if key in EIGHT_BIT_NAMES or (key != "step" and isinstance(value, Tensor) and (p.dtype in HALVES or wanted)):
                    self.state[p][key] = value.to(wanted or value.dtype)


class SGD(_Reference, torch.optim.SGD):
    counts = False

    def _states(self, group: dict[str, Any]) -> list[str]:
        return ["momentum_buffer"] if group["momentum"] != 0 else []

    def rule(self, w: Tensor, grad: Tensor, states: Any, group: Any, count: float, first: bool) -> Any:
        flags = self._flags(group) | (Flag.MOMENTUM if states else 0) | (Flag.NESTEROV if states and group["nesterov"] else 0)
        numbers = (float(group[key]) for key in ("lr", "momentum", "dampening", "weight_decay"))
        row = coefficients.sgd(coefficients.SgdNumbers(*numbers), bool(flags & Flag.DECOUPLED))
        return reference.sgd(w, grad, states, row, int(flags), first)


class Adam(_Reference, torch.optim.Adam):
    counts = True

    def _states(self, group: dict[str, Any]) -> list[str]:
        return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]

    def rule(self, w: Tensor, grad: Tensor, states: Any, group: Any, count: float, first: bool) -> Any:
        flags = self._flags(group) | (Flag.AMSGRAD if group["amsgrad"] else 0)
        numbers = (float(x) for x in (group["lr"], *group["betas"], group["eps"], group["weight_decay"]))
        row = coefficients.adam(coefficients.AdamNumbers(*numbers), bool(flags & Flag.DECOUPLED), count)
        return reference.adam(w, grad, states, row, int(flags))


class AdamW(Adam, torch.optim.AdamW):
    pass
