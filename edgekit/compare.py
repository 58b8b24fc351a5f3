"""Builds side by side: what is better or worse than the first, how surely, and which builds others dominate.

Only like is compared with like: figures of one kind, of the same text, task and machine where those decide what the
figure says. A figure is worse when it lies beyond its tolerance and its difference is certain: by a paired interval
over the same windows where both reports hold them, else by intervals that do not overlap. Predictions share the error
of their formula, so their values are compared.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeFloat

from edgekit.config import Strict
from edgekit.errors import InputError, suggest
from edgekit.measure.divergence import student_t_975
from edgekit.measurement import Measurement
from edgekit.report import Report
from edgekit.report.figures import known
from edgekit.scenario import Scenario
from edgekit.tco import ENERGY, HEADLINE, PERCENTILES, Build, Case, assess, draw

Kind = Literal["measured", "predicted", "assumed"]
Outcome = Literal["better", "maybe better", "same", "maybe worse", "worse", "missing", "not compared"]
Condition = Literal["text", "task", "machine"]


class Tolerance(Strict):
    """How much worse a figure may be: the larger of a share of the baseline and an amount in the figure's unit."""

    share: NonNegativeFloat = 0.0
    amount: NonNegativeFloat = 0.0

    def of(self, baseline: float) -> float:
        """The amount allowed at a baseline."""
        return max(self.share * abs(baseline), self.amount)

    @property
    def text(self) -> str:
        """As in a table: `5%`, `0.01`, `5% or 0.0001`."""
        parts = [f"{100 * self.share:g}%"] if self.share or not self.amount else []
        return " or ".join([*parts, *([f"{self.amount:g}"] if self.amount else [])])


@dataclass(frozen=True)
class Metric:
    """A figure that builds are compared by."""

    name: str
    """On the command line."""
    figure: str
    """Of the report's measurements, or of the costs."""
    better: Literal["lower", "higher"]
    tolerance: Tolerance
    like: tuple[Condition, ...] = ()
    """What must be the same for two figures to be compared."""
    title: str = ""

    @property
    def sign(self) -> int:
        """Times a difference: positive where the figure got worse."""
        return 1 if self.better == "lower" else -1


def _metric(
    name: str, figure: str, better: Literal["lower", "higher"], share: float, *like: Condition, amount: float = 0.0
) -> Metric:
    return Metric(name, figure, better, Tolerance(share=share, amount=amount), like, known(figure).title)


COSTS = (
    Metric("cost", HEADLINE, "lower", Tolerance(share=0.05), (), "1M output tokens"),
    Metric(
        "cost-per-answer",
        "cost_per_1000_correct_answers",
        "lower",
        Tolerance(share=0.05),
        ("task",),
        "1,000 right answers",
    ),
)
METRICS = (
    _metric("size", "bundle_bytes", "lower", 0.01),
    _metric("kld", "kl_divergence_nats", "lower", 0.05, "text", amount=1e-4),
    _metric("perplexity", "perplexity_ratio", "lower", 0.01, "text"),
    _metric("top1", "top1_agreement", "higher", 0.01, "text"),
    _metric("accuracy", "task_accuracy", "higher", 0.02, "task"),
    _metric("answer", "answer_s", "lower", 0.1, "task", "machine"),
    _metric("decode", "decode_tokens_per_s", "higher", 0.05, "machine"),
    _metric("prefill", "prefill_tokens_per_s", "higher", 0.1, "machine"),
    _metric("ttft", "ttft_s", "lower", 0.1, "machine"),
    _metric("load", "load_s", "lower", 0.25, "machine"),
    _metric("memory", "peak_rss_bytes", "lower", 0.05, "machine"),
    _metric("required", "required_bytes", "lower", 0.01, "machine"),
    _metric("energy", ENERGY, "lower", 0.1, "machine"),
    *COSTS,
)
FRONTS = (("size", "kld"), ("answer", "accuracy"), ("decode", "kld"))
"""What is plotted against what, where at least two builds have both."""


