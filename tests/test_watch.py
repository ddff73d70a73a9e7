"""What changed between two looks, and has an attribute been replaced?"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from comparing import plan_of

import fused_l2
from fused_l2.engines import cpu, watch
from fused_l2.engines.slot_watch import SlotWatch, slot_offset

LOOKS = ["python", "native"]


def looking(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "python":
        monkeypatch.setattr(watch, "_plain_keys", lambda library: 0)
    elif cpu.library() is None:
        pytest.skip("needs the C++ library")


def stepped(shape: tuple[int, ...] = (4, 6)) -> tuple[Any, Any, Any]:
    """An optimizer that has made a step, its plan and its first parameter's entry. Adam, so that there are states."""
    params = [torch.nn.Parameter(torch.ones(shape)), torch.nn.Parameter(torch.ones(3))]
    optimizer = fused_l2.Adam(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    plan = plan_of(optimizer)
    return optimizer, plan, plan._entries[0]


def changes(plan: Any) -> list[int]:
    params = list(plan._groups.params)
    found: list[int] | None = plan._look.changes(params, [p.grad for p in params])
    assert found is not None
    return found


def of_data(change: Any) -> Any:
    return lambda t: setattr(t, "data", change(t.data))


CHANGES = {
    "other memory": of_data(torch.clone),
    "transposed": of_data(torch.t),
    "another shape": of_data(lambda t: t.view(3, 8)),
    "another dtype": of_data(lambda t: t.to(torch.bfloat16)),
    "freed": lambda t: t.untyped_storage().resize_(0),
    "resized": lambda t: t.resize_(2, 2),
}


@pytest.mark.sweep(5)
@pytest.mark.parametrize("kind", LOOKS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["param", "exp_avg", "exp_avg_sq"])
def test_every_change_of_a_parameter_or_state_is_seen(kind: str, change: str, which: str, monkeypatch: Any) -> None:
    looking(kind, monkeypatch)
    optimizer, plan, entry = stepped()
    assert changes(plan) == []
    tensor = entry.param if which == "param" else optimizer.state[entry.param][which]
    CHANGES[change](tensor.detach() if change in ("freed", "resized") and which == "param" else tensor)
    if change == "resized" and which == "param":
        return  # a detached tensor's shape is its own; Parameters refuse it
    moved = watch.MOVED if which == "param" else watch.STATE_MOVED
    assert changes(plan) == [0, moved if (kind, change) == ("native", "other memory") else watch.OTHER]


@pytest.mark.parametrize("kind", LOOKS)
def test_a_step_counter_in_other_memory_is_seen(kind: str, monkeypatch: Any) -> None:
    looking(kind, monkeypatch)
    optimizer, plan, entry = stepped()
    optimizer.state[entry.param]["step"].data = torch.tensor(1.0)
    assert changes(plan) == [0, watch.STATE_MOVED if kind == "native" else watch.OTHER]


class Subclass(torch.Tensor):
    pass


def shrunk(grad: torch.Tensor) -> torch.Tensor:
    grad.untyped_storage().resize_(8)
    return grad


GRADIENTS = {
    "none": (lambda g: None, watch.GONE),
    "fresh": (torch.clone, 0),
    "transposed": (lambda g: torch.ones(6, 4).t(), watch.OTHER),
    "expanded": (lambda g: torch.ones(1, 6).expand(4, 6), watch.OTHER),
    "negated": (torch._neg_view, watch.OTHER),
    "zero tensor": (lambda g: torch._efficientzerotensor(4, 6), watch.OTHER),
    "functional": (torch._to_functional_tensor, watch.OTHER),
    "a subclass": (lambda g: g.as_subclass(Subclass), watch.OTHER),
    "sparse": (torch.Tensor.to_sparse, watch.OTHER),
    "storage made smaller": (shrunk, watch.OTHER),
}


@pytest.mark.parametrize("kind", LOOKS)
@pytest.mark.parametrize("grad", GRADIENTS)
def test_every_kind_of_gradient_is_told_from_the_one_before(kind: str, grad: str, monkeypatch: Any) -> None:
    looking(kind, monkeypatch)
    _, plan, entry = stepped()
    make, expected = GRADIENTS[grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entry.param.grad = make(entry.param.grad)
    assert changes(plan) == ([0, expected] if expected else [])


@pytest.mark.parametrize("kind", LOOKS)
def test_gradients_that_come_back_are_told_from_new_ones(kind: str, monkeypatch: Any) -> None:
    looking(kind, monkeypatch)
    optimizer, plan, entry = stepped()
    kept, entry.param.grad = entry.param.grad, None
    assert changes(plan) == [0, watch.GONE]
    optimizer.step()
    assert changes(plan) == []
    entry.param.grad = kept.clone()
    assert changes(plan) == [0, watch.CAME]
    entry.param.data = entry.param.data.clone()
    assert changes(plan) == [0, (watch.CAME | watch.MOVED) if kind == "native" else watch.OTHER]


class Owner:
    __slots__ = ("before", "shard")

    def __init__(self, shard: Any) -> None:
        self.shard = shard


@pytest.mark.parametrize("library", [None, cpu.library()], ids=["python", "native"])
def test_a_replaced_attribute_is_seen(library: Any) -> None:
    owners = [Owner(torch.zeros(1)) for _ in range(5)]
    watch = SlotWatch(library, owners, "shard")
    assert watch.holds()
    kept = owners[3].shard
    owners[3].shard = torch.zeros(1)  # an equal one
    assert not watch.holds()
    owners[3].shard = kept
    assert watch.holds()


def test_the_library_knows_where_slots_are() -> None:
    dtensor = pytest.importorskip("torch.distributed.tensor").DTensor
    for of, slot in ((dtensor, "_local_tensor"), (dtensor, "_spec"), (Owner, "shard"), (Owner, "before")):
        assert slot_offset(of, slot) is not None, f"{of}: the fast way of SlotWatch is never taken"
    assert slot_offset(Owner, "shard") != slot_offset(Owner, "before")


def test_attributes_that_are_no_slots_are_watched_in_python() -> None:
    class Plain:
        shard: Any = None

    assert slot_offset(Plain, "shard") is None
    owners = [Plain()]
    watch = SlotWatch(cpu.library(), owners, "shard")
    assert watch.holds()
    owners[0].shard = 1
    assert not watch.holds()
