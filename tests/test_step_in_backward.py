"""step_in_backward: the same bits as ordinary steps, and no more gradients than one at a time."""

from __future__ import annotations

import pytest
import torch
from comparing import CASES, assert_same_bits, assert_unchanged, each, snapshot
from torch.utils.checkpoint import checkpoint

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
    with pytest.raises(TypeError, match=r"takes an optimizer of fused_l2, got torch\.optim\.adamw\.AdamW"):
        fused_l2.step_in_backward(torch.optim.AdamW(model.parameters()))
    optimizer = fused_l2.AdamW(model.parameters())
    fused_l2.step_in_backward(optimizer)
    with pytest.raises(ValueError, match="steps in the backward pass already"):
        fused_l2.step_in_backward(optimizer)


def test_a_second_gradient_before_a_step_is_refused():
    model = make_model()
    optimizer = fused_l2.AdamW([*model.named_parameters()])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t)  # wraps optimizer.step
    fused_l2.step_in_backward(optimizer)
    model(torch.randn(4, 8)).mean().backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"'3.*second gradient before optimizer.step.*several backward passes"):
        model(torch.randn(4, 8)).mean().backward()
    assert_unchanged(before, optimizer)


# Gradients that come in parts.


class Tied(torch.nn.Module):
    """One layer, used at two places, each within a checkpoint or not."""

    def __init__(self, *use_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.tied, self.use_reentrant = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, bias=False), use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for use_reentrant in self.use_reentrant:
            x = self.tied(x) if use_reentrant is None else checkpoint(self.tied, x, use_reentrant=use_reentrant)
        return x


@pytest.mark.parametrize("places", [(True, True), (True, None), (None, True), (True,)], ids=str)
def test_reentrant_checkpoints_are_refused_before_anything_is_stepped(places):
    model = Tied(*places)
    optimizer = fused_l2.AdamW(model.parameters(), lr=0.1)
    before = snapshot(optimizer)
    fused_l2.step_in_backward(optimizer)
    with pytest.raises(ValueError, match=r"reentrant checkpoints.*tied weights.*use_reentrant=False.*gradients_are_final=True"):
        model(torch.ones(4, 8)).square().mean().backward()
    assert_unchanged(before, optimizer)


def test_a_second_part_of_a_gradient_is_refused_where_somebody_said_that_there_is_none():
    model = Tied(True, True)
    optimizer = fused_l2.AdamW(model.parameters(), lr=0.1)
    fused_l2.step_in_backward(optimizer, gradients_are_final=True)
    with pytest.raises(RuntimeError, match=r"a second gradient.*tied weights.*use_reentrant=False"):
        model(torch.ones(4, 8)).square().mean().backward()


def test_weights_tied_by_other_checkpoints_are_stepped_with_the_whole_gradient():
    results = []
    for in_backward in (False, True):
        model = Tied(False, None, False)
        optimizer = fused_l2.AdamW(model.parameters(), lr=0.1)
        if in_backward:
            fused_l2.step_in_backward(optimizer)
        train("AdamW", model, optimizer, 3)
        results.append([p.detach() for p in model.parameters()])
    assert_same_bits(*results)


def test_reentrant_checkpoints_of_weights_used_at_one_place_are_stepped():
    results = []
    for in_backward in (False, True):
        model = Tied(True)
        optimizer = fused_l2.AdamW(model.parameters(), lr=0.1)
        if in_backward:
            fused_l2.step_in_backward(optimizer, gradients_are_final=True)
        train("AdamW", model, optimizer, 3)
        results.append([p.detach() for p in model.parameters()])
    assert_same_bits(*results)


# GradScaler.


def test_a_scaler_in_use_is_refused_before_anything_is_stepped():
    for unscales in (False, True):
        model, scaler = make_model(), torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = fused_l2.SGD(model.parameters(), lr=0.1, momentum=0.9)
        fused_l2.step_in_backward(optimizer)
        before = snapshot(optimizer)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"GradScaler is in use, with scale 1024.*gradients_are_final=True"):
                scaler.scale(model(torch.ones(4, 8)).mean()).backward()
        assert_unchanged(before, optimizer)
        optimizer.zero_grad()
        # What can be seen without the first backward pass.
        if unscales:
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="a GradScaler steps an optimizer that steps in the backward pass"):
            scaler.step(optimizer)
        optimizer.step()  # nothing of the scaler is left behind


def test_a_scaler_that_has_nothing_to_do_with_it_is_none():
    model, twin = make_model(), make_model()
    optimizer, other = (fused_l2.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    handle = fused_l2.step_in_backward(optimizer)
    scalers = [torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu")]  # never used
    scalers[0].scale(model(torch.ones(4, 8)).mean()).backward()
    scalers[0].step(optimizer)
    twin(torch.ones(4, 8)).mean().backward()
    other.step()
    handle.remove()
    # One of another model, and somebody who says so.
    scalers[1].scale(torch.ones(()))
    fused_l2.step_in_backward(optimizer, gradients_are_final=True)
    other.zero_grad()
    for m, o in ((model, optimizer), (twin, other)):
        m(torch.ones(4, 8)).mean().backward()
        o.step()
    assert_same_bits([p.detach() for p in model.parameters()], [p.detach() for p in twin.parameters()])


def test_after_remove_a_scaler_steps_again():
    model, scaler = make_model(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = fused_l2.SGD(model.parameters(), lr=0.1)
    fused_l2.step_in_backward(optimizer).remove()
    assert not optimizer._step_supports_amp_scaling
    before = snapshot(optimizer)
    scaler.scale(model(torch.ones(4, 8)).mean()).backward()
    scaler.step(optimizer)
    assert not before["params"][0].equal(model[0].weight)


# What else changes a gradient.


def test_an_option_set_later_that_needs_all_gradients_is_refused_before_anything_is_stepped():
    for name, value in (("max_grad_norm", 1.0), ("amp_scaling", True), ("statistics", True)):
        model = make_model()
        optimizer = fused_l2.AdamW(model.parameters())
        fused_l2.step_in_backward(optimizer)
        setattr(optimizer, name, value)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=f"cannot be used with {name}"):
            model(torch.ones(4, 8)).mean().backward()
        assert_unchanged(before, optimizer)


def test_gradients_that_are_still_copied_from_a_gpu_are_waited_for(monkeypatch):
    model, calls = make_model(), []

    class Stream:
        def synchronize(self) -> None:
            calls.append(model[0].weight.detach().clone())

    optimizer = fused_l2.SGD(model.parameters(), lr=0.1)
    fused_l2.step_in_backward(optimizer)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    before = model[0].weight.detach().clone()
    model(torch.ones(4, 8)).mean().backward()
    assert len(calls) == len([*model.parameters()])
    assert all(seen.equal(before) for seen in calls[:-1])