class Figure(Strict):
    """A figure of one build; the interval as its measurement has it."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    device: str | None = None
    note: str | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """The interval, or the value twice."""
        return self.value if self.low is None else self.low, self.value if self.high is None else self.high


class Cell(Strict):
    """What one build says on one figure, and how that compares with the baseline."""

    figure: Figure | None
    outcome: Outcome | None = None
    """None for the baseline itself, and where neither has the figure."""
    why: str = ""
    """Why it is not compared, or not certain."""
    change: float | None = None
    """Relative to the baseline; None where that is 0."""
    difference: float | None = None
    """To the baseline, in the row's unit."""
    difference_low: float | None = None
    difference_high: float | None = None
    """Interval of the difference, where both were measured on the same samples."""


class Row(Strict):
    """One figure of all builds; the first cell is the baseline's."""

    metric: str
    figure: str
    title: str
    unit: str
    kind: Kind
    better: Literal["lower", "higher"]
    tolerance: Tolerance
    cells: tuple[Cell, ...]


class Point(Strict):
    """A build in a plot of two figures."""

    build: int
    x: Figure
    y: Figure
    dominated_by: tuple[int, ...]
    """Builds that are at least as good in both and better in one, by their values."""


class Front(Strict):
    """Two figures against each other."""

    x: str
    y: str
    x_kind: Kind
    y_kind: Kind
    points: tuple[Point, ...]


class Compared(Strict):
    """One build as the comparison names it."""

    name: str
    model: str
    recipe: str
    target: str
    engine: str
    created_at: str
    edgekit_version: str
    passed: bool
    """Whether the gates of its own recipe were kept."""


class Comparison(Strict):
    """Builds side by side; the first is the baseline. What `compare.json` holds."""

    schema_version: Literal[1] = 1
    edgekit_version: str
    scenario: str | None
    strict: bool
    builds: tuple[Compared, ...]
    rows: tuple[Row, ...]
    fronts: tuple[Front, ...]

    @property
    def regressions(self) -> list[tuple[Row, int]]:
        """Every figure that fails, with the index of its build."""
        return [(row, index) for row in self.rows for index, cell in enumerate(row.cells) if fails(cell, self.strict)]


def fails(cell: Cell, strict: bool) -> bool:
    """Whether a figure is a regression; when strict, also one that is worse but not certainly so, or gone."""
    return cell.outcome == "worse" or (strict and cell.outcome in ("maybe worse", "missing"))


def parse_tolerances(texts: Sequence[str]) -> dict[str, Tolerance]:
    """Parse `NAME=5%` (of the baseline) or `NAME=0.01` (in the figure's unit). Raises InputError."""
    names = [metric.name for metric in METRICS]
    found = {}
    for text in texts:
        match = re.fullmatch(r"([\w-]+)=(\d+(?:\.\d*)?(?:[eE]-?\d{1,2})?|\.\d+)(%?)", text, re.ASCII)
        if match is None:
            raise InputError("--tolerance NAME=5% or NAME=AMOUNT", repr(text), "e.g. --tolerance kld=5%")
        name, amount = match[1], float(match[2])
        if name not in names:
            known_names = ", ".join(names)
            raise InputError(f"--tolerance of {known_names}", f"{name!r}{suggest(name, names)}", "correct --tolerance")
        found[name] = Tolerance(share=amount / 100) if match[3] else Tolerance(amount=amount)
    return found


def compare_builds(
    names: Sequence[str],
    reports: Sequence[Report],
    version: str,
    *,
    tolerances: Mapping[str, Tolerance] | None = None,
    strict: bool = False,
    costs: tuple[Scenario, Sequence[Build]] | None = None,
) -> Comparison:
    """Compare builds with the first of them.

    Args:
        names: What the builds are called in the output.
        reports: Of the builds, the baseline's first.
        version: Of edgekit.
        tolerances: By the metric's name; the defaults of `METRICS` for all others.
        strict: Whether figures that are worse but not certainly so, or gone, are regressions, too.
        costs: A scenario with every build's inputs in it, for the rows of costs.
    """
    chosen = dict(tolerances or {})
    rows = [
        row
        for metric in METRICS
        if metric not in COSTS
        for kind in ("measured", "predicted")
        if (row := _row(metric, kind, reports, chosen.get(metric.name, metric.tolerance)))
    ]
    if costs is not None:
        rows += _cost_rows(*costs, chosen)
    return Comparison(
        edgekit_version=version,
        scenario=costs[0].name if costs else None,
        strict=strict,
        builds=tuple(_compared(name, report) for name, report in zip(names, reports, strict=True)),
        rows=tuple(rows),
        fronts=tuple(front for pair in FRONTS if (front := _front(*pair, rows))),
    )


