"""V(prefix) = P(the finished answer is right): what scores partial generations, on a device.

A head reads the final hidden states that an engine gives for the base model anyway; its files are a directory with
`verifier.json`, `verifier.safetensors` and, so that it can be judged again on another quantization of the same base,
`heldout.jsonl.gz`. A verifier with a trunk of its own steps the tokens in a second engine and puts a head on top. The
controls, a constant and a random verifier, are here as well. Only numpy computes.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, ValidationError, model_validator

from edgekit.config import M, Strict
from edgekit.engine import Closing, Engine, Entry, FloatArray
from edgekit.errors import InputError
from edgekit.formats.safetensors import read_arrays, write_arrays

MANIFEST, WEIGHTS, HELDOUT = "verifier.json", "verifier.safetensors", "heldout.jsonl.gz"
TRUNK = "trunk.gguf"
"""A LoRA of the base, or a model, for a verifier with a trunk of its own: what llama.cpp opens."""
ADAPTER_DIRECTORY, MODEL_DIRECTORY = "adapter", "model"
"""Where a verifier that was trained, and not built yet, has them."""
MAX_MANIFEST_BYTES = 4 << 20
MAX_WEIGHT_BYTES = 256 << 20
MAX_HELDOUT_BYTES = 64 << 20
"""Of the held-out answers after decompression."""
SMALLEST = 1e-6
"""Probabilities stay this far from 0 and 1, so that a ratio of two is finite."""
_TRAIN = "train it again with `edgekit train verifier`"

State = Any
"""What a verifier remembers of a prefix; immutable, so that two continuations may share it."""


class Work(NamedTuple):
    """What a verifier has computed beside the base since it was opened."""

    tokens: int = 0
    """Positions that its own trunk has computed."""
    bytes_moved: int = 0
    """Weights that were read for them."""


NO_WORK = Work()


class Verifier(Protocol):
    """V(prefix) = P(the finished answer is right)."""

    @property
    def work(self) -> Work:
        """What its own trunk has computed; nothing where it has none."""
        ...

    @property
    def reads(self) -> bool:
        """Whether it wants hidden states."""
        ...

    def begin(self, prompt: Sequence[int], hidden: FloatArray | None) -> State:
        """State of the empty answer; `hidden`, shape (1, hidden size), is of the prompt's last position."""
        ...

    def extend(self, state: State, tokens: Sequence[int], hidden: FloatArray | None) -> State:
        """State after further tokens of the answer; `hidden` has shape (tokens, hidden size)."""
        ...

    def values(self, states: Sequence[State], done: Sequence[bool]) -> FloatArray:
        """Probabilities, shape (states,), strictly inside (0, 1); `done` says which answers are finished."""
        ...


# --- controls


@dataclass(frozen=True)
class Constant:
    """No verifier: the same value for every prefix."""

    value: float = 0.5
    reads: bool = False
    work: Work = NO_WORK

    def begin(self, prompt: Sequence[int], hidden: FloatArray | None) -> State:
        """Nothing is remembered."""
        return None

    def extend(self, state: State, tokens: Sequence[int], hidden: FloatArray | None) -> State:
        """Nothing is remembered."""
        return None

    def values(self, states: Sequence[State], done: Sequence[bool]) -> FloatArray:
        """The constant, shape (states,)."""
        return _inside(np.full(len(states), self.value))


@dataclass(frozen=True)
class RandomVerifier:
    """A uniform value in (0, 1) that depends on the seed and the tokens of prompt and answer alone."""

    seed: int
    reads: bool = False
    work: Work = NO_WORK

    def begin(self, prompt: Sequence[int], hidden: FloatArray | None) -> State:
        """Remember the tokens."""
        return tuple(prompt)

    def extend(self, state: State, tokens: Sequence[int], hidden: FloatArray | None) -> State:
        """Remember the tokens."""
        return (*state, *tokens)

    def values(self, states: Sequence[State], done: Sequence[bool]) -> FloatArray:
        """A hash of seed and tokens for each state, shape (states,)."""
        return np.array([self._value(state) for state in states], np.float32)

    def _value(self, tokens: Sequence[int]) -> float:
        data = np.array([self.seed, *tokens], "<i8").tobytes()
        number = int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little") >> 9
        return (number + 0.5) / 2**23  # 23 bits and a half: exact in float32, never 0 or 1


