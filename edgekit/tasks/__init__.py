"""Problems with checkers: one file per task, found by its name, for labelling rollouts and measuring strategies.

A task's file has a `SUMMARY` and a function `open_task(name, argument)`; the argument is what stands behind the colon
in `gsm8k:questions.jsonl`. Tasks also run on devices: numpy, pydantic and the standard library, no torch.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import pkgutil
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

from pydantic import ValidationError

from edgekit.config import Strict, explain
from edgekit.errors import InputError, suggest

Split = Literal["train", "validation", "test"]
MAX_FILE_BYTES = 256 << 20
"""Most bytes of a file of problems, unpacked."""
_PATIENCE = 10_000  # candidates in a row that are old or of another split: an endless task has no more

M = TypeVar("M", bound=Strict)


@dataclass(frozen=True)
class Problem:
    """One problem."""

    prompt: str
    """The user's message, or the raw text to continue."""
    data: Mapping[str, Any]
    """What the checker needs: plain JSON."""
    system: str | None = None
    """System message."""
    chat: bool = True
    """False: the model continues `prompt` as it stands, without a chat template."""


class Task(Protocol):
    """Problems, and how answers to them are judged."""

    @property
    def name(self) -> str:
        """As the user wrote it."""
        ...

    @property
    def summary(self) -> str:
        """What is asked, in a few words."""
        ...

    @property
    def answer(self) -> str:
        """How answers are compared in a vote: a name that `edgekit.decode.find_answer` knows."""
        ...

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end an answer; they are no part of it."""
        ...

    @property
    def max_tokens(self) -> int:
        """Longest answer."""
        ...

    def problems(self, split: Split, count: int | None, seed: int = 0) -> list[Problem]:
        """At most `count` problems of a split, in an order that the seed decides; None takes all.

        A problem's split is decided by the hash of its prompt, so splits are disjoint whatever the seed.
        """
        ...

    def check(self, problem: Problem, answer: str) -> float:
        """Judge an answer, from 0 (wrong) to 1 (right); pure, but for processes in the sandbox."""
        ...


@cache
def task_names() -> tuple[str, ...]:
    """Names of all tasks: the files of this room."""
    return tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)))


def find_task(name: str) -> Task:
    """Return a task by `NAME` or `NAME:ARGUMENT`. Raises InputError with the closest name."""
    kind, _, argument = name.partition(":")
    kind = kind.replace("_", "-")
    if kind not in task_names():
        known = task_names()
        raise InputError(f"a task named {kind!r}", f"none{suggest(kind, known)}", f"use one of {', '.join(known)}")
    return cast(Task, _module(kind).open_task(name, argument))


def task_sha256(name: str) -> str | None:
    """Digest of the file that a task reads its problems from; None for a task without one."""
    path = Path(name.partition(":")[2]).expanduser()
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def task_summary(name: str) -> str:
    """What the tasks of a file ask, in a few words."""
    return str(_module(name).SUMMARY)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


# --- for the files of this room


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to: three fifths train, a fifth each for validation and test."""
    share = int.from_bytes(hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()[:4]) % 5
    return "validation" if share == 3 else "test" if share == 4 else "train"


def choose(candidates: Iterable[Problem], split: Split, count: int | None) -> list[Problem]:
    """The first `count` different problems of a split; fewer when nothing new comes for long."""
    chosen: dict[str, Problem] = {}
    misses = 0
    for problem in candidates:
        if len(chosen) == count or misses == _PATIENCE:
            break
        if problem.prompt in chosen or split_of(problem.prompt) != split:
            misses += 1
        else:
            chosen[problem.prompt] = problem
            misses = 0
    return list(chosen.values())


def shuffle(problems: Sequence[Problem], split: Split, count: int | None, seed: int) -> list[Problem]:
    """At most `count` of a split's problems out of a finite number, in the seed's order. Equal prompts all stay."""
    members = [problem for problem in problems if split_of(problem.prompt) == split]
    random.Random(seed).shuffle(members)  # noqa: S311 - puzzles, no secrets
    return members[:count]


def read_lines(path: Path, model: type[M]) -> list[M]:
    """Read JSON lines, gzipped if the file is called `.gz`; every line is checked against `model`.

    Raises InputError with the number of the first bad line; also for an empty, huge or unreadable file.
    """
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(model.model_validate(json.loads(line)))
        except ValidationError as error:
            detail = error.errors()[0]
            where = ".".join(map(str, detail["loc"]))
            found = (
                f"{path}:{number}: {where}: {explain(model, detail)}" if where else f"{path}:{number}: {detail['msg']}"
            )
            raise InputError("a well-formed line", found, f"edit {path}") from None
        except (ValueError, RecursionError) as error:
            raise InputError("JSON on every line", f"{path}:{number}: {error}", f"edit {path}") from None
    if not rows:
        raise InputError(f"problems in {path}", "an empty file", "give a file with one JSON object on a line")
    return rows


def _text(path: Path) -> str:
    wanted = f"a file of problems at {path}"
    try:
        with path.open("rb") as raw:
            file = cast(io.BufferedReader, gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        found = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(wanted, found, "check the path") from None
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{wanted} of at most {MAX_FILE_BYTES} bytes", "a larger one", "give a part of it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"UTF-8 in {path}", f"an undecodable byte at {error.start}", "convert the file") from None
