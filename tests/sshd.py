"""A real sshd of one's own for tests: as the board's it has a home, a `python3` and nothing of the user's settings."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin")


@dataclass
class Board:
    """A running sshd, and the directory it keeps everything in."""

    directory: Path
    address: str
    port: int
    prefix: tuple[str, ...] = ()
    """What starts it, e.g. within a network namespace."""
    process: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.directory / "home"

    @property
    def root(self) -> Path:
        return self.home / ".cache/edgekit/device"

    def url(self, **settings: object) -> str:
        given = {"connect_s": 20, "lost_s": 8, "python": sys.executable, **settings}
        query = "&".join(f"{name}={value}" for name, value in given.items() if value is not None)
        return f"ssh://{getpass.getuser()}@{self.address}:{self.port}?{query}"

    def sessions(self) -> list[psutil.Process]:
        """The server's processes for open connections."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children()

    def cut(self) -> None:
        """Kill every open connection, as a reset of the network would."""
        for session in self.sessions():
            for process in (*session.children()[:1], session):
                # the shell's processes stay: they have to notice by themselves
                if process.name().startswith("sshd"):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()

    def start(self) -> None:
        assert SSHD is not None
        command = [*self.prefix, SSHD, "-D", "-e", "-f", str(self.directory / "sshd_config")]
        with (self.directory / "sshd.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection((self.address, self.port), timeout=1):
                return
            assert self.process.poll() is None, (self.directory / "sshd.log").read_text()
            assert time.monotonic() < deadline, "sshd does not answer"
            time.sleep(0.05)

    def stop(self) -> None:
        assert self.process is not None
        self.cut()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(10)


def write_board(directory: Path, address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> Board:
    """Write keys, settings and a home; the server's commands run there with a `python3` that is this interpreter."""
    if SSHD is None:
        pytest.skip("sshd is not installed: apt-get install openssh-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("home", "bin"):
        (directory / name).mkdir(parents=True)
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)], check=True)
    shutil.copy(directory / "client.pub", directory / "authorized")
    write_known_hosts(directory, directory / "host.pub")
    _script(directory / "bin/python3", f'exec {sys.executable} "$@"')
    environment = f"export HOME={directory}/home PATH={directory}/bin:/usr/bin:/bin"
    _script(
        directory / "shell", f'{environment}\n. {directory}/environment\ncd\nexec /bin/sh -c "$SSH_ORIGINAL_COMMAND"'
    )
    (directory / "environment").touch()
    (directory / "sshd_config").write_text(
        f"ListenAddress {address}\nPort {port}\nHostKey {directory}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {directory}/authorized\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        f"ForceCommand {directory}/shell\nUseDNS no\nMaxStartups 100\n"
    )
    (directory / "ssh_config").write_text(
        f"Host *\n  IdentityFile {directory}/client\n  IdentitiesOnly yes\n  IdentityAgent none\n"
        f"  UserKnownHostsFile {directory}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
    )
    (directory / "path").mkdir()
    _script(directory / "path/ssh", f'exec {shutil.which("ssh")} -F {directory}/ssh_config "$@"')
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(parents=True, exist_ok=True)  # sshd gives up its rights there
    return Board(directory, address, port, tuple(prefix))


def write_known_hosts(directory: Path, key: Path) -> None:
    """Let the client know one host key, and no other."""
    (directory / "known_hosts").write_text(f"* {key.read_text()}")


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@contextlib.contextmanager
def running(board: Board) -> Iterator[Board]:
    """Start the server, and put the client with its settings first on PATH."""
    board.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{board.directory}/path:{os.environ['PATH']}")
        try:
            yield board
        finally:
            board.stop()
