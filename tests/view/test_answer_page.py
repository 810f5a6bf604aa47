"""Tokens in a browser: of a saved answer and of a running one; colours, keyboard, hover, heat."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxroute.answers.document import AnswerDocument
from mlxroute.view.answer_html import draw_page, read_token_view
from tests.support.documents import make_document

pytestmark = pytest.mark.heavy

_RUNNING_PAGE = """<!DOCTYPE html><meta charset="utf-8"><button id="other">Other</button>
<div id="text"></div><div id="detail"></div><script type="module">{script}
const kept = {{ source: "small", decision: "kept", checked: true }};
const view = new TokenView(document.getElementById("text"), document.getElementById("detail"));
window.append = (index, text) => view.append({{ ...kept, index, text }});
window.appendProvisional = (index, text) => view.appendProvisional({{ ...kept, index, text }});
window.retract = (index) => view.retract(index);
</script>"""
_CURRENT = "document.querySelector('[aria-current]')?.dataset.index"
_FOCUSED = "document.activeElement.dataset.index"
_STOPS = "[...document.querySelectorAll('[tabindex=\"0\"]')].map((node) => node.dataset.index)"

_ARABIC = [{"role": role, "content": "ما هذا؟"} for role in ("user", "assistant", "user")]
# The right edges of the first character of an element, of its last one, and of the element.
_ENDS = """node => {
  const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) if (walker.currentNode.length) texts.push(walker.currentNode);
  const right = (text, at) => {
    const range = document.createRange();
    range.setStart(text, at);
    range.setEnd(text, at + 1);
    return range.getBoundingClientRect().right;
  };
  const last = texts.at(-1);
  return [right(texts[0], 0), right(last, last.length - 1), node.getBoundingClientRect().right];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or pytest.skip("there is no chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def document() -> AnswerDocument:
    return make_document(b"a <b>cat</b> sat.", [b"d", b"t"], unsure=(5, 7))


@contextmanager
def opened(browser: Any, html: str, folder: Path) -> Iterator[Any]:
    file = folder / "answer.html"
    file.write_text(html, encoding="utf-8")
    page = browser.new_page(viewport={"width": 390, "height": 800})
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("console", lambda message: failures.append(message.text))
    page.goto(file.as_uri())
    yield page
    assert failures == []
    page.close()


@pytest.fixture
def page(browser: Any, document: AnswerDocument, tmp_path: Path) -> Iterator[Any]:
    with opened(browser, draw_page(document), tmp_path) as page:
        yield page


@pytest.fixture
def running(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The tokens of a running answer: two that are committed, two that are provisional."""
    with opened(browser, _RUNNING_PAGE.format(script=read_token_view()), tmp_path) as page:
        for index, text in enumerate(("One", " two")):
            page.evaluate("([index, text]) => append(index, text)", [index, text])
        for index, text in enumerate((" three", " four"), start=2):
            page.evaluate("([index, text]) => appendProvisional(index, text)", [index, text])
        yield page


def test_every_token_shows_its_source(page: Any, document: AnswerDocument) -> None:
    tokens = page.eval_on_selector_all(
        ".tv-tokens .tv-token",
        "nodes => nodes.map(n => [n.textContent, n.dataset.source, n.dataset.decision])",
    )
    assert tokens == [[t.text, t.source.value, t.decision.value] for t in document.tokens]
    colours = page.eval_on_selector_all(
        ".tv-tokens .tv-word", "nodes => nodes.map(node => getComputedStyle(node).color)"
    )
    by_source = {
        token.source: colour for token, colour in zip(document.tokens, colours, strict=True)
    }
    assert len(set(by_source.values())) == 2


def test_keys_move_between_the_positions_that_were_asked_for(page: Any) -> None:
    page.focus(".tv-token[tabindex='0']")
    for key, index in (("n", "5"), ("n", "7"), ("p", "5"), ("ArrowRight", "6"), ("Home", "0")):
        page.keyboard.press(key)
        assert page.evaluate(_CURRENT) == index
    page.keyboard.press("Escape")
    assert page.evaluate(_CURRENT) is None


def test_pointing_at_a_token_shows_both_choices_and_the_decision(page: Any) -> None:
    page.hover(".tv-token[data-index='5']")
    detail = page.inner_text("aside")
    assert "its token replaced the small model's" in detail
    assert page.inner_text(".tv-by-small li").split() == ["c", "90", "%"]
    assert page.inner_text(".tv-by-large li").split() == ["d", "61", "%", "✓"]


def test_heat_shades_unsure_tokens_and_nothing_is_wider_than_the_screen(page: Any) -> None:
    word = "document.querySelector('[data-index=\"7\"] .tv-word')"
    colour = f"getComputedStyle({word}).backgroundColor"
    before = page.evaluate(colour)
    page.check("input[role=switch]")
    assert page.evaluate(colour) != before
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")


def test_a_token_keeps_the_focus_when_it_is_committed(running: Any) -> None:
    running.focus("[data-index='0']")
    running.keyboard.press("End")
    running.evaluate("append(2, ' 3')")
    running.evaluate("append(3, ' 4')")
    assert running.evaluate(_FOCUSED) == running.evaluate(_CURRENT) == "3"
    assert running.inner_text("#detail h2 code") == "␣4"
    running.keyboard.press("ArrowLeft")
    assert running.evaluate(_FOCUSED) == running.evaluate(_CURRENT) == "2"
    assert running.evaluate(_STOPS) == ["2"]


def test_a_commit_neither_takes_the_focus_nor_the_way_to_it(running: Any) -> None:
    running.focus("[data-index='3']")
    running.keyboard.press("Escape")
    running.focus("#other")
    running.evaluate("append(0, 'Uno')")
    running.evaluate("append(3, ' 4')")
    assert running.evaluate("document.activeElement.id") == "other"
    assert running.evaluate(_STOPS) == ["3"]
    assert running.evaluate(_CURRENT) is None
    running.keyboard.press("Tab")
    assert running.evaluate(_FOCUSED) == "3"


def test_the_last_token_that_remains_can_be_reached_after_a_retraction(running: Any) -> None:
    running.focus("[data-index='3']")
    running.focus("#other")
    running.evaluate("retract(2)")
    running.evaluate("append(2, ' 3')")
    assert running.evaluate("document.activeElement.id") == "other"
    assert running.evaluate(_STOPS) == ["1"]
    running.keyboard.press("Tab")
    assert running.evaluate(_FOCUSED) == running.evaluate(_CURRENT) == "1"


@pytest.mark.parametrize("key", [None, "Tab"])
def test_the_focus_of_a_retracted_token_moves_to_the_last_that_remains(
    running: Any, key: str | None
) -> None:
    running.focus("[data-index='3']")
    if key:
        # The button that closes its detail has the focus.
        running.keyboard.press(key)
    running.evaluate("retract(2)")
    assert running.evaluate(_FOCUSED) == running.evaluate(_CURRENT) == "1"
    running.keyboard.press("ArrowLeft")
    assert running.evaluate(_FOCUSED) == "0"


def test_the_first_new_token_gets_the_focus_that_retractions_took(running: Any) -> None:
    running.focus("[data-index='3']")
    running.evaluate("retract(0)")
    assert running.evaluate(_CURRENT) is None
    running.evaluate("appendProvisional(0, 'Un')")
    assert running.evaluate(_FOCUSED) == running.evaluate(_CURRENT) == "0"
    running.evaluate("retract(0)")
    running.focus("#other")
    running.evaluate("append(0, 'Un')")
    assert running.evaluate("document.activeElement.id") == "other"
    assert running.evaluate(_STOPS) == ["0"]


def test_the_focus_goes_from_a_closed_detail_to_its_token(running: Any) -> None:
    running.focus("[data-index='2']")
    running.keyboard.press("Tab")
    running.evaluate("append(2, ' 3')")
    assert running.evaluate("document.activeElement.className") == "tv-close"
    running.keyboard.press("Enter")
    assert running.evaluate(_FOCUSED) == "2"
    assert running.evaluate(_CURRENT) is None
    assert running.locator("#detail h2").count() == 0
    running.keyboard.press("ArrowLeft")
    assert running.evaluate(_FOCUSED) == running.evaluate(_CURRENT) == "1"


def test_text_from_right_to_left_begins_at_the_right(browser: Any, tmp_path: Path) -> None:
    document = make_document("هذه قطة.".encode(), messages=_ARABIC, unsure=())
    with opened(browser, draw_page(document), tmp_path) as page:
        page.click("summary")
        for selector in ("h1", ".tv-earlier pre", ".tv-tokens"):
            first, last, edge = page.locator(selector).first.evaluate(_ENDS)
            assert last < first
            assert edge - first < 1


def test_both_choices_of_a_position_stand_in_their_order(browser: Any, tmp_path: Path) -> None:
    document = make_document(b"ab", [tuple("قطة".encode())], unsure=(1,))
    (position,) = (token for token in document.tokens if token.decision == "replaced")
    assert position.small is not None
    small = replace(position.small, text="كلب")
    tokens = [replace(t, small=small) if t is position else t for t in document.tokens]
    with opened(browser, draw_page(replace(document, tokens=tuple(tokens))), tmp_path) as page:
        left, right = (code.bounding_box() for code in page.locator(".tv-asked code").all())
        assert left["x"] + left["width"] <= right["x"]
