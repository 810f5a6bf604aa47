"""The listener that receives a reply while it is still arriving."""

from __future__ import annotations

from typing import Protocol, TypeVar

Partial = TypeVar("Partial", contravariant=True)


class StreamListener(Protocol[Partial]):
    """Receives a streamed reply while it is still arriving.

    It is called each time more has arrived, with all that has arrived so far, in the thread that
    reads the reply. It returns whether it has used any of it: a reply that was used is not
    requested again if its connection breaks.
    """

    def __call__(self, partial: Partial, /) -> bool: ...
