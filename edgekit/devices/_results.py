"""What an agent wrote, read as untrusted text: its lines, how its process ended, and the result they make."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, FiniteFloat, StringConstraints, TypeAdapter, ValidationError

from edgekit import errors
from edgekit.config import Strict
from edgekit.devices import Answered, Job, JobResult
from edgekit.devices.board import BoardRecord, BoardState, flags_of, throttled
from edgekit.errors import EdgekitError, ToolError
from edgekit.measurement import Measurement

MAX_LINE_CHARACTERS = 1 << 20
MAX_LINES = 1 << 20
MAX_CHARACTERS = 1 << 26
"""Of all lines of a job together."""


def printable(text: str) -> str:
    """The text without what a terminal would obey: everything that does not print becomes a question mark."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "?" for c in text)


Text = Annotated[str, StringConstraints(max_length=4096), AfterValidator(printable)]


def _checked_measurement(measurement: Measurement) -> Measurement:
    if not all(math.isfinite(bound) for bound in (measurement.ci_low or 0, measurement.ci_high or 0)):
        raise ValueError("an interval that is not finite")
    texts = {name: value for name in ("name", "unit", "device", "of", "note") if (value := getattr(measurement, name))}
    return measurement.model_copy(update={name: printable(value)[:4096] for name, value in texts.items()})


def _checked_answer(answer: Answered) -> Answered:
    if not math.isfinite(answer.seconds):
        raise ValueError("a time that is not finite")
    return answer


class BuildLine(Strict):
    """Which machine and engine measure; the last one also tells what the opened model said."""

    type: Literal["build"]
    device: Text
    info: dict[Text, Text]


class LoadedLine(Strict):
    """A model was opened, and where it runs."""

    type: Literal["loaded"]
    info: dict[Text, Text]


class BoardLine(Strict):
    """The state of the machine."""

    type: Literal["board"]
    state: BoardState


class SamplesLine(Strict):
    """Every sample behind a figure."""

    type: Literal["samples"]
    name: Text
    values: tuple[FiniteFloat, ...]


class MeasurementLine(Strict):
    """A figure."""

    type: Literal["measurement"]
    measurement: Annotated[Measurement, AfterValidator(_checked_measurement)]


class WindowsLine(Strict):
    """Mean KL divergence of each window."""

    type: Literal["divergence_per_window"]
    values: tuple[FiniteFloat, ...]


class AnswerLine(Strict):
    """An answer."""

    type: Literal["answer"]
    answer: Annotated[Answered, AfterValidator(_checked_answer)]


class PartLine(Strict):
    """One part of the job is done: the lines before it need not be made again."""

    type: Literal["part"]
    part: Literal["latency", "divergence", "answers"]


class ErrorLine(Strict):
    """What the job raised."""

    type: Literal["error"]
    error: Text
    wanted: Text
    found: Text
    next_command: Text


class DoneLine(Strict):
    """The job came to its end."""

    type: Literal["done"]


Line = Annotated[
    BuildLine
    | LoadedLine
    | BoardLine
    | SamplesLine
    | MeasurementLine
    | WindowsLine
    | AnswerLine
    | PartLine
    | ErrorLine
    | DoneLine,
    Field(discriminator="type"),
]
_LINE: TypeAdapter[Line] = TypeAdapter(Line)


@dataclass(frozen=True)
class End:
    """How an agent's process ended."""

    code: int
    """Exit code, or the negative number of the signal."""
    oom_killed: bool
    """Whether the kernel killed a process for lack of memory meanwhile."""
    log: str


class LineReader:
    """Parses lines as they arrive and tells of measurements and answers."""

    def __init__(self, progress: Callable[[str], None] | None = None) -> None:
        self.found: list[Line] = []
        self._progress = progress
        self._characters = 0

    def add(self, text: str) -> Line:
        """Take one line. Raises ToolError for anything that no agent of this edgekit writes."""
        self._characters += len(text)
        if len(text) > MAX_LINE_CHARACTERS or len(self.found) >= MAX_LINES or self._characters > MAX_CHARACTERS:
            raise _wrong("far more text than any job gives")
        try:
            line = _LINE.validate_json(text)
        except ValidationError as error:
            detail = error.errors()[0]
            place = ".".join(map(str, detail["loc"]))
            raise _wrong(printable(f"{place}: {detail['msg']}".removeprefix(": "))[:500]) from None
        self.found.append(line)
        if self._progress is not None and isinstance(line, MeasurementLine | AnswerLine):
            self._progress(line.measurement.name if isinstance(line, MeasurementLine) else "answer")
        return line


