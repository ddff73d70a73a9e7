"""Tensors that are cut up over processes, and optimizers of them."""

from __future__ import annotations

import gc
import math
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import (
    DEVICE,
    OPTIMIZERS,
    SHAPES,
    against_single_process,
    full,
    is_alive,
    laid_out,
    mesh_of,
    randoms,
    refused,
    same,
    scenario,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fused_l2
from fused_l2.engines import cpu
from fused_l2.engines.torch_ops import TorchPart
from fused_l2.parameters.shards import first_element, local


@scenario
def shards_step_as_the_whole(world: int, folder: Path) -> None:
    mesh = mesh_of(world)
    for name in OPTIMIZERS:
        for dim in (0, -1):
            against_single_process(name, [(mesh, [Shard(dim % len(shape))]) for shape in SHAPES])
        _, ours, _, cut = against_single_process(name, [(mesh, [Shard(0)])] * len(SHAPES))
        assert not any(isinstance(part, TorchPart) for part in ours._stepper._plan.parts)  # the engine, not plain PyTorch
        assert any(p._local_tensor.numel() == 0 for p in cut) or dist.get_rank() == 0
        before = [p._version for p in cut]
        ours.step()
        assert [p._version for p in cut] == [v + 1 for v in before]  # T08: autograd sees the write


@scenario
def mixed_groups_and_several_meshes(world: int, folder: Path) -> None:
    # T43: plain tensors, replicas and shards of one mesh, and of a mesh with two dimensions, in one param group
    mesh = mesh_of(world)
    grid = init_device_mesh(DEVICE, (world // 2, 2), mesh_dim_names=("data", "tensor"))
    layouts = [None, (mesh, [Replicate()]), (grid, [Shard(0), Replicate()]), (grid, [Shard(0), Shard(1)]), (mesh, [Shard(0)])]
    for name in OPTIMIZERS:
        _, ours, _, _ = against_single_process(name, layouts)
        assert not any(isinstance(part, TorchPart) for part in ours._stepper._plan.parts)


@scenario
def gradients_of_other_placements(world: int, folder: Path) -> None:
    # T44: a summand is not the gradient
    mesh = mesh_of(world)
    param = nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh, [Replicate()]))
    cut = nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)]))
    optimizer = fused_l2.SGD([param, cut], lr=1.0)
    for _ in range(3):
        summand = torch.full((6, 4), float(dist.get_rank() + 1))
        for p in (param, cut):
            p.grad = DTensor.from_local(summand, mesh, [Partial()])
        optimizer.step()
    total = sum(range(1, world + 1))
    same([param, cut], [torch.full((6, 4), 1.0 - 3 * total)] * 2)
    assert param.grad.placements == (Partial(),)  # gradients are left as they are
    for name in OPTIMIZERS:
        other = [(mesh, [Shard(len(shape) - 1)]) for shape in SHAPES]
        against_single_process(name, [(mesh, [Shard(0)])] * len(SHAPES), other)
        against_single_process(name, [(mesh, [Replicate()])] * len(SHAPES), other)


@scenario
def ranks_whose_plans_differ(world: int, folder: Path) -> None:
    # One rank has to make its plan anew: communication must stay the same on all.
    mesh = mesh_of(world)
    param = nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]))
    optimizer = fused_l2.AdamW([param], max_grad_norm=1.0, lr=0.1)
    for step in range(4):
        param.grad = DTensor.from_local(torch.ones(8, 4), mesh, [Partial()])
        if step == 2 and dist.get_rank() == 0:
            optimizer.drop_plan()
        optimizer.step()
    assert abs(float(optimizer.grad_norm) / math.sqrt(32 * world**2) - 1) <= 2**-24
    same([param], [full(param)])


