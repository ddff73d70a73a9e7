"""Param groups that decay weights and leave out biases, norm parameters and embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
Rules = str | type[nn.Module]


@dataclass(frozen=True)
class ParamRule:
    """What was decided for one parameter, and why."""

    name: str
    shape: tuple[int, ...]
    decayed: bool
    reason: str


class ParamGroups(list[dict[str, Any]]):
    """Param groups for an optimizer: the decayed parameters, then the others. ``print`` shows ``rules`` as a table."""

    def __init__(self, groups: Iterable[dict[str, Any]], rules: list[ParamRule]) -> None:
        super().__init__(groups)
        self.rules = rules

    def __str__(self) -> str:
        rows = [(r.name, str(r.shape), "yes" if r.decayed else "no", r.reason) for r in self.rules]
        rows.insert(0, ("parameter", "shape", "decayed", "why"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join((*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3])) for row in rows]
        for decayed, title in ((True, "decayed"), (False, "not decayed")):
            chosen = [r for r in self.rules if r.decayed is decayed and not r.reason.startswith("frozen")]
            count = sum(_numel(r.shape) for r in chosen)
            lines.append(f"{title}: {count:,} parameters in {len(chosen)} tensors")
        return "\n".join(lines)


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    decay: Iterable[Rules] = (),
    no_decay: Iterable[Rules] = (),
    **options: Any,
) -> ParamGroups:
    """Split a model's trainable parameters into a decayed group and one with ``weight_decay=0``.

    Left out of the decay are biases and other vectors and scalars (by shape), all parameters of normalization layers and
    embeddings (by module type: torch.nn's, and modules whose class name contains "Norm" or "Embedding"). A parameter that
    several modules share is listed once, under its first name, and left out if any of its uses says so. Frozen
    parameters (``requires_grad=False``) are in neither group. Both groups carry ``param_names``, as torch.optim's do.

    Args:
        model: any module.
        weight_decay: for the decayed group; see :func:`from_lambda`.
        decay, no_decay: rules that win over the above. A string is matched against a parameter's full name, with ``*`` and
            ``?`` as wildcards; a module type covers the parameters that such modules own. A name wins over a type.
        options: more keys for both groups, such as ``lr``.

    Returns:
        A list of one or two dicts (an empty group is left out), to be passed to an optimizer. Print it to see what is decayed
        and why.

    Example::

        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
        >>> print(fused_l2.weight_decay.param_groups(model, weight_decay=0.01))
        parameter  shape   decayed  why
        0.weight   (8, 4)  yes      weight of Linear
        0.bias     (8,)    no       bias of Linear
        1.weight   (8,)    no       normalization (LayerNorm)
        1.bias     (8,)    no       normalization (LayerNorm)
        2.weight   (2, 8)  yes      weight of Linear
        2.bias     (2,)    no       bias of Linear
        decayed: 48 parameters in 2 tensors
        not decayed: 26 parameters in 4 tensors

    Raises:
        TypeError: if ``model`` is no module or a rule is neither a string nor a module type.
        ValueError: if a rule matches nothing, or one parameter is named by both ``decay`` and ``no_decay``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups needs a torch.nn.Module, got {type(model).__name__}")
    chosen = _UserRules(decay=list(_one_or_many(decay)), no_decay=list(_one_or_many(no_decay)))

    uses: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules():
        for own_name, param in module.named_parameters(recurse=False):
            uses.setdefault(param, []).append((f"{prefix}.{own_name}" if prefix else own_name, module))

    groups: dict[bool, dict[str, Any]] = {
        True: {"params": [], "param_names": [], "weight_decay": weight_decay, **options},
        False: {"params": [], "param_names": [], "weight_decay": 0.0, **options},
    }
    rules = []
    for param, where in uses.items():
        name, shape = where[0][0], tuple(param.shape)
        decayed, reason = chosen.decide(where) or _decide(shape, where)
        if len(where) > 1:
            reason += f", shared with {', '.join(other for other, _ in where[1:])}"
        if param.requires_grad:
            groups[decayed]["params"].append(param)
            groups[decayed]["param_names"].append(name)
        else:
            decayed, reason = False, "frozen: in no group"
        rules.append(ParamRule(name, shape, decayed, reason))
    chosen.check_all_used()
    return ParamGroups([group for group in groups.values() if group["params"]], rules)


def _decide(shape: tuple[int, ...], where: list[tuple[str, nn.Module]]) -> tuple[bool, str]:
    for _, module in where:
        kind = type(module).__name__
        if isinstance(module, NORMS) or "Norm" in kind:
            return False, f"normalization ({kind})"
        if isinstance(module, EMBEDDINGS) or "Embedding" in kind:
            return False, f"embedding ({kind})"
    name, module = where[0]
    own_name, kind = name.rpartition(".")[2], type(module).__name__
    if "bias" in own_name:
        return False, f"bias of {kind}"
    if sum(size > 1 for size in shape) <= 1:
        return False, f"vector or scalar of {kind}"
    return True, f"{own_name} of {kind}"


class _UserRules:
    def __init__(self, **rules: list[Rules]) -> None:
        self._rules = [(argument == "decay", argument, rule) for argument, given in rules.items() for rule in given]
        self._used: set[int] = set()
        for _, argument, rule in self._rules:
            if not isinstance(rule, str) and not (isinstance(rule, type) and issubclass(rule, nn.Module)):
                raise TypeError(f"{argument}: expected parameter names or module types, got {rule!r}")

    def decide(self, where: list[tuple[str, nn.Module]]) -> tuple[bool, str] | None:
        by_name: dict[bool, str] = {}
        by_type: dict[bool, str] = {}
        for i, (decayed, argument, rule) in enumerate(self._rules):
            for name, module in where:
                if isinstance(rule, str) and fnmatchcase(name, rule):
                    by_name[decayed] = f"{argument}={rule!r}"
                elif not isinstance(rule, str) and isinstance(module, rule):
                    by_type[decayed] = f"{argument}={rule.__name__}"
                else:
                    continue
                self._used.add(i)
        found = by_name or by_type
        if len(found) == 2:
            raise ValueError(f"{where[0][0]} is matched by both {found[True]} and {found[False]}; narrow one of them")
        for decayed, reason in found.items():
            return decayed, reason
        return None

    def check_all_used(self) -> None:
        for i, (_, argument, rule) in enumerate(self._rules):
            if i not in self._used:
                raise ValueError(f"{argument}: {rule!r} matches no parameter of the model; remove it or correct its name")


def _one_or_many(rules: Any) -> Iterable[Rules]:
    return (rules,) if isinstance(rules, (str, type)) else rules


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
