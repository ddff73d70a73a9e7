"""What L2 regularization and weight decay are, checked on autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fused_l2
from fused_l2.weight_decay import from_lambda

N, LAM, LR = 40, 3.0, 0.05


def problem(loss: str):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    if loss == "cross-entropy":
        return x, torch.randint(0, 3, (N,), generator=generator), nn.functional.cross_entropy
    return x, torch.randn(N, 3, generator=generator, dtype=torch.float64), nn.functional.mse_loss


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [m.weight for m in net if isinstance(m, nn.Linear)]


def close(a: nn.Module, b: nn.Module) -> bool:
    # 60 steps, each with a handful of float64 roundings that later steps carry on.
    return all(torch.allclose(p, q, rtol=1e-12, atol=1e-13) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch", [N, 8], ids=["full batch", "mini-batch"])
@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
def test_explicit_penalty_with_plain_sgd_equals_weight_decay(loss, batch, reduction):
    x, y, criterion = problem(loss)
    explicit, decayed = model(), model()
    lr = LR if reduction == "mean" else LR / N
    plain = torch.optim.SGD(explicit.parameters(), lr=lr)
    ours = fused_l2.SGD(
        fused_l2.weight_decay.param_groups(decayed, from_lambda(LAM, N, reduction)), lr=lr
    )  # biases stay out, as they do of the explicit penalty
    scale = 1 if reduction == "mean" else N  # mini-batches average the data term (or scale it up to n)
    for epoch in range(60 * batch // N):
        for chosen in torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).split(batch):
            plain.zero_grad()
            penalty = LAM / (2 * N) * sum(w.square().sum() for w in weights(explicit))
            (scale * (criterion(explicit(x[chosen]), y[chosen]) + penalty)).backward()
            plain.step()
            ours.zero_grad()
            (scale * criterion(decayed(x[chosen]), y[chosen])).backward()
            ours.step()
    assert close(explicit, decayed)


def test_without_momentum_l2_is_weight_decay():
    """w <- (1 - eta * lambda / n) w - eta * grad, whether the optimizer calls it coupled or decoupled."""
    p, q = (nn.Parameter(torch.linspace(-1, 1, 50, dtype=torch.float64)) for _ in range(2))
    grad = torch.sin(torch.arange(50, dtype=torch.float64))
    coupled = fused_l2.SGD([p], lr=LR, weight_decay=LAM / N)
    decoupled = fused_l2.SGD([q], lr=LR, weight_decay=LAM / N, decoupled_weight_decay=True)
    w = p.detach().clone()
    for _ in range(20):
        p.grad, q.grad = grad.clone(), grad.clone()
        coupled.step()
        decoupled.step()
        w = (1 - LR * LAM / N) * w - LR * grad
    assert torch.allclose(p, w, rtol=1e-14, atol=1e-15)
    assert torch.allclose(q, w, rtol=1e-14, atol=1e-15)


def test_with_momentum_the_two_differ():
    p, q = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    coupled = fused_l2.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.5)
    decoupled = fused_l2.SGD([q], lr=0.1, momentum=0.9, weight_decay=0.5, decoupled_weight_decay=True)
    for _ in range(10):
        p.grad, q.grad = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        coupled.step()
        decoupled.step()
    assert torch.allclose(q, torch.tensor([0.95**10], dtype=torch.float64), rtol=1e-14)
    assert (p - q).abs().item() > 0.1


def test_T47_coupled_adam_is_not_weight_decay_and_adamw_is_a_separate_shrink():
    """lr * wd of 0.05 and 40 steps, with and without gradients: what a wrong decay could hide behind smaller ones."""
    lr, wd = 0.1, 0.5
    for grad_scale in (0.0, 1.0):
        start = torch.linspace(-2, 2, 33, dtype=torch.float64)
        w = {name: nn.Parameter(start.clone()) for name in ("AdamW", "Adam", "shrunk")}
        adamw = fused_l2.AdamW([w["AdamW"]], lr=lr, weight_decay=wd)
        adam = fused_l2.Adam([w["Adam"]], lr=lr, weight_decay=wd)
        plain = torch.optim.Adam([w["shrunk"]], lr=lr)
        generator = torch.Generator().manual_seed(0)
        for _ in range(40):
            grad = grad_scale * torch.randn(33, generator=generator, dtype=torch.float64)
            for p in w.values():
                p.grad = grad.clone()
            adamw.step()
            adam.step()
            with torch.no_grad():
                w["shrunk"].mul_(1 - lr * wd)
            plain.step()
        assert torch.allclose(w["AdamW"], w["shrunk"], rtol=1e-12, atol=1e-13)
        assert (w["Adam"] - w["AdamW"]).abs().max() > 0.1
        if grad_scale == 0:
            assert torch.allclose(w["AdamW"], start * (1 - lr * wd) ** 40, rtol=1e-12, atol=0)


def test_coupled_decay_of_adam_hardly_depends_on_its_strength():
    """With no data gradient, Adam's moments divide the penalty's gradient by itself: wd of 0.01 or 1, the same step."""
    ends = []
    for wd in (0.01, 1.0):
        p = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = fused_l2.Adam([p], lr=0.01, weight_decay=wd)
        for _ in range(20):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        ends.append(p.item())
    assert abs(ends[0] - ends[1]) < 1e-4
    assert ends[0] < 0.9


def test_before_a_batch_norm_decay_changes_the_effective_learning_rate_not_the_function():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)).double()
    x = torch.randn(64, 6, dtype=torch.float64)
    before = net(x)
    with torch.no_grad():
        net[0].weight.mul_(0.5)
    # The batch norm's eps of 1e-5 against variances of order 0.1 is all that is left of the factor.
    assert torch.allclose(net(x), before, atol=1e-3)
    optimizer = fused_l2.SGD(net[0].parameters(), lr=0.1, weight_decay=0.01)
    (reported,) = fused_l2.weight_decay.normalized_weights(net, optimizer)
    assert reported.name == "0.weight"
    assert reported.normalization == "1"
    assert reported.effective_lr == pytest.approx(0.1 / net[0].weight.detach().square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_the_code_of_the_note_with_only_the_import_changed(optimizer):
    def train(optim):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
        if optimizer == "SGD":
            opt = optim.SGD(net.parameters(), lr=0.1, weight_decay=1e-4)
        else:
            decay = [p for p in net.parameters() if p.ndim >= 2]
            no_decay = [p for p in net.parameters() if p.ndim < 2]
            opt = optim.AdamW([{"params": decay, "weight_decay": 1e-2}, {"params": no_decay, "weight_decay": 0.0}], lr=1e-3)
        x, y = torch.randn(128, 20), torch.randint(0, 2, (128,))
        losses = []
        for _ in range(30):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            opt.step()
            losses.append(loss.item())
        return losses

    ours, theirs = train(fused_l2), train(torch.optim)
    assert ours[-1] < ours[0]
    if optimizer == "SGD":
        assert ours == theirs
    else:
        # torch.sqrt may be an ulp off: 30 steps of lr 1e-3, each within 1e-7 of the other, on a smooth loss.
        assert ours == pytest.approx(theirs, rel=1e-5)


def quadratic():
    """A Hessian in a rotated basis, its eigenvalues, and the minimum of the data loss."""
    h = torch.tensor([3.0, 1.0, 0.2, 0.05], dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    return basis @ torch.diag(h) @ basis.T, h, basis, torch.randn(4, dtype=torch.float64)


def trained(hessian, best, optimizer, w):
    for _ in range(4000):
        w.grad = (hessian @ (w - best)).detach()
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_l2_shrinks_each_eigen_direction_by_h_over_h_plus_lambda_over_n(momentum):
    hessian, h, basis, best = quadratic()
    w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    decay = from_lambda(20.0, 100)
    found = trained(hessian, best, fused_l2.SGD([w], lr=0.1, momentum=momentum, weight_decay=decay), w)
    shrunk = h / (h + decay) * (basis.T @ best)
    # A step shrinks an error in the slowest direction by 0.1 * (0.05 + 0.2) = 1/40, so those of 40 steps add up; a step rounds
    # a handful of times, by half an ulp of at most 4.
    assert torch.allclose(basis.T @ found, shrunk, rtol=0, atol=40 * 8 * 2.0**-52)


def test_decoupled_decay_of_adamw_does_not():
    hessian, h, basis, best = quadratic()
    w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    decay = from_lambda(20.0, 100)
    found = trained(hessian, best, fused_l2.AdamW([w], lr=1e-2, weight_decay=decay), w)
    assert not torch.allclose(basis.T @ found, h / (h + decay) * (basis.T @ best), rtol=0, atol=1e-2)


X, Y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
A = 0.7  # the strength in each convention


def mean_of_squares(w):
    return (X @ w - Y).square().mean()


@pytest.mark.parametrize(
    ("loss", "scale", "decay"),
    [
        (lambda w: mean_of_squares(w) + A / (2 * 12) * w.square().sum(), 1, A / 12),
        (lambda w: 12 * mean_of_squares(w) + A / 2 * w.square().sum(), 12, A),
        (lambda w: mean_of_squares(w) + A / 2 * w.square().sum(), 1, A),
        (lambda w: mean_of_squares(w) + A * w.square().sum(), 1, 2 * A),  # Keras
        (lambda w: (X @ w - Y).square().sum() + A * w.square().sum(), 1, 2 * A / 12),  # scikit-learn's Ridge
        (lambda w: w.square().sum() / 2 + A * (X @ w - Y).square().sum(), 1, 1 / (A * 12)),  # C of LogisticRegression
    ],
    ids=["mean, lambda/2n", "sum, lambda/2", "mean, lambda/2", "Keras", "Ridge", "C"],
)
def test_losses_and_the_weight_decay_they_mean(loss, scale, decay):
    """The minimum of the whole loss is the one that the data term, in our scale, and the decay lead to."""
    zero = torch.zeros(3, dtype=torch.float64)
    gradient, hessian = torch.func.grad(loss)(zero), torch.func.hessian(loss)(zero)
    minimum = -torch.linalg.solve(hessian, gradient)  # of a quadratic
    data = torch.func.grad(lambda w: scale * mean_of_squares(w))(minimum)
    assert torch.allclose(data + decay * minimum, zero, atol=1e-12)
