"""What moves around an optimizer between two steps: gradients, tensors, groups, hooks, owners, interrupts.

A plan lives through all of that and is mended. The expected bits come from twins: an optimizer whose plan is dropped before
each step, so that it has none to be out of date, and torch.optim's.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import sys
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from comparing import CASES, assert_same_bits, assert_unchanged, each, make, make_params, plan_of, run, set_grads, snapshot
from conftest import needs_library
from torch import Tensor, nn

import fused_l2
from fused_l2.engines.cpu_part import CpuPart
from fused_l2.engines.watch import NativeLook
from fused_l2.step import entry_maker, stepper
from fused_l2.step.plan import Plan
from fused_l2.tables import coefficients

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = (5, 64, 0, 33, 1, 17, 8)
STEPS = 9
WARM_UP = 2  # steps with every gradient, before things move


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """Whatever was there before takes no part in collections here, which are then fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class World:
    """Seven parameters in two groups under one optimizer, another optimizer beside it, and what was put aside."""

    def __init__(self, module: Any, name: str, **options: Any) -> None:
        self.params = make_params(SIZES)
        groups = [{"params": self.params[:4]}, {"params": self.params[4:], "lr": 0.02, "weight_decay": 0.0}]
        self.optimizer = getattr(module, name)(groups, **CASES[name], **options)
        self.others = make_params((3, 4))
        self.other = fused_l2.AdamW(self.others, lr=0.1)
        self.step_other()

    def step_other(self) -> None:
        set_grads(self.others, 0)
        self.other.step()

    def prepare(self, event: Any, step: int) -> None:
        """Bring about what the next step finds."""
        set_grads(self.params, step)
        if step >= WARM_UP:
            event(self, step)

    def run(self, event: Any, steps: int = STEPS) -> World:
        for step in range(steps):
            self.prepare(event, step)
            self.optimizer.step()
        return self

    def results(self) -> list[Tensor]:
        """Parameters and every state there is."""
        found: list[Tensor] = [p.detach() for p in self.params]
        for p in self.params:
            own = self.optimizer.state.get(p, {})
            found += [own[key] for key in sorted(own) if isinstance(own[key], Tensor) and key != "mine"]
        return found


class Fresh(World):
    """The same without a plan that could be out of date."""

    def run(self, event: Any, steps: int = STEPS) -> World:
        for step in range(steps):
            self.prepare(event, step)
            self.optimizer.drop_plan()
            self.optimizer.step()
        return self


# Gradients that come and go.


def drop_at_random(world: World, step: int) -> None:
    draws = torch.rand(len(world.params), generator=torch.Generator().manual_seed(step)).tolist()
    for p, draw in zip(world.params, draws, strict=True):
        if draw < 0.5:
            p.grad = None


def two_heads_by_turns(world: World, step: int) -> None:
    for p in world.params[1:3] if step % 2 else world.params[3:6]:
        p.grad = None


def freeze_layers(world: World, step: int) -> None:
    frozen = step // 3 % 3
    for i, p in enumerate(world.params):
        p.requires_grad_(i % 3 != frozen)
        if not p.requires_grad:
            p.grad = None


def no_gradient_at_all(world: World, step: int) -> None:
    if step % 3:
        for p in world.params:
            p.grad = None


# Tensors and dictionaries that are replaced.


def new_data(world: World, step: int) -> None:
    for p in world.params:
        p.data = p.data.clone()


def new_states(world: World, step: int) -> None:
    for p in world.params:
        own = world.optimizer.state[p]
        for key, value in list(own.items()):
            own[key] = value.clone()


def new_state_data(world: World, step: int) -> None:
    for p in world.params:
        for value in world.optimizer.state[p].values():
            value.data = value.data.clone()


def new_dictionaries(world: World, step: int) -> None:
    state = world.optimizer.state
    for p in world.params:
        state[p] = type(state[p])({key: value.clone() for key, value in state[p].items()})


def new_states_of_parameters_without_a_gradient(world: World, step: int) -> None:
    new_states(world, step)
    drop_at_random(world, step)


def foreign_keys(world: World, step: int) -> None:
    for p in world.params:
        own = world.optimizer.state[p]
        if step % 3 == 0:
            own["mine"] = torch.full((4,), float(step))
        elif step % 3 == 1:
            own.update({"mine": step, "names": ["a"]})
        else:
            own.pop("mine", None)
            own.setdefault("mine", 1)
    world.optimizer.state["of all"] = step


