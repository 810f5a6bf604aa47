"""HTTP calls to one server, with retries of transient failures up to a deadline."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from mlxroute.errors import LargeUnavailable, UsageError
from mlxroute.large.http import retry
from mlxroute.large.http.address import Address
from mlxroute.large.http.connections import Auth, HttpSessionPool, check_ca_bundle
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.exchange import Endpoint, Exchange, HttpReply
from mlxroute.large.http.stream_listener import StreamListener
from mlxroute.ledger import Ledger
from mlxroute.types.limits import shown_value

# Exchanges whose threads may outlive their calls: a name lookup or a proxy can block a thread.
MAX_HANGING: Final = 4
# On a busy machine a thread takes a while to end.
_HANGS_AFTER_S: Final = 2.0
# Share of the time limit of a call without a reply before a backup request (Dean and Barroso, The
# Tail at Scale), which is for used connections only.
_BACKUP_AFTER_SHARE: Final = 1 / 3
_USUAL_FACTOR: Final = 2.0
# Replies that show how slow a server usually is: those of several answers.
_USUAL_REPLIES: Final = 100
# Used connections in a row that a server was silent on, after which every request gets a new one.
_MAX_SILENT: Final = 2


class Transport:
    """The connections to one server; retries transient failures. Safe for several threads.

    Args:
        address: The address of the server.
        api_key: The key sent as a bearer token. Default: none.
        connect_timeout_s: The limit for opening a connection, in seconds. Default: 5.
        ca_bundle: A file of PEM certificates that the server's certificate is checked against.
            Default: the authorities of `requests`.
        ledger: Records every request body, and gets the key and password as secrets. Default: a
            ledger that only counts.
        sleep: Waits for some seconds before a retry. Default: a wait that ends when the call is
            cancelled.
        random: Returns a number from 0 to 1, by which the waits vary.

    Raises:
        UsageError: The key, the certificates or the ledger cannot be used.
    """

    def __init__(
        self,
        address: Address,
        *,
        api_key: str | None = None,
        connect_timeout_s: float = 5.0,
        ca_bundle: Path | str | None = None,
        ledger: Ledger | None = None,
        sleep: Callable[[float], None] | None = None,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._address = address
        auth = Auth(address, api_key)
        self._sleep = sleep
        self._random = random
        ledger = Ledger() if ledger is None else ledger
        if not isinstance(ledger, Ledger):
            raise UsageError(
                f"ledger must be a Ledger, such as Ledger(path), not {shown_value(ledger)}",
                parameter="ledger",
            )
        self._secrets = ledger.secrets
        self._secrets.add(*auth.secrets)
        self._endpoint = Endpoint(
            address,
            HttpSessionPool(address, auth),
            connect_timeout_s=connect_timeout_s,
            verify=True if ca_bundle is None else check_ca_bundle(ca_bundle),
            ledger=ledger,
        )
        self._lock = threading.Lock()
        # Of the calls in progress; several may share one.
        self._deadlines: list[Deadline] = []
        # With the times at which their calls ended.
        self._outliving: list[tuple[Exchange, float]] = []
        self._reply_times_s: deque[float] = deque(maxlen=_USUAL_REPLIES)
        self._is_warm = False
        self._silent_connections = 0
        self.is_reachable = False
        """Whether the server has answered a request, with whatever status."""
        self.last_served_s = -math.inf
        """When `record_served` was called last, on the monotonic clock."""

    @property
    def has_served(self) -> bool:
        """Whether the server has answered a request that needs its model."""
        return self.last_served_s > -math.inf

    def call(
        self,
        path: str,
        *,
        deadline: Deadline,
        body: bytes | None = None,
        at_root: bool = False,
        listener: StreamListener[bytes] | None = None,
        whole_answer: bool = False,
    ) -> HttpReply:
        """GET a path below the base address, or POST `body` to it. Raises LargeError.

        With `at_root` the path is below the server's root, whatever path the base address has.
        Transient failures are retried while the deadline leaves time, unless `listener` has used
        part of a reply; it is called from another thread.

        `whole_answer` is True for a reply that begins only when a long answer is complete. It has a
        connection of its own, so that silence is no reason to send the request a second time.
        """
        url = (self._address.root if at_root else self._address.url) + path
        begin = partial(
            self.begin,
            url,
            deadline=deadline,
            body=body,
            listener=listener,
            whole_answer=whole_answer,
        )
        with self._lock:
            self._deadlines.append(deadline)
        try:
            reply = self._reply_with_retries(partial(self._attempt, begin, deadline), deadline)
        finally:
            with self._lock:
                self._deadlines.remove(deadline)
        self.is_reachable = True
        return reply

    def record_served(self) -> None:
        """Record that a reply to a POST request was one of the server's model, and no error."""
        self.last_served_s = time.monotonic()

    def begin(
        self,
        url: str,
        *,
        deadline: Deadline,
        body: bytes | None = None,
        listener: StreamListener[bytes] | None = None,
        backup_of: Exchange | None = None,
        whole_answer: bool = False,
    ) -> Exchange:
        """Send one request and return without waiting for its reply.

        `backup_of` and `whole_answer` are as in Exchange.
        """
        exchange = Exchange(
            self._endpoint,
            url,
            body=body,
            deadline=deadline,
            listener=listener,
            backup_of=backup_of,
            fresh=self._silent_connections >= _MAX_SILENT,
            whole_answer=whole_answer,
        )
        exchange.start()
        return exchange

    def redact(self, text: str) -> str:
        """Replace the key or password in a server's text, which may echo it."""
        return self._secrets.redact(text)

    def has_secret(self, text: str) -> bool:
        """Return whether a server's text has the key or password, or its beginning."""
        return self._secrets.appear_in(text)

    def close(self) -> None:
        """Cancel every call and close the connections; a later call opens new ones."""
        with self._lock:
            deadlines = list(self._deadlines)
        for deadline in deadlines:
            deadline.cancel()
        self._endpoint.sessions.close()

    def _reply_with_retries(self, attempt: Callable[[], Exchange], deadline: Deadline) -> HttpReply:
        """Return the reply of the first attempt that succeeds or fails permanently."""
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

    def _attempt(self, begin: Callable[..., Exchange], deadline: Deadline) -> Exchange:
        """Return a finished exchange. Raises LargeError at the deadline, or if it has passed.

        A connection that was used before may have been dropped without a word: if no reply begins
        on it for long, a backup request is sent on a new one, and the first reply is used.
        """
        self._check_hanging()
        if not (began_left_s := deadline.left_s()):
            raise deadline.error(self._address.url)
        exchanges = [begin()]
        first = exchanges[0]
        try:
            deadline.wait_for(lambda: first.finished, limit_s=self._backup_delay_s(deadline))
            is_silent = not first.finished and not first.has_reply
            if is_silent and first.reuses_connection and deadline.left_s():
                lost_s = began_left_s - deadline.left_s()
                exchanges.append(begin(backup_of=first))
            if not first.finished:
                deadline.wait_for(lambda: _winner(exchanges) is not None)
        finally:
            # A late reply must not be read, and the thread should not outlive the call.
            winner = _winner(exchanges)
            for exchange in exchanges:
                if exchange is not winner:
                    self._end(exchange)
        if winner is None:
            raise first.deadline_error()
        winner.join()
        if winner is not first:
            deadline.lost_s += lost_s
            self._silent_connections += 1
        elif first.reuses_connection and first.has_reply:
            self._silent_connections = 0
        # A whole answer takes as long as its text, and says nothing of calls for tokens.
        if not winner.is_whole_answer:
            self._record_reply_time(winner.reply_began_s)
        return winner

    def _record_reply_time(self, seconds: float) -> None:
        if self.has_served and not self._is_warm:
            # The first reply of the model may have waited until the server had loaded it.
            self._is_warm = True
            self._reply_times_s.clear()
        self._reply_times_s.append(seconds)

    def _backup_delay_s(self, deadline: Deadline) -> float:
        """Return the seconds without a reply after which a backup request is sent.

        A server that is slow by nature is not sent every request twice.
        """
        slowest_s = max(tuple(self._reply_times_s), default=0.0)
        return max(deadline.seconds * _BACKUP_AFTER_SHARE, _USUAL_FACTOR * slowest_s)

    def _end(self, exchange: Exchange) -> None:
        if not exchange.finished and not exchange.abort():
            with self._lock:
                self._outliving.append((exchange, time.monotonic()))

    def _check_hanging(self) -> None:
        with self._lock:
            self._outliving = [item for item in self._outliving if item[0].is_alive()]
            hangs_before_s = time.monotonic() - _HANGS_AFTER_S
            if sum(ended_s <= hangs_before_s for _, ended_s in self._outliving) < MAX_HANGING:
                return
        raise LargeUnavailable(
            f"no call to {self._address.url}: {MAX_HANGING} earlier calls still hang"
        )


def _winner(exchanges: Sequence[Exchange]) -> Exchange | None:
    """Return the exchange that has the reply or, if all failed without one, the last; else None."""
    for exchange in exchanges:
        if exchange.has_reply:
            return exchange if exchange.finished else None
    return exchanges[-1] if all(exchange.finished for exchange in exchanges) else None
