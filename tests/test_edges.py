"""Numbers at the edge of their range, and what belongs to a param group when groups move."""

from __future__ import annotations

import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fused_l2

KINDS = ("SGD", "Adam", "AdamW")


def stepped(optimizer: Any, *params: Parameter) -> None:
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("start", [2.0**24 - 2, 2.0**24, 2.0**24 + 2, 1e9])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_counters_that_stand_still_give_torchs_bits_and_are_expected(name: str, start: float) -> None:
    """With a beta so close to 1 that the count still matters there."""
    found = []
    for library in (torch.optim, fused_l2):
        p = Parameter(torch.ones(8))
        optimizer = getattr(library, name)([p], lr=0.1, betas=(0.9, 1 - 1e-8))
        stepped(optimizer, p)
        optimizer.state[p]["step"].fill_(start)
        for _ in range(4):
            stepped(optimizer, p)
        found.append((p.detach(), optimizer.state[p]["step"].item()))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)  # torch.sqrt is an ulp off at times


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counters_that_stand_still_cost_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_l2.step.plan import Plan

    p = Parameter(torch.ones(8))
    optimizer = fused_l2.AdamW([p])
    stepped(optimizer, p)
    for start in (2.0**24, 2.0**24 + 2, 2.0**25 + 4, 2.0**30):
        optimizer.state[p]["step"] = torch.tensor(start, dtype=dtype)
        stepped(optimizer, p)
        recounts: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(Plan, "_recount", lambda *a, r=recounts: r.append(a))
            for _ in range(4):
                stepped(optimizer, p)
        assert not recounts
        assert optimizer.state[p]["step"].item() == (start + 5 if dtype is torch.float64 else float(torch.tensor(start) + 1))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("mode", ["stochastic", "kahan"])
def test_random_bits_go_on_where_a_float32_counter_stands_still(name: str, mode: str) -> None:
    """The counter is float64. Rounding with the same bits in each step would move every weight by all or nothing."""
    p = Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = getattr(fused_l2, name)([p], lr=1e-3, weight_decay=0.0, low_precision=mode)
    stepped(optimizer, p)
    counter = optimizer.state[p]["step"]
    assert counter.dtype is torch.float64
    counter.fill_(2.0**24)
    seen = []
    for _ in range(3):
        with torch.no_grad():
            p.fill_(1.0)
            for key in ("exp_avg", "exp_avg_sq", "kahan_comp"):
                if key in optimizer.state[p]:
                    optimizer.state[p][key].fill_(0.0)
        stepped(optimizer, p)
        seen.append(optimizer.state[p]["kahan_comp"].clone() if mode == "kahan" else p.detach().clone())
    assert counter.item() == 2.0**24 + 3
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("count", [-1.0, -5.0, math.nan, math.inf])
@pytest.mark.parametrize("fresh", [True, False])
def test_counters_that_count_nothing_are_refused_by_name(count: float, fresh: bool) -> None:
    params = [Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = fused_l2.AdamW(params)
    if not fresh:
        stepped(optimizer, *params)
    before = [p.detach().clone() for p in params]
    for bad in (0, 1):
        for p in params:
            moments = {key: torch.zeros(3) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p].update(moments if fresh else {}, step=torch.tensor(count if p is params[bad] else 1.0))
        with pytest.raises(RuntimeError, match=rf"parameter {bad} of group 0 .*'step' is {count:g}"):
            stepped(optimizer, *params)
        assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("value", [math.inf, torch.tensor(math.inf), -math.inf, 1e39], ids=repr)
@pytest.mark.parametrize(
    ("name", "argument"),
    [(n, a) for n in KINDS for a in ("lr", "weight_decay")] + [("SGD", "momentum"), ("SGD", "dampening"), ("AdamW", "eps")],
)
def test_infinite_hyperparameters_are_refused(name: str, argument: str, value: Any) -> None:
    p = Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"Invalid .*expected a finite number"):
        getattr(fused_l2, name)([p], **{argument: value})
    optimizer = getattr(fused_l2, name)([p])
    optimizer.param_groups[0][argument] = value
    with pytest.raises(ValueError, match=r"param group 0.*expected a finite number"):
        stepped(optimizer, p)
    assert p.tolist() == [1.0] * 3


