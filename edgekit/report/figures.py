"""How a figure looks: units, intervals, names and small SVG plots. Pure; the renderers share it.

A prediction carries `≈` in front of its value wherever it appears, so that it stays recognisable when a
single cell is copied out of a report.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from edgekit.measurement import Measurement
from edgekit.report import StepRecord

TIMES = "\N{MULTIPLICATION SIGN}"
BINARY_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True)
class Known:
    """What people call a measurement, and what it tells them."""

    title: str
    hint: str = ""
    style: Literal["plain", "percent", "factor"] = "plain"


KNOWN = {
    "bundle_bytes": Known("Bundle size", "model, tokenizer and settings; the report is not counted"),
    "weight_bytes": Known("Weights"),
    "kl_divergence_nats": Known("KL divergence", "mean distance from the source's next-token distribution; 0 is equal"),
    "kl_divergence_median_nats": Known("KL divergence, median"),
    "kl_divergence_p99_nats": Known("KL divergence, 99th percentile"),
    "kl_divergence_max_nats": Known("KL divergence, maximum"),
    "perplexity": Known("Perplexity", "how surprised the model is by held-out text; lower is better"),
    "source_perplexity": Known("Perplexity of the source"),
    "perplexity_ratio": Known("Perplexity, relative to the source", style="factor"),
    "top1_agreement": Known("Top-1 agreement", "how often the source's first choice of token is kept", "percent"),
    "prefill_tokens_per_s": Known("Prefill speed"),
    "decode_tokens_per_s": Known("Decode speed", "tokens generated per second, one sequence"),
    "ttft_s": Known("Time to first token"),
    "energy_j_per_token": Known("Energy of a token", "while decoding, idle power included"),
    "idle_w": Known("Idle power", "with the model loaded"),
    "load_s": Known("Load time"),
    "peak_rss_bytes": Known("Peak memory", "most memory the process held"),
    "answer_tokens_forward": Known("Tokens forward for an answer"),
    "companion_bytes": Known("Verifier", "its weights, and the memory of a trunk of its own"),
    "kv_cache_bytes": Known("KV cache"),
    "compute_buffer_bytes": Known("Compute buffers"),
    "max_logit_difference": Known("Merge check", "largest difference of a logit to base and adapter unmerged"),
    "logit_change": Known("Effect of the adapters", "largest change of a logit"),
    "rounding_logit_difference": Known("Merge, stored in 16 bits", "largest change of a logit by rounding the result"),
    "loss_original_nats": Known("Loss, merged onto the original", "on the calibration text, per token"),
    "loss_nf4_nats": Known("Loss, merged onto NF4", "on the calibration text, per token"),
    "verifier_auc": Known("Verifier: AUC", "how well it tells right from wrong partial answers; 0.5 is chance"),
    "verifier_auc_within": Known("Verifier: AUC within a problem", "what choosing among candidates needs"),
    "verifier_ece": Known("Verifier: calibration error", "mean gap between what it says and what happens", "percent"),
    "verifier_auc_source": Known("Verifier: AUC on the source"),
    "verifier_auc_within_source": Known("Verifier: AUC within a problem, on the source"),
    "verifier_ece_source": Known("Verifier: calibration error on the source", style="percent"),
    "task_accuracy": Known("Accuracy on the task", "by the strategy that was chosen", "percent"),
    "answer_s": Known("Time of an answer", "by the strategy that was chosen"),
    "required_bytes": Known("Memory required"),
    "usable_bytes": Known("Memory usable on the target"),
}
_UNITLESS = {"", "1", "ratio", "perplexity"}


def known(name: str) -> Known:
    """Look up a measurement's name; an unknown one becomes its own title."""
    return KNOWN.get(name) or Known(clean(name).replace("_", " "))


