"""Starts ranks, and lets none outlive its test.

Each rank watches itself (runner.py): one that makes no progress for ``PATIENCE`` seconds writes where it stands and ends. As
soon as one ends early, the others are ended, and a new run goes on with the scenarios that are left.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

# Ranks are forks of one process that has imported what takes long to import.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]
)
# Importing some of it may ask for CUDA devices, which a fork cannot use then.
FRESH = multiprocessing.get_context("spawn")
PATIENCE = 50.0  # seconds; also how long a collective waits for other ranks
LAST_WORDS = 5.0  # seconds that other ranks have once one has ended early: to say what they saw

Outcomes = dict[str, dict[int, str]]  # by scenario: what each rank said of it, nothing or a traceback


def run(world: int, folder: Path, scenarios: Sequence[str], patience: float = PATIENCE, device: str = "cpu") -> Outcomes:
    """What every rank said of each scenario. With CUDA: over NCCL, which needs a GPU for each rank."""
    found: Outcomes = {}
    left = list(scenarios)
    while left:
        with tempfile.TemporaryDirectory() as own:
            words = _run_once(world, folder, Path(own), left, patience, device)
            said = [_said(Path(own), rank) for rank in range(world)]
        for name in left:
            outcomes = {rank: lines[name] for rank, lines in enumerate(said) if name in lines}
            if len(outcomes) == world and not any(outcomes.values()):
                found[name] = outcomes
                continue
            # The first that did not pass on all ranks ends the run.
            missing = {rank: f"rank {rank} said nothing: it hung or ended\n{words[rank]}" for rank in range(world)}
            found[name] = {**missing, **outcomes}
            break
        left = left[left.index(name) + 1 :]
    return found


def _run_once(world: int, folder: Path, own: Path, scenarios: Sequence[str], patience: float, device: str) -> list[str]:
    """The last lines that each rank wrote to its standard error."""
    ranks: list[BaseProcess] = []
    try:
        for rank in range(world):
            given = (rank, world, folder, own, patience, scenarios, device)
            ranks.append((FORKS if device == "cpu" else FRESH).Process(target=_rank, args=given))
            ranks[-1].start()
        while all(r.is_alive() for r in ranks):
            time.sleep(0.05)
        until = time.monotonic() + (patience if all(not r.exitcode for r in ranks) else LAST_WORDS)
        while any(r.is_alive() for r in ranks) and time.monotonic() < until:
            if any(r.exitcode for r in ranks):
                until = min(until, time.monotonic() + LAST_WORDS)
            time.sleep(0.05)
    finally:
        for r in ranks:
            r.kill()
            r.join()
    return [_stderr(own, rank).read_text()[-4000:] if _stderr(own, rank).exists() else "" for rank in range(world)]


def _rank(rank: int, world: int, folder: Path, own: Path, patience: float, scenarios: Sequence[str], device: str) -> None:
    """What the process of a rank does."""
    written = os.open(_stderr(own, rank), os.O_CREAT | os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(written, descriptor)
    os.environ["FUSED_L2_TESTED_ON"] = device
    import runner

    sys.exit(runner.run(rank, world, folder, own, patience, scenarios))


def _stderr(own: Path, rank: int) -> Path:
    return own / f"stderr-{rank}"


def _said(own: Path, rank: int) -> dict[str, str]:
    file = own / f"outcomes-{rank}"
    if not file.exists():
        return {}
    return {line["name"]: line["outcome"] for line in map(json.loads, file.read_text().splitlines())}
