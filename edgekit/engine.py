"""What executes an artifact, as strategies and measurements see it: a small protocol, no framework."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from edgekit.errors import InputError

FloatArray = npt.NDArray[np.float32]
MAX_THREADS = 512
"""As many as ggml takes (`GGML_MAX_N_THREADS`); far more would exhaust a machine before anything is computed."""


@dataclass(frozen=True)
class EngineOptions:
    """How to open a model; the defaults suit a small machine."""

    context_tokens: int = 2048
    """Tokens that one sequence can hold."""
    sequences: int = 1
    """Sequences that can be alive at once."""
    total_tokens: int | None = None
    """Tokens that all sequences can hold together, those that forks share counted once; None: each can be full."""
    batch_tokens: int = 512
    """Most entries in one step."""
    threads: int | None = None
    """CPU threads; None takes the physical cores this process may use."""
    kv_type: str = "f16"
    """Element type of the KV cache: `f16`, `q8_0` or `q4_0`."""
    accelerate: bool = True
    """Offload to the accelerator where the engine has one."""
    fall_back: bool = False
    """Run a model that was made for an accelerator without it where it is missing, instead of refusing."""

    @property
    def cpu_threads(self) -> int:
        """`threads`, but no more than this machine has, or the physical cores that this process may use."""
        if self.threads is not None:
            return min(self.threads, os.cpu_count() or 1)
        import psutil

        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(allowed, psutil.cpu_count(logical=False) or allowed)

    def check_counts(self) -> None:
        """Raise InputError for a count below 1, or for more threads than any engine takes."""
        for name in ("context_tokens", "sequences", "total_tokens", "batch_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} of at least 1", str(value), f"raise {name}")
        if self.threads is not None and self.threads > MAX_THREADS:
            raise InputError(f"at most {MAX_THREADS} threads", str(self.threads), "lower threads")


class Closing:
    """The `with` statement for whatever has `close`."""

    def close(self) -> None:
        """Free what is held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Capabilities:
    """What an open engine can do. Strategies ask for these, never for an engine by name."""

    fork: bool
    rewind: bool
    batch: bool
    hidden_states: bool
    input_embeddings: bool
    context_tokens: int
    sequences: int
    batch_tokens: int
    total_tokens: int = 1 << 62
    """Positions that all sequences can hold together, those that forks share counted once."""


@dataclass(frozen=True)
class Entry:
    """One position to compute: the next token (or input embedding) of a sequence."""

    sequence: int
    token: int | None = None
    embedding: FloatArray | None = None
    """Shape (hidden,); given instead of a token where the engine takes input embeddings."""
    wants_logits: bool = True


@dataclass(frozen=True)
class StepOutput:
    """Results of a step, one row per entry that wanted logits, in the order of the entries."""

    logits: FloatArray
    """Shape (rows, vocabulary)."""
    hidden: FloatArray | None = None
    """Final hidden states after the last norm, shape (rows, hidden); None unless asked for."""


class Engine(Protocol):
    """An open model. Sequences are small integers; positions are implied by what was stepped before."""

    @property
    def capabilities(self) -> Capabilities:
        """What this engine can do with this model."""
        ...

    @property
    def loaded(self) -> Mapping[str, str]:
        """Where it really runs: the provider, the device, or the layers on an accelerator."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """Width of a row of logits."""
        ...

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a generation (EOS, end of turn)."""
        ...

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Encode text; `special` parses control tokens in it and adds the model's BOS."""
        ...

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """Decode tokens to bytes: one token may end inside a UTF-8 character. Control tokens give nothing."""
        ...

    def start(self) -> int:
        """Return a new empty sequence. Raises InputError when all are in use."""
        ...

    def fork(self, sequence: int) -> int:
        """Return a new sequence with the same past, sharing its KV cache."""
        ...

    def truncate(self, sequence: int, length: int) -> None:
        """Forget everything after the first `length` positions."""
        ...

    def release(self, sequence: int) -> None:
        """Forget the sequence and free its slot."""
        ...

    def length(self, sequence: int) -> int:
        """Positions that the sequence holds."""
        ...

    def step(self, entries: Sequence[Entry], *, hidden_states: bool = False) -> StepOutput:
        """Compute entries (several of one sequence follow each other) and return the wanted rows."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class EngineModule(Protocol):
    """A file in `engines/`: the name of the file is the name of the engine."""

    DISTRIBUTION: str
    """The package that provides the engine, e.g. `llama-cpp-python`."""

    RUNS: tuple[str, ...]
    """Kinds of artifacts that the engine opens, e.g. `gguf`."""

    NEEDS: str
    """What a device must have to run it, after `needs`."""

    KV_TYPES: tuple[str, ...]
    """Element types of the KV cache that it offers, the default first."""

    def open_model(self, path: Path, options: EngineOptions) -> Engine:
        """Load a model, a file or a directory as `Artifact.model_path` says. Raises InputError or ToolError."""
        ...

    def build_info(self) -> dict[str, str]:
        """Version and build facts worth recording beside a measurement."""
        ...
