"""A scripted HTTP server on loopback that can also stall, trickle, cut and send invalid HTTP."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it arrived; `json` is None without a body."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body) if self.body else None


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply to send.

    `raw` replaces the whole reply, status line included; `times` repeats the body. `stall_s` waits
    before the first byte, `byte_every_s` sends one byte at a time, `cut_at` closes the connection
    after that many bytes, with a reset when `reset` is set. `chunks` are sent instead of a body,
    each when `before` returns for its number; an empty one closes the connection.
    """

    body: bytes = b"{}"
    times: int = 1
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    stall_s: float = 0.0
    byte_every_s: float = 0.0
    cut_at: int | None = None
    reset: bool = False
    chunks: tuple[bytes, ...] = ()
    before: Callable[[int], object] = lambda number: None

    @staticmethod
    def of(value: object, *, status: int = 200) -> Reply:
        """Return a JSON reply."""
        return Reply(json.dumps(value).encode(), status=status)


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that hang up, as many tests make them do."""


class Loopback:
    """Answers from `script` in order, then by `answer`; records every request.

    With `tls` it speaks HTTPS; another context counts from the next connection on.
    """

    def __init__(
        self,
        answer: Callable[[Request], Reply] | None = None,
        *,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.script: deque[Reply] = deque()
        self.requests: list[Request] = []
        self.connections = 0
        self.sent_bytes = 0
        self.tls = tls
        self.answer = answer or (lambda request: Reply(b"not scripted", status=501))
        self._closing = threading.Event()
        self._clients: WeakSet[socket.socket] = WeakSet()
        self._scheme = "http" if tls is None else "https"
        self._listen(socket.create_server(("127.0.0.1", 0)))

    def _listen(self, listening: socket.socket) -> None:
        handler = type("Handler", (_Handler,), {"loopback": self})
        self._server = _QuietServer(listening.getsockname(), handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listening
        self._server.server_address = listening.getsockname()
        self._server.server_activate()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """The address to give to a client."""
        return f"{self._scheme}://127.0.0.1:{self.port}/v1"

    @property
    def prompts(self) -> list[str]:
        """The prompts of the completion requests so far."""
        return [r.json["prompt"] for r in self.requests if r.path.endswith("/completions")]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop at once, even while a reply is stalled."""
        self._closing.set()
        self._stop()

    def hang_up(self) -> None:
        """Close every connection."""
        for client in list(self._clients):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(client, socket.SHUT_RDWR)

    @contextlib.contextmanager
    def gone(self) -> Iterator[None]:
        """Refuse every connection for a while."""
        address = self._server.server_address
        self._stop()
        self.hang_up()
        # Bound but not listening: it refuses, and no other process gets the port.
        with contextlib.ExitStack() as stack:
            placeholder = stack.enter_context(socket.socket())
            placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            placeholder.bind(address)
            try:
                yield
            finally:
                stack.pop_all()
                self._listen(placeholder)

    def _stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def opened(self, client: socket.socket) -> None:
        """Record a connection."""
        self._clients.add(client)

    def pause(self, seconds: float) -> None:
        """Wait, but only until `close`."""
        self._closing.wait(seconds)

    def next_reply(self, request: Request) -> Reply:
        """Record a request and return its reply."""
        self.requests.append(request)
        return self.script.popleft() if self.script else self.answer(request)


class _Handler(BaseHTTPRequestHandler):
    loopback: Loopback
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        self.loopback.connections += 1
        if self.loopback.tls is not None:
            self.request = self.loopback.tls.wrap_socket(self.request, server_side=True)
        self.loopback.opened(self.request)
        super().setup()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.loopback.next_reply(Request(self.command, self.path, headers, body))
        self.loopback.pause(reply.stall_s)
        try:
            self._send(reply)
        except OSError:
            self.close_connection = True

    def _send_chunks(self, reply: Reply) -> None:
        self.send_response(reply.status)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number, chunk in enumerate(reply.chunks):
            reply.before(number)
            if not chunk:
                self.close_connection = True
                return
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, reply: Reply) -> None:
        if reply.chunks:
            self._send_chunks(reply)
            return
        data = _rendered(reply)[: reply.cut_at]
        if reply.raw is not None or reply.cut_at is not None:
            self.close_connection = True
        step = 1 if reply.byte_every_s else max(1, len(data))
        for start in range(0, len(data), step):
            self.wfile.write(data[start : start + step])
            self.loopback.pause(reply.byte_every_s)
        for _ in range(reply.times - 1):
            self.wfile.write(reply.body)
            self.loopback.sent_bytes += len(reply.body)
        if reply.reset:
            # Closing without lingering sends a reset instead of the end of the stream.
            linger = struct.pack("ii", 1, 0)
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def finish(self) -> None:
        super().finish()
        self.request.close()


def _rendered(reply: Reply) -> bytes:
    if reply.raw is not None:
        return reply.raw
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(reply.body) * reply.times),
    }
    lines = [f"{name}: {value}" for name, value in (headers | reply.headers).items()]
    head = "\r\n".join([f"HTTP/1.1 {reply.status} Scripted", *lines, "", ""])
    return head.encode("latin-1") + reply.body


def mlx_lm_reply(
    tokens: list[tuple[int, str]],
    *,
    finish: str = "length",
    others: list[tuple[int, str, float]] | None = None,
    logprob: float = -0.1,
    usage: dict[str, object] | None = None,
) -> Reply:
    """Return a completion of `mlx_lm.server`: unsorted, with an arbitrary alternative in front."""
    content = []
    for token_id, piece in tokens:
        chosen = {"id": token_id, "token": piece, "logprob": logprob}
        rest = [{"id": i, "token": p, "logprob": x} for i, p, x in others or [(0, "zz", -7.0)]]
        content.append({**rest[0], "top_logprobs": [*rest, chosen]})
    choice = {"index": 0, "finish_reason": finish, "text": "", "logprobs": {"content": content}}
    return Reply.of({"choices": [choice], "usage": usage or {}})


REFUSES_NUMBER = Reply.of({"error": "logprobs must be of type bool"}, status=400)
