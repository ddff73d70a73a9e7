"""What an examination returns: findings and a table, as text, HTML and plain data."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from .. import _html
from .findings import DOUBTFUL, NOTE, SEVERITIES, WRONG, Finding, wrapped
from .layers import Layer

_COLUMNS = {
    "name": "parameter", "shape": "shape", "dtype": "dtype", "group": "group", "lr": "lr", "weight_decay": "weight_decay",
    "lam": "lambda", "lr_wd": "lr*wd", "half_life": "half-life", "half_life_epochs": "epochs", "arrives": "arrives",
    "arrived": "arrived", "norm": "|w|", "equilibrium": "|w| at rest", "effective_lr": "lr/|w|^2", "penalty": "penalty",
}  # fmt: skip
ROWS = 40


class Report:
    """What :func:`fused_l2.doctor.examine` found. Prints as findings and a table."""

    def __init__(self, title: str, findings: Sequence[Finding], layers: Sequence[Layer], unknown: Sequence[str]) -> None:
        #: sorted: wrong, doubtful, notes
        self.findings = sorted(findings, key=lambda f: SEVERITIES.index(f.severity))
        #: a :class:`Layer` for every tensor
        self.layers = list(layers)
        #: what could not be known, in words
        self.unknown = list(unknown)
        self.title = title

    def codes(self, severity: str | None = None) -> set[str]:
        """The codes that were found.

        Args:
            severity: only those that are ``"wrong"``, ``"doubtful"`` or a ``"note"``.
        """
        return {f.code for f in self.findings if severity in (None, f.severity)}

    def of(self, code: str) -> list[Finding]:
        """The findings of one kind.

        Args:
            code: as ``"lambda-not-divided"``; docs/doctor.md has them all.
        """
        return [f for f in self.findings if f.code == code]

    @property
    def is_wrong(self) -> bool:
        """Whether a finding is ``"wrong"``."""
        return any(f.severity == WRONG for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {
            "title": self.title, "findings": [f.as_dict() for f in self.findings],
            "layers": [row.as_dict() for row in self.layers], "unknown": self.unknown,
        }  # fmt: skip

    def table(self, rows: int | None = None) -> str:
        """The table alone.

        Args:
            rows: at most so many tensors. None: all.
        """
        shown = self.layers if rows is None else self.layers[:rows]
        header, *body = self._cells(shown)
        widths = [max(len(row[i]) for row in (header, *body)) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (header, *body)]
        if len(shown) < len(self.layers):
            lines.append(f"... {len(self.layers) - len(shown)} more: report.table()")
        return "\n".join(lines)

    def __str__(self) -> str:
        parts = [f"{self.title}: {self.summary()}", *map(str, self.findings)]
        parts += ["\n".join(wrapped("not known: ", text)) for text in self.unknown]
        if self.layers:
            parts += ["", self.table(ROWS)]
        return "\n".join(parts)

    __repr__ = __str__

    def summary(self) -> str:
        """How many findings of each severity."""
        counts = {s: sum(f.severity == s for f in self.findings) for s in SEVERITIES}
        return f"{counts[WRONG]} wrong, {counts[DOUBTFUL]} doubtful, {counts[NOTE]} note{'s' * (counts[NOTE] != 1)}"

    def _repr_html_(self) -> str:
        header, *body = self._cells(self.layers)

        found = "".join(
            f"<li><b>{f.severity}: {f.code}</b> {html.escape(f.what)} {html.escape(f.why)}<br>"
            f"<small>{html.escape(', '.join(f.parameters))}</small><br><code>{html.escape(f.fix)}</code></li>"
            for f in self.findings
        )
        unknown = "".join(f"<p>not known: {html.escape(text)}</p>" for text in self.unknown)
        return f"<h4>{html.escape(self.title)}: {self.summary()}</h4><ul>{found}</ul>{unknown}" + _html.table(header, body)

    def _cells(self, rows: Sequence[Layer]) -> list[list[str]]:
        """Columns that say something, the header first."""
        always = ("name", "shape", "dtype", "group")
        used = [c for c in _COLUMNS if c in always or any(getattr(row, c) is not None for row in rows)]
        return [[_COLUMNS[c] for c in used], *([_cell(c, getattr(row, c)) for c in used] for row in rows)]


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column in ("arrives", "arrived"):
        return f"{100 * value:.0f} %"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