def clean(text: object) -> str:
    """Make invisible characters (controls, newlines, bidirectional overrides) visible as escapes.

    They could end a table row, reorder the text around them or drive a terminal.
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else char
        for char in str(text)
    )


def shorten(text: object, length: int) -> str:
    """Clean `text` and keep its beginning and end within `length` characters."""
    full = clean(text)
    if len(full) <= length:
        return full
    tail = (length - 1) // 3
    return full[: length - 1 - tail] + "…" + (full[-tail:] if tail else "")


def number(value: float, digits: int = 3) -> str:
    """Round to `digits` significant digits, never dropping digits before the point: 0.0312, 17.4, 1,234."""
    if not 1e-4 <= abs(value) < 1e15 and value != 0:
        return f"{value:.2e}"
    # the magnitude after rounding: 99.96 is 100, not 100.0
    return _fixed(value, digits - 1 - _magnitude(float(f"{value:.{digits - 1}e}")))


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def _fixed(value: float, decimals: int) -> str:
    return f"{value:,.{max(0, decimals)}f}" if value else "0"


def bytes_text(value: float) -> str:
    """Binary units: 512 bytes, 98.6 MiB, 5.25 GiB."""
    scale, unit = _byte_scale(value)
    return f"{_fixed(value, 0) if scale == 1 else number(value / scale)} {unit}"


def _byte_scale(value: float) -> tuple[int, str]:
    power = 0
    while round(abs(value) / 1024**power) >= 1024 and power < len(BINARY_UNITS) - 1:
        power += 1
    return 1024**power, BINARY_UNITS[power]


def seconds_text(value: float) -> str:
    """Seconds with a prefix that suits them: 850 ms, 12.3 s, 4 min 10 s."""
    if abs(value) >= 120:
        return f"{round(value) // 60:,} min {round(value) % 60} s"
    factor, unit = _time_scale(value)
    return f"{number(value * factor)} {unit}"


def peak_text(step: StepRecord) -> str:
    """Peak memory of the build while a step ran, where it was recorded."""
    return "" if step.peak_rss_bytes is None else bytes_text(step.peak_rss_bytes)


def _time_scale(value: float) -> tuple[float, str]:
    if value == 0 or abs(value) >= 1:
        return 1, "s"
    return (1e3, "ms") if abs(value) >= 1e-3 else (1e6, "µs")


def percent(fraction: float) -> str:
    """Per cent with as many digits as it takes not to round up to 100%: 91.2%, 99.97%."""
    return _percent_number(fraction * 100) + "%"


def _percent_number(value: float) -> str:
    if value == 100:
        return "100"
    decimals = 1
    while decimals < 6 and round(value, decimals) == 100:
        decimals += 1
    return _fixed(value, decimals)


def exact(name: str, value: float) -> str:
    """A value beside the bound it is held to, with enough digits to see on which side it lies."""
    plain = f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.7g}"
    return f"{plain} ({bytes_text(value)})" if name.endswith("_bytes") and abs(value) >= 1024 else plain


@dataclass(frozen=True)
class Shown:
    """A measurement ready to print, in parts that a layout may set differently."""

    value: str
    interval: str
    """`[low, high]`, or empty where there is none or it has no width."""
    unit: str

    @property
    def text(self) -> str:
        """All parts in one line: `0.0312 [0.0290, 0.0334] nats`."""
        if not self.interval:
            return self.plain
        return f"{self.value} {self.interval} {self.unit}".rstrip()

    @property
    def plain(self) -> str:
        """Value and unit only."""
        return f"{self.value}{'' if self.unit in {'', '%', TIMES} else ' '}{self.unit}"


def shown(measurement: Measurement) -> Shown:
    """Scale to a readable unit; round to what the interval can carry: two digits of its half-width."""
    m = measurement
    scale, unit = _scale(m)
    value = m.value * scale
    mark = "≈ " if m.kind == "predicted" else ""
    if m.ci_low is None or m.ci_high is None or m.ci_low == m.ci_high:
        text = _percent_number(value) if unit == "%" else _fixed(value, 0) if unit == "bytes" else number(value)
        return Shown(mark + text, "", unit)
    low, high = m.ci_low * scale, m.ci_high * scale
    largest = max(abs(value), abs(low), abs(high))
    if not 1e-4 <= largest < 1e15:
        return Shown(f"{mark}{value:.2e}", f"[{low:.2e}, {high:.2e}]", unit)
    # six significant digits are the most that a reader can use, however narrow the interval
    decimals = min(1 - _magnitude((high - low) / 2), 5 - _magnitude(largest))
    return Shown(mark + _fixed(value, decimals), f"[{_fixed(low, decimals)}, {_fixed(high, decimals)}]", unit)


def _scale(m: Measurement) -> tuple[float, str]:
    style = known(m.name).style
    if style == "percent" and m.unit in _UNITLESS:
        return 100, "%"
    if style == "factor" and m.unit in _UNITLESS:
        return 1, TIMES
    if m.unit == "bytes":
        scale, unit = _byte_scale(m.value)
        return 1 / scale, unit
    if m.unit == "s":
        return _time_scale(m.value)
    return 1, "" if m.unit in _UNITLESS else shorten(m.unit, 24)


def ticks(limit: float, count: int = 5) -> list[float]:
    """About `count` round positions (1, 2 or 5 times a power of ten apart) from 0 to at most `limit`."""
    if limit <= 0 or not math.isfinite(limit):
        return [0.0]
    rough = limit / count
    power = 10.0 ** _magnitude(rough)
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [index * step for index in range(math.floor(limit / step * (1 + 1e-9)) + 1)]


# SVG: horizontal positions are per cent of the width and text has a fixed size, so one drawing serves a
# phone and a wide screen. Colours are classes of the page's style sheet, for dark and light.


@dataclass(frozen=True)
class Segment:
    """One part of a stacked bar."""

    label: str
    value: float
    style: str
    """CSS class that fills it."""


def bar_stack(segments: Sequence[Segment], limit_bytes: float | None, title: str) -> str:
    """Horizontal stacked bar in bytes: it ends at `limit_bytes`, or a line marks that where the parts go beyond it."""
    total = sum(max(0.0, segment.value) for segment in segments)
    extent = max(total, limit_bytes or 0.0)
    body: list[str] = []
    start = 0.0
    for segment in segments:
        width = _share(segment.value, extent)
        if width > 0:
            tip = f"<title>{escape(segment.label)}: {bytes_text(segment.value)}</title>"
            body.append(
                f'<rect class="{segment.style}" x="{start:.3f}%" y="8" width="{width:.3f}%" height="36">{tip}</rect>'
            )
        start += width
    if limit_bytes and total > limit_bytes:
        at = _share(limit_bytes, extent)
        body.append(f'<line class="limit" x1="{at:.3f}%" x2="{at:.3f}%" y1="0" y2="52"/>')
    fits = limit_bytes is not None and total <= limit_bytes
    if fits:
        body.append('<line class="axis" x1="100%" x2="100%" y1="48" y2="53"/>')
        body.append(f'<text x="100%" y="67" text-anchor="end">{bytes_text(extent)} usable</text>')
    scale, unit = _byte_scale(extent)
    for tick in ticks(extent / scale, 3):
        at = _share(tick * scale, extent)
        if fits and at > 66:
            break  # on a phone a label there would touch the one at the end
        anchor = "start" if at < 3 else "end" if at > 94 else "middle"
        body.append(f'<line class="axis" x1="{at:.3f}%" x2="{at:.3f}%" y1="48" y2="53"/>')
        body.append(f'<text x="{at:.3f}%" y="67" text-anchor="{anchor}">{tick:g}{f" {unit}" if tick else ""}</text>')
    return svg("stack", 72, title, body)


def columns_with_band(values: Sequence[float], mean: float, low: float, high: float, title: str) -> str:
    """One column per value, the mean as a line and its interval as a band behind it.

    The labels of the vertical axis lie left of the drawing: its element needs a margin and visible overflow.
    """
    height, top, base = 210, 10, 180
    extent = max([*values, high, 0.0]) or 1.0

    def y(value: float) -> float:
        return base - max(0.0, value) / extent * (base - top)

    body: list[str] = []
    for tick in ticks(extent, 4):
        body.append(f'<line class="grid" x1="0" x2="100%" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        body.append(f'<text x="-8" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    pitch = 100 / max(1, len(values))
    gap = 0.2 if len(values) <= 120 else 0.0
    for index, value in enumerate(values):
        body.append(
            f'<rect class="column" x="{pitch * (index + gap / 2):.3f}%" y="{y(value):.1f}" '
            f'width="{pitch * (1 - gap):.3f}%" height="{base - y(value):.1f}">'
            f"<title>window {index + 1}: {number(value)}</title></rect>"
        )
    body.append(f'<rect class="band" x="0" y="{y(high):.1f}" width="100%" height="{max(1.0, y(low) - y(high)):.1f}"/>')
    body.append(f'<line class="mean" x1="0" x2="100%" y1="{y(mean):.1f}" y2="{y(mean):.1f}"/>')
    body.append(f'<line class="axis" x1="0" x2="100%" y1="{base}" y2="{base}"/>')
    for index in sorted({0, len(values) // 2, len(values) - 1} if values else set()):
        body.append(f'<text x="{pitch * (index + 0.5):.3f}%" y="197" text-anchor="middle">{index + 1}</text>')
    return svg("columns", height, title, body)


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot with its interval."""

    x: float
    y: float
    low: float
    high: float
    label: str
    style: str


