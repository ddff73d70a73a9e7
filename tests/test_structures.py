"""Random structures and histories, by hypothesis: whatever happens between steps, the plan notices.

The expected bits come from one optimizer per parameter, made anew before every step from the state so far: it has no plan to
be out of date.
"""

from __future__ import annotations

import copy

import torch
from comparing import assert_same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fused_l2
from fused_l2.parameters import memory

OPTIONS = {
    "SGD": [
        {},
        {"momentum": 0.9},
        {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "dampening": 0.3},
    ],
    "Adam": [{}, {"weight_decay": 0.1}, {"amsgrad": True}, {"betas": (0.3, 0.8), "maximize": True}],
    "AdamW": [{}, {"weight_decay": 0.3}, {"amsgrad": True, "eps": 1e-3}],
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EVENTS = ["step"] * 4 + ["move", "restride", "load", "lr", "wd", "replace state", "edit counter", "add group", "copy"]


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with other strides."""
    return torch.stack([tensor, tensor], -1)[..., 0]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_any_history(data):
    name = data.draw(st.sampled_from(sorted(OPTIONS)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))

    def new_param():
        size = data.draw(st.one_of(st.integers(0, 70), st.integers(0, 5000)))
        dtype = data.draw(st.sampled_from(DTYPES))
        return torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype))

    def new_group():
        count = data.draw(st.integers(1, 4))
        return {"params": [new_param() for _ in range(count)], "lr": 0.1, **data.draw(st.sampled_from(OPTIONS[name]))}

    optimizer = getattr(fused_l2, name)([new_group() for _ in range(data.draw(st.integers(1, 3)))])
    for event in data.draw(st.lists(st.sampled_from(EVENTS), min_size=2, max_size=12)):
        groups = optimizer.param_groups
        params = [p for g in groups for p in g["params"]]
        chosen = params[data.draw(st.integers(0, len(params) - 1))]
        if event == "move":
            chosen.data = chosen.data.clone()
        elif event == "restride":
            chosen.data = spread(chosen.data)
        elif event == "load":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif event == "lr":
            groups[0]["lr"] = data.draw(st.sampled_from([0.0, 0.01, 0.5, torch.tensor(0.25)]))
        elif event == "wd":
            groups[-1]["weight_decay"] = data.draw(st.sampled_from([0.0, 0.05]))
        elif event == "replace state":
            for key, value in list(optimizer.state.get(chosen, {}).items()):
                optimizer.state[chosen][key] = value.clone()
        elif event == "edit counter" and "step" in optimizer.state.get(chosen, {}):
            optimizer.state[chosen]["step"].add_(3)
        elif event == "add group":
            optimizer.add_param_group(new_group())
        elif event == "copy":
            optimizer = copy.deepcopy(optimizer)
        elif event == "step":
            make_step(name, optimizer, generator, data)


def make_step(name, optimizer, generator, data):
    expected = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            kind = data.draw(st.sampled_from(["none", "fresh", "fresh", "fresh", "restrided", "kept"]))
            if kind == "none":
                p.grad = None
            elif kind != "kept" or p.grad is None or p.grad.dtype != p.dtype:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if kind == "restrided":
                p.grad = spread(p.grad)
            # The same step by an optimizer that has just been made, of dense copies.
            q = torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
            options = {k: v for k, v in group.items() if k not in ("params", "decoupled_weight_decay")}
            alone = getattr(fused_l2, name)([q], **options)
            q.grad = None if p.grad is None else p.grad.clone(memory_format=torch.contiguous_format)
            alone.state[q] = {k: v.clone() for k, v in optimizer.state.get(p, {}).items()}
            alone.step()
            expected.append((q, alone.state[q]))
    optimizer.step()
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for p, (q, state) in zip(params, expected, strict=True):
        if dense(p):
            assert_same_bits(p.detach().contiguous(), q.detach())
            assert {k for k, v in state.items()} == set(optimizer.state.get(p, {}))
            for key, value in state.items():
                assert_same_bits(optimizer.state[p][key].contiguous(), value, key)
        else:
            # Stepped by plain PyTorch, whose sqrt may be an ulp off; the comparison restarts from its result each step.
            tolerance = 8 * torch.finfo(p.dtype).eps
            torch.testing.assert_close(p.detach().contiguous(), q.detach(), rtol=tolerance, atol=tolerance)


def dense(tensor: torch.Tensor) -> bool:
    return memory.is_dense(tensor)
