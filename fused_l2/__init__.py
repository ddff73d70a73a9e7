"""Drop-in replacements for ``torch.optim.SGD``, ``Adam`` and ``AdamW`` that make one step in one pass over memory.

Change the import, nothing else::

    import fused_l2 as optim

    optimizer = optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)

``fused_l2.weight_decay`` turns the lambda of a loss with L2 regularization into ``weight_decay`` and back, makes param groups
and reports the penalty; ``fused_l2.capabilities()`` tells which engine serves which device.
"""

from . import weight_decay
from ._version import __version__
from .adam import Adam, AdamW
from .backward import step_in_backward
from .checkpoint import load_master_state_dict, master_state_dict
from .engines import capabilities
from .sgd import SGD
from .statistics import Statistics

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Statistics",
    "__version__",
    "capabilities",
    "load_master_state_dict",
    "master_state_dict",
    "step_in_backward",
    "weight_decay",
]
