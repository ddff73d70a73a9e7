"""The benchmark's method: shapes, correctness gate, ratios. No clock is asserted."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
import torch
from conftest import needs_library


def test_shapes_have_the_published_numbers_of_parameters(bench):
    cases = bench("cases")
    counts = {c.name: (sum(map(math.prod, c.shapes)), len(c.shapes)) for c in cases.CASES}
    assert counts["gpt2-small"] == (124_439_808, 148)
    assert counts["gpt2-xl"] == (1_557_611_200, 580)
    assert counts["resnet50"] == (25_557_032, 161)
    assert counts["tiny-1000"][1] == 1000
    assert counts["mlp-40"] == (1_000_000, 40)
    assert counts["lora"] == (4_194_304, 128)
    assert counts["vit-28-groups"] == (86_567_656, 152)
    assert sum(map(math.prod, cases.llama_7b())) == 6_738_415_616
    assert len(set(cases.layer_decay_groups(cases.vit_b()))) == 28


@pytest.mark.sweep
@needs_library
def test_one_case_runs_and_writes_json(bench, tmp_path, capsys):
    out = tmp_path / "results.json"
    few = ["--provider", "torch fused", "--provider", "torch for-loop"]
    assert bench("cli").main(["step", "--case", "one-64k", "--seconds", "0.2", *few, "--even-if-busy", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "torch fused" in printed
    assert "wrong" not in printed
    found = json.loads(out.read_text())
    assert {r["optimizer"] for r in found["results"]["step"]} == {"AdamW", "SGD"}
    first = found["results"]["step"][0]
    assert first["rows"]["torch fused"]["ratio_to_torch_fused"][1] == 1.0
    assert first["correct"] == {"fused_l2": "ok", "torch fused": "ok", "torch for-loop": "ok"}
    assert {"date", "cpu", "threads", "torch", "python", "commit", "cpu flags"} <= found["machine"].keys()


@pytest.mark.sweep
@needs_library
@pytest.mark.parametrize("topic", ["limit", "clip", "statistics", "train", "memory"])
def test_every_topic_runs(bench, topic, capsys, monkeypatch):
    monkeypatch.setattr(bench("limit"), "SIZES", (256, 1024))
    case = {"clip": ["--case", "one-64k"], "statistics": ["--case", "one-64k"], "train": ["--case", "mlp"]}.get(topic, [])
    arguments = [topic, *case, "--provider", "torch fused", "--optimizer", "AdamW", "--seconds", "0.2", "--even-if-busy"]
    assert bench("cli").main(arguments) == 0
    assert "AdamW" in capsys.readouterr().out


def test_an_option_that_is_wrong_says_what_there_is(bench, capsys):
    with pytest.raises(SystemExit):
        bench("cli").main(["step", "--case", "gpt5"])
    assert "gpt2-small" in capsys.readouterr().err


def test_without_the_library_there_is_nothing_to_measure(bench, monkeypatch):
    monkeypatch.setattr(bench("cli").cpu, "library", lambda: None)
    monkeypatch.setattr(bench("cli").cpu, "why_unavailable", lambda: "The library is missing.")
    with pytest.raises(SystemExit, match=r"nothing to measure, our steps are plain PyTorch. The library is missing\."):
        bench("cli").main(["step", "--case", "one-64k"])


@needs_library
def test_ctrl_c_keeps_what_was_measured(bench, tmp_path, monkeypatch, capsys):
    memory = bench("memory")
    measure = memory.measure

    def interrupted(optimizer, dtype, options):
        if dtype is torch.bfloat16:
            raise KeyboardInterrupt
        return measure(optimizer, dtype, options)

    monkeypatch.setattr(memory, "measure", interrupted)
    out = tmp_path / "results.json"
    assert bench("cli").main(["memory", "--provider", "torch fused", "--json", str(out)]) == 130
    assert len(json.loads(out.read_text())["results"]["memory"]) == 1
    assert "what was measured is kept" in capsys.readouterr().err


@needs_library
def test_a_case_that_fails_leaves_the_others_and_the_exit_code(bench, monkeypatch, capsys):
    memory = bench("memory")
    measure = memory.measure

    def failing(optimizer, dtype, options):
        if dtype is torch.bfloat16:
            raise ValueError("out of luck")
        return measure(optimizer, dtype, options)

    monkeypatch.setattr(memory, "measure", failing)
    assert bench("cli").main(["memory", "--optimizer", "AdamW", "--provider", "torch fused"]) == 1
    captured = capsys.readouterr()
    assert "out of luck" in captured.err
    assert "AdamW, float32" in captured.out


def test_bytes_are_counted(bench):
    """AdamW in float32: 4 streams read, 3 written; torch's fused too; its for-loop moves and holds more."""
    memory, topic = bench("memory"), bench("topic")
    options = topic.Options(optimizers=["AdamW"], providers=["torch fused", "torch for-loop"])
    rows = memory.measure("AdamW", torch.float32, options)["rows"]
    assert rows["torch fused"] == rows["fused_l2"] == {
        "parameter and gradient": 8, "states": 8.0, "temporary": 0.0, "moved": 28,
    }  # fmt: skip
    assert rows["torch for-loop"]["moved"] > 50
    assert rows["torch for-loop"]["temporary"] >= 4


