"""Steps in the backward pass where several ranks share what is stepped."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import DEVICE, OPTIMIZERS, full, mesh_of, refused, same, scenario
from parallel_training import IN, loss_of, make_model, make_optimizer, sharded
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fused_l2


def backward(model: nn.Module, step: int) -> None:
    loss_of(model, step, dist.get_rank()).backward()


def parameters_and_states(model: nn.Module, optimizer: Any) -> list[Tensor]:
    found = [p.detach() for p in model.parameters()]
    return found + [v for p in model.parameters() for v in optimizer.state[p].values()]


def on_all_ranks_alike(model: nn.Module) -> None:
    own = torch.cat([p.detach().flatten() for p in model.parameters()])
    everywhere = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, own)
    assert all(other.equal(own) for other in everywhere)


def unchanged_by(call: Callable[[], Any], model: nn.Module, *words: str, error: type[Exception] = ValueError) -> None:
    """The call raises these words, and no parameter has changed."""
    before = [p.detach().clone() for p in model.parameters()]
    refused(call, *words, error=error)
    same([p.detach() for p in model.parameters()], before)


@scenario
def step_in_backward_of_ddp(world: int, folder: Path) -> None:
    for name in OPTIMIZERS:
        for options in ({}, {"gradient_as_bucket_view": True}, {"bucket_cap_mb": 1e-5}):
            model, twin = (DistributedDataParallel(make_model(), **options) for _ in range(2))
            optimizer, other = make_optimizer(name, model), make_optimizer(name, twin)
            schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.9**t) for o in (optimizer, other)]
            fused_l2.step_in_backward(optimizer, ddp=model)
            for step in range(5):
                backward(model, step)
                assert all(p.grad is None for p in model.parameters())
                backward(twin, step)
                for o, schedule in zip((optimizer, other), schedules, strict=True):
                    o.step()
                    schedule.step()
                other.zero_grad()
            on_all_ranks_alike(model)
            # 1 / world is exact, and DDP adds up the same buckets in the same order.
            same(parameters_and_states(model, optimizer), parameters_and_states(twin, other))


@scenario
def step_in_backward_of_ddp_after_no_sync_and_remove(world: int, folder: Path) -> None:
    model, twin = DistributedDataParallel(make_model()), DistributedDataParallel(make_model())
    optimizer, other = make_optimizer("AdamW", model), make_optimizer("AdamW", twin)
    handle = fused_l2.step_in_backward(optimizer, ddp=model)

    def accumulated(ddp: DistributedDataParallel, step: int) -> None:
        with ddp.no_sync():
            backward(ddp, 2 * step)
        backward(ddp, 2 * step + 1)

    def compared() -> None:
        optimizer.step()
        other.step()
        optimizer.zero_grad()
        other.zero_grad()
        same(parameters_and_states(model, optimizer), parameters_and_states(twin, other))

    for step in range(3):  # gradients of both passes, averaged by the second
        accumulated(model, step)
        accumulated(twin, step)
        compared()
    with model.no_sync():
        backward(model, 6)
    unchanged_by(optimizer.step, model, "has not averaged", "no_sync()", error=RuntimeError)
    optimizer.zero_grad()
    backward(model, 7)
    unchanged_by(lambda: backward(model, 8), model, "a second gradient before optimizer.step()", error=RuntimeError)
    unchanged_by(optimizer.step, model, "has not averaged", error=RuntimeError)
    optimizer.zero_grad()
    backward(twin, 7)
    compared()
    handle.remove()
    # DDP has not ended that pass, and each model has the order of its last one in its buckets: begin anew.
    model, twin = DistributedDataParallel(model.module), DistributedDataParallel(twin.module)
    for again in (False, True):
        handle = fused_l2.step_in_backward(optimizer, ddp=model)
        backward(model, 9 + again)
        backward(twin, 9 + again)
        assert all(p.grad is None for p in model.parameters())
        compared()
        handle.remove()
        backward(model, 11 + again)
        backward(twin, 11 + again)
        assert all(p.grad is not None for p in model.parameters())
        compared()


@scenario
def two_optimizers_step_in_the_backward_of_one_ddp_model(world: int, folder: Path) -> None:
    model, twin = DistributedDataParallel(make_model()), DistributedDataParallel(make_model())
    pairs = []
    for ddp in (model, twin):
        whole, rest = ([p for p in ddp.parameters() if (p.dim() > 1) is wanted] for wanted in (True, False))
        pairs.append([fused_l2.SGD(whole, lr=0.1, momentum=0.9), fused_l2.AdamW(rest, lr=0.01)])
    for optimizer in pairs[0]:
        fused_l2.step_in_backward(optimizer, ddp=model)
    for step in range(3):
        for ddp, optimizers in zip((model, twin), pairs, strict=True):
            backward(ddp, step)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    same([p.detach() for p in model.parameters()], [p.detach() for p in twin.parameters()])
    # One that nobody uses any more steps nothing, and takes no gradient.
    del optimizer, optimizers
    pairs[0].pop()
    gc.collect()
    backward(model, 3)
    assert [p.grad is None for p in model.parameters()] == [p.dim() > 1 for p in model.parameters()]


@scenario
def step_in_backward_refuses_gradients_that_nobody_has_averaged(world: int, folder: Path) -> None:
    model = DistributedDataParallel(make_model())
    optimizer = fused_l2.SGD(model.parameters(), lr=0.1)
    refused(lambda: fused_l2.step_in_backward(optimizer), "(9, 6)", f"{world} ranks", "ddp=model", error=ValueError)
    assert not optimizer._stepper.singles  # nothing is left behind
    alone, twin = make_model(), make_model()
    local = fused_l2.SGD(alone.parameters(), lr=0.1)
    fused_l2.step_in_backward(local, gradients_are_final=True)
    backward(alone, 0)
    backward(twin, 0)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    same([p.detach() for p in alone.parameters()], [p.detach() for p in twin.parameters()])
    # A parameter that DDP leaves alone.
    partly = make_model()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(partly, ["0.weight"])
    partly = DistributedDataParallel(partly)
    optimizer = fused_l2.SGD(partly.parameters(), lr=0.1)
    refused(lambda: fused_l2.step_in_backward(optimizer, ddp=partly), "parameter 0 of group 0", error=ValueError)
    # FSDP1, in both of its forms, whatever is said.
    for use_orig_params in (False, True):
        flat = FullyShardedDataParallel(make_model(), use_orig_params=use_orig_params, device_id=torch.device(DEVICE))
        optimizer = fused_l2.SGD(flat.parameters(), lr=0.1)
        for final in (False, True):
            call = lambda o=optimizer, f=final: fused_l2.step_in_backward(o, gradients_are_final=f)  # noqa: E731
            refused(call, "FSDP1", "fully_shard", error=ValueError)


@scenario
def step_in_backward_refuses_ddp_models_that_it_cannot_serve(world: int, folder: Path) -> None:
    for option in ("find_unused_parameters", "static_graph"):
        model = DistributedDataParallel(make_model(), **{option: True})
        optimizer = fused_l2.SGD(model.parameters(), lr=0.1)
        refused(lambda m=model, o=optimizer: fused_l2.step_in_backward(o, ddp=m), f"{option}=True", error=ValueError)
    model = DistributedDataParallel(make_model())
    model.register_comm_hook(None, allreduce_hook)
    optimizer = fused_l2.SGD(model.parameters(), lr=0.1)
    refused(lambda: fused_l2.step_in_backward(optimizer, ddp=model), "communication hook of its own", error=ValueError)
    refused(lambda: fused_l2.step_in_backward(optimizer, ddp=model.module), "DistributedDataParallel", error=TypeError)
    other = DistributedDataParallel(make_model())
    model.module.requires_grad_(False)
    frozen = fused_l2.SGD(model.parameters(), lr=0.1)
    refused(lambda: fused_l2.step_in_backward(frozen, ddp=other), "none of the parameters of ddp", error=ValueError)


@scenario
def step_in_backward_within_join(world: int, folder: Path) -> None:
    """A rank that has run out of input hands over zeros there."""
    model = DistributedDataParallel(make_model())
    optimizer = fused_l2.SGD(model.parameters(), lr=0.1)
    fused_l2.step_in_backward(optimizer, ddp=model)

    def joined() -> None:
        with model.join():
            backward(model, 0)

    unchanged_by(joined, model, "within join()", error=RuntimeError)


@scenario
def step_in_backward_of_tensor_parallel_models(world: int, folder: Path) -> None:
    """A gradient that comes from autograd is that of its mesh: right if the mesh has all ranks."""

    def parameter(mesh: Any) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(torch.ones(8, IN), mesh, [Shard(0)]))

    param, twin = parameter(mesh_of(world)), parameter(mesh_of(world))
    optimizer, other = fused_l2.AdamW([param], lr=0.1), fused_l2.AdamW([twin], lr=0.1)
    fused_l2.step_in_backward(optimizer)
    for step in range(3):
        for p, o in ((param, optimizer), (twin, other)):
            (p.to_local() * (step + dist.get_rank())).square().sum().backward()
            assert (p.grad is None) is (p is param)
            o.step()
            o.zero_grad()
    same([param], [twin])
    if world == 2:
        return
    half = init_device_mesh(DEVICE, (world // 2, 2), mesh_dim_names=("data", "tensor"))["tensor"]
    holder = nn.Module()
    holder.weight = parameter(half)
    optimizer = fused_l2.AdamW(holder.parameters(), lr=0.1)
    fused_l2.step_in_backward(optimizer)
    unchanged_by(lambda: holder.weight.to_local().sum().backward(), holder, "a mesh of 2 of 4 ranks", "gradients_are_final")
    holder.weight = parameter(half)
    optimizer = fused_l2.AdamW(holder.parameters(), lr=0.1)
    fused_l2.step_in_backward(optimizer, gradients_are_final=True)
    holder.weight.to_local().sum().backward()
    assert float(full(holder.weight)[0, 0]) != 1


class Shared(nn.Module):
    """One layer, used twice, within checkpoints."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.use_reentrant = nn.Linear(IN, IN), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=self.use_reentrant)
        return x


