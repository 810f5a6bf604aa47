"""One HTTP request and its reply, with limits of time and size, and errors as LargeError."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from http.client import HTTPException
from typing import Final
from urllib.parse import urljoin, urlsplit

import requests
from urllib3.exceptions import HTTPError

from mlxroute.errors import LargeError, LargeProtocolError, LargeRefused, LargeUnreachable
from mlxroute.large.http import retry
from mlxroute.large.http.address import Address
from mlxroute.large.http.connections import HttpSessionPool
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.stream_listener import StreamListener
from mlxroute.ledger import Ledger
from mlxroute.safe_text import printable_line

MAX_REPLY_BYTES: Final = 1 << 20
_CHUNK_BYTES: Final = 512
# A thread whose socket was shut down ends at once; one in a name lookup does not.
_ABORT_WAIT_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class HttpReply:
    """A complete reply that is not a redirect; `retry_after_s` is 0 without a `Retry-After`."""

    status: int
    body: bytes
    retry_after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The settings that all exchanges with one server share.

    `verify` is the path of a CA bundle, or True for the public authorities.
    """

    address: Address
    sessions: HttpSessionPool
    connect_timeout_s: float
    verify: str | bool
    ledger: Ledger


class _LedgerBody:
    """A request body that is recorded in the ledger once the connection is open to send it."""

    def __init__(self, data: bytes, *, url: str, ledger: Ledger) -> None:
        self._data = data
        self._url = url
        self._ledger = ledger
        self._was_read = False

    def __len__(self) -> int:
        return len(self._data)

    def read(self, size: int = -1) -> bytes:
        """Return the whole body at the first call, whatever `size` is, and nothing later."""
        if self._was_read:
            return b""
        self._was_read = True
        self._ledger.record_request(self._url, self._data)
        return self._data


