"""A budget: the share of positions that may be escalated, as a promise.

A token bucket gives the promise: each position adds the rate to a purse that holds BURST at most,
an escalation takes 1 from it and needs 1 in it. So n positions in a row, of one answer or of many,
are escalated rate * n + BURST times at most.

What is worth it is decided among the latest scores: a position is escalated when its score exceeds
the one at a certain rank of them. That rank follows the rate by online quantile tracking (a
Robbins-Monro step each position: up by eta (1 - rate) at an escalation, else down by eta rate), so
that the realised rate approaches the budget whatever the scores are distributed like.

Scores count in steps of a `resolution`. Where they round differently in the last digits, as in a
batch, the state stays the same to the last bit but for scores at the border of two steps.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mlxroute.errors import UsageError
from mlxroute.statistics import interpolated_quantile
from mlxroute.types import Judgement

BURST: Final = 4.0
_ETA: Final = 0.02
_WINDOW: Final = 256
# Coprime to the window: scores that are known beforehand leave it evenly.
_STRIDE: Final = 101
# Refills add up to a whole escalation but for rounding.
_WHOLE: Final = 1.0 - 1e-9


@dataclass(frozen=True, slots=True)
class Budget:
    """The state of a budget after `seen` positions; `decide` gives the next one.

    `recent` are the latest scores, oldest first, and `ordered` the same by size.
    """

    rate: float
    resolution: float
    rank: float
    purse: float
    recent: tuple[float, ...]
    ordered: tuple[float, ...]
    seen: int = 0

    @classmethod
    def of(cls, rate: float, quantiles: Sequence[float], *, resolution: float) -> Budget:
        """A budget whose first positions are compared with scores at evenly spaced ranks.

        Raises UsageError for a rate that is no share.
        """
        if not 0 <= rate <= 1:
            raise UsageError(f"a budget must be from 0% to 100%, not {rate:.4g}")
        expected = [interpolated_quantile(quantiles, (i + 0.5) / _WINDOW) for i in range(_WINDOW)]
        mixed = [_stepped(expected[i * _STRIDE % _WINDOW], resolution) for i in range(_WINDOW)]
        return cls(rate, resolution, 1.0 - rate, BURST, tuple(mixed), tuple(sorted(mixed)))

    @property
    def threshold(self) -> float:
        """The score that the next position has to exceed."""
        if self.rate in (0, 1):
            return math.inf if self.rate == 0 else -math.inf
        place = math.floor(self.rank * len(self.ordered))
        return self.ordered[min(place, len(self.ordered) - 1)]

    def decide(self, score: float) -> tuple[Judgement, Budget]:
        """What is to be done at a position with this score, and the state behind it.

        A score that is NaN is the highest.
        """
        value, filled = _stepped(score, self.resolution), min(BURST, self.purse + self.rate)
        judgement = Judgement.KEEP
        if (threshold := self.threshold) != math.inf and value > threshold:
            judgement = Judgement.ESCALATE if filled >= _WHOLE else Judgement.OVER_BUDGET
        spent = judgement is Judgement.ESCALATE
        ordered = list(self.ordered)
        del ordered[bisect_left(ordered, self.recent[0])]
        insort(ordered, value)
        return judgement, Budget(
            rate=self.rate,
            resolution=self.resolution,
            rank=min(1.0, max(0.0, self.rank + _ETA * (spent - self.rate))),
            purse=max(0.0, filled - spent),
            recent=(*self.recent[1:], value),
            ordered=tuple(ordered),
            seen=self.seen + 1,
        )

    def is_near(self, score: float, band: float) -> bool:
        """Whether a score that differs by `band` would be counted otherwise."""
        if not math.isfinite(score):
            return False
        place = score / self.resolution
        return abs(place - math.floor(place) - 0.5) * self.resolution <= band


def _stepped(score: float, resolution: float) -> float:
    """A score in whole steps; NaN is the highest."""
    if math.isnan(score):
        return math.inf
    return math.floor(score / resolution + 0.5) * resolution if math.isfinite(score) else score
