"""What the C++ library is built from, and where the package runs from a source checkout. Needs nothing but Python:
setup.py runs this file."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def fingerprint(csrc: Path) -> int:
    """Names and contents of the C++ sources as one number of 62 bits, not 0. setup.py compiles it into the library."""
    digest = hashlib.sha256()
    for file in sorted(p for p in csrc.iterdir() if p.suffix in (".cpp", ".h")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return int.from_bytes(digest.digest()[:8], "big") >> 2 or 1


def checkout() -> Path | None:
    """The source checkout that this package is part of; None if it is an installed one."""
    root = _PACKAGE.parent
    return root if (root / "setup.py").exists() and (root / "csrc" / "library.cpp").exists() else None


def find_kernels() -> None:
    """Make ``fused_l2.kernels`` of the folder that stands beside the package in a checkout. Installs have it inside."""
    root = checkout()
    if root is None or (_PACKAGE / "kernels").exists() or "fused_l2.kernels" in sys.modules:
        return
    folder = root / "kernels"
    spec = importlib.util.spec_from_file_location(
        "fused_l2.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is not None and spec.loader is not None and (folder / "__init__.py").exists():
        module = sys.modules["fused_l2.kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["fused_l2"].kernels = module  # type: ignore[attr-defined]


def libraries(file: str) -> list[Path]:
    """Where the library of that name may be, the best place first: in the package or, for a checkout that was not compiled, in
    an installed one."""
    found = [_PACKAGE / file]
    if checkout() is not None:
        found += [Path(entry or ".").resolve() / "fused_l2" / file for entry in sys.path]
    return [path for path in dict.fromkeys(found) if path.exists()]
