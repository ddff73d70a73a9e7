"""``make gpu-report``: everything this project wants to know of a GPU that is at hand for ten minutes.

Runs the tests marked ``gpu``, checks what docs/design.md assumes, and measures steps against torch.optim and a device copy.
Ends within eight minutes: what there was no time for is listed as not measured. ``--dry-run`` goes the same way on the CPU,
with tiny tensors, and keeps no figure.

"device" is the time between two events on the stream, with the gaps in which it waits for the host: where the host is the
limit, GB/s and the share of the copy say nothing. Gradients keep their addresses, as they mostly do in training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fused_l2
from fused_l2.engines.torch_ops import TorchPart
from fused_l2.tables.tensor_table import Flag, Rule

from . import machine, providers, timing
from .cases import GPU_CASES, OPTIMIZERS, STREAMS, Case

ROOT = Path(__file__).parent.parent
SECONDS = 8 * 60
# Ratios to torch fused, wall clock; the share of the copy's bandwidth for the first. None where only the figure is asked for.
GATES = {"one-1b": 1.0, "vit-28-groups": 3.0, "465-groups": 3.0, "resnet50": 2.0, "tiny-1000": 2.0}
SHARE_OF_COPY = 0.92
AROUND = ("gpt2-small", "tiny-1000")  # cases of clipping and statistics


class Clock:
    """Wall, host and device seconds of a number of steps."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def measure(self, call: Callable[[], Any], count: int) -> dict[str, float]:
        self.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._cuda else []
        start = time.perf_counter()
        if events:
            events[0].record()
        for _ in range(count):
            call()
        if events:
            events[1].record()
        host = time.perf_counter() - start
        self.synchronize()
        wall = time.perf_counter() - start
        device = events[0].elapsed_time(events[1]) * 1e-3 if events else wall
        return {"wall": wall / count, "host": host / count, "device": device / count}


def facts(device: str) -> dict[str, Any]:
    found = {"gpu": "none: a dry run, no figure in it means anything", **machine.facts()}
    return {**found, "engine": fused_l2.capabilities()["cuda"].engine, "providers": providers.versions()}


def run_tests(device: str, seconds: float) -> dict[str, Any]:
    """`pytest -m gpu`, and whatever it starts stopped when the time is over."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "gpu", "tests/test_gpu.py"]
    if device == "cpu":
        command.append("--collect-only")
    with tempfile.TemporaryFile("w+") as output:
        running = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = running.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            code = None
        output.seek(0)
        text = output.read()
    return {"exit": code, "output": text[-6000:] + (f"\nstopped after {seconds:.0f} s" if code is None else "")}


def assumptions(device: str) -> dict[str, Any]:
    """What docs/design.md takes for granted: how torch's fused kernels round, registers of ours, host time of a launch."""
    header = Path(torch.__file__).parent / "include/ATen/native/cuda/fused_adam_utils.cuh"
    found: dict[str, Any] = {
        "torch fused Adam computes in float32 with std::fma": "std::fma(-beta1" in header.read_text()
        if header.exists()
        else "?",
    }
    if device == "cuda":
        from fused_l2.kernels.launch import Kernel, current_stream, step

        for name, rule, flags in (("AdamW", Rule.ADAM, Flag.DECOUPLED), ("SGD", Rule.SGD, Flag.MOMENTUM)):
            kernel = Kernel(step(rule, int(flags), *[torch.float32] * 3))
            found[f"{name} registers, spills"] = [kernel.compiled.n_regs, kernel.compiled.n_spills]
        empty = torch.zeros(64, dtype=torch.int64, device="cuda").data_ptr()  # row 0: numel 0
        launch = kernel.launcher(1, empty, empty, 1024, empty)
        stream = current_stream(torch.cuda.current_device())
        launched = Clock("cuda").measure(lambda: launch(stream, empty, empty, empty), 500)
        found["host microseconds per launch"] = 1e6 * launched["host"]
    return found


