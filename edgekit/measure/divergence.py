"""How far a model's next-token distributions lie from its source's: KL divergence, top-1 agreement, perplexity.

The source's log-probabilities on evaluation windows are kept once, 16 bits each as in the base file of llama.cpp's
`perplexity --kl-divergence`, and every artifact is compared with them. As there, only the second half of each
window is scored, so that every prediction has half a window of context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.engine import Engine, Entry, FloatArray
from edgekit.errors import InputError
from edgekit.measurement import Measurement

IntArray = npt.NDArray[np.int32]
DoubleArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Progress = Callable[[int, int], None]

_CODES = 65535
_BLOCK_ROWS = 16  # rows of float64 logits that stay in cache together
_RESAMPLES = 1000


@dataclass(frozen=True)
class Reference:
    """The source model on evaluation windows: W windows of T tokens, S scored positions each, V tokens.

    A log-probability is `offset + scale * code`, up to a constant of its row.
    """

    tokens: IntArray
    """Shape (W, T)."""
    scale: FloatArray
    """Nats per code, shape (W, S)."""
    offset: FloatArray
    """Log-probability of code 0 in nats, shape (W, S)."""
    codes: npt.NDArray[np.uint16]
    """Shape (W, S, V); memory-mapped."""
    top: IntArray
    """The source's most probable token, shape (W, S)."""
    nll: DoubleArray
    """Exact negative log-likelihood of the token that follows, in nats, shape (W, S)."""

    @property
    def window_tokens(self) -> int:
        """T: the context that an engine needs to be compared."""
        return int(self.tokens.shape[1])

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return int(self.codes.shape[2])


_FILES: dict[str, type[np.generic]] = {
    "tokens": np.int32,
    "scale": np.float32,
    "offset": np.float32,
    "codes": np.uint16,
    "top": np.int32,
    "nll": np.float64,
}


