"""Calls for several tokens that a server streams, with real threads and a server on loopback."""

from __future__ import annotations

import codecs
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import pytest

from mlxroute.errors import LargeProtocolError, LargeRefused
from mlxroute.large import LargeModel
from mlxroute.large.dialects import Dialect
from mlxroute.large.dialects.llama_server import LlamaServer
from mlxroute.large.dialects.vllm import VllmCompletions
from mlxroute.large.http.pending_calls import PendingCall
from mlxroute.large.reply import Completion, CompletionAnswer, ReplyPosition, ReplyToken
from mlxroute.large.vocabulary.bridge import Bridge
from mlxroute.large.vocabulary.reply_reader import read_streamed_tokens as first_ones
from mlxroute.large.vocabulary.token_reader import TokenReader
from mlxroute.large.vocabulary.token_sources import FileTokenSource
from mlxroute.large.vocabulary.vocabulary_comparison import SAME, VocabularyComparison
from mlxroute.types import LargeToken
from tests.support.connected_clients import VOCABULARY
from tests.support.loopback import Loopback, Reply, Request
from tests.support.negotiated import negotiated
from tests.support.vocabularies import TableTokenizer, context

LLAMA = LlamaServer()
VLLM = VllmCompletions(by_id=False)
_END = VOCABULARY.id_of("<|im_end|>")
_WORDS = ("a", "b", "Ġthe")


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def llama(names: Sequence[str], *, stop: str = "limit", whole: bool = False) -> list[bytes]:
    """Return the parts that llama-server streams, or its whole reply."""
    parts, hidden, begun, text = [], [], b"", ""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for count, name in enumerate(names, start=1):
        identity = VOCABULARY.id_of(name)
        begun += VOCABULARY.token_bytes(identity)
        text += decoder.decode(VOCABULARY.token_bytes(identity))
        if decoder.getstate()[0]:
            hidden.append(identity)
            continue
        # The token that completes a character is named with all of its bytes.
        named = {"id": identity, "token": text, "bytes": list(begun), "logprob": -0.5}
        part: dict[str, Any] = {"content": text, "tokens": [*(hidden if whole else []), identity]}
        part["completion_probabilities"] = [{**named, "top_logprobs": [named]}]
        parts.append(part if whole else part | {"tokens_predicted": count})
        hidden, begun, text = [], b"", ""
    last: dict[str, Any] = {
        "stop_type": stop,
        "tokens_evaluated": 7,
        "tokens_predicted": len(names),
    }
    last["timings"] = {"cache_n": 6}
    if whole:
        joined: dict[str, Any] = {"content": "", "tokens": [], "completion_probabilities": []}
        for part in parts:
            joined = {key: joined[key] + part[key] for key in joined}
        joined["tokens"] += hidden
        return [json.dumps(joined | last).encode()]
    return [*map(event, parts), event({"content": "", "tokens": [], **last})]


def vllm(names: Sequence[str], *, stop: str = "limit", whole: bool = False) -> list[bytes]:
    """Return the parts that vLLM streams, or its whole reply."""
    finish = "stop" if stop == "eos" else "length"
    texts = [VOCABULARY.token_bytes(VOCABULARY.id_of(name)).decode() for name in names]
    ids = [VOCABULARY.id_of(name) for name in names]
    logprobs: list[dict[str, list[Any]]] = [
        {"tokens": [text], "token_logprobs": [-0.5], "top_logprobs": [{text: -0.5}]}
        for text in texts
    ]
    usage: dict[str, Any] = {"prompt_tokens": 7, "completion_tokens": len(ids)}
    usage["prompt_tokens_details"] = {"cached_tokens": 6}
    if whole:
        joined = {key: [part[key][0] for part in logprobs] for key in logprobs[0]}
        choice = {"text": "".join(texts), "token_ids": ids, "logprobs": joined}
        reply = {"choices": [choice | {"finish_reason": finish}], "usage": usage}
        return [json.dumps(reply).encode()]
    ends = [None] * (len(ids) - 1) + [finish]
    rows = zip(texts, ids, logprobs, ends, strict=True)
    chunks = [
        {"text": text, "token_ids": [i], "logprobs": part, "finish_reason": end}
        for text, i, part, end in rows
    ]
    counts = {"choices": [], "usage": usage}
    return [*(event({"choices": [chunk]}) for chunk in chunks), event(counts), b"data: [DONE]\n\n"]


