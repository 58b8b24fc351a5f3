"""Constants of the roofline from a few measured rates of one device and engine, held near those of its class."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

NOISE = 0.14
"""Standard deviation of the log of a rate about the roofline, with constants of its own device and engine."""
EFFICIENCY_SPREAD = 0.25
OVERHEAD_SPREAD = 0.7
"""How far the logs of the constants of one device and engine lie from those of their class."""
_GRID = [step / 10 for step in range(-40, 41)]
"""Where the constants are searched: their distances from those of the class, in spreads."""


@dataclass(frozen=True)
class Point:
    """One measured decode rate and the bytes that a token of it reads, weights and KV cache."""

    traffic_bytes: float
    tokens_per_s: float


@dataclass(frozen=True)
class Constants:
    """The roofline of decode: seconds of a token = bytes / (efficiency * bandwidth) + overhead."""

    efficiency: float
    overhead_s: float

    def tokens_per_s(self, traffic_bytes: float, bandwidth_bytes_per_s: float) -> float:
        """Predicted decode rate."""
        return 1 / (traffic_bytes / (self.efficiency * bandwidth_bytes_per_s) + self.overhead_s)


def fit_constants(points: Sequence[Point], bandwidth_bytes_per_s: float, prior: Constants) -> Constants:
    """The most probable constants: absolute errors of the log rates, and squared distances from the class.

    Absolute errors, because now and then a published run is wrong (another power mode, a throttled board), and squares
    would follow it. Without points this is `prior`; with one, mostly the efficiency moves.
    """
    if not points:
        return prior
    best, found = math.inf, prior
    for far, further in itertools.product(_GRID, _GRID):
        efficiency = min(prior.efficiency * math.exp(EFFICIENCY_SPREAD * far), 1.0)
        tried = Constants(efficiency, prior.overhead_s * math.exp(OVERHEAD_SPREAD * further))
        cost = (far * far + further * further) / 2
        for point in points:
            predicted = tried.tokens_per_s(point.traffic_bytes, bandwidth_bytes_per_s)
            cost += math.sqrt(2) * abs(math.log(predicted / point.tokens_per_s)) / NOISE
        if cost < best:
            best, found = cost, tried
    return found


def spread(points: int) -> float:
    """Standard deviation of the log of a predicted rate whose constants were fitted to so many points.

    The noise of a run, and what the constants themselves are uncertain by: all of the class's spread without points.
    """
    precision = 1 / EFFICIENCY_SPREAD**2 + points / NOISE**2
    return math.sqrt(NOISE**2 + 1 / precision)
