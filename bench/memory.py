"""``python -m bench memory``: bytes per parameter that stay in memory, that a step adds for a while, and that it moves.

Counted, not timed. Resident: parameter, gradient and state tensors. Temporary: the most that a step holds in tensors of its
own. Moved: for every operation that torch dispatches in a step, the bytes of the tensors it reads and of those it writes (an
operation in place does both). fused_l2 goes around the dispatcher: its figure is that of the tensors in its update rule.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cases import OPTIMIZERS, STREAMS
from .providers import PROVIDERS
from .topic import Job, Options

NUMEL = 1 << 20
SMALL = 1024  # tensors below it (step counters) are not counted


class Counting(TorchDispatchMode):
    """Bytes that operations read and write, and the most that their results occupy at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.held = self.most_held = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        result = operation(*arguments, **keywords)
        schema = operation._schema
        if any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments):
            return result  # a view: no byte is touched
        named = [*zip(schema.arguments, arguments, strict=False), *((a, keywords.get(a.name)) for a in schema.arguments)]
        taken: set[int] = set()
        for declared, value in named:
            for tensor in _tensors(value):
                taken.add(id(tensor))
                self.moved += tensor.nbytes * (2 if _written(operation, declared) and declared.name != "out" else 1)
        for tensor in _tensors(result):
            if id(tensor) not in taken:
                self.moved += tensor.nbytes
                self._hold(tensor)
        return result

    def _hold(self, tensor: torch.Tensor) -> None:
        storage, size = tensor.untyped_storage(), tensor.untyped_storage().nbytes()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.held += size
            self.most_held = max(self.most_held, self.held)
            weakref.finalize(tensor, self._release, storage._cdata, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.held -= size


def _written(operation: Any, argument: Any) -> bool:
    # torch's fused optimizers declare gradients as written, which they do only to unscale them; here nothing is scaled.
    if operation._schema.name.startswith("aten::_fused_") and argument.name == "grads":
        return False
    return argument.alias_info is not None and argument.alias_info.is_write


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor) and leaf.numel() >= SMALL]


def jobs(options: Options) -> Iterator[Job]:
    dtypes = [options.dtype] if options.dtype else [torch.float32, torch.bfloat16]
    for optimizer in options.optimizers:
        for dtype in dtypes:
            yield Job(f"{optimizer} {dtype}", lambda _, o=optimizer, d=dtype: measure(o, d, options))


def measure(optimizer: str, dtype: torch.dtype, options: Options) -> dict[str, Any]:
    rows, absent = {}, {}
    for name in dict.fromkeys(["fused_l2", *options.providers]):
        provider = PROVIDERS[name]
        reason = provider.why_not(optimizer, options.device, dtype)
        if provider.most_tensors is not None:
            reason = "compiles its step, whose operations do not pass the dispatcher"
        if reason is not None:
            absent[name] = reason
            continue
        p = torch.nn.Parameter(torch.randn(NUMEL).to(options.device, dtype))
        p.grad = torch.randn(NUMEL).to(options.device, dtype)
        try:
            made = provider.make(optimizer, [p], OPTIMIZERS[optimizer])
            made.step()
        except ImportError:
            continue
        except Exception as error:  # a peer that fails is a line in the table, not the end of it
            absent[name] = f"{type(error).__name__}: {error}"
            continue
        states = _tensors(list(made.state[p].values()))
        with Counting() as counting:
            made.step()
        moved: float | None = counting.moved / NUMEL
        if moved == 0:  # it goes around the dispatcher; what ours moves is known
            moved = dtype.itemsize * sum(STREAMS[optimizer]) if name == "fused_l2" else None
        rows[name] = {
            "parameter and gradient": 2 * dtype.itemsize,
            "states": sum(t.nbytes for t in states) / NUMEL,
            "temporary": counting.most_held / NUMEL,
            "moved": moved,
        }
    return {"optimizer": optimizer, "dtype": str(dtype).removeprefix("torch."), "rows": rows, "not measured": absent}


def show(result: dict[str, Any]) -> str:
    columns = ("parameter and gradient", "states", "temporary", "moved")
    lines = [f"{result['optimizer']}, {result['dtype']}: bytes per parameter"]
    lines.append(f"  {'':18}" + "".join(f"{column:>24}" for column in columns))
    for name, row in result["rows"].items():
        cells = ("-" if row[c] is None else f"{row[c]:.1f}" for c in columns)
        lines.append(f"  {name:18}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)
