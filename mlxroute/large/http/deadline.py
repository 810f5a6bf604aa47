"""The deadline of a call, and its cancellation."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from mlxroute.errors import LargeError, LargeTimeout, LargeUnavailable

# Returns the deadline of the next request: a new one each time, or one that several share.
NextDeadline = Callable[[], "Deadline"]


class Deadline:
    """The moment at which a call ends in any case; `cancel` ends it at once, from any thread.

    There is one for each call, shared by its attempts. `lost_s` counts the seconds spent on
    attempts that were retried. With `awaits_loading` a server that is loading its model is asked
    again until the deadline.
    """

    def __init__(
        self,
        seconds: float,
        *,
        awaits_loading: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds = seconds
        self.awaits_loading = awaits_loading
        self.lost_s = 0.0
        self.cancelled = False
        self._clock = clock
        self._end_s = clock() + seconds
        self._changed = threading.Condition()

    def left_s(self) -> float:
        """Return the seconds left, at least 0."""
        return 0.0 if self.cancelled else max(0.0, self._end_s - self._clock())

    def cancel(self) -> None:
        """End the call now."""
        self.cancelled = True
        self.wake()

    def wake(self) -> None:
        """Make `wait_for` check its condition again."""
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, done: Callable[[], bool], *, limit_s: float = math.inf) -> None:
        """Block until `done()` is true, until the deadline, or for `limit_s`."""
        with self._changed:
            limit_s = min(limit_s, self.left_s())
            self._changed.wait_for(lambda: self.cancelled or done(), limit_s)

    def pause(self, seconds: float) -> None:
        """Wait for some seconds, or until the call is cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: self.cancelled, seconds)

    def error(self, url: str) -> LargeError:
        """Return the error for a call to `url` that had no full reply by now."""
        if self.cancelled:
            return LargeUnavailable(f"the call to {url} was cancelled")
        return LargeTimeout(
            f"no full reply from {url} in {self.seconds:.3g} s; a longer limit may help",
            parameter="timeout_s",
        )
