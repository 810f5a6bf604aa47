"""Two reports of `bench quality` about different questions, joined."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

_BENCH = Path(__file__).parents[2] / "bench"
_RESULTS = _BENCH / "results"
_NAME = "quality-qwen2.5-coder-0.5b-humaneval"


_SCRIPT = runpy.run_path(str(_BENCH / "join_quality_reports.py"))
join_reports, _SAME = _SCRIPT["join_reports"], _SCRIPT["_SAME"]


def _read(part: str) -> dict[str, Any]:
    text = (_RESULTS / f"{_NAME}{part}.json").read_text(encoding="utf-8")
    report: dict[str, Any] = json.loads(text)
    return report


def test_the_joined_report_has_the_questions_of_both() -> None:
    first, rest = _read("-first"), _read("-rest")
    joined = join_reports(first, rest)
    assert joined["questions"] == first["questions"] + rest["questions"] == 164
    for name, side in joined["sides"].items():
        parts = [report["sides"][name] for report in (first, rest)]
        for marks in ("strict", "lenient"):
            rights = "".join(part[marks]["right"] for part in parts)
            assert side[marks]["right"] == rights
            assert side[marks]["accuracy"] == round(rights.count("1") / 164, 4)
            assert side[marks]["no_answer"] == sum(part[marks]["no_answer"] for part in parts)
        assert side["tokens"] == sum(part["tokens"] for part in parts)
    first_pair, rest_pair = (report["comparisons"][0]["lenient"] for report in (first, rest))
    for only in ("only_first", "only_second"):
        assert joined["comparisons"][0]["lenient"][only] == first_pair[only] + rest_pair[only]


def test_a_report_joined_with_no_other_question_keeps_its_figures() -> None:
    rest = _read("-rest")
    empty = json.loads(json.dumps(rest))
    for side in empty["sides"].values():
        side.update(dict.fromkeys(("tokens", "reached_limit", "calls"), 0))
        side.update(unchecked=0, uploaded_tokens=0)
        for marks in ("strict", "lenient"):
            side[marks].update(right="", no_answer=0)
    joined = join_reports(rest, {**empty, "questions": 0})
    for name, side in joined["sides"].items():
        assert side["lenient"] == rest["sides"][name]["lenient"]
        assert side["escalation_rate"] == pytest.approx(
            rest["sides"][name]["escalation_rate"], abs=2e-5
        )
    assert joined["comparisons"] == rest["comparisons"]


def test_the_shipped_report_is_joined_from_its_parts() -> None:
    shipped = _read("")
    joined = join_reports(_read("-first"), _read("-rest"))
    assert {key: shipped[key] for key in joined} == joined


def test_reports_without_right_answers_are_refused() -> None:
    name = "quality-qwen2.5-coder-0.5b-questions-open.json"
    report = json.loads((_RESULTS / name).read_text(encoding="utf-8"))
    graded = {**_read("-first"), **{key: report[key] for key in _SAME}}
    for first, second in ((report, report), (graded, report), (report, graded)):
        with pytest.raises(SystemExit, match="without right answers cannot be joined"):
            join_reports(first, second)


@pytest.mark.parametrize("key", ["large", "form", "tokens"])
def test_reports_of_different_settings_are_refused(key: str) -> None:
    with pytest.raises(SystemExit, match=f"the reports differ in {key}"):
        join_reports(_read("-first"), {**_read("-rest"), key: "other"})
