"""8-bit states: the formats, every engine against their definition by bits, and what surrounds them."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from comparing import assert_same_bits, plan_of, set_grad
from conftest import needs_library

import fused_l2
from fused_l2 import reference
from fused_l2.engines import torch_ops
from fused_l2.parameters import eight_bits, low_precision
from fused_l2.tables import coefficients
from fused_l2.tables.modes import Mode
from fused_l2.tables.tensor_table import Flag, Rule

HALVES = (torch.bfloat16, torch.float16)
FORMATS = {
    "exp_avg": (reference.encode_signed, reference.decode_signed, 256, 32),
    "exp_avg_sq": (reference.encode_positive, reference.decode_positive, 255, 32),
}
each_format = pytest.mark.parametrize("name", FORMATS)
CASES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
    "AdamW": {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.05},
}
each = pytest.mark.parametrize("rule", CASES)
SHAPES = ((64, 64), (129, 2, 32), (1, 4096), (4096, 32), (70, 96))
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-42, 1e-30, 3.4028235e38, -3.4e38, 1.0, 2.0**-126)


def draw(shape, seed: int, special: bool = True) -> torch.Tensor:
    """Float32 over many orders of magnitude; in every other group a tenth of it is special."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** (12 * torch.rand(shape, generator=generator) - 9)
    if special:
        values = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), shape, generator=generator)]
        at = torch.rand(shape, generator=generator) < 0.1
        at &= (torch.arange(x.numel()) // 32 % 2 == 0).view(shape)
        x = torch.where(at, values, x)
    return x


def random(groups: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 1 << 32, (groups, 32), generator=torch.Generator().manual_seed(seed))


# The formats.


@each_format
def test_every_code_with_every_scale_is_what_it_was_whatever_the_random_bits(name):
    encode, decode, codes, least = FORMATS[name]
    every = torch.arange(codes).to(torch.uint8)
    if len(every) % 32:
        every = torch.cat([every, every[-1:]])
    for scale in range(least, 255):
        groups = every.view(-1, 32)
        scales = torch.full((len(groups),), scale, dtype=torch.uint8)
        x = decode(groups, scales)
        assert bool(x.isfinite().all())
        assert bool((x[x != 0].abs() >= 2.0**-126).all())
        for bits in (None, random(len(groups), scale), torch.zeros_like(groups, dtype=torch.int64)):
            assert_same_bits(decode(*encode(x, bits)), x)


@each_format
def test_windows_and_what_is_below_them(name):
    encode, decode, _, _ = FORMATS[name]
    binades = 15.807 if name == "exp_avg" else 31.637  # from the largest to the least
    every = torch.arange(256 if name == "exp_avg_sq" else 128).to(torch.uint8)[1:].view(-1, 1).expand(-1, 32)
    x = decode(every, torch.full((len(every),), 150, dtype=torch.uint8))[:, 0]
    x = x[: 254 if name == "exp_avg_sq" else 127]
    assert float(x.max()) == 1.75 * 2.0**23
    assert math.log2(float(x.max() / x.min())) == pytest.approx(binades, abs=0.001)
    assert bool((x.diff() > 0).all())
    group = torch.full((1, 32), 1e-30)
    group[0, 0] = 1.0
    ones = torch.full((1, 32), 0xFFFFFFFF)
    if name == "exp_avg_sq":  # never 0 unless it is 0
        group[0, 1] = 0.0
        found = decode(*encode(group, ones * 0))
        assert found[0, 1] == 0
        assert bool((found[0, 2:] == x.min() * 2.0 ** (127 - 150)).all())
    else:  # 0 or the least, with the right mean
        share = 1 / 256
        group[0, 1:] = share * 2.0 ** (127 - 142)
        bits = (torch.arange(256) << 8).view(-1, 1).expand(-1, 32)
        rounded = decode(*encode(group.expand(256, -1), bits))[:, 1]
        assert rounded.count_nonzero() == 1
        assert_same_bits(decode(*encode(-group, ones)), -decode(*encode(group, ones)))


@each_format
def test_the_mean_of_roundings_is_the_value(name):
    """For all 2^8 or 2^16 random numbers the mean is exact to the half step of the random numbers themselves."""
    encode, decode, _, _ = FORMATS[name]
    x = (torch.rand(1, 32, generator=torch.Generator().manual_seed(0)) + 0.01) * 3
    draws = 1 << (8 if name == "exp_avg" else 16)
    bits = (torch.arange(draws) << (8 if name == "exp_avg" else 16)).view(-1, 1).expand(-1, 32)
    mean = decode(*encode(x.expand(draws, -1), bits)).double().mean(0)
    step = 2.0 ** (x.double()[0].log2().floor() - 3)
    assert bool(((mean - x[0]).abs() <= step / draws).all())


def test_what_is_not_finite_stays_that():
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 1.0] + [1e-30] * 27).view(1, 32)
    bits = random(1, 0)
    m = reference.decode_signed(*reference.encode_signed(x, bits))[0]
    v = reference.decode_positive(*reference.encode_positive(x.abs(), bits))[0]
    assert bool(m[:3].isnan().all())
    assert m[3] == 0
    assert bool((v[:2] == math.inf).all())
    assert bool(v[2].isnan())
    assert v[3] == 0
    assert bool((v[4:] == 1.125 * 2.0**97).all())
    zeros = torch.zeros(1, 32)
    assert_same_bits(reference.decode_signed(*reference.encode_signed(zeros, bits)), zeros)
    new = torch.zeros(1, 32, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)  # a state that was just made
    assert_same_bits(reference.decode_signed(*new), zeros)
    assert_same_bits(reference.decode_positive(*new), zeros)


