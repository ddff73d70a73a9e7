"""On a GPU: several processes that decide as one, with CUDA tensors. `pytest -m gpu` runs these alone.

One rank with NCCL goes the way of every collective on any machine. Two ranks need a GPU each: NCCL asks for it, and over gloo
torch itself ends where DTensors are gathered.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from comparing import on_gpu

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
import launch

pytestmark = on_gpu
ONE_MESH = ("shards_step_as_the_whole", "gradients_of_other_placements", "ranks_whose_plans_differ", "steps_left_out")
FSDP2 = ("fsdp2_trains_as_one_process", "step_in_backward_of_fsdp2")
GRIDS = ("mixed_groups_and_several_meshes", "global_norm", "eight_bit_states", "low_precision")
SCENARIOS = {1: (*ONE_MESH, *FSDP2), 2: (*ONE_MESH, *GRIDS, "step_in_backward_of_ddp", *FSDP2)}


@pytest.mark.parametrize("world", SCENARIOS)
def test_scenarios(world: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(
            f"{world} ranks need {world} CUDA devices: over gloo torch ends where it gathers (see pytorch issue 152645)"
        )
    found = launch.run(world, tmp_path, SCENARIOS[world], device="cuda")
    failures = [f"{name}, rank {rank} of {world}:\n{said}" for name, of in found.items() for rank, said in of.items() if said]
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures)
