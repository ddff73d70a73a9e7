"""Gradients and layouts as training produces them (traps T03, T04, T08, T10, T20 to T27, T39, T50 to T53)."""

from __future__ import annotations

import os

import pytest
import torch
from comparing import CASES, assert_same_bits, each, make, make_params, set_grads

import fused_l2
from fused_l2.step import stepper
from fused_l2.step.plan import Plan


def stepped(name, param: torch.Tensor, grads) -> torch.Tensor:
    """The expected value: steps on contiguous copies."""
    p = torch.nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    optimizer = make(name, [p])
    for g in grads:
        p.grad = g.detach().clone(memory_format=torch.contiguous_format)
        optimizer.step()
    return p.detach()


def check(name, p: torch.nn.Parameter, grads) -> None:
    expected = stepped(name, p, grads)
    kept = [g.clone() for g in grads]
    optimizer = make(name, [p])
    for g in grads:
        p.grad = g
        optimizer.step()
    assert_same_bits(p.detach().contiguous(), expected)
    for g, before in zip(grads, kept, strict=True):
        assert_same_bits(g.contiguous(), before.contiguous(), "T52: the gradient")


LAYOUTS = {
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    "contiguous": lambda t: t.contiguous(),
    "every other element": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
}


@each
@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_T04_T20_T21_T22_any_layout_of_parameter_and_gradient(name, param_layout, grad_layout, exact_sqrt):
    p = torch.nn.Parameter(LAYOUTS[param_layout](torch.randn(3, 4, 5, 2)))
    check(name, p, [LAYOUTS[grad_layout](torch.randn(3, 4, 5, 2)) for _ in range(3)])


@each
def test_T20_strides_of_dimensions_of_size_1(name):
    """A compiled 1x1 convolution gives such gradients: other strides, the same order in memory."""
    p = torch.nn.Parameter(torch.randn(8, 4, 1, 1))
    odd = torch.randn(32).as_strided((8, 4, 1, 1), (4, 1, 1, 1))
    check(name, p, [odd, torch.randn(8, 4, 1, 1).to(memory_format=torch.channels_last), odd.clone()])


@each
def test_T20_layouts_that_change_from_step_to_step(name, exact_sqrt):
    p = torch.nn.Parameter(torch.randn(3, 4, 5, 2))
    layouts = ["contiguous", "channels last", "every other element", "contiguous", "transposed", "channels last"]
    check(name, p, [LAYOUTS[layout](torch.randn(3, 4, 5, 2)) for layout in layouts])


@each
def test_T20_T50_expanded_gradients(name):
    p = torch.nn.Parameter(torch.randn(6, 5))
    check(name, p, [torch.randn(1, 5).expand(6, 5), torch.randn(6, 1).expand(6, 5), torch.ones(()).expand(6, 5)])


@each
def test_T51_gradients_with_the_negation_bit(name):
    p = torch.nn.Parameter(torch.randn(9))
    lazy = torch.randn(9, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    check(name, p, [lazy.clone(), torch._neg_view(torch.randn(9)), torch.randn(9)])


@each
def test_T51_parameters_with_the_negation_bit(name, exact_sqrt):
    p = torch.nn.Parameter(torch._neg_view(torch.linspace(1, 2, 9)))
    check(name, p, [torch.randn(9), torch.randn(9)])
    assert_same_bits(torch.nn.Parameter(torch._neg_view(torch.ones(3))).detach(), -torch.ones(3))


@each
def test_gradients_live_until_the_step_is_done(name, monkeypatch):
    """Another thread may set p.grad = None while the C++ runs."""
    import weakref

    (p,) = make_params((50,))
    optimizer = make(name, [p])
    for step in range(3):
        set_grads([p], step)
        optimizer.step()
    set_grads([p], 3)
    alive = weakref.ref(p.grad)
    launched = []

    def launch(plan):
        p.grad = None
        launched.append(alive() is not None)
        launch_really(plan)

    launch_really = Plan.launch
    monkeypatch.setattr(Plan, "launch", launch)
    optimizer.step()
    assert launched == [True]
    assert alive() is None


@each
def test_zero_tensors_as_gradients(name):
    p = torch.nn.Parameter(torch.randn(9))
    expected = stepped(name, p, [torch.zeros(9), torch.ones(9)])
    optimizer = make(name, [p])
    p.grad = torch._efficientzerotensor(9)
    optimizer.step()
    p.grad = torch.ones(9)
    optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-7)


@each
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_gradients_that_require_grad(name):
    """backward(create_graph=True) leaves such gradients."""
    p, q = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    for t in (p, q):
        (t**3).sum().backward(create_graph=True)
    q.grad = q.grad.detach()
    make(name, [p]).step()
    make(name, [q]).step()
    assert_same_bits(p, q)
    p.grad = None  # breaks the reference cycle that create_graph makes