def _compared(name: str, report: Report) -> Compared:
    engine = report.host.get("engine")
    return Compared(
        name=name,
        model=str(report.model.get("name") or report.model.get("source") or "unnamed model"),
        recipe=str(report.recipe.get("name") or "unnamed recipe"),
        target=str(report.target.get("title") or report.target.get("name") or "unnamed target"),
        engine=str(report.recipe.get("engine") or (engine.get("engine") if isinstance(engine, dict) else "") or ""),
        created_at=report.created_at,
        edgekit_version=report.edgekit_version,
        passed=report.passed,
    )


# --- figures of reports


def _row(metric: Metric, kind: Literal["measured", "predicted"], reports: Sequence[Report], t: Tolerance) -> Row | None:
    found = [
        [m for m in report.measurements if (m.name, m.of, m.kind) == (metric.figure, "bundle", kind)]
        for report in reports
    ]
    unit = next((m.unit for measurements in found for m in measurements), None)
    if unit is None:
        return None
    found = [[m for m in measurements if m.unit == unit] for measurements in found]
    base = next(iter(found[0]), None)
    cells = [Cell(figure=_figure(base) if base else None)]
    for report, measurements in zip(reports[1:], found[1:], strict=True):
        # of several machines the baseline's
        ours = sorted(measurements, key=lambda m: base is None or m.device != base.device)
        cells.append(_cell(metric, t, reports[0], base, report, next(iter(ours), None)))
    return Row(
        metric=metric.name, figure=metric.figure, title=metric.title, unit=unit, kind=kind,
        better=metric.better, tolerance=t, cells=tuple(cells),
    )  # fmt: skip


def _figure(m: Measurement) -> Figure:
    return Figure(value=m.value, low=m.ci_low, high=m.ci_high, n=m.n, device=m.device, note=m.note)


def _cell(
    metric: Metric, t: Tolerance, first: Report, base: Measurement | None, report: Report, ours: Measurement | None
) -> Cell:
    if base is None or ours is None:
        if ours is None and base is None:
            return Cell(figure=None)
        holder, present = (report, base) if ours is None else (first, ours)
        assert present is not None
        other = any((m.name, m.of) == (metric.figure, "bundle") for m in holder.measurements)
        if ours is None:
            return Cell(
                figure=None, outcome="not compared" if other else "missing", why=_OTHER_KIND if other else _GONE
            )
        return Cell(figure=_figure(ours), outcome="not compared", why=_OTHER_KIND if other else _NEW)
    if why := _unlike(metric, first, base, report, ours):
        return Cell(figure=_figure(ours), outcome="not compared", why=why)
    if base.kind == "predicted":
        versions = first.edgekit_version, report.edgekit_version
        doubt = f"predicted by edgekit {versions[0]} and {versions[1]}" if versions[0] != versions[1] else ""
        return _judge(metric, t, _figure(base), _figure(ours), spread=False, doubt=doubt)
    paired = None
    if metric.name == "kld" and (key := _reference_key(first)) and key == _reference_key(report):
        paired = paired_interval(first.divergence_per_window, report.divergence_per_window)
    return _judge(metric, t, _figure(base), _figure(ours), paired=paired, doubt=_doubt(base) or _doubt(ours))


_OTHER_KIND = "not of one kind and unit in both builds"
_GONE = "only the baseline has it"
_NEW = "the baseline does not have it"