def test_every_bfloat16_with_every_remainder_of_8_bits():
    """Splitting what was joined gives it back, whatever the random bits; joining what was split is a neighbour of 24 bits."""
    halves = torch.arange(65536).view(-1, 1).expand(-1, 256)
    p = torch.where(halves >= 1 << 15, halves - (1 << 16), halves).to(torch.int16).view(torch.bfloat16)
    remainder = torch.arange(-128, 128).to(torch.int8).expand(65536, -1)
    w = low_precision.join24(p, remainder)
    assert bool((w.isnan() == p.isnan()).all())
    assert bool((torch.signbit(w) == torch.signbit(p)).all())
    magnitude = halves & 0x7FFF
    made = (magnitude <= 0x7F80) & ~((magnitude == 0) & (remainder < 0)) & ~((magnitude == 0x7F80) & (remainder > 0))
    bits = torch.randint(0, 1 << 32, w.shape, generator=torch.Generator().manual_seed(0))
    again, left = low_precision.split24(w, bits)
    assert torch.equal(again.view(torch.int16)[made], p.view(torch.int16)[made])
    assert torch.equal(left[made], remainder[made])
    assert bool((left[p.isnan()] == 0).all())
    assert bool(again[p.isnan()].isnan().all())
    # What a parameter was set to since carries it past neither 0 nor infinity.
    assert bool((w[magnitude == 0].abs() < 1e-38).all())
    assert not w[magnitude == 0x7F80].isnan().any()


def test_24_bits_are_neighbours_with_the_right_mean():
    w = draw((1000,), 3)
    exact = w[w.isfinite() & (w.abs() < 3e38)]
    every = torch.stack(
        [low_precision.join24(*low_precision.split24(exact, torch.full_like(exact, b).long())) for b in range(256)]
    )
    units = (every.view(torch.int32).long() - exact.view(torch.int32).long()) & 0xFFFFFFFF
    steps = torch.where(units >= 1 << 31, units - (1 << 32), units)
    assert bool((steps.abs() < 256).all())
    assert bool((steps.sum(0) == 0).all())  # of magnitudes as integers, which is that of values within a binade


# Geometry.


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(64, 64), True),
        (torch.zeros(64, 64, dtype=torch.bfloat16), True),
        (torch.zeros(64, 64, dtype=torch.float64), False),
        (torch.zeros(4096), False),
        (torch.zeros(63, 64), False),
        (torch.zeros(128, 33), False),
        (torch.zeros(64, 32, 2, 2).contiguous(memory_format=torch.channels_last), True),
        (torch.zeros(64, 128).t(), False),
        (torch.zeros(64, 128)[:, :64], False),
        (torch.zeros(64, 2, 64).transpose(1, 2), True),
        (torch.zeros(1, 4096), True),
    ],
)
def test_which_tensors_fit(tensor, expected):
    assert eight_bits.fits(tensor) is expected
    p = torch.nn.Parameter(tensor)
    p.grad = torch.ones_like(tensor)
    made = fused_l2.AdamW([p], state_dtype="8bit")
    made.step()
    state = made.state[p]
    if expected:
        assert set(state) == {"step", "exp_avg_8bit", "exp_avg_scale", "exp_avg_sq_8bit", "exp_avg_sq_scale"}
        assert state["exp_avg_8bit"].stride() == p.stride()
        assert state["exp_avg_scale"].shape == (p.shape[0], p.numel() // p.shape[0] // 32)
        assert state["exp_avg_8bit"].dtype is state["exp_avg_scale"].dtype is torch.uint8
    else:
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].dtype is (torch.float64 if tensor.dtype is torch.float64 else torch.float32)


