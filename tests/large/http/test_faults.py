"""Broken, hostile and slow servers: one clear error, in time, and no token."""

from __future__ import annotations

import contextlib
import gzip
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxroute.errors import (
    LargeError,
    LargeProtocolError,
    LargeRefused,
    LargeTimeout,
    LargeUnreachable,
)
from mlxroute.large import LargeModel
from mlxroute.large.dialects.mlx_lm import MlxLm
from mlxroute.large.dialects.tokenize_routes import VllmTokenizeRoutes
from mlxroute.large.http import retry
from mlxroute.large.http.deadline import Deadline
from tests.support.connected_clients import THE, VOCABULARY, legacy
from tests.support.loopback import Loopback, Reply, mlx_lm_reply
from tests.support.negotiated import PLAIN, ask_once, negotiated
from tests.support.vocabularies import context


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "too\\nlong", "code": 400}}', "too long"),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b'{"object": "error", "message": "queue is full"}', "queue is full"),
        # The shapes of hosted providers.
        (b'[{"error": {"code": 400, "message": "Unknown name", "details": []}}]', "Unknown name"),
        (b'{"code": "invalid-argument", "error": "no such parameter"}', "no such parameter"),
        (
            b'{"message": {"detail": [{"loc": ["body", "n"], "msg": "not permitted"}, 1]}}',
            "n: not permitted",
        ),
        (
            b'{"message": "{\\"detail\\": [{\\"loc\\": [0], \\"msg\\": \\"no\\"}, \\"b\\"]}"}',
            "no; b",
        ),
        (
            b'{"error": {"message": "Provider returned error", "metadata":'
            b' {"raw": "{\\"error\\": {\\"message\\": \\"too few\\"}}"}}}',
            "too few",
        ),
        (b'{"error": {"message": "{not JSON"}}', "{not JSON"),
        (b'{"detail": "nope"}', "nope"),
        (b'{"detail": [{"msg": "field required", "loc": []}]}', "field required"),
        (b'"just text"', "just text"),
        (b"Not Found", "Not Found"),
        (b"<html>gateway</html>", "no reason given"),
        (b"", "no reason given"),
        (b'{"error": {"message": "\\u001b[2Jgone\\u0007"}}', "[2Jgone"),
        (b'{"error": "' + b"x" * 5000 + b'"}', "x" * 299 + "…"),
    ],
)
def test_an_error_quotes_the_server_in_one_clean_line(
    server: Loopback, body: bytes, said: str
) -> None:
    with pytest.raises(LargeRefused) as caught:
        ask_once(server, Reply(body, status=422))
    assert str(caught.value) == f"{server.url} answered 422: {said}"


def test_a_refusal_of_a_tokenise_route_is_one_clean_line_without_the_key(server: Loopback) -> None:
    echo = {"error": {"message": 'no: "sk-\\"1234"\x1b[2J'}}
    server.script.append(Reply.of(echo, status=403))
    with LargeModel(server.url, api_key='sk-\\"1234') as large:
        post = partial(large._requester.post, deadline=Deadline(30))
        routes = VllmTokenizeRoutes(post, model="m")
        with pytest.raises(LargeRefused) as caught:
            routes.encode("text")
    assert str(caught.value) == f'{server.url} answered 403: no: "[key]" [2J; check the API key'
    assert caught.value.status == 403


def test_an_error_with_status_200_is_an_error(server: Loopback) -> None:
    with pytest.raises(LargeRefused, match="provider is down"):
        ask_once(server, {"error": {"message": "provider is down", "code": 502}})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>hello</html>",
        b'{"choices": [',
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [7]}',
        b'{"choices": [{"text": 5}]}',
        b'{"choices": [{"text": "\\ud83d", "finish_reason": "length"}]}',
        b'{"choices": [{"text": "a", "logprobs": {"tokens": [3]}}]}',
        b'{"choices": [{"text": "a", "logprobs": {"content": [{"token": "a"}]}}]}',
        b'{"choices": [{"text": "a", "logprobs": [1]}]}',
        b"[" * 500_000,
        b'{"choices": ' + b"9" * 10_000 + b"}",
    ],
)
def test_a_malformed_completion_is_a_protocol_error(server: Loopback, body: bytes) -> None:
    with pytest.raises(LargeProtocolError):
        ask_once(server, Reply(body))


HUGE = "-1" + "0" * 400


