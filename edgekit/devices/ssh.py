"""A board behind `ssh://[user@]host[:port]`: OpenSSH's own client carries a job there and its results back.

Needed there: Python 3.9 for `edgekit.devices._remote`, and edgekit with an engine for the job (`edgekit device setup`).
What a job names is uploaded once, by its sha256, and an upload goes on where it stopped. A job ends with the
connection; what it had measured stays in its result file on the board, and the same job asked again takes it from
there.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
import re
import shlex
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError

import edgekit
from edgekit.config import Strict
from edgekit.devices import Device, Fingerprint, Job, JobResult
from edgekit.devices._link import (
    Attempt,
    Ended,
    Everything,
    Held,
    Hello,
    Holder,
    Link,
    LinkLost,
    Locked,
    Missing,
    Offset,
    ResultLine,
    Room,
    Stored,
    TimedOut,
    Unreachable,
    parse_url,
)
from edgekit.devices._results import (
    MAX_CHARACTERS,
    DoneLine,
    End,
    Line,
    LineReader,
    LoadedLine,
    Text,
    build_result,
    failure,
    keep,
    printable,
    remaining,
)
from edgekit.devices._wheel import build_wheel
from edgekit.devices.agent import DESCRIBE, PROBE
from edgekit.devices.board import BoardState
from edgekit.devices.probe import Probed
from edgekit.errors import DoesNotFit, EdgekitError, InputError, ToolError
from edgekit.target import Target

EXTRAS = {"llama_cpp": "gguf", "onnxruntime": "onnx"}
"""The extra of edgekit that brings an engine."""
FRESH_S = 86400.0
"""A result that no client took, or half of one, is used for a day."""
_SPARE_DISK_BYTES = 16 << 20  # results and logs
_PROBE_S = 900.0  # kernels are timed, on a slow board too
_DESCRIBE_S = 180.0  # a slow card takes a minute to import numpy for the first time
_PIP_S = 7200.0  # llama.cpp is compiled there
_CHUNK = 1 << 20
_MAX_PRINTED = 1 << 24  # characters of a command, e.g. of pip that compiles
_TOLD_S = 1.0
_ENTRY_CHARACTERS = 1 << 16  # more than an attempt's log

T = TypeVar("T")
Progress = Callable[[str], None]


def open_device(url: str) -> Device:
    """Return the board; nothing is connected before it is asked for something. Raises InputError for another URL."""
    return Ssh(url)


class Description(Strict):
    """What the agent there says of the machine and of an engine."""

    version: Text
    device: Text
    facts: Annotated[dict[Text, Text | int], Field(max_length=64)]
    build: Annotated[dict[Text, Text], Field(max_length=64)] | None = None
    problem: dict[Literal["error", "wanted", "found", "next_command"], Text] | None = None
    board: BoardState
    target: Target | None = None
    power_sensors: Text = ""


@dataclass(frozen=True)
class Check:
    """What `edgekit device check` found."""

    address: str
    hello: Hello
    python: str
    description: Description | None
    """None where somebody else's job runs, which it would disturb."""


@dataclass(frozen=True)
class _LocalFile:
    path: Path
    sha256: str
    bytes: int


@dataclass(frozen=True)
class _Tree:
    """Files under the names that something on the board reads them by."""

    files: dict[str, _LocalFile]

    @property
    def digest(self) -> str:
        return _sha256_of({name: file.sha256 for name, file in sorted(self.files.items())})

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


@dataclass
class _Packed:
    """A job as the board reads it, and what it needs there."""

    job: Job
    model: _Tree
    trees: list[_Tree] = field(default_factory=list)

    @property
    def id(self) -> str:
        return _sha256_of([edgekit.__version__, self.job.model_dump(mode="json")])


