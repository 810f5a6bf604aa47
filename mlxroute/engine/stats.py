"""Times and rates of one answer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def percentile(values: Sequence[float], fraction: float) -> float:
    """Nearest-rank percentile; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]


def intervals(times_s: Sequence[float]) -> list[float]:
    """Inter-token latencies of a list of commit times."""
    return [later - earlier for earlier, later in itertools.pairwise(times_s)]
