"""Calibration: which scores the positions of answers have, without any labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.engine import generate
from mlxroute.errors import UsageError
from mlxroute.questions.question_files import Question, question_messages
from mlxroute.routers import SCORES, make_router
from mlxroute.small import SmallModel
from mlxroute.types import Progress, Signals, no_progress

# Ranks 0, 1/64, ... 1.
_STEPS = 64
_FEWEST = 200


def calibrate(
    small: SmallModel,
    questions: Sequence[Question],
    *,
    data: str,
    max_tokens: int,
    progress: Progress = no_progress,
) -> ScoreRanks:
    """Answer the questions with the small model alone and rank its scores, for every router.

    Raises UsageError when that is too little to tell rates from. Once large tokens enter an answer
    the small model's later scores change a little.
    """
    rows: list[Signals] = []
    for done, question in enumerate(questions):
        progress("questions", done, len(questions))
        answer = generate(
            small,
            None,
            question_messages(question),
            router=make_router("entropy", threshold=math.inf),
            max_tokens=max_tokens,
        )
        rows += [token.signals for token in answer]
    if len(rows) < _FEWEST:
        raise UsageError(
            f"{data} gave {len(rows):,} positions, and {_FEWEST} are needed;"
            " give more questions or longer answers"
        )
    return ScoreRanks(
        small=small.name,
        data=data,
        positions=len(rows),
        quantiles={
            name: _quantiles([score.function(row, number) for number, row in enumerate(rows)])
            for name, score in SCORES.items()
            if name != "head"
        },
    )


def _quantiles(scores: Sequence[float]) -> tuple[float, ...]:
    """Scores at the evenly spaced ranks; broken ones are left out."""
    ordered = sorted(score for score in scores if math.isfinite(score))
    last = len(ordered) - 1
    places = (step * last / _STEPS for step in range(_STEPS + 1))
    found = (_between(ordered, place) for place in places)
    # Rounded they must rise as before.
    return tuple(itertools.accumulate((round(value, 5) for value in found), max))


def _between(ordered: Sequence[float], place: float) -> float:
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
