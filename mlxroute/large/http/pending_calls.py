"""Calls that run in the background and can be cancelled without waiting for the server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from mlxroute.errors import LargeError, LargeProtocolError
from mlxroute.large.http.deadline import Deadline
from mlxroute.types import LargeToken

Tokens = tuple[LargeToken, ...]
Publish = Callable[[Tokens], None]

# Maximum time that `join` waits for the threads of cancelled calls.
_JOIN_S: Final = 0.3


class PendingCall(threading.Thread):
    """One call in its own thread.

    `ready` becomes True when there is a token or an error, at the deadline at the latest. Further
    tokens may be published until `finished` is True. `changed` is notified of each change.

    Each `Exchange` of the call has a thread of its own: if a name lookup blocks that thread, this
    one still ends the call at the deadline and reports the failure to the circuit breaker.
    """

    def __init__(
        self,
        ask: Callable[[Deadline, Publish], Tokens],
        *,
        deadline: Deadline,
        changed: threading.Condition,
    ) -> None:
        super().__init__(daemon=True, name="mlxroute-call")
        self._ask = ask
        self._deadline = deadline
        self._changed = changed
        self._tokens: Tokens | None = None
        self._error: LargeError | None = None
        self.ready = False
        self.finished = False

    def run(self) -> None:
        """Ask, and keep the outcome for `result`."""
        try:
            self._tokens = self._ask(self._deadline, self._publish)
        except LargeError as exc:
            self._error = exc
        finally:
            with self._changed:
                self.ready = self.finished = True
                self._changed.notify_all()

    def _publish(self, tokens: Tokens) -> None:
        with self._changed:
            self._tokens = tokens
            self.ready = True
            self._changed.notify_all()

    def result(self) -> Tokens:
        """Return the tokens that a `ready` call has received. Raises LargeError subclasses."""
        if self._error is not None and self._tokens is None:
            raise self._error
        if self._tokens is None:
            raise LargeProtocolError("the call to the large model ended without a result")
        return self._tokens

    def cancel(self) -> None:
        """Cancel the call and drop any later reply; returns at once."""
        self._deadline.cancel()


class PendingCalls:
    """All calls of a client: starts them, waits for their changes, and cancels them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: list[PendingCall] = []

    def start(self, ask: Callable[[Deadline, Publish], Tokens], deadline: Deadline) -> PendingCall:
        """Start a call, which runs `ask(deadline, publish)`, and return it."""
        call = PendingCall(ask, deadline=deadline, changed=self._changed)
        call.start()
        # A call whose thread cannot start never finishes, so it is not kept.
        with self._changed:
            self._calls = [*(other for other in self._calls if not other.finished), call]
        return call

    def wait(self, condition: Callable[[], bool], *, timeout_s: float) -> None:
        """Block until `condition()` is true, checked at each change of a call, or the timeout."""
        with self._changed:
            self._changed.wait_for(condition, timeout_s)

    def cancel(self) -> None:
        """Cancel all calls; return at once."""
        for call in self._calls:
            call.cancel()

    def join(self) -> None:
        """Wait, for 0.3 s at most, until the threads of cancelled calls have ended."""
        end_s = time.monotonic() + _JOIN_S
        for call in self._calls:
            call.join(max(0.0, end_s - time.monotonic()))
        # An error keeps what its traceback names, down to a connection.
        with self._changed:
            self._calls = [call for call in self._calls if not call.finished]
