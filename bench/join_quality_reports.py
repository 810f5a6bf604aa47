"""Join two reports of `mlxroute bench quality` about different questions of one set.

    python bench/join_quality_reports.py FIRST.json SECOND.json NEW.json

Both must have the same sides, settings and form of the questions; `--chats` may differ. Figures
that need the single answers, such as medians, are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxroute.bench.quality.comparisons import compare_marks
from mlxroute.bench.quality.side_figures import accuracy_figures

_SAME = ("small", "large", "examples", "form", "tokens", "accept_within")
_SUMS = ("tokens", "reached_limit", "calls", "unchecked", "uploaded_tokens")
_MARKS = ("strict", "lenient")


def join_reports(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of the questions of both. Raises SystemExit if they do not fit."""
    for key in _SAME:
        if first[key] != second[key]:
            raise SystemExit(f"the reports differ in {key}: {first[key]!r} and {second[key]!r}")
    parts = [side for report in (first, second) for side in report["sides"].values()]
    if any(side["lenient"] is None for side in parts):
        raise SystemExit("reports of questions without right answers cannot be joined")
    if list(first["sides"]) != list(second["sides"]):
        raise SystemExit("the reports have different sides")
    sides = {name: _join_sides(first["sides"], second["sides"], name) for name in first["sides"]}
    return {
        "machine": first["machine"],
        **{key: first[key] for key in _SAME},
        "questions": first["questions"] + second["questions"],
        "sides": sides,
        "comparisons": [
            {
                "first": item["first"],
                "second": item["second"],
                **{
                    marks: compare_marks(
                        *(
                            [digit == "1" for digit in sides[item[end]][marks]["right"]]
                            for end in ("first", "second")
                        )
                    )
                    for marks in _MARKS
                },
            }
            for item in first["comparisons"]
        ],
    }


def _join_sides(first: Mapping[str, Any], second: Mapping[str, Any], name: str) -> dict[str, Any]:
    sides = (first[name], second[name])
    sums = {key: sum(side[key] for side in sides) for key in _SUMS}
    counts = [len(side["lenient"]["right"]) for side in sides]
    escalated = sum(
        count * side["large_tokens_per_question"] for count, side in zip(counts, sides, strict=True)
    )
    return {
        "router": sides[0]["router"],
        "budget": sides[0]["budget"],
        **{
            marks: accuracy_figures(
                *(
                    [mark for part in (first, second) for mark in _marks(part[model][marks])]
                    for model in (name, "small", "large")
                )
            )
            for marks in _MARKS
        },
        "escalation_rate": round(escalated / sums["tokens"], 5),
        "large_tokens_per_question": round(escalated / sum(counts), 4),
        **sums,
    }


def _marks(figures: Mapping[str, Any]) -> list[bool | None]:
    """Return the marks; the first wrong answers stand for those that gave no answer."""
    left = figures["no_answer"]
    marks: list[bool | None] = []
    for digit in figures["right"]:
        is_none = digit == "0" and left > 0
        left -= is_none
        marks.append(None if is_none else digit == "1")
    return marks


def main() -> None:
    """Join the reports that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args()
    files = (given.first, given.second)
    first, second = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    report = {
        "command": f"python bench/join_quality_reports.py {given.first.name} {given.second.name}",
        "parts": [file.name for file in files],
        "data": first["data"],
        **join_reports(first, second),
    }
    given.new.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
