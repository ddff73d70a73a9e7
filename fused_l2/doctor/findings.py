"""What an examination finds: one fact about some parameters, why it matters, and one line of code that mends it."""

from __future__ import annotations

import io
import itertools
import textwrap
import tokenize
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
        lines += [*wrapped("    why: ", self.why), *wrapped_code("    fix: ", self.fix), *wrapped("    see: ", self.source)]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """The fields, parameters as a list: for JSON."""
        return {**vars(self), "parameters": list(self.parameters)}


WIDTH = 85


def wrapped(label: str, text: str, width: int = WIDTH) -> list[str]:
    """Lines of at most so many columns, the later ones indented."""
    further = " " * (len(label) or 4)
    return textwrap.wrap(
        text, width, initial_indent=label, subsequent_indent=further, break_long_words=False, break_on_hyphens=False
    )


def wrapped_code(label: str, code: str) -> list[str]:
    """Lines of Python that still run where they are copied, however they are indented: it breaks within brackets, the
    outermost first, and elsewhere with a backslash."""
    lines, begin, breaks = [], 0, _breaks(code)
    room = WIDTH - len(label)
    while len(code) - begin > room:
        fitting = [(depth, -end, mark) for end, (depth, mark) in breaks.items() if end + len(mark) <= begin + room]
        fitting = [(depth, end, mark) for depth, end, mark in fitting if -end > begin + room / 3]  # no line of a word
        if not fitting:
            break
        _, end, mark = min(fitting)
        lines.append(code[begin:-end].strip() + mark)
        begin = -end
    return [(" " * len(label) if i else label) + line for i, line in enumerate([*lines, code[begin:].strip()])]


def _breaks(code: str) -> dict[int, tuple[int, str]]:
    """Where a line of it may end, by column: how many brackets are open there, and what has to follow."""
    found, depth, before = {}, 0, ""
    tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    for token, following in itertools.pairwise(tokens):
        depth += (token.string in "([{") - (token.string in ")]}") if token.type == tokenize.OP else 0
        opens = token.string in ("(", "{") or (token.string == "[" and before in ("(", "=", ":", ","))  # no index
        if depth and ((opens and following.string not in ")]}") or token.string == "," or following.string in ("for", "if")):
            found[token.end[1]] = (depth, "")
        elif not depth and token.string in ("=", ";"):
            found[token.end[1]] = (-(token.string == ";"), " \\")
        before = token.string
    return found


def shortened(names: Sequence[str], shown: int = 6) -> str:
    """The first names, and how many there are."""
    if len(names) <= shown:
        return ", ".join(names)
    return f"{', '.join(names[:shown])}, ... ({len(names)} in all)"
