"""Hyperparameters: torch's checks and more, with messages that name the argument, and nothing changed by a refusal."""

from __future__ import annotations

import math

import pytest
import torch
from comparing import assert_same_bits, assert_unchanged, make_params, run, set_grads, snapshot

import fused_l2

NAN = math.nan
BAD = [
    ("SGD", {"lr": -1.0}, ValueError, "learning rate"),
    ("SGD", {"lr": NAN}, ValueError, "learning rate"),
    ("SGD", {"lr": "0.1"}, TypeError, "learning rate must be a number.*'0.1'"),
    ("SGD", {"lr": None}, TypeError, "learning rate"),
    ("SGD", {"lr": torch.ones(2)}, ValueError, "1-element"),
    ("SGD", {"momentum": -0.1}, ValueError, "momentum"),
    ("SGD", {"momentum": NAN}, ValueError, "momentum"),
    ("SGD", {"dampening": NAN}, ValueError, "dampening"),
    ("SGD", {"weight_decay": -1e-4}, ValueError, "weight_decay"),
    ("SGD", {"weight_decay": [1]}, TypeError, "weight_decay"),
    ("SGD", {"nesterov": True}, ValueError, "Nesterov"),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "Nesterov"),
    ("SGD", {"differentiable": True}, ValueError, "differentiable"),
    ("SGD", {"fused": True, "foreach": True}, RuntimeError, "fused"),
    *(
        (name, options, error, says)
        for name in ("Adam", "AdamW")
        for options, error, says in (
            ({"lr": -1.0}, ValueError, "learning rate"),
            ({"lr": NAN}, ValueError, "learning rate"),
            ({"betas": (1.0, 0.9)}, ValueError, "beta parameter at index 0"),
            ({"betas": (0.9, -0.1)}, ValueError, "beta parameter at index 1"),
            ({"betas": (0.9, NAN)}, ValueError, "beta parameter at index 1"),
            ({"betas": 0.9}, TypeError, "betas must be a pair"),
            ({"eps": -1e-8}, ValueError, "epsilon"),
            ({"weight_decay": -0.1}, ValueError, "weight_decay"),
            ({"differentiable": True}, ValueError, "differentiable"),
        )
    ),
]


@pytest.mark.parametrize(("name", "options", "error", "says"), BAD, ids=lambda v: str(v).replace(" ", "")[:40])
def test_refused_by_the_constructor_by_groups_and_in_the_middle_of_a_run(name, options, error, says):
    with pytest.raises(error, match=says):
        getattr(fused_l2, name)(make_params((3,)), **options)
    if "differentiable" in options or "foreach" in options:
        return
    params = make_params((3, 4))
    optimizer = run(lambda p: getattr(fused_l2, name)(p), params, 2)
    with pytest.raises(error, match=f"{says}.*of param group 1|of param group 1.*"):
        optimizer.add_param_group({"params": make_params((2,)), **options})
    assert len(optimizer.param_groups) == 1
    if says == "Nesterov":  # a schedule may come to it
        return
    kept = dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(options)
    set_grads(params, 0)
    before = snapshot(optimizer)
    with pytest.raises(error, match="of param group 0"):
        optimizer.step()
    assert_unchanged(before, optimizer)
    optimizer.param_groups[0].update(kept)
    optimizer.step()  # and it goes on


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_torch_raises_the_same_type_where_it_raises(name):
    for bad_name, options, error, _ in BAD:
        if bad_name != name or "differentiable" in options:
            continue
        raised = None
        try:
            getattr(torch.optim, name)(make_params((3,)), **options)
        except Exception as caught:
            raised = type(caught)
        assert raised in (None, error), options


def test_signatures_take_every_keyword_of_torch():
    import inspect

    for name in ("SGD", "Adam", "AdamW"):
        theirs = inspect.signature(getattr(torch.optim, name).__init__).parameters
        ours = inspect.signature(getattr(fused_l2, name).__init__).parameters
        for key, parameter in theirs.items():
            assert ours[key].default == parameter.default, (name, key)
            assert ours[key].kind == parameter.kind, (name, key)
        # In the same order, so that positional calls mean the same.
        assert [k for k in ours if k in theirs] == list(theirs)


@pytest.mark.parametrize(
    "lr", [torch.tensor(0.1), torch.tensor([0.1]), torch.tensor(0.1, dtype=torch.float64)], ids=["0-dim", "1-dim", "float64"]
)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_T09_tensor_learning_rates(name, lr):
    """The tensor's value counts, also after it changed in place, also when its kind changes in the middle of a run."""
    params, expected = make_params((5, 6)), make_params((5, 6))
    a, b = getattr(fused_l2, name)(params, lr=lr.clone()), getattr(fused_l2, name)(expected, lr=lr.item())
    for step in range(6):
        if step == 2:
            a.param_groups[0]["lr"].mul_(0.5)
            b.param_groups[0]["lr"] = a.param_groups[0]["lr"].item()
        if step == 4:
            a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = 0.025
        for ps in (params, expected):
            set_grads(ps, step)
        a.step()
        b.step()
        assert_same_bits(params, expected)


def test_tensor_betas_and_unknown_group_keys():
    params, expected = make_params((5,)), make_params((5,))
    betas = (torch.tensor(0.5), torch.tensor(0.75))  # both exact in float32
    a = fused_l2.AdamW([{"params": params, "lr_scale": 0.3}], betas=betas)
    b = fused_l2.AdamW(expected, betas=(0.5, 0.75))
    for step in range(3):
        for ps in (params, expected):
            set_grads(ps, step)
        a.step()
        b.step()
    assert_same_bits(params, expected)
    assert a.param_groups[0]["lr_scale"] == 0.3
    assert a.state_dict()["param_groups"][0]["lr_scale"] == 0.3


