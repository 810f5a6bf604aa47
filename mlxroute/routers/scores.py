"""What positions are scored by; a higher score is one to escalate.

All are computed from the small model's own signals. Scores of different routers are not on one
scale; a budget works on their ranks, which are.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mlxroute.types import Signals


@dataclass(frozen=True, slots=True)
class Score:
    """`of` gives a position's score from its signals and its number; NaN for broken logits.

    A budget counts it in steps of `resolution`. It moves by at most `gain` where logprobs, entropy
    and a head's score move by 1.
    """

    of: Callable[[Signals, int], float]
    resolution: float
    gain: float


# Terms of the asymptotic series below; above this argument its error is under 1e-12.
_SERIES = ((2, -1 / 12), (4, 1 / 120), (6, -1 / 252), (8, 1 / 240), (10, -1 / 132))
_ASYMPTOTIC = 10.0


def entropy(signals: Signals, number: int) -> float:
    """Entropy in nats over the full vocabulary."""
    return signals.entropy_nats


def margin(signals: Signals, number: int) -> float:
    """1 - (p1 - p2), from 0 to 1."""
    return 1.0 - signals.margin


def max_probability(signals: Signals, number: int) -> float:
    """1 - p1, from 0 to 1."""
    return -math.expm1(signals.top_logprobs[0])


def logu(signals: Signals, number: int) -> float:
    """Aleatoric uncertainty of a Dirichlet distribution whose evidence are the top logits.

    -sum (x_i / S) (psi(x_i + 1) - psi(S + 1)) with S the sum of the k = 8 largest logits, as in
    R2R (arXiv 2505.21600, there k = 10); below ln k. Logits under 0 are no evidence.
    """
    evidence = [max(0.0, logprob + signals.lse) for logprob in signals.top_logprobs]
    total = sum(evidence)
    if not 0 < total < math.inf:
        return math.nan
    shares = ((x / total) * (_digamma(x + 1) - _digamma(total + 1)) for x in evidence)
    return -sum(shares)


def head(signals: Signals, number: int) -> float:
    """A learned head's score; NaN without one."""
    return math.nan if signals.head_score is None else signals.head_score


def chance(signals: Signals, number: int) -> float:
    """A number from 0 to 1 that depends on nothing but the position's number: the control."""
    return random.Random(number).random()


SCORES: Final[dict[str, Score]] = {
    "entropy": Score(entropy, 0.02, 1.0),
    "margin": Score(margin, 0.005, 1.0),
    "max-probability": Score(max_probability, 0.005, 1.0),
    # Of eight logits of some tens; it moves with their differences over their sum.
    "logu": Score(logu, 2e-4, 0.1),
    "head": Score(head, 0.02, 1.0),
    "random": Score(chance, 1e-4, 0.0),
}


def _digamma(x: float) -> float:
    """The derivative of ln gamma, for x > 0: recurrence, then the asymptotic series."""
    shift = 0.0
    while x < _ASYMPTOTIC:
        shift -= 1.0 / x
        x += 1.0
    return shift + math.log(x) - 0.5 / x + sum(c / x**power for power, c in _SERIES)
