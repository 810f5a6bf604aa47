"""Confidence intervals and significance tests for shares of right answers."""

from __future__ import annotations

import math
from typing import Final

# The normal quantile of a two-sided 95 % interval.
_Z: Final = 1.959963984540054


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share (Wilson, 1927)."""
    if not count:
        return 0.0, 1.0
    share, z2 = right / count, _Z * _Z
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    half_width = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    half_width /= 1 + z2 / count
    return center - half_width, center + half_width


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value that two sides are equally often right (McNemar, 1947).

    The counts are of questions that only one of the two sides answered right.
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(count, k) for k in range(fewer + 1)) / (1 << count)
    return min(1.0, 2 * tail)
