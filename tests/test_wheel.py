"""What `make wheels` left in dist/: the sdist, and the wheel made from it, with which tests/try_wheel.py trains elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from fused_l2.engines import cpu


def sources() -> list[Path]:
    folders = (("fused_l2", "*.py"), ("kernels", "*.py"), ("csrc", "*"), ("tests", "*.py"))
    return [ROOT / "setup.py", ROOT / "pyproject.toml", *(p for folder, kind in folders for p in (ROOT / folder).rglob(kind))]


def built(pattern: str) -> Path:
    found = sorted((ROOT / "dist").glob(pattern))
    if not found:
        pytest.skip("make wheels builds what is tested here")
    newest = max(p.stat().st_mtime for p in sources() if p.is_file() and "__pycache__" not in p.parts)
    if found[-1].stat().st_mtime < newest:
        pytest.skip(f"{found[-1].name} is older than the sources: make wheels")
    return found[-1]


@pytest.fixture
def wheel() -> Path:
    return built("*.whl")


def test_sdist():
    """All that a build needs, and the tests."""
    with tarfile.open(built("*.tar.gz")) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        needed = [n for n in tracked.stdout.split() if n.split("/")[0] in ("fused_l2", "kernels", "csrc", "tests", "setup.py")]
        assert not set(needed) - names
    assert {"pyproject.toml", "LICENSE", "README.md"} <= names


def test_wheel(wheel, tmp_path):
    """One wheel per platform, with the library, below 1 MB, built by setuptools alone."""
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert wheel.stat().st_size < 1_000_000
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"fused_l2/{cpu._FILE}", "fused_l2/py.typed", "fused_l2/kernels/__init__.py", "fused_l2/kernels/launch.py"} <= names
    top_level = {n.split("/")[0] for n in names}
    assert top_level == {"fused_l2", next(t for t in top_level if t.endswith(".dist-info"))}  # no top-level `kernels`
    requires = (ROOT / "pyproject.toml").read_text().split("requires = [")[1].split("]")[0]
    assert "setuptools" in requires
    assert "," not in requires

    # It trains, unpacked anywhere, also without the checkout.
    target = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(target)
    code = """
import torch, fused_l2, fused_l2.kernels, sys
assert fused_l2.__file__.startswith(sys.argv[1]), fused_l2.__file__
p = torch.nn.Parameter(torch.ones(100))
optimizer = fused_l2.AdamW([p], lr=0.1)
for _ in range(10):
    optimizer.zero_grad()
    (p**2).sum().backward()
    optimizer.step()
assert (p**2).sum() < 50
print(fused_l2.capabilities()["cpu"].engine)
"""
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(target)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("C++ (")