def _unlike(metric: Metric, first: Report, base: Measurement, report: Report, ours: Measurement) -> str:
    """Why two figures say nothing about each other; empty where they do."""
    if metric.figure == ENERGY and (covers := [_covers(m) for m in (ours, base)]) and covers[0] != covers[1]:
        return f"covers {covers[0]}, the baseline's {covers[1]}"
    if "text" in metric.like and not _same_text(first, report):
        if first.model.get("digest") != report.model.get("digest"):
            return "measured against another source model"
        return "measured on another text or other windows"
    if "task" in metric.like and (why := _other_task(first, report)):
        return why
    if "machine" in metric.like and (base.device is None or base.device != ours.device):
        words, unnamed = "measured on" if base.kind == "measured" else "predicted for", "a machine that is not named"
        return f"{words} {ours.device or unnamed}; the baseline: {base.device or unnamed}"
    return ""


def _other_task(first: Report, report: Report) -> str:
    """Why accuracies of two builds are not of the same problems; empty where they are."""
    tasks = [next(((s.task, s.problems) for s in r.strategies if s.chosen), None) for r in (first, report)]
    if tasks[0] is None or tasks[1] is None:
        return "the report does not say on which task"
    if tasks[0] != tasks[1]:
        return f"on {tasks[1][1]} problems of {tasks[1][0]}, the baseline on {tasks[0][1]} of {tasks[0][0]}"
    return ""


def _reference_key(report: Report) -> str | None:
    """The cache key of the source's log-probabilities: source, text and windows are in it."""
    return next((step.key for step in report.steps if step.stage == "reference"), None)


def _same_text(first: Report, report: Report) -> bool:
    key = _reference_key(first)
    if key is not None and key == _reference_key(report):
        return True

    # the reference may have been made again by another version of a tool
    def source(r: Report) -> list[Any]:
        return [r.model.get("digest"), r.model.get("adapters") or None, r.recipe.get("evaluation")]

    return None not in (source(first)[0], source(first)[2]) and source(first) == source(report)


def _covers(m: Measurement) -> str:
    """What an energy covers, as its note says before the rest: `package + GPU`."""
    told = re.findall(r"(?:^|; )(\w+): ", (m.note or "").partition("; idle power")[0])
    return " + ".join(told) or "what it does not say"


def _doubt(m: Measurement) -> str:
    if "contended" in (m.note or ""):
        return "other programs kept the machine busy"
    return "a single sample" if m.n == 1 else ""


