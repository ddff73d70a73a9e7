"""The benchmark's method: shapes, correctness gate, ratios. No clock is asserted."""

from __future__ import annotations

import importlib
import json
import math
import sys

import pytest
import torch
from conftest import ROOT, needs_library


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    yield importlib.import_module("bench.run")
    for name in [n for n in sys.modules if n == "bench" or n.startswith("bench.")]:
        del sys.modules[name]


def test_shapes_have_the_published_numbers_of_parameters(bench):
    counts = {c.name: (sum(map(math.prod, c.shapes)), len(c.shapes)) for c in bench.CASES}
    assert counts["gpt2-small"] == (124_439_808, 148)
    assert counts["resnet50"] == (25_557_032, 161)
    assert counts["tiny-1000"][1] == 1000
    assert counts["mlp-40"] == (1_000_000, 40)
    cases = importlib.import_module("bench.cases")
    assert sum(map(math.prod, cases.llama_7b())) == 6_738_415_616
    vit = cases.vit_b()
    assert (sum(map(math.prod, vit)), len(set(cases.layer_decay_groups(vit)))) == (86_567_656, 28)


@needs_library
def test_one_case_runs_and_writes_json(bench, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert bench.main(["--case", "one-64k", "--seconds", "0.3", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "torch fused" in printed
    assert "wrong" not in printed
    results = json.loads(out.read_text())
    assert {r["optimizer"] for r in results["results"]} == {"AdamW", "SGD"}
    assert results["results"][0]["rows"]["torch fused"]["ratio_to_torch_fused"][1] == 1.0


def test_the_gpu_report_goes_through_without_a_gpu(bench, tmp_path, capsys):
    """The script for a GPU machine, in a dry run: every case, every provider, what it writes."""
    report = importlib.import_module("bench.gpu_report")
    out = tmp_path / "report.json"
    assert report.main(["--dry-run", "--no-tests", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert [r["case"] for r in written["results"] if r["optimizer"] == "AdamW"] == [c.name for c in report.GPU_CASES]
    assert written["not measured"] == []
    assert written["machine"]["gpu"].startswith("none")
    assert all(v == "ok" for r in written["results"] for v in r["correct"].values())
    assert report.GATES.keys() <= {c.name for c in report.GPU_CASES}
    assert "AdamW, one tensor of 1e9" in capsys.readouterr().out


def test_the_correctness_gate_catches_a_wrong_decay(bench):
    class Wrong(torch.optim.AdamW):
        def __init__(self, params, lr, weight_decay):
            super().__init__(params, lr=lr, weight_decay=0.9 * weight_decay)

    class Module:
        AdamW = Wrong

    bench.providers.PROVIDERS["wrong"] = (Module, {})
    verdicts = bench.providers.correct("AdamW", {"weight_decay": 1e-2}, torch.float32)
    assert verdicts["wrong"].startswith("wrong")
    assert verdicts["fused_l2"] == verdicts["torch fused"] == "ok"


def test_ratios_pair_round_by_round(bench):
    timing = bench.timing
    a, b = timing.Samples([1.0, None, 2.0]), timing.Samples([2.0, 3.0, 8.0])
    assert timing.ratios(a, b) == [2.0, 4.0]
    assert timing.quartiles([1.0, 2.0, 3.0]) == (1.5, 2.0, 2.5)
