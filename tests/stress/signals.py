"""Interrupts at random moments of a step: a timer's signal, whose handler raises. What follows is what follows a step that was
made, or one that was not (tests/interrupts.py; tests/test_interrupts.py ends steps at every line instead).

    python -m pytest tests/stress/signals.py                 # 3000 interrupts
    python tests/stress/signals.py --seed 7 --seconds 600    # for as long as you like
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy
import pytest
import torch
from interrupts import AT, EVENTS, OURS, Interrupt, Scenario, Sweep

Run = tuple[str, str, str, dict[str, Any], int]  # rule, parameters, event, options, the step that is ended
_NO_NESTEROV = {"dampening": 0.5, "nesterov": False}


def runs() -> list[Run]:
    found: list[Run] = []
    for name, own in (("SGD", {}), ("SGD", _NO_NESTEROV), ("AdamW", {}), ("AdamW", {"amsgrad": True})):
        found += [(name, "ffff", "", own, at) for at in (0, 1)]
        found += [(name, "fsfs", "", own, at) for at in (0, 1)]
        found += [(name, "fff", event, own, AT) for event in EVENTS if event != "weights"]
        found += [(name, "ff", "", {**own, **o}, at) for o in ({"max_grad_norm": 0.5}, {"statistics": True}) for at in (0, 1)]
    for name in ("SGD", "AdamW"):
        for mode in ("master", "remainder", "remainder8", "kahan", "stochastic"):
            found += [(name, "hhh", "", {"low_precision": mode}, at) for at in (0, 1)]
            found += [(name, "hhh", "weights", {"low_precision": mode}, AT)]
        eight: dict[str, Any] = {"low_precision": "remainder8", "state_dtype": "8bit"}
        found += [(name, "wvfh", "", eight, at) for at in (0, 1)]
        found += [(name, "wvh", event, eight, AT) for event in EVENTS]
    return found


class Fuzz:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.runs, self.sweeps = runs(), dict[int, tuple[Sweep, float]]()
        self.interrupts = self.steps = 0
        self._armed = False
        signal.signal(signal.SIGALRM, self._handle)

    def _handle(self, *_: Any) -> None:
        if self._armed:
            self._armed = False
            raise Interrupt

    def _sweep(self, number: int) -> tuple[Sweep, float]:
        """The twins of a run, and how long the step takes that is ended."""
        if number not in self.sweeps:
            name, kinds, event, options, at = self.runs[number]
            sweep = Sweep(lambda: Scenario(name, kinds, event, **options), at)
            run = sweep.before()
            start = time.perf_counter()
            run.optimizer.step()
            self.sweeps[number] = sweep, time.perf_counter() - start
        return self.sweeps[number]

    def once(self) -> None:
        number = self.random.randrange(len(self.runs))
        sweep, seconds = self._sweep(number)
        run = sweep.before()
        versions = run.bits()["versions"]
        delay = max(1e-6, self.random.uniform(0, 1.1 * seconds))
        self.steps += 1
        try:
            try:
                self._armed = True
                signal.setitimer(signal.ITIMER_REAL, delay)
                run.optimizer.step()
            finally:
                self._armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupt as interrupt:
            self._armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            frames = traceback.extract_tb(interrupt.__traceback__)
            ours = [f for f in frames if f.filename.startswith(OURS)]
            self.interrupts += bool(ours)
            where = f"{self.runs[number]}, ended at {ours[-1].filename}:{ours[-1].lineno}" if ours else "outside"
            sweep.check(run, versions, where)
        else:
            sweep.check(run, versions, f"{self.runs[number]}, not ended")


def prepare() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Correctly rounded, as ours is; torch's own is an ulp off on some processors.
    torch.Tensor.sqrt = lambda x: torch.from_numpy(numpy.sqrt(x.detach().numpy()))  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt of a finalizer goes nowhere
def test_three_thousand_interrupts(exact_sqrt: Any) -> None:
    before, threads = signal.getsignal(signal.SIGALRM), torch.get_num_threads()
    torch.set_num_threads(1)
    fuzz = Fuzz(0)
    try:
        while fuzz.interrupts < 3000:
            fuzz.once()
    finally:
        signal.signal(signal.SIGALRM, before)
        torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of runs and moments; moments are also the machine's")
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    prepare()
    fuzz, end = Fuzz(arguments.seed), time.monotonic() + arguments.seconds
    while time.monotonic() < end:
        fuzz.once()
    print(f"seed {arguments.seed}: {fuzz.interrupts} interrupts in {fuzz.steps} steps, nothing wrong after any")


if __name__ == "__main__":
    main()
