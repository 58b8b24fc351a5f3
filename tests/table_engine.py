"""An engine whose logits are a function of what a sequence really holds: strategies are tested against enumeration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edgekit.engine import Capabilities, Closing, Entry, FloatArray, StepOutput

END = 0


class TableEngine(Closing):
    """Tokens are single bytes from `a` on; token 0 ends a text. `probabilities` gives the law after a prefix."""

    def __init__(
        self,
        probabilities: Callable[[tuple[int, ...]], Sequence[float]],
        *,
        sequences: int = 8,
        fork: bool = True,
        rewind: bool = True,
        context_tokens: int = 64,
        total_tokens: int = 1 << 20,
        hidden_size: int = 4,
    ) -> None:
        self.capabilities = Capabilities(
            fork=fork,
            rewind=rewind,
            batch=True,
            hidden_states=True,
            input_embeddings=False,
            context_tokens=context_tokens,
            sequences=sequences,
            batch_tokens=64,
            total_tokens=total_tokens,
        )
        self._law = probabilities
        self._hidden_size = hidden_size
        self._held: dict[int, list[tuple[object, int]]] = {}
        """By sequence: (the physical cell, its token)."""
        self.vocabulary_size = len(probabilities(()))
        self.end_tokens = frozenset({END})
        self.loaded: Mapping[str, str] = {}
        self.computed = 0
        self.most_cells = 0

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        return [ord(letter) - ord("a") + 1 for letter in text]

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        return bytes(ord("a") - 1 + token for token in tokens if token != END)

    def start(self) -> int:
        free = set(range(self.capabilities.sequences)).difference(self._held)
        assert free, "more sequences than there are"
        sequence = min(free)
        self._held[sequence] = []
        return sequence

    def fork(self, sequence: int) -> int:
        assert self.capabilities.fork
        copy = self.start()
        self._held[copy] = list(self._held[sequence])
        return copy

    def truncate(self, sequence: int, length: int) -> None:
        assert 0 <= length <= len(self._held[sequence])
        assert self.capabilities.rewind or length in (0, len(self._held[sequence]))
        del self._held[sequence][length:]

    def release(self, sequence: int) -> None:
        del self._held[sequence]

    def length(self, sequence: int) -> int:
        return len(self._held[sequence])

    def step(self, entries: Sequence[Entry], *, hidden_states: bool = False) -> StepOutput:
        logits, hidden = [], []
        for entry in entries:
            assert entry.token is not None
            held = self._held[entry.sequence]
            held.append((object(), entry.token))
            assert len(held) <= self.capabilities.context_tokens
            self.computed += 1
            if entry.wants_logits:
                past = tuple(token for _, token in held)
                with np.errstate(divide="ignore"):
                    logits.append(np.log(np.asarray(self._law(past), np.float32)))
                hidden.append(self.hidden(past))
        cells = {id(cell) for held in self._held.values() for cell, _ in held}
        self.most_cells = max(self.most_cells, len(cells))
        assert len(cells) <= self.capabilities.total_tokens
        rows = np.array(logits, np.float32).reshape(len(logits), self.vocabulary_size)
        return StepOutput(rows, np.array(hidden, np.float32) if hidden_states else None)

    def hidden(self, past: tuple[int, ...]) -> FloatArray:
        """A vector that tells one past from another."""
        return np.random.default_rng(list(past)).normal(size=self._hidden_size).astype(np.float32)

    def close(self) -> None:
        self._held.clear()
