"""decay_rule, max_lr and cautious: the papers' formulas, which group has which rule, what is refused, and that runs resume.

That the engines agree by bits is shown by test_reference.py and gpu_free/test_kernel_bits.py.
"""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import pytest
import torch
from comparing import assert_same_bits, make_params, plan_of, run, set_grads
from torch import Tensor

import fused_l2
from fused_l2 import reference
from fused_l2.engines import torch_ops
from fused_l2.tables import coefficients
from fused_l2.tables.tensor_table import Flag, Rule

RULES = ("plain", "fully_decoupled", "corrected")
STEPS, LR, DECAY, MOMENTUM, BETAS, EPS = 200, 0.1, 0.2, 0.9, (0.9, 0.99), 1e-8  # lr * wd = 2e-2
CASES = [
    *(("AdamW", True, rule, cautious) for rule, cautious in itertools.product(RULES, (False, True))),
    *(("SGD", True, rule, cautious) for rule, cautious in itertools.product(RULES, (False, True))),
    ("SGD", False, "plain", False),
    ("SGD", False, "corrected", False),
]


def gradient(w: Tensor, step: int) -> Tensor:
    """Of a quadratic around points on both sides of 0, with noise, so that updates go either way."""
    generator = torch.Generator().manual_seed(step)
    centre = torch.linspace(-3, 3, w.numel(), dtype=w.dtype)
    return 0.3 * (w.detach() - centre) + torch.randn(w.numel(), generator=generator, dtype=torch.float64).to(w.dtype)


def by_the_papers(name: str, decoupled: bool, rule: str, cautious: bool, w: Tensor, lrs: list[float], max_lr: float) -> Tensor:
    """Float64, one line per formula, the products as the papers write them."""
    w, m, v, b = w.double(), torch.zeros_like(w), torch.zeros_like(w), None
    for t, lr in enumerate(lrs, start=1):
        g = gradient(w, t)
        eta = lr / max_lr  # the multiplier of the schedule
        if name == "AdamW":
            m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
            u = m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
        else:
            d = g if decoupled else g + DECAY * (eta if rule == "corrected" else 1) * w
            b = d if b is None else MOMENTUM * b + d
            u = b
        # Loshchilov & Hutter 2019, algorithm 2: eta * lambda. Defazio 2025, algorithm 2: gamma^2 / gamma_max * lambda.
        shrink = {"plain": lr * DECAY, "fully_decoupled": eta * DECAY, "corrected": lr * lr / max_lr * DECAY}[rule]
        shrink = shrink if decoupled else 0.0
        w = w - lr * u - shrink * (w * (u * w >= 0) if cautious else w)  # Chen et al. 2025, equation 3
    return w


def make(name: str, decoupled: bool, params: Any, **options: Any) -> Any:
    own: dict[str, Any] = {"betas": BETAS, "eps": EPS} if name == "AdamW" else {"momentum": MOMENTUM}
    if name == "SGD":
        own["decoupled_weight_decay"] = decoupled
    return getattr(fused_l2, name)(params, **{"lr": LR, "weight_decay": DECAY, **own, **options})


@pytest.mark.sweep(5)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("max_lr", [None, 0.25])
@pytest.mark.parametrize(("name", "decoupled", "rule", "cautious"), CASES)
def test_the_formulas_of_the_papers(name, decoupled, rule, cautious, max_lr, dtype):
    """200 steps of a cosine schedule. A step makes at most 16 roundings, by half an eps, of numbers up to 4 max|w|, and the
    recurrence shrinks errors, so the results are within 32 * 200 eps * max|w|; the other rules are further away."""
    start = torch.linspace(-2, 2, 67, dtype=torch.float64)
    p = torch.nn.Parameter(start.to(dtype, copy=True))
    optimizer = make(name, decoupled, [p], decay_rule=rule, max_lr=max_lr, cautious=cautious)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    lrs = []
    for t in range(1, STEPS + 1):
        lrs.append(optimizer.param_groups[0]["lr"])
        p.grad = gradient(p.detach().double(), t).to(dtype)
        optimizer.step()
        schedule.step()
    assert lrs[-1] < 1e-4 * LR
    peak = LR if max_lr is None else max_lr
    expected = by_the_papers(name, decoupled, rule, cautious, start.to(dtype), lrs, peak)
    unit = torch.finfo(dtype).eps * expected.abs().max().item()
    # Where the sign of an update hangs on a rounding, one decay more or less is a difference, of at most lr * wd * |w| at
    # weights that then are near 0: looked at in float64, where no rounding is near a sign.
    if not (cautious and dtype is torch.float32):
        assert (p - expected).abs().max().item() <= 32 * STEPS * unit
    for other_rule, other_cautious in itertools.product(RULES, (False, True)):
        if (other_rule, other_cautious) != (rule, cautious) and (decoupled or (other_rule != RULES[1] and not other_cautious)):
            other = by_the_papers(name, decoupled, other_rule, other_cautious, start.to(dtype), lrs, peak)
            assert (p - other).abs().max().item() > 2 * 32 * STEPS * unit


