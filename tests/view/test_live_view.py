"""Answers on a terminal and in a pipe."""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style

from mlxroute.errors import LargeTimeout
from mlxroute.safe_text import printable
from mlxroute.types import Activity, Provisional, Retracted, RunStats, Source
from mlxroute.view import LiveView, PlainWriter
from mlxroute.view.live_view import heat_style
from mlxroute.view.word_wrap import StyledText, wrap_complete, wrap_growing
from tests.support.recording_terminal import Terminal
from tests.support.scripted_answer import ScriptedAnswer, Step, token

_PIECES = (
    "a", "word", "incomprehensibilities", "don't", "[bold]", "x = 1", "1", ".", ",", "(", ")",
    " ", " ", " ", "   ", "\n", "\n\n", "\t", "日", "本語の文章", "。", "「", "」", "한국어", "👍",
    "👍🏽", "👩‍👩‍👧", "🏳️‍🌈", "🇩🇪", "🇩", "❤️", "1️⃣", "é", "e\u0301", "\u0301", "\u200d", "\ufe0f",
    "ᄒ", "ᅡ", "ก็", "\u200b", "z" + "\u0323\u0301" * 9, "—", "…", "\u00a0",
)  # fmt: skip
texts = st.lists(st.sampled_from(_PIECES), max_size=60).map("".join)
widths = st.integers(10, 120)


def cut(text: str, places: list[int]) -> list[str]:
    """Return the text in pieces, split at any code points, also within a grapheme cluster."""
    edges = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(edges)]


def rows_of(text: str, width: int) -> list[str]:
    return [plain(row) for row in wrap_complete(StyledText().append(text, Style()), width=width)]


def plain(row: list[Segment]) -> str:
    return "".join(segment.text for segment in row)


def without_blanks(text: str) -> str:
    return re.sub(r"[ \t\n]", "", text)


def show(
    terminal: Terminal, steps: list[Step], *, heat: bool = False, threshold: float = 2.0
) -> RunStats:
    answer = ScriptedAnswer(steps)
    return LiveView(terminal.console, heat=heat, threshold=threshold).show(answer)


@given(texts, st.lists(st.integers(0, 500), max_size=40), widths)
def test_growing_text_wraps_to_the_same_rows_as_the_finished_text(
    text: str, places: list[int], width: int
) -> None:
    rest, rows = StyledText(), []
    for piece in cut(text, places):
        full, rest = wrap_growing(rest.append(piece, Style()), width=width)
        rows += full
    rows += wrap_complete(rest, width=width)
    assert [plain(row) for row in rows] == rows_of(text, width)


@given(texts, widths)
def test_rows_fit_the_width_and_lose_only_white_space(text: str, width: int) -> None:
    rows = rows_of(text, width)
    assert all(cell_len(row) <= width for row in rows)
    assert without_blanks("".join(rows)) == without_blanks(text)


@settings(deadline=None)
@given(texts, st.lists(st.integers(0, 500), max_size=40), widths)
def test_the_screen_finally_shows_the_text_as_if_rendered_once(
    text: str, places: list[int], width: int
) -> None:
    terminal = Terminal(width=width)
    show(terminal, list(cut(text, places)))
    expected = rows_of(text, width)
    while expected and not expected[-1]:
        expected.pop()
    assert terminal.lines() == expected


@given(st.lists(st.text("abcdefgh", min_size=1, max_size=10), min_size=1), widths)
def test_plain_words_wrap_as_with_textwrap(words: list[str], width: int) -> None:
    text = " ".join(words)
    assert rows_of(text, width) == textwrap.wrap(text, width)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("one two  three", ["one two", "three"]),
        ("incomprehensible", ["incomprehe", "nsible"]),
        ("an incomprehensible", ["an", "incomprehe", "nsible"]),
        ("if x:\n    go()\n\nend", ["if x:", "    go()", "", "end"]),
        ("    indented", ["    indent", "ed"]),
        ("\tif a:\n\t\tb", ["    if a:", "        b"]),
        ("a\tb", ["a   b"]),
        ("日本語の文章です", ["日本語の文", "章です"]),
        ("日本語の文。です", ["日本語の", "文。です"]),
        ("日本語の「文」", ["日本語の", "「文」"]),
        ("12345678👩‍👩‍👧x", ["12345678", "👩‍👩‍👧x"]),
        ("123456789e\u0301x", ["123456789e\u0301", "x"]),
        ("123456789🇩🇪", ["123456789", "🇩🇪"]),
        ("trailing   \n  ", ["trailing"]),
        ("", []),
    ],
)
def test_rows_of_ten_cells(text: str, rows: list[str]) -> None:
    assert rows_of(text, 10) == rows


