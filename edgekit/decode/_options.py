"""What a strategy is told: how to draw tokens, how much it may spend, and when an answer ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgekit.decode._answers import find_answer
from edgekit.decode._sampling import Sampling
from edgekit.errors import InputError

MAX_TILT = 32
"""The smallest V to this power is still a number."""


@dataclass(frozen=True)
class Budget:
    """Most that one question may cost; None has no bound. The first bound that is reached ends the search."""

    tokens: int | None = None
    """Tokens forward: positions computed by the base, the prompt's among them."""
    seconds: float | None = None
    joules: float | None = None
    """Needs the power of the device: `Traffic.watts`."""

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("seconds", self.seconds), ("joules", self.joules)):
            if value is not None and value <= 0:
                raise InputError(f"a budget of {name} above 0", str(value), "raise it, or leave it out")


@dataclass(frozen=True)
class Traffic:
    """What a step costs on a device beside time: figures of the bundle and its target."""

    weight_bytes: int = 0
    """Read once a step, whatever the number of sequences in it."""
    kv_bytes_per_token: int = 0
    """Read for every position before the one computed."""
    watts: float | None = None
    """Power while decoding."""


@dataclass(frozen=True)
class Choice:
    """What to do with questions up to a difficulty (`auto`)."""

    difficulty: float
    """1 - V, from 0 to 1."""
    strategy: str
    candidates: int


@dataclass(frozen=True)
class Options:
    """Arguments of every strategy; one that has no use for an argument leaves it alone."""

    candidates: int = 8
    """Answers to draw, beams to keep in reserve, or simulations."""
    max_tokens: int = 256
    """Longest answer."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Strings that end an answer and are no part of it."""
    answer: str = "text"
    """How two answers are compared in a vote: see `_answers.py`."""
    seed: int = 0
    budget: Budget = Budget()
    block_tokens: int = 16
    """Longest step of a strategy that walks over blocks."""
    block_end: str | None = "\n"
    """A string that ends a block early, such as the end of a line."""
    width: int = 4
    """Beams that go on (`beam`), children of a node (`mcts`), proposals drawn at once (`vgb`)."""
    balance: float = 0.1
    """REBASE's temperature: how sharply the budget follows the values."""
    exploration: float = 1.0
    """The constant C of UCT (`mcts`)."""
    momentum: float | None = None
    """Walk with this momentum, from 0 to 1 (`vgb`); None is the plain walk."""
    steps: int = 64
    """Steps of the walk before one looks whether it is at an end (`vgb`)."""
    tilt: float = 1.0
    """The power of V that the walk draws in proportion to (`vgb`): above 1 it looks for the best, below for many."""
    choices: tuple[Choice, ...] = ()
    """By rising difficulty (`auto`)."""
    revise: Callable[[Sequence[str]], list[int]] | None = None
    """Makes the prompt, as tokens, that asks to revise the answers so far (`revise`)."""

    def __post_init__(self) -> None:
        for name in ("candidates", "max_tokens", "block_tokens", "width", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of at least 1", str(getattr(self, name)), f"raise {name}")
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise InputError("a momentum from 0 to 1", str(self.momentum), "change momentum")
        if not 0 < self.tilt <= MAX_TILT:
            raise InputError(f"a tilt above 0, at most {MAX_TILT}", str(self.tilt), "change tilt")
        if self.balance <= 0:
            raise InputError("a balance above 0", str(self.balance), "raise balance")
        if any(not text for text in self.stop):
            raise InputError("stop strings of at least one character", "an empty one", "leave it out")
        find_answer(self.answer)
