"""The Python in README and docs runs as it stands."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_snippets_run(page):
    import torch

    namespace = {"model": torch.nn.Linear(4, 2)}
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        if needed := re.match(r"# pip install (\w+)", snippet):
            pytest.importorskip(needed[1], reason=f"the rest of {page.name} needs {needed[1]}")
        exec(compile(snippet, str(page), "exec"), namespace)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"], ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


UNIT = r"us|ns|ms|microseconds|milliseconds|GB/s|[KMG]B|%|times as (?:long|fast)|ulp"
FIGURE = re.compile(rf"\b\d[\d.,]*\s?(?:{UNIT})(?![\w-])")
SOURCE = re.compile(
    r"bench/results/[\w-]+\.json|tests/[\w/]+|\]\((?:\.\./)*(?:fused_l2|csrc|kernels)/|https://|<!-- table|python -m bench"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_figure_without_its_source(page):
    """Every section that shows a measured figure names what it comes from: a file of results, a test, the code, a paper."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for section in re.split(r"^#{1,3} ", text, flags=re.MULTILINE):
        found = FIGURE.search(section)
        assert found is None or SOURCE.search(section), f"{section.splitlines()[0]!r} shows {found[0]!r} without a source"
