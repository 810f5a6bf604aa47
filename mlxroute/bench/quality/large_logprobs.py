"""The large model's own logprob of the answers, for questions without a right answer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mlxroute.bench.quality.graded_answers import QualityRow
from mlxroute.bench.significance import mean_interval
from mlxroute.recorded.answer_scores import AnswerScore, AnswerScores, score_answers
from mlxroute.recorded.recording_large import RecordingLarge
from mlxroute.small import SmallModel
from mlxroute.types import Message, Progress

SideScores = Mapping[str, Sequence[AnswerScore | None]]
"""The score of each answer by the name of its side, None where the server gave none."""


def score_sides(
    small: SmallModel,
    large: RecordingLarge,
    scores: AnswerScores,
    conversations: Sequence[Sequence[Message]],
    rows: Mapping[str, Sequence[QualityRow]],
    progress: Progress,
) -> tuple[SideScores, dict[str, Any] | None]:
    """Return the large model's scores of the answers of all sides, and the report of those missing.

    `rows` are the answers of each side, by its name, to the conversations in their order. The
    report is None if no score is missing.
    """
    answers = [
        (conversation, side_rows[number].text)
        for number, conversation in enumerate(conversations)
        for side_rows in rows.values()
    ]
    values, reason = score_answers(small, large, scores, answers, progress=progress)
    by_side = {name: values[number :: len(rows)] for number, name in enumerate(rows)}
    missing = values.count(None)
    return by_side, {"answers": missing, "reason": reason} if missing else None


def logprob_figures(scores: Sequence[AnswerScore | None]) -> dict[str, Any] | None:
    """Return the mean over answers of the mean logprob of a token, in nats, with its interval.

    Answers without text or score do not count; None if all are such.
    """
    logprobs = [score.token_logprob for score in scores if score is not None]
    values = [logprob for logprob in logprobs if logprob is not None]
    if not values:
        return None
    return {
        "token_logprob": round(statistics.fmean(values), 4),
        "interval": [round(bound, 4) for bound in mean_interval(values)],
        "answers": len(values),
    }
