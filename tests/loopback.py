"""A scripted HTTP server on loopback that can also stall, trickle, cut and talk nonsense."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived; `json` of the body is None when it has none."""

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
    """What to answer.

    `raw` replaces the whole reply, status line included. `stall_s` waits before the first byte,
    `byte_every_s` sends one byte at a time, `cut_at` closes the connection after that many bytes.
    """

    body: bytes = b"{}"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    stall_s: float = 0.0
    byte_every_s: float = 0.0
    cut_at: int | None = None

    @staticmethod
    def of(value: object, *, status: int = 200) -> Reply:
        """A JSON reply."""
        return Reply(json.dumps(value).encode(), status=status)


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what many tests want."""


class Loopback:
    """Answers from `script` in order, then by `answer`; records every request."""

    def __init__(self, answer: Callable[[Request], Reply] | None = None) -> None:
        self.script: deque[Reply] = deque()
        self.requests: list[Request] = []
        self.connections = 0
        self.answer = answer or (lambda request: Reply(b"not scripted", status=501))
        self._closing = threading.Event()
        self._server = _QuietServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """The address to give to a client."""
        return f"http://127.0.0.1:{self.port}/v1"

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
        """Stop at once, also where a reply is still being stalled."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def pause(self, seconds: float) -> None:
        """Wait, but not beyond `close`."""
        self._closing.wait(seconds)

    def next_reply(self, request: Request) -> Reply:
        """Record a request and choose its reply."""
        self.requests.append(request)
        return self.script.popleft() if self.script else self.answer(request)


def _handler(loopback: Loopback) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            loopback.connections += 1

        def do_GET(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = loopback.next_reply(Request(self.command, self.path, headers, body))
            loopback.pause(reply.stall_s)
            try:
                self._send(reply)
            except OSError:
                self.close_connection = True

        def _send(self, reply: Reply) -> None:
            data = _rendered(reply)[: reply.cut_at]
            if reply.raw is not None or reply.cut_at is not None:
                self.close_connection = True
            step = 1 if reply.byte_every_s else max(1, len(data))
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                loopback.pause(reply.byte_every_s)

    return Handler


def _rendered(reply: Reply) -> bytes:
    if reply.raw is not None:
        return reply.raw
    headers = {"Content-Type": "application/json", "Content-Length": str(len(reply.body))}
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
    """A completion as `mlx_lm.server` writes it: unsorted, an arbitrary alternative in front."""
    content = []
    for token_id, piece in tokens:
        chosen = {"id": token_id, "token": piece, "logprob": logprob}
        rest = [{"id": i, "token": p, "logprob": x} for i, p, x in others or [(0, "zz", -7.0)]]
        content.append({**rest[0], "top_logprobs": [*rest, chosen]})
    choice = {"index": 0, "finish_reason": finish, "text": "", "logprobs": {"content": content}}
    return Reply.of({"choices": [choice], "usage": usage or {}})


REFUSES_NUMBER = Reply.of({"error": "logprobs must be of type bool"}, status=400)
