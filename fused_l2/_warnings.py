"""The category of every warning of this package, and where a warning points: whose line it is. Needs nothing but Python."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class FusedL2Warning(UserWarning):
    """The category of every warning that fused_l2 gives. Its messages begin with ``fused_l2:`` or ``fused_l2 steps``.

    To silence them, or to turn them into errors::

        warnings.filterwarnings("ignore", category=fused_l2.FusedL2Warning)
        warnings.filterwarnings("error", category=fused_l2.FusedL2Warning)
    """


def warn(message: str) -> None:
    """Warn at the line of the caller's program: the nearest that is neither of this package nor of torch."""
    frame, level = sys._getframe(1), 2  # 1 would be the line below
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fused_l2", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, FusedL2Warning, stacklevel=level)


def is_of_a_library(frame: FrameType) -> bool:
    """Whether it is an installed package's line, or torch's, and not one of the user's program."""
    path = frame.f_code.co_filename.replace("\\", "/")
    is_installed = "/site-packages/" in path or "/dist-packages/" in path
    return is_installed or frame.f_globals.get("__name__", "").partition(".")[0] == "torch"
