"""Rounding a weight matrix onto a grid with error feedback.

The first pass is GPTQ (Frantar et al., arXiv:2210.17323): columns in turn are snapped to the grid, and what a column
lost is made up for in the columns to come. Its loss is the sum over columns of (error / u_jj)^2, where u is the upper
Cholesky factor of the inverse Hessian: so 1 / u_jj^2 is the importance that scales are fitted under. Columns with large
activations go first, as far as blocks and their groups stay whole: no container has to store the order.

Then sweeps: one group at a time is solved again, scales and codes, with all others fixed as they are rounded, and taken
over in the rows where the loss becomes less (block coordinate descent; with groups of one column it would be QuantEase,
Behdin et al., arXiv:2309.01885).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from edgekit.errors import InputError
from edgekit.grids import BlockGrid, Grid

_CHUNK = 1 << 24
"""Weights that are worked on at once: rows do not depend on each other."""
_SMALL = 128
_LEAST = 1e-6
"""The least activation that damping supposes, as a part of the mean: some columns never see any."""


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid."""

    codes: Tensor
    """uint8 (out, in)."""
    scales: Tensor
    """float32 (blocks, out, k), as `Grid.fit` gives them for each block."""
    matrix: Tensor
    """What they stand for: float32 (out, in)."""
    losses: Tensor
    """The diagonal of E H E^T, float32 (out, 1), E the error of the weights: each output's mean squared error."""
    order: Tensor | None = None
    """int64 (in,): the column of the blocks that each input is, where that is not its own."""

    @property
    def loss(self) -> float:
        """Their sum."""
        return float(self.losses.sum(dtype=torch.float64))

    def cpu(self) -> Rounded:
        """The same on the CPU."""
        moved = {part.name: getattr(self, part.name) for part in fields(self)}
        return Rounded(**{name: tensor if tensor is None else tensor.cpu() for name, tensor in moved.items()})

    def split(self, sizes: Sequence[int]) -> list[Rounded]:
        """The matrices that this one is, one after the other along the outputs."""
        rows = (tensor.split(sizes) for tensor in (self.codes, self.matrix, self.losses))
        parts = zip(*rows, self.scales.split(sizes, 1), strict=True)
        return [Rounded(codes, scales, matrix, losses, self.order) for codes, matrix, losses, scales in parts]

    def pack(self, grid: BlockGrid) -> Tensor:
        """Bytes as the file holds them: uint8 (out, blocks * bytes_per_block)."""
        blocks = self.codes.split(grid.block, 1)
        return torch.cat([grid.pack(codes, scales) for codes, scales in zip(blocks, self.scales, strict=True)], 1)


