"""The large model as one served answer uses it: waits are known to the scheduler and can end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mlxroute.engine.protocols import LargeProtocol, PendingCallProtocol
from mlxroute.serving.small_client import SmallClient
from mlxroute.types import LargeContext, LargeToken, Uploads

# A cancelled answer stops waiting after this time at the latest.
_POLL_S: Final = 0.05


class StoppableLarge:
    """A large model whose waits mark the answer's client as blocked and end when it is cancelled.

    Attributes:
        uploads: What the calls of this answer alone sent, by their replies. A call that failed or
            was dropped counts as a request of unknown size.
    """

    def __init__(self, large: LargeProtocol, client: SmallClient) -> None:
        self._large = large
        self._client = client
        self.uploads = Uploads()

    @property
    def is_local(self) -> bool:
        return self._large.is_local

    @property
    def max_in_flight(self) -> int:
        return self._large.max_in_flight

    def begin(
        self, context: LargeContext, *, deadline_s: float, prefetch: int
    ) -> PendingCallProtocol:
        self._client.check_cancelled()
        call = self._large.begin(context, deadline_s=deadline_s, prefetch=prefetch)
        return _CountedCall(self, context, call)

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        with self._client.blocked():
            while timeout_s > 0 and not ready():
                self._client.check_cancelled()
                self._large.wait(
                    lambda: ready() or self._client.is_cancelled, timeout_s=min(_POLL_S, timeout_s)
                )
                timeout_s -= _POLL_S
        self._client.check_cancelled()


class _CountedCall:
    """A call that adds to its answer's uploads once its outcome is known."""

    def __init__(
        self, large: StoppableLarge, context: LargeContext, call: PendingCallProtocol
    ) -> None:
        self._large = large
        self._context = context
        self._call = call
        self._counted = Uploads()

    @property
    def ready(self) -> bool:
        return self._call.ready

    @property
    def finished(self) -> bool:
        return self._call.finished

    def result(self) -> tuple[LargeToken, ...]:
        self._count(Uploads(requests=1))
        tokens = self._call.result()
        # A streamed call may be read again when more tokens have arrived.
        self._count(Uploads.of_call(self._context, tokens))
        return tokens

    def cancel(self) -> None:
        self._count(Uploads(requests=1))
        self._call.cancel()

    def _count(self, uploads: Uploads) -> None:
        """Replace what this call has counted, unless that is more."""
        if uploads.completion_tokens >= self._counted.completion_tokens:
            self._large.uploads += uploads - self._counted
            self._counted = uploads
