"""Integers with a float16 scale for each group of a row: what GPTQ checkpoints and ONNX's MatMulNBits hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgekit.grids import Grid
from edgekit.grids._search import Best, divide, dot, fit_affine, half, normalise, refit_affine, solve_scale
from edgekit.grids.legacy import Legacy
from edgekit.grids.line import Line, Linear

_ROUNDS = 2


def integer_grid(bits: int, group: int, symmetric: bool) -> Grid:
    """As `edgekit.grids.integer_grid`."""
    if symmetric:
        return Legacy(f"int{bits}-g{group}", bits, zero=1 << (bits - 1), block=group)
    return Zeroed(bits, group)


@dataclass(frozen=True)
class Zeroed(Linear):
    """A code c stands for scale * (c - zero). Scales: (scale, zero), the zero from 1: GPTQ stores it less 1."""

    bits: int
    block: int

    @property
    def name(self) -> str:
        """As `Grid.name`."""
        return f"int{self.bits}-g{self.block}-zeros"

    @property
    def group(self) -> int:
        """As `Grid.group`."""
        return self.block

    def fit(self, weights: Tensor, importance: Tensor) -> Tensor:
        """As `Grid.fit`: a real minimum first, then the zeros around it."""
        x, w = weights, normalise(importance, weights)
        return self._settle(x, w, *fit_affine(x, w, self._top, signed=True))

    def refit(self, columns: Tensor, importance: Tensor, scales: Tensor, start: int) -> Tensor:
        """As `Grid.refit`: the group is the block, so that nothing is shared."""
        x, w = columns, normalise(importance, columns)
        scale, zero = scales[:, :1], scales[:, 1:]
        return self._settle(x, w, *refit_affine(x, w, self._top, scale, -scale * zero))

    def _settle(self, x: Tensor, w: Tensor, step: Tensor, least: Tensor) -> Tensor:
        """Least squares and nearest levels in turns for each zero; the best of what is stored."""
        near = divide(-least, step).round()
        best = Best()
        for shift in (-1, 0, 1):
            zero = (near + shift).clamp_(1, self._top)
            # a minimum far from zero is out of reach: the range then has to hold zero
            scale = torch.where((near < 1) | (near > self._top), x.abs().amax(-1, keepdim=True) / self._top, step)
            for _ in range(_ROUNDS + 1):
                scales = torch.cat([half(scale), zero], -1)
                line = self.line(scales, 0, self.block)
                levels = line.nearest(x)
                best.offer(dot(w, (x - line.values(levels)).square_()), scales)
                scale = solve_scale(x, w, levels)
        return best.kept[0]

    def line(self, scales: Tensor, start: int, count: int) -> Line:
        """As `Grid.line`."""
        zero = scales[:, 1:]
        return Line(scales[:, :1], None, -zero, self._top - zero, zero)

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1
