"""The state of a board, read from directories that look like a Jetson, a Raspberry Pi and a PC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgekit.devices.board import BoardState, Clock, flags_of, read_state, throttled, uses_accelerator


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def nothing(command: Sequence[str]) -> None:
    return None


def answers(**texts: str) -> Callable[[Sequence[str]], str | None]:
    """Commands of a vendor by the name of the program."""
    return lambda command: texts.get(command[0])


CPU = "sys__devices__system__cpu__"


def test_a_bare_machine_tells_nothing(tmp_path: Path) -> None:
    assert read_state(tmp_path, nothing) == BoardState()


def test_a_jetson(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        **{
            "var__lib__nvpmodel__status": "pmode:0002 fmode:quiet\n",
            "etc__nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU x\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
            f"{CPU}cpufreq__policy0__scaling_cur_freq": "1190400\n",
            f"{CPU}cpufreq__policy0__scaling_max_freq": "1728000\n",
            f"{CPU}cpufreq__policy0__scaling_governor": "schedutil\n",
            "sys__class__devfreq__17000000.gpu__cur_freq": "1020000000\n",
            "sys__class__devfreq__17000000.gpu__max_freq": "1020000000\n",
            "sys__class__devfreq__17000000.gpu__governor": "nvhost_podgov\n",
            "sys__class__thermal__thermal_zone0__type": "cpu-thermal\n",
            "sys__class__thermal__thermal_zone0__temp": "51218\n",
            "sys__class__thermal__thermal_zone1__type": "gpu-thermal\n",
            "sys__class__thermal__thermal_zone1__temp": "-256000\n",
            "sys__class__thermal__thermal_zone2__type": "cpu-thermal\n",
            "sys__class__thermal__thermal_zone2__temp": "40000\n",
            "dev__nvhost-gpu": "",
        },
    )
    state = read_state(root, answers(nvpmodel="NV Power Mode: OTHER\n1\n"))
    assert state.power_mode == "MAXN_SUPER"
    assert state.clocks == {
        "cpu 0": Clock(hz=1_190_400_000, limit_hz=1_728_000_000, governor="schedutil"),
        "17000000.gpu": Clock(hz=1_020_000_000, limit_hz=1_020_000_000, governor="nvhost_podgov"),
    }
    assert state.temperatures_c == {"cpu-thermal": 51.218, "cpu-thermal thermal_zone2": 40.0}
    assert state.accelerators == ("/dev/nvhost-gpu",)
    (tmp_path / "etc/nvpmodel.conf").unlink()
    assert read_state(root, nothing).power_mode == "mode 2"
    (tmp_path / "var/lib/nvpmodel/status").unlink()
    assert read_state(root, answers(nvpmodel="NV Power Mode: 15W\n0\n")).power_mode == "15W"


@pytest.mark.parametrize(("text", "bits"), [("50005\n", 0x50005), ("0\n", 0), ("junk", None), ("", None)])
def test_a_raspberry_pi(tmp_path: Path, text: str, bits: int | None) -> None:
    root = write(tmp_path, **{"sys__devices__platform__soc__soc:firmware__get_throttled": text} if text else {})
    assert read_state(root, nothing).throttle_bits == bits


def test_vcgencmd_is_asked_where_the_kernel_does_not_tell(tmp_path: Path) -> None:
    assert read_state(tmp_path, answers(vcgencmd="throttled=0x50000\n")).throttle_bits == 0x50000
    assert read_state(tmp_path, answers(vcgencmd="VCHI initialization failed\n")).throttle_bits is None


def test_a_pc(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        **{
            f"{CPU}cpu0__thermal_throttle__core_throttle_count": "7\n",
            f"{CPU}cpu0__thermal_throttle__package_throttle_count": "9\n",
            f"{CPU}cpufreq__policy0__scaling_cur_freq": "<unknown>\n",
        },
    )
    state = read_state(root, nothing)
    assert state.throttle_counts == {"cpu0 core": 7, "cpu0 package": 9}
    assert state.clocks == {}


CPU_ONLY = {"offloaded_layers": "0"}


@pytest.mark.parametrize(
    ("start", "end", "told"),
    [
        ({}, {}, ""),
        ({"temperatures_c": {"a": 40, "b": 50}}, {"temperatures_c": {"a": 59, "b": 52}}, ""),
        ({"temperatures_c": {"a": 40, "b": 50}}, {"temperatures_c": {"a": 40, "b": 62}}, "rose from 50 to 62 C"),
        ({"power_mode": "15W"}, {"power_mode": "7W"}, "power mode changed from 15W to 7W"),
        ({"throttle_bits": 0x50000}, {"throttle_bits": 0x50000}, ""),  # long before the job
        ({"throttle_bits": 0}, {"throttle_bits": 0x40000}, "the board throttled: throttled"),
        ({"throttle_bits": 0x50005}, {"throttle_bits": 0x50005}, "throttled: under-voltage, throttled"),
        ({"throttle_bits": 0x20000}, {"throttle_bits": 0xA0008}, "throttled: soft temperature limit"),
        ({"throttle_counts": {"cpu0 core": 3}}, {"throttle_counts": {"cpu0 core": 3}}, ""),
        ({"throttle_counts": {"cpu0 core": 3}}, {"throttle_counts": {"cpu0 core": 4}}, "1 counters grew"),
        ({"clocks": {"cpu 0": {"hz": 5, "limit_hz": 2_000_000_000}}},
         {"clocks": {"cpu 0": {"hz": 9, "limit_hz": 1_500_000_000}}}, "limit of cpu 0 went from 2000 to 1500 MHz"),
        ({"clocks": {"cpu 0": {"hz": 5, "governor": "schedutil"}}},
         {"clocks": {"cpu 0": {"hz": 9, "governor": "performance"}}}, "governor of cpu 0 changed from schedutil"),
        ({"accelerators": ["/dev/nvidia0"]}, {}, "/dev/nvidia0) was not used: all ran on the CPU"),
    ],
)  # fmt: skip
def test_what_makes_figures_less_comparable_is_told(start: object, end: object, told: str) -> None:
    flags = flags_of(BoardState.model_validate(start), BoardState.model_validate(end), CPU_ONLY)
    assert len(flags) == bool(told)
    assert all(told in flag for flag in flags)


@pytest.mark.parametrize(
    ("build", "used"),
    [
        ({}, False),
        ({"offloaded_layers": "0", "gpu_offload": "yes"}, False),
        ({"offloaded_layers": "31"}, True),
        ({"provider": "CPUExecutionProvider"}, False),
        ({"provider": "CUDAExecutionProvider"}, True),
        ({"device": "cpu"}, False),
        ({"device": "cuda:0"}, True),
    ],
)
def test_use_of_an_accelerator_is_confirmed_by_what_the_engine_says(build: dict[str, str], used: bool) -> None:
    assert uses_accelerator(build) == used


@pytest.mark.parametrize(
    ("start", "end", "told"),
    [
        ({}, {}, None),
        ({"clocks": {"cpu 0": Clock(hz=1, limit_hz=1000)}}, {"clocks": {"cpu 0": Clock(hz=1, limit_hz=1000)}}, None),
        ({"clocks": {"cpu 0": Clock(hz=1, limit_hz=1000)}}, {"clocks": {"cpu 0": Clock(hz=1, limit_hz=900)}}, True),
        ({"clocks": {"cpu 0": Clock(hz=1, limit_hz=1000)}}, {"clocks": {"cpu 0": Clock(hz=1, limit_hz=1100)}}, None),
        ({"throttle_bits": 0x50000}, {"throttle_bits": 0x50000}, False),
        ({"throttle_bits": 0}, {"throttle_bits": 0x40000}, True),
        ({"throttle_counts": {"cpu0 core": 3}}, {"throttle_counts": {"cpu0 core": 3}}, False),
        ({"throttle_counts": {"cpu0 core": 3}}, {"throttle_counts": {"cpu0 core": 4}}, True),
    ],
)
def test_throttled_is_yes_no_or_not_told(start: dict[str, Any], end: dict[str, Any], told: bool | None) -> None:
    assert throttled(BoardState(**start), BoardState(**end)) is told
