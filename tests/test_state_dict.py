"""State and checkpoints: torch's keys, both ways, and nothing lost on the way (traps T06 to T19, T54, T56)."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import weakref

import pytest
import torch
from comparing import assert_same_bits, make_params, run, set_grads, states

import fused_l2

CASES = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
}
SIZES = (5, 64, 0, 33)
each = pytest.mark.parametrize("name", CASES)


def ours(name):
    return lambda params: getattr(fused_l2, name)(params, **CASES[name])


def theirs(name):
    return lambda params: getattr(torch.optim, name)(params, **CASES[name])


def continue_run(optimizer, params, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()


def twin(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def through_file(state_dict):
    """As a checkpoint: saved, and loaded with weights_only."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each
def test_state_and_group_keys_are_torchs(name):
    """T15: no key more, no key less, counters 0-dim float32 (T12, T14)."""
    params, others = make_params(SIZES), make_params(SIZES)
    a, b = run(ours(name), params, 2), run(theirs(name), others, 2)
    mine, yours = a.state_dict(), b.state_dict()
    assert mine["param_groups"] == yours["param_groups"]
    assert mine["state"].keys() == yours["state"].keys()
    for key, state in mine["state"].items():
        assert type(state) is dict
        assert state.keys() == yours["state"][key].keys()
        for entry, value in state.items():
            assert value.shape == yours["state"][key][entry].shape
            assert value.dtype == yours["state"][key][entry].dtype
    if name != "SGD":
        assert all(c.dim() == 0 and c.dtype == torch.float32 and c.item() == 2 for c in states(a, params, "step"))


@each
def test_resume_gives_the_same_bits(name):
    params = make_params(SIZES)
    whole = run(ours(name), params, 10)
    halves = make_params(SIZES)
    first = run(ours(name), halves, 5)
    saved = through_file(first.state_dict())
    resumed = twin(halves)
    second = ours(name)(resumed)
    second.load_state_dict(saved)
    continue_run(second, resumed, 5, 5)
    assert_same_bits(resumed, params)
    del whole


@each
def test_torch_checkpoint_loads_and_ours_loads_into_torch(name, exact_sqrt):
    """A run that changes hands halfway, either way, ends as the run that did not."""
    params = make_params(SIZES)
    run(theirs(name), params, 10)
    for start, end in ((theirs(name), ours(name)), (ours(name), theirs(name))):
        half = make_params(SIZES)
        saved = through_file(run(start, half, 5).state_dict())
        rest = twin(half)
        optimizer = end(rest)
        optimizer.load_state_dict(saved)
        continue_run(optimizer, rest, 5, 5)
        assert_same_bits(rest, params)


def test_sgd_checkpoint_made_before_the_first_step_loads():
    params = make_params(SIZES)
    optimizer = ours("SGD")(params)
    optimizer.load_state_dict(
        {"state": {0: {"momentum_buffer": None}}, "param_groups": theirs("SGD")(params).state_dict()["param_groups"]}
    )
    expected = make_params(SIZES)
    run(theirs("SGD"), expected, 3)
    continue_run(optimizer, params, 0, 3)
    assert_same_bits(params, expected)


@each
def test_T06_load_state_dict_mid_run_is_noticed(name):
    """A plan that kept the old states' addresses would go on stepping them."""
    params = make_params(SIZES)
    optimizer = run(ours(name), params, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    at = twin(params)
    continue_run(optimizer, params, 3, 4)
    after_seven = twin(params)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(params, at, strict=True):
            p.copy_(q)
    continue_run(optimizer, params, 3, 4)
    assert_same_bits(params, after_seven)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_T07_T17_T32_float32_moments_of_16_bit_parameters_stay_float32(dtype):
    params = make_params(SIZES, dtype)
    optimizer = ours("AdamW")(params)
    for p in params:
        optimizer.state[p].update(step=torch.tensor(0.0), exp_avg=torch.zeros(p.shape), exp_avg_sq=torch.zeros(p.shape))
    continue_run(optimizer, params, 0, 5)
    assert all(s.dtype == torch.float32 for s in states(optimizer, params, "exp_avg", "exp_avg_sq"))
    saved = through_file(optimizer.state_dict())
    resumed = twin(params)
    second = ours("AdamW")(resumed)
    second.load_state_dict(saved)
    assert_same_bits(states(second, resumed, "exp_avg", "exp_avg_sq"), states(optimizer, params, "exp_avg", "exp_avg_sq"))
    continue_run(optimizer, params, 5, 5)
    continue_run(second, resumed, 5, 5)
    assert_same_bits(resumed, params)


def test_T11_step_counters_are_per_parameter():
    """A parameter that gets its gradients later has its own bias correction (T03 for SGD's first step)."""
    for name in CASES:
        params, others = make_params((8, 9)), make_params((8, 9))
        a, b = ours(name)(params), theirs(name)(others)
        for step in range(6):
            for group in (params, others):
                set_grads(group, step)
                if step < 3:
                    group[1].grad = None
            a.step()
            b.step()
        torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-7)
        if name != "SGD":
            assert [c.item() for c in states(a, params, "step")] == [6, 3]