@pytest.mark.parametrize("value", ["NaN", "0.5", "-Infinity", HUGE, '"-1"', "null", "true"])
def test_an_invalid_logprob_is_a_protocol_error(server: Loopback, value: str) -> None:
    body = mlx_lm_reply([(THE, "Ġthe"), (2, "a")]).body.replace(b"-0.1", value.encode())
    body = body.replace(b"-7.0", b"-Infinity")
    with pytest.raises(LargeProtocolError):
        ask_once(server, Reply(body), dialect=MlxLm())


@pytest.mark.parametrize("token_id", [-1, 2**40, 1.5, "7", None, True])
def test_an_invalid_id_is_a_protocol_error(server: Loopback, token_id: object) -> None:
    reply = mlx_lm_reply([(token_id, "Ġthe"), (2, "a")])  # type: ignore[list-item]
    with pytest.raises(LargeProtocolError):
        ask_once(server, reply, dialect=MlxLm())


def test_a_missing_server_is_unreachable_at_once(short_retry_pauses: None) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with LargeModel(url) as large, pytest.raises(LargeUnreachable) as caught:
        large.connect()
    assert str(caught.value) == f"no connection to {url}/v1 (Connection refused)"


def test_a_connection_cut_in_mid_reply_is_unreachable(
    server: Loopback, short_retry_pauses: None
) -> None:
    reply = Reply.of(legacy("a"))
    for cut_at in (0, 10, 150):
        server.script.clear()
        server.script.extend([Reply(reply.body, cut_at=cut_at)] * (retry.RETRIES + 1))
        with (
            negotiated(LargeModel(server.url, model="m")) as large,
            pytest.raises(LargeUnreachable),
        ):
            large.next_token(context("x", VOCABULARY))


@pytest.mark.parametrize(
    "reply",
    [
        Reply(stall_s=120),
        Reply(b" " * 4000, byte_every_s=0.02),
        Reply(raw=b"HTTP/1.1 200 OK\r\nX: " + b"y" * 4000, byte_every_s=0.02),
    ],
    ids=["silent", "a byte now and then", "endless header"],
)
def test_the_deadline_holds_whatever_the_server_does(server: Loopback, reply: Reply) -> None:
    server.script.extend([reply, Reply.of(legacy("a"))])
    with negotiated(LargeModel(server.url, model="m", timeout_s=20)) as large:
        start_s = time.monotonic()
        with pytest.raises(LargeTimeout, match=r"in 0\.3 s"):
            large.next_token(context("x", VOCABULARY), deadline_s=0.3)
        assert time.monotonic() - start_s < 20
        used = server.connections
        assert large.next_token(context("x", VOCABULARY)).text == "a"
        assert server.connections == used + 1


def test_no_time_left_is_a_timeout_without_a_call(server: Loopback) -> None:
    with LargeModel(server.url) as large, pytest.raises(LargeTimeout):
        large.next_token(context("x", VOCABULARY), deadline_s=0)
    assert server.requests == []


@pytest.mark.parametrize("declared", [True, False])
def test_an_endless_reply_is_cut_off(server: Loopback, declared: bool) -> None:
    body = b" " * (3 << 20)
    head = b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: %d\r\n\r\n" % len(body) if declared else b"")
    with pytest.raises(LargeProtocolError, match="longer than"):
        ask_once(server, Reply(raw=head + (b"" if declared else b"\r\n") + body))


def test_compression_is_neither_requested_nor_unpacked(server: Loopback) -> None:
    bomb = gzip.compress(b" " * (5 << 20))
    with pytest.raises(LargeProtocolError, match="compressed"):
        ask_once(server, Reply(bomb, headers={"Content-Encoding": "gzip"}))
    assert server.requests[-1].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("http://me:word@elsewhere.example/v1/completions?key=1", "http://elsewhere.example/v1"),
        ("//elsewhere.example/\x1b[2J", "http://elsewhere.example/ [2J"),
        ("/login", "SERVER/login"),
        ("http://[oops", "an invalid URL"),
    ],
)
def test_a_redirect_is_an_error_that_names_its_target(
    server: Loopback, location: str, target: str
) -> None:
    with pytest.raises(LargeRefused) as caught:
        ask_once(server, Reply(status=307, headers={"Location": location}))
    target = target.replace("SERVER", server.url.removesuffix("/v1"))
    assert f" redirects to {target}, which is not followed;" in str(caught.value)


def test_the_body_of_a_redirect_is_not_read(server: Loopback) -> None:
    head = b"HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 99\r\n\r\n"
    with pytest.raises(LargeRefused, match="redirects"):
        ask_once(server, Reply(raw=head, cut_at=len(head)))