def test_the_correctness_gate_catches_a_wrong_decay(bench):
    providers, cases = bench("providers"), bench("cases")

    def wrong(optimizer, groups, settings):
        return torch.optim.AdamW(groups, **{**settings, "weight_decay": 0.9 * settings["weight_decay"]})

    providers.PROVIDERS["wrong"] = providers.Provider("wrong", "torch", wrong)
    case = cases.Case("small", "", lambda: [(5,)])
    contest = providers.Contest(case, "AdamW", {"lr": 1e-6, "weight_decay": 1e-2}, names=["fused_l2", "torch fused", "wrong"])
    assert contest.absent["wrong"].startswith("wrong: ")
    assert list(contest.optimizers) == ["fused_l2", "torch fused"]  # what is wrong is not timed


def small(churn, **changes):
    """The situations of the topic churn, with few tensors."""
    return [dataclasses.replace(s, tensors=24, **changes) for s in churn.SITUATIONS]


@pytest.mark.sweep
@needs_library
def test_every_situation_between_steps_runs(bench, tmp_path, monkeypatch, capsys):
    churn, tables = bench("churn"), bench("tables")
    monkeypatch.setattr(churn, "SITUATIONS", small(churn, run=2))
    monkeypatch.setattr(churn, "SAMPLE", 1e-3)
    out, threads = tmp_path / "results.json", torch.get_num_threads()
    assert bench("cli").main(["churn", "--seconds", "0.01", "--even-if-busy", "--json", str(out)]) == 0
    assert torch.get_num_threads() == threads
    results = json.loads(out.read_text())["results"]["churn"]
    assert [r["case"] for r in results] == [s.name for s in churn.SITUATIONS]
    for r in results:
        assert r["rows"].keys() == {*churn.NAMES, "fused_l2 again"}
        assert r["correct"] == dict.fromkeys(churn.NAMES, "ok")
    printed = capsys.readouterr().out
    table = tables.churn(results).splitlines()
    assert len(table) == 2 + len(results)
    for r, row in zip(results, table[2:], strict=True):
        assert r["what"] in printed
        assert r["what"] in row


class WrongDecay(torch.optim.AdamW):
    def __init__(self, params, weight_decay, **settings):
        super().__init__(params, weight_decay=0.9 * weight_decay, **settings)


class ZerosForMissingGradients(torch.optim.AdamW):
    def step(self):
        for p in self.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        super().step()


