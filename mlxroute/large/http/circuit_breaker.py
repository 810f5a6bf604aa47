"""Leaves a server alone that keeps failing, and finds out with single calls when it is back."""

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
    LargeUnavailable,
    LargeUnrecorded,
)

FAILURES: Final = 3
_FIRST_S: Final = 5.0
_LONGEST_S: Final = 300.0
# The longest a server may ask to be left alone.
_LONGEST_ASKED_S: Final = 3600.0
# Key, payment, permission, address: these take a person, not a moment.
_LASTING: Final = (401, 402, 403, 404)


class CircuitBreaker:
    """Three failures in a row, or a server's own wish, stop the calls for a while.

    Then a single call goes through: its success ends the pause, its failure doubles it. Safe for
    calls from several threads; one that was cancelled counts neither way.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._pauses = 0
        self._until_s: float | None = None
        self._probing = False
        self._last = ""

    @contextmanager
    def guard(self, *, fragment: bool = False) -> Iterator[None]:
        """Make one call inside. Raises LargeUnavailable, before any of it, during a pause.

        Inside a character (`fragment`) the large model may rightly want another one, so that an
        unfit reply says nothing about the server.
        """
        with self._lock:
            probe = self._admit()
        try:
            yield
        except LargeError as exc:
            unfit = fragment and isinstance(exc, LargeProtocolError)
            if not (unfit or isinstance(exc, LargeUnavailable | LargeUnrecorded)):
                with self._lock:
                    self._failed(exc, probe=probe)
            raise
        else:
            with self._lock:
                self._succeeded(probe=probe)
        finally:
            if probe:
                self._probing = False

    def _admit(self) -> bool:
        """Let a call through; whether it is the one that ends or renews a pause."""
        if self._until_s is None:
            return False
        left_s = self._until_s - self._clock()
        if left_s > 0 or self._probing:
            when = f"for another {left_s:.0f} s" if left_s >= 1 else "at this moment"
            raise LargeUnavailable(f"{self._url} is not asked {when}; last failure: {self._last}")
        self._probing = True
        return True

    def _succeeded(self, *, probe: bool) -> None:
        if self._until_s is None or probe:
            self._failures, self._pauses, self._until_s = 0, 0, None

    def _failed(self, error: LargeError, *, probe: bool) -> None:
        if self._until_s is not None and not probe:
            return  # A call from before the pause.
        self._failures += 1
        self._last = str(error)
        asked_s, pause_s = 0.0, min(_LONGEST_S, _FIRST_S * 2.0 ** min(self._pauses, 10))
        if isinstance(error, LargeRefused):
            asked_s = min(error.retry_after_s, _LONGEST_ASKED_S)
            if error.status in _LASTING:
                pause_s = _LONGEST_S
        if asked_s or probe or self._failures >= FAILURES:
            self._pauses += 1
            self._until_s = self._clock() + max(asked_s, pause_s)
