"""Warnings about answers: their texts, and that each kind is given once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from mlxroute.view.answer_warnings import AnswerWarnings, common_warnings
from tests.support.scripted_answer import NO_STATS

_LARGE = SimpleNamespace(model_name="big", neutralised=("<a>", "<b>\x1b", "<c>", "<d>"))


@pytest.mark.parametrize(("show_names", "names"), [(True, "<a>, <b>, <c>"), (False, "4 names")])
def test_names_of_control_tokens_are_shown_only_where_asked_for(
    show_names: bool, names: str
) -> None:
    warnings = common_warnings(None, large=_LARGE, small_name="tiny", show_names=show_names)
    assert warnings.keys() == {"neutralised"}
    assert warnings["neutralised"].startswith(f"big would read {names} as control tokens")


def test_each_kind_of_warning_is_given_once() -> None:
    stats, warnings = replace(NO_STATS, held=True), AnswerWarnings()
    paused = common_warnings(stats, large=None, small_name="tiny", show_names=True)
    assert len(warnings.new_lines(paused)) == 1
    assert warnings.new_lines({"held": "other words", "advice": "ask big"}) == ["ask big"]
    warnings.clear()
    assert len(warnings.new_lines(paused)) == 1
