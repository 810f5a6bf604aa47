"""What a request must pass before it is read: the Host header, its origin, and its key."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mlxroute.safe_text import printable_line
from mlxroute.serving.http.api_error import ApiError

# They hold no data of users: the page, and whether the endpoint is ready.
_OPEN_PATHS: Final = frozenset({"/", "/health", "/favicon.ico"})
_LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class AccessRules:
    """Who may use an endpoint.

    Args:
        host: The address that it listens on. 127.0.0.1 by default.
        keys: The keys of its clients. None (default): every client on this machine.
        allowed_hosts: Further names by which clients may call it. None by default.
        allowed_origins: Origins of web pages that may call it. None by default.
    """

    host: str = "127.0.0.1"
    keys: Sequence[str] = field(default=(), repr=False)
    allowed_hosts: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()


class Guard:
    """Refuses requests that the rules do not allow, and notes the owner of the others.

    The Host header is checked because a web page can give its own name this machine's address;
    the Origin header because a page may send requests whose replies it cannot read.
    """

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app = app
        self._rules = rules
        # An address for all networks, and often a name, is reached as localhost too.
        self._hosts = {name.lower() for name in (*rules.allowed_hosts, rules.host)}
        self._hosts |= _LOOPBACK_NAMES
        self._digests = [_digest(key) for key in rules.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            _check_length(headers)
            self._check_host(headers)
            self._check_origin(headers)
            scope.setdefault("state", {})["owner"] = self._check_key(headers, scope["path"])
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        name = _host_name(headers.get("host", ""))
        if name in self._hosts or (not is_loopback(self._rules.host) and _is_address(name)):
            return
        raise ApiError(
            403,
            f"this endpoint is not called {printable_line(name, limit=80)!r}; start it with"
            " --allow-host to allow the name",
            code="host_not_allowed",
        )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or {origin, "*"} & set(self._rules.allowed_origins):
            return
        # The page of the endpoint itself.
        host = headers.get("host", "").lower()
        if host and origin.lower() in (f"http://{host}", f"https://{host}"):
            return
        raise ApiError(
            403,
            f"pages of {printable_line(origin, limit=80)!r} may not call this endpoint; start it"
            " with --allow-origin to allow them",
            code="origin_not_allowed",
        )

    def _check_key(self, headers: Headers, path: str) -> str:
        """Return the owner of a request's answers."""
        if not self._digests or path in _OPEN_PATHS:
            return ""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(key)
        # All are compared, so that the time does not tell which one is near.
        if any([hmac.compare_digest(digest, known) for known in self._digests]):
            return digest
        error = ApiError(
            401,
            "the key is missing or wrong; send it as `Authorization: Bearer KEY`",
            code="invalid_api_key",
        )
        error.headers["WWW-Authenticate"] = "Bearer"
        raise error


def _check_length(headers: Headers) -> None:
    """Refuse a body with two lengths: a proxy may take its end for the next request."""
    if "transfer-encoding" in headers and "content-length" in headers:
        error = ApiError(400, "Content-Length and Transfer-Encoding exclude each other")
        error.headers["Connection"] = "close"
        raise error


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def _host_name(value: str) -> str:
    """Return the name in a Host header, without its port."""
    value = value.strip().lower()
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
