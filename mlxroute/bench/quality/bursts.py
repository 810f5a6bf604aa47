"""Bursts: an experiment that escalates the positions after a disagreement of the models too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mlxroute.routers import Budget
from mlxroute.routers.scores import SCORES
from mlxroute.serving.concurrent_answers import AnswerRow
from mlxroute.types import Judgement, Signals

BURST_ROUTER: Final = "burst"
"""Name of the router, which only `bench quality` has."""
SCORE: Final = "entropy"
"""Name of the score outside of bursts."""
# Added to the score of a position in a burst; entropies are far below.
_IN_BURST: Final = 1000.0
# A burst ends after so many agreements in a row.
_AGREEMENTS: Final = 2


@dataclass(frozen=True, slots=True)
class BurstState:
    """A budget that also escalates scores that say so, as long as it has room."""

    budget: Budget
    has_escalated: bool = False

    @property
    def threshold(self) -> float:
        return self.budget.threshold

    @property
    def positions(self) -> int:
        return self.budget.positions

    def decide(self, score: float) -> tuple[Judgement, BurstState]:
        """Judge the next position; return the judgement and the state after it."""
        in_burst = score >= _IN_BURST
        judgement, budget = self.budget.decide(
            score - _IN_BURST if in_burst else score, is_due=in_burst
        )
        return judgement, BurstState(budget, judgement is Judgement.ESCALATE)

    def is_borderline(self, score: float, band: float) -> bool:
        return self.budget.is_borderline(score, band)


class BurstRouter:
    """Escalates by entropy, and after a disagreement until the models agree twice in a row.

    A burst also ends where the budget has no room.
    """

    name = BURST_ROUTER
    gain = SCORES[SCORE].gain

    def __init__(self, budget: float, quantiles: Sequence[float]) -> None:
        score = SCORES[SCORE]
        self.state = BurstState(Budget.of(budget, quantiles, resolution=score.resolution))
        self._score = score.function
        self._row: AnswerRow | None = None
        self._agreements = _AGREEMENTS
        self._small_id: int | None = None
        self._length = 0

    def begin_answer(self, row: AnswerRow) -> None:
        """Start an answer, which is written with this row as its small model."""
        self._row = row
        self._agreements = _AGREEMENTS
        self._small_id = None

    def score(self, signals: Signals, position: int) -> float:
        """Return the score of the next position of the answer that was begun last."""
        assert self._row is not None
        answer_ids = self._row.answer_ids
        if self._small_id is not None:
            self._end_position(tuple(answer_ids[self._length :]))
        self._small_id, self._length = signals.token_id, len(answer_ids)
        score = self._score(signals, position)
        return score + _IN_BURST if self._agreements < _AGREEMENTS else score

    def _end_position(self, token_ids: tuple[int, ...]) -> None:
        """Count the agreement or disagreement of the position that has these ids."""
        if not self.state.has_escalated:
            self._agreements = _AGREEMENTS
        elif token_ids != (self._small_id,):
            self._agreements = 0
        else:
            self._agreements = min(_AGREEMENTS, self._agreements + 1)