def scatter(dots: Sequence[Dot], title: str) -> str:
    """Shares (0 to 1) over a positive quantity on a logarithmic axis, each with its interval.

    The labels of the vertical axis lie left of the drawing, as in `columns_with_band`.
    """
    top, base = 12, 210
    low, high = math.log(min(dot.x for dot in dots)), math.log(max(dot.x for dot in dots))
    extent = min(1.0, 1.1 * max(dot.high for dot in dots)) or 1.0

    def x(value: float) -> float:
        return 4 + 90 * (math.log(value) - low) / (high - low) if high > low else 50.0

    def y(value: float) -> float:
        return base - value / extent * (base - top)

    body: list[str] = []
    for tick in ticks(extent, 4):
        body.append(f'<line class="grid" x1="0" x2="100%" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        body.append(f'<text x="-8" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:.3g} %</text>')
    body.append(f'<line class="axis" x1="0" x2="100%" y1="{base}" y2="{base}"/>')
    for power in range(math.floor(low / math.log(2)), math.ceil(high / math.log(2)) + 1):
        if low <= power * math.log(2) <= high:
            body.append(f'<text x="{x(2.0**power):.3f}%" y="{base + 17}" text-anchor="middle">{2**power:g}</text>')
    for dot in dots:
        tip = f"{dot.label}: {percent(dot.y)} [{percent(dot.low)}, {percent(dot.high)}] at {number(dot.x)} tokens"
        at = f"{x(dot.x):.3f}%"
        body.append(f'<line class="whisker" x1="{at}" x2="{at}" y1="{y(dot.low):.1f}" y2="{y(dot.high):.1f}"/>')
        body.append(
            f'<circle class="{dot.style}" cx="{at}" cy="{y(dot.y):.1f}" r="5"><title>{escape(tip)}</title></circle>'
        )
    return svg("columns", base + 26, title, body)


