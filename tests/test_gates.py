from __future__ import annotations

import pytest

from edgekit.errors import InputError
from edgekit.gates import check_gates
from edgekit.measurement import Measurement
from edgekit.recipe import Gate


def figure(name: str, value: float, low: float | None = None, high: float | None = None, **more: object) -> Measurement:
    fields = {"unit": "nats", "kind": "measured", **more}
    return Measurement(name=name, value=value, ci_low=low, ci_high=high, **fields)


@pytest.mark.parametrize(
    ("bound", "value", "passed"),
    [
        ({"max": 0.3}, 0.3, True),
        ({"max": 0.3}, 0.3 + 1e-12, False),
        ({"min": 10}, 10, True),
        ({"min": 10}, 9.999999, False),
    ],
)
def test_the_unrounded_value_decides(bound, value, passed):
    (result,) = check_gates([Gate(measure="x", **bound)], [figure("x", value)])
    assert result.passed is passed
    assert result.value == value


@pytest.mark.parametrize(("low", "high", "certain"), [(0.1, 0.25, True), (0.1, 0.35, False), (None, None, True)])
def test_an_interval_across_the_bound_is_uncertain(low, high, certain):
    (result,) = check_gates([Gate(measure="x", max=0.3)], [figure("x", 0.2, low, high)])
    assert result.passed
    assert result.certain is certain


def test_a_relative_gate_uses_the_paired_ratio_and_else_the_quotient():
    gate = Gate(measure="perplexity", max_ratio=1.1)
    values = [figure("perplexity", 12.0, 8, 16), figure("source_perplexity", 10.0)]
    (quotient,) = check_gates([gate], values)
    assert (quotient.value, quotient.passed) == (1.2, False)
    (paired,) = check_gates([gate], [*values, figure("perplexity_ratio", 1.05, 1.04, 1.06)])
    assert (paired.value, paired.passed, paired.certain) == (1.05, True, True)


def test_a_measurement_beats_a_prediction():
    values = [figure("x", 9.0, kind="predicted"), figure("x", 1.0)]
    (result,) = check_gates([Gate(measure="x", max=2)], values)
    assert (result.value, result.kind) == (1.0, "measured")


def test_a_gate_on_nothing_is_an_error_with_a_suggestion():
    with pytest.raises(InputError, match="did you mean 'kl_divergence_nats'"):
        check_gates([Gate(measure="kl_divergence", max=1)], [figure("kl_divergence_nats", 0.1)])


def test_each_gate_looks_at_its_own_step():
    values = [figure("x", 5.0, of="convert"), figure("x", 1.0)]
    convert, bundle = check_gates([Gate(measure="x", of="convert", max=2), Gate(measure="x", max=2)], values)
    assert (convert.passed, bundle.passed) == (False, True)


@pytest.mark.parametrize("bounds", [{}, {"max": 1, "min": 0}])
def test_a_gate_has_exactly_one_bound(bounds):
    with pytest.raises(ValueError, match="exactly one"):
        Gate(measure="x", **bounds)
