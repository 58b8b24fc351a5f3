"""Functions to be written from their docstrings: `python-functions:FILE.jsonl[.gz]` in the layout of HumanEval.

Chen et al., "Evaluating Large Language Models Trained on Code", arXiv:2107.03374. The answer continues the prompt as
it stands; stop strings cut whatever follows the function. Answers run in the sandbox, and so do the file's tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from edgekit.config import Strict
from edgekit.errors import InputError
from edgekit.sandbox import run_untrusted
from edgekit.tasks import Problem, Split, read_lines, shuffle

SUMMARY = "Python functions of a file in the layout of HumanEval"
STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint")


class Row(Strict):
    """A line of the file."""

    task_id: str
    prompt: str = Field(min_length=1)
    """Imports, perhaps helpers, and the function's head with its docstring."""
    entry_point: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the function."""
    test: str
    """Defines `check(candidate)`."""
    canonical_solution: str = ""


@dataclass(frozen=True)
class PythonFunctions:
    """The task over one file."""

    name: str
    rows: tuple[Row, ...]
    timeout_s: float = 5.0
    summary: str = SUMMARY
    answer: str = "code"
    stop: tuple[str, ...] = STOP
    max_tokens: int = 256

    def problems(self, split: Split, count: int | None, seed: int = 0) -> list[Problem]:
        """Functions of the file."""
        kept = {"task_id", "entry_point", "test"}
        every = [Problem(row.prompt, row.model_dump(include=kept), chat=False) for row in self.rows]
        return shuffle(every, split, count, seed)

    def check(self, problem: Problem, answer: str) -> float:
        """1 when all tests of the function pass in time.

        Tests see copies of plain data: one that passes a function, or looks whether an argument changed, fails.
        """
        function = problem.data["entry_point"]
        # tests may use helpers that the prompt defines
        bound = f"{function} = untrusted({function!r})"
        tests = f"{problem.prompt}\n{bound}\n{problem.data['test']}\ncheck({function})\n"
        return float(run_untrusted(problem.prompt + answer, tests=tests, timeout_s=self.timeout_s).ok)


def open_task(name: str, argument: str) -> PythonFunctions:
    """`argument`: the file, perhaps gzipped."""
    if not argument:
        raise InputError("a file in the layout of HumanEval", "none", "use python-functions:HumanEval.jsonl.gz")
    return PythonFunctions(name, tuple(read_lines(Path(argument).expanduser(), Row)))
