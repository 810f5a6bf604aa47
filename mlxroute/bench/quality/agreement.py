"""How far answers agree with the large model's own, for questions without a right answer."""

from __future__ import annotations

import statistics
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from mlxroute.bench.quality.graded_answers import QualityRow
from mlxroute.bench.significance import mean_interval
from mlxroute.statistics import mcnemar_p

_WITHOUT_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


def token_f1(text: str, reference: str) -> float:
    """Return the F1 score of the words of a text against those of a reference, from 0 to 1.

    Words are compared without case and ASCII punctuation, as SQuAD does, and whatever their order.
    Two empty texts agree.
    """
    words, others = (
        words.casefold().translate(_WITHOUT_PUNCTUATION).split() for words in (text, reference)
    )
    if not words or not others:
        return float(words == others)
    shared = sum((Counter(words) & Counter(others)).values())
    return 2 * shared / (len(words) + len(others))


def f1_scores(rows: Sequence[QualityRow], large_rows: Sequence[QualityRow]) -> list[float]:
    """Return the F1 score of each answer against the large model's answer to the same question."""
    return [token_f1(row.text, other.text) for row, other in zip(rows, large_rows, strict=True)]


def agreement_figures(
    rows: Sequence[QualityRow], large_rows: Sequence[QualityRow]
) -> dict[str, Any] | None:
    """Return the mean F1 score with its interval; None if the large model was not measured."""
    if not large_rows:
        return None
    scores = f1_scores(rows, large_rows)
    return {
        "f1": round(statistics.fmean(scores), 4),
        "interval": _rounded(mean_interval(scores)),
        "identical": sum(
            row.text == other.text for row, other in zip(rows, large_rows, strict=True)
        ),
    }


def compare_agreement(
    first: Sequence[QualityRow], second: Sequence[QualityRow], large_rows: Sequence[QualityRow]
) -> dict[str, Any]:
    """Return the comparison of two sides by F1: mean difference, and a sign test of the answers."""
    scores = zip(f1_scores(first, large_rows), f1_scores(second, large_rows), strict=True)
    differences = [a - b for a, b in scores]
    more_first = sum(value > 0 for value in differences)
    more_second = sum(value < 0 for value in differences)
    return {
        "more_first": more_first,
        "more_second": more_second,
        "difference": round(statistics.fmean(differences), 4),
        "interval": _rounded(mean_interval(differences)),
        "p": float(f"{mcnemar_p(more_first, more_second):.3g}"),
    }


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(bound, 4) for bound in interval]
