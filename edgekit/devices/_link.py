"""A session with a board: the system's `ssh`, and `edgekit.devices._remote` at its other end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qsl

from pydantic import Field, NonNegativeInt, PositiveFloat, StringConstraints, TypeAdapter, ValidationError

from edgekit.config import Strict, explain
from edgekit.devices import _remote
from edgekit.devices._results import MAX_LINE_CHARACTERS, Text, printable
from edgekit.engine import Closing
from edgekit.errors import InputError, ToolError

S = TypeVar("S", bound=Strict)
ROOT = "~/.cache/edgekit/device"
_MAX_REPLY_BYTES = 3 * MAX_LINE_CHARACTERS  # quotes and backslashes are escaped once more
_MAX_NOISE_BYTES = 1 << 16
_MAX_BUSY = 10_000
_KEPT_ERRORS = 1 << 13
_CHUNK = 1 << 16
_SUMMARY_S = 5.0  # how long ssh may take to end and to say why

_URL = re.compile(
    r"ssh://(?:(?P<user>\w[\w.-]*)@)?(?P<host>\w[\w.-]*|\[[0-9A-Fa-f:.]+(?:%\w+)?\])(?::(?P<port>\d{1,5}))?/?"
    r"(?:\?(?P<settings>.*))?",
    re.ASCII,
)


class Settings(Strict):
    """What the URL of a board may set, as `?name=value&name=value`; all limits in seconds."""

    python: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-][^\x00-\x1f\x7f]*$")] | None = None
    """Python with edgekit on the board. None takes edgekit's own environment there, else `python3`."""
    connect_s: PositiveFloat = 30
    """Until the board answers."""
    transfer_s: PositiveFloat = 60
    """An upload that moves no byte for so long has failed."""
    load_s: PositiveFloat = 900
    """From the start of the job until its model is loaded for the first time."""
    run_s: PositiveFloat = 14400
    """From then until the job ends."""
    lost_s: PositiveFloat = 30
    """A connection that is silent for so long is lost: on the board, this ends the job and frees the lock."""
    retries: NonNegativeInt = 2
    """How often a lost connection is made again before the command gives up."""


@dataclass(frozen=True)
class Address:
    """Where a board is, for `ssh`."""

    host: str
    user: str | None
    port: int | None

    def __str__(self) -> str:
        name = f"{self.user}@{self.host}" if self.user else self.host
        return name if self.port is None else f"{name}:{self.port}"


def parse_url(url: str) -> tuple[Address, Settings]:
    """Read `ssh://[user@]host[:port][?setting=value]`. Raises InputError; nothing in it can be taken for an option."""
    found = _URL.fullmatch(url)
    usage = "ssh://[user@]host[:port]"
    if found is None or not 0 < int(found["port"] or 22) < 1 << 16:
        raise InputError(f"a device {usage}", repr(url), f"--device {usage}")
    settings = read_settings(Settings, found["settings"], url)
    port = int(found["port"]) if found["port"] else None
    return Address(found["host"].strip("[]"), found["user"], port), settings


def read_settings(kind: type[S], text: str | None, url: str) -> S:
    """Read `name=value&name=value` behind a URL's question mark. Raises InputError."""
    given = parse_qsl(text or "", keep_blank_values=True)
    if len(dict(given)) < len(given):
        raise InputError("each setting of a device once", repr(url), "leave one out")
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"]))
        known = ", ".join(kind.model_fields)
        found = f"{place}: {explain(kind, detail)}"
        raise InputError(f"settings of a device ({known})", found, "edit the URL") from None


class Holder(Strict):
    """Who has a board."""

    who: Text = "somebody"
    client: Text = ""
    """Equal for all sessions of one process."""
    pid: int = 0
    since: Text = "a moment ago"

    def __str__(self) -> str:
        return f"{self.who}, since {self.since} (process {self.pid} there)"


class Room(Strict):
    """What a board has free."""

    disk_free_bytes: NonNegativeInt
    memory_bytes: NonNegativeInt | None
    memory_available_bytes: NonNegativeInt | None


class Hello(Room):
    """What a board is."""

    kind: Literal["hello"] = Field(alias="is")
    root: Text
    system: Text
    machine: Text
    python: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+\.\d+$", max_length=20)]
    own_venv: Text | None
    """Python of the environment that `edgekit device setup` made."""
    pythons: dict[Text, Text]
    holder: Holder | None


