"""Does a wheel work where nothing else of this repository is? `make wheels` asks it of what it built.

For each Python a fresh environment is made, with torch (the version of this Python, unless --torch says another), with the
wheel, without triton, and with no GPU to be seen. There fused_l2 is imported, has its C++ engine, and trains ten steps to the
bits of torch.optim. With ``--torch none`` only the library is loaded: for Pythons whose torch is too large to fetch for a test.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TRAIN = """
import sys
sys.modules["triton"] = None  # importing it fails, as where it is not installed
import torch, fused_l2
assert "site-packages" in fused_l2.__file__, fused_l2.__file__
assert not torch.cuda.is_available()
engine = fused_l2.capabilities()["cpu"].engine
assert engine.startswith("C++"), engine

def trained(module):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
    groups = [{"params": model[0].parameters(), "weight_decay": 0.1}, {"params": model[2].parameters(), "lr": 0.01}]
    options = {"foreach": False} if module is torch.optim else {}
    optimizer = module.SGD(groups, lr=0.1, momentum=0.9, **options)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.ones(4, 10)).square().mean().backward()
        optimizer.step()
    return list(model.parameters())

assert all(map(torch.equal, trained(fused_l2), trained(torch.optim)))
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: {engine}, ten steps, the bits of torch.optim")
"""

LOAD = """
import ctypes, sys, sysconfig
from pathlib import Path
folder = Path(sysconfig.get_path("purelib")) / "fused_l2"
(library,) = [p for p in folder.iterdir() if p.suffix in (".so", ".dylib", ".dll")]
layout = ctypes.CDLL(str(library)).fused_l2_layout
layout.restype = ctypes.c_char_p
assert layout().startswith(b"columns "), layout()
print(f"Python {sys.version.split()[0]}, without torch: the library loads")
"""


def environment_of(python: Path) -> dict[str, str]:
    """Nothing of ours, or of the environment this runs in."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "CONDA", "FUSED_L2"))}
    return {**kept, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}


def try_in(python: str, wheel: Path, torch: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        run = {"check": True, "cwd": folder, "env": environment_of(inside)}
        pip = [str(inside), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        if torch == "none":
            subprocess.run([*pip, "--no-deps", str(wheel)], **run)  # type: ignore[call-overload]
        else:
            subprocess.run([*pip, torch, "numpy"], **run)  # type: ignore[call-overload]
            subprocess.run([*pip, str(wheel)], **run)  # type: ignore[call-overload]
        subprocess.run([str(inside), "-W", "error::UserWarning", "-c", LOAD if torch == "none" else TRAIN], **run)  # type: ignore[call-overload]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="?", help="the wheel's file")
    parser.add_argument("--python", action="append", help="an interpreter (repeatable; default: this one)")
    parser.add_argument("--torch", help="what pip is asked for, such as torch==2.13.0; none: only load the library")
    parser.add_argument(
        "--here", action="store_true", help="train in this environment instead, into which the wheel was installed"
    )
    given = parser.parse_args()
    if given.here:
        exec(compile(TRAIN, "train", "exec"), {})
        return
    if given.wheel is None:
        parser.error("which wheel?")
    torch = given.torch
    if torch is None:
        import torch as installed

        torch = "torch==" + installed.__version__.split("+")[0]
    for python in given.python or [sys.executable]:
        try_in(python, given.wheel.resolve(), torch)


if __name__ == "__main__":
    main()
