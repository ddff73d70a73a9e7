"""How strong the decay is: coupled or not, lambda or lambda / n, too much, too little, before a normalization layer."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...weight_decay import from_lambda
from .. import rules
from ..findings import DOUBTFUL, NOTE, WRONG, Finding
from ..normalized import normalized
from ..subject import Group, Subject
from . import fixes

NOTICEABLE = 0.01  # of a weight over a whole training: less is lost among what two seeds differ by


def coupled(subject: Subject) -> Iterator[Finding]:
    """coupled-adam."""
    for which, optimizer in enumerate(subject.optimizers):
        groups = [g for g in _decaying(subject, which) if g.kind == rules.COUPLED and rules.is_adaptive(optimizer, g.settings)]
        if not groups:
            continue
        name = rules.known_class(optimizer) or "This optimizer"
        if "decoupled_weight_decay" in groups[0].settings:
            fix = "; ".join(g.code("decoupled_weight_decay", "True") for g in groups)
        else:
            fix = fixes.ours(subject, which)
        yield Finding(
            "coupled-adam", DOUBTFUL, _names(subject, groups),
            f"{name} adds weight_decay * w to the gradient, and divides it with the gradient by sqrt(v).",
            "Weights with large gradients are then decayed less, and where the penalty dominates its strength hardly matters. "
            "Right only if L2 inside Adam is meant; decay at one rate for all weights is AdamW's.",
            fix, "Loshchilov & Hutter 2019, 'Decoupled Weight Decay Regularization'; pytorch/pytorch#38767",
        )  # fmt: skip


def not_divided(subject: Subject) -> Iterator[Finding]:
    """lambda-not-divided: needs lam and n."""
    lam, n = subject.lam, subject.n
    if not lam or not n:
        return
    expected = from_lambda(lam, n)
    for same in (True, False):
        groups = [
            g for g in _decaying(subject)
            if not math.isclose(g.weight_decay or 0, expected, rel_tol=1e-6) and math.isclose(g.weight_decay or 0, lam) == same
        ]  # fmt: skip
        if not groups:
            continue
        given = groups[0].weight_decay or 0.0
        yield Finding(
            "lambda-not-divided", WRONG if same else DOUBTFUL, _names(subject, groups),
            f"weight_decay is {given:g}" + (", which is lambda" if same else "")
            + f"; for lambda = {lam:g} and n = {n:,} it is lambda / n = {expected:g}.",
            f"weight_decay is the coefficient of w in the gradient of the mean loss: {given:g} means lambda = {given * n:g}."
            + ("" if same else " Right if the loss is scaled otherwise."),
            fixes.set_decay(groups, f"fused_l2.weight_decay.from_lambda({lam:g}, n={n})"),
            "docs/weight-decay.md; MichalDanielDobrzanski/DeepLearningPython#16",
        )  # fmt: skip


def not_read(subject: Subject) -> Iterator[Finding]:
    """decay-not-read: a key that no class which is known reads."""
    found = [
        g for g in subject.groups
        if rules.RENAMED in g.settings and g.decay_key != rules.RENAMED and rules.known_class(g.optimizer) is not None
        and rules.number(g.settings[rules.RENAMED]) != g.weight_decay
    ]  # fmt: skip
    if found:
        g = found[0]
        yield Finding(
            "decay-not-read", WRONG, _names(subject, found),
            f"{rules.known_class(g.optimizer)} reads no weight_decay_rate, here {g.settings[rules.RENAMED]}: it decays by "
            f"weight_decay, which is {g.weight_decay}.",
            "Optimizers take any key in a param group, and read their own. BERT's first ones called it weight_decay_rate.",
            "; ".join(
                g.code("weight_decay", f'optimizer.param_groups[{g.index}].pop("weight_decay_rate")') for g in found
            ),
            "huggingface/transformers#525",
        )  # fmt: skip


def too_strong(subject: Subject) -> Iterator[Finding]:
    """decay-too-strong: a weight changes its sign, or is halved within an epoch."""
    over = [g for g in _decaying(subject) if g.lr is not None and (g.peak_rate or _plain(g)) > 1]
    if over:
        g = max(over, key=lambda g: g.peak_rate or _plain(g))
        yield Finding(
            "decay-too-strong", WRONG, _names(subject, over),
            f"lr * weight_decay is {g.peak_rate or _plain(g):g}: a step takes more than the whole weight and turns its sign.",
            "1 - lr * weight_decay is negative, and beyond 2 the weights grow without limit.",
            _milder(subject, over), "w <- (1 - lr * weight_decay) w; docs/weight-decay.md",
        )  # fmt: skip
    per_epoch = subject.steps_per_epoch
    if not per_epoch:
        return
    fast = [g for g in _decaying(subject) if g not in over and g.peak_rate and math.log(2) / g.peak_rate < per_epoch]
    if fast:
        g = max(fast, key=lambda g: g.peak_rate or 0)
        yield Finding(
            "decay-too-strong", DOUBTFUL, _names(subject, fast),
            f"Half of a weight decays in {math.log(2) / (g.peak_rate or 1):.3g} steps, and an epoch has {per_epoch:.3g}.",
            "The weights are an average over less than one pass over the data. Right for one-epoch trainings.",
            _milder(subject, fast),
            "Wang & Aitchison 2024, 'How to set AdamW's weight decay as you scale model and dataset size'",
        )  # fmt: skip


def without_effect(subject: Subject) -> Iterator[Finding]:
    """decay-without-effect: needs steps."""
    if not subject.steps:
        return
    weak = [g for g in _decaying(subject) if g.peak_rate is not None and g.peak_rate * subject.steps < NOTICEABLE]
    if weak:
        g = max(weak, key=lambda g: g.peak_rate or 0)
        total = (g.peak_rate or 0) * subject.steps
        yield Finding(
            "decay-without-effect", NOTE, _names(subject, weak),
            f"In {subject.steps:,} steps at the largest lr {100 * total:.2g} % of a weight decays.",
            f"Less than {100 * NOTICEABLE:g} % over the whole training: this weight_decay and 0 give the same model.",
            fixes.set_decay(weak, f"fused_l2.weight_decay.from_timescale({subject.steps}, lr={g.peak_lr:g})"),
            "Wang & Aitchison 2024: the weights average over 1 / (lr * weight_decay) steps",
        )  # fmt: skip


def before_normalization(subject: Subject) -> Iterator[Finding]:
    """decay-before-normalization."""
    found = [(w, norm) for w, norm in normalized(subject) if w.group.decays and not _corrected(w.group)]
    if found:
        first, norm = found[0]
        which, fix = first.group.which, fixes.ours(subject, first.group.which, decay_rule="corrected")
        if first.group.kind == rules.COUPLED and rules.is_adaptive(first.group.optimizer, first.group.settings):
            fix = fixes.constructor(subject, "model.parameters()", which, "fused_l2.AdamW", decay_rule="corrected")
        yield Finding(
            "decay-before-normalization", NOTE, tuple(w.name for w, _ in found),
            f"{len(found)} decayed weight{'s stand' if len(found) > 1 else ' stands'} right before a normalization layer "
            f"({first.name} before {norm}).",
            "That layer removes their scale: decay there does not regularize, it holds |w| small and the effective learning "
            "rate lr / |w|^2 large. Other weights keep the rule 'plain', in a param group of their own.",
            fix,
            "van Laarhoven 2017, 'L2 Regularization versus Batch and Weight Normalization'; Defazio 2025, arXiv 2506.02285",
        )  # fmt: skip


def _corrected(group: Group) -> bool:
    return rules.is_ours(group.optimizer) and group.optimizer._stepper.options.decay_rule_of(group.index).name == "CORRECTED"


def _plain(group: Group) -> float:
    if rules.is_ours(group.optimizer) and group.peak_rate is not None:
        return group.peak_rate
    return (group.peak_lr or 0.0) * (group.weight_decay or 0.0)


def _decaying(subject: Subject, which: int | None = None) -> list[Group]:
    return [g for g in subject.groups if g.decays and (which is None or g.which == which)]


def _names(subject: Subject, groups: list[Group]) -> tuple[str, ...]:
    return tuple(w.name for w in subject.weights if w.group in groups)


def _milder(subject: Subject, groups: list[Group]) -> str:
    """A decay over 20 epochs, or 10,000 steps where no epoch is known."""
    lines = []
    for g in groups:
        lr = g.peak_lr or 1.0
        if subject.lam and subject.n:
            value = f"fused_l2.weight_decay.from_lambda({subject.lam:g}, n={subject.n})"
        elif subject.steps_per_epoch:
            value = f"fused_l2.weight_decay.from_timescale(20, lr={lr:g}, batch_size={subject.batch_size}, n={subject.n})"
        else:
            value = f"fused_l2.weight_decay.from_timescale(10_000, lr={lr:g})"
        lines.append(g.code(g.decay_key, value))
    return "; ".join(lines)
