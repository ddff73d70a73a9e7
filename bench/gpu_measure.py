"""What ``make gpu-report`` measures, each in turn, in a process that the report watches.

    python -m bench.gpu_measure cuda 0

writes a line of JSON when a case begins and another one with its result. After an error that leaves the device unusable it
ends, and the report starts another process at the next case.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fused_l2
from fused_l2.engines.torch_ops import TorchPart

from . import providers, timing
from .cases import GPU_CASES, OPTIMIZERS, STREAMS, Case

ROUNDS = {"cuda": 11, "cpu": 3}
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


def copied_words(moved: float) -> int:
    """How large the two buffers of a copy are: 256 MB at least, or they would stay in the cache and say nothing about memory;
    4 GiB at most, which no cache holds either and which leaves room for the case itself on 80 GB."""
    return min(max(int(moved) // 16, 2**25), 2**29)


def timed(
    contestants: dict[str, Callable[[], Any]], moved: dict[str, float], base: str, device: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """One row per contestant and one for a copy: times, ratios to ``base``, GB/s of the bytes that each has ``moved``."""
    words = copied_words(max(moved.values())) if device == "cuda" else 64
    # Not zeros, which some memories move faster.
    source, target = (torch.randint(2**62, (words,), dtype=torch.int64, device=device) for _ in range(2))
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
    shape = (2**14, 2**14) if device == "cuda" else (128, 32)  # a matrix: 8-bit groups cross no row
    p = torch.nn.Parameter(torch.randn(shape, device=device).bfloat16())
    p.grad = torch.randn_like(p)
    contestants, moved = {}, {}
    for mode, states in MODES:
        made = fused_l2.AdamW([p], lr=1e-6, low_precision=mode, state_dtype=states)
        made.step()
        name = mode if states is torch.float32 else f"{mode}, 8-bit moments"
        held = sum(v.nbytes for key, v in made.state[p].items() if key != "step")
        contestants[name], moved[name] = made.step, 6 * p.numel() + 2 * held
    rows = timed(contestants, moved, "round", device, rounds)
    what = "low-precision modes, bfloat16, float32 or 8-bit moments"
    return {"case": "modes", "what": what, "optimizer": "AdamW", "parameters": p.numel(), "rows": rows}


def few_bytes(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """AdamW of bfloat16 parameters in few bytes, ours and other libraries', where they are installed. Each has its own
    parameters and states; "bytes" is what stays allocated for a parameter, its gradient not counted."""
    contestants: dict[str, Callable[[], Any]] = {}
    moved: dict[str, float] = {}
    held: dict[str, float] = {}
    absent: dict[str, str] = {}
    numel = sum(math.prod(shape) for shape in case.shapes)
    for name, make in FEW_BYTES.items():
        if name.startswith("torchao") and len(case.shapes) > 50:
            absent[name] = "takes minutes before its first step of more than 50 tensors"
            continue
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        params = [torch.nn.Parameter(torch.randn(shape, device=device).bfloat16()) for shape in case.shapes]
        try:
            made = make(params)
            for p in params:
                p.grad = torch.randn(p.shape, device=device).bfloat16()
            made.step()
        except Exception as error:  # a peer that is missing or fails is a line in the report
            absent[name] = f"{type(error).__name__}: {error}"
            continue
        contestants[name], moved[name] = made.step, numel
        if device == "cuda":
            torch.cuda.synchronize()
            held[name] = (torch.cuda.memory_allocated() - before) / numel - 2
            moved[name] = numel * (2 * held[name] + 2)  # everything that stays is read and written, the gradient is read
    rows = timed(contestants, moved, "fused_l2, master copy", device, rounds)
    for name, row in rows.items():
        row["bytes a parameter"] = held.get(name)
    return {
        "case": f"few-bytes, {case.name}", "what": f"{case.what}, in few bytes", "optimizer": "AdamW", "parameters": numel,
        "rows": rows, "not measured": absent,
    }  # fmt: skip


MODES = [
    *((mode, torch.float32) for mode in ("round", "remainder", "remainder8", "master", "kahan", "stochastic")),
    *((mode, "8bit") for mode in ("round", "remainder8")),
]


def _of(module: str, name: str, **options: Any) -> Callable[[list[torch.nn.Parameter]], Any]:
    return lambda params: getattr(importlib.import_module(module), name)(params, lr=1e-4, weight_decay=0.1, **options)


FEW_BYTES = {
    "fused_l2, master copy": _of("fused_l2", "AdamW", low_precision="master", state_dtype=torch.float32),
    "fused_l2, remainder": _of("fused_l2", "AdamW", low_precision="remainder", state_dtype=torch.float32),
    "fused_l2, remainder8, 8bit": _of("fused_l2", "AdamW", low_precision="remainder8", state_dtype="8bit"),
    "fused_l2, stochastic, 8bit": _of("fused_l2", "AdamW", low_precision="stochastic", state_dtype="8bit"),
    "torch fused, bfloat16 throughout": _of("torch.optim", "AdamW", fused=True),
    "FlashOptim, 24 bits": _of("flashoptim", "FlashAdamW"),
    "bitsandbytes, 8 bits": _of("bitsandbytes.optim", "AdamW8bit"),
    "torchao, 8 bits": _of("torchao.optim", "AdamW8bit"),
}


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
    matrix = Case("matrix-100m", "one matrix of 1e8", lambda: [(25_000, 4_000)])
    for case in (*(case for case in GPU_CASES if case.name == "gpt2-small"), matrix):
        if device == "cpu":
            case = dataclasses.replace(case, make_shapes=lambda: [(128, 32)])
        yield f"AdamW few-bytes, {case.name}", lambda c=case: few_bytes(c, device, rounds)


def is_poisoned(error: Exception) -> bool:
    """Whether every later call would fail with the same error. Being out of memory is none."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        return False
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)


def run(label: str, job: Callable[[], dict[str, Any]], device: str) -> dict[str, Any]:
    """One case: its result, or the error, and whether the process can go on."""
    if device == "cuda":
        # The first optimizer of a process is in a reference cycle (frames of torch's lazy imports), with all its memory.
        gc.collect()
        torch.cuda.empty_cache()
    try:
        return {"label": label, "result": job()}
    except Exception as error:
        return {"label": label, "error": f"{type(error).__name__}: {error}", "poisoned": is_poisoned(error)}


def main(arguments: list[str]) -> int:
    device, first = arguments[0], int(arguments[1])
    for label, job in list(jobs(device, ROUNDS[device]))[first:]:
        print(json.dumps({"begins": label}), flush=True)
        done = run(label, job, device)
        print(json.dumps(done), flush=True)
        if done.get("poisoned"):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
