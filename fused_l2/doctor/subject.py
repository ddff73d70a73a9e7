"""What is examined, as plain facts: every tensor of every param group, its names and owners, its state. Reads only."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ..weight_decay.param_groups import EMBEDDINGS, NORMS
from . import rules

Use = tuple[str, nn.Module]  # the full name of a parameter, the module that owns it


@dataclass(frozen=True, eq=False)
class Group:
    """A param group, with its numbers as floats."""

    optimizer: Any
    which: int  # of the optimizers examined
    index: int
    settings: Mapping[str, Any]
    lr: float | None
    peak_lr: float | None  # the largest lr that the group knows of: a schedule's initial or largest one
    weight_decay: float | None  # None: it has none
    kind: str | None  # coupled, decoupled; None: not known
    rate: float | None  # the share of a weight that goes at each step
    peak_rate: float | None
    how: str | None  # which implementation steps it

    @property
    def decays(self) -> bool:
        return bool(self.weight_decay)

    @property
    def decay_key(self) -> str:
        return rules.decay_key(self.optimizer, self.settings)

    def code(self, key: str, value: str) -> str:
        """Python that sets a key of this group."""
        return f'optimizer.param_groups[{self.index}]["{key}"] = {value}'


@dataclass(eq=False)
class Weight:
    """A tensor that an optimizer steps."""

    name: str
    group: Group
    position: int
    param: Tensor | None  # None in a checkpoint
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    device: torch.device | None
    state: Mapping[str, Any]
    uses: list[Use] = field(default_factory=list)

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def role(self) -> str | None:
        """norm, embedding, bias, vector or matrix, as :func:`fused_l2.weight_decay.param_groups` sees it; None: not known."""
        thin = sum(size > 1 for size in self.shape) <= 1
        for _, module in self.uses:
            kind = type(module).__name__
            if isinstance(module, NORMS) or ("Norm" in kind and thin):
                return "norm"
        for _, module in self.uses:
            if isinstance(module, EMBEDDINGS) or "Embedding" in type(module).__name__:
                return "embedding"
        own = self.name.rpartition(".")[2]
        if "bias" in own:
            return "bias"
        if thin:
            return "vector" if self.uses else None
        return "matrix" if self.uses else None


@dataclass(eq=False)
class Subject:
    """All that the checks look at."""

    optimizers: list[Any]
    groups: list[Group]
    weights: list[Weight]
    model: nn.Module | None
    roots: list[tuple[str, nn.Module]]  # the modules that parameters were found in, the model first
    named: list[tuple[str, Tensor]]  # every parameter of those modules, once
    others: list[Any]  # other live optimizers
    owned: set[int]  # ids of all parameters that a live module owns
    n: int | None = None
    lam: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    unknown: list[str] = field(default_factory=list)

    @property
    def steps_per_epoch(self) -> float | None:
        return self.n / self.batch_size if self.n and self.batch_size else None

    def held(self) -> set[int]:
        """ids of the parameters that the optimizers examined hold."""
        return {id(w.param) for w in self.weights if w.param is not None}


def unwrapped(optimizer: Any) -> Any:
    """What a wrapper (Accelerate, Lightning) wraps."""
    inner = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_optimizer", None)
    return inner if isinstance(inner, Optimizer) and inner is not optimizer else optimizer


def collect(optimizers: Sequence[Any], model: nn.Module | None) -> Subject:
    """The facts about these optimizers. With no model, modules are looked for among live objects."""
    modules, found = _live()
    roots = [("", model)] if model is not None else list(_roots(optimizers, modules))
    uses: dict[int, list[Use]] = {}
    named: dict[int, tuple[str, Tensor]] = {}
    for prefix, root in roots:
        for name, module in root.named_modules(prefix=prefix):
            for own_name, param in module._parameters.items():
                if param is None:
                    continue
                full = _clean(f"{name}.{own_name}" if name else own_name)
                uses.setdefault(id(param), []).append((full, module))
                named.setdefault(id(param), (full, param))
    owned = {id(p) for module in modules for p in module._parameters.values() if p is not None} | set(named)
    elsewhere: dict[int, Use] = {}  # owners outside of the model, for their type only
    if model is not None:
        for module in modules:
            for own_name, param in module._parameters.items():
                if param is not None and id(param) not in named:
                    elsewhere.setdefault(id(param), (own_name, module))
    groups, weights = [], []
    for which, optimizer in enumerate(optimizers):
        for index, settings in enumerate(optimizer.param_groups):
            group = make_group(optimizer, which, index, settings)
            groups.append(group)
            names = settings.get("param_names")
            for position, param in enumerate(settings["params"]):
                where = uses.get(id(param)) or []
                name = where[0][0] if where else names[position] if names else f"{index}.{position}"
                if len(optimizers) > 1 and not where and not names:
                    name = f"{which}.{name}"
                state = optimizer.state.get(param, {}) if hasattr(optimizer, "state") else {}
                foreign = [(name, elsewhere[id(param)][1])] if not where and id(param) in elsewhere else []
                weights.append(
                    Weight(
                        str(name), group, position, param, tuple(param.shape), param.dtype, param.device,
                        state if isinstance(state, Mapping) else {}, where or foreign,
                    )
                )  # fmt: skip
    examined = {id(o) for o in optimizers}
    others = [o for o in found if id(o) not in examined and not _wraps(o, optimizers)]
    del found
    held = {id(w.param) for w in weights}
    if any(id(p) in held for o in others for group in o.param_groups for p in group["params"]):
        others = _without_garbage(others)
    subject = Subject(list(optimizers), groups, weights, model, roots, list(named.values()), others, owned)
    for optimizer in optimizers:
        if rules.known_class(optimizer) is None:
            subject.unknown.append(
                f"{type(optimizer).__module__}.{type(optimizer).__qualname__} is no class that is known here: examined is what "
                f"its param groups and states show. How it decays, where it rounds and how fast it is are not."
            )
            if any({rules.RENAMED, "weight_decay"} <= set(group) for group in optimizer.param_groups):
                subject.unknown.append(
                    f"Groups have weight_decay_rate and weight_decay. Which of them {type(optimizer).__qualname__} reads is "
                    f"not known; weight_decay is shown."
                )
    if not any(w.uses for w in weights):
        subject.unknown.append(
            "No live module owns these parameters: tensors are named by group and position, and what they are for is not known."
        )
    return subject


def make_group(optimizer: Any, which: int, index: int, settings: Mapping[str, Any]) -> Group:
    lr = rules.number(settings.get("lr"))
    known = [rules.number(settings.get(key)) for key in ("lr", "initial_lr", "max_lr")]
    decay_key = rules.decay_key(optimizer, settings)
    peak = max((value for value in known if value is not None), default=None)
    return Group(
        optimizer, which, index, settings, lr, peak,
        rules.number(settings[decay_key]) if decay_key in settings else None,
        rules.decay_kind(optimizer, settings),
        rules.decay_rate(optimizer, index, settings, lr), rules.decay_rate(optimizer, index, settings, peak),
        rules.implementation(optimizer, settings),
    )  # fmt: skip


def _live() -> tuple[list[nn.Module], list[Any]]:
    """Modules and optimizers that are alive. By type(): an object's __class__ may be a property with effects."""
    modules: list[nn.Module] = []
    optimizers = []
    things = gc.get_objects()
    kinds = set(map(type, things))
    module_kinds = {kind for kind in kinds if issubclass(kind, nn.Module)}
    optimizer_kinds = {kind for kind in kinds if issubclass(kind, Optimizer)}
    wanted = module_kinds | optimizer_kinds
    for thing in [thing for thing in things if type(thing) in wanted]:
        if type(thing) in module_kinds:
            if "_parameters" in thing.__dict__ and "_modules" in thing.__dict__:
                modules.append(thing)
        elif "param_groups" in thing.__dict__:
            optimizers.append(thing)
    return modules, optimizers


