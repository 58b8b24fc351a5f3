"""The state of one sequence as llama.cpp writes it (`llama_state_seq_get_data` of llama-cpp-python 0.3.36).

llama.cpp checks types, row sizes, layers and the length of what it reads, but takes positions as they come, and
asserts on some. So the whole is walked here first: it must hold one sequence at the positions 0, 1, 2...

Layout, little-endian: magic, sequence, then for each cache: streams (1), cells; for each cell its position, how many
sequences (1) and which; whether values lie transposed, layers; for each layer the type, bytes of a row and rows of
keys; for each layer the same of values, or, transposed, the type, bytes of an element, width, and columns.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import NoReturn

from edgekit.errors import InputError

MAGIC = 0xAF143CD8
MAX_LAYERS = 1 << 12


@dataclass(frozen=True)
class Block:
    """Keys or values of one layer: bytes `offset` to `offset + nbytes` of the state."""

    offset: int
    nbytes: int
    type: int
    """ggml's number of the element type."""


@dataclass(frozen=True)
class Cache:
    """One of the caches of a state; a model with sliding windows has two."""

    keys: tuple[Block, ...]
    """By layer; a row per position."""
    values: tuple[Block, ...]
    """By layer; a row per position, or a row per dimension where transposed."""
    transposed: bool


def read_state(data: bytes) -> tuple[int, tuple[Cache, ...]]:
    """Walk a state. Returns its positions and its caches; raises InputError unless it is whole and plain."""
    reader = _Reader(data)
    if reader.numbers("<Ii")[0] != MAGIC:
        _refuse("another magic number")
    positions = 0
    caches: list[Cache] = []
    while reader.offset < len(data):
        streams, cells = reader.numbers("<II")
        if streams != 1 or cells == 0 or (caches and cells != positions):
            _refuse("several streams, or caches of different lengths")
        positions = cells
        metadata = reader.take(_CELL.size * cells)
        if any((p, n) != (i, 1) for i, (p, n, _) in enumerate(_CELL.iter_unpack(metadata))):
            _refuse("positions that do not count up from 0 in one sequence")
        caches.append(_read_cache(reader, cells))
    if not caches:
        _refuse("no cache")
    return positions, tuple(caches)


_CELL = struct.Struct("<iIi")
"""Position, number of sequences, sequence."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.offset = 0

    def take(self, nbytes: int) -> memoryview:
        """The next bytes, which must be there: sizes are read from the data itself."""
        start, self.offset = self.offset, self.offset + nbytes
        if self.offset > len(self.data):
            _refuse(f"{len(self.data)} bytes, too few")
        return self.data[start : self.offset]

    def numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))


def _read_cache(reader: _Reader, cells: int) -> Cache:
    transposed, layers = reader.numbers("<II")
    if transposed > 1 or layers > MAX_LAYERS:
        _refuse("an impossible number of layers")

    def block(form: str) -> Block:
        kind, *sizes = reader.numbers(form)
        start = reader.offset
        reader.take(cells * math.prod(sizes))
        return Block(start, reader.offset - start, kind)

    keys = tuple(block("<iQ") for _ in range(layers))
    return Cache(keys, tuple(block("<iII" if transposed else "<iQ") for _ in range(layers)), bool(transposed))


def _refuse(found: str) -> NoReturn:
    raise InputError("the state of one llama.cpp sequence from its beginning", found, "build the bundle again")
