"""Sums and products of whole numbers, as few-shot text to continue.

`arithmetic` adds two numbers of two digits; `arithmetic:3x2` of three and two; `arithmetic:2x1*` multiplies.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from edgekit.errors import InputError
from edgekit.tasks import Problem, Split, choose, shuffle

SUMMARY = "sums or products of whole numbers"
_MOST_PAIRS = 100_000  # as many are listed; of more, some are drawn
# A 135M model answers few questions put in words, but continues a list of two sums; a third or eighth did not help
_EXAMPLES = (("127604", "354182"), ("583417", "241965"))


@dataclass(frozen=True)
class Arithmetic:
    """The task: `digits` of both numbers, and the sign between them."""

    name: str
    digits: tuple[int, int] = (2, 2)
    sign: Literal["+", "*"] = "+"
    summary: str = SUMMARY
    answer: str = "integer"
    stop: tuple[str, ...] = ("\n",)
    max_tokens: int = 12

    def problems(self, split: Split, count: int | None, seed: int = 0) -> list[Problem]:
        """All pairs of a split for up to five digits together; else drawn ones, 1000 when `count` is None."""
        left, right = (range(10 ** (n - 1), 10**n) for n in self.digits)
        if len(left) * len(right) <= _MOST_PAIRS:
            return shuffle([self._problem(a, b) for a, b in itertools.product(left, right)], split, count, seed)
        return choose(self._draw(left, right, seed), split, 1000 if count is None else count)

    def _draw(self, left: range, right: range, seed: int) -> Iterator[Problem]:
        draw = random.Random(seed)  # noqa: S311 - puzzles, no secrets
        while True:
            yield self._problem(draw.choice(left), draw.choice(right))

    def _problem(self, a: int, b: int) -> Problem:
        pairs = [tuple(int(text[:n]) for text, n in zip(pair, self.digits, strict=True)) for pair in _EXAMPLES]
        shots = "".join(f"{x} {self.sign} {y} = {self._result(x, y)}\n" for x, y in pairs)
        return Problem(f"{shots}{a} {self.sign} {b} =", {"result": self._result(a, b)}, chat=False)

    def _result(self, a: int, b: int) -> int:
        return a + b if self.sign == "+" else a * b

    def check(self, problem: Problem, answer: str) -> float:
        """1 when the first whole number in the answer is the result."""
        found = re.search(r"-?[0-9]+", answer)
        return float(found is not None and len(found[0]) < 40 and int(found[0]) == problem.data["result"])


def open_task(name: str, argument: str) -> Arithmetic:
    """`argument`: digits of both numbers, from 1 to 6, and `*` to multiply; empty for `2x2`."""
    found = re.fullmatch(r"([1-6])x([1-6])([+*]?)", argument or "2x2")
    if found is None:
        raise InputError("digits of two numbers, like 2x2 or 3x1*", repr(argument), "use arithmetic:2x2")
    return Arithmetic(name, (int(found[1]), int(found[2])), "*" if found[3] == "*" else "+")
