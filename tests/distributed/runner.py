"""What every rank of a distributed run does; tests/distributed/launch.py starts it and reads what it writes.

``runner.py RANK WORLD FOLDER OWN PATIENCE SCENARIO ...``: ``FOLDER`` is for checkpoints, ``OWN`` for this run alone.
"""

from __future__ import annotations

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import common

MODULES = ("parallel_training", "sharded_tensors", "parts_of_a_whole", "random_draws", "in_backward", "fsdp2", "watched")


def main() -> int:
    rank, world, folder, own, patience = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5]
    for module in MODULES:
        __import__(module)  # registers its scenarios
    common.watch(float(patience))
    torch.set_num_threads(1)
    store = dist.FileStore(str(own / "store"), world)
    backend = "gloo"  # for CUDA tensors, too, where ranks share a GPU: NCCL wants one for each
    if common.DEVICE == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.set_default_device(f"cuda:{torch.cuda.current_device()}")
        backend = "cpu:gloo,cuda:nccl" if world <= torch.cuda.device_count() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=float(patience)))
    with (own / f"outcomes-{rank}").open("w") as outcomes:
        for name in sys.argv[6:]:
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


if __name__ == "__main__":
    sys.exit(main())
