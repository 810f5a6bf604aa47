"""The page at `/` in a browser: streamed tokens, their choices, the settings, and failures."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import pytest
import uvicorn

from mlxroute.answers.document import AnswerDocument
from mlxroute.answers.document_file import parse_document
from mlxroute.serving.http.endpoint_app import create_app
from mlxroute.serving.http.guard import AccessRules
from mlxroute.small import SmallModel
from mlxroute.types import LargeContext, LargeToken, Mode
from tests.support.endpoint import make_session
from tests.support.scripted_models import FakeCall, ScriptedLarge

pytestmark = pytest.mark.heavy

_CALL_S = 0.1
_TOKENS = 60
_WAIT_MS = 20_000
# The page leaves them out.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class SlowLarge(ScriptedLarge):
    """A large model that always chooses one token, after a while."""

    def __init__(self, token_id: int, text: str) -> None:
        super().__init__([(token_id,)])
        self._text = text

    def begin(self, context: LargeContext, *, deadline_s: float, prefetch: int) -> FakeCall:
        super().begin(context, deadline_s=deadline_s, prefetch=prefetch)
        return _TimedCall(self._token(), ready_s=time.perf_counter() + _CALL_S, clock=None)

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        end_s = time.perf_counter() + timeout_s
        while not ready() and time.perf_counter() < end_s:
            time.sleep(0.005)

    def _token(self) -> LargeToken:
        token = self._tokens(b"?")
        assert isinstance(token, LargeToken)
        top = ((self._text, -0.5), ("<b>", -1.5), (" z", -2.0))
        return replace(token, token_ids=self._ids, text=self._text, top=top)

    @property
    def _ids(self) -> tuple[int, ...]:
        reply = self._replies[0]
        assert isinstance(reply, tuple)
        return reply


class _TimedCall(FakeCall):
    @property
    def ready(self) -> bool:
        return time.perf_counter() >= self.ready_s


@contextmanager
def serving(small: SmallModel, *, keys: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the address of an endpoint with a slow large model."""
    token_id = small.vocabulary.encode(" fox")[0]
    text = small.vocabulary.token_bytes(token_id).decode()
    session = make_session(small, SlowLarge(token_id, text), max_tokens=_TOKENS)
    session = replace(session, options=replace(session.options, mode=Mode.OVERLAP))
    app = create_app(session, rules=AccessRules(keys=keys))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def address(small: SmallModel) -> Iterator[str]:
    with serving(small) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or pytest.skip("there is no chromium")
    arguments = ["--no-sandbox", "--no-proxy-server"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@dataclass
class Chat:
    """The page, and the requests for answers that it has made."""

    page: Any
    address: str
    bodies: list[dict[str, Any]]
    ids: list[str]

    def ask(self, question: str = "the quick brown fox") -> None:
        """Send a message and wait for the end of its answer."""
        self.send(question)
        self.wait_for_end()

    def send(self, question: str) -> None:
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        self.page.wait_for_selector("#stop:visible")

    def wait_for_end(self) -> None:
        self.page.wait_for_selector("#send:visible", timeout=_WAIT_MS)

    def document(self, number: int = -1) -> AnswerDocument:
        """Return what the endpoint keeps of an answer."""
        url = f"{self.address}v1/mlxroute/answers/{self.ids[number]}"
        with build_opener(ProxyHandler({})).open(Request(url)) as reply:
            return parse_document(reply.read())

    def set_budget(self, percent: float) -> None:
        self.page.fill("#budget", str(percent))


@contextmanager
def opened(
    browser: Any, address: str, *, width: int = 1280, is_quiet: bool = True
) -> Iterator[Chat]:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.set_default_timeout(_WAIT_MS)
    chat = Chat(page, address, [], [])
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    if is_quiet:
        page.on("console", lambda message: failures.append(message.text))

    def on_response(response: Any) -> None:
        if response.url.endswith("/chat/completions") and response.status == 200:
            chat.bodies.append(json.loads(response.request.post_data))
            chat.ids.append(response.headers["x-mlxroute-id"])

    page.on("response", on_response)
    page.goto(address)
    yield chat
    assert failures == []
    page.close()


@pytest.fixture
def chat(browser: Any, address: str) -> Iterator[Chat]:
    with opened(browser, address) as chat:
        chat.page.wait_for_selector("#send:enabled")
        yield chat


def _as_shown(text: str) -> str:
    text = _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def test_an_answer_streams_in_the_colours_of_its_sources(chat: Chat) -> None:
    page = chat.page
    page.evaluate(
        """() => {
          window.steps = [];
          new MutationObserver(() => {
            const nodes = [...document.querySelectorAll(".answer .tv-token")];
            const dim = nodes.filter((node) => "provisional" in node.dataset);
            const opacity = dim[0] && getComputedStyle(dim[0]).opacity;
            window.steps.push([nodes.length, dim.length, opacity]);
          }).observe(document.querySelector("#turns"), { childList: true, subtree: true });
        }"""
    )
    chat.set_budget(20)
    chat.ask()
    tokens = page.eval_on_selector_all(
        ".answer .tv-token",
        """nodes => nodes.map(node => [node.textContent, node.dataset.source, node.dataset.decision,
          getComputedStyle(node.querySelector(".tv-word")).color,
          getComputedStyle(node.querySelector(".tv-word")).textDecorationLine])""",
    )
    document = chat.document()
    assert "".join(t.text for t in document.tokens[: len(tokens)]) == document.summary.text
    assert [token[:3] for token in tokens] == [
        [_CONTROLS.sub("", token.text), token.source.value, token.decision.value]
        for token in document.tokens[: len(tokens)]
    ]
    looks = {(source, colour, line) for _, source, _, colour, line in tokens}
    assert {line for source, _, line in looks if source == "large"} == {"underline"}
    colours = {source: {c for s, c, _ in looks if s == source} for source in ("small", "large")}
    assert len(colours["small"]) == len(colours["large"]) == 1
    assert colours["small"] != colours["large"]
    steps = page.evaluate("window.steps")
    assert len({count for count, _, _ in steps}) > 10
    assert {opacity for _, dim, opacity in steps if dim} == {"0.5"}
    assert page.locator(".answer [data-provisional]").count() == 0


def test_pointing_at_a_token_shows_what_both_models_wanted(chat: Chat) -> None:
    chat.set_budget(20)
    chat.ask()
    tokens = chat.document().tokens
    token = next(token for token in tokens if token.decision == "replaced")
    assert token.small is not None
    assert token.large is not None
    chat.page.hover(f".answer .tv-token[data-index='{token.index}']")
    detail = chat.page.inner_text(".tv-detail:visible")
    assert "its token replaced the small model's" in detail
    for name, choice in (("small", token.small), ("large", token.large)):
        rows = chat.page.locator(f".tv-detail:visible .tv-by-{name} li code").all_inner_texts()
        assert rows == [_as_shown(row.text) for row in choice.top]
    assert len(token.small.top) == 5


def test_keys_lead_to_the_tokens_of_each_answer(chat: Chat) -> None:
    page = chat.page
    assert page.evaluate("document.activeElement.id") == "question"
    chat.ask()
    chat.set_budget(20)
    page.press(".again:visible", "Enter")
    chat.wait_for_end()
    for panel in page.locator(".answer").all():
        panel.locator(".tv-token[tabindex='0']").focus()
        page.keyboard.press("ArrowRight")
        current = page.locator(".answer .tv-token[aria-current]")
        assert current.count() == 1
        assert current.get_attribute("data-index") == "1"
        assert page.locator(".tv-detail:visible h2").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".answer .tv-token[aria-current]").count() == 0


