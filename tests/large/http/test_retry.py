"""Retries of transient failures; connections are reused, and threads end."""

from __future__ import annotations

import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from http.client import IncompleteRead, RemoteDisconnected
from unittest.mock import Mock

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.errors import (
    LargeProtocolError,
    LargeRefused,
    LargeTimeout,
    LargeUnavailable,
    LargeUnreachable,
)
from mlxroute.large import LargeModel
from mlxroute.large.http import retry
from mlxroute.large.http import transport as transport_module
from mlxroute.large.http.address import parse_address
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.transport import Transport
from tests.support.connected_clients import VOCABULARY, legacy
from tests.support.loopback import Loopback, Reply, Request
from tests.support.negotiated import ask_once, negotiated
from tests.support.scripted_models import FakeClock
from tests.support.vocabularies import context

NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


# Transient failures and pauses


@pytest.mark.parametrize(
    ("status", "transient"),
    [
        *((status, True) for status in (408, 429, 500, 502, 503, 504, 529)),
        *((status, False) for status in (200, 204, 400, 401, 403, 404, 409, 422, 501, 505, 600)),
    ],
)
def test_transient_statuses(status: int, transient: bool) -> None:
    assert retry.is_transient_status(status) is transient


@pytest.mark.parametrize(
    ("cause", "transient"),
    [
        *((kind(), True) for kind in (ConnectionRefusedError, ConnectionResetError)),
        *((error, True) for error in (BrokenPipeError(), RemoteDisconnected(""))),
        (IncompleteRead(b""), True),
        *((kind(), False) for kind in (TimeoutError, socket.gaierror, ssl.SSLError, OSError)),
        (ssl.SSLCertVerificationError(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_a_lost_connection_is_transient_however_deep_it_is_wrapped(
    cause: Exception, transient: bool
) -> None:
    wrapped = requests.ConnectionError("wrapped")
    wrapped.__context__ = cause
    assert retry.is_transient_error(wrapped) is transient


def test_pauses_grow_to_a_cap_and_half_of_each_is_random() -> None:
    assert [retry.backoff_s(n, lambda: 1.0) for n in range(3)] == [0.1, 0.4, 1.0]
    assert [retry.backoff_s(n, lambda: 0.0) for n in range(3)] == [0.05, 0.2, 0.5]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        (" 0.5 ", 0.5),
        ("Sun, 22 Nov 2026 12:00:20 GMT", 20.0),
        ("Sunday, 22-Nov-26 12:00:20 GMT", 20.0),
        ("Sun Nov 22 12:00:20 2026", 20.0),
        ("Sun, 22 Nov 2026 11:59:00 GMT", 0.0),
        *((value, 0.0) for value in (None, "", "soon", "-5", "1e9", "inf", "nan", "9" * 400)),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(value: str | None, seconds: float) -> None:
    assert retry.retry_after_s(value, now_s=NOW.timestamp()) == seconds


@given(st.text(max_size=60) | st.datetimes().map(str) | st.integers().map(str))
def test_any_retry_after_gives_a_finite_number_of_seconds(value: str) -> None:
    assert 0.0 <= retry.retry_after_s(value, now_s=NOW.timestamp()) < 1e12


# The transport


class Waits:
    """A sleep that only advances a clock."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.clock.now += seconds


def close(transport: Transport, deadline: Deadline) -> None:
    """Close the client of a call."""
    transport.close()


def call(url: str, waits: Waits, *, seconds: float = 30.0, whole_answer: bool = False) -> int:
    """Make one call; return the status of its last reply."""
    transport = Transport(parse_address(url), sleep=waits, random=lambda: 1.0)
    try:
        deadline = Deadline(seconds, clock=waits.clock)
        return transport.call(
            "/completions", body=b'{"a": 1}', deadline=deadline, whole_answer=whole_answer
        ).status
    finally:
        transport.close()


@pytest.mark.parametrize(
    "failure",
    [
        *(Reply(status=status) for status in (408, 429, 500, 502, 503, 504)),
        Reply(cut_at=0),
        Reply(b" " * 400, cut_at=300),
        Reply(b" " * 400, cut_at=300, reset=True),
        Reply(cut_at=0, reset=True),
    ],
    ids=lambda reply: f"{reply.status} cut {reply.cut_at} reset {reply.reset}",
)
def test_a_transient_failure_is_retried_with_the_same_body(
    server: Loopback, failure: Reply
) -> None:
    server.script.extend([failure, failure, Reply()])
    waits = Waits()
    assert call(server.url, waits) == 200
    assert waits.seconds == [0.1, 0.4]
    assert {request.body for request in server.requests} == {b'{"a": 1}'}
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [408, 504, 524])
def test_a_whole_answer_that_takes_too_long_is_not_asked_for_again(
    server: Loopback, status: int
) -> None:
    server.script.append(Reply(status=status))
    assert call(server.url, Waits(), whole_answer=True) == status
    assert len(server.requests) == 1


@pytest.mark.parametrize("failure", [Reply(cut_at=0), Reply(b" " * 400, cut_at=300)])
def test_a_whole_answer_that_may_have_been_written_is_not_asked_for_again(
    server: Loopback, failure: Reply
) -> None:
    server.script.append(failure)
    with pytest.raises(LargeUnreachable):
        call(server.url, Waits(), whole_answer=True)
    assert len(server.requests) == 1


def test_a_whole_answer_that_was_not_begun_is_asked_for_again(server: Loopback) -> None:
    waits = Waits()
    server.script.extend([Reply(status=status) for status in (429, 500, 503)])
    server.script.append(Reply())
    assert call(server.url, waits, whole_answer=True) == 200
    with server.gone(), pytest.raises(LargeUnreachable, match="Connection refused"):
        call(server.url, waits, whole_answer=True)
    assert waits.seconds == [0.1, 0.4, 1.0] * 2


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 422, 501])
def test_any_other_reply_is_final(server: Loopback, status: int) -> None:
    server.script.append(Reply(status=status))
    assert call(server.url, Waits()) == status
    assert len(server.requests) == 1


def test_a_refused_connection_is_retried_and_then_unreachable(server: Loopback) -> None:
    waits = Waits()
    with server.gone(), pytest.raises(LargeUnreachable, match="Connection refused"):
        call(server.url, waits)
    assert waits.seconds == [0.1, 0.4, 1.0]
    server.script.append(Reply())
    assert call(server.url, waits) == 200


def test_after_the_last_retry_the_failed_reply_is_returned(server: Loopback) -> None:
    server.script.extend([Reply(status=500), *[Reply(status=503)] * retry.RETRIES])
    assert call(server.url, Waits()) == 503
    assert len(server.requests) == 1 + retry.RETRIES


def test_a_read_timeout_is_not_retried(server: Loopback) -> None:
    server.script.append(Reply(stall_s=30))
    transport = Transport(parse_address(server.url))
    with pytest.raises(LargeTimeout):
        transport.call("/completions", body=b"{}", deadline=Deadline(0.1))
    assert len(server.requests) == 1


def test_a_malformed_reply_is_not_retried(server: Loopback) -> None:
    with pytest.raises(LargeProtocolError):
        ask_once(server, Reply(b"{}"))
    assert len(server.requests) == 1


def test_no_pause_exceeds_the_deadline(server: Loopback) -> None:
    server.script.extend([Reply(status=503)] * 3)
    waits = Waits()
    assert call(server.url, waits, seconds=0.5) == 503
    assert waits.seconds == [0.1]
    assert waits.clock.now < 0.5


def test_a_retry_after_within_the_deadline_is_waited_for(server: Loopback) -> None:
    date = format_datetime(datetime.fromtimestamp(time.time() + 20, UTC), usegmt=True)
    server.script.append(Reply(status=429, headers={"Retry-After": "7"}))
    server.script.append(Reply(status=503, headers={"Retry-After": date}))
    server.script.append(Reply())
    waits = Waits()
    assert call(server.url, waits) == 200
    assert waits.seconds[0] == 7.0
    # A date has whole seconds, and some time passes before it is read.
    assert 0.4 < waits.seconds[1] <= 20.0


def test_a_pause_that_hosted_servers_ask_for_in_their_own_way_is_waited_for(
    server: Loopback,
) -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "3.25s"}]
    quota = {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": details}
    server.script.append(Reply.of([{"error": quota}], status=429))
    server.script.append(Reply(status=429, headers={"retry-after-ms": "1500"}))
    server.script.append(Reply(status=429, headers={"retry-after-ms": "9", "Retry-After": "2"}))
    server.script.append(Reply())
    waits = Waits()
    assert call(server.url, waits) == 200
    assert waits.seconds == [3.25, 1.5, 2.0]


@given(st.dictionaries(st.sampled_from(["Retry-After", "retry-after-ms"]), st.text()), st.binary())
def test_any_reply_asks_for_a_pause_of_some_seconds_or_none(
    headers: dict[str, str], body: bytes
) -> None:
    for whole in (body, b'"retryDelay": "' + body + b's"'):
        assert 0 <= retry.asked_pause_s(headers, whole, now_s=1e9) < float("inf")


def test_a_retry_after_beyond_the_deadline_fails_at_once_and_is_reported(server: Loopback) -> None:
    server.script.append(
        Reply(b'{"error": "slow down"}', status=429, headers={"Retry-After": "1800"})
    )
    with negotiated(LargeModel(server.url, model="m")) as large:
        with pytest.raises(LargeRefused) as caught:
            large.next_token(context("x", VOCABULARY))
        assert str(caught.value).endswith(
            "answered 429: slow down; it asks to be called again in 1,800 s"
        )
        # The breaker pauses for as long.
        with pytest.raises(LargeUnavailable, match=r"paused for another 1[78]\d\d s"):
            large.next_token(context("x", VOCABULARY))
    assert len(server.requests) == 1


def test_a_token_reports_the_time_lost_to_failed_attempts(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.02)
    token = Reply.of(legacy("a"))
    server.script.extend([token, Reply(status=503), token, token])
    with negotiated(LargeModel(server.url, model="m")) as large:
        tokens = [large.next_token(context("x", VOCABULARY)) for _ in range(3)]
    assert [token.lost_s >= 0.01 for token in tokens] == [False, True, False]
    assert tokens[1].lost_s < tokens[1].latency_s


def test_an_interrupt_ends_a_pause_at_once(server: Loopback) -> None:
    server.script.append(Reply(status=503, headers={"Retry-After": "25"}))
    transport = Transport(parse_address(server.url))
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    began_s = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        transport.call("/completions", body=b"{}", deadline=Deadline(30))
    timer.join()
    assert time.monotonic() - began_s < 20


@pytest.mark.parametrize("end", [lambda transport, deadline: deadline.cancel(), close])
def test_a_call_that_ends_in_a_pause_sends_nothing_more(
    server: Loopback,
    end: Callable[[Transport, Deadline], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.script.append(Reply(status=503, headers={"Retry-After": "2"}))
    deadline = Deadline(30)
    transport = Transport(parse_address(server.url), sleep=lambda seconds: end(transport, deadline))
    begin = Mock(wraps=transport.begin)
    monkeypatch.setattr(transport, "begin", begin)
    with pytest.raises(LargeUnavailable, match="was cancelled"):
        transport.call("/completions", body=b"{}", deadline=deadline)
    assert begin.call_count == len(server.requests) == 1
    transport.close()


def test_a_cancelled_call_sends_nothing(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    transport, deadline = Transport(parse_address(server.url)), Deadline(30)
    deadline.cancel()
    begin = Mock(wraps=transport.begin)
    monkeypatch.setattr(transport, "begin", begin)
    with pytest.raises(LargeUnavailable, match="was cancelled"):
        transport.call("/completions", body=b"{}", deadline=deadline)
    assert not begin.called


def test_closing_ends_a_call_of_another_thread_and_sends_nothing_more(server: Loopback) -> None:
    transport = Transport(parse_address(server.url))

    def answer(request: Request) -> Reply:
        transport.close()
        return Reply(stall_s=20)

    server.answer = answer
    with pytest.raises(LargeUnavailable, match="was cancelled"):
        transport.call("/completions", body=b"{}", deadline=Deadline(30))
    assert len(server.requests) == 1
    server.answer = lambda request: Reply()
    assert transport.call("/completions", body=b"{}", deadline=Deadline(30)).status == 200
    transport.close()


# Connections and threads


def test_one_connection_serves_many_calls_and_retries(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.001)
    for _ in range(20):
        server.script.extend([Reply.of(legacy("a")), Reply(status=429), Reply.of(legacy("a"))])
    with negotiated(LargeModel(server.url, model="m")) as large:
        for _ in range(40):
            large.next_token(context("x", VOCABULARY))
    assert len(server.requests) == 60
    assert server.connections == 1


def exchange_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mlxroute-exchange"]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(b" " * 900, byte_every_s=0.03),
        Reply(raw=b"HTTP/1.0 200 OK\r\n\r\n" + b" " * 900, byte_every_s=0.03),
        Reply(raw=b"HTTP/1.1 200 OK\r\nX: " + b"y" * 900, byte_every_s=0.03),
    ],
    ids=["slow body", "slow body of HTTP/1.0", "slow header"],
)
def test_the_thread_of_a_timed_out_exchange_ends(server: Loopback, reply: Reply) -> None:
    server.script.append(reply)
    transport = Transport(parse_address(server.url))
    with pytest.raises(LargeTimeout):
        transport.call("/completions", body=b"{}", deadline=Deadline(0.3))
    for thread in exchange_threads():
        # Each byte is in time for its own read; unaborted, all of them take half a minute.
        thread.join(10)
        assert not thread.is_alive()


def test_the_number_of_hanging_exchanges_is_bounded(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    look_up = socket.getaddrinfo

    def slow(*arguments: object) -> object:
        released.wait(60)
        return look_up(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(transport_module, "_HANGS_AFTER_S", 0.0)
    server.script.append(Reply())
    transport = Transport(parse_address(server.url))
    before = len(exchange_threads())
    try:
        for attempt in range(12):
            kind = LargeTimeout if attempt < 4 else LargeUnavailable
            with pytest.raises(kind):
                transport.call("/completions", body=b"{}", deadline=Deadline(0.02))
        assert len(exchange_threads()) == before + 4
    finally:
        released.set()
    for thread in exchange_threads():
        thread.join(10)
    assert server.requests == []
    assert transport.call("/completions", body=b"{}", deadline=Deadline(30)).status == 200


def test_a_token_longer_than_in_any_vocabulary_is_refused(server: Loopback) -> None:
    with pytest.raises(LargeProtocolError, match="10,000 characters as one token"):
        ask_once(server, legacy("a" * 10_000))
