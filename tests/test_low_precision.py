"""16-bit parameters: what each mode keeps of them, by bits, and that weight decay survives."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings

import pytest
import torch
from comparing import AWKWARD_SIZES, CASES, assert_same_bits, each, make_params, set_grad, set_grads
from conftest import needs_library

import fused_l2
from fused_l2 import reference
from fused_l2.engines import torch_ops
from fused_l2.parameters import low_precision
from fused_l2.tables import coefficients
from fused_l2.tables.modes import Mode
from fused_l2.tables.tensor_table import Flag, Rule

KEEPING = ("master", "remainder", "kahan", "remainder8")
MODES = (*KEEPING, "stochastic")
each_mode = pytest.mark.parametrize("mode", MODES)
HALVES = [torch.bfloat16, torch.float16]
each_half = pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
SPECIAL = (
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    1e-45,
    -1e-42,
    1e-30,
    3.3961775e38,
    3.4028235e38,
    65519.0,
    65520.0,
    6e-8,
    1.0,
)


def weights(n: int, seed: int) -> torch.Tensor:
    """Float32 over many orders of magnitude, a tenth of it special."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (9 * torch.rand(n, generator=generator) - 7)
    special = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (n,), generator=generator)]
    return torch.where(torch.rand(n, generator=generator) < 0.1, special, x)


# C++ and plain PyTorch against the definitions.


def expected_step(rule, flags, mode, p, kept, grad, states, row, bits, first):
    w = low_precision.widened(mode, p, kept)
    if rule is Rule.SGD:
        new, new_states = reference.sgd(w, grad, states, row, flags, first)
    else:
        new, new_states = reference.adam(w, grad, states, row, flags)
    return *low_precision.narrowed(mode, new, p.dtype, bits), new_states


SIGNATURES = [
    (p, g, s)
    for p in (torch.float32, *HALVES)
    for g in (torch.float32, *HALVES)
    for s in (torch.float32, torch.bfloat16, torch.float16)
    if s is not torch.float16 or p is torch.float16
]


@pytest.mark.sweep(13)
@needs_library
@pytest.mark.parametrize(
    ("signature", "mode"),
    [
        (s, mode)
        for s in SIGNATURES
        for mode in ("round", *MODES)
        if not (mode.startswith("remainder") and s[0] is torch.float16)  # which they do not complete
    ],
    ids=lambda s: s if isinstance(s, str) else "-".join(str(d).removeprefix("torch.") for d in s),
)
@pytest.mark.parametrize("rule", ["SGD", "Adam"])
def test_the_library_and_plain_pytorch_have_the_bits_of_the_definition(signature, mode, rule, capability, monkeypatch):
    """Every mix of dtypes. What a mode keeps is in part not what the parameter's rounding would leave: written to since."""
    param_dtype, grad_dtype, state_dtype = signature
    kind = Rule.SGD if rule == "SGD" else Rule.ADAM
    names = ("momentum_buffer",) if kind is Rule.SGD else ("exp_avg", "exp_avg_sq")
    settings = {"lr": 0.1, "weight_decay": 0.05, **({"momentum": 0.9} if kind is Rule.SGD else {"betas": (0.9, 0.99)})}
    sizes = (*AWKWARD_SIZES, 5000)

    def build():
        params = []
        for i, n in enumerate(sizes):
            p = torch.nn.Parameter(weights(n, 7 * i).to(param_dtype))
            set_grad(p, weights(n, 7 * i + 1).to(grad_dtype))
            params.append(p)
        made = getattr(fused_l2, rule)(params, **settings, low_precision=mode, seed=5)
        # float16 is none that can be asked for: a float16 model's moments may have it.
        made._stepper.set_options(dataclasses.replace(made._stepper.options, state_dtype=state_dtype))
        mode_of = made._stepper.options.precision.mode_of
        for i, p in enumerate(params):
            for k, name in enumerate(names):
                value = weights(p.numel(), 7 * i + 2 + k)
                made.state[p][name] = (value.abs() if k else value).to(state_dtype)
            if kind is Rule.ADAM or mode_of(p).is_random:
                made.state[p]["step"] = torch.tensor(6.0)
            own = mode_of(p)
            if own.state_name:
                w = weights(p.numel(), 7 * i)
                fits = torch.arange(p.numel()) % 5 > 0
                kept = {
                    Mode.MASTER: lambda w=w, fits=fits: torch.where(fits, w, 0.37),
                    Mode.REMAINDER: lambda w=w: low_precision.split(w)[1],
                    Mode.REMAINDER8: lambda w=w: low_precision.split24(w, torch.full_like(w, 0x80).long())[1],
                    Mode.KAHAN: lambda w=w, p=p, fits=fits: torch.where(fits, w - p.detach().float(), 0.37).bfloat16(),
                }[own]()
                made.state[p][own.state_name] = kept
        return params, made

    (params, made), (twins, by_torch) = build(), build()
    flags = made._rule.flags(made._values(made.param_groups[0]), made._stepper.options)
    row = (
        coefficients.sgd(coefficients.SgdNumbers(0.1, 0.9, 0, 0.05), False)
        if kind is Rule.SGD
        else coefficients.adam(coefficients.AdamNumbers(0.1, 0.9, 0.99, 1e-8, 0.05), False, 7)
    )
    wanted = []
    for i, p in enumerate(params):
        own = made._stepper.options.precision.mode_of(p)
        bits = low_precision.random_bits(low_precision.parameter_key(5, i), 7, p.numel())
        states = [made.state[p][name] for name in names]
        kept = made.state[p].get(own.state_name)
        before = (p.detach().clone(), None if kept is None else kept.clone(), p.grad, [s.clone() for s in states])
        new, left, new_states = expected_step(kind, flags, own, *before, row, bits, False)
        wanted.append([new, *([] if left is None else [left]), *new_states])
    made.step()
    with monkeypatch.context() as m:
        m.setattr(fused_l2.engines, "has_engine", lambda *_: False)
        m.setattr(torch_ops, "adam", lambda *a, **k: reference_adam(*a, **k))
        by_torch.step()
    for optimizer, own_params in ((made, params), (by_torch, twins)):
        for p, want in zip(own_params, wanted, strict=True):
            state = optimizer.state[p]
            name = optimizer._stepper.options.precision.mode_of(p).state_name
            got = [p.detach(), *([state[name]] if name else []), *(state[n] for n in names)]
            assert_same_bits(got, want)
            if "step" in state:
                assert state["step"] == 7


