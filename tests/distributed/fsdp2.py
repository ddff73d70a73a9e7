"""FSDP2 as people run it: policies, meshes of two dimensions, frozen, ignored and expert parameters, every form of checkpoint.

Ordinary steps without clipping change each shard as one process changes the whole: compared by bits, with the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import DEVICE, OPTIMIZERS, full, mesh_of, refused, same, scenario
from parallel_training import IN, OUT, given_steps, loss_of, make_model, make_optimizer, sharded, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fused_l2


def compared_with_one_process(
    model: nn.Module,
    name: str = "AdamW",
    steps: int = 4,
    whole: nn.Module | None = None,
    make: Callable[[str, nn.Module], Any] = make_optimizer,
) -> tuple[Any, Any, nn.Module]:
    """Train a model on all ranks, and the whole model in each process by the gradients that come of it: the same bits."""
    whole = make_model() if whole is None else whole
    optimizer, expected = make(name, model), make(name, whole)
    pairs = list(zip(model.parameters(), whole.parameters(), strict=True))
    for step in range(steps):
        optimizer.zero_grad()
        expected.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        for p, q in pairs:
            q.grad = None if p.grad is None else full(p.grad).to(q.dtype).clone()
        optimizer.step()
        expected.step()
        same([p for p, _ in pairs], [q for _, q in pairs])
    for p, q in pairs:
        for key, value in expected.state.get(q, {}).items():
            same([optimizer.state[p][key]], [value])
    return optimizer, expected, whole


def steps_in_backward_alike(make: Callable[[], nn.Module]) -> None:
    """The bits of ordinary steps of the same model."""
    model, twin = make(), make()
    optimizer, other = make_optimizer("AdamW", model), make_optimizer("AdamW", twin)
    fused_l2.step_in_backward(optimizer)

    def gradients_are_gone() -> None:
        assert all(p.grad is None for p in model.parameters())

    train(model, optimizer, range(3), gradients_are_gone)
    train(twin, other, range(3))
    same(list(model.parameters()), list(twin.parameters()))


@scenario
def fsdp2_policies(world: int, folder: Path) -> None:
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    for options in (
        {"reshard_after_forward": False},
        {"reshard_after_forward": True},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"mp_policy": half},
        {"mp_policy": half, "offload_policy": CPUOffloadPolicy(pin_memory=False), "reshard_after_forward": True},
    ):
        for name in OPTIMIZERS:
            compared_with_one_process(sharded(make_model(), world, **options), name)
        steps_in_backward_alike(lambda o=options: sharded(make_model(), world, **o))


@scenario
def fsdp2_with_bfloat16_parameters(world: int, folder: Path) -> None:
    for mode in ("master", "remainder", "stochastic"):
        make = lambda name, m, mode=mode: make_optimizer(name, m, low_precision=mode)  # noqa: E731
        model, whole = sharded(make_model().bfloat16(), world), make_model().bfloat16()
        for m in (model, whole):
            m.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
        compared_with_one_process(model, whole=whole, make=make)


@scenario
def hybrid_sharding(world: int, folder: Path) -> None:
    grid = init_device_mesh(DEVICE, (world // 2, 2), mesh_dim_names=("replicate", "shard"))

    def make() -> nn.Module:
        model = make_model()
        for layer in model:
            if list(layer.parameters()):
                fully_shard(layer, mesh=grid)
        return fully_shard(model, mesh=grid)

    for name in OPTIMIZERS:
        compared_with_one_process(make(), name)
    steps_in_backward_alike(make)
    # A norm is over the shards; replicas count once.
    clipped = lambda name, m: make_optimizer(name, m, max_grad_norm=0.1)  # noqa: E731
    model, whole = make(), make_model()
    optimizer, expected = clipped("SGD", model), clipped("SGD", whole)
    loss_of(model, 0, dist.get_rank()).backward()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        q.grad = full(p.grad).clone()
    optimizer.step()
    expected.step()
    assert abs(float(optimizer.grad_norm) / float(expected.grad_norm) - 1) <= 4 * 2**-24


class Blocks(nn.Module):
    """What tensor parallelism wants: two matrices with something in between, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(IN), nn.Linear(IN, 10), nn.Linear(10, IN)
        self.head = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


