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
    relative = gate.max_ratio is not None or gate.min_ratio is not None
    measured = _ratio(gate, measurements) if relative else _find(gate.measure, gate.of, measurements)
    upper = gate.max_ratio if relative else gate.max
    lower = gate.min_ratio if relative else gate.min
    values = [measured.value]
    if measured.ci_low is not None and measured.ci_high is not None:
        values += [measured.ci_low, measured.ci_high]
    name = f"{gate.measure} / the source's" if relative else gate.measure
    if upper is not None:
        kept, bound = [value <= upper for value in values], f"{name} <= {upper:g}"
    else:
        assert lower is not None
        kept, bound = [value >= lower for value in values], f"{name} >= {lower:g}"
    return GateResult(
        name=gate.measure,
        bound=bound,
        value=measured.value,
        passed=kept[0],
        certain=len(set(kept)) == 1,
        kind=measured.kind,
        of=gate.of,
    )


def _ratio(gate: Gate, measurements: Sequence[Measurement]) -> Measurement:
    """The measured ratio with its paired interval where there is one, else the quotient of the two values."""
    name = f"{gate.measure}_ratio"
    if any(m.name == name and m.of == gate.of for m in measurements):
        return _find(name, gate.of, measurements)
    ours, base = (_find(n, gate.of, measurements) for n in (gate.measure, f"source_{gate.measure}"))
    return ours.model_copy(update={"value": ours.value / base.value, "ci_low": None, "ci_high": None})


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
