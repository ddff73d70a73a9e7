"""What an install leaves behind, and what a build needs: neither torch nor a compiler."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from fused_l2.engines import cpu


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the sources without anything built."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", "demo_results"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def build_wheel(checkout: Path, out: Path, **environment: str) -> Path:
    """As pip does: in an isolated build environment, with what pyproject.toml asks for and nothing else."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "-q", "-w", str(out), str(checkout)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_without_a_compiler_the_install_goes_through(checkout, tmp_path):
    wheel = build_wheel(checkout, tmp_path / "wheels", CC="no-such-compiler", CXX="no-such-compiler")
    names = names_in(wheel)
    assert "fused_l2/sgd.py" in names
    assert f"fused_l2/{cpu._FILE}" not in names


def test_required_library_makes_a_missing_compiler_an_error(checkout, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-cache-dir",
        "-q",
        "-w",
        str(tmp_path / "wheels"),
        str(checkout),
    ]
    environment = {**os.environ, "CC": "no-such-compiler", "CXX": "no-such-compiler", "FUSED_L2_CPP": "require"}
    assert subprocess.run(command, env=environment, capture_output=True).returncode != 0


def test_no_top_level_kernels_is_installed():
    spec = importlib.util.find_spec("kernels")
    assert spec is None or ROOT not in Path(spec.origin or "/").parents
    assert importlib.util.find_spec("fused_l2.kernels") is not None


# From the ground up. A module may import what stands on a lower line, or beside it.
FLOORS = [
    {"_version", "tables.coefficients", "parameters.shards", "step.state"},
    {"tables.tensor_table"},
    {"tables.modes"},
    {"parameters.low_precision"},
    {"tables.control", "decay", "statistics", "engines.cpu", "engines.torch_ops", "reference", "kernels.layout"},
    {"kernels.sums", "kernels.update_rules", "kernels.low_precision"},
    {"kernels.multi_tensor", "kernels.write"},
    {"kernels.norms", "kernels.control", "kernels.coefficients"},
    {"kernels.launch"},
    {"engines.cuda"},
    {"engines.device_tables"},
    {"engines"},
    {"parameters.entry", "step.hyperparameters", "engines.watch"},
    {"engines.part"},
    {"step.plan"},
    {"optimizer"},
    {"adam", "sgd", "backward", "checkpoint"},
]


def test_a_module_imports_only_below_itself():
    height = {module: i for i, floor in enumerate(FLOORS) for module in floor}
    for module, level in height.items():
        file = Path(importlib.util.find_spec(f"fused_l2.{module}").origin)  # kernels/ stands beside the package
        inside = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        for node in ast.parse(file.read_text()).body:  # imports for type checkers stand in an `if` and do not count
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            base = inside[: len(inside) - node.level + 1] + (node.module.split(".") if node.module else [])
            for name in node.names:
                imported = ".".join([*base, name.name]) if ".".join([*base, name.name]) in height else ".".join(base)
                assert height[imported] <= level, f"{module} imports {imported}, which stands above it"
