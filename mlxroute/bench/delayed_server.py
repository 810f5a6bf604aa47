"""A server that stands before another one: it keeps the replies and lets each take a set time."""

from __future__ import annotations

import hashlib
import json
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

import requests

_TIMEOUT_S: Final = 600.0
_JITTER: Final = 0.4
_TAIL_SHARE, _TAIL_TIMES = 0.1, 4.0
_LOST_SHARE: Final = 0.03
# Between two events of a stream.
_BREAK: Final = b"\n\n"


def constant(dice: random.Random) -> float:
    """Always the mean."""
    return 1.0


def jittered(dice: random.Random) -> float:
    """Log-normal around the mean."""
    return dice.lognormvariate(-_JITTER * _JITTER / 2, _JITTER)


def heavy_tailed(dice: random.Random) -> float:
    """A tenth of the calls takes four times as long as the others."""
    usual = 1.0 / (1.0 + _TAIL_SHARE * (_TAIL_TIMES - 1.0))
    return usual * (_TAIL_TIMES if dice.random() < _TAIL_SHARE else 1.0)


def lossy(dice: random.Random) -> float:
    """Three calls of a hundred are refused with a 503 at once, to be made again."""
    return math.inf if dice.random() < _LOST_SHARE else 1.0


DELAYS: Final[dict[str, Callable[[random.Random], float]]] = {
    "constant": constant,
    "jittered": jittered,
    "heavy-tailed": heavy_tailed,
    "lossy": lossy,
}


@dataclass(frozen=True, slots=True)
class _Kept:
    status: int
    body: bytes


class DelayedServer:
    """Serves on loopback what `upstream` answers, from `record` where it is there.

    A request that takes part in an answer takes `delay_s` in all, times what `delay` draws, and
    `token_s` for each token after the first that it asks for, before the reply or, if that is
    streamed, before its next event; the same request draws the same each time. `missed` counts
    those that had to be passed on.
    """

    def __init__(self, upstream: str, *, record: Path) -> None:
        parts = urlsplit(upstream)
        self._root = f"{parts.scheme}://{parts.netloc}"
        self._path = parts.path
        self._record = record
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}
        self._lost: set[str] = set()
        self.delay_s = 0.0
        self.token_s = 0.0
        self.delay: Callable[[random.Random], float] = constant
        self.missed = 0
        if record.exists():
            for line in record.read_text(encoding="utf-8").splitlines():
                item = json.loads(line)
                self._kept[item["key"]] = _Kept(item["status"], item["body"].encode())
        self._server = _Server(("127.0.0.1", 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """The address to be used instead of upstream's."""
        return f"http://127.0.0.1:{self._server.server_address[1]}{self._path}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, list[bytes]]:
        """What is to be sent for a request, after its time: a body, or the events of a stream.

        Between these lie `token_s` each.
        """
        began_s = time.monotonic()
        key = hashlib.sha256(b"\0".join([method.encode(), path.encode(), body])).hexdigest()
        drawn = self.delay(random.Random(key)) if self.delay_s and method == "POST" else 0.0
        if math.isinf(drawn):
            with self._lock:
                first = key not in self._lost
                self._lost ^= {key}
            if first:
                return 503, [b'{"error": "overloaded"}']
            drawn = 1.0
        kept = self._kept.get(key) or self._passed_on(key, method, path, body)
        streamed = kept.status == 200 and _is_streamed(body)
        more_s = 0.0 if streamed or not drawn else _more(body) * self.token_s
        took_s = drawn * self.delay_s + more_s
        left_s = began_s + took_s - time.monotonic()
        if left_s > 0:
            time.sleep(left_s)
        if not streamed:
            return kept.status, [kept.body]
        return kept.status, [each + _BREAK for each in kept.body.split(_BREAK) if each.strip()]

    def _passed_on(self, key: str, method: str, path: str, body: bytes) -> _Kept:
        reply = requests.request(
            method,
            f"{self._root}{path}",
            data=body,
            headers={"Content-Type": "application/json"},
            timeout=_TIMEOUT_S,
        )
        kept = _Kept(reply.status_code, reply.content)
        with self._lock:
            self.missed += 1
            if reply.ok:
                self._kept[key] = kept
                line = {"key": key, "status": kept.status, "body": reply.content.decode()}
                with self._record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        return kept


def _more(body: bytes) -> int:
    """How many tokens beyond the first a request asks for."""
    asked = json.loads(body)
    return max(0, int(asked.get("max_tokens") or asked.get("n_predict") or 1) - 1)


def _is_streamed(body: bytes) -> bool:
    return bool(body) and json.loads(body).get("stream") is True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], delayed: DelayedServer) -> None:
        self.delayed = delayed
        super().__init__(address, _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no matter."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        assert isinstance(self.server, _Server)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        delayed = self.server.delayed
        status, parts = delayed.answer(self.command, self.path, body)
        self.send_response(status)
        if len(parts) == 1:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(parts[0])))
            self.end_headers()
            self.wfile.write(parts[0])
            return
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number, part in enumerate(parts):
            # The last one brings the counts only.
            if 0 < number < len(parts) - 1:
                time.sleep(delayed.token_s)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    do_GET = do_POST = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
