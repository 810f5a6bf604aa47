"""The body of a request: bounded in size and in time, and a JSON object."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request

from mlxroute.serving.http.api_error import ApiError
from mlxroute.untrusted_text import MalformedText, parse_json

MAX_BODY_BYTES: Final = 4 * 2**20
_MAX_BODY_S: Final = 30.0


async def read_json(request: Request) -> dict[str, Any]:
    """Return the JSON object in the body of a request. Raises ApiError."""
    try:
        async with asyncio.timeout(_MAX_BODY_S):
            data = await _read(request)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_MAX_BODY_S:.0f} seconds") from None
    except ClientDisconnect:
        raise ApiError(400, "the client left before its request was complete") from None
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
    if length.isdecimal() and (len(length) > 18 or int(length) > MAX_BODY_BYTES):
        raise _too_large()
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise _too_large()
    return b"".join(parts)


def _too_large() -> ApiError:
    error = ApiError(413, f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB")
    error.headers["Connection"] = "close"
    return error
