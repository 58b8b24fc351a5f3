"""Which type each tensor takes when the file may have so many bytes: the least predicted loss, exactly.

Each tensor takes one of its options; losses add up. That is the multiple-choice knapsack problem (Kellerer, Pferschy
and Pisinger, Knapsack Problems, chapter 11), solved as an integer program by HiGHS. The time of a token may be bounded
too.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import InputError

_OUTRUN = 1.1
"""Costs that are measured scatter by some percent: below this they tell no type from another."""
_CURVE_POINTS = 60
_INFEASIBLE = 2
"""What `scipy.optimize.milp` says of a program without a solution."""


@dataclass(frozen=True)
class Option:
    """A type that a tensor may take."""

    type: str
    nbytes: int
    """In the file, padding included."""
    loss: float
    """What it adds to the divergence, at least 0."""
    cost: float = 0.0
    """What it adds to the time of a token, in a unit of the caller's."""


@dataclass(frozen=True)
class Point:
    """A choice for all tensors."""

    types: tuple[str, ...]
    nbytes: int
    loss: float


def choose(
    tensors: Sequence[Sequence[Option]], budget_bytes: int, besides: int = 0, most_cost: float | None = None
) -> Point:
    """Return the choice of least loss in at most `budget_bytes`, of which what is beside the tensors takes `besides`.

    `most_cost` bounds the sum of costs as well. Raises InputError where even the smallest types need more bytes, or
    nothing is within both bounds.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    smallest = besides + sum(min(option.nbytes for option in options) for options in tensors)
    if smallest > budget_bytes:
        raise InputError(
            f"a budget of at least {smallest} bytes, all tensors in their smallest types",
            f"{budget_bytes}",
            "raise the budget, or choose a smaller model",
        )
    budget_bytes -= besides
    useful = [undominated(options) if most_cost is None else _worth_it(options) for options in tensors]
    flat = [option for options in useful for option in options]
    loss = np.array([option.loss for option in flat])
    # counted above the smallest choice and in units of the common divisor: the solver's tolerance is relative
    extra = [option.nbytes - options[0].nbytes for options in useful for option in options]
    unit = int(np.gcd.reduce([1, *extra] if not any(extra) else [n for n in extra if n]))
    starts = np.cumsum([0, *map(len, useful)])
    one_each = csr_array((np.ones(len(flat)), np.arange(len(flat)), starts), shape=(len(useful), len(flat)))
    room = (budget_bytes - sum(options[0].nbytes for options in useful)) // unit
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(np.array([extra], float) / unit, -np.inf, room),
    ]
    if most_cost is not None:
        constraints.append(LinearConstraint(np.array([[option.cost / most_cost for option in flat]]), -np.inf, 1))
    with _quiet_stdout():
        found = milp(
            loss / max(float(loss.max()), np.finfo(float).tiny),
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
    if found.status == _INFEASIBLE:
        wanted = f"types that decode as fast as one type of {budget_bytes} bytes does"
        raise InputError(wanted, "none that fit", "--set gguf.rate=0.9")
    if found.x is None:
        raise RuntimeError(f"the integer program was not solved: {found.message}")
    chosen = [options[int(np.argmax(found.x[a:b]))] for options, a, b in zip(useful, starts, starts[1:], strict=False)]
    point = _point(chosen)
    assert point.nbytes <= budget_bytes
    return point


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """HiGHS prints a line of its own now and then, where a program may be reading."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def curve(tensors: Sequence[Sequence[Option]]) -> list[Point]:
    """The choices that are best for some price of a byte, from the smallest: the lower convex hull of all choices.

    Every other choice of least loss lies between two of them.
    """
    hulls = [_hull(undominated(options)) for options in tensors]
    steps = sorted(
        (
            (here.loss - there.loss) / (there.nbytes - here.nbytes),
            tensor,
            place,
        )
        for tensor, hull in enumerate(hulls)
        for place, (here, there) in enumerate(itertools.pairwise(hull), 1)
    )
    chosen = [hull[0] for hull in hulls]
    points = [_point(chosen)]
    for _, tensor, place in reversed(steps):
        chosen[tensor] = hulls[tensor][place]
        points.append(_point(chosen))
    return points


def uniform_cost(tensors: Sequence[Sequence[Option]], budget_bytes: int) -> float | None:
    """What tensors that all take one type cost at that size, and in proportion between two sizes.

    Types that a larger one clearly outruns do not count: nobody would choose them. None where no type is an option of
    all.
    """
    common = set.intersection(*({option.type for option in options} for options in tensors)) if tensors else set()
    least: dict[int, float] = {}
    for name in common:
        mine = [option for options in tensors for option in options if option.type == name]
        size, cost = sum(option.nbytes for option in mine), sum(option.cost for option in mine)
        least[size] = min(cost, least.get(size, cost))
    if not least:
        return None
    sizes = [size for size in sorted(least) if least[size] < _OUTRUN * min(c for n, c in least.items() if n >= size)]
    return float(np.interp(budget_bytes, sizes, [least[size] for size in sizes]))


def spend(
    tensors: Mapping[str, Sequence[Option]], budget_bytes: int, besides: int, rate: float | None = None
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the type that each tensor takes by `choose`, and what a report says of the choice.

    With a `rate`, tokens take at most 1 / rate of the time that they take with one type of that size; a rate above 1
    holds as far as the fastest types allow. What is said is `budget_bytes`, `predicted_divergence_nats`, `types` with
    their counts, and some points of the `curve`, which knows no rate, as (bytes of the file, loss).
    """
    options = [*tensors.values()]
    uniform = None if rate is None else uniform_cost(options, budget_bytes - besides)
    most = None
    if uniform and rate:
        fastest = sum(min(option.cost for option in each) for each in options)
        most = max(uniform / rate, min(uniform, fastest))
    found = choose(options, budget_bytes, besides, most)
    points = curve(options)
    types = dict(zip(tensors, found.types, strict=True))
    return types, {
        "budget_bytes": budget_bytes,
        "predicted_divergence_nats": found.loss,
        "types": dict(Counter(types.values()).most_common()),
        "curve": [[besides + point.nbytes, point.loss] for point in points[:: max(1, len(points) // _CURVE_POINTS)]],
    }


def assumed_loss(weights: int, nbytes: float) -> float:
    """A loss to plan with where none was measured: every bit quarters what a weight loses, whichever weight it is."""
    return float(weights * 4.0 ** (-8 * nbytes / weights))


def undominated(options: Sequence[Option]) -> list[Option]:
    """The options that no other beats in bytes without a greater loss, by rising bytes."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _worth_it(options: Sequence[Option]) -> list[Option]:
    """The options that no other beats in bytes, loss and cost at once, by rising bytes."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.loss, option.cost)):
        if not any(other.loss <= option.loss and other.cost <= option.cost for other in kept):
            kept.append(option)
    return kept


def _hull(options: Sequence[Option]) -> list[Option]:
    hull: list[Option] = []
    for option in options:
        while len(hull) > 1:
            a, b = hull[-2:]
            # b lies on or above the line from a to the new option
            if (b.loss - a.loss) * (option.nbytes - a.nbytes) < (option.loss - a.loss) * (b.nbytes - a.nbytes):
                break
            hull.pop()
        hull.append(option)
    return hull


def _point(chosen: Sequence[Option]) -> Point:
    return Point(
        tuple(option.type for option in chosen),
        sum(option.nbytes for option in chosen),
        sum(option.loss for option in chosen),
    )
