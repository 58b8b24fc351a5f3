"""Costs for people: the table that a terminal, Markdown and HTML share, the CSV file, and the plots of the page."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import TypeVar

from jinja2 import Template
from markupsafe import Markup

from edgekit.report import figures as fig
from edgekit.report.html import load_template, style_sheet
from edgekit.report.markdown import code, table, text
from edgekit.scenario import Kind
from edgekit.tco import HEADLINE, PARTS, BuildCosts, Costs, Estimate, InputRow

T = TypeVar("T", bound=Hashable)

BUILD_LINES, OFFER_LINES = 6, 8
"""Line styles of the page's style sheet."""
LONGEST_TORNADO = 8


@dataclass(frozen=True)
class Cell:
    """A figure of one build, ready to print."""

    value: str
    interval: str
    kind: Kind

    @property
    def text(self) -> str:
        """Value and interval in one line."""
        return f"{self.value} {self.interval}".rstrip()


@dataclass(frozen=True)
class Row:
    """One figure of every build, side by side; a row without cells is a heading."""

    title: str
    cells: tuple[Cell | None, ...] = ()


_TITLES = {
    HEADLINE: "1M output tokens, {currency}",
    "fixed_per_1m_output_tokens": "... fixed",
    "marginal_per_1m_output_tokens": "... marginal",
    "cost_per_correct_answer": "1,000 right answers, {currency}",
    "utilisation": "Busy, % of the time",
    "devices": "Devices at work",
    "capex": "Purchase, {currency}",
    "running_cost_per_year": "Running, {currency} a year",
    "present_cost": "Present cost, {currency}",
    "kwh_per_year": "Energy, kWh a year",
    "kgco2e_per_year": "Emissions, kgCO2e a year",
    "kwh_per_1m_output_tokens": "Energy, kWh for 1M",
    "kgco2e_per_1m_output_tokens": "Emissions, kgCO2e for 1M",
}
_SCALES = {"cost_per_correct_answer": 1000.0, "utilisation": 100.0}


def rows(costs: Costs) -> list[Row]:
    """The table of all builds: at the scenario's load, at each share of busy time, and against each offer."""
    currency = costs.scenario["currency"]
    found = [Row("At the scenario's load")]
    for name, title in _TITLES.items():
        if any(name in build.figures for build in costs.builds):
            cells = tuple(
                _count(build.figures[name])
                if name == "devices"
                else _cell(build.figures.get(name), _SCALES.get(name, 1.0))
                for build in costs.builds
            )
            found.append(Row(title.format(currency=currency), cells))
    found.append(Row(f"1M by busy time (marginal), {currency}"))
    for at in zip(*(build.utilisation for build in costs.builds), strict=True):
        cells = tuple(
            Cell(f"{mark(one.kind)}{fig.number(one.total)} ({fig.number(one.marginal)})", "", one.kind) for one in at
        )
        found.append(Row(f"{at[0].share * 100:g}% busy", cells))
    found += _right_answers(costs)
    offers = list(zip(*(build.alternatives for build in costs.builds), strict=True))
    found += [Row(f"1M bought elsewhere, {currency}")] if offers else []
    found += [Row(o[0].name, tuple(_cell(one.cost_per_1m_output_tokens) for one in o)) for o in offers]
    found += [Row("Break-even, months")] if offers else []
    found += [Row(o[0].name, tuple(_months(one.break_even_months) for one in o)) for o in offers]
    found += [Row(f"Net present value, {currency}")] if offers else []
    found += [Row(o[0].name, tuple(_cell(one.npv) for one in o)) for o in offers]
    return found


