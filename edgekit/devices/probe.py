"""A machine as a target, measured in about a second with numpy and what the system tells.

It is the target `local`. `edgekit targets probe` also times llama.cpp's kernels and keeps it in a file under a name of
its own: then it stands for a board.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from edgekit.devices import Fingerprint, describe_machine
from edgekit.devices._results import printable
from edgekit.devices.board import BoardState, read_state
from edgekit.errors import InputError, ToolError
from edgekit.target import LOCAL, Compute, Figure, Memory, Target

COPY_SECONDS = 0.4
MATMUL_SECONDS = 0.25
COPY_BYTES = 256 << 20
"""Each way, the largest size. A quarter, the smallest, is larger than the last-level cache of what is a target."""
MATMUL_SIZE = 64
"""Small enough for OpenBLAS to stay on one thread: its own threads wait for each other on a busy machine."""
MATMUL_BATCH = 64
BUSY_SHARE = 0.25
"""Share of the machine that others may use during the measurement before the profile says so."""
BIG_CORE_CAPACITY = 0.6
"""A core below this share of the fastest core's capacity is a little one (Linux `cpu_capacity`, Arm only)."""

_HERE = "measured on this machine"
_MAX_TEXT = 1000

_ARCHITECTURES: dict[str, Literal["aarch64", "x86_64"]] = {
    "aarch64": "aarch64",
    "arm64": "aarch64",
    "x86_64": "x86_64",
    "amd64": "x86_64",
}


