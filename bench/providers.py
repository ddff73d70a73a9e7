"""Who is measured: one optimizer per provider, all on the same parameters, gradients and state tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fused_l2

from .cases import Case

PROVIDERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fused_l2": (fused_l2, {}),
    "torch fused": (torch.optim, {"fused": True}),
    "torch foreach": (torch.optim, {"foreach": True}),
    "torch for-loop": (torch.optim, {"foreach": False}),
}


class Contest:
    """The parameters of a case and one optimizer per provider that steps them."""

    def __init__(self, case: Case, optimizer: str, settings: dict[str, Any], device: str = "cpu") -> None:
        torch.manual_seed(0)
        shapes, dtype = case.shapes, case.dtype
        self.params = [torch.nn.Parameter(torch.randn(s, device=device).to(dtype)) for s in shapes]
        for p in self.params:
            p.grad = torch.randn(p.shape, device=device).to(dtype)
        numbers = case.groups(shapes) if case.groups else [0] * len(shapes)
        self.optimizers = {}
        shared: dict[Any, dict[str, torch.Tensor]] = {}
        for name, (module, options) in PROVIDERS.items():
            made = getattr(module, optimizer)(self._groups(numbers, settings), **settings, **options)
            made.step()
            for p in self.params:
                for key, value in made.state[p].items():
                    if key != "step":
                        made.state[p][key] = shared.setdefault(p, {}).setdefault(key, value)
            self.optimizers[name] = made
        for made in self.optimizers.values():
            made.step()  # with the shared states, as every step that is timed

    def _groups(self, numbers: list[int], settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Param groups with an lr of their own each."""
        grouped: dict[int, list[torch.nn.Parameter]] = {}
        for number, p in zip(numbers, self.params, strict=True):
            grouped.setdefault(number, []).append(p)
        return [{"params": ps, "lr": settings["lr"] * 0.75**number} for number, ps in sorted(grouped.items())]

    def steps(self) -> dict[str, Callable[[], Any]]:
        return {name: made.step for name, made in self.optimizers.items()}


def correct(optimizer: str, settings: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> dict[str, str]:
    """Per provider: 'ok', or why its result is wrong. Ten steps against the same steps in float64.

    The bound is ten roundings of the parameter, each half a unit in the last place, and as many of an update that is no
    larger: 10 * (eps / 2) * 2, times 4 for what the update's own roundings amplify.
    """
    settings = {**settings, "lr": 1e-2}
    start = torch.linspace(-2, 2, 1003).to(dtype)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(start.shape, generator=generator).to(dtype) for _ in range(10)]

    def run(module: Any, options: dict[str, Any], as_dtype: torch.dtype) -> torch.Tensor:
        p = torch.nn.Parameter(start.to(device, as_dtype, copy=True))
        made = getattr(module, optimizer)([p], **settings, **options)
        for g in grads:
            p.grad = g.to(device, as_dtype, copy=True)
            made.step()
        return p.detach().cpu().double()

    truth = run(torch.optim, {"foreach": False}, torch.float64)
    bound = 40 * torch.finfo(dtype).eps * truth.abs().clamp_min(1)
    verdicts = {}
    for name, (module, options) in PROVIDERS.items():
        error = (run(module, options, dtype) - truth).abs() / bound
        verdicts[name] = "ok" if bool((error <= 1).all()) else f"wrong: {float(error.max()):.3g} times the allowed error"
    return verdicts
