"""Energy that a machine takes while a model runs, from the sensors that boards and processors have.

A sensor tells watts, and is sampled, or counts joules, and is read at both ends. Every sensor says what it covers: a
board, a module, a processor package, a card. Nothing here is set, and nothing raises where a sensor is missing.
"""

from __future__ import annotations

import importlib
import math
import re
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

SAMPLE_S = 0.1
COMMAND_SAMPLE_S = 0.25
"""A sensor that a command reads takes CPU time from the model: it is read less often."""
LEAST_SAMPLES = 5
"""Of a sensor that tells watts, within the time that is asked for."""
_COMMAND_S = 5.0
_TOTALS = ("VDD_IN", "VIN", "POM_5V_IN")
"""Rails of Jetson modules that feed all others."""
_WITHIN = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}
"""Rails that another one feeds (AGX Orin)."""

Run = Callable[[Sequence[str]], str | None]


class SensorFailed(Exception):
    """No figure, and why: a phrase for people."""


@dataclass(frozen=True)
class Power:
    """A sensor that tells watts."""

    scope: str
    """What it covers: `board`, `module`, `package` or `GPU`."""
    label: str
    """Where the figure comes from, for people."""
    read_w: Callable[[], float]
    """Raises SensorFailed."""
    period_s: float = SAMPLE_S

    @property
    def text(self) -> str:
        """Scope, source and sample period."""
        return f"{self.scope}: {self.label}, read every {self.period_s:g} s"


@dataclass(frozen=True)
class Counter:
    """A sensor that counts joules in one or more zones."""

    scope: str
    label: str
    read_j: Callable[[], Sequence[float]]
    """One count for each zone. Raises SensorFailed."""
    wraps_j: Sequence[float]
    """Where each zone starts again at 0; inf where it does not."""

    @property
    def text(self) -> str:
        """Scope and source."""
        return f"{self.scope}: {self.label}, counters read at both ends"


@dataclass(frozen=True)
class Mark:
    """An instant: the clock, and what every counter said then, or why it said nothing."""

    at_s: float
    counts: tuple[Sequence[float] | SensorFailed, ...]


@dataclass
class _Samples:
    """What a sensor of watts said, and when."""

    times: list[float] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)
    failed: SensorFailed | None = None


