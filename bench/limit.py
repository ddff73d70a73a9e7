"""``python -m bench limit``: what the memory gives, from the caches to well beyond them.

A copy, a triad, the traffic of a step without its arithmetic (the floor that a step cannot go below), and steps.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fused_l2
from fused_l2.engines import cpu

from . import timing
from .cases import OPTIMIZERS, STREAMS
from .topic import Job, Options

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w"]
_library: Any = None
SIZES = tuple(4**power for power in range(6, 14))  # 4096 elements to 67 million


def stream_step(optimizer: Any) -> Callable[[], None] | None:
    """A function that reads and writes what a step of this fused_l2 optimizer does, or None without a compiler.

    It walks the tables of the optimizer's own plan, with the same loop, chunks and threads.
    """
    global _library
    if _library is None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder, "stream.so")
            names = ["bench/stream.cpp", "csrc/parallel.cpp", "csrc/torch_abi.cpp", "csrc/capability.cpp"]
            sources = [str(ROOT / name) for name in names]
            subprocess.run([compiler, *FLAGS, *sources, "-ldl", "-o", str(built)], check=True)
            _library = ctypes.CDLL(str(built))
        _library.stream_step.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        _library.stream_connect(os.fsencode(Path(torch.__file__).parent / "lib" / cpu._TORCH_FILE))
    (part,) = optimizer._stepper._plan.parts
    return lambda: _library.stream_step(part._address, part._count)


def copy_step(numel: int, dtype: torch.dtype) -> Callable[[], Any]:
    """torch's own copy of that many elements."""
    source, target = torch.ones(numel, dtype=dtype), torch.zeros(numel, dtype=dtype)
    return lambda: target.copy_(source)


def jobs(options: Options) -> Iterator[Job]:
    for optimizer in options.optimizers:
        for numel in SIZES:
            yield Job(f"{optimizer} {numel:,}", lambda _, n=numel, o=optimizer: measure(n, o, options))


def measure(numel: int, name: str, options: Options) -> dict[str, Any]:
    """One tensor of that many float32 elements."""
    p = torch.nn.Parameter(torch.randn(numel))
    p.grad = torch.randn(numel)
    ours = getattr(fused_l2, name)([p], **OPTIMIZERS[name])
    theirs = getattr(torch.optim, name)([p], **OPTIMIZERS[name], fused=True)
    for optimizer in (ours, theirs):
        optimizer.step()
    for key, value in ours.state[p].items():
        if key != "step":
            theirs.state[p][key] = value
    ours.step()
    step_bytes = 4 * numel * sum(STREAMS[name])
    # The copy and the triad move as many bytes as the step, so that they meet the same caches.
    source, other, target = (torch.ones(-(-step_bytes // 12)) for _ in range(3))
    contestants: dict[str, tuple[Callable[[], Any], int]] = {
        "fused_l2": (ours.step, step_bytes),
        "torch fused": (theirs.step, step_bytes),
        "copy": (copy_step(step_bytes // 8, torch.float32), step_bytes),
        "triad": (lambda: torch.add(source, other, alpha=0.5, out=target), step_bytes),
        "fused_l2 again": (ours.step, step_bytes),
    }
    if (floor := stream_step(ours)) is not None:
        contestants["memory floor"] = (floor, step_bytes)
    samples = timing.interleave({who: call for who, (call, _) in contestants.items()}, options.seconds / 4)
    rows = {
        who: {
            "seconds": sample.quartiles(),
            "GB/s": contestants[who][1] / sample.quartiles()[1] * 1e-9,
            "of the copy": timing.quartiles(timing.ratios(sample, samples["copy"])),
        }
        for who, sample in samples.items()
    }
    noise = timing.noise_floor(timing.ratios(samples["fused_l2"], samples["fused_l2 again"]))
    return {
        "case": f"one-{numel}",
        "optimizer": name,
        "parameters": numel,
        "bytes": step_bytes,
        "noise floor": noise,
        "rows": rows,
    }


def show(result: dict[str, Any]) -> str:
    cells = (f"{who} {row['GB/s']:.1f}" for who, row in result["rows"].items() if who != "fused_l2 again")
    return f"{result['optimizer']:6}{result['parameters']:>12,} elements, GB/s: " + ", ".join(cells)