def scored_positions(window_tokens: int) -> slice:
    """Positions of a window whose prediction of the next token is scored: `window_tokens // 2` to the last but one."""
    return slice(window_tokens // 2, window_tokens - 1)


def write_reference(directory: Path, tokens: IntArray, logits: Callable[[int], FloatArray]) -> None:
    """Write the source's log-probabilities to `directory`, holding one window at a time.

    Args:
        directory: An existing directory; it gets one `.npy` file per field of `Reference`.
        tokens: Evaluation windows, shape (W, T), T at least 3.
        logits: Gives the source's logits of a window by index, shape (T, V).

    Raises:
        InputError: the windows are too short, or the logits have another shape or are not finite.
    """
    windows, window_tokens = tokens.shape
    if windows < 1 or window_tokens < 3:
        raise InputError(
            "evaluation windows of at least 3 tokens", f"an array of {tokens.shape}", "raise window_tokens"
        )
    scored = scored_positions(window_tokens)
    rows = scored.stop - scored.start
    targets = tokens[:, scored.start + 1 :]
    arrays: dict[str, Any] = {}
    for window in range(windows):
        found = logits(window)
        if not arrays:
            vocabulary = found.shape[-1]
            shapes = {"tokens": tokens.shape, "codes": (windows, rows, vocabulary)}
            arrays = {
                name: _create_array(directory / f"{name}.npy", kind, shapes.get(name, (windows, rows)))
                for name, kind in _FILES.items()
            }
            arrays["tokens"][:] = tokens
        if found.shape != (window_tokens, vocabulary) or not np.isfinite(found[scored]).all():
            wanted = f"finite logits of shape ({window_tokens}, {vocabulary}) for window {window}"
            raise InputError(wanted, f"shape {found.shape} or a value that is not finite", "check the source model")
        for block in _blocks(rows):
            coded = _encode(found[scored][block], targets[window, block])
            for name, values in coded.items():
                arrays[name][window, block] = values
    for array in arrays.values():
        array.flush()


def _encode(logits: FloatArray, targets: IntArray) -> dict[str, Any]:
    """Code rows of logits: every row spans its own range in 65536 steps."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    low = shifted.min(axis=1)
    # rounded to what is stored before use, so that the decoder undoes exactly this
    scale = ((shifted.max(axis=1) - low) / _CODES).astype(np.float32)
    steps = np.where(scale > 0, scale, 1).astype(np.float64)[:, None]
    return {
        "scale": scale,
        "offset": low,
        "codes": np.clip(np.rint((shifted - low[:, None]) / steps), 0, _CODES),
        "top": logits.argmax(axis=1),
        "nll": -np.take_along_axis(shifted, targets[:, None], axis=1)[:, 0],
    }


def open_reference(directory: Path) -> Reference:
    """Open what `write_reference` wrote; the codes stay on disk. Raises InputError for anything else."""
    arrays = {name: _open_array(directory / f"{name}.npy", kind) for name, kind in _FILES.items()}
    tokens, codes = arrays["tokens"], arrays["codes"]
    if tokens.ndim != 2 or codes.ndim != 3 or tokens.shape[0] < 1 or tokens.shape[1] < 3 or codes.shape[2] < 1:
        raise _bad_reference(directory, f"tokens {tokens.shape} and codes {codes.shape}")
    scored = scored_positions(tokens.shape[1])
    shape = (tokens.shape[0], scored.stop - scored.start)
    for name in ("scale", "offset", "top", "nll"):
        if arrays[name].shape != shape:
            raise _bad_reference(directory, f"{name} {arrays[name].shape} instead of {shape}")
    if codes.shape[:2] != shape:
        raise _bad_reference(directory, f"codes {codes.shape} instead of {shape}")
    for name in ("tokens", "top"):
        if arrays[name].min() < 0 or arrays[name].max() >= codes.shape[2]:
            raise _bad_reference(directory, f"{name} outside the vocabulary of {codes.shape[2]}")
    for name in ("scale", "offset", "nll"):
        if not np.isfinite(arrays[name]).all():
            raise _bad_reference(directory, f"a value of {name} that is not finite")
    return Reference(**arrays)


def _create_array(path: Path, kind: type[np.generic], shape: tuple[int, ...]) -> Any:
    return np.lib.format.open_memmap(path, "w+", dtype=kind, shape=shape)  # type: ignore[no-untyped-call]


def _open_array(path: Path, kind: type[np.generic]) -> Any:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _bad_reference(path, str(error)) from None
    if not isinstance(array, np.ndarray) or array.dtype != kind:
        raise _bad_reference(path, f"{getattr(array, 'dtype', 'an archive')} instead of {np.dtype(kind)}")
    return array


def _bad_reference(path: Path, found: str) -> InputError:
    return InputError(f"the reference of a source model at {path}", found, "edgekit cache verify")


FIGURES = (
    "kl_divergence_nats",
    "kl_divergence_median_nats",
    "kl_divergence_p99_nats",
    "kl_divergence_max_nats",
    "top1_agreement",
    "perplexity",
    "source_perplexity",
    "perplexity_ratio",
)
"""Names of the measurements of a divergence."""


@dataclass(frozen=True)
class Divergence:
    """An artifact against its source at W windows of S scored positions; all arrays have shape (W, S)."""

    kld: DoubleArray
    """KL(source || artifact) of the next-token distributions, in nats."""
    nll: DoubleArray
    """Negative log-likelihood of the token that follows under the artifact, in nats."""
    source_nll: DoubleArray
    agrees: BoolArray
    """Whether both find the same token most probable."""

    @property
    def window_kld(self) -> tuple[float, ...]:
        """Mean KL divergence of each window, in nats."""
        return tuple(float(value) for value in self.kld.mean(axis=1))

    def measurements(self, *, device: str | None = None, of: str = "bundle") -> list[Measurement]:
        """Summarise, with 95% intervals that allow for the correlation of positions within a window.

        Means take the window means as the independent samples, under Student's t (cluster-robust; `n` counts
        windows). Perplexities are exponentials of mean NLL and of its interval, their ratio that of the paired
        differences. Median and 99th percentile take the percentile bootstrap over whole windows. The maximum
        has no interval: resampling cannot exceed it.
        """
        windows, positions = self.kld.shape
        note = f"{windows * positions} positions in {windows} windows"

        def measurement(name: str, value: float, unit: str, interval: tuple[float, float] | None) -> Measurement:
            low, high = interval or (None, None)
            return Measurement(
                name=name, value=value, unit=unit, kind="measured", n=windows,
                ci_low=low, ci_high=high, device=device, of=of, note=note,
            )  # fmt: skip

        def mean(name: str, values: npt.NDArray[Any], unit: str, high: float = math.inf) -> Measurement:
            interval = _mean_interval(values.mean(axis=1))
            clipped = interval and (max(interval[0], 0.0), min(interval[1], high))
            return measurement(name, float(values.mean()), unit, clipped)

        def exponential(name: str, values: DoubleArray) -> Measurement:
            interval = _mean_interval(values.mean(axis=1))
            bounds = interval and (_exp(interval[0]), _exp(interval[1]))
            return measurement(name, _exp(float(values.mean())), "ratio", bounds)

        median, p99 = np.quantile(self.kld, [0.5, 0.99])
        median_interval, p99_interval = _bootstrap(self.kld, (0.5, 0.99)) or (None, None)
        return [
            mean("kl_divergence_nats", self.kld, "nats"),
            measurement("kl_divergence_median_nats", float(median), "nats", median_interval),
            measurement("kl_divergence_p99_nats", float(p99), "nats", p99_interval),
            measurement("kl_divergence_max_nats", float(self.kld.max()), "nats", None),
            mean("top1_agreement", self.agrees, "ratio", high=1.0),
            exponential("perplexity", self.nll),
            exponential("source_perplexity", self.source_nll),
            exponential("perplexity_ratio", self.nll - self.source_nll),
        ]


def compare(
    engine: Engine, reference: Reference, windows: int | None = None, progress: Progress | None = None
) -> Divergence:
    """Run an artifact over the windows of a reference, the first `windows` of them if given.

    `progress` is called with windows done and windows in all.

    Raises:
        InputError: the vocabulary differs, a window does not fit the context, or a logit is not finite.
    """
    vocabulary = reference.vocabulary_size
    if engine.vocabulary_size != vocabulary:
        wanted = f"a model with the source's vocabulary of {vocabulary} tokens"
        raise InputError(wanted, str(engine.vocabulary_size), "compare it with the model it was made from")
    context_tokens = engine.capabilities.context_tokens
    if context_tokens < reference.window_tokens:
        wanted = f"a context of {reference.window_tokens} tokens"
        raise InputError(wanted, str(context_tokens), "open the model with more `context_tokens`")
    if windows is not None and windows < 1:
        raise InputError("at least 1 window", str(windows), "raise windows")
    total = min(windows or len(reference.tokens), len(reference.tokens))
    rows = [_compare_window(engine, reference, window, progress, total) for window in range(total)]
    kld, nll, agrees = (np.stack(column) for column in zip(*rows, strict=True))
    return Divergence(kld, nll, np.array(reference.nll[:total]), agrees)


def _compare_window(
    engine: Engine, reference: Reference, window: int, progress: Progress | None, total: int
) -> tuple[DoubleArray, DoubleArray, BoolArray]:
    tokens = reference.tokens[window]
    scored = scored_positions(len(tokens))
    logits = _window_logits(engine, tokens, scored)
    if not np.isfinite(logits).all():
        raise InputError("finite logits", f"a value that is not, in window {window}", "check the model")
    rows = scored.stop - scored.start
    kld, nll = np.empty(rows), np.empty(rows)
    for block in _blocks(rows):
        kld[block], nll[block] = divergence_rows(
            reference.scale[window, block],
            reference.codes[window, block],
            logits[block],
            tokens[scored.start + 1 :][block],
        )
    if progress is not None:
        progress(window + 1, total)
    return kld, nll, logits.argmax(axis=1) == reference.top[window]


def _window_logits(engine: Engine, tokens: IntArray, scored: slice) -> FloatArray:
    sequence = engine.start()
    try:
        entries = [
            Entry(sequence, int(token), wants_logits=scored.start <= position < scored.stop)
            for position, token in enumerate(tokens[:-1])
        ]
        size = engine.capabilities.batch_tokens
        parts = [engine.step(entries[i : i + size]).logits for i in range(0, len(entries), size)]
    finally:
        engine.release(sequence)
    return np.concatenate(parts)


def divergence_rows(
    scale: FloatArray, codes: npt.NDArray[np.uint16], logits: FloatArray, targets: IntArray
) -> tuple[DoubleArray, DoubleArray]:
    """KL(source || artifact) and the artifact's NLL of `targets`, in nats, each of shape (R,).

    With a and b the log-probabilities of source and artifact up to constants, both with their maximum at 0,
    KL = sum(exp(a) (a - b)) / sum(exp(a)) - log sum(exp(a)) + log sum(exp(b)), all in float64. The source is
    normalised anew, so that rounding to codes leaves a distribution and KL is never below zero.

    Args:
        scale: Nats per code, shape (R,).
        codes: Source rows, shape (R, V).
        logits: Artifact rows, shape (R, V).
        targets: The tokens that follow, shape (R,).
    """
    source = codes.astype(np.float64)
    source -= source.max(axis=1, keepdims=True)
    source *= scale[:, None]
    artifact = logits.astype(np.float64)
    artifact -= artifact.max(axis=1, keepdims=True)
    artifact_log_sum = np.log(np.exp(artifact).sum(axis=1))
    nll = artifact_log_sum - np.take_along_axis(artifact, targets[:, None].astype(np.intp), axis=1)[:, 0]
    weights = np.exp(source)
    source_sum = weights.sum(axis=1)
    source -= artifact
    kld = np.einsum("rv,rv->r", weights, source) / source_sum - np.log(source_sum) + artifact_log_sum
    return np.maximum(kld, 0.0), nll


def _blocks(rows: int) -> Sequence[slice]:
    return [slice(start, min(start + _BLOCK_ROWS, rows)) for start in range(0, rows, _BLOCK_ROWS)]


def _mean_interval(samples: DoubleArray) -> tuple[float, float] | None:
    """95% interval of the mean of independent samples under Student's t; None with fewer than two."""
    if len(samples) < 2:
        return None
    mean = float(samples.mean())
    half = student_t_975(len(samples) - 1) * float(samples.std(ddof=1)) / math.sqrt(len(samples))
    return mean - half, mean + half


_T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def student_t_975(freedom: int) -> float:
    """97.5% quantile of Student's t: a table to 10 degrees of freedom, then Cornish-Fisher to third order.

    (Abramowitz and Stegun, 26.7.5; the error is below 1e-3.)
    """
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _bootstrap(values: DoubleArray, quantiles: tuple[float, ...]) -> list[tuple[float, float]] | None:
    """95% percentile-bootstrap intervals of quantiles, resampling whole windows; None with fewer than two."""
    windows = len(values)
    if windows < 2:
        return None
    random = np.random.default_rng(0)
    found = np.array(
        [np.quantile(values[random.integers(windows, size=windows)], quantiles) for _ in range(_RESAMPLES)]
    )
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    # a resample of few windows can miss the value itself
    point = np.quantile(values, quantiles)
    return [(float(a), float(b)) for a, b in zip(np.minimum(low, point), np.maximum(high, point), strict=True)]


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))
