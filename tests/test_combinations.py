"""What surrounds the step, all together: every pair of options meets in some run, on both engines, against plain steps."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from typing import Any

import pytest
import torch
from comparing import CASES, assert_same_bits, make_params

import fused_l2

OPTIONS: dict[str, list[Any]] = {
    "name": ["SGD", "AdamW"],
    "max_grad_norm": [None, 0.5],
    "skip_if_nonfinite": [False, True],
    "amp_scaling": [False, True],
    "capturable": [False, True],  # with lr and weight decay in tensors
    "statistics": [False, True],
    "groups": [1, 28],
    "dtype": [torch.float32, torch.float16],
    "engine": ["cpp", "triton"],
}


def allowed(run: dict[str, Any]) -> bool:
    return run["max_grad_norm"] is not None or not run["skip_if_nonfinite"]


def pairwise() -> list[dict[str, Any]]:
    """Runs such that each allowed pair of values is in one of them: greedily, from the same seed every time."""
    every = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]
    every = list(filter(allowed, every))
    random.Random(0).shuffle(every)

    def pairs(run: dict[str, Any]) -> set[Any]:
        return set(itertools.combinations(run.items(), 2))

    missing, chosen = set().union(*map(pairs, every)), []
    while missing:
        chosen.append(max(every, key=lambda run: len(pairs(run) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def label(run: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" if k not in ("name", "engine", "dtype") else str(v) for k, v in run.items() if v)


def make(run: dict[str, Any], params: list[Any], **options: Any) -> Any:
    groups = [
        {"params": params[i :: run["groups"]], "lr": CASES[run["name"]]["lr"] * (1 + i % 3)} for i in range(run["groups"])
    ]
    return getattr(fused_l2, run["name"])(groups, **{**CASES[run["name"]], **options})


@pytest.mark.parametrize("run", pairwise(), ids=label)
def test_a_run_with_everything_is_the_plain_run_without_the_skipped_steps(run, monkeypatch, request):
    """Six steps of which three overflow where something skips them, under a schedule of lr and weight decay."""
    sizes = (5, 0, 130, 9) * 7
    params, expected = make_params(sizes, run["dtype"]), make_params(sizes, run["dtype"])
    options = {key: run[key] for key in ("max_grad_norm", "skip_if_nonfinite", "amp_scaling", "statistics")}
    if run["name"] == "AdamW":
        options["capturable"] = run["capturable"]
    ours, plain = make(run, params, **options), make(run, expected, max_grad_norm=run["max_grad_norm"])
    scheduled = [(group, key, group[key]) for group in ours.param_groups for key in ("lr", "weight_decay")]
    if run["capturable"]:
        for group, key, value in scheduled:
            group[key] = torch.tensor(value, dtype=torch.float64)

    place = {id(p) for p in params} | {id(group[key]) for group, key, _ in scheduled}
    if run["engine"] == "triton":
        pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")
        from gpu_free.fake_cuda import FakeDevice, emulated, tensors_of

        device = FakeDevice(emulated(90))
        device.eager, device.accessible = True, lambda: tensors_of(ours)
        stack = contextlib.ExitStack()
        request.addfinalizer(stack.close)
        stack.enter_context(device.in_place(monkeypatch, lambda t: id(t) in place))

    scale = 2.0**6 if run["amp_scaling"] else 1.0
    skips = run["amp_scaling"] or run["skip_if_nonfinite"]
    for i in range(6):
        generator = torch.Generator().manual_seed(i)
        grads = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
        overflows = skips and i in (0, 1, 4)
        if overflows:
            grads[2][7] = math.inf
        for group, key, value in scheduled:
            now = value * (1 - i / 8)
            if run["capturable"]:
                group[key].fill_(now)
            else:
                group[key] = now
        for group, theirs in zip(ours.param_groups, plain.param_groups, strict=True):
            theirs["lr"], theirs["weight_decay"] = float(group["lr"]), float(group["weight_decay"])
        for p, q, g in zip(params, expected, grads, strict=True):
            p.grad, q.grad = g * scale, g
        if run["amp_scaling"]:
            ours.grad_scale, ours.found_inf = torch.tensor(scale), torch.tensor(2.0 if overflows else 0.0)
        ours.step()
        assert bool(ours.step_was_skipped) == overflows
        if run["statistics"]:
            figures = ours.statistics.as_dict()
            assert figures["nonfinite_grads"] == overflows
            assert (figures["update_norm"] == 0) == overflows
            assert overflows or figures["grad_norm"] == pytest.approx(
                math.sqrt(sum(float(g.double().square().sum()) for g in grads))
            )
        if not overflows:
            plain.step()
            if run["max_grad_norm"] is not None:
                assert_same_bits(ours.grad_norm, plain.grad_norm, "norm")
    if run["engine"] == "triton":
        assert device.launches
        stack.close()
    assert_same_bits(params, expected, "parameter")
    for p, q in zip(params, expected, strict=True):
        assert_same_bits(list(ours.state[p].values()), list(plain.state[q].values()), "state")
