"""One compilation for all processes of a node: the others wait, and find its result in Triton's cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from triton import knobs

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE = 60.0  # seconds. What a process waits for may have been stopped, and compiling twice does no harm.


@contextmanager
def alone() -> Iterator[None]:
    """Alone among the processes that use this cache, where its file system has locks."""
    try:
        folder = Path(knobs.cache.dir)
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "fused_l2.lock", "a")  # noqa: SIM115
    except OSError:  # Triton will say so itself, if it matters
        yield
        return
    with file:
        until = time.monotonic() + PATIENCE
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    break
                time.sleep(0.01)
            except OSError:
                break
        yield  # closing the file gives it back, as the end of the process does
