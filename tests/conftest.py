"""Fixtures. Tests run against the installed package: the checkout itself is taken off the import path."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample",
        action="store_true",
        help="of tests marked sweep(n), which go through long lists of combinations, run each n-th one, as `make test` does",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--sample"):
        return
    of_test: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        of_test.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    dropped = {item for alike in of_test.values() for item in left_out_of(alike)}
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = [item for item in items if item not in dropped]


def left_out_of(alike: list[pytest.Item]) -> list[pytest.Item]:
    """What a sample leaves out of the cases of one test: it has each n-th, and every value of a parameter that has few."""
    marker = alike[0].get_closest_marker("sweep")
    if marker is None:
        return []
    if not marker.args:
        return alike
    given = [[(name, str(value)) for name, value in item.callspec.params.items()] for item in alike]  # type: ignore[attr-defined]
    values = Counter(name for name, _ in {pair for pairs in given for pair in pairs})
    seen: set[tuple[str, str]] = set()
    dropped = []
    for i, (item, pairs) in enumerate(zip(alike, given, strict=True)):
        new = {pair for pair in pairs if values[pair[0]] <= 8} - seen
        if new or i % marker.args[0] == 0:
            seen |= new
        else:
            dropped.append(item)
    return dropped


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--sample"):
        terminalreporter.write_line("Of long lists of combinations (tests marked sweep) a sample was run. All: make test-all")


def pytest_report_header() -> list[str]:
    return [f"fused_l2 {fused_l2.__version__}, torch {torch.__version__}", *str(fused_l2.capabilities()).split("\n")]


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/."""
    monkeypatch.syspath_prepend(str(ROOT))
    yield lambda name: importlib.import_module(f"bench.{name}")
    for name in [n for n in sys.modules if n == "bench" or n.startswith("bench.")]:
        del sys.modules[name]


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
