"""``python -m bench step``: one optimizer step, next to other optimizers and the memory floor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from . import limit, machine, providers, timing
from .cases import CASES, COLD, OPTIMIZERS, STREAMS, Case
from .topic import Job, Options, spread

# The ratios to torch fused that the project holds itself to.
GATES = {
    "AdamW": {
        "one-25m": 1.12, "gpt2-small": 1.12, "resnet50": 1.25, "tiny-1000": 15, "mlp-40": 2.5, "one-64k": 4.5, "one-1m": 1.6,
        "one-25m-bf16": 1.6,
    },
    "SGD": {
        "one-25m": 1.08, "gpt2-small": 1.07, "resnet50": 1.12, "tiny-1000": 12, "mlp-40": 1.8, "one-64k": 5, "one-1m": 1.3,
    },
}  # fmt: skip
# The ratios to the fastest correct peer of the case, whoever that is.
PEER_GATES = {"one-25m": 1.1, "gpt2-small": 1.1, "resnet50": 1.2, "tiny-1000": 12, "one-64k": 1.8}
NOT_PEERS = ("fused_l2", "fused_l2 again", "memory floor", "copy")

VISITS = 2


def jobs(options: Options) -> Iterator[Job]:
    for optimizer in options.optimizers:
        for case in options.choose(CASES):
            yield Job(f"{optimizer} {case.name}", lambda so_far, c=case, o=optimizer: measure(c, o, options, so_far))
        for case in options.choose(COLD):
            yield Job(f"{optimizer} {case.name}", lambda so_far, c=case, o=optimizer: measure(c, o, options, so_far))


def measure(case: Case, optimizer: str, options: Options, so_far: dict[str, timing.Samples]) -> dict[str, Any]:
    """One row per provider: seconds, ratio to torch fused, GB/s, share of the memory floor."""
    numel = sum(math.prod(shape) for shape in case.shapes)
    size = case.dtype.itemsize
    step_bytes = numel * size * sum(STREAMS[optimizer])
    sets = 1 if not case.cold else min(256, math.ceil(4 * machine.last_level_cache() / step_bytes))
    # What compiles for each set of tensors anew gives up after a few of them.
    compiling = [name for name in options.providers if sets > 1 and providers.PROVIDERS[name].most_tensors is not None]
    names = [name for name in dict.fromkeys(["fused_l2", *options.providers]) if name not in compiling]
    contests = [providers.Contest(case, optimizer, OPTIMIZERS[optimizer], names=names) for _ in range(sets)]
    contestants = {name: _in_turn([c.steps()[name] for c in contests]) for name in contests[0].optimizers}
    contestants["fused_l2 again"] = contestants["fused_l2"]
    for contest in contests:  # making one's states dropped the plans of those before
        contest.optimizers["fused_l2"].step()
    floors = [limit.stream_step(c.optimizers["fused_l2"]) for c in contests]
    if floors[0] is not None:
        contestants["memory floor"] = _in_turn(floors)
    contestants["copy"] = _in_turn([limit.copy_step(numel, case.dtype) for _ in contests])
    samples = timing.joined(so_far, timing.interleave(contestants, options.seconds, fewest=timing.FEWEST_OF_A_VISIT))
    base = samples.get("torch fused")
    rows = {}
    for name, sample in samples.items():
        moved = numel * size * 2 if name == "copy" else step_bytes
        rows[name] = {
            "seconds": sample.quartiles(),
            "ratio_to_torch_fused": timing.quartiles(timing.ratios(sample, base)) if base else None,
            "ours_to_this": timing.quartiles(timing.ratios(samples["fused_l2"], sample)),
            "ratio_to_memory_floor": timing.quartiles(timing.ratios(sample, samples["memory floor"])) if floors[0] else None,
            "GB/s": moved / sample.quartiles()[1] * 1e-9,
            "kept": len(sample.kept),
            "rounds": len(sample.seconds),
        }
    twins = timing.ratios(samples["fused_l2"], samples["fused_l2 again"])
    absent = contests[0].absent | dict.fromkeys(compiling, "compiles for each set of tensors anew")
    return {
        "case": case.name, "what": case.what, "optimizer": optimizer, "dtype": str(case.dtype).removeprefix("torch."),
        "parameters": numel, "tensors": len(case.shapes), "bytes": step_bytes, "sets in turn": sets,
        "noise floor": timing.uncertainty(samples, "fused_l2", "fused_l2 again", reference(samples)),
        "the same twice": timing.quartiles(twins),
        "visits": {name: timing.visits(samples["fused_l2"], sample) for name, sample in samples.items()},
        "rows": rows, "correct": contests[0].verdicts, "not measured": absent,
    }  # fmt: skip


def _in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """One call per set of tensors, in turn, so that no step finds its tensors in a cache."""
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def reference(samples: Iterable[str]) -> str:
    """Whose ratio to ours the noise floor is about."""
    return next(name for name in ("torch fused", *samples) if name in samples and name != "fused_l2")


def best_peer(result: dict[str, Any]) -> tuple[str, float] | None:
    """The fastest provider besides ours, and our ratio to it."""
    peers = {name: row["ours_to_this"][1] for name, row in result["rows"].items() if name not in NOT_PEERS}
    return min(peers.items(), key=lambda item: item[1]) if peers else None


def standing(result: dict[str, Any]) -> str | None:
    """How we stand to the fastest other; "as fast as" is within the noise floor."""
    peer = best_peer(result)
    if peer is None:
        return None
    noise = result["noise floor"] if math.isfinite(result["noise floor"]) else 0
    return "slower than" if peer[1] < 1 - noise else "as fast as" if peer[1] <= 1 + noise else "faster than"


def verdicts(result: dict[str, Any]) -> list[str]:
    """What was promised of this case, and whether the figures keep it."""
    if result["dtype"] != ("bfloat16" if result["case"].endswith("bf16") else "float32"):
        return []
    found = []
    gate = GATES[result["optimizer"]].get(result["case"])
    ratio = result["rows"]["fused_l2"]["ratio_to_torch_fused"]
    if gate is not None and ratio is not None:
        found.append(f"torch fused, gate {gate}: {'met' if ratio[1] >= gate else 'MISSED'}")
    gate, peer = PEER_GATES.get(result["case"]), best_peer(result)
    if gate is not None and peer is not None:
        found.append(f"best peer ({peer[0]}) {peer[1]:.2f}, gate {gate}: {'met' if peer[1] >= gate else 'MISSED'}")
    return found


def show(result: dict[str, Any]) -> str:
    lines = [
        f"{result['optimizer']}, {result['case']}: {result['parameters']:,} parameters in {result['tensors']} tensors, "
        f"noise floor {100 * result['noise floor']:.1f} %",
        f"  {'':18}{'time, us':>12}{'quartiles':>24}{'x torch fused':>15}{'quartiles':>15}{'GB/s':>8}{'% floor':>9}",
    ]
    for name, row in result["rows"].items():
        low, median, high = (s * 1e6 for s in row["seconds"])
        times = f"{median:>12.1f}{f'{low:.1f} .. {high:.1f}':>24}"
        ratio = spread(row["ratio_to_torch_fused"]) if row["ratio_to_torch_fused"] and name != "copy" else ("-", "-")
        floor = row["ratio_to_memory_floor"]
        share = f"{100 * floor[1]:.0f}" if floor and name != "copy" else "-"
        lines.append(f"  {name:18}{times}{ratio[0]:>15}{ratio[1]:>15}{row['GB/s']:>8.1f}{share:>9}")
    expected = ("not installed", "has no", "does not step")
    lines += [f"  {name}: {reason}" for name, reason in result["not measured"].items() if not reason.startswith(expected)]
    lines += [f"  {verdict}" for verdict in verdicts(result)]
    return "\n".join(lines)
