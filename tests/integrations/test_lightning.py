"""Lightning: automatic and manual optimization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

lightning = pytest.importorskip("lightning", reason="pip install '.[lightning]'")
from comparing import assert_same_bits
from integrations.training import OPTIONS, batches, check, each, groups_of, make_model
from torch import Tensor, nn

import fused_l2

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint"),
]


class Module(lightning.LightningModule):
    def __init__(self, cls: Any, name: str, manual: bool = False) -> None:
        super().__init__()
        self.model, self.cls, self.name = make_model(), cls, name
        self.automatic_optimization = not manual

    def configure_optimizers(self) -> Any:
        optimizer = self.cls(groups_of(self.model, self.name), **OPTIONS[self.name])
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5)
            optimizer.step()
        return loss


def trainer(folder: Path, epochs: int, manual: bool = False) -> Any:
    clipping = {} if manual else {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    return lightning.Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **clipping,
    )  # fmt: skip


def data() -> Any:
    return torch.utils.data.DataLoader(batches(6), batch_size=None)


@each
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_optimization(name: str, manual: bool, tmp_path: Path, exact_sqrt: None) -> None:
    def train(cls: Any) -> list[Tensor]:
        module = Module(cls, name, manual)
        trainer(tmp_path, 2, manual).fit(module, data())
        return list(module.parameters())

    check(train, name)


@each
def test_resumed(name: str, tmp_path: Path) -> None:
    cls = getattr(fused_l2, name)
    whole, first, again = (Module(cls, name) for _ in range(3))
    trainer(tmp_path, 4).fit(whole, data())
    interrupted = trainer(tmp_path, 2)
    interrupted.fit(first, data())
    interrupted.save_checkpoint(tmp_path / "two.ckpt")
    trainer(tmp_path, 4).fit(again, data(), ckpt_path=tmp_path / "two.ckpt")
    assert_same_bits(list(again.parameters()), list(whole.parameters()))


@each
def test_fabrics_wrapper_shows_the_options_and_results_of_the_optimizer(name: str) -> None:
    """Fabric's optimizer is an object of its own with a copy of ours' __dict__."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    module = nn.Linear(4, 4)
    options = {"max_grad_norm": 1.0, "skip_if_nonfinite": True, "statistics": True}
    model, wrapped = fabric.setup(module, getattr(fused_l2, name)(module.parameters(), lr=0.1, **options))
    fabric.backward(model(torch.ones(2, 4)).square().sum())
    wrapped.step()
    assert wrapped.grad_norm is not None
    assert torch.equal(wrapped.grad_norm, wrapped.optimizer.grad_norm)
    assert wrapped.statistics is not None
    wrapped.zero_grad()
    fabric.backward(model(torch.full((2, 4), torch.inf)).square().sum())
    wrapped.step()
    assert wrapped.step_was_skipped
    wrapped.zero_grad()
    wrapped.load_state_dict(wrapped.state_dict())
    wrapped.max_grad_norm = 0.5
    wrapped.skip_if_nonfinite = False
    assert wrapped.optimizer.max_grad_norm == 0.5
    fabric.backward(model(torch.ones(2, 4)).square().sum())
    before = module.weight.detach().clone()
    wrapped.step()
    assert not wrapped.step_was_skipped
    assert not torch.equal(module.weight, before)
