"""Models trained by several processes: FSDP2, DDP, ZeroRedundancyOptimizer, and their checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import DEVICE, OPTIMIZERS, full, is_alive, mesh_of, same, scenario
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fused_l2

IN, HIDDEN, OUT = 6, 9, 3  # no number of ranks divides them


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(IN, HIDDEN), nn.LayerNorm(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, OUT)
    )


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(5, IN, generator=torch.Generator(DEVICE).manual_seed(100 * step + rank))


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    return model(batch(step, rank)).square().mean()


def sharded(model: nn.Sequential, world: int, **options: Any) -> nn.Module:
    mesh = mesh_of(world)
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def make_optimizer(name: str, model: nn.Module, module: Any = fused_l2, **options: Any) -> Any:
    options = {**OPTIMIZERS[name], **options}
    decay = options.pop("weight_decay")
    whole = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": whole, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0, "lr": 3 * options["lr"]}]
    return getattr(module, name)(groups, **options)


def train(model: nn.Module, optimizer: Any, steps: range, after_backward: Callable[[], None] = lambda: None) -> None:
    for step in steps:
        is_alive()
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        after_backward()
        optimizer.step()


def as_one_process(world: int, model: nn.Module, optimizer: Any, steps: range) -> None:
    """The same training in one process: gradients of every rank's batch, added in the order of ranks, and divided."""
    for step in steps:
        sums: list[Tensor] = []
        for rank in range(world):
            optimizer.zero_grad()
            loss_of(model, step, rank).backward()
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else grads
        for p, g in zip(model.parameters(), sums, strict=True):
            p.grad = g / world
        optimizer.step()


@scenario
def fsdp2_trains_as_one_process(world: int, folder: Path) -> None:
    for name in OPTIMIZERS:
        for clipped in ({}, {"max_grad_norm": 0.1}):
            model, single = sharded(make_model(), world), make_model()
            optimizer, expected = make_optimizer(name, model, **clipped), make_optimizer(name, single, **clipped)
            assert all(isinstance(p, DTensor) for p in model.parameters())
            if world == 2 and not clipped:
                # Two summands have one order.
                train(model, optimizer, range(6))
                as_one_process(world, single, expected, range(6))
                same(list(model.parameters()), list(single.parameters()))
                continue
            # More have several: both are given the same gradients.
            for step in range(6):
                optimizer.zero_grad()
                loss_of(model, step, dist.get_rank()).backward()
                for p, q in zip(model.parameters(), single.parameters(), strict=True):
                    q.grad = full(p.grad).clone()
                optimizer.step()
                expected.step()
                if not clipped:
                    same(list(model.parameters()), list(single.parameters()))
            for p, q in zip(model.parameters(), single.parameters(), strict=True):
                # The factors differ by 4 roundings at most, so that updates do. SGD's are bounded by lr * |gradient| / (1 -
                # momentum), clipped to 0.1; Adam's by lr, of which relative errors of the moments leave some more.
                assert float((full(p) - q).abs().max()) <= 6 * 64 * 2**-24


@scenario
def fsdp2_in_mixed_precision(world: int, folder: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, twin = sharded(make_model(), world, mp_policy=policy), sharded(make_model(), world, mp_policy=policy)
    groups, whole = (fused_l2.weight_decay.param_groups(m, weight_decay=0.1) for m in (model, make_model()))
    assert [g["param_names"] for g in groups] == [g["param_names"] for g in whole]  # by the shape of the whole tensor
    optimizer, other = make_optimizer("AdamW", model), make_optimizer("AdamW", twin, torch.optim)
    train(model, optimizer, range(4))
    train(twin, other, range(4))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # torch.sqrt may be an ulp off, which moves an update by one: 4 steps of lr at most, relative 2^-22.
        assert float((full(p) - full(q)).abs().max()) <= 4 * 2**-22 * (0.03 + float(full(q).abs().max()))


@scenario
def fsdp2_moved_after_the_first_step(world: int, folder: Path) -> None:
    # T26: `.to()` and the like replace the local tensors of a parameter that stays the same object
    model, twin = sharded(make_model(), world), sharded(make_model(), world)
    optimizers = [make_optimizer("AdamW", m) for m in (model, twin)]
    for step in range(4):
        if step == 2:
            model.to(torch.float64).to(torch.float32)
        for m, o in zip((model, twin), optimizers, strict=True):
            train(m, o, range(step, step + 1))
    same(list(model.parameters()), list(twin.parameters()))


@scenario
def step_in_backward_of_fsdp2(world: int, folder: Path) -> None:
    model, twin = sharded(make_model(), world), sharded(make_model(), world)
    optimizer, other = make_optimizer("AdamW", model), make_optimizer("AdamW", twin)
    fused_l2.step_in_backward(optimizer)

    def gradients_are_gone() -> None:
        assert all(p.grad is None for p in model.parameters())

    train(model, optimizer, range(4), gradients_are_gone)
    train(twin, other, range(4))
    same(list(model.parameters()), list(twin.parameters()))


@scenario
def data_parallel(world: int, folder: Path) -> None:
    for name in OPTIMIZERS:
        for options in ({}, {"gradient_as_bucket_view": True}):
            model, single = DistributedDataParallel(make_model(), **options), make_model()
            optimizer, expected = make_optimizer(name, model), make_optimizer(name, single)
            for step in range(4):
                optimizer.zero_grad()
                loss_of(model, step, dist.get_rank()).backward()
                for p, q in zip(model.parameters(), single.parameters(), strict=True):
                    q.grad = p.grad.clone()
                optimizer.step()
                expected.step()
            same(list(model.parameters()), list(single.parameters()))


@scenario
def zero_redundancy(world: int, folder: Path) -> None:
    for name in OPTIMIZERS:
        model, twin = DistributedDataParallel(make_model()), DistributedDataParallel(make_model())
        groups = make_optimizer(name, model).param_groups
        wanted = [{k: v for k, v in g.items() if k in ("params", "lr", "weight_decay")} for g in groups]
        optimizer = ZeroRedundancyOptimizer(wanted, getattr(fused_l2, name), **OPTIMIZERS[name])
        expected = make_optimizer(name, twin)
        train(model, optimizer, range(3))
        for group in (*optimizer.param_groups, *expected.param_groups):
            group["lr"] *= 0.5  # as a scheduler does
        train(model, optimizer, range(3, 6))
        for group in expected.param_groups:
            group["lr"] *= 2
        train(twin, expected, range(3))
        for group in expected.param_groups:
            group["lr"] *= 0.5
        train(twin, expected, range(3, 6))
        same(list(model.parameters()), list(twin.parameters()))
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            loaded = make_optimizer(name, model)
            loaded.load_state_dict(optimizer.state_dict())
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                same([loaded.state[p][key] for key in expected.state[q]], list(expected.state[q].values()))


# Checkpoints.


def resharded(world: int, name: str, low_precision: str) -> tuple[nn.Module, Any]:
    model = make_model()
    options: dict[str, Any] = {"low_precision": low_precision}
    if low_precision == "8bit":  # of states, in layers that they fit; rows that no number of ranks divides
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 67), nn.Linear(96, 129))
        options = {"low_precision": "remainder8", "state_dtype": "8bit", **({} if name == "SGD" else {"amsgrad": False})}
    if low_precision != "round":
        model = model.bfloat16()
    cut = sharded(model, world) if world > 1 else model
    return cut, make_optimizer(name, cut, **options)