@scenario
def global_norm(world: int, folder: Path) -> None:
    # T45: replicas count once. Within 4 float32 roundings of norm and factor, and of the step's own.
    mesh = mesh_of(world)
    grid = init_device_mesh(DEVICE, (world // 2, 2))
    layouts = [None, (mesh, [Replicate()]), (grid, [Shard(0), Replicate()]), (grid, [Shard(0), Shard(1)]), (mesh, [Shard(0)])]
    for norm_type in (2.0, math.inf):
        for limit in (0.5, 1e9):
            whole = [nn.Parameter(t) for t in randoms(0)]
            cut = [nn.Parameter(laid_out(t, layout)) for t, layout in zip(randoms(0), layouts, strict=True)]
            options: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.1, "max_grad_norm": limit, "norm_type": norm_type}
            options["norm_process_group"] = "replicated"  # of the plain tensor
            single, ours = (fused_l2.SGD(ps, **options) for ps in (whole, cut))
            for step in range(3):
                for p, q, g, layout in zip(whole, cut, randoms(step + 1), layouts, strict=True):
                    p.grad, q.grad = g, laid_out(g, layout)
                expected = torch.nn.utils.get_total_norm([p.grad for p in whole], norm_type)
                single.step()
                ours.step()
                assert abs(float(ours.grad_norm) / float(expected) - 1) <= 4 * 2**-24
                for p, q in zip(whole, cut, strict=True):
                    # Each step adds at most 4 roundings of a number no larger than weight and gradient together.
                    bound = 4 * (step + 1) * 2**-24 * (p.abs().max() + p.grad.abs().max()) if p.numel() else 0
                    assert float((full(q) - p).abs().max()) <= float(bound)
    # The norm is the same number everywhere, so that all ranks do the same.
    everywhere = [torch.zeros(()) for _ in range(world)]
    dist.all_gather(everywhere, ours.grad_norm)
    assert all(n == everywhere[0] for n in everywhere)


@scenario
def steps_left_out(world: int, folder: Path) -> None:
    # A NaN in the shard of one rank: every rank leaves the step out.
    mesh = mesh_of(world)
    clipped = {"max_grad_norm": 1.0, "skip_if_nonfinite": True}
    for skips in (clipped, {**clipped, "norm_type": math.inf}, {"amp_scaling": True}):
        param = nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]))
        optimizer = fused_l2.AdamW([param], lr=0.1, **skips)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0, enabled="amp_scaling" in skips)
        for step in range(3):
            grad = torch.ones(8, 4)
            if step == 1:
                grad[-1, 0] = math.nan
                grad[0, 0] = math.inf  # on another rank: which of the two is the larger?
            scaler.scale(torch.ones(()))
            param.grad = distribute_tensor(grad * scaler.get_scale(), mesh, [Shard(0)])
            before = full(param).clone()
            scaler.step(optimizer)
            scaler.update()
            assert bool(optimizer.step_was_skipped) == (step == 1)
            assert optimizer.grad_norm is None or bool(optimizer.grad_norm.isnan()) == (step == 1)
            assert full(param).equal(before) == (step == 1)
        assert float(optimizer.state[param]["step"]) == 2


@scenario
def statistics(world: int, folder: Path) -> None:
    mesh = mesh_of(world)
    layouts = [None, (mesh, [Replicate()]), *[(mesh, [Shard(0)])] * 3]
    single, ours, _, _ = against_single_process(
        "AdamW", layouts, statistics=True, max_grad_norm=1e9, norm_process_group="replicated"
    )
    if dist.get_rank() == 0:  # in one process alone
        expected, found = single.statistics, ours.statistics
        for a, b in [(expected, found), *zip(expected.by_group(), found.by_group(), strict=True)]:
            for key, value in a.as_dict().items():
                assert abs(b.as_dict()[key] - value) <= 1e-6 * abs(value), key  # float32 products, summed in float64
        for name, figures in expected.by_tensor().items():
            assert abs(float(found.by_tensor()[name].grad_norm) - float(figures.grad_norm)) <= 1e-6 * float(figures.grad_norm)
    penalty = fused_l2.weight_decay.penalty(ours)
    assert abs(penalty - fused_l2.weight_decay.penalty(single)) <= 1e-6 * penalty


