"""``make gpu-report`` without a GPU: that no section is lost, whatever fails, and that it stands on what it says."""

from __future__ import annotations

import gc
import importlib
import json
import queue
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from conftest import ROOT, needs_library

import fused_l2
from fused_l2.engines import cpu


@pytest.fixture
def report(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("bench.gpu_report")


@needs_library
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of kernels of the stub, see below
def test_a_dry_run_has_every_section(report, tmp_path, capsys):
    """Every case, every provider, tests collected, launches over a stub of a GPU; into a folder that does not exist yet."""
    pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")
    out = tmp_path / "new" / "report.json"
    assert report.main(["--dry-run", "--json", str(out)]) == 0
    gc.collect()  # Kernels ask the driver when they go. That of the stub is gone by then, and this machine may have none.
    written = json.loads(out.read_text())
    assert list(written) == list(report.SECTIONS)
    of_adamw = [r["case"] for r in written["results"] if r["optimizer"] == "AdamW"]
    measure = report.gpu_measure
    assert [case for case in of_adamw if "around" not in case and case.split(",")[0] not in ("modes", "few-bytes")] == [
        c.name for c in measure.GPU_CASES
    ]
    assert {f"{case}, around" for case in measure.AROUND} | {"modes"} <= set(of_adamw)
    assert written["not measured"] == []
    assert written["machine"]["gpu"].startswith("none")
    assert all(v == "ok" for r in written["results"] for v in r.get("correct", {}).values())
    assert written["assumptions"].keys() >= {"AdamW registers, spills", "host microseconds per launch"} or written[
        "assumptions"
    ].keys() >= {"launches"}
    told = out.with_suffix(".tests.txt").read_text()
    assert "test_gpu.py" in told
    assert "test_gpu_graphs.py" in told
    assert "sanitizer[" not in told  # run by hand: minutes
    predicted = [line for r in written["results"] for line in r["predicted"]]
    assert len(predicted) == len(report.predictions.STEPS)  # each is of a case and a row that exist
    printed = capsys.readouterr().out
    assert "AdamW, one tensor of 1e9" in printed
    assert "H100 predicted 9.6 to 10.1 ms, measured" in printed


def test_a_section_that_is_lost_is_told(report):
    whole = {name: [] for name in report.SECTIONS} | {"results": [{"label": "a"}], "not measured": ["b: out of time"]}
    assert report.lost(whole, ["a", "b"], True) == []
    assert report.lost(whole, ["a", "b", "c"], True) == ["c"]
    for name in ("machine", "stands on", "tests", "assumptions"):
        without = {key: value for key, value in whole.items() if key != name}
        assert report.lost(without, ["a", "b"], True) == [name]
    assert report.lost({k: v for k, v in whole.items() if k != "tests"}, ["a", "b"], False) == []


class Worker:
    """Says what a list tells it to, for each case from the first on: a result, "poison", "death" or "hang"."""

    def __init__(self, script: list[str], first: int, started: list[int]) -> None:
        started.append(first)
        self._said: list[Any] = []
        for i, what in enumerate(script[first:], first):
            self._said.append({"begins": f"case {i}"})
            if what == "death":
                self._said.append(None)
            elif what == "hang":
                self._said.append(queue.Empty)
            elif what == "result":
                self._said.append({"label": f"case {i}", "result": {}})
            else:
                self._said.append({"label": f"case {i}", "error": what, "poisoned": what == "poison"})

    def hear(self, seconds: float) -> Any:
        said = self._said.pop(0)
        if said is queue.Empty:
            raise queue.Empty
        return said

    def stop(self) -> None:
        self._said.clear()


def test_one_bad_case_does_not_lose_the_rest(report):
    script = ["result", "poison", "result", "death", "out of memory", "hang", "result"]
    started: list[int] = []
    labels = [f"case {i}" for i in range(len(script))]
    told = dict(report.measured(labels, lambda first: Worker(script, first, started), lambda: 100.0))
    assert list(told) == labels
    assert [told[label] == {} for label in labels] == [what == "result" for what in script]
    assert started == [0, 2, 4, 6]  # a new process after what leaves none; being out of memory leaves one
    assert "ended" in told["case 3"]
    assert "no result after 60 s" in told["case 5"]
    left = iter([100.0] * 4)  # asked twice for each thing that is said
    told = dict(report.measured(labels[:3], lambda first: Worker(["result"] * 3, first, []), lambda: next(left, 20.0)))
    assert list(told.values()) == [{}, "out of time", "out of time"]


def test_what_is_poisoned(report):
    measure = report.gpu_measure
    assert measure.is_poisoned(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not measure.is_poisoned(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    assert not measure.is_poisoned(RuntimeError("fused_l2 stepped with plain PyTorch"))


def test_tests_that_are_cut_off_tell_what_failed(report, tmp_path, monkeypatch):
    """pytest prints tracebacks at its end; a process that is killed has none."""
    test, begun = tmp_path / "test_slow.py", tmp_path / "begun"
    body = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(600)"
    test.write_text(f"def test_a(): assert 1 == 2, 'the reason'\ndef test_b(): {body}\n")

    class Process(subprocess.Popen):
        """For which the time is over when the second test has begun."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout != 8:
                return super().wait(timeout)
            while not begun.exists():
                time.sleep(0.02)
            raise subprocess.TimeoutExpired("pytest", timeout)

    monkeypatch.setattr(report.subprocess, "Popen", Process)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    log = tmp_path / "log.txt"
    done = report.run_until(command, 8, log)
    assert done["exit"] is None
    assert "stopped after 8 s" in done["output"]
    assert "the reason" in done["output"]
    assert "the reason" in log.read_text()


def test_what_it_stands_on_is_asserted_first(report, monkeypatch, capsys):
    """A checkout on the path without kernels/ inside would step with plain PyTorch."""
    monkeypatch.setitem(sys.modules, "fused_l2.kernels", None)
    monkeypatch.delattr(fused_l2, "kernels", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "library", lambda: None)
        assert report.main(["--dry-run", "--no-tests"]) == 1
        assert "nothing was measured: The GPU's bits are compared with those of the C++ library" in capsys.readouterr().err
    if cpu.library() is not None:
        assert report.main(["--dry-run", "--no-tests"]) == 1
        assert "fused_l2.kernels cannot be imported" in capsys.readouterr().err


def test_the_largest_case_fits_80_gb(report):
    """Parameters, gradients and two states, a temporary of torch foreach's, and the two buffers of the copy."""
    measure = report.gpu_measure
    for case in measure.GPU_CASES:
        numel = sum(torch.Size(shape).numel() for shape in case.shapes)
        total = 5 * numel * case.dtype.itemsize + 2 * 8 * measure.copied_words(28.0 * numel)
        assert total < 0.9 * 79e9, case.name


def test_gates_are_what_memory_allows(report):
    """At most what torch's step, which reads and writes as many bytes, was predicted to lose."""
    assert report.GATES.keys() <= {c.name for c in report.gpu_measure.GPU_CASES}
    for name, gate in report.GATES.items():
        low, _ = report.predictions.STEPS["AdamW", name, "fused_l2"].ratio
        assert gate <= low


def test_predictions_are_of_the_gpu_that_is_measured(report):
    beside = report.predictions.beside
    assert "H200 predicted 6.7 to 7.1 ms, measured 6.9 (as predicted)" in beside(
        "AdamW", "one-1b", "fused_l2", "NVIDIA H200", 6.9, 1.0
    )
    assert "measured 12 (above)" in beside("AdamW", "one-1b", "fused_l2", "NVIDIA H100 80GB HBM3", 12.0, 1.2)
    assert "measured on another device (NVIDIA A100)" in beside("AdamW", "one-1b", "fused_l2", "NVIDIA A100", 6.9, 1.0)
    assert beside("AdamW", "one-1b", "torch foreach", "NVIDIA H100", 6.9, 1.0) == ""


def test_what_runs_under_compute_sanitizer_runs(monkeypatch):
    """On the CPU: an error of the script would only be seen on a GPU."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    importlib.import_module("sanitized").main("cpu")