# What happens to others.


def state_of_another(world: World, step: int) -> None:
    world.other.state.clear()
    world.step_other()
    for own in world.other.state.values():
        own["exp_avg"] = own["exp_avg"].clone()
    world.other.load_state_dict(world.other.state_dict())


def lr_of_another(world: World, step: int) -> None:
    for group in world.other.param_groups:
        group["lr"] = 0.1 / step


def own_lr(world: World, step: int) -> None:
    for i, group in enumerate(world.optimizer.param_groups):
        group["lr"] = 0.01 / (step + i)


# Groups and parameters that are new.


def a_group_is_added(world: World, step: int) -> None:
    if step == 5:
        world.params += make_params((6, 40), seed=1)
        world.optimizer.add_param_group({"params": world.params[-2:], "lr": 0.03})
        set_grads(world.params, step)


def a_parameter_is_exchanged(world: World, step: int) -> None:
    if step == 5:
        (new,) = make_params(SIZES[1:2], seed=1)
        new.grad = world.params[1].grad
        world.params[1] = world.optimizer.param_groups[0]["params"][1] = new


def states_are_deleted(world: World, step: int) -> None:
    if step == 5:
        del world.optimizer.state[world.params[1]]
        world.optimizer.state[world.params[3]].clear()


Event = Callable[[World, int], None]
# Which parameters get an entry anew, and in which step. It is made when there is a gradient.
EVENTS: dict[str, tuple[Event, dict[int, list[int]]]] = {
    "modules are left out at random": (drop_at_random, {}),
    "two heads by turns": (two_heads_by_turns, {}),
    "layers are frozen and unfrozen": (freeze_layers, {}),
    "steps without any gradient": (no_gradient_at_all, {}),
    "new data": (new_data, {}),
    "states replaced by clones": (new_states, {}),
    "new data of states": (new_state_data, {}),
    "new dictionaries": (new_dictionaries, {}),
    "states replaced while gradients are away": (new_states_of_parameters_without_a_gradient, {}),
    "somebody else's keys in the state": (foreign_keys, {}),
    "the state of another optimizer": (state_of_another, {}),
    "the lr of another optimizer": (lr_of_another, {}),
    "its own lr": (own_lr, {}),
    "a group is added": (a_group_is_added, {5: [7, 8]}),
    "a parameter is exchanged": (a_parameter_is_exchanged, {5: [1]}),
    "states are deleted": (states_are_deleted, {5: [1, 3]}),
}
events = pytest.mark.parametrize("event", EVENTS)


class Made:
    """What was made: plans, and entries by their parameter."""

    def __init__(self) -> None:
        self.plans = 0
        self.params: list[Any] = []

    def entries(self, world: World) -> list[int]:
        return sorted({i for i, p in enumerate(world.params) for q in self.params if p is q})


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    counted = Made()

    def counting_plans(*args: Any) -> Plan:
        counted.plans += 1
        return Plan(*args)

    monkeypatch.setattr(stepper, "Plan", counting_plans)

    def counting(make: Any) -> Any:
        def counted_make(param: Any, *args: Any, **kwargs: Any) -> Any:
            counted.params.append(param)
            return make(param, *args, **kwargs)

        return counted_make

    for name in ("make_entry", "plain_entry"):
        monkeypatch.setattr(entry_maker, name, counting(getattr(entry_maker, name)))
    return counted


@each
@events
def test_the_bits_are_those_of_an_optimizer_without_a_plan_and_of_torchs(name: str, event: str, exact_sqrt: Any) -> None:
    happens, _ = EVENTS[event]
    mended = World(fused_l2, name).run(happens)
    assert_same_bits(mended.results(), Fresh(fused_l2, name).run(happens).results(), "without a plan")
    assert_same_bits(mended.results(), World(torch.optim, name).run(happens).results(), "torch.optim")


@each
@events
def test_a_change_costs_what_changed_and_no_more(name: str, event: str, made: Made) -> None:
    """No new plan, and entries for what is new alone: a step's cost does not grow with what did not change."""
    happens, expected = EVENTS[event]
    world = World(fused_l2, name)
    for step in range(STEPS):
        world.prepare(happens, step)
        made.plans, made.params = 0, []
        world.optimizer.step()
        if step == 0:
            assert made.plans == 1
            assert made.entries(world) == list(range(len(SIZES)))
            if type(plan_of(world.optimizer)._look) is not NativeLook:
                pytest.skip("the fast way to look at tensors is not there: what moved is made anew")
            continue
        assert made.plans == 0
        assert made.entries(world) == expected.get(step, []), f"step {step}"


