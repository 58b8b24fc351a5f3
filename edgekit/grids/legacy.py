"""ggml's formats of 32 weights a block: one scale, or a scale and a minimum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from edgekit.grids._search import (
    Best,
    divide,
    dot,
    fit_affine,
    fit_scale,
    half,
    half_bytes,
    normalise,
    solve_affine,
    solve_scale,
)

_ROUNDS = 3


@dataclass(frozen=True)
class Legacy:
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
            scales = torch.cat(fit_affine(x, w, self._top, signed=True), -1)
        else:
            low, high = (float(self._levels(torch.tensor(code))) for code in (self.lowest, self._top))
            scales = fit_scale(x, w, lambda unit: self._levels(self._codes(unit)), low, high)
        best = Best()
        for _ in range(_ROUNDS):
            scales = half(scales)
            codes = self.snap(x, scales, 0)
            best.offer(dot(w, (x - self.values(codes, scales, 0)).square_()), scales)
            levels = self._levels(codes)
            if self.minimum:
                scales = torch.cat(solve_affine(x, w, levels, signed=True), -1)
            else:
                scales = solve_scale(x, w, levels)
        return best.kept[0]

    def refit(self, columns: Tensor, importance: Tensor, scales: Tensor, start: int) -> Tensor:
        """As `Grid.refit`: the group is the block, so that nothing is shared."""
        return self.fit(columns, importance)

    def snap(self, columns: Tensor, scales: Tensor, start: int) -> Tensor:
        """As `Grid.snap`."""
        if self.minimum:
            columns = columns - scales[:, 1:]
        return self._codes(divide(columns, scales[:, :1]))

    def values(self, codes: Tensor, scales: Tensor, start: int) -> Tensor:
        """As `Grid.values`."""
        scaled = self._levels(codes) * scales[:, :1]
        return scaled + scales[:, 1:] if self.minimum else scaled

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

    def _codes(self, unit: Tensor) -> Tensor:
        if self.table:
            _, codes = _lookup(self.table, unit.device)
            halves = (unit * 2).floor_().clamp_(2 * self.table[0], 2 * self.table[-1])
            return codes.take(halves.sub_(2 * self.table[0]).long())
        return (unit.round() + self.zero).clamp_(self.lowest, self._top).to(torch.uint8)

    def _levels(self, codes: Tensor) -> Tensor:
        if self.table:
            return _lookup(self.table, codes.device)[0].take(codes.long())
        return codes.float() - self.zero


@cache
def _lookup(table: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the table, and the codes nearest to what lies between two halves: thresholds are halves."""
    levels = torch.tensor(table, dtype=torch.float32, device=device)
    halves = torch.arange(2 * table[0], 2 * table[-1] + 1, device=device) / 2
    return levels, torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2, right=True).to(torch.uint8)


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
