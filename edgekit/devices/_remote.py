"""The board's side of `ssh://`, for any Python from 3.9 on and its standard library; edgekit need not be there.

`edgekit.devices._link` sends this file as it is and runs it as `serve(ROOT, LOST_S)`. Requests come on standard input
and replies go to standard output, one JSON object a line. One such process is one session: it holds the board's lock
and the job it started, and both end with it. A client that is gone, or silent for LOST_S seconds, ends it.

Under ROOT: `lock`, `blobs/SHA256` (uploads, `.part` while they are not complete), `trees/DIGEST/` (blobs under the
names that a model needs), and `jobs/ID/RUN/` with an append-only result file for every attempt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HELLO = "edgekit-board-1"
"""The line before the first reply: what a login shell prints before it is not ours."""
POLL_S = 0.1
GRACE_S = 2.0
LOG_BYTES = 4096
_CHUNK = 1 << 18
_BUSY_S = 1.0
_SYNC_BYTES = 64 << 20


class Gone(Exception):
    """The client went away."""


class Refused(Exception):
    """A request cannot be met, and the client is told why."""


def serve(root: str, lost_s: float) -> int:
    """Answer requests until the client goes; whatever was started ends then, and the lock is free."""
    for name in ("SIGHUP", "SIGTERM"):
        signal.signal(getattr(signal, name), _raise_gone)
    place = Path(root).expanduser()
    session = Session(place, Client(lost_s))
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        session.client.write(f"\n{HELLO}\n".encode())
        session.hello()
        while True:
            request = session.client.request()
            getattr(session, "do_" + request.pop("do"))(**request)
    except Gone:
        return 0
    except (Refused, OSError) as error:
        told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        with contextlib.suppress(Gone):
            session.client.send("refused", reason=told)
        return 1


def _raise_gone(number: int, frame: Any) -> None:
    raise Gone


class Client:
    """Whoever is at the other end of standard input and output."""

    def __init__(self, lost_s: float, source: int = 0, sink: int = 1) -> None:
        self._lost_s, self._source, self._sink = lost_s, source, sink
        self._data = b""
        self._heard = time.monotonic()
        os.set_blocking(sink, False)

    def request(self) -> dict[str, Any]:
        """The next request that is more than a sign of life."""
        while True:
            found = self.poll(self._lost_s)
            if found is not None and found["do"] != "alive":
                return found

    def poll(self, timeout_s: float) -> dict[str, Any] | None:
        """The next request if there is one within the time. Raises Gone when the client is silent for too long."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._data:
            left = deadline - time.monotonic()
            if not self._fill(max(left, 0)) and left <= 0:
                return None
        line, _, self._data = self._data.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def take(self, count: int) -> Iterator[bytes]:
        """Exactly `count` bytes that follow the last request, in pieces."""
        while count:
            while not self._data:
                self._fill(self._lost_s)
            piece, self._data = self._data[:count], self._data[count:]
            count -= len(piece)
            yield piece

    def _fill(self, timeout_s: float) -> bool:
        if not select.select([self._source], [], [], timeout_s)[0]:
            if time.monotonic() - self._heard > self._lost_s:
                raise Gone
            return False
        data = os.read(self._source, _CHUNK)
        if not data:
            raise Gone
        self._data += data
        self._heard = time.monotonic()
        return True

    def send(self, kind: str, **fields: Any) -> None:
        """Write a reply."""
        self.write(json.dumps({"is": kind, **fields}).encode() + b"\n")

    def write(self, data: bytes) -> None:
        """Write bytes. Raises Gone when nobody takes them."""
        while data:
            if not select.select([], [self._sink], [], self._lost_s)[1]:
                raise Gone
            try:
                data = data[os.write(self._sink, data) :]
            except BlockingIOError:
                continue
            except OSError:
                raise Gone from None


