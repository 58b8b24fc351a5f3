"""Load time, prefill and decode speed, time to first token and energy of an engine, and whether others disturbed."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgekit.engine import Engine, Entry
from edgekit.errors import InputError
from edgekit.measure.energy import Mark, Meter, SensorFailed
from edgekit.measurement import Measurement, median_interval

CONTENTION_SHARE = 0.15
"""Share of the machine's CPU time taken by others from which a measurement says that it was disturbed."""

_IDLE_WINDOWS = 4

_PROMPT = "The quick brown fox jumps over the lazy dog while seven wise owls count the stars above the river. "


@dataclass(frozen=True)
class CpuUse:
    """CPU time of the machine and of this process, in seconds since some start; or, subtracted, of a while."""

    wall_s: float
    own_s: float
    busy_s: float
    """All processes, and what a hypervisor took (steal)."""
    total_s: float
    """Busy and idle time of all cores."""

    @classmethod
    def now(cls) -> CpuUse:
        """Read the counters."""
        import psutil

        machine = psutil.cpu_times()._asdict()
        # Linux counts guest time within user and nice as well
        total = sum(value for name, value in machine.items() if not name.startswith("guest"))
        idle = machine["idle"] + machine.get("iowait", 0.0)
        own = psutil.Process().cpu_times()
        return cls(time.monotonic(), own.user + own.system, total - idle, total)

    def since(self, start: CpuUse) -> CpuUse:
        """What was used from `start` to this reading."""
        return CpuUse(
            self.wall_s - start.wall_s,
            self.own_s - start.own_s,
            self.busy_s - start.busy_s,
            self.total_s - start.total_s,
        )

    @property
    def others_share(self) -> float:
        """Share of the machine's CPU time that did not go to this process, from 0 to 1."""
        if self.total_s <= 0:
            return 0.0
        return min(max((self.busy_s - self.own_s) / self.total_s, 0.0), 1.0)


def contention_note(used: CpuUse) -> str | None:
    """Say that others took much of the CPU, and what was left to this process; None where they did not."""
    if used.others_share <= CONTENTION_SHARE:
        return None
    cores = used.own_s / used.wall_s
    return f"contended: others took {used.others_share:.0%} of the CPU, this process ran on {cores:.1f} cores"


@dataclass(frozen=True)
class _Repeat:
    ttft_s: float
    prefill_s: float
    decode_s: float
    decode: tuple[Mark, Mark]
    """Where the decode began and ended."""


def measure_latency(
    open_engine: Callable[[], Engine],
    *,
    prompt_tokens: int = 128,
    decode_tokens: int = 64,
    repeats: int = 5,
    warmup: int = 1,
    budget_s: float = 60,
    device: str | None = None,
    of: str = "bundle",
    on_samples: Callable[[str, Sequence[float]], object] = lambda name, samples: None,
    find_meter: Callable[[Engine], Meter] = lambda _: Meter(()),
) -> list[Measurement]:
    """Time an engine with one sequence; each figure is the median of the repeats with its 95% interval.

    `load_s` is the time of `open_engine`; every load but the first finds the file in the page cache, and the note tells
    the first. The last engine opened then runs `warmup` and `repeats` generations: a prompt in steps of at most
    `batch_tokens` (`prefill_tokens_per_s`), and greedy tokens one by one past any end of text (`decode_tokens_per_s`).
    Loads and generations each end early, but not before the second, when they have taken `budget_s`: a slow board gives
    fewer samples, which `n` tells. `ttft_s` runs from the text to the first token, with the model loaded. `on_samples`
    is told every sample behind a figure, by its name. A note says when others took more than 15% of the machine's CPU
    time.

    Where `find_meter` finds sensors for the opened engine, as many generations follow with the sensors read, longer
    where a sensor needs it: `energy_j_per_token` is all that the machine took while it decoded, idle power included,
    and `idle_w` what it takes with the model loaded and nothing to do. A sensor that fails is told in a note.

    Raises:
        InputError: the counts are not positive, or prompt and answer do not fit the context.
    """
    if min(prompt_tokens, decode_tokens, repeats) < 1 or warmup < 0:
        found = f"{prompt_tokens} prompt, {decode_tokens} decode tokens, {repeats} repeats, {warmup} warm-up runs"
        raise InputError("positive counts for a latency measurement", found, "raise them")
    start = CpuUse.now()
    loads, engine = _open_repeatedly(open_engine, repeats, budget_s)
    loaded = CpuUse.now()
    with engine:
        needed, context = prompt_tokens + decode_tokens, engine.capabilities.context_tokens
        if needed > context:
            found = f"{prompt_tokens} prompt and {decode_tokens} decode tokens"
            raise InputError(f"at most {context} tokens, the context", found, "measure fewer or open a longer context")
        text = _prompt_text(engine, prompt_tokens)
        for _ in range(warmup):
            _generate(engine, text, prompt_tokens, decode_tokens)
        warm = CpuUse.now()
        runs = _repeat(engine, text, prompt_tokens, decode_tokens, repeats, budget_s)
        done = CpuUse.now()
        energy, lacking = None, None
        meter = find_meter(engine)
        fastest = decode_tokens / min(run.decode_s for run in runs)
        metered_tokens = min(max(decode_tokens, math.ceil(meter.least_s * fastest)), context - prompt_tokens)
        try:
            energy = _measure_energy(engine, meter, text, prompt_tokens, metered_tokens, repeats, budget_s)
        except SensorFailed as failure:
            lacking = f"energy was not measured: {failure}" if meter.sensors or meter.problem else None
    disturbed = contention_note(done.since(warm))

    def figure(name: str, unit: str, samples: Sequence[float], *notes: str | None) -> Measurement:
        on_samples(name, samples)
        median, low, high = median_interval(samples)
        return Measurement(
            name=name, value=median, unit=unit, kind="measured", n=len(samples), ci_low=low, ci_high=high,
            device=device, of=of, note="; ".join(filter(None, notes)) or None,
        )  # fmt: skip

    shape = f"prompt of {prompt_tokens} tokens"
    energies = []
    if energy is not None:
        how = f"{meter.text}; idle power included; {metered_tokens} tokens after a {shape}"
        energies = [
            figure("energy_j_per_token", "J/token", energy.j_per_token, how, energy.disturbed),
            figure("idle_w", "W", energy.idle_w, f"{meter.text}; model loaded", energy.idle_disturbed),
        ]
    return [
        figure("load_s", "s", loads, f"first load {loads[0]:.3g} s", contention_note(loaded.since(start))),
        figure("prefill_tokens_per_s", "tokens/s", [prompt_tokens / run.prefill_s for run in runs], shape, disturbed),
        figure("decode_tokens_per_s", "tokens/s", [decode_tokens / run.decode_s for run in runs],
               f"{decode_tokens} tokens after a {shape}", disturbed, lacking),
        figure("ttft_s", "s", [run.ttft_s for run in runs], shape, disturbed),
        *energies,
    ]  # fmt: skip


