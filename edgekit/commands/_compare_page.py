"""A comparison for people and for CI: the table that a terminal, Markdown and HTML share, the plots, and JUnit XML."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from jinja2 import Template
from markupsafe import Markup

from edgekit.compare import METRICS, Cell, Comparison, Front, Kind, Outcome, Row, fails
from edgekit.measurement import Measurement
from edgekit.report import figures as fig
from edgekit.report.html import load_template, style_sheet
from edgekit.report.markdown import table, text

_SECONDS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
_DECADES = 30
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
_TITLES = {metric.name: metric.title for metric in METRICS}


@dataclass(frozen=True)
class Shown:
    """A figure of one build, ready to print."""

    value: str
    interval: str
    unit: str
    verdict: str
    """What became of it against the baseline: `+12.3%, worse`; empty for the baseline."""
    outcome: Outcome | None
    note: int | None
    """Which of the notes says why, from 1."""

    @property
    def plain(self) -> str:
        """Value and unit."""
        return f"{self.value}{'' if self.unit in ('', '%', fig.TIMES) else ' '}{self.unit}" if self.value else "none"

    @property
    def result(self) -> str:
        """The verdict with the number of its note."""
        return self.verdict + (f" [{self.note}]" if self.note else "")


@dataclass(frozen=True)
class Line:
    """One figure of every build; a cell is None where neither it nor the baseline has the figure."""

    title: str
    kind: Kind
    rule: str
    """Which way is better, and how much worse is allowed: `lower is better, 5%`."""
    cells: tuple[Shown | None, ...]


def lines(comparison: Comparison) -> list[Line]:
    """The table of all builds."""
    told = notes(comparison)
    return [
        Line(
            title=fig.clean(row.title),
            kind=row.kind,
            rule=f"{row.better} is better, {row.tolerance.text}",
            cells=tuple(_shown(row, cell, told) for cell in row.cells),
        )
        for row in comparison.rows
    ]


def notes(comparison: Comparison) -> list[str]:
    """Why figures are not compared or not certain, each reason once."""
    return list(dict.fromkeys(cell.why for row in comparison.rows for cell in row.cells if cell.why))


def _shown(row: Row, cell: Cell, told: Sequence[str]) -> Shown | None:
    if cell.figure is None and cell.outcome is None:
        return None
    value, interval, unit = "", "", ""
    if cell.figure is not None:
        parts = fig.shown(_measurement(row, cell.figure.value, cell.figure.low, cell.figure.high))
        value, interval, unit = parts.value, parts.interval, parts.unit
    verdict = change_text(cell)
    if verdict != "equal":
        verdict = ", ".join(filter(None, [verdict, cell.outcome]))
    return Shown(value, interval, unit, verdict, cell.outcome, told.index(cell.why) + 1 if cell.why else None)


def _measurement(row: Row, value: float, low: float | None = None, high: float | None = None) -> Measurement:
    kind: Literal["measured", "predicted"] = "predicted" if row.kind == "predicted" else "measured"
    return Measurement(name=row.figure, value=value, unit=row.unit, kind=kind, ci_low=low, ci_high=high)


def change_text(cell: Cell) -> str:
    """The change against the baseline: `+3.1%`, a factor from tenfold on, else the difference."""
    if cell.difference is None:
        return ""
    if cell.difference == 0:
        return "equal"
    if cell.change is None:
        return f"{cell.difference:+.3g}"
    if cell.change >= 9:
        return f"{fig.number(1 + cell.change)}{fig.TIMES}"
    percent = f"{100 * cell.change:+.1f}%"
    return percent if percent[1:] != "0.0%" else f"{percent[0]}<0.1%"


def sentences(comparison: Comparison) -> list[str]:
    """One for each candidate: what became of its figures."""
    told = []
    for index, build in enumerate(comparison.builds[1:], 1):
        found: dict[str, list[str]] = {}
        for row in comparison.rows:
            if (outcome := row.cells[index].outcome) is not None:
                name = row.metric if row.kind != "predicted" else f"{row.metric} (predicted)"
                found.setdefault(outcome, []).append(name)
        words = [
            f"{word}: {', '.join(found[word])}"
            for word in ("worse", "maybe worse", "missing", "better")
            if word in found
        ]
        same, rest = len(found.get("same", ())), len(found.get("not compared", ())) + len(found.get("maybe better", ()))
        words += [f"{same} within tolerance"] if same else []
        words += [f"{rest} undecided or not compared"] if rest else []
        told.append(f"{build.name}: {'; '.join(words) or 'nothing to compare'}.")
    return told


def verdict(comparison: Comparison) -> str:
    """The first words: how many figures are worse."""
    count = len(comparison.regressions)
    worse = "worse, maybe worse or missing" if comparison.strict else "worse"
    return f"{count or 'no'} figure{'' if count == 1 else 's'} {worse}"


LEGEND = (
    "Better and worse lie beyond the tolerance, and certainly so: the interval of the difference leaves 0 out where "
    "the same windows were measured, else the two intervals do not overlap. Predictions and sizes are compared by "
    "value. Maybe is beyond the tolerance, but not certain. ≈ is predicted."
)


def to_json(comparison: Comparison) -> str:
    """The whole comparison as JSON, with the regressions by name and whether there are any."""
    failed = [
        {"build": comparison.builds[index].name, "metric": row.metric, "kind": row.kind}
        for row, index in comparison.regressions
    ]
    document = {**comparison.model_dump(mode="json"), "regressions": failed, "passed": not failed}
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n"


def write(comparison: Comparison, out: Path) -> list[Path]:
    """Write `compare.json`, `compare.md` and `compare.html`; all is rendered before the first byte is written."""
    texts = {
        "compare.json": to_json(comparison),
        "compare.md": markdown(comparison),
        "compare.html": html(comparison),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        (out / name).write_text(content, encoding="utf-8", newline="\n")
    return [out / name for name in texts]


# --- JUnit


_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no XML 1.0 document may hold, not even escaped."""


