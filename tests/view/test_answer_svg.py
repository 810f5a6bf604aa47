"""Pictures of answers."""

from __future__ import annotations

import json
import re
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import mlxroute
from mlxroute.view.answer_svg import PicturedToken, draw_answer

_ROOT = Path(mlxroute.__file__).parent.parent
_SVG = "{http://www.w3.org/2000/svg}"
_TOKENS = [
    PicturedToken("Ice"),
    PicturedToken(" floats", small_text=" floats"),
    PicturedToken(" on"),
    PicturedToken(" water", small_text=" <wine>"),
    PicturedToken("", small_text="!\n"),
]
_ODD_TEXTS = [
    "\x1b[31m",
    "\x00",
    "<&>\"'",
    "]]>",
    "\r\n",
    "\ud800",
    "\x9b31m",
    "\u202e",
    "\ufffe",
    "\uffff",
    "a\ufffeb\uffff",
    "\ufeff",
    "\U0001fffe",
    "\U0010ffff",
]


def rows(picture: str) -> list[str]:
    root = ElementTree.fromstring(picture)
    return ["".join(row.itertext()) for row in root.iter(f"{_SVG}text")]


def spans(picture: str) -> list[tuple[str, str | None, str | None]]:
    """Return text, colour and decoration of each span."""
    root = ElementTree.fromstring(picture)
    return [
        (span.text or "", span.get("fill"), span.get("text-decoration"))
        for span in root.iter(f"{_SVG}tspan")
    ]


def test_a_picture_shows_question_answer_replaced_tokens_and_caption() -> None:
    assert rows(draw_answer("Why?", _TOKENS, caption="5 tokens")) == [
        "> Why?",
        "",
        "Ice floats on water",
        "",
        "token 4: the small model had <wine>, the large one chose water",
        "token 5: the small model had !\\n, the large one chose the end",
        "underlined: asked as well, and both chose the same",
        "",
        "5 tokens",
    ]


def test_replaced_tokens_are_coloured_and_all_escalated_ones_underlined() -> None:
    drawn = {
        text: (colour, line) for text, colour, line in spans(draw_answer("?", _TOKENS, caption=""))
    }
    assert drawn["Ice "] == (None, None)
    assert drawn["floats"] == (None, "underline")
    colour, line = drawn["water"]
    assert colour is not None
    assert line == "underline"


def test_light_and_dark_differ_in_colours_only() -> None:
    light, dark = (draw_answer("?", _TOKENS, caption="c", dark=dark) for dark in (False, True))
    assert light != dark
    assert re.sub("#[0-9a-f]{6}", "", light) == re.sub("#[0-9a-f]{6}", "", dark)


def test_rows_wrap_and_lie_inside_the_picture() -> None:
    picture = draw_answer("w" * 90, [PicturedToken(" word") for _ in range(60)], caption="c")
    assert max(map(len, rows(picture))) <= 80
    root = ElementTree.fromstring(picture)
    lowest = max(float(row.get("y", "")) for row in root.iter(f"{_SVG}text"))
    assert lowest < float(root.get("height", ""))


@pytest.mark.parametrize("text", _ODD_TEXTS)
def test_any_text_gives_valid_xml(text: str) -> None:
    tokens = [PicturedToken(text, text + "x", large_text=text), PicturedToken(text, is_part=True)]
    picture = draw_answer(text, tokens, caption=text)
    ElementTree.fromstring(picture.encode())
    assert not set(picture) & set("\x00\x1b\x9b\u202e\ufffe\uffff")


def test_the_text_of_the_answer_describes_the_picture() -> None:
    root = ElementTree.fromstring(draw_answer("Why <ice>?", _TOKENS, caption=""))
    assert [root.findtext(f"{_SVG}{name}") for name in ("title", "desc")] == [
        "Why <ice>?",
        "Ice floats on water",
    ]


@pytest.mark.parametrize(("name", "dark"), [("light", False), ("dark", True)])
def test_the_pictures_of_the_readme_are_those_of_the_recorded_answer(name: str, dark: bool) -> None:
    record = json.loads((_ROOT / "bench" / "results" / "picture.json").read_text(encoding="utf-8"))
    file = _ROOT / "docs" / "images" / f"answer-{name}.svg"
    draw_record = runpy.run_path(str(_ROOT / "bench" / "picture.py"))["draw_record"]
    assert file.read_text(encoding="utf-8") == draw_record(record, dark=dark)
