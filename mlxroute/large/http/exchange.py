"""One HTTP request and its reply, with limits of time and size, and errors as LargeError."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import BadStatusLine, HTTPException, IncompleteRead
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
    LargeUnreadable,
)
from mlxroute.large.http import retry
from mlxroute.large.http.address import Address
from mlxroute.large.http.connections import HttpSessionPool
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.proxy import describe_proxy, find_proxy, proxy_problem
from mlxroute.large.http.stream_listener import StreamListener
from mlxroute.ledger import Ledger
from mlxroute.safe_text import printable_line

MAX_REPLY_BYTES: Final = 1 << 20
# Thousands of tokens, each with 20 alternatives; less than MAX_WIRE_BYTES.
_MAX_WHOLE_ANSWER_BYTES: Final = 6 << 20
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


class _Body:
    """A request body that calls `on_send` once the connection is open to send it."""

    def __init__(self, data: bytes, on_send: Callable[[bytes], None]) -> None:
        self._data = data
        self._on_send = on_send
        self._was_read = False

    def __len__(self) -> int:
        return len(self._data)

    def read(self, size: int = -1) -> bytes:
        """Return the whole body at the first call, whatever `size` is, and nothing later."""
        if self._was_read:
            return b""
        self._was_read = True
        self._on_send(self._data)
        return self._data


class _Claim:
    """The right of one of two equal exchanges to use its reply: of the first that gets one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.owner: Exchange | None = None
        self.claimed_s = 0.0

    def take(self, exchange: Exchange) -> bool:
        """Claim the right; return whether the exchange has it."""
        with self._lock:
            if self.owner is None:
                self.owner = exchange
                self.claimed_s = time.monotonic()
            return self.owner is exchange


