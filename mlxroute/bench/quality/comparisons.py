"""Paired comparisons of two sides on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxroute.bench.quality.agreement import compare_agreement, f1_scores
from mlxroute.bench.quality.baselines import BASELINES
from mlxroute.bench.quality.graded_answers import QualityRow
from mlxroute.bench.quality.sides import LARGE, QualitySide
from mlxroute.bench.significance import difference_interval
from mlxroute.statistics import mcnemar_p


def compare_sides(
    pairs: Sequence[tuple[str, str]],
    rows: Mapping[str, Sequence[QualityRow]],
    *,
    has_answers: bool = True,
) -> list[dict[str, Any]]:
    """Return McNemar's test of each pair of sides, by strict and by lenient marks.

    `rows` are the answers of each side, by its name, to the same questions in the same order. If
    these have no right answers, the pairs are compared by their agreement with the large model.
    """
    if not has_answers:
        large_rows = rows[LARGE.name]
        return [
            {
                "first": first,
                "second": second,
                "with_large": compare_agreement(rows[first], rows[second], large_rows),
            }
            for first, second in pairs
        ]
    return [
        {
            "first": first,
            "second": second,
            "strict": compare_marks(
                [row.strict is True for row in rows[first]],
                [row.strict is True for row in rows[second]],
            ),
            "lenient": compare_marks(
                [row.lenient is True for row in rows[first]],
                [row.lenient is True for row in rows[second]],
            ),
        }
        for first, second in pairs
    ]


def pair_with_best_baseline(
    sides: Sequence[QualitySide],
    rows: Mapping[str, Sequence[QualityRow]],
    *,
    has_answers: bool = True,
) -> list[tuple[str, str]]:
    """Return each routed side beside the best baseline of its budget.

    The best one has the most right answers by lenient marks, or else agrees most with the large
    model; being chosen on these questions favours it. Entropy is a baseline for the other routers
    and is compared with the other baselines. A majority of samples is one for each budget.
    """

    def merit(side: QualitySide) -> float:
        own_rows = rows[side.name]
        if has_answers:
            return sum(row.lenient is True for row in own_rows)
        return sum(f1_scores(own_rows, rows[LARGE.name]))

    pairs = []
    for side in sides:
        if side.router is None or side.router in BASELINES[:-1]:
            continue
        baselines = [
            other
            for other in sides
            if other.samples
            or (other.router in BASELINES and other.budget == side.budget and other != side)
        ]
        if baselines:
            pairs.append((side.name, max(baselines, key=merit).name))
    return pairs


def compare_marks(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Return the comparison of two sides, given whether each of their answers is right."""
    pairs = list(zip(first, second, strict=True))
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    low, high = difference_interval(only_first, only_second, len(pairs))
    return {
        "only_first": only_first,
        "only_second": only_second,
        "difference": round((only_first - only_second) / len(pairs), 4),
        "interval": [round(low, 4), round(high, 4)],
        "p": float(f"{mcnemar_p(only_first, only_second):.3g}"),
    }
