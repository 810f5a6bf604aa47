"""Calls under way: each in a thread of its own, given up without waiting for the server."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mlxroute.errors import LargeError, LargeProtocolError
from mlxroute.large.transport import Deadline
from mlxroute.types import LargeToken


class Flight(threading.Thread):
    """One call; `ready` once it has an answer or has failed, at its deadline at the latest.

    `landed` is notified then.
    """

    def __init__(
        self,
        ask: Callable[[Deadline], tuple[LargeToken, ...]],
        *,
        deadline: Deadline,
        landed: threading.Condition,
    ) -> None:
        super().__init__(daemon=True, name="mlxroute-flight")
        self._ask = ask
        self._deadline = deadline
        self._landed = landed
        self._tokens: tuple[LargeToken, ...] | None = None
        self._error: LargeError | None = None
        self.ready = False

    def run(self) -> None:
        """Ask, keeping the outcome for `result`."""
        try:
            self._tokens = self._ask(self._deadline)
        except LargeError as exc:
            self._error = exc
        finally:
            with self._landed:
                self.ready = True
                self._landed.notify_all()

    def result(self) -> tuple[LargeToken, ...]:
        """The answer of a flight that is `ready`. Raises LargeError subclasses."""
        if self._error is not None:
            raise self._error
        if self._tokens is None:
            raise LargeProtocolError("the call to the large model ended without a result")
        return self._tokens

    def cancel(self) -> None:
        """Break the call off and drop what still comes of it; returns at once."""
        self._deadline.cancel()