def reference_adam(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, **options):
    """torch's function, whose square root is not exact on every CPU, by the definition."""
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step += 1
        beta1, beta2, eps = options["beta1"], options["beta2"], options["eps"]
        row = coefficients.adam(
            coefficients.AdamNumbers(options["lr"], beta1, beta2, eps, options["weight_decay"]), False, float(step)
        )
        new, new_states = reference.adam(p, g, [m, v], row, 0)
        for old, value in zip((p, m, v), (new, *new_states), strict=True):
            old.copy_(value)


@needs_library
@each_mode
@each
def test_results_do_not_depend_on_shape_or_strides_of_the_step(name, mode):
    """One tensor, its transpose, and the same elements stepped by plain PyTorch."""
    values, grads = torch.randn(67, 131), torch.randn(67, 131)
    results = []
    for arrange in (lambda t: t, lambda t: t.t().contiguous().t(), lambda t: t.view(131, 67)):
        p = torch.nn.Parameter(arrange(values).bfloat16())
        made = getattr(fused_l2, name)([p], **CASES[name], low_precision=mode)
        for step in range(3):
            p.grad = arrange(grads * (step + 1)).bfloat16()
            made.step()
        results.append((p.detach(), made.master_params()[0]))
    assert_same_bits(results[0][0].flatten(), results[2][0].flatten())
    assert_same_bits(results[0][1].flatten(), results[2][1].flatten())
    if mode in ("master", "remainder"):  # no random bits, which are numbered in the order of memory
        assert_same_bits(results[0][0], results[1][0])


# What is promised.


@each
@pytest.mark.parametrize("mode", ["master", "remainder"])
def test_it_is_float32_training_bit_for_bit(name, mode):
    start = [torch.randn(n) for n in (3, 1000, 4097)]
    wide = [torch.nn.Parameter(w.clone()) for w in start]
    half = [torch.nn.Parameter(w.bfloat16()) for w in start]
    in_float32 = getattr(fused_l2, name)(wide, **CASES[name])
    made = getattr(fused_l2, name)(half, **CASES[name], low_precision=mode)
    made.load_master_params(start)
    for step in range(200):
        set_grads(half, step)
        for w, h in zip(wide, half, strict=True):
            w.grad = h.grad.float()
        in_float32.step()
        made.step()
    assert_same_bits(made.master_params(), [w.detach() for w in wide])
    for w, h in zip(wide, half, strict=True):
        assert bool(((h.float() - w).abs() <= 2.0**-8 * w.abs()).all())