_SERVERS = pytest.mark.parametrize(
    ("dialect", "writes"), [(LLAMA, llama), (VLLM, vllm)], ids=["llama-server", "vLLM"]
)


def model(server: Loopback, dialect: Dialect = LLAMA, *, same: bool = True) -> LargeModel:
    large = negotiated(LargeModel(server.url, model="m"), dialect)
    # Both vocabularies are the same one, or count as different.
    comparison = SAME if same else VocabularyComparison(False)
    negotiator = large._negotiator._negotiator
    negotiator.compare = lambda vocabulary, next_deadline: comparison  # type: ignore[method-assign]
    if not same:
        negotiator.tokens = FileTokenSource(TableTokenizer(VOCABULARY))
    return large


def read_streamed_tokens(large: LargeModel, *, prefetch: int = 2, repeated: int = 1) -> PendingCall:
    ids = (VOCABULARY.id_of("t"), VOCABULARY.id_of("h")) * repeated
    return large.begin(context("th" * repeated, VOCABULARY, answer=ids), prefetch=prefetch)


def until(large: LargeModel, call: PendingCall, count: int) -> tuple[LargeToken, ...]:
    """Return the call's tokens once there are `count`, or, with 0, once all are there."""

    def arrived() -> bool:
        return call.ready and (len(call.result()) >= count > 0 or call.finished)

    large.wait(arrived, timeout_s=20)
    assert arrived()
    return call.result()


def texts(tokens: Sequence[LargeToken]) -> list[str]:
    return ["(end)" if token.is_eos else token.text for token in tokens]


@_SERVERS
def test_each_token_is_published_as_soon_as_it_arrives(
    server: Loopback, dialect: Dialect, writes: Any
) -> None:
    gate = threading.Semaphore(0)
    server.script.append(Reply(chunks=tuple(writes(_WORDS)), before=lambda _: gate.acquire()))
    with model(server, dialect) as large:
        call = read_streamed_tokens(large)
        for count in (1, 2):
            gate.release()
            published = until(large, call, count)
            assert len(published) == count
            assert published[0].uploaded_bytes == len(server.requests[0].body)
            assert not call.finished
        gate.release(9)
        tokens = until(large, call, 0)
    assert texts(tokens) == ["a", "b", " the"]
    assert sorted({token.latency_s for token in tokens}) == [token.latency_s for token in tokens]
    assert server.requests[0].json["stream"] is True


@_SERVERS
@pytest.mark.parametrize("stop", ["limit", "eos"])
def test_a_stream_gives_the_tokens_of_the_whole_reply(
    server: Loopback, dialect: Dialect, writes: Any, stop: str
) -> None:
    names = [*_WORDS, "<|im_end|>"] if stop == "eos" else _WORDS
    replies = []
    for whole in (False, True):
        parts = tuple(writes(names, stop=stop, whole=whole))
        server.script.append(Reply(parts[0]) if whole else Reply(chunks=parts))
        with model(server, dialect) as large:
            replies.append(
                until(large, read_streamed_tokens(large, prefetch=5 if stop == "eos" else 2), 0)
            )
            assert large.uploads.tokens == 7
            assert large.uploads.cached_tokens == 6
            assert large.uploads.completion_tokens == len(names)
    assert texts(replies[0]) == ["a", "b", " the", *(["(end)"] if stop == "eos" else [])]
    for streamed, unstreamed in zip(*replies, strict=True):
        for field in fields(LargeToken):
            if field.name != "latency_s":
                assert getattr(streamed, field.name) == getattr(unstreamed, field.name), field.name


@_SERVERS
def test_the_servers_count_of_a_prompt_replaces_a_higher_estimate(
    server: Loopback, dialect: Dialect, writes: Any
) -> None:
    server.script.append(Reply(chunks=tuple(writes(_WORDS))))
    with model(server, dialect) as large:
        until(large, read_streamed_tokens(large, repeated=20), 0)
        assert large.uploads.tokens == 7


