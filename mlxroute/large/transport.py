"""The one place that speaks HTTP: bounded in time and size, errors translated."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from http.cookiejar import DefaultCookiePolicy
from typing import Final
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase, HTTPBasicAuth
from urllib3.exceptions import HTTPError

from mlxroute._version import __version__
from mlxroute.errors import (
    LargeError,
    LargeProtocolError,
    LargeRefused,
    LargeTimeout,
    LargeUnreachable,
    UsageError,
)
from mlxroute.large.address import Address
from mlxroute.ledger import Ledger

MAX_REPLY_BYTES: Final = 1 << 20
_CHUNK_BYTES = 512


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete HTTP reply that is no redirect."""

    status: int
    body: bytes


class Deadline:
    """A moment after which a call is given up."""

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds

    def left_s(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._end - self._clock())


class _Auth(AuthBase):
    # Always set, so that requests never looks for credentials in a netrc file.
    def __init__(self, address: Address, api_key: str | None) -> None:
        self._basic = _basic_auth(*address.userinfo) if address.userinfo else None
        self._api_key = api_key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._api_key is not None:
            request.headers["Authorization"] = f"Bearer {self._api_key}"
        elif self._basic is not None:
            self._basic(request)
        return request


def _basic_auth(user: str, password: str) -> HTTPBasicAuth:
    # As bytes: requests would encode text as Latin-1, which not every name has.
    return HTTPBasicAuth(user.encode(), password.encode())


class _Session(requests.Session):
    # Even when told not to follow, requests reads a redirect's whole body and parses its target.
    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


class _Body:
    """A request's body, recorded when the connection is there to send it and not before."""

    def __init__(self, data: bytes, *, url: str, ledger: Ledger) -> None:
        self._data = data
        self._url = url
        self._ledger = ledger
        self._read = False

    def __len__(self) -> int:
        return len(self._data)

    def read(self, size: int = -1) -> bytes:
        """All of it at the first call, whatever the size: it is in memory anyway."""
        if self._read:
            return b""
        self._read = True
        self._ledger.sent(self._url, self._data)
        return self._data


class Exchange(threading.Thread):
    """One request and its reply, in a thread so that nothing the server does can hold the caller.

    A socket timeout bounds one read, not a reply of a byte a second, nor a slow name look-up.
    """

    def __init__(
        self,
        session: requests.Session,
        *,
        address: Address,
        target: str,
        body: bytes | None,
        deadline: Deadline,
        connect_timeout_s: float,
        ledger: Ledger,
    ) -> None:
        super().__init__(daemon=True, name="mlxroute-large")
        self._session = session
        self._address = address
        self._target = target
        self._body = body
        self._deadline = deadline
        self._connect_timeout_s = connect_timeout_s
        self._ledger = ledger
        self._reply: Reply | None = None
        self._error: LargeError | None = None

    def run(self) -> None:
        """Exchange, keeping the outcome for `result`."""
        try:
            self._reply = self._exchange()
        except LargeError as exc:
            self._error = exc

    def result(self) -> Reply:
        """The reply of a finished exchange. Raises LargeError subclasses."""
        if self._error is not None:
            raise self._error
        if self._reply is None:
            raise LargeProtocolError(f"the call to {self._address.url} ended without a result")
        return self._reply

    def _exchange(self) -> Reply:
        self._ledger.check()
        left_s = max(self._deadline.left_s(), 0.001)
        try:
            with self._session.request(
                "GET" if self._body is None else "POST",
                self._target,
                data=_Body(self._body, url=self._target, ledger=self._ledger)
                if self._body
                else None,
                headers={"Content-Type": "application/json"} if self._body else None,
                timeout=(min(self._connect_timeout_s, left_s), left_s),
                allow_redirects=False,
                stream=True,
            ) as response:
                if 300 <= response.status_code < 400:
                    raise self._redirected(response.headers.get("Location", ""))
                return Reply(response.status_code, self._read(response))
        except (requests.RequestException, HTTPError, HTTPException, OSError, ValueError) as exc:
            raise self._translated(exc) from exc

    def _read(self, response: requests.Response) -> bytes:
        # We ask for none; decompressing what we did not ask for could fill the memory.
        if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise LargeProtocolError(f"{self._address.url} sent a compressed reply unasked")
        body = bytearray()
        for chunk in response.iter_content(_CHUNK_BYTES):
            body += chunk
            if len(body) > MAX_REPLY_BYTES:
                raise LargeProtocolError(
                    f"the reply of {self._address.url} is longer than {MAX_REPLY_BYTES} bytes"
                )
            if not self._deadline.left_s():
                raise self.too_late()
        return bytes(body)

    def too_late(self) -> LargeTimeout:
        """The error for a reply that is not complete at the deadline."""
        return LargeTimeout(
            f"no full reply from {self._address.url} in {self._deadline.seconds:.3g} s"
        )

    def _redirected(self, location: str) -> LargeRefused:
        try:
            target = urlsplit(location).hostname or self._address.host
        except ValueError:
            target = "an address that is no URL"
        return LargeRefused(
            f"{self._address.url} redirects to {printable(target)}, which is not followed;"
            " give the final address if you trust it"
        )

    def _translated(self, exc: Exception) -> LargeError:
        url = self._address.url
        match exc:
            case requests.ConnectTimeout():
                return LargeUnreachable(
                    f"no connection to {url} in {self._connect_timeout_s:.3g} s; is it running?"
                )
            case requests.Timeout():
                return self.too_late()
            case requests.exceptions.SSLError():
                return LargeUnreachable(f"the TLS connection to {url} failed ({_reason(exc)})")
            case requests.exceptions.ProxyError():
                return LargeUnreachable(f"the proxy for {url} refused or failed")
            case requests.exceptions.ChunkedEncodingError():
                return LargeUnreachable(f"the connection to {url} broke in mid-reply")
            case requests.ConnectionError():
                if not self._deadline.left_s():
                    return self.too_late()
                return LargeUnreachable(f"no connection to {url} ({_reason(exc)})")
            case _:
                return LargeProtocolError(f"the call to {url} failed ({type(exc).__name__})")


