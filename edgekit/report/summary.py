"""What a report says: the verdict, the key figures and the rows, chosen once for every rendering."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from edgekit.measurement import Measurement, mean_interval
from edgekit.report import DeviceRecord, Report, StrategyResult
from edgekit.report.figures import KNOWN, Dot, Segment, Shown, bytes_text, clean, known, number, shorten, shown

_TRADEMARK = re.compile(r"\((?:R|TM)\)")
MEMORY_STYLES = ("m1", "m2", "m3", "m4", "m5")


@dataclass(frozen=True)
class Verdict:
    """The first words of every rendering."""

    word: Literal["Passed", "Failed", "Built"]
    detail: str


def verdict(report: Report) -> Verdict:
    """Count the gates; a build without gates is `Built`, never `Passed`."""
    total = len(report.gates)
    failed = sum(not gate.passed for gate in report.gates)
    if not total:
        return Verdict("Built", "the recipe sets no gates")
    gates = f"{total} gate{'s' if total > 1 else ''}"
    return Verdict("Failed", f"{failed} of {gates} failed") if failed else Verdict("Passed", f"{gates} passed")


@dataclass(frozen=True)
class Reading:
    """One measurement as people see it."""

    shown: Shown
    kind: Literal["measured", "predicted"]
    device: str
    """Where it was measured or what it is predicted for, in words; empty where the report does not say."""
    place: str
    """The device in a few letters, for narrow columns: `the build host`, the target's name."""
    n: int | None
    of: str
    name: str
    note: str

    @property
    def label(self) -> str:
        """How the value came about: `measured on ...` or `predicted for ...`."""
        join = "on" if self.kind == "measured" else "for"
        return f"{self.kind} {join} {self.device}" if self.device else self.kind

    @property
    def basis(self) -> str:
        """Sample count and meaning of the interval, e.g. `n = 64, 95% interval`; empty where neither is known."""
        parts = [f"n = {self.n:,}"] if self.n is not None else []
        interval = "95% interval" if self.kind == "measured" else "expected range"
        return ", ".join([*parts, interval] if self.shown.interval else parts)


def read(report: Report, measurement: Measurement) -> Reading:
    """Prepare one measurement for print."""
    return Reading(
        shown(measurement),
        measurement.kind,
        device_text(report, measurement.device),
        _place(report, measurement.device),
        measurement.n,
        clean(measurement.of),
        measurement.name,
        clean(measurement.note or ""),
    )


def device_text(report: Report, device: str | None) -> str:
    """Name a device in words: the build host by its CPU, the board that measured by its name, the target by its title.

    Others are named as recorded.
    """
    if not device:
        return ""
    if device == report.host.get("fingerprint"):
        cpu = report.host.get("cpu")
        return f"{shorten(_TRADEMARK.sub('', str(cpu)), 40)} (build host)" if cpu else "the build host"
    if report.device and device == report.device.fingerprint:
        return shorten(_title_of(report.device), 60)
    if device == report.target.get("name"):
        return target_title(report)
    return shorten(device, 60)


def _place(report: Report, device: str | None) -> str:
    if device == report.host.get("fingerprint"):
        return "the build host" if device else ""
    if report.device and device == report.device.fingerprint:
        return shorten(_title_of(report.device), 32)
    return shorten(device or "", 32)


def _title_of(device: DeviceRecord) -> str:
    return _TRADEMARK.sub("", str(device.facts.get("board") or device.facts.get("cpu") or device.fingerprint))


def device_line(report: Report) -> str:
    """The device that measured in one line: what it is, and its state meanwhile; empty where the report has none."""
    device = report.device
    if device is None:
        return ""
    parts = [f"device: {device_text(report, device.fingerprint)}"]
    if (board := device.board) is not None:
        parts.append(f"power mode: {shorten(board.start.power_mode or 'not told', 40)}")
        parts.append(f"throttled: {'not told' if board.throttled is None else 'yes' if board.throttled else 'no'}")
        hottest = [max(s.temperatures_c.values()) for s in (board.start, board.end) if s and s.temperatures_c]
        if hottest:
            parts.append(f"temperature: {' to '.join(f'{degrees:.0f}' for degrees in hottest)} °C")
    if device.decode_drift is not None:
        parts.append(f"decode speed from the first repeat to the last: {device.decode_drift:+.1%}")
    return "; ".join(parts)


def target_title(report: Report) -> str:
    """The target's title, or its name."""
    return shorten(report.target.get("title") or report.target.get("name") or "unnamed target", 60)


def model_name(report: Report) -> str:
    """The model's name or source; of a path, its last part."""
    source = str(report.model.get("name") or report.model.get("source") or "unnamed model")
    is_path = source.startswith(("/", ".", "~")) or source.endswith(".gguf")
    return shorten((PurePosixPath(source).name or source) if is_path else source, 70)


