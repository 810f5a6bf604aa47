"""Whatever bytes a server sends: a value or one of our errors, in bounded time and memory."""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlxroute.errors import LargeError, LargeProtocolError
from mlxroute.large import LargeModel
from mlxroute.large.dialects import LADDER, StreamingDialect, get_dialect, tokenize_routes
from mlxroute.large.dialects.json_fields import (
    ReportedError,
    error_message,
    parse_object,
    reported_error,
)
from mlxroute.large.dialects.sse import parse_events
from mlxroute.large.http.address import parse_address
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.limited_response import MAX_WIRE_BYTES
from mlxroute.large.http.transport import Transport
from mlxroute.large.negotiation.served_models import list_served_models
from mlxroute.large.prompt import Prompt
from mlxroute.large.reply import Completion
from mlxroute.large.vocabulary.token_reader import TokenReader
from tests.support.connected_clients import VOCABULARY
from tests.support.loopback import Loopback, Reply
from tests.support.negotiated import negotiated
from tests.support.vocabularies import context

_TOKEN = {"token": "a", "bytes": [97], "logprob": -0.5, "id": 5}
_POSITION = _TOKEN | {"top_logprobs": [_TOKEN]}
_USAGE = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 3}}
# Every key that a dialect reads, in one object.
_REPLY: dict[str, Any] = {
    "choices": [
        {
            "text": "a",
            "token_ids": [5],
            "finish_reason": "stop",
            "message": {"content": "a", "reasoning_content": ""},
            "logprobs": {
                "content": [_POSITION],
                "tokens": ["a"],
                "token_ids": [5],
                "token_logprobs": [-0.5],
                "top_logprobs": [{"a": -0.5}],
            },
        }
    ],
    "usage": _USAGE,
    "content": "a",
    "tokens": [5],
    "stop_type": "eos",
    "completion_probabilities": [_POSITION],
    "tokens_evaluated": 9,
    "tokens_predicted": 1,
    "timings": {"cache_n": 3},
    "truncated": False,
    "text": "a",
    "output_ids": [5],
    "meta_info": {
        "finish_reason": {"type": "stop"},
        "output_token_logprobs": [[-0.5, 5, "a"]],
        "output_top_logprobs": [[[-0.5, 5, "a"]]],
        "prompt_tokens": 9,
        "cached_tokens": 3,
        "completion_tokens": 1,
    },
    "generated_text": "a",
    "details": {
        "finish_reason": "eos_token",
        "tokens": [{"id": 5, "text": "a", "logprob": -0.5, "special": False}],
        "top_tokens": [[{"id": 5, "text": "a", "logprob": -0.5, "special": False}]],
        "prefill": [],
    },
    "response": "a",
    "thinking": "",
    "logprobs": [_POSITION],
    "done_reason": "stop",
    "prompt_eval_count": 9,
    "eval_count": 1,
    "error": None,
}
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**30, max_value=10**40)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["\ud83d", "\x00", "\x1b[2J", "\ufffd", "<|im_end|>", "x" * 2000, ""])
)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def changed_replies(draw: st.DrawFn) -> dict[str, Any]:
    """Return a reply with wrong values in one to three places, or without them."""
    reply = copy.deepcopy(_REPLY)
    for _ in range(draw(st.integers(1, 3))):
        node: Any = reply
        while node:
            keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 4)):
                node = node[key]
                continue
            if isinstance(node, dict) and draw(st.integers(0, 3)) == 0:
                del node[key]
            else:
                node[key] = draw(_JSON)
            break
    return reply


@given(reply=changed_replies() | st.dictionaries(st.sampled_from(sorted(_REPLY)), _JSON))
@settings(max_examples=100, deadline=None)
def test_any_json_is_a_completion_or_a_protocol_error_in_every_dialect(
    reply: dict[str, Any],
) -> None:
    reader = TokenReader()
    for dialect in LADDER:
        prompt = Prompt(text="x", answer_start="")
        try:
            completion = dialect.completion(reply, prompt)
        except LargeProtocolError:
            continue
        else:
            check_completion(completion)
            reader.learn(completion.positions)
            for position in completion.positions:
                reader.text_bytes(position.token)
                reader.ends(position)


