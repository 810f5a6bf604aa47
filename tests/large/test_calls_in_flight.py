"""Several calls in flight, with real threads and a server on loopback."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from mlxroute.engine import generate
from mlxroute.errors import LargeRefused, LargeTimeout, LargeUnavailable
from mlxroute.large import LargeModel
from mlxroute.large.dialects.mlx_lm import MlxLm
from mlxroute.large.http.pending_calls import PendingCall
from mlxroute.routers import EntropyRouter
from mlxroute.types import Mode, Token
from tests.support.connected_clients import THE, VOCABULARY, legacy
from tests.support.loopback import Loopback, Reply, Request, mlx_lm_reply
from tests.support.negotiated import PLAIN, negotiated
from tests.support.scripted_models import ScriptedSmall
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
    return [thread for thread in threading.enumerate() if thread.name.startswith("mlxroute-")]


def wait_for(large: LargeModel, call: PendingCall, *, within_s: float = 20.0) -> PendingCall:
    large.wait(lambda: call.ready, timeout_s=within_s)
    assert call.ready
    return call


class Gate:
    """Holds back each reply until `release` is called with the last character of its prompt."""

    def __init__(self) -> None:
        self._open = {word: threading.Event() for word in "abeth"}
        self.requested = threading.Semaphore(0)

    def __call__(self, request: Request) -> Reply:
        word = request.json["prompt"][-1]
        self.requested.release()
        self._open[word].wait(20)
        return Reply.of(legacy(word))

    def release(self, words: str) -> None:
        for word in words:
            self._open[word].set()


def test_answers_reach_their_own_calls_in_any_order(server: Loopback) -> None:
    gate = server.answer = Gate()
    with negotiated(LargeModel(server.url, model="m")) as large:
        calls = {word: large.begin(context(word, VOCABULARY)) for word in "abeh"}
        for _ in calls:
            assert gate.requested.acquire(timeout=20)
        for word in "heba":
            assert not calls[word].ready
            gate.release(word)
            (token,) = wait_for(large, calls[word]).result()
            assert token.text == word
    assert server.connections == 4


def test_a_cancelled_call_ends_alone_and_at_once(server: Loopback) -> None:
    gate = server.answer = Gate()
    with negotiated(LargeModel(server.url, model="m")) as large:
        dropped, kept = (large.begin(context(word, VOCABULARY)) for word in "ab")
        for _ in range(2):
            assert gate.requested.acquire(timeout=20)
        dropped.cancel()
        wait_for(large, dropped)
        with pytest.raises(LargeUnavailable, match="cancelled"):
            dropped.result()
        gate.release("ab")
        assert wait_for(large, kept).result()[0].text == "b"


def test_cancelled_calls_are_no_failures_of_the_server(server: Loopback) -> None:
    gate = server.answer = Gate()
    with negotiated(LargeModel(server.url, model="m")) as large:
        calls = [large.begin(context(word, VOCABULARY)) for word in "abet"]
        for _ in calls:
            assert gate.requested.acquire(timeout=20)
        for call in calls:
            call.cancel()
        for call in calls:
            wait_for(large, call)
        gate.release("h")
        assert large.next_token(context("h", VOCABULARY)).text == "h"
        gate.release("abet")


def test_calls_that_fail_together_open_the_breaker_once(server: Loopback) -> None:
    # A status that does not make the client forget the dialect.
    server.answer = lambda request: Reply(b'{"error": "no"}', status=413)
    with negotiated(LargeModel(server.url, model="m")) as large:
        calls = [large.begin(context(word, VOCABULARY)) for word in "abe"]
        for call in calls:
            with pytest.raises(LargeRefused):
                wait_for(large, call).result()
        with pytest.raises(LargeUnavailable, match="paused for another 5 s"):
            large.next_token(context("a", VOCABULARY))


def test_the_time_limit_of_calls_can_be_extended(server: Loopback) -> None:
    server.answer = lambda request: replace(Reply.of(legacy("h")), stall_s=0.6)
    with negotiated(LargeModel(server.url, model="m", timeout_s=0.2)) as large:
        with pytest.raises(LargeTimeout):
            wait_for(large, large.begin(context("h", VOCABULARY), deadline_s=30)).result()
        large.extend_timeout(30)
        large.extend_timeout(1)
        call = large.begin(context("h", VOCABULARY), deadline_s=30)
        assert wait_for(large, call).result()[0].text == "h"


def test_a_call_ends_at_its_own_deadline(server: Loopback) -> None:
    gate = server.answer = Gate()
    with negotiated(LargeModel(server.url, model="m")) as large:
        late = large.begin(context("a", VOCABULARY), deadline_s=0.1)
        other = large.begin(context("b", VOCABULARY))
        with pytest.raises(LargeTimeout):
            wait_for(large, late).result()
        gate.release("ab")
        assert wait_for(large, other).result()[0].text == "b"


def test_closing_ends_all_calls(server: Loopback) -> None:
    gate = server.answer = Gate()
    large = negotiated(LargeModel(server.url, model="m"))
    calls = [large.begin(context(word, VOCABULARY)) for word in "ab"]
    for _ in calls:
        assert gate.requested.acquire(timeout=20)
    large.close()
    for call in calls:
        call.join(10)
        assert call.ready
    gate.release("ab")


def test_a_call_whose_thread_cannot_start_is_not_waited_for(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(call: PendingCall) -> None:
        raise RuntimeError("can't start new thread")

    large = negotiated(LargeModel(server.url, model="m"))
    monkeypatch.setattr(PendingCall, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        large.begin(context("a", VOCABULARY))
    large.close()


def test_a_server_that_crashes_on_cached_prompts_has_one_call_in_flight(server: Loopback) -> None:
    assert negotiated(LargeModel(server.url)).max_in_flight == 8
    assert negotiated(LargeModel(server.url), MlxLm()).max_in_flight == 1
    assert LargeModel(server.url).max_in_flight == 1


def test_a_prompt_that_leaves_the_path_of_a_call_in_flight_is_sent_whole(server: Loopback) -> None:
    """The small model wrote `b` where the server writes `t`, so no cached sequence begins so."""
    ids = {name: VOCABULARY.id_of(name) for name in "abthe"}
    release, is_asked = threading.Event(), threading.Event()
    sizes = {"a": "thea", "ab": "eh"}

    def answer(request: Request) -> Reply:
        prompt, count = request.json["prompt"], request.json["max_tokens"]
        if count == 7:
            is_asked.set()
            assert release.wait(20)
        names = (sizes[prompt] * 2)[:count]
        return mlx_lm_reply([(ids[name], name) for name in names])

    server.answer = answer
    small_token = (ids["b"],)
    with negotiated(LargeModel(server.url), MlxLm()) as large:
        longer = large.begin(context("a", VOCABULARY), prefetch=5)
        assert is_asked.wait(20)
        assert large.next_token(context("ab", VOCABULARY, answer=small_token)).text == "e"
        release.set()
        assert [token.text for token in wait_for(large, longer).result()] == list("theath")
    asked = [(request.json["prompt"], request.json["max_tokens"]) for request in server.requests]
    assert asked == [("a", 7), ("a", 3), ("ab", 2)]


# Several tokens of one reply


def names(*texts: str, finish: str = "length") -> Reply:
    logprobs = {
        "tokens": texts,
        "token_logprobs": [-0.5] * len(texts),
        "top_logprobs": [{text: -0.5, "zz": -3.0} for text in texts],
    }
    return Reply.of(legacy("".join(texts), logprobs=logprobs, finish_reason=finish))


def call_texts(server: Loopback, *replies: Reply, prefetch: int = 2, **options: Any) -> list[str]:
    """Return the texts of one call's tokens, `(end)` for the end of the answer."""
    server.script.extend(replies)
    with negotiated(LargeModel(server.url, model="m"), **options) as large:
        tokens = wait_for(large, large.begin(context("x", VOCABULARY), prefetch=prefetch)).result()
    return ["(end)" if token.is_eos else token.text for token in tokens]


