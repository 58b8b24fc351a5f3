"""A user's own problems: `jsonl:FILE`, each line with a `prompt` and either `answer`, `regex` or `contains`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from edgekit.config import Strict
from edgekit.errors import InputError
from edgekit.sandbox import run_untrusted
from edgekit.tasks import Problem, Split, read_lines, shuffle

SUMMARY = "problems of a user's own file"
_KINDS = ("answer", "regex", "contains")
_LONGEST_ANSWER = 20_000
_REGEX_SECONDS = 2.0


class Row(Strict):
    """A line of the file."""

    prompt: str = Field(min_length=1)
    system: str | None = None
    chat: bool = True
    """False: the model continues the prompt as it stands."""
    answer: str | None = None
    """The answer, but for blanks around it."""
    regex: str | None = Field(default=None, max_length=1000)
    """Must be found somewhere in the answer."""
    contains: str | None = Field(default=None, min_length=1)
    """Must stand in the answer."""

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"wanted one of {', '.join(_KINDS)}, found {' and '.join(given) or 'none'}")
        return self


@dataclass(frozen=True)
class Jsonl:
    """The task over one file."""

    name: str
    rows: tuple[Row, ...]
    summary: str = SUMMARY
    answer: str = "text"
    stop: tuple[str, ...] = ()
    max_tokens: int = 256

    def problems(self, split: Split, count: int | None, seed: int = 0) -> list[Problem]:
        """Problems of the file."""
        every = [Problem(row.prompt, _wanted(row), row.system, row.chat) for row in self.rows]
        return shuffle(every, split, count, seed)

    def check(self, problem: Problem, answer: str) -> float:
        """1 when the answer is equal, contains the text, or matches.

        A regular expression can take exponential time, so it runs in the sandbox, over at most 20,000 characters and
        2 seconds; what takes longer does not match.
        """
        ((kind, wanted),) = problem.data.items()
        if kind == "answer":
            return float(answer.strip() == wanted.strip())
        if kind == "contains":
            return float(wanted in answer)
        source = f"import re\nassert re.search({wanted!a}, {answer[:_LONGEST_ANSWER]!a})"
        return float(run_untrusted(source, timeout_s=_REGEX_SECONDS).ok)


def _wanted(row: Row) -> dict[str, str]:
    return row.model_dump(include=set(_KINDS), exclude_none=True)


def open_task(name: str, argument: str) -> Jsonl:
    """`argument`: the file."""
    if not argument:
        raise InputError("a file of problems", "none", "use jsonl:FILE")
    return Jsonl(name, tuple(read_lines(Path(argument).expanduser(), Row)))
