"""Running code that nobody has read: with limits, without a network, and with a verdict that it cannot write.

Tests and the code they test are two processes, and plain data goes between them: numbers, strings, lists, tuples,
sets and dictionaries. Only the tests' process can report that it came to its end, over a pipe that the code does not
have; so neither a printed verdict, nor `exit(0)`, nor an object that claims to equal everything passes for a success.

What confines both depends on the machine, and `Outcome.isolation` says what held. Everywhere: an empty environment and
working directory, limits on memory, processor time, files and (but for root) processes, no capabilities. On Linux with
`bwrap`: only the system's libraries and Python to read, no network, no sight of other processes. Without it: namespaces
of the kernel, and Landlock for the files. This file is also the program that runs in there: standard library only.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import json
import os
import resource
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

How = Literal["done", "failed", "timeout", "memory", "killed"]
_POLL_S = 0.02
_START_S = 10.0  # a busy machine may take as long to start an interpreter, which is no fault of the source
_MAX_FILE_BYTES = 16 << 20
_OPEN_FILES = 64
_PROGRAM = str(Path(__file__).resolve())
_SYSTEM_DIRECTORIES = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache")


class Outcome(NamedTuple):
    """How a run went."""

    ok: bool
    """Whether everything ran to its end without an error."""
    how: How
    """`failed`: an exception, or an exit before the end; `killed`: it died by a signal, or could not be started."""
    output: str
    """The end of what was printed, errors included."""
    isolation: str
    """What held: `bubblewrap`, `namespaces` or `limits only`."""
    landlock: bool
    """Whether the kernel kept it from files outside its directory (and, with bubblewrap, the mounts do)."""


def run_untrusted(
    source: str,
    *,
    tests: str | None = None,
    timeout_s: float = 5.0,
    memory_bytes: int = 512 << 20,
    output_bytes: int = 64 << 10,
    use_bubblewrap: bool = True,
    use_namespaces: bool = True,
) -> Outcome:
    """Run Python source, then `tests` against it in another process.

    Args:
        source: The code that is not trusted.
        tests: Python that gets at functions of `source` by `untrusted(NAME)`. A call copies its arguments: tests do
            not see them changed, and cannot pass functions. Without tests, the end of `source` itself is what counts,
            which hostile source can feign; data that is not trusted belongs into a literal of your own source then.
        timeout_s: Seconds that source and tests may take together; then everything is killed.
        memory_bytes: Address space of each process.
        output_bytes: How much of the output's end to keep.
        use_bubblewrap: Use `bwrap` where it works.
        use_namespaces: Use namespaces where bubblewrap is not used, and the kernel permits them.
    """
    with tempfile.TemporaryDirectory(prefix="edgekit-sandbox-", ignore_cleanup_errors=True) as work:
        prefix = _bubblewrap() if use_bubblewrap else None
        token = secrets.token_hex(16)
        verdict, theirs = os.pipe()
        job = {
            "source": source,
            "tests": tests,
            "token": token,
            "verdict": theirs,
            "work": work,
            "readable": _readable(),
            "cpu_s": int(timeout_s) + 2,
            "memory_bytes": memory_bytes,
            "namespaces": use_namespaces and prefix is None,
        }
        command = [*(prefix or []), *(["--bind", work, work, "--chdir", work] if prefix else []), *_python(_PROGRAM)]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs,),
                cwd=work,
                env={},
                start_new_session=True,
            )
        except OSError as error:
            os.close(theirs)
            os.close(verdict)
            return Outcome(False, "killed", str(error), "limits only", False)
        os.close(theirs)
        try:
            output, told, ended = _follow(process, verdict, json.dumps(job).encode(), timeout_s, output_bytes)
        finally:
            _kill_tree(process)
            os.close(verdict)
    start, end = (*_read_verdicts(told, token), {}, {})[:2]
    how: How = end.get("how") or ("killed" if ended else "timeout")
    isolation = "bubblewrap" if prefix else start.get("isolation", "limits only")
    text = output.decode("utf-8", "replace")
    return Outcome(how == "done", how, text, isolation, bool(start.get("landlock")))


def _follow(
    process: subprocess.Popen[bytes], verdict: int, job: bytes, timeout_s: float, output_bytes: int
) -> tuple[bytes, bytes, bool]:
    """Hand over the job and read until the verdict's pipe ends; returns output, verdict, whether it ended in time."""
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = time.monotonic() + _START_S + timeout_s
    output, told, ended = b"", b"", False
    stdin, stdout = process.stdin.fileno(), process.stdout.fileno()
    for descriptor in (stdin, stdout, verdict):
        os.set_blocking(descriptor, False)
    with selectors.DefaultSelector() as selector:
        selector.register(stdin, selectors.EVENT_WRITE)
        selector.register(stdout, selectors.EVENT_READ)
        selector.register(verdict, selectors.EVENT_READ)
        while not ended and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fd == stdin:
                    with contextlib.suppress(BrokenPipeError):
                        job = job[os.write(stdin, job) :]
                        if job:
                            continue
                    selector.unregister(stdin)
                    process.stdin.close()
                    continue
                data = os.read(key.fd, 1 << 16)
                if key.fd == stdout:
                    output = (output + data)[-output_bytes:]
                else:
                    if not told:
                        deadline = time.monotonic() + timeout_s
                    told += data
                    ended = not data
                if not data:
                    selector.unregister(key.fd)
    # what was printed last may still be in the pipe; whoever goes on printing is not waited for
    with contextlib.suppress(BlockingIOError):
        for _ in range(64):
            if not (data := os.read(stdout, 1 << 16)):
                break
            output = (output + data)[-output_bytes:]
    return output, told, ended