class DataOfTheFirstStep(torch.optim.AdamW):
    kept = None

    def step(self):
        params = self.param_groups[0]["params"]
        now = [p.data for p in params]
        self.kept = self.kept or now
        for p, data in zip(params, self.kept, strict=True):
            p.data = data
        super().step()
        for p, data in zip(params, now, strict=True):
            p.data = data


class StatesOfTheFirstStep(torch.optim.AdamW):
    kept = None

    def step(self):
        now = {p: dict(state) for p, state in self.state.items()}
        self.state.update({p: dict(state) for p, state in (self.kept or now).items()})
        super().step()
        self.kept = self.kept or {p: dict(state) for p, state in self.state.items()}
        self.state.update(now)


class ForgetsKeys(torch.optim.AdamW):
    def step(self):
        super().step()
        for state in self.state.values():
            state.pop("seen", None)


class StatesOfTheOptimizerBefore(torch.optim.AdamW):
    left = None

    def step(self):
        self.state.update(type(self).left or {})
        super().step()
        type(self).left = dict(self.state)


@pytest.mark.parametrize(
    ("situation", "wrong"),
    [
        ("nothing", WrongDecay), ("dropout", WrongDecay), ("dropout", ZerosForMissingGradients), ("heads", WrongDecay),
        ("heads", ZerosForMissingGradients), ("own-key", WrongDecay), ("own-key", ForgetsKeys), ("new-data", WrongDecay),
        ("new-data", DataOfTheFirstStep), ("offload", WrongDecay), ("offload", StatesOfTheFirstStep),
        ("unfreezing", WrongDecay), ("unfreezing", ZerosForMissingGradients), ("first", WrongDecay),
        ("first", StatesOfTheOptimizerBefore),
    ],
)  # fmt: skip
def test_what_is_wrong_only_when_the_world_moves_is_not_timed(bench, situation, wrong, monkeypatch):
    """Each of these is right, or nearly, as long as nothing changes between steps (but for the decay)."""
    churn, providers, topic = bench("churn"), bench("providers"), bench("topic")
    monkeypatch.setattr(wrong, "left", None, raising=False)
    made = providers.Provider("torch fused", "torch", lambda optimizer, groups, settings: wrong(groups, **settings))
    monkeypatch.setitem(providers.PROVIDERS, "torch fused", made)
    chosen = next(s for s in small(churn) if s.name == situation)
    names = ["torch fused", "torch for-loop"]
    correct = churn.verdicts(chosen, names)
    assert correct["torch fused"].startswith("wrong: ")
    assert correct["torch for-loop"] == "ok"
    if wrong not in (WrongDecay, StatesOfTheOptimizerBefore):
        assert churn.verdicts(small(churn)[0], names)["torch fused"] == "ok"

    monkeypatch.setattr(churn.timing, "interleave", lambda contestants, *_, **__: {n: filled(bench) for n in contestants})
    result = churn.measure(chosen, topic.Options(["AdamW"], names), {})
    assert result["rows"].keys() == {"fused_l2", "fused_l2 again", "torch for-loop"}
    assert result["not measured"] == {"torch fused": correct["torch fused"]}


def filled(bench):
    return bench("timing").Samples([1.0] * 7)


def test_a_wrong_step_of_ours_between_changes_is_an_error(bench, monkeypatch):
    churn, providers = bench("churn"), bench("providers")
    made = providers.Provider("fused_l2", "torch", lambda optimizer, groups, settings: DataOfTheFirstStep(groups, **settings))
    monkeypatch.setitem(providers.PROVIDERS, "fused_l2", made)
    moved = next(s for s in small(churn) if s.name == "new-data")
    with pytest.raises(RuntimeError, match="fused_l2 is wrong: "):
        churn.measure(moved, bench("topic").Options(["AdamW"], []), {})


