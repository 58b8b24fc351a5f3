"""Integers with a float16 scale for each group of a row: what GPTQ checkpoints and ONNX's MatMulNBits hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgekit.grids import Grid
from edgekit.grids._search import Best, divide, dot, fit_affine, half, normalise, solve_scale
from edgekit.grids.legacy import Legacy

_ROUNDS = 2


def integer_grid(bits: int, group: int, symmetric: bool) -> Grid:
    """As `edgekit.grids.integer_grid`."""
    if symmetric:
        return Legacy(f"int{bits}-g{group}", bits, zero=1 << (bits - 1), block=group)
    return Zeroed(bits, group)


@dataclass(frozen=True)
class Zeroed:
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
        step, least = fit_affine(x, w, self._top, signed=True)
        near = divide(-least, step).round()
        best = Best()
        for shift in (-1, 0, 1):
            zero = (near + shift).clamp_(1, self._top)
            # a minimum far from zero is out of reach: the range then has to hold zero
            scale = torch.where((near < 1) | (near > self._top), x.abs().amax(-1, keepdim=True) / self._top, step)
            for _ in range(_ROUNDS + 1):
                scales = torch.cat([half(scale), zero], -1)
                codes = self.snap(x, scales, 0)
                best.offer(dot(w, (x - self.values(codes, scales, 0)).square_()), scales)
                scale = solve_scale(x, w, codes.float() - zero)
        return best.kept[0]

    def refit(self, columns: Tensor, importance: Tensor, scales: Tensor, start: int) -> Tensor:
        """As `Grid.refit`: the group is the block, so that nothing is shared."""
        return self.fit(columns, importance)

    def snap(self, columns: Tensor, scales: Tensor, start: int) -> Tensor:
        """As `Grid.snap`."""
        unit = divide(columns, scales[:, :1]).round_() + scales[:, 1:]
        return unit.clamp_(0, self._top).to(torch.uint8)

    def values(self, codes: Tensor, scales: Tensor, start: int) -> Tensor:
        """As `Grid.values`."""
        return (codes.float() - scales[:, 1:]) * scales[:, :1]

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1