class Exchange(threading.Thread):
    """One request and its reply, in a thread of its own.

    No timeout of `requests` bounds a whole exchange: a socket timeout bounds one read, which a
    server that sends a byte per second never exceeds, and a name lookup has none. The caller waits
    for `finished` up to the deadline.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        url: str,
        *,
        body: bytes | None,
        deadline: Deadline,
        listener: StreamListener[bytes] | None = None,
    ) -> None:
        super().__init__(daemon=True, name="mlxroute-exchange")
        self._endpoint = endpoint
        self._session = endpoint.sessions.acquire()
        self._url = url
        self._body = body
        self._deadline = deadline
        self._listener = listener
        self._was_used = False
        self._reply: HttpReply | None = None
        self._error: LargeError | None = None
        self._finish_lock = threading.Lock()
        self.is_transient = False
        """Whether the exchange failed and the same request may succeed later."""
        self.finished = False

    @property
    def retry_after_s(self) -> float:
        """The seconds that the reply's `Retry-After` asks for, 0 without one."""
        return self._reply.retry_after_s if self._reply else 0.0

    def run(self) -> None:
        """Send the request and keep the outcome for `result`."""
        try:
            self._reply = self._send()
            if self._reply.status != 200:
                self.is_transient = retry.is_transient_status(self._reply.status)
        except LargeError as exc:
            self._error = exc
        except (requests.RequestException, HTTPError, HTTPException, OSError, ValueError) as exc:
            # The exception is not kept as a cause: it holds the request, which holds the key.
            self._error = self._translate(exc)
            # Tokens that the listener published cannot be retracted by a retry.
            self.is_transient = retry.is_transient_error(exc) and not self._was_used
        finally:
            with self._finish_lock:
                self.finished = True
                self._endpoint.sessions.release(self._session)
            self._deadline.wake()

    def abort(self) -> bool:
        """End the exchange without a result; return whether its thread has ended."""
        with self._finish_lock:
            # A session that was released may serve another exchange by now.
            if not self.finished:
                self._session.abort()
        self.join(_ABORT_WAIT_S)
        return not self.is_alive()

    def result(self) -> HttpReply:
        """Return the reply of a finished exchange. Raises LargeError subclasses."""
        if self._error is not None:
            raise self._error
        if self._reply is None:
            raise LargeProtocolError(f"the call to {self._base_url} ended without a result")
        return self._reply

    def timeout_error(self) -> LargeError:
        """Return the error for a reply that is not complete at the deadline."""
        return self._deadline.error(self._base_url)

    @property
    def _base_url(self) -> str:
        return self._endpoint.address.url

    def _send(self) -> HttpReply:
        endpoint, body = self._endpoint, self._body
        endpoint.ledger.raise_if_failed()
        left_s = max(self._deadline.left_s(), 0.001)
        with self._session.request(
            "GET" if body is None else "POST",
            self._url,
            data=_LedgerBody(body, url=self._url, ledger=endpoint.ledger) if body else None,
            headers={"Content-Type": "application/json"} if body else None,
            timeout=(min(endpoint.connect_timeout_s, left_s), left_s),
            allow_redirects=False,
            stream=True,
            # Set for each request: REQUESTS_CA_BUNDLE would override the session's own.
            verify=endpoint.verify,
        ) as response:
            if 300 <= response.status_code < 400:
                raise self._redirect_error(response.headers.get("Location", ""))
            retry_after = response.headers.get("Retry-After")
            return HttpReply(
                response.status_code,
                self._read(response),
                retry_after_s=retry.retry_after_s(retry_after, now_s=time.time())
                if retry_after
                else 0.0,
            )

    def _read(self, response: requests.Response) -> bytes:
        # Decompressing a body, which was not requested, could fill the memory.
        if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise LargeProtocolError(
                f"{self._base_url} sent a compressed reply, which was not requested"
            )
        body = bytearray()
        for chunk in response.iter_content(_CHUNK_BYTES):
            body += chunk
            if len(body) > MAX_REPLY_BYTES:
                raise LargeProtocolError(
                    f"the reply of {self._base_url} is longer than {MAX_REPLY_BYTES} bytes"
                )
            if not self._deadline.left_s():
                raise self.timeout_error()
            if self._listener is not None and response.status_code == 200:
                self._was_used = self._listener(bytes(body)) or self._was_used
        return bytes(body)

    def _redirect_error(self, location: str) -> LargeRefused:
        try:
            parts = urlsplit(urljoin(self._url, location))
            host = parts.netloc.rpartition("@")[2]
            path = self._url.removeprefix(self._base_url)
            target = f"{parts.scheme}://{host}{parts.path}".removesuffix(path)
        except ValueError:
            target = "an invalid URL"
        return LargeRefused(
            f"{self._base_url} redirects to {printable_line(target, limit=200)}, which is not"
            " followed; give the final address if you trust it"
        )

    def _translate(self, exc: Exception) -> LargeError:
        url = self._base_url
        match exc:
            case requests.ConnectTimeout():
                seconds = self._endpoint.connect_timeout_s
                return LargeUnreachable(
                    f"no connection to {url} in {seconds:.3g} s; is it running?"
                )
            case requests.Timeout():
                return self.timeout_error()
            case requests.exceptions.SSLError():
                reason = _system_reason(exc)
                failure = f"the TLS connection to {url} failed ({reason})"
                if "CERTIFICATE" not in reason:
                    return LargeUnreachable(failure)
                return LargeUnreachable(
                    f"{failure}; ca_bundle can name a private authority", parameter="ca_bundle"
                )
            case requests.exceptions.ProxyError():
                return LargeUnreachable(f"the proxy for {url} refused or failed")
            case requests.exceptions.ChunkedEncodingError():
                return LargeUnreachable(f"the connection to {url} broke in mid-reply")
            case requests.ConnectionError():
                if not self._deadline.left_s():
                    return self.timeout_error()
                return LargeUnreachable(f"no connection to {url} ({_system_reason(exc)})")
            case _:
                return LargeProtocolError(f"the call to {url} failed ({type(exc).__name__})")


def _system_reason(exc: BaseException) -> str:
    """Return the text of the innermost system error, without addresses and object names."""
    reason = "the server closed it"
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            reason = cause.strerror
        cause = cause.__cause__ or cause.__context__
    return printable_line(reason, limit=120)
