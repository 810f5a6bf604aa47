"""A small language model on your machine that asks a large one only for the tokens it needs.

from mlxroute import EntropyRouter, LargeModel, SmallModel, generate

small = SmallModel.load("qwen2.5-coder-0.5b")
large = LargeModel("http://127.0.0.1:8081/v1")
for token in generate(small, large, "Why is the sky blue?", router=EntropyRouter()):
    print(token.text, token.source)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mlxroute._version import __version__

if TYPE_CHECKING:
    from mlxroute.backend.device_streams import end_device_streams
    from mlxroute.engine import Answer, generate
    from mlxroute.errors import MlxRouteError
    from mlxroute.large import LargeModel
    from mlxroute.ledger import Ledger
    from mlxroute.routers import EntropyRouter
    from mlxroute.serving.http.endpoint_app import create_app
    from mlxroute.serving.http.serving_session import ServingSession
    from mlxroute.small import SmallModel
    from mlxroute.types import Prices, RunStats, Signals, Source, StopReason, Token

_MODULES = {
    "Answer": "mlxroute.engine",
    "EntropyRouter": "mlxroute.routers",
    "LargeModel": "mlxroute.large",
    "Ledger": "mlxroute.ledger",
    "MlxRouteError": "mlxroute.errors",
    "Prices": "mlxroute.types",
    "RunStats": "mlxroute.types",
    "ServingSession": "mlxroute.serving.http.serving_session",
    "Signals": "mlxroute.types",
    "SmallModel": "mlxroute.small",
    "Source": "mlxroute.types",
    "StopReason": "mlxroute.types",
    "Token": "mlxroute.types",
    "create_app": "mlxroute.serving.http.endpoint_app",
    "end_device_streams": "mlxroute.backend.device_streams",
    "generate": "mlxroute.engine",
}

__all__ = [
    "Answer",
    "EntropyRouter",
    "LargeModel",
    "Ledger",
    "MlxRouteError",
    "Prices",
    "RunStats",
    "ServingSession",
    "Signals",
    "SmallModel",
    "Source",
    "StopReason",
    "Token",
    "__version__",
    "create_app",
    "end_device_streams",
    "generate",
]


def __getattr__(name: str) -> object:
    # Import on first use: `mlxroute --help` must not load MLX or requests.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'mlxroute' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
