"""Endpoints of tiny models, for tests of the HTTP side."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
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
) -> Iterator[TestClient]:
    """Yield a client of an endpoint that ends with the block."""
    app = create_app(session, limits=limits, rules=rules)
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
