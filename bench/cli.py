"""``python -m bench``: how fast fused_l2 is on this machine, against what, against which limit, and where it loses.

Without a topic, all of them are measured, in less than ten minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fused_l2.engines import cpu

from . import churn, clip, compare, limit, machine, memory, precision, providers, statistics, step, timing, train
from .cases import CASES, COLD, OPTIMIZERS
from .topic import Job, Options

TOPICS: dict[str, Any] = {
    "limit": limit, "step": step, "clip": clip, "statistics": statistics, "churn": churn, "train": train,
    "memory": memory,
}  # fmt: skip
APART = {"precision": precision}  # not measured unless asked for
HELP = {
    "all": "every topic", "limit": "copy, triad and steps, from the caches to memory", "step": "one optimizer step",
    "clip": "clipping and a step", "statistics": "what statistics cost",
    "churn": "one step where parameters, gradients or states changed before it", "train": "whole training steps",
    "memory": "bytes per parameter, resident and moved", "host": "the host's time against tensors and groups",
    "dtensor": "the host's time for DTensors",
    "precision": "bfloat16: decay that arrives, training, speed, 8-bit states of others; ten minutes, not part of all",
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SECONDS = {  # of a visit
    "limit": 2.5,
    "step": 1.5,
    "clip": 1.1,
    "statistics": 1.1,
    "churn": 1.0,  # of steps; what happens between them comes on top
    "train": 1.3,
    "memory": 0.0,
    "host": 0.0,
    "dtensor": 0.0,
    "precision": 2.0,
}


def topics(chosen: str) -> dict[str, Any]:
    found = dict(TOPICS)
    if importlib.util.find_spec("pytest") and importlib.util.find_spec("triton"):
        from . import host  # it goes through the tests' stub of a GPU

        found["host"] = host
        if torch.distributed.is_available():
            from . import dtensor

            found["dtensor"] = dtensor
    if chosen == "all":
        return found
    found |= APART
    if chosen not in found:
        raise SystemExit(f"python -m bench: {chosen} needs pytest and triton: pip install -e '.[test]' triton")
    return {chosen: found[chosen]}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    lines = "\n".join(f"{name:12}{text}" for name, text in HELP.items())
    made.add_argument("topic", nargs="?", default="all", choices=HELP, metavar="topic", help=lines)
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the report of bench.gpu_report")
    made.add_argument("--dtype", choices=list(DTYPES), help="instead of the cases' own dtypes")
    names = [c.name for c in CASES + COLD + churn.SITUATIONS] + list(train.MODELS)
    made.add_argument(
        "--case", action="append", metavar="CASE", choices=names, help="only this one (repeatable): " + " ".join(names)
    )
    made.add_argument("--optimizer", action="append", choices=list(OPTIMIZERS), help="only this one (repeatable)")
    made.add_argument(
        "--provider", action="append", metavar="PROVIDER", choices=list(providers.PROVIDERS),
        help="only this one besides ours (repeatable): " + ", ".join(providers.PROVIDERS),
    )  # fmt: skip
    made.add_argument("--seconds", type=float, help="time for each case and optimizer (default: each topic's own)")
    made.add_argument(
        "--even-if-busy", action="store_true", help="count samples that waited for a core, too; the report says that they do"
    )
    made.add_argument("--json", type=Path, help="write the results to this file, too")
    made.add_argument(
        "--plot", type=Path, metavar="FOLDER", help="write a report with pictures: FOLDER/report.html, FOLDER/*.svg"
    )
    made.add_argument("--compare", type=Path, metavar="OLD.json", help="show each ratio beside that of an earlier run")
    return made


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if given.device == "cuda":
        from . import gpu_report

        return gpu_report.main(["--json", str(given.json)] if given.json else [])
    if cpu.library() is None:
        raise SystemExit(f"python -m bench: there is nothing to measure, our steps are plain PyTorch. {cpu.why_unavailable()}")
    warnings.filterwarnings("ignore", "fused_l2: weight decay takes")  # nobody trains here; the topic precision is about it
    old = json.loads(given.compare.read_text()) if given.compare else None
    if given.plot and not importlib.util.find_spec("matplotlib"):
        raise SystemExit("python -m bench: --plot needs matplotlib: pip install -e '.[bench]'")
    found = {"machine": machine.facts(), "providers": providers.versions(given.provider), "results": {}}
    print(machine.headline(found["machine"]))
    print("providers: " + ", ".join(f"{name} {version}" for name, version in found["providers"].items()))
    print("x, ratio: seconds of the other / seconds of the row, median over rounds; above 1 the row is faster")
    chosen = topics(given.topic)
    timing.disturbance = timing.Disturbance(counts=given.even_if_busy)
    stopped = measure(given, chosen, found)
    for name, results in found["results"].items():
        lines = chosen[name].summary(results) if hasattr(chosen[name], "summary") else []
        print("\n".join([f"\n{name}", *lines]) if lines else "", end="\n" if lines else "")
    if timing.disturbance.samples:
        found["disturbed samples"] = {"share": timing.disturbance.share, "count": timing.disturbance.counts}
        print(f"\n{timing.disturbance}")
    if old is not None:
        print("\n" + compare.table(old, found))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\nwritten to {given.json}")
    if given.plot:
        from . import report

        print(f"report: {report.write(found, given.plot)}")
    failed = [r for results in found["results"].values() for r in results if "failed" in r]
    for result in failed:
        print(f"FAILED: {result['case']}: {result['failed']}", file=sys.stderr)
    return stopped or bool(failed)


def measure(given: argparse.Namespace, chosen: dict[str, Any], found: dict[str, Any]) -> int:
    """Every job of the topics, its table printed when it is done. The exit code, not 0 if Ctrl-C or a busy machine ended
    it; what was measured is kept."""
    jobs: list[tuple[str, Any, Job, dict[str, Any]]] = [
        (name, topic, job, {}) for name, topic in chosen.items() for job in _jobs(given, name, topic)
    ]
    if not jobs:
        raise SystemExit("python -m bench: no case of this topic was chosen")
    # All of them once, then again those that are visited again: apart in time, as another run would be.
    visits = [getattr(topic, "VISITS", 1) for _, topic, _, _ in jobs]
    planned = [(visit, i) for visit in range(max(visits)) for i in range(len(jobs)) if visit < visits[i]]
    results: dict[int, dict[str, Any]] = {}
    with tqdm(planned, unit="visit", leave=False, disable=None) as bar:
        try:
            for visit, i in bar:
                name, topic, job, so_far = jobs[i]
                bar.set_description(f"{name}: {job.label}")
                try:
                    results[i] = job.run(so_far)
                except timing.BusyMachine as error:
                    bar.write(f"python -m bench: {error}", file=sys.stderr)
                    return 3
                except Exception as error:  # one case that fails does not take the others with it
                    bar.write(traceback.format_exc(), file=sys.stderr)
                    results[i] = {"case": job.label, "failed": f"{type(error).__name__}: {error}"}
                    continue
                finally:
                    found["results"][name] = [results[k] for k in sorted(results) if jobs[k][0] == name]
                if visit == visits[i] - 1:
                    bar.write(("\n" if len(topic.show(results[i]).splitlines()) > 1 else "") + topic.show(results[i]))
        except KeyboardInterrupt:
            print("\nstopped; what was measured is kept", file=sys.stderr)
            return 130
    return 0


def _jobs(given: argparse.Namespace, name: str, topic: Any) -> Iterator[Job]:
    return topic.jobs(
        Options(
            optimizers=given.optimizer or list(OPTIMIZERS),
            providers=given.provider or list(providers.PROVIDERS),
            cases=given.case or [],
            dtype=DTYPES[given.dtype] if given.dtype else None,
            seconds=SECONDS[name] if given.seconds is None else given.seconds,
        )
    )
