"""What a request must pass before it is read: the Host header, its origin, and its key."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mlxroute.config.client_keys import SHORTEST_KEY, UNSENDABLE
from mlxroute.config.server_key import is_key
from mlxroute.errors import UsageError
from mlxroute.safe_text import printable_line
from mlxroute.serving.http.api_error import ApiError
from mlxroute.serving.http.metrics import OTHER_ROUTE, count_request

# They hold no data of users: the page, and whether the endpoint is ready.
_OPEN_PATHS: Final = frozenset({"/", "/health", "/favicon.ico"})
_LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_HOST: Final = re.compile(r"[a-z0-9._-]+(?::\d+)?|\[[0-9a-f:.]+\](?::\d+)?")
_ORIGIN: Final = re.compile(r"([a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+?)/?")
# Browsers leave them out of an origin.
_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}


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
        keys: The keys of its clients, each of at least 16 ASCII characters. None by default: every
            client on this machine may use it.
        allowed_hosts: Further names by which clients may call it, on any port. None by default.
        allowed_origins: Origins of web pages that may call it; "*" for all. None by default.

    Raises UsageError for a key that is too short or that not every client can send, for a name or
    an origin that no request can have, and for one text in place of several.
    """

    host: str = "127.0.0.1"
    keys: Sequence[str] = field(default=(), repr=False)
    allowed_hosts: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the keys; bring names and origins into the form in which requests have them."""
        for name in ("keys", "allowed_hosts", "allowed_origins"):
            # Each of its characters would be a key or a name.
            if isinstance(getattr(self, name), str):
                raise UsageError(f"{name} must be a list of texts, not one text", parameter=name)
        object.__setattr__(self, "keys", tuple(self.keys))
        if any(len(key) < SHORTEST_KEY for key in self.keys):
            raise UsageError(
                f"keys has a key of fewer than {SHORTEST_KEY} characters; `openssl rand -hex 24`"
                " prints a good one",
                parameter="keys",
            )
        if not all(map(is_key, self.keys)):
            raise UsageError(f"keys has a key {UNSENDABLE}", parameter="keys")
        object.__setattr__(self, "allowed_hosts", tuple(map(_allowed_host, self.allowed_hosts)))
        origins = tuple(map(_allowed_origin, self.allowed_origins))
        object.__setattr__(self, "allowed_origins", origins)


class Guard:
    """Refuses requests that the rules do not allow, and notes the owner of the others.

    The Host header is checked because a web page can give its own name this machine's address;
    the Origin header because a page may send requests whose replies it cannot read.
    """

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app = app
        self._rules = rules
        # An address for all networks, and often a name, is reached as localhost too.
        self._hosts = {*rules.allowed_hosts, rules.host.lower(), *_LOOPBACK_NAMES}
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
            count_request(scope["app"], OTHER_ROUTE, error.status)
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        name = _host_name(headers.get("host", ""))
        if name in self._hosts or (not is_loopback(self._rules.host) and _is_address(name)):
            return
        if not name:
            raise ApiError(403, "the request has no Host header", code="host_not_allowed")
        raise ApiError(
            403,
            f"this endpoint is not called {printable_line(name, limit=80)!r}; allow the name with"
            " `serve --allow-host`, or with `allowed_hosts` in a library",
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
            f"pages of {printable_line(origin, limit=80)!r} may not call this endpoint; allow them"
            " with `serve --allow-origin`, or with `allowed_origins` in a library",
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


def _allowed_host(value: str) -> str:
    """Return a name as `_host_name` returns it. Raises UsageError."""
    host = value.strip().lower()
    if _is_address(host):
        return host
    if _HOST.fullmatch(host) is None:
        raise UsageError(
            "allow_host must be a host name, such as mymac.local, not"
            f" {printable_line(value, limit=80)!r}",
            parameter="allow_host",
        )
    return _host_name(host)


def _allowed_origin(value: str) -> str:
    """Return an origin as browsers write it. Raises UsageError."""
    origin = value.strip().lower()
    if origin in ("*", "null"):
        return origin
    match = _ORIGIN.fullmatch(origin)
    if match is None:
        raise UsageError(
            "allow_origin must be a scheme and a host, such as http://localhost:3000, not"
            f" {printable_line(value, limit=80)!r}",
            parameter="allow_origin",
        )
    scheme = match[1].partition(":")[0]
    return match[1].removesuffix(_DEFAULT_PORTS.get(scheme, ""))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
