"""`serve`: an OpenAI-compatible endpoint of the routed model."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from mlxroute.config import Settings
from mlxroute.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from starlette.applications import Starlette

    from mlxroute.cli.session import Session
    from mlxroute.serving.http.answer_endpoint import ServingLimits
    from mlxroute.serving.http.guard import AccessRules
    from mlxroute.serving.http.listener import EndpointServer
    from mlxroute.serving.http.serving_session import ServingSession

_GB = 10**9


def serve(settings: Settings) -> int:
    """Serve the routed model to other programs, as an OpenAI-compatible endpoint."""
    from mlxroute.cli.terminal import make_consoles, print_note
    from mlxroute.serving.http.endpoint_app import create_loading_app
    from mlxroute.serving.http.listener import EndpointServer, bind

    out, err = make_consoles()
    rules, limits = _read_rules(settings), _read_limits(settings)
    listener = bind(settings.host, settings.port)

    def notify(line: str) -> None:
        print_note(err, f"{time.strftime('%H:%M:%S')} {line}")

    app = create_loading_app(rules, notify=notify)
    server = EndpointServer(app, on_second_signal=lambda: _close(app))
    loading = _Loading(settings, app, server, err, limits=limits)
    loading.start()
    address = f"[{settings.host}]" if ":" in settings.host else settings.host
    # Scripts read the address, so it is the only line on stdout.
    out.print(f"http://{address}:{listener.getsockname()[1]}/v1", soft_wrap=True)
    try:
        server.run_on(listener)
    finally:
        loading.close()
    return 0


class _Loading:
    """Loads the models in a thread, while the application replies that it is not ready."""

    def __init__(
        self,
        settings: Settings,
        app: Starlette,
        server: EndpointServer,
        err: Console,
        *,
        limits: ServingLimits,
    ) -> None:
        self._settings = settings
        self._app = app
        self._server = server
        self._err = err
        self._limits = limits
        self._session: Session | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._load, name="mlxroute-load", daemon=True)

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def close(self) -> None:
        """End all answers and close the session. Raises the error that loading ended with."""
        _close(self._app)
        if self._session is not None:
            self._session.close()
        if self._failure is not None:
            raise self._failure

    def _load(self) -> None:
        from mlxroute.cli.session import open_session
        from mlxroute.cli.terminal import print_note
        from mlxroute.serving.http.answer_endpoint import AnswerEndpoint

        try:
            session = self._session = open_session(self._settings, self._err, command="serve")
            serving = make_serving_session(session, self._settings)
            notify = self._app.state.notify
            self._app.state.endpoint = AnswerEndpoint(serving, self._limits, notify=notify)
            print_note(self._err, f"ready: {session.describe()}; Ctrl-C ends it")
        except BaseException as exc:  # noqa: BLE001 - it is raised in the main thread
            self._failure = exc
            self._server.should_exit = True


def make_serving_session(session: Session, settings: Settings) -> ServingSession:
    """Return what an endpoint needs of a session."""
    from mlxroute.answers.document import ModelPair
    from mlxroute.cli.small_setup import default_small
    from mlxroute.engine import Options, parse_mode
    from mlxroute.serving.http.serving_session import ServingSession
    from mlxroute.types import Sampling

    large = session.large
    return ServingSession(
        small=session.small,
        large=large,
        make_router=lambda budget, threshold: session.routing.new_router(
            budget=budget, threshold=threshold
        ),
        options=Options(
            max_tokens=settings.max_tokens,
            sampling=Sampling(settings.temperature, settings.top_p, settings.seed),
            timeout_s=settings.timeout,
            strict=settings.strict,
            never_send=session.never_send,
            prices=session.prices,
            mode=parse_mode(settings.mode),
            prefetch=settings.prefetch,
            call_ceiling=session.call_ceiling,
            accept_within=settings.accept_within,
        ),
        models=ModelPair(
            small=session.small.name,
            small_spec=settings.small or default_small(),
            adapter=settings.adapter,
            large=None if large is None else large.model_name,
            large_url=None if large is None else large.base_url,
        ),
        redact=session.redact,
    )


def _close(app: Starlette) -> None:
    if (endpoint := app.state.endpoint) is not None:
        endpoint.close()


def _read_rules(settings: Settings) -> AccessRules:
    """Return who may use the endpoint. Raises UsageError for an open address without a key."""
    from mlxroute.config.client_keys import read_client_keys
    from mlxroute.serving.http.guard import AccessRules, is_loopback

    keys = read_client_keys(settings, os.environ)
    if not keys and not is_loopback(settings.host):
        raise UsageError(
            f"other machines could use the endpoint on {settings.host}; give a key for its clients"
            " with --client-key-file or --client-key-env, or listen on 127.0.0.1",
            parameter="host",
        )
    return AccessRules(
        host=settings.host,
        keys=tuple(key.reveal() for key in keys),
        allowed_hosts=settings.allow_host,
        allowed_origins=settings.allow_origin,
    )


def _read_limits(settings: Settings) -> ServingLimits:
    from mlxroute.config.setting_choices import ToolPolicyName
    from mlxroute.serving.http.answer_endpoint import ServingLimits

    return ServingLimits(
        max_running=settings.max_running,
        max_queued=settings.max_queued,
        cache_bytes=int(settings.cache_memory * _GB),
        tools=ToolPolicyName(settings.tools),
    )
