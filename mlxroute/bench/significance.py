"""What shares of right answers are worth."""

from __future__ import annotations

import math
from typing import Final

# Of a two-sided 95 % interval.
_Z: Final = 1.959963984540054


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    if not count:
        return 0.0, 1.0
    share, z2 = right / count, _Z * _Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    half /= 1 + z2 / count
    return middle - half, middle + half


def mcnemar(only_one: int, only_other: int) -> float:
    """Exact two-sided p that two sides differ on the same questions (McNemar, 1947).

    The counts are of questions that one side alone got right.
    """
    count, least = only_one + only_other, min(only_one, only_other)
    tail = sum(math.comb(count, k) for k in range(least + 1)) / (1 << count)
    return min(1.0, 2 * tail)
