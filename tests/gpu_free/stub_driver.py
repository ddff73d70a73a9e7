"""Triton's own launcher over a libcuda that does nothing: for what is launched, and for the host's time."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fused_l2.kernels.launch import SOURCES, Kernel

from .fake_cuda import FakeDevice, nothing

_OnLaunch = ctypes.CFUNCTYPE(None, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))


def why_unavailable() -> str:
    """Why Triton's launcher cannot be built here, or nothing."""
    if torch.cuda.is_available():
        return "this machine has a real driver: see the tests marked gpu"
    if shutil.which("gcc") is None and shutil.which("clang") is None:
        return "Triton builds its launcher with gcc or clang, and there is none"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Triton builds its launcher with Python's headers, and there are none"
    return ""


_NAME = "fused_l2_stub_libcuda"  # in sys, because this module may be imported under two names, and Triton binds to one stub


def library() -> Any:
    """The stub, built, and loaded under the name that Triton asks for."""
    if (known := getattr(sys, _NAME, None)) is not None:
        return known
    folder = Path(tempfile.mkdtemp(prefix="stub-libcuda-"))
    file = folder / "libcuda.so.1"
    source = Path(__file__).with_name("stub_libcuda.c")
    compiler = shutil.which("gcc") or shutil.which("clang")
    command = [compiler, "-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(file), str(source)]
    subprocess.run(command, check=True)
    triton.knobs.nvidia.libcuda_path = str(folder)
    loaded = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    loaded.stub_launches.restype = loaded.stub_modules.restype = ctypes.c_int64
    setattr(sys, _NAME, loaded)
    return loaded


def _make_driver() -> Any:
    from triton.backends.nvidia import driver as nvidia

    class StubDriver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=0: (9, 0)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    return StubDriver()


@contextmanager
def stub_driver() -> Iterator[Any]:
    """Triton believes in a device; yields the stub library."""
    stub = library()
    driver.set_active(_make_driver())
    try:
        yield stub
    finally:
        gc.collect()
        for kernel in gc.get_objects():  # those that are left would ask the driver when they go
            if type(kernel) is CompiledKernel:
                kernel.module = None
        driver._active = None


class StubDevice(FakeDevice):
    """A device whose kernels are the product's own, launched by Triton into the stub."""

    def __init__(self) -> None:
        super().__init__(nothing)
        self.multiprocessors = 132
        self._kernels: dict[tuple[Any, ...], Kernel] = {}

    def kernel(self, kind: str, *signature: Any) -> Any:
        key = kind, *signature
        if key not in self._kernels:
            self._kernels[key] = Kernel(SOURCES[kind](*signature))
        return self._kernels[key]


# The arguments of kernels.
_P, _I = ctypes.c_uint64, ctypes.c_int32
STEP = (_P, _P, _I, _P, _P, _P, _P)
MEASURE = (_P, _P, _P, _I, _I, _P)
CONTROL = (_P, _P, _P, _P, _I, _I, ctypes.c_double)


def arguments_of(stub: Any, launch: Callable[[], None], *kinds: Any) -> list[tuple[int, int, int, tuple[Any, ...]]]:
    """What each launch made by ``launch`` was given: programs, threads, stream, and the kernel's own arguments, whose types are
    ``kinds``, one tuple for each launch."""
    seen: list[tuple[int, int, int, tuple[Any, ...]]] = []

    def remember(programs: int, threads: int, stream: int | None, arguments: Any) -> None:
        kind = kinds[len(seen)]
        values = [ctypes.cast(arguments[i], ctypes.POINTER(t))[0] for i, t in enumerate(kind)]
        seen.append((programs, threads, stream or 0, tuple(values)))

    callback = _OnLaunch(remember)
    stub.stub_on_launch(callback)
    try:
        launch()
    finally:
        stub.stub_on_launch(_OnLaunch())
    return seen
