"""The body of a request: bounded in size and in time, and a JSON object."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request

from mlxroute.safe_text import printable_line
from mlxroute.serving.http.api_error import ApiError
from mlxroute.untrusted_text import MalformedText, parse_json

MAX_BODY_BYTES: Final = 4 * 2**20
_MAX_BODY_S: Final = 30.0
# A client that is cut off in mid-body sees a broken connection in place of the reply.
_MAX_DISCARDED_BYTES: Final = 64 * 2**20
_MAX_DISCARD_S: Final = 3.0


async def read_json(request: Request) -> dict[str, Any]:
    """Return the JSON object in the body of a request. Raises ApiError."""
    try:
        async with asyncio.timeout(_MAX_BODY_S):
            data = await _read(request)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_MAX_BODY_S:.0f} seconds") from None
    except ClientDisconnect:
        raise ApiError(400, "the client left before its request was complete") from None
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        shown = printable_line(encoding, limit=80)
        raise ApiError(415, f"the body has the Content-Encoding {shown!r}; send it uncompressed")
    return parse_body(data)


def parse_body(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`. Raises ApiError for anything else."""
    try:
        # Clients may cut a text inside a character; texts are cleaned where they are read.
        value = parse_json(data.decode(), strict=False)
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except MalformedText as exc:
        raise ApiError(400, f"the body cannot be used: {exc}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    return value


async def _read(request: Request) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > _MAX_DISCARDED_BYTES):
        raise _too_large()
    parts, size, stream = [], 0, request.stream()
    async for part in stream:
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            await _discard(stream)
            raise _too_large()
    return b"".join(parts)


async def _discard(stream: AsyncIterator[bytes]) -> None:
    """Read the rest of a body, or as much as its limits allow."""
    size = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_MAX_DISCARD_S):
            async for part in stream:
                size += len(part)
                if size > _MAX_DISCARDED_BYTES:
                    return


def _too_large() -> ApiError:
    error = ApiError(413, f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB")
    error.headers["Connection"] = "close"
    return error