def junit(comparison: Comparison) -> str:
    """JUnit XML: a suite for each candidate, a case for each figure of the table; what is not compared is skipped."""
    root = ElementTree.Element("testsuites", name="edgekit compare")
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for index, build in enumerate(comparison.builds[1:], 1):
        name = _xml(build.name)
        suite = ElementTree.SubElement(root, "testsuite", name=name, time="0")
        counts = dict.fromkeys(totals, 0)
        for row, line in zip(comparison.rows, lines(comparison), strict=True):
            cell, shown, base = row.cells[index], line.cells[index], line.cells[0]
            if shown is None:
                continue
            counts["tests"] += 1
            title = _xml(f"{row.metric} ({row.kind})")
            case = ElementTree.SubElement(suite, "testcase", classname=f"edgekit.compare.{name}", name=title, time="0")
            before = base.plain if base else "none"
            told = _xml(
                f"{line.title}: {shown.plain}, baseline {before}; {shown.verdict}"
                + (f" ({cell.why})" if cell.why else "")
                + f"; {line.rule}"
            )
            if fails(cell, comparison.strict):
                counts["failures"] += 1
                ElementTree.SubElement(case, "failure", type="regression", message=told).text = told
            elif cell.outcome in ("not compared", "missing", "maybe worse"):
                counts["skipped"] += 1
                ElementTree.SubElement(case, "skipped", message=told)
            ElementTree.SubElement(case, "system-out").text = told
        suite.attrib.update({key: str(count) for key, count in counts.items()})
        totals = {key: count + counts[key] for key, count in totals.items()}
    root.attrib.update({key: str(count) for key, count in totals.items()})
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def write_junit(comparison: Comparison, path: Path) -> None:
    """Write the XML file, in UTF-8 with its declaration, and the directory where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'<?xml version="1.0" encoding="UTF-8"?>\n{junit(comparison)}', encoding="utf-8", newline="\n")


def _xml(value: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", fig.clean(value))


# --- Markdown


def markdown(comparison: Comparison) -> str:
    """The comparison as GitHub-flavoured Markdown."""
    builds = [text(fig.shorten(build.name, 40)) for build in comparison.builds]
    blocks = [
        "# Comparison of builds",
        f"**{verdict(comparison)}** than the baseline, {builds[0]}.",
        "\n".join(f"- {text(sentence)}" for sentence in sentences(comparison)),
        "## Builds",
        table(
            ("", "Build", "Model", "Recipe", "Target", "Its gates"),
            [
                (
                    str(index),
                    name,
                    *(text(fig.shorten(value, 60)) for value in (build.model, build.recipe, build.target)),
                    "kept" if build.passed else "**failed**",
                )
                for index, (name, build) in enumerate(zip(builds, comparison.builds, strict=True), 1)
            ],
            "rlllll",
        ),
        "## Figures",
        text(LEGEND),
        table(
            ("Figure", "Kind", "Better, tolerance", *builds),
            [
                (text(line.title), line.kind, text(line.rule), *(_markdown_cell(cell) for cell in line.cells))
                for line in lines(comparison)
            ],
            "lll" + "r" * len(builds),
        ),
    ]
    if told := notes(comparison):
        blocks.append("\n".join(f"- [{number}] {text(note)}" for number, note in enumerate(told, 1)))
    for front in comparison.fronts:
        blocks += [
            f"## {text(front_title(front))}",
            table(
                ("Build", text(_TITLES[front.x]), text(_TITLES[front.y]), "Dominated by"),
                [
                    (
                        builds[point.build],
                        *(text(value) for value in point_text(comparison, front, at)),
                        ", ".join(builds[other] for other in point.dominated_by) or "none",
                    )
                    for at, point in enumerate(front.points)
                ],
                "lrrl",
            ),
        ]
    return "\n\n".join(blocks) + "\n"


def _markdown_cell(cell: Shown | None) -> str:
    if cell is None:
        return ""
    shown = text(" ".join(filter(None, [cell.plain, cell.interval])))
    result = text(cell.result)
    return "<br>".join(filter(None, [shown, f"**{result}**" if cell.outcome in ("worse", "better") else result]))


# --- plots


def front_title(front: Front) -> str:
    """What is plotted against what."""
    return f"{_TITLES[front.x]} against {_TITLES[front.y]}"


def point_text(comparison: Comparison, front: Front, at: int) -> tuple[str, str]:
    """Both figures of a point in words."""
    x_row, y_row = _front_rows(comparison, front)
    point = front.points[at]
    x, y = (fig.shown(_measurement(row, f.value)).plain for row, f in ((x_row, point.x), (y_row, point.y)))
    return x, y


def _front_rows(comparison: Comparison, front: Front) -> tuple[Row, Row]:
    def find(name: str, kind: Kind) -> Row:
        return next(row for row in comparison.rows if (row.metric, row.kind) == (name, kind))

    return find(front.x, front.x_kind), find(front.y, front.y_kind)


@dataclass(frozen=True)
class Axis:
    """Where values of one figure lie between 0 and 1, and the ticks there."""

    unit: str
    scale: float
    low: float
    high: float
    logarithmic: bool

    def at(self, value: float) -> float:
        """Position of a value, from 0 to 1."""
        if self.logarithmic:
            value, low, high = (math.log10(max(one, self.low)) for one in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        return min(max((value - low) / (high - low), 0.0), 1.0)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Position and label of round values."""
        if not self.logarithmic:
            return [(self.at(tick * self.scale), f"{tick:.6g}") for tick in fig.ticks(self.high / self.scale, 4)]
        first, last = (math.log10(end / self.scale) for end in (self.low, self.high))
        powers = range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
        step = max(1, math.ceil(len(powers) / 5))
        return [(self.at(10.0**power * self.scale), f"{10.0**power:g}") for power in powers[::step]]


