"""Installs that are damaged, stale or unusual, and what meets a failure that goes away."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, needs_library
from forks import run_each

import fused_l2
from fused_l2 import _sources
from fused_l2.engines import cpu, cuda
from fused_l2.tables.tensor_table import Rule

PACKAGE = Path(fused_l2.__file__).resolve().parent
LIBRARY = PACKAGE / cpu._FILE
TRAIN = """
import torch, fused_l2
p = torch.nn.Parameter(torch.ones(100))
optimizer = fused_l2.AdamW([p], lr=0.1)
for _ in range(3):
    p.grad = torch.ones(100)
    optimizer.step()
import fused_l2.kernels
cpu = fused_l2.capabilities()["cpu"]
print(f"{p[0].item():.4f}|{cpu.engine}|{cpu.reason}|{fused_l2.kernels.__file__}")
"""


def copy_of_the_package(folder: Path) -> Path:
    """As an installed one: kernels inside, no sources beside it."""
    ignored = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(PACKAGE, folder / "fused_l2", ignore=ignored)
    kernels = importlib.util.find_spec("fused_l2.kernels")
    assert kernels is not None
    shutil.copytree(
        Path(kernels.origin or "").parent, folder / "fused_l2" / "kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder / "fused_l2"


def checkout(folder: Path) -> Path:
    """The source tree without a library."""
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "*.dll", "kernels", "results")
    for name in ("fused_l2", "csrc", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", folder)
    return folder


@functools.cache
def elsewhere() -> list[str]:
    """Where this interpreter finds modules, without other copies of fused_l2."""
    found = []
    for path in map(Path, filter(None, sys.path)):
        if not (path / "fused_l2").exists():
            found.append(str(path))
        elif (path / "torch").exists():  # one environment has both: all of it but ours
            folder = tempfile.mkdtemp()
            atexit.register(shutil.rmtree, folder)
            for entry in path.iterdir():
                if not entry.name.startswith("fused_l2"):
                    (Path(folder) / entry.name).symlink_to(entry)
            found.append(folder)
    return found


def trained(*paths: Path) -> list[str]:
    return what_was_trained(run_each([TRAIN], [*map(str, paths), *elsewhere()])[0])


def what_was_trained(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, (done.returncode, done.stderr)
    value, *told = done.stdout.strip().split("|")
    assert float(value) == pytest.approx(0.7 * 0.999**3, abs=1e-3)
    return told


@needs_library
def test_a_library_that_was_cut_off_is_the_fallback(tmp_path: Path) -> None:
    """Loading it would end the process with a bus error."""
    whole = LIBRARY.read_bytes()
    programs = []
    for share in (0.003, 0.25, 0.9, 0.99):
        package = copy_of_the_package(tmp_path / str(share))
        (package / cpu._FILE).write_bytes(whole[: int(len(whole) * share)])
        programs.append(f"import sys; sys.path.insert(0, {str(package.parent)!r})\n{TRAIN}")
    for done in run_each(programs, elsewhere()):
        engine, reason, _ = what_was_trained(done)
        assert engine == "plain PyTorch"
        assert "could not be loaded" in reason


@needs_library
def test_T49_the_instruction_set_is_chosen_at_import_and_can_be_forced() -> None:
    """An empty name is none."""
    built = cpu.library()
    assert built is not None
    program = """
