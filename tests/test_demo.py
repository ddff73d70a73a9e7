"""The demo says what the theory says, with three seeds instead of ten."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

import fused_l2
from fused_l2 import demo
from fused_l2.weight_decay import from_lambda


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    for package in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("demo")
    found = demo.run(seeds=3, out=out)
    assert (out / "weight_decay.png").stat().st_size > 10_000
    return found


def means(runs, field):
    return {lam: demo.mean_and_error(found, field)[0] for lam, found in runs.items()}


def digits(seed):
    datasets = pytest.importorskip("sklearn.datasets")
    import torch

    loaded = datasets.load_digits()
    images, labels = torch.tensor(loaded.data, dtype=torch.float32) / 16, torch.tensor(loaded.target)
    return demo.digits(images, labels, demo.SIZES[0], seed)


@pytest.fixture(scope="module")
def data():
    return digits(0)


def test_lambda_that_validation_chooses_helps_on_test_images(results):
    for key in (*(("SGD", n) for n in demo.SIZES), ("AdamW", demo.SIZES[0])):
        runs = results[key]
        best = demo.chosen(runs)
        assert 0 < best < max(runs), key  # within the grid
        (with_it, error), (without, other) = (demo.mean_and_error(runs[lam], "test") for lam in (best, 0.0))
        # With three seeds what AdamW gains is no more than their spread.
        assert with_it - without > (error + other if key[0] == "SGD" else 0), key


def test_weights_shrink_as_lambda_grows(results):
    for key, runs in results.items():
        norms = list(means(runs, "norm").values())
        assert norms == sorted(norms, reverse=True), key


def test_doubling_n_at_fixed_lambda_halves_weight_decay():
    assert from_lambda(0.3, 2 * demo.SIZES[0]) == from_lambda(0.3, demo.SIZES[0]) / 2


def test_the_penalty_reported_is_that_of_the_weights(results):
    for lam, runs in results["SGD", demo.SIZES[0]].items():
        for run in runs:
            assert run.penalty == pytest.approx(lam / (2 * demo.SIZES[0]) * run.norm**2, rel=1e-5)


def test_the_penalty_in_the_loss_is_weight_decay(data):
    # 200 steps, each with a handful of float64 roundings of weights below 1.
    assert demo.explicit_penalty(data, lam=3.0) < 200 * 8 * 2.0**-53


def test_decay_keeps_the_effective_learning_rate_of_a_normalized_weight_up(data):
    without, strong = demo.effective_lrs(data, 0.0, epochs=30), demo.effective_lrs(data, 1e-2, epochs=30)
    assert strong[-1] > 1.1 * without[-1]


def test_decay_arrives_in_bfloat16_with_the_remainder_alone():
    shares = {name: demo.bfloat16_decay(name, False, steps=200) for name in demo.BFLOAT16}
    assert shares.pop("fused_l2, low_precision='remainder'") == pytest.approx(1, abs=0.05)  # the last weights' own rounding
    assert len(shares) == 3
    assert not any(shares.values())


def test_normal_gradients_carry_a_part_of_the_decay_in_bfloat16():
    """Less where torch rounds the decay on its own, the same where it is rounded once."""
    shares = {name: demo.bfloat16_decay(name, True, steps=1000) for name in demo.BFLOAT16}
    assert shares["fused_l2, low_precision='remainder'"] == pytest.approx(1, abs=0.05)
    assert 0.2 < shares["torch default"] < 0.5 < shares["fused_l2"] < 0.9
    assert shares["torch fused=True"] == pytest.approx(shares["fused_l2"], abs=0.05)


@pytest.mark.parametrize("name", list(demo.OPTIMIZERS))
def test_training_ends_in_torch_s_bits_where_its_sqrt_is_correctly_rounded(data, name):
    import torch

    ours = demo.train(data, fused_l2, name, 1.0, 0, epochs=20).params
    with demo.correctly_rounded_sqrt():
        theirs = demo.train(data, torch.optim, name, 1.0, 0, epochs=20).params
    assert demo.differing(ours, theirs)[:2] == (0.0, 0)


def test_readme_shows_what_the_demo_prints(data):
    """Accuracies to their errors: other processors round otherwise. Bits to the bit."""
    lambdas = (0.0, 1.0, 3.0, 10.0)  # without those that validation is far from choosing
    with demo.for_small_networks():
        runs = {lam: [demo.train(digits(s), fused_l2, "SGD", lam, s) for s in range(10)] for lam in lambdas}
        printed = [*demo.report("SGD", runs, demo.SIZES[0]).splitlines(), *demo.bits("SGD", data), *demo.bits("AdamW", data)]
    (shown,) = re.findall(r"```text\n(SGD, n = .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    choice, accuracy, _, *bits = shown.splitlines()
    assert printed[0] == choice
    (now, _, now_without, _), (said, error, said_without, other) = (
        map(float, re.findall(r"\d\.\d+", line)) for line in (printed[1], accuracy)
    )
    assert abs(now - said) <= error
    assert abs(now_without - said_without) <= other
    assert re.sub(r"\d\.\d+", "", printed[1]) == re.sub(r"\d\.\d+", "", accuracy)
    assert set(bits) < set(printed)


def test_a_missing_extra_is_named_with_the_command(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    monkeypatch.setattr("sys.argv", ["demo"])
    with pytest.raises(SystemExit) as exit:
        demo.main()
    assert exit.value.code == 1
    assert "pip install '.[demo]'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_said_before_the_training(monkeypatch, tmp_path, capsys):
    for package in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(demo, "train", None)
    monkeypatch.setattr("sys.argv", ["demo", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as exit:
        demo.main()
    assert exit.value.code == 2
    assert f"--out {tmp_path / 'file'} is no folder" in capsys.readouterr().err


def test_one_seed_has_no_error():
    run = demo.Run(0.5, 0.6, 0.7, 1.0, 2.0, [])
    printed = demo.table("SGD", {0.0: [run]}, 100).split()
    assert printed[printed.index("0.700") + 1] == "-"
    assert demo.table("SGD", {0.0: [run]}, 100).startswith("SGD, n = 100: one seed\n")
    assert "+-" not in demo.report("SGD", {0.0: [run]}, 100)
    assert "n = 100: mean over 2 seeds, +- its standard error\n" in demo.table("SGD", {0.0: [run, run]}, 100)
    assert "Test accuracy 0.700 +- 0.000;" in demo.report("SGD", {0.0: [run, run]}, 100)


def test_a_lambda_at_the_end_of_the_grid_is_said():
    bad, good = (demo.Run(0.5, accuracy, 0.7, 1.0, 2.0, []) for accuracy in (0.6, 0.7))
    assert "end of the grid" in demo.report("SGD", {0.0: [bad], 1.0: [bad], 3.0: [good]}, 100)
    assert "end of the grid" not in demo.report("SGD", {0.0: [bad], 1.0: [good], 3.0: [bad]}, 100)


def test_help_says_what_is_printed_and_how_long_it_takes(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo", "--help"])
    with pytest.raises(SystemExit):
        demo.main()
    shown = capsys.readouterr().out
    assert "`" not in shown
    assert [line.split()[0] for line in shown.splitlines()[-2:]] == ["Prints", "Takes"]
