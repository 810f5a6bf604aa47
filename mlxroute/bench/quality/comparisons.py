"""Paired comparisons of two sides on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxroute.bench.quality.baselines import BASELINES
from mlxroute.bench.quality.graded_answers import QualityRow
from mlxroute.bench.quality.sides import QualitySide
from mlxroute.bench.significance import difference_interval, mcnemar_p


def compare_sides(
    pairs: Sequence[tuple[str, str]], rows: Mapping[str, Sequence[QualityRow]]
) -> list[dict[str, Any]]:
    """Return McNemar's test of each pair of sides, by strict and by lenient marks.

    `rows` are the answers of each side, by its name, to the same questions in the same order.
    """
    return [
        {
            "first": first,
            "second": second,
            "strict": _compare(
                [row.strict is True for row in rows[first]],
                [row.strict is True for row in rows[second]],
            ),
            "lenient": _compare(
                [row.lenient is True for row in rows[first]],
                [row.lenient is True for row in rows[second]],
            ),
        }
        for first, second in pairs
    ]


def pair_with_best_baseline(
    sides: Sequence[QualitySide], rows: Mapping[str, Sequence[QualityRow]]
) -> list[tuple[str, str]]:
    """Return each routed side beside the best baseline of its budget, by lenient marks.

    Entropy is a baseline for the other routers and is compared with the other baselines. Being
    chosen on these questions favours the baseline.
    """
    pairs = []
    for side in sides:
        if side.router is None or side.router in BASELINES[:-1]:
            continue
        baselines = [
            other
            for other in sides
            if other.router in BASELINES and other.budget == side.budget and other != side
        ]
        if baselines:
            best = max(baselines, key=lambda other: _count_right(rows[other.name]))
            pairs.append((side.name, best.name))
    return pairs


def _count_right(rows: Sequence[QualityRow]) -> int:
    return sum(row.lenient is True for row in rows)


def _compare(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
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