def test_betas_as_a_list_or_another_sequence_changed_in_place():
    from collections import UserList

    params, expected = make_params((5,)), make_params((5,))
    a, b = fused_l2.AdamW(params, betas=UserList([0.9, 0.999])), fused_l2.AdamW(expected)
    for step, betas in enumerate([None, [0.9, 0.99], None]):
        if betas:
            a.param_groups[0]["betas"] = betas
            b.param_groups[0]["betas"] = tuple(betas)
        if step == 2:
            a.param_groups[0]["betas"][0] = 0.5
            b.param_groups[0]["betas"] = (0.5, 0.99)
        for optimizer, ps in ((a, params), (b, expected)):
            set_grads(ps, step)
            optimizer.step()
        assert_same_bits(params, expected)


def test_an_array_as_learning_rate_changed_in_place():
    numpy = pytest.importorskip("numpy")
    lr, p = numpy.array(1.0), torch.nn.Parameter(torch.zeros(2))
    optimizer = fused_l2.SGD([p], lr=lr)
    p.grad = torch.ones(2)
    optimizer.step()
    lr[...] = 0.25
    optimizer.step()
    assert p.tolist() == [-1.25, -1.25]


def test_decoupled_weight_decay_of_sgd_may_be_switched():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fused_l2.SGD([p], lr=0.5, momentum=0.9, weight_decay=0.5)
    for _ in range(2):
        p.grad = torch.zeros(3)
        optimizer.step()
    buffer = optimizer.state[p]["momentum_buffer"].clone()
    assert (buffer != 0).all()  # coupled: the decay is in the momentum
    optimizer.decoupled_weight_decay = True
    optimizer.step()
    # The weights of this one step are the same either way; the momentum tells them apart.
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], 0.9 * buffer)


def test_differentiable_is_refused_in_a_param_group_too():
    optimizer = fused_l2.SGD(make_params((3,)))
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        optimizer.add_param_group({"params": make_params((2,)), "differentiable": True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adam"])
def test_every_hyperparameter_may_change_between_steps(name, exact_sqrt):
    """Values, and the shape of the computation: momentum, nesterov and maximize switched on and off, decay set to 0."""
    changes = {
        "SGD": [{"lr": 0.01}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"nesterov": True}, {"maximize": True},
                {"weight_decay": 0.0}, {"nesterov": False}, {"dampening": 0.5}, {"momentum": 0.0, "dampening": 0.0}],
        "AdamW": [{"lr": 0.01}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.0}, {"eps": 1e-3}, {"maximize": True}],
    }  # fmt: skip
    params, expected = make_params((5, 40)), make_params((5, 40))
    a, b = getattr(fused_l2, name)(params, lr=0.1), getattr(torch.optim, name)(expected, lr=0.1)
    for step, change in enumerate(changes.get(name, changes["AdamW"]) * 2):
        for optimizer, ps in ((a, params), (b, expected)):
            optimizer.param_groups[0].update(change)
            set_grads(ps, step)
            optimizer.step()
        assert_same_bits(params, expected, str(change))


@pytest.mark.parametrize("end", [{"momentum": 0.0}, {"dampening": 0.5}, {"momentum": torch.tensor(0.0)}], ids=str)
def test_nesterov_may_be_scheduled_to_what_no_group_starts_with(end):
    """torch.optim checks the constructor's arguments alone, and steps without momentum as if there were no nesterov."""
    params, expected = make_params((5, 40)), make_params((5, 40))
    start = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    a, b = fused_l2.SGD(params, **start), torch.optim.SGD(expected, **start, foreach=False)
    for step, change in enumerate([{}, {}, end, {}, {**start, "dampening": 0}, {}]):
        for optimizer, ps in ((a, params), (b, expected)):
            optimizer.param_groups[0].update(change)
            set_grads(ps, step)
            optimizer.step()
        assert_same_bits(params, expected, str(change))
        a.load_state_dict(a.state_dict())


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_schedule_that_ends_beside_zero_steps_as_torchs(name):
    """LinearLR to 0 ends at -2e-19 in some settings, by rounding; a real negative lr is refused."""
    ends = []
    for module in (fused_l2, torch.optim):
        p = torch.nn.Parameter(torch.ones(5))
        optimizer = getattr(module, name)([p], lr=0.001)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 0.0, 10)
        for _ in range(12):
            p.grad = torch.ones(5)
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] < 0
        ends.append(p)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=0)
    # What the schedule began with is not known everywhere: a warm-up from 0, a group added late, a dict that is loaded.
    optimizer = getattr(fused_l2, name)([p], lr=0.0)
    optimizer.param_groups[0]["lr"] = -2e-18
    optimizer.step()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(5))], "lr": -2e-18})
    later = getattr(fused_l2, name)([{"params": [p]}, {"params": [torch.nn.Parameter(torch.ones(5))]}], lr=1e-8)
    later.load_state_dict(optimizer.state_dict())
    later.step()
    with pytest.raises(ValueError, match="Invalid learning rate: -2e-18"):  # as torch's
        getattr(fused_l2, name)([p], lr=-2e-18)
    optimizer = getattr(fused_l2, name)([p], lr=0.001)
    optimizer.param_groups[0]["lr"] = -1e-9
    with pytest.raises(ValueError, match=r"Invalid learning rate of param group 0: -1e-09; expected a number >= 0"):
        optimizer.step()
