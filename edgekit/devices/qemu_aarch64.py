"""aarch64 code on this machine: QEMU's user-mode emulation runs the ordinary agent and the ordinary engine.

What comes out is what a processor with the instructions of a Cortex-A76 computes, as in a Raspberry Pi 5. Speed,
memory and energy are never measured here. `edgekit device setup qemu-aarch64` fills a directory with Python and
llama.cpp for that processor.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PositiveInt

import edgekit
from edgekit.config import Strict
from edgekit.devices import Device, Fingerprint, Job, JobResult, describe_machine
from edgekit.devices._link import read_settings
from edgekit.devices._sysroot import fill_root
from edgekit.devices.agent import DESCRIBE
from edgekit.devices.board import BoardRecord, BoardState
from edgekit.devices.local import Local
from edgekit.errors import InputError, ToolError
from edgekit.measure.energy import run_command

if TYPE_CHECKING:
    from edgekit.devices.probe import Probed

CPU = "cortex-a76"
"""Emulated processor: an instruction that it does not have ends the job."""
ENGINE = "llama_cpp"
NOT_MEASURED = "speed, memory and energy were not measured: those of emulated instructions say nothing"
_SETUP = "edgekit device setup qemu-aarch64"
_SETUP_S = 300.0
_URL = re.compile(r"qemu-aarch64(?:://(?P<root>/[^?]*)?(?:\?(?P<settings>.*))?)?")


class Settings(Strict):
    """What the URL may set, as `?name=value`."""

    windows: PositiveInt = 2
    """How many windows of a reference are compared at most: emulation takes a quarter of a second or more for a token
    of a model with 135 million weights, and fewer than two give no interval."""


def open_device(url: str) -> Device:
    """Return the emulated processor of `qemu-aarch64[:///DIRECTORY][?windows=N]`. Raises InputError for another URL."""
    return QemuAarch64(url)


class QemuAarch64:
    """An emulated processor with the system in `root`."""

    def __init__(self, url: str) -> None:
        found = _URL.fullmatch(url)
        if found is None:
            usage = "qemu-aarch64[:///DIRECTORY][?windows=N]"
            raise InputError(f"a device {usage}", repr(url), "--device qemu-aarch64")
        self.root = Path(found["root"] or Path.home() / ".cache/edgekit/qemu-aarch64")
        self.settings = read_settings(Settings, found["settings"], url)

    @cached_property
    def _qemu(self) -> str:
        for name in ("qemu-aarch64-static", "qemu-aarch64"):
            if program := shutil.which(name):
                return program
        wanted, found = "QEMU's user-mode emulation of aarch64", "no program named qemu-aarch64-static"
        raise ToolError(wanted, found, "apt-get install qemu-user-static")

    def fingerprint(self) -> Fingerprint:
        """Describe the emulated processor and the machine that emulates it. Raises ToolError without QEMU."""
        here = describe_machine()
        told = re.search(r"version (\d[\w.]*)", run_command([self._qemu, "--version"]) or "")
        cpu = f"{CPU} (aarch64) emulated by QEMU {told[1] if told else 'of an unknown version'}"
        return Fingerprint(f"{cpu} on {here.text}", {**here.facts, "cpu": cpu, "machine": "aarch64"})

    def probe(self) -> Probed:
        """Raise InputError: what it measured would hold for no machine."""
        raise InputError("a device that exists", "an emulated one", "name a target of the catalog")

    def run(
        self, job: Job, *, timeout_s: float | None = None, progress: Callable[[str], None] | None = None
    ) -> JobResult:
        """Run what of the job does not ask for speed; the result's flags say what was left out.

        Raises as `Local.run` does, and InputError for questions to answer (hours, and times that mean nothing).
        """
        if job.engine != ENGINE:
            raise InputError(f"a bundle for {ENGINE}", job.engine, "--device local")
        if job.measure.answers is not None:
            raise InputError("accuracy on text, not tasks, on an emulated processor", "questions", "leave --task out")
        machine = self.fingerprint().text
        flags = [NOT_MEASURED] if job.measure.latency else []
        divergence = job.measure.divergence
        if divergence is not None:
            windows = min(divergence.windows or self.settings.windows, self.settings.windows)
            divergence = divergence.model_copy(update={"windows": windows})
            flags.append(f"accuracy was compared on {windows} window{'s' if windows > 1 else ''} at most")
        measure = job.measure.model_copy(update={"latency": None, "divergence": divergence})
        asked = job.model_copy(update={"measure": measure})
        with self._emulated() as local:
            result = local.run(asked, timeout_s=timeout_s, progress=progress)
        return result.model_copy(
            update={
                "device": machine,
                "measurements": tuple(m.model_copy(update={"device": machine}) for m in result.measurements),
                "board": BoardRecord(start=BoardState.model_validate({}), flags=tuple(flags)),
            }
        )

    def setup(self, progress: Callable[[str], None]) -> str:
        """Fill `root` and return what llama.cpp says of itself there. Raises ToolError."""
        fill_root(self.root, progress)
        with self._emulated() as local:
            command = [*local.python, "-m", "edgekit.devices.agent", DESCRIBE, ENGINE]
            done = subprocess.run(
                command, env=dict(local.environment), capture_output=True, text=True, timeout=_SETUP_S, check=False
            )
        try:
            return str(json.loads(done.stdout)["build"]["system"])
        except (ValueError, KeyError):
            found = [*done.stderr.splitlines(), f"exit code {done.returncode}"][-2:]
            raise ToolError(f"a {ENGINE} that starts in {self.root}", "; ".join(found), _SETUP) from None

    @contextmanager
    def _emulated(self) -> Iterator[Local]:
        """This machine as a device whose jobs run as aarch64 code."""
        interpreter = self.root / "usr/bin/python3"
        if not interpreter.exists():
            raise ToolError(f"Python for aarch64 in {self.root}", "none", _SETUP)
        with tempfile.TemporaryDirectory(prefix="edgekit-aarch64-") as name:
            # edgekit alone: beside it, this machine's packages may lie
            Path(name, "edgekit").symlink_to(Path(edgekit.__file__).parent)
            environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "QEMU_"))}
            environment |= {"PYTHONPATH": name, "PYTHONDONTWRITEBYTECODE": "1"}
            command = (self._qemu, "-cpu", CPU, "-L", str(self.root), str(interpreter), "-s", "-P")
            yield Local(command, environment)