@given(raw=st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(b"HTTP/1.1 200 ".__add__)))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_invalid_http_is_a_large_error(server: Loopback, raw: bytes) -> None:
    with pytest.raises(LargeError):
        ask_once(server, Reply(raw=raw), timeout_s=5)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_change_to_a_reply_gives_a_token_or_a_large_error(
    server: Loopback, data: st.DataObject
) -> None:
    mlx = data.draw(st.booleans())
    reply = mlx_lm_reply([(THE, "Ġthe"), (2, "a")]).body if mlx else json.dumps(legacy(" the"))
    value = json.loads(reply)
    node: Any = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            node[key] = data.draw(JSON)
            break
        node = node[key]
    server.script.clear()
    changed = Reply.of(value)
    with contextlib.suppress(LargeError):
        token = ask_once(server, changed, dialect=MlxLm() if mlx else PLAIN)
        assert token.is_eos or all(VOCABULARY.piece(i) is not None for i in token.token_ids)
        assert "\ufffd" not in token.text


def test_an_interrupt_propagates_and_the_connection_is_not_reused(
    server: Loopback,
) -> None:
    server.script.extend([Reply(stall_s=30), Reply.of(legacy("a"))])
    with negotiated(LargeModel(server.url, model="m")) as large:
        main = threading.main_thread().ident
        assert main is not None
        timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            large.next_token(context("x", VOCABULARY))
        timer.join()
        used = server.connections
        assert large.next_token(context("x", VOCABULARY)).text == "a"
        assert server.connections == used + 1


# Replies at the edge of HTTP

BODY = json.dumps(legacy("a")).encode()


def raw_reply(head: str, body: bytes = BODY) -> Reply:
    return Reply(raw=head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body)


@pytest.mark.parametrize(
    "reply",
    [
        raw_reply(f"HTTP/2 200 OK\nContent-Length: {len(BODY)}"),
        raw_reply(f"HTTP/1.1 20 OK\nContent-Length: {len(BODY)}"),
        Reply(raw=BODY),
        Reply(raw=b"\x15\x03\x01\x00\x02\x02\x16"),
        raw_reply("HTTP/1.1 200 OK\n" + "X: y\n" * 200),
        raw_reply("HTTP/1.1 200 OK\nX: " + "y" * 100_000),
        raw_reply(f"HTTP/1.1 200 OK\nContent-Length: 3\nContent-Length: {len(BODY)}"),
        raw_reply("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"-5\r\n" + BODY),
    ],
)
def test_what_is_not_http_is_said_and_not_called_a_lost_connection(
    server: Loopback, reply: Reply
) -> None:
    with pytest.raises(LargeProtocolError, match=r"sent no valid HTTP reply$"):
        ask_once(server, reply)
    assert len(server.requests) == 1


def test_an_empty_content_encoding_is_none(server: Loopback) -> None:
    reply = Reply(BODY, headers={"Content-Encoding": ""})
    assert ask_once(server, reply).text == "a"


@pytest.mark.parametrize("status", [300, 301, 304])
def test_a_redirect_without_a_target_is_a_status(server: Loopback, status: int) -> None:
    with pytest.raises(LargeRefused, match=f"answered {status}: no reason given$"):
        ask_once(server, Reply(b"", status=status))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"errors": [{"message": "no quota"}]}', 200),
        (b'{"errors": ["no quota"]}', 200),
        (b'{"success": false, "message": "no quota"}', 200),
        (b'{"code": 402, "msg": "no quota"}', 402),
    ],
)
def test_an_error_with_status_200_is_quoted_in_any_shape(
    server: Loopback, body: bytes, status: int
) -> None:
    with pytest.raises(LargeRefused, match=f"answered {status}: no quota$"):
        ask_once(server, Reply(body))


def test_a_server_without_tls_is_said(server: Loopback) -> None:
    url = server.url.replace("http:", "https:")
    with LargeModel(url) as large, pytest.raises(LargeUnreachable, match=r"begins with http://$"):
        large.connect()


@pytest.mark.parametrize("is_proxy", [False, True])
def test_a_handshake_that_stalls_is_no_connection_and_not_a_late_reply(
    monkeypatch: pytest.MonkeyPatch, is_proxy: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        url = f"https://127.0.0.1:{port}/v1"
        way = ""
        if is_proxy:
            monkeypatch.setenv("https_proxy", f"http://me:word@127.0.0.1:{port}")
            monkeypatch.setenv("no_proxy", "")
            url, way = "https://box.example/v1", f" through the proxy http://127.0.0.1:{port}"
        large = LargeModel(url, timeout_s=20, connect_timeout_s=0.3)
        with large, pytest.raises(LargeUnreachable) as caught:
            large.connect()
    assert str(caught.value) == f"no connection to {url}{way} in 0.3 s; is it running?"