def test_a_parameter_of_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        p = Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*made in inference mode"):
        stepped(fused_l2.SGD([p], lr=0.1), p)
    # torch.optim steps it within that mode, where no backward pass gives it a gradient. Nothing would tell of changes.
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*made in inference mode.*Clone it"):
        stepped(fused_l2.SGD([p], lr=0.1), p)
    assert p.tolist() == [1.0] * 3
    copied = Parameter(p.detach().clone())  # the remedy
    stepped(fused_l2.SGD([copied], lr=0.1), copied)


def test_state_dtype_none_brings_states_back_to_their_parameters_dtype() -> None:
    """Moments that stayed bfloat16 would not decay, and a resumed run would be another."""
    p = torch.nn.Parameter(torch.randn(8))
    p.grad = torch.ones(8)
    optimizer = fused_l2.AdamW([p], state_dtype=torch.bfloat16)
    optimizer.step()
    optimizer.state_dtype = None
    assert optimizer.state[p]["exp_avg_sq"].dtype is torch.float32
    p.grad = torch.zeros(8)
    before = optimizer.state[p]["exp_avg_sq"].clone()
    for _ in range(1000):
        optimizer.step()
    # Each of 1000 products is rounded once.
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], before * 0.999**1000, rtol=1000 * 2.0**-24, atol=0)


@pytest.mark.parametrize("what", ["setter", "load", "weights", "state"])
def test_states_made_in_inference_mode_leave_no_step_half_done(what: str) -> None:
    """One tensor has an engine; the other, a strided one, is stepped by plain PyTorch."""
    params = [Parameter(torch.ones(4, 4).bfloat16()), Parameter(torch.ones(4, 8).bfloat16()[:, ::2])]
    optimizer = fused_l2.AdamW(params, low_precision="remainder")
    stepped(optimizer, *params)
    given = optimizer.state_dict()
    with torch.inference_mode():
        if what == "setter":
            optimizer.low_precision = "master"
        elif what == "load":
            optimizer.load_state_dict(given)
        elif what == "weights":
            optimizer.load_master_params([torch.ones(4, 4)] * 2)
        else:
            optimizer.state[params[1]]["exp_avg"] = torch.zeros(4, 4)
    if what == "state":
        with pytest.raises(RuntimeError, match=r"parameter 1 of group 0.*'exp_avg' was made in inference mode.*Clone it"):
            stepped(optimizer, *params)
        assert optimizer.state[params[0]]["step"].item() == 1
    else:
        stepped(optimizer, *params)
        assert [optimizer.state[p]["step"].item() for p in params] == [2, 2]


def test_an_option_set_before_the_constructor_is_named() -> None:
    class Mine(fused_l2.AdamW):
        def __init__(self, params: Any, seed: int) -> None:
            self.seed = seed
            super().__init__(params)

    with pytest.raises(AttributeError, match=r"Mine sets 'seed', an option of fused_l2, before super\(\).__init__\(\)"):
        Mine([torch.nn.Parameter(torch.ones(2))], 3)


class _New(torch.nn.Parameter):
    """A class that no step has met."""


@pytest.mark.parametrize("low_precision", ["round", "remainder"])
def test_a_freed_parameter_of_a_new_class_is_refused(low_precision: Any) -> None:
    params = [kind(torch.ones(64, 64).bfloat16()) for kind in (torch.nn.Parameter, _New)]
    optimizer = fused_l2.AdamW(params, low_precision=low_precision)
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0.*storage"):
        optimizer.step()
    assert params[0].eq(1).all()


def test_max_grad_norm_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_grad_norm: 0; .*pass None"):
        fused_l2.SGD([Parameter(torch.ones(3))], max_grad_norm=0)


def test_decay_that_changes_signs_warns_once() -> None:
    p = Parameter(torch.ones(3))
    optimizer = fused_l2.AdamW([p], lr=0.1, weight_decay=0.1)
    stepped(optimizer, p)
    optimizer.param_groups[0]["lr"] = 20.0
    with pytest.warns(UserWarning, match=r"param group 0 has lr 20 and weight_decay 0.1: the decay of a step takes 2 times"):
        stepped(optimizer, p)
    optimizer.param_groups[0]["lr"] = 30.0
    again = pickle.loads(pickle.dumps(optimizer))
    stepped(optimizer, p)  # warnings are errors here
    stepped(again, *again.param_groups[0]["params"])
    stepped(fused_l2.Adam([p], lr=20.0, weight_decay=0.1), p)  # sqrt(v) divides it


