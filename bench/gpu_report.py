"""``make gpu-report``: everything this project wants to know of a GPU that is at hand for ten minutes.

Asserts what it stands on, runs the tests marked ``gpu``, checks what docs/design.md assumes, and measures steps against
torch.optim and a device copy, with what was predicted beside it. Ends within eight minutes: what there was no time for is
listed as not measured. ``--dry-run`` goes the same way without a GPU, over a stub of one and with tiny tensors on the CPU, and
keeps no figure; it fails if a section is lost.

"device" is the time between two events on the stream, with the gaps in which it waits for the host: where the host is the
limit, GB/s and the share of the copy say nothing. Gradients keep their addresses, as they mostly do in training.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import fused_l2
from fused_l2.tables.tensor_table import Flag, Rule

from . import gpu_measure, machine, predictions, providers

ROOT = Path(__file__).parent.parent
SECONDS = 8 * 60
SECONDS_OF_TESTS = 4 * 60  # at most
SECONDS_OF_A_CASE = 60
# How many times as long torch fused has to take, by the wall clock, as far as memory allows; the share of the copy's bandwidth
# for the first. None where only the figure is asked for.
GATES = {"one-1b": 1.0, "vit-28-groups": 1.1, "465-groups": 3.0, "resnet50": 1.2, "tiny-1000": 2.0}
SHARE_OF_COPY = 0.92
SECTIONS = ("machine", "stands on", "tests", "assumptions", "results", "not measured")


def facts(device: str) -> dict[str, Any]:
    found = {"gpu": "none: a dry run, no figure in it means anything", **machine.facts()}
    return {**found, "engine": fused_l2.capabilities()["cuda"].engine, "providers": providers.versions()}


def stands_on(device: str) -> dict[str, str]:
    """What every figure and every test below takes for granted. RuntimeError with the remedy if something is not so."""
    engine = fused_l2.capabilities()["cpu"]
    if not engine.engine.startswith("C++"):
        raise RuntimeError(f"The GPU's bits are compared with those of the C++ library, and there is none: {engine.reason}")
    try:
        from fused_l2.kernels import launch
    except ImportError as error:
        raise RuntimeError(
            f"fused_l2.kernels cannot be imported ({error}), so CUDA tensors would be stepped by plain PyTorch. What is "
            f"imported is {fused_l2.__file__}: install the checkout (pip install -e .), or take its folder off the path."
        ) from error
    found = {"C++ library": engine.engine, "triton": launch.version()}
    found |= {"torch": torch.__version__, "CUDA of torch": torch.version.cuda or "none"}
    if device == "cuda":
        if not (told := fused_l2.capabilities()["cuda"]).engine.startswith("Triton"):
            raise RuntimeError(f"CUDA tensors are stepped by {told.engine}: {told.reason}")
        found["free memory, GB"] = f"{torch.cuda.mem_get_info()[0] * 1e-9:.1f}"
    return found


def run_tests(device: str, seconds: float, log: Path | None) -> dict[str, Any]:
    """`pytest -m gpu`, interrupted when the time is over, so that it tells what failed until then. All it prints is in the file
    ``log``."""
    # pytest-benchmark warns where tests run in parallel, and warnings are failures.
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:benchmark", "-m", "gpu and not sanitizer"]
    command += map(str, sorted(ROOT.glob("tests/test_gpu*.py")))
    environment = dict(os.environ)
    if device == "cpu":
        command.append("--collect-only")
    elif importlib.util.find_spec("xdist"):
        # A process has one thread, or those of all the processes would wait for each other.
        command += ["-n", str(min(14, os.cpu_count() or 1))]
        environment["OMP_NUM_THREADS"] = "1"
    return run_until(command, seconds, log, environment)


def run_until(
    command: list[str], seconds: float, log: Path | None, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """A command, interrupted after so many seconds as by Ctrl-C, and killed 15 seconds later."""
    running = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A process that was started in the background may ignore interrupts, and what it starts inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    lines: list[str] = []

    def collect() -> None:
        assert running.stdout is not None
        with open(log or os.devnull, "w") as file:
            for line in running.stdout:
                lines.append(line)
                file.write(line)
                file.flush()

    reader = threading.Thread(target=collect, daemon=True)
    reader.start()
    was_stopped = False
    for how in (None, signal.SIGINT, signal.SIGKILL):
        if how is not None:
            was_stopped = True
            os.killpg(running.pid, how)
        try:
            running.wait(seconds if how is None else 15)
            break
        except subprocess.TimeoutExpired:
            continue
    reader.join(15)
    text = "".join(lines)
    # Failures come before the summary, which is long if there are many.
    kept = text if len(text) < 24_000 else f"{text[:12_000]}\n... {len(text) - 24_000} characters ...\n{text[-12_000:]}"
    return {"exit": None if was_stopped else running.returncode,
            "output": kept + (f"\nstopped after {seconds:.0f} s" if was_stopped else "")}  # fmt: skip


def assumptions(device: str) -> dict[str, Any]:
    """What docs/design.md takes for granted: how torch's fused kernels round, registers of ours, host time of a launch."""
    header = Path(torch.__file__).parent / "include/ATen/native/cuda/fused_adam_utils.cuh"
    found: dict[str, Any] = {
        "torch fused Adam computes in float32 with std::fma": "std::fma(-beta1" in header.read_text()
        if header.exists()
        else "?",
    }
    with _launches(device) as why_not:
        if why_not:
            return {**found, "launches": why_not}
        from fused_l2.kernels.launch import Kernel, current_stream, step

        for name, rule, flags in (("AdamW", Rule.ADAM, Flag.DECOUPLED), ("SGD", Rule.SGD, Flag.MOMENTUM)):
            kernel = Kernel(step(rule, int(flags), *[torch.float32] * 3))
            found[f"{name} registers, spills"] = [kernel.compiled.n_regs, kernel.compiled.n_spills]
        empty = torch.zeros(64, dtype=torch.int64, device=device).data_ptr()  # row 0: numel 0
        launch = kernel.launcher(1, empty, empty, 1024, empty)
        stream = current_stream(torch.cuda.current_device() if device == "cuda" else 0)
        launched = gpu_measure.Clock(device).measure(lambda: launch(stream, empty, empty, empty), 500)
        found["host microseconds per launch"] = 1e6 * launched["host"]
    return found