def test_the_focus_stays_on_what_can_be_done(chat: Chat) -> None:
    page = chat.page
    chat.ask()
    page.press(".again:visible", "Enter")
    page.wait_for_selector("#stop:visible")
    assert page.evaluate("document.activeElement.id") == "stop"
    chat.wait_for_end()
    assert page.evaluate("document.activeElement.id") == "question"


def test_the_focus_stays_on_a_token_while_the_answer_runs(chat: Chat) -> None:
    page = chat.page
    chat.set_budget(20)
    chat.send("the quick brown fox")
    page.locator(".answer .tv-token").first.focus()
    followed = """() => {
      const last = document.querySelector(".answer .tv-token:last-child");
      const at = document.activeElement.dataset.index;
      if (at === undefined) return "lost";
      window.seen ??= new Set();
      window.seen.add(at);
      last.focus();
      return document.querySelector("#stop").hidden && at;
    }"""
    end = page.wait_for_function(followed, polling="raf").json_value()
    assert end not in ("lost", "0")
    assert len(page.evaluate("[...window.seen]")) > 5
    page.keyboard.press("ArrowLeft")
    index = page.evaluate("document.activeElement.dataset.index")
    assert int(index) == page.locator(".answer .tv-token").count() - 2


def test_a_message_from_right_to_left_is_shown_as_such(chat: Chat) -> None:
    page = chat.page
    question = page.locator("#question")
    direction = "node => getComputedStyle(node).direction"
    assert question.evaluate(direction) == "ltr"
    page.fill("#question", "ما هذا؟")
    assert question.evaluate(direction) == "rtl"
    chat.ask("ما هذا؟\nWhat is this?")
    lefts = page.locator(".turn > h3").evaluate(
        """node => [0, 6, 8, 20].map((at) => {
          const range = document.createRange();
          range.setStart(node.lastChild, at);
          range.setEnd(node.lastChild, at + 1);
          return range.getBoundingClientRect().left;
        })"""
    )
    assert lefts[0] > lefts[1]
    assert lefts[2] < lefts[3]


