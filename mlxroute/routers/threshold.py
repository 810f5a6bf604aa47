"""A fixed threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlxroute.errors import UsageError
from mlxroute.types import Judgement


@dataclass(frozen=True, slots=True)
class Threshold:
    """Escalates above `threshold`, in the units of the score; `seen` counts positions.

    `inf` never escalates, `-inf` always does. A score that is not a number, from broken logits,
    escalates under every threshold but `inf`.
    """

    threshold: float
    seen: int = 0

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise UsageError("the threshold must be a number, inf or -inf, not nan")

    def judge(self, score: float) -> Judgement:
        """What is to be done at a position with this score."""
        above = self.threshold != math.inf and not score <= self.threshold
        return Judgement.ESCALATE if above else Judgement.KEEP

    def is_near(self, score: float, band: float) -> bool:
        """Whether a score that differs by `band` would be judged otherwise."""
        return abs(score - self.threshold) <= band

    def after(self, score: float) -> Threshold:
        """The state behind a position with this score."""
        return Threshold(self.threshold, self.seen + 1)
