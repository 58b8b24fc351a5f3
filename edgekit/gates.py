"""Gates: bounds of the recipe against measurements, unrounded."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.errors import InputError, suggest
from edgekit.measurement import Measurement
from edgekit.recipe import Gate
from edgekit.report import GateResult


def check_gates(gates: Sequence[Gate], measurements: Sequence[Measurement]) -> tuple[GateResult, ...]:
    """Compare every gate with its measurement.

    The value itself decides; `certain` says whether the whole interval lies on the same side of the bound.
    Raises InputError for a gate on something that was not measured: a gate never vanishes.
    """
    return tuple(_check(gate, measurements) for gate in gates)


def _check(gate: Gate, measurements: Sequence[Measurement]) -> GateResult:
    measured = _find(gate.measure, gate.of, measurements)
    upper = gate.max if gate.max is not None else gate.max_ratio
    lower = gate.min if gate.min is not None else gate.min_ratio
    scale, suffix = 1.0, ""
    if gate.max_ratio is not None or gate.min_ratio is not None:
        scale = _find(f"source_{gate.measure}", gate.of, measurements).value
        suffix = " x the source model's"
    values = [measured.value]
    if measured.ci_low is not None and measured.ci_high is not None:
        values += [measured.ci_low, measured.ci_high]
    if upper is not None:
        kept = [value <= upper * scale for value in values]
        bound = f"{gate.measure} <= {upper:g}{suffix}"
    else:
        assert lower is not None
        kept = [value >= lower * scale for value in values]
        bound = f"{gate.measure} >= {lower:g}{suffix}"
    return GateResult(
        name=gate.measure,
        bound=bound,
        value=measured.value,
        passed=kept[0],
        certain=len(set(kept)) == 1,
        kind=measured.kind,
        of=gate.of,
    )


def _find(name: str, of: str, measurements: Sequence[Measurement]) -> Measurement:
    # a measurement of this build beats a prediction of the same figure
    found = sorted((m for m in measurements if m.name == name and m.of == of), key=lambda m: m.kind)
    if not found:
        known = sorted({m.name for m in measurements if m.of == of})
        raise InputError(
            f"a measurement {name!r} of {of!r} for the recipe's gate",
            f"none{suggest(name, known)}",
            f"use one of {', '.join(known) or 'the stages that are checked'}",
        )
    return found[0]
