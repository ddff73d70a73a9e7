"""What an install leaves behind, and what a build needs: neither torch nor a compiler."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
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
        ".git", ".venv", ".editable", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", "demo_results"
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


def test_an_editable_install_puts_the_package_alone_on_the_path(checkout, tmp_path):
    """By a link: type checkers follow no import hook, and ``kernels`` of the checkout is no distribution of that name."""
    pytest.importorskip("setuptools", "70.1")
    command = [sys.executable, "-c", f"import setuptools.build_meta as b; b.build_editable({str(tmp_path)!r})"]
    done = subprocess.run(command, cwd=checkout, env={**os.environ, "FUSED_L2_CPP": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    (path,) = (name for name in names_in(wheel) if not name.startswith("fused_l2-"))
    folder = Path(zipfile.ZipFile(wheel).read(path).decode().strip())
    assert [entry.name for entry in folder.iterdir()] == ["fused_l2"]
    assert folder.joinpath("fused_l2").samefile(checkout / "fused_l2")
    program = "import fused_l2, fused_l2.kernels as k; print(fused_l2.__file__, k.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.split() == [str(folder / "fused_l2" / "__init__.py"), str(checkout / "kernels" / "__init__.py")]


def test_no_top_level_kernels_is_installed():
    spec = importlib.util.find_spec("kernels")
    assert spec is None or ROOT not in Path(spec.origin or "/").parents
    assert importlib.util.find_spec("fused_l2.kernels") is not None


# From the ground up. A module may import what stands on a lower line, or beside it.
FLOORS = [
    {"_html", "_sources", "_version", "_warnings", "tables.coefficients", "parameters.shards"},
    {"tables.tensor_table", "parameters.ranks"},
    {"tables.modes", "tables.control", "statistics", "reference", "kernels.layout"},
    {"parameters.memory"},
    {"parameters.eight_bits"},
    {"parameters.low_precision"},
    {"parameters.checks"},
    {"parameters.entry"},
    {"options"},
    {"kernels.sums", "kernels.turns", "kernels.update_rules", "kernels.low_precision", "kernels.eight_bits"},
    {"kernels.multi_tensor", "kernels.norms", "kernels.write"},
    {"kernels.control", "kernels.coefficients"},
    {"kernels.launch"},
    {"engines.cpu", "engines.cuda"},
    {"engines.device_tables", "engines.watch", "engines.slot_watch", "engines.bucket"},
    {"engines.part"},
    {"engines.table_part"},
    {"engines.cpu_part", "engines.cuda_part", "engines.torch_ops"},
    {"engines"},
    {"step.hyperparameters", "step.state", "step.scaler", "step.surroundings"},
    {"step.rules"},
    {"step.groups"},
    {"step.captures", "step.entry_states", "step.placement", "step.sharded"},
    {"step.measuring"},
    {"step.entry_maker"},
    {"step.plan"},
    {"step.stepper"},
    {"state_dicts"},
    {"backward_pass", "ddp", "switching"},
    {"optimizer"},
    {"adam", "sgd", "backward", "checkpoint", "warmup"},
    {"weight_decay.conversion", "weight_decay.normalization", "weight_decay.param_groups", "weight_decay.penalty"},
    {"weight_decay"},
    # The doctor looks at all of it, and nothing but the command line asks for the doctor.
    {"doctor.rules", "doctor.findings"},
    {"doctor.subject", "doctor.memory"},
    {"doctor.normalized", "doctor.precision"},
    {"doctor.layers"},
    {"doctor.report"},
    {"doctor.codes.fixes"},
    {
        "doctor.codes.groups",
        "doctor.codes.membership",
        "doctor.codes.rounding",
        "doctor.codes.speed",
        "doctor.codes.states",
        "doctor.codes.strength",
    },
    {"doctor.codes"},
    {"doctor"},
    {"doctor.script", "doctor.checkpoint"},
    {"doctor.command"},
]
ROOMS = ("tables", "parameters", "engines", "step")


def imports_of(module: str) -> set[str]:
    """What a module of the package imports of the package: anywhere in it, within functions and for type checkers, too."""
    height = {m for floor in FLOORS for m in floor}
    file = Path(importlib.util.find_spec(f"fused_l2.{module}").origin)  # kernels/ stands beside the package
    inside = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = inside[: len(inside) - node.level + 1] + (node.module.split(".") if node.module else [])
        for name in node.names:
            whole = ".".join([*base, name.name])
            found.add(whole if whole in height else ".".join(base))
    return found - {"kernels"}


def test_a_module_imports_only_below_itself():
    height = {module: i for i, floor in enumerate(FLOORS) for module in floor}
    for module, level in height.items():
        for imported in imports_of(module):
            assert height[imported] <= level, f"{module} imports {imported}, which stands above it"


def test_rooms_import_one_way():
    height = {room: i for i, room in enumerate(ROOMS)}
    for module in (m for floor in FLOORS for m in floor if m.split(".")[0] in ROOMS):
        room = module.split(".")[0]
        for imported in imports_of(module):
            other = imported.split(".")[0]
            assert height.get(other, -1) <= height[room], f"{module} imports {imported}, which stands in a room above"


def test_every_module_has_its_floor():
    standing = {m for floor in FLOORS for m in floor}
    apart = {"__init__", "__main__", "demo"}  # what users call, not what others import
    for file in [*(ROOT / "fused_l2").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        if file.parent.name == "weight_decay" or "kernels" in file.relative_to(ROOT).parts[1:]:
            continue
        parts = (
            file.relative_to(ROOT / "fused_l2").with_suffix("").parts if file.parts[-2] != "kernels" else ("kernels", file.stem)
        )
        if parts[-1] != "__init__" and parts[-1] not in apart:
            assert ".".join(parts) in standing, f"{file} has no line in FLOORS"


def test_importing_brings_little_beside_torch() -> None:
    """What an import's time and memory come from: modules. Only the standard library's and our own, of which those of GPUs, the
    doctor and the demo wait until they are asked for."""
    code = "import sys, torch; before = {*sys.modules}; import fused_l2; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    brought = set(done.stdout.split())
    ours = {name for name in brought if name.split(".")[0] == "fused_l2"}
    assert {name for name in brought - ours if name.split(".")[0] not in sys.stdlib_module_names} == set()
    assert len(brought - ours) <= 5
    ours -= {"fused_l2.kernels"}  # an empty module, which is found at once in a checkout
    assert {name for name in ours if name.split(".")[1:2] in (["kernels"], ["doctor"], ["demo"], ["__main__"])} == set()
    assert 50 < len(ours) <= 70


def test_the_pythons_that_are_named_are_those_that_a_wheel_is_tried_in() -> None:
    named = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    tried = re.search(r"foreach minor,([\d ]+),", (ROOT / "Makefile").read_text())
    assert tried is not None
    assert named == tried[1].split()