def check_completion(completion: Completion) -> None:
    assert completion.positions
    completion.text.encode()
    for position in completion.positions:
        for token in (position.token, *position.top):
            assert token.logprob is None or token.logprob <= 0
            assert token.token_id is None or 0 <= token.token_id < 2**31
            (token.text or "").encode()
            (token.piece or "").encode()
    for count in (completion.prompt_tokens, completion.cached_tokens, completion.completion_tokens):
        assert count is None or type(count) is int


def test_the_reply_with_every_key_is_one_for_every_dialect() -> None:
    for dialect in LADDER:
        with contextlib.suppress(LargeProtocolError):
            check_completion(dialect.completion(_REPLY, Prompt(text="x")))


@given(st.binary(max_size=80) | _JSON.map(json.dumps).map(str.encode))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"9" * 100_000)
@example(b'{"error": {"message": "\\ud800"}, "error": 1}')
@example(b"\xef\xbb\xbf{}")
@example(b"\x00" * 10)
@settings(deadline=None)
def test_any_body_is_an_object_or_a_protocol_error_and_any_error_body_has_a_text(
    body: bytes,
) -> None:
    with contextlib.suppress(LargeProtocolError):
        value = parse_object(body)
        assert isinstance(value, dict)
        assert isinstance(reported_error(value), ReportedError | None)
    assert isinstance(error_message(body), str)


