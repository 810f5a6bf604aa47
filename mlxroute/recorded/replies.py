"""A large model for several answers at once, whose tokens are kept on disk: none is asked twice."""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from mlxroute.closeable import Closeable
from mlxroute.engine.protocols import NamedLargeProtocol, PendingCallProtocol
from mlxroute.errors import LargeError
from mlxroute.recorded.json_lines import read_json_lines
from mlxroute.types import LargeContext, LargeToken, Uploads

_POLL_S = 0.1


class RecordingStopped(LargeError):
    """Nothing is asked any more, for a fault of another answer or an interrupt."""


class Replies(Closeable):
    """The large model and what it said so far, by the ids before it. Safe for several threads.

    `path` is of one small and one large model, as the ids are the small vocabulary's. At most
    `at_once` calls are under way: of answers no one of which goes on from another, so that every
    server can take them.
    """

    def __init__(self, large: NamedLargeProtocol, path: Path, *, at_once: int = 1) -> None:
        self._large = large
        self._path = path
        self._lock = threading.Lock()
        self._places = threading.Semaphore(at_once)
        self._known: dict[str, LargeToken] = {}
        self._closed = False
        for item in read_json_lines(path):
            self._known[item.pop("key")] = _token(item)

    @property
    def model_name(self) -> str:
        """The large model's name."""
        return self._large.model_name

    def seat(self) -> Seat:
        """The large model for one answer."""
        return Seat(self)

    def close(self) -> None:
        """Let nobody wait any longer."""
        self._closed = True

    def known(self, token_ids: Sequence[int], most: int) -> tuple[LargeToken, ...]:
        """What is known of the large model's next tokens, as far as they follow each other."""
        found: list[LargeToken] = []
        ids = list(token_ids)
        with self._lock:
            while len(found) < most and (token := self._known.get(_key(ids))) is not None:
                found.append(token)
                ids += token.token_ids
        return tuple(found)

    def begin(
        self, context: LargeContext, *, deadline_s: float, prefetch: int
    ) -> PendingCallProtocol:
        """Ask the large model itself, as soon as there is a place; `left` gives it back."""
        while not self._places.acquire(timeout=_POLL_S):
            self._check_open()
        with self._lock:
            return self._large.begin(context, deadline_s=deadline_s, prefetch=prefetch)

    def left(self) -> None:
        """A call is over."""
        self._places.release()

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Wait as the large model does, but in vain once all is over."""
        while timeout_s > 0 and not ready() and not self._closed:
            self._large.wait(ready, timeout_s=min(_POLL_S, timeout_s))
            timeout_s -= _POLL_S
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise RecordingStopped("the run has ended")

    def keep(self, token_ids: Sequence[int], tokens: Sequence[LargeToken]) -> None:
        """Remember what came behind these ids."""
        ids = list(token_ids)
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            for token in tokens:
                key = _key(ids)
                if key not in self._known:
                    self._known[key] = token
                    file.write(json.dumps({"key": key, **asdict(token)}) + "\n")
                ids += token.token_ids


class Seat:
    """The large model for one answer: `uploads` are what it takes when nothing is known."""

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self.uploads = Uploads()
        self.calls_s = 0.0

    @property
    def model_name(self) -> str:
        return self._replies.model_name

    @property
    def max_in_flight(self) -> int:
        return 1

    def begin(
        self, context: LargeContext, *, deadline_s: float, prefetch: int
    ) -> PendingCallProtocol:
        known = self._replies.known(context.token_ids, prefetch + 1)
        if known:
            return _Known(self, context, known)
        flight = self._replies.begin(context, deadline_s=deadline_s, prefetch=prefetch)
        return _Kept(self, context, flight)

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        self._replies.wait(ready, timeout_s=timeout_s)

    def keep(self, context: LargeContext, tokens: Sequence[LargeToken]) -> None:
        """Remember what a call brought."""
        self._replies.keep(context.token_ids, tokens)

    def left(self) -> None:
        """A call is over."""
        self._replies.left()

    def count(self, context: LargeContext, tokens: Sequence[LargeToken]) -> None:
        """Count a call, once however often its result is read."""
        first = tokens[0]
        prompt = len(context.token_ids) if first.prompt_tokens is None else first.prompt_tokens
        self.calls_s += first.latency_s
        self.uploads += Uploads(
            requests=1,
            tokens=prompt,
            cached_tokens=first.cached_tokens or 0,
            completion_tokens=len(tokens),
            size_bytes=first.uploaded_bytes,
        )


class _Known:
    """A call that need not be made."""

    ready = finished = True

    def __init__(self, seat: Seat, context: LargeContext, tokens: tuple[LargeToken, ...]) -> None:
        self._seat = seat
        self._context = context
        self._tokens = tokens
        self._counted = False

    def result(self) -> tuple[LargeToken, ...]:
        if not self._counted:
            self._counted = True
            self._seat.count(self._context, self._tokens)
        # It took its time when it was made, and nothing is lost now.
        return (replace(self._tokens[0], lost_s=0.0), *self._tokens[1:])

    def cancel(self) -> None:
        pass


class _Kept:
    """A call whose tokens are kept."""

    def __init__(self, seat: Seat, context: LargeContext, flight: PendingCallProtocol) -> None:
        self._seat = seat
        self._context = context
        self._flight = flight
        self._left = self._counted = False

    @property
    def ready(self) -> bool:
        return self._flight.finished

    @property
    def finished(self) -> bool:
        return self._flight.finished

    def result(self) -> tuple[LargeToken, ...]:
        self._leave()
        tokens = self._flight.result()
        if not self._counted:
            self._counted = True
            self._seat.count(self._context, tokens)
            self._seat.keep(self._context, tokens)
        return tokens

    def cancel(self) -> None:
        self._leave()
        self._flight.cancel()

    def _leave(self) -> None:
        if not self._left:
            self._left = True
            self._seat.left()


def _key(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(array("q", token_ids).tobytes()).hexdigest()[:32]


def _token(item: dict[str, Any]) -> LargeToken:
    item["token_ids"] = tuple(item["token_ids"])
    item["large_ids"] = tuple(item["large_ids"])
    item["top"] = tuple((text, logprob) for text, logprob in item["top"])
    return LargeToken(**{field.name: item[field.name] for field in fields(LargeToken)})
