"""The picture of a frontier: KL divergence on a logarithmic axis over bytes, one panel for each domain, as one SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from _judge import Row

from edgekit.report.figures import number, ticks

WIDTH, PANEL, LEFT, RIGHT, TOP, BOTTOM, HEAD = 1200, 470, 78, 24, 34, 50, 74
COLOURS = {"gguf": "#1f5fb4", "gptq": "#b4521f", "onnx": "#1f7a3d"}
TITLES = {"gguf": "GGUF", "gptq": "GPTQ", "onnx": "ONNX"}
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1a1a1a } .title { font-size: 19px; font-weight: 600 }
.panel { font-size: 15px; font-weight: 600 } .small { font-size: 12px } .grid { stroke: #e3e3e3 }
.minor { stroke: #f1f1f1 } .axis { stroke: #666 } .whisker { stroke-width: 1.5; opacity: .45 }
.curve { fill: none; stroke-width: 2 } .warning { fill: #a01818; font-weight: 600 } .leader { stroke: #aaa }
"""


@dataclass
class _Labels:
    """Places for labels that touch neither marks nor each other."""

    right: float
    bottom: float
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def mark(self, x: float, y: float, reach: float = 6) -> None:
        self.taken.append((x - reach, y - reach, x + reach, y + reach))

    def place(self, x: float, y: float, text: str) -> tuple[float, float] | None:
        """The start of the text's base line near a mark; None where there is no room."""
        width = 7.3 * len(text)
        for far in (0, 14, 28, 44, 62):
            for left, base in (
                (x + 9 + far, y + 4), (x - width - 9 - far, y + 4), (x + 9, y - 8 - far), (x + 9, y + 17 + far),
                (x - width - 9, y - 8 - far), (x - width - 9, y + 17 + far),
            ):  # fmt: skip
                box = (left, base - 11, left + width, base + 3)
                inside = left > LEFT and box[2] < self.right and box[1] > TOP and box[3] < self.bottom
                if inside and not any(_touch(box, other) for other in self.taken):
                    self.taken.append(box)
                    return left, base
        return None


def _touch(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@dataclass(frozen=True)
class _Axes:
    """Bytes to the right, nats upwards by powers of ten."""

    smallest: float
    largest: float
    low: float
    high: float

    def x(self, nbytes: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (nbytes - self.smallest) / (self.largest - self.smallest)

    def y(self, nats: float) -> float:
        share = (math.log10(max(nats, self.low)) - math.log10(self.low)) / math.log10(self.high / self.low)
        return PANEL - BOTTOM - share * (PANEL - TOP - BOTTOM)


def draw(rows: Sequence[Row], title: str, note: str = "") -> str:
    """The whole picture; `note` is a warning under the title."""
    domains = list(rows[0].loss)
    height = HEAD + PANEL * len(domains)
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}"><title>{escape(title)}</title><style>{STYLE}</style>'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text class="title" x="{LEFT}" y="28">{escape(title)}</text>',
        f'<text class="warning" x="{WIDTH - RIGHT}" y="28" text-anchor="end">{escape(note)}</text>',
    ]
    at: float = LEFT
    for part in dict.fromkeys(row.part for row in rows):
        for ours, whose in ((True, "edgekit"), (False, "others")):
            text = f"{TITLES[part]}, {whose}"
            body += [_mark(part, ours, at + 6, 52), f'<text class="small" x="{at + 17}" y="56">{text}</text>']
            at += 40 + 6.6 * len(text)
    body.append(f'<text class="small" x="{at}" y="56">bars: 95% intervals over windows; lower left is better</text>')
    for index, domain in enumerate(domains):
        body.append(f'<g transform="translate(0 {HEAD + PANEL * index})">{"".join(_panel(rows, domain))}</g>')
    return "".join(body) + "</svg>\n"


def _mark(part: str, ours: bool, x: float, y: float, tip: str = "") -> str:
    inside = f"<title>{escape(tip)}</title>" if tip else ""
    colour = COLOURS[part]
    if ours:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{colour}">{inside}</circle>'
    box = f'x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"'
    return f'<rect {box} fill="#fff" stroke="{colour}" stroke-width="2">{inside}</rect>'