class Locked(Strict):
    """The board is this session's."""

    kind: Literal["locked"] = Field(alias="is")


class Held(Strict):
    """The board is another's."""

    kind: Literal["held"] = Field(alias="is")
    holder: Holder


class Missing(Room):
    """Files that have to go over, and how many bytes of each are there."""

    kind: Literal["missing"] = Field(alias="is")
    files: dict[Text, NonNegativeInt]


class Offset(Strict):
    """Where an upload goes on, and the sha256 of what is there."""

    kind: Literal["offset"] = Field(alias="is")
    offset: NonNegativeInt
    sha256: Text


class Stored(Strict):
    """Done."""

    kind: Literal["stored"] = Field(alias="is")


class Attempt(Strict):
    """An earlier attempt of the job follows."""

    kind: Literal["attempt"] = Field(alias="is")


class ResultLine(Strict):
    """A line that a process wrote."""

    kind: Literal["line"] = Field(alias="is")
    text: str


class Ended(Strict):
    """How a process ended."""

    kind: Literal["end"] = Field(alias="is")
    code: int | None
    """None where it was ended."""
    stopped: Text
    """Why it was ended; empty where it ended by itself."""
    oom_killed: bool
    log: Annotated[str, StringConstraints(max_length=4 * _remote.LOG_BYTES)]


class Everything(Strict):
    """No further attempt."""

    kind: Literal["all"] = Field(alias="is")
    attempts: NonNegativeInt


class _Busy(Strict):
    kind: Literal["busy"] = Field(alias="is")


class _Refused(Strict):
    kind: Literal["refused"] = Field(alias="is")
    reason: Text


Reply = Hello | Locked | Held | Missing | Offset | Stored | Attempt | ResultLine | Ended | Everything
_REPLY: TypeAdapter[Reply | _Busy | _Refused] = TypeAdapter(
    Annotated[Reply | _Busy | _Refused, Field(discriminator="kind")]
)


class LinkLost(Exception):
    """The connection broke; what the board has so far is kept there."""


class Unreachable(ToolError):
    """The board does not answer."""


class TimedOut(Exception):
    """No reply came in time; the connection is fine."""