def test_the_budget_changes_the_next_answer_beside_the_first(chat: Chat) -> None:
    page = chat.page
    chat.ask()
    assert "budget" not in chat.bodies[0]
    chat.set_budget(20)
    page.select_option("#mode", "wait")
    page.click(".again:visible")
    chat.wait_for_end()
    assert (chat.bodies[1]["budget"], chat.bodies[1]["mode"]) == (0.2, "wait")
    assert chat.bodies[1]["messages"] == chat.bodies[0]["messages"]
    assert chat.document(0).router.budget is None
    assert chat.document(1).router.budget == 0.2
    titles = page.locator(".answer h4").all_inner_texts()
    assert titles == ["Above entropy ∞", "Budget 20 %, mode wait"]
    first, second = (panel.bounding_box() for panel in page.locator(".answer").all())
    assert first["x"] + first["width"] <= second["x"]
    large = page.locator(".answer").nth(1).locator(".counts dd").nth(1).inner_text()
    assert large.split()[0] == str(chat.document(1).summary.large_tokens) != "0"
    page.check("#local-only")
    page.click(".again:visible")
    chat.wait_for_end()
    assert chat.bodies[2]["local_only"] is True
    assert chat.document(2).summary.calls == 0


def test_the_next_turn_follows_the_chosen_answer(chat: Chat) -> None:
    chat.ask("the lazy dog")
    chat.set_budget(30)
    chat.page.click(".again:visible")
    chat.wait_for_end()
    chat.page.locator(".answer input[type=radio]").first.check()
    chat.ask("jumps over")
    assert chat.bodies[-1]["messages"] == [
        {"role": "user", "content": "the lazy dog"},
        {"role": "assistant", "content": chat.document(0).summary.text},
        {"role": "user", "content": "jumps over"},
    ]
    chat.page.click("#clear")
    assert chat.page.locator(".turn").count() == 0


