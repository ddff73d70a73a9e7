"""``python -m bench precision``: what is left of weight decay and of training in bfloat16, and what keeping it costs.

Five kinds of results: ``decay``, how much of it arrives over 8000 steps; ``moments``, how much of the decay of second moments
does; ``training``, a small transformer on the text of the standard library, with every mode; ``seeds``, a transformer and a CNN
with several seeds each, by what 8 bits do to them; ``speed``, bytes and time of a step. Not part of ``python -m bench all``.
"""

from __future__ import annotations

import importlib
import math
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fused_l2

from . import timing
from .providers import PROVIDERS
from .topic import Job, Options, spread
from .train import Block

MODES = ("round", "remainder", "master", "kahan", "stochastic", "remainder8")
PEERS = ("torch for-loop", "torch foreach", "torch fused", "optimi")
STEPS, ELEMENTS, WEIGHT_DECAY = 8000, 1 << 16, 0.1
TRAINING_STEPS, CONTEXT, BATCH = 500, 64, 8


def jobs(options: Options) -> Iterator[Job]:
    for lr in (3e-4, 3e-5):
        for noise in (False, True):
            yield Job(f"decay lr {lr:g}{' noise' * noise}", lambda _, lr=lr, n=noise: decay(lr, n, options))
    for beta2, steps in ((0.999, 1000), (0.9999, 2000)):
        for share in (1.0, 0.25):
            yield Job(f"moments {beta2:g} {share:g}", lambda _, b=beta2, n=steps, s=share: moments(b, n, s))
    yield Job("training", lambda _: training())
    for name in MODELS:
        yield Job(f"seeds {name}", lambda _, name=name: seeds(name))
    yield Job("speed", lambda _: speed(options.seconds))


