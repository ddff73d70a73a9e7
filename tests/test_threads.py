"""One optimizer, or several, stepped from several threads."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparing import assert_same_bits, make, make_params, set_grads
from torch import nn

import fused_l2
from fused_l2.step import plan

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = (5, 64, 0, 33)


@pytest.fixture
def often_switched() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(work: list[Callable[[], None]]) -> list[BaseException]:
    """Run these at the same time; returns what they raised."""
    raised: list[BaseException] = []

    def guarded(one: Callable[[], None]) -> None:
        try:
            torch.set_num_threads(1)
            one()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("layout", ["dense", "transposed"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": torch.inf}, {"statistics": True}], ids=str)
@pytest.mark.usefixtures("often_switched")
def test_two_threads_that_step_one_optimizer_use_no_memory_that_is_gone(layout: str, options: dict[str, Any]) -> None:
    """As Hogwild training does, each writing the gradients that the other steps with. Numbers from nowhere may not appear."""
    params = [nn.Parameter(torch.zeros(20, 30)) for _ in range(4)]
    optimizer = fused_l2.SGD(params, lr=1.0, **options)

    def work() -> None:
        for _ in range(100):
            for p in params:
                p.grad = torch.ones(30, 20).t() if layout == "transposed" else torch.ones(20, 30)
            optimizer.step()

    assert in_threads([work, work]) == []
    found = torch.cat([p.detach().flatten() for p in params])
    assert bool((found == found.round()).all())
    assert bool(((found >= -200) & (found <= 0)).all())
    before = found.clone()
    work()  # and it goes on
    assert_same_bits(torch.cat([p.detach().flatten() for p in params]), before - 100)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("options", [{}, {"low_precision": "remainder"}, {"max_grad_norm": torch.inf}], ids=str)
@pytest.mark.usefixtures("often_switched")
def test_a_second_thread_waits_until_a_step_is_over(name: str, options: dict[str, Any]) -> None:
    """Kernels run without the interpreter's lock. torch.optim loses updates where two of them read and write one weight."""
    dtype = torch.bfloat16 if "low_precision" in options else torch.float32
    ends = []
    for at_once in (False, True):
        param = nn.Parameter(torch.zeros(300, 1000, dtype=dtype))
        param.grad = torch.ones_like(param)
        optimizer = getattr(fused_l2, name)([param], lr=1.0, weight_decay=0.0, **options)

        def work(step: Callable[[], None] = optimizer.step) -> None:
            for _ in range(40):
                step()

        if at_once:
            assert in_threads([work, work]) == []
        else:
            work(), work()
        ends.append([optimizer.master_params()[0], *(v for v in optimizer.state[param].values())])
    assert_same_bits(*ends)


@pytest.mark.usefixtures("often_switched")
def test_options_are_set_and_states_are_loaded_between_the_steps_of_another_thread() -> None:
    params = [nn.Parameter(torch.zeros(4, 6)[:, ::2]) for _ in range(8)]  # strided: each step is several operations
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fused_l2.AdamW(params, lr=1e-3)
    optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict())
    is_over = threading.Event()

    def steps() -> None:
        while not is_over.is_set():
            optimizer.step()

    def changes() -> None:
        try:
            for _ in range(8):
                optimizer.state_dtype = torch.bfloat16
                optimizer.state_dtype = None
                optimizer.load_state_dict(kept)
                optimizer.load_master_params([torch.zeros(4, 3)] * 8)
        finally:
            is_over.set()

    assert in_threads([steps, changes]) == []


@pytest.mark.usefixtures("often_switched")
def test_threads_load_one_state_dict_after_the_other() -> None:
    optimizer = fused_l2.AdamW([nn.Parameter(torch.zeros(3))])
    kept = optimizer.state_dict()

    def work() -> None:
        for _ in range(100):
            optimizer.load_state_dict(kept)
            optimizer.state_dict()

    assert in_threads([work, work, work]) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_forked_while_a_thread_steps_does_not_wait_for_it() -> None:
    """A lock that another thread has is inherited, and that thread is not."""
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    optimizer = fused_l2.SGD([param], lr=1.0)
    is_held, is_over = threading.Event(), threading.Event()

    def step() -> None:
        with optimizer._stepper.lock:
            is_held.set()
            is_over.wait()

    thread = threading.Thread(target=step)
    thread.start()
    is_held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends it, if it waits
        optimizer.step()
        os._exit(int(param.tolist() != [-1.0] * 3))
    _, ended = os.waitpid(child, 0)
    is_over.set()
    thread.join()
    assert ended == 0


def test_a_step_within_a_step_of_the_same_thread_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal handler's may be."""
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    optimizer = fused_l2.SGD([param], lr=1.0)
    optimizer.step()
    launch, signals = plan.Plan.launch, [1]

    def launch_with_a_step_before(self: Any) -> None:
        if signals:
            signals.pop()
            optimizer.step()
        launch(self)

    monkeypatch.setattr(plan.Plan, "launch", launch_with_a_step_before)
    optimizer.step()
    assert param.tolist() == [-3.0] * 3


@pytest.mark.usefixtures("often_switched")
def test_optimizers_in_threads_of_their_own_give_the_bits_of_one_after_the_other() -> None:
    variants: list[tuple[str, torch.dtype, dict[str, Any]]] = [
        ("SGD", torch.float32, {}),
        ("AdamW", torch.float32, {"max_grad_norm": 1.0, "statistics": True}),
        ("AdamW", torch.bfloat16, {"low_precision": "stochastic"}),
        ("SGD", torch.float64, {"max_grad_norm": 0.1}),
    ]
    ends: list[list[Any]] = []
    for at_once in (False, True):
        made = []
        for name, dtype, options in variants:
            params = make_params(SIZES, dtype)
            made.append((make(name, params, **options), params))

        def work(optimizer: Any, params: list[Any]) -> Callable[[], None]:
            def steps() -> None:
                for step in range(40):
                    set_grads(params, step)
                    if step % 3 == 1:
                        params[1].grad = None
                    if step % 5 == 4:
                        optimizer.load_state_dict(optimizer.state_dict())
                    optimizer.step()

            return steps

        works = [work(*one) for one in made]
        if at_once:
            assert in_threads(works) == []
        else:
            for one in works:
                one()
        ends.append([t for _, params in made for t in params])
        ends[-1] += [v for o, _ in made for own in o.state.values() for v in own.values()]
    assert_same_bits(*ends)


@pytest.mark.usefixtures("often_switched")
def test_warnings_of_a_step_are_given_once() -> None:
    """The warning of decay that rounding loses is an optimizer's, however often it is loaded or stepped."""
    params = make_params(SIZES, torch.bfloat16)
    optimizer = make("AdamW", params, weight_decay=1e-4)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for step in range(4):
            set_grads(params, step)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    assert len([w for w in found if "weight decay takes" in str(w.message)]) == 1
