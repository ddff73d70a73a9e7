"""torch.compile'd models, and averages of weights: SWA and EMA of torch.optim.swa_utils."""

from __future__ import annotations

from typing import Any

import torch
from integrations.training import OPTIONS, batches, check, each, groups_of, make_model
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn


@each
def test_a_compiled_model(name: str, exact_sqrt: None) -> None:
    def train(cls: Any) -> list[Tensor]:
        model = make_model()
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = cls(groups_of(model, name), **OPTIONS[name])
        for x, y in batches(6):
            optimizer.zero_grad()
            nn.functional.mse_loss(compiled(x), y).backward()
            optimizer.step()
        return list(model.parameters())

    check(train, name)


@each
def test_averaged_weights(name: str, exact_sqrt: None) -> None:
    def train(cls: Any) -> list[Tensor]:
        model = make_model()
        model.insert(1, nn.BatchNorm1d(16))
        optimizer = cls(groups_of(model, name), **OPTIONS[name])
        swa, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        schedule = SWALR(optimizer, swa_lr=[0.02, 0.01], anneal_epochs=3)
        for step, (x, y) in enumerate(batches(10)):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            ema.update_parameters(model)
            if step >= 4:
                swa.update_parameters(model)
                schedule.step()
        update_bn([x for x, _ in batches(10)], swa)
        return [*swa.module.state_dict().values(), *ema.module.parameters(), *model.parameters()]

    check(train, name)
