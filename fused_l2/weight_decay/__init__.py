"""Weight decay that does what its name says: its coefficient, its param groups, its penalty, and where it is something else.

Training with the loss mean(data) + (lambda / 2n) * sum(w^2) over n training examples adds (lambda / n) * w to the gradient.
``weight_decay``, here and in torch.optim, is that coefficient of w: lambda / n, not lambda.
"""

from .conversion import from_lambda, from_normalized, from_timescale, timescale, to_lambda, to_normalized
from .normalization import NormalizedWeight, NormalizedWeights, normalized_weights
from .param_groups import ParamGroups, ParamRule, param_groups
from .penalty import penalty

__all__ = [
    "NormalizedWeight",
    "NormalizedWeights",
    "ParamGroups",
    "ParamRule",
    "from_lambda",
    "from_normalized",
    "from_timescale",
    "normalized_weights",
    "param_groups",
    "penalty",
    "timescale",
    "to_lambda",
    "to_normalized",
]


def __dir__() -> list[str]:
    return [*__all__]
