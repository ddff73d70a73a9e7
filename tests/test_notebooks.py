"""What a notebook shows: small tables, with what users name escaped. A console shows the same as text."""

from __future__ import annotations

import copy
import html
import pickle
import re
from collections import OrderedDict

import torch

import fused_l2
from fused_l2.weight_decay import normalized_weights, param_groups


def cells(shown: str) -> list[list[str]]:
    """The rows of a table, header first."""
    rows = re.findall(r"<tr>(.*?)</tr>", shown)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


def test_statistics_are_a_table_of_their_figures() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = fused_l2.AdamW(model.parameters(), statistics=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    figures = optimizer.statistics
    assert figures is not None
    header, *rows = cells(figures._repr_html_())
    assert header == ["figure", "value"]
    assert rows == [[name, f"{value:.6g}"] for name, value in figures.as_dict().items()]
    assert [line.split() for line in str(figures).splitlines()] == rows  # what print shows
    assert repr(figures) == f"Statistics({', '.join(f'{name}={value}' for name, value in rows)})"


def test_param_groups_are_the_table_that_print_shows() -> None:
    model = torch.nn.ModuleDict({"a<b>": torch.nn.Linear(2, 3), "norm": torch.nn.LayerNorm(3)})
    groups = param_groups(model, 0.1)
    shown = groups._repr_html_()
    assert "<b>" not in shown
    header, *rows = cells(shown)
    assert header == ["parameter", "shape", "decayed", "why"]
    assert rows[0] == ["a<b>.weight", "(3, 2)", "yes", "weight of Linear"]
    assert len(rows) == len(groups.rules) == 4
    assert len(shown) < 1500
    printed = str(groups).splitlines()
    assert [line.split()[0] for line in printed[1:5]] == [row[0] for row in rows]
    assert (
        re.findall(r"<p>(.*?)</p>", shown)
        == printed[5:]
        == [
            "decayed: 6 parameters in 1 tensor",
            "not decayed: 9 parameters in 3 tensors",
        ]
    )
    assert repr(groups) == str(groups)
    assert isinstance(groups, list)
    assert repr(groups[:1]).startswith("[{'params': [")  # of a list without rules
    for copied in (copy.deepcopy(groups), pickle.loads(pickle.dumps(groups))):
        assert repr(copied) == repr(groups)


def test_normalized_weights_are_the_table_that_print_shows() -> None:
    model = torch.nn.Sequential(OrderedDict({"a&b": torch.nn.Linear(2, 3), "norm": torch.nn.BatchNorm1d(3)}))
    found = normalized_weights(model, fused_l2.SGD(model.parameters(), lr=0.1, weight_decay=0.01))
    header, *rows = cells(found._repr_html_())
    assert [row[:2] for row in rows] == [["a&b.weight", "norm"]]
    assert "a&b" not in found._repr_html_()
    assert [line.split() for line in repr(found).splitlines()] == [header, *rows]
    assert normalized_weights(model, fused_l2.SGD(model.parameters()))._repr_html_() == (
        "<p>no decayed weight feeds a normalization layer</p>"
    )