@pytest.mark.parametrize("same", [True, False])
def test_a_streamed_character_of_several_tokens_keeps_the_ids_of_all(
    server: Loopback, same: bool
) -> None:
    rest = ["a", "Ã", "©", "b", "b", "<|im_end|>"]

    def answer(request: Request) -> Reply:
        names = rest[: request.json["n_predict"]]
        streamed = "stream" in request.json
        parts = llama(names, stop="eos" if "<|im_end|>" in names else "limit", whole=not streamed)
        return Reply(chunks=tuple(parts)) if streamed else Reply(parts[0])

    server.answer = answer
    written: list[LargeToken] = []
    with model(server, same=same) as large:
        while rest:
            tokens = until(large, read_streamed_tokens(large, prefetch=6), 0)
            written += tokens
            del rest[: sum(len(token.large_ids) for token in tokens)]
            assert large.can_stream
    ids = [VOCABULARY.id_of(name) for name in ("a", "Ã", "©", "b", "b", "<|im_end|>")]
    assert [i for token in written for i in token.large_ids] == ids
    assert "".join(token.text for token in written) == ("abb" if same else "aébb")
    # The tokens after the character are streamed again.
    assert server.requests[-1].json.get("stream")


def test_tokens_of_a_draft_model_are_counted_before_their_events(server: Loopback) -> None:
    parts = [json.loads(part.removeprefix(b"data: ")) for part in llama(_WORDS)]
    drafted = [part | {"tokens_predicted": 3 if i else 1} for i, part in enumerate(parts)]
    server.script.append(Reply(chunks=tuple(map(event, drafted))))
    with model(server) as large:
        assert texts(until(large, read_streamed_tokens(large), 0)) == ["a", "b", " the"]


def test_a_stream_that_breaks_keeps_the_tokens_received_and_is_not_retried(
    server: Loopback,
) -> None:
    server.script.append(Reply(chunks=(*llama(_WORDS)[:2], b"")))
    with model(server) as large:
        tokens = until(large, read_streamed_tokens(large), 0)
        assert texts(tokens) == ["a", "b"]
        assert large.uploads.completion_tokens == 2
        assert sum(token.uploaded_bytes for token in tokens) == large.uploads.size_bytes
    assert len(server.requests) == 1


def test_a_stream_that_breaks_before_its_first_token_is_retried(server: Loopback) -> None:
    server.script.extend([Reply(chunks=(b":\n\n", b"")), Reply(chunks=tuple(llama(_WORDS)))])
    with model(server) as large:
        assert texts(until(large, read_streamed_tokens(large), 0)) == ["a", "b", " the"]
    assert len(server.requests) == 2


def test_after_a_refused_stream_whole_replies_are_asked_for(
    server: Loopback,
) -> None:
    def answer(request: Request) -> Reply:
        if request.json.get("stream"):
            return Reply.of({"error": "no streams here"}, status=400)
        return Reply(llama(_WORDS, whole=True)[0])

    server.answer = answer
    with model(server) as large:
        for _ in range(2):
            assert texts(until(large, read_streamed_tokens(large), 0)) == ["a", "b", " the"]
        assert not large.can_stream
    assert [bool(request.json.get("stream")) for request in server.requests] == [True, False, False]


def test_one_damaged_stream_does_not_end_streaming(server: Loopback) -> None:
    def answer(request: Request) -> Reply:
        streamed.append(bool(request.json.get("stream")))
        if not streamed[-1]:
            return Reply(llama(_WORDS, whole=True)[0])
        if sum(streamed) in damaged:
            return Reply(b"<html>gateway</html>")
        return Reply(chunks=tuple(llama(_WORDS)))

    streamed: list[bool] = []
    damaged = {1, 3, 5, 6}
    server.answer = answer
    with model(server) as large:
        for _ in range(6):
            assert texts(until(large, read_streamed_tokens(large), 0)) == ["a", "b", " the"]
            assert large.can_stream == (sum(streamed) < 6)
        until(large, read_streamed_tokens(large), 0)
    # Two in a row are not by chance.
    assert streamed == [True, False, True, True, False, True, True, False, True, False, False]


@pytest.mark.parametrize("code", [400, 429, 500])
def test_an_error_in_a_stream_is_repeated_without_streaming(server: Loopback, code: int) -> None:
    def answer(request: Request) -> Reply:
        streamed.append(bool(request.json.get("stream")))
        if not streamed[-1]:
            return Reply(llama(_WORDS, whole=True)[0])
        return Reply(chunks=(event({"error": {"message": "provider is down", "code": code}}),))

    streamed: list[bool] = []
    server.answer = answer
    with model(server) as large:
        for is_first in (True, False):
            assert texts(until(large, read_streamed_tokens(large), 0)) == ["a", "b", " the"]
            assert large.can_stream is is_first
    assert streamed == [True, False, True, False]