@pytest.mark.parametrize(
    "counter",
    [
        3,
        3.0,
        torch.tensor([3.0]),
        torch.tensor(3),
        torch.tensor(3.0, dtype=torch.bfloat16),
        torch.tensor(3.0, dtype=torch.float64),
    ],
    ids=["int", "float", "T14 shape (1,)", "int tensor", "T12 bfloat16", "float64"],
)
def test_T12_T13_T14_counters_of_other_kinds_are_read(counter):
    params = make_params(SIZES)
    optimizer = run(ours("AdamW"), params, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = copy.deepcopy(counter)
    resumed = twin(params)
    second = ours("AdamW")(resumed)
    second.load_state_dict(saved)
    continue_run(optimizer, params, 3, 2)
    continue_run(second, resumed, 3, 2)
    assert_same_bits(resumed, params)
    counters = states(second, resumed, "step")
    # What can be counted in is counted in; everything else becomes what torch has.
    as_it_is = isinstance(counter, torch.Tensor) and counter.dtype in (torch.float32, torch.float64)
    dtype, shape = (counter.dtype, counter.shape) if as_it_is else (torch.float32, torch.Size([]))
    assert all(c.dtype is dtype and c.shape == shape and c.item() == 5 for c in counters)


def test_T12_counters_count_beyond_what_16_bits_hold():
    params = make_params((4,))
    optimizer = run(ours("AdamW"), params, 1)
    optimizer.state[params[0]]["step"].fill_(2050)
    continue_run(optimizer, params, 0, 3)
    assert optimizer.state[params[0]]["step"].item() == 2053


def test_T16_nothing_of_the_state_is_kept_elsewhere():
    """state_dict holds all that the next step depends on: a fresh optimizer with it goes on in the same bits."""
    for name in CASES:
        params = make_params(SIZES, torch.bfloat16)
        optimizer = run(ours(name), params, 4)
        resumed = twin(params)
        second = ours(name)(resumed)
        second.load_state_dict(through_file(optimizer.state_dict()))
        continue_run(optimizer, params, 4, 4)
        continue_run(second, resumed, 4, 4)
        assert_same_bits(resumed, params)


@each
def test_T18_load_before_the_first_step_and_swapped_params(name):
    """accelerate loads a state dict before step 1; FSDP2 puts other tensors into group["params"]."""
    params = make_params(SIZES)
    optimizer = ours(name)(params)
    optimizer.load_state_dict(optimizer.state_dict())
    continue_run(optimizer, params, 0, 2)
    swapped = twin(params)
    for i, q in enumerate(swapped):
        optimizer.state[q] = optimizer.state.pop(params[i])
        optimizer.param_groups[0]["params"][i] = q
    expected = make_params(SIZES)
    run(ours(name), expected, 4)
    continue_run(optimizer, swapped, 2, 2)
    assert_same_bits(swapped, expected)


@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
@each
def test_T19_a_step_with_lr_zero_and_zero_gradients_makes_state_and_moves_no_bit(name, zero):
    """What torch.distributed.checkpoint does to get a state to load into."""
    params = make_params(SIZES)
    with torch.no_grad():
        params[0][:2] = torch.tensor([0.0, -0.0])
    before = twin(params)
    optimizer = ours(name)(params)
    for group in optimizer.param_groups:
        group["lr"] = zero
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)
    assert_same_bits(params, before)
    assert all(len(optimizer.state[p]) > 0 for p in params)


def test_distributed_checkpoint_functions_accept_the_optimizer():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = fused_l2.AdamW(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    saved = get_optimizer_state_dict(model, optimizer)
    assert_same_bits([p.detach() for p in model.parameters()], before)
    assert set(saved["state"]) == {"weight", "bias"}
    set_optimizer_state_dict(model, optimizer, saved)


@each
def test_T54_two_optimizers_loaded_from_one_dict_step_their_own_state(name):
    params = make_params(SIZES)
    source = run(ours(name), params, 2)
    kept = copy.deepcopy(source.state_dict()["state"])
    saved = source.state_dict()
    for _ in range(2):
        others = twin(params)
        second = ours(name)(others)
        second.load_state_dict(saved)
        continue_run(second, others, 2, 3)
    for key, state in kept.items():
        for entry, value in state.items():
            assert_same_bits(saved["state"][key][entry], value, entry)


@each
def test_T56_copies_and_pickles_step_on_their_own(name):
    params = make_params(SIZES)
    optimizer = run(ours(name), params, 2)
    if name == "SGD":
        optimizer.decoupled_weight_decay = True  # options that are no group keys have to travel, too
    if name != "Adam":
        optimizer.cautious, optimizer.decay_rule = True, ["fully_decoupled"]
        lr, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], 0.003  # the peak is the former
    for duplicate in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        copied = duplicate.param_groups[0]["params"]
        kept = twin(params)
        continue_run(duplicate, copied, 2, 2)
        assert_same_bits(params, kept, "the original")
        assert getattr(duplicate, "decoupled_weight_decay", True) is True
        again = twin(params)
        reference = ours(name)(again)
        if name == "SGD":
            reference.decoupled_weight_decay = True
        if name != "Adam":
            reference.cautious, reference.decay_rule, reference.max_lr = True, "fully_decoupled", lr
        reference.load_state_dict(optimizer.state_dict())
        continue_run(reference, again, 2, 2)
        assert_same_bits(copied, again)


