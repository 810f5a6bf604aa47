"""`create_app`: the endpoint as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
from mlxroute.serving.http.metrics import OTHER_ROUTE, count_request
from mlxroute.serving.http.page.chat_page import read_chat_page
from mlxroute.serving.http.replies.reply_forms import ID_HEADER
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
    app = create_loading_app(rules or AccessRules())
    app.state.endpoint = AnswerEndpoint(session, limits or ServingLimits(), notify=notify)
    app.state.notify = notify
    return app


def create_loading_app(rules: AccessRules) -> Starlette:
    """Return an application that has no endpoint yet: it replies 503."""
    middleware = [Middleware(Guard, rules=rules)]
    if rules.allowed_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=rules.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[ID_HEADER, "Retry-After", "x-should-retry"],
            allow_private_network=True,
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=[
            *(Route(path, handler, methods=[method]) for path, handler, method in _ROUTES),
            Route("/", _make_page_handler(), methods=["GET"]),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _on_http_error},
        lifespan=_lifespan,
    )
    app.state.endpoint = None
    app.state.notify = no_notice
    return app


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    if (endpoint := app.state.endpoint) is not None:
        endpoint.close()


def _make_page_handler() -> routes.Handler:
    page = read_chat_page()

    async def handle(request: Request) -> Response:
        return Response(page.html, media_type="text/html", headers=page.headers)

    return handle


async def _on_http_error(request: Request, exc: Exception) -> Response:
    """Reply in the API's form where no route handles a request."""
    status = exc.status_code if isinstance(exc, HTTPException) else 500
    count_request(request.app, OTHER_ROUTE, status)
    known = ", ".join(
        [*(f"{method} {path.replace(':path', '')}" for path, _, method in _ROUTES), "GET /"]
    )
    if status == 404:
        error = ApiError(404, f"there is no such path; there are {known}", code="not_found")
    elif status == 405:
        error = ApiError(405, f"the path does not take this method; there are {known}")
        error.headers.update(getattr(exc, "headers", None) or {})
    else:
        error = ApiError(status, str(getattr(exc, "detail", "the request failed")))
    return error.response()
