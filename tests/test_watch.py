"""Has a tensor, or an attribute, been replaced since the plan was made?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_l2.engines import cpu
from fused_l2.engines.watch import SlotWatch, slot_offset


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
