"""The pictures of README and docs: that they show what their files hold, and can be read in both themes and on a telephone."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest
from conftest import ROOT

pytest.importorskip("matplotlib")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = [
    (page, alt, (page.parent / target).resolve())
    for page in PAGES
    for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text())
]
FILES = sorted({file for _, _, file in SHOWN})
PAPER = {"light": ("#ffffff",), "dark": ("#131416", "#0d1117")}  # of Furo and of GitHub
TELEPHONE = 358  # pixels that a page of 390 leaves a picture
SVG = "{http://www.w3.org/2000/svg}"


def contrast(one: str, other: str) -> float:
    """WCAG 2: at least 4.5 for text, 3 for what else has to be seen."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_on_both_papers(bench):
    look = bench("look")
    for theme, own, foreign in (("light", look.LIGHT, look.DARK), ("dark", look.DARK, look.LIGHT)):
        for paper in PAPER[theme]:
            assert contrast(own, paper) >= 4.5
            # A browser that asks the system where the page has a switch of its own still shows text that can be read.
            assert contrast(foreign, paper) >= 3
            assert all(contrast(colour, paper) >= 3 for colour in look.PALETTE if colour != look.INK)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_every_picture_is_for_both_themes_and_for_telephones(bench, file):
    look = bench("look")
    assert file.suffix == ".svg"
    text = file.read_text()
    assert len(text) < 60_000
    root = ElementTree.fromstring(text)
    assert [style.text for style in root.iter(f"{SVG}style")] == [re.sub("</?style>", "", look.THEMES)]
    colours = set(re.findall(r"(?:fill|stroke|stop-color|color)[:=]\s*\"?([^;\"} ]+)", text.replace(look.THEMES, "")))
    allowed = {"none", "currentColor", *(colour.lower() for colour in look.PALETTE if colour != look.INK)}
    assert {c for c in colours if not c.startswith("url(")} <= allowed  # no white paper, no black ink
    assert not re.search(r"@font-face|data:|<image|<script|dc:date", text)
    width = float(root.attrib["viewBox"].split()[2])
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: [^;\"]*?([\d.]+)px", text)]
    assert min(sizes) * min(1, TELEPHONE / width) >= 9


def test_every_picture_is_shown_and_says_what_it_shows(bench):
    pictures = bench("pictures")
    assert sorted(pictures.FOLDER.iterdir()) == FILES
    assert {f.stem for f in FILES} == {*pictures.PICTURES, *bench("theory").PICTURES}
    for page, alt, file in SHOWN:
        assert len(alt) > 80, f"{page.name}: {alt!r}"
        assert pictures.PICTURES.get(file.stem, "bench/theory.py") in page.read_text()


def test_figures_in_the_words_for_pictures_are_those_of_their_files(bench):
    pictures, tables = bench("pictures"), bench("tables")

    def results(name):
        return json.loads((ROOT / "bench" / "results" / pictures.PICTURES[name]).read_text())["results"]

    def words(name):
        return " ".join(alt for _, alt, file in SHOWN if file.stem == name)

    # README's picture is of the file that its table is of.
    assert tables.MARKED.search((ROOT / "README.md").read_text())[3] == pictures.PICTURES["ratios"]
    steps = results("ratios")["step"]
    shown_twice = [f"Bars for {len({r['case'] for r in steps})} sets"]
    for who, name in (("torch fused", "its fused step"), ("torch for-loop", "its default")):
        spans = []
        for optimizer in ("AdamW", "SGD"):
            rows = [r["rows"][who] for r in steps if r["optimizer"] == optimizer and who in r["rows"]]
            ratios = [row["ours_to_this"][1] for row in rows]
            spans.append(f"from {min(ratios):.2f} to {max(ratios):.1f} for {optimizer}")
        shown_twice.append(f"{name} {' and '.join(spans)}")
    assert all(words("ratios").count(figure) == 2 for figure in shown_twice)

    of = results("decay")["precision"]
    ends = next({n: 100 * c[-1] for n, c in r["shares"].items()} for r in of if r.get("lr") == 3e-4 and r["noise"])
    assert f"torch's fused step fall to {ends['torch fused']:.0f} %, torch's for-loop" in words("decay")
    assert f"foreach to {ends['torch foreach']:.0f} %" in words("decay")
    training = next(r for r in of if r["kind"] == "training")
    norms = [training["norm, of float32's"][name] for name in ("fused_l2 round", "torch foreach")]
    assert f"grow to {norms[0]:.2f} and {norms[1]:.2f} times" in words("training")
    exact, torch_ = (training["losses"][name] for name in ("float32", "torch foreach"))
    apart = [sum(a - b for a, b in zip(torch_[k : k + 25], exact[k : k + 25], strict=True)) / 25 for k in range(0, 500, 25)]
    assert f"falls to {-min(apart):.3f} below" in words("training")


def shown(svg):
    """The texts of a picture, and for each of its panels the points of lines, bars and markers, in parts of the panel."""
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter() if element.tag in (f"{SVG}text", f"{SVG}desc")]
    panels = []
    for panel in (g for g in root.iter(f"{SVG}g") if g.get("id", "").startswith("axes_")):
        paths = list(panel.iter(f"{SVG}path"))
        corners = points(paths[0])
        (left, top), (right, bottom) = (tuple(f(c[i] for c in corners) for i in (0, 1)) for f in (min, max))
        drawn = [points(path) for path in paths if path.get("clip-path")]
        drawn += [[(float(u.get("x")), float(u.get("y")))] for g in panel.iter(f"{SVG}g") if g.get("clip-path")
                  for u in g.iter(f"{SVG}use")]  # fmt: skip
        panels.append([((x - left) / (right - left), (y - top) / (bottom - top)) for part in drawn for x, y in part])
    return texts, panels


def points(path):
    numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", path.get("d"))]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def same(one, other):
    """Labels are equal, and points where they are to half a percent: versions of matplotlib differ in margins."""
    (texts, panels), (other_texts, other_panels) = shown(one), shown(other)
    assert texts == other_texts
    assert [len(panel) for panel in panels] == [len(panel) for panel in other_panels]
    for panel, other_panel in zip(panels, other_panels, strict=True):
        assert [x for point in panel for x in point] == pytest.approx([x for point in other_panel for x in point], abs=5e-3)


def test_pictures_of_the_docs_are_those_of_the_result_files(bench):
    pictures = bench("pictures")
    for name, drawn in pictures.of_files().items():
        same((pictures.FOLDER / f"{name}.svg").read_text(), drawn)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["effective-lr", "shrinkage"])
def test_pictures_of_theory_are_those_of_today(bench, name):
    pytest.importorskip("sklearn")
    look, theory = bench("look"), bench("theory")
    same((bench("pictures").FOLDER / f"{name}.svg").read_text(), look.svg(theory.PICTURES[name], source="bench/theory.py"))


def test_the_same_figure_gives_the_same_bytes_and_its_words_as_they_are(bench):
    look = bench("look")

    def draw():
        from matplotlib import pyplot

        figure, axis = pyplot.subplots()
        axis.plot([1, 2, 3.123456], [1, 2, 1], "o-")
        axis.bar([1], [2], hatch="//", label="lr 0.00034567")
        axis.legend()
        return figure

    first = look.svg(draw)
    assert first == look.svg(draw)
    assert "lr 0.00034567" in first
