"""Energy: integration against closed forms, counters that wrap, every sensor on fixture files, and who uses it."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from test_latency import STEP_S, TOKEN_S, SlowEngine
from test_tco import BOARD, figure, report, scenario

from edgekit.devices import Job, agent
from edgekit.measure import energy
from edgekit.measure.energy import (
    Counter,
    Meter,
    Power,
    SensorFailed,
    counted_j,
    find_meter,
    integrate,
    jetson,
    nvidia,
    rapl,
    raspberry_pi,
)
from edgekit.measure.latency import measure_latency
from edgekit.predict.energy import predict_energy
from edgekit.report.summary import key_figures
from edgekit.target import find_target
from edgekit.tco import read_build

# --- integration


@given(st.floats(0, 50), st.floats(-2, 2), st.lists(st.floats(0.01, 2), min_size=2, max_size=30))
def test_a_straight_line_is_integrated_exactly(base: float, slope: float, steps: list[float]) -> None:
    """The integral of a + b t from 1/4 to 3/4 of the samples' time, however unevenly they lie."""
    times = [sum(steps[:index]) for index in range(len(steps) + 1)]
    start, end = 0.25 * times[-1], 0.75 * times[-1]
    wanted = base * (end - start) + slope * (end**2 - start**2) / 2
    watts = [base + slope * at for at in times]
    assert integrate(times, watts, start, end) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("step", [0.1, 0.05, 0.01])
def test_a_curve_is_integrated_within_the_bound_of_the_trapezoid_rule(step: float) -> None:
    """P = 10 + 5 sin(t): error at most (b - a) h^2 / 12 * max |P''|, that is 5, and as much again for the ends."""
    times = [index * step for index in range(round(8 / step))]
    watts = [10 + 5 * math.sin(at) for at in times]
    start, end = 1.234, 6.789
    wanted = 10 * (end - start) + 5 * (math.cos(start) - math.cos(end))
    found = integrate(times, watts, start, end)
    assert found == pytest.approx(wanted, abs=2 * (end - start) * step**2 * 5 / 12)
    assert found != pytest.approx(wanted, abs=1e-9)


@given(st.lists(st.floats(0, 100), min_size=5, max_size=30), st.floats(0.1, 0.9))
def test_parts_add_up_to_the_whole(watts: list[float], share: float) -> None:
    times = [0.5 * index for index in range(len(watts))]
    split = share * times[-1]
    parts = integrate(times, watts, 0, split) + integrate(times, watts, split, times[-1])
    # a further point on a straight line changes nothing
    assert parts == pytest.approx(integrate(times, watts, 0, times[-1]), abs=1e-9)


