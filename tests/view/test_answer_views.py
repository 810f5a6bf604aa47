"""Saved answers as text, as a page and as a picture."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from mlxroute.answers.document import AnswerDocument
from mlxroute.answers.record_json import to_json
from mlxroute.errors import LargeRefused
from mlxroute.types import StopReason
from mlxroute.view.answer_html import draw_page, read_token_view
from mlxroute.view.answer_picture import draw_document
from mlxroute.view.answer_text import answer_rows, escalation_rows, shorten_context
from mlxroute.view.word_wrap import Row, print_rows
from tests.support.documents import make_document
from tests.support.recording_terminal import Terminal
from tests.support.scripted_models import EOS, STRADDLING, ScriptedReply

HOSTILE = b"</script><img src=x onerror=alert(1)>\x1b[2J\xe2\x80\xae"


SVG = "{http://www.w3.org/2000/svg}"


def picture_text(picture: str) -> str:
    return "".join(ElementTree.fromstring(picture).itertext())


def lines(rows: list[Row]) -> list[str]:
    return ["".join(segment.text for segment in row).replace("\u00a0", " ") for row in rows]


@pytest.fixture
def document() -> AnswerDocument:
    replies: list[ScriptedReply] = [b"d", b" ", LargeRefused("the server is\x1b[2J down")]
    return make_document(b"a cat sat on a mat.", replies, unsure=(2, 5, 10))


def test_the_text_lists_what_both_models_chose(document: AnswerDocument) -> None:
    text = lines(answer_rows(document, width=80))
    assert text[0].startswith("tiny, asking scripted at threshold 1.0, by entropy (mode wait)")
    assert "> hi?" in text
    assert "a dat sat on a mat." in text
    at = text.index("token 3, after a")
    assert text[at + 1 : at + 4] == [
        '  small  "c" 90%',
        '  large  "d" 61%',
        "  the large model's token replaced the small one's (score 2, threshold 1)",
    ]
    assert "  both chose the same (score 2, threshold 1)" in text
    assert "  unchecked: the server is [2J down (score 2, threshold 1)" in text
    assert "20 tokens, 2 escalated (10%), agreement 50%" in " ".join(text)


def test_the_text_before_a_token_is_kept_where_it_has_no_spaces() -> None:
    text = "植物从空气中吸收二氧化碳，并在阳光下用水把它变成糖，同时放出我们呼吸的氧气"
    assert shorten_context(text) == "…" + text[-32:]
    assert shorten_context("Some words that fill the line, the answer is") == (
        "…fill the line, the answer is"
    )
    family = "👩\u200d👩\u200d👧"
    assert shorten_context(20 * family) == "…" + 6 * family
    assert shorten_context("e" + 40 * "\u0301") == "…" + 32 * "\u0301"


def test_the_text_of_a_stopped_answer_says_that_it_was_stopped(document: AnswerDocument) -> None:
    summary = replace(document.summary, finish_reason=StopReason.CANCELLED)
    text = " ".join(lines(answer_rows(replace(document, summary=summary), width=80)))
    assert text.endswith("1 failed call (refused), stopped before its end")


@pytest.mark.parametrize(("count", "line"), [(0, ""), (1, ""), (3, "after 2 earlier messages")])
def test_the_text_counts_the_messages_before_the_question(
    document: AnswerDocument, count: int, line: str
) -> None:
    prompt = replace(document.prompt, text="hi?")
    asked = replace(document, messages=document.messages * count, prompt=prompt)
    text = lines(answer_rows(asked, width=80))
    assert "> hi?" in text
    assert [row for row in text if row.startswith("after ")] == [line] * bool(line)


@pytest.mark.parametrize("width", [80, 40, 10])
def test_no_row_is_wider_than_the_terminal(document: AnswerDocument, width: int) -> None:
    terminal = Terminal(width=width)
    print_rows(terminal.console, answer_rows(document, width=width))
    # `lines` fails on a control character.
    assert max(map(len, terminal.lines())) <= width


def test_an_answer_without_escalations_says_so() -> None:
    text = lines(escalation_rows(make_document(unsure=()), width=80))
    assert text == ["the large model was asked nowhere in this answer"]


def test_the_page_loads_nothing_and_runs_its_own_script_alone(document: AnswerDocument) -> None:
    page = draw_page(document)
    assert not re.search(r"(?:src|href)=|@import|url\(|https?://(?!127\.0\.0\.1)", page)
    script = page.split('<script type="module">')[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}'" in page
    assert script.startswith(read_token_view())


def test_the_page_holds_the_document_without_the_replies(document: AnswerDocument) -> None:
    data = draw_page(document).split('id="answer">')[1].split("</script>")[0]
    assert json.loads(data) == {**to_json(document), "replies": []}


def test_no_text_of_an_answer_ends_the_script() -> None:
    document = make_document(HOSTILE, messages=[{"role": "user", "content": HOSTILE.decode()}])
    page = draw_page(document)
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert "\x1b" not in page.split('id="answer">')[0]


def test_the_picture_shows_replaced_tokens(document: AnswerDocument) -> None:
    picture = draw_document(document)
    text = picture_text(picture)
    assert "token 3: the small model had c, the large one chose d" in text
    assert "tiny wrote 18 of 20 tokens, scripted the other 2" in " ".join(text.split())
    assert ElementTree.fromstring(draw_document(make_document(HOSTILE))) is not None


def test_the_picture_colours_every_part_of_a_large_token_and_lists_it_once() -> None:
    picture = draw_document(make_document(b"a cx sat", [b"dog"]))
    tspans = ElementTree.fromstring(picture).iter(f"{SVG}tspan")
    spans = [(span.text, span.get("fill")) for span in tspans]
    ((_, fill),) = [span for span in spans if span[0] == "dog"][:1]
    assert fill is not None
    text = picture_text(picture)
    assert text.count("the small model had") == 1
    assert "token 3: the small model had c, the large one chose dog" in text


@pytest.mark.parametrize(
    ("reply", "name"),
    [(tuple("é".encode()), "é"), ((STRADDLING,), "\\xa9\\xc3"), ((EOS,), "the end")],
)
def test_the_picture_names_large_tokens_that_show_nothing_of_their_own(
    reply: ScriptedReply, name: str
) -> None:
    picture = draw_document(make_document(b"a cat", [reply]))
    assert f"token 3: the small model had c, the large one chose {name}\n" in picture_text(picture)


def test_the_picture_does_not_confirm_a_replaced_token_of_which_the_same_text_is_left() -> None:
    document = make_document(b"a cat", [b"d"])
    tokens = [
        replace(token, text="c") if token.decision == "replaced" else token
        for token in document.tokens
    ]
    picture = draw_document(replace(document, tokens=tuple(tokens)))
    assert "the small model had c, the large one chose d" in picture_text(picture)
    assert "both chose the same" not in picture_text(picture)