def test_the_same_gradients_are_missing_for_every_provider(bench):
    churn, providers = bench("churn"), bench("providers")
    for situation in small(churn):
        drawn = []
        for name in ("torch for-loop", "torch foreach"):
            world = churn.World(situation, providers.PROVIDERS[name], {"lr": 1e-6, "weight_decay": 1e-2}, torch.float32)
            present = []
            for _ in range(4):
                world.before()
                present.append([p.grad is not None for p in world.params])
            drawn.append(present)
        assert drawn[0] == drawn[1]
        moves = situation.name in ("dropout", "heads", "unfreezing")
        assert (drawn[0][0] != drawn[0][1]) == moves, situation.name
        assert all(all(present) for present in drawn[0]) != moves, situation.name


def test_what_happens_between_steps_is_not_timed(bench, monkeypatch):
    timing = bench("timing")
    time, queue = [10.0], [1.0]
    monkeypatch.setattr(timing.SystemClock, "now", lambda self: time[0])
    monkeypatch.setattr(timing.SystemClock, "waited", lambda self: queue[0])
    clock = timing.PausingClock()

    def event():
        time[0] += 5
        queue[0] += 2

    clock.leave_out(event)
    assert (clock.now(), clock.waited()) == (10.0, 1.0)
    event()
    assert (clock.now(), clock.waited()) == (15.0, 3.0)


def test_known_broken_peers_are_named_with_the_reason(bench):
    """T01."""
    contest = bench("providers").Contest(
        bench("cases").Case("small", "", lambda: [(64,)], torch.bfloat16),
        "SGD", {"lr": 1e-6, "momentum": 0.9}, names=["fused_l2", "torch fused"],
    )  # fmt: skip
    assert "191763" in contest.absent["torch fused"]


def test_ratios_pair_round_by_round(bench):
    timing = bench("timing")
    a, b = timing.Samples([1.0, None, 2.0]), timing.Samples([2.0, 3.0, 8.0])
    assert timing.ratios(a, b) == [2.0, 4.0]
    assert timing.quartiles([1.0, 2.0, 3.0]) == (1.5, 2.0, 2.5)


def test_what_visits_differ_by_counts_as_noise(bench):
    """Twins that agree to 1 %, and a ratio of 2 in the first visit, of 3 in the second."""
    timing = bench("timing")

    def visit(ratio):
        ours = [1.0 + 0.001 * i for i in range(10)]
        return {
            "ours": timing.Samples(list(ours)), "again": timing.Samples([1.01 * s for s in ours]),
            "other": timing.Samples([ratio * s for s in ours]),
        }  # fmt: skip

    so_far = {}
    timing.joined(so_far, visit(2.0))
    assert timing.uncertainty(so_far, "ours", "again", "other") < 0.01
    samples = timing.joined(so_far, visit(3.0))
    assert timing.visits(samples["ours"], samples["other"]) == pytest.approx([2.0, 3.0])
    assert timing.uncertainty(samples, "ours", "again", "other") == pytest.approx(1 / 2.5)


class CountedClock:
    """Time that passes only when a contestant is called, with noise, slow drift and, now and then, a busy neighbour."""

    def __init__(self, seed, noise=0.04, busy=0.0):
        self.random = random.Random(seed)
        self.noise, self.busy = noise, busy
        self.time = self.queue = self.turn = 0.0

    def now(self):
        return self.time

    def waited(self):
        return self.queue

    def contestant(self, cost):
        def call():
            self.turn += 1
            drift = 1 + 0.3 * math.sin(self.turn / 200)
            spent = cost * drift * self.random.lognormvariate(0, self.noise)
            if self.random.random() < self.busy:  # another process has the core for as long again
                self.queue += spent
                spent *= 2
            self.time += spent

        return call


def ratio_of(timing, clock, first, second, rounds=31):
    samples = timing.interleave({"a": clock.contestant(first), "b": clock.contestant(second)}, 1e9, rounds, 5e-3, clock)
    taken = timing.ratios(samples["a"], samples["b"])
    return timing.quartiles(taken)[1], timing.noise_floor(taken)


