"""A step made within modes of the caller: it gives the bits of torch.optim's, or is refused where torch.optim's is, and the
steps that follow outside of the mode are as if there had been none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparing import CASES, assert_same_bits, each
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fused_l2
from fused_l2.engines import watch

MODE_STEP = 2


class _Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Function(TorchFunctionMode):
    """Makes what is made without a device on the meta device, as a mode of a user's own may."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.zeros, torch.empty, torch.tensor, torch.ones):
            kwargs.setdefault("device", "meta")
        return func(*args, **kwargs)


@contextlib.contextmanager
def _set(set_to: Callable[[Any], Any], value: Any, back: Any) -> Iterator[None]:
    set_to(value)
    try:
        yield
    finally:
        set_to(back)


def _memory_tracker() -> Any:
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    return tracker.MemTracker()


def _transformed(transform: str) -> Callable[[Callable[[], Any]], None]:
    def run(call: Callable[[], Any]) -> None:
        def function(x: Tensor) -> Tensor:
            call()
            return x.sum()

        x = torch.ones(3)
        if transform == "jvp":
            torch.func.jvp(function, (x,), (x,))
        else:
            getattr(torch.func, transform)(function)(x)

    return run


def _in(make: Callable[[], Any]) -> Callable[[Callable[[], Any]], None]:
    def run(call: Callable[[], Any]) -> None:
        with make():
            call()

    return run


def _compiled(call: Callable[[], Any]) -> None:
    torch._dynamo.reset()
    torch.compile(lambda x: (call(), x + 1)[1], backend="eager")(torch.ones(3))


MODES: dict[str, Callable[[Callable[[], Any]], None]] = {
    "with device meta": _in(lambda: torch.device("meta")),
    "default device meta": _in(lambda: _set(torch.set_default_device, "meta", None)),
    "default device that is not there": _in(lambda: _set(torch.set_default_device, "cuda:7", None)),
    "default dtype bfloat16": _in(lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32)),
    "default dtype float64": _in(lambda: _set(torch.set_default_dtype, torch.float64, torch.float32)),
    "dispatch mode": _in(_Dispatching),
    "flop counter": _in(lambda: FlopCounterMode(display=False)),
    "memory tracker": _in(_memory_tracker),
    "function mode": _in(_Function),
    "inference mode": _in(torch.inference_mode),
    "grad mode": _in(torch.enable_grad),
    "autocast": _in(lambda: torch.autocast("cpu")),
    "deterministic": _in(lambda: _set(torch.use_deterministic_algorithms, True, False)),
    "anomaly detection": _in(lambda: torch.autograd.set_detect_anomaly(True)),
    "forward AD": _in(torch.autograd.forward_ad.dual_level),
    "vmap": _transformed("vmap"),
    "functionalize": _transformed("functionalize"),
    "compiled function": _compiled,
}
# In these torch.optim's step fails, with nothing done or with some of it.
REFUSING: dict[str, Callable[[Callable[[], Any]], None]] = {
    "fake tensors": _in(FakeTensorMode),
    "fake tensors, real ones allowed": _in(lambda: FakeTensorMode(allow_non_fake_inputs=True)),
    "grad": _transformed("grad"),
    "jvp": _transformed("jvp"),
}


def make_run(library: Any, name: str, shapes: str) -> tuple[Any, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 6, generator=generator)), nn.Parameter(torch.randn(5, generator=generator))]
    if shapes == "strided":  # stepped by plain PyTorch
        params.append(nn.Parameter(torch.randn(4, 6, generator=generator)[:, ::2]))
    return getattr(library, name)(params, **CASES[name]), params


def steps_of(
    optimizer: Any,
    params: list[nn.Parameter],
    when: str,
    mode: Callable[[Callable[[], Any]], None] | None,
    refused: bool = False,
) -> None:
    """Four steps, one of them within the mode: the first one, a later one, or one for which everything is prepared anew."""
    at = 0 if when == "first" else MODE_STEP
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if when == "planning" and step == MODE_STEP and isinstance(optimizer, fused_l2.SGD | fused_l2.Adam | fused_l2.AdamW):
            optimizer.drop_plan()
        if step != at or (mode is None and not refused):
            optimizer.step()
        elif refused and mode is not None:
            with pytest.raises(RuntimeError, match="fused_l2"):
                mode(optimizer.step)
        elif mode is not None:
            mode(optimizer.step)


def assert_same(ours: Any, params: list[nn.Parameter], theirs: Any, expected: list[nn.Parameter]) -> None:
    assert_same_bits(params, expected, "parameter")
    for p, q in zip(params, expected, strict=True):
        own, other = ours.state[p], theirs.state[q]
        assert own.keys() == other.keys()
        for key in own:
            assert type(own[key]) is Tensor
            assert own[key].device.type == "cpu"
            assert not own[key].is_inference()
            assert not torch._is_functional_tensor(own[key])
            if key != "step":  # of float64 under a default dtype of float64
                assert own[key].dtype is other[key].dtype
            assert_same_bits(own[key].to(other[key].dtype), other[key], key)


