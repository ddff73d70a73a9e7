"""Fixtures. Tests run against the installed package: the checkout itself is taken off the import path."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

import pytest  # noqa: E402
import torch  # noqa: E402

import fused_l2  # noqa: E402
from fused_l2.engines import cpu  # noqa: E402

LIBRARY = cpu.library()
CAPABILITIES = LIBRARY.available if LIBRARY else []
needs_library = pytest.mark.skipif(LIBRARY is None, reason=f"C++ library: {cpu.why_unavailable()}")


def pytest_report_header() -> list[str]:
    return [f"fused_l2 {fused_l2.__version__}, torch {torch.__version__}", *str(fused_l2.capabilities()).split("\n")]


@pytest.fixture(params=CAPABILITIES or [pytest.param("none", marks=needs_library)])
def capability(request: pytest.FixtureRequest):
    """Each instruction set this machine has."""
    assert LIBRARY is not None
    before = LIBRARY.capability
    LIBRARY.select(request.param)
    yield request.param
    LIBRARY.select(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """For tests of small tensors: nothing is gained by waiting for other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def exact_sqrt(monkeypatch: pytest.MonkeyPatch):
    """A correctly rounded torch.sqrt: MKL's, which torch calls, is an ulp off for a CPU-dependent share of numbers."""
    numpy = pytest.importorskip("numpy")  # its sqrt is the processor's instruction
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.from_numpy(numpy.sqrt(x.detach().numpy())))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