def _right_answers(costs: Costs) -> list[Row]:
    """Their cost at each share of busy time, where a build's accuracy is known."""
    found = [Row(f"1,000 right answers by busy time, {costs.scenario['currency']}")]
    for at in zip(*(build.utilisation for build in costs.builds), strict=True):
        told = [(one.cost_per_correct_answer, one.kind) for one in at]
        if all(cost is None for cost, _ in told):
            return []
        cells = (
            None if cost is None else Cell(f"{mark(kind)}{fig.number(1000 * cost)}", "", kind) for cost, kind in told
        )
        found.append(Row(f"{at[0].share * 100:g}% busy", tuple(cells)))
    return found


def mark(kind: Kind) -> str:
    """What stands before a figure that rests on a prediction."""
    return "≈ " if kind == "predicted" else ""


def stated(value: float) -> str:
    """An input as somebody wrote it: 0.22, 12,000; in four digits where it was computed."""
    return f"{value:,g}" if abs(value) < 1e6 and float(f"{value:g}") == value else fig.number(value, 4)


def _cell(estimate: Estimate | None, scale: float = 1.0) -> Cell | None:
    if estimate is None or estimate.value is None:
        return None
    low, high = estimate.low, estimate.high
    interval = ""
    if low is not None and high is not None and low < high:
        interval = f"[{fig.number(low * scale)}, {fig.number(high * scale)}]"
    return Cell(mark(estimate.kind) + fig.number(estimate.value * scale), interval, estimate.kind)


def _count(estimate: Estimate) -> Cell:
    """Whole things."""
    value, low, high = (f"{one or 0:,.0f}" for one in (estimate.value, estimate.low, estimate.high))
    return Cell(mark(estimate.kind) + value, "" if low == high else f"[{low}, {high}]", estimate.kind)


def _months(estimate: Estimate) -> Cell:
    value, low, high = (
        "never" if one is None else fig.number(one) for one in (estimate.value, estimate.low, estimate.high)
    )
    return Cell(mark(estimate.kind) + value, "" if low == high else f"[{low}, {high}]", estimate.kind)


def inputs(costs: Costs) -> list[tuple[str, InputRow]]:
    """Every input once, by name: the builds that share it (empty: all of them), and what it is."""
    return sorted(_once(costs, [build.inputs for build in costs.builds]), key=lambda item: item[1].name)


def notes(costs: Costs) -> list[str]:
    """Every note once, after the names of the builds it is about, unless that is all."""
    told = _once(costs, [build.notes for build in costs.builds])
    return [f"{owners}: {note}" if owners else note for owners, note in told]


def _once(costs: Costs, lists: Sequence[Sequence[T]]) -> list[tuple[str, T]]:
    found: dict[T, list[str]] = {}
    for build, items in zip(costs.builds, lists, strict=True):
        for item in items:
            found.setdefault(item, []).append(build.name)
    return [("" if len(names) == len(lists) else ", ".join(names), item) for item, names in found.items()]


def write(costs: Costs, out: Path) -> list[Path]:
    """Write `tco.json`, `tco.md`, `tco.csv` and `tco.html`; everything is rendered before the first byte is written."""
    texts = {"tco.json": to_json(costs), "tco.md": markdown(costs), "tco.csv": to_csv(costs), "tco.html": html(costs)}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        (out / name).write_text(content, encoding="utf-8", newline="\n")
    return [out / name for name in texts]


def to_json(costs: Costs) -> str:
    """The whole result as JSON."""
    return json.dumps(costs.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False) + "\n"


