"""Scores of positions, computed from the small model's signals; a higher score is escalated first.

Scores of different routers have different scales. A budget compares ranks, which do not.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mlxroute.errors import UsageError
from mlxroute.types import Signals


@dataclass(frozen=True, slots=True)
class Score:
    """A score and its scale.

    `function` returns it for a position's signals and number; NaN for broken logits. A budget
    rounds it to steps of `resolution`. `gain` is its maximum change if logprobs, entropy and
    head score change by at most 1.
    """

    function: Callable[[Signals, int], float]
    resolution: float
    gain: float


# Coefficients of digamma's asymptotic series, by power of 1 / x (Abramowitz and Stegun, 6.3.18);
# its error is below 1e-12 for x >= _ASYMPTOTIC_FROM.
_SERIES = ((2, -1 / 12), (4, 1 / 120), (6, -1 / 252), (8, 1 / 240), (10, -1 / 132))
_ASYMPTOTIC_FROM = 10.0


def entropy(signals: Signals, position: int) -> float:
    """Return the entropy in nats over the full vocabulary."""
    return signals.entropy_nats


def margin(signals: Signals, position: int) -> float:
    """Return 1 - (p1 - p2), from 0 to 1."""
    return 1.0 - signals.margin


def max_probability(signals: Signals, position: int) -> float:
    """Return 1 - p1, from 0 to 1."""
    return -math.expm1(signals.top_logprobs[0])


def logu(signals: Signals, position: int) -> float:
    """Return the aleatoric uncertainty of a Dirichlet distribution over the top logits.

    With the largest logits x_i as evidence and S their sum, it is
    -sum (x_i / S) (psi(x_i + 1) - psi(S + 1)), below ln k for k logits. Logits below 0 count as 0.
    Source: R2R (arXiv 2505.21600), there with k = 10; here k = 8.
    """
    evidence = [max(0.0, logprob + signals.lse) for logprob in signals.top_logprobs]
    total = sum(evidence)
    if not 0 < total < math.inf:
        return math.nan
    summands = ((x / total) * (_digamma(x + 1) - _digamma(total + 1)) for x in evidence)
    return -sum(summands)


def head(signals: Signals, position: int) -> float:
    """Return a learned head's score. Raises UsageError without a head."""
    if signals.head_score is None:
        # As NaN it would escalate every position.
        raise UsageError(
            "the router `head` needs a learned head, and the small model has none; load one with"
            " small.load_head(Path(FILE))",
            parameter="router",
        )
    return signals.head_score


def chance(signals: Signals, position: int) -> float:
    """Return a pseudo-random number from 0 to 1 that depends on the position alone: a control."""
    return random.Random(position).random()


SCORES: Final[dict[str, Score]] = {
    "entropy": Score(entropy, 0.02, 1.0),
    "margin": Score(margin, 0.005, 1.0),
    "max-probability": Score(max_probability, 0.005, 1.0),
    # The sum of its partial derivatives stays below 1 where the logits add up to 20 or more.
    "logu": Score(logu, 2e-4, 1.0),
    "head": Score(head, 0.02, 1.0),
    "random": Score(chance, 1e-4, 0.0),
}


def _digamma(x: float) -> float:
    """Return the derivative of ln gamma for x > 0, by recurrence and asymptotic series."""
    shift = 0.0
    while x < _ASYMPTOTIC_FROM:
        shift -= 1.0 / x
        x += 1.0
    return shift + math.log(x) - 0.5 / x + sum(c / x**power for power, c in _SERIES)