def test_coefficients_are_rounded_as_written():
    sgd = coefficients.SgdNumbers
    for lr, top, decay in ((0.1, 0.3, 0.05), (1e-3, 7e-3, 0.1)):
        rate = {"plain": lr, "fully_decoupled": lr / top, "corrected": lr * (lr / top)}
        for rule in coefficients.DecayRule:
            expected = 1 - rate[rule.name.lower()] * decay
            assert coefficients.sgd(sgd(lr, 0.9, 0, decay, top, rule), True)[1] == expected
            assert coefficients.adam(coefficients.AdamNumbers(lr, 0.9, 0.99, 1e-8, decay, top, rule), True, 3)[1] == expected
            assert coefficients.sgd(sgd(lr, 0.9, 0, 0.0, top, rule), True)[:2] == (0.0, 1.0)
        assert coefficients.sgd(sgd(lr, 0.9, 0, decay, top, coefficients.DecayRule.CORRECTED), False)[:2] == (
            lr / top * decay,
            1,
        )
        assert coefficients.sgd(sgd(lr, 0.9, 0, decay), True) == (decay, 1 - lr * decay, 0.9, 1, -lr)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("maximize", [False, True])
def test_cautious_decays_where_update_and_weight_agree_in_sign(momentum, maximize):
    """Every pair of signs and zeros, and numbers whose product underflows. Decay is exact here: a half."""
    values = [1.0, -1.0, 0.0, -0.0, 1e-30, -1e-30]
    pairs = list(itertools.product(values, values))
    p = torch.nn.Parameter(torch.tensor([w for w, _ in pairs]))
    p.grad = torch.tensor([-u if maximize else u for _, u in pairs])
    expected = []
    for w, u in pairs:
        agree = w == 0 or u == 0 or (w > 0) == (u > 0)
        expected.append((w / 2 if agree else w) - 0.25 * u)
    fused_l2.SGD(
        [p], lr=0.25, momentum=momentum, weight_decay=2.0, maximize=maximize, decoupled_weight_decay=True, cautious=True
    ).step()
    assert torch.equal(p.detach(), torch.tensor(expected, dtype=torch.float64).float())


@pytest.mark.parametrize("rule", [Rule.SGD, Rule.ADAM], ids=lambda r: r.name)
def test_cautious_in_plain_pytorch_keeps_the_signs_of_zeros(rule, exact_sqrt):
    values = torch.tensor(list(itertools.product((1.0, -1.0, 0.0, -0.0, 1e-30), repeat=3)))
    p, g, m = (x.contiguous() for x in values.t())
    flags = Flag.DECOUPLED | Flag.CAUTIOUS | (Flag.MOMENTUM if rule is Rule.SGD else 0)
    if rule is Rule.SGD:
        state, whole = [m], coefficients.SgdNumbers(0.1, 0.9, 0.0, 5.0)
        expected = reference.sgd(p, g, state, coefficients.sgd(whole, True), flags, False)
    else:
        state, whole = [m, m * m], coefficients.AdamNumbers(0.1, 0.9, 0.99, 1e-8, 5.0)
        expected = reference.adam(p, g, state, coefficients.adam(whole, True, 4), flags)
    torch_ops.step(rule, flags, whole, [p], [g], [[t] for t in state], [torch.tensor(3.0)], first_step=False)
    assert_same_bits([p, *state], [expected[0], *expected[1]])


