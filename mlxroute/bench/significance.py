"""Confidence intervals and significance tests for shares of right answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Final

# The normal quantile of a two-sided 95 % interval.
_Z: Final = 1.959963984540054
_MIN_PAIRS: Final = 2


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share (Wilson, 1927)."""
    if not count:
        return 0.0, 1.0
    share, z2 = right / count, _Z * _Z
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    half_width = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    half_width /= 1 + z2 / count
    return max(0.0, center - half_width), min(1.0, center + half_width)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float]
) -> tuple[float, float] | None:
    """Return the 95 % interval of the ratio of two sums of paired values (Fieller, 1954).

    Return None if it is unbounded: if the sum of the denominators does not differ from 0.
    """
    count = len(numerators)
    if count < _MIN_PAIRS:
        return None
    a, b = fmean(numerators), fmean(denominators)
    scale = _Z * _Z / (count * (count - 1))
    cov_aa = scale * sum((x - a) ** 2 for x in numerators)
    cov_bb = scale * sum((y - b) ** 2 for y in denominators)
    cov_ab = scale * sum((x - a) * (y - b) for x, y in zip(numerators, denominators, strict=True))
    # The ratios r for which the mean of (numerator - r denominator) does not differ from 0.
    square, half_linear = b * b - cov_bb, a * b - cov_ab
    if square <= 0:
        return None
    root = math.sqrt(max(0.0, half_linear**2 - square * (a * a - cov_aa)))
    return (half_linear - root) / square, (half_linear + root) / square


def mean_interval(
    values: Sequence[float], *, low: float = -math.inf, high: float = math.inf
) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by the normal approximation; without width for one value.

    `low` and `high` are the least and the greatest value there can be; the interval ends there.
    """
    center = fmean(values)
    if len(values) < _MIN_PAIRS:
        return center, center
    half_width = _Z * stdev(values) / math.sqrt(len(values))
    return max(low, center - half_width), min(high, center + half_width)


def difference_interval(only_first: int, only_second: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two shares of the same `count` questions.

    The other counts are of questions that only one of the two sides answered right. Adjusted normal
    approximation (Bonett and Price, 2012), whose width is not 0 where the sides never differ.
    """
    total = count + 2
    first, second = (only_first + 1) / total, (only_second + 1) / total
    half_width = _Z * math.sqrt((first + second - (first - second) ** 2) / total)
    center = first - second
    return max(-1.0, center - half_width), min(1.0, center + half_width)
