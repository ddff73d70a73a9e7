"""An element's result does not depend on where it stands: in which lane, tensor, group, thread, or at which alignment (T48)."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_same_bits, make_params
from conftest import LIBRARY, needs_library

import fused_l2

OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "AdamW": {"lr": 0.1, "weight_decay": 0.1},
    "Adam": {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
pytestmark = [
    needs_library,
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("name", OPTIMIZERS),
]


def values(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(name: str, params: list[torch.nn.Parameter], grads: list[list[torch.Tensor]], groups=None) -> None:
    optimizer = getattr(fused_l2, name)(groups or params, **OPTIMIZERS[name])
    for these in grads:
        for p, g in zip(params, these, strict=True):
            p.grad = g
        optimizer.step()


def whole(name: str, dtype: torch.dtype, n: int = 5003) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One tensor after three steps, and the gradients."""
    grads = [values(n, dtype, s) for s in (1, 2, 3)]
    p = torch.nn.Parameter(values(n, dtype, 0))
    step(name, [p], [[g] for g in grads])
    return p.detach(), grads


@pytest.mark.sweep(5)
def test_body_equals_tail(name, dtype, capability):
    """Cut into pieces of every small size, each element passes once through body and once through tail code."""
    expected, grads = whole(name, dtype, 2000)
    sizes = [1 + i % 70 for i in range(57)]
    sizes.append(2000 - sum(sizes))
    params = [torch.nn.Parameter(x.clone()) for x in values(2000, dtype, 0).split(sizes)]
    step(name, params, [[x.clone() for x in g.split(sizes)] for g in grads])
    assert_same_bits(torch.cat([p.detach() for p in params]), expected)


def test_instruction_sets_agree(name, dtype):
    results = []
    before = LIBRARY.capability
    try:
        for capability in LIBRARY.available:
            LIBRARY.select(capability)
            results.append(whole(name, dtype)[0])
    finally:
        LIBRARY.select(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_threads_agree(name, dtype):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(whole(name, dtype, 150_001)[0])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.sweep(5)
def test_T24_misaligned_views_agree(name, dtype, capability):
    expected, grads = whole(name, dtype, 777)
    for offset in range(1, 9):
        memory = torch.zeros(777 + 2 * offset, dtype=dtype)
        memory[offset : offset + 777] = values(777, dtype, 0)
        p = torch.nn.Parameter(memory[offset : offset + 777])
        shifted = [torch.cat([torch.zeros(9 - offset, dtype=dtype), g])[9 - offset :] for g in grads]
        step(name, [p], [[g] for g in shifted])
        assert_same_bits(p, expected)
        assert not memory[:offset].any()
        assert not memory[offset + 777 :].any()


def test_one_group_equals_many(name, dtype):
    """T40: a group per tensor gives the bits of one group, in one call of the library."""
    sizes = [1, 100, 0, 33, 64, 7]
    one, many = make_params(sizes, dtype), make_params(sizes, dtype)
    grads = [[values(n, dtype, 10 * s + i) for i, n in enumerate(sizes)] for s in range(3)]
    step(name, one, grads)
    step(name, many, grads, groups=[{"params": [p]} for p in many])
    assert_same_bits(many, one)
