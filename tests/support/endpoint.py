"""Endpoints of tiny models, for tests of the HTTP side."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.testclient import TestClient

from mlxroute.engine import Options
from mlxroute.engine.protocols import LargeProtocol
from mlxroute.routers import Router, make_router
from mlxroute.serving.http.answer_endpoint import ServingLimits
from mlxroute.serving.http.endpoint_app import create_app
from mlxroute.serving.http.guard import AccessRules
from mlxroute.serving.http.serving_session import ServingSession
from mlxroute.small import SmallModel
from mlxroute.types import Notify, no_notice

HOST = "http://127.0.0.1:8787"


def new_router(budget: float | None, threshold: float | None) -> Router:
    if budget is None and threshold is None:
        threshold = math.inf
    return make_router("entropy", budget=budget, threshold=threshold)


def make_session(
    small: SmallModel, large: LargeProtocol | None = None, *, max_tokens: int = 12
) -> ServingSession:
    return ServingSession(
        small,
        large,  # type: ignore[arg-type]
        new_router,
        Options(max_tokens=max_tokens),
    )


@contextmanager
def running(
    session: ServingSession,
    *,
    limits: ServingLimits | None = None,
    rules: AccessRules | None = None,
    notify: Notify = no_notice,
) -> Iterator[TestClient]:
    """Yield a client of an endpoint that ends with the block."""
    app = create_app(session, limits=limits, rules=rules, notify=notify)
    with TestClient(app, base_url=HOST, raise_server_exceptions=False) as client:
        yield client


def chat(text: str = "the quick brown fox", **fields: Any) -> dict[str, Any]:
    """Return the body of a chat completion."""
    return {"model": "mlxroute", "messages": [{"role": "user", "content": text}], **fields}


def read_stream(text: str) -> list[Any]:
    """Return the JSON values of a stream's events, and "[DONE]"; comments are left out."""
    events = []
    for block in text.split("\n\n"):
        if not block or block.startswith(":"):
            continue
        assert block.startswith("data: ")
        data = block.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


async def call_until(
    app: Any,
    body: dict[str, Any],
    stop: Callable[[bytes], bool],
    *,
    path: str = "/v1/chat/completions",
) -> None:
    """Send a request, and leave once `stop`, called with each part and while idle, is true."""
    left = asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and stop(message["body"]):
            left.set()

    async def watch() -> None:
        while not left.is_set():
            await asyncio.sleep(0.01)
            if not received_only and stop(b""):
                left.set()

    received_only = body.get("stream", False) and stop.__name__ == "on_body"
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1")],
        "http_version": "1.1",
        "scheme": "http",
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8787),
    }
    async with asyncio.timeout(20):
        watching = asyncio.ensure_future(watch())
        await app(scope, receive, send)
        watching.cancel()