def measure(case: Case, optimizer: str, device: str, rounds: int) -> dict[str, Any]:
    """Interleaved rounds of all providers and a device copy of the same bytes."""
    names = [name for name in providers.PROVIDERS if name not in ("torch for-loop", "torch.compile")]
    contest = providers.Contest(case, optimizer, OPTIMIZERS[optimizer], device, names)
    plan = contest.optimizers["fused_l2"]._stepper._plan
    if plan is None or not plan.parts or isinstance(plan.parts[-1], TorchPart):
        raise RuntimeError("fused_l2 stepped with plain PyTorch, so torch would be compared with itself; a warning said why")
    numel = sum(math.prod(shape) for shape in case.shapes)
    step_bytes = numel * case.dtype.itemsize * sum(STREAMS[optimizer])
    rows = timed(contest.steps(), dict.fromkeys(contest.optimizers, step_bytes), "torch fused", device, rounds)
    return {
        "case": case.name, "what": case.what, "optimizer": optimizer, "parameters": numel, "rows": rows,
        "correct": contest.verdicts, "not measured": contest.absent,
    }  # fmt: skip


def timed(
    contestants: dict[str, Callable[[], Any]], moved: dict[str, float], base: str, device: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """One row per contestant and one for a copy: times, ratios to ``base``, GB/s of the bytes that each has ``moved``."""
    # 256 MB at least: a smaller copy would stay in the cache and say nothing about memory.
    words = max(int(max(moved.values())) // 16, 2**25) if device == "cuda" else 64
    source, target = (torch.zeros(words, dtype=torch.int64, device=device) for _ in range(2))
    contestants = {**contestants, "copy": lambda: target.copy_(source)}
    moved = {**moved, "copy": 16 * words}
    clock = Clock(device)
    counts = {}
    for name, call in contestants.items():
        call()
        counts[name] = max(2, min(200, round(20e-3 / max(clock.measure(call, 3)["wall"], 1e-7))))
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            contestants[name]()
            samples[name].append(clock.measure(contestants[name], counts[name]))
    copy_bandwidth = 16 * words / timing.quartiles([s["device"] for s in samples["copy"]])[1]
    rows = {}
    for name, taken in samples.items():
        fused = samples[base]
        wall_ratios = [b["wall"] / a["wall"] for a, b in zip(taken, fused, strict=True)]
        device_ratios = [b["device"] / a["device"] for a, b in zip(taken, fused, strict=True)]
        seconds = {kind: timing.quartiles([s[kind] for s in taken]) for kind in ("wall", "host", "device")}
        rows[name] = {
            **seconds,
            "wall ratio to torch fused": timing.quartiles(wall_ratios),
            "device ratio to torch fused": timing.quartiles(device_ratios),
            "GB/s": moved[name] / seconds["device"][1] * 1e-9,
            "share of copy": moved[name] / seconds["device"][1] / copy_bandwidth,
        }
    return rows


def around(case: Case, optimizer: str, device: str, rounds: int) -> dict[str, Any]:
    """Clipping inside the step against clip_grad_norm_ before it, and what statistics cost."""
    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in case.shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    settings = OPTIMIZERS[optimizer]
    ours = {
        "fused_l2": {}, "fused_l2, clipped": {"max_grad_norm": 1.0}, "fused_l2, statistics": {"statistics": True},
    }  # fmt: skip
    contestants = {name: getattr(fused_l2, optimizer)(params, **settings, **options).step for name, options in ours.items()}
    theirs = getattr(torch.optim, optimizer)(params, **settings, fused=True)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        theirs.step()

    contestants["torch, clipped"] = clip_and_step
    numel = sum(p.numel() for p in params)
    moved = numel * 4 * sum(STREAMS[optimizer])
    bytes_of = {name: moved + 4 * numel * ("clipped" in name) for name in contestants}
    rows = timed(contestants, bytes_of, "torch, clipped", device, rounds)
    return {"case": f"{case.name}, around", "what": case.what, "optimizer": optimizer, "parameters": numel, "rows": rows}


def modes(device: str, rounds: int) -> dict[str, Any]:
    """Low-precision modes of AdamW on one tensor, with float32 moments."""
    p = torch.nn.Parameter(torch.randn(2**28 if device == "cuda" else 7, device=device).bfloat16())
    p.grad = torch.randn_like(p)
    contestants, moved = {}, {}
    for mode in ("round", "remainder", "master", "kahan", "stochastic"):
        made = fused_l2.AdamW([p], lr=1e-6, low_precision=mode, state_dtype=torch.float32)
        made.step()
        states = sum(v.nbytes for key, v in made.state[p].items() if key != "step")
        contestants[mode], moved[mode] = made.step, 6 * p.numel() + 2 * states
    rows = timed(contestants, moved, "round", device, rounds)
    what = "low-precision modes, bfloat16, float32 moments"
    return {"case": "modes", "what": what, "optimizer": "AdamW", "parameters": p.numel(), "rows": rows}


def jobs(device: str, rounds: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is measured, and how it is called."""
    for case in GPU_CASES:
        if device == "cpu":
            case = dataclasses.replace(case, make_shapes=lambda c=case: [(7,) for _ in c.shapes])
        for optimizer in OPTIMIZERS:
            if case.dtype is torch.bfloat16 and optimizer == "SGD":
                continue  # torch fused SGD leaves most bfloat16 parameters as they were (pytorch issue 191763)
            yield f"{optimizer} {case.name}", lambda c=case, o=optimizer: measure(c, o, device, rounds)
            if case.name in AROUND:
                yield f"{optimizer} {case.name}, around", lambda c=case, o=optimizer: around(c, o, device, rounds)
    yield "AdamW modes", lambda: modes(device, rounds)


def gate_of(result: dict[str, Any]) -> str:
    """Whether the figure that was promised was met; empty where none was."""
    gate = GATES.get(result["case"])
    if gate is None or result["optimizer"] != "AdamW":
        return ""
    row = result["rows"]["fused_l2"]
    met = row["wall ratio to torch fused"][1] >= gate
    if result["case"] == "one-1b":
        met = met and row["share of copy"] >= SHARE_OF_COPY
    return f"gate {gate}: {'met' if met else 'MISSED'}"


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['optimizer']}, {result['what']}: {result['parameters']:,} parameters  {gate_of(result)}")
    columns = ("wall us", 12), ("device us", 12), ("host us", 10), ("x torch fused", 15), ("quartiles", 17)
    columns += ("GB/s", 8), ("% copy", 8)
    print(f"  {'':16}" + "".join(f"{title:>{width}}" for title, width in columns))
    for name, row in result["rows"].items():
        q1, ratio, q3 = row["wall ratio to torch fused"]
        wall, device, host = (1e6 * row[kind][1] for kind in ("wall", "device", "host"))
        print(
            f"  {name:16}{wall:>12.1f}{device:>12.1f}{host:>10.1f}{ratio:>15.2f}{f'{q1:.2f} .. {q3:.2f}':>17}"
            f"{row['GB/s']:>8.0f}{100 * row['share of copy']:>8.0f}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--dry-run", action="store_true", help="go through everything on the CPU with tiny tensors")
    parser.add_argument("--no-tests", action="store_true", help="only measure")
    options = parser.parse_args(arguments)
    device = "cpu" if options.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --dry-run goes through the report without one", file=sys.stderr)
        return 1
    started = time.monotonic()

    def left() -> float:
        return SECONDS - (time.monotonic() - started)

    report: dict[str, Any] = {"machine": facts(device), "results": [], "not measured": []}
    print(machine.headline(report["machine"]))

    def write() -> None:
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")

    if not options.no_tests:
        report["tests"] = run_tests(device, seconds=left() / 2)
        print(report["tests"]["output"][-1500:])
    try:
        report["assumptions"] = assumptions(device)
    except Exception as error:  # the figures are worth having all the same
        report["assumptions"] = {"not checked": repr(error)}
    print("\n".join(f"{key}: {value}" for key, value in report["assumptions"].items()))
    write()
    for label, run in jobs(device, rounds=3 if device == "cpu" else 11):
        if left() < 30:
            report["not measured"].append(f"{label}: out of time")
            continue
        try:
            result = run()
        except Exception as error:  # out of memory, above all; the other cases are worth having
            report["not measured"].append(f"{label}: {error!r}")
            continue
        report["results"].append({**result, "gate": gate_of(result)})
        print(result.get("correct", ""))
        show(result)
        write()
    for line in report["not measured"]:
        print("not measured:", line)
    write()
    if options.json:
        print(f"written to {options.json}")
    return 0 if report.get("tests", {"exit": 0})["exit"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
