"""``python -m bench churn``: what a step costs when parameters, gradients or states changed since the step before.

Only ``optimizer.step()`` is timed, on one thread; what happens between steps is not. Every provider has parameters of its own,
to which the same things happen in the same order; a call is a run of several steps, and what is drawn for a step depends on its
number alone. Gradients stay the same tensors where a situation does not say otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import timing
from .cases import OPTIMIZERS
from .providers import PROVIDERS, Provider, agreement
from .step import best_peer, reference, standing
from .topic import Job, Options, spread

NUMEL = 64
BLOCK, LAYER = 4, 12  # tensors of a module that is dropped, of a transformer's layer
NAMES = ("fused_l2", "torch fused", "torch foreach", "torch for-loop")
SAMPLE = 10e-3  # seconds of steps in a sample; the events take several times as long

VISITS = 2


@dataclass(frozen=True)
class Situation:
    name: str
    what: str
    event: Callable[[World], None] | None  # what happens before each step
    tensors: int = 300
    run: int = 8  # steps
    fresh: bool = False  # each run begins with a new optimizer


class World:
    """Parameters, their gradients and the optimizer that steps them in a situation."""

    def __init__(self, situation: Situation, provider: Provider, settings: dict[str, Any], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.situation, self.provider, self.settings = situation, provider, settings
        self.params = [torch.nn.Parameter(torch.randn(NUMEL).to(dtype)) for _ in range(situation.tensors)]
        self.grads = [torch.randn(NUMEL).to(dtype) for _ in self.params]
        self.steps = 0
        self.begin()
        self.give(lambda _: True)

    def begin(self) -> None:
        self.optimizer: Any = self.provider.make("AdamW", self.params, self.settings)

    def end(self) -> None:
        """No later step pays for collecting this optimizer."""
        self.optimizer = None
        gc.collect()

    def give(self, present: Callable[[int], bool]) -> None:
        """Gradients to the tensors of these numbers, none to the others."""
        for i, (p, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            p.grad = grad if present(i) else None

    def before(self) -> None:
        if self.situation.fresh and self.steps % self.situation.run == 0:
            self.begin()
        if self.situation.event is not None:
            self.situation.event(self)
        self.steps += 1

    def runs(self, clock: timing.PausingClock) -> Callable[[], None]:
        quiet = self.situation.event is None and not self.situation.fresh

        def run() -> None:
            for _ in range(self.situation.run):
                if not quiet:
                    clock.leave_out(self.before)
                self.optimizer.step()
            if self.situation.fresh:
                clock.leave_out(self.end)

        return run


def module_dropout(world: World) -> None:
    drawn = random.Random(world.steps)
    dropped = [drawn.random() < 0.2 for _ in range(0, len(world.params), BLOCK)]
    world.give(lambda i: not dropped[i // BLOCK])


def two_heads(world: World) -> None:
    first, turn = len(world.params) - 4, world.steps % 2
    world.give(lambda i: i < first or (i - first) // 2 == turn)


def unfreezing(world: World) -> None:
    """From the last layer to the first."""
    begin = len(world.params) - LAYER * (1 + world.steps % world.situation.run)
    world.give(lambda i: i >= begin)


def own_key(world: World) -> None:
    for p in world.params if world.steps else ():
        world.optimizer.state[p]["seen"] = world.steps


def new_data(world: World) -> None:
    for p in world.params:
        p.data = p.data.clone()


def offloaded(world: World) -> None:
    for p in world.params if world.steps else ():
        state = world.optimizer.state[p]
        for key, value in list(state.items()):
            state[key] = value.clone()


SITUATIONS = [
    Situation("nothing", "nothing changes", None),
    Situation("dropout", "module dropout: at each step each module has no gradients with probability 0.2", module_dropout),
    Situation("heads", "two heads have gradients by turns", two_heads),
    Situation("own-key", "a key of the user's own is written into each state", own_key),
    Situation("new-data", "`p.data = p.data.clone()` (SAM, EMA swap)", new_data),
    Situation("offload", "every state is replaced by a copy (offload and restore)", offloaded),
    Situation("unfreezing", "progressive unfreezing: one more layer of 12 at each step", unfreezing, run=25, fresh=True),
    Situation("first", "the first step of a new optimizer, 1000 tensors", None, tensors=1000, run=1, fresh=True),
]


def jobs(options: Options) -> Iterator[Job]:
    for situation in SITUATIONS if "AdamW" in options.optimizers else ():
        if not options.cases or situation.name in options.cases:
            yield Job(f"AdamW {situation.name}", functools.partial(measure, situation, options))


def measure(situation: Situation, options: Options, so_far: dict[str, timing.Samples]) -> dict[str, Any]:
    clock = timing.PausingClock()
    names = [name for name in PROVIDERS if name == "fused_l2" or (name in NAMES and name in options.providers)]
    with prepared():
        correct = verdicts(situation, names)
        if correct["fused_l2"] != "ok":
            raise RuntimeError(f"fused_l2 is {correct['fused_l2']}")
        contestants = {
            name: World(situation, PROVIDERS[name], OPTIMIZERS["AdamW"], torch.float32).runs(clock)
            for name, verdict in correct.items()
            if verdict == "ok"  # what is wrong is not timed
        }
        contestants["fused_l2 again"] = contestants["fused_l2"]
        visit = timing.interleave(
            contestants, options.seconds, sample_seconds=SAMPLE, clock=clock, fewest=timing.FEWEST_OF_A_VISIT
        )
    samples = timing.joined(so_far, visit)
    return {
        "case": situation.name, "what": situation.what, "optimizer": "AdamW", "tensors": situation.tensors, "numel": NUMEL,
        "threads": 1, "steps of a call": situation.run,
        "noise floor": timing.uncertainty(samples, "fused_l2", "fused_l2 again", reference(samples)),
        "the same twice": timing.quartiles(timing.ratios(samples["fused_l2"], samples["fused_l2 again"])),
        "visits": {name: timing.visits(samples["fused_l2"], sample) for name, sample in samples.items()},
        "rows": {
            name: {
                "seconds": [s / situation.run for s in sample.quartiles()],
                "ours_to_this": timing.quartiles(timing.ratios(samples["fused_l2"], sample)),
                "kept": len(sample.kept),
                "rounds": len(sample.seconds),
            }
            for name, sample in samples.items()
        },
        "correct": correct, "not measured": {name: verdict for name, verdict in correct.items() if verdict != "ok"},
    }  # fmt: skip


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """One thread, and a garbage collector that looks only at what is made from here on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