def decay(lr: float, noise: bool, options: Options) -> dict[str, Any]:
    """AdamW at a constant lr, on weights in (0.025, 0.075), with normal gradients or with none.

    The share of decay that arrived after t steps is log(sum w_0 / sum w_t), over the same of float32 parameters. Each weight
    has a twin with the gradients' other sign, so that what gradients move leaves the sum where it is.
    """
    generator = torch.Generator().manual_seed(0)
    start = (0.05 * (torch.rand(ELEMENTS // 2, generator=generator) + 0.5)).bfloat16().repeat(2)
    pool = torch.randn(1 << 20, generator=generator) * noise
    settings = {"lr": lr, "weight_decay": WEIGHT_DECAY}
    contestants: dict[str, tuple[torch.nn.Parameter, Any]] = {}
    wide = torch.nn.Parameter(start.float())
    contestants["float32"] = wide, fused_l2.AdamW([wide], **settings)
    for mode in MODES:
        p = torch.nn.Parameter(start.clone())
        contestants[f"fused_l2 {mode}"] = p, fused_l2.AdamW([p], **settings, low_precision=mode, seed=1)
    for bits in (24, 32):
        p = torch.nn.Parameter(start.float())
        contestants[f"FlashOptim {bits} bits"] = p, FlashOptimWeights(p, bits, settings)
    absent = {}
    for name in PEERS:
        if name not in options.providers:
            continue
        p = torch.nn.Parameter(start.clone())
        try:
            contestants[name] = p, PROVIDERS[name].make("AdamW", [p], settings)
        except ImportError as error:
            absent[name] = f"not installed ({error})"
    curves: dict[str, list[float]] = {name: [] for name in contestants}
    for step in range(1, STEPS + 1):
        begin = int(torch.randint(0, len(pool) - ELEMENTS, (), generator=generator))
        half = pool[begin : begin + ELEMENTS // 2].bfloat16()
        grad = torch.cat([half, -half])
        for name, (p, optimizer) in contestants.items():
            p.grad = grad.to(p.dtype)
            optimizer.step()
            if step % 400 == 0:
                full = optimizer.master_params()[0] if name.startswith("fused_l2") else p.detach()
                curves[name].append(math.log(float(start.double().sum() / full.double().sum())))
    shares = {name: [c / t for c, t in zip(curve, curves["float32"], strict=True)] for name, curve in curves.items()}
    return {
        "case": f"decay-{lr:g}{'-noise' * noise}", "kind": "decay", "lr": lr, "weight_decay": WEIGHT_DECAY, "noise": noise,
        "steps": [400 * (i + 1) for i in range(STEPS // 400)], "shares": shares, "not measured": absent,
    }  # fmt: skip


FORMATS: dict[str, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": "8bit"}


class FlashOptimWeights:
    """The weights of FlashOptim 0.1.4, from its formula, because it runs only on GPUs: a bfloat16 number, and the rest in
    127ths (24 bits) or 32767ths (32 bits) of half its unit in the last place, rounded to nearest. AdamW's update is ours."""

    def __init__(self, p: torch.nn.Parameter, bits: int, settings: dict[str, Any]) -> None:
        self._param, self._most = p, (1 << (bits - 17)) - 1
        self._inner = fused_l2.AdamW([p], **settings)

    @torch.no_grad()
    def step(self) -> None:
        self._inner.step()
        number = self._param.bfloat16().float()
        half_unit = torch.ldexp(torch.ones_like(number), number.frexp().exponent - 9)
        rest = (self._param - number) / half_unit * self._most
        self._param.copy_(number + (rest.abs() + 0.5).floor().copysign(rest) / self._most * half_unit)


class FlashOptim:
    """The second moments of FlashOptim 0.1.4, by its formula: it runs on a GPU alone. For each 32 elements that follow one
    another the largest sqrt(v) as float16, and of each element sqrt(v) in 255ths of it, rounded to nearest."""

    def __init__(self, p: torch.nn.Parameter, beta2: float) -> None:
        self._param, self._beta2 = p, beta2
        self.v = torch.zeros_like(p.detach()).view(-1, 32)

    @torch.no_grad()
    def step(self) -> None:
        assert self._param.grad is not None
        root = self.v.lerp(self._param.grad.square().view(-1, 32), 1 - self._beta2).sqrt()
        largest = root.amax(1, keepdim=True)
        code = (255 * root / largest.clamp_min(1e-30) + 0.5).floor()
        self.v = (code / 255 * largest.half().float()).square()


def _bitsandbytes_v(optimizer: Any, p: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    state = optimizer.state[p]
    return dequantize_blockwise(state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256)


# Peers with 8-bit states that step on a CPU: where they are, and their second moments as float32.
EIGHT_BIT_PEERS: dict[str, tuple[str, Callable[[Any, Any], torch.Tensor]]] = {
    "bitsandbytes 8bit": ("bitsandbytes.optim", _bitsandbytes_v),
    "torchao 8bit": ("torchao.optim", lambda optimizer, p: optimizer.state[p]["exp_avg_sq"].dequantize()),
}


def _eight_bit_peers(params: list[torch.nn.Parameter], settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Their optimizers of these parameters, and why others are left out."""
    made, absent = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (module, _) in EIGHT_BIT_PEERS.items():
            try:
                made[name] = importlib.import_module(module).AdamW8bit(params, **settings)
            except ImportError as error:
                absent[name] = f"not installed ({error})"
    return made, absent


def moments(beta2: float, steps: int, share: float) -> dict[str, Any]:
    """AdamW's second moments without gradients, so many steps: of all elements, or of this share, evenly among others whose
    gradients go on. Before that 3 / (1 - beta2) steps have gradients. What is left of them, as the geometric mean of v / v_0,
    and the share of ln(v)'s decay that arrived."""
    generator = torch.Generator().manual_seed(0)
    level = torch.exp(0.75 * torch.randn(128, 128, generator=generator))
    resting = (torch.arange(level.numel()) % round(1 / share) == 0).view(level.shape)
    settings: dict[str, Any] = {"lr": 0.0, "betas": (0.9, beta2), "weight_decay": 0.0}

    def zeros() -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.zeros_like(level))

    contestants: dict[str, tuple[torch.nn.Parameter, Any, Callable[[Any, Any], torch.Tensor]]] = {}
    for name, dtype in FORMATS.items():
        made = fused_l2.AdamW([p := zeros()], **settings, state_dtype=dtype)
        contestants[name] = p, made, lambda o, _: o.float32_state_dict()["state"][0]["exp_avg_sq"]
    p = zeros()
    contestants["FlashOptim's formula"] = p, FlashOptim(p, beta2), lambda o, _: o.v
    peers, absent = _eight_bit_peers([p := zeros()], settings)
    for name, made in peers.items():
        contestants[name] = p, made, EIGHT_BIT_PEERS[name][1]
    left: dict[str, list[float]] = {name: [] for name in contestants}
    before: dict[str, torch.Tensor] = {}
    every, warm = steps // 20, round(3 / (1 - beta2))
    for step in range(warm + 1 + steps):
        noise = level * torch.randn(level.shape, generator=generator)
        for name, (p, optimizer, second_moments) in contestants.items():
            p.grad = noise if step <= warm else torch.where(resting, 0.0, noise)
            optimizer.step()
            if step >= warm and (step - warm) % every == 0:
                v = second_moments(optimizer, p).double().view(level.shape)[resting].log().mean()
                left[name].append(float((v - before.setdefault(name, v)).exp()))
    arrived = {name: math.log(curve[-1]) / (steps * math.log(beta2)) if curve[-1] else math.inf for name, curve in left.items()}
    return {
        "case": f"moments-{beta2:g}-{share:g}", "kind": "moments", "beta2": beta2, "share": share,
        "steps": [every * i for i in range(21)], "left": left, "arrived": arrived, "not measured": absent,
    }  # fmt: skip


def text() -> torch.Tensor:
    """The sources of some modules of the standard library, as bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = ("argparse.py", "ast.py", "datetime.py", "decimal.py", "doctest.py", "inspect.py", "tarfile.py", "typing.py")
    sources = [(folder / name).read_bytes() for name in names if (folder / name).exists()]
    return torch.frombuffer(bytearray(b"".join(sources)), dtype=torch.uint8).long()


def training() -> dict[str, Any]:
    """A character transformer in float32, and in bfloat16 throughout (activations, too), on the same batches."""
    data = text()
    runs: dict[str, tuple[torch.dtype, Callable[[Any], Any]]] = {
        "float32": (torch.float32, lambda ps: fused_l2.AdamW(ps, lr=1e-3, weight_decay=0.5)),
        **{
            f"fused_l2 {mode}": (
                torch.bfloat16,
                lambda ps, mode=mode: fused_l2.AdamW(
                    ps, lr=1e-3, weight_decay=0.5, low_precision=mode, state_dtype=torch.float32
                ),
            )
            for mode in MODES
        },
        "fused_l2 8bit": (
            torch.bfloat16,
            lambda ps: fused_l2.AdamW(ps, lr=1e-3, weight_decay=0.5, low_precision="remainder8", state_dtype="8bit"),
        ),
        "torch foreach": (torch.bfloat16, lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.5, foreach=True)),
    }
    losses: dict[str, list[float]] = {}
    norms: dict[str, list[float]] = {}
    for name, (dtype, make) in runs.items():
        torch.manual_seed(0)
        width = 128
        model = torch.nn.Sequential(
            torch.nn.Embedding(256, width), *[Block(width, 4) for _ in range(2)], torch.nn.LayerNorm(width),
            torch.nn.Linear(width, 256),
        )  # fmt: skip
        start = [p.detach().clone() for p in model.parameters()]
        model.to(dtype)
        optimizer = make(list(model.parameters()))
        if name.startswith("fused_l2"):
            optimizer.load_master_params(start)
        generator = torch.Generator().manual_seed(1)
        losses[name], norms[name] = [], []
        for step in range(TRAINING_STEPS):
            begins = torch.randint(0, len(data) - CONTEXT - 1, (BATCH,), generator=generator)
            batch = torch.stack([data[b : b + CONTEXT + 1] for b in begins.tolist()])
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses[name].append(float(loss.detach()))
            if (step + 1) % 25 == 0:
                full = optimizer.master_params() if name.startswith("fused_l2") else [p.detach() for p in model.parameters()]
                norms[name].append(math.sqrt(sum(float(w.double().square().sum()) for w in full)))
    differences = {
        name: max(abs(a - b) for a, b in zip(curve, losses["float32"], strict=True)) for name, curve in losses.items()
    }
    return {
        "case": "training", "kind": "training", "characters": len(data), "losses": losses, "norms": norms,
        "largest difference": differences, "norm, of float32's": {n: c[-1] / norms["float32"][-1] for n, c in norms.items()},
    }  # fmt: skip


class Task(NamedTuple):
    """A training: a model made anew, the next batch, and how it is stepped."""

    model: Callable[[], torch.nn.Module]
    batch: Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]]
    steps: int
    lr: float
    seeds: int


def _transformer() -> Task:
    data, width = text(), 64

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        begins = torch.randint(0, len(data) - CONTEXT - 1, (BATCH,), generator=generator)
        rows = torch.stack([data[b : b + CONTEXT + 1] for b in begins.tolist()])
        return rows[:, :-1], rows[:, 1:].flatten()

    return Task(
        lambda: torch.nn.Sequential(
            torch.nn.Embedding(256, width), *[Block(width, 4) for _ in range(2)], torch.nn.LayerNorm(width),
            torch.nn.Linear(width, 256), torch.nn.Flatten(0, 1),
        ),
        batch, TRAINING_STEPS, 4e-3, 3,
    )  # fmt: skip


def _cnn() -> Task:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(0, len(labels), (64,), generator=generator)
        return images[chosen], labels[chosen]

    def model() -> torch.nn.Module:
        conv, relu = torch.nn.Conv2d, torch.nn.ReLU()
        return torch.nn.Sequential(
            conv(1, 32, 3, padding=1), relu, conv(32, 64, 3, stride=2, padding=1), relu, conv(64, 64, 3, padding=1), relu,
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10),
        )  # fmt: skip

    # One changed bit makes it end elsewhere, so only a mean over several runs tells anything.
    return Task(model, batch, 300, 2e-3, 12)


MODELS: dict[str, Callable[[], Task]] = {"transformer": _transformer, "cnn": _cnn}
# What holds weights and states; the model computes in the first's dtype.
BYTES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32, 8-bit states": (torch.float32, {"state_dtype": "8bit"}),
    "bfloat16, remainder": (torch.bfloat16, {"low_precision": "remainder"}),
    "bfloat16, remainder8, 8-bit states": (torch.bfloat16, {"low_precision": "remainder8", "state_dtype": "8bit"}),
}


def seeds(name: str) -> dict[str, Any]:
    """Each training with several seeds: its loss at the end, |w|, and the largest update of any weight, in lr."""
    task, weight_decay = MODELS[name](), 0.1
    rows: dict[str, dict[str, list[float]]] = {who: {"loss": [], "norm": [], "update": []} for who in BYTES}
    for seed in range(task.seeds):
        for who, (dtype, options) in BYTES.items():
            torch.manual_seed(seed)
            model = task.model()
            start = [p.detach().clone() for p in model.parameters()]
            model.to(dtype)
            optimizer = fused_l2.AdamW(model.parameters(), lr=task.lr, weight_decay=weight_decay, seed=seed, **options)
            optimizer.load_master_params(start)
            generator = torch.Generator().manual_seed(100 + seed)
            losses, largest, before = [], 0.0, start
            for _ in range(task.steps):
                x, y = task.batch(generator)
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x.to(dtype) if x.is_floating_point() else x).float(), y)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
                after = optimizer.master_params()
                for w, v in zip(before, after, strict=True):
                    largest = max(largest, float((v - w * (1 - task.lr * weight_decay)).abs().max()) / task.lr)
                before = [v.clone() for v in after]
            rows[who]["loss"].append(sum(losses[-50:]) / 50)
            rows[who]["norm"].append(math.sqrt(sum(float(w.double().square().sum()) for w in before)))
            rows[who]["update"].append(largest)
    return {"case": f"seeds-{name}", "kind": "seeds", "model": name, "steps": task.steps, "lr": task.lr, "rows": rows}


def _in_caches(variants: dict[str, tuple[torch.dtype, dict[str, Any]]], seconds: float) -> dict[str, dict[str, list[float]]]:
    """A step of 65,536 elements on one thread, its call from Python included, divided by the elements: in seconds, and as a
    multiple of float32's time; quartiles."""
    shape, steps, threads = (256, 256), 20, torch.get_num_threads()
    calls: dict[str, Callable[[], None]] = {}
    for name, (dtype, options) in variants.items():
        p = torch.nn.Parameter(torch.randn(shape).to(dtype))
        p.grad = torch.randn_like(p)
        optimizer = fused_l2.AdamW([p], lr=1e-6, **options)
        optimizer.step()

        def call(step: Callable[[], object] = optimizer.step) -> None:
            for _ in range(steps):
                step()

        calls[name] = call
    torch.set_num_threads(1)
    try:
        samples = timing.interleave(calls, 5 * seconds)
    finally:
        torch.set_num_threads(threads)
    return {
        name: {
            "seconds": [s / (steps * shape[0] * shape[1]) for s in of.quartiles()],
            "of float32": timing.quartiles(timing.ratios(samples["float32"], of)),
        }
        for name, of in samples.items()
    }


def speed(seconds: float) -> dict[str, Any]:
    """AdamW on one tensor of 25M: bytes of parameter, gradient and states, bytes moved, GB/s against float32's, and what a step
    takes in the caches."""
    numel = 25_000_000
    contestants, rows = {}, {}
    states: dict[Any, torch.Tensor] = {}
    variants: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
        "float32": (torch.float32, {}),
        "float32, bfloat16 states": (torch.float32, {"state_dtype": torch.bfloat16}),
        "round, bfloat16 states": (torch.bfloat16, {}),
        **{mode: (torch.bfloat16, {"low_precision": mode, "state_dtype": torch.float32}) for mode in MODES},
        "float32, 8-bit states": (torch.float32, {"state_dtype": "8bit"}),
        "remainder8, 8-bit states": (torch.bfloat16, {"low_precision": "remainder8", "state_dtype": "8bit"}),
    }
    # In slices that 8-bit states fit.
    params = {d: torch.nn.Parameter(torch.randn(numel // 4000, 4000).to(d)) for d in (torch.float32, torch.bfloat16)}
    for p in params.values():
        p.grad = torch.randn_like(p)
    in_caches = _in_caches(variants, seconds)
    for name, (dtype, options) in variants.items():
        p = params[dtype]
        optimizer = fused_l2.AdamW([p], lr=1e-6, **options)
        optimizer.step()
        for key, value in optimizer.state[p].items():  # one set of states, so that none has the caches to itself
            if key != "step":
                optimizer.state[p][key] = states.setdefault((key, value.dtype), value)
        kept = sum(v.nbytes for k, v in optimizer.state[p].items() if k != "step") / numel
        rows[name] = {
            "parameter, gradient": 2 * dtype.itemsize, "states": kept, "moved": 3 * dtype.itemsize + 2 * kept,
        }  # fmt: skip
        contestants[name] = optimizer.step
    contestants["float32 again"] = contestants["float32"]
    samples = timing.interleave(contestants, 10 * seconds)
    for name, row in rows.items():
        per_byte = rows["float32"]["moved"] / row["moved"]
        ratios = timing.ratios(samples[name], samples["float32"])
        row["seconds"] = samples[name].quartiles()
        row["GB/s"] = numel * row["moved"] / row["seconds"][1] * 1e-9
        row["GB/s, of float32's"] = [r / per_byte for r in timing.quartiles(ratios)]
        row["in caches"] = in_caches[name]
    noise = timing.noise_floor(timing.ratios(samples["float32"], samples["float32 again"]))
    others, absent = {}, {}
    for shapes in ([(numel // 4000, 4000)], [(62, 4000)] * 100):
        rival, absent = eight_bit_speed(shapes, 5 * seconds)
        others[f"{len(shapes)} x {shapes[0][0] * shapes[0][1]:,}"] = rival
    return {"case": "speed", "kind": "speed", "rows": rows, "others": others, "not measured": absent, "noise floor": noise}


def eight_bit_speed(shapes: list[tuple[int, int]], seconds: float) -> tuple[dict[str, Any], dict[str, str]]:
    """AdamW with 8-bit states on float32 parameters of these shapes: ours, and peers in times of ours."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    settings = {"lr": 1e-6, "weight_decay": 0.01}
    peers, absent = _eight_bit_peers(params, settings)
    optimizers = {"fused_l2 8bit": fused_l2.AdamW(params, **settings, state_dtype="8bit"), **peers}
    for optimizer in optimizers.values():
        optimizer.step()  # makes states, compiles
    samples = timing.interleave({name: optimizer.step for name, optimizer in optimizers.items()}, seconds)
    ours = samples["fused_l2 8bit"]
    rows = {
        name: {"seconds": of.quartiles(), "ours_to_this": timing.quartiles(timing.ratios(ours, of))}
        for name, of in samples.items()
    }
    return rows, absent


def show(result: dict[str, Any]) -> str:
    if result["kind"] == "decay":
        head = f"share of the decay that arrived, lr {result['lr']:g}, weight_decay {result['weight_decay']}, "
        lines = [head + ("normal gradients" if result["noise"] else "no gradients") + f", {STEPS} steps"]
        return "\n".join([*lines, *(f"  {name:22}{100 * curve[-1]:>8.1f} %" for name, curve in result["shares"].items())])
    if result["kind"] == "moments":
        which = f"beta2 {result['beta2']:g}, {100 * result['share']:g} % of the elements at rest"
        lines = [f"share of the decay of second moments that arrived, {which}"]
        return "\n".join([*lines, *(f"  {name:22}{100 * share:>8.1f} %" for name, share in result["arrived"].items())])
    if result["kind"] == "training":
        lines = [
            f"transformer in bfloat16, {TRAINING_STEPS} steps",
            f"  {'':22}{'loss':>8}{'largest difference':>20}{'|w|':>8}",
        ]
        for name, curve in result["losses"].items():
            mean = sum(curve[-50:]) / 50
            norm = result["norm, of float32's"][name]
            lines.append(f"  {name:22}{mean:>8.3f}{result['largest difference'][name]:>20.3f}{norm:>8.3f}")
        return "\n".join(lines)
    if result["kind"] == "seeds":
        lines = [
            f"{result['model']}, {result['steps']} steps, {len(result['rows']['float32']['loss'])} seeds",
            f"  {'':36}{'loss, mean of 50 steps':>26}{'|w|':>10}{'largest update':>18}",
        ]
        for name, row in result["rows"].items():
            loss, norm, update = (f"{min(v):.3f} .. {max(v):.3f}" for v in (row["loss"], row["norm"], row["update"]))
            lines.append(f"  {name:36}{loss:>20}{norm:>20}{update:>16}")
        return "\n".join(lines)
    lines = [f"AdamW, one tensor of 25M, bytes per parameter, noise floor {100 * result['noise floor']:.1f} %"]
    lines.append(f"  {'':26}{'states':>8}{'moved':>8}{'ms':>8}{'GB/s':>8}{'of float32':>12}")
    for name, row in result["rows"].items():
        ratio, quartiles = spread(row["GB/s, of float32's"])
        timed = f"{1e3 * row['seconds'][1]:>8.1f}{row['GB/s']:>8.1f}{ratio:>12} ({quartiles})"
        cached, apart = row["in caches"], spread(row["in caches"]["of float32"])
        timed += f"; in caches {1e9 * cached['seconds'][1]:.2f} ns an element, {apart[0]} of float32's ({apart[1]})"
        lines.append(f"  {name:26}{row['states']:>8.2f}{row['moved']:>8.1f}{timed}")
    for case, others in result["others"].items():
        lines.append(f"AdamW with 8-bit states, float32, {case}: time / ours")
        for name, row in others.items():
            ratio, quartiles = spread(row["ours_to_this"])
            lines.append(f"  {name:26}{1e3 * row['seconds'][1]:>8.1f} ms{ratio:>8} ({quartiles})")
    return "\n".join(lines)