def _enough(done: int, repeats: int, since: float, budget_s: float) -> bool:
    return done >= repeats or (done >= 2 and time.perf_counter() - since >= budget_s)


def _open_repeatedly(open_engine: Callable[[], Engine], times: int, budget_s: float) -> tuple[list[float], Engine]:
    seconds: list[float] = []
    opening = time.perf_counter()
    while True:
        start = time.perf_counter()
        engine = open_engine()
        seconds.append(time.perf_counter() - start)
        if _enough(len(seconds), times, opening, budget_s):
            return seconds, engine
        engine.close()


@dataclass(frozen=True)
class _Energy:
    j_per_token: list[float]
    disturbed: str | None
    idle_w: list[float]
    idle_disturbed: str | None


def _measure_energy(
    engine: Engine, meter: Meter, text: str, prompt_tokens: int, decode_tokens: int, repeats: int, budget_s: float
) -> _Energy:
    """Energy of generations, and power without any. Raises SensorFailed."""
    if not meter.sensors:
        raise SensorFailed(meter.problem)
    start = CpuUse.now()
    with meter:
        rests = [meter.mark()]
        for _ in range(_IDLE_WINDOWS):
            time.sleep(meter.least_s)
            rests.append(meter.mark())
        rested = CpuUse.now()
        runs = _repeat(engine, text, prompt_tokens, decode_tokens, repeats, budget_s, meter)
    return _Energy(
        j_per_token=[meter.joules(*run.decode) / decode_tokens for run in runs],
        disturbed=contention_note(CpuUse.now().since(rested)),
        idle_w=[meter.joules(*pair) / (pair[1].at_s - pair[0].at_s) for pair in itertools.pairwise(rests)],
        idle_disturbed=contention_note(rested.since(start)),
    )


def _repeat(
    engine: Engine,
    text: str,
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int,
    budget_s: float,
    meter: Meter | None = None,
) -> list[_Repeat]:
    runs: list[_Repeat] = []
    generating = time.perf_counter()
    while not _enough(len(runs), repeats, generating, budget_s):
        runs.append(_generate(engine, text, prompt_tokens, decode_tokens, meter))
    return runs


def _prompt_text(engine: Engine, prompt_tokens: int) -> str:
    per_copy = len(engine.tokenize(_PROMPT))
    if per_copy == 0:
        raise InputError("a tokenizer that encodes English text", "no tokens for a sentence", "check the model")
    # a merge across copies can only save a token each
    return _PROMPT * (prompt_tokens // max(per_copy - 1, 1) + 1)


def _generate(engine: Engine, text: str, prompt_tokens: int, decode_tokens: int, meter: Meter | None = None) -> _Repeat:
    meter = meter or Meter(())
    batch_tokens = engine.capabilities.batch_tokens
    sequence = engine.start()
    try:
        start = time.perf_counter()
        tokens = engine.tokenize(text)[:prompt_tokens]
        entries = [Entry(sequence, token, wants_logits=i == prompt_tokens - 1) for i, token in enumerate(tokens)]
        prefill = time.perf_counter()
        for first in range(0, prompt_tokens, batch_tokens):
            logits = engine.step(entries[first : first + batch_tokens]).logits
        prefilled = time.perf_counter()
        token = int(logits[0].argmax())
        answered = time.perf_counter()
        begun = meter.mark()
        for _ in range(decode_tokens):
            token = int(engine.step([Entry(sequence, token)]).logits[0].argmax())
        ended = meter.mark()
    finally:
        engine.release(sequence)
    return _Repeat(
        ttft_s=answered - start,
        prefill_s=prefilled - prefill,
        decode_s=ended.at_s - begun.at_s,
        decode=(begun, ended),
    )
