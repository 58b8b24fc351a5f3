"""ggml's formats of 32 weights a block: one scale, or a scale and a minimum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgekit.grids._search import (
    Best,
    dot,
    fit_affine,
    fit_scale,
    half,
    half_bytes,
    normalise,
    refit_affine,
    refit_scale,
    solve_affine,
    solve_scale,
)
from edgekit.grids.line import Line, Linear

_ROUNDS = 3


@dataclass(frozen=True)
class Legacy(Linear):
    """A code c stands for d * level(c), or d * level(c) + m. Scales: (d,) or (d, m), float16."""

    name: str
    bits: int
    zero: int = 0
    """level(c) is c - zero, where there is no table."""
    table: tuple[int, ...] = ()
    """level(c) by code."""
    lowest: int = 0
    """The least code in use: Q8_0 leaves -128 out, as ggml does."""
    minimum: bool = False
    """Whether there is an m."""
    block: int = 32

    @property
    def group(self) -> int:
        """As `Grid.group`."""
        return self.block

    @property
    def bytes_per_block(self) -> int:
        """As `Grid.bytes_per_block`."""
        return 2 * (1 + self.minimum) + self.bits * self.block // 8

    def fit(self, weights: Tensor, importance: Tensor) -> Tensor:
        """As `Grid.fit`."""
        x, w = weights, normalise(importance, weights)
        if self.minimum:
            return self._settle(x, w, torch.cat(fit_affine(x, w, self._top, signed=True), -1))
        unit = self._unit(x)
        return self._settle(x, w, fit_scale(x, w, unit.round_, float(unit.low), float(unit.high)))

    def refit(self, columns: Tensor, importance: Tensor, scales: Tensor, start: int) -> Tensor:
        """As `Grid.refit`: the group is the block, so that nothing is shared."""
        x, w = columns, normalise(importance, columns)
        if self.minimum:
            return self._settle(x, w, torch.cat(refit_affine(x, w, self._top, scales[:, :1], scales[:, 1:]), -1))
        return self._settle(x, w, refit_scale(x, w, self._unit(x).round_, scales))

    def _settle(self, x: Tensor, w: Tensor, scales: Tensor) -> Tensor:
        """Least squares and nearest levels in turns; the best of what the file can store."""
        best = Best()
        for _ in range(_ROUNDS):
            scales = half(scales)
            line = self.line(scales, 0, self.block)
            levels = line.nearest(x)
            best.offer(dot(w, (x - line.values(levels)).square_()), scales)
            if self.minimum:
                scales = torch.cat(solve_affine(x, w, levels, signed=True), -1)
            else:
                scales = solve_scale(x, w, levels)
        return best.kept[0]

    def _unit(self, like: Tensor) -> Line:
        return self.line(like.new_ones(1, 1), 0, 1)

    def line(self, scales: Tensor, start: int, count: int) -> Line:
        """As `Grid.line`."""
        low, high = (self.table[0], self.table[-1]) if self.table else (self.lowest - self.zero, self._top - self.zero)
        return Line(scales[:, :1], scales[:, 1:] if self.minimum else None, low, high, self.zero, self.table)

    def pack(self, codes: Tensor, scales: Tensor) -> Tensor:
        """As `Grid.pack`."""
        if self.bits == 8:
            return torch.cat([half_bytes(scales), codes ^ 0x80], -1)
        first, second = codes.chunk(2, -1)
        low = (first & 15) | (second & 15) << 4
        if self.bits == 4:
            return torch.cat([half_bytes(scales), low], -1)
        bits = (codes >> 4).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8, device=codes.device)
        return torch.cat([half_bytes(scales), bits.sum(-1, dtype=torch.uint8), low], -1)

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1


GRIDS = {
    grid.name: grid
    for grid in (
        Legacy("Q4_0", 4, zero=8),
        Legacy("Q4_1", 4, minimum=True),
        Legacy("Q5_0", 5, zero=16),
        Legacy("Q5_1", 5, minimum=True),
        Legacy("Q8_0", 8, zero=128, lowest=1),
        Legacy("IQ4_NL", 4, table=(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)),
    )
}
"""The grids of this file by name."""