class Transport:
    """Keeps the connection to one server."""

    def __init__(
        self,
        address: Address,
        *,
        api_key: str | None = None,
        connect_timeout_s: float = 5.0,
        ledger: Ledger | None = None,
    ) -> None:
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise UsageError("the API key has characters that cannot be sent (a line break?)")
        self._address = address
        self._auth = _Auth(address, api_key)
        self._connect_timeout_s = connect_timeout_s
        self._ledger = Ledger() if ledger is None else ledger
        for secret in (api_key, address.userinfo and address.userinfo[1]):
            self._ledger.hide(secret)
        self._session = self._new_session()

    def call(
        self, path: str, *, deadline: Deadline, body: bytes | None = None, at_root: bool = False
    ) -> Reply:
        """GET a path below the base address, or POST a JSON body to it. Raises LargeError.

        With `at_root` the path is that of the server, whatever the base address ends in.
        """
        exchange = self.begin(path, deadline=deadline, body=body, at_root=at_root)
        try:
            exchange.join(deadline.left_s())
        finally:
            unfinished = exchange.is_alive()
            if unfinished:
                self._drop_connection()
        if unfinished:
            raise exchange.too_late()
        return exchange.result()

    def begin(
        self, path: str, *, deadline: Deadline, body: bytes | None = None, at_root: bool = False
    ) -> Exchange:
        """Start what `call` does and return without waiting for it."""
        exchange = Exchange(
            self._session,
            address=self._address,
            target=(self._address.root if at_root else self._address.url) + path,
            body=body,
            deadline=deadline,
            connect_timeout_s=self._connect_timeout_s,
            ledger=self._ledger,
        )
        exchange.start()
        return exchange

    def close(self) -> None:
        """Close the connection."""
        self._session.close()

    def _drop_connection(self) -> None:
        # The late reply of the call we gave up must never be read as the next one's.
        self._session.close()
        self._session = self._new_session()

    def _new_session(self) -> requests.Session:
        session = _Session()
        session.headers.update(
            {
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "User-Agent": f"mlxroute/{__version__}",
            }
        )
        session.auth = self._auth
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        # A proxy meant for the outside cannot reach a server on this machine.
        session.trust_env = not self._address.is_loopback
        return session


def printable(text: str, *, limit: int = 300) -> str:
    """Text of a server made fit for one line of a terminal."""
    line = "".join(c if c.isprintable() else " " for c in text)
    line = re.sub(r"\s+", " ", line).strip()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _reason(exc: BaseException) -> str:
    # The innermost system error says it best; the outer texts repeat addresses and object names.
    reason = "the server closed it"
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            reason = cause.strerror
        cause = cause.__cause__ or cause.__context__
    return printable(reason, limit=120)
