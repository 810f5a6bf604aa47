"""The one place that speaks HTTP: bounded in time and size, errors translated."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Final
from urllib.parse import urljoin, urlsplit

import requests
from urllib3.exceptions import HTTPError

from mlxroute.errors import (
    LargeError,
    LargeProtocolError,
    LargeRefused,
    LargeUnavailable,
    LargeUnreachable,
)
from mlxroute.large.http import retry
from mlxroute.large.http.address import Address
from mlxroute.large.http.connections import Auth, HttpSessionPool, check_ca_bundle
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.stream_listener import StreamListener
from mlxroute.ledger import Ledger
from mlxroute.safe_text import printable_line

MAX_REPLY_BYTES: Final = 1 << 20
# Calls whose threads could not be ended: only a name look-up or a proxy can hold one for long.
MAX_HANGING: Final = 4
_CHUNK_BYTES = 512
# A thread whose socket was shut down ends at once; one in a name look-up does not.
_ENDING_S = 0.25


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete HTTP reply that is no redirect. `retry_after_s` is 0 where it does not say."""

    status: int
    body: bytes
    retry_after_s: float = 0.0


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
        self._ledger.record_request(self._url, self._data)
        return self._data


class Exchange(threading.Thread):
    """One request and its reply, in a thread so that nothing the server does can hold the caller.

    A socket timeout bounds one read, not a reply of a byte a second, nor a slow name look-up.
    """

    def __init__(  # noqa: PLR0913 - what one request needs
        self,
        sessions: HttpSessionPool,
        *,
        address: Address,
        target: str,
        body: bytes | None,
        deadline: Deadline,
        connect_timeout_s: float,
        verify: str | bool,
        ledger: Ledger,
        listener: StreamListener[bytes] | None = None,
    ) -> None:
        super().__init__(daemon=True, name="mlxroute-large")
        self._sessions = sessions
        self._session = sessions.lend()
        self._address = address
        self._target = target
        self._body = body
        self._deadline = deadline
        self._connect_timeout_s = connect_timeout_s
        self._verify = verify
        self._ledger = ledger
        self._listener = listener
        self._was_used = False
        self._reply: Reply | None = None
        self._error: LargeError | None = None
        self._passing = False
        self._ending = threading.Lock()
        self.finished = False

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed in a moment."""
        return self._passing

    @property
    def retry_after_s(self) -> float:
        """The seconds the server wants to be left alone, 0 when it did not say."""
        return self._reply.retry_after_s if self._reply else 0.0

    def run(self) -> None:
        """Exchange, keeping the outcome for `result`."""
        try:
            self._reply = self._exchange()
            self._passing = retry.is_transient_status(self._reply.status)
        except LargeError as exc:
            self._error = exc
        except (requests.RequestException, HTTPError, HTTPException, OSError, ValueError) as exc:
            # Not kept as a cause: it holds the request, and that holds the key.
            self._error = self._translated(exc)
            # The listener cannot take back what it used.
            self._passing = retry.is_transient_error(exc) and not self._was_used
        finally:
            with self._ending:
                self.finished = True
                self._sessions.take_back(self._session)
            self._deadline.wake()

    def break_off(self) -> bool:
        """End it without a result, whatever it waits for; whether its thread has ended, too."""
        with self._ending:
            # A session that was taken back may serve another exchange by now.
            if not self.finished:
                self._session.break_off()
        self.join(_ENDING_S)
        return not self.is_alive()

    def result(self) -> Reply:
        """The reply of a finished exchange. Raises LargeError subclasses."""
        if self._error is not None:
            raise self._error
        if self._reply is None:
            raise LargeProtocolError(f"the call to {self._address.url} ended without a result")
        return self._reply

    def _exchange(self) -> Reply:
        self._ledger.raise_if_failed()
        left_s = max(self._deadline.left_s(), 0.001)
        with self._session.request(
            "GET" if self._body is None else "POST",
            self._target,
            data=_Body(self._body, url=self._target, ledger=self._ledger) if self._body else None,
            headers={"Content-Type": "application/json"} if self._body else None,
            timeout=(min(self._connect_timeout_s, left_s), left_s),
            allow_redirects=False,
            stream=True,
            # Named for each request: a session's own would yield to REQUESTS_CA_BUNDLE.
            verify=self._verify,
        ) as response:
            if 300 <= response.status_code < 400:
                raise self._redirected(response.headers.get("Location", ""))
            asked = response.headers.get("Retry-After")
            return Reply(
                response.status_code,
                self._read(response),
                retry_after_s=retry.retry_after_s(asked, now=time.time()),
            )

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
            if self._listener is not None and response.status_code == 200:
                self._was_used = self._listener(bytes(body)) or self._was_used
        return bytes(body)

    def too_late(self) -> LargeError:
        """The error for a reply that is not complete at the deadline."""
        return self._deadline.error(self._address.url)

    def _redirected(self, location: str) -> LargeRefused:
        try:
            parts = urlsplit(urljoin(self._target, location))
            host = parts.netloc.rpartition("@")[2]
            path = self._target.removeprefix(self._address.url)
            target = f"{parts.scheme}://{host}{parts.path}".removesuffix(path)
        except ValueError:
            target = "an address that is no URL"
        return LargeRefused(
            f"{self._address.url} redirects to {printable_line(target, limit=200)}, which is not"
            " followed; give the final address if you trust it"
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
                reason = _reason(exc)
                own = "; --ca-bundle names a private authority" if "CERTIFICATE" in reason else ""
                return LargeUnreachable(f"the TLS connection to {url} failed ({reason}){own}")
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
    """Keeps the connections to one server and repeats what failed in passing.

    Safe for several threads.
    """

    def __init__(
        self,
        address: Address,
        *,
        api_key: str | None = None,
        connect_timeout_s: float = 5.0,
        ca_bundle: Path | None = None,
        ledger: Ledger | None = None,
        sleep: Callable[[float], None] | None = None,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._address = address
        self._auth = Auth(address, api_key)
        self._connect_timeout_s = connect_timeout_s
        self._verify = True if ca_bundle is None else check_ca_bundle(ca_bundle)
        self._sleep = sleep
        self._random = random
        self._ledger = Ledger() if ledger is None else ledger
        for secret in (api_key, address.userinfo and address.userinfo[1]):
            self._ledger.add_secret(secret)
        self._sessions = HttpSessionPool(address, self._auth)
        self._lock = threading.Lock()
        self._given_up: list[Exchange] = []

    def call(
        self,
        path: str,
        *,
        deadline: Deadline,
        body: bytes | None = None,
        at_root: bool = False,
        listener: StreamListener[bytes] | None = None,
    ) -> Reply:
        """GET a path below the base address, or POST a JSON body to it. Raises LargeError.

        With `at_root` the path is that of the server, whatever the base address ends in. Attempts
        that fail in passing are repeated as long as the deadline leaves room, unless `listener`
        has used one.
        """
        target = (self._address.root if at_root else self._address.url) + path
        for pause_s in retry.pauses_s(self._random):
            left_s = deadline.left_s()
            exchange = self._attempt(target, deadline=deadline, body=body, listener=listener)
            pause_s = max(pause_s, exchange.retry_after_s)
            if not exchange.passing or pause_s >= deadline.left_s():
                return exchange.result()
            (self._sleep or deadline.pause)(pause_s)
            deadline.lost_s += left_s - deadline.left_s()
        return self._attempt(target, deadline=deadline, body=body, listener=listener).result()

    def begin(
        self,
        target: str,
        *,
        deadline: Deadline,
        body: bytes | None = None,
        listener: StreamListener[bytes] | None = None,
    ) -> Exchange:
        """Send one request and return without waiting for its reply."""
        exchange = Exchange(
            self._sessions,
            address=self._address,
            target=target,
            body=body,
            deadline=deadline,
            connect_timeout_s=self._connect_timeout_s,
            verify=self._verify,
            ledger=self._ledger,
            listener=listener,
        )
        exchange.start()
        return exchange

    def without_secrets(self, text: str) -> str:
        """A server's text without the key or password that it may echo."""
        return self._auth.hidden_in(text)

    def close(self) -> None:
        """End every call and close the connections; a later call opens a new one."""
        self._sessions.close()

    def _attempt(
        self,
        target: str,
        *,
        deadline: Deadline,
        body: bytes | None,
        listener: StreamListener[bytes] | None,
    ) -> Exchange:
        """One finished exchange. Raises LargeTimeout at the deadline."""
        self._check_given_up()
        exchange = self.begin(target, deadline=deadline, body=body, listener=listener)
        try:
            deadline.wait_for(lambda: exchange.finished)
        finally:
            unfinished = not exchange.finished
            # The late reply must never be read, nor its thread outlive the call.
            if unfinished and not exchange.break_off():
                with self._lock:
                    self._given_up.append(exchange)
        if unfinished:
            raise exchange.too_late()
        exchange.join()
        return exchange

    def _check_given_up(self) -> None:
        with self._lock:
            self._given_up = [exchange for exchange in self._given_up if exchange.is_alive()]
            if len(self._given_up) < MAX_HANGING:
                return
        raise LargeUnavailable(
            f"{self._address.url} is not asked while {MAX_HANGING} earlier calls still hang"
        )


def _reason(exc: BaseException) -> str:
    # The innermost system error says it best; the outer texts repeat addresses and object names.
    reason = "the server closed it"
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            reason = cause.strerror
        cause = cause.__cause__ or cause.__context__
    return printable_line(reason, limit=120)