def _in_a_worker(queue, optimizer, params):
    torch.set_num_threads(1)
    continue_run(optimizer, params, 2, 2)
    queue.put([p.detach().tolist() for p in params])


def test_T56_an_optimizer_works_in_a_forked_process():
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork on this system")
    params = make_params(SIZES)
    optimizer = run(ours("AdamW"), params, 2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_in_a_worker, args=(queue, optimizer, params))
    worker.start()
    there = queue.get(timeout=60)
    worker.join()
    continue_run(optimizer, params, 2, 2)
    assert there == [p.detach().tolist() for p in params]


@each
@pytest.mark.parametrize("how", ["entry", "update", "whole dict", "plain dict kept outside", "in place", "whole state"])
def test_state_replaced_from_outside_is_noticed(name, how):
    """As offloading code does: optimizer.state[p][key] = other tensor, between two steps."""
    params = make_params(SIZES)
    optimizer = run(ours(name), params, 3)
    at_three = twin(params)
    key = "momentum_buffer" if name == "SGD" else "exp_avg"
    doubled_state = copy.deepcopy(optimizer.state_dict())
    for state in doubled_state["state"].values():
        state[key] = state[key] * 2
    if how == "plain dict kept outside":
        outside = {p: dict(optimizer.state[p]) for p in params}
        for p in params:
            optimizer.state[p] = outside[p]
            p.grad = None
        optimizer.step()  # the plan has seen these dictionaries
    if how == "whole state":
        optimizer.state = {p: {**optimizer.state[p], key: optimizer.state[p][key] * 2} for p in params}
    # No other optimizer is made or loaded from here to the steps: that would make every plan look at its state.
    for p in params:
        doubled = optimizer.state[p][key] * 2
        if how == "entry":
            optimizer.state[p][key] = doubled
        elif how == "update":
            optimizer.state[p].update({key: doubled})
        elif how == "whole dict":
            optimizer.state[p] = {**optimizer.state[p], key: doubled}
        elif how == "plain dict kept outside":
            outside[p][key] = doubled
        elif how == "in place":
            optimizer.state[p][key].data = doubled
    continue_run(optimizer, params, 3, 2)
    expected = ours(name)(at_three)
    expected.load_state_dict(doubled_state)
    continue_run(expected, at_three, 3, 2)
    assert_same_bits(params, at_three)


@each
def test_states_of_another_memory_format_are_paired_by_index(name):
    """A checkpoint of a contiguous model, loaded into one that is channels_last."""
    generator = torch.Generator().manual_seed(0)
    contiguous = torch.nn.Parameter(torch.randn(4, 3, 2, 5, generator=generator))
    grads = [torch.randn(4, 3, 2, 5, generator=generator) for _ in range(4)]
    first = ours(name)([contiguous])
    for g in grads[:2]:
        contiguous.grad = g.clone()
        first.step()
    other = torch.nn.Parameter(contiguous.detach().clone().to(memory_format=torch.channels_last))
    second = ours(name)([other])
    second.load_state_dict(first.state_dict())
    for g in grads[2:]:
        contiguous.grad = g.clone()
        other.grad = g.clone(memory_format=torch.channels_last)
        first.step()
        second.step()
    assert_same_bits(other.detach().contiguous(), contiguous.detach())


@each
def test_replaced_state_is_freed_at_once(name):
    """Offloading between steps is meant to free memory: nothing but the dictionaries may hold states."""
    params = make_params(SIZES)
    optimizer = run(ours(name), params, 2)
    key = "momentum_buffer" if name == "SGD" else "exp_avg"
    watched = [weakref.ref(optimizer.state[p][key]) for p in params]
    for p in params:
        optimizer.state[p][key] = optimizer.state[p][key].clone()
    assert [w() for w in watched] == [None] * len(params)
    continue_run(optimizer, params, 2, 1)
    watched = [weakref.ref(optimizer.state[p][key]) for p in params]
    optimizer.state.clear()
    assert [w() for w in watched] == [None] * len(params)
    continue_run(optimizer, params, 3, 1)
    watched = [weakref.ref(optimizer.state[p][key]) for p in params]
    del optimizer.state[params[0]]
    assert [w() is None for w in watched] == [True] + [False] * (len(params) - 1)