# --- what a manifest says

Size = Annotated[int, Field(ge=1, le=4096)]
_Shapes = dict[str, tuple[int, ...]]


class Platt(Strict):
    """P = sigmoid(scale * logit + offset) (Platt, 1999)."""

    kind: Literal["platt"] = "platt"
    scale: FiniteFloat = 1.0
    offset: FiniteFloat = 0.0

    def probabilities(self, logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Calibrated probabilities of a head's logits, any shape."""
        z = np.clip(self.scale * np.asarray(logits, np.float64) + self.offset, -50, 50)
        result: npt.NDArray[np.float64] = 1 / (1 + np.exp(-z))
        return result


class Isotonic(Strict):
    """A non-decreasing function of the logit: linear between knots, constant outside."""

    kind: Literal["isotonic"] = "isotonic"
    logits: tuple[FiniteFloat, ...] = Field(min_length=1, max_length=1 << 16)
    values: tuple[Annotated[float, Field(gt=0, lt=1)], ...]

    @model_validator(mode="after")
    def _knots_are_ordered(self) -> Isotonic:
        if len(self.logits) != len(self.values):
            raise ValueError("as many values as logits are needed")
        if any(b <= a for a, b in zip(self.logits, self.logits[1:], strict=False)):
            raise ValueError("logits must increase")
        if any(b < a for a, b in zip(self.values, self.values[1:], strict=False)):
            raise ValueError("values must not decrease")
        return self

    def probabilities(self, logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Calibrated probabilities of a head's logits, any shape."""
        return np.interp(np.asarray(logits, np.float64), self.logits, self.values)


Calibration = Annotated[Platt | Isotonic, Field(discriminator="kind")]


class Linear(Strict):
    """One linear layer on [last state, done]."""

    name: Literal["linear"] = "linear"

    def tensors(self, hidden: int) -> _Shapes:
        """Shapes of the weights for states of width `hidden`."""
        return {"score": (hidden + 1,), "score_bias": (1,)}


class Mlp(Strict):
    """One hidden layer on [last state, mean of the answer's states, done]; the mean of no states is the zero state."""

    name: Literal["mlp"] = "mlp"
    width: Size = 64

    def tensors(self, hidden: int) -> _Shapes:
        """Shapes of the weights for states of width `hidden`."""
        w = self.width
        return {"inner": (w, 2 * hidden + 1), "inner_bias": (w,), "score": (w,), "score_bias": (1,)}


class Attention(Strict):
    """A small causal transformer beside the base: it reads the tokens, and the base's state where one was read.

    A position is embedded as a vector of its token, plus one for its place (counted from the prompt's end in the
    prompt, from the answer's begin in the answer), plus a projection of its state. A prompt needs no more states than
    that of its last position, which the base computes anyway. In each layer a position attends to those up to it,
    with a bias for each head, distance and half (prompt or answer), and a hidden layer sees [what was read, the
    position]; its output is added to the position. Of the last layer only the last position is wanted; a finished
    answer's has a vector added.
    """

    name: Literal["attention"] = "attention"
    layers: Annotated[int, Field(ge=1, le=8)] = 1
    size: Size = 128
    """Width of the embedding, and of all heads together."""
    heads: Size = 8
    places: Size = 64
    """Places told apart in each half; those farther off share the last vector."""
    distances: Size = 64
    """Distances told apart, likewise."""
    width: Size = 256
    """Of the hidden layers."""
    vocabulary: tuple[NonNegativeInt, ...] = Field(default=(), max_length=1 << 16)
    """Tokens with a vector of their own, increasing; all others share one."""

    @model_validator(mode="after")
    def _fits(self) -> Attention:
        if self.size % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a size of {self.size}")
        if any(b <= a for a, b in itertools.pairwise(self.vocabulary)):
            raise ValueError("the tokens of the vocabulary must increase")
        return self

    def tensors(self, hidden: int) -> _Shapes:
        """Shapes of the weights for states of width `hidden`."""
        n, w, layers = self.size, self.width, self.layers
        return {
            "embed": (n, hidden),
            "tokens": (1 + len(self.vocabulary), n),
            "places": (2, self.places, n),
            "finished": (n,),
            "query": (layers, n, n),
            "key": (layers, n, n),
            "value": (layers, n, n),
            "distances": (layers, self.heads, 2, self.distances),
            "inner": (layers, w, 2 * n),
            "inner_bias": (layers, w),
            "outer": (layers, n, w),
            "score": (n,),
            "score_bias": (1,),
        }

    def known_tokens(self) -> npt.NDArray[np.int64]:
        """The tokens of the rows of the table of token vectors; that of all others comes first."""
        return np.array((-1, *self.vocabulary), np.int64)


Architecture = Annotated[Linear | Mlp | Attention, Field(discriminator="name")]


class Trunk(Strict):
    """The model whose hidden states a verifier reads."""

    source_digest: str
    """Of the base checkpoint's source."""
    model_digest: str
    """Of the quantized artifact whose states it was trained on."""
    name: str
    engine: str


class Training(Strict):
    """What a verifier was trained on, and what that cost."""

    problems: NonNegativeInt
    rollouts: NonNegativeInt
    prefixes: NonNegativeInt
    tokens_forward: NonNegativeInt
    """Tokens that the base model computed for the rollouts."""
    seconds: NonNegativeFloat
    engine: str
    """Engine and version that gave the states."""
    seed: int = 0


class Metric(Strict):
    """A figure on held-out problems, with its 95% interval over problems."""

    value: FiniteFloat
    ci_low: FiniteFloat
    ci_high: FiniteFloat


class FileInfo(Strict):
    """Size and digest of a file."""

    bytes: NonNegativeInt
    sha256: str


class VerifierManifest(Strict):
    """What `verifier.json` says."""

    schema_version: Literal[1] = 1
    kind: Literal["head", "adapter", "model"]
    """Reads the base's states; those of the base with a LoRA; those of a model of its own."""
    reads_text: bool = False
    """A model of its own whose tokenizer is not the base's: it is given the text."""
    architecture: Architecture
    hidden_size: int = Field(ge=1, le=1 << 16)
    layer: Literal["last"] = "last"
    """Which states: the final ones, after the last norm."""
    trunk: Trunk
    calibration: Calibration
    domains: tuple[str, ...]
    """Tasks whose answers it was trained on."""
    training: Training
    metrics: dict[str, Metric] = Field(default_factory=dict)
    files: dict[str, FileInfo]
    """All others, by POSIX path relative to the directory."""


class Prefixes(Strict):
    """One answer to a problem and the labels of some of its prefixes."""

    problem: str
    """Names the problem; its answers are never split between training and judging."""
    domain: str
    prompt: tuple[NonNegativeInt, ...] = Field(min_length=1)
    answer: tuple[NonNegativeInt, ...]
    """Without the token that ended it."""
    positions: tuple[NonNegativeInt, ...]
    """Lengths of the labelled prefixes, in tokens of the answer, increasing."""
    labels: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    """P(right) of each: the fraction of completions that ended right."""
    done: tuple[bool, ...]
    """Whether the answer is finished there."""

    @model_validator(mode="after")
    def _one_label_a_position(self) -> Prefixes:
        if not len(self.positions) == len(self.labels) == len(self.done):
            raise ValueError("positions, labels and done must be equally many")
        if any(b <= a for a, b in zip(self.positions, (*self.positions[1:], len(self.answer) + 1), strict=True)):
            raise ValueError("positions must increase and end within the answer")
        return self


# --- heads


class Head:
    """A small network on the base model's final hidden states and, for attention, its tokens.

    States are standardised first. What they are multiplied by is computed once, when a position is read, so that a
    state holds projections and not hidden states.
    """

    def __init__(
        self,
        architecture: Linear | Mlp | Attention,
        tensors: Mapping[str, FloatArray],
        *,
        calibration: Platt | Isotonic | None = None,
    ) -> None:
        """`tensors`: `mean` and `std` of the states, shape (hidden size,), and those of the architecture.

        Raises InputError when one is missing or has another shape, or a `std` is not positive.
        """
        self.architecture = architecture
        self.tensors = dict(tensors)
        self.hidden_size = len(tensors["mean"]) if "mean" in tensors else 0
        self.calibration = calibration or Platt()
        wanted = head_tensors(architecture, self.hidden_size)
        found = {name: array.shape for name, array in tensors.items()}
        if found != wanted:
            odd = min(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
            raise InputError(
                f"a tensor {odd} of shape {wanted[odd]}" if odd in wanted else f"the tensors of {architecture.name}",
                f"shape {found[odd]} of {odd[:200]!r}" if odd in found else "none",
                _TRAIN,
            )
        if not (tensors["std"] > 0).all():
            raise InputError("standard deviations above 0", str(tensors["std"].min()), _TRAIN)
        self._network = _NETWORKS[architecture.name](architecture, self.tensors)

    @property
    def reads(self) -> bool:
        """It does."""
        return True

    @property
    def work(self) -> Work:
        """Nothing but the head."""
        return NO_WORK

    def begin(self, prompt: Sequence[int], hidden: FloatArray | None) -> State:
        """Read the prompt and the state of its last position, shape (1, hidden size); an empty one may have None."""
        empty = self._network.empty()
        if hidden is None and not prompt:
            return empty
        return self._network.read(empty, prompt, self._rows(hidden), answer=False)

    def extend(self, state: State, tokens: Sequence[int], hidden: FloatArray | None) -> State:
        """Read positions of the answer, shape (tokens, hidden size)."""
        rows = self._rows(hidden)
        if len(rows) != len(tokens):
            raise InputError(f"hidden states of {len(tokens)} tokens", str(len(rows)), "give one row a token")
        return self._network.read(state, tokens, rows, answer=True)

    def logits(self, states: Sequence[State], done: Sequence[bool]) -> FloatArray:
        """What comes before calibration, shape (states,)."""
        if not states:
            return np.zeros(0, np.float32)
        return self._network.logits(states, np.asarray(done, np.float32))

    def values(self, states: Sequence[State], done: Sequence[bool]) -> FloatArray:
        """Calibrated probabilities, shape (states,). Raises InputError where states or weights give no number."""
        logits = self.logits(states, done)
        if np.isnan(logits).any():
            raise InputError("a logit for every prefix", "NaN", f"check the model, or {_TRAIN}")
        return _inside(self.calibration.probabilities(logits))

    def _rows(self, hidden: FloatArray | None) -> FloatArray:
        if hidden is None:
            found = "an engine that gives none"
            raise InputError("hidden states of the base model", found, "use an engine with hidden states")
        if hidden.ndim != 2 or hidden.shape[1] != self.hidden_size:
            wanted = f"hidden states of width {self.hidden_size}"
            raise InputError(wanted, f"shape {hidden.shape}", "use the verifier with the model it was trained for")
        return hidden.astype(np.float32, copy=False)


def head_tensors(architecture: Linear | Mlp | Attention, hidden: int) -> _Shapes:
    """Shapes of all tensors of a head for states of width `hidden`."""
    return {"mean": (hidden,), "std": (hidden,), **architecture.tensors(hidden)}


class _Network(Protocol):
    def empty(self) -> State: ...
    def read(self, state: State, tokens: Sequence[int], hidden: FloatArray, *, answer: bool) -> State:
        """Read tokens of the answer with their states, or of the prompt with the state of the last."""
        ...

    def logits(self, states: Sequence[State], done: FloatArray) -> FloatArray: ...


class _Projection:
    """weight @ ((x - mean) / std), folded into one product."""

    def __init__(self, weight: FloatArray, mean: FloatArray, std: FloatArray) -> None:
        scaled = weight.astype(np.float64) / std
        self._weight = np.ascontiguousarray(scaled.T, np.float32)
        self._offset = (-scaled @ mean.astype(np.float64)).astype(np.float32)

    def __call__(self, rows: FloatArray) -> FloatArray:
        result: FloatArray = rows @ self._weight + self._offset
        return result


class _LinearHead:
    """A state is the last position's part of the logit, shape (1,)."""

    def __init__(self, architecture: Linear, tensors: Mapping[str, FloatArray]) -> None:
        self._project = _Projection(tensors["score"][None, :-1], tensors["mean"], tensors["std"])
        self._done, self._bias = tensors["score"][-1], tensors["score_bias"][0]

    def empty(self) -> State:
        return np.zeros(1, np.float32)

    def read(self, state: State, tokens: Sequence[int], hidden: FloatArray, *, answer: bool) -> State:
        return self._project(hidden[-1:])[0] if len(hidden) else state

    def logits(self, states: Sequence[State], done: FloatArray) -> FloatArray:
        result: FloatArray = np.concatenate(states) + done * self._done + self._bias
        return result


class _Pooled(NamedTuple):
    last: FloatArray
    """The last position's share of the hidden layer, shape (width,)."""
    total: FloatArray
    """Sum of the shares of the answer's positions."""
    answered: int
    """Positions of the answer."""


class _MlpHead:
    def __init__(self, architecture: Mlp, tensors: Mapping[str, FloatArray]) -> None:
        inner, mean, std = tensors["inner"], tensors["mean"], tensors["std"]
        hidden = len(mean)
        self._last = _Projection(inner[:, :hidden], mean, std)
        self._mean = _Projection(inner[:, hidden : 2 * hidden], mean, std)
        self._layers = _Layers(tensors, 2 * hidden)
        self._width = architecture.width

    def empty(self) -> _Pooled:
        zero = np.zeros(self._width, np.float32)
        return _Pooled(zero, zero, 0)

    def read(self, state: _Pooled, tokens: Sequence[int], hidden: FloatArray, *, answer: bool) -> _Pooled:
        if not len(hidden):
            return state
        last = self._last(hidden[-1:])[0]
        if not answer:
            return state._replace(last=last)
        return _Pooled(last, state.total + self._mean(hidden).sum(axis=0), state.answered + len(hidden))

    def logits(self, states: Sequence[_Pooled], done: FloatArray) -> FloatArray:
        counts = np.array([max(state.answered, 1) for state in states], np.float32)
        means = np.stack([state.total for state in states]) / counts[:, None]
        return self._layers(np.stack([state.last for state in states]) + means, done)


class _Layers:
    """The hidden layer's bias, done flag and activation, and the layer that gives the logit."""

    def __init__(self, tensors: Mapping[str, FloatArray], done: int) -> None:
        self._done, self._inner_bias = tensors["inner"][:, done], tensors["inner_bias"]
        self._score, self._bias = tensors["score"], tensors["score_bias"][0]

    def __call__(self, inner: FloatArray, done: FloatArray) -> FloatArray:
        active = np.maximum(inner + done[:, None] * self._done + self._inner_bias, 0)
        result: FloatArray = active @ self._score + self._bias
        return result


def token_rows(known: npt.NDArray[np.int64], tokens: Sequence[int]) -> npt.NDArray[np.intp]:
    """Rows of the table of token vectors, shape (tokens,); `known` is what `Attention.known_tokens` gave."""
    wanted = np.asarray(tokens, np.int64)
    row = np.searchsorted(known, wanted)
    return np.where(known[np.minimum(row, len(known) - 1)] == wanted, row, 0)


class _Attended(NamedTuple):
    memory: FloatArray
    """Keys and values of the positions read, shape (layers, positions, 2, size)."""
    last: FloatArray
    """The last position before the last layer, shape (size,)."""
    prompt: int
    """Positions of the prompt among them."""


class _AttentionHead:
    def __init__(self, architecture: Attention, tensors: Mapping[str, FloatArray]) -> None:
        self._shape = architecture
        self._known = architecture.known_tokens()
        self._embed = _Projection(tensors["embed"], tensors["mean"], tensors["std"])
        self._tokens, self._places, self._finished = tensors["tokens"], tensors["places"], tensors["finished"]
        self._distances = tensors["distances"]
        self._query = tensors["query"].swapaxes(1, 2) / np.float32(math.sqrt(architecture.size // architecture.heads))
        self._key_value = np.concatenate([tensors["key"], tensors["value"]], axis=1).swapaxes(1, 2)
        self._inner, self._inner_bias = tensors["inner"].swapaxes(1, 2), tensors["inner_bias"]
        self._outer = tensors["outer"].swapaxes(1, 2)
        self._score, self._bias = tensors["score"], tensors["score_bias"][0]

    def empty(self) -> _Attended:
        size, layers = self._shape.size, self._shape.layers
        return _Attended(np.zeros((layers, 0, 2, size), np.float32), np.zeros(size, np.float32), 0)

    def read(self, state: _Attended, tokens: Sequence[int], hidden: FloatArray, *, answer: bool) -> _Attended:
        if not answer:
            tokens = tokens[-self._shape.places :]
        count, before = len(tokens), state.memory.shape[1]
        if not count:
            return state
        place = np.arange(count) + before - state.prompt if answer else np.arange(count)[::-1]
        row = self._places[int(answer), np.minimum(place, self._shape.places - 1)]
        row = row + self._tokens[token_rows(self._known, tokens)]
        given = hidden[-count:]
        row[count - len(given) :] += self._embed(given)
        prompt = state.prompt if answer else count
        half = (np.arange(before + count) >= prompt)[None]
        lengths = before + 1 + np.arange(count)
        memory = np.empty((self._shape.layers, before + count, 2, self._shape.size), np.float32)
        memory[:, :before] = state.memory
        for layer in range(self._shape.layers):
            memory[layer, before:] = (row @ self._key_value[layer]).reshape(count, 2, -1)
            if layer + 1 < self._shape.layers:
                row = self._layer(layer, row[None], memory[layer][None], half, lengths[None])[0]
        return _Attended(memory, row[-1], prompt)

    def logits(self, states: Sequence[_Attended], done: FloatArray) -> FloatArray:
        lengths = np.array([[max(state.memory.shape[1], 1)] for state in states])
        memory = np.zeros((len(states), int(lengths.max()), 2, self._shape.size), np.float32)
        for padded, state in zip(memory, states, strict=True):
            padded[: state.memory.shape[1]] = state.memory[-1]
        half = np.arange(memory.shape[1]) >= [[state.prompt] for state in states]
        last = np.stack([state.last for state in states]) + done[:, None] * self._finished
        found = self._layer(self._shape.layers - 1, last[:, None], memory, half, lengths)[:, 0]
        result: FloatArray = found @ self._score + self._bias
        return result

    def _layer(
        self, layer: int, row: FloatArray, memory: FloatArray, half: npt.NDArray[Any], lengths: npt.NDArray[np.intp]
    ) -> FloatArray:
        """One layer for some positions of each state.

        Args:
            layer: Which.
            row: Those positions before it, shape (states, positions, size).
            memory: Keys and values, shape (states, length, 2, size).
            half: 1 in the answer, shape (states or 1, length).
            lengths: How many of the memory each position sees, shape (states, positions).
        """
        n, count, size = row.shape
        length, heads = memory.shape[1], self._shape.heads
        keys, values = memory.reshape(n, length, 2, heads, -1).transpose(2, 0, 3, 1, 4)
        queries = (row @ self._query[layer]).reshape(n, count, heads, -1).swapaxes(1, 2)
        distance = np.clip(lengths[..., None] - 1 - np.arange(length), 0, self._shape.distances - 1)
        bias = self._distances[layer][:, half.astype(np.intp)[:, None], distance].swapaxes(0, 1)
        scores = queries @ keys.swapaxes(2, 3) + bias
        scores = np.where((np.arange(length) < lengths[..., None])[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        found = (weights @ values).swapaxes(1, 2).reshape(n, count, size)
        active = np.concatenate([found, row], axis=-1) @ self._inner[layer] + self._inner_bias[layer]
        result: FloatArray = row + np.maximum(active, 0) @ self._outer[layer]
        return result


_NETWORKS: Mapping[str, Callable[[Any, Mapping[str, FloatArray]], _Network]] = {
    "linear": _LinearHead,
    "mlp": _MlpHead,
    "attention": _AttentionHead,
}


def _inside(probabilities: npt.NDArray[np.float64]) -> FloatArray:
    return np.clip(probabilities, SMALLEST, 1 - SMALLEST).astype(np.float32)


# --- a verifier with its own engine


class OwnTrunk(Closing):
    """A head on a model of its own: the base with a LoRA, or a reward model.

    A state is the tokens of prompt and answer. The head reads one position, the last one, as if it were the whole
    answer. One sequence of the engine is kept and rewound to what the next prefix shares with it; prefixes of one call
    are taken in the order of their tokens, so that neighbours share most. Closing it closes the engine.
    """

    def __init__(
        self,
        engine: Engine,
        head: Head,
        *,
        to_text: Callable[[Sequence[int]], str] | None = None,
        weight_bytes: int = 0,
    ) -> None:
        """`to_text` turns the base's tokens into text for a model whose tokenizer is another one.

        The text is tokenized with its control tokens, which a chat template needs. `weight_bytes` are what a step of
        the engine reads. Raises InputError for an engine without hidden states.
        """
        if not engine.capabilities.hidden_states:
            raise InputError("an engine with hidden states", "one without", "open the verifier with another engine")
        self._engine, self._head, self._to_text = engine, head, to_text
        self._weight_bytes, self._work = weight_bytes, NO_WORK
        self._sequence: int | None = None
        self._held: tuple[int, ...] = ()

    @property
    def reads(self) -> bool:
        """Not those of the base."""
        return False

    @property
    def work(self) -> Work:
        """What the trunk has computed."""
        return self._work

    def begin(self, prompt: Sequence[int], hidden: FloatArray | None) -> State:
        """Remember the tokens."""
        return tuple(prompt)

    def extend(self, state: State, tokens: Sequence[int], hidden: FloatArray | None) -> State:
        """Remember the tokens."""
        return (*state, *tokens)

    def values(self, states: Sequence[State], done: Sequence[bool]) -> FloatArray:
        """Step what the engine has not seen and read the last position of each state."""
        read = [self._head.extend(self._head.begin((), None), [0], row[None]) for row in self.hidden(states)]
        return self._head.values(read, done)

    def hidden(self, states: Sequence[State]) -> FloatArray:
        """Hidden states of the trunk at the last position of each state, shape (states, hidden size)."""
        wanted = [self._own_tokens(state) for state in states]
        read = {tokens: self._read(tokens) for tokens in sorted(set(wanted))}
        return np.stack([read[tokens] for tokens in wanted])

    def close(self) -> None:
        """Free the model."""
        self._engine.close()

    def _own_tokens(self, state: Sequence[int]) -> tuple[int, ...]:
        tokens = self._engine.tokenize(self._to_text(state), special=True) if self._to_text else state
        if not tokens:
            raise InputError("at least one token to score", "an empty prefix", "give a prompt")
        return tuple(tokens)

    def _read(self, tokens: tuple[int, ...]) -> FloatArray:
        pairs = zip(self._held, tokens[:-1], strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._held), len(tokens) - 1))
        grows = shared == len(self._held)
        self._rewind(shared if grows or self._engine.capabilities.rewind else 0)
        assert self._sequence is not None
        sequence, self._held = self._sequence, ()  # a step that fails leaves nothing to share
        entries = [Entry(sequence, token, wants_logits=False) for token in tokens[self._engine.length(sequence) : -1]]
        output = self._engine.step([*entries, Entry(sequence, tokens[-1])], hidden_states=True)
        self._held = tokens
        self._work = Work(self._work.tokens + len(entries) + 1, self._work.bytes_moved + self._weight_bytes)
        assert output.hidden is not None
        last: FloatArray = output.hidden[0]
        return last

    def _rewind(self, length: int) -> None:
        """Make the sequence hold the first `length` tokens of what it holds."""
        if self._sequence is None:
            self._sequence = self._engine.start()
        elif not length:
            self._engine.release(self._sequence)
            self._sequence = self._engine.start()
        elif length < len(self._held):
            self._engine.truncate(self._sequence, length)


# --- files


def save_verifier(
    directory: Path,
    head: Head,
    *,
    trunk: Trunk,
    domains: Sequence[str],
    training: Training,
    metrics: Mapping[str, Metric],
    heldout: Sequence[Prefixes] = (),
    kind: Literal["head", "adapter", "model"] = "head",
    reads_text: bool = False,
    files: Sequence[str] = (),
) -> VerifierManifest:
    """Write a verifier; matrices are rounded to float16, vectors stay float32. Equal contents give equal bytes.

    `files` are relative paths that are in the directory already, such as a trunk's. Returns the manifest, which is
    written last.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_arrays(directory / WEIGHTS, {name: _narrow(array) for name, array in sorted(head.tensors.items())})
    names = [WEIGHTS, *files]
    if heldout:
        lines = b"".join(item.model_dump_json().encode() + b"\n" for item in heldout)
        if len(lines) > MAX_HELDOUT_BYTES:
            raise InputError(f"held-out answers of at most {MAX_HELDOUT_BYTES} bytes", str(len(lines)), "keep fewer")
        (directory / HELDOUT).write_bytes(gzip.compress(lines, mtime=0))
        names.append(HELDOUT)
    manifest = VerifierManifest(
        kind=kind,
        reads_text=reads_text,
        architecture=head.architecture,
        hidden_size=head.hidden_size,
        trunk=trunk,
        calibration=head.calibration,
        domains=tuple(domains),
        training=training,
        metrics=dict(metrics),
        files={name: _describe(directory / name) for name in sorted(names)},
    )
    (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def load_head(directory: Path) -> tuple[VerifierManifest, Head]:
    """Read a verifier's directory; it is not trusted.

    Raises InputError when a file is missing, damaged, too large or not what the manifest says.
    """
    manifest = read_manifest(directory)
    _check(directory, manifest, WEIGHTS)
    weights = read_arrays(directory / WEIGHTS, MAX_WEIGHT_BYTES)
    if (found := weights["mean"].shape if "mean" in weights else ()) != (manifest.hidden_size,):
        raise _damaged(directory / WEIGHTS, f"a mean of shape ({manifest.hidden_size},)", f"shape {found}")
    return manifest, Head(manifest.architecture, weights, calibration=manifest.calibration)


def read_manifest(directory: Path) -> VerifierManifest:
    """Read `verifier.json` and compare the sizes of the files it names. Raises InputError as `load_verifier` does."""
    path = directory / MANIFEST
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        wanted = f"a verifier's directory, with {MANIFEST}"
        raise InputError(wanted, f"{path}: {error.strerror or error}", "check the path") from None
    if len(data) > MAX_MANIFEST_BYTES:
        raise _damaged(path, f"at most {MAX_MANIFEST_BYTES} bytes", "more")
    manifest = _parse(VerifierManifest, data, path)
    if WEIGHTS not in manifest.files:
        raise _damaged(path, f"{WEIGHTS} among its files", "none")
    for name, entry in manifest.files.items():
        file = _file(directory, name)
        if file.stat().st_size != entry.bytes:
            raise _damaged(file, f"{entry.bytes} bytes", f"{file.stat().st_size}")
    return manifest


def read_heldout(directory: Path) -> list[Prefixes]:
    """Read the held-out answers of a verifier, none where it has none. Raises InputError as `load_verifier` does."""
    manifest = read_manifest(directory)
    if HELDOUT not in manifest.files:
        return []
    _check(directory, manifest, HELDOUT)
    path = directory / HELDOUT
    try:
        with gzip.open(path) as stream:
            data = stream.read(MAX_HELDOUT_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, "a gzip file", str(error)) from None
    if len(data) > MAX_HELDOUT_BYTES:
        raise _damaged(path, f"at most {MAX_HELDOUT_BYTES} bytes after decompression", "more")
    return [_parse(Prefixes, line, path) for line in data.splitlines()]


def verify_files(directory: Path, names: Sequence[str] | None = None) -> VerifierManifest:
    """Compare files of a verifier (all, unless named) with their digests. Raises InputError for the first other."""
    manifest = read_manifest(directory)
    for name in manifest.files if names is None else names:
        _check(directory, manifest, name)
    return manifest


def _narrow(array: FloatArray) -> npt.NDArray[np.floating[Any]]:
    """Matrices in float16 where their values allow it."""
    if array.ndim < 2 or np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        return array.astype(np.float32)
    return array.astype(np.float16)


def _parse(model: type[M], data: bytes, path: Path) -> M:
    try:
        return model.model_validate(json.loads(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _damaged(path, f"a valid {model.__name__}", f"{where}: {first['msg']}"[:300]) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "valid JSON", str(error)[:300]) from None


def _file(directory: Path, name: str) -> Path:
    """A regular file inside the directory, by a plain relative name."""
    part = r"\w[\w.-]*"
    path = directory / name
    plain = re.fullmatch(rf"{part}(/{part})*", name) and len(name) < 256
    if not plain or not path.resolve().is_relative_to(directory.resolve()):
        found = f"{name[:200]!r} in {directory / MANIFEST}"
        raise InputError("names of files inside the verifier's directory", found, "do not use this verifier")
    if not path.is_file():
        raise _damaged(path, "a regular file", "none")
    return path


def _check(directory: Path, manifest: VerifierManifest, name: str) -> None:
    path = _file(directory, name)
    if _describe(path) != manifest.files[name]:
        raise _damaged(path, f"sha256 {manifest.files[name].sha256[:12]}...", "other content")


def _describe(path: Path) -> FileInfo:
    with path.open("rb") as stream:
        return FileInfo(bytes=path.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def _damaged(path: Path, wanted: str, found: str) -> InputError:
    return InputError(f"{wanted} in {path}", found, f"fetch the verifier again, or {_TRAIN}")
