"""What every rank of a distributed run does: ``torchrun --nproc-per-node 2 runner.py FOLDER [SCENARIO ...]``.

tests/test_distributed.py starts it and looks at what became of each scenario.
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
import parallel_training  # noqa: F401  (registers its scenarios)
import sharded_tensors  # noqa: F401
from common import SCENARIOS


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    folder, world = Path(sys.argv[1]), dist.get_world_size()
    chosen = sys.argv[2:] or SCENARIOS
    outcomes = {}
    for name in chosen:
        try:
            SCENARIOS[name](world, folder)
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
        dist.barrier()
    (folder / f"outcomes-{world}-{dist.get_rank()}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
