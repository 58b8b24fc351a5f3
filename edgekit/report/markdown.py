"""The report as GitHub-flavoured Markdown. Values are escaped: nothing in a report becomes markup or a link."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from edgekit.report import Report
from edgekit.report.figures import bytes_text, clean, exact, number, peak_text, percent, seconds_text
from edgekit.report.summary import (
    Reading,
    device_line,
    divergence_mean,
    key_figures,
    memory_on_target,
    model_name,
    provenance,
    recipe_name,
    rows,
    sentence,
    strategy_label,
    target_title,
    verdict,
)

LONG_LIST = 12
_CODE = re.compile(r"(?:[\w.:/=+ -]|[<>]=?(?= ))+", re.ASCII)


def render(report: Report) -> str:
    """Render the whole report: the verdict first, provenance last."""
    result = verdict(report)
    blocks = [
        f"# {text(model_name(report))} for {text(target_title(report))}",
        f"**{result.word}: {result.detail}.** Recipe {code(recipe_name(report))}.",
        text(sentence(report)),
    ]
    if line := device_line(report):
        blocks.append(text(line))
    if report.notes:
        blocks += ["## Notes", "\n".join(f"- {text(note)}" for note in report.notes)]
    figures = key_figures(report)
    if figures:
        cells = [
            (f"**{figure.title}**", *_reading(reading), text(figure.context) if index == 0 else "")
            for figure in figures
            for index, reading in enumerate(figure.readings)
        ]
        blocks += ["## Key figures", table(("Figure", "Value", "Kind", "Basis", "Compare with"), cells, "lrlll")]
    blocks += [*_memory(report), *_tensors(report), *_divergence(report), *_budget(report), *_strategies(report)]
    if report.gates:
        gates = (
            (
                ("pass" if gate.passed else "**FAIL**") + ("" if gate.certain else ", uncertain"),
                text(gate.name),
                code(gate.bound),
                _mark(gate.kind) + exact(gate.name, gate.value),
                _kind(gate.kind),
                text(gate.of),
            )
            for gate in report.gates
        )
        blocks += [
            "## Gates",
            *_uncertain(report),
            table(("Result", "Gate", "Bound", "Value", "Kind", "Of"), gates, "lllrll"),
        ]
    if report.steps:
        steps = (
            (text(s.label), s.status, seconds_text(s.seconds), peak_text(s), code(s.key[:12])) for s in report.steps
        )
        blocks += ["## Steps", table(("Step", "Status", "Time when executed", "Peak memory", "Key"), steps, "llrrl")]
    if report.measurements:
        measurements = (
            (text(row.title), text(row.of), _stacked(row.measured), _stacked(row.predicted)) for row in rows(report)
        )
        blocks += ["## All measurements", table(("Figure", "Of", "Measured", "Predicted"), measurements, "llll")]
    blocks.append("## Provenance")
    for title, facts in provenance(report):
        blocks.append(table((title, ""), ((text(label), code(value)) for label, value in facts), "ll"))
    return "\n\n".join(blocks) + "\n"


def text(value: str) -> str:
    """Escape `value` for running text and table cells: no markup, HTML, link, mention or formula survives."""
    escaped = re.sub(r"[\\`*_\[\]#|~@$!]", r"\\\g<0>", clean(value))
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # GitHub turns bare addresses into links
    return re.sub(r"(?i)\bwww\.", r"www\\.", escaped.replace("://", r"\://"))


def code(value: str) -> str:
    """Set a plain identifier as code; anything unusual as escaped text."""
    return f"`{value}`" if _CODE.fullmatch(value) and value.strip() else text(value)


def table(headers: Sequence[str], cells: Iterable[Sequence[str]], align: str) -> str:
    """Make a pipe table; `align` has one letter (l or r) for each column. Cells are escaped already."""
    rule = ["---:" if side == "r" else "---" for side in align]
    return "\n".join("| " + " | ".join(row) + " |" for row in [headers, rule, *cells])


def _kind(kind: str) -> str:
    return "**measured**" if kind == "measured" else "*predicted*"


def _mark(kind: str) -> str:
    return "≈ " if kind == "predicted" else ""


def _uncertain(report: Report) -> list[str]:
    return [] if all(gate.certain for gate in report.gates) else ["Uncertain: the value's interval crosses the bound."]


def _reading(reading: Reading) -> tuple[str, str, str]:
    where = f"{'on' if reading.kind == 'measured' else 'for'} {reading.device}" if reading.device else ""
    of = f"of {reading.of}" if reading.of != "bundle" else ""
    basis = ", ".join(filter(None, [where, reading.basis, of]))
    return text(reading.shown.text), _kind(reading.kind), text(basis)


def _stacked(readings: Iterable[Reading]) -> str:
    return "<br>".join(
        text(r.shown.text + (f" ({about})" if (about := ", ".join(filter(None, [r.place, r.basis, r.note]))) else ""))
        for r in readings
    )


def _memory(report: Report) -> list[str]:
    memory = memory_on_target(report)
    if memory is None:
        return []
    usable = memory.usable_bytes
    parts = [(part.label, int(part.value)) for part in memory.segments] + [("required", memory.required_bytes)]
    if usable:
        parts += [("beyond usable", memory.over_bytes)] if memory.over_bytes else [("free", memory.free_bytes)]
        parts.append(("usable", usable))
    cells = (
        (text(label), f"≈ {bytes_text(value)}" if label != "usable" else bytes_text(value), _of_usable(value, usable))
        for label, value in parts
    )
    return ["## Memory on the target (predicted)", table(("Part", "Size", "Of usable"), cells, "lrr")]


def _of_usable(value: int, usable: int | None) -> str:
    return percent(value / usable) if usable else ""


def _tensors(report: Report) -> list[str]:
    blocks: list[str] = []
    if report.tensors:
        total = sum(group.bytes for group in report.tensors)
        groups = sorted(report.tensors, key=lambda group: -group.bytes)
        cells = (
            (code(g.type), f"{g.tensors:,}", bytes_text(g.bytes), percent(g.bytes / max(1, total))) for g in groups
        )
        blocks += ["## Tensor types", table(("Type", "Tensors", "Size", "Share"), cells, "lrrr")]
    if report.fallbacks:
        fallbacks = table(
            ("Tensor", "Wanted", "Found"),
            ((code(fallback.tensor), code(fallback.wanted), code(fallback.found)) for fallback in report.fallbacks),
            "lll",
        )
        count = len(report.fallbacks)
        words = f"{count} tensor{'s' if count > 1 else ''} could not take the wanted type"
        if count > LONG_LIST:
            blocks.append(f"<details><summary>{words}</summary>\n\n{fallbacks}\n\n</details>")
        else:
            blocks += [f"{words}:", fallbacks]
    return blocks


def _budget(report: Report) -> list[str]:
    budget = report.budget
    if budget is None:
        return []
    every = max(1, len(budget.curve) // 8)
    cells = ((bytes_text(size), f"≈ {number(nats)}") for size, nats in budget.curve[::every])
    chosen = (
        f"{number(budget.predicted_divergence_nats)} nats were predicted within {bytes_text(budget.budget_bytes)}, "
        "as the sum over tensors."
    )
    return ["## Types within a byte budget (predicted)", text(chosen), table(("File", "Nats"), cells, "rr")]


def _strategies(report: Report) -> list[str]:
    if not report.strategies:
        return []
    cells = (
        (
            text(strategy_label(row)) + (" **(chosen)**" if row.chosen else ""),
            code(row.task),
            f"{percent(row.accuracy)} [{percent(row.ci_low)}, {percent(row.ci_high)}]",
            number(row.tokens_forward),
            number(row.steps),
            number(row.verifier_calls),
            seconds_text(row.wall_s),
            f"≈ {seconds_text(row.answer_s)}",
        )
        for row in report.strategies
    )
    titles = ("Strategy", "Task", "Right", "Tokens", "Steps", "Verifier calls", "Time here", "Time on the target")
    return [
        "## Strategies: accuracy and cost (measured; the time on the target is predicted)",
        table(titles, cells, "llrrrrrr"),
    ]


def _divergence(report: Report) -> list[str]:
    windows = report.divergence_per_window
    if not windows:
        return []
    mean, low, high = divergence_mean(report)
    summary = (
        f"Mean {number(mean)} nats, 95% interval [{number(low)}, {number(high)}]; "
        f"{len(windows)} windows from {number(min(windows))} to {number(max(windows))} nats."
    )
    return ["## Divergence per evaluation window (measured)", text(summary)]
