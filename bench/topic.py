"""What the topics of ``python -m bench`` share: the options they take, the jobs they consist of, how figures are written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .cases import CASES, Case
from .timing import Samples


@dataclass(frozen=True)
class Job:
    """One result of a topic: what the progress bar calls it, and what measures it.

    Where a topic has VISITS, ``run`` is called that often, each time with the samples it has left so far.
    """

    label: str
    run: Callable[[dict[str, Samples]], dict[str, Any]]


@dataclass(frozen=True)
class Options:
    optimizers: list[str]
    providers: list[str]
    cases: list[str] = field(default_factory=list)  # empty: the topic's own choice
    dtype: torch.dtype | None = None  # instead of the cases' own
    device: str = "cpu"
    seconds: float = 6

    def choose(self, cases: list[Case]) -> list[Case]:
        """The cases of the topic that were asked for; without a word, all that are not heavy."""
        chosen = [c for c in cases if (c.name in self.cases if self.cases else not c.heavy)]
        return [dataclasses.replace(c, dtype=self.dtype) for c in chosen] if self.dtype else chosen


def ungrouped_float32(options: Options, measure: Callable[..., dict[str, Any]]) -> Iterator[Job]:
    """A job for each optimizer and float32 case of one param group: ``measure(case, optimizer, seconds, so_far)``."""
    for optimizer in options.optimizers:
        for case in options.choose(CASES):
            if case.dtype is torch.float32 and case.groups is None:
                run = functools.partial(measure, case, optimizer, options.seconds)
                yield Job(f"{optimizer} {case.name}", run)


def spread(quartiles: Any) -> tuple[str, str]:
    """A ratio and its quartiles, as they are shown."""
    low, median, high = quartiles
    return f"{median:.2f}", f"{low:.2f} .. {high:.2f}"
