"""Clipping on the Triton path against the C++ engine, by bits: the norm, the factor and the step."""

from __future__ import annotations

import math

import pytest
import torch
from comparing import CASES, assert_same_bits, each, make_params, set_grads

pytest.importorskip("triton", reason="Triton kernels need triton: pip install triton")
pytest.importorskip("numpy")

import fused_l2
from fused_l2.tables.tensor_table import LANES, chunk_map

from . import aot
from .fake_cuda import FakeDevice, emulated, interpreted_kernel, tensors_of
from .ptx_emulator import Emulator
from .test_kernel_bits import padded

DTYPES = [(torch.float32,), (torch.float64,), (torch.float32, torch.bfloat16), (torch.float16, torch.float64)]
SIZES = (5, 0, 511, 512, 513, 16_384, 16_385, 40_000, 0)
FEW_SIZES = (5, 0, 513)


def run_side_by_side(name, dtypes, sizes, run, monkeypatch, **options):
    ours, theirs = ([p for i, d in enumerate(dtypes) for p in make_params(sizes, d, i)] for _ in range(2))
    for i, p in enumerate(ours):
        p.data = padded(p.data, i % 2)
    a, b = (getattr(fused_l2, name)(params, **CASES[name], **options) for params in (ours, theirs))
    device = FakeDevice(run)
    device.accessible = lambda: tensors_of(a)
    for i in range(2):
        for params in (ours, theirs):
            set_grads(params, i)
        for k, p in enumerate(ours):
            p.grad = padded(p.grad, k % 2)
        with device.in_place(monkeypatch):
            a.step()
        device.synchronize()
        b.step()
        assert a._stepper._control.tolist() == list(b._stepper._control)  # factor and norm
        assert_same_bits(a.grad_norm, b.grad_norm, "norm")
    assert_same_bits(ours, theirs, "parameter")


@each
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_compiled(name, dtypes, norm_type, monkeypatch):
    run_side_by_side(name, dtypes, SIZES, emulated(90), monkeypatch, max_grad_norm=0.5, norm_type=norm_type)


@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_other_architectures(arch, norm_type, monkeypatch):
    dtypes = (torch.float32, torch.bfloat16)
    run_side_by_side("AdamW", dtypes, SIZES, emulated(arch), monkeypatch, max_grad_norm=0.5, norm_type=norm_type)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_interpreted(dtypes, norm_type, monkeypatch):
    run_side_by_side("SGD", dtypes, FEW_SIZES, interpreted_kernel, monkeypatch, max_grad_norm=0.5, norm_type=norm_type)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_nonfinite_norms(bad, norm_type, monkeypatch):
    real = torch.nn.Parameter(torch.ones(600)), torch.nn.Parameter(torch.ones(600))
    device = FakeDevice(emulated(90))
    a, b = (fused_l2.SGD([p], lr=0.1, max_grad_norm=1.0, norm_type=norm_type) for p in real)
    device.accessible = lambda: tensors_of(a)
    for p in real:
        p.grad = torch.ones(600)
        p.grad[77] = bad
    with device.in_place(monkeypatch):
        a.step()
    device.synchronize()
    b.step()
    assert_same_bits(real[0], real[1])
    assert_same_bits(a.grad_norm, b.grad_norm)
    assert not math.isfinite(float(a.grad_norm))


def test_steps_queued_behind_each_other_keep_their_own_factor(monkeypatch):
    """The host runs four steps ahead, the gradients' norms differ, and each step has its own."""
    ours, theirs = make_params(FEW_SIZES), make_params(FEW_SIZES)
    a, b = fused_l2.SGD(ours, lr=0.1, max_grad_norm=1.0), fused_l2.SGD(theirs, lr=0.1, max_grad_norm=1.0)
    device = FakeDevice(emulated(90))
    device.accessible = lambda: tensors_of(a)
    kept, norms, expected = [], [], []
    for i in range(4):
        set_grads(ours, i)
        set_grads(theirs, i)
        kept.append([p.grad for p in ours])
        with device.in_place(monkeypatch):
            a.step()
        norms.append(a._stepper._control)
        b.step()
        expected.append(list(b._stepper._control))
    device.synchronize()
    assert_same_bits(ours, theirs)
    assert [n.tolist() for n in norms] == expected


def test_several_devices_and_the_cpu_share_one_norm(monkeypatch):
    params, expected = make_params((5, 600, 64, 9)), make_params((5, 600, 64, 9))
    place = {id(p): i % 2 for i, p in enumerate(params)}
    device = FakeDevice(emulated(90))
    device.eager = True  # torch's own operations add up the parts, and they do not queue here
    with device.in_place(monkeypatch, lambda t: place.get(id(t)) == 0):
        optimizer = fused_l2.SGD(params, lr=0.1, max_grad_norm=0.5)
        device.accessible = lambda: tensors_of(optimizer)
        set_grads(params, 0)
        optimizer.step()
    other = fused_l2.SGD(expected, lr=0.1, max_grad_norm=0.5)
    set_grads(expected, 0)
    other.step()
    assert device.launches
    assert float(optimizer.grad_norm) == pytest.approx(float(other.grad_norm), rel=2e-7)  # added up in another order
    for p, q in zip(params, expected, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-8)


def test_the_measuring_kernel_checks_out_at_every_edge():
    """Sizes around the lanes, aligned or not, against the definition of the order in csrc/sums.h written in Python."""
    compiled = aot.compile_kernel(90, "measure", torch.float32, False)
    for count in (1, 7, 8, 511, 512, 513, 1000, 1024 + 9):
        for offset in (0, 1):
            magnitudes = 10 ** (12 * torch.rand(count) - 6)  # so that another order gives other bits
            grad = padded(torch.randn(count) * magnitudes, offset)
            lanes = [0.0] * LANES
            for i, g in enumerate(grad.tolist()):
                lanes[i % LANES] += g * g
            while len(lanes) > 1:
                lanes = [lanes[2 * k] + lanes[2 * k + 1] for k in range(len(lanes) // 2)]
            table, grads = torch.tensor([[0, 0, 0, 0, 0, 0, count, 0, 0]]), torch.tensor([grad.data_ptr()])
            words, partials = torch.tensor(chunk_map([count], 16384)), torch.full((3,), -1.0, dtype=torch.float64)
            emulator = Emulator(compiled.asm["ptx"], compiled.metadata.shared)
            for name, tensor in (("grad", grad), ("grads", grads), ("table", table), ("map", words), ("partials", partials)):
                emulator.register(tensor, name)
            emulator.run(1, [words.data_ptr(), table.data_ptr(), partials.data_ptr(), 16384, 0, grads.data_ptr()])
            assert partials.tolist() == [lanes[0], -1.0, -1.0]
