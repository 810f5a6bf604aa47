"""Faults of a network and of the servers in it, each a change to an honest reply; and a proxy."""

from __future__ import annotations

import gzip
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from email.utils import formatdate
from http.client import HTTPConnection, HTTPException
from typing import Final
from urllib.parse import urlsplit

from tests.support.loopback import Loopback, Reply, Request

_HTML: Final = b"<html><body>gateway</body></html>"
_LOADING: Final = b'{"error": {"message": "Loading model", "code": 503}}'


@dataclass(frozen=True, slots=True)
class NetworkFault:
    """A change to an honest reply; a `harmless` one leaves the reply complete and right."""

    name: str
    change: Callable[[Reply], Reply]
    harmless: bool = False


def _raw(reply: Reply, *headers: str, version: str = "1.1", before: bytes = b"") -> Reply:
    """Return a reply of these header lines and the body, after which the connection is closed."""
    head = "\r\n".join([f"HTTP/{version} {reply.status} OK", *headers, "", ""])
    return Reply(raw=before + head.encode("latin-1") + reply.body)


def _length(reply: Reply, more: int = 0) -> str:
    return f"Content-Length: {len(reply.body) + more}"


def _chunked(reply: Reply, *, last: bytes) -> Reply:
    half = len(reply.body) // 2
    parts = (reply.body[:half], reply.body[half:])
    framed = b"".join(b"%x;name=value\r\n%b\r\n" % (len(part), part) for part in parts if part)
    whole = replace(reply, body=framed + last)
    return _raw(whole, "Transfer-Encoding: chunked", "Content-Type: application/json")


def _instead(body: bytes, status: int = 200, **headers: str) -> Callable[[Reply], Reply]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda reply: Reply(body, status=status, headers=named)


def _status(status: int, **headers: str) -> NetworkFault:
    body = json.dumps({"error": {"message": f"fault {status}"}}).encode()
    name = " ".join([f"status {status}", *headers])
    return NetworkFault(name, _instead(body, status, **headers))


