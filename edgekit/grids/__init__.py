"""What weights may become: block formats as grids, and error-feedback rounding onto them (`edgekit.grids.solver`).

A grid is a small pure object: the blocks of one format, how their scales are fitted, and what codes stand for. It holds
no data. GGUF keeps the codes and scales of a block together, and its grids make their bytes; checkpoints and ONNX keep
them in tensors of their own (`edgekit.grids.containers`). Tensors go in and come out on the device they are on.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

from edgekit.errors import InputError, suggest

if TYPE_CHECKING:
    from torch import Tensor

    from edgekit.grids.line import Line

BITS = (2, 3, 4, 8)
"""Of the integers that GPTQ checkpoints hold."""
NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Every grid that `find_grid` knows: types of GGUF."""
_INTEGERS = re.compile(r"int(\d)-g([1-9]\d{0,4})(-zeros)?")


class Grid(Protocol):
    """A block format.

    A block is `block` columns of a matrix's input dimension. Its stored scales are float32 (rows, k), whatever their
    type in the file; its codes are uint8, one per weight.
    """

    @property
    def name(self) -> str:
        """The format's name, e.g. `Q4_K`."""
        ...

    @property
    def block(self) -> int:
        """Columns that are stored together."""
        ...

    @property
    def group(self) -> int:
        """Columns that share one step: `block`, or a part of it where a block holds sub-scales."""
        ...

    def fit(self, weights: Tensor, importance: Tensor) -> Tensor:
        """Return the scales (rows, k) as they will be stored, fitted to `weights` float32 (rows, block).

        They minimise the sum of importance * (weight - value)^2 as far as a search finds it. `importance` is positive,
        (block,) or (rows, block).
        """
        ...

    def refit(self, columns: Tensor, importance: Tensor, scales: Tensor, start: int) -> Tensor:
        """Return `scales` with those of one group fitted again, under what the groups of the block share.

        `columns` (rows, group) begin at column `start` of the block, a multiple of `group`.
        """
        ...

    def line(self, scales: Tensor, start: int, count: int) -> Line:
        """Return what codes of `count` columns from `start` of the block stand for; columns of a group share it."""
        ...

    def snap(self, columns: Tensor, scales: Tensor, start: int) -> Tensor:
        """Return the codes nearest to `columns` (rows, n), which begin at column `start` of the block."""
        ...

    def values(self, codes: Tensor, scales: Tensor, start: int) -> Tensor:
        """Return what codes (rows, n) stand for, float32, to the bit as the format's reference computes it."""
        ...


class BlockGrid(Grid, Protocol):
    """A grid of a file format that keeps a block's codes and scales together."""

    @property
    def bytes_per_block(self) -> int:
        """Bytes of a block of one row."""
        ...

    def pack(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the bytes, uint8 (rows, bytes_per_block), of codes (rows, block) and their scales."""
        ...


def integer_grid(bits: int, group: int, *, symmetric: bool = True) -> Grid:
    """Return the grid of integers with a float16 scale for each group of a row, and a zero point unless `symmetric`.

    A code c stands for scale * (c - zero), the zero of symmetric grids being 2^(bits - 1). Raises InputError.
    """
    if bits not in BITS or group < 1:
        raise InputError(f"integers of {', '.join(map(str, BITS))} bits in groups", f"{bits} bits, {group}", "--set")
    from edgekit.grids import integers

    return integers.integer_grid(bits, group, symmetric)


def integer_parts(name: str) -> tuple[int, int, bool]:
    """Bits, weights of a block and whether there are zero points, of `int4-g32` or `int4-g32-zeros`.

    Raises InputError for another name.
    """
    found = _INTEGERS.fullmatch(name)
    if found is None:
        raise InputError("a grid of integers, as int4-g32", repr(name), "choose one")
    return int(found[1]), int(found[2]), bool(found[3])


def grid_name(text: str) -> str:
    """Return the name of a grid as the grid has it: a GGUF type, `int4-g32` or `int4-g32-zeros`. Raises InputError."""
    found = _INTEGERS.fullmatch(text)
    if found and int(found[1]) in BITS:
        return text
    known = {name.lower(): name for name in NAMES}
    if text.lower() not in known:
        raise InputError(
            f"a format to round onto: {', '.join(NAMES)}, int4-g32, int4-g32-zeros",
            f"{text!r}{suggest(text.upper(), NAMES)}",
            "choose one of them",
        )
    return known[text.lower()]


def open_grid(name: str) -> Grid:
    """Return the grid of that name. Raises InputError."""
    name = grid_name(name)
    if _INTEGERS.fullmatch(name):
        bits, block, zeros = integer_parts(name)
        return integer_grid(bits, block, symmetric=not zeros)
    return find_grid(name)


def find_grid(name: str) -> BlockGrid:
    """Return the grid of a GGUF type, `name` in any case. Raises InputError where there is none."""
    from edgekit.grids import kquants, legacy

    grids = {**legacy.GRIDS, **kquants.GRIDS}
    name = grid_name(name)
    if name not in grids:
        raise InputError(f"a type of GGUF: {', '.join(NAMES)}", repr(name), "choose one of them")
    return grids[name]
