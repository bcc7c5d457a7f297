"""What repetitions are worth: the intervals that reports and benchmarks state.

Of paired figures, or of differences, the mean with Student's t interval: there are 3 to 10 of them,
and a bootstrap of so few resamples the same values and covers too seldom (of 3 pairs 73 %, of 5
83 %, not 95 %: simulated). Of many, or of a median, a percentile bootstrap with a fixed seed, so
that the same figures give the same interval.
"""

from collections.abc import Callable, Sequence
from math import exp, inf, log, nan
from statistics import mean, stdev

import numpy as np

STUDENT_T = (
    inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 0, 1, ... degrees of freedom; the last one for more."""
NUM_RESAMPLES, SEED = 2000, 0
AT_ONCE = 10**6
"""Values drawn at once: memory stays small, and few values need no loop."""
LEAST = 3
"""Fewer values have no interval of their median."""


def mean_interval95(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and its 95 % interval by Student's t; an endless one for a single value."""
    middle = mean(values)
    if len(values) < 2:
        return middle, -inf, inf
    quantile = STUDENT_T[min(len(values), len(STUDENT_T)) - 1]
    half = quantile * stdev(values) / len(values) ** 0.5
    return middle, middle - half, middle + half


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of b / a over pairs of positive figures, and its 95 % interval.

    (0, inf) for one pair. Ratios are near log-normal: this is the mean of their logarithms.
    """
    logs = [log(y / x) for x, y in zip(a, b, strict=True)]
    middle, low, high = mean_interval95(logs)
    return exp(middle), exp(low), inf if high == inf else exp(high)


def median_interval95(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the median; NaN for fewer than 3 values."""
    if len(values) < LEAST:
        return nan, nan
    return bootstrap95(values, np.median)


def bootstrap95(values: np.ndarray, statistic: Callable[..., np.ndarray]) -> tuple[float, float]:
    """The 95 % interval of a statistic of the values, np.median or np.mean, by resampling them."""
    rng = np.random.default_rng(SEED)
    at_once = max(1, AT_ONCE // len(values))
    found = []
    for first in range(0, NUM_RESAMPLES, at_once):
        num = min(at_once, NUM_RESAMPLES - first)
        found.append(statistic(rng.choice(values, (num, len(values))), axis=1))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)
