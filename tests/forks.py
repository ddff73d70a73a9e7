"""Programs that each need a process of their own, where importing torch would be most of their time.

One interpreter imports torch, and what an optimizer of torch's imports; each program is a fork of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_PARENT = """
import json, os, sys
path, programs, folder = json.load(sys.stdin)
sys.path[:] = path
import torch
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # imports torch.compile
codes = []
for number, code in enumerate(programs):
    if (child := os.fork()) == 0:
        for stream, descriptor in (("out", 1), ("err", 2)):
            os.dup2(os.open(f"{folder}/{number}.{stream}", os.O_CREAT | os.O_WRONLY), descriptor)
        exec(code, {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)  # taking torch down takes long
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
json.dump(codes, sys.stdout)
"""


def run_each(programs: Sequence[str], path: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
    """How each of them ended and what it wrote. ``path`` is where they find modules."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FUSED_L2")}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _PARENT],
            input=json.dumps([list(path), list(programs), folder]),
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        written = [[Path(folder, f"{i}.{stream}").read_text() for stream in ("out", "err")] for i in range(len(programs))]
    codes = json.loads(done.stdout)
    return [
        subprocess.CompletedProcess(code, ended, *texts) for code, ended, texts in zip(programs, codes, written, strict=True)
    ]
