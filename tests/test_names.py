"""The names of the package, and the alias of torch.optim that README recommends."""

from __future__ import annotations

import pytest
import torch

import fused_l2


def test_the_module_stands_in_for_torch_optim():
    import fused_l2 as optim

    optimizer = optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=0.5)
    assert isinstance(optimizer, optim.Optimizer)
    schedule = optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optim.swa_utils is torch.optim.swa_utils


@pytest.mark.parametrize("name", ["RMSprop", "LBFGS", "SparseAdam"])
def test_other_optimizers_are_said_to_be_torch_s(name):
    with pytest.raises(AttributeError, match=rf"fused_l2 has SGD, Adam and AdamW. Use torch\.optim\.{name}"):
        getattr(fused_l2, name)


def test_a_name_of_nobody_is_an_ordinary_attribute_error():
    with pytest.raises(AttributeError, match="module 'fused_l2' has no attribute 'adamx'"):
        fused_l2.adamx  # noqa: B018


def test_dir_shows_what_is_public():
    assert dir(fused_l2) == sorted([*fused_l2.__all__, "doctor"])  # which is imported when it is asked for
    for module in (fused_l2, fused_l2.weight_decay, fused_l2.doctor):
        assert set(module.__all__) <= set(dir(module))
        assert all(hasattr(module, name) for name in dir(module))
    for module in (fused_l2.weight_decay, fused_l2.doctor):
        assert dir(module) == sorted(module.__all__)
