"""Every fault of a state dict is refused by load_state_dict, by name, before anything of the optimizer has changed."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import make_params, run
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_l2
from fused_l2.tables.modes import Mode

MAKE: dict[str, Callable[..., Any]] = {
    "SGD": lambda ps: fused_l2.SGD(groups(ps), lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda ps: fused_l2.AdamW(groups(ps), lr=0.1, amsgrad=True),
    **{
        f"AdamW {mode}": lambda ps, mode=mode: fused_l2.AdamW(groups(ps), lr=0.1, low_precision=mode)
        for mode in ("master", "remainder", "remainder8", "kahan", "stochastic")
    },
}
KEPT = {mode.name.lower(): mode.state_name for mode in Mode if mode.state_name}


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:]}]


def saved(name: str) -> tuple[Any, dict[str, Any]]:
    params = make_params((5, 7), torch.bfloat16 if " " in name else torch.float32)
    optimizer = run(MAKE[name], params, 2)
    return optimizer, copy.deepcopy(optimizer.state_dict())


def everything(optimizer: Any) -> Any:
    """All that a step reads, tensors as their values."""

    def plain(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return str(x.dtype), tuple(x.shape), x.tolist(), id(x)
        if isinstance(x, dict):
            return {k if not isinstance(k, torch.Tensor) else id(k): plain(v) for k, v in x.items()}
        return [plain(v) for v in x] if isinstance(x, (list, tuple)) else x

    return plain([optimizer.state, optimizer.param_groups, optimizer.options, dict(optimizer._stepper.waiting)])


NO_TENSORS = ("x", 3.0, [1.0, 2.0], object(), {"a": 1})
NO_COUNTS = (
    *(math.nan, -1, -5.0, math.inf, "3", torch.tensor(-1.0), torch.tensor([1.0, 2.0])),
    torch.tensor(1.0, device="meta"),
)


def freed(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def is_readable(t: torch.Tensor) -> bool:
    return not t.is_meta and t.untyped_storage().nbytes() > 0


# Each takes a tensor of the state, and gives what cannot stand in its place.
TENSOR_FAULTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "shape": lambda t: torch.zeros(t.numel() + 1, dtype=t.dtype),
    "dimension": lambda t: t.reshape(1, -1),
    "sparse": lambda t: t.to_sparse(),
    "complex": lambda t: t.to(torch.complex64),
    "integers": lambda t: t.real.to(torch.int64),  # a fault after another may find complex numbers
    "meta": lambda t: t.to("meta"),
    "freed": freed,
}
# Each damages a whole dict, in place.
GROUP_FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no state": lambda d: d.pop("state"),
    "no groups": lambda d: d.pop("param_groups"),
    "state is a list": lambda d: d.update(state=[]),
    "groups are a dict": lambda d: d.update(param_groups={}),
    "group is a list": lambda d: d["param_groups"].__setitem__(0, []),
    "group without params": lambda d: d["param_groups"][0].pop("params"),
    "params are a number": lambda d: d["param_groups"][0].update(params=3),
    "a group too few": lambda d: d["param_groups"].pop(),
    "a group too many": lambda d: d["param_groups"].append(copy.deepcopy(d["param_groups"][0])),
    "a parameter too many": lambda d: d["param_groups"][0]["params"].append(9),
    "one index for two": lambda d: d["param_groups"][1].update(params=[0]),
    "an index that is a list": lambda d: d["param_groups"][1].update(params=[[1]]),
    "a state of nobody": lambda d: d["state"].update({7: {"step": torch.tensor(1.0)}}),
    "a state that is a number": lambda d: d["state"].update({1: 4}),
    "lr NaN": lambda d: d["param_groups"][1].update(lr=math.nan),
    "lr negative": lambda d: d["param_groups"][1].update(lr=-0.1),
    "lr infinite": lambda d: d["param_groups"][0].update(lr=math.inf),
    "lr text": lambda d: d["param_groups"][0].update(lr="0.1"),
    "weight_decay None": lambda d: d["param_groups"][0].update(weight_decay=None),
    "differentiable": lambda d: d["param_groups"][0].update(differentiable=True),
    "maximize text": lambda d: d["param_groups"][1].update(maximize="False"),
    "capturable text": lambda d: d["param_groups"][0].update(capturable="no"),
    "foreach a number": lambda d: d["param_groups"][0].update(foreach=1.5),
    "fused a list": lambda d: d["param_groups"][0].update(fused=[]),
    "a tuple for an index": lambda d: d["state"].update({(1,): d["state"].pop(1)}),
    "a float for an index": lambda d: d["state"].update({1.5: d["state"].pop(1)}),
    "None for an index": lambda d: d["state"].update({None: d["state"].pop(1)}),
    "a name for an index": lambda d: d["state"].update({"weight": d["state"].pop(1)}),
    "a tensor for an index": lambda d: d["state"].update({torch.ones(3): d["state"].pop(1)}),
}


def assert_refused(optimizer: Any, damaged: Any, what: str = ".") -> None:
    before = everything(optimizer)
    with pytest.raises((ValueError, TypeError), match=what):
        optimizer.load_state_dict(damaged)
    assert everything(optimizer) == before


@pytest.mark.sweep(5)
@pytest.mark.parametrize("fault", GROUP_FAULTS)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_damaged_groups_are_refused(name: str, fault: str) -> None:
    optimizer, state_dict = saved(name)
    GROUP_FAULTS[fault](state_dict)
    assert_refused(optimizer, state_dict)


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
@pytest.mark.parametrize("name", MAKE)
def test_damaged_tensors_are_refused_by_name(name: str, fault: str) -> None:
    optimizer, state_dict = saved(name)
    for key in [key for key in state_dict["state"][1] if key != "step"]:
        damaged = copy.deepcopy(state_dict)
        damaged["state"][1][key] = TENSOR_FAULTS[fault](damaged["state"][1][key])
        assert_refused(optimizer, damaged, rf"parameter 0 of group 1 .*'{key}'")


@pytest.mark.parametrize("count", NO_COUNTS, ids=repr)
def test_counters_that_count_nothing_are_refused(count: Any) -> None:
    optimizer, state_dict = saved("AdamW")
    state_dict["state"][0]["step"] = count
    assert_refused(optimizer, state_dict, r"parameter 0 of group 0 .*'step'")


def test_half_a_state_and_another_optimizer_s_are_refused() -> None:
    optimizer, state_dict = saved("AdamW")
    for key in ("exp_avg", "exp_avg_sq", "step"):
        damaged = copy.deepcopy(state_dict)
        del damaged["state"][1][key]
        assert_refused(optimizer, damaged, f"no '{key}'")
    _, of_sgd = saved("SGD")
    assert_refused(optimizer, of_sgd, "no 'betas': it is of another optimizer")
    of_sgd["param_groups"] = copy.deepcopy(state_dict["param_groups"])
    assert_refused(optimizer, of_sgd, "'momentum_buffer', but no 'exp_avg'")
    negative = copy.deepcopy(state_dict)
    negative["state"][0]["exp_avg_sq"][2] = -1e-3
    assert_refused(optimizer, negative, "'exp_avg_sq' has negative elements")
    assert_refused(optimizer, [state_dict], "needs a dict, got list")


@pytest.mark.parametrize("name", MAKE)
def test_what_a_run_saves_that_has_diverged_is_loaded(name: str) -> None:
    optimizer, _ = saved(name)
    for p in optimizer._all_params():
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("mode", KEPT)
def test_a_weight_of_which_nothing_was_kept_beside_others_goes_on_from_its_16_bits_and_that_is_told(mode: str) -> None:
    """As checkpoints have it that a torch.optim run began, or of a parameter that was float32 for a while."""
    optimizer, state_dict = saved(f"AdamW {mode}")
    partly = copy.deepcopy(state_dict)
    del partly["state"][1][KEPT[mode]]
    with pytest.warns(
        fused_l2.FusedL2Warning, match=f"parameter 0 of group 1 .*no '{KEPT[mode]}', which those of other parameters have"
    ):
        optimizer.load_state_dict(partly)
    assert torch.equal(optimizer.master_params()[1], optimizer._all_params()[1].detach().float())
    optimizer.load_state_dict(optimizer.state_dict())  # it has it now
    for key in (0, 1):
        partly["state"][key].pop(KEPT[mode], None)
    optimizer.load_state_dict(partly)  # for none, as of torch.optim
    del state_dict["state"][1]  # never stepped
    optimizer.load_state_dict(state_dict)


def test_what_is_of_no_parameter_is_loaded_as_torch_loads_it() -> None:
    optimizer, state_dict = saved("AdamW")
    state_dict["state"] |= {"ema": {"step": 3, "decay": 0.9}, ("a", 1): [1.0], 1.5: "x"}
    state_dict["state"][1] |= {("mine",): 2, 7: torch.ones(2)}
    state_dict["state"][0]["step"] = torch.tensor(2.5)  # an average of two runs
    optimizer.load_state_dict(state_dict)
    assert optimizer.state["ema"] == {"step": 3, "decay": 0.9}
    optimizer.load_state_dict(optimizer.state_dict())
    for p in optimizer._all_params():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert float(optimizer.state[optimizer._all_params()[0]]["step"]) == 3.5


@pytest.mark.parametrize("mode", KEPT)
def test_a_checkpoint_of_torch_of_which_a_part_was_stepped_is_saved_whole(mode: str) -> None:
    given = run(lambda ps: torch.optim.AdamW(groups(ps), lr=0.1), make_params((5, 7), torch.bfloat16), 2).state_dict()
    optimizer, _ = saved(f"AdamW {mode}")
    optimizer.load_state_dict(copy.deepcopy(given))
    weights = [p.detach().float() for p in optimizer._all_params()]
    assert all(map(torch.equal, optimizer.master_params(), weights))
    first, second = optimizer._all_params()
    first.grad, second.grad = torch.ones_like(first), None
    optimizer.step()
    MAKE[f"AdamW {mode}"](make_params((5, 7), torch.bfloat16)).load_state_dict(optimizer.state_dict())


FLAGS = {
    "SGD": ("nesterov", "maximize", "foreach", "fused", "differentiable"),
    "Adam": ("amsgrad", "maximize", "foreach", "fused", "differentiable", "capturable", "decoupled_weight_decay"),
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in FLAGS for key in FLAGS[name]])
def test_flags_of_param_groups_are_true_or_false_wherever_they_come_from(name: str, key: str) -> None:
    cls, params = getattr(fused_l2, name), make_params((5, 7))
    made = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = cls(groups(params), **made)
    for wrong in ("False", "no", 1.5, [], 2):
        state_dict = optimizer.state_dict()
        state_dict["param_groups"][1][key] = wrong
        refused = rf"{key} of param group 1 must be True or False, got"
        assert_refused(optimizer, state_dict, refused)
        with pytest.raises(TypeError, match=rf"{key} must be True or False"):
            cls(params, **{**made, key: wrong})
        with pytest.raises(TypeError, match=rf"{key} of param group 2 must be True or False"):
            optimizer.add_param_group({"params": make_params((3,)), key: wrong})
    for fine in (0, False, None, torch.tensor(False)):  # as torch's constructors take them
        state_dict = optimizer.state_dict()
        state_dict["param_groups"][1][key] = fine
        optimizer.load_state_dict(state_dict)
        cls(params, **{**made, key: fine})


@pytest.mark.parametrize("other", ["Adam", "AdamW", "RMSprop", "Adagrad"])
def test_sgd_whose_momentum_may_start_anew_refuses_what_others_saved(other: str) -> None:
    params = make_params((5, 7))
    state_dict = run(lambda ps: getattr(torch.optim, other)(groups(ps), lr=0.1), params, 2).state_dict()
    assert_refused(saved("SGD")[0], state_dict, "is of another optimizer")


def test_states_under_strings_are_not_lost() -> None:
    optimizer, state_dict = saved("AdamW")
    state_dict["state"] = {str(key): state for key, state in state_dict["state"].items()}
    assert_refused(optimizer, state_dict, "the state of parameter 0 under the string '0'.*Make the keys of 'state' numbers")


def shortened(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.numel() - 1)
    return t


@pytest.mark.parametrize("key", ["exp_avg_8bit", "exp_avg_scale", "exp_avg_sq_scale"])
@pytest.mark.parametrize("fault", [*TENSOR_FAULTS, "transposed", "flat", "shortened"])
def test_damaged_8_bit_states_are_refused_by_name(key: str, fault: str) -> None:
    faults = {**TENSOR_FAULTS, "transposed": lambda t: t.T, "flat": lambda t: t.view(-1), "shortened": shortened}
    optimizer = run(lambda ps: fused_l2.AdamW(ps, lr=0.1, state_dtype="8bit"), make_params(((64, 128),)), 2)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0][key] = faults[fault](state_dict["state"][0][key])
    assert_refused(optimizer, state_dict, f"'{key}'")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_a_dict_is_loaded_whole_or_not_at_all(data: st.DataObject) -> None:
    """Several faults at once, in any place, and what is no fault: whatever is accepted makes a finite step."""
    optimizer, state_dict = saved(data.draw(st.sampled_from(sorted(MAKE))))
    for _ in range(data.draw(st.integers(0, 3))):
        if data.draw(st.booleans()):
            fault = GROUP_FAULTS[data.draw(st.sampled_from(sorted(GROUP_FAULTS)))]
            # An earlier fault may have taken what this one damages.
            with contextlib.suppress(KeyError, IndexError, AttributeError, TypeError):
                fault(state_dict)
            continue
        state = state_dict.get("state")
        state = state.get(data.draw(st.integers(0, 1))) if isinstance(state, dict) else None
        if not isinstance(state, dict) or not state:
            continue
        key = data.draw(st.sampled_from(sorted(state)))
        how = data.draw(st.sampled_from(["gone", "None", "no tensor", "no count", "zeros", *TENSOR_FAULTS]))
        value = state[key]
        if how == "gone":
            del state[key]
        elif how == "None":
            state[key] = None
        elif how == "no tensor":
            state[key] = data.draw(st.sampled_from(NO_TENSORS))
        elif how == "no count":
            state["step"] = data.draw(st.sampled_from(NO_COUNTS))
        elif isinstance(value, torch.Tensor) and value.layout is torch.strided and is_readable(value):
            state[key] = torch.zeros_like(value) if how == "zeros" else TENSOR_FAULTS[how](value)
    before = everything(optimizer)
    try:
        optimizer.load_state_dict(state_dict)
    except (ValueError, TypeError):
        assert everything(optimizer) == before
        return
    for p in optimizer._all_params():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in optimizer._all_params())