# Engines against the definition.


def expected_step(rule, flags, mode, p, kept, grad, state, row, bits, first):
    """(parameter, what is kept, codes and scales by key)"""
    w = low_precision.widened(mode, p, kept)
    names = ("momentum_buffer",) if rule is Rule.SGD else ("exp_avg", "exp_avg_sq")
    wide = [eight_bits.decode(n, state[f"{n}_8bit"], state[f"{n}_scale"]) for n in names]
    if rule is Rule.SGD:
        new, new_states = reference.sgd(w, grad, wide, row, flags, first)
    else:
        new, new_states = reference.adam(w, grad, wide, row, flags)
    arranged = torch.empty_like(p, dtype=torch.int64)
    eight_bits.in_memory_order(arranged).copy_(bits)
    rounded, left = low_precision.narrowed(mode, new, p.dtype, arranged)
    found = {}
    for n, value in zip(names, new_states, strict=True):
        codes, scales = eight_bits.encode(n, eight_bits.arranged(value, p), bits)
        found[f"{n}_8bit"], found[f"{n}_scale"] = codes, scales.view_as(state[f"{n}_scale"])
    return rounded, left, found


def same_codes(name: str, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """By bytes; a NaN has several codes, as it has several bit patterns."""
    codes, scales = f"{name}_8bit", f"{name}_scale"
    assert torch.equal(a[scales], b[scales]), name
    nan = [eight_bits.decode(name, s[codes], s[scales]).isnan() for s in (a, b)]
    assert torch.equal(*nan), name
    assert torch.equal(a[codes][~nan[0]], b[codes][~nan[0]]), name


MODES = {
    torch.float32: ["round"],
    torch.bfloat16: [m.name.lower() for m in Mode],
    torch.float16: ["round", "master", "kahan", "stochastic"],
}
SIGNATURES = [
    (p, g, m) for p in MODES for g in {torch.float32: HALVES, **{h: (h, torch.float32) for h in HALVES}}[p] for m in MODES[p]
]
VARIANTS = {
    "SGD": [
        {}, {"nesterov": True}, {"maximize": True, "dampening": 0.3}, {"weight_decay": 0.0},
        {"decoupled_weight_decay": True}, {"decoupled_weight_decay": True, "cautious": True},
    ],
    "Adam": [
        {}, {"maximize": True}, {"weight_decay": 0.0, "betas": (0.3, 0.99)}, {"decoupled_weight_decay": True},
        {"decoupled_weight_decay": True, "cautious": True},
    ],
}  # fmt: skip


@pytest.mark.sweep(9)
@needs_library
@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda s: "-".join(str(x).removeprefix("torch.") for x in s))
@each
@pytest.mark.parametrize("first", [False, True], ids=["", "first"])
def test_the_library_and_plain_pytorch_have_the_bits_of_the_definition(rule, signature, first, capability, monkeypatch):
    run_both(rule, signature, {}, first, monkeypatch)


@pytest.mark.sweep(5)
@needs_library
@pytest.mark.parametrize(("rule", "variant"), [(r, v) for r in VARIANTS for v in VARIANTS[r]], ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["", "first"])
def test_every_flag_has_the_bits_of_the_definition(rule, variant, first, capability, monkeypatch):
    run_both(rule, (torch.bfloat16, torch.bfloat16, "remainder8"), variant, first, monkeypatch)


