"""States: of another model, frozen by their dtype; learning rates of 0."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import rules
from ..findings import DOUBTFUL, NOTE, WRONG, Finding
from ..subject import Subject, Weight

LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
_DIGITS = {torch.bfloat16: 8, torch.float16: 11}


def of_another_model(subject: Subject) -> Iterator[Finding]:
    """state-of-another-model."""
    found: list[Weight] = []
    example = ""
    for weight in subject.weights:
        if rules.known_class(weight.group.optimizer) is None and weight.param is not None:
            continue
        for key in LIKE_PARAMETER:
            value = weight.state.get(key)
            if isinstance(value, Tensor) and tuple(value.shape) != weight.shape:
                found.append(weight)
                example = example or f"{weight.name} has shape {weight.shape}, its {key} {tuple(value.shape)}"
                break
    if found:
        yield Finding(
            "state-of-another-model", WRONG, tuple(w.name for w in found),
            f"States of {len(found)} tensors have another shape than their parameter: {example}.",
            "States are loaded by position. Those of a model with other layers, or in another order, go to the wrong "
            "parameters, also where shapes happen to agree.",
            "optimizer.state.clear()  # or load the checkpoint of this model",
            "Lightning-AI/pytorch-lightning#17025, X-LANCE/text2sql-lgesql#18",
        )  # fmt: skip
    for optimizer in subject.optimizers:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        stale = [key for key in getattr(optimizer, "state", {}) if isinstance(key, Tensor) and id(key) not in held]
        if stale:
            yield Finding(
                "state-of-another-model", NOTE, (),
                f"The optimizer keeps states of {len(stale)} tensors that are in none of its groups.",
                "The parameters were replaced without their states: moments start anew, and the old ones take memory.",
                'held = {id(p) for g in optimizer.param_groups for p in g["params"]}; '
                "[optimizer.state.pop(p) for p in list(optimizer.state) if id(p) not in held]",
                "huggingface/accelerate#3256",
            )  # fmt: skip


def frozen_second_moment(subject: Subject) -> Iterator[Finding]:
    """frozen-second-moment: v * beta2 + (1 - beta2) * g^2 rounds back to v."""
    never: list[Weight] = []
    seldom: list[Weight] = []
    for weight in subject.weights:
        group = weight.group
        betas = group.settings.get("betas")
        if betas is None or len(betas) != 2 or (weight.param is not None and not weight.param.requires_grad):
            continue
        beta2 = rules.number(betas[1])
        value = weight.state.get("exp_avg_sq")
        wanted = rules.moments_dtype(group.optimizer, weight.dtype)
        dtype = value.dtype if isinstance(value, Tensor) else wanted
        if isinstance(value, Tensor) and rules.is_ours(group.optimizer) and group.optimizer.state_dtype is not None:
            dtype = group.optimizer.state_dtype  # converted at the next step
        if beta2 is None or dtype not in _DIGITS or not 0 < 1 - beta2 < 2.0 ** -(_DIGITS[dtype] + 1):
            continue
        (never if group.how in (rules.LOOP, rules.FOREACH) else seldom).append(weight)
    for weights, severity, how in (
        (never, WRONG, "v * beta2 is rounded on its own and gives v again: v grows and never falls"),
        (seldom, DOUBTFUL, "v moves only where g^2 is further from it than about {} times its value"),
    ):
        if not weights:
            continue
        first = weights[0]
        value = first.state.get("exp_avg_sq")
        dtype = value.dtype if isinstance(value, Tensor) else rules.moments_dtype(first.group.optimizer, first.dtype)
        assert dtype is not None
        beta2 = rules.number(first.group.settings["betas"][1]) or 0.0
        factor = 2.0 ** -(_DIGITS[dtype] + 1) / (1 - beta2)
        which = first.group.which
        is_ours = rules.is_ours(first.group.optimizer)
        fix = "optimizer.state_dtype = torch.float32" if is_ours else _float32_moments(subject, which)
        yield Finding(
            "frozen-second-moment", severity, tuple(w.name for w in weights),
            f"Second moments of {len(weights)} tensors are {str(dtype).removeprefix('torch.')}, beta2 is {beta2:g}: "
            + how.format(f"{factor:.2g}") + ".",
            f"1 - beta2 = {1 - beta2:.2g} is below 2^-{_DIGITS[dtype] + 1} = {2.0 ** -(_DIGITS[dtype] + 1):.2g}, the least "
            f"change that rounding keeps. Step sizes follow old gradients.",
            fix, "areal-project/AReaL#1292, Nerogar/OneTrainer#1005",
        )  # fmt: skip


def _float32_moments(subject: Subject, which: int) -> str:
    name = rules.known_class(subject.optimizers[which])
    kind = name if name in ("Adam", "AdamW") else "AdamW"
    return f"optimizer = fused_l2.{kind}(optimizer.param_groups, state_dtype=torch.float32)"


def learning_rate_zero(subject: Subject) -> Iterator[Finding]:
    """learning-rate-zero."""
    trained = {id(w.group) for w in subject.weights if w.param is None or w.param.requires_grad}
    zero = [g for g in subject.groups if g.lr == 0 and id(g) in trained]
    for scheduled in (True, False):
        groups = [g for g in zero if bool(g.peak_lr) == scheduled]
        if not groups:
            continue
        value = max((g.peak_lr or 0.0 for g in subject.groups), default=0.0) or 1e-3
        yield Finding(
            "learning-rate-zero", NOTE if scheduled else DOUBTFUL, tuple(w.name for w in subject.weights if w.group in groups),
            f"lr is 0 in {len(groups)} group{'s' * (len(groups) != 1)}"
            + (", and a schedule knows a larger one." if scheduled else ", and no schedule knows another one."),
            "A step with lr 0 changes no weight and decays none, but moves the moments. "
            + ("A warm-up that starts at 0 spends its first step so." if scheduled else "Right if this group is to be frozen."),
            "; ".join(g.code("lr", f"{g.peak_lr or value:g}") for g in groups),
            "huggingface/transformers#34754, verl-project/verl#3674",
        )  # fmt: skip
