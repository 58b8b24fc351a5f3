"""This machine as a device: every job is a process of its own, in a process group of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import edgekit
import edgekit.errors
from edgekit.devices import Answered, Device, Fingerprint, Job, JobResult, describe_machine
from edgekit.devices.agent import END_WITH_STDIN
from edgekit.errors import EdgekitError, InputError, ToolError
from edgekit.measurement import Measurement

_POLL_S = 0.05
_GRACE_S = 2.0  # between asking a process to end and killing it


def open_device(url: str) -> Device:
    """Return this machine; the URL is `local`."""
    if url != "local":
        raise InputError("the device `local`", repr(url), "use local, without anything behind it")
    return Local()


def fingerprint() -> str:
    """Short, stable text that stands for this machine in measurements."""
    return describe_machine().text


class Local:
    """This machine."""

    def fingerprint(self) -> Fingerprint:
        """Describe this machine."""
        return describe_machine()

    def run(
        self, job: Job, *, timeout_s: float | None = None, progress: Callable[[str], None] | None = None
    ) -> JobResult:
        """Run the job with this interpreter; on a timeout or an interrupt its whole process group is killed.

        Raises:
            EdgekitError: what the job itself raised.
            ToolError: its process was killed for lack of memory, crashed, ended early or ran out of time.
        """
        with tempfile.TemporaryDirectory(prefix="edgekit-job-") as name:
            directory = Path(name)
            # the job's process runs elsewhere
            model = str(Path(job.model).absolute())
            measure = job.measure
            if measure.divergence is not None:
                reference = str(Path(measure.divergence.reference).absolute())
                divergence = measure.divergence.model_copy(update={"reference": reference})
                measure = measure.model_copy(update={"divergence": divergence})
            if measure.answers is not None:
                bundle = str(Path(measure.answers.bundle).absolute())
                answers = measure.answers.model_copy(update={"bundle": bundle})
                measure = measure.model_copy(update={"answers": answers})
            resolved = job.model_copy(update={"model": model, "measure": measure})
            job_path, result_path, log_path = (directory / n for n in ("job.json", "result.jsonl", "stderr.txt"))
            job_path.write_text(resolved.model_dump_json())
            result_path.touch()
            lines = _Lines(result_path, progress)
            kills_before = oom_kills()
            with log_path.open("wb") as log, _process(agent_command(job_path, result_path), directory, log) as process:
                code = _wait(process, timeout_s, lines)
            lines.read()
            return _result(lines.found, code, oom_kills() > kills_before, log_path.read_text(errors="replace"))


def agent_command(job_path: Path, result_path: Path) -> list[str]:
    """The command line that runs a job here; -P keeps the working directory off the module path."""
    return [sys.executable, "-P", "-m", "edgekit.devices.agent", str(job_path), str(result_path), END_WITH_STDIN]


def oom_kills() -> int:
    """Processes that the kernel has killed for lack of memory since boot (Linux; 0 elsewhere)."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


@contextlib.contextmanager
def _process(command: list[str], directory: Path, log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in its own group, and end the whole group when the block ends."""
    package_root = str(Path(edgekit.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,  # its end tells the job that this process is gone, however it went
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end_group(process)
        if process.stdin:
            process.stdin.close()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for sign, patience in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, None)):
        if process.poll() is not None and sign is signal.SIGTERM:
            continue  # only stragglers of its group may be left
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def _wait(process: subprocess.Popen[bytes], timeout_s: float | None, lines: _Lines) -> int:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        try:
            return process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            lines.read()
        if deadline is not None and time.monotonic() > deadline:
            raise ToolError(
                f"a job that ends within {timeout_s:g} s", "it still ran and was ended", "raise the time limit"
            )


class _Lines:
    """The complete lines of a file that is being appended to."""

    def __init__(self, path: Path, progress: Callable[[str], None] | None) -> None:
        self.found: list[dict[str, Any]] = []
        self._path = path
        self._offset = 0
        self._progress = progress

    def read(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        end = text.rfind(b"\n") + 1
        self._offset += end
        for line in text[:end].splitlines():
            fields = json.loads(line)
            self.found.append(fields)
            if self._progress is not None and fields["type"] in ("measurement", "answer"):
                self._progress(fields["measurement"]["name"] if fields["type"] == "measurement" else "answer")


def _result(lines: list[dict[str, Any]], code: int, oom_killed: bool, log: str) -> JobResult:
    for line in lines:
        if line["type"] == "error":
            raise _error(line)
    if code != 0 or not lines or lines[-1]["type"] != "done":
        raise ToolError("a job that runs to its end", _failure(code, oom_killed, log), _advice(code))
    build = [line for line in lines if line["type"] == "build"][-1]
    windows = next((line["values"] for line in lines if line["type"] == "divergence_per_window"), ())
    return JobResult(
        device=build["device"],
        build=build["info"],
        measurements=tuple(
            Measurement.model_validate(line["measurement"]) for line in lines if line["type"] == "measurement"
        ),
        divergence_per_window=tuple(windows),
        answers=tuple(Answered.model_validate(line["answer"]) for line in lines if line["type"] == "answer"),
    )


def _error(line: dict[str, Any]) -> EdgekitError:
    kind = getattr(edgekit.errors, line["error"], ToolError)
    error: EdgekitError = kind(line["wanted"], line["found"], line["next_command"])
    return error


def _failure(code: int, oom_killed: bool, log: str) -> str:
    """Say how a process ended: out of memory, killed, crashed or failed."""
    told = [line.strip() for line in log.splitlines() if line.strip()]
    if code == -signal.SIGKILL:
        if oom_killed:
            return "its process was killed by the kernel: out of memory"
        return "its process was killed with SIGKILL, by someone or for lack of memory"
    if code < 0:
        # faulthandler names the signal first, then prints the stack
        return f"its process crashed with {signal.Signals(-code).name}" + (f": {told[0]}" if told else "")
    return f"its process ended early with exit code {code}" + (f": {told[-1]}" if told else "")


def _advice(code: int) -> str:
    if code == -signal.SIGKILL:
        return "use a smaller type or a shorter context, or free memory"
    return "edgekit doctor"
