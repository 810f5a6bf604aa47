"""`requests`, set up so that it sends, stores and follows nothing unasked and can be broken off."""

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
    """The key, or the user and password of the address.

    Always set, so that `requests` never looks for credentials in a netrc file.
    """

    def __init__(self, address: Address, api_key: str | None) -> None:
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise UsageError("the API key has characters that cannot be sent (a line break?)")
        self._basic = _basic_auth(*address.userinfo) if address.userinfo else None
        self._api_key = api_key
        self._secrets = [api_key] if api_key else []
        if address.userinfo:
            user, password = address.userinfo
            joined = base64.b64encode(f"{user}:{password}".encode()).decode()
            self._secrets += [secret for secret in (joined, password) if secret]

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Sign a request."""
        if self._api_key is not None:
            request.headers["Authorization"] = f"Bearer {self._api_key}"
        elif self._basic is not None:
            self._basic(request)
        return request

    def hidden_in(self, text: str) -> str:
        """A server's text without the secrets it may echo."""
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return text


def _basic_auth(user: str, password: str) -> HTTPBasicAuth:
    # As bytes: requests would encode text as Latin-1, which not every name has.
    return HTTPBasicAuth(user.encode(), password.encode())


class HttpSession(requests.Session):
    """One server's connections and what every request to it carries."""

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
        # A proxy meant for the outside cannot reach a server on this machine.
        self.trust_env = not address.is_loopback
        self.broken_off = False

    # Even when told not to follow, requests reads a redirect's whole body and parses its target.
    def get_redirect_target(self, resp: requests.Response) -> None:
        """No redirect is followed."""
        return None

    def break_off(self) -> None:
        """End every exchange, also one that another thread waits for, and close."""
        self.broken_off = True
        self._adapter.break_off()
        self.close()


class HttpSessionPool:
    """Sessions of one server, each lent to one exchange at a time.

    So one exchange can be broken off without harm to another. Safe for several threads.
    """

    def __init__(self, address: Address, auth: Auth) -> None:
        self._address = address
        self._auth = auth
        self._lock = threading.Lock()
        self._idle: list[HttpSession] = []
        self._lent: set[HttpSession] = set()

    def lend(self) -> HttpSession:
        """The session used last, whose connection is the likeliest to be alive, or a new one."""
        with self._lock:
            session = self._idle.pop() if self._idle else HttpSession(self._address, self._auth)
            self._lent.add(session)
        return session

    def take_back(self, session: HttpSession) -> None:
        """Keep a session for the next exchange, unless it was broken off."""
        with self._lock:
            self._lent.discard(session)
            if not session.broken_off:
                self._idle.append(session)

    def close(self) -> None:
        """End every exchange and close every connection; what is lent later is new."""
        with self._lock:
            idle, self._idle = self._idle, []
            lent, self._lent = self._lent, set()
        for session in (*idle, *lent):
            session.break_off()


class _Adapter(HTTPAdapter):
    """Knows its sockets: only shutting one down ends a read that blocks another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._broken_off = False
        super().__init__()

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **options)
        if not issubclass(pool.ConnectionCls, _Announced):
            bases = (_Announced, pool.ConnectionCls)
            pool.ConnectionCls = type("Announced", bases, {"opened": self._opened})
        return pool

    def break_off(self) -> None:
        with self._lock:
            self._broken_off = True
            sockets = list(self._sockets)
        for sock in sockets:
            _shut_down(sock)

    def _opened(self, connection: Any) -> None:
        with self._lock:
            self._sockets.add(connection.sock)
            too_late = self._broken_off
        if too_late:
            _shut_down(connection.sock)


class _Announced:
    """Mixed into a connection: tells of its socket once that is open."""

    opened: Any

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        type(self).opened(self)


def _shut_down(sock: socket.socket) -> None:
    # Past TLS, whose own shutdown would wait for the other side.
    with contextlib.suppress(OSError, TypeError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def check_ca_bundle(path: Path) -> str:
    """The path of a file of PEM certificates. Raises UsageError when it is none."""
    try:
        ssl.create_default_context(cafile=path)
    except ssl.SSLError as exc:
        raise UsageError(f"the file {path} (--ca-bundle) holds no certificate in PEM form") from exc
    except OSError as exc:
        raise UsageError(f"the file {path} (--ca-bundle) cannot be read: {exc.strerror}") from exc
    return str(path)
