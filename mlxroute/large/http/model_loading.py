"""Waiting for a server to load its model, in the background and longer than a call may take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from mlxroute.errors import LargeTimeout, LargeUnavailable
from mlxroute.large.http.circuit_breaker import CircuitBreaker
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.pending_calls import PendingCall, PendingCalls, Publish, Tokens
from mlxroute.large.http.transport import Transport

# Servers unload an unused model after some minutes; few do so earlier.
_IDLE_S: Final = 60.0


class ModelLoading:
    """Repeats a call in the background, with more time, if the server may be loading its model.

    Some servers stop loading when the request that needs the model ends at its deadline, so that
    calls alone would never be answered. Safe for several threads.
    """

    def __init__(
        self, transport: Transport, breaker: CircuitBreaker, calls: PendingCalls, *, base_url: str
    ) -> None:
        self._transport = transport
        self._breaker = breaker
        self._calls = calls
        self._base_url = base_url
        self._lock = threading.Lock()
        self._waiting: PendingCall | None = None

    @contextmanager
    def guard(
        self, call: Callable[[Deadline, Publish], Tokens], *, limit_s: float
    ) -> Iterator[None]:
        """Repeat `call` within `limit_s` seconds if the block ends in a LargeTimeout.

        That is done only if the server had not replied for a while; never with a limit of 0, for
        blocks with less time than usual. Raises LargeUnavailable until the repeated call has ended.
        Its answer ends a pause of the circuit breaker.
        """
        with self._lock:
            if self._waiting is not None and not self._waiting.finished:
                raise LargeUnavailable(
                    f"{self._base_url} may be loading its model; it is waited for"
                )
            # An error keeps what its traceback names, down to a connection.
            self._waiting = None
        served_s = self._transport.last_served_s
        is_idle = time.monotonic() - served_s >= _IDLE_S
        try:
            yield
        except LargeTimeout:
            is_silent = self._transport.last_served_s == served_s
            if limit_s and is_idle and is_silent and self._transport.is_reachable:
                self._repeat(call, limit_s)
            raise

    def _repeat(self, call: Callable[[Deadline, Publish], Tokens], limit_s: float) -> None:
        def wait(deadline: Deadline, publish: Publish) -> Tokens:
            tokens = call(deadline, publish)
            self._breaker.end_pause()
            return tokens

        with self._lock:
            if self._waiting is None or self._waiting.finished:
                deadline = Deadline(limit_s, awaits_loading=True)
                self._waiting = self._calls.start(wait, deadline)
