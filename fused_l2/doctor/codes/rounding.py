"""Decay and updates that 16-bit weights swallow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..findings import DOUBTFUL, NOTE, WRONG, Finding
from ..precision import Rounding
from ..subject import Subject, Weight
from . import fixes

MOST, SOME = 0.5, 0.9  # of the decay: below the one it is lost, above the other the rest is less than tuning resolves


def lost(
    subject: Subject, rounded: Mapping[Weight, Rounding | None], measured: Mapping[Weight, tuple[float, float]]
) -> Iterator[Finding]:
    """decay-lost-in-rounding, update-lost-in-rounding. ``measured``: decay asked and arrived at the last step."""
    known = [
        (w, r) for w, r in rounded.items() if r is not None and w.param is not None and w.param.requires_grad and w.group.lr
    ]
    decay = [(w, r.decay) for w, r in known if r.decay is not None and w.group.decays]
    halves = [(w, share) for w, share in decay if w.dtype in (torch.bfloat16, torch.float16)]
    if found := [(w, share) for w, share in halves if share < SOME]:
        asked = sum(share * w.numel for w, share in found) / sum(w.numel for w, _ in found)
        w = found[0][0]
        yield Finding(
            "decay-lost-in-rounding", WRONG if asked < MOST else DOUBTFUL, tuple(w.name for w, _ in found),
            f"{100 * max(asked, 0.0):.0f} % of the decay of {len(found)} {_short(w.dtype)} tensors will arrive."
            + _at_the_last_step([measured[w] for w, _ in found if w in measured]),
            f"A step takes {(w.group.lr or 0) * (w.group.weight_decay or 0):.2g} of each weight, less than half the gap to the "
            f"next {_short(w.dtype)} number, and updates carry no more than this across it.",
            _float32(subject, w), "Nerogar/OneTrainer#996; docs/low-precision.md",
        )  # fmt: skip
    if found := [(w, share) for w, share in decay if w.dtype is torch.float32 and share < MOST]:
        w = found[0][0]
        yield Finding(
            "decay-lost-in-rounding", NOTE, tuple(w.name for w, _ in found),
            f"1 - lr * weight_decay is 1 in float32 for {len(found)} tensors: nothing of the decay arrives.",
            "lr * weight_decay is below 2^-25. As a decay of that size takes tens of millions of steps, little is lost.",
            fixes.set_decay(list({id(w.group): w.group for w, _ in found}.values()), "0.0"), "pytorch/pytorch#64475",
        )  # fmt: skip
    still = [(w, r.updates) for w, r in known if r.updates is not None and w.dtype in (torch.bfloat16, torch.float16)]
    if found := [(w, moved) for w, moved in still if moved < MOST]:
        moved = sum(m * w.numel for w, m in found) / sum(w.numel for w, _ in found)
        w = found[0][0]
        yield Finding(
            "update-lost-in-rounding", WRONG if moved < 0.1 else DOUBTFUL, tuple(w.name for w, _ in found),
            f"An update of the usual size changes {100 * moved:.0f} % of the elements of {len(found)} {_short(w.dtype)} "
            f"tensors.",
            f"Steps of about lr = {w.group.lr:.2g} are less than half the gap between {_short(w.dtype)} numbers of the size of "
            f"these weights, and are rounded away.",
            _float32(subject, w), "vllm-project/speculators#765; docs/low-precision.md",
        )  # fmt: skip


def _at_the_last_step(sums: list[tuple[float, float]]) -> str:
    if not sums:
        return ""
    return f" At the last step {100 * sum(arrived for _, arrived in sums) / sum(asked for asked, _ in sums):.0f} % of it did."


def _float32(subject: Subject, weight: Weight) -> str:
    mode = "remainder" if weight.dtype is torch.bfloat16 else "master"
    return fixes.ours(subject, weight.group.which, low_precision=mode)


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
