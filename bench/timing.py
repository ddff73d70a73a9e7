"""How things are timed: interleaved, in one run, with samples disturbed by other processes left out.

In each round every contestant is warmed up and timed once, in a new random order, so that none always follows the same one.
A ratio is taken within a round, so that what changes slowly (clock frequency, neighbours) divides out; the median over rounds
is shown with its quartiles.
One contestant is timed twice under two names: what their ratio differs from 1 is the method's own error. A case that is visited
again, with tensors made anew, has another error, which no visit sees: what the visits differ by, because of where the memory
happened to be, and of what the neighbours of a virtual machine did meanwhile.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

MAX_WAIT = 0.02  # the share of a sample that our threads may have spent waiting for a core
CONFIDENCE = 0.97
FEWEST_ROUNDS = 7  # fewer say nothing with that confidence
FEWEST_OF_A_VISIT = 4  # where there are two of them


class BusyMachine(RuntimeError):
    """So little was undisturbed that no ratio would mean anything."""


@dataclass
class Disturbance:
    """How many samples were taken, and how many of them waited for a core: those are left out unless ``counts`` is true."""

    counts: bool = False
    samples: int = 0
    disturbed: int = 0

    @property
    def share(self) -> float:
        return self.disturbed / max(self.samples, 1)

    def __str__(self) -> str:
        what = f"{self.share:.0%} of the samples waited for a core for more than {MAX_WAIT:.0%} of their time"
        return f"MEASURED ON A BUSY MACHINE: {what}, and count" if self.counts else f"{what}, and were left out"


disturbance = Disturbance()  # of this run


class Clock(Protocol):
    def now(self) -> float:
        """Seconds."""

    def waited(self) -> float:
        """Seconds this process's threads have spent runnable but not running."""


class SystemClock:
    def now(self) -> float:
        return time.perf_counter()

    def waited(self) -> float:
        """The run-queue delay of all threads (Linux; elsewhere 0, and no sample is left out)."""
        total = 0
        for task in Path("/proc/self/task").glob("*/schedstat"):
            try:
                total += int(task.read_text().split()[1])
            except OSError:
                continue
        return total * 1e-9


class PausingClock(SystemClock):
    """Stands still, and counts no waiting, while a contestant does what is not to be timed."""

    def __init__(self) -> None:
        self.paused = self.waited_paused = 0.0

    def now(self) -> float:
        return super().now() - self.paused

    def waited(self) -> float:
        return super().waited() - self.waited_paused

    def leave_out(self, call: Callable[[], Any]) -> None:
        start, waited = super().now(), super().waited()
        call()
        self.waited_paused += super().waited() - waited
        self.paused += super().now() - start


@dataclass
class Samples:
    """Seconds per call, one entry per round; None where the round was disturbed. ``ends``: where each visit ends."""

    seconds: list[float | None] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

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


def joined(so_far: dict[str, Samples], visit: dict[str, Samples]) -> dict[str, Samples]:
    """``so_far``, with another visit's samples added to it."""
    for name, samples in visit.items():
        all_of = so_far.setdefault(name, Samples())
        all_of.seconds += samples.seconds
        all_of.ends.append(len(all_of.seconds))
    return so_far


def visits(of: Samples, to: Samples) -> list[float]:
    """The median ratio of each visit that has one."""
    begins = [0, *of.ends[:-1]]
    parts = [(Samples(of.seconds[a:b]), Samples(to.seconds[a:b])) for a, b in zip(begins, of.ends, strict=True)]
    return [quartiles(found)[1] for found in (ratios(*part) for part in parts) if found]


def uncertainty(samples: dict[str, Samples], ours: str, again: str, other: str) -> float:
    """How far a ratio of ``other`` to ``ours`` may be from what another run finds, relative: the noise floor of the rounds, or
    what visits differ by, whichever is more."""
    found = visits(samples[ours], samples[other])
    apart = (max(found) - min(found)) / statistics.median(found) if found else math.inf
    return max(noise_floor(ratios(samples[ours], samples[again])), apart)


def noise_floor(values: list[float]) -> float:
    """How far the median of these ratios can lie from the true one by chance, relative, with 97 % confidence.

    The confidence interval of a median from order statistics: the k-th smallest and the k-th largest value have the true
    median between them unless fewer than k of n values fall on one side of it, a matter of n coins, whatever the distribution.
    Infinite for fewer than seven values, which cannot say so much.
    """
    n, ordered = len(values), sorted(values)
    k, outside = 0, 0.0
    while k < n // 2 and (outside := outside + 2 * math.comb(n, k) / 2**n) <= 1 - CONFIDENCE:
        k += 1
    if k == 0:
        return math.inf
    middle = statistics.median(ordered)
    return max(middle - ordered[k - 1], ordered[n - k] - middle) / middle


def interleave(
    contestants: dict[str, Callable[[], Any]],
    budget: float,
    rounds: int = 31,
    sample_seconds: float = 20e-3,
    clock: Clock | None = None,
    fewest: int = FEWEST_ROUNDS,
) -> dict[str, Samples]:
    """Time each contestant, warmed up, once per round, in an order of its own, until `budget` seconds or the rounds are over.

    The first contestant is the one that the others are compared with.

    Raises:
        BusyMachine: so little was undisturbed that no ratio of these would mean anything.
    """
    clock = clock or SystemClock()
    so_far = Disturbance(samples=disturbance.samples, disturbed=disturbance.disturbed)
    calls = {}
    for name, call in contestants.items():
        call()
        start = clock.now()
        call()
        calls[name] = max(1, round(sample_seconds / max(clock.now() - start, 1e-7)))
    samples = {name: Samples() for name in contestants}
    names = list(contestants)
    shuffled = random.Random(0)
    started = clock.now()
    for _ in range(10 * rounds):
        for name in shuffled.sample(names, len(names)):
            call, count = contestants[name], calls[name]
            for _ in range(count // 2):  # what the contestant before left in the caches is not this one's cost
                call()
            wait, start = clock.waited(), clock.now()
            for _ in range(count):
                call()
            elapsed = clock.now() - start
            undisturbed = clock.waited() - wait <= MAX_WAIT * elapsed
            disturbance.samples += 1
            disturbance.disturbed += not undisturbed
            samples[name].seconds.append(elapsed / count if undisturbed or disturbance.counts else None)
        pairs = min(len(ratios(samples[names[0]], s)) for s in samples.values())
        over = clock.now() - started > budget
        # On a busy machine up to four times the budget is spent on having enough that is undisturbed.
        if pairs >= rounds or (over and pairs >= fewest) or clock.now() - started > 4 * budget:
            break
    if pairs == 0:
        share = (disturbance.disturbed - so_far.disturbed) / (disturbance.samples - so_far.samples)
        raise BusyMachine(
            f"the machine is busy: {share:.0%} of the samples waited for a core for more than {MAX_WAIT:.0%} of their time; "
            "stop what else runs, use fewer threads (OMP_NUM_THREADS), or measure all the same with --even-if-busy, and the "
            "report will say so"
        )
    return samples
