"""Runs the tests with other versions of torch and triton: ``make test-matrix``; ``try_matrix.py 2.13.0+3.6.0`` for one pair.

Each pair has an environment in build/matrix, made if it is not there (torch for CUDA: 5-7 GB), with a wheel of this checkout,
and runs what ``make test`` runs. Ends with a line for each pair.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "matrix"
# 2.10.0 and 3.6.0 are the oldest that are supported, 2.14.1 and 3.8.0 what plain pip installs.
PAIRS = [
    ("2.10.0", "3.6.0"),
    ("2.13.0", "3.6.0"),
    ("2.13.0", "3.7.1"),
    ("2.13.0", "3.8.0"),
    ("2.13.0", "3.9.0"),
    ("2.14.1", "3.8.0"),
]


def pip(python: Path | str, *arguments: str) -> None:
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments], check=True)


def environment(torch: str, wheel: Path) -> Path:
    """The Python of an environment with this torch and our wheel."""
    python = FOLDER / f"torch-{torch}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
        pip(python, f"torch=={torch}")
    pip(python, f"{wheel}[test]", f"torch=={torch}")
    pip(python, "--force-reinstall", "--no-deps", str(wheel))
    return python


def triton_folder(python: Path, version: str) -> Path:
    """A folder with this triton alone, to be put in front of others."""
    folder = FOLDER / f"triton-{version}"
    if not folder.exists():
        pip(python, "--no-deps", "--target", str(folder), f"triton=={version}")
    return folder


def run(torch: str, triton: str, wheel: Path) -> tuple[int, str]:
    """The exit code of pytest and its last line."""
    python = environment(torch, wheel)
    given = {
        **os.environ, "PYTHONPATH": str(triton_folder(python, triton)), "PYTHONSAFEPATH": "1", "OMP_WAIT_POLICY": "passive",
    }  # fmt: skip
    asked = "import torch, triton; print(torch.__version__.split('+')[0] + '+' + triton.__version__)"
    found = subprocess.run([str(python), "-c", asked], env=given, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"{torch}+{triton}", found.stdout
    options = ["-n", "auto", "--dist", "loadfile", "-p", "no:benchmark", "-p", "no:cacheprovider", "--sample"]
    command = [str(python), "-m", "pytest", "-q", *options]
    process = subprocess.Popen(command, env=given, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return process.wait(), last


def main(asked: list[str]) -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*.whl"):
        old.unlink()
    environ = {**os.environ, "FUSED_L2_CPP": "require"}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(FOLDER), str(ROOT)]
    subprocess.run(command, check=True, env=environ)
    (wheel,) = FOLDER.glob("*.whl")
    pairs = [pair for pair in PAIRS if not asked or "+".join(pair) in asked]
    if unknown := set(asked) - {"+".join(pair) for pair in pairs}:
        raise SystemExit(f"no such pair: {', '.join(sorted(unknown))}; there are {', '.join('+'.join(p) for p in PAIRS)}")
    ends = []
    for torch, triton in pairs:
        print(f"\ntorch {torch}, triton {triton}", flush=True)
        code, last = run(torch, triton, wheel)
        ends.append((code, f"torch {torch}, triton {triton}: {re.sub('=+', '', last).strip()}"))
    print("\n" + "\n".join(line for _, line in ends))
    return int(any(code for code, _ in ends))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
