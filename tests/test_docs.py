"""The Python in README and docs runs as it stands."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MORE = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_snippets_run(page, monkeypatch, tmp_path):
    import torch

    monkeypatch.chdir(tmp_path)  # where they save

    namespace, left_out = {"model": torch.nn.Linear(4, 2)}, []
    for snippet, output in re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", page.read_text(), re.DOTALL):
        if needed := re.match(r"# pip install (\w+)", snippet):
            try:
                importlib.import_module(needed[1])
            except ModuleNotFoundError as error:  # its own name, or that of what it needs: timm needs torchvision
                left_out.append(f"{needed[1]} ({error})")
                continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(snippet, str(page), "exec"), namespace)
        # What a snippet prints is shown under it.
        assert printed.getvalue().strip() == output.strip(), snippet
    if left_out:
        pytest.skip(f"snippets of {page.name} left out: {', '.join(left_out)}")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_code_fits_its_column(page):
    """85 columns: wider code scrolls in the site and on GitHub. Of ```text, which a program prints, this is not asked."""
    for language, snippet in re.findall(r"^```(\S*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in snippet.splitlines():
            assert len(line) <= 85 or language == "text", line


def sentences(page: Path) -> Iterator[str]:
    """Those of the prose: no code, no tables, no headings, no addresses."""
    text = re.sub(r"^```.*?^```$|\$\$.*?\$\$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(\[\w+\]: .*|\|.*|#.*|<!--.*)$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^ *([*-]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`|\$[^$]*\$", "x", re.sub(r"\]\([^)]*\)", "]", text))
    for paragraph in re.split(r"\n\s*\n", text):
        yield from (s for s in re.split(r"(?<=[.!?])[\"*)]*\s+", " ".join(paragraph.split())) if re.search(r"\w", s))


def test_sentences_are_short():
    """At most one of fifty has more than 35 words."""
    found = [sentence for page in (*PAGES, *MORE) for sentence in sentences(page)]
    long = [sentence for sentence in found if len(re.findall(r"\S*\w\S*", sentence)) > 35]
    assert len(found) > 800
    assert len(long) <= len(found) / 50, long


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_tables_are_tables(page):
    """Header, rule and rows have as many cells: otherwise a table is printed as text, or loses cells."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = table.splitlines()
        cells = [len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) for line in lines]
        assert len(lines) > 1, lines[0]
        assert re.fullmatch(r"[|:\- ]+", lines[1]), lines[0]
        assert len(set(cells)) == 1, lines[cells.index(max(cells))]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_what_follows_a_table_is_not_a_row_of_it(page):
    """Markdown takes every line after a table for a row, up to an empty one or a comment."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert not (swallowed := re.search(r"^\|.*\n(?!\||<!--|#|$)(.+)", text, re.MULTILINE)), swallowed[1]


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"], ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_menu_names_pages_as_their_headings_do():
    """How-to pages say first what to do, in the menu of the site and on the page."""
    entries = re.findall(r"^(.+) <(\S+\.md)>$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    assert {page for _, page in entries} == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    for label, page in entries:
        heading = (ROOT / "docs" / page).read_text().splitlines()[0].removeprefix("# ")
        assert label.split()[0] == heading.split()[0], (label, heading)


def test_the_tree_in_contributing_is_the_tree():
    """A line for each file of the package, of kernels/, csrc/ and bench/, and for each file of tests/ that is no test."""
    tree = re.search(r"## Where things are.*?```\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    listed, folder = [], ROOT
    for line in tree.splitlines():
        name = re.match(r" *(\S+)", line)[1]
        if not line.startswith(" "):
            folder = ROOT / name
        listed.append(folder / name if line.startswith(" ") else folder)
    assert len(set(listed)) == len(listed)
    assert [path for path in listed if not path.exists()] == []
    for line in tree.splitlines():
        assert len(line.split(maxsplit=1)) == 2 or line.endswith("__init__.py"), line
    wanted = {
        file
        for top in ("fused_l2", "kernels", "csrc", "bench")
        for file in (ROOT / top).rglob("*")
        if file.suffix in (".py", ".h", ".cpp", ".typed")
    }
    wanted |= {file for file in (ROOT / "tests").iterdir() if file.is_file() and not file.name.startswith("test_")}
    linked = ROOT / "fused_l2" / "kernels"  # to kernels/
    assert {file for file in wanted if linked not in file.parents} == {
        path for path in listed if path.is_file() and path.parent not in (ROOT, ROOT / ".ci")
    }


UNIT = r"us|ns|ms|microseconds|milliseconds|GB/s|[KMG]B|%|times as (?:long|fast)|ulp"
FIGURE = re.compile(rf"\b\d[\d.,]*\s?(?:{UNIT})(?![\w-])")
SOURCE = re.compile(
    r"bench/results/[\w-]+\.json|tests/[\w/]+|\]\((?:\.\./)*(?:fused_l2|csrc|kernels|bench)/|https://|<!-- table|"
    r"python -m bench"
)
ITEM = r" *(?:[*-]|\d+\.) "


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_figure_without_its_source(page):
    """A paragraph, item or table row that shows a measured figure names what it comes from: a file of results, a test, the
    code, a paper. So may the paragraph above a list, and the measured table that a paragraph stands before or behind."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"<!-- table.*?<!-- end -->", lambda table: table[0].replace("\n|", " "), text, flags=re.DOTALL)
    for section in re.split(r"^#{1,6} ", text, flags=re.MULTILINE):
        parts, above = re.split(rf"\n\s*\n|\n(?={ITEM})|\n(?=\|)", section), ""
        for i, part in enumerate(parts):
            tables = [near for near in parts[max(i - 1, 0) : i + 2] if "<!-- table" in near]
            above = above if re.match(ITEM, part) else part
            found = FIGURE.search(part)
            assert found is None or any(map(SOURCE.search, (part, above, *tables))), f"{found[0]!r} without a source: {part}"


def test_readme_counts_the_traps():
    rows = re.findall(r"^\| T\d\d \|[^|]*\|([^|]*)\|", (ROOT / "docs" / "traps.md").read_text(), re.MULTILINE)
    reported = sum(bool(cell.strip()) for cell in rows)
    said = f"{len(rows)} failures of other optimizers, {reported} of them with a public report, are tests"
    assert said in (ROOT / "README.md").read_text()


def test_every_trap_that_a_test_names_is_in_the_list():
    rows = re.findall(r"^\| (T\d\d) \|.*\| ([^|]*) \|$", (ROOT / "docs" / "traps.md").read_text(), re.MULTILINE)
    assert all(tests for _, tests in rows)
    found = {n for file in (ROOT / "tests").rglob("*.py") for n in re.findall(r"(?<![A-Za-z0-9])T\d\d(?!\d)", file.read_text())}
    assert found == {number for number, _ in rows}
