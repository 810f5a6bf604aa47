"""A fixed threshold: positions with a higher score are escalated."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlxroute.types import Judgement
from mlxroute.types.limits import check_number


@dataclass(frozen=True, slots=True)
class Threshold:
    """Immutable router state that escalates scores above `threshold`, in the score's units.

    `inf` never escalates and `-inf` always does. NaN, the score of broken logits, is escalated
    under every threshold but `inf`. Raises UsageError for a threshold that is not a number.
    """

    threshold: float
    positions: int = 0

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)

    def decide(self, score: float) -> tuple[Judgement, Threshold]:
        """Judge the next position by its score; return the judgement and the state after it."""
        is_above = self.threshold != math.inf and not score <= self.threshold
        judgement = Judgement.ESCALATE if is_above else Judgement.KEEP
        return judgement, Threshold(self.threshold, self.positions + 1)

    @property
    def max_band(self) -> float:
        """The band from which on every score is borderline: inf, as there is none."""
        return math.inf

    def is_borderline(self, score: float, band: float) -> bool:
        """Return whether a score that differs by `band` could be judged differently."""
        return abs(score - self.threshold) <= band