@pytest.mark.sweep(5)
@pytest.mark.parametrize("lr", [3e-4, 3e-5])
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["round", *MODES])
def test_decay_arrives(mode, noise, lr):
    """SGD with decoupled decay and 0.1 over 8000 steps: the share of log(w_0 / w_8000) that float32 training has.

    The noise is a gradient as likely up as down whose steps are a hundredth of the weight's last place; its own walk is taken
    out by stepping the same weights without decay. 99 % is promised; rounding alone loses everything without noise.
    """
    # Stochastic rounding adds a walk of its own: 0.13 % of the share, one standard deviation, with so many elements at 3e-5.
    steps, n, wd = 8000, {"stochastic": 200_000, "remainder8": 8192}.get(mode, 512), 0.1
    generator = torch.Generator().manual_seed(0)
    start = (torch.rand(n, generator=generator) + 0.5).bfloat16()
    signs = torch.randint(0, 2, (n,), generator=generator).bfloat16() * 2 - 1

    def train(weight_decay: float) -> torch.Tensor:
        p = torch.nn.Parameter(start.clone())
        made = fused_l2.SGD([p], lr, weight_decay=weight_decay, decoupled_weight_decay=True, low_precision=mode)
        for step in range(steps):
            p.grad = signs * (noise if step % 2 else -noise) * (2.0**-12 / lr * 0.01)
            made.step()
        return made.master_params()[0].double()

    decayed, kept = train(wd), train(0.0)
    share = float((kept.sum() / decayed.sum()).log()) / -(steps * math.log1p(-lr * wd))
    if mode == "round":
        assert share < (0.01 if noise == 0 else 0.99)
    else:
        assert 0.99 <= share <= 1.01


def test_the_warning_names_the_ways_out_and_comes_once():
    p = torch.nn.Parameter(torch.ones(4).bfloat16())
    p.grad = torch.zeros_like(p)
    made = fused_l2.AdamW([p], lr=3e-4, weight_decay=0.1)
    with pytest.warns(UserWarning, match="weight decay takes 3e-05 of each weight.*low_precision='remainder'"):
        made.step()
    made.drop_plan()
    made.step()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {"low_precision": "remainder"}),
        (torch.bfloat16, {"weight_decay": 0.0}),
        (torch.bfloat16, {"lr": 0.1, "weight_decay": 0.1}),
        (torch.float32, {}),
    ],
)
def test_there_is_no_warning_where_decay_survives(dtype, options):
    p = torch.nn.Parameter(torch.ones(4).to(dtype))
    p.grad = torch.zeros_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_l2.AdamW([p], **{"lr": 3e-4, "weight_decay": 0.1, **options}).step()


# Around it.


@each
@each_mode
def test_T07_T16_T32_a_checkpoint_resumes_with_the_same_bits(name, mode, tmp_path):
    def run(optimizer, params, steps):
        for step in steps:
            set_grads(params, step)
            optimizer.step()

    def build():
        params = make_params((5, 300), torch.bfloat16)
        return params, getattr(fused_l2, name)(params, **CASES[name], low_precision=mode, seed=3)

    params, made = build()
    run(made, params, range(6))
    resumed_params, resumed = build()
    run(resumed, resumed_params, range(3))
    torch.save([resumed.state_dict(), resumed_params], tmp_path / "checkpoint.pt")
    state, kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    new_params, new = build()
    for p, saved in zip(new_params, kept, strict=True):
        p.data.copy_(saved)
    new.load_state_dict(state)
    run(new, new_params, range(3, 6))
    assert_same_bits([p.detach() for p in new_params], [p.detach() for p in params])
    assert_same_bits(new.master_params(), made.master_params())
    twin = copy.deepcopy(made)
    assert twin.low_precision == mode


@each
def test_a_checkpoint_of_torch_goes_on(name):
    params, twins = make_params((300,), torch.bfloat16), make_params((300,), torch.bfloat16)
    theirs = getattr(torch.optim, name)(twins, **CASES[name])
    set_grads(twins, 0)
    theirs.step()
    made = getattr(fused_l2, name)(params, **CASES[name], low_precision="remainder")
    made.load_state_dict(theirs.state_dict())
    set_grads(params, 1)
    made.step()
    state = made.state[params[0]]
    assert all(v.dtype is torch.float32 for k, v in state.items() if k in ("exp_avg", "exp_avg_sq", "momentum_buffer"))
    assert state["param_remainder"].dtype is torch.int16


