"""Which tensors are decayed: biases, norms and embeddings that are, matrices that are not."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import nn

from ..findings import DOUBTFUL, NOTE, WRONG, Finding
from ..subject import Subject, Weight
from . import fixes

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)
_WHY = {
    "bias": "A bias shifts a function and makes it no rougher; decay pulls it to 0 all the same",
    "norm": "The scale and shift of a normalization layer set the size of its output; decay pulls both to 0",
}
_SOURCE = {
    "bias": "He et al. 2019, 'Bag of Tricks for Image Classification', section 3.1",
    "norm": "He et al. 2019, 'Bag of Tricks for Image Classification', section 3.1; karpathy/minGPT#23",
}


def decayed(subject: Subject) -> Iterator[Finding]:
    """decayed-bias, decayed-norm, decayed-embedding."""
    chosen: dict[str, list[Weight]] = {"bias": [], "norm": [], "embedding": []}
    declared = []
    told = set(_no_weight_decay(subject))
    for weight in subject.weights:
        if not weight.group.decays or not _trains(weight):
            continue
        if any(fnmatchcase(weight.name, name) or weight.name.endswith(f".{name}") for name in told):
            declared.append(weight)
        elif weight.role in chosen:
            chosen[weight.role or ""].append(weight)
    fix = _fix(subject)
    for role in ("bias", "norm"):
        if found := chosen[role]:
            yield Finding(
                f"decayed-{role}", DOUBTFUL, _names(found),
                f"{_count(found)} of {'biases' if role == 'bias' else 'normalization layers'} decayed, {_rates(found)}.",
                f"{_WHY[role]}. Right if the recipe was tuned with it, as many for ResNets were.",
                fix, _SOURCE[role],
            )  # fmt: skip
    if found := chosen["embedding"]:
        sparse = [w for w in found if any(getattr(module, "sparse", False) for _, module in w.uses)]
        yield Finding(
            "decayed-embedding", DOUBTFUL if sparse else NOTE, _names(found),
            f"{_count(found)} of embeddings decayed, {_rates(found)}.",
            "A row is trained when its token occurs and decays at every step between: rare tokens shrink. Common all the same: "
            "GPT-2's and Hugging Face's recipes do it.",
            fix, "karpathy/minGPT#24; Lightning-AI/lit-llama#254",
        )  # fmt: skip
    if declared:
        yield Finding(
            "decayed-embedding", WRONG, _names(declared),
            f"{_count(declared)} decayed, {_rates(declared)}, which the model's own no_weight_decay() lists as not to be.",
            "The model says what to leave out, and the optimizer was made without asking it.",
            fix.replace("weight_decay=", f"no_decay={sorted(_full_names(declared))!r}, weight_decay=", 1),
            "graphnet-team/graphnet#713",
        )  # fmt: skip


def undecayed(subject: Subject) -> Iterator[Finding]:
    """undecayed-weight."""
    told = set(_no_weight_decay(subject))
    matrices = [w for w in subject.weights if _is_layers(w) and _trains(w)]
    left_out = [
        w for w in matrices
        if w.group.weight_decay == 0 and not any(w.name.endswith(name) for name in told) and w.role == "matrix"
    ]  # fmt: skip
    if not left_out:
        return
    decayed_matrices = [w for w in matrices if w.group.decays]
    thin = [w for w in subject.weights if w.group.decays and w.role in ("bias", "norm")]
    if not decayed_matrices and thin:
        yield Finding(
            "undecayed-weight", WRONG, _names(left_out),
            f"Biases or norms are decayed ({_names(thin)[0]}, ...) and no weight matrix is.",
            "Decay is meant for matrices: the two groups have each other's weight_decay.",
            _fix(subject), "facebookresearch/BalancingGroups#6",
        )  # fmt: skip
        return
    if not decayed_matrices:
        return
    # Whole groups of matrices without decay are a rule of somebody's: a head, an adapter, a decoder. Single ones, beside biases
    # and norms, are not.
    kinds = {(w.group.which, type(w.uses[0][1]).__name__) for w in decayed_matrices}
    thin = [w for w in subject.weights if w.role in ("bias", "norm", "vector") and w.group.weight_decay == 0]
    beside = {(w.group.which, w.group.index) for w in thin}
    found = [
        w for w in left_out
        if (w.group.which, type(w.uses[0][1]).__name__) in kinds and (w.group.which, w.group.index) in beside
    ]  # fmt: skip
    if found:
        yield Finding(
            "undecayed-weight", DOUBTFUL, _names(found),
            f"{_count(found)} not decayed, in a group with biases and norms, while other matrices of the same kind are "
            f"({_names(decayed_matrices)[0]}, ...).",
            "A matrix among what is left out is often there because a name matched by accident. Right if a rule says so.",
            _fix(subject), "docs/weight-decay.md, 'What to leave out'",
        )  # fmt: skip


def _no_weight_decay(subject: Subject) -> Iterator[str]:
    """What the modules say of themselves, as timm's do: full names or their ends."""
    for _, root in subject.roots:
        for name, module in root.named_modules():
            own = getattr(type(module), "no_weight_decay", None)
            if callable(own) and not isinstance(own, property):
                try:
                    told = module.no_weight_decay()
                except Exception:
                    continue
                for entry in told if isinstance(told, (set, list, tuple, frozenset, dict)) else ():
                    yield f"{name}.{entry}" if name else str(entry)


def _is_layers(weight: Weight) -> bool:
    return weight.role == "matrix" and any(isinstance(m, _LAYERS) or type(m).__name__ == "Conv1D" for _, m in weight.uses)


def _trains(weight: Weight) -> bool:
    return weight.param is None or weight.param.requires_grad


def _names(weights: list[Weight]) -> tuple[str, ...]:
    return tuple(w.name for w in weights)


def _full_names(weights: list[Weight]) -> set[str]:
    return {name for w in weights for name, _ in w.uses} or set(_names(weights))


def _count(weights: list[Weight]) -> str:
    return f"{len(weights)} tensor{'s' * (len(weights) != 1)}"


def _rates(weights: list[Weight]) -> str:
    decays = sorted({w.group.weight_decay or 0.0 for w in weights})
    return f"weight_decay {' and '.join(f'{d:g}' for d in decays[:3])}"


def _fix(subject: Subject) -> str:
    largest = max((g.weight_decay or 0.0 for g in subject.groups), default=0.0)
    return fixes.constructor(subject, fixes.DECAY_GROUPS.format(f"{largest:g}"))
