"""What the assembler makes of the kernels, as docs/performance.md tells it. To write the tables of the page anew, with each
triton that it names:

    PYTHONPATH=tests python -m gpu_free.counts
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from fused_l2.tables.tensor_table import Flag, Rule

from . import aot

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
ARCHITECTURES = (80, 90, 100, 120)
# How many warps a multiprocessor holds at most.
WARPS = {80: 64, 90: 64, 100: 64, 120: 48}
F32, BF16 = torch.float32, torch.bfloat16
ADAMW, SGD = Flag.DECOUPLED, Flag.MOMENTUM


class Counted(NamedTuple):
    """A kernel of the tables: its name there, what it is compiled from, how many elements its vector loop has for a thread."""

    name: str
    source: tuple[object, ...]
    elements: int


def _step(name: str, rule: Rule, flags: int, *dtypes: torch.dtype) -> Counted:
    return Counted(name, ("step", rule, int(flags), *dtypes), 16 // max(d.itemsize for d in dtypes))


COUNTED = (
    _step("AdamW", Rule.ADAM, ADAMW, F32, F32, F32),
    _step("AdamW, clipped or scaled", Rule.ADAM, ADAMW | Flag.SCALED, F32, F32, F32),
    _step("AdamW, statistics", Rule.ADAM, ADAMW | Flag.STATISTICS, F32, F32, F32),
    _step("SGD, nesterov", Rule.SGD, SGD | Flag.NESTEROV, F32, F32, F32),
    _step("SGD, momentum, statistics", Rule.SGD, SGD | Flag.STATISTICS, F32, F32, F32),
    _step("AdamW, bfloat16 throughout", Rule.ADAM, ADAMW, BF16, BF16, BF16),
    _step("AdamW, bfloat16, kahan", Rule.ADAM, ADAMW | Flag.KAHAN, BF16, BF16, F32),
    _step("AdamW, bfloat16, remainder", Rule.ADAM, ADAMW | Flag.REMAINDER, BF16, BF16, F32),
    Counted("norm of float32", ("measure", F32, False), 16),
    Counted("norm of bfloat16", ("measure", BF16, False), 16),
)


def count(kernel: Counted, arch: int) -> tuple[int, float, int]:
    """Registers, instructions an element, and kilobytes under way in a full multiprocessor."""
    code = aot.count_of(arch, *kernel.source)
    _, _, size = code.in_flight()
    return code.registers, len(code.vector_loop()) / kernel.elements, code.warps(WARPS[arch]) * 32 * size // 1024


def table() -> str:
    """The counts of the triton that is installed, as the page has them."""
    head = [f"sm_{arch}" for arch in ARCHITECTURES]
    lines = [f"| triton {triton.__version__} | {' | '.join(head)} |", "| --- |" + " --- |" * len(head)]
    for kernel in COUNTED:
        cells = ["{} / {:.1f} / {}".format(*count(kernel, arch)) for arch in ARCHITECTURES]
        lines.append(f"| {kernel.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _section() -> re.Pattern[str]:
    return re.compile(rf"(<!-- counted {re.escape(triton.__version__)} -->\n).*?(<!-- end -->)", re.DOTALL)


def of_the_page() -> str | None:
    """The page's table for the triton that is installed, or None where it has none."""
    found = _section().search(PAGE.read_text())
    return None if found is None else found.group(0).split("\n", 1)[1].removesuffix("\n<!-- end -->")


if __name__ == "__main__":
    counted = table()  # takes minutes, in which the page may change
    PAGE.write_text(_section().sub(lambda found: found[1] + counted + "\n" + found[2], PAGE.read_text()))
    print(counted)
