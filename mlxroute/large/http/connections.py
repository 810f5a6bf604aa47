"""HTTP sessions that can be aborted, keep no cookies and follow no redirects."""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any, Final
from weakref import WeakSet

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase

from mlxroute._version import __version__
from mlxroute.errors import UsageError
from mlxroute.large.http.address import Address
from mlxroute.large.http.limited_response import LimitedResponse
from mlxroute.ledger import is_secret

# Routers and load balancers drop a silent connection without a word after a minute or more.
_MAX_IDLE_S: Final = 55.0
_KEEPALIVE_IDLE_S: Final = 20
_KEEPALIVE_INTERVAL_S: Final = 10
_KEEPALIVE_PROBES: Final = 3


class Auth(AuthBase):
    """Signs requests with the user and password of the address, or else with the API key.

    The address was typed for this server; the key may be one that another program needs. Every
    session has an `Auth`, so that `requests` never looks for credentials in a netrc file.

    Attributes:
        secrets: The texts that are to be in no output: the key, unless it is so short that it may
            be any word, the password, and the credentials as they are sent.
    """

    def __init__(self, address: Address, api_key: str | None) -> None:
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise UsageError(
                "api_key has characters that cannot be sent in a header, such as a line break",
                parameter="api_key",
            )
        self.secrets = [api_key] if api_key and is_secret(api_key) else []
        self._header = f"Bearer {api_key}" if api_key else None
        if address.userinfo:
            user, password = address.userinfo
            # requests would encode text as Latin-1, which lacks many characters.
            joined = f"{user}:{password}".encode(errors="surrogateescape")
            encoded = base64.b64encode(joined).decode()
            self._header = f"Basic {encoded}"
            self.secrets += [encoded, password or user]

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the `Authorization` header."""
        if self._header is not None:
            request.headers["Authorization"] = self._header
        return request


class HttpSession(requests.Session):
    """The connections to one server and the headers of every request."""

    def __init__(self, address: Address, auth: Auth) -> None:
        super().__init__()
        self._adapter = _Adapter()
        for scheme in ("http://", "https://"):
            self.mount(scheme, self._adapter)
        self.headers.update(
            {
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "User-Agent": f"mlxroute/{__version__}",
            }
        )
        self.auth = auth
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        # A proxy that the environment names cannot reach a server on this machine.
        self.trust_env = not address.is_loopback
        self.aborted = False

    @property
    def connection_count(self) -> int:
        """The number of connections opened so far."""
        return self._adapter.connection_count

    # Without this, requests reads a redirect's whole body and parses its target.
    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return None: redirects are not followed."""
        return None

    def abort(self) -> None:
        """End the exchange, also if another thread is blocked in it, and close."""
        self.aborted = True
        self._adapter.abort()
        self.close()


class HttpSessionPool:
    """The sessions of one server; each belongs to one exchange at a time.

    Aborting one exchange therefore does not affect another. Safe for several threads.
    """

    def __init__(
        self, address: Address, auth: Auth, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._address = address
        self._auth = auth
        self._clock = clock
        self._lock = threading.Lock()
        # With the times of their release, the latest last.
        self._idle: list[tuple[float, HttpSession]] = []
        self._in_use: set[HttpSession] = set()

    def acquire(self, *, fresh: bool = False) -> HttpSession:
        """Return the session used last, whose connection is most likely alive, or a new one.

        Sessions that were idle for nearly a minute are closed. With `fresh` all idle ones are.
        """
        with self._lock:
            oldest_s = self._clock() - _MAX_IDLE_S
            dropped = []
            session: HttpSession | None = None
            while self._idle and (fresh or self._idle[0][0] <= oldest_s):
                dropped.append(self._idle.pop(0)[1])
            # One that was released while the pool was closing is aborted.
            while self._idle and (session is None or session.aborted):
                session = self._idle.pop()[1]
            if session is None or session.aborted:
                session = HttpSession(self._address, self._auth)
            self._in_use.add(session)
        for old in dropped:
            old.close()
        return session

    def create(self) -> HttpSession:
        """Return a new session; the idle ones are kept for others."""
        session = HttpSession(self._address, self._auth)
        with self._lock:
            self._in_use.add(session)
        return session

    def release(self, session: HttpSession) -> None:
        """Keep a session for the next exchange, unless it was aborted."""
        with self._lock:
            self._in_use.discard(session)
            if not session.aborted:
                self._idle.append((self._clock(), session))

    def close(self) -> None:
        """Abort every exchange and close every connection; later sessions are new."""
        with self._lock:
            sessions = [*(session for _, session in self._idle), *self._in_use]
            self._idle = []
            self._in_use = set()
        for session in sessions:
            session.abort()


class _Adapter(HTTPAdapter):
    """Tracks its sockets, because only shutting a socket down ends a read in another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._aborted = False
        self.connection_count = 0
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options, socket_options=_socket_options())

    def proxy_manager_for(self, proxy: Any, **options: Any) -> Any:
        if not str(proxy).lower().startswith("socks"):
            options["socket_options"] = _socket_options()
        return super().proxy_manager_for(proxy, **options)

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **options)
        if not issubclass(pool.ConnectionCls, _TrackedConnection):
            bases = (_TrackedConnection, pool.ConnectionCls)
            attributes = {"on_connect": self._track, "response_class": LimitedResponse}
            pool.ConnectionCls = type("TrackedConnection", bases, attributes)
        return pool

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            sockets = list(self._sockets)
        for sock in sockets:
            _shut_down(sock)

    def _track(self, connection: Any) -> None:
        with self._lock:
            self._sockets.add(connection.sock)
            self.connection_count += 1
            aborted = self._aborted
        if aborted:
            _shut_down(connection.sock)


class _TrackedConnection:
    """Mixed into a connection class; calls `on_connect` once the socket is open."""

    on_connect: Any

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        type(self).on_connect(self)


def _socket_options() -> list[tuple[int, int, int]]:
    """Return the options of each socket: no delay, and TCP keep-alive where the system has it."""
    options = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    ]
    for names, value in (
        # The first is Linux's name, the second that of macOS.
        (("TCP_KEEPIDLE", "TCP_KEEPALIVE"), _KEEPALIVE_IDLE_S),
        (("TCP_KEEPINTVL",), _KEEPALIVE_INTERVAL_S),
        (("TCP_KEEPCNT",), _KEEPALIVE_PROBES),
    ):
        name = next((name for name in names if hasattr(socket, name)), None)
        if name is not None:
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


def _shut_down(sock: socket.socket) -> None:
    # The plain socket's method: that of a TLS socket would wait for the other side.
    with contextlib.suppress(OSError, TypeError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def check_ca_bundle(path: Path | str) -> str:
    """Return the path of a file of PEM certificates. Raises UsageError if it holds none."""
    path = Path(path)
    # Reading a pipe or a device might never end.
    if path.exists() and not path.is_file():
        raise UsageError(f"ca_bundle {path} is not a file", parameter="ca_bundle")
    try:
        ssl.create_default_context(cafile=path)
    except ssl.SSLError as exc:
        raise UsageError(
            f"ca_bundle {path} holds no certificate in PEM form", parameter="ca_bundle"
        ) from exc
    except OSError as exc:
        raise UsageError(
            f"ca_bundle {path} cannot be read: {exc.strerror}", parameter="ca_bundle"
        ) from exc
    return str(path)