def lower(optimizer: Any, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= factor


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_each_group_has_its_own_rule_and_peak(name):
    """As many optimizers of one group each would step; a schedule makes no new plan."""
    rules, lrs = (*RULES, "plain"), (0.1, 0.2, 0.4, 0.8)
    together = [make_params((40,), seed=i) for i in range(4)]
    alone = [make_params((40,), seed=i) for i in range(4)]
    groups = [{"params": ps, "lr": lr} for ps, lr in zip(together[:3], lrs, strict=False)]
    whole = make(name, True, groups, decay_rule=list(rules[:3]))
    assert whole.decay_rule == rules[:3]
    single = [make(name, True, alone[i], lr=lrs[i], decay_rule=rules[i]) for i in range(3)]
    plan = None
    for step in range(20):
        if step == 10:
            plan = plan_of(whole)
            assert plan is not None
        if step == 15:  # in the middle of the schedule: its lr is the peak of its own
            whole.add_param_group({"params": together[3], "lr": lrs[3]})
            single.append(make(name, True, alone[3], lr=lrs[3], decay_rule="plain"))
            assert whole.decay_rule == rules
        for i, optimizer in enumerate(single):
            set_grads(together[i], 10 * step + i)
            set_grads(alone[i], 10 * step + i)
            optimizer.step()
            lower(optimizer, 0.9)
        whole.step()
        lower(whole, 0.9)
        assert plan is None or plan_of(whole) is plan  # also with a group more
    for a, b in zip(together, alone, strict=True):
        assert_same_bits(a, b)


def test_a_string_is_the_rule_of_groups_added_later_whose_peak_is_their_own_lr():
    p, q = make_params((5,), seed=1), make_params((5,), seed=1)
    optimizer = make("AdamW", True, make_params((3,)), decay_rule="corrected")
    lower(optimizer, 0.01)
    optimizer.add_param_group({"params": p, "lr": 0.5})
    optimizer.param_groups[1]["lr"] = 0.25
    assert optimizer.decay_rule == "corrected"
    other = make("AdamW", True, q, lr=0.25, decay_rule="corrected", max_lr=0.5)
    for ps, o in ((p, optimizer), (q, other)):
        set_grads(ps, 0)
        o.step()
    assert_same_bits(p, q)


def test_a_learning_rate_above_the_peak_is_no_error():
    p, q = make_params((9,)), make_params((9,))
    run(lambda ps: make("AdamW", True, ps, lr=0.4, decay_rule="fully_decoupled", max_lr=0.2), p, 1)
    run(lambda ps: make("AdamW", True, ps, lr=0.4, weight_decay=DECAY / 0.2), q, 1)  # 1 - 0.4 / 0.2 * wd
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_weight_decay_of_zero_and_a_learning_rate_of_zero():
    for rule in RULES:
        p, q = make_params((40,)), make_params((40,))
        run(lambda ps, r=rule: make("AdamW", True, ps, weight_decay=0.0, decay_rule=r, cautious=True), p, 3)
        run(lambda ps: make("AdamW", True, ps, weight_decay=0.0), q, 3)
        assert_same_bits(p, q)
        optimizer = make("AdamW", True, p, decay_rule=rule)
        optimizer.param_groups[0]["lr"] = 0.0  # a schedule may end there
        optimizer.step()
        assert_same_bits(p, q)


SETTINGS = [
    ("SGD", {"decoupled_weight_decay": True, "cautious": True, "decay_rule": "fully_decoupled"}),
    ("SGD", {"decay_rule": "corrected", "max_lr": 0.3}),
    ("AdamW", {"cautious": True, "decay_rule": "corrected"}),
    ("Adam", {"decoupled_weight_decay": True, "decay_rule": ["fully_decoupled"]}),
]


@pytest.mark.parametrize(("name", "options"), SETTINGS)
def test_a_resumed_run_has_the_same_bits_and_the_state_dict_no_key_more(name, options):
    def build(ps: Any) -> Any:
        return getattr(fused_l2, name)(ps, lr=0.1, weight_decay=0.2, **options)

    def go_on(optimizer: Any, schedule: Any, ps: Any, steps: range) -> None:
        for step in steps:
            set_grads(ps, step)
            optimizer.step()
            schedule.step()

    def cosine(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    params = make_params((33, 5))
    optimizer = build(params)
    schedule = cosine(optimizer)
    go_on(optimizer, schedule, params, range(5))
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), schedule.state_dict()], file)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
    go_on(optimizer, schedule, params, range(5, 10))

    file.seek(0)
    saved, saved_schedule = torch.load(file, weights_only=True)
    theirs = getattr(torch.optim, name)(make_params((3,)), lr=0.1)
    assert set(saved) == {"state", "param_groups"}
    assert set(saved["param_groups"][0]) - {"initial_lr"} == set(theirs.param_groups[0])
    again = build(resumed)
    again_schedule = cosine(again)
    again.load_state_dict(saved)
    again_schedule.load_state_dict(saved_schedule)
    go_on(again, again_schedule, resumed, range(5, 10))
    assert_same_bits(resumed, params)


def test_options_may_be_set_between_steps():
    def stepped(change: Any, **options: Any) -> list[Tensor]:
        ps = make_params((40,))
        optimizer = run(lambda p: make("AdamW", True, p, **options), ps, 2)
        change(optimizer)
        lower(optimizer, 0.5)
        for step in (2, 3):
            set_grads(ps, step)
            optimizer.step()
        return ps

    def switch(optimizer: Any) -> None:
        optimizer.decay_rule, optimizer.max_lr, optimizer.cautious = "corrected", 0.3, True
        assert (optimizer.decay_rule, optimizer.max_lr, optimizer.cautious) == ("corrected", 0.3, True)

    def switch_back(optimizer: Any) -> None:
        switch(optimizer)
        optimizer.decay_rule, optimizer.max_lr, optimizer.cautious = ["plain"], None, False

    plain, switched = stepped(lambda o: None), stepped(switch)
    assert_same_bits(stepped(switch_back), plain)
    assert not torch.equal(plain[0], switched[0])
    # At constant lr = max_lr all rules but fully_decoupled are one: from there on switching is as having had the options.
    assert_same_bits(stepped(lambda o: setattr(o, "max_lr", 0.3), decay_rule="corrected"), stepped(
        lambda o: (setattr(o, "decay_rule", "corrected"), setattr(o, "max_lr", 0.3))
    ))  # fmt: skip


