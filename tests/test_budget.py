"""The integer program of the byte budget, against enumeration of every choice."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np
import pytest

from edgekit.errors import InputError
from edgekit.grids.budget import Option, Point, choose, curve, spend, uniform_cost


def problem(seed: int, tensors: int = 6, types: int = 4) -> list[list[Option]]:
    """Tensors of several sizes; more bits mostly, not always, lose less."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(tensors):
        size, sensitivity = int(draw.integers(1, 9)) * 32, float(draw.lognormal(0, 2))
        bits = sorted(draw.choice(np.arange(2, 12), types, replace=False))
        noise = draw.uniform(0.7, 1.4, types)
        found.append(
            [Option(f"q{b}", size * int(b), sensitivity * 4.0 ** -int(b) * n) for b, n in zip(bits, noise, strict=True)]
        )
    return found


def enumerate_all(tensors: list[list[Option]]) -> list[tuple[int, float]]:
    return [(sum(o.nbytes for o in c), sum(o.loss for o in c)) for c in itertools.product(*tensors)]


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_best_of_all_within_the_budget(seed: int) -> None:
    tensors = problem(seed)
    choices = enumerate_all(tensors)
    low, high = min(c[0] for c in choices), max(c[0] for c in choices)
    for budget in np.random.default_rng(seed).integers(low, high + 1, 5):
        found = choose(tensors, int(budget))
        assert found.nbytes <= budget
        assert found.loss == pytest.approx(min(loss for nbytes, loss in choices if nbytes <= budget), rel=1e-6)
        named = [next(o for o in options if o.type == t) for options, t in zip(tensors, found.types, strict=True)]
        assert found == Point(found.types, sum(o.nbytes for o in named), sum(o.loss for o in named))


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_lies_below_the_curve(seed: int) -> None:
    tensors = problem(seed, tensors=5)
    choices = enumerate_all(tensors)
    points = curve(tensors)
    sizes, losses = [p.nbytes for p in points], [p.loss for p in points]
    assert sizes == sorted(sizes)
    assert sizes[0] == min(nbytes for nbytes, _ in choices)
    assert losses[-1] == pytest.approx(min(loss for _, loss in choices))
    for nbytes, loss in choices:
        assert loss >= np.interp(nbytes, sizes, losses) - 1e-12
    # its corners are choices that the program finds, too
    for point in points:
        assert choose(tensors, point.nbytes).loss == pytest.approx(point.loss, rel=1e-6)


def test_a_model_of_hundreds_of_tensors_is_solved_to_the_byte() -> None:
    """The gap to the bound that the curve gives is less than one tensor's step."""
    tensors = problem(1, tensors=400, types=8)
    points = curve(tensors)
    budget = (points[0].nbytes + points[-1].nbytes) // 2
    found = choose(tensors, budget)
    bound = float(np.interp(budget, [p.nbytes for p in points], [p.loss for p in points]))
    below = max((p for p in points if p.nbytes <= budget), key=lambda p: p.nbytes)
    assert bound - 1e-9 <= found.loss <= below.loss + 1e-12


def test_what_the_solver_prints_goes_nowhere(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HiGHS writes to the process's own stdout, which belongs to whoever reads our JSON."""
    import scipy.optimize

    milp = scipy.optimize.milp

    def prints(*arguments: Any, **options: Any) -> Any:
        os.write(1, b"from within\n")
        return milp(*arguments, **options)

    monkeypatch.setattr(scipy.optimize, "milp", prints)
    tensors = problem(0)
    choose(tensors, sum(max(o.nbytes for o in options) for options in tensors))
    print("from here")
    assert capfd.readouterr().out == "from here\n"


def test_a_budget_below_the_smallest_types_says_how_much_is_needed() -> None:
    tensors = problem(0)
    smallest = sum(min(o.nbytes for o in options) for options in tensors)
    assert choose(tensors, smallest).nbytes == smallest
    with pytest.raises(InputError, match=str(smallest)):
        choose(tensors, smallest - 1)


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all_within_both_bounds(seed: int) -> None:
    draw = np.random.default_rng(seed)
    tensors = [
        [Option(o.type, o.nbytes, o.loss, float(draw.uniform(1, 4)) * o.nbytes) for o in options]
        for options in problem(seed)
    ]
    choices = [
        (sum(o.nbytes for o in c), sum(o.cost for o in c), sum(o.loss for o in c)) for c in itertools.product(*tensors)
    ]
    for _ in range(5):
        nbytes, cost, _ = choices[int(draw.integers(len(choices)))]
        found = choose(tensors, nbytes, most_cost=cost)
        best = min(loss for size, time, loss in choices if size <= nbytes and time <= cost * (1 + 1e-9))
        assert found.loss == pytest.approx(best, rel=1e-6)
    with pytest.raises(InputError, match="decode as fast"):
        choose(tensors, max(c[0] for c in choices), most_cost=0.99 * min(c[1] for c in choices))


def test_what_one_type_costs_at_a_size_lies_between_those_of_the_sizes_beside_it() -> None:
    def options(size: int) -> list[Option]:
        costs = {"a": (4, 1.0), "b": (4, 0.5), "c": (5, 2.0), "odd": (6, 9.0), "d": (8, 1.0)}
        return [Option(name, size * n, 0.0, size * cost) for name, (n, cost) in costs.items()]

    tensors = [options(10), [o for o in options(30) if o.type != "odd"]]
    assert uniform_cost(tensors, 160) == 20  # of two types of that size the faster
    assert uniform_cost(tensors, 200) == 25  # not the 80 of a type that a larger one outruns
    near = [[*each, Option("near", each[0].nbytes * 3 // 2, 0.0, each[0].nbytes * 0.27)] for each in tensors]
    assert uniform_cost(near, 240) == pytest.approx(43.2)  # within a tenth of a larger one's, which tells nothing
    assert uniform_cost(tensors, 260) == 32.5
    assert uniform_cost(tensors, 1000) == 40
    assert uniform_cost([tensors[0][:1], tensors[1][1:2]], 160) is None


def test_a_rate_holds_the_time_to_that_of_one_type() -> None:
    fast, slow = ("fast", 0.5), ("slow", 2.0)
    tensors = {
        name: [Option(kind, 100, 1.0 if kind == "fast" else 0.1 * weight, 100 * cost) for kind, cost in (fast, slow)]
        for name, weight in (("x", 1), ("y", 2))
    }
    assert set(spend(tensors, 200, 0)[0].values()) == {"slow"}
    assert set(spend(tensors, 200, 0, rate=1.0)[0].values()) == {"fast"}
    assert spend(tensors, 200, 0, rate=0.4)[0] == {"x": "slow", "y": "fast"}
    # faster than the fastest there is not
    assert set(spend(tensors, 200, 0, rate=1.1)[0].values()) == {"fast"}