def test_what_the_contestant_before_left_behind_decides_no_ratio(bench):
    """Right after "hog" the same call takes 20 % longer; in the list it would always stand before one of them."""
    timing = bench("timing")
    clock = CountedClock(0, noise=0.01)
    last = ""

    def caller(name, cost):
        call = clock.contestant(cost)

        def wrapped():
            nonlocal last
            clock.time += 0.2 * cost if last == "hog" else 0
            last = name
            call()

        return wrapped

    costs = {"a": 1e-3, "hog": 1e-2, "b": 1e-3, "c": 1e-3, "d": 1e-3, "e": 1e-3}
    contestants = {name: caller(name, cost) for name, cost in costs.items()}
    samples = timing.interleave(contestants, 1e9, 101, 1e-3, clock)  # one call a sample: no warm-up
    assert abs(timing.quartiles(timing.ratios(samples["a"], samples["b"]))[1] - 1) < 0.05


@pytest.mark.parametrize("rounds", [7, 31])
def test_the_same_contestant_twice_differs_by_less_than_the_noise_floor(bench, rounds):
    """In 95 % of the cases. 400 counted runs: a binomial of 0.95 stays above 0.95 - 3 sqrt(0.95 * 0.05 / 400) = 0.917."""
    timing = bench("timing")
    within = 0
    for seed in range(400):
        ratio, floor = ratio_of(timing, CountedClock(seed), 1e-3, 1e-3, rounds)
        within += abs(ratio - 1) <= floor
    assert within / 400 >= 0.917


def test_a_slowdown_of_10_percent_is_seen(bench):
    timing = bench("timing")
    seen = 0
    for seed in range(100):
        ratio, floor = ratio_of(timing, CountedClock(seed), 1.0e-3, 1.1e-3)
        assert ratio == pytest.approx(1.1, abs=0.05)
        seen += ratio - 1 > floor
    assert seen >= 99


def test_a_busy_neighbour_does_not_decide_a_ratio(bench):
    """With a core taken away in a twentieth of the calls the samples concerned are left out."""
    timing = bench("timing")
    ratios = [ratio_of(timing, CountedClock(seed, busy=0.05), 1e-3, 1.1e-3)[0] for seed in range(20)]
    assert all(ratio == pytest.approx(1.1, abs=0.06) for ratio in ratios)
    clock = CountedClock(0, busy=0.05)
    samples = timing.interleave({"a": clock.contestant(1e-3), "b": clock.contestant(1e-3)}, 1e9, 31, 5e-3, clock)
    assert any(s is None for s in samples["a"].seconds)


def test_a_machine_that_is_never_free_is_an_error(bench):
    timing = bench("timing")
    clock = CountedClock(0, busy=1.0)
    with pytest.raises(timing.BusyMachine, match="the machine is busy: 100% of the samples"):
        timing.interleave({"a": clock.contestant(1e-3)}, 0.1, 31, 5e-3, clock)
    timing.disturbance.counts = True
    samples = timing.interleave({"a": clock.contestant(1e-3)}, 0.1, 31, 5e-3, clock)
    assert samples["a"].kept == samples["a"].seconds


@needs_library
def test_a_busy_machine_is_refused_in_a_sentence_or_named_in_the_report(bench, monkeypatch, tmp_path, capsys):
    timing, out = bench("timing"), tmp_path / "results.json"
    monkeypatch.setattr(timing.SystemClock, "waited", timing.SystemClock.now)  # each second is one spent waiting
    arguments = ["clip", "--case", "one-64k", "--optimizer", "SGD", "--seconds", "0.02", "--json", str(out)]
    assert bench("cli").main(arguments) == 3
    captured = capsys.readouterr()
    assert captured.err.strip().splitlines() == [line for line in captured.err.splitlines() if "the machine is busy" in line]
    assert "--even-if-busy" in captured.err
    assert json.loads(out.read_text())["disturbed samples"] == {"share": 1.0, "count": False}
    assert bench("cli").main([*arguments, "--even-if-busy"]) == 0
    assert "MEASURED ON A BUSY MACHINE: 100% of the samples" in capsys.readouterr().out
    assert json.loads(out.read_text())["disturbed samples"] == {"share": 1.0, "count": True}