@scenario
def tensor_parallel_and_sharded(world: int, folder: Path) -> None:
    grid = init_device_mesh(DEVICE, (world // 2, 2), mesh_dim_names=("data", "tensor"))

    def make() -> nn.Module:
        model = parallelize_module(Blocks(), grid["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        for layer in (model.norm, model.head):
            fully_shard(layer, mesh=grid["data"])
        return fully_shard(model, mesh=grid["data"])

    assert {p.device_mesh.ndim for p in make().parameters()} == {1, 2}
    for name in OPTIMIZERS:
        compared_with_one_process(make(), name, whole=Blocks())
    steps_in_backward_alike(make)


@scenario
def uneven_and_empty_shards(world: int, folder: Path) -> None:
    model = sharded(make_model(), world)
    sizes = [None] * world
    dist.all_gather_object(sizes, [p.to_local().shape[0] for p in model.parameters()])
    assert any(len(set(of_rank)) > 1 for of_rank in zip(*sizes, strict=True))
    assert world == 2 or any(0 in of_rank for of_rank in zip(*sizes, strict=True))
    for name in OPTIMIZERS:
        for mode in (
            {},
            {"cautious": True, "decoupled_weight_decay": True} if name == "SGD" else {"state_dtype": torch.bfloat16},
        ):
            make = lambda n, m, mode=mode: make_optimizer(n, m, **mode)  # noqa: E731
            compared_with_one_process(sharded(make_model(), world), name, make=make)


@scenario
def frozen_parameters(world: int, folder: Path) -> None:
    def make() -> nn.Sequential:
        model = make_model()
        model[0].requires_grad_(False)
        return model

    model = sharded(make(), world)
    optimizer, expected, whole = compared_with_one_process(model, whole=make())
    assert not {p for layer in (model[0], whole[0]) for p in layer.parameters()} & {*optimizer.state, *expected.state}
    # Thawed by both, with the optimizers that they have.
    for m in (model, whole):
        m[0].requires_grad_(True)
    compared_with_one_process(model, whole=whole, make=lambda _, m: optimizer if m is model else expected)
    steps_in_backward_alike(lambda: sharded(make(), world))


@scenario
def ignored_parameters(world: int, folder: Path) -> None:
    """Plain tensors beside DTensors, whose gradients somebody averages."""
    mesh = mesh_of(world)

    def make() -> nn.Module:
        model = make_model()
        ignored = set(model[4].parameters())
        for layer in model[:4]:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh, ignored_params=ignored)

    model, whole = make(), make_model()
    ignored = [p for p in model.parameters() if not isinstance(p, DTensor)]
    assert [tuple(p.shape) for p in ignored] == [(OUT, 9), (OUT,)]

    def average() -> None:
        for p in ignored:
            dist.all_reduce(p.grad)
            p.grad /= world

    optimizer, expected = make_optimizer("AdamW", model), make_optimizer("AdamW", whole)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        average()
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            q.grad = full(p.grad).clone()
        optimizer.step()
        expected.step()
        same(list(model.parameters()), list(whole.parameters()))
    # In the backward pass nobody has averaged them.
    refused(lambda: fused_l2.step_in_backward(optimizer), "is a plain tensor", f"{world} ranks", error=ValueError)
    # Unless a hook that comes first has: then they are final.
    twin = make()
    twin.load_state_dict(model.state_dict())
    ignored_twin = [p for p in twin.parameters() if not isinstance(p, DTensor)]

    def average_one(p: Tensor) -> None:
        dist.all_reduce(p.grad)
        p.grad /= world

    for p in ignored_twin:
        p.register_post_accumulate_grad_hook(average_one)
    optimizers = [make_optimizer("SGD", m) for m in (model, twin)]
    fused_l2.step_in_backward(optimizers[1], gradients_are_final=True)
    train(model, optimizers[0], range(3), average)
    train(twin, optimizers[1], range(3))
    same(list(model.parameters()), list(twin.parameters()))


class Experts(nn.Module):
    """A shared layer, and one matrix for each of four experts: sharded over other meshes than the layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.experts = nn.Linear(IN, IN), nn.Parameter(torch.randn(4, IN, IN))
        self.bias = nn.Parameter(torch.randn(4, IN))

    def cut(self, world: int) -> Experts:
        grid = init_device_mesh(DEVICE, (world // 2, 2), mesh_dim_names=("data", "expert"))
        fully_shard(self.shared, mesh=mesh_of(world))
        self.experts = nn.Parameter(distribute_tensor(self.experts.detach(), grid, [Replicate(), Shard(0)]))
        self.bias = nn.Parameter(distribute_tensor(self.bias.detach(), grid["expert"], [Shard(0)]))
        return self


@scenario
def experts_on_several_meshes(world: int, folder: Path) -> None:
    for name in OPTIMIZERS:
        model, whole = Experts().cut(world), Experts()
        meshes = {(p.device_mesh.ndim, p.device_mesh.size()) for p in model.parameters()}
        assert len(meshes) == (3 if world == 4 else 2)
        optimizer, expected = make_optimizer(name, model), make_optimizer(name, whole)
        given_steps(model, optimizer, range(3))
        given_steps(whole, expected, range(3))
        same(list(model.parameters()), list(whole.parameters()))
        # An expert without tokens has no gradient, on some ranks: there it stays, and so does its state.
        for step in range(3, 5):
            for i, (p, q) in enumerate(zip(model.parameters(), whole.parameters(), strict=True)):
                g = torch.randn(q.shape, generator=torch.Generator(DEVICE).manual_seed(1000 * step + i))
                idle = p is model.experts and model.experts.device_mesh.get_local_rank("expert") == 1
                p.grad = None if idle else distribute_local(g, p)
                q.grad = g
            before, old = model.experts.to_local().clone(), whole.experts.detach().clone()
            counts = float(optimizer.state[model.experts].get("step", torch.zeros(())))
            optimizer.step()
            expected.step()
            if model.experts.device_mesh.get_local_rank("expert") == 1:
                assert model.experts.to_local().equal(before)
                assert float(optimizer.state[model.experts].get("step", torch.zeros(()))) == counts
            with torch.no_grad():  # of the whole one, experts 2 and 3
                whole.experts[2:] = old[2:]
            same([p for p in model.parameters() if p is not model.bias], [q for q in whole.parameters() if q is not whole.bias])
            same([model.bias], [whole.bias])
            if name != "SGD":
                break  # one state of the whole has one count of steps
            for key, value in expected.state[whole.experts].items():
                value[2:] = full(optimizer.state[model.experts][key])[2:]


def distribute_local(whole: Tensor, like: Any) -> Tensor:
    """This tensor, which is the same everywhere, as another one is cut up; without communication, which not all ranks make."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


@scenario
def two_optimizers_of_one_model(world: int, folder: Path) -> None:
    def optimizers_of(m: nn.Module) -> list[Any]:
        whole, rest = ([p for p in m.parameters() if (p.dim() > 1) is wanted] for wanted in (True, False))
        return [fused_l2.SGD(whole, **OPTIMIZERS["SGD"]), fused_l2.AdamW(rest, **OPTIMIZERS["AdamW"])]

    class Both:
        """Two optimizers that step together."""

        def __init__(self, m: nn.Module) -> None:
            self.optimizers = optimizers_of(m)
            self.state = {**self.optimizers[0].state, **self.optimizers[1].state}

        def zero_grad(self) -> None:
            for o in self.optimizers:
                o.zero_grad()

        def step(self) -> None:
            for o in self.optimizers:
                o.step()
            self.state = {**self.optimizers[0].state, **self.optimizers[1].state}

    model = sharded(make_model(), world)
    both, _, _ = compared_with_one_process(model, make=lambda _, m: Both(m))
    # Their states in one checkpoint, and on in the backward pass.
    states = get_optimizer_state_dict(model, both.optimizers)
    other = sharded(make_model(), world)
    set_model_state_dict(other, get_model_state_dict(model))
    loaded = Both(other)
    set_optimizer_state_dict(other, loaded.optimizers, optim_state_dict=states)
    for o in loaded.optimizers:
        fused_l2.step_in_backward(o)
    for m, o in ((model, both), (other, loaded)):
        train(m, o, range(4, 7))
    same(list(other.parameters()), list(model.parameters()))


# A full state dict that is offloaded is on rank 0 only, from where it has to be broadcast. One that is flattened, too, torch
# 2.13 cannot load: not into torch.optim either.
FORMS = [
    {},
    {"cpu_offload": True},
    {"full_state_dict": True},
    {"flatten_optimizer_state_dict": True},
    {"full_state_dict": True, "broadcast_from_rank0": True},
    {"full_state_dict": True, "cpu_offload": True, "broadcast_from_rank0": True},
    {"ignore_frozen_params": True},
]


@scenario
def optimizer_states_in_every_form(world: int, folder: Path) -> None:
    for form in FORMS:
        for name, mode in (("SGD", "round"), ("AdamW", "round"), ("AdamW", "remainder"), ("AdamW", "kahan")):
            ours = lambda mode=mode: sharded(make_model() if mode == "round" else make_model().bfloat16(), world)  # noqa: E731
            model = ours()
            optimizer = make_optimizer(name, model, low_precision=mode)
            given_steps(model, optimizer, range(3))
            loads = StateDictOptions(**form)
            kept = StateDictOptions(**{k: v for k, v in form.items() if k != "broadcast_from_rank0"})
            weights, states = get_state_dict(model, optimizer, options=kept)
            if "broadcast_from_rank0" in form and dist.get_rank():
                weights, states = {}, {}
            other = ours()
            loaded = make_optimizer(name, other, low_precision=mode)
            # set_state_dict would take what is empty for what is not wanted.
            set_model_state_dict(other, weights, options=loads)
            set_optimizer_state_dict(other, loaded, states, options=loads)
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                assert optimizer.state[p].keys() == loaded.state[q].keys(), form
                same([optimizer.state[p][key] for key in loaded.state[q]], list(loaded.state[q].values()))
            for m, o in ((model, optimizer), (other, loaded)):
                given_steps(m, o, range(3, 6))
            same(list(model.parameters()), list(other.parameters()))