def test_a_failure_that_streaming_does_not_cause_does_not_end_it(server: Loopback) -> None:
    server.answer = lambda request: Reply.of({"error": "bad prompt"}, status=400)
    with model(server) as large:
        with pytest.raises(LargeRefused, match="bad prompt"):
            until(large, read_streamed_tokens(large), 0)
        assert large.can_stream


@_SERVERS
def test_where_prefetched_tokens_do_not_fit_in_the_context_one_token_is_asked_for(
    server: Loopback, dialect: Dialect, writes: Any
) -> None:
    def answer(request: Request) -> Reply:
        if request.json.get("max_tokens", request.json.get("n_predict")) > 1:
            return Reply.of({"error": "the maximum context length is 9 tokens"}, status=400)
        return Reply(writes(_WORDS[:1], whole=True)[0])

    server.answer = answer
    with model(server, dialect) as large:
        assert texts(until(large, read_streamed_tokens(large), 0)) == ["a"]
        # A shorter answer is streamed again.
        assert large.can_stream
    assert len(server.requests) == 2


def test_a_whole_reply_to_a_streamed_request_is_read(server: Loopback) -> None:
    server.script.append(Reply(llama(_WORDS, whole=True)[0]))
    with model(server) as large:
        assert texts(until(large, read_streamed_tokens(large), 0)) == ["a", "b", " the"]


def test_an_error_in_the_middle_of_a_stream_ends_it(server: Loopback) -> None:
    failed = event({"error": {"message": "out of memory", "code": 500}})
    server.script.append(Reply(chunks=(*llama(_WORDS)[:1], failed)))
    with model(server) as large:
        assert texts(until(large, read_streamed_tokens(large), 0)) == ["a"]


def test_a_cancelled_stream_ends_and_its_usage_is_counted(server: Loopback) -> None:
    gate = threading.Semaphore(1)
    server.script.append(Reply(chunks=tuple(llama(_WORDS)), before=lambda _: gate.acquire()))
    with model(server) as large:
        call = read_streamed_tokens(large)
        until(large, call, 1)
        call.cancel()
        call.join(10)
        assert texts(call.result()) == ["a"]
        assert large.uploads.completion_tokens == 1
        assert large.uploads.tokens == 2
        gate.release(9)


def test_a_token_without_text_waits_for_the_positions_after_it() -> None:
    # Of another vocabulary, so that an id alone says nothing.
    reader = TokenReader()
    bridge = Bridge(reader, VOCABULARY, same_vocabulary=False)
    entries = (
        ReplyPosition(ReplyToken(5, data=b"a")),
        ReplyPosition(ReplyToken(6)),
        ReplyPosition(ReplyToken(7, data=b"b")),
    )
    for count in (1, 2, 3):
        received = entries[:count]
        text = "ab" if count == 3 else "a"
        answered = CompletionAnswer(received, text, False, Completion(received, text), 0)
        assert texts(first_ones(answered, bridge, reader)) == ["a"]


@_SERVERS
def test_a_reply_may_begin_with_a_byte_order_mark(
    server: Loopback, dialect: Dialect, writes: Any
) -> None:
    events, whole = tuple(writes(_WORDS)), next(iter(writes(_WORDS, whole=True)))
    server.script.append(Reply(chunks=(b"\xef\xbb\xbf" + events[0], *events[1:])))
    server.script.append(Reply(b"\xef\xbb\xbf" + whole))
    with model(server, dialect) as large:
        for _ in range(2):
            assert texts(until(large, read_streamed_tokens(large), 0)) == ["a", "b", " the"]


@_SERVERS
@pytest.mark.parametrize("body", [b"<html>sign in</html>", b"no\n", b""])
def test_a_reply_that_is_neither_json_nor_a_stream_is_named(
    server: Loopback, dialect: Dialect, writes: Any, body: bytes
) -> None:
    server.script.extend([Reply(body), Reply(body)])
    with model(server, dialect) as large, pytest.raises(LargeProtocolError, match="not JSON"):
        until(large, read_streamed_tokens(large), 0)
