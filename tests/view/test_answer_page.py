"""The page of a saved answer in a browser: colours, keyboard, hover and the heat switch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxroute.answers.document import AnswerDocument
from mlxroute.view.answer_html import draw_page
from tests.support.documents import make_document

pytestmark = pytest.mark.heavy


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


@pytest.fixture
def page(browser: Any, document: AnswerDocument, tmp_path: Path) -> Iterator[Any]:
    file = tmp_path / "answer.html"
    file.write_text(draw_page(document), encoding="utf-8")
    page = browser.new_page(viewport={"width": 390, "height": 800})
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("console", lambda message: failures.append(message.text))
    page.goto(file.as_uri())
    yield page
    assert failures == []
    page.close()


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
    current = "document.querySelector('[aria-current]')?.dataset.index"
    for key, index in (("n", "5"), ("n", "7"), ("p", "5"), ("ArrowRight", "6"), ("Home", "0")):
        page.keyboard.press(key)
        assert page.evaluate(current) == index
    page.keyboard.press("Escape")
    assert page.evaluate(current) is None


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
