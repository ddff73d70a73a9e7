"""What every optimizer takes beyond torch.optim's arguments: one frozen object, every check, every description, once.

An option is three edits in this file: its type in :class:`OptionArguments`, its default, check and description in
:class:`Options`, and its attribute in :class:`OptionAttributes`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypedDict, TypeVar, get_args, get_type_hints

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import Self, overload

from .parameters.low_precision import LowPrecision
from .parameters.ranks import is_non_member, is_process_group
from .tables.coefficients import DecayRule
from .tables.modes import EIGHT_BIT, Mode
from .tables.tensor_table import Flag

_T = TypeVar("_T")

# What strings options take: for editors and type checkers, and for the checks below.
DecayRuleName = Literal["plain", "fully_decoupled", "corrected"]
LowPrecisionName = Literal["round", "master", "remainder", "kahan", "stochastic", "remainder8"]
StateDtype = torch.dtype | Literal["8bit"] | None
RanksOfGroup = Literal["replicated", "world"] | str | ProcessGroup | DeviceMesh | None


class OptionArguments(TypedDict, total=False):
    """The keyword arguments that all optimizers share; see :class:`Options`."""

    max_grad_norm: float | None
    norm_type: float
    error_if_nonfinite: bool
    skip_if_nonfinite: bool
    amp_scaling: bool
    decay_rule: DecayRuleName | Sequence[DecayRuleName]
    max_lr: float | None
    cautious: bool
    statistics: bool
    low_precision: LowPrecisionName
    state_dtype: StateDtype
    seed: int
    norm_process_group: RanksOfGroup | Sequence[RanksOfGroup]


# Checks: each takes what the user passed and returns what is kept, or raises and says what to pass instead.


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return hasattr(value, "__float__") and not isinstance(value, (str, bytes))


def flag(value: Any, argument: str, where: str = "", of_torch: bool = False) -> bool:
    """True or False: of anything else the truth would be taken, and that of "False" is True. ``of_torch``: an argument of
    torch.optim's constructors, which take None, 0 and 1 as well, and tensors."""
    if value is True or value is False:
        return value
    kind = type(value)
    if kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"):
        return bool(value)
    if of_torch and (value is None or (hasattr(value, "__index__") and value in (0, 1))):
        return bool(value)
    raise TypeError(f"{argument}{where} must be True or False, got {value!r} of type {kind.__name__}")


def check_torchs_flags(group: Mapping[str, Any], where: str) -> None:
    """Check what says to torch.optim how to step, and nothing of what is computed; of the others the rules take care."""
    for name in ("foreach", "fused", "capturable", "differentiable"):
        if group.get(name) is not None:
            flag(group[name], name, where, of_torch=True)


def _max_grad_norm(value: Any) -> float | None:
    if value is None:
        return None
    if not _is_number(value):
        raise TypeError(f"max_grad_norm must be a number, got {value!r} of type {type(value).__name__}")
    limit = float(value)
    if not limit > 0:
        off = "; to leave the gradients as they are, pass None" if limit == 0 else ", or None"
        raise ValueError(f"Invalid max_grad_norm: {value}; expected a number > 0{off}")
    return limit


def _norm_type(value: Any) -> float:
    try:
        order = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"norm_type must be 2 or inf, got {value!r}") from None
    if order not in (2.0, math.inf):
        raise ValueError(f"norm_type must be 2 or inf, got {order}. For others, call torch.nn.utils.clip_grad_norm_")
    return order


_DECAY_RULES = {name: DecayRule[name.upper()] for name in get_args(DecayRuleName)}
_EXPECTED_RULES = "'plain', 'fully_decoupled' or 'corrected'"


def _decay_rule(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return _one_decay_rule(value)
    if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray)):
        raise TypeError(f"decay_rule must be {_EXPECTED_RULES}, or a sequence with one of them per param group, got {value!r}")
    return tuple(_one_decay_rule(rule) for rule in value)


def _one_decay_rule(value: Any) -> str:
    if not isinstance(value, str) or value not in _DECAY_RULES:
        raise ValueError(f"Invalid decay_rule: {value!r}; expected {_EXPECTED_RULES}")
    return value


