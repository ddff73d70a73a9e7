"""Several processes: DTensor, FSDP1 and 2, DDP, ZeroRedundancyOptimizer, parts of a whole, sharded checkpoints (T42-T46).

Runs of 2 and of 4 ranks with gloo go through all scenarios of tests/distributed; each is a test here.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent / "distributed"
sys.path.insert(0, str(HERE))
import launch  # noqa: E402

WORLDS = (2, 4)


def scenarios() -> list[str]:
    """The functions marked as scenarios, in the order in which they are run. Importing them would need torch.distributed."""
    found = []
    files = (
        "parallel_training.py",
        "sharded_tensors.py",
        "parts_of_a_whole.py",
        "random_draws.py",
        "in_backward.py",
        "fsdp2.py",
    )
    for file in files:
        for node in ast.parse((HERE / file).read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "scenario" for d in node.decorator_list):
                found.append(node.name)
    return found


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, launch.Outcomes]:
    """What every rank of every run said of each scenario that was asked for."""
    folder = tmp_path_factory.mktemp("distributed")
    wanted: dict[int, set[str]] = {world: set() for world in WORLDS}
    for item in request.session.items:
        if getattr(item, "originalname", "") == "test_scenario" and item.path == Path(__file__):
            wanted[item.callspec.params["world"]].add(item.callspec.params["name"])
    # The later ones load what the first one saved.
    return {world: launch.run(world, folder, [name for name in scenarios() if name in wanted[world]]) for world in WORLDS}


pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")


@pytest.mark.sweep(3)  # the same scenarios with 2 ranks and with 4, which load what 2 have saved
@pytest.mark.parametrize("name", scenarios())
@pytest.mark.parametrize("world", WORLDS)
def test_scenario(world: int, name: str, outcomes: dict[int, launch.Outcomes]) -> None:
    failures = {rank: said for rank, said in outcomes[world][name].items() if said}
    assert not failures, "\n".join(f"rank {rank} of {world}:\n{traceback}" for rank, traceback in failures.items())


def test_a_hang_fails_and_leaves_no_process(tmp_path: Path) -> None:
    """A rank that waits for nothing, and others for it; one that fails alone. What comes after them is run all the same."""
    names = ["_waits_for_nothing", "_raises_on_one_rank", "_passes"]
    outcomes = launch.run(2, tmp_path, names, patience=5.0)
    assert list(outcomes) == names
    assert all(any(outcomes[name].values()) for name in names[:-1])
    assert not any(outcomes["_passes"].values())
    assert "in _waits_for_nothing" in outcomes["_waits_for_nothing"][1]  # where it stood
    assert "on one rank" in outcomes["_raises_on_one_rank"][0]
    pids = [int(file.name) for file in tmp_path.iterdir() if file.name.isdigit()]
    assert len(pids) == 6
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks that need no import are forks")
def test_a_rank_that_outlives_another_s_failure_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rank_of(rank: int, *_: object) -> None:
        (tmp_path / str(os.getpid())).touch()
        if rank == 1:
            time.sleep(5)
            (tmp_path / "slept").touch()
        os._exit(1 - rank)

    monkeypatch.setattr(launch, "_rank", rank_of)
    monkeypatch.setattr(launch, "FORKS", multiprocessing.get_context("fork"))
    monkeypatch.setattr(launch, "LAST_WORDS", 0.1)
    launch._run_once(2, tmp_path, tmp_path, [], 60.0, "cpu")
    assert not (tmp_path / "slept").exists()
    assert multiprocessing.active_children() == []
    for pid in (int(file.name) for file in tmp_path.iterdir()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
