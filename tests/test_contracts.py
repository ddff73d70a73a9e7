"""Contracts that others rely on: state that is whole or refused, checkpoints, hooks, wrappers, pytrees, options, threads."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparing import CASES, assert_same_bits, assert_unchanged, each, make, make_params, run, set_grads, snapshot
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fused_l2
from fused_l2.tables.modes import Mode

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = (5, 64, 0, 33)
MODES = [mode.name.lower() for mode in Mode]
KEPT = {mode.name.lower(): mode.state_name for mode in Mode if mode.state_name}


def continue_run(optimizer: Any, params: list[Any], first: int, steps: int) -> None:
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()


def twin(params: list[Any]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def assert_same_state(a: Any, params: list[Any], b: Any, others: list[Any]) -> None:
    for p, q in zip(params, others, strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        for key, value in a.state[p].items():
            assert_same_bits(value, b.state[q][key], key)


# step_in_backward follows the optimizer.


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    first, last = model[0], model[2]
    return [{"params": list(first.parameters())}, {"params": list(last.parameters()), "weight_decay": 0.0, "lr": 0.05}]


def train(model: nn.Module, optimizer: Any, scheduler: Any, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()


@each
@pytest.mark.parametrize("load", ["state dict", "state dict with a new scheduler", "groups replaced by hand"])
def test_step_in_backward_follows_the_groups_that_a_checkpoint_brings(name: str, load: str, exact_sqrt: Any) -> None:
    """torch replaces the param groups when it loads: lr and all else are the optimizer's, not those of the beginning."""
    ends = []
    for module in (fused_l2, torch.optim):
        source = make_model()
        saved_by = getattr(torch.optim, name)(groups_of(source), **{**CASES[name], "lr": 0.003})
        train(source, saved_by, torch.optim.lr_scheduler.StepLR(saved_by, 1, 0.5), 0, 3)
        saved = copy.deepcopy(saved_by.state_dict())

        model = make_model()
        optimizer = getattr(module, name)(groups_of(model), **CASES[name])
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        if module is fused_l2:
            fused_l2.step_in_backward(optimizer)
        train(model, optimizer, scheduler, 3, 2)
        if load == "groups replaced by hand":
            optimizer.param_groups[:] = [{**group, "lr": 0.004, "weight_decay": 0.2} for group in optimizer.param_groups]
        else:
            optimizer.load_state_dict(saved)
        if load == "state dict with a new scheduler":
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        train(model, optimizer, scheduler, 5, 3)
        ends.append((model, optimizer))
    (model, a), (other, b) = ends
    assert [group["lr"] for group in a.param_groups] == [group["lr"] for group in b.param_groups]
    assert_same_bits([p.detach() for p in model.parameters()], [p.detach() for p in other.parameters()])
    assert_same_state(a, list(model.parameters()), b, list(other.parameters()))


# A state is whole, or it is refused.


def without(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {key: value for key, value in state.items() if key not in keys}


NOT_WHOLE: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str, str]] = {
    "no step": (without("step"), "exp_avg", "step"),
    "step is None": (lambda state: {**state, "step": None}, "exp_avg", "step"),
    "no exp_avg_sq": (without("exp_avg_sq"), "exp_avg", "exp_avg_sq"),
    "exp_avg is None": (lambda state: {**state, "exp_avg": None}, "exp_avg_sq", "exp_avg"),
    "only step": (without("exp_avg", "exp_avg_sq"), "step", "exp_avg"),
    "SGD's": (lambda state: {"momentum_buffer": state["exp_avg"]}, "momentum_buffer", "exp_avg"),
    "bitsandbytes'": (
        lambda state: {"step": 2, "state1": state["exp_avg"], "state2": state["exp_avg_sq"]},
        "state1",
        "exp_avg",
    ),
    "bitsandbytes' without step": (lambda state: {"state1": state["exp_avg"]}, "state1", "exp_avg"),
}


@pytest.mark.parametrize("how", ["in place", "by load_state_dict", "after a step"])
@pytest.mark.parametrize("kind", NOT_WHOLE)
def test_a_state_that_is_not_whole_is_refused_by_name(kind: str, how: str) -> None:
    """To start what is missing at zero beside the rest would make updates hundreds of times too large."""
    change, found, missing = NOT_WHOLE[kind]
    params = make_params(SIZES)
    optimizer = run(lambda p: make("AdamW", [("first", p[0]), *((f"w{i}", q) for i, q in enumerate(p[1:]))]), params, 2)
    if how == "by load_state_dict":
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][1] = change(saved["state"][1])
        params = twin(params)
        optimizer = make("AdamW", [("first", params[0]), *((f"w{i}", q) for i, q in enumerate(params[1:]))])
        act = functools.partial(optimizer.load_state_dict, saved)
    else:
        act = optimizer.step
        optimizer.state[params[1]] = change(dict(optimizer.state[params[1]]))
        if how == "in place":
            optimizer.drop_plan()
    set_grads(params, 7)
    before = snapshot(optimizer)
    with pytest.raises((RuntimeError, ValueError)) as refused:
        act()
    message = str(refused.value)
    assert re.search(r"parameter 1 of group 0 'w0' \(shape \(64,\), float32\)", message)
    assert f"no {missing!r}" in message
    assert repr(found) in message
    assert ("delete its state from the dict" if how == "by load_state_dict" else "optimizer.state[param].clear()") in message
    assert_unchanged(before, optimizer)
    if how == "by load_state_dict":
        del saved["state"][1]  # the remedy
        act()
        set_grads(params, 7)
    else:
        optimizer.state[params[1]].clear()  # and here
    optimizer.step()
    assert optimizer.state[params[1]]["step"].item() == 1
    assert optimizer.state[params[0]]["step"].item() == 3


