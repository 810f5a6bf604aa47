"""How far answers agree with the large model's own, for questions without a right answer."""

from __future__ import annotations

import statistics
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from mlxroute.bench.quality.graded_answers import QualityRow
from mlxroute.bench.significance import mean_interval
from mlxroute.statistics import mcnemar_p

# The first letter of the Unicode categories of punctuation and symbols.
_NOT_OF_WORDS: Final = frozenset("PS")


def token_f1(text: str, reference: str) -> float:
    """Return the F1 score of the words of a text against those of a reference, from 0 to 1.

    Words are compared without case, punctuation and symbols, as SQuAD does, and whatever their
    order. Words are what white space separates. Two empty texts agree.
    """
    words, others = _words(text), _words(reference)
    if not words or not others:
        return float(words == others)
    shared = sum((Counter(words) & Counter(others)).values())
    return 2 * shared / (len(words) + len(others))


def _words(text: str) -> list[str]:
    kept = (char for char in text.casefold() if unicodedata.category(char)[0] not in _NOT_OF_WORDS)
    return "".join(kept).split()


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
        "interval": _rounded(mean_interval(scores, low=0.0, high=1.0)),
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
        "interval": _rounded(mean_interval(differences, low=-1.0, high=1.0)),
        "p": float(f"{mcnemar_p(more_first, more_second):.3g}"),
    }


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(bound, 4) for bound in interval]
