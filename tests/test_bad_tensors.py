"""Tensors that cannot be stepped: errors that name them, and not one bit changed (traps T27, T50, T53)."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_same_bits, assert_unchanged, each, make, make_params, run, snapshot
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_l2
from fused_l2.parameters import memory

BAD_GRADIENTS = {
    "T27 sparse": (lambda p: torch.randn(4, 3).to_sparse(), "sparse"),
    "T27 complex": (lambda p: torch.randn(4, 3, dtype=torch.complex64), "complex64"),
    "T27 integer": (lambda p: torch.ones(4, 3, dtype=torch.int64), "int64"),
    "T27 other dtype": (lambda p: torch.randn(4, 3, dtype=torch.float64), "float64"),
    "T27 other device": (lambda p: torch.randn(4, 3, device="meta"), "meta"),
    "T27 T50 other shape": (lambda p: torch.randn(3, 4), r"\(3, 4\)"),
    "T53 freed storage": (lambda p: _freed(torch.randn(4, 3)), "storage"),
    "of functionalize": (lambda p: torch._to_functional_tensor(torch.randn(4, 3)), "function transform"),
    "of vmap": (lambda p: _left_from(torch.func.vmap, torch.randn(2, 4, 3)), "function transform"),
    "of grad": (lambda p: _left_from(torch.func.grad, torch.randn(4, 3)), "function transform"),
    "fake": (lambda p: _fake(4, 3), "FakeTensor"),
}
BAD_STATES = {
    "of functionalize": (lambda s: torch._to_functional_tensor(s), "function transform"),
    "zeros without memory": (lambda s: torch._efficientzerotensor(4, 3), "zeros without memory.*clone"),
    "fake": (lambda s: _fake(4, 3), "FakeTensor"),
}


def _left_from(transform, x):
    """A tensor of a function transform that is over."""
    left = []
    transform(lambda y: (left.append(y), y.sum())[1])(x)
    return left[0]


def _fake(*shape):
    with FakeTensorMode():
        return torch.ones(shape)


def _freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


class Tricked(torch.nn.Parameter):
    """A parameter whose gradient was put there behind torch's own checks."""

    @property
    def grad(self):
        return self.__dict__.get("forced", super().grad)

    @grad.setter
    def grad(self, value):
        self.__dict__["forced"] = value


@pytest.fixture
def stepped_by_an_engine():
    memory.PLAIN_TYPES.add(Tricked)
    yield
    memory.PLAIN_TYPES.remove(Tricked)


@each
@pytest.mark.parametrize("kind", BAD_GRADIENTS)
@pytest.mark.parametrize("when", ["first step", "later step"])
@pytest.mark.parametrize("layout", ["dense", "strided"])
def test_bad_gradients_are_refused_by_name_and_change_nothing(name, kind, when, layout, stepped_by_an_engine):
    """Strided parameters are stepped by plain PyTorch, which would leave half of a step."""
    make_grad, says = BAD_GRADIENTS[kind]
    good = torch.nn.Parameter(torch.randn(7))
    bad = Tricked(torch.randn(4, 6)[:, ::2] if layout == "strided" else torch.randn(4, 3))
    optimizer = make(name, [("first", good), ("second", bad)])
    good.grad, bad.grad = torch.randn(7), torch.randn(4, 3)
    if when == "later step":
        optimizer.step()
    bad.grad = make_grad(bad)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=rf"parameter 1 of group 0 'second' \(shape \(4, 3\), float32\).*{says}"):
        optimizer.step()
    assert_unchanged(before, optimizer)
    bad.grad = torch.randn(4, 3)
    optimizer.step()  # and it goes on


@each
@pytest.mark.parametrize("kind", BAD_STATES)
@pytest.mark.parametrize("layout", ["dense", "strided"])
def test_states_without_values_are_refused_by_name(name, kind, layout):
    make_state, says = BAD_STATES[kind]
    good = torch.nn.Parameter(torch.randn(7))
    other = torch.nn.Parameter(torch.randn(4, 6)[:, ::2] if layout == "strided" else torch.randn(4, 3))
    optimizer = make(name, [good, other])
    good.grad, other.grad = torch.randn(7), torch.randn(4, 3)
    optimizer.step()
    key, kept = next((k, v) for k, v in optimizer.state[other].items() if k != "step")
    optimizer.state[other][key] = make_state(kept.clone())
    first = good.detach().clone()
    with pytest.raises(RuntimeError, match=rf"parameter 1 of group 0.*its state '{key}'.*{says}"):
        optimizer.step()
    assert_same_bits(good, first)
    optimizer.state[other][key] = kept
    optimizer.step()


@each
def test_T53_a_parameter_whose_storage_was_freed(name):
    params = make_params((5, 6))
    optimizer = run(lambda p: make(name, p), params, 2)
    kept = params[1].untyped_storage().nbytes()
    saved = params[1].detach().clone()
    params[1].untyped_storage().resize_(0)
    first = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0.*storage.*resize_"):
        optimizer.step()
    assert_same_bits(params[0], first)
    params[1].untyped_storage().resize_(kept)
    with torch.no_grad():
        params[1].copy_(saved)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.float8_e4m3fn], ids=str)
def test_parameters_of_unknown_dtypes_are_refused_when_they_have_a_gradient(dtype):
    p = Tricked(torch.zeros(3).to(dtype), requires_grad=False)
    optimizer = fused_l2.SGD([p], lr=0.1)
    optimizer.step()  # without a gradient there is nothing to refuse
    p.grad = torch.zeros(3).to(dtype)
    with pytest.raises(
        RuntimeError, match=r"parameter 0 of group 0.*steps parameters of dtype float32, float64, bfloat16, float16"
    ):
        optimizer.step()


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (torch.zeros(3), "shape"),
        (torch.zeros(7, dtype=torch.int32), "int32"),
        ("soon", "not a tensor"),
        (torch.zeros(7, device="meta"), "meta"),
    ],
    ids=["shape", "dtype", "kind", "device"],
)
def test_states_that_do_not_fit_are_refused(entry, says):
    params = make_params((7,))
    optimizer = run(lambda p: make("AdamW", p), params, 1)
    optimizer.state[params[0]]["exp_avg"] = entry
    kept = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=f"parameter 0 of group 0.*'exp_avg'.*{says}"):
        optimizer.step()
    assert_same_bits(params[0], kept)
    assert optimizer.state[params[0]]["step"].item() == 1


def test_a_counter_that_is_nan_is_refused():
    params = make_params((7,))
    optimizer = run(lambda p: make("AdamW", p), params, 1)
    optimizer.state[params[0]]["step"].fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*'step' is nan"):
        optimizer.step()