def test_one_call_prefetches_later_tokens(server: Loopback) -> None:
    assert call_texts(server, names(" the", "a", "b")) == [" the", "a", "b"]
    assert server.requests[0].json["max_tokens"] == 3


def test_no_token_is_prefetched_after_the_end(server: Loopback) -> None:
    assert call_texts(server, names("a", "b", finish="stop"), prefetch=5) == ["a", "b", "(end)"]


def test_prefetched_tokens_have_the_fields_of_a_call_for_them(server: Loopback) -> None:
    server.script.extend([names("a", "b"), names("b")])
    with negotiated(LargeModel(server.url, model="m")) as large:
        prefetched = wait_for(large, large.begin(context("x", VOCABULARY), prefetch=1)).result()[1]
        alone = large.next_token(context("xa", VOCABULARY))
    for name in ("token_ids", "text", "is_eos", "logprob", "top", "large_ids"):
        assert getattr(prefetched, name) == getattr(alone, name), name


@pytest.mark.parametrize(
    "doubtful",
    [
        Reply.of(legacy("the", logprobs=None)),
        names("a", "b"),
        Reply.of(legacy(" thea")),
    ],
    ids=["no positions", "too few positions", "one position for all"],
)
def test_a_reply_that_cannot_be_split_into_tokens_is_requested_again_token_by_token(
    server: Loopback, doubtful: Reply
) -> None:
    assert call_texts(server, doubtful, names("t")) == ["t"]
    assert [request.json["max_tokens"] for request in server.requests] == [3, 1]


