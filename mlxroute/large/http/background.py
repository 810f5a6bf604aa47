"""Calls under way: each in a thread of its own, given up without waiting for the server."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mlxroute.errors import LargeError, LargeProtocolError
from mlxroute.large.http.deadline import Deadline
from mlxroute.types import LargeToken

Tokens = tuple[LargeToken, ...]


class PendingCall(threading.Thread):
    """One call; `ready` once it has an answer or has failed, at its deadline at the latest.

    What `ask` publishes before it returns may grow, until the flight is `finished`. `landed` is
    notified of each change.
    """

    def __init__(
        self,
        ask: Callable[[Deadline, Callable[[Tokens], None]], Tokens],
        *,
        deadline: Deadline,
        landed: threading.Condition,
    ) -> None:
        super().__init__(daemon=True, name="mlxroute-flight")
        self._ask = ask
        self._deadline = deadline
        self._landed = landed
        self._tokens: Tokens | None = None
        self._error: LargeError | None = None
        self.ready = False
        self.finished = False

    def run(self) -> None:
        """Ask, keeping the outcome for `result`."""
        try:
            self._tokens = self._ask(self._deadline, self._publish)
        except LargeError as exc:
            self._error = exc
        finally:
            with self._landed:
                self.ready = self.finished = True
                self._landed.notify_all()

    def _publish(self, tokens: Tokens) -> None:
        with self._landed:
            self._tokens = tokens
            self.ready = True
            self._landed.notify_all()

    def result(self) -> Tokens:
        """The answer of a `ready` flight, as far as it came. Raises LargeError subclasses."""
        if self._error is not None and self._tokens is None:
            raise self._error
        if self._tokens is None:
            raise LargeProtocolError("the call to the large model ended without a result")
        return self._tokens

    def cancel(self) -> None:
        """Break the call off and drop what still comes of it; returns at once."""
        self._deadline.cancel()
