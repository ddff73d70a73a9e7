"""max_grad_norm: clipping by the global norm inside the step, against torch.nn.utils.clip_grad_norm_ before it."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from comparing import assert_same_bits, assert_unchanged, each, make, make_params, set_grads, snapshot, states
from conftest import needs_library

import fused_l2

SIZES = (1000, 3, 0, 65, 40_000, 1)
NORMS = pytest.mark.parametrize("norm_type", [2.0, math.inf])


def true_norm(params: list[Any], norm_type: float) -> float:
    values = torch.cat([p.grad.double().flatten() for p in params if p.grad is not None])
    return float(torch.linalg.vector_norm(values, norm_type))


@each
@NORMS
@pytest.mark.parametrize("limit", [0.5, 1e9, 1e-30], ids=["clips", "far off", "almost zero"])
def test_a_clipped_step_is_a_step_on_clipped_gradients(name, norm_type, limit):
    """By bits, given our norm; the norm itself within an ulp of the float64 norm."""
    ours, theirs = make_params(SIZES), make_params(SIZES)
    a, b = make(name, ours, max_grad_norm=limit, norm_type=norm_type), make(name, theirs)
    for i in range(5):
        set_grads(ours, i)
        set_grads(theirs, i)
        norm = true_norm(ours, norm_type)
        a.step()
        assert a.grad_norm.dtype is torch.float32
        assert a.grad_norm.dim() == 0
        assert abs(float(a.grad_norm) - norm) <= norm * torch.finfo(torch.float32).eps
        factor = ((a.grad_norm + 1e-6).reciprocal() * limit).clamp(max=1.0)  # clip_grad_norm_'s own
        for p in theirs:
            p.grad.mul_(factor)
        b.step()
    assert_same_bits(ours, theirs)
    names = list(b.state[theirs[0]])
    assert_same_bits(states(a, ours, *names), states(b, theirs, *names))


@each
@NORMS
def test_against_clip_grad_norm(name, norm_type):
    """torch sums squares in float32: its norm, so its factor and the clipped gradients, may be a few ulp off ours.

    With n = 41069 elements a float32 sum in lanes of 8 or more is within n / 8 * eps / 2 relatively, the root half of that:
    1.6e-4 at worst, 1e-6 in practice. Bound: 1e-5 of the change that one step makes.
    """
    sizes = [n for n in SIZES if n]  # torch refuses empty ones with inf
    ours, theirs = make_params(sizes), make_params(sizes)
    before = [p.detach().clone() for p in ours]
    a, b = make(name, ours, max_grad_norm=0.5, norm_type=norm_type), make(name, theirs)
    set_grads(ours, 0)
    set_grads(theirs, 0)
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5, norm_type)
    b.step()
    a.step()
    assert float(a.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    for p, q, old in zip(ours, theirs, before, strict=True):
        change = (q.detach() - old).abs()
        assert bool(((p - q).detach().abs() <= 1e-5 * change + 2e-7 * old.abs()).all())


@each
def test_gradients_are_not_rewritten(name):
    params = make_params(SIZES)
    optimizer = make(name, params, max_grad_norm=0.1)
    set_grads(params, 0)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert_same_bits([p.grad for p in params], before)


@needs_library
@each
def test_the_same_bits_for_any_thread_count_and_instruction_set(name, capability, threads):
    params = make_params(SIZES)
    optimizer = make(name, params, max_grad_norm=0.5)
    for i in range(3):
        set_grads(params, i)
        optimizer.step()
    first = RESULTS.setdefault(name, ([p.detach().clone() for p in params], optimizer.grad_norm))
    assert_same_bits(params, first[0], f"{capability}, {threads} threads:")
    assert_same_bits(optimizer.grad_norm, first[1])


RESULTS: dict[str, Any] = {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_T33_large_finite_gradients_do_not_overflow(dtype):
    """Their squares overflow float32, and for bfloat16 and float16 a norm in the gradients' own dtype would."""
    p = torch.nn.Parameter(torch.zeros(1000, dtype=dtype))
    value = 6e4 if dtype is torch.float16 else 1e30
    p.grad = torch.full_like(p, value)
    optimizer = fused_l2.SGD([p], lr=1.0, max_grad_norm=1.0)
    optimizer.step()
    exact = float(p.grad[0]) * math.sqrt(1000)
    assert float(optimizer.grad_norm) == pytest.approx(exact, rel=1e-6)
    assert optimizer.grad_norm.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert float(p[0].detach()) == pytest.approx(-1 / math.sqrt(1000), rel=2 * torch.finfo(dtype).eps)


