"""Python that parses: heads of small functions to be continued, judged by their syntax alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from edgekit.errors import InputError
from edgekit.sandbox import run_untrusted
from edgekit.tasks import Problem, Split, shuffle
from edgekit.tasks.python_functions import STOP

SUMMARY = "functions that are valid Python, whatever they do"
_LONGEST = 20_000
_SECONDS = 5.0
_RESULTS = ["largest", "smallest", "first", "last", "average", "median", "sum", "product", "longest", "shortest"]
_KINDS = ["numbers", "words", "lines", "prices", "scores", "names"]
_CONDITIONS = (
    "that are not empty",
    "that come twice",
    "before the first zero",
    "at even positions",
    "in reverse order",
    "without duplicates",
    "after sorting",
    "of a file",
)

# without a body before it, a small model takes a docstring for the end
_EXAMPLE = '''def doubles_of(numbers):
    """Return the doubles of the numbers."""
    return [2 * number for number in numbers]


'''


@dataclass(frozen=True)
class PythonSyntax:
    """The task."""

    name: str
    summary: str = SUMMARY
    answer: str = "code"
    stop: tuple[str, ...] = STOP
    max_tokens: int = 96

    def problems(self, split: Split, count: int | None, seed: int = 0) -> list[Problem]:
        """All combinations of what to compute, of what, and under which condition."""
        every = []
        for result, kind, condition in itertools.product(_RESULTS, _KINDS, _CONDITIONS):
            head = f'def {result}_of({kind}):\n    """Return the {result} of the {kind} {condition}."""\n'
            every.append(Problem(_EXAMPLE + head, {}, chat=False))
        return shuffle(every, split, count, seed)

    def check(self, problem: Problem, answer: str) -> float:
        """1 when prompt and answer together parse and the answer is not blank.

        The parser can crash on deep nesting, so it runs in the sandbox, over at most 20,000 characters.
        """
        if not answer.strip() or len(answer) > _LONGEST:
            return 0.0
        source = f"import ast\nast.parse({problem.prompt + answer!a})"
        return float(run_untrusted(source, timeout_s=_SECONDS).ok)


def open_task(name: str, argument: str) -> PythonSyntax:
    """Takes no argument."""
    if argument:
        raise InputError("python-syntax alone", f"{argument!r} behind it", "use python-syntax")
    return PythonSyntax(name)