def axis(row: Row, values: Sequence[float]) -> Axis:
    """An axis for the values of one figure: from 0, or logarithmic where they span decades."""
    top = max(values)
    unit = fig.shown(_measurement(row, top)).unit
    scale = {"%": 0.01, **_SECONDS}.get(unit, 1.0)
    if unit in fig.BINARY_UNITS:
        scale = float(1024 ** fig.BINARY_UNITS.index(unit))
    if min(values) > 0 and top / min(values) > _DECADES:
        low, high = (
            10.0 ** f(math.log10(end / scale)) * scale for f, end in ((math.floor, min(values)), (math.ceil, top))
        )
        return Axis(unit, scale, low, high if high > low else 10 * low, True)
    return Axis(unit, scale, 0.0, 1.15 * top if top > 0 else 1.0, False)


def axis_label(comparison: Comparison, front: Front, which: Literal["x", "y"]) -> str:
    """`Bundle size in MiB, measured, lower is better`."""
    row = _front_rows(comparison, front)[which == "y"]
    points = [getattr(point, which).value for point in front.points]
    unit = axis(row, points).unit
    unit_words = f" in {unit}" if unit and unit != fig.TIMES else ""
    return f"{row.title}{unit_words}, {row.kind}, {row.better} is better"


def front_svg(comparison: Comparison, front: Front) -> str:
    """Builds as numbered dots, the dominated ones pale; a line along those that nothing dominates."""
    top, base = 14, 250
    x_row, y_row = _front_rows(comparison, front)
    x_axis = axis(x_row, [point.x.value for point in front.points])
    y_axis = axis(y_row, [point.y.value for point in front.points])

    def x(value: float) -> float:
        return 3 + 92 * x_axis.at(value)

    def y(value: float) -> float:
        return base - y_axis.at(value) * (base - top)

    body: list[str] = []
    for at, label in y_axis.ticks:
        height = base - at * (base - top)
        body.append(f'<line class="grid" x1="0" x2="100%" y1="{height:.1f}" y2="{height:.1f}"/>')
        body.append(f'<text x="-8" y="{height + 4:.1f}" text-anchor="end">{label}</text>')
    body.append(f'<line class="axis" x1="0" x2="100%" y1="{base}" y2="{base}"/>')
    for at, label in x_axis.ticks:
        body.append(f'<text x="{3 + 92 * at:.3f}%" y="{base + 17}" text-anchor="middle">{label}</text>')
    free = sorted((p for p in front.points if not p.dominated_by), key=lambda p: p.x.value)
    for left, right in itertools.pairwise(free):
        # a build reaches what is worse in x at its own y
        across, up = (left.y, right.x) if x_row.better == "lower" else (right.y, left.x)
        for x1, x2, y1, y2 in (
            (left.x.value, right.x.value, across.value, across.value),
            (up.value, up.value, left.y.value, right.y.value),
        ):
            place = f'x1="{x(x1):.3f}%" x2="{x(x2):.3f}%" y1="{y(y1):.1f}" y2="{y(y2):.1f}"'
            body.append(f'<line class="front" {place}/>')
    labels: dict[tuple[str, str], list[str]] = {}
    for at, point in enumerate(front.points):
        place = f"{x(point.x.value):.3f}%"
        name = fig.clean(comparison.builds[point.build].name)
        tip = escape(f"{point.build + 1} {name}: {' and '.join(point_text(comparison, front, at))}")
        low, high = point.y.ends
        if front.y_kind == "measured":
            body.append(f'<line class="whisker" x1="{place}" x2="{place}" y1="{y(low):.1f}" y2="{y(high):.1f}"/>')
        style = "control" if point.dominated_by else "dot"
        body.append(
            f'<circle class="{style}" cx="{place}" cy="{y(point.y.value):.1f}" r="6"><title>{tip}</title></circle>'
        )
        # below where it is dominated: what dominates it may lie close
        label_y = y(point.y.value) + (18 if point.dominated_by else -8)
        labels.setdefault((place, f"{label_y:.1f}"), []).append(str(point.build + 1))
    for (place, level), numbers in labels.items():
        body.append(f'<text class="who" x="{place}" dx="8" y="{level}">{", ".join(numbers)}</text>')
    return fig.svg("columns", base + 26, fig.clean(front_title(front)), body)


# --- HTML


@cache
def _template() -> Template:
    return load_template("edgekit.commands", "compare.html.j2")


def html(comparison: Comparison) -> str:
    """The comparison as one HTML file: no script, no request. Values are escaped by the template and in the plots."""
    page = _template().render(
        comparison=comparison,
        style=style_sheet(),
        verdict=verdict(comparison),
        sentences=sentences(comparison),
        lines=lines(comparison),
        notes=notes(comparison),
        legend=LEGEND,
        fronts=[
            {
                "title": front_title(front),
                "svg": Markup(front_svg(comparison, front)),  # noqa: S704 - escaped there
                "x": axis_label(comparison, front, "x"),
                "y": axis_label(comparison, front, "y"),
                "points": [(point, *point_text(comparison, front, at)) for at, point in enumerate(front.points)],
            }
            for front in comparison.fronts
        ],
    )
    return page.replace("≈ ", "≈\N{NO-BREAK SPACE}")
