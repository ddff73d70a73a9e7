"""What the topics of ``python -m bench`` share: the options they take, the jobs they consist of, how figures are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .cases import Case
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


def spread(quartiles: Any) -> tuple[str, str]:
    """A ratio and its quartiles, as they are shown."""
    low, median, high = quartiles
    return f"{median:.2f}", f"{low:.2f} .. {high:.2f}"
