"""How things are timed: interleaved, in one run, with samples disturbed by other processes left out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_WAIT = 0.02  # the share of a sample that our threads may have spent waiting for a core


@dataclass
class Samples:
    """Seconds per call, one entry per round; None where the round was disturbed."""

    seconds: list[float | None] = field(default_factory=list)

    @property
    def kept(self) -> list[float]:
        return [s for s in self.seconds if s is not None]

    def quartiles(self) -> tuple[float, float, float]:
        return quartiles(self.kept)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if not values:
        return (float("nan"),) * 3
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(of: Samples, to: Samples) -> list[float]:
    """seconds(to) / seconds(of), round by round: above 1 where `of` is faster."""
    return [t / o for o, t in zip(of.seconds, to.seconds, strict=True) if o is not None and t is not None]


def waited() -> float:
    """Seconds this process's threads have spent runnable but not running (Linux; elsewhere 0)."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except OSError:
            continue
    return total * 1e-9


def interleave(
    contestants: dict[str, Callable[[], Any]], budget: float, rounds: int = 31, sample_seconds: float = 20e-3
) -> dict[str, Samples]:
    """Time each contestant, warmed up, once per round, in a rotating order, until `budget` seconds or the rounds are over."""
    calls = {}
    for name, call in contestants.items():
        call()
        start = time.perf_counter()
        call()
        calls[name] = max(1, round(sample_seconds / max(time.perf_counter() - start, 1e-7)))
    samples = {name: Samples() for name in contestants}
    names = list(contestants)
    started = time.perf_counter()
    for turn in range(10 * rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            call, count = contestants[name], calls[name]
            for _ in range(count // 2):  # what the contestant before left in the caches is not this one's cost
                call()
            wait, start = waited(), time.perf_counter()
            for _ in range(count):
                call()
            elapsed = time.perf_counter() - start
            undisturbed = waited() - wait < MAX_WAIT * elapsed
            samples[name].seconds.append(elapsed / count if undisturbed else None)
        enough = all(len(s.kept) >= rounds for s in samples.values())
        if enough or (turn >= 4 and time.perf_counter() - started > budget):
            break
    return samples