@each
def test_T03_a_first_gradient_that_comes_later(name):
    """Unfreezing, or an expert that is chosen late: its first step is its own."""
    params = make_params((5, 6))
    expected = stepped(name, params[1], [torch.full((6,), 0.5)])
    optimizer = make(name, params)
    for _ in range(3):
        params[0].grad = torch.randn(5)
        optimizer.step()
    params[1].grad = torch.full((6,), 0.5)
    optimizer.step()
    assert_same_bits(params[1], expected)


@each
def test_gradients_that_come_and_go(name):
    generator = torch.Generator().manual_seed(0)
    params, alone = make_params((4, 5, 6)), make_params((4, 5, 6))
    together, singles = make(name, params), [make(name, [p]) for p in alone]
    for step in range(12):
        set_grads(params, step)
        for i, p in enumerate(params):
            if torch.rand((), generator=generator) < 0.5:
                p.grad = None
            alone[i].grad = None if p.grad is None else p.grad.clone()
        together.step()
        for optimizer in singles:
            optimizer.step()
    assert_same_bits(params, alone)


@each
def test_T08_autograd_sees_the_write(name):
    p = torch.nn.Parameter(torch.randn(3))
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    before = p._version
    make(name, [p]).step()
    assert p._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each
@pytest.mark.parametrize("where", ["first", "middle", "last", "only", "everywhere"])
def test_T10_T24_empty_tensors(name, where):
    sizes = {
        "first": (0, 3, 100),
        "middle": (3, 0, 100),
        "last": (3, 100, 0),
        "only": (0,),
        "everywhere": (0, 3, 0, 0, 100, 0),
    }[where]
    params = make_params(sizes)
    set_grads(params, 0)
    expected = [stepped(name, p, [p.grad]) for p in params]
    make(name, params).step()
    assert_same_bits(params, expected)


@each
def test_T24_scalars_and_nothing_to_do(name):
    p = torch.nn.Parameter(torch.tensor(2.0))
    check(name, p, [torch.tensor(0.5), torch.tensor(-1.0)])
    q = torch.nn.Parameter(torch.ones(3))
    optimizer = make(name, [q])
    assert optimizer.step() is None  # no gradient anywhere
    assert_same_bits(q, torch.ones(3))
    assert len(optimizer.state) == 0
    with pytest.raises(ValueError, match="empty parameter list"):
        make(name, [])


@each
def test_T25_tied_parameters_and_one_listed_twice(name):
    """torch.optim steps a parameter listed twice twice, one step after the other, and warns."""
    for storage_only in (False, True):
        p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
        ours = [p, torch.nn.Parameter(p.detach())] if storage_only else [p, p]
        theirs = [q, torch.nn.Parameter(q.detach())] if storage_only else [q, q]
        if storage_only:
            a, b = make(name, ours), getattr(torch.optim, name)(theirs, **CASES[name])
        else:
            with pytest.warns(UserWarning, match="duplicate parameters"):
                a = make(name, ours)
            with pytest.warns(UserWarning, match="duplicate parameters"):
                b = getattr(torch.optim, name)(theirs, **CASES[name])
        for step in range(4):
            grad = torch.randn(50, generator=torch.Generator().manual_seed(step))
            for t in (*ours, *theirs):
                t.grad = grad.clone()
            a.step()
            b.step()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@each
def test_a_parameter_that_moves_to_the_neighbouring_group(name):
    """Layer-wise unfreezing: the concatenated list of parameters stays the same."""
    params, expected = make_params((5, 6, 7)), make_params((5, 6, 7))
    made = []
    for module, ps in ((fused_l2, params), (torch.optim, expected)):
        groups = [{"params": ps[:2], "lr": 0.1}, {"params": ps[2:], "lr": 0.0}]
        made.append(getattr(module, name)(groups, **{**CASES[name], "weight_decay": 0.0}))
    for step in range(4):
        for optimizer, ps in zip(made, (params, expected), strict=True):
            set_grads(ps, step)
            optimizer.step()
            if step == 1:
                optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-7)


@each
def test_T25_a_strided_parameter_overlaps_a_dense_one_listed_later(name):
    results = []
    for module in (fused_l2, torch.optim):
        flat = torch.ones(40)
        ps = [torch.nn.Parameter(flat[::2]), torch.nn.Parameter(flat)]
        optimizer = getattr(module, name)(ps, **CASES[name])
        for step in range(3):
            ps[0].grad, ps[1].grad = torch.full((20,), 1.0 + step), torch.full((40,), -0.5)
            optimizer.step()
        results.append(flat)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_gradients_of_a_wrapper_subclass():
    from torch.testing._internal.two_tensor import TwoTensor

    results = []
    for module in (fused_l2, torch.optim):
        p = torch.nn.Parameter(torch.ones(5))
        optimizer = module.SGD([p], lr=0.1)
        for grad in (torch.ones(5), TwoTensor(torch.ones(5), torch.ones(5)), torch.ones(5)):
            p.grad = grad
            optimizer.step()
        results.append(p.detach())
    assert_same_bits(*results)


