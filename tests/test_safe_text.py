"""Text that is made safe for a terminal stays the text that was written."""

from __future__ import annotations

import pytest

from mlxroute.safe_text import printable_line

_PERSIAN = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
_FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"


@pytest.mark.parametrize("text", [_PERSIAN, _FAMILY, f"{_PERSIAN} {_FAMILY}"])
def test_joined_characters_stay_joined_in_a_line(text: str) -> None:
    assert printable_line(f" {text}\n") == text


def test_other_invisible_characters_become_spaces_in_a_line() -> None:
    assert printable_line("a\u200bb\u200fc\u202ed\u2060e\ufefff\x1b[2J\n\tg") == "a b c d e f [2J g"


def test_a_line_is_cut_at_its_limit() -> None:
    assert printable_line("word " * 99, limit=10) == "word word…"
    assert len(printable_line(_FAMILY * 99, limit=10)) == 10