import os
os.environ["FUSED_L2_CPU_CAPABILITY"] = "NAME"
import fused_l2
cpu = fused_l2.capabilities()["cpu"]
print(cpu.engine, cpu.reason)
"""
    names = [*built.available, "", "avx1024"]
    *chosen, unset, refused = run_each([program.replace("NAME", name) for name in names], [str(PACKAGE.parent), *elsewhere()])
    for name, done in zip(built.available, chosen, strict=True):
        assert f"C++ ({name}) " in done.stdout, done.stderr
        assert "forced by FUSED_L2_CPU_CAPABILITY" in done.stdout
    assert built.available[0] == "baseline"  # runs on every processor of the platform
    assert unset.returncode == 0, unset.stderr
    assert "forced" not in unset.stdout
    assert "ValueError: CPU capability 'avx1024' is not available on this machine; choose one of baseline" in refused.stderr


def test_the_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.h").write_text("1")
    (tmp_path / "b.cpp").write_text("2")
    seen = {_sources.fingerprint(tmp_path)}
    (tmp_path / "b.cpp").write_text("3")
    seen.add(_sources.fingerprint(tmp_path))
    (tmp_path / "b.cpp").rename(tmp_path / "c.cpp")
    seen.add(_sources.fingerprint(tmp_path))
    (tmp_path / "notes.txt").write_text("")
    assert len(seen | {_sources.fingerprint(tmp_path)}) == 3
    assert 0 not in seen


@pytest.mark.sweep
@needs_library
def test_an_uncompiled_checkout_takes_the_library_that_was_installed(tmp_path: Path) -> None:
    """`pip install .`, then `python train.py` in the checkout, which Python imports from there. But not a library of other
    sources, and without one it says what to do; `fused_l2.kernels` is found beside the package each time."""
    source, site = checkout(tmp_path / "checkout"), tmp_path / "site"
    copy_of_the_package(site)
    built = cpu.library()
    assert built is not None
    if built._short.fused_l2_sources() == 0:
        pytest.skip("this library was compiled by hand, without the fingerprint of its sources")
    engine, _, kernels = trained(source, site)
    assert engine.startswith("C++")
    assert kernels == str(source / "kernels" / "__init__.py")

    shutil.rmtree(site)
    engine, reason, _ = trained(source)
    assert engine == "plain PyTorch"
    assert f"{source} is a source checkout" in reason
    assert f"Run `pip install -e .` in {source}" in reason

    copy_of_the_package(site)
    with (source / "csrc" / "table.h").open("a") as file:
        file.write("// newer\n")
    engine, reason, _ = trained(source, site)
    assert engine == "plain PyTorch"
    assert "was built from other sources than those in" in reason
    # The same of an editable install that was not built again.
    shutil.copy(LIBRARY, source / "fused_l2")
    engine, reason, _ = trained(source)
    assert engine == "plain PyTorch"
    assert "was built from other sources than those in" in reason


def test_a_triton_that_raises_anything_is_the_documented_fallback() -> None:
    errors = ("OSError(116, 'Stale file handle')", "RuntimeError('x')", "AttributeError('x')", "ImportError('x')")
    program = """
import sys, torch
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "triton": raise {}
sys.meta_path.insert(0, Finder())
sys.modules.pop("triton", None)
import fused_l2
from fused_l2.engines import cuda
print(cuda.why_unavailable())
torch.cuda.is_available = lambda: True
print(fused_l2.capabilities()["cuda"].engine)
sys.meta_path.pop(0)
cuda.forget_failures()  # as the next plan does
print(cuda.why_unavailable())
"""
    for done in run_each([program.format(error) for error in errors], [str(PACKAGE.parent), *elsewhere()]):
        assert done.returncode == 0, done.stderr
        why, engine, later = done.stdout.splitlines()
        assert "triton cannot be imported" in why
        assert engine == "plain PyTorch"
        assert not any(name in later for name in ("OSError", "RuntimeError", "AttributeError", "(x)"))  # it is tried again


def test_capabilities_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise OSError("a driver")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert "it cannot be asked: OSError: a driver" in fused_l2.capabilities()["cuda"].reason


class Compiler:
    """A device whose compiler fails some times."""

    def __init__(self, failures: int) -> None:
        self.left, self.asked = failures, 0

    def compile(self, *which: Any) -> Any:
        self.asked += 1
        if self.left:
            self.left -= 1
            raise FileNotFoundError(2, "No such file or directory", "~/.triton/cache/ab12/fused_l2.json")
        return which


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Compiler(0)
    monkeypatch.setattr(cuda, "_kernels", {})
    monkeypatch.setattr(cuda, "_failures", {})
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "")
    monkeypatch.setattr(cuda, "device", lambda of: made)
    monkeypatch.setattr(cuda.time, "sleep", lambda seconds: None)
    return made


SIGNATURE: Any = (torch.device("cuda:0"), Rule.SGD, 0, torch.float32, torch.float32, torch.float32)


def test_a_failure_of_the_compiler_that_goes_away_is_none(compiler: Compiler) -> None:
    compiler.left = 2
    kernel, reason = cuda.find_kernel(*SIGNATURE)
    assert kernel is not None
    assert not reason
    assert compiler.asked == 3


def test_a_failure_of_the_compiler_is_remembered_by_its_plan_alone(compiler: Compiler) -> None:
    compiler.left = 3
    for _ in range(5):  # parameters of one plan
        kernel, reason = cuda.find_kernel(*SIGNATURE)
        assert kernel is None
        assert "Triton could not compile or load a kernel: FileNotFoundError" in reason
    assert compiler.asked == 3
    cuda.forget_failures()
    assert cuda.find_kernel(*SIGNATURE)[0] is not None


def test_one_of_several_processes_does_not_fall_back_alone(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_initialized", True), ("get_world_size", 4), ("get_rank", 3)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    compiler.left = 3
    with pytest.raises(RuntimeError, match=r"rank 3: Triton could not compile.*replicas come apart.*FUSED_L2_TRITON=0"):
        cuda.find_kernel(*SIGNATURE)
    assert cuda.find_kernel(*SIGNATURE)[0] is not None  # and the next step tries again


def test_triton_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_L2_TRITON", "0")
    cuda._availability.clear()
    try:
        assert cuda.why_unavailable() == "FUSED_L2_TRITON=0"
    finally:
        cuda._availability.clear()
