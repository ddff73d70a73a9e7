"""``python -m fused_l2 doctor train.py``: runs a script as it is, and examines every optimizer at its first step."""

from __future__ import annotations

import os
import runpy
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from . import examine
from .report import Report


class Watch:
    """Examines each optimizer before its first step, and again before its step number ``again``."""

    def __init__(self, again: int | None = None, done: Callable[[], None] | None = None, **told: Any) -> None:
        self.reports: list[Report] = []
        self._again, self._done, self._told = again, done, told
        self._steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        step = self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        if step == 1 or step == self._again:
            report = examine(optimizer, **self._told)
            report.title = f"{report.title} #{len(self._steps)}, before step {step}"
            self.reports.append(report)
        # Reached: every optimizer that has stepped was seen as often as it is to be.
        if self._done is not None and step >= (self._again or 1):
            self._done()


class _Seen(SystemExit):
    """Ends the script once its optimizer was seen."""


def run(target: str, arguments: list[str], *, module: bool, again: int | None, leave: bool, **told: Any) -> list[Report]:
    """Run a script, or a module as ``python -m`` does, and say what its optimizers do.

    What the script raises is raised here, after the reports were printed. With ``leave`` it ends at the first examination.
    """
    if not module and not Path(target).is_file():
        raise FileNotFoundError(f"no such script: {target}")

    def end() -> None:
        raise _Seen(0)

    watch = Watch(again, end if leave else None, **told)
    handle = register_optimizer_step_pre_hook(watch)
    argv, path = sys.argv, list(sys.path)
    sys.argv = [target, *arguments]
    try:
        if module:
            sys.path.insert(0, os.getcwd())
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(target).resolve().parent))
            runpy.run_path(target, run_name="__main__")
    except _Seen:
        pass
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            raise
    finally:
        handle.remove()
        sys.argv, sys.path[:] = argv, path
        if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun one speaks
            for report in watch.reports:
                sys.stdout.write(f"\n{report}\n")
            if not watch.reports:
                sys.stdout.write(f"\n{target}: no optimizer made a step\n")
            sys.stdout.flush()
    return watch.reports