@pytest.mark.parametrize(
    ("options", "limit"),
    [({}, 2.0), ({"momentum": 0.9}, 3.8), ({"momentum": 0.9, "decoupled_weight_decay": True}, 2.0), ({"momentum": 0.5}, 3.0)],
)
def test_decay_of_sgd_that_changes_signs_warns_once(options: dict[str, Any], limit: float) -> None:
    """Above 1 the first step turns the sign, and above the limit the decay alone makes weights grow."""

    def made(rate: float) -> tuple[Any, Parameter]:
        p = Parameter(torch.ones(3, dtype=torch.float64))
        p.grad = torch.zeros_like(p)
        return fused_l2.SGD([p], lr=0.5, weight_decay=2 * rate, **options), p

    when = "a" if options.get("decoupled_weight_decay") or "momentum" not in options else "its first"
    optimizer, p = made(1.0)
    optimizer.step()  # warnings are errors here
    assert p.eq(0).all()
    for rate, grows in ((0.99 * limit, False), (1.01 * limit, True)):
        optimizer, p = made(rate)
        with pytest.warns(UserWarning, match=rf"param group 0 has lr 0.5 .*the decay of {when} step takes {rate:g} times"):
            optimizer.step()
        assert p.lt(0).all()
        for _ in range(1000):
            optimizer.step()
        assert bool(p.abs().gt(1).all()) == grows


def test_sgds_corrected_decay_warns_by_what_it_takes() -> None:
    p = Parameter(torch.ones(3))
    stepped(fused_l2.SGD([p], lr=0.1, weight_decay=20.0, decay_rule="corrected", max_lr=0.4), p)  # 0.1 / 0.4 of it
    with pytest.warns(UserWarning, match="takes 1.6 times"):
        stepped(fused_l2.SGD([p], lr=0.4, weight_decay=4.0, decay_rule="corrected", max_lr=0.4), p)


# What belongs to a param group goes with it.


def two_groups(**options: Any) -> tuple[Any, list[Parameter]]:
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(2)), Parameter(torch.ones(2))]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (0.1, 0.2, 0.4), strict=True)]
    return fused_l2.AdamW(groups, weight_decay=0.1, decay_rule=["fully_decoupled", "plain", "corrected"], **options), params


def reverse(groups: list[Any]) -> None:
    groups.reverse()


def renew(groups: list[Any]) -> None:
    groups[:] = [dict(g) for g in reversed(groups)]


@pytest.mark.parametrize("move", [reverse, renew, lambda groups: groups.pop(0), lambda groups: groups.pop(1)])
@pytest.mark.parametrize("look", [False, True])
def test_rules_and_initial_lrs_follow_their_group(move: Any, look: bool) -> None:
    """Moved or not, a parameter is stepped in the same way, with an lr that is no longer its initial one."""
    (a, mine), (b, theirs) = two_groups(), two_groups()
    for optimizer, params in ((a, mine), (b, theirs)):
        stepped(optimizer, *params)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
    move(a.param_groups)
    if look:
        rules = {1: "plain", 0: "fully_decoupled", 2: "corrected"}
        where = {id(p): i for i, p in enumerate(mine)}
        assert a.decay_rule == a.options["decay_rule"] == tuple(rules[where[id(g["params"][0])]] for g in a.param_groups)
    a = pickle.loads(pickle.dumps(a)) if move is reverse and look else a
    moved = [p for g in a.param_groups for p in g["params"]]
    stepped(a, *moved)
    stepped(b, *theirs)
    order = {reverse: [2, 1, 0], renew: [2, 1, 0]}.get(move) or ([1, 2] if moved[0].equal(theirs[1]) else [0, 2])
    assert all(torch.equal(p, theirs[i]) for p, i in zip(moved, order, strict=True))


