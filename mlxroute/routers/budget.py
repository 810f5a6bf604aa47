"""A budget: an upper bound on the share of positions that are escalated.

A token bucket enforces the bound: each position adds `rate` to a bucket that holds at most `BURST`,
and an escalation takes 1 out of it, so it needs 1 in it. Any n positions in a row, of one answer or
of many, are therefore escalated at most rate * n + BURST times.

Which positions are escalated is decided by rank: a position is escalated where its score exceeds
the score at a certain rank of the latest ones. The rank follows the rate by online quantile
tracking, a Robbins-Monro step at each position (Robbins and Monro, A stochastic approximation
method, 1951): up by eta (1 - rate) at an escalation, and down by eta rate otherwise. The realised
rate so approaches the budget, unless too many positions share the lowest score of the latest ones:
these exceed no score, so they are escalated by a budget of 100 % only.

Scores are rounded to steps of a `resolution`. Where their last digits differ, as in a batch, the
state stays bit-identical except for scores on the border between two steps.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from mlxroute.errors import UsageError
from mlxroute.statistics import MIN_QUANTILES, interpolated_quantile
from mlxroute.types import Judgement
from mlxroute.types.limits import check_number

BURST: Final = 4.0
DEFAULT_BUDGET: Final = 0.07
"""The share that is escalated at most where no threshold or budget is given."""
# eta of the quantile tracking.
_LEARNING_RATE: Final = 0.02
# Number of scores that a new one is ranked among.
_WINDOW: Final = 256
# Coprime to the window, so that the expected scores leave the window in mixed order.
_STRIDE: Final = 101
# Below 1, because refills that add up to 1 may be rounded down.
_ONE_ESCALATION: Final = 1.0 - 1e-9


@dataclass(frozen=True, slots=True)
class Budget:
    """Immutable router state of a budget after `positions` positions.

    Args:
        rate: The budget, from 0 to 1.
        resolution: The step that scores are rounded to.
        rank: The rank, from 0 to 1, above which scores are escalated.
        bucket: Level of the token bucket.
        recent: The latest scores, oldest first.
        ordered: The same scores in rising order.
        positions: Number of positions so far.
    """

    rate: float
    resolution: float
    rank: float
    bucket: float
    recent: tuple[float, ...]
    ordered: tuple[float, ...]
    positions: int = 0

    @classmethod
    def of(cls, rate: float, quantiles: Sequence[float], *, resolution: float) -> Budget:
        """Return the initial state of a budget, whose window holds expected scores.

        `quantiles` are expected scores at evenly spaced ranks, lowest first. Raises UsageError
        for a rate outside 0 to 1, and for quantiles that are too few or not in rising order.
        """
        check_number("budget", rate)
        if len(quantiles) < MIN_QUANTILES or list(quantiles) != sorted(quantiles):
            raise UsageError(
                f"quantiles must be at least {MIN_QUANTILES} scores in rising order",
                parameter="quantiles",
            )
        expected = [interpolated_quantile(quantiles, (i + 0.5) / _WINDOW) for i in range(_WINDOW)]
        mixed = [_rounded(expected[i * _STRIDE % _WINDOW], resolution) for i in range(_WINDOW)]
        return cls(rate, resolution, 1.0 - rate, BURST, tuple(mixed), tuple(sorted(mixed)))

    @property
    def threshold(self) -> float:
        """The score that the next position has to exceed."""
        if self.rate in (0, 1):
            return math.inf if self.rate == 0 else -math.inf
        index = math.floor(self.rank * len(self.ordered))
        return self.ordered[min(index, len(self.ordered) - 1)]

    def with_rate(self, rate: float) -> Budget:
        """Return this state with another budget; what was escalated so far still counts.

        Raises UsageError for a rate outside 0 to 1.
        """
        check_number("budget", rate)
        return self if rate == self.rate else replace(self, rate=rate, rank=1.0 - rate)

    def decide(self, score: float) -> tuple[Judgement, Budget]:
        """Judge the next position by its score; return the judgement and the state after it.

        NaN is above every threshold, unless the budget is 0.
        """
        value, level = _rounded(score, self.resolution), min(BURST, self.bucket + self.rate)
        judgement = Judgement.KEEP
        # Where all scores are NaN, the threshold is inf too.
        if self.rate > 0 and (value == math.inf or value > self.threshold):
            has_room = level >= _ONE_ESCALATION
            judgement = Judgement.ESCALATE if has_room else Judgement.OVER_BUDGET
        escalates = judgement is Judgement.ESCALATE
        ordered = list(self.ordered)
        del ordered[bisect_left(ordered, self.recent[0])]
        insort(ordered, value)
        return judgement, Budget(
            rate=self.rate,
            resolution=self.resolution,
            rank=min(1.0, max(0.0, self.rank + _LEARNING_RATE * (escalates - self.rate))),
            bucket=max(0.0, level - escalates),
            recent=(*self.recent[1:], value),
            ordered=tuple(ordered),
            positions=self.positions + 1,
        )

    @property
    def max_band(self) -> float:
        """The band from which on every score is borderline: half a step."""
        return self.resolution / 2

    def is_borderline(self, score: float, band: float) -> bool:
        """Return whether a score that differs by `band` could be rounded to another step.

        Each step counts, not only the threshold: the rounded score becomes part of the state.
        """
        if not math.isfinite(score):
            return False
        steps = score / self.resolution
        return abs(steps - math.floor(steps) - 0.5) * self.resolution <= band


def _rounded(score: float, resolution: float) -> float:
    """Round a score to a multiple of `resolution`; NaN becomes inf."""
    if math.isnan(score):
        return math.inf
    return math.floor(score / resolution + 0.5) * resolution if math.isfinite(score) else score