def _max_lr(value: Any) -> float | None:
    if value is None:
        return None
    if not _is_number(value):
        raise TypeError(f"max_lr must be a number, got {value!r} of type {type(value).__name__}")
    peak = float(value)
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"Invalid max_lr: {value}; expected a finite number > 0, or None for each group's initial lr")
    return peak


def _low_precision(value: Any) -> str:
    names = get_args(LowPrecisionName)
    if value not in names:
        raise ValueError(f"low_precision must be one of {', '.join(map(repr, names))}, got {value!r}")
    return str(value)


def _state_dtype(value: Any) -> torch.dtype | str | None:
    if value not in (None, torch.float32, torch.bfloat16, EIGHT_BIT):
        raise ValueError(
            f"state_dtype must be torch.float32, torch.bfloat16, '8bit' or None (each parameter's own dtype), got {value!r}"
        )
    return value  # type: ignore[no-any-return]


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"seed must be an int, got {value!r}")
    return value


def _norm_process_group(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_one_process_group(one) for one in value)
    return _one_process_group(value)


def _one_process_group(value: Any) -> Any:
    if value is None or isinstance(value, str) or is_process_group(value):
        return value
    if is_non_member(value):
        raise ValueError("norm_process_group: this process is not in that group; pass the one that it is in, or 'replicated'")
    raise TypeError(
        f"norm_process_group must be 'replicated', 'world', a ProcessGroup or its name, a DeviceMesh, None, or a sequence with "
        f"one of them per param group, got {value!r}"
    )


_SHARED = ("weight_decay", "maximize", "differentiable")  # torch's arguments of all three


@functools.lru_cache(256)  # every optimizer that is made sets the same attributes
def did_you_mean(name: str, known: tuple[str, ...], likeness: float = 0.8) -> str:
    """A question for the end of a message, if the name is nearly one of those."""
    plain = {k.replace("_", "").lower(): k for k in known}
    asked = name.replace("_", "").lower()
    # A short name has many neighbours.
    close = [asked] if asked in plain else difflib.get_close_matches(asked, [k for k in plain if len(k) > 5], 1, likeness)
    return f": did you mean {plain[close[0]]!r}?" if close else ""


def why_unused(key: str, hyperparameters: Iterable[str], options: Options) -> str:
    """What is wrong with a key of a param group, for the end of a message; empty if it is known, or somebody's own."""
    if key in ("params", "param_names") or key in hyperparameters:
        return ""
    if key in NAMES:
        # Schedulers leave max_lr there, and ZeroRedundancyOptimizer all that it passed to the constructor.
        if key == "max_lr" or key in options.changed():
            return ""
        return ". It is an option of the whole optimizer: pass it to the constructor, or set it as an attribute"
    # Somebody's own "weight_decay_mult" is not nearly "weight_decay".
    return did_you_mean(key, tuple(hyperparameters), 0.88)


def _option(default: Any, check: Callable[[Any], Any], description: str) -> Any:
    return dataclasses.field(default=default, metadata={"check": check, "description": inspect.cleandoc(description)})


def _switch(name: str, description: str) -> Any:
    return _option(False, functools.partial(flag, argument=name), description)


