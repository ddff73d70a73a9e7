"""``python -m fused_l2 doctor``: examines the optimizers of a script, or the state dict in a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

DESCRIPTION = """Says what the optimizers of a training script really do to the weights: runs the script unchanged and examines
every optimizer before its first step. Of a checkpoint (.pt, .pth, .ckpt, .bin) it says what groups and states show, without
executing anything in it."""
_CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".tar")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand."""
    parser.description = DESCRIPTION
    parser.add_argument("-m", dest="module", action="store_true", help="the target is a module, as for python -m")
    parser.add_argument("--steps", type=int, metavar="N", help="examine again before step N")
    parser.add_argument("--exit", action="store_true", dest="leave", help="end the script at the (last) examination")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if something is wrong")
    parser.add_argument("--json", metavar="FILE", help="write the reports to a file as well")
    parser.add_argument("--n", type=int, help="number of training examples")
    parser.add_argument("--lam", type=float, help="the lambda of the loss that is meant")
    parser.add_argument("--total-steps", type=int, help="steps of the whole training")
    parser.add_argument("--batch-size", type=int, help="examples in a step")
    parser.add_argument("target", help="train.py or checkpoint.pt")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")


def run(given: argparse.Namespace) -> int:
    """The exit status."""
    told: dict[str, Any] = {"n": given.n, "lam": given.lam, "steps": given.total_steps, "batch_size": given.batch_size}
    if not given.module and Path(given.target).suffix in _CHECKPOINTS:
        from .checkpoint import examine_checkpoint

        try:
            reports = examine_checkpoint(given.target, **told)
        except (ValueError, OSError) as error:
            sys.stderr.write(f"fused_l2 doctor: {error}\n")
            return 2
        sys.stdout.write("\n".join(map(str, reports)) + "\n")
    else:
        from . import script

        try:
            reports = script.run(
                given.target, given.arguments, module=given.module, again=given.steps, leave=given.leave, **told
            )
        except FileNotFoundError as error:
            if not Path(given.target).is_file() and not given.module:
                sys.stderr.write(f"fused_l2 doctor: {error}\n")
                return 2
            raise
    if given.json:
        Path(given.json).write_text(json.dumps([report.as_dict() for report in reports], indent=1) + "\n")
    return int(given.strict and any(report.is_wrong for report in reports))
