"""Compile ahead what an optimizer's first step on a GPU needs: into an image, or before a job starts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .engines import cuda
from .engines.device_tables import ROWS, words_of_a_launch
from .optimizer import FusedOptimizer, check_is_ours
from .parameters.entry import GroupNeeds
from .step.hyperparameters import is_on_device
from .tables import coefficients
from .tables.tensor_table import DTYPES, Rule


class Warmed(NamedTuple):
    """A kernel that was compiled, or found in Triton's cache."""

    kernel: str  # as profilers name it
    architecture: str
    seconds: float


def warmup(optimizer: FusedOptimizer, *architectures: int | str) -> list[Warmed]:
    """Compile the Triton kernels that ``optimizer.step()`` launches for CUDA tensors, into Triton's cache
    (``TRITON_CACHE_DIR``, ``~/.triton/cache`` by default), where processes of the same Triton and fused_l2 find them.

    Parameters may be on any device, "meta" as well: what counts is their dtypes, the groups' hyperparameters and the options.
    Nothing is changed and no state is made. Gradients are taken to have their parameter's dtype where there are none yet.

    Args:
        optimizer: one of fused_l2, with the parameters, param groups and options of the training.
        architectures: of NVIDIA GPUs by number (80 for A100, 90 for H100 and H200, 100 for B200, 120 for RTX 50), of AMD
            ones by name ("gfx942"). No such GPU has to be there. By default the GPUs of this machine, for which kernels are
            loaded, too.

    Returns:
        What was compiled, with the seconds that it took.

    Raises:
        RuntimeError: if Triton is missing or refuses a kernel, or if no architecture is given and there is no GPU.
    """
    check_is_ours(optimizer, "warmup")
    if reason := cuda.why_unavailable():
        raise RuntimeError(f"There is nothing to compile kernels with: {reason}")
    for architecture in architectures:
        if isinstance(architecture, str) and not architecture.startswith("gfx"):
            raise ValueError(f"an architecture is a number as 90 or a name as 'gfx942', got {architecture!r}")
        if isinstance(architecture, bool) or not isinstance(architecture, (int, str)):
            raise TypeError(f"an architecture is a number as 90 or a name as 'gfx942', got {architecture!r}")
    here = [] if architectures else [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if not architectures and not here:
        raise RuntimeError("There is no GPU here. Name the architectures to compile for: warmup(optimizer, 90)")
    cuda.triton_version()  # imports what compiles, which takes longer than finding a kernel in the cache
    done = []
    for where in architectures or here:
        for kind, *signature in kernels_of(optimizer):
            start = time.perf_counter()
            if isinstance(where, torch.device):
                name, architecture = cuda.device(where).compile(kind, *signature).name, str(where)
            else:
                name, architecture = cuda.compile_ahead(where, kind, *signature)
            done.append(Warmed(name, architecture, time.perf_counter() - start))
    return done


def kernels_of(optimizer: FusedOptimizer) -> list[tuple[Any, ...]]:
    """What each kernel is compiled from: its kind, and the arguments of the function of that name in kernels/launch.py."""
    return list(dict.fromkeys(_kernels_of(optimizer)))


def _kernels_of(optimizer: FusedOptimizer) -> Iterator[tuple[Any, ...]]:
    rule, options, groups = optimizer._stepper.rule, optimizer._stepper.options, optimizer.param_groups
    values = [rule.Values(*rule.read(group)) for group in groups]
    on_device = rule.counts_on_device(options, groups) or any(is_on_device(v) for vs in values for v in _flat(vs))
    buckets: dict[tuple[Any, ...], list[int]] = {}  # the group of each tensor
    dtypes = set()
    for index, (group, of_group) in enumerate(zip(groups, values, strict=True)):
        flags = rule.flags(of_group, options)
        names = rule.state_names(flags)
        capturable = bool(group.get("capturable", False))
        needs = GroupNeeds(flags, names, frozenset(), rule.counts, capturable, options.precision)
        for param in group["params"]:
            if param.dtype not in DTYPES or not param.requires_grad:
                continue
            kind, held = needs.of(param), optimizer.state.get(param, {})
            grad = param.grad.dtype if param.grad is not None else getattr(param, "grad_dtype", None) or param.dtype
            state = kind.wanted or (held[names[0]].dtype if names and names[0] in held else param.dtype)
            buckets.setdefault((kind.flags, param.dtype, grad, state if names else param.dtype), []).append(index)
            dtypes.add(param.dtype)
    for (flags, param, grad, state), of_tensors in buckets.items():
        opmath = torch.float64 if param is torch.float64 else torch.float32
        yield "step", rule.rule, flags, param, grad, state
        if on_device:
            yield "coefficients", rule.rule, flags, opmath, ROWS
        if on_device or rule.rule is Rule.SGD:
            count = len(set(of_tensors))
            head = 16 * coefficients.NUMBERS if on_device else coefficients.WIDTH * opmath.itemsize
            yield "write", words_of_a_launch(head * count, len(of_tensors))
        if options.decides and options.clips:
            yield "measure", grad, options.is_largest
    if options.decides:
        yield "control", options.is_largest, torch.float64 if dtypes == {torch.float64} else torch.float32


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from value
        else:
            yield value
