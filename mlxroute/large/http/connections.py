"""HTTP sessions that can be aborted, keep no cookies and follow no redirects."""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import threading
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any
from weakref import WeakSet

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase, HTTPBasicAuth

from mlxroute._version import __version__
from mlxroute.errors import UsageError
from mlxroute.large.http.address import Address


class Auth(AuthBase):
    """Signs requests with the API key, or with the user and password of the address.

    Every session has one, so that `requests` never looks for credentials in a netrc file.
    """

    def __init__(self, address: Address, api_key: str | None) -> None:
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise UsageError(
                "api_key has characters that cannot be sent in a header, such as a line break",
                parameter="api_key",
            )
        self._basic = _basic_auth(*address.userinfo) if address.userinfo else None
        self._api_key = api_key
        self._secrets = [api_key] if api_key else []
        if address.userinfo:
            user, password = address.userinfo
            joined = base64.b64encode(f"{user}:{password}".encode()).decode()
            self._secrets += [secret for secret in (joined, password) if secret]

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the `Authorization` header."""
        if self._api_key is not None:
            request.headers["Authorization"] = f"Bearer {self._api_key}"
        elif self._basic is not None:
            self._basic(request)
        return request

    def redact(self, text: str) -> str:
        """Replace the secrets in a server's text, which may echo them."""
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return text


def _basic_auth(user: str, password: str) -> HTTPBasicAuth:
    # As bytes: requests would encode text as Latin-1, which lacks many characters.
    return HTTPBasicAuth(user.encode(), password.encode())


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

    def __init__(self, address: Address, auth: Auth) -> None:
        self._address = address
        self._auth = auth
        self._lock = threading.Lock()
        self._idle: list[HttpSession] = []
        self._in_use: set[HttpSession] = set()

    def acquire(self) -> HttpSession:
        """Return the session used last, whose connection is most likely alive, or a new one."""
        with self._lock:
            session = self._idle.pop() if self._idle else HttpSession(self._address, self._auth)
            self._in_use.add(session)
        return session

    def release(self, session: HttpSession) -> None:
        """Keep a session for the next exchange, unless it was aborted."""
        with self._lock:
            self._in_use.discard(session)
            if not session.aborted:
                self._idle.append(session)

    def close(self) -> None:
        """Abort every exchange and close every connection; later sessions are new."""
        with self._lock:
            idle, self._idle = self._idle, []
            in_use, self._in_use = self._in_use, set()
        for session in (*idle, *in_use):
            session.abort()


class _Adapter(HTTPAdapter):
    """Tracks its sockets, because only shutting a socket down ends a read in another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._aborted = False
        super().__init__()

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **options)
        if not issubclass(pool.ConnectionCls, _TrackedConnection):
            bases = (_TrackedConnection, pool.ConnectionCls)
            pool.ConnectionCls = type("TrackedConnection", bases, {"on_connect": self._track})
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
            aborted = self._aborted
        if aborted:
            _shut_down(connection.sock)


class _TrackedConnection:
    """Mixed into a connection class; calls `on_connect` once the socket is open."""

    on_connect: Any

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        type(self).on_connect(self)


def _shut_down(sock: socket.socket) -> None:
    # The plain socket's method: that of a TLS socket would wait for the other side.
    with contextlib.suppress(OSError, TypeError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def check_ca_bundle(path: Path) -> str:
    """Return the path of a file of PEM certificates. Raises UsageError if it holds none."""
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