@each
def test_two_parameters_may_trade_step_counts_within_one_step(name: str, exact_sqrt: Any) -> None:
    """Coefficients belong to a step count: one parameter's row of them is free once its gradient is gone, and another takes it,
    while a third comes with the count of the first."""
    turns = [(0, 1, 2, 3), (1, 2, 3), (2, 3), (2,), (1,), (0, 2, 3), (1, 3), (0, 1, 2, 3)]

    def happens(world: World, step: int) -> None:
        for i, p in enumerate(world.params):
            if i not in turns[step - WARM_UP]:
                p.grad = None

    steps = WARM_UP + len(turns)
    mended = World(fused_l2, name).run(happens, steps)
    assert_same_bits(mended.results(), World(torch.optim, name).run(happens, steps).results())


def test_a_first_step_that_was_skipped_is_still_to_be_made() -> None:
    """SGD takes a tensor's first gradient undampened: also if a skipped step has seen one before, and others went ahead."""
    ends = []
    for fresh in (False, True):
        params = make_params((4, 4))
        optimizer = fused_l2.SGD(params, lr=1.0, momentum=0.9, dampening=0.5, max_grad_norm=math.inf, skip_if_nonfinite=True)
        for first, second in ((1.0, math.inf), (1.0, None), (1.0, 1.0)):
            for p, g in zip(params, (first, second), strict=True):
                p.grad = None if g is None else torch.full((4,), g)
            if fresh:
                optimizer.drop_plan()
            optimizer.step()
        ends.append(params)
    assert_same_bits(*ends)


# Norms and statistics: figures of the step, not of its history.


class Measured(World):
    """More kinds of tensors: 16 bits, and strides that the plain PyTorch engine steps."""

    def __init__(self, module: Any, name: str, **options: Any) -> None:
        super().__init__(module, name, **options)
        generator = torch.Generator().manual_seed(2)
        strided = nn.Parameter(torch.randn(30, generator=generator)[::2])
        (half,) = make_params((21,), torch.bfloat16)
        self.params += [strided, half]
        self.optimizer.add_param_group({"params": self.params[len(SIZES) :]})


def figures(world: World) -> dict[str, Any]:
    """Everything that the last step tells."""
    statistics = world.optimizer.statistics
    return {
        "norm": world.optimizer.grad_norm.item().hex(),
        "all": statistics.as_dict(),
        "by group": [str(group.as_dict()) for group in statistics.by_group()],
        "by tensor": {key: str(figure.as_dict()) for key, figure in statistics.by_tensor().items()},
    }


STEADY = [key for key in EVENTS if key != "steps without any gradient"]