COUNTERS = {
    "two numbers": torch.tensor([2.0, 2.0]),
    "none": torch.zeros(0),
    "a word": "soon",
    "on the meta device": torch.tensor(2.0, device="meta"),
}


@pytest.mark.parametrize("fresh", [False, True], ids=["mended", "anew"])
@pytest.mark.parametrize("kind", COUNTERS)
def test_a_step_counter_that_is_no_number_is_refused_by_name(kind: str, fresh: bool) -> None:
    params = make_params(SIZES)
    optimizer = run(lambda p: make("AdamW", p), params, 2)
    optimizer.state[params[1]]["step"] = COUNTERS[kind]
    if fresh:
        optimizer.drop_plan()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 .*its state 'step' is"):
        optimizer.step()
    assert_same_bits(params, before)
    assert optimizer.state[params[0]]["step"].item() == 2


@pytest.mark.parametrize("how", ["None", "absent", "empty", "loaded as None"])
def test_a_momentum_buffer_that_is_not_there_starts_as_torchs(how: str) -> None:
    ends = []
    for module in (fused_l2, torch.optim):
        params = make_params(SIZES)
        options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}
        optimizer = run(lambda p, of=module.SGD, given=options: of(p, **given), params, 2)
        own = optimizer.state[params[1]]
        if how == "None":
            own["momentum_buffer"] = None
        elif how == "absent":
            own.pop("momentum_buffer")
        elif how == "empty":
            optimizer.state[params[1]] = {}
        else:
            saved = copy.deepcopy(optimizer.state_dict())
            saved["state"][1] = {"momentum_buffer": None}
            optimizer.load_state_dict(saved)
        continue_run(optimizer, params, 2, 3)
        ends.append((optimizer, params))
    assert_same_bits(ends[0][1], ends[1][1])
    assert_same_state(*ends[0], *ends[1])


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_largest_second_moment_newly_asked_for_starts_at_zero_as_torchs(name: str, exact_sqrt: Any) -> None:
    ends = []
    for module in (fused_l2, torch.optim):
        params = make_params(SIZES)
        optimizer = getattr(module, name)(params, lr=0.01)
        continue_run(optimizer, params, 0, 2)
        if module is torch.optim:  # torch itself has it made by the first step alone
            for p in params:
                optimizer.state[p]["max_exp_avg_sq"] = torch.zeros_like(p)
        optimizer.param_groups[0]["amsgrad"] = True
        continue_run(optimizer, params, 2, 3)
        ends.append((optimizer, params))
    assert_same_bits(ends[0][1], ends[1][1])
    assert_same_state(*ends[0], *ends[1])


# Float32 weights that are set before the first step.


def wide_weights(seed: int = 5) -> list[Tensor]:
    return [p.detach() for p in make_params(SIZES, seed=seed)]


def set_before(how: str, name: str, mode: str) -> tuple[Any, list[nn.Parameter]]:
    """An optimizer whose float32 weights are known before its first step."""
    params = make_params(SIZES, torch.bfloat16)
    if how == "low_precision":
        optimizer = make(name, params)
        optimizer.low_precision = mode
        optimizer.load_master_params(wide_weights())
    elif how == "load_master_params":
        optimizer = make(name, params, low_precision=mode)
        optimizer.load_master_params(wide_weights())
    else:
        model = nn.ParameterDict({f"w{i}": p for i, p in enumerate(params)})
        optimizer = make(name, params, low_precision=mode)
        fused_l2.load_master_state_dict(model, optimizer, {f"w{i}": w for i, w in enumerate(wide_weights())})
    return optimizer, params


def through_state_dict(optimizer: Any, params: list[Any], mode: str, name: str) -> tuple[Any, list[Any]]:
    others = twin(params)
    second = make(name, others, low_precision=mode)
    saved = optimizer.state_dict()
    if mode in KEPT:
        whole = set() if name == "SGD" else {"step", "exp_avg", "exp_avg_sq"}  # which torch's Adam would miss
        assert all(set(saved["state"][i]) == {KEPT[mode], *whole} for i in range(len(params)))
    second.load_state_dict(copy.deepcopy(saved))
    return second, others