@dataclass(frozen=True)
class Options:
    """The options of an optimizer, checked. They are attributes of the optimizer, not param-group keys."""

    max_grad_norm: float | None = _option(
        None,
        _max_grad_norm,
        """clip the gradients to this norm within the step, over all param groups, as ``torch.nn.utils.clip_grad_norm_``
        before it would, without rewriting them. See :attr:`grad_norm`.""",
    )
    norm_type: float = _option(2.0, _norm_type, "2 or inf: the order of that norm.")
    error_if_nonfinite: bool = _switch(
        "error_if_nonfinite",
        "raise (waits for the device) if that norm is inf or NaN.",
    )
    skip_if_nonfinite: bool = _switch(
        "skip_if_nonfinite",
        "skip the step if that norm is inf or NaN. See :attr:`step_was_skipped`.",
    )
    amp_scaling: bool = _switch(
        "amp_scaling",
        """let ``torch.amp.GradScaler.step`` leave unscaling, and skipping after an overflow, to the step itself: one pass less
        over the gradients, and no wait for the device.""",
    )
    decay_rule: str | tuple[str, ...] = _option(
        "plain",
        _decay_rule,
        """what multiplies ``weight_decay`` in w <- (1 - ... * weight_decay) * w. The difference shows where a schedule lowers
        lr.

        * ``"plain"``: lr.
        * ``"fully_decoupled"``: lr / max_lr, the schedule without the step size (Loshchilov & Hutter 2019, whose own decay
          this is): lr and weight_decay can be tuned one at a time. Decoupled decay only.
        * ``"corrected"``: lr * (lr / max_lr) (AdamC, SGDC; Defazio 2025, "Why Gradients Rapidly Increase Near the End of
          Training"), for weights that feed a normalization layer. Plain decay holds the ratio of their gradient to them at a
          multiple of sqrt(weight_decay / lr), which grows as lr falls; this one at sqrt(weight_decay / max_lr). With SGD's
          coupled decay: lr / max_lr * weight_decay in place of weight_decay. Not for Adam's coupled decay.

        One for all param groups, those added later too; or a sequence with one per group, and "plain" for groups added later.
        A checkpoint does not hold it.""",
    )
    max_lr: float | None = _option(
        None,
        _max_lr,
        """the largest lr of the schedule, for those rules. None: each group's lr when it was added, which is right for
        schedulers that multiply it by at most 1. OneCycleLR, and warm-ups that write an lr of their own, need the number.
        Larger lrs are no error.""",
    )
    cautious: bool = _switch(
        "cautious",
        """shrink only weights that the update moves towards 0 (Cautious Weight Decay, Chen et al. 2025): with u the update,
        w - lr * u, decay where u * w >= 0. Decoupled decay only.""",
    )
    statistics: bool = _switch(
        "statistics",
        "add up norms, the penalty and more during the step. The attribute is what the last step added up.",
    )
    low_precision: str = _option(
        "round",
        _low_precision,
        """what is kept of the float32 value of 16-bit parameters, in which the step is computed. With bfloat16 parameters,
        ``"round"`` loses most of the weight decay, see docs/low-precision.md.

        * ``"round"``: the nearest 16-bit number, as torch's fused step; a warning says where the decay cannot survive.
        * ``"remainder"``: all of it, as the bfloat16 parameter and a 16-bit remainder beside it (2 bytes a parameter).
        * ``"master"``: all of it, in a float32 state (4 bytes a parameter).
        * ``"kahan"``: what rounding left out, as a bfloat16 compensation (2 bytes a parameter).
        * ``"stochastic"``: one of the two neighbours at random, with the right mean (nothing).
        * ``"remainder8"``: 24 bits, as the bfloat16 parameter and an 8-bit remainder, rounded at random with the right mean (1
          byte a parameter).

        With any of the last five, new moments and momentum are float32. Setting it carries :meth:`master_params` over.""",
    )
    state_dtype: torch.dtype | str | None = _option(
        None,
        _state_dtype,
        """``torch.float32`` or ``torch.bfloat16``: the dtype of moments and momentum. None: the parameter's own, and
        float32 with a ``low_precision`` other than ``"round"``.

        ``"8bit"``: codes of 8 bits with a scale for each 32 elements (1.03 bytes an element), rounded at random with the
        right mean. For parameters of float32, bfloat16 and float16 with at least 4096 elements and slices along dimension 0
        of a multiple of 32; others, such as biases, keep float32. Not with ``amsgrad``. See docs/low-precision.md. Setting it
        converts the states that there are.""",
    )
    seed: int = _option(
        0,
        _seed,
        """of the random bits of ``"stochastic"``, ``"kahan"``, ``"remainder8"`` and 8-bit states, which are a hash of it, the
        step, the parameter and the element: the same on every device.""",
    )
    norm_process_group: Any = _option(
        None,
        _norm_process_group,
        """over whose processes the parameters are divided, where they do not say so themselves as DTensors do. The norm, what
        is skipped and the totals of statistics are then those of the whole.

        * a ``ProcessGroup``, its name (``group.group_name``), or ``"world"``: each process of it steps other parameters or
          other parts of them, as with ``ZeroRedundancyOptimizer``, ``FullyShardedDataParallel``, pipeline stages, experts.
          With names an optimizer can be pickled.
        * a ``DeviceMesh``: the same over each of its dimensions.
        * ``"replicated"``: all processes have the same gradients.
        * None: nothing is said. That is refused where parameters are seen to be parts.

        One for all param groups, those added later too; or a sequence with one per group. A DTensor is summed over its mesh
        in any case, and over this only where it leads out of the mesh. See docs/distributed.md.""",
    )
    decoupled_weight_decay: bool | None = None  # SGD's; None: a key of each param group, as Adam's is

    @classmethod
    def of(cls, optimizer: str, given: dict[str, Any], decoupled_weight_decay: bool | None = None) -> Options:
        """The options that these keyword arguments of an optimizer ask for.

        Raises:
            ValueError, TypeError: if an argument is out of its range, or there is none of that name.
        """
        for name in given:
            if name not in NAMES:
                hint = ": did you mean 'lr'?" if name == "learning_rate" else did_you_mean(name, (*NAMES, *_SHARED))
                raise TypeError(f"{optimizer}.__init__() got an unexpected keyword argument {name!r}{hint}")
        made = cls(
            **{name: _FIELDS[name].metadata["check"](value) for name, value in given.items()},
            decoupled_weight_decay=decoupled_weight_decay,
        )
        made._check_together()
        if made.max_grad_norm is None and (made.error_if_nonfinite or made.skip_if_nonfinite):
            raise ValueError(
                "error_if_nonfinite and skip_if_nonfinite need the norm of the gradients: pass max_grad_norm, too. "
                "max_grad_norm=float('inf') measures it and never clips"
            )
        return made

    def replaced(self, name: str, value: Any) -> Options:
        """These options with another value of one of them, checked."""
        check = _FIELDS[name].metadata["check"] if name in NAMES else functools.partial(flag, argument=name)
        changed: dict[str, Any] = {name: check(value)}
        made = dataclasses.replace(self, **changed)
        made._check_together()
        return made

    def _check_together(self) -> None:
        if self.error_if_nonfinite and self.skip_if_nonfinite:
            raise ValueError("error_if_nonfinite and skip_if_nonfinite exclude each other: choose one")

    def as_dict(self) -> dict[str, Any]:
        """Every option with its value."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if name in NAMES or value is not None}

    def changed(self) -> dict[str, Any]:
        """The options that do not have their default."""
        unset = {name: _FIELDS[name].default for name in NAMES} | {"decoupled_weight_decay": False}
        return {name: value for name, value in self.as_dict().items() if value != unset[name]}

    def __deepcopy__(self, memo: Any) -> Options:
        return self  # nothing in it changes, and process groups cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        given = self.norm_process_group
        for said in given if isinstance(given, tuple) else (given,):
            if said is not None and not isinstance(said, str) and not hasattr(said, "mesh_dim_names"):
                raise TypeError(
                    f"an optimizer with norm_process_group={said!r} cannot be pickled, because a process group cannot. Pass "
                    f"its name, group.group_name, or 'world'"
                )
        return dict(self.__dict__)

    # What a step asks.

    @property
    def is_largest(self) -> bool:
        """Whether the norm is that of the largest element."""
        return self.norm_type == math.inf

    @property
    def clips(self) -> bool:
        """Whether the gradients are measured before the step."""
        return self.max_grad_norm is not None

    @property
    def skips_nonfinite(self) -> bool:
        return self.clips and self.skip_if_nonfinite

    @property
    def raises_if_nonfinite(self) -> bool:
        return self.clips and self.error_if_nonfinite

    @property
    def decides(self) -> bool:
        """Whether something is decided about all gradients before the step."""
        return self.clips or self.amp_scaling

    @property
    def flags(self) -> int:
        """What all buckets share of the shape of the computation."""
        flags = int(Flag.SCALED) if self.decides else 0
        if self.statistics:
            flags |= Flag.STATISTICS
        if self.cautious:
            flags |= Flag.CAUTIOUS
        return flags

    @property
    def precision(self) -> LowPrecision:
        return LowPrecision(Mode[self.low_precision.upper()], self.state_dtype, self.seed)

    def for_group(self, group: int) -> Options:
        """The options of one param group, as an optimizer of its own would have them."""
        return dataclasses.replace(
            self, decay_rule=self.decay_rule_of(group).name.lower(), norm_process_group=self.process_group_of(group)
        )

    def decay_rule_of(self, group: int) -> DecayRule:
        """The rule of one param group."""
        if isinstance(self.decay_rule, str):
            return _DECAY_RULES[self.decay_rule]
        return _DECAY_RULES[self.decay_rule[group]] if group < len(self.decay_rule) else DecayRule.PLAIN

    @property
    def asks(self) -> str:
        """The option for which all processes have to know of each other, for messages; empty if there is none."""
        named = {"max_grad_norm": self.clips, "amp_scaling": self.amp_scaling, "statistics": self.statistics}
        return next((name for name, is_on in named.items() if is_on), "")

    def process_group_of(self, group: int) -> Any:
        """What norm_process_group says of one param group."""
        said = self.norm_process_group
        if not isinstance(said, tuple):
            return said
        return said[group] if group < len(said) else None

    def check_groups(self, groups: int) -> None:
        """ValueError if there is not one decay rule, or one process group, per param group."""
        if isinstance(self.norm_process_group, tuple) and len(self.norm_process_group) != groups:
            raise ValueError(
                f"norm_process_group has {len(self.norm_process_group)} items for {groups} param groups; pass one per group, "
                f"or a single one for all. For several dimensions, pass a DeviceMesh"
            )
        if not isinstance(self.decay_rule, str) and len(self.decay_rule) != groups:
            raise ValueError(
                f"decay_rule has {len(self.decay_rule)} rules for {groups} param groups; pass one per group, or one string for "
                f"all"
            )


_FIELDS = {f.name: f for f in dataclasses.fields(Options)}
NAMES = tuple(OptionArguments.__annotations__)


class OptionAttribute(Generic[_T]):
    """An option as an attribute of an optimizer. What is set is checked, and holds from the next step on."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self.__doc__ = _FIELDS[name].metadata["description"]

    @overload
    def __get__(self, optimizer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, optimizer: Any, owner: type) -> _T: ...
    def __get__(self, optimizer: Any, owner: type) -> Self | _T:
        return self if optimizer is None else optimizer._get_option(self._name)

    def __set__(self, optimizer: Any, value: _T) -> None:
        optimizer._set_option(self._name, value)


