"""The listener of a streamed reply."""

from __future__ import annotations

from typing import Protocol, TypeVar

Partial = TypeVar("Partial", contravariant=True)


class StreamListener(Protocol[Partial]):
    """Receives a streamed reply while it is still arriving.

    It is called at each new part with everything received so far, in the thread that reads the
    reply. It returns whether it has used any part: a request whose reply was used is not retried
    if the connection breaks.
    """

    def __call__(self, partial: Partial, /) -> bool: ...