REFUSED = [
    ("SGD", {"decay_rule": "none"}, ValueError, "Invalid decay_rule: 'none'; expected 'plain', 'fully_decoupled' or 'corr"),
    ("AdamW", {"decay_rule": ["plain", 1]}, ValueError, "Invalid decay_rule: 1;"),
    ("AdamW", {"decay_rule": 1}, TypeError, "decay_rule must be 'plain'.*one of them per param group, got 1"),
    ("AdamW", {"decay_rule": ["plain", "corrected"]}, ValueError, "decay_rule has 2 rules for 1 param groups"),
    ("AdamW", {"decay_rule": []}, ValueError, "decay_rule has 0 rules for 1 param groups"),
    ("SGD", {"decay_rule": "fully_decoupled"}, ValueError, "needs decoupled.*group 0.*decoupled_weight_decay=True"),
    ("Adam", {"decay_rule": "fully_decoupled"}, ValueError, "needs decoupled.*group 0.*Use AdamW"),
    ("Adam", {"decay_rule": "corrected"}, ValueError, r"needs decoupled.*group 0.*sqrt\(v\) divides.*Use AdamW"),
    ("SGD", {"cautious": True}, ValueError, "cautious=True needs decoupled.*group 0.*decoupled_weight_decay=True"),
    ("Adam", {"cautious": True}, ValueError, "cautious=True needs decoupled.*group 0.*Use AdamW"),
    ("AdamW", {"max_lr": 0.0}, ValueError, "Invalid max_lr: 0.0; expected a finite number > 0"),
    ("AdamW", {"max_lr": math.inf}, ValueError, "Invalid max_lr: inf"),
    ("AdamW", {"max_lr": math.nan}, ValueError, "Invalid max_lr: nan"),
    ("AdamW", {"max_lr": "0.1"}, TypeError, "max_lr must be a number, got '0.1'"),
    ("AdamW", {"lr": 0.0, "decay_rule": "corrected"}, ValueError, r"param group 0 was added with \(0.0\).*pass max_lr="),
]


@pytest.mark.parametrize(("name", "options", "error", "says"), REFUSED, ids=lambda v: str(v)[:40])
def test_refused(name, options, error, says):
    with pytest.raises(error, match=says):
        getattr(fused_l2, name)(make_params((3,)), **options)
    params, expected = make_params((3,)), make_params((3,))
    optimizer = run(lambda p: getattr(fused_l2, name)(p), params, 1)
    run(lambda p: getattr(fused_l2, name)(p), expected, 1)
    if "lr" not in options:
        (option, value), = options.items()  # fmt: skip
        before = getattr(optimizer, option)
        with pytest.raises(error, match=says):
            setattr(optimizer, option, value)
        assert getattr(optimizer, option) == before
    optimizer.step()  # and it goes on


def test_refused_later():
    optimizer = fused_l2.Adam(make_params((3,)), decoupled_weight_decay=True, decay_rule="corrected", cautious=True)
    with pytest.raises(ValueError, match=r"needs decoupled.*param group 1"):
        optimizer.add_param_group({"params": make_params((2,)), "decoupled_weight_decay": False})
    with pytest.raises(ValueError, match=r"param group 1 was added with \(0.0\)"):
        optimizer.add_param_group({"params": make_params((2,)), "lr": 0.0})
    optimizer.add_param_group({"params": make_params((2,))})
    optimizer.step()
    optimizer.param_groups[1]["decoupled_weight_decay"] = False
    with pytest.raises(ValueError, match=r"needs decoupled.*param group 1"):
        optimizer.step()
    sgd = fused_l2.SGD(make_params((3,)), decoupled_weight_decay=True, cautious=True)
    with pytest.raises(ValueError, match="cautious=True needs decoupled"):
        sgd.decoupled_weight_decay = False
    assert sgd.decoupled_weight_decay is True
    # A lr of 0 is fine where the rule does not look at it, and where max_lr is given.
    fused_l2.AdamW(make_params((3,)), lr=0.0).step()
    fused_l2.AdamW(make_params((3,)), lr=0.0, decay_rule="corrected", max_lr=1e-3).step()