def given_steps(model: nn.Module, optimizer: Any, steps: range) -> None:
    """Steps with gradients that do not depend on how the model is cut up."""
    for step in steps:
        for i, p in enumerate(model.parameters()):
            g = torch.randn(p.shape, generator=torch.Generator(DEVICE).manual_seed(1000 * step + i)).to(p.dtype)
            if isinstance(p, DTensor):
                g = distribute_tensor(g, p.device_mesh, p.placements)
            p.grad = g
        optimizer.step()


CHECKPOINTS = [
    ("SGD", "round"), ("AdamW", "round"), ("AdamW", "remainder"), ("AdamW", "master"), ("AdamW", "stochastic"), ("SGD", "8bit"),
    ("AdamW", "8bit"),
]  # fmt: skip


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def resumed(world: int, folder: Path, name: str, mode: str) -> None:
    """Load the checkpoint of another number of ranks, go on, and compare with a run that was never interrupted."""
    model, optimizer = resharded(world, name, mode)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder / f"{name}-{mode}")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    given_steps(model, optimizer, range(3, 6))
    reference, uninterrupted = resharded(1, name, mode)
    given_steps(reference, uninterrupted, range(6))
    same(list(model.parameters()), list(reference.parameters()))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        for key, value in uninterrupted.state[q].items():
            same([optimizer.state[p][key]], [value])


@scenario
def checkpoints_on_other_numbers_of_ranks(world: int, folder: Path) -> None:
    for name, mode in CHECKPOINTS:
        if world == 2:
            model, optimizer = resharded(world, name, mode)
            given_steps(model, optimizer, range(3))
            dcp.save(state_of(model, optimizer), checkpoint_id=folder / f"{name}-{mode}")
        resumed(world, folder, name, mode)


@scenario
def full_state_dicts(world: int, folder: Path) -> None:
    for name, mode in CHECKPOINTS:
        model, optimizer = resharded(world, name, mode)
        given_steps(model, optimizer, range(3))
        options = StateDictOptions(full_state_dict=True)
        weights, states = (
            get_model_state_dict(model, options=options),
            get_optimizer_state_dict(model, optimizer, options=options),
        )
        other, loaded = resharded(world, name, mode)
        set_model_state_dict(other, weights, options=options)
        set_optimizer_state_dict(other, loaded, states, options=options)
        for m, o in ((model, optimizer), (other, loaded)):
            given_steps(m, o, range(3, 6))
        same(list(model.parameters()), list(other.parameters()))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            same([optimizer.state[p][key] for key in loaded.state[q]], list(loaded.state[q].values()))


@scenario
def torch_optim_goes_on_with_our_state(world: int, folder: Path) -> None:
    model, optimizer = resharded(world, "AdamW", "round")
    given_steps(model, optimizer, range(3))
    other = sharded(make_model(), world)
    theirs = make_optimizer("AdamW", other, torch.optim)
    set_model_state_dict(other, get_model_state_dict(model))
    states = copy.deepcopy(get_optimizer_state_dict(model, optimizer))  # torch.optim would share them
    set_optimizer_state_dict(other, theirs, states)
    for m, o in ((model, optimizer), (other, theirs)):
        given_steps(m, o, range(3, 4))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert float((full(p) - full(q)).abs().max()) <= 2**-22 * (0.03 + float(full(q).abs().max()))
