"""The endpoint of a tiny model in a process of its own, which also tells what it holds.

`python -m tests.serving.soak.served_process MODEL LARGE_URL` prints its port and serves until
SIGTERM.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlxroute import LargeModel, SmallModel
from mlxroute.backend.load import load
from mlxroute.engine import Options
from mlxroute.large.http import circuit_breaker, retry
from mlxroute.serving.http.answer_endpoint import AnswerEndpoint, ServingLimits
from mlxroute.serving.http.endpoint_app import create_app
from mlxroute.serving.http.listener import EndpointServer, bind
from mlxroute.serving.http.serving_session import ServingSession
from tests.support.endpoint import new_router

LIMITS: Final = ServingLimits(cache_bytes=4 * 2**20, store_bytes=2**20)
_LARGE_TIMEOUT_S: Final = 0.25
_PAUSE_S: Final = 0.05


def _describe(endpoint: AnswerEndpoint, large: LargeModel) -> dict[str, Any]:
    """Return what the process holds, and whether calls to the large model are paused.

    It holds rows, caches, documents, and threads by name.
    """
    scheduler = endpoint.scheduler
    device = scheduler._device
    gc.collect()
    return {
        **asdict(scheduler.figures()),
        "requests": len(device._requests),
        "prefills": len(device._prefills),
        "decoding": len(device._decoding),
        "awaited": len(device._awaited),
        "paused": time.monotonic() < (large._breaker._paused_until_s or 0.0),
        "document_bytes": endpoint.store.size_bytes,
        "threads": Counter(thread.name for thread in threading.enumerate()),
    }


def _make_app(small: SmallModel, large: LargeModel) -> Starlette:
    options = Options(max_tokens=32, timeout_s=_LARGE_TIMEOUT_S)
    app = create_app(ServingSession(small, large, new_router, options), limits=LIMITS)

    async def state(request: Request) -> Response:
        return JSONResponse(_describe(app.state.endpoint, large))

    app.router.routes.append(Route("/state", state))
    return app


def serve(path: Path, large_url: str) -> None:
    """Serve the model in a folder beside a large one until a signal."""
    for name in ("_FIRST_PAUSE_S", "_MAX_PAUSE_S", "_MAX_RETRY_AFTER_S"):
        setattr(circuit_breaker, name, _PAUSE_S)
    retry._FIRST_PAUSE_S = 0.001  # type: ignore[misc]
    with LargeModel(large_url) as large:
        large.connect()
        small = SmallModel(*load(path), name="tiny")
        app = _make_app(small, large)
        listener = bind("127.0.0.1", 0)
        server = EndpointServer(app, on_second_signal=app.state.endpoint.close)
        # So that `gc.collect` for each state looks at what the requests left alone.
        gc.freeze()
        print(listener.getsockname()[1], flush=True)  # noqa: T201
        server.run_on(listener)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
