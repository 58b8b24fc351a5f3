"""Where an engine runs: one file per kind of device, named as the scheme of its URL (`local`, `ssh://user@host`).

A dash in a scheme is an underscore in the file's name.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pkgutil
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from edgekit.config import Strict
from edgekit.devices.board import BoardRecord
from edgekit.engine import EngineOptions
from edgekit.errors import InputError, suggest
from edgekit.measurement import Measurement

if TYPE_CHECKING:
    from edgekit.devices.probe import Probed


class LatencyJob(Strict):
    """Arguments of `edgekit.measure.latency.measure_latency`."""

    prompt_tokens: PositiveInt = 128
    decode_tokens: PositiveInt = 64
    repeats: PositiveInt = 5
    warmup: NonNegativeInt = 1
    budget_s: PositiveFloat = 60


class DivergenceJob(Strict):
    """Arguments of `edgekit.measure.divergence.compare`."""

    reference: str
    """Directory of the source model's log-probabilities, on the device."""
    windows: PositiveInt | None = None


class Question(Strict):
    """What is asked, as `edgekit.tasks.Problem` has it, without what the checker knows."""

    prompt: str
    system: str | None = None
    chat: bool = True


class AnswersJob(Strict):
    """Questions that a bundle answers by its own strategy."""

    bundle: str
    """Its directory on the device."""
    questions: tuple[Question, ...]
    stop: tuple[str, ...] = ()
    max_tokens: PositiveInt = 256
    answer: str = "text"
    """How answers are compared in a vote."""
    seed: NonNegativeInt = 0


class Answered(Strict):
    """An answer and its cost."""

    text: str
    tokens_forward: NonNegativeInt
    """Positions computed, those of a verifier's own trunk included."""
    seconds: NonNegativeFloat


class Measures(Strict):
    """What to measure; what is left out is not measured."""

    latency: LatencyJob | None = None
    """Also gives `peak_rss_bytes`."""
    divergence: DivergenceJob | None = None
    answers: AnswersJob | None = None


class Job(Strict):
    """What a device does in one fresh process: open a model by an engine and measure it."""

    engine: str
    model: str
    """Path of the model on the device."""
    options: EngineOptions = EngineOptions()
    measure: Measures = Measures()
    of: str = "bundle"
    """What the measurements describe."""
    needs_bytes: NonNegativeInt = 0
    """Memory that the job is predicted to take; a device that has less free need not start it."""

    def with_paths(self, place: Callable[[str], str]) -> Job:
        """The same job with every path in it replaced."""
        changes: dict[str, Any] = {}
        if (divergence := self.measure.divergence) is not None:
            changes["divergence"] = divergence.model_copy(update={"reference": place(divergence.reference)})
        if (answers := self.measure.answers) is not None:
            changes["answers"] = answers.model_copy(update={"bundle": place(answers.bundle)})
        measure = self.measure.model_copy(update=changes)
        return self.model_copy(update={"model": place(self.model), "measure": measure})


class JobResult(Strict):
    """What a job found out."""

    device: str
    """Fingerprint of the machine, as in the measurements."""
    build: dict[str, str]
    """The engine's `build_info()`."""
    measurements: tuple[Measurement, ...] = ()
    divergence_per_window: tuple[float, ...] = ()
    """Mean KL divergence of each evaluation window, in nats."""
    answers: tuple[Answered, ...] = ()
    """In the order of the questions."""
    samples: Annotated[dict[str, tuple[float, ...]], Field(default_factory=dict)]
    """Every sample behind the figures of the latency, by their names."""
    board: BoardRecord | None = None
    """The machine's power mode, clocks, temperatures and throttling meanwhile."""


@dataclass(frozen=True)
class Fingerprint:
    """The machine, as far as it decides what a measurement says."""

    text: str
    """Short and stable: equal for equal machines with equal systems."""
    facts: dict[str, str | int]
    """cpu, cores, threads, memory_bytes, machine, os, kernel; board and accelerator where there are such."""


class Device(Protocol):
    """A machine that runs jobs."""

    def fingerprint(self) -> Fingerprint:
        """Describe the machine."""
        ...

    def probe(self) -> Probed:
        """Measure the machine itself, as a target. Raises ToolError where that says nothing."""
        ...

    def run(
        self, job: Job, *, timeout_s: float | None = None, progress: Callable[[str], None] | None = None
    ) -> JobResult:
        """Run a job in a fresh process; `progress` is told the name of each measurement as it arrives, and
        before that what keeps the device busy.

        Raises what the job raised, and ToolError when its process was killed, crashed or ran out of time, or when
        the device is out of reach.
        """
        ...


@cache
def device_names() -> tuple[str, ...]:
    """Kinds of devices: the files of this room that open one."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name.replace("_", "-") for name in names if hasattr(_module(name), "open_device")))


def open_device(url: str) -> Device:
    """Open `local`, or `SCHEME://...` by the file named as the scheme. Raises InputError with the closest name."""
    scheme = url.partition("://")[0]
    if scheme not in device_names():
        known = device_names()
        raise InputError(f"a device ({', '.join(known)})", f"{url!r}{suggest(scheme, known)}", "--device local")
    return cast(Device, _module(scheme.replace("-", "_")).open_device(url))


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


@cache
def describe_machine() -> Fingerprint:
    """Fingerprint the machine that this process runs on."""
    import psutil

    facts: dict[str, str | int] = {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        "threads": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "machine": platform.machine(),
        "os": _os_name(),
        "kernel": f"{platform.system()} {platform.release()}",
    }
    # a board's name, on Jetson and Raspberry Pi; the NVIDIA driver's version
    for name, path in (("board", "/proc/device-tree/model"), ("accelerator", "/proc/driver/nvidia/version")):
        if text := _first_line(path):
            facts[name] = text
    memory_gib = round(psutil.virtual_memory().total / (1 << 30))
    # the kernel keeps a little more or less of the memory at each boot
    identity = json.dumps(facts | {"memory_bytes": memory_gib << 30}, sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    title = facts.get("board", facts["cpu"])
    return Fingerprint(f"{title}, {facts['cores']} cores, {memory_gib} GiB, {facts['os']}, #{digest}", facts)


def _cpu_name() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    for key in ("model name", "Model", "CPU part"):
        if found := re.search(rf"^{key}\s*:\s*(\S.*)$", info, re.MULTILINE):
            return found[1].strip()
    return platform.machine()


def _os_name() -> str:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return f"{platform.system()} {platform.release()}"
    return release.get("PRETTY_NAME", platform.system())


def _first_line(path: str) -> str | None:
    try:
        lines = Path(path).read_text(errors="replace").replace("\0", "").splitlines()
    except OSError:
        return None
    return lines[0].strip() if lines else None
