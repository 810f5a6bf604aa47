"""The HTTP server: bounded connections, and an end that first drains.

The first signal to end stops new connections and lets running replies finish; a second one ends
all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlxroute.errors import UsageError
from mlxroute.ports import check_port_free

_MAX_HEAD_S: Final = 10.0
_KEEP_ALIVE_S: Final = 15
_MAX_HEAD_BYTES: Final = 64 * 2**10
# A client that reads nothing of its reply for so long is taken for gone.
_MAX_UNREAD_S: Final = 60.0
# The rest of a body whose request was refused may take so long.
_MAX_REST_S: Final = 30.0
# Connections that wait for a request; above it the oldest is closed.
_MAX_WAITING: Final = 512
_OPEN_FILES: Final = 4096
_LAST_PORT: Final = 65_535
_BACKLOG: Final = 1024
# `timeout` and some supervisors send one signal twice, to the process and to its group.
_SAME_SIGNAL_S: Final = 0.2


class BoundedConnection(H11Protocol):
    """A connection whose head must arrive in time and whose replies must be read."""

    _waiting: dict[BoundedConnection, None] = {}  # noqa: RUF012 - shared on purpose

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait_for_head()
        if len(self._waiting) > _MAX_WAITING:
            next(iter(self._waiting))._close_waiting()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        if self.conn.their_state is not h11.SEND_BODY:
            self._stop_rest_timer()
        if self._rest_timer is not None:
            return
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._head_timer is None:
            self._wait_for_head()

    def handle_events(self) -> None:
        """Handle what has been read, and read on, so that a client that leaves is noticed."""
        super().handle_events()
        # Uvicorn stops at a request that arrives before the present one is answered.
        if (
            self.flow.read_paused
            and not self.cycle.more_body
            and len(self.conn.trailing_data[0]) < _MAX_HEAD_BYTES
        ):
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Reply to a request that is not HTTP, or end the connection if a reply has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        self._stop_rest_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Wait for the client to read, as long as it reads something."""
        super().pause_writing()
        self._wait_for_reading()

    def resume_writing(self) -> None:
        """Go on once the client has read."""
        super().resume_writing()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def on_response_complete(self) -> None:
        """Keep the connection for the rest of the body or the next request, for a short time."""
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            self._waiting[self] = None
        elif self.conn.their_state is h11.SEND_BODY:
            self._stop_rest_timer()
            self._waiting[self] = None
            self._rest_timer = self.loop.call_later(_MAX_REST_S, self.transport.abort)

    def _wait_for_reading(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._unread_timer = self.loop.call_later(_MAX_UNREAD_S, self._check_reading, unread)

    def _check_reading(self, unread: int) -> None:
        # Nothing is written meanwhile, so a buffer that has not shrunk was not read.
        if self.transport.get_write_buffer_size() < unread:
            self._wait_for_reading()
        else:
            self.transport.abort()

    def _wait_for_head(self) -> None:
        self._waiting[self] = None
        self._head_timer = self.loop.call_later(_MAX_HEAD_S, self._close_waiting)

    def _stop_waiting(self) -> None:
        self._waiting.pop(self, None)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_rest_timer(self) -> None:
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None

    def _close_waiting(self) -> None:
        self._stop_waiting()
        if not self.transport.is_closing():
            self.transport.abort()


class EndpointServer(uvicorn.Server):
    """The server of an application.

    Args:
        app: The application.
        on_second_signal: Called at the second signal to end; it must end all replies. Nothing by
            default.
    """

    def __init__(
        self, app: Starlette, *, on_second_signal: Callable[[], None] = lambda: None
    ) -> None:
        config = uvicorn.Config(
            app,
            http=BoundedConnection,
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        )
        super().__init__(config)
        self._on_second_signal = on_second_signal
        self._last_signal_s = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at the second."""
        now_s = time.monotonic()
        if self.should_exit and now_s - self._last_signal_s > _SAME_SIGNAL_S:
            self.force_exit = True
            self._on_second_signal()
        self.should_exit = True
        self._last_signal_s = now_s

    def run_on(self, listener: socket.socket) -> None:
        """Serve until a signal, in the main thread."""
        _raise_file_limit()
        # Whoever is told of signals here may end the process before the replies are complete.
        wakeup = signal.set_wakeup_fd(-1)
        try:
            self.run(sockets=[listener])
        finally:
            signal.set_wakeup_fd(wakeup)


@contextlib.contextmanager
def serving_in_thread(app: Starlette, listener: socket.socket) -> Iterator[None]:
    """Serve an application in a thread until the `with` block ends; the listener stays open.

    A client that connects at the end waits for the next server on the listener.
    """
    server = EndpointServer(app)
    thread = threading.Thread(
        target=server.run, args=([listener.dup()],), name="mlxroute-loading", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises UsageError if the address cannot be used."""
    if not 0 <= port <= _LAST_PORT:
        raise UsageError(f"port must be from 0 to {_LAST_PORT}, not {port}", parameter="port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        check_port_free(host, port)
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise UsageError(
            f"cannot listen on port {port} of {host}: {reason}; choose another",
            parameter="port",
        ) from exc


def _raise_file_limit() -> None:
    """Allow more open connections than many systems do at first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft < target:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
