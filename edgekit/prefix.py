"""A precomputed beginning: what every sequence of a bundle starts with, as the engine's own state.

The file holds a header (which model, which KV type, which tokens), the input embeddings of virtual tokens where there
are some, and the state of one sequence. An engine that cannot take the state, because another release or another
processor lays its cache out differently, computes it again from tokens and embeddings.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, ValidationError

from edgekit.config import Strict
from edgekit.engine import Capabilities, Closing, Engine, EngineOptions, Entry, FloatArray, StepOutput
from edgekit.errors import InputError

FILE_NAME = "prefix.state"
_MAGIC = b"edgekit-prefix-1"
_MAX_HEADER_BYTES = 16 << 20


class StateEngine(Engine, Protocol):
    """An engine whose sequences can be saved."""

    def save(self, sequence: int) -> bytes:
        """State of a sequence."""
        ...

    def load(self, data: bytes) -> int:
        """Return a new sequence with a saved state."""
        ...


class Header(Strict):
    """What a prefix is of."""

    model_sha256: str
    """Of the model file whose state it is."""
    kv_type: str
    virtual: NonNegativeInt
    """Positions before the first token, which no text stands for."""
    tokens: tuple[NonNegativeInt, ...] = ()
    """Tokens after those: the beginning of every prompt."""
    embedding_size: NonNegativeInt = 0
    """Width of the virtual tokens' input embeddings; 0 where the virtual positions have none."""
    state_bytes: PositiveInt


@dataclass(frozen=True)
class Prefix:
    """A prefix as its file holds it."""

    header: Header
    embeddings: FloatArray
    """Shape (virtual, embedding_size)."""
    state: bytes

    @property
    def positions(self) -> int:
        """Positions of the context that it takes."""
        return self.header.virtual + len(self.header.tokens)


@dataclass(frozen=True)
class Loaded:
    """A prefix in an engine."""

    sequence: int
    virtual: int
    tokens: tuple[int, ...]
    computed: bool
    """Whether it had to be computed again."""


def write_prefix(path: Path, prefix: Prefix) -> None:
    """Write a prefix file: equal contents give equal bytes."""
    header = prefix.header.model_dump_json().encode()
    embeddings = np.ascontiguousarray(prefix.embeddings, "<f4").tobytes()
    path.write_bytes(_MAGIC + struct.pack("<I", len(header)) + header + embeddings + prefix.state)


def read_prefix(path: Path) -> Prefix:
    """Read a prefix file; it is not trusted. Raises InputError unless it is whole."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from None
    start = len(_MAGIC) + 4
    if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
        raise _damaged(path, "another file")
    (header_bytes,) = struct.unpack_from("<I", data, len(_MAGIC))
    if header_bytes > _MAX_HEADER_BYTES:
        raise _damaged(path, f"a header of {header_bytes} bytes")
    try:
        header = Header.model_validate(json.loads(data[start : start + header_bytes]))
    except (ValidationError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error).partition("\n")[0]) from None
    rest = memoryview(data)[start + header_bytes :]
    embedding_bytes = 4 * header.virtual * header.embedding_size
    if len(rest) != embedding_bytes + header.state_bytes:
        raise _damaged(path, f"{len(rest)} bytes instead of {embedding_bytes + header.state_bytes}")
    embeddings = np.frombuffer(rest[:embedding_bytes], "<f4").astype(np.float32)
    if not np.isfinite(embeddings).all():
        raise _damaged(path, "embeddings that are not finite")
    rows = header.virtual if header.embedding_size else 0
    return Prefix(header, embeddings.reshape(rows, header.embedding_size), bytes(rest[embedding_bytes:]))


def load_prefix(engine: StateEngine, path: Path, *, model_sha256: str, kv_type: str) -> Loaded:
    """Start a sequence of `engine` with the prefix in a file.

    Args:
        engine: An open model.
        path: A file of `write_prefix`.
        model_sha256: Digest of the model file that the engine opened.
        kv_type: Element type of the engine's KV cache.

    Raises InputError when the file is damaged, of another model, too long for the context, or holds a state that this
    engine does not take and that cannot be computed from tokens and embeddings.
    """
    prefix = read_prefix(path)
    header = prefix.header
    if header.model_sha256 != model_sha256:
        found = f"one of the model {header.model_sha256[:12]}... in {path}"
        raise InputError(f"a prefix of the model {model_sha256[:12]}...", found, "build the bundle again")
    if prefix.positions > engine.capabilities.context_tokens:
        wanted = f"a context longer than the {prefix.positions} positions of {path}"
        raise InputError(wanted, str(engine.capabilities.context_tokens), "use a longer --context")
    try:
        if header.kv_type != kv_type:
            raise InputError(f"a prefix for a {kv_type} KV cache", f"{header.kv_type} in {path}", "build it again")
        sequence, computed = engine.load(prefix.state), False
        if engine.length(sequence) != prefix.positions:
            engine.release(sequence)
            raise InputError(f"a state of {prefix.positions} positions in {path}", "another", "build it again")
    except InputError:
        if header.virtual and not header.embedding_size:
            raise
        sequence, computed = compute(engine, prefix.embeddings, header.tokens), True
    return Loaded(sequence, header.virtual, header.tokens, computed)


def compute(engine: Engine, embeddings: FloatArray, tokens: Sequence[int], sequence: int | None = None) -> int:
    """Step virtual tokens, shape (n, embedding size), and tokens; returns the (new) sequence."""
    sequence = engine.start() if sequence is None else sequence
    entries = [Entry(sequence, embedding=row, wants_logits=False) for row in embeddings]
    engine.step([*entries, *(Entry(sequence, token, wants_logits=False) for token in tokens)])
    return sequence


def _damaged(path: Path, found: str) -> InputError:
    return InputError(f"a prefix file at {path}", found, "build the bundle again")


@dataclass
class _Held:
    """A sequence of `Prefixed`: the prefix's tokens that the caller has stepped so far, or None once it left them."""

    matched: int | None