def run_both(rule, signature, variant, first, monkeypatch):
    param_dtype, grad_dtype, mode = signature
    kind = Rule.SGD if rule == "SGD" else Rule.ADAM
    settings = {**CASES["SGD" if kind is Rule.SGD else "AdamW"], **variant}

    def build():
        params = []
        for i, shape in enumerate(SHAPES):
            value = draw(shape, 7 * i).to(param_dtype)
            if i == 1:
                value = value.transpose(1, 2).contiguous().transpose(1, 2)
            p = torch.nn.Parameter(value)
            set_grad(p, torch.empty_like(value, dtype=grad_dtype).copy_(draw(shape, 7 * i + 1)))
            params.append(p)
        made = getattr(fused_l2, rule)(params, **settings, low_precision=mode, state_dtype="8bit", seed=5)
        for i, p in enumerate(params):
            own = made._stepper.options.precision.mode_of(p)
            if first:
                continue
            state = made.state[p]
            for k, name in enumerate(("momentum_buffer",) if kind is Rule.SGD else ("exp_avg", "exp_avg_sq")):
                value = torch.empty_like(p, dtype=torch.float32).copy_(draw(p.shape, 7 * i + 2 + k))
                codes, scales = eight_bits.encode(name, value.abs() if k else value, None)
                state[f"{name}_8bit"], state[f"{name}_scale"] = codes, scales.view(eight_bits.scale_shape(p))
            state["step"] = torch.tensor(6.0)
            if own.state_name:
                w = torch.empty_like(p, dtype=torch.float32).copy_(draw(p.shape, 7 * i))
                bits = torch.full_like(p, 0x80, dtype=torch.int64)
                left = low_precision.narrowed(own, w, p.dtype, bits)[1]
                state[own.state_name] = torch.empty_like(p, dtype=left.dtype).copy_(left)
        return params, made

    (params, made), (twins, by_torch) = build(), build()
    flags = made._rule.flags(made._values(made.param_groups[0]), made._stepper.options)
    decoupled, s = bool(flags & Flag.DECOUPLED), made.param_groups[0]
    count = 1 if first else 7
    if kind is Rule.SGD:
        numbers = coefficients.SgdNumbers(s["lr"], s["momentum"], s["dampening"], s["weight_decay"])
        row = coefficients.sgd(numbers, decoupled)
    else:
        numbers = coefficients.AdamNumbers(s["lr"], *s["betas"], s["eps"], s["weight_decay"])
        row = coefficients.adam(numbers, decoupled, count)
    wanted = []
    for i, p in enumerate(params):
        own = made._stepper.options.precision.mode_of(p)
        bits = low_precision.random_bits(low_precision.parameter_key(5, i), count, p.numel())
        if first:
            names = ("momentum_buffer",) if kind is Rule.SGD else ("exp_avg", "exp_avg_sq")
            state = {}
            for name in names:
                state[f"{name}_8bit"], state[f"{name}_scale"] = eight_bits.empty_state(p)
            kept = None
            if own.state_name:
                kept = p.detach().float() if own is Mode.MASTER else torch.zeros_like(p, dtype=own.state_dtype)
        else:
            state = {k: v.clone() for k, v in made.state[p].items()}
            kept = state.get(own.state_name)
        wanted.append(expected_step(kind, flags, own, p.detach().clone(), kept, p.grad, state, row, bits, first))
    made.step()
    with monkeypatch.context() as m:
        m.setattr(fused_l2.engines, "has_engine", lambda *_: False)
        m.setattr(torch_ops, "adam", reference_adam)
        by_torch.step()
    for optimizer, own_params in ((made, params), (by_torch, twins)):
        if optimizer is by_torch and kind is Rule.ADAM and {"cautious", "maximize"} & set(variant):
            continue  # torch's function, replaced for its square root, knows neither
        for p, (new, left, states) in zip(own_params, wanted, strict=True):
            state = optimizer.state[p]
            assert_same_bits(p.detach(), new, f"parameter of shape {tuple(p.shape)}")
            name = optimizer._stepper.options.precision.mode_of(p).state_name
            if name:
                assert state[name].dtype is left.dtype
                if left.dtype.is_floating_point:
                    assert_same_bits(state[name], left, name)
                else:
                    assert torch.equal(state[name], left)
            for name in {key.rpartition("_")[0] for key in states}:
                same_codes(name, state, states)
            assert state["step"] == count


def reference_adam(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, **options):
    """torch's function, whose square root is not exact on every CPU, by the definition."""
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step += 1
        decoupled = options["decoupled_weight_decay"]
        numbers = coefficients.AdamNumbers(
            options["lr"], options["beta1"], options["beta2"], options["eps"], options["weight_decay"]
        )
        row = coefficients.adam(numbers, decoupled, float(step))
        new, new_states = reference.adam(p, g, [m, v], row, int(Flag.DECOUPLED) * decoupled)
        for old, value in zip((p, m, v), (new, *new_states), strict=True):
            old.copy_(value)


