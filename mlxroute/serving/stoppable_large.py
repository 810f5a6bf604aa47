"""The large model as one served answer uses it: waits are known to the scheduler and can end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mlxroute.engine.protocols import LargeProtocol, PendingCallProtocol
from mlxroute.serving.row import Row
from mlxroute.types import LargeContext, Uploads

# A cancelled answer stops waiting after this time at the latest.
_POLL_S: Final = 0.05


class StoppableLarge:
    """A large model whose waits mark the answer's row as blocked and end when it is cancelled.

    `uploads` counts this answer's calls alone as far as the large model's totals tell.
    """

    def __init__(self, large: LargeProtocol, row: Row) -> None:
        self._large = large
        self._row = row

    @property
    def uploads(self) -> Uploads:
        return self._large.uploads

    @property
    def is_local(self) -> bool:
        return self._large.is_local

    @property
    def max_in_flight(self) -> int:
        return self._large.max_in_flight

    def begin(
        self, context: LargeContext, *, deadline_s: float, prefetch: int
    ) -> PendingCallProtocol:
        self._row.check_cancelled()
        return self._large.begin(context, deadline_s=deadline_s, prefetch=prefetch)

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        with self._row.blocked():
            while timeout_s > 0 and not ready():
                self._row.check_cancelled()
                self._large.wait(
                    lambda: ready() or self._row.is_cancelled, timeout_s=min(_POLL_S, timeout_s)
                )
                timeout_s -= _POLL_S
        self._row.check_cancelled()
