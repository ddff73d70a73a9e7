"""The param groups as a step finds them: their hyperparameters, what follows from those, and which parameter is in which slot.

A *slot* is the place of a parameter among all of an optimizer's, in the order of the param groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from .._warnings import warn
from ..options import Options
from ..parameters import checks
from ..parameters.entry import GroupNeeds
from ..tables import coefficients
from ..tables.tensor_table import Flag, Rule
from .hyperparameters import DeviceValues
from .rules import UpdateRule

Groups = list[dict[str, Any]]


class GroupValues:
    """What was read of a param group, and what follows from it."""

    def __init__(self, values: Any, numbers: Any, sources: list[int], needs: GroupNeeds) -> None:
        self.values, self.numbers, self.sources, self.needs = values, numbers, sources, needs
        self.may_change_in_place = _may_change_in_place(values)
        self.lr_type, self.decay_type = type(values.lr), type(values.weight_decay)


class ParamGroups:
    """What is known of an optimizer's param groups.

    ``numbers`` and ``sources`` are those of the update rule, by group; ``params`` and ``group_of`` are by slot.
    """

    def __init__(self, rule: UpdateRule, options: Options, initial_lrs: Mapping[int, float], warned: set[str]) -> None:
        self._rule, self._options, self._initial_lrs, self._warned = rule, options, initial_lrs, warned
        self._read, self._decay_at = rule.read, rule.Values._fields.index("weight_decay")
        self._device_values = DeviceValues()
        self.known: list[GroupValues] = []
        self.numbers: list[Any] = []
        self.sources: list[list[int]] = []
        self.has_sources = False  # whether some hyperparameters are read on a device
        self.on_device: bool | None = None  # whether a device counts steps and computes coefficients
        self.params: list[Tensor] = []
        self.group_of: list[int] = []
        self.listed_twice: list[list[int]] = []  # slots of one parameter, which share its state
        self._ends: list[int] = []  # the slot behind the last one of each group

    # Hyperparameters.

    def read(self, groups: Groups) -> tuple[list[Tensor], list[int]]:
        """All parameters, and the groups whose hyperparameters, or number of parameters, may have changed."""
        params: list[Tensor] = []
        if len(groups) != len(self.known):
            for group in groups:
                params += group["params"]
            return params, [*range(len(groups))]
        changed: list[int] = []
        read, decay, ends = self._read, self._decay_at, self._ends
        for i, (group, before) in enumerate(zip(groups, self.known, strict=True)):
            params += group["params"]
            values = read(group)
            try:
                # A number equals a tensor of the same value, which is read in another way.
                differs = (
                    before.may_change_in_place
                    or values != before.values
                    or type(values[0]) is not before.lr_type
                    or type(values[decay]) is not before.decay_type
                )
            except (RuntimeError, ValueError):  # a tensor or an array of several elements among them: refused below
                differs = True
            if differs or len(params) != ends[i]:
                changed.append(i)
        return params, changed

    def take(self, groups: Groups, changed: Iterable[int], again: bool) -> tuple[set[int], bool] | None:
        """Take over the hyperparameters of these groups. ``again``: ask devices for values that were read before.

        Returns the groups whose parameters need other things than before, and whether coefficients have changed; None if they
        change who counts steps and computes coefficients.

        Raises:
            TypeError, ValueError: if a hyperparameter is invalid; nothing has changed then.
        """
        new = {i: self._values_of(groups[i], i, again) for i in changed}
        known = {**dict(enumerate(self.known[: len(groups)])), **new}
        has_sources = any(any(group.sources) for group in known.values())
        on_device = has_sources or self._rule.counts_on_device(self._options, groups)
        if self.on_device not in (None, on_device):
            return None
        self.on_device, self.has_sources = on_device, has_sources
        with_other_needs: set[int] = set()
        has_other_numbers = False
        for i, group in new.items():
            if self._rule.rule is Rule.SGD or group.needs.flags & Flag.DECOUPLED:  # Adam's L2 is divided by sqrt(v)
                numbers = group.numbers
                rate = coefficients.decay_rate(numbers.lr, numbers.max_lr, numbers.decay_rule) * numbers.weight_decay
                if rate > 1 and "excess decay" not in self._warned:
                    self._warned.add("excess decay")
                    when = "its first" if getattr(numbers, "momentum", 0) and not group.needs.flags & Flag.DECOUPLED else "a"
                    warn(_EXCESS.format(i, numbers.lr, numbers.weight_decay, when, rate))
            old = self.known[i] if i < len(self.known) else None
            if old is None or old.needs != group.needs:
                with_other_needs.add(i)
            has_other_numbers |= old is None or old.numbers != group.numbers or old.sources != group.sources
        self.known = [known[i] for i in range(len(groups))]
        self._device_values.keep(group.values for group in self.known)
        self.numbers = [group.numbers for group in self.known]
        self.sources = [group.sources for group in self.known]
        return with_other_needs, has_other_numbers

    def _values_of(self, group: dict[str, Any], index: int, again: bool) -> GroupValues:
        rule, options = self._rule, self._options
        values = rule.Values._make(self._read(group))
        on_host = rule.Values._make(self._device_values.read(values, again=again))
        numbers = rule.numbers(on_host, options, index, self._initial_lrs.get(index, 0.0))
        flags = rule.flags(on_host, options)
        names = rule.state_names(flags)
        needs = GroupNeeds(
            flags,
            names,
            frozenset(name for name in names if rule.may_start_at_zero(name)),
            rule.counts,
            bool(group.get("capturable", False)),
            options.precision,
        )
        return GroupValues(values, numbers, rule.sources(values, index), needs)

    def have_known_values(self, groups: Groups) -> bool:
        """Whether reading the hyperparameters does not wait for a device."""
        return all(map(self._device_values.knows, map(self._read, groups)))

    # Slots.

    def have_other_sizes(self, groups: Groups) -> bool:
        """Whether there are other groups than before, as far as the numbers of groups and parameters tell."""
        return self._ends != _ends_of(groups)

    def are_moved(self, groups: Groups) -> bool:
        """Whether groups are not where they were, and something besides their keys is known of each."""
        if not (self.known and _differ_by_group(self._options)):
            return False
        if len(groups) < len(self.known):
            return True
        for begin, end, group in zip([0, *self._ends], self._ends, groups, strict=False):
            if begin < end and next(iter(group["params"]), None) is not self.params[begin]:
                return True
        return False

    def assign_slots(self, groups: Groups, params: list[Tensor]) -> list[int]:
        """Parameters were added, removed or exchanged: these are there now. Returns the slots whose parameter is no longer
        there, or in another group."""
        before, group_before = self.params, self.group_of
        self.params, self.group_of = params, [i for i, group in enumerate(groups) for _ in group["params"]]
        self._ends = _ends_of(groups)
        slots: dict[int, list[int]] = {}
        for slot, param in enumerate(params):
            slots.setdefault(id(param), []).append(slot)
        self.listed_twice = [twins for twins in slots.values() if len(twins) > 1] if len(slots) < len(params) else []

        def stays(slot: int) -> bool:
            return slot < len(params) and params[slot] is before[slot] and self.group_of[slot] == group_before[slot]

        return [slot for slot in range(len(before)) if not stays(slot)]

    def place_of(self, slot: int) -> tuple[int, int]:
        """The param group of a slot, and the position there."""
        index = self.group_of[slot]
        return index, slot - (self._ends[index - 1] if index else 0)

    def namer(self, groups: Groups, slot: int) -> checks.Name:
        """What error messages call the parameter."""
        index, position = self.place_of(slot)
        return lambda: checks.describe(groups[index], index, position)


# Without momentum the decay multiplies a weight by 1 - lr * weight_decay. With momentum m, SGD's L2 does so in its first step;
# alone it then makes w'' = (1 + m - lr * weight_decay) w' - m w, which grows from lr * weight_decay = 2 (1 + m) on.
_EXCESS = (
    "fused_l2: param group {} has lr {:g} and weight_decay {:g}: the decay of {} step takes {:g} times each weight, so "
    "that it changes the sign of all of them. weight_decay is multiplied by lr, and is lambda / n, not lambda: see "
    "fused_l2.weight_decay.from_lambda."
)


def _ends_of(groups: Groups) -> list[int]:
    return [*accumulate(len(group["params"]) for group in groups)]


def _differ_by_group(options: Options) -> bool:
    """Whether groups are stepped by something that is known of each besides its keys."""
    if isinstance(options.norm_process_group, tuple):
        return True
    return options.decay_rule != "plain" and (options.max_lr is None or not isinstance(options.decay_rule, str))


def _may_change_in_place(values: Sequence[Any]) -> bool:
    """Whether a hyperparameter may change in place, as a tensor, an array or a list of betas may."""
    return any(_may_change_in_place(v) if type(v) is tuple else not isinstance(v, (float, int)) for v in values)