@scenario
def low_precision(world: int, folder: Path) -> None:
    mesh = mesh_of(world)
    for mode in ("round", "master", "remainder", "kahan", "stochastic", "remainder8"):
        for name in ("SGD", "AdamW"):
            options = {"low_precision": mode, "dtype": torch.bfloat16}
            single, ours, _, _ = against_single_process(name, [(mesh, [Shard(0)])] * len(SHAPES), **options)
            same(ours.master_params(), single.master_params())
            assert all(isinstance(w, DTensor) for w in ours.master_params())
            weights = ours.master_params()
            ours.load_master_params(weights)
            same(ours.master_params(), weights)
            against_single_process(name, [(mesh, [Replicate()])] * len(SHAPES), **options)
    # No two shards have the same random bits, whatever they are cut along.
    grid = init_device_mesh(DEVICE, (world // 2, 2))
    for shape, layout in (
        ((4, 6), (mesh, [Shard(1)])),
        ((5, 6), (grid, [Shard(0), Shard(1)])),
        ((9, 7), (grid, [Shard(1), Shard(1)])),
    ):
        tensor = laid_out(torch.zeros(shape), layout)
        first = first_element(tensor)
        ranges: list[Any] = [None] * world
        dist.all_gather_object(ranges, (first, first + tensor.to_local().numel()))
        for (_, end), (start, _) in zip(sorted(ranges), sorted(ranges)[1:], strict=False):
            assert start >= end, ranges


@scenario
def eight_bit_states(world: int, folder: Path) -> None:
    # Groups cross no slice of dimension 0, so any shards of it have the bits of the whole: uneven and empty ones, too.
    mesh = mesh_of(world)
    grid = init_device_mesh(DEVICE, (world // 2, 2))
    shapes = ((70, 64), (3, 2048), (16,), (129, 2, 32))
    options = {"state_dtype": "8bit", "shapes": shapes}
    for name, more in (("SGD", {}), ("AdamW", {"amsgrad": False, "dtype": torch.bfloat16, "low_precision": "remainder8"})):
        _, ours, _, cut = against_single_process(name, [(mesh, [Shard(0)])] * 4, **options, **more)
        scales = [key for key in ours.state[cut[0]] if key.endswith("_scale")]
        assert scales
        assert all(ours.state[cut[0]][key].shape == (70, 2) for key in scales)
        assert not any(isinstance(part, TorchPart) for part in ours._stepper._plan.parts)
        against_single_process(name, [(mesh, [Replicate()]), (grid, [Replicate(), Shard(0)]), None, None], **options, **more)
        exported = ours.float32_state_dict()["state"][0]
        assert all(isinstance(v, DTensor) and v.dtype is torch.float32 for k, v in exported.items() if k.startswith("exp"))
    # Along dimension 1 in multiples of 32; random bits are other ones then, and what does not fit keeps float32.
    for width, fits in ((32 * world, True), (16 * world, world == 1)):
        param = nn.Parameter(laid_out(torch.ones(512, width), (mesh, [Shard(1)])))
        param.grad = laid_out(torch.ones(512, width), (mesh, [Shard(1)]))
        optimizer = fused_l2.AdamW([param], state_dtype="8bit")
        optimizer.step()
        assert ("exp_avg_8bit" in optimizer.state[param]) == fits
        if fits:
            assert optimizer.state[param]["exp_avg_scale"].full_tensor().shape == (512, world)


@scenario
def plain_pytorch(world: int, folder: Path) -> None:
    # Without an engine: same results, and T45.
    mesh = mesh_of(world)
    layouts = [None, (mesh, [Replicate()]), *[(mesh, [Shard(0)])] * 3]
    library, cpu.library = cpu.library, lambda: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in OPTIMIZERS:
                _, ours, _, cut = against_single_process(name, layouts)
                assert len(ours._stepper._plan.parts[-1].entries()) == len(cut)
            single, ours, _, _ = against_single_process(
                "SGD", layouts, max_grad_norm=1e9, statistics=True, norm_process_group="replicated"
            )
            assert abs(float(ours.grad_norm / single.grad_norm) - 1) <= 4 * 2**-24
    finally:
        cpu.library = library


@scenario
def errors(world: int, folder: Path) -> None:
    mesh, grid = mesh_of(world), init_device_mesh(DEVICE, (1, world))
    for layout, grad_layout, words in (
        ((mesh, [Shard(0)]), None, "its gradient cannot be applied to it: it is no DTensor"),
        (None, (mesh, [Shard(0)]), "it is a DTensor, and the parameter is not"),
        ((mesh, [Shard(0)]), (grid, [Replicate(), Shard(0)]), "it is on the mesh"),
    ):
        param = nn.Parameter(laid_out(torch.ones(4, 4), layout))
        optimizer = fused_l2.AdamW([("layer.weight", param)], lr=0.1)
        gradient = laid_out(torch.ones(4, 4), grad_layout)
        # torch refuses some of these itself when they are assigned.
        try:
            param.grad = gradient
        except RuntimeError:
            continue
        refused(optimizer.step, "'layer.weight'", words)
        assert full(param).equal(torch.ones(4, 4))
        assert not optimizer.state
    param = nn.Parameter(laid_out(torch.ones(4, 4), (mesh, [Shard(0)])))
    param.grad = laid_out(torch.ones(4, 4), (mesh, [Shard(0)]))
    optimizer = fused_l2.SGD([param], lr=0.1, momentum=0.9)
    optimizer.state[param]["momentum_buffer"] = torch.zeros(4, 4)
    refused(optimizer.step, "its state 'momentum_buffer' cannot be used: it is no DTensor", "set_optimizer_state_dict")
    summand = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    summand.grad = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    refused(fused_l2.SGD([summand], lr=0.1).step, "every process holds a summand")


def alive() -> tuple[Counter[str], int]:
    """Objects of ours and torch's, by kind, and the bytes of tensors."""
    gc.collect()
    objects = gc.get_objects()
    kinds = Counter(type(o).__name__ for o in objects if str(type(o).__module__).startswith(("fused_l2", "torch")))
    tensors = [local(o) for o in objects if issubclass(type(o), Tensor)]
    return kinds, sum({t.data_ptr(): t.nbytes for t in tensors}.values())


@scenario
def steps_leave_nothing_behind(world: int, folder: Path) -> None:
    # T42: no specification, shard, plan or tensor is left behind by a step.
    mesh = mesh_of(world)
    for placements, steps in (([Partial()], 300), ([Shard(0)], 600)):
        communicates = placements == [Partial()]
        params = [nn.Parameter(laid_out(torch.ones(64, 4), (mesh, [Shard(0)]))) for _ in range(8)]
        options = {"max_grad_norm": 1.0, "statistics": True} if communicates else {}
        optimizer = fused_l2.AdamW(params, lr=0.1, **options)
        for step in range(1, steps + 1):
            for p in params:
                shard = torch.ones(p.shape if communicates else p.to_local().shape)
                p.grad = DTensor.from_local(shard, mesh, placements, shape=p.shape, stride=p.stride())
            optimizer.step()
            optimizer.zero_grad()
            is_alive()
            if step == 100:
                (kinds, memory), blocks = alive(), sys.getallocatedblocks()
        gc.collect()
        # Anything that Python has. Caches are full by now; one object per parameter and step would be twice as much.
        grown = sys.getallocatedblocks() - blocks
        assert grown <= 4 * (steps - 100), grown
        kinds_now, memory_now = alive()
        assert kinds_now == kinds, kinds_now - kinds
        assert memory_now == memory, memory_now - memory


@scenario
def the_doctor_looks_at_shards_and_says_nothing_to_other_ranks(world: int, folder: Path) -> None:
    import fused_l2.doctor

    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    fully_shard(model, mesh=mesh_of(world))
    optimizer = torch.optim.AdamW(fused_l2.weight_decay.param_groups(model, 0.1), lr=1e-3)
    for _ in range(2):
        if dist.get_rank() == 0:  # one rank alone: whatever communicated would wait for the others
            before = [p.to_local().clone() for p in model.parameters()]
            report = fused_l2.doctor.examine(optimizer, model)
            assert report.codes("wrong") == report.codes("doubtful") == set(), str(report)
            for p, row in zip((p for group in optimizer.param_groups for p in group["params"]), report.layers, strict=True):
                assert row.shape == tuple(p.shape)
                assert math.isclose(row.norm, float(p.to_local().norm()), rel_tol=1e-6)
            assert all(torch.equal(p.to_local(), kept) for p, kept in zip(model.parameters(), before, strict=True))
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
