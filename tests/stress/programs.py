"""Random programs of training: what is made, and what happens to it, in plain numbers and strings, so that a program can be
printed, made shorter, and run again.

    Program(optimizer="SGD", options={}, groups=[{"settings": {...}, "params": [...]}], events=[("step", {...}), ...])

An event names a tensor or a group by a number, taken modulo how many there are then: a program with a part left out is a
program, too.
"""

from __future__ import annotations

import dataclasses
import pprint
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

SHAPES = ((), (0,), (1,), (3,), (7, 5), (16,), (33,), (8, 4, 3), (130,), (1029,))
CODED = ((64, 64), (43, 3, 32))  # shapes that 8-bit states fit
LAYOUTS = ("dense", "dense", "dense", "transposed", "gaps", "offset")
LEARNING_RATES, DECAYS = (0.0, 0.1, 0.01, 0.003), (0.0, 0.1, 0.02)
# What happens between steps, each as often as it stands here.
EVENTS = (
    "lr", "lr", "tensor lr", "weight_decay", "rule", "new data", "written data", "new states", "new state dict", "no state",
    "counter", "save", "load", "load", "pickle", "copy", "add group", "remove group", "move", "freeze", "swap", "threads",
    "capability", "zero_grad", "hook", "option", "exchange checkpoints",
)  # fmt: skip


@dataclass(frozen=True)
class Program:
    optimizer: str
    options: dict[str, Any]  # of ours, beyond torch.optim
    groups: list[dict[str, Any]]
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __str__(self) -> str:
        return "Program(**" + pprint.pformat(dataclasses.asdict(self), width=128, sort_dicts=False) + ")"


def random_program(seed: int) -> Program:
    draw = random.Random(seed)
    optimizer = draw.choice(("SGD", "Adam", "AdamW"))
    plain = draw.random() < 0.5
    options = {} if plain else _options(draw, optimizer)
    if plain:
        dtypes = ("float32", "float32", "float32", "float64")
    elif options.get("max_grad_norm") is not None or options.get("amp_scaling"):
        dtypes = ("float32",) if options.get("amp_scaling") else ("float32", "bfloat16", "float16")
    else:
        dtypes = ("float32", "float64", "bfloat16", "bfloat16", "float16")
    if options.get("low_precision") in ("remainder", "remainder8"):
        dtypes = tuple(d for d in dtypes if d != "float16")
    of_group = lambda: _group(draw, optimizer, options, dtypes)  # noqa: E731
    program = Program(optimizer, options, [of_group() for _ in range(draw.randint(1, 3))])
    for _ in range(draw.randint(3, 25)):
        for _ in range(draw.choice((0, 0, 1, 1, 2, 3))):
            program.events.append(_event(draw, optimizer, options, of_group))
        program.events.append(("step", _step(draw, plain)))
    return program


def _options(draw: random.Random, optimizer: str) -> dict[str, Any]:
    modes = ("round", "master", "remainder", "remainder8", "kahan", "stochastic")
    options: dict[str, Any] = {"low_precision": draw.choice(modes)}
    if draw.random() < 0.3:
        options |= {"max_grad_norm": draw.choice((0.5, 5.0)), "norm_type": draw.choice((2.0, float("inf")))}
        options["skip_if_nonfinite"] = draw.random() < 0.5
    elif draw.random() < 0.3:
        options = {"amp_scaling": True, "low_precision": "round"}
    if draw.random() < 0.3:
        options["state_dtype"] = draw.choice(("float32", "bfloat16", "8bit"))
    if optimizer != "Adam" and draw.random() < 0.3:
        options["cautious"] = True
        options |= {"decoupled_weight_decay": True} if optimizer == "SGD" else {}
    options["statistics"] = draw.random() < 0.3
    options["seed"] = draw.randrange(100)
    return options


def _group(draw: random.Random, optimizer: str, options: dict[str, Any], dtypes: tuple[str, ...]) -> dict[str, Any]:
    settings: dict[str, Any] = {"lr": draw.choice(LEARNING_RATES[1:]), "weight_decay": draw.choice(DECAYS)}
    settings["maximize"] = draw.random() < 0.2
    if optimizer == "SGD":
        settings["momentum"] = draw.choice((0.0, 0.9, 0.5))
        settings["nesterov"] = settings["momentum"] > 0 and draw.random() < 0.4
        settings["dampening"] = 0.0 if settings["nesterov"] else draw.choice((0.0, 0.3))
    else:
        settings |= {"betas": draw.choice(((0.9, 0.999), (0.3, 0.9))), "eps": draw.choice((1e-8, 1e-3))}
        settings["amsgrad"] = draw.random() < 0.3 and options.get("state_dtype") != "8bit"
    return {"settings": settings, "params": [_param(draw, options, dtypes) for _ in range(draw.randint(1, 5))]}


