"""Connections that die without a word while idle, or of which the server stops reading."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mlxroute.errors import LargeTimeout
from mlxroute.large import LargeModel
from mlxroute.large.http import connections
from mlxroute.large.http import transport as transport_module
from mlxroute.large.http.address import parse_address
from mlxroute.large.http.connections import Auth, HttpSessionPool
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.exchange import Exchange
from mlxroute.large.http.transport import MAX_HANGING, Transport
from tests.support.connected_clients import VOCABULARY, legacy
from tests.support.loopback import Loopback, Reply
from tests.support.negotiated import negotiated
from tests.support.scripted_models import FakeClock
from tests.support.vocabularies import context


class DroppingServer:
    """Answers the first request of each connection and ignores all later ones."""

    def __init__(self) -> None:
        self.requests = 0
        self.connections = 0
        self._sockets: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"

    def close(self) -> None:
        for sock in (self._listening, *self._sockets):
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            self._sockets.append(sock)
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        body = Reply.of(legacy("a")).body
        try:
            answered = False
            while data := sock.recv(65536):
                self.requests += data.count(b"POST ")
                if not answered and data.endswith(b"}"):
                    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
                    sock.sendall(head + body)
                    answered = True
        except OSError:
            return


@contextmanager
def dropping_server() -> Iterator[DroppingServer]:
    server = DroppingServer()
    try:
        yield server
    finally:
        server.close()


def test_a_call_on_a_dropped_connection_is_repeated_on_a_new_one_in_time() -> None:
    with dropping_server() as server, negotiated(LargeModel(server.url, timeout_s=3)) as large:
        for number in range(3):
            token = large.next_token(context("x", VOCABULARY))
            assert token.text == "a"
            # The waiting was a failure, which counts against an answer's allowance.
            assert (token.lost_s > 0.75) is (number > 0)
    assert server.connections == 3
    assert large.uploads.requests == 5


def test_after_two_dropped_connections_every_call_gets_a_new_one() -> None:
    with dropping_server() as server, negotiated(LargeModel(server.url, timeout_s=3)) as large:
        tokens = [large.next_token(context("x", VOCABULARY)) for _ in range(8)]
    assert [token.lost_s > 0.5 for token in tokens] == [False, True, True, *[False] * 5]
    assert server.connections == 8


def test_a_new_connection_that_is_silent_is_not_doubted() -> None:
    with Loopback() as server:
        server.script.append(Reply(stall_s=30))
        with negotiated(LargeModel(server.url)) as large, pytest.raises(LargeTimeout):
            large.next_token(context("x", VOCABULARY), deadline_s=0.6)
        assert len(server.requests) == 1


def test_a_server_that_is_slow_by_nature_is_not_asked_twice() -> None:
    slow = Reply(Reply.of(legacy("a")).body, stall_s=0.7)
    with Loopback(lambda request: slow) as server:
        transport = Transport(parse_address(server.url))
        for _ in range(2):
            reply = transport.call("/completions", body=b"{}", deadline=Deadline(1.8))
            assert reply.status == 200
        assert len(server.requests) == 2
        transport.close()


def test_a_slow_start_does_not_make_every_later_connection_trusted() -> None:
    """The first reply waits for the model to be loaded; a connection may still be dropped later."""
    with Loopback(lambda request: Reply()) as server:
        transport = Transport(parse_address(server.url))
        server.script.append(Reply(stall_s=1.2))
        for seconds in (30, 30):
            transport.call("/completions", body=b"{}", deadline=Deadline(seconds))
            transport.record_served()
        server.script.append(Reply(stall_s=20))
        transport.call("/completions", body=b"{}", deadline=Deadline(2.1))
        assert len(server.requests) == 4
        transport.close()


def test_the_first_reply_of_two_is_used_whichever_connection_it_comes_from() -> None:
    """The used connection was only slow, and the new one is slower."""
    replies = [Reply(b'{"n": 1}', stall_s=0.7), Reply(b'{"n": 2}', stall_s=20)]
    with Loopback() as server:
        transport = Transport(parse_address(server.url))
        server.script.append(Reply())
        transport.call("/completions", body=b"{}", deadline=Deadline(30))
        server.script.extend(replies)
        reply = transport.call("/completions", body=b"{}", deadline=Deadline(1.5))
        assert reply.body == b'{"n": 1}'
        assert len(server.requests) == 3
        server.script.append(Reply(b'{"n": 3}'))
        assert transport.call("/completions", body=b"{}", deadline=Deadline(30)).body == b'{"n": 3}'
        transport.close()


def test_connections_that_were_idle_for_a_minute_are_not_used_again() -> None:
    clock = FakeClock()
    address = parse_address("http://127.0.0.1:1/v1")
    pool = HttpSessionPool(address, Auth(address, None), clock=clock)
    first, second = pool.acquire(), pool.acquire()
    pool.release(first)
    clock.now = 30.0
    pool.release(second)
    assert pool.acquire() is second
    pool.release(second)
    clock.now = 60.0
    assert pool.acquire() is second
    pool.release(second)
    clock.now = 120.0
    assert pool.acquire() not in (first, second)
    pool.close()


def test_idle_connections_are_kept_alive_by_tcp() -> None:
    options = dict(((level, name), value) for level, name, value in connections._socket_options())
    assert options[socket.SOL_SOCKET, socket.SO_KEEPALIVE] == 1
    with Loopback(lambda request: Reply()) as server:
        transport = Transport(parse_address(server.url))
        transport.call("/completions", body=b"{}", deadline=Deadline(30))
        (session,) = (session for _, session in transport._endpoint.sessions._idle)
        (sock,) = session._adapter._sockets
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        transport.close()


def test_a_cancelled_exchange_leaves_no_connection_behind() -> None:
    """It may end after its client was closed, which closes the idle connections only once."""
    with Loopback(lambda request: Reply()) as server:
        transport = Transport(parse_address(server.url))
        transport.close()
        deadline = Deadline(30)
        deadline.cancel()
        exchange = transport.begin(f"{server.url}/models", deadline=deadline)
        exchange.join()
        assert transport._endpoint.sessions._idle == []


def test_an_aborted_session_is_not_used_again() -> None:
    address = parse_address("http://127.0.0.1:1/v1")
    pool = HttpSessionPool(address, Auth(address, None))
    session = pool.acquire()
    pool.release(session)
    session.abort()
    assert pool.acquire() is not session
    pool.close()


def test_a_half_closed_connection_is_replaced_at_once() -> None:
    with (
        Loopback(lambda request: Reply.of(legacy("a"))) as server,
        negotiated(LargeModel(server.url)) as large,
    ):
        large.next_token(context("x", VOCABULARY))
        server.hang_up()
        began_s = time.monotonic()
        assert large.next_token(context("x", VOCABULARY)).text == "a"
        assert time.monotonic() - began_s < 5.0


def test_a_whole_answer_is_asked_for_once_however_long_it_takes() -> None:
    """It is silent until it is complete, on a connection that no other request has used."""
    with Loopback(lambda request: Reply()) as server:
        transport = Transport(parse_address(server.url))
        transport.call("/completions", body=b"{}", deadline=Deadline(30))
        server.script.append(Reply(stall_s=1.0))
        deadline = Deadline(1.8)
        transport.call("/chat/completions", body=b"{}", deadline=deadline, whole_answer=True)
        assert (len(server.requests), server.connections) == (2, 2)
        # The connection that was idle meanwhile still serves.
        transport.call("/completions", body=b"{}", deadline=Deadline(30))
        assert server.connections == 2
        assert len(transport._endpoint.sessions._idle) == 1
        assert transport._endpoint.sessions._in_use == set()
        transport.close()


def test_slow_whole_answers_leave_dropped_connections_noticed() -> None:
    """A call for a token still notices one after a third of its time."""
    with Loopback(lambda request: Reply()) as server:
        transport = Transport(parse_address(server.url))
        transport.call("/completions", body=b"{}", deadline=Deadline(30))
        server.script.append(Reply(stall_s=1.0))
        transport.call("/chat", body=b"{}", deadline=Deadline(30), whole_answer=True)
        server.script.append(Reply(stall_s=20))
        transport.call("/completions", body=b"{}", deadline=Deadline(1.8))
        assert len(server.requests) == 4
        transport.close()


def test_calls_whose_threads_end_late_refuse_no_other_call(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a busy machine, where the threads of cancelled calls have not ended yet.
    monkeypatch.setattr(Exchange, "abort", lambda exchange: False)
    monkeypatch.setattr(Exchange, "is_alive", lambda exchange: True)
    monkeypatch.setattr(transport_module, "_HANGS_AFTER_S", 60.0)
    with Loopback(lambda request: Reply(stall_s=0.3)) as server:
        transport = Transport(parse_address(server.url))
        for _ in range(MAX_HANGING):
            with pytest.raises(LargeTimeout):
                transport.call("/completions", body=b"{}", deadline=Deadline(0.02))
        reply = transport.call("/completions", body=b"{}", deadline=Deadline(30))
        assert reply.status == 200
        transport.close()