class Clock:
    """A clock that goes where it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def sampled(meter: Meter, clock: Clock, seconds: float, step: float = 0.1) -> None:
    """Sample every `step` from now on."""
    first = clock.now
    for index in range(round(seconds / step) + 1):
        clock.now = first + index * step
        meter.sample()


def test_a_meter_integrates_what_a_sensor_told() -> None:
    """A step from 5 to 25 W at 10 s, sampled every 0.1 s: at most one sample period of it is uncertain."""
    clock = Clock()
    meter = Meter([Power("board", "it", lambda: 5.0 if clock.now < 10 else 25.0)], clock=clock)
    sampled(meter, clock, 5)
    begun = meter.mark()
    sampled(meter, clock, 10)
    ended = meter.mark()
    sampled(meter, clock, 1)
    assert (begun.at_s, ended.at_s) == (5, 15)
    assert meter.joules(begun, ended) == pytest.approx(5 * 5 + 5 * 25, abs=20 * 0.1)


def test_energies_of_sensors_add_up() -> None:
    clock = Clock()
    count = Counter("package", "c", lambda: [7 * clock.now, 2 * clock.now], [math.inf, math.inf])
    meter = Meter([Power("GPU", "a", lambda: 3.0), count, Power("GPU", "b", lambda: 4.0)], clock=clock)
    sampled(meter, clock, 1)
    begun = meter.mark()
    sampled(meter, clock, 2)
    assert meter.joules(begun, meter.mark()) == pytest.approx((3 + 4 + 9) * 2)
    assert meter.text == "GPU: a, read every 0.1 s; package: c, counters read at both ends; GPU: b, read every 0.1 s"


def test_few_samples_give_no_figure() -> None:
    clock = Clock()
    meter = Meter([Power("board", "it", lambda: 5.0)], clock=clock)
    sampled(meter, clock, 1)
    begun = meter.mark()
    sampled(meter, clock, 0.2)
    with pytest.raises(SensorFailed, match=r"it told 4 samples in 0\.2 s, too few"):
        meter.joules(begun, meter.mark())
    assert meter.least_s > energy.LEAST_SAMPLES * energy.SAMPLE_S


@pytest.mark.parametrize("told", [math.nan, math.inf, -1.0])
def test_nonsense_ends_the_samples_and_what_came_before_stays(told: float) -> None:
    clock = Clock()
    meter = Meter([Power("board", "it", lambda: 5.0 if clock.now < 3 else told)], clock=clock)
    sampled(meter, clock, 1)
    begun = meter.mark()
    sampled(meter, clock, 1)
    middle = meter.mark()
    sampled(meter, clock, 2)
    assert meter.joules(begun, middle) == pytest.approx(5)
    with pytest.raises(SensorFailed, match=f"it told {told} W"):
        meter.joules(middle, meter.mark())


def test_a_thread_samples_meanwhile() -> None:
    """Constant power: its energy is exact, whenever the samples fell."""
    reads = []
    meter = Meter([Power("board", "it", lambda: reads.append(1) or 12.5, period_s=0.002)])  # type: ignore[func-returns-value]
    with meter:
        begun = meter.mark()
        while len(reads) < 12:
            time.sleep(0.002)
        ended = meter.mark()
    assert meter.joules(begun, ended) == pytest.approx(12.5 * (ended.at_s - begun.at_s))
    after = len(reads)
    time.sleep(0.02)
    assert len(reads) == after


def test_no_sensor_has_a_reason_or_none() -> None:
    meter = Meter((), "only root may read it")
    with pytest.raises(SensorFailed, match="only root"):
        meter.joules(meter.mark(), meter.mark())


# --- counters


def counter(*wraps: float) -> Counter:
    return Counter("package", "it", list, wraps)


@given(st.floats(0, 262), st.floats(0.001, 261))
def test_a_counter_that_starts_again_lost_nothing(first: float, used: float) -> None:
    assert counted_j(counter(262.0), [first], [(first + used) % 262.0]) == pytest.approx(used, abs=1e-6)


@pytest.mark.parametrize(
    ("first", "last", "wraps", "problem"),
    [
        ([5.0], [3.0], [math.inf], "backwards"),
        ([9.0], [3.0], [8.0], "backwards"),
        ([5.0], [5.0], [8.0], "did not move"),
        ([0.0], [math.nan], [8.0], "did not move"),
    ],
)
def test_counters_that_make_no_sense(first: list[float], last: list[float], wraps: list[float], problem: str) -> None:
    with pytest.raises(SensorFailed, match=problem):
        counted_j(counter(*wraps), first, last)


def test_zones_add_up() -> None:
    assert counted_j(counter(10.0, 100.0), [9.0, 50.0], [1.0, 53.0]) == pytest.approx(2 + 3)


# --- sensors on fixture files


def write(root: Path, files: dict[str, object]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


def ina3221(root: Path, number: int, *rails: tuple[str, int, int]) -> None:
    """A monitor with (label, mV, mA) of its channels."""
    place = f"sys/class/hwmon/hwmon{number}"
    write(root, {f"{place}/name": "ina3221"})
    for channel, (label, millivolts, milliamps) in enumerate(rails, 1):
        write(
            root,
            {
                f"{place}/in{channel}_label": label,
                f"{place}/in{channel}_input": millivolts,
                f"{place}/curr{channel}_input": milliamps,
            },
        )


def test_an_orin_nano_tells_its_input(tmp_path: Path) -> None:
    write(tmp_path, {"sys/class/hwmon/hwmon0/name": "tmp451", "sys/class/hwmon/hwmon0/in1_input": 5})
    ina3221(tmp_path, 1, ("VDD_IN", 5040, 1480), ("VDD_CPU_GPU_CV", 5032, 400), ("VDD_SOC", 5032, 304))
    # the driver's further channel is a sum of shunt voltages, not a rail
    write(tmp_path, {"sys/class/hwmon/hwmon1/in7_label": "sum of shunt voltages"})
    found = jetson(tmp_path)
    assert found is not None
    assert found.read_w() == pytest.approx(5.040 * 1.480)
    assert (found.scope, found.label) == ("module", "INA3221 VDD_IN")


def test_an_agx_orin_tells_rails_that_are_added_once(tmp_path: Path) -> None:
    ina3221(tmp_path, 3, ("VDD_GPU_SOC", 19888, 300), ("VDD_CPU_CV", 19888, 100), ("VIN_SYS_5V0", 4968, 953))
    ina3221(tmp_path, 4, ("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 4968, 219), ("NC", 0, 0))
    found = jetson(tmp_path)
    assert found is not None
    assert found.read_w() == pytest.approx(19.888 * 0.4 + 4.968 * 0.953)
    assert found.label == "INA3221 VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"


def test_an_agx_xavier_tells_six_rails(tmp_path: Path) -> None:
    ina3221(tmp_path, 1, ("GPU", 19000, 100), ("CPU", 19000, 200), ("SOC", 19000, 300))
    ina3221(tmp_path, 2, ("CV", 19000, 0), ("VDDRQ", 19000, 50), ("SYS5V", 19000, 150))
    found = jetson(tmp_path)
    assert found is not None
    assert found.read_w() == pytest.approx(19 * 0.8)


def test_a_machine_without_a_monitor_is_no_jetson(tmp_path: Path) -> None:
    assert jetson(tmp_path) is None
    write(tmp_path, {"sys/class/hwmon/hwmon0/name": "ina3221", "sys/class/hwmon/hwmon0/in1_label": "VDD_IN"})
    assert jetson(tmp_path) is None


def test_a_monitor_that_vanishes_or_tells_nonsense(tmp_path: Path) -> None:
    ina3221(tmp_path, 1, ("VDD_IN", 5000, 1000))
    found = jetson(tmp_path)
    assert found is not None
    clock = Clock()
    meter = Meter([found], clock=clock)
    sampled(meter, clock, 1)
    begun = meter.mark()
    (tmp_path / "sys/class/hwmon/hwmon1/curr1_input").unlink()
    sampled(meter, clock, 1)
    with pytest.raises(SensorFailed, match="curr1_input: No such file"):
        meter.joules(begun, meter.mark())
    write(tmp_path, {"sys/class/hwmon/hwmon1/curr1_input": "lots"})
    with pytest.raises(SensorFailed, match="holds 'lots', not a number"):
        found.read_w()


def powercap(root: Path, zones: dict[str, tuple[str, object]], most: object = 262_143_328_850) -> None:
    for zone, (name, count) in zones.items():
        place = f"sys/class/powercap/{zone}"
        write(root, {f"{place}/name": name, f"{place}/energy_uj": count, f"{place}/max_energy_range_uj": most})


def test_packages_and_their_memory_are_counted_once(tmp_path: Path) -> None:
    zones = {
        "intel-rapl:0": ("package-0", 1_000_000),
        "intel-rapl:0:0": ("core", 500_000),
        "intel-rapl:0:1": ("dram", 200_000),
        "intel-rapl:1": ("package-1", 3_000_000),
        "intel-rapl:2": ("psys", 9_000_000),
        "intel-rapl-mmio:0": ("package-0", 1_000_000),
    }
    powercap(tmp_path, zones)
    found = rapl(tmp_path)
    assert found is not None
    assert list(found.read_j()) == pytest.approx([1.0, 0.2, 3.0])
    assert list(found.wraps_j) == pytest.approx([262_143.32885] * 3)
    assert found.label == "RAPL package-0 + dram + package-1"
    meter = Meter([found])
    begun = meter.mark()
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 4_000_000), "intel-rapl:1": ("package-1", 1_000_000)})
    assert meter.joules(begun, meter.mark()) == pytest.approx(3 + 262_143.32885 - 2)


def test_counters_without_a_range_or_a_file(tmp_path: Path) -> None:
    assert rapl(tmp_path) is None
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 5)}, most="unknown")
    found = rapl(tmp_path)
    assert found is not None
    assert list(found.wraps_j) == [math.inf]
    meter = Meter([found])
    begun = meter.mark()
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    with pytest.raises(SensorFailed, match="No such file"):
        meter.joules(begun, meter.mark())


def test_counters_for_root_only_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 5)})
    plain = Path.read_text

    def read_text(path: Path, **options: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return plain(path, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    meter = find_meter(False, tmp_path, run=lambda command: None)
    assert meter.sensors == ()
    assert meter.problem == f"only root may read {tmp_path}/sys/class/powercap/intel-rapl:0/energy_uj"


PMIC = """\
   3V7_WL_SW_A current(0)=0.00390372A
    3V3_SYS_A current(1)=0.05757987A
     VDD_CORE_A current(7)=1.25600000A
   3V7_WL_SW_V volt(8)=3.70486600V
    3V3_SYS_V volt(9)=3.31114700V
     VDD_CORE_V volt(15)=0.72048850V
     EXT5V_V volt(24)=5.14982000V
      BATT_V volt(25)=0.00000000V
