"""Slow steps, and implementations of torch with a known fault, which is tried on tensors of our own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from ...parameters.shards import is_dtensor
from .. import rules
from ..findings import NOTE, WRONG, Finding
from ..subject import Subject, Weight
from . import fixes

MANY_GROUPS = 100  # a call of some ten microseconds of the host for each
MANY_TENSORS = 20  # below, nobody notices a loop


def many_launches(subject: Subject) -> Iterator[Finding]:
    """many-small-launches."""
    for which, optimizer in enumerate(subject.optimizers):
        groups = [g for g in subject.groups if g.which == which]
        if len(groups) < MANY_GROUPS or rules.is_ours(optimizer):
            continue
        distinct = len({tuple(sorted((k, str(v)) for k, v in g.settings.items() if k not in ("params", "param_names", "name")))
                        for g in groups})  # fmt: skip
        yield Finding(
            "many-small-launches", NOTE, (),
            f"{len(groups)} param groups with {distinct} different settings: a step launches for each group.",
            "Groups are stepped one after another, and nothing is gained from foreach or fused within a group of one tensor.",
            fixes.ours(subject, which), "roboflow/rf-detr#1409, open-mmlab/mmengine#909",
        )  # fmt: skip


def slow(subject: Subject) -> Iterator[Finding]:
    """slow-implementation."""
    for which in range(len(subject.optimizers)):
        of = [w for w in subject.weights if w.group.which == which and w.param is not None]
        if len(of) < MANY_TENSORS:
            continue
        shards = [w for w in of if is_dtensor(w.param) and _how(w) in (rules.LOOP, rules.FOREACH, rules.FUSED)]
        loop = [w for w in of if _how(w) == rules.LOOP and w.device is not None and w.device.type == "cpu" and w not in shards]
        if shards:
            yield Finding(
                "slow-implementation", NOTE, (),
                f"{_how(shards[0])} on {len(shards)} DTensors: every operation on each goes through DTensor's dispatch.",
                "The host takes tens of microseconds for each, and devices wait for it.",
                fixes.ours(subject, which), "pytorch/pytorch#134191; docs/distributed.md",
            )  # fmt: skip
        if loop:
            yield Finding(
                "slow-implementation", NOTE, (),
                f"torch.optim steps {len(loop)} CPU tensors in a Python loop, several passes over memory for each.",
                "fused=True makes one pass, and so does fused_l2.",
                fixes.ours(subject, which), "docs/performance.md; deepmodeling/deepmd-kit#4463",
            )  # fmt: skip


def known_broken(subject: Subject) -> Iterator[Finding]:
    """known-broken."""
    for which, optimizer in enumerate(subject.optimizers):
        if rules.known_class(optimizer) != "SGD" or rules.is_ours(optimizer):
            continue
        of = [w for w in subject.weights if w.group.which == which and w.param is not None]
        on_cpu = [w for w in of if w.device is not None and w.device.type == "cpu"]
        halves = [w for w in on_cpu if _how(w) == rules.FUSED and w.dtype in _HALVES and w.numel >= 8]
        if halves and any(_fused_sgd_skips(w.dtype) for w in halves):
            yield Finding(
                "known-broken", WRONG, tuple(w.name for w in halves),
                f"SGD(fused=True) of torch {torch.__version__} leaves most elements of 16-bit CPU tensors as they are.",
                "Whole vectors are skipped; only the last few elements of a tensor are stepped.",
                fixes.ours(subject, which), "pytorch/pytorch#191763",
            )  # fmt: skip
        nesterov = [
            w for w in of
            if _how(w) == rules.FOREACH and w.group.settings.get("nesterov") and not w.group.decays
            and not w.group.settings.get("maximize")
        ]  # fmt: skip
        if nesterov and _foreach_changes_gradients():
            yield Finding(
                "known-broken", NOTE, tuple(w.name for w in nesterov),
                f"SGD(foreach=True, nesterov=True) of torch {torch.__version__} changes .grad when there is no weight decay.",
                "Whoever looks at gradients after step(), or accumulates into them, sees the update instead.",
                fixes.ours(subject, which), "torch.optim.sgd, _multi_tensor_sgd: grads are changed in place",
            )  # fmt: skip


_HALVES = (torch.bfloat16, torch.float16)


def _how(weight: Weight) -> str | None:
    return weight.group.how


def _stepped(dtype: Any, **arguments: Any) -> tuple[Any, Any]:
    param = torch.nn.Parameter(torch.ones(64, dtype=dtype, device="cpu"))
    param.grad = torch.ones(64, dtype=dtype, device="cpu")
    torch.optim.SGD([param], lr=0.5, **arguments).step()
    return param.detach(), param.grad


@cache
def _fused_sgd_skips(dtype: Any) -> bool:
    return not bool((_stepped(dtype, fused=True)[0] == 0.5).all())


@cache
def _foreach_changes_gradients() -> bool:
    return not bool((_stepped(torch.float32, foreach=True, momentum=0.5, nesterov=True)[1] == 1).all())
