"""Replies whose bytes on the wire are limited, whatever their headers and chunks claim."""

from __future__ import annotations

import io
from http.client import HTTPException, HTTPResponse
from typing import Any, Final, cast

MAX_WIRE_BYTES: Final = 8 << 20
"""Maximum size of a reply with its headers and the frames of its chunks."""


class LimitedResponse(HTTPResponse):
    """A reply that ends with an HTTPException after `MAX_WIRE_BYTES`.

    The limit of a body is not enough: lines of chunk sizes and trailers are not part of it.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.fp = io.BufferedReader(_LimitedStream(self.fp.detach()))


class _LimitedStream(io.RawIOBase):
    """Reads from another stream until the limit."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__()
        self._raw = raw
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read into a buffer; return the number of bytes. Raises HTTPException at the limit."""
        size = cast("int | None", self._raw.readinto(buffer))
        self._size += size or 0
        if self._size > MAX_WIRE_BYTES:
            raise HTTPException(f"the reply is longer than {MAX_WIRE_BYTES} bytes")
        return size

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()
