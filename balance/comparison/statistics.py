"""A number measured once per seed, and whether it can be distinguished from the best of a table."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Verdict = Literal["best", "alike", "worse", "unclear"]

CONFIDENCE = 0.95
# n paired differences without any effect all have one sign in 2 of 2^n cases; below 5 % from six pairs on.
ENOUGH_SEEDS = 6


@dataclass(frozen=True)
class Estimate:
    """A number that was measured once for each seed.

    A value that is not finite makes the mean NaN, because a mean without it would flatter the method.

    Attributes:
        values: Values by seed.
        verdict: ``best`` for the best mean of the table, ``alike`` if it is not distinguishable from the best, else ``worse``.
            With too few seeds to decide it is ``unclear``.
    """

    values: Mapping[int, float]
    verdict: Verdict = "unclear"

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return sum(self.values.values()) / len(self.values) if self.values else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN for a single seed, or if the mean is not finite."""
        n = len(self.values)
        if n < 2 or not math.isfinite(self.mean):
            return math.nan
        return statistics.stdev(self.values.values()) / math.sqrt(n)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean, by Student's t distribution; NaN for a single seed."""
        n = len(self.values)
        if n < 2 or not math.isfinite(self.error):
            return math.nan, math.nan
        reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * self.error
        return self.mean - reach, self.mean + reach


def compare_with_best(values: Mapping[int, float], best: Mapping[int, float], *, higher_is_better: bool) -> Verdict:
    """Return whether a method can be distinguished from the best one, by a paired bootstrap over common seeds.

    Args:
        values: A metric of the method, by seed.
        best: The metric of the best method, by seed.
        higher_is_better: Whether the metric should be large.

    Returns:
        ``alike`` if the 95 % interval of the mean difference contains zero, else ``worse``; ``unclear`` if the common seeds
        are too few.
    """
    common = sorted(values.keys() & best.keys())
    sign = -1 if higher_is_better else 1
    differences = np.array([sign * (values[seed] - best[seed]) for seed in common])
    if len(common) < 2 or not np.isfinite(differences).all():
        return "unclear" if len(common) < 2 else "worse"
    if _lower_end(differences) <= 0:
        return "alike"
    return "worse" if len(common) >= ENOUGH_SEEDS else "unclear"


def _lower_end(differences: np.ndarray) -> float:
    """Return the lower end of the bootstrap interval of the mean of at least two numbers."""
    if np.ptp(differences) == 0:  # every resample has this mean
        return float(differences[0])
    resampled = stats.bootstrap(
        (differences,), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(0)
    )
    return float(resampled.confidence_interval.low)


def median(numbers: Iterable[float]) -> float:
    """Return the median of the numbers that are not NaN; NaN without any."""
    known = [number for number in numbers if not math.isnan(number)]
    return statistics.median(known) if known else math.nan
