"""The messages that docs/troubleshooting.md quotes are those that people see."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ROOT

import fused_l2

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTES = re.findall(r'^\*\*"([^*]+)"[.*]', PAGE, re.MULTILINE)


def made(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    p = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    p.grad = torch.ones(4, dtype=dtype)
    return fused_l2.AdamW([p], **options)


def sparse() -> None:
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = fused_l2.AdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    optimizer.step()


def another_shape() -> None:
    optimizer = made()
    optimizer.param_groups[0]["params"][0].data = torch.ones(5)
    optimizer.step()


def a_part_of_a_state() -> None:
    optimizer = made()
    optimizer.step()
    del optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]
    optimizer.load_state_dict(optimizer.state_dict())


def other_groups() -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    fused_l2.AdamW([{"params": [p]} for p in params]).load_state_dict(fused_l2.AdamW(params).state_dict())


def another_mode() -> None:
    optimizer = made(torch.bfloat16, low_precision="remainder")
    optimizer.step()
    made(torch.bfloat16, low_precision="master").load_state_dict(optimizer.state_dict())


def not_finite() -> None:
    optimizer = made(max_grad_norm=1.0, error_if_nonfinite=True)
    optimizer.param_groups[0]["params"][0].grad.fill_(torch.nan)
    optimizer.step()


def decay_that_is_lost() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(torch.bfloat16, lr=1e-4, weight_decay=1e-2, low_precision="round").step()


PROVOKED: dict[str, Callable[[], Any]] = {
    "module 'fused_l2' has no attribute 'AdamW'": lambda: type(torch)("fused_l2").AdamW,
    "rounded to bfloat16, weight decay does little or nothing": decay_that_is_lost,
    "does not support sparse gradients": sparse,
    "its gradient has shape ...": another_shape,
    "its state has 'exp_avg', 'exp_avg_sq', but no 'step'": a_part_of_a_state,
    "a different number of parameter groups": other_groups,
    "its state holds 'param_remainder', which low_precision='remainder' has kept": another_mode,
    "The total norm ... is nan, so they cannot be clipped": not_finite,
    "'NoneType' object has no attribute 'as_dict'": lambda: made().statistics.as_dict(),
}
# What a test cannot provoke here stands in the source.
FOUND = {
    "fused_l2 was installed without its C++ library",
    "is a source checkout whose C++ library was not compiled",
    "this step() cannot be captured into a CUDA graph",
}


@pytest.mark.parametrize("quote", PROVOKED)
def test_a_message_is_what_is_quoted(quote: str) -> None:
    with pytest.raises((Exception, Warning)) as raised:
        PROVOKED[quote]()
    assert re.search(".*".join(map(re.escape, quote.split(" ... "))).removesuffix(re.escape(" ...")), str(raised.value))


def test_every_quote_is_tested() -> None:
    assert set(QUOTES) == PROVOKED.keys() | FOUND
    files = (ROOT / "fused_l2").rglob("*.py")
    texts = [
        node.value
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    for quote in FOUND:
        assert any(quote in text for text in texts), quote