@each
@pytest.mark.parametrize(("event", "norm_type"), [*((key, 2.0) for key in STEADY), (STEADY[0], math.inf)])
def test_norm_and_statistics_do_not_depend_on_what_came_and_went(name: str, event: str, norm_type: float) -> None:
    happens, _ = EVENTS[event]
    options = {"max_grad_norm": 1.0, "norm_type": norm_type, "statistics": True}
    mended, fresh = Measured(fused_l2, name, **options), Measured(fused_l2, name, **options)
    for step in range(STEPS):
        for world in (mended, fresh):
            world.prepare(happens, step)
        fresh.optimizer.drop_plan()
        for world in (mended, fresh):
            world.optimizer.step()
        found = figures(mended)
        assert found == figures(fresh), f"step {step}"
        with_gradient = {
            f"{g}.{i}"
            for g, group in enumerate(mended.optimizer.param_groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None
        }
        assert found["by tensor"].keys() == with_gradient
    assert_same_bits(mended.results(), fresh.results())


@each
def test_norm_and_statistics_of_memory_that_parameters_share(name: str) -> None:
    """The second of two such parameters is stepped after the first, by plain PyTorch: where the first has no gradient, too,
    or else figures would depend on whether it ever had one."""
    found = []
    for fresh in (False, True):
        generator = torch.Generator().manual_seed(0)
        shared = torch.randn(20001, generator=generator)
        params = [nn.Parameter(shared), nn.Parameter(shared[10000:])]
        optimizer = make(name, params, max_grad_norm=1.0, statistics=True)
        for with_gradient in ((0, 1), (1,)):
            for i, p in enumerate(params):
                grad = torch.randn(p.shape, generator=generator)
                p.grad = grad if i in with_gradient else None
            if fresh:
                optimizer.drop_plan()
            optimizer.step()
        found.append((optimizer.grad_norm.item().hex(), optimizer.statistics.as_dict()))
    assert found[0] == found[1]


# A long time of it.


def group_of_a_while(world: World, step: int) -> None:
    """A group is added, and two steps later it is gone again."""
    if len(world.params) == len(SIZES):
        world.params += make_params((6, 40), seed=1)
        world.optimizer.add_param_group({"params": world.params[-2:], "lr": 0.03})
    else:
        for p in world.params[len(SIZES) :]:
            world.optimizer.state.pop(p, None)
        del world.params[len(SIZES) :], world.optimizer.param_groups[2:]


CHURN = [
    *(happens for happens, expected in EVENTS.values() if not expected),
    group_of_a_while,
    lambda world, step: world.optimizer.state.pop(world.params[3]),
    lambda world, step: world.optimizer.load_state_dict(world.optimizer.state_dict()),
    lambda world, step: setattr(world.optimizer, "statistics", step % 2 == 0),
    group_of_a_while,
]


def churn(world: World, step: int) -> None:
    for p in world.params:
        p.requires_grad_(True)
        p.grad = torch.ones_like(p)
    CHURN[step % len(CHURN)](world, step)


def held(root: Any) -> dict[str, int]:
    """How much there is in all containers of an object and of those of ours that it holds, by class and attribute."""
    found: dict[str, int] = {}
    seen: set[int] = set()

    def visit(value: Any, name: str) -> None:
        if id(value) in seen or isinstance(value, (Tensor, str, bytes, type)) or callable(value):
            return
        seen.add(id(value))
        if isinstance(value, array):
            found[name] = found.get(name, 0) + len(value)
        elif isinstance(value, (list, tuple, set, frozenset, Mapping)):
            found[name] = found.get(name, 0) + len(value)
            for item in list(value.values()) if isinstance(value, Mapping) else list(value):
                visit(item, name + "[]")
        elif type(value).__module__.startswith("fused_l2"):
            names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
            for attribute in names:
                visit(getattr(value, attribute, None), f"{type(value).__name__}.{attribute}")

    visit(root, "")
    return found


CYCLES = 112  # 2016 steps


@each
def test_a_long_run_holds_what_a_short_one_holds(name: str) -> None:
    """Nothing that a change leaves behind: plans live for as long as a run."""
    run(lambda params: make(name, params), make_params((1,)), 200)  # caches that have a bound are full from here on
    world, found, counts = World(fused_l2, name, max_grad_norm=1.0), [], []
    new_data_at = CHURN.index(new_data)  # a point of the cycle where all have a gradient
    at = [new_data_at + len(CHURN) * cycle for cycle in (0, 1, 2, CYCLES)]  # looking fills caches, too
    for step in range(at[-1] + 1):
        churn(world, step)
        world.optimizer.step()
        if step in at:
            gc.collect()
            counts.append((len(gc.get_objects()), sys.getallocatedblocks()))
            found.append(json.dumps(held(world.optimizer._stepper)))  # one block
    short, long = map(json.loads, found[-2:])
    # Step counts of single parameters part in time, and each has coefficients of its own, at most one row for each entry. Their
    # tables are doubled when they are too small: twice as many rows.
    rows = 2 * len(world.params)
    by_count = {"Bucket.groups": 1, "Bucket._members": 1, "Bucket._are_wide": 1, "Bucket._known": 1, "TensorTable.steps": 1}
    by_count["TensorTable.scalars"] = coefficients.WIDTH
    for key, width in by_count.items():
        key = next((k for k in long if k.endswith(key)), None)
        if key is not None:
            assert long.pop(key) <= max(short.pop(key, 0), rows * width), key
    assert long == short
    (objects, blocks), (objects_later, blocks_later) = counts[-2:]
    # An object that is left behind in each turn of the cycle would make as many as there were turns.
    assert objects_later - objects < (CYCLES - 2) / 2
    # Blocks of memory are fewer than one for every other step: numbers and names that Python keeps come and go by hundreds.
    assert blocks_later - blocks < (at[-1] - at[-2]) / 2


# Who owns whom.


@contextmanager
def without_collector() -> Iterator[None]:
    """What is freed here is freed by its last owner."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def backward(model: nn.Module, step: int = 0) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
    model(x).square().sum().backward()


class Agent:
    """Holds a model and its optimizer. The model's parameters hold the agent."""

    def __init__(self, name: str, how: str, in_backward: bool) -> None:
        self.model = make_model()
        self.optimizer = make(name, self.model.parameters())
        if in_backward:
            fused_l2.step_in_backward(self.optimizer)
        for p in self.model.parameters():
            if how == "hook":
                p.register_hook(self.limited)
            else:
                p.owner = self

    def limited(self, grad: Tensor) -> Tensor:
        return grad.clamp(-1, 1)


@each
@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "step_in_backward"])
@pytest.mark.parametrize("how", ["hook", "attribute"])
def test_a_cycle_through_a_parameter_is_collected(name: str, how: str, in_backward: bool) -> None:
    """A plan is no owner that Python's collector cannot see."""
    agent = Agent(name, how, in_backward)
    for step in range(3):
        agent.optimizer.zero_grad()
        backward(agent.model, step)
        agent.optimizer.step()
    watched = [weakref.ref(x) for x in (agent, agent.optimizer, *agent.model.parameters())]
    watched += [weakref.ref(t) for own in agent.optimizer.state.values() for t in own.values()]
    del agent
    gc.collect()
    assert [w() for w in watched] == [None] * len(watched)


