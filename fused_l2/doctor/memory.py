"""What rounding makes of updates that remember each other, as those of a momentum do.

Numbers below a power of two are twice as dense as those above. Where updates are as small as the gaps, more of them arrives on
the dense side: weights wander faster there, and with a momentum they go on in the direction in which they came. So rounding
pulls weights towards 0 where there is no decay at all. With S the sum over k >= 1 of E[f(u_0) f(u_k)], f(u) being what arrives
of an update u on a grid of one gap, and n the number of weights per length, a stretch of one gap has a flow of -S dn/dx, which
integrates to -S n between its ends. What is left is the surrounding of each power: there the joint distribution of weight and
update is followed, step by step, until it remembers its beginning no more.

Weights come as they are, so that the number at each place is given and stays; only what the updates are there is followed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BELOW, _ABOVE = 48, 24  # numbers on both sides of a power of two
_NODES, _REACH = 65, 4.0  # values of an update that are told apart, up to so many standard deviations
_LEFT = 0.01  # how much of a memory is neglected
_STEPS = 300  # and how long one is followed at most
WIDE = 1.5  # an update whose standard deviation is so many gaps wide loses nothing
_NARROW = 0.1  # and none of one as small as this arrives


def remembered_fall(w: Tensor, start: Tensor, size: Tensor, rate: float, bits: int, memory: float) -> float:
    """By how much magnitudes fall at a step, in sum, besides what they would if updates knew nothing of those before.

    ``w``: magnitudes, float64, numbers of ``bits`` digits behind the point. ``start``: what updates are added to, ``rate``
    being what is taken of it in the same rounding. ``size``: the standard deviation of updates, of each weight or of all.
    ``memory``: their correlation from one step to the next.
    """
    if memory == 0:
        return 0.0
    smallest, largest = size.min().item(), size.max().item()
    powers = [
        2.0**e for e in range(-14, 5) if largest > _NARROW * 2.0 ** (e - bits - 1) and smallest < WIDE * 2.0 ** (e - bits)
    ]
    found = [place for power in powers if (place := _place(w, start, size, power, bits))]
    if not found:
        return 0.0
    numbers, starts, counts = (torch.stack(list(column)) for column in list(zip(*found, strict=True))[:3])
    sizes = [sigma for *_, sigma in found]
    fall = _fall_around(numbers, starts * (1 - rate), counts, torch.tensor(sizes, dtype=torch.float64), memory)
    lower, upper = (
        _density(numbers, counts, slice(_BELOW // 4, _BELOW // 4 * 3)),
        _density(numbers, counts, slice(-_ABOVE // 4 * 3, -_ABOVE // 4)),
    )
    for i, sigma in enumerate(sizes):
        below, above = float(numbers[i, 1] - numbers[i, 0]), float(numbers[i, -1] - numbers[i, -2])
        fall += remembered(below, sigma, memory) * lower[i] - remembered(above, sigma, memory) * upper[i]
    return fall


def _place(w: Tensor, start: Tensor, size: Tensor, power: float, bits: int) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """The numbers around a power of two, what updates are added to there, how many weights each has; the size of updates."""
    above = power * 2.0**-bits
    below = above / 2
    low, high = power - (_BELOW + 0.5) * below, power + (_ABOVE + 0.5) * above
    inside = (w > low) & (w < high)
    if not bool(inside.any()):
        return None
    sigma = float((size[inside] if size.numel() == w.numel() else size).square().mean().sqrt())
    if not _NARROW * below < sigma < WIDE * above:
        return None
    numbers = torch.cat([
        power - below * torch.arange(_BELOW, 0, -1, dtype=torch.float64, device=w.device),
        power + above * torch.arange(_ABOVE + 1, dtype=torch.float64, device=w.device),
    ])  # fmt: skip
    at = torch.bucketize(w[inside], (numbers[1:] + numbers[:-1]) / 2)
    counts = torch.bincount(at, minlength=len(numbers)).double()
    starts = numbers.clone()
    starts[at] = start[inside]  # one of a number is as all of it
    return numbers.cpu(), starts.cpu(), counts.cpu(), sigma


def _fall_around(numbers: Tensor, aim: Tensor, counts: Tensor, sizes: Tensor, memory: float) -> float:
    """The fall of the weights at these numbers, of all rows, at a step after so many that their beginning is forgotten."""
    rows, width = numbers.shape
    z = torch.linspace(-_REACH, _REACH, _NODES, dtype=torch.float64, device="cpu")
    chances = torch.exp(-z.square() / 2)
    chances /= chances.sum()
    turn = torch.exp(-(z[None] - memory * z[:, None]).square() / (2 * (1 - memory**2)))  # from an update to the next
    turn /= turn.sum(1, keepdim=True)
    # An update stands for those around it, of which some are rounded to one number and some to the next.
    edges = ((numbers[:, 1:] + numbers[:, :-1]) / 2).contiguous()
    half = (sizes * (z[1] - z[0]) / 2)[:, None]
    target = (aim[:, :, None] + sizes[:, None, None] * z).reshape(rows, -1)
    low, high = (torch.searchsorted(edges, target + side) for side in (-half, half))
    beyond = (target + half - edges.gather(1, (high - 1).clamp_min(0))) / (2 * half)
    share = torch.where(high > low, beyond, 0.0).clamp(0, 1)
    moved = numbers.gather(1, low) * (1 - share) + numbers.gather(1, high) * share - numbers.repeat_interleave(_NODES, 1)
    node = torch.arange(width * _NODES, device="cpu") % _NODES
    row = torch.arange(rows, device="cpu")[:, None] * width
    low, high = (((row + at) * _NODES + node).reshape(-1) for at in (low, high))
    share = share.reshape(-1)

    knows_nothing = counts[:, :, None] * chances
    # At the ends updates are taken to know nothing of the place; what they bring in is forgotten before it counts.
    inner = slice(_BELOW // 8, width - _ABOVE // 8)
    near = slice(_BELOW // 2, width - _ABOVE // 2)
    joint = knows_nothing
    for _ in range(min(_STEPS, math.ceil(math.log(_LEFT) / math.log(memory)))):
        held = joint.reshape(-1)
        after = torch.zeros_like(held).index_add_(0, low, held * (1 - share)).index_add_(0, high, held * share)
        after = after.view_as(joint)
        joint = knows_nothing.clone()
        given = after[:, inner] * (counts[:, inner] / after[:, inner].sum(2).clamp_min(1e-300))[:, :, None]
        joint[:, inner] = given @ turn
    return -float(((joint - knows_nothing) * moved.view_as(joint))[:, near].sum())


def _density(numbers: Tensor, counts: Tensor, where: slice) -> list[float]:
    """Weights per length of each row."""
    chosen = numbers[:, where]
    gaps = chosen[:, 1] - chosen[:, 0]
    densities: list[float] = (counts[:, where].sum(1) / (gaps * chosen.shape[1])).tolist()
    return densities


def remembered(gap: float, sigma: float, memory: float) -> float:
    """Sum over k >= 1 of E[f(u_0) f(u_k)] for normal u of correlation memory^k, f rounding to multiples of the gap.

    With the coefficients c_n of f in Hermite polynomials, E[f(u_0) f(u_k)] is the sum of c_n^2 memory^(k n) (Mehler).
    """
    if sigma > WIDE * gap:
        return sigma**2 * memory / (1 - memory)
    steps = [(j + 0.5) * gap / sigma for j in range(8) if (j + 0.5) * gap / sigma < 12]
    total, before, here = 0.0, [0.0] * len(steps), [1.0] * len(steps)  # He_{n-1}(t) / sqrt((n-1)!) at the edges t of f
    for n in range(1, 80):
        if n % 2:
            edges = sum(math.exp(-t * t / 2) * h for t, h in zip(steps, here, strict=True))
            coefficient = 2 * gap * edges / math.sqrt(2 * math.pi * n)
            total += coefficient**2 * memory**n / (1 - memory**n)
        after = [(t * h - math.sqrt(n - 1) * b) / math.sqrt(n) for t, h, b in zip(steps, here, before, strict=True)]
        before, here = here, after
    return total
