"""What a figure depends on: the machine, its processor, GPU and caches, and the versions of what ran."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fused_l2

ROOT = Path(__file__).parent.parent


def facts() -> dict[str, Any]:
    info = _cpuinfo()
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "engine": fused_l2.capabilities()["cpu"].engine,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fused_l2": fused_l2.__version__,
        "commit": _commit(),
        "system": platform.platform(),
        "last-level cache, MB": last_level_cache() / 2**20,
        "memory, GB": round(_memory() / 2**30, 1),
        "cpu flags": info.get("flags", ""),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.mem,power.limit", "--format=csv,noheader"]
        found["driver, memory clock, power limit"] = asked(query)
    return found


def headline(found: dict[str, Any]) -> str:
    """The facts that a reader of a table needs; the file has the others."""
    keys = ("date", "cpu", "threads", "engine", "gpu", "torch", "python", "fused_l2", "commit")
    return ", ".join(f"{key} {found[key]}" for key in keys if key in found)


def last_level_cache() -> int:
    """Bytes of one last-level cache as the kernel reports it; 32 MB where it does not."""
    sizes = [32 * 2**20]
    for entry in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")):
        text = entry.read_text().strip()
        if text.endswith("K"):
            sizes = [int(text[:-1]) * 2**10]
    return sizes[0]


def asked(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def _commit() -> str:
    """The git commit; followed by '+' where files that git follows were changed since."""
    changed = asked(["git", "status", "--porcelain", "--untracked-files=no"])
    return asked(["git", "rev-parse", "--short=12", "HEAD"]) + ("" if changed == "unknown" else "+")


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