def falling_curve(points: Sequence[tuple[float, float]], chosen: tuple[float, float], title: str) -> str:
    """Positive quantities over bytes, on a logarithmic vertical axis, with the chosen point.

    The labels of the vertical axis lie left of the drawing, as in `columns_with_band`.
    """
    top, base = 12, 210
    shown_points = [point for point in points if point[1] > 0] or [chosen]
    sizes = [size for size, _ in (*shown_points, chosen)]
    values = [math.log10(value) for _, value in (*shown_points, chosen) if value > 0] or [0.0]
    left, right, low, high = min(sizes), max(sizes), math.floor(min(values)), math.ceil(max(values))

    def x(size: float) -> float:
        return 2 + 94 * (size - left) / (right - left) if right > left else 50.0

    def y(value: float) -> float:
        share = (math.log10(value) - low) / (high - low) if high > low and value > 0 else 0.0
        return base - share * (base - top)

    body: list[str] = []
    for power in range(low, high + 1):
        at = y(10.0**power)
        body.append(f'<line class="grid" x1="0" x2="100%" y1="{at:.1f}" y2="{at:.1f}"/>')
        body.append(f'<text x="-8" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    body.append(f'<line class="axis" x1="0" x2="100%" y1="{base}" y2="{base}"/>')
    for size in (left, (left + right) / 2, right) if right > left else (left,):
        body.append(f'<text x="{x(size):.3f}%" y="{base + 17}" text-anchor="middle">{escape(bytes_text(size))}</text>')
    for here, there in itertools.pairwise(shown_points):
        ends = f'x1="{x(here[0]):.3f}%" y1="{y(here[1]):.1f}" x2="{x(there[0]):.3f}%" y2="{y(there[1]):.1f}"'
        body.append(f'<line class="mean" {ends}/>')
    tip = escape(f"{bytes_text(chosen[0])}: {number(chosen[1])} nats")
    place = f'cx="{x(chosen[0]):.3f}%" cy="{y(chosen[1]):.1f}"'
    body.append(f'<circle class="chosen" {place} r="5"><title>{tip}</title></circle>')
    return svg("columns", base + 26, title, body)


def share_bar(value: float, extent: float, style: str = "bar") -> str:
    """A thin bar beside a number in a table; decoration, hidden from screen readers."""
    return (
        '<svg class="share" height="8" aria-hidden="true"><rect class="track" width="100%" height="8"/>'
        f'<rect class="{style}" width="{_share(value, extent):.3f}%" height="8"/></svg>'
    )


def _share(value: float, extent: float) -> float:
    return min(100.0, 100 * max(0.0, value) / extent) if extent > 0 else 0.0


def svg(style: str, height: int, title: str, body: Sequence[str]) -> str:
    """Frame the elements of a plot, of the page's width; `body` is escaped already."""
    label = escape(title)
    head = f'<svg class="{style}" height="{height}" role="img" aria-label="{label}"><title>{label}</title>'
    return f"{head}{''.join(body)}</svg>"