def resize(terminal: Terminal, width: int) -> Callable[[ScriptedAnswer], None]:
    def step(answer: ScriptedAnswer) -> None:
        terminal.console.width = width

    return step


@pytest.mark.parametrize("widths", [(60, 20), (20, 60), (11, 80, 13)])
def test_a_resize_in_the_middle_loses_no_text(widths: tuple[int, ...]) -> None:
    terminal = Terminal(width=widths[0])
    words = [f"word{number} " for number in range(60)]
    steps: list[Step] = []
    for number, word in enumerate(words):
        width = widths[number * len(widths) // len(words)]
        steps += [resize(terminal, width), word]
    show(terminal, steps)
    assert without_blanks("".join(terminal.lines())) == without_blanks("".join(words))


@pytest.mark.parametrize(
    ("variables", "erased_rows"), [(["TMUX"], 2), (["TMUX", "STY"], 0), ([], 0)]
)
def test_a_terminal_that_wraps_its_rows_again_is_cleared_of_all_of_them(
    monkeypatch: pytest.MonkeyPatch, variables: list[str], erased_rows: int
) -> None:
    for name in variables:
        monkeypatch.setenv(name, "1")
    terminal = Terminal(width=60)
    # 50 cells take three rows of 20.
    steps: list[Step] = ["word " * 10, resize(terminal, 20), ".", " end"]
    clock = itertools.count().__next__
    LiveView(terminal.console, heat=False, threshold=math.inf, clock=clock).show(
        ScriptedAnswer(steps)
    )
    erasure = "\r\x1b[2K" + "\x1b[1A\x1b[2K" * erased_rows
    # The display itself erases the two rows that it has drawn.
    assert (erasure + "\r\x1b[2K\x1b[1A\x1b[2K" in terminal.raw) == bool(erased_rows)


def test_full_rows_are_written_once_outside_the_live_area() -> None:
    terminal = Terminal(width=20)
    show(terminal, [f"line {number}\n" for number in range(300)])
    assert terminal.lines() == [f"line {number}" for number in range(300)]
    assert all(terminal.raw.count(f"line {number}\n") == 1 for number in range(300))


@given(st.text(st.characters(exclude_categories=())))
def test_no_control_character_of_a_model_reaches_a_terminal(text: str) -> None:
    terminal = Terminal(width=80)
    safe = printable(text)
    safe.encode()
    assert printable(safe) == safe
    LiveView(terminal.console, heat=False, threshold=1.0).show(ScriptedAnswer([text]))
    terminal.lines()
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", terminal.raw)


def test_printable_removes_controls_and_nothing_else() -> None:
    assert printable("a\x1b[31m\r\x07\x00b\x7f\x9bc\u202ed\u2066e") == "a[31mbcde"
    text = "tab\t newline\n é 日本 👩‍👩‍👧 \u200f\u200e [bold]"
    assert printable(text) == text
    assert printable("half \ud83d pair") == "half \ufffd pair"


def test_markup_in_an_answer_is_text() -> None:
    terminal = Terminal(width=60)
    show(terminal, ["[bold]no[/bold] ", "[link=http://x]:smile: ", "[/]"])
    assert terminal.lines() == ["[bold]no[/bold] [link=http://x]:smile: [/]"]


def test_large_tokens_are_coloured_and_underlined() -> None:
    terminal = Terminal(width=60)
    show(terminal, ["small ", token("large", source=Source.LARGE), " small"])
    assert "small \x1b[4;35mlarge\x1b[0m small\n" in terminal.raw


def test_without_colour_large_tokens_are_still_underlined() -> None:
    terminal = Terminal(width=60, no_color=True)
    show(terminal, ["small ", token("large", source=Source.LARGE)])
    assert "small \x1b[4mlarge\x1b[0m\n" in terminal.raw


def test_heat_shades_by_entropy_and_keeps_the_underline() -> None:
    terminal = Terminal(width=60)
    sure, unsure = token("sure ", entropy_nats=0.1), token("unsure ", entropy_nats=3.9)
    large = token("large", source=Source.LARGE, entropy_nats=3.9)
    show(terminal, [sure, unsure, large], heat=True)
    last = terminal.raw.splitlines()[-1]
    assert re.search(r"sure \x1b\[38;2;[0-9;]*48;2;[0-9;]*munsure ", last)
    assert re.search(r"\x1b\[1;4;38;2;[0-9;]*48;2;[0-9;]*mlarge", last)


@pytest.mark.parametrize("threshold", [-math.inf, 0.0, 2.0, 10.0, math.inf])
def test_the_heat_scale_rises_to_one_and_a_half_thresholds_but_at_least_four_nats(
    threshold: float,
) -> None:
    full = 15.0 if threshold == 10.0 else 4.0
    shades = [heat_style(full * step / 100, threshold=threshold) for step in range(130)]
    changes = [a for a, b in pairwise(shades) if a != b]
    assert shades[0].bgcolor is None
    assert len(changes) == len(set(changes)) == 5
    assert shades[99] == shades[-1] != shades[80]


def test_an_entropy_of_nan_has_the_last_shade() -> None:
    assert heat_style(math.nan, threshold=2.0) == heat_style(100.0, threshold=2.0)


def test_every_shade_of_the_heat_scale_is_readable() -> None:
    def luminance(rgb: tuple[int, int, int]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for nats in (1.0, 1.5, 2.2, 3.0, 3.9):
        style = heat_style(nats, threshold=1.0)
        triplets = [color.triplet for color in (style.color, style.bgcolor) if color]
        dark, light = sorted(luminance(triplet) for triplet in triplets if triplet)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def provisional(index: int, text: str) -> Provisional:
    return Provisional(index, 0, text, Source.SMALL, token(text).signals)


def draw_steps(steps: list[Step]) -> tuple[Terminal, list[list[str]]]:
    """Return the terminal after all steps, and its lines after each step."""
    terminal, screens = Terminal(width=20), []

    def capture(answer: ScriptedAnswer) -> None:
        screens.append(terminal.lines()[:-1])

    # The clock advances a second per reading, so every event is drawn at once.
    ticks = iter(range(100_000))
    view = LiveView(terminal.console, heat=False, threshold=1.0, clock=lambda: next(ticks))
    view.show(ScriptedAnswer([action for step in steps for action in (step, capture)]))
    return terminal, screens


def test_provisional_tokens_are_dim_until_they_are_committed() -> None:
    terminal, screens = draw_steps(
        ["a ", provisional(1, "b "), provisional(2, "c"), token("b ", index=1)]
    )
    assert [lines[-1].rstrip() for lines in screens[:4]] == ["a", "a b", "a b c", "a b c"]
    assert "\x1b[2mb c\x1b[0m" in terminal.raw
    assert terminal.lines()[-1].rstrip() == "a b"


def test_retracted_text_is_replaced_by_committed_text() -> None:
    steps: list[Step] = ["a ", provisional(1, "wrong "), provisional(2, "words"), Retracted(1)]
    terminal, screens = draw_steps([*steps, token("right", index=1)])
    assert [lines[-1].rstrip() for lines in screens[2:5]] == ["a wrong words", "a", "a right"]
    assert [line.rstrip() for line in terminal.lines()] == ["a right"]


def test_many_rows_of_provisional_text_leave_no_trace() -> None:
    words = [provisional(index, f"word{index} ") for index in range(1, 60)]
    terminal, _ = draw_steps(["a ", *words, Retracted(1), *words, Retracted(30), Retracted(1)])
    assert [line.rstrip() for line in terminal.lines()] == ["a"]


def test_control_characters_of_provisional_text_do_not_reach_the_terminal() -> None:
    # The terminal of the test fails if one is written.
    _, screens = draw_steps(["a", provisional(1, "\x1b[31mred\x07")])
    assert "red" in screens[1][-1]
    assert not any("\x1b" in line or "\x07" in line for lines in screens for line in lines)


def test_the_status_line_is_updated_during_a_wait_for_the_network() -> None:
    terminal = Terminal(width=80)
    ticks = iter(number / 10 for number in range(10_000))
    updated = threading.Event()

    class Watcher(io.StringIO):
        def write(self, text: str) -> int:
            if "asking the large model 1." in text:
                updated.set()
            return super().write(text)

    def wait(answer: ScriptedAnswer) -> None:
        answer.activity = Activity.WAIT
        assert updated.wait(20), "the status line was not updated"

    terminal.console.file = Watcher()
    view = LiveView(terminal.console, heat=False, threshold=1.0, clock=lambda: next(ticks))
    view.show(ScriptedAnswer(["a", wait, "b"]))


def test_the_status_line_shows_the_progress_of_the_prompt() -> None:
    terminal = Terminal(width=80)
    answer = ScriptedAnswer(["a"])
    answer.prefill_done, answer.prefill_total = 512, 1024
    LiveView(terminal.console, heat=False, threshold=1.0).show(answer)
    assert "reading prompt 512/1,024" in terminal.raw
    assert terminal.lines() == ["a"]


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), LargeTimeout("no reply")])
def test_an_exception_leaves_the_text_and_a_working_terminal(
    raised: BaseException,
) -> None:
    terminal = Terminal(width=20)
    with pytest.raises(type(raised)):
        show(terminal, ["first line\nand then ", "more", raised])
    assert terminal.lines() == ["first line", "and then more"]
    assert terminal.cursor_is_shown
    terminal.console.print("after")
    assert terminal.lines()[-1] == "after"


