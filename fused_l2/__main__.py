"""``python -m fused_l2``: what a bug report needs to say about the environment."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from . import __version__, capabilities
from .engines import cpu


def lines() -> list[str]:
    """Versions, then which engine serves which device."""
    found = {
        "fused_l2": __version__,
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads)",
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.platform()}, {platform.machine()}",
        "library": "loaded" if cpu.library() else cpu.why_unavailable(),
    }
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
    width = max(map(len, found))
    return [*(f"{name:{width}}  {value}" for name, value in found.items()), "", *str(capabilities()).splitlines()]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.stdout.write("\n".join(lines()) + "\n")
