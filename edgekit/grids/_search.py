"""Searching scales: candidates, then least squares in turns with nearest codes (Lloyd's iteration).

Everything works on the last dimension; what comes before it is batch. Scales keep that dimension with size 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SMALLEST = 2.0**-40
"""Steps below it are zero: a float16 times a sub-scale cannot be so small."""
_LARGEST_HALF = 65504.0
_REACHES = (0.9, 0.94, 0.97, 1.0, 1.03, 1.06, 1.1, 1.15, 1.2, 1.28, 1.38, 1.5)
"""Candidates of a scale: where the largest weight falls, as a part of the outermost level; beyond 1 it is cut."""
_NEAR = (1.0, 0.97, 1.03, 0.94, 1.06)
_SHIFTS = (0.0, -0.4, 0.4)
_SPANS = (1.03, 1.01, 0.99, 0.97, 0.94, 0.91, 0.87, 0.82, 0.75)
"""Candidates of a scale with a minimum: the part of the weights' range that the codes span."""
_ANCHORS = (0.0, 0.5, 1.0)
"""And how much of the rest lies below them."""


def half(x: Tensor) -> Tensor:
    """Round to what float16 stores, without infinities."""
    return x.clamp(-_LARGEST_HALF, _LARGEST_HALF).half().float()


def half_bytes(x: Tensor) -> Tensor:
    """Bytes (rows, 2 k), little endian, of values (rows, k) that float16 holds exactly."""
    return x.half().contiguous().view(torch.uint8)


def divide(x: Tensor, by: Tensor) -> Tensor:
    """Divide, with zero where the divisor is as good as zero."""
    return x * torch.where(by.abs() > _SMALLEST, by.reciprocal(), 0.0)


def normalise(importance: Tensor, like: Tensor) -> Tensor:
    """Expand importance to the shape of the weights, with mean 1 in every row."""
    importance = importance.expand_as(like)
    return importance / importance.mean(-1, keepdim=True)


def dot(*factors: Tensor) -> Tensor:
    """Sum the products over the last dimension, which is kept."""
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product.sum(-1, keepdim=True)


class Best:
    """The tensors with the least error so far, for every batch element by itself."""

    def __init__(self) -> None:
        self.error: Tensor | None = None
        self.kept: tuple[Tensor, ...] = ()

    def offer(self, error: Tensor, *tensors: Tensor) -> None:
        """Keep these where their error is less than that of what was kept."""
        if self.error is None:
            self.error, self.kept = error, tensors
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.kept = tuple(torch.where(better, new, old) for new, old in zip(tensors, self.kept, strict=True))


def solve_scale(x: Tensor, w: Tensor, levels: Tensor) -> Tensor:
    """Return the s that minimises the sum of w * (x - s * level)^2."""
    wl = w * levels
    return divide(dot(wl, x), dot(wl, levels))


def solve_affine(x: Tensor, w: Tensor, levels: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the a >= 0 and b that minimise the sum of w * (x - a * level - b)^2; b <= 0 unless `signed`."""
    wl = w * levels
    sw, sx, sl = w.sum(-1, keepdim=True), dot(w, x), wl.sum(-1, keepdim=True)
    mean_x, mean_l = sx / sw, sl / sw
    sll, sxl = dot(wl, levels), dot(wl, x)
    a = divide(sxl - sl * mean_x, sll - sl * mean_l).clamp_min_(0)
    b = mean_x - a * mean_l
    if signed:
        return a, b
    return torch.where(b > 0, divide(sxl, sll).clamp_min_(0), a), b.clamp_max(0)


def fit_scale(x: Tensor, w: Tensor, nearest: Callable[[Tensor], Tensor], low: float, high: float) -> Tensor:
    """Return the scale s, of either sign, that minimises the sum of w * (x - s * level)^2.

    Args:
        x: the weights, (..., n).
        w: their importance.
        nearest: makes elements, in units of the scale, the levels nearest to them, in place.
        low: the least level, below zero.
        high: the greatest level.
    """
    unit = divide(x, x.gather(-1, x.abs().argmax(-1, keepdim=True)))
    ends = (low, high) if low != -high else (high,)
    return _best_scale(x, w, nearest, unit, [end * reach for reach in _REACHES for end in ends])


def refit_scale(x: Tensor, w: Tensor, nearest: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
    """As `fit_scale`, near a scale that is good already."""
    return _best_scale(x, w, nearest, divide(x, scale), _NEAR)


def _best_scale(
    x: Tensor, w: Tensor, nearest: Callable[[Tensor], Tensor], unit: Tensor, factors: Sequence[float]
) -> Tensor:
    """Of the scales that are best for the levels nearest to `unit` times each factor, the best.

    A scale that is best for its levels leaves the sum of w * x^2 less s times that of w * x * level.
    """
    best, wx = Best(), w * x
    for factor in factors:
        levels = nearest(unit * factor)
        along = dot(wx, levels)
        s = divide(along, dot(w * levels, levels))
        best.offer(-s * along, s)
    return best.kept[0]


def fit_affine(x: Tensor, w: Tensor, top: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the (a, b), a >= 0, that minimise the sum of w * (x - a * q - b)^2 over integers q in 0..top.

    Args:
        x: the weights, (..., n).
        w: their importance.
        top: the largest code.
        signed: whether b may be above zero.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if not signed:
        low = low.clamp_max(0)
    unit = divide(x - low, high - low) * top
    best = Best()
    for span in _SPANS:
        for anchor in _ANCHORS:
            levels = (unit - (1 - span) * anchor * top).div_(span).round_().clamp_(0, top)
            a, b = solve_affine(x, w, levels, signed=signed)
            best.offer(dot(w, (x - a * levels).sub_(b).square_()), a, b)
    return best.kept[0], best.kept[1]


def refit_affine(x: Tensor, w: Tensor, top: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """As `fit_affine` with `signed`, near a pair that is good already."""
    unit, best = divide(x - b, a), Best()
    for factor in _NEAR[:3]:
        for shift in _SHIFTS:
            levels = (unit * factor).add_(shift).round_().clamp_(0, top)
            pair = solve_affine(x, w, levels, signed=True)
            best.offer(dot(w, (x - pair[0] * levels).sub_(pair[1]).square_()), *pair)
    return best.kept[0], best.kept[1]