def _read_verdicts(told: bytes, token: str) -> list[dict[str, Any]]:
    found = []
    for line in told.splitlines():
        with contextlib.suppress(ValueError):
            fields = json.loads(line)
            if fields.pop("token", None) == token:
                found.append(fields)
    return found


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that came of it: daemons, too, whose parent the first process becomes."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(process.pid)
        while process.poll() is None and (children := top.children(recursive=True)):
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    child.kill()
            psutil.wait_procs(children, timeout=_POLL_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


@cache
def _bubblewrap() -> list[str] | None:
    """Command line of bubblewrap up to the program, or None where it is missing or not permitted."""
    from shutil import which

    program = which("bwrap")
    if program is None:
        return None
    prefix = [program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for path in dict.fromkeys((*_readable(), _PROGRAM)):
        prefix += ["--ro-bind", path, path]
    prefix += ["--proc", "/proc", "--dev", "/dev"]
    try:
        done = subprocess.run([*prefix, *_python("-c", "pass")], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return prefix if done.returncode == 0 else None


def _python(*arguments: str) -> list[str]:
    # not a virtual environment's link, whose target need not be visible inside
    return [os.path.realpath(sys.executable), "-I", "-S", "-E", *arguments]


@cache
def _readable() -> list[str]:
    """Files and directories that Python needs."""
    python = {str(Path(sys.base_prefix).resolve()), str(Path(sysconfig.get_path("stdlib")).resolve())}
    python.add(str(Path(os.path.realpath(sys.executable)).parent))
    return sorted(path for path in {*_SYSTEM_DIRECTORIES, *python} if Path(path).exists())


# --- inside: the keeper starts the judge, the judge starts the accused


def _keep() -> NoReturn:
    """First process inside: becomes the parent of every orphan, and lives until it is killed."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    job = json.loads(sys.stdin.buffer.read())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    isolation = "namespaces" if job["namespaces"] and _unshare() else "limits only"
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if os.fork() == 0:
        _judge(job, isolation)
    os.close(job["verdict"])
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    os._exit(0)


def _judge(job: dict[str, Any], isolation: str) -> NoReturn:
    """Second process: starts the source in a third, runs the tests, and alone may report."""

    def report(**fields: Any) -> None:
        os.write(job["verdict"], json.dumps({"token": job["token"], **fields}).encode() + b"\n")

    landlock = _confine(job)
    report(isolation=isolation, landlock=landlock)
    here, there = os.pipe(), os.pipe()
    accused = os.fork()
    if accused == 0:
        os.close(job["verdict"])
        os.close(here[1])
        os.close(there[0])
        _confine(job, last=True)
        source = job["source"]
        job.clear()
        _serve(source, here[0], there[1])
    os.close(here[0])
    os.close(there[1])
    peer = _Peer(accused, there[0], here[1])
    how: How = "failed"
    try:
        peer.receive()
        if job["tests"] is not None:
            names = {"__name__": "tests", "untrusted": peer.function}
            exec(compile(job["tests"], "<tests>", "exec"), names)  # noqa: S102 - what this process is for
        how = "done"
    except _Gone as gone:
        how = gone.how
    except MemoryError:
        how = "memory"
    except BaseException:  # a SystemExit among the tests is no success, either
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    report(how=how)
    os._exit(0)


class _Gone(Exception):
    """The process of the source ended."""

    def __init__(self, how: How) -> None:
        super().__init__(how)
        self.how = how


class _Peer:
    """The process of the source, as the tests see it."""

    def __init__(self, pid: int, reading: int, writing: int) -> None:
        self._pid = pid
        self._replies = os.fdopen(reading, "r", encoding="ascii", errors="replace")
        self._requests = os.fdopen(writing, "w", encoding="ascii")

    def function(self, name: str) -> Any:
        """A function of the source."""

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                self._requests.write(json.dumps([name, _pack(args), _pack(kwargs)]) + "\n")
                self._requests.flush()
            except BrokenPipeError:
                raise self._end() from None
            return self.receive()

        return call

    def receive(self) -> Any:
        line = self._replies.readline()
        if not line.endswith("\n"):
            raise self._end()
        kind, value = json.loads(line)
        if kind == "value":
            return _unpack(value)
        if value == "MemoryError":
            raise _Gone("memory")
        error: Any = getattr(builtins, str(value), None)
        known = isinstance(error, type) and issubclass(error, Exception)
        raise error() if known else RuntimeError(str(value))

    def _end(self) -> _Gone:
        _, status = os.waitpid(self._pid, 0)
        if not os.WIFSIGNALED(status):
            return _Gone("failed")
        return _Gone("timeout" if os.WTERMSIG(status) == signal.SIGXCPU else "killed")


def _serve(source: str, reading: int, writing: int) -> NoReturn:
    """Third process: runs the source, then answers calls until nobody asks any more."""
    requests = os.fdopen(reading, "r", encoding="ascii")
    replies = os.fdopen(writing, "w", encoding="ascii")

    def reply(kind: str, value: Any) -> None:
        replies.write(json.dumps([kind, value]) + "\n")
        replies.flush()

    def attempt(work: Any) -> None:
        try:
            value = _pack(work())
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            reply("value", value)
        except BaseException as error:  # exit() is as much a failure as any other exception
            with contextlib.suppress(Exception):
                traceback.print_exc(limit=-3)
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            reply("error", type(error).__name__)

    names: dict[str, Any] = {"__name__": "untrusted"}
    attempt(lambda: exec(compile(source, "<source>", "exec"), names))  # noqa: S102 - what this process is for
    for line in requests:
        name, args, kwargs = json.loads(line)
        attempt(lambda: names[name](*_unpack(args), **_unpack(kwargs)))  # noqa: B023 - called at once
    os._exit(0)


def _pack(value: Any) -> Any:
    """Plain data as JSON that keeps its types. Raises TypeError for anything else."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple, set, frozenset):
        return [kind.__name__, *map(_pack, value)]
    if kind is dict:
        return ["dict", *([_pack(key), _pack(item)] for key, item in value.items())]
    if kind is bytes:
        return ["bytes", value.hex()]
    raise TypeError(f"an object of {kind.__name__} is no plain data")


def _unpack(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    kind, *items = value
    if kind == "dict":
        return {_unpack(key): _unpack(item) for key, item in items}
    if kind == "bytes":
        return bytes.fromhex(items[0])
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(_unpack, items))


# --- inside: limits

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
_NEW_USER, _NEW_NET, _NEW_PID, _NEW_IPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000


def _confine(job: dict[str, Any], *, last: bool = False) -> bool:
    """Limit this process for good; `last`: it may not start others. Returns whether Landlock holds."""
    limits = [
        (resource.RLIMIT_AS, job["memory_bytes"]),
        (resource.RLIMIT_CPU, job["cpu_s"]),
        (resource.RLIMIT_FSIZE, _MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ]
    if last:
        # counts all processes of the user, so no number but 0 is sure; the kernel does not hold root to it
        limits.append((resource.RLIMIT_NPROC, 0))
    for kind, limit in limits:
        with contextlib.suppress(ValueError, OSError):  # a limit that is lower already, or that the system lacks
            resource.setrlimit(kind, (limit, limit))
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if sys.platform == "linux":
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        ctypes.CDLL(None).capset(header, none)
    return _landlock(job["work"], job["readable"])


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def _unshare() -> bool:
    """Leave the network and the other processes behind; False where the kernel does not permit it."""
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NET | _NEW_PID | _NEW_IPC) == 0)


_READ = 0b1101  # execute, read a file, list a directory
_ON_FILES = 0b1100000000000111  # rights that a rule for a single file may name
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}  # number of rights over files; 16 from version 5 on


def _landlock(work: str, readable: list[str]) -> bool:
    """Let the kernel refuse files outside `work`, but for reading some, and TCP, signals, sockets where it can.

    See `landlock(7)`. Returns False where the kernel has none.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = (1 << _RIGHTS_BY_VERSION.get(version, 16)) - 1
    handled = (ctypes.c_uint64 * 3)(rights, 0b11, 0b11)  # files; TCP since version 4; abstract sockets, signals since 6
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(_LANDLOCK_CREATE, handled, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return False
    device = (os.devnull, "/dev/zero", "/dev/urandom")
    allowed = {work: rights, **dict.fromkeys((*readable, *device), _READ), os.devnull: 0b110}
    for path, access in allowed.items():
        with contextlib.suppress(FileNotFoundError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            granted = access & rights & (-1 if Path(path).is_dir() else _ON_FILES)
            rule = granted.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
            libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0)
            os.close(place)
    held = libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return bool(held)


if __name__ == "__main__":
    _keep()
