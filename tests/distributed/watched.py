"""What may go wrong in a scenario. Not marked as scenarios: test_a_hang_fails_and_leaves_no_process asks for them by name."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common import scenario


def _leaves_its_number(folder: Path) -> None:
    (folder / str(os.getpid())).touch()


@scenario
def _waits_for_nothing(world: int, folder: Path) -> None:
    _leaves_its_number(folder)
    if dist.get_rank() == 1:
        time.sleep(3600)
    dist.barrier()


@scenario
def _raises_on_one_rank(world: int, folder: Path) -> None:
    _leaves_its_number(folder)
    if dist.get_rank() == 0:
        raise ValueError("on one rank")
    dist.all_reduce(torch.ones(1))


@scenario
def _passes(world: int, folder: Path) -> None:
    _leaves_its_number(folder)
    dist.all_reduce(torch.ones(1))
