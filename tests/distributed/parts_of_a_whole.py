"""Plain tensors of which each process has other parts: ZeRO, FSDP1, experts, pipeline stages; and who decides about a step.

Gradients are small multiples of 1/8 where bits are compared: their squares add up exactly in any order, so that the norm is
that of one process to the last bit.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import DEVICE, full, is_alive, laid_out, mesh_of, refused, same, scenario
from parallel_training import loss_of, make_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import fused_l2

CLIPS = {"max_grad_norm": 0.5, "skip_if_nonfinite": True, "statistics": True}


def dyadic(seed: int, *shape: int) -> Tensor:
    """Multiples of 1/8 between -1 and 1."""
    return torch.randint(-8, 9, shape, generator=torch.Generator(DEVICE).manual_seed(seed)) / 8


def parameters(seed: int, shapes: Sequence[tuple[int, ...]]) -> list[nn.Parameter]:
    return [nn.Parameter(dyadic(100 * seed + i, *shape)) for i, shape in enumerate(shapes)]


def set_grads(params: Sequence[Any], seed: int, layout: Any = None) -> None:
    for i, p in enumerate(params):
        p.grad = laid_out(dyadic(1000 + 100 * seed + i, *p.shape), layout)


def same_totals(ours: Any, whole: Any) -> None:
    """Statistics, and the penalty of the weights as they are now.

    float64 sums of positive numbers, or of exact ones, in another order: a relative 2^-53 for each of some hundred."""
    for key, value in whole.statistics.as_dict().items():
        found = ours.statistics.as_dict()[key]
        assert abs(found - value) <= 1000 * 2**-53 * abs(value), (key, found, value)
    found, value = map(fused_l2.weight_decay.penalty, (ours, whole))
    assert abs(found - value) <= 1000 * 2**-53 * value, (found, value)


def everywhere_the_same(value: Tensor) -> None:
    found = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(found, value)
    assert all(other.equal(value) for other in found), found


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many collectives torch.distributed makes, of any kind, through whichever door."""
    from torch.distributed.tensor.debug import CommDebugMode

    found = [0]
    with CommDebugMode() as mode:
        yield found
    found[0] = mode.get_total_counts()


