"""Latency of an engine whose speed is known, contention, and memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
import pytest

from edgekit.engine import Capabilities, Entry, StepOutput
from edgekit.errors import InputError
from edgekit.measure.latency import CpuUse, contention_note, measure_latency
from edgekit.measure.memory import peak_rss_bytes, reset_peak_rss

LOAD_S, STEP_S, TOKEN_S = 0.02, 0.004, 0.0005


class SlowEngine:
    """Takes `STEP_S` for a step and `TOKEN_S` for each of its tokens, and keeps a record."""

    capabilities = Capabilities(
        fork=False, rewind=False, batch=False, hidden_states=False, input_embeddings=False,
        context_tokens=96, sequences=1, batch_tokens=16,
    )  # fmt: skip
    vocabulary_size = 4
    end_tokens = frozenset({1})
    opened = 0
    open_now = 0

    def __init__(self) -> None:
        time.sleep(LOAD_S)
        type(self).opened += 1
        type(self).open_now += 1
        assert type(self).open_now == 1
        self.steps: list[int] = []
        self.alive = 0

    def start(self) -> int:
        self.alive += 1
        return 0

    def release(self, sequence: int) -> None:
        self.alive -= 1

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        return [0] * len(text.split())

    def step(self, entries: Sequence[Entry], *, hidden_states: bool = False) -> StepOutput:
        assert self.alive == 1
        assert len(entries) <= self.capabilities.batch_tokens
        self.steps.append(len(entries))
        time.sleep(STEP_S + TOKEN_S * len(entries))
        rows = sum(entry.wants_logits for entry in entries)
        # always the end of a text: decoding goes on all the same
        return StepOutput(np.tile(np.array([0, 9, 0, 0], np.float32), (rows, 1)))

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        raise NotImplementedError

    def fork(self, sequence: int) -> int:
        raise NotImplementedError

    def truncate(self, sequence: int, length: int) -> None:
        raise NotImplementedError

    def length(self, sequence: int) -> int:
        raise NotImplementedError

    def close(self) -> None:
        type(self).open_now -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def test_a_slow_board_gives_fewer_samples() -> None:
    found = measure_latency(SlowEngine, prompt_tokens=16, decode_tokens=4, repeats=50, budget_s=0.001)
    assert {m.n for m in found} == {2}


def test_a_known_speed_is_measured() -> None:
    engines: list[SlowEngine] = []

    def open_engine() -> SlowEngine:
        engines.append(SlowEngine())
        return engines[-1]

    found = {
        m.name: m
        for m in measure_latency(open_engine, prompt_tokens=40, decode_tokens=10, repeats=3, warmup=1, device="here")
    }
    assert list(found) == ["load_s", "prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s"]
    assert len(engines) == 3
    assert SlowEngine.open_now == 0
    # one warm-up and three repeats, on the last engine only
    assert [len(engine.steps) for engine in engines] == [0, 0, 4 * 13]
    assert engines[-1].steps[:13] == [16, 16, 8] + [1] * 10
    prefill_s = 3 * STEP_S + 40 * TOKEN_S
    # sleeping never takes less than asked for; a busy machine makes it longer
    expected = {
        "load_s": (LOAD_S, 5 * LOAD_S),
        "prefill_tokens_per_s": (40 / prefill_s / 5, 40 / prefill_s),
        "decode_tokens_per_s": (1 / (STEP_S + TOKEN_S) / 5, 1 / (STEP_S + TOKEN_S)),
        "ttft_s": (prefill_s, 5 * prefill_s),
    }
    for name, (low, high) in expected.items():
        m = found[name]
        assert low <= m.value <= high, name
        assert m.ci_low is not None
        assert m.ci_high is not None
        assert m.ci_low <= m.value <= m.ci_high
        assert (m.n, m.kind, m.device) == (3, "measured", "here")
    assert found["load_s"].unit == found["ttft_s"].unit == "s"
    assert found["decode_tokens_per_s"].unit == "tokens/s"


@pytest.mark.parametrize(
    "counts",
    [
        {"prompt_tokens": 0},
        {"decode_tokens": 0},
        {"repeats": 0},
        {"warmup": -1},
        {"prompt_tokens": 90, "decode_tokens": 7},
    ],
)
def test_counts_that_cannot_be_measured(counts: dict[str, int]) -> None:
    with pytest.raises(InputError):
        measure_latency(SlowEngine, **{"prompt_tokens": 16, "decode_tokens": 2, "repeats": 1, **counts})
    assert SlowEngine.open_now == 0


@pytest.mark.parametrize(
    ("own_s", "busy_s", "note"),
    [
        (8.0, 8.5, None),
        (8.0, 9.1, None),
        (4.0, 6.0, "contended: others took 20% of the CPU, this process ran on 0.8 cores"),
        (0.0, 10.0, "contended: others took 100% of the CPU, this process ran on 0.0 cores"),
        # counters of different clocks can disagree a little
        (8.2, 8.0, None),
    ],
)
def test_contention_is_what_others_took(own_s: float, busy_s: float, note: str | None) -> None:
    start = CpuUse(100.0, 7.0, 1000.0, 4000.0)
    end = CpuUse(105.0, 7.0 + own_s, 1000.0 + busy_s, 4010.0)
    assert contention_note(end.since(start)) == note


def test_a_machine_without_counters_is_not_called_contended() -> None:
    assert contention_note(CpuUse(5.0, 4.0, 0.0, 0.0)) is None


def test_a_busy_neighbour_is_seen() -> None:
    script = "import time\nend = time.time() + 30\nwhile time.time() < end: pass"
    import psutil

    neighbours = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(psutil.cpu_count() or 1)]
    try:
        start = CpuUse.now()
        time.sleep(1.0)
        assert contention_note(CpuUse.now().since(start)) is not None
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def test_own_work_is_counted_as_own() -> None:
    start = CpuUse.now()
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
    used = CpuUse.now().since(start)
    assert used.own_s >= 0.45
    # it is part of what the machine did; the two clocks tick at 10 ms
    assert used.own_s <= used.busy_s + 0.1
    assert used.busy_s <= used.total_s


def test_the_peak_holds_what_was_freed() -> None:
    script = (
        "import numpy as np\n"
        "from edgekit.measure.memory import peak_rss_bytes\n"
        "before = peak_rss_bytes()\n"
        "a = np.ones(25_000_000); del a\n"
        "print(peak_rss_bytes() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert 180_000_000 < int(done.stdout) < 230_000_000


def test_the_peak_is_not_inherited() -> None:
    held = np.ones(50_000_000)
    script = "from edgekit.measure.memory import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux has VmHWM")
    assert int(done.stdout) < held.nbytes


def test_the_peak_can_start_anew() -> None:
    held = np.ones(25_000_000)
    high = peak_rss_bytes()
    del held
    if not reset_peak_rss():
        pytest.skip("this system does not reset the peak")
    assert peak_rss_bytes() < high - 100_000_000