def _param(draw: random.Random, options: dict[str, Any], dtypes: tuple[str, ...]) -> dict[str, Any]:
    coded = options.get("state_dtype") == "8bit" and draw.random() < 0.5
    shape, layout = draw.choice(CODED if coded else SHAPES[1:]), _layout(draw, options)
    return {"shape": shape, "dtype": draw.choice(dtypes), "layout": layout, "seed": draw.randrange(1 << 16)}


def _layout(draw: random.Random, options: dict[str, Any]) -> str:
    # Random bits follow the order of memory, which the reference does not look at.
    is_random = options.get("low_precision") in ("kahan", "stochastic", "remainder8") or options.get("state_dtype") == "8bit"
    return "dense" if is_random else draw.choice(LAYOUTS)


def _step(draw: random.Random, plain: bool) -> dict[str, Any]:
    kinds = ("new",) * 6 + ("kept", "kept", "none", "none", "gaps", "zero", "in place")
    grads = [draw.choice(kinds) for _ in range(draw.randint(1, 12))]
    if draw.random() < 0.5:
        grads = ["new"]
    special = draw.choice(("inf", "nan", "tiny")) if draw.random() < 0.05 else None
    return {"grads": grads, "seed": draw.randrange(1 << 16), "special": special, "closure": draw.random() < 0.1}


def _event(
    draw: random.Random, optimizer: str, options: dict[str, Any], of_group: Callable[[], Any]
) -> tuple[str, dict[str, Any]]:
    name = draw.choice(EVENTS)
    given: dict[str, Any] = {"of": draw.randrange(1000)}
    if name in ("lr", "tensor lr"):
        given["value"] = draw.choice(LEARNING_RATES)
    elif name == "weight_decay":
        given["value"] = draw.choice(DECAYS)
    elif name == "rule":
        choices = [("maximize", True), ("maximize", False)]
        if optimizer == "SGD":
            choices += [("momentum", 0.0), ("momentum", 0.7), ("dampening", 0.2), ("dampening", 0.0)]
        else:
            choices += [("betas", (0.8, 0.95)), ("betas", (0.4, 0.9)), ("eps", 1e-6)]
        given["key"], given["value"] = draw.choice(choices)
    elif name == "new data":
        given["layout"] = _layout(draw, options)
    elif name == "counter":
        given["value"] = draw.choice((1, 5, 1000))
    elif name == "add group":
        given["group"] = of_group()
    elif name == "move":
        given["to"] = draw.randrange(1000)
    elif name in ("threads", "capability"):
        given["value"] = draw.randrange(1, 4)
    elif name == "option":
        given["key"], given["value"] = draw.choice((("statistics", True), ("statistics", False), ("max_grad_norm", 0.3)))
        if given["key"] == "max_grad_norm" and "max_grad_norm" not in options:
            given["key"], given["value"] = "statistics", True
    return name, given


def shorter(program: Program) -> Iterator[Program]:
    """Programs with a part left out, the largest parts first."""
    size = len(program.events)
    part = size // 2
    while part:
        for start in range(0, size, part):
            yield dataclasses.replace(program, events=program.events[:start] + program.events[start + part :])
        part //= 2
    for i, group in enumerate(program.groups):
        others = program.groups[:i], program.groups[i + 1 :]
        if len(program.groups) > 1:
            yield dataclasses.replace(program, groups=[*others[0], *others[1]])
        for k in range(len(group["params"])) if len(group["params"]) > 1 else ():
            fewer = {**group, "params": group["params"][:k] + group["params"][k + 1 :]}
            yield dataclasses.replace(program, groups=[*others[0], fewer, *others[1]])
        for k, param in enumerate(group["params"]):
            for change in ({"layout": "dense"}, {"shape": (1,)}, {"shape": (3,)}):
                key = next(iter(change))
                if param[key] != change[key] and not (key == "shape" and param[key] in ((1,), (3,))):
                    params = [*group["params"][:k], {**param, **change}, *group["params"][k + 1 :]]
                    yield dataclasses.replace(program, groups=[*others[0], {**group, "params": params}, *others[1]])
    for key in program.options:
        if key not in ("low_precision", "decoupled_weight_decay"):
            yield dataclasses.replace(program, options={k: v for k, v in program.options.items() if k != key})
    for i, (name, given) in enumerate(program.events):
        if name == "step" and (given["grads"] != ["new"] or given["special"] or given["closure"]):
            plain = {**given, "grads": ["new"], "special": None, "closure": False}
            yield dataclasses.replace(program, events=[*program.events[:i], (name, plain), *program.events[i + 1 :]])


def shortest(program: Program, difference: Callable[[Program], str | None]) -> Program:
    """A program that fails in the same way (the kind of its difference), and of which no part can be left out."""

    def kind(of: Program) -> str:
        return (difference(of) or "none").split(":")[0]

    wanted, found = kind(program), True
    while found:
        found = False
        for candidate in shorter(program):
            if kind(candidate) == wanted:
                program, found = candidate, True
                break
    return program