def recipe_name(report: Report) -> str:
    """The recipe's name."""
    return shorten(report.recipe.get("name") or "unnamed recipe", 50)


def pick(report: Report, name: str) -> list[Measurement]:
    """The measurements that answer for the bundle: measured first, then predicted.

    For each kind, those `of` the bundle; else those of the last step that has one.
    """
    picked: list[Measurement] = []
    for kind in ("measured", "predicted"):
        found = [m for m in report.measurements if (m.name, m.kind) == (name, kind)]
        of = "bundle" if any(m.of == "bundle" for m in found) else found[-1].of if found else ""
        picked += [m for m in found if m.of == of]
    return picked


@dataclass(frozen=True)
class KeyFigure:
    """A tile: one question, with every answer side by side."""

    title: str
    hint: str
    readings: tuple[Reading, ...]
    context: str
    """What to compare it with; empty where nothing is known."""


def key_figures(report: Report) -> list[KeyFigure]:
    """The figures that decide, in reading order; one without any measurement is left out."""

    def tile(title: str, names: tuple[str, ...], context: str = "") -> KeyFigure:
        readings = tuple(read(report, m) for name in names for m in pick(report, name))
        return KeyFigure(title, known(names[0]).hint, readings, context)

    def beside(pairs: list[tuple[str, Measurement | None]]) -> str:
        return ", ".join(f"{words} {shown(m).plain}" for words, m in pairs if m)

    def first(name: str) -> Measurement | None:
        return next(iter(pick(report, name)), None)

    bundled = first("bundle_bytes")
    weights = [("weights", first("weight_bytes") if bundled else None)]
    perplexity = [("source", first("source_perplexity")), ("relative", first("perplexity_ratio"))]
    spread = [("median", first("kl_divergence_median_nats")), ("99th percentile", first("kl_divergence_p99_nats"))]
    speeds = beside([("prefill", first("prefill_tokens_per_s")), ("energy", first("energy_j_per_token"))])
    memory = memory_on_target(report)
    usable = f"usable on the target {bytes_text(memory.usable_bytes)}" if memory and memory.usable_bytes else ""
    tiles = [
        tile("Size", ("bundle_bytes",) if bundled else ("weight_bytes",), beside(weights)),
        tile("KL divergence", ("kl_divergence_nats",), beside(spread)),
        tile("Perplexity", ("perplexity",), beside(perplexity)),
        tile("Top-1 agreement", ("top1_agreement",)),
        tile("Decode speed", ("decode_tokens_per_s",), "; ".join(filter(None, [speeds, busy(report)]))),
        # what the process held here and what the target must have are two answers to one question
        tile("Peak memory", ("peak_rss_bytes", "required_bytes"), usable),
    ]
    return [tile for tile in tiles if tile.readings]


def busy(report: Report) -> str:
    """What the measured decode speed says of other programs: `contended: ...`; empty on a quiet machine."""
    found = (m.note or "" for m in pick(report, "decode_tokens_per_s") if m.kind == "measured")
    return next((clean(note[note.index("contended") :]) for note in found if "contended" in note), "")


def sentence(report: Report) -> str:
    """The build in one plain sentence, made only of figures that the report has: first what was measured."""
    found: dict[str, list[str]] = {"measured": [], "predicted": []}

    def add(m: Measurement, does: str, do: str, words: str) -> None:
        found[m.kind].append(f"{does if m.kind == 'measured' else do} {words}")

    for m in (pick(report, "bundle_bytes") or pick(report, "weight_bytes"))[:1]:
        add(m, "takes", "take", shown(m).plain + (" of weights" if m.name == "weight_bytes" else ""))
    for m in pick(report, "top1_agreement")[:1]:
        add(m, "keeps", "keep", f"the source's first choice of token {shown(m).plain} of the time")
    source = next(iter(pick(report, "source_perplexity")), None)
    against = f" against the source's {shown(source).plain}" if source else ""
    for m in pick(report, "perplexity")[:1]:
        add(m, "has", "have", f"a perplexity of {shown(m).plain}{against}")
    for m in pick(report, "decode_tokens_per_s"):
        where = f" on {read(report, m).place}" if m.kind == "measured" and m.device else ""
        contended = " (contended)" if m.kind == "measured" and busy(report) else ""
        add(m, "decodes", "decode", shown(m).plain + where + contended)
    memory = memory_on_target(report)
    if memory and memory.usable_bytes:
        usable = bytes_text(memory.usable_bytes)
        limit = f", more than the {usable} usable" if memory.over_bytes else f" of the {usable} usable"
        found["predicted"].append(f"need ≈ {bytes_text(memory.required_bytes)}{limit}")
    if not any(found.values()):
        return "The build recorded no measurements."
    predicted = f"on {target_title(report)} it should {_join(found['predicted'])} (predicted)"
    if not found["measured"]:
        return predicted[0].upper() + predicted[1:] + "."
    return f"The bundle {_join(found['measured'])}" + (f"; {predicted}." if found["predicted"] else ".")