def test_step_in_backward_follows_the_groups() -> None:
    (a, mine), (b, theirs) = two_groups(), two_groups()
    fused_l2.step_in_backward(a)
    for i in range(3):
        sum(p.sum() for p in mine).backward()
        a.step()
        stepped(b, *theirs)
        if i == 0:
            a.param_groups.reverse()
        for group in (*a.param_groups, *b.param_groups):
            group["lr"] *= 0.5
    assert all(map(torch.equal, mine, theirs))


def test_attributes_that_are_nearly_options_are_refused() -> None:
    optimizer = fused_l2.SGD([Parameter(torch.ones(3))], lr=0.1)
    for name, meant in (
        ("max_gradnorm", "max_grad_norm"),
        ("maxGradNorm", "max_grad_norm"),
        ("skip_if_non_finite", "skip_if_nonfinite"),
    ):
        with pytest.raises(AttributeError, match=f"no option '{name}': did you mean '{meant}'"):
            setattr(optimizer, name, 1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_gradnorm': did you mean 'max_grad_norm'"):
        fused_l2.SGD([Parameter(torch.ones(3))], max_gradnorm=1)
    with pytest.warns(UserWarning, match=r"setting optimizer.lr changes no step.*param_groups\[i\]\['lr'\]"):
        optimizer.lr = 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What schedulers, GradScaler, Lightning, accelerate and users set.
        for name in ("_step_count", "_opt_called", "grad_scale", "found_inf", "_hook_for_profile", "_speed", "step"):
            setattr(optimizer, name, getattr(optimizer, name, 1))
        optimizer.grad_scale = None
        optimizer.logger = object()
        optimizer.scheduler = None


@pytest.mark.parametrize(
    ("name", "value"), [("foo", 1), ("learning_rate", 1e-3), ("max_norm", torch.tensor(1.0)), ("clip", True), ("decay", (1, 2))]
)
def test_settings_of_nobody_are_said_to_change_no_step(name: str, value: Any) -> None:
    optimizer = fused_l2.SGD([Parameter(torch.ones(3))], lr=0.1)
    with pytest.warns(
        fused_l2.FusedL2Warning, match=rf"setting optimizer.{name} changes no step: SGD has no such option"
    ) as told:
        setattr(optimizer, name, value)
    assert told[0].filename == __file__
    assert getattr(optimizer, name) is value
    setattr(optimizer, name, value)  # warnings are errors here


def test_attributes_of_subclasses_and_libraries_are_theirs() -> None:
    class Mine(fused_l2.AdamW):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.rounds = 0

        def count(self) -> None:
            self.total = 1

    optimizer = Mine([Parameter(torch.ones(3))])
    optimizer.count()
    optimizer.epoch = 3
    plain = fused_l2.AdamW([Parameter(torch.ones(3))])
    for path in ("/usr/lib/python3/dist-packages/trainer/loop.py", r"C:\lib\site-packages\trainer.py"):
        exec(compile(f"optimizer.epoch{len(path)} = 3", path, "exec"), {"optimizer": plain, "__name__": "trainer"})
    exec("optimizer.epoch = 3", {"optimizer": plain, "__name__": "torch.optim.some_scheduler"})


class Tagged(Parameter):
    """A parameter with attributes, as Megatron's and torchrec's."""


class Wrapping(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_that_change_nothing_have_an_engine_and_others_are_told() -> None:
    p, q = Tagged(torch.ones(3)), Parameter(torch.ones(3))
    for param in (p, q):
        optimizer = fused_l2.AdamW([param], lr=0.1)
        for _ in range(3):
            stepped(optimizer, param)
    assert torch.equal(p.detach(), q.detach())
    (part,) = fused_l2.AdamW([p])._stepper._make_plan([{**optimizer.param_groups[0], "params": [p]}], optimizer.state).parts
    assert type(part).__name__ == ("CpuPart" if fused_l2.capabilities()["cpu"].engine.startswith("C++") else "TorchPart")
    other = torch.ones(3).as_subclass(Wrapping).requires_grad_()
    with pytest.warns(UserWarning, match=r"subclass .*Wrapping with plain PyTorch"):
        stepped(fused_l2.SGD([other], lr=0.1), other)
