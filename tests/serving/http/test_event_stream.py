"""Streams of events: however one ends, its end is reported once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from mlxroute.serving.http.replies.event_stream import EventStream, encode_event


async def _parts() -> AsyncGenerator[bytes, None]:
    yield b"data: 1\n\n"


async def _failing() -> AsyncGenerator[bytes, None]:
    yield b"data: 1\n\n"
    raise ValueError


async def _endless() -> AsyncGenerator[bytes, None]:
    while True:
        yield b"data: 1\n\n"
        await asyncio.sleep(0.01)


async def _send(message: Any) -> None:
    pass


async def _break(message: Any) -> None:
    raise OSError


@pytest.mark.parametrize(
    ("parts", "send", "has_left", "is_cancelled"),
    [
        (_parts, _send, False, False),
        (_failing, _send, False, False),
        (_parts, _break, False, False),
        (_endless, _send, True, False),
        (_endless, _send, False, True),
    ],
    ids=["complete", "failed", "connection lost", "client gone", "before its start"],
)
def test_the_end_of_a_stream_is_reported(
    parts: Any, send: Any, has_left: bool, is_cancelled: bool
) -> None:
    ends: list[str] = []

    async def receive() -> Any:
        if not has_left:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def reply() -> None:
        stream = EventStream(
            parts(),
            cancel=lambda: None,
            headers={},
            keep_alive_s=10.0,
            on_end=lambda: ends.append("end"),
        )
        task = asyncio.ensure_future(stream({"type": "http"}, receive, send))
        await asyncio.sleep(0)
        if is_cancelled:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(reply())
    assert ends == ["end"]


def test_an_event_is_one_line_for_clients_that_split_texts() -> None:
    value = {"text": "a\u2028b\u2029c\x85d\x0be\x1cf\r\ng"}
    line, end = encode_event(value).decode().splitlines()
    assert json.loads(line.removeprefix("data: ")) == value
    assert end == ""