class Prefixed(Closing):
    """An engine whose sequences begin with a prefix, as if it had been stepped by whoever starts them.

    Virtual tokens stand before every sequence and count in no length. Tokens of the prefix are not computed when a
    prompt begins with them; where it differs, the sequence goes back to what they share. It takes one sequence of the
    engine for itself and closes the engine with it.
    """

    def __init__(self, engine: Engine, loaded: Loaded) -> None:
        self._engine = engine
        self._prefix = loaded
        self._held: dict[int, _Held] = {}
        limits = engine.capabilities
        if not (limits.fork and limits.rewind) or limits.sequences < 2:
            found = f"one with {limits.sequences} sequences, or that cannot fork and rewind"
            raise InputError("an engine with a sequence to spare for the prefix", found, "open it with one more")
        self._capabilities = replace(
            limits,
            sequences=limits.sequences - 1,
            context_tokens=limits.context_tokens - loaded.virtual,
            total_tokens=limits.total_tokens - loaded.virtual - len(loaded.tokens),
        )

    @property
    def capabilities(self) -> Capabilities:
        """The engine's, less what the prefix takes."""
        return self._capabilities

    def adapted(self, adapter: Path, options: EngineOptions) -> Engine:
        """Open a LoRA beside the model, as the engine does; its sequences begin with nothing."""
        opened: Engine = self._engine.adapted(adapter, options)  # type: ignore[attr-defined]
        return opened

    @property
    def loaded(self) -> Mapping[str, str]:
        """Where the engine really runs."""
        return self._engine.loaded

    @property
    def vocabulary_size(self) -> int:
        """Width of a row of logits."""
        return self._engine.vocabulary_size

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a generation."""
        return self._engine.end_tokens

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Encode text."""
        return self._engine.tokenize(text, special=special)

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """Decode tokens."""
        return self._engine.detokenize(tokens)

    def start(self) -> int:
        """Return a new sequence: empty to the caller, with the whole prefix in the engine."""
        sequence = self._engine.fork(self._prefix.sequence)
        self._held[sequence] = _Held(0)
        return sequence

    def fork(self, sequence: int) -> int:
        """Return a new sequence with the same past."""
        held = self._get(sequence)
        copy = self._engine.fork(sequence)
        self._held[copy] = replace(held)
        return copy

    def truncate(self, sequence: int, length: int) -> None:
        """Forget everything after the first `length` positions."""
        if not 0 <= length <= self.length(sequence):
            raise InputError(f"a length from 0 to {self.length(sequence)}", str(length), "truncate to less")
        held = self._get(sequence)
        if held.matched is not None:
            held.matched = length
        else:
            self._engine.truncate(sequence, self._prefix.virtual + length)

    def release(self, sequence: int) -> None:
        """Forget the sequence and free its slot."""
        self._get(sequence)
        self._engine.release(sequence)
        del self._held[sequence]

    def length(self, sequence: int) -> int:
        """Positions that the caller has stepped."""
        matched = self._get(sequence).matched
        return self._engine.length(sequence) - self._prefix.virtual if matched is None else matched

    def step(self, entries: Sequence[Entry], *, hidden_states: bool = False) -> StepOutput:
        """Compute entries; those that repeat the prefix and want no output cost nothing."""
        tokens = self._prefix.tokens
        wanted = []
        for entry in entries:
            held = self._get(entry.sequence)
            if held.matched is not None:
                known = held.matched < len(tokens) and entry.token == tokens[held.matched]
                if known and not entry.wants_logits:
                    held.matched += 1
                    continue
                self._engine.truncate(entry.sequence, self._prefix.virtual + held.matched)
                held.matched = None
            wanted.append(entry)
        return self._engine.step(wanted, hidden_states=hidden_states)

    def _get(self, sequence: int) -> _Held:
        if sequence not in self._held:
            raise InputError("a sequence from start() or fork()", f"{sequence}, which is not alive", "start one")
        return self._held[sequence]

    def close(self) -> None:
        """Free the model."""
        self._engine.close()
