"""Quantiles, intervals and errors of measured values, and a test of paired ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final

MIN_QUANTILES: Final = 2
"""The number of values that `interpolated_quantile` needs."""


def percentile(values: Sequence[float], fraction: float) -> float:
    """Return the nearest-rank percentile of unordered values; 0 for no values.

    `fraction` is from 0 to 1, so 0.95 is the 95th percentile.
    """
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]


def interpolated_quantile(ordered: Sequence[float], rank: float) -> float:
    """Return the value at a rank from 0 to 1, by linear interpolation.

    `ordered` has `MIN_QUANTILES` values or more in rising order, at evenly spaced ranks.
    """
    position = rank * (len(ordered) - 1)
    low = min(math.floor(position), len(ordered) - 2)
    return ordered[low] + (position - low) * (ordered[low + 1] - ordered[low])


def intervals(times_s: Sequence[float]) -> list[float]:
    """Return the differences between successive times."""
    return [later - earlier for earlier, later in itertools.pairwise(times_s)]


def standard_error(share: float, count: int) -> float:
    """Return the standard error of a share that was measured on `count` questions.

    One right and one wrong answer more keep it above 0 for shares of 0 and 1.
    """
    share = (share * count + 1) / (count + 2)
    return math.sqrt(share * (1 - share) / count)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value that two sides are equally often right (McNemar, 1947).

    The counts are of questions that only one of the two sides answered right.
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(count, k) for k in range(fewer + 1)) / (1 << count)
    return min(1.0, 2 * tail)