def test_stop_ends_the_answer_and_shows_its_figures(browser: Any, address: str) -> None:
    # The browser reports each try to get the document before the decode has ended.
    with opened(browser, address, is_quiet=False) as chat:
        chat.page.wait_for_selector("#send:enabled")
        _stop_an_answer(chat)


def _stop_an_answer(chat: Chat) -> None:
    chat.set_budget(30)
    chat.page.select_option("#mode", "wait")
    chat.send("the quick brown fox")
    chat.page.wait_for_selector(".answer .tv-token[data-index='5']")
    chat.page.click("#stop")
    chat.page.wait_for_selector("#send:visible")
    assert chat.page.inner_text(".state") == "stopped"
    document = chat.document()
    assert document.summary.finish_reason == "cancelled"
    assert 5 < document.summary.tokens < _TOKENS
    assert chat.page.inner_text(".counts dd >> nth=0") == str(document.summary.tokens)
    assert chat.page.evaluate("document.activeElement.id") == "question"
    assert "Stopped." in chat.page.inner_text("#status")


def test_heat_and_a_narrow_screen(browser: Any, address: str) -> None:
    with opened(browser, address, width=390) as chat:
        page = chat.page
        page.wait_for_selector("#send:enabled")
        assert not page.is_visible("#budget")
        chat.ask()
        shade = "getComputedStyle(document.querySelector('.answer .tv-word')).backgroundColor"
        before = page.evaluate(shade)
        page.click("#settings summary")
        page.check("#heat")
        assert page.evaluate(shade) != before
        page.click("#settings summary")
        page.locator(".answer .tv-token").last.click()
        sheet = page.locator(".tv-detail:visible").bounding_box()
        token = page.locator(".answer .tv-token").last.bounding_box()
        assert token["y"] + token["height"] <= sheet["y"]
        size = "(({ scrollWidth: w, scrollHeight: h }) => [w, h])(document.documentElement)"
        assert page.evaluate(size) == [390, 800]
        page.click(".tv-close:visible")
        assert page.locator(".tv-detail:visible").count() == 0


def test_a_key_is_asked_for_and_kept_in_the_page_alone(browser: Any, small: SmallModel) -> None:
    with (
        serving(small, keys=("sesame-0123456789",)) as address,
        opened(browser, address, is_quiet=False) as chat,
    ):
        page = chat.page
        page.wait_for_selector("#key:visible")
        assert page.is_disabled("#send")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#notice:has-text('does not accept this key')")
        page.fill("#key", "sesame-0123456789")
        page.press("#key", "Enter")
        page.wait_for_selector("#send:enabled")
        assert not page.is_visible("#key")
        chat.ask()
        assert page.locator(".problem").count() == 0
        stored = "[localStorage.length, sessionStorage.length, document.cookie, location.href]"
        assert page.evaluate(stored) == [0, 0, "", address]
        page.reload()
        page.wait_for_selector("#key:visible")


def test_failures_are_said_in_plain_words(browser: Any, address: str) -> None:
    with opened(browser, address, is_quiet=False) as chat:
        page = chat.page
        page.wait_for_selector("#send:enabled")
        chat.ask()
        page.route(
            "**/v1/**", lambda route: route.fulfill(status=429, headers={"Retry-After": "5"})
        )
        page.fill("#question", "the lazy dog")
        page.press("#question", "Enter")
        page.wait_for_selector(".problem:has-text('busy with other answers. Try again in 5 s.')")
        page.unroute("**/v1/**")
        page.route("**/v1/**", lambda route: route.abort())
        page.click(".again:visible")
        page.wait_for_selector(".problem:has-text('The server does not answer.')")
        page.wait_for_selector("#notice:has-text('tries again by itself')")
        assert page.is_disabled("#send")
        page.unroute("**/v1/**")
        page.wait_for_selector("#send:enabled")
        assert not page.is_visible("#notice")
        page.click(".again:visible")
        chat.wait_for_end()
        assert page.locator(".problem").count() == 0
        assert chat.bodies[-1]["messages"][-1]["content"] == "the lazy dog"