USES: dict[str, Callable[[Any, nn.Module], Any]] = {
    "steps": lambda o, m: None,
    "state dicts": lambda o, m: o.load_state_dict(o.state_dict()),
    "results": lambda o, m: (o.grad_norm, o.statistics.as_dict(), o.step_was_skipped, repr(o), o.options),
    "options": lambda o, m: (setattr(o, "cautious", False), setattr(o, "max_grad_norm", None)),
    "weights": lambda o, m: o.load_master_params(o.master_params()),
    "a copy": lambda o, m: copy.deepcopy(o),
    "a hook that is gone": lambda o, m: o.register_step_pre_hook(lambda *_: None).remove(),
}


def warm_up(name: str, model: nn.Module) -> None:
    """What torch imports at the first optimizer of a process counts as an owner of it."""
    backward(model)
    make(name, model.parameters()).step()
    model.zero_grad()


@each
@pytest.mark.parametrize("use", USES)
def test_an_optimizer_is_freed_by_its_last_owner(name: str, use: str) -> None:
    """It does not wait for the collector, as torch.optim's do not."""
    model = make_model()
    warm_up(name, model)
    with without_collector():
        optimizer = make(name, model.parameters(), statistics=True, max_grad_norm=1.0)
        backward(model)
        optimizer.step()
        USES[use](optimizer, model)
        optimizer.step()
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None


@each
@pytest.mark.parametrize("module", [torch.optim, fused_l2], ids=["torch", "fused_l2"])
def test_states_and_parameters_are_freed_with_their_owners(name: str, module: Any) -> None:
    """The memory is there for the next model at once, as with torch.optim."""
    warm_up(name, make_model())
    with without_collector():
        model = make_model()
        optimizer = getattr(module, name)(model.parameters(), **CASES[name])
        backward(model)
        optimizer.step()
        states = [weakref.ref(t) for own in optimizer.state.values() for t in own.values()]
        params = [weakref.ref(p) for p in model.parameters()]
        del optimizer
        assert [w() for w in states] == [None] * len(states)
        del model
        assert [w() for w in params] == [None] * len(params)


@each
def test_an_optimizer_dropped_after_step_in_backward_steps_nothing(name: str) -> None:
    model = make_model()
    warm_up(name, model)
    with without_collector():
        optimizer = make(name, model.parameters())
        fused_l2.step_in_backward(optimizer)
        backward(model)
        optimizer.step()
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
        before = [p.detach().clone() for p in model.parameters()]
        backward(model)
        assert_same_bits([p.detach() for p in model.parameters()], before)
        assert all(p.grad is not None for p in model.parameters())


