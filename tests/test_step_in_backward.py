"""step_in_backward: the same bits as ordinary steps, and no more gradients than one at a time."""

from __future__ import annotations

import pytest
import torch
from comparing import CASES, assert_same_bits, each

import fused_l2


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16), torch.nn.Linear(16, 1))


def groups_of(model: torch.nn.Module) -> list[dict]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": decayed}, {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0, "lr": 0.05}]


def train(name, model, optimizer, steps, scheduler=None):
    for step in range(steps):
        torch.manual_seed(step)
        x = torch.randn(4, 8, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


@each
@pytest.mark.parametrize("options", [{}, {"low_precision": "stochastic"}, {"low_precision": "remainder"}], ids=str)
def test_the_bits_of_ordinary_steps_with_a_scheduler(name, options):
    dtype = torch.bfloat16 if options else torch.float32
    results = []
    for in_backward in (False, True):
        model = make_model().to(dtype)
        optimizer = getattr(fused_l2, name)(groups_of(model), **CASES[name], **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t)
        if in_backward:
            fused_l2.step_in_backward(optimizer)
        train(name, model, optimizer, 5, scheduler)
        results.append((model, optimizer))
    (plain, a), (fused, b) = results
    assert_same_bits(a.master_params(), b.master_params())
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        assert a.state[p].keys() == b.state[q].keys()
    assert str(a.state_dict()["param_groups"]) == str(b.state_dict()["param_groups"])


def test_gradients_are_freed_as_they_are_used():
    model = make_model()
    optimizer = fused_l2.AdamW(model.parameters())
    handle = fused_l2.step_in_backward(optimizer)
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(p.grad is not None for p in model.parameters())))
    train("AdamW", model, optimizer, 2)
    assert max(alive) == 0  # the hook above runs after ours
    assert all(p.grad is None for p in model.parameters())
    handle.remove()
    model(torch.randn(4, 8)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_checkpoint_goes_on_in_either_way():
    model, twin = make_model(), make_model()
    optimizer, plain = fused_l2.AdamW(model.parameters(), lr=0.01), fused_l2.AdamW(twin.parameters(), lr=0.01)
    fused_l2.step_in_backward(optimizer)
    train("AdamW", model, optimizer, 3)
    train("AdamW", twin, plain, 3)
    optimizer.load_state_dict(plain.state_dict())
    train("AdamW", model, optimizer, 2)
    train("AdamW", twin, plain, 2)
    assert_same_bits([p.detach() for p in model.parameters()], [p.detach() for p in twin.parameters()])


def test_frozen_and_later_parameters_are_stepped_by_step():
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = fused_l2.SGD(model.parameters(), lr=0.1)
    fused_l2.step_in_backward(optimizer)
    model[0].requires_grad_(True)
    before = model[0].weight.detach().clone()
    train("SGD", model, optimizer, 1)
    assert not torch.equal(model[0].weight.detach(), before)


def test_what_cannot_work_is_refused_with_the_reason():
    model = make_model()
    for options, reason in (
        ({"max_grad_norm": 1.0}, "max_grad_norm: the norm of all gradients"),
        ({"amp_scaling": True}, "amp_scaling: a GradScaler looks at all gradients"),
        ({"statistics": True}, "statistics: they are of all gradients"),
    ):
        with pytest.raises(ValueError, match=reason):
            fused_l2.step_in_backward(fused_l2.AdamW(model.parameters(), **options))
    with pytest.raises(TypeError, match="takes an optimizer of fused_l2, got AdamW"):
        fused_l2.step_in_backward(torch.optim.AdamW(model.parameters()))
    optimizer = fused_l2.AdamW(model.parameters())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t)  # wraps optimizer.step
    fused_l2.step_in_backward(optimizer)
    model(torch.randn(4, 8)).mean().backward()
    with pytest.raises(RuntimeError, match=r"second gradient before optimizer.step"):
        model(torch.randn(4, 8)).mean().backward()