def verdicts(situation: Situation, names: list[str]) -> dict[str, str]:
    """For each provider "ok", or how its parameters and states differ from those of the same ten steps in float64."""
    truth = ten_steps(situation, PROVIDERS["torch for-loop"], torch.float64)
    found = {}
    for name in names:
        world = ten_steps(situation, PROVIDERS[name], torch.float32)
        pairs: list[tuple[Any, Any]] = list(zip(world.params, truth.params, strict=True))
        for p, q in pairs[:]:
            state = world.optimizer.state[p]
            pairs += [(state.get(key, math.nan), value) for key, value in truth.optimizer.state[q].items()]
        with torch.no_grad():
            numbers = [torch.broadcast_tensors(*(torch.as_tensor(x, dtype=torch.float64) for x in pair)) for pair in pairs]
            ours, theirs = (torch.cat([pair[which].flatten() for pair in numbers]) for which in (0, 1))
        found[name] = agreement(ours, theirs, torch.float32)
    return found


def ten_steps(situation: Situation, provider: Provider, dtype: torch.dtype) -> World:
    world = World(situation, provider, {**OPTIMIZERS["AdamW"], "lr": 1e-2}, dtype)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        for grad in world.grads:
            grad.copy_(torch.randn(NUMEL, generator=generator))
        world.before()
        world.optimizer.step()
    return world


def show(result: dict[str, Any]) -> str:
    lines = [
        f"AdamW, {result['case']} ({result['what']}): {result['tensors']} tensors of {result['numel']}, one thread, "
        f"noise floor {100 * result['noise floor']:.1f} %",
        f"  {'':18}{'time, us':>12}{'quartiles':>24}{'time / ours':>13}{'quartiles':>17}",
    ]
    for name, row in result["rows"].items():
        low, median, high = (1e6 * s for s in row["seconds"])
        ratio, quartiles = spread(row["ours_to_this"])
        lines.append(f"  {name:18}{median:>12.1f}{f'{low:.1f} .. {high:.1f}':>24}{ratio:>13}{quartiles:>17}")
    lines += [f"  {name}: {reason}" for name, reason in result["not measured"].items()]
    return "\n".join(lines)


def summary(results: list[dict[str, Any]]) -> list[str]:
    """How we stand in each situation, losses too."""
    lines = []
    for r in results:
        if "failed" not in r and (peer := best_peer(r)):
            lines.append(f"  {r['case']:12}{standing(r)} the fastest other, {peer[0]} ({peer[1]:.2f})")
    return lines
