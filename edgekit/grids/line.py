"""What codes stand for, column by column: all formats here are straight lines, or tables on one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from edgekit.grids._search import divide


@dataclass(frozen=True)
class Line:
    """Values `step * level + offset` of some columns; a level is a code less `zero`, or what a table has for it.

    Tensors have shape (rows, 1), or (rows, n) where columns differ.
    """

    step: Tensor
    offset: Tensor | None
    low: float | Tensor
    """The least level."""
    high: float | Tensor
    zero: float | Tensor = 0.0
    table: tuple[int, ...] = ()
    """Levels by code, rising; levels are integers without one."""

    @cached_property
    def inverse(self) -> Tensor:
        """Levels for a unit of value; 0 where a step is as good as zero."""
        return divide(torch.ones_like(self.step), self.step)

    def nearest(self, columns: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the levels nearest to `columns`, as floats."""
        if self.offset is not None:
            columns = columns - self.offset
        return self.round_(torch.mul(columns, self.inverse, out=out))

    def round_(self, unit: Tensor) -> Tensor:
        """Make the levels nearest to what is in units of the step, in place."""
        if not self.table:
            return unit.round_().clamp_(self.low, self.high)
        halves = (unit * 2).floor_().clamp_(2 * self.table[0], 2 * self.table[-1])
        return unit.copy_(_by_halves(self.table, unit.device).take(halves.sub_(2 * self.table[0]).long()))

    def values(self, levels: Tensor, out: Tensor | None = None) -> Tensor:
        """Return what levels stand for, to the bit as the format's reference computes it."""
        scaled = torch.mul(levels, self.step, out=out)
        return scaled if self.offset is None else scaled.add_(self.offset)

    def codes(self, levels: Tensor) -> Tensor:
        """Return the codes, uint8, of levels."""
        if self.table:
            return torch.bucketize(levels.contiguous(), levels.new_tensor(self.table)).to(torch.uint8)
        return (levels + self.zero).to(torch.uint8)

    def levels(self, codes: Tensor) -> Tensor:
        """Return the levels, float32, of codes."""
        if self.table:
            return torch.tensor(self.table, dtype=torch.float32, device=codes.device).take(codes.long())
        return codes.float() - self.zero


class Linear:
    """`snap` and `values` of a grid that has a `line`."""

    def line(self, scales: Tensor, start: int, count: int) -> Line:
        """As `Grid.line`."""
        raise NotImplementedError

    def snap(self, columns: Tensor, scales: Tensor, start: int) -> Tensor:
        """As `Grid.snap`."""
        line = self.line(scales, start, columns.shape[-1])
        return line.codes(line.nearest(columns))

    def values(self, codes: Tensor, scales: Tensor, start: int) -> Tensor:
        """As `Grid.values`."""
        line = self.line(scales, start, codes.shape[-1])
        return line.values(line.levels(codes))


@cache
def _by_halves(table: tuple[int, ...], device: torch.device) -> Tensor:
    """The level nearest to what lies between two halves, from twice the least on: thresholds are halves."""
    levels = torch.tensor(table, dtype=torch.float32, device=device)
    halves = torch.arange(2 * table[0], 2 * table[-1] + 1, device=device) / 2
    return levels.take(torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2, right=True))
