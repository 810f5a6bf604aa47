"""Escalate where the small model's next-token distribution is spread out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlxroute.errors import UsageError
from mlxroute.types import Signals


@dataclass(frozen=True, slots=True)
class EntropyRouter:
    """Escalates where the entropy (nats, full vocabulary) exceeds `threshold`.

    `inf` never escalates, `-inf` always does. A score that is not a number, from broken logits,
    escalates under every threshold but `inf`.
    """

    threshold: float

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise UsageError("the threshold must be a number of nats, inf or -inf, not nan")

    def score(self, signals: Signals) -> float:
        """The position's score; higher means escalate."""
        return signals.entropy_nats

    def escalates(self, score: float) -> bool:
        """Whether a position with this score goes to the large model."""
        return self.threshold != math.inf and not score <= self.threshold