class OptionAttributes:
    """The options as attributes. ``statistics`` is not among them: that attribute has the figures of the last step."""

    max_grad_norm = OptionAttribute["float | None"]()
    norm_type = OptionAttribute[float]()
    error_if_nonfinite = OptionAttribute[bool]()
    skip_if_nonfinite = OptionAttribute[bool]()
    amp_scaling = OptionAttribute[bool]()
    decay_rule = OptionAttribute[DecayRuleName | Sequence[DecayRuleName]]()
    max_lr = OptionAttribute["float | None"]()
    cautious = OptionAttribute[bool]()
    low_precision = OptionAttribute[LowPrecisionName]()
    state_dtype = OptionAttribute[StateDtype]()
    seed = OptionAttribute[int]()
    norm_process_group = OptionAttribute[RanksOfGroup | Sequence[RanksOfGroup]]()


_Class = TypeVar("_Class", bound=type)


def with_options(optimizer: _Class) -> _Class:
    """Class decorator: shows the options in the constructor's signature, and describes them in the class's ``Args:``."""
    init = optimizer.__init__  # type: ignore[misc]
    signature = inspect.signature(init)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_FIELDS[name].default, annotation=annotation)
        for name, annotation in _annotations().items()
    ]
    init.__signature__ = signature.replace(parameters=[*own, *options])
    described = "\n".join(
        f"{name}: {textwrap.indent(_FIELDS[name].metadata['description'], '    ').lstrip()}" for name in NAMES
    )
    if optimizer.__doc__ is not None:  # python -OO drops them
        optimizer.__doc__ = inspect.cleandoc(optimizer.__doc__).replace("    OPTIONS", textwrap.indent(described, "    "))
    return optimizer


@functools.cache
def _annotations() -> dict[str, Any]:
    return get_type_hints(OptionArguments)