@contextmanager
def _launches(device: str) -> Iterator[str]:
    """On a GPU, or over the tests' stub of one; yields why there is neither."""
    if device == "cuda":
        yield ""
        return
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from gpu_free.stub_driver import stub_driver, why_unavailable
    finally:
        sys.path.pop(0)
    if reason := why_unavailable():
        yield reason
        return
    with stub_driver():
        yield ""


class Worker:
    """A process that measures cases from one on, and what it says."""

    def __init__(self, device: str, first: int) -> None:
        command = [sys.executable, "-m", "bench.gpu_measure", device, str(first)]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        environment = {**os.environ, "PYTHONPATH": path}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self._said.put(json.loads(line))
        self._said.put(None)

    def hear(self, seconds: float) -> dict[str, Any] | None:
        """What it says next, None when it has ended. queue.Empty after so many seconds."""
        return self._said.get(timeout=seconds)

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def measured(
    labels: list[str], start: Callable[[int], Any], left: Callable[[], float], each: float = SECONDS_OF_A_CASE
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Each label with its result, or with why there is none. A process that fails, hangs, or whose device is out of order costs
    the case it was at; the next one is measured by another process."""
    at, worker = 0, None
    try:
        while at < len(labels):
            if left() < 30:
                yield labels[at], "out of time"
                at += 1
                continue
            worker = worker or start(at)
            reason = ""
            try:
                said = worker.hear(min(each, left()))
                if said is not None and "begins" in said:
                    continue
                if said is None:
                    reason = "the process that measured it ended"
            except queue.Empty:
                said, reason = None, f"no result after {min(each, max(left(), 0)):.0f} s"
            if said is not None and "result" in said:
                yield said["label"], said["result"]
            else:
                yield labels[at], reason or str(said["error"] if said else "")
            at += 1
            if said is None or said.get("poisoned"):
                worker.stop()
                worker = None
    finally:
        if worker is not None:
            worker.stop()


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


def predicted_of(result: dict[str, Any], gpu: str) -> list[str]:
    """What was predicted of a case beside what was measured."""
    lines = []
    for name, row in result["rows"].items():
        took, ratio = 1e3 * row["device"][1], row["wall ratio to torch fused"][1]
        lines.append(predictions.beside(result["optimizer"], result["case"], name, gpu, took, ratio))
    return [line for line in lines if line]


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['optimizer']}, {result['what']}: {result['parameters']:,} parameters  {result['gate']}")
    columns = ("wall us", 12), ("device us", 12), ("host us", 10), ("x torch fused", 15), ("quartiles", 17)
    columns += ("GB/s", 8), ("% copy", 8)
    print(f"  {'':32}" + "".join(f"{title:>{width}}" for title, width in columns))
    for name, row in result["rows"].items():
        q1, ratio, q3 = row["wall ratio to torch fused"]
        wall, device, host = (1e6 * row[kind][1] for kind in ("wall", "device", "host"))
        print(
            f"  {name:32}{wall:>12.1f}{device:>12.1f}{host:>10.1f}{ratio:>15.2f}{f'{q1:.2f} .. {q3:.2f}':>17}"
            f"{row['GB/s']:>8.0f}{100 * row['share of copy']:>8.0f}"
            + (f"  {row['bytes a parameter']:.2f} bytes a parameter" if row.get("bytes a parameter") else "")
        )
    for line in result["predicted"]:
        print(f"  {line}")


def lost(report: dict[str, Any], labels: list[str], with_tests: bool) -> list[str]:
    """Sections and cases of which the report says nothing."""
    told = {r["label"] for r in report.get("results", [])} | {line.split(": ")[0] for line in report.get("not measured", [])}
    wanted = [s for s in SECTIONS if with_tests or s != "tests"]
    return [*(s for s in wanted if s not in report), *(label for label in labels if label not in told)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the results; what the tests print goes beside it")
    parser.add_argument("--dry-run", action="store_true", help="go through everything without a GPU, with tiny tensors")
    parser.add_argument("--no-tests", action="store_true", help="only measure")
    options = parser.parse_args(arguments)
    device = "cpu" if options.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --dry-run goes through the report without one", file=sys.stderr)
        return 1
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    started = time.monotonic()

    def left() -> float:
        return SECONDS - (time.monotonic() - started)

    report: dict[str, Any] = {}

    def write() -> None:
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")

    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    report["machine"] = facts(device)
    print(machine.headline(report["machine"]))
    try:
        report["stands on"] = stands_on(device)
    except RuntimeError as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        return 1
    print("\n".join(f"{key}: {value}" for key, value in report["stands on"].items()))
    write()
    if not options.no_tests:
        log = options.json.with_suffix(".tests.txt") if options.json else None
        report["tests"] = run_tests(device, min(left() / 2, SECONDS_OF_TESTS), log)
        print(report["tests"]["output"][-1500:])
    try:
        report["assumptions"] = assumptions(device)
    except Exception as error:  # the figures are worth having all the same
        report["assumptions"] = {"not checked": repr(error)}
    print("\n".join(f"{key}: {value}" for key, value in report["assumptions"].items()))
    report["results"], report["not measured"] = [], []
    write()
    labels = [label for label, _ in gpu_measure.jobs(device, 1)]
    for label, result in measured(labels, lambda first: Worker(device, first), left):
        if isinstance(result, str):
            report["not measured"].append(f"{label}: {result}")
        else:
            gpu = str(report["machine"]["gpu"]) if device == "cuda" else "no GPU"
            report["results"].append(
                {"label": label, **result, "gate": gate_of(result), "predicted": predicted_of(result, gpu)}
            )
            print(result.get("correct", ""))
            show(report["results"][-1])
        write()
    for line in report["not measured"]:
        print("not measured:", line)
    if options.json:
        print(f"written to {options.json}")
    missing = lost(report, labels, not options.no_tests)
    for name in missing:
        print("LOST:", name, file=sys.stderr)
    failed = report.get("tests", {"exit": 0})["exit"] != 0 or (options.dry_run and report["not measured"])
    return 1 if missing or failed else 0


if __name__ == "__main__":
    sys.exit(main())
