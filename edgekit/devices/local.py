"""This machine as a device: every job is a process of its own, in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgekit
from edgekit.devices import Device, Fingerprint, Job, JobResult, describe_machine
from edgekit.devices._remote import GRACE_S, Lines, end_group, oom_kills
from edgekit.devices._results import End, LineReader, build_result
from edgekit.devices.agent import END_WITH_STDIN
from edgekit.errors import InputError, ToolError

if TYPE_CHECKING:
    from edgekit.devices.probe import Probed

_POLL_S = 0.05
_GRACE_S = GRACE_S  # between asking a process to end and killing it


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

    def __init__(self, python: Sequence[str] = (sys.executable, "-P"), environment: Mapping[str, str] | None = None):
        """`python` starts a job's interpreter in an environment; -P keeps the working directory off its module path."""
        self.python = tuple(python)
        package_root = str(Path(edgekit.__file__).parents[1])
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        self.environment = environment or {**os.environ, "PYTHONPATH": path}

    def fingerprint(self) -> Fingerprint:
        """Describe this machine."""
        return describe_machine()

    def probe(self) -> Probed:
        """Measure this machine, in this process."""
        from edgekit.devices.probe import probe_machine

        return probe_machine()

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
            resolved = job.with_paths(lambda path: str(Path(path).absolute()))
            job_path, result_path, log_path = (directory / n for n in ("job.json", "result.jsonl", "stderr.txt"))
            job_path.write_text(resolved.model_dump_json())
            result_path.touch()
            lines, reader = Lines(result_path), LineReader(progress)

            def read() -> None:
                for line in lines.read():
                    reader.add(line)

            kills_before = oom_kills()
            command = agent_command(self.python, job_path, result_path)
            with log_path.open("wb") as log, _process(command, self.environment, directory, log) as process:
                code = _wait(process, timeout_s, read)
            read()
            end = End(code, oom_kills() > kills_before, log_path.read_text(errors="replace"))
            return build_result(reader.found, end)


def agent_command(python: Sequence[str], job_path: Path, result_path: Path) -> list[str]:
    """The command line that runs a job by an interpreter."""
    return [*python, "-m", "edgekit.devices.agent", str(job_path), str(result_path), END_WITH_STDIN]


@contextlib.contextmanager
def _process(
    command: list[str], environment: Mapping[str, str], directory: Path, log: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in its own group, and end the whole group when the block ends."""
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=dict(environment),
        stdin=subprocess.PIPE,  # its end tells the job that this process is gone, however it went
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end_group(process, _GRACE_S)
        if process.stdin:
            process.stdin.close()


def _wait(process: subprocess.Popen[bytes], timeout_s: float | None, read: Callable[[], None]) -> int:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        try:
            return process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            read()
        if deadline is not None and time.monotonic() > deadline:
            raise ToolError(
                f"a job that ends within {timeout_s:g} s", "it still ran and was ended", "raise the time limit"
            )
