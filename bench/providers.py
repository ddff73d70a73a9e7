"""Who is measured: one optimizer per provider, all on the same parameters, gradients and state tensors."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import fused_l2

from .cases import Case

Groups = list[dict[str, Any]]
Build = Callable[[str, Any, dict[str, Any]], Any]


@dataclass(frozen=True)
class Provider:
    """An optimizer that someone might use instead: what makes it, where it works, and where it is known not to.

    ``build(optimizer, groups, settings)`` takes torch.optim's settings and raises ImportError where it is not installed.
    """

    name: str
    distribution: str
    build: Build
    optimizers: tuple[str, ...] = ("AdamW", "SGD")
    devices: tuple[str, ...] = ("cpu", "cuda")
    broken: dict[tuple[str, str, torch.dtype], str] = field(default_factory=dict)  # (optimizer, device, dtype): why
    state_names: dict[str, str] = field(default_factory=dict)  # torch's name of a state: its name
    most_tensors: int | None = None  # more of them take it minutes before the first step

    @property
    def version(self) -> str:
        if self.distribution == "fused_l2":
            return fused_l2.__version__
        return importlib.metadata.version(self.distribution)

    def why_not(self, optimizer: str, device: str, dtype: torch.dtype, tensors: int = 1) -> str | None:
        """Why this provider is not measured there, or None."""
        if optimizer not in self.optimizers:
            return f"has no {optimizer} to compare"
        if device not in self.devices:
            return f"does not step tensors on {device}"
        if reason := self.broken.get((optimizer, device, dtype)):
            return reason
        if self.most_tensors is not None and tensors > self.most_tensors:
            return f"takes minutes before its first step of more than {self.most_tensors} tensors"
        return None

    def make(self, optimizer: str, groups: Any, settings: dict[str, Any]) -> Any:
        quiet = io.StringIO()  # compilers and loaders of optional kernels, which say nothing about the figures
        with warnings.catch_warnings(), contextlib.redirect_stdout(quiet):
            warnings.simplefilter("ignore")
            return self.build(optimizer, groups, settings)


def _module(name: str, **options: Any) -> Build:
    """The optimizer of torch.optim's name in that module, with torch.optim's arguments and these."""
    return lambda optimizer, groups, settings: getattr(importlib.import_module(name), optimizer)(groups, **settings, **options)


def _compiled(optimizer: str, groups: Any, settings: dict[str, Any]) -> Any:
    made = getattr(torch.optim, optimizer)(groups, **settings, foreach=True)
    made.step = torch.compile(made.step)
    return made


def _deepspeed_cpu(optimizer: str, groups: Any, settings: dict[str, Any]) -> Any:
    adam = importlib.import_module("deepspeed.ops.adam")
    return adam.DeepSpeedCPUAdam(groups, **settings, adamw_mode=True)


def _adam_w_mode(module: str) -> Build:
    def build(optimizer: str, groups: Any, settings: dict[str, Any]) -> Any:
        return importlib.import_module(module).FusedAdam(groups, **settings, adam_w_mode=True)

    return build


def _optimi(optimizer: str, groups: Any, settings: dict[str, Any]) -> Any:
    optimi = importlib.import_module("optimi")
    # Its defaults are others than torch's.
    defaults = {"AdamW": {"betas": (0.9, 0.999), "eps": 1e-8}, "SGD": {"dampening": False}}
    return getattr(optimi, optimizer)(groups, **{**defaults[optimizer], **settings})


def _bitsandbytes(optimizer: str, groups: Any, settings: dict[str, Any]) -> Any:
    return getattr(importlib.import_module("bitsandbytes.optim"), optimizer)(groups, **settings)


def _torchao(optimizer: str, groups: Any, settings: dict[str, Any]) -> Any:
    return importlib.import_module("torchao.optim")._AdamW(groups, **settings)


_FUSED_SGD = "torch fused SGD leaves most low-precision parameters as they were (pytorch issue 191763)"
PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("fused_l2", "fused_l2", _module("fused_l2")),
        Provider(
            "torch fused", "torch", _module("torch.optim", fused=True),
            broken={("SGD", "cpu", dtype): _FUSED_SGD for dtype in (torch.bfloat16, torch.float16)},
        ),
        Provider("torch foreach", "torch", _module("torch.optim", foreach=True)),
        Provider("torch for-loop", "torch", _module("torch.optim", foreach=False)),
        Provider("torch.compile", "torch", _compiled, most_tensors=50),
        Provider("DeepSpeed CPU", "deepspeed", _deepspeed_cpu, ("AdamW",), ("cpu",)),
        Provider("DeepSpeed Fused", "deepspeed", _adam_w_mode("deepspeed.ops.adam"), ("AdamW",), ("cuda",)),
        Provider("apex", "apex", _adam_w_mode("apex.optimizers"), ("AdamW",), ("cuda",)),
        Provider(
            "transformer_engine", "transformer_engine", _adam_w_mode("transformer_engine.pytorch.optimizers"),
            ("AdamW",), ("cuda",),
        ),
        Provider("optimi", "torch-optimi", _optimi),
        Provider(
            "bitsandbytes", "bitsandbytes", _bitsandbytes, ("AdamW",),
            state_names={"exp_avg": "state1", "exp_avg_sq": "state2"},
        ),
        Provider("torchao", "torchao", _torchao, ("AdamW",), most_tensors=50),
    )
}  # fmt: skip


def versions(names: list[str] | None = None) -> dict[str, str]:
    """Version of each provider that is installed, or why it is not measured at all."""
    found = {}
    for name in names or PROVIDERS:
        provider = PROVIDERS[name]
        try:
            found[name] = provider.version
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class Contest:
    """The parameters of a case and one optimizer per provider that steps them.

    ``absent`` says of every provider that was left out why.
    """

    def __init__(
        self, case: Case, optimizer: str, settings: dict[str, Any], device: str = "cpu", names: list[str] | None = None
    ) -> None:
        torch.manual_seed(0)
        shapes, dtype = case.shapes, case.dtype
        self.params = [torch.nn.Parameter(torch.randn(s, device=device).to(dtype)) for s in shapes]
        for p in self.params:
            p.grad = torch.randn(p.shape, device=device).to(dtype)
        numbers = case.groups(shapes) if case.groups else [0] * len(shapes)
        self.optimizers: dict[str, Any] = {}
        self.absent: dict[str, str] = {}
        self.verdicts: dict[str, str] = {}
        shared: dict[Any, dict[Any, torch.Tensor]] = {}
        for name in names or PROVIDERS:
            provider = PROVIDERS[name]
            reason = provider.why_not(optimizer, device, dtype, len(shapes))
            try:
                if reason is None:
                    verdict = _verdict(name, optimizer, tuple(settings.items()), dtype, device)
                    self.verdicts[name] = verdict
                    reason = None if verdict == "ok" else verdict
                if reason is None:
                    made = provider.make(optimizer, self._groups(numbers, settings), settings)
                    made.step()
            except ImportError as error:
                reason = f"not installed ({error})"
            except Exception as error:  # a peer that fails is a line in the table, not the end of it
                if name in ("fused_l2", "torch fused"):
                    raise
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if reason is not None:
                self.absent[name] = reason
                continue
            self._share(made, provider, shared)
            self.optimizers[name] = made
        for name, made in list(self.optimizers.items()):  # with the shared states, as every step that is timed
            before = [t.clone() for t in self._stepped(made)]
            made.step()
            if all(torch.equal(a, b) for a, b in zip(before, self._stepped(made), strict=True)):
                self.absent[name] = "wrong: its step changed nothing"
                del self.optimizers[name]

    def _share(self, made: Any, provider: Provider, shared: dict[Any, dict[Any, torch.Tensor]]) -> None:
        """One set of states for all whose states are of one dtype, so that none has the caches to itself."""
        names = {theirs: ours for ours, theirs in provider.state_names.items()}
        for p in self.params:
            for key, value in made.state[p].items():
                name = names.get(key, key)
                if name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                    made.state[p][key] = shared.setdefault(p, {}).setdefault((name, value.dtype), value)

    def _stepped(self, made: Any) -> list[torch.Tensor]:
        """What a step changes, of the smallest parameter."""
        p = min(self.params, key=torch.Tensor.numel)
        return [p.detach(), *(value for value in made.state[p].values() if isinstance(value, torch.Tensor) and value.ndim)]

    def _groups(self, numbers: list[int], settings: dict[str, Any]) -> Groups:
        """Param groups with an lr of their own each."""
        grouped: dict[int, list[torch.nn.Parameter]] = {}
        for number, p in zip(numbers, self.params, strict=True):
            grouped.setdefault(number, []).append(p)
        return [{"params": ps, "lr": settings["lr"] * 0.75**number} for number, ps in sorted(grouped.items())]

    def steps(self) -> dict[str, Callable[[], Any]]:
        return {name: made.step for name, made in self.optimizers.items()}


@functools.cache
def _verdict(name: str, optimizer: str, settings: Any, dtype: torch.dtype, device: str) -> str:
    return correct(PROVIDERS[name], optimizer, dict(settings), dtype, device)


def correct(provider: Provider, optimizer: str, settings: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> str:
    """'ok', or why the provider's result is wrong. Ten steps against the same steps in float64."""
    settings = {**settings, "lr": 1e-2}
    start = torch.linspace(-2, 2, 1003).to(dtype)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(start.shape, generator=generator).to(dtype) for _ in range(10)]

    def run(make: Callable[..., Any], as_dtype: torch.dtype) -> torch.Tensor:
        p = torch.nn.Parameter(start.to(device, as_dtype, copy=True))
        made = make(optimizer, [p], settings)
        for g in grads:
            p.grad = g.to(device, as_dtype, copy=True)
            made.step()
        return p.detach().cpu().double()

    truth = run(PROVIDERS["torch for-loop"].make, torch.float64)
    return agreement(run(provider.make, dtype), truth, dtype)


def agreement(found: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> str:
    """'ok', or how far ten steps in ``dtype`` are from what they are in float64.

    The bound is ten roundings of the parameter, each half a unit in the last place, and as many of an update that is no
    larger: 10 * (eps / 2) * 2, times 4 for what the update's own roundings amplify.
    """
    bound = 40 * torch.finfo(dtype).eps * truth.abs().clamp_min(1)
    error = (found - truth).abs() / bound
    return "ok" if bool((error <= 1).all()) else f"wrong: {float(error.max()):.3g} times the allowed error"
