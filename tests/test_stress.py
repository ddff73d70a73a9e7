"""The differential fuzz (``make stress``) for a moment, and that it finds and shortens what is wrong."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numpy")

from stress import programs, twins

import fused_l2


@pytest.mark.parametrize("first", range(0, 60, 12))
def test_random_programs(first):
    for seed in range(first, first + 12):
        program = programs.random_program(seed)
        found = twins.difference(program)
        assert found is None, f"seed {seed}: {found}\n{program}"


def test_programs_are_drawn_from_their_seed_and_printed_whole():
    program = programs.random_program(7)
    assert program == programs.random_program(7)
    assert program != programs.random_program(8)
    assert eval(str(program), {"Program": programs.Program, "inf": float("inf")}) == program
    names = {name for seed in range(300) for name, _ in programs.random_program(seed).events}
    assert names == {*programs.EVENTS, "step"}


def test_a_fault_is_found_and_its_program_is_made_short(monkeypatch):
    """An lr that is noticed a step late."""
    real = fused_l2.SGD.step

    def late(self, *args, **kwargs):
        lrs = [group["lr"] for group in self.param_groups]
        for group, lr in zip(self.param_groups, getattr(self, "_late", lrs), strict=False):
            group["lr"] = lr
        try:
            return real(self, *args, **kwargs)
        finally:
            self._late = lrs
            for group, lr in zip(self.param_groups, lrs, strict=False):
                group["lr"] = lr

    monkeypatch.setattr(fused_l2.SGD, "step", late)
    sgd = (p for seed in range(200) if (p := programs.random_program(seed)).optimizer == "SGD")
    failing = next(p for p in sgd if twins.difference(p))
    short = programs.shortest(failing, twins.difference)
    assert twins.difference(short).startswith("bits: event")
    assert len(short.groups) == len(short.groups[0]["params"]) == 1
    assert [name for name, _ in short.events if name not in ("lr", "tensor lr")] == ["step", "step"]
    assert len(short.events) == 3


def test_what_a_program_changes_for_the_process_is_put_back():
    threads = torch.get_num_threads()
    twins.difference(programs.Program("SGD", {}, [], [("threads", {"of": 0, "value": 3})]))
    assert torch.get_num_threads() == threads