@pytest.mark.parametrize("call", range(1, 6))
def test_an_interrupt_while_drawing_restores_the_terminal(call: int) -> None:
    terminal = Terminal(width=20)
    calls = []

    class Interrupted(ScriptedAnswer):
        def stats(self) -> RunStats:
            if threading.current_thread() is threading.main_thread():
                calls.append(call)
                if len(calls) == call:
                    raise KeyboardInterrupt
            return super().stats()

    ticks = iter(range(10_000))
    view = LiveView(terminal.console, heat=False, threshold=1.0, clock=lambda: next(ticks))
    with pytest.raises(KeyboardInterrupt):
        view.show(Interrupted(["one ", "two"]))
    assert terminal.cursor_is_shown
    terminal.console.print("after")
    assert terminal.lines()[-1] == "after"


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_plain_text(term: str) -> None:
    terminal = Terminal(width=10, term=term)
    show(terminal, ["a line longer than the terminal ", token("large", source=Source.LARGE)])
    assert terminal.raw == "a line longer than the terminal large\n"


def test_a_terminal_with_another_encoding_gets_plain_text() -> None:
    terminal = Terminal(width=20)
    data = io.BytesIO()
    terminal.console.file = io.TextIOWrapper(data, "iso-8859-1", "backslashreplace")
    show(terminal, ["It\u2019s \u201cone\u201d row"])
    terminal.console.file.flush()
    assert data.getvalue() == rb"It\u2019s \u201cone\u201d row" + b"\n"


@given(st.text("ab\n", max_size=12), st.lists(st.integers(0, 12), max_size=6))
def test_plain_output_ends_with_exactly_one_newline(text: str, places: list[int]) -> None:
    stream = io.StringIO()
    writer = PlainWriter(stream)
    for piece in cut(text, places):
        writer.write(piece)
    writer.finish()
    assert stream.getvalue() == text.rstrip("\n") + "\n"


def test_plain_output_is_flushed_at_once() -> None:
    stream = io.StringIO()
    PlainWriter(stream).write("token")
    assert stream.getvalue() == "token"
