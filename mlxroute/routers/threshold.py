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

    def decide(self, score: float) -> tuple[Judgement, Threshold]:
        """What is to be done at a position with this score, and the state behind it."""
        above = self.threshold != math.inf and not score <= self.threshold
        judgement = Judgement.ESCALATE if above else Judgement.KEEP
        return judgement, Threshold(self.threshold, self.seen + 1)

    def is_near(self, score: float, band: float) -> bool:
        """Whether a score that differs by `band` would be judged otherwise."""
        return abs(score - self.threshold) <= band