def copied(optimizer: Any) -> tuple[Any, list[Any]]:
    return optimizer, optimizer.param_groups[0]["params"]


ROADS: dict[str, Callable[[Any, list[Any], str, str], tuple[Any, list[Any]]]] = {
    "itself": lambda optimizer, params, mode, name: (optimizer, params),
    "a state dict": through_state_dict,
    "pickle": lambda optimizer, params, mode, name: copied(pickle.loads(pickle.dumps(optimizer))),
    "deepcopy": lambda optimizer, params, mode, name: copied(copy.deepcopy(optimizer)),
}


@pytest.mark.sweep(5)
@each
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("mode", ["remainder", "master", "kahan"])
@pytest.mark.parametrize("how", ["load_master_params", "load_master_state_dict", "low_precision"])
def test_weights_set_before_the_first_step_wait_for_it(name: str, how: str, mode: str, road: str) -> None:
    """There is no state before the first step: libraries ask for that. The weights are not lost on any road."""
    optimizer, params = set_before(how, name, mode)
    assert len(optimizer.state) == 0
    optimizer, params = ROADS[road](optimizer, params, mode, name)
    assert len(optimizer.state) == 0 or (road == "a state dict" and name != "SGD")
    if mode in ("remainder", "master"):
        assert_same_bits(optimizer.master_params(), wide_weights())

    # The same weights, set beside moments that a step with lr 0 has made.
    others = make_params(SIZES, torch.bfloat16)
    after = make(name, others, low_precision=mode)
    for p in others:
        p.grad = torch.zeros_like(p)
    groups = after.param_groups
    kept, groups[0]["lr"] = groups[0]["lr"], 0.0
    after.step()
    groups[0]["lr"] = kept
    after.load_master_params(wide_weights())
    for own in after.state.values():
        for key in [key for key in own if key not in KEPT.values()]:
            del own[key]
    continue_run(optimizer, params, 0, 3)
    continue_run(after, others, 0, 3)
    assert_same_bits(params, others)
    assert_same_state(optimizer, params, after, others)


@each
@pytest.mark.parametrize("mode", KEPT)
@pytest.mark.parametrize("state_dtype", [None, "8bit"])
def test_weights_that_wait_for_a_first_step_are_in_a_dict_that_torch_steps_from(name: str, mode: str, state_dtype: Any) -> None:
    """torch's Adam loads no state without a counter, and steps none without moments."""
    params = make_params((*SIZES, (64, 128)), torch.bfloat16)
    optimizer = make(name, params[:2], low_precision=mode, state_dtype=state_dtype)
    for p in params[:2]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.add_param_group({"params": params[2:]})  # one group has stepped
    optimizer.load_master_params([torch.randn_like(p, dtype=torch.float32) for p in params])
    others = twin(params)
    theirs = getattr(torch.optim, name)([{"params": others[:2]}, {"params": others[2:]}], **CASES[name])
    theirs.load_state_dict(copy.deepcopy(optimizer.float32_state_dict()))
    twins = twin(params)
    fresh = getattr(torch.optim, name)(twins[2:], **CASES[name])
    for i, (p, q) in enumerate(zip(others, twins, strict=True)):
        torch.manual_seed(i)
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    theirs.step()
    fresh.step()
    assert_same_bits(others[2:], twins[2:])  # those are at their first step


@pytest.mark.parametrize("mode", KEPT)
def test_all_that_sgd_without_momentum_keeps_is_a_state_again_when_it_is_loaded(mode: str) -> None:
    def plain(params: list[Any]) -> Any:
        return fused_l2.SGD(params, lr=0.1, low_precision=mode)

    params = make_params(SIZES, torch.bfloat16)
    optimizer = run(plain, params, 1)
    others = twin(params)
    second = plain(others)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_state(optimizer, params, second, others)
    second.step()  # no parameter has a gradient
    assert_same_state(optimizer, params, second, others)


def test_setting_low_precision_before_the_first_step_is_passing_it() -> None:
    for mode in MODES:
        params, others = make_params(SIZES, torch.bfloat16), make_params(SIZES, torch.bfloat16)
        optimizer = make("AdamW", params)
        optimizer.low_precision = mode
        assert len(optimizer.state) == 0
        continue_run(optimizer, params, 0, 3)
        second = run(lambda p, given=mode: make("AdamW", p, low_precision=given), others, 3)
        assert_same_bits(params, others)
        assert_same_state(optimizer, params, second, others)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@each