@needs_library
@each
def test_bits_do_not_depend_on_threads_or_on_how_a_step_is_cut(rule, threads):
    """Against one parameter a step, on one thread. 300,000 elements are more than a thread takes at a time."""

    def run(together: bool) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(draw(s, i, special=False)) for i, s in enumerate(((3000, 96), (64, 64), (50, 3, 32)))]
        made = getattr(fused_l2, rule)(params, **CASES[rule], state_dtype="8bit")
        for step in range(3):
            for p in params:
                p.grad = None
            for i, p in enumerate(params):
                p.grad = draw(p.shape, 10 * step + i, special=False)
                if not together:
                    made.step()
                    p.grad = None
            if together:
                made.step()
        return [t for p in params for t in (p.detach(), *made.state[p].values())]

    at_once = run(True)
    torch.set_num_threads(1)
    assert_same_bits(at_once, run(False))


@needs_library
@pytest.mark.parametrize("mode", ["remainder8", "kahan", "master", "stochastic"])
def test_bits_do_not_depend_on_what_else_a_step_steps(mode):
    """Beside a large tensor a step is larger than the caches, and goes through memory in shorter stretches."""

    def run(together: bool) -> list[torch.Tensor]:
        small, large = (torch.nn.Parameter(torch.zeros(n, 96).bfloat16()) for n in (301, 35_000))
        made = fused_l2.AdamW([small, large], low_precision=mode, state_dtype="8bit", seed=3)
        for step in range(3):
            small.grad, large.grad = draw(small.shape, step, special=False).bfloat16(), torch.ones_like(large)
            if not together:
                large.grad = None
            made.step()
        return [small.detach(), *made.state[small].values()]

    assert_same_bits(run(True), run(False))


# Around a step.


def train(made: Any, params: list[Any], steps: range) -> None:
    for step in steps:
        for i, p in enumerate(params):
            p.grad = torch.empty_like(p).copy_(draw(p.shape, 100 * step + i, special=False))
        made.step()


def build(rule: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[Any], Any]:
    """Two tensors that 8 bits fit and one that they do not."""
    params = [torch.nn.Parameter(draw(s, i, special=False).to(dtype)) for i, s in enumerate(((64, 64), (40,), (50, 3, 32)))]
    options = {"state_dtype": "8bit", **options}
    return params, getattr(fused_l2, rule)(params, **CASES[rule], **options)


@pytest.mark.parametrize("state_dtype", ["8bit", None])
def test_momentum_that_is_switched_off_waits_in_its_state_as_of_torch(state_dtype):
    param = torch.nn.Parameter(draw((64, 64), 1, special=False))
    made = fused_l2.SGD([param], lr=0.1, momentum=0.9, state_dtype=state_dtype)
    set_grad(param, draw((64, 64), 2, special=False))
    made.step()
    kept = {key: value.clone() for key, value in made.state[param].items() if key != "step"}
    for momentum, is_kept in ((0.0, True), (0.9, False)):
        made.param_groups[0]["momentum"] = momentum
        made.step()
        found = {key: value for key, value in made.state[param].items() if key != "step"}
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[key], kept[key]) for key in kept) is is_kept


