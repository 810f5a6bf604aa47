"""Advantages of the large model's token, estimated from few continuations and shrunk."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RightCounts:
    """How many of `samples` continuations were right after each model's token at one position."""

    large: int
    small: int
    samples: int

    @property
    def difference(self) -> float:
        """The share of right ones after the large model's token minus that after the small's."""
        return (self.large - self.small) / self.samples

    @property
    def variance(self) -> float:
        """The squared standard error of the difference.

        Each share p counts one right and one wrong continuation more than there were, and adds
        p (1 - p) / (samples + 2): Agresti and Caffo, Simple and effective confidence intervals for
        proportions and differences of proportions (2000). So it stays above 0 for shares of 0 and
        1.
        """
        count = self.samples + 2
        shares = ((right + 1) / count for right in (self.large, self.small))
        return sum(share * (1 - share) / count for share in shares)

    @property
    def unbiased_variance(self) -> float:
        """The unbiased estimate of the variance of the difference, from at least two samples.

        Each share p adds p (1 - p) / (samples - 1). It is 0 for shares of 0 and 1, and right only
        in the mean over many positions.
        """
        shares = (right / self.samples for right in (self.large, self.small))
        return sum(share * (1 - share) for share in shares) / (self.samples - 1)


def shrink_advantages(counts: Sequence[RightCounts]) -> list[float]:
    """Return the advantages of several positions, each shrunk towards 0 by its standard error.

    A difference d with the variance v becomes d t / (t + v). This is the posterior mean if the true
    advantages are normal around 0 with the variance t, which is estimated from all positions as the
    mean of d^2 minus the unbiased variance of d, and at least 0 (empirical Bayes: Efron and Morris,
    Stein's estimation rule and its competitors, 1973).
    """
    if not counts:
        return []
    # `variance` is too large for shares near 0 and 1, and too small for those near 1/2.
    true_variance = max(
        0.0, statistics.fmean(c.difference**2 - c.unbiased_variance for c in counts)
    )
    return [count.difference * true_variance / (true_variance + count.variance) for count in counts]
