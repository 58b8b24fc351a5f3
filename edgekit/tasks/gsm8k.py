"""Grade-school arithmetic in words: `gsm8k:FILE.jsonl` with `question` and `answer`, which ends in `#### NUMBER`.

The layout is that of GSM8K (Cobbe et al., arXiv:2110.14168).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from pydantic import Field

from edgekit.config import Strict
from edgekit.errors import InputError
from edgekit.tasks import Problem, Split, read_lines, shuffle

SUMMARY = "word problems of a file in the layout of GSM8K"
_NUMBER = re.compile(r"(?:(?<![\w)])-)?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")
_LONGEST_NUMBER = 40
_HINT = "\nThink step by step. End with #### and the number."


class Row(Strict):
    """A line of the file."""

    question: str = Field(min_length=1)
    answer: str = Field(pattern=r"####\s*[$-]*[0-9][0-9,]*(\.[0-9]+)?\s*$")
    """The reasoning, then `####` and the number."""


@dataclass(frozen=True)
class Gsm8k:
    """The task over one file."""

    name: str
    rows: tuple[Row, ...]
    summary: str = SUMMARY
    answer: str = "last-number"
    stop: tuple[str, ...] = ()
    max_tokens: int = 256

    def problems(self, split: Split, count: int | None, seed: int = 0) -> list[Problem]:
        """Questions of the file, each with a hint how to end the answer."""
        every = [Problem(row.question + _HINT, {"number": str(last_number(row.answer))}) for row in self.rows]
        return shuffle(every, split, count, seed)

    def check(self, problem: Problem, answer: str) -> float:
        """1 when the last number of the answer is the right one; `$1,200.00` and `1200 apples` are 1200."""
        return float(last_number(answer) == Decimal(problem.data["number"]))


def last_number(text: str) -> Decimal | None:
    """The last number of a text without commas for thousands, or None."""
    found = _NUMBER.findall(text)
    if not found or len(found[-1]) > _LONGEST_NUMBER:
        return None
    return Decimal(found[-1].replace(",", ""))


def open_task(name: str, argument: str) -> Gsm8k:
    """`argument`: the file."""
    if not argument:
        raise InputError("a file of problems", "none", "use gsm8k:FILE.jsonl")
    return Gsm8k(name, tuple(read_lines(Path(argument).expanduser(), Row)))