@each
def test_an_optimizer_dropped_after_step_in_backward_holds_no_states(name: str) -> None:
    """The hooks stay with the parameters. They hold nothing of an optimizer that is gone."""
    model = make_model()
    optimizer = make(name, model.parameters())
    fused_l2.step_in_backward(optimizer)
    backward(model)
    optimizer.step()
    states = [weakref.ref(t) for own in optimizer.state.values() for t in own.values()]
    del optimizer
    gc.collect()
    assert [w() for w in states] == [None] * len(states)


REPLACEMENTS: dict[str, Callable[[Any, Any], Any]] = {
    "load_state_dict": lambda optimizer, saved: optimizer.load_state_dict(saved),
    "clear": lambda optimizer, saved: optimizer.state.clear(),
    "clear each": lambda optimizer, saved: [own.clear() for own in optimizer.state.values()],
}


@each
@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "step_in_backward"])
@pytest.mark.parametrize("how", REPLACEMENTS)
def test_replaced_states_are_freed_at_once(name: str, how: str, in_backward: bool) -> None:
    """Loading a checkpoint does not take memory for two."""
    model = make_model()
    optimizer = make(name, model.parameters())
    if in_backward:
        fused_l2.step_in_backward(optimizer)
    backward(model)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    key = "momentum_buffer" if name == "SGD" else "exp_avg"
    with without_collector():
        watched = [weakref.ref(own[key]) for own in optimizer.state.values()]
        assert watched
        REPLACEMENTS[how](optimizer, saved)
        assert [w() for w in watched] == [None] * len(watched)


def refused(optimizer: Any, model: nn.Module) -> None:
    try:
        optimizer.step()
    except RuntimeError:
        return
    raise AssertionError("it was not refused")


def scaled(optimizer: Any, model: nn.Module) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert bool(optimizer.step_was_skipped)


# Options, what the gradients are, and how the step is made.
STEPS_MADE: dict[str, tuple[dict[str, Any], float, Any]] = {
    "ordinary": ({}, 1.0, lambda o, m: o.step()),
    "clipped": ({"max_grad_norm": 1.0, "statistics": True}, 1.0, lambda o, m: o.step()),
    "skipped": ({"max_grad_norm": 1.0, "skip_if_nonfinite": True, "statistics": True}, math.inf, lambda o, m: o.step()),
    "refused": ({"max_grad_norm": 1.0, "error_if_nonfinite": True}, math.inf, refused),
    "skipped by a GradScaler": ({"amp_scaling": True}, math.inf, scaled),
    "a bad gradient": ({}, 1.0, refused),
}


@each
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("made_how", STEPS_MADE)
def test_gradients_are_free_after_zero_grad_whatever_became_of_the_step(name: str, made_how: str, first: bool) -> None:
    """The next forward pass needs their memory: no plan may keep them."""
    options, factor, step = STEPS_MADE[made_how]
    model = make_model()
    optimizer = make(name, model.parameters(), **options)
    if not first:
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    with without_collector():
        backward(model)
        for p in model.parameters():
            p.grad = p.grad * factor
            if p.dim() == 2:  # gradients that are copied, too
                p.grad = p.grad.t().contiguous().t()
        if made_how == "a bad gradient":
            p.grad = torch.ones(2).to_sparse()
        watched = [weakref.ref(p.grad) for p in model.parameters()]
        step(optimizer, model)
        optimizer.zero_grad()
        assert [w() for w in watched] == [None] * len(watched)


# Parameters that are swapped for others.


def swap_all(model: nn.Module) -> None:
    for p in model.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))


@contextmanager
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def load_with_swaps(model: nn.Module) -> None:
    with swapping():
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})


def convert_with_swaps(model: nn.Module) -> None:
    with swapping():
        model.to(torch.float64)
        model.to(torch.float32)


SWAPS = {"swap_tensors": swap_all, "load_state_dict": load_with_swaps, "to": convert_with_swaps}