def _cut(reply: Reply, *, reset: bool) -> Reply:
    return replace(reply, cut_at=60 + len(reply.body) // 2, reset=reset)


def _harmless(name: str, change: Callable[[Reply], Reply]) -> NetworkFault:
    return NetworkFault(name, change, harmless=True)


FAULTS: Final = (
    # Connections
    NetworkFault("silent", lambda reply: replace(reply, stall_s=120)),
    NetworkFault("a byte now and then", lambda reply: replace(reply, byte_every_s=0.1)),
    NetworkFault("reset before the reply", lambda reply: replace(reply, cut_at=0, reset=True)),
    NetworkFault("closed before the reply", lambda reply: replace(reply, cut_at=0)),
    NetworkFault("reset in mid-reply", lambda reply: _cut(reply, reset=True)),
    NetworkFault("closed in mid-reply", lambda reply: _cut(reply, reset=False)),
    # Statuses
    *map(_status, (400, 401, 403, 404, 408, 413, 422, 429, 500, 501, 503, 504, 529)),
    _status(429, Retry_After="3600"),
    _status(503, Retry_After="0.1"),
    _status(429, Retry_After=formatdate(4e9, usegmt=True)),
    NetworkFault("loading", _instead(_LOADING, 503)),
    NetworkFault("a gateway's page", _instead(_HTML, 502)),
    NetworkFault("no content", lambda reply: Reply(raw=b"HTTP/1.1 204 No Content\r\n\r\n")),
    NetworkFault("a redirect to itself", _instead(b"", 307, Location="/v1/completions")),
    NetworkFault("a redirect elsewhere", _instead(b"", 302, Location="http://evil.example/v1")),
    NetworkFault("a redirect without a target", _instead(b"", 301)),
    # Bodies
    NetworkFault("200 with an error", _instead(b'{"error": {"message": "overloaded"}}')),
    NetworkFault("200 with an event of an error", _instead(b'data: {"error": "overloaded"}\n\n')),
    NetworkFault("200 with a page", _instead(_HTML)),
    NetworkFault("an empty body", _instead(b"")),
    NetworkFault("null", _instead(b"null")),
    NetworkFault("an empty object", _instead(b"{}")),
    NetworkFault("no choices", _instead(b'{"choices": [], "tokens": [], "content": ""}')),
    NetworkFault("invalid UTF-8", _instead(b'{"content": "\xff\xfe", "tokens": [1]}')),
    NetworkFault("nested deeply", _instead(b"[" * 200_000)),
    NetworkFault("20 MB", lambda reply: Reply(b" " * (1 << 20), times=20)),
    NetworkFault("half of the JSON", lambda reply: replace(reply, body=reply.body[:-20])),
    NetworkFault(
        "compressed",
        lambda reply: Reply(gzip.compress(reply.body), headers={"Content-Encoding": "gzip"}),
    ),
    NetworkFault("NaN", lambda reply: replace(reply, body=reply.body.replace(b"-0.", b"NaN, -0."))),
    # HTTP
    NetworkFault("no HTTP", lambda reply: Reply(raw=b"SSH-2.0-OpenSSH_9.6\r\n")),
    NetworkFault("a length too great", lambda reply: _raw(reply, _length(reply, 500))),
    NetworkFault("a length too small", lambda reply: _raw(reply, _length(reply, -10))),
    NetworkFault("a wrong chunk size", lambda reply: _raw(reply, "Transfer-Encoding: chunked")),
    NetworkFault("200 headers", lambda reply: _raw(reply, *[f"X-{n}: {n}" for n in range(200)])),
    NetworkFault("a long header", lambda reply: _raw(reply, "X: " + "y" * 100_000)),
    NetworkFault("chunks that do not end", lambda reply: _chunked(reply, last=b"")),
    # Unusual and right
    _harmless("late", lambda reply: replace(reply, stall_s=0.2)),
    _harmless("HTTP/1.0", lambda reply: _raw(reply, version="1.0")),
    _harmless("HTTP/1.0 with a length", lambda reply: _raw(reply, _length(reply), version="1.0")),
    _harmless("no length", lambda reply: _raw(reply, "Connection: close")),
    _harmless("closing", lambda reply: replace(reply, headers={"Connection": "close"})),
    _harmless(
        "100 Continue",
        lambda reply: _raw(reply, _length(reply), before=b"HTTP/1.1 100 Continue\r\n\r\n"),
    ),
    _harmless("two equal lengths", lambda reply: _raw(reply, _length(reply), _length(reply))),
    _harmless("two types", lambda reply: _raw(reply, "Content-Type: a/b", "Content-Type: c/d")),
    _harmless("a header in Latin-1", lambda reply: _raw(reply, _length(reply), "X-Café: ÿ\xa0")),
    _harmless("chunks with a trailer", lambda reply: _chunked(reply, last=b"0\r\nA: b\r\n\r\n")),
    _harmless("a cookie", lambda reply: replace(reply, headers={"Set-Cookie": "a=b; Path=/"})),
    _harmless("white space around", lambda reply: replace(reply, body=b" " + reply.body + b"\n\n")),
)


class FaultProxy:
    """A server that passes requests on, and plays a fault on some of them.

    `upstream` returns the honest reply to a request; it is called from several threads.
    """

    def __init__(self, upstream: Callable[[Request], Reply]) -> None:
        self.played: Counter[str] = Counter()
        self._upstream = upstream
        self._lock = threading.Lock()
        self._fault: NetworkFault | None = None
        self._numbers = range(0)
        self._requests = 0
        self.server = Loopback(self._answer)

    def plan(self, fault: NetworkFault | None, *, first: int = 0, count: int = 0) -> None:
        """Play a fault on `count` requests from request `first` on, counted from now."""
        with self._lock:
            self._fault, self._requests = fault, 0
            self._numbers = range(first, first + count)

    def _answer(self, request: Request) -> Reply:
        with self._lock:
            self.server.requests.clear()
            fault = self._fault if self._requests in self._numbers else None
            self._requests += 1
            if fault is not None:
                self.played[fault.name] += 1
        reply = self._upstream(request)
        return reply if fault is None else fault.change(reply)


class RealServer:
    """An `upstream` that asks a real server, and gives equal requests equal replies.

    A server that is gone closes the connection. `forget` drops the replies that are kept.
    """

    def __init__(self, url: str) -> None:
        self.address = urlsplit(url).netloc
        self._replies: dict[tuple[str, bytes], Reply] = {}

    def move_to(self, url: str) -> None:
        """Ask the server at another address from now on."""
        self.address = urlsplit(url).netloc

    def forget(self) -> None:
        """Drop the replies that are kept."""
        self._replies.clear()

    def __call__(self, request: Request) -> Reply:
        key = (request.path, request.body)
        if (kept := self._replies.get(key)) is not None:
            return kept
        connection = HTTPConnection(self.address, timeout=60)
        try:
            headers = {"Content-Type": "application/json"} if request.body else {}
            connection.request(request.method, request.path, request.body or None, headers)
            response = connection.getresponse()
            reply = Reply(response.read(), status=response.status)
        except (OSError, HTTPException):
            return Reply(cut_at=0)
        finally:
            connection.close()
        if reply.status == 200:
            self._replies[key] = reply
        return reply