def _join(clauses: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(clauses[:-1]), *clauses[-1:]]))


@dataclass(frozen=True)
class Memory:
    """Predicted memory on the target, against what a model may use there."""

    segments: tuple[Segment, ...]
    required_bytes: int
    usable_bytes: int | None

    @property
    def free_bytes(self) -> int:
        """What stays free; 0 where nothing does or the report does not say what is usable."""
        return max(0, (self.usable_bytes or 0) - self.required_bytes)

    @property
    def over_bytes(self) -> int:
        """By how much the parts exceed what is usable."""
        return max(0, self.required_bytes - self.usable_bytes) if self.usable_bytes else 0


def memory_on_target(report: Report) -> Memory | None:
    """The parts in order, each with its style; None where the report has none."""
    if not report.memory:
        return None
    styles = itertools.cycle(MEMORY_STYLES)
    segments = tuple(
        Segment(shorten(part.name, 40), part.bytes, "margin" if "margin" in part.name.lower() else next(styles))
        for part in report.memory
    )
    usable = report.target.get("usable_bytes")
    known_usable = usable if isinstance(usable, int) and usable > 0 else None
    return Memory(segments, sum(part.bytes for part in report.memory), known_usable)


@dataclass(frozen=True)
class Row:
    """One line of the table of all measurements: the same figure of the same thing, by how it came about."""

    name: str
    title: str
    of: str
    measured: tuple[Reading, ...]
    predicted: tuple[Reading, ...]


def rows(report: Report) -> list[Row]:
    """Group all measurements by name and `of`: known names first and in their usual order."""
    order = {name: index for index, name in enumerate(KNOWN)}
    groups: dict[tuple[str, str], list[Reading]] = {}
    for m in sorted(report.measurements, key=lambda m: order.get(m.name, len(order))):
        groups.setdefault((m.name, m.of), []).append(read(report, m))
    return [
        Row(
            clean(name),
            known(name).title,
            clean(of),
            tuple(reading for reading in readings if reading.kind == "measured"),
            tuple(reading for reading in readings if reading.kind == "predicted"),
        )
        for (name, of), readings in groups.items()
    ]


def strategy_dots(report: Report) -> list[Dot]:
    """The accuracy-cost curve of the first task: tokens forward against the share of right answers."""
    return [
        Dot(row.tokens_forward, row.accuracy, row.ci_low, row.ci_high, strategy_label(row), _dot_style(row))
        for row in report.strategies
        if row.task == report.strategies[0].task
    ]


def strategy_label(row: StrategyResult) -> str:
    """A strategy as a reader knows it."""
    name = clean(row.strategy) + (", random verifier" if row.verifier == "random" else "")
    return name if row.candidates == 1 else f"{name}, {row.candidates} candidates"


def _dot_style(row: StrategyResult) -> str:
    if row.chosen:
        return "chosen"
    return {"trained": "dot", "none": "control", "random": "chance"}[row.verifier]


def divergence_mean(report: Report) -> tuple[float, float, float]:
    """Mean of the divergence with its interval: as measured, else from the windows themselves."""
    for m in pick(report, "kl_divergence_nats"):
        if m.kind == "measured" and m.ci_low is not None and m.ci_high is not None:
            return m.value, m.ci_low, m.ci_high
    return mean_interval(report.divergence_per_window)


def provenance(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """Where everything comes from, as groups of label and text."""
    groups: list[tuple[str, Mapping[str, Any]]] = [
        ("Model", report.model),
        ("Target", report.target),
        ("Recipe", report.recipe),
        ("Build host", report.host),
        ("Device", _device_facts(report.device) if report.device else {}),
        ("Report", {"edgekit_version": report.edgekit_version, "created_at": report.created_at}),
    ]
    return [(title, list(_flatten(facts))) for title, facts in groups if facts]


def _device_facts(device: DeviceRecord) -> dict[str, Any]:
    return {**device.facts, "fingerprint": device.fingerprint, "engine": device.engine, "repeats": device.samples}


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        label = prefix + clean(key).replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{label} / ")
        elif value is not None and value not in ("", [], ()):
            yield label, _fact(str(key), value)


def _fact(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,} ({bytes_text(value)})" if key.endswith("_bytes") and value >= 1024 else f"{value:,}"
    if isinstance(value, float):
        return number(value, 6)
    if isinstance(value, list | tuple):
        return ("; " if any(isinstance(item, Mapping) for item in value) else ", ").join(
            _fact("", item) for item in value
        )
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(name)} = {_fact(str(name), item)}" for name, item in value.items())
    return clean(value)
