"""A proxy for the large model's server that records its replies and delays them."""

from __future__ import annotations

import hashlib
import json
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from mlxroute.bench.loopback_proxy import LoopbackProxy
from mlxroute.recorded.record_file import append_records, read_records

# Standard deviation of the logarithm of a jittered delay.
_JITTER: Final = 0.4
_TAIL_SHARE: Final = 0.1
_TAIL_FACTOR: Final = 4.0
_LOST_SHARE: Final = 0.03
# Ends an event of a stream.
_EVENT_END: Final = b"\n\n"


def constant(rng: random.Random) -> float:
    """Return 1: every call takes the mean delay."""
    return 1.0


def jittered(rng: random.Random) -> float:
    """Return a log-normal factor with mean 1."""
    return rng.lognormvariate(-_JITTER * _JITTER / 2, _JITTER)


def heavy_tailed(rng: random.Random) -> float:
    """Return a factor with mean 1 that is four times the usual one for a tenth of the calls."""
    usual = 1.0 / (1.0 + _TAIL_SHARE * (_TAIL_FACTOR - 1.0))
    return usual * (_TAIL_FACTOR if rng.random() < _TAIL_SHARE else 1.0)


def lossy(rng: random.Random) -> float:
    """Return inf, for a call that is refused once with status 503, for 3 % of the calls; else 1."""
    return math.inf if rng.random() < _LOST_SHARE else 1.0


DELAYS: Final[dict[str, Callable[[random.Random], float]]] = {
    "constant": constant,
    "jittered": jittered,
    "heavy-tailed": heavy_tailed,
    "lossy": lossy,
}


@dataclass(frozen=True, slots=True)
class _RecordedReply:
    status: int
    body: bytes


class DelayedServer(LoopbackProxy):
    """A loopback proxy that delays replies, and repeats recorded ones without asking the server.

    A reply to a POST request arrives after `delay_s` times the factor that `delay` draws for the
    request. Each further token takes `token_s` more; a stream sends each token at its own time.

    Args:
        upstream: Address of the real server.
        record: File of recorded replies; new ones are appended.
        api_key: The key of the real server. None (default) for none.
        ca_bundle: File of certificate authorities to trust. None (default) for the public ones.

    Attributes:
        delay_s: Mean seconds until the first token. 0 at first.
        delay: Draws the factor of a delay. Always 1 at first.
        forwarded: Number of requests that were sent to the real server.
    """

    def __init__(
        self,
        upstream: str,
        *,
        record: Path,
        api_key: str | None = None,
        ca_bundle: Path | None = None,
    ) -> None:
        super().__init__(upstream, api_key=api_key, ca_bundle=ca_bundle)
        parts = urlsplit(self.upstream_url)
        self._upstream_root = f"{parts.scheme}://{parts.netloc}"
        self._path = parts.path
        self._record = record
        self._lock = threading.Lock()
        # Keys of requests that were refused and not yet repeated.
        self._refused: set[str] = set()
        self.delay_s = 0.0
        self.delay: Callable[[random.Random], float] = constant
        self.forwarded = 0
        self._replies = dict(read_records(record, _reply_from_json))

    @property
    def token_s(self) -> float:
        """Seconds for each further token. 0 at first."""
        return self.event_gap_s

    @token_s.setter
    def token_s(self, seconds: float) -> None:
        self.event_gap_s = seconds

    @property
    def url(self) -> str:
        """The URL to use instead of `upstream`."""
        return f"{self.root_url}{self._path}"

    def reply(self, method: str, path: str, body: bytes) -> tuple[int, list[bytes]]:
        """Wait for the delay, then return the reply's status and body, or the events of a stream.

        The caller must wait `token_s` between events.
        """
        began_s = time.monotonic()
        key = hashlib.sha256(b"\0".join([method.encode(), path.encode(), body])).hexdigest()
        factor = self.delay(random.Random(key)) if self.delay_s and method == "POST" else 0.0
        if math.isinf(factor):
            if self._refuse(key):
                return 503, [b'{"error": "overloaded"}']
            factor = 1.0
        reply = self._replies.get(key) or self._record_reply(key, method, path, body)
        is_streamed = reply.status == 200 and _is_streamed(body)
        tokens_s = 0.0 if is_streamed or not factor else _further_tokens(body) * self.token_s
        left_s = began_s + factor * self.delay_s + tokens_s - time.monotonic()
        if left_s > 0:
            time.sleep(left_s)
        if not is_streamed:
            return reply.status, [reply.body]
        events = [event for event in reply.body.split(_EVENT_END) if event.strip()]
        return reply.status, [event + _EVENT_END for event in events]

    def _refuse(self, key: str) -> bool:
        """Return whether to refuse a lost call: alternately True and False for each request."""
        with self._lock:
            self._refused ^= {key}
            return key in self._refused

    def _record_reply(self, key: str, method: str, path: str, body: bytes) -> _RecordedReply:
        """Send a request to `upstream` and record the reply unless it is an error."""
        status, content = self.forward(method, f"{self._upstream_root}{path}", body)
        reply = _RecordedReply(status, content)
        with self._lock:
            self.forwarded += 1
            if status < 400:
                self._replies[key] = reply
                line = {"key": key, "status": status, "body": content.decode()}
                append_records(self._record, [line])
        return reply


def _reply_from_json(item: Any) -> tuple[str, _RecordedReply]:
    return str(item["key"]), _RecordedReply(int(item["status"]), item["body"].encode())


def _further_tokens(body: bytes) -> int:
    """Return how many tokens beyond the first a request asks for."""
    request = json.loads(body)
    return max(0, int(request.get("max_tokens") or request.get("n_predict") or 1) - 1)


def _is_streamed(body: bytes) -> bool:
    return bool(body) and json.loads(body).get("stream") is True
