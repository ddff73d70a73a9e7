"""What every rank of a distributed run does; tests/distributed/launch.py starts it and reads what it writes."""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import common
import torch
import torch.distributed as dist

MODULES = ("parallel_training", "sharded_tensors", "parts_of_a_whole", "random_draws", "in_backward", "fsdp2", "watched")


def run(rank: int, world: int, folder: Path, own: Path, patience: float, scenarios: Sequence[str]) -> int:
    """``folder`` is for checkpoints, ``own`` for this run alone."""
    for module in MODULES:
        __import__(module)  # registers its scenarios
    common.watch(patience)
    torch.set_num_threads(1)
    store = dist.FileStore(str(own / "store"), world)
    backend = "gloo"
    if common.DEVICE == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=patience))
    with (own / f"outcomes-{rank}").open("w") as outcomes:
        for name in scenarios:
            common.is_alive()
            outcome = ""
            try:
                common.SCENARIOS[name](world, folder)
            except Exception:
                outcome = traceback.format_exc()
            outcomes.write(json.dumps({"name": name, "outcome": outcome}) + "\n")
            outcomes.flush()
            if outcome:
                return 1  # other ranks may be anywhere: what is left needs a new run
    dist.barrier()
    dist.destroy_process_group()
    return 0
