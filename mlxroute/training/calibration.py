"""Calibration: the distribution of each router's scores, measured without labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final

from mlxroute.catalog.score_ranks import RANK_STEPS, ScoreRanks
from mlxroute.engine import generate
from mlxroute.errors import UsageError
from mlxroute.questions.question_files import Question, question_messages
from mlxroute.routers import SCORES, never_escalate
from mlxroute.small import SmallModel
from mlxroute.statistics import interpolated_quantile
from mlxroute.types import Progress, Signals, no_progress

_MIN_POSITIONS: Final = 200


def calibrate(
    small: SmallModel,
    questions: Sequence[Question],
    *,
    examples: Sequence[Question],
    data: str,
    max_tokens: int,
    progress: Progress = no_progress,
) -> ScoreRanks:
    """Answer the questions with the small model alone and rank each router's scores.

    Scores in routed answers differ a little, because some tokens are the large model's.
    `examples` are worked examples that precede each question. `data` names the questions in the
    result and in errors. Raises UsageError for fewer than 200 positions.
    """
    if (most := len(questions) * max_tokens) < _MIN_POSITIONS:
        raise UsageError(
            f"{data} with at most {max_tokens} tokens give at most {most} positions, and"
            f" {_MIN_POSITIONS} are needed; give more questions or longer answers"
        )
    signals: list[Signals] = []
    for done, question in enumerate(questions):
        progress("questions", done, len(questions))
        answer = generate(
            small,
            None,
            question_messages(question, examples),
            router=never_escalate(),
            max_tokens=max_tokens,
        )
        signals += [token.signals for token in answer]
    if len(signals) < _MIN_POSITIONS:
        raise UsageError(
            f"{data} gave {len(signals):,} positions, and {_MIN_POSITIONS} are needed;"
            " give more questions or longer answers"
        )
    quantiles = {
        name: _quantiles([score.function(row, number) for number, row in enumerate(signals)])
        for name, score in SCORES.items()
        if name != "head"
    }
    return ScoreRanks(
        small=small.name,
        data=data,
        positions=len(signals),
        # A score that is never finite, for one kind of model, cannot be calibrated.
        quantiles={name: values for name, values in quantiles.items() if values},
    )


def _quantiles(scores: Sequence[float]) -> tuple[float, ...]:
    """Return the scores at evenly spaced ranks, without infinities and NaN; () if all are such."""
    ordered = sorted(score for score in scores if math.isfinite(score))
    if not ordered:
        return ()
    quantiles = [interpolated_quantile(ordered, step / RANK_STEPS) for step in range(RANK_STEPS)]
    rounded = (round(value, 5) for value in (*quantiles, ordered[-1]))
    # Interpolation and rounding must not make a later value smaller than an earlier one.
    return tuple(itertools.accumulate(rounded, max))
