"""``python -m fused_l2``: what a bug report needs to say about the environment; ``warmup`` and ``doctor`` are its commands."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import SGD, Adam, AdamW, __version__, capabilities, warmup
from .engines import cpu


def lines() -> list[str]:
    """Versions, then which engine serves which device."""
    found = {
        "fused_l2": __version__,
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads)",
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.platform()}, {platform.machine()}",
        "library": "loaded" if cpu.library() else "not loaded, see cpu below",
    }
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
    width = max(map(len, found))
    return [*(f"{name:{width}}  {value}" for name, value in found.items()), "", *str(capabilities()).splitlines()]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def warm(arguments: list[str]) -> list[str]:
    """``python -m fused_l2 warmup AdamW --dtype bfloat16 --arch 90 max_grad_norm=1.0 low_precision=kahan``"""
    parser = argparse.ArgumentParser(
        prog="python -m fused_l2 warmup",
        description="Compile ahead, into Triton's cache, the kernels that an optimizer's first step on a GPU needs.",
    )
    parser.add_argument("optimizer", choices=["SGD", "Adam", "AdamW"])
    parser.add_argument(
        "options", nargs="*", metavar="name=value", help="its arguments, as momentum=0.9 or state_dtype=float32"
    )
    parser.add_argument("--dtype", action="append", help="of parameters; several may be given. float32 by default")
    parser.add_argument(
        "--arch",
        action="append",
        help="90 for H100 and H200, gfx942, ...; several may be given. The GPUs that are here by default",
    )
    given = parser.parse_intermixed_args(arguments)
    options: dict[str, Any] = {"lr": 1e-3} if given.optimizer == "SGD" else {}
    for option in given.options:
        name, equals, value = option.partition("=")
        if not equals:
            parser.error(f"{option!r} is no argument of the form name=value")
        options[name] = _value(value)
    dtypes = [_value(name) for name in given.dtype or ["float32"]]
    for name, dtype in zip(given.dtype or [], dtypes, strict=False):
        if not isinstance(dtype, torch.dtype):
            parser.error(f"--dtype {name}: torch has no dtype of this name")
    params = [torch.nn.Parameter(torch.zeros(1, dtype=dtype)) for dtype in dtypes]
    architectures = [int(arch) if arch.isdecimal() else arch for arch in given.arch or []]
    try:
        optimizer = {"SGD": SGD, "Adam": Adam, "AdamW": AdamW}[given.optimizer](params, **options)
        done = warmup(optimizer, *architectures)
    except (TypeError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    return [f"{w.architecture:8} {w.kernel:24} {w.seconds:6.2f} s" for w in done]


def _value(text: str) -> Any:
    """A Python literal, a dtype by its name, or else the text itself."""
    if isinstance(dtype := getattr(torch, text, None), torch.dtype):
        return dtype
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    from .doctor import command as doctor

    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["warmup"]:  # which mixes options with arguments, as a subcommand cannot
        sys.stdout.write("\n".join(warm(given[1:])) + "\n")
        return 0
    parser = argparse.ArgumentParser(
        "python -m fused_l2", description="Without a command: versions, and which engine serves what."
    )
    parser.add_argument("--version", action="version", version=f"fused_l2 {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="command")
    commands.add_parser("warmup", help="compile ahead the kernels of an optimizer's first step on a GPU", add_help=False)
    doctor.add_arguments(commands.add_parser("doctor", help="say what the optimizers of a script, or a checkpoint, really do"))
    chosen = parser.parse_args(given)
    if chosen.command == "doctor":
        return doctor.run(chosen)
    sys.stdout.write("\n".join(lines()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
