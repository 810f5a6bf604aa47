"""A router: what positions are scored by, and the pace at which they are escalated."""

from __future__ import annotations

from collections.abc import Sequence

from mlxroute.errors import UsageError
from mlxroute.routers.budget import Budget
from mlxroute.routers.scores import SCORES
from mlxroute.routers.threshold import Threshold
from mlxroute.types import Signals

# Where nothing is known of a router's scores with a model: any order of size will do to begin with.
_UNKNOWN = (0.0, 1.0)


class Router:
    """Scores positions by `name`; `pace` is its state behind the last committed one.

    With a budget the state goes on from answer to answer: use one router for a conversation.
    """

    def __init__(self, name: str, pace: Threshold | Budget) -> None:
        self.name = name
        self.pace: Threshold | Budget = pace
        self._score = SCORES[name]

    @property
    def gain(self) -> float:
        """By how much the score moves at most where logprobs, entropy and head move by 1."""
        return self._score.gain

    def score(self, signals: Signals, number: int) -> float:
        """The score of the position with this number; higher means escalate."""
        return self._score.of(signals, number)


def make_router(
    name: str,
    *,
    threshold: float | None = None,
    budget: float | None = None,
    quantiles: Sequence[float] = _UNKNOWN,
) -> Router:
    """A router that escalates above a threshold, or within a budget (0.07 for 7 %).

    `quantiles` are scores at evenly spaced ranks, lowest first, from a calibration; a budget starts
    from them. Raises UsageError unless exactly one of the two is given.
    """
    if name not in SCORES:
        raise UsageError(f"no router named {name!r}; there are: {', '.join(SCORES)}")
    if (threshold is None) == (budget is None):
        raise UsageError("a router takes either a threshold or a budget")
    if threshold is not None:
        return Router(name, Threshold(threshold))
    assert budget is not None
    return Router(name, Budget.of(budget, quantiles, resolution=SCORES[name].resolution))


class EntropyRouter(Router):
    """Escalates where the entropy (nats, full vocabulary) exceeds `threshold`, or by a budget.

    `inf` never escalates, `-inf` always does. `budget` is a share, 0.07 for 7 %.
    """

    def __init__(
        self,
        threshold: float | None = None,
        *,
        budget: float | None = None,
        quantiles: Sequence[float] = _UNKNOWN,
    ) -> None:
        """Raises UsageError unless exactly one of threshold and budget is given."""
        made = make_router("entropy", threshold=threshold, budget=budget, quantiles=quantiles)
        super().__init__(made.name, made.pace)