def _panel(rows: Sequence[Row], domain: str) -> list[str]:
    sizes, losses = [row.nbytes for row in rows], [row.loss[domain] for row in rows]
    margin = 0.04 * (max(sizes) - min(sizes)) or 0.04 * max(sizes)
    values = [value for loss in losses for value in (loss.nats, loss.high or loss.nats) if value > 0] or [1.0]
    axes = _Axes(min(sizes) - margin, max(sizes) + 2 * margin, 0.75 * min(values), 1.3 * max(values))
    body = [f'<text class="panel" x="{LEFT}" y="20">on held-out {escape(domain)}</text>', *_scales(axes)]
    labels = _Labels(WIDTH - RIGHT, PANEL - BOTTOM)
    for row in rows:
        x, loss = axes.x(row.nbytes), row.loss[domain]
        labels.mark(x, axes.y(loss.nats))
        labels.taken.append((x - 1, axes.y(loss.high or loss.nats), x + 1, axes.y(loss.low or loss.nats)))
    for part in dict.fromkeys(row.part for row in rows):
        curve = sorted((row for row in rows if row.part == part and row.ours), key=lambda row: row.nbytes)
        spots = [(axes.x(row.nbytes), axes.y(row.loss[domain].nats)) for row in curve]
        if part == "gguf" and len(spots) > 1:
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            body.append(f'<polyline class="curve" points="{points}" stroke="{COLOURS[part]}"/>')
            for (x, y), (right, below) in itertools.pairwise(spots):
                for share in (0.25, 0.5, 0.75):
                    labels.mark(x + share * (right - x), y + share * (below - y), 4)
    for row in rows:
        loss, x = row.loss[domain], axes.x(row.nbytes)
        if loss.low is not None and loss.high is not None:
            ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{axes.y(loss.low):.1f}" y2="{axes.y(loss.high):.1f}"'
            body.append(f'<line class="whisker" {ends} stroke="{COLOURS[row.part]}"/>')
        tip = f"{row.name}: {loss} nats in {row.nbytes / 1e6:.2f} MB"
        body.append(_mark(row.part, row.ours, x, axes.y(loss.nats), tip))
    for row in rows:
        if row.part == "gguf" and row.ours:
            continue  # the curve has one colour, and its points have the names of presets
        x, y = axes.x(row.nbytes), axes.y(row.loss[domain].nats)
        if (spot := labels.place(x, y, row.name)) is not None:
            body.append(f'<text class="small" x="{spot[0]:.1f}" y="{spot[1]:.1f}">{escape(row.name)}</text>')
    return body


def _scales(axes: _Axes) -> list[str]:
    base, right = PANEL - BOTTOM, WIDTH - RIGHT
    body = []
    for power in range(math.floor(math.log10(axes.low)), math.ceil(math.log10(axes.high)) + 1):
        for factor in (1, 2, 5):
            value = factor * 10.0**power
            if axes.low <= value <= axes.high:
                y, style = axes.y(value), "grid" if factor == 1 else "minor"
                body.append(f'<line class="{style}" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
                body.append(
                    f'<text class="small" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value, 1)}</text>'
                )
    body.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{base}" y2="{base}"/>')
    unit = next((scale for scale in ((1e9, "GB"), (1e6, "MB")) if axes.largest >= scale[0]), (1e3, "kB"))
    step = ticks((axes.largest - axes.smallest) / unit[0], 9)[1]
    for index in range(math.ceil(axes.smallest / unit[0] / step), math.floor(axes.largest / unit[0] / step) + 1):
        value, x = index * step, axes.x(index * step * unit[0])
        if x <= right:
            body.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 5}"/>')
            body.append(f'<text class="small" x="{x:.1f}" y="{base + 19}" text-anchor="middle">{value:.6g}</text>')
    body.append(f'<text x="{(LEFT + right) / 2}" y="{base + 40}" text-anchor="middle">size in {unit[1]}</text>')
    middle = (TOP + base) / 2
    body.append(
        f'<text x="20" y="{middle}" text-anchor="middle" transform="rotate(-90 20 {middle})">'
        "KL divergence to the source, nats</text>"
    )
    return body
