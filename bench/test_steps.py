"""``pytest bench/``: the small fixed set that a contributor runs before and after a change (pytest-benchmark).

    pytest bench/ --benchmark-autosave
    ... change ...
    pytest bench/ --benchmark-compare

Before and after are two runs here, and a machine changes between them: a difference below the spread shown says nothing. What
decides is a ratio taken within one run, ``python -m bench step --compare before.json``.
"""

from __future__ import annotations

import pytest

from . import providers
from .cases import CASES, OPTIMIZERS

CHOSEN = ("one-64k", "one-1m", "mlp-40", "tiny-1000", "resnet50")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in CHOSEN], ids=lambda c: c.name)
@pytest.mark.parametrize("provider", ["fused_l2", "torch fused"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_step(benchmark, optimizer, provider, case):
    benchmark.group = f"{optimizer} {case.name}"
    contest = providers.Contest(case, optimizer, OPTIMIZERS[optimizer], names=[provider])
    assert contest.absent == {}
    benchmark(contest.optimizers[provider].step)