@each
@pytest.mark.parametrize("when", ["before zero_grad", "after zero_grad"])
@pytest.mark.parametrize("how", SWAPS)
def test_parameters_are_swapped_between_steps(name: str, how: str, when: str, exact_sqrt: Any) -> None:
    """Code that swaps tensors never heard of plans: none may stand in its way, and none may be fooled."""
    ends = []
    for module in (fused_l2, torch.optim):
        model = make_model()
        optimizer = getattr(module, name)(model.parameters(), **CASES[name])
        for step in range(5):
            backward(model, step)
            optimizer.step()
            if when == "after zero_grad":
                optimizer.zero_grad()
                SWAPS[how](model)
            else:
                if how == "swap_tensors":
                    for p in model.parameters():
                        other = nn.Parameter(p.detach().clone())
                        other.grad = p.grad
                        torch.utils.swap_tensors(p, other)
                else:
                    SWAPS[how](model)
                optimizer.zero_grad()
        ends.append([p.detach() for p in model.parameters()])
    assert_same_bits(*ends)


# Interrupts.


class Interrupted:
    """Raises KeyboardInterrupt from a method, before or after it has done its work, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, of: type, method: str, when: str) -> None:
        self.armed, original = True, getattr(of, method)

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            armed, self.armed = self.armed, False
            if armed and when == "before":
                raise KeyboardInterrupt
            result = original(*args, **kwargs)
            if armed:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(of, method, interrupted)


MOMENTS = {
    "Plan.refresh": (Plan, "refresh"),
    "Plan.prepare": (Plan, "prepare"),
    "Plan.commit": (Plan, "commit"),
    "a part's settle": (CpuPart, "settle"),
    "a part's launch": (CpuPart, "launch"),
    "Plan.release": (Plan, "release"),
}
MADE = {("a part's launch", "after"), ("Plan.release", "before"), ("Plan.release", "after")}  # the step
COMMITTED = {*MADE, ("Plan.commit", "after"), ("a part's launch", "before")}  # new state


@pytest.mark.sweep(5)
@each
@pytest.mark.parametrize("kind", ["first step", "later step", "a gradient comes", "a group is new"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("moment", MOMENTS)
@needs_library
def test_an_interrupted_step_leaves_nothing_half_made(
    name: str, kind: str, when: str, moment: str, exact_sqrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a step: no plan is left to be out of date, and the step can be made again."""
    params, expected = make_params(SIZES), make_params(SIZES)
    ours, theirs = make(name, params[:5]), getattr(torch.optim, name)(expected[:5], **CASES[name])
    step = 0

    def grads(ps: list[nn.Parameter], number: int) -> None:
        set_grads(ps, number)
        if kind == "a gradient comes" and number < 2:
            ps[1].grad = None

    def both(number: int) -> None:
        for optimizer, ps in ((ours, params), (theirs, expected)):
            grads(ps, number)
            optimizer.step()

    if kind != "first step":
        for step in range(2):
            both(step)
        step = 2
    if kind == "a group is new":
        for optimizer, ps in ((ours, params), (theirs, expected)):
            optimizer.add_param_group({"params": ps[5:], "lr": 0.03})
    grads(params, step)
    before = snapshot(ours)
    interrupted = Interrupted(monkeypatch, *MOMENTS[moment], when)
    try:
        ours.step()
    except KeyboardInterrupt:
        pass
    else:
        assert interrupted.armed, "it went on"
        assert moment in ("Plan.commit", "a part's settle"), "it is called in every step"
        assert kind == "later step"  # with nothing new
    if interrupted.armed or (moment, when) in MADE:
        grads(expected, step)
        theirs.step()
        step += 1
    else:
        assert plan_of(ours) is None
        if (moment, when) not in COMMITTED:
            assert_unchanged(before, ours)
            if kind == "first step":
                assert len(ours.state) == 0
    interrupted.armed = False
    for number in range(step, step + 3):
        both(number)
    assert_same_bits(params, expected)
    for p, q in zip(params, expected, strict=True):
        assert ours.state.get(p, {}).keys() == theirs.state.get(q, {}).keys()
        for key, value in ours.state.get(p, {}).items():
            assert_same_bits(value, theirs.state[q][key], key)


@needs_library
def test_a_first_step_with_dampening_that_was_interrupted_is_still_a_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD takes a tensor's first gradient undampened, and knows the first one by a state that is not there."""
    ends = []
    for interrupt in (False, True):
        params = make_params((4,))
        optimizer = fused_l2.SGD(params, lr=1.0, momentum=0.9, dampening=0.5)
        set_grads(params, 0)
        if interrupt:
            Interrupted(monkeypatch, CpuPart, "launch", "before")
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        optimizer.step()
        ends.append(params)
    assert_same_bits(*ends)