class Meter:
    """Sensors that are read together; their energies add up. In a `with`, sensors of watts are sampled by threads."""

    def __init__(
        self, sensors: Sequence[Power | Counter], problem: str = "", clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`problem` says why there is no sensor where the machine has one."""
        self.sensors = tuple(sensors)
        self.problem = problem
        self._clock = clock
        self._powers = [sensor for sensor in self.sensors if isinstance(sensor, Power)]
        self._counters = [sensor for sensor in self.sensors if isinstance(sensor, Counter)]
        self._samples = [_Samples() for _ in self._powers]
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def text(self) -> str:
        """What is measured and how."""
        return "; ".join(sensor.text for sensor in self.sensors)

    @property
    def least_s(self) -> float:
        """The shortest time that a figure should be taken over: some counters move only a few times a second."""
        return max([0.5, *((LEAST_SAMPLES + 3) * power.period_s for power in self._powers)])

    def __enter__(self) -> Self:
        self._ended.clear()
        self.sample()
        self._threads = [
            threading.Thread(target=self._watch, args=pair, daemon=True)
            for pair in zip(self._powers, self._samples, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self.sample()

    def sample(self) -> None:
        """Read every sensor of watts once; one that failed is not read again."""
        for power, samples in zip(self._powers, self._samples, strict=True):
            self._sample(power, samples)

    def _watch(self, power: Power, samples: _Samples) -> None:
        while samples.failed is None and not self._ended.wait(power.period_s):
            self._sample(power, samples)

    def _sample(self, power: Power, samples: _Samples) -> None:
        if samples.failed is not None:
            return
        before = self._clock()
        try:
            watts = power.read_w()
            if not (math.isfinite(watts) and watts >= 0):
                raise SensorFailed(f"{power.label} told {watts} W")
        except SensorFailed as failure:
            samples.failed = failure
            return
        samples.times.append((before + self._clock()) / 2)
        samples.watts.append(watts)

    def mark(self) -> Mark:
        """The instant at which a measurement starts or ends."""

        def count(counter: Counter) -> Sequence[float] | SensorFailed:
            try:
                return tuple(counter.read_j())
            except SensorFailed as failure:
                return failure

        return Mark(self._clock(), tuple(map(count, self._counters)))

    def joules(self, start: Mark, end: Mark) -> float:
        """Energy between two marks; ask when the `with` has ended. Raises SensorFailed."""
        if not self.sensors:
            raise SensorFailed(self.problem or "no sensor")
        total = 0.0
        for samples, power in zip(self._samples, self._powers, strict=True):
            if samples.failed and not (samples.times and samples.times[-1] >= end.at_s):
                raise samples.failed
            inside = sum(start.at_s <= at <= end.at_s for at in samples.times)
            if inside < LEAST_SAMPLES:
                raise SensorFailed(f"{power.label} told {inside} samples in {end.at_s - start.at_s:.2g} s, too few")
            total += integrate(samples.times, samples.watts, start.at_s, end.at_s)
        for counter, first, last in zip(self._counters, start.counts, end.counts, strict=True):
            for count in (first, last):
                if isinstance(count, SensorFailed):
                    raise count
            total += counted_j(counter, first, last)  # type: ignore[arg-type]
        return total


def integrate(times_s: Sequence[float], watts: Sequence[float], start_s: float, end_s: float) -> float:
    """Joules between two instants by the trapezoid rule, power at the ends interpolated between samples.

    Before the first and after the last sample the power is taken as theirs.
    """
    times, values = np.asarray(times_s, float), np.asarray(watts, float)
    inside = (times > start_s) & (times < end_s)
    at = np.concatenate([[start_s], times[inside], [end_s]])
    return float(np.trapezoid(np.interp(at, times, values), at))


def counted_j(counter: Counter, first: Sequence[float], last: Sequence[float]) -> float:
    """Joules between two readings, each zone having started again at 0 once at most. Raises SensorFailed."""
    total = 0.0
    for before, after, wrap in zip(first, last, counter.wraps_j, strict=True):
        gone = after - before
        if gone < 0:
            if math.isinf(wrap) or before > wrap:
                raise SensorFailed(f"{counter.label} went backwards")
            gone += wrap
        total += gone
    if not (math.isfinite(total) and total > 0):
        raise SensorFailed(f"{counter.label} did not move")
    return total


# --- sensors


def run_command(command: Sequence[str]) -> str | None:
    """What a command prints; None when there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout


def find_meter(accelerated: bool, root: Path = Path("/"), run: Run = run_command) -> Meter:
    """The sensors that cover what computes here, the widest first; without one the meter has none, and may say why.

    A board's or module's input covers all. Else the processor's packages count, and the cards where one computes.

    Args:
        accelerated: Whether the model runs on a GPU.
        root: Where `sys` lies.
        run: Executes a vendor's command and returns what it prints, or None.
    """
    problems: list[str] = []

    def attempt(find: Callable[[], Power | Counter | None]) -> list[Power | Counter]:
        try:
            found = find()
        except SensorFailed as failure:
            problems.append(str(failure))
            return []
        return [] if found is None else [found]

    if board := attempt(lambda: jetson(root)) or attempt(lambda: raspberry_pi(run)):
        return Meter(board)
    sensors = attempt(lambda: rapl(root)) + (attempt(lambda: nvidia(run)) if accelerated else [])
    if accelerated and not any(sensor.scope == "GPU" for sensor in sensors):
        # the processor's share alone would be mistaken for the whole
        return Meter([], "; ".join([*problems, "nothing tells the GPU's power"]))
    return Meter(sensors, "" if sensors else "; ".join(problems))


def jetson(root: Path = Path("/")) -> Power | None:
    """The INA3221 monitors of a Jetson: the rail that feeds the module, or the sum of those side by side.

    Voltage in mV times current in mA, of three channels a chip. Raises SensorFailed where a rail cannot be read.
    """
    rails: dict[str, tuple[Path, Path]] = {}
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if _word(chip / "name") != "ina3221":
            continue
        for channel in (1, 2, 3):
            label = _word(chip / f"in{channel}_label")
            volts, amps = chip / f"in{channel}_input", chip / f"curr{channel}_input"
            if label and label != "NC" and volts.exists() and amps.exists():
                rails[label] = volts, amps
    if not rails:
        return None
    total = next((name for name in _TOTALS if name in rails), None)
    chosen = [total] if total else [name for name in rails if _WITHIN.get(name) not in rails]

    def read_w() -> float:
        return sum(_number(rails[name][0]) * _number(rails[name][1]) for name in chosen) * 1e-6

    read_w()
    return Power("module", f"INA3221 {' + '.join(chosen)}", read_w)


def raspberry_pi(run: Run) -> Power | None:
    """The power management chip of a Raspberry Pi 5.

    W = 1.1451 * sum(V * I) + 0.5879, fitted by its users against meters at the supply: the chip does not see the 5 V
    that USB and HATs take.
    """

    def read_w() -> float:
        told = run(["vcgencmd", "pmic_read_adc"])
        found = re.findall(r"^\s*(\w+)_([AV])\b[^=\n]*=(\d+(?:\.\d+)?)[AV]\s*$", told or "", re.MULTILINE)
        volts, amps = ({name: float(value) for name, kind, value in found if kind == one} for one in "VA")
        if not volts.keys() & amps.keys():
            raise SensorFailed("vcgencmd pmic_read_adc told no voltage with its current")
        return 1.1451 * sum(volts[name] * amps[name] for name in sorted(volts.keys() & amps.keys())) + 0.5879

    try:
        read_w()
    except SensorFailed:
        # another board, or a Pi 4, which has no such sensor
        return None
    return Power("board", "PMIC of the Raspberry Pi, fitted", read_w, COMMAND_SAMPLE_S)


def rapl(root: Path = Path("/")) -> Counter | None:
    """The energy counters of Intel's and AMD's processors: packages, and memory where it is counted apart.

    Raises SensorFailed where they cannot be read: since 2020 Linux shows them to root only.
    """
    zones = []
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        name = _word(zone / "name") or ""
        if name.startswith("package") or name == "dram":
            zones.append((name, zone))
    if not zones:
        return None

    def wrap(zone: Path) -> float:
        try:
            return _number(zone / "max_energy_range_uj") * 1e-6 or math.inf
        except SensorFailed:
            return math.inf

    def read_j() -> list[float]:
        return [_number(zone / "energy_uj") * 1e-6 for _, zone in zones]

    read_j()
    return Counter(
        "package", f"RAPL {' + '.join(name for name, _ in zones)}", read_j, [wrap(zone) for _, zone in zones]
    )


def nvidia(run: Run) -> Power | Counter | None:
    """All NVIDIA cards: NVML's energy counters where its Python package is installed, else what nvidia-smi tells."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return _nvidia_smi(run)
    try:
        return _nvml(nvml)
    except Exception as error:  # NVML's errors derive from nothing but Exception
        if smi := _nvidia_smi(run):
            return smi
        raise SensorFailed(f"NVML: {error}") from None


def _nvml(nvml: Any) -> Counter:
    nvml.nvmlInit()
    cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]

    def read_j() -> list[float]:
        try:
            return [nvml.nvmlDeviceGetTotalEnergyConsumption(card) * 1e-3 for card in cards]
        except Exception as error:
            raise SensorFailed(f"NVML: {error}") from None

    read_j()
    return Counter("GPU", f"NVML, {len(cards)} card{'s' if len(cards) > 1 else ''}", read_j, [math.inf] * len(cards))


def _nvidia_smi(run: Run) -> Power | None:
    def read_w() -> float:
        told = run(["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"])
        lines = [line.strip() for line in (told or "").splitlines() if line.strip()]
        if not lines or not all(re.fullmatch(r"\d+(\.\d+)?", line) for line in lines):
            raise SensorFailed(f"nvidia-smi told no power ({', '.join(lines)[:60] or 'nothing'})")
        return sum(map(float, lines))

    if run(["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]) is None:
        return None
    read_w()
    return Power("GPU", "nvidia-smi", read_w, COMMAND_SAMPLE_S)


def _word(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()[:80] or None
    except OSError:
        return None


def _number(path: Path) -> float:
    """A whole number in a file of the kernel's. Raises SensorFailed."""
    try:
        text = path.read_text(errors="replace").strip()
    except PermissionError:
        raise SensorFailed(f"only root may read {path}") from None
    except OSError as error:
        raise SensorFailed(f"{path}: {error.strerror}") from None
    if not re.fullmatch(r"-?\d{1,20}", text, re.ASCII):
        raise SensorFailed(f"{path} holds {text[:20]!r}, not a number")
    return float(text)