def test_comparison_names_what_became_slower(bench):
    compare = bench("compare")

    def run(ratio, noise):
        result = {"optimizer": "SGD", "case": "one-64k", "ratio": [ratio] * 3, "noise floor": noise}
        return {"machine": {"date": "2026-01-01", "cpu": "x"}, "results": {"clip": [result]}}

    assert "SLOWER" in compare.table(run(2.0, 0.01), run(1.8, 0.01))
    assert "SLOWER" not in compare.table(run(2.0, 0.1), run(1.8, 0.1))
    assert "faster" in compare.table(run(1.8, 0.01), run(2.0, 0.01))
    assert "nothing to compare" in compare.table({"results": []}, run(1, 0))


def test_the_fitted_line_is_the_line(bench):
    pytest.importorskip("triton")
    host = bench("host")
    results = [
        {"device": "cpu", "tensors": t, "groups": g, "microseconds": {"fused_l2": [0, 5 + 0.5 * t + 2 * g, 0]}}
        for t, g in host.SIZES
    ]
    fit = host.fitted(results, "cpu")
    assert [fit["constant"], fit["per tensor"], fit["per group"]] == pytest.approx([5, 0.5, 2])


def test_tables_of_the_docs_are_those_of_the_result_files(bench):
    tables = bench("tables")
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.MARKED.search(text)
        assert tables.rewritten(text) == text, f"{page.name}: run `python -m bench.tables`"


def test_figures_of_the_readme_are_those_of_the_result_files(bench):
    tables = bench("tables")
    results = tables.ROOT / "bench" / "results"
    decays = json.loads((results / "2026-11-26-intel-xeon-2cores-precision.json").read_text())["results"]["precision"]
    shares = next(r["shares"] for r in decays if r["kind"] == "decay" and r["lr"] == 3e-4 and r["noise"])
    dtensors = json.loads((results / "2026-11-26-intel-xeon-2cores-dtensor.json").read_text())["results"]["dtensor"]
    (times,) = (r["torch fused to ours"][1] for r in dtensors if r["tensors"] == 300)
    readme = (tables.ROOT / "README.md").read_text()
    for words in (
        f"{100 * shares['fused_l2 remainder'][-1]:.0f} % of the decay arrives with 2 bytes more a parameter",
        f"In torch's fused step {100 * shares['torch fused'][-1]:.0f} % does",
        f"in its default {100 * shares['torch for-loop'][-1]:.0f} %",
        f"is a {times:.0f}th of torch's AdamW",
    ):
        assert words in readme, words
    gpu = json.loads((results / "2026-11-26-nvidia-h100.json").read_text())["assumptions"]
    launch = f"A\nlaunch took this machine {gpu['host microseconds per launch']:.0f} microseconds"
    assert launch in (tables.ROOT / "docs" / "performance.md").read_text()


def test_the_report_is_one_page_with_its_pictures(bench, tmp_path):
    pytest.importorskip("matplotlib")
    tables = bench("tables")
    found = json.loads((tables.ROOT / "bench" / "results" / tables.MARKED.search(tables.PAGES[0].read_text())[3]).read_text())
    page = bench("report").write(found, tmp_path).read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "bandwidth.svg", "ratios.svg", "host.svg"}
    assert page.count("<svg") == 3
    assert "src=" not in page  # nothing from elsewhere
    assert "prefers-color-scheme: dark" in page
    assert "busy machine" not in page
    busy = bench("report").write({**found, "disturbed samples": {"share": 0.4, "count": True}}, tmp_path).read_text()
    assert "Measured on a busy machine: 40% of the samples" in busy
    assert "#123456" not in page
