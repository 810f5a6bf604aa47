"""Calls under way at once, with real threads and a server on loopback."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlxroute.engine import generate
from mlxroute.errors import LargeRefused, LargeTimeout, LargeUnavailable
from mlxroute.large import LargeModel
from mlxroute.large.dialects.mlx_lm import MlxLm
from mlxroute.large.http.pending_calls import PendingCall
from mlxroute.routers import EntropyRouter
from mlxroute.types import Mode, Token
from tests.support.asking import THE, VOCABULARY, legacy
from tests.support.fakes import ScriptedSmall
from tests.support.loopback import Loopback, Reply, Request, mlx_lm_reply
from tests.support.settled import PLAIN, settled
from tests.support.vocabularies import context


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    for thread in our_threads():
        thread.join(10)
        assert not thread.is_alive()


def our_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("mlxroute-")]


def landed(large: LargeModel, flight: PendingCall, *, within_s: float = 20.0) -> PendingCall:
    large.wait(lambda: flight.ready, timeout_s=within_s)
    assert flight.ready
    return flight


class Gate:
    """Holds replies back by the last word of their prompt until it is let through."""

    def __init__(self) -> None:
        self._open = {word: threading.Event() for word in "abeth"}
        self.asked = threading.Semaphore(0)

    def __call__(self, request: Request) -> Reply:
        word = request.json["prompt"][-1]
        self.asked.release()
        self._open[word].wait(20)
        return Reply.of(legacy(word))

    def let(self, words: str) -> None:
        for word in words:
            self._open[word].set()


def test_answers_come_back_to_their_own_calls_in_whatever_order(server: Loopback) -> None:
    gate = server.answer = Gate()
    with settled(LargeModel(server.url, model="m")) as large:
        flights = {word: large.begin(context(word, VOCABULARY)) for word in "abeh"}
        for _ in flights:
            assert gate.asked.acquire(timeout=20)
        for word in "heba":
            assert not flights[word].ready
            gate.let(word)
            (token,) = landed(large, flights[word]).result()
            assert token.text == word
    assert server.connections == 4


def test_a_cancelled_call_ends_alone_and_at_once(server: Loopback) -> None:
    gate = server.answer = Gate()
    with settled(LargeModel(server.url, model="m")) as large:
        dropped, kept = (large.begin(context(word, VOCABULARY)) for word in "ab")
        for _ in range(2):
            assert gate.asked.acquire(timeout=20)
        dropped.cancel()
        landed(large, dropped)
        with pytest.raises(LargeUnavailable, match="cancelled"):
            dropped.result()
        gate.let("ab")
        assert landed(large, kept).result()[0].text == "b"


def test_cancelled_calls_say_nothing_about_the_server(server: Loopback) -> None:
    gate = server.answer = Gate()
    with settled(LargeModel(server.url, model="m")) as large:
        flights = [large.begin(context(word, VOCABULARY)) for word in "abet"]
        for _ in flights:
            assert gate.asked.acquire(timeout=20)
        for flight in flights:
            flight.cancel()
        for flight in flights:
            landed(large, flight)
        gate.let("h")
        assert large.next_token(context("h", VOCABULARY)).text == "h"
        gate.let("abet")


def test_calls_that_fail_together_open_the_breaker_once(server: Loopback) -> None:
    server.answer = lambda request: Reply(b'{"error": "no"}', status=400)
    with settled(LargeModel(server.url, model="m")) as large:
        flights = [large.begin(context(word, VOCABULARY)) for word in "abe"]
        for flight in flights:
            with pytest.raises(LargeRefused):
                landed(large, flight).result()
        with pytest.raises(LargeUnavailable, match="not asked for another 5 s"):
            large.next_token(context("a", VOCABULARY))


def test_a_call_ends_at_its_deadline_whatever_the_others_do(server: Loopback) -> None:
    gate = server.answer = Gate()
    with settled(LargeModel(server.url, model="m")) as large:
        late = large.begin(context("a", VOCABULARY), deadline_s=0.1)
        other = large.begin(context("b", VOCABULARY))
        with pytest.raises(LargeTimeout):
            landed(large, late).result()
        gate.let("ab")
        assert landed(large, other).result()[0].text == "b"


def test_closing_ends_all_calls(server: Loopback) -> None:
    gate = server.answer = Gate()
    large = settled(LargeModel(server.url, model="m"))
    flights = [large.begin(context(word, VOCABULARY)) for word in "ab"]
    for _ in flights:
        assert gate.asked.acquire(timeout=20)
    large.close()
    for flight in flights:
        flight.join(10)
        assert flight.ready
    gate.let("ab")


def test_a_server_that_dies_of_its_cache_has_one_call_at_a_time(server: Loopback) -> None:
    assert settled(LargeModel(server.url)).max_in_flight == 8
    assert settled(LargeModel(server.url), MlxLm()).max_in_flight == 1
    assert LargeModel(server.url).max_in_flight == 1


# Several tokens of one reply


def names(*texts: str, finish: str = "length") -> Reply:
    logprobs = {
        "tokens": texts,
        "token_logprobs": [-0.5] * len(texts),
        "top_logprobs": [{text: -0.5, "zz": -3.0} for text in texts],
    }
    return Reply.of(legacy("".join(texts), logprobs=logprobs, finish_reason=finish))


def begun(server: Loopback, *replies: Reply, prefetch: int = 2, **options: Any) -> list[str]:
    """The texts one flight brings, an end as its source."""
    server.script.extend(replies)
    with settled(LargeModel(server.url, model="m"), **options) as large:
        tokens = landed(large, large.begin(context("x", VOCABULARY), prefetch=prefetch)).result()
    return ["(end)" if token.is_eos else token.text for token in tokens]


def test_one_call_brings_the_tokens_after_the_one_asked_for(server: Loopback) -> None:
    assert begun(server, names(" the", "a", "b")) == [" the", "a", "b"]
    assert server.requests[0].json["max_tokens"] == 3


def test_nothing_comes_after_the_end(server: Loopback) -> None:
    assert begun(server, names("a", "b", finish="stop"), prefetch=5) == ["a", "b", "(end)"]


def test_tokens_ahead_have_the_fields_of_a_call_for_them(server: Loopback) -> None:
    server.script.extend([names("a", "b"), names("b")])
    with settled(LargeModel(server.url, model="m")) as large:
        ahead = landed(large, large.begin(context("x", VOCABULARY), prefetch=1)).result()[1]
        alone = large.next_token(context("xa", VOCABULARY))
    for name in ("token_ids", "text", "is_eos", "logprob", "top", "large_ids"):
        assert getattr(ahead, name) == getattr(alone, name), name


@pytest.mark.parametrize(
    "doubtful",
    [
        Reply.of(legacy("the", logprobs=None)),
        names("a", "b"),
        Reply.of(legacy(" thea")),
    ],
    ids=["no positions", "too few positions", "one position for all"],
)
def test_a_reply_that_cannot_be_taken_apart_is_asked_for_again_token_by_token(
    server: Loopback, doubtful: Reply
) -> None:
    assert begun(server, doubtful, names("t")) == ["t"]
    assert [request.json["max_tokens"] for request in server.requests] == [3, 1]


def test_names_that_contradict_the_servers_own_text_are_not_trusted(server: Loopback) -> None:
    told = names("a", "b", "zz")
    lying = Reply(told.body.replace(b'"text": "abzz"', b'"text": "hehehe"'))
    assert lying.body != told.body
    assert begun(server, lying, names("t")) == ["t"]


def test_mlx_lm_tokens_come_by_their_pieces(server: Loopback) -> None:
    server.script.append(mlx_lm_reply([(THE, "Ġthe"), (0, "a"), (1, "b"), (7, "zz")]))
    with settled(LargeModel(server.url), MlxLm()) as large:
        tokens = landed(large, large.begin(context("x", VOCABULARY), prefetch=2)).result()
    assert [token.text for token in tokens] == [" the", "a", "b"]


# Whole answers


def answered(server: Loopback, reply: Callable[[Request], Reply], **options: Any) -> list[Token]:
    server.answer = reply
    script = b"abcdefghabcdefghabcdefgh"
    small = ScriptedSmall(script, entropies={i: 2.0 for i in range(0, len(script), 2)})
    with settled(LargeModel(server.url, model="m"), PLAIN) as large:
        router = EntropyRouter(1.0)
        return list(generate(small, large, "hi", router=router, **options))


def test_the_answer_is_the_same_with_threads_and_sockets(server: Loopback) -> None:
    def reply(request: Request) -> Reply:
        # In any order: the longer the prompt, the sooner, by turns.
        length = len(request.json["prompt"])
        word = "zab"[length % 3]
        return Reply(Reply.of(legacy(word)).body, stall_s=0.002 * (length * 7 % 5))

    waited = answered(server, reply)
    overlapped = answered(server, reply, mode=Mode.OVERLAP)
    assert [token.token_id for token in overlapped] == [token.token_id for token in waited]
    assert [token.source for token in overlapped] == [token.source for token in waited]


def test_an_interrupt_in_the_middle_of_eight_calls_ends_at_once(server: Loopback) -> None:
    flying = threading.Semaphore(0)

    def silent(request: Request) -> Reply:
        flying.release()
        return Reply(stall_s=30)

    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        for _ in range(8):
            flying.acquire(timeout=20)
        times.append(time.monotonic())
        signal.pthread_kill(main, signal.SIGINT)

    times: list[float] = []
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        answered(server, silent, mode=Mode.OVERLAP)
    times.append(time.monotonic())
    thread.join()
    assert len(server.requests) == 8
    # Half a second is the promise; a busy machine gets more, and far less than the calls'.
    assert times[1] - times[0] < 5


def test_a_server_that_never_answers_costs_one_timeout_in_all(server: Loopback) -> None:
    began_s = time.monotonic()
    tokens = answered(server, lambda request: Reply(stall_s=30), mode=Mode.OVERLAP, timeout_s=0.5)
    assert bytes(token.token_id for token in tokens[:-1]) == b"abcdefgh" * 3
    assert time.monotonic() - began_s < 10
    assert not any(token.escalation and token.escalation.large for token in tokens)