class Session:
    """What a client may ask for; `do_NAME` answers the request NAME."""

    def __init__(self, root: Path, client: Client) -> None:
        self.client = client
        self._root = root
        self._lock: Any = None
        self._busy = 0.0

    def hello(self) -> None:
        """Say what the board is."""
        venv = self._root / "venv/bin/python"
        pythons = {venv.name: str(venv)} if venv.exists() else {}
        for name in ("python3", "python3.14", "python3.13", "python3.12", "python3.11"):
            path = shutil.which(name)
            if path:
                pythons.setdefault(name, path)
        self.client.send(
            "hello",
            root=str(self._root),
            system=os.uname().sysname,
            machine=os.uname().machine,
            python=".".join(map(str, sys.version_info[:3])),
            own_venv=str(venv) if venv.exists() else None,
            pythons=pythons,
            holder=self._holder(),
            **room(self._root),
        )

    def _holder(self) -> Any:
        with self._open_lock() as file:
            return None if _locks(file) else _read_holder(file)

    def _open_lock(self) -> Any:
        return (self._root / "lock").open("a+", encoding="utf-8")

    def do_lock(self, holder: dict[str, str]) -> None:
        """Take the board for this session, or say who has it; the system frees it when this process ends."""
        file = self._open_lock()
        deadline = time.monotonic() + 1  # a client that only looks has it for a moment
        while not (locked := _locks(file)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if not locked:
            self.client.send("held", holder=_read_holder(file))
            return
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        file.write(json.dumps({**holder, "pid": os.getpid(), "since": since}))
        file.flush()
        self._lock = file
        self.client.send("locked")

    def do_have(self, files: dict[str, int]) -> None:
        """Say which of the files (bytes by sha256) are not here, how much of them is, and what room there is."""
        missing = {}
        for sha256, count in files.items():
            path = self._blob(sha256)
            if not (path.is_file() and path.stat().st_size == count):
                part = path.with_suffix(".part")
                missing[sha256] = part.stat().st_size if part.is_file() else 0
        self.client.send("missing", files=missing, **room(self._root))

    def do_put(self, sha256: str, count: int) -> None:
        """Take a file from where an earlier upload stopped: only what has its sha256 gets its name."""
        path = self._blob(sha256)
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("ab+") as file:
            if file.tell() > count:
                file.truncate(0)
            file.seek(0)
            digest = hashlib.sha256()
            for piece in iter(lambda: file.read(_CHUNK), b""):
                digest.update(piece)
                self._tell_busy()
            self.client.send("offset", offset=file.tell(), sha256=digest.hexdigest())
            offset = self.client.request()["offset"]
            if offset == 0:
                file.truncate(0)
                digest = hashlib.sha256()
            unsynced = 0
            for piece in self.client.take(count - offset):
                file.write(piece)
                digest.update(piece)
                unsynced += len(piece)
                if unsynced > _SYNC_BYTES:  # else the last sync of a slow card takes minutes, without a sign of life
                    unsynced = 0
                    os.fsync(file.fileno())
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != sha256:
            part.unlink()
            raise Refused(f"the upload arrived damaged: sha256 {digest.hexdigest()[:12]}..., not {sha256[:12]}...")
        part.chmod(0o444)
        part.replace(path)
        self.client.send("stored")

    def _tell_busy(self) -> None:
        if time.monotonic() - self._busy > _BUSY_S:
            self._busy = time.monotonic()
            self.client.send("busy")

    def do_tree(self, digest: str, files: dict[str, str]) -> None:
        """Give uploads their names in a directory of their own; the last rename makes it exist."""
        final = self._root / "trees" / _word(digest)
        work = final.with_suffix(".part")
        if not all((final / name).is_file() for name in files):
            for left in (work, final):
                shutil.rmtree(left, ignore_errors=True)
            for name, sha256 in files.items():
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise Refused(f"{name!r} is no name in a directory")
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(self._blob(sha256), work / name)
                except OSError:  # Android and FAT have no hard links
                    shutil.copyfile(self._blob(sha256), work / name)
            work.rename(final)
        self.client.send("stored")

    def _blob(self, sha256: str) -> Path:
        return self._root / "blobs" / _word(sha256)

    def do_kept(self, job: str, fresh_s: float) -> None:
        """Send what attempts of a job left that no client took, unless it is older than `fresh_s`."""
        run = self._open_run(job, fresh_s)
        attempts = sorted(run.glob("*.jsonl"), key=lambda path: int(path.stem)) if run else []
        for path in attempts:
            self.client.send("attempt")
            for line in Lines(path).read():
                self.client.send("line", text=line)
            end = path.with_suffix(".end")
            if end.is_file():
                self.client.send("end", **json.loads(end.read_text()))
        self.client.send("all", attempts=len(attempts))

    def do_take(self, job: str) -> None:
        """Note that the client has the job's result: the next time the job is asked for, it starts anew."""
        run = self._open_run(job)
        if run:
            (run / "taken").touch()
        self.client.send("stored")

    def _open_run(self, job: str, fresh_s: float | None = None) -> Path | None:
        runs = sorted((self._root / "jobs" / _word(job)).glob("*"), key=lambda path: int(path.name))
        if not runs or (runs[-1] / "taken").exists():
            return None
        newest = max(path.stat().st_mtime for path in (runs[-1], *runs[-1].iterdir()))
        if fresh_s is not None and not 0 <= time.time() - newest + 60 <= fresh_s:
            (runs[-1] / "taken").touch()
            return None
        return runs[-1]

    def do_start(self, job: str, text: str, command: list[str]) -> None:
        """Run a job, send each line of its result as it appears, and its end; ends it when the client goes."""
        run = self._open_run(job)
        if run is None:
            parent = self._root / "jobs" / _word(job)
            run = parent / str(len(list(parent.glob("*"))) + 1)
            run.mkdir(parents=True)
        number = len(list(run.glob("*.jsonl"))) + 1
        job_path, result_path, log_path, end_path = (run / f"{number}.{n}" for n in ("json", "jsonl", "log", "end"))
        job_path.write_text(text)
        result_path.touch()
        lines = Lines(result_path)
        kills = oom_kills()
        code, stopped = None, "the connection was lost"

        def forward() -> None:
            for line in lines.read():
                self.client.send("line", text=line)

        try:
            with log_path.open("wb") as log:
                code = self._supervise([*command, str(job_path), str(result_path), "--end-with-stdin"], log, forward)
            stopped = "" if code is not None else "it was stopped"
        finally:
            end = {"code": code, "stopped": stopped, "oom_killed": oom_kills() > kills, "log": ends_of(log_path)}
            end_path.write_text(json.dumps(end))
        self.client.send("end", **end)

    def do_run(self, command: list[str], timeout_s: float) -> None:
        """Run a command, send what it prints and its exit code; ends it when the client goes."""
        path = self._root / f"command-{os.getpid()}.log"
        lines = Lines(path)
        deadline = time.monotonic() + timeout_s

        def forward() -> None:
            for line in lines.read():
                self.client.send("line", text=line)
            if time.monotonic() > deadline:
                raise Refused(f"{command[0]} did not end within {timeout_s:g} s and was ended")

        try:
            with path.open("wb") as log:
                code = self._supervise(command, log, forward)
            self.client.send("end", code=code, stopped="", oom_killed=False, log=ends_of(path))
        finally:
            path.unlink()

    def _supervise(self, command: list[str], log: Any, forward: Callable[[], None]) -> int | None:
        """Exit code of a process that has a group of its own; None when the client asked to stop it."""
        process = subprocess.Popen(
            command, cwd=self._root, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while process.poll() is None:
                request = self.client.poll(POLL_S)
                if request is not None and request["do"] == "stop":
                    return None
                if request is not None:
                    self.client.send("busy")
                forward()
            forward()
            return process.returncode
        finally:
            end_group(process)
            if process.stdin:
                process.stdin.close()


class Lines:
    """The complete lines of a file that is being appended to."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> list[str]:
        """Those that were completed since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        return data[:end].decode("utf-8", "replace").split("\n")[:-1]


def end_group(process: subprocess.Popen[bytes], grace_s: float = GRACE_S) -> None:
    """End a process that leads a group, and the whole group: first asked to, then killed."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None and sign is signal.SIGTERM:
            continue  # only stragglers of its group may be left
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s if sign is signal.SIGTERM else None)


def oom_kills() -> int:
    """Processes that the kernel has killed for lack of memory since boot (Linux; 0 elsewhere)."""
    return _number(Path("/proc/vmstat"), r"^oom_kill (\d+)$") or 0


def room(root: Path, meminfo: Path = Path("/proc/meminfo")) -> dict[str, int | None]:
    """Bytes free on the disk of `root`, and of memory in all and available (None where the system does not say)."""
    total, available = (_number(meminfo, rf"^{key}:\s+(\d+) kB$") for key in ("MemTotal", "MemAvailable"))
    return {
        "disk_free_bytes": shutil.disk_usage(root).free,
        "memory_bytes": None if total is None else total << 10,
        "memory_available_bytes": None if available is None else available << 10,
    }


def ends_of(path: Path) -> str:
    """The text of a log, without the middle of a long one."""
    data = path.read_bytes()
    if len(data) > 2 * LOG_BYTES:
        data = data[:LOG_BYTES] + b"\n...\n" + data[-LOG_BYTES:]
    return data.decode("utf-8", "replace")


def _number(path: Path, pattern: str) -> int | None:
    try:
        found = re.search(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _locks(file: Any) -> bool:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_holder(file: Any) -> dict[str, Any]:
    file.seek(0)
    try:
        holder = json.loads(file.read(4096))
    except ValueError:  # it has just taken the lock and not yet said who it is
        holder = {}
    return holder if isinstance(holder, dict) else {}


def _word(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{16,64}", text):
        raise Refused(f"{text!r} is no digest")
    return text
