"""What counts as a number: in running text, and as a whole answer."""

from __future__ import annotations

import pytest

from mlxroute.questions.answer_patterns import NUMBER, is_number, parse_number


@pytest.mark.parametrize("text", ["7", "-7", "1,800", "1,800.50", " .5 ", ",5", "-,5"])
def test_a_whole_answer_is_a_number(text: str) -> None:
    assert is_number(text)


@pytest.mark.parametrize("text", ["", ",", "1,", "5.", "1 2", "$5", ",-5", "seven"])
def test_a_whole_answer_is_not_a_number(text: str) -> None:
    assert not is_number(text)


def test_a_number_in_running_text_includes_a_comma_after_it_but_none_before() -> None:
    assert NUMBER.findall("at 1,800, or ,5") == ["1,800,", "5"]
    assert parse_number("at 1,800, or so") == 1800
    assert parse_number("none") is None
