"""The state of a board that decides its speed: power mode, clocks, temperatures, throttling; read, never set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, FiniteFloat, NonNegativeInt, StringConstraints

from edgekit.config import Strict
from edgekit.measure.energy import Run, run_command

WARMER_C = 10.0
"""Rise of the hottest sensor within a job from which it is told."""
SETTLES_HZ = 0.02
"""Share by which a clock's limit may change without a word."""
_THROTTLED = ("under-voltage", "capped clock", "throttled", "soft temperature limit")
"""Bits 0 to 3 of the Raspberry Pi's `get_throttled`, for now; 16 bits above, since boot."""
_MOST = 64  # sensors and clocks that are read; no board has as many

Word = Annotated[str, StringConstraints(max_length=200)]


class Clock(Strict):
    """A clock domain."""

    hz: NonNegativeInt
    limit_hz: NonNegativeInt | None = None
    """What it may reach now: a board that throttles lowers it."""
    governor: Word | None = None


class BoardState(Strict):
    """What was read; empty or None where the board has nothing to read."""

    power_mode: Word | None = None
    """The name of the nvpmodel mode."""
    power_modes: Annotated[tuple[Word, ...], Field(max_length=_MOST)] = ()
    """The names of all of them."""
    clocks: Annotated[dict[Word, Clock], Field(default_factory=dict, max_length=2 * _MOST)]
    """CPU policies and other devices that scale their frequency, e.g. the GPU of a Jetson."""
    temperatures_c: Annotated[dict[Word, FiniteFloat], Field(default_factory=dict, max_length=_MOST)]
    throttle_bits: NonNegativeInt | None = None
    """Raspberry Pi: as `vcgencmd get_throttled` tells them."""
    throttle_counts: Annotated[dict[Word, NonNegativeInt], Field(default_factory=dict, max_length=_MOST)]
    """x86: how often each core or package was throttled since boot."""
    accelerators: Annotated[tuple[Word, ...], Field(max_length=_MOST)] = ()
    """Device nodes of GPUs that compute."""


class BoardRecord(Strict):
    """A board during a job."""

    start: BoardState
    end: BoardState | None = None
    """None when the job did not come to its end."""
    throttled: bool | None = None
    """Whether anything was slowed down meanwhile; None where the board does not tell."""
    flags: tuple[str, ...] = ()
    """Sentences about what makes its figures less comparable; none is good news."""


def read_state(root: Path = Path("/"), run: Run = run_command) -> BoardState:
    """Read the state below `root`; `run` executes a command of the vendor and returns what it prints, or None."""
    return BoardState(
        power_mode=_power_mode(root, run),
        power_modes=tuple(_power_modes(root).values())[:_MOST],
        clocks=dict([*_cpu_clocks(root), *_other_clocks(root)][: 2 * _MOST]),
        temperatures_c=_temperatures(root),
        throttle_bits=_throttle_bits(root, run),
        throttle_counts=_throttle_counts(root),
        accelerators=_accelerators(root),
    )


def flags_of(start: BoardState, end: BoardState, build: Mapping[str, str]) -> tuple[str, ...]:
    """Say what changed in between, what throttled, and an accelerator that the engine (`build`) did not use."""
    found = []
    if start.power_mode != end.power_mode:
        found.append(f"power mode changed from {start.power_mode} to {end.power_mode}")
    found += _throttling(start, end)
    if start.temperatures_c and end.temperatures_c:
        cold, hot = max(start.temperatures_c.values()), max(end.temperatures_c.values())
        if hot - cold >= WARMER_C:
            found.append(f"the temperature rose from {cold:.0f} to {hot:.0f} C: a longer run may be slower")
    for name in sorted(start.clocks.keys() & end.clocks.keys()):
        before, after = start.clocks[name], end.clocks[name]
        if before.governor != after.governor:
            found.append(f"governor of {name} changed from {before.governor} to {after.governor}")
        if before.limit_hz and after.limit_hz and abs(_limit_change(before, after)) > SETTLES_HZ:
            found.append(f"limit of {name} went from {before.limit_hz / 1e6:.0f} to {after.limit_hz / 1e6:.0f} MHz")
    if start.accelerators and not uses_accelerator(build):
        found.append(f"the accelerator ({', '.join(start.accelerators)}) was not used: all ran on the CPU")
    return tuple(found)


def throttled(start: BoardState, end: BoardState) -> bool | None:
    """Whether the board throttled between two states: its own word, or a clock's limit that fell.

    None where nothing tells: a limit that stays says little, for some boards throttle without lowering it.
    """
    fell = any(
        _limit_change(start.clocks[name], end.clocks[name]) < -SETTLES_HZ
        for name in start.clocks.keys() & end.clocks.keys()
    )
    if fell or _throttling(start, end):
        return True
    return None if end.throttle_bits is None and not end.throttle_counts else False


