"""From logits to the law that the next token is drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.engine import FloatArray
from edgekit.errors import InputError

_LIKELY = 1e-4
"""Tokens at least this likely, relative to the likeliest, nearly always hold what top-p asks for."""
_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
"""Tokens with less have no weight."""


@dataclass(frozen=True)
class Law:
    """A discrete law over tokens."""

    tokens: npt.NDArray[np.intp]
    cumulative: npt.NDArray[np.float64]
    """Running sum of the weights of `tokens`; its last entry is their total."""

    def draw(self, random: np.random.Generator) -> tuple[int, float]:
        """Draw a token; returns it with its log-probability."""
        total = self.cumulative[-1]
        place = int(np.searchsorted(self.cumulative, random.random() * total, side="right"))
        place = min(place, len(self.tokens) - 1)
        weight = self.cumulative[place] - (self.cumulative[place - 1] if place else 0.0)
        return int(self.tokens[place]), float(np.log(weight / total))


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. The defaults of the filters keep every token.

    Temperature comes first, then top-k, top-p (Holtzman et al., arXiv:1904.09751) and min-p (Nguyen et al.,
    arXiv:2407.01082), each over what the one before left, as in transformers and vLLM. Top-n-sigma (Tang et al.,
    arXiv:2411.07641) looks at the logits as they are.
    """

    temperature: float = 0.7
    """0 takes the likeliest token, always."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    top_n_sigma: float = 0.0

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "from 0 to below 1"),
            ("top_n_sigma", self.top_n_sigma >= 0, "at least 0"),
        ):
            if not good:
                raise InputError(f"{name} {wanted}", str(getattr(self, name)), f"change {name}")

    def law(self, logits: FloatArray) -> Law:
        """The law of the next token given its logits, shape (vocabulary,)."""
        if self.temperature == 0:
            return Law(np.array([logits.argmax()]), np.ones(1))
        peak = logits.max()
        weights = np.subtract(logits, peak, dtype=np.float32)
        weights /= np.float32(self.temperature)
        np.exp(weights, out=weights)
        if self.top_n_sigma:
            weights[logits < peak - self.top_n_sigma * logits.std()] = 0
        # most laws keep few of many tokens: indices of them all are made only where they are needed
        tokens = None
        if 0 < self.top_k < len(weights):
            tokens = np.argpartition(weights, -self.top_k)[-self.top_k :]
            tokens = tokens[weights[tokens] > 0]
        if self.top_p < 1:
            tokens = _nucleus(weights, tokens, self.top_p)
        if self.min_p or tokens is None:
            least = max(self.min_p, _SMALLEST)
            tokens = np.flatnonzero(weights >= least) if tokens is None else tokens[weights[tokens] >= least]
        return Law(tokens, np.cumsum(weights[tokens], dtype=np.float64))


def _nucleus(weights: FloatArray, tokens: npt.NDArray[np.intp] | None, share: float) -> npt.NDArray[np.intp]:
    """The fewest of the tokens, or of all, that hold at least a share of their mass."""
    held = weights if tokens is None else weights[tokens]
    wanted = share * held.sum(dtype=np.float64)
    # sorting the whole vocabulary would cost more than a small model's forward pass
    for least in (_LIKELY, _SMALLEST):
        places = np.flatnonzero(held >= least)
        places = places[np.argsort(-held[places], kind="stable")]
        mass = np.cumsum(held[places], dtype=np.float64)
        if len(mass) and mass[-1] >= wanted:
            break
    chosen = places[: int(np.searchsorted(mass, wanted)) + 1]
    return chosen if tokens is None else tokens[chosen]
