"""The report as one HTML file: no script, no request, readable on a phone, on paper and in the dark."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from edgekit.report import ByteBudget, Report, summary
from edgekit.report import figures as fig

LONG_LIST = 12


def load_template(package: str, name: str, **filters: Callable[..., object]) -> Template:
    """A page's template, whose values are escaped; `clean` is a filter of every page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(clean=fig.clean, **filters)
    return environment.from_string(files(package).joinpath(name).read_text("utf-8"))


@cache
def _template() -> Template:
    template = load_template(
        "edgekit.report",
        "report.html.j2",
        bytes_text=fig.bytes_text,
        exact=lambda gate: fig.exact(gate.name, gate.value),
        number=fig.number,
        percent=fig.percent,
        seconds_text=fig.seconds_text,
        peak_text=fig.peak_text,
    )
    template.globals["share_bar"] = lambda value, extent, style="bar": Markup(fig.share_bar(value, extent, style))  # noqa: S704
    return template


@cache
def style_sheet() -> Markup:
    """The style sheet of every page that this package writes."""
    return Markup(files("edgekit.report").joinpath("style.css").read_text("utf-8"))  # noqa: S704 - a file of ours


def render(report: Report) -> str:
    """Render the whole report. Every value from the report is escaped: by the template, in SVG by `figures`."""
    memory = summary.memory_on_target(report)
    page = _template().render(
        report=report,
        style=style_sheet(),
        verdict=summary.verdict(report),
        model=summary.model_name(report),
        target=summary.target_title(report),
        recipe=summary.recipe_name(report),
        sentence=summary.sentence(report),
        device_line=summary.device_line(report),
        key_figures=summary.key_figures(report),
        memory=memory,
        memory_svg=_memory_svg(memory) if memory else "",
        tensors=sorted(report.tensors, key=lambda group: -group.bytes),
        divergence=summary.divergence_mean(report) if report.divergence_per_window else None,
        divergence_svg=_divergence_svg(report) if report.divergence_per_window else "",
        budget_svg=_budget_svg(report.budget) if report.budget else "",
        strategies_svg=_strategies_svg(report) if report.strategies else "",
        strategy_label=summary.strategy_label,
        rows=summary.rows(report),
        provenance=summary.provenance(report),
        long_list=LONG_LIST,
    )
    return page.replace("≈ ", "≈\N{NO-BREAK SPACE}")


def _memory_svg(memory: summary.Memory) -> Markup:
    parts = ", ".join(f"{part.label} {fig.bytes_text(part.value)}" for part in memory.segments)
    usable = f" of {fig.bytes_text(memory.usable_bytes)} usable" if memory.usable_bytes else ""
    title = f"Predicted memory: {fig.bytes_text(memory.required_bytes)} required{usable}: {parts}"
    segments = list(memory.segments)
    if memory.free_bytes:
        segments.append(fig.Segment("free", memory.free_bytes, "free"))
    return Markup(fig.bar_stack(segments, memory.usable_bytes, title))  # noqa: S704 - figures escapes


def _budget_svg(budget: ByteBudget) -> Markup:
    chosen = (budget.budget_bytes, budget.predicted_divergence_nats)
    title = (
        f"Predicted KL divergence by bytes of the file: {fig.number(chosen[1])} nats within "
        f"{fig.bytes_text(chosen[0])}, from {fig.number(budget.curve[0][1])} in the smallest types"
    )
    return Markup(fig.falling_curve(budget.curve, chosen, title))  # noqa: S704 - figures escapes


def _strategies_svg(report: Report) -> Markup:
    title = f"Accuracy of each strategy on {report.strategies[0].task} by tokens forward per question"
    return Markup(fig.scatter(summary.strategy_dots(report), fig.clean(title)))  # noqa: S704 - figures escapes


def _divergence_svg(report: Report) -> Markup:
    mean, low, high = summary.divergence_mean(report)
    windows = report.divergence_per_window
    title = (
        f"KL divergence at {len(windows)} evaluation windows, in nats: mean {fig.number(mean)}, "
        f"95% interval {fig.number(low)} to {fig.number(high)}, largest {fig.number(max(windows))}"
    )
    return Markup(fig.columns_with_band(windows, mean, low, high, title))  # noqa: S704 - figures escapes
