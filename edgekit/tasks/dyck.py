"""Dyck words: a beginning of brackets of four kinds, to be completed to a balanced word of a given length.

The task of "Taming Imperfect Process Verifiers" (arXiv:2510.03149), as few-shot text. `dyck:24` asks for 24 brackets;
without an argument it is 12.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edgekit.errors import InputError
from edgekit.tasks import Problem, Split, choose

SUMMARY = "beginnings of brackets, to be balanced"
_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}
_LONGEST = 200
_EXAMPLES = 3


@dataclass(frozen=True)
class Dyck:
    """The task: `length` is that of a whole word."""

    name: str
    length: int = 12
    summary: str = SUMMARY
    answer: str = "line"
    stop: tuple[str, ...] = ("\n",)

    @property
    def max_tokens(self) -> int:
        """A token for each bracket that may be missing."""
        return self.length

    def problems(self, split: Split, count: int | None, seed: int = 0) -> list[Problem]:
        """Drawn words, cut somewhere in their second half; `count` None gives 1000."""
        return choose(self._draw(seed), split, 1000 if count is None else count)

    def _draw(self, seed: int) -> Iterator[Problem]:
        examples = random.Random(0)  # noqa: S311 - the same ones for every seed
        shots = "".join(dyck_word(examples, self.length) + "\n" for _ in range(_EXAMPLES))
        draw = random.Random(seed)  # noqa: S311 - puzzles, no secrets
        while True:
            beginning = dyck_word(draw, self.length)[: draw.randrange(self.length // 2, self.length)]
            yield Problem(shots + beginning, {"beginning": beginning, "length": self.length}, chat=False)

    def check(self, problem: Problem, answer: str) -> float:
        """1 when beginning and answer are a balanced word of the right length, blanks around aside."""
        word = problem.data["beginning"] + answer.strip()
        return float(len(word) == problem.data["length"] and balanced(word))


def balanced(word: str) -> bool:
    """Whether a word consists of brackets, each closed by its own kind in the right order."""
    expected: list[str] = []
    for letter in word:
        if letter in _PAIRS:
            expected.append(_PAIRS[letter])
        elif not expected or expected.pop() != letter:
            return False
    return not expected


def dyck_word(draw: random.Random, length: int, pairs: Mapping[str, str] = _PAIRS) -> str:
    """A balanced word: a walk that opens as often as it closes where both are possible."""
    word, expected = "", ""
    while len(word) < length:
        left = length - len(word)
        if not expected or (len(expected) < left and draw.random() < 0.5):
            opened = draw.choice(list(pairs))
            word += opened
            expected += pairs[opened]
        else:
            word += expected[-1]
            expected = expected[:-1]
    return word


def open_task(name: str, argument: str) -> Dyck:
    """`argument`: length of a whole word, even; empty for 12."""
    if not argument:
        return Dyck(name)
    if not (argument.isascii() and argument.isdigit() and len(argument) < 4):
        raise InputError("a length of words", repr(argument), "use dyck:12")
    length = int(argument)
    if length % 2 or not 4 <= length <= _LONGEST:
        raise InputError(f"an even length from 4 to {_LONGEST}", argument, "use dyck:12")
    return Dyck(name, length)