@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full"])
@pytest.mark.parametrize("mode", ["remainder", "master"])
@pytest.mark.parametrize("before", ["nothing", "load_master_state_dict", "low_precision"])
@pytest.mark.usefixtures("one_process")
def test_a_run_that_starts_from_float32_weights_resumes_through_distributed_checkpoints(
    name: str, before: str, mode: str, full: bool
) -> None:
    """torch.distributed.checkpoint makes a step to have states to load into, unless there are some: moments and step count
    arrive in either way."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def step(model: nn.Module, optimizer: Any, number: int) -> None:
        set_grads(list(model.parameters()), number)
        optimizer.step()

    model = make_model(torch.bfloat16)
    optimizer = make(name, model.parameters(), low_precision=mode)
    for number in range(3):
        step(model, optimizer, number)
    weights = fused_l2.master_state_dict(model, optimizer)
    how = StateDictOptions(full_state_dict=full)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))

    other = make_model(torch.bfloat16)
    second = make(name, other.parameters(), **({} if before == "low_precision" else {"low_precision": mode}))
    if before == "low_precision":
        second.low_precision = mode
    if before == "load_master_state_dict":
        fused_l2.load_master_state_dict(other, second, weights)
    else:
        other.load_state_dict(model.state_dict())
    empty = get_optimizer_state_dict(other, second, options=how)
    assert empty["state"].keys() == saved["state"].keys()
    set_optimizer_state_dict(other, second, saved, options=how)
    assert_same_state(optimizer, list(model.parameters()), second, list(other.parameters()))
    for number in range(3, 5):
        step(model, optimizer, number)
        step(other, second, number)
    assert_same_bits(second.master_params(), optimizer.master_params())
    assert_same_state(optimizer, list(model.parameters()), second, list(other.parameters()))


# State dicts and the hooks of others.


@each
@pytest.mark.parametrize("mode", MODES)
def test_state_dict_hooks_see_and_give_the_form_that_travels(name: str, mode: str) -> None:
    """A library's hooks stand outside: they see plain dicts and remainders that can be sent, and what they make of it is given
    to the caller, and loaded."""
    params = make_params(SIZES, torch.bfloat16)
    optimizer = run(lambda p: make(name, p, low_precision=mode), params, 2)
    plain = copy.deepcopy(optimizer.state_dict())
    seen: list[Any] = []

    def check(given: dict[str, Any]) -> None:
        assert type(given) is dict
        assert given.keys() == {"state", "param_groups"}
        for own in given["state"].values():
            assert type(own) is dict
            if mode == "remainder":
                assert own[KEPT[mode]].dtype is torch.bfloat16

    def wrap(o: Any, given: dict[str, Any]) -> dict[str, Any]:
        check(given)
        seen.append(("post", o))
        return {"library": "some", "inner": given}

    def unwrap(o: Any, given: dict[str, Any]) -> dict[str, Any]:
        assert given.keys() == {"library", "inner"}
        seen.append(("load", o))
        return given["inner"]

    first = optimizer.register_state_dict_post_hook(wrap)
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(("pre", o)))
    wrapped = optimizer.state_dict()
    assert seen == [("pre", optimizer), ("post", optimizer)]
    assert wrapped.keys() == {"library", "inner"}
    assert wrapped["inner"]["param_groups"] == plain["param_groups"]
    for i, own in plain["state"].items():
        for key, value in own.items():
            assert_same_bits(wrapped["inner"]["state"][i][key], value)
    first.remove()
    assert optimizer.state_dict().keys() == {"state", "param_groups"}

    others = twin(params)
    second = make(name, others, low_precision=mode)
    second.register_load_state_dict_pre_hook(unwrap)
    after: list[torch.dtype] = []
    second.register_load_state_dict_post_hook(
        lambda o: after.extend(value.dtype for own in o.state.values() for value in own.values())
    )
    seen.clear()
    second.load_state_dict(copy.deepcopy(wrapped))
    assert seen == [("load", second)]
    assert after == [value.dtype for own in optimizer.state.values() for value in own.values()]
    assert_same_state(optimizer, params, second, others)
    continue_run(optimizer, params, 2, 2)
    continue_run(second, others, 2, 2)
    assert_same_bits(params, others)


def test_hooks_first_and_last_stand_outside_too() -> None:
    """prepend=True puts a hook before other hooks, not before ours."""
    params = make_params(SIZES, torch.bfloat16)
    optimizer = run(lambda p: make("AdamW", p, low_precision="remainder"), params, 2)
    seen = []
    optimizer.register_state_dict_post_hook(
        lambda o, given: seen.append(given["state"][0][KEPT["remainder"]].dtype), prepend=True
    )
    saved = optimizer.state_dict()
    assert seen == [torch.bfloat16]
    optimizer.register_load_state_dict_pre_hook(lambda o, given: {**given, "state": {}}, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)), prepend=True)
    optimizer.load_state_dict(saved)
    assert seen[1:] == [0]
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("how", ["super", "of the class"])
def test_step_hooks_are_called_where_a_subclass_steps_elsewhere(how: str) -> None:
    """As optimizers that step twice do: not within its own step()."""

    class Twice(fused_l2.SGD):
        def second_step(self) -> None:
            super().step() if how == "super" else fused_l2.SGD.step(self)

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.second_step()

    params = make_params(SIZES)
    optimizer, called = Twice(params, lr=0.1), []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    set_grads(params, 0)
    for step in (optimizer.second_step, optimizer.step, optimizer.second_step):
        called.clear()
        step()
        assert called == [1]


# Wrappers.


class Taker:
    """Takes over what an optimizer has, and is none."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__.update(optimizer.__dict__)