def test_float32_states_of_a_parameter_that_is_listed_twice_are_rounded_once():
    param, other = (torch.nn.Parameter(draw((64, 64), seed, special=False)) for seed in (1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the duplicate
        made = fused_l2.AdamW([param, param, other], state_dtype="8bit")
    for p in (param, other):
        set_grad(p, draw((64, 64), 3, special=False))
    made.step()
    before = copy.deepcopy(made.float32_state_dict()["state"])
    made.load_state_dict(made.float32_state_dict())
    assert all("exp_avg_8bit" in made.state[p] for p in (param, other))
    after = made.float32_state_dict()["state"]
    assert all(torch.equal(state[key], after[i][key]) for i, state in before.items() for key in state)
    made.step()


def all_bits(made: Any, params: list[Any]) -> list[torch.Tensor]:
    return [t for p in params for t in (p.detach(), *(v for k, v in sorted(made.state[p].items())))]


@each
@pytest.mark.parametrize("mode", ["round", "remainder8"])
def test_a_checkpoint_resumes_with_the_same_bits(rule, mode, tmp_path):
    dtype = torch.float32 if mode == "round" else torch.bfloat16
    params, made = build(rule, dtype, low_precision=mode)
    train(made, params, range(3))
    torch.save([made.state_dict(), params], tmp_path / "checkpoint.pt")
    train(made, params, range(3, 6))
    state, kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    others, other = build(rule, dtype, low_precision=mode)
    for p, saved in zip(others, kept, strict=True):
        p.data.copy_(saved)
    other.load_state_dict(state)
    train(other, others, range(3, 6))
    assert_same_bits(all_bits(other, others), all_bits(made, params))
    twin = copy.deepcopy(made)
    assert twin.state_dtype == "8bit"


@each
def test_states_go_to_torch_and_back(rule):
    """Exported they are what a step works on; imported again they are the same values, and train in the same bits."""
    params, made = build(rule)
    train(made, params, range(3))
    given = made.float32_state_dict()
    theirs = getattr(torch.optim, rule)([torch.nn.Parameter(p.detach().clone()) for p in params], **CASES[rule])
    theirs.load_state_dict(copy.deepcopy(given))
    train(theirs, [p for g in theirs.param_groups for p in g["params"]], range(3, 5))
    name = "momentum_buffer" if rule == "SGD" else "exp_avg_sq"
    for i, p in enumerate(params):
        state = made.state[p]
        if i == 1:
            assert_same_bits(given["state"][i][name], state[name])
        else:
            assert_same_bits(given["state"][i][name], eight_bits.decode(name, state[f"{name}_8bit"], state[f"{name}_scale"]))
    _, other = build(rule)
    other.load_state_dict(given)
    others = [p for g in other.param_groups for p in g["params"]]
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    again = other.float32_state_dict()["state"]  # of bytes a group may have others, if its largest element was rounded down
    for i, state in given["state"].items():
        assert_same_bits(list(again[i].values()), list(state.values()))
    train(made, params, range(3, 5))
    train(other, others, range(3, 5))
    assert_same_bits(all_bits(other, others), all_bits(made, params))


@each
def test_a_checkpoint_of_torch_is_rounded_to_nearest(rule):
    params, made = build(rule)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    theirs = getattr(torch.optim, rule)(twins, **CASES[rule])
    train(theirs, twins, range(2))
    made.load_state_dict(theirs.state_dict())
    for name in ("momentum_buffer",) if rule == "SGD" else ("exp_avg", "exp_avg_sq"):
        for p, q in zip(params, twins, strict=True):
            if p.dim() == 1:
                assert_same_bits(made.state[p][name], theirs.state[q][name])
                continue
            codes, scales = eight_bits.encode(name, theirs.state[q][name], None)
            assert torch.equal(made.state[p][f"{name}_8bit"], codes)
            assert torch.equal(made.state[p][f"{name}_scale"].flatten(), scales)
            assert name not in made.state[p]
    train(made, params, range(2, 3))


@each
@pytest.mark.parametrize("other", [torch.float32, None, torch.bfloat16], ids=str)
def test_a_running_optimizer_is_switched_over(rule, other):
    name = "momentum_buffer" if rule == "SGD" else "exp_avg"
    params, made = build(rule, state_dtype=other)
    train(made, params, range(2))
    before = [made.state[p][name].float() for p in params]
    made.state_dtype = "8bit"
    assert "exp_avg" not in made.state[params[0]]
    assert f"{name}_8bit" in made.state[params[0]]
    train(made, params, range(2, 4))
    state = made.state[params[0]]
    exact = eight_bits.decode(name, state[f"{name}_8bit"], state[f"{name}_scale"])
    made.state_dtype = other
    assert_same_bits(made.state[params[0]][name], exact)
    assert not {k for k in made.state[params[0]] if k.endswith(("_8bit", "_scale"))}
    train(made, params, range(4, 5))
    assert made.state[params[0]][name].dtype is (other or torch.float32)
    assert all(b.shape == p.shape for b, p in zip(before, params, strict=True))


def test_refusals():
    params, made = build("AdamW")
    train(made, params, range(1))
    plain = fused_l2.AdamW([torch.nn.Parameter(p.detach().clone()) for p in params])
    with pytest.raises(
        ValueError, match=r"parameter 0 of group 0 .*holds 'exp_avg_8bit'.*state_dtype=None.*float32_state_dict\(\)"
    ):
        plain.load_state_dict(made.state_dict())
    assert not plain.state
    plain.load_state_dict(made.float32_state_dict())

    with pytest.raises(ValueError, match=r"state_dtype='8bit' and amsgrad=True exclude each other.*amsgrad=False"):
        build("AdamW", amsgrad=True)
    with pytest.raises(ValueError, match=r"amsgrad=True of param group 1 exclude"):
        made.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "amsgrad": True})
    largest = fused_l2.AdamW([torch.nn.Parameter(torch.ones(3))], amsgrad=True)
    with pytest.raises(ValueError, match=r"amsgrad=True of param group 0 exclude"):
        largest.state_dtype = "8bit"
    assert largest.state_dtype is None
    with pytest.raises(ValueError, match=r"'8bit' or None"):
        fused_l2.AdamW(params, state_dtype="4bit")

    before = {k: v.clone() for k, v in made.state[params[0]].items()}
    weights = params[0].detach().clone()

    def refused(match: str) -> None:
        with pytest.raises(RuntimeError, match=match):
            train(made, params, range(1, 2))
        assert_same_bits(params[0], weights)
        made.state[params[0]].clear()
        made.state[params[0]].update(before)

    made.state[params[0]]["exp_avg"] = torch.zeros_like(weights)
    refused(r"parameter 0 of group 0 .*its state holds 'exp_avg', and this optimizer has state_dtype='8bit'")
    made.state[params[0]]["exp_avg_scale"] = torch.zeros(64, 1, dtype=torch.uint8)
    refused(r"'exp_avg_scale' has shape \(64, 1\), not \(64, 2\): a scale for each 32 elements")
    made.state[params[0]]["exp_avg_sq_8bit"] = torch.zeros(64, 64)
    refused(r"'exp_avg_sq_8bit' has dtype float32")
    made.state[params[0]]["exp_avg_sq_8bit"] = torch.zeros(64, 64, dtype=torch.uint8).t()
    refused(r"'exp_avg_sq_8bit' lies in memory in another order")
    del made.state[params[0]]["exp_avg_sq_scale"]
    refused(r"has .*, but no 'exp_avg_sq_scale'")
    train(made, params, range(1, 2))


