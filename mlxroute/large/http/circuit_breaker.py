"""A circuit breaker with half-open probes, shared by all calls to one server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from mlxroute.errors import (
    LargeError,
    LargeProtocolError,
    LargeRefused,
    LargeTimeout,
    LargeUnavailable,
)

FAILURES: Final = 3
_FIRST_PAUSE_S: Final = 5.0
_MAX_PAUSE_S: Final = 300.0
# The longest `Retry-After` that is respected.
_MAX_RETRY_AFTER_S: Final = 3600.0
# A wrong model or address; or a route, where another dialect may help.
_NOT_FOUND: Final = 404
# Statuses that no content of a request causes. 402 and 403 may be about its price or its topic,
# 408, 504, 520 and 524 about the length of its answer.
_NEVER_CAUSED: Final = frozenset({401, 429, 502, 503, 521, 522, 523, 525, 526, 529})


class CircuitBreaker:
    """Pauses all calls after three failures in a row, or for as long as a `Retry-After` asks.

    A wrong key, payment or permission pauses them at once. After a pause one call probes the
    server: its success ends the pause, its failure doubles it. A forwarded request probes beside
    the other calls. A cancelled call counts neither as a success nor as a failure, nor does a
    prompt that is too long. Safe for several threads.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._pauses = 0
        self._paused_until_s: float | None = None
        # Whether each probe in flight is forwarded. Such a one may take minutes, so it keeps out
        # others of its kind only.
        self._probing: set[bool] = set()
        self._last_failure = ""

    @contextmanager
    def guard(self, *, fragment: bool = False, forwarded: bool = False) -> Iterator[None]:
        """Count the outcome of the call made inside. Raises LargeUnavailable during a pause.

        `fragment` is True if the answer ends inside a character. The large model may then choose
        another character, so a reply that does not fit is not a failure of the server.
        `forwarded` is True for a request that a client wrote, whose content may have caused a
        refusal or a reply of no use.
        """
        with self._lock:
            is_probe = self._admit(forwarded=forwarded)
        try:
            yield
        except LargeError as exc:
            misfit = fragment and isinstance(exc, LargeProtocolError)
            if not misfit and _is_failure(exc, forwarded=forwarded):
                with self._lock:
                    self._record_failure(exc, is_probe=is_probe)
            raise
        else:
            with self._lock:
                self._record_success(is_probe=is_probe)
        finally:
            if is_probe:
                self._probing.discard(forwarded)

    def end_pause(self) -> None:
        """Admit all calls again: the server has answered one that was not counted.

        The next pause is as long as it would have been: calls may still take too long.
        """
        with self._lock:
            self._failures = 0
            self._paused_until_s = None

    def _admit(self, *, forwarded: bool) -> bool:
        """Admit a call, or raise LargeUnavailable; return whether the call is the probe."""
        if self._paused_until_s is None:
            return False
        left_s = self._paused_until_s - self._clock()
        if left_s > 0 or forwarded in self._probing:
            duration = f"for another {left_s:.0f} s" if left_s >= 1 else "at this moment"
            raise LargeUnavailable(
                f"calls to {self._url} are paused {duration}; last failure: {self._last_failure}"
            )
        self._probing.add(forwarded)
        return True

    def _record_success(self, *, is_probe: bool) -> None:
        if self._paused_until_s is None or is_probe:
            self._failures = 0
            self._pauses = 0
            self._paused_until_s = None

    def _record_failure(self, error: LargeError, *, is_probe: bool) -> None:
        if self._paused_until_s is not None and not is_probe:
            return  # The call began before the pause.
        self._failures += 1
        self._last_failure = str(error)
        retry_after_s = 0.0
        is_final = False
        pause_s = min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self._pauses, 10))
        if isinstance(error, LargeRefused):
            retry_after_s = min(error.retry_after_s, _MAX_RETRY_AFTER_S)
            # No later call helps.
            is_final = error.is_access
            if is_final or error.status == _NOT_FOUND:
                pause_s = _MAX_PAUSE_S
        # Another probe may have ended the pause meanwhile.
        is_decisive = is_probe and self._paused_until_s is not None
        if retry_after_s or is_final or is_decisive or self._failures >= FAILURES:
            self._pauses += 1
            self._paused_until_s = self._clock() + max(retry_after_s, pause_s)


def _is_failure(error: LargeError, *, forwarded: bool) -> bool:
    """Return whether an error shows a fault of the server or of the client's settings."""
    if isinstance(error, LargeRefused) and error.is_too_long:
        return False
    if forwarded and isinstance(error, LargeRefused):
        return error.status in _NEVER_CAUSED
    # The request may have asked for an answer that takes too long, or is too long to be read.
    may_be_caused = forwarded and isinstance(error, LargeProtocolError | LargeTimeout)
    return error.counts_as_failure and not may_be_caused