def _roots(optimizers: Sequence[Any], modules: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost live modules that own one of the parameters."""
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    owners = [m for m in modules if any(id(p) in held for p in m._parameters.values() if p is not None)]
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in module._modules.values():
            if child is not None:
                parents.setdefault(id(child), []).append(module)
    reached: dict[int, nn.Module] = {}
    todo = list(owners)
    while todo:
        module = todo.pop()
        if id(module) not in reached:
            reached[id(module)] = module
            todo += parents.get(id(module), [])
    for module in modules:  # in the order in which they were made
        if id(module) in reached and id(module) not in parents:
            yield "", module


def _clean(name: str) -> str:
    """A name as the user's model has it: without the prefixes of wrappers."""
    for prefix in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(prefix, "")
    return name.removeprefix("module.")


def _wraps(other: Any, optimizers: Sequence[Any]) -> bool:
    """Whether another optimizer is one object with one of these: a wrapper of it, or what it wraps."""

    def refers(holder: Any, to: Any) -> bool:
        values = list(vars(holder).values())
        values += [inner for value in values if isinstance(value, (list, tuple)) for inner in value]
        return any(value is to for value in values)

    return any(other.param_groups is one.param_groups or refers(other, one) or refers(one, other) for one in optimizers)


def _without_garbage(others: list[Any]) -> list[Any]:
    """Those that are more than a circle nobody refers to, which an optimizer with a scheduler leaves. Empties the list."""
    references = [weakref.ref(other) for other in others]
    others.clear()
    gc.collect()
    return [other for reference in references if (other := reference()) is not None]
