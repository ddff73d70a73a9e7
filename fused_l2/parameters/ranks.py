"""Processes that decide together: which of them hold the other parts of what an optimizer steps."""

from __future__ import annotations

import sys
from typing import Any

import torch


def is_process_group(value: Any) -> bool:
    """Whether something names processes: a ProcessGroup or a DeviceMesh."""
    meshes = sys.modules.get("torch.distributed.device_mesh")  # nobody has one without having imported it
    kinds = [getattr(torch.distributed, "ProcessGroup", None), getattr(meshes, "DeviceMesh", None)]
    return isinstance(value, tuple(filter(None, kinds)))


def is_non_member(value: Any) -> bool:
    """Whether something is what ``torch.distributed.new_group`` returns to processes that are not in the group."""
    member = getattr(torch.distributed, "GroupMember", None)
    return member is not None and isinstance(value, int) and value == member.NON_GROUP_MEMBER
