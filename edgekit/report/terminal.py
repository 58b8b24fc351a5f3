"""The report in a terminal: the verdict, the key figures, memory and gates within 80 columns."""

from __future__ import annotations

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from edgekit.report import Report
from edgekit.report.figures import bytes_text, clean, exact
from edgekit.report.summary import (
    Memory,
    Reading,
    device_line,
    key_figures,
    memory_on_target,
    model_name,
    recipe_name,
    target_title,
    verdict,
)

WIDTH = 80
STYLES = {"Passed": "bold green", "Failed": "bold red", "Built": "bold"}
FILLS = "█▓▒░"


def show(report: Report, console: Console) -> None:
    """Print a summary; no line is wider than 80 cells. Values are printed as text, never as markup."""
    result = verdict(report)
    _line(console, (f"{result.word}: {result.detail}", STYLES[result.word]))
    _line(console, (model_name(report), "bold"))
    _line(console, (f"for {target_title(report)}, recipe {recipe_name(report)}", ""))
    if report.device and report.device.fingerprint != report.host.get("fingerprint"):
        for part in _wrap(device_line(report), WIDTH):
            _line(console, (part, ""))
    figures = key_figures(report)
    if figures:
        console.print()
    widest = max((cell_len(reading.shown.text) for figure in figures for reading in figure.readings), default=0)
    for figure in figures:
        for index, reading in enumerate(figure.readings):
            _figure(console, figure.title if index == 0 else "", reading, min(widest, 31))
        for part in _wrap(figure.context, WIDTH - 17) if figure.context else ():
            _line(console, (f"{'':17}{part}", "dim"))
    memory = memory_on_target(report)
    if memory:
        console.print()
        _memory(console, memory)
    if report.gates:
        console.print()
        _line(console, ("Gates", "bold"))
    values = [f"{'≈ ' if gate.kind == 'predicted' else ''}{exact(gate.name, gate.value)}" for gate in report.gates]
    width = min(max(map(cell_len, values), default=0), 24)
    for gate, value in zip(report.gates, values, strict=True):
        style = "green" if gate.passed else "bold red"
        _line(
            console,
            (f"  {'pass' if gate.passed else 'FAIL'}  ", style),
            (_fit(clean(gate.bound if gate.of == "bundle" else f"{gate.of}: {gate.bound}"), WIDTH - 22 - width), ""),
            (f"  {_fit(value, width)} ", "bold" if gate.kind == "measured" else "italic"),
            (gate.kind, "cyan" if gate.kind == "measured" else "magenta italic"),
        )
        if not gate.certain:
            _line(console, ("        uncertain: its interval crosses the bound", "yellow"))
    if report.notes:
        console.print()
    for note in report.notes:
        for index, part in enumerate(_wrap(clean(note), WIDTH - 6)):
            _line(console, ("note: " if index == 0 else "      ", "yellow"), (part, ""))


def _figure(console: Console, title: str, reading: Reading, width: int) -> None:
    measured = reading.kind == "measured"
    basis = ", ".join(
        filter(None, [reading.place.removeprefix("the "), f"n = {reading.n:,}" if reading.n is not None else ""])
    )
    _line(
        console,
        (_fit(title, 17), ""),
        (_fit(reading.shown.text, width), "bold" if measured else "italic"),
        (f" {reading.kind:9} ", "cyan" if measured else "magenta italic"),
        (_fit(basis, WIDTH - 28 - width), "dim"),
    )


def _memory(console: Console, memory: Memory) -> None:
    usable = memory.usable_bytes
    against = f" of {bytes_text(usable)} usable" if usable else ""
    _line(
        console,
        ("Memory on the target ", "bold"),
        (f"≈ {bytes_text(memory.required_bytes)}{against}", "italic"),
        (" predicted", "magenta italic"),
    )
    width = WIDTH - 4
    extent = max(memory.required_bytes, usable or 0, 1)
    bar, edge = "", 0.0
    for index, segment in enumerate(memory.segments):
        edge += segment.value
        # rounding the edges, not the widths, keeps the sum exact
        bar += FILLS[index % len(FILLS)] * (round(edge / extent * width) - len(bar))
    _line(console, (f"  [{bar:·<{width}}]", "red" if memory.over_bytes else ""))
    legend = [
        f"{FILLS[index % len(FILLS)]} {segment.label} {bytes_text(segment.value)}"
        for index, segment in enumerate(memory.segments)
    ]
    if memory.over_bytes:
        legend.append(f"{bytes_text(memory.over_bytes)} too much")
    elif usable:
        legend.append(f"· free {bytes_text(memory.free_bytes)}")
    row = ""
    for item in legend:
        if row and cell_len(row) + 3 + cell_len(item) > WIDTH - 2:
            _line(console, (f"  {row}", ""))
            row = ""
        row += ("   " if row else "") + item
    _line(console, (f"  {row}", ""))


def _fit(text: str, width: int) -> str:
    """Pad or cut to exactly `width` cells (a wide character takes two)."""
    if cell_len(text) > width:
        text = chop_cells(text, width - 1)[0] + "…"
    return text + " " * (width - cell_len(text))


def _wrap(text: str, width: int) -> list[str]:
    """Break at spaces, and inside a word only where it is longer than a line."""
    lines = [""]
    for word in text.split(" "):
        for piece in chop_cells(word, width) or [""]:
            joined = f"{lines[-1]} {piece}" if lines[-1] else piece
            if cell_len(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(piece)
    return lines


def _line(console: Console, *parts: tuple[str, str]) -> None:
    line = Text(no_wrap=True, end="")
    for text, style in parts:
        # a terminal that cannot encode a character shows a question mark instead of failing at the very end
        line.append(text.encode(console.encoding, "replace").decode(console.encoding), style)
    line.rstrip()
    if line.cell_len > WIDTH:
        line = Text(_fit(line.plain, WIDTH), style=parts[0][1])
    console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)