def to_csv(costs: Costs) -> str:
    """One line for each figure and each input of each build; names say the unit, costs are in the currency."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("build", "currency", "figure", "value", "low", "high", "kind", "source"))
    for build in costs.builds:
        start = _plain(build.name), costs.scenario["currency"]
        for name, one in _figures(build):
            values = ["" if value is None else repr(value) for value in (one.value, one.low, one.high)]
            writer.writerow((*start, _plain(name), *values, one.kind, "computed"))
        for row in build.inputs:
            values = [repr(value) for value in (row.value, row.low, row.high)]
            writer.writerow((*start, _plain(f"input {row.name}"), *values, row.kind, _plain(row.source)))
    return buffer.getvalue()


def _figures(build: BuildCosts) -> Iterator[tuple[str, Estimate]]:
    yield from build.figures.items()
    for at in build.utilisation:
        values = {f"{part}_per_1m_output_tokens": getattr(at, part) for part in ("fixed", "marginal", "total")}
        values |= {name: getattr(at, name) for name in ("kwh_per_1m", "kgco2e_per_1m", "cost_per_correct_answer")}
        for name, value in values.items():
            if value is not None:
                yield f"{name} at {at.share:g}", Estimate(value=value, low=None, high=None, kind=at.kind)
    for offer in build.alternatives:
        for part in ("cost_per_year", HEADLINE, "break_even_months", "npv"):
            yield f"{part} {offer.name}", getattr(offer, part)


def _plain(value: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    cleaned = fig.clean(value)
    return f"'{cleaned}" if cleaned.startswith(("=", "+", "-", "@")) else cleaned


# --- Markdown


def markdown(costs: Costs) -> str:
    """The result as GitHub-flavoured Markdown."""
    names = [text(fig.shorten(build.name, 40)) for build in costs.builds]
    compared: list[Sequence[str]] = []
    for row in rows(costs):
        title = text(row.title)
        if not row.cells:
            compared.append((f"**{title}**", *("" for _ in names)))
        else:
            compared.append((title, *(text(cell.text) if cell else "not known" for cell in row.cells)))
    blocks = [
        f"# Cost of ownership: {text(costs.scenario['name'])}",
        text(costs.scenario["description"]),
        "\n".join(f"- {text(sentence)}" for sentence in sentences(costs)),
        *(["## Notes", "\n".join(f"- {text(note)}" for note in notes(costs))] if notes(costs) else []),
        "## Builds",
        table(
            ("Build", "Model", "Recipe", "Target"),
            [
                (name, text(fig.shorten(b.model, 70)), text(b.recipe), text(b.target))
                for name, b in zip(names, costs.builds, strict=True)
            ],
            "llll",
        ),
        "## Costs",
        text(f"In brackets: {costs.interval}. {LEGEND}"),
        table(("", *names), compared, "l" + "r" * len(names)),
    ]
    for name, build in zip(names, costs.builds, strict=True):
        swings = [
            (
                code(s.name),
                *(stated(v) for v in (s.low_input, s.high_input)),
                *(fig.number(v) for v in (s.at_low, s.at_high)),
                s.kind,
            )
            for s in build.tornado[:LONGEST_TORNADO]
        ]
        if swings:
            titles = ("Input", "Low", "High", "Cost at low", "Cost at high", "Kind")
            blocks += [f"## What 1M output tokens depend on: {name}", table(titles, swings, "lrrrrl")]
    listed = [
        (
            code(row.name),
            text(owners) or "all",
            mark(row.kind) + stated(row.value),
            _range(row),
            row.kind,
            text(row.source),
        )
        for owners, row in inputs(costs)
    ]
    blocks += ["## Inputs", table(("Input", "Builds", "Value", "Range", "Kind", "Source"), listed, "llrrll")]
    return "\n\n".join(blocks) + "\n"


LEGEND = (
    "A figure marked ≈ rests on at least one predicted input. 1M output tokens include the prompt tokens that come "
    "with them. What is offered elsewhere are other models: prices are compared, answers are not. Costs of making and "
    "scrapping the devices to the climate are not counted."
)


def _range(row: InputRow) -> str:
    return f"{stated(row.low)} to {stated(row.high)}" if row.low < row.high else ""


def sentences(costs: Costs) -> list[str]:
    """One for each build: what a token costs, and when owning has paid off against each offer."""
    return [_sentence(costs, build) for build in costs.builds]


def _sentence(costs: Costs, build: BuildCosts) -> str:
    cost, busy = _cell(build.figures[HEADLINE]), _cell(build.figures["utilisation"], 100.0)
    assert cost is not None
    assert busy is not None
    years = costs.scenario["years"]["value"]
    paid, unpaid = [], []
    for offer in build.alternatives:
        months = offer.break_even_months
        if months.value is not None and months.value <= 12 * years:
            paid.append(f"{offer.name} after {mark(months.kind)}{fig.number(months.value)} months")
        else:
            unpaid.append(offer.name)
    told = f"{build.name}: {cost.value} {costs.scenario['currency']} for 1M output tokens, {busy.value}% busy."
    told += f" Pays off against {', '.join(paid)}." if paid else ""
    return told + (f" Does not pay off within {years:g} years against {', '.join(unpaid)}." if unpaid else "")


# --- HTML


@cache
def _template() -> Template:
    return load_template("edgekit.commands", "tco.html.j2", stated=stated)


def html(costs: Costs) -> str:
    """The result as one HTML file: no script, no request. Values are escaped by the template and in the plots."""
    page = _template().render(
        costs=costs,
        style=style_sheet(),
        rows=rows(costs),
        sentences=sentences(costs),
        inputs=inputs(costs),
        notes=notes(costs),
        range_text=_range,
        mark=mark,
        legend=LEGEND,
        parts=PARTS,
        headline=HEADLINE,
        cell=_cell,
        months=_months,
        bars=Markup(bars(costs)),  # noqa: S704 - escaped there, as in the other plots
        curves=Markup(curves(costs)),  # noqa: S704
        tornados=[Markup(tornado(build, costs.scenario["currency"])) for build in costs.builds],  # noqa: S704
        build_line=lambda index: f"own o{index % BUILD_LINES}",
        offer_line=lambda index: f"offer f{index % OFFER_LINES}",
    )
    return page.replace("≈ ", "≈\N{NO-BREAK SPACE}")


def bars(costs: Costs) -> str:
    """What 1M output tokens cost at each share of busy time, a bar of parts for each build."""
    extent = max(at.total for build in costs.builds for at in build.utilisation) or 1.0
    body: list[str] = []
    y = 0
    for group in zip(*(build.utilisation for build in costs.builds), strict=True):
        for build, at in zip(costs.builds, group, strict=True):
            name = f"{fig.shorten(build.name, 30)}: " if len(costs.builds) > 1 else ""
            label = f"{at.share * 100:g}% busy, {name}{mark(at.kind)}{fig.number(at.total)}"
            body.append(f'<text x="0" y="{y + 13}">{escape(label)}</text>')
            start = 0.0
            for index, part in enumerate(PARTS):
                width = 100 * at.parts[part] / extent
                tip = escape(f"{part}: {fig.number(at.parts[part])}")
                body.append(
                    f'<rect class="m{index + 1}" x="{start:.3f}%" y="{y + 18}" width="{width:.3f}%" height="16">'
                    f"<title>{tip}</title></rect>"
                )
                start += width
            y += 40
        y += 8
    return fig.svg("stack", y, "Cost of 1M output tokens by share of busy time", body)


def curves(costs: Costs) -> str:
    """What has been paid after each month: owning each build, and each offer. An offer may leave at the top."""
    top, base = 12, 250
    own = [build.cumulative for build in costs.builds]
    offers = [offer.cumulative for offer in costs.builds[0].alternatives]
    months = max(len(line) for line in own) - 1
    limit = 1.15 * max(line[-1] for line in own) or 1.0

    def y(value: float) -> float:
        return base - min(value, limit) / limit * (base - top)

    def line(values: Sequence[float], style: str, label: str) -> str:
        rise = (values[-1] - values[0]) / (len(values) - 1)
        last = len(values) - 1.0
        if values[-1] > limit:
            last = (limit - values[0]) / rise
        end = values[0] + rise * last
        at = f'x1="0" x2="{100 * last / months:.3f}%" y1="{y(values[0]):.1f}" y2="{y(end):.1f}"'
        return f'<line class="{style}" {at}><title>{escape(label)}</title></line>'

    body: list[str] = []
    for tick in fig.ticks(limit, 4):
        body.append(f'<line class="grid" x1="0" x2="100%" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        body.append(f'<text x="-8" y="{y(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    body.append(f'<line class="axis" x1="0" x2="100%" y1="{base}" y2="{base}"/>')
    for tick in fig.ticks(months, 6):
        anchor = "start" if tick == 0 else "end" if tick > 0.94 * months else "middle"
        label = f"{tick:g}" if tick else "month 0"
        body.append(f'<text x="{100 * tick / months:.3f}%" y="{base + 17}" text-anchor="{anchor}">{label}</text>')
    for index, values in enumerate(offers):
        offer = costs.builds[0].alternatives[index]
        body.append(line(values, f"offer f{index % OFFER_LINES}", f"{offer.name}: {fig.number(values[-1])}"))
    for index, values in enumerate(own):
        name = f"{fig.clean(costs.builds[index].name)}: {fig.number(values[-1])}"
        body.append(line(values, f"own o{index % BUILD_LINES}", name))
    for index, build in enumerate(costs.builds):
        for offer in build.alternatives:
            at = offer.break_even_months.value
            if at is not None and at <= months:
                paid = build.cumulative[0] + (build.cumulative[1] - build.cumulative[0]) * at
                tip = escape(f"{fig.clean(build.name)} against {offer.name}: {fig.number(at)} months")
                place = f'cx="{100 * at / months:.3f}%" cy="{y(paid):.1f}"'
                body.append(f'<circle class="even o{index % BUILD_LINES}" {place} r="4"><title>{tip}</title></circle>')
    return fig.svg("columns", base + 26, "Paid after each month: owning against each offer", body)


def _short(value: float) -> str:
    """A tick in at most six characters: 500, 20k, 1.5M."""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g}{letter}"
    return f"{value:g}"


def tornado(build: BuildCosts, currency: str) -> str:
    """How far each uncertain input alone moves the cost of 1M output tokens, widest first."""
    swings = build.tornado[:LONGEST_TORNADO]
    base = build.figures[HEADLINE].value or 0.0
    ends = [base, *itertools.chain.from_iterable((swing.at_low, swing.at_high) for swing in swings)]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return 100 * (value - low) / span

    body: list[str] = []
    for index, swing in enumerate(swings):
        y = index * 42
        label = f"{swing.name}: {mark(swing.kind)}{stated(swing.low_input)} to {stated(swing.high_input)}"
        body.append(f'<text x="0" y="{y + 13}">{escape(label)}</text>')
        for value, style in ((swing.at_low, "m3"), (swing.at_high, "m1")):
            start, end = sorted((x(value), x(base)))
            tip = escape(f"{fig.number(value)} {currency} for 1M output tokens")
            body.append(
                f'<rect class="{style}" x="{start:.3f}%" y="{y + 18}" width="{end - start:.3f}%" height="16">'
                f"<title>{tip}</title></rect>"
            )
        body.append(f'<line class="mean" x1="{x(base):.3f}%" x2="{x(base):.3f}%" y1="{y + 16}" y2="{y + 36}"/>')
    height = 42 * len(swings)
    for value, anchor in ((low, "start"), (high, "end")):
        body.append(f'<text x="{x(value):.3f}%" y="{height + 14}" text-anchor="{anchor}">{fig.number(value)}</text>')
    if 18 < x(base) < 82:
        body.append(f'<text x="{x(base):.3f}%" y="{height + 14}" text-anchor="middle">{fig.number(base)}</text>')
    title = f"Cost of 1M output tokens of {fig.clean(build.name)} with each input at its low and its high end"
    return fig.svg("tornado", height + 20, title, body)