def test_repr_says_which_parameters_have_them():
    _, made = build("AdamW")
    assert "state_dtype: 8bit (2 of 3 parameters, 99.6 % of their elements; the others keep float32 states)" in repr(made)


@needs_library
@each
def test_a_replaced_state_is_stepped_and_a_moved_one_found(rule):
    params, made = build(rule)
    twins, twin = build(rule)
    train(made, params, range(2))
    train(twin, twins, range(2))
    name = "momentum_buffer" if rule == "SGD" else "exp_avg"
    plan = plan_of(made)
    for key in (f"{name}_8bit", f"{name}_scale"):
        made.state[params[0]][key] = made.state[params[0]][key].clone()
        made.state[params[2]][key].data = made.state[params[2]][key].clone()
    train(made, params, range(2, 4))
    train(twin, twins, range(2, 4))
    assert plan_of(made) is plan
    assert_same_bits(all_bits(made, params), all_bits(twin, twins))
    made.state[params[0]][f"{name}_scale"] = made.state[params[0]][f"{name}_scale"][:, :1]
    with pytest.raises(RuntimeError, match="a scale for each 32 elements"):
        train(made, params, range(4, 5))


@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_it_composes(rule):
    """Clipping, skipping, a loss scale, statistics, decay rules: with the bits of plain steps on the same gradients."""
    params, made = build(
        rule, max_grad_norm=0.5, skip_if_nonfinite=True, amp_scaling=True, statistics=True, decay_rule="corrected", max_lr=0.2,
        **({"decoupled_weight_decay": True} if rule == "SGD" else {}),
    )  # fmt: skip
    twins, plain = build(
        rule,
        max_grad_norm=0.5,
        decay_rule="corrected",
        max_lr=0.2,
        **({"decoupled_weight_decay": True} if rule == "SGD" else {}),
    )
    for step in range(6):
        overflows = step in (0, 3)
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            q.grad = draw(p.shape, 100 * step + i, special=False)
            p.grad = q.grad * 64
            if overflows:
                p.grad.view(-1)[7] = math.inf
        made.grad_scale, made.found_inf = torch.tensor(64.0), torch.tensor(float(overflows))
        before = [w.double() for w in made.master_params()]
        made.step()
        assert bool(made.step_was_skipped) == overflows
        if overflows:
            continue
        plain.step()
        moved = sum(float((a.double() - b).square().sum()) for a, b in zip(made.master_params(), before, strict=True))
        assert float(made.statistics.update_norm) == pytest.approx(math.sqrt(moved), rel=1e-5)
    assert_same_bits(all_bits(made, params), all_bits(plain, twins))


