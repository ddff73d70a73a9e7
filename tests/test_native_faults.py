"""What the C++ library meets in a process: no memory, and threads whose floating-point mode others have changed."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import assert_same_bits, make_params, run, set_grads
from conftest import needs_library

import fused_l2

pytestmark = needs_library
_LINUX_X86 = sys.platform == "linux" and platform.machine() == "x86_64"

# No memory. operator new is replaced in the process, and fails when it is called for the n-th time since it was told to.

_FAILING_NEW = """
#include <cstdlib>
#include <new>
static thread_local long left = 0;
extern "C" void fail_at(long n) { left = n; }
void* operator new(std::size_t size) {
  if (left > 0 && --left == 0) throw std::bad_alloc();
  if (void* found = std::malloc(size ? size : 1)) return found;
  throw std::bad_alloc();
}
void* operator new[](std::size_t size) { return operator new(size); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
"""

_SWEEP = """
import ctypes, sys
sys.path.insert(0, sys.argv[2])
import torch
from comparing import CASES, assert_same_bits, assert_unchanged, make_params, set_grads, snapshot
import fused_l2
from fused_l2.engines import cpu

torch.set_num_threads(2)
fail_at = ctypes.CDLL(sys.argv[1]).fail_at
library = cpu.library()
failing = 0  # which allocation of the next call fails; 0: none


def armed(name):
    call = getattr(library, name)

    def wrapped(*arguments):
        fail_at(failing)
        try:
            return call(*arguments)
        finally:
            fail_at(0)

    setattr(library, name, wrapped)


for name in ("step", "step_measured", "measure_grads"):
    armed(name)
failed = {}
for name, options, sizes in (
    ("SGD", {"dampening": 0.5, "nesterov": False}, (5, 33)),
    ("AdamW", {}, (5, 40000)),
    ("AdamW", {"statistics": True}, (5, 33)),
    ("SGD", {"statistics": True}, (5, 300000)),
    ("AdamW", {"max_grad_norm": 0.1}, (5, 33)),
    ("SGD", {"max_grad_norm": 0.1}, (5, 300000)),
):
    for first in (0, 1):
        for n in range(1, 100):
            ends = []
            for fails in (False, True):
                params = make_params(sizes)
                optimizer = getattr(fused_l2, name)(params, **{**CASES[name], **options})
                for step in range(first):
                    set_grads(params, step)
                    optimizer.step()
                set_grads(params, first)
                if fails:
                    before = snapshot(optimizer)
                    failing = n
                    try:
                        optimizer.step()
                    except MemoryError as error:
                        assert "no memory" in str(error)
                        before["versions"] = [p._version for p in params]  # the step had begun to tell autograd
                        assert_unchanged(before, optimizer)
                        raised = True
                    else:
                        raised = False
                    failing = 0
                    if not raised:
                        break
                for step in range(first, 3):
                    set_grads(params, step)
                    optimizer.step()
                ends.append([t for p in params for t in (p, *optimizer.state[p].values())])
            if not raised:
                break
            failed[name, str(options), first] = n
            assert_same_bits(*ends)
assert len(failed) == 12 and min(failed.values()) >= 2, failed
call = library._long.fused_l2_sums_of_squares
p = torch.ones(100000)
for n in range(1, 100):
    class Long:
        @staticmethod
        def fused_l2_sums_of_squares(*arguments):
            fail_at(n)
            try:
                return call(*arguments)
            finally:
                fail_at(0)
    kept, library._long = library._long, Long
    try:
        found = library.sums_of_squares([p], [0])
    except MemoryError:
        continue
    finally:
        library._long = kept
    assert n > 2 and found == [1e5], (n, found)
    break
print("ok", failed)
"""


@pytest.mark.sweep
def test_every_allocation_that_fails_is_a_memory_error_and_nothing_has_changed(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("replaces operator new with a C++ compiler and LD_PRELOAD")
    source, library = tmp_path / "failing_new.cpp", tmp_path / "failing_new.so"
    source.write_text(_FAILING_NEW)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", _SWEEP, str(library), str(Path(__file__).parent)],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.startswith("ok")


# Floating-point modes.

_SMALL = 2e-20  # squares are denormal in float32


def _steps(name: str, size: int, dtype: torch.dtype = torch.float32, **options: Any) -> list[torch.Tensor]:
    """A run whose gradients, states and weights are small enough for flushing to matter."""
    params = make_params((size, 7), dtype)
    with torch.no_grad():
        for p in params:
            p.mul_(_SMALL)
    optimizer = getattr(fused_l2, name)(params, **options)
    for step in range(3):
        set_grads(params, step)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(_SMALL * _SMALL if name == "SGD" else _SMALL)
        optimizer.step()
    norm = [] if optimizer.grad_norm is None else [optimizer.grad_norm]
    return [*norm, *(t for p in params for t in (p.detach(), *optimizer.state[p].values()))]


@pytest.mark.sweep(5)
@pytest.mark.usefixtures("threads", "capability")
@pytest.mark.parametrize("size", [33, 100_000])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {"lr": 1e-21, "weight_decay": 0.1}),
        ("SGD", {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-18}),
        ("AdamW", {"lr": 1e-21, "statistics": True}),
        ("SGD", {"lr": 0.5, "momentum": 0.9, "max_grad_norm": 1.0}),
    ],
    ids=str,
)
def test_denormals_are_kept_whatever_the_mode_of_the_thread(name: str, options: dict[str, Any], size: int) -> None:
    expected = _steps(name, size, **options)
    # Python's and torch's own preparations are left out: under the mode they would flush, too.
    library = fused_l2.engines.cpu.library()
    found = _with_native_calls_in(library, lambda: torch.set_flush_denormal(True), lambda: torch.set_flush_denormal(False),
                                  lambda: _steps(name, size, **options))  # fmt: skip
    assert any(bool(((t != 0) & (t.abs() < 2.0**-126)).any()) for t in expected), "nothing here is denormal"
    assert_same_bits(found, expected)


def _with_native_calls_in(library: Any, enter: Any, leave: Any, call: Any) -> Any:
    """call(), in which every call of the library that computes is made in a mode of the thread."""
    kept = {name: getattr(library, name) for name in ("step", "step_measured", "measure_grads")}

    def within(native: Any) -> Any:
        def run_in_mode(*arguments: Any) -> Any:
            enter()
            try:
                return native(*arguments)
            finally:
                leave()

        return run_in_mode

    try:
        for name, native in kept.items():
            setattr(library, name, within(native))
        return call()
    finally:
        for name, native in kept.items():
            setattr(library, name, native)


@pytest.mark.usefixtures("capability")
def test_a_step_leaves_the_mode_that_it_found() -> None:
    tiny = torch.full((1,), 2.0**-130)
    assert torch.set_flush_denormal(True)
    try:
        run(lambda params: fused_l2.AdamW(params, max_grad_norm=1.0), make_params((5,)), 2)
        assert float(tiny * 0.5) == 0
    finally:
        torch.set_flush_denormal(False)
    run(lambda params: fused_l2.AdamW(params, max_grad_norm=1.0), make_params((5,)), 2)
    assert float(tiny * 0.5) == 2.0**-131


@pytest.mark.sweep(9)
@pytest.mark.skipif(not _LINUX_X86, reason="names rounding modes by glibc's numbers for x86-64")
@pytest.mark.usefixtures("threads", "capability")
@pytest.mark.parametrize("mode", [0x400, 0x800, 0xC00], ids=["down", "up", "to zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_kernels_round_to_nearest_whatever_the_mode_of_the_thread(name: str, dtype: torch.dtype, mode: int) -> None:
    libm = ctypes.CDLL("libm.so.6")
    library = fused_l2.engines.cpu.library()

    def steps() -> list[torch.Tensor]:
        params = make_params((40_000, 7), dtype)
        optimizer = run(lambda p: getattr(fused_l2, name)(p, lr=0.01, weight_decay=0.1, max_grad_norm=1.0), params, 2)
        return [t for p in params for t in (p.detach(), *optimizer.state[p].values())]

    expected = steps()
    found = _with_native_calls_in(library, lambda: libm.fesetround(mode), lambda: libm.fesetround(0), steps)
    assert_same_bits(found, expected)


def test_threads_that_were_started_in_another_mode_keep_denormals() -> None:
    """A thread has the mode of the one that started it: torch's pool, started within the mode, flushes."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(4); torch.set_flush_denormal(True)\n"
        "(torch.ones(1_000_000) * 2).sum(); torch.set_flush_denormal(False)\n"
        "import test_native_faults as t; from comparing import assert_same_bits\n"
        "o = {'lr': 1e-21, 'weight_decay': 0.1}; many = t._steps('AdamW', 300_000, **o); torch.set_num_threads(1)\n"
        "assert_same_bits(many, t._steps('AdamW', 300_000, **o)); print('ok')"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, check=False
    )
    assert found.stdout == "ok\n", found.stderr[-3000:]
