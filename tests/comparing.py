"""What several tests need: awkward sizes, optimizers side by side, and comparisons by bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_l2

# Around every vector width and block there is, primes, and nothing at all.
AWKWARD_SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 1000, 1003)

SGD_VARIANTS = [
    {"momentum": m, "dampening": d, "weight_decay": w, "nesterov": n, "maximize": x}
    for m, d, w, n, x in itertools.product((0.0, 0.9), (0.0, 0.3), (0.0, 0.1), (False, True), (False, True))
    if not (n and (m == 0 or d != 0))
]
ADAM_VARIANTS = [
    {"betas": b, "weight_decay": w, "amsgrad": a, "maximize": x}
    for b, w, a, x in itertools.product(((0.9, 0.999), (0.3, 0.9), (0.0, 0.95)), (0.0, 0.1), (False, True), (False, True))
]


# One rule of each family, with everything on: for tests of what surrounds the arithmetic.
CASES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
}
each = pytest.mark.parametrize("name", CASES)

# Tests on a GPU. Warnings of ours are failures there, too; those of others, who have some for GPUs alone, are not.
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings(
        "default::UserWarning", "error:fused_l2:UserWarning", "ignore:fused_l2. weight decay takes:UserWarning"
    ),
]


def plan_of(optimizer: Any) -> Any:
    """What an optimizer has prepared for its next step."""
    return optimizer._stepper._plan


def make(name: str, params: Any, **options: Any) -> Any:
    """The optimizer of a case, with these options as well."""
    return getattr(fused_l2, name)(params, **{**CASES[name], **options})


def label(variant: dict[str, Any]) -> str:
    """A short test id: the options that are on."""
    return "-".join(f"{k}{v if not isinstance(v, bool) else ''}" for k, v in variant.items() if v) or "plain"


def make_params(sizes: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]


def set_grads(params: Sequence[Tensor], seed: int) -> None:
    """Gradients over four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        scale = 10 ** (4 * torch.rand(p.shape, generator=generator) - 2)
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def set_grad(p: Tensor, grad: Tensor) -> None:
    """Give a parameter this gradient, of any dtype. Skips where torch lets it have no other dtype than its parameter."""
    if grad.dtype is not p.dtype:
        if not hasattr(p, "grad_dtype"):
            pytest.skip("this torch does not let a gradient have another dtype than its parameter")
        p.grad = None
        p.grad_dtype = None
    p.grad = grad


def run(make: Callable[[list[torch.nn.Parameter]], Any], params: list[torch.nn.Parameter], steps: int) -> Any:
    """Make ``steps`` steps on the gradients of ``set_grads``; returns the optimizer."""
    optimizer = make(params)
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    return optimizer


def differing(a: Tensor, b: Tensor) -> int:
    """How many elements differ in a bit; any NaN equals any other."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    a, b = a.detach().resolve_neg(), b.detach().resolve_neg()
    if not a.dtype.is_floating_point:
        return int((a != b).sum())
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    x, y = a.contiguous().view(integer), b.contiguous().view(integer)
    return 0 if x.equal(y) else int(((x != y) & ~(a.isnan() & b.isnan())).sum())


def assert_same_bits(a: Sequence[Tensor] | Tensor, b: Sequence[Tensor] | Tensor, what: str = "") -> None:
    """Equality by bits, naming the first element that differs."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = [a], [b]
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if differing(x, y):
            where = int(((x != y) & ~(x.isnan() & y.isnan())).flatten().nonzero()[0]) if bool((x != y).any()) else -1
            raise AssertionError(
                f"{what} tensor {i} of shape {tuple(x.shape)}: {differing(x, y)} elements differ, first {where}: "
                f"{x.flatten()[where].item()!r} and {y.flatten()[where].item()!r}"
            )


def states(optimizer: Any, params: Sequence[Tensor], *names: str) -> list[Tensor]:
    return [optimizer.state[p][name] for p in params for name in names]


def snapshot(optimizer: Any) -> dict[str, Any]:
    """Every bit an optimizer's step may change."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "params": [p.detach().clone() for p in params],
        "state": [
            {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state.get(p, {}).items()} for p in params
        ],
        "versions": [p._version for p in params],
    }


def assert_unchanged(before: dict[str, Any], optimizer: Any) -> None:
    after = snapshot(optimizer)
    assert before["versions"] == after["versions"]
    for old, new in zip(before["params"], after["params"], strict=True):
        assert_same_bits(old, new, "parameter")
    for old, new in zip(before["state"], after["state"], strict=True):
        assert old.keys() == new.keys()
        for key in old:
            if isinstance(old[key], Tensor):
                assert_same_bits(old[key], new[key], key)