@each
def test_step_in_backward_has_the_same_bits(rule):
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64)).bfloat16()

    ordinary, early = model(), model()
    options = {"state_dtype": "8bit", "low_precision": "remainder8"}
    a, b = (getattr(fused_l2, rule)(m.parameters(), **CASES[rule], **options) for m in (ordinary, early))
    fused_l2.step_in_backward(b)
    for step in range(3):
        x = draw((16, 64), step, special=False).bfloat16()
        for m, optimizer in ((ordinary, a), (early, b)):
            optimizer.zero_grad()
            m(x).float().square().mean().backward()
            optimizer.step()
    assert all(p.grad is None for p in early.parameters())
    assert_same_bits(all_bits(b, list(early.parameters())), all_bits(a, list(ordinary.parameters())))


# What is promised of them.


@pytest.mark.parametrize(("beta2", "steps"), [(0.999, 1000), (0.9999, 2000)])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_second_moments_decay_as_they_should(beta2, steps, share):
    """Zero gradients for all elements, or for one of four while the others go on: 95 % of ln v's decay arrives.

    A moment of code q moves by one of its 8 or so steps in a binade at random; over 4096 elements or a quarter of them the mean
    of ln v has a standard error below 1.5 % of ln(1 / 0.9999^2000).
    """
    p = torch.nn.Parameter(torch.zeros(128, 128))
    made = fused_l2.AdamW([p], lr=0.0, betas=(0.9, beta2), weight_decay=0.0, state_dtype="8bit")
    generator = torch.Generator().manual_seed(0)
    level = torch.exp(0.75 * torch.randn(p.shape, generator=generator))
    resting = (torch.arange(p.numel()) % 4 == 0).view(p.shape) if share < 1 else torch.ones_like(p, dtype=torch.bool)
    p.grad = level.clone()
    made.state[p].update(  # v at its level
        {**eight_bits.to_codes(p, {"exp_avg": torch.zeros_like(p), "exp_avg_sq": level.square()}), "step": torch.tensor(1e6)}
    )

    def v() -> torch.Tensor:
        return eight_bits.decode("exp_avg_sq", made.state[p]["exp_avg_sq_8bit"], made.state[p]["exp_avg_sq_scale"])

    before = v()[resting].double().log().mean()
    for _ in range(steps):
        p.grad = torch.where(resting, 0.0, level * torch.randn(p.shape, generator=generator))
        made.step()
    arrived = float(before - v()[resting].double().log().mean()) / (-steps * math.log(beta2))
    assert 0.95 <= arrived <= 1.05


@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.999])
def test_second_moments_are_right_in_the_mean(beta2):
    p = torch.nn.Parameter(torch.zeros(256, 128))
    made = fused_l2.AdamW([p], lr=0.0, betas=(0.9, beta2), weight_decay=0.0, state_dtype="8bit")
    generator = torch.Generator().manual_seed(0)
    for _ in range(round(4 / (1 - beta2))):
        p.grad = torch.randn(p.shape, generator=generator)
        made.step()
    count = float(made.state[p]["step"])
    v = eight_bits.decode("exp_avg_sq", made.state[p]["exp_avg_sq_8bit"], made.state[p]["exp_avg_sq_scale"]).double()
    assert float(v.mean()) / (1 - beta2**count) == pytest.approx(1.0, abs=0.01)


@needs_library
def test_bytes_of_a_parameter_and_of_a_step():
    """2 of the weight, 1 beside it, 2 of moments and 2/32 of scales; nothing of a tensor's size is made by a step."""
    p = torch.nn.Parameter(torch.zeros(1024, 1024).bfloat16())
    p.grad = torch.zeros_like(p)
    made = fused_l2.AdamW([p], low_precision="remainder8", state_dtype="8bit")
    made.step()
    resident = p.nbytes + sum(t.nbytes for k, t in made.state[p].items() if k != "step")
    assert resident == p.numel() * (2 + 1 + 2 + 2 / 32)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            result = operation(*arguments, **(keywords or {}))
            largest.extend(t.nbytes for t in (result if isinstance(result, tuple) else [result]) if isinstance(t, torch.Tensor))
            return result

    largest: list[int] = [0]
    with Seen():
        made.step()
    assert max(largest) < 4096