@pytest.fixture(autouse=True)
def _looked_at_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the first step of a process: what is found out about torch is found out within the mode."""
    monkeypatch.setattr(watch, "_verdicts", {})


@pytest.mark.sweep(9)
@each
@pytest.mark.parametrize("when", ["first", "later", "planning"])
@pytest.mark.parametrize("shapes", ["dense", "strided"])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_within_a_mode_gives_torchs_bits(name: str, when: str, shapes: str, mode: str, exact_sqrt: Any) -> None:
    if shapes == "strided" and mode == "compiled function":
        pytest.skip("torch.optim's functions are compiled there, with other bits than torch.optim's own")
    ours, params = make_run(fused_l2, name, shapes)
    theirs, expected = make_run(torch.optim, name, shapes)
    steps_of(ours, params, when, MODES[mode])
    steps_of(theirs, expected, when, None)
    assert_same(ours, params, theirs, expected)
    assert all(verdict != 0 for verdict in watch._verdicts.values())


OPTIONS: dict[str, dict[str, Any]] = {
    "8 bits": {"low_precision": "remainder8", "state_dtype": "8bit"},
    "kahan": {"low_precision": "kahan", "max_grad_norm": 0.5},
    "master, measured": {"low_precision": "master", "statistics": True, "max_grad_norm": 9.0, "skip_if_nonfinite": True},
    "stochastic, cautious": {"low_precision": "stochastic", "cautious": True, "decoupled_weight_decay": True},
    "remainder": {"low_precision": "remainder", "state_dtype": torch.float32},
}


@pytest.mark.sweep(9)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("when", ["first", "later", "planning"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_a_step_with_options_within_a_mode_gives_the_bits_of_one_outside(name: str, when: str, options: str, mode: str) -> None:
    runs = []
    for within in (None, MODES[mode]):
        params = [nn.Parameter(torch.linspace(-1, 1, 2 * n).reshape(2, n).bfloat16()) for n in (64, 5)]
        params.append(nn.Parameter(torch.linspace(-1, 1, 24).bfloat16().view(4, 6)[:, ::2]))
        optimizer = getattr(fused_l2, name)(params, lr=0.1, weight_decay=0.1, **OPTIONS[options])
        steps_of(optimizer, params, when, within)
        runs.append((optimizer, params))
    (ours, params), (theirs, expected) = runs
    assert_same_bits(params, expected, "parameter")
    assert_same_bits(ours.master_params(), theirs.master_params(), "master weight")
    for p, q in zip(params, expected, strict=True):
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():  # steps are counted in the default dtype of the first one
            assert_same_bits(ours.state[p][key].to(value.dtype), value, key)
        assert not any(t.is_inference() or torch._is_functional_tensor(t) for t in ours.state[p].values())
    if "statistics" in OPTIONS[options]:
        assert_same_bits(ours.statistics.grad_norm, theirs.statistics.grad_norm, "norm")


@pytest.mark.sweep(5)
@each
@pytest.mark.parametrize("when", ["first", "later", "planning"])
@pytest.mark.parametrize("shapes", ["dense", "strided"])
@pytest.mark.parametrize("mode", REFUSING)
def test_a_step_that_torch_cannot_make_in_a_mode_is_refused_whole(
    name: str, when: str, shapes: str, mode: str, exact_sqrt: Any
) -> None:
    """Nothing has changed then, and the other steps are right."""
    ours, params = make_run(fused_l2, name, shapes)
    theirs, expected = make_run(torch.optim, name, shapes)
    steps_of(ours, params, when, REFUSING[mode], refused=True)
    steps_of(theirs, expected, when, None, refused=True)
    assert_same(ours, params, theirs, expected)


@each
def test_a_whole_run_on_fake_tensors(name: str) -> None:
    """As for an estimate of memory: everything is fake, and so are the states."""
    with FakeTensorMode():
        model = nn.Linear(3, 4)
        optimizer = getattr(fused_l2, name)(model.parameters(), **CASES[name])
        for _ in range(3):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
    assert {type(t).__name__ for own in optimizer.state.values() for t in own.values()} == {"FakeTensor"}
    ours, params = make_run(fused_l2, name, "dense")
    theirs, expected = make_run(torch.optim, name, "dense")
    for optimizer, own in ((ours, params), (theirs, expected)):
        steps_of(optimizer, own, "first", None)
    if name == "SGD":
        assert_same(ours, params, theirs, expected)


@each
def test_a_gradient_that_belongs_to_a_transform_is_refused(name: str) -> None:
    optimizer, (param, *_) = make_run(fused_l2, name, "dense")

    def function(x: Tensor) -> Tensor:
        param.grad = x
        with pytest.raises(RuntimeError, match=r"gradient of parameter 0 of group 0 belongs to the function transform"):
            optimizer.step()
        param.grad = None
        return x

    torch.func.vmap(function)(torch.ones(3, 4, 6))
    assert not optimizer.state


class _FromAHandler(Exception):
    """What a timeout's signal may raise."""


def test_what_an_exception_from_elsewhere_ended_is_found_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    find, library = watch._find_offsets, watch.cpu.library()
    if library is None or not watch._plain_keys(library):
        pytest.skip("the library cannot look at tensors here")
    monkeypatch.setattr(watch, "_verdicts", {})

    def fails(*_: Any) -> int:
        raise _FromAHandler

    monkeypatch.setattr(watch, "_find_offsets", fails)
    with pytest.raises(_FromAHandler):
        watch.make_look()
    monkeypatch.setattr(watch, "_find_offsets", find)
    assert type(watch.make_look()) is watch.NativeLook


def test_chance_does_not_decide_whether_the_library_looks_at_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may hold by chance what is looked for. Tensors made for the next try lie elsewhere: those of the last one stay."""
    find, library = watch._find_offsets, watch.cpu.library()
    if library is None or not watch._plain_keys(library):
        pytest.skip("the library cannot look at tensors here")
    monkeypatch.setattr(watch, "_verdicts", {})
    tries: list[int] = []

    def fails_once(of: Any, tried: list[Any]) -> int:
        tries.append(len(tried))
        keys = find(of, tried)
        if len(tries) == 1:
            raise ValueError("too many values to unpack")
        return keys

    monkeypatch.setattr(watch, "_find_offsets", fails_once)
    assert type(watch.make_look()) is watch.NativeLook
    assert tries == [0, 1]