def _wrong(found: str) -> ToolError:
    return ToolError("result lines of this edgekit's agent", found, "use one edgekit version; edgekit doctor")


def keep(lines: Sequence[Line]) -> list[Line]:
    """Lines of an attempt that was cut off which stay good: those of its finished parts, and every answer."""
    ends = [index for index, line in enumerate(lines) if isinstance(line, PartLine)]
    end = ends[-1] + 1 if ends else 0
    # the state and the build of the machine, as the first of them tell, belong to the answers as well
    alone = [line for line in lines[end:] if isinstance(line, AnswerLine)]
    head = [line for line in lines[:2] if isinstance(line, BuildLine | BoardLine)] if alone and not end else []
    return [*lines[:end], *head, *alone]


def remaining(job: Job, kept: Iterable[Line]) -> Job | None:
    """The job without what the kept lines hold; None when nothing is left."""
    lines = list(kept)
    done: dict[str, Any] = {line.part: None for line in lines if isinstance(line, PartLine)}
    measure = job.measure.model_copy(update=done)
    if measure.answers is not None:
        count = sum(isinstance(line, AnswerLine) for line in lines)
        left = measure.answers.questions[count:]
        # a question's seed counts from the first question on
        answers = measure.answers.model_copy(update={"questions": left, "seed": measure.answers.seed + count})
        measure = measure.model_copy(update={"answers": answers if left else None})
    if not any((measure.latency, measure.divergence, measure.answers)) and lines:
        return None
    return job.model_copy(update={"measure": measure})


def build_result(lines: Sequence[Line], end: End, attempts: int = 1) -> JobResult:
    """Put a finished job's lines together; raises what it raised, or ToolError for how its process ended."""
    for line in lines:
        if isinstance(line, ErrorLine):
            raise _error(line)
    builds = [line for line in lines if isinstance(line, BuildLine)]
    if end.code != 0 or not builds or not isinstance(lines[-1], DoneLine):
        raise ToolError("a job that runs to its end", failure(end), advice(end))
    build = builds[-1]
    states = [line.state for line in lines if isinstance(line, BoardLine)]
    windows = [line.values for line in lines if isinstance(line, WindowsLine)]
    board = None
    if states:
        flags = flags_of(states[0], states[-1], build.info)
        if attempts > 1:
            flags = (*flags, f"measured in {attempts} attempts: the connection was lost in between")
        slowed = throttled(states[0], states[-1])
        board = BoardRecord(start=states[0], end=states[-1], throttled=slowed, flags=flags)
    return JobResult(
        device=build.device,
        build=build.info,
        measurements=tuple(line.measurement for line in lines if isinstance(line, MeasurementLine)),
        samples={line.name: line.values for line in lines if isinstance(line, SamplesLine)},
        divergence_per_window=windows[0] if windows else (),
        answers=tuple(line.answer for line in lines if isinstance(line, AnswerLine)),
        board=board,
    )


def _error(line: ErrorLine) -> EdgekitError:
    kinds = {kind.__name__: kind for kind in (errors.InputError, errors.DoesNotFit, errors.ToolError)}
    return kinds.get(line.error, ToolError)(line.wanted, line.found, line.next_command)


def failure(end: End) -> str:
    """Say how a process ended: out of memory, killed, crashed or failed."""
    told = [printable(text)[:500] for line in end.log.splitlines() if (text := line.strip())]
    if end.code == -signal.SIGKILL:
        if end.oom_killed:
            return "its process was killed by the kernel: out of memory"
        return "its process was killed with SIGKILL, by someone or for lack of memory"
    if end.code < 0:
        known = {number.value for number in signal.Signals}
        name = signal.Signals(-end.code).name if -end.code in known else f"signal {-end.code}"
        # faulthandler names the signal first, then prints the stack
        return f"its process crashed with {name}" + (f": {told[0]}" if told else "")
    return f"its process ended early with exit code {end.code}" + (f": {told[-1]}" if told else "")


def advice(end: End) -> str:
    """The next command after such an end."""
    if end.code == -signal.SIGKILL:
        return "use a smaller type or a shorter context, or free memory"
    return "edgekit doctor"
