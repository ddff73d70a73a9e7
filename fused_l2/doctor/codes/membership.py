"""Which tensors the optimizer holds: missing ones, those held twice, frozen, tied, or of a model that is gone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...parameters.shards import local
from ..findings import DOUBTFUL, NOTE, WRONG, Finding
from ..subject import Subject, Weight
from . import fixes


def not_optimized(subject: Subject) -> Iterator[Finding]:
    """not-optimized: trainable, and in no optimizer that is alive; or out of reach of parameters()."""
    held = subject.held() | {id(p) for o in subject.others for group in o.param_groups for p in group["params"]}
    left_out = [(name, p) for name, p in subject.named if p.requires_grad and id(p) not in held]
    if left_out and subject.weights:
        with_grad = [name for name, p in left_out if p.grad is not None]
        names = tuple(name for name, _ in left_out)
        yield Finding(
            "not-optimized", DOUBTFUL, names,
            f"{len(names)} tensor{'s' * (len(names) != 1)} of the model with requires_grad=True in no optimizer"
            + (f"; gradients were computed for {len(with_grad)} of them." if with_grad else "."),
            "They keep their initial values. Right if they are meant to; then requires_grad_(False) says so, and saves their "
            "gradients.",
            'optimizer.add_param_group({"params": [p for n, p in model.named_parameters() if n in '
            + fixes.set_of(names) + "]})",
            "zjunlp/HVPNeT#5",
        )  # fmt: skip
    for path, kind, params in _hidden(subject, held):
        yield Finding(
            "not-optimized", WRONG, tuple(f"{path}[{i}]" for i in range(params)),
            f"{path} is a plain {kind} that holds modules or parameters: model.parameters() does not see them.",
            "Nothing trains, moves or saves what is in it.",
            _registered(path, kind), "pytorch/pytorch#59925, #72580",
        )  # fmt: skip


def twice(subject: Subject) -> Iterator[Finding]:
    """optimized-twice."""
    seen: dict[int, Weight] = {}
    again = []
    for weight in subject.weights:
        if id(weight.param) in seen and weight.param is not None:
            again.append(weight)
        seen.setdefault(id(weight.param), weight)
    if again:
        g = again[0].group
        inside = all(w.group is seen[id(w.param)].group for w in again)
        lists = f"optimizer.param_groups[{g.index}]"
        fix = f'{lists}["params"] = list(dict.fromkeys({lists}["params"]))'
        if not inside:
            held = f'{{id(q) for h in optimizer.param_groups[:{g.index}] for q in h["params"]}}'
            fix = f'{lists}["params"] = [p for p in {lists}["params"] if id(p) not in {held}]'
        yield Finding(
            "optimized-twice", WRONG, tuple(w.name for w in again),
            f"{len(again)} tensor{'s' * (len(again) != 1)} listed more than once: every step steps and decays it as often.",
            "Its learning rate and decay are a multiple of what the groups say.",
            fix, "pytorch/pytorch#40967",
        )  # fmt: skip
    for other in subject.others:
        shared = [w for w in subject.weights if w.param is not None and _is_stepped_by(other, w.param)]
        if shared:
            yield Finding(
                "optimized-twice", DOUBTFUL, tuple(w.name for w in shared),
                f"Another live optimizer, {type(other).__name__}, holds {len(shared)} of these tensors and has stepped them.",
                "Two optimizers then move and decay the same weights. Right if the other one is done, or they take turns.",
                "del the other optimizer, or leave these tensors out of it", "paiml/entrenar#314",
            )  # fmt: skip


def frozen(subject: Subject) -> Iterator[Finding]:
    """frozen-parameter."""
    weights = [w for w in subject.weights if w.param is not None and not w.param.requires_grad]
    fix = fixes.constructor(subject, "[p for p in model.parameters() if p.requires_grad]")
    if stepped := [w for w in weights if w.param is not None and w.param.grad is not None]:
        yield Finding(
            "frozen-parameter", WRONG, tuple(w.name for w in stepped),
            f"{len(stepped)} tensors with requires_grad=False still have a gradient: the next step moves and decays them.",
            "A step looks at .grad, not at requires_grad. They were frozen after a backward pass.",
            fix, "neuralmagic/sparseml#965",
        )  # fmt: skip
    if idle := [w for w in weights if w not in stepped]:
        yield Finding(
            "frozen-parameter", NOTE, tuple(w.name for w in idle),
            f"{len(idle)} tensors of the optimizer have requires_grad=False: they get no gradient and no step.",
            "Harmless if they are meant to be frozen; a model that was frozen again on resuming looks the same.",
            fix, "Lightning-AI/pytorch-lightning#21901",
        )  # fmt: skip


def foreign(subject: Subject) -> Iterator[Finding]:
    """foreign-parameter."""
    if not subject.named:
        return
    inside = {id(p) for _, p in subject.named}
    outside = [w for w in subject.weights if w.param is not None and id(w.param) not in inside]
    unowned = [w for w in outside if id(w.param) not in subject.owned]
    if not unowned:
        return
    held = subject.held()
    missing = [(name, p) for name, p in subject.named if p.requires_grad and id(p) not in held]
    none_left = len(outside) == len(subject.weights)
    # Made anew: the model has a tensor of that name, or of as many dimensions, that nobody steps.
    replaced = [w for w in unowned if any(name == w.name or p.dim() == len(w.shape) for name, p in missing)]
    gone = unowned if none_left else replaced
    # Where modules were looked for, others of theirs may be trained otherwise. Replaced is then what fits one for one.
    if subject.model is None and sorted(p.dim() for _, p in missing) != sorted(len(w.shape) for w in unowned):
        return
    if gone:
        yield Finding(
            "foreign-parameter", WRONG, tuple(w.name for w in gone),
            ("None of the tensors is the model's" if none_left else f"{len(gone)} tensors are no longer the model's")
            + f"; the model has {len(missing)} trainable ones that are not stepped.",
            "The model was rebuilt, resized, wrapped or loaded after the optimizer was made: the optimizer steps what is left "
            "of the old one.",
            fixes.constructor(subject, "model.parameters()"),
            "huggingface/transformers#3532, huggingface/accelerate#3209, microsoft/nni#4521",
        )  # fmt: skip
    if rest := [w for w in unowned if w not in gone]:
        yield Finding(
            "foreign-parameter", NOTE, tuple(w.name for w in rest),
            f"{len(rest)} tensors of the optimizer belong to no live module.",
            "Right for tensors that are trained by themselves, such as a temperature.",
            fixes.constructor(subject, "model.parameters()"), "docs/doctor.md",
        )  # fmt: skip


def tied(subject: Subject) -> Iterator[Finding]:
    """tied-in-two-groups: one memory, several parameters."""
    at: dict[tuple[Any, ...], list[Weight]] = {}
    for weight in subject.weights:
        param = weight.param
        if param is None or param.is_meta or not weight.numel:
            continue
        here = local(param)
        if type(here) not in (Tensor, nn.Parameter) or here.layout is not torch.strided or not here.numel():
            continue
        at.setdefault((here.device, here.data_ptr()), []).append(weight)
    for weights in at.values():
        different = list({id(w.param): w for w in weights}.values())
        if len(different) < 2:
            continue
        first, *others = different
        owner = "; ".join(
            f'setattr(model.get_submodule("{w.name.rpartition(".")[0]}"), "{w.name.rpartition(".")[2]}", '
            f'model.get_parameter("{first.name}"))'
            for w in others
        )
        yield Finding(
            "tied-in-two-groups", WRONG, tuple(w.name for w in different),
            f"{len(different)} parameters are one memory, each with its own gradient and state.",
            "A step moves and decays the memory once for each, with moments that know half of the gradient. Tied weights are "
            "one Parameter.",
            f"{owner}; {fixes.constructor(subject, 'model.parameters()')}", "pytorch/pytorch#188346",
        )  # fmt: skip


def _is_stepped_by(optimizer: Any, param: Tensor) -> bool:
    return dict.__contains__(optimizer.state, param) and bool(optimizer.state[param]) and any(
        p is param for group in optimizer.param_groups for p in group["params"]
    )  # fmt: skip


def _hidden(subject: Subject, held: set[int]) -> Iterator[tuple[str, str, int]]:
    """Lists, tuples and dicts of a module that hold modules or parameters which it does not own and nobody steps."""
    inside = {id(p) for _, p in subject.named}
    for _, root in subject.roots:
        for prefix, module in root.named_modules():
            for name, value in vars(module).items():
                if name.startswith("_") or type(value) not in (list, tuple, dict):
                    continue
                things = list(value.values() if isinstance(value, dict) else value)
                params = [
                    p for thing in things if isinstance(thing, (nn.Module, nn.Parameter))
                    for p in (thing.parameters() if isinstance(thing, nn.Module) else [thing])
                ]  # fmt: skip
                lost = [p for p in params if p.requires_grad and id(p) not in held and id(p) not in inside]
                if lost:
                    yield (f"{prefix}.{name}" if prefix else name), type(value).__name__, len(things)


def _registered(path: str, kind: str) -> str:
    container = "ModuleDict" if kind == "dict" else "ModuleList"
    return (
        f"model.{path} = torch.nn.{container}(model.{path}); "
        f'optimizer.add_param_group({{"params": list(model.{path}.parameters())}})'
    )