@scenario
def step_in_backward_of_tied_weights_within_fsdp2(world: int, folder: Path) -> None:
    model, twin = (fully_shard(Shared(False), mesh=mesh_of(world)) for _ in range(2))
    optimizers = [fused_l2.AdamW(m.parameters(), lr=0.1) for m in (model, twin)]
    fused_l2.step_in_backward(optimizers[0])
    for step in range(3):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            backward(m, step)
            optimizer.step()
            optimizer.zero_grad()
    same(parameters_and_states(model, optimizers[0]), parameters_and_states(twin, optimizers[1]))


@scenario
def torchs_own_optimizers_in_backward(world: int, folder: Path) -> None:
    """torch makes one optimizer of a parameter, which may be ours; FSDP1 steps it when it has reduced a gradient."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    models = []
    for in_backward in (True, False):
        whole = make_model()
        model = FullyShardedDataParallel(whole, use_orig_params=True, device_id=torch.device(DEVICE))
        if in_backward:
            _apply_optimizer_in_backward(fused_l2.AdamW, model.parameters(), {"lr": 0.1})
        else:
            optimizer = fused_l2.AdamW(model.parameters(), lr=0.1)
        for step in range(3):
            backward(model, step)
            if not in_backward:
                optimizer.step()
                optimizer.zero_grad()
        with FullyShardedDataParallel.summon_full_params(model):
            models.append([p.detach().clone() for p in model.parameters()])
    same(*models)


@scenario
def step_in_backward_of_fsdp2_in_two_halves(world: int, folder: Path) -> None:
    """Gradients that FSDP2 accumulates without reducing them, and copies of a model."""
    model, twin = sharded(make_model(), world), sharded(make_model(), world)
    optimizer, other = make_optimizer("AdamW", model), make_optimizer("AdamW", twin)
    fused_l2.step_in_backward(optimizer)
    for step in range(3):
        for m, o in ((model, optimizer), (twin, other)):
            for half in range(2):
                m.set_requires_gradient_sync(half == 1)
                backward(m, 2 * step + half)
            o.step()
            o.zero_grad()
    same(parameters_and_states(model, optimizer), parameters_and_states(twin, other))
    assert copy.deepcopy(optimizer).state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
