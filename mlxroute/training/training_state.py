"""How far a training has come, what of it is the best, and when it should end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from mlxroute.statistics import standard_error
from mlxroute.training.tuning_types import HeldOutFigures, InterruptedRun

# Training ends when the held-out loss did not fall so many times in a row.
_PATIENCE: Final = 2
# It ends too when the accuracy fell by more than so many of its standard errors: the difference of
# two accuracies on a few questions is often as large as one of them by chance.
_MAX_STANDARD_ERRORS: Final = 2


@dataclass(slots=True)
class TrainingState:
    """What a training has reached.

    Attributes:
        judged: Number of held-out questions behind each accuracy.
        figures: Held-out figures so far, in the order in which they were measured.
        best: Those of the weights that were kept; None before there are any.
        corrections: Figures of the corrected answers, for each on-policy round.
        ended_rounds: How many rounds had ended when the present one began.
        ended_by: What ended the training, as in `TuningOutcome`; empty while it goes on.
    """

    judged: int
    figures: list[HeldOutFigures] = field(default_factory=list)
    best: HeldOutFigures | None = None
    corrections: list[Mapping[str, Any]] = field(default_factory=list)
    ended_rounds: int = 0
    ended_by: str = ""

    def resume(self, run: InterruptedRun) -> None:
        """Start from where an earlier run of the training was interrupted."""
        self.figures = list(run.figures)
        self.best = run.best
        self.corrections = list(run.corrections)
        self.ended_rounds = run.ended_rounds

    def is_best(self, figures: HeldOutFigures) -> bool:
        """Return whether weights have a lower loss than all before in their round.

        `figures`, here and in `end_reason`, come after all that are in the state.
        """
        is_lower = figures.loss < min(item.loss for item in self._of_round(figures.round))
        return is_lower and not self._is_less_accurate(figures)

    def end_reason(self, figures: HeldOutFigures) -> str:
        """Return why the training should end with these figures; empty if it should go on.

        It ends when the accuracy falls more than two standard errors below the highest so far, or
        when twice in a row the loss did not fall.
        """
        if self._is_less_accurate(figures):
            return "held-out accuracy"
        losses = [item.loss for item in (*self._of_round(figures.round), figures)]
        # The first of equal losses is the last that fell.
        since_lowest = len(losses) - 1 - losses.index(min(losses))
        return "held-out loss" if since_lowest >= _PATIENCE else ""

    def _of_round(self, number: int) -> list[HeldOutFigures]:
        return [item for item in self.figures if item.round == number]

    def _is_less_accurate(self, figures: HeldOutFigures) -> bool:
        highest = max(item.accuracy for item in self.figures)
        error = standard_error(highest, self.judged)
        return figures.accuracy < highest - _MAX_STANDARD_ERRORS * error