@each
def test_what_took_over_an_optimizers_attributes_is_copied_with_a_lock_and_a_plan_of_its_own(name: str) -> None:
    params = make_params(SIZES)
    optimizer = run(lambda ps: make(name, ps), params, 2)
    copied = copy.deepcopy(Taker(optimizer))
    set_grads([p for group in copied.param_groups for p in group["params"]], 2)
    set_grads(params, 2)
    assert copied._stepper.lock is not optimizer._stepper.lock
    assert copied._stepper._plan is None
    copied._stepper.step(copied.param_groups, copied.state)
    optimizer.step()
    assert_same_bits([p for group in copied.param_groups for p in group["params"]], params)


class Wrapper:
    """As Lightning Fabric wraps an optimizer: another object with a copy of its attributes, whose class is a subclass."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("state_dict", "step", "zero_grad")}
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (Wrapper, type(optimizer)), {})
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state_dict)
        self.__dict__.update(
            {k: v for k, v in self._optimizer.__dict__.items() if k not in ("state_dict", "step", "zero_grad")}
        )

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def zero_grad(self, **kwargs: Any) -> None:
        self._optimizer.zero_grad(**kwargs)


@each
@pytest.mark.parametrize("loads", ["nothing", "through the wrapper", "through the optimizer"])
def test_a_wrapper_with_a_copy_of_the_attributes_shares_options_and_results(name: str, loads: str) -> None:
    params, others = make_params(SIZES), make_params(SIZES)
    inner = make(name, params, max_grad_norm=1.0, skip_if_nonfinite=True, statistics=True)
    wrapper: Any = Wrapper(inner)
    assert isinstance(wrapper, getattr(fused_l2, name))
    plain = make(name, others, max_grad_norm=1.0, skip_if_nonfinite=True, statistics=True)

    def step(number: int, bad: bool = False) -> None:
        for optimizer, ps in ((wrapper, params), (plain, others)):
            set_grads(ps, number)
            if bad:
                ps[0].grad[0] = torch.inf
            optimizer.step()
        assert wrapper.grad_norm is not None
        assert_same_bits(wrapper.grad_norm, plain.grad_norm)
        assert_same_bits(wrapper.grad_norm, inner.grad_norm)
        assert str(wrapper.statistics.as_dict()) == str(plain.statistics.as_dict())
        assert bool(wrapper.step_was_skipped) is bool(inner.step_was_skipped) is bad
        assert_same_bits(params, others)

    step(0)
    if loads == "through the wrapper":
        wrapper.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    elif loads == "through the optimizer":
        inner.load_state_dict(copy.deepcopy(inner.state_dict()))
    step(1)
    step(2, bad=True)
    for set_through in (wrapper, inner):
        for value, given in (("max_grad_norm", 0.01), ("norm_type", torch.inf), ("max_grad_norm", 0.02)):
            setattr(set_through, value, given)
            setattr(plain, value, given)
            assert getattr(wrapper, value) == getattr(inner, value) == given
            assert wrapper.options == inner.options == plain.options
            step(3)
    wrapper.statistics = False
    assert wrapper.statistics is inner.statistics is None
    wrapper.statistics, plain.statistics = True, True
    wrapper.drop_plan()
    step(4)
    assert repr(wrapper).split(" ", 1)[1] == repr(inner).split(" ", 1)[1]


# Pytrees.


@each
@pytest.mark.parametrize("what", ["state", "dict(state)", "state of a parameter"])
def test_states_are_pytrees_as_torchs_are(name: str, what: str) -> None:
    """Code that walks torch.optim's states walks ours, and gets back what it gave."""
    pytree = torch.utils._pytree
    params = make_params(SIZES)
    optimizer = run(lambda p: make(name, p), params, 2)
    expected = run(lambda p: getattr(torch.optim, name)(p, **CASES[name]), make_params(SIZES), 2)

    def of(o: Any) -> Any:
        return {"state": o.state, "dict(state)": dict(o.state), "state of a parameter": next(iter(o.state.values()))}[what]

    leaves, spec = pytree.tree_flatten(of(optimizer))
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert len(leaves) == len(pytree.tree_leaves(of(expected)))
    again = pytree.tree_unflatten(leaves, spec)
    doubled = pytree.tree_map(lambda t: t * 2, of(optimizer))
    for made in (again, doubled):
        assert type(made) is type(of(optimizer))
        assert list(made) == list(of(optimizer))
        if what != "state of a parameter":
            assert [type(own) for own in made.values()] == [type(own) for own in of(optimizer).values()]
    assert_same_bits([t / 2 for t in pytree.tree_leaves(doubled)], leaves)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(next(iter(optimizer.state.values())))[0]]
    assert paths == [f"[{key!r}]" for key in next(iter(optimizer.state.values()))]
    if what == "state":  # and is used as any other
        optimizer.state = doubled
        continue_run(optimizer, params, 2, 1)
        assert optimizer.state[params[0]] is doubled[params[0]]


