"""Replies that arrive as server-sent events, and clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, Final, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlxroute.safe_text import one_line_json
from mlxroute.serving.http.api_error import ApiError

COMMENT: Final = b": keep-alive\n\n"
DONE: Final = b"data: [DONE]\n\n"
_T = TypeVar("_T")


def encode_event(value: Any) -> bytes:
    """Return a JSON value as an event."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"data: {one_line_json(text)}\n\n".encode(errors="replace")


class ClientGone(Exception):
    """Raised when a client has left before its reply was complete."""


async def unless_gone(receive: Receive, work: Awaitable[_T], *, cancel: Callable[[], None]) -> _T:
    """Return the result of `work`; call `cancel` and raise ClientGone if the client leaves.

    `receive` must not have another reader until then.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        watching.cancel()
        if not working.done():
            cancel()
            working.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def kept_alive(
    parts: AsyncGenerator[bytes, None], *, silence_s: float
) -> AsyncGenerator[bytes, None]:
    """Yield parts of a stream, and a comment after each `silence_s` seconds without one."""
    async with aclosing(parts):
        while True:
            reading = asyncio.ensure_future(_next_part(parts))
            try:
                while not (await asyncio.wait({reading}, timeout=silence_s))[0]:
                    yield COMMENT
            finally:
                # A generator that still runs cannot be closed.
                if not reading.done():
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)
            if (part := reading.result()) is None:
                return
            yield part


async def _next_part(parts: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(parts, None)


class EventStream(Response):
    """A stream of events, which ends when the client leaves.

    Args:
        parts: The encoded events.
        cancel: Called when the client leaves before the end.
        headers: Further headers.
        keep_alive_s: Seconds in which nothing is sent after which a comment is.
        on_end: Called once the stream has ended, in whatever way. Nothing by default.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        *,
        cancel: Callable[[], None],
        headers: Mapping[str, str],
        keep_alive_s: float,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        own = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self.status_code = 200
        self.background = None
        self._parts = kept_alive(parts, silence_s=keep_alive_s)
        self._cancel = cancel
        self._on_end = on_end
        self.init_headers({**own, **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await unless_gone(receive, self._send_all(send), cancel=self._cancel)
        except (ClientGone, OSError):
            return
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self._parts) as parts:
            async for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def encode_error(error: ApiError) -> bytes:
    """Return the event that ends a stream with an error."""
    return encode_event(error.body())
