"""The figures of each side: accuracy, gap recovered, and what the answers cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mlxroute.bench.quality.agreement import agreement_figures
from mlxroute.bench.quality.graded_answers import QualityRow
from mlxroute.bench.quality.large_logprobs import logprob_figures
from mlxroute.bench.quality.sides import LARGE, SMALL, QualitySide
from mlxroute.bench.significance import ratio_interval, wilson_interval
from mlxroute.recorded.answer_scores import AnswerScore
from mlxroute.statistics import mcnemar_p


def side_figures(
    side: QualitySide,
    rows: Mapping[str, Sequence[QualityRow]],
    chats: int,
    *,
    max_tokens: int,
    has_answers: bool = True,
    scores: Sequence[AnswerScore | None] = (),
) -> dict[str, Any]:
    """Return the report of one side, given the answers of all sides to the same questions.

    `scores` are the large model's logprobs of the side's answers, if it was asked for them.
    Comparisons with a model alone that is not among the sides are None, and so are the marks if the
    questions have no right answers (`has_answers`).
    """
    own_rows = rows[side.name]
    tokens = sum(row.tokens for row in own_rows)
    escalated = sum(row.escalated for row in own_rows)
    agreed = sum(row.agreed for row in own_rows)
    seconds = [row.seconds for row in own_rows]
    alone = (rows.get(SMALL.name, ()), rows.get(LARGE.name, ()))
    return {
        "router": side.router,
        "budget": side.budget if side.router else None,
        "strict": accuracy_figures(*map(_strict_marks, (own_rows, *alone)))
        if has_answers
        else None,
        "lenient": accuracy_figures(*map(_lenient_marks, (own_rows, *alone)))
        if has_answers
        else None,
        "with_large": agreement_figures(own_rows, alone[1]),
        "by_large": logprob_figures(scores),
        "escalation_rate": round(escalated / tokens, 5) if tokens else 0.0,
        "large_tokens_per_question": round(escalated / len(own_rows), 4),
        "agreement": round(agreed / escalated, 4) if escalated and side.router else None,
        "most_over_budget": _max_excess(own_rows, side.budget, chats) if side.router else None,
        "tokens": tokens,
        "reached_limit": sum(_is_cut_off(row, max_tokens) for row in own_rows),
        "calls": sum(row.calls for row in own_rows),
        "unchecked": sum(row.unchecked for row in own_rows),
        "uploaded_tokens": sum(row.uploaded_tokens for row in own_rows),
        "seconds_median": round(statistics.median(seconds), 3) if seconds else 0,
    }


def _is_cut_off(row: QualityRow, max_tokens: int) -> bool:
    """Return whether an answer was cut off; of earlier versions, whether it has all its tokens."""
    return row.tokens >= max_tokens if row.is_cut_off is None else row.is_cut_off


def _max_excess(rows: Sequence[QualityRow], budget: float, chats: int) -> float:
    """Return the largest excess of escalations over the budget in consecutive answers of a chat.

    This is a maximum-subarray sum (Kadane's algorithm). The token bucket bounds it by its burst.
    """
    largest = 0.0
    for chat in range(chats):
        excess = 0.0
        for row in rows[chat::chats]:
            excess = max(0.0, excess) + row.escalated - budget * row.tokens
            largest = max(largest, excess)
    return round(largest, 3)


def accuracy_figures(
    marks: Sequence[bool | None],
    small_marks: Sequence[bool | None],
    large_marks: Sequence[bool | None],
) -> dict[str, Any]:
    """Return the share of right answers and its place between the models alone.

    A text without an answer (None) counts as wrong and is counted in `no_answer`. `right` has a
    digit for each question, 1 for a right answer, for comparisons with other reports. The marks of
    a model that was not measured are empty.
    """
    own, small, large = (_rights(values) for values in (marks, small_marks, large_marks))
    right, count = sum(own), len(own)
    low, high = wilson_interval(right, count)
    return {
        "accuracy": round(right / count, 4),
        "interval": [round(low, 4), round(high, 4)],
        "no_answer": sum(mark is None for mark in marks),
        "right": "".join(map(str, own)),
        "over_small": round(right / sum(small), 3) if sum(small) else None,
        "p_against_small": _p_value(own, small) if small else None,
        **_gap_recovered(own, small, large),
    }


def _p_value(own: Sequence[int], small: Sequence[int]) -> float:
    pairs = list(zip(own, small, strict=True))
    return float(f"{mcnemar_p(pairs.count((1, 0)), pairs.count((0, 1))):.3g}")


def _gap_recovered(
    own: Sequence[int], small: Sequence[int], large: Sequence[int]
) -> dict[str, Any]:
    """Return (own - small) / (large - small) and its interval.

    Both are None if the large model is not better than the small one, and the interval also if it
    is not better for certain, or if the answers are right where those of one model alone are: the
    normal approximation has no width then.
    """
    if sum(large) <= sum(small) or not small:
        return {"gap_recovered": None, "gap_interval": None}
    gains = [a - b for a, b in zip(own, small, strict=True)]
    gaps = [a - b for a, b in zip(large, small, strict=True)]
    interval = None if own in (small, large) else ratio_interval(gains, gaps)
    return {
        "gap_recovered": round(sum(gains) / sum(gaps), 4),
        "gap_interval": [round(bound, 4) for bound in interval] if interval else None,
    }


def _strict_marks(rows: Sequence[QualityRow]) -> list[bool | None]:
    return [row.strict for row in rows]


def _lenient_marks(rows: Sequence[QualityRow]) -> list[bool | None]:
    return [row.lenient for row in rows]


def _rights(marks: Sequence[bool | None]) -> list[int]:
    """Return 1 for each right answer, else 0."""
    return [int(mark is True) for mark in marks]