@each
def test_states_are_rebuilt_and_copied_as_a_defaultdict_and_a_dict_are(name: str) -> None:
    params = make_params(SIZES)
    optimizer = run(lambda p: make(name, p), params, 2)
    state = optimizer.state
    rebuilt = type(state)(state.default_factory, dict(state))
    assert type(rebuilt) is type(state)
    assert rebuilt == state
    assert all(rebuilt[p] is state[p] for p in params)
    assert not rebuilt["a new key"]
    for made in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert type(made) is type(state)
        assert [type(own) for own in made.values()] == [type(own) for own in state.values()]
        for own, before in zip(made.values(), state.values(), strict=True):
            assert own.keys() == before.keys()
            for key, value in own.items():
                assert value is not before[key]
                assert_same_bits(value, before[key])
    for made in (copy.copy(state), state.copy()):
        assert type(made) is type(state)
        assert all(made[p] is state[p] for p in params)
    own = state[params[0]]
    for made in (copy.copy(own), own.copy(), type(own)(own), copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert type(made) is type(own)
        assert made is not own
        assert made.keys() == own.keys()
    # A copy is nobody's state: what happens to it is no matter to the optimizer.
    expected = run(lambda p: make(name, p), make_params(SIZES), 2)
    others = expected.param_groups[0]["params"]
    copy.deepcopy(state).clear()
    own.copy().clear()
    continue_run(optimizer, params, 2, 2)
    continue_run(expected, others, 2, 2)
    assert_same_bits(params, others)


# Step counters and dtypes.


def test_a_counter_in_shared_memory_is_counted_in() -> None:
    """As Hogwild training has them: tensors of one element that all processes see."""
    params = make_params(SIZES)
    optimizer, expected = make("AdamW", params), run(lambda p: make("AdamW", p), make_params(SIZES), 3)
    counters = {}
    for p in params:
        counters[p] = torch.zeros(1).share_memory_()
        optimizer.state[p].update(step=counters[p], exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    continue_run(optimizer, params, 0, 3)
    for p in params:
        assert optimizer.state[p]["step"] is counters[p]
        assert counters[p].is_shared()
        assert counters[p].tolist() == [3.0]
    assert_same_bits(params, expected.param_groups[0]["params"])
    for p in params:
        counters[p].fill_(10)  # by another process
    continue_run(optimizer, params, 3, 1)
    assert all(counters[p].tolist() == [11.0] for p in params)


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("float64_by_default")
def test_under_a_default_dtype_of_float64_counters_are_float64(dtype: torch.dtype, exact_sqrt: Any) -> None:
    params, others = make_params(SIZES, dtype), make_params(SIZES, dtype)
    optimizer = run(lambda p: make("AdamW", p), params, 3)
    expected = run(lambda p: torch.optim.AdamW(p, **CASES["AdamW"]), others, 3)
    for p, q in zip(params, others, strict=True):
        mine, yours = optimizer.state[p]["step"], expected.state[q]["step"]
        assert mine.dtype is yours.dtype is torch.float64
        assert mine.shape == yours.shape
        assert mine.item() == yours.item() == 3
    resumed = twin(params)
    second = make("AdamW", resumed)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(own["step"].dtype is torch.float64 for own in second.state.values())
    torch.set_default_dtype(torch.float32)  # and elsewhere
    continue_run(second, resumed, 3, 2)
    continue_run(expected, others, 3, 2)
    assert_same_bits(resumed, others)
    assert_same_state(second, resumed, expected, others)


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("number", [3, 3.0])
def test_a_number_in_an_old_checkpoint_is_a_tensor_once_it_is_loaded(number: float, default: torch.dtype) -> None:
    params = make_params(SIZES)
    saved = copy.deepcopy(run(lambda p: make("AdamW", p), params, 3).state_dict())
    for own in saved["state"].values():
        own["step"] = number
    second, other = make("AdamW", twin(params)), torch.optim.AdamW(twin(params))
    torch.set_default_dtype(default)
    try:
        for optimizer in (second, other):
            optimizer.load_state_dict(copy.deepcopy(saved))
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, yours in zip(second.state.values(), other.state.values(), strict=True):
        assert isinstance(mine["step"], Tensor)
        assert mine["step"].shape == yours["step"].shape
        assert mine["step"].dtype is yours["step"].dtype
        assert mine["step"].item() == 3


@each
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_have_the_dtype_that_was_asked_for_once_they_are_loaded(
    name: str, dtype: torch.dtype, param_dtype: torch.dtype
) -> None:
    params = make_params(SIZES, param_dtype)
    saved = copy.deepcopy(run(lambda p: make(name, p, state_dtype=torch.float32), params, 3).state_dict())
    kept = copy.deepcopy(saved)
    others = twin(params)
    second = make(name, others, state_dtype=dtype)
    second.load_state_dict(saved)
    for i, p in enumerate(others):
        for key, value in second.state[p].items():
            given = kept["state"][i][key]
            assert value.dtype is (torch.float32 if key == "step" else dtype)
            assert_same_bits(value, given.to(value.dtype))
            assert value.numel() == 0 or value.data_ptr() != saved["state"][i][key].data_ptr()
            assert_same_bits(saved["state"][i][key], given)
    continue_run(second, others, 3, 2)
    assert all(v.dtype is dtype for own in second.state.values() for k, v in own.items() if k != "step")


@each
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("when", ["before the first step", "later"])
def test_a_checkpoint_of_another_low_precision_is_refused_with_nothing_changed(name: str, mode: str, when: str) -> None:
    for other in KEPT:
        if other == mode:
            continue
        params = make_params(SIZES, torch.bfloat16, seed=1)
        source = run(lambda p, given=other: make(name, p, low_precision=given, lr=0.3), params, 2)
        saved = source.state_dict()
        kept = copy.deepcopy(saved)
        mine, twins = make_params(SIZES, torch.bfloat16), make_params(SIZES, torch.bfloat16)
        optimizer, untouched = make(name, mine, low_precision=mode), make(name, twins, low_precision=mode)
        if when == "later":
            continue_run(optimizer, mine, 0, 2)
            continue_run(untouched, twins, 0, 2)
        before, groups, state = snapshot(optimizer), copy.deepcopy(optimizer.param_groups), optimizer.state
        with pytest.raises(ValueError, match=rf"'{KEPT[other]}'.*low_precision='{other}'.*low_precision='{mode}'"):
            optimizer.load_state_dict(saved)
        assert optimizer.state is state
        assert_unchanged(before, optimizer)
        assert str(optimizer.param_groups) == str(groups)
        for i, own in kept["state"].items():
            for key, value in own.items():
                assert_same_bits(saved["state"][i][key], value)
        continue_run(optimizer, mine, 2, 2)
        continue_run(untouched, twins, 2, 2)
        assert_same_bits(mine, twins)


# Step hooks.


@each
@pytest.mark.parametrize("level", ["of the optimizer", "global"])
@pytest.mark.parametrize("how", ["overridden", "overridden twice", "patched", "not"])
def test_step_hooks_of_a_subclass_are_called_once(name: str, level: str, how: str) -> None:
    """Of torch.optim's they are called once more within, if an optimizer of the base class was ever made in the program."""

    class Mine(getattr(fused_l2, name)):  # type: ignore[misc]
        if how.startswith("overridden"):

            def step(self, closure: Any = None) -> Any:
                called.append("step")
                return super().step(closure)

    class Other(Mine):
        if how == "overridden twice":

            def step(self, closure: Any = None) -> Any:
                return super().step(closure)

    called: list[str] = []
    if how == "patched":  # as tracers do

        @functools.wraps(Mine.step)
        def patched(*args: Any, **kwargs: Any) -> Any:
            called.append("step")
            return original(*args, **kwargs)

        original = Mine.step
        Mine.step = patched
    params = make_params(SIZES)
    optimizer = Other(params, **CASES[name])
    hooks = [lambda *_: called.append("before"), lambda *_: called.append("after")]
    if level == "global":
        handles = [register_optimizer_step_pre_hook(hooks[0]), register_optimizer_step_post_hook(hooks[1])]
    else:
        handles = [optimizer.register_step_pre_hook(hooks[0]), optimizer.register_step_post_hook(hooks[1])]
    try:
        for _ in range(2):
            called.clear()
            set_grads(params, 0)
            assert optimizer.step(lambda: 1.5) == 1.5
            assert sorted(called) == sorted(["before", "after", *([] if how == "not" else ["step"])])
            if how != "patched":
                assert (called[0], called[-1]) == ("before", "after")
    finally:
        for handle in handles:
            handle.remove()


@each
@pytest.mark.parametrize("level", ["of the optimizer", "global"])
def test_step_hooks_see_the_arguments_as_they_were_given(name: str, level: str) -> None:
    def closure() -> float:
        return 1.5

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), {}), ((closure,), {}), ((), {"closure": closure})]
    seen: dict[Any, list[Any]] = {}
    for module in (fused_l2, torch.optim):
        params = make_params(SIZES)
        optimizer = getattr(module, name)(params, **CASES[name])
        found = seen[module] = []

        def hook(o: Any, args: Any, kwargs: Any, found: Any = found, own: Any = optimizer) -> None:
            assert o is own
            found.append((tuple("optimizer" if a is own else a for a in args), dict(kwargs)))

        if level == "global":
            handles = [register_optimizer_step_pre_hook(hook), register_optimizer_step_post_hook(hook)]
        else:
            handles = [optimizer.register_step_pre_hook(hook), optimizer.register_step_post_hook(hook)]
        try:
            for args, kwargs in calls:
                set_grads(params, 0)
                assert optimizer.step(*args, **kwargs) == (1.5 if args or kwargs else None)
        finally:
            for handle in handles:
                handle.remove()
    expected = [(("optimizer", *args), kwargs) for args, kwargs in calls for _ in ("pre", "post")]
    assert seen[fused_l2] == seen[torch.optim] == expected


