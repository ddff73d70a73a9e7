"""The demo says what the theory says, with three seeds instead of ten."""

from __future__ import annotations

import statistics

import pytest

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
    return {lam: statistics.mean(getattr(r, field) for r in found) for lam, found in runs.items()}


def test_accuracy_is_best_at_some_lambda_above_zero(results):
    test = means(results["SGD"], "test_accuracy")
    assert max(test, key=test.get) > 0
    assert means(results["SGD"], "train_accuracy")[0.0] == 1.0  # without regularization it overfits
    assert test[0.0] < 0.95


def test_weights_shrink_as_lambda_grows(results):
    for name, runs in results.items():
        norms = list(means(runs, "norm").values())
        assert norms == sorted(norms, reverse=True), name


def test_doubling_n_at_fixed_lambda_halves_weight_decay():
    assert from_lambda(0.3, 2 * demo.N) == from_lambda(0.3, demo.N) / 2


def test_the_penalty_reported_is_that_of_the_weights(results):
    for lam, runs in results["SGD"].items():
        for run in runs:
            assert run.penalty == pytest.approx(lam / (2 * demo.N) * run.norm**2, rel=1e-5)


def test_sgd_ends_in_torchs_bits(results, tmp_path):
    import torch
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    theirs = {0.3: [demo.train(images, labels, torch.optim, "SGD", 0.3, 0, demo.EPOCHS)]}
    ours = {0.3: [demo.train(images, labels, __import__("fused_l2"), "SGD", 0.3, 0, demo.EPOCHS)]}
    assert demo.largest_difference(ours, theirs)[:2] == (0.0, 0)
