"""Requests as no honest client sends them: refused or closed, with nothing leaked or held up."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from mlxroute.serving.http import listener
from mlxroute.serving.http.endpoint_app import create_app
from mlxroute.serving.http.guard import AccessRules
from mlxroute.serving.http.listener import EndpointServer, bind
from mlxroute.small import SmallModel
from tests.support.endpoint import chat, make_session

_KEY = "0123456789abcdef-key"
_AUTHORIZATION = f"Authorization: Bearer {_KEY}\r\n"
_MIB = 2**20
_MAX_REPLY_S = 5.0


@dataclass(slots=True)
class Served:
    """An endpoint in a thread, and the lines of its log."""

    port: int
    log: list[str] = field(default_factory=list)

    def send(self, data: bytes, *, leaves: bool = False) -> bytes:
        """Send bytes and return all that comes back until the connection is closed."""
        received = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=_MAX_REPLY_S) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(data)
                if leaves:
                    sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while part := sock.recv(65_536):
                    received += part
        return received

    def check(self) -> None:
        """Check that another client gets an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_MAX_REPLY_S)
        with contextlib.closing(connection):
            headers = {"x-api-key": _KEY}
            body = json.dumps(chat(max_tokens=2))
            connection.request("POST", "/v1/chat/completions", body, headers)
            assert connection.getresponse().status == 200


@contextlib.contextmanager
def serving(small: SmallModel) -> Iterator[Served]:
    lines: list[str] = []

    def notify(line: str) -> None:
        lines.append(line)

    app = create_app(make_session(small), rules=AccessRules(keys=(_KEY,)), notify=notify)
    server = EndpointServer(app, on_second_signal=lambda: None)
    sock = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield Served(sock.getsockname()[1], lines)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def served(small: SmallModel) -> Iterator[Served]:
    with serving(small) as served:
        yield served


def head(method: str, path: str, *headers: str, host: str = "127.0.0.1", key: str = _KEY) -> bytes:
    """Return the head of a request after which the connection is to be closed."""
    lines = [f"Host: {host}", f"Authorization: Bearer {key}", "Connection: close", *headers]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1")