@pytest.mark.parametrize("mode", ["round", *MODES])
def test_weights_of_a_float32_model_are_imported_and_exported(mode):
    wide = [torch.randn(7, 33), torch.randn(5)]
    params = [torch.nn.Parameter(w.bfloat16()) for w in wide] + [torch.nn.Parameter(torch.randn(3))]
    made = fused_l2.AdamW(params, low_precision=mode)
    made.load_master_params([*wide, torch.ones(3)])
    found = made.master_params()
    assert all(w.dtype is torch.float32 for w in found)
    assert torch.equal(found[2], torch.ones(3))
    for got, w in zip(found, wide, strict=False):
        bound = {"master": 0, "remainder": 0, "kahan": 2.0**-16, "remainder8": 2.0**-16}.get(mode, 2.0**-8)
        assert bool(((got - w).abs() <= bound * w.abs()).all())
    with pytest.raises(ValueError, match="2 tensors for 3 parameters"):
        made.load_master_params(wide)
    with pytest.raises(ValueError, match=r"tensor 1 has shape \(6,\), its parameter \(5,\)"):
        made.load_master_params([wide[0], torch.ones(6), torch.ones(3)])


def test_changing_over_carries_the_weights():
    params = make_params((1000,), torch.bfloat16)
    made = fused_l2.AdamW(params, low_precision="master")
    for step in range(3):
        set_grads(params, step)
        made.step()
    before = made.master_params()
    made.low_precision = "remainder"
    assert_same_bits(made.master_params(), before)
    assert set(made.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq", "param_remainder"}
    set_grads(params, 3)
    made.step()
    made.low_precision = "round"
    assert_same_bits(made.master_params()[0], params[0].detach().float())


def converted_run(mode, dtype, steps=3):
    """A model of whose two tensors one is converted after some steps, its optimizer, and the float32 weights before that."""
    model = torch.nn.ParameterList(make_params((1000, 64), dtype))
    made = fused_l2.AdamW(model.parameters(), lr=0.01, low_precision=mode)
    for step in range(steps):
        set_grads(list(model), step)
        made.step()
    return model, made, made.master_params()


@pytest.mark.parametrize("to", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("mode", "dtype"), [(m, torch.bfloat16) for m in KEEPING] + [(m, torch.float16) for m in ("master", "kahan")]
)
def test_a_model_that_was_converted_is_told_what_to_do_and_goes_on(mode, dtype, to):
    model, made, wide = converted_run(mode, dtype)
    model[0].data = model[0].data.to(to)
    set_grads(list(model), 3)
    before = [p.detach().clone() for p in model]
    with pytest.raises(
        RuntimeError, match=rf"parameter 0 .*of a 16-bit parameter.* Set optimizer.low_precision = '{mode}' again"
    ):
        made.step()
    assert_same_bits([p.detach() for p in model], before)
    made.low_precision = mode  # the remedy
    assert_same_bits(model[0].detach(), wide[0].to(to))
    assert_same_bits(made.master_params()[1], wide[1])
    if to is torch.float64:
        made.load_state_dict(made.state_dict())  # which has float64 moments
    made.step()
    made.load_state_dict(made.state_dict())
    assert set(made.state[model[0]]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("mode", KEEPING)
def test_of_a_converted_model_what_was_written_since_is_what_counts(mode):
    model, made, wide = converted_run(mode, torch.bfloat16)
    model.float()
    given = [torch.randn_like(w) for w in wide]
    model[0].data.copy_(given[0])
    made.low_precision = "round"
    assert_same_bits([p.detach() for p in model], [given[0], wide[1]])
    model, made, _ = converted_run(mode, torch.bfloat16)
    model.float()
    made.load_master_params(given)
    made.low_precision = mode
    assert_same_bits([p.detach() for p in model], given)


@pytest.mark.parametrize("mode", KEEPING)
def test_the_checkpoint_of_a_16_bit_model_is_loaded_before_it_is_converted(mode):
    model, made, wide = converted_run(mode, torch.bfloat16)
    saved = made.state_dict()
    weights = copy.deepcopy(list(model))
    other = torch.nn.ParameterList(p.detach().float() for p in model)
    second = fused_l2.AdamW(other.parameters(), low_precision=mode)
    with pytest.raises(
        ValueError, match=rf"load it while the parameters have 16 bits.* optimizer.low_precision = '{mode}' again"
    ):
        second.load_state_dict(saved)
    model = torch.nn.ParameterList(weights)
    third = fused_l2.AdamW(model.parameters(), low_precision=mode)
    third.load_state_dict(saved)
    model.float()
    third.low_precision = mode
    assert_same_bits([p.detach() for p in model], wide)


@pytest.mark.parametrize("mode", ["remainder", "remainder8"])
def test_a_remainder_of_bfloat16_is_not_read_as_float16_s(mode):
    model, made, wide = converted_run(mode, torch.bfloat16)
    model.half()
    set_grads(list(model), 3)
    with pytest.raises(RuntimeError, match="Use low_precision='master'"):
        made.step()
    fits = [p.detach().bfloat16().float() == p.detach().float() for p in model]  # beyond float16's range nothing is left
    assert all(bool(f.float().mean() > 0.9) for f in fits)
    made.low_precision = "master"  # the remedy
    for got, w, f in zip(made.master_params(), wide, fits, strict=True):
        assert torch.equal(got[f], w[f])
    made.step()


@pytest.mark.parametrize("mode", KEEPING)
def test_a_parameter_that_was_written_to_is_what_counts(mode):
    params = make_params((1000,), torch.bfloat16)
    made = fused_l2.SGD(params, lr=0.1, low_precision=mode)
    set_grads(params, 0)
    made.step()
    with torch.no_grad():
        params[0].zero_()
    params[0].grad = torch.zeros_like(params[0])
    made.step()
    assert float(params[0].detach().abs().max()) <= 1e-38


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each
def test_state_dtype(name, dtype):
    params = make_params((100,), torch.float32) + make_params((100,), torch.bfloat16)
    made = getattr(fused_l2, name)(params, **CASES[name], state_dtype=dtype)
    set_grads(params, 0)
    made.step()
    kept = {k: v.dtype for p in params for k, v in made.state[p].items() if k != "step"}
    assert set(kept.values()) == {dtype}
    fresh = getattr(fused_l2, name)(params, **CASES[name], state_dtype=dtype)
    fresh.load_state_dict(made.state_dict())
    set_grads(params, 1)
    fresh.step()
    assert {v.dtype for p in params for k, v in fresh.state[p].items() if k != "step"} == {dtype}


def test_statistics_are_of_the_full_weights():
    params = make_params((1003,), torch.bfloat16)
    made = fused_l2.SGD(params, lr=0.1, low_precision="remainder", statistics=True)
    for step in range(2):
        set_grads(params, step)
        before = made.master_params()[0].double()
        made.step()
    after = made.master_params()[0].double()
    assert float(made.statistics.param_norm) == pytest.approx(float(before.norm()), rel=1e-6)
    assert float(made.statistics.update_norm) == pytest.approx(float((after - before).norm()), rel=1e-6)


def test_a_mode_that_a_parameter_cannot_have_is_refused_before_anything_changes():
    p = torch.nn.Parameter(weights(1000, 1).half())
    optimizer = fused_l2.SGD([p], lr=0.1)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*low_precision='remainder' completes bfloat16"):
        optimizer.low_precision = "remainder"
    assert_same_bits(p, before)
    assert optimizer.low_precision == "round"


def test_errors():
    p = torch.nn.Parameter(torch.ones(3).half())
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="low_precision must be one of 'round', 'master'"):
        fused_l2.AdamW([p], low_precision="exact")
    with pytest.raises(ValueError, match="state_dtype must be"):
        fused_l2.AdamW([p], state_dtype=torch.float16)
    with pytest.raises(TypeError, match="seed must be an int"):
        fused_l2.AdamW([p], seed=1.5)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*float16 cannot. Use low_precision='master'"):
        fused_l2.AdamW([p], low_precision="remainder").step()
    q = torch.nn.Parameter(torch.ones(3).bfloat16())
    q.grad = torch.ones_like(q)
    made = fused_l2.AdamW([q], low_precision="master")
    made.step()
    other = fused_l2.AdamW([q], low_precision="kahan")
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .*holds 'master_param'.*has low_precision='kahan'"):
        other.load_state_dict(made.state_dict())
    assert not other.state
    other.state[q].update({key: value.clone() for key, value in made.state[q].items()})
    with pytest.raises(RuntimeError, match=r"its state holds 'master_param'.*has low_precision='kahan'"):
        other.step()
    made.state[q]["master_param"] = torch.ones(3, dtype=torch.int16)
    with pytest.raises(RuntimeError, match="its state 'master_param' has dtype int16"):
        made.step()
    assert Flag.MASTER == Mode.MASTER
