"""Param groups that decay weights and leave out biases, norm parameters and embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from .. import _html
from ..options import NAMES, did_you_mean
from .conversion import checked

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
LAYERS = (nn.Linear, nn.Bilinear, _ConvNd)
Rules = str | type[nn.Module] | nn.Module
_T = TypeVar("_T")

# Keys that optimizers and schedulers of torch know, besides what users make up.
_KEYS = (
    *("lr", "betas", "eps", "momentum", "dampening", "nesterov", "amsgrad", "maximize", "foreach", "fused", "capturable"),
    *("differentiable", "decoupled_weight_decay", "alpha", "rho", "initial_lr", "max_lr", "min_lr", "base_momentum"),
    *("max_momentum", "swa_lr"),
)
# What other libraries call what no_decay says, and words for it that come to mind.
_OTHER_WORDS = (
    *("exclude", "excluded", "exclude_from_weight_decay", "ignore", "skip", "skip_list", "no_weight_decay"),
    *("no_weight_decay_list", "no_wd", "not_decayed", "undecayed"),
)

_HEADER = ("parameter", "shape", "decayed", "why")


@dataclass(frozen=True)
class ParamRule:
    """What was decided for one parameter, and why."""

    name: str
    shape: tuple[int, ...]
    decayed: bool
    reason: str


class ParamGroups(list[dict[str, Any]]):
    """Param groups for an optimizer: a list of the decayed parameters' group, then the others'. It shows itself as a table of
    its ``rules``. Those of two parts of a model added up, ``a + b``, have the rules of both."""

    def __init__(self, groups: Iterable[dict[str, Any]], rules: list[ParamRule]) -> None:
        super().__init__(groups)
        self.rules = rules

    @overload  # type: ignore[override]
    def __add__(self, other: ParamGroups) -> ParamGroups: ...
    @overload
    def __add__(self, other: list[dict[str, Any]]) -> list[dict[str, Any]]: ...
    @overload
    def __add__(self, other: list[_T]) -> list[dict[str, Any] | _T]: ...
    def __add__(self, other: list[Any]) -> list[Any]:
        added = super().__add__(other)
        return ParamGroups(added, self.rules + other.rules) if isinstance(other, ParamGroups) else added

    def __iadd__(self, other: Iterable[dict[str, Any]]) -> ParamGroups:  # type: ignore[override, misc]
        if isinstance(other, ParamGroups):
            self.rules = self.rules + other.rules
        return super().__iadd__(other)

    def __repr__(self) -> str:
        rows = [_HEADER, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join((*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3])) for row in rows]
        return "\n".join((*lines, *self._totals()))

    def _repr_html_(self) -> str:
        return _html.table(_HEADER, self._rows()) + "".join(f"<p>{total}</p>" for total in self._totals())

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [(r.name, str(r.shape), "yes" if r.decayed else "no", r.reason) for r in self.rules]

    def _totals(self) -> list[str]:
        totals = []
        for decayed, title in ((True, "decayed"), (False, "not decayed")):
            chosen = [r for r in self.rules if r.decayed is decayed and not r.reason.startswith("frozen")]
            count = sum(_numel(r.shape) for r in chosen)
            totals.append(f"{title}: {count:,} parameters in {len(chosen)} tensor{'s' * (len(chosen) != 1)}")
        return totals


def _looks_like_a_rule(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and any(isinstance(one, (str, type, nn.Module)) for one in value)


def param_groups(
    model: nn.Module,
    weight_decay: float | Tensor,
    *,
    decay: Iterable[Rules] = (),
    no_decay: Iterable[Rules] = (),
    prefix: str = "",
    **options: Any,
) -> ParamGroups:
    """Split a model's trainable parameters into a decayed group and one with ``weight_decay=0``.

    Biases and other vectors and scalars are left out of the decay, by shape; the weight of a linear or convolution layer is
    decayed whatever its shape. All parameters of normalization layers and embeddings are left out by module type: torch.nn's,
    and modules whose class name contains "Norm" or "Embedding". A parameter that
    several modules share is listed once, under its first name, and left out if any of its uses says so. A parametrized
    tensor (``torch.nn.utils.parametrizations``) is judged by the module that has it. Frozen parameters
    (``requires_grad=False``) are in neither group. Both groups carry ``param_names``, as torch.optim's do.

    Args:
        model: any module.
        weight_decay: for the decayed group; see :func:`from_lambda`. A float, or a tensor with one element, which goes into
            the group as it is: its value is for the optimizer to check.
        decay: what to decay all the same: rules that win over the above. A string is matched against a parameter's full name,
            with ``*`` and ``?`` as wildcards. A module type covers the parameters that such modules own. A module of this
            model covers its own and those of all within it. A name wins over a module, and a module over a type.
        no_decay: what to leave out besides: rules as for ``decay``.
        prefix: what stands before all names, as in ``named_parameters``: where ``model`` is a part of another one, its name
            there (``"encoder"``, or ``"encoder."``), so that names are those of the whole.
        options: more keys for both groups, such as ``lr``.

    Returns:
        A list of one or two dicts (an empty group is left out), to be passed to an optimizer. Print it to see what is decayed
        and why.

    Example::

        >>> nn = torch.nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
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
        TypeError: if ``model`` is no module, ``weight_decay`` no number, a rule neither a string nor a module nor a type of
            modules, ``prefix`` no string, or a keyword is nearly one that is known, or another word for ``no_decay``.
        ValueError: if ``weight_decay`` is a number that is negative or not finite, a rule matches nothing, one parameter is
            named by both ``decay`` and ``no_decay``, or a module of TorchScript was made from a class that is not torch's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups needs a torch.nn.Module, got {type(model).__name__}")
    for keyword in options:
        if keyword.lower() in _OTHER_WORDS:
            raise TypeError(f"param_groups: for parameters without decay pass no_decay=, not {keyword}=")
        if keyword in NAMES and keyword not in _KEYS:
            raise TypeError(f"param_groups: {keyword} is an option of the whole optimizer. Pass it there")
        if keyword not in _KEYS and _looks_like_a_rule(options[keyword]):
            raise TypeError(f"param_groups: {keyword} is no key of a param group. Rules are arguments: decay= and no_decay=")
        if keyword not in _KEYS and (hint := did_you_mean(keyword, (*_ARGUMENTS, *_KEYS))):
            raise TypeError(f"param_groups() got an unexpected keyword argument {keyword!r}{hint}")
    if not isinstance(weight_decay, Tensor):
        checked(weight_decay, "weight_decay")
    if not isinstance(prefix, str):
        raise TypeError(f"param_groups: prefix must be the name of a part of a model, such as 'encoder', got {prefix!r}")
    chosen = _UserRules(decay=_one_or_many(decay, "decay"), no_decay=_one_or_many(no_decay, "no_decay"))

    uses: dict[nn.Parameter, list[_Use]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        at, owners = _owners(model, path, module)
        for own_name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            name = ".".join(filter(None, (prefix.rstrip("."), path, own_name)))
            tensor = at or own_name  # what a parametrization computes from it
            uses.setdefault(param, []).append(_Use(name, tensor, _is_weight(module, own_name, tensor), module, owners))

    groups: dict[bool, dict[str, Any]] = {
        True: {"params": [], "param_names": [], "weight_decay": weight_decay, **options},
        False: {"params": [], "param_names": [], "weight_decay": 0.0, **options},
    }
    rules = []
    for param, where in uses.items():
        name, shape = where[0].name, tuple(param.shape)
        decayed, reason = chosen.decide(where) or _decide(shape, where)
        if len(where) > 1:
            reason += f", shared with {', '.join(use.name for use in where[1:])}"
        if param.requires_grad:
            groups[decayed]["params"].append(param)
            groups[decayed]["param_names"].append(name)
        else:
            decayed, reason = False, "frozen: in no group"
        rules.append(ParamRule(name, shape, decayed, reason))
    chosen.check_all_used()
    return ParamGroups([group for group in groups.values() if group["params"]], rules)


class _Use(NamedTuple):
    """Where a parameter is used: by the module that has it or, through a parametrization, by the one that has what is computed
    from it."""

    name: str
    tensor: str  # the name of what it is there
    is_weight: bool  # whether it multiplies the inputs of a layer, if that is one
    module: nn.Module
    owners: tuple[nn.Module, ...]  # the module that it belongs to first


def _owners(model: nn.Module, path: str, module: nn.Module) -> tuple[str, tuple[nn.Module, ...]]:
    """The name of the tensor that a module computes, if it is a parametrization or part of one, and whose
    its parameters are."""
    parts = path.split(".")
    if "parametrizations" in parts[:-1]:
        at = parts.index("parametrizations")
        outer = model.get_submodule(".".join(parts[:at]))
        if parametrize.is_parametrized(outer, parts[at + 1]):
            own = () if isinstance(module, parametrize.ParametrizationList) else (module,)
            return parts[at + 1], (outer, *own)
    return "", (module,)


def _is_weight(module: nn.Module, name: str, tensor: str) -> bool:
    if not isinstance(module, parametrize.ParametrizationList):
        return name in _WEIGHTS
    # Of the tensors that a weight is computed from, the largest and last: before it there may be one of lengths.
    sizes = {own: param.numel() for own, param in module.named_parameters(recurse=False, remove_duplicate=False)}
    return tensor == "weight" and name == max(reversed(sizes), key=sizes.__getitem__)


_WEIGHTS = ("weight", "weight_v", "weight_orig")  # the latter of torch.nn.utils.weight_norm and spectral_norm


def _kind(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        name: str = module.original_name
    else:
        name = parametrize.type_before_parametrizations(module).__name__
    # Of MultiheadAttention, a Linear to everybody else.
    return nn.Linear.__name__ if name == NonDynamicallyQuantizableLinear.__name__ else name


def _is_a(module: nn.Module, types: type[nn.Module] | tuple[type[nn.Module], ...]) -> bool:
    """isinstance, also of TorchScript's modules, which know the name of the class that they were made from."""
    if not isinstance(module, torch.jit.ScriptModule):
        return isinstance(module, types)
    kind, types = _kind(module), types if isinstance(types, tuple) else (types,)
    known = _class_of_torch(kind)
    return isinstance(module, types) or (issubclass(known, types) if known else kind in [t.__name__ for t in types])


def _class_of_torch(kind: str) -> type[nn.Module] | None:
    found = getattr(nn, kind, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _decide(shape: tuple[int, ...], where: list[_Use]) -> tuple[bool, str]:
    for module in (owner for use in where for owner in use.owners):
        kind = _kind(module)
        if _is_a(module, NORMS) or "Norm" in kind:
            return False, f"normalization ({kind})"
        if _is_a(module, EMBEDDINGS) or "Embedding" in kind:
            return False, f"embedding ({kind})"
    use = where[0]
    kind = _kind(use.owners[0])
    if "bias" in use.tensor:
        return False, f"bias of {kind}"
    if isinstance(use.owners[0], torch.jit.ScriptModule) and use.is_weight and _class_of_torch(kind) is None:
        raise ValueError(
            f"param_groups: {use.name} is the weight of {kind}, whose name is all that TorchScript knows: it may be a layer, a "
            f"normalization or an embedding. Pass the model that was given to torch.jit.script, which has the same parameters, "
            f"or name this one in decay= or no_decay="
        )
    # The weight of a layer with one output is a matrix, if of one row.
    multiplies = _is_a(use.owners[0], LAYERS) and use.is_weight
    if sum(size > 1 for size in shape) <= 1 and not multiplies:
        return False, f"vector or scalar of {kind}"
    return True, f"{use.tensor} of {kind}"


class _UserRules:
    def __init__(self, **rules: list[Rules]) -> None:
        self._rules = [(argument == "decay", argument, rule) for argument, given in rules.items() for rule in given]
        self._used: set[int] = set()
        self._within: dict[int, set[nn.Module]] = {}
        for i, (_, argument, rule) in enumerate(self._rules):
            if isinstance(rule, nn.Module):
                self._within[i] = set(rule.modules())
            elif not isinstance(rule, str) and not (isinstance(rule, type) and issubclass(rule, nn.Module)):
                raise TypeError(f"{argument}: {_EXPECTED}, got {_shown(rule)}")

    def decide(self, where: list[_Use]) -> tuple[bool, str] | None:
        by_name: dict[bool, str] = {}
        by_module: dict[bool, str] = {}
        by_type: dict[bool, str] = {}
        for i, (decayed, argument, rule) in enumerate(self._rules):
            for use in where:
                if isinstance(rule, str):
                    if not fnmatchcase(use.name, rule):
                        continue
                    by_name[decayed] = f"{argument}={rule!r}"
                elif isinstance(rule, nn.Module):
                    if use.module not in self._within[i]:
                        continue
                    by_module[decayed] = f"{argument}=this {_kind(rule)}"
                elif any(_is_a(owner, rule) for owner in use.owners):
                    by_type[decayed] = f"{argument}={rule.__name__}"
                else:
                    continue
                self._used.add(i)
        found = by_name or by_module or by_type
        if len(found) == 2:
            raise ValueError(f"{where[0].name} is matched by both {found[True]} and {found[False]}; narrow one of them")
        for decayed, reason in found.items():
            return decayed, reason
        return None

    def check_all_used(self) -> None:
        for i, (_, argument, rule) in enumerate(self._rules):
            if i not in self._used:
                shown = f"this {_kind(rule)}" if isinstance(rule, nn.Module) else repr(rule)
                raise ValueError(f"{argument}: {shown} matches no parameter of the model; remove it or correct it")


def _one_or_many(rules: Any, argument: str) -> list[Rules]:
    if isinstance(rules, (str, type, nn.Module)):
        return [rules]
    if isinstance(rules, Tensor) or not isinstance(rules, Iterable):
        raise TypeError(f"{argument}: {_EXPECTED}, got {_shown(rules)}")
    return list(rules)


_EXPECTED = "expected parameter names, modules or module types"


def _shown(rule: Any) -> str:
    if isinstance(rule, Tensor):
        return f"a tensor of shape {tuple(rule.shape)}: pass its name, as model.named_parameters() has it"
    return repr(rule)


_ARGUMENTS = ("weight_decay", "decay", "no_decay", "prefix")


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
