"""HTTP calls to one server, with retries of transient failures up to a deadline."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from mlxroute.errors import LargeUnavailable
from mlxroute.large.http import retry
from mlxroute.large.http.address import Address
from mlxroute.large.http.connections import Auth, HttpSessionPool, check_ca_bundle
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.exchange import Endpoint, Exchange, HttpReply
from mlxroute.large.http.stream_listener import StreamListener
from mlxroute.ledger import Ledger

# Exchanges whose threads may outlive their calls: a name lookup or a proxy can block a thread.
MAX_HANGING: Final = 4


class Transport:
    """The connections to one server; retries transient failures. Safe for several threads."""

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
        self._sleep = sleep
        self._random = random
        ledger = Ledger() if ledger is None else ledger
        for secret in (api_key, address.userinfo and address.userinfo[1]):
            ledger.add_secret(secret)
        self._endpoint = Endpoint(
            address,
            HttpSessionPool(address, self._auth),
            connect_timeout_s=connect_timeout_s,
            verify=True if ca_bundle is None else check_ca_bundle(ca_bundle),
            ledger=ledger,
        )
        self._lock = threading.Lock()
        self._hanging: list[Exchange] = []

    def call(
        self,
        path: str,
        *,
        deadline: Deadline,
        body: bytes | None = None,
        at_root: bool = False,
        listener: StreamListener[bytes] | None = None,
    ) -> HttpReply:
        """GET a path below the base address, or POST `body` to it. Raises LargeError.

        With `at_root` the path is below the server's root, whatever path the base address has.
        Transient failures are retried while the deadline leaves time, unless `listener` has used
        part of a reply; it is called from another thread.
        """
        url = (self._address.root if at_root else self._address.url) + path
        attempt = partial(self._attempt, url, deadline=deadline, body=body, listener=listener)
        left_s = deadline.left_s()
        exchange = attempt()
        if exchange.is_transient:
            exchange = retry.retry_transient(
                exchange,
                attempt,
                deadline,
                left_s=left_s,
                sleep=self._sleep or deadline.pause,
                random=self._random,
            )
        return exchange.result()

    def begin(
        self,
        url: str,
        *,
        deadline: Deadline,
        body: bytes | None = None,
        listener: StreamListener[bytes] | None = None,
    ) -> Exchange:
        """Send one request and return without waiting for its reply."""
        exchange = Exchange(self._endpoint, url, body=body, deadline=deadline, listener=listener)
        exchange.start()
        return exchange

    def redact(self, text: str) -> str:
        """Replace the key or password in a server's text, which may echo it."""
        return self._auth.redact(text)

    def close(self) -> None:
        """End every exchange and close the connections; a later call opens new ones."""
        self._endpoint.sessions.close()

    def _attempt(
        self,
        url: str,
        *,
        deadline: Deadline,
        body: bytes | None,
        listener: StreamListener[bytes] | None,
    ) -> Exchange:
        """Return a finished exchange. Raises LargeTimeout at the deadline."""
        self._check_hanging()
        exchange = self.begin(url, deadline=deadline, body=body, listener=listener)
        try:
            deadline.wait_for(lambda: exchange.finished)
        finally:
            unfinished = not exchange.finished
            # A late reply must not be read, and the thread should not outlive the call.
            if unfinished and not exchange.abort():
                with self._lock:
                    self._hanging.append(exchange)
        if unfinished:
            raise exchange.timeout_error()
        exchange.join()
        return exchange

    def _check_hanging(self) -> None:
        with self._lock:
            self._hanging = [exchange for exchange in self._hanging if exchange.is_alive()]
            if len(self._hanging) < MAX_HANGING:
                return
        raise LargeUnavailable(
            f"no call to {self._address.url}: {MAX_HANGING} earlier calls still hang"
        )