class Ssh:
    """A board."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.address, self.settings = parse_url(url)
        self._client = uuid.uuid4().hex
        self._digests: dict[tuple[str, int, int], str] = {}
        self._described: dict[str | None, Description] = {}

    def fingerprint(self) -> Fingerprint:
        """Describe the board; connects unless a job has told it already."""
        known = next(iter(self._described.values()), None)
        if known is None:
            found = self.check()
            known = found.description
            if known is None:
                raise self._in_use(found.hello.holder)
        return Fingerprint(known.device, dict(known.facts))

    def check(self, engine: str | None = None) -> Check:
        """Connect and look around, without the lock."""
        with self._only_session() as link:
            described = None if link.hello.holder else self._describe(link, engine)
            return Check(str(self.address), link.hello, self._python(link.hello), described)

    def probe(self) -> Probed:
        """Measure the board as a target, with the lock: a job beside it would disturb."""
        with self._only_session() as link:
            self._lock(link)
            told = self._ask_agent(link, [PROBE], _PROBE_S)
        if told.problem is not None or told.target is None:
            raise self._problem(told, "")
        return Probed(told.target, Fingerprint(told.device, dict(told.facts)), told.board, told.power_sensors)

    def run(self, job: Job, *, timeout_s: float | None = None, progress: Progress | None = None) -> JobResult:
        """Run the job there in a fresh process group that ends with the connection.

        A lost connection is made again `retries` times: uploads go on where they stopped, and of the job only what
        is missing runs again. `timeout_s` replaces the URL's `run_s`.

        Raises:
            EdgekitError: what the job itself raised, as on `local`.
            DoesNotFit: the board has less memory free than the weights, or the whole job as predicted, need.
            ToolError: the board is out of reach, in use, full or lacks edgekit; or the job's process was killed
                for lack of memory, crashed, ended early or took longer than its limit.
        """
        tell = progress or (lambda _: None)
        packed = self._pack(job)
        limit_s = self.settings.run_s if timeout_s is None else timeout_s
        attempt = 0
        while True:
            try:
                with self._session() as link:
                    return self._run(link, packed, limit_s, tell)
            except (LinkLost, Unreachable) as lost:
                if isinstance(lost, Unreachable) and attempt == 0:
                    raise
                if attempt == self.settings.retries:
                    raise self._lost(lost.found if isinstance(lost, Unreachable) else str(lost)) from None
                tell("connecting again")
                time.sleep(min(2**attempt, 10))
                attempt += 1

    def setup(self, engine: str, progress: Progress) -> Check:
        """Install edgekit with an engine into its own environment on the board; `progress` is told pip's lines.

        Raises ToolError when there is no Python 3.11 or later, or pip fails.
        """
        with self._only_session() as link, tempfile.TemporaryDirectory(prefix="edgekit-wheel-") as name:
            self._lock(link)
            python = self._python_for_venv(link.hello)
            wheel = build_wheel(Path(name))
            tree = _Tree({wheel.name: self._read(wheel)})
            self._upload(link, [tree], progress)
            venv = f"{link.hello.root}/venv"
            if link.hello.own_venv is None:
                self._command(link, [python, "-m", "venv", venv], _DESCRIBE_S, progress)
            path = f"{link.hello.root}/trees/{tree.digest}/{wheel.name}[{EXTRAS[engine]}]"
            pip = [f"{venv}/bin/python", "-m", "pip", "install", "--disable-pip-version-check"]
            self._command(link, [*pip, path], _PIP_S, progress)
            # the same version from other sources would be taken for installed
            self._command(link, [*pip, "--force-reinstall", "--no-deps", path], _PIP_S, progress)
        self._described.clear()
        return self.check(engine)

    @contextlib.contextmanager
    def _session(self) -> Iterator[Link]:
        with Link(self.address, self.settings) as link:
            try:
                yield link
            except TimedOut:
                raise LinkLost("a reply that did not come in time") from None

    @contextlib.contextmanager
    def _only_session(self) -> Iterator[Link]:
        """A session that is not made again when it is lost."""
        try:
            with self._session() as link:
                yield link
        except LinkLost as lost:
            raise self._lost(str(lost)) from None

    def _lost(self, found: str) -> ToolError:
        advice = "run the same command again: it goes on where it stopped"
        return ToolError(f"a connection to {self.address} that holds", found, advice)

    # --- the board

    def _lock(self, link: Link) -> None:
        holder = {"who": f"{getpass.getuser()}@{socket.gethostname()}", "client": self._client}
        deadline = time.monotonic() + self.settings.lost_s + 5
        while True:
            reply = link.ask("lock", self.settings.transfer_s, holder=holder)
            if isinstance(reply, Locked):
                return
            held = _expect(link, reply, Held).holder
            # the session whose connection was lost: the board has not noticed yet
            if held.client != self._client or time.monotonic() > deadline:
                raise self._in_use(held)
            time.sleep(0.5)

    def _in_use(self, holder: Holder | None) -> ToolError:
        wanted = f"{self.address} for this job alone"
        return ToolError(wanted, f"it is in use by {holder}", "run the same command again later")

    def _python(self, hello: Hello) -> str:
        return self.settings.python or hello.own_venv or hello.pythons.get("python3", "python3")

    def _python_for_venv(self, hello: Hello) -> str:
        if self.settings.python:
            return self.settings.python
        good = [path for name, path in hello.pythons.items() if re.fullmatch(r"python3\.1[1-9]", name)]
        if tuple(map(int, hello.python.split(".")[:2])) >= (3, 11) and "python3" in hello.pythons:
            good.insert(0, hello.pythons["python3"])
        if not good:
            wanted = f"Python 3.11 or later on {self.address}"
            raise ToolError(wanted, f"Python {hello.python}", "install one there, and name it: ?python= in the URL")
        return good[0]

    def _describe(self, link: Link, engine: str | None) -> Description:
        if engine in self._described:
            return self._described[engine]
        described = self._ask_agent(link, [DESCRIBE, *([engine] if engine else [])])
        if described.problem is not None:
            raise self._problem(described, f" --engine {engine}")
        self._described[engine] = described
        return described

    def _problem(self, told: Description, more: str) -> ToolError:
        problem = told.problem or {}
        wanted = f"{problem.get('wanted', 'the engine')} on {self.address}"
        return ToolError(wanted, problem.get("found", "none"), f"edgekit device setup {shlex.quote(self.url)}{more}")

    def _ask_agent(self, link: Link, arguments: list[str], timeout_s: float = _DESCRIBE_S) -> Description:
        """What edgekit there says of itself; of another version than here, nothing is taken."""
        python = self._python(link.hello)
        command = [python, "-m", "edgekit.devices.agent", *arguments]
        lines: list[str] = []
        link.send("run", command=command, timeout_s=timeout_s)
        end = self._follow(link, lines.append, timeout_s + self.settings.lost_s)
        setup = f"edgekit device setup {shlex.quote(self.url)}"
        told = next((line for line in reversed(lines) if line.startswith("{")), None)
        if end.code != 0 or told is None:
            found = failure(End(end.code or 0, end.oom_killed, end.log))
            raise ToolError(f"edgekit for {python} on {self.address}", found, setup)
        version = _version_of(told)
        if version != edgekit.__version__:
            wanted = f"edgekit {edgekit.__version__} on {self.address}, as here"
            raise ToolError(wanted, f"edgekit {version}", setup)
        try:
            return Description.model_validate_json(told)
        except ValidationError as error:
            raise link.broken(printable(str(error.errors()[0]["msg"]))) from None

    def _command(self, link: Link, command: Sequence[str], timeout_s: float, progress: Progress) -> None:
        link.send("run", command=list(command), timeout_s=timeout_s)
        end = self._follow(link, progress, timeout_s + self.settings.lost_s)
        if end.code != 0:
            found = failure(End(end.code or 0, end.oom_killed, end.log))
            raise ToolError(f"{' '.join(command[:4])} on {self.address}", found, "see what it printed above")

    def _follow(self, link: Link, on_line: Progress, timeout_s: float) -> Ended:
        deadline = time.monotonic() + timeout_s
        left = _MAX_PRINTED
        while not isinstance(reply := link.listen(deadline - time.monotonic()), Ended):
            text = printable(_expect(link, reply, ResultLine).text)
            left -= len(text) + 1
            if left < 0:
                raise link.broken("output without an end")
            on_line(text)
        return reply

    # --- files

    def _pack(self, job: Job) -> _Packed:
        trees: dict[str, _Tree] = {}

        def place(path: str) -> str:
            tree, inside = self._read_tree(Path(path))
            trees[path] = tree
            return f"trees/{tree.digest}{inside}"

        placed = job.with_paths(place)
        return _Packed(placed, trees[job.model], list(trees.values()))

    def _read_tree(self, path: Path) -> tuple[_Tree, str]:
        """What a path of a job stands for: a file alone, or a directory with everything in it."""
        if path.is_file():
            return _Tree({path.name: self._read(path)}), f"/{path.name}"
        if not path.is_dir():
            raise InputError("a file or a directory to upload", f"none at {path}", "check the path")
        names = [Path(where) / name for where, _, found in os.walk(path) for name in found]
        if odd := next((name for name in names if not name.is_file()), None):
            raise InputError(f"regular files in {path}", str(odd), "remove it")
        return _Tree({name.relative_to(path).as_posix(): self._read(name) for name in names}), ""

    def _read(self, path: Path) -> _LocalFile:
        state = path.stat()
        key = (str(path.absolute()), state.st_size, state.st_mtime_ns)
        if key not in self._digests:
            with path.open("rb") as file:
                self._digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return _LocalFile(path, self._digests[key], state.st_size)

    def _upload(self, link: Link, trees: Sequence[_Tree], progress: Progress) -> None:
        files = {file.sha256: file for tree in trees for file in tree.files.values()}
        sizes = {sha256: file.bytes for sha256, file in files.items()}
        missing = _expect(link, link.ask("have", self.settings.transfer_s, files=sizes), Missing)
        wanted = [files[sha256] for sha256 in missing.files if sha256 in files]
        room = sum(max(file.bytes - missing.files[file.sha256], 0) for file in wanted)
        if wanted and room + _SPARE_DISK_BYTES > missing.disk_free_bytes:
            raise ToolError(
                f"{_mib(room + _SPARE_DISK_BYTES)} free in {link.hello.root} on {self.address}",
                _mib(missing.disk_free_bytes),
                f"remove what is not needed there, e.g. earlier uploads: rm -r {link.hello.root}/blobs and /trees",
            )
        for file in wanted:
            self._put(link, file, progress)
        for tree in trees:
            names = {name: file.sha256 for name, file in tree.files.items()}
            _expect(link, link.ask("tree", self.settings.transfer_s, digest=tree.digest, files=names), Stored)

    def _put(self, link: Link, file: _LocalFile, progress: Progress) -> None:
        reply = link.ask("put", self.settings.transfer_s, sha256=file.sha256, count=file.bytes)
        there = _expect(link, reply, Offset)
        told = 0.0
        with file.path.open("rb") as stream:
            digest, left = hashlib.sha256(), min(there.offset, file.bytes)
            while left and (piece := stream.read(min(left, _CHUNK))):
                digest.update(piece)
                left -= len(piece)
                link.stay()
            start = there.offset if digest.hexdigest() == there.sha256 and not left else 0
            stream.seek(start)
            link.send("from", offset=start)
            done = start
            while done < file.bytes:
                if time.monotonic() - told > _TOLD_S:
                    told = time.monotonic()
                    progress(f"uploading {file.path.name}, {done >> 20} of {file.bytes >> 20} MiB")
                piece = stream.read(min(_CHUNK, file.bytes - done))
                if not piece:
                    raise InputError(f"{file.path} as it was", "a shorter file", "run it again")
                link.send_bytes([piece])
                done += len(piece)
        _expect(link, link.receive(self.settings.transfer_s), Stored)

    # --- the job

    def _run(self, link: Link, packed: _Packed, limit_s: float, progress: Progress) -> JobResult:
        self._lock(link)
        here = self._describe(link, packed.job.engine)
        kept, earlier, end = self._take_up(link, packed, here, progress)
        if end is None and (left := remaining(packed.job, kept)) is not None:
            self._upload(link, packed.trees, progress)
            room = link.ask("have", self.settings.transfer_s, files={})
            self._check_memory(_expect(link, room, Missing), packed)
            new, end = self._execute(link, packed.id, left, limit_s, progress)
            lines = [*kept, *new]
            earlier += 1
        elif end is None:
            # the connection was lost between the last measurement and the end
            lines, end = [*kept, DoneLine(type="done")], End(0, False, "")
        else:
            lines = list(kept)
        with contextlib.suppress(LinkLost, TimedOut):
            link.ask("take", self.settings.transfer_s, job=packed.id)
        try:
            return build_result(lines, end, earlier)
        except EdgekitError as error:
            advice = f"on {self.address}: {error.next_command}"
            raise type(error)(error.wanted, error.found, advice) from None

    def _take_up(
        self, link: Link, packed: _Packed, here: Description, progress: Progress
    ) -> tuple[list[Line], int, End | None]:
        """Lines of earlier attempts that stay good, their number, and the end where one came to its own."""
        attempts: list[list[str]] = []
        ends: list[End | None] = []
        link.send("kept", job=packed.id, fresh_s=FRESH_S)
        left = MAX_CHARACTERS
        while not isinstance(reply := link.receive(self.settings.transfer_s), Everything):
            left -= len(reply.text) + 1 if isinstance(reply, ResultLine) else _ENTRY_CHARACTERS
            if left < 0:
                raise link.broken("results without an end")
            if isinstance(reply, Attempt):
                attempts.append([])
                ends.append(None)
            elif attempts and isinstance(reply, Ended):
                ended = reply.code is not None
                ends[-1] = End(reply.code or 0, reply.oom_killed, reply.log) if ended else None
            elif attempts:
                attempts[-1].append(_expect(link, reply, ResultLine).text)
            else:
                raise link.broken("results of no attempt")
        kept: list[Line] = []
        used = 0
        reader = LineReader(progress)
        try:
            for texts, end in zip(attempts, ends, strict=True):
                start = len(reader.found)
                for text in texts:
                    reader.add(text)
                lines = reader.found[start:]
                if not _is_from(lines, here):
                    raise _Stale
                if end is not None:
                    return [*kept, *lines], used + 1, end
                good = keep(lines)
                kept += good
                used += bool(good)
        except (_Stale, ToolError):
            # another system, engine or edgekit wrote it: nothing of it belongs to this job any more
            _expect(link, link.ask("take", self.settings.transfer_s, job=packed.id), Stored)
            return [], 0, None
        return kept, used, None

    def _check_memory(self, room: Room, packed: _Packed) -> None:
        free, needed, predicted = room.memory_available_bytes, packed.model.bytes, packed.job.needs_bytes
        if free is None or max(needed, predicted) <= free:
            return
        why = "predicted for weights, cache and buffers" if predicted > needed else "for the weights alone"
        raise DoesNotFit(
            f"{_mib(max(needed, predicted))} of free memory on {self.address}, {why}",
            _mib(free),
            "end other programs there, or build a smaller type",
        )

    def _execute(self, link: Link, job_id: str, job: Job, limit_s: float, progress: Progress) -> tuple[list[Line], End]:
        command = [self._python(link.hello), "-m", "edgekit.devices.agent"]
        link.send("start", job=job_id, text=job.model_dump_json(), command=command)
        reader = LineReader(progress)
        deadline, what = time.monotonic() + self.settings.load_s, "loads its model"
        limit = self.settings.load_s
        while True:
            try:
                reply = link.listen(deadline - time.monotonic())
            except TimedOut:
                link.send("stop")
                self._follow(link, lambda _: None, self.settings.transfer_s)
                advice = f"raise it: ?{'load_s' if what.startswith('load') else 'run_s'}= in the URL"
                raise ToolError(
                    f"a job that {what} within {limit:g} s on {self.address}", "it still ran and was ended", advice
                ) from None
            if isinstance(reply, Ended):
                if reply.code is None:
                    raise LinkLost(reply.stopped)
                return reader.found, End(reply.code, reply.oom_killed, reply.log)
            line = reader.add(_expect(link, reply, ResultLine).text)
            if isinstance(line, LoadedLine) and what.startswith("load"):
                deadline, what, limit = time.monotonic() + limit_s, "ends", limit_s


class _Stale(Exception):
    pass


def _is_from(lines: Sequence[Line], here: Description) -> bool:
    """Whether an attempt ran on the same machine, system and engine; one that measured nothing may have been any."""
    builds = [line for line in lines if line.type == "build"]
    return not builds or (builds[0].device, builds[0].info) == (here.device, here.build)


def _expect(link: Link, reply: object, kind: type[T]) -> T:
    if not isinstance(reply, kind):
        raise link.broken(f"{type(reply).__name__} instead of {kind.__name__}")
    return reply


def _version_of(text: str) -> str:
    try:
        found = json.loads(text)
    except ValueError:
        return "that is unknown"
    return printable(str(found.get("version") if isinstance(found, dict) else None))[:40]


def _sha256_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"
