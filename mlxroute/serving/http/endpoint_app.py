"""`create_app`: the endpoint as an ASGI application."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mlxroute.serving.http import routes
from mlxroute.serving.http.answer_endpoint import AnswerEndpoint, ServingLimits
from mlxroute.serving.http.api_error import ApiError
from mlxroute.serving.http.guard import AccessRules, Guard
from mlxroute.serving.http.serving_session import ServingSession
from mlxroute.types import Notify, no_notice

_ROUTES: Final = (
    ("/v1/chat/completions", routes.chat_completions, "POST"),
    ("/v1/completions", routes.completions, "POST"),
    ("/v1/models", routes.models, "GET"),
    ("/v1/models/{model:path}", routes.model, "GET"),
    ("/v1/mlxroute/answers/{answer_id}", routes.answer_document, "GET"),
    ("/health", routes.health, "GET"),
    ("/metrics", routes.metrics, "GET"),
)
_SCRIPT: Final = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


def create_app(
    session: ServingSession,
    *,
    limits: ServingLimits | None = None,
    rules: AccessRules | None = None,
    notify: Notify = no_notice,
) -> Starlette:
    """Return an application that serves a session.

    Run it in one process: `uvicorn.run(create_app(session), port=8787)`. Its lifespan ends all
    answers.

    Args:
        session: The models, which nothing else may use.
        limits: Limits of the endpoint. The defaults of `ServingLimits` by default.
        rules: Who may use it. By default every client on this machine.
        notify: Receives a line about each answer. Default: ignored.
    """
    app = create_loading_app(rules or AccessRules(), notify=notify)
    app.state.endpoint = AnswerEndpoint(session, limits or ServingLimits(), notify=notify)
    return app


def create_loading_app(rules: AccessRules, *, notify: Notify) -> Starlette:
    """Return an application that replies 503 until its `state.endpoint` is set."""
    middleware = [Middleware(Guard, rules=rules)]
    if rules.allowed_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=rules.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[routes.ID_HEADER, "Retry-After"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=[
            *(Route(path, handler, methods=[method]) for path, handler, method in _ROUTES),
            Route("/", _page(), methods=["GET"]),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _on_http_error},
        lifespan=_lifespan,
    )
    app.state.endpoint = None
    app.state.notify = notify
    return app


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    if (endpoint := app.state.endpoint) is not None:
        endpoint.close()


def _page() -> routes.Handler:
    """Return the handler of the page, whose script is the only one that a browser runs."""
    html = (files("mlxroute.serving.http") / "page" / "index.html").read_bytes()
    digests = [hashlib.sha256(script).digest() for script in _SCRIPT.findall(html)]
    scripts = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    policy = (
        f"default-src 'none'; script-src {scripts or chr(39) + 'none' + chr(39)};"
        " style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    async def page(request: Request) -> Response:
        return Response(html, media_type="text/html", headers=headers)

    return page


async def _on_http_error(request: Request, exc: Exception) -> Response:
    """Reply in the API's form where no route handles a request."""
    status = exc.status_code if isinstance(exc, HTTPException) else 500
    known = ", ".join(f"{method} {path}" for path, _, method in _ROUTES)
    if status == 404:
        error = ApiError(404, f"there is no such path; there are {known}", code="not_found")
    elif status == 405:
        error = ApiError(405, f"the path does not take this method; there are {known}")
        error.headers.update(getattr(exc, "headers", None) or {})
    else:
        error = ApiError(status, str(getattr(exc, "detail", "the request failed")))
    return error.response()