@cache
def probe_local() -> Target:
    """Profile this machine as the target `local`; measured once per process.

    Raises:
        ToolError: the processor is neither x86-64 nor 64-bit Arm.
    """
    arch = _ARCHITECTURES.get(platform.machine().lower())
    if arch is None:
        raise ToolError("an x86-64 or 64-bit Arm processor", platform.machine() or "an unknown one", "edgekit doctor")
    gpu = _nvidia_gpu()
    system = _system()
    accelerator: Literal["none", "cuda", "metal"] = "none"
    if gpu:
        accelerator = "cuda"
    elif system == "macos" and arch == "aarch64":
        accelerator = "metal"
    repack = arch == "aarch64" and accelerator == "none"
    threads = physical_cores()
    load = _OthersLoad()
    memory = (gpu and _gpu_memory(gpu)) or _host_memory(threads, unified=accelerator != "none")
    flops = gpu.dense_flops if gpu else _measured(measure_matmul_flops_per_s(threads), "FP32 matmul, numpy")
    notes = ["The GPU's figures hold for a llama.cpp built with CUDA."] if gpu else []
    if load.share() > BUSY_SHARE:
        notes.append("Other programs kept the machine busy during the measurement: it can do more than this.")
    return Target(
        name=LOCAL,
        title=f"{gpu.name if gpu else _processor()} (this machine)",
        arch=arch,
        os=system,
        engines=("llama_cpp",),
        default_recipe="gguf-q4-0" if repack else "gguf-best",
        default_recipe_reason=(
            "llama.cpp repacks Q4_0 for Arm cores at load time, which makes prefill several times faster"
            if repack
            else "decode is bound by memory bandwidth, so 4 bits per weight nearly halve the time of 8; types chosen "
            "for a budget of bytes lose the least there"
        ),
        memory=memory,
        compute=Compute(
            accelerator=accelerator,
            threads=threads,
            dense_flops_per_s=flops,
            decode_efficiency=_guess(0.8, "share of the copy bandwidth that CPU boards reach, 0.63 to 0.96")
            if not gpu
            else _guess(0.75, "as on the GeForce and L4 cards of the catalog, 0.78 to 0.8, rounded down"),
            prefill_efficiency=_guess(0.5, "as on CPUs of the catalog against their FP32 peak, 0.5 to 0.55")
            if not gpu
            else _guess(0.4, "as on the GeForce RTX 3060 of the catalog"),
            token_overhead_s=_guess(0.0005, "sampling and synchronisation on a desktop processor"),
        ),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class Probed:
    """A machine as it described itself."""

    target: Target
    machine: Fingerprint
    state: BoardState
    power_sensors: str
    """What tells its power, or empty."""


def probe_machine() -> Probed:
    """Probe the machine that this process runs on. Raises ToolError as `probe_local` does."""
    from edgekit.measure.energy import find_meter

    target = _with_kernels(probe_local())
    meter = find_meter(target.compute.accelerator != "none")
    return Probed(target, describe_machine(), read_state(), meter.text)


def _with_kernels(target: Target) -> Target:
    """The profile with what weights cost on llama.cpp's kernels here, or with a note that says why not."""
    from edgekit.measure.kernels import HIDDEN, measure_weight_costs

    threads, load = target.compute.threads, _OthersLoad()
    try:
        costs = measure_weight_costs(threads)
    except ToolError as error:
        reason = error.found
    else:
        # threads that wait for one that lost its processor make a type ten times slower than it is
        reason = "other programs kept the machine busy" if load.share() > BUSY_SHARE else ""
    if reason:
        note = f"What a weight of each type costs in decode was not measured: {reason}."
        return target.model_copy(update={"notes": (*target.notes, note)})
    how = f"llama.cpp's kernels, {threads} threads, matrices of {HIDDEN} columns"
    compute = target.compute.model_copy(update={"weight_costs": _measured(costs, how)})
    return target.model_copy(update={"compute": compute})


def name_target(probed: Probed, name: str) -> Target:
    """The profile under a name of its own: its figures say on which machine they were measured.

    What the machine told is made printable. Raises InputError as `check_name` does.
    """
    check_name(name)
    facts, state, target = probed.machine.facts, probed.state, probed.target
    title = str(facts.get("board") or target.title.removesuffix(" (this machine)"))
    notes = [
        *target.notes,
        f"Probed while it ran: {facts.get('os')}, {facts.get('kernel')}, {facts.get('cpu')}, {facts.get('cores')} "
        f"cores, {facts.get('threads')} threads.",
        "Context, recipe and everything marked as an estimate are defaults, not measured.",
    ]
    if state.power_mode:
        notes.append(f"It was in power mode {state.power_mode}.")
    notes.append(f"Temperature sensors: {', '.join(state.temperatures_c) or 'none'}.")
    notes.append(f"Power sensors: {probed.power_sensors or 'none: measure energy at the wall'}.")
    power = target.power.model_copy(update={"modes": state.power_modes})
    named = target.model_copy(update={"name": name, "title": title, "power": power, "notes": tuple(notes)})
    return Target.model_validate(_told(named.model_dump(mode="json"), f"measured on {probed.machine.text}"))


def check_name(name: str) -> None:
    """Raise InputError for a name that no target can have."""
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        wanted = "a name of small letters, digits and single dashes"
        raise InputError(wanted, repr(name), f"--out {slug(name)}.yaml")


def slug(text: str) -> str:
    """The text as the name of a target."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].rstrip("-") or "board"


def _told(value: Any, measured: str) -> Any:
    """Every text made printable, and what says `measured on this machine` names the machine."""
    if isinstance(value, dict):
        return {key: _told(item, measured) for key, item in value.items()}
    if isinstance(value, list):
        return [_told(item, measured) for item in value]
    if isinstance(value, str):
        return printable(value.replace(_HERE, measured))[:_MAX_TEXT]
    return value


def physical_cores() -> int:
    """Physical big cores that this process may use: CPU affinity and the container's quota are respected."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # not on macOS or Windows
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    root = Path("/sys/devices/system/cpu")
    capacity = {cpu: _read_int(root / f"cpu{cpu}/cpu_capacity") or 1 for cpu in cpus}
    big = [cpu for cpu in cpus if capacity[cpu] >= BIG_CORE_CAPACITY * max(capacity.values())]
    siblings = {_read(root / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in big}
    quota = _cpu_quota()
    return max(1, min(len(siblings), round(quota) if quota else len(siblings)))


def measure_copy_bytes_per_s(threads: int) -> float:
    """Bytes read plus bytes written per second by `threads` copying memory at once.

    Three sizes are copied, each the double of the one before, and of each the best of several passes counts, for
    others only slow it down; the median of the three leaves out a size that still profits from a cache.
    """
    room = min(COPY_BYTES, psutil.virtual_memory().available // 8)
    source = np.ones(max(room // 8, 4), dtype=np.float64)
    target = np.zeros_like(source)
    with ThreadPoolExecutor(threads) as pool:  # numpy copies without the interpreter lock

        def rate(count: int) -> float:
            into, parts = np.array_split(target[:count], threads), np.array_split(source[:count], threads)
            seconds = _best_seconds(lambda: list(pool.map(np.copyto, into, parts)), COPY_SECONDS / 3)
            return 2 * parts[0].itemsize * count / seconds

        return statistics.median(rate(len(source) // part) for part in (4, 2, 1))


def measure_matmul_flops_per_s(threads: int) -> float:
    """Float32 operations per second of `threads` multiplying batches of small matrices; the best of many passes."""
    factors = np.ones((threads, MATMUL_BATCH, MATMUL_SIZE, MATMUL_SIZE), dtype=np.float32)
    products = np.empty_like(factors)
    with ThreadPoolExecutor(threads) as pool:

        def multiply() -> None:
            list(pool.map(lambda into, factor: np.matmul(factor, factor, out=into), products, factors))

        return 2 * MATMUL_SIZE**3 * MATMUL_BATCH * threads / _best_seconds(multiply, MATMUL_SECONDS)


def _best_seconds(run: Callable[[], object], budget_s: float) -> float:
    """Shortest time of `run`, repeated within the budget; the first pass warms up and does not count."""
    deadline = time.perf_counter() + budget_s
    run()
    best = float("inf")
    while best == float("inf") or time.perf_counter() + best < deadline:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


class _OthersLoad:
    """How much of the machine other processes use from here on."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.perf_counter(), psutil.cpu_times().idle, time.process_time()

    def share(self) -> float:
        wall, idle, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        capacity = wall * (psutil.cpu_count() or 1)
        return 1 - (idle + own) / capacity if capacity else 0.0


def _host_memory(threads: int, *, unified: bool) -> Memory:
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit, used in _memory_limits():
        total = min(total, limit)
        available = min(available, max(limit - used, 0))
    return Memory(
        total_bytes=_measured(total, "reported by the system or the container's limit"),
        usable_bytes=_measured(max(min(available, total), 1), "available now"),
        bandwidth_bytes_per_s=_measured(
            measure_copy_bytes_per_s(threads),
            f"copy bandwidth, not the peak of the memory: bytes read plus written, numpy, {threads} threads",
        ),
        unified=unified,
    )


def _memory_limits() -> list[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of every control group this process is in that has a limit."""
    found = []
    for group in _control_groups("memory"):
        limit = _read_int(group / "memory.max") or _read_int(group / "memory.limit_in_bytes")
        used = _read_int(group / "memory.current") or _read_int(group / "memory.usage_in_bytes") or 0
        if limit:
            cache_lines = [line.split() for line in (_read(group / "memory.stat") or "").splitlines()]
            dropped = next((int(line[1]) for line in cache_lines if line[0] == "inactive_file"), 0)
            found.append((limit, max(used - dropped, 0)))
    return found


def _cpu_quota() -> float | None:
    """CPUs that the tightest control group grants (`cpu.max`: microseconds per period), or None."""
    quotas = []
    for group in _control_groups("cpu"):
        fields = (_read(group / "cpu.max") or "").split()
        if len(fields) == 2 and fields[0].isdigit():
            quotas.append(int(fields[0]) / int(fields[1]))
    return min(quotas, default=None)


def _control_groups(controller: str) -> list[Path]:
    """Directories of this process's control group and its parents (version 2, or version 1's controller)."""
    root = Path("/sys/fs/cgroup")
    found = []
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        number, controllers, name = line.split(":", 2)
        if number == "0" or controller in controllers.split(","):
            base = root if number == "0" else root / controller
            group = base / name.lstrip("/")
            found += [group, *(parent for parent in group.parents if parent.is_relative_to(base))]
    return found


@dataclass(frozen=True)
class _Gpu:
    name: str
    memory_bytes: tuple[int, int] | None
    """Total and free; None where the GPU shares the memory of the host (Jetson)."""
    bandwidth_bytes_per_s: float
    dense_flops: Figure[float]


# cuDeviceGetAttribute keys (CUdevice_attribute in cuda.h)
_CLOCK_KHZ, _SM_COUNT, _MEMORY_CLOCK_KHZ, _BUS_BITS, _MAJOR, _MINOR = 13, 16, 36, 37, 75, 76
_FP16_FLOPS_PER_SM_CLOCK = {(8, 0): 2048, (8, 7): 2048, (9, 0): 4096}
"""Dense tensor-core rate by compute capability; 1024 for the others since Turing."""


def _nvidia_gpu() -> _Gpu | None:
    """First GPU that nvidia-smi lists, or a Jetson's; memory clock and bus width come from the driver library."""
    try:
        name, total, free = _nvidia_smi() or _tegra()
        attributes = _cuda_attributes()
        bandwidth = 2 * attributes[_MEMORY_CLOCK_KHZ] * 1e3 * attributes[_BUS_BITS] / 8
        rate = _FP16_FLOPS_PER_SM_CLOCK.get((attributes[_MAJOR], attributes[_MINOR]), 1024)
        flops = attributes[_SM_COUNT] * attributes[_CLOCK_KHZ] * 1e3 * rate
        how = f"{attributes[_SM_COUNT]} multiprocessors x {attributes[_CLOCK_KHZ] / 1e6:.2f} GHz x {rate} operations"
        own = (int(total) << 20, int(free) << 20) if total.isdigit() and free.isdigit() else None
        return _Gpu(name, own, bandwidth, _guess(flops, how))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None  # no NVIDIA GPU, or none that answers


def _nvidia_smi() -> list[str] | None:
    """Name, total and free memory in MiB; None where the command is missing, as on a Jetson before JetPack 6."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [field.strip() for field in done.stdout.splitlines()[0].split(",")]


def _tegra() -> list[str]:
    """The same of the GPU that shares a Jetson's memory. Raises OSError where there is none."""
    if not any("gpu" in node for node in read_state().accelerators):
        raise OSError("no GPU of a Jetson")
    return [str(describe_machine().facts.get("board", "Jetson")), "shared", "shared"]


def _cuda_attributes() -> dict[int, int]:
    """Attributes of CUDA device 0. Raises OSError without a working driver."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, value = ctypes.c_int(), ctypes.c_int()
    found = {}
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        raise OSError("the CUDA driver did not start")
    for key in (_CLOCK_KHZ, _SM_COUNT, _MEMORY_CLOCK_KHZ, _BUS_BITS, _MAJOR, _MINOR):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), key, device):
            raise OSError(f"the CUDA driver does not know attribute {key}")
        found[key] = value.value
    return found


def _gpu_memory(gpu: _Gpu) -> Memory | None:
    if gpu.memory_bytes is None:
        return None
    total, free = gpu.memory_bytes
    return Memory(
        total_bytes=_measured(total, "reported by nvidia-smi"),
        usable_bytes=_measured(max(min(free, total), 1), "free now, reported by nvidia-smi"),
        bandwidth_bytes_per_s=_measured(gpu.bandwidth_bytes_per_s, "memory clock and bus width told by the driver"),
        unified=False,
    )


def _system() -> Literal["linux", "android", "macos", "windows"]:
    if "ANDROID_ROOT" in os.environ:
        return "android"
    if sys.platform == "darwin":
        return "macos"
    return "windows" if sys.platform == "win32" else "linux"


def _processor() -> str:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def _measured(value: Any, how: str) -> Figure[Any]:
    if isinstance(value, float):
        value = float(f"{value:.4g}")  # no measurement here is better than that
    return Figure(value=value, source=f"{_HERE} ({how})", date=datetime.date.today().isoformat())


def _guess(value: float, how: str) -> Figure[float]:
    return Figure(value=value, estimate=how)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _read_int(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text and text.isdigit() else None
