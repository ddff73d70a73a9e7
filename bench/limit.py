"""The floor a step cannot go below: the same memory traffic without the arithmetic, and torch's copy."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fused_l2.engines import cpu

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w"]
_library: Any = None


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
    ((part, _),) = optimizer._plan._parts
    return lambda: _library.stream_step(part._address, part._count)


def copy_step(numel: int, dtype: torch.dtype) -> Callable[[], Any]:
    """torch's own copy of that many elements."""
    source, target = torch.ones(numel, dtype=dtype), torch.zeros(numel, dtype=dtype)
    return lambda: target.copy_(source)