@each
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@NORMS
def test_nonfinite_norms(name, bad, norm_type):
    """Multiplied by anyway, as torch does; an error; or the step is left out."""

    def prepared(**options: Any) -> Any:
        params = make_params(SIZES)
        optimizer = make(name, params, max_grad_norm=1.0, norm_type=norm_type, **options)
        set_grads(params, 0)
        optimizer.step()
        set_grads(params, 1)
        params[0].grad[5] = bad
        return optimizer, params

    optimizer, params = prepared()
    theirs = [torch.nn.Parameter(torch.zeros_like(p)) for p in params if p.numel()]  # torch refuses empty ones with inf
    for p, q in zip((p for p in params if p.numel()), theirs, strict=True):
        q.grad = p.grad.clone()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0, norm_type)
    optimizer.step()
    assert bool(torch.isnan(params[0]).any()) == bool(torch.isnan(theirs[0].grad).any())
    assert bool(torch.isnan(params[4]).all()) == bool(torch.isnan(theirs[3].grad).all())

    optimizer, params = prepared(error_if_nonfinite=True)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"total norm of order .* is (nan|inf)"):
        optimizer.step()
    assert_unchanged(before, optimizer)

    optimizer, params = prepared(skip_if_nonfinite=True)
    assert not optimizer.step_was_skipped
    before = snapshot(optimizer)
    optimizer.step()
    assert optimizer.step_was_skipped
    assert not math.isfinite(float(optimizer.grad_norm))
    assert_unchanged(before, optimizer)
    set_grads(params, 2)
    optimizer.step()
    assert not optimizer.step_was_skipped


@each
def test_T02_a_first_step_that_is_left_out_leaves_no_state(name):
    """The first step that happens is then the first: momentum is not taken from a buffer that was never filled."""
    params, expected = make_params(SIZES), make_params(SIZES)
    optimizer = make(name, params, max_grad_norm=1.0, skip_if_nonfinite=True)
    set_grads(params, 0)
    params[1].grad[0] = math.inf
    optimizer.step()
    assert all(not state for state in optimizer.state.values())
    other = make(name, expected, max_grad_norm=1.0)
    for i in (1, 2):
        set_grads(params, i)
        set_grads(expected, i)
        optimizer.step()
        other.step()
    assert_same_bits(params, expected)


def test_all_groups_and_tensors_of_other_engines_count():
    """Two dtypes, three groups, a parameter with gaps that plain PyTorch steps."""

    def prepared() -> list[Any]:
        wide = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
        params = [*make_params((100, 7)), *make_params((33,), torch.bfloat16), torch.nn.Parameter(wide[:, :3])]
        set_grads(params, 0)
        return params

    params, others = prepared(), prepared()

    def groups(of: list[Any]) -> list[dict[str, Any]]:
        return [{"params": of[:1]}, {"params": of[1:3], "lr": 0.1}, {"params": of[3:]}]

    optimizer, other = fused_l2.AdamW(groups(params), max_grad_norm=0.1), fused_l2.AdamW(groups(others))
    norm = true_norm(params, 2.0)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-6)
    for p in others:
        p.grad = p.grad * (0.1 / (norm + 1e-6))
    other.step()
    for p, q in zip(params, others, strict=True):
        assert torch.allclose(p, q, rtol=2e-2 if p.dtype is torch.bfloat16 else 1e-6, atol=1e-6)


def test_without_any_gradient():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = fused_l2.SGD([p], lr=0.1, max_grad_norm=1.0)
    assert optimizer.grad_norm is None
    optimizer.step()
    assert float(optimizer.grad_norm) == 0


def test_changing_and_removing_the_limit():
    params, others = make_params(SIZES), make_params(SIZES)
    optimizer, other = fused_l2.SGD(params, lr=0.1), fused_l2.SGD(others, lr=0.1)
    for i, limit in enumerate((None, 0.1, 0.2, None)):
        set_grads(params, i)
        set_grads(others, i)
        optimizer.max_grad_norm = limit
        assert optimizer.max_grad_norm == limit
        if limit is not None:
            factor = limit / (true_norm(others, 2.0) + 1e-6)
            for q in others:
                q.grad.mul_(factor)
        optimizer.step()
        other.step()
    assert all(torch.allclose(p, q, rtol=1e-6) for p, q in zip(params, others, strict=True))


@each
def test_the_options_are_no_group_keys_and_survive_pickle_and_copy(name):
    params = make_params(SIZES)
    optimizer = make(name, params, max_grad_norm=0.5)
    assert optimizer.param_groups[0].keys() == make(name, make_params(SIZES)).param_groups[0].keys()
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert again.max_grad_norm == 0.5
    assert "max_grad_norm" not in str(optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_grad_norm": -1.0}, ValueError, "Invalid max_grad_norm: -1.0"),
        ({"max_grad_norm": math.nan}, ValueError, "Invalid max_grad_norm: nan"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number"),
        ({"max_grad_norm": 1.0, "norm_type": 1}, ValueError, "norm_type must be 2 or inf, got 1.0"),
        ({"max_grad_norm": 1.0, "norm_type": "two"}, TypeError, "norm_type must be 2 or inf, got 'two'"),
        ({"error_if_nonfinite": True}, ValueError, "pass max_grad_norm, too"),
        ({"max_grad_norm": 1.0, "error_if_nonfinite": True, "skip_if_nonfinite": True}, ValueError, "exclude each other"),
    ],
)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        getattr(fused_l2, name)(make_params((3,)), **options)
