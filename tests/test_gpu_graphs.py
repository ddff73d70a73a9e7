"""On a GPU: train steps captured into CUDA graphs, and loss scaling without waiting. `pytest -m gpu` runs these alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparing import CASES, assert_same_bits, each, make_params, on_gpu, set_grads

import fused_l2

pytestmark = on_gpu
STEPS = 100


class Linear(torch.nn.Linear):
    """Without cuBLAS, whose bits may depend on the stream: it has a workspace for each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, None, :] * self.weight).sum(-1) + self.bias


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(Linear(32, 64), torch.nn.LayerNorm(64), torch.nn.Tanh(), Linear(64, 1)).cuda()


def make(name: str, params: Any, **options: Any) -> Any:
    options = {**CASES[name], **options}
    for key in ("lr", "weight_decay"):
        options[key] = torch.tensor(options[key], dtype=torch.float64, device="cuda")
    if name == "AdamW":
        options["capturable"] = True
    return getattr(fused_l2, name)(params, **options)


@each
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "skip_if_nonfinite": True}], ids=str)
def test_a_captured_train_step_replayed_under_a_schedule_is_the_eager_run(name, options):
    """T35, T36: lr and weight decay follow a cosine in device tensors; eager steps in between do not disturb the graph."""
    first, y = torch.randn(64, 32, device="cuda"), torch.randn(64, 1, device="cuda")
    x = torch.empty_like(first)
    inputs = [torch.randn(64, 32, device="cuda") for _ in range(STEPS)]
    runs = []
    for captured in (True, False):
        model = make_model()
        x.copy_(first)
        optimizer = make(name, model.parameters(), **options)
        group = optimizer.param_groups[0]
        peak = float(group["lr"]), float(group["weight_decay"])

        def train_step(model: Any = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()

        side = torch.cuda.Stream()  # as torch's documentation warms up
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                train_step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captured:
            optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                train_step()
        norms = []
        for i, new in enumerate(inputs):
            x.copy_(new)
            for tensor, top in zip((group["lr"], group["weight_decay"]), peak, strict=True):
                tensor.fill_(top * (0.5 + 0.5 * math.cos(math.pi * i / STEPS)))
            graph.replay() if captured else train_step()
            norms.append(None if optimizer.grad_norm is None else optimizer.grad_norm.clone())
        torch.cuda.synchronize()
        runs.append(([p.detach() for p in model.parameters()], norms, optimizer))
    assert_same_bits(runs[0][0], runs[1][0], "parameter")
    if options:
        assert [float(n) for n in runs[0][1]] == [float(n) for n in runs[1][1]]
    if name == "AdamW":
        counters = [{float(s["step"]) for s in optimizer.state.values()} for _, _, optimizer in runs]
        assert counters == [{STEPS + 3.0}] * 2


@each
def test_a_step_without_capturable_is_refused_within_a_capture(name):
    params = [torch.nn.Parameter(p.detach().cuda()) for p in make_params((5, 1030))]
    optimizer = getattr(fused_l2, name)(params, **CASES[name])
    for p in params:
        p.grad = torch.randn_like(p)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")  # so that the graph is not empty
        with pytest.raises(RuntimeError, match="cannot be captured"):
            optimizer.step()
    optimizer.step()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # "is a prototype feature"
@each
def test_loss_scaling_does_not_wait_and_has_the_bits_of_the_cpu_engine(name):
    on_cpu = make_params((5, 0, 600, 64))
    on_device = [torch.nn.Parameter(p.detach().cuda()) for p in on_cpu]
    ours = [getattr(fused_l2, name)(p, **CASES[name], amp_scaling=True, max_grad_norm=0.5) for p in (on_device, on_cpu)]
    scale, verdicts = 2.0**10, (0.0, 1.0, 0.0, 2.0, 0.0)
    for i, found in enumerate(verdicts):
        set_grads(on_cpu, i)
        for p, q in zip(on_device, on_cpu, strict=True):
            q.grad.mul_(scale)
            p.grad = q.grad.cuda()
        for optimizer, device in zip(ours, ("cuda", "cpu"), strict=True):
            optimizer.grad_scale = torch.tensor(scale, device=device)
            optimizer.found_inf = torch.tensor(found, device=device)
        torch.cuda.synchronize()
        if i > 0:
            torch.cuda.set_sync_debug_mode("error")
        try:
            ours[0].step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ours[1].step()
        assert bool(ours[0].step_was_skipped) == bool(ours[1].step_was_skipped) == (found != 0)
    assert_same_bits([p.detach().cpu() for p in on_device], [p.detach() for p in on_cpu])
