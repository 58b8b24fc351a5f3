"""Which tokens an engine's sequences hold, so that what two answers share is computed once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.engine import Engine, FloatArray
from edgekit.errors import InputError


class NoRoom(InputError):
    """The sequences in use leave no room for another."""


@dataclass
class _Held:
    tokens: list[int]
    logits: FloatArray | None
    """Of the token after `tokens`, where they are known."""
    cells: list[int]
    """The cell of the KV cache behind each token: forks share cells."""


@dataclass
class Taken:
    """A sequence in use: `tokens[:known]` are computed."""

    sequence: int
    known: int
    logits: FloatArray | None
    """Of the token after all `tokens`, where they are all known."""
    cells: list[int]
    room: int
    """Positions that are kept free for it."""


class PrefixCache:
    """The sequences of an engine, by what they hold; the least recently used are given up first.

    An engine that forks keeps what it forked from; one that only rewinds goes back to what is shared; one that can do
    neither computes from the start again.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._limits = engine.capabilities
        self._idle: dict[int, _Held] = {}
        self._busy: dict[int, Taken] = {}
        self._next_cell = itertools.count()

    def touch(self, tokens: Sequence[int]) -> None:
        """Give a prefix up later than the others."""
        for sequence, held in list(self._idle.items()):
            if held.tokens == tokens:
                self._idle[sequence] = self._idle.pop(sequence)

    def holds(self, tokens: Sequence[int]) -> bool:
        """Whether the logits after these tokens are known."""
        return any(held.tokens == tokens and held.logits is not None for held in self._idle.values())

    def take(self, tokens: list[int], room: int) -> Taken:
        """Return a sequence that holds a prefix of `tokens`, the longest there is, and can take `room` more.

        All are known only where their logits are; else the last is left to be computed. Raises NoRoom.
        """
        best, shared = self._best(tokens)
        source = None if best is None else self._idle[best]
        whole = source is not None and shared == len(source.tokens)
        logits = source.logits if source is not None and whole and shared == len(tokens) else None
        if best is None or source is None:
            self._make_room(len(tokens) + room, None)
            taken = Taken(self._engine.start(), 0, None, [], len(tokens) + room)
        else:
            missing = len(tokens) - shared + room
            if self._limits.fork and self._make_room(missing, best):
                taken = Taken(self._engine.fork(best), shared, logits, source.cells[:shared], missing)
            else:
                del self._idle[best]
                taken = self._busy[best] = Taken(best, shared, logits, source.cells[:shared], 0)
                try:
                    self._make_room(missing, None, slot=False)
                except NoRoom:
                    del self._busy[best]
                    self._engine.release(best)
                    raise
                taken.room = missing
            if self._engine.length(taken.sequence) != shared:
                self._engine.truncate(taken.sequence, shared)
        self._busy[taken.sequence] = taken
        return taken

    def grew(self, taken: Taken, count: int) -> None:
        """Note that `count` more tokens were computed in a sequence in use."""
        taken.cells.extend(itertools.islice(self._next_cell, count))
        taken.room = max(0, taken.room - count)

    def give(self, taken: Taken, tokens: list[int], logits: FloatArray | None) -> None:
        """Put a sequence back that holds these tokens."""
        del self._busy[taken.sequence]
        self._idle[taken.sequence] = _Held(tokens, logits, taken.cells)

    def close(self) -> None:
        """Release every sequence."""
        for sequence in [*self._idle, *self._busy]:
            self._engine.release(sequence)
        self._idle.clear()
        self._busy.clear()

    def _best(self, tokens: list[int]) -> tuple[int | None, int]:
        best, longest = None, 0
        for sequence, held in self._idle.items():
            shared = common_prefix(held.tokens, tokens)
            if shared == len(tokens) and (held.logits is None or len(held.tokens) > shared):
                # the last token is computed again, for its logits
                shared -= 1
            if not self._limits.rewind and shared < len(held.tokens):
                continue
            if shared > longest or (shared == longest and best is not None and len(held.tokens) == shared):
                best, longest = sequence, shared
        return best, longest

    def _make_room(self, cells: int, keep: int | None, *, slot: bool = True) -> bool:
        """Release idle sequences until one more can start and hold `cells` new positions; whether that worked.

        Without a sequence to `keep`, it must: raises InputError.
        """
        while not self._fits(cells, slot):
            victim = next((sequence for sequence in self._idle if sequence != keep), None)
            if victim is None:
                if keep is None:
                    found = f"{self._limits.sequences} sequences and {self._limits.total_tokens} positions in all"
                    raise NoRoom(
                        f"an engine with room for {cells} more positions", found, "use fewer candidates or tokens"
                    )
                return False
            self._engine.release(victim)
            del self._idle[victim]
        return True

    def _fits(self, cells: int, slot: bool) -> bool:
        if slot and len(self._idle) + len(self._busy) >= self._limits.sequences:
            return False
        lists = [*(held.cells for held in self._idle.values()), *(taken.cells for taken in self._busy.values())]
        used = set(itertools.chain.from_iterable(lists))
        promised = sum(taken.room for taken in self._busy.values())
        return len(used) + promised + cells <= self._limits.total_tokens


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
