"""C++ against the definition, fused_l2.reference: 0 differing bits for every rule, flag, dtypes and instruction set."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from comparing import AWKWARD_SIZES, assert_same_bits
from conftest import needs_library

import fused_l2
from fused_l2 import reference
from fused_l2.engines import torch_ops
from fused_l2.tables import coefficients
from fused_l2.tables.coefficients import DecayRule
from fused_l2.tables.tensor_table import Flag, Rule

SIGNATURES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]
CAUTIOUS = Flag.DECOUPLED | Flag.CAUTIOUS
DECAYS = [  # flags, and what multiplies weight_decay
    (0, DecayRule.PLAIN),
    (0, DecayRule.CORRECTED),
    *((flags, rule) for flags in (int(Flag.DECOUPLED), int(CAUTIOUS)) for rule in DecayRule),
]
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-40, 1e-30, 3e38, -3e38, 65504.0, 6e-8, 1.0)


def tensor(n: int, dtype: torch.dtype, seed: int, positive: bool = False, special: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (8 * torch.rand(n, generator=generator) - 6)
    if special:
        at = torch.randint(0, 8, (n,), generator=generator) == 0
        values = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (n,), generator=generator)]
        x = torch.where(at, values, x)
    return (x.abs() if positive else x).to(dtype)


def id_of(signature) -> str:
    return "-".join(str(d).removeprefix("torch.") for d in signature)


@pytest.mark.sweep(13)
@needs_library
@pytest.mark.parametrize("signature", SIGNATURES, ids=id_of)
@pytest.mark.parametrize("decay", ["none", "coupled", "decoupled", "cautious", "cautious-none"])
@pytest.mark.parametrize("momentum", ["none", "first", "running", "nesterov-first", "nesterov"])
@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
def test_sgd(signature, decay, momentum, maximize, capability):
    dtype, state_dtype = signature
    lr, mu, dampening, wd = 0.1, 0.9 if momentum != "none" else 0.0, 0.0 if "nesterov" in momentum else 0.3, 0.05
    wd, cautious = 0.0 if "none" in decay else wd, "cautious" in decay
    decoupled = decay == "decoupled" or cautious
    params, expected_params, expected_states = [], [], []
    first = "first" in momentum
    for i, n in enumerate(AWKWARD_SIZES):
        p = torch.nn.Parameter(tensor(n, dtype, 3 * i))
        p.grad = tensor(n, dtype, 3 * i + 1)
        params.append(p)
    made = fused_l2.SGD(
        params, lr, mu, dampening, wd, "nesterov" in momentum, maximize=maximize, decoupled_weight_decay=decoupled,
        cautious=cautious,
    )  # fmt: skip
    flags = made._rule.flags(made._values(made.param_groups[0]), made._stepper.options)
    row = coefficients.sgd(coefficients.SgdNumbers(lr, mu, dampening, wd), decoupled)
    for i, p in enumerate(params):
        state = [tensor(p.numel(), state_dtype, 3 * i + 2)] if mu else []
        if mu and not first:
            made.state[p]["momentum_buffer"] = state[0].clone()
        new, new_states = reference.sgd(p.detach(), p.grad, state, row, flags, first)
        expected_params.append(new)
        # On its first step a tensor gets a buffer of its own dtype.
        expected_states += [s.to(dtype) for s in new_states] if first else new_states
    made.step()
    assert_same_bits(params, expected_params, "parameter")
    if mu:
        assert_same_bits([made.state[p]["momentum_buffer"] for p in params], expected_states, "momentum_buffer")


@pytest.mark.sweep(13)
@needs_library
@pytest.mark.parametrize("signature", SIGNATURES, ids=id_of)
@pytest.mark.parametrize("decay", ["none", "coupled", "decoupled", "cautious", "cautious-none"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
@pytest.mark.parametrize("beta1", [0.9, 0.4])
def test_adam(signature, decay, amsgrad, maximize, beta1, capability):
    dtype, state_dtype = signature
    lr, beta2, eps, wd, step = 0.1, 0.99, 1e-8, 0.0 if "none" in decay else 0.05, 7
    cautious = "cautious" in decay
    decoupled = decay == "decoupled" or cautious
    params, expected_params, expected_states = [], [], []
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]
    for i, n in enumerate(AWKWARD_SIZES):
        p = torch.nn.Parameter(tensor(n, dtype, 5 * i))
        p.grad = tensor(n, dtype, 5 * i + 1)
        params.append(p)
    made = fused_l2.Adam(
        params, lr, (beta1, beta2), eps, wd, amsgrad, maximize=maximize, decoupled_weight_decay=decoupled, cautious=cautious
    )
    flags = made._rule.flags(made._values(made.param_groups[0]), made._stepper.options)
    row = coefficients.adam(coefficients.AdamNumbers(lr, beta1, beta2, eps, wd), decoupled, step)
    for i, p in enumerate(params):
        state = [tensor(p.numel(), state_dtype, 5 * i + 2 + k, positive=k > 0) for k in range(len(names))]
        made.state[p]["step"] = torch.tensor(float(step - 1))
        for name, value in zip(names, state, strict=True):
            made.state[p][name] = value.clone()
        new, new_states = reference.adam(p.detach(), p.grad, state, row, flags)
        expected_params.append(new)
        expected_states += new_states
    made.step()
    assert_same_bits(params, expected_params, "parameter")
    assert_same_bits([made.state[p][name] for p in params for name in names], expected_states, "state")


@pytest.mark.sweep(5)
@pytest.mark.parametrize("signature", SIGNATURES, ids=id_of)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("decay", "decay_rule"), DECAYS)
def test_plain_pytorch_engine_sgd(signature, nesterov, decay, decay_rule):
    dtype, state_dtype = signature
    flags = Flag.MOMENTUM | (Flag.NESTEROV if nesterov else 0) | decay
    numbers = (0.1, 0.9, 0.0, 0.05)
    whole = coefficients.SgdNumbers(*numbers, 0.3, decay_rule)
    row = coefficients.sgd(whole, bool(decay))
    p, g, b = (tensor(1003, d, s, special=False) for d, s in ((dtype, 1), (dtype, 2), (state_dtype, 3)))
    expected, expected_states = reference.sgd(p, g, [b], row, flags, False)
    kept = g.clone()
    torch_ops.step(Rule.SGD, flags, whole, [p], [g], [[b]], [], first_step=False)
    assert_same_bits([p, b], [expected, *expected_states])
    assert_same_bits(g, kept, "T52: the gradient")


@pytest.mark.sweep(5)
@pytest.mark.parametrize("signature", SIGNATURES, ids=id_of)
@pytest.mark.parametrize(("decay", "decay_rule"), [d for d in DECAYS if d != (0, DecayRule.CORRECTED)])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_plain_pytorch_engine_adam(signature, decay, decay_rule, amsgrad, exact_sqrt):
    dtype, state_dtype = signature
    flags = (Flag.AMSGRAD if amsgrad else 0) | decay
    numbers = (0.1, 0.9, 0.99, 1e-8, 0.05)
    p, g = (tensor(1003, dtype, s, special=False) for s in (1, 2))
    state = [tensor(1003, state_dtype, 3 + k, positive=k > 0, special=False) for k in range(3 if amsgrad else 2)]
    whole = coefficients.AdamNumbers(*numbers, 0.3, decay_rule)
    row = coefficients.adam(whole, bool(decay), 7)
    expected, expected_states = reference.adam(p, g, state, row, flags)
    counter = torch.tensor(6.0)
    torch_ops.step(Rule.ADAM, flags, whole, [p], [g], [[t] for t in state], [counter], first_step=False)
    assert_same_bits([p, *state], [expected, *expected_states])
    assert counter.item() == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fma_rounds_once(dtype):
    """Against exact rational arithmetic, with results near cancellation where a second rounding would show."""
    generator = torch.Generator().manual_seed(0)
    n, eps = 3000, torch.finfo(dtype).eps
    a, b, c = (torch.randn(n, generator=generator, dtype=dtype) for _ in range(3))
    c *= 10.0 ** torch.randint(-16, 3, (n,), generator=generator).to(dtype)
    near = torch.arange(n) % 2 == 0
    c = torch.where(near, -(a * b) * (1 + eps * torch.randint(-3, 4, (n,), generator=generator).to(dtype)), c)
    result = reference.fma(a, b, c)
    up, down = (torch.nextafter(result, torch.full_like(result, s * math.inf)) for s in (1, -1))
    for i in range(n):
        exact = Fraction(a[i].item()) * Fraction(b[i].item()) + Fraction(c[i].item())
        error = abs(Fraction(result[i].item()) - exact)
        assert error <= abs(Fraction(up[i].item()) - exact)
        assert error <= abs(Fraction(down[i].item()) - exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_sqrt_is_correctly_rounded(dtype):
    np = pytest.importorskip("numpy")  # numpy's is the processor's instruction
    x = tensor(100_000, dtype, 0, positive=True, special=False)
    assert_same_bits(reference.sqrt(x), torch.from_numpy(np.sqrt(x.numpy())))


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_pattern_is_widened_and_rounded_as_torch_does(dtype, capability):
    """SGD with lr 0 widens and narrows each of the 65,536 patterns; with lr 1, float32 sums are rounded to nearest even."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    p = torch.nn.Parameter(patterns.clone())
    p.grad = torch.zeros_like(p)
    fused_l2.SGD([p], lr=0.0).step()
    # lr 0 adds -0 * 0: only the bits of NaNs are free.
    assert_same_bits(p, patterns)

    q = torch.nn.Parameter(patterns.clone())
    q.grad = patterns.flip(0).clone() * 1.37
    expected = (q.detach().float() - q.grad.float()).to(dtype)
    fused_l2.SGD([q], lr=1.0).step()
    assert_same_bits(q, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fma_of_zeros_has_the_sign_of_the_plain_operations(dtype):
    zeros = torch.tensor([0.0, -0.0, 1.0, -1.0], dtype=dtype)
    a, b, c = (x.flatten() for x in torch.meshgrid(zeros, zeros, torch.tensor([0.0, -0.0], dtype=dtype), indexing="ij"))
    assert_same_bits(reference.fma(a, b, c), a * b + c)
