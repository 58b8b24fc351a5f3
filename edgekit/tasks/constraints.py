"""Instructions whose observance a program can verify, after IFEval (Zhou et al., arXiv:2311.07911); all texts are ours.

Each problem asks for a text on a subject under one to three constraints; only an answer that meets all of them counts.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from edgekit.errors import InputError
from edgekit.tasks import Problem, Split, choose

SUMMARY = "texts that must meet constraints: length, words, form"
_SUBJECTS = (
    "a walk in the rain",
    "an old bicycle",
    "how bread is baked",
    "a lighthouse",
    "the first day at work",
    "a cat on a roof",
    "why the sky is blue",
    "a market in summer",
    "learning to swim",
    "a lost letter",
    "growing tomatoes",
    "a night train",
)
_WORDS = [
    "green",
    "quiet",
    "window",
    "water",
    "small",
    "morning",
    "together",
    "stone",
    "simple",
    "warm",
    "paper",
    "river",
]
_ENDINGS = ("That is all.", "The end.", "Thank you for reading.", "And so it goes.")


def _count_words(text: str) -> int:
    return len(text.split())


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def _count_bullets(text: str) -> int:
    return len(re.findall(r"^[ \t]*[*-][ \t]+\S", text, re.MULTILINE))


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


@dataclass(frozen=True)
class _Kind:
    instruction: str
    values: tuple[Any, ...]
    holds: Callable[[str, Any], bool]
    excludes: tuple[str, ...] = ()
    """Kinds that cannot be asked for together with this one."""


KINDS: dict[str, _Kind] = {
    "most-words": _Kind(
        "Use at most {} words.", (10, 20, 30, 50), lambda t, n: 0 < _count_words(t) <= n, ("least-words",)
    ),
    "least-words": _Kind("Use at least {} words.", (20, 30, 50), lambda t, n: _count_words(t) >= n),
    "contains": _Kind("Use the word {}.", tuple(_WORDS[:6]), _has_word),
    "avoids": _Kind(
        "Do not use the word {}.", (*_WORDS[6:], "the", "and"), lambda t, w: bool(t) and not _has_word(t, w)
    ),
    "lower-case": _Kind("Write in lower case only.", (None,), lambda t, _: bool(t) and t == t.lower(), ("ends-with",)),
    "bullets": _Kind(
        "Give exactly {} bullet points, each on a line that starts with *.",
        (2, 3, 4),
        lambda t, n: _count_bullets(t) == n,
        ("json",),
    ),
    "ends-with": _Kind('End with the sentence "{}"', _ENDINGS, lambda t, e: t.endswith(e), ("json", "avoids")),
    "no-commas": _Kind("Do not use commas.", (None,), lambda t, _: bool(t) and "," not in t),
    "json": _Kind("Answer with a JSON object only.", (None,), lambda t, _: _is_json(t), ("no-commas",)),
}


@dataclass(frozen=True)
class Constraints:
    """The task."""

    name: str
    summary: str = SUMMARY
    answer: str = "text"
    stop: tuple[str, ...] = ()
    max_tokens: int = 128

    def problems(self, split: Split, count: int | None, seed: int = 0) -> list[Problem]:
        """Drawn combinations; `count` None gives 1000."""
        return choose(self._draw(seed), split, 1000 if count is None else count)

    def _draw(self, seed: int) -> Iterator[Problem]:
        draw = random.Random(seed)  # noqa: S311 - puzzles, no secrets
        while True:
            kinds: list[str] = []
            for kind in draw.sample(list(KINDS), draw.randint(1, 3)):
                if not any(kind in KINDS[other].excludes or other in KINDS[kind].excludes for other in kinds):
                    kinds.append(kind)
            wanted = [[kind, draw.choice(KINDS[kind].values)] for kind in kinds]
            orders = " ".join(KINDS[kind].instruction.format(value) for kind, value in wanted)
            yield Problem(f"Write about {draw.choice(_SUBJECTS)}. {orders}", {"constraints": wanted})

    def check(self, problem: Problem, answer: str) -> float:
        """1 when every constraint holds; blanks around the answer do not count."""
        text = answer.strip()
        return float(all(KINDS[kind].holds(text, value) for kind, value in problem.data["constraints"]))


def open_task(name: str, argument: str) -> Constraints:
    """Takes no argument."""
    if argument:
        raise InputError("constraints alone", f"{argument!r} behind it", "use constraints")
    return Constraints(name)
