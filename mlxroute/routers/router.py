"""Routers: a score of each position, and the state that judges it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlxroute.errors import UsageError
from mlxroute.routers.budget import DEFAULT_BUDGET, Budget
from mlxroute.routers.scores import SCORES
from mlxroute.routers.threshold import Threshold
from mlxroute.types import Signals

# Initial quantiles of a budget without a calibration; real scores soon replace them.
_UNCALIBRATED = (0.0, 1.0)
# Entropies in nats of a 0.5B model, on 945 positions of answers to CommonsenseQA and GSM8K.
_TYPICAL_ENTROPIES = (
    0.0, 0.00044, 0.0018, 0.0052, 0.011, 0.024, 0.079, 0.15, 0.24, 0.39, 0.54, 0.69, 0.82, 0.99,
    1.27, 1.7, 2.61,
)  # fmt: skip


class Router:
    """A score, called `name`, and the router state after the last committed position.

    The state of a budget goes on from answer to answer, so use one router for a conversation.
    """

    def __init__(self, name: str, state: Threshold | Budget) -> None:
        self.name = name
        self.state: Threshold | Budget = state
        self._score = SCORES[name]

    @property
    def gain(self) -> float:
        """Maximum change of the score if logprobs, entropy and head score change by at most 1."""
        return self._score.gain

    def score(self, signals: Signals, position: int) -> float:
        """Return the score of a position, given its signals and its number; higher escalates."""
        return self._score.function(signals, position)


def make_router(
    name: str,
    *,
    threshold: float | None = None,
    budget: float | None = None,
    quantiles: Sequence[float] = _UNCALIBRATED,
) -> Router:
    """Return a router that escalates above a threshold, or within a budget (0.07 is 7 %).

    `quantiles` are the scores of a calibration at evenly spaced ranks, lowest first, with which a
    budget starts. Raises UsageError for an unknown name, and unless exactly one of threshold and
    budget is given.
    """
    if name not in SCORES:
        raise UsageError(
            f"unknown router {name!r}; choose one of {', '.join(SCORES)}", parameter="router"
        )
    return Router(name, _initial_state(name, threshold, budget, quantiles))


def never_escalate() -> Router:
    """Return a router that keeps all tokens of the small model."""
    return Router("entropy", Threshold(math.inf))


def always_escalate() -> Router:
    """Return a router that asks the large model for all tokens."""
    return Router("entropy", Threshold(-math.inf))


class EntropyRouter(Router):
    """Escalates positions where the small model's entropy is high: by default, 7 % of them.

    Args:
        threshold: Entropy in nats over the full vocabulary above which a position is escalated;
            `inf` never escalates and `-inf` always does. None, the default, with a budget.
        budget: Maximum share of positions that are escalated, from 0 to 1 (0.07 is 7 %), plus 4
            positions. None, the default, is 0.07 without a threshold.
        quantiles: Entropies in nats at evenly spaced ranks, lowest first, with which a budget
            starts; by default those of a 0.5B model.

    Raises:
        UsageError: Both threshold and budget are given, or a value is out of range.
    """

    def __init__(
        self,
        threshold: float | None = None,
        *,
        budget: float | None = None,
        quantiles: Sequence[float] = _TYPICAL_ENTROPIES,
    ) -> None:
        if threshold is None and budget is None:
            budget = DEFAULT_BUDGET
        super().__init__("entropy", _initial_state("entropy", threshold, budget, quantiles))


def _initial_state(
    name: str, threshold: float | None, budget: float | None, quantiles: Sequence[float]
) -> Threshold | Budget:
    """Return the state before the first position, for a known name; raise as `make_router`."""
    if threshold is not None and budget is None:
        return Threshold(threshold)
    if budget is not None and threshold is None:
        return Budget.of(budget, quantiles, resolution=SCORES[name].resolution)
    raise UsageError("a router takes either a threshold or a budget")