@dataclass(frozen=True)
class Metric:
    """A Hessian and its damping, to round several matrices in: what depends on neither weights nor scales is kept."""

    hessian: Tensor
    """(in, in), the mean of x x^T over calibration tokens."""
    damping: float
    """What is added to each h of the diagonal, as a part of sqrt(h * their mean).

    GPTQ adds the same to all, which a few channels with huge activations make too much for the others."""
    _known: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    _weights: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def ordered(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """The order of work for such blocks, and in it the damped Hessian and the factor of its inverse, float32."""
        shape = (grid.block, grid.group)
        if shape not in self._known:
            order = _order(self.hessian.diagonal(), grid)
            damped = (self.hessian + self._added().diag())[order][:, order]
            self._known[shape] = order, damped.float(), _inverse_factor(damped).float()
        return self._known[shape]

    def weights(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """For such blocks, by the column of the matrix: its importance in `Grid.fit`, and what its squared error loses
        once the columns after it make up for it; float32 (in,)."""
        shape = (grid.block, grid.group)
        if shape not in self._weights:
            order, _, factor = self.ordered(grid)
            importance = factor.diagonal() ** -2
            # errors e of columns leave e / diagonal(u) @ u in the weights, and u (H + D) u^T is 1: damping D is no loss
            lost = (1 - factor.square() @ self._added()[order].float()).clamp_min(0) * importance
            back = order.argsort()
            self._weights[shape] = importance[back], lost[back]
        return self._weights[shape]

    def _added(self) -> Tensor:
        diagonal = self.hessian.diagonal()
        mean = diagonal.mean()
        share = self.damping * (diagonal.clamp_min(_LEAST * mean) * mean).sqrt()
        # a matrix that no calibration token reached is rounded to the nearest
        return torch.where(mean > 0, share, 1.0)


def round_matrix(weight: Tensor, metric: Metric, grid: Grid, *, sweeps: int = 1, act_order: bool = False) -> Rounded:
    """Round `weight` onto `grid` so that its outputs change little.

    Args:
        weight: (out, in) float32.
        metric: of its inputs, on the same device.
        grid: the format; its blocks run along the inputs.
        sweeps: how often every group is solved again after the first pass.
        act_order: make blocks of inputs with like activations, in falling order; the container has to store it.

    Raises:
        InputError: blocks do not divide the inputs, the values are not finite, or the Hessian is not positive definite.
    """
    hessian = metric.hessian
    _check(weight, hessian, grid)
    if act_order:
        falling = hessian.diagonal().argsort(descending=True, stable=True)
        moved = Metric(hessian[falling][:, falling], metric.damping)
        found = round_matrix(weight[:, falling], moved, grid, sweeps=sweeps)
        place = falling.argsort()
        return replace(found, codes=found.codes[:, place], matrix=found.matrix[:, place], order=place)
    order, damped, factor = metric.ordered(grid)
    back = order.argsort()
    codes, scales, matrix = [], [], []
    for rows in weight.split(max(1, _CHUNK // len(order))):
        work = _Work(rows[:, order], damped, factor, grid, order.tolist())
        work.first_pass()
        for _ in range(sweeps):
            work.sweep()
        codes.append(work.codes[:, back])
        scales.append(torch.stack(work.scales))
        matrix.append(work.matrix[:, back])
    rounded = torch.cat(matrix)
    return Rounded(torch.cat(codes), torch.cat(scales, 1), rounded, row_losses(weight - rounded, hessian))


def expected_losses(weight: Tensor, metric: Metric, grid: Grid) -> Tensor:
    """Return what outputs lose by the first pass of `round_matrix`, float32 (out,), without its walk over columns.

    A column that makes up for others is taken to be rounded as badly as its own weights are, and errors not to depend
    on each other. Arguments are those of `round_matrix`.
    """
    _check(weight, metric.hessian, grid)
    importance, lost = (of_column.view(-1, grid.block).repeat(len(weight), 1) for of_column in metric.weights(grid))
    blocks = weight.reshape(-1, grid.block)
    _, _, values = _nearest(blocks, importance, grid)
    return ((blocks - values).square_() * lost).view(weight.shape).sum(1)


def usual_damping(inputs: int, tokens: int) -> float:
    """Damping that does best on unseen text, for second moments of so many inputs over so many tokens.

    Measured on SmolLM2-135M (576 and 1536 inputs, 512 to 8192 tokens, prose and code): 0.1 at 8192 tokens, 0.25 at
    2048, 0.5 at 512. An entry of the second moments is off by about the root of what is taken here.
    """
    return 0.4 * math.sqrt(inputs / tokens)


def round_nearest(weight: Tensor, grid: Grid) -> Rounded:
    """Round each block of `weight` float32 (out, in) by itself: for a table that is looked up, not multiplied."""
    even = torch.ones(grid.block, device=weight.device)
    blocks = [_nearest(block, even, grid) for block in weight.split(grid.block, 1)]
    codes, scales, values = zip(*blocks, strict=True)
    matrix = torch.cat(values, 1)
    return Rounded(torch.cat(codes, 1), torch.stack(scales), matrix, (weight - matrix).square().sum(1, keepdim=True))


def _nearest(blocks: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and values of blocks (rows, block), every weight rounded to the nearest."""
    scales = grid.fit(blocks, importance)
    codes = grid.snap(blocks, scales, 0)
    return codes, scales, grid.values(codes, scales, 0)


def proxy_loss(error: Tensor, hessian: Tensor) -> float:
    """Return tr(E H E^T) for the error (out, in) of a weight matrix."""
    return float(row_losses(error, hessian.to(error.dtype)).sum(dtype=torch.float64))


def row_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """Return the diagonal of E H E^T, shape (out, 1): what each output loses."""
    return ((error @ hessian) * error).sum(1, keepdim=True)


class _Work:
    """Rows being rounded. Columns are in the order of work, `scales` by the block's place in the matrix."""

    def __init__(self, weight: Tensor, metric: Tensor, factor: Tensor, grid: Grid, places: list[int]) -> None:
        self.grid = grid
        self.weight, self.metric, self.factor = weight, metric, factor
        self.places = places
        """Of each column in the matrix."""
        self.matrix = torch.zeros_like(weight)
        self.codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
        self.scales = [weight] * (weight.shape[1] // grid.block)
        self.factors: dict[int, Tensor] = {}
        """Of each group alone, by the position of its first column."""

    def first_pass(self) -> None:
        """Round all columns, each made up for in those after it."""
        grid, factor = self.grid, self.factor
        importance = factor.diagonal() ** -2
        targets = self.weight.clone()
        for at in range(0, len(self.places), grid.group):
            here, rest = slice(at, at + grid.group), slice(at + grid.group, None)
            place = self.places[at] // grid.block
            begins = at % grid.block == 0
            if begins:
                back = self._back(at, grid.block)
                self.scales[place] = grid.fit(targets[:, back], importance[back])
            self.scales[place], codes, values, errors = self._round(
                at, targets[:, here], factor[here, here], refit=not begins
            )
            self.codes[:, here], self.matrix[:, here] = codes, values
            targets[:, rest].addmm_(errors, factor[here, rest], alpha=-1)

    def sweep(self) -> None:
        """Solve every group again with all others fixed."""
        grid = self.grid
        gradient = (self.weight - self.matrix) @ self.metric
        for at in range(0, len(self.places), grid.group):
            here = slice(at, at + grid.group)
            metric, old = self.metric[here, here], self.matrix[:, here]
            if at not in self.factors:
                self.factors[at] = _inverse_factor(metric).to(metric.dtype)
            factor = self.factors[at]
            # where the loss is least over all real values of this group
            target = old + gradient[:, here] @ factor.T @ factor
            scales, codes, values, _ = self._round(at, target, factor, refit=True)
            better = row_losses(target - values, metric) < row_losses(target - old, metric)
            place = self.places[at] // grid.block
            self.scales[place] = torch.where(better, scales, self.scales[place])
            self.codes[:, here] = torch.where(better, codes, self.codes[:, here])
            values = torch.where(better, values, old)
            gradient.addmm_(values - old, self.metric[here], alpha=-1)
            self.matrix[:, here] = values

    def _back(self, at: int, count: int) -> list[int]:
        """Positions of `count` columns from `at`, sorted by their place in the matrix."""
        return sorted(range(at, at + count), key=self.places.__getitem__)

    def _round(self, at: int, x: Tensor, factor: Tensor, *, refit: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Round the group at position `at` to columns `x` (out, group), feeding errors forward within it.

        Returns the block's scales, and the codes, values and scaled errors of the group.
        """
        grid = self.grid
        place = self.places[at] // grid.block
        offsets = [column - place * grid.block for column in self.places[at : at + grid.group]]
        scales = self.scales[place]
        if refit:
            back = [position - at for position in self._back(at, grid.group)]
            scales = grid.refit(x[:, back], factor.diagonal()[back] ** -2, scales, min(offsets))
        line = grid.line(scales, min(offsets), 1)
        # columns are worked on one by one: each lies together
        x = x.T.contiguous().T
        levels, values, errors = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        columns = zip(x.split(1, 1), levels.split(1, 1), values.split(1, 1), errors.split(1, 1), strict=True)
        scaled = (factor / factor.diagonal()[:, None]).contiguous()
        for j, (column, level, value, error) in enumerate(columns):
            line.values(line.nearest(column, level), value)
            torch.sub(column, value, out=error)
            x[:, j + 1 :].addr_(error[:, 0], scaled[j, j + 1 :], alpha=-1)
        return scales, line.codes(levels), values, errors.div_(factor.diagonal())


def _order(diagonal: Tensor, grid: Grid) -> Tensor:
    """Return columns by falling activations: blocks, groups within their block, columns within their group."""
    energy = diagonal.unflatten(0, (-1, grid.block // grid.group, grid.group))
    columns = torch.arange(len(diagonal), device=diagonal.device).view(energy.shape)
    columns = columns.gather(2, energy.argsort(dim=2, descending=True, stable=True))
    groups = energy.sum(2).argsort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, groups[:, :, None].expand(columns.shape))
    return columns[energy.sum((1, 2)).argsort(descending=True, stable=True)].flatten()


def _inverse_factor(metric: Tensor) -> Tensor:
    """Return the upper triangular u with u^T u = metric^-1, float64."""
    # with the order of rows and columns reversed, the lower factor of the metric becomes its upper one
    lower, failed = torch.linalg.cholesky_ex(metric.double().flip(0, 1))
    if failed:
        raise InputError("a positive definite Hessian", "one that is not", "raise the damping")
    return _inverse(lower.flip(0, 1))


def _inverse(upper: Tensor) -> Tensor:
    """Return the inverse of an upper triangular matrix, by halves: a third of the work of a solver that sees a full
    right-hand side."""
    n = len(upper)
    if n <= _SMALL:
        identity = torch.eye(n, dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, identity, upper=True)
    half = n // 2
    first, last = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    found = torch.zeros_like(upper)
    found[:half, :half], found[half:, half:] = first, last
    found[:half, half:] = -(first @ (upper[:half, half:] @ last))
    return found


def _check(weight: Tensor, hessian: Tensor, grid: Grid) -> None:
    columns = weight.shape[1]
    if columns % grid.block:
        raise InputError(
            f"rows of a multiple of {grid.block} weights for {grid.name}", f"{columns}", "choose a format of 32 weights"
        )
    if hessian.shape != (columns, columns):
        raise ValueError(f"a Hessian of {columns} columns, not {tuple(hessian.shape)}")
    for name, values in (("weights", weight), ("activations", hessian)):
        if not values.isfinite().all():
            raise InputError(f"finite {name}", "infinities or values that are no numbers", "check the checkpoint")