class Exchange(threading.Thread):
    """One request and its reply, in a thread of its own.

    A backup request repeats `backup_of`, whose connection may be dead: it opens a new connection,
    and the reply that begins first is used. With `fresh` no used connection is taken either. A
    `whole_answer` begins when it is complete; its exchange has a new connection, closed after it,
    and is not transient if the server may still be writing it.

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
        backup_of: Exchange | None = None,
        fresh: bool = False,
        whole_answer: bool = False,
    ) -> None:
        super().__init__(daemon=True, name="mlxroute-exchange")
        self._endpoint = endpoint
        self.is_whole_answer = whole_answer
        is_fresh = fresh or backup_of is not None
        sessions = endpoint.sessions
        self._session = sessions.create() if whole_answer else sessions.acquire(fresh=is_fresh)
        self._connections_before = self._session.connection_count
        self._began_s = time.monotonic()
        self._claim: _Claim = _Claim() if backup_of is None else backup_of._claim
        self._url = url
        self._body = body
        self._deadline = deadline
        self._listener = listener
        self._was_used = self._was_sent = False
        self._reply: HttpReply | None = None
        self._error: LargeError | None = None
        self._finish_lock = threading.Lock()
        self.is_transient = False
        """Whether the exchange failed and the same request may succeed later."""
        self.finished = False

    @property
    def reuses_connection(self) -> bool:
        """Whether the request went over a connection that was opened for an earlier one."""
        opened = self._session.connection_count - self._connections_before
        return self._connections_before > 0 and not opened

    @property
    def has_reply(self) -> bool:
        """Whether the reply has begun."""
        return self._claim.owner is self

    @property
    def reply_began_s(self) -> float:
        """Seconds from the start until the reply began; 0 without a reply."""
        return self._claim.claimed_s - self._began_s if self.has_reply else 0.0

    @property
    def is_loading(self) -> bool:
        """Whether the server says that it is loading its model."""
        reply = self._reply
        return reply is not None and reply.status == 503 and b"loading" in reply.body.lower()

    @property
    def retry_after_s(self) -> float:
        """The seconds that the reply's `Retry-After` asks for, 0 without one."""
        return self._reply.retry_after_s if self._reply else 0.0

    def run(self) -> None:
        """Send the request and keep the outcome for `result`."""
        try:
            self._reply = self._send()
            if self._reply.status != 200:
                self.is_transient = retry.is_transient_status(
                    self._reply.status, whole_answer=self.is_whole_answer
                )
        except LargeError as exc:
            # Its traceback would keep the reply, and so the connection, open.
            self._error = exc.with_traceback(None)
        except (requests.RequestException, HTTPError, HTTPException, OSError, ValueError) as exc:
            # The exception is not kept as a cause: it holds the request, which holds the key.
            self._error = self._translate(exc)
            # Tokens that the listener published cannot be retracted by a retry.
            may_repeat = not (self._was_used or (self.is_whole_answer and self._was_sent))
            self.is_transient = retry.is_transient_error(exc) and may_repeat
        finally:
            with self._finish_lock:
                self.finished = True
                # A client that was closed meanwhile closes no connection that is released later.
                if self.is_whole_answer or self._deadline.cancelled:
                    self._session.abort()
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

    def deadline_error(self) -> LargeError:
        """Return the error for a reply that is not complete at the deadline."""
        return self._deadline.error(self._base_url)

    @property
    def _base_url(self) -> str:
        return self._endpoint.address.url

    def _send(self) -> HttpReply:
        endpoint = self._endpoint
        request_body = self._body
        endpoint.ledger.raise_if_failed()
        if not self._connections_before:
            self._check_proxy()
        left_s = max(self._deadline.left_s(), 0.001)
        with self._session.request(
            "GET" if request_body is None else "POST",
            self._url,
            data=_Body(request_body, self._on_send) if request_body else None,
            headers={"Content-Type": "application/json"} if request_body else None,
            timeout=(min(endpoint.connect_timeout_s, left_s), left_s),
            allow_redirects=False,
            stream=True,
            # Set for each request: REQUESTS_CA_BUNDLE would override the session's own.
            verify=endpoint.verify,
        ) as response:
            if not self._claim.take(self):
                raise LargeUnavailable(f"another connection to {self._base_url} answered first")
            # A variable of this frame would show the address, and a key in it, in a traceback.
            if 300 <= response.status_code < 400 and response.headers.get("Location"):
                raise self._redirect_error(response)
            status = response.status_code
            reply_body = self._read(response)
            pause_s = retry.asked_pause_s(
                response.headers, b"" if status == 200 else reply_body, now_s=time.time()
            )
            return HttpReply(status, reply_body, retry_after_s=pause_s)

    def _on_send(self, body: bytes) -> None:
        self._endpoint.ledger.record_request(self._url, body)
        self._was_sent = True

    def _check_proxy(self) -> None:
        """Raise LargeUnreachable for a proxy that cannot be used."""
        proxy = find_proxy(self._endpoint.address)
        if proxy is not None and (problem := proxy_problem(proxy)) is not None:
            raise LargeUnreachable(problem)

    def _read(self, response: requests.Response) -> bytes:
        # Decompressing a body, which was not requested, could fill the memory.
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in ("", "identity"):
            raise LargeUnreadable(
                f"{self._base_url} sent a compressed reply, which was not requested"
            )
        limit = _MAX_WHOLE_ANSWER_BYTES if self.is_whole_answer else MAX_REPLY_BYTES
        body = bytearray()
        for chunk in response.iter_content(_CHUNK_BYTES):
            body += chunk
            if len(body) > limit:
                raise LargeUnreadable(f"the reply of {self._base_url} is longer than {limit} bytes")
            if not self._deadline.left_s():
                raise self.deadline_error()
            # Events end with a line.
            may_publish = b"\n" in chunk and response.status_code == 200
            if self._listener is not None and may_publish:
                self._was_used = self._listener(bytes(body)) or self._was_used
        return bytes(body)

    def _redirect_error(self, response: requests.Response) -> LargeRefused:
        try:
            parts = urlsplit(urljoin(self._url, response.headers["Location"]))
            host = parts.netloc.rpartition("@")[2]
            path = self._url.removeprefix(self._base_url)
            target = f"{parts.scheme}://{host}{parts.path}".removesuffix(path)
        except ValueError:
            target = "an invalid URL"
        target = self._endpoint.ledger.secrets.redact(target)
        return LargeRefused(
            f"{self._base_url} redirects to {printable_line(target, limit=200)}, which is not"
            " followed; give the final address if you trust it"
        )

    def _translate(self, exc: Exception) -> LargeError:
        url = self._base_url
        if self._deadline.cancelled:
            return self.deadline_error()
        match exc:
            case requests.Timeout():
                return self._socket_timeout_error()
            case requests.exceptions.SSLError():
                return self._tls_error(_system_reason(exc))
            case requests.exceptions.ProxyError():
                return LargeUnreachable(self._proxy_failure(exc))
            case requests.exceptions.ChunkedEncodingError():
                return LargeUnreachable(f"the connection to {url} broke in mid-reply")
            case requests.ConnectionError() if not _is_invalid_http(exc):
                if not self._deadline.left_s():
                    return self.deadline_error()
                return LargeUnreachable(f"no connection to {self._route} ({_system_reason(exc)})")
            case requests.exceptions.InvalidURL() | requests.exceptions.InvalidSchema():
                return LargeUnreachable(f"the address {url} cannot be called")
            case _:
                return LargeUnreadable(f"{self._route} sent no valid HTTP reply")

    def _socket_timeout_error(self) -> LargeError:
        """Return the error for a socket's timeout: of the reply, or of opening the connection."""
        # The handshake of TLS and that with a proxy belong to opening a connection.
        if not self._deadline.left_s():
            return self.deadline_error()
        seconds = self._endpoint.connect_timeout_s
        return LargeUnreachable(
            f"no connection to {self._route} in {seconds:.3g} s; is it running?"
        )

    def _tls_error(self, reason: str) -> LargeUnreachable:
        failure = f"the TLS connection to {self._base_url} failed ({reason})"
        if "CERTIFICATE" in reason:
            advice = "ca_bundle can name a private authority"
            if isinstance(self._endpoint.verify, str):
                advice = f"only the authorities in {self._endpoint.verify} are trusted"
            return LargeUnreachable(f"{failure}; {advice}", parameter="ca_bundle")
        if "WRONG_VERSION" in reason:
            failure += "; the address of a server without TLS begins with http://"
        return LargeUnreachable(failure)

    @property
    def _route(self) -> str:
        """The server's address, and the proxy on the way to it."""
        proxy = find_proxy(self._endpoint.address)
        way = "" if proxy is None else f" through the proxy {describe_proxy(proxy)}"
        return f"{self._base_url}{way}"

    def _proxy_failure(self, exc: BaseException) -> str:
        proxy = find_proxy(self._endpoint.address)
        name = "the proxy" if proxy is None else f"the proxy {describe_proxy(proxy)}"
        # The proxy's refusal of a tunnel has a text of its own, such as "Tunnel connection failed".
        reason = _system_reason(exc, default="it closed the connection")
        texts = [str(cause) for cause in retry.causes(exc) if isinstance(cause, OSError)]
        refusals = [re.search(r"failed: ([0-9]{3})", text) for text in texts]
        status = next((match[1] for match in refusals if match), None)
        if status is not None:
            reason = f"it answered {status}" + ("; check its password" if status == "407" else "")
        return f"{name} for {self._base_url} failed ({reason})"


def _is_invalid_http(exc: BaseException) -> bool:
    """Return whether bytes arrived that are not HTTP, unlike where the connection was lost."""
    for cause in retry.causes(exc):
        if isinstance(cause, BadStatusLine) and (line := str(cause.args[0])).startswith("HTTP/"):
            # A line without an end was cut off.
            return line.endswith("\n")
        if isinstance(cause, HTTPException):
            return not isinstance(cause, ConnectionError | IncompleteRead)
    return False


def _system_reason(exc: BaseException, *, default: str = "the server closed it") -> str:
    """Return the text of the innermost system error, without addresses and object names."""
    reason = default
    for cause in retry.causes(exc):
        if isinstance(cause, OSError) and cause.strerror:
            reason = cause.strerror
    return printable_line(reason, limit=120)
