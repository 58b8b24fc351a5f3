"""ggml's k-quants: blocks of 256 weights in groups of 16 or 32, with integer sub-scales under one float16 scale."""

from __future__ import annotations

from dataclasses import dataclass

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
from edgekit.grids.line import Line, Linear

_BLOCK = 256
_ROUNDS = 2
_STEPS = (0, -1, 1)
"""Candidates of a sub-scale, beside the nearest integer."""


@dataclass(frozen=True)
class Affine(Linear):
    """In group g a code c stands for (d * s_g) * c - dmin * m_g. Scales: (d, dmin, s_0.., m_0..)."""

    name: str
    bits: int
    group: int
    scale_bits: int
    block: int = _BLOCK

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.block // self.group

    @property
    def bytes_per_block(self) -> int:
        """As `Grid.bytes_per_block`."""
        return 4 + (2 * self.groups * self.scale_bits + self.block * self.bits) // 8

    def fit(self, weights: Tensor, importance: Tensor) -> Tensor:
        """As `Grid.fit`."""
        shape = (self.groups, self.group)
        x, w = weights.unflatten(-1, shape), normalise(importance, weights).unflatten(-1, shape)
        a, b = self._fit_groups(x, w)
        d, dmin = a.amax(-2, keepdim=True) / self._most, -b.amin(-2, keepdim=True) / self._most
        best = Best()
        for _ in range(_ROUNDS):
            d, dmin = half(d), half(dmin)
            s, m, codes, error = self._choose(x, w, a, b, d, dmin)
            best.offer(error.sum(-2), torch.cat([d, dmin, s, m], -2).squeeze(-1))
            whole = (t.flatten(-2)[:, None] for t in (x, w, s * codes, (-m).expand_as(codes)))
            d, dmin = _solve_pair(*whole)
        return best.kept[0]

    def refit(self, columns: Tensor, importance: Tensor, scales: Tensor, start: int) -> Tensor:
        """As `Grid.refit`."""
        x, w = columns[:, None], normalise(importance, columns)[:, None]
        d, dmin = scales[:, 0, None, None], scales[:, 1, None, None]
        s, m, _, _ = self._choose(x, w, *self._fit_groups(x, w), d, dmin)
        place = 2 + start // self.group
        scales = scales.clone()
        scales[:, place], scales[:, place + self.groups] = s[:, 0, 0], m[:, 0, 0]
        return scales

    def line(self, scales: Tensor, start: int, count: int) -> Line:
        """As `Grid.line`."""
        groups = _groups(start, count, self.group, scales.device)
        step, least = scales[:, 2 + groups], scales[:, 2 + self.groups + groups]
        return Line(scales[:, :1] * step, -(scales[:, 1:2] * least), 0, self._top)

    def pack(self, codes: Tensor, scales: Tensor) -> Tensor:
        """As `Grid.pack`."""
        ends, s, m = scales.split([2, self.groups, self.groups], -1)
        s, m = s.to(torch.uint8), m.to(torch.uint8)
        if self.bits == 2:
            return torch.cat([s | m << 4, _planes(codes, 2), half_bytes(ends)], -1)
        sub = torch.cat(
            [s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | m[:, 4:] << 4], -1
        )
        pairs = codes.unflatten(-1, (4, 2, 32))
        low = (pairs[:, :, 0] & 15 | pairs[:, :, 1] << 4).flatten(-2)
        high = [_bits(codes.unflatten(-1, (8, 32)) >> 4, 1)] if self.bits == 5 else []
        return torch.cat([half_bytes(ends), sub, *high, low], -1)

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1

    @property
    def _most(self) -> int:
        return (1 << self.scale_bits) - 1

    def _fit_groups(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        a, b = fit_affine(x, w, self._top, signed=False)
        levels = divide(x - b, a).round_().clamp_(0, self._top)
        return solve_affine(x, w, levels, signed=False)

    def _choose(
        self, x: Tensor, w: Tensor, a: Tensor, b: Tensor, d: Tensor, dmin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return s, m (..., groups, 1), the codes and the error of each group under given d and dmin."""
        sw = w.sum(-1, keepdim=True)
        nearest = divide(a, d).round_()
        best = Best()
        for step in _STEPS:
            s = (nearest + step).clamp_(0, self._most)
            scaled = d * s
            codes = divide(x - b, scaled).round_().clamp_(0, self._top)
            mean = dot(w, scaled * codes - x) / sw
            m = divide(mean, dmin).round_().clamp_(0, self._most)
            shifted = x + dmin * m
            codes = divide(shifted, scaled).round_().clamp_(0, self._top)
            best.offer(dot(w, (shifted - scaled * codes).square_()), s, m, codes)
        assert best.error is not None
        s, m, codes = best.kept
        return s, m, codes, best.error


@dataclass(frozen=True)
class Signed(Linear):
    """In group g a code c stands for (d * s_g) * (c - zero), s_g signed. Scales: (d, s_0..)."""

    name: str
    bits: int
    scale_bits: int
    group: int = 16
    block: int = _BLOCK

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.block // self.group

    @property
    def bytes_per_block(self) -> int:
        """As `Grid.bytes_per_block`."""
        return 2 + (self.groups * self.scale_bits + self.block * self.bits) // 8

    def fit(self, weights: Tensor, importance: Tensor) -> Tensor:
        """As `Grid.fit`."""
        shape = (self.groups, self.group)
        x, w = weights.unflatten(-1, shape), normalise(importance, weights).unflatten(-1, shape)
        a = self._fit_groups(x, w)
        d = a.gather(-2, a.abs().argmax(-2, keepdim=True)) / -self._most
        best = Best()
        for _ in range(_ROUNDS):
            d = half(d)
            s, levels, error = self._choose(x, w, a, d)
            best.offer(error.sum(-2), torch.cat([d, s], -2).squeeze(-1))
            d = solve_scale(x.flatten(-2), w.flatten(-2), (s * levels).flatten(-2))[:, None]
        return best.kept[0]

    def refit(self, columns: Tensor, importance: Tensor, scales: Tensor, start: int) -> Tensor:
        """As `Grid.refit`."""
        x, w = columns[:, None], normalise(importance, columns)[:, None]
        s, _, _ = self._choose(x, w, self._fit_groups(x, w), scales[:, 0, None, None])
        scales = scales.clone()
        scales[:, 1 + start // self.group] = s[:, 0, 0]
        return scales

    def line(self, scales: Tensor, start: int, count: int) -> Line:
        """As `Grid.line`."""
        step = scales[:, :1] * scales[:, 1 + _groups(start, count, self.group, scales.device)]
        return Line(step, None, -self._zero, self._zero - 1, self._zero)

    def pack(self, codes: Tensor, scales: Tensor) -> Tensor:
        """As `Grid.pack`."""
        d, s = half_bytes(scales[:, :1]), scales[:, 1:].to(torch.int8).view(torch.uint8)
        if self.bits == 6:
            quarters = codes.unflatten(-1, (2, 4, 32))
            low = (quarters[:, :, :2] & 15 | quarters[:, :, 2:] << 4).flatten(1)
            return torch.cat([low, _planes(codes >> 4, 2), s, d], -1)
        s = s + 32
        low = s[:, :8] & 15 | s[:, 8:] << 4
        sub = torch.cat([low, _bits((s >> 4).unflatten(-1, (4, 4)), 2)], -1)
        return torch.cat([_bits(codes.unflatten(-1, (8, 32)) >> 2, 1), _planes(codes & 3, 2), sub, d], -1)

    @property
    def _zero(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def _most(self) -> int:
        return 1 << (self.scale_bits - 1)

    def _nearest(self, x: Tensor) -> Tensor:
        return x.round_().clamp_(-self._zero, self._zero - 1)

    def _fit_groups(self, x: Tensor, w: Tensor) -> Tensor:
        a = fit_scale(x, w, self._nearest, -self._zero, self._zero - 1)
        return solve_scale(x, w, self._nearest(divide(x, a)))

    def _choose(self, x: Tensor, w: Tensor, a: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return s (..., groups, 1), the levels and the error of each group under a given d."""
        nearest = divide(a, d).round_()
        best = Best()
        for step in _STEPS:
            s = (nearest + step).clamp_(-self._most, self._most - 1)
            levels = self._nearest(divide(x, d * s))
            best.offer(dot(w, (x - d * s * levels).square_()), s, levels)
        assert best.error is not None
        s, levels = best.kept
        return s, levels, best.error


GRIDS = {
    grid.name: grid
    for grid in (
        Affine("Q2_K", 2, group=16, scale_bits=4),
        Signed("Q3_K", 3, scale_bits=6),
        Affine("Q4_K", 4, group=32, scale_bits=6),
        Affine("Q5_K", 5, group=32, scale_bits=6),
        Signed("Q6_K", 6, scale_bits=8),
    )
}
"""The grids of this file by name."""


def _groups(start: int, count: int, group: int, device: torch.device) -> Tensor:
    """Groups of columns; one where all are of the same, whose step they then share."""
    if start % group + count <= group:
        return torch.tensor([start // group], device=device)
    return torch.arange(start, start + count, device=device) // group


def _solve_pair(x: Tensor, w: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the d and e, neither below zero, that minimise the sum of w * (x - d * u - e * v)^2."""
    uu, uv, vv, xu, xv = dot(w, u, u), dot(w, u, v), dot(w, v, v), dot(w, x, u), dot(w, x, v)
    d = divide(xu * vv - xv * uv, uu * vv - uv * uv)
    d = torch.where(d > 0, d, divide(xu, uu))
    return d, divide(xv - d * uv, vv).clamp_min_(0)


def _bits(rows: Tensor, width: int) -> Tensor:
    """Put element i of dimension 1 at bit `width` * i of a byte: (rows, 8 / width, n) -> (rows, n)."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=rows.device)
    return (rows << shifts[:, None]).sum(1, dtype=torch.uint8)


def _planes(codes: Tensor, width: int) -> Tensor:
    """Pack two bits a code: in each 128 codes, code i goes to byte i % 32 at bit 2 * (i // 32)."""
    return _bits(codes.unflatten(-1, (2, 4, 32)).flatten(0, 1), width).view(codes.shape[0], -1)