_LINES = st.sampled_from(
    [
        b"data: {}",
        b"data:",
        b"data: [DONE]",
        b": ping",
        b"event: x",
        b"",
        b"data: [1]",
        b"{",
        b"id: 1",
    ]
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Return the events of a stream, some of them wrong, cut off anywhere."""
    parts = draw(
        st.lists(
            _LINES
            | st.binary(max_size=12)
            | changed_replies().map(lambda reply: b"data: " + json.dumps(reply).encode()),
            max_size=5,
        )
    )
    body = draw(st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r"])).join(parts) + b"\n"
    return body[: draw(st.integers(0, len(body)))]


@given(streams())
@settings(max_examples=60, deadline=None)
def test_any_stream_is_a_completion_or_a_protocol_error(body: bytes) -> None:
    for dialect in LADDER:
        if isinstance(dialect, StreamingDialect):
            with contextlib.suppress(LargeProtocolError):
                reply = dialect.join_events(parse_events(body))
                check_completion(dialect.completion(reply, Prompt(text="x")))


@given(
    tokens=_JSON | st.lists(st.integers(), max_size=3),
    content=_JSON | st.just(tokenize_routes._SAMPLE),
)
@settings(max_examples=100, deadline=None)
def test_any_reply_of_a_tokenise_route_is_ids_or_no_route(tokens: Any, content: Any) -> None:
    def post(path: str, body: Mapping[str, object]) -> Mapping[str, object]:
        return parse_object(
            json.dumps({"tokens": tokens, "content": content, "prompt": content}).encode()
        )

    with contextlib.suppress(LargeError):
        routes = tokenize_routes.find_tokenize_routes(post, model=None)
        ids = () if routes is None else routes.encode("x")
        assert isinstance(ids, tuple)
        assert all(type(token_id) is int for token_id in ids)


# Over a connection


@given(data=_JSON, owner=_JSON)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_list_of_models_gives_names_that_can_be_sent_back(
    server: Loopback, data: Any, owner: Any
) -> None:
    server.script.append(Reply.of({"data": [data, {"id": data, "meta": owner}, {"id": "m"}]}))
    transport = Transport(parse_address(server.url))
    models = list_served_models(transport, Deadline(30))
    transport.close()
    assert models[-1].name == "m"
    for model in models:
        model.name.encode()
        assert model.context_length is None or model.context_length > 0


_HEADS = st.lists(
    st.sampled_from(
        [
            *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked"),
            *(
                b"Content-Length: 5",
                b"Content-Length: -5",
                b"Content-Length: 9, 9",
                b"Content-Length: x",
            ),
            *(
                b"Content-Encoding: br",
                b"Retry-After: 1e999",
                b"Location: http://[",
                b"Connection: close",
            ),
            *(b"X: " + b"y" * 70_000, b": no name", b"no colon", b"X: \xff\xfe", b"\x00: \x00"),
        ]
    ),
    max_size=4,
)
_BODIES = st.sampled_from(
    [
        *(
            b"",
            b"{}",
            b"5\r\nhello\r\n0\r\n\r\n",
            b"-5\r\nhello",
            b"zz\r\n",
            b"FFFFFFFFFFFFFFFFFFFF\r\nx",
        ),
        *(b"0\r\nX: y\r\n", b"5;ext=1\r\nhello\r\n", b"5\nhello\n0\n\n", b"\r\n\r\n"),
    ]
)


@given(
    status=st.sampled_from(
        [b"200 OK", b"200", b"100 Continue", b"204 No", b"304 No", b"999 ?", b"-1 x", b"abc"]
    ),
    version=st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2", b"ICY"]),
    heads=_HEADS,
    body=_BODIES,
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_status_line_headers_and_chunks_are_a_large_error_in_time(
    server: Loopback, status: bytes, version: bytes, heads: list[bytes], body: bytes
) -> None:
    raw = b"\r\n".join([version + b" " + status, *heads, b"", body])
    server.script.clear()
    server.script.append(Reply(raw=raw))
    large = negotiated(LargeModel(server.url, model="m", timeout_s=3))
    began_s = time.monotonic()
    with large, pytest.raises(LargeError) as caught:
        large.next_token(context("x", VOCABULARY))
    assert time.monotonic() - began_s < 6
    assert str(caught.value).isprintable()


_MB = 1 << 20
_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        _CHUNKED + b"-1\r\n",
        _CHUNKED + b"FFFFFFFFFFFF\r\n",
        _CHUNKED + b"1;",
        _CHUNKED + b"0\r\nX: ",
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 ",
        b"",
    ],
    ids=["body", "negative chunk", "huge chunk", "extension", "trailer", "header", "status", "all"],
)
def test_an_endless_part_of_a_reply_ends_the_call_before_it_fills_the_memory(
    server: Loopback, head: bytes
) -> None:
    server.script.extend([Reply(raw=head, body=b" " * _MB, times=101)] * 4)
    began_s = time.monotonic()
    large = negotiated(LargeModel(server.url, model="m", timeout_s=20))
    with large, pytest.raises(LargeError):
        large.next_token(context("x", VOCABULARY))
    assert time.monotonic() - began_s < 15
    # What the system's buffers hold is sent as well.
    assert server.sent_bytes <= 4 * (MAX_WIRE_BYTES + 8 * _MB)


def test_an_endless_series_of_interim_replies_ends_at_the_deadline(server: Loopback) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    server.script.append(Reply(raw=interim, body=interim * 1000, times=100_000))
    began_s = time.monotonic()
    large = negotiated(LargeModel(server.url, model="m", timeout_s=0.3))
    with large, pytest.raises(LargeError):
        large.next_token(context("x", VOCABULARY))
    assert time.monotonic() - began_s < 4


def test_a_stream_of_single_bytes_is_read_in_time(server: Loopback) -> None:
    event = b"data: " + json.dumps({"tokens": [5], "content": "a"}).encode() + b"\n\n"
    body = event * 400
    chunks = tuple(body[i : i + 1] for i in range(len(body)))
    server.script.append(Reply(chunks=chunks))
    dialect = get_dialect("llama-server completion")
    assert dialect is not None
    began_s = time.monotonic()
    calls: list[int] = []

    def listen(part: bytes) -> bool:
        calls.append(len(part))
        return True

    transport = Transport(parse_address(server.url))
    reply = transport.call("/x", body=b"{}", deadline=Deadline(60), listener=listen)
    transport.close()
    assert reply.body == body
    # It is called for lines, not for bytes.
    assert len(calls) <= 2 * 400
    assert time.monotonic() - began_s < 30


@pytest.fixture
def server() -> Any:
    with Loopback() as loopback:
        yield loopback