def post(body: Any, *headers: str, key: str = _KEY) -> bytes:
    """Return a chat completion; `body` is JSON or bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = f"Content-Length: {len(data)}"
    return head("POST", "/v1/chat/completions", length, *headers, key=key) + data


def unusual_length(*headers: str, body: bytes = b"{}") -> bytes:
    return head("POST", "/v1/chat/completions", *headers) + body


_CHUNKED = "Transfer-Encoding: chunked"
_SMUGGLED = b"0\r\n\r\n" + head("GET", "/metrics")
_MEBIBYTES = b"".join([b"100000\r\n", b" " * _MIB, b"\r\n"]) * 20
_UPGRADE = ("Upgrade: websocket", "Sec-WebSocket-Key: AAAA", "Sec-WebSocket-Version: 13")
_HOSTILE = {
    # Who asks
    "another host": (403, head("GET", "/v1/models", host="evil.example")),
    "a user in the host": (403, head("GET", "/v1/models", host="127.0.0.1@evil.example")),
    "a control character in the host": (400, head("GET", "/v1/models", host="127.0.0.1\x00")),
    "two hosts": (400, head("GET", "/v1/models", "Host: evil.example")),
    "no host": (400, b"GET /v1/models HTTP/1.1\r\n\r\n"),
    "HTTP/1.0 without a host": (403, f"GET /v1/models HTTP/1.0\r\n{_AUTHORIZATION}\r\n".encode()),
    "a wrong key": (401, head("GET", "/v1/models", key="wrong")),
    "a key that is no ASCII": (401, head("GET", "/v1/models", key="\xff\xfe")),
    "a long key": (401, head("GET", "/v1/models", key="x" * 50_000)),
    # Sizes
    "20 MB": (413, post(b" " * 20 * _MIB)),
    "20 MB in chunks": (413, unusual_length(_CHUNKED, body=_MEBIBYTES)),
    "20 MB and a wrong key": (401, post(b" " * 20 * _MIB, key="wrong")),
    "a text of 3 MB": (400, post(chat("a b " * 800_000))),
    "a word of 3 MB": (400, post(chat("a" * 3 * _MIB))),
    "ten thousand messages": (400, post(chat(messages=chat()["messages"] * 10_000))),
    "a model of 1 MB": (404, post(chat(model="m" * _MIB))),
    "a role of 1 MB": (400, post(chat(messages=[{"role": "r" * _MIB, "content": ""}]))),
    "a long path": (400, head("GET", "/v1/models/" + "a" * 400_000)),
    # Ids, names and headers
    "../ in an id": (404, head("GET", "/v1/mlxroute/answers/../../etc/passwd")),
    "../ in an id, encoded": (404, head("GET", "/v1/mlxroute/answers/..%2f..%2fetc%2fpasswd")),
    "../ in a model": (404, head("GET", "/v1/models/../../etc/passwd")),
    "controls in an id": (404, head("GET", "/v1/mlxroute/answers/%00%1b%5b2J")),
    "controls in a model": (404, post(chat(model="a\x1b[2J\r\nX-Evil: 1\x00"))),
    "controls in an origin": (403, head("GET", "/v1/models", "Origin: \x1b[2J")),
    "a zero in a header": (400, head("GET", "/v1/models", "X-A: a\x00b")),
    "a lone CR in a header": (400, head("GET", "/v1/models", "X-A: a\rX-Evil: 1")),
    "a space in a header's name": (400, head("GET", "/v1/models", "X A: b")),
    # Lengths that two readers may read in two ways
    "two lengths": (400, unusual_length("Content-Length: 2", "Content-Length: 3")),
    "a list of lengths": (400, unusual_length("Content-Length: 2, 3")),
    "a negative length": (400, unusual_length("Content-Length: -2")),
    "a signed length": (400, unusual_length("Content-Length: +2")),
    "a huge length": (400, unusual_length(f"Content-Length: {'9' * 5000}")),
    "chunks and a length": (400, unusual_length(_CHUNKED, "Content-Length: 4", body=_SMUGGLED)),
    "an unknown coding": (400, unusual_length("Transfer-Encoding: xchunked")),
    "two codings": (400, unusual_length(_CHUNKED, "Transfer-Encoding: identity")),
    "a wrong chunk size": (400, unusual_length(_CHUNKED, body=b"zz\r\n")),
    # JSON
    "deep lists": (400, post(b"[" * _MIB)),
    "deep objects": (400, post(b'{"a":' * 200_000)),
    "a number of 4,000 digits": (400, post(b'{"max_tokens": %b}' % (b"9" * 4000))),
    "a number of a million digits": (400, post(b'{"max_tokens": %b}' % (b"9" * _MIB))),
    "an infinite number": (400, post(b'{"temperature": 1e999}')),
    "a budget of 4,000 digits": (400, post(b'{"budget": %b}' % (b"9" * 4000))),
    "a surrogate as a role": (400, post(b'{"messages": [{"role": "\\udc00", "content": ""}]}')),
    "a surrogate as a model": (404, post(b'{"model": "\\udc00"}')),
    "a key twice": (400, post(b'{"n": 1, "n": 2}')),
    # Methods and protocols
    "GET": (405, head("GET", "/v1/chat/completions")),
    "PUT": (405, head("PUT", "/v1/chat/completions")),
    "TRACE": (405, head("TRACE", "/v1/models")),
    "CONNECT": (404, head("CONNECT", "evil.example:443")),
    "an unknown method": (405, head("X" * 10_000, "/v1/models")),
    "a websocket": (405, head("GET", "/v1/chat/completions", *_UPGRADE)),
    "HTTP/0.9": (400, b"GET /v1/models\r\n\r\n"),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 100),
}


@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_requests_are_refused(served: Served, name: str) -> None:
    status, data = _HOSTILE[name]
    began_s = time.monotonic()
    reply = served.send(data)
    assert time.monotonic() - began_s < _MAX_REPLY_S
    # One reply: the rest of a body is no request.
    assert reply.count(b"HTTP/1.1 ") == 1
    assert reply.startswith(b"HTTP/1.1 %d " % status), reply[:200]
    assert len(reply) < 2000
    # Nothing of the server, and nothing that a terminal or a proxy would obey.
    for leak in (_KEY.encode(), b"Traceback", b".py", b"root:", b"\x1b", b"\r\nX-Evil"):
        assert leak not in reply
    served.check()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(post(chat(max_tokens=2)).replace(b"HTTP/1.1", b"HTTP/1.0"), id="HTTP/1.0"),
        pytest.param(post(chat(max_tokens=2), "Range: bytes=0-3"), id="a range"),
        pytest.param(post(chat(max_tokens=2), "X-A: \x1b[2J"), id="controls in a header"),
        pytest.param(post({**chat(max_tokens=2), "f" * _MIB: 1}), id="a field of 1 MB"),
        pytest.param(post(chat("\ud800", max_tokens=2, stop="\udc00")), id="lone surrogates"),
        pytest.param(head("GET", "/", "Range: bytes=0-3,5-,-1"), id="ranges of the page"),
    ],
)
def test_unusual_requests_are_answered_in_full(served: Served, data: bytes) -> None:
    reply = served.send(data)
    assert reply.startswith(b"HTTP/1.1 200 "), reply[:300]
    assert b"content-range" not in reply.lower()


def test_a_request_that_stops_early_is_closed(served: Served) -> None:
    for data in (post(chat())[:-20], head("GET", "/health")[:-2], b"\r\n", b""):
        assert not served.send(data, leaves=True).startswith(b"HTTP/1.1 2")
    served.check()


def test_the_log_has_figures_alone(served: Served) -> None:
    served.check()
    log = "\n".join(served.log)
    assert "tokens/s" in log
    for text in (_KEY, "quick", "Traceback", "\x1b", "error"):
        assert text not in log


def test_a_client_that_reads_nothing_is_closed(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_MAX_UNREAD_S", 0.3)
    page = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with serving(small) as served, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(_MAX_REPLY_S)
        sock.connect(("127.0.0.1", served.port))
        # More than the buffers of the system hold.
        sock.sendall(page * 400)
        time.sleep(0.2)
        served.check()
        time.sleep(0.8)
        received = 0
        with contextlib.suppress(ConnectionError):
            while part := sock.recv(65_536):
                received += len(part)
        assert received < 16 * _MIB


def test_a_thousand_idle_connections(small: SmallModel) -> None:
    listener._raise_file_limit()
    with serving(small) as served, contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
        served.check()
