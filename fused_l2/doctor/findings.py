"""What an examination finds: one fact about some parameters, why it matters, and one line of code that mends it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

WRONG, DOUBTFUL, NOTE = "wrong", "doubtful", "note"
SEVERITIES = (WRONG, DOUBTFUL, NOTE)


@dataclass(frozen=True)
class Finding:
    """One finding of :func:`fused_l2.doctor.examine`.

    ``severity`` is ``"wrong"`` (no intention makes this right), ``"doubtful"`` (right only if it is meant; ``why`` says what
    would make it so) or ``"note"`` (worth knowing). ``fix`` is Python for a script in which ``model`` and ``optimizer`` are
    what was examined. ``source`` says where the rule comes from.
    """

    code: str
    severity: str
    parameters: tuple[str, ...]
    what: str
    why: str
    fix: str
    source: str

    def __str__(self) -> str:
        lines = [*wrapped("", f"{self.severity}: {self.code}: {self.what}")]
        if self.parameters:
            lines += wrapped("    of:  ", shortened(self.parameters))
        # The fix stays in one line: it is Python to be copied.
        lines += [*wrapped("    why: ", self.why), f"    fix: {self.fix}", *wrapped("    see: ", self.source)]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """The fields, parameters as a list: for JSON."""
        return {**vars(self), "parameters": list(self.parameters)}


def wrapped(label: str, text: str, width: int = 85) -> list[str]:
    """Lines of at most so many columns, the later ones indented."""
    further = " " * (len(label) or 4)
    return textwrap.wrap(
        text, width, initial_indent=label, subsequent_indent=further, break_long_words=False, break_on_hyphens=False
    )


def shortened(names: Sequence[str], shown: int = 6) -> str:
    """The first names, and how many there are."""
    if len(names) <= shown:
        return ", ".join(names)
    return f"{', '.join(names[:shown])}, ... ({len(names)} in all)"
