"""Random setups: every process does what one process would that holds the whole.

A draw has a mesh or two over 2 to 4 ranks, DTensors with random placements, plain tensors that are replicas, plain tensors of
which each rank has others, gradients that are there on some ranks only, and random options. The one process holds each distinct
piece as a tensor of its own; every rank computes it for itself, so that nothing but the steps communicates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import DEVICE, is_alive, scenario
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fused_l2

DRAWS = {2: range(60), 4: range(60, 200)}
MESHES = {2: [(2,), (1, 2), (2, 1)], 3: [(3,), (1, 3)], 4: [(4,), (2, 2), (4, 1)]}
STEPS = 3


@dataclass
class Piece:
    """What one or several ranks have of a tensor, as the one process has it."""

    whole: nn.Parameter
    group: int
    grads: list[Tensor | None] = field(default_factory=list)  # by step
    before: Tensor = field(default_factory=lambda: torch.empty(0))


def cut(shape: Sequence[int], mesh: Sequence[int], at: Sequence[int], placements: Sequence[Any]) -> tuple[slice, ...]:
    """The part of a tensor that the process at this place of the mesh has: chunks as torch.chunk makes them."""
    bounds = [(0, n) for n in shape]
    for parts, i, placement in zip(mesh, at, placements, strict=True):
        if isinstance(placement, Shard):
            start, stop = bounds[placement.dim]
            size = -(-(stop - start) // parts)
            bounds[placement.dim] = min(start + i * size, stop), min(start + (i + 1) * size, stop)
    return tuple(itertools.starmap(slice, bounds))


class Draw:
    """One setup: ``mine`` are the parameters of this rank's optimizer with the piece that each of them is."""

    def __init__(self, number: int, meshes: dict[tuple[int, tuple[int, ...]], DeviceMesh], world: int) -> None:
        self.random, self.rank = Random(number), dist.get_rank()
        self.generator = torch.Generator(DEVICE).manual_seed(number)
        r = self.random
        self.ranks = r.choice([n for n in MESHES if n <= world])
        self.is_exact = r.random() < 0.5  # sums of squares come out the same in any order
        self.pieces: list[Piece] = []
        self.mine: list[tuple[nn.Parameter, Piece, DTensor | None]] = []
        self.takes_part = self.rank < self.ranks
        if not self.takes_part:
            return
        self.said: list[Any] = [None, "replicated", meshes[self.ranks, (self.ranks,)].get_group()]
        for _ in range(r.randint(1, 5)):
            shape = tuple(r.randint(1, 7) for _ in range(r.randint(1, 3)))
            kind = r.choice([0, 0, 0, 1, 2])
            if kind == 0:
                self.add_dtensor(shape, r.choice(MESHES[self.ranks]), meshes)
            else:
                for rank in range(self.ranks) if kind == 2 else (self.rank,):
                    piece = self.add_piece(shape, kind)
                    if rank == self.rank:
                        self.mine.append((nn.Parameter(piece.whole.detach().clone()), piece, None))
        self.draw_options()

    def numbers(self, shape: Sequence[int]) -> Tensor:
        if self.is_exact:
            return torch.randint(-8, 9, tuple(shape), generator=self.generator) / 8
        return torch.randn(tuple(shape), generator=self.generator)

    def add_piece(self, shape: Sequence[int], group: int) -> Piece:
        share = self.random.choice([1.0, 1.0, 0.5])  # of the gradients that are there
        grads = [self.numbers(shape) if self.random.random() < share else None for _ in range(STEPS)]
        piece = Piece(nn.Parameter(self.numbers(shape)), group, grads)
        self.pieces.append(piece)
        return piece

    def add_dtensor(
        self, shape: tuple[int, ...], mesh_shape: tuple[int, ...], meshes: dict[tuple[int, tuple[int, ...]], DeviceMesh]
    ) -> None:
        mesh = meshes[self.ranks, mesh_shape]
        placements = [self.random.choice([Replicate(), *map(Shard, range(len(shape)))]) for _ in mesh_shape]
        found: dict[Any, Piece] = {}
        for rank, at in enumerate(itertools.product(*map(range, mesh_shape))):
            where = cut(shape, mesh_shape, at, placements)
            # Two empty shards are two, though they are alike.
            own = [i for i, p in zip(at, placements, strict=True) if isinstance(p, Shard)]
            if tuple(own) not in found:
                found[tuple(own)] = self.add_piece([s.stop - s.start for s in where], 0)
            if rank == self.rank:
                piece = found[tuple(own)]
                stride = torch.empty(shape).stride()
                like = DTensor.from_local(
                    piece.whole.detach().clone(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
                )
                self.mine.append((nn.Parameter(like), piece, like))

    def draw_options(self) -> None:
        r = self.random
        self.name = r.choice(["SGD", "AdamW"])
        self.hyper: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
        if self.name == "SGD":
            self.hyper["momentum"] = r.choice([0.0, 0.9])
        self.options: dict[str, Any] = {"statistics": r.random() < 0.5, "amp_scaling": r.random() < 0.4}
        if r.random() < 0.7:
            nonfinite = r.choice([{}, {"skip_if_nonfinite": True}, {"error_if_nonfinite": True}])
            self.options |= {"max_grad_norm": r.choice([0.5, 1e9]), "norm_type": r.choice([2.0, math.inf]), **nonfinite}
        self.scale = r.choice([1.0, 4.0, 2.0**10]) if self.options["amp_scaling"] else 1.0
        # Who finds an inf (a GradScaler looks at its own rank's gradients only), who makes a plan anew, and where a NaN is.
        self.overflows = {(step, r.randrange(self.ranks)) for step in range(STEPS) if r.random() < 0.2}
        self.anew = r.randrange(STEPS), r.randrange(self.ranks)
        bad = [p for p in self.pieces if p.grads[1] is not None and p.grads[1].numel()]
        if bad and r.random() < 0.4:
            chosen = r.choice(bad).grads[1]
            assert chosen is not None
            chosen.view(-1)[r.randrange(chosen.numel())] = r.choice([math.nan, math.inf, -math.inf])

    def __repr__(self) -> str:
        params = [(tuple(p.shape), like.placements if like is not None else piece.group) for p, piece, like in self.mine]
        return f"{self.name} of {self.ranks} ranks, exact {self.is_exact}, {self.hyper} {self.options} {params}"

    # The steps.

    def run(self) -> None:
        groups = [{"params": [p for p, piece, _ in self.mine if piece.group == g]} for g in range(3)]
        wholes = [{"params": [p.whole for p in self.pieces if p.group == g]} for g in range(3)]
        groups[1]["weight_decay"] = wholes[1]["weight_decay"] = 0.3  # type: ignore[assignment]
        make = getattr(fused_l2, self.name)
        ours = make(groups, norm_process_group=self.said, **self.hyper, **self.options)
        single = make(wholes, **self.hyper)
        for step in range(STEPS):
            for param, piece, like in self.mine:
                grad = piece.grads[step]
                grad = None if grad is None else grad * self.scale
                if grad is not None and like is not None:
                    grad = DTensor(grad, like._spec, requires_grad=False)
                param.grad = grad
            if self.options["amp_scaling"]:
                ours.grad_scale = torch.tensor(self.scale)
                ours.found_inf = torch.tensor(float((step, self.rank) in self.overflows))
            if self.anew == (step, self.rank):
                ours.drop_plan()
            self.step(step, ours, single)
            for param, piece, _ in self.mine:
                self.same(param, piece.whole)
                for key, value in single.state.get(piece.whole, {}).items():
                    self.same(ours.state[param][key], value)
                assert set(ours.state.get(param, {})) == set(single.state.get(piece.whole, {}))

    def step(self, step: int, ours: Any, single: Any) -> None:
        clips, limit = "max_grad_norm" in self.options, self.options.get("max_grad_norm", math.inf)
        grads = [g for p in self.pieces if (g := p.grads[step]) is not None]
        norm = self.norm(grads)
        overflowed = self.options["amp_scaling"] and any(s == step for s, _ in self.overflows)
        skips = overflowed or (not math.isfinite(norm) and bool(self.options.get("skip_if_nonfinite")))
        for piece in self.pieces:
            piece.before = piece.whole.detach().clone()
        if self.options.get("error_if_nonfinite") and not math.isfinite(norm) and not overflowed:
            with pytest.raises(RuntimeError, match="nothing was changed"):
                ours.step()
            return
        ours.step()
        assert bool(ours.step_was_skipped) == skips
        factor = 1.0
        if clips:
            expected = torch.tensor(norm, dtype=torch.float32)
            found = ours.grad_norm
            # Sums of squares in float64, of at most some thousand numbers, are rounded once to float32.
            assert found.isnan() if math.isnan(norm) else abs(float(found) - norm) <= 1.001 * 2**-24 * norm or norm == math.inf
            if self.is_exact and math.isfinite(norm):
                assert found.equal(expected), (found, expected)
            factor = float(((found + 1e-6).reciprocal() * limit).clamp(max=1.0))  # as clip_grad_norm_
        if not skips:
            for piece in self.pieces:
                grad = piece.grads[step]
                piece.whole.grad = None if grad is None else grad * factor
            single.step()
        if self.options["statistics"]:
            self.check_statistics(step, ours.statistics, single.param_groups)

    def norm(self, grads: list[Tensor]) -> float:
        together = torch.cat([g.double().flatten() for g in grads]) if grads else torch.zeros(0, dtype=torch.float64)
        if self.options.get("norm_type") == math.inf:
            return float(together.abs().max()) if together.numel() else 0.0
        return float(together.square().sum().sqrt())

    def check_statistics(self, step: int, found: Any, groups: list[dict[str, Any]]) -> None:
        stepped = [(p, g.double()) for p in self.pieces if (g := p.grads[step]) is not None]
        squares = [
            sum(float(x.square().sum()) for x in column)
            for column in ([g for _, g in stepped], [p.before.double() for p, _ in stepped],
                           [p.whole.detach().double() - p.before.double() for p, _ in stepped])
        ]  # fmt: skip
        expected = dict(zip(("grad_norm", "param_norm", "update_norm"), map(math.sqrt, squares), strict=True))
        expected["penalty"] = sum(
            groups[p.group]["weight_decay"] / 2 * float(p.before.double().square().sum()) for p, _ in stepped
        )
        expected["nonfinite_grads"] = sum(int((~g.isfinite()).sum()) for _, g in stepped)
        figures = found.as_dict()
        for key, value in expected.items():
            # float64 sums of exact squares in another order; the update is a float32 difference there, and an exact one here.
            bound = 2**-22 if key == "update_norm" else 2000 * 2**-53
            assert (
                figures[key] == value
                or (math.isnan(value) and math.isnan(figures[key]))
                or abs(figures[key] - value) <= bound * abs(value)
            ), (step, key, figures[key], value)

    @staticmethod
    def same(ours: Any, whole: Tensor) -> None:
        own = ours._local_tensor if isinstance(ours, DTensor) else ours
        own, whole = own.detach(), whole.detach()
        assert own.shape == whole.shape
        nan = own.isnan()
        assert nan.equal(whole.isnan())
        assert own.masked_fill(nan, 0.0).equal(whole.masked_fill(nan, 0.0)), (own, whole)


@scenario
def random_setups(world: int, folder: Path) -> None:
    meshes = {
        (ranks, shape): DeviceMesh(DEVICE, torch.arange(ranks).view(shape))
        for ranks, shapes in MESHES.items()
        if ranks <= world
        for shape in shapes
    }
    for number in DRAWS[world]:
        is_alive()
        draw = Draw(number, meshes, world)
        if not draw.takes_part:
            continue
        try:
            draw.run()
        except BaseException as error:
            raise AssertionError(f"draw {number}: {draw}") from error