def paired_interval(baseline: Sequence[float], candidate: Sequence[float]) -> tuple[float, float] | None:
    """95% interval (Student's t) of the mean difference of the same windows; None where they cannot be paired."""
    if len(baseline) != len(candidate) or len(baseline) < 2:
        return None
    differences = [ours - theirs for theirs, ours in zip(baseline, candidate, strict=True)]
    if not all(map(math.isfinite, differences)):
        return None
    mean = statistics.fmean(differences)
    half = student_t_975(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean - half, mean + half


def _judge(
    metric: Metric,
    tolerance: Tolerance,
    base: Figure,
    ours: Figure,
    *,
    paired: tuple[float, float] | None = None,
    spread: bool = True,
    doubt: str = "",
) -> Cell:
    """Compare a figure with the baseline's: `paired` is the interval of the difference, else the intervals decide.

    Without `spread` the intervals are no statement about the difference, and the values decide.
    """
    difference = ours.value - base.value
    if not math.isfinite(difference):
        return Cell(figure=ours, outcome="not compared", why="the difference is beyond any scale")
    worse, allowed = metric.sign * difference, tolerance.of(base.value)
    why = ""
    outcome: Outcome = "same"
    if abs(worse) > allowed:
        if paired is not None:
            sure = paired[0] > 0 or paired[1] < 0
            why = "" if sure else "the interval of the difference holds 0"
        elif spread:
            sure = ours.ends[0] > base.ends[1] or ours.ends[1] < base.ends[0]
            why = "" if sure else "the intervals overlap"
        why = why or doubt
        outcome = ("maybe worse" if worse > 0 else "maybe better") if why else ("worse" if worse > 0 else "better")
    return Cell(
        figure=ours, outcome=outcome, why=why, difference=difference,
        change=_finite(difference / abs(base.value)) if base.value else None,
        difference_low=paired and paired[0], difference_high=paired and paired[1],
    )  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- costs


@dataclass(frozen=True)
class _Cost:
    """A cost of one build, and its draws."""

    figure: Figure
    kind: Kind
    draws: Any


def _cost_rows(scenario: Scenario, builds: Sequence[Build], tolerances: Mapping[str, Tolerance]) -> list[Row]:
    """A row for each cost and each kind of it: one that rests on a prediction meets only its like."""
    rows = []
    for metric in COSTS:
        tolerance = tolerances.get(metric.name, metric.tolerance)
        costs = [_cost(metric, build, scenario, index) for index, build in enumerate(builds)]
        unlike = [_other_task(builds[0].report, build.report) if "task" in metric.like else "" for build in builds]
        for kind in sorted({one.kind for one in costs if one}):
            row = Row(
                metric=metric.name,
                figure=metric.figure,
                title=metric.title,
                unit=scenario.currency,
                kind=kind,
                better=metric.better,
                tolerance=tolerance,
                cells=tuple(
                    _cost_cell(metric, tolerance, kind, costs[0], one, why)
                    for one, why in zip(costs, unlike, strict=True)
                ),
            )
            first = row.cells[0].figure
            rows.append(row.model_copy(update={"cells": (Cell(figure=first), *row.cells[1:])}))
    return rows


def _cost(metric: Metric, build: Build, scenario: Scenario, index: int) -> _Cost | None:
    """A cost over the draws of its inputs: builds meet the same draws, but for what was measured on each alone."""
    per_answer = metric.figure != HEADLINE
    scale, name = (1000.0, "cost_per_correct_answer") if per_answer else (1.0, HEADLINE)
    stated = assess(build, scenario, draws=1).figures.get(name)
    if stated is None or stated.value is None:
        return None
    own = {key: one for key, one in build.inputs.items() if key.startswith("build.") and one.kind == "measured"}
    case = Case(scenario, draw(build.inputs) | draw(own, seed=index))
    draws = scale * (
        case.cost_per_correct_answer(case.utilisation) if per_answer else case.cost_per_1m(case.utilisation)
    )
    low, high = np.percentile(draws, PERCENTILES)
    return _Cost(Figure(value=scale * stated.value, low=float(low), high=float(high)), stated.kind, draws)


def _cost_cell(
    metric: Metric, tolerance: Tolerance, kind: Kind, base: _Cost | None, ours: _Cost | None, unlike: str
) -> Cell:
    if ours is None:
        return Cell(figure=None, outcome="missing", why=_GONE) if base and base.kind == kind else Cell(figure=None)
    if base is None:
        return Cell(figure=ours.figure, outcome="not compared", why=_NEW)
    if base.kind != ours.kind:
        why = f"{ours.kind}, the baseline's {base.kind}"
        return Cell(figure=ours.figure if ours.kind == kind else None, outcome="not compared", why=why)
    if ours.kind != kind:
        return Cell(figure=None)
    if unlike:
        return Cell(figure=ours.figure, outcome="not compared", why=unlike)
    low, high = np.percentile(ours.draws - base.draws, PERCENTILES)
    return _judge(metric, tolerance, base.figure, ours.figure, paired=(float(low), float(high)))


# --- dominance


def _front(x: str, y: str, rows: Sequence[Row]) -> Front | None:
    """Builds by two figures, those that compare with the baseline in both; measured before predicted."""
    metrics = {metric.name: metric for metric in METRICS}
    for x_row in (row for row in rows if row.metric == x):
        for y_row in (row for row in rows if row.metric == y):
            built = [
                (index, a.figure, b.figure)
                for index, (a, b) in enumerate(zip(x_row.cells, y_row.cells, strict=True))
                if a.figure and b.figure and not {"not compared", "missing"} & {a.outcome, b.outcome}
            ]
            if len(built) < 2:
                continue
            # both the lower the better
            places = [(metrics[x].sign * a.value, metrics[y].sign * b.value) for _, a, b in built]
            points = tuple(
                Point(
                    build=index,
                    x=a,
                    y=b,
                    dominated_by=tuple(
                        built[other][0]
                        for other, place in enumerate(places)
                        if place != places[at] and place[0] <= places[at][0] and place[1] <= places[at][1]
                    ),
                )
                for at, (index, a, b) in enumerate(built)
            )
            return Front(x=x, y=y, x_kind=x_row.kind, y_kind=y_row.kind, points=points)
    return None
