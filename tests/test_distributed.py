"""Several processes: DTensor, FSDP2, DDP, ZeroRedundancyOptimizer, sharded checkpoints (T42-T46).

Runs of 2 and of 4 ranks with gloo, as torchrun starts them, go through all scenarios of tests/distributed; each is a test here.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent / "distributed"
WORLDS = (2, 4)


def scenarios() -> list[str]:
    """The functions marked as scenarios, in the order in which they are run. Importing them would need torch.distributed."""
    found = []
    for file in ("parallel_training.py", "sharded_tensors.py"):
        for node in ast.parse((HERE / file).read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "scenario" for d in node.decorator_list):
                found.append(node.name)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, str]]]:
    """What every rank of every run said of each scenario: nothing, or a traceback."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    found = {}
    for world in WORLDS:  # the later ones load what the first one saved
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        done = subprocess.run(
            [*command, str(HERE / "runner.py"), str(folder)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        found[world] = [json.loads((folder / f"outcomes-{world}-{rank}.json").read_text()) for rank in range(world)]
    return found


pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")


@pytest.mark.parametrize("name", scenarios())
@pytest.mark.parametrize("world", WORLDS)
def test_scenario(world: int, name: str, outcomes: dict[int, list[dict[str, str]]]) -> None:
    failures = {rank: outcome[name] for rank, outcome in enumerate(outcomes[world]) if outcome[name]}
    assert not failures, "\n".join(f"rank {rank} of {world}:\n{traceback}" for rank, traceback in failures.items())