class Link(Closing):
    """An open session. Everything the board sends is bounded, typed and made printable before anyone sees it."""

    def __init__(self, address: Address, settings: Settings) -> None:
        """Connect. Raises ToolError that says what stands in the way: the network, a key, a missing Python."""
        program = shutil.which("ssh")
        if program is None:
            raise ToolError("OpenSSH's client", "no program named ssh", "apt-get install openssh-client")
        self.address, self._settings = address, settings
        self._data, self._errors = b"", b""
        self._sent = self._heard = time.monotonic()
        source = Path(_remote.__file__).read_bytes()
        source += f"\nsys.exit(serve({ROOT!r}, {settings.lost_s!r}))\n".encode()
        self._process = subprocess.Popen(
            [program, *ssh_arguments(address, settings), _bootstrap(len(source))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is ours: the board is told first
        )
        self._stdin, self._stdout, self._stderr = (pipe.fileno() for pipe in self._pipes())
        for descriptor in (self._stdin, self._stdout, self._stderr):
            os.set_blocking(descriptor, False)
        self._hears = {self._stdout, self._stderr}
        try:
            self.hello = self._greet(source)
        except BaseException:
            self.close()
            raise

    def _greet(self, source: bytes) -> Hello:
        deadline = time.monotonic() + self._settings.connect_s
        noise = 0
        try:
            self._write(source)
            while (line := self._line(deadline)) != _remote.HELLO.encode():
                noise += len(line)
                if noise > _MAX_NOISE_BYTES:
                    raise LinkLost("its login shell prints without an end")
            found = self.receive(max(deadline - time.monotonic(), 1))
        except TimedOut:
            wanted = f"an answer of {self.address} within {self._settings.connect_s:g} s"
            raise Unreachable(wanted, "none", f"ssh {self._words()}, or ?connect_s= in the URL") from None
        except LinkLost as lost:
            raise self._explain(str(lost)) from None
        if not isinstance(found, Hello):
            raise self.broken(f"a reply {found.kind!r} before it said what it is")
        return found

    def _words(self) -> str:
        target = f"{self.address.user}@{self.address.host}" if self.address.user else self.address.host
        return f"{target} -p {self.address.port}" if self.address.port else target

    def _explain(self, lost: str) -> ToolError:
        """Why there is no session, from what ssh said last."""
        code = self._process.poll()
        told = [printable(line) for line in self._errors.decode("utf-8", "replace").splitlines() if line.strip()]
        all_of_it, last = " ".join(told), told[-1] if told else lost
        name = str(self.address)
        if "Host key verification failed" in all_of_it or "host key is known" in all_of_it:
            changed = "IDENTIFICATION HAS CHANGED" in all_of_it
            found = "another key than the known one" if changed else "a key that is not known"
            return ToolError(
                f"the host key of {name} in known_hosts",
                f"{found}: nothing was sent",
                f"compare the key with the board's own (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub there), "
                f"then ssh {self._words()}",
            )
        if "Permission denied" in all_of_it:
            return ToolError(f"a login at {name} without a password", last, f"ssh-copy-id {self._words()}")
        if code == 127:
            return ToolError(f"python3 on {name}", last, f"ssh {self._words()} 'apt-get install python3'")
        return Unreachable(f"a connection to {name}", last, f"ssh {self._words()}")

    def broken(self, found: str) -> ToolError:
        """The error for a board that does not keep to the protocol."""
        return ToolError(f"the replies of edgekit's own script on {self.address}", found, f"ssh {self._words()}")

    def ask(self, do: str, timeout_s: float, **fields: Any) -> Reply:
        """Send a request and return its reply. Raises LinkLost, TimedOut, and ToolError when it is refused."""
        self.send(do, **fields)
        return self.receive(timeout_s)

    def send(self, do: str, **fields: Any) -> None:
        """Send a request."""
        self._write(json.dumps({"do": do, **fields}).encode() + b"\n")

    def stay(self) -> None:
        """Tell the board that this side is alive, if it is time to."""
        if time.monotonic() - self._sent > self._settings.lost_s / 4:
            self.send("alive")

    def send_bytes(self, pieces: Iterable[bytes]) -> None:
        """Send what an upload consists of. Raises LinkLost, or ToolError when the board cannot store it."""
        for piece in pieces:
            self._write(piece)

    def receive(self, timeout_s: float) -> Reply:
        """The next reply; what says that the board is busy extends the time. Raises LinkLost and TimedOut."""
        for _ in range(_MAX_BUSY):
            reply = self._parse(self._line(time.monotonic() + timeout_s))
            if not isinstance(reply, _Busy):
                return reply
        raise self.broken("that it is busy, without an end")

    def listen(self, timeout_s: float) -> Reply:
        """The next reply while a process runs there; a board that gives no sign of life is lost before the time."""
        deadline = time.monotonic() + timeout_s
        self._heard = time.monotonic()
        while isinstance(reply := self._parse(self._line(deadline, lively=True)), _Busy):
            continue
        return reply

    def _parse(self, line: bytes) -> Reply | _Busy:
        try:
            reply = _REPLY.validate_json(line)
        except ValidationError as error:
            detail = error.errors()[0]
            raise self.broken(printable(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}")[:300]) from None
        if isinstance(reply, _Refused):
            advice = f"look at its disk: ssh {self._words()} df -h"
            raise ToolError(f"{self.address} to do its part", reply.reason, advice)
        return reply

    def _line(self, deadline: float, *, lively: bool = False) -> bytes:
        while b"\n" not in self._data:
            if lively and time.monotonic() - self._heard > self._settings.lost_s:
                raise LinkLost(f"it was silent for {self._settings.lost_s:g} s")
            if len(self._data) > _MAX_REPLY_BYTES:
                raise self.broken("a line without an end")
            self.stay()
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimedOut
            self._pump([], min(left, self._settings.lost_s / 4))
        line, _, self._data = self._data.partition(b"\n")
        return line

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        moved = time.monotonic()
        while view:
            if self._pump([self._stdin], 1.0):
                try:
                    view = view[os.write(self._stdin, view[:_CHUNK]) :]
                    moved = self._sent = time.monotonic()
                except BlockingIOError:
                    continue
                except OSError:
                    self._hear_the_end()
            elif time.monotonic() - moved > self._settings.transfer_s:
                raise LinkLost(f"nothing went out for {self._settings.transfer_s:g} s")

    def _hear_the_end(self) -> None:
        """Find out why the board takes nothing any more: it refused (ToolError), or it is gone (LinkLost)."""
        deadline = time.monotonic() + _SUMMARY_S
        while time.monotonic() < deadline:
            self._pump([], 0.5)
        raise LinkLost("it takes nothing any more")

    def _pump(self, sinks: list[int], timeout_s: float) -> bool:
        """Read what is there into the buffers; True when a sink takes more. Raises LinkLost at the end."""
        readable, writable, _ = select.select(list(self._hears), sinks, [], timeout_s)
        for descriptor in readable:
            data = os.read(descriptor, _CHUNK)
            if descriptor == self._stderr:
                self._errors = (self._errors + data)[-_KEPT_ERRORS:]
            else:
                self._data += data
                self._heard = time.monotonic()
            if not data:
                self._hears.discard(descriptor)
        if self._stdout not in self._hears:
            for line in self._data.splitlines():
                if b'"refused"' in line:
                    self._parse(line)
            raise LinkLost(self._last_words())
        return bool(writable)

    def _last_words(self) -> str:
        """What ssh said before it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SUMMARY_S)
        while self._stderr in self._hears and select.select([self._stderr], [], [], 0)[0]:
            data = os.read(self._stderr, _CHUNK)
            self._errors = (self._errors + data)[-_KEPT_ERRORS:]
            if not data:
                break
        told = [line for line in self._errors.decode("utf-8", "replace").splitlines() if line.strip()]
        return printable(told[-1])[:300] if told else f"ssh ended with code {self._process.returncode}"

    def close(self) -> None:
        """End the session; a job that still runs on the board ends with it."""
        stdin, stdout, stderr = self._pipes()
        with contextlib.suppress(OSError):
            stdin.close()
        for patience, sign in ((_remote.GRACE_S + 2, None), (1, signal.SIGTERM), (None, signal.SIGKILL)):
            if sign is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, sign)
            try:
                self._drain(patience)
                break
            except subprocess.TimeoutExpired:
                continue
        stdout.close()
        stderr.close()

    def _pipes(self) -> list[IO[bytes]]:
        return [pipe for pipe in (self._process.stdin, self._process.stdout, self._process.stderr) if pipe]

    def _drain(self, patience_s: float | None) -> None:
        # a full pipe would keep ssh from ending
        deadline = math.inf if patience_s is None else time.monotonic() + patience_s
        while self._process.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("ssh", patience_s or 0)
            for descriptor in select.select(list(self._hears), [], [], 0.02)[0] if self._hears else ():
                if not os.read(descriptor, _CHUNK):
                    self._hears.discard(descriptor)
            if not self._hears:
                time.sleep(0.02)


def ssh_arguments(address: Address, settings: Settings) -> list[str]:
    """Arguments of `ssh` up to the host: nothing is asked for, unknown and changed host keys are refused."""
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "ConnectTimeout": str(math.ceil(settings.connect_s)),
        "ServerAliveInterval": str(max(math.floor(settings.lost_s / 3), 1)),
        "ServerAliveCountMax": "3",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "ClearAllForwardings": "yes",
        "ControlMaster": "no",  # one that is there may be used; a new one would outlive the session
        "RemoteCommand": "none",
    }
    arguments = ["-T", *(f"-o{name}={value}" for name, value in options.items())]
    arguments += ["-l", address.user] if address.user else []
    arguments += ["-p", str(address.port)] if address.port else []
    return [*arguments, "--", address.host]


def _bootstrap(count: int) -> str:
    """The command for the board's shell: run the program that the first `count` bytes of standard input are."""
    program = (
        f"import os,sys\ndata=b''\nwhile len(data)<{count}:\n piece=os.read(0,{count}-len(data))\n"
        " if not piece: sys.exit(1)\n data+=piece\nexec(compile(data,'edgekit','exec'))"
    )
    return f"exec python3 -I -c {shlex.quote(program)}"