@each
def test_fake_tensors_step_as_torchs_do(name):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        p = torch.nn.Parameter(torch.randn(5))
        optimizer = make(name, [p])
        for _ in range(3):
            p.grad = torch.randn(5)
            optimizer.step()


@each
def test_an_expanded_parameter_is_refused_before_anything_changes(name):
    good, bad = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(1).expand(4))
    optimizer = make(name, [good, bad])
    good.grad, bad.grad = torch.ones(3), torch.ones(4)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0.*expanded tensor"):
        optimizer.step()
    assert_same_bits(good, torch.ones(3))
    assert len(optimizer.state) == 0


@each
def test_a_state_transposed_in_its_own_memory(name):
    p, q = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    key = "momentum_buffer" if name == "SGD" else "exp_avg"
    a, b = make(name, [p]), getattr(torch.optim, name)([q], **CASES[name])
    for step in range(3):
        p.grad = torch.arange(9.0).view(3, 3) * (step == 0)
        q.grad = p.grad.clone()
        a.step()
        b.step()
        if step == 0:
            a.state[p][key].t_()
            b.state[q][key].t_()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@each
def test_parameters_can_be_swapped(name):
    """Whole modules are, by ``.to`` and ``load_state_dict``, and by code that moves layers to another device and back."""
    model = torch.nn.Linear(3, 2)
    optimizer = make(name, model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.weight.dtype == torch.float64


@each
def test_T26_parameters_that_move(name):
    """.data = other tensor, between steps; and gradients of only some groups."""
    params, expected = make_params((8, 9)), make_params((8, 9))
    a = getattr(fused_l2, name)([{"params": [p]} for p in params], **CASES[name])
    b = getattr(torch.optim, name)([{"params": [p]} for p in expected], **CASES[name])
    for step in range(6):
        if step % 2:
            params[0].data = params[0].data.clone()
        for ps in (params, expected):
            set_grads(ps, step)
            if step == 3:
                ps[1].grad = None
        a.step()
        b.step()
    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-7)


def test_T26_to_another_dtype_keeps_stepping():
    """module.double() replaces the data of its parameters; states of another dtype are then refused, by name."""
    model = torch.nn.Linear(3, 2)
    optimizer = fused_l2.SGD(model.parameters(), lr=0.5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.ones(1, 3, dtype=dtype)).sum().backward()
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            assert_same_bits(p, (old.double() - 0.5 * p.grad.double()).to(dtype))


@each
def test_T26_add_param_group_mid_run(name):
    params, expected = make_params((8, 9)), make_params((8, 9))
    a, b = (getattr(m, name)([ps[0]], **CASES[name]) for m, ps in ((fused_l2, params), (torch.optim, expected)))
    for step in range(5):
        if step == 2:
            for optimizer, ps in ((a, params), (b, expected)):
                optimizer.add_param_group({"params": [ps[1]], "lr": 0.05})
        for ps in (params, expected):
            set_grads(ps, step)
        a.step()
        b.step()
    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-7)


@each
def test_T39_a_plan_is_made_once(name, monkeypatch):
    """Fresh gradient tensors each step, and a learning rate that changes each step, make no new plan."""
    made = []
    original = stepper.Plan
    monkeypatch.setattr(stepper, "Plan", lambda *a: made.append(a) or original(*a))
    params = make_params((8, 9))
    optimizer = make(name, params)
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        for p in params:
            p.grad = None
        set_grads(params, step)
        optimizer.step()
    # SGD's momentum buffers are made in the first step; the plan goes on with them.
    assert len(made) == 1


@each
def test_T52_T38_one_step_applies_one_update_and_leaves_gradients(name):
    params = make_params((100,))
    set_grads(params, 0)
    kept = params[0].grad.clone()
    p64 = torch.nn.Parameter(params[0].detach().double())
    p64.grad = kept.double()
    make(name, params).step()
    getattr(torch.optim, name)([p64], **CASES[name]).step()
    assert_same_bits(params[0].grad, kept)
    torch.testing.assert_close(params[0].detach().double(), p64.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.sweep
def test_T23_a_tensor_beyond_2_to_the_31_elements():
    needed = 10 << 30
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory, {available >> 30} are free")
    n = (1 << 31) + 37
    p = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16))
    p.grad = torch.zeros(n, dtype=torch.bfloat16)
    marked = [0, 1, (1 << 31) - 1, 1 << 31, n - 1]
    p.grad[marked] = 2.0
    fused_l2.SGD([p], lr=0.5).step()
    assert p.detach()[marked].tolist() == [-1.0] * len(marked)
    assert int(torch.count_nonzero(p.detach())) == len(marked)


@each
def test_T55_rows_that_never_get_a_gradient_stay_exact(name):
    """Moments decay into denormals and through them to zero, as torch's do."""
    p, q = (torch.nn.Parameter(torch.ones(64)) for _ in range(2))
    a, b = make(name, [p]), getattr(torch.optim, name)([q], **CASES[name])
    for step in range(1200):
        p.grad = q.grad = torch.full((64,), 1e-3 if step == 0 else 0.0)
        a.step()
        b.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-12)