def uses_accelerator(build: Mapping[str, str]) -> bool:
    """Whether an engine's build information, with what its opened model told, says that an accelerator computed."""
    return (
        build.get("offloaded_layers", "0") != "0"
        or build.get("provider", "CPUExecutionProvider") != "CPUExecutionProvider"
        or build.get("device", "cpu") != "cpu"
    )


def _limit_change(before: Clock, after: Clock) -> float:
    """Relative change of a clock's limit; 0 where it is not known."""
    return after.limit_hz / before.limit_hz - 1 if before.limit_hz and after.limit_hz else 0.0


def _throttling(start: BoardState, end: BoardState) -> list[str]:
    found = []
    bits, before = end.throttle_bits or 0, start.throttle_bits or 0
    # what holds at either end, and what happened first in between
    during = (before | bits) & 0xF | (bits & ~before) >> 16 & 0xF
    if words := [word for bit, word in enumerate(_THROTTLED) if during >> bit & 1]:
        found.append(f"the board throttled: {', '.join(words)}")
    grown = [name for name, count in end.throttle_counts.items() if count > start.throttle_counts.get(name, count)]
    if grown:
        found.append(f"the processor throttled: {len(grown)} counters grew")
    return found


def _power_mode(root: Path, run: Run) -> str | None:
    # the service writes pmode:ID; the configuration names the mode
    if status := re.search(r"pmode:0*(\d+)", _read(root / "var/lib/nvpmodel/status") or ""):
        return _power_modes(root).get(status[1], f"mode {status[1][:9]}")
    told = re.search(r"NV Power Mode:\s*(\S{1,100})", run(["nvpmodel", "-q"]) or "")
    return told[1] if told else None


def _power_modes(root: Path) -> dict[str, str]:
    """Names of the modes by their numbers."""
    found = re.findall(r"POWER_MODEL\s+ID=0*(\d+)\s+NAME=(\S{1,100})", _read(root / "etc/nvpmodel.conf") or "")
    return dict(found)


def _cpu_clocks(root: Path) -> list[tuple[str, Clock]]:
    found = []
    for path in sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))[:_MOST]:
        hz = _read_int(path / "scaling_cur_freq")
        if hz is not None and hz >= 0:
            limit = _read_int(path / "scaling_max_freq")
            governor = _word(path / "scaling_governor")
            clock = Clock(hz=hz * 1000, limit_hz=limit * 1000 if limit else None, governor=governor)
            found.append((f"cpu {path.name.removeprefix('policy')}", clock))
    return found


def _other_clocks(root: Path) -> list[tuple[str, Clock]]:
    found = []
    for path in sorted((root / "sys/class/devfreq").glob("*"))[:_MOST]:
        hz = _read_int(path / "cur_freq")
        if hz is not None and hz >= 0:
            clock = Clock(hz=hz, limit_hz=_read_int(path / "max_freq") or None, governor=_word(path / "governor"))
            found.append((path.name[:200], clock))
    return found


def _temperatures(root: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*"))[:_MOST]:
        value = _read_int(zone / "temp")
        # a sensor that is off tells nothing, or -256 degrees
        if value is not None and -50_000 < value < 200_000:
            kind = _word(zone / "type") or zone.name
            found[kind if kind not in found else f"{kind} {zone.name}"] = value / 1000
    return found


def _throttle_bits(root: Path, run: Run) -> int | None:
    text = _read(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    if text is None:
        text = (run(["vcgencmd", "get_throttled"]) or "").strip().removeprefix("throttled=")
    return int(text, 16) if re.fullmatch(r"(0x)?[0-9a-fA-F]{1,8}", text) else None


def _throttle_counts(root: Path) -> dict[str, int]:
    found = {}
    for name in ("core_throttle_count", "package_throttle_count"):
        for path in sorted((root / "sys/devices/system/cpu").glob(f"cpu*/thermal_throttle/{name}"))[: _MOST // 2]:
            count = _read_int(path)
            if count is not None and count >= 0:
                found[f"{path.parents[1].name} {name.partition('_')[0]}"] = count
    return found


def _accelerators(root: Path) -> tuple[str, ...]:
    names = ("nvidia0", "nvhost-gpu", "nvgpu/igpu0", "kfd")
    return tuple(f"/dev/{name}" for name in names if (root / "dev" / name).exists())


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None


def _word(path: Path) -> str | None:
    text = _read(path)
    return text[:100] if text else None


def _read_int(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text and re.fullmatch(r"-?\d{1,15}", text) else None
