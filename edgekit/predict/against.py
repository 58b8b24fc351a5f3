"""Predictions held against what was then measured on the target itself."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.measurement import Measurement

_WORDS = {
    "decode_tokens_per_s": "decode",
    "prefill_tokens_per_s": "prefill",
    "peak_rss_bytes": "peak memory",
    "energy_j_per_token": "energy per token",
}


def prediction_errors(predicted: Sequence[Measurement], measured: Sequence[Measurement]) -> str | None:
    """One sentence with the relative error of every rate, peak and energy that was both predicted and measured.

    A positive error is a prediction above the measurement. What was measured on a busy machine does not judge one.
    None where nothing is left.
    """
    usable = (m for m in measured if m.kind == "measured" and m.of == "bundle" and "contended" not in (m.note or ""))
    found = {m.name: m.value for m in usable}
    told = []
    for guess in predicted:
        value = found.get(guess.name)
        if guess.name not in _WORDS or not value or guess.ci_low is None or guess.ci_high is None:
            continue
        outside = "" if guess.ci_low <= value <= guess.ci_high else ", outside its range"
        told.append(f"{_WORDS[guess.name]} {guess.value / value - 1:+.0%}{outside}")
    return f"Predictions against what was measured on the target: {'; '.join(told)}." if told else None