@each
def test_a_pre_hook_may_change_the_arguments(name: str) -> None:
    """torch takes over (args, kwargs) that a pre-hook returns, and refuses anything else."""
    for module in (fused_l2, torch.optim):
        params = make_params(SIZES)
        optimizer = getattr(module, name)(params, **CASES[name])
        set_grads(params, 0)
        handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": lambda: 2.5}))
        assert optimizer.step() == 2.5
        handle.remove()
        optimizer.register_step_pre_hook(lambda o, args, kwargs: 3)
        with pytest.raises(RuntimeError, match="must return None or a tuple"):
            optimizer.step()


@each
def test_step_refuses_other_arguments(name: str) -> None:
    optimizer = make(name, make_params(SIZES))
    with pytest.raises(TypeError, match="unexpected keyword argument 'grad_scaler'"):
        optimizer.step(grad_scaler=None)
    assert list(inspect.signature(optimizer.step).parameters) == ["closure"]


def test_a_parameter_listed_in_two_groups_keeps_one_state_when_it_grows() -> None:
    """amsgrad is switched on in one of the groups, and needs a state that the other does not look at."""
    ends = []
    for module in (fused_l2, torch.optim):
        a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer = module.Adam([{"params": [a]}, {"params": [b]}], lr=0.1)
        optimizer.param_groups[1]["params"].append(a)
        for _ in range(2):
            a.grad, b.grad = torch.ones(3), torch.ones(3)
            optimizer.step()
        if module is fused_l2:  # torch.optim has no max_exp_avg_sq then, and raises
            optimizer.param_groups[0]["amsgrad"] = True
        optimizer.step()
        ends.append(b)
    assert_same_bits(*ends)