@scenario
def norm_inside_zero(world: int, folder: Path) -> None:
    # More ranks than parameters, too: one that has none takes part all the same.
    for layers in (slice(0, 5), slice(0, 1)):
        ours, whole = DistributedDataParallel(make_model()[layers]), make_model()[layers]
        optimizer = ZeroRedundancyOptimizer(
            ours.parameters(), fused_l2.AdamW, lr=0.1, weight_decay=0.1, norm_process_group="world", **CLIPS
        )
        single = fused_l2.AdamW(whole.parameters(), lr=0.1, weight_decay=0.1, **CLIPS)
        for step in range(4):
            is_alive()
            set_grads(list(ours.parameters()), step)
            set_grads(list(whole.parameters()), step)
            for model in (ours, whole) if step == 2 else ():
                next(model.parameters()).grad[0, 0] = math.nan
            optimizer.step()
            single.step()
            assert bool(optimizer.optim.step_was_skipped) == (step == 2)
            if step != 2:
                assert optimizer.optim.grad_norm.equal(single.grad_norm)
                same_totals(optimizer.optim, single)
            same(list(ours.parameters()), list(whole.parameters()))
        optimizer.consolidate_state_dict(to=0)  # a name can be sent; a process group could not
    # By backward(): the norm of what DDP has averaged.
    model = DistributedDataParallel(make_model())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), fused_l2.SGD, lr=0.1, max_grad_norm=0.1, norm_process_group="world")
    loss_of(model, 0, dist.get_rank()).backward()
    expected = torch.linalg.vector_norm(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    optimizer.step()
    assert abs(float(optimizer.optim.grad_norm) / float(expected) - 1) <= 2 * 2**-24


def fsdp1(use_orig_params: bool, strategy: Any = ShardingStrategy.FULL_SHARD, groups: Any = None) -> Any:
    return FullyShardedDataParallel(
        make_model(),
        process_group=groups,
        sharding_strategy=strategy,
        use_orig_params=use_orig_params,
        device_id=torch.device(DEVICE),
    )


@scenario
def norm_of_fsdp1(world: int, folder: Path) -> None:
    layouts: list[tuple[Any, Any]] = [(ShardingStrategy.FULL_SHARD, None)]
    if world == 4:
        grid = init_device_mesh(DEVICE, (2, 2))
        layouts.append((ShardingStrategy.HYBRID_SHARD, (grid.get_group(1), grid.get_group(0))))
    for use_orig_params in (False, True):
        for strategy, groups in layouts:
            is_alive()
            ours, theirs = (fsdp1(use_orig_params, strategy, groups) for _ in range(2))
            optimizer = fused_l2.SGD(ours.parameters(), lr=0.1, norm_process_group=ours.process_group, **CLIPS)
            other = torch.optim.SGD(theirs.parameters(), lr=0.1)
            for step in range(2):
                for model in (ours, theirs):
                    model.zero_grad()
                    loss_of(model, step, dist.get_rank()).backward()
                expected = theirs.clip_grad_norm_(CLIPS["max_grad_norm"])
                other.step()
                optimizer.step()
                # torch sums a few hundred squares in float32, and takes roots of sums of squared roots.
                assert abs(float(optimizer.grad_norm) / float(expected) - 1) <= 200 * 2**-24
                assert abs(float(optimizer.statistics.grad_norm) / float(expected) - 1) <= 200 * 2**-24
                everywhere_the_same(optimizer.grad_norm)
                for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                    assert p.numel() == 0 or float((p - q).abs().max()) <= (step + 1) * 0.1 * 0.5 * 200 * 2**-24 + 2**-22
            ours.zero_grad()
            loss_of(ours, 3, dist.get_rank()).backward()
            last = [p for p in ours.parameters() if p.grad is not None and p.grad.numel()]
            if dist.get_rank() == world - 1:
                last[-1].grad[-1] = math.nan
            if groups is not None:  # a replica is one: its gradients are averaged
                for p in last[-1:]:
                    dist.all_reduce(p.grad, group=groups[1])
            before = [p.detach().clone() for p in ours.parameters()]
            optimizer.step()
            assert optimizer.step_was_skipped
            same(list(ours.parameters()), before)


@scenario
def one_scaler_for_all_parts(world: int, folder: Path) -> None:
    # An inf on one rank: no rank steps, all scales go down, whichever scaler it is.
    rank = dist.get_rank()

    def of_fsdp1() -> tuple[list[Any], Any]:
        model = fsdp1(False)
        loss_of(model, 0, rank).backward()
        return list(model.parameters()), model.process_group

    def plain() -> tuple[list[Any], Any]:
        return parameters(rank, [(4, 3), (2,)]), dist.group.WORLD

    def of_two_groups() -> tuple[list[Any], Any]:
        return parameters(rank, [(4, 3), (2,)]), init_device_mesh(DEVICE, (world // 2, 2))

    def shards() -> tuple[list[Any], Any]:
        mesh = mesh_of(world)
        return [nn.Parameter(laid_out(p.detach(), (mesh, [Shard(0)]))) for p in parameters(0, [(4, 3), (5, 1)])], None

    for make in (of_fsdp1, plain, of_two_groups, shards):
        for scaler_class in (torch.amp.GradScaler, ShardedGradScaler):
            for clips in ({}, {"max_grad_norm": 1.0}, {"max_grad_norm": 1.0, "norm_type": math.inf}):
                is_alive()
                params, groups = make()
                optimizer = fused_l2.AdamW(params, lr=0.1, amp_scaling=True, norm_process_group=groups, **clips)
                scaler = scaler_class(device=DEVICE, init_scale=4.0)
                for step in range(3):
                    scaler.scale(torch.ones(()))
                    for p in params:
                        p.grad = torch.full_like(p, 4.0)
                    if step == 1 and rank == 1:
                        own = params[0].grad
                        (own._local_tensor if hasattr(own, "_local_tensor") else own).view(-1)[0] = math.inf
                    before = [full(p).clone() for p in params]
                    scaler.step(optimizer)
                    scaler.update()
                    assert bool(optimizer.step_was_skipped) == (step == 1)
                    assert scaler.get_scale() == (4.0 if step == 0 else 2.0)
                    assert all(full(p).equal(q) for p, q in zip(params, before, strict=True)) == (step == 1)
                assert float(optimizer.state[params[0]]["step"]) == 2


@scenario
def experts(world: int, folder: Path) -> None:
    # Dense parameters are sharded by FSDP2 or replicated; experts are plain tensors, others on each rank.
    rank, mesh = dist.get_rank(), mesh_of(world)
    shapes = [(4, 3), (3,)]
    for layout, said in (
        ((mesh, [Shard(0)]), [None, "world"]),
        ((mesh, [Shard(0)]), "world"),  # a DTensor speaks for itself
        ((mesh, [Replicate()]), [None, dist.group.WORLD]),
        (None, ["replicated", mesh]),
        (None, [None, "world"]),  # nothing is seen of parts in the first group
    ):
        dense = [nn.Parameter(laid_out(p.detach(), layout)) for p in parameters(0, shapes)]
        own = parameters(10 + rank, shapes)
        whole = parameters(0, shapes)
        all_experts = [parameters(10 + r, shapes) for r in range(world)]
        optimizer = fused_l2.AdamW(
            [{"params": dense}, {"params": own, "weight_decay": 0.3}], lr=0.1, norm_process_group=said, **CLIPS
        )
        single = fused_l2.AdamW(
            [{"params": whole}, {"params": [p for params in all_experts for p in params], "weight_decay": 0.3}], lr=0.1, **CLIPS
        )
        for step in range(4):
            is_alive()
            set_grads(dense, step, layout)
            set_grads(whole, step)
            for r, params in enumerate(all_experts):
                set_grads(params, 20 * (r + 1) + step)
                if step == 1 and r == world - 1:
                    params[0].grad = None  # an expert without tokens
                if step == 2 and r == 1:
                    params[1].grad[0] = math.nan
            for p, q in zip(own, all_experts[rank], strict=True):
                p.grad = None if q.grad is None else q.grad.clone()
            optimizer.step()
            single.step()
            assert bool(optimizer.step_was_skipped) == (step == 2)
            if step != 2:
                assert optimizer.grad_norm.equal(single.grad_norm)
                same_totals(optimizer, single)
            same(dense, whole)
            same(own, all_experts[rank])


@scenario
def pipeline_stages(world: int, folder: Path) -> None:
    # Each stage has other parameters, in other numbers of param groups; they may be sharded within the stage.
    rank = dist.get_rank()
    grid = init_device_mesh(DEVICE, (2, world // 2), mesh_dim_names=("stage", "data"))
    stage = grid.get_local_rank("stage")
    shapes = [[(4, 3), (3,)], [(6, 2), (5,), (2, 2)]]
    for layout in ((grid["data"], [Shard(0)]), None):
        if layout is None and world > 2:
            group: Any = grid  # each rank is a stage
            of, number = rank, [rank % 2 for rank in range(world)]
        else:
            group = grid.get_group("stage")
            of, number = stage, [0, 1]
        whole = [parameters(r, shapes[kind]) for r, kind in enumerate(number)]
        own = [nn.Parameter(laid_out(p.detach(), layout)) for p in whole[of]]
        groups = [{"params": own[:1], "weight_decay": 0.3}, {"params": own[1:]}] if of % 2 else [{"params": own}]
        decayed = [p for r, params in enumerate(whole) for p in params[: r % 2]]
        rest = [p for r, params in enumerate(whole) for p in params[r % 2 :]]
        optimizer = fused_l2.AdamW(groups, lr=0.1, norm_process_group=group, **CLIPS)
        single = fused_l2.AdamW([{"params": decayed, "weight_decay": 0.3}, {"params": rest}], lr=0.1, **CLIPS)
        for step in range(3):
            is_alive()
            for r, params in enumerate(whole):
                set_grads(params, 10 * r + step)
            set_grads(own, 10 * of + step, layout)
            for p in (whole[1][0], own[0]) if of == 1 else (whole[1][0],):
                if step == 1:
                    (p.grad._local_tensor if hasattr(p.grad, "_local_tensor") else p.grad).view(-1)[:1] = math.inf
            optimizer.step()
            single.step()
            assert bool(optimizer.step_was_skipped) == (step == 1)
            if step != 1:
                assert optimizer.grad_norm.equal(single.grad_norm)
                same_totals(optimizer, single)
            same(own, whole[of])


def unchanged(optimizer: Any, call: Callable[[], Any], *words: str) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [full(p).clone() for p in params]
    refused(call, *words)
    same(params, before)
    assert not optimizer.state


@scenario
def parts_are_refused_until_somebody_says(world: int, folder: Path) -> None:
    mesh = mesh_of(world)
    asking: list[dict[str, Any]] = [{"max_grad_norm": 1.0}, {"statistics": True}, {"amp_scaling": True}]
    for option in asking:
        (name,) = option
        for use_orig_params in (False, True):
            is_alive()
            model = fsdp1(use_orig_params)
            optimizer = fused_l2.AdamW(model.parameters(), lr=0.1, **option)
            loss_of(model, 0, dist.get_rank()).backward()
            unchanged(optimizer, optimizer.step, "FullyShardedDataParallel", name, "norm_process_group=model.process_group")
            optimizer.norm_process_group = model.process_group
            optimizer.step()
        ignoring = make_model()
        experts = set(ignoring[4].parameters())
        fully_shard(ignoring, mesh=mesh, ignored_params=experts)
        optimizer = fused_l2.AdamW(ignoring.named_parameters(), lr=0.1, **option)
        loss_of(ignoring, 0, dist.get_rank()).backward()
        unchanged(optimizer, optimizer.step, "'4.weight'", "it is no DTensor", name, "norm_process_group='replicated'")
        optimizer.norm_process_group = "world"
        optimizer.step()
        # A frozen one matters once it is not any more.
        dense = nn.Parameter(laid_out(torch.ones(4, 4), (mesh, [Shard(0)])))
        frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        dense.grad = laid_out(torch.ones(4, 4), (mesh, [Shard(0)]))
        optimizer = fused_l2.AdamW([dense, frozen], lr=0.1, **option)
        optimizer.step()
        before = full(dense).clone()
        frozen.requires_grad_()
        frozen.grad = torch.ones(3)
        refused(optimizer.step, "parameter 1 of group 0", "it is no DTensor", name)
        same([dense, frozen], [before, torch.ones(3)])
    # Without them nothing is communicated, and nothing is refused.
    fused_l2.AdamW([dense, frozen], lr=0.1).step()
    if world == 4:
        half = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("data", "tensor"))["data"]
        other = nn.Parameter(laid_out(torch.ones(4, 4), (half, [Shard(0)])))
        other.grad = laid_out(torch.ones(4, 4), (half, [Shard(0)]))
        dense = nn.Parameter(laid_out(torch.ones(4, 4), (mesh, [Shard(0)])))
        dense.grad = laid_out(torch.ones(4, 4), (mesh, [Shard(0)]))
        optimizer = fused_l2.SGD([dense, other], lr=0.1, max_grad_norm=1.0)
        unchanged(optimizer, optimizer.step, "parameter 1 of group 0", "over ranks [0, 1, 2, 3]", "'replicated'")
        refused(lambda: fused_l2.weight_decay.penalty(fused_l2.AdamW([dense, other])), "over ranks", "penalty")
        optimizer.norm_process_group = "replicated"
        optimizer.step()
        assert optimizer.grad_norm.equal(torch.tensor(32.0).sqrt())
        optimizer = fused_l2.SGD([other], lr=0.1, max_grad_norm=1.0, norm_process_group="world")
        refused(optimizer.step, "neither within their mesh nor across it")


@scenario
def names_of_process_groups(world: int, folder: Path) -> None:
    params = parameters(dist.get_rank(), [(4, 3)])
    group = dist.new_group(list(range(world)))
    set_grads(params, dist.get_rank())
    expected = math.sqrt(sum(float(dyadic(1000 + 100 * r, 4, 3).square().sum()) for r in range(world)))
    optimizer = fused_l2.SGD(params, lr=0.1, max_grad_norm=1.0, norm_process_group=group)
    for again in (optimizer, copy.deepcopy(optimizer)):
        own = again.param_groups[0]["params"][0]
        own.grad = params[0].grad.clone()
        again.step()
        assert abs(float(again.grad_norm) / expected - 1) <= 2**-24
    with pytest.raises(TypeError, match=r"group\.group_name"):
        pickle.dumps(optimizer)
    optimizer.norm_process_group = group.group_name
    again = pickle.loads(pickle.dumps(optimizer))
    again.param_groups[0]["params"][0].grad = params[0].grad.clone()
    again.step()
    assert again.grad_norm.equal(optimizer.grad_norm)
    optimizer.norm_process_group = "no such group"
    refused(optimizer.step, "there is no process group of that name")
    alone = dist.new_group([0])
    if dist.get_rank():
        with pytest.raises(ValueError, match="this process is not in that group"):
            optimizer.norm_process_group = alone


@scenario
def collectives_are_counted(world: int, folder: Path) -> None:
    # One all-reduce for each set of ranks and step, whatever is asked for and whatever has a gradient; statistics take another.
    rank, mesh = dist.get_rank(), mesh_of(world)
    twin = mesh_of(world)  # the same ranks once more
    grid = init_device_mesh(DEVICE, (world // 2, 2))
    dimensions = 2 if world > 2 else 1  # of the grid that are more than one rank, and then other ranks than the mesh's
    same_ranks = world == 2
    layouts: list[Any] = [(mesh, [Shard(0)]), (twin, [Shard(1)]), (mesh, [Replicate()]), (mesh, [Shard(0)])]
    cases = [
        (layouts, None, 1),
        ([*layouts, (grid, [Shard(0), Shard(1)]), (grid, [Replicate(), Shard(0)])], None, 1 if same_ranks else 1 + dimensions),
        ([*layouts, None, None], "world", 1),
        ([None, None, None, None], "world", 1),
        ([None] * 4, None, 0),
        ([(mesh, [Replicate()])] * 4, None, 0),
    ]
    for places, said, expected in cases:
        for options, per_group in (
            ({}, 0),
            ({"max_grad_norm": 1.0}, 1),
            ({"max_grad_norm": 1.0, "norm_type": math.inf, "skip_if_nonfinite": True}, 1),
            ({"amp_scaling": True}, 1),
            ({"max_grad_norm": 1.0, "amp_scaling": True}, 1),
            ({"statistics": True}, 1),
            ({"max_grad_norm": 1.0, "statistics": True}, 2),
        ):
            is_alive()
            params = [nn.Parameter(laid_out(torch.ones(4, 4), place)) for place in places]
            optimizer = fused_l2.AdamW(params, lr=0.1, norm_process_group=said, **options)
            found = []
            for step in range(4):
                for i, p in enumerate(params):
                    p.grad = torch.zeros_like(p) if (i + step + rank) % 3 else None
                if "amp_scaling" in options:
                    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.full((), float(step == 2 and rank == 0))
                elif step == 2 and rank == 0:
                    optimizer.drop_plan()  # what one rank makes anew changes nothing for the others
                with counted() as count:
                    optimizer.step()
                found.append(count[0])
            # Statistics of parts are summed after those of shards, over the same ranks.
            extra = 1 if "statistics" in options and said and any(places) else 0
            assert found == [expected * per_group + extra] * 4, (places, options, found)
