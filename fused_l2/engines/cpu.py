"""The CPU engine: the C++ library ``libfused_l2``, loaded with ctypes.

The library is built without torch or Python headers. It finds torch's thread pool and its tensor accessors, functions of
torch's stable C ABI, in the libtorch_cpu that the process has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _sources
from ..tables.tensor_table import int64_array, layout

CAPABILITY_VARIABLE = "FUSED_L2_CPU_CAPABILITY"
_FILE = {"win32": "fused_l2.dll", "darwin": "libfused_l2.dylib"}.get(sys.platform, "libfused_l2.so")
_TORCH_FILE = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
_REMEDY = (
    "Install a C++17 compiler (g++ or clang++) and, in a checkout of its sources, run "
    "`pip install --force-reinstall --no-deps --no-cache-dir .`"
)

_POINTER, _INTEGER, _TEXT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
# The functions of csrc/library.cpp, in its order: result and arguments. fused_l2_layout is asked before these are known to fit.
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "sources": (_INTEGER, ()),
    "connect": (_INTEGER, (_TEXT,)),
    "thread_count": (_INTEGER, ()),
    "capability_name": (_TEXT, (_INTEGER,)),
    "capability_supported": (_INTEGER, (_INTEGER,)),
    "capability": (_INTEGER, ()),
    "select_capability": (None, (_INTEGER,)),
    "set_offsets": (None, (_INTEGER, _INTEGER, _INTEGER)),
    "release": (None, (_INTEGER,)),
    "make_record": (_INTEGER, (_POINTER, _INTEGER, _INTEGER, _INTEGER, _INTEGER, _INTEGER, _POINTER)),
    "make_records": (None, (_POINTER, _INTEGER, _INTEGER, _INTEGER, _POINTER, _INTEGER, _POINTER)),
    "look": (_INTEGER, (_INTEGER, _INTEGER, _POINTER)),
    "place": (None, (_POINTER, _POINTER, _POINTER, _POINTER, _INTEGER)),
    "exchange": (None, (_POINTER, _POINTER, _POINTER, _POINTER, _INTEGER)),
    "words_hold": (_INTEGER, (_POINTER, _POINTER, _INTEGER)),
    "unexpected_counts": (_INTEGER, (_POINTER, _INTEGER, _POINTER)),
    # From here on the result is a status, see failure().
    "count": (_INTEGER, (_POINTER, _INTEGER)),
    "step": (_INTEGER, (_POINTER, _INTEGER, _POINTER)),
    "step_measured": (_INTEGER, (_POINTER, _INTEGER, _INTEGER, _INTEGER, _POINTER, _POINTER)),
    "sums_of_squares": (_INTEGER, (_POINTER, _POINTER, _POINTER, _INTEGER, _POINTER)),
    "measure_grads": (_INTEGER, (_POINTER, _INTEGER, _INTEGER, _INTEGER, _POINTER)),
}
_NO_MEMORY = 1  # csrc/library.cpp


class Library:
    """The loaded C++ library. ``capability`` is the instruction set in use, ``available`` those this machine has."""

    def __init__(self, path: Path) -> None:
        # Two views of one library: long calls let other Python threads run, short ones keep the GIL, which is cheaper.
        self._long: Any = ctypes.CDLL(str(path))
        self._short: Any = ctypes.PyDLL(str(path))
        self._short.fused_l2_layout.restype = _TEXT
        if self._short.fused_l2_layout().decode() != layout():
            raise OSError(f"{path} was built from other sources than this Python code")
        for name, (result, arguments) in _FUNCTIONS.items():
            for library in (self._long, self._short):
                function = getattr(library, f"fused_l2_{name}")
                function.restype, function.argtypes = result, arguments
        root, built_from = _sources.checkout(), self._short.fused_l2_sources()
        if root is not None and built_from not in (0, _sources.fingerprint(root / "csrc")):
            raise OSError(f"{path} was built from other sources than those in {root / 'csrc'}")
        names: list[str] = []
        while name := self._short.fused_l2_capability_name(len(names)):
            names.append(name.decode())
        self._names = names
        self.available = [n for i, n in enumerate(names) if self._short.fused_l2_capability_supported(i)]
        self.forced = bool(os.environ.get(CAPABILITY_VARIABLE))
        if self.forced:
            self.select(os.environ[CAPABILITY_VARIABLE])

        torch_library = Path(torch.__file__).parent / "lib" / _TORCH_FILE
        found = self._short.fused_l2_connect(os.fsencode(torch_library))
        self.has_threads = bool(found & 1)
        self.has_tensors = bool(found & 2) and hasattr(torch._C, "_aoti")

        # What step() calls each time, bound once.
        self.look = self._short.fused_l2_look
        self.unexpected_counts = self._short.fused_l2_unexpected_counts
        self.step = self._long.fused_l2_step
        self.step_measured = self._long.fused_l2_step_measured
        self.measure_grads = self._long.fused_l2_measure_grads
        self.count = self._short.fused_l2_count
        self.make_record = self._short.fused_l2_make_record
        self.make_records = self._short.fused_l2_make_records
        self.set_offsets = self._short.fused_l2_set_offsets
        self.place = self._short.fused_l2_place
        self.exchange = self._short.fused_l2_exchange
        self.words_hold = self._short.fused_l2_words_hold
        self.release = self._short.fused_l2_release

    @property
    def capability(self) -> str:
        return str(self._names[self._short.fused_l2_capability()])

    def select(self, name: str) -> None:
        """Use this instruction set from now on."""
        if name not in self.available:
            raise ValueError(
                f"CPU capability {name!r} is not available on this machine; choose one of {', '.join(self.available)}"
                f" (environment variable {CAPABILITY_VARIABLE})"
            )
        self._short.fused_l2_select_capability(self._names.index(name))

    def thread_count(self) -> int:
        return int(self._short.fused_l2_thread_count())

    def sums_of_squares(self, tensors: Sequence[Tensor], dtypes: Sequence[int]) -> list[float]:
        """Sum of x^2 per tensor, in float64; the same bits for any number of threads."""
        out = (ctypes.c_double * len(tensors))()
        status = self._long.fused_l2_sums_of_squares(
            int64_array([t.data_ptr() for t in tensors]),
            int64_array(dtypes),
            int64_array([t.numel() for t in tensors]),
            len(tensors),
            out,
        )
        if status:
            raise failure(status)
        return list(out)


def _is_cut_off(path: Path) -> bool:
    """Whether an ELF file ends before what is to be loaded of it does. Reading that would end the process with a bus error;
    what is wrong with other kinds of files the loader says itself."""
    with path.open("rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:5] != b"\x7fELF\2":
            return False
        order = "<" if head[5] == 1 else ">"
        (at,), (size, count) = struct.unpack_from(f"{order}Q", head, 32), struct.unpack_from(f"{order}HH", head, 54)
        file.seek(at)
        headers = file.read(size * count)
    if len(headers) < size * count:
        return True
    for i in range(count):
        kind, _, begin = struct.unpack_from(f"{order}IIQ", headers, i * size)
        (length,) = struct.unpack_from(f"{order}Q", headers, i * size + 32)
        if kind == 1 and begin + length > path.stat().st_size:
            return True
    return False


def failure(status: int) -> Exception:
    """What a C++ exception was that ended a call of the library, which had changed nothing."""
    if status == _NO_MEMORY:
        return MemoryError("fused_l2: there is no memory to share the work out over tensors and threads")
    return RuntimeError("fused_l2: the C++ library ended a call with an exception that it does not know")


@functools.cache
def _load() -> tuple[Library | None, str]:
    root = _sources.checkout()
    remedy = _REMEDY if root is None else f"Run `pip install -e .` in {root}; it needs a C++17 compiler (g++ or clang++)."
    why = f"fused_l2 was installed without its C++ library ({_FILE} is missing). {remedy}"
    if root is not None:
        why = f"{root} is a source checkout whose C++ library was not compiled, and it is what Python imports here. {remedy}"
    for path in _sources.libraries(_FILE):
        try:
            if _is_cut_off(path):
                raise OSError(f"{path} is only the beginning of a library")
            return Library(path), ""
        except (OSError, AttributeError) as error:  # AttributeError: a function that an older library lacks
            why = f"the C++ library could not be loaded: {error}. {remedy}"
    return None, why


def library() -> Library | None:
    """The C++ library, or None (then :func:`why_unavailable` tells)."""
    return _load()[0]


def why_unavailable() -> str:
    return _load()[1]