def test_token_names_that_contradict_the_servers_own_text_are_not_used(server: Loopback) -> None:
    truthful = names("a", "b", "zz")
    lying = Reply(truthful.body.replace(b'"text": "abzz"', b'"text": "hehehe"'))
    assert lying.body != truthful.body
    assert call_texts(server, lying, names("t")) == ["t"]


def test_mlx_lm_tokens_are_read_by_their_pieces(server: Loopback) -> None:
    server.script.append(mlx_lm_reply([(THE, "Ġthe"), (0, "a"), (1, "b"), (7, "zz")]))
    with negotiated(LargeModel(server.url), MlxLm()) as large:
        tokens = wait_for(large, large.begin(context("x", VOCABULARY), prefetch=2)).result()
    assert [token.text for token in tokens] == [" the", "a", "b"]


# Whole answers


def answered(server: Loopback, reply: Callable[[Request], Reply], **options: Any) -> list[Token]:
    server.answer = reply
    script = b"abcdefghabcdefghabcdefgh"
    small = ScriptedSmall(script, entropies={i: 2.0 for i in range(0, len(script), 2)})
    with negotiated(LargeModel(server.url, model="m"), PLAIN) as large:
        router = EntropyRouter(1.0)
        return list(generate(small, large, "hi", router=router, **options))


def test_the_answer_is_the_same_with_threads_and_sockets(server: Loopback) -> None:
    def reply(request: Request) -> Reply:
        # Delays that do not follow the order of the prompts.
        length = len(request.json["prompt"])
        word = "zab"[length % 3]
        return Reply(Reply.of(legacy(word)).body, stall_s=0.002 * (length * 7 % 5))

    # On a busy machine, too, no call may time out.
    waited = answered(server, reply, timeout_s=300)
    overlapped = answered(server, reply, timeout_s=300, mode=Mode.OVERLAP)
    assert [token.unchecked_reason for token in overlapped] == [None] * len(overlapped)
    assert [token.token_id for token in overlapped] == [token.token_id for token in waited]
    assert [token.source for token in overlapped] == [token.source for token in waited]


def test_an_interrupt_in_the_middle_of_eight_calls_ends_at_once(server: Loopback) -> None:
    started = threading.Semaphore(0)

    def stall(request: Request) -> Reply:
        started.release()
        return Reply(stall_s=120)

    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        for _ in range(8):
            started.acquire(timeout=20)
        times.append(time.monotonic())
        signal.pthread_kill(main, signal.SIGINT)

    times: list[float] = []
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        answered(server, stall, mode=Mode.OVERLAP)
    times.append(time.monotonic())
    thread.join()
    assert len(server.requests) == 8
    # Half a second is the goal; a busy machine gets more, but far less than the stalls.
    assert times[1] - times[0] < 20


def test_a_server_that_never_answers_costs_one_timeout_in_all(server: Loopback) -> None:
    began_s = time.monotonic()
    tokens = answered(server, lambda request: Reply(stall_s=120), mode=Mode.OVERLAP, timeout_s=0.5)
    assert bytes(token.token_id for token in tokens[:-1]) == b"abcdefgh" * 3
    assert time.monotonic() - began_s < 20
    assert not any(token.escalation and token.escalation.large for token in tokens)
