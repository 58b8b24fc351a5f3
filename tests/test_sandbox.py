"""Code that nobody has read: what it cannot do, under each kind of isolation that this machine has."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from edgekit import sandbox
from edgekit.sandbox import Outcome, run_untrusted

KINDS: dict[str, dict[str, Any]] = {
    "bubblewrap": {},
    "namespaces": {"use_bubblewrap": False},
    "limits only": {"use_bubblewrap": False, "use_namespaces": False},
}


def run(kind: str, source: str, **options: Any) -> Outcome:
    return run_untrusted(source, **{**KINDS[kind], **options})


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """An isolation that works here."""
    name: str = request.param
    if name == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    held = run(name, "pass").isolation
    if held != name:
        pytest.skip(f"{name} is not permitted here")
    return name


def test_a_program_that_ends_is_done(kind: str) -> None:
    outcome = run(kind, "print('fine')")
    assert (outcome.ok, outcome.how, outcome.output) == (True, "done", "fine\n")


def test_an_exception_fails_and_shows_where(kind: str) -> None:
    outcome = run(kind, "x = 1\nraise ValueError('so')")
    assert (outcome.ok, outcome.how) == (False, "failed")
    assert "line 2" in outcome.output
    assert "ValueError: so" in outcome.output


def test_source_that_does_not_compile_fails(kind: str) -> None:
    assert run(kind, "def").how == "failed"
    assert run(kind, "\0").how == "failed"
    assert run(kind, "x = '\ud800'").how == "failed"


# --- verdicts

ADDS = "f = untrusted('f')\nassert f(2, 3) == 5\nassert f(1, y=1) == 2"


def test_tests_call_the_source_with_plain_data() -> None:
    assert run_untrusted("def f(x, y): return x + y", tests=ADDS).ok
    assert run_untrusted("def f(x, y): return x - y", tests=ADDS).how == "failed"
    assert run_untrusted("", tests=ADDS).how == "failed"


def test_plain_data_keeps_its_types() -> None:
    values = [None, True, 1, 10**30, 0.5, "ä\ud800", b"\0\xff", [], (1, (2,)), {1: [2]}, {"a": {3}}, frozenset({4})]
    tests = f"same = untrusted('same')\nfor v in {values!r}:\n    assert same(v) == v and type(same(v)) is type(v), v\n"
    tests += "assert same(float('inf')) > 1e308 and same(float('nan')) != same(float('nan'))"
    assert run_untrusted("def same(x): return x", tests=tests).ok


def test_exceptions_of_the_source_reach_the_tests() -> None:
    tests = "try:\n    untrusted('f')()\nexcept KeyError:\n    pass\nelse:\n    raise AssertionError\n"
    assert run_untrusted("def f(): raise KeyError(1)", tests=tests).ok
    assert run_untrusted("def f(): return 1", tests=tests).how == "failed"


CHEATS = {
    "exit": "def f(*_, **__):\n    raise SystemExit(0)",
    "exit-at-once": "raise SystemExit(0)",
    "os-exit": "import os\ndef f(*_, **__):\n    os._exit(0)",
    "os-exit-at-once": "import os\nos._exit(0)",
    "printed": 'def f(*_, **__):\n    print(\'{"how": "done"}\\n["value", 5]\', flush=True)',
    "equal-to-all": "class E(int):\n    def __eq__(self, _): return True\ndef f(*_, **__): return E(7)",
    "written-everywhere": "import os\ndef f(*_, **__):\n    for fd in range(64):\n        try: os.write(fd, b'"
    '{"how": "done"}\\n\')\n        except OSError: pass',
    "assertions-off": "import builtins\nbuiltins.AssertionError = Warning\ndef f(*_, **__): return 7",
    "judge-killed": "import os\ndef f(*_, **__):\n    os.kill(os.getppid(), 9)",
    "judge-traced": "import ctypes, os\ndef f(*_, **__):\n    "
    "if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0: return 5",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_cheat_passes_for_a_success(kind: str, cheat: str) -> None:
    outcome = run(kind, CHEATS[cheat], tests=ADDS, timeout_s=3)
    assert not outcome.ok
    assert outcome.how in ("failed", "killed", "timeout")


@pytest.mark.parametrize(
    "source", ["raise SystemExit(0)", "exit = 0; import os; os._exit(0)", "import sys; sys.exit()"]
)
def test_an_early_exit_without_tests_fails(kind: str, source: str) -> None:
    assert run(kind, source).how == "failed"


def test_tests_that_exit_fail() -> None:
    assert run_untrusted("", tests="raise SystemExit(0)").how == "failed"


# --- limits


def test_an_endless_loop_is_ended(kind: str) -> None:
    assert run(kind, "while True: pass", timeout_s=0.8).how == "timeout"
    assert run(kind, "def f(): \n  while True: pass", tests="untrusted('f')()", timeout_s=0.8).how == "timeout"


def test_sleeping_is_ended_too() -> None:
    assert run_untrusted("import time; time.sleep(600)", timeout_s=0.8).how == "timeout"


def test_memory_is_limited(kind: str) -> None:
    assert run(kind, "x = bytearray(1 << 30)").how == "memory"
    assert run(kind, "def f(): return 'x' * (1 << 30)", tests="untrusted('f')()").how == "memory"
    assert run(kind, "x = bytearray(100 << 20)").ok


def test_a_crash_is_told_from_a_failure(kind: str) -> None:
    assert run(kind, "import ctypes; ctypes.string_at(0)").how == "killed"


def test_only_the_end_of_huge_output_is_kept(kind: str) -> None:
    outcome = run(kind, "print('x' * 5_000_000 + 'end')", output_bytes=1000, timeout_s=20)
    assert outcome.ok
    assert len(outcome.output) == 1000
    assert outcome.output.endswith("end\n")


def test_endless_output_is_ended() -> None:
    outcome = run_untrusted("while True: print('x' * 4096)", output_bytes=1000, timeout_s=0.8)
    assert outcome.how == "timeout"
    assert len(outcome.output) == 1000


def test_files_cannot_grow_without_end(kind: str) -> None:
    assert run(kind, "f = open('big', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20)); f.flush()").how == "failed"


def still_running(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            # a fork keeps the command line, so the mark is the name that it gave itself
            if process.status() != psutil.STATUS_ZOMBIE and process.name() == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def comes_true(condition: Callable[[], bool], timeout_s: float = 60) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


NAMED = "import ctypes, os, time\ndef name(n): ctypes.CDLL(None).prctl(15, n.encode(), 0, 0, 0)\n"


def test_a_fork_bomb_is_ended(kind: str) -> None:
    mark = f"bomb{os.getpid()}"
    source = NAMED + f"name({mark!r})\nfor _ in range(6):\n    os.fork()\ntime.sleep(600)"
    assert not run(kind, source, timeout_s=1).ok
    assert still_running(mark) == []


def test_a_daemon_dies_with_the_run(kind: str) -> None:
    mark = f"daemon{os.getpid()}"
    started = NAMED + f"if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        name({mark!r})\n"
    started += "        print('up', flush=True)\n        time.sleep(600)\n    os._exit(0)\ntime.sleep(0.5)"
    outcome = run(kind, started, timeout_s=10)
    assert still_running(mark) == []
    if os.geteuid() == 0:
        assert outcome.output == "up\n"  # it was there: the kernel does not hold root to the number of processes
    else:
        assert "BlockingIOError" in outcome.output


def test_no_process_is_left_when_the_caller_is_killed(kind: str, tmp_path: Path) -> None:
    mark = f"left{os.getpid()}"
    source = NAMED + f"name({mark!r})\ntime.sleep(600)"
    program = f"from edgekit.sandbox import run_untrusted as r\nr({source!r}, timeout_s=300, **{KINDS[kind]!r})"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    package = Path(sandbox.__file__).parents[1]
    caller = subprocess.Popen([sys.executable, "-c", program], cwd=package, env=environment)
    assert comes_true(lambda: still_running(mark) != [])
    caller.kill()
    caller.wait()
    assert comes_true(lambda: still_running(mark) == [])


# --- the world outside


def test_it_works_in_an_empty_directory_that_is_removed(kind: str) -> None:
    source = (
        "import os\nprint(os.getcwd(), os.listdir())\nopen('mine', 'w').write('x')\nassert open('mine').read() == 'x'"
    )
    outcome = run(kind, source)
    assert outcome.ok
    place, entries = outcome.output.split()
    assert entries == "[]"
    assert Path(place).parent == Path(tempfile.gettempdir())
    assert not Path(place).exists()


def test_secrets_of_the_environment_are_not_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "xyzzy")
    child_environment = "import os; print(dict(os.environ))"
    assert "xyzzy" not in run(kind, child_environment).output


def test_processes_outside_are_not_read(kind: str) -> None:
    # its own environment is inherited by this one, so any variable of it will do
    with subprocess.Popen(["sleep", "60"], env={"SECRET_TOKEN": "xyzzy"}) as process:
        source = f"print(open('/proc/{process.pid}/environ').read())"
        outcome = run(kind, source)
        process.kill()
    if not outcome.landlock and kind != "bubblewrap":
        pytest.skip("a kernel without Landlock")
    assert outcome.how == "failed"
    assert "xyzzy" not in outcome.output


def test_files_outside_are_neither_written_nor_read(kind: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("xyzzy")
    if not run(kind, "pass").landlock and kind != "bubblewrap":
        pytest.skip("a kernel without Landlock")
    assert run(kind, f"print(open({str(secret)!r}).read())").how == "failed"
    assert run(kind, f"open({str(secret)!r}, 'w').write('mine')").how == "failed"
    assert run(kind, f"open({str(tmp_path / 'new')!r}, 'w')").how == "failed"
    assert run(kind, f"import os; os.unlink({str(secret)!r})").how == "failed"
    assert run(kind, f"import os; os.truncate({str(secret)!r}, 0)").how == "failed"
    assert secret.read_text() == "xyzzy"
    assert list(tmp_path.iterdir()) == [secret]


def test_the_package_itself_is_not_changed(kind: str) -> None:
    if not run(kind, "pass").landlock and kind != "bubblewrap":
        pytest.skip("a kernel without Landlock")
    before = Path(sandbox.__file__).read_bytes()
    assert run(kind, f"open({sandbox.__file__!r}, 'a').write('#')").how == "failed"
    assert Path(sandbox.__file__).read_bytes() == before


def test_there_is_no_network(kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        outcome = run(kind, f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2).sendall(b'hi')")
        if kind == "limits only" and not outcome.landlock:
            pytest.skip("a kernel without Landlock does not confine the network by limits alone")
        assert outcome.how == "failed"
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("kind", ["bubblewrap", "namespaces"], indirect=True)
def test_no_datagram_leaves(kind: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(0.2)
        place = server.getsockname()
        run(kind, f"import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'hi', {place!r})")
        with pytest.raises(TimeoutError):
            server.recv(10)


def test_descriptors_of_the_caller_are_closed(kind: str) -> None:
    source = "import os\nopen_now = []\nfor fd in range(64):\n    try: os.fstat(fd); open_now.append(fd)\n"
    source += "    except OSError: pass\nprint(len(open_now))"
    with tempfile.TemporaryFile() as held:
        os.set_inheritable(held.fileno(), True)
        # its three standard ones, and the two pipes to the tests
        assert run(kind, source).output == "5\n"


def test_input_is_empty(kind: str) -> None:
    assert run(kind, "import sys\nassert sys.stdin.read() == ''").ok


def test_what_bubblewrap_cannot_do_falls_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    sandbox._bubblewrap.cache_clear()
    try:
        outcome = run_untrusted("print('fine')")
    finally:
        sandbox._bubblewrap.cache_clear()
    assert outcome.output == "fine\n"
    assert outcome.isolation in ("namespaces", "limits only")
