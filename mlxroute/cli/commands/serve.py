"""`serve`: an OpenAI-compatible endpoint of the routed model."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from mlxroute.config import Settings
from mlxroute.errors import UsageError

if TYPE_CHECKING:
    from mlxroute.cli.session import Session
    from mlxroute.serving.http.answer_endpoint import ServingLimits
    from mlxroute.serving.http.guard import AccessRules
    from mlxroute.serving.http.serving_session import ServingSession

_GB = 10**9


def serve(settings: Settings) -> int:
    """Serve the routed model to other programs, as an OpenAI-compatible endpoint."""
    from mlxroute.cli.session import open_session
    from mlxroute.cli.standard_streams import has_room
    from mlxroute.cli.terminal import make_consoles, print_note
    from mlxroute.serving.http.endpoint_app import create_app, create_loading_app
    from mlxroute.serving.http.listener import EndpointServer, bind, serving_in_thread

    out, err = make_consoles()
    rules, limits = _read_rules(settings), _read_limits(settings)

    printing = threading.Lock()

    def notify(line: str) -> None:
        # A log that nobody reads must not keep replies waiting.
        with printing:
            if has_room(err.file):
                print_note(err, f"{time.strftime('%H:%M:%S')} {line}")

    with bind(settings.host, settings.port) as listener:
        address = f"[{settings.host}]" if ":" in settings.host else settings.host
        # Scripts read the address, so it is the only line on stdout.
        url = f"http://{address}:{listener.getsockname()[1]}/v1"
        out.print(url, soft_wrap=True)
        # Models that are loaded beside the event loop of their server decode some 4 % slower.
        with serving_in_thread(create_loading_app(rules), listener):
            session = open_session(settings, err, command="serve")
        try:
            serving = make_serving_session(session)
            app = create_app(serving, limits=limits, rules=rules, notify=notify)
            with app.state.endpoint as endpoint:
                print_note(err, f"ready: {session.describe()}; Ctrl-C ends it")
                EndpointServer(app, on_second_signal=endpoint.close).run_on(listener)
        finally:
            session.close()
    return 0


def make_serving_session(session: Session) -> ServingSession:
    """Return what an endpoint needs of a session."""
    from mlxroute.serving.http.serving_session import ServingSession

    return ServingSession(
        small=session.small,
        large=session.large,
        make_router=lambda budget, threshold: session.routing.new_router(
            budget=budget, threshold=threshold
        ),
        # A stop text is not a setting of `serve`: requests name theirs.
        options=replace(session.options, stop=()),
        adapt_options=session.adapt_options,
        find_models=lambda: session.model_pair,
        redact=session.redact,
    )


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
