"""Starts ranks, and lets none outlive its test.

Each rank watches itself (runner.py): one that makes no progress for ``PATIENCE`` seconds writes where it stands and ends. As
soon as one ends early, the others are ended, and a new run goes on with the scenarios that are left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

RUNNER = Path(__file__).parent / "runner.py"
PATIENCE = 50.0  # seconds; also how long a collective waits for other ranks
LAST_WORDS = 5.0  # seconds that other ranks have once one has ended early: to say what they saw

Outcomes = dict[str, dict[int, str]]  # by scenario: what each rank said of it, nothing or a traceback


def run(world: int, folder: Path, scenarios: Sequence[str], patience: float = PATIENCE, device: str = "cpu") -> Outcomes:
    """What every rank said of each scenario. With CUDA: over NCCL where each rank has a GPU, otherwise over gloo."""
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
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "FUSED_L2_TESTED_ON": device}
    errors = [(own / f"stderr-{rank}").open("w+") for rank in range(world)]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(world):
            command = [sys.executable, str(RUNNER), str(rank), str(world), str(folder), str(own), str(patience), *scenarios]
            ranks.append(subprocess.Popen(command, env=environment, stdout=errors[rank], stderr=errors[rank]))
        while all(r.poll() is None for r in ranks):
            time.sleep(0.05)
        until = time.monotonic() + (patience if all(not r.returncode for r in ranks) else LAST_WORDS)
        while any(r.poll() is None for r in ranks) and time.monotonic() < until:
            if any(r.returncode for r in ranks):
                until = min(until, time.monotonic() + LAST_WORDS)
            time.sleep(0.05)
    finally:
        for r in ranks:
            r.kill()
            r.wait()
    words = []
    for file in errors:
        file.seek(0)
        words.append(file.read()[-4000:])
        file.close()
    return words


def _said(own: Path, rank: int) -> dict[str, str]:
    file = own / f"outcomes-{rank}"
    if not file.exists():
        return {}
    return {line["name"]: line["outcome"] for line in map(json.loads, file.read_text().splitlines())}
