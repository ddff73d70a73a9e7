"""Drop-in replacements for ``torch.optim.SGD``, ``Adam`` and ``AdamW`` that make one step in one pass over memory.

Change the import, nothing else::

    import fused_l2 as optim

    optimizer = optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)

``optim.lr_scheduler``, ``optim.swa_utils`` and ``optim.Optimizer`` are torch's own; other optimizers are in ``torch.optim``.

``fused_l2.weight_decay`` turns the lambda of a loss with L2 regularization into ``weight_decay`` and back, makes param groups
and reports the penalty. ``fused_l2.capabilities()`` tells which engine serves which device. ``fused_l2.warmup()`` compiles
GPU kernels ahead. ``fused_l2.doctor.examine()`` says what any optimizer really does to a model's weights.
"""

from typing import Any

import torch.optim
from torch.optim import Optimizer, lr_scheduler, swa_utils

from . import weight_decay
from ._sources import find_kernels as _find_kernels
from ._version import __version__
from ._warnings import FusedL2Warning
from .adam import Adam, AdamW
from .backward import step_in_backward
from .checkpoint import load_master_state_dict, master_state_dict
from .engines import capabilities
from .sgd import SGD
from .statistics import Statistics
from .warmup import warmup

_find_kernels()

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "FusedL2Warning",
    "Optimizer",
    "Statistics",
    "__version__",
    "capabilities",
    "load_master_state_dict",
    "lr_scheduler",
    "master_state_dict",
    "step_in_backward",
    "swa_utils",
    "warmup",
    "weight_decay",
]


def __getattr__(name: str) -> Any:
    if name == "doctor":  # imported when it is called
        import importlib

        return importlib.import_module(".doctor", __name__)
    if not name.startswith("_") and hasattr(torch.optim, name):
        raise AttributeError(f"fused_l2 has SGD, Adam and AdamW. Use torch.optim.{name}")
    raise AttributeError(f"module 'fused_l2' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "doctor"]