@pytest.mark.parametrize("shape", [(3, 2), (4,)], ids=["transposed", "strided"])
def test_what_was_converted_for_a_skipped_step_is_converted_again(shape: tuple[int, ...]) -> None:
    """The user may have changed it in place since."""
    data = torch.ones(2, 3).t() if shape == (3, 2) else torch.ones(4, 2)[:, 0]
    p = torch.nn.Parameter(data)
    optimizer = fused_l2.Adam([p], lr=0.1, max_grad_norm=1e9, skip_if_nonfinite=True)
    p.grad = torch.ones(shape)
    optimizer.step()
    optimizer.state[p]["step"] = torch.tensor(1)
    optimizer.state[p]["exp_avg"] = torch.zeros(shape)
    p.grad = torch.full(shape, math.inf)
    optimizer.step()
    optimizer.state[p]["step"].fill_(50)
    p.grad = torch.ones(shape)
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 51


def test_a_strided_parameter_listed_twice_has_one_state() -> None:
    ends = []
    for module in (fused_l2, torch.optim):
        p = torch.nn.Parameter(torch.zeros(4, 2)[:, 0])
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = module.SGD([p, p], lr=1.0, momentum=0.5)
        for _ in range(2):
            p.grad = torch.ones(4)
            optimizer.step()
        ends.append(p.detach().clone())
    assert_same_bits(*ends)


def test_a_counter_that_is_nan_is_refused_where_plain_pytorch_steps() -> None:
    p = torch.nn.Parameter(torch.randn(4, 2)[:, 0])
    optimizer = fused_l2.Adam([p])
    p.grad = torch.ones(4)
    optimizer.step()
    optimizer.state[p]["step"].fill_(math.nan)
    with pytest.raises(RuntimeError, match="its state 'step' is nan"):
        optimizer.step()


def test_step_in_backward_follows_a_parameter_to_another_group() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = fused_l2.SGD([{"params": [a, b], "lr": 1.0}, {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 10.0}])
    fused_l2.step_in_backward(optimizer)
    groups = optimizer.param_groups
    groups[1]["params"].append(groups[0]["params"].pop(0))
    (a + b).sum().backward()
    optimizer.step()
    assert (a.item(), b.item()) == (-10.0, -1.0)
    groups.pop(1)
    (a + b).sum().backward()  # a is nobody's any more
    optimizer.step()
    assert (a.item(), b.item()) == (-10.0, -2.0)


def test_a_step_that_nothing_may_skip_was_not_skipped() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fused_l2.SGD([p], lr=0.1, max_grad_norm=1.0, skip_if_nonfinite=True)
    p.grad = torch.full((3,), math.inf)
    optimizer.step()
    assert optimizer.step_was_skipped
    optimizer.max_grad_norm = None
    optimizer.step()
    assert not optimizer.step_was_skipped