"""


def telling(told: dict[str, str | None]) -> Callable[[Sequence[str]], str | None]:
    return lambda command: told.get(command[0])


@pytest.mark.parametrize("text", [PMIC, "3V7_WL_SW_A=0.00390372A\n" + PMIC.partition("\n")[2]])
def test_a_raspberry_pi_5_by_its_formula(text: str) -> None:
    found = raspberry_pi(telling({"vcgencmd": text}))
    assert found is not None
    rails = 0.00390372 * 3.704866 + 0.05757987 * 3.311147 + 1.256 * 0.7204885
    assert found.read_w() == pytest.approx(1.1451 * rails + 0.5879)
    assert found.scope == "board"


@pytest.mark.parametrize("text", [None, "", "error=1 error_msg=Command not registered", "EXT5V_V volt(24)=5.1V\n"])
def test_other_boards_have_no_such_chip(text: str | None) -> None:
    assert raspberry_pi(telling({"vcgencmd": text})) is None


def test_cards_by_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = nvidia(telling({"nvidia-smi": "31.50\n120.25\n"}))
    assert isinstance(found, Power)
    assert (found.scope, found.read_w()) == ("GPU", 151.75)
    assert nvidia(telling({})) is None
    for text in ("[N/A]", "12.0\n[Not Supported]\n", "", "nan"):
        with pytest.raises(SensorFailed, match="told no power"):
            nvidia(telling({"nvidia-smi": text}))


def test_cards_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    millijoules = {0: 5000, 1: 7000}
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda card: millijoules[card],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = nvidia(telling({}))
    assert isinstance(found, Counter)
    meter = Meter([found])
    begun = meter.mark()
    millijoules |= {0: 6500, 1: 7250}
    assert meter.joules(begun, meter.mark()) == pytest.approx(1.75)

    def fails(card: int) -> int:
        raise RuntimeError("GPU is lost")

    nvml.nvmlDeviceGetTotalEnergyConsumption = fails
    with pytest.raises(SensorFailed, match="GPU is lost"):
        meter.joules(begun, meter.mark())
    with pytest.raises(SensorFailed, match="GPU is lost"):
        nvidia(telling({}))
    assert isinstance(nvidia(telling({"nvidia-smi": "30"})), Power)


def test_which_sensors_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    smi = telling({"nvidia-smi": "30.0"})

    def scopes(accelerated: bool, run: Callable[[Sequence[str]], str | None]) -> list[str]:
        return [sensor.scope for sensor in find_meter(accelerated, tmp_path, run).sensors]

    assert scopes(False, smi) == []
    assert find_meter(False, tmp_path, smi).problem == ""
    assert scopes(True, smi) == ["GPU"]
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 5)})
    assert scopes(False, smi) == ["package"]
    assert scopes(True, smi) == ["package", "GPU"]
    # a share must not pass for the whole
    assert scopes(True, telling({})) == []
    assert find_meter(True, tmp_path, telling({})).problem == "nothing tells the GPU's power"
    assert scopes(True, telling({"vcgencmd": PMIC})) == ["board"]
    ina3221(tmp_path, 1, ("VDD_IN", 5000, 1000))
    assert scopes(True, smi) == ["module"]


# --- in a latency measurement


class Quick(Meter):
    """Measures within moments."""

    least_s = 0.001  # type: ignore[assignment]


def tied(watts: float) -> Quick:
    """A counter that follows the very clock that it is read beside."""
    last = [0.0]

    def clock() -> float:
        last[0] = time.perf_counter()
        return last[0]

    return Quick([Counter("package", "it", lambda: [watts * last[0]], [math.inf])], clock=clock)


def test_energy_of_a_token_is_power_times_its_time() -> None:
    meter = tied(20.0)
    found = {
        m.name: m
        for m in measure_latency(
            SlowEngine, prompt_tokens=16, decode_tokens=6, repeats=3, device="here", find_meter=lambda _: meter
        )
    }
    token, idle = found["energy_j_per_token"], found["idle_w"]
    # sleeping never takes less than asked for; a busy machine makes it longer
    assert 20 * (STEP_S + TOKEN_S) <= token.value <= 5 * 20 * (STEP_S + TOKEN_S)
    assert idle.value == pytest.approx(20.0)
    assert (token.unit, token.n, token.kind, token.device) == ("J/token", 3, "measured", "here")
    assert token.ci_low is not None
    assert token.ci_high is not None
    assert token.ci_low <= token.value <= token.ci_high
    assert (token.note or "").startswith("package: it, counters read at both ends; idle power included; 6 tokens")
    assert (idle.unit, idle.n) == ("W", 4)
    assert "energy" not in (found["decode_tokens_per_s"].note or "")


def test_a_sensor_that_needs_longer_gets_more_tokens_within_the_context() -> None:
    class Slow(Quick):
        least_s = 10.0  # type: ignore[assignment]

    clock = Clock()
    meter = Slow([Counter("package", "it", lambda: [1.0 + clock.now], [math.inf])], clock=clock)
    meter_sleeps: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        plain = time.sleep
        patch.setattr(time, "sleep", lambda s: meter_sleeps.append(s) if s == 10.0 else plain(min(s, 1e-4)))
        found = measure_latency(SlowEngine, prompt_tokens=16, decode_tokens=2, repeats=1, find_meter=lambda _: meter)
    assert meter_sleeps == [10.0] * 4
    assert "energy_j_per_token" not in {m.name for m in found}
    decode = next(m for m in found if m.name == "decode_tokens_per_s")
    assert (decode.note or "").endswith("energy was not measured: it did not move")
    assert SlowEngine.open_now == 0


@pytest.mark.parametrize(
    ("meter", "note"),
    [(Meter(()), None), (Meter((), "only root may read it"), "energy was not measured: only root may read it")],
)
def test_without_a_sensor_there_is_no_figure(meter: Meter, note: str | None) -> None:
    found = measure_latency(SlowEngine, prompt_tokens=16, decode_tokens=2, repeats=1, find_meter=lambda _: meter)
    assert [m.name for m in found] == ["load_s", "prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s"]
    assert ((found[2].note or "").partition("energy")[1] != "") == (note is not None)
    assert (found[2].note or "").endswith(note or "")


@pytest.mark.parametrize(("layers", "accelerated"), [("0", False), ("12", True)])
def test_the_agent_asks_for_the_sensors_of_what_computes(
    layers: str, accelerated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(SlowEngine):
        loaded: ClassVar = {"offloaded_layers": layers}

    asked: list[bool] = []
    engine = SimpleNamespace(build_info=dict, open_model=lambda path, options: Told())
    monkeypatch.setattr(agent, "find_engine", lambda name: engine)
    monkeypatch.setattr(energy, "find_meter", lambda found: asked.append(found) or tied(20.0))
    lines: list[dict[str, Any]] = []
    latency = {"prompt_tokens": 8, "decode_tokens": 2, "repeats": 2, "warmup": 0}
    job = Job.model_validate({"engine": "any", "model": "any", "measure": {"latency": latency}})
    agent.run_job(job, lambda kind, **fields: lines.append({"type": kind, **fields}))
    told = {line["measurement"]["name"]: line["measurement"] for line in lines if line["type"] == "measurement"}
    assert asked == [accelerated]
    assert told["idle_w"]["value"] == pytest.approx(20)
    assert told["energy_j_per_token"]["kind"] == "measured"


# --- predicted, and what it costs


def test_a_prediction_is_the_profiles_power_over_the_rate() -> None:
    pi = find_target("raspberry-pi-5")
    assert pi.power.typical_w is not None
    rate = figure("decode_tokens_per_s", 8.0, ci_low=4.0, ci_high=16.0)
    (found,) = predict_energy(pi, [figure("prefill_tokens_per_s", 100.0), rate])
    watts = pi.power.typical_w.value
    assert (found.value, found.ci_low, found.ci_high) == (watts / 8, watts / 16, watts / 4)
    assert (found.kind, found.unit, found.device, found.name) == (
        "predicted",
        "J/token",
        "raspberry-pi-5",
        "energy_j_per_token",
    )
    assert pi.power.typical_w.scope in (found.note or "")
    assert predict_energy(pi, []) == []
    bare = pi.model_copy(update={"power": pi.power.model_copy(update={"typical_w": None, "max_w": None})})
    assert predict_energy(bare, [rate]) == []


def test_a_plan_tells_the_energy_and_what_it_covers(tiny_hf: Path) -> None:
    told = tiny.edgekit("plan", tiny_hf, "--target", "pi", "--recipe", "gguf-q8").stdout
    (line,) = (line for line in " ".join(told.split()).split("energy_j_per_token: ")[1:])
    assert re.match(r"[\d.e-]+ predicted \[[\d.e-]+ to [\d.e-]+\], \w+: [\d.]+ W while decoding", line)


def test_costs_take_measured_energy_before_the_profile_before_predicted_energy() -> None:
    chosen = scenario(hardware__busy_w=None, hardware__idle_w=None)
    pi = find_target("raspberry-pi-5")
    rates = [figure(f"{name}_tokens_per_s", 10.0, device="raspberry-pi-5") for name in ("decode", "prefill")]
    guess = figure("energy_j_per_token", 0.4, "J/token", ci_low=0.2, ci_high=0.8, device="raspberry-pi-5")
    told = [
        figure("energy_j_per_token", 0.9, "J/token", "measured", device=BOARD),
        figure("idle_w", 3.5, "W", "measured", device=BOARD),
    ]
    busy = {}
    for name, more, target in (
        ("measured", [guess, *told], pi),
        ("profile", [guess], pi),
        ("predicted", [guess], None),
    ):
        busy[name] = read_build("b", report(*rates, *more), target, chosen).inputs
    assert pi.power.typical_w is not None
    assert busy["measured"]["hardware.busy_w"].value == pytest.approx(9.0)
    assert busy["measured"]["hardware.busy_w"].kind == "measured"
    assert busy["measured"]["hardware.idle_w"].value == 3.5
    assert busy["profile"]["hardware.busy_w"].value == pi.power.typical_w.value
    assert not busy["profile"]["hardware.busy_w"].uncertain
    assert busy["predicted"]["hardware.busy_w"].value == pytest.approx(4.0)


def test_the_report_shows_energy_beside_the_speed() -> None:
    made = report(
        figure("decode_tokens_per_s", 10.0),
        figure("energy_j_per_token", 0.42, "J/token", device="raspberry-pi-5"),
    )
    (tile,) = [one for one in key_figures(made) if one.title == "Decode speed"]
    assert tile.context == "energy ≈ 0.420 J/token"
