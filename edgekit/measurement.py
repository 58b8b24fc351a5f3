"""One figure: a value with its unit, how it came about, and how sure it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import model_validator

from edgekit.config import Strict


class Measurement(Strict):
    """A value with unit and sample count; `predicted` is never shown as `measured`.

    The interval is a 95% confidence interval where the value was measured, and the range to expect where it was
    predicted.
    """

    name: str
    """What was measured, with its unit as suffix where it has one, e.g. `load_s`."""
    value: float
    unit: str
    """SI or field-standard unit: `bytes`, `s`, `tokens/s`, `nats`, `ratio`, `W`, `J`."""
    kind: Literal["measured", "predicted"]
    n: int | None = None
    """Independent samples behind the value; None for an exact count or a prediction."""
    ci_low: float | None = None
    ci_high: float | None = None
    device: str | None = None
    """Fingerprint of the machine it was measured on, or the target it is predicted for."""
    of: str = "bundle"
    """What it describes: `bundle`, `import`, or the name of the stage whose output it is."""
    note: str | None = None

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> Measurement:
        if not math.isfinite(self.value):
            raise ValueError(f"{self.name} is {self.value}")
        if (self.ci_low is None) != (self.ci_high is None):
            raise ValueError(f"{self.name} has half an interval")
        if self.ci_low is not None and self.ci_high is not None and self.ci_low > self.ci_high:
            raise ValueError(f"{self.name} has its interval upside down")
        return self


def mean_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Mean and normal-approximation 95% interval of independent samples: (mean, low, high).

    With one sample the interval is the point itself.
    """
    mean = statistics.fmean(samples)
    if len(samples) < 2:
        return mean, mean, mean
    half = 1.96 * statistics.stdev(samples) / math.sqrt(len(samples))
    return mean, mean - half, mean + half


def median_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median and distribution-free 95% interval from order statistics: (median, low, high).

    The interval takes the ranks n/2 -+ 1.96*sqrt(n)/2 (Conover, Practical Nonparametric Statistics, 3.2);
    with fewer than six samples that is the whole range.
    """
    ordered = sorted(samples)
    n = len(ordered)
    reach = 1.96 * math.sqrt(n) / 2
    low = max(0, math.floor(n / 2 - reach) - 1)
    high = min(n - 1, math.ceil(n / 2 + reach))
    return statistics.median(ordered), ordered[low], ordered[high]


def share_interval(successes: float, n: int) -> tuple[float, float, float]:
    """Share of successes among n trials and Wilson's 95% interval: (share, low, high).

    Unlike the normal approximation it is not empty where all or none succeeded (Wilson, 1927).
    """
    share, z2 = successes / n, 1.96**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
